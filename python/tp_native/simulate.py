"""Ranks as threads of one process: for tests, notebooks and debuggers."""

from __future__ import annotations

import contextvars
import itertools
import threading
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from ._native import _C
from .config import TensorParallelConfig
from .group import Group, _override, _process

T = TypeVar("T")
_simulations = itertools.count()


def simulate(fn: Callable[..., T], world_size: int, *args: Any) -> list[T]:
    """Run ``fn(group, *args)`` on ``world_size`` thread ranks of this process; the results in rank
    order.

    For tests, notebooks and debuggers: the same collectives as between processes. The first failure
    is raised here, after all ranks have ended.
    """
    if world_size < 1:
        raise ValueError(f"simulate: world_size {world_size}, expected at least 1")
    name = f"tp:sim{next(_simulations)}"
    timeout_s = TensorParallelConfig.timeout_s
    communicators: list[_C.Communicator | None] = [None]
    if world_size > 1:
        communicators = list(_C.make_local(name, world_size, timeout_s))
    results: list[Any] = [None] * world_size
    failures: list[BaseException] = []
    grad_enabled = torch.is_grad_enabled()

    def run(rank: int) -> None:
        config = TensorParallelConfig(rank, world_size, rank, world_size, "local")
        communicator = communicators[rank]
        group = Group(config, communicator, f"{name}@{rank}")
        if communicator is not None:
            _C.register(group.name, communicator)
        _override.set(group)
        try:
            with (
                torch.set_grad_enabled(grad_enabled),
                torch.autograd.set_multithreading_enabled(False),
            ):
                results[rank] = fn(group, *args)
        except BaseException as error:
            failures.append(error)
            group.abort(f"{type(error).__name__}: {error}")
        finally:
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
