"""Other libraries' all-reduce between processes of one host, one adapter each.

``install_peers.sh`` puts them into the folder that the adapters are given. Each is called as a
torch operator: its own, or one of ``peer_ops.cpp``.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import uuid
from abc import ABC, abstractmethod
from pathlib import Path
from typing import ClassVar

import torch
import torch.distributed as dist

import tp_native as tp
from timing import Operator


class Peer(ABC):
    """Made in the parent to be started, and in every rank to be joined and called."""

    name: ClassVar[str]
    title: ClassVar[str]
    dtypes: ClassVar[tuple[str, ...]] = ("float32", "bfloat16")
    all_reduce_: Operator  # after join()

    def __init__(self, folder: Path) -> None:
        self.folder = folder.resolve()

    @abstractmethod
    def missing(self) -> str:
        """Why it cannot be run; empty if it can."""

    @abstractmethod
    def version(self) -> str:
        """What ``missing`` has found."""

    @abstractmethod
    def join(self, group: tp.Group) -> None:
        """Meet the other ranks. Collective; torch.distributed is up."""

    def leave(self) -> None:  # noqa: B027
        """After the last collective."""

    def launcher(self, size: int) -> list[str]:
        """The command that starts its ranks; empty: none is needed."""
        return []

    def env(self) -> dict[str, str]:
        """What its ranks need besides the benchmark's own environment."""
        return {}

    def peer_ops(self) -> Path:
        """``peer_ops.cpp``, compiled."""
        return self.folder / "tpn_bench_peer_ops.so"


class Vllm(Peer):
    """vLLM's shared-memory all-reduce for CPU tensor parallelism."""

    name = "vllm"
    title = "vLLM"

    def library(self) -> Path:
        """The build that vLLM itself would choose on this CPU."""
        if not torch.cpu._is_avx512_supported():
            stem = "_C_AVX2"
        else:
            stem = "_C" if torch.cpu._is_avx512_bf16_supported() else "_C_AVX512"
        return self.folder / "vllm" / "vllm" / f"{stem}.abi3.so"

    def missing(self) -> str:
        return missing_files(self.library(), self.peer_ops())

    def version(self) -> str:
        return wheel_version(self.folder / "vllm")

    def join(self, group: tp.Group) -> None:
        torch.ops.load_library(str(self.library()))
        torch.ops.load_library(str(self.peer_ops()))
        names = [f"tpn-bench-{uuid.uuid4().hex}"]
        dist.broadcast_object_list(names)
        ops = torch.ops._C
        handle = ops.init_shm_manager(names[0], group.size, group.rank, torch.get_num_threads())
        dist.barrier()
        ops.join_shm_manager(handle, names[0])
        dist.barrier()
        self.all_reduce_ = Operator(f"torch.ops.tpn_bench.vllm_all_reduce_(t, {handle})")


class DeepSpeed(Peer):
    """DeepSpeed's shared-memory all-reduce for CPU inference."""

    name = "deepspeed"
    title = "DeepSpeed"

    def library(self) -> Path:
        return self.folder / "deepspeed_shm_comm.so"

    def missing(self) -> str:
        return missing_files(self.library())

    def version(self) -> str:
        return (self.folder / "deepspeed_shm_comm.version").read_text().strip()

    def env(self) -> dict[str, str]:
        return {"LOCAL_SIZE": ""}  # join() sets it; DeepSpeed falls back to nothing without it

    def join(self, group: tp.Group) -> None:
        import importlib.util

        os.environ["LOCAL_SIZE"] = str(group.size)
        path = self.library()
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        self.remove_segments()  # a stale one would be joined
        dist.barrier()
        module.initialize(group.size, group.rank)
        dist.barrier()
        self.remove_segments()  # DeepSpeed never does
        self.all_reduce_ = Operator("torch.ops.deepspeed.inference_all_reduce_(t)")

    @staticmethod
    def remove_segments() -> None:
        """All ranks may do this at once."""
        name = f"{os.getuid()}_{os.environ['MASTER_ADDR']}_{os.environ['MASTER_PORT']}"
        for path in Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_{name}_*"):
            path.unlink(missing_ok=True)


class Mpi(Peer):
    """MPI_Allreduce, in place."""

    @abstractmethod
    def library(self) -> Path: ...

    def join(self, group: tp.Group) -> None:
        torch.ops.load_library(str(self.peer_ops()))
        torch.ops.tpn_bench.mpi_join(str(self.library()))
        self.all_reduce_ = Operator("torch.ops.tpn_bench.mpi_all_reduce_(t)")

    def leave(self) -> None:
        torch.ops.tpn_bench.mpi_leave()


class IntelMpi(Mpi):
    """Over shared memory alone; the ranks are pinned by the benchmark, as all are."""

    name = "impi"
    title = "Intel MPI"

    def library(self) -> Path:
        return self.folder / "impi" / "lib" / "libmpi.so"

    def mpiexec(self) -> Path:
        return self.folder / "impi" / "bin" / "mpiexec.hydra"

    def missing(self) -> str:
        return missing_files(self.mpiexec(), self.library(), self.peer_ops())

    def version(self) -> str:
        return wheel_version(self.folder / "impi")

    def launcher(self, size: int) -> list[str]:
        return [str(self.mpiexec()), "-launcher", "fork", "-n", str(size)]

    def env(self) -> dict[str, str]:
        root = self.folder / "impi"
        return {
            "I_MPI_ROOT": str(root),
            "I_MPI_FABRICS": "shm",
            "I_MPI_PIN": "0",
            "LD_LIBRARY_PATH": f"{root / 'lib'}:{os.environ.get('LD_LIBRARY_PATH', '')}",
        }


class OpenMpi(Mpi):
    """The system's; its ranks yield where there are more of them than cores."""

    name = "openmpi"
    title = "Open MPI"
    dtypes = ("float32",)  # 4.1 has no bfloat16

    def library(self) -> Path:
        mpirun = shutil.which("mpirun")
        if mpirun is None:
            return Path("mpirun")
        linked = subprocess.run(["ldd", mpirun], capture_output=True, text=True).stdout
        runtime = re.search(r"=> (\S+)/libopen-rte\.so", linked)
        folder = Path(runtime[1]) if runtime else Path("/usr/lib")
        return next(iter(sorted(folder.glob("libmpi.so.*"))), folder / "libmpi.so")

    def missing(self) -> str:
        return missing_files(self.library(), self.peer_ops())

    def version(self) -> str:
        command = ["mpirun", "--version"]
        return subprocess.run(command, capture_output=True, text=True).stdout.split()[3]

    def launcher(self, size: int) -> list[str]:
        crowded = size > len(os.sched_getaffinity(0))
        return [
            *("mpirun", "--allow-run-as-root", "--oversubscribe", "--bind-to", "none"),
            *("--mca", "pml", "ob1", "--mca", "btl", "self,vader"),
            *("--mca", "mpi_yield_when_idle", "1" if crowded else "0", "-n", str(size)),
        ]


PEERS: dict[str, type[Peer]] = {peer.name: peer for peer in (Vllm, DeepSpeed, IntelMpi, OpenMpi)}


def missing_files(*paths: Path) -> str:
    """Which are not there."""
    missing = [path.name for path in paths if not path.is_file()]
    return f"no {', no '.join(missing)}: see install_peers.sh" if missing else ""


def wheel_version(folder: Path) -> str:
    """Of the wheel that was unpacked there."""
    found = next(iter(folder.glob("*.dist-info")), None)
    return found.name.removesuffix(".dist-info").rpartition("-")[2] if found else "unknown"
