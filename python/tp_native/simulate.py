"""Ranks as threads of one process: for tests, notebooks and debuggers."""

from __future__ import annotations

import contextvars
import itertools
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any, TypeVar

import torch

from . import gpu
from ._native import _C
from .config import TensorParallelConfig
from .group import Group, _override, _process

T = TypeVar("T")
_simulations = itertools.count()


@contextmanager
def _stream_of_its_own(device: torch.device, given: torch.cuda.Event | None) -> Iterator[None]:
    """A stream of ``device`` as this thread's, behind what the caller had launched."""
    torch.cuda.set_device(device)
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    if given is not None:
        stream.wait_event(given)
    with torch.cuda.stream(stream):
        yield


def simulate(
    fn: Callable[..., T], world_size: int, *args: Any, device: torch.device | str | None = None
) -> list[T]:
    """Run ``fn(group, *args)`` on ``world_size`` thread ranks of this process; the results in rank
    order.

    For tests, notebooks and debuggers: the same collectives as between processes. ``device``: the
    GPU that all ranks (4 at the most, on an H200) share, each on a stream of its own, with
    collectives of our own kernels. These wait for each other, so set ``CUDA_MODULE_LOADING=EAGER``
    and ``CUDA_DEVICE_MAX_CONNECTIONS=32`` before CUDA starts. None: the CPU. The first failure is
    raised here, after all ranks have ended.
    """
    if world_size < 1:
        raise ValueError(f"simulate: world_size {world_size}, expected at least 1")
    place = None if device is None else gpu.shared_device(device)
    name = f"tp:sim{next(_simulations)}"
    timeout_s = TensorParallelConfig.timeout_s
    communicators: list[_C.Communicator | None] = [None]
    if world_size > 1:
        communicators = list(_C.make_local(name, world_size, timeout_s))
    results: list[Any] = [None] * world_size
    failures: list[BaseException] = []
    grad_enabled = torch.is_grad_enabled()
    given = None if place is None else torch.cuda.current_stream(place).record_event()

    def run(rank: int) -> None:
        config = TensorParallelConfig(rank, world_size, rank, world_size, "local")
        communicator = communicators[rank]
        group: Group | None = None
        try:
            with ExitStack() as stack:
                if place is not None:
                    config = replace(config, device=place)
                    stack.enter_context(_stream_of_its_own(place, given))
                    if communicator is not None:
                        communicator = _C.make_peers(place.index, communicator)
                        communicators[rank] = communicator
                group = Group(config, communicator, f"{name}@{rank}")
                if communicator is not None:
                    _C.register(group.name, communicator)
                _override.set(group)
                stack.enter_context(torch.set_grad_enabled(grad_enabled))
                stack.enter_context(torch.autograd.set_multithreading_enabled(False))
                results[rank] = fn(group, *args)
                if place is not None:  # what failed on the GPU is known by then
                    torch.cuda.current_stream(place).synchronize()
                    group.check()
        except BaseException as error:
            failures.append(error)
            reason = f"{type(error).__name__}: {error}"
            if group is not None:
                group.abort(reason)
            elif communicator is not None:
                communicator.abort(reason)
        finally:
            if group is not None:
                group.close()

    threads = [
        threading.Thread(target=contextvars.Context().run, args=(run, rank), name=f"{name}@{rank}")
        for rank in range(world_size)
    ]
    with _process.lock:
        _process.simulations += 1
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
    finally:
        with _process.lock:
            _process.simulations -= 1
    if failures:
        raise failures[0]
    return results
