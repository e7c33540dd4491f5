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
from ..collectives import copy_to_ranks
from ..group import GroupLike
from ..partition import Partition, ShardLayout, joined
from .gradients import summed_over_replicas
from .sharded import ShardedModule, check_gather_grad, take

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
    _out_dim, _in_dim = 0, 1  # of the weight

    @classmethod
    def _widths(cls, dense: nn.Module) -> tuple[int, int]:
        """``in_features`` and ``out_features`` of a dense layer."""
        if not isinstance(dense, nn.Linear):
            raise TypeError(
                f"{cls.__name__}.from_linear got a {type(dense).__name__}, expected an nn.Linear"
            )
        return dense.in_features, dense.out_features

    def _matrix(self, weight: Tensor) -> Tensor:
        """The weight as ``(out_features, in_features)``, which is how the ops take it."""
        return weight if self._out_dim == 0 else weight.t()

    def _make_parameters(
        self,
        shape: tuple[int, int],
        bias_size: int | None,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        shape = shape if self._out_dim == 0 else shape[::-1]
        self.weight = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        if bias_size is None:
            self.register_parameter("bias", None)
        else:
            self.bias = nn.Parameter(torch.empty(bias_size, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw as the dense layer is drawn and keep this rank's part.

        With equally seeded ranks the whole is the dense layer's, whatever the number of ranks.
        """
        if self.weight.is_meta:
            return
        generator = self.group.init_generator(self.weight.device)
        with torch.no_grad():
            self.weight.copy_(self._local("weight", self._drawn_weight(generator)))
            if self.bias is not None:
                self.bias.copy_(self._local("bias", self._drawn_bias(self.bias, generator)))

    def _drawn_weight(self, generator: torch.Generator | None) -> Tensor:
        """The dense weight."""
        full = self.weight.new_empty(self.out_features, self.in_features)
        return nn.init.kaiming_uniform_(full, a=math.sqrt(5), generator=generator)

    def _drawn_bias(self, local: Tensor, generator: torch.Generator | None) -> Tensor:
        """The dense bias, of the kind of ``local``."""
        bound = 1 / math.sqrt(self.in_features) if self.in_features > 0 else 0
        return local.new_empty(self.out_features).uniform_(-bound, bound, generator=generator)

    in_features: int
    out_features: int


class ColumnParallelLinear(_ParallelLinear):
    """``y = act(x @ W.T + b)`` with ``out_features`` (the rows of ``W``) split over a group.

    No collective forward; backward one all-reduce of ``dx``. With ``sequence_parallel`` the input
    is this rank's part of dimension ``sequence_dim``: forward one all-gather, backward one
    reduce-scatter.

    Shapes: input ``(..., in_features)``, the same on all ranks; output ``(...,
    local_out_features)``, or ``(..., out_features)`` with ``gather_output``. ``gather_grad``: what
    each rank has of that output's gradient, "replicated" all of it, "partial" a summand (backward:
    one reduce-scatter more). With ``skip_bias_add`` returns ``(y, bias)``, the bias not added.
    ``partition`` may be a `ShardLayout`: rows in several ranges (stacked layers), or held by
    several ranks, whose gradients are summed.
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
        gather_grad: str = "replicated",
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
        check_gather_grad(gather_grad)
        self.in_features, self.out_features = in_features, out_features
        self.local_out_features = self.partition[self.group.rank]
        self.gather_output, self.gather_grad = gather_output, gather_grad
        self.skip_bias_add = skip_bias_add
        self.sequence_parallel, self.sequence_dim = sequence_parallel, sequence_dim
        self.activation = activation
        self.shard_dims = {"weight": self._out_dim, **({"bias": 0} if bias else {})}
        self._make_parameters(
            (self.local_out_features, in_features),
            self.local_out_features if bias else None,
            device,
            dtype,
        )

    @classmethod
    def from_linear(
        cls,
        linear: nn.Module,
        *,
        group: GroupLike | None = None,
        gather_output: bool = False,
        gather_grad: str = "replicated",
        activation: str | None = None,
        partition: Partition | ShardLayout | None = None,
    ) -> Self:
        """This rank's part of a dense layer."""
        layer = cls(
            *cls._widths(linear),
            linear.bias is not None,
            group=group,
            gather_output=gather_output,
            gather_grad=gather_grad,
            activation=activation,
            partition=partition,
            device="meta",
            dtype=linear.get_parameter("weight").dtype,
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
            weight = self._matrix(self.weight)
            y = self._activated(self._product(x, weight, None if self.skip_bias_add else self.bias))
            if self.gather_output:
                y = self._gathered(y, self.gather_grad)
            return (y, self.bias) if self.skip_bias_add else y
        weight, own_bias = self.weight, self.bias
        if self.layout.is_replicated:
            weight, own_bias = (self._summed(name) for name in ("weight", "bias"))  # type: ignore[assignment]
        weight, bias = self._matrix(weight), None if self.skip_bias_add else own_bias
        if self.sequence_parallel:
            y = self._of_tokens(x, weight, bias, sequence_partition)
        else:
            y = self._of_replicated(x, weight, bias)
        if self.gather_output:
            y = self._gathered(y, self.gather_grad)
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
    ``input_is_parallel=False``, of which it takes its part; output ``(..., out_features)``, bitwise
    equal on every rank. With ``skip_bias_add`` returns ``(y, bias)``, the bias not added. With
    ``reduce_results=False`` ``y`` is this rank's summand. ``partition`` may be a `ShardLayout`:
    columns in several ranges, each held by one rank.
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
        if self.layout.is_replicated:
            raise ValueError(
                "RowParallelLinear sums over the ranks: no two may hold the same input features"
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
        self._input_ranges = joined(self.layout.ranges[self.group.rank])
        self.shard_dims = {"weight": self._in_dim}
        self._make_parameters(
            (out_features, self.local_in_features), out_features if bias else None, device, dtype
        )

    @classmethod
    def from_linear(
        cls,
        linear: nn.Module,
        *,
        group: GroupLike | None = None,
        input_is_parallel: bool = True,
        partition: Partition | ShardLayout | None = None,
    ) -> Self:
        """This rank's part of a dense layer."""
        layer = cls(
            *cls._widths(linear),
            linear.bias is not None,
            group=group,
            input_is_parallel=input_is_parallel,
            partition=partition,
            device="meta",
            dtype=linear.get_parameter("weight").dtype,
        )
        return layer.filled_from(linear)

    def forward(
        self, x: Tensor, sequence_partition: Partition | None = None
    ) -> Tensor | tuple[Tensor, Tensor | None]:
        """Multiply this rank's slice and sum over the ranks."""
        bias = None if self.skip_bias_add else self.bias
        if not self.input_is_parallel:
            x = self._local_input(x)
        if self.group.size == 1:
            y = self._product(x, bias)
            return (y, self.bias) if self.skip_bias_add else y
        if self.sequence_parallel:
            return self._scattered(x, sequence_partition)
        y = self._reduced(x, bias) if self.reduce_results else self._product(x, None)
        return (y, self.bias) if self.skip_bias_add else y

    def _product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """This rank's summand; a ``bias`` is in it."""
        return F.linear(x, self._matrix(self.weight), bias)

    def _reduced(self, x: Tensor, bias: Tensor | None) -> Tensor:
        cut = (self.group.order, self.partition.sizes, self.group.name)
        return _ops.row_parallel_linear(x, self._matrix(self.weight), bias, *cut)

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
        if not self.input_is_parallel:
            x = self._local_input(x)
        if self.group.size == 1:
            return add_rms_norm(self._product(x, self.bias), residual, norm_weight, eps)
        return _ops.row_parallel_linear_add_rms_norm(
            x,
            self._matrix(self.weight),
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
        weight = self._matrix(self.weight)
        return _ops.row_parallel_linear_scatter(x, weight, self.bias, self.group.order, *cut)

    def _local_input(self, x: Tensor) -> Tensor:
        if x.shape[-1] != self.in_features:
            raise ValueError(
                "RowParallelLinear with input_is_parallel=False: the input's last dimension "
                f"is {x.shape[-1]}, expected the whole in_features, {self.in_features}"
            )
        # backward: the ranks' parts of dx, zero elsewhere, are summed
        whole = copy_to_ranks(x, self.group) if self.group.size > 1 else x
        return take(whole, -1, self._input_ranges)

    def extra_repr(self) -> str:
        """Whole and local sizes."""
        return (
            f"in_features={self.in_features} (local {self.local_in_features}), "
            f"out_features={self.out_features}, "
            f"bias={self.bias is not None}, rank={self.group.rank}/{self.group.size}"
        )


def matrix_of(layer: nn.Module) -> Tensor:
    """A linear layer's weight as ``(out_features, in_features)``."""
    weight = layer.get_parameter("weight")
    return layer._matrix(weight) if isinstance(layer, _ParallelLinear) else weight


def add_rms_norm(
    y: Tensor, residual: Tensor, norm_weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """``(normed, hidden)`` of ``hidden = residual + y``, step by step."""
    hidden = residual + y
    wide = hidden.double() if hidden.dtype == torch.float64 else hidden.float()
    scale = wide.square().mean(-1, keepdim=True).add(eps).rsqrt()
    return (wide * scale).to(hidden.dtype) * norm_weight, hidden
