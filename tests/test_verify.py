"""verify: right models pass; every planted wrong plan and every damage is refused on all ranks, by
the name of the module that departs; a refusal leaves no trace.
"""

from __future__ import annotations

import copy
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import BatchEncoding

import families
import plants
import tp_native as tp
from families import Case
from harness import run_ranks
from tiny import llama, tokens
from tp_native.config import TensorParallelConfig
from tp_native.errors import PlanError
from tp_native.group import Group
from tp_native.partition import ShardLayout
from tp_native.plan import ShardPlan
from tp_native.verify import record

REGISTRY = families.load()
BAR = [name for name, family in REGISTRY.items() if family.kind == "bar"]
PLANTED = [
    "llama",
    "qwen3",
    "gpt2",
    "nanogpt",
    "bert",
    "vit",
    "t5",
    "transformer-encoder",
    "sequential-deep",
    "sequential-nested",
]
# what is planted in is first verified as it is; these have other precisions besides
QUICK = ["gemma", "gpt2", "transformer-encoder-masked", "transformer-encoder-eval", "vit"]
SOAK_SEEDS = 12


@pytest.fixture(autouse=True)
def one_thread_a_rank_and_no_long_wait(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(TensorParallelConfig, "timeout_s", 20.0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# -- what is wrong is refused


def state_of(model: nn.Module) -> dict[str, Any]:
    """Everything that a refusal must leave as it was."""
    found: dict[str, Any] = {}
    for name, module in model.named_modules():
        plain = {k: v for k, v in module.__dict__.items() if not k.startswith("_")}
        hooks = {k: list(v) for k, v in module.__dict__.items() if "hooks" in k and v}
        tables = [list(module._modules.values()), [*module._parameters.values()]]
        found[name] = (id(module), type(module), plain, hooks, [list(map(id, t)) for t in tables])
        for local, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                found[f"{name}.{local}"] = (tensor._version, tensor.dtype, tensor.requires_grad)
    return found


def named_by(message: str, names: tuple[str, ...]) -> bool:
    return any(message.startswith(f"{name}: ") for name in names)


def rank_refuses_plans(
    group: Group, case: Case, plan: ShardPlan, wrong: list[plants.WrongPlan]
) -> list[str]:
    """The messages; the same model is offered to every plan, and takes the right one at last."""
    model, told = copy.deepcopy(case.model), []
    before, random_state = state_of(model), torch.get_rng_state()
    for planted in wrong:
        try:
            tp.parallelize(model, group, plan=planted.plan, verify=(case.inputs,))
        except PlanError as error:
            told.append(str(error))
        else:
            raise AssertionError(f"{planted.kind} was not seen: {planted.names}")
        assert state_of(model) == before, planted.kind
    for name, tensor in case.model.state_dict().items():
        assert not isinstance(tensor, Tensor) or torch.equal(model.state_dict()[name], tensor), name
    assert torch.equal(torch.get_rng_state(), random_state)
    tp.parallelize(model, group, plan=plan, verify=(case.inputs,))
    return told


def rank_sees_damage(
    group: Group, case: Case, plan: ShardPlan, planted: list[plants.Damage]
) -> list[str]:
    """The messages; one parallelized model is damaged and mended in turn."""
    model, told = tp.parallelize(copy.deepcopy(case.model), group, plan=plan), []
    before = state_of(model)
    for damage in planted:
        with plants.damaged(model, damage, group.rank, group.size):
            try:
                tp.verify(model, case.model, case.inputs)
            except PlanError as error:
                told.append(str(error))
            else:
                raise AssertionError(f"{damage.kind} of {damage.name} was not seen")
    after = state_of(model)
    assert after.keys() == before.keys()
    tp.verify(model, case.model, case.inputs)
    return told


def plant_all(name: str, world_size: int, seed: int, dtype: torch.dtype) -> Counter[str]:
    """Plant one error of each kind; the number of those that were refused by the right name."""
    case = families.build(name, seed)
    cast(case, dtype)
    plan = tp.plan(case.model, world_size)
    rng = random.Random(f"{name}/{world_size}/{seed}")
    wrong = list(plants.wrong_plans(case.model, plan, rng))
    order = list(record(case.model, case.inputs).calls)
    harm = list(plants.damages(plan, order, rng))
    results = tp.simulate(rank_refuses_plans, world_size, case, plan, wrong)
    damaged = tp.simulate(rank_sees_damage, world_size, case, plan, harm)
    assert all(told == results[0] for told in results)
    assert all(told == damaged[0] for told in damaged)
    for planted, message in zip(wrong, results[0], strict=True):
        print(f"{name}/{world_size}/{seed} {planted.kind}: {message}")
        assert named_by(message, planted.names), (planted.kind, planted.names, message)
    for damage, message in zip(harm, damaged[0], strict=True):
        print(f"{name}/{world_size}/{seed} {damage.kind}: {message}")
        assert named_by(message, (damage.name,)), (damage.kind, damage.name, message)
    return Counter([planted.kind for planted in wrong] + [damage.kind for damage in harm])


@pytest.mark.parametrize(("name", "seed"), [(n, i) for i, n in enumerate(PLANTED)])
def test_what_is_planted_is_refused_by_name(name: str, seed: int) -> None:
    found = plant_all(name, 2 + seed % 2, seed, torch.float32)
    print(f"{found.total()} planted and refused: {dict(found)}")
    assert found.total() >= 6


@pytest.mark.soak
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("world_size", [2, 3, 4])
@pytest.mark.parametrize("name", PLANTED)
def test_what_is_planted_is_refused_from_many_seeds(
    name: str, world_size: int, dtype: torch.dtype
) -> None:
    found: Counter[str] = Counter()
    for seed in range(SOAK_SEEDS):
        found += plant_all(name, world_size, seed, dtype)
    print(f"{found.total()} planted and refused: {dict(found)}")


def rank_refuses(group: Group, plan: ShardPlan) -> str:
    with pytest.raises(PlanError) as caught:
        tp.parallelize(llama(), group, plan=plan, verify=tokens())
    return str(caught.value)


def test_query_heads_apart_from_their_key_value_heads_are_refused() -> None:
    """Every shape fits: 8 queries of 8 features in 4 groups, whose order alone is wrong."""
    plan = tp.plan(llama(), 2)
    q, o = (f"model.layers.1.self_attn.{word}_proj" for word in "qo")
    k = "model.layers.1.self_attn.k_proj"
    torn = ShardLayout(64, (((0, 16), (32, 48)), ((16, 32), (48, 64))))
    turned = ShardLayout(32, (((16, 32),), ((0, 16),)))
    for changes in (
        {q: torn, o: torn},
        {q: torn},
        {k: turned},
        {o: torn},
    ):
        edited = {name: plants.recut(plan.entries[name], cut) for name, cut in changes.items()}
        wrong = plants.with_entries(plan, edited)
        told = tp.simulate(rank_refuses, 2, wrong)
        assert told[0] == told[1]
        assert told[0].startswith(f"{o}: input departs from the dense model by"), told
        assert f"before it {q} (32/32 of 64)" in told[0]


# -- what is right passes


def cast(case: Case, dtype: torch.dtype) -> None:
    case.model.to(dtype)
    for key, value in case.inputs.items():
        if isinstance(value, Tensor) and value.is_floating_point():
            case.inputs[key] = value.to(dtype)


def rank_passes(group: Group, case: Case, plan: ShardPlan) -> None:
    model = tp.parallelize(copy.deepcopy(case.model), group, plan=plan, verify=(case.inputs,))
    tp.verify(model, case.model, case.inputs)


def pass_all(name: str, world_size: int, seed: int) -> None:
    plan = tp.plan(families.build(name, seed).model, world_size)
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        case = families.build(name, seed)
        cast(case, dtype)
        tp.simulate(rank_passes, world_size, case, plan)


@pytest.mark.parametrize(("name", "seed"), [(n, i) for i, n in enumerate(QUICK)])
def test_right_plans_pass_in_every_precision(name: str, seed: int) -> None:
    pass_all(name, 2 + seed % 2, seed)


@pytest.mark.soak
@pytest.mark.parametrize("world_size", [2, 3, 4])
@pytest.mark.parametrize("name", BAR)
def test_right_plans_pass_from_many_seeds(name: str, world_size: int) -> None:
    for seed in range(SOAK_SEEDS):
        pass_all(name, world_size, seed)


# -- what verify touches and what it looks at


@dataclass
class Both:
    """An output that is a dataclass with a tuple in it."""

    hidden: Tensor
    more: tuple[Tensor, dict[str, Tensor]]


class Untidy(nn.Module):
    """Changes its input, counts its calls, draws random numbers, returns nested outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 10), nn.Linear(10, 6)
        self.drop = nn.Dropout(0.5)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor, scale: Tensor, *, shift: Tensor | None = None) -> Both:
        x.mul_(scale)
        self.calls.add_(1)
        noise = F.dropout(torch.ones_like(x), 0.5, training=True)
        y = self.drop(self.down(self.up(x).relu())) + noise
        y = y if shift is None else y + shift
        return Both(y, (y.sum(-1), {"calls": self.calls.clone(), "up": self.up(x).sum()}))


def untidy() -> Untidy:
    model = Untidy().train()
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=draw))
    model.up.eval()
    return model


def rank_leaves_no_trace(group: Group) -> None:
    rules = {"up": "colwise_gather_output", "down": "rowwise_split_input"}
    draw = torch.Generator().manual_seed(4)
    x, scale = torch.randn(3, 6, generator=draw), torch.tensor(1.5)
    shift = torch.randn(6, generator=draw)
    kept = x.clone()
    dense, model = untidy(), untidy()
    plan = tp.plan(model, group.size, rules=rules)
    group.barrier()
    random_state = torch.get_rng_state()
    group.barrier()
    tp.parallelize(model, group, plan=plan, verify=(x, scale, {"shift": shift}))
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    wrapped = tp.DistributedModelWrapper(model, group)
    tp.verify(wrapped, dense, x, scale, {"shift": shift})
    tp.verify(
        model, tp.DistributedModelWrapper(dense, None) if group.size == 1 else dense, x, scale
    )
    group.barrier()
    assert torch.equal(torch.get_rng_state(), random_state)
    assert torch.equal(x, kept)
    for each in (dense, model):
        assert each.calls == 0
        assert (each.training, each.up.training, each.down.training) == (True, False, True)
        assert all(p.grad is None and p.requires_grad for p in each.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in dense.modules())
    assert hooks == [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    assert torch.is_grad_enabled()
    handle = model.register_forward_hook(lambda m, args, out: later_output_wrong(out))
    if group.size > 1:
        with pytest.raises(PlanError, match=r"Untidy: output more\.1\.up departs"):
            tp.verify(model, dense, x, scale)
    handle.remove()


def later_output_wrong(out: Both) -> Both:
    return Both(out.hidden, (out.more[0], {**out.more[1], "up": out.more[1]["up"] + 1}))


@pytest.mark.parametrize("world_size", [1, 2])
def test_verify_leaves_no_trace_and_compares_every_tensor(world_size: int) -> None:
    run_ranks(rank_leaves_no_trace, world_size)  # threads would share the random state


def test_a_world_of_one_is_compared_with_its_dense_twin() -> None:
    batch = BatchEncoding({"input_ids": tokens()})
    tp.verify(llama(), llama(), batch)
    other = llama()
    with torch.no_grad():
        other.model.norm.weight[3] += 1
    with pytest.raises(PlanError, match=r"^model\.norm: output departs .*; its weight is not the"):
        tp.verify(other, llama(), batch)


def rank_misused(group: Group) -> None:
    model = tp.parallelize(llama(), group)
    with pytest.raises(PlanError, match="pass the parallelized model first"):
        tp.verify(llama(), model, tokens())
    with pytest.raises(PlanError, match="parallelized too"):
        tp.verify(model, model, tokens())
    with pytest.raises(PlanError, match="another model"):
        tp.verify(model, llama(intermediate_size=8), tokens())
    with torch.device("meta"):
        empty = llama()
    with pytest.raises(PlanError, match="on meta"):
        tp.verify(model, empty, tokens())
    with pytest.raises((IndexError, RuntimeError)):  # the dense model's own error
        tp.verify(model, llama(), tokens() + 1000)
    tp.verify(model, llama(), tokens())


def test_misuse_is_told_on_every_rank() -> None:
    tp.simulate(rank_misused, 2)


def rank_goes_another_way(group: Group, way: str) -> str:
    model, dense = tp.parallelize(llama(), group), llama()
    mlp = model.model.layers[0].mlp
    if group.rank == 1 and way == "skips a sum":
        mlp.down_proj.forward = lambda x: x.new_zeros(*x.shape[:-1], 48)
    elif group.rank == 1:
        mlp.forward = lambda x: mlp.down_proj(mlp.act_fn(mlp.up_proj(x)))
    with pytest.raises(PlanError) as caught:
        tp.verify(model, dense, tokens())
    return str(caught.value)


@pytest.mark.parametrize(
    ("way", "name"),
    [("skips a sum", "model.layers.0.mlp.down_proj"), ("skips a layer", "model.layers.0.mlp.")],
)
def test_ranks_that_part_are_told_and_none_waits(way: str, name: str) -> None:
    told = tp.simulate(rank_goes_another_way, 2, way)
    assert all(message.startswith(name) for message in told), told
