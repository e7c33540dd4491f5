"""Under torch.autocast sharded modules compute and train as their dense twins do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tp_native as tp
from harness import run_ranks
from language_model import BLOCKS, dense, ids, sharded
from oracle import rank_data, relative_error
from shards import full_gradient
from tp_native.collectives import scatter_to_ranks
from tp_native.group import Group, world_of_one
from tp_native.nn import mark_of

WORLDS = [1, 2, 3, 4]
BF16, F32 = torch.bfloat16, torch.float32
# of the largest value: a handful of roundings of 2**-9 one after another, taken elsewhere in the
# sums; the gradients pass twice as many
LIMIT, GRADIENT_LIMIT = 2e-2, 4e-2

COMPOSITES: dict[str, tuple[Any, dict[str, Any]]] = {
    "swiglu": (tp.ParallelMLP, {"hidden_size": 12, "intermediate_size": 17}),
    "gelu": (
        tp.ParallelMLP,
        {"hidden_size": 12, "intermediate_size": 17, "activation": "gelu", "bias": True},
    ),
    "attention": (
        tp.ParallelAttention,
        {
            "hidden_size": 12,
            "num_heads": 6,
            "num_kv_heads": 1,
            "rope_theta": 1e4,
            "qk_norm": True,
            "bias": True,
        },
    ),
    **{
        f"{name} block": (tp.TensorParallelTransformerBlock, options)
        for name, options in BLOCKS.items()
    },
}


def filled(module: Any) -> Any:
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise * 0.3 + (parameter.dim() == 1))
    return module


def data(*shape: int, seed: int = 3) -> Tensor:
    return rank_data(shape, F32, 0, seed)


def near(actual: Tensor | None, expected: Tensor | None, limit: float, what: Any) -> None:
    assert actual is not None and expected is not None, what
    assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape), what
    error = relative_error(actual, expected)
    assert error <= limit, (what, error)


def composite_matches(group: Group, name: str, on_shards: bool) -> None:
    kind, options = COMPOSITES[name]
    whole = filled(kind(**options, group=world_of_one()))
    module = kind.from_dense(whole, group=group, sequence_parallel=on_shards)
    tokens, width = 8, options["hidden_size"]
    cut = tp.Partition.even(tokens, group.size)
    x, ref_x = (data(2, tokens, width).requires_grad_() for _ in range(2))
    with torch.autocast("cpu", BF16):
        ref_y = whole(ref_x)
        if on_shards and group.size > 1:
            y = module(scatter_to_ranks(x, -2, group), sequence_partition=cut)
            y = tp.all_gather_tensor(y, -2, group, partition=cut)
        else:
            y = module(x)
    cotangent = data(*ref_y.shape, seed=4)
    for each in (y, ref_y):
        each.backward(cotangent.to(each.dtype))
    assert relative_error(ref_y, kind_in_float32(whole, ref_x)) > 1e-5  # autocast has an effect
    near(y, ref_y, 0.0 if group.size == 1 else LIMIT, "y")
    near(x.grad, ref_x.grad, GRADIENT_LIMIT, "x")
    for (key, mine), theirs in zip(module.named_parameters(), whole.parameters(), strict=True):
        assert mine.grad is not None and mine.grad.dtype == F32
        near(full_gradient(mine), theirs.grad, GRADIENT_LIMIT, key)


def kind_in_float32(module: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        y: Tensor = module(x)
    return y


@pytest.mark.parametrize("world_size", WORLDS)
@pytest.mark.parametrize("on_shards", [False, True])
@pytest.mark.parametrize("name", COMPOSITES)
def test_modules_follow_their_dense_twins(world_size: int, on_shards: bool, name: str) -> None:
    run_ranks(composite_matches, world_size, name, on_shards)


def linears_match(group: Group, on_shards: bool) -> None:
    """Column and row, with a bias that counts once, between them nothing."""
    up, down = filled(nn.Linear(12, 10)), filled(nn.Linear(10, 12))
    column = tp.ColumnParallelLinear(12, 10, group=group, sequence_parallel=on_shards)
    row = tp.RowParallelLinear(10, 12, group=group, sequence_parallel=on_shards)
    column.load_state_dict(up.state_dict())
    row.load_state_dict(down.state_dict())
    cut = tp.Partition.even(6, group.size)
    x, ref_x = (data(6, 12).requires_grad_() for _ in range(2))
    with torch.autocast("cpu", BF16):
        ref_y = down(up(ref_x))
        if on_shards:
            y = row(column(scatter_to_ranks(x, 0, group), cut), cut)
            y = tp.all_gather_tensor(y, 0, group, partition=cut)
        else:
            y = row(column(x))
    assert y.dtype == BF16
    for each in (y, ref_y):
        each.backward(data(6, 12, seed=4).to(BF16))
    near(y, ref_y, LIMIT, "y")
    near(x.grad, ref_x.grad, GRADIENT_LIMIT, "x")
    for layer, linear in ((column, up), (row, down)):
        for (key, mine), theirs in zip(layer.named_parameters(), linear.parameters(), strict=True):
            near(full_gradient(mine), theirs.grad, GRADIENT_LIMIT, key)


@pytest.mark.parametrize("world_size", WORLDS)
@pytest.mark.parametrize("on_shards", [False, True])
def test_linears_follow_torchs(world_size: int, on_shards: bool) -> None:
    run_ranks(linears_match, world_size, on_shards)


def trains(group: Group, name: str, sequence_parallel: bool, dtype: torch.dtype) -> list[float]:
    """Autocast, a scaled loss, clipping: losses of the dense run and of this one, step by step."""
    models = (
        (dense(name, F32), world_of_one()),
        (sharded(name, group, sequence_parallel, F32), group),
    )
    losses = []
    for model, owner in models:
        optimizer = torch.optim.AdamW(model.parameters(), 0.02)
        scaler = tp.GradScaler("cpu", 2.0**12, growth_interval=4, group=owner)
        told = []
        for _ in range(9):  # while a rounding does not yet grow from step to step
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype):
                loss = model(ids())
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            norm = tp.clip_grad_norm_(model.parameters(), 1.0, group=owner)
            scaler.step(optimizer)
            scaler.update()
            told.append([float(loss.detach()), float(norm), scaler.get_scale()])
        losses.append(torch.tensor(told))
    whole, ours = losses
    assert whole[-1, 0] < 0.7 * whole[0, 0]
    assert (whole[:, 1] > 1).any()  # something was clipped
    torch.testing.assert_close(ours[:, 0], whole[:, 0], rtol=LIMIT, atol=0)
    assert torch.equal(ours[:, 2], whole[:, 2])
    for p in models[1][0].parameters():
        assert p.dtype == F32 and p.grad is not None and p.grad.dtype == F32
        if mark_of(p) is None and group.size > 1:
            assert torch.equal(group.broadcast_(p.detach().clone()), p)
    return ours.flatten().tolist()


@pytest.mark.parametrize("world_size", WORLDS)
@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize("name", BLOCKS)
def test_training_follows_the_dense_model(
    world_size: int, sequence_parallel: bool, name: str
) -> None:
    found = run_ranks(trains, world_size, name, sequence_parallel, BF16)
    assert all(each == found[0] for each in found)
