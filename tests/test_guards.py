"""Ranks in training that are given different data, or change gradients apart, are told; others are
left alone.
"""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import tp_native as tp
from harness import run_ranks
from language_model import BLOCKS, VOCAB, ids, sharded
from oracle import rank_data
from tp_native.group import Group
from tp_native.guards import _shifted, beyond_rounding, differing, fingerprint

WORLDS = [2, 3, 4]
F64 = torch.float64
MASK = (1 << 64) - 1


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Embedding(VOCAB, 12), nn.LayerNorm(12)
        self.up, self.down = nn.Linear(12, 18), nn.Linear(18, 12)
        self.head = nn.Linear(12, VOCAB)

    def forward(
        self, input_ids: Tensor, labels: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """Logits, or the loss; ``input_ids`` may be embedded already."""
        x = input_ids if input_ids.is_floating_point() else self.embed(input_ids)
        logits: Tensor = self.head(x + self.down(F.gelu(self.up(self.norm(x)))))
        if labels is None:
            return logits
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


def guarded(group: Group, dtype: torch.dtype = torch.float32) -> Any:
    dense, draw = Small().to(dtype), torch.Generator().manual_seed(0)
    with torch.no_grad():  # not torch's own generator, which thread ranks share
        for parameter in dense.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=draw) * 0.3)
    rules = {"embed": "embedding_rowwise", "up": "colwise", "down": "rowwise", "head": "replicate"}
    model = tp.parallelize(dense, group, plan=tp.plan(dense, group.size, rules=rules))
    assert isinstance(model.embed, tp.VocabParallelEmbedding) or group.size == 1
    return model


def loss_of(model: Any, batch: Tensor | None = None) -> Tensor:
    batch = ids() if batch is None else batch
    loss: Tensor = model(batch, batch)
    return loss


def other_data(group: Group) -> str:
    model = guarded(group)
    batch = ids()
    loss_of(model, batch).backward()
    odd = batch.clone()
    if group.rank == 1:
        odd[0, :2] = odd[0, :2].flip(0) if odd[0, 0] != odd[0, 1] else 3
    with pytest.raises(ValueError, match="Small was called in training") as told:
        model(batch, labels=odd)
    model(batch, labels=batch)  # the group goes on
    return str(told.value)


@pytest.mark.parametrize("world_size", WORLDS)
def test_different_data_is_told_on_all_ranks(world_size: int) -> None:
    found = run_ranks(other_data, world_size)
    others = [0, *range(2, world_size)]
    assert f"labels is one thing on ranks {others} and another on ranks [1]" in found[0]
    assert "input_ids" not in found[0] and "sampler" in found[0]
    assert found == [found[0]] * world_size


def other_arguments(group: Group) -> str:
    model = guarded(group)
    given = {"mask": torch.ones_like(ids())} if group.rank else {}
    with pytest.raises(ValueError, match=r"names, dtypes or shapes \(here input_ids torch\.int64"):
        model(ids(), **given)
    batch = ids()[:, group.rank :]
    with pytest.raises(ValueError, match="names, dtypes or shapes") as told:
        model(batch)
    return str(told.value)


def test_other_shapes_and_names_are_told() -> None:
    one, other = run_ranks(other_arguments, 2)
    assert "[2, 8])" in one and "[2, 7])" in other


def clipped_apart(group: Group, dtype: torch.dtype, kind: str) -> str:
    model = guarded(group, dtype)
    make: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
        "sgd": lambda ps: torch.optim.SGD(ps, 1.0),
        "adamw": lambda ps: torch.optim.AdamW(ps, 1.0),
        "fused": lambda ps: torch.optim.Adam(ps, 1.0, fused=True),
    }
    optimizer = make[kind](model.parameters())
    loss_of(model).backward()
    start = [p.detach().clone() for p in model.parameters()]
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    with pytest.raises(ValueError, match="gradients that are not equal on all ranks") as told:
        optimizer.step()
    assert all(torch.equal(*pair) for pair in zip(start, model.parameters(), strict=True))
    optimizer.zero_grad()
    loss_of(model).backward()
    tp.clip_grad_norm_(model.parameters(), 1e-3)
    optimizer.step()
    return str(told.value)


@pytest.mark.parametrize("world_size", WORLDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, F64])
def test_torchs_clipping_is_told_before_the_update(world_size: int, dtype: torch.dtype) -> None:
    found = run_ranks(clipped_apart, world_size, dtype, "sgd")
    assert "norm.weight" in found[0] and "up.weight" not in found[0]
    assert "tp.clip_grad_norm_" in found[0] and "and 2 more" in found[0]
    assert found == [found[0]] * world_size


@pytest.mark.parametrize("kind", ["adamw", "fused"])
def test_whatever_the_optimizer(kind: str) -> None:
    run_ranks(clipped_apart, 2, torch.float32, kind)


def loses_one_gradient(group: Group) -> str:
    model = guarded(group)
    optimizer = torch.optim.SGD(model.parameters(), 1.0)
    loss_of(model).backward()
    if group.rank == group.size - 1:
        model.norm.weight.grad = None
    with pytest.raises(ValueError, match="not equal on all ranks") as told:
        optimizer.step()
    return str(told.value)


def test_a_gradient_that_one_rank_lacks_is_told() -> None:
    for text in run_ranks(loses_one_gradient, 3):
        assert "norm.weight is one thing on ranks [0, 1] and another on ranks [2]" in text
        assert "norm.bias" not in text


def forgives_rounding(group: Group) -> None:
    """A kernel that adds in no fixed order is no error; one digit in the middle is."""
    model = guarded(group)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    weight = model.norm.weight
    for noise, is_told in ((1e-6, False), (1e-2, True)):
        optimizer.zero_grad()
        loss_of(model).backward()
        generator = torch.Generator().manual_seed(group.rank)
        weight.grad *= 1 + noise * torch.randn(weight.shape, generator=generator)
        if is_told:
            with pytest.raises(ValueError, match=r"whole: norm\.weight is one"):
                optimizer.step()
        else:
            optimizer.step()


def sees_small_factors(group: Group) -> None:
    """A factor on all gradients, below what rounding may do to one of them."""
    for dtype, factor in ((torch.float32, 1e-4), (torch.bfloat16, 5e-3), (F64, 1e-9)):
        grads = {f"p{i}": rank_data((400,), dtype, 0, i) for i in range(3)}
        for sign in (1, -1):
            ours = {name: grad * (1 + sign * factor * group.rank) for name, grad in grads.items()}
            found = differing(group, [*ours.items()])
            ranks = [[rank] for rank in range(group.size)]
            assert found == dict.fromkeys(grads, ranks)
            assert beyond_rounding(group, ours, found) == found
            assert beyond_rounding(group, grads, found) == {}


def test_a_factor_in_common_is_no_rounding() -> None:
    run_ranks(sees_small_factors, 2)
    run_ranks(sees_small_factors, 3)


def test_rounding_is_no_difference() -> None:
    run_ranks(forgives_rounding, 2)


def collectives(group: Group, run: Callable[[], Any]) -> int:
    before = group.stats()["collectives"]
    run()
    count: int = group.stats()["collectives"] - before
    return count


def train_step(model: Any, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    loss_of(model).backward()
    tp.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()


def is_sparing(group: Group) -> None:
    """One all-gather before, one after, on the first three steps and every fifth; else nothing."""
    model = guarded(group)
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    handle = tp.guard(model, every=5, first=3)
    counts = [collectives(group, lambda: train_step(model, optimizer)) for _ in range(12)]
    plain = min(counts)
    assert [count - plain for count in counts] == [2, 2, 2, 0, 0, 2, 0, 0, 0, 0, 2, 0]
    handle.remove()
    handle.remove()
    assert not model._forward_pre_hooks and not model._forward_pre_hooks_with_kwargs
    for _ in range(4):
        assert collectives(group, lambda: train_step(model, optimizer)) == plain
    with tp.guard(model, every=1):
        assert collectives(group, lambda: train_step(model, optimizer)) == plain + 2
    assert collectives(group, lambda: train_step(model, optimizer)) == plain


@pytest.mark.parametrize("world_size", WORLDS)
def test_it_compares_now_and_then(world_size: int) -> None:
    run_ranks(is_sparing, world_size)


def costs_nothing_else(group: Group) -> None:
    model = guarded(group)
    tp.guard(model, every=1).remove()

    def runs() -> list[int]:
        counts = []
        for training, grad in ((False, True), (True, False), (False, False)):
            model.train(training)
            with torch.set_grad_enabled(grad):
                counts.append(collectives(group, lambda: model(ids())))
        return counts

    without = runs()
    tp.guard(model, every=1)
    assert runs() == without
    if group.rank == 0:  # nor is anything compared there
        model.eval()
    odd = ids()
    odd[0, 0] = 2 + group.rank
    with torch.no_grad():
        model.train()
        model(odd)


def test_inference_is_left_alone() -> None:
    run_ranks(costs_nothing_else, 2)


def trains_quietly(group: Group, name: str, sequence_parallel: bool) -> None:
    """Every kind of parameter, every step compared; accumulation, two optimizers, a scaler."""
    model = sharded(name, group, sequence_parallel)
    norms = [p for n, p in model.named_parameters() if "norm" in n]
    rest = [p for n, p in model.named_parameters() if "norm" not in n]
    optimizers = [torch.optim.AdamW(rest, 0.01), torch.optim.SGD(norms, 0.01)]
    scaler = tp.GradScaler("cpu", group=group)
    compared = 0
    with tp.guard(model, every=1), tp.guard(model.block, every=1):
        for step in range(3):
            for micro in range(2):
                scaler.scale(model(ids(2 * step + micro))).backward()
            scaler.unscale_(optimizers[0])
            scaler.unscale_(optimizers[1])
            tp.clip_grad_norm_(model.parameters(), 0.5)
            for optimizer in optimizers:
                compared += collectives(group, lambda o=optimizer: scaler.step(o))  # type: ignore[misc]
            scaler.update()
            for optimizer in optimizers:
                optimizer.zero_grad()
    expected = 3 * (2 + (2 if BLOCKS[name].get("bias") else 0)) if group.size > 1 else 0
    assert compared == expected  # both guards see the norms' optimizer, the other has biases


@pytest.mark.parametrize("world_size", [1, *WORLDS])
@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize("name", BLOCKS)
def test_there_is_no_false_alarm(world_size: int, sequence_parallel: bool, name: str) -> None:
    run_ranks(trains_quietly, world_size, name, sequence_parallel)


def takes_parts(group: Group) -> None:
    row = tp.RowParallelLinear(4 * group.size, 3, group=group)
    column = tp.ColumnParallelLinear(4, 3 * group.size, group=group, sequence_parallel=True)
    mine = torch.full((2, 4), float(group.rank))
    for model in (row, nn.Sequential(row), column):
        with tp.guard(model):
            model(mine)
    plain = tp.ColumnParallelLinear(4, 3 * group.size, group=group)
    with tp.guard(plain, inputs=False):
        plain(mine)
    with tp.guard(plain), pytest.raises(ValueError, match="x is one thing on ranks"):
        plain(mine)
    embedding = tp.VocabParallelEmbedding(8, 4, group=group, sequence_parallel=True)
    with tp.guard(embedding), pytest.raises(ValueError, match="ids is one thing on ranks"):
        embedding(torch.full((2, 2 * group.size), group.rank))
    with pytest.raises(ValueError, match="every=0, first=3; expected at least 1 and 0"):
        tp.guard(plain, every=0)


def test_inputs_that_are_parts_are_not_compared() -> None:
    run_ranks(takes_parts, 2)


class Nested(nn.Module):
    def __init__(self, group: Group) -> None:
        super().__init__()
        self.layer = tp.ColumnParallelLinear(3, 4, group=group)

    def forward(self, first: Tensor, *more: Any, extra: Any = None) -> Tensor:
        y: Tensor = self.layer(first)
        return y


def names_nested(group: Group) -> None:
    model, x = Nested(group), torch.ones(1, 3)
    odd = torch.full((2,), group.rank)
    with tp.guard(model, every=1):
        for args, kwargs, name in (
            ((x, 3, odd), {}, r"argument 2 is"),
            ((x, [x, (odd,)]), {}, r"argument 1\[1\]\[0\] is"),
            ((x,), {"extra": {"b": odd, "c": None}}, r"extra\['b'\] is"),
            ((x,), {"extra": odd > 0}, r"extra is"),
        ):
            with pytest.raises(ValueError, match=f"ranks: {name} one thing"):
                model(*args, **kwargs)
        model(x, "text", torch.empty(0, 3), extra=torch.empty(2, 2, device="meta"))


def test_arguments_are_named() -> None:
    run_ranks(names_nested, 2)


def survives_copies(group: Group) -> None:
    model = guarded(group)
    twin = copy.deepcopy(model)
    assert list(twin.state_dict()) == list(Small().state_dict())
    odd = ids()
    odd[0, 0] = 2 + group.rank
    for each in (model, twin):
        with pytest.raises(ValueError, match="input_ids is one thing"):
            each(odd)
    tp.guard(model).remove()
    model(odd)
    with pytest.raises(ValueError, match="input_ids is one thing"):
        twin(odd)
    optimizer = torch.optim.SGD(twin.parameters(), 1.0)
    loss_of(twin).backward()
    torch.nn.utils.clip_grad_norm_(twin.parameters(), 1e-3)
    with pytest.raises(ValueError, match="gradients that are not equal"):
        optimizer.step()
    with pytest.raises(TypeError, match=r"cannot be pickled.*save state_dict\(\) instead"):
        pickle.dumps(twin)


def test_copies_have_guards_of_their_own() -> None:
    run_ranks(survives_copies, 2)
    tp.simulate(survives_copies, 2)  # thread ranks share torch's hooks


def keeps_nothing(group: Group) -> None:
    model = guarded(group)
    optimizer = torch.optim.SGD(model.parameters(), 1.0)
    train_step(model, optimizer)
    seen = weakref.ref(model), weakref.ref(tp.guard(model))
    del model
    optimizer.zero_grad()
    optimizer.param_groups.clear()
    gc.collect()
    assert seen[0]() is None and seen[1]() is None
    assert collectives(group, optimizer.step) == 0


def test_a_guard_goes_with_its_model() -> None:
    run_ranks(keeps_nothing, 2)


def compiles(group: Group, backend: str) -> None:
    torch._dynamo.reset()
    model = guarded(group)
    assert model._forward_pre_hooks
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    x = torch.ones(1, 3, 12)
    for _ in range(2):
        optimizer.zero_grad()
        y = compiled(x)
        y.square().sum().backward()
        optimizer.step()
        assert y.shape == (1, 3, VOCAB)
    compiled(x + group.rank)  # not compared in compiled code ...
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    with pytest.raises(ValueError, match="gradients that are not equal"):
        optimizer.step()  # ... but steps are
    with pytest.raises(ValueError, match="input_ids is one thing"):
        model(x + group.rank)  # as it is: eager


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_models_stay_whole_graphs(backend: str) -> None:
    run_ranks(compiles, 2, backend)


def recomputes(group: Group, use_reentrant: bool) -> None:
    model = guarded(group)
    hidden = torch.ones(1, 3, 12, requires_grad=True)
    for _ in range(4):
        checkpoint(model, hidden, use_reentrant=use_reentrant).sum().backward()
    odd = torch.full_like(hidden, group.rank).requires_grad_()
    tp.guard(model)
    with pytest.raises(ValueError, match="input_ids is one thing"):
        checkpoint(model, odd, use_reentrant=use_reentrant).sum().backward()


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointed_models_are_compared_too(use_reentrant: bool) -> None:
    run_ranks(recomputes, 2, use_reentrant)


def through_the_wrapper(group: Group) -> None:
    model = tp.DistributedModelWrapper(guarded(group), group)
    odd = ids()
    odd[0, 0] = 2 + group.rank
    with pytest.raises(ValueError, match="input_ids is one thing"):
        model(odd)
    tp.guard(model).remove()
    model(odd)


def test_the_wrapper_is_guarded() -> None:
    run_ranks(through_the_wrapper, 2)


def alone(group: Group) -> None:
    model = guarded(group)
    assert not model._forward_pre_hooks
    with tp.guard(model):
        assert not model._forward_pre_hooks
    pickle.dumps(model.state_dict())


def test_a_world_of_one_has_none() -> None:
    run_ranks(alone, 1)


def mixed(values: list[int]) -> int:
    """What `fingerprint` says, in integers."""
    total = 0
    for place, word in enumerate(values, 1):
        x = (word + place * 0x9E3779B97F4A7C15) & MASK
        x = ((x ^ x >> 30) * 0xBF58476D1CE4E5B9) & MASK
        x = ((x ^ x >> 27) * 0x94D049BB133111EB) & MASK
        total += x ^ x >> 31
    total &= MASK
    return total - (1 << 64) if total >> 63 else total


def test_fingerprints_are_of_bytes_in_order() -> None:
    words = [0, 1, -1, 2**62, -(2**63), 77]
    assert int(fingerprint(torch.tensor(words))) == mixed([w & MASK for w in words])
    assert int(_shifted(torch.tensor(-1), 30)) == (1 << 34) - 1
    x = torch.randn(5, 7, 3)
    assert fingerprint(x) == fingerprint(x.clone())
    assert fingerprint(x[1:, :, 1]) == fingerprint(x[1:, :, 1].contiguous())
    assert fingerprint(x[1:]) == fingerprint(x[1:].clone())
    assert fingerprint(x) != fingerprint(x.flip(0))
    assert fingerprint(x) != fingerprint(-x)
    for dtype in (torch.bool, torch.uint8, torch.int16, torch.bfloat16, F64, torch.complex64):
        a = torch.arange(11).to(dtype)
        b = a.clone()
        b[[3, 0]] = a[[0, 3]]
        assert fingerprint(a) == fingerprint(a.clone()) != fingerprint(b), dtype
    assert fingerprint(torch.tensor(2.0)) == fingerprint(torch.tensor([2.0]))
    assert fingerprint(torch.empty(0)) == 0


def test_swapped_powers_of_two_are_seen() -> None:
    """Values whose bits end in zeros, at distances that are powers of two, cancel in plain sums."""
    one = torch.zeros(4096, dtype=F64)
    seen = set()
    for place in range(0, 4096, 64):
        x = one.clone()
        x[place] = 1.0
        seen.add(int(fingerprint(x)))
    assert len(seen) == 64


def test_long_tensors_are_hashed_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(1001)
    whole = fingerprint(x)
    monkeypatch.setattr("tp_native.guards._CHUNK", 7)
    assert fingerprint(x) == whole
