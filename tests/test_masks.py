"""Dropout in a dense model's own code: masks of their own where it is cut, alike elsewhere."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from harness import run_ranks
from tp_native.group import Group
from tp_native.parallelize import parallelize
from tp_native.plan import plan
from tp_native.simulate import simulate


def gpt2(**changes: float) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    options = {"attn_pdrop": 0.5, "resid_pdrop": 0.5, "embd_pdrop": 0.5, **changes}
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=40, n_positions=16, n_embd=30, n_head=5, n_layer=2, **options)
    )


class Hidden(nn.Module):
    """An MLP that drops half of its hidden width, and then half of its output."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(6, 64)
        self.b = nn.Linear(64, 6)
        self.hidden: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.hidden = F.dropout(self.a(x) * 0 + 1, 0.5, self.training)
        return F.dropout(self.b(self.hidden), 0.5, self.training)


def rank_of_text(group: Group) -> None:
    model = parallelize(gpt2(), group).train()
    torch.manual_seed(7)
    ids = torch.arange(10).view(2, 5)
    for _ in range(3):
        out = model(ids, labels=ids)
        out.loss.backward()
        digest = torch.stack([torch.rand(()), out.loss.detach()])
        assert torch.equal(group.broadcast_(digest.clone(), 0), digest)


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_that_drop_unlike_numbers_of_heads_stay_in_step(world_size: int) -> None:
    run_ranks(rank_of_text, world_size)


def rank_of_width(group: Group) -> None:
    model = parallelize(Hidden(), group).train()
    torch.manual_seed(7)
    y = model(torch.ones(50, 6))
    assert torch.equal(group.broadcast_(y.detach().clone(), 0), y)
    mine = model.hidden.detach() != 0
    assert 0.4 < mine.double().mean() < 0.6
    both = group.all_gather(mine[:, :21].double().contiguous(), 1)
    assert not torch.equal(both[:, :21], both[:, 21:42])


def test_cut_widths_are_dropped_by_masks_of_their_own() -> None:
    run_ranks(rank_of_width, 3)


def test_only_modules_that_may_drop_are_changed() -> None:
    layers = [f"transformer.h.{i}.attn" for i in range(2)]
    assert set(plan(gpt2(), 2).random) <= {*layers, *(f"{name}.attn_dropout" for name in layers)}
    assert plan(gpt2(), 2).random
    assert not plan(gpt2(attn_pdrop=0.0), 2).random
    assert not plan(gpt2(attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0), 2).random


def rank_of_threads(group: Group, dense: nn.Module) -> None:
    model = parallelize(copy.deepcopy(dense), group)
    model.eval()(torch.arange(10).view(2, 5))
    with pytest.raises(ValueError, match="thread ranks"):
        model.train()(torch.arange(10).view(2, 5))


def test_thread_ranks_are_refused_in_training() -> None:
    simulate(rank_of_threads, 2, gpt2())
