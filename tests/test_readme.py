"""The README's programs run as they stand there."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import tp_native as tp

README = Path(__file__).parents[1] / "README.md"


def programs() -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", README.read_text(), re.MULTILINE | re.DOTALL)


def test_the_training_program_runs_on_two_ranks(tmp_path: Path) -> None:
    (program,) = [text for text in programs() if "CheckpointSaver" in text]
    program = program.replace("50257", "257").replace("width=768", "width=96")
    (tmp_path / "script.py").write_text(program)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = [*torchrun, "--nproc-per-node", "2", "script.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "checkpoint" / "optimizer.json").exists()


def test_the_plan_it_shows_is_the_one_that_is_printed(tmp_path: Path) -> None:
    (program,) = [text for text in programs() if "explain()" in text]
    (shown,) = re.findall(r"^```text\n(.*?)^```", README.read_text(), re.MULTILINE | re.DOTALL)
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == shown


def test_its_names_exist() -> None:
    names = {name for text in programs() for name in re.findall(r"\btp\.(\w+)", text)}
    names |= set(re.findall(r"`(?:with )?tp\.(\w+)", README.read_text()))
    assert names and not {name for name in names if not hasattr(tp, name)}
