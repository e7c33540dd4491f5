"""All-reduce beside other libraries' in the same processes: vLLM, DeepSpeed, Intel MPI, Open MPI.

One run per peer, each with Gloo and tp_native on ordinary ("private") and on shared tensors, in
producer/consumer mode; then a table of ratios against the bars. All but Gloo are called as torch
operators from C++, so that no time of Python's is in them; "method" is ``Group.all_reduce_`` on an
ordinary tensor, as Python calls it, and is not judged. A peer that is not there is reported with
the reason. ``install_peers.sh DIR`` installs them.
"""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from cases import DTYPES, AllReduce, all_reduce_row, size_text
from peers import PEERS, Peer
from ranks import join_group, leave_group, start_ranks
from timing import Operator, Plan, environment, plan_facts, write_json

KIB, MIB = 1 << 10, 1 << 20
SIZES = [256, KIB, 4 * KIB, 8 * KIB, 16 * KIB, 64 * KIB, 256 * KIB, MIB, 4 * MIB]
QUICK_SIZES = [256, 64 * KIB, MIB]
CROWDED_SIZES = [256, KIB, 4 * KIB, 8 * KIB, 64 * KIB, MIB]


@dataclass(frozen=True)
class Bar:
    """The least ratio of a peer's time to ours, for sizes of ``first`` to ``last`` bytes."""

    peer: str
    path: str
    at_least: float
    first: int = 256
    last: int = 4 * MIB
    crowded: bool = False  # more ranks than cores


BARS = [
    Bar("gloo", "private", 15, last=64 * KIB),
    Bar("gloo", "private", 5, 256 * KIB, MIB),
    Bar("gloo", "private", 4, 4 * MIB),
    Bar("gloo", "shared", 30, last=64 * KIB),
    Bar("gloo", "shared", 10, 256 * KIB),
    Bar("vllm", "private", 1.15),
    Bar("vllm", "shared", 2),
    Bar("deepspeed", "private", 1.25),
    Bar("deepspeed", "shared", 2),
    Bar("impi", "private", 1),
    Bar("impi", "shared", 1.3, KIB),
    Bar("openmpi", "private", 1.3, KIB),
    Bar("openmpi", "shared", 2, KIB),
    Bar("vllm", "private", 20, last=64 * KIB, crowded=True),
    Bar("deepspeed", "private", 20, last=64 * KIB, crowded=True),
    Bar("openmpi", "private", 1.5, last=8 * KIB, crowded=True),
]


def make_plan(quick: bool, crowded: bool) -> Plan:
    """Crowded batches span several turns of the scheduler (4 ms)."""
    if crowded:
        return Plan(rounds=9, batch_s=5e-3 if quick else 40e-3)
    return Plan.quick() if quick else Plan()


# -- one rank


def run_rank(peer: Peer, sizes: list[int], quick: bool, path: str) -> None:
    """The life of one rank."""
    group = join_group()
    peer.join(group)
    plan = make_plan(quick, is_crowded(group.size))
    call = Operator(
        f"torch.ops.tp_native.all_reduce_(t, extra, 'sum', '{group.name}')", group.order
    )
    ours: dict[str, AllReduce] = {"private": call, "shared": call, "method": group.all_reduce_}
    rows = []
    for dtype in DTYPES:
        others: dict[str, AllReduce] = {"gloo": dist.all_reduce}
        if dtype in peer.dtypes:
            others[peer.name] = peer.all_reduce_
        rows += [all_reduce_row(group, size, dtype, others, ours, plan) for size in sizes]
    dist.barrier()
    peer.leave()
    leave_group(group, {"plan": plan_facts(plan), "rows": rows}, path)


# -- the parent


def is_crowded(ranks: int) -> bool:
    """More ranks than the machine has cores."""
    return ranks > (os.cpu_count() or 1)


def run_peer(peer: Peer, ranks: int, args: argparse.Namespace) -> dict[str, Any]:
    """All sizes beside one peer, or the reason why not."""
    run = {"peer": peer.name, "title": peer.title, "ranks": ranks, "missing": peer.missing()}
    if run["missing"]:
        return run
    crowded = is_crowded(ranks)
    sizes = args.sizes or (QUICK_SIZES if args.quick else CROWDED_SIZES if crowded else SIZES)
    run |= {"version": peer.version(), "crowded": crowded, "environment": environment()}
    arguments = [
        __file__,
        *("--peers", str(peer.folder), "--peer", peer.name),
        *("--sizes", ",".join(map(str, sizes))),
        *(["--quick"] if args.quick else []),
    ]
    launcher = peer.launcher(ranks)
    try:
        run |= start_ranks(ranks, arguments, launcher=launcher, extra_env=peer.env())
    except RuntimeError as error:
        run["missing"] = f"failed: {error}"
    return run


def judge(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each bar at each size and dtype that was measured. Gloo is judged by the best rounds, which
    swing less than its medians; the others, which spin, by the medians.
    """
    verdicts = []
    for run in runs:
        for row in run.get("rows", []):
            for bar in BARS:
                if (
                    bar.crowded != run["crowded"]
                    or not bar.first <= row["bytes"] <= bar.last
                    or bar.peer not in row
                ):
                    continue
                of_bests = row[f"{bar.peer}_over_{bar.path}"]
                of_medians = row[f"{bar.peer}_over_{bar.path}_median"]
                ratio = of_bests if bar.peer == "gloo" else of_medians
                verdicts.append(
                    {
                        "run": run["peer"],
                        "ranks": run["ranks"],
                        "peer": bar.peer,
                        "path": bar.path,
                        "dtype": row["dtype"],
                        "bytes": row["bytes"],
                        "of_bests": of_bests,
                        "of_medians": of_medians,
                        "at_least": bar.at_least,
                        "passes": ratio >= bar.at_least,
                    }
                )
    return verdicts


def print_times(run: dict[str, Any]) -> None:
    paths = ["gloo", run["peer"], "private", "shared", "method"]
    print(
        f"\n{run['title']} {run['version']}, {run['ranks']} ranks; "
        "us net of copies, median (best); every result verified"
    )
    print(f"{'':18}" + "".join(f"{path:>20}" for path in paths))
    for row in run["rows"]:
        cells = (
            f"{row[path]['median_us']:.2f} ({row[path]['best_us']:.2f})" if path in row else "-"
            for path in paths
        )
        label = f"{row['dtype']:9}{size_text(row['bytes']):>9}"
        print(f"{label:18}" + "".join(f"{cell:>20}" for cell in cells))


def print_verdicts(verdicts: list[dict[str, Any]]) -> None:
    print(
        "\nratio of the peer's time to ours, of medians (of bests), and its bar; "
        "Gloo is judged by the bests\n"
        f"{'ranks':>5} {'peer':10} {'dtype':9} {'size':>8}"
        f" {'ordinary':>18} {'bar':>6}      {'shared':>18} {'bar':>6}"
    )
    keys = ("ranks", "run", "peer", "dtype", "bytes")
    cells: dict[tuple[Any, ...], dict[str, str]] = {}
    for v in verdicts:
        cell = (
            f"{v['of_medians']:10.2f} {'(' + format(v['of_bests'], '.2f') + ')':>8}"
            f" {v['at_least']:6g} {'pass' if v['passes'] else 'MISS'}"
        )
        cells.setdefault(tuple(v[key] for key in keys), {})[v["path"]] = cell
    for (ranks, _, peer, dtype, size), paths in cells.items():
        both = " ".join(f"{paths.get(path, '-'):>30}" for path in ("private", "shared"))
        print(f"{ranks:5} {peer:10} {dtype:9} {size_text(size):>8} {both}")
    passed = sum(v["passes"] for v in verdicts)
    print(f"{passed} of {len(verdicts)} bars reached")


def numbers(text: str) -> list[int]:
    """ "2,4" -> [2, 4]"""
    return [int(part) for part in text.split(",")]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument(
        "--peers", type=Path, metavar="DIR", default=Path("build/peers"),
        help="where install_peers.sh has put them (default build/peers)",
    )  # fmt: skip
    parser.add_argument("--peer", choices=PEERS, help="this one only")
    parser.add_argument("--ranks", type=numbers, default=[2], help="e.g. 2,4 (default 2)")
    parser.add_argument("--sizes", type=numbers, metavar="BYTES", help="e.g. 256,65536")
    parser.add_argument("--json", metavar="PATH", help="write all figures and the environments")
    parser.add_argument("--quick", action="store_true", help="few sizes, 9 short rounds")
    parser.add_argument("--as-rank", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    args = parse()
    if args.as_rank is not None:
        run_rank(PEERS[args.peer](args.peers), args.sizes, args.quick, args.as_rank)
        return 0
    facts = environment()
    print(
        f"tp_native {facts['tp_native']} at {facts['commit'][:12]}, torch {torch.__version__}, "
        f"{facts['cpu']}, {facts['cores']} cores"
    )
    runs = []
    for ranks in args.ranks:
        for name in [args.peer] if args.peer else PEERS:
            run = run_peer(PEERS[name](args.peers), ranks, args)
            runs.append(run)
            if run["missing"]:
                print(f"\n{run['title']}, {ranks} ranks: not measured: {run['missing']}")
            else:
                print_times(run)
    verdicts = judge(runs)
    if verdicts:
        print_verdicts(verdicts)
    if args.json:
        result = {
            "benchmark": "bench_peers",
            "quick": args.quick,
            "environment": facts,
            "runs": runs,
            "bars": verdicts,
        }
        write_json(args.json, result)
    return 1 if any(run["missing"].startswith("failed") for run in runs) else 0


if __name__ == "__main__":
    sys.exit(main())
