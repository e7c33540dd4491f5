"""Which backend ranks agree on, and NCCL as Python meets it: over test doubles of NVIDIA's
libraries where there is no GPU.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import tp_native as tp
from tp_native import _C, gpu
from tp_native.group import Group

ROOT = Path(__file__).parents[1]
DOUBLES = ROOT / "build" / "csrc" / "doubles"
needs_doubles = pytest.mark.skipif(
    not (DOUBLES / "libfake_nccl.so").exists(),
    reason="the C++ tests' doubles are not built: make ctest",
)


@pytest.mark.parametrize(
    ("offers", "backend"),
    [
        (["auto cuda", "auto cuda"], "nccl"),
        (["auto cuda", "auto cpu"], "shm"),
        (["auto cpu", "auto cpu", "auto cpu"], "shm"),
        (["nccl cuda", "auto cuda"], "nccl"),
        (["auto cuda", "shm cuda"], "shm"),
        (["auto cpu", "nccl cpu"], "nccl"),  # asked for: then it is an error, not another backend
    ],
)
def test_all_ranks_choose_alike(offers: list[str], backend: str) -> None:
    assert gpu.choose_backend(offers) == backend


def test_ranks_that_ask_for_different_backends_are_told() -> None:
    with pytest.raises(ValueError, match='different backends: rank 0 "nccl", rank 1 "shm"; give'):
        gpu.choose_backend(["nccl cuda", "shm cuda"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_nccl_without_a_gpu_is_refused_before_anybody_waits() -> None:
    with pytest.raises(tp.TensorParallelError, match=r'"nccl" needs a GPU and a torch .* for CUDA'):
        tp.init_tensor_parallel("nccl")


@pytest.mark.parametrize(
    ("backends", "is_nccl"),
    [
        ("nccl", True),
        ("cuda:nccl", True),
        ("cpu:gloo,cuda:nccl", True),
        ("CPU:GLOO,CUDA:NCCL", True),
        ("gloo", False),
        ("cpu:gloo,cuda:gloo", False),
        ("cpu:nccl", False),
        ("cuda:ucc", False),
        ("", False),
    ],
)
def test_a_process_groups_backend_for_gpus_is_found(backends: str, is_nccl: bool) -> None:
    assert gpu.is_nccl_for_gpus(backends) is is_nccl


@pytest.mark.parametrize(
    ("bound", "current", "local_rank", "count", "expected"),
    [(3, 1, 2, 8, 3), (0, 1, 2, 8, 0), (None, 5, 2, 8, 5), (None, 0, 2, 8, 2), (None, 0, 2, 1, 0)],
)
def test_the_gpu_of_a_process_groups_rank(
    bound: int | None, current: int, local_rank: int, count: int, expected: int
) -> None:
    assert gpu.device_of(bound, current, local_rank, count) == expected


# two thread ranks, one of which ends the group; `make` is told later
TWO_RANKS = """
import sys, threading
import tp_native as tp
from tp_native import _C

_C.use_driver(sys.argv[1] + "/libfake_cuda.so")
assert _C.gpu_status() == (True, "") and _C.is_available("nccl")
controls = _C.make_local("tp:gpu", 2, 5.0)
made, told = [None, None], [None, None]

def start(rank):
    try:
        made[rank] = make(controls[rank], rank)
        made[rank].barrier(0.0)
        if rank == 0:
            made[0].abort("enough")
        while True:
            made[rank].check()
    except tp.TensorParallelError as error:
        told[rank] = str(error)

def run():
    threads = [threading.Thread(target=start, args=(rank,)) for rank in range(2)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
"""

OVER_NCCL = """
nccl = sys.argv[1] + "/libfake_nccl.so"
make = lambda control, rank: _C.make_nccl(control, rank, 5.0, 0, 0, False, nccl, [])
run()
assert all("rank 0 aborted the group: enough" in text for text in told), told
assert [c.backend for c in made] == ["nccl"] * 2 and made[0].name == "tp:gpu"
assert [line[1] for line in made[1].op_log()] == ["init", "barrier"]
assert _C.nccl_library("", []) == ("2.28.9", sys.argv[1] + "/libfake_nccl.so", "window")
[c.close() for c in made]

controls = _C.make_local("tp:missing", 2, 5.0)
try:
    _C.make_nccl(controls[0], 7, 1.0, 0, 0, False, "", [])
    sys.exit("a device that is not there")
except tp.TensorParallelError as error:
    print(error)
"""


@needs_doubles
def test_a_group_over_nccl_in_python() -> None:
    ran = subprocess.run(
        [sys.executable, "-c", TWO_RANKS + OVER_NCCL, str(DOUBLES)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    assert "did not come within 1 s" in ran.stdout  # rank 0 alone waits for its deadline only


def pretend_gpus(folder: str) -> None:
    """This process is on GPU 0 of the doubles, and torch has its tensors on the CPU."""
    _C.use_driver(f"{folder}/libfake_cuda.so")
    os.environ.update(TP_NATIVE_NCCL_PATH=f"{folder}/libfake_nccl.so", NCCL_HOSTID=str(os.getpid()))
    gpu.offer_of = lambda backend, config: f"{backend} cuda"
    gpu.check_torch = lambda: None
    gpu.is_nccl_for_gpus = lambda backends: True
    gpu.index_in = lambda group, config: 0
    gpu.on_gpu = lambda config, index=None: replace(
        config, backend="nccl", device=torch.device("cpu", 0)
    )


def works_like_a_group(group: Group) -> None:
    assert group.backend == "nccl"
    for _ in range(3):
        group.barrier()
    group.check()
    assert [line[:2] for line in group.op_log()][1:] == [(n, "barrier") for n in (4, 5, 6)]
    with pytest.raises(ValueError, match="cannot be made anew; only one whose ranks share a host"):
        group.renew()


OVER_PEERS = """
make = lambda control, rank: _C.make_peers(0, control)
run()
expected = "rank 0 aborted the group: enough" if _C.has_cuda_kernels() else "has no CUDA kernels"
assert all(expected in text for text in told), told
[c.close() for c in made if c]
"""


@needs_doubles
def test_thread_ranks_meet_on_one_gpu() -> None:
    ran = subprocess.run(
        [sys.executable, "-c", TWO_RANKS + OVER_PEERS, str(DOUBLES)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr


def test_simulate_refuses_a_device_that_ranks_cannot_share() -> None:
    with pytest.raises(ValueError, match="device 'cpu': expected a GPU"):
        tp.simulate(print, 2, device="cpu")
    if not torch.cuda.is_available():
        with pytest.raises(tp.TensorParallelError, match="device 'cuda:0' needs a GPU"):
            tp.simulate(print, 2, device="cuda:0")


@pytest.mark.skipif(
    not gpu.wheel_files("nccl", "libnccl.so.2"), reason="no nvidia-nccl wheel is installed"
)
def test_the_wheels_library_answers_beside_a_cpu_torch() -> None:
    version, path, _ = _C.nccl_library("", gpu.wheel_files("nccl", "libnccl.so.2"))
    assert int(version.split(".")[0]) == 2 and path.endswith("libnccl.so.2")


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc on this machine")
def test_kernels_are_built_where_nvcc_is() -> None:
    assert _C.has_cuda_kernels()


def test_the_module_needs_no_library_of_nvidias() -> None:
    spec = importlib.util.find_spec("tp_native._C")
    assert spec is not None and spec.origin is not None
    listed = subprocess.run(
        ["readelf", "--dynamic", spec.origin], capture_output=True, text=True, check=True
    ).stdout
    needed = [line for line in listed.splitlines() if "(NEEDED)" in line]
    assert any("libtorch_cpu" in line for line in needed)
    assert not [line for line in needed if "cuda" in line or "nccl" in line or "cublas" in line]
