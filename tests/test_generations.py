"""Groups made anew after a failure, by the processes that lived and those that replace the lost."""

from __future__ import annotations

import pickle
import signal
import time
import uuid

import psutil
import pytest
import torch

import tp_native as tp
from harness import World
from tp_native.group import Group


def same_job(size: int, **args: float) -> tuple[World, dict[str, str]]:
    env = {"TORCHELASTIC_RUN_ID": uuid.uuid4().hex}
    return World(size, env=[env] * size, **args), env


def reduced(group: Group, layer: tp.RowParallelLinear) -> float:
    """Sums of many sizes; the value of a layer's output, the same on all ranks."""
    for count in (3, 1000, 100_000):
        shared = group.empty_shared(count).fill_(group.rank + 1)
        total = group.size * (group.size + 1) / 2
        assert torch.equal(group.all_reduce_(shared), torch.full((count,), total))
    with torch.no_grad():
        layer.weight.fill_(1)
        return float(layer(torch.ones(5, layer.local_in_features))[0, 0])


def lives_on(group: Group, until: int) -> tuple[str, int, str, float]:
    """Collectives until the group fails, then those of ``until`` generations."""
    layer = tp.RowParallelLinear(600, 30, bias=False, group=group)
    kept = group.empty_shared(5000).fill_(float(group.size))
    if group.generation == 0:
        group.all_reduce_(kept.fill_(1.0))
    told = "nobody died"
    while group.generation < until:
        try:
            group.barrier()
            time.sleep(1e-4)
        except tp.TensorParallelError as error:
            told = type(error).__name__ + f" {error.peer}"
            assert group.renew(20) is group
    assert torch.equal(kept, torch.full((5000,), float(group.size)))
    return told, group.generation, group.name, reduced(group, layer)


def replaces(group: Group) -> tuple[str, int, str, float]:
    layer = tp.RowParallelLinear(600, 30, bias=False, group=group)
    return "came later", group.generation, group.name, reduced(group, layer)


@pytest.mark.parametrize(("size", "lost"), [(2, 1), (2, 0), (3, 1)])
def test_survivors_go_on_with_a_replacement(size: int, lost: int) -> None:
    world, env = same_job(size)
    later: list[World] = []
    try:
        world.meet()
        world.start(lives_on, 2)
        for generation in (1, 2):  # twice: the replacement dies too
            time.sleep(0.4)
            (later[-1] if later else world).signal(0 if later else lost, signal.SIGKILL)
            later.append(World(size, ranks=[lost], env=[env]))
            later[-1].meet()
            later[-1].start(*((lives_on, 2) if generation == 1 else (replaces,)))
        found = [*world.outcomes(), *later[-1].outcomes()]
        results = [outcome.result for outcome in found if outcome is not None]
        assert len(results) == size
        for told, generation, name, value in results:
            assert told in (f"PeerLostError {lost}", "came later")
            assert (generation, name, value) == (2, "tp:2", 600.0)
    finally:
        for each in (world, *later):
            each.kill()


def writes_on(group: Group) -> str:
    try:
        while True:
            group.all_reduce_(group.empty_shared(50_000).fill_(-1.0))
    except tp.TensorParallelError as error:
        return f"{type(error).__name__} {error.peer}"


def goes_on_without_the_frozen(group: Group) -> tuple[str, int]:
    told = writes_on(group)
    group.renew(20)
    for _ in range(300):  # the stopped rank is woken up meanwhile
        t = group.empty_shared(50_000).fill_(1.0)
        assert torch.equal(group.all_reduce_(t), torch.full((50_000,), 2.0))
        time.sleep(1e-3)
    return told, group.generation


def test_a_stopped_rank_cannot_reach_the_generation_after_it() -> None:
    world, env = same_job(2, frozen_timeout_s=1.0)
    later = None
    try:
        world.meet()
        world.pipes[1].send_bytes(pickle.dumps((__name__, "writes_on", ())))
        world.pipes[0].send_bytes(pickle.dumps((__name__, "goes_on_without_the_frozen", ())))
        time.sleep(1.0)
        world.signal(1, signal.SIGSTOP)
        later = World(2, ranks=[1], env=[env], frozen_timeout_s=1.0)
        time.sleep(1.5)  # rank 0 has given rank 1 up and waits for a new one
        later.start(joins_the_next)
        time.sleep(0.8)
        world.signal(1, signal.SIGCONT)
        first, second = world.outcomes(30)
        assert first is not None and second is not None
        told, generation = first.result
        assert (told, generation) == ("PeerLostError 1", 1), first.text
        assert second.result == "PeerLostError 1"  # it learns that it was given up
        assert later.results() == [1]
    finally:
        world.kill()
        if later is not None:
            later.kill()


def joins_the_next(group: Group) -> int:
    for _ in range(300):
        t = group.empty_shared(50_000).fill_(1.0)
        assert torch.equal(group.all_reduce_(t), torch.full((50_000,), 2.0))
    return group.generation


def renews_after_a_mismatch(group: Group) -> tuple[str, int]:
    try:
        group.all_reduce_(torch.ones(3 + group.rank))
    except tp.CollectiveMismatchError:
        group.renew(10)
    assert group.all_reduce_(torch.ones(3)).tolist() == [float(group.size)] * 3
    return group.name, group.generation


def test_nobody_need_die_for_a_new_generation() -> None:
    world = World(3)
    try:
        assert world.run(renews_after_a_mismatch) == [("tp:1", 1)] * 3
        assert world.run(renews_after_a_mismatch) == [("tp:2", 2)] * 3
    finally:
        world.kill()


def renews_in_vain(group: Group) -> list[str]:
    told = []
    try:
        while True:
            group.barrier()
    except tp.PeerLostError:
        pass
    for _ in range(2):
        try:
            group.renew(0.4)
        except tp.TensorParallelError as error:
            told.append(str(error))
    try:
        group.all_reduce_(torch.ones(2))
    except tp.TensorParallelError as error:
        told.append(str(error))
    return told


def test_renewing_without_a_replacement_names_the_missing_and_can_be_tried_again() -> None:
    world = World(2)
    try:
        world.meet()
        world.start(renews_in_vain)
        time.sleep(0.5)
        world.signal(1, signal.SIGKILL)
        told = world.outcomes(20)[0]
        assert told is not None and told.error is None, told
        first, second, closed = told.result
        assert first.startswith("ranks missing: 1 after 0.4 s") and second == first
        assert "no group" in closed or "closed" in closed
    finally:
        world.kill()


def renews_what_is_closed(group: Group) -> None:
    group.close()
    with pytest.raises(tp.TensorParallelError, match="is closed"):
        group.renew(1.0)


def test_a_group_of_threads_or_one_says_what_it_cannot() -> None:
    def renews(group: Group) -> None:
        with pytest.raises(ValueError, match="only one whose ranks share a host"):
            group.renew()

    tp.simulate(renews, 2)

    world = World(2)
    try:
        world.run(renews_what_is_closed)
    finally:
        world.kill()
    with tp.init_tensor_parallel() as alone:
        assert alone.renew() is alone


def test_nothing_of_the_old_generation_stays_open() -> None:
    world = World(2)
    try:
        world.run(renews_after_a_mismatch)
        before = [psutil.Process(p.pid).num_fds() for p in world.processes]
        for _ in range(5):
            world.run(renews_after_a_mismatch)
        assert [psutil.Process(p.pid).num_fds() for p in world.processes] == before
    finally:
        world.kill()
