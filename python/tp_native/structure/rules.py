"""What torch's functions do to the axes of their inputs; one rule for each kind of function.

A rule takes the call's arguments and gives the axes of every output. It raises `NotFollowed` where
it can't tell, and the caller then mixes whatever went in.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from .axes import (
    Axis,
    Dim,
    join,
    leaves,
    meet_whole,
    mix,
    mix_crossed,
    opaque,
    regroup,
    segment,
    size_of,
    united,
)


class NotFollowed(Exception):
    """The rules can't tell which axes come out of a call."""


class Lookup(Protocol):
    """What a rule may ask about a tensor."""

    def is_followed(self, tensor: Tensor) -> bool: ...
    def is_constant(self, tensor: Tensor) -> bool: ...
    def dims(self, tensor: Tensor) -> list[Dim]: ...


Args = tuple[Any, ...]
Kwargs = Mapping[str, Any]
Rule = Callable[[Lookup, Args, Kwargs, Sequence[Tensor]], list[list[Dim]]]

_RULES: dict[str, Rule] = {}

# Metadata getters: reading a weight's dtype is not using the weight.
METADATA = frozenset(
    {
        "dtype", "device", "shape", "ndim", "requires_grad", "is_leaf", "grad_fn", "layout",
        "is_meta", "is_cuda", "is_cpu", "is_sparse", "is_nested", "is_quantized", "names", "is_mps",
        "is_xpu", "is_mkldnn", "grad", "itemsize", "nbytes", "is_mtia", "is_ipu", "is_xla",
        "is_vulkan", "is_maia", "is_sparse_csr", "output_nr", "_version", "retains_grad",
        "size", "dim", "numel", "nelement", "element_size", "stride", "is_contiguous",
        "is_floating_point", "is_complex", "get_device", "data_ptr", "storage_offset",
        "__len__", "ndimension", "is_same_size", "untyped_storage", "is_inference",
        "__hash__", "is_signed", "is_pinned", "is_shared",
    }
)  # fmt: skip

# Functions that draw random numbers where their dropout is not 0.
RANDOM = frozenset(
    [
        "dropout",
        "alpha_dropout",
        "feature_dropout",
        "feature_alpha_dropout",
        "dropout1d",
        "dropout2d",
        "dropout3d",
        "scaled_dot_product_attention",
    ]
)

# Makers of tensors that hold one number everywhere.
CONSTANT = frozenset(
    {"zeros", "ones", "full", "empty", "zeros_like", "ones_like", "full_like", "empty_like"}
    | {"new_zeros", "new_ones", "new_full", "new_empty"}
)
# Another name for a function, where torch's tags don't know it.
_DUNDERS = {
    "truediv": "div",
    "rtruediv": "div",
    "idiv": "div",
    "itruediv": "div",
    "rdiv": "div",
    "floordiv": "floor_divide",
    "rfloordiv": "floor_divide",
    "mod": "remainder",
    "and": "bitwise_and",
    "or": "bitwise_or",
    "xor": "bitwise_xor",
    "invert": "bitwise_not",
    "rmatmul": "matmul",
}
# Element-wise, though torch does not tag them so.
_ALSO_POINTWISE = frozenset(
    {
        "contiguous", "dropout", "alpha_dropout", "requires_grad_", "where", "fill", "zero", "copy",
        "bool", "int", "long", "cpu", "cuda", "relu", "positive", "clip", "alias", "lift_fresh",
        "zeros_like", "ones_like", "full_like", "empty_like", "floor_divide", "true_divide",
        "subtract", "multiply", "divide", "negative", "absolute", "arccos", "arcsin", "arctan",
        "arctan2", "greater", "greater_equal", "less", "less_equal", "not_equal", "float_power",
        "softsign", "log_sigmoid", "hardswish", "_threshold", "tanhshrink", "expit", "complex",
        "special_expit", "polar", "real", "imag", "conj", "resolve_conj", "fix", "isreal",
    }
)  # fmt: skip
KEEPS_CONSTANT = frozenset(
    {
        "to", "float", "double", "half", "bfloat16", "type", "type_as", "contiguous", "clone",
        "detach", "view", "reshape", "expand", "unsqueeze", "squeeze", "__getitem__", "transpose",
        "permute", "mul", "add", "sub", "div", "neg", "__mul__", "__add__",
    }
)  # fmt: skip


def name_of(func: Callable[..., Any]) -> str:
    """A function's name; a property's for its getter."""
    name: str = getattr(func, "__name__", type(func).__name__)
    if name == "__get__":
        name = getattr(getattr(func, "__self__", None), "__name__", name)
    return name


def tensors(value: Any) -> Iterator[Tensor]:
    """Every tensor in nested containers and dataclasses."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors(item)
    elif isinstance(value, Mapping):
        yield from tensors(list(value.values()))
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        yield from tensors([getattr(value, f.name, None) for f in dataclasses.fields(value)])


def constants(value: Any) -> Iterator[Any]:
    """Numbers, names and dtypes among the arguments."""
    if isinstance(value, (bool, int, float, str, torch.dtype)):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from constants(item)
    elif isinstance(value, Mapping):
        for key in value:
            yield from constants(value[key])


def drop_probability(name: str, args: Args, kwargs: Kwargs) -> float:
    """With which probability one of `RANDOM` drops an element in this call."""
    if name == "scaled_dot_product_attention":
        return float(argument(args, kwargs, 4, "dropout_p", default=0.0))
    drops = argument(args, kwargs, 2, "training", "train", default=True)
    return float(argument(args, kwargs, 1, "p", default=0.5)) if drops else 0.0


def follow(
    name: str, lookup: Lookup, args: Args, kwargs: Kwargs, outs: Sequence[Tensor]
) -> list[list[Dim] | None]:
    """The axes of each output of ``name``.

    Raises: NotFollowed.
    """
    base = _base(name)
    rule = _RULES.get(base)
    if rule is None:
        if not _is_pointwise(base):
            raise NotFollowed("not known")
        rule = _pointwise
    try:
        labels = rule(lookup, args, kwargs, outs)
    except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
        raise NotFollowed(f"arguments that are not understood ({error})") from error
    for dims, out in zip(labels, outs, strict=True):
        if [size_of(dim) for dim in dims] != list(out.shape):
            raise NotFollowed("a shape that is not understood")
        mix_crossed(dims)
    return list(labels)


def _base(name: str) -> str:
    if name == "__getitem__":
        return name
    if name.startswith("__") and name.endswith("__"):
        inner = name[2:-2]
        if inner in _DUNDERS:
            return _DUNDERS[inner]
        for stem in (inner, inner[1:]):
            if stem in _RULES or _is_pointwise(stem):
                return _DUNDERS.get(stem, stem)
            if stem in _DUNDERS:
                return _DUNDERS[stem]
        return inner
    if name.startswith("_") and not name.startswith("__"):
        return name
    return name[:-1] if name.endswith("_") and name != "requires_grad_" else name


@functools.cache
def _is_pointwise(base: str) -> bool:
    if base in _ALSO_POINTWISE:
        return True
    packet = getattr(torch.ops.aten, base, None)
    if packet is None or not hasattr(packet, "overloads"):
        return False
    return any(
        torch.Tag.pointwise in getattr(packet, overload).tags for overload in packet.overloads()
    )


def _rule(*names: str) -> Callable[[Rule], Rule]:
    def add(rule: Rule) -> Rule:
        _RULES.update(dict.fromkeys(names, rule))
        return rule

    return add


def argument(args: Args, kwargs: Kwargs, at: int, *names: str, default: Any = None) -> Any:
    """A function's argument by its place or one of its names."""
    if at < len(args):
        return args[at]
    return next((kwargs[name] for name in names if name in kwargs), default)


def _first(args: Args, kwargs: Kwargs) -> Tensor:
    given = next(tensors((args, kwargs)), None)
    if given is None:
        raise NotFollowed("no tensor")
    return given


def _blank(tensor: Tensor) -> list[Dim]:
    return [opaque(size) for size in tensor.shape]


# -- joins


def broadcast(
    lookup: Lookup, operands: Sequence[tuple[Tensor, Sequence[Dim]]], sizes: Sequence[int]
) -> list[Dim]:
    """Join operands' dimensions, aligned on the right, as broadcasting does."""
    out: list[Dim] = []
    for place in range(1, len(sizes) + 1):
        here: Dim | None = None
        plain = False
        for tensor, dims in operands:
            if place > len(dims):
                continue
            dim = dims[-place]
            if size_of(dim) == 1 and sizes[-place] != 1:
                continue
            if size_of(dim) != sizes[-place]:
                raise NotFollowed("not broadcast")
            if not lookup.is_followed(tensor):
                plain |= not lookup.is_constant(tensor)
            elif here is None:
                here = dim
            else:
                join(here, dim, "a join of axes that can't be cut alike")
                here = united(here, dim)
        if here is None:
            here = opaque(sizes[-place])
        elif plain and sizes[-place] != 1:
            tracked = [axis for axis in leaves(here) if not axis.is_opaque]
            meet_whole(tracked, "an activation that every rank has whole")
        out.append(here)
    return out[::-1]


def _pointwise(
    lookup: Lookup, args: Args, kwargs: Kwargs, outs: Sequence[Tensor]
) -> list[list[Dim]]:
    given = list(tensors((args, kwargs)))
    operands = [(t, lookup.dims(t)) for t in given]
    for out in outs:
        if any(t.dim() > out.dim() for t in given):
            raise NotFollowed("not element-wise")
    return [broadcast(lookup, operands, out.shape) for out in outs]


@_rule("to", "type", "type_as", "float", "double", "half", "bfloat16", "detach", "clone", "data")
def _same(lookup: Lookup, args: Args, kwargs: Kwargs, outs: Sequence[Tensor]) -> list[list[Dim]]:
    return [lookup.dims(_first(args, kwargs))]


# -- views


@_rule(
    "view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "contiguous", "view_as",
    "reshape_as", "ravel", "_unsafe_view", "atleast_2d", "atleast_3d",
)  # fmt: skip
def _view(lookup: Lookup, args: Args, kwargs: Kwargs, outs: Sequence[Tensor]) -> list[list[Dim]]:
    source = _first(args, kwargs)
    if source.numel() != outs[0].numel():
        raise NotFollowed("another dtype")
    if not lookup.is_followed(source):
        return [_blank(outs[0])]
    return [regroup(lookup.dims(source), outs[0].shape)]


@_rule("view_as_complex")
def _view_as_complex(
    lookup: Lookup, args: Args, kwargs: Kwargs, outs: Sequence[Tensor]
) -> list[list[Dim]]:
    dims = lookup.dims(_first(args, kwargs))
    mix(dims[-1], "a pair that makes a complex number")
    return [dims[:-1]]


@_rule("view_as_real")
def _view_as_real(
    lookup: Lookup, args: Args, kwargs: Kwargs, outs: Sequence[Tensor]
) -> list[list[Dim]]:
    return [[*lookup.dims(_first(args, kwargs)), opaque(2)]]


def _permuted(dims: list[Dim], order: Sequence[int]) -> list[list[Dim]]:
    return [[dims[i] for i in order]]


@_rule("transpose", "swapaxes", "swapdims")
def _transpose(
    lookup: Lookup, args: Args, kwargs: Kwargs, outs: Sequence[Tensor]
) -> list[list[Dim]]:
    dims = lookup.dims(_first(args, kwargs))
    order = list(range(len(dims)))
    a = argument(args, kwargs, 1, "dim0", "axis0")
    b = argument(args, kwargs, 2, "dim1", "axis1")
    order[a], order[b] = order[b], order[a]
    return _permuted(dims, order)


@_rule("permute")
def _permute(lookup: Lookup, args: Args, kwargs: Kwargs, outs: Sequence[Tensor]) -> list[list[Dim]]:
    order = kwargs.get("dims", args[1:])
    order = order[0] if len(order) == 1 and isinstance(order[0], (tuple, list)) else order
    return _permuted(lookup.dims(_first(args, kwargs)), order)


@_rule("movedim", "moveaxis")
def _movedim(lookup: Lookup, args: Args, kwargs: Kwargs, outs: Sequence[Tensor]) -> list[list[Dim]]:
    dims = lookup.dims(_first(args, kwargs))
    source = _places(argument(args, kwargs, 1, "source"), len(dims))
    target = _places(argument(args, kwargs, 2, "destination"), len(dims))
    order = [place for place in range(len(dims)) if place not in source]
    for to, place in sorted(zip(target, source, strict=True)):
        order.insert(to, place)
    return _permuted(dims, order)


@_rule("mT", "mH", "t", "adjoint")
def _t(lookup: Lookup, args: Args, kwargs: Kwargs, outs: Sequence[Tensor]) -> list[list[Dim]]:
    dims = lookup.dims(_first(args, kwargs))
    return [[*dims[:-2], *dims[:-3:-1]]] if len(dims) > 1 else [dims]


@_rule("T", "H")
def _reversed(
    lookup: Lookup, args: Args, kwargs: Kwargs, outs: Sequence[Tensor]
) -> list[list[Dim]]:
    return [lookup.dims(_first(args, kwargs))[::-1]]


@_rule("expand", "expand_as", "broadcast_to")
def _expand(lookup: Lookup, args: Args, kwargs: Kwargs, outs: Sequence[Tensor]) -> list[list[Dim]]:
    dims = lookup.dims(_first(args, kwargs))
    out: list[Dim] = []
    for place in range(1, outs[0].dim() + 1):
        size = outs[0].size(-place)
        if place > len(dims) or (size_of(dims[-place]) == 1 and size != 1):
            out.append([Axis(size, is_open=True)] if size != 1 else [])
        else:
            out.append(dims[-place])
    return [out[::-1]]


@_rule("repeat", "tile")
def _repeat(lookup: Lookup, args: Args, kwargs: Kwargs, outs: Sequence[Tensor]) -> list[list[Dim]]:
    dims = lookup.dims(_first(args, kwargs))
    out = []
    for place in range(1, outs[0].dim() + 1):
        dim = dims[-place] if place <= len(dims) else []
        times = outs[0].size(-place) // max(size_of(dim), 1)
        out.append([Axis(times, is_open=True), *dim] if times != 1 else dim)
    return [out[::-1]]


@_rule("repeat_interleave")
def _interleave(
    lookup: Lookup, args: Args, kwargs: Kwargs, outs: Sequence[Tensor]
) -> list[list[Dim]]:
    times, at = argument(args, kwargs, 1, "repeats"), argument(args, kwargs, 2, "dim")
    if not isinstance(times, int) or not isinstance(at, int):
        raise NotFollowed("uneven repeats")
    dims = lookup.dims(_first(args, kwargs))
    dims[at] = [*dims[at], Axis(times, is_open=True)]
    return [dims]


# -- slices


def _sliced(dim: Dim, start: int, stop: int) -> Dim:
    size = size_of(dim)
    if (start, stop) == (0, size):
        return dim
    found = leaves(dim)
    if all(axis.is_opaque for axis in found):
        return opaque(stop - start)
    if len(found) == 1 and stop > start:
        part = segment(found[0], start, stop)
        if part is not None:
            return [part]
    mix(dim, f"a slice {start}:{stop} of {size}")
    return opaque(stop - start)


@_rule("split", "chunk", "tensor_split", "split_with_sizes", "unsafe_chunk", "unsafe_split")
def _split(lookup: Lookup, args: Args, kwargs: Kwargs, outs: Sequence[Tensor]) -> list[list[Dim]]:
    dims = lookup.dims(_first(args, kwargs))
    at = argument(args, kwargs, 2, "dim", default=0) % len(dims)
    made, start = [], 0
    if sum(out.size(at) for out in outs) != size_of(dims[at]):
        raise NotFollowed("pieces that are not the whole")
    for out in outs:
        stop = start + out.size(at)
        made.append([*dims[:at], _sliced(dims[at], start, stop), *dims[at + 1 :]])
        start = stop
    return made


@_rule("narrow")
def _narrow(lookup: Lookup, args: Args, kwargs: Kwargs, outs: Sequence[Tensor]) -> list[list[Dim]]:
    dims = lookup.dims(_first(args, kwargs))
    at, start = argument(args, kwargs, 1, "dim"), argument(args, kwargs, 2, "start")
    if not isinstance(start, int):
        raise NotFollowed("a start that is a tensor")
    start %= max(size_of(dims[at]), 1)
    dims[at] = _sliced(dims[at], start, start + outs[0].size(at))
    return [dims]


@_rule("select")
def _select(lookup: Lookup, args: Args, kwargs: Kwargs, outs: Sequence[Tensor]) -> list[list[Dim]]:
    dims = lookup.dims(_first(args, kwargs))
    at = argument(args, kwargs, 1, "dim") % len(dims)
    mix(dims[at], "an index into it")
    return [[*dims[:at], *dims[at + 1 :]]]


@_rule("unbind")
def _unbind(lookup: Lookup, args: Args, kwargs: Kwargs, outs: Sequence[Tensor]) -> list[list[Dim]]:
    dims = lookup.dims(_first(args, kwargs))
    at = argument(args, kwargs, 1, "dim", default=0) % len(dims)
    mix(dims[at], "an index into it")
    return [[*dims[:at], *dims[at + 1 :]] for _ in outs]


@_rule("index_select")
def _index_select(
    lookup: Lookup, args: Args, kwargs: Kwargs, outs: Sequence[Tensor]
) -> list[list[Dim]]:
    dims = lookup.dims(_first(args, kwargs))
    at = argument(args, kwargs, 1, "dim")
    mix(dims[at], "an index into it")
    dims[at] = opaque(outs[0].size(at))
    return [dims]


@_rule("__getitem__")
def _getitem(lookup: Lookup, args: Args, kwargs: Kwargs, outs: Sequence[Tensor]) -> list[list[Dim]]:
    source, index = args[0], args[1]
    items = list(index) if isinstance(index, tuple) else [index]
    takes = sum(1 for item in items if item is not None and item is not Ellipsis)
    if any(isinstance(item, (Tensor, list)) and as_range(item) is None for item in items):
        return _advanced(lookup, source, items, outs[0])
    if Ellipsis not in [item if item is Ellipsis else None for item in items]:
        items.append(Ellipsis)
    out: list[Dim] = []
    dims, at = lookup.dims(source), 0
    for item in items:
        if item is None:
            out.append([])
        elif item is Ellipsis:
            rest = len(dims) - takes
            out += dims[at : at + rest]
            at += rest
        else:
            if isinstance(item, int):
                mix(dims[at], "an index into it")
            else:
                out.append(_range(dims[at], item))
            at += 1
    if [size_of(dim) for dim in out] != list(outs[0].shape):
        raise NotFollowed("an index that is not understood")
    return [out]


@_rule("__setitem__")
def _setitem(lookup: Lookup, args: Args, kwargs: Kwargs, outs: Sequence[Tensor]) -> list[list[Dim]]:
    """``x[index] = value``: what comes out is ``x``."""
    target, index, value = args
    if not lookup.is_followed(target):
        raise NotFollowed("it writes into what comes from no weight")
    part = target.detach()[index]
    (dims,) = _getitem(lookup, (target, index), {}, [part])
    if isinstance(value, Tensor):
        extra = max(value.dim() - part.dim(), 0)  # leading ones
        given = (value, lookup.dims(value)[extra:])
        broadcast(lookup, [(target, dims), given], part.shape)
    return [lookup.dims(outs[0])]


def _range(dim: Dim, item: Any) -> Dim:
    size = size_of(dim)
    if isinstance(item, list):
        start, stop = as_range(item) or (0, 0)
        start, stop = start % size, (stop - 1) % size + 1
        return _sliced(dim, start, stop)
    if not isinstance(item, slice):
        raise NotFollowed("an index that is not understood")
    start, stop, step = item.indices(size)
    if step != 1:
        mix(dim, "a slice with steps")
        return opaque(len(range(start, stop, step)))
    return _sliced(dim, start, max(start, stop))


def as_range(item: Any) -> tuple[int, int] | None:
    """Start and stop of a list of neighbours."""
    if not isinstance(item, list) or not item or not all(type(i) is int for i in item):
        return None
    first = item[0]
    if first < 0 <= first + len(item) - 1:
        return None
    return (first, first + len(item)) if item == list(range(first, first + len(item))) else None


def starts(name: str, args: Args, kwargs: Kwargs) -> list[tuple[int, int]]:
    """(dimension, first element) of each slice and index that a call takes."""
    try:
        if name in ("narrow", "select"):
            x, at = _first(args, kwargs), argument(args, kwargs, 1, "dim")
            first = argument(args, kwargs, 2, "start", "index")
            return [(at % x.dim(), first % max(x.size(at), 1))] if isinstance(first, int) else []
        is_index = name in ("__getitem__", "__setitem__")
        return _starts_of_index(args[0], args[1]) if is_index else []
    except (TypeError, ValueError, LookupError, ArithmeticError):
        return []


def _starts_of_index(source: Tensor, index: Any) -> list[tuple[int, int]]:
    items = list(index) if isinstance(index, tuple) else [index]
    takes = [
        0 if item is None or isinstance(item, bool)
        else item.dim() if isinstance(item, Tensor) and item.dtype == torch.bool
        else 1
        for item in items
    ]  # fmt: skip
    found, at = [], 0
    for item, count in zip(items, takes, strict=True):
        if item is Ellipsis:
            at += source.dim() - sum(takes) + 1
            continue
        size = source.size(at) if count else 0
        if isinstance(item, slice):
            found.append((at, item.indices(size)[0]))
        elif type(item) is int:
            found.append((at, item % size))
        elif (span := as_range(item)) is not None:
            found.append((at, span[0] % size))
        at += count
    return found


def _advanced(lookup: Lookup, source: Tensor, items: list[Any], out: Tensor) -> list[list[Dim]]:
    """One index tensor among full slices: that dimension alone is taken apart."""
    special = [i for i, item in enumerate(items) if isinstance(item, (Tensor, list))]
    plain = all(item == slice(None) for i, item in enumerate(items) if i not in special)
    if len(special) != 1 or not plain or not isinstance(items[special[0]], Tensor):
        raise NotFollowed("several index tensors")
    dims, at, index = lookup.dims(source), special[0], items[special[0]]
    if index.dtype in (torch.bool, torch.uint8):
        raise NotFollowed("a mask as index")
    mix(dims[at], "an index into it")
    return [[*dims[:at], *lookup.dims(index), *dims[at + 1 :]]]


@_rule("cat", "concat", "concatenate")
def _cat(lookup: Lookup, args: Args, kwargs: Kwargs, outs: Sequence[Tensor]) -> list[list[Dim]]:
    given = [t for t in argument(args, kwargs, 0, "tensors") if t.dim() == outs[0].dim()]
    at = argument(args, kwargs, 1, "dim", "axis", default=0) % outs[0].dim()
    for tensor in given:
        mix(lookup.dims(tensor)[at], "a concatenation along it")
    sizes = list(outs[0].shape)
    sizes[at] = 1
    operands = []
    for tensor in given:
        dims = lookup.dims(tensor)
        dims[at] = []
        operands.append((tensor, dims))
    out = broadcast(lookup, operands, sizes)
    out[at] = opaque(outs[0].size(at))
    return [out]


@_rule("stack")
def _stack(lookup: Lookup, args: Args, kwargs: Kwargs, outs: Sequence[Tensor]) -> list[list[Dim]]:
    given = argument(args, kwargs, 0, "tensors")
    at = argument(args, kwargs, 1, "dim", default=0) % outs[0].dim()
    out = broadcast(lookup, [(t, lookup.dims(t)) for t in given], given[0].shape)
    return [[*out[:at], opaque(len(given)), *out[at:]]]


@_rule("pad")
def _pad(lookup: Lookup, args: Args, kwargs: Kwargs, outs: Sequence[Tensor]) -> list[list[Dim]]:
    source = _first(args, kwargs)
    dims, by = lookup.dims(source), list(argument(args, kwargs, 1, "pad"))
    for place in range(1, len(by) // 2 + 1):
        if by[2 * place - 2 : 2 * place] != [0, 0]:
            mix(dims[-place], "padding along it")
            dims[-place] = opaque(outs[0].size(-place))
    return [dims]


# -- products


_PRODUCTS = frozenset({"matmul", "bmm", "mm", "baddbmm", "scaled_dot_product_attention", "linear"})


def is_product(name: str) -> bool:
    """Whether a function multiplies matrices: its last two dimensions meet nothing."""
    return _base(name) in _PRODUCTS


@_rule("matmul", "bmm", "mm", "mv", "dot", "inner", "vdot")
def _matmul(lookup: Lookup, args: Args, kwargs: Kwargs, outs: Sequence[Tensor]) -> list[list[Dim]]:
    a, b = _operands(args, kwargs, ("input", "self"), ("other", "mat2", "vec", "tensor"))
    return [_product(lookup, a, b, outs[0])]


def _operands(args: Args, kwargs: Kwargs, *names: tuple[str, ...]) -> list[Tensor]:
    found = [argument(args, kwargs, at, *given) for at, given in enumerate(names)]
    if not all(isinstance(tensor, Tensor) for tensor in found):
        raise NotFollowed("operands that are not tensors")
    return found


def _product(lookup: Lookup, a: Tensor, b: Tensor, out: Tensor) -> list[Dim]:
    left, right = lookup.dims(a), lookup.dims(b)
    summed = right[-2] if len(right) > 1 else right[-1]
    mix([*left[-1], *summed], "a product that sums over it")
    rows, columns = left[-2:-1], right[-1:] if len(right) > 1 else []
    sizes = out.shape[: out.dim() - len(rows) - len(columns)]
    batch = broadcast(lookup, [(a, left[:-2]), (b, right[:-2])], sizes)
    return [*batch, *rows, *columns]


@_rule("baddbmm", "addmm")
def _addmm(lookup: Lookup, args: Args, kwargs: Kwargs, outs: Sequence[Tensor]) -> list[list[Dim]]:
    names = (("input", "self"), ("batch1", "mat1"), ("batch2", "mat2"))
    c, a, b = _operands(args, kwargs, *names)
    product = _product(lookup, a, b, outs[0])
    return [_added(lookup, (a, b), product, c, outs[0])]


def _added(
    lookup: Lookup, given: Sequence[Tensor], product: list[Dim], c: Tensor, out: Tensor
) -> list[Dim]:
    """A product plus something: followed where one of the product's operands is."""
    one = next((tensor for tensor in given if lookup.is_followed(tensor)), given[0])
    return broadcast(lookup, [(one, product), (c, lookup.dims(c))], out.shape)


@_rule("linear")
def _linear(lookup: Lookup, args: Args, kwargs: Kwargs, outs: Sequence[Tensor]) -> list[list[Dim]]:
    x, weight = _operands(args, kwargs, ("input",), ("weight",))
    bias = argument(args, kwargs, 2, "bias")
    dims, rows = lookup.dims(x), lookup.dims(weight)
    mix([*dims[-1], *rows[-1]], "a product that sums over it")
    made = [*dims[:-1], *rows[:-1]]
    return [made if bias is None else _added(lookup, (x, weight), made, bias, outs[0])]


@_rule("outer", "ger")
def _outer(lookup: Lookup, args: Args, kwargs: Kwargs, outs: Sequence[Tensor]) -> list[list[Dim]]:
    a, b = _operands(args, kwargs, ("input", "self"), ("vec2", "other"))
    return [[*lookup.dims(a), *lookup.dims(b)]]


@_rule("einsum")
def _einsum(lookup: Lookup, args: Args, kwargs: Kwargs, outs: Sequence[Tensor]) -> list[list[Dim]]:
    if not isinstance(args[0], str):
        raise NotFollowed("an equation of numbers")
    operands = list(tensors(args[1:]))
    terms, result = equation(args[0], [tensor.dim() for tensor in operands])
    held: dict[str, list[tuple[Tensor, Dim]]] = {}
    for term, tensor in zip(terms, operands, strict=True):
        for letter, dim in zip(term, lookup.dims(tensor), strict=True):
            held.setdefault(letter, []).append((tensor, dim))
    joined: dict[str, Dim] = {}
    for letter, places in held.items():
        size = max(size_of(dim) for _, dim in places)
        (joined[letter],) = broadcast(lookup, [(t, [dim]) for t, dim in places], [size])
        if letter not in result:
            for _, dim in places:
                mix(dim, "a product that sums over it")
    return [[joined[letter] for letter in result]]


def equation(text: str, ranks: Sequence[int]) -> tuple[list[str], str]:
    """The letters of each operand's dimensions and of the result's; digits for those of ``...``."""
    given, arrow, result = text.replace(" ", "").partition("->")
    terms = given.split(",")
    dots = max(
        (rank - len(t) + 3 for t, rank in zip(terms, ranks, strict=True) if "..." in t), default=0
    )
    digits = "0123456789"[:dots]
    if len(digits) != dots:
        raise NotFollowed("an equation of many dimensions")
    if not arrow:
        letters = sorted(set(given) - set(",."))
        result = "..." + "".join(x for x in letters if given.count(x) == 1)
    spelt = [
        term.replace("...", digits[dots - (rank - len(term) + 3) :] if "..." in term else "")
        for term, rank in zip(terms, ranks, strict=True)
    ]
    return spelt, result.replace("...", digits)


@_rule("scaled_dot_product_attention")
def _attention(
    lookup: Lookup, args: Args, kwargs: Kwargs, outs: Sequence[Tensor]
) -> list[list[Dim]]:
    names = (("query",), ("key",), ("value",), ("attn_mask",))
    q, k, v, mask = (argument(args, kwargs, i, *which) for i, which in enumerate(names))
    dq, dk, dv = (lookup.dims(t) for t in (q, k, v))
    mix([*dq[-1], *dk[-1]], "a product that sums over it")
    mix([*dk[-2], *dv[-2]], "a product that sums over it")
    heads = q.size(-3) if q.dim() > 3 else 1
    for tensor, dims in ((k, dk), (v, dv)):
        if q.dim() > 3 and tensor.size(-3) not in (1, heads):
            if kwargs.get("enable_gqa") is not True:
                raise NotFollowed("heads that differ")
            if any(axis.is_opaque for dim in (dq[-3], dims[-3]) for axis in leaves(dim)):
                # on a part of the one and all of the other, queries would find other keys
                mix([*dq[-3], *dims[-3]], "a grouping of heads")
            dims[-3] = [*dims[-3], Axis(heads // tensor.size(-3), is_open=True)]
    batch = broadcast(lookup, [(q, dq[:-2]), (k, dk[:-2]), (v, dv[:-2])], [*outs[0].shape[:-2]])
    rows = dq[-2]
    if argument(args, kwargs, 5, "is_causal"):
        mix(rows, "a mask that counts it")
    if isinstance(mask, Tensor):
        shape = [*outs[0].shape[:-1], k.size(-2)]
        one = next((tensor for tensor in (q, k, v) if lookup.is_followed(tensor)), q)
        meets = [(one, [*batch, rows, []]), (k, [dk[-2]]), (mask, lookup.dims(mask))]
        *batch, rows, summed = broadcast(lookup, meets, shape)
        mix(summed, "a product that sums over it")
    return [[*batch, rows, dv[-1]]]


# -- along one dimension


def _places(given: Any, rank: int) -> list[int]:
    if given is None:
        return list(range(rank))
    listed = [given] if isinstance(given, int) else list(given)
    if any(isinstance(place, bool) for place in listed):
        raise NotFollowed("dimensions that are not numbers")
    return [place % rank for place in listed]


def _dim_of(args: Args, kwargs: Kwargs, at: int, default: Any = None) -> Any:
    return argument(args, kwargs, at, "dim", "dims", "axis", default=default)


def _along(
    lookup: Lookup,
    args: Args,
    kwargs: Kwargs,
    outs: Sequence[Tensor],
    *,
    at: int,
    default: int | None = None,
) -> list[list[Dim]]:
    """Its output is its input's shape, and elements depend on each other along some dimensions
    only: the argument number ``at``.
    """
    dims = lookup.dims(_first(args, kwargs))
    for place in _places(_dim_of(args, kwargs, at, default), len(dims)):
        mix(dims[place], "a function along it")
    return [dims for _ in outs]


for _name in ("softmax", "log_softmax", "softmin", "cumsum", "cumprod", "logcumsumexp", "cummax"):
    _RULES[_name] = functools.partial(_along, at=1)
_RULES["cummin"] = _RULES["cummax"]
_RULES["sort"] = _RULES["argsort"] = functools.partial(_along, at=1, default=-1)
_RULES["normalize"] = functools.partial(_along, at=2, default=1)
_RULES["roll"] = functools.partial(_along, at=2)


@_rule("flip")
def _flip(lookup: Lookup, args: Args, kwargs: Kwargs, outs: Sequence[Tensor]) -> list[list[Dim]]:
    listed = kwargs.get("dims", args[1:])
    listed = listed[0] if len(listed) == 1 and isinstance(listed[0], (tuple, list)) else listed
    return _along(lookup, (args[0], listed), {}, outs, at=1)


@_rule("tril", "triu")
def _triangle(
    lookup: Lookup, args: Args, kwargs: Kwargs, outs: Sequence[Tensor]
) -> list[list[Dim]]:
    dims = lookup.dims(_first(args, kwargs))
    mix([*dims[-2], *dims[-1]], "a triangle of it")
    return [dims]


def _reduce(
    lookup: Lookup,
    args: Args,
    kwargs: Kwargs,
    outs: Sequence[Tensor],
    *,
    at: int = 1,
    default: int | None = None,
) -> list[list[Dim]]:
    """Dimensions (the argument number ``at``) go, stay as one, or as some (top k)."""
    given = list(tensors((args, kwargs)))
    if len(given) == 2 and at == 1:
        return _pointwise(lookup, args, kwargs, outs)  # max(a, b)
    if len(given) != 1:
        raise NotFollowed("arguments that are not understood")
    dims = lookup.dims(given[0])
    chosen = _dim_of(args, kwargs, at, default)
    if isinstance(chosen, bool) or chosen == () or chosen == []:
        chosen = None  # var(unbiased), and no dimension is all of them
    places = _places(chosen, len(dims))
    labels: list[list[Dim]] = []
    for out in outs:
        if out.dim() == len(dims):
            kept = [opaque(out.size(i)) if i in places else dim for i, dim in enumerate(dims)]
        else:
            kept = [dim for i, dim in enumerate(dims) if i not in places]
        labels.append(kept)
    for place in places:
        mix(dims[place], "a sum over it")
    return labels


for _name in (
    "sum", "mean", "amax", "amin", "var", "std", "logsumexp", "max", "min", "argmax", "argmin",
    "prod", "any", "all", "nanmean", "nansum", "median", "nanmedian", "var_mean", "std_mean",
    "count_nonzero", "aminmax",
):  # fmt: skip
    _RULES[_name] = _reduce
for _name in ("norm", "linalg_vector_norm", "vector_norm"):
    _RULES[_name] = functools.partial(_reduce, at=2)
for _name in ("topk", "kthvalue"):
    _RULES[_name] = functools.partial(_reduce, at=2, default=-1)


@_rule("layer_norm", "rms_norm")
def _norm(lookup: Lookup, args: Args, kwargs: Kwargs, outs: Sequence[Tensor]) -> list[list[Dim]]:
    dims = lookup.dims(_first(args, kwargs))
    shape = argument(args, kwargs, 1, "normalized_shape")
    for tensor in tensors((args[2:], dict(kwargs))):
        for dim in lookup.dims(tensor):
            mix(dim, "a norm over it")
    for dim in dims[len(dims) - len(shape) :]:
        mix(dim, "a norm over it")
    return [dims]


@_rule("glu")
def _glu(lookup: Lookup, args: Args, kwargs: Kwargs, outs: Sequence[Tensor]) -> list[list[Dim]]:
    dims = lookup.dims(_first(args, kwargs))
    at = argument(args, kwargs, 1, "dim", default=-1)
    half = outs[0].size(at)
    first, second = _sliced(dims[at], 0, half), _sliced(dims[at], half, 2 * half)
    join(first, second, "the halves of a gated unit")
    dims[at] = first
    return [dims]
