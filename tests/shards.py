"""What tests of sharded modules share: data that every rank can make, cuts, gradients put together,
and the comparison with the dense answer in float64.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import tp_native as tp
from oracle import rank_data, relative_error
from tp_native.nn import mark_of

WORLDS = [1, 2, 3, 4]
F64 = torch.float64
LIMIT = 1e-12  # float64 rounding of sums of at most 64 terms, taken in another order


def data(*shape: int, seed: int = 3) -> Tensor:
    """The same on every rank."""
    return rank_data(shape, F64, 0, seed)


def check(actual: Tensor | None, expected: Tensor | None, what: Any) -> None:
    """Shape and values, within `LIMIT` of the largest."""
    assert actual is not None and expected is not None and actual.shape == expected.shape, what
    if expected.numel():
        assert relative_error(actual, expected) <= LIMIT, what


def cuts(size: int, ranks: int) -> list[tp.Partition]:
    """Even, uneven, and with an empty shard."""
    lopsided = [size - (ranks - 1), *[1] * (ranks - 1)]
    empty = [0] * (ranks - 1) + [size]
    return [tp.Partition.even(size, ranks), *map(tp.Partition.from_sizes, (lopsided, empty))]


def full_gradient(parameter: nn.Parameter) -> Tensor:
    """A parameter's gradient put together from all ranks. Collective."""
    assert parameter.grad is not None
    mark = mark_of(parameter)
    return parameter.grad if mark is None else mark.full(parameter.grad)
