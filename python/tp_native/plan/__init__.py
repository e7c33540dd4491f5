"""How a model is cut: the plan as data, its making, and its words."""

from .planner import plan
from .shards import Shard, ShardEntry, ShardPlan
from .styles import SUPPORTED_STYLES

__all__ = ["SUPPORTED_STYLES", "Shard", "ShardEntry", "ShardPlan", "plan"]
