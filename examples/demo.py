"""The whole way on two ranks: train, save, load on one rank and on two, generate, compare.

``make demo`` runs this. It starts ``train_llama.py`` under torchrun, then ``tp-native generate``.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LIMIT = 1e-5  # float32: two ranks add in another order than one


def run(*command: str) -> None:
    """Run a command with the cores shared between two ranks; its failure is ours."""
    threads = max(1, len(os.sched_getaffinity(0)) // 2)
    env = {"OMP_NUM_THREADS": str(threads), **os.environ}  # unset, torchrun warns and takes 1
    status = subprocess.run(command, check=False, env=env).returncode
    if status != 0:
        sys.exit(status if status > 0 else 1)


def main() -> int:
    """Train, compare, report; 1 if two ranks do not give what one gives."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("build/demo_model"), help="model folder")
    parser.add_argument("--seconds", type=float, default=60.0, help="training time")
    parser.add_argument("--tokens", type=int, default=200, help="tokens to generate")
    parser.add_argument("--prompt", default='The "with" statement is used to')
    options = parser.parse_args()
    options.out.parent.mkdir(parents=True, exist_ok=True)

    print(f"training a small Llama on 2 ranks for {options.seconds:.0f} s", flush=True)
    # --standalone: torchrun's own store on a free port; the ranks' data never uses it
    run(
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
        str(ROOT / "examples" / "train_llama.py"),
        "--out", str(options.out), "--seconds", str(options.seconds),
    )  # fmt: skip
    generate = [
        "generate", "--model", str(options.out), "--prompt", options.prompt,
        "--max-new-tokens", str(options.tokens), "--tp", "2",
    ]  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="tp_native-") as record:
        command = [sys.executable, "-m", "tp_native", *generate, "--compare", "--record", record]
        run(*command)
        compared = json.loads((Path(record) / "comparison.json").read_text())
    training = json.loads((options.out / "training.json").read_text())

    one, two = compared["runs"]
    equal = "yes" if compared["tokens_equal"] else "NO"
    story = {
        "model": f"{training['parameters']:,} parameters, {training['steps']} steps on 2 ranks",
        "loss": f"{training['loss_before']:.3f} before, {training['loss_after']:.3f} after "
        "(nats per byte, held out)",
        "tokens": f"equal on 1 rank and on 2: {equal}",
        "logits": f"largest difference {compared['logit_difference']:.2e}, "
        f"{compared['logit_difference_relative']:.1e} of the largest",
        "sync": f"{two['collectives_per_forward']} collectives, {two['bytes_per_forward']:,} bytes "
        f"a forward of {two['prompt_tokens']} tokens on 2 ranks",
        "speed": f"{one['tokens_per_s']:.0f} tokens/s on 1 rank, {two['tokens_per_s']:.0f} on 2",
        "memory": f"{max(one['peak_bytes']) / 2**20:.0f} MiB on 1 rank, "
        f"{max(two['peak_bytes']) / 2**20:.0f} a rank on 2 (most of it is torch)",
    }
    print()
    for name, text in story.items():
        print(f"{name:<8}{text}")
    print(f"\nThe model lies in {options.out}. Go on with:")
    print(f"  tp-native generate --model {options.out} --prompt '{options.prompt}' --tp 2 --sample")
    if not compared["tokens_equal"] or compared["logit_difference_relative"] > LIMIT:
        print(f"error: 2 ranks differ from 1 (limit {LIMIT:.0e})", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
