"""A process that has imported torch and tp_native and forks ranks, which then start in milliseconds
rather than in the seconds of that import. One server serves a test run and ends with it.

It makes no group and no thread, and refuses to fork where there is one: a lock that another thread
holds would stay locked in the child. What is read at import (``OMP_NUM_THREADS``, torch's own
settings) is the server's: a rank that needs another value is started afresh.

A request is one message on ``control`` with four descriptors: the rank's pipe, its status socket,
stdout and stderr. The status socket answers with the pid and a pidfd, and at the end with the exit
status; end of file there without one means that the server died.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import select
import signal
import socket
import subprocess
import sys
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

REQUEST_BYTES = 1 << 20


class ForkedProcess:
    """A child of the server, with what tests use of ``subprocess.Popen``."""

    def __init__(self, status: socket.socket) -> None:
        self._status = status
        data, descriptors, _, _ = socket.recv_fds(status, 64, 1)
        if not data:
            raise RuntimeError("the fork server died; its traceback is above")
        self.pid = int(data)
        self._pidfd = descriptors[0]  # a signal cannot reach another process that got the same pid
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """The exit status, as ``Popen`` has it (-9 after SIGKILL); None while it runs."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the end; the exit status."""
        if self.returncode is None:
            poller = select.poll()
            poller.register(self._status, select.POLLIN)
            if not poller.poll(None if timeout is None else 1000 * timeout):
                raise subprocess.TimeoutExpired(f"rank process {self.pid}", timeout or 0.0)
            data = self._status.recv(64)
            if not data:
                raise RuntimeError(f"the fork server died before process {self.pid} ended")
            self.returncode = int(data)
            self._status.close()
            os.close(self._pidfd)
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Send a signal, unless it has ended."""
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, number)

    def kill(self) -> None:
        """Send SIGKILL."""
        self.send_signal(signal.SIGKILL)


class ForkServer:
    """The client's end: starts the server process and asks it for ranks."""

    def __init__(self) -> None:
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._control.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, REQUEST_BYTES)
        self._process = subprocess.Popen(
            [sys.executable, __file__, str(theirs.fileno()), repr(sys.path)],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            pass_fds=[theirs.fileno()],
        )
        theirs.close()

    def is_alive(self) -> bool:
        return self._process.poll() is None

    def fork(self, pipe: Connection, env: dict[str, str], init_args: Any) -> ForkedProcess:
        """A rank with this environment that serves ``pipe``, in this folder, with our output."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        request = pickle.dumps((env, os.getcwd(), list(sys.path), init_args))
        with theirs:
            socket.send_fds(self._control, [request], [pipe.fileno(), theirs.fileno(), 1, 2])
        return ForkedProcess(ours)

    def stop(self) -> None:
        """End the server; it waits for its ranks first."""
        self._control.close()
        self._process.wait()


_server: ForkServer | None = None


def fork_server() -> ForkServer:
    """The run's server, started by the first call."""
    global _server
    if _server is None or not _server.is_alive():
        _server = ForkServer()
    return _server


def stop_fork_server() -> None:
    """End the run's server, after the last of its ranks."""
    global _server
    if _server is not None:
        _server.stop()
        _server = None


def _become_rank(request: bytes, stdout: int, stderr: int) -> Any:
    """In the child: apply the request before anything reads what it sets."""
    env, folder, path, init_args = pickle.loads(request)
    os.dup2(stdout, 1)
    os.dup2(stderr, 2)
    os.close(stdout)
    os.close(stderr)
    os.environ.clear()
    os.environ.update(env)
    os.chdir(folder)
    sys.path[:] = path
    signal.signal(signal.SIGINT, signal.default_int_handler)
    name = f"rank {env['RANK']} of {env['WORLD_SIZE']}"
    Path("/proc/self/comm").write_text(name)  # what ps and top show
    return init_args


def serve(control: socket.socket) -> tuple[Connection, Any] | None:
    """Fork a rank for each request. Returns in each child, with its pipe and arguments; and None in
    the server, when the test run and all ranks have ended.
    """
    ends: dict[int, tuple[int, socket.socket]] = {}  # by pidfd: the pid and its status socket
    poller = select.poll()
    poller.register(control, select.POLLIN)
    is_open = True
    while is_open or ends:
        for ready, _ in poller.poll():
            if ready in ends:
                pid, status = ends.pop(ready)
                poller.unregister(ready)
                os.close(ready)
                code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
                with status, contextlib.suppress(BrokenPipeError):
                    status.send(b"%d" % code)
                continue
            request, descriptors, _, _ = socket.recv_fds(control, REQUEST_BYTES, 4)
            if not request:
                is_open = False
                poller.unregister(control)
                continue
            threads = os.listdir("/proc/self/task")
            if len(threads) != 1:
                raise RuntimeError(f"the fork server has threads {threads}: forking is not safe")
            pipe, status_fd, stdout, stderr = descriptors
            pid = os.fork()
            if pid == 0:
                for pidfd, (_, other) in ends.items():
                    os.close(pidfd)
                    other.close()
                os.close(status_fd)
                control.close()
                return Connection(pipe), _become_rank(request, stdout, stderr)
            status = socket.socket(fileno=status_fd)
            pidfd = os.pidfd_open(pid)
            socket.send_fds(status, [b"%d" % pid], [pidfd])
            ends[pidfd] = (pid, status)
            poller.register(pidfd, select.POLLIN)
            for descriptor in (pipe, stdout, stderr):
                os.close(descriptor)
    return None


def main() -> None:
    sys.path[:] = eval(sys.argv[2])
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the ranks and the test run

    import gc
    import importlib

    for module in ("torch", "torch.testing", "tp_native", "pytest", "harness"):
        importlib.import_module(module)
    gc.collect()
    gc.freeze()  # collections in the ranks leave the shared pages alone

    import harness  # not __main__: its classes travel between the processes

    rank = serve(socket.socket(fileno=int(sys.argv[1])))
    if rank is not None:
        harness.serve(*rank)


if __name__ == "__main__":
    main()
