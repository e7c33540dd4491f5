"""Dropout that is equal on all ranks where tensors are replicated, different where they are cut."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..group import Group, GroupLike, current_group

_GOLDEN = 0x9E3779B97F4A7C15  # 2**64 over the golden ratio: neighbouring ranks, distant seeds


@contextlib.contextmanager
def sharded_rng(group: Group, device: torch.device) -> Iterator[None]:
    """Inside, torch's generators give each rank numbers of its own; afterwards they go on on all
    ranks as if one number had been drawn.

    The ranks' seeds are that number's, so what restores torch's CPU generator, as
    ``torch.utils.checkpoint`` does, repeats them. Needs ranks seeded alike, as replicated dropout
    does.
    """
    drawn = int(torch.randint(2**62, (), device="cpu"))
    seed = (drawn ^ (group.rank + 1) * _GOLDEN) % 2**63
    generator = _generator(device)
    state = generator.get_state()
    generator.manual_seed(seed)
    try:
        yield
    finally:
        generator.set_state(state)


def _generator(device: torch.device) -> torch.Generator:
    if device.type != "cuda":
        return torch.default_generator
    index = device.index if device.index is not None else torch.cuda.current_device()
    generator: torch.Generator = torch.cuda.default_generators[index]
    return generator


def refuse_thread_ranks(group: Group, what: str) -> None:
    """Raise ValueError where ranks are threads, which share one generator."""
    if group.backend == "local" and group.size > 1:
        raise ValueError(
            f"{what}: thread ranks (tp.simulate) share torch's generator, so their masks would "
            "differ where they have to be equal; set it to 0 or use rank processes"
        )


def masks_of_its_own(
    group: Group, p: float, device: torch.device, what: str
) -> contextlib.AbstractContextManager[None]:
    """For dropout ``p`` inside an operation on this rank's part: `sharded_rng` where it is needed.

    Raises: ValueError in thread ranks, saying ``what`` is dropped.
    """
    if p == 0 or group.size == 1:
        return contextlib.nullcontext()
    refuse_thread_ranks(group, f"{what} {p}")
    return sharded_rng(group, device)


class ParallelDropout(nn.Module):
    """``nn.Dropout`` for a tensor that is replicated, or cut over the ranks (``is_sharded``).

    Replicated: the same mask on every rank, from torch's generator, which the ranks seed alike.
    Cut: masks of their own, and torch's generators stay alike. Both repeat under
    ``torch.utils.checkpoint``.
    Raises: ValueError for a probability outside 0..1, and in thread ranks.
    Source: Megatron-LM, arXiv:1909.08053, appendix B.2 (random numbers).
    """

    def __init__(
        self, p: float = 0.5, *, is_sharded: bool = False, group: GroupLike | None = None
    ) -> None:
        super().__init__()
        if not 0 <= p <= 1:
            raise ValueError(f"ParallelDropout got probability {p}, expected 0 to 1")
        self.p, self.is_sharded, self.group = p, is_sharded, current_group(group)

    def forward(self, x: Tensor) -> Tensor:
        """Zero elements with probability ``p`` and scale the others by ``1 / (1 - p)``."""
        if not self.training or self.p == 0:
            return x
        refuse_thread_ranks(self.group, f"dropout {self.p}")
        if not self.is_sharded or self.group.size == 1:
            return F.dropout(x, self.p)
        with sharded_rng(self.group, x.device):
            return F.dropout(x, self.p)

    def extra_repr(self) -> str:
        """Probability and kind."""
        return f"p={self.p}, is_sharded={self.is_sharded}"
