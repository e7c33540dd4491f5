"""Rank processes that run a script at module level, forked from one that has imported all."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

SIGNAL_S = 3.0  # from a signal to the last rank's end
LIMIT_S = 20.0  # what no rank may need, whatever happens
INIT = "group = tp.init_tensor_parallel()\n"

# Has imported everything and forks a rank per request. The rank's code runs at module level, so
# that it ends as a script does: atexit, threads and finalization included.
NURSERY = """
import atexit, gc, importlib, json, os, signal, sys, time
nursery = os.getpid()
atexit.register(lambda: os.getpid() != nursery and print("closed", time.monotonic(), flush=True))
import torch
import tp_native  # its own atexit callback comes later, so it runs earlier
torch.set_num_threads(1)
gc.freeze()  # or the collector would walk through all of torch at each end
while line := sys.stdin.readline():
    request = json.loads(line)
    if "load" in request:
        importlib.import_module(request["load"])
        gc.freeze()
        print("true", flush=True)
        continue
    if "wait" in request:
        ended, end = {}, time.monotonic() + request["limit_s"]
        while len(ended) < len(request["wait"]) and time.monotonic() < end:
            for pid in set(request["wait"]) - set(ended):
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    ended[pid] = [os.waitstatus_to_exitcode(status), time.monotonic()]
            time.sleep(0.002)
        print(json.dumps([ended.get(pid) for pid in request["wait"]]), flush=True)
        continue
    pid = os.fork()
    if pid == 0:
        break
    print(pid, flush=True)
else:
    os._exit(0)
for number, path in enumerate(("/dev/null", request["out"], request["err"])):
    opened = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(opened, number)
    os.close(opened)
signal.signal(signal.SIGINT, signal.default_int_handler)
os.environ.update(request["env"])
exec(compile(request["code"], "rank.py", "exec"), {"__name__": "__main__"})
"""


@dataclass
class Rank:
    """A rank process and the files that it writes to."""

    pid: int
    out: Path
    err: Path

    def said(self, text: str, limit_s: float = LIMIT_S) -> str:
        """What it wrote, once that contains ``text``."""
        end = time.monotonic() + limit_s
        while text not in (written := self.out.read_text() if self.out.exists() else ""):
            assert time.monotonic() < end, (text, written, self.errors())
            time.sleep(0.002)
        return written

    def told_at(self, word: str) -> float:
        """The time that it wrote behind ``word``."""
        return float(self.said(word).split(word, 1)[1].split()[0])

    def errors(self) -> str:
        return self.err.read_text() if self.err.exists() else ""

    def signal(self, number: int) -> None:
        os.kill(self.pid, number)


@dataclass
class End:
    """Exit status and time of one rank."""

    status: int
    at: float


def job_env(rank: int, size: int, run_id: str) -> dict[str, str]:
    return {
        "RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "1",
        "TORCHELASTIC_RUN_ID": run_id,
        "OMP_NUM_THREADS": "1",
    }


class Nursery:
    """Starts ranks at 10 ms each instead of the seconds that importing torch takes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.started = 0
        self.process = subprocess.Popen(
            [sys.executable, "-c", NURSERY], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )

    def _ask(self, **request: Any) -> Any:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(request).encode() + b"\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def start(self, code: str, env: dict[str, str] | None = None) -> Rank:
        self.started += 1
        out, err = (self.folder / f"{self.started}.{kind}" for kind in ("out", "err"))
        pid = self._ask(code=code, env=env or {}, out=str(out), err=str(err))
        return Rank(pid, out, err)

    def load(self, module: str) -> None:
        """Import ``module`` for all ranks to come."""
        self._ask(load=module)

    def job(self, *codes: str, run_id: str = "", env: dict[str, str] | None = None) -> list[Rank]:
        """One rank per code."""
        run_id = run_id or uuid.uuid4().hex
        size = len(codes)
        return [
            self.start(code, {**job_env(rank, size, run_id), **(env or {})})
            for rank, code in enumerate(codes)
        ]

    def ends(self, ranks: Sequence[Rank], limit_s: float = LIMIT_S) -> list[End]:
        """How the ranks ended; kills what still runs at the limit and fails."""
        pids = [rank.pid for rank in ranks]
        found = self._ask(wait=pids, limit_s=limit_s)
        hung = [pid for pid, end in zip(pids, found, strict=True) if end is None]
        told = {rank.pid: rank.errors() for rank in ranks}
        for pid in hung:
            os.kill(pid, signal.SIGKILL)
        if hung:
            self._ask(wait=hung, limit_s=LIMIT_S)
        assert not hung, f"still running after {limit_s} s: {hung}, {told}"
        return [End(*end) for end in found]

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        left = psutil.Process(self.process.pid).children(recursive=True)
        for process in left:
            process.kill()
        self.process.kill()
        self.process.wait()
        assert not left, left


def script(text: str) -> str:
    heading = "import os, signal, sys, threading, time\nimport torch\nimport tp_native as tp\n"
    return heading + textwrap.dedent(text)
