"""A model of sharded modules is an ordinary one: compiled, recomputed, copied, hooked, profiled,
saved and loaded like any other, with the dense model's values and gradients.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import tp_native as tp
from harness import run_ranks
from oracle import dense_block, rank_data, relative_error
from shards import check
from tp_native.group import Group, world_of_one
from tp_native.nn import mark_of

WORLDS = [1, 2, 3, 4]
F64 = torch.float64
VOCAB, WIDTH = 11, 10
BLOCK: dict[str, Any] = {
    "hidden_size": WIDTH,
    "num_heads": 6,
    "num_kv_heads": 2,
    "head_dim": 4,
    "intermediate_size": 17,
    "rope_theta": 100.0,
    "qk_norm": True,
    "bias": True,
}
IDS = torch.tensor([[1, 5, 10, 3, 3], [0, 2, 7, 9, 1]])


class Model(nn.Module):
    """Embedding, block, and a head tied to the embedding; cut by ``ratios``."""

    def __init__(
        self, group: Group, is_sequence: bool = False, dropout: float = 0.0, **place: Any
    ) -> None:
        super().__init__()
        ratios = [1.0, 3.0, 2.0, 2.0][: group.size]
        cut = tp.Partition.from_ratios(VOCAB, ratios)
        place = {"group": group, "sequence_parallel": is_sequence, "dtype": F64, **place}
        self.tokens = tp.Partition.even(IDS.shape[1], group.size) if is_sequence else None
        self.embed = tp.VocabParallelEmbedding(VOCAB, WIDTH, partition=cut, **place)
        self.block = tp.TensorParallelTransformerBlock(
            **BLOCK, ratios=ratios, dropout=dropout, **place
        )
        del place["group"]
        self.head = tp.ParallelLMHead(
            WIDTH, VOCAB, embedding=self.embed, gather_output=True, **place
        )

    def forward(self, ids: Tensor) -> Tensor:
        x = self.block(self.embed(ids, self.tokens), sequence_partition=self.tokens)
        y: Tensor = self.head(x, self.tokens)
        return y


def whole_state() -> dict[str, Tensor]:
    """Parameters that every process can make."""
    shapes = {n: p.shape for n, p in Model(world_of_one(), device="meta").state_dict().items()}
    state = {n: rank_data(tuple(s), F64, i, 5) * 0.5 for i, (n, s) in enumerate(shapes.items())}
    return {**state, "head.weight": state["embed.weight"]}


def made(group: Group, is_sequence: bool = False, **options: Any) -> Model:
    model = Model(group, is_sequence, **options)
    model.load_state_dict(whole_state())
    return model


def formula(state: dict[str, Tensor], ids: Tensor) -> Tensor:
    part = {k.removeprefix("block."): v for k, v in state.items() if k.startswith("block.")}
    return dense_block(part, BLOCK, F.embedding(ids, state["embed.weight"])) @ (
        state["embed.weight"].t()
    )


COTANGENT = rank_data((*IDS.shape, VOCAB), F64, 0, 6)


@torch.enable_grad()
def dense_answer() -> tuple[Tensor, dict[str, Tensor]]:
    state = {name: value.requires_grad_() for name, value in whole_state().items()}
    del state["head.weight"]
    y = formula(state, IDS)
    y.backward(COTANGENT)
    return y.detach(), {n: v.grad for n, v in state.items() if v.grad is not None}


def check_step(model: Any, run: Callable[[Tensor], Tensor], what: Any) -> None:
    """Forward and backward of ``run``, which runs ``model``, against the formula."""
    model.zero_grad(set_to_none=True)
    wanted, gradients = dense_answer()
    y = run(IDS)
    y.backward(COTANGENT)
    check(y, wanted, what)
    names = [name for name, _ in model.named_parameters()]
    assert sorted(names) == sorted(gradients), what
    for name, parameter in model.named_parameters():
        mark = mark_of(parameter)
        grad = parameter.grad if mark is None else mark.full(parameter.grad)
        check(grad, gradients[name], (what, name))


# -- values and gradients, tied


def is_the_formula(group: Group) -> None:
    for is_sequence in (False, True):
        model = made(group, is_sequence)
        assert model.head.weight is model.embed.weight
        check_step(model, model, is_sequence)


@pytest.mark.parametrize("world_size", WORLDS)
def test_a_tied_weight_is_one_parameter_with_the_dense_gradient(world_size: int) -> None:
    run_ranks(is_the_formula, world_size)


def recomputes(group: Group) -> None:
    for is_sequence, reentrant in itertools.product((False, True), repeat=2):
        model = made(group, is_sequence)

        def run(ids: Tensor, model: Any = model, reentrant: bool = reentrant) -> Tensor:
            x = model.embed(ids, model.tokens)
            options = {"sequence_partition": model.tokens}
            block = lambda x: model.block(x, **options)  # noqa: E731
            y: Tensor = model.head(checkpoint(block, x, use_reentrant=reentrant), model.tokens)  # type: ignore[operator]
            return y

        check_step(model, run, (is_sequence, reentrant))
        # masks of dropout come back
        model = made(group, is_sequence, dropout=0.3)
        found = []
        for step in (model, lambda ids, run=run, model=model: run(ids, model)):
            torch.manual_seed(7)
            model.zero_grad(set_to_none=True)
            y = step(IDS)
            y.backward(COTANGENT)
            found.append([y, *(p.grad for p in model.parameters())])
        for a, b in zip(*found, strict=True):
            assert torch.equal(a, b), (is_sequence, reentrant)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_recomputed_activations_give_the_same_gradients(world_size: int) -> None:
    run_ranks(recomputes, world_size)


Log = list[tuple[str, str, int]]


def compiles(group: Group, is_sequence: bool, backend: str) -> tuple[Log, Log]:
    torch._dynamo.reset()
    model = made(group, is_sequence)

    def logged(step: Callable[[Tensor], Tensor]) -> Log:
        log = group.op_log()
        first = log[-1][0] if log else 0
        model.zero_grad(set_to_none=True)
        step(IDS).backward(COTANGENT)
        return [(op, dtype, shape) for seq, op, dtype, shape in group.op_log() if seq > first]

    eager = logged(model)
    module: Any = torch.compile(model, fullgraph=True, backend=backend)
    compiled = logged(module)
    assert logged(module) == compiled
    check_step(model, module, (is_sequence, backend))
    return eager, compiled


def check_compiled(world_size: int, is_sequence: bool, backend: str) -> None:
    found = run_ranks(compiles, world_size, is_sequence, backend, deadline_s=110)
    eager, compiled = found[0]
    assert len(eager) > 0
    for its_eager, its_compiled in found:
        assert its_eager == eager
        assert its_compiled == compiled
    assert sorted(compiled) == sorted(eager)  # none lost, none doubled


@pytest.mark.parametrize("is_sequence", [False, True])
def test_it_compiles_to_one_graph_with_one_order_on_all_ranks(is_sequence: bool) -> None:
    check_compiled(3, is_sequence, "aot_eager")


@pytest.mark.soak
@pytest.mark.timeout(900)
@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("is_sequence", [False, True])
def test_inductor_compiles_it(is_sequence: bool, world_size: int) -> None:
    check_compiled(world_size, is_sequence, "inductor")


# -- copies


def marks_of(model: nn.Module) -> dict[str, Any]:
    return {name: mark_of(p) for name, p in model.named_parameters()}


def copies(group: Group) -> None:
    for is_sequence in (False, True):
        model = made(group, is_sequence)
        marks = marks_of(model)
        assert {name.rpartition(".")[2] for name, m in marks.items() if m is None} == {
            "weight",  # norms
            "bias",  # of row-parallel layers
        }
        cut = [name for name, mark in marks.items() if mark is not None]
        assert len(cut) == 1 + 2 * 2 + 2

        twin = copy.deepcopy(model)
        assert marks_of(twin) == marks
        assert twin.head.weight is twin.embed.weight is not model.embed.weight
        check_step(twin, twin, ("deepcopy", is_sequence))

        with torch.no_grad():
            for parameter in twin.parameters():
                parameter.zero_()
        assert all(bool(p.any()) for p in model.parameters() if p.numel())

        twin = copy.deepcopy(model).to(torch.bfloat16)
        assert marks_of(twin) == marks
        assert twin.head.weight is twin.embed.weight
        assert {p.dtype for p in twin.parameters()} == {torch.bfloat16}
        y, expected = twin(IDS), dense_answer()[0]
        assert y.dtype == torch.bfloat16
        assert relative_error(y, expected) <= 0.1  # 8 bits, three layers deep

        empty = Model(group, is_sequence, device="meta")
        assert marks_of(empty) == marks
        empty.to_empty(device="cpu")
        empty.head.tie(empty.embed)  # as with torch's own modules, meta tensors lose their ties
        assert marks_of(empty) == marks
        empty.load_state_dict(whole_state())
        check_step(empty, empty, ("to_empty", is_sequence))


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_copies_know_how_they_are_cut(world_size: int) -> None:
    run_ranks(copies, world_size)


def assigns(group: Group) -> None:
    source = made(group)
    for state in (source.state_dict(), whole_state()):
        model = Model(group, device="meta")
        marks = marks_of(model)
        model.load_state_dict(state, assign=True)
        model.head.tie(model.embed)
        assert marks_of(model) == marks
        assert not any(p.is_meta for p in model.parameters())
        check_step(model, model, "assign")
        # a slice that is a view would keep the whole tensor's memory
        for name, parameter in model.named_parameters():
            held = parameter.untyped_storage().nbytes()
            mark = mark_of(parameter)
            if mark is not None and group.size > 1:
                assert held <= parameter.numel() * parameter.itemsize, name


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_assigned_tensors_are_cut_and_marked(world_size: int) -> None:
    run_ranks(assigns, world_size)


# -- hooks and profiles


def hooked(group: Group) -> None:
    for is_sequence in (False, True):
        model = made(group, is_sequence)
        # dropout runs twice; the embedding's input has no gradient for a backward hook to tell of
        modules = {n: m for n, m in model.named_modules() if n != "block.dropout"}
        seen: dict[str, list[str]] = {"pre": [], "forward": [], "backward": []}

        def noting(kind: str, name: str, seen: Any = seen) -> Callable[..., None]:
            return lambda *_: seen[kind].append(name)

        for name, module in modules.items():
            module.register_forward_pre_hook(noting("pre", name))
            module.register_forward_hook(noting("forward", name))
            if name not in ("", "embed"):
                module.register_full_backward_hook(noting("backward", name))
        check_step(model, model, ("hooks", is_sequence))
        assert sorted(seen["pre"]) == sorted(seen["forward"]) == sorted(modules)
        assert sorted(seen["backward"]) == sorted(set(modules) - {"", "embed"})
        for names in seen.values():
            names.clear()
        with torch.no_grad():  # where the norm joins the sum if nobody is looking
            check(model(IDS), dense_answer()[0], ("no_grad", is_sequence))
        assert sorted(seen["pre"]) == sorted(seen["forward"]) == sorted(modules)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_hooks_of_every_module_run_once(world_size: int) -> None:
    run_ranks(hooked, world_size)


def changes_outputs(group: Group) -> None:
    model = made(group)
    expected = model(IDS)
    handles = [
        model.block.attention.register_forward_hook(lambda module, args, y: 0 * y),
        model.block.mlp.register_forward_hook(lambda module, args, y: 0 * y),
    ]
    embedded = F.embedding(IDS, whole_state()["embed.weight"])
    for no_grad in (False, True):
        with torch.set_grad_enabled(not no_grad):
            check(model(IDS), embedded @ whole_state()["embed.weight"].t(), "residual alone")
    for handle in handles:
        handle.remove()
    assert torch.equal(model(IDS), expected)


@pytest.mark.parametrize("world_size", [1, 2])
def test_what_a_hook_returns_is_taken(world_size: int) -> None:
    run_ranks(changes_outputs, world_size)


def profiled(group: Group) -> list[set[str]]:
    found = []
    for is_sequence, no_grad in ((False, False), (True, False), (False, True)):
        model = made(group, is_sequence)
        with (
            torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile,
            torch.set_grad_enabled(not no_grad),
        ):
            y = model(IDS)
            if not no_grad:
                y.backward(COTANGENT)
        names = {event.key for event in profile.key_averages()}
        found.append({n for n in names if n.startswith("tp_native::")})
    return found


def test_profiles_name_the_ops() -> None:
    for whole, shards, inference in run_ranks(profiled, 2):
        assert whole >= {
            "tp_native::vocab_parallel_embedding",
            "tp_native::column_parallel_linear",
            "tp_native::column_parallel_linear_backward",
            "tp_native::row_parallel_linear",
            "tp_native::glu",
            "tp_native::glu_backward",
            "tp_native::all_gather",
        }
        assert shards >= {
            "tp_native::scatter_to_ranks",
            "tp_native::gathered_column_parallel_linear",
            "tp_native::row_parallel_linear_scatter",
            "tp_native::all_gather",
            "tp_native::all_reduce",
        }
        assert inference >= {
            "tp_native::row_parallel_linear_add_rms_norm",
            "tp_native::column_parallel_linear",
        }


# -- state dicts and folders


def round_trip(group: Group) -> None:
    model, state = made(group), whole_state()
    local = model.state_dict()
    assert list(local) == list(state)
    assert local["head.weight"].data_ptr() == local["embed.weight"].data_ptr()
    for name, parameter in model.named_parameters(remove_duplicate=False):
        assert local[name].shape == parameter.shape
        mark = mark_of(parameter)
        if mark is None:
            continue
        record = local._metadata[name.rpartition(".")[0]]["tp_native"]
        assert (record["rank"], record["size"]) == (group.rank, group.size)
        assert record["partition"] == list(mark.layout.local_sizes)
        assert torch.equal(local[name], mark.local(state[name])), name
    other = Model(group)
    other.load_state_dict(local)
    assert other.head.weight is other.embed.weight
    check_step(other, other, "own shards")
    whole = tp.full_state_dict(model)
    assert list(whole) == list(state)
    for name, value in state.items():
        assert torch.equal(whole[name], value), name
    alone = Model(world_of_one())
    alone.load_state_dict(whole)
    check_step(alone, alone, "whole in one process")
    other = Model(group)
    other.load_state_dict(alone.state_dict())  # says that it is a world of one's
    check_step(other, other, "a world of one's")
    if group.size > 1:
        foreign = model.state_dict()
        for record in foreign._metadata.values():
            if "tp_native" in record:
                record["tp_native"]["rank"] = (group.rank + 1) % group.size
        with pytest.raises(RuntimeError, match="these are the shards of") as info:
            other.load_state_dict(foreign)
        for name in ("embed", "block.attention.qkv_proj", "block.mlp.down_proj", "head"):
            assert f"{name}: these are" in str(info.value), name


@pytest.mark.parametrize("world_size", WORLDS)
def test_state_dicts_are_local_and_load_whole_or_own_tensors(world_size: int) -> None:
    run_ranks(round_trip, world_size)


def saves(group: Group, folder: str) -> None:
    tp.CheckpointSaver(folder, group).save(made(group))


@pytest.mark.parametrize("world_size", WORLDS)
def test_a_saved_model_is_whole_and_its_tied_weight_there_once(
    world_size: int, tmp_path: Path
) -> None:
    from safetensors.torch import load_file

    run_ranks(saves, world_size, str(tmp_path / "out"))
    found = load_file(tmp_path / "out" / "model.safetensors")
    expected = whole_state()
    del expected["head.weight"]
    assert sorted(found) == sorted(expected)
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def loads(group: Group, folder: str) -> None:
    for model in (Model(group), Model(group, is_sequence=True, device="meta")):
        tp.DistributedCheckpointLoader(folder, group).load(model)
        check_step(model, model, "loaded")
        assert model.head.weight is model.embed.weight
        # every byte once: its own ranges, and of the rest what each rank holds
        size = sum(p.numel() * p.itemsize for p in model.parameters())
        assert model.__dict__["tp_load_stats"]["bytes_read"] == size


def test_a_saved_model_is_loaded_by_any_number_of_ranks(tmp_path: Path) -> None:
    run_ranks(saves, 2, str(tmp_path / "out"))
    for world_size in WORLDS:
        run_ranks(loads, world_size, str(tmp_path / "out"))


# -- frozen weights


def kept(run: Callable[[], object], parameters: list[nn.Parameter]) -> list[int]:
    """Elements of every tensor that autograd keeps of a forward pass, parameters left out."""
    own = {p.untyped_storage().data_ptr() for p in parameters}
    sizes: list[int] = []

    def pack(t: Tensor) -> Tensor:
        if t.untyped_storage().data_ptr() not in own:
            sizes.append(t.numel())
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        run()
    return sizes


def freezes(group: Group) -> None:
    rows, wide, narrow = 12, 8 * group.size, 6
    place: dict[str, Any] = {"group": group, "dtype": F64}
    embedding = tp.VocabParallelEmbedding(wide, narrow, **place)
    layers: dict[str, tuple[Any, int]] = {
        "column": (tp.ColumnParallelLinear(narrow, wide, **place), narrow),
        "column, gathered": (
            tp.ColumnParallelLinear(narrow, wide, gather_output=True, **place),
            narrow,
        ),
        "column on shards": (
            tp.ColumnParallelLinear(narrow, wide, sequence_parallel=True, **place),
            narrow,
        ),
        "row": (tp.RowParallelLinear(wide, narrow, **place), 8),
        "row, whole input": (
            tp.RowParallelLinear(wide, narrow, input_is_parallel=False, **place),
            wide,
        ),
        "row on shards": (tp.RowParallelLinear(wide, narrow, sequence_parallel=True, **place), 8),
        "head": (tp.ParallelLMHead(narrow, wide, embedding=embedding, **place), narrow),
        "qkv": (tp.ParallelAttention(narrow, 6, num_kv_heads=1, **place).qkv_proj, narrow),
        "gate and up": (tp.ParallelMLP(narrow, wide, **place).gate_up_proj, narrow),
    }
    for name, (layer, width) in layers.items():
        x = torch.ones(rows, width, dtype=F64, requires_grad=True)
        for is_frozen in (False, True):
            layer.requires_grad_(not is_frozen)
            sizes = kept(lambda x=x, layer=layer: layer(x), list(layer.parameters()))
            assert (sizes == []) == is_frozen, (name, is_frozen, sizes)
        layer(x).sum().backward()
        assert x.grad is not None and layer.weight.grad is None, name
    # with an activation it keeps what that one needs, and no more
    for activation in ("relu", "gelu_tanh", "silu"):
        layer = tp.ColumnParallelLinear(narrow, wide, activation=activation, **place)
        layer.requires_grad_(False)
        x = torch.ones(rows, narrow, dtype=F64, requires_grad=True)
        assert kept(lambda x=x, layer=layer: layer(x), list(layer.parameters())) == [rows * 8]
    ids = torch.arange(4)
    embedding.requires_grad_(False)
    assert kept(lambda: embedding(ids), list(embedding.parameters())) == []
    assert not embedding(ids).requires_grad


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_a_frozen_layer_keeps_no_activation(world_size: int) -> None:
    run_ranks(freezes, world_size)


def trains_one(group: Group) -> None:
    """Whatever is frozen, the rest has the dense gradient."""
    _, gradients = dense_answer()
    for is_sequence, only in itertools.product(
        (False, True), ("embed.weight", "block.attention.qkv_proj.bias", "block.input_norm.weight")
    ):
        model = made(group, is_sequence)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name == only)
        model(IDS).backward(COTANGENT)
        for name, parameter in model.named_parameters():
            if name != only:
                assert parameter.grad is None, name
                continue
            mark = mark_of(parameter)
            assert parameter.grad is not None
            grad = parameter.grad if mark is None else mark.full(parameter.grad)
            check(grad, gradients[name], (is_sequence, name))


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_one_trained_parameter_has_its_gradient_among_frozen_ones(world_size: int) -> None:
    run_ranks(trains_one, world_size)
