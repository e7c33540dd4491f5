"""Dropout on ranks: equal masks where tensors are replicated, own ones where they are cut, the same
again under activation checkpointing.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import tp_native as tp
from harness import run_ranks
from tp_native.collectives import scatter_to_ranks
from tp_native.group import Group
from tp_native.nn import ParallelAttention, ParallelDropout, TensorParallelTransformerBlock


def masks(group: Group) -> tuple[list[Tensor], Tensor]:
    torch.manual_seed(7)
    x = torch.ones(64)
    drop = {kind: ParallelDropout(0.5, is_sharded=kind, group=group) for kind in (False, True)}
    found = [drop[kind](x) for kind in (False, True, False, True)]
    return found, torch.rand(3)


@pytest.mark.parametrize("world_size", [2, 3])
def test_masks_are_equal_or_not_by_what_the_tensor_is(world_size: int) -> None:
    results = run_ranks(masks, world_size)
    for (first, own, second, own_again), after in results:
        for mask in (first, own, second, own_again):
            assert set(mask.tolist()) == {0.0, 2.0}
        assert torch.equal(first, results[0][0][0]) and torch.equal(second, results[0][0][2])
        assert torch.equal(after, results[0][1])  # the generators went on alike
        assert not torch.equal(first, second) and not torch.equal(own, own_again)
    owns = [tuple(found[1].tolist()) for found, _ in results]
    assert len(set(owns)) == world_size


def checkpointed(group: Group, on_shards: bool) -> None:
    block = TensorParallelTransformerBlock(
        12,
        3,  # with four ranks one has no head, and draws all the same
        16,
        num_kv_heads=1,
        qk_norm=True,
        dropout=0.3,
        attention_dropout=0.3,
        sequence_parallel=on_shards,
        group=group,
        dtype=torch.float64,
    )
    x = torch.randn(2, 4, 12, dtype=torch.float64)

    def gradients(recomputes: bool) -> list[Tensor]:
        torch.manual_seed(3)
        block.zero_grad()
        cut = tp.Partition.even(4, group.size)
        leaf = x.clone().requires_grad_()
        h = scatter_to_ranks(leaf, -2, group) if on_shards else leaf

        def run(h: Tensor) -> Tensor:
            y: Tensor = block(h, sequence_partition=cut)
            return y

        y = checkpoint(run, h, use_reentrant=False) if recomputes else run(h)
        y.square().sum().backward()
        assert leaf.grad is not None
        return [leaf.grad, *(p.grad for p in block.parameters() if p.grad is not None)]

    plain, again = gradients(False), gradients(True)
    assert len(plain) == len(again)
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("on_shards", [False, True])
def test_checkpointing_repeats_the_masks(world_size: int, on_shards: bool) -> None:
    run_ranks(checkpointed, world_size, on_shards)


def test_expectation_is_kept() -> None:
    torch.manual_seed(0)
    y = ParallelDropout(0.25)(torch.ones(100_000))
    assert abs(y.mean().item() - 1) < 0.01  # 5 standard deviations
    module = ParallelDropout(0.25).eval()
    x = torch.ones(3)
    assert module(x) is x


def in_threads(group: Group) -> None:
    with pytest.raises(ValueError, match=r"thread ranks .* share torch's generator"):
        ParallelDropout(0.5, group=group)(torch.ones(3))
    attention: Any = ParallelAttention(8, 2, dropout=0.5, group=group)
    with pytest.raises(ValueError, match=r"attention dropout 0\.5: thread ranks"):
        attention(torch.ones(1, 2, 8))


def test_what_cannot_be_right_is_refused() -> None:
    tp.simulate(in_threads, 2)
    with pytest.raises(ValueError, match=r"probability 1\.5, expected 0 to 1"):
        ParallelDropout(1.5)
