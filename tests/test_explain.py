"""explain and `tp-native plan`: what is told is what happens, and it reads well in 100 columns."""

from __future__ import annotations

import io
import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import model_folders
from nanogpt_model import GPT, GPTConfig
from tiny import llama, qwen3
from tp_native import parallelize, plan, simulate
from tp_native.cli import main
from tp_native.group import Group
from tp_native.plan.facts import BACKWARD, collectives, sharded_share, waste


def on_meta(make: Any, *args: Any, **kwargs: Any) -> nn.Module:
    with torch.device("meta"):
        return make(*args, **kwargs)  # type: ignore[no-any-return]


def told(model: nn.Module, world_size: int, **options: Any) -> dict[str, Any]:
    return json.loads(plan(model, world_size, **options).explain("json"))  # type: ignore[no-any-return]


# -- what is told is what happens


def counts_as_told(group: Group, name: str) -> None:
    model = model_folders.make(name)
    made = plan(model, group.size)
    parallelize(model, group, plan=made)
    started = group.stats()["collectives"]
    outputs = [o for o in model(**model_folders.inputs(name)).to_tuple() if isinstance(o, Tensor)]
    forward = group.stats()["collectives"]
    assert forward - started == made.collectives()[0]
    sum(o.square().sum() for o in outputs if o.is_floating_point()).backward()  # type: ignore[union-attr]
    backward = sum(c.calls for c in collectives(made) if c.direction == BACKWARD)
    assert group.stats()["collectives"] - forward == backward


@pytest.mark.parametrize(
    "name",
    [
        "AlbertForMaskedLM",  # one layer called several times
        "BartForConditionalGeneration",
        "GPT2LMHeadModel",
        "Qwen3ForCausalLM",  # norms inside heads
        "T5ForConditionalGeneration",  # a table that only its twins call
    ],
)
def test_both_passes_make_the_collectives_that_are_told(name: str) -> None:
    simulate(counts_as_told, 2, name)


def test_gradients_of_shared_key_value_heads_are_told() -> None:
    simulate(counts_as_told, 5, "LlamaForCausalLM")


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_bytes_and_shares_add_up(world_size: int) -> None:
    made = plan(on_meta(qwen3, tied=True), world_size)
    found = json.loads(made.explain("json"))
    per_rank = found["bytes"]["per_rank"]
    lost = found["waste"]
    copies = lost["shared_parts_bytes"] + lost["whole_matrices_bytes"] + lost["vectors_bytes"]
    assert sum(per_rank) == found["bytes"]["model"] + copies
    assert math.isclose(lost["copies_percent"], 100 * copies / found["bytes"]["model"])
    mean = sum(per_rank) / world_size
    assert math.isclose(max(per_rank), mean * (1 + lost["fullest_over_mean_percent"] / 100))
    vectors = sum(math.prod(s) * 4 for s in made.shapes.values() if len(s) == 1)
    cut_biases = sum(m["bytes_per_rank"][0] for m in found["modules"]) + vectors - per_rank[0]
    assert 0 <= cut_biases <= vectors
    assert found["sharded_matrix_percent"] == 100
    for module in found["modules"]:
        assert len(module["local_sizes"]) == len(module["bytes_per_rank"]) == world_size
    if world_size == 1:
        assert copies == 0 and not made.collectives()[0]


def test_uneven_and_whole_parts_are_waste() -> None:
    model = nn.Sequential(nn.Linear(8, 30), nn.ReLU(), nn.Linear(30, 8), nn.LSTM(8, 8))
    made = plan(model, 4)
    lost = waste(made)
    assert lost.matrices == 3 * 2 * 32 * 8 * 4 and lost.shared_heads == 0
    assert lost.imbalance > 0.01
    assert sharded_share(made) == 480 / (480 + 512)
    whole = told(model, 4)["whole"]
    assert [(one["name"], one["class"], one["bytes"]) for one in whole] == [("3", "LSTM", 2048)]


# -- JSON


def test_json_has_every_module_with_its_ranges_and_collectives() -> None:
    found = told(on_meta(GPT, GPTConfig()), 4)
    assert (found["format"], found["model"], found["world_size"]) == (1, "GPT", 4)
    modules = {module["name"]: module for module in found["modules"]}
    fused = modules["transformer.h.1.attn.c_attn"]
    assert fused["local_sizes"] == [24, 24, 12, 12]
    assert fused["ranges"][3] == [[20, 24], [44, 48], [68, 72]]
    assert [p["local_shapes"][2] for p in fused["parameters"]] == [[12, 24], [12]]
    assert fused["collectives"] == [
        {
            "op": "all-reduce",
            "direction": "backward",
            "calls": 1,
            "bytes_per_token": 96,
            "bytes_per_pass": 0,
        }
    ]
    head = modules["lm_head"]
    assert head["tied_to"] == "transformer.wte.weight" and head["bytes_per_rank"] == [0] * 4
    assert set(found["collectives"]["forward"]) == {"all-reduce", "all-gather"}
    assert {one["name"] for one in found["attributes"]} | set(found["translated"])


def test_json_of_attention_and_shared_heads() -> None:
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(24, 6, batch_first=True), 2)
    attention = told(encoder, 4)["modules"][0]
    assert (attention["style"], attention["size"]) == ("attention", 6)
    assert attention["local_sizes"] == [2, 2, 1, 1]
    assert [c["op"] for c in attention["collectives"]] == ["all-reduce", "all-reduce"]
    made = plan(on_meta(llama), 5)
    keys = next(m for m in json.loads(made.explain("json"))["modules"] if "k_proj" in m["name"])
    assert keys["ranges"][0] == keys["ranges"][1] == [[0, 8]]
    assert [c["bytes_per_pass"] for c in keys["collectives"]] == [0, 8 * 48 * 4]


# -- text


MODELS = {
    "llama": (llama, {"num_hidden_layers": 3}),
    "gpt": (lambda: GPT(GPTConfig()), {}),
    "t5": (model_folders.make, {"name": "T5ForConditionalGeneration"}),
    "vit": (model_folders.make, {"name": "ViTForImageClassification"}),
    "encoder": (
        lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(24, 6, batch_first=True), 2),
        {},
    ),
}


@pytest.mark.parametrize("ranks", [1, 3, 8])
@pytest.mark.parametrize("name", MODELS)
def test_text_keeps_to_100_columns(name: str, ranks: int) -> None:
    make, options = MODELS[name]
    text = plan(make(**options), ranks).explain()
    assert max(map(len, text.splitlines())) <= 100, text


def test_text_of_uneven_ranks() -> None:
    model = nn.Sequential(nn.Linear(16, 102), nn.GELU(), nn.Linear(102, 16), nn.Linear(16, 1))
    lines = plan(model, 8, rules={"3": "replicate"}).explain().splitlines()
    assert lines[:6] == [
        "Sequential on 8 ranks",
        "module  n  cut      each rank         bytes       forward",
        "0       1  colwise  6*13/2*12 of 102  816..884 B",
        "2       1  rowwise  6*13/2*12 of 102  768..832 B  all-reduce",
        "whole on every rank:",
        "  3, 64 B: by rule",
    ]


def test_text_says_what_stays_whole_what_is_alone_and_what_is_not_called() -> None:
    text = plan(model_folders.make("T5ForConditionalGeneration"), 2).explain()
    lines = text.splitlines()
    assert any(line.startswith("shared ") and line.endswith("not called") for line in lines)
    assert "encoder.embed_tokens: a sum over it" in text
    assert "decoder.block.*.layer.1.EncDecAttention (2): n_heads 3" in text
    text = plan(model_folders.make("ViTForImageClassification"), 2).explain()
    assert "Conv2d is no Linear, Conv1D, Embedding or MultiheadAttention" in " ".join(text.split())
    assert "all-reduce x2" in plan(model_folders.make("AlbertForMaskedLM"), 2).explain()


def test_layers_that_differ_are_told_apart() -> None:
    rules = {f"model.layers.{i}.mlp.up_proj": "colwise_rep" for i in (1, 2, 5)}
    text = plan(on_meta(llama, num_hidden_layers=6), 2, rules=rules).explain()
    assert "model.layers.[1-2,5].mlp.up_proj" in text and "model.layers.[0,3-4].mlp.up_proj" in text
    assert "model.layers.*.self_attn.q_proj" in text


def test_an_unknown_format_is_refused() -> None:
    with pytest.raises(ValueError, match="got format 'xml', expected 'text', 'json' or 'rich'"):
        plan(nn.Linear(4, 4), 2).explain("xml")  # type: ignore[call-overload]


def test_rich_fits_its_console_and_is_told_of_if_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    from rich.console import Console

    made = plan(on_meta(llama), 3)
    for width in (80, 200):
        out = io.StringIO()
        Console(file=out, width=width).print(made.explain("rich"))
        assert "all-gather" in out.getvalue()
        assert ("model.layers.*.self_attn.q_proj" in out.getvalue()) == (width == 200)
    monkeypatch.setitem(sys.modules, "rich.table", None)
    monkeypatch.setitem(sys.modules, "rich", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install \"tp_native\[rich\]\""):
        made.explain("rich")


# -- the command


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPT-2's config.json and nothing else."""
    path = tmp_path_factory.mktemp("gpt2")
    settings = {"n_layer": 2, "n_embd": 48, "n_head": 6, "vocab_size": 97, "n_positions": 64}
    transformers.GPT2Config(**settings).save_pretrained(path)
    assert [file.name for file in path.iterdir()] == ["config.json"]
    return path


def test_the_command_needs_no_weights(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(folder), "--tp", "4"]) == 0
    out, err = capsys.readouterr()
    assert "transformer.h.*.attn.c_attn" in out and not err
    assert main(["plan", "--model", str(folder), "--tp", "4"]) == 0
    assert capsys.readouterr().out == out


def test_the_command_takes_ratios_and_rules(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "rules.json").write_text(json.dumps({"transformer.h.*.mlp.c_fc": "colwise"}))
    arguments = ["--ratios", "2,1", "--rules", str(tmp_path / "rules.json"), "--json"]
    rules = ["--rule", "transformer.h.*.mlp.c_fc=replicate", "--rule", "lm_head=colwise_rep"]
    assert main(["plan", str(folder), *arguments, *rules]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["world_size"] == 2
    assert {"transformer.h.0.mlp.c_fc", "transformer.h.1.mlp.c_fc"} <= {
        one["name"] for one in found["whole"] if one["reason"] == "by rule"
    }
    (head,) = [m for m in found["modules"] if m["name"] == "lm_head"]
    assert head["local_sizes"] == [65, 32]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_a_table(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.delenv("NO_COLOR", raising=False)
    for option, is_coloured in (([], True), (["--no-color"], False)):
        monkeypatch.setattr(sys, "stdout", Terminal())
        assert main(["plan", str(folder), "--tp", "2", *option]) == 0
        shown = sys.stdout.getvalue()  # type: ignore[attr-defined]
        assert "transformer.wte" in shown and ("\x1b[" in shown) == is_coloured


ERRORS = [
    (["{none}", "--tp", "2"], 2, "{none}: no such folder\ngive a Hugging Face model folder"),
    (["{empty}", "--tp", "2"], 2, "{empty}: no config.json\ngive a Hugging Face model folder"),
    (["--tp", "2"], 2, "expected one model folder\nfor example: tp-native plan"),
    (["{folder}"], 2, "--tp is missing: the number of ranks\ngive one"),
    (["{folder}", "--tp", "0"], 2, "--tp 0: expected 1 rank or more\ngive one"),
    (
        ["{folder}", "--tp", "3", "--ratios", "2,1"],
        2,
        "--ratios 2,1: 2 shares for 3 ranks\ngive each rank one, for example --ratios 2,1,1",
    ),
    (["{folder}", "--ratios", "2,x"], 2, "--ratios 2,x: expected numbers of at least 0"),
    (["{folder}", "--tp", "2", "--rule", "lm_head"], 2, "--rule lm_head: expected PATTERN=STYLE\n"),
    (
        ["{folder}", "--tp", "2", "--rule", "lm_head=sideways"],
        2,
        "GPT2LMHeadModel: style 'sideways' of lm_head is not supported\nsupported styles are [",
    ),
    (
        ["{folder}", "--tp", "2", "--rule", "transformer.h.*.mlp.up=colwise"],
        2,
        "rule 'transformer.h.*.mlp.up' matches no module of GPT2LMHeadModel\n`*` stands for",
    ),
    (
        ["{folder}", "--tp", "2", "--rule", "transformer.ln_f=colwise"],
        1,
        "transformer.ln_f is a LayerNorm, which style 'colwise' cannot cut",
    ),
    (
        ["{folder}", "--tp", "2", "--rules", "{none}"],
        2,
        "--rules {none}: No such file or directory\ngive a JSON file",
    ),
    (["{strange}", "--tp", "2"], 1, "{strange}/config.json: not readable"),
]


@pytest.mark.parametrize(("arguments", "status", "message"), ERRORS)
def test_errors(
    arguments: list[str],
    status: int,
    message: str,
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    places = {"folder": folder}
    places |= {name: tmp_path / name for name in ("none", "empty", "strange")}
    places["empty"].mkdir()
    places["strange"].mkdir()
    (places["strange"] / "config.json").write_text('{"model_type": "nonesuch"}')
    assert main(["plan", *(a.format(**places) for a in arguments)]) == status
    out, err = capsys.readouterr()
    assert err.startswith(f"error: {message.format(**places)}") and not out
    assert err.count("error: ") == 1
