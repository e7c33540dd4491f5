"""The examples, shortened: train on two ranks, save, load on both, compare; train on any number."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from transformers import AutoTokenizer, LlamaForCausalLM

EXAMPLES = Path(__file__).parents[1] / "examples"
DEMO = EXAMPLES / "demo.py"


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


def test_training_is_the_same_on_any_number_of_ranks(tmp_path: Path) -> None:
    command = [sys.executable, str(EXAMPLES / "train.py"), "--out", str(tmp_path), "--steps", "4"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("loss ") == 4
    record = json.loads((tmp_path / "losses.json").read_text())
    assert all(len(losses) == 4 for losses in record["losses"].values())
    assert 0 < max(record["largest_gap"].values()) <= record["limit"]
