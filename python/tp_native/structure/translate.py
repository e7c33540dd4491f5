"""Code with whole sizes written into it, run on one rank's pieces.

Inside a `Translator` the code sees the dense model's shapes: ``x.shape`` of a cut activation is the
whole's, ``view(B, T, n_head, C // n_head)`` and ``split(n_embd)`` are given local sizes, and a
whole operand (a bias of every head) is sliced where it meets a cut one. The rules are those that
the plan was made with, so what they don't know raises instead of giving something else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

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


@dataclass(eq=False)
class Label:
    """What a local tensor is a part of: the axes of its dimensions, and a stand-in for the whole
    on meta. ``local``: this rank's sizes, once they are known.
    """

    dims: list[Dim]
    whole: Tensor
    local: tuple[int, ...] | None = None


Local = Callable[[Any, dict[str, Any]], Any]  # a call on pieces, of its arguments
_Kept = TypeVar("_Kept")


def label_of(tensor: Tensor) -> Label | None:
    """The label of a cut activation."""
    return tensor.__dict__.get(_LABEL)


class Translator(TorchFunctionMode):
    """Runs a module's code on rank ``rank``'s pieces; ``share`` (`copy_to_ranks`) makes a whole
    operand's gradient the sum of the ranks'.

    What a call comes to is worked out once for each set of shapes and kept.
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
        self._leaf_labels: dict[Any, Label] = {}
        self._calls: dict[Any, tuple[Local, list[Label]]] = {}

    def label(self, tensor: Tensor, dims: Sequence[Dim]) -> Tensor:
        """Mark a local tensor as part of a whole with these axes."""
        sizes = [
            size_of(dim) if any(not axis.find().is_opaque for axis in dim) else tensor.shape[at]
            for at, dim in enumerate(dims)
        ]
        whole = torch.empty(sizes, dtype=tensor.dtype, device="meta")
        tensor.__dict__[_LABEL] = Label([*dims], whole)
        return tensor

    def leaf_output(self, y: Tensor, x: Tensor, axis: Axis | None) -> Tensor:
        """A leaf's output: labelled where ``axis`` is what its features are."""
        if axis is None:
            return y
        label = label_of(x)
        key = (axis, tuple(y.shape[:-1]), y.dtype, label)
        made = self._leaf_labels.get(key)
        if made is None:
            rows = y.dim() - 1
            dims = [opaque(size) for size in y.shape[:-1]] if label is None else label.dims[:rows]
            sizes = [*(y.shape[:-1] if label is None else label.whole.shape[:rows]), axis.size]
            whole = torch.empty(sizes, dtype=y.dtype, device="meta")
            made = _kept(self._leaf_labels, key, Label([*dims, [axis]], whole))
        y.__dict__[_LABEL] = made
        return y

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if all(label_of(tensor) is None for tensor in rules.tensors((args, kwargs))):
            return func(*args, **kwargs)
        name = rules.name_of(func)
        if name in _SHAPE:
            return func(*_whole(args), **_whole(kwargs))
        if name in rules.METADATA or (name in rules.CONSTANT and name.startswith("new_")):
            return func(*args, **kwargs)
        if name in _MOVES and args and (label := label_of(args[0])) is not None:
            moved = func(*args, **kwargs)  # nothing moves from meta
            whole = label.whole.to(moved.dtype)
            moved.__dict__[_LABEL] = Label(label.dims, whole, label.local)
            return moved
        key: Any = None
        call = None
        try:
            key = (func, _signature(args), _signature(kwargs), torch.is_grad_enabled())
            call = self._calls.get(key)
        except TypeError:  # an argument without a hash
            key = None
        if call is None:
            call = self._worked_out(func, name, args, kwargs)
            if key is not None:
                _kept(self._calls, key, call)
        local, labels = call
        result = local(args, kwargs)
        for out, label in zip(rules.tensors(result), labels, strict=True):
            out.__dict__[_LABEL] = label
        return result

    def _worked_out(
        self, func: Callable[..., Any], name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Local, list[Label]]:
        """What a call comes to on pieces, and its outputs' labels; tried once."""
        wholes = _Wholes()
        whole_args, whole_kwargs = wholes.of(args), wholes.of(kwargs)
        outs = list(rules.tensors(func(*whole_args, **whole_kwargs)))
        try:
            found = rules.follow(name, wholes, whole_args, whole_kwargs, outs)
        except rules.NotFollowed as reason:
            raise self._error(name, str(reason) or "not followed") from None
        for cut in self.solution.cuts:
            axis = cut.pair.axis.find()
            if axis.mixed is not None:
                why, axis.mixed = axis.mixed, None  # the next call starts anew
                raise self._error(name, why)
        labels = [
            Label(dims or [opaque(size) for size in whole.shape], whole)
            for dims, whole in zip(found, outs, strict=True)
        ]
        local = self._on_pieces(func, name, args, kwargs, labels)
        return partial(self._checked, name, local, labels), labels

    def _checked(
        self, name: str, local: Local, labels: list[Label], args: Any, kwargs: dict[str, Any]
    ) -> Any:
        result = local(args, kwargs)
        for out, label in zip(rules.tensors(result), labels, strict=True):
            if tuple(out.shape) != (expected := self._sizes(label)):
                raise self._error(name, f"gives {list(out.shape)}, expected {list(expected)}")
        return result

    def _error(self, name: str, why: str) -> TensorParallelError:
        return TensorParallelError(
            f"{self.place or 'the model'}: {name} can't run on a part of the model: {why}. Give "
            "its Linears other styles, for example "
            'tp.plan(model, n, rules={"...": "colwise_gather_output"})'
        )

    def _sizes(self, label: Label) -> tuple[int, ...]:
        """This rank's sizes of a whole."""
        if label.local is None:
            label.local = tuple(
                self.solution.local_size(dim, self.rank) if size_of(dim) == size else size
                for dim, size in zip(label.dims, label.whole.shape, strict=True)
            )
        return label.local

    # -- calls on pieces

    def _on_pieces(
        self,
        func: Callable[..., Any],
        name: str,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        labels: list[Label],
    ) -> Local:
        sizes = self._sizes(labels[0])
        source = next(rules.tensors((args, kwargs)))
        if name in _VIEWS and labels[0].whole.dtype == source.dtype:
            return lambda a, k: _first(a, k).reshape(sizes)
        if name in _EXPANDS:
            return lambda a, k: _first(a, k).expand(sizes)
        if name == "repeat_interleave":
            at = rules.argument(args, kwargs, 2, "dim")
            times = sizes[at] // max(source.size(at), 1)
            return lambda a, k: _first(a, k).repeat_interleave(times, at)
        if name in _SPLITS:
            at = rules.argument(args, kwargs, 2, "dim", default=0) % source.dim()
            parts = [self._sizes(label)[at] for label in labels]
            return lambda a, k: torch.split(_first(a, k), parts, at)
        if name == "narrow":
            at, start = (rules.argument(args, kwargs, i, n) for i, n in ((1, "dim"), (2, "start")))
            at, start = at % source.dim(), int(start)
            place = self._place(source, at, start, start + labels[0].whole.shape[at])
            return lambda a, k: _first(a, k).narrow(at, *place)
        if name == "__getitem__" and label_of(args[0]) is not None:
            return self._getitem(args[0], args[1])
        if name == "einsum":
            changes = self._terms(args, labels[0])
        else:
            changes = [
                self._operand(name, tensor, labels[0].dims, labels[0].whole.shape)
                for tensor in rules.tensors((args, kwargs))
            ]
        if all(change is None for change in changes):
            return lambda a, k: func(*a, **k)

        def aligned(a: Any, k: dict[str, Any]) -> Any:
            steps = iter(changes)
            return func(*_changed(a, steps), **_changed(k, steps))

        return aligned

    def _place(self, source: Tensor, at: int, start: int, stop: int) -> tuple[int, int]:
        """Where elements ``start:stop`` of a whole dimension lie on this rank: (start, length)."""
        label = label_of(source)
        assert label is not None
        size = label.whole.shape[at]
        start, stop = start % size if start < 0 else start, stop
        if self._sizes(label)[at] == size:
            return start, stop - start
        before = inside = 0
        for a, b in self.solution.ranges(label.dims[at], self.rank):
            before += max(0, min(b, start) - a)
            inside += max(0, min(b, stop) - max(a, start))
        return before, inside

    def _getitem(self, source: Tensor, index: Any) -> Local:
        label = label_of(source)
        assert label is not None
        items = list(index) if isinstance(index, tuple) else [index]
        taken = sum(1 for item in items if item is not None and item is not Ellipsis)
        at, places, out = 0, [], []
        for item in items:
            if item is Ellipsis:
                at += source.dim() - taken
            elif (span := rules.as_range(item)) is not None:
                size = label.whole.shape[at]
                start, stop = span[0] % size, (span[1] - 1) % size + 1
                places.append((at, *self._place(source, at, start, stop)))
                item = slice(None)
                at += 1
            elif isinstance(item, slice):
                start, stop, step = item.indices(label.whole.shape[at])
                if step == 1:
                    places.append((at, *self._place(source, at, start, max(start, stop))))
                    item = slice(None)
                at += 1
            elif item is not None:
                at += 1
            out.append(item)

        def local(a: Any, k: dict[str, Any]) -> Tensor:
            tensor: Tensor = a[0]
            for place in places:
                tensor = tensor.narrow(*place)
            # index tensors are this call's
            given = list(a[1]) if isinstance(a[1], tuple) else [a[1]]
            return tensor[
                tuple(g if isinstance(g, Tensor) else o for g, o in zip(given, out, strict=True))
            ]

        return local

    def _terms(self, args: Any, out: Label) -> list[Callable[[Tensor], Tensor] | None]:
        """What is done to an einsum's operands: the whole ones are sliced letter by letter."""
        operands = list(rules.tensors(args[1:]))
        terms, result = rules.equation(args[0], [tensor.dim() for tensor in operands])
        changes = []
        for term, tensor in zip(terms, operands, strict=True):
            at = [result.find(letter) for letter in term]
            sizes = [
                out.whole.size(i) if i >= 0 else size
                for i, size in zip(at, tensor.shape, strict=True)
            ]
            dims = [
                out.dims[i] if i >= 0 else opaque(size) for i, size in zip(at, sizes, strict=True)
            ]
            changes.append(self._operand("", tensor, dims, sizes))
        return changes

    def _operand(
        self, name: str, tensor: Tensor, dims: Sequence[Dim], sizes: Sequence[int]
    ) -> Callable[[Tensor], Tensor] | None:
        """What is done to an operand: a whole one is sliced as the cut ones that it meets."""
        label = label_of(tensor)
        if label is not None and any(map(self.solution.is_cut_dim, label.dims)):
            return None
        meets = [self.solution.is_cut_dim(dim) for dim in dims]
        if not any(meets):
            return None
        # a whole part of a cut layer's output has its gradient summed in that layer
        shares = label is None and tensor.requires_grad and torch.is_grad_enabled()
        last = 2 if rules.is_product(name) else 0  # rows and columns of a product meet nothing
        slices = []
        for place in range(1 + last, min(len(dims), tensor.dim()) + 1):
            if meets[-place] and tensor.size(-place) == sizes[-place] != 1:
                ranges = self.solution.ranges(dims[-place], self.rank)
                slices.append((tensor.dim() - place, tuple(ranges)))
        if not shares and not slices:
            return None

        def change(operand: Tensor) -> Tensor:
            operand = self.share(operand) if shares else operand
            for at, ranges in slices:
                pieces = [operand.narrow(at, a, b - a) for a, b in ranges]
                operand = pieces[0] if len(pieces) == 1 else torch.cat(pieces, at)
            return operand

        return change


def _first(args: Any, kwargs: dict[str, Any]) -> Tensor:
    return next(rules.tensors((args, kwargs)))


def _changed(value: Any, steps: Iterator[Callable[[Tensor], Tensor] | None]) -> Any:
    """Arguments with each tensor, in `rules.tensors`'s order, changed as the next step says."""
    if isinstance(value, Tensor):
        step = next(steps)
        return value if step is None else step(value)
    if isinstance(value, dict):
        return {key: _changed(item, steps) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(_changed(item, steps) for item in value)
    return value


_MOST_KEPT = 4096


def _kept(table: dict[Any, _Kept], key: Any, value: _Kept) -> _Kept:
    if len(table) >= _MOST_KEPT:
        table.clear()
    table[key] = value
    return value


def _signature(value: Any) -> Any:
    """What of the arguments decides what a call comes to."""
    if isinstance(value, Tensor):
        label = label_of(value)
        if label is not None:
            return label
        return (tuple(value.shape), value.dtype, value.requires_grad)
    if isinstance(value, (tuple, list)):
        return (type(value), *map(_signature, value))
    if isinstance(value, dict):
        return tuple((key, _signature(item)) for key, item in value.items())
    if isinstance(value, slice):
        return (slice, value.start, value.stop, value.step)
    return (type(value), value)


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
