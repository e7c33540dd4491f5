"""A plan for readers: modules folded by layer, shards, bytes per rank, collectives per forward."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..partition import ShardLayout

if TYPE_CHECKING:
    from .shards import ShardPlan


@dataclass(frozen=True)
class Row:
    """Modules of one kind: ``pattern`` with ``*`` for layer numbers, how many, their cut."""

    pattern: str
    count: int
    style: str
    size: int
    local_sizes: tuple[int, ...]
    bytes_per_rank: tuple[int, ...] | None  # None: tied to a module above
    note: str


def rows(plan: ShardPlan) -> list[Row]:
    """The plan's cut modules, folded."""
    folded: dict[tuple[object, ...], list[str]] = {}
    for name, entry in plan.entries.items():
        key = (pattern_of(name), entry.style, entry.partition, entry.note)
        folded.setdefault(key, []).append(name)
    made = []
    for names in folded.values():
        entry = plan.entries[names[0]]
        params = [f"{n}.{local}".lstrip(".") for n in names for local in plan.entries[n].shards]
        held = [param for param in params if param not in plan.aliases]
        sizes = tuple(
            sum(plan.held_bytes(p, rank) for p in held) for rank in range(plan.world_size)
        )
        layout = ShardLayout.of(entry.partition)
        made.append(
            Row(
                pattern_of(names[0]),
                len(names),
                entry.style,
                layout.size,
                layout.local_sizes.sizes,
                sizes if held else None,
                entry.note,
            )
        )
    return made


def pattern_of(name: str) -> str:
    """A module's name with its numbers as ``*``."""
    return re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", name)


def as_text(plan: ShardPlan) -> str:
    """The plan as plain text."""
    table = [("module", "count", "style", "cut", "bytes per rank")]
    for row in rows(plan):
        cut = f"{_slashes(row.local_sizes)} of {row.size}"
        what = _slashes(row.bytes_per_rank) if row.bytes_per_rank is not None else "tied"
        table.append((row.pattern, str(row.count), row.style, cut, what))
    widths = [max(len(line[i]) for line in table) for i in range(5)]
    lines = ["  ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)) for r in table]
    count, token_bytes = plan.collectives()
    per_rank = [plan.local_bytes(rank) for rank in range(plan.world_size)]
    return "\n".join(
        [
            f"{plan.model_name} on {plan.world_size} ranks",
            *(line.rstrip() for line in lines),
            f"weights per rank: {_slashes(per_rank)} bytes of {plan.whole_bytes()}",
            f"collectives per forward: {count}, {token_bytes} bytes per token",
        ]
    )


def _slashes(sizes: Sequence[int]) -> str:
    return "/".join(map(str, sizes)) if len(set(sizes)) > 1 else str(sizes[0])
