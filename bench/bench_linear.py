"""Two ranks' MLP (column-parallel, relu, row-parallel; bf16) beside Gloo and beside one process.

"tp_native" is ColumnParallelLinear and RowParallelLinear; "gloo" the same shards with F.linear and
dist.all_reduce; "no_comm" leaves the sum out and is the bound. "one_thread" and "two_threads" are
the dense layers in rank 0 while rank 1 sleeps in a receive. Several copies of the weights are used
in turn, so that decode streams memory as a deep model does. Every output is compared with a
float64 dense one.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import tp_native as tp
from ranks import join_group, leave_group, start_ranks
from timing import Candidate, Plan, environment, measure, plan_facts, write_json

RANKS = 2
KIND = torch.bfloat16
TOKENS = [1, 16]
CANDIDATES = ["tp_native", "gloo", "no_comm", "one_thread", "two_threads"]
Mlp = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Shape:
    """Of one MLP, and how many of them take turns."""

    hidden: int
    inner: int
    copies: int


QUICK = Shape(1024, 2816, 3)
SMALL = Shape(1024, 2816, 8)
LARGE = Shape(4096, 11008, 3)
BARS = {  # (hidden, tokens): other: least ratio to tp_native
    (1024, 1): {"gloo": 3.0, "one_thread": 1.85},
    (1024, 16): {"gloo": 3.0},
    (4096, 1): {"gloo": 1.10, "one_thread": 1.85, "two_threads": 1.0},
    (4096, 16): {"gloo": 1.10, "one_thread": 1.85, "two_threads": 1.1},
}


# -- one rank


class Block:
    """One copy of the weights, whole and this rank's part of them."""

    def __init__(self, group: tp.Group, shape: Shape) -> None:
        self.up = nn.Linear(shape.hidden, shape.inner, dtype=KIND)
        self.down = nn.Linear(shape.inner, shape.hidden, dtype=KIND)
        self.column = tp.ColumnParallelLinear.from_linear(self.up, group=group, activation="relu")
        self.row = tp.RowParallelLinear.from_linear(self.down, group=group)
        self.bias = self.down.bias if group.rank == 0 else None  # counted once

    def dense(self, x: Tensor) -> Tensor:
        return F.linear(F.relu(self.up(x)), self.down.weight, self.down.bias)

    def exact(self, x: Tensor) -> Tensor:
        up, down = self.up, self.down
        inner = F.relu(F.linear(x.double(), up.weight.double(), up.bias.double()))
        return F.linear(inner, down.weight.double(), down.bias.double())

    def tp_native(self, x: Tensor) -> Tensor:
        y: Tensor = self.row(self.column(x))
        return y

    def no_comm(self, x: Tensor) -> Tensor:
        inner = F.relu(F.linear(x, self.column.weight, self.column.bias))
        return F.linear(inner, self.row.weight, self.bias)

    def gloo(self, x: Tensor) -> Tensor:
        y = self.no_comm(x)
        dist.all_reduce(y)
        return y


def check_close(name: str, y: Tensor, exact: Tensor) -> None:
    """Both layers round once to bf16; a part that is missing or added twice is off by half."""
    error, eps = y.double() - exact, torch.finfo(KIND).eps
    typical = exact.square().mean().sqrt()
    whole, worst = error.square().mean().sqrt() / typical, error.abs().max() / typical
    if not (whole <= eps and worst <= 8 * eps):
        raise AssertionError(
            f"{name}: off by {whole:.2g} of the typical output, at worst {worst:.2g}"
        )


def make_candidates(group: tp.Group, blocks: list[Block], x: Tensor) -> list[Candidate]:
    exact = [block.exact(x) for block in blocks]
    made = []
    for name in CANDIDATES:
        if name in ("one_thread", "two_threads"):
            made.append(alone(group, name, blocks, x, exact))
            continue
        turns = cycle(range(len(blocks)))
        calls: list[Mlp] = [getattr(block, name) for block in blocks]
        last: list[Any] = [0, None]

        def run(calls: list[Mlp] = calls, turns: Any = turns, last: list[Any] = last) -> None:
            last[0] = k = next(turns)
            last[1] = calls[k](x)

        def check(name: str = name, last: list[Any] = last) -> None:
            y = last[1] if name != "no_comm" else group.all_reduce_(last[1].float())
            check_close(name, y, exact[last[0]])

        made.append(Candidate(name, run, check))
    return made


def alone(
    group: tp.Group, name: str, blocks: list[Block], x: Tensor, exact: list[Tensor]
) -> Candidate:
    """Rank 0 works, the others sleep until it has finished its batch."""
    token = torch.zeros(1)
    if group.rank != 0:

        def sleep() -> None:
            dist.recv(token, 0)

        return Candidate(name, lambda: None, sleep)
    threads = 2 if name == "two_threads" else 1
    turns = cycle(range(len(blocks)))
    last: list[Any] = [0, None]

    def run() -> None:
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)
        last[0] = k = next(turns)
        last[1] = blocks[k].dense(x)

    def check() -> None:
        torch.set_num_threads(1)
        check_close(name, last[1], exact[last[0]])
        if threads > 1:
            time.sleep(0.01)  # OpenMP's worker spins for a while before it sleeps
        for rank in range(1, group.size):
            dist.send(token, rank)

    return Candidate(name, run, check)


def start_worker_threads(cores: set[int]) -> None:
    """OpenMP's workers, free to run on any core, while this thread returns to its own."""
    own = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    torch.set_num_threads(2)
    torch.ones(1 << 20).add_(1)
    torch.set_num_threads(1)
    os.sched_setaffinity(0, own)


@torch.inference_mode()
def run_rank(quick: bool, path: str) -> None:
    """The life of one rank."""
    cores = os.sched_getaffinity(0)
    group = join_group()
    if group.rank == 0:
        start_worker_threads(cores)
    plan = Plan.quick() if quick else Plan(batch_s=10e-3)
    rows = []
    for shape in [QUICK] if quick else [SMALL, LARGE]:
        torch.manual_seed(0)
        blocks = [Block(group, shape) for _ in range(shape.copies)]
        for tokens in TOKENS:
            x = torch.randn(tokens, shape.hidden).to(KIND)
            timings = measure(group, make_candidates(group, blocks, x), plan)
            rows.append(make_row(shape, tokens, {k: t.figures() for k, t in timings.items()}))
        del blocks
    leave_group(group, {"plan": plan_facts(plan), "rows": rows}, path)


def make_row(shape: Shape, tokens: int, figures: dict[str, dict[str, float]]) -> dict[str, Any]:
    """Times, ratios to tp_native, and the bars. Gloo is judged by the best rounds, which swing less
    than its medians; the others by the medians.
    """
    ours = figures["tp_native"]
    row: dict[str, Any] = {
        "hidden": shape.hidden,
        "inner": shape.inner,
        "copies": shape.copies,
        "tokens": tokens,
        "dtype": str(KIND).removeprefix("torch."),
        "verified": True,
        **figures,
        "bars": {},
    }
    for name in CANDIDATES[1:]:
        row[f"{name}_over_tp_native"] = figures[name]["best_us"] / ours["best_us"]
        row[f"{name}_over_tp_native_median"] = figures[name]["median_us"] / ours["median_us"]
    for name, at_least in BARS[shape.hidden, tokens].items():
        ratio = row[f"{name}_over_tp_native{'' if name == 'gloo' else '_median'}"]
        row["bars"][name] = {"at_least": at_least, "ratio": ratio, "passes": ratio >= at_least}
    return row


# -- the parent


def print_table(result: dict[str, Any]) -> None:
    facts = result["environment"]
    print(
        f"tp_native {facts['tp_native']} at {facts['commit'][:12]}, torch {facts['torch']}, "
        f"{facts['cpu']}, {facts['cores']} cores, {RANKS} ranks; every output verified\n"
        "us per MLP, best (median); x: its time over tp_native's, best (median)"
    )
    for row in result["rows"]:
        print(f"\nhidden {row['hidden']}, inner {row['inner']}, {row['tokens']} tokens")
        for name in CANDIDATES:
            timing = row[name]
            median = f"({timing['median_us']:.1f})"
            line = f"{name:12} {timing['best_us']:10.1f} {median:>12}"
            if name != "tp_native":
                of_medians = f"({row[f'{name}_over_tp_native_median']:.2f})"
                line += f" {row[f'{name}_over_tp_native']:6.2f}x {of_medians:>8}"
            bar = row["bars"].get(name)
            if bar:
                line += f"  bar {bar['at_least']:g} {'pass' if bar['passes'] else 'MISS'}"
            print(line)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", metavar="PATH", help="write all figures and the environment")
    parser.add_argument("--quick", action="store_true", help="the small shape, 9 short rounds")
    parser.add_argument("--as-rank", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.as_rank is not None:
        run_rank(args.quick, args.as_rank)
        return 0
    result = {
        "benchmark": "bench_linear",
        "quick": args.quick,
        "ranks": RANKS,
        "environment": environment(),
        **start_ranks(RANKS, [__file__, *(["--quick"] if args.quick else [])]),
    }
    print_table(result)
    if args.json:
        write_json(args.json, result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
