"""An embedding cut by vocabulary."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import Self

from .. import _ops
from ..collectives import scatter_to_ranks
from ..group import GroupLike
from ..partition import Partition
from .sharded import ShardedModule


class VocabParallelEmbedding(ShardedModule):
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
        if padding_idx is not None and not -num_embeddings <= padding_idx < num_embeddings:
            raise ValueError(
                f"padding_idx {padding_idx}: expected an id of the {num_embeddings} embeddings"
            )
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.padding_idx = padding_idx % num_embeddings if padding_idx is not None else None
        self.local_num_embeddings = self.partition[self.group.rank]
        self.shard_dims = {"weight": 0}
        self.weight = nn.Parameter(
            torch.empty(self.local_num_embeddings, embedding_dim, device=device, dtype=dtype)
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw as ``nn.Embedding`` draws the whole table and keep this rank's rows."""
        if self.weight.is_meta:
            return
        with torch.no_grad():
            full = self.weight.new_empty(self.num_embeddings, self.embedding_dim)
            full.normal_(generator=self.group.init_generator(full.device))
            if self.padding_idx is not None:
                full[self.padding_idx] = 0
            self.weight.copy_(self._local("weight", full))

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
