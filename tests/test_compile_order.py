"""Compiled forward and backward run their collectives in eager's order on every rank, whatever the
widths: compilers reorder by local sizes, and ranks that differ would wait for each other.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import tp_native as tp
from harness import run_ranks
from tp_native.group import Group

Log = list[tuple[str, str, int]]
WIDTHS = {
    2: [[[8, 512], [512, 8], [8, 512]], [[64, 64], [64, 64], [64, 64]]],
    3: [[[8, 512, 8], [512, 8, 8], [8, 8, 512]], [[64, 64, 64], [64, 64, 64], [8, 512, 8]]],
}


class Branches(nn.Module):
    """Independent column and row parallel pairs, summed: nothing but the order token tells a
    compiler which runs first.
    """

    def __init__(self, group: Group, layers: list[list[int]], is_recomputed: bool) -> None:
        super().__init__()
        self.group = group
        self.is_recomputed = is_recomputed
        cuts = [tp.Partition.from_sizes(widths) for widths in layers]
        self.up = nn.ModuleList(tp.ColumnParallelLinear(8, c.size, partition=c) for c in cuts)
        self.down = nn.ModuleList(tp.RowParallelLinear(c.size, 8, partition=c) for c in cuts)

    def pair(self, index: int, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.down[index](torch.nn.functional.silu(self.up[index](x)))
        return y

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        run: Callable[[int, torch.Tensor], torch.Tensor] = self.pair
        total = x
        for i in range(len(self.up)):
            if self.is_recomputed:
                total = total + checkpoint(run, i, x, use_reentrant=False)  # type: ignore[operator]
            else:
                total = total + run(i, x)
        unused = tp.all_reduce_sum(
            total.detach()[:1], self.group
        )  # must not vanish on one rank only
        return total + 0.0 * unused.sum()


def logged(group: Group, run: Callable[[], None]) -> Log:
    before = group.op_log()
    first = before[-1][0] if before else 0
    run()
    return [(op, dtype, hash_) for seq, op, dtype, hash_ in group.op_log() if seq > first]


def orders(
    group: Group, layers: list[list[int]], backend: str, is_recomputed: bool
) -> tuple[Log, Log, float]:
    torch._dynamo.reset()
    model = Branches(group, layers, is_recomputed)
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(1), requires_grad=True)
    gradients: list[list[torch.Tensor]] = []

    def step(module: nn.Module) -> Callable[[], None]:
        def run() -> None:
            model.zero_grad(set_to_none=True)
            x.grad = None
            module(x).square().sum().backward()
            assert x.grad is not None
            gradients.append([p.grad for p in model.parameters() if p.grad is not None] + [x.grad])

        return run

    eager = logged(group, step(model))
    module = torch.compile(model, fullgraph=True, backend=backend)
    assert isinstance(module, nn.Module)
    compiled = logged(group, step(module))
    again = logged(group, step(module))
    assert again == compiled
    worst = max(
        float((a - b).abs().max() / b.abs().max().clamp_min(1e-30))
        for a, b in zip(gradients[1], gradients[0], strict=True)
    )
    return eager, compiled, worst


def check(world_size: int, layers: list[list[int]], backend: str, is_recomputed: bool) -> None:
    found = run_ranks(orders, world_size, layers, backend, is_recomputed, deadline_s=110)
    eager, compiled, _ = found[0]
    pairs = len(layers)
    assert len(eager) == (3 if is_recomputed else 2) * pairs + 1
    for rank, (its_eager, its_compiled, worst) in enumerate(found):
        assert its_eager == eager, rank
        assert its_compiled == compiled, rank
        assert worst <= 1e-5  # float32, another order of additions at most
    if is_recomputed:  # what it recomputes is the compiler's choice, but the same on all ranks
        assert set(compiled) == set(eager) and 2 * pairs < len(compiled) <= len(eager)
    else:
        assert compiled == eager


@pytest.mark.parametrize("world_size", [2, 3])
def test_compiled_collectives_keep_eagers_order(world_size: int) -> None:
    for layers in WIDTHS[world_size]:
        check(world_size, layers, "aot_eager", False)


def test_recomputed_collectives_keep_their_order() -> None:
    check(2, WIDTHS[2][0], "aot_eager", True)


@pytest.mark.soak
@pytest.mark.timeout(900)
@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("is_recomputed", [False, True])
def test_inductor_keeps_eagers_order(world_size: int, is_recomputed: bool) -> None:
    for layers in WIDTHS[world_size]:
        check(world_size, layers, "inductor", is_recomputed)


def sums_without_naming_the_group(group: Group) -> float:
    torch._dynamo.reset()

    def run(t: torch.Tensor) -> torch.Tensor:
        return tp.all_reduce_sum(t) + 1.0

    compiled = torch.compile(run, fullgraph=True, backend="eager")
    return float(compiled(torch.ones(1)))


def test_the_default_group_compiles() -> None:
    assert run_ranks(sums_without_naming_the_group, 2) == [3.0, 3.0]
