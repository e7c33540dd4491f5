"""``nn.MultiheadAttention`` cut by heads, and how torch's own transformer layers are kept from
passing it by.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import Self

from .. import _ops
from ..collectives import all_gather_tensor, all_reduce_sum, copy_to_ranks
from ..group import GroupLike, current_group
from ..partition import Partition, ShardLayout
from .dropout import masks_of_its_own
from .linear import RowParallelLinear
from .sharded import ShardedModule

_PACKED = ("in_proj_weight", "in_proj_bias")  # query, key and value rows, one below the other


class ParallelMultiheadAttention(ShardedModule):
    """``nn.MultiheadAttention`` of which each rank has some heads: a drop-in with its parameters'
    names and whole shapes, its arguments and its results.

    ``partition`` cuts the heads: unevenly if they don't divide, leaving ranks without any if there
    are too few. Attention weights are of all heads, equal on all ranks.

    Shapes: ``(L, N, embed_dim)``, with ``batch_first`` ``(N, L, embed_dim)``, unbatched ``(L,
    embed_dim)``, replicated. ``attn_mask`` for each head is of all heads, as the dense layer's.
    One all-reduce forward, one collective more with ``need_weights``; backward one all-reduce for
    each distinct tensor among query, key and value.
    Raises: ValueError for sizes, partitions and inputs that don't fit, nested tensors, and dropout
    on thread ranks.
    Source: Vaswani et al., arXiv:1706.03762; Shoeybi et al., Megatron-LM, arXiv:1909.08053.
    """

    in_proj_weight: nn.Parameter | None
    in_proj_bias: nn.Parameter | None
    q_proj_weight: nn.Parameter | None
    k_proj_weight: nn.Parameter | None
    v_proj_weight: nn.Parameter | None
    bias_k: nn.Parameter | None
    bias_v: nn.Parameter | None

    # torch's transformer layers ask whether in_proj_weight is one whole matrix that a fused kernel
    # may take past this forward
    _qkv_same_embed_dim = False

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        group: GroupLike | None = None,
        partition: Partition | None = None,
    ) -> None:
        if embed_dim < 1 or num_heads < 1 or embed_dim % num_heads:
            raise ValueError(
                f"ParallelMultiheadAttention: embed_dim {embed_dim} over {num_heads} heads is no "
                "whole head; choose a number of heads that divides it"
            )
        here = current_group(group)
        heads = partition or Partition.even(num_heads, here.size)
        heads.check(num_heads, here.size)
        head_dim = embed_dim // num_heads
        super().__init__(here, embed_dim, heads.scaled(head_dim))
        self._packed_layout = ShardLayout.stacked([self.layout] * 3)
        self.embed_dim, self.num_heads, self.head_dim = embed_dim, num_heads, head_dim
        self.heads, self.local_num_heads = heads, heads[here.rank]
        self.kdim = embed_dim if kdim is None else kdim
        self.vdim = embed_dim if vdim is None else vdim
        self.dropout, self.batch_first, self.add_zero_attn = dropout, batch_first, add_zero_attn
        width = self.partition[here.rank]
        is_packed = self.kdim == self.vdim == embed_dim
        shapes = {
            "q_proj_weight": None if is_packed else (width, embed_dim),
            "k_proj_weight": None if is_packed else (width, self.kdim),
            "v_proj_weight": None if is_packed else (width, self.vdim),
            "in_proj_weight": (3 * width, embed_dim) if is_packed else None,
            "in_proj_bias": (3 * width,) if bias else None,
            "bias_k": (1, 1, width) if add_bias_kv else None,
            "bias_v": (1, 1, width) if add_bias_kv else None,
        }
        for name, shape in shapes.items():
            if shape is None:
                self.register_parameter(name, None)
                continue
            self.shard_dims[name] = 2 if name in ("bias_k", "bias_v") else 0
            made = torch.empty(shape, device=device, dtype=dtype)
            self.register_parameter(name, nn.Parameter(made))
        self.out_proj = RowParallelLinear(
            embed_dim,
            embed_dim,
            bias,
            group=here,
            partition=self.partition,
            device=device,
            dtype=dtype,
        )
        self.reset_parameters()

    def _layout_of(self, name: str) -> ShardLayout:
        return self._packed_layout if name in _PACKED else self.layout

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw as the dense layer is drawn, after its ``out_proj``, and keep this rank's part."""
        for name, parameter in self.named_parameters(recurse=False):
            mark = self.mark(name)
            if mark is None or parameter.is_meta:
                continue
            full = parameter.new_zeros(mark.full_shape(parameter))
            generator = self.group.init_generator(parameter.device)
            if name in ("bias_k", "bias_v"):
                nn.init.xavier_normal_(full, generator=generator)
            elif name != "in_proj_bias":
                nn.init.xavier_uniform_(full, generator=generator)
            parameter.copy_(mark.local(full))
        if self.out_proj.bias is not None:
            self.out_proj.bias.zero_()

    @classmethod
    def from_dense(
        cls,
        dense: nn.Module,
        *,
        group: GroupLike | None = None,
        partition: Partition | None = None,
    ) -> Self:
        """This rank's heads of an ``nn.MultiheadAttention``.

        Raises: TypeError for another class, or a subclass with a forward of its own.
        """
        if (
            not isinstance(dense, nn.MultiheadAttention)
            or type(dense).forward is not nn.MultiheadAttention.forward
        ):
            raise TypeError(
                f"{cls.__name__}.from_dense got a {type(dense).__name__}, expected an "
                "nn.MultiheadAttention with its own forward"
            )
        layer = cls(
            dense.embed_dim,
            dense.num_heads,
            dense.dropout,
            dense.in_proj_bias is not None,
            dense.bias_k is not None,
            dense.add_zero_attn,
            dense.kdim,
            dense.vdim,
            dense.batch_first,
            "meta",
            dense.out_proj.weight.dtype,
            group=group,
            partition=partition,
        ).filled_from(dense)
        layer.out_proj.filled_from(dense.out_proj)
        return layer

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend, as ``nn.MultiheadAttention`` does with these arguments."""
        self._check(query, key, value)
        if is_causal and attn_mask is None:
            raise ValueError(
                "ParallelMultiheadAttention: is_causal=True says that attn_mask is causal, but it "
                "is None; pass it, for example nn.Transformer.generate_square_subsequent_mask(L)"
            )
        is_causal = is_causal and key_padding_mask is None and not need_weights
        mask = self._mask(None if is_causal else attn_mask, key_padding_mask, query, key)
        q, k, v = map(self._by_heads, self._projected(query, key, value))
        k, v = self._extended(k, self.bias_k), self._extended(v, self.bias_v)
        dropout = self.dropout if self.training else 0.0
        weights = None
        with masks_of_its_own(self.group, dropout, query.device, "attention dropout"):
            if need_weights or self.local_num_heads == 0:
                y, weights = _attended(q, k, v, mask, dropout)
            else:
                y = F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal)
        y = y.transpose(1, 2).flatten(2)
        if query.dim() == 2:
            y = y.squeeze(0)
        elif not self.batch_first:
            y = y.transpose(0, 1)
        out: Tensor = self.out_proj(y)
        if not need_weights or weights is None:
            return out, None
        weights = self._of_all_heads(weights, average_attn_weights)
        return out, weights.squeeze(0) if query.dim() == 2 else weights

    def _check(self, query: Tensor, key: Tensor, value: Tensor) -> None:
        inputs = {"query": query, "key": key, "value": value}
        if any(t.is_nested for t in inputs.values()):
            raise ValueError(
                "ParallelMultiheadAttention takes padded tensors, got a nested one; where an "
                "nn.TransformerEncoder made it, call tp_native.nn.without_fused_layers(model)"
            )
        widths = (self.embed_dim, self.kdim, self.vdim)
        batch = 0 if self.batch_first else 1
        fits = (
            query.dim() in (2, 3)
            and query.dim() == key.dim()
            and key.shape[:-1] == value.shape[:-1]
            and all(t.size(-1) == w for t, w in zip(inputs.values(), widths, strict=True))
            and (query.dim() == 2 or query.size(batch) == key.size(batch))
        )
        if not fits:
            shapes = ", ".join(f"{name} {list(t.shape)}" for name, t in inputs.items())
            order = "N, L" if self.batch_first else "L, N"
            raise ValueError(
                f"ParallelMultiheadAttention got {shapes}; expected ({order}, width) or (L, width) "
                f"with widths {list(widths)}, and batches and keys alike"
            )

    def _mask(
        self, attn_mask: Tensor | None, key_padding_mask: Tensor | None, query: Tensor, key: Tensor
    ) -> Tensor | None:
        """What is added to this rank's scores, ``(N or 1, local_num_heads or 1, L or 1, S)``."""
        is_batched = query.dim() == 3
        axis = 1 if is_batched and self.batch_first else 0
        batch, shape = query.size(1 - axis) if is_batched else 1, (query.size(axis), key.size(axis))
        found = []
        if attn_mask is not None:
            legal = [shape, (batch * self.num_heads, *shape)]
            attn_mask = _added("attn_mask", attn_mask, legal, query.dtype)
            if attn_mask.dim() == 2:
                found.append(attn_mask[None, None])
            else:
                by_heads = attn_mask.view(batch, self.num_heads, *shape)
                found.append(by_heads[:, self.heads.slice(self.group.rank)])
        if key_padding_mask is not None:
            legal = [(batch, shape[1])] if is_batched else [shape[1:]]
            padding = _added("key_padding_mask", key_padding_mask, legal, query.dtype)
            found.append(padding.view(batch, 1, 1, shape[1]))
        if not found:
            return None
        mask = found[0] if len(found) == 1 else found[0] + found[1]
        more = (self.bias_k is not None) + self.add_zero_attn
        return F.pad(mask, (0, more)) if more else mask

    def _projected(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        """This rank's q, k and v. Those of one tensor are one product where their rows lie
        together; a tensor's gradient is summed over the ranks once.
        """
        width, packed, bias = (
            self.partition[self.group.rank],
            self.in_proj_weight,
            self.in_proj_bias,
        )
        if packed is not None and query is key and key is value:
            return self._product(query, packed, bias, 3)
        biases = (None,) * 3 if bias is None else bias.view(3, width).unbind()
        if packed is not None and key is value:
            rows = packed.narrow(0, width, 2 * width)
            both = None if bias is None else bias.narrow(0, width, 2 * width)
            q = self._product(query, packed.narrow(0, 0, width), biases[0], 1)
            return q + self._product(key, rows, both, 2)
        begun = self._begun(query)
        starts = [begun]
        starts.append(begun if key is query else self._begun(key))
        starts.append(
            begun if value is query else starts[1] if value is key else self._begun(value)
        )
        weights: tuple[Any, ...] = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        if packed is not None:
            weights = packed.view(3, width, self.embed_dim).unbind()
        return tuple(map(F.linear, starts, weights, biases))

    def _product(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, parts: int
    ) -> tuple[Tensor, ...]:
        """``parts`` projections of an input that all ranks have; backward sums ``dx``."""
        if self.group.size == 1:
            y = F.linear(x, weight, bias)
        else:
            sizes = tuple(parts * size for size in self.partition)
            y = _ops.column_parallel_linear(
                x, weight, bias, self.group.order, sizes, self.group.name
            )
        width = self.partition[self.group.rank]
        return y.view(*y.shape[:-1], parts, width).unbind(-2)

    def _begun(self, x: Tensor) -> Tensor:
        return x if self.group.size == 1 else copy_to_ranks(x, self.group)

    def _by_heads(self, t: Tensor) -> Tensor:
        """``(N, local_num_heads, T, head_dim)``."""
        if t.dim() == 2:
            t = t[None]
        elif not self.batch_first:
            t = t.transpose(0, 1)
        return t.reshape(*t.shape[:2], self.local_num_heads, self.head_dim).transpose(1, 2)

    def _extended(self, t: Tensor, bias: Tensor | None) -> Tensor:
        """Keys or values and those that every sequence has besides."""
        if bias is not None:
            more = bias.view(1, self.local_num_heads, 1, self.head_dim)
            t = torch.cat([t, more.expand(t.size(0), -1, -1, -1)], 2)
        return F.pad(t, (0, 0, 0, 1)) if self.add_zero_attn else t

    def _of_all_heads(self, weights: Tensor, average: bool) -> Tensor:
        if self.group.size == 1:
            return weights.mean(1) if average else weights
        if average:
            return all_reduce_sum(weights.sum(1) / self.num_heads, self.group)
        return all_gather_tensor(weights, 1, self.group, partition=self.heads)

    def extra_repr(self) -> str:
        """Whole and local heads."""
        return (
            f"{self.embed_dim}, heads={self.num_heads} (local {self.local_num_heads}), "
            f"batch_first={self.batch_first}, rank={self.group.rank}/{self.group.size}"
        )


def _added(name: str, mask: Tensor, legal: Sequence[tuple[int, ...]], dtype: torch.dtype) -> Tensor:
    """A mask as what is added to scores: True is minus infinity."""
    if mask.shape not in legal:
        raise ValueError(
            f"ParallelMultiheadAttention: {name} of shape {list(mask.shape)}, expected "
            f"{' or '.join(str(list(shape)) for shape in legal)}"
        )
    if mask.is_floating_point():
        return mask
    if mask.dtype != torch.bool:
        raise TypeError(
            f"ParallelMultiheadAttention: {name} is {mask.dtype}, expected bool (True: left out) "
            "or floating (added)"
        )
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, float("-inf"))


def _attended(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float
) -> tuple[Tensor, Tensor]:
    """What ``scaled_dot_product_attention`` gives, and its weights; for no head too."""
    scores = (q * q.size(-1) ** -0.5) @ k.transpose(-2, -1)
    weights = (scores if mask is None else scores + mask.to(scores.dtype)).softmax(-1)
    if dropout > 0:
        weights = F.dropout(weights, dropout)
    return weights @ v, weights


def without_fused_layers(model: nn.Module) -> None:
    """Turn off what would pass by the sharded parts of ``nn.TransformerEncoder`` layers in
    inference: a fused kernel that takes their weights, and the nested tensors made for it.

    The switches are torch's own, read in every forward: ``activation_relu_or_gelu`` 0, no kernel
    for this activation, and ``use_nested_tensor`` False. Attention that is sharded turns off the
    kernel of its layer alone, linear layers can't. Where padding was left out of nested tensors,
    the outputs at padded places are then computed as in training, instead of zero.
    """
    for module in model.modules():
        if not any(isinstance(part, ShardedModule) for part in module.modules()):
            continue
        if isinstance(module, nn.TransformerEncoderLayer):
            module.activation_relu_or_gelu = 0
        elif isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False
