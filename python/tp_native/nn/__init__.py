"""Layers cut over the ranks of a group."""

from .embedding import VocabParallelEmbedding
from .linear import ColumnParallelLinear, RowParallelLinear
from .loss import vocab_parallel_cross_entropy
from .sharded import ShardedModule

__all__ = [
    "ColumnParallelLinear",
    "RowParallelLinear",
    "ShardedModule",
    "VocabParallelEmbedding",
    "vocab_parallel_cross_entropy",
]
