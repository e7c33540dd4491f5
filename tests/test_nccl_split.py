"""``Group.split`` over NCCL on test doubles of NVIDIA's libraries: how groups begin, fail and end.

Torch's tensors are on the CPU here, so what split() gathers goes over a store; the data of
collectives over NCCL is tests/csrc/test_nccl_split.cpp's.
"""

from __future__ import annotations

import itertools
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import tp_native as tp
from harness import World
from test_gpu import DOUBLES, needs_doubles, pretend_gpus
from tp_native.group import Group

pytestmark = [needs_doubles, pytest.mark.timeout(60)]

_made: dict[str, Group] = {}  # a rank's groups from one order to the next


def gather_over(store: dist.Store) -> Callable[..., Tensor]:
    """Stands in for ``Group.all_gather``."""
    count = itertools.count()

    def all_gather(self: Group, t: Tensor, *_: Any) -> Tensor:
        prefix = f"{self.name}/{next(count)}"
        store.set(f"{prefix}/{self.rank}", " ".join(map(str, t.tolist())))
        parts = [store.get(f"{prefix}/{rank}").decode().split() for rank in range(self.size)]
        return torch.tensor([int(n) for part in parts for n in part])

    return all_gather


def meets_on_gpus(group: Group, store: str) -> None:
    pretend_gpus(str(DOUBLES))
    size = group.size
    group.close()
    Group.all_gather = gather_over(dist.FileStore(store, size))  # type: ignore[method-assign]
    _made["world"] = tp.init_tensor_parallel("nccl")
    assert _made["world"].backend == "nccl"


def splits_in_halves(_: Group) -> tuple[str, int]:
    world = _made["world"]
    half = world.split(world.rank // 2, key=-world.rank)
    assert half is not None and half.backend == "nccl" and half.size == 2
    assert half.rank == 1 - world.rank % 2 and half.order is world.order
    _made["half"] = half
    for _ in range(3):
        half.barrier()
        world.barrier()
        half.check()
    assert [line[1] for line in half.op_log()] == ["init", "barrier", "barrier", "barrier"]
    return half.name, half.rank


def splits_otherwise(_: Group) -> None:
    world = _made["world"]
    rest = world.split(None if world.rank == 3 else 5)
    assert (rest is None) == (world.rank == 3)
    if rest is not None:
        assert rest.size == 3
        rest.barrier()
        rest.close()
    alone = world.split(world.rank)
    assert alone is not None and alone.size == 1
    alone.barrier()
    world.barrier()


def closes_in_turn(_: Group, world_first: bool) -> None:
    first, last = ("world", "half") if world_first else ("half", "world")
    _made[first].close()
    _made[first].close()
    with pytest.raises(tp.TensorParallelError, match="is closed"):
        _made[first].barrier()
    _made[last].barrier()
    _made[last].check()
    _made[last].barrier()  # nobody leaves before all have looked
    if not world_first:
        _made["half"] = _made["world"].split(_made["world"].rank % 2)  # type: ignore[assignment]
        _made["half"].barrier()
        _made["half"].close()
    _made[last].close()


def waits(_: Group) -> tuple[int | None, int | None, float]:
    """The rank that the world has lost and the one that the half has, and when the first was told;
    the half that lost none still works.
    """
    lost: dict[str, int | None] = {}
    told_at = 0.0
    end = time.monotonic() + 10
    while "world" not in lost and time.monotonic() < end:
        try:
            _made["world"].check()
            time.sleep(0.001)
        except tp.PeerLostError as error:
            lost["world"], told_at = error.peer, time.monotonic()
    time.sleep(0.3)  # the half's own watch
    try:
        for _ in range(3):
            _made["half"].check()
            _made["half"].barrier()  # behind the look: nobody leaves before
    except tp.PeerLostError as error:
        lost["half"] = error.peer
    for group in _made.values():
        group.close()
    return lost.get("world"), lost.get("half"), told_at


@pytest.fixture
def world(tmp_path: Path) -> Any:
    made = World(4)
    try:
        made.run(meets_on_gpus, str(tmp_path / "store"))
        yield made
    finally:
        made.kill()


@pytest.mark.parametrize("world_first", [False, True])
def test_halves_of_a_group_over_nccl_work_and_close_in_any_order(
    world: World, world_first: bool
) -> None:
    found = world.run(splits_in_halves)
    assert found[0][0] == found[1][0] != found[2][0] == found[3][0]
    assert [rank for _, rank in found] == [1, 0, 1, 0]
    world.run(splits_otherwise)
    world.run(closes_in_turn, world_first)


def test_a_rank_that_dies_takes_its_half_with_it_and_not_the_other(world: World) -> None:
    world.run(splits_in_halves)
    world.start(waits)
    time.sleep(0.3)
    start = time.monotonic()
    world.signal(3, signal.SIGKILL)
    outcomes = world.outcomes(30)
    assert outcomes[3] is None
    for rank in range(3):
        outcome = outcomes[rank]
        assert outcome is not None and outcome.error is None, outcome
        of_world, of_half, told_at = outcome.result
        assert of_world == 3
        assert of_half == (0 if rank == 2 else None)  # rank 3 is its half's rank 0
        assert told_at - start < 2
