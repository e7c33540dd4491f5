"""transformers' ``Conv1D``, a linear layer whose weight lies ``(in, out)``, cut as a linear layer
is. transformers itself is not imported.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .linear import ColumnParallelLinear, RowParallelLinear, _ParallelLinear

_STD = 0.02  # what transformers' Conv1D draws its weight with


def is_conv1d(module: nn.Module) -> bool:
    """Whether ``module`` is transformers' ``Conv1D``: of that name, with a matrix ``nf`` wide."""
    weight, width = getattr(module, "weight", None), getattr(module, "nf", None)
    return (
        type(module).__name__ == "Conv1D"
        and isinstance(weight, Tensor)
        and weight.dim() == 2
        and weight.size(1) == width
    )


class _ParallelConv1D(_ParallelLinear):
    """Parameters as they lie in ``Conv1D``; products are the linear layer's."""

    _out_dim, _in_dim = 1, 0

    @property
    def nf(self) -> int:
        """``out_features``, by ``Conv1D``'s name."""
        return self.out_features

    @property
    def nx(self) -> int:
        """``in_features``, by ``Conv1D``'s name."""
        return self.in_features

    @classmethod
    def _widths(cls, dense: nn.Module) -> tuple[int, int]:
        if not is_conv1d(dense):
            raise TypeError(
                f"{cls.__name__}.from_linear got a {type(dense).__name__}, expected transformers' "
                "Conv1D"
            )
        in_features, out_features = dense.get_parameter("weight").shape
        return in_features, out_features

    def _drawn_weight(self, generator: torch.Generator | None) -> Tensor:
        full = self.weight.new_empty(self.in_features, self.out_features)
        return full.normal_(std=_STD, generator=generator)

    def _drawn_bias(self, local: Tensor, generator: torch.Generator | None) -> Tensor:
        return local.new_zeros(self.out_features)


class ColumnParallelConv1D(_ParallelConv1D, ColumnParallelLinear):
    """``y = x @ W + b`` with ``nf`` (the columns of ``W``) split over a group.

    `ColumnParallelLinear` with its arguments and collectives, and with ``Conv1D``'s weight, ``(nx,
    local_nf)``: names and whole shapes in a ``state_dict`` stay ``Conv1D``'s. ``from_linear`` takes
    one. GPT-2's ``c_attn`` is three layers side by side: cut it by `ShardLayout.stacked`.
    """


class RowParallelConv1D(_ParallelConv1D, RowParallelLinear):
    """``y = x @ W + b`` with ``nx`` (the rows of ``W``) split over a group.

    `RowParallelLinear` with its arguments and collectives, and with ``Conv1D``'s weight,
    ``(local_nx, nf)``. ``from_linear`` takes a ``Conv1D``.
    """
