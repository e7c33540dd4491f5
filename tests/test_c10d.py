"""Groups over torch.distributed: Gloo on loopback, against the same oracle as shared memory."""

from __future__ import annotations

import itertools
import os
import random
import re
import signal
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import tp_native as tp
from harness import World, has_met
from test_collectives import (
    gathers_and_scatters,
    reduces_any_layout,
    reduces_like_the_oracle,
    replicated_bits,
)
from test_faults import call, check_kill, child_after_fork, interrupted
from test_gpu import DOUBLES, needs_doubles, pretend_gpus, works_like_a_group
from test_nn import adds_and_normalises
from tp_native import c10d, gpu
from tp_native.config import TensorParallelConfig
from tp_native.group import Group

pytestmark = pytest.mark.timeout(60)


def free_port() -> str:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return str(s.getsockname()[1])


def world_over_gloo(size: int, **init_args: Any) -> World:
    env = {"MASTER_PORT": free_port(), "GLOO_SOCKET_IFNAME": "lo"}
    return World(size, env=[env] * size, backend="c10d", **init_args)


@pytest.fixture(scope="module")
def worlds() -> Iterator[dict[int, World]]:
    made = {size: world_over_gloo(size) for size in (2, 3)}
    yield made
    for world in made.values():
        world.kill()


@pytest.fixture
def alone() -> Iterator[dist.ProcessGroup]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    assert dist.group.WORLD is not None
    yield dist.group.WORLD
    dist.destroy_process_group()


def test_a_process_group_of_one_is_a_world_of_one(alone: dist.ProcessGroup) -> None:
    group = tp.current_group(alone)
    assert (group.rank, group.size, group.backend) == (0, 1, "c10d")
    assert tp.current_group(alone) is group
    assert torch.equal(group.all_reduce_(torch.ones(3)), torch.ones(3))
    layer = tp.ColumnParallelLinear(4, 3, group=alone)  # type: ignore[arg-type]
    assert layer(torch.ones(2, 4)).shape == (2, 3)
    mesh = init_device_mesh("cpu", (1, 1), mesh_dim_names=("dp", "tp"))
    with pytest.raises(ValueError, match=r'device mesh of 2 dimensions .*: .* mesh\["tp"\]'):
        tp.current_group(mesh)
    assert tp.current_group(mesh["tp"]).size == 1
    with pytest.raises(ValueError, match="not a member"):
        tp.current_group(dist.GroupMember.NON_GROUP_MEMBER)  # type: ignore[arg-type]
    group.close()
    assert tp.current_group(alone) is not group


@pytest.mark.parametrize("size", [2, 3])
def test_all_reduce_equals_the_sum_in_rank_order(worlds: dict[int, World], size: int) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        worlds[size].run(reduces_like_the_oracle, dtype)
    bits = worlds[size].run(replicated_bits)
    assert all(b == bits[0] for b in bits)


@pytest.mark.parametrize("size", [2, 3])
def test_any_layout_and_uneven_shares(worlds: dict[int, World], size: int) -> None:
    worlds[size].run(reduces_any_layout)
    for dtype in (torch.float32, torch.bfloat16, torch.int64, torch.bool):
        worlds[size].run(gathers_and_scatters, dtype)


def listening_addresses(port: str) -> list[str]:
    """Of this machine's TCP listeners on ``port``, as the kernel writes them."""
    found = []
    for table in ("tcp", "tcp6"):
        with open(f"/proc/net/{table}") as file:
            for line in file.readlines()[1:]:
                address, told = line.split()[1].split(":")
                if int(told, 16) == int(port) and line.split()[3] == "0A":
                    found.append(address)
    return found


def config_and_port(group: Group) -> tuple[TensorParallelConfig, str]:
    return group.config, os.environ["MASTER_PORT"]


def test_the_store_listens_on_the_master_address_alone(worlds: dict[int, World]) -> None:
    found = worlds[2].run(config_and_port)
    assert listening_addresses(found[0][1]) == ["0100007F"]
    assert [(c.rank, c.local_rank, c.local_world_size) for c, _ in found] == [(0, 0, 2), (1, 1, 2)]
    assert {(c.world_size, c.backend, c.init_timeout_s) for c, _ in found} == {(2, "c10d", 60.0)}


def test_names_and_foreign_addresses_are_listened_on_everywhere() -> None:
    assert c10d.listener("192.0.2.1", 0) is None  # TEST-NET-1: nobody's
    for host in ("127.0.0.1", "localhost"):
        held = c10d.listener(host, 0)
        assert held is not None and held.getsockname()[0] in ("127.0.0.1", "::1")
        held.close()


def test_a_name_for_this_machine_alone_is_no_address(monkeypatch: pytest.MonkeyPatch) -> None:
    loopback = (socket.AF_INET, socket.SOCK_STREAM, 0, "", ("127.0.1.1", 0))
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: [loopback])
    assert c10d.listener("this-machine", 0) is None


@pytest.mark.parametrize(
    ("rank", "message"), [(0, r"ranks missing: \[1\] of 2"), (1, r"ranks missing: \[0\] of 2")]
)
def test_a_missing_rank_is_named_at_the_deadline(rank: int, message: str) -> None:
    env = {"MASTER_PORT": free_port(), "GLOO_SOCKET_IFNAME": "lo"}
    world = World(2, env=[env], ranks=[rank], backend="c10d", init_timeout_s=1.0)
    try:
        world.start(has_met)
        outcome = world.outcomes(20)[0]
        assert outcome is not None and isinstance(outcome.error, tp.TensorParallelError)
        assert re.search(message, str(outcome.error)), outcome.error
    finally:
        world.kill()


@pytest.mark.parametrize("timeout_s", [float("inf"), 1e17])
def test_no_timeout_is_too_long(timeout_s: float) -> None:
    world = world_over_gloo(2, timeout_s=timeout_s, init_timeout_s=timeout_s)
    try:
        world.run(replicated_bits)
    finally:
        world.kill()


def layers_equal_dense(group: Group) -> None:
    rank = group.rank
    pg = dist.group.WORLD
    up, down = torch.nn.Linear(6, 7).double(), torch.nn.Linear(7, 5).double()
    column = tp.ColumnParallelLinear(6, 7, group=pg).double()  # type: ignore[arg-type]
    row = tp.RowParallelLinear(7, 5, group=pg).double()  # type: ignore[arg-type]
    assert column.group is group and row.group is group
    cut = column.partition.slice(rank)
    with torch.no_grad():
        column.weight.copy_(up.weight[cut])
        column.bias.copy_(up.bias[cut])
        row.weight.copy_(down.weight[:, cut])
        row.bias.copy_(down.bias)
    x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    xd = x.detach().clone().requires_grad_()
    y, yd = row(column(x)), down(up(xd))
    torch.testing.assert_close(y, yd, rtol=1e-12, atol=1e-12)  # the order of a sum of 7
    y.square().sum().backward()
    yd.square().sum().backward()
    for mine, dense in [
        (x.grad, xd.grad),
        (column.weight.grad, up.weight.grad[cut]),
        (row.weight.grad, down.weight.grad[:, cut]),
        (row.bias.grad, down.bias.grad),
    ]:
        torch.testing.assert_close(mine, dense, rtol=1e-12, atol=1e-12)


def groups_of_torch(group: Group) -> None:
    size = group.size
    pg = dist.group.WORLD
    assert tp.current_group(pg) is group and group.backend == "c10d"
    assert (group.rank, group.size) == (dist.get_rank(), size)
    mesh = init_device_mesh("cpu", (size,), mesh_dim_names=("tp",))
    over_mesh = tp.current_group(mesh)
    assert over_mesh.size == size and over_mesh is tp.current_group(mesh["tp"])
    sub = dist.new_group([1, 0])
    if group.rank < 2:
        pair = tp.current_group(sub)
        assert float(pair.all_reduce_(torch.tensor(1.0 + group.rank))) == 3.0
        names: list[Any] = [None] * 2
        dist.all_gather_object(names, pair.name, group=sub)
        assert names[0] == names[1] == pair.name != group.name
        assert [line[1] for line in pair.op_log()] == ["all_reduce"]
        assert pair.stats()["collectives"] == 1 and pair.stats()["bytes"] == 4
        pair.close()
        again = tp.current_group(sub)
        assert again.name != pair.name
        again.barrier()
    group.barrier()


@pytest.mark.parametrize("size", [2, 3])
def test_process_groups_and_meshes_stand_for_groups(worlds: dict[int, World], size: int) -> None:
    worlds[size].run(groups_of_torch)
    worlds[size].run(layers_equal_dense)
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        worlds[size].run(adds_and_normalises, dtype)


UNLIKE = [
    "float32",
    "int32",
    "three by two",
    "bfloat16",
    "broadcast from 1",
    "gather",
    "barrier",
]


def compiles_over_torchs_groups(group: Group) -> None:
    mesh = init_device_mesh("cpu", (group.size,), mesh_dim_names=("tp",))
    pg = dist.new_group(list(range(group.size)))
    for over in (mesh, pg):
        torch._dynamo.reset()

        def run(x: torch.Tensor, over: Any = over) -> torch.Tensor:
            y = tp.all_gather_tensor(tp.all_reduce_sum(x * 2, over), 0, over)
            return tp.broadcast_tensor(y, 0, over)

        compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
        for _ in range(2):  # the first call makes the group
            x = torch.ones(3, requires_grad=True)
            y = compiled(x)
            assert torch.equal(y, torch.full((3 * group.size,), 2.0 * group.size))
            y.sum().backward()
            found = x.grad
            x.grad = None
            run(x).sum().backward()
            assert found is not None and torch.equal(found, x.grad)
    assert tp.current_group(pg) is not tp.current_group(mesh)


@pytest.mark.parametrize("size", [2, 3])
def test_process_groups_and_meshes_compile(worlds: dict[int, World], size: int) -> None:
    worlds[size].run(compiles_over_torchs_groups)


def test_a_forked_child_makes_its_own_group_over_a_process_group(
    alone: dist.ProcessGroup,
) -> None:
    group = tp.current_group(alone)
    pid = os.fork()
    if pid == 0:
        os._exit(7 if tp.current_group(alone) is not group else 8)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
    assert tp.current_group(alone) is group
    group.close()


def mismatches(group: Group, pairs: list[tuple[str, str]]) -> None:
    for pair in pairs:
        fresh = tp.current_group(dist.new_group())
        with pytest.raises(
            tp.CollectiveMismatchError, match=r"different collectives: rank 0 .*; rank 1 "
        ) as info:
            call(fresh, pair[group.rank])
        assert info.value.peer == 1
        with pytest.raises(tp.CollectiveMismatchError) as again:
            fresh.barrier()
        assert str(again.value) == str(info.value)  # poisoned: the same record
        fresh.close()


def test_every_pair_of_unlike_calls_is_a_mismatch(worlds: dict[int, World]) -> None:
    worlds[2].run(mismatches, list(itertools.combinations(UNLIKE, 2)))


def fails_in_many_ways(group: Group) -> None:
    fresh = tp.current_group(dist.new_group())
    if group.rank == 1:
        time.sleep(1.0)
    with pytest.raises(
        tp.CollectiveTimeoutError,
        match=r"rank 1 did not come within 0.3 s; ranks: 0 is in barrier #1, 1 has called nothing",
    ) as info:
        fresh.barrier(timeout_s=0.3)
    assert info.value.peer == 1
    fresh = tp.current_group(dist.new_group())
    if group.rank == 1:
        fresh.abort("enough")
    with pytest.raises(tp.TensorParallelError, match="rank 1 aborted the group: enough"):
        fresh.barrier()
    fresh = tp.current_group(dist.new_group())
    fresh.barrier()
    if group.rank == 1:
        fresh.close()
    else:
        with pytest.raises(tp.PeerLostError, match="rank 1 left the group"):
            fresh.all_reduce_(torch.ones(5000))
    group.barrier()


def test_late_aborting_and_leaving_ranks_are_named(worlds: dict[int, World]) -> None:
    worlds[2].run(fails_in_many_ways)


def meets_as_a_slice_runs_out(group: Group) -> float:
    """The transport's waits are slices of 20 ms: rank 1 comes just then."""
    draw = random.Random(0)
    t = torch.ones(3)
    for _ in range(150):
        if group.rank == 1:
            time.sleep(0.0195 + draw.random() * 0.0015)
        group.all_reduce_(t, "avg")
    return float(t.sum())


def test_a_transfer_that_ends_with_a_slice_is_no_failure(worlds: dict[int, World]) -> None:
    assert worlds[2].run(meets_as_a_slice_runs_out) == [3.0, 3.0]


def is_watched_while_it_waits(group: Group) -> list[float]:
    """Seconds that each look took, from another thread and from a signal handler."""
    fresh = tp.current_group(dist.new_group())
    fresh.barrier()
    took: list[float] = []
    if group.rank == 1:
        time.sleep(1.2)
        fresh.barrier()
        return took

    def look(*_: object) -> None:
        start = time.monotonic()
        assert fresh.stats()["collectives"] == 2
        assert [line[1] for line in fresh.op_log()] == ["barrier"] * 2
        took.append(time.monotonic() - start)

    def handler(*_: object) -> None:
        look()
        fresh.check()
        with pytest.raises(tp.TensorParallelError, match="was called by a signal handler while"):
            fresh.barrier()

    watcher = threading.Timer(0.3, look)
    before = signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, 0.6)
    watcher.start()
    try:
        fresh.barrier()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        watcher.join()
    return took


def closes_in_a_handler(group: Group) -> str:
    fresh = tp.current_group(dist.new_group())
    fresh.barrier()
    before = signal.signal(signal.SIGALRM, lambda *_: fresh.close())
    if group.rank == 0:
        signal.setitimer(signal.ITIMER_REAL, 0.3)
    else:
        time.sleep(1.0)
    with pytest.raises(tp.TensorParallelError) as info:
        fresh.barrier()
    signal.signal(signal.SIGALRM, before)
    return str(info.value)


def test_a_waiting_group_is_watched_and_closed_from_elsewhere(worlds: dict[int, World]) -> None:
    took, _ = worlds[2].run(is_watched_while_it_waits, deadline_s=20)
    assert len(took) == 2 and max(took) < 0.5
    for text in worlds[2].run(closes_in_a_handler, deadline_s=20):
        assert "rank 0 closed the group while one of its threads was in a collective" in text


def checks_between_collectives(group: Group) -> None:
    fresh = tp.current_group(dist.new_group())
    fresh.barrier()
    fresh.check()
    assert fresh.stats()["late_share"] == [0.0, 0.0]
    group.barrier()
    if group.rank == 1:
        fresh.close()
        return
    with pytest.raises(tp.PeerLostError, match="rank 1 left the group") as info:
        end = time.monotonic() + 5
        while time.monotonic() < end:
            fresh.check()
            time.sleep(0.01)
    assert info.value.peer == 1
    with pytest.raises(tp.PeerLostError, match="rank 1 left the group"):
        fresh.barrier()


def test_check_tells_of_a_rank_that_left(worlds: dict[int, World]) -> None:
    worlds[2].run(checks_between_collectives, deadline_s=20)


def test_a_forked_child_is_refused_and_does_no_harm(worlds: dict[int, World]) -> None:
    assert worlds[2].run(child_after_fork) == [7, 7]


def test_a_killed_rank_is_named_on_all_others() -> None:
    world = world_over_gloo(3)
    try:
        world.meet()
        check_kill(world, 1, "row_parallel_linear")
    finally:
        world.kill()


def test_ctrl_c_ends_a_wait_and_tells_the_peers_and_the_ranks_end() -> None:
    world = world_over_gloo(2)
    try:
        world.meet()
        world.start(interrupted)
        time.sleep(0.4)
        world.signal(0, signal.SIGINT)
        assert world.results(20)[0] == "interrupted"
        assert world.stop() == [0, 0]  # no transfer that still waits keeps a process
    finally:
        world.kill()


def works_over_a_process_group(group: Group, folder: str) -> None:
    gpu.is_nccl_for_gpus = lambda backends: True
    plain = tp.current_group(dist.new_group())
    assert plain.backend == "c10d" and plain.all_reduce_(torch.ones(1)).item() == group.size
    plain.close()  # no rank had a GPU
    pretend_gpus(folder)
    ranks = dist.new_group()
    mesh = DeviceMesh.from_group(ranks, "cpu")
    for _ in range(5):
        made = tp.current_group(ranks)
        works_like_a_group(made)
        assert made is tp.current_group(ranks) is not group
        assert tp.current_group(mesh).backend == "c10d"  # it says so
        made.close()
        group.barrier()


@needs_doubles
def test_a_process_group_over_nccl_is_a_group_on_gpus() -> None:
    world = world_over_gloo(2)
    try:
        world.run(works_over_a_process_group, str(DOUBLES))
    finally:
        world.kill()


@pytest.mark.parametrize(
    ("ranks", "message"),
    [
        ([("a", 0, 2), ("b", 0, 1), ("a", 1, 2)], r"ranks \[0, 2\] are on one host and do not"),
        ([("a", 0, 2), ("b", 0, 2), ("b", 1, 2)], "rank 0 has LOCAL_RANK=0 and LOCAL_WORLD_SIZE=2"),
        ([("a", 0, 2), ("a", 0, 2), ("b", 0, 1)], "rank 1 has LOCAL_RANK=0"),
    ],
)
def test_hosts_that_do_not_fit_are_explained(
    ranks: list[tuple[str, int, int]], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        c10d.cut_into_hosts(ranks)


def test_hosts_of_unlike_size_are_counted() -> None:
    ranks = [("a", 0, 1), ("b", 0, 2), ("b", 1, 2), ("c", 0, 1)]
    assert c10d.cut_into_hosts(ranks) == [1, 2, 1]
