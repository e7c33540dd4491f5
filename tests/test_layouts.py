"""Linear layers, transformers' Conv1D and column-cut embeddings in every layout: ranges that are
stacked, in another order, on several ranks or on none, against the dense layer in float64.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tp_native as tp
from harness import run_ranks
from oracle import rank_data
from shards import F64, WORLDS, check, data
from tp_native.collectives import scatter_to_ranks
from tp_native.group import Group
from tp_native.nn import mark_of
from tp_native.nn.sharded import take
from tp_native.partition import Partition, ShardLayout, cut_heads

WIDTH = 12


class Conv1D(nn.Module):
    """transformers', by its formula."""

    def __init__(self, nf: int, nx: int, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight = nn.Parameter(torch.empty(nx, nf, dtype=dtype).normal_(std=0.02))
        self.bias = nn.Parameter(torch.zeros(nf, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


def dense_linear(in_features: int, out_features: int) -> nn.Module:
    return nn.Linear(in_features, out_features, dtype=F64)


def dense_conv1d(in_features: int, out_features: int) -> nn.Module:
    return Conv1D(out_features, in_features, dtype=F64)


KINDS: dict[str, tuple[Any, Any, Any]] = {
    "linear": (dense_linear, tp.ColumnParallelLinear, tp.RowParallelLinear),
    "conv1d": (dense_conv1d, tp.ColumnParallelConv1D, tp.RowParallelConv1D),
}


def once_held(ranks: int) -> dict[str, Partition | ShardLayout]:
    even, last = Partition.even(WIDTH, ranks), Partition.from_sizes([0] * (ranks - 1) + [WIDTH])
    order = range(ranks - 1, -1, -1)
    part = Partition.from_sizes([5 - (ranks - 1), *[1] * (ranks - 1)])
    return {
        "even": even,
        "empty": last,
        "stacked": ShardLayout.stacked([part, Partition.even(7, ranks)]),
        "stacked, empty": ShardLayout.stacked(
            [Partition((0,) * (ranks - 1) + (5,))] * 2 + [Partition.even(2, ranks)]
        ),
        "backwards": ShardLayout(
            WIDTH, tuple(((even.offset(r), even.offset(r) + even[r]),) for r in order)
        ),
        "halves swapped": ShardLayout(
            WIDTH,
            tuple(
                tuple((at + s.start, at + s.stop) for at in (6, 0))
                for s in map(Partition.even(6, ranks).slice, range(ranks))
            ),
        ),
    }


def layouts(ranks: int) -> dict[str, Partition | ShardLayout]:
    kv_heads = cut_heads(3, 1, ranks)[1].scaled(WIDTH)
    rest = Partition.even(WIDTH - 4, ranks)
    parts = [((0, 4), (4 + rest.offset(r), 4 + rest.offset(r) + rest[r])) for r in range(ranks)]
    return {
        **once_held(ranks),
        "kv head": kv_heads,  # with four ranks one holds nothing
        "partly replicated": ShardLayout(WIDTH, tuple(parts)),
        "stacked kv": ShardLayout.stacked(
            [Partition.even(8, ranks), cut_heads(4, 1, ranks)[1].scaled(4)]
        ),
    }


def filled(module: Any, seed: int = 11) -> Any:
    with torch.no_grad():
        for i, parameter in enumerate(module.parameters()):
            parameter.copy_(data(*parameter.shape, seed=seed + i))
    return module


def summands(shape: torch.Size, group: Group) -> list[Tensor]:
    return [rank_data(tuple(shape), F64, rank, seed=5) for rank in range(group.size)]


def placed(parts: list[Tensor], layout: ShardLayout) -> Tensor:
    """Local cotangents of all ranks where they belong in the whole; what several hold adds up."""
    whole = parts[0].new_zeros(*parts[0].shape[:-1], layout.size)
    for part, held in zip(parts, layout.ranges, strict=True):
        at = 0
        for start, stop in held:
            whole[..., start:stop] += part[..., at : at + stop - start]
            at += stop - start
    return whole


def checks_gradients(layer: nn.Module, dense: nn.Module, what: Any) -> None:
    for (name, mine), theirs in zip(layer.named_parameters(), dense.parameters(), strict=True):
        mark = mark_of(mine)
        assert theirs.grad is not None
        check(mine.grad, theirs.grad if mark is None else mark.local(theirs.grad), (name, what))
        if mark is not None:
            check(mark.full(mine), theirs, (name, what))
            check(mark.full(mine.grad), theirs.grad, (name, what))  # type: ignore[arg-type]
    dense.zero_grad()


def column_in_layouts(group: Group, kind: str) -> None:
    make, column, _ = KINDS[kind]
    dense = filled(make(7, WIDTH))
    for name, cut in layouts(group.size).items():
        layout = ShardLayout.of(cut)
        for shape in ((2, 3, 7), (0, 7), (7,)):
            for how in ("local", "replicated", "partial"):
                options = {} if how == "local" else {"gather_output": True, "gather_grad": how}
                layer = column.from_linear(dense, group=group, partition=cut, **options)
                x, ref_x = (data(*shape).requires_grad_() for _ in range(2))
                y, ref_y = layer(x), dense(ref_x)
                what = (name, shape, how)
                if how == "local":
                    check(y, take(ref_y, -1, layout.ranges[group.rank]), what)
                    sizes = layout.local_sizes
                    parts = [
                        rank_data((*shape[:-1], sizes[r]), F64, r, seed=5)
                        for r in range(group.size)
                    ]
                    cotangent = placed(parts, layout)
                else:
                    check(y, ref_y, what)
                    parts = summands(ref_y.shape, group)
                    if how == "replicated":
                        parts = parts[:1] * group.size
                    cotangent = parts[0] if how == "replicated" else torch.stack(parts).sum(0)
                ref_y.backward(cotangent)
                y.backward(parts[group.rank])
                check(x.grad, ref_x.grad, what)
                checks_gradients(layer, dense, what)


def row_in_layouts(group: Group, kind: str) -> None:
    make, _, row = KINDS[kind]
    dense = filled(make(WIDTH, 7))
    for name, cut in once_held(group.size).items():
        ranges = ShardLayout.of(cut).ranges[group.rank]
        for shape in ((2, 3, WIDTH), (0, WIDTH), (WIDTH,)):
            for is_parallel in (False, True):
                layer = row.from_linear(
                    dense, group=group, partition=cut, input_is_parallel=is_parallel
                )
                x, ref_x = (data(*shape).requires_grad_() for _ in range(2))
                y, ref_y = layer(take(x, -1, ranges) if is_parallel else x), dense(ref_x)
                what = (name, shape, is_parallel)
                check(y, ref_y, what)
                cotangent = data(*ref_y.shape, seed=4)
                ref_y.backward(cotangent)
                y.backward(cotangent)
                assert x.grad is not None
                whole = group.all_reduce_(x.grad.clone()) if is_parallel else x.grad
                check(whole, ref_x.grad, what)
                checks_gradients(layer, dense, what)
                residual, scale = data(*ref_y.shape, seed=8), data(7, seed=9)
                with torch.no_grad():
                    own = take(x, -1, ranges) if is_parallel else x
                    normed, hidden = layer.forward_add_rms_norm(own, residual, scale)
                wide = residual + ref_y.detach()
                check(hidden, wide, what)
                expected = wide * (wide.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * scale
                check(normed, expected, what)


@pytest.mark.parametrize("world_size", WORLDS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fn", [column_in_layouts, row_in_layouts])
def test_every_layout_is_the_dense_layer(fn: Any, kind: str, world_size: int) -> None:
    run_ranks(fn, world_size, kind)


def embedding_in_layouts(group: Group) -> None:
    ids = [torch.tensor([[0, 4, 3], [3, 1, 4]]), torch.tensor(2), torch.empty(0, 2).int()]
    for padding_idx in (None, 3, -1):
        dense = filled(nn.Embedding(5, WIDTH, padding_idx, dtype=F64))
        for name, cut in layouts(group.size).items():
            layout = ShardLayout.of(cut)
            for given in ids:
                for gather in (False, True):
                    layer = tp.ColumnParallelEmbedding.from_embedding(
                        dense, group=group, partition=cut, gather_output=gather
                    )
                    before = group.stats()["collectives"]
                    y, ref_y = layer(given), dense(given)
                    took = group.stats()["collectives"] - before
                    assert took == (1 if gather and group.size > 1 else 0)
                    parts = [
                        rank_data((*given.shape, size), F64, rank, seed=5)
                        for rank, size in enumerate(layout.local_sizes)
                    ]
                    own = ref_y if gather else take(ref_y, -1, layout.ranges[group.rank])
                    assert torch.equal(y, own)
                    cotangent = data(*ref_y.shape) if gather else placed(parts, layout)
                    ref_y.backward(cotangent)
                    y.backward(cotangent if gather else parts[group.rank])
                    checks_gradients(layer, dense, (padding_idx, name, gather))


@pytest.mark.parametrize("world_size", WORLDS)
def test_column_embedding_is_the_dense_one(world_size: int) -> None:
    run_ranks(embedding_in_layouts, world_size)


def state_keeps_dense_shapes(group: Group) -> None:
    dense = nn.ModuleDict({"up": Conv1D(WIDTH, 7), "down": Conv1D(7, WIDTH)})
    bias = nn.Embedding(5, WIDTH)
    torch.manual_seed(2)
    drawn = Conv1D(WIDTH, 7)
    torch.manual_seed(2)
    ours = tp.ColumnParallelConv1D(7, WIDTH, group=group)
    assert torch.equal(ours.full_weight(), drawn.weight) and (ours.nf, ours.nx) == (WIDTH, 7)
    assert ours.weight.shape == (7, ours.local_out_features)
    sharded = nn.ModuleDict(
        {
            "up": ours,
            "down": tp.RowParallelConv1D(WIDTH, 7, group=group),
            "bias": tp.ColumnParallelEmbedding(5, WIDTH, group=group),
        }
    )
    full = {**dense.state_dict(), "bias.weight": bias.weight.detach()}
    sharded.load_state_dict(full)
    found = tp.full_state_dict(sharded)
    assert list(found) == list(full)
    assert all(torch.equal(found[key], value) for key, value in full.items())


@pytest.mark.parametrize("world_size", [1, 3])
def test_state_dicts_have_the_dense_names_and_shapes(world_size: int) -> None:
    run_ranks(state_keeps_dense_shapes, world_size)


def every_kind(group: Group) -> nn.ModuleDict:
    stacked = ShardLayout.stacked([Partition.even(size, group.size) for size in (5, 7)])
    return nn.ModuleDict(
        {
            "up": tp.ColumnParallelConv1D(7, WIDTH, group=group, partition=stacked),
            "down": tp.RowParallelConv1D(WIDTH, 7, group=group),
            "bias": tp.ColumnParallelEmbedding(5, WIDTH, group=group),
            "attention": tp.ParallelMultiheadAttention(6, 3, add_bias_kv=True, group=group),
            "cross": tp.ParallelMultiheadAttention(6, 3, kdim=5, vdim=4, group=group),
        }
    )


def saves(group: Group, path: str) -> dict[str, Tensor]:
    torch.manual_seed(6)
    model = every_kind(group)
    tp.CheckpointSaver(path, group).save(model)
    return tp.full_state_dict(model)


def loads(group: Group, path: str) -> dict[str, Tensor]:
    model = every_kind(group)
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    tp.DistributedCheckpointLoader(path, group).load(model)
    return tp.full_state_dict(model)


def test_checkpoints_are_read_by_other_numbers_of_ranks(tmp_path: Path) -> None:
    saved = tp.simulate(saves, 3, str(tmp_path))[0]
    for world_size in (1, 2, 4):
        for found in tp.simulate(loads, world_size, str(tmp_path)):
            assert list(found) == list(saved)
            assert all(torch.equal(found[key], value) for key, value in saved.items())


def conv1d_on_shards(group: Group) -> None:
    dense = [filled(dense_conv1d(7, WIDTH), 1), filled(dense_conv1d(WIDTH, 7), 3)]
    cut = Partition.even(5, group.size)
    how: dict[str, Any] = {"group": group, "sequence_parallel": True, "dtype": F64}
    up = tp.ColumnParallelConv1D(7, WIDTH, activation="gelu_tanh", **how)
    down = tp.RowParallelConv1D(WIDTH, 7, **how)
    for layer, whole in zip((up, down), dense, strict=True):
        layer.load_state_dict(whole.state_dict())
    x, ref_x = (data(2, 5, 7).requires_grad_() for _ in range(2))
    y: Any = down(up(scatter_to_ranks(x, -2, group, partition=cut), cut), cut)
    y = tp.all_gather_tensor(y, -2, group, partition=cut)
    ref_y = dense[1](nn.functional.gelu(dense[0](ref_x), approximate="tanh"))
    cotangent = data(*ref_y.shape, seed=9)
    y.backward(cotangent)
    ref_y.backward(cotangent)
    check(y, ref_y, "y")
    check(x.grad, ref_x.grad, "dx")
    for layer, whole in zip((up, down), dense, strict=True):
        checks_gradients(layer, whole, layer)


@pytest.mark.parametrize("world_size", WORLDS)
def test_conv1d_takes_tokens_and_activations(world_size: int) -> None:
    run_ranks(conv1d_on_shards, world_size)


def adapts_conv1d(group: Group) -> None:
    dense = nn.Sequential(dense_linear(7, WIDTH), dense_linear(WIDTH, 7))
    lying = nn.Sequential(dense_conv1d(7, WIDTH), dense_conv1d(WIDTH, 7))
    with torch.no_grad():
        for one, other in zip(lying, filled(dense), strict=True):
            one.weight.copy_(other.weight.t())  # type: ignore[operator, union-attr, arg-type]
            one.bias.copy_(other.bias)  # type: ignore[operator, union-attr, arg-type]
    found = []
    for kind, model in (("linear", dense), ("conv1d", lying)):
        _, column, row = KINDS[kind]
        sharded = nn.Sequential(
            column.from_linear(model[0], group=group), row.from_linear(model[1], group=group)
        )
        torch.manual_seed(3)
        tp.add_lora(sharded, 2, group=group)
        for layer in sharded:
            b = layer.lora_B
            mark = mark_of(b)
            with torch.no_grad():
                b.copy_(data(*b.shape) if mark is None else mark.local(data(*mark.full_shape(b))))
        x = data(3, 7)
        before = sharded(x)
        tp.merge_lora(sharded)
        check(sharded(x), before, "merged")
        tp.unmerge_lora(sharded)
        found.append(before)
    check(found[1], found[0], "conv1d as linear")


@pytest.mark.parametrize("world_size", [1, 2])
def test_adapters_go_with_conv1d(world_size: int) -> None:
    run_ranks(adapts_conv1d, world_size)


def refuses(group: Group) -> None:
    with pytest.raises(ValueError, match="gather_grad 'sum': expected"):
        tp.ColumnParallelLinear(4, 6, group=group, gather_grad="sum")
    twice = ShardLayout(6, (((0, 6),),) * group.size)
    with pytest.raises(ValueError, match="no two may hold the same input features"):
        tp.RowParallelLinear(6, 4, group=group, input_is_parallel=False, partition=twice)
    with pytest.raises(TypeError, match="got a Linear, expected transformers' Conv1D"):
        tp.RowParallelConv1D.from_linear(nn.Linear(4, 6), group=group)
    with pytest.raises(TypeError, match=r"got a Conv1D, expected an nn\.Linear"):
        tp.RowParallelLinear.from_linear(Conv1D(4, 6), group=group)
    with pytest.raises(ValueError, match="has no max_norm"):
        table = nn.Embedding(4, 6, max_norm=1.0)
        tp.ColumnParallelEmbedding.from_embedding(table, group=group)
    with pytest.raises(ValueError, match="is 5, expected the whole in_features, 6"):
        tp.RowParallelLinear(6, 4, group=group, input_is_parallel=False)(torch.ones(2, 5))


def test_what_cannot_be_right_is_refused() -> None:
    tp.simulate(refuses, 2)


def test_conv1d_is_transformers_own() -> None:
    pytorch_utils = pytest.importorskip("transformers.pytorch_utils")
    theirs = pytorch_utils.Conv1D(WIDTH, 7)
    ours = tp.ColumnParallelConv1D.from_linear(theirs)
    x = torch.randn(2, 3, 7)
    assert torch.equal(ours(x), theirs(x))
    assert {k: v.shape for k, v in ours.state_dict().items()} == {
        k: v.shape for k, v in theirs.state_dict().items()
    }
