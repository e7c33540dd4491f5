"""Layers cut over the ranks of a group."""

from .attention import KVCache, ParallelAttention
from .block import TensorParallelTransformerBlock
from .conv1d import ColumnParallelConv1D, RowParallelConv1D, is_conv1d
from .dropout import ParallelDropout
from .embedding import ColumnParallelEmbedding, VocabParallelEmbedding
from .gradients import deferred_gradients, summed
from .head import ParallelLMHead
from .linear import ColumnParallelLinear, RowParallelLinear, matrix_of
from .lora import LoRAModule, add_lora, merge_lora, unmerge_lora
from .loss import vocab_parallel_cross_entropy
from .mlp import ParallelMLP
from .multihead import ParallelMultiheadAttention, without_fused_layers
from .norm import ParallelLayerNorm, ParallelRMSNorm
from .sharded import ShardedModule, ShardMark, full_of, mark_of, put_mark

__all__ = [
    "ColumnParallelConv1D",
    "ColumnParallelEmbedding",
    "ColumnParallelLinear",
    "KVCache",
    "LoRAModule",
    "ParallelAttention",
    "ParallelDropout",
    "ParallelLMHead",
    "ParallelLayerNorm",
    "ParallelMLP",
    "ParallelMultiheadAttention",
    "ParallelRMSNorm",
    "RowParallelConv1D",
    "RowParallelLinear",
    "ShardMark",
    "ShardedModule",
    "TensorParallelTransformerBlock",
    "VocabParallelEmbedding",
    "add_lora",
    "deferred_gradients",
    "full_of",
    "is_conv1d",
    "mark_of",
    "matrix_of",
    "merge_lora",
    "put_mark",
    "summed",
    "unmerge_lora",
    "vocab_parallel_cross_entropy",
    "without_fused_layers",
]
