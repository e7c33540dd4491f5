"""The protocol's fault points: listed where they are, and armed by TP_NATIVE_FAULT."""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest
import torch

import tp_native as tp
from harness import RankFailure, World
from tp_native._native import _C
from tp_native.group import Group

CSRC = Path(__file__).parents[1] / "csrc"


def test_every_point_is_known_by_name() -> None:
    used = {
        site
        for path in CSRC.rglob("*.cpp")
        for site in re.findall(r'TPN_FAULT\("([^"]+)"\)', path.read_text())
    }
    with pytest.raises(tp.TensorParallelError) as info:
        _C.arm_fault("nowhere:1:kill")
    listed = str(info.value).partition("expected one of ")[2].split(", ")
    assert used and set(listed) == used


@pytest.mark.parametrize(
    "spec",
    [
        "announce",
        "announce:1",
        "announce:0:kill",
        "announce:x:kill",
        "announce:1:burn",
        "::",
        "announce:1:delay=x",
        "announce:-1:kill",
    ],
)
def test_a_bad_spec_is_explained(spec: str) -> None:
    with pytest.raises(tp.TensorParallelError, match="fault"):
        _C.arm_fault(spec)
    _C.arm_fault("")


def reduces(group: Group, steps: int) -> tuple[float, int]:
    started = time.monotonic()
    for _ in range(steps):
        group.all_reduce_(torch.ones(70_000))
    return time.monotonic() - started, group.stats()["staged"]


def test_a_delay_delays() -> None:
    world = World(2, env=[{}, {"TP_NATIVE_FAULT": "announce:5:delay=300"}], fresh=True)
    try:
        assert all(0.3 <= elapsed < 5 for elapsed, _ in world.run(reduces, 10))
    finally:
        world.kill()


def test_a_kill_kills() -> None:
    world = World(2, env=[{}, {"TP_NATIVE_FAULT": "stage.take:3:kill"}], fresh=True)
    try:
        with pytest.raises(RankFailure) as info:
            world.run(reduces, 10)
        assert isinstance(info.value.error, tp.PeerLostError) and info.value.error.peer == 1
    finally:
        world.kill()


def test_init_without_memory_tells_need_and_have() -> None:
    world = World(
        2, env=[{"TP_NATIVE_FAULT": "arena.back:1:errno=28"}, {}], fresh=True, init_timeout_s=2
    )
    try:
        with pytest.raises(RankFailure, match=r"needs \d+ bytes for staging, \d+ may be taken"):
            world.run(reduces, 1, deadline_s=20)
    finally:
        world.kill()


def shares(group: Group) -> tuple[bool, int]:
    before = group.stats()["staged"]
    t = group.empty_shared(100_000).fill_(1.0)
    group.all_reduce_(t)
    return bool((t == group.size).all()), group.stats()["staged"] - before


def test_a_group_whose_arena_cannot_grow_goes_on_by_staging() -> None:
    fault = {"TP_NATIVE_FAULT": "arena.back:2:errno=12"}
    world = World(2, env=[{}, fault], fresh=True)
    try:
        assert world.run(shares) == [(True, 1), (True, 1)]
        assert world.run(shares) == [(True, 0), (True, 0)]
    finally:
        world.kill()
