"""Modules whose code has whole sizes written into it, run on a rank's pieces."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .collectives import copy_to_ranks
from .group import Group
from .plan import ShardPlan
from .structure import rules
from .structure.translate import Translator

_active = threading.local()


def translate_modules(model: nn.Module, plan: ShardPlan, group: Group) -> list[Callable[[], None]]:
    """Make the plan's ``translated`` modules run on pieces; returns what undoes it.

    Their classes, and those of the cut layers in them, become subclasses of the same name.
    """
    undo: list[Callable[[], None]] = []
    if not plan.translated:
        return undo
    cuts = plan.cuts_for_one_rank()
    for name in plan.translated:
        region = model.get_submodule(name)
        translator = Translator(
            cuts.solution, group.rank, name, partial(copy_to_ranks, group=group)
        )
        undo.append(_become(region, _Region, translator=translator))
        for path, module in region.named_modules(prefix=name):
            if path in plan.entries:
                undo.append(_become(module, _Layer, out_axis=cuts.out_axes.get(path)))
    return undo


def _become(module: nn.Module, mixin: type, **state: Any) -> Callable[[], None]:
    kind = type(module)
    body = {"__module__": kind.__module__, "_translation": state}
    module.__class__ = type(kind.__name__, (mixin, kind), body)
    return partial(setattr, module, "__class__", kind)


class _Region:
    """A module that runs in its `Translator`."""

    _translation: dict[str, Any]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():  # a compiler does not see through: it runs as it is
            run: Any = torch.compiler.disable(self._run)  # type: ignore[no-untyped-call]
            return run(*args, **kwargs)
        return self._run(*args, **kwargs)

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        before = getattr(_active, "translator", None)
        if before is not None:
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        translator: Translator = self._translation["translator"]
        _active.translator = translator
        try:
            with translator:
                return super().forward(*args, **kwargs)  # type: ignore[misc]
        finally:
            _active.translator = None


class _Layer:
    """A cut layer in a region: computes as ever and says what its output is a part of."""

    _translation: dict[str, Any]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        translator: Translator | None = getattr(_active, "translator", None)
        if translator is None:
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        with torch._C.DisableTorchFunction():
            result = super().forward(*args, **kwargs)  # type: ignore[misc]
        axis = self._translation["out_axis"]
        x = next(rules.tensors((args, kwargs)))
        return translator.leaf_output(result, x, axis) if isinstance(result, Tensor) else result
