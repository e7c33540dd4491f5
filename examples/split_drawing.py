"""Draws which rank holds what of a transformer block's four matrices: as text, as a picture."""

from __future__ import annotations

import string
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CELL = (16, 10)  # weights that a character stands for, down and across: characters are tall
RANKS = string.digits + string.ascii_lowercase
COLOURS = ("#3b7dd8", "#f0a13c", "#4e9a51", "#c2557f", "#8d6bc9", "#38a6a5", "#9c6b3f", "#7a7a7a")
INK = "#1b1b1b"


@dataclass(frozen=True)
class Matrix:
    """A weight as nn.Linear stores it: ``rows`` are its outputs, ``columns`` its inputs. ``parts``
    are the ranges of dimension ``dim`` that each rank holds; none: every rank holds the whole.
    """

    name: str
    rows: int
    columns: int
    dim: int
    parts: Sequence[Sequence[Sequence[int]]]

    def holder(self, row: int, column: int) -> str:
        """The rank that holds a number; ``*`` for all of them."""
        at = (row, column)[self.dim]
        for rank, ranges in enumerate(self.parts):
            if any(start <= at < stop for start, stop in ranges):
                return RANKS[rank]
        return "*"

    def cut(self) -> str:
        """How it is cut, in two words."""
        return ("rows cut", "columns cut")[self.dim] if len(self.parts) > 1 else "whole"


def draw_text(matrices: Sequence[Matrix]) -> str:
    """The block from left to right; a digit is the rank that holds this part."""
    drawn = [_characters(matrix) for matrix in matrices]
    heads = [
        (matrix.name.rpartition(".")[2], f"{matrix.rows} x {matrix.columns}", matrix.cut())
        for matrix in matrices
    ]
    fused = len(drawn[0]) // 3
    arrows = ("-->", "==>" if len(matrices[0].parts) > 1 else "-->") * 2
    middle = min(map(len, drawn)) // 2
    lines = []
    for at in range(3):
        row = [f"{head[at]:<{len(block[0]) + 5}}" for head, block in zip(heads, drawn, strict=True)]
        lines.append("    " + "".join(row))
    for at in range(max(map(len, drawn))):
        line = f"  {'qkv'[at // fused] if at in (0, fused, 2 * fused) else ' '} "
        for block, arrow in zip(drawn, arrows, strict=True):
            line += f"{block[at] if at < len(block) else '':<{len(block[0])}} "
            line += f"{arrow if at == middle else '':<4}"
        lines.append(line)
    lines += [
        "",
        "    0: held by rank 0    -->: stays on each rank    ==>: all-reduce over the ranks",
    ]
    return "\n".join(line.rstrip() for line in lines)


def _characters(matrix: Matrix) -> list[str]:
    down, across = (
        range(cell // 2, size, cell)
        for cell, size in zip(CELL, (matrix.rows, matrix.columns), strict=True)
    )
    return ["".join(matrix.holder(row, column) for column in across) for row in down]


def draw_picture(matrices: Sequence[Matrix], ranks: int, title: str, path: Path) -> bool:
    """The same to scale, in colours; False without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.patches import Patch

    figure, axes = plt.subplots(figsize=(13, 5.6))
    unit = matrices[1].rows  # the model's width; every gap is a share of it
    left = 0.9 * unit
    notes = ("attention:\neach rank\nits own heads", "all-reduce", "GELU", "all-reduce")
    _arrow(axes, (0.05 * unit, left - 0.3 * unit), 0, "x", unit)
    for at, (matrix, note) in enumerate(zip(matrices, notes, strict=True)):
        _matrix(axes, matrix, left, unit)
        if at == 0:
            for part, letter in enumerate("qkv"):
                y = matrix.rows * (0.5 - (part + 0.5) / 3)
                axes.text(left - 0.12 * unit, y, letter, ha="right", va="center", fontsize=12)
                edge = matrix.rows * (0.5 - part / 3)
                axes.plot(
                    (left - 0.08 * unit, left + matrix.columns), (edge, edge), color=INK, lw=1
                )
        left += matrix.columns
        gap = 1.75 * unit
        if at % 2 == 0 or ranks == 1:
            note = note if at % 2 == 0 else ""
            _each_on_its_own(axes, (left, left + gap), ranks, note, unit)
        else:
            _summed(axes, (left, left + gap), ranks, note, unit)
        left += gap
    height = max(matrix.rows for matrix in matrices)
    axes.set_xlim(0, left + 0.1 * unit)
    axes.set_ylim(-0.5 * height - 0.85 * unit, 0.5 * height + 0.15 * unit)
    axes.set_aspect("equal")
    axes.axis("off")
    held = [Patch(color=_colour(rank), label=f"rank {rank}") for rank in range(ranks)]
    axes.legend(handles=held, frameon=False, loc="lower right", ncols=min(ranks, 4), fontsize=11)
    axes.set_title(title, fontsize=13, loc="left")
    how = "weights as nn.Linear stores them: outputs down, inputs across"
    axes.text(0, -0.5 * height - 0.7 * unit, how, va="center", fontsize=10, color="#5c5c5c")
    figure.tight_layout()
    figure.savefig(path, dpi=120, bbox_inches="tight")
    plt.close(figure)
    return True


def _colour(rank: int) -> str:
    return COLOURS[rank % len(COLOURS)]


def _matrix(axes: Any, matrix: Matrix, left: float, unit: float) -> None:
    """A rectangle centred on the line, each rank's part in its colour."""
    from matplotlib.patches import Rectangle

    top = matrix.rows / 2
    for rank, ranges in enumerate(matrix.parts):
        for start, stop in ranges:
            corner = (left, top - stop) if matrix.dim == 0 else (left + start, -top)
            size = (
                (matrix.columns, stop - start) if matrix.dim == 0 else (stop - start, matrix.rows)
            )
            axes.add_patch(
                Rectangle(corner, *size, facecolor=_colour(rank), edgecolor="white", lw=0.5)
            )
    axes.add_patch(Rectangle((left, -top), matrix.columns, matrix.rows, fill=False, edgecolor=INK))
    middle = left + matrix.columns / 2
    text = f"{matrix.name}\n{matrix.rows} x {matrix.columns}, {matrix.cut()}"
    axes.text(middle, -top - 0.12 * unit, text, ha="center", va="top", fontsize=10)


def _each_on_its_own(
    axes: Any, ends: tuple[float, float], ranks: int, note: str, unit: float
) -> None:
    """An arrow for every rank: nothing passes between them."""
    step = 0.5 * unit / ranks
    for rank in range(ranks):
        y = step * ((ranks - 1) / 2 - rank)
        _arrow(axes, (ends[0] + 0.12 * unit, ends[1] - 0.12 * unit), y, "", unit, _colour(rank))
    axes.text(sum(ends) / 2, 0.36 * unit, note, ha="center", va="bottom", fontsize=10)


def _summed(axes: Any, ends: tuple[float, float], ranks: int, note: str, unit: float) -> None:
    """Every rank's arrow into one sum, which all of them get."""
    from matplotlib.patches import Circle

    centre = sum(ends) / 2 - 0.1 * unit
    step = 0.5 * unit / ranks
    for rank in range(ranks):
        y = step * ((ranks - 1) / 2 - rank)
        start = ends[0] + 0.12 * unit
        axes.plot((start, centre), (y, 0), color=_colour(rank), lw=2, zorder=1)
    axes.add_patch(
        Circle((centre, 0), 0.2 * unit, facecolor="white", edgecolor=INK, lw=1.5, zorder=2)
    )
    axes.text(centre, 0, "Σ", ha="center", va="center", fontsize=12, zorder=3)
    _arrow(axes, (centre + 0.2 * unit, ends[1] - 0.12 * unit), 0, "", unit)
    axes.text(centre, 0.36 * unit, note, ha="center", va="bottom", fontsize=10, weight="bold")


def _arrow(
    axes: Any, ends: tuple[float, float], y: float, text: str, unit: float, colour: str = INK
) -> None:
    style = {"arrowstyle": "-|>", "color": colour, "lw": 2, "shrinkA": 0, "shrinkB": 0}
    axes.annotate("", (ends[1], y), (ends[0], y), arrowprops=style)
    if text:
        axes.text(sum(ends) / 2, 0.1 * unit, text, ha="center", va="bottom", fontsize=11)
