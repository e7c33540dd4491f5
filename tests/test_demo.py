"""The main job from end to end, shortened: train on two ranks, save, load on both, compare."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from transformers import AutoTokenizer, LlamaForCausalLM

DEMO = Path(__file__).parents[1] / "examples" / "demo.py"


def test_the_demo_trains_saves_loads_and_generates_alike(tmp_path: Path) -> None:
    out = tmp_path / "model"
    command = [sys.executable, str(DEMO), "--out", str(out), "--seconds", "6", "--tokens", "20"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stderr
    assert "equal on 1 rank and on 2: yes" in done.stdout
    training = json.loads((out / "training.json").read_text())
    assert training["loss_after"] < training["loss_before"] - 1  # nats per byte, from ln 256
    model = LlamaForCausalLM.from_pretrained(out)  # any tool reads the folder
    assert model.config.num_hidden_layers == 4
    tokenizer = AutoTokenizer.from_pretrained(out)
    text = "Zwölf Boxkämpfer jagen 🦊\n"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
