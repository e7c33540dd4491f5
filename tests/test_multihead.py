"""Attention cut by heads against ``nn.MultiheadAttention`` in float64: every option, forward,
weights and every gradient, on 1 to 4 ranks with heads that don't divide and ranks without any.
"""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tp_native as tp
from harness import run_ranks
from shards import F64, WORLDS, check, cuts, data
from tp_native.group import Group
from tp_native.nn import mark_of

BATCH, QUERIES, KEYS = 2, 4, 3

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "batch first": {"batch_first": True},
    "no bias": {"bias": False, "batch_first": True},
    "widths": {"kdim": 5, "vdim": 7},
    "one width": {"kdim": 5, "vdim": 5, "batch_first": True},
    "bias_kv": {"add_bias_kv": True, "batch_first": True},
    "zero": {"add_zero_attn": True},
    "all": {"kdim": 6, "vdim": 9, "add_bias_kv": True, "add_zero_attn": True},
}
MASKS = ["none", "bool", "float", "each head", "padding", "float padding", "both", "causal"]


def filled(module: Any) -> Any:
    with torch.no_grad():
        for seed, parameter in enumerate(module.parameters()):
            parameter.copy_(data(*parameter.shape, seed=20 + seed) * 0.5)
    return module


def masks(name: str, heads: int, queries: int, keys: int, is_batched: bool) -> dict[str, Any]:
    batch = BATCH if is_batched else 1
    seen = torch.eye(queries, keys, dtype=torch.bool)  # all but the diagonal is seen
    padded = torch.zeros(batch, keys, dtype=torch.bool)
    padded[-1, -1] = True
    padding = padded if is_batched else padded[0]
    causal = torch.ones(queries, keys, dtype=torch.bool).triu(1)
    return {
        "none": {},
        "bool": {"attn_mask": seen},
        "float": {"attn_mask": data(queries, keys, seed=6)},
        "each head": {"attn_mask": data(batch * heads, queries, keys, seed=7)},
        "padding": {"key_padding_mask": padding},
        "float padding": {"key_padding_mask": padding * data(*padding.shape, seed=8)},
        "both": {"attn_mask": seen, "key_padding_mask": padding},
        "causal": {"attn_mask": causal, "is_causal": True},
    }[name]


def inputs(dense: nn.MultiheadAttention, which: str, is_batched: bool) -> list[Tensor]:
    """Query, key and value; equal names are one tensor."""
    made: dict[str, Tensor] = {}
    widths = (dense.embed_dim, dense.kdim, dense.vdim)
    for i, (name, width) in enumerate(zip(which, widths, strict=True)):
        tokens = QUERIES if name == "q" else KEYS
        shape = (tokens, width)
        if is_batched:
            shape = (BATCH, *shape) if dense.batch_first else (tokens, BATCH, width)  # type: ignore[assignment]
        if name not in made:
            made[name] = data(*shape, seed=30 + i).requires_grad_()
    return [made[name] for name in which]


def which_inputs(dense: nn.MultiheadAttention) -> list[str]:
    if dense.kdim == dense.vdim == dense.embed_dim:
        return ["qqq", "qkk", "qkv"]
    return ["qkk", "qkv"] if dense.kdim == dense.vdim else ["qkv"]


def matches(
    ours: Any, dense: nn.MultiheadAttention, which: str, is_batched: bool, name: str, **options: Any
) -> None:
    mine, theirs = inputs(dense, which, is_batched), inputs(dense, which, is_batched)
    tokens = (QUERIES, QUERIES if which[1] == "q" else KEYS)
    options = {**options, **masks(name, dense.num_heads, *tokens, is_batched)}
    what = (which, is_batched, options.keys(), name)
    y, weights = ours(*mine, **options)
    ref_y, ref_weights = dense(*theirs, **options)
    check(y, ref_y, what)
    assert (weights is None) == (ref_weights is None), what
    cotangent = data(*ref_y.shape, seed=9)
    loss, ref_loss = (y * cotangent).sum(), (ref_y * cotangent).sum()
    if weights is not None:
        check(weights, ref_weights, what)
        cotangent = data(*ref_weights.shape, seed=10)
        loss = loss + (weights * cotangent).sum()
        ref_loss = ref_loss + (ref_weights * cotangent).sum()
    ours.zero_grad()
    dense.zero_grad()
    loss.backward()
    ref_loss.backward()
    for x, ref_x in zip(mine, theirs, strict=True):
        check(x.grad, ref_x.grad, what)
    expected = dict(dense.named_parameters())
    assert list(dict(ours.named_parameters())) == list(expected)
    for key, parameter in ours.named_parameters():
        mark, grad = mark_of(parameter), expected[key].grad
        assert grad is not None
        check(parameter.grad, grad if mark is None else mark.local(grad), (*what, key))


def every_option(group: Group, name: str) -> None:
    heads = 3
    dense = filled(nn.MultiheadAttention(6, heads, dtype=F64, **OPTIONS[name]))
    for cut in cuts(heads, group.size) if group.size <= heads else [None]:
        ours = tp.ParallelMultiheadAttention.from_dense(dense, group=group, partition=cut)
        for which, is_batched in itertools.product(which_inputs(dense), (True, False)):
            matches(ours, dense, which, is_batched, "none")
            matches(ours, dense, which, is_batched, "both", need_weights=False)
    ways = [{"need_weights": False}, {}, {"average_attn_weights": False}]
    some = MASKS if name in ("plain", "batch first", "all") else ["each head", "both"]
    for mask, way, is_batched in itertools.product(some, ways, (True, False)):
        matches(ours, dense, which_inputs(dense)[0], is_batched, mask, **way)


@pytest.mark.parametrize("world_size", WORLDS)
@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_is_the_dense_module(name: str, world_size: int) -> None:
    run_ranks(every_option, world_size, name)


def one_tensor_as_query_and_value(group: Group) -> None:
    dense = filled(nn.MultiheadAttention(6, 3, dtype=F64))
    ours = tp.ParallelMultiheadAttention.from_dense(dense, group=group)
    found = []
    for module in (ours, dense):
        q, k = (data(4, 2, 6, seed=s).requires_grad_() for s in (1, 2))
        for args in ((q, k, q), (q, q, k)):
            y, weights = module(*args)
            (y.square().sum() + weights.square().sum()).backward()
            found += [y, weights]
        found += [q.grad, k.grad]
    for mine, theirs in zip(found[:6], found[6:], strict=True):
        check(mine, theirs, "query is value, query is key")


def empty_batch(group: Group) -> None:
    dense = filled(nn.MultiheadAttention(6, 3, batch_first=True, dtype=F64))
    ours = tp.ParallelMultiheadAttention.from_dense(dense, group=group)
    for need in (True, False):
        x = data(0, 4, 6).requires_grad_()
        y, weights = ours(x, x, x, need_weights=need, average_attn_weights=False)
        assert y.shape == (0, 4, 6) and (not need or weights.shape == (0, 3, 4, 4))
        y.sum().backward()
        assert x.grad is not None and x.grad.shape == x.shape
    assert all(p.grad is None or p.grad.count_nonzero() == 0 for p in ours.parameters())


@pytest.mark.parametrize("world_size", WORLDS)
@pytest.mark.parametrize("fn", [one_tensor_as_query_and_value, empty_batch])
def test_other_inputs(fn: Any, world_size: int) -> None:
    run_ranks(fn, world_size)


def counts(group: Group) -> dict[str, tuple[int, int]]:
    """Collectives of a forward and of a backward."""
    ours = tp.ParallelMultiheadAttention(8, 3 + 1, group=group, dtype=F64)
    wide = tp.ParallelMultiheadAttention(8, 4, kdim=6, vdim=6, group=group, dtype=F64)
    q, k, v, m = (data(3, 2, w).requires_grad_() for w in (8, 8, 8, 6))
    calls: dict[str, tuple[Any, tuple[Tensor, ...], bool]] = {
        "self": (ours, (q, q, q), False),
        "self, weights": (ours, (q, q, q), True),
        "cross": (ours, (q, k, k), False),
        "three": (ours, (q, k, v), False),
        "memory of another width": (wide, (q, m, m), False),
    }
    found = {}
    for name, (module, args, need) in calls.items():
        before = group.stats()["collectives"]
        y, _ = module(*args, need_weights=need)
        between = group.stats()["collectives"]
        y.sum().backward()
        found[name] = (between - before, group.stats()["collectives"] - between)
    return found


def test_collectives_are_one_forward_and_one_for_each_input_backward() -> None:
    expected = {
        "self": (1, 1),
        "self, weights": (2, 1),
        "cross": (1, 2),
        "three": (1, 3),
        "memory of another width": (1, 2),
    }
    assert run_ranks(counts, 2) == [expected] * 2
    assert run_ranks(counts, 1) == [dict.fromkeys(expected, (0, 0))]


def state_is_the_dense_modules(group: Group) -> None:
    for options in OPTIONS.values():
        torch.manual_seed(4)
        dense = nn.MultiheadAttention(6, 3, **options)
        torch.manual_seed(4)
        ours = tp.ParallelMultiheadAttention(6, 3, **options, group=group)
        again = copy.deepcopy(ours)
        for module in (ours, again):
            whole, expected = tp.full_state_dict(module), dense.state_dict()
            assert list(whole) == list(expected)
            assert all(torch.equal(whole[key], value) for key, value in expected.items())
        with torch.no_grad():
            for parameter in again.parameters():
                parameter.zero_()
        again.load_state_dict(dense.state_dict())
        local = ours.state_dict()
        assert all(torch.equal(value, local[key]) for key, value in again.state_dict().items())
        again.load_state_dict(local)
        filled(dense)
        ours.load_state_dict(dense.state_dict())
        for module in (ours, dense):
            args = inputs(dense.double(), "qqq" if not options.get("kdim") else "qkv", True)
            module.double()(*args)[0].square().sum().backward()
        norm = tp.clip_grad_norm_(ours.parameters(), 0.5)
        check(norm, nn.utils.clip_grad_norm_(dense.parameters(), 0.5), options)
        frozen = tp.ParallelMultiheadAttention.from_dense(dense.requires_grad_(False), group=group)
        assert not any(p.requires_grad for p in frozen.parameters())


@pytest.mark.parametrize("world_size", WORLDS)
def test_names_shapes_draws_and_norms_are_the_dense_modules(world_size: int) -> None:
    run_ranks(state_is_the_dense_modules, world_size)


def drops(group: Group) -> tuple[Tensor, ...]:
    torch.manual_seed(1)
    ours = tp.ParallelMultiheadAttention(6, 3, dropout=0.5, group=group, dtype=F64)
    x = data(4, 2, 6)
    found = [ours(x, x, x, average_attn_weights=False) for _ in range(2)]
    sdpa = ours(x, x, x, need_weights=False)[0]
    still = ours.eval()(x, x, x)[1]
    assert torch.equal(still.sum(-1).round(decimals=9), torch.ones(2, 4, dtype=F64))
    weights = found[0][1]
    assert 0 < (weights == 0).double().mean() < 1
    by_head = (weights == 0).flatten(2).unbind(1)
    assert not torch.equal(by_head[0], by_head[1]) and not torch.equal(by_head[0], by_head[2])
    assert not torch.equal(found[0][0], found[1][0])
    return (found[0][0], weights, sdpa, torch.rand(2))


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_dropout_differs_by_head_and_leaves_ranks_alike(world_size: int) -> None:
    first, *others = run_ranks(drops, world_size)
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def under_autocast(group: Group) -> None:
    dense = filled(nn.MultiheadAttention(6, 3, batch_first=True))
    ours = tp.ParallelMultiheadAttention.from_dense(dense, group=group)
    x, mask = data(2, 4, 6).float().requires_grad_(), data(4, 4, seed=2).float()
    for need in (True, False):
        with torch.autocast("cpu", torch.bfloat16):
            mine, theirs = (m(x, x, x, attn_mask=mask, need_weights=need) for m in (ours, dense))
        for a, b in zip(mine, theirs, strict=True):
            assert (a is None) == (b is None)
            if a is not None:
                assert a.dtype == b.dtype == torch.bfloat16
                # a few roundings to 8 bits, of other partial sums
                torch.testing.assert_close(a, b, rtol=0.05, atol=0.05)
        mine[0].float().sum().backward()


@pytest.mark.parametrize("world_size", [1, 2, 4])  # with four, one rank has no head
def test_autocast_casts_as_in_the_dense_module(world_size: int) -> None:
    run_ranks(under_autocast, world_size)


def compiles(group: Group) -> None:
    dense = filled(nn.MultiheadAttention(6, 3, batch_first=True, dtype=F64))
    ours: Any = tp.ParallelMultiheadAttention.from_dense(dense, group=group)
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    x = data(2, 4, 6)
    mask = torch.ones(4, 4, dtype=torch.bool).triu(1)
    y, weights = compiled(x, x, x, attn_mask=mask)
    ref_y, ref_weights = dense(x, x, x, attn_mask=mask)
    check(y, ref_y, "compiled")
    check(weights, ref_weights, "compiled")
    y.sum().backward()


def test_compiles_whole() -> None:
    run_ranks(compiles, 2)


def refuses(group: Group) -> None:
    ours: Any = tp.ParallelMultiheadAttention(6, 3, dropout=0.1, group=group)
    x = torch.ones(4, 2, 6)
    with pytest.raises(ValueError, match=r"attention dropout 0\.1: thread ranks"):
        ours(x, x, x)
    ours.eval()
    with pytest.raises(ValueError, match="embed_dim 7 over 3 heads is no whole head"):
        tp.ParallelMultiheadAttention(7, 3, group=group)
    with pytest.raises(ValueError, match="adds up to 4 but the dimension has 3"):
        cut = tp.Partition.from_sizes([2, 2])
        tp.ParallelMultiheadAttention(6, 3, group=group, partition=cut)
    with pytest.raises(ValueError, match=r"key \[3, 2, 6\], value \[4, 2, 6\]; expected \(L, N, w"):
        ours(x, x[:3], x)
    with pytest.raises(ValueError, match=r"shape \[2, 4\], expected \[4, 4\] or \[6, 4, 4\]"):
        ours(x, x, x, attn_mask=torch.ones(2, 4))
    with pytest.raises(ValueError, match=r"key_padding_mask of shape \[4, 2\], expected \[2, 4\]"):
        ours(x, x, x, key_padding_mask=torch.ones(4, 2, dtype=torch.bool))
    with pytest.raises(TypeError, match=r"attn_mask is torch\.int64, expected bool"):
        ours(x, x, x, attn_mask=torch.ones(4, 4, dtype=torch.int64))
    with pytest.raises(ValueError, match="is_causal=True says that attn_mask is causal"):
        ours(x, x, x, is_causal=True)
    with pytest.raises(TypeError, match="from_dense got a Linear, expected an nn"):
        tp.ParallelMultiheadAttention.from_dense(nn.Linear(3, 3), group=group)


def test_what_cannot_be_right_is_refused() -> None:
    tp.simulate(refuses, 2)
