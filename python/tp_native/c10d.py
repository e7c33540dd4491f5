"""``torch.distributed`` under a group: process groups and device meshes of the user's, and the
ranks of several hosts.

Process groups are found by the native core by their name; bytes go over their own backend (Gloo),
agreement on failures over their store.
"""

from __future__ import annotations

import ipaddress
import os
import socket
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, cast

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import (
    PrefixStore,
    ProcessGroupGloo,
    Store,
    TCPStore,
    _register_process_group,
)
from torch.distributed.device_mesh import DeviceMesh

from . import gpu
from ._native import _C
from .config import TensorParallelConfig, address_of, job_address
from .errors import TensorParallelError
from .shm import make_shm

_ops = torch.ops.tp_native


def process_group(group: object) -> dist.ProcessGroup:
    """``group`` itself, or a one-dimensional mesh's process group.

    Raises: TypeError for anything else; ValueError for a mesh of several dimensions and for a group
    that this process is not in.
    """
    if isinstance(group, DeviceMesh):
        if group.ndim != 1:
            names = group.mesh_dim_names
            axis = f'mesh["{"tp" if "tp" in names else names[-1]}"]' if names else 'mesh["tp"]'
            raise ValueError(
                f"group is a device mesh of {group.ndim} dimensions {names or ''}: pass the one "
                f"that the ranks of a model span, {axis}"
            )
        return group.get_group()
    if group is dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError("group is a process group that this process is not a member of")
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(
            f"group is a {type(group).__name__}, expected a tp_native Group, a torch.distributed "
            "ProcessGroup, a one-dimensional DeviceMesh or None"
        )
    return group


def world(config: TensorParallelConfig, start: int) -> dist.ProcessGroup:
    """The default process group; made with Gloo from the environment where there is none.
    ``start``: how many groups this job has made before.

    Raises: TensorParallelError naming the missing ranks after ``config.init_timeout_s``.
    """
    if not dist.is_initialized():
        store = _job_store(config, start)
        call_roll(store, config, "here")
        dist.init_process_group(
            "gloo",
            store=store,
            rank=config.rank,
            world_size=config.world_size,
            timeout=timeout(config.init_timeout_s),
        )
        made = dist.group.WORLD
        assert made is not None
        backend = cast(Any, made._get_backend(torch.device("cpu")))
        backend._set_default_timeout(timeout(config.timeout_s))  # of calls that are not ours
    group = dist.group.WORLD
    assert group is not None
    return group


def store_of(group: dist.ProcessGroup) -> Store:
    """The store that the ranks of ``group`` share, under a prefix of its own."""
    return dist.distributed_c10d._get_process_group_store(group)


def is_over_nccl(group: dist.ProcessGroup) -> bool:
    """Whether the backend of ``group`` for GPUs is NCCL."""
    return gpu.is_nccl_for_gpus(dist.distributed_c10d._world.pg_backend_config.get(group, ""))


def has_gpus(group: dist.ProcessGroup, name: str, config: TensorParallelConfig) -> bool:
    """Whether every rank of ``group`` has a GPU; asked once for group ``name``. Collective.

    Raises: TensorParallelError naming the missing ranks after ``config.init_timeout_s``.
    """
    store = PrefixStore(f"tp_native/{name}/offers", store_of(group))
    offers = call_roll(store, config, gpu.offer_of("auto", config))
    return gpu.choose_backend(offers) == "nccl"


def join(name: str, process_group_name: str, timeout_s: float) -> _C.Communicator:
    """Group ``name`` over the process group of that name, registered. Called on all its ranks."""
    _ops.join_c10d(name, process_group_name, timeout_s)
    return _C.find(name)


def join_beside(
    name: str, group: dist.ProcessGroup, config: TensorParallelConfig
) -> _C.Communicator:
    """Group ``name`` of the ranks of ``group``, over Gloo connections of its own; registered."""
    # not dist.new_group(use_local_synchronization=True): it gives a second group of the same ranks
    # the first one's name, and the first one's addresses in the store
    store = PrefixStore(f"tp_native/{name}/beside", store_of(group))
    beside = f"{name}/beside"
    held = _over_gloo(beside, store, config.rank, config.world_size, config.init_timeout_s)
    made = join(name, beside, config.timeout_s)
    del held  # the native core keeps it
    return made


# -- several hosts


def machine_id() -> str:
    """Equal on ranks that reach each other over loopback: one kernel, one network namespace."""
    with open("/proc/sys/kernel/random/boot_id") as file:
        boot = file.read().strip()
    return f"{boot}/{os.readlink('/proc/self/ns/net')}"


def timeout(seconds: float) -> timedelta:
    """``seconds`` as torch takes them."""
    return timedelta(seconds=min(seconds, 1e8))  # three years: torch counts nanoseconds


def listener(host: str, port: int) -> socket.socket | None:
    """A socket that listens where the ranks look for rank 0, and nowhere else; TCPStore's own does
    on all interfaces. None where that is needed: ``host`` is not an address of this machine (a
    service's), or is a name that only this machine takes for its loopback.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError:
        return None  # TCPStore explains
    for family, kind, protocol, _, address in found:
        is_named = host != "localhost" and host != address[0]
        if is_named and ipaddress.ip_address(str(address[0]).split("%")[0]).is_loopback:
            continue
        held = socket.socket(family, kind, protocol)
        try:
            held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            held.bind(address)
            held.listen(1024)
            return held
        except OSError:  # not ours, or this process serves a store there already
            held.close()
    return None


def _tcp_store(config: TensorParallelConfig) -> Store:
    """The job's store: torchrun's agent's, or one that rank 0 serves."""
    job_address(config)  # explains what is not set
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    is_served = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    is_master = config.rank == 0 and not is_served
    held = listener(host, port) if is_master else None
    try:
        store = TCPStore(
            host,
            port,
            config.world_size,
            is_master,
            timeout(config.init_timeout_s),
            wait_for_workers=False,  # the roll call does, and knows who is missing
            multi_tenant=not is_served,
            master_listen_fd=held.fileno() if held is not None else None,
        )
    except RuntimeError as error:
        server = "torchrun's agent" if is_served else "rank 0"
        raise TensorParallelError(
            f"rank {config.rank}: {server} does not answer at {host}:{port} within "
            f"{config.init_timeout_s:g} s; ranks missing: [0] of {config.world_size}"
            if not is_master
            else f"rank 0 cannot serve the job's store at {host}:{port}: {error}"
        ) from error
    if held is not None:
        held.detach()  # the store closes it
    return store


def _job_store(config: TensorParallelConfig, start: int) -> Store:
    """torchrun's store (or the default process group's), under a prefix of this start."""
    if dist.is_initialized():
        store = dist.distributed_c10d._get_default_store()
    else:
        store = _tcp_store(config)
    restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return PrefixStore(f"tp_native/{restart}/{start}", store)


def call_roll(store: Store, config: TensorParallelConfig, told: str) -> list[str]:
    """What every rank tells the others.

    Raises: TensorParallelError naming the missing ranks after ``config.init_timeout_s``.
    """
    size = config.world_size
    keys = [f"host/{r}" for r in range(size)]
    try:
        store.set(keys[config.rank], told)
        store.wait(keys, timeout(config.init_timeout_s))
        return [store.get(key).decode() for key in keys]
    except RuntimeError as error:
        try:
            missing = [r for r in range(size) if not store.check([keys[r]])]
        except RuntimeError:
            raise TensorParallelError(
                f"rank {config.rank}: the job's store is gone before all {size} ranks came; "
                "whoever serves it, rank 0 or torchrun's agent, has ended"
            ) from error
        raise TensorParallelError(
            f"rank {config.rank}: ranks missing: {missing} of {size} after "
            f"{config.init_timeout_s:g} s; start them, or raise init_timeout_s"
        ) from error


def cut_into_hosts(ranks: list[tuple[str, int, int]]) -> list[int]:
    """How many ranks each host has, from every rank's (host, local rank, local world size).

    Raises: ValueError where a host's ranks do not follow each other or do not fit what they say.
    """
    hosts: dict[str, list[int]] = {}
    for rank, (host, _, _) in enumerate(ranks):
        hosts.setdefault(host, []).append(rank)
    for found in hosts.values():
        if found != list(range(found[0], found[0] + len(found))):
            raise ValueError(
                f"ranks {found} are on one host and do not follow each other: number the ranks "
                "host after host, as torchrun does"
            )
        for rank in found:
            _, local_rank, local_size = ranks[rank]
            if (local_rank, local_size) != (rank - found[0], len(found)):
                raise ValueError(
                    f"rank {rank} has LOCAL_RANK={local_rank} and LOCAL_WORLD_SIZE={local_size}, "
                    f"but ranks {found} are on its host: expected {rank - found[0]} and "
                    f"{len(found)}"
                )
    return [len(found) for found in hosts.values()]


@dataclass(frozen=True)
class Hosts:
    """What the ranks of several hosts told each other when they met."""

    store: Store  # of this start of this job
    sizes: list[int]  # ranks on each host
    offers: list[str]  # by rank


def meet_hosts(config: TensorParallelConfig, start: int, offer: str) -> Hosts:
    """``start``: how many groups this job has made before; ``offer``: for the other ranks."""
    store = _job_store(config, start)
    # A host: those that share memory and UNIX sockets, under one torchrun agent.
    host = f"{machine_id()}/{os.environ.get('GROUP_RANK', '')}"
    told = call_roll(store, config, f"{host} {config.local_rank} {config.local_world_size} {offer}")
    ranks = [text.split(maxsplit=3) for text in told]
    sizes = cut_into_hosts([(rank[0], int(rank[1]), int(rank[2])) for rank in ranks])
    return Hosts(store, sizes, [rank[3] for rank in ranks])


def join_hosts(
    name: str, address: str, config: TensorParallelConfig, start: int, hosts: Hosts
) -> _C.Communicator:
    """Group ``name`` of ranks on several hosts, registered: shared memory within a host, Gloo
    between the first ranks of the hosts. ``address``: as for one host.
    """
    rank, size, local_rank = config.rank, config.world_size, config.local_rank
    timeout_s = config.timeout_s
    store, sizes = hosts.store, hosts.sizes
    host = next(h for h in range(len(sizes)) if rank < sum(sizes[: h + 1]))

    # A leader may wait timeout_s for the other hosts: its own host's ranks wait longer for it.
    intra = make_shm(
        f"{name}/host",
        address_of(address, str(start), str(host)),
        replace(
            config, rank=local_rank, world_size=config.local_world_size, timeout_s=2 * timeout_s + 2
        ),
    )
    _C.register(intra.name, intra)
    leaders = ""
    if local_rank == 0:
        leaders = f"{name}/leaders"
        between = PrefixStore("leaders", store)
        linked = _over_gloo(leaders, between, host, len(sizes), config.init_timeout_s)
        join(leaders, leaders, timeout_s)
        del linked
    job = f"{name}/job"
    held = _process_group(job, store, rank, size)
    _ops.join_hosts(name, intra.name, leaders, job, sizes, timeout_s)
    del held  # found by its name; the native core keeps its store
    return _C.find(name)


def _over_gloo(
    name: str, store: Store, rank: int, size: int, init_timeout_s: float
) -> dist.ProcessGroup:
    """A :func:`_process_group` that moves CPU tensors. Collective."""
    backend = ProcessGroupGloo(store, rank, size, timeout(init_timeout_s))
    group = _process_group(name, store, rank, size)
    group._register_backend(torch.device("cpu"), dist.ProcessGroup.BackendType.GLOO, backend)
    return group


def _process_group(name: str, store: Store, rank: int, size: int) -> dist.ProcessGroup:
    """One that only the native core knows, by ``name``, for as long as the caller holds it."""
    group = dist.ProcessGroup(store, rank, size)
    group._set_default_backend(dist.ProcessGroup.BackendType.GLOO)
    _register_process_group(cast(Any, name), group)  # a NewType in some versions
    return group
