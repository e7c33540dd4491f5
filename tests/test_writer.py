"""Saving folders: transformers reads them back, and a path is the old folder or the new one."""

from __future__ import annotations

import copy
import json
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tiny import llama, same_state, save
from tp_native.checkpoint import writer
from tp_native.checkpoint.loader import load_pretrained
from tp_native.checkpoint.writer import CheckpointSaver, parse_bytes, save_pretrained
from tp_native.errors import CheckpointError
from tp_native.group import Group
from tp_native.parallelize import parallelize
from tp_native.simulate import simulate

WORLDS = [1, 2, 3, 4]


def rank_save(group: Group, dense: Any, folder: Path, max_shard_bytes: int) -> None:
    model = parallelize(copy.deepcopy(dense), group)
    save_pretrained(model, folder, max_shard_bytes=max_shard_bytes, group=group)


@pytest.mark.parametrize("max_shard_bytes", [10**9, 30_000, 1])
@pytest.mark.parametrize("world_size", WORLDS)
@pytest.mark.parametrize("tied", [False, True])
def test_transformers_reads_back_what_was_saved(
    tied: bool, world_size: int, max_shard_bytes: int, tmp_path: Path
) -> None:
    dense = llama(tied=tied, dtype=torch.bfloat16)
    dense.model.norm.float()  # a folder of two dtypes
    simulate(rank_save, world_size, dense, tmp_path / "out", max_shard_bytes)
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
    for name, value in dense.state_dict().items():
        assert torch.equal(back.state_dict()[name], value.to(torch.bfloat16)), name
    theirs = save(dense, tmp_path / "theirs")
    ours_config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert ours_config == json.loads((theirs / "config.json").read_text())
    assert sorted(os.listdir(tmp_path)) == ["out", "theirs"]


def rank_rebound(group: Group, dense: Any, folder: Path) -> None:
    model = parallelize(copy.deepcopy(dense), group)
    model.save_pretrained(folder, max_shard_size="30KB")
    with pytest.raises(ValueError, match="push_to_hub"):
        model.save_pretrained(folder, push_to_hub=True)


def test_transformers_save_pretrained_is_ours_after_parallelize(tmp_path: Path) -> None:
    dense = llama()
    simulate(rank_rebound, 2, dense, tmp_path / "out")
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    same_state(back.state_dict(), dense.state_dict())
    assert (tmp_path / "out" / "model.safetensors.index.json").exists()


def test_other_files_are_kept_and_stale_weights_are_not(tmp_path: Path) -> None:
    out = save(llama(), tmp_path / "out", max_shard_size="30KB")
    (out / "tokenizer.json").write_text("{}")
    (out / "docs").mkdir()
    (out / "docs" / "note.txt").write_text("mine")
    out.chmod(0o750)
    stale = out.parent / ".out.tmp-dead"
    stale.mkdir()
    (stale / "x").write_text("left by a killed save")
    CheckpointSaver(out).save(llama(tied=True))
    assert sorted(os.listdir(out)) == [
        "config.json",
        "docs",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
    ]
    assert (out / "docs" / "note.txt").read_text() == "mine"
    assert out.stat().st_mode & 0o777 == 0o750
    assert os.listdir(tmp_path) == ["out"]
    same_state(load_pretrained(out).state_dict(), llama(tied=True).state_dict())


def rank_failing_save(group: Group, dense: Any, folder: Path) -> str:
    model = parallelize(copy.deepcopy(dense), group)
    try:
        save_pretrained(model, folder, max_shard_bytes=30_000)
    except CheckpointError as error:
        return str(error)
    return "saved"


@pytest.mark.parametrize("at", ["_write_all", "sync", "_carry_over", "_swap"])
def test_a_failed_save_leaves_the_old_folder(
    at: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = llama(dtype=torch.bfloat16)
    save(old, tmp_path / "out")
    before = {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}
    calls = []

    def fail(self: object, *args: object) -> None:
        calls.append(at)
        if len(calls) >= (5 if at == "_write_all" else 1):
            raise OSError(28, "No space left on device")

    owner = writer._FileWriter if at in ("_write_all", "sync") else writer._Staging
    monkeypatch.setattr(owner, at, fail)
    results = simulate(rank_failing_save, 2, llama(), tmp_path / "out")
    assert results[0] == results[1]
    assert "saving failed: OSError: [Errno 28] No space left" in results[0]
    assert {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()} == before
    assert os.listdir(tmp_path) == ["out"]


def test_a_killed_save_leaves_one_whole_folder(tmp_path: Path) -> None:
    models = [llama(), llama(dtype=torch.bfloat16)]
    out = tmp_path / "out"
    save_pretrained(models[0], out)
    chance = random.Random(0)
    seen = set()
    for turn in range(200):
        if turn >= 15 and len(seen) == 2:
            break
        child = os.fork()
        if child == 0:
            while True:
                save_pretrained(models[1], out)
                save_pretrained(models[0], out, max_shard_bytes=30_000)
        time.sleep(chance.uniform(0.005, 0.06) * (1 + turn / 15))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        loaded = load_pretrained(out)
        kind = models[loaded.dtype == torch.bfloat16]
        seen.add(loaded.dtype)
        same_state(loaded.state_dict(), kind.state_dict())
    save_pretrained(models[0], out)
    assert os.listdir(tmp_path) == ["out"]
    assert len(seen) == 2


def test_no_room_is_said_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.statvfs

    def tight(path: Any) -> Any:
        fields = list(real(path))
        fields[4] = 1  # f_bavail
        return os.statvfs_result(fields)

    monkeypatch.setattr(os, "statvfs", tight)
    results = simulate(rank_failing_save, 2, llama(), tmp_path / "new")
    assert results[0] == results[1]
    assert "no room to save: need" in results[0]
    assert os.listdir(tmp_path) == []


def test_bad_save_arguments(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="max_shard_bytes must be an int > 0, got 0"):
        save_pretrained(llama(), tmp_path / "out", max_shard_bytes=0)
    with pytest.raises(CheckpointError, match="that is not the model's"):
        foreign = torch.optim.SGD(llama().parameters())
        CheckpointSaver(tmp_path / "out").save(llama(), foreign)
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="is not a folder"):
        save_pretrained(llama(), tmp_path / "file")
    with torch.device("meta"):
        empty = llama()
    with pytest.raises(CheckpointError, match="is on meta"):
        save_pretrained(empty, tmp_path / "out")
    assert os.listdir(tmp_path) == ["file"]


def test_sizes_in_words() -> None:
    assert parse_bytes("5GB") == 5_000_000_000
    assert parse_bytes("200 MiB") == 200 << 20
    assert parse_bytes(7) == 7
    with pytest.raises(ValueError, match="'lots'"):
        parse_bytes("lots")
