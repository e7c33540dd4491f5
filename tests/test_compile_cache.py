"""Ranks share the compiler's cache folder, between runs too: a graph that depends on the rank must
have a key of its own on each.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

import tp_native as tp
from harness import World
from tp_native.group import Group

SIZE = 2


def parts(
    x: Tensor, w: Tensor, ids: Tensor, table: tp.VocabParallelEmbedding, group: Group
) -> list[Tensor]:
    """Every op whose forward, shape or backward depends on the rank, in one graph."""
    return [
        tp.all_gather_tensor(x * 2, -1, group) * w,
        tp.all_gather_tensor(x * 5, 0, group, "partial") * w.t(),
        tp.reduce_scatter_sum(w * x.sum(), 1, group) * x,
        tp.broadcast_tensor(x * 3, 0, group) * x.sum(),
        table(ids),
    ]


def part(
    x: Tensor, w: Tensor, ids: Tensor, table: tp.VocabParallelEmbedding, group: Group
) -> list[Tensor]:
    """What needs no C++ compiler: seconds instead of a minute."""
    return [tp.all_gather_tensor(x @ x, -1, group)]


def eager_and_compiled(
    group: Group, fn: Callable[..., list[Tensor]]
) -> tuple[list[Tensor], list[Tensor], int]:
    x = torch.arange(16.0).view(4, 4).add(group.rank).requires_grad_()
    w = torch.arange(4.0 * 4 * SIZE).view(4, 4 * SIZE).div(8).requires_grad_()
    ids = torch.tensor([[1, 3, 2], [7, 5, 5]])
    table = tp.VocabParallelEmbedding(8, 4, group=group)
    leaves = [x, w, table.weight]

    def results(run: Callable[..., list[Tensor]]) -> list[Tensor]:
        values = run(x, w, ids, table, group)
        seeds = [torch.arange(float(v.numel())).view(v.shape) for v in values]  # alike on all ranks
        found = torch.autograd.grad(values, leaves, seeds, allow_unused=True)
        return [v.detach() for v in values] + [g for g in found if g is not None]

    compiled = results(torch.compile(fn, fullgraph=True))
    return results(fn), compiled, counters["aot_autograd"]["autograd_cache_hit"]


@pytest.mark.timeout(300)
@pytest.mark.parametrize("fn", [part, pytest.param(parts, marks=pytest.mark.soak)])
def test_a_rank_never_gets_another_ranks_cached_backward(
    tmp_path: Path, fn: Callable[..., list[Tensor]]
) -> None:
    env = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    for run in range(2):
        world = World(SIZE, env=[env] * SIZE)
        try:
            for compiled, eager, hits in world.run(eager_and_compiled, fn, deadline_s=120):
                torch.testing.assert_close(compiled, eager)
                assert hits == run  # else this tests nothing: the second run is to find the first's
        finally:
            world.stop()
