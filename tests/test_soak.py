"""Minutes of random work and random deaths; run by ``make soak``."""

from __future__ import annotations

import random
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch

import tp_native as tp
from harness import World, run_ranks
from oracle import rank_data, reduce_in_rank_order
from test_faults import loops_until_told, shared_memory_names
from tp_native.group import Group

pytestmark = [pytest.mark.soak, pytest.mark.timeout(3600)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def random_collectives(group: Group, seed: int, steps: int) -> int:
    rng = random.Random(seed)  # the same decisions on every rank
    own = random.Random(seed + 1 + group.rank)  # whether this rank's tensor is shared is its own
    held: list[tuple[torch.Tensor, torch.Tensor]] = []
    for step in range(steps):
        dtype = rng.choice(DTYPES)
        count = int(2 ** rng.uniform(0, 18)) - 1
        parts = [rank_data((count,), dtype, r, step) for r in range(group.size)]
        kind = rng.randrange(4)
        if kind == 0:
            is_shared = own.random() < 0.5
            t = group.empty_shared(count, dtype=dtype) if is_shared else parts[0].new_empty(count)
            expected = reduce_in_rank_order(parts)
            assert torch.equal(group.all_reduce_(t.copy_(parts[group.rank])), expected)
            if own.random() < 0.2:
                held.append((t, expected))
        elif kind == 1:
            assert torch.equal(group.all_gather(parts[group.rank]), torch.cat(parts))
        elif kind == 2:
            src = rng.randrange(group.size)
            assert torch.equal(group.broadcast_(parts[group.rank].clone(), src), parts[src])
        else:
            cut = tp.Partition.even(count, group.size)
            expected = reduce_in_rank_order(parts)[cut.slice(group.rank)]
            assert torch.equal(group.reduce_scatter(parts[group.rank]), expected)
        if len(held) > 40:
            assert all(torch.equal(a, b) for a, b in held)
            del held[: own.randrange(40)]
    return steps


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_random_collectives_with_outputs_held_at_random(world_size: int) -> None:
    assert (
        run_ranks(random_collectives, world_size, 17, 4000, deadline_s=1200) == [4000] * world_size
    )


def test_100_sigkills_at_random_moments() -> None:
    before = shared_memory_names()
    rng = random.Random(11)
    delays = []
    for _ in range(100):
        size = rng.choice([2, 2, 3, 4])
        victim = rng.randrange(size)
        world = World(size)
        try:
            world.meet()
            world.start(
                loops_until_told,
                rng.choice(["all_reduce", "all_gather", "broadcast", "barrier", "linear"]),
            )
            time.sleep(0.05 + 0.2 * rng.random())
            at = time.monotonic()
            world.signal(victim, signal.SIGKILL)
            for rank, outcome in enumerate(world.outcomes(20)):
                assert (outcome is None) == (rank == victim)
                if outcome is not None:
                    assert (outcome.result["type"], outcome.result["peer"]) == (
                        "PeerLostError",
                        victim,
                    )
                    delays.append(outcome.result["at"] - at)
        finally:
            world.kill()
    delays.sort()
    print(
        f"{len(delays)} survivors, p50 {delays[len(delays) // 2] * 1e3:.1f} ms, worst "
        f"{delays[-1] * 1e3:.1f} ms"
    )
    assert delays[-1] <= 0.1
    assert shared_memory_names() == before


def all_collectives(group: Group) -> float:
    """Every collective at sizes that are staged, shared and shorter than the world."""
    rank, size = group.rank, group.size
    for count in (1, 7, size, 5000, 60_001):
        parts = [rank_data((count,), torch.float32, r, count) for r in range(size)]
        total = reduce_in_rank_order(parts)
        assert torch.equal(group.all_reduce_(parts[rank].clone()), total)
        shared = group.empty_shared(count).copy_(parts[rank])
        assert torch.equal(group.all_reduce_(shared), total)
        assert torch.equal(group.all_gather(parts[rank]), torch.cat(parts))
        assert torch.equal(group.broadcast_(parts[rank].clone(), size - 1), parts[size - 1])
        cut = tp.Partition.even(count, size)
        assert torch.equal(group.reduce_scatter(parts[rank]), total[cut.slice(rank)])
        uneven = tp.Partition.from_sizes([r % 3 for r in range(size)])
        mine = torch.full((2, uneven[rank]), float(rank))
        gathered = group.all_gather(mine, 1, uneven)
        wanted = [float(r) for r in range(size) for _ in range(r % 3)]
        assert gathered.tolist() == [wanted, wanted]
        group.barrier()
    layer = tp.RowParallelLinear(37, 5, group=group).double()
    with torch.no_grad():
        layer.weight.fill_(1.0)
        assert layer.bias is not None
        layer.bias.fill_(1.0)
        return float(layer(torch.ones(2, layer.local_in_features, dtype=torch.float64)).sum())


def test_16_processes_run_every_collective() -> None:
    world = World(16)
    try:
        for _ in range(20):
            assert world.run(all_collectives, deadline_s=300) == [380.0] * 16
        assert world.stop(60) == [0] * 16
    finally:
        world.kill()


def test_2000_faults_in_ranks_without_torch() -> None:
    """Deaths, stops and delays at the protocol's fault points and at random moments, three worlds
    at a time; tests/csrc/test_fault_soak.cpp says what every survivor has to report.
    """
    program = Path(__file__).parents[1] / "build" / "csrc" / "test_fault_soak"
    assert program.exists(), f"{program} is missing: run make ctest"
    runs = [
        subprocess.Popen([program, "667", str(seed)], stdout=subprocess.PIPE, text=True)
        for seed in (1, 2, 3)
    ]
    told = [run.communicate(timeout=3000)[0] for run in runs]
    print("\n".join(told))
    assert [run.returncode for run in runs] == [0, 0, 0], told
