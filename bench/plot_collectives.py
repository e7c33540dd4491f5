"""Draw bench_peers' figures: time of an all-reduce over its size, one line per library, 2 ranks.

usage: plot_collectives.py [RESULT.json [PICTURE.png]]
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from cases import DTYPES, size_text

RESULTS = Path(__file__).parent / "results"
RANKS = 2
LINES = {  # label, colour, marker; one hue per library, ours in one
    "gloo": ("Gloo", "#8c8c8c", "o"),
    "openmpi": ("Open MPI", "#b07aa1", "v"),
    "deepspeed": ("DeepSpeed", "#e1a33a", "s"),
    "vllm": ("vLLM", "#4e9a51", "D"),
    "impi": ("Intel MPI", "#3b75af", "^"),
    "private": ("tp_native, ordinary tensors", "#d1495b", "o"),
    "shared": ("tp_native, shared tensors", "#8d1f30", "o"),
}


def best_by_size(result: dict[str, Any], dtype: str) -> dict[str, dict[int, float]]:
    """us net of copies of each library and size. What is in several runs (Gloo, tp_native): the
    median of the runs' bests.
    """
    found: dict[str, dict[int, list[float]]] = {}
    for run in result["runs"]:
        if run["ranks"] != RANKS:
            continue
        for row in run.get("rows", []):
            if row["dtype"] != dtype:
                continue
            for path in LINES:
                if path in row and row[path]["best_us"] > 0:
                    times = found.setdefault(path, {}).setdefault(row["bytes"], [])
                    times.append(row[path]["best_us"])
    return {
        path: {size: statistics.median(times) for size, times in sorted(sizes.items())}
        for path, sizes in found.items()
    }


def draw(result: dict[str, Any], picture: Path) -> None:
    """One panel per dtype."""
    figure, panels = plt.subplots(1, len(DTYPES), figsize=(12, 5.2), sharey=True)
    for panel, dtype in zip(panels, DTYPES, strict=True):
        lines = best_by_size(result, dtype)
        for path, (label, colour, marker) in LINES.items():
            if path not in lines:
                continue
            ours = path in ("private", "shared")
            panel.plot(
                list(lines[path]),
                list(lines[path].values()),
                label=label,
                color=colour,
                marker=marker,
                markersize=4.5,
                linewidth=2.4 if ours else 1.3,
                zorder=3 if ours else 2,
            )
        sizes = sorted({size for line in lines.values() for size in line})
        panel.set_xscale("log", base=2)
        panel.set_yscale("log")
        panel.set_xticks(sizes, [size_text(size) for size in sizes], rotation=45, ha="right")
        panel.minorticks_off()
        panel.grid(True, color="#dddddd", linewidth=0.6)
        panel.set_axisbelow(True)
        panel.spines[["top", "right"]].set_visible(False)
        panel.set_title(f"{dtype}, {RANKS} ranks")
        panel.set_xlabel("bytes per rank")
    panels[0].set_ylabel("all-reduce, µs, best of the rounds, net of local copies")
    panels[0].legend(frameon=False, fontsize=9)
    facts = result["environment"]
    figure.suptitle(
        f"All-reduce between processes of one host ({facts['cpu']}, {facts['cores']} cores); "
        "lower is faster",
        fontsize=11,
    )
    figure.tight_layout()
    figure.savefig(picture, dpi=130, metadata={"Software": None})


def main() -> int:
    arguments = [Path(part) for part in sys.argv[1:]]
    source = arguments[0] if arguments else RESULTS / "collectives_peers_cpu.json"
    picture = arguments[1] if len(arguments) > 1 else source.with_suffix(".png")
    draw(json.loads(source.read_text()), picture)
    print(picture)
    return 0


if __name__ == "__main__":
    sys.exit(main())
