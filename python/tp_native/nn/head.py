"""The output head: logits cut by vocabulary, tied to the embedding or not."""

from __future__ import annotations

import torch

from ..group import GroupLike
from ..partition import Partition
from .embedding import VocabParallelEmbedding
from .linear import ColumnParallelLinear


class ParallelLMHead(ColumnParallelLinear):
    """Hidden states to logits, each rank its part of the vocabulary.

    ``embedding``: the embedding whose weight it shares; the pair is then one Parameter: one shard,
    one gradient, one entry in a file. Local logits go into `vocab_parallel_cross_entropy` as they
    are; ``gather_output=True`` gives whole ones.

    Shapes: input ``(..., hidden_size)``; output ``(..., local_vocab_size)``.
    Raises: ValueError if the embedding is of another size, group or partition.
    Source: Shoeybi et al., Megatron-LM, arXiv:1909.08053, section 3; Press & Wolf, Using the Output
    Embedding to Improve Language Models, arXiv:1608.05859 (tying).
    """

    def __init__(
        self,
        hidden_size: int,
        vocab_size: int,
        bias: bool = False,
        *,
        embedding: VocabParallelEmbedding | None = None,
        group: GroupLike | None = None,
        gather_output: bool = False,
        sequence_parallel: bool = False,
        partition: Partition | None = None,
        sequence_dim: int = -2,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if embedding is not None and partition is None:
            partition = embedding.partition
        super().__init__(
            hidden_size,
            vocab_size,
            bias,
            group=group if embedding is None else embedding.group,
            gather_output=gather_output,
            sequence_parallel=sequence_parallel,
            partition=partition,
            sequence_dim=sequence_dim,
            device="meta" if embedding is not None and not bias else device,
            dtype=dtype,
        )
        if embedding is not None:
            self.tie(embedding)

    def tie(self, embedding: VocabParallelEmbedding) -> None:
        """Take the embedding's weight for this head's."""
        mine = (self.out_features, self.in_features, self.partition, self.group.name)
        theirs = (
            embedding.num_embeddings,
            embedding.embedding_dim,
            embedding.partition,
            embedding.group.name,
        )
        if mine != theirs:
            raise ValueError(
                f"ParallelLMHead of (vocabulary, width, partition, group) {mine} cannot share the "
                f"weight of an embedding of {theirs}"
            )
        self.weight = embedding.weight
