"""Modules whose code has whole sizes in it run on pieces as the dense ones do, or say why not."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tp_native.errors import TensorParallelError
from tp_native.group import Group
from tp_native.parallelize import parallelize
from tp_native.plan import plan
from tp_native.simulate import simulate

WIDTH, HEADS = 20, 5


class Attention(nn.Module):
    """Sizes of the whole everywhere; keys and values may be kept from call to call."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH, dtype=torch.float64)
        self.out = nn.Linear(WIDTH, WIDTH, dtype=torch.float64)
        self.gain = nn.Parameter(torch.linspace(0.5, 1.5, HEADS, dtype=torch.float64))
        self.kept: tuple[Tensor, Tensor] | None = None
        self.keeps = self.sorts = False

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.shape
        q, k, v = self.qkv(x).split(WIDTH, dim=2)
        shape = (B, T, HEADS, C // HEADS)
        q, k, v = (t.view(*shape).transpose(1, 2) for t in (q, k, v))
        q = q * self.gain.view(HEADS, 1, 1)
        if self.keeps:
            if self.kept is not None:
                k, v = (
                    torch.cat([old, new], 2) for old, new in zip(self.kept, (k, v), strict=True)
                )
            self.kept = (k, v)
        if self.sorts:
            k = k.sort(dim=1).values
        assert q.shape == (B, HEADS, T, C // HEADS)
        assert q.size(1) == HEADS
        y = F.scaled_dot_product_attention(q, k, v)
        done: Tensor = self.out(y.transpose(1, 2).contiguous().view(B, T, C))
        return done


def attention() -> Attention:
    module = Attention()
    generator = torch.Generator().manual_seed(0)
    for name, parameter in module.named_parameters():
        if name != "gain":
            nn.init.normal_(parameter, std=0.3, generator=generator)
    return module


def drawn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def text(model: Attention) -> list[Tensor]:
    """A prompt, and two steps on what was kept of it."""
    model.keeps = True
    with torch.no_grad():
        return [model(drawn(2, tokens, WIDTH)) for tokens in (4, 1, 1)]


def trained(model: Attention) -> list[Tensor]:
    y = model(drawn(2, 4, WIDTH))
    y.square().sum().backward()
    assert model.gain.grad is not None and model.out.bias is not None
    assert model.out.bias.grad is not None
    return [y.detach(), model.gain.grad, model.out.bias.grad]


def recomputed(model: Attention) -> list[Tensor]:
    x = drawn(2, 4, WIDTH).requires_grad_()
    checkpoint(model, x, use_reentrant=False).square().sum().backward()
    assert x.grad is not None and model.gain.grad is not None
    return [x.grad, model.gain.grad]


USES: dict[str, Callable[[Attention], list[Tensor]]] = {
    "text": text,
    "trained": trained,
    "recomputed": recomputed,
    "nobody": lambda model: [model(drawn(0, 4, WIDTH)).detach()],
    "no tokens": lambda model: [model(drawn(2, 0, WIDTH)).detach()],
    "many": lambda model: [model(drawn(2, t, WIDTH)).detach() for t in (1, 2, 3, 2, 1)],
    "copied": lambda model: [copy.deepcopy(model)(drawn(2, 4, WIDTH)).detach()],
    "compiled": lambda model: [torch.compile(model, backend="eager")(drawn(2, 4, WIDTH)).detach()],
}


def rank_uses(group: Group, dense: Attention, name: str) -> list[Tensor]:
    model = parallelize(copy.deepcopy(dense), group)
    assert isinstance(model, Attention)
    return USES[name](model)


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("name", USES)
def test_pieces_do_what_the_whole_does(name: str, world_size: int) -> None:
    dense = attention()
    assert list(plan(dense, world_size).translated) == [""]
    results = simulate(rank_uses, world_size, dense, name)
    expected = USES[name](copy.deepcopy(dense))
    for ours in results:
        for mine, theirs in zip(ours, expected, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-12)


def rank_sorts(group: Group, dense: Attention) -> None:
    model = parallelize(copy.deepcopy(dense), group)
    assert isinstance(model, Attention)
    model.sorts = True  # over heads: not what the plan was made with
    with pytest.raises(TensorParallelError, match=r"sort can't run on a part.*colwise_gather"):
        model(drawn(2, 4, WIDTH))
    model.sorts = False
    model(drawn(2, 4, WIDTH))


def test_what_needs_all_heads_is_told() -> None:
    simulate(rank_sorts, 2, attention())
