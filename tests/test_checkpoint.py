"""Loading folders: every byte once, every key accounted for, one error on every rank."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from harness import run_ranks
from tiny import llama, qwen3, relative, same_state, save, tokens
from tp_native.checkpoint import skeleton
from tp_native.checkpoint.loader import DistributedCheckpointLoader, load_pretrained
from tp_native.checkpoint.writer import save_pretrained
from tp_native.errors import CheckpointError
from tp_native.generate import generate
from tp_native.group import Group
from tp_native.parallelize import parallelize
from tp_native.simulate import simulate
from tp_native.state import full_state_dict, state_of

WORLDS = [1, 2, 3, 4]


def rank_load(group: Group, folder: Path, expected: Any) -> Tensor:
    model = load_pretrained(folder, group)
    same_state(full_state_dict(model), expected.state_dict())
    for (name, ours), (_, theirs) in zip(
        model.named_buffers(), expected.named_buffers(), strict=True
    ):
        assert ours.dtype == theirs.dtype, name
        assert torch.equal(ours, theirs), name
    held = sum(param.numel() * param.element_size() for param in model.parameters())
    assert model.tp_load_stats["bytes_read"] == held
    state = state_of(model)
    if state is not None:
        assert held == state.plan.local_bytes(group.rank)
    tied = model.lm_head.weight is model.model.embed_tokens.weight
    assert tied == model.config.tie_word_embeddings
    assert model.generation_config.to_dict() == expected.generation_config.to_dict()
    assert not model.training
    with torch.no_grad():
        logits: Tensor = model(tokens()).logits
    return logits


LAYOUTS: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "one file": (llama, {}),
    "tied": (lambda: llama(tied=True), {}),
    "shards": (llama, {"max_shard_size": "30KB"}),
    "bfloat16": (lambda: llama(tied=True, dtype=torch.bfloat16), {"max_shard_size": "30KB"}),
    "qwen3": (qwen3, {}),
}


@pytest.mark.parametrize("world_size", WORLDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_load_is_what_transformers_loads(layout: str, world_size: int, tmp_path: Path) -> None:
    make, options = LAYOUTS[layout]
    save(make(), tmp_path, **options)
    expected = AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        reference = expected(tokens()).logits
    results = simulate(rank_load, world_size, tmp_path, expected)
    assert all(torch.equal(ours, results[0]) for ours in results)
    if world_size == 1:
        assert torch.equal(results[0], reference)
    # bf16: eight bits of mantissa through two layers
    limit = 1e-5 if reference.dtype == torch.float32 else 2e-2
    assert relative(results[0].float(), reference.float()) <= limit


def rank_round(group: Group, source: str, target: str) -> list[Any]:
    """In a live process: load, save, and tell logits and text exactly."""
    model = load_pretrained(source, group)
    save_pretrained(model, target, max_shard_bytes=30_000)
    with torch.no_grad():
        logits = model(tokens()).logits
    return [logits.tolist(), generate(model, tokens(), 4).tolist()]


def test_processes_pass_a_folder_on(tmp_path: Path) -> None:
    dense = llama(tied=True)
    source = save(dense, tmp_path / "0")
    with torch.no_grad():
        reference = dense(tokens()).logits
    for target in (tmp_path / "1", tmp_path / "2"):
        first, second = run_ranks(rank_round, 2, str(source), str(target))
        assert first == second
        assert relative(torch.tensor(first[0]), reference) <= 1e-5
        assert torch.tensor(first[1]).shape == (2, 11)
        same_state(AutoModelForCausalLM.from_pretrained(target).state_dict(), dense.state_dict())
        source = target


def rank_reshard(group: Group, source: Path, target: Path) -> None:
    save_pretrained(load_pretrained(source, group), target, max_shard_bytes=30_000)


def test_a_folder_passes_from_world_to_world_unchanged(tmp_path: Path) -> None:
    dense = llama(tied=True)
    save(dense, tmp_path / "0")
    for step, world_size in enumerate((1, 2, 3, 4, 1)):
        source, target = tmp_path / str(step), tmp_path / str(step + 1)
        simulate(rank_reshard, world_size, source, target)
        same_state(AutoModelForCausalLM.from_pretrained(target).state_dict(), dense.state_dict())


def test_nothing_dense_is_allocated_while_building(tmp_path: Path) -> None:
    save(llama(), tmp_path)
    config = skeleton.read_config(tmp_path)
    model = skeleton.build_skeleton(config, torch.float32)
    assert all(param.device.type == "meta" for param in model.parameters())
    assert all(buffer.device.type == "cpu" for buffer in model.buffers())


def test_loading_leaves_the_random_state_and_default_dtype_alone(tmp_path: Path) -> None:
    save(llama(dtype=torch.bfloat16), tmp_path)
    state = torch.get_rng_state()
    assert load_pretrained(tmp_path).dtype == torch.bfloat16
    assert torch.equal(state, torch.get_rng_state())
    assert torch.get_default_dtype() == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, "float16", "auto"])
def test_dtype_is_as_asked(dtype: Any, tmp_path: Path) -> None:
    save(llama(dtype=torch.bfloat16), tmp_path)
    ours = load_pretrained(tmp_path, dtype=dtype)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    same_state(ours.state_dict(), theirs.state_dict())
    assert ours.config.dtype == theirs.config.dtype


def rank_into(group: Group, folder: Path, expected: dict[str, Tensor]) -> None:
    model = parallelize(llama(), group)
    before = {name: param.data_ptr() for name, param in model.named_parameters()}
    assert DistributedCheckpointLoader(folder, group).load(model) is model
    same_state(full_state_dict(model), expected)
    assert {name: param.data_ptr() for name, param in model.named_parameters()} == before
    with torch.device("meta"):
        empty = llama()
    # The rotary buffer of a model made on meta is in no file.
    with pytest.raises(CheckpointError, match=r"inv_freq.* left without memory"):
        DistributedCheckpointLoader(folder, group).load(parallelize(empty, group))


def test_loader_fills_an_existing_model_in_place(tmp_path: Path) -> None:
    other = llama()
    with torch.no_grad():
        for param in other.parameters():
            param.mul_(-2)
    save(other, tmp_path)
    dense = DistributedCheckpointLoader(tmp_path).load(llama())
    same_state(dense.state_dict(), other.state_dict())
    simulate(rank_into, 2, tmp_path, other.state_dict())


def edit(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def no_folder(folder: Path) -> None:
    shutil.rmtree(folder)


def no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def bad_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def unknown_model(folder: Path) -> None:
    edit_config(folder, model_type="nonesuch", architectures=["NonesuchForCausalLM"])


def two_kinds_of_model(folder: Path) -> None:
    edit_config(folder, model_type="clip")


def remote_code(folder: Path) -> None:
    edit_config(folder, model_type="odd", auto_map={"AutoConfig": "evil.Config"})
    (folder / "evil.py").write_text("raise SystemExit('ran')")


def quantized(folder: Path) -> None:
    edit_config(folder, quantization_config={"quant_method": "gptq", "bits": 4})


def no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def truncated(folder: Path) -> None:
    path = folder / "model.safetensors"
    os.truncate(path, path.stat().st_size - 10)


def missing(folder: Path) -> None:
    edit(folder, lambda t: [t.pop(name) for name in ("model.norm.weight", "lm_head.weight")])


def extra(folder: Path) -> None:
    edit(folder, lambda t: t.update(stray=torch.ones(2)))


def wrong_shape(folder: Path) -> None:
    edit(folder, lambda t: t.update({"model.norm.weight": torch.ones(47)}))


def wrong_dtype(folder: Path) -> None:
    edit(folder, lambda t: t.update({"model.norm.weight": torch.ones(48, dtype=torch.int32)}))


BAD: list[tuple[Callable[[Path], None], str]] = [
    (no_folder, "no such folder"),
    (no_config, "no config.json"),
    (bad_config, "config.json: not readable"),
    (unknown_model, "nonesuch"),
    (two_kinds_of_model, "architectures .'LlamaForCausalLM'. do not belong to model_type 'clip'"),
    (remote_code, "config.json: not readable"),
    (quantized, "quantized weights are not supported"),
    (no_weights, "no model.safetensors"),
    (truncated, r"truncated: tensor .* need \d+ bytes, have \d+"),
    (missing, "no weight was loaded. 2 missing: model.norm.weight, lm_head.weight"),
    (extra, "1 unexpected: stray"),
    (wrong_shape, r"model.norm.weight: shape \[47\] on file, expected \[48\]"),
    (wrong_dtype, r"model.norm.weight: dtype torch.int32 on file, expected torch.float32"),
]


def rank_error(group: Group, folder: Path) -> str:
    try:
        load_pretrained(folder, group)
    except CheckpointError as error:
        return str(error)
    return "loaded"


@pytest.mark.parametrize(("spoil", "words"), BAD, ids=lambda value: getattr(value, "__name__", ""))
def test_a_bad_folder_is_one_error_on_every_rank(
    spoil: Callable[[Path], None], words: str, tmp_path: Path
) -> None:
    save(llama(), tmp_path / "model")
    spoil(tmp_path / "model")
    with pytest.raises(CheckpointError, match=words) as alone:
        load_pretrained(tmp_path / "model")
    assert simulate(rank_error, 2, tmp_path / "model") == [str(alone.value)] * 2


def rank_own_folder(group: Group, folders: list[Path]) -> str:
    return rank_error(group, folders[group.rank])


def test_one_ranks_error_reaches_the_others(tmp_path: Path) -> None:
    good, bad = save(llama(), tmp_path / "good"), save(llama(), tmp_path / "bad")
    missing(bad)
    first, second = simulate(rank_own_folder, 2, [good, bad])
    assert first == second
    assert "bad does not fit" in first


def test_all_names_are_listed_up_to_fifty(tmp_path: Path) -> None:
    save(llama(), tmp_path)
    edit(tmp_path, lambda t: t.update({f"stray{i:02d}": torch.ones(1) for i in range(60)}))
    with pytest.raises(CheckpointError, match=r"60 unexpected: stray00, .*stray49 and 10 more"):
        load_pretrained(tmp_path)


def test_old_buffers_and_ignored_names_may_be_there(tmp_path: Path) -> None:
    save(llama(), tmp_path)
    key = "model.layers.0.self_attn.rotary_emb.inv_freq"
    edit(tmp_path, lambda t: t.update({key: torch.ones(4)}))
    load_pretrained(tmp_path)


def test_a_base_models_keys_without_prefix_are_found(tmp_path: Path) -> None:
    dense = llama(tied=True)
    save(dense, tmp_path)
    dense.model.save_pretrained(tmp_path / "base")
    shutil.copy(tmp_path / "base" / "model.safetensors", tmp_path / "model.safetensors")
    same_state(load_pretrained(tmp_path).state_dict(), dense.state_dict())


def test_tied_names_with_unlike_values_are_refused(tmp_path: Path) -> None:
    save(llama(tied=True), tmp_path)
    weight = "model.embed_tokens.weight"
    edit(tmp_path, lambda t: t.update({"lm_head.weight": t[weight].clone()}))
    load_pretrained(tmp_path)
    edit(tmp_path, lambda t: t.update({"lm_head.weight": t[weight] + 1}))
    with pytest.raises(CheckpointError, match=r"tied to another tensor.*differ on file"):
        load_pretrained(tmp_path)


def rank_of_many(group: Group, folder: Path) -> Tensor:
    logits: Tensor = load_pretrained(folder, group)(tokens()).logits
    return logits


def test_more_ranks_than_key_value_heads_share_them(tmp_path: Path) -> None:
    dense = llama()
    expected = dense(tokens()).logits
    for logits in simulate(rank_of_many, 5, save(dense, tmp_path)):
        assert relative(logits, expected) <= 1e-5


def test_missing_transformers_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save(llama(), tmp_path / "model")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(CheckpointError, match=r"transformers is not installed.*\[hf\]"):
        load_pretrained(folder)
