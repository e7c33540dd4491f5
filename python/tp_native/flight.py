"""Flight records: what every rank did last before a group failed. ``tp-native blame`` prints them.

The native core writes them (``csrc/comm/flight.cpp``); they are JSON, one file per failure.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

KEPT = 32


def prune(folder: str) -> None:
    """Keep the newest records of ``folder`` only."""
    if not folder:
        return
    with contextlib.suppress(OSError):
        files = [(file.stat().st_mtime, file) for file in Path(folder).glob("flight-*.json")]
        for _, file in sorted(files)[:-KEPT]:
            file.unlink(missing_ok=True)


def read(path: Path) -> dict[str, Any]:
    """The record in ``path``.

    Raises: ValueError for a file that is none, OSError for one that cannot be read.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no flight record: {error}") from None
    if not isinstance(record, dict) or record.get("format") != "tp_native flight record":
        raise ValueError(f'{path} is no flight record: it has no "format" of one')
    if record.get("version") != 1:
        raise ValueError(f"{path} is a flight record of version {record.get('version')}, not 1")
    try:
        explain(record)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{path} is a damaged flight record: {error!r}") from None
    return record


def explain(record: dict[str, Any], last: int = 5) -> str:
    """Who did it, where every rank was, and the ``last`` operations of all ranks side by side."""
    failure, ranks = record["failure"], record["ranks"]
    culprit = failure["culprit"]
    lines = [
        f"{record['group']} ({record['backend']}, {record['size']} ranks), {record['written']}: "
        f"{failure['kind'].replace('_', ' ')}"
        + (f", culprit rank {culprit}" if culprit >= 0 else ""),
        f"  {failure['text']}",
        "",
        "rank  pid      state",
    ]
    for rank in ranks:
        lines.append(f"{rank['rank']:<5} {rank['pid']:<8} {_state(rank)}")
    lines += ["", *_divergence(ranks)]
    newest = max((op["seq"] for rank in ranks for op in rank["operations"]), default=0)
    if newest:
        lines += ["", f"operations #{max(1, newest - last + 1)} to #{newest}, seconds before this:"]
        for seq in range(max(1, newest - last + 1), newest + 1):
            lines += [f"  #{seq}"]
            lines += [f"    rank {rank['rank']}: {_entry(rank, seq)}" for rank in ranks]
    return "\n".join(lines)


def _state(rank: dict[str, Any]) -> str:
    operations = rank["operations"]
    left = "left the group " if rank["has_left"] else ""
    if not operations:
        return f"{left}before its first operation"
    op = operations[-1]
    if op["end_s"] is None:
        return f"{left}in {_describe(op)} #{op['seq']} since {-op['start_s']:.3f} s"
    return f"{left}after {_describe(op)} #{op['seq']}, {-op['end_s']:.3f} s before"


def _divergence(ranks: list[dict[str, Any]]) -> Iterable[str]:
    """The first operation that ranks entered differently, of those that all still remember."""
    by_rank = [{op["seq"]: op for op in rank["operations"]} for rank in ranks]
    common = set.intersection(*(set(ops) for ops in by_rank)) if by_rank else set()
    for seq in sorted(common):
        if len({ops[seq]["signature"] for ops in by_rank}) > 1:
            yield f"the ranks part at #{seq}:"
            for rank, ops in zip(ranks, by_rank, strict=True):
                yield f"  rank {rank['rank']}: {_describe(ops[seq])}"
            return
    yield f"the ranks agree in all {len(common)} operations that they all entered"


def _entry(rank: dict[str, Any], seq: int) -> str:
    op = next((op for op in rank["operations"] if op["seq"] == seq), None)
    if op is None:
        return "-"
    end = "not finished" if op["end_s"] is None else f"{(op['end_s'] - op['start_s']) * 1e6:.0f} us"
    return f"{_describe(op)}, {-op['start_s']:.6f}, {end}"


def _describe(op: dict[str, Any]) -> str:
    if op["op"] == "barrier":
        return "barrier"
    reduce = f"{op['reduce']}, " if op["op"] in ("all_reduce", "reduce_scatter") else ""
    root = f", root {op['root']}" if op["root"] >= 0 else ""
    dim = f", dim {op['dim']}" if op["dim"] >= 0 else ""
    return f"{op['op']}({reduce}{op['dtype']} {op['shape']}{root}{dim})"
