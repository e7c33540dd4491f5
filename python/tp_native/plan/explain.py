"""A plan for readers: as text, and as a table for terminals."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..partition import ShardLayout
from .facts import (
    BACKWARD,
    FORWARD,
    by_op,
    collectives,
    path,
    sharded_share,
    waste,
    whole_matrices,
)
from .shards import ATTENTION, COLUMN_GATHER, ShardEntry, ShardPlan

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType

_WIDTH = 100
_LIST = 14  # columns for a list of sizes
_SHORT = {COLUMN_GATHER: "colwise_rep"}  # as rules may call it too
_NUMBER = re.compile(r"(?:^|(?<=\.))\d+(?=\.|$)")
_HEADS = ("module", "n", "cut", "each rank", "bytes", "forward")
_LOOKS = ("bold", "dim", "cyan", "", "green", "magenta")


@dataclass(frozen=True)
class Row:
    """Modules of one kind, ``count`` of them: their cut, and what they hold together."""

    name: str
    count: int
    style: str
    sizes: str
    bytes_per_rank: tuple[int, ...] | None  # None: tied to a module above
    forward: str
    note: str

    def cells(self) -> tuple[str, ...]:
        """The row as text."""
        held = "tied" if self.bytes_per_rank is None else _bytes_text(self.bytes_per_rank)
        style = _SHORT.get(self.style, self.style)
        return self.name, str(self.count), style, self.sizes, held, self.forward


def rows(plan: ShardPlan) -> list[Row]:
    """The plan's cut modules, folded by layer."""
    ending = {c.module: c.op for c in collectives(plan) if c.direction == FORWARD}
    folded: dict[tuple[object, ...], list[str]] = {}
    for name, entry in plan.entries.items():
        is_held = any(path(name, local) not in plan.aliases for local in entry.shards)
        cut = (entry.style, entry.partition, entry.features, entry.gather_grad, entry.note)
        key = (pattern_of(name), *cut, plan.calls_of(name), is_held)
        folded.setdefault(key, []).append(name)
    fold = _Names([*plan.entries])
    made = []
    for names in folded.values():
        entry, calls = plan.entries[names[0]], plan.calls_of(names[0])
        params = [path(n, local) for n in names for local in plan.entries[n].shards]
        held = [param for param in params if param not in plan.aliases]
        per_rank = tuple(
            sum(plan.held_bytes(p, rank) for p in held) for rank in range(plan.world_size)
        )
        times = {0: "not called", 1: ""}.get(calls, f"x{calls}")
        forward = f"{ending.get(names[0], '')} {times}".strip()
        made.append(
            Row(
                fold(names),
                len(names),
                entry.style,
                _cut_text(entry),
                per_rank if held else None,
                forward,
                entry.note,
            )
        )
    return made


def pattern_of(name: str) -> str:
    """A module's name with its numbers as ``*``."""
    return _NUMBER.sub("*", name)


class _Names:
    """Folds names that differ in numbers only: ``*`` where all of a place's numbers are meant."""

    def __init__(self, known: Iterable[str]) -> None:
        self._all: dict[str, list[tuple[int, ...]]] = {}
        for name in known:
            self._all.setdefault(pattern_of(name), []).append(_numbers(name))

    def __call__(self, names: Sequence[str]) -> str:
        pattern = pattern_of(names[0])
        mine = [set(place) for place in zip(*map(_numbers, names), strict=True)]
        known = [set(place) for place in zip(*self._all[pattern], strict=True)]
        words = [
            str(min(some)) if len(some) == 1 else "*" if some == all_ else f"[{_spans(some)}]"
            for some, all_ in zip(mine, known, strict=True)
        ]
        return _NUMBER.sub(lambda match: words.pop(0), names[0])


def _numbers(name: str) -> tuple[int, ...]:
    return tuple(map(int, _NUMBER.findall(name)))


def _spans(numbers: Iterable[int]) -> str:
    spans: list[list[int]] = []
    for number in sorted(numbers):
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in spans)


def _cut_text(entry: ShardEntry) -> str:
    layout = ShardLayout.of(entry.partition)
    text = f"{_listed([*map(str, layout.local_sizes)])} of {layout.size}"
    if entry.style == ATTENTION:
        return f"{text} heads"
    return f"{text}, shared" if layout.is_replicated else text


def _listed(items: Sequence[str]) -> str:
    """One item for each rank; runs of equal ones, or the ends, where that is too long."""
    if len(set(items)) == 1:
        return items[0]
    runs: list[list[Any]] = []
    for item in items:
        if runs and runs[-1][1] == item:
            runs[-1][0] += 1
        else:
            runs.append([1, item])
    short = "/".join(item if count == 1 else f"{count}*{item}" for count, item in runs)
    for text in ("/".join(items), short):
        if len(text) <= _LIST:
            return text
    return _ends(items)


def _ends(items: Sequence[str]) -> str:
    least, most = min(items, key=float), max(items, key=float)
    return least if least == most else f"{least}..{most}"


def _bytes_text(sizes: Sequence[int]) -> str:
    units = (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10))
    unit, factor = next((u for u in units if max(sizes) >= u[1]), ("B", 1))
    digits = 0 if factor == 1 else max(0, 3 - len(str(max(sizes) // factor)))
    return f"{_ends([f'{size / factor:.{digits}f}' for size in sizes])} {unit}"


def _per_cent(share: float) -> str:
    if share in (0, 1):
        return f"{100 * share:.0f}%"
    return f"{100 * share:.{2 if share < 0.01 else 1}f}%" if share >= 0.0001 else "under 0.01%"


# -- text


def as_text(plan: ShardPlan) -> str:
    """The plan as plain text, `_WIDTH` columns at most but for lone long names."""
    lines = [_title(plan)]
    table = _table(plan, _WIDTH)
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for line in table:
        cells = (cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        lines.append("  ".join(cells).rstrip())
    for heading, items in sections(plan):
        lines += [f"{heading}:", *(_wrapped(item, _WIDTH, "  ") for item in items)]
    return "\n".join([*lines, *(_wrapped(line, _WIDTH) for line in summary(plan))])


def _table(plan: ShardPlan, width: int) -> list[tuple[str, ...]]:
    """Heads and rows, names shortened to what is left of ``width``; empty if nothing is cut."""
    if not plan.entries:
        return []
    table = [_HEADS, *(row.cells() for row in rows(plan))]
    rest = sum(2 + max(map(len, column)) for column in [*zip(*table, strict=True)][1:])
    return [(_shortened(name, width - rest), *cells) for name, *cells in table]


def _wrapped(text: str, width: int, indent: str = "") -> str:
    return textwrap.fill(
        text,
        width,
        initial_indent=indent,
        subsequent_indent=f"{indent}    ",
        break_long_words=False,
        break_on_hyphens=False,
    )


def _title(plan: ShardPlan) -> str:
    ranks = "1 rank" if plan.world_size == 1 else f"{plan.world_size} ranks"
    return f"{plan.model_name} on {ranks}"


def _shortened(name: str, width: int) -> str:
    """``name`` without some of its middle words."""
    words = name.split(".")
    for at in range(2, len(words)):
        if len(name) <= width:
            break
        name = f"{words[0]}...{'.'.join(words[at:])}"
    return name


def sections(plan: ShardPlan) -> list[tuple[str, list[str]]]:
    """Headings and their lines: what stays whole, what is cut alone, what changes besides."""
    alone = [f"{row.name}: {row.note}" for row in rows(plan) if row.note]
    sizes = [
        (name, ", ".join(f"{key} {_listed([*map(str, values)])}" for key, values in found.items()))
        for name, found in plan.attributes.items()
    ]
    found = [
        ("whole on every rank", _whole_lines(plan)),
        ("cut alone, for what their features meet", alone),
        ("sizes set in modules", _folded(sizes)),
        ("whole sizes in code, run with local ones", _folded(plan.translated.items())),
        ("outputs summed over the ranks", _folded((name, "") for name in plan.summed)),
        ("gradients summed over the ranks", _folded((n, "") for n in plan.partial_gradients)),
    ]
    return [(heading, lines) for heading, lines in found if lines]


def _whole_lines(plan: ShardPlan) -> list[str]:
    whole = whole_matrices(plan)
    sizes = {one.module: one.size_bytes for one in whole}
    names = _Names(sizes)
    folded: dict[tuple[str, str], list[str]] = {}
    for one in whole:
        key = (pattern_of(one.module), pattern_in(one.reason))
        folded.setdefault(key, []).append(one.module)
    return [
        f"{names(found) or plan.model_name}{_times(found)}, "
        f"{_bytes_text([sum(sizes[name] for name in found)])}: {reason}"
        for (_, reason), found in folded.items()
    ]


def _folded(items: Iterable[tuple[str, str]]) -> list[str]:
    pairs = list(items)
    names = _Names(name for name, _ in pairs)
    folded: dict[tuple[str, str], list[str]] = {}
    for name, words in pairs:
        folded.setdefault((pattern_of(name), pattern_in(words)), []).append(name)
    return [
        f"{names(found) or 'the model'}{_times(found)}{f': {words}' if words else ''}"
        for (_, words), found in folded.items()
    ]


def _times(names: Sequence[str]) -> str:
    return f" ({len(names)})" if len(names) > 1 else ""


def pattern_in(words: str) -> str:
    """A sentence with the numbers of the names in it as ``*``."""
    return re.sub(r"(?<=[A-Za-z_]\.)\d+(?=[.,;:)\s]|$)", "*", words)


def summary(plan: ShardPlan) -> list[str]:
    """Bytes, waste and collectives of the whole plan."""
    per_rank = [plan.local_bytes(rank) for rank in range(plan.world_size)]
    lost, all_found = waste(plan), collectives(plan)
    lines = [
        f"weights: {_bytes_text(per_rank)} on each rank of {_bytes_text([plan.whole_bytes()])}; "
        f"{_per_cent(sharded_share(plan))} of the matrices' elements are cut"
    ]
    if plan.world_size > 1:
        parts = {
            "parts that several ranks hold": lost.shared_heads,
            "whole matrices": lost.matrices,
            "norms, biases and their like": lost.vectors,
        }
        told = ", ".join(f"{what} {_bytes_text([size])}" for what, size in parts.items() if size)
        lines.append(
            f"waste: the fullest rank holds {_per_cent(lost.imbalance)} more than the mean; copies "
            f"on other ranks are {_per_cent(lost.copied)} of the model{f': {told}' if told else ''}"
        )
    count, token_bytes = plan.collectives()
    kinds = by_op(all_found, FORWARD)
    told = "; ".join(f"{c['count']} {op}, {c['bytes_per_token']}" for op, c in kinds.items())
    lines.append(
        f"collectives per forward: {count}, {token_bytes} bytes per token"
        + (f" ({told})" if len(kinds) > 1 else f", all {next(iter(kinds))}" if kinds else "")
    )
    backward = [c for c in all_found if c.direction == BACKWARD]
    if backward:
        tokens = sum(c.calls * c.bytes_per_token for c in backward)
        fixed = sum(c.calls * c.bytes_per_pass for c in backward)
        lines.append(
            f"per backward: {sum(c.calls for c in backward)}, {tokens} bytes per token"
            + (f" and {fixed} bytes of parameters' gradients" if fixed else "")
        )
    return lines


# -- rich


def as_rich(plan: ShardPlan) -> RenderableType:
    """The plan as a table and lines for ``rich`` to print, as wide as its console."""
    try:
        from rich.table import Table
        from rich.text import Text
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "explain('rich') needs rich, which is not installed: pip install \"tp_native[rich]\""
        ) from error

    class Report:
        def __rich_console__(
            self, console: Console, options: ConsoleOptions
        ) -> Iterator[RenderableType]:
            width = options.max_width
            yield Text(_title(plan), "bold")
            if plan.entries:
                heads, *lines = _table(plan, width)
                table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
                for heading, look in zip(heads, _LOOKS, strict=True):
                    table.add_column(heading, style=look, overflow="fold")
                for line in lines:
                    table.add_row(*map(Text, line))
                yield table
            for heading, items in sections(plan):
                yield Text(f"{heading}:", "yellow")
                yield from (Text(_wrapped(item, width, "  ")) for item in items)
            yield from (Text(_wrapped(line, width)) for line in summary(plan))

    return Report()
