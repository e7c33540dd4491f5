"""The dense answer, computed in one process in float64 and independent of the code under test."""

from __future__ import annotations

import torch
from torch import Tensor


def rank_data(shape: tuple[int, ...], dtype: torch.dtype, rank: int, seed: int = 0) -> Tensor:
    """Random data that every process can make for any rank."""
    generator = torch.Generator().manual_seed(1000 * seed + rank)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def reduce_in_rank_order(parts: list[Tensor], op: str = "sum") -> Tensor:
    """What promise 1 says: ascending ranks, float32 accumulation for 16-bit types, one rounding."""
    dtype = parts[0].dtype
    wide = torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype
    acc = parts[0].to(wide)
    for part in parts[1:]:
        other = part.to(wide)
        if op == "max":
            acc = torch.maximum(acc, other)
        elif op == "min":
            acc = torch.minimum(acc, other)
        else:
            acc = acc + other
    if op == "avg":
        acc = acc / len(parts)
    return acc.to(dtype)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """max|actual - expected| / max|expected|, in float64."""
    scale = expected.double().abs().max().clamp_min(1e-300)
    return ((actual.double() - expected.double()).abs().max() / scale).item()
