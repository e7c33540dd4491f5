"""Embeddings cut by vocabulary (rows) or by width (columns)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import Self

from .. import _ops
from ..collectives import scatter_to_ranks
from ..group import GroupLike
from ..partition import Partition, ShardLayout
from .gradients import summed_over_replicas
from .sharded import ShardedModule, ShardMark, check_gather_grad


class _ParallelEmbedding(ShardedModule):
    """The table and its initialisation, for both cuts."""

    num_embeddings: int
    embedding_dim: int
    padding_idx: int | None

    def _make_table(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        if padding_idx is not None and not -num_embeddings <= padding_idx < num_embeddings:
            raise ValueError(
                f"padding_idx {padding_idx}: expected an id of the {num_embeddings} embeddings"
            )
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.padding_idx = padding_idx % num_embeddings if padding_idx is not None else None
        shape = [num_embeddings, embedding_dim]
        shape[self.shard_dims["weight"]] = self.partition[self.group.rank]
        self.weight = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw as ``nn.Embedding`` draws the whole table and keep this rank's part."""
        if self.weight.is_meta:
            return
        with torch.no_grad():
            full = self.weight.new_empty(self.num_embeddings, self.embedding_dim)
            full.normal_(generator=self.group.init_generator(full.device))
            if self.padding_idx is not None:
                full[self.padding_idx] = 0
            self.weight.copy_(self._local("weight", full))


class VocabParallelEmbedding(_ParallelEmbedding):
    """``y = W[ids]`` with the rows of ``W`` split over a group.

    Every rank looks up the ids it holds and one all-reduce completes the rows; adding zeros is
    exact.

    Shapes: ids ``(...)`` int64 or int32, the same on all ranks; output ``(..., embedding_dim)``,
    replicated; with ``sequence_parallel`` this rank's part of its dimension ``sequence_dim``.
    Raises: IndexError on every rank for an id outside the vocabulary; ValueError if ``partition``
    does not add up.
    Source: Shoeybi et al., Megatron-LM, arXiv:1909.08053, section 3.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        *,
        group: GroupLike | None = None,
        partition: Partition | None = None,
        sequence_parallel: bool = False,
        sequence_dim: int = -2,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(group, num_embeddings, partition)
        if not self.layout.is_consecutive:
            raise ValueError("VocabParallelEmbedding takes consecutive rows: pass a Partition")
        self.sequence_parallel, self.sequence_dim = sequence_parallel, sequence_dim
        self.local_num_embeddings = self.partition[self.group.rank]
        self.shard_dims = {"weight": 0}
        self._make_table(num_embeddings, embedding_dim, padding_idx, device, dtype)

    @classmethod
    def from_embedding(
        cls,
        embedding: nn.Embedding,
        *,
        group: GroupLike | None = None,
        partition: Partition | None = None,
    ) -> Self:
        """This rank's rows of a dense table."""
        layer = cls(
            embedding.num_embeddings,
            embedding.embedding_dim,
            embedding.padding_idx,
            group=group,
            partition=partition,
            device="meta",
            dtype=embedding.weight.dtype,
        )
        return layer.filled_from(embedding)

    def forward(self, ids: Tensor, sequence_partition: Partition | None = None) -> Tensor:
        """Look up ``ids``; ``sequence_partition``: how tokens are cut, evenly if None."""
        if self.group.size == 1:
            return F.embedding(ids, self.weight, self.padding_idx)
        padding_idx = -1 if self.padding_idx is None else self.padding_idx
        rows = _ops.vocab_parallel_embedding(
            ids,
            self.weight,
            self.group.order,
            self.partition.sizes,
            padding_idx,
            self.group.rank,
            self.group.name,
        )
        if not self.sequence_parallel:
            return rows
        return scatter_to_ranks(rows, self.sequence_dim, self.group, partition=sequence_partition)

    def extra_repr(self) -> str:
        """Whole and local sizes."""
        return (
            f"{self.num_embeddings} (local {self.local_num_embeddings}), {self.embedding_dim}, "
            f"rank={self.group.rank}/{self.group.size}"
        )


class ColumnParallelEmbedding(_ParallelEmbedding):
    """``y = W[ids]`` with the columns of ``W`` (``embedding_dim``) split over a group.

    No collective: a rank looks up its columns of every id, and their gradient is its own. With
    ``gather_output`` one all-gather makes rows whole; ``gather_grad`` as in `ColumnParallelLinear`.
    Local columns suit what is cut alike, as a bias of each head suits that head's scores (T5's
    ``relative_attention_bias``).

    Shapes: ids ``(...)`` int64 or int32, the same on all ranks; output ``(...,
    local_embedding_dim)``, or ``(..., embedding_dim)`` with ``gather_output``. ``partition`` may be
    a `ShardLayout`; gradients of columns that several ranks hold are summed.
    Raises: ValueError if ``partition`` does not add up to ``embedding_dim``; IndexError for an id
    outside the table.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        *,
        group: GroupLike | None = None,
        gather_output: bool = False,
        gather_grad: str = "replicated",
        partition: Partition | ShardLayout | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(group, embedding_dim, partition)
        check_gather_grad(gather_grad)
        self.local_embedding_dim = self.partition[self.group.rank]
        self.gather_output, self.gather_grad = gather_output, gather_grad
        self.shard_dims = {"weight": 1}
        self._make_table(num_embeddings, embedding_dim, padding_idx, device, dtype)

    @classmethod
    def from_embedding(
        cls,
        embedding: nn.Embedding,
        *,
        group: GroupLike | None = None,
        gather_output: bool = False,
        gather_grad: str = "replicated",
        partition: Partition | ShardLayout | None = None,
    ) -> Self:
        """This rank's columns of a dense table.

        Raises: ValueError for one with ``max_norm``, ``scale_grad_by_freq`` or ``sparse``.
        """
        if embedding.max_norm is not None or embedding.scale_grad_by_freq or embedding.sparse:
            raise ValueError(
                f"{cls.__name__} has no max_norm, scale_grad_by_freq or sparse gradients, got "
                f"{embedding}"
            )
        layer = cls(
            embedding.num_embeddings,
            embedding.embedding_dim,
            embedding.padding_idx,
            group=group,
            gather_output=gather_output,
            gather_grad=gather_grad,
            partition=partition,
            device="meta",
            dtype=embedding.weight.dtype,
        )
        return layer.filled_from(embedding)

    def forward(self, ids: Tensor) -> Tensor:
        """Look up this rank's columns."""
        weight: Tensor = self.weight
        if self.layout.is_replicated:
            weight = summed_over_replicas(weight, ShardMark(self.group, 1, self.layout))
        y = F.embedding(ids, weight, self.padding_idx)
        return self._gathered(y, self.gather_grad) if self.gather_output else y

    def extra_repr(self) -> str:
        """Whole and local sizes."""
        return (
            f"{self.num_embeddings}, {self.embedding_dim} (local {self.local_embedding_dim}), "
            f"rank={self.group.rank}/{self.group.size}"
        )
