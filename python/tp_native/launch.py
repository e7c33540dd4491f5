"""Starts N rank processes of one command on this host, and ends them together.

For the command line's own use; long jobs belong to torchrun. No port is opened: the ranks meet on
an abstract UNIX socket whose name they derive from the environment set here."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Sequence
from types import FrameType

GRACE_S = 1.5  # ranks raise by themselves within 0.1 s of a peer's death or Ctrl-C
TERMINATE_S = 1.0
_PR_SET_PDEATHSIG = 1


def launch(arguments: Sequence[str], ranks: int) -> int:
    """Run ``python -m tp_native *arguments`` as ``ranks`` ranks; the exit status to end with.

    Rank 0 has this process's stdout and stderr. What the others write to stderr is shown only if
    rank 0 could not tell what went wrong. Status: 0 if all ranks ended well, else that of the rank
    that failed first (1 for one that was killed); 130 after Ctrl-C, 143 after SIGTERM. Nothing is
    left running.
    """
    run_id = uuid.uuid4().hex
    came: list[int] = []
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, lambda n, _: came.append(n)) for number in numbers]
    processes: list[subprocess.Popen[bytes]] = []
    status = 1
    try:
        for rank in range(ranks):
            command = [sys.executable, "-m", "tp_native", *arguments]
            processes.append(
                subprocess.Popen(
                    command,
                    env=_environment(rank, ranks, run_id),
                    stdout=subprocess.DEVNULL if rank else None,
                    stderr=subprocess.PIPE if rank else None,
                )
            )
            _raise_for(came)  # only now is the process ours to end
        signal.signal(signal.SIGINT, before[0])
        signal.signal(signal.SIGTERM, _terminated)
        _raise_for(came)
        told = [_Collected(process) for process in processes[1:]]
        status, rank = _wait(processes)
        _end(processes)  # rank 0 may be about to tell
        if status != 0 and rank != 0 and processes[0].returncode == 0:
            sys.stderr.write(told[rank - 1].text())
        elif processes[0].returncode < 0 and told:
            sys.stderr.write(told[0].text())
    except KeyboardInterrupt:
        status = 130
    except _Terminated:
        status = 143
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, _terminated)
        try:
            _end(processes)
        except (KeyboardInterrupt, _Terminated) as second:  # asked twice: at once
            _kill(processes)
            status = 130 if isinstance(second, KeyboardInterrupt) else 143
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
    return status


def _raise_for(came: Sequence[int]) -> None:
    if signal.SIGINT in came:
        raise KeyboardInterrupt
    if came:
        raise _Terminated


def follow_parent() -> None:
    """End this rank with the launcher, even if that is killed.

    The signal is bound to the launcher's thread that started this process: its main one.
    """
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != int(os.environ["TP_NATIVE_LAUNCHED"]):  # it died before this was asked for
        os._exit(1)


class _Terminated(Exception):
    """SIGTERM came."""


def _terminated(number: int, frame: FrameType | None) -> None:
    raise _Terminated


class _Collected:
    """A rank's stderr, read all along so that it never blocks."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process
        self._lines: list[bytes] = []
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            self._lines.append(line)
            del self._lines[:-200]

    def text(self) -> str:
        self._thread.join(GRACE_S)
        return b"".join(self._lines).decode(errors="replace")


def _environment(rank: int, ranks: int, run_id: str) -> dict[str, str]:
    threads = max(1, len(os.sched_getaffinity(0)) // ranks)
    return {
        "OMP_NUM_THREADS": str(threads),
        **os.environ,
        "RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "0",
        "TORCHELASTIC_RUN_ID": run_id,
        "TP_NATIVE_LAUNCHED": str(os.getpid()),
    }


def _wait(processes: Sequence[subprocess.Popen[bytes]]) -> tuple[int, int]:
    """Wait for all ranks, after a failure only for a while: (status, the rank it is of)."""
    failed: tuple[int, int] | None = None
    deadline = float("inf")
    while any(process.poll() is None for process in processes) and time.monotonic() < deadline:
        for rank, process in enumerate(processes):
            if failed is None and process.poll() not in (None, 0):
                failed = (max(process.returncode, 1), rank)
                deadline = time.monotonic() + GRACE_S
        time.sleep(0.01)
    for rank, process in enumerate(processes):
        if failed is None and process.returncode not in (None, 0):
            failed = (max(process.returncode, 1), rank)
    return failed or (0, 0)


def _end(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """Ask, then insist. At Ctrl-C the terminal has told the ranks already."""
    for step, patience_s in ((None, GRACE_S), (signal.SIGTERM, TERMINATE_S)):
        running = [process for process in processes if process.poll() is None]
        if step is not None:
            for process in running:
                process.send_signal(step)
        end = time.monotonic() + patience_s
        for process in running:
            try:
                process.wait(max(0.0, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                break
    _kill(processes)


def _kill(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    for process in processes:
        if process.poll() is None:
            process.kill()
    for process in processes:
        process.wait()
