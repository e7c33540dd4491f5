"""Flight records: what a failure leaves behind, and what ``tp-native blame`` makes of it."""

from __future__ import annotations

import json
import os
import re
import signal
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import tp_native as tp
from harness import World
from tp_native import config, flight
from tp_native.group import Group


def fails_after(group: Group, steps: int, culprit: int) -> str:
    """``steps`` collectives, then one that rank ``culprit`` does not enter alike."""
    for step in range(steps):
        group.all_reduce_(torch.ones(4, 8 + step % 3))
    try:
        if group.rank == culprit:
            group.all_gather(torch.ones(3, dtype=torch.int64), 0)
        else:
            group.all_reduce_(torch.ones(4, 8), "max")
    except tp.TensorParallelError as error:
        return str(error)
    return "nothing happened"


def waits(group: Group) -> str:
    """Barriers until rank 1 dies before the third."""
    group.all_reduce_(torch.ones(5))
    group.broadcast_(torch.ones(7, dtype=torch.bfloat16), 1)
    try:
        for step in range(1000):
            if group.rank == 1 and step == 2:
                os.kill(os.getpid(), signal.SIGKILL)
            group.barrier()
    except tp.TensorParallelError as error:
        return str(error)
    return "nothing happened"


def blame(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tp_native", "blame", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def records_of(folder: Path, size: int, act: Any) -> tuple[dict[str, Any], Path, list[str]]:
    world = World(size, env=[{"TP_NATIVE_FLIGHT_DIR": str(folder)}] * size)
    try:
        texts = act(world)
    finally:
        world.kill()
    files = list(folder.iterdir())
    assert len(files) == 1, files  # one for the failure, no draft
    assert stat.S_IMODE(files[0].stat().st_mode) == 0o600
    for text in texts:  # every survivor says where it is
        assert f"flight record: {files[0]} (tp-native blame {files[0]})" in text
    return flight.read(files[0]), files[0], texts


def test_a_mismatch_is_told_with_the_operations_of_all_ranks(tmp_path: Path) -> None:
    record, file, _ = records_of(tmp_path, 3, lambda w: w.run(fails_after, 1500, 1))
    assert record["failure"]["kind"] == "mismatch" and record["failure"]["culprit"] == 1
    assert [rank["rank"] for rank in record["ranks"]] == [0, 1, 2]
    last = 1500 + 2  # the barrier of init is the first
    for rank in record["ranks"]:
        operations = rank["operations"]
        assert [op["seq"] for op in operations] == list(range(last - 1023, last + 1))
        assert all(op["end_s"] is not None for op in operations[:-1])
        assert operations[-1]["end_s"] is None  # nobody left the last one
        starts = [op["start_s"] for op in operations]
        assert starts == sorted(starts) and -60 < starts[0] < starts[-1] <= 0
    entered = [rank["operations"][-1] for rank in record["ranks"]]
    assert [op["op"] for op in entered] == ["all_reduce", "all_gather", "all_reduce"]
    assert entered[0]["shape"] == [4, 8] and entered[0]["reduce"] == "max"
    assert entered[1]["dtype"] == "int64" and entered[1]["dim"] == 0
    told = blame(file)
    assert told.returncode == 0 and told.stderr == ""
    assert "mismatch, culprit rank 1" in told.stdout
    assert f"the ranks part at #{last}:" in told.stdout
    assert "rank 1: all_gather(int64 [9], dim 0)" in told.stdout
    assert len(blame(file, "--last", 1).stdout.splitlines()) < len(told.stdout.splitlines())


def test_the_dead_ranks_operations_are_there_too(tmp_path: Path) -> None:
    def act(world: World) -> list[str]:
        world.start(waits)
        return [o.result for o in world.outcomes(20) if o is not None]

    record, file, texts = records_of(tmp_path, 2, act)
    pid = record["ranks"][1]["pid"]
    assert record["failure"]["kind"] == "peer_lost" and record["failure"]["culprit"] == 1
    dead = record["ranks"][1]["operations"]
    names = ["barrier", "all_reduce", "broadcast", "barrier", "barrier"]
    assert [op["op"] for op in dead] == names
    assert dead[2]["dtype"] == "bfloat16" and dead[2]["root"] == 1
    assert re.search(rf"rank 1 \(pid {pid}\) died after barrier #5", texts[0])
    told = blame(file).stdout
    assert f"1     {pid}" in told and "the ranks agree in all" in told


def dies_or_looks(group: Group, folder: str) -> int:
    if group.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    with pytest.raises(tp.PeerLostError):
        group.barrier()
    return len(list(Path(folder).glob("flight-*.json")))


def test_the_record_is_there_when_the_rank_that_writes_it_raises(tmp_path: Path) -> None:
    slow = {"TP_NATIVE_FLIGHT_DIR": str(tmp_path), "TP_NATIVE_FAULT": "flight.write:1:delay=300"}
    world = World(2, env=[slow] * 2, fresh=True)
    try:
        world.start(dies_or_looks, str(tmp_path))
        survivor, _ = world.outcomes(30)
        assert survivor is not None and survivor.result == 1, survivor and survivor.text
    finally:
        world.kill()


def test_the_place_can_be_chosen_or_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TP_NATIVE_FLIGHT_DIR", "")
    assert config.flight_folder() == ""
    monkeypatch.delenv("TP_NATIVE_FLIGHT_DIR")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert config.flight_folder() == str(tmp_path / "tp_native")
    world = World(2, env=[{"TP_NATIVE_FLIGHT_DIR": ""}] * 2)
    try:
        assert all("flight" not in text for text in world.run(fails_after, 1, 0))
    finally:
        world.kill()


def test_a_folder_that_cannot_be_written_hides_no_error(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    world = World(2, env=[{"TP_NATIVE_FLIGHT_DIR": str(blocked / "folder")}] * 2)
    try:
        texts = world.run(fails_after, 1, 0)
        assert all("the ranks entered different collectives" in text for text in texts)
    finally:
        world.kill()


def test_old_records_go(tmp_path: Path) -> None:
    for age in range(flight.KEPT + 8):
        file = tmp_path / f"flight-{age}.json"
        file.write_text("{}")
        os.utime(file, (1000 - age, 1000 - age))
    (tmp_path / "other.json").write_text("")
    flight.prune(str(tmp_path))
    flight.prune(str(tmp_path / "missing"))
    flight.prune("")
    left = {file.name for file in tmp_path.iterdir()}
    assert left == {"other.json", *(f"flight-{age}.json" for age in range(flight.KEPT))}


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("{", "is no flight record"),
        ("[]", "is no flight record"),
        ('{"format": "tp_native flight record", "version": 9}', "of version 9"),
        ('{"format": "tp_native flight record", "version": 1}', "damaged flight record"),
        ("\xff", "is no flight record"),
    ],
)
def test_what_is_no_record_is_refused(tmp_path: Path, text: str, complaint: str) -> None:
    file = tmp_path / "x.json"
    file.write_bytes(text.encode("latin-1"))
    told = blame(file)
    assert told.returncode == 2 and complaint in told.stderr and told.stdout == ""


def test_blame_explains_a_missing_file_and_a_bad_count(tmp_path: Path) -> None:
    told = blame(tmp_path / "none.json")
    assert told.returncode == 1 and "none.json" in told.stderr
    (tmp_path / "r.json").write_text(
        json.dumps({"format": "tp_native flight record", "version": 1})
    )
    assert "--last -1" in blame(tmp_path / "r.json", "--last", "-1").stderr
