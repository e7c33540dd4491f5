"""A small language model of every kind of parameter: shards, replicas of shards, whole ones, a tied
one.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tp_native as tp
from tp_native.group import Group, world_of_one

VOCAB, TOKENS = 13, 8  # 13 divides over no world; 8 not over three ranks
BLOCKS: dict[str, dict[str, Any]] = {
    "llama": {"hidden_size": 12, "num_heads": 6, "num_kv_heads": 1, "intermediate_size": 17},
    "gpt": {
        "hidden_size": 12,
        "num_heads": 4,
        "intermediate_size": 19,
        "norm": "layernorm",
        "activation": "gelu",
        "bias": True,
        "qk_norm": True,
    },
}


class LanguageModel(nn.Module):
    """Embedding, block, norm and the embedding's weight again; the loss of the next token."""

    def __init__(
        self, name: str, group: Group, sequence_parallel: bool, dtype: torch.dtype
    ) -> None:
        super().__init__()
        width = BLOCKS[name]["hidden_size"]
        on_shards: dict[str, Any] = {
            "sequence_parallel": sequence_parallel,
            "group": group,
            "dtype": dtype,
        }
        self.cut = tp.Partition.even(TOKENS, group.size)
        self.embedding = tp.VocabParallelEmbedding(VOCAB, width, **on_shards)
        self.block = tp.TensorParallelTransformerBlock(**BLOCKS[name], **on_shards)
        self.norm = tp.ParallelRMSNorm(
            width, is_partial=sequence_parallel, group=group, dtype=dtype
        )
        self.head = tp.ParallelLMHead(
            width,
            VOCAB,
            embedding=self.embedding,
            gather_output=True,
            sequence_parallel=sequence_parallel,
        )

    def forward(self, ids: Tensor) -> Tensor:
        h = self.block(self.embedding(ids, self.cut), sequence_partition=self.cut)
        logits = self.head(self.norm(h), self.cut)
        return F.cross_entropy(logits.flatten(0, 1).float(), ids.roll(-1, 1).flatten())


def dense(name: str, dtype: torch.dtype = torch.float64) -> LanguageModel:
    """The same on every rank, its norms and biases not what they are initialised to."""
    torch.manual_seed(7)
    model = LanguageModel(name, world_of_one(), False, dtype)
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(noise * 0.3 + (parameter.dim() == 1))
    return model


def sharded(
    name: str, group: Group, sequence_parallel: bool = False, dtype: torch.dtype = torch.float64
) -> LanguageModel:
    """This rank's part of `dense`."""
    model = LanguageModel(name, group, sequence_parallel, dtype)
    model.load_state_dict(dense(name, dtype).state_dict())
    return model


def ids(seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(VOCAB, (2, TOKENS), generator=generator)
