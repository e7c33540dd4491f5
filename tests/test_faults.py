"""What a rank sees when another dies, leaves, never comes or calls something else."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

import psutil
import pytest
import torch

import tp_native as tp
from harness import World, has_met, run_ranks
from tp_native.group import Group


def shared_memory_names() -> list[str]:
    return sorted(os.listdir("/dev/shm"))


def loops_until_told(group: Group, op: str) -> dict[str, Any]:
    """Collectives for ever; what ended them, and when (CLOCK_MONOTONIC is the machine's)."""
    layer = tp.RowParallelLinear(64, 600, group=group)
    x = torch.ones(8, layer.local_in_features)
    small, large = torch.ones(100), torch.ones(200_000)
    try:
        while True:
            if op == "all_reduce":
                group.all_reduce_(small)
                group.all_reduce_(large)
            elif op == "all_gather":
                group.all_gather(large)
            elif op == "broadcast":
                group.broadcast_(large, group.size - 1)
            elif op == "barrier":
                group.barrier()
            else:
                layer(x)
    except tp.TensorParallelError as error:
        at = time.monotonic()
        again = ""
        try:
            group.all_reduce_(small)
        except tp.TensorParallelError as second:
            again = str(second)
        return {
            "at": at,
            "type": type(error).__name__,
            "text": str(error),
            "again": again,
            "op": error.op,
            "peer": error.peer,
            "rank": error.rank,
            "seq": error.seq,
        }


KILLS = [
    (2, op, 1)
    for op in ("all_reduce", "all_gather", "broadcast", "barrier", "row_parallel_linear") * 3
]
KILLS += [
    (3, "all_reduce", 0),
    (3, "row_parallel_linear", 2),
    (4, "all_reduce", 1),
    (4, "barrier", 0),
    (4, "all_gather", 3),
]


@pytest.mark.timeout(300)  # starts 48 processes that import torch
def check_kill(world: World, victim: int, op: str = "all_reduce") -> list[dict[str, Any]]:
    """Kill ``victim`` amid ``op``; what the others were told, and ``after_s`` how long."""
    world.start(loops_until_told, op)
    time.sleep(0.3)
    killed_at = time.monotonic()
    world.signal(victim, signal.SIGKILL)
    told = []
    for rank, outcome in enumerate(world.outcomes(20)):
        if rank == victim:
            assert outcome is None
            continue
        assert outcome is not None
        found = outcome.result
        assert found["type"] == "PeerLostError", found
        assert found["peer"] == victim and found["rank"] == rank, found
        assert found["op"] == op and found["seq"] > 0 and op in found["text"], found
        assert f"rank {victim} " in found["text"] and "died" in found["text"], found
        assert found["again"] == found["text"]  # poisoned: the same record
        found["after_s"] = found["at"] - killed_at
        assert found["after_s"] < 10, found
        told.append(found)
    return told


def test_20_sigkills_inside_collectives_are_named_within_100_ms() -> None:
    before = shared_memory_names()
    delays = []
    assert len(KILLS) == 20
    for size, op, victim in KILLS:
        world = World(size)
        try:
            world.meet()
            for found in check_kill(world, victim, op):
                assert f"rank {victim} (pid {world.processes[victim].pid}) died" in found["text"]
                delays.append(found["after_s"])
        finally:
            world.kill()
    assert max(delays) <= 0.1, sorted(delays)[-5:]
    assert shared_memory_names() == before


def sleeps(group: Group) -> None:
    time.sleep(60)


def test_a_death_outside_any_collective_is_reported_by_the_next_one() -> None:
    world = World(2)
    try:
        world.meet()
        world.signal(1, signal.SIGKILL)
        world.processes[1].wait()
        time.sleep(0.2)
        world.start(loops_until_told, "barrier")
        outcome = world.outcomes(20)[0]
        assert outcome is not None and outcome.result["type"] == "PeerLostError"
    finally:
        world.kill()


def leaves_early(group: Group) -> str:
    if group.rank == 1:
        group.close()
        return "left"
    with pytest.raises(tp.PeerLostError, match=r"rank 1 \(pid \d+\) left the group") as info:
        group.all_reduce_(torch.ones(4))
    return str(info.value)


def test_a_rank_that_leaves_is_named() -> None:
    world = World(2)
    try:
        assert world.run(leaves_early)[1] == "left"
    finally:
        world.kill()


def raises_inside_with(group: Group) -> None:
    with group:
        if group.rank == 0:
            raise KeyError("no such thing")
        group.barrier()


def test_an_exception_on_one_rank_reaches_the_others_with_its_reason() -> None:
    world = World(2)
    try:
        world.start(raises_inside_with)
        first, second = world.outcomes(20)
        assert first is not None and second is not None
        assert isinstance(first.error, KeyError)
        assert isinstance(second.error, tp.TensorParallelError)
        assert "rank 0 aborted the group: KeyError: 'no such thing'" in str(second.error)
    finally:
        world.kill()


def call(group: Group, what: str) -> None:
    t = torch.ones(6)
    cut = tp.Partition.from_sizes
    calls = {
        "float32": lambda: group.all_reduce_(t),
        "int32": lambda: group.broadcast_(t.int()),
        "two by three": lambda: group.all_reduce_(t.view(2, 3)),
        "three by two": lambda: group.all_reduce_(t.view(3, 2)),
        "float16": lambda: group.all_reduce_(torch.ones(6, dtype=torch.float16)),
        "bfloat16": lambda: group.all_reduce_(torch.ones(6, dtype=torch.bfloat16)),
        "max": lambda: group.all_reduce_(t, "max"),
        "avg": lambda: group.all_reduce_(t, "avg"),
        "broadcast": lambda: group.broadcast_(t),
        "broadcast from 1": lambda: group.broadcast_(t, 1),
        "gather": lambda: group.all_gather(t),
        "gather, other sizes": lambda: group.all_gather(t[: 6 - group.rank], 0, cut([6, 5])),
        "barrier": lambda: group.barrier(),
        "shared": lambda: group.all_reduce_(group.empty_shared(2000)),
        "shared, longer": lambda: group.all_reduce_(group.empty_shared(2001)),
        "linear": lambda: torch.ops.tp_native.row_parallel_linear(
            torch.ones(2, 3), torch.ones(3, 3), None, group.order, [3, 3], group.name
        ),
    }
    calls[what]()


def mismatch_matrix(names: list[str]) -> None:
    for i, first in enumerate(names):
        for second in names[i + 1 :]:
            caught: list[str] = []

            def run(group: Group, pair: tuple[str, str], caught: list[str]) -> None:
                with pytest.raises(
                    tp.CollectiveMismatchError, match="entered different collectives"
                ) as info:
                    call(group, pair[group.rank])
                assert "rank 0 " in str(info.value) and "rank 1 " in str(info.value)
                caught.append(str(info.value))

            tp.simulate(run, 2, (first, second), caught)
            assert len(caught) == 2, (first, second)  # on both ranks


def test_every_pair_of_unlike_calls_is_a_mismatch_on_both_ranks() -> None:
    names = [
        "float32",
        "int32",
        "two by three",
        "three by two",
        "float16",
        "bfloat16",
        "max",
        "avg",
        "broadcast",
        "broadcast from 1",
        "gather",
        "gather, other sizes",
        "barrier",
        "shared",
        "shared, longer",
        "linear",
    ]
    mismatch_matrix(names)


def mismatched(group: Group, pair: tuple[str, str]) -> tuple[str, float]:
    group.barrier()
    start = time.monotonic()
    with pytest.raises(tp.CollectiveMismatchError) as info:
        call(group, pair[min(group.rank, 1)])
    return str(info.value), time.monotonic() - start


@pytest.mark.parametrize("size", [2, 3])
def test_processes_report_a_mismatch_with_both_sides(size: int) -> None:
    world = World(size)
    try:
        for text, _ in world.run(mismatched, ("float16", "bfloat16")):
            assert (
                "rank 0 all_reduce(sum, float16 [6])" in text
                and "rank 1 all_reduce(sum, bfloat16 [6])" in text
            )
    finally:
        world.kill()


def one_rank_skips(group: Group) -> str:
    if group.rank == 1:
        time.sleep(1.0)
        return ""
    with pytest.raises(
        tp.CollectiveTimeoutError, match=r"rank 1 \(pid \d+\) did not come within 0.5 s"
    ) as info:
        group.barrier(timeout_s=0.5)
    return str(info.value)


def test_a_late_rank_is_named_with_the_table_of_ranks() -> None:
    world = World(2)
    try:
        text = world.run(one_rank_skips)[0]
        assert "1 last called barrier" in text or "1 has called nothing yet" in text, text
    finally:
        world.kill()


def test_a_missing_rank_is_named_at_the_deadline() -> None:
    for present, missing in ((0, 1), (1, 0)):
        start = time.monotonic()
        world = World(3, ranks=[present, 2], init_timeout_s=1.0)
        try:
            world.start(has_met)
            for outcome in world.outcomes(20):
                assert outcome is not None and isinstance(outcome.error, tp.TensorParallelError), (
                    outcome
                )
                assert f"ranks missing: {missing}" in str(outcome.error)
            assert time.monotonic() - start < 15
        finally:
            world.kill()


def refusals(world: World) -> list[str]:
    world.start(has_met)
    texts = []
    for outcome in world.outcomes(20):
        assert outcome is not None and isinstance(outcome.error, tp.TensorParallelError), outcome
        texts.append(str(outcome.error))
    world.kill()
    return texts


def test_wrong_world_sizes_and_duplicate_ranks_are_refused_on_both_sides() -> None:
    sizes = {"WORLD_SIZE": "3", "LOCAL_WORLD_SIZE": "3"}
    for text in refusals(World(2, env=[{}, sizes], init_timeout_s=5.0)):
        assert "was started with world size 3, rank 0" in text
    for text in refusals(World(3, ranks=[0, 1, 1], init_timeout_s=5.0)):
        assert "two processes say that they are rank 1" in text
    texts = refusals(World(2, ranks=[0, 0], init_timeout_s=1.5))
    assert any("another process is rank 0 of this job already" in text for text in texts)


def interrupted(group: Group) -> str:
    if group.rank == 0:
        with pytest.raises(KeyboardInterrupt):
            group.barrier()
        return "interrupted"
    time.sleep(1.0)
    with pytest.raises(tp.PeerLostError, match="rank 0 was interrupted by a signal") as info:
        group.barrier()
    return str(info.value)


def test_ctrl_c_ends_a_wait_and_tells_the_peers() -> None:
    world = World(2)
    try:
        world.meet()
        world.start(interrupted)
        time.sleep(0.3)
        world.signal(0, signal.SIGINT)
        assert world.results(20)[0] == "interrupted"
    finally:
        world.kill()


def test_ranks_end_by_themselves_and_leave_nothing() -> None:
    before = shared_memory_names()
    world = World(2)
    world.meet()
    assert world.stop() == [0, 0]
    assert shared_memory_names() == before
    assert not psutil.Process().children() or all(
        p.status() != psutil.STATUS_ZOMBIE for p in psutil.Process().children()
    )


def total(group: Group) -> float:
    return float(group.all_reduce_(torch.tensor([1.0 + group.rank])))


def child_after_fork(group: Group) -> int:
    held = group.all_reduce_(group.empty_shared(4000).fill_(1.0))
    pid = os.fork()
    if pid == 0:
        try:
            group.all_reduce_(torch.ones(3))
        except tp.TensorParallelError as error:
            del held
            group.abort("from the child")  # neither does anything here
            group.close()
            mine = tp.simulate(total, 2)
            os._exit(6 if mine != [3.0, 3.0] else 7 if "before fork()" in str(error) else 8)
        os._exit(9)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    group.all_reduce_(held)
    assert torch.equal(held, torch.full((4000,), 4.0))
    return status


def test_a_forked_child_is_refused_and_does_no_harm() -> None:
    assert run_ranks(child_after_fork, 2) == [7, 7]


def waits_for_others(group: Group) -> dict[str, Any]:
    group.all_reduce_(torch.ones(3))
    if group.rank == 0:
        return {**loops_until_told(group, "barrier"), "log": []}
    return {**loops_until_told(group, "barrier"), "log": []}


@pytest.mark.parametrize("size", [2, 3])
def test_a_frozen_rank_is_warned_of_and_then_given_up(size: int, tmp_path: Any) -> None:
    logs = [tmp_path / f"{rank}.log" for rank in range(size)]
    world = World(size, frozen_timeout_s=2.5, env=[{"TPN_TEST_LOG": str(log)} for log in logs])
    try:
        world.meet()
        world.start(logs_warnings_until_told)
        time.sleep(0.7)
        stopped_at = time.monotonic()
        world.signal(1, signal.SIGSTOP)
        time.sleep(3.2)
        world.signal(1, signal.SIGKILL)  # it cannot answer the harness
        for rank, outcome in enumerate(world.outcomes(20)):
            if rank == 1:
                continue
            assert outcome is not None
            found = outcome.result
            assert (found["type"], found["peer"]) == ("PeerLostError", 1), found
            assert "is frozen" in found["text"] and "process state T" in found["text"]
            assert found["at"] - stopped_at <= 2.5 + 0.5
            warned_at, text = logs[rank].read_text().split(" ", 1)
            assert float(warned_at) - stopped_at <= 2.0
            assert "rank 1" in text and "is frozen" in text and "given up after 2.5 s" in text
    finally:
        world.kill()


def logs_warnings_until_told(group: Group) -> dict[str, Any]:
    import logging

    class Log(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            with open(os.environ["TPN_TEST_LOG"], "a") as file:
                file.write(f"{time.monotonic()} {record.getMessage()}\n")

    logging.getLogger("tp_native").addHandler(Log())
    return loops_until_told(group, "all_reduce")


def holds_the_gil(group: Group) -> bool:
    """Busy in one C call for longer than the limit, without ever giving the interpreter away."""
    if group.rank == 1:
        end = time.monotonic() + 2.5
        while time.monotonic() < end:
            sum(range(3_000_000))
    group.barrier()
    return True


def test_a_busy_rank_is_not_frozen() -> None:
    world = World(2, frozen_timeout_s=1.0)
    try:
        assert world.run(holds_the_gil) == [True, True]
    finally:
        world.kill()


def steps(group: Group, count: int, slow: int, work_s: float) -> tuple[list[float], str]:
    import io
    import logging

    text = io.StringIO()
    logging.getLogger("tp_native").addHandler(logging.StreamHandler(text))
    t = torch.ones(64)
    for _ in range(count):
        time.sleep(work_s * (2 if group.rank == slow else 1))  # not work: the cores may be taken
        group.all_reduce_(t)
    return group.stats()["late_share"], text.getvalue()


def test_a_rank_half_as_fast_is_named_within_50_steps() -> None:
    world = World(2)
    try:
        (share, text), (_, silent) = world.run(steps, 50, 1, 0.02)
        assert share[1] > 0.3 > share[0]
        assert text.count("is slow") == 1 and "rank 1 (pid" in text and silent == ""
        (share, text), _ = world.run(steps, 50, -1, 0.02)
        assert "rank 1" not in text.partition("\n")[2]
    finally:
        world.kill()
