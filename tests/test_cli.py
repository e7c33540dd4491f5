"""The command line as a user meets it: texts, exit statuses, and nothing left running."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import safetensors.torch
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

import tiny
from tp_native import launch
from tp_native.cli import main

COMMAND = [sys.executable, "-m", "tp_native"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama with a byte-level tokenizer."""
    path = tiny.save(
        tiny.llama(vocab_size=256, max_position_embeddings=4096), tmp_path_factory.mktemp("m")
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = tokenizers.Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(path / "tokenizer.json"))
    return path


def run(*arguments: str, timeout: float = 60) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, timeout=timeout)


def children_of(pid: int) -> list[psutil.Process]:
    return psutil.Process(pid).children(recursive=True)


def test_one_rank_and_two_write_the_same_text(folder: Path, tmp_path: Path) -> None:
    done = run("generate", "--model", str(folder), "--prompt", "Grüße", "--max-new-tokens", "20",
               "--tp", "2", "--compare", "--record", str(tmp_path))  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "tokens equal: yes" in done.stdout and done.stdout.count("Grüße") == 2
    compared = json.loads((tmp_path / "comparison.json").read_text())
    assert compared["tokens_equal"] and 0 <= compared["logit_difference_relative"] <= 1e-5
    one, two = compared["runs"]
    assert one["collectives_per_forward"] == one["bytes_per_forward"] == 0
    layers, hidden, vocabulary, tokens = 2, 48, 256, two["prompt_tokens"]
    assert two["collectives_per_forward"] == 2 * layers + 2  # embedding and head besides
    expected = (2 * layers + 1) * tokens * hidden * 4 + tokens * (vocabulary // 2) * 4
    assert two["bytes_per_forward"] == expected
    assert len(two["peak_bytes"]) == 2 and min(two["peak_bytes"]) > 2**20
    assert len(two["tokens"]) == tokens + 20


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--model", "/nowhere"],
            "error: --model /nowhere: no such folder; expected a Hugging Face",
        ),
        (["--model", "{empty}"], "no config.json; expected a Hugging Face model folder"),
        (["--model", "{folder}", "--tp", "0"], "error: --tp 0: expected 1 to 16 ranks"),
        (["--model", "{folder}", "--prompt", ""], "error: --prompt is empty"),
        (
            ["--model", "{folder}", "--max-new-tokens", "0"],
            "--max-new-tokens 0: expected 1 or more",
        ),
        (["--model", "{untold}"], "no tokenizer.json"),
    ],
)
def test_bad_arguments_end_with_2_before_any_rank_starts(
    arguments: list[str],
    message: str,
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "untold").mkdir()
    shutil.copy(folder / "config.json", tmp_path / "untold")
    places = {"folder": folder, "empty": tmp_path / "empty", "untold": tmp_path / "untold"}
    given = [a.format(**places) for a in arguments]
    prompt = [] if "--prompt" in given else ["--prompt", "x"]
    assert main(["generate", *given, *prompt]) == 2
    out, err = capsys.readouterr()
    assert message in err and out == ""


def test_unknown_options_end_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (
        [],
        ["generate"],
        ["frobnicate"],
        ["generate", "--model", "x", "--prompt", "y", "--tp", "two"],
    ):
        with pytest.raises(SystemExit) as info:
            main(arguments)
        assert info.value.code == 2
    assert "usage: tp-native" in capsys.readouterr().err


def truncate(path: Path) -> None:
    with open(path / "model.safetensors", "r+b") as file:
        file.truncate(path.joinpath("model.safetensors").stat().st_size - 100)


def edit(change: Callable[[dict[str, object]], object]) -> Callable[[Path], None]:
    def apply(path: Path) -> None:
        tensors = safetensors.torch.load_file(path / "model.safetensors")
        change(tensors)  # type: ignore[arg-type]
        safetensors.torch.save_file(tensors, path / "model.safetensors")

    return apply


def strange_architecture(path: Path) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(
        json.dumps(config | {"model_type": "nonesuch", "architectures": ["Nonesuch"]})
    )


NORM = "model.norm.weight"
BROKEN: dict[str, tuple[Callable[[Path], None], str]] = {
    "truncated": (truncate, "model.safetensors"),
    "missing": (edit(lambda t: t.pop(NORM)), NORM),
    "extra": (edit(lambda t: t.update(surplus=t[NORM] + 0)), "surplus"),  # type: ignore[operator]
    "wrong shape": (edit(lambda t: t.update({NORM: t[NORM][:-1].clone()})), NORM),  # type: ignore[index]
    "unknown architecture": (strange_architecture, "nonesuch"),
}


# each takes two processes that import torch; the messages are the loader's tests' own
@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(name, marks=() if name in ("missing", "truncated") else pytest.mark.soak)
        for name in BROKEN
    ],
)
def test_a_broken_folder_ends_with_1_and_one_message(
    damage: str, folder: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "model"
    shutil.copytree(folder, broken)
    apply, expected = BROKEN[damage]
    apply(broken)
    done = run("generate", "--model", str(broken), "--prompt", "x", "--tp", "2")
    assert done.returncode == 1, done.stderr
    assert done.stderr.startswith("error: ") and done.stderr.count("error: ") == 1, done.stderr
    assert expected in done.stderr and "Traceback" not in done.stderr


def test_too_long_a_prompt_is_explained(folder: Path) -> None:
    done = run("generate", "--model", str(folder), "--prompt", "x" * 4090, "--tp", "2")
    assert done.returncode == 2, done.stderr
    assert (
        "the prompt has 4090 tokens" in done.stderr and "--max-new-tokens 6 or less" in done.stderr
    )


@pytest.fixture
def running(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """Two ranks in the middle of a long text, and what started them."""
    command = [
        *COMMAND,
        "generate",
        "--model",
        str(folder),
        "--prompt",
        "x",
        "--tp",
        "2",
        "--max-new-tokens",
        "4000",
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    process.stdout.read(20)
    yield process
    process.kill()
    process.wait()


def ends_alone(
    process: subprocess.Popen[str], ranks: list[psutil.Process], within_s: float
) -> None:
    process.wait(within_s)
    _, alive = psutil.wait_procs(ranks, timeout=2)
    assert not alive


def test_a_killed_rank_ends_the_command_with_1_and_its_name(running: subprocess.Popen[str]) -> None:
    ranks = children_of(running.pid)
    victim = next(p for p in ranks if p.environ().get("RANK") == "1")
    victim.kill()
    ends_alone(running, ranks, 5)
    assert running.stderr is not None
    told = running.stderr.read()
    assert running.returncode == 1, told
    assert f"rank 1 (pid {victim.pid}) died" in told and told.count("error: ") == 1, told


def test_a_rank_that_takes_long_to_end_is_waited_for(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    program = tmp_path / "rank"
    program.write_text("#!/bin/sh\n[ $RANK = 1 ] || sleep 0.6\nexit 3\n")
    program.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(program))
    monkeypatch.setattr(launch, "GRACE_S", 0.4)
    assert launch.launch(["nothing"], 2) == 3


def test_ctrl_c_ends_everything_with_130(running: subprocess.Popen[str]) -> None:
    ranks = children_of(running.pid)
    started = time.monotonic()
    running.send_signal(signal.SIGINT)
    ends_alone(running, ranks, 5)
    assert running.returncode == 130 and time.monotonic() - started < 3.5


def test_a_killed_launcher_takes_its_ranks_along(running: subprocess.Popen[str]) -> None:
    ranks = children_of(running.pid)
    assert len(ranks) == 2
    running.kill()
    ends_alone(running, ranks, 5)


def test_plan_and_doctor_and_help(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--model", str(folder), "--tp", "3"]) == 0
    assert "embed_tokens" in capsys.readouterr().out
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "backends" in out and "shm" in out
    assert "gpus" in out and "nccl" in out and "cuda kernels" in out
    done = run("--help")
    assert done.returncode == 0 and "generate" in done.stdout
