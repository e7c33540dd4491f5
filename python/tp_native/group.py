"""Groups of ranks: configuration, start and end, collectives, and ranks as threads."""

from __future__ import annotations

import atexit
import contextvars
import itertools
import os
import threading
from collections.abc import Callable
from dataclasses import replace
from types import TracebackType
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import PrefixStore, Store
from torch.distributed.device_mesh import DeviceMesh
from typing_extensions import Self

from . import _ops, c10d, flight, gpu, links
from ._native import _C
from .config import (
    TensorParallelConfig,
    address_of,
    flight_folder,
    get_tensor_parallel_config,
    job_address,
)
from .errors import TensorParallelError
from .partition import Partition
from .shm import make_shm

T = TypeVar("T")
_Make = Callable[[int, float], _C.Communicator]  # (generation proposed, init_timeout_s)


class Group:
    """N ranks that run collectives together; made by :func:`init_tensor_parallel` or
    :func:`simulate`.

    A context manager: leaving the block closes the group; leaving it by an exception aborts it, so
    that the other ranks learn the reason. Every collective raises PeerLostError,
    CollectiveMismatchError or CollectiveTimeoutError on all surviving ranks, and afterwards the
    group raises the same error again.
    """

    def __init__(
        self,
        config: TensorParallelConfig,
        communicator: _C.Communicator | None,
        name: str,
        *,
        address: str = "",
        make: _Make | None = None,
        order: Tensor | None = None,
    ) -> None:
        self.config = config
        self.rank = config.rank
        self.size = config.world_size
        self.device = config.device
        self.backend = config.backend
        self.name = name
        # one address for the group's life, the same in forward and backward: compiled graphs
        # thread it through; groups that share ranks share it
        if order is None:
            order = torch.zeros(1, dtype=torch.int64, device=config.device)
        self.order = order
        self._communicator = communicator
        self._address = address  # where its ranks meet; groups made from it meet beside it
        self._make = make
        self._splits = 0
        self._local_splits: list[Group] = []  # end with it
        self._generator: torch.Generator | None = None
        self._generator_seed: int | None = None
        self._is_closed = False
        self._pid = os.getpid()
        self.defers_gradients = False  # set by nn.deferred_gradients, read in forward passes

    def __repr__(self) -> str:
        return (
            f"Group(name={self.name!r}, rank={self.rank}, size={self.size}, "
            f"backend={self.backend!r})"
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self  # a copied module stays in its group

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            f"{self!r} cannot be pickled: it is this process's link to its peers; save "
            "state_dict() instead"
        )

    # -- collectives without gradient

    def all_reduce_(self, t: Tensor, op: str = "sum") -> Tensor:
        """Reduce ``t`` (any shape, equal on all ranks) over the ranks in place and return it.

        ``op``: "sum", "avg", "max" or "min". Floating dtypes; 16-bit ones accumulate in float32.
        Ranks are added in ascending order, so the result is bitwise equal on all of them.
        """
        if self.size > 1:
            _ops.all_reduce_(t, self.order, op, self.name)
        return t

    def all_gather(self, t: Tensor, dim: int = 0, partition: Partition | None = None) -> Tensor:
        """Concatenate every rank's ``t`` along ``dim``, in rank order. ``partition``: unequal
        sizes of ``dim``.
        """
        if self.size == 1:
            return t.detach().clone()
        sizes = partition.sizes if partition is not None else (t.size(dim),) * self.size
        return _ops.all_gather(
            t.detach(), self.order, sizes, dim, "replicated", self.rank, self.name
        )

    def reduce_scatter(
        self, t: Tensor, dim: int = 0, partition: Partition | None = None, *, op: str = "sum"
    ) -> Tensor:
        """Reduce ``t`` over the ranks and return this rank's part of ``dim``, cut evenly or by
        ``partition``. ``op``: "sum", "avg", "max" or "min".
        """
        if self.size == 1:
            return t.detach().clone()
        cut = partition if partition is not None else Partition.even(t.size(dim), self.size)
        return _ops.reduce_scatter(t.detach(), self.order, cut.sizes, dim, op, self.rank, self.name)

    def gather(
        self, t: Tensor, dst: int = 0, dim: int = 0, partition: Partition | None = None
    ) -> Tensor | None:
        """Concatenate every rank's ``t`` along ``dim`` on rank ``dst``; None on the others.

        ``partition``: unequal sizes of ``dim``. Any dtype.
        """
        self._check_rank("gather", "dst", dst)
        if self.size == 1:
            return t.detach().clone()
        front = t.detach().movedim(dim, 0)
        sizes = partition.sizes if partition is not None else (front.shape[0],) * self.size
        rows = sum(sizes) if self.rank == dst else 0
        whole = front.new_empty((rows, *front.shape[1:]))
        _ops.gather_into(front, self.order, whole, sizes, dst, self.name)
        return whole.movedim(0, dim) if self.rank == dst else None

    def scatter(
        self,
        out: Tensor,
        whole: Tensor | None = None,
        src: int = 0,
        dim: int = 0,
        partition: Partition | None = None,
    ) -> Tensor:
        """Fill ``out`` with this rank's part of rank ``src``'s ``whole`` and return it.

        ``whole`` is needed on ``src`` only and cut along ``dim``, evenly (then every ``out`` has
        the same shape) or by ``partition``. Any dtype.
        """
        self._check_rank("scatter", "src", src)
        if (self.rank == src) != (whole is not None):
            raise ValueError(
                f"scatter: rank {self.rank} {'needs' if whole is None else 'must not give'} the "
                f"whole tensor: it is rank {src}'s"
            )
        if self.size == 1:
            assert whole is not None
            return out.copy_(whole)
        part = out.detach().movedim(dim, 0)
        sizes = partition.sizes if partition is not None else (part.shape[0],) * self.size
        given = part.new_empty(0) if whole is None else whole.detach().movedim(dim, 0)
        mine = part.contiguous()
        _ops.scatter_into(given, self.order, mine, sizes, src, self.name)
        if mine is not part:
            part.copy_(mine)
        return out

    def broadcast_(self, t: Tensor, src: int = 0) -> Tensor:
        """Overwrite ``t`` on all ranks with rank ``src``'s and return it. Any dtype."""
        self._check_rank("broadcast", "src", src)
        if self.size > 1:
            _ops.broadcast_(t, self.order, src, self.name)
        return t

    def barrier(self, timeout_s: float | None = None) -> None:
        """Return when all ranks have called it. ``timeout_s``: this call's limit instead of the
        group's.
        """
        if timeout_s is not None and timeout_s <= 0:
            raise ValueError(f"barrier: timeout_s {timeout_s}, expected more than 0")
        if self._communicator is not None:
            self._communicator.barrier(timeout_s or 0.0)

    def _check_rank(self, op: str, name: str, rank: int) -> None:
        if not 0 <= rank < self.size:
            raise ValueError(
                f"{op}: {name} {rank} is not a rank of {self!r}: expected 0 to {self.size - 1}"
            )

    def empty_shared(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """An uninitialised tensor in shared memory: collectives on it copy nothing.

        Over NCCL it is a collective of ranks that all ask for the same number of bytes: NCCL makes
        it a symmetric window where it can, else registers it as a buffer (:meth:`stats` says
        which). Taking one takes long: make it once. The memory of a window goes back with the next
        call after all ranks have let go of their tensor.
        """
        if self.size == 1:
            return torch.empty(shape, dtype=dtype, device=self.device)
        return _ops.empty_shared(self.order, shape, dtype, self.name)

    # -- life

    @property
    def generation(self) -> int:
        """How often a group with these ranks was made before: 0 for the first."""
        return self._communicator.generation if self._communicator is not None else 0

    def stats(self) -> dict[str, Any]:
        """Counts since the start: ``collectives``, ``bytes`` of this rank's payload, ``staged``
        collectives (those that copied), ``arena_bytes_in_use`` and ``arena_bytes_peak``;
        ``windows``, ``registered`` and ``unregistered``, the tensors of :meth:`empty_shared` that
        NCCL knows as symmetric windows, as buffers, or not; and ``late_share``, for each rank the
        part (0 to 1) of the time between the last collectives that the others spent waiting for it.
        """
        if self._communicator is not None:
            return self._communicator.stats()
        counts = "collectives bytes staged arena_bytes_in_use arena_bytes_peak"
        memory = "windows registered unregistered"
        return {
            **dict.fromkeys([*counts.split(), *memory.split()], 0),
            "late_share": [0.0] * self.size,
        }

    def op_log(self) -> list[tuple[int, str, str, int]]:
        """The last 1,024 operations of this rank: (seq, operation, dtype, signature's hash)."""
        return self._communicator.op_log() if self._communicator is not None else []

    def check(self) -> None:
        """Raise the group's failure if it has one, or if a rank has left: for long work between
        collectives.
        """
        if self._communicator is not None:
            self._communicator.check()

    def abort(self, reason: str) -> None:
        """Make every rank's pending and later collectives raise TensorParallelError with
        ``reason``.
        """
        if self._communicator is not None:
            self._communicator.abort(reason.encode(errors="backslashreplace").decode())

    def split(self, color: int | None, key: int = 0) -> Group | None:
        """Make a group of the ranks that give the same ``color``; None for ``color=None``.

        Collective: every rank of this group calls it. Ranks of the new group are numbered by
        ``(key, rank)``. Both groups stay usable, in an order that is the same on all ranks.
        Source: MPI 4.1, MPI_Comm_split; ncclCommSplit.
        """
        mine = torch.tensor([-1 if color is None else color, key], device=self.device)
        if color is not None and not 0 <= color < 2**31:
            raise ValueError(f"split: color {color}, expected None or 0 to 2**31 - 1")
        colors = self.all_gather(mine).view(-1, 2).tolist()
        count, self._splits = self._splits, self._splits + 1
        if color is None:
            return None
        members = sorted((k, rank) for rank, (c, k) in enumerate(colors) if c == color)
        rank = [r for _, r in members].index(self.rank)
        size = len(members)
        # thread ranks' names differ in what follows "@"
        base = f"{self.name.split('@')[0]}/{count}.{color}"
        config = replace(
            self.config, rank=rank, world_size=size, local_rank=rank, local_world_size=size
        )
        if size == 1:
            return Group(config, None, base, order=self.order)
        if self.backend == "local":
            self._local_splits.append(_split_local(base, config, self.order))
            return self._local_splits[-1]
        if self._make is None:
            raise ValueError(
                f"split: {self!r} cannot be split, only a group whose ranks share a host can; make "
                "the smaller process group with torch.distributed.new_group and pass it"
            )
        return _make_group(config, base, address_of(self._address, base), self.order)

    def renew(self, init_timeout_s: float | None = None) -> Self:
        """Make the group anew after a failure, in fresh memory, without restarting this process.

        Collective: every rank that still lives calls it, and a process started in place of a lost
        one calls :func:`init_tensor_parallel`. The group keeps its identity, so that modules that
        hold it go on; its ``generation`` is one higher on all ranks. What a late rank of the old
        generation writes cannot reach the new one. Groups split from this one must be split again.
        Raises: TensorParallelError naming the missing ranks after ``init_timeout_s``.
        """
        if self._make is None:
            if self.size == 1:
                return self
            raise ValueError(
                f"renew: {self!r} cannot be made anew; only one whose ranks share a host can"
            )
        if self._is_closed or self._communicator is None:
            raise TensorParallelError(f"renew: {self!r} is closed: call init_tensor_parallel()")
        proposed = self._communicator.generation + 1
        self._communicator.close()
        _C.unregister(self.name)
        communicator = self._make(proposed, init_timeout_s or self.config.init_timeout_s)
        self._communicator, self.name, self._splits = communicator, communicator.name, 0
        _C.register(self.name, communicator)
        _process.next_generation = max(_process.next_generation, communicator.generation + 1)
        return self

    def close(self) -> None:
        """Leave the group. Idempotent. Tensors stay valid; peers that still wait for this rank
        raise PeerLostError.
        """
        if self._is_closed:
            return
        self._is_closed = True
        for split in self._local_splits:
            split.close()
        if self._communicator is not None:
            self._communicator.close()
            _C.unregister(self.name)
        _process.forget(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if error is not None and not isinstance(error, TensorParallelError):
                self.abort(f"{type(error).__name__}: {error}")
        finally:
            self.close()

    def init_generator(self, device: torch.device) -> torch.Generator | None:
        """The generator that parameters on ``device`` are drawn from; None: torch's default one.

        Thread ranks share torch's, so each has its own here, seeded as ``torch.manual_seed`` last
        said.
        """
        if self.backend != "local":
            return None
        seed = torch.initial_seed()
        if (
            self._generator is None
            or seed != self._generator_seed
            or self._generator.device != device
        ):
            self._generator = torch.Generator(device).manual_seed(seed)
            self._generator_seed = seed
        return self._generator


class _Process:
    """This process's group, and the generation to propose for the next."""

    def __init__(self) -> None:
        self.group: Group | None = None
        self.next_generation = 0
        self.alone = Group(TensorParallelConfig(), None, "tp:alone")
        self.lock = threading.Lock()  # one init at a time
        self.simulations = 0
        self.starts = itertools.count()  # of groups over several hosts
        self.joined: dict[str, tuple[object, Group]] = {}  # by the process group's name
        self.joins: dict[str, int] = {}
        self.inherited: list[object] = []  # kept: to end them is the parent's

    def after_fork(self) -> None:
        """In the child: a process group gets a group of its own there."""
        self.inherited.append(self.joined)
        self.joined = {}

    def over(self, group: object, config: TensorParallelConfig | None = None) -> Group:
        """The group over a process group or mesh of torch.distributed's, made on first use."""
        ranks = c10d.process_group(group)
        is_of_cpus = isinstance(group, DeviceMesh) and group.device_type == "cpu"
        known, made = self.joined.get(ranks.group_name, (None, None))
        if made is not None and known is ranks and not (is_of_cpus and made.backend == "nccl"):
            return made
        return self.join(ranks.group_name, config, is_of_cpus)

    def join(
        self, group_name: str, config: TensorParallelConfig | None, is_of_cpus: bool = False
    ) -> Group:
        """Make it, in place of an earlier one of the same name. ``is_of_cpus``: whatever GPUs the
        ranks have.
        """
        # by name, and looked for again: while a compiler traces, `over` has a stand-in of the
        # process group and `joined` as it was at the start
        ranks: dist.ProcessGroup = dist.distributed_c10d._resolve_process_group(group_name)  # type: ignore[attr-defined, arg-type]
        is_over_nccl = c10d.is_over_nccl(ranks)
        key = ranks.group_name + ("@cpu" if is_over_nccl and is_of_cpus else "")
        known, made = self.joined.get(key, (None, None))
        if made is not None and known is ranks:
            return made
        if made is not None:  # the name's former owner was destroyed
            made.close()
        count = self.joins.get(ranks.group_name, 0)
        self.joins[ranks.group_name] = count + 1
        name = f"tp:c10d:{ranks.group_name}" + (f".{count}" if count else "")
        config = replace(
            config or get_tensor_parallel_config(),
            rank=ranks.rank(),
            world_size=ranks.size(),
            backend="c10d",
        )
        communicator = None
        is_on_gpus = is_over_nccl and not is_of_cpus and c10d.has_gpus(ranks, name, config)
        if is_on_gpus:
            config = gpu.on_gpu(config, gpu.index_in(ranks, config))
        if is_on_gpus and ranks.size() > 1:
            store = PrefixStore(f"tp_native/{name}", c10d.store_of(ranks))
            communicator = _put_on_gpus(c10d.join_beside(name, ranks, config), config, store)
        elif ranks.size() > 1:
            communicator = c10d.join(name, ranks.group_name, config.timeout_s)
        made = Group(config, communicator, name)
        self.joined[key] = (ranks, made)
        return made

    def forget(self, group: Group) -> None:
        if self.group is group:
            self.group = None
        self.joined = {key: made for key, made in self.joined.items() if made[1] is not group}

    def close(self) -> None:
        for _, group in list(self.joined.values()):
            group.close()
        if self.group is not None:
            self.group.close()


# torch.compile calls it where it meets it, as torch.compiler.assume_constant_result asks; that one
# imports the compiler
_Process.join._dynamo_marked_constant = True  # type: ignore[attr-defined]
_process = _Process()
_override: contextvars.ContextVar[Group | None] = contextvars.ContextVar(
    "tp_native_group", default=None
)
atexit.register(_process.close)
os.register_at_fork(after_in_child=_process.after_fork)


GroupLike = Group | dist.ProcessGroup | DeviceMesh


def current_group(group: GroupLike | None = None) -> Group:
    """``group``, else the thread rank's (inside :func:`simulate`), else the process's, else a
    world of one.

    A ``torch.distributed.ProcessGroup`` or a one-dimensional ``DeviceMesh`` stands for a group of
    the same ranks; the first use of one is collective. Where its backend for GPUs is NCCL and every
    rank has a GPU, the group is one over NCCL with connections of its own, unless it is a mesh of
    "cpu"; else it is on the CPU.
    """
    if group is None:
        if _process.simulations:  # else no thread has a group of its own; compilers trace this
            own = _override.get()
            if own is not None:
                return own
        return _process.group or _process.alone
    if not isinstance(group, Group):
        return _process.over(group)
    return group


def world_of_one() -> Group:
    """The group of this process alone."""
    return _process.alone


def _check_timeout(name: str, value: float) -> None:
    if not value > 0:
        raise ValueError(f"{name} is {value}, expected more than 0 seconds")


def init_tensor_parallel(
    backend: str = "auto",
    *,
    timeout_s: float = 600.0,
    init_timeout_s: float = 60.0,
    frozen_timeout_s: float = 10.0,
) -> Group:
    """Join the other ranks and return the process's group; alone (no torchrun) a world of one.

    ``backend``: "nccl" (one GPU per rank), "shm" (shared memory within each host; Gloo between
    hosts, over the interface that ``GLOO_SOCKET_IFNAME`` names), "auto" (nccl where every rank has
    a GPU of its own, else shm), "c10d" (all ranks over ``torch.distributed``'s default process
    group, made with Gloo where there is none).
    ``timeout_s``: how long a collective waits for a living peer; ``init_timeout_s``: how long to
    wait for all ranks to start;
    ``frozen_timeout_s``: how long a peer on this host may give no sign of life (a stopped process;
    a busy one does) before the group is given up, after a warning at 1.5 s. Called again before
    ``close()`` it returns the same group. Called in a process that replaces a lost one, it joins
    the others' :meth:`Group.renew`.
    Raises: TensorParallelError naming missing or duplicate ranks; ValueError for a bad environment
    or backend.
    """
    _check_timeout("timeout_s", timeout_s)
    _check_timeout("init_timeout_s", init_timeout_s)
    _check_timeout("frozen_timeout_s", frozen_timeout_s)
    if backend not in ("auto", "shm", "c10d", "nccl"):
        raise ValueError(
            f'backend {backend!r}: expected "auto", "shm", "c10d" or "nccl"; thread ranks '
            "come from simulate()"
        )
    if backend == "nccl":
        gpu.check_torch()
    with _process.lock:
        if _process.group is None or _process.group._pid != os.getpid():
            _process.group = _init_process(backend, timeout_s, init_timeout_s, frozen_timeout_s)
        return _process.group


def _init_process(
    backend: str, timeout_s: float, init_timeout_s: float, frozen_timeout_s: float
) -> Group:
    config = replace(
        get_tensor_parallel_config(),
        timeout_s=timeout_s,
        init_timeout_s=init_timeout_s,
        frozen_timeout_s=frozen_timeout_s,
    )
    if backend == "c10d" and (config.world_size > 1 or dist.is_initialized()):
        return _process.over(c10d.world(config, next(_process.starts)), config)
    if config.world_size == 1:
        if backend == "nccl":
            config = gpu.on_gpu(config)
        _process.next_generation += 1
        return Group(config, None, f"tp:{_process.next_generation - 1}")
    if config.local_rank == 0:
        flight.prune(flight_folder())
    if config.local_world_size != config.world_size:
        group = _join_hosts(backend, config, next(_process.starts))
    else:
        group = _make_group(
            config,
            "tp",
            job_address(config),
            generation=_process.next_generation,
            offer=gpu.offer_of(backend, config),
        )
        _process.next_generation = group.generation + 1
    if "OMP_NUM_THREADS" not in os.environ:  # torchrun sets 1: its own or the user's choice stands
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // config.local_world_size))
    return group


def _join_hosts(backend: str, config: TensorParallelConfig, start: int) -> Group:
    """A group of ranks on several hosts; ``start``: how many this job has made before."""
    name = f"tp:{start}"
    hosts = c10d.meet_hosts(config, start, gpu.offer_of(backend, config))
    is_on_gpus = gpu.choose_backend(hosts.offers) == "nccl"
    config = gpu.on_gpu(config) if is_on_gpus else replace(config, backend="shm+c10d")
    communicator = c10d.join_hosts(name, job_address(config), config, start, hosts)
    if is_on_gpus:
        communicator = _put_on_gpus(communicator, config, hosts.store)
    return Group(config, communicator, name)


def _put_on_gpus(
    control: _C.Communicator, config: TensorParallelConfig, store: Store
) -> _C.Communicator:
    """The group of ``control``'s ranks over NCCL, registered in its place."""
    try:
        sockets = links.connect(store, config)
        made = gpu.make_nccl(control, config.device.index, config.init_timeout_s, sockets)
    except BaseException as error:
        control.abort(f"{type(error).__name__}: {error}")  # those that still wait need not
        control.close()
        raise
    finally:
        _C.unregister(control.name)
    _C.register(made.name, made)
    return made


def _make_group(
    config: TensorParallelConfig,
    base: str,
    address: str,
    order: Tensor | None = None,
    generation: int = 0,
    offer: str | None = None,
) -> Group:
    """A group of ranks on one host; ":" and the generation that they agree on complete its name.

    ``offer``: what this rank would be; without it, what ``config`` says that all are.
    """

    def make(proposed: int, init_timeout_s: float) -> _C.Communicator:
        nonlocal config
        meeting = replace(config, init_timeout_s=init_timeout_s)
        control = make_shm(base, address, meeting, proposed, offer or config.backend)
        if offer is not None and gpu.choose_backend(_C.offers(control)) == "nccl":
            config = gpu.on_gpu(config)
        if config.backend != "nccl":
            return control
        return gpu.make_nccl(control, config.device.index, init_timeout_s)

    communicator = make(generation, config.init_timeout_s)
    _C.register(communicator.name, communicator)
    return Group(config, communicator, communicator.name, address=address, make=make, order=order)


# -- groups made from groups of thread ranks

_local_splits: dict[str, list[_C.Communicator | None]] = {}
_local_splits_lock = threading.Lock()


def _split_local(base: str, config: TensorParallelConfig, order: Tensor) -> Group:
    """The thread rank's share of a group that the first of its ranks makes for all."""
    with _local_splits_lock:
        made = _local_splits.get(base)
        if made is None:
            made = list(_C.make_local(base, config.world_size, config.timeout_s))
            _local_splits[base] = made
        communicator, made[config.rank] = made[config.rank], None
        if all(c is None for c in made):
            del _local_splits[base]
    assert communicator is not None
    if config.device.type == "cuda":
        communicator = _C.make_peers(config.device.index, communicator)
    group = Group(config, communicator, f"{base}@{config.rank}", order=order)
    _C.register(group.name, communicator)
    return group
