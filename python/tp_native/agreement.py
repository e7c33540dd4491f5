"""One outcome on every rank: either all go on, or all raise the same error."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from .errors import (
    CheckpointError,
    CollectiveMismatchError,
    CollectiveTimeoutError,
    PeerLostError,
    PlanError,
    TensorParallelError,
)
from .group import Group
from .partition import Partition

# The communicator raised these on every rank already, and can't be used to talk about them.
_SHARED_ALREADY = (CollectiveMismatchError, CollectiveTimeoutError, PeerLostError)
_SENDABLE: dict[str, type[Exception]] = {
    kind.__name__: kind for kind in (CheckpointError, PlanError, ValueError, TypeError, IndexError)
}


def agree(group: Group, error: Exception | None) -> None:
    """Return if no rank has an ``error``; else raise the lowest failing rank's on all of them.

    Collective: one all-gather of a flag, and a broadcast of the message if a rank failed.
    An error of another class than ours, ValueError, TypeError or IndexError arrives as
    `TensorParallelError` with the class's name in the message.
    """
    if group.size == 1:
        if error is not None:
            raise error
        return
    flag = torch.tensor([error is not None], dtype=torch.int64, device=group.device)
    failed = group.all_gather(flag).tolist()
    if not any(failed):
        return
    source = failed.index(1)
    payload = _encode(error) if error is not None else b""
    length = torch.tensor([len(payload)], dtype=torch.int64, device=group.device)
    group.broadcast_(length, source)
    text = torch.zeros(int(length.item()), dtype=torch.uint8, device=group.device)
    if group.rank == source:
        text.copy_(torch.frombuffer(bytearray(payload), dtype=torch.uint8))
    group.broadcast_(text, source)
    raise _decode(bytes(text.tolist())) from error


@contextmanager
def agreed(group: Group) -> Iterator[None]:
    """Run a block that makes no collective call, then `agree` on how it ended."""
    try:
        yield
    except _SHARED_ALREADY:
        raise
    except Exception as error:
        agree(group, error)
    else:
        agree(group, None)


def check_same(group: Group, value: int, what: str) -> None:
    """Raise ValueError on every rank unless ``value`` (any 63-bit int) is equal on all of them."""
    if group.size == 1:
        return
    mine = torch.tensor([value], dtype=torch.int64, device=group.device)
    values = group.all_gather(mine).tolist()
    odd = [rank for rank, other in enumerate(values) if other != values[0]]
    if odd:
        raise ValueError(f"{what} differ between ranks: ranks {odd} do not match rank 0")


def all_gather_bytes(group: Group, mine: bytes) -> list[bytes]:
    """Every rank's bytes, in rank order. Collective: two all-gathers, whatever the lengths."""
    if group.size == 1:
        return [mine]
    length = torch.tensor([len(mine)], dtype=torch.int64, device=group.device)
    sizes = [int(n) for n in group.all_gather(length).tolist()]
    part = torch.frombuffer(bytearray(mine), dtype=torch.uint8) if mine else torch.empty(0)
    whole = group.all_gather(
        part.to(group.device, torch.uint8), partition=Partition.from_sizes(sizes)
    )
    return [bytes(each.tolist()) for each in torch.split(whole, sizes)]


def _encode(error: Exception) -> bytes:
    for name, kind in _SENDABLE.items():
        if type(error) is kind:
            return f"{name}\n{error}".encode()
    if isinstance(error, TensorParallelError):
        return f"TensorParallelError\n{error}".encode()
    return f"TensorParallelError\n{type(error).__name__}: {error}".encode()


def _decode(payload: bytes) -> Exception:
    name, _, message = payload.decode(errors="replace").partition("\n")
    return _SENDABLE.get(name, TensorParallelError)(message)
