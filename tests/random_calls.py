"""Random programs of torch calls, for tests of the rules: every spelling, any dimension.

A step is made for the shape of one tensor, with its sizes and dimensions written into it, and can
then be run on the whole and on slices alike.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Step = Callable[[list[Tensor]], Any]
Maker = Callable[[random.Random, list[Tensor], int], Step]

_MAKERS: list[Maker] = []

POINTWISE: list[Callable[[Tensor], Any]] = [
    torch.relu, F.relu, Tensor.relu, F.gelu, F.silu, F.softplus, F.elu, F.leaky_relu, F.hardtanh,
    F.hardswish, F.hardsigmoid, F.mish, F.selu, F.celu, F.logsigmoid, F.softsign, F.tanhshrink,
    F.relu6, F.hardshrink, F.softshrink, torch.sigmoid, Tensor.sigmoid, F.sigmoid, torch.tanh,
    torch.exp, Tensor.exp, torch.sin, Tensor.cos, torch.square, torch.sign, torch.abs, Tensor.abs,
    torch.neg, torch.erf, torch.floor, torch.round, torch.trunc, torch.positive, torch.isnan,
    torch.logical_not, torch.sinc, torch.nan_to_num, torch.reciprocal, torch.expm1, torch.signbit,
    lambda x: F.gelu(x, approximate="tanh"), lambda x: F.threshold(x, 0.1, 20.0),
    lambda x: F.dropout(x, 0.3, training=False), lambda x: F.dropout(x, p=0.3, training=False),
    lambda x: F.leaky_relu(x, negative_slope=0.3), lambda x: x.clone().relu_(),
    lambda x: x.clone().mul_(2), lambda x: x.clone().add_(x, alpha=0.5), lambda x: x * 2,
    lambda x: 2 * x, lambda x: x + 1, lambda x: 1 - x, lambda x: x / 3, lambda x: 3 / (x * x + 1),
    lambda x: x**2, lambda x: 2**x, lambda x: -x, lambda x: abs(x), lambda x: x // 0.5,
    lambda x: x % 0.7, lambda x: (x > 0) & (x < 1), lambda x: (x > 0) | ~(x < 1),
    lambda x: x.clip(0),
    lambda x: x.clamp(min=-0.5, max=0.5), lambda x: torch.clamp(x, max=0.5), lambda x: x.pow(3),
    lambda x: torch.where(x > 0, x, 0.0), lambda x: x.where(x > 0, x * 2), lambda x: x.float(),
    lambda x: x.to(torch.float32).double(), lambda x: x.type(torch.float32), lambda x: x.type_as(x),
    lambda x: x.to(x), lambda x: x.contiguous(), lambda x: x.clone(), lambda x: x.detach(),
    lambda x: x.masked_fill(x > 0, 5.0), lambda x: x.clone().masked_fill_(x < 0, -1.0),
    lambda x: torch.addcmul(x, x, x * 2, value=0.3), lambda x: x.lerp(x * x, 0.3),
    lambda x: torch.addcdiv(x, x, x * x + 1), lambda x: torch.maximum(x, -x), lambda x: x.bool(),
    lambda x: torch.max(x, x * 2), lambda x: torch.zeros_like(x) + x, lambda x: torch.ones_like(x),
    lambda x: torch.full_like(x, 3.0), lambda x: x.copysign(-x), lambda x: x.data,
    lambda x: x.cpu(),
    lambda x: torch.atan2(x, x * x), lambda x: x.fmod(0.3), lambda x: torch.rsub(x, 1.0),
    lambda x: torch.complex(x, x * 2).real, lambda x: torch.polar(x.abs(), x).imag,
    lambda x: x.zero_() if False else x.clone().zero_(), lambda x: x.clone().fill_(2.0),
    lambda x: torch.subtract(x, x * 3), lambda x: torch.multiply(x, x),
    lambda x: x.requires_grad_(),
    lambda x: torch.clone(x).copy_(x * 2), lambda x: x.half(), lambda x: x.long(),
    lambda x: x.eq(x),
]  # fmt: skip


def program(rng: random.Random, inputs: list[Tensor], length: int) -> Callable[..., list[Tensor]]:
    """A function of as many tensors, that makes ``length`` calls and gives all that they give."""
    steps: list[Step] = []
    env = [tensor.clone() for tensor in inputs]
    tries = 0
    while len(steps) < length and tries < 50:
        tries += 1
        at = rng.randrange(len(env)) if rng.random() < 0.4 else len(env) - 1
        try:
            step = rng.choice(_MAKERS)(rng, env, at)
            made = _tensor(step(env))
        except (RuntimeError, IndexError, ValueError, TypeError, ZeroDivisionError):
            continue
        if made.numel() == 0 or made.numel() > 4096 or made.dim() > 6:
            continue
        steps.append(step)
        env.append(made)

    def body(*given: Tensor) -> list[Tensor]:
        here = list(given)
        for step in steps:
            here.append(_tensor(step(here)))
        return here[len(given) :]

    return body


def _tensor(made: Any) -> Tensor:
    """One tensor of what a call gave: pieces of one shape are multiplied."""
    if isinstance(made, Tensor):
        return made
    made = list(made)
    if len(made) > 1 and all(piece.shape == made[0].shape for piece in made):
        return made[0] * made[-1] if made[0].is_floating_point() else made[0]
    return made[0]


def _maker(make: Maker) -> Maker:
    _MAKERS.append(make)
    return make


def _unary(weight: int = 1) -> Callable[[Callable[[random.Random, Tensor], Any]], Any]:
    """A maker of functions of one tensor."""

    def add(make: Callable[[random.Random, Tensor], Callable[[Tensor], Any]]) -> Any:
        def maker(rng: random.Random, env: list[Tensor], at: int) -> Step:
            call = make(rng, env[at])
            return lambda here: call(here[at])

        _MAKERS.extend([maker] * weight)
        return make

    return add


def _dim(rng: random.Random, x: Tensor) -> int:
    return rng.randrange(-x.dim(), x.dim())


def _factor(rng: random.Random, size: int) -> int:
    return rng.choice([n for n in range(1, size + 1) if size % n == 0])


# -- views


@_unary(2)
def _pointwise(rng: random.Random, x: Tensor) -> Any:
    return rng.choice(POINTWISE)


@_unary(3)
def _unflatten(rng: random.Random, x: Tensor) -> Any:
    at = rng.randrange(x.dim())
    outer = _factor(rng, x.size(at))
    inner, back = x.size(at) // outer, at - x.dim()
    sizes = [*x.shape[:at], outer, inner, *x.shape[at + 1 :]]
    open_ = [*x.shape[:at], outer, -1, *x.shape[at + 1 :]]
    return rng.choice(
        [
            lambda x: x.reshape(sizes),
            lambda x: x.reshape(*sizes),
            lambda x: x.contiguous().view(tuple(sizes)),
            lambda x: x.contiguous().view(*open_),
            lambda x: torch.reshape(x, tuple(sizes)),
            lambda x: x.reshape(shape=sizes),
            lambda x: x.unflatten(at, (outer, inner)),
            lambda x: x.unflatten(back, (-1, inner)),
            lambda x: torch.unflatten(x, at, [outer, inner]),
            lambda x: x.reshape(*x.shape[:at], -1, inner, *x.shape[at + 1 :]),
            lambda x: x.reshape(*x.size()[:at], -1, inner, *x.size()[at + 1 :]),
        ]
    )


@_unary(2)
def _flatten(rng: random.Random, x: Tensor) -> Any:
    at = rng.randrange(x.dim() - 1)
    sizes = [*x.shape[:at], x.size(at) * x.size(at + 1), *x.shape[at + 2 :]]
    return rng.choice(
        [
            lambda x: x.flatten(at, at + 1),
            lambda x: torch.flatten(x, start_dim=at, end_dim=at + 1),
            lambda x: x.flatten(at - x.dim(), at + 1 - x.dim()),
            lambda x: x.reshape(sizes),
            lambda x: x.reshape(*x.shape[:at], -1, *x.shape[at + 2 :]),
            lambda x: x.contiguous().view(*sizes),
            lambda x: x.flatten(),
            lambda x: x.ravel(),
        ]
    )


@_unary()
def _reshape(rng: random.Random, x: Tensor) -> Any:
    sizes: list[int] = []
    left = x.numel()
    while left > 1:
        sizes.append(_factor(rng, left))
        left //= sizes[-1]
    return lambda x: x.reshape(sizes)


@_unary(2)
def _transpose(rng: random.Random, x: Tensor) -> Any:
    a, b = _dim(rng, x), _dim(rng, x)
    order = rng.sample(range(x.dim()), x.dim())
    back = [i - x.dim() if rng.random() < 0.3 else i for i in order]
    two = rng.sample(range(x.dim()), 2)
    to = rng.sample(range(x.dim()), 2)
    return rng.choice(
        [
            lambda x: x.transpose(a, b),
            lambda x: torch.transpose(x, dim0=a, dim1=b),
            lambda x: x.swapaxes(a, b),
            lambda x: torch.swapaxes(x, axis0=a, axis1=b),
            lambda x: x.swapdims(dim0=a, dim1=b),
            lambda x: x.permute(*back),
            lambda x: x.permute(back),
            lambda x: x.permute(dims=back),
            lambda x: torch.permute(x, tuple(back)),
            lambda x: x.movedim(a, b),
            lambda x: torch.movedim(x, source=a, destination=b),
            lambda x: x.movedim(two, to),
            lambda x: torch.moveaxis(x, tuple(two), tuple(to)),
            lambda x: x.mT,
            lambda x: x.T,
            lambda x: x.t(),
            lambda x: x.adjoint(),
        ]
    )


@_unary(2)
def _ones(rng: random.Random, x: Tensor) -> Any:
    at = rng.randrange(-x.dim() - 1, x.dim() + 1)
    d = _dim(rng, x)
    return rng.choice(
        [
            lambda x: x.unsqueeze(at),
            lambda x: torch.unsqueeze(x, dim=at),
            lambda x: x[..., None, :],
            lambda x: x[:, None],
            lambda x: x[None],
            lambda x: x[..., None],
            lambda x: x.squeeze(),
            lambda x: x.squeeze(d),
            lambda x: x.unsqueeze(0).squeeze(0),
        ]
    )


@_unary(2)
def _expand(rng: random.Random, x: Tensor) -> Any:
    n = rng.choice([2, 3])
    at = rng.randrange(x.dim() + 1)
    sizes = [*x.shape[:at], n, *x.shape[at:]]
    kept = [-1] * x.dim()
    kept.insert(at, n)
    times = [rng.choice([1, 1, 2]) for _ in range(x.dim())]
    d = _dim(rng, x)
    return rng.choice(
        [
            lambda x: x.unsqueeze(at).expand(sizes),
            lambda x: x.unsqueeze(at).expand(*kept),
            lambda x: x.unsqueeze(at).broadcast_to(sizes),
            lambda x: torch.broadcast_to(x.unsqueeze(at), tuple(sizes)),
            lambda x: x.expand(n, *x.shape),
            lambda x: x.expand(size=(n, *x.shape)),
            lambda x: x.unsqueeze(at).expand(sizes).flatten(max(at - 1, 0), max(at - 1, 0) + 1),
            lambda x: x.unsqueeze(at).repeat(*[n if i == at else 1 for i in range(len(sizes))]),
            lambda x: x.repeat(*times),
            lambda x: x.repeat(tuple(times)),
            lambda x: x.repeat(n, *times),
            lambda x: x.tile(times),
            lambda x: x.tile(2),
            lambda x: torch.tile(x, dims=(2,)),
            lambda x: x.repeat_interleave(n, d),
            lambda x: torch.repeat_interleave(x, n, dim=d),
            lambda x: torch.repeat_interleave(x, repeats=n, dim=d),
            lambda x: x.repeat_interleave(n),
            lambda x: x[..., :1].expand_as(x),
        ]
    )


# -- slices


@_unary(3)
def _split(rng: random.Random, x: Tensor) -> Any:
    d = _dim(rng, x)
    size = x.size(d)
    n = rng.randrange(1, size + 1)
    first = rng.randrange(1, size)
    pieces = [first, size - first]
    pick = rng.choice([0, -1])
    calls = [
        lambda x: torch.split(x, n, d),
        lambda x: torch.split(x, n, dim=d),
        lambda x: x.split(split_size=n, dim=d),
        lambda x: torch.split(x, pieces, d),
        lambda x: x.split(pieces, dim=d),
        lambda x: x.split_with_sizes(pieces, d),
        lambda x: x.chunk(n, d),
        lambda x: torch.chunk(x, chunks=2, dim=d),
        lambda x: x.chunk(3, dim=d),
        lambda x: torch.tensor_split(x, n, d),
        lambda x: x.tensor_split([first], dim=d),
        lambda x: x.tensor_split((first, first), d),
        lambda x: x.unbind(d),
        lambda x: torch.unbind(x, dim=d),
        lambda x: list(x),
        lambda x: torch.hsplit(x, 2),
    ]
    call = rng.choice(calls)
    return call if rng.random() < 0.5 else lambda x: call(x)[pick]


@_unary(3)
def _index(rng: random.Random, x: Tensor) -> Any:
    at = rng.randrange(x.dim())
    size = x.size(at)
    a = rng.randrange(-size, size)
    b = rng.randrange(size + 2)
    lo = rng.randrange(size)
    hi = rng.randrange(lo + 1, size + 1)
    step = rng.choice([1, 2, 3])
    rest = (slice(None),) * at
    idx = torch.tensor([rng.randrange(size) for _ in range(rng.randrange(1, 4))])
    square = idx[:, None].expand(-1, 2).clone()
    mask = torch.arange(size) % 2 == 0
    listed = list(range(lo, hi))
    odd = [rng.randrange(-size, size) for _ in range(2)]
    j = rng.randrange(x.size(-1))
    return rng.choice(
        [
            lambda x: x[(*rest, a)],
            lambda x: x[(*rest, slice(a, None))],
            lambda x: x[(*rest, slice(None, b))],
            lambda x: x[(*rest, slice(lo, hi))],
            lambda x: x[(*rest, slice(lo, hi), Ellipsis)],
            lambda x: x[(*rest, slice(lo, hi, step))],
            lambda x: x[..., lo:hi] if lo < x.shape[-1] else x[..., :1],
            lambda x: x[..., -3:],
            lambda x: x[..., :-1],
            lambda x: x[:, 1:],
            lambda x: x[1:, ..., :-1],
            lambda x: x[..., j],
            lambda x: x[..., j : j + 1],
            lambda x: x[..., : x.shape[-1] // 2] * x[..., x.shape[-1] // 2 :],
            lambda x: torch.cat((-x[..., x.shape[-1] // 2 :], x[..., : x.shape[-1] // 2]), dim=-1),
            lambda x: x[..., ::2],
            lambda x: x[0, ..., None],
            lambda x: x[(*rest, idx)],
            lambda x: x[(*rest, square)],
            lambda x: x[(*rest, mask)],
            lambda x: x[(*rest, listed)],
            lambda x: x[(*rest, odd)],
            lambda x: x[idx],
            lambda x: x[..., idx % x.shape[-1]],
            lambda x: x[x > 0],
            lambda x: x.narrow(at, lo, hi - lo),
            lambda x: torch.narrow(x, at - x.dim(), lo, hi - lo),
            lambda x: x.narrow(dim=at, start=lo, length=hi - lo),
            lambda x: x.select(at, a),
            lambda x: torch.select(x, dim=at, index=a),
            lambda x: x.index_select(at, idx),
            lambda x: torch.index_select(x, dim=at - x.dim(), index=idx),
            lambda x: x.take_along_dim(torch.zeros_like(x[..., :1], dtype=torch.long), -1),
            lambda x: x.gather(at, x.argsort(at)),
            lambda x: x.diagonal(),
            lambda x: x.unfold(at, 2, 1),
        ]
    )


# -- along dimensions


@_unary(3)
def _along(rng: random.Random, x: Tensor) -> Any:
    d, e = _dim(rng, x), _dim(rng, x)
    n = rng.randrange(-2, 3)
    by = [rng.choice([0, 0, 1, -1, 2]) for _ in range(2 * rng.randrange(1, x.dim() + 1))]
    last = list(x.shape[-1:])
    weight = torch.randn(last, dtype=torch.float64)
    return rng.choice(
        [
            lambda x: x.softmax(d),
            lambda x: F.softmax(x, dim=d),
            lambda x: torch.softmax(x, d),
            lambda x: torch.softmax(x, d, torch.float64),
            lambda x: F.softmax(x, dim=d, dtype=torch.float32),
            lambda x: F.log_softmax(x, d),
            lambda x: F.softmin(x, dim=d),
            lambda x: x.cumsum(d),
            lambda x: torch.cumsum(x, dim=d),
            lambda x: torch.cumsum(x, axis=d),
            lambda x: x.cumprod(dim=d),
            lambda x: x.logcumsumexp(d),
            lambda x: x.cummax(d),
            lambda x: x.flip(d),
            lambda x: x.flip([d]),
            lambda x: x.flip((d, e)),
            lambda x: x.flip(d, e),
            lambda x: torch.flip(x, dims=(d,)),
            lambda x: x.fliplr(),
            lambda x: x.roll(n),
            lambda x: x.roll(n, d),
            lambda x: torch.roll(x, shifts=n, dims=d),
            lambda x: torch.roll(x, (1, n), (d, e)),
            lambda x: F.normalize(x),
            lambda x: F.normalize(x, dim=d),
            lambda x: F.normalize(x, 2),
            lambda x: F.normalize(x, 2.0, d),
            lambda x: F.normalize(x, p=1, dim=d),
            lambda x: x.sort(d),
            lambda x: x.sort(),
            lambda x: x.sort(dim=d, descending=True),
            lambda x: torch.argsort(x, d),
            lambda x: x.argsort(),
            lambda x: x.tril(),
            lambda x: torch.triu(x, 1),
            lambda x: x.triu(diagonal=-1),
            lambda x: F.pad(x, by),
            lambda x: F.pad(x, pad=(1, -1)),
            lambda x: F.pad(x, (0, 0, 1, -1)),
            lambda x: F.pad(x, (0, 0, 0, 1), value=3.0),
            lambda x: F.layer_norm(x, last),
            lambda x: F.layer_norm(x, normalized_shape=last, weight=weight, bias=weight),
            lambda x: F.rms_norm(x, last, weight),
            lambda x: F.layer_norm(x, list(x.shape[-2:])),
            lambda x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6),
            lambda x: F.glu(x, d),
            lambda x: F.glu(x),
            lambda x: F.prelu(x, torch.full((x.shape[1],), 0.3, dtype=x.dtype)),
            lambda x: F.group_norm(x, 1),
            lambda x: F.interpolate(x, scale_factor=2.0),
            lambda x: F.avg_pool1d(x, 2),
        ]
    )


@_unary(3)
def _reduce(rng: random.Random, x: Tensor) -> Any:
    d, e = _dim(rng, x), _dim(rng, x)
    keep = rng.random() < 0.5
    k = rng.randrange(1, x.size(d) + 1)
    m = rng.randrange(1, x.size(-1) + 1)
    return rng.choice(
        [
            lambda x: x.sum(d),
            lambda x: x.sum(d, keep),
            lambda x: x.sum((d, e), keepdim=keep),
            lambda x: x.sum(axis=d),
            lambda x: torch.sum(x, dim=[d]),
            lambda x: torch.sum(x, ()),
            lambda x: x.sum(),
            lambda x: x.mean(d, keepdim=keep),
            lambda x: x.mean(dim=(d,), dtype=torch.float64),
            lambda x: torch.mean(x, d, keep),
            lambda x: x.amax(d),
            lambda x: x.amin(dim=d, keepdim=keep),
            lambda x: x.amax(),
            lambda x: x.var(d),
            lambda x: x.var(False),
            lambda x: x.var(d, False),
            lambda x: x.var(dim=d, unbiased=False, keepdim=keep),
            lambda x: x.std(d, correction=0),
            lambda x: torch.var_mean(x, d),
            lambda x: torch.logsumexp(x, d),
            lambda x: x.logsumexp((d,), keep),
            lambda x: x.max(d),
            lambda x: x.max(d, keep),
            lambda x: x.max(dim=d, keepdim=keep).values,
            lambda x: torch.min(x, d)[1],
            lambda x: x.max(),
            lambda x: x.argmax(d),
            lambda x: x.argmax(dim=d, keepdim=keep),
            lambda x: x.argmin(),
            lambda x: x.prod(d),
            lambda x: (x > 0).any(d),
            lambda x: (x > 0).all(dim=d, keepdim=keep),
            lambda x: x.norm(dim=d),
            lambda x: x.norm(2, d),
            lambda x: x.norm(2, dim=d, keepdim=keep),
            lambda x: x.norm(2),
            lambda x: torch.norm(x, p=1, dim=d),
            lambda x: torch.linalg.vector_norm(x, 2, d),
            lambda x: torch.linalg.norm(x, dim=d),
            lambda x: x.median(d),
            lambda x: x.median(),
            lambda x: x.topk(k, d),
            lambda x: x.topk(m),
            lambda x: torch.topk(x, k=k, dim=d).values,
            lambda x: x.kthvalue(k, d),
            lambda x: x.count_nonzero(d),
            lambda x: x.nansum(d),
            lambda x: F.cosine_similarity(x, x * 2, dim=d),
        ]
    )


# -- several tensors


@_maker
def _join(rng: random.Random, env: list[Tensor], at: int) -> Step:
    x = env[at]
    others = [i for i, t in enumerate(env) if t.shape == x.shape and t.dtype == x.dtype]
    b = rng.choice(others)
    fixed = torch.randn([n if rng.random() < 0.6 else 1 for n in x.shape], dtype=torch.float64)
    if rng.random() < 0.5:
        fixed = fixed[tuple([0] * rng.randrange(x.dim() + 1))]
    whole = torch.randn(x.shape, dtype=torch.float64)
    d = _dim(rng, x)
    calls: list[Callable[[Tensor, Tensor], Any]] = [
        lambda x, y: x + y,
        lambda x, y: x * y,
        lambda x, y: torch.sub(x, y, alpha=2),
        lambda x, y: torch.add(input=x, other=y),
        lambda x, y: x + fixed,
        lambda x, y: fixed * x,
        lambda x, y: fixed + x * y,
        lambda x, y: x.masked_fill(fixed > 0, 1.0),
        lambda x, y: torch.where(fixed > 0, x, y),
        lambda x, y: torch.where(x > 0, fixed, y),
        lambda x, y: torch.max(x, fixed),
        lambda x, y: torch.max(fixed, x),
        lambda x, y: fixed.to(x) + x,
        lambda x, y: fixed.type_as(x),
        lambda x, y: torch.lerp(x, y, fixed),
        lambda x, y: x.clone().copy_(y),
        lambda x, y: x.clone().add_(y),
        lambda x, y: x.expand_as(y),
        lambda x, y: x.reshape_as(y),
        lambda x, y: torch.cat([x, y], d),
        lambda x, y: torch.cat((x, whole), dim=d),
        lambda x, y: torch.cat(tensors=[y, x], dim=d),
        lambda x, y: torch.concat([x, x], axis=d),
        lambda x, y: torch.stack([x, y], d),
        lambda x, y: torch.stack((x, whole)),
        lambda x, y: torch.stack((x, whole), dim=-1),
        lambda x, y: torch.outer(x.flatten(), y.flatten()[:3]),
        lambda x, y: x.unsqueeze(-1) * y.unsqueeze(-2),
        lambda x, y: F.scaled_dot_product_attention(x, y, x),
    ]
    call = rng.choice(calls)
    return lambda here: call(here[at], here[b])


@_maker
@_maker
def _broadcast(rng: random.Random, env: list[Tensor], at: int) -> Step:
    """Two tensors that broadcast, whatever they are."""
    x = env[at]

    def fits(y: Tensor) -> bool:
        pairs = zip(reversed(x.shape), reversed(y.shape), strict=False)
        return all(a == b or 1 in (a, b) for a, b in pairs)

    b = rng.choice([i for i, t in enumerate(env) if fits(t)])
    call = rng.choice([torch.add, torch.mul, torch.Tensor.__sub__, lambda a, b: b.__rtruediv__(a)])
    return lambda here: call(here[at], here[b])


@_maker
@_maker
def _product(rng: random.Random, env: list[Tensor], at: int) -> Step:
    x = env[at].double()
    b = rng.choice([i for i, t in enumerate(env) if t.dim() > 1 and t.dtype == torch.float64])
    k = x.size(-1)
    two = torch.randn(k, 3, dtype=torch.float64)
    many = torch.randn(*x.shape[:-2], k, 2, dtype=torch.float64)
    vector = torch.randn(k, dtype=torch.float64)
    rows = torch.randn(4, k, dtype=torch.float64)
    bias = torch.randn(4, dtype=torch.float64)
    left = torch.randn(2, x.size(-2), dtype=torch.float64)
    letters = "abcdefg"[: x.dim()]
    mixed = "".join(rng.sample(letters, rng.randrange(1, len(letters) + 1)))
    some = "".join(rng.sample(letters, rng.randrange(1, len(letters) + 1)))
    part = torch.randn([x.size(letters.index(c)) for c in some], dtype=torch.float64)
    calls: list[Callable[[Tensor, Tensor], Any]] = [
        lambda x, y: x @ two,
        lambda x, y: torch.matmul(x, many),
        lambda x, y: x.matmul(other=two),
        lambda x, y: left @ x,
        lambda x, y: x @ vector,
        lambda x, y: vector @ x.mT,
        lambda x, y: x @ x.mT,
        lambda x, y: torch.matmul(input=x.transpose(-1, -2), other=x),
        lambda x, y: x @ y,
        lambda x, y: x @ y.mT,
        lambda x, y: y.mT @ x,
        lambda x, y: torch.mm(x.flatten(0, -2), two),
        lambda x, y: torch.bmm(x.flatten(0, -3), x.flatten(0, -3).mT),
        lambda x, y: F.linear(x, rows),
        lambda x, y: F.linear(x, rows, bias),
        lambda x, y: F.linear(x, weight=rows, bias=bias),
        lambda x, y: F.linear(x, y),
        lambda x, y: F.linear(left, x.mT),
        lambda x, y: torch.baddbmm(x @ x.mT, x, x.mT),
        lambda x, y: torch.baddbmm(batch2=x.mT, batch1=x, input=x @ x.mT, beta=0.5),
        lambda x, y: torch.addmm(bias, x, rows.T),
        lambda x, y: torch.addmm(input=bias, mat2=rows.T, mat1=x),
        lambda x, y: torch.addbmm(torch.zeros(1, dtype=torch.float64), x, x.mT),
        lambda x, y: torch.einsum(f"{letters}->{mixed}", x),
        lambda x, y: torch.einsum(f"{letters}, {some} -> {mixed}", x, part),
        lambda x, y: torch.einsum(f"{some},{letters}->{mixed}", [part, x]),
        lambda x, y: torch.einsum(f"{letters},{letters}->{mixed}", x, y),
        lambda x, y: torch.einsum(f"{letters},{letters[:-1]}z->{letters}z", x, x),
        lambda x, y: torch.einsum("...ij,jk->...ik", x, two),
        lambda x, y: torch.einsum("... i j , ... k j -> ... i k", x, x),
        lambda x, y: torch.einsum("...j,jk", x, two),
        lambda x, y: torch.einsum("i...,i...->...i", x, x),
        lambda x, y: torch.einsum("...i->i...", x),
        lambda x, y: torch.tensordot(x, two, 1),
        lambda x, y: torch.cdist(x, x),
    ]
    call = rng.choice(calls)
    return lambda here: call(here[at], here[b])


@_unary(2)
def _attention(rng: random.Random, x: Tensor) -> Any:
    tokens, width = x.size(-2), x.size(-1)
    heads = x.size(-3)
    two = torch.randn(tokens, tokens, dtype=torch.float64)
    square = two > 0
    square[:, 0] = True
    biases = torch.randn(1, heads, tokens, tokens, dtype=torch.float64)
    per_row = torch.randn(x.size(0), 1, 1, tokens, dtype=torch.float64)
    keys = torch.randn(*x.shape[:-2], 3, width, dtype=torch.float64)
    few = _factor(rng, heads)
    return rng.choice(
        [
            lambda x: F.scaled_dot_product_attention(x, x * 2, x + 1),
            lambda x: F.scaled_dot_product_attention(x, x, x, is_causal=True),
            lambda x: F.scaled_dot_product_attention(x, x, x, None, 0.0, True),
            lambda x: F.scaled_dot_product_attention(x, x, x, attn_mask=two),
            lambda x: F.scaled_dot_product_attention(x, x, x, square),
            lambda x: F.scaled_dot_product_attention(x, x, x, biases),
            lambda x: F.scaled_dot_product_attention(x, x, x, attn_mask=per_row, scale=0.3),
            lambda x: F.scaled_dot_product_attention(query=x, key=keys, value=keys),
            lambda x: F.scaled_dot_product_attention(keys, x, x),
            lambda x: F.scaled_dot_product_attention(
                x, keys[:, :few], keys[:, :few], enable_gqa=True
            ),
            lambda x: F.scaled_dot_product_attention(x, x[:, :1], x[:, :1]),
            lambda x: F.scaled_dot_product_attention(x.mT, x.mT, x.mT),
            lambda x: F.scaled_dot_product_attention(x.mT, x.mT, x.mT, is_causal=True),
        ]
    )


@_unary()
def _rotary(rng: random.Random, x: Tensor) -> Any:
    angles = torch.randn(x.size(-2), x.size(-1) // 2, dtype=torch.float64)
    turns = torch.polar(torch.ones_like(angles), angles)
    cos, sin = angles.cos(), angles.sin()

    def pairs(x: Tensor) -> Tensor:
        z = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2).contiguous())
        return torch.view_as_real(z * turns).flatten(-2)

    def halves(x: Tensor) -> Tensor:
        a, b = x.chunk(2, dim=-1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)

    def interleaved(x: Tensor) -> Tensor:
        a, b = x[..., ::2], x[..., 1::2]
        return torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1).flatten(-2)

    def stacked(x: Tensor) -> Tensor:
        a, b = x.reshape(*x.shape[:-1], -1, 2).unbind(-1)
        return torch.stack((-b, a), dim=-1).reshape(x.shape)

    return rng.choice([pairs, halves, interleaved, stacked])
