"""Folders of every family of transformers: loaded bit for bit, saved as transformers saves them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

import model_folders
from model_folders import FAMILIES
from tiny import relative
from tp_native.checkpoint.loader import load_pretrained
from tp_native.checkpoint.writer import save_pretrained
from tp_native.errors import CheckpointError
from tp_native.group import Group
from tp_native.plan import plan as make_plan
from tp_native.simulate import simulate
from tp_native.state import full_state_dict

USUAL = [("LlamaForCausalLM", 3), ("Qwen3ForCausalLM", 2), ("Gemma2ForCausalLM", 2)]
CUT = [
    pytest.param(name, size, marks=[] if (name, size) in USUAL else pytest.mark.soak)
    for name, family in FAMILIES.items()
    for size in family.ranks
]


def same_tensors(ours: Iterable[tuple[str, Tensor]], theirs: Iterable[tuple[str, Tensor]]) -> None:
    mine, expected = dict(ours), dict(theirs)
    assert list(mine) == list(expected)
    for name, value in expected.items():
        assert mine[name].dtype == value.dtype, name
        assert torch.equal(mine[name], value), name


def tied_names(model: Any) -> list[list[str]]:
    groups: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), []).append(name)
    return [names for names in groups.values() if len(names) > 1]


@pytest.mark.parametrize("name", FAMILIES)
def test_a_folder_is_loaded_as_transformers_loads_it_and_saved_as_it_saves(
    name: str, tmp_path: Path
) -> None:
    dense = model_folders.make(name)
    dense.save_pretrained(tmp_path / "dense")
    kind = getattr(transformers, name)
    expected = kind.from_pretrained(tmp_path / "dense")
    drawn = torch.get_rng_state()
    ours: Any = load_pretrained(tmp_path / "dense")
    assert torch.equal(drawn, torch.get_rng_state())
    assert type(ours) is kind
    assert not ours.training
    every = ours.named_parameters(remove_duplicate=False)
    same_tensors(every, expected.named_parameters(remove_duplicate=False))
    same_tensors(ours.named_buffers(), expected.named_buffers())
    assert tied_names(ours) == tied_names(expected)
    if ours.can_generate():
        assert ours.generation_config.to_dict() == expected.generation_config.to_dict()
    # Of tensors in memory as ours are; transformers maps files, aligned as they may be.
    for mine, theirs in zip(
        model_folders.outputs(ours, name), model_folders.outputs(dense, name), strict=True
    ):
        assert torch.equal(mine, theirs)
    save_and_compare(ours, tmp_path, kind, expected)


def save_and_compare(ours: Any, folder: Path, kind: Any, expected: Any) -> None:
    save_pretrained(ours, folder / "ours")
    same_names(folder / "ours", folder / "dense")
    again = kind.from_pretrained(folder / "ours")
    every = again.named_parameters(remove_duplicate=False)
    same_tensors(every, expected.named_parameters(remove_duplicate=False))
    same_tensors(again.named_buffers(), expected.named_buffers())


def same_names(ours: Path, theirs: Path) -> None:
    mine = load_file(ours / "model.safetensors")
    expected = load_file(theirs / "model.safetensors")
    assert mine.keys() == expected.keys()
    assert all(torch.equal(mine[name], value) for name, value in expected.items())


def rank_load(group: Group, name: str, folder: Path, expected: Any) -> list[Tensor]:
    model: Any = load_pretrained(folder / "dense", group)
    assert sum(p.numel() for p in model.parameters()) < expected.num_parameters()
    assert tied_names(model) == tied_names(expected)
    same_tensors(full_state_dict(model).items(), expected.state_dict().items())
    same_tensors(model.named_buffers(), expected.named_buffers())
    model.save_pretrained(folder / "ours")
    return model_folders.outputs(model, name)


@pytest.mark.parametrize(("name", "world_size"), CUT)
def test_a_folder_is_cut_as_it_is_loaded(name: str, world_size: int, tmp_path: Path) -> None:
    dense = model_folders.make(name)
    dense.save_pretrained(tmp_path / "dense")
    reference = model_folders.outputs(dense, name)
    results = simulate(rank_load, world_size, name, tmp_path, dense)
    for ours in results:
        for mine, theirs in zip(ours, reference, strict=True):
            assert relative(mine, theirs) <= 1e-5  # fp32 sums in another order
    same_names(tmp_path / "ours", tmp_path / "dense")
    again = type(dense).from_pretrained(tmp_path / "ours")
    same_tensors(again.state_dict().items(), dense.state_dict().items())


JOINED = {
    "encoder.layer.*.mlp.gate_proj": "colwise",
    "encoder.layer.*.mlp.up_proj": "colwise",
    "encoder.layer.*.mlp.down_proj": "rowwise",
}


def rank_joined(group: Group, folder: Path, dense: Any) -> list[Tensor]:
    plan = make_plan(dense, group.size, rules=JOINED)
    model: Any = load_pretrained(folder / "dense", group, plan=plan)
    assert sum(p.numel() for p in model.parameters()) < dense.num_parameters()
    same_tensors(full_state_dict(model).items(), dense.state_dict().items())
    model.save_pretrained(folder / "ours", max_shard_size=30_000)
    return model_folders.outputs(model, "Dinov2Model")


@pytest.mark.parametrize("world_size", [2, 3])
def test_what_lies_joined_on_file_is_cut_apart(world_size: int, tmp_path: Path) -> None:
    dense = model_folders.make("Dinov2Model", use_swiglu_ffn=True)
    dense.save_pretrained(tmp_path / "dense")
    on_file = load_file(tmp_path / "dense" / "model.safetensors")
    assert on_file["encoder.layer.0.mlp.weights_in.weight"].shape == (256, 48)
    reference = model_folders.outputs(dense, "Dinov2Model")
    for ours in simulate(rank_joined, world_size, tmp_path, dense):
        for mine, theirs in zip(ours, reference, strict=True):
            assert relative(mine, theirs) <= 1e-5
    parts = sorted((tmp_path / "ours").glob("*.safetensors"))
    assert len(parts) > 2
    same_tensors(
        sorted(item for part in parts for item in load_file(part).items()), sorted(on_file.items())
    )
    again = type(dense).from_pretrained(tmp_path / "ours")
    same_tensors(again.state_dict().items(), dense.state_dict().items())


def edit(folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor] | None]) -> None:
    tensors = load_file(folder / "model.safetensors")
    changed = change(tensors)
    save_file(tensors if changed is None else changed, folder / "model.safetensors")


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def older_norms(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    words = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    for new, old in words.items():
        tensors = {name.replace(new, old): value for name, value in tensors.items()}
    assert any(name.endswith("LayerNorm.gamma") for name in tensors)
    return tensors


def without_prefix(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix("bert."): value for name, value in tensors.items()}


def with_prefix(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"bert.{name}": value for name, value in tensors.items()}


def with_old_buffer(tensors: dict[str, Tensor]) -> None:
    tensors["bert.embeddings.position_ids"] = torch.arange(64)[None]


def already_joined(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """As the model holds it: experts in one tensor, in which some checkpoints come."""
    return {
        k: v.contiguous() for k, v in model_folders.make("MixtralForCausalLM").state_dict().items()
    }


OLDER: list[tuple[str, Any]] = [
    ("BertForMaskedLM", older_norms),
    ("BertForSequenceClassification", older_norms),
    ("BertForMaskedLM", without_prefix),
    ("BertModel", with_prefix),
    ("BertForMaskedLM", with_old_buffer),
    ("MixtralForCausalLM", already_joined),
]


@pytest.mark.parametrize(("name", "change"), OLDER)
def test_older_names_and_prefixes_are_found(name: str, change: Any, tmp_path: Path) -> None:
    dense = model_folders.make(name)
    dense.save_pretrained(tmp_path)
    edit(tmp_path, change)
    same_tensors(load_pretrained(tmp_path).state_dict().items(), dense.state_dict().items())


EXPERT = "model.layers.0.block_sparse_moe.experts.1.w2.weight"
WRONG: list[tuple[str, Any, str]] = [
    ("BertModel", lambda t: [t.pop("pooler.dense.bias")], "1 missing: pooler.dense.bias"),
    ("BertModel", lambda t: t.update(stray=torch.ones(1)), "1 unexpected: stray"),
    (
        "ViTForImageClassification",
        lambda t: t.update({"classifier.bias": torch.ones(2)}),
        r"classifier.bias: shape \[2\] on file, expected \[3\]",
    ),
    ("MixtralForCausalLM", lambda t: [t.pop(EXPERT)], r"down_proj: shape \[2, 48, 72\] on file"),
    (
        "MixtralForCausalLM",
        lambda t: t.update({EXPERT: torch.ones(48, 71)}),
        "down_proj: cannot be made of .*experts.0.w2.weight",
    ),
    (
        "BertForMaskedLM",
        lambda t: t.update({"cls.predictions.transform.LayerNorm.gamma": torch.ones(48)}),
        "cls.predictions.transform.LayerNorm.weight: both .* on file mean it",
    ),
]


@pytest.mark.parametrize(("name", "change", "words"), WRONG)
def test_what_does_not_fit_is_listed(name: str, change: Any, words: str, tmp_path: Path) -> None:
    model_folders.make(name).save_pretrained(tmp_path)
    edit(tmp_path, lambda tensors: change(tensors) and None)
    with pytest.raises(CheckpointError, match=f"no weight was loaded.*{words}"):
        load_pretrained(tmp_path)


ASKED: list[tuple[str, Any, str]] = [
    ("LlamaForCausalLM", None, "LlamaForCausalLM"),
    ("LlamaForCausalLM", ["TheirOwnLlama"], "LlamaForCausalLM"),
    ("LlamaForCausalLM", ["PreTrainedTokenizerFast", "LlamaForCausalLM"], "LlamaForCausalLM"),
    ("T5EncoderModel", ["T5EncoderModel"], "T5EncoderModel"),
    ("ViTForImageClassification", ["ViTForImageClassification"], "ViTForImageClassification"),
    ("CLIPModel", None, "CLIPModel"),
    ("DeiTModel", ["os.system"], "DeiTModel"),
]


@pytest.mark.parametrize(("name", "architectures", "loaded"), ASKED)
def test_the_class_is_the_configs_or_the_types_first(
    name: str, architectures: Any, loaded: str, tmp_path: Path
) -> None:
    model_folders.make(name).save_pretrained(tmp_path)
    edit_config(tmp_path, architectures=architectures)
    assert type(load_pretrained(tmp_path)).__name__ == loaded


def test_buffers_that_no_file_holds_are_those_of_a_normal_build_in_bfloat16(
    tmp_path: Path,
) -> None:
    for name in ("LlamaForCausalLM", "GPTJForCausalLM", "Gemma3ForCausalLM", "MarianMTModel"):
        model_folders.make(name, torch.bfloat16).save_pretrained(tmp_path / name)
        ours = load_pretrained(tmp_path / name)
        theirs = getattr(transformers, name).from_pretrained(tmp_path / name)
        same_tensors(ours.named_buffers(), theirs.named_buffers())
        same_tensors(ours.named_parameters(), theirs.named_parameters())
        assert next(ours.parameters()).dtype == torch.bfloat16
