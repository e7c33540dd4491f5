"""Weights that code reads past their module's forward: it is given the whole of a cut one."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from . import _ops
from .collectives import all_gather_tensor
from .nn import ShardMark, mark_of
from .structure import rules


def let_read_whole(module: nn.Module) -> Callable[[], None]:
    """Make ``module.weight`` stand for the whole weight wherever it is read but in the module's
    own forward; returns what undoes it.

    The module's class becomes a subclass of the same name; its parameters stay.
    """
    kind = type(module)
    module.__class__ = type(kind.__name__, (_ReadWhole, kind), {"__module__": kind.__module__})
    return partial(setattr, module, "__class__", kind)


class _ReadWhole(nn.Module):
    """A cut layer whose weight reads as the whole one from outside."""

    _is_running = False

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self._is_running = True
        try:
            return super().forward(*args, **kwargs)
        finally:
            self._is_running = False

    @property
    def weight(self) -> Tensor:
        """This rank's part in the layer's own forward, else a stand-in for the whole."""
        local = self._parameters["weight"]
        assert local is not None
        mark = mark_of(local)
        if self._is_running or mark is None:
            return local
        whole = local.as_subclass(WholeWeight)
        whole.mark, whole.is_turned, whole._is_param = mark, False, True
        return whole

    def get_parameter(self, target: str) -> nn.Parameter:
        """As ``nn.Module``'s; the weight as this rank has it."""
        own = self._parameters.get(target)
        return super().get_parameter(target) if own is None else own


class WholeWeight(torch.Tensor):
    """This rank's part of a weight, used as the whole: ``F.linear`` by it (or a product with its
    transpose) multiplies by this rank's rows and gathers; whatever else is done with it gathers
    the weight first. Collective, as the dense code is run by all ranks alike.
    """

    mark: ShardMark
    is_turned: bool
    _is_param: bool  # what makes it an nn.Parameter to isinstance

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        name = rules.name_of(func)
        with torch._C.DisableTorchFunctionSubclass():
            if name in ("shape", "size", "numel", "nelement", "stride", "__len__"):
                return func(*_each(args, _stand_in), **_each(kwargs, _stand_in))
            if name in rules.METADATA:
                return func(*args, **kwargs)
            if name in ("t", "T", "mT") or (name == "transpose" and args[0].dim() == 2):
                turned = args[0].as_subclass(cls)
                turned.mark, turned.is_turned = args[0].mark, not args[0].is_turned
                return turned
            x = rules.argument(args, kwargs, 0, "input")
            weight = rules.argument(args, kwargs, 1, "weight", "other")
            if name == "linear" and _is_rows(weight, False) and not isinstance(x, cls):
                bias = rules.argument(args, kwargs, 2, "bias")
                y = _product(x, weight)
                return y if bias is None else y + bias
            if name in ("matmul", "__matmul__") and _is_rows(weight, True):
                return _product(x, weight)
            return func(*_each(args, _gathered), **_each(kwargs, _gathered))


def _is_rows(weight: Any, is_turned: bool) -> bool:
    return (
        isinstance(weight, WholeWeight)
        and weight.is_turned == is_turned
        and weight.mark.dim == 0
        and weight.mark.layout.is_consecutive
    )


def _product(x: Tensor, weight: WholeWeight) -> Tensor:
    group, sizes = weight.mark.group, weight.mark.layout.local_sizes
    local = weight.as_subclass(Tensor)
    y = _ops.column_parallel_linear(x, local, None, group.order, sizes.sizes, group.name)
    return all_gather_tensor(y, -1, group, partition=sizes)


def _gathered(value: Any) -> Any:
    if not isinstance(value, WholeWeight):
        return value
    mark, local = value.mark, value.as_subclass(Tensor)
    gathered = all_gather_tensor(local, mark.dim, mark.group, partition=mark.layout.local_sizes)
    return gathered.t() if value.is_turned else gathered


def _stand_in(value: Any) -> Any:
    if not isinstance(value, WholeWeight):
        return value
    shape = value.mark.full_shape(value.as_subclass(Tensor))
    whole = torch.empty(shape, dtype=value.dtype, device="meta")
    return whole.t() if value.is_turned else whole


def _each(value: Any, change: Callable[[Any], Any]) -> Any:
    if isinstance(value, dict):
        return {key: _each(item, change) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(_each(item, change) for item in value)
    return change(value)
