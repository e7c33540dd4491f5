"""The one timer of the benchmarks, what a run was made on, and how its JSON is written.

All candidates run in the same processes: one batch each per round, the order rotated from round to
round, the time of a batch that of its slowest rank. ``producer_consumer`` wraps a collective in a
local write of its whole input and a local read of its whole output, and gives the two copies alone
as a second candidate, so that their cost can be subtracted. ``rounds.h`` does the same in C++.
"""

from __future__ import annotations

import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import tp_native as tp
from tp_native._native import _C

ROOT = Path(__file__).resolve().parents[1]
COPIES = " copies"


@dataclass(frozen=True)
class Candidate:
    """Something to time. ``check`` raises unless the last call's result is right; it runs after
    every batch, off the clock. ``repeat(count)`` is ``count`` calls of ``run`` without Python in
    between.
    """

    name: str
    run: Callable[[], object]
    check: Callable[[], None] | None = None
    repeat: Callable[[int], object] | None = None


@dataclass(frozen=True)
class Operator:
    """A collective on ``t`` in place as an expression of TorchScript, called from C++; ``extra`` is
    a tensor that the expression may name.
    """

    call: str
    extra: Tensor | None = None


@dataclass(frozen=True)
class Timing:
    """Microseconds per call; ``spread`` is the distance of the quartiles over the median."""

    median_us: float
    best_us: float
    spread: float
    rounds_us: tuple[float, ...]

    @classmethod
    def of(cls, rounds_us: Sequence[float]) -> Timing:
        low, median, high = statistics.quantiles(rounds_us, n=4)
        return cls(median, min(rounds_us), (high - low) / median, tuple(rounds_us))

    def without(self, copies: Timing) -> Timing:
        """This minus what its copies cost in the same run."""
        rounds = zip(self.rounds_us, copies.rounds_us, strict=True)
        return Timing(
            self.median_us - copies.median_us,
            self.best_us - copies.best_us,
            self.spread,
            tuple(whole - part for whole, part in rounds),
        )

    def figures(self) -> dict[str, float]:
        """For the JSON."""
        return {"median_us": self.median_us, "best_us": self.best_us, "spread": self.spread}


@dataclass(frozen=True)
class Plan:
    """How much is measured. ``best`` and ``median`` need 9 rounds or more."""

    rounds: int = 31
    batch_s: float = 2e-3

    @classmethod
    def quick(cls) -> Plan:
        return cls(rounds=9, batch_s=1e-3)


def measure(
    group: tp.Group, candidates: Sequence[Candidate], plan: Plan | None = None
) -> dict[str, Timing]:
    """One Timing per candidate, the same on all ranks. Collective."""
    plan = plan or Plan()
    repetitions: list[int] = []
    for candidate in candidates:
        count = 2
        for _ in range(2):  # the first one is cold and counts too few
            each_s = torch.tensor([_batch(group, candidate, count) / count], dtype=torch.float64)
            group.all_reduce_(each_s, "max")
            count = max(1, min(100_000, math.ceil(plan.batch_s / max(each_s.item(), 1e-9))))
        repetitions.append(count)
    each_us = torch.empty(len(candidates), plan.rounds, dtype=torch.float64)
    for index in range(plan.rounds):
        for offset in range(len(candidates)):
            k = (index + offset) % len(candidates)
            each_us[k, index] = 1e6 * _batch(group, candidates[k], repetitions[k]) / repetitions[k]
    group.all_reduce_(each_us, "max")
    return {
        candidate.name: Timing.of(row)
        for candidate, row in zip(candidates, each_us.tolist(), strict=True)
    }


def _batch(group: tp.Group, candidate: Candidate, count: int) -> float:
    run, repeat = candidate.run, candidate.repeat
    group.barrier()
    start = time.perf_counter()
    if repeat is not None:
        repeat(count)
    else:
        for _ in range(count):
            run()
    seconds = time.perf_counter() - start
    if candidate.check is not None:
        candidate.check()
    return seconds


def producer_consumer(
    name: str,
    collective: Callable[[Tensor], object] | Operator,
    source: Tensor,
    t: Tensor,
    sink: Tensor,
    check: Callable[[], None],
) -> list[Candidate]:
    """``collective`` works on ``t`` in place, ``source`` is its input, ``sink`` receives the result
    that ``check`` looks at.
    """

    def check_copies() -> None:
        if not torch.equal(sink, source):
            raise AssertionError(f"{name}: the copies alone changed the data")

    if isinstance(collective, Operator):
        extra = t if collective.extra is None else collective.extra
        loops = [scripted_copies(call) for call in (collective.call, "pass")]
        repeats = [partial(_in_order, loop, source, t, sink, extra) for loop in loops]
        return [
            Candidate(name, partial(repeats[0], 1), check, repeats[0]),
            Candidate(name + COPIES, partial(repeats[1], 1), check_copies, repeats[1]),
        ]

    def whole() -> None:
        t.copy_(source)
        collective(t)
        sink.copy_(t)

    def copies() -> None:
        t.copy_(source)
        sink.copy_(t)

    return [Candidate(name, whole, check), Candidate(name + COPIES, copies, check_copies)]


@cache
def scripted_copies(call: str) -> Callable[..., None]:
    """A write of the input, ``call``, and a read of the output, ``count`` times."""
    return scripted(
        f"""
def loop(count: int, source: Tensor, t: Tensor, sink: Tensor, extra: Tensor):
    for _ in range(count):
        t.copy_(source)
        {call}
        sink.copy_(t)
"""
    )


def scripted(source: str) -> Callable[..., None]:
    """TorchScript's ``loop``: its interpreter calls operators from C++, at 0.1 us each, where
    Python takes 1.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated, and without a successor for this
        loop: Callable[..., None] = torch.jit.CompilationUnit(source).loop

    def run(*arguments: Any) -> None:
        with torch.jit.optimized_execution(False):  # no profiling, no recompilation on the clock
            loop(*arguments)

    return run


def _in_order(loop: Callable[..., None], *tensors_and_count: Any) -> None:
    loop(tensors_and_count[-1], *tensors_and_count[:-1])


def net(timings: dict[str, Timing], name: str) -> Timing:
    """A ``producer_consumer`` candidate without its copies."""
    return timings[name].without(timings[name + COPIES])


def pin_rank(group: tp.Group) -> None:
    """One core for this rank's main thread, where there are enough; other threads stay free.

    Beside a busy neighbour the scheduler may keep both ranks on one core: a flag round trip then
    takes 200 us. Call it after ``init_tensor_parallel``, which counts the cores.
    """
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) >= group.size > 1:
        os.sched_setaffinity(0, {cores[group.rank]})


def output_of(*command: str) -> str:
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _cpu(field: str) -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(field)), "")


def environment() -> dict[str, Any]:
    """What a figure depends on: commit, versions, CPU, flags."""
    wide = ("avx2", "avx512", "amx", "avx_vnni")
    return {
        "commit": output_of("git", "rev-parse", "HEAD") or "unknown",
        "has_local_changes": bool(
            output_of("git", "status", "--porcelain", "--", "csrc", "python")
        ),
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        # of paths the last part: where they lie is no one's business
        "command": [Path(word).name if Path(word).is_absolute() else word for word in sys.argv],
        "tp_native": tp.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "kernel": platform.release(),
        "cpu": _cpu("model name") or platform.machine(),
        "cpu_flags": [flag for flag in _cpu("flags").split() if flag.startswith(wide)],
        "cores": os.cpu_count(),
        "load_average": list(os.getloadavg()),
        "reduce_isa": _C.reduce_isa(),
        "torch_capability": torch.backends.cpu.get_cpu_capability(),
        "torch_threads": torch.get_num_threads(),
    }


def plan_facts(plan: Plan) -> dict[str, Any]:
    """For the JSON: how the figures were taken."""
    return {**asdict(plan), "batch_time": "slowest rank", "spread": "interquartile over median"}


def write_json(path: str | Path, result: dict[str, Any]) -> None:
    """The whole file or the old one."""
    path = Path(path)
    part = path.with_name(path.name + f".{os.getpid()}.part")
    try:
        part.write_text(json.dumps(result, indent=1) + "\n")
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
