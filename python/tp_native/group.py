"""Groups of ranks: configuration, start and end, collectives, and ranks as threads."""

from __future__ import annotations

import atexit
import contextvars
import hashlib
import itertools
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any, NoReturn, TypeVar

import torch
from torch import Tensor
from typing_extensions import Self

from . import _ops
from ._native import _C
from .errors import TensorParallelError
from .partition import Partition

T = TypeVar("T")
_CPU = torch.device("cpu")


@dataclass(frozen=True)
class TensorParallelConfig:
    """Who this process is, from torchrun's environment. Times are in seconds."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    backend: str = "shm"
    device: torch.device = _CPU
    timeout_s: float = 600.0
    init_timeout_s: float = 60.0
    debug: bool = False


def _env_int(name: str, default: int) -> int:
    text = os.environ.get(name, "")
    try:
        return int(text) if text else default
    except ValueError:
        raise ValueError(
            f"environment variable {name} is {text!r}, expected an integer; torchrun sets it"
        ) from None


def get_tensor_parallel_config() -> TensorParallelConfig:
    """Read ``RANK``, ``WORLD_SIZE``, ``LOCAL_RANK``, ``LOCAL_WORLD_SIZE`` and ``TP_NATIVE_DEBUG``.

    Raises: ValueError for a value that is no integer or does not fit the others.
    """
    world_size = _env_int("WORLD_SIZE", 1)
    rank = _env_int("RANK", 0)
    local_world_size = _env_int("LOCAL_WORLD_SIZE", world_size)
    local_rank = _env_int("LOCAL_RANK", rank)
    if world_size < 1 or not 0 <= rank < world_size:
        raise ValueError(
            f"RANK={rank} and WORLD_SIZE={world_size} do not fit: expected 0 <= RANK < WORLD_SIZE"
        )
    if not 0 <= local_rank < local_world_size <= world_size:
        raise ValueError(
            f"LOCAL_RANK={local_rank}, LOCAL_WORLD_SIZE={local_world_size}, "
            f"WORLD_SIZE={world_size} do not fit: "
            "expected 0 <= LOCAL_RANK < LOCAL_WORLD_SIZE <= WORLD_SIZE"
        )
    debug = os.environ.get("TP_NATIVE_DEBUG", "") not in ("", "0")
    return TensorParallelConfig(rank, world_size, local_rank, local_world_size, debug=debug)


class Group:
    """N ranks that run collectives together; made by :func:`init_tensor_parallel` or
    :func:`simulate`.

    A context manager: leaving the block closes the group; leaving it by an exception aborts it, so
    that the other ranks learn the reason. Every collective raises PeerLostError,
    CollectiveMismatchError or CollectiveTimeoutError on all surviving ranks, and afterwards the
    group raises the same error again.
    """

    def __init__(
        self, config: TensorParallelConfig, communicator: _C.Communicator | None, name: str
    ) -> None:
        self.config = config
        self.rank = config.rank
        self.size = config.world_size
        self.device = config.device
        self.backend = config.backend
        self.name = name
        # one address for the group's life, the same in forward and backward: compiled graphs
        # thread it through
        self.order = torch.zeros(1, dtype=torch.int64)
        self._communicator = communicator
        self._generator: torch.Generator | None = None
        self._generator_seed: int | None = None
        self._is_closed = False
        self._pid = os.getpid()

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
        return all_gather_tensor(t.detach(), dim, self, partition=partition)

    def reduce_scatter(self, t: Tensor, dim: int = 0, partition: Partition | None = None) -> Tensor:
        """Sum ``t`` over the ranks and return this rank's part of ``dim``, cut evenly or by
        ``partition``.
        """
        return reduce_scatter_sum(t.detach(), dim, self, partition=partition)

    def broadcast_(self, t: Tensor, src: int = 0) -> Tensor:
        """Overwrite ``t`` on all ranks with rank ``src``'s and return it. Any dtype."""
        if not 0 <= src < self.size:
            raise ValueError(
                f"broadcast: src {src} is not a rank of {self!r}: expected 0 to {self.size - 1}"
            )
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

    def empty_shared(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """An uninitialised tensor in shared memory: collectives on it copy nothing."""
        if self.size == 1:
            return torch.empty(shape, dtype=dtype)
        return _ops.empty_shared(shape, dtype, self.name)

    # -- life

    def stats(self) -> dict[str, int]:
        """Counts since the start: ``collectives``, ``bytes`` of this rank's payload, ``staged``
        collectives (those that copied), ``arena_bytes_in_use`` and ``arena_bytes_peak``.
        """
        if self._communicator is not None:
            return self._communicator.stats()
        return dict.fromkeys(
            ("collectives", "bytes", "staged", "arena_bytes_in_use", "arena_bytes_peak"), 0
        )

    def op_log(self) -> list[tuple[int, str, str, int]]:
        """The last 1,024 operations of this rank: (seq, operation, dtype, signature's hash)."""
        return self._communicator.op_log() if self._communicator is not None else []

    def abort(self, reason: str) -> None:
        """Make every rank's pending and later collectives raise TensorParallelError with
        ``reason``.
        """
        if self._communicator is not None:
            self._communicator.abort(reason)

    def close(self) -> None:
        """Leave the group. Idempotent. Tensors stay valid; peers that still wait for this rank
        raise PeerLostError.
        """
        if self._is_closed:
            return
        self._is_closed = True
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
        if error is not None and not isinstance(error, TensorParallelError):
            self.abort(f"{type(error).__name__}: {error}")
        self.close()

    def init_generator(self) -> torch.Generator | None:
        """The generator that parameters are drawn from; None: torch's default one.

        Thread ranks share torch's, so each has its own here, seeded as ``torch.manual_seed`` last
        said.
        """
        if self.backend != "local":
            return None
        seed = torch.initial_seed()
        if self._generator is None or seed != self._generator_seed:
            self._generator = torch.Generator().manual_seed(seed)
            self._generator_seed = seed
        return self._generator


class _Process:
    """This process's group, and how many it has made."""

    def __init__(self) -> None:
        self.group: Group | None = None
        self.starts = itertools.count()
        self.alone = Group(TensorParallelConfig(), None, "tp:alone")

    def forget(self, group: Group) -> None:
        if self.group is group:
            self.group = None

    def close(self) -> None:
        if self.group is not None:
            self.group.close()


_process = _Process()
_override: contextvars.ContextVar[Group | None] = contextvars.ContextVar(
    "tp_native_group", default=None
)
atexit.register(_process.close)


def current_group(group: Group | None = None) -> Group:
    """``group``, else the thread rank's (inside :func:`simulate`), else the process's, else a
    world of one.
    """
    if group is None:
        return _override.get() or _process.group or _process.alone
    if not isinstance(group, Group):
        raise TypeError(
            f"group is a {type(group).__name__}, expected a tp_native Group or None; "
            "torch.distributed process groups and device meshes are not accepted by this version"
        )
    return group


def _job_address(config: TensorParallelConfig, start: int) -> str:
    """An abstract UNIX socket's name that all ranks of this start of this job derive alike."""
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if missing:
        raise ValueError(
            f"WORLD_SIZE is {config.world_size} but {' and '.join(missing)} is not set: "
            "start the ranks with torchrun --nproc-per-node N script.py, or set both for all ranks"
        )
    names = ("MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT")
    parts = [os.environ.get(name, "") for name in names] + [str(os.getuid()), str(start)]
    return "tp_native-" + hashlib.sha256("\0".join(parts).encode()).hexdigest()[:40]


def _check_timeout(name: str, value: float) -> None:
    if not value > 0:
        raise ValueError(f"{name} is {value}, expected more than 0 seconds")


def init_tensor_parallel(
    backend: str = "auto", *, timeout_s: float = 600.0, init_timeout_s: float = 60.0
) -> Group:
    """Join the other ranks and return the process's group; alone (no torchrun) a world of one.

    ``backend``: "auto" or "shm" (processes on one host). ``timeout_s``: how long a collective waits
    for a living peer;
    ``init_timeout_s``: how long to wait for all ranks to start. Called again before ``close()`` it
    returns the same group.
    Raises: TensorParallelError naming missing or duplicate ranks; ValueError for a bad environment
    or backend.
    """
    _check_timeout("timeout_s", timeout_s)
    _check_timeout("init_timeout_s", init_timeout_s)
    if backend not in ("auto", "shm", "nccl"):
        raise ValueError(
            f'backend {backend!r}: expected "auto", "shm" or "nccl"; thread ranks come from '
            "simulate()"
        )
    if backend == "nccl" and not _C.is_available("nccl"):
        raise ValueError('backend "nccl" is not part of this build: use "auto" or "shm" (CPU)')
    if _process.group is not None and _process.group._pid == os.getpid():
        return _process.group
    env = get_tensor_parallel_config()
    config = TensorParallelConfig(
        env.rank,
        env.world_size,
        env.local_rank,
        env.local_world_size,
        "shm",
        env.device,
        timeout_s,
        init_timeout_s,
        env.debug,
    )
    start = next(_process.starts)
    name = f"tp:{start}"
    if config.world_size == 1:
        _process.group = Group(config, None, name)
        return _process.group
    if config.local_world_size != config.world_size:
        raise ValueError(
            f"{config.world_size} ranks of which {config.local_world_size} are on this host: this "
            "version joins ranks of "
            "one host only; start them all here (torchrun --standalone --nproc-per-node N)"
        )
    communicator = _C.make_shm(
        name, _job_address(config, start), config.rank, config.world_size, timeout_s, init_timeout_s
    )
    _C.register(name, communicator)
    if "OMP_NUM_THREADS" not in os.environ:  # torchrun sets 1: its own or the user's choice stands
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // config.local_world_size))
    _process.group = Group(config, communicator, name)
    return _process.group


# -- collectives with gradients


def all_reduce_sum(t: Tensor, group: Group | None = None) -> Tensor:
    """The sum of ``t`` over the ranks. Backward: identity (cotangents are replicated)."""
    g = current_group(group)
    return _ops.all_reduce(t, g.order, "sum", g.name) if g.size > 1 else t.clone()


def copy_to_ranks(t: Tensor, group: Group | None = None) -> Tensor:
    """``t``, replicated already; marks where ranks begin to compute different parts. Backward:
    all-reduce.

    Source: Megatron-LM, arXiv:1909.08053, the operator *f* of section 3.
    """
    g = current_group(group)
    return _ops.copy_to_ranks(t, g.order, g.name) if g.size > 1 else t.clone()


def broadcast_tensor(t: Tensor, src_rank: int = 0, group: Group | None = None) -> Tensor:
    """Rank ``src_rank``'s ``t`` on all ranks. Backward: the sum of all ranks' gradients to it,
    zero elsewhere.
    """
    g = current_group(group)
    if not 0 <= src_rank < g.size:
        raise ValueError(
            f"broadcast_tensor: src_rank {src_rank} is not a rank of {g!r}: expected 0 to "
            f"{g.size - 1}"
        )
    return _ops.broadcast(t, g.order, src_rank, g.name) if g.size > 1 else t.clone()


def all_gather_tensor(
    t: Tensor,
    dim: int = -1,
    group: Group | None = None,
    grad: str = "replicated",
    *,
    partition: Partition | None = None,
) -> Tensor:
    """Concatenate the ranks' ``t`` along ``dim``; other dimensions must be equal.

    ``partition``: the sizes of ``dim`` where they differ. ``grad``: "replicated" if what follows is
    computed alike on all ranks (backward: this rank's slice), "partial" if each rank computes a
    part (backward: reduce-scatter).
    """
    g = current_group(group)
    if g.size == 1:
        return t.clone()
    sizes = partition.sizes if partition is not None else (t.shape[dim],) * g.size
    return _ops.all_gather(t, g.order, sizes, dim, grad, g.name)


def reduce_scatter_sum(
    t: Tensor, dim: int = 0, group: Group | None = None, *, partition: Partition | None = None
) -> Tensor:
    """Sum ``t`` over the ranks and keep this rank's part of ``dim``. Backward: all-gather."""
    g = current_group(group)
    if g.size == 1:
        return t.clone()
    cut = partition if partition is not None else Partition.even(t.shape[dim], g.size)
    return _ops.reduce_scatter(t, g.order, cut.sizes, dim, "sum", g.name)


def synchronize_across_ranks(group: Group | None = None, timeout_s: float | None = None) -> None:
    """Return when all ranks have called it."""
    current_group(group).barrier(timeout_s)


# -- ranks as threads

_simulations = itertools.count()


def simulate(fn: Callable[..., T], world_size: int, *args: Any) -> list[T]:
    """Run ``fn(group, *args)`` on ``world_size`` thread ranks of this process; the results in rank
    order.

    For tests, notebooks and debuggers: the same collectives as between processes. The first failure
    is raised here, after all ranks have ended.
    """
    if world_size < 1:
        raise ValueError(f"simulate: world_size {world_size}, expected at least 1")
    name = f"tp:sim{next(_simulations)}"
    timeout_s = TensorParallelConfig.timeout_s
    communicators: list[_C.Communicator | None] = [None]
    if world_size > 1:
        communicators = list(_C.make_local(name, world_size, timeout_s))
    results: list[Any] = [None] * world_size
    failures: list[BaseException] = []
    grad_enabled = torch.is_grad_enabled()

    def run(rank: int) -> None:
        config = TensorParallelConfig(rank, world_size, rank, world_size, "local")
        communicator = communicators[rank]
        group = Group(config, communicator, f"{name}@{rank}")
        if communicator is not None:
            _C.register(group.name, communicator)
        _override.set(group)
        try:
            with (
                torch.set_grad_enabled(grad_enabled),
                torch.autograd.set_multithreading_enabled(False),
            ):
                results[rank] = fn(group, *args)
        except BaseException as error:
            failures.append(error)
            group.abort(f"{type(error).__name__}: {error}")
        finally:
            group.close()

    threads = [
        threading.Thread(target=contextvars.Context().run, args=(run, rank), name=f"{name}@{rank}")
        for rank in range(world_size)
    ]
    for thread in threads:
        thread.start()
    try:
        for thread in threads:
            thread.join()
    except BaseException as error:
        if communicators[0] is not None:
            communicators[0].abort(f"{type(error).__name__} in the thread that called simulate()")
        for thread in threads:
            thread.join()
        raise
    if failures:
        raise failures[0]
    return results
