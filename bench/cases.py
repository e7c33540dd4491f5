"""The all-reduce under test, through each library, with the check of its result.

Producer/consumer mode; ``cases.h`` does the same in C++. Knows nothing of which libraries there
are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import tp_native as tp
from timing import Candidate, Operator, Plan, measure, net, producer_consumer

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
AllReduce = Callable[[Tensor], object] | Operator


def check_against(sources: list[Tensor], sink: Tensor, name: str) -> Callable[[], None]:
    """A check that ``sink`` holds the sum of ``sources``, within one rounding per term."""
    expected = torch.stack([source.double() for source in sources]).sum(0)
    bound = torch.stack([source.double().abs() for source in sources]).sum(0)
    bound *= torch.finfo(sink.dtype).eps * len(sources)

    def check() -> None:
        wrong = (sink.double() - expected).abs() > bound
        if wrong.any():
            raise AssertionError(f"{name}: {int(wrong.sum())} of {sink.numel()} sums are wrong")

    return check


def all_reduce_row(
    group: tp.Group,
    size: int,
    dtype: str,
    others: dict[str, AllReduce],
    ours: dict[str, AllReduce],
    plan: Plan,
) -> dict[str, Any]:
    """All at one size; "shared" works on a shared tensor, every other on an ordinary one."""
    kind = DTYPES[dtype]
    count = size // kind.itemsize
    sources = [
        torch.rand(count, generator=torch.Generator().manual_seed(rank)).sub_(0.5).to(kind)
        for rank in range(group.size)
    ]
    calls = {**others, **ours}
    sink = torch.ones(count, dtype=kind)
    candidates: list[Candidate] = []
    for path, call in calls.items():
        t = group.empty_shared(count, dtype=kind) if path == "shared" else torch.empty_like(sink)
        t.fill_(1)
        name = f"{path}, {dtype}, {size} bytes"
        check = check_against(sources, sink, name)
        candidates += producer_consumer(path, call, sources[group.rank], t, sink, check)
    timings = measure(group, candidates, plan)
    row: dict[str, Any] = {"op": "all_reduce", "dtype": dtype, "bytes": size, "verified": True}
    for path in calls:
        timing = net(timings, path)
        bus_factor = 2 * (group.size - 1) / group.size
        algorithm = size / timing.best_us / 1e3
        row[path] = {
            **timing.figures(),
            "gross": timings[path].figures(),
            "alg_gb_per_s": algorithm,
            "bus_gb_per_s": algorithm * bus_factor,
        }
    return row | ratios(row, list(others), list(ours))


def ratios(row: dict[str, Any], others: list[str], ours: list[str]) -> dict[str, float]:
    """The others' times over ours, of the best rounds and of the medians. 0: lost in the noise, a
    time without its copies is not positive.
    """

    def ratio(other: str, path: str, figure: str) -> float:
        theirs, mine = row[other][figure], row[path][figure]
        return theirs / mine if min(theirs, mine) > 0 else 0.0

    return {
        f"{other}_over_{path}{suffix}": ratio(other, path, figure)
        for other in others
        for path in ours
        for suffix, figure in (("", "best_us"), ("_median", "median_us"))
    }


def size_text(size: int) -> str:
    """1024 -> "1 KiB"."""
    for unit, name in ((1 << 20, "MiB"), (1 << 10, "KiB")):
        if size >= unit and size % unit == 0:
            return f"{size // unit} {name}"
    return f"{size} B"
