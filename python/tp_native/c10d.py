"""``torch.distributed`` under a group: process groups and device meshes of the user's, and the
ranks of several hosts.

Process groups are found by the native core by their name; bytes go over their own backend (Gloo),
agreement on failures over their store.
"""

from __future__ import annotations

import os
from dataclasses import replace
from datetime import timedelta
from typing import Any, cast

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import (
    PrefixStore,
    ProcessGroupGloo,
    Store,
    _register_process_group,
)
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.rendezvous import rendezvous

from ._native import _C
from .config import TensorParallelConfig, address_of
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


def world() -> dist.ProcessGroup:
    """The default process group; made with Gloo from the environment where there is none."""
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    group = dist.group.WORLD
    assert group is not None
    return group


def join(name: str, process_group_name: str, timeout_s: float) -> _C.Communicator:
    """Group ``name`` over the process group of that name, registered. Called on all its ranks."""
    _ops.join_c10d(name, process_group_name, timeout_s)
    return _C.find(name)


# -- several hosts


def _host_id() -> str:
    """Equal on ranks that can share memory and UNIX sockets: one kernel, one network namespace, one
    torchrun agent.
    """
    with open("/proc/sys/kernel/random/boot_id") as file:
        boot = file.read().strip()
    return f"{boot}/{os.readlink('/proc/self/ns/net')}/{os.environ.get('GROUP_RANK', '')}"


def _job_store(rank: int, size: int, start: int, timeout: timedelta) -> Store:
    """torchrun's store (or the default process group's), under a prefix of this start."""
    if dist.is_initialized():
        store = dist.distributed_c10d._get_default_store()
    else:
        store, _, _ = next(iter(rendezvous("env://", rank, size, timeout=timeout)))
    restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return PrefixStore(f"tp_native/{restart}/{start}", store)


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


def join_hosts(
    name: str, address: str, config: TensorParallelConfig, start: int
) -> _C.Communicator:
    """Group ``name`` of ranks on several hosts, registered: shared memory within a host, Gloo
    between the first ranks of the hosts. ``address``: as for one host; ``start``: how many groups
    this job has made before.
    """
    rank, size, local_rank = config.rank, config.world_size, config.local_rank
    timeout_s, init_timeout_s = config.timeout_s, config.init_timeout_s
    timeout = timedelta(seconds=init_timeout_s)
    store = _job_store(rank, size, start, timeout)
    store.set(f"host/{rank}", f"{_host_id()} {local_rank} {config.local_world_size}")
    keys = [f"host/{r}" for r in range(size)]
    try:
        store.wait(keys, timeout)
    except RuntimeError as error:
        missing = [r for r in range(size) if not store.check([keys[r]])]
        raise TensorParallelError(
            f"rank {rank}: ranks missing: {missing} of {size} after {init_timeout_s:g} s; start "
            "them, or raise init_timeout_s"
        ) from error
    told = [store.get(key).decode().split(" ") for key in keys]
    sizes = cut_into_hosts([(host, int(r), int(n)) for host, r, n in told])
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
        backend = ProcessGroupGloo(PrefixStore("leaders", store), host, len(sizes), timeout)
        linked = _process_group(leaders, store, host, len(sizes))
        linked._register_backend(torch.device("cpu"), dist.ProcessGroup.BackendType.GLOO, backend)
        join(leaders, leaders, timeout_s)
    job = f"{name}/job"
    held = _process_group(job, store, rank, size)
    _ops.join_hosts(name, intra.name, leaders, job, sizes, timeout_s)
    del held  # found by its name; the native core keeps its store
    return _C.find(name)


def _process_group(name: str, store: Store, rank: int, size: int) -> dist.ProcessGroup:
    """One that only the native core knows, by ``name``, for as long as the caller holds it."""
    group = dist.ProcessGroup(store, rank, size)
    group._set_default_backend(dist.ProcessGroup.BackendType.GLOO)
    _register_process_group(cast(Any, name), group)  # a NewType in some versions
    return group
