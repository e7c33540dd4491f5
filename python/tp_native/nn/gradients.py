"""Gradients of what every rank holds whole but of which each sees only a part.

Norm weights on a sequence shard, per-head norms, key/value heads held by several ranks: backward
sums them over the ranks, right after each backward and so under accumulation too. Inside
`deferred_gradients` that sum is taken once, over all of them together.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ..collectives import copy_to_ranks
from ..group import Group
from ..partition import ShardLayout
from .sharded import ShardedModule, ShardMark, mark_of


def _sums(group: Group, *tensors: Tensor) -> bool:
    if group.size == 1 or group.defers_gradients or not torch.is_grad_enabled():
        return False
    return any(t.requires_grad for t in tensors)


def summed(group: Group, *parameters: Tensor) -> tuple[Tensor, ...]:
    """The parameters as they are; backward sums their gradients over the ranks, all in one
    collective.

    Source: Korthikanti et al., Reducing Activation Recomputation, arXiv:2205.05198, section 4.2.2.
    """
    if not _sums(group, *parameters):
        return parameters
    if len(parameters) == 1:
        return (copy_to_ranks(parameters[0], group),)
    flat = copy_to_ranks(torch.cat([p.flatten() for p in parameters]), group)
    pieces = torch.split(flat, [p.numel() for p in parameters])
    return tuple(piece.view(p.shape) for piece, p in zip(pieces, parameters, strict=True))


def summed_over_replicas(parameter: Tensor, mark: ShardMark) -> Tensor:
    """A sharded parameter as it is; backward sums the gradients of what several ranks hold.

    The sum goes over the whole group, with zeros from ranks that do not hold a range: there are
    few such ranges, and no group of their own has to be made.
    """
    if not _sums(mark.group, parameter):
        return parameter
    return _put_back(parameter, copy_to_ranks(_spread(parameter, mark), mark.group), mark)


def _shared(layout: ShardLayout) -> list[tuple[int, int]]:
    held = [place for places in layout.ranges for place in places]
    return sorted({place for place in held if held.count(place) > 1})


def _spread(local: Tensor, mark: ShardMark) -> Tensor:
    """All ranges that several ranks hold, side by side; zeros for those of other ranks."""
    mine, at = {}, 0
    for start, stop in mark.layout.ranges[mark.group.rank]:
        mine[start, stop] = local.narrow(mark.dim, at, stop - start)
        at += stop - start
    zeros = list(local.shape)
    pieces = [local.narrow(mark.dim, 0, 0)]  # a rank that holds none takes part all the same
    for start, stop in _shared(mark.layout):
        zeros[mark.dim] = stop - start
        piece = mine.get((start, stop))
        pieces.append(local.new_zeros(zeros) if piece is None else piece)
    return torch.cat(pieces, mark.dim)


def _put_back(local: Tensor, spread: Tensor, mark: ShardMark) -> Tensor:
    """``local`` with the ranges that several ranks hold taken from `_spread`'s result."""
    start_of, at = {}, 0
    for start, stop in _shared(mark.layout):
        start_of[start, stop] = at
        at += stop - start
    pieces, at = [spread.narrow(mark.dim, 0, 0)], 0
    for start, stop in mark.layout.ranges[mark.group.rank]:
        width, first = stop - start, start_of.get((start, stop))
        piece = (local, at) if first is None else (spread, first)
        pieces.append(piece[0].narrow(mark.dim, piece[1], width))
        at += width
    return torch.cat(pieces, mark.dim)


def partial_parameters(model: nn.Module) -> Iterator[tuple[Group, nn.Parameter]]:
    """Parameters whose gradient is a sum over ranks, once each."""
    seen: set[int] = set()
    for module in model.modules():
        group = getattr(module, "group", None)
        if not isinstance(group, Group) or group.size == 1:
            continue
        names = [*getattr(module, "partial_gradients", ())]
        if isinstance(module, ShardedModule) and module.layout.is_replicated:
            names += module.shard_dims
        for name in names:
            parameter = module._parameters.get(name)
            if parameter is not None and id(parameter) not in seen:
                seen.add(id(parameter))
                yield group, parameter


@contextlib.contextmanager
def deferred_gradients(model: nn.Module) -> Iterator[None]:
    """Backward passes inside leave partial gradients as they are; the end sums them, once.

    For gradient accumulation: of the micro-batches' norm weights (sequence parallelism), per-head
    norms and replicated key/value heads one sum per step is enough. What a gradient held before is
    kept. Collective at its end; an exception inside leaves the gradients of this rank unsummed.
    """
    parameters = list(partial_parameters(model))
    groups = list({id(group): group for group, _ in parameters}.values())
    before = [parameter.grad for _, parameter in parameters]
    for _, parameter in parameters:
        parameter.grad = None
    for group in groups:
        group.defers_gradients = True
    try:
        yield
    finally:
        for group in groups:
            group.defers_gradients = False
    for group in groups:
        _sum_now(group, [parameter for owner, parameter in parameters if owner is group])
    for (_, parameter), old in zip(parameters, before, strict=True):
        if old is not None:
            parameter.grad = old if parameter.grad is None else old.add_(parameter.grad)


@torch.no_grad()
def _sum_now(group: Group, parameters: list[nn.Parameter]) -> None:
    """Sum the gradients over the ranks, those of one dtype in one collective; a rank without one
    counts as zeros.
    """
    by_dtype: dict[torch.dtype, list[nn.Parameter]] = {}
    for parameter in parameters:
        if parameter.requires_grad:
            by_dtype.setdefault(parameter.dtype, []).append(parameter)
    for alike in by_dtype.values():
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in alike]
        marks = [mark_of(p) for p in alike]
        parts = [
            grad if mark is None else _spread(grad, mark)
            for grad, mark in zip(grads, marks, strict=True)
        ]
        flat = group.all_reduce_(torch.cat([part.flatten() for part in parts]))
        pieces = torch.split(flat, [part.numel() for part in parts])
        for p, grad, mark, part, piece in zip(alike, grads, marks, parts, pieces, strict=True):
            total = piece.view(part.shape)
            p.grad = total.clone() if mark is None else _put_back(grad, total, mark)
