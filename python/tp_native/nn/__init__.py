"""Layers cut over the ranks of a group."""

from .attention import KVCache, ParallelAttention
from .block import TensorParallelTransformerBlock
from .dropout import ParallelDropout
from .embedding import VocabParallelEmbedding
from .gradients import deferred_gradients
from .head import ParallelLMHead
from .linear import ColumnParallelLinear, RowParallelLinear
from .lora import LoRAModule, add_lora, merge_lora, unmerge_lora
from .mlp import ParallelMLP
from .norm import ParallelLayerNorm, ParallelRMSNorm
from .sharded import ShardedModule, ShardMark, mark_of

__all__ = [
    "ColumnParallelLinear",
    "KVCache",
    "LoRAModule",
    "ParallelAttention",
    "ParallelDropout",
    "ParallelLMHead",
    "ParallelLayerNorm",
    "ParallelMLP",
    "ParallelRMSNorm",
    "RowParallelLinear",
    "ShardMark",
    "ShardedModule",
    "TensorParallelTransformerBlock",
    "VocabParallelEmbedding",
    "add_lora",
    "deferred_gradients",
    "mark_of",
    "merge_lora",
    "unmerge_lora",
]
