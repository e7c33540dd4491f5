"""Tensor parallelism for PyTorch with a native core: one model, N ranks."""

from ._native import _C
from .checkpoint.adapter import load_lora, save_lora
from .checkpoint.loader import DistributedCheckpointLoader, load_pretrained
from .checkpoint.writer import CheckpointSaver, save_pretrained
from .collectives import (
    all_gather_tensor,
    all_reduce_sum,
    broadcast_tensor,
    copy_to_ranks,
    reduce_scatter_sum,
    scatter_to_ranks,
    synchronize_across_ranks,
)
from .config import TensorParallelConfig, get_tensor_parallel_config
from .errors import (
    CheckpointError,
    CollectiveMismatchError,
    CollectiveTimeoutError,
    PeerLostError,
    PlanError,
    TensorParallelError,
)
from .generate import generate
from .group import Group, current_group, init_tensor_parallel
from .guards import Guard, guard
from .nn import (
    ColumnParallelConv1D,
    ColumnParallelEmbedding,
    ColumnParallelLinear,
    KVCache,
    ParallelAttention,
    ParallelDropout,
    ParallelLayerNorm,
    ParallelLMHead,
    ParallelMLP,
    ParallelMultiheadAttention,
    ParallelRMSNorm,
    RowParallelConv1D,
    RowParallelLinear,
    TensorParallelTransformerBlock,
    VocabParallelEmbedding,
    add_lora,
    deferred_gradients,
    merge_lora,
    unmerge_lora,
    vocab_parallel_cross_entropy,
)
from .optim import GradScaler, clip_grad_norm_
from .parallelize import DistributedModelWrapper, parallelize
from .partition import Partition, ShardLayout
from .plan import ShardPlan, plan
from .simulate import simulate
from .state import full_state_dict
from .tune import LinearTuning, tune_linear
from .verify import verify

__version__ = _C.__version__

__all__ = [
    "CheckpointError",
    "CheckpointSaver",
    "CollectiveMismatchError",
    "CollectiveTimeoutError",
    "ColumnParallelConv1D",
    "ColumnParallelEmbedding",
    "ColumnParallelLinear",
    "DistributedCheckpointLoader",
    "DistributedModelWrapper",
    "GradScaler",
    "Group",
    "Guard",
    "KVCache",
    "LinearTuning",
    "ParallelAttention",
    "ParallelDropout",
    "ParallelLMHead",
    "ParallelLayerNorm",
    "ParallelMLP",
    "ParallelMultiheadAttention",
    "ParallelRMSNorm",
    "Partition",
    "PeerLostError",
    "PlanError",
    "RowParallelConv1D",
    "RowParallelLinear",
    "ShardLayout",
    "ShardPlan",
    "TensorParallelConfig",
    "TensorParallelError",
    "TensorParallelTransformerBlock",
    "VocabParallelEmbedding",
    "add_lora",
    "all_gather_tensor",
    "all_reduce_sum",
    "broadcast_tensor",
    "clip_grad_norm_",
    "copy_to_ranks",
    "current_group",
    "deferred_gradients",
    "full_state_dict",
    "generate",
    "get_tensor_parallel_config",
    "guard",
    "init_tensor_parallel",
    "load_lora",
    "load_pretrained",
    "merge_lora",
    "parallelize",
    "plan",
    "reduce_scatter_sum",
    "save_lora",
    "save_pretrained",
    "scatter_to_ranks",
    "simulate",
    "synchronize_across_ranks",
    "tune_linear",
    "unmerge_lora",
    "verify",
    "vocab_parallel_cross_entropy",
]
