"""Modules made of sharded layers: the way from a dense twin and back."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Self

from ..group import GroupLike, world_of_one
from .sharded import full_of


class CompositeModule(nn.Module):
    """Sharded layers under one name. The dense twin of one is the same class in a world of one.

    ``options`` are the arguments that make the whole module, whatever the group.
    """

    options: dict[str, Any]

    @classmethod
    def from_dense(
        cls, dense: nn.Module, *, group: GroupLike | None = None, **changes: Any
    ) -> Self:
        """This rank's part of ``dense``, which is this class in a world of one.

        ``changes``: options that may differ between the two, such as ``sequence_parallel``.
        Raises: TypeError for another class, ValueError for a module that is sharded already.
        """
        if not isinstance(dense, cls):
            raise TypeError(
                f"{cls.__name__}.from_dense got a {type(dense).__name__}, expected a "
                f"{cls.__name__} of a world of one"
            )
        sample = next(dense.parameters())
        twin = cls(**{**dense.options, **changes}, group=group, device="meta", dtype=sample.dtype)
        twin.to_empty(device=sample.device).train(dense.training)
        twin.load_state_dict(dense.state_dict())
        for (_, mine), (_, theirs) in zip(
            twin.named_parameters(), dense.named_parameters(), strict=True
        ):
            mine.requires_grad_(theirs.requires_grad)
        return twin

    def to_dense(self) -> Self:
        """The dense twin on every rank, with all parameters whole. Collective."""
        sample = next(self.parameters())
        twin = type(self)(**self.options, group=world_of_one(), device="meta", dtype=sample.dtype)
        twin.to_empty(device=sample.device).train(self.training)
        twin.load_state_dict(full_tensors(self))
        return twin


def full_tensors(module: nn.Module) -> dict[str, Tensor]:
    """``module.state_dict()`` with every sharded parameter whole. Collective."""
    with torch.no_grad():
        return {name: full_of(value) for name, value in module.state_dict(keep_vars=True).items()}
