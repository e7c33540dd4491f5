"""A transformer block on two ranks beside PyTorch's own tensor parallelism and one process.

"tp_native" is TensorParallelTransformerBlock, "sequence" the same on sequence shards; "dtensor" a
plain block cut by torch.distributed.tensor.parallel over Gloo; "one_thread" that block whole, in
rank 0 while rank 1 sleeps, and "alone" ours in a world of one there. Forward without gradients, and
training steps (forward and backward). Every output and the input's gradient are compared with the
plain block in float64.

Then what a rank holds: bytes of weights, gradients and Adam's state on 1 to 4 ranks, measured,
beside 1/N of the whole where sizes divide, else beside what partition arithmetic says.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import tp_native as tp
from ranks import join_group, leave_group, start_ranks
from timing import Candidate, Plan, environment, measure, plan_facts, write_json
from tp_native.group import world_of_one
from tp_native.nn import mark_of
from tp_native.nn.attention import rotated

RANKS = 2
CANDIDATES = ["tp_native", "sequence", "dtensor", "one_thread", "alone"]
LIMIT = 1e-5  # float32, max|difference| over max|reference|
MEMORY_LIMIT = 0.02


@dataclass(frozen=True)
class Shape:
    """Of one block."""

    hidden: int
    heads: int
    kv_heads: int
    inner: int

    @property
    def options(self) -> dict[str, Any]:
        return {
            "hidden_size": self.hidden,
            "num_heads": self.heads,
            "intermediate_size": self.inner,
            "num_kv_heads": self.kv_heads,
            "rope_theta": 1e4,
        }


QUICK = Shape(256, 8, 4, 704)
SHAPES = [Shape(1024, 16, 8, 2816)]
CASES = [("forward", 1), ("forward", 16), ("forward", 128), ("training", 128)]
MEMORY_SHAPES = [Shape(256, 8, 4, 704), Shape(240, 5, 5, 701), Shape(256, 8, 2, 512)]


class PlainBlock(nn.Module):
    """A Llama block as anyone writes it."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.width = shape.hidden // shape.heads
        kv = shape.kv_heads * self.width
        self.norm1, self.norm2 = (nn.RMSNorm(shape.hidden, 1e-6) for _ in range(2))
        self.q, self.o = (nn.Linear(shape.hidden, shape.hidden, bias=False) for _ in range(2))
        self.k, self.v = (nn.Linear(shape.hidden, kv, bias=False) for _ in range(2))
        self.gate, self.up = (nn.Linear(shape.hidden, shape.inner, bias=False) for _ in range(2))
        self.down = nn.Linear(shape.inner, shape.hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens = x.shape[:2]
        h = self.norm1(x)
        q, k, v = (
            part(h).view(batch, tokens, -1, self.width).transpose(1, 2)
            for part in (self.q, self.k, self.v)
        )
        q, k = rotated(q, k, torch.arange(tokens), 1e4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=tokens > 1, enable_gqa=True)
        x = x + self.o(y.transpose(1, 2).reshape(batch, tokens, -1))
        h = self.norm2(x)
        y = x + self.down(F.silu(self.gate(h)) * self.up(h))
        return y

    def state_of_ours(self) -> dict[str, Tensor]:
        """Its weights under the names of TensorParallelTransformerBlock."""
        return {
            "input_norm.weight": self.norm1.weight,
            "post_attention_norm.weight": self.norm2.weight,
            "attention.qkv_proj.weight": torch.cat([self.q.weight, self.k.weight, self.v.weight]),
            "attention.o_proj.weight": self.o.weight,
            "mlp.gate_up_proj.weight": torch.cat([self.gate.weight, self.up.weight]),
            "mlp.down_proj.weight": self.down.weight,
        }


# -- speed, one rank


def make_models(group: tp.Group, shape: Shape) -> dict[str, Any]:
    """All candidates with the same weights."""
    torch.manual_seed(0)
    plain = PlainBlock(shape)
    state = plain.state_of_ours()

    def ours(where: tp.Group, **changes: Any) -> nn.Module:
        block = tp.TensorParallelTransformerBlock(**shape.options, **changes, group=where)
        block.load_state_dict(state)
        return block

    torch.manual_seed(0)
    columns, rows = ColwiseParallel(), RowwiseParallel()
    cut = {"q": columns, "k": columns, "v": columns, "gate": columns, "up": columns}
    mesh = DeviceMesh("cpu", list(range(group.size)))
    dtensor = parallelize_module(PlainBlock(shape), mesh, {**cut, "o": rows, "down": rows})
    return {
        "tp_native": ours(group),
        "sequence": ours(group, sequence_parallel=True),
        "dtensor": dtensor,
        "one_thread": plain,
        "alone": ours(world_of_one()),
    }


def step(model: nn.Module, x: Tensor, trains: bool) -> tuple[Tensor, Tensor | None]:
    """A forward pass, or forward and backward; the output and the input's gradient."""
    if not trains:
        with torch.no_grad():
            return model(x), None
    leaf = x.detach().requires_grad_()
    y = model(leaf)
    (y * x).sum().backward()
    model.zero_grad()
    return y.detach(), leaf.grad


def check_close(name: str, found: Tensor | None, exact: Tensor | None) -> None:
    if exact is None or found is None:
        if found is not exact:
            raise AssertionError(f"{name}: a gradient is missing")
        return
    error = (found.double() - exact).abs().max() / exact.abs().max()
    if not error <= LIMIT:
        raise AssertionError(f"{name}: off by {error:.2g} of the largest value")


def make_candidates(
    group: tp.Group, models: dict[str, Any], x: Tensor, trains: bool
) -> list[Candidate]:
    exact = step(models["one_thread"].double(), x.double(), trains)
    models["one_thread"].float()
    tokens = tp.Partition.even(x.size(1), group.size)
    made = []
    for name in CANDIDATES:
        if name in ("one_thread", "alone"):
            made.append(alone(group, name, models[name], x, trains, exact))
            continue
        if name == "sequence" and x.size(1) < group.size:
            continue
        mine = x[:, tokens.slice(group.rank)].contiguous() if name == "sequence" else x
        last: list[Any] = [None, None]

        def run(model: Any = models[name], mine: Tensor = mine, last: list[Any] = last) -> None:
            last[:] = step(model, mine, trains)

        def check(name: str = name, last: list[Any] = last) -> None:
            for found, reference in zip(last, exact, strict=True):
                if name == "sequence" and reference is not None:
                    reference = reference[:, tokens.slice(group.rank)]
                check_close(name, found, reference)

        made.append(Candidate(name, run, check))
    return made


def alone(
    group: tp.Group, name: str, model: Any, x: Tensor, trains: bool, exact: tuple[Any, Any]
) -> Candidate:
    """Rank 0 works, the others sleep until it has finished its batch."""
    token = torch.zeros(1)
    if group.rank != 0:
        return Candidate(name, lambda: None, lambda: dist.recv(token, 0) and None)
    last: list[Any] = [None, None]

    def run() -> None:
        last[:] = step(model, x, trains)

    def check() -> None:
        for found, reference in zip(last, exact, strict=True):
            check_close(name, found, reference)
        for rank in range(1, group.size):
            dist.send(token, rank)

    return Candidate(name, run, check)


def run_rank(quick: bool, path: str) -> None:
    """The life of one rank."""
    group = join_group()
    plan = Plan.quick() if quick else Plan(batch_s=10e-3)
    rows = []
    for shape in [QUICK] if quick else SHAPES:
        models = make_models(group, shape)
        for kind, tokens in CASES:
            x = torch.randn(1, tokens, shape.hidden, generator=torch.Generator().manual_seed(1))
            timings = measure(group, make_candidates(group, models, x, kind == "training"), plan)
            rows.append(make_row(shape, kind, tokens, timings))
    leave_group(group, {"plan": plan_facts(plan), "rows": rows}, path)


def make_row(shape: Shape, kind: str, tokens: int, timings: dict[str, Any]) -> dict[str, Any]:
    row: dict[str, Any] = {"kind": kind, "tokens": tokens, **asdict(shape), "verified": True}
    row |= {name: timing.figures() for name, timing in timings.items()}
    for name in timings:
        if name == "alone":  # what a world of one costs: over the plain block
            row["alone_over_plain"] = row[name]["median_us"] / row["one_thread"]["median_us"]
        elif name != "tp_native":
            row[f"{name}_over_tp_native"] = row[name]["median_us"] / row["tp_native"]["median_us"]
    return row


# -- memory, thread ranks


def held(group: tp.Group, shape: Shape) -> dict[str, Any]:
    """What one rank has after one training step."""
    block = tp.TensorParallelTransformerBlock(**shape.options, group=group)
    optimizer = torch.optim.Adam(block.parameters())
    y = block(torch.ones(1, 4, shape.hidden))
    y.sum().backward()
    optimizer.step()
    matrices = [p for p in block.parameters() if p.dim() == 2]
    state = (t for entry in optimizer.state.values() for t in entry.values() if t.dim() > 0)
    return {
        "weights": sum(p.nbytes for p in block.parameters()),
        "gradients": sum(p.grad.nbytes for p in block.parameters() if p.grad is not None),
        "optimizer": sum(t.nbytes for t in state),
        "whole_matrices": [p.numel() for p in matrices if mark_of(p) is None],
        "linear_elements": sum(p.numel() for p in matrices),
    }


def predicted_bytes(shape: Shape, size: int, rank: int) -> float:
    """float32 weights by hand: whole key/value groups, or one head on several ranks."""
    width = shape.hidden // shape.heads
    per_group = shape.heads // shape.kv_heads

    def share(count: int, parts: int, index: int) -> int:
        return count // parts + (index < count % parts)

    if shape.kv_heads >= size:
        kv = share(shape.kv_heads, size, rank)
        queries = kv * per_group
    else:
        holders = [share(size, shape.kv_heads, head) for head in range(shape.kv_heads)]
        head = next(h for h in range(shape.kv_heads) if rank < sum(holders[: h + 1]))
        queries = share(per_group, holders[head], rank - sum(holders[:head]))
        kv = 1 if queries else 0
    rows = (2 * queries + 2 * kv) * width + 3 * share(shape.inner, size, rank)
    return 4.0 * shape.hidden * (rows + 2)


def memory_rows() -> list[dict[str, Any]]:
    """For every shape and number of ranks: what the ranks hold, and how far off that is."""
    rows = []
    for shape in MEMORY_SHAPES:
        whole = held(world_of_one(), shape)
        for size in (1, 2, 3, 4):
            ranks = [whole] if size == 1 else tp.simulate(partial(_held, shape), size)
            divides = all(n % size == 0 for n in (shape.kv_heads, shape.inner))
            expected = [
                whole["weights"] / size if divides else predicted_bytes(shape, size, rank)
                for rank in range(size)
            ]
            factors = {"weights": 1, "gradients": 1, "optimizer": 2}
            worst = max(
                abs(rank[kind] / (factor * expected[r]) - 1)
                for r, rank in enumerate(ranks)
                for kind, factor in factors.items()
            )
            rows.append(
                {
                    **asdict(shape),
                    "ranks": size,
                    "against": "1/N of the whole" if divides else "partition arithmetic",
                    "bytes": {kind: [rank[kind] for rank in ranks] for kind in factors},
                    "expected_weights": expected,
                    "worst": worst,
                    "sharded_share": 1
                    - sum(ranks[0]["whole_matrices"]) / ranks[0]["linear_elements"],
                    "passes": worst <= MEMORY_LIMIT,
                }
            )
    return rows


def _held(shape: Shape, group: tp.Group) -> dict[str, Any]:
    return held(group, shape)


# -- the parent


def print_table(result: dict[str, Any]) -> None:
    facts = result["environment"]
    print(
        f"tp_native {facts['tp_native']} at {facts['commit'][:12]}, torch {facts['torch']}, "
        f"{facts['cpu']}, {facts['cores']} cores, {RANKS} ranks; every output verified\n"
        "us per block, median (best); x: median over tp_native's"
    )
    for row in result["rows"]:
        print(
            f"\n{row['kind']}, hidden {row['hidden']}, inner {row['inner']}, {row['tokens']} tokens"
        )
        for name in CANDIDATES:
            if name not in row:
                continue
            line = f"{name:12} {row[name]['median_us']:10.1f} ({row[name]['best_us']:.1f})"
            ratio = row.get(f"{name}_over_tp_native")
            if name == "alone":
                line += f"  {row['alone_over_plain']:.2f} of the plain block"
            elif ratio is not None:
                line += f"  {ratio:.2f}x"
            print(line)
    print("\nbytes a rank holds (weights; gradients are as many, Adam's state twice)")
    for row in result["memory"]:
        print(
            f"hidden {row['hidden']} heads {row['heads']}/{row['kv_heads']} inner {row['inner']} "
            f"on {row['ranks']}: {row['bytes']['weights']}, at most {row['worst']:.2%} off "
            f"{row['against']}, {row['sharded_share']:.0%} of matrix elements sharded: "
            f"{'pass' if row['passes'] else 'MISS'}"
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", metavar="PATH", help="write all figures and the environment")
    parser.add_argument("--quick", action="store_true", help="a small shape, 9 short rounds")
    parser.add_argument("--as-rank", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.as_rank is not None:
        run_rank(args.quick, args.as_rank)
        return 0
    result = {
        "benchmark": "bench_block",
        "quick": args.quick,
        "ranks": RANKS,
        "environment": environment(),
        **start_ranks(RANKS, [__file__, *(["--quick"] if args.quick else [])]),
        "memory": memory_rows(),
    }
    print_table(result)
    if args.json:
        write_json(args.json, result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
