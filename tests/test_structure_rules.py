"""Whenever a rule leaves an axis to be cut, the function commutes with slicing along it."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from pieces import Agreement, Labelled, commutes, drawn, plain
from random_calls import POINTWISE, program
from tp_native.structure.axes import Axis, Dim, segment, size_of


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    torch.set_num_threads(threads)


def random_inputs(rng: random.Random) -> list[Labelled]:
    """One or two tensors; axes may be shared, segmented, a factor, or of no weight."""
    shared = [Axis(rng.choice([4, 6])), Axis(rng.choice([2, 3, 4]))]

    def dim() -> Dim | int:
        kind = rng.random()
        if kind < 0.3:
            return rng.choice([2, 3, 4, 6])
        if kind < 0.4:
            return [rng.choice(shared)]
        if kind < 0.8:
            return [Axis(rng.choice([2, 3, 4, 6]))]
        if kind < 0.9:
            return [Axis(rng.choice([2, 4])), Axis(2)]
        axis = Axis(6)
        segment(axis, 0, rng.choice([2, 3, 4]))
        return [axis]

    dims = [dim() for _ in range(rng.choice([2, 3, 3, 4, 4]))]
    given = [drawn(rng, *dims)]
    kind = rng.random()
    if kind < 0.3:
        given.append(drawn(rng, *dims))
    elif kind < 0.5:
        given.append(drawn(rng, *([Axis(size_of(d))] if isinstance(d, list) else d for d in dims)))
    elif kind < 0.7:
        given.append(plain(rng, *given[0][0].shape))
    elif kind < 0.9:
        given.append(drawn(rng, *rng.sample(dims, len(dims))))
    return given


def random_program(rng: random.Random) -> Agreement:
    inputs = random_inputs(rng)
    body = program(rng, [tensor for tensor, _ in inputs], rng.choice([1, 1, 2, 3, 4]))
    return commutes(body, *inputs, rng=rng)


def test_programs_on_slices_give_slices() -> None:
    cut = sum(random_program(random.Random(seed)).translated for seed in range(300))
    assert cut > 1000


@pytest.mark.soak
@pytest.mark.parametrize("part", range(20))
def test_many_programs_on_slices_give_slices(part: int) -> None:
    for seed in range(1000 + 1000 * part, 2000 + 1000 * part):
        random_program(random.Random(seed))


@pytest.mark.soak
@given(rng=st.randoms(use_true_random=False))
@settings(max_examples=1000, deadline=None, suppress_health_check=list(HealthCheck))
def test_drawn_programs_on_slices_give_slices(rng: random.Random) -> None:
    random_program(rng)


@pytest.mark.parametrize("at", range(len(POINTWISE)))
def test_pointwise_functions_are_followed(at: int) -> None:
    rng = random.Random(at)
    found = commutes(POINTWISE[at], drawn(rng, 2, [Axis(4)], [Axis(3), Axis(2)]), rng=rng)
    assert not found.mixed
    assert found.translated and not found.refused


# -- what must be followed, all in one place: (what is cut stays free, what is whole is mixed)

B, T, H, D = 2, 3, 4, 6  # batch, tokens, heads (cut), width (mixed or not)


def heads(rng: random.Random) -> Labelled:
    return drawn(rng, B, [Axis(H)], T, D)


def features(rng: random.Random) -> Labelled:
    return drawn(rng, B, T, [Axis(H)])


def rotary_pairs(x: Tensor) -> Tensor:
    turns = torch.polar(torch.ones(T, D // 2), torch.arange(T * D / 2).view(T, -1)).to(x.device)
    z = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(z * turns).flatten(3).type_as(x)


def in_place(x: Tensor) -> Tensor:
    y = x.clone()
    y += 1
    y *= x
    y -= x
    y /= 2
    return y


FOLLOWED: dict[str, tuple[Callable[..., Any], Callable[[random.Random], Labelled]]] = {
    "view of a tuple": (lambda x: x.view((B, H * T, D)), heads),
    "split width": (lambda x: x.view(B, H, T, 2, -1), heads),
    "unflatten": (lambda x: x.unflatten(-1, (2, H // 2)), features),
    "permute list": (lambda x: x.permute([0, 2, 1, 3]), heads),
    "movedim of several": (lambda x: x.movedim((1, 2), (-1, 0)), heads),
    "swapaxes": (lambda x: x.swapaxes(axis0=1, axis1=-1), heads),
    "T": (lambda x: x.T, heads),
    "select": (lambda x: x.select(2, -1), heads),
    "last token": (lambda x: x[:, :, -1], heads),
    "last three": (lambda x: x[:, -3:], features),
    "none index": (lambda x: x[..., None, :], features),
    "gather tokens": (lambda x: x[:, torch.tensor([2, 0])], features),
    "rotary, complex": (rotary_pairs, heads),
    "rotary, halves": (lambda x: torch.cat((-x[..., 3:], x[..., :3]), -1), heads),
    "softmax keyword": (lambda x: F.softmax(x, dim=-1, dtype=torch.float32), heads),
    "softmax places": (lambda x: torch.softmax(x, -1, torch.float64), heads),
    "normalize": (lambda x: F.normalize(x, 2.0, -1), heads),
    "normalize keyword": (lambda x: F.normalize(x, p=2, dim=-1), heads),
    "norm": (lambda x: x.norm(2, -1), heads),
    "mean": (lambda x: x.mean((2, 3), keepdim=True), heads),
    "max and places": (lambda x: x.max(-1), heads),
    "topk": (lambda x: x.topk(2), heads),
    "sort": (lambda x: x.sort(dim=-1), heads),
    "cumsum": (lambda x: x.cumsum(1), features),
    "roll": (lambda x: x.roll(1, 1), features),
    "time shift": (lambda x: F.pad(x, (0, 0, 1, -1)), features),
    "flip": (lambda x: x.flip(-1, 2), heads),
    "tril": (lambda x: (x @ x.mT).tril(), heads),
    "vector": (lambda x: x @ torch.ones(D, dtype=x.dtype), heads),
    "matmul by 2-D": (lambda x: x @ torch.ones(D, 2, dtype=x.dtype), heads),
    "linear": (lambda x: F.linear(x, torch.ones(5, D, dtype=x.dtype)), heads),
    "einsum dots": (lambda x: torch.einsum("...td, ...sd -> ...ts", x, x), heads),
    "einsum implicit": (lambda x: torch.einsum("bhtd,dk", x, torch.ones(D, 2).double()), heads),
    "einsum per head": (
        lambda x: torch.einsum("bhtd,hdk->bhtk", x, torch.arange(48.0).double().view(H, D, 2)),
        heads,
    ),
    "outer": (lambda x: torch.outer(x[0, 0], torch.arange(3).double()), features),
    "sdpa": (lambda x: F.scaled_dot_product_attention(x, x, x, is_causal=True), heads),
    "sdpa mask": (
        lambda x: F.scaled_dot_product_attention(x, x, x, torch.ones(T, T).double().tril()),
        heads,
    ),
    "sdpa biases": (
        lambda x: F.scaled_dot_product_attention(x, x, x, torch.arange(36.0).to(x).view(H, T, T)),
        heads,
    ),
    "head biases": (lambda x: x + torch.arange(H).view(H, 1, 1), heads),
    "lerp": (lambda x: torch.lerp(x, x * 2, torch.arange(H).double()), features),
    "repeat tokens": (lambda x: x.repeat(1, 2, 1), features),
    "repeat heads": (lambda x: x.repeat_interleave(2, dim=1), heads),
    "in place": (in_place, heads),
    "chunk": (lambda x: [p * 2 for p in x.chunk(2, -1)], features),
    "tuple of pieces": (lambda x: tuple(x.transpose(0, 1)), features),
    "layer norm": (lambda x: F.layer_norm(x, (D,)), heads),
    "stack": (lambda x: torch.stack((x, x), dim=1).unbind(1), features),
    "masked fill": (lambda x: x.masked_fill(torch.ones(T, D).tril() == 0, -1e9), heads),
}  # fmt: skip


@pytest.mark.parametrize("name", FOLLOWED)
def test_transformer_code_is_followed(name: str) -> None:
    body, inputs = FOLLOWED[name]
    rng = random.Random(name)
    found = commutes(body, inputs(rng), rng=rng)
    assert not found.mixed
    assert found.translated and not found.refused


MIXED: dict[str, tuple[Callable[..., Any], Callable[[random.Random], Labelled]]] = {
    "softmax": (lambda x: x.softmax(1), heads),
    "normalize's default": (lambda x: F.normalize(x, 2), heads),
    "roll of all": (lambda x: x.roll(2), features),
    "norm": (lambda x: x.norm(2, 1), heads),
    "topk's default": (lambda x: x.topk(2), features),
    "shift": (lambda x: F.pad(x, (1, -1)), features),
    "addbmm": (lambda x: torch.addbmm(torch.zeros(1).double(), x[0], x[0].mT), heads),
    "causal rows": (
        lambda x: F.scaled_dot_product_attention(x.mT, x.mT, x.mT, is_causal=True), features,
    ),
    "causal rows, by place": (
        lambda x: F.scaled_dot_product_attention(x.mT, x.mT, x.mT, None, 0.0, True), features,
    ),
    "groups of whole keys": (
        lambda x: F.scaled_dot_product_attention(
            x, torch.ones(B, 2, T, D).double(), torch.ones(B, 2, T, D).double(), enable_gqa=True
        ),
        heads,
    ),
    "itself across": (lambda x: x[..., None] * x[..., None, :], features),
    "steps": (lambda x: x[..., ::2], features),
    "an index": (lambda x: x[..., 1], features),
    "mask": (lambda x: x[x > 0], features),
    "triangle": (lambda x: x.tril(), features),
    "noise": (lambda x: x + torch.rand_like(x), features),
    "values": (lambda x: [x, x.tolist()][0], features),
    "comparison": (lambda x: x if torch.equal(x, x) else -x, features),
    "uneven repeats": (lambda x: x.repeat_interleave(torch.tensor([1, 2, 1, 1]), -1), features),
    "not known": (lambda x: torch.cdist(x, x), features),
    "channels": (lambda x: F.conv1d(x.mT, torch.ones(2, H, 1).double()), features),
    "interpolation": (lambda x: F.interpolate(x, scale_factor=2.0), features),
    "unfold": (lambda x: x.unfold(-1, 2, 1), features),
    "assignment": (lambda x: x.clone().__setitem__((..., 0), 1.0), features),
}  # fmt: skip


@pytest.mark.parametrize("name", MIXED)
def test_what_needs_an_axis_whole_mixes_it(name: str) -> None:
    body, inputs = MIXED[name]
    rng = random.Random(name)
    found = commutes(body, inputs(rng), rng=rng)
    assert found.mixed and not found.axes


def test_arguments_in_any_order() -> None:
    rng = random.Random(0)
    a, b, c = drawn(rng, [Axis(4)], 2, 3), drawn(rng, [Axis(4)], 3, 5), drawn(rng, [Axis(4)], 2, 5)
    found = commutes(
        lambda a, b, c: torch.baddbmm(batch2=b, batch1=a, beta=0.5, input=c), a, b, c, rng=rng
    )
    assert not found.mixed and found.translated and not found.refused


def test_copies_have_their_source_s_axes() -> None:
    rng = random.Random(0)
    axis = Axis(4)
    found = commutes(
        lambda x, y: x.clone().copy_(y) * y.roll(1, -1),
        drawn(rng, 2, [axis]),
        drawn(rng, 2, [Axis(4)]),
        rng=rng,
    )
    assert axis.find().mixed
    assert len(found.mixed) == 1  # the two are one now


def test_a_slice_past_a_cut_segment_is_not_taken_as_it_is() -> None:
    """``x[..., 2:4]`` has the right size on a rank, and other elements."""
    rng = random.Random(0)
    axis = Axis(6)
    segment(axis, 0, 2)
    found = commutes(lambda x: x[..., 2:4] * 1, drawn(rng, 3, [axis]), rng=rng, trials=30)
    assert found.translated and not found.refused


def test_embeddings_in_the_middle_are_not_followed() -> None:
    rng = random.Random(0)
    found = commutes(
        lambda x: F.embedding((x > 0).long(), torch.arange(10.0).view(2, 5)), features(rng), rng=rng
    )
    assert found.mixed


def test_multi_head_attention_forward_is_not_followed() -> None:
    rng = random.Random(0)

    def body(x: Tensor) -> Any:
        three, one = torch.ones(12, 4).double(), torch.ones(4, 4).double()
        return F.multi_head_attention_forward(
            x, x, x, 4, 2, three, None, None, None, False, 0.0, one, None, training=False
        )

    assert commutes(body, features(rng), rng=rng).mixed
