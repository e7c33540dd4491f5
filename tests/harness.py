"""Live worlds of rank processes for tests. One world per size is kept and reused; a failure or a
deadline kills it.

``run_ranks(fn, world_size, *args)`` runs the module-level ``fn(group, *args)`` on every rank and
returns the results in rank order. The first rank that failed is the one whose traceback is raised.
``World`` is the same with the processes in reach, for tests that kill them. Ranks are forked from a
server that has imported torch (``fork_server.py``); ``fresh=True`` starts an interpreter for each.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib
import os
import pickle
import signal
import subprocess
import sys
import time
import traceback
import uuid
from collections.abc import Callable
from multiprocessing.connection import Connection, Pipe, wait
from typing import Any

from fork_server import ForkedProcess, fork_server, stop_fork_server

DEADLINE_S = 60.0
GRACE_S = 5.0  # what the others get after the first failure


class RankFailure(AssertionError):
    """A rank raised; carries its traceback. ``error`` is the exception itself where it could be
    sent.
    """

    def __init__(self, message: str, error: BaseException | None = None) -> None:
        super().__init__(message)
        self.error = error


class Outcome:
    """What became of one rank: a result, an exception, or silence (it was killed)."""

    def __init__(self, result: Any, error: BaseException | None, text: str, at: float) -> None:
        self.result, self.error, self.text, self.at = result, error, text, at


class World:
    """``size`` new rank processes. ``init_args`` go to ``init_tensor_parallel``; ``env``
    overrides per rank, with ``fresh`` also what is read when torch is imported; ``prefixes`` are
    what each is started under (then all are fresh).
    """

    def __init__(
        self,
        size: int,
        *,
        env: list[dict[str, str]] | None = None,
        ranks: list[int] | None = None,
        fresh: bool = False,
        prefixes: list[list[str]] | None = None,
        **init_args: Any,
    ) -> None:
        self.size = size
        self.processes: list[subprocess.Popen[bytes] | ForkedProcess] = []
        self.pipes: list[Connection] = []
        run_id = uuid.uuid4().hex
        for index, rank in enumerate(ranks if ranks is not None else range(size)):
            ours, theirs = Pipe()
            rank_env = {
                **os.environ,
                "RANK": str(rank),
                "WORLD_SIZE": str(size),
                "LOCAL_RANK": str(rank),
                "LOCAL_WORLD_SIZE": str(size),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": "1",
                "TORCHELASTIC_RUN_ID": run_id,
                "OMP_NUM_THREADS": "1",
                **(env[index] if env else {}),
            }
            if fresh or prefixes:
                prefix = prefixes[index] if prefixes else []
                self.processes.append(_start_fresh(theirs, rank_env, init_args, prefix))
            else:
                self.processes.append(fork_server().fork(theirs, rank_env, init_args))
            theirs.close()
            self.pipes.append(ours)

    def start(self, fn: Callable[..., Any], *args: Any) -> None:
        """Let every rank run ``fn(group, *args)``."""
        for pipe in self.pipes:
            with contextlib.suppress(BrokenPipeError):
                pipe.send_bytes(pickle.dumps((fn.__module__, fn.__qualname__, args)))

    def outcomes(self, deadline_s: float = DEADLINE_S) -> list[Outcome | None]:
        """Every rank's outcome; None for one that died. A rank that is still running at the
        deadline fails the test.
        """
        end = time.monotonic() + deadline_s
        found: dict[int, Outcome | None] = {}
        while len(found) < len(self.pipes):
            pending = {pipe: i for i, pipe in enumerate(self.pipes) if i not in found}
            ready = wait(list(pending), timeout=max(0.0, end - time.monotonic()))
            if not ready:
                break
            for pipe in ready:
                assert isinstance(pipe, Connection)
                try:
                    outcome = Outcome(*pickle.loads(pipe.recv_bytes()))
                except (EOFError, ConnectionResetError):
                    outcome = None
                found[pending[pipe]] = outcome
                if outcome is None or outcome.error is not None:
                    end = min(end, time.monotonic() + GRACE_S)
        silent = [rank for rank in range(len(self.pipes)) if rank not in found]
        if silent:
            self.kill()
            told = [f"rank {i}: {o.text}" for i, o in found.items() if o is not None and o.error]
            raise RankFailure("\n".join([f"ranks {silent} did not end in time", *told]), None)
        return [found[i] for i in range(len(self.pipes))]

    def results(self, deadline_s: float = DEADLINE_S) -> list[Any]:
        """Every rank's result; raises the first failure."""
        outcomes = self.outcomes(deadline_s)
        failed = [
            (o.at, rank, o)
            for rank, o in enumerate(outcomes)
            if o is not None and o.error is not None
        ]
        dead = [rank for rank, o in enumerate(outcomes) if o is None]
        if failed:
            _, rank, outcome = min(failed, key=lambda f: f[0])
            raise RankFailure(
                f"rank {rank} of {self.size} "
                f"failed{f', {dead} died' if dead else ''}:\n{outcome.text}",
                outcome.error,
            )
        if dead:
            codes = [self.processes[rank].poll() for rank in dead]
            raise RankFailure(f"ranks {dead} of {self.size} died, exit status {codes}", None)
        return [o.result for o in outcomes if o is not None]

    def run(self, fn: Callable[..., Any], *args: Any, deadline_s: float = DEADLINE_S) -> list[Any]:
        """``start`` and ``results``."""
        self.start(fn, *args)
        return self.results(deadline_s)

    def meet(self) -> None:
        """Return once every rank has its group: what is killed from here on is no longer missing
        from the rendezvous.
        """
        self.run(has_met)

    def signal(self, rank: int, number: int) -> None:
        """Send a signal to one rank."""
        self.processes[rank].send_signal(number)

    def stop(self, deadline_s: float = 10.0) -> list[int]:
        """End the ranks in good order; their exit statuses."""
        for pipe in self.pipes:
            pipe.close()
        end = time.monotonic() + deadline_s
        for process in self.processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.1, end - time.monotonic()))
        return self.kill()

    def kill(self) -> list[int]:
        """End what still runs."""
        for process in self.processes:
            if process.poll() is None:
                process.kill()
        return [process.wait() for process in self.processes]


def has_met(group: Any) -> None:
    """What a rank does between the rendezvous and the first order."""


_worlds: dict[int, World] = {}


def run_ranks(
    fn: Callable[..., Any], world_size: int, *args: Any, deadline_s: float = DEADLINE_S
) -> list[Any]:
    """Run ``fn(group, *args)`` on the live world of this size."""
    world = _worlds.get(world_size) or _worlds.setdefault(world_size, World(world_size))
    try:
        return world.run(fn, *args, deadline_s=deadline_s)
    except BaseException:
        _worlds.pop(world_size).kill()
        raise


@atexit.register
def stop_worlds() -> None:
    """End all live worlds, then the server that forked them."""
    while _worlds:
        _worlds.popitem()[1].stop()
    stop_fork_server()


def _start_fresh(
    pipe: Connection, env: dict[str, str], init_args: dict[str, Any], prefix: list[str]
) -> subprocess.Popen[bytes]:
    command = [
        *prefix,
        sys.executable,
        __file__,
        str(pipe.fileno()),
        repr(sys.path),
        repr(init_args),
    ]
    return subprocess.Popen(command, env=env, pass_fds=[pipe.fileno()])


def serve(pipe: Connection, init_args: dict[str, Any]) -> None:
    """A rank's life: run what comes through ``pipe`` until it is closed."""
    import torch

    import tp_native as tp

    group = None
    while True:
        try:
            module, name, args = pickle.loads(pipe.recv_bytes())
        except EOFError:
            break
        try:
            if group is None:
                group = tp.init_tensor_parallel(**init_args)
            fn = importlib.import_module(module)
            for part in name.split("."):
                fn = getattr(fn, part)
            torch.manual_seed(0)
            reply = (fn(group, *args), None, "", time.monotonic())
        except BaseException as error:
            reply = (None, error, traceback.format_exc(), time.monotonic())
            if group is not None and not isinstance(error, tp.TensorParallelError):
                group.abort(f"{type(error).__name__}: {error}")  # as leaving `with group` does
        try:
            data = pickle.dumps(
                reply
            )  # not pipe.send: torch would share tensors through descriptors
            pickle.loads(data)
        except Exception as error:  # an exception that does not survive pickling is told as text
            told = reply[2] or traceback.format_exc()
            data = pickle.dumps((None, RankFailure(f"{error}"), told, time.monotonic()))
        pipe.send_bytes(data)
    if group is not None:
        group.close()


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.path[:] = eval(sys.argv[2])
    import harness  # not __main__: its classes travel between the processes

    harness.serve(Connection(int(sys.argv[1])), eval(sys.argv[3]))
