"""What a process learns from its environment: who it is in its job, and where its job meets."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass

import torch

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
    frozen_timeout_s: float = 10.0


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


def job_address(config: TensorParallelConfig) -> str:
    """An abstract UNIX socket's name that all ranks of this start of this job derive alike."""
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if missing:
        raise ValueError(
            f"WORLD_SIZE is {config.world_size} but {' and '.join(missing)} is not set: "
            "start the ranks with torchrun --nproc-per-node N script.py, or set both for all ranks"
        )
    names = ("MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT")
    return address_of(*(os.environ.get(name, "") for name in names), str(os.getuid()))


def address_of(*parts: str) -> str:
    """A socket name from what distinguishes a group of ranks."""
    return "tp_native-" + hashlib.sha256("\0".join(parts).encode()).hexdigest()[:40]


_imported_by = (os.getpid(), os.getppid())


def launcher_pid() -> int:
    """The process that this one must not outlive: torchrun's agent; 0 without one."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return 0
    pid, parent = _imported_by  # a parent that dies after the import is not replaced by init
    return parent if pid == os.getpid() else os.getppid()


def flight_folder() -> str:
    """Where flight records go: ``TP_NATIVE_FLIGHT_DIR`` (empty: nowhere), else the user's state
    folder.
    """
    chosen = os.environ.get("TP_NATIVE_FLIGHT_DIR")
    if chosen is not None:
        return os.path.abspath(chosen) if chosen else ""
    state = os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state")
    return os.path.join(state, "tp_native")
