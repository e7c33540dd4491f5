"""Layers cut over the ranks of a group."""

from .embedding import VocabParallelEmbedding
from .linear import ColumnParallelLinear, RowParallelLinear
from .sharded import ShardedModule

__all__ = ["ColumnParallelLinear", "RowParallelLinear", "ShardedModule", "VocabParallelEmbedding"]
