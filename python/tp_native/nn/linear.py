"""Linear layers cut by output features (column) or by input features (row)."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import Self

from .. import _ops
from ..collectives import all_gather_tensor, copy_to_ranks
from ..group import GroupLike
from ..partition import Partition
from .sharded import ShardedModule

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
}
_FUSED = ("gelu_tanh", "relu")  # those that a GEMM's epilogue has; the GELU there is the tanh form


def _refuse_sequence_parallel(name: str, sequence_parallel: bool) -> None:
    if sequence_parallel:
        raise ValueError(
            f"{name}: sequence_parallel=True is not available in this version; leave it False"
        )


class _ParallelLinear(ShardedModule):
    """Parameters and initialisation of both cuts; ``bias`` is a shard where ``shard_dims`` names
    it.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None

    def _make_parameters(
        self,
        shape: tuple[int, int],
        bias_size: int | None,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        self.weight = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        if bias_size is None:
            self.register_parameter("bias", None)
        else:
            self.bias = nn.Parameter(torch.empty(bias_size, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw as ``nn.Linear`` draws the whole layer and keep this rank's part.

        With equally seeded ranks the whole is the dense layer's, whatever the number of ranks.
        """
        if self.weight.is_meta:
            return
        generator = self.group.init_generator(self.weight.device)
        shape = (self.out_features, self.in_features)
        with torch.no_grad():
            full = self.weight.new_empty(shape)
            nn.init.kaiming_uniform_(full, a=math.sqrt(5), generator=generator)
            self.weight.copy_(self._local("weight", full))
            if self.bias is not None:
                bound = 1 / math.sqrt(self.in_features) if self.in_features > 0 else 0
                full_bias = self.bias.new_empty(self.out_features).uniform_(
                    -bound, bound, generator=generator
                )
                self.bias.copy_(self._local("bias", full_bias))

    in_features: int
    out_features: int


class ColumnParallelLinear(_ParallelLinear):
    """``y = act(x @ W.T + b)`` with ``out_features`` (the rows of ``W``) split over a group.

    No collective forward; backward one all-reduce of ``dx``.

    Shapes: input ``(..., in_features)``, the same on all ranks; output ``(...,
    local_out_features)``, or ``(..., out_features)`` with ``gather_output``. With ``skip_bias_add``
    returns ``(y, bias)``, the bias not added.
    Cost per rank: ``2 M N K / P`` FLOP forward.
    Raises: ValueError if ``partition`` does not add up to ``out_features`` or the input is not
    ``in_features`` wide.
    Source: Shoeybi et al., Megatron-LM, arXiv:1909.08053, section 3.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        group: GroupLike | None = None,
        gather_output: bool = False,
        skip_bias_add: bool = False,
        sequence_parallel: bool = False,
        activation: str | None = None,
        partition: Partition | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(group, out_features, partition)
        _refuse_sequence_parallel("ColumnParallelLinear", sequence_parallel)
        if activation is not None and activation not in _ACTIVATIONS:
            raise ValueError(
                f"activation {activation!r}: expected None or one of {sorted(_ACTIVATIONS)}"
            )
        if skip_bias_add and (gather_output or activation is not None):
            raise ValueError(
                "skip_bias_add=True leaves the bias to the caller: it excludes gather_output and "
                "activation, which need it"
            )
        self.in_features, self.out_features = in_features, out_features
        self.local_out_features = self.partition[self.group.rank]
        self.gather_output = gather_output
        self.skip_bias_add = skip_bias_add
        self.activation = activation
        self.shard_dims = {"weight": 0, "bias": 0} if bias else {"weight": 0}
        self._make_parameters(
            (self.local_out_features, in_features),
            self.local_out_features if bias else None,
            device,
            dtype,
        )

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        *,
        group: GroupLike | None = None,
        gather_output: bool = False,
        activation: str | None = None,
        partition: Partition | None = None,
    ) -> Self:
        """This rank's part of a dense layer."""
        layer = cls(
            linear.in_features,
            linear.out_features,
            linear.bias is not None,
            group=group,
            gather_output=gather_output,
            activation=activation,
            partition=partition,
            device="meta",
            dtype=linear.weight.dtype,
        )
        return layer.filled_from(linear)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor | None]:
        """Multiply by this rank's rows."""
        bias = None if self.skip_bias_add else self.bias
        cut = (self.group.order, self.partition.sizes, self.group.name)
        if self.group.size > 1 and self.activation in _FUSED:
            y = _ops.column_parallel_linear_act(x, self.weight, bias, self.activation, *cut)
        else:
            if self.group.size == 1:
                y = F.linear(x, self.weight, bias)
            else:
                y = _ops.column_parallel_linear(x, self.weight, bias, *cut)
            if self.activation is not None:
                y = _ACTIVATIONS[self.activation](y)
        if self.gather_output and self.group.size > 1:
            y = all_gather_tensor(y, -1, self.group, partition=self.partition)
        return (y, self.bias) if self.skip_bias_add else y

    def extra_repr(self) -> str:
        """Whole and local sizes."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features} (local "
            f"{self.local_out_features}), "
            f"bias={self.bias is not None}, rank={self.group.rank}/{self.group.size}"
        )


class RowParallelLinear(_ParallelLinear):
    """``y = x @ W.T + b`` with ``in_features`` (the columns of ``W``) split over a group.

    Every rank multiplies its slice; one all-reduce completes the sum. The bias joins after the
    reduction, so it is counted once whatever the number of ranks.

    Shapes: input ``(..., local_in_features)``, or ``(..., in_features)`` with
    ``input_is_parallel=False``; output ``(..., out_features)``, bitwise equal on every rank. With
    ``skip_bias_add`` returns ``(y, bias)``, the bias not added. With ``reduce_results=False`` ``y``
    is this rank's summand.
    Cost per rank: ``2 M N K / P`` FLOP and one all-reduce of ``M N`` elements.
    Raises: ValueError if ``partition`` does not add up to ``in_features``, or a bias would be added
    to summands.
    Source: Shoeybi et al., Megatron-LM, arXiv:1909.08053, section 3.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        group: GroupLike | None = None,
        input_is_parallel: bool = True,
        reduce_results: bool = True,
        skip_bias_add: bool = False,
        sequence_parallel: bool = False,
        partition: Partition | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(group, in_features, partition)
        _refuse_sequence_parallel("RowParallelLinear", sequence_parallel)
        if bias and not reduce_results and not skip_bias_add:
            raise ValueError(
                "reduce_results=False with a bias: every rank would add it, so the sum would hold "
                "it "
                f"{self.group.size} times; pass bias=False or skip_bias_add=True"
            )
        self.in_features, self.out_features = in_features, out_features
        self.local_in_features = self.partition[self.group.rank]
        self.input_is_parallel = input_is_parallel
        self.reduce_results = reduce_results
        self.skip_bias_add = skip_bias_add
        self.shard_dims = {"weight": 1}
        self._make_parameters(
            (out_features, self.local_in_features), out_features if bias else None, device, dtype
        )

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        *,
        group: GroupLike | None = None,
        input_is_parallel: bool = True,
        partition: Partition | None = None,
    ) -> Self:
        """This rank's part of a dense layer."""
        layer = cls(
            linear.in_features,
            linear.out_features,
            linear.bias is not None,
            group=group,
            input_is_parallel=input_is_parallel,
            partition=partition,
            device="meta",
            dtype=linear.weight.dtype,
        )
        return layer.filled_from(linear)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor | None]:
        """Multiply this rank's slice and sum over the ranks."""
        bias = None if self.skip_bias_add else self.bias
        if self.group.size == 1:
            y = F.linear(x, self.weight, bias)
            return (y, self.bias) if self.skip_bias_add else y
        if not self.input_is_parallel:
            x = self._local_input(x)
        if self.reduce_results:
            y = _ops.row_parallel_linear(
                x, self.weight, bias, self.group.order, self.partition.sizes, self.group.name
            )
        else:
            y = F.linear(x, self.weight)
        return (y, self.bias) if self.skip_bias_add else y

    def forward_add_rms_norm(
        self, x: Tensor, residual: Tensor, norm_weight: Tensor, eps: float = 1e-6
    ) -> tuple[Tensor, Tensor]:
        """The layer, the residual addition and the RMS norm that follow it in a transformer block.

        Returns ``(normed, hidden)``: ``hidden = residual + layer(x)`` and
        ``normed = hidden / sqrt(mean(hidden**2) + eps) * norm_weight`` over the last dimension, the
        bits that the steps have one by one in ``hidden``; without gradients all of it runs in the
        pass that sums the ranks' products. ``residual`` and ``norm_weight`` are equal on all ranks.
        Under ``torch.autocast`` the layer's product has autocast's dtype; ``residual`` and
        ``norm_weight`` are not cast, so a float32 residual gives a float32 ``hidden``.
        Source: Zhang & Sennrich, Root Mean Square Layer Normalization, arXiv:1910.07467.
        """
        if not self.reduce_results or self.skip_bias_add:
            raise ValueError(
                "forward_add_rms_norm needs the whole sum: make the layer with "
                "reduce_results=True and skip_bias_add=False"
            )
        if self.group.size == 1:
            hidden = residual + F.linear(x, self.weight, self.bias)
            wide = hidden.double() if hidden.dtype == torch.float64 else hidden.float()
            scale = wide.square().mean(-1, keepdim=True).add(eps).rsqrt()
            return (wide * scale).to(hidden.dtype) * norm_weight, hidden
        return _ops.row_parallel_linear_add_rms_norm(
            x if self.input_is_parallel else self._local_input(x),
            self.weight,
            self.bias,
            residual,
            norm_weight,
            eps,
            self.group.order,
            self.partition.sizes,
            self.group.name,
        )

    def _local_input(self, x: Tensor) -> Tensor:
        if x.shape[-1] != self.in_features:
            raise ValueError(
                "RowParallelLinear with input_is_parallel=False: the input's last dimension "
                f"is {x.shape[-1]}, expected the whole in_features, {self.in_features}"
            )
        # backward: the ranks' slices of dx, zero elsewhere, are summed
        whole = copy_to_ranks(x, self.group)
        return whole.narrow(-1, self.partition.offset(self.group.rank), self.local_in_features)

    def extra_repr(self) -> str:
        """Whole and local sizes."""
        return (
            f"in_features={self.in_features} (local {self.local_in_features}), "
            f"out_features={self.out_features}, "
            f"bias={self.bias is not None}, rank={self.group.rank}/{self.group.size}"
        )
