"""Groups: configuration, start, threads as ranks, ends."""

from __future__ import annotations

import contextvars
import copy
import pickle
import threading
import time

import pytest
import torch

import tp_native as tp
from harness import World, run_ranks
from tp_native.group import Group


def set_env(monkeypatch: pytest.MonkeyPatch, **values: str) -> None:
    for name in (
        "RANK",
        "WORLD_SIZE",
        "LOCAL_RANK",
        "LOCAL_WORLD_SIZE",
        "MASTER_ADDR",
        "MASTER_PORT",
    ):
        monkeypatch.delenv(name, raising=False)
    for name, value in values.items():
        monkeypatch.setenv(name, value)


def test_config_comes_from_torchruns_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    set_env(
        monkeypatch,
        RANK="3",
        WORLD_SIZE="4",
        LOCAL_RANK="1",
        LOCAL_WORLD_SIZE="2",
        TP_NATIVE_DEBUG="1",
    )
    config = tp.get_tensor_parallel_config()
    assert (config.rank, config.world_size, config.local_rank, config.local_world_size) == (
        3,
        4,
        1,
        2,
    )
    assert config.debug and config.device == torch.device("cpu")
    set_env(monkeypatch)
    alone = tp.get_tensor_parallel_config()
    assert (alone.rank, alone.world_size) == (0, 1)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"RANK": "x"}, "environment variable RANK is 'x', expected an integer"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "expected 0 <= RANK < WORLD_SIZE"),
        ({"WORLD_SIZE": "0"}, "expected 0 <= RANK < WORLD_SIZE"),
        ({"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "4"}, "expected 0 <= LOCAL_RANK"),
    ],
)
def test_a_bad_environment_is_explained(
    monkeypatch: pytest.MonkeyPatch, values: dict[str, str], message: str
) -> None:
    set_env(monkeypatch, **values)
    with pytest.raises(ValueError, match=message):
        tp.get_tensor_parallel_config()


def test_init_refuses_what_it_cannot_do(monkeypatch: pytest.MonkeyPatch) -> None:
    set_env(monkeypatch, WORLD_SIZE="2", RANK="0")
    with pytest.raises(
        ValueError, match="MASTER_ADDR and MASTER_PORT is not set: start the ranks with torchrun"
    ):
        tp.init_tensor_parallel()
    with pytest.raises(ValueError, match="backend 'gloo': expected"):
        tp.init_tensor_parallel("gloo")
    with pytest.raises(ValueError, match="timeout_s is 0, expected more than 0"):
        tp.init_tensor_parallel(timeout_s=0)


def test_alone_is_a_world_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    set_env(monkeypatch)
    with tp.init_tensor_parallel() as group:
        assert (group.rank, group.size, group.backend) == (0, 1, "shm")
        assert tp.init_tensor_parallel() is group
        assert tp.current_group() is group
        t = torch.arange(3.0)
        assert torch.equal(group.all_reduce_(t), torch.arange(3.0))
        assert torch.equal(tp.all_gather_tensor(t), t)
        group.barrier()
        tp.synchronize_across_ranks()
        assert group.empty_shared(2, 3).shape == (2, 3)
        assert group.stats()["collectives"] == 0
    assert tp.current_group() is not group
    group.close()  # again: nothing happens
    layer = tp.RowParallelLinear(4, 3)
    x = torch.ones(2, 4)
    assert torch.equal(layer(x), torch.nn.functional.linear(x, layer.weight, layer.bias))


def test_what_is_no_group_is_refused_clearly() -> None:
    with pytest.raises(TypeError, match="group is a str, expected a tp_native Group, a torch"):
        tp.ColumnParallelLinear(2, 2, group="tp:0")  # type: ignore[arg-type]


def identity(group: Group, offset: int) -> tuple[int, int, bool]:
    return group.rank + offset, group.size, tp.current_group() is group


def test_simulate_returns_results_in_rank_order() -> None:
    assert tp.simulate(identity, 3, 10) == [(10, 3, True), (11, 3, True), (12, 3, True)]
    assert tp.simulate(identity, 1, 5) == [(5, 1, True)]
    with pytest.raises(ValueError, match="world_size 0, expected at least 1"):
        tp.simulate(identity, 0, 0)


def fails_on_one(group: Group) -> None:
    if group.rank == 2:
        time.sleep(0.05)
        raise LookupError("rank 2 lost its way")
    group.barrier()


def test_simulate_raises_the_first_failure() -> None:
    start = time.monotonic()
    with pytest.raises(LookupError, match="rank 2 lost its way"):
        tp.simulate(fails_on_one, 3)
    assert time.monotonic() - start < 5


def test_simulate_runs_twice_at_once() -> None:
    def work(group: Group) -> float:
        return float(group.all_reduce_(torch.ones(1)))

    found: list[list[float]] = []
    threads = [
        threading.Thread(target=lambda: found.append(tp.simulate(work, 2))) for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [[2.0, 2.0]] * 3


def nested(group: Group) -> bool:
    inner = contextvars.copy_context().run(tp.current_group)
    return inner is group and copy.deepcopy(group) is group


def test_a_copied_context_keeps_the_group_and_copies_are_the_group() -> None:
    assert all(tp.simulate(nested, 2))


def refuses_pickle(group: Group) -> None:
    with pytest.raises(TypeError, match=r"cannot be pickled: .*save state_dict\(\) instead"):
        pickle.dumps(group)


def test_a_group_is_not_pickled() -> None:
    run_ranks(refuses_pickle, 2)


def starts_again(group: Group) -> tuple[str, str, float]:
    first = group.name
    layer = tp.RowParallelLinear(4, 4, group=group)
    group.close()
    with pytest.raises(
        tp.TensorParallelError, match=f'no group "{first}" in this process: it was closed'
    ):
        group.all_reduce_(torch.ones(1))
    with pytest.raises(tp.TensorParallelError, match="it was closed"):
        layer(torch.ones(1, layer.local_in_features))
    second = tp.init_tensor_parallel()
    total = float(second.all_reduce_(torch.ones(1)))
    return first, second.name, total


def test_a_closed_group_is_told_and_a_new_one_gets_a_new_name() -> None:
    world = World(2)
    try:
        assert world.run(starts_again) == [("tp:0", "tp:1", 2.0)] * 2
    finally:
        world.kill()


def asks_while_a_thread_waits(group: Group) -> int:
    if group.rank == 1:
        time.sleep(0.5)
        group.barrier()
        return 0
    thread = threading.Thread(target=group.barrier)
    thread.start()
    time.sleep(0.1)
    asked = 0
    while thread.is_alive():  # the waiting thread holds the lock and wants the GIL for signals
        asked += len(group.stats()) > 0 and group.op_log() is not None
    thread.join()
    return asked


def test_stats_do_not_deadlock_with_a_waiting_thread() -> None:
    assert run_ranks(asks_while_a_thread_waits, 2, deadline_s=20)[0] > 0


def user_aborts(group: Group) -> str:
    if group.rank == 0:
        group.abort("enough")
    with pytest.raises(tp.TensorParallelError, match="rank 0 aborted the group: enough") as info:
        group.all_reduce_(torch.ones(2))
    return str(info.value)


def test_abort_ends_every_rank_with_the_reason() -> None:
    tp.simulate(user_aborts, 2)


def asks_while_a_peer_leaves(group: Group) -> None:
    group.barrier()
    if group.rank == 1:
        return group.close()
    end = time.monotonic() + 10
    with pytest.raises(tp.PeerLostError, match=r"rank 1 .*left the group"):
        while time.monotonic() < end:
            group.check()


def test_check_tells_of_a_rank_that_has_left() -> None:
    tp.simulate(asks_while_a_peer_leaves, 3)


@pytest.mark.parametrize("text", ["é" * 2000, "x" + "é" * 2000, "bad\udcff.txt"])
def test_a_reason_of_any_text_ends_every_rank(text: str) -> None:
    def leaves_by_an_error(group: Group) -> None:
        if group.rank == 1:
            with pytest.raises(LookupError), group:
                raise LookupError(text)
        else:
            with pytest.raises(tp.TensorParallelError, match="aborted the group: LookupError: "):
                group.barrier(timeout_s=10)

    tp.simulate(leaves_by_an_error, 2)


def splits(group: Group) -> tuple[str, int, int, list[float]]:
    own = torch.full((3,), 10.0**group.rank)
    pair = group.split(group.rank % 2, key=-group.rank)  # reversed
    assert pair is not None and pair.order is group.order
    assert torch.equal(group.all_reduce_(own.clone())[0], sum(10.0 ** torch.arange(group.size)))
    total = pair.all_reduce_(own.clone())[0].item()
    order = pair.all_gather(own[:1]).tolist()
    assert group.split(None) is None
    with pytest.raises(ValueError, match="color -2"):
        group.split(-2)
    last = group.split(0)  # names are never used twice
    assert last is not None and last.name != pair.name and last.size == group.size
    last.barrier()
    name, rank, size = pair.name, pair.rank, pair.size
    pair.close()
    group.barrier()
    assert total == sum(order)
    return name, rank, size, order


def splits_twice(group: Group) -> float:
    half = group.split(group.rank // 2)
    assert half is not None
    again = half.split(0, key=-half.rank)
    assert again is not None and again.rank == half.size - 1 - half.rank
    return float(again.all_reduce_(torch.tensor([10.0**group.rank])))


def test_groups_split_from_thread_ranks_end_with_them() -> None:
    def fails_beside_a_split(group: Group) -> None:
        half = group.split(0)
        if group.rank == 1:
            raise LookupError("on purpose")
        half.barrier()  # type: ignore[union-attr]

    with pytest.raises(LookupError, match="on purpose"):
        tp.simulate(fails_beside_a_split, 2)


@pytest.mark.parametrize("kind", ["processes", "threads"])
def test_a_split_group_is_split_again(kind: str) -> None:
    found = tp.simulate(splits_twice, 4) if kind == "threads" else run_ranks(splits_twice, 4)
    assert found == [11.0, 11.0, 1100.0, 1100.0]


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("kind", ["processes", "threads"])
def test_a_group_is_split_by_color_and_ordered_by_key(world_size: int, kind: str) -> None:
    found = tp.simulate(splits, world_size) if kind == "threads" else run_ranks(splits, world_size)
    for color in (0, 1):
        members = [r for r in range(world_size) if r % 2 == color]
        names = {found[r][0].split("@")[0] for r in members}
        assert len(names) <= 1
        for place, r in enumerate(reversed(members)):
            assert found[r][1:3] == (place, len(members))
            assert found[r][3] == [10.0**m for m in reversed(members)]
