"""The benchmarks' ranks: started, joined and ended; rank 0's result comes back as a file.

A benchmark runs its own script again, once per rank, with ``--as-rank RESULT`` appended; an MPI
launcher may stand in between. Knows nothing of what is measured.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Mapping, Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import tp_native as tp
from timing import pin_rank

DEADLINE_S = 900.0
RANK_NAMES = ("PMI_RANK", "OMPI_COMM_WORLD_RANK")  # what MPI launchers set
_libc = ctypes.CDLL(None)


def end_with_parent(how: signal.Signals) -> None:
    """Nothing outlives the benchmark; a launcher needs SIGTERM to end its ranks."""
    _libc.prctl(1, how)  # PR_SET_PDEATHSIG


# -- the parent


def start_ranks(
    size: int,
    arguments: Sequence[str],
    *,
    launcher: Sequence[str] = (),
    extra_env: Mapping[str, str] | None = None,
    deadline_s: float = DEADLINE_S,
) -> dict[str, Any]:
    """Run the ranks; what rank 0 wrote. The first failure ends the others.

    ``launcher``: a command that starts ``size`` copies of what follows it.
    """
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        env = {
            **os.environ,
            "WORLD_SIZE": str(size),
            "LOCAL_WORLD_SIZE": str(size),
            "MASTER_ADDR": "127.0.0.1",  # a name only, as the port is: Gloo meets over a file
            "MASTER_PORT": str(os.getpid()),
            "GLOO_SOCKET_IFNAME": "lo",
            "OMP_NUM_THREADS": "1",
            "TORCHELASTIC_RUN_ID": uuid.uuid4().hex,
            "TPN_BENCH_PARENT": "" if launcher else str(os.getpid()),
            **(extra_env or {}),
        }
        command = [*launcher, sys.executable, *arguments, "--as-rank", str(result)]
        ranks = []
        for rank in range(1 if launcher else size):
            own = {} if launcher else {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            ranks.append(
                subprocess.Popen(
                    command,
                    env={**env, **own},
                    stdout=subprocess.DEVNULL,
                    preexec_fn=partial(end_with_parent, signal.SIGTERM),
                )
            )
        wait_for(ranks, deadline_s)
        written: dict[str, Any] = json.loads(result.read_text())
        return written


def wait_for(ranks: list[subprocess.Popen[bytes]], deadline_s: float) -> None:
    """Until all have ended well; else end the rest and raise."""
    end = time.monotonic() + deadline_s
    try:
        while any(rank.poll() is None for rank in ranks):
            failed = [i for i, rank in enumerate(ranks) if rank.poll()]
            if failed or time.monotonic() > end:
                break
            time.sleep(0.05)
        bad = {i: rank.poll() for i, rank in enumerate(ranks) if rank.poll() != 0}
        if bad:
            raise RuntimeError(f"ranks ended with status {bad} (None: had to be stopped)")
    finally:
        for rank in ranks:
            if rank.poll() is None:
                rank.terminate()  # a launcher ends its ranks
        for rank in ranks:
            try:
                rank.wait(timeout=5)
            except subprocess.TimeoutExpired:
                rank.kill()
                rank.wait()


# -- one rank


def join_group(timeout_s: float = 60.0) -> tp.Group:
    """This rank's group, Gloo beside it, one thread, and a core of its own if there are enough."""
    end_with_parent(signal.SIGKILL)
    parent = os.environ["TPN_BENCH_PARENT"]
    if parent and os.getppid() != int(parent):
        raise SystemExit(1)
    for name in RANK_NAMES:
        if name in os.environ:
            os.environ["RANK"] = os.environ["LOCAL_RANK"] = os.environ[name]
    torch.set_num_threads(1)
    group = tp.init_tensor_parallel(timeout_s=timeout_s)
    folder = Path(sys.argv[sys.argv.index("--as-rank") + 1]).parent
    store = dist.FileStore(str(folder / "gloo"), group.size)
    dist.init_process_group(
        "gloo", store=store, rank=group.rank, world_size=group.size, timeout=timedelta(seconds=60)
    )
    pin_rank(group)
    return group


def leave_group(group: tp.Group, result: dict[str, Any], path: str) -> None:
    """Rank 0's ``result`` goes to the parent; then all leave together."""
    if group.rank == 0:
        Path(path).write_text(json.dumps(result))
    group.barrier()
    dist.destroy_process_group()
    group.close()
