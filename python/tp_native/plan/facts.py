"""What a plan costs: collectives of each pass, what several ranks hold, what uneven sizes lose."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from .shards import (
    ATTENTION,
    COLUMN,
    COLUMN_GATHER,
    EMBEDDING_COLUMN,
    ROW,
    ROW_SPLIT,
    VOCABULARY,
    ShardEntry,
    ShardPlan,
)

FORWARD, BACKWARD = "forward", "backward"
ALL_REDUCE, ALL_GATHER, REDUCE_SCATTER = "all-reduce", "all-gather", "reduce-scatter"


@dataclass(frozen=True)
class Collective:
    """One collective of a module, ``calls`` times in one pass.

    ``bytes_per_token`` are what one call combines for each token that the module is given;
    ``bytes_per_pass`` what it combines besides, whatever the tokens (gradients of parameters).
    """

    module: str
    op: str
    direction: str
    calls: int
    bytes_per_token: int
    bytes_per_pass: int = 0


@dataclass(frozen=True)
class Whole:
    """Matrices of one module that every rank holds whole; ``size_bytes`` 0: tied to others."""

    module: str
    reason: str
    size_bytes: int


@dataclass(frozen=True)
class Waste:
    """What a cut into equal shares without a remainder would not have.

    ``imbalance``: how much more the fullest rank holds than the mean, 0.01 is one per cent.
    ``copied``: what all ranks together hold beyond the model, as a share of it; in bytes
    ``shared_heads`` (parts that several ranks hold), ``matrices`` and ``vectors`` (norms, biases).
    """

    imbalance: float
    copied: float
    shared_heads: int
    matrices: int
    vectors: int


def collectives(plan: ShardPlan) -> list[Collective]:
    """All collectives of a forward and a backward pass.

    Of a backward pass those for inputs that need a gradient; one for an attention whose query,
    key and value are one tensor. A module whose output is summed at the model's own wish has one
    whose bytes are not known here: 0.
    """
    if plan.world_size == 1:
        return []
    found: list[Collective] = []
    for name, entry in plan.entries.items():
        found += _of_entry(plan, name, entry)
    found += [Collective(name, ALL_REDUCE, FORWARD, 1, 0) for name in plan.summed]
    for name in plan.partial_gradients:
        size = math.prod(plan.shapes[name]) * plan.item_bytes[name]
        found.append(Collective(name.rpartition(".")[0], ALL_REDUCE, BACKWARD, 1, 0, size))
    return found


def by_op(found: Sequence[Collective], direction: str) -> dict[str, Counter[str]]:
    """Counts and bytes of one pass, by operation."""
    kinds: dict[str, Counter[str]] = {}
    for one in found:
        if one.direction == direction:
            kinds.setdefault(one.op, Counter()).update(
                count=one.calls,
                bytes_per_token=one.calls * one.bytes_per_token,
                bytes_per_pass=one.calls * one.bytes_per_pass,
            )
    return kinds


def _of_entry(plan: ShardPlan, name: str, entry: ShardEntry) -> Iterator[Collective]:
    calls = plan.calls_of(name)
    if not calls:
        return
    local = next(iter(entry.shards))
    item_bytes = plan.item_bytes[path(name, local)]
    ending, starting = entry.features * item_bytes, _in_features(plan, name, entry) * item_bytes
    if entry.style in (ROW, ROW_SPLIT, VOCABULARY, ATTENTION):
        yield Collective(name, ALL_REDUCE, FORWARD, calls, ending)
    elif ending:
        yield Collective(name, ALL_GATHER, FORWARD, calls, ending)
        if entry.gather_grad == "partial":
            yield Collective(name, REDUCE_SCATTER, BACKWARD, calls, ending)
    if entry.style in (COLUMN, COLUMN_GATHER, ROW_SPLIT, ATTENTION):
        yield Collective(name, ALL_REDUCE, BACKWARD, calls, starting)
    for local in entry.shards:
        if shared := _shared_bytes(plan, path(name, local)):
            yield Collective(name, ALL_REDUCE, BACKWARD, calls, 0, shared)


def _in_features(plan: ShardPlan, name: str, entry: ShardEntry) -> int:
    if entry.style == ATTENTION:
        return entry.features
    if entry.style in (VOCABULARY, EMBEDDING_COLUMN):
        return 0
    dim = entry.shards["weight"].dim
    return plan.shapes[path(name, "weight")][dim if entry.style in (ROW, ROW_SPLIT) else 1 - dim]


def _shared_bytes(plan: ShardPlan, param: str) -> int:
    """Bytes of a parameter's parts that several ranks hold, each part once."""
    cut = plan.shard(param)
    if cut is None or not cut.layout().is_replicated:
        return 0
    held = [place for places in cut.layout().ranges for place in places]
    shared = sum(b - a for a, b in {place for place in held if held.count(place) > 1})
    return shared * math.prod(plan.shapes[param]) * plan.item_bytes[param] // cut.layout().size


def whole_matrices(plan: ShardPlan) -> list[Whole]:
    """Modules with matrices that stay whole, in the model's order, and why."""
    sizes: dict[str, int] = {}
    for name in plan.shapes:
        owner = name.rpartition(".")[0]
        told = owner
        while told and told not in plan.whole:
            told = told.rpartition(".")[0]
        is_matrix = len(plan.shapes[name]) > 1 and plan.shard(name) is None
        if told in plan.whole or is_matrix:
            owner = told if told in plan.whole else owner
            size = plan.held_bytes(name, 0) if name not in plan.aliases and is_matrix else 0
            sizes[owner] = sizes.get(owner, 0) + size
    return [Whole(name, _reason(plan, name), size) for name, size in sizes.items()]


def _reason(plan: ShardPlan, module: str) -> str:
    if module in plan.whole:
        return plan.whole[module]
    return f"{plan.kinds.get(module, 'it')} is no Linear, Conv1D, Embedding or MultiheadAttention"


def waste(plan: ShardPlan) -> Waste:
    """What uneven cuts and copies cost."""
    per_rank = [plan.local_bytes(rank) for rank in range(plan.world_size)]
    model = plan.whole_bytes()
    copied = {"heads": 0, "matrices": 0, "vectors": 0}
    for name in plan.owned():
        held = sum(plan.held_bytes(name, rank) for rank in range(plan.world_size))
        if plan.shard(name) is not None:
            kind = "heads"
        else:
            kind = "matrices" if len(plan.shapes[name]) > 1 else "vectors"
        copied[kind] += held - math.prod(plan.shapes[name]) * plan.item_bytes[name]
    return Waste(
        max(per_rank) * plan.world_size / sum(per_rank) - 1 if any(per_rank) else 0.0,
        sum(per_rank) / model - 1 if model else 0.0,
        copied["heads"],
        copied["matrices"],
        copied["vectors"],
    )


def sharded_share(plan: ShardPlan) -> float:
    """The share, 0 to 1, of the matrices' elements that lies in cut matrices."""
    sizes = {n: math.prod(plan.shapes[n]) for n in plan.owned() if len(plan.shapes[n]) > 1}
    cut = sum(size for name, size in sizes.items() if plan.shard(name) is not None)
    return cut / sum(sizes.values()) if any(sizes.values()) else 0.0


def path(module: str, local: str) -> str:
    """A parameter's full name."""
    return f"{module}.{local}" if module else local
