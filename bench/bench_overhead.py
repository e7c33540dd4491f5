"""What Python costs around a row-parallel linear layer of tiny size, two ranks.

Native time is at::mm (a scripted loop calls it, from C++) plus the communicator's all-reduce of the
same bytes in ``tpn_microbench``. The operator from Python ("op") and the module's forward
("module") may cost 1 and 2 us more. "pair" is mm and all-reduce in one scripted loop, "scripted"
the operator from C++: what of the cost is not Python's. Every output is compared with float64.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import tp_native as tp
from bench_collectives import find_microbench, run_microbench
from ranks import join_group, leave_group, start_ranks
from timing import Candidate, Plan, environment, measure, plan_facts, scripted, write_json

RANKS = 2
LOCAL_IN, OUT = 64, 64
ALL_REDUCE = "all_reduce/private/bare"  # tpn_microbench's name
BARS_US = {"op": 1.0, "module": 2.0}


# -- one rank


def make_candidates(group: tp.Group) -> list[Candidate]:
    torch.manual_seed(0)  # the same whole layer and input on all ranks
    whole = torch.nn.Linear(LOCAL_IN * group.size, OUT, bias=False)
    layer = tp.RowParallelLinear.from_linear(whole, group=group)
    whole_x = torch.randn(1, whole.in_features)
    x = whole_x.narrow(1, LOCAL_IN * group.rank, LOCAL_IN).contiguous()
    exact = whole_x.double() @ whole.weight.double().T
    weight, transposed = layer.weight.data, layer.weight.data.T
    mine = x.double() @ weight.double().T
    y = torch.empty(1, OUT)
    order, sizes, name = group.order, layer.partition.sizes, group.name
    op = torch.ops.tp_native.row_parallel_linear.default

    def check(found: Callable[[], Tensor], expected: Tensor) -> None:
        torch.testing.assert_close(found().double(), expected, rtol=1e-5, atol=1e-5)

    def from_python(label: str, call: Callable[[], Tensor], expected: Tensor) -> Candidate:
        last = [y]

        def run() -> None:
            last[0] = call()

        return Candidate(label, run, lambda: check(lambda: last[0], expected))

    def from_cpp(label: str, w: Tensor, expected: Tensor, *body: str) -> Candidate:
        loop = scripted(
            "def loop(x: Tensor, w: Tensor, y: Tensor, order: Tensor, count: int):\n"
            "    for _ in range(count):\n" + "".join(f"        {line}\n" for line in body)
        )
        repeat = partial(loop, x, w, y, order)
        return Candidate(label, partial(repeat, 1), lambda: check(lambda: y, expected), repeat)

    mm = "torch.mm(x, w, out=y)"
    reduce = f"torch.ops.tp_native.all_reduce_(y, order, 'sum', '{name}')"
    row = f"torch.ops.tp_native.row_parallel_linear(x, w, None, order, {list(sizes)}, '{name}')"
    return [
        from_python("op", lambda: op(x, weight, None, order, sizes, name), exact),
        from_python("module", lambda: layer(x), exact),
        from_python("mm_python", lambda: torch.mm(x, transposed, out=y), mine),
        from_cpp("mm", transposed, mine, mm),
        from_cpp("pair", transposed, exact, mm, reduce),
        from_cpp("scripted", weight, exact, f"y.copy_({row})"),
    ]


@torch.inference_mode()
def run_rank(quick: bool, path: str) -> None:
    """The life of one rank."""
    group = join_group()
    plan = Plan.quick() if quick else Plan(batch_s=10e-3)
    timings = measure(group, make_candidates(group), plan)
    figures = {name: timing.figures() for name, timing in timings.items()}
    leave_group(group, {"plan": plan_facts(plan), "times": figures}, path)


# -- the parent


def add_up(times: dict[str, dict[str, float]], native: dict[str, Any]) -> dict[str, Any]:
    """Cost over native of each bar, judged by the best rounds: medians hold the neighbours' noise
    of two programs.
    """
    row = next(
        row
        for row in native["rows"]
        if row["name"] == ALL_REDUCE and row["bytes"] == OUT * torch.float32.itemsize
    )
    bars = {}
    for name, at_most in BARS_US.items():
        over = {
            figure: times[name][figure] - times["mm"][figure] - row[figure]
            for figure in ("best_us", "median_us")
        }
        passes = over["best_us"] <= at_most
        over_pair = times[name]["best_us"] - times["pair"]["best_us"]
        bars[name] = {**over, "over_pair_us": over_pair, "at_most_us": at_most, "passes": passes}
    all_reduce = {figure: row[figure] for figure in ("best_us", "median_us", "spread")}
    return {"native_all_reduce": all_reduce, "over_native": bars}


def print_table(result: dict[str, Any]) -> None:
    facts = result["environment"]
    print(
        f"tp_native {facts['tp_native']} at {facts['commit'][:12]}, torch {facts['torch']}, "
        f"{facts['cpu']}, {facts['cores']} cores, {RANKS} ranks; every output verified\n"
        f"row-parallel linear 1 x {LOCAL_IN} x {OUT} per rank, float32; us, best (median)"
    )
    for name, timing in [*result["times"].items(), ("all-reduce", result["native_all_reduce"])]:
        print(f"{name:12} {timing['best_us']:7.2f} ({timing['median_us']:.2f})")
    for name, over in result["over_native"].items():
        print(
            f"{name}: {over['best_us']:.2f} ({over['median_us']:.2f}) over mm and the native "
            f"all-reduce, {over['over_pair_us']:.2f} over the scripted pair; bar "
            f"{over['at_most_us']:g} {'pass' if over['passes'] else 'MISS'}"
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", metavar="PATH", help="write all figures and the environment")
    parser.add_argument("--quick", action="store_true", help="9 short rounds")
    parser.add_argument("--microbench", type=Path, metavar="PATH", help="another tpn_microbench")
    parser.add_argument("--as-rank", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.as_rank is not None:
        run_rank(args.quick, args.as_rank)
        return 0
    result = {
        "benchmark": "bench_overhead",
        "quick": args.quick,
        "ranks": RANKS,
        "verified": True,
        "environment": environment(),
        **start_ranks(RANKS, [__file__, *(["--quick"] if args.quick else [])]),
    }
    microbench = args.microbench or find_microbench()
    native = run_microbench(microbench, args.quick, [OUT * torch.float32.itemsize])
    result |= add_up(result["times"], native)
    print_table(result)
    if args.json:
        write_json(args.json, result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
