"""A pre-norm transformer block: attention and MLP around the residual stream."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..group import GroupLike, current_group
from ..partition import Partition
from .attention import KVCache, ParallelAttention
from .composite import CompositeModule
from .dropout import ParallelDropout
from .mlp import ParallelMLP
from .norm import ParallelLayerNorm, ParallelRMSNorm

_NORMS: dict[str, type[ParallelRMSNorm | ParallelLayerNorm]] = {
    "rmsnorm": ParallelRMSNorm,
    "layernorm": ParallelLayerNorm,
}


class TensorParallelTransformerBlock(CompositeModule):
    """``h = x + attention(norm(x)); y = h + mlp(norm(h))``: two sync points forward, two backward.

    With ``sequence_parallel`` norms, dropout and the residual stream live on this rank's tokens
    (``scatter_to_ranks`` makes them, ``all_gather_tensor(dim=-2)`` puts them together), each sync
    point is an all-gather and a reduce-scatter, and the norms' gradients are summed over the ranks
    in backward, or once per step inside `deferred_gradients`.
    ``dropout`` is the residual stream's, ``attention_dropout`` that of the attention weights.

    Shapes: input and output ``(B, T, hidden_size)``, replicated, or this rank's tokens.
    Raises: ValueError for an unknown norm and what its parts raise.
    Source: Shoeybi et al., Megatron-LM, arXiv:1909.08053; Korthikanti et al., arXiv:2205.05198.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        intermediate_size: int,
        *,
        num_kv_heads: int | None = None,
        norm: str = "rmsnorm",
        head_dim: int | None = None,
        activation: str = "swiglu",
        bias: bool = False,
        causal: bool = True,
        rope_theta: float | None = None,
        qk_norm: bool = False,
        norm_eps: float = 1e-6,
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
        sequence_parallel: bool = False,
        ratios: Sequence[float] | None = None,
        group: GroupLike | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.options: dict[str, Any] = {
            "hidden_size": hidden_size,
            "num_heads": num_heads,
            "intermediate_size": intermediate_size,
            "num_kv_heads": num_kv_heads,
            "norm": norm,
            "head_dim": head_dim,
            "activation": activation,
            "bias": bias,
            "causal": causal,
            "rope_theta": rope_theta,
            "qk_norm": qk_norm,
            "norm_eps": norm_eps,
            "dropout": dropout,
            "attention_dropout": attention_dropout,
        }
        if norm not in _NORMS:
            raise ValueError(
                f"TensorParallelTransformerBlock: norm {norm!r}, expected one of {sorted(_NORMS)}"
            )
        self.group = current_group(group)
        self.sequence_parallel = sequence_parallel
        place: dict[str, Any] = {"group": self.group, "device": device, "dtype": dtype}
        self.input_norm = _NORMS[norm](hidden_size, norm_eps, is_partial=sequence_parallel, **place)
        self.attention = ParallelAttention(
            hidden_size,
            num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            bias=bias,
            causal=causal,
            rope_theta=rope_theta,
            qk_norm=qk_norm,
            norm_eps=norm_eps,
            dropout=attention_dropout,
            sequence_parallel=sequence_parallel,
            ratios=ratios,
            **place,
        )
        self.post_attention_norm = _NORMS[norm](
            hidden_size, norm_eps, is_partial=sequence_parallel, **place
        )
        cut = None if ratios is None else Partition.from_ratios(intermediate_size, ratios)
        self.mlp = ParallelMLP(
            hidden_size,
            intermediate_size,
            activation=activation,
            bias=bias,
            sequence_parallel=sequence_parallel,
            partition=cut,
            **place,
        )
        self.dropout = ParallelDropout(dropout, is_sharded=sequence_parallel, group=self.group)

    def forward(
        self,
        x: Tensor,
        attention_mask: Tensor | None = None,
        *,
        position_ids: Tensor | None = None,
        cache: KVCache | None = None,
        sequence_partition: Partition | None = None,
    ) -> Tensor:
        """One block; arguments as in `ParallelAttention.forward`."""
        attend: dict[str, Any] = {
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "cache": cache,
            "sequence_partition": sequence_partition,
        }
        norm = self.post_attention_norm
        if self._joins_norm():
            assert norm.eps is not None
            context = self.attention.context(self.input_norm(x), **attend)
            o_proj = self.attention.o_proj
            normed, h = o_proj.forward_add_rms_norm(context, x, norm.weight, norm.eps)
        else:
            h = x + self.dropout(self.attention(self.input_norm(x), **attend))
            normed = norm(h)
        y: Tensor = h + self.dropout(self.mlp(normed, sequence_partition=sequence_partition))
        return y

    def _joins_norm(self) -> bool:
        """Whether sum, residual and norm run in one pass: where no gradient, mask of dropout or
        hook of the parts is wanted.
        """
        norm = self.post_attention_norm
        parts: tuple[torch.nn.Module, ...] = (norm, self.attention, self.attention.o_proj)
        return (
            isinstance(norm, ParallelRMSNorm)
            and self.group.size > 1
            and not self.sequence_parallel
            and not torch.is_grad_enabled()
            and not (self.training and self.dropout.p > 0)
            and not any(part._forward_hooks or part._forward_pre_hooks for part in parts)
        )
