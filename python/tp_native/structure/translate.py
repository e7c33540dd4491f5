"""Code with whole sizes written into it, run on one rank's pieces.

Inside a `Translator` the code sees the dense model's shapes: ``x.shape`` of a cut activation is the
whole's, ``view(B, T, n_head, C // n_head)`` and ``split(n_embd)`` are given local sizes, and a
whole operand (a bias of every head) is sliced where it meets a cut one. The rules are those that
the plan was made with, so what they don't know raises instead of giving something else.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ..errors import TensorParallelError
from . import rules
from .axes import Axis, Dim, opaque, size_of
from .solve import Solution

_LABEL = "_tp_native_axes"
_SHAPE = frozenset(
    ["shape", "size", "numel", "nelement", "stride", "dim", "ndim", "ndimension", "__len__"]
)
_VIEWS = frozenset(
    ["view", "reshape", "flatten", "unflatten", "view_as", "reshape_as", "ravel", "squeeze"]
)
_MOVES = frozenset(["to", "cpu", "cuda"])
_EXPANDS = frozenset(["expand", "expand_as", "broadcast_to"])
_SPLITS = frozenset(["split", "chunk", "tensor_split", "split_with_sizes"])


@dataclass(frozen=True)
class Label:
    """What a local tensor is a part of: the axes of its dimensions, and a stand-in for the whole
    on meta.
    """

    dims: list[Dim]
    whole: Tensor


def label_of(tensor: Tensor) -> Label | None:
    """The label of a cut activation."""
    return tensor.__dict__.get(_LABEL)


class Translator(TorchFunctionMode):
    """Runs a module's code on rank ``rank``'s pieces; ``share`` makes a whole operand's gradient the
    sum of the ranks' (`copy_to_ranks`).

    Raises: TensorParallelError, naming module and function, for what can't be done on pieces.
    """

    def __init__(
        self, solution: Solution, rank: int, place: str, share: Callable[[Tensor], Tensor]
    ) -> None:
        super().__init__()
        self.solution = solution
        self.rank = rank
        self.place = place
        self.share = share

    def label(self, tensor: Tensor, dims: Sequence[Dim]) -> Tensor:
        """Mark a local tensor as part of a whole with these axes."""
        sizes = [
            size_of(dim) if any(not axis.find().is_opaque for axis in dim) else tensor.shape[at]
            for at, dim in enumerate(dims)
        ]
        whole = torch.empty(sizes, dtype=tensor.dtype, device="meta")
        return self._attach(tensor, [*dims], whole)

    def leaf_output(self, y: Tensor, x: Tensor, axis: Axis | None) -> Tensor:
        """A leaf's output: labelled where ``axis`` is what its features are."""
        if axis is None:
            return y
        label = label_of(x)
        rows = y.dim() - 1
        dims = [opaque(size) for size in y.shape[:-1]] if label is None else label.dims[:rows]
        return self.label(y, [*dims, [axis]])

    def _attach(self, tensor: Tensor, dims: list[Dim], whole: Tensor) -> Tensor:
        tensor.__dict__[_LABEL] = Label(dims, whole)
        return tensor

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        given = list(rules.tensors((args, kwargs)))
        if all(label_of(tensor) is None for tensor in given):
            return func(*args, **kwargs)
        name = rules.name_of(func)
        if name in _SHAPE:
            return func(*_whole(args), **_whole(kwargs))
        if name in rules.METADATA:
            return func(*args, **kwargs)
        if name in _MOVES and args and (label := label_of(args[0])) is not None:
            moved = func(*args, **kwargs)  # nothing moves from meta
            return self._attach(moved, label.dims, label.whole.to(moved.dtype))
        return self._call(func, name, args, kwargs)

    def _call(
        self, func: Callable[..., Any], name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        wholes = _Wholes()
        whole_args, whole_kwargs = wholes.of(args), wholes.of(kwargs)
        whole_outs = list(rules.tensors(func(*whole_args, **whole_kwargs)))
        if name in rules.CONSTANT and name.startswith("new_"):
            return func(*args, **kwargs)
        try:
            labels = rules.follow(name, wholes, whole_args, whole_kwargs, whole_outs)
        except rules.NotFollowed as reason:
            raise self._error(name, str(reason) or "not followed") from None
        for cut in self.solution.cuts:
            if (why := cut.pair.axis.find().mixed) is not None:
                raise self._error(name, why)
        result = self._on_pieces(func, name, args, kwargs, labels, whole_outs)
        outs = list(rules.tensors(result))
        for out, dims, whole in zip(outs, labels, whole_outs, strict=True):
            dims = dims or [opaque(size) for size in whole.shape]
            expected = [self._local(dim, size) for dim, size in zip(dims, whole.shape, strict=True)]
            if list(out.shape) != expected:
                raise self._error(name, f"gives {list(out.shape)}, expected {expected}")
            self._attach(out, dims, whole)
        return result

    def _error(self, name: str, why: str) -> TensorParallelError:
        return TensorParallelError(
            f"{self.place}: {name} can't run on a part of the model: {why}. Give its Linears other "
            'styles, for example tp.plan(model, n, rules={"...": "colwise_gather_output"})'
        )

    def _local(self, dim: Dim, size: int) -> int:
        return self.solution.local_size(dim, self.rank) if size_of(dim) == size else size

    # -- calls on pieces

    def _on_pieces(
        self,
        func: Callable[..., Any],
        name: str,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        labels: list[list[Dim] | None],
        whole_outs: Sequence[Tensor],
    ) -> Any:
        source = next(rules.tensors((args, kwargs)))
        dims = labels[0] or []
        local = [self._local(d, s) for d, s in zip(dims, whole_outs[0].shape, strict=True)]
        if name in _VIEWS and whole_outs[0].dtype == source.dtype:
            return source.view(local) if name in ("view", "view_as") else source.reshape(local)
        if name in _EXPANDS:
            return source.expand(local)
        if name == "repeat_interleave":
            at = rules.argument(args, kwargs, 2, "dim")
            return source.repeat_interleave(local[at] // max(source.size(at), 1), at)
        if name in _SPLITS:
            at = rules.argument(args, kwargs, 2, "dim", default=0) % source.dim()
            sizes = [
                self._local((d or [])[at], w.shape[at])
                for d, w in zip(labels, whole_outs, strict=True)
            ]
            return source.split(sizes, at)
        if name == "narrow":
            at, start = (rules.argument(args, kwargs, i) for i in (1, 2))
            return self._slice(source, at, start, start + whole_outs[0].shape[at])
        if name == "__getitem__":
            return self._getitem(args[0], args[1])
        if name == "einsum":
            return func(args[0], *self._terms(args, labels[0] or [], whole_outs[0]))
        return func(
            *self._aligned(name, args, labels, whole_outs),
            **self._aligned_kwargs(name, kwargs, labels, whole_outs),
        )

    def _slice(self, source: Tensor, at: int, start: int, stop: int) -> Tensor:
        """Elements ``start:stop`` of a whole dimension, those that this rank holds."""
        label = label_of(source)
        assert label is not None
        at %= source.dim()
        if self._local(label.dims[at], label.whole.shape[at]) == label.whole.shape[at]:
            return source.narrow(at, start, stop - start)
        before = inside = 0
        for a, b in self.solution.ranges(label.dims[at], self.rank):
            before += max(0, min(b, start) - a)
            inside += max(0, min(b, stop) - max(a, start))
        return source.narrow(at, before, inside)

    def _getitem(self, source: Tensor, index: Any) -> Tensor:
        label = label_of(source)
        if label is None:
            return source[index]
        items = list(index) if isinstance(index, tuple) else [index]
        taken = sum(1 for item in items if item is not None and item is not Ellipsis)
        at, out = 0, []
        for item in items:
            if item is Ellipsis:
                at += source.dim() - taken
            elif (span := rules.as_range(item)) is not None:
                size = label.whole.shape[at]
                start, stop = span[0] % size, (span[1] - 1) % size + 1
                source, item = self._sliced(source, label, at, start, stop), slice(None)
                at += 1
            elif isinstance(item, slice):
                start, stop, step = item.indices(label.whole.shape[at])
                if step == 1:
                    source = self._sliced(source, label, at, start, max(start, stop))
                    item = slice(None)
                at += 1
            elif item is not None:
                at += 1
            out.append(item)
        return source[tuple(out)]

    def _sliced(self, source: Tensor, label: Label, at: int, start: int, stop: int) -> Tensor:
        # several slices of one index are taken one by one, each from the last
        source.__dict__.setdefault(_LABEL, label)
        return self._slice(source, at, start, stop)

    def _terms(self, args: Any, dims: list[Dim], whole: Tensor) -> list[Tensor]:
        """An einsum's operands, the whole ones sliced letter by letter."""
        operands = list(rules.tensors(args[1:]))
        terms, result = rules.equation(args[0], [tensor.dim() for tensor in operands])
        made = []
        for term, tensor in zip(terms, operands, strict=True):
            at = [result.find(letter) for letter in term]
            sizes = [whole.size(i) if i >= 0 else tensor.size(n) for n, i in enumerate(at)]
            meets = [dims[i] if i >= 0 else opaque(size) for i, size in zip(at, sizes, strict=True)]
            made.append(self._operand("", tensor, meets, torch.empty(sizes, device="meta")))
        return made

    def _aligned(
        self,
        name: str,
        args: Any,
        labels: list[list[Dim] | None],
        whole_outs: Sequence[Tensor],
    ) -> Any:
        """Arguments in which whole operands are sliced as the cut ones that they meet."""
        if isinstance(args, Tensor):
            return self._operand(name, args, labels[0] or [], whole_outs[0])
        if isinstance(args, (tuple, list)):
            return type(args)(self._aligned(name, arg, labels, whole_outs) for arg in args)
        return args

    def _aligned_kwargs(
        self,
        name: str,
        kwargs: dict[str, Any],
        labels: list[list[Dim] | None],
        whole_outs: Sequence[Tensor],
    ) -> dict[str, Any]:
        return {key: self._aligned(name, arg, labels, whole_outs) for key, arg in kwargs.items()}

    def _operand(self, name: str, tensor: Tensor, dims: list[Dim], whole: Tensor) -> Tensor:
        label = label_of(tensor)
        if label is not None and any(map(self.solution.is_cut_dim, label.dims)):
            return tensor
        meets = [self.solution.is_cut_dim(dim) for dim in dims]
        if not any(meets):
            return tensor
        if tensor.requires_grad and torch.is_grad_enabled():
            tensor = self.share(tensor)
        last = 2 if rules.is_product(name) else 0  # rows and columns of a product meet nothing
        for place in range(1 + last, min(len(dims), tensor.dim()) + 1):
            size = tensor.size(-place)
            if meets[-place] and size == whole.size(-place) != 1:
                ranges = self.solution.ranges(dims[-place], self.rank)
                at = tensor.dim() - place
                pieces = [tensor.narrow(at, a, b - a) for a, b in ranges]
                tensor = torch.cat(pieces, at) if len(pieces) != 1 else pieces[0]
        return tensor


class _Wholes:
    """Stand-ins for the whole of every tensor of a call, and the rules' view of them."""

    def __init__(self) -> None:
        self._labels: dict[int, tuple[Tensor, list[Dim] | None]] = {}

    def of(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            label = label_of(value)
            whole = label.whole if label is not None else value.detach().to("meta")
            self._labels[id(whole)] = (whole, None if label is None else label.dims)
            return whole
        if isinstance(value, dict):
            return {key: self.of(item) for key, item in value.items()}
        if isinstance(value, (tuple, list)):
            return type(value)(self.of(item) for item in value)
        return value

    def is_followed(self, tensor: Tensor) -> bool:
        return self._labels[id(tensor)][1] is not None

    def is_constant(self, tensor: Tensor) -> bool:
        return False

    def dims(self, tensor: Tensor) -> list[Dim]:
        dims = self._labels[id(tensor)][1]
        return [opaque(size) for size in tensor.shape] if dims is None else list(dims)


def _whole(value: Any) -> Any:
    if isinstance(value, Tensor):
        label = label_of(value)
        return value if label is None else label.whole
    if isinstance(value, dict):
        return {key: _whole(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(_whole(item) for item in value)
    return value
