"""Dropout of a dense model's own code, where it acts on cut activations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import nn
from torch.overrides import TorchFunctionMode

from .group import Group
from .nn.dropout import masks_of_its_own
from .structure import rules


def draw_own_masks(module: nn.Module, is_cut: Sequence[bool], group: Group) -> Callable[[], None]:
    """Make each rank draw masks of its own in ``module``'s code, torch's generators staying alike
    on all ranks; returns what undoes it.

    ``is_cut``: for each mask that one call draws, in order, whether it is of a cut activation. Its
    class becomes a subclass of the same name. Nothing changes in eval mode.
    """
    kind = type(module)
    body = {"__module__": kind.__module__, "_mask_group": group, "_mask_is_cut": tuple(is_cut)}
    module.__class__ = type(kind.__name__, (_OwnMasks, kind), body)
    return partial(setattr, module, "__class__", kind)


class _OwnMasks:
    """A module that runs in a `_Masks` mode while it trains."""

    training: bool
    _mask_group: Group
    _mask_is_cut: tuple[bool, ...]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not self.training:
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        with _Masks(self._mask_group, self._mask_is_cut, type(self).__name__):
            return super().forward(*args, **kwargs)  # type: ignore[misc]


class _Masks(TorchFunctionMode):
    """Runs functions that drop something under `sharded_rng`."""

    def __init__(self, group: Group, is_cut: Sequence[bool], what: str) -> None:
        super().__init__()
        self.group = group
        self.is_cut = iter(is_cut)
        self.what = what

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        name = rules.name_of(func)
        if name not in rules.RANDOM:
            return func(*args, **kwargs)
        p = rules.drop_probability(name, args, kwargs)
        if p == 0 or not next(self.is_cut, False):
            return func(*args, **kwargs)
        x = next(rules.tensors((args, kwargs)))
        with masks_of_its_own(self.group, p, x.device, self.what):
            return func(*args, **kwargs)
