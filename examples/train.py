"""The same training on 1, 2 and 3 ranks, and once stopped on 2 ranks and resumed on 3.

``make train`` runs this: ``train_llama.py`` under torchrun, four times, then the loss curves laid
over each other. Every curve has to be the one of 1 rank.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

SCRIPT = Path(__file__).parent / "train_llama.py"
LIMIT = 1e-4  # nats: ranks add in another order, and every step builds on the last
RANKS = (1, 2, 3)


def train(out: Path, ranks: int, *arguments: str) -> list[float]:
    """One run under torchrun; the loss of every step."""
    threads = max(1, len(os.sched_getaffinity(0)) // ranks)
    env = {"OMP_NUM_THREADS": str(threads), **os.environ}
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
        str(ranks), str(SCRIPT), "--out", str(out), *arguments,
    ]  # fmt: skip
    status = subprocess.run(command, check=False, env=env).returncode
    if status != 0:
        sys.exit(status if status > 0 else 1)
    losses: list[float] = json.loads((out / "training.json").read_text())["losses"]
    return losses


def draw(curves: dict[str, list[float]], path: Path) -> bool:
    """The curves over each other, and what they are apart; False without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (over, apart) = plt.subplots(2, 1, figsize=(8, 7), sharex=True, height_ratios=(2, 1))
    reference = next(iter(curves.values()))
    styles: list[dict[str, Any]] = [
        {"color": "#c8c8c8", "linewidth": 7},
        {"color": "#4e9a51", "linewidth": 3.5},
        {"color": "#1b1b1b", "linewidth": 1.3},
        {"color": "#d1495b", "linewidth": 1.3, "linestyle": (0, (4, 4))},
    ]
    for (name, losses), style in zip(curves.items(), styles, strict=True):
        over.plot(range(1, len(losses) + 1), losses, label=name, **style)
        gap = [max(abs(a - b), 1e-9) for a, b in zip(losses, reference, strict=True)]
        if losses is not reference:
            apart.plot(range(1, len(gap) + 1), gap, label=name, **style)
    apart.axhline(LIMIT, color="#8c8c8c", linewidth=0.8)
    apart.annotate("limit", (1, LIMIT), color="#5c5c5c", va="bottom")
    apart.set_yscale("log")
    over.set_ylabel("loss, nats per byte")
    apart.set_ylabel("difference to 1 rank")
    apart.set_xlabel("step")
    over.legend(frameon=False)
    over.set_title("One training, on 1, 2 and 3 ranks")
    for axes in (over, apart):
        axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    return True


def main() -> int:
    """Train four times, compare, draw; 1 if a curve departs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("build/train"), help="folder for results")
    parser.add_argument("--steps", type=int, default=200, help="steps of each run")
    # at the demo's 5e-3 training is chaotic: rounding errors grow 1e5-fold within 20 steps
    parser.add_argument("--rate", default="1e-3", help="peak learning rate")
    options = parser.parse_args()
    if options.steps < 2:
        parser.error(f"--steps {options.steps}: at least 2, one before the stop and one after")
    options.out.mkdir(parents=True, exist_ok=True)

    half = str(options.steps // 2)
    steps = str(options.steps)
    schedule = ("--steps", steps, "--rate", options.rate)
    curves = {}
    for ranks in RANKS:
        name = f"{ranks} rank{'s' if ranks > 1 else ''}"
        print(f"{steps} steps on {name}", flush=True)
        curves[name] = train(options.out / f"ranks{ranks}", ranks, *schedule)
    print(f"{half} steps on 2 ranks, then on 3", flush=True)
    stopped = options.out / "stopped"
    first = train(stopped, 2, *schedule, "--stop", half)
    rest = train(options.out / "resumed", 3, *schedule, "--resume", str(stopped))
    curves[f"2 ranks, from step {half} on 3"] = first + rest

    reference = next(iter(curves.values()))
    gaps = {
        name: max(abs(a - b) for a, b in zip(losses, reference, strict=True))
        for name, losses in curves.items()
    }
    record = {"steps": options.steps, "limit": LIMIT, "largest_gap": gaps, "losses": curves}
    (options.out / "losses.json").write_text(json.dumps(record, indent=1) + "\n")
    print()
    for name, losses in curves.items():
        gap = f"at most {gaps[name]:.1e} from 1 rank"
        print(f"{name:<30}loss {losses[0]:.4f} -> {losses[-1]:.4f}, {gap}")
    picture = options.out / "losses.png"
    if draw(curves, picture):
        print(f"The curves are in {picture}.")
    else:
        print("No picture: pip install matplotlib; the curves are in losses.json.")
    if max(gaps.values()) > LIMIT:
        print(f"error: a curve departs from that of 1 rank (limit {LIMIT:.0e})", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
