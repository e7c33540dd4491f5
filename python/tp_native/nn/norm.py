"""Normalisation layers, whole on every rank, that know whether they see all tokens or a shard."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..group import GroupLike, current_group
from .gradients import summed


class ParallelRMSNorm(nn.RMSNorm):
    """``nn.RMSNorm`` over the last dimension.

    ``is_partial``: each rank normalises vectors of its own (a sequence shard, its own heads), so
    the weight's gradient is summed over the ranks.
    Source: Zhang & Sennrich, Root Mean Square Layer Normalization, arXiv:1910.07467.
    """

    def __init__(
        self,
        size: int,
        eps: float | None = 1e-6,
        *,
        is_partial: bool = False,
        group: GroupLike | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(size, eps, device=device, dtype=dtype)
        self.group = current_group(group)
        self.partial_gradients = ("weight",) if is_partial else ()

    def forward(self, x: Tensor) -> Tensor:
        """Normalise."""
        weight: Tensor = self.weight
        if self.partial_gradients:
            (weight,) = summed(self.group, weight)
        return F.rms_norm(x, self.normalized_shape, weight, self.eps)


class ParallelLayerNorm(nn.LayerNorm):
    """``nn.LayerNorm`` over the last dimension; ``is_partial`` as in `ParallelRMSNorm`.

    Source: Ba et al., Layer Normalization, arXiv:1607.06450.
    """

    def __init__(
        self,
        size: int,
        eps: float = 1e-5,
        *,
        is_partial: bool = False,
        group: GroupLike | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(size, eps, device=device, dtype=dtype)
        self.group = current_group(group)
        self.partial_gradients = ("weight", "bias") if is_partial else ()

    def forward(self, x: Tensor) -> Tensor:
        """Normalise."""
        weight: Tensor = self.weight
        bias: Tensor = self.bias
        if self.partial_gradients:
            weight, bias = summed(self.group, weight, bias)
        return F.layer_norm(x, self.normalized_shape, weight, bias, self.eps)
