"""Optimizer state in checkpoints: training goes on at another number of ranks as if it had never
stopped.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tp_native as tp
from harness import run_ranks
from oracle import relative_error
from tp_native.errors import CheckpointError
from tp_native.group import Group

F64 = torch.float64


class Model(nn.Module):
    """Everything that is cut in a way of its own: tied vocabulary, stacked and replicated rows."""

    def __init__(self, group: Group) -> None:
        super().__init__()
        make: Any = {"group": group, "dtype": F64}
        self.embedding = tp.VocabParallelEmbedding(13, 12, **make)
        self.block = tp.TensorParallelTransformerBlock(
            12, 6, 17, num_kv_heads=2, bias=True, qk_norm=True, rope_theta=1e4, **make
        )
        self.norm = tp.ParallelRMSNorm(12, **make)
        self.head = tp.ParallelLMHead(
            12, 13, embedding=self.embedding, gather_output=True, dtype=F64
        )

    def forward(self, ids: Tensor) -> Tensor:
        y: Tensor = self.head(self.norm(self.block(self.embedding(ids))))
        return y


def make(group: Group) -> tuple[Model, torch.optim.Optimizer]:
    torch.manual_seed(1)
    model = Model(group)
    decayed = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    return model, torch.optim.AdamW(groups, lr=0.01, betas=(0.8, 0.9), amsgrad=True)


def steps(model: Model, optimizer: torch.optim.Optimizer, first: int, count: int) -> list[float]:
    losses = []
    for step in range(first, first + count):
        draw = torch.Generator().manual_seed(step)
        ids = torch.randint(13, (2, 7), generator=draw)
        logits = model(ids[:, :-1])
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def trains_and_saves(group: Group, folder: str | None, count: int) -> tuple[list[float], Any]:
    model, optimizer = make(group)
    losses = steps(model, optimizer, 0, count)
    if folder is not None:
        tp.CheckpointSaver(folder, group).save(model, optimizer)
    return losses, tp.full_state_dict(model)


def resumes(group: Group, folder: str, first: int, count: int, to: str) -> tuple[list[float], Any]:
    model, optimizer = make(group)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(torch.nan)
    for settings in optimizer.param_groups:
        settings["lr"] = 77.0
    tp.DistributedCheckpointLoader(folder, group).load(model, optimizer)
    assert model.head.weight is model.embedding.weight
    losses = steps(model, optimizer, first, count)
    tp.CheckpointSaver(to, group).save(model, optimizer)
    return losses, tp.full_state_dict(model)


def test_training_goes_on_at_another_number_of_ranks(tmp_path: Path) -> None:
    """1 -> 2 -> 3 -> 4 -> 1 ranks, two steps each, against ten steps at one go."""
    (reference, weights), *_ = run_ranks(trains_and_saves, 1, None, 10)
    (losses, _), *_ = run_ranks(trains_and_saves, 1, str(tmp_path / "1"), 2)
    found, last = list(losses), "1"
    for leg, size in enumerate((2, 3, 4, 1), 1):
        name = f"{leg}-{size}"
        results = run_ranks(resumes, size, str(tmp_path / last), 2 * leg, 2, str(tmp_path / name))
        assert all(result[0] == results[0][0] for result in results)
        found += results[0][0]
        last = name
    assert relative_error(torch.tensor(found), torch.tensor(reference)) < 1e-12
    for name, value in weights.items():
        assert relative_error(results[0][1][name], value) < 1e-10, name
    files = sorted(file.name for file in (tmp_path / last).iterdir())
    assert files == ["model.safetensors", "optimizer.json", "optimizer.safetensors"]


def saves_plain(group: Group, folder: str) -> None:
    model, optimizer = make(group)
    steps(model, optimizer, 0, 1)
    saver = tp.CheckpointSaver(folder, group)
    saver.save(model, optimizer)
    saver.save(model)
    with pytest.raises(CheckpointError, match="no optimizer's state to load"):
        tp.DistributedCheckpointLoader(folder, group).load(model, optimizer)
    saver.save(model, optimizer)
    other = torch.optim.AdamW(list(model.parameters())[:3])
    with pytest.raises(CheckpointError, match="over the same parameters"):
        tp.DistributedCheckpointLoader(folder, group).load(model, other)
    foreign = torch.optim.SGD([nn.Parameter(torch.ones(3))], lr=0.1)
    with pytest.raises(
        CheckpointError, match=r"a parameter of shape \[3\] that is not the model's"
    ):
        saver.save(model, foreign)
    factored = torch.optim.Adafactor(model.parameters())
    steps(model, factored, 0, 1)
    with pytest.raises(CheckpointError, match="only element-wise optimizers"):
        saver.save(model, factored)
    for text in ("[", "{}", '{"version": 1, "param_groups": [3], "values": {}}'):
        (Path(folder) / "optimizer.json").write_text(text)
        group.barrier()
        with pytest.raises(CheckpointError, match="no optimizer's state to load"):
            tp.DistributedCheckpointLoader(folder, group).load(model, optimizer)
        group.barrier()
    saver.save(model, optimizer)
    record = json.loads((Path(folder) / "optimizer.json").read_text())
    assert [len(g["params"]) for g in record["param_groups"]] == [
        len(g["params"]) for g in optimizer.param_groups
    ]


@pytest.mark.parametrize("world_size", [1, 2])
def test_what_cannot_be_saved_or_loaded_is_told(tmp_path: Path, world_size: int) -> None:
    run_ranks(saves_plain, world_size, str(tmp_path / "model"))
