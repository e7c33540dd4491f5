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
from ..partition import Partition, ShardLayout
from .gradients import summed_over_replicas
from .sharded import ShardedModule

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
}
_FUSED = ("gelu_tanh", "relu")  # those that a GEMM's epilogue has; the GELU there is the tanh form


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

    No collective forward; backward one all-reduce of ``dx``. With ``sequence_parallel`` the input
    is this rank's part of dimension ``sequence_dim``: forward one all-gather, backward one
    reduce-scatter.

    Shapes: input ``(..., in_features)``, the same on all ranks; output ``(...,
    local_out_features)``, or ``(..., out_features)`` with ``gather_output``. With ``skip_bias_add``
    returns ``(y, bias)``, the bias not added. ``partition`` may be a `ShardLayout`: rows in several
    ranges (stacked layers), or held by several ranks, whose gradients are summed.
    Cost per rank: ``2 M N K / P`` FLOP forward.
    Raises: ValueError if ``partition`` does not add up to ``out_features`` or the input is not
    ``in_features`` wide.
    Source: Shoeybi et al., Megatron-LM, arXiv:1909.08053, section 3; Korthikanti et al.,
    arXiv:2205.05198 (sequence parallelism).
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
        partition: Partition | ShardLayout | None = None,
        sequence_dim: int = -2,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(group, out_features, partition)
        if activation is not None and activation not in _ACTIVATIONS:
            raise ValueError(
                f"activation {activation!r}: expected None or one of {sorted(_ACTIVATIONS)}"
            )
        if skip_bias_add and (gather_output or activation is not None):
            raise ValueError(
                "skip_bias_add=True leaves the bias to the caller: it excludes gather_output and "
                "activation, which need it"
            )
        if gather_output and not self.layout.is_consecutive:
            raise ValueError(
                "gather_output=True puts the ranks' outputs one after another, which is not the "
                "whole's order in this layout; take the local output, or a Partition"
            )
        self.in_features, self.out_features = in_features, out_features
        self.local_out_features = self.partition[self.group.rank]
        self.gather_output = gather_output
        self.skip_bias_add = skip_bias_add
        self.sequence_parallel, self.sequence_dim = sequence_parallel, sequence_dim
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

    def forward(
        self, x: Tensor, sequence_partition: Partition | None = None
    ) -> Tensor | tuple[Tensor, Tensor | None]:
        """Multiply by this rank's rows.

        ``sequence_partition``: the tokens of every rank where ``sequence_parallel`` and their
        numbers differ.
        """
        if self.group.size == 1:
            y = self._product(x, self.weight, None if self.skip_bias_add else self.bias)
            y = self._activated(y)
            return (y, self.bias) if self.skip_bias_add else y
        weight, own_bias = self.weight, self.bias
        if self.layout.is_replicated:
            weight, own_bias = (self._summed(name) for name in ("weight", "bias"))  # type: ignore[assignment]
        bias = None if self.skip_bias_add else own_bias
        if self.sequence_parallel:
            y = self._of_tokens(x, weight, bias, sequence_partition)
        else:
            y = self._of_replicated(x, weight, bias)
        if self.gather_output:
            y = all_gather_tensor(y, -1, self.group, partition=self.partition)
        return (y, own_bias) if self.skip_bias_add else y

    def _product(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, weight, bias)

    def _activated(self, y: Tensor) -> Tensor:
        return y if self.activation is None else _ACTIVATIONS[self.activation](y)

    def _of_replicated(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Product and activation of an input that all ranks have; backward sums ``dx``."""
        cut = (self.group.order, self.partition.sizes, self.group.name)
        if self.activation in _FUSED:
            return _ops.column_parallel_linear_act(x, weight, bias, self.activation, *cut)
        return self._activated(_ops.column_parallel_linear(x, weight, bias, *cut))

    def _of_tokens(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, tokens: Partition | None
    ) -> Tensor:
        """Product and activation of all ranks' tokens; backward scatters the sum of ``dx``."""
        dim = self.sequence_dim
        sizes = (x.size(dim),) * self.group.size if tokens is None else tokens.sizes
        cut = (self.group.order, self.partition.sizes, sizes, dim, self.group.rank, self.group.name)
        y, _ = _ops.gathered_column_parallel_linear(x, weight, bias, *cut)
        return self._activated(y)

    def _summed(self, name: str) -> Tensor | None:
        parameter, mark = self._parameters[name], self.mark(name)
        if parameter is None or mark is None:
            return parameter
        return summed_over_replicas(parameter, mark)

    def _check_width(self, x: Tensor) -> None:
        if x.shape[-1] != self.in_features:
            raise ValueError(
                f"ColumnParallelLinear: the input's last dimension is {x.shape[-1]}, expected "
                f"in_features, {self.in_features}: it takes whole features of this rank's tokens"
            )

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

    With ``sequence_parallel`` the sum is scattered over dimension ``sequence_dim`` instead: one
    reduce-scatter forward and one all-gather backward, from which each rank has the bias's gradient
    whole.

    Shapes: input ``(..., local_in_features)``, or ``(..., in_features)`` with
    ``input_is_parallel=False``; output ``(..., out_features)``, bitwise equal on every rank. With
    ``skip_bias_add`` returns ``(y, bias)``, the bias not added. With ``reduce_results=False`` ``y``
    is this rank's summand.
    Cost per rank: ``2 M N K / P`` FLOP and one all-reduce of ``M N`` elements.
    Raises: ValueError if ``partition`` does not add up to ``in_features``, or a bias would be added
    to summands.
    Source: Shoeybi et al., Megatron-LM, arXiv:1909.08053, section 3; Korthikanti et al.,
    arXiv:2205.05198 (sequence parallelism).
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
        partition: Partition | ShardLayout | None = None,
        sequence_dim: int = -2,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(group, in_features, partition)
        if sequence_parallel and not (input_is_parallel and reduce_results and not skip_bias_add):
            raise ValueError(
                "RowParallelLinear with sequence_parallel=True scatters the sum, bias included: it "
                "needs input_is_parallel=True, reduce_results=True and skip_bias_add=False"
            )
        if self.layout.is_replicated or not (input_is_parallel or self.layout.is_consecutive):
            raise ValueError(
                "RowParallelLinear sums over the ranks: no two may hold the same input features, "
                "and input_is_parallel=False takes a Partition"
            )
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
        self.sequence_parallel, self.sequence_dim = sequence_parallel, sequence_dim
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

    def forward(
        self, x: Tensor, sequence_partition: Partition | None = None
    ) -> Tensor | tuple[Tensor, Tensor | None]:
        """Multiply this rank's slice and sum over the ranks."""
        bias = None if self.skip_bias_add else self.bias
        if self.group.size == 1:
            y = self._product(x, bias)
            return (y, self.bias) if self.skip_bias_add else y
        if not self.input_is_parallel:
            x = self._local_input(x)
        if self.sequence_parallel:
            return self._scattered(x, sequence_partition)
        y = self._reduced(x, bias) if self.reduce_results else self._product(x, None)
        return (y, self.bias) if self.skip_bias_add else y

    def _product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """This rank's summand; a ``bias`` is in it."""
        return F.linear(x, self.weight, bias)

    def _reduced(self, x: Tensor, bias: Tensor | None) -> Tensor:
        cut = (self.group.order, self.partition.sizes, self.group.name)
        return _ops.row_parallel_linear(x, self.weight, bias, *cut)

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
        self._check_whole_sum()
        if self.group.size == 1:
            return add_rms_norm(self._product(x, self.bias), residual, norm_weight, eps)
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

    def _check_whole_sum(self) -> None:
        if not self.reduce_results or self.skip_bias_add:
            raise ValueError(
                "forward_add_rms_norm needs the whole sum: make the layer with "
                "reduce_results=True and skip_bias_add=False"
            )

    def _scattered(self, x: Tensor, tokens: Partition | None) -> Tensor:
        """This rank's tokens of the sum; backward gathers, so the bias's gradient is whole."""
        dim = self.sequence_dim
        if tokens is None:
            tokens = Partition.even(x.size(dim), self.group.size)
        cut = (self.partition.sizes, tokens.sizes, dim, self.group.rank, self.group.name)
        return _ops.row_parallel_linear_scatter(x, self.weight, self.bias, self.group.order, *cut)

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


def add_rms_norm(
    y: Tensor, residual: Tensor, norm_weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """``(normed, hidden)`` of ``hidden = residual + y``, step by step."""
    hidden = residual + y
    wide = hidden.double() if hidden.dtype == torch.float64 else hidden.float()
    scale = wide.square().mean(-1, keepdim=True).add(eps).rsqrt()
    return (wide * scale).to(hidden.dtype) * norm_weight, hidden
