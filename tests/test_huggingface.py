"""A parallelized transformers model under transformers' own methods: right, or refused."""

from __future__ import annotations

import copy
import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import model_folders
from model_folders import FAMILIES
from tiny import llama, relative, tokens
from tp_native.errors import TensorParallelError
from tp_native.group import Group
from tp_native.nn import mark_of
from tp_native.parallelize import DistributedModelWrapper, parallelize
from tp_native.simulate import simulate
from tp_native.state import full_state_dict

CUT = [
    pytest.param(name, family.ranks[0], marks=[] if "Llama" in name else pytest.mark.soak)
    for name, family in FAMILIES.items()
    if family.ranks
]


def same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert ours[name].dtype == value.dtype, name
        assert torch.equal(ours[name], value), name


def rank_refuses(group: Group, dense: Any, folder: Path) -> None:
    model: Any = parallelize(copy.deepcopy(dense), group)
    before = {name: id(p) for name, p in model.named_parameters(remove_duplicate=False)}
    refused = {
        "resize_token_embeddings": (120,),
        "init_weights": (),
        "initialize_weights": (),
        "push_to_hub": ("someone/model",),
        "add_adapter": (None,),
        "load_adapter": (str(folder),),
        "init_continuous_batching": (),
    }
    for name, args in refused.items():
        for owner in (model, DistributedModelWrapper(model, group)):
            with pytest.raises(TensorParallelError, match=f"{name} is refused on a parallelized"):
                getattr(owner, name)(*args)
    with pytest.raises(TensorParallelError, match="dense model, then parallelize that"):
        model.model.resize_token_embeddings(new_num_tokens=120)  # the model inside
    with pytest.raises(TensorParallelError, match="is refused"):
        model.resize_token_embeddings(pad_to_multiple_of=8)
    for options in ({"push_to_hub": True}, {"variant": "fp16"}, {"save_original_format": False}):
        with pytest.raises(ValueError, match=f"does not take .*{next(iter(options))}"):
            model.save_pretrained(folder, **options)
    assert model.resize_token_embeddings() is model.get_input_embeddings()
    assert model.num_parameters() == dense.num_parameters()
    without = model.num_parameters(exclude_embeddings=True)
    assert without == dense.num_parameters(exclude_embeddings=True)
    assert {n: id(p) for n, p in model.named_parameters(remove_duplicate=False)} == before
    assert not folder.exists()


@pytest.mark.parametrize("tied", [False, True])
def test_what_would_be_wrong_on_a_share_is_refused(tied: bool, tmp_path: Path) -> None:
    simulate(rank_refuses, 2, llama(tied=tied), tmp_path / "none")


def rank_methods(group: Group, name: str, folder: Path) -> None:
    dense = model_folders.make(name)
    model: Any = parallelize(copy.deepcopy(dense), group)
    settings = dense.config.to_dict()
    reference = model_folders.outputs(dense, name)

    model.tie_weights()
    tied = {id(p) for _, p in model.named_parameters(remove_duplicate=False)}
    assert len(tied) == len({id(p) for p in dense.parameters()})
    same(full_state_dict(model), dense.state_dict())
    for mine, theirs in zip(model_folders.outputs(model, name), reference, strict=True):
        assert relative(mine, theirs) <= 1e-5

    marks = {n: mark_of(p) for n, p in model.named_parameters()}
    for change in (
        lambda m: m.half(),
        lambda m: m.to(torch.bfloat16),
        lambda m: m.float(),
        lambda m: m.to("cpu", dtype=torch.float64),
    ):
        same(full_state_dict(change(model)), change(dense).state_dict())
        assert {n: mark_of(p) for n, p in model.named_parameters()} == marks
        assert model.dtype == dense.dtype
    assert model.config.to_dict() | {"dtype": None} == settings | {"dtype": None}
    if group.rank == 0:  # transformers sets the process's default dtype as it loads
        dense.save_pretrained(folder)
        again = model.from_pretrained(folder)
        assert mark_of(next(again.parameters())) is None
        same(again.state_dict(), dense.state_dict())


@pytest.mark.parametrize(("name", "world_size"), CUT)
def test_methods_that_keep_shards_shards(name: str, world_size: int, tmp_path: Path) -> None:
    simulate(rank_methods, world_size, name, tmp_path / "dense")


def rank_checkpointing(group: Group, dense: Any, expected: dict[str, Tensor]) -> None:
    model: Any = parallelize(copy.deepcopy(dense), group).train()
    model.gradient_checkpointing_enable()
    assert model.is_gradient_checkpointing
    model.enable_input_require_grads()
    ids = tokens()
    model(input_ids=ids, labels=ids).loss.backward()
    for name, param in model.named_parameters():
        mark = mark_of(param)
        gradient = param.grad if mark is None else mark.full(param.grad)
        # fp32 sums in another order, through two layers and back
        assert relative(gradient, expected[name]) <= 1e-4, name
    model.disable_input_require_grads()
    model.gradient_checkpointing_disable()
    assert not model.is_gradient_checkpointing


@pytest.mark.parametrize("tied", [False, True])
def test_gradients_are_dense_under_gradient_checkpointing(tied: bool) -> None:
    dense = llama(tied=tied).train()
    ids = tokens()
    dense(input_ids=ids, labels=ids).loss.backward()
    expected = {name: param.grad.clone() for name, param in dense.named_parameters()}
    dense.zero_grad()
    simulate(rank_checkpointing, 2, dense, expected)


def rank_saves_the_model_inside(group: Group, dense: Any, folder: Path) -> None:
    model: Any = parallelize(copy.deepcopy(dense), group)
    model.model.save_pretrained(folder)


def test_the_model_inside_saves_whole_tensors_too(tmp_path: Path) -> None:
    dense = llama()
    simulate(rank_saves_the_model_inside, 2, dense, tmp_path / "inner")
    again = type(dense.model).from_pretrained(tmp_path / "inner")
    same(again.state_dict(), dense.model.state_dict())


ATTENTIONS = ["flash_attention_2", "flash_attention_3"]


def rank_attention(group: Group, dense: Any, names: list[str]) -> None:
    model: Any = parallelize(copy.deepcopy(dense), group)
    for name in ATTENTIONS:
        with pytest.raises(ImportError, match=r"(?i)flash"):  # transformers' own refusal
            model.set_attn_implementation(name)
    with torch.no_grad():
        reference = dense(tokens()).logits
        for name in names:
            model.set_attn_implementation(name)
            assert relative(model(tokens()).logits, reference) <= 1e-5, name


@pytest.mark.parametrize(
    "names", [["eager", "sdpa"], pytest.param(["flex_attention"], marks=pytest.mark.soak)]
)
def test_attention_implementations_are_dense(names: list[str]) -> None:
    simulate(rank_attention, 2, llama(), names)


def rank_copies(group: Group, dense: Any) -> Tensor:
    model: Any = parallelize(copy.deepcopy(dense), group)
    twin = copy.deepcopy(model)
    assert inspect.signature(twin.generate) == inspect.signature(dense.generate)
    with torch.no_grad():
        for param in model.parameters():
            param.zero_()
    made: Tensor = twin.generate(tokens(), max_new_tokens=4, do_sample=False)
    assert twin.generate.__self__ is twin
    return made


def test_a_copys_methods_are_its_own() -> None:
    dense = llama()
    expected = dense.generate(tokens(), max_new_tokens=4, do_sample=False)
    assert all(torch.equal(ours, expected) for ours in simulate(rank_copies, 2, dense))
