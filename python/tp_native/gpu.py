"""GPUs under a group: which backend the ranks agree on, and where NCCL is."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.distributed as dist

from ._native import _C
from .config import TensorParallelConfig
from .errors import TensorParallelError


def offer_of(backend: str, config: TensorParallelConfig) -> str:
    """What this rank tells the others: what it was asked to be, and whether a GPU is its own."""
    has_gpu = torch.cuda.is_available() and torch.cuda.device_count() >= config.local_world_size
    return f"{backend} {'cuda' if has_gpu else 'cpu'}"


def choose_backend(offers: Sequence[str]) -> str:
    """ "shm" or "nccl", the same on all ranks: what one asked for, else NCCL where every rank has a
    GPU of its own.

    Raises: ValueError, on all ranks, where two asked for different ones.
    """
    wanted = [offer.split()[0] for offer in offers]
    asked = sorted(set(wanted) - {"auto"})
    if len(asked) > 1:
        each = ", ".join(f'rank {rank} "{name}"' for rank, name in enumerate(wanted))
        raise ValueError(f"the ranks asked for different backends: {each}; give all the same")
    if asked:
        return asked[0]
    return "nccl" if all(offer.split()[1] == "cuda" for offer in offers) else "shm"


def is_nccl_for_gpus(backends: str) -> bool:
    """``backends``: of a process group as torch.distributed writes them, "cpu:gloo,cuda:nccl" or
    one for all devices.
    """
    by_device = dict(part.rpartition(":")[::2] for part in backends.lower().split(","))
    return by_device.get("cuda", by_device.get("")) == "nccl"


def device_of(bound: int | None, current: int, local_rank: int, count: int) -> int:
    """Which of ``count`` GPUs is the rank's in a process group: the one that it was bound to, else
    the one that the program has made torch's current, else that of its place on its host.
    """
    if bound is not None:
        return bound
    return current or local_rank % count


def index_in(group: dist.ProcessGroup, config: TensorParallelConfig) -> int:
    """Number of this rank's GPU in ``group``, as :func:`device_of` says."""
    bound = group.bound_device_id
    return device_of(
        bound.index if bound is not None else None,
        torch.cuda.current_device(),
        config.local_rank,
        torch.cuda.device_count(),
    )


def check_torch(who: str = 'backend "nccl"') -> None:
    """Raise TensorParallelError unless torch can put tensors on a GPU of this machine."""
    if not torch.cuda.is_available():
        raise TensorParallelError(
            f"{who} needs a GPU and a torch that was built for CUDA; this is torch "
            f"{torch.__version__}, and {_C.gpu_status()[1] or 'it does not see the GPU'}"
        )


def shared_device(device: torch.device | str) -> torch.device:
    """The GPU that thread ranks share, with its number.

    Raises: ValueError for a device that is no GPU; TensorParallelError where torch has none.
    """
    place = torch.device(device)
    if place.type != "cuda":
        raise ValueError(f'device {str(place)!r}: expected a GPU ("cuda:0"), or None for the CPU')
    check_torch(f"device {str(place)!r}")
    return torch.device("cuda", torch.cuda.current_device()) if place.index is None else place


def on_gpu(config: TensorParallelConfig, index: int | None = None) -> TensorParallelConfig:
    """``config`` on this rank's GPU, number ``index`` or that of its place on its host. It becomes
    torch's current one.
    """
    check_torch()
    if index is None:
        index = config.local_rank % torch.cuda.device_count()
    device = torch.device("cuda", index)
    torch.cuda.set_device(device)
    return replace(config, backend="nccl", device=device)


def make_nccl(
    control: _C.Communicator, device: int, init_timeout_s: float, sockets: Sequence[int] = ()
) -> _C.Communicator:
    """The group of ``control``'s ranks over NCCL, each on a GPU of its own. Collective.

    ``sockets``: of ranks on several hosts, connected as ``links.connect`` does; taken over.
    ``TP_NATIVE_NCCL_PATH`` names the library to take, ``TP_NATIVE_NCCL_MAX_CTAS`` how many thread
    blocks it may use. With ``TP_NATIVE_PEER_BYTES`` all-reduces of up to so many bytes run as
    kernels of ours over memory that the ranks reach directly, where they pass a test at the start.
    ``TP_NATIVE_NCCL_WINDOWS=0``: memory of ``Group.empty_shared`` is registered as plain buffers.
    Ranks may share a GPU, for tests, where NCCL was told so:
    ``NCCL_MULTI_RANK_GPU_ENABLE=1`` from 2.30 on, or an ``NCCL_HOSTID`` for each process.
    """
    environ = os.environ
    return _C.make_nccl(
        control=control,
        device=device,
        init_timeout_s=init_timeout_s,
        max_ctas=int(environ.get("TP_NATIVE_NCCL_MAX_CTAS", "0")),
        peer_bytes=int(environ.get("TP_NATIVE_PEER_BYTES", "0")),
        is_gpu_shared=environ.get("NCCL_MULTI_RANK_GPU_ENABLE") == "1" or "NCCL_HOSTID" in environ,
        file=_nccl_path(),
        wheel_files=wheel_files("nccl", "libnccl.so.2"),
        sockets=list(sockets),
        allows_windows=environ.get("TP_NATIVE_NCCL_WINDOWS") != "0",
    )


_REGISTRATIONS = {
    "window": "kept memory becomes symmetric windows",
    "buffer": "kept memory is registered as buffers: symmetric windows need 2.27",
    "none": "kept memory cannot be registered",
}


def facts() -> dict[str, str]:
    """What there is of NVIDIA's, for people."""
    is_there, why = _C.gpu_status()
    try:
        version, path, memory = _C.nccl_library(_nccl_path(), wheel_files("nccl", "libnccl.so.2"))
        nccl = f"{version} at {path}; {_REGISTRATIONS[memory]}"
    except TensorParallelError as error:
        nccl = str(error)
    return {
        "gpus": f"{torch.cuda.device_count()} seen by torch" if is_there else why,
        "nccl": nccl,
        "cuda kernels": "built" if _C.has_cuda_kernels() else "not built: no nvcc was found",
    }


def _nccl_path() -> str:
    return os.environ.get("TP_NATIVE_NCCL_PATH", "")


def wheel_files(package: str, file: str) -> list[str]:
    """``file`` where an installed wheel of NVIDIA's has put it; nothing is imported."""
    spec = importlib.util.find_spec("nvidia")
    folders = spec.submodule_search_locations if spec is not None else None
    found = [os.path.join(folder, package, "lib", file) for folder in folders or []]
    return [path for path in found if os.path.isfile(path)]
