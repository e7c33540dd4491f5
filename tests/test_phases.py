"""A rank that is killed while a model loads, trains, generates or is saved: the other one learns
it at once.
"""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
import tp_native as tp
from harness import World
from tp_native.checkpoint import items, reader
from tp_native.group import Group

VICTIM = 1


def die(*_: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def run_until_death(group: Group, phase: str, folder: str) -> tuple[str, int, float]:
    is_victim = group.rank == VICTIM
    if phase == "load" and is_victim:
        reader.SafetensorsFile._pread = die  # type: ignore[assignment]
    try:
        model = tp.load_pretrained(folder, group)
        assert phase != "load", "nobody died"
        if phase == "train":
            for step in range(100):
                loss = model(tiny.tokens(), labels=tiny.tokens()).loss
                if is_victim and step == 3:
                    die()
                loss.backward()
        if phase == "generate":
            tokens: list[torch.Tensor] = []

            def on_token(ids: torch.Tensor) -> None:
                tokens.append(ids)
                if is_victim and len(tokens) == 3:
                    die()

            tp.generate(model, tiny.tokens(), 40, on_token=on_token)
        if phase == "save":
            if is_victim:
                items.full_of = die  # type: ignore[assignment]
            tp.save_pretrained(model, folder)
    except tp.PeerLostError as error:
        return str(error), error.peer, time.monotonic()
    raise AssertionError(f"{phase} went on without rank {VICTIM}")


@pytest.mark.parametrize("phase", ["load", "train", "generate", "save"])
def test_a_death_in_any_phase_is_named(phase: str, tmp_path: Path) -> None:
    folder = tiny.save(tiny.llama(), tmp_path / "model")
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    world = World(2)
    try:
        world.start(run_until_death, phase, str(folder))
        survivor, dead = world.outcomes(30)
        assert dead is None
        assert survivor is not None and survivor.error is None, survivor
        text, peer, _ = survivor.result
        assert peer == VICTIM and "rank 1 (pid" in text and "died" in text
    finally:
        world.kill()
    assert [p.name for p in tmp_path.iterdir()] == ["model"]  # no temporary file
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
