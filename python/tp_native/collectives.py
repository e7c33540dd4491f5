"""Collectives as functions, with gradients (every rank computes the same loss, so the
cotangents of replicated tensors are replicated).
"""

from __future__ import annotations

from torch import Tensor

from . import _ops
from .group import Group, GroupLike, current_group
from .partition import Partition


def all_reduce_sum(t: Tensor, group: GroupLike | None = None) -> Tensor:
    """The sum of ``t`` over the ranks. Backward: identity (cotangents are replicated)."""
    g = current_group(group)
    return _ops.all_reduce(t, g.order, "sum", g.name) if g.size > 1 else t.clone()


def copy_to_ranks(t: Tensor, group: GroupLike | None = None) -> Tensor:
    """``t``, replicated already; marks where ranks begin to compute different parts. Backward:
    all-reduce.

    Source: Megatron-LM, arXiv:1909.08053, the operator *f* of section 3.
    """
    g = current_group(group)
    return _ops.copy_to_ranks(t, g.order, g.name) if g.size > 1 else t.clone()


def broadcast_tensor(t: Tensor, src_rank: int = 0, group: GroupLike | None = None) -> Tensor:
    """Rank ``src_rank``'s ``t`` on all ranks. Backward: the sum of all ranks' gradients to it,
    zero elsewhere.
    """
    g = current_group(group)
    # not g._check_rank: compilers know no method of a group that they made while tracing
    Group._check_rank(g, "broadcast_tensor", "src_rank", src_rank)
    return _ops.broadcast(t, g.order, src_rank, g.rank, g.name) if g.size > 1 else t.clone()


def all_gather_tensor(
    t: Tensor,
    dim: int = -1,
    group: GroupLike | None = None,
    grad: str = "replicated",
    *,
    partition: Partition | None = None,
) -> Tensor:
    """Concatenate the ranks' ``t`` along ``dim``; other dimensions must be equal.

    ``partition``: the sizes of ``dim`` where they differ. ``grad``: "replicated" if what follows is
    computed alike on all ranks (backward: this rank's slice), "partial" if each rank computes a
    part (backward: reduce-scatter).
    """
    g = current_group(group)
    if g.size == 1:
        return t.clone()
    sizes = partition.sizes if partition is not None else (t.size(dim),) * g.size
    return _ops.all_gather(t, g.order, sizes, dim, grad, g.rank, g.name)


def scatter_to_ranks(
    t: Tensor, dim: int = -2, group: GroupLike | None = None, *, partition: Partition | None = None
) -> Tensor:
    """This rank's part of ``dim`` of a replicated ``t``; cut evenly unless ``partition`` says.

    Backward: all-gather, of gradients that each rank has of its own part.
    Source: Korthikanti et al., arXiv:2205.05198, section 4.2.2 (where a sequence is cut).
    """
    g = current_group(group)
    if g.size == 1:
        return t.clone()
    cut = partition if partition is not None else Partition.even(t.size(dim), g.size)
    return _ops.scatter_to_ranks(t, g.order, cut.sizes, dim, g.rank, g.name)


def reduce_scatter_sum(
    t: Tensor, dim: int = 0, group: GroupLike | None = None, *, partition: Partition | None = None
) -> Tensor:
    """Sum ``t`` over the ranks and keep this rank's part of ``dim``. Backward: all-gather."""
    g = current_group(group)
    if g.size == 1:
        return t.clone()
    cut = partition if partition is not None else Partition.even(t.size(dim), g.size)
    return _ops.reduce_scatter(t, g.order, cut.sizes, dim, "sum", g.rank, g.name)


def synchronize_across_ranks(
    group: GroupLike | None = None, timeout_s: float | None = None
) -> None:
    """Return when all ranks have called it."""
    current_group(group).barrier(timeout_s)
