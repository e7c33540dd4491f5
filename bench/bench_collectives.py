"""All-reduce and barrier between two processes: tp_native beside Gloo, and beside the hardware.

Starts its own ranks. Prints the time of an all-reduce on ordinary and on shared tensors in
producer/consumer mode, its ratio to Gloo (of the best rounds; more than 1: tp_native is faster),
and from ``tpn_microbench`` the fraction of the cache-to-cache exchange limit that native code
reaches. Every result is compared with a float64 sum.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
import uuid
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import tp_native as tp
from timing import (
    Candidate,
    Plan,
    environment,
    measure,
    net,
    pin_rank,
    plan_facts,
    producer_consumer,
    write_json,
)

SIZES = [256, 1 << 10, 4 << 10, 16 << 10, 64 << 10, 256 << 10, 1 << 20, 4 << 20]
QUICK_SIZES = [256, 64 << 10, 1 << 20]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
PRIVATE = "all_reduce/private/producer_consumer"  # tpn_microbench's names
SHARED = "all_reduce/shared/producer_consumer"
RANKS = 2
DEADLINE_S = 900.0


# -- one rank


def join_gloo(listener: int | None) -> None:
    """Gloo over loopback; rank 0's store listens on the socket that the parent has bound there."""
    rank = int(os.environ["RANK"])
    store = dist.TCPStore(  # type: ignore[attr-defined]
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        RANKS,
        is_master=rank == 0,
        timeout=timedelta(seconds=60),
        wait_for_workers=False,
        master_listen_fd=listener,
    )
    dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS)


def check_against(sources: list[Tensor], sink: Tensor, name: str) -> Callable[[], None]:
    """A check that ``sink`` holds the sum of ``sources``, within one rounding per term."""
    expected = torch.stack([source.double() for source in sources]).sum(0)
    bound = torch.stack([source.double().abs() for source in sources]).sum(0)
    bound *= torch.finfo(sink.dtype).eps * len(sources)

    def check() -> None:
        wrong = (sink.double() - expected).abs() > bound
        if wrong.any():
            raise AssertionError(f"{name}: {int(wrong.sum())} of {sink.numel()} sums are wrong")

    return check


def all_reduce_row(group: tp.Group, size: int, dtype: str, plan: Plan) -> dict[str, Any]:
    """Gloo, ordinary tensors and shared tensors at one size."""
    kind = DTYPES[dtype]
    count = size // kind.itemsize
    sources = [
        torch.rand(count, generator=torch.Generator().manual_seed(rank)).sub_(0.5).to(kind)
        for rank in range(group.size)
    ]
    tensors = {
        "gloo": torch.ones(count, dtype=kind),
        "private": torch.ones(count, dtype=kind),
        "shared": group.empty_shared(count, dtype=kind).fill_(1),
    }
    sink = torch.ones(count, dtype=kind)
    candidates: list[Candidate] = []
    for path, t in tensors.items():

        def collective(t: Tensor = t, path: str = path) -> None:
            if path == "gloo":
                dist.all_reduce(t)
            else:
                group.all_reduce_(t)

        name = f"{path}, {dtype}, {size} bytes"
        check = check_against(sources, sink, name)
        candidates += producer_consumer(path, collective, sources[group.rank], t, sink, check)
    timings = measure(group, candidates, plan)
    row: dict[str, Any] = {"op": "all_reduce", "dtype": dtype, "bytes": size, "verified": True}
    for path in tensors:
        timing = net(timings, path)
        bus_factor = 2 * (group.size - 1) / group.size
        algorithm = size / timing.best_us / 1e3
        row[path] = {
            **timing.figures(),
            "gross": timings[path].figures(),
            "alg_gb_per_s": algorithm,
            "bus_gb_per_s": algorithm * bus_factor,
        }
    return row | ratios(row)


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
    return row | ratios(row)


def ratios(row: dict[str, Any]) -> dict[str, float]:
    """Gloo's best over ours."""
    return {
        f"gloo_over_{path}": row["gloo"]["best_us"] / row[path]["best_us"]
        for path in ("private", "shared")
        if path in row
    }


def run_rank(quick: bool, listener: int | None) -> None:
    """The life of one rank; rank 0 prints the rows as JSON on its standard output."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: nothing outlives the parent
    if os.getppid() != int(os.environ["TPN_BENCH_PARENT"]):
        raise SystemExit(1)
    torch.set_num_threads(1)
    plan = Plan.quick() if quick else Plan()
    with tp.init_tensor_parallel(timeout_s=60) as group:
        join_gloo(listener)
        pin_rank(group)
        rows = [barrier_row(group, plan)]
        for dtype in DTYPES:
            for size in QUICK_SIZES if quick else SIZES:
                rows.append(all_reduce_row(group, size, dtype, plan))
        if group.rank == 0:
            print(json.dumps({"plan": plan_facts(plan), "rows": rows}), flush=True)
        group.barrier()
        dist.destroy_process_group()


# -- the parent


def start_ranks(quick: bool) -> dict[str, Any]:
    """Run the ranks; what rank 0 printed. The first failure ends the others."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        env = {
            **os.environ,
            "WORLD_SIZE": str(RANKS),
            "LOCAL_WORLD_SIZE": str(RANKS),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(listener.getsockname()[1]),
            "GLOO_SOCKET_IFNAME": "lo",
            "TORCHELASTIC_RUN_ID": uuid.uuid4().hex,
            "TPN_BENCH_PARENT": str(os.getpid()),
        }
        command = [sys.executable, __file__, *(["--quick"] if quick else [])]
        ranks: list[subprocess.Popen[str]] = []
        with tempfile.TemporaryFile("w+") as output:
            for rank in range(RANKS):
                fd = os.dup(listener.fileno()) if rank == 0 else None
                ranks.append(
                    subprocess.Popen(
                        [*command, "--as-rank", *([str(fd)] if fd is not None else [])],
                        env={**env, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                        stdout=output if rank == 0 else subprocess.DEVNULL,
                        pass_fds=[fd] if fd is not None else [],
                        text=True,
                    )
                )
                if fd is not None:
                    os.close(fd)
            wait_for(ranks)
            output.seek(0)
            result: dict[str, Any] = json.loads(output.read())
            return result


def wait_for(ranks: list[subprocess.Popen[str]]) -> None:
    """Until all have ended well; else end the rest and raise."""
    end = time.monotonic() + DEADLINE_S
    try:
        while any(rank.poll() is None for rank in ranks):
            failed = [i for i, rank in enumerate(ranks) if rank.poll()]
            if failed or time.monotonic() > end:
                break
            time.sleep(0.05)
        bad = {i: rank.poll() for i, rank in enumerate(ranks) if rank.poll() != 0}
        if bad:
            raise RuntimeError(f"ranks ended with status {bad} (None: had to be stopped)")
    finally:
        for rank in ranks:
            if rank.poll() is None:
                rank.kill()
            rank.wait()


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


def run_microbench(program: Path, quick: bool) -> dict[str, Any]:
    """The native loops and the physical probes, in processes of their own."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "microbench.json"
        command = [str(program), "--ranks", str(RANKS), "--json", str(path)]
        subprocess.run(
            [*command, *(["--quick"] if quick else [])],
            check=True,
            stdout=subprocess.DEVNULL,
            timeout=DEADLINE_S,
        )
        result: dict[str, Any] = json.loads(path.read_text())
        return result


def size_text(size: int) -> str:
    for unit, name in ((1 << 20, "MiB"), (1 << 10, "KiB")):
        if size >= unit and size % unit == 0:
            return f"{size // unit} {name}"
    return f"{size} B"


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
    parser.add_argument("--as-rank", type=int, nargs="?", const=-1, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    args = parse()
    if args.as_rank is not None:
        run_rank(args.quick, args.as_rank if args.as_rank >= 0 else None)
        return 0
    try:
        microbench = args.microbench or find_microbench()
        result = {
            "benchmark": "bench_collectives",
            "quick": args.quick,
            "ranks": RANKS,
            "environment": environment(),
            **start_ranks(args.quick),
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
