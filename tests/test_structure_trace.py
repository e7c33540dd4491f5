"""Small modules that lead a follower astray: parallelized they are the dense ones, in outputs and
in all gradients, whatever the plan does with them.
"""

from __future__ import annotations

import copy
import dataclasses
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tp_native as tp
from families import gradient_error, main_output
from tp_native.group import Group
from tp_native.plan import ShardPlan
from tp_native.plan.shards import COLUMN, ROW
from tp_native.structure.solve import Solution, cut_pair, find_pairs, gradients
from tp_native.structure.trace import Trace, trace

WIDTH, HEADS, ROWS, TOKENS = 24, 6, 2, 5
NEAR = 1e-10


class Base(nn.Module):
    """An up and a down projection; what is between is the subclass's."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, 2 * WIDTH)
        self.down = nn.Linear(2 * WIDTH, WIDTH)


class ConstantBothWays(Base):
    """A parameter meets a cut activation and is used whole as well."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.randn(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x).relu() * self.gain) + x * self.gain


class WholeBothWays(Base):
    """An activation multiplies a cut one, and the output."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.gate(x).sigmoid()
        return self.down(self.up(x).relu() * gate) + x * gate


class Heads(nn.Module):
    """Attention; subclasses change a line."""

    def __init__(self, kv_heads: int = HEADS) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.width = HEADS, kv_heads, WIDTH // HEADS
        self.q = nn.Linear(WIDTH, WIDTH)
        self.k = nn.Linear(WIDTH, kv_heads * self.width)
        self.v = nn.Linear(WIDTH, kv_heads * self.width)
        self.o = nn.Linear(WIDTH, WIDTH)

    def split(self, x: Tensor, heads: int) -> Tensor:
        return x.view(x.shape[0], x.shape[1], heads, -1).transpose(1, 2)

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        return q @ k.transpose(-1, -2) / self.width**0.5

    def forward(self, x: Tensor) -> Tensor:
        q = self.split(self.q(x), self.heads)
        k, v = self.split(self.k(x), self.kv_heads), self.split(self.v(x), self.kv_heads)
        k = k.repeat_interleave(self.heads // self.kv_heads, dim=1)
        v = v.repeat_interleave(self.heads // self.kv_heads, dim=1)
        y = self.scores(q, k).softmax(-1) @ v
        return self.o(y.transpose(1, 2).flatten(2))


class MultiQuery(Heads):
    """One key/value head for all."""

    def __init__(self) -> None:
        super().__init__(1)


class GroupedQuery(Heads):
    """Two key/value heads, fewer than three ranks."""

    def __init__(self) -> None:
        super().__init__(2)


class SharedNorm(Heads):
    """One norm over the width of a head, inside, and over the same width outside."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(self.width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x.view(ROWS, TOKENS, HEADS, -1)).flatten(2)
        return super().forward(x)

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        return super().scores(self.norm(q), self.norm(k))


class ScaleByHeads(Heads):
    """The number of heads is a factor as well: a local one would be another factor."""

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        return q @ k.transpose(-1, -2) * (1.0 / self.heads)


class Slopes(Heads):
    """ALiBi: slopes from the number of heads, which on a rank's heads would be other slopes."""

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        slopes = 2.0 ** (-8.0 / self.heads * torch.arange(1, self.heads + 1).to(q))
        away = torch.arange(k.shape[-2]).to(q)[None] - torch.arange(q.shape[-2]).to(q)[:, None]
        return super().scores(q, k) + slopes.view(1, -1, 1, 1) * away


class HeadNumbers(Heads):
    """A bias that counts heads: of the right shape on a rank, and of the first heads."""

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        return super().scores(q, k) * torch.arange(q.shape[1]).to(q).view(-1, 1, 1)


class WrittenZeros(Heads):
    """Zeros for each head, one of which is then written."""

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        mask = torch.zeros(self.heads, 1, 1, dtype=q.dtype)
        mask[3:] = 1.0
        return super().scores(q, k) * mask


class WrittenView(Heads):
    """The same, through a view."""

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        mask = torch.zeros(self.heads, 1, 1, dtype=q.dtype)
        mask[-1].fill_(1.0)
        return super().scores(q, k) + mask * q.mean(-1, keepdim=True)


class InPlace(Base):
    """Cut activations changed in place, and a whole one."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.up(x).clone()
        y.mul_(0.5).add_(1)
        y += self.up(x)
        y[:, 0] = 0
        z = x.clone()
        z *= 2
        return self.down(y) + z


class Twice(nn.Module):
    """One Linear called on a whole input and on a cut one."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(WIDTH, WIDTH)
        self.b = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(self.a(x).relu()).relu()) + self.b(x)


class Transposed(Base):
    """A weight read past its forward."""

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x).tanh() + x @ self.up.weight.t())


class Branch(Base):
    """Control flow by values, all of them positive or not."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.up(x)
        return self.down(y if bool((y > -100).all()) else -y)


class Looped(Base):
    """A loop over a cut activation's rows, a sum of each."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.up(x).relu()
        total = sum(row.sum() for row in y)
        return self.down(y) * total


class Features(Base):
    """A loop over features."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.up(x).relu()
        best = [column.amax() for column in y.movedim(-1, 0)]
        return self.down(y) + torch.stack(best).mean()


class Compared(Base):
    """Values read as Python numbers."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.up(x)
        return self.down(y) * (2.0 if torch.equal(y, y.abs()) else 3.0)


class Cached(Base):
    """A tensor kept in an attribute, used by the next module."""

    def __init__(self) -> None:
        super().__init__()
        self.second = Base()

    def forward(self, x: Tensor) -> Tensor:
        self.kept = self.up(x).relu()
        y = self.down(self.kept)
        return y + self.second.down(self.second.up(y) * self.kept)


class Returned(Base):
    """A cut activation is an output as well."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.up(x).relu()
        return self.down(y), y


@dataclasses.dataclass
class Parcel:
    inner: dict[str, Any]
    plain: Tensor


class Inner(Base):
    def forward(self, parcel: Parcel) -> Parcel:
        held = parcel.inner["list"][0][0]
        return Parcel({"list": [(self.up(held).relu(),)], "none": None}, parcel.plain * 2)


class Parcels(nn.Module):
    """Cut activations go between modules in containers."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Inner()

    def forward(self, x: Tensor) -> Tensor:
        out = self.inner(Parcel({"list": [(x,)], "none": None}, x))
        return self.inner.down(out.inner["list"][0][0]) + out.plain


class LaterSlice(nn.Module):
    """Three stacked parts, sliced by numbers that are right on no rank but of the right size."""

    def __init__(self) -> None:
        super().__init__()
        self.all = nn.Linear(WIDTH, 12 + 8 + 8)
        self.down = nn.Linear(12, WIDTH)
        self.small = nn.Linear(8, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y = self.all(x)
        wide, b, c = y[..., :12], y[..., 12:20], y[..., -8:]
        return self.down(wide.relu()) + self.small(b.softmax(-1) * c.softmax(-1))


class PerHead(Heads):
    """A Linear that every head goes through: each rank has the rows of its heads only."""

    def __init__(self) -> None:
        super().__init__()
        self.each = nn.Linear(self.width, self.width)

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        return super().scores(self.each(q), k)


class HeadRange(Heads):
    """Tokens chosen by the number of heads."""

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        first = self.heads % 4  # 2 of 6 heads, 3 of 3, 2 of 2
        return super().scores(q, k) + (q * k[:, :, first : first + 1]).sum(-1, keepdim=True)


class Outer(nn.Module):
    """An outer product of a cut activation with itself, summed along either."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, 12)
        self.down = nn.Linear(12, 4)
        self.last = nn.Linear(4, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y = self.up(x).tanh()
        return self.last(self.down(y[..., None] * y[..., None, :]).sum(-2))


class Bilinear(nn.Module):
    """An outer product of two cut activations: a rank would have a block of it only."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(WIDTH, 12), nn.Linear(WIDTH, 12)
        self.down_b, self.down_a = nn.Linear(12, 8), nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        both = self.a(x).tanh()[..., :, None] * self.b(x).sin()[..., None, :]
        return self.down_a(self.down_b(both).transpose(-1, -2)).flatten(-2)


class TypedGain(Base):
    """A parameter goes through ``type`` before it meets a cut activation."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.randn(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x).relu() * self.gain.type(torch.float64))


class PadShift(Base):
    """A shift along features, written as a pad of no width."""

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.pad(self.up(x).relu(), (1, -1)))


class CopyOver(nn.Module):
    """Rolled values written over another activation."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(WIDTH, 12), nn.Linear(WIDTH, 12)
        self.down = nn.Linear(12, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        kept = self.a(x).relu()
        target = torch.empty_like(kept)
        target[..., torch.arange(11, -1, -1)] = self.b(x)
        return self.down(kept * target)


class WholeWithin(Heads):
    """A gate of the whole width, in one region with the heads."""

    def __init__(self) -> None:
        super().__init__()
        self.temperature = nn.Parameter(torch.rand(HEADS) + 0.5)
        self.bias = nn.Parameter(torch.randn(HEADS, TOKENS, TOKENS))

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        hot = super().scores(q, k) * self.temperature.view(1, HEADS, 1, 1)
        return hot + self.bias + self.bias.mean()


class Frozen(Heads):
    """Whole sizes in views and a fused split, no attribute to change."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        del self.q, self.k, self.v

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).split(24, dim=2)
        q, k, v = (t.view(x.size(0), x.size(1), 6, 4).transpose(1, 2) for t in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o(y.transpose(1, 2).reshape(x.size(0), x.size(1), 24))


MODELS: list[type[nn.Module]] = [
    ConstantBothWays, WholeBothWays, Heads, MultiQuery, GroupedQuery, SharedNorm, ScaleByHeads,
    Slopes, HeadNumbers, WrittenZeros, WrittenView, InPlace, Twice, Transposed, Branch, Looped,
    Features, Compared, Cached, Returned, Parcels, LaterSlice, HeadRange, Outer, Bilinear,
    TypedGain, PadShift, CopyOver, WholeWithin, Frozen, PerHead,
]  # fmt: skip


def loss(output: Any) -> Tensor:
    outs = output if isinstance(output, tuple) else (output,)
    return sum(((out * (1 + torch.arange(out.shape[-1]))) ** 2).sum() for out in outs)  # type: ignore[return-value]


class Wrapped(nn.Module):
    """The module inside another one, so that it may be translated."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Any:
        return self.body(x)


Reference = tuple[Tensor, dict[str, "Tensor | None"]]


def reference(dense: nn.Module, x: Tensor) -> Reference:
    output = dense(x)
    names, parameters = zip(*dense.named_parameters(), strict=True)
    found = torch.autograd.grad(loss(output), parameters, allow_unused=True)
    return main_output(output).detach(), dict(zip(names, found, strict=True))


def departures(group: Group, dense: nn.Module, x: Tensor, expected: Reference) -> list[str]:
    model = tp.parallelize(copy.deepcopy(dense), group)
    output = model(x)
    wrong = []
    mine, theirs = main_output(output), expected[0]
    if mine.shape != theirs.shape or not torch.allclose(mine, theirs, rtol=NEAR, atol=NEAR):
        wrong.append(f"output {mine.shape}")
    loss(output).backward()
    largest = max(float(g.abs().max()) for g in expected[1].values() if g is not None)
    for name, parameter in model.named_parameters():
        gap = gradient_error(parameter, expected[1][name], largest)
        if gap is not None and not gap <= NEAR:
            wrong.append(f"gradient of {name}: {gap:.1g}")
    return wrong


@pytest.mark.parametrize("place, world_size", [("alone", 2), ("inside", 2), ("inside", 3)])
@pytest.mark.parametrize("kind", MODELS, ids=lambda kind: kind.__name__)
def test_parallelized_is_the_dense_model(
    kind: type[nn.Module], place: str, world_size: int
) -> None:
    torch.manual_seed(0)
    dense = kind().double() if place == "alone" else Wrapped(kind()).double()
    x = torch.randn(ROWS, TOKENS, WIDTH, dtype=torch.float64)
    expected = reference(copy.deepcopy(dense), x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for wrong in tp.simulate(departures, world_size, dense, x, expected):
            assert not wrong


def plan_of(model: nn.Module, ranks: int = 2) -> ShardPlan:
    return tp.plan(model.double(), ranks, inputs=torch.zeros(ROWS, TOKENS, WIDTH).double())


@pytest.mark.parametrize("kind", [Heads, MultiQuery, GroupedQuery, Parcels, Frozen, PerHead])
def test_plain_structures_are_cut_in_pairs(kind: type[nn.Module]) -> None:
    styles = {entry.style for entry in plan_of(Wrapped(kind())).entries.values()}
    assert {COLUMN, ROW} <= styles


@pytest.mark.parametrize("kind", [Transposed, Features, Compared, Returned, PadShift])
def test_what_needs_features_whole_is_not_cut_in_pairs(kind: type[nn.Module]) -> None:
    entries = plan_of(kind()).entries
    assert "down" not in entries or entries["down"].style != ROW


def followed(model: nn.Module) -> tuple[Trace, Solution]:
    seen = trace(model.double(), (torch.zeros(ROWS, TOKENS, WIDTH).double(),), {})
    pairs = find_pairs(seen, lambda pair: True)
    return seen, Solution(2, [cut_pair(pair, 2, None) for pair in pairs])


def test_gradients_of_what_meets_a_cut_activation_are_partial() -> None:
    flow = gradients(*followed(TypedGain()))
    assert flow.conflict is None
    assert flow.partial == {"gain"}


def test_gradients_used_both_ways_are_a_conflict() -> None:
    for kind in (ConstantBothWays, WholeBothWays):
        flow = gradients(*followed(kind()))
        assert flow.conflict is not None


def test_gradients_used_both_ways_are_summed_within_a_region() -> None:
    flow = gradients(*followed(ConstantBothWays()), regions=[""])
    assert flow.conflict is None or "used both" in flow.conflict[1]
