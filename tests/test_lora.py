"""Adapters against formulas over whole matrices in float64: forward, every gradient, every cut, on
1 to 4 ranks; what they cost in collectives and saved activations; merged, saved, loaded.
"""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tp_native as tp
from harness import run_ranks
from oracle import dense_block, rank_data, relative_error
from shards import F64, WORLDS, check, cuts, data, full_gradient
from tiny import llama, tokens
from tp_native.collectives import scatter_to_ranks
from tp_native.group import Group, world_of_one
from tp_native.nn import mark_of

RANK, ALPHA = 3, 5.0
SCALING = ALPHA / RANK


def put(parameter: Tensor, full: Tensor) -> None:
    mark = mark_of(parameter)
    with torch.no_grad():
        parameter.copy_(full if mark is None else mark.local(full))


class Dense:
    """``y = x W^T + b + s (x A^T) B^T`` on whole matrices."""

    def __init__(self, in_features: int, out_features: int) -> None:
        self.linear = nn.Linear(in_features, out_features, dtype=F64)
        put(self.linear.weight, data(out_features, in_features, seed=11))
        put(self.linear.bias, data(out_features, seed=12))
        self.a = data(RANK, in_features, seed=13).requires_grad_()
        self.b = data(out_features, RANK, seed=14).requires_grad_()

    def __call__(self, x: Tensor) -> Tensor:
        w, b = self.linear.weight.detach(), self.linear.bias.detach()
        return x @ w.t() + b + SCALING * (x @ self.a.t()) @ self.b.t()

    def adapt(self, layer: Any) -> Any:
        assert tp.add_lora(nn.ModuleDict({"layer": layer}), RANK, alpha=ALPHA) == ["layer"]
        put(layer.lora_A, self.a.detach())
        put(layer.lora_B, self.b.detach())
        return layer

    def check_gradients(self, layer: Any, what: Any) -> None:
        check(full_gradient(layer.lora_A), self.a.grad, (*what, "A"))
        check(full_gradient(layer.lora_B), self.b.grad, (*what, "B"))
        assert layer.weight.grad is None and layer.bias.grad is None
        self.a.grad = self.b.grad = None


def on_shards(group: Group, layer: Any, x: Tensor) -> Tensor:
    cut = tp.Partition.even(x.shape[-2], group.size)
    y = layer(scatter_to_ranks(x, -2, group), sequence_partition=cut)
    assert isinstance(y, Tensor)
    return y


SHAPES = [(5,), (2, 3), (), (0,)]


def column_is_the_formula(group: Group) -> None:
    dense = Dense(7, 13)
    options = itertools.product(cuts(13, group.size), SHAPES, (False, True), (False, True))
    for cut, shape, gather, is_sequence in options:
        if is_sequence and len(shape) == 0:
            continue
        what = (cut, shape, gather, is_sequence)
        layer = tp.ColumnParallelLinear.from_linear(
            dense.linear, group=group, partition=cut, gather_output=gather
        )
        layer.sequence_parallel = is_sequence
        dense.adapt(layer)
        x, ref_x = (data(*shape, 7).requires_grad_() for _ in range(2))
        ref_y = dense(ref_x)
        cotangent = data(*ref_y.shape, seed=4)
        ref_y.backward(cotangent)
        y = on_shards(group, layer, x) if is_sequence else layer(x)
        mine = slice(None) if gather else cut.slice(group.rank)
        y.backward(cotangent[..., mine])
        check(y, ref_y[..., mine], what)
        check(x.grad, ref_x.grad, what)
        dense.check_gradients(layer, what)


def row_is_the_formula(group: Group) -> None:
    dense = Dense(13, 7)
    for cut, shape, how in itertools.product(
        cuts(13, group.size), SHAPES, ("parallel", "whole", "sequence", "summand")
    ):
        if how == "sequence" and len(shape) == 0:
            continue
        what = (cut, shape, how)
        layer = tp.RowParallelLinear.from_linear(
            dense.linear, group=group, partition=cut, input_is_parallel=how != "whole"
        )
        layer.sequence_parallel = how == "sequence"
        layer.reduce_results = how != "summand"
        dense.adapt(layer)
        x, ref_x = (data(*shape, 13).requires_grad_() for _ in range(2))
        ref_y = dense(ref_x)
        cotangent = data(*ref_y.shape, seed=4)
        ref_y.backward(cotangent)
        mine = cut.slice(group.rank)
        local = x if how == "whole" else x[..., mine]
        if how == "sequence" and group.size > 1:
            tokens = tp.Partition.even(shape[-1], group.size)
            y = layer(local, tokens)
            y = tp.all_gather_tensor(y, -2, group, partition=tokens)
        elif how == "summand" and group.size > 1:
            y = tp.all_reduce_sum(layer(local), group) + layer.bias
        else:
            y = layer(local)
        y.backward(cotangent)
        check(y, ref_y, what)
        assert x.grad is not None
        whole = x.grad if how == "whole" else group.all_reduce_(x.grad.clone())
        check(whole, ref_x.grad, what)
        dense.check_gradients(layer, what)


@pytest.mark.parametrize("world_size", WORLDS)
@pytest.mark.parametrize("fn", [column_is_the_formula, row_is_the_formula])
def test_an_adapted_layer_is_the_formula(fn: Any, world_size: int) -> None:
    run_ranks(fn, world_size)


@pytest.mark.parametrize("fn", [column_is_the_formula, row_is_the_formula])
def test_an_adapted_layer_is_the_formula_on_thread_ranks(fn: Any) -> None:
    tp.simulate(fn, 3)


def plain_linear_is_the_formula(group: Group) -> None:
    dense = Dense(7, 13)
    layer = dense.adapt(copy.deepcopy(dense.linear))
    assert isinstance(layer, nn.Linear)
    x, ref_x = (data(2, 5, 7).requires_grad_() for _ in range(2))
    y, ref_y = layer(x), dense(ref_x)
    for t in (y, ref_y):
        t.backward(data(2, 5, 13, seed=4))
    check(y, ref_y, "y")
    check(x.grad, ref_x.grad, "x")
    dense.check_gradients(layer, ("plain",))


def test_a_plain_linear_in_a_world_of_one_is_the_formula() -> None:
    run_ranks(plain_linear_is_the_formula, 1)


# -- modules: stacked gate and up, replicated key/value heads, sequence shards

BLOCK: dict[str, dict[str, Any]] = {
    "llama": {
        "hidden_size": 12,
        "num_heads": 6,
        "num_kv_heads": 3,
        "intermediate_size": 17,
        "rope_theta": 1e4,
    },
    "one kv head": {
        "hidden_size": 10,
        "num_heads": 4,
        "num_kv_heads": 1,
        "head_dim": 6,
        "intermediate_size": 7,
        "activation": "geglu",
        "bias": True,
        "qk_norm": True,
    },
    "gelu": {
        "hidden_size": 12,
        "num_heads": 4,
        "intermediate_size": 13,
        "activation": "gelu_tanh",  # one that is fused where there is no adapter
        "norm": "layernorm",
    },
}


class DenseBlock:
    """A block whose weights are ``W + s B A``, differentiated to ``A`` and ``B``."""

    def __init__(self, name: str) -> None:
        self.options = BLOCK[name]
        self.block = tp.TensorParallelTransformerBlock(
            **self.options, group=world_of_one(), dtype=F64
        )
        for i, parameter in enumerate(self.block.parameters()):
            put(parameter, data(*parameter.shape, seed=20 + i) * 0.5)
        self.lora: dict[str, Tensor] = {}
        for i, (name, module) in enumerate(self.block.named_modules()):
            if isinstance(module, (tp.ColumnParallelLinear, tp.RowParallelLinear)):
                a = data(RANK, module.in_features, seed=50 + i) * 0.5
                b = data(module.out_features, RANK, seed=70 + i) * 0.5
                self.lora[f"{name}.lora_A"] = a.requires_grad_()
                self.lora[f"{name}.lora_B"] = b.requires_grad_()

    def state(self) -> dict[str, Tensor]:
        state = {name: value.detach() for name, value in self.block.state_dict().items()}
        for name, a in self.lora.items():
            if name.endswith("A"):
                key = f"{name[: -len('lora_A')]}weight"
                state[key] = state[key] + SCALING * self.lora[f"{name[:-1]}B"] @ a
        return state

    def __call__(self, x: Tensor) -> Tensor:
        return dense_block(self.state(), self.options, x)

    def sharded(self, group: Group, is_sequence: bool = False) -> Any:
        block = tp.TensorParallelTransformerBlock.from_dense(
            self.block, group=group, sequence_parallel=is_sequence
        )
        names = tp.add_lora(block, RANK, alpha=ALPHA)
        assert [f"{n}.lora_{x}" for n in names for x in "AB"] == list(self.lora)
        for name, full in self.lora.items():
            put(block.get_parameter(name), full.detach())
        return block


def block_is_the_formula(group: Group, name: str) -> None:
    for is_sequence in (False, True):
        dense = DenseBlock(name)
        block = dense.sharded(group, is_sequence)
        x, ref_x = (data(2, 5, dense.options["hidden_size"]).requires_grad_() for _ in range(2))
        ref_y = dense(ref_x)
        cotangent = data(*ref_y.shape, seed=4)
        ref_y.backward(cotangent)
        if is_sequence:
            cut = tp.Partition.even(5, group.size)
            y = tp.all_gather_tensor(on_shards(group, block, x), -2, group, partition=cut)
        else:
            y = block(x)
        y.backward(cotangent)
        check(y, ref_y, (name, is_sequence))
        check(x.grad, ref_x.grad, (name, is_sequence))
        trained = {n: p for n, p in block.named_parameters() if p.requires_grad}
        assert list(trained) == list(dense.lora)
        for key, parameter in trained.items():
            check(full_gradient(parameter), dense.lora[key].grad, (name, is_sequence, key))
        if not is_sequence:
            with torch.no_grad():  # where residual and norm join the sum without adapters
                check(block(x), ref_y, (name, "no_grad"))


@pytest.mark.parametrize("world_size", WORLDS)
@pytest.mark.parametrize("name", BLOCK)
def test_an_adapted_block_is_the_formula(name: str, world_size: int) -> None:
    run_ranks(block_is_the_formula, world_size, name)


def accumulates(group: Group) -> None:
    dense = DenseBlock("one kv head")
    block = dense.sharded(group)
    batches = [data(2, 4, 10, seed=s) for s in range(3)]
    for batch in batches:
        dense(batch).square().sum().backward()
    block(batches[0]).square().sum().backward()
    before = group.stats()["collectives"]
    with tp.deferred_gradients(block):
        for batch in batches[1:]:
            block(batch).square().sum().backward()
    # each batch: two sums forward, and of the input's gradient that of the second column alone (the
    # input itself is data); one sum of all adapters' gradients
    expected = 2 * 3 + 1 if group.size > 1 else 0
    assert group.stats()["collectives"] - before == expected
    for name, full in dense.lora.items():
        check(full_gradient(block.get_parameter(name)), full.grad, name)


@pytest.mark.parametrize("world_size", WORLDS)
def test_deferred_gradients_are_summed_once_a_step(world_size: int) -> None:
    run_ranks(accumulates, world_size)


# -- what it costs


def counts(group: Group) -> dict[str, tuple[list[str], list[str]]]:
    """Operations of one forward and one backward."""

    def of(layer: Any, *shape: int, is_deferred: bool = False) -> tuple[list[str], list[str]]:
        model = nn.ModuleDict({"layer": layer})
        tp.add_lora(model, 2)
        x = data(*shape).requires_grad_()
        log, group.defers_gradients = group.op_log(), is_deferred
        first = log[-1][0] if log else 0
        y = layer(x)
        forward = [op for seq, op, *_ in group.op_log() if seq > first]
        y.sum().backward()
        group.defers_gradients = False
        every = [op for seq, op, *_ in group.op_log() if seq > first]
        return forward, every[len(forward) :]

    place: dict[str, Any] = {"group": group, "dtype": F64}
    shards = {"sequence_parallel": True, **place}
    width, size = 12 // group.size, group.size
    found = {}
    for is_deferred in (False, True):
        d = {"is_deferred": is_deferred}
        word = " deferred" if is_deferred else ""
        replicated = tp.ParallelAttention(8, 8, num_kv_heads=1, **place).qkv_proj
        found |= {
            f"column{word}": of(tp.ColumnParallelLinear(8, 6, **place), 3, 8, **d),
            f"row{word}": of(tp.RowParallelLinear(12, 6, **place), 3, width, **d),
            f"column on shards{word}": of(tp.ColumnParallelLinear(8, 6, **shards), 3, 8, **d),
            f"row on shards{word}": of(tp.RowParallelLinear(12, 6, **shards), 4 * size, width, **d),
            f"replicated heads{word}": of(replicated, 3, 8, **d),
        }
    return found


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_an_adapter_adds_no_collective_but_the_sum_of_its_gradient(world_size: int) -> None:
    reduce, gather, scatter = ["all_reduce"], ["all_gather"], ["reduce_scatter"]
    expected = {
        "column": ([], 2 * reduce),  # dx, and A's gradient
        "row": (reduce, reduce),  # the output; B's gradient
        "column on shards": (gather, reduce + scatter),
        "row on shards": (scatter, gather + reduce),
        "replicated heads": ([], 3 * reduce),  # of the heads' rows of B too
        "column deferred": ([], reduce),
        "row deferred": (reduce, []),
        "column on shards deferred": (gather, scatter),
        "row on shards deferred": (scatter, gather),
        "replicated heads deferred": ([], reduce),
    }
    if world_size == 1:
        expected = {name: ([], []) for name in expected}
    for found in run_ranks(counts, world_size):
        for name, (forward, backward) in expected.items():
            assert found[name][0] == forward, name
            assert sorted(found[name][1]) == sorted(backward), name


def saved_elements(run: Callable[[], Tensor], parameters: list[Tensor]) -> list[int]:
    """Sizes of what autograd keeps of a forward pass besides parameters."""
    own = {p.data_ptr() for p in parameters}
    kept: list[int] = []

    def pack(t: Tensor) -> Tensor:
        if t.data_ptr() not in own:
            kept.append(t.numel())
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        run()
    return sorted(kept)


def keeps_little(group: Group) -> None:
    rows, wide, narrow = 16, 8 * group.size, 6
    inner = rows * RANK
    for layer, width in (
        (tp.ColumnParallelLinear(narrow, wide, group=group), narrow),
        (tp.RowParallelLinear(wide, narrow, group=group), 8),
        (tp.ColumnParallelLinear(narrow, wide, group=group, sequence_parallel=True), narrow),
    ):
        tp.add_lora(nn.ModuleDict({"layer": layer}), RANK)
        x = torch.randn(rows, width, requires_grad=True)
        tokens_seen = rows * (group.size if layer.sequence_parallel else 1)
        scale = tokens_seen // rows
        kept = saved_elements(lambda x=x, layer=layer: layer(x), list(layer.parameters()))  # type: ignore[misc]
        # x for A, A x for B: nothing for the weight. Summed parameters are copies of A or B.
        copies = [layer.lora_A.numel(), layer.lora_B.numel()]
        rest = [n for n in kept if n not in copies]
        assert rest == sorted([rows * width * scale, inner * scale]), (type(layer), kept)
        layer.weight.requires_grad_(True)
        more = saved_elements(lambda x=x, layer=layer: layer(x), list(layer.parameters()))  # type: ignore[misc]
        assert more.count(rows * width * scale) == 2  # what a weight that is trained keeps


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_a_frozen_weight_keeps_no_activation(world_size: int) -> None:
    run_ranks(keeps_little, world_size)


# -- initialisation, dropout, dtypes


def draws(group: Group, seed: int | None = 4) -> dict[str, Tensor]:
    block = tp.TensorParallelTransformerBlock(12, 6, 17, num_kv_heads=2, group=group)
    if seed is not None:  # of all threads at once
        torch.manual_seed(seed)
    tp.add_lora(block, 2)
    return {n: v for n, v in tp.full_state_dict(block).items() if "lora" in n}


def test_initialisation_does_not_depend_on_the_number_of_ranks() -> None:
    (alone,) = run_ranks(draws, 1)
    torch.manual_seed(4)
    for name, value in alone.items():
        if name.endswith("lora_A"):
            assert torch.equal(value, nn.Linear(value.shape[1], 2, bias=False).weight), name
        else:
            assert torch.equal(value, torch.zeros_like(value)), name
    assert alone["attention.qkv_proj.lora_B"].shape == (20, 2)
    for world_size in (2, 3, 4):
        for found in run_ranks(draws, world_size):
            assert list(found) == list(alone)
            assert all(torch.equal(found[name], alone[name]) for name in alone), world_size
    torch.manual_seed(5)
    (alone,) = tp.simulate(draws, 1, None)
    for found in tp.simulate(draws, 3, None):
        assert all(torch.equal(found[name], alone[name]) for name in alone)


def drops(group: Group) -> None:
    dense = Dense(7, 13)
    layer = tp.ColumnParallelLinear.from_linear(dense.linear, group=group, gather_output=True)
    tp.add_lora(nn.ModuleDict({"layer": layer}), RANK, alpha=ALPHA, dropout=0.5)
    put(layer.lora_A, dense.a.detach())
    put(layer.lora_B, dense.b.detach())
    x = data(6, 7)
    torch.manual_seed(8)
    y = layer(x)
    torch.manual_seed(8)
    low_rank = SCALING * (F.dropout(x, 0.5) @ dense.a.t()) @ dense.b.t()
    check(y, dense.linear(x) + low_rank, "the mask that one process draws, on all ranks")
    check(layer.eval()(x), dense(x), "eval")
    row = tp.RowParallelLinear(12, 5, group=group, dtype=F64)
    tp.add_lora(nn.ModuleDict({"layer": row}), RANK, dropout=1.0)
    put(row.lora_B, data(5, RANK))
    x = data(4, row.local_in_features, seed=group.rank)
    dropped = row(x)
    assert torch.equal(dropped, group.all_reduce_(x @ row.weight.detach().t()) + row.bias)
    assert relative_error(row.eval()(x), dropped) > 1e-3


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_dropout_is_before_the_adapter_only(world_size: int) -> None:
    run_ranks(drops, world_size)


def wider_than_the_layer(group: Group) -> None:
    block = tp.TensorParallelTransformerBlock(8, 4, 16, group=group, dtype=torch.bfloat16)
    tp.add_lora(block, 2, dtype=torch.float32)
    y = block(torch.randn(2, 3, 8, dtype=torch.bfloat16, requires_grad=True))
    y.sum().backward()
    assert y.dtype == torch.bfloat16
    for name, parameter in block.named_parameters():
        assert parameter.dtype == (torch.float32 if "lora" in name else torch.bfloat16), name
        assert (parameter.grad is not None) == ("lora" in name), name


@pytest.mark.parametrize("world_size", [1, 2])
def test_adapters_may_be_wider_than_the_weights(world_size: int) -> None:
    run_ranks(wider_than_the_layer, world_size)


# -- merged


def merges(group: Group) -> None:
    for name, is_sequence in itertools.product(BLOCK, (False, True)):
        dense = DenseBlock(name)
        block = dense.sharded(group, is_sequence)
        before = {n: p.detach().clone() for n, p in block.named_parameters()}
        x = data(2, 2 * group.size, dense.options["hidden_size"])
        expected = block(x[:, :2] if is_sequence else x).detach()
        count = group.stats()["collectives"]
        tp.merge_lora(block)
        tp.merge_lora(block)  # once is enough
        assert group.stats()["collectives"] == count
        for no_grad in (False, True):
            with torch.set_grad_enabled(not no_grad):
                check(block(x[:, :2] if is_sequence else x), expected, (name, "merged"))
        merged = tp.full_state_dict(block)
        assert list(merged) == list(dense.block.state_dict())
        for key, value in dense.state().items():
            check(merged[key], value, key)
        with pytest.raises(RuntimeError, match="unmerge_lora first"):
            block.load_state_dict(merged)
        tp.unmerge_lora(block)
        for key, parameter in block.named_parameters():
            check(parameter, before[key], (name, key, "unmerged"))
        check(block(x[:, :2] if is_sequence else x), expected, (name, "unmerged"))


@pytest.mark.parametrize("world_size", WORLDS)
def test_merged_is_the_same_function_and_unmerged_the_same_weights(world_size: int) -> None:
    run_ranks(merges, world_size)


# -- state dicts and copies


def copies(group: Group) -> None:
    dense = DenseBlock("one kv head")
    block = dense.sharded(group)
    x = data(1, 3, 10)
    expected = block(x).detach()
    twin = copy.deepcopy(block)
    marks = {n: mark_of(p) for n, p in block.named_parameters()}
    assert {n: mark_of(p) for n, p in twin.named_parameters()} == marks
    assert (marks["attention.qkv_proj.lora_B"] is None) == (group.size == 0)
    assert marks["attention.qkv_proj.lora_A"] is None
    with torch.no_grad():
        twin.attention.qkv_proj.lora_B.zero_()
    check(block(x), expected, "a copy has adapters of its own")
    half = copy.deepcopy(block).to(torch.float32)
    assert {n: mark_of(p) for n, p in half.named_parameters()} == marks
    local = block.state_dict()
    twin.load_state_dict(local)
    check(twin(x), expected, "own shards")
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    whole = tp.full_state_dict(block)
    assert {n: v.shape for n, v in whole.items() if n in dense.lora} == {
        n: v.shape for n, v in dense.lora.items()
    }
    twin.load_state_dict(whole)
    check(twin(x), expected, "whole tensors")
    if group.size > 1:
        for record in local._metadata.values():
            if "tp_native" in record:
                record["tp_native"]["rank"] = (group.rank + 1) % group.size
        with pytest.raises(RuntimeError, match="these are the shards of"):
            twin.load_state_dict(local)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_copies_and_state_dicts_know_how_adapters_are_cut(world_size: int) -> None:
    run_ranks(copies, world_size)


# -- folders

TARGETS = ["q_proj", "v_proj", "layers.0.mlp.down_proj", "lm_head"]
NAMES = [
    "model.layers.0.self_attn.q_proj",
    "model.layers.0.self_attn.v_proj",
    "model.layers.0.mlp.down_proj",
    "model.layers.1.self_attn.q_proj",
    "model.layers.1.self_attn.v_proj",
    "lm_head",
]


def adapted_llama(group: Group) -> Any:
    model = tp.parallelize(llama(), group)
    assert tp.add_lora(model, RANK, alpha=8, targets=TARGETS, dropout=0.25) == NAMES
    for i, (name, parameter) in enumerate(model.named_parameters()):
        if parameter.requires_grad:
            full = tp.full_state_dict(model)[name]
            put(parameter, rank_data(tuple(full.shape), torch.float32, 0, i) * 0.1)
    return model


def saves(group: Group, folder: str) -> Tensor:
    model = adapted_llama(group)
    tp.save_lora(model, folder)
    logits: Tensor = model(tokens()).logits
    return logits.detach()


def loads(group: Group, source: str, folder: str | None, has_adapters: bool) -> Tensor:
    model: Any = tp.parallelize(llama(), group)
    if has_adapters:
        tp.add_lora(model, RANK, alpha=8, targets=TARGETS)
    assert tp.load_lora(model, source) == NAMES
    if folder is not None:
        tp.save_lora(model, folder)
    logits: Tensor = model.eval()(tokens()).logits
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    assert len(trained) == 2 * len(NAMES)
    return logits.detach()


def test_a_folder_goes_from_ranks_to_ranks_bit_for_bit(tmp_path: Path) -> None:
    paths = [str(tmp_path / f"{i}") for i in range(5)]
    (expected,) = run_ranks(saves, 1, paths[0])
    (dense,) = run_ranks(loads, 1, paths[0], None, False)
    assert torch.equal(dense, expected)
    for i, (world_size, has_adapters) in enumerate([(2, False), (3, True), (4, False), (1, True)]):
        for logits in run_ranks(loads, world_size, paths[i], paths[i + 1], has_adapters):
            assert relative_error(logits, expected) <= 1e-5  # float32 sums in another order
    first = (Path(paths[0]) / "adapter_model.safetensors").read_bytes()
    for path in paths[1:]:
        assert (Path(path) / "adapter_model.safetensors").read_bytes() == first
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(Path(p).name for p in paths)


def test_the_folder_is_in_pefts_layout(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    run_ranks(saves, 2, str(tmp_path / "out"))
    model = llama()
    shapes = {}
    for name in NAMES:
        layer = model.get_submodule(name)
        shapes[f"base_model.model.{name}.lora_A.weight"] = (RANK, layer.in_features)
        shapes[f"base_model.model.{name}.lora_B.weight"] = (layer.out_features, RANK)
    found = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert {key: tuple(value.shape) for key, value in found.items()} == shapes
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    # "down_proj" alone would be that of every layer
    expected = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": RANK,
        "lora_alpha": 8,
        "lora_dropout": 0.25,
        "use_rslora": False,
        "bias": "none",
        "target_modules": sorted(NAMES),
    }
    assert {key: config[key] for key in expected} == expected


def saves_short_names(group: Group, folder: str) -> None:
    model = tp.parallelize(llama(), group)
    tp.add_lora(model, 2, targets=["q_proj", "*.mlp.up_proj"], use_rslora=True)
    tp.save_lora(model, folder)


def test_targets_are_told_by_their_last_word_where_that_says_it(tmp_path: Path) -> None:
    run_ranks(saves_short_names, 2, str(tmp_path / "out"))
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["target_modules"] == ["q_proj", "up_proj"]
    assert config["use_rslora"] is True


def test_peft_reads_the_folder(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    (expected,) = run_ranks(saves, 1, str(tmp_path / "out"))
    run_ranks(saves, 2, str(tmp_path / "two"))
    for name in ("out", "two"):
        model = peft.PeftModel.from_pretrained(llama(), str(tmp_path / name)).eval()
        assert relative_error(model(tokens()).logits, expected) <= 1e-5
    # a target lm_head would bring its own weight along otherwise
    model.save_pretrained(str(tmp_path / "theirs"), save_embedding_layers=False)
    for logits in run_ranks(loads, 2, str(tmp_path / "theirs"), None, False):
        assert relative_error(logits, expected) <= 1e-5


def merged_is_saved(group: Group, folder: str) -> Tensor:
    model = adapted_llama(group).eval()
    logits: Tensor = model(tokens()).logits.detach()
    with pytest.raises(tp.CheckpointError, match=r"has LoRA adapters.*save_lora"):
        tp.save_pretrained(model, folder)
    tp.merge_lora(model)
    tp.save_pretrained(model, folder)
    with pytest.raises(tp.CheckpointError, match=r"load the model's weights first, then load_lora"):
        tp.DistributedCheckpointLoader(folder, group).load(model)
    return logits


@pytest.mark.parametrize("world_size", [1, 3])
def test_a_merged_model_is_saved_as_a_plain_one(world_size: int, tmp_path: Path) -> None:
    logits = run_ranks(merged_is_saved, world_size, str(tmp_path / "out"))[0]
    plain = tp.load_pretrained(tmp_path / "out")
    assert relative_error(plain(tokens()).logits, logits) <= 1e-5


def bad_folders(group: Group, folder: str) -> None:
    from safetensors.torch import load_file, save_file

    path = Path(folder)
    model: Any = adapted_llama(group)
    good = path / "good"
    tp.save_lora(model, good)
    config = json.loads((good / "adapter_config.json").read_text())
    tensors = load_file(good / "adapter_model.safetensors")
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    key = f"base_model.model.{NAMES[0]}.lora_A.weight"

    def refused(name: str, match: str, target: Any = model, **changes: Any) -> None:
        bad = path / f"{name}"
        if group.rank == 0:
            bad.mkdir()
            more = changes.pop("tensors", tensors)
            save_file(more, bad / "adapter_model.safetensors")
            (bad / "adapter_config.json").write_text(json.dumps({**config, **changes}))
        group.barrier()
        with pytest.raises(tp.CheckpointError, match=match):
            tp.load_lora(target, bad)

    other = {k.replace("layers.1", "layers.7"): v for k, v in tensors.items()}
    other[key] = other[key][:, 1:].contiguous()
    match = r"4 missing: .*layers\.1\.self_attn\.q_proj\.lora_A.*4 unexpected: .*layers\.7"
    refused(
        "names",
        match + r".*1 misfit: .*q_proj\.lora_A.*\[3, 47\] on file, expected \[3, 48\]",
        tensors=other,
    )
    fresh = tp.parallelize(llama(), group)
    refused("fresh", r"4 unexpected: .*layers\.7", fresh, tensors=other)
    assert not any("lora" in name for name in fresh.state_dict())
    half = {k: v for k, v in tensors.items() if k != key}
    refused("half", r"1 missing: .*0\.self_attn\.q_proj\.lora_A\.weight$", fresh, tensors=half)
    refused("none", "holds no adapter", fresh, tensors={})
    refused("alpha", r"rank 3, scaled by 3; .*rank 3 and 2\.66667", lora_alpha=9)
    refused("dora", r"not supported: use_dora=True", use_dora=True)
    refused("ia3", r"not supported: peft_type='IA3', bias='all'", peft_type="IA3", bias="all")
    refused("rank", r"not usable: ValueError: LoRA got rank 0", r=0)
    with pytest.raises(tp.CheckpointError, match=r"config\.json: not usable: FileNotFound"):
        tp.load_lora(model, path / "nowhere")
    tp.merge_lora(model)
    with pytest.raises(tp.CheckpointError, match="unmerge_lora first"):
        tp.load_lora(model, good)
    tp.unmerge_lora(model)
    for name, parameter in model.named_parameters():
        if "lora" in name:
            assert torch.equal(parameter, before[name]), name


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_folder_that_does_not_fit_is_refused_on_all_ranks(
    world_size: int, tmp_path: Path
) -> None:
    run_ranks(bad_folders, world_size, str(tmp_path))


def keeps_other_files(group: Group, folder: str) -> None:
    model = adapted_llama(group)
    tp.save_lora(model, folder)
    tp.save_lora(model, folder)


def test_other_files_of_the_folder_are_kept(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "model.safetensors").write_text("the base model's")
    (out / "adapter_model.bin").write_text("an old adapter")
    run_ranks(keeps_other_files, 2, str(out))
    assert sorted(p.name for p in out.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "model.safetensors",
    ]
    assert (out / "model.safetensors").read_text() == "the base model's"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


# -- refused


class Tied(nn.Module):
    def __init__(self, group: Group) -> None:
        super().__init__()
        self.embed = tp.VocabParallelEmbedding(10, 8, group=group)
        self.up = tp.ColumnParallelLinear(8, 12, group=group)
        self.head = tp.ParallelLMHead(8, 10, embedding=self.embed)


def bad_input(group: Group) -> None:
    def make() -> Any:
        return tp.TensorParallelTransformerBlock(8, 4, 16, group=group)

    block = make()
    for rank in (0, -1, True, 2.0):
        with pytest.raises(ValueError, match="LoRA got rank"):
            tp.add_lora(block, rank)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="alpha nan, expected a finite"):
        tp.add_lora(block, 2, alpha=float("nan"))
    with pytest.raises(ValueError, match=r"dropout 1\.5, expected 0 to 1"):
        tp.add_lora(block, 2, dropout=1.5)
    match = r"target \['k_proj'\] is no layer .*\['down_proj', 'gate_up_proj', 'o_proj', 'qkv_proj'"
    with pytest.raises(ValueError, match=match):
        tp.add_lora(block, 2, targets=["qkv_proj", "k_proj"])
    with pytest.raises(ValueError, match=r"target \['input_norm'\] is no layer"):
        tp.add_lora(block, 2, targets="input_norm")
    with pytest.raises(ValueError, match="is no layer that can have an adapter"):
        tp.add_lora(block, 2, targets=lambda name, module: False)
    for fn in (tp.merge_lora, tp.unmerge_lora, lambda m: tp.save_lora(m, "nowhere")):
        with pytest.raises(ValueError, match="has no LoRA adapters; add_lora makes them"):
            fn(block)
    assert all(p.requires_grad for p in block.parameters())  # refused: as it was
    assert tp.add_lora(block, 2, targets=lambda name, module: "mlp" in name) == [
        "mlp.gate_up_proj",
        "mlp.down_proj",
    ]
    with pytest.raises(ValueError, match="has LoRA adapters already"):
        tp.add_lora(block, 2, targets="qkv_proj")
    if group.size > 1:
        with pytest.raises(ValueError, match=r"parallelize\(model\) comes first"):
            tp.add_lora(nn.Sequential(nn.Linear(3, 3)), 2, group=group)
        dense = llama()
        tp.add_lora(dense, 2, group=world_of_one())
        with pytest.raises(tp.PlanError, match="parallelize first"):
            tp.parallelize(dense, group)
        with pytest.raises(ValueError, match="is cut for Group"):
            tp.add_lora(make(), 2, group=world_of_one())
    tied = Tied(group)
    assert tp.add_lora(tied, 2) == ["up"]
    tied = Tied(group)
    assert tp.add_lora(tied, 2, targets="head") == ["head"]
    assert isinstance(tied.head, tp.ParallelLMHead)
    with pytest.raises(ValueError, match=r"tied to the weights of \['head'\]"):
        tp.merge_lora(tied)
    narrow = tp.RowParallelLinear(4 * group.size, 3, group=group)
    tp.add_lora(nn.ModuleDict({"layer": narrow}), 2)
    if group.size > 1:
        with pytest.raises(ValueError, match="last dimension is 3, expected this rank's part"):
            narrow(torch.ones(2, 3))


@pytest.mark.parametrize("world_size", [1, 2])
def test_what_cannot_be_is_told(world_size: int) -> None:
    run_ranks(bad_input, world_size)


# -- compiled


def compiles(group: Group) -> tuple[list[Any], list[Any]]:
    torch._dynamo.reset()
    dense = DenseBlock("one kv head")
    block = dense.sharded(group)
    x = data(2, 3, 10).requires_grad_()

    def step(module: Any) -> tuple[list[Any], list[Tensor]]:
        block.zero_grad(set_to_none=True)
        x.grad = None
        log = group.op_log()
        first = log[-1][0] if log else 0
        y = module(x)
        y.square().sum().backward()
        assert x.grad is not None
        grads = [p.grad for p in block.parameters() if p.grad is not None]
        return [entry[1:] for entry in group.op_log() if entry[0] > first], [y, x.grad, *grads]

    eager, wanted = step(block)
    compiled, found = step(torch.compile(block, fullgraph=True, backend="aot_eager"))
    assert len(found) == len(wanted) == 2 + 2 * 4
    for a, b in zip(found, wanted, strict=True):
        check(a, b, "compiled")
    return eager, compiled


def test_an_adapted_block_compiles_to_one_graph_with_eagers_collectives() -> None:
    found = run_ranks(compiles, 3, deadline_s=110)
    for eager, compiled in found:
        assert eager == found[0][0]
        assert compiled == found[0][1]
        assert sorted(compiled) == sorted(eager)
