"""Attention, MLP and block against formulas over whole parameters in float64: forward, every
gradient, every option, on 1 to 4 ranks, whole and on sequence shards.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tp_native as tp
from harness import run_ranks
from oracle import dense_attention, dense_block, dense_mlp
from shards import F64, WORLDS, check, data, full_gradient
from tp_native.collectives import scatter_to_ranks
from tp_native.group import Group, world_of_one
from tp_native.nn import (
    KVCache,
    ParallelAttention,
    ParallelMLP,
    TensorParallelTransformerBlock,
    deferred_gradients,
)

ATTENTION: dict[str, dict[str, Any]] = {
    "plain": {"hidden_size": 12, "num_heads": 4},
    "uneven, biased": {"hidden_size": 15, "num_heads": 5, "bias": True},
    "grouped": {"hidden_size": 16, "num_heads": 8, "num_kv_heads": 4, "rope_theta": 1e4},
    "few kv heads": {"hidden_size": 12, "num_heads": 6, "num_kv_heads": 2, "bias": True},
    "multi-query": {"hidden_size": 12, "num_heads": 3, "num_kv_heads": 1, "qk_norm": True},
    "wide heads": {"hidden_size": 6, "num_heads": 2, "head_dim": 8, "causal": False},
    "all": {
        "hidden_size": 10,
        "num_heads": 6,
        "num_kv_heads": 3,
        "head_dim": 4,
        "bias": True,
        "rope_theta": 100.0,
        "qk_norm": True,
    },
}
MLP: dict[str, dict[str, Any]] = {
    f"{activation}{' biased' if bias else ''}": {
        "hidden_size": 6,
        "intermediate_size": 11,
        "activation": activation,
        "bias": bias,
    }
    for activation in ("swiglu", "geglu", "gelu", "gelu_tanh", "relu", "silu")
    for bias in (False, True)
}
BLOCK: dict[str, dict[str, Any]] = {
    "llama": {
        "hidden_size": 12,
        "num_heads": 6,
        "num_kv_heads": 3,
        "intermediate_size": 17,
        "rope_theta": 1e4,
    },
    "gpt": {
        "hidden_size": 12,
        "num_heads": 4,
        "intermediate_size": 48,
        "norm": "layernorm",
        "activation": "gelu_tanh",
        "bias": True,
    },
    "gemma-like": {
        "hidden_size": 10,
        "num_heads": 4,
        "num_kv_heads": 1,
        "head_dim": 6,
        "intermediate_size": 7,
        "activation": "geglu",
        "qk_norm": True,
        "rope_theta": 1e4,
    },
}
Formula = Callable[[dict[str, Tensor], Tensor], Tensor]


def filled(module: Any, seed: int = 11) -> Any:
    """Biases and norms are not what they are initialised to."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=F64) * 0.5)
    return module


def matches(group: Group, kind: Any, options: dict[str, Any], formula: Formula) -> None:
    """The module on this group, replicated and on sequence shards, against the formula."""
    dense = filled(kind(**options, group=world_of_one(), dtype=F64))
    for shape in ((2, 5), (1, 1), (3, 8), (0, 4)):
        for on_shards in (False, True):
            module = kind.from_dense(dense, group=group, sequence_parallel=on_shards)
            state = {k: v.detach().requires_grad_() for k, v in dense.state_dict().items()}
            x, ref_x = (data(*shape, options["hidden_size"]).requires_grad_() for _ in range(2))
            ref_y = formula(state, ref_x)
            cotangent = data(*ref_y.shape, seed=4)
            ref_y.backward(cotangent)
            if on_shards and group.size > 1:
                cut = tp.Partition.even(shape[1], group.size)
                y = module(scatter_to_ranks(x, -2, group), sequence_partition=cut)
                y = tp.all_gather_tensor(y, -2, group, partition=cut)
            else:
                y = module(x)
            y.backward(cotangent)
            what = (options, shape, on_shards)
            check(y, ref_y, what)
            check(x.grad, ref_x.grad, what)
            for name, parameter in module.named_parameters():
                check(full_gradient(parameter), state[name].grad, (*what, name))


def attention_matches(group: Group, name: str) -> None:
    options = ATTENTION[name]
    matches(group, ParallelAttention, options, lambda s, x: dense_attention(s, options, x))


def mlp_matches(group: Group, name: str) -> None:
    options = MLP[name]
    matches(group, ParallelMLP, options, lambda s, x: dense_mlp(s, options["activation"], x))


def block_matches(group: Group, name: str) -> None:
    options = BLOCK[name]
    matches(group, TensorParallelTransformerBlock, options, lambda s, x: dense_block(s, options, x))


@pytest.mark.parametrize("world_size", WORLDS)
@pytest.mark.parametrize("name", ATTENTION)
def test_attention_is_the_formula(world_size: int, name: str) -> None:
    run_ranks(attention_matches, world_size, name)


@pytest.mark.parametrize("world_size", WORLDS)
def test_mlp_is_the_formula(world_size: int) -> None:
    for name in MLP:
        run_ranks(mlp_matches, world_size, name)


@pytest.mark.parametrize("world_size", WORLDS)
@pytest.mark.parametrize("name", BLOCK)
def test_block_is_the_formula(world_size: int, name: str) -> None:
    run_ranks(block_matches, world_size, name)


def counts(group: Group) -> dict[str, Any]:
    """Collectives of one forward and one backward of each module, by what they are."""

    def of(module: Any, *shape: int) -> tuple[list[str], list[str]]:
        x = data(*shape).requires_grad_()
        before = group.stats()["collectives"]
        y = module(x)
        between = group.stats()["collectives"]
        y.sum().backward()
        after = group.stats()["collectives"]
        log = [entry[1] for entry in group.op_log()][len(group.op_log()) - (after - before) :]
        return log[: between - before], log[between - before :]

    make: dict[str, Any] = {"group": group, "dtype": F64}
    block = {"hidden_size": 8, "num_heads": 4, "intermediate_size": 16, **make}
    shards = {"sequence_parallel": True, **make}
    return {
        "column": of(tp.ColumnParallelLinear(8, 6, **make), 3, 8),
        "row": of(tp.RowParallelLinear(12, 6, **make), 3, 12 // group.size),
        "column on shards": of(tp.ColumnParallelLinear(8, 6, **shards), 3, 8),
        "row on shards": of(
            tp.RowParallelLinear(12, 6, **shards), 4 * group.size, 12 // group.size
        ),
        "mlp": of(ParallelMLP(8, 12, **make), 3, 8),
        "attention": of(ParallelAttention(8, 4, bias=True, **make), 2, 3, 8),
        "block": of(TensorParallelTransformerBlock(**block), 2, 3, 8),
        "mlp on shards": of(ParallelMLP(8, 12, bias=True, **shards), 3, 8),
    }


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_each_module_enters_exactly_these_collectives(world_size: int) -> None:
    # a product and its collective are one operation, in the other's backward too
    reduce, gather = ["row_parallel_linear"], ["gathered_column_parallel_linear"]
    scatter = ["row_parallel_linear_scatter"]
    expected = {
        "column": ([], reduce),
        "row": (reduce, []),
        "column on shards": (gather, scatter),
        "row on shards": (scatter, gather),
        "mlp": (reduce, reduce),
        "attention": (reduce, reduce),
        "block": (2 * reduce, 2 * reduce),
        "mlp on shards": (gather + scatter, gather + scatter),
    }
    if world_size == 1:
        expected = {name: ([], []) for name in expected}
    for found in run_ranks(counts, world_size):
        assert found == expected


def accumulates(group: Group) -> None:
    options = BLOCK["gemma-like"]
    dense = filled(TensorParallelTransformerBlock(**options, group=world_of_one(), dtype=F64))
    batches = [data(2, 4, options["hidden_size"], seed=s) for s in range(3)]
    state = {k: v.detach().requires_grad_() for k, v in dense.state_dict().items()}
    for batch in batches:
        dense_block(state, options, batch).square().sum().backward()
    for deferred in (False, True):
        block = TensorParallelTransformerBlock.from_dense(
            dense, group=group, sequence_parallel=True
        )
        cut = tp.Partition.even(4, group.size)

        def step(batch: Tensor, module: Any = block, cut: tp.Partition = cut) -> None:
            y = module(scatter_to_ranks(batch, -2, group), sequence_partition=cut)
            y = tp.all_gather_tensor(y, -2, group, partition=cut)
            y.square().sum().backward()

        step(batches[0])
        if deferred:
            before = group.stats()["collectives"]
            with deferred_gradients(block):
                step(batches[1])
                step(batches[2])
            # per batch 4 forward, 4 backward, the gather of the test; one sum for both
            assert group.stats()["collectives"] - before == (2 * 9 + 1 if group.size > 1 else 0)
        else:
            step(batches[1])
            step(batches[2])
        for name, parameter in block.named_parameters():
            check(full_gradient(parameter), state[name].grad, (name, deferred))


@pytest.mark.parametrize("world_size", WORLDS)
def test_partial_gradients_are_right_under_accumulation(world_size: int) -> None:
    run_ranks(accumulates, world_size)


def decodes(group: Group) -> None:
    options = {**ATTENTION["all"], "num_kv_heads": 2}
    dense = filled(ParallelAttention(**options, group=world_of_one(), dtype=F64))
    module = ParallelAttention.from_dense(dense, group=group).eval()
    x = data(2, 7, options["hidden_size"])
    whole = dense_attention(dense.state_dict(), options, x)
    with torch.no_grad():
        cache = KVCache()
        parts = [module(piece, cache=cache) for piece in x.split([3, 2, 1, 1], 1)]
        assert cache.length == 7
        check(torch.cat(parts, 1), whole, "piece by piece")
        # left padding: two tokens that nobody sees
        padded = torch.cat([data(2, 2, options["hidden_size"], seed=9), x], 1)
        seen = torch.ones(2, 9, dtype=torch.int64)
        seen[:, :2] = 0
        positions = (seen.cumsum(1) - 1).clamp_min(0)
        check(module(padded, seen, position_ids=positions)[:, 2:], whole, "left padding")
        # a mask per head, added to the scores
        scores = data(1, options["num_heads"], 7, 7, seed=5)
        check(module(x, scores), dense(x, scores), "added mask")
    if group.size > 1:
        with pytest.raises(ValueError, match="KVCache is for inference"):
            module(x.requires_grad_(), cache=KVCache())


@pytest.mark.parametrize("world_size", WORLDS)
def test_caches_and_masks(world_size: int) -> None:
    run_ranks(decodes, world_size)


def joins_norm(group: Group) -> None:
    for name in ("llama", "gpt"):
        options = BLOCK[name]
        dense = filled(TensorParallelTransformerBlock(**options, group=world_of_one(), dtype=F64))
        block = TensorParallelTransformerBlock.from_dense(dense, group=group).eval()
        x = data(2, 5, options["hidden_size"])
        with torch.no_grad():
            check(block(x), dense_block(dense.state_dict(), options, x), name)
        seen: list[str] = []
        norm = block.post_attention_norm
        norm.register_forward_hook(lambda *_, seen=seen: seen.append("norm"))
        with torch.no_grad():
            check(block(x), dense_block(dense.state_dict(), options, x), name)
        assert seen == ["norm"]


@pytest.mark.parametrize("world_size", WORLDS)
def test_without_gradients_the_norm_joins_the_sum(world_size: int) -> None:
    run_ranks(joins_norm, world_size)


def same_from_any_world(group: Group) -> dict[str, Tensor]:
    torch.manual_seed(5)
    block = TensorParallelTransformerBlock(
        12, 6, 17, num_kv_heads=2, bias=True, qk_norm=True, group=group
    )
    again = block.to_dense()
    assert {name: p.shape for name, p in again.named_parameters()} == {
        name: value.shape for name, value in tp.full_state_dict(block).items()
    }
    block.load_state_dict(again.state_dict())  # whole tensors are cut
    return tp.full_state_dict(block)


def test_initialisation_does_not_depend_on_the_number_of_ranks() -> None:
    (alone,) = run_ranks(same_from_any_world, 1)
    assert alone["attention.qkv_proj.weight"].shape == ((6 + 4) * 2, 12)
    for world_size in (2, 3, 4):
        for found in run_ranks(same_from_any_world, world_size):
            assert list(found) == list(alone)
            for name, value in alone.items():
                assert torch.equal(found[name], value), (world_size, name)


def refuses(group: Group) -> None:
    with pytest.raises(
        ValueError, match=r"16 over 3 heads.*nearest numbers of heads are \[1, 2, 4\]"
    ):
        ParallelAttention(16, 3, group=group)
    with pytest.raises(ValueError, match=r"6 heads over 4 key/value.*nearest legal.*\[2, 3, 6\]"):
        ParallelAttention(12, 6, num_kv_heads=4, group=group)
    with pytest.raises(ValueError, match="head_dim is 3; make it even"):
        ParallelAttention(12, 4, rope_theta=1e4, group=group)
    with pytest.raises(ValueError, match="activation 'swish', expected one of"):
        ParallelMLP(8, 16, activation="swish", group=group)
    with pytest.raises(ValueError, match="norm 'batch', expected one of"):
        TensorParallelTransformerBlock(8, 4, 16, norm="batch", group=group)
    with pytest.raises(ValueError, match="adds up to 3 but the dimension has 16"):
        cut = tp.Partition.from_sizes([3] + [0] * (group.size - 1))
        ParallelMLP(8, 16, partition=cut, group=group)
    attention = ParallelAttention(12, 4, group=group)
    with pytest.raises(
        ValueError, match=r"input of shape \[3, 12\], expected \(batch, tokens, 12\)"
    ):
        attention(torch.ones(3, 12))
    with pytest.raises(ValueError, match=r"attention_mask of shape \[1, 1, 1, 7\] for 3 keys"):
        attention(torch.ones(1, 3, 12), torch.ones(1, 7))
    with pytest.raises(TypeError, match="from_dense got a Linear, expected a ParallelAttention"):
        ParallelAttention.from_dense(nn.Linear(3, 3), group=group)


@pytest.mark.parametrize("world_size", [1, 2])
def test_what_does_not_fit_is_told(world_size: int) -> None:
    run_ranks(refuses, world_size)
