"""Forked ranks are as good as fresh ones: environment, folder, output, exit status, signals."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import pytest
import torch

from harness import World
from tp_native.group import Group

FRESH = pytest.mark.parametrize("fresh", [False, True])


def tells(group: Group) -> tuple[int, int, str, str, int]:
    os.write(1, b"written by a rank\n")
    with group:
        sign = os.environ["TPN_TEST_SIGN"]
        return os.getpid(), os.getppid(), sign, os.getcwd(), torch.get_num_threads()


@FRESH
def test_a_rank_has_its_own_environment_our_folder_and_our_output(
    fresh: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    world = World(2, env=[{"TPN_TEST_SIGN": "left"}, {"TPN_TEST_SIGN": "right"}], fresh=fresh)
    try:
        told = world.run(tells)
        assert [sign for _, _, sign, _, _ in told] == ["left", "right"]
        for process, (pid, parent, _, folder, threads) in zip(world.processes, told, strict=True):
            assert process.pid == pid
            assert (parent == os.getpid()) == fresh
            assert (folder, threads) == (str(tmp_path), 1)
        assert world.stop() == [0, 0]
    finally:
        world.kill()
    assert capfd.readouterr().out == "written by a rank\n" * 2


def ends(group: Group, status: int) -> None:
    os._exit(status)


@FRESH
def test_exit_statuses_and_signals_pass_through(fresh: bool) -> None:
    world = World(1, fresh=fresh)
    try:
        process = world.processes[0]
        assert process.poll() is None
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.01)
        world.start(ends, 3)
        assert process.wait(20) == process.poll() == 3
        process.kill()  # too late, and no error
    finally:
        assert world.kill() == [3]
    world = World(1, fresh=fresh)
    world.signal(0, signal.SIGTERM)
    assert world.processes[0].wait(20) == -signal.SIGTERM
    assert world.kill() == [-signal.SIGTERM]


def descriptors(group: Group) -> list[str]:
    found = []
    for number in os.listdir("/proc/self/fd"):
        try:
            found.append(os.readlink(f"/proc/self/fd/{number}"))
        except FileNotFoundError:
            continue  # the one that lists
    return [name for name in found if name.startswith(("socket:", "anon_inode:[pidfd]"))]


def test_a_rank_inherits_nothing_of_the_other_ranks() -> None:
    first, second = World(1), World(1)
    try:
        assert len(first.run(descriptors)[0]) == len(second.run(descriptors)[0]) == 1  # its pipe
    finally:
        first.kill()
        second.kill()
