"""Multi-head attention cut by heads: grouped queries, rotary positions, caches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..group import GroupLike, current_group
from ..partition import Partition, ShardLayout, cut_heads
from .composite import CompositeModule
from .dropout import masks_of_its_own
from .linear import ColumnParallelLinear, RowParallelLinear
from .norm import ParallelRMSNorm


class KVCache:
    """Keys and values of the tokens so far, of this rank's heads; for inference.

    Room doubles as it fills; ``max_tokens`` reserves it at once.
    """

    def __init__(self, max_tokens: int = 0) -> None:
        self.length = 0
        self._room = max_tokens
        self._held: tuple[Tensor, Tensor] | None = None

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Add ``(B, local_kv_heads, T, D)`` and return all: ``(B, local_kv_heads, length, D)``.

        Raises: ValueError where gradients are wanted, which writing in place would lose.
        """
        if k.requires_grad or v.requires_grad:
            raise ValueError("KVCache is for inference: run the model under torch.no_grad()")
        end = self.length + k.size(2)
        if self._held is None or self._held[0].size(2) < end:
            room = max(end, self._room, 2 * self.length)
            grown = [t.new_empty((*t.shape[:2], room, t.size(3))) for t in (k, v)]
            for new, old in zip(grown, self._held or (), strict=False):
                new[:, :, : self.length] = old[:, :, : self.length]
            self._held = (grown[0], grown[1])
        for held, t in zip(self._held, (k, v), strict=True):
            held[:, :, self.length : end] = t
        self.length = end
        return self._held[0][:, :, :end], self._held[1][:, :, :end]


class ParallelAttention(CompositeModule):
    """Attention of which each rank has some heads: q, k and v in one column-parallel matrix,
    ``scaled_dot_product_attention`` on the rank's heads, a row-parallel output.

    ``num_kv_heads`` (default ``num_heads``): grouped or multi-query attention. A key/value head and
    its queries stay on one rank; heads that don't divide are cut unevenly; with fewer key/value
    heads than ranks each is held by several, among which its queries are divided, and its gradient
    is summed over them. ``rope_theta``: base of rotary positions (None: no positions here).
    ``qk_norm``: RMS norm of each query and key head. ``ratios``: the ranks' shares of the heads.

    Shapes: input and output ``(B, T, hidden_size)``, replicated; with ``sequence_parallel`` this
    rank's tokens. ``qkv_proj.weight`` of the dense twin is
    ``((num_heads + 2 * num_kv_heads) * head_dim, hidden_size)``: queries, keys, values.
    One all-reduce forward, one backward; with ``sequence_parallel`` an all-gather and a
    reduce-scatter each way; ``qk_norm`` and replicated heads one more backward each, which
    `deferred_gradients` saves.
    Raises: ValueError for sizes that don't fit, naming the nearest that do.
    Source: Shoeybi et al., Megatron-LM, arXiv:1909.08053; Ainslie et al., GQA, arXiv:2305.13245; Su
    et al., RoFormer, arXiv:2104.09864.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        bias: bool = False,
        causal: bool = True,
        rope_theta: float | None = None,
        qk_norm: bool = False,
        group: GroupLike | None = None,
        out_bias: bool | None = None,
        norm_eps: float = 1e-6,
        dropout: float = 0.0,
        sequence_parallel: bool = False,
        ratios: Sequence[float] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.options: dict[str, Any] = {
            "hidden_size": hidden_size,
            "num_heads": num_heads,
            "num_kv_heads": num_kv_heads,
            "head_dim": head_dim,
            "bias": bias,
            "causal": causal,
            "rope_theta": rope_theta,
            "qk_norm": qk_norm,
            "out_bias": out_bias,
            "norm_eps": norm_eps,
            "dropout": dropout,
        }
        if num_heads < 1 or (head_dim is None and hidden_size % num_heads):
            legal = sorted(
                (n for n in range(1, hidden_size + 1) if hidden_size % n == 0),
                key=lambda n: abs(n - num_heads),
            )[:3]
            raise ValueError(
                f"ParallelAttention: hidden_size {hidden_size} over {num_heads} heads is no whole "
                f"head; the nearest numbers of heads are {sorted(legal)}, or pass head_dim"
            )
        self.group = current_group(group)
        self.num_heads, self.num_kv_heads = num_heads, num_kv_heads or num_heads
        self.head_dim = head_dim or hidden_size // num_heads
        if rope_theta is not None and self.head_dim % 2:
            raise ValueError(
                f"ParallelAttention: rotary positions turn pairs, but head_dim is {self.head_dim}; "
                "make it even or leave rope_theta=None"
            )
        self.causal, self.rope_theta, self.dropout = causal, rope_theta, dropout
        self.sequence_parallel = sequence_parallel
        queries, kv = cut_heads(self.num_heads, self.num_kv_heads, self.group.size, ratios)
        self.heads = queries
        self.local_num_heads = queries[self.group.rank]
        self.local_num_kv_heads = kv.local_sizes[self.group.rank]
        parts = [part.scaled(self.head_dim) for part in (ShardLayout.of(queries), kv, kv)]
        place: dict[str, Any] = {
            "group": self.group,
            "sequence_parallel": sequence_parallel,
            "device": device,
            "dtype": dtype,
        }
        self.qkv_proj = ColumnParallelLinear(
            hidden_size,
            (self.num_heads + 2 * self.num_kv_heads) * self.head_dim,
            bias,
            partition=ShardLayout.stacked(parts),
            **place,
        )
        self.o_proj = RowParallelLinear(
            self.num_heads * self.head_dim,
            hidden_size,
            bias if out_bias is None else out_bias,
            partition=queries.scaled(self.head_dim),
            **place,
        )
        self.q_norm: ParallelRMSNorm | None = None
        self.k_norm: ParallelRMSNorm | None = None
        if qk_norm:
            place = {"is_partial": True, "group": self.group, "device": device, "dtype": dtype}
            self.q_norm = ParallelRMSNorm(self.head_dim, norm_eps, **place)
            self.k_norm = ParallelRMSNorm(self.head_dim, norm_eps, **place)

    def forward(
        self,
        x: Tensor,
        attention_mask: Tensor | None = None,
        *,
        position_ids: Tensor | None = None,
        cache: KVCache | None = None,
        sequence_partition: Partition | None = None,
    ) -> Tensor:
        """Attend.

        ``attention_mask``: ``(B, S)``, nonzero where a key counts; or ``(B or 1, num_heads or 1, T,
        S)``, bool (True: attend) or added to the scores. ``position_ids``: ``(T)`` or ``(B, T)``,
        default from the cache's length on. ``cache``: keys and values so far; S counts them too.
        """
        y: Tensor = self.o_proj(
            self.context(
                x,
                attention_mask,
                position_ids=position_ids,
                cache=cache,
                sequence_partition=sequence_partition,
            ),
            sequence_partition,
        )
        return y

    def context(
        self,
        x: Tensor,
        attention_mask: Tensor | None = None,
        *,
        position_ids: Tensor | None = None,
        cache: KVCache | None = None,
        sequence_partition: Partition | None = None,
    ) -> Tensor:
        """What goes into ``o_proj``: ``(B, T, local_num_heads * head_dim)``."""
        if x.dim() != 3:
            raise ValueError(
                f"ParallelAttention: input of shape {list(x.shape)}, expected (batch, tokens, "
                f"{self.qkv_proj.in_features})"
            )
        heads, kv_heads, width = self.local_num_heads, self.local_num_kv_heads, self.head_dim
        qkv = self.qkv_proj(x, sequence_partition)
        batch, tokens = qkv.shape[:2]
        counts = (heads, kv_heads, kv_heads)
        q, k, v = (
            part.view(batch, tokens, count, width).transpose(1, 2)
            for part, count in zip(
                torch.split(qkv, [count * width for count in counts], dim=-1), counts, strict=True
            )
        )
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        past = cache.length if cache is not None else 0
        if self.rope_theta is not None:
            if position_ids is None:
                position_ids = torch.arange(past, past + tokens, device=x.device)
            q, k = rotated(q, k, position_ids, self.rope_theta)
        if cache is not None:
            k, v = cache.append(k, v)
        mask = self._mask(attention_mask, tokens, past, q)
        dropout = self.dropout if self.training else 0.0
        is_causal = self.causal and mask is None and tokens > 1
        with masks_of_its_own(self.group, dropout, x.device, "attention dropout"):
            if heads == 0:
                y = q + k + v  # nothing, but every collective of the backward hangs on it
            else:
                y = F.scaled_dot_product_attention(
                    q, k, v, mask, dropout, is_causal, enable_gqa=heads != kv_heads
                )
        return y.transpose(1, 2).reshape(batch, tokens, heads * width)

    def _mask(self, given: Tensor | None, tokens: int, past: int, q: Tensor) -> Tensor | None:
        """The whole mask for this rank's heads; None where ``is_causal`` or nothing says it all."""
        keys = past + tokens
        causal = None
        if self.causal and tokens > 1 and (past > 0 or given is not None):
            row = torch.arange(past, keys, device=q.device)[:, None]
            causal = torch.arange(keys, device=q.device)[None] <= row
        if given is None:
            return causal
        if given.dim() == 2:
            given = given.bool()[:, None, None, :]
        elif given.dim() == 4 and given.size(1) == self.num_heads > 1:
            given = given[:, self.heads.slice(self.group.rank)]
        if given.dim() != 4 or given.size(-1) != keys:
            raise ValueError(
                f"ParallelAttention: attention_mask of shape {list(given.shape)} for {keys} keys; "
                "expected (batch, keys) or (batch or 1, num_heads or 1, tokens, keys)"
            )
        if given.dtype == torch.bool:
            return given if causal is None else given & causal
        given = given.to(q.dtype)
        return given if causal is None else given.masked_fill(~causal, float("-inf"))

    def extra_repr(self) -> str:
        """Whole and local heads."""
        return (
            f"heads={self.num_heads} (local {self.local_num_heads}), kv_heads={self.num_kv_heads} "
            f"(local {self.local_num_kv_heads}), head_dim={self.head_dim}, "
            f"rank={self.group.rank}/{self.group.size}"
        )


def rotated(q: Tensor, k: Tensor, positions: Tensor, theta: float) -> tuple[Tensor, Tensor]:
    """Rotary positions on ``(B, heads, T, D)``, halves paired as in Llama; ``positions`` ``(T)`` or
    ``(B, T)``. Angles in float32, float64 for float64.

    Source: Su et al., RoFormer, arXiv:2104.09864, equation 34.
    """
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    half = torch.arange(0, q.size(-1), 2, device=q.device, dtype=wide)
    angle = positions.to(wide)[..., None] * theta ** (-half / q.size(-1))
    if angle.dim() == 3:
        angle = angle[:, None]
    cos, sin = angle.cos().to(q.dtype), angle.sin().to(q.dtype)

    def turn(t: Tensor) -> Tensor:
        a, b = t.chunk(2, -1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

    return turn(q), turn(k)
