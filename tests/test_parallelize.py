"""A parallelized model is the dense model: outputs, gradients, keys, hooks; and says so if not."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tiny import llama, qwen3, relative, tokens
from tp_native.errors import PlanError
from tp_native.group import Group
from tp_native.guards import guard
from tp_native.nn import VocabParallelEmbedding
from tp_native.optim import clip_grad_norm_
from tp_native.parallelize import DistributedModelWrapper, parallelize
from tp_native.plan import plan
from tp_native.simulate import simulate
from tp_native.state import full_state_dict, state_of
from tp_native.verify import verify

WORLDS = [1, 2, 3, 4]
MODELS: dict[str, Callable[[], Any]] = {
    "llama": llama,
    "llama-tied": lambda: llama(tied=True),
    "llama-five-groups": lambda: llama(
        hidden_size=40, num_attention_heads=10, num_key_value_heads=5
    ),
    "qwen3": qwen3,
    "qwen3-tied": lambda: qwen3(tied=True),
}


def rank_step(group: Group, dense: Any) -> tuple[Tensor, dict[str, float]]:
    """Logits, and the relative error of every gradient against the dense model's."""
    model = parallelize(copy.deepcopy(dense), group)
    out = model(tokens(), labels=tokens())
    out.loss.backward()
    state = state_of(model)
    errors = {}
    whole = dict(dense.named_parameters())
    for name, param in model.named_parameters():
        expected = whole[name].grad
        cut = state.plan.shard(name) if state is not None else None
        scale = expected.abs().max()
        if cut is not None:
            piece = cut.partition.slice(group.rank)
            expected = expected.narrow(cut.dim, piece.start, piece.stop - piece.start)
        if expected.numel():
            errors[name] = float((param.grad - expected).abs().max() / scale)
    return out.logits.detach(), errors


@pytest.mark.parametrize("world_size", WORLDS)
@pytest.mark.parametrize("name", MODELS)
def test_logits_and_gradients_equal_the_dense_model(name: str, world_size: int) -> None:
    dense = MODELS[name]()
    reference = dense(tokens(), labels=tokens())
    reference.loss.backward()
    results = simulate(rank_step, world_size, dense)
    logits = reference.logits.detach()
    for ours, errors in results:
        assert torch.equal(ours, results[0][0])
        if world_size == 1:
            assert torch.equal(ours, logits)
        # fp32 sums in another order, two layers deep
        assert relative(ours, logits) <= 1e-5
        worst = max(errors, key=lambda key: errors[key])
        assert errors[worst] <= 1e-5, worst


def rank_trains(group: Group) -> None:
    """Quietly where all is right, every step compared; told where it is not."""
    model = parallelize(qwen3(), group).train()
    guard(model, every=1)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    for clip in (clip_grad_norm_, clip_grad_norm_, torch.nn.utils.clip_grad_norm_):
        optimizer.zero_grad()
        model(tokens(), labels=tokens()).loss.backward()
        clip(model.parameters(), 0.1)
        if clip is clip_grad_norm_:
            optimizer.step()
    with pytest.raises(ValueError, match=r"q_norm\.weight is one thing on ranks"):
        optimizer.step()
    odd = tokens().clone()
    odd[0, 0] = 2 + group.rank
    with pytest.raises(ValueError, match="labels is one thing on ranks"):
        model(tokens(), labels=odd)


def test_training_is_guarded() -> None:
    simulate(rank_trains, 2)


def test_world_of_one_is_left_alone() -> None:
    model = llama()
    modules = list(model.modules())
    assert parallelize(model) is model
    assert all(a is b for a, b in zip(modules, model.modules(), strict=True))


def rank_structure(group: Group) -> None:
    dense = llama(tied=True)
    dense.train()
    dense.requires_grad_(False)
    dense.model.layers[0].mlp.up_proj.weight.requires_grad_(True)
    keys = list(dense.state_dict())
    seen: list[str] = []
    handle = dense.model.layers[0].mlp.up_proj.register_forward_hook(
        lambda module, args, output: seen.append(type(module).__name__)
    )
    model = parallelize(dense, group)
    assert model is dense
    assert type(model).__name__ == "LlamaForCausalLM"
    assert list(model.state_dict()) == keys
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert len(list(model.parameters())) == len(keys) - 1
    trained = [name for name, param in model.named_parameters() if param.requires_grad]
    assert trained == ["model.layers.0.mlp.up_proj.weight"]
    assert all(module.training for module in model.modules())
    model(tokens())
    assert seen == ["ColumnParallelLinear"]
    handle.remove()
    model(tokens())
    assert len(seen) == 1


def test_structure_flags_ties_and_hooks_survive() -> None:
    simulate(rank_structure, 2)


def rank_meta(group: Group) -> None:
    with torch.device("meta"):
        dense = llama()
    model = parallelize(dense.to(torch.bfloat16), group)
    made = plan(llama(), group.size)
    for name, param in model.named_parameters():
        assert param.device.type == "meta"
        assert param.dtype == torch.bfloat16
        assert tuple(param.shape) == made.local_shape(name, group.rank)


def test_meta_stays_meta() -> None:
    simulate(rank_meta, 3)


def rank_collectives(group: Group) -> None:
    model = parallelize(llama(), group)
    count, _ = plan(llama(), group.size).collectives()
    before = group.stats()["collectives"]
    with torch.inference_mode():
        model(tokens())
    assert group.stats()["collectives"] - before == count == 2 * 2 + 2


def test_a_forward_pass_makes_the_planned_collectives() -> None:
    simulate(rank_collectives, 2)


def rank_full_state(group: Group, dense: Any) -> None:
    model = parallelize(copy.deepcopy(dense), group)
    whole, expected = full_state_dict(model), dense.state_dict()
    assert list(whole) == list(expected)
    for name, value in expected.items():
        assert torch.equal(whole[name], value), name


@pytest.mark.parametrize("world_size", WORLDS)
def test_full_state_dict_is_the_dense_one(world_size: int) -> None:
    simulate(rank_full_state, world_size, llama(tied=True))


def rank_load_state(group: Group) -> None:
    other = llama()
    with torch.no_grad():
        for param in other.parameters():
            param.add_(1)
    model = parallelize(llama(), group)
    model.load_state_dict(other.state_dict())
    whole = full_state_dict(model)
    assert all(torch.equal(whole[name], value) for name, value in other.state_dict().items())
    model.load_state_dict(model.state_dict())


def test_load_state_dict_takes_dense_and_own_states() -> None:
    simulate(rank_load_state, 2)


def rank_wrapper(group: Group) -> None:
    dense = llama()
    keys = list(dense.state_dict())
    model = DistributedModelWrapper(dense, group, world_size=group.size, rank=group.rank)
    assert list(model.state_dict()) == keys
    assert [name for name, _ in model.named_parameters()] == keys
    assert model.config is dense.config
    assert torch.equal(model(tokens()).logits, dense(tokens()).logits)
    model.train()
    assert dense.training
    assert dense.model.layers[0].training
    model.eval()
    assert not dense.training
    model.load_state_dict(llama().state_dict())
    assert model.generate(tokens(), max_new_tokens=2, do_sample=False).shape == (2, 9)
    with pytest.raises(AttributeError):
        model.nothing  # noqa: B018
    assert DistributedModelWrapper(dense, group).wrapped_model is dense
    clone = copy.deepcopy(model)
    assert torch.equal(clone(tokens()).logits, model(tokens()).logits)
    model.double()
    assert dense.lm_head.weight.dtype == torch.float64


@pytest.mark.parametrize("world_size", [1, 2])
def test_wrapper_passes_everything_through(world_size: int) -> None:
    simulate(rank_wrapper, world_size)


def test_wrapper_checks_world_size_and_rank() -> None:
    with pytest.raises(ValueError, match="world_size 4, but the group has world_size 1"):
        DistributedModelWrapper(llama(), world_size=4)
    with pytest.raises(ValueError, match="rank 1, but the group has rank 0"):
        DistributedModelWrapper(llama(), rank=1)


def rank_static_cache(group: Group, expected: Tensor) -> None:
    model = parallelize(llama(), group)
    ours = model.generate(
        tokens(), max_new_tokens=5, do_sample=False, cache_implementation="static"
    )
    assert torch.equal(ours, expected)


def test_transformers_static_cache_takes_local_heads() -> None:
    expected = llama().generate(tokens(), max_new_tokens=5, do_sample=False)
    simulate(rank_static_cache, 3, expected)


def rank_refusals(group: Group) -> None:
    model = parallelize(llama(), group)
    with pytest.raises(PlanError, match="parallelized already"):
        parallelize(model, group)
    with pytest.raises(PlanError, match="for 3 ranks but the group has 2"):
        parallelize(llama(), group, plan=plan(llama(), 3))
    with pytest.raises(PlanError, match="made for another model"):
        parallelize(llama(), group, plan=plan(llama(intermediate_size=8), group.size))
    odd = llama()
    if group.rank == 1:
        with torch.no_grad():
            odd.model.norm.weight[0] = 7
    with pytest.raises(ValueError, match=r"differ between ranks: ranks \[1\]"):
        parallelize(odd, group)


def test_refusals_are_the_same_on_every_rank() -> None:
    simulate(rank_refusals, 2)


def broken() -> nn.Module:
    """Row after row: the second one takes a whole input for its share."""
    model = nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 10), nn.Linear(10, 4))
    return randomized(model)


def randomized(model: nn.Module) -> nn.Module:
    """The same values on every rank, from a generator of its own."""
    generator = torch.Generator().manual_seed(0)
    for param in model.parameters():
        nn.init.normal_(param, generator=generator)
    return model


def rank_verify(group: Group) -> None:
    good = {"0": "colwise", "2": "rowwise"}
    x = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))
    dense = broken()
    model = parallelize(broken(), group, plan=plan(dense, group.size, rules=good), verify=x)
    assert verify(model, dense, x) is None
    with torch.no_grad():
        model[3].bias[0] += 1
    with pytest.raises(PlanError, match=r"^3: output departs from the dense model by"):
        verify(model, dense, x)
    # Column, then one that reads the whole width: a wrong pair that still runs.
    undone = broken()
    first = undone[2]
    wrong = plan(undone, group.size, rules={"2": "colwise", "3": "replicate"})
    with pytest.raises((PlanError, ValueError, RuntimeError)):
        parallelize(undone, group, plan=wrong, verify=x)
    assert undone[2] is first
    assert state_of(undone) is None


def test_verify_names_the_first_module_and_undoes_the_swap() -> None:
    simulate(rank_verify, 2)


def rank_empty_shards(group: Group) -> None:
    """Three hidden columns on four ranks: one rank has none, and still takes part."""
    dense = randomized(
        nn.Sequential(nn.Embedding(3, 4), nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    )
    rules = {"0": "embedding_rowwise", "1": "colwise", "3": "rowwise"}
    made = plan(dense, group.size, rules=rules)
    ids = torch.tensor([[0, 1, 2]])
    expected = dense(ids).detach()
    model = parallelize(dense, group, plan=made)
    assert isinstance(model[0], VocabParallelEmbedding)
    out = model(ids)
    assert relative(out.detach(), expected) <= 1e-6
    out.sum().backward()


def test_more_ranks_than_columns() -> None:
    simulate(rank_empty_shards, 4)
