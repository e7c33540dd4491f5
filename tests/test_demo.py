"""The examples, shortened: train on two ranks, save, load on both, compare; train on any number."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
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


def test_training_stopped_on_two_ranks_goes_on_with_one(tmp_path: Path) -> None:
    def train(ranks: int, *arguments: str) -> str:
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command = [*torchrun, "--nproc-per-node", str(ranks), str(EXAMPLES / "train_llama.py")]
        command += ["--steps", "3", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=110)
        assert done.returncode == 0, done.stderr
        return done.stdout

    stopped, resumed = (str(tmp_path / name) for name in ("stopped", "resumed"))
    train(2, "--out", stopped, "--stop", "2")
    told = train(1, "--out", resumed, "--resume", stopped)
    assert "held-out loss" in told
    first, rest = (json.loads(Path(f, "training.json").read_text()) for f in (stopped, resumed))
    assert (first["steps"], rest["steps"]) == (2, 3) and len(rest["losses"]) == 1
    assert rest["loss_before"] > first["loss_after"] > rest["loss_after"]


@pytest.mark.soak
@pytest.mark.timeout(1200)
def test_training_is_the_same_on_any_number_of_ranks(tmp_path: Path) -> None:
    command = [sys.executable, str(EXAMPLES / "train.py"), "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1100)
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "losses.json").read_text())
    assert [len(losses) for losses in record["losses"].values()] == [200] * 4
    assert 0 < max(record["largest_gap"].values()) <= record["limit"]
