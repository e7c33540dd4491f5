"""Tensor parallelism for PyTorch with a native core: one model, N ranks."""

from ._native import _C
from .checkpoint.loader import DistributedCheckpointLoader, load_pretrained
from .checkpoint.writer import CheckpointSaver, save_pretrained
from .collectives import (
    all_gather_tensor,
    all_reduce_sum,
    broadcast_tensor,
    copy_to_ranks,
    reduce_scatter_sum,
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
from .nn import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding
from .parallelize import DistributedModelWrapper, parallelize
from .partition import Partition
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
    "ColumnParallelLinear",
    "DistributedCheckpointLoader",
    "DistributedModelWrapper",
    "Group",
    "LinearTuning",
    "Partition",
    "PeerLostError",
    "PlanError",
    "RowParallelLinear",
    "ShardPlan",
    "TensorParallelConfig",
    "TensorParallelError",
    "VocabParallelEmbedding",
    "all_gather_tensor",
    "all_reduce_sum",
    "broadcast_tensor",
    "copy_to_ranks",
    "current_group",
    "full_state_dict",
    "generate",
    "get_tensor_parallel_config",
    "init_tensor_parallel",
    "load_pretrained",
    "parallelize",
    "plan",
    "reduce_scatter_sum",
    "save_pretrained",
    "simulate",
    "synchronize_across_ranks",
    "tune_linear",
    "verify",
]
