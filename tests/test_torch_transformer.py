"""torch's own transformer modules with their parts swapped for sharded ones, against the dense
ones: training, and inference, where torch would run fused kernels on what it takes for whole
weights.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tp_native as tp
from harness import run_ranks
from shards import F64, WORLDS, check, data
from tp_native.group import Group
from tp_native.nn import mark_of, without_fused_layers

WIDTH, HEADS, INNER = 8, 4, 10
LAYER: dict[str, Any] = {"dim_feedforward": INNER, "dropout": 0.0, "dtype": F64}
MODES: list[Callable[[], Any]] = [torch.enable_grad, torch.no_grad, torch.inference_mode]


def filled(module: Any) -> Any:
    with torch.no_grad():
        for seed, parameter in enumerate(module.parameters()):
            parameter.copy_(data(*parameter.shape, seed=20 + seed) * 0.5)
    return module


def swap(model: nn.Module, group: Group, attention: bool = True) -> None:
    """Cut the attention and the linear layers of every transformer layer, in place."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.MultiheadAttention) and attention:
                heads = tp.Partition.from_ratios(HEADS, range(1, group.size + 1))
                cut = tp.ParallelMultiheadAttention.from_dense(child, group=group, partition=heads)
                setattr(module, name, cut)
            elif name == "linear1":
                cut = tp.ColumnParallelLinear.from_linear(child, group=group)  # type: ignore[assignment]
                setattr(module, name, cut)
            elif name == "linear2":
                cut = tp.RowParallelLinear.from_linear(child, group=group)  # type: ignore[assignment]
                setattr(module, name, cut)


def padding() -> Tensor:
    padded = torch.zeros(2, 5, dtype=torch.bool)
    padded[1, 3:] = True
    return padded


def compare(ours: Any, dense: Any, call: Callable[[Any], Tensor], seen: Any, what: Any) -> None:
    """Training with every gradient, then inference, at the places that ``seen`` says."""
    for module in (ours, dense):
        module.zero_grad()
        module.train()
        call(module)[seen].square().sum().backward()
    expected = dict(dense.named_parameters())
    assert list(dict(ours.named_parameters())) == list(expected)
    for name, parameter in ours.named_parameters():
        mark, grad = mark_of(parameter), expected[name].grad
        assert grad is not None and parameter.grad is not None, (what, name)
        check(parameter.grad, grad if mark is None else mark.local(grad), (what, name))
    for training in (True, False):
        for mode in MODES:
            with mode():
                mine, theirs = (call(module.train(training))[seen] for module in (ours, dense))
            check(mine, theirs, (what, training, mode))


def encoder(group: Group) -> None:
    x, causal = data(2, 5, WIDTH), torch.ones(5, 5, dtype=torch.bool).triu(1)
    for batch_first in (True, False):
        for norm_first in (False, True):
            options = {**LAYER, "batch_first": batch_first, "norm_first": norm_first}
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # no nested tensors: torch's, of these options
                layer = nn.TransformerEncoderLayer(WIDTH, HEADS, **options)
                dense, ours = (
                    filled(nn.TransformerEncoder(layer, 2, enable_nested_tensor=True))
                    for _ in range(2)
                )
            swap(ours, group)
            without_fused_layers(ours)
            given = x if batch_first else x.transpose(0, 1)
            seen = ~padding() if batch_first else ~padding().t()
            for name, kwargs in {
                "plain": {},
                "padded": {"src_key_padding_mask": padding()},
                "causal": {"mask": causal},
                "hinted": {"mask": causal, "is_causal": True},
                "both": {"mask": causal, "src_key_padding_mask": padding()},
            }.items():
                where = seen if "src_key_padding_mask" in kwargs else ...
                call = lambda m: m(given, **kwargs)  # noqa: B023, E731
                compare(ours, dense, call, where, (batch_first, norm_first, name))
            if batch_first and not norm_first:
                with torch.no_grad():  # the dense one did take nested tensors
                    assert not dense.eval()(x, src_key_padding_mask=padding())[padding()].any()


def decoder(group: Group) -> None:
    layer = nn.TransformerDecoderLayer(WIDTH, HEADS, batch_first=True, **LAYER)
    dense, ours = (filled(nn.TransformerDecoder(layer, 2)) for _ in range(2))
    swap(ours, group)
    causal = nn.Transformer.generate_square_subsequent_mask(4, dtype=F64)
    x, memory = data(2, 4, WIDTH), data(2, 5, WIDTH, seed=4)
    for kwargs in ({}, {"tgt_mask": causal}, {"memory_key_padding_mask": padding()}):
        call = lambda m: m(x, memory, **kwargs)  # noqa: B023, E731
        compare(ours, dense, call, ..., kwargs.keys())


def transformer(group: Group) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dense, ours = (
            filled(nn.Transformer(WIDTH, HEADS, 1, 1, batch_first=True, **LAYER)) for _ in range(2)
        )
    swap(ours, group)
    without_fused_layers(ours)
    x, y = data(2, 5, WIDTH), data(2, 4, WIDTH, seed=4)
    causal = nn.Transformer.generate_square_subsequent_mask(4, dtype=F64)
    for kwargs in (
        {"tgt_mask": causal, "tgt_is_causal": True},
        {"src_key_padding_mask": padding(), "memory_key_padding_mask": padding()},
    ):
        call = lambda m: m(x, y, **kwargs)  # noqa: B023, E731
        compare(ours, dense, call, ..., kwargs.keys())


@pytest.mark.parametrize("world_size", WORLDS)
@pytest.mark.parametrize("fn", [encoder, decoder, transformer])
def test_swapped_modules_are_the_dense_ones(fn: Any, world_size: int) -> None:
    run_ranks(fn, world_size)


def passes_nothing_by(group: Group) -> None:
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, batch_first=True, **LAYER)
    x = data(2, 5, WIDTH)
    dense, ours, linears = (filled(nn.TransformerEncoder(layer, 1)).eval() for _ in range(3))
    swap(ours, group)
    swap(linears, group, attention=False)
    with torch.no_grad():
        check(ours(x), dense(x), "attention turns the fused layer off")
        with pytest.raises(ValueError, match="got a nested one; where an nn"):
            ours(x, src_key_padding_mask=padding())
        without_fused_layers(linears)
        check(linears(x), dense(x), "linear layers alone")
        untouched = nn.TransformerEncoder(layer, 1)
        without_fused_layers(untouched)
        assert untouched.use_nested_tensor and untouched.layers[0].activation_relu_or_gelu == 1
    with pytest.warns(UserWarning, match="_qkv_same_embed_dim was not True"):
        assert not nn.TransformerEncoder(ours.layers[0], 1).use_nested_tensor


def test_fused_kernels_pass_nothing_by() -> None:
    run_ranks(passes_nothing_by, 2)
