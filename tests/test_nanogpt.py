"""The nanoGPT example: what it prints and draws, and that it tells what does not hold."""

from __future__ import annotations

import copy
import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

import tp_native as tp

SCRIPT = Path(__file__).parents[1] / "examples" / "nanogpt.py"
PNG = b"\x89PNG\r\n\x1a\n"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=110)


def has_matplotlib() -> bool:
    return importlib.util.find_spec("matplotlib") is not None


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    return importlib.import_module("nanogpt")


@pytest.fixture(scope="module")
def twelve_layers(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Any]]:
    out = tmp_path_factory.mktemp("nanogpt")
    done = run("--tokens", "6", "--out", str(out))
    assert done.returncode == 0, done.stderr
    seen = json.loads((out / "nanogpt.json").read_text())
    if has_matplotlib():
        assert (out / "split.png").read_bytes().startswith(PNG)
    return done.stdout, seen


def test_twelve_layers_meet_24_times_in_256_tokens(
    twelve_layers: tuple[str, dict[str, Any]],
) -> None:
    told, seen = twelve_layers
    assert seen["collectives"] == seen["planned"] == {"in_layers": 24, "elsewhere": 3}
    assert "24 in the layers, 3 in embeddings and head, in one forward of 256 tokens" in told
    assert "12 x 256 = 3,072" in told
    assert 0 < seen["logits"] <= 1e-5 and seen["logits_alike"] and seen["shares_held"]
    assert 0 < seen["gradients"]["error"] <= 1e-5 and seen["gradients"]["count"] == 12 * 12 + 4
    assert len(seen["cut_text"]) == 6 and len(set(seen["cut_text"])) > 1
    assert told.count("yes") == 2


def test_the_drawing_cuts_q_k_and_v_by_heads(twelve_layers: tuple[str, dict[str, Any]]) -> None:
    rows = [
        line[4:12] for line in twelve_layers[0].splitlines() if line[4:12] in ("0" * 8, "1" * 8)
    ]
    assert "".join(row[0] for row in rows) == "00011" * 3  # 3 and 2 heads of each
    assert " q 00000000     00000111     00000000     0000000000000000111111" in twelve_layers[0]


def test_no_matplotlib_no_picture(example: Any, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    model = example.make_model(1)
    drawn = example.matrices(model, tp.plan(model, 2))
    assert not example.draw_picture(drawn, 2, "title", tmp_path / "split.png")
    assert not (tmp_path / "split.png").exists()


def test_three_ranks_hold_uneven_parts(tmp_path: Path) -> None:
    out = tmp_path / "new" / "folder"
    done = run("--ranks", "3", "--layers", "1", "--tokens", "2", "--out", str(out))
    assert done.returncode == 0, done.stderr
    seen = json.loads((out / "nanogpt.json").read_text())
    assert seen["collectives"] == {"in_layers": 2, "elsewhere": 3}
    attention, _, mlp, _ = seen["matrices"]
    assert attention["parts"][2] == [[64, 80], [144, 160], [224, 240]]  # the fifth head
    assert mlp["parts"] == [[[0, 107]], [[107, 214]], [[214, 320]]]


@pytest.mark.parametrize("option", ["--ranks", "--layers", "--tokens"])
def test_nothing_runs_on_no_ranks(option: str, example: Any, capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(sys, "argv", ["nanogpt.py", option, "0"])
    with pytest.raises(SystemExit) as ended:
        example.main()
    assert ended.value.code == 2
    assert f"{option} 0: at least 1" in capsys.readouterr().err


WRONG: list[tuple[str, Any, str]] = [
    ("logits", 2e-5, "logits are 2.0e-05 from the dense model's"),
    ("logits", float("inf"), "logits are inf from the dense model's"),
    ("gradients", {"count": 1, "worst": "w", "error": 1.1e-5}, "the gradient of w is 1.1e-05"),
    ("shares_held", False, "ranks hold other weights than the plan says"),
    ("logits_alike", False, "the ranks' logits differ from each other"),
    ("collectives", {"in_layers": 25, "elsewhere": 3}, "collectives, the plan says"),
    ("text_equal", False, "the dense model ["),
]


@pytest.mark.parametrize(("key", "value", "line"), WRONG)
def test_what_does_not_hold_is_told(
    key: str,
    value: Any,
    line: str,
    twelve_layers: tuple[str, dict[str, Any]],
    example: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def ranks_that_see_it(ranks: int, arguments: list[str]) -> bool:
        seen = {**twelve_layers[1], key: value}
        return (tmp_path / "nanogpt.json").write_text(json.dumps(seen)) > 0

    monkeypatch.setattr(example, "start_ranks", ranks_that_see_it)
    monkeypatch.setattr(example, "draw_picture", lambda *_: False)
    monkeypatch.setattr(sys, "argv", ["nanogpt.py", "--out", str(tmp_path)])
    assert example.main() == 1
    (error,) = capsys.readouterr().err.splitlines()
    assert error.startswith("error: ") and line in error


def divided_by_width(self: Any, x: Tensor) -> Tensor:
    """Reads a size that is another on a rank: no shape tells."""
    out: Tensor = self.c_proj(self.gelu(self.c_fc(x)) / self.c_fc.weight.shape[0])
    return out


def normalized(self: Any, x: Tensor) -> Tensor:
    """Needs the whole width between the two matrices: a third sync point."""
    out: Tensor = self.c_proj(self.gelu(self.c_fc(x)).softmax(-1))
    return out


def test_a_model_that_reads_a_local_size_is_refused(example: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(example.MLP, "forward", divided_by_width)
    model = example.make_model(1)
    with pytest.raises(tp.PlanError, match=r"mlp\.c_proj: input departs from the dense model"):
        tp.simulate(lambda group: example.compare(copy.deepcopy(model), group, 1), 2)
    assert example.failures({"error": "mlp: no"}) == ["mlp: no"]


def test_a_model_that_needs_a_third_sync_point_is_told(example: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(example.MLP, "forward", normalized)
    model = example.make_model(1)
    seen, _ = tp.simulate(lambda group: example.compare(copy.deepcopy(model), group, 1), 2)
    (line,) = example.failures(seen)
    assert "'in_layers': 3" in line and "two a layer are 2" in line


def test_an_untouched_world_of_one_has_no_sync_point(example: Any) -> None:
    model = example.make_model(1)
    (seen,) = tp.simulate(lambda group: example.compare(copy.deepcopy(model), group, 2), 1)
    assert seen["collectives"] == {"in_layers": 0, "elsewhere": 0}
    assert seen["logits"] == seen["gradients"]["error"] == 0.0
    assert example.failures(seen) == []
