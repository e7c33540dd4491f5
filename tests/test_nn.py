"""Sharded layers against the dense layer in float64, forward and backward, over even, uneven and
empty shards.
"""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tp_native as tp
from harness import run_ranks
from oracle import relative_error
from shards import F64, WORLDS, check, cuts
from tp_native.group import Group
from tp_native.nn import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding


def inputs(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(3), dtype=F64)


def filled(dense: Any) -> Any:
    """Parameters from a generator of their own: thread ranks share torch's."""
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for parameter in dense.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=F64))
        if getattr(dense, "padding_idx", None) is not None:
            dense.weight[dense.padding_idx] = 0
    return dense


INPUTS = {
    "matrix": lambda k: inputs(5, k),
    "batch": lambda k: inputs(2, 3, k),
    "vector": lambda k: inputs(k),
    "empty batch": lambda k: inputs(0, k),
    "strided": lambda k: inputs(6, 2 * k)[::2, ::2],
    "transposed": lambda k: inputs(k, 4).t(),
}


def column_matches_dense(group: Group) -> None:
    dense = filled(nn.Linear(7, 13, dtype=F64))
    for cut in cuts(13, group.size):
        mine = cut.slice(group.rank)
        for name, make in INPUTS.items():
            for gather in (False, True):
                layer = ColumnParallelLinear.from_linear(
                    dense, group=group, partition=cut, gather_output=gather
                )
                x, ref_x = make(7).requires_grad_(), make(7).requires_grad_()
                y, ref_y = layer(x), dense(ref_x)
                cotangent = inputs(*ref_y.shape)
                dense.zero_grad()
                ref_y.backward(cotangent)
                y.backward(cotangent if gather else cotangent[..., mine])
                what = (name, cut, gather)
                check(y, ref_y if gather else ref_y[..., mine], what)
                check(x.grad, ref_x.grad, what)  # type: ignore[arg-type]
                check(layer.weight.grad, dense.weight.grad[mine], what)  # type: ignore[arg-type, index]
                check(layer.bias.grad, dense.bias.grad[mine], what)  # type: ignore[arg-type, index, union-attr]


def row_matches_dense(group: Group) -> None:
    dense = filled(nn.Linear(13, 7, dtype=F64))
    for cut in cuts(13, group.size):
        mine = cut.slice(group.rank)
        for name, make in INPUTS.items():
            for parallel in (True, False):
                layer = RowParallelLinear.from_linear(
                    dense, group=group, partition=cut, input_is_parallel=parallel
                )
                x, ref_x = make(13).requires_grad_(), make(13).requires_grad_()
                y, ref_y = layer(x[..., mine] if parallel else x), dense(ref_x)
                cotangent = inputs(*ref_y.shape)
                dense.zero_grad()
                ref_y.backward(cotangent)
                y.backward(cotangent)
                what = (name, cut, parallel)
                check(y, ref_y, what)
                whole = (
                    x.grad if not parallel or group.size == 1 else group.all_reduce_(x.grad.clone())
                )  # type: ignore[union-attr]
                check(whole, ref_x.grad, what)  # type: ignore[arg-type]
                check(layer.weight.grad, dense.weight.grad[:, mine], what)  # type: ignore[arg-type, index]
                check(layer.bias.grad, dense.bias.grad, what)  # type: ignore[arg-type, union-attr]


def embedding_matches_dense(group: Group) -> None:
    for padding_idx in (None, 0, -1):
        dense = filled(nn.Embedding(11, 5, padding_idx, dtype=F64))
        for cut in cuts(11, group.size):
            mine = cut.slice(group.rank)
            for ids in (
                torch.tensor([[0, 10, 3], [3, 5, 7]]),
                torch.tensor(4),
                torch.empty(2, 0, dtype=torch.int64),
                torch.arange(11, dtype=torch.int32),
            ):
                layer = VocabParallelEmbedding.from_embedding(dense, group=group, partition=cut)
                y, ref_y = layer(ids), dense(ids)
                assert torch.equal(y, ref_y)  # adding zeros is exact
                dense.zero_grad()
                cotangent = inputs(*ref_y.shape)
                ref_y.backward(cotangent)
                y.backward(cotangent)
                check(layer.weight.grad, dense.weight.grad[mine], (padding_idx, cut))  # type: ignore[arg-type, index]


@pytest.mark.parametrize("world_size", WORLDS)
@pytest.mark.parametrize("fn", [column_matches_dense, row_matches_dense, embedding_matches_dense])
def test_layers_match_the_dense_layer(fn: Any, world_size: int) -> None:
    run_ranks(fn, world_size)


@pytest.mark.parametrize("fn", [column_matches_dense, row_matches_dense, embedding_matches_dense])
def test_layers_match_the_dense_layer_on_thread_ranks(fn: Any) -> None:
    tp.simulate(fn, 3)


def draws_as_dense(group: Group) -> None:
    def seeded(make: Any) -> Any:
        torch.manual_seed(1234 + seeded.calls)  # type: ignore[attr-defined]
        return make()

    for calls, (shape, bias) in enumerate([((6, 10), True), ((5, 7), False), ((64, 3), True)]):
        seeded.calls = calls  # type: ignore[attr-defined]
        dense = seeded(lambda: nn.Linear(*shape, bias=bias))  # noqa: B023
        column = seeded(lambda: ColumnParallelLinear(*shape, bias, group=group))  # noqa: B023
        row = seeded(lambda: RowParallelLinear(*shape, bias, group=group))  # noqa: B023
        for layer in (column, row):
            assert torch.equal(layer.full_weight(), dense.weight)
            if bias:
                assert torch.equal(layer.full_parameter("bias"), dense.bias)
    torch.manual_seed(5)
    table = nn.Embedding(10, 4, padding_idx=3)
    torch.manual_seed(5)
    ours = VocabParallelEmbedding(10, 4, padding_idx=3, group=group)
    assert torch.equal(ours.full_weight(), table.weight)


@pytest.mark.parametrize("world_size", WORLDS)
def test_initialisation_is_the_dense_layers_for_every_number_of_ranks(world_size: int) -> None:
    run_ranks(draws_as_dense, world_size)


def draws_in_sequence(group: Group) -> list[Tensor]:
    torch.manual_seed(7)
    layers = [ColumnParallelLinear(4, 6, group=group), RowParallelLinear(6, 4, group=group)]
    return [layer.full_weight() for layer in layers]


def test_thread_ranks_draw_as_one_process_does() -> None:
    torch.manual_seed(7)
    dense = [nn.Linear(4, 6), nn.Linear(6, 4)]
    for found in tp.simulate(draws_in_sequence, 3):
        assert all(torch.equal(w, d.weight) for w, d in zip(found, dense, strict=True))


def adds_bias_once(group: Group) -> None:
    layer = RowParallelLinear(8, 3, group=group).double()
    nn.init.zeros_(layer.weight)
    nn.init.ones_(layer.bias)  # type: ignore[arg-type]
    y = layer(torch.ones(2, layer.local_in_features, dtype=F64))
    torch.testing.assert_close(y, torch.ones(2, 3, dtype=F64), rtol=0, atol=0)
    wide = RowParallelLinear(
        8, 700, group=group, dtype=torch.bfloat16
    )  # big enough for the shared path
    nn.init.zeros_(wide.weight)
    nn.init.ones_(wide.bias)  # type: ignore[arg-type]
    assert torch.equal(
        wide(torch.ones(9, wide.local_in_features, dtype=torch.bfloat16)),
        torch.ones(9, 700, dtype=torch.bfloat16),
    )


@pytest.mark.parametrize("world_size", WORLDS)
def test_row_parallel_linear_adds_bias_once(world_size: int) -> None:
    run_ranks(adds_bias_once, world_size)


def outputs(group: Group) -> bytes:
    torch.manual_seed(0)
    layer = RowParallelLinear(96, 300, group=group)
    x = torch.randn(50, 96, generator=torch.Generator().manual_seed(1))
    y: Tensor = layer(x[:, layer.partition.slice(group.rank)])
    return y.detach().numpy().tobytes()


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_row_parallel_output_is_bitwise_equal_on_all_ranks(world_size: int) -> None:
    found = run_ranks(outputs, world_size)
    assert all(f == found[0] for f in found)


def options(group: Group) -> None:
    dense = nn.Linear(6, 9, dtype=F64)
    x = inputs(4, 6)
    layer = ColumnParallelLinear(6, 9, group=group, skip_bias_add=True, dtype=F64)
    y, bias = layer(x)
    assert bias is layer.bias
    check(y + bias, torch.nn.functional.linear(x, layer.weight, layer.bias), "skip_bias_add")
    tanh = partial(nn.functional.gelu, approximate="tanh")
    every = {"relu": torch.relu, "silu": nn.functional.silu, "gelu": nn.functional.gelu}
    for activation, fn in (*every.items(), ("gelu_tanh", tanh)):
        layer = ColumnParallelLinear.from_linear(
            dense, group=group, activation=activation, gather_output=True
        )
        check(layer(x), fn(dense(x)), activation)
    row = RowParallelLinear(6, 9, False, group=group, reduce_results=False, dtype=F64)
    part = row(x[:, row.partition.slice(group.rank)])
    check(group.all_reduce_(part.detach().clone()), x @ row.full_weight().t(), "reduce_results")
    assert copy.deepcopy(row).group is group
    frozen = ColumnParallelLinear.from_linear(dense, group=group)
    frozen.weight.requires_grad_(False)
    x.requires_grad_()
    frozen(x).sum().backward()
    assert frozen.weight.grad is None
    check(x.grad, torch.ones(4, 9, dtype=F64) @ dense.weight.detach(), "frozen")  # type: ignore[arg-type]


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_options(world_size: int) -> None:
    run_ranks(options, world_size)


def bad_input(group: Group) -> None:
    column = ColumnParallelLinear(8, 12, group=group)
    row = RowParallelLinear(12, 8, group=group)
    with pytest.raises(
        ValueError,
        match=r"last dimension is 4, expected 8: ColumnParallelLinear splits out_features",
    ):
        column(torch.ones(2, 4))
    with pytest.raises(
        ValueError, match=r"last dimension is 12, expected 6: RowParallelLinear splits in_features"
    ):
        row(torch.ones(2, 12))
    with pytest.raises(TypeError, match="the input is Double, the weight Float"):
        column(torch.ones(2, 8, dtype=F64))
    with pytest.raises(ValueError, match="the input is on meta, the weight on cpu"):
        column(torch.ones(2, 8, device="meta"))
    with pytest.raises(ValueError, match=r"add up|sizes"):
        ColumnParallelLinear(8, 12, group=group, partition=tp.Partition.from_sizes([3, 3]))
    with pytest.raises(ValueError, match="it needs input_is_parallel=True"):
        RowParallelLinear(8, 12, group=group, sequence_parallel=True, input_is_parallel=False)
    with pytest.raises(ValueError, match="activation 'tanh': expected None or one of"):
        ColumnParallelLinear(8, 12, group=group, activation="tanh")
    with pytest.raises(ValueError, match="every rank would add it"):
        RowParallelLinear(8, 12, group=group, reduce_results=False)
    table = VocabParallelEmbedding(10, 4, group=group)
    with pytest.raises(
        IndexError, match="id 10 at position 1 is outside the vocabulary: expected 0 to 9"
    ):
        table(torch.tensor([1, 10]))
    with pytest.raises(TypeError, match="expected int64 or int32"):
        table(torch.ones(3))
    assert column(torch.ones(2, 8)).shape == (2, 6)  # nothing is lost


def test_bad_input_says_what_was_expected() -> None:
    run_ranks(bad_input, 2)


def state_round_trip(group: Group) -> dict[str, Tensor]:
    torch.manual_seed(2)
    dense = nn.Sequential(nn.Linear(6, 10), nn.Linear(10, 6))
    ours = nn.Sequential(
        ColumnParallelLinear(6, 10, group=group), RowParallelLinear(10, 6, group=group)
    )
    full = dense.state_dict()
    ours.load_state_dict(full)
    assert list(full) == list(ours.state_dict())
    assert full["0.weight"].shape == (10, 6)  # the caller's dict is as it was
    assert torch.equal(ours[0].full_weight(), dense[0].weight)
    local = ours.state_dict()
    again = copy.deepcopy(ours)
    for p in again.parameters():
        nn.init.zeros_(p)
    again.load_state_dict(local)
    assert torch.equal(again[1].weight, ours[1].weight)
    record = local._metadata["0"]["tp_native"]
    assert record == {
        "rank": group.rank,
        "size": group.size,
        "partition": list(ours[0].partition.sizes),
    }
    local._metadata["0"]["tp_native"]["rank"] = (group.rank + 1) % 2
    with pytest.raises(RuntimeError, match="these are the shards of"):
        ours.load_state_dict(local)
    with pytest.raises(RuntimeError, match="does not say which rank's"):
        ours.load_state_dict({k: v.clone() for k, v in ours.state_dict().items()})
    return dict(ours.state_dict())


def test_state_dict_is_local_and_loading_slices_or_refuses() -> None:
    run_ranks(state_round_trip, 2)


def adds_and_normalises(group: Group, dtype: torch.dtype) -> None:
    # inline, one-shot, shared with fewer rows than ranks, shared with whole rows, empty
    for rows, out_features, in_features in [
        (1, 12, 7),
        (1, 700, 9),
        (1, 4096, 33),
        (9, 1000, 20),
        (0, 8, 8),
    ]:
        torch.manual_seed(rows)
        dense = torch.nn.Linear(in_features, out_features, bias=rows != 9).to(dtype)
        x = torch.randn(2, rows, in_features).to(dtype)
        residual = torch.randn(2, rows, out_features).to(dtype)
        scale = torch.randn(out_features).to(dtype)
        layer = tp.RowParallelLinear.from_linear(dense, group=group)
        local = x[..., layer.partition.slice(group.rank)]
        with torch.no_grad():
            normed, hidden = layer.forward_add_rms_norm(local, residual, scale, 1e-5)
            assert torch.equal(hidden, residual + layer(local))  # the bits of the steps one by one
        wide = hidden.double()
        expected = wide * (wide.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * scale.double()
        # two roundings of the dtype, and float32's in the mean
        torch.testing.assert_close(
            normed.double(),
            expected,
            rtol=3 * torch.finfo(dtype).eps,
            atol=1e-6 if dtype != torch.float64 else 1e-12,
        )
        assert normed.is_contiguous() and hidden.is_contiguous()
        normed.add_(1)
        assert torch.equal(hidden, wide.to(dtype))  # they share nothing


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_residual_and_norm_join_the_reduction(world_size: int, dtype: torch.dtype) -> None:
    run_ranks(adds_and_normalises, world_size, dtype)


def differentiates_add_rms_norm(group: Group) -> None:
    torch.manual_seed(5)
    dense = torch.nn.Linear(9, 11).double()
    x, residual, scale = (
        torch.randn(n).double().requires_grad_() for n in [(4, 9), (4, 11), (11,)]
    )
    hidden = residual + dense(x)
    normed = hidden * (hidden.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * scale
    weights = torch.randn(2, 4, 11).double()
    ((normed * weights[0]).sum() + (hidden * weights[1]).sum()).backward()
    expected = [t.grad.clone() for t in (x, residual, scale, dense.weight)]
    layer = tp.RowParallelLinear.from_linear(dense, group=group)
    cut = layer.partition.slice(group.rank)
    parts = [t.detach().clone().requires_grad_() for t in (x[:, cut], residual, scale)]
    normed, hidden = layer.forward_add_rms_norm(*parts, 1e-6)
    ((normed * weights[0]).sum() + (hidden * weights[1]).sum()).backward()
    expected[0], expected[3] = expected[0][:, cut], expected[3][:, cut]
    for found, wanted in zip([*parts, layer.weight], expected, strict=True):
        torch.testing.assert_close(found.grad, wanted)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_residual_and_norm_have_the_dense_gradients(world_size: int) -> None:
    run_ranks(differentiates_add_rms_norm, world_size)


def runs_under_autocast(group: Group, is_compiled: bool) -> None:
    """Column, activation, row, residual and norm in float32 under autocast, beside dense layers."""
    torch._dynamo.reset()
    generator = torch.Generator().manual_seed(17)  # thread ranks share torch's
    up, down = nn.Linear(8, 12), nn.Linear(12, 8)
    with torch.no_grad():
        for parameter in (*up.parameters(), *down.parameters()):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 4)
    widths = [12 - (group.size - 1) * 3] + [3] * (group.size - 1)
    cut = tp.Partition.from_sizes(widths)
    column = ColumnParallelLinear.from_linear(up, group=group, partition=cut)
    row = RowParallelLinear.from_linear(down, group=group, partition=cut)
    scale = torch.randn(8, generator=generator)
    data = torch.randn(5, 8, generator=generator)

    def sharded(x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        y = row(torch.relu(column(x)))
        normed, hidden = row.forward_add_rms_norm(torch.relu(column(x)), x, scale)
        return column(x), y, normed, hidden

    def dense(x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        y = down(torch.relu(up(x)))
        hidden = x + y
        norm = (hidden.square().mean(-1, keepdim=True) + 1e-6).rsqrt()
        return up(x)[..., cut.slice(group.rank)], y, hidden * norm * scale, hidden

    def run(fn: Any) -> tuple[tuple[Tensor, ...], list[Tensor]]:
        x, norm_weight = data.clone().requires_grad_(), scale.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            values = fn(x, norm_weight)
        sum(v.float().square().sum() for v in values[1:]).backward()  # type: ignore[union-attr]
        assert x.grad is not None and norm_weight.grad is not None
        return values, [x.grad, norm_weight.grad]

    values, grads = run(
        torch.compile(sharded, fullgraph=True, backend="aot_eager") if is_compiled else sharded
    )
    wanted, wanted_grads = run(dense)
    assert [v.dtype for v in values] == [v.dtype for v in wanted]
    assert [v.dtype for v in values] == [torch.bfloat16] * 2 + [torch.float32] * 2
    mine = cut.slice(group.rank)
    assert up.weight.grad is not None and down.weight.grad is not None
    grads += [p.grad for p in (column.weight, column.bias, row.weight, row.bias)]  # type: ignore[union-attr, misc]
    wanted_grads += [up.weight.grad[mine], up.bias.grad[mine]]  # type: ignore[index]
    wanted_grads += [down.weight.grad[:, mine], down.bias.grad]  # type: ignore[list-item]
    for found, expected in zip((*values, *grads), (*wanted, *wanted_grads), strict=True):
        assert found.dtype == expected.dtype
        # sums of summands rounded to bfloat16 (2**-8) on each rank
        assert relative_error(found, expected) <= 2**-5
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        for found, trained in zip(sharded(data, scale), values, strict=True):
            assert torch.equal(found, trained)  # the same steps without gradients
        half = row.forward_add_rms_norm(torch.relu(column(data)), data.bfloat16(), scale.bfloat16())
        assert [t.dtype for t in half] == [torch.bfloat16] * 2
    with torch.autocast("cpu", torch.bfloat16):  # float64 is left alone, as F.linear leaves it
        wide = column.double()(data.double())
        wide.sum().backward()
        assert wide.dtype == torch.float64


@pytest.mark.parametrize("is_compiled", [False, True])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_autocast_casts_as_it_does_for_dense_layers(world_size: int, is_compiled: bool) -> None:
    run_ranks(runs_under_autocast, world_size, is_compiled)
