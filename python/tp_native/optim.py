"""Gradient norms and loss scales of a model that is cut over ranks: what dense training has."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable

import torch
from torch import Tensor

from .group import Group, GroupLike, current_group
from .nn import mark_of


@torch.no_grad()
def clip_grad_norm_(
    parameters: Tensor | Iterable[Tensor],
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    *,
    group: GroupLike | None = None,
) -> Tensor:
    """``torch.nn.utils.clip_grad_norm_`` of the dense model, from every rank's part of it.

    Sharded gradients count with all their shards, those of replicated parameters once, and so do
    a tied parameter and a range that several ranks hold. Collective: all ranks give the parameters
    of the same modules, whether they have gradients or not; one all-reduce per group that shards
    any of them, and one of ``group`` in any case. Without shards it is torch's function.

    Returns: the norm before clipping, bitwise equal on all ranks. Norms of tensors are taken in
    float32 (float64 for float64), their sum over tensors and ranks in float64, ranks ascending. On
    a GPU nothing waits for it unless ``error_if_nonfinite``.
    Raises: RuntimeError on every rank for a norm that is not finite, if ``error_if_nonfinite``;
    ValueError for a negative ``norm_type`` of shards.
    """
    given = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    given = list({id(p): p for p in given}.values())
    groups = _groups_of(given, group)
    if not groups:
        return torch.nn.utils.clip_grad_norm_(given, max_norm, norm_type, error_if_nonfinite)
    norm_type = float(norm_type)
    if not norm_type >= 0:
        raise ValueError(f"clip_grad_norm_: norm_type {norm_type}, expected 0 or more, or inf")
    total = total_norm(given, groups, norm_type)
    if error_if_nonfinite and not math.isfinite(float(total)):
        raise RuntimeError(
            f"the norm of order {norm_type} of the gradients is {float(total)}, so they cannot be "
            "clipped; find what made them so, or pass error_if_nonfinite=False"
        )
    dtype = torch.float32 if not given else given[0].dtype
    for p in given:
        dtype = torch.promote_types(dtype, p.dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    torch.nn.utils.clip_grads_with_norm_(given, max_norm, total.to(wide))
    return total.to(dtype)


def total_norm(parameters: list[Tensor], groups: list[Group], norm_type: float) -> Tensor:
    """The dense model's gradient norm in float64, bitwise equal on all ranks. Collective: one
    all-reduce in each of ``groups``, in their order.
    """
    parts = [_reduced(group, _counted(parameters, group, groups), norm_type) for group in groups]
    together = torch.stack([part.to(parts[0].device) for part in parts])
    if norm_type == math.inf:
        return together.amax()
    return together.sum() if norm_type == 0 else together.sum().pow(1 / norm_type)


def _groups_of(parameters: list[Tensor], group: GroupLike | None) -> list[Group]:
    """The groups whose ranks must meet, in an order that all of them share whatever the order of
    the parameters: that of their names, numbers in them by value.
    """
    found = [] if group is None else [current_group(group)]
    found += [mark.group for mark in map(mark_of, parameters) if mark is not None]
    distinct = {id(g): g for g in found if g.size > 1}.values()
    # thread ranks' names differ in what follows "@"
    return sorted(distinct, key=lambda g: _words_and_numbers(g.name.split("@")[0]))


def _words_and_numbers(name: str) -> list[tuple[str, int]]:
    pieces = [*re.split(r"(\d+)", name), ""]
    return [(pieces[i], int(pieces[i + 1] or 0)) for i in range(0, len(pieces), 2)]


def _counted(parameters: list[Tensor], group: Group, groups: list[Group]) -> list[list[Tensor]]:
    """For each parameter of the group, what of its gradient counts on this rank.

    Whole parameters are the first group's and count on its rank 0: then even gradients that differ
    against the rules clip alike on all ranks.
    """
    counted = []
    for parameter in parameters:
        mark, grad = mark_of(parameter), parameter.grad
        if mark is None or mark.group.size == 1:
            if group is not groups[0]:
                continue
            views = [] if grad is None or group.rank > 0 else [grad]
        elif mark.group is not group:
            continue
        elif grad is None:
            views = []
        else:
            views = mark.owned(grad) if mark.layout.is_replicated else [grad]
        counted.append([view for view in views if view.numel()])
    return counted


def _reduced(group: Group, counted: list[list[Tensor]], norm_type: float) -> Tensor:
    """The sum of ``|x| ** norm_type`` over the group, or the largest ``|x|``; for order 0 what
    torch makes of it: how many tensors are not all zero.
    """
    if norm_type == 0:
        is_any = [_largest(group, _norms(group, views, math.inf)) != 0 for views in counted]
        flags = torch.stack([*is_any, torch.zeros_like(group.order[0], dtype=torch.bool)])
        return group.all_reduce_(flags.double(), "max").sum()
    norms = _norms(group, [view for views in counted for view in views], norm_type)
    if norm_type < math.inf:
        return group.all_reduce_(norms.pow(norm_type).sum())
    largest = _largest(group, norms)
    # not every backend's max keeps NaN
    both = torch.stack([largest.nan_to_num(0.0, posinf=math.inf), largest.isnan().double()])
    group.all_reduce_(both, "max")
    return torch.where(both[1] > 0, math.nan, both[0])


def _largest(group: Group, norms: Tensor) -> Tensor:
    return torch.cat([norms, norms.new_zeros(1)]).amax()


def _norms(group: Group, views: list[Tensor], norm_type: float) -> Tensor:
    """The norm of each, in float64 on the group's device."""
    alike: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for view in views:
        alike.setdefault((view.device, view.dtype), []).append(view)
    norms = []
    for (_, dtype), some in alike.items():
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        found = torch.stack(torch._foreach_norm(some, norm_type, wide))
        norms.append(found.to(group.device, torch.float64))
    return torch.cat([torch.empty(0, dtype=torch.float64, device=group.device), *norms])


class GradScaler(torch.amp.GradScaler):
    """``torch.amp.GradScaler`` of a model that is cut over ranks: an infinite or NaN gradient on
    one rank makes all ranks skip the step and lower the scale, so that scales stay equal.

    One all-reduce of one number per optimizer and step, in `unscale_`, or in `step` where
    `unscale_` was not called; so all ranks step the same optimizers in the same order.
    ``group``: whose ranks; the other arguments are torch's.
    """

    def __init__(
        self,
        device: str = "cuda",
        init_scale: float = 2.0**16,
        growth_factor: float = 2.0,
        backoff_factor: float = 0.5,
        growth_interval: int = 2000,
        enabled: bool = True,
        *,
        group: GroupLike | None = None,
    ) -> None:
        super().__init__(
            device, init_scale, growth_factor, backoff_factor, growth_interval, enabled
        )
        self.group = current_group(group)

    # where torch looks for infinities, for its own unscale_ as for fused optimizers, which take
    # found_inf into step()
    def _unscale_grads_(
        self,
        optimizer: torch.optim.Optimizer,
        inv_scale: Tensor,
        found_inf: Tensor,
        allow_fp16: bool,
    ) -> dict[torch.device, Tensor]:
        found = super()._unscale_grads_(optimizer, inv_scale, found_inf, allow_fp16)
        if self.group.size == 1:
            return found
        device = self.group.device
        # a rank without gradients takes part too
        flags = [torch.zeros((), device=device), *(t.to(device) for t in found.values())]
        return {device: self.group.all_reduce_(torch.stack(flags).amax(), "max")}
