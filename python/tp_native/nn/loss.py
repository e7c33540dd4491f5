"""The cross entropy of logits that are cut by vocabulary."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _ops
from ..group import GroupLike, current_group
from ..partition import Partition

Reduction = Literal["none", "mean", "sum"]


def vocab_parallel_cross_entropy(
    local_logits: Tensor,
    target: Tensor,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: Reduction = "none",
    vocab_size: int | None = None,
    partition: Partition | None = None,
    group: GroupLike | None = None,
) -> Tensor:
    """``F.cross_entropy`` of logits of which every rank holds some columns.

    The ranks exchange a few numbers a row: one all-gather forward, one more for the widths where
    ``partition`` (how the columns are cut) is not given; none backward, where the gradient is the
    one buffer made. Statistics are in float32, for float64 logits in float64.

    Shapes: ``local_logits`` ``(..., local_vocab)``, uneven and empty ones included; ``target``
    ``(...)`` int64 or int32, ids of the whole vocabulary, the same on all ranks. Output ``(...)``,
    or a scalar by ``reduction`` ("mean" over the tokens that are not ignored, nan where there is
    none); float32 or float64, bitwise equal on every rank.
    ``ignore_index``: a target whose loss and gradient are 0. ``label_smoothing``: the share of the
    target that is spread over the whole vocabulary. ``vocab_size``: columns at or beyond it are
    padding, without a part in the loss and with gradient 0; padding of -infinity needs none of it
    unless labels are smoothed.
    A world of one calls ``F.cross_entropy``, in float32 at least.
    Raises: IndexError on every rank for a target outside the vocabulary. ValueError on every rank
    for widths that ``partition`` denies, and for logits that look gathered: each of their columns
    would count once a rank. On GPUs, which are not waited for, a target asserts on the device, a
    width is told to its own rank, and gathered logits without a ``partition`` pass unnoticed.
    Source: Shoeybi et al., Megatron-LM, arXiv:1909.08053, section 3; Milakov & Gimelshein,
    arXiv:1805.02867.
    """
    if reduction not in ("none", "mean", "sum"):
        raise ValueError(f"reduction {reduction!r}: expected 'none', 'mean' or 'sum'")
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing {label_smoothing}: expected 0 to 1")
    g = current_group(group)
    if g.size == 1:
        logits = _counted(local_logits, vocab_size, partition)
        return _dense(logits, target, ignore_index, label_smoothing, reduction)
    loss = _ops.vocab_parallel_cross_entropy(
        local_logits,
        target,
        g.order,
        () if partition is None else partition.sizes,
        vocab_size,
        ignore_index,
        label_smoothing,
        g.rank,
        g.name,
    )
    if reduction == "none":
        return loss
    total = loss.sum()
    return total if reduction == "sum" else total / target.ne(ignore_index).sum()


def _counted(logits: Tensor, vocab_size: int | None, partition: Partition | None) -> Tensor:
    """The columns that are no padding."""
    width = logits.shape[-1]
    if partition is not None:
        partition.check(width, 1)
    if vocab_size is None:
        return logits
    if not 1 <= vocab_size <= width:
        raise ValueError(f"vocab_size {vocab_size}: expected 1 to {width}, the logits' columns")
    return logits[..., :vocab_size]


def _dense(
    logits: Tensor, target: Tensor, ignore_index: int, label_smoothing: float, reduction: Reduction
) -> Tensor:
    if target.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"the target is {target.dtype}: expected int64 or int32")
    if logits.shape[:-1] != target.shape:
        raise ValueError(
            f"logits of shape {list(logits.shape)} and target of shape {list(target.shape)}: "
            "expected (..., local_vocab) and (...)"
        )
    loss = F.cross_entropy(
        (logits if logits.dtype == torch.float64 else logits.float()).reshape(
            target.numel(), logits.shape[-1]
        ),
        target.reshape(-1).long(),
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        reduction=reduction,
    )
    return loss.view(target.shape) if reduction == "none" else loss
