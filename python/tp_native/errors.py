"""The typed errors. The native core raises them too, through :func:`make_error`."""

from __future__ import annotations


class TensorParallelError(RuntimeError):
    """Something failed in a group of ranks.

    Attributes: ``rank`` that reports, ``peer`` that caused it (-1: nobody in particular), ``op``,
    ``seq`` (the operation's number in its group, the same on all ranks), ``elapsed_s`` waited.
    """

    rank: int = -1
    peer: int = -1
    op: str = ""
    seq: int = 0
    elapsed_s: float = 0.0


class PeerLostError(TensorParallelError):
    """A peer died, left the group or was interrupted while others needed it."""


class CollectiveMismatchError(TensorParallelError):
    """Ranks entered different operations, dtypes, shapes or partitions."""


class CollectiveTimeoutError(TensorParallelError):
    """A living peer did not come to a collective within the timeout."""


class CheckpointError(TensorParallelError, ValueError):
    """A checkpoint cannot be read, written or matched to the model."""


class PlanError(TensorParallelError, ValueError):
    """A model cannot be cut as asked."""


_KINDS: dict[int, type[TensorParallelError]] = {  # csrc/core/error.h, FailureKind
    1: PeerLostError,
    2: CollectiveMismatchError,
    3: CollectiveTimeoutError,
    5: PeerLostError,
}


def make_error(
    kind: int, message: str, rank: int, peer: int, op: str, seq: int, elapsed_s: float
) -> TensorParallelError:
    """Build the exception for a failure record of the native core."""
    error = _KINDS.get(kind, TensorParallelError)(message)
    error.rank, error.peer, error.op, error.seq, error.elapsed_s = rank, peer, op, seq, elapsed_s
    return error
