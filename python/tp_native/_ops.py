"""Typed wrappers over ``torch.ops.tp_native``. Schemas, checks and gradients are in ``csrc/ops``.

``order`` is the group's token (``Group.order``), ``sizes`` the partition of all ranks, ``group``
the group's name.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from . import _native  # noqa: F401  registers the ops

_ops = torch.ops.tp_native


def all_reduce_(t: Tensor, order: Tensor, op: str, group: str) -> None:
    """Reduce ``t`` over the group in place; no gradient."""
    _ops.all_reduce_.default(t, order, op, group)


def broadcast_(t: Tensor, order: Tensor, src: int, group: str) -> None:
    """Overwrite ``t`` with rank ``src``'s; no gradient."""
    _ops.broadcast_.default(t, order, src, group)


def all_reduce(t: Tensor, order: Tensor, op: str, group: str) -> Tensor:
    """Reduce over the group; backward: identity (sum), 1/size (avg), refused (max, min)."""
    return cast(Tensor, _ops.all_reduce.default(t, order, op, group))


def copy_to_ranks(t: Tensor, order: Tensor, group: str) -> Tensor:
    """Identity; backward: all-reduce."""
    return cast(Tensor, _ops.copy_to_ranks.default(t, order, group))


def broadcast(t: Tensor, order: Tensor, src: int, group: str) -> Tensor:
    """Rank ``src``'s tensor; backward: the sum to ``src``, zero elsewhere."""
    return cast(Tensor, _ops.broadcast.default(t, order, src, group))


def all_gather(
    t: Tensor, order: Tensor, sizes: Sequence[int], dim: int, grad: str, group: str
) -> Tensor:
    """Concatenate along ``dim``; backward: this rank's slice ("replicated"), reduce-scatter
    ("partial").
    """
    return cast(Tensor, _ops.all_gather.default(t, order, sizes, dim, grad, group))


def reduce_scatter(
    t: Tensor, order: Tensor, sizes: Sequence[int], dim: int, op: str, group: str
) -> Tensor:
    """Reduce and keep this rank's part of ``dim``; backward: all-gather."""
    return cast(Tensor, _ops.reduce_scatter.default(t, order, sizes, dim, op, group))


def gather_into(
    t: Tensor, order: Tensor, out: Tensor, sizes: Sequence[int], dst: int, group: str
) -> None:
    """Concatenate along dimension 0 into rank ``dst``'s ``out``; no gradient."""
    _ops.gather_into.default(t, order, out, sizes, dst, group)


def scatter_into(
    t: Tensor, order: Tensor, out: Tensor, sizes: Sequence[int], src: int, group: str
) -> None:
    """Fill ``out`` with this rank's part of dimension 0 of rank ``src``'s ``t``; no gradient."""
    _ops.scatter_into.default(t, order, out, sizes, src, group)


def row_parallel_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, order: Tensor, sizes: Sequence[int], group: str
) -> Tensor:
    """``x @ weight.T`` summed over ranks, plus ``bias`` once: GEMM, reduction, bias in one op."""
    return cast(Tensor, _ops.row_parallel_linear.default(x, weight, bias, order, sizes, group))


def row_parallel_linear_add_rms_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    norm_weight: Tensor,
    eps: float,
    order: Tensor,
    sizes: Sequence[int],
    group: str,
) -> tuple[Tensor, Tensor]:
    """``hidden = residual + row_parallel_linear(...)`` and its RMS norm, in one pass."""
    return cast(
        tuple[Tensor, Tensor],
        _ops.row_parallel_linear_add_rms_norm.default(
            x, weight, bias, residual, norm_weight, eps, order, sizes, group
        ),
    )


def column_parallel_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, order: Tensor, sizes: Sequence[int], group: str
) -> Tensor:
    """``x @ weight.T + bias`` with local rows of the weight; backward: one all-reduce of ``dx``."""
    return cast(Tensor, _ops.column_parallel_linear.default(x, weight, bias, order, sizes, group))


def vocab_parallel_embedding(
    ids: Tensor, weight: Tensor, order: Tensor, sizes: Sequence[int], padding_idx: int, group: str
) -> Tensor:
    """Rows of a table cut by vocabulary; ``padding_idx`` -1: none."""
    return cast(
        Tensor,
        _ops.vocab_parallel_embedding.default(ids, weight, order, sizes, padding_idx, group),
    )


def empty_shared(shape: Sequence[int], dtype: torch.dtype, group: str) -> Tensor:
    """An uninitialised tensor in the group's shared memory."""
    return cast(Tensor, _ops.empty_shared.default(shape, dtype, group))
