"""A plan as JSON, for programs: every module by itself."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from ..partition import ShardLayout
from .facts import (
    BACKWARD,
    FORWARD,
    Collective,
    by_op,
    collectives,
    path,
    sharded_share,
    waste,
    whole_matrices,
)
from .shards import ShardEntry, ShardPlan


def as_json(plan: ShardPlan) -> str:
    """The plan as JSON, every module by itself; lists over ranks begin with rank 0.

    Keys: ``format`` (1, grows when a key changes its meaning), ``model``, ``world_size``,
    ``modules`` (``name``, ``class``, ``style``, ``size`` of the dimension that is cut (heads of an
    attention), ``local_sizes``, ``ranges`` (null where the ranks' parts follow one another, else
    [start, stop] pairs for each rank), ``parameters`` (``name``, ``shape``, ``dim``,
    ``local_shapes``), ``bytes_per_rank``, ``tied_to`` (null, or the parameter that it shares, whose
    bytes count there), ``calls`` in a forward pass, ``note``, ``collectives``), ``whole`` (modules
    whose matrices every rank holds: ``name``, ``class``, ``reason``, ``bytes``), ``attributes``
    (``module``, ``name``, ``values``), ``translated`` (name to reason), ``summed``,
    ``partial_gradients``, ``followers``, ``collectives`` (``forward`` and ``backward``, by
    operation), ``bytes`` (``model``, ``per_rank``), ``waste``, ``sharded_matrix_percent``.

    A collective: ``op``, ``direction``, ``calls`` in one pass, ``bytes_per_token`` of one call,
    ``bytes_per_pass`` of one call, which don't depend on tokens. ``waste``: what the fullest rank
    holds beyond the mean and all ranks beyond the model, in per cent, and the latter's parts in
    bytes.
    """
    found = collectives(plan)
    by_module: dict[str, list[Collective]] = {}
    for one in found:
        by_module.setdefault(one.module, []).append(one)
    lost = waste(plan)
    told = {
        "format": 1,
        "model": plan.model_name,
        "world_size": plan.world_size,
        "modules": [
            _module(plan, name, entry, by_module.pop(name, []))
            for name, entry in plan.entries.items()
        ],
        "whole": [
            {
                "name": one.module,
                "class": plan.kinds.get(one.module),
                "reason": one.reason,
                "bytes": one.size_bytes,
            }
            for one in whole_matrices(plan)
        ],
        "attributes": [
            {"module": module, "name": name, "values": values}
            for module, named in plan.attributes.items()
            for name, values in named.items()
        ],
        "translated": dict(plan.translated),
        "summed": plan.summed,
        "partial_gradients": plan.partial_gradients,
        "followers": dict(plan.followers),
        "collectives": {way: by_op(found, way) for way in (FORWARD, BACKWARD)},
        "bytes": {
            "model": plan.whole_bytes(),
            "per_rank": [plan.local_bytes(rank) for rank in range(plan.world_size)],
        },
        "waste": {
            "fullest_over_mean_percent": 100 * lost.imbalance,
            "copies_percent": 100 * lost.copied,
            "shared_parts_bytes": lost.shared_heads,
            "whole_matrices_bytes": lost.matrices,
            "vectors_bytes": lost.vectors,
        },
        "sharded_matrix_percent": 100 * sharded_share(plan),
    }
    text = json.dumps(told, indent=1)
    return re.sub(r"\[[\d,\s]+\]", lambda found: " ".join(found[0].split()), text)


def _module(
    plan: ShardPlan, name: str, entry: ShardEntry, found: Sequence[Collective]
) -> Mapping[str, Any]:
    layout = ShardLayout.of(entry.partition)
    params = [path(name, local) for local in entry.shards]
    held = [param for param in params if param not in plan.aliases]
    ranks = range(plan.world_size)
    return {
        "name": name,
        "class": plan.kinds.get(name),
        "style": entry.style,
        "size": layout.size,
        "local_sizes": layout.local_sizes.sizes,
        "ranges": None if layout.is_consecutive else layout.ranges,
        "parameters": [
            {
                "name": param,
                "shape": plan.shapes[param],
                "dim": entry.shards[local].dim,
                "local_shapes": [plan.local_shape(param, rank) for rank in ranks],
            }
            for local, param in zip(entry.shards, params, strict=True)
        ],
        "bytes_per_rank": [sum(plan.held_bytes(p, rank) for p in held) for rank in ranks],
        "tied_to": next((plan.aliases[p] for p in params if p in plan.aliases), None),
        "calls": plan.calls_of(name),
        "note": entry.note,
        "collectives": [
            {
                "op": one.op,
                "direction": one.direction,
                "calls": one.calls,
                "bytes_per_token": one.bytes_per_token,
                "bytes_per_pass": one.bytes_per_pass,
            }
            for one in found
        ],
    }
