"""The models in proof/ and the C++ name the same steps; ``make soak`` verifies the models."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROOF = ROOT / "proof"
CSRC = ROOT / "csrc"
LABEL = re.compile(r"proof: ([a-z_]+(?:\.[a-z_]+)?(?:, [a-z_]+(?:\.[a-z_]+)?)*)")
ROW = re.compile(r"^\| `([a-z_.]+)` \|", re.MULTILINE)


def labels_in(paths: list[Path]) -> set[str]:
    found = (m for p in paths for m in LABEL.findall(p.read_text()))
    return {label for several in found for label in several.split(", ")}


def models() -> list[Path]:
    return [*PROOF.glob("*.pml"), *PROOF.glob("*.h")]


def test_each_label_of_the_models_is_in_csrc_and_the_other_way_round() -> None:
    ours = labels_in(models())
    theirs = labels_in([p for p in CSRC.rglob("*") if p.suffix in {".h", ".cpp"}])
    assert ours, "the models name no step"
    assert not ours - theirs, f"in proof/ only: {sorted(ours - theirs)}"
    assert not theirs - ours, f"in csrc/ only: {sorted(theirs - ours)}"


def test_readme_lists_the_labels() -> None:
    table = (PROOF / "README.md").read_text().partition("## Labels")[2]
    assert set(ROW.findall(table)) == labels_in(models())


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_models_hold_and_mutants_are_caught() -> None:
    if shutil.which("spin") is None:
        pytest.skip("the program spin is missing: apt-get install spin")
    done = subprocess.run([PROOF / "check.sh"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
