"""All-reduce and barrier between two processes: tp_native beside Gloo, and beside the hardware.

Starts its own ranks. Prints the time of an all-reduce on ordinary and on shared tensors in
producer/consumer mode, its ratio to Gloo (of the best rounds; more than 1: tp_native is faster),
and from ``tpn_microbench`` the fraction of the cache-to-cache exchange limit that native code
reaches. Every result is compared with a float64 sum.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import tp_native as tp
from cases import DTYPES, all_reduce_row, ratios, size_text
from ranks import DEADLINE_S, join_group, leave_group, start_ranks
from timing import Candidate, Plan, environment, measure, plan_facts, write_json

SIZES = [256, 1 << 10, 4 << 10, 16 << 10, 64 << 10, 256 << 10, 1 << 20, 4 << 20]
QUICK_SIZES = [256, 64 << 10, 1 << 20]
PRIVATE = "all_reduce/private/producer_consumer"  # tpn_microbench's names
SHARED = "all_reduce/shared/producer_consumer"
RANKS = 2


# -- one rank


def barrier_row(group: tp.Group, plan: Plan) -> dict[str, Any]:
    """The two barriers, and that ours is one: nobody leaves before the last has come."""
    left_early = torch.zeros(1, dtype=torch.float64)
    for late in range(group.size):
        came = torch.zeros(1, dtype=torch.float64)
        if group.rank == late:
            time.sleep(0.005)
            came[0] = time.monotonic()
        group.barrier()
        left = time.monotonic()
        group.broadcast_(came, late)
        left_early += left < came.item()
    if left_early.item():
        raise AssertionError("barrier: a rank left before the last one came")
    timings = measure(
        group, [Candidate("gloo", dist.barrier), Candidate("private", group.barrier)], plan
    )
    row: dict[str, Any] = {"op": "barrier", "bytes": 0, "verified": True}
    row |= {name: timing.figures() for name, timing in timings.items()}
    return row | ratios(row, ["gloo"], ["private"])


def run_rank(quick: bool, path: str) -> None:
    """The life of one rank."""
    plan = Plan.quick() if quick else Plan()
    group = join_group()
    rows = [barrier_row(group, plan)]
    gloo = {"gloo": dist.all_reduce}
    ours = {"private": group.all_reduce_, "shared": group.all_reduce_}
    for dtype in DTYPES:
        for size in QUICK_SIZES if quick else SIZES:
            rows.append(all_reduce_row(group, size, dtype, gloo, ours, plan))
    leave_group(group, {"plan": plan_facts(plan), "rows": rows}, path)


# -- the parent


def find_microbench() -> Path:
    """Beside the package, or in site-packages where the package is an editable install."""
    package = Path(tp.__file__).parent
    installed = [Path(sysconfig.get_path(name)) / "tp_native" for name in ("platlib", "purelib")]
    for folder in (package, *installed):
        found = folder / "bin" / "tpn_microbench"
        if found.is_file():
            return found
    raise FileNotFoundError(
        f"no bin/tpn_microbench in {package} or {installed[0]}: install tp_native again "
        "(`make setup`), or name one with --microbench"
    )


def run_microbench(
    program: Path, quick: bool, sizes: Sequence[int] | None = None
) -> dict[str, Any]:
    """The native loops and the physical probes, in processes of their own."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "microbench.json"
        command = [str(program), "--ranks", str(RANKS), "--json", str(path)]
        if sizes:
            command += ["--sizes", ",".join(map(str, sizes))]
        subprocess.run(
            [*command, *(["--quick"] if quick else [])],
            check=True,
            stdout=subprocess.DEVNULL,
            timeout=DEADLINE_S,
        )
        result: dict[str, Any] = json.loads(path.read_text())
        return result


def print_tables(result: dict[str, Any]) -> None:
    facts = result["environment"]
    print(
        f"tp_native {facts['tp_native']} at {facts['commit'][:12]}, torch {facts['torch']}, "
        f"{facts['cpu']}, {facts['cores']} cores, {RANKS} ranks; every result verified\n\n"
        "all-reduce from Python, producer/consumer mode, us net of copies, best (median); "
        "x: Gloo's best over ours"
    )
    print(f"{'':18} {'Gloo':>18} {'ordinary':>18} {'x':>6} {'shared':>18} {'x':>6}")
    for row in result["rows"]:
        label = f"{row.get('dtype', ''):9}{size_text(row['bytes']):>9}"
        line = f"{label if row['bytes'] else row['op']:18}"
        for path in ("gloo", "private", "shared"):
            if path not in row:
                continue
            timing = f"{row[path]['best_us']:.2f} ({row[path]['median_us']:.2f})"
            line += f" {timing:>18}"
            if path != "gloo":
                line += f" {row[f'gloo_over_{path}']:6.1f}"
        print(line)
    native = result["microbench"]
    print("\nall-reduce from native code, float32, beside the exchange limit of the same run")
    print("of limit: ratio of the best rounds (median of the rounds' own ratios)")
    print(
        f"{'':9} {'ordinary us':>12} {'shared us':>10} {'limit GB/s':>11} "
        f"{'ordinary of limit':>18} {'shared of limit':>16}"
    )
    best = {(row["name"], row["bytes"]): row for row in native["rows"]}
    for row in native["fractions"]:
        size = row["bytes"]
        shared = best.get((SHARED, size))
        parts = {
            path: f"{row[f'{path}_of_exchange']:.2f} ({row[f'{path}_of_exchange_rounds']:.2f})"
            for path in ("private", "shared")
            if f"{path}_of_exchange" in row
        }
        print(
            f"{size_text(size):>9} {best[PRIVATE, size]['best_us']:12.2f} "
            f"{format(shared['best_us'], '.2f') if shared else '-':>10} "
            f"{best['exchange', size]['payload_gb_per_s']:11.1f} "
            f"{parts['private']:>18} {parts.get('shared', '-'):>16}"
        )
    barrier = best["barrier", 0]["best_us"]
    print(
        f"barrier {barrier:.2f} us = {native['barrier_over_one_way_flag']:.1f} x the one-way "
        "latency of a flag"
    )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", metavar="PATH", help="write all figures and the environment")
    parser.add_argument("--quick", action="store_true", help="few sizes, 9 short rounds")
    parser.add_argument("--microbench", type=Path, metavar="PATH", help="another tpn_microbench")
    parser.add_argument("--as-rank", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    args = parse()
    if args.as_rank is not None:
        run_rank(args.quick, args.as_rank)
        return 0
    try:
        microbench = args.microbench or find_microbench()
        result = {
            "benchmark": "bench_collectives",
            "quick": args.quick,
            "ranks": RANKS,
            "environment": environment(),
            **start_ranks(RANKS, [__file__, *(["--quick"] if args.quick else [])]),
            "microbench": run_microbench(microbench, args.quick),
        }
    except (RuntimeError, OSError, subprocess.SubprocessError) as error:
        print(f"bench_collectives: {error}", file=sys.stderr)
        return 1
    print_tables(result)
    if args.json:
        write_json(args.json, result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
