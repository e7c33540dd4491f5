"""Typed wrappers over ``torch.ops.tp_native``. Schemas, checks and gradients are in ``csrc/ops``.

``order`` is the group's token (``Group.order``), ``sizes`` the partition of all ranks, ``rank``
this rank in the group, ``group`` the group's name.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import _native  # noqa: F401  registers the ops

_ops = torch.ops.tp_native

# looked up once: two attributes of torch.ops are a tenth of a small op's time
_all_reduce_ = _ops.all_reduce_.default
_broadcast_ = _ops.broadcast_.default
_all_reduce = _ops.all_reduce.default
_copy_to_ranks = _ops.copy_to_ranks.default
_scatter_to_ranks = _ops.scatter_to_ranks.default
_broadcast = _ops.broadcast.default
_all_gather = _ops.all_gather.default
_reduce_scatter = _ops.reduce_scatter.default
_gather_into = _ops.gather_into.default
_scatter_into = _ops.scatter_into.default
_row_parallel_linear = _ops.row_parallel_linear.default
_row_parallel_linear_add_rms_norm = _ops.row_parallel_linear_add_rms_norm.default
_column_parallel_linear = _ops.column_parallel_linear.default
_column_parallel_linear_act = _ops.column_parallel_linear_act.default
_row_parallel_linear_scatter = _ops.row_parallel_linear_scatter.default
_gathered_column_parallel_linear = _ops.gathered_column_parallel_linear.default
_tune_linear = _ops.tune_linear.default
_import_linear_choices = _ops.import_linear_choices.default
_glu = _ops.glu.default
_vocab_parallel_embedding = _ops.vocab_parallel_embedding.default
_vocab_parallel_cross_entropy = _ops.vocab_parallel_cross_entropy.default
_empty_shared = _ops.empty_shared.default


def all_reduce_(t: Tensor, order: Tensor, op: str, group: str) -> None:
    """Reduce ``t`` over the group in place; no gradient."""
    _all_reduce_(t, order, op, group)


def broadcast_(t: Tensor, order: Tensor, src: int, group: str) -> None:
    """Overwrite ``t`` with rank ``src``'s; no gradient."""
    _broadcast_(t, order, src, group)


def all_reduce(t: Tensor, order: Tensor, op: str, group: str) -> Tensor:
    """Reduce over the group; backward: identity (sum), refused (avg, max, min)."""
    out: Tensor = _all_reduce(t, order, op, group)
    return out


def copy_to_ranks(t: Tensor, order: Tensor, group: str) -> Tensor:
    """Identity; backward: all-reduce."""
    out: Tensor = _copy_to_ranks(t, order, group)
    return out


def scatter_to_ranks(
    t: Tensor, order: Tensor, sizes: Sequence[int], dim: int, rank: int, group: str
) -> Tensor:
    """This rank's part of ``dim`` of a replicated tensor; backward: all-gather."""
    out: Tensor = _scatter_to_ranks(t, order, sizes, dim, rank, group)
    return out


def broadcast(t: Tensor, order: Tensor, src: int, rank: int, group: str) -> Tensor:
    """Rank ``src``'s tensor; backward: the sum to ``src``, zero elsewhere."""
    out: Tensor = _broadcast(t, order, src, rank, group)
    return out


def all_gather(
    t: Tensor, order: Tensor, sizes: Sequence[int], dim: int, grad: str, rank: int, group: str
) -> Tensor:
    """Concatenate along ``dim``; backward: this rank's slice ("replicated"), reduce-scatter
    ("partial").
    """
    out: Tensor = _all_gather(t, order, sizes, dim, grad, rank, group)
    return out


def reduce_scatter(
    t: Tensor, order: Tensor, sizes: Sequence[int], dim: int, op: str, rank: int, group: str
) -> Tensor:
    """Reduce and keep this rank's part of ``dim``; backward: all-gather."""
    out: Tensor = _reduce_scatter(t, order, sizes, dim, op, rank, group)
    return out


def gather_into(
    t: Tensor, order: Tensor, out: Tensor, sizes: Sequence[int], dst: int, group: str
) -> None:
    """Concatenate along dimension 0 into rank ``dst``'s ``out``; no gradient."""
    _gather_into(t, order, out, sizes, dst, group)


def scatter_into(
    t: Tensor, order: Tensor, out: Tensor, sizes: Sequence[int], src: int, group: str
) -> None:
    """Fill ``out`` with this rank's part of dimension 0 of rank ``src``'s ``t``; no gradient."""
    _scatter_into(t, order, out, sizes, src, group)


def row_parallel_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, order: Tensor, sizes: Sequence[int], group: str
) -> Tensor:
    """``x @ weight.T`` summed over ranks, plus ``bias`` once: GEMM, reduction, bias in one op."""
    out: Tensor = _row_parallel_linear(x, weight, bias, order, sizes, group)
    return out


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
    out: tuple[Tensor, Tensor] = _row_parallel_linear_add_rms_norm(
        x, weight, bias, residual, norm_weight, eps, order, sizes, group
    )
    return out


def column_parallel_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, order: Tensor, sizes: Sequence[int], group: str
) -> Tensor:
    """``x @ weight.T + bias`` with local rows of the weight; backward: one all-reduce of ``dx``."""
    out: Tensor = _column_parallel_linear(x, weight, bias, order, sizes, group)
    return out


def column_parallel_linear_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str,
    order: Tensor,
    sizes: Sequence[int],
    group: str,
) -> Tensor:
    """`column_parallel_linear` with "relu" or "gelu_tanh" behind it, in the GEMM's epilogue on a
    GPU where no gradient is needed.
    """
    out: Tensor = _column_parallel_linear_act(x, weight, bias, activation, order, sizes, group)
    return out


def row_parallel_linear_scatter(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    order: Tensor,
    in_sizes: Sequence[int],
    token_sizes: Sequence[int],
    dim: int,
    rank: int,
    group: str,
) -> Tensor:
    """This rank's tokens of ``x @ weight.T`` summed over ranks, plus ``bias`` once.

    ``in_sizes``: the cut of the weight's columns; ``token_sizes`` that of ``dim``, one of ``x``'s
    dimensions before the last. The sum is `reduce_scatter`'s of the products, bit by bit. Backward:
    one all-gather of the gradient, and the bias's comes whole to all ranks. No second derivative.
    """
    out: Tensor = _row_parallel_linear_scatter(
        x, weight, bias, order, in_sizes, token_sizes, dim, rank, group
    )
    return out


def gathered_column_parallel_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    order: Tensor,
    out_sizes: Sequence[int],
    token_sizes: Sequence[int],
    dim: int,
    rank: int,
    group: str,
) -> tuple[Tensor, Tensor]:
    """``gathered @ weight.T + bias`` of all ranks' tokens, and ``gathered``, which has no gradient.

    ``x`` holds this rank's tokens, ``token_sizes[rank]`` in dimension ``dim``; ``out_sizes`` is the
    cut of the weight's rows. Backward: one reduce-scatter of ``dx``. No second derivative.
    """
    out: tuple[Tensor, Tensor] = _gathered_column_parallel_linear(
        x, weight, bias, order, out_sizes, token_sizes, dim, rank, group
    )
    return out


def tune_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    grad: Tensor | None,
    kind: str,
    sizes: Sequence[int],
    candidates: int,
    group: str,
) -> tuple[Tensor, Tensor]:
    """Time the products of a layer of ``kind`` on a GPU; this rank uses the fastest from now on.

    ``kind``: "row"; "column_relu", "column_gelu_tanh"; "column_backward", whose ``grad`` is that of
    the layer's output. Returns the choices as bytes, and by product the microseconds of the
    heuristic's choice and of the fastest. Sends nothing; on a CPU there is nothing to choose.
    """
    out: tuple[Tensor, Tensor] = _tune_linear(x, weight, bias, grad, kind, sizes, candidates, group)
    return out


def import_linear_choices(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    grad: Tensor | None,
    kind: str,
    sizes: Sequence[int],
    choices: Tensor,
    group: str,
) -> None:
    """Use what `tune_linear` returned on another rank for a layer that is alike."""
    _import_linear_choices(x, weight, bias, grad, kind, sizes, choices, group)


def glu(gate_up: Tensor, activation: str) -> Tensor:
    """``activation(gate) * up`` for ``gate_up = [gate, up]`` along the last dimension, rounded
    once; "silu" (SwiGLU), "gelu" (GeGLU) or "gelu_tanh".

    Source: Shazeer, GLU Variants Improve Transformer, arXiv:2002.05202.
    """
    out: Tensor = _glu(gate_up, activation)
    return out


def vocab_parallel_embedding(
    ids: Tensor,
    weight: Tensor,
    order: Tensor,
    sizes: Sequence[int],
    padding_idx: int,
    rank: int,
    group: str,
) -> Tensor:
    """Rows of a table cut by vocabulary; ``padding_idx`` -1: none."""
    out: Tensor = _vocab_parallel_embedding(ids, weight, order, sizes, padding_idx, rank, group)
    return out


def vocab_parallel_cross_entropy(
    logits: Tensor,
    target: Tensor,
    order: Tensor,
    sizes: Sequence[int],
    vocab_size: int | None,
    ignore_index: int,
    label_smoothing: float,
    rank: int,
    group: str,
) -> Tensor:
    """The loss of every row of logits that are cut by vocabulary; ``sizes`` empty: the ranks tell
    each other.
    """
    out: tuple[Tensor, Tensor, Tensor] = _vocab_parallel_cross_entropy(
        logits, target, order, sizes, vocab_size, ignore_index, label_smoothing, rank, group
    )
    return out[0]


def empty_shared(order: Tensor, shape: Sequence[int], dtype: torch.dtype, group: str) -> Tensor:
    """An uninitialised tensor in the group's shared memory."""
    out: Tensor = _empty_shared(order, shape, dtype, group)
    return out
