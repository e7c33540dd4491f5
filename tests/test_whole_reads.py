"""Code that reads a cut layer's weight gets the whole one, and the dense gradients."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tp_native.group import Group
from tp_native.nn import full_of, mark_of
from tp_native.parallelize import parallelize
from tp_native.plan import plan
from tp_native.simulate import simulate
from tp_native.state import full_state_dict

Read = Callable[[Tensor, Tensor], Tensor]


class Tied(nn.Module):
    """An embedding whose table is the head as well, without a module of its own for it."""

    def __init__(self, read: Read) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.table = nn.Embedding(11, 6, dtype=torch.float64)
        nn.init.normal_(self.table.weight, generator=generator)
        self.read = read

    def forward(self, ids: Tensor) -> Tensor:
        assert self.table.weight.shape == (11, 6)
        assert self.table.weight.dtype == torch.float64
        assert len(self.table.weight) == self.table.weight.size(0) == 11
        return self.read(self.table(ids), self.table.weight)


READS: dict[str, Read] = {
    "linear": lambda x, w: F.linear(x, w),
    "linear with a bias": lambda x, w: F.linear(x, w, torch.ones(11).double()),
    "transposed": lambda x, w: x @ w.t(),
    "T": lambda x, w: torch.matmul(x, w.T),
    "turned twice": lambda x, w: F.linear(x, w.t().transpose(0, 1)),
    "einsum": lambda x, w: torch.einsum("bd,vd->bv", x.flatten(0, -2), w),
    "norm": lambda x, w: x / w.norm(),
    "rows": lambda x, w: x + w[3],
    "twice": lambda x, w: F.linear(x, w) * (w * w).sum(),
}


def rank_reads(group: Group, dense: Tied, ids: Tensor) -> tuple[Tensor, Tensor]:
    model = parallelize(copy.deepcopy(dense), group)
    table = model.get_submodule("table")
    local = table.get_parameter("weight")
    assert mark_of(local) is not None
    y = model(ids)
    y.square().sum().backward()
    assert isinstance(model.get_parameter("table.weight"), nn.Parameter)
    assert local.shape[0] < 11
    assert local.grad is not None
    assert list(model.state_dict()) == ["table.weight"]
    assert torch.equal(full_state_dict(model)["table.weight"], dense.table.weight)
    stand_in = nn.Parameter(local.grad)
    stand_in.__dict__.update(local.__dict__)
    return y.detach(), full_of(stand_in)


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("name", READS)
def test_what_is_read_is_the_whole_weight(name: str, world_size: int) -> None:
    dense = Tied(READS[name])
    ids = torch.tensor([0, 3, 10, 3])
    expected = dense(ids)
    expected.square().sum().backward()
    assert plan(dense, world_size).read_whole == ("table",)
    for y, gradient in simulate(rank_reads, world_size, dense, ids):
        torch.testing.assert_close(y, expected, rtol=0, atol=1e-12)
        torch.testing.assert_close(gradient, dense.table.weight.grad, rtol=1e-13, atol=1e-12)
