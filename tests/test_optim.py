"""Clipping and loss scaling of sharded models do what the dense model's do."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import tp_native as tp
from harness import run_ranks
from language_model import BLOCKS, dense, ids, sharded
from oracle import rank_data, relative_error
from shards import full_gradient
from tp_native.group import Group, world_of_one
from tp_native.optim import _words_and_numbers

WORLDS = [1, 2, 3, 4]
F64 = torch.float64
LIMIT = 1e-12  # float64 rounding of sums in another order
NORMS = [2.0, 1.0, 3.0, math.inf, 0.5, 0.0]


def clips(group: Group, name: str, sequence_parallel: bool) -> list[Tensor]:
    norms = []
    for norm_type in NORMS:
        for max_norm in (0.1, 1e9):
            whole, model = dense(name), sharded(name, group, sequence_parallel)
            for each in (whole, model):
                each(ids()).backward()
            expected = torch.nn.utils.clip_grad_norm_(whole.parameters(), max_norm, norm_type)
            before = group.stats()["collectives"]
            norm = tp.clip_grad_norm_(model.parameters(), max_norm, norm_type)
            assert group.stats()["collectives"] - before == (group.size > 1)
            assert (norm.dtype, norm.shape) == (expected.dtype, expected.shape)
            assert relative_error(norm, expected) <= LIMIT, (norm_type, norm, expected)
            for (key, mine), theirs in zip(
                model.named_parameters(), whole.parameters(), strict=True
            ):
                assert theirs.grad is not None
                gap = relative_error(full_gradient(mine), theirs.grad)
                assert gap <= LIMIT, (key, norm_type, gap)
            norms.append(norm)
    return norms


@pytest.mark.parametrize("world_size", WORLDS)
@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize("name", BLOCKS)
def test_norm_and_clipped_gradients_are_the_dense_models(
    world_size: int, sequence_parallel: bool, name: str
) -> None:
    found = run_ranks(clips, world_size, name, sequence_parallel)
    for norms in found:
        assert all(torch.equal(*pair) for pair in zip(norms, found[0], strict=True))
    if world_size > 1:
        assert run_ranks(clips_as_torch, world_size, name) == [False] * world_size


def clips_as_torch(group: Group, name: str) -> bool:
    """Whether each rank's own norm would have done."""
    whole, model = dense(name), sharded(name, group)
    for each in (whole, model):
        each(ids()).backward()
    norms = [
        torch.nn.utils.get_total_norm([p.grad for p in m.parameters()]) for m in (whole, model)
    ]
    return relative_error(norms[1], norms[0]) <= LIMIT


def with_gradients(layer: nn.Module, rank: int, seed: int = 0) -> list[nn.Parameter]:
    parameters = [*layer.parameters()]
    for i, p in enumerate(parameters):
        p.grad = rank_data(tuple(p.shape), F64, rank, seed + i).to(p.dtype)
    return parameters


def norm_of(tensors: list[Tensor]) -> float:
    return math.sqrt(sum(float(t.double().square().sum()) for t in tensors))


def takes_any_parameters(group: Group) -> None:
    column = tp.ColumnParallelLinear(3, 5, group=group, dtype=F64)
    weight, bias = with_gradients(column, group.rank)
    grads = [p.grad for p in (weight, bias) if p.grad is not None]
    parts = [float(group.all_reduce_(grad.square().sum()).sqrt()) for grad in grads]
    both = math.hypot(*parts)

    def norm(parameters: Any, **options: Any) -> float:
        return float(tp.clip_grad_norm_(parameters, 1e9, **options))

    assert norm(weight) == pytest.approx(parts[0], rel=1e-14)
    assert norm(p for p in column.parameters()) == pytest.approx(both, rel=1e-14)
    assert norm([weight, bias, weight]) == norm([weight, bias])
    assert norm(iter([])) == 0
    assert norm([], group=group) == 0  # meets its ranks all the same
    before = [grad.clone() for grad in grads]
    tp.clip_grad_norm_([weight, weight, bias], both / 2)  # not scaled twice
    for grad, old in zip(grads, before, strict=True):
        assert relative_error(grad, old / 2) <= 1e-6  # torch adds 1e-6 to the norm


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_parameters_come_in_any_form_and_count_once(world_size: int) -> None:
    run_ranks(takes_any_parameters, world_size)


def misses_gradients(group: Group) -> list[float]:
    """Nothing on one rank, an empty shard, a parameter that nobody trains, whole ones."""
    cut = tp.Partition.from_sizes([0, *[2] * (group.size - 1)])
    empty = tp.ColumnParallelLinear(3, cut.size, group=group, partition=cut, dtype=F64)
    plain = tp.RowParallelLinear(4, 3, group=group, dtype=F64)
    alone = nn.Linear(2, 2, dtype=F64)
    given = [*with_gradients(empty, group.rank), *with_gradients(plain, 0, 5), *alone.parameters()]
    if group.rank == 1:
        plain.weight.grad = None
    with_gradients(alone, 0, 9)
    found = [float(tp.clip_grad_norm_(given, 1e9, p)) for p in (2, math.inf, 0)]
    local = [p.grad for p in [*empty.parameters(), plain.weight] if p.grad is not None]
    assert plain.bias is not None
    whole = [p.grad for p in (plain.bias, *alone.parameters()) if p.grad is not None]
    assert len(whole) == 3
    squares = torch.tensor(norm_of(local) ** 2, dtype=F64)
    expected = math.sqrt(float(group.all_reduce_(squares)) + norm_of(whole) ** 2)
    assert found[0] == pytest.approx(expected, rel=1e-14)
    assert found[2] == 6
    for p in given:
        p.grad = None
    for p in (2, math.inf, 0):
        assert tp.clip_grad_norm_(given, 1.0, p) == 0
    return found


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_without_gradients_take_part(world_size: int) -> None:
    found = run_ranks(misses_gradients, world_size)
    assert all(norms == found[0] for norms in found)


def mixes_dtypes(group: Group) -> None:
    low = tp.ColumnParallelLinear(3, 8, group=group, dtype=torch.bfloat16)
    high = tp.RowParallelLinear(8, 3, group=group, dtype=torch.float32)
    given = [*with_gradients(low, group.rank), *with_gradients(high, group.rank, 3)]
    assert high.bias is not None
    with_gradients(high, 0, 3)
    expected = norm_of([p.grad for p in given[:3] if p.grad is not None])
    squares = group.all_reduce_(torch.tensor(expected**2, dtype=F64))
    assert given[3].grad is not None
    expected = math.sqrt(float(squares) + float(given[3].grad.double().square().sum()))
    norm = tp.clip_grad_norm_(given, expected / 4)
    assert norm.dtype == torch.float32
    # torch, in a world of one, takes the norm of bfloat16 in bfloat16
    assert float(norm) == pytest.approx(expected, rel=1e-6 if group.size > 1 else 1e-2)
    again = tp.clip_grad_norm_(given, 1e9)
    assert float(again) == pytest.approx(expected / 4, rel=1e-2)  # bfloat16 gradients
    assert tp.clip_grad_norm_(low.parameters(), 1e9).dtype == torch.bfloat16


@pytest.mark.parametrize("world_size", [1, 2])
def test_dtypes_may_differ(world_size: int) -> None:
    run_ranks(mixes_dtypes, world_size)


def is_not_finite(group: Group) -> None:
    layer = tp.ColumnParallelLinear(3, 4, group=group, dtype=F64)
    whole = nn.Linear(3, 3, dtype=F64)
    given = [*with_gradients(layer, group.rank), *with_gradients(whole, 0)]
    for value in (math.inf, math.nan):
        for norm_type in (2.0, math.inf):
            assert layer.weight.grad is not None
            layer.weight.grad[0, 0] = value if group.rank == group.size - 1 else 1.0
            kept = layer.weight.grad.clone()
            with pytest.raises(RuntimeError, match=f"gradients is {value}, so they cannot be clip"):
                tp.clip_grad_norm_(given, 1.0, norm_type, error_if_nonfinite=True)
            assert torch.equal(layer.weight.grad.nan_to_num(7.0), kept.nan_to_num(7.0))
            norm = tp.clip_grad_norm_([layer.weight], 1.0, norm_type)
            assert math.isnan(norm) if math.isnan(value) else norm == value
    with pytest.raises(ValueError, match=r"norm_type -1.0, expected 0 or more"):
        tp.clip_grad_norm_(given, 1.0, -1)


@pytest.mark.parametrize("world_size", [2, 3])
def test_a_norm_that_is_not_finite_is_told_on_all_ranks(world_size: int) -> None:
    run_ranks(is_not_finite, world_size)


def clips_in_two_groups(group: Group) -> float:
    rows = group.split(group.rank // 2)
    columns = group.split(group.rank % 2)
    assert rows is not None and columns is not None
    a = tp.ColumnParallelLinear(3, 4, bias=False, group=rows, dtype=F64)
    b = tp.RowParallelLinear(4, 3, group=columns, dtype=F64)
    a.weight.grad = rank_data((2, 3), F64, rows.rank, 1)  # over columns the same
    b.weight.grad = rank_data((3, 2), F64, columns.rank, 2)
    assert b.bias is not None
    b.bias.grad = rank_data((3,), F64, 0, 3)
    given = [a.weight, b.weight, b.bias]
    before = rows.stats()["collectives"], columns.stats()["collectives"]
    norm = float(tp.clip_grad_norm_(given[:: 1 if group.rank % 3 else -1], 1e9))
    after = rows.stats()["collectives"], columns.stats()["collectives"]
    assert after == (before[0] + 1, before[1] + 1)
    parts = [rank_data((2, 3), F64, r, 1) for r in (0, 1)]
    parts += [rank_data((3, 2), F64, r, 2) for r in (0, 1)]
    assert norm == pytest.approx(norm_of([*parts, b.bias.grad]), rel=1e-14)
    return norm


def test_parameters_of_two_groups_in_any_order() -> None:
    found = run_ranks(clips_in_two_groups, 4)
    assert found == [found[0]] * 4


def test_numbers_in_names_are_ordered_by_value() -> None:
    names = ["tp:c10d:9", "tp:c10d:10", "tp:c10d:10.1", "tp:c10d:10/2.0", "tp:c10d:10/11.0"]
    assert sorted(reversed(names), key=_words_and_numbers) == [names[i] for i in (0, 1, 2, 3, 4)]


class NoWaiting(TorchDispatchMode):
    """Refuses what would make the host wait for a device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert "_local_scalar_dense" not in str(func), "a value was asked for"
        return func(*args, **(kwargs or {}))


def does_not_wait(group: Group) -> None:
    layer = tp.ColumnParallelLinear(3, 4, group=group)
    whole = nn.Linear(3, 3, dtype=torch.bfloat16)
    given = [*with_gradients(layer, group.rank), *with_gradients(whole, 0)]
    scaler = tp.GradScaler("cpu", group=group)
    optimizer = torch.optim.SGD(given)
    scaler.scale(torch.ones(()))
    with NoWaiting():
        for norm_type in NORMS:
            tp.clip_grad_norm_(given, 1.0, norm_type)
        scaler.unscale_(optimizer)
        with pytest.raises(AssertionError, match="a value was asked for"):
            tp.clip_grad_norm_(given, 1.0, error_if_nonfinite=True)


def test_no_value_is_waited_for() -> None:
    run_ranks(does_not_wait, 2)


def is_torchs_own(group: Group) -> None:
    norms = []
    for clip in (tp.clip_grad_norm_, torch.nn.utils.clip_grad_norm_):
        model = dense("gpt", torch.float32)
        model(ids()).backward()
        norms.append([clip(model.parameters(), 0.5), *(p.grad for p in model.parameters())])
    assert all(torch.equal(*pair) for pair in zip(*norms, strict=True))


def test_in_a_world_of_one_it_is_torchs() -> None:
    run_ranks(is_torchs_own, 1)


# -- GradScaler

Make = Callable[[list[nn.Parameter]], torch.optim.Optimizer]
OPTIMIZERS: dict[str, Make] = {
    "sgd": lambda ps: torch.optim.SGD(ps, 0.1),
    "adamw": lambda ps: torch.optim.AdamW(ps, 0.01, foreach=True),
    "fused sgd": lambda ps: torch.optim.SGD(ps, 0.1, fused=True),
    "fused adam": lambda ps: torch.optim.Adam(ps, 0.01, fused=True),
}


def state_of(parameters: list[nn.Parameter]) -> list[Tensor]:
    return [p.detach().clone() for p in parameters]


def scaled_step(
    scaler: torch.amp.GradScaler,
    optimizer: torch.optim.Optimizer,
    model: nn.Module,
    unscales: bool,
    planted: Tensor | None = None,
) -> None:
    optimizer.zero_grad()
    scaler.scale(model(ids())).backward()
    if planted is not None:
        assert planted.grad is not None
        planted.grad.view(-1)[0] = math.inf
    if unscales:
        scaler.unscale_(optimizer)
        tp.clip_grad_norm_(model.parameters(), 0.5)
    scaler.step(optimizer)
    scaler.update()


def skips_together(group: Group, kind: str, unscales: bool) -> list[float]:
    whole, model = dense("llama", torch.float32), sharded("llama", group, dtype=torch.float32)
    pairs = []
    # the dense one begins with what the other has after the step that is skipped
    for each, scale, owner in ((whole, 2.0**9, world_of_one()), (model, 2.0**10, group)):
        scaler = tp.GradScaler("cpu", scale, growth_interval=2, group=owner)
        pairs.append((each, OPTIMIZERS[kind]([*each.parameters()]), scaler))
    victim = model.block.mlp.gate_up_proj.weight
    start, scales = state_of([*model.parameters()]), []
    scaled_step(pairs[1][2], pairs[1][1], model, unscales, victim if group.rank == 0 else None)
    assert all(torch.equal(*pair) for pair in zip(start, model.parameters(), strict=True))
    assert pairs[1][2].get_scale() == 2.0**9
    for _ in range(3):
        for each, optimizer, scaler in pairs:
            scaled_step(scaler, optimizer, each, unscales)
        assert pairs[0][2].get_scale() == pairs[1][2].get_scale()
        scales.append(pairs[1][2].get_scale())
    assert not torch.equal(start[0], next(model.parameters()))
    for mine, theirs in zip(model.parameters(), whole.parameters(), strict=True):
        mark = tp.nn.mark_of(mine)
        full = mine.detach() if mark is None else mark.full(mine)
        torch.testing.assert_close(full, theirs.detach(), rtol=1e-4, atol=1e-5)
    return scales


@pytest.mark.parametrize("world_size", WORLDS)
@pytest.mark.parametrize("unscales", [False, True])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_an_infinity_on_one_rank_makes_all_skip(world_size: int, unscales: bool, kind: str) -> None:
    for scales in run_ranks(skips_together, world_size, kind, unscales):
        assert scales == [2.0**9, 2.0**10, 2.0**10]


def counts_and_orders(group: Group) -> None:
    """Two optimizers, of which one meets an infinity; one has no gradient on rank 0."""
    layer = tp.ColumnParallelLinear(3, 8, group=group)
    other = tp.RowParallelLinear(8, 3, group=group)
    optimizers = [torch.optim.SGD(m.parameters(), 1.0) for m in (layer, other)]
    scaler = tp.GradScaler("cpu", 8.0, group=group)
    start = [state_of([*m.parameters()]) for m in (layer, other)]
    for m, seed in ((layer, 1), (other, 2)):
        with_gradients(m, 0, seed)
    assert layer.weight.grad is not None and other.weight.grad is not None
    if group.rank == group.size - 1:
        layer.weight.grad[-1, -1] = math.nan
    if group.rank == 0:
        other.weight.grad = other.bias.grad = None  # type: ignore[union-attr]
    scaler.scale(torch.ones(()))
    before = group.stats()["collectives"]
    scaler.unscale_(optimizers[1])
    with pytest.raises(RuntimeError, match="already been called"):
        scaler.unscale_(optimizers[1])
    scaler.step(optimizers[0])
    scaler.step(optimizers[1])
    assert group.stats()["collectives"] - before == 2
    scaler.update()
    assert scaler.get_scale() == 4.0
    same = [torch.equal(*pair) for pair in zip(start[0], layer.parameters(), strict=True)]
    assert all(same)
    moved = not torch.equal(start[1][0], other.weight)
    assert moved == (group.rank != 0)
    off = tp.GradScaler("cpu", enabled=False, group=group)
    off.step(optimizers[1])
    off.update()
    assert group.stats()["collectives"] - before == 2


@pytest.mark.parametrize("world_size", [2, 3])
def test_several_optimizers_and_ranks_without_gradients(world_size: int) -> None:
    run_ranks(counts_and_orders, world_size)


def torchs_scaler_parts_ways(group: Group) -> bool:
    layer = tp.ColumnParallelLinear(3, 8, group=group)
    with_gradients(layer, 0)
    assert layer.weight.grad is not None
    layer.weight.grad[0, 0] = math.inf if group.rank == 0 else 0.0
    scaler = torch.amp.GradScaler("cpu", 8.0)
    scaler.scale(torch.ones(()))
    scaler.step(torch.optim.SGD(layer.parameters(), 1.0))
    scaler.update()
    return scaler.get_scale() == 4.0


def test_torchs_own_scaler_would_not_do() -> None:
    assert run_ranks(torchs_scaler_parts_ways, 2) == [True, False]
