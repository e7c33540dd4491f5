"""The feed-forward part of a transformer block, cut by its inner width."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _ops
from ..group import GroupLike, current_group
from ..partition import Partition, ShardLayout
from .composite import CompositeModule
from .linear import ColumnParallelLinear, RowParallelLinear

_GATED = {"swiglu": "silu", "geglu": "gelu", "geglu_tanh": "gelu_tanh"}
_PLAIN = ("gelu", "gelu_tanh", "relu", "silu")


class ParallelMLP(CompositeModule):
    """``down(act(up(x)))``, or ``down(act(gate(x)) * up(x))`` with gate and up in one matrix.

    One all-reduce forward, one backward; with ``sequence_parallel`` an all-gather and a
    reduce-scatter each way instead.

    Shapes: input and output ``(..., hidden_size)``, replicated; with ``sequence_parallel`` this
    rank's part of dimension -2. ``gate_up_proj.weight`` of the dense twin is
    ``(2 * intermediate_size, hidden_size)``, the gate's rows first.
    Cost per rank: ``4 M H I / P`` FLOP forward, 6 where gated.
    Raises: ValueError for an unknown activation or a ``partition`` that does not add up to
    ``intermediate_size``.
    Source: Shoeybi et al., Megatron-LM, arXiv:1909.08053; Shazeer, GLU Variants Improve
    Transformer, arXiv:2002.05202.
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        *,
        activation: str = "swiglu",
        bias: bool = False,
        group: GroupLike | None = None,
        sequence_parallel: bool = False,
        partition: Partition | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.options: dict[str, Any] = {
            "hidden_size": hidden_size,
            "intermediate_size": intermediate_size,
            "activation": activation,
            "bias": bias,
        }
        if activation not in (*_GATED, *_PLAIN):
            raise ValueError(
                f"ParallelMLP: activation {activation!r}, expected one of {[*_GATED, *_PLAIN]}"
            )
        self.group = current_group(group)
        self.activation, self.sequence_parallel = activation, sequence_parallel
        cut = partition or Partition.even(intermediate_size, self.group.size)
        cut.check(intermediate_size, self.group.size)
        place: dict[str, Any] = {
            "group": self.group,
            "sequence_parallel": sequence_parallel,
            "device": device,
            "dtype": dtype,
        }
        if activation in _GATED:
            self.gate_up_proj = ColumnParallelLinear(
                hidden_size,
                2 * intermediate_size,
                bias,
                partition=ShardLayout.stacked([cut, cut]),
                **place,
            )
        else:
            self.up_proj = ColumnParallelLinear(
                hidden_size, intermediate_size, bias, partition=cut, activation=activation, **place
            )
        self.down_proj = RowParallelLinear(
            intermediate_size, hidden_size, bias, partition=cut, **place
        )

    def forward(self, x: Tensor, *, sequence_partition: Partition | None = None) -> Tensor:
        """Apply it; ``sequence_partition`` as in `ColumnParallelLinear.forward`."""
        y: Tensor = self.down_proj(self.inner(x, sequence_partition), sequence_partition)
        return y

    def inner(self, x: Tensor, sequence_partition: Partition | None = None) -> Tensor:
        """What goes into ``down_proj``: ``(..., local_intermediate_size)``."""
        if self.activation in _GATED:
            return _ops.glu(self.gate_up_proj(x, sequence_partition), _GATED[self.activation])
        y: Tensor = self.up_proj(x, sequence_partition)
        return y
