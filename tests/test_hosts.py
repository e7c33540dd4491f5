"""Ranks of several hosts: hosts on one machine told apart by their agent, and hosts that are
network namespaces with nothing but a cable between them.
"""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist

import tp_native as tp
from harness import World, has_met
from oracle import rank_data, reduce_in_rank_order
from test_c10d import free_port
from test_collectives import gathers_and_scatters
from test_faults import check_kill
from test_gpu import DOUBLES, needs_doubles, pretend_gpus, works_like_a_group
from test_nn import adds_and_normalises
from tp_native.group import Group

pytestmark = pytest.mark.timeout(60)


def host_env(sizes: list[int], **common: str) -> list[dict[str, str]]:
    """What torchrun sets for ranks of hosts of these sizes."""
    return [
        {
            "LOCAL_RANK": str(local),
            "LOCAL_WORLD_SIZE": str(size),
            "GROUP_RANK": str(host),
            "GLOO_SOCKET_IFNAME": "lo",
            **common,
        }
        for host, size in enumerate(sizes)
        for local in range(size)
    ]


def world_of_hosts(sizes: list[int], **init_args: Any) -> World:
    return World(sum(sizes), env=host_env(sizes, MASTER_PORT=free_port()), **init_args)


def works_over_hosts(group: Group, sizes: list[int]) -> tuple[str, list[bytes]]:
    assert not dist.is_initialized()
    bits = []
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        for count in (0, 5, 3001, 70001):
            parts = [rank_data((count,), dtype, r) for r in range(group.size)]
            ends = [sum(sizes[: h + 1]) for h in range(len(sizes))]
            wide = torch.float32 if dtype == torch.bfloat16 else dtype
            hosts = [
                reduce_in_rank_order([part.to(wide) for part in parts[end - n : end]])
                for n, end in zip(sizes, ends, strict=True)
            ]
            mine = group.all_reduce_(parts[group.rank].clone())
            assert torch.equal(mine, reduce_in_rank_order(hosts).to(dtype)), (dtype, count)
            bits.append(mine.view(torch.uint8).numpy().tobytes())
    large = torch.full((5,), 40000.0, dtype=torch.float16)
    assert torch.equal(group.all_reduce_(large.clone(), "avg"), large)  # their sum is none
    gathers_and_scatters(group, torch.int64)
    for dtype in (torch.float32, torch.bfloat16):
        adds_and_normalises(group, dtype)
    layer = tp.RowParallelLinear(10, 6, group=group).double()
    dense = torch.nn.Linear(10, 6).double()
    with torch.no_grad():
        layer.weight.copy_(dense.weight[:, layer.partition.slice(group.rank)])
        layer.bias.copy_(dense.bias)
    x = torch.randn(3, 10, dtype=torch.float64)
    y = layer(x[:, layer.partition.slice(group.rank)])
    torch.testing.assert_close(y, dense(x), rtol=1e-12, atol=1e-12)  # the order of a sum of 10
    y.sum().backward()
    assert layer.weight.grad is not None and group.stats()["collectives"] > 0
    group.barrier()
    return group.backend, bits


def test_uneven_hosts_compute_like_one_and_a_killed_leader_is_named() -> None:
    sizes = [1, 2]
    world = world_of_hosts(sizes)
    try:
        found = world.run(works_over_hosts, sizes)
        assert all(f == found[0] for f in found) and found[0][0] == "shm+c10d"
        check_kill(world, 1)  # rank 2 sees it in shared memory, rank 0 over the network
    finally:
        world.kill()


def closes_in_a_handler(group: Group) -> tuple[str, float]:
    """What a wait raises after one rank's handler has looked at the group and closed it."""
    group.barrier()

    def handler(*_: object) -> None:
        assert group.stats()["late_share"] == [0.0] * group.size
        group.check()
        group.close()

    before = signal.signal(signal.SIGALRM, handler)
    if group.rank == 1:
        signal.setitimer(signal.ITIMER_REAL, 0.3)
    elif group.rank == 0:
        time.sleep(1.0)
    start = time.monotonic()
    with pytest.raises(tp.TensorParallelError) as info:
        group.barrier()
    signal.signal(signal.SIGALRM, before)
    return str(info.value), time.monotonic() - start


@pytest.mark.parametrize("sizes", [[1, 1], [2, 1]], ids=["leader", "follower"])
def test_a_handler_closes_a_group_that_waits(sizes: list[int]) -> None:
    world = world_of_hosts(sizes)
    try:
        for text, waited_s in world.run(closes_in_a_handler, deadline_s=20):
            assert "rank 1 closed the group while one of its threads was in a collective" in text
            assert waited_s < 5
    finally:
        world.kill()


def test_a_missing_host_is_named_at_the_deadline() -> None:
    env = host_env([1, 1], MASTER_PORT=free_port())
    world = World(2, env=env[:1], ranks=[0], init_timeout_s=1.0)
    try:
        world.start(has_met)
        outcome = world.outcomes(20)[0]
        assert outcome is not None and isinstance(outcome.error, Exception)
        assert "ranks missing: [1] of 2" in str(outcome.error)
    finally:
        world.kill()


@pytest.fixture
def cable() -> Iterator[list[list[str]]]:
    """Two network namespaces with a cable between them; the commands that run something inside.
    They have no names: they end with the processes that hold them.
    """
    told = subprocess.run(["unshare", "-n", "true"], capture_output=True, text=True)
    if told.returncode != 0:
        pytest.skip(f"network namespaces need CAP_SYS_ADMIN (root): {told.stderr.strip()}")
    holders = [subprocess.Popen(["unshare", "-n", "sleep", "120"]) for _ in range(2)]
    try:
        inside = [["nsenter", "-t", str(holder.pid), "-n"] for holder in holders]
        time.sleep(0.2)  # until both have unshared
        steps = [
            [*inside[0], "ip", "link", "add", "tpn0", "type", "veth", "peer", "name", "tpn1"],
            [*inside[0], "ip", "link", "set", "tpn1", "netns", str(holders[1].pid)],
            *(
                [*inside[i], "ip", *step]
                for i in range(2)
                for step in (
                    ["link", "set", "lo", "up"],
                    ["addr", "add", f"10.77.0.{i + 1}/24", "dev", f"tpn{i}"],
                    ["link", "set", f"tpn{i}", "up"],
                )
            ),
        ]
        for step in steps:
            told = subprocess.run(step, capture_output=True, text=True)
            if told.returncode != 0:
                pytest.skip(f"a veth pair needs CAP_NET_ADMIN: {' '.join(step)}: {told.stderr}")
        yield inside
    finally:
        for holder in holders:
            holder.kill()
            holder.wait()


def test_two_network_namespaces_compute_and_name_a_rank_killed_on_the_other(
    cable: list[list[str]],
) -> None:
    env = host_env([2, 2], MASTER_ADDR="10.77.0.1", MASTER_PORT="29400", GROUP_RANK="")
    for rank in range(4):
        env[rank]["GLOO_SOCKET_IFNAME"] = f"tpn{rank // 2}"
    world = World(4, env=env, prefixes=[cable[rank // 2] for rank in range(4)])
    try:
        found = world.run(works_over_hosts, [2, 2])
        assert all(f == found[0] for f in found)
        check_kill(world, 3)
    finally:
        world.kill()


def remakes_itself_on_gpus(group: Group, folder: str) -> None:
    pretend_gpus(folder)
    group.close()
    made = tp.init_tensor_parallel("auto")
    works_like_a_group(made)
    made.close()
    tp.init_tensor_parallel("nccl").barrier()


def waits_for_a_failure(group: Group) -> None:
    made = tp.current_group()
    assert made.backend == "nccl"
    end = time.monotonic() + 20
    while time.monotonic() < end:
        made.check()
        time.sleep(0.001)


def check_gpus(world: World) -> None:
    """Ranks over NCCL's double, of which the last is killed."""
    world.run(remakes_itself_on_gpus, str(DOUBLES))
    world.start(waits_for_a_failure)
    time.sleep(0.3)
    last = world.size - 1
    world.signal(last, signal.SIGKILL)
    start = time.monotonic()
    for outcome in world.outcomes(20)[:-1]:
        assert outcome is not None and isinstance(outcome.error, tp.PeerLostError), outcome
        assert outcome.error.peer == last and outcome.at - start < 2


@needs_doubles
@pytest.mark.parametrize("sizes", [[1, 1], [1, 2]])
def test_ranks_of_several_hosts_on_gpus_name_one_that_dies(sizes: list[int]) -> None:
    world = world_of_hosts(sizes)
    try:
        check_gpus(world)
    finally:
        world.kill()


@needs_doubles
def test_gpus_in_two_network_namespaces_are_linked_over_the_cable(
    cable: list[list[str]],
) -> None:
    env = host_env([2, 1], MASTER_ADDR="10.77.0.1", MASTER_PORT="29400", GROUP_RANK="")
    for rank in range(3):
        env[rank]["GLOO_SOCKET_IFNAME"] = f"tpn{rank // 2}"
    world = World(3, env=env, prefixes=[cable[rank // 2] for rank in range(3)])
    try:
        check_gpus(world)
    finally:
        world.kill()
