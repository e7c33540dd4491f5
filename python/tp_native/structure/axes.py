"""Where the dimensions of activations come from: axes of weights, split, sliced and joined.

An `Axis` is one dimension of a weight, or a part of it. A view splits it into factors (features
into heads and head width), a slice into segments (``[Q | K | V]``), and an element-wise join of
two activations says that two axes are cut alike. What needs an axis whole (a norm over it, a
softmax) mixes it. A dimension of an activation is a list of axes, outermost first.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence


class Axis:
    """One node of the forest; ask `find` for the axis that stands for all it was joined with.

    ``is_open``: made by broadcasting, so that any part of it is like any other; ``is_spread``:
    joined with such a one. ``is_opaque``: of an activation, of no weight; such axes are never
    joined.
    """

    __slots__ = (
        "_link",
        "factors",
        "is_opaque",
        "is_open",
        "is_spread",
        "meets_whole",
        "mixed",
        "segments",
        "size",
    )

    def __init__(self, size: int, *, is_open: bool = False, is_opaque: bool = False) -> None:
        self.size = size
        self.is_open = is_open
        self.is_spread = is_open
        self.is_opaque = is_opaque
        self.factors: list[Axis] | None = None
        self.segments: list[Axis] | None = None
        self.mixed: str | None = None
        self.meets_whole: str | None = None
        self._link: Axis | None = None

    def find(self) -> Axis:
        """The axis that stands for this one."""
        root = self
        while root._link is not None:
            root = root._link
        here = self
        while here._link is not None:
            here._link, here = root, here._link
        return root

    def __repr__(self) -> str:
        root = self.find()
        if root.factors is not None:
            return "[" + "*".join(map(repr, root.factors)) + "]"
        if root.segments is not None:
            return "[" + "|".join(map(repr, root.segments)) + "]"
        kind = "o" if root.is_opaque else "f" if root.is_open else "a"
        return f"{kind}{root.size}" + ("!" if root.mixed else "")


Dim = list[Axis]


def opaque(size: int) -> Dim:
    """A dimension that no weight has."""
    return [Axis(size, is_opaque=True)] if size != 1 else []


def size_of(dim: Sequence[Axis]) -> int:
    """Elements of a dimension."""
    return math.prod(axis.size for axis in dim)


def leaves(dim: Sequence[Axis]) -> Dim:
    """The finest factors known of a dimension, each standing for its joins; no axes of one."""
    found: Dim = []
    for axis in dim:
        root = axis.find()
        if root.factors is not None:
            found += leaves(root.factors)
        elif root.size != 1:
            found.append(root)
    return found


def parts(axis: Axis) -> Iterator[Axis]:
    """Every leaf of an axis, through factors and segments."""
    root = axis.find()
    inner = root.factors or root.segments
    if inner is None:
        yield root
    else:
        for child in inner:
            yield from parts(child)


def mix(dim: Sequence[Axis], why: str) -> None:
    """Note that something needs these axes whole."""
    for axis in dim:
        for leaf in parts(axis):
            if leaf.mixed is None:
                leaf.mixed = why


def meet_whole(dim: Sequence[Axis], why: str) -> None:
    """Note that these axes are joined with an activation that is never cut."""
    for axis in dim:
        for leaf in parts(axis):
            if leaf.meets_whole is None:
                leaf.meets_whole = why


def _child(axis: Axis, size: int) -> Axis:
    child = Axis(size, is_open=axis.is_open, is_opaque=axis.is_opaque)
    child.mixed, child.meets_whole = axis.mixed, axis.meets_whole
    child.is_spread = axis.is_spread
    return child


def split_factors(axis: Axis, outer: int) -> tuple[Axis, Axis] | None:
    """Split a leaf into ``outer`` and the rest; None if it can't be."""
    if axis.segments is not None or axis.factors is not None or outer < 1 or axis.size % outer:
        return None
    halves = (_child(axis, outer), _child(axis, axis.size // outer))
    if not axis.is_opaque:
        axis.factors = list(halves)
    return halves


def segment(axis: Axis, start: int, stop: int) -> Axis | None:
    """The axis of ``[start:stop]`` of a leaf, split into segments there; None if it can't be."""
    axis = axis.find()
    if (start, stop) == (0, axis.size):
        return axis
    if axis.is_opaque or not 0 <= start < stop <= axis.size or axis.factors is not None:
        return None
    if axis.segments is None:
        bounds = sorted({0, start, stop, axis.size})
        axis.segments = [_child(axis, b - a) for a, b in itertools.pairwise(bounds)]
    at = 0
    for i, child in enumerate(axis.segments):
        end = at + child.size
        if at <= start and stop <= end:
            if (start, stop) == (at, end):
                return child.find()
            root = child.find()
            if root.factors is None and root.segments is None and child is root:
                bounds = sorted({at, start, stop, end})
                fresh = [_child(root, b - a) for a, b in itertools.pairwise(bounds)]
                child.segments = list(fresh)  # for those who hold the coarser axis
                axis.segments[i : i + 1] = fresh
                return fresh[bounds.index(start)]
            return segment(root, start - at, stop - at)
        at = end
    return None


def join(a: Sequence[Axis], b: Sequence[Axis], why: str) -> bool:
    """Note that two dimensions of one size are cut alike; mixes both if no cut suits both."""
    left, right = leaves(a), leaves(b)
    good = True
    while left and right:
        # an axis that comes twice may have been split or linked meanwhile
        left[0:1], right[0:1] = leaves(left[:1]), leaves(right[:1])
        x, y = left[0], right[0]
        if x is y:
            left.pop(0)
            right.pop(0)
            continue
        if x.size != y.size:
            big, small, queue = (x, y, left) if x.size > y.size else (y, x, right)
            halves = split_factors(big, small.size)
            if halves is None:
                mix([*left, *right], why)
                return False
            queue[0:1] = halves
            continue
        left.pop(0)
        right.pop(0)
        good &= _link(x, y, why)
    mix([*left, *right], why)
    return good and not left and not right


def united(a: Sequence[Axis], b: Sequence[Axis]) -> Dim:
    """Of two dimensions that were joined one: where one has a weight's axis, that."""
    left, right = leaves(a), leaves(b)
    out: Dim = []
    while left and right:
        x, y = left[0], right[0]
        if x.size == y.size:
            out.append(y if x.is_opaque else x)
            left.pop(0)
            right.pop(0)
            continue
        big, small = (left, right) if x.size > y.size else (right, left)
        halves = split_factors(big[0], small[0].size) if big[0].is_opaque else None
        if halves is None:
            break  # could not be joined, so both are mixed
        big[0:1] = halves
    return [*out, *left]


def _link(x: Axis, y: Axis, why: str) -> bool:
    if x.is_opaque or y.is_opaque:
        if not (x.is_opaque and y.is_opaque):
            meet_whole([x, y], why)
        return True
    good = x.segments is None or y.segments is None or _join_segments(x, y, why)
    if x.segments is None and y.segments is not None:
        x, y = y, x
    y._link = x
    x.is_open = x.is_open and y.is_open
    x.is_spread |= y.is_spread
    if y.mixed is not None:
        mix([x], y.mixed)
    if y.meets_whole is not None:
        meet_whole([x], y.meets_whole)
    return good


def _join_segments(x: Axis, y: Axis, why: str) -> bool:
    assert x.segments is not None and y.segments is not None
    if [s.size for s in x.segments] != [s.size for s in y.segments]:
        mix([x, y], why)
        return False
    return all([join([a], [b], why) for a, b in zip(x.segments, y.segments, strict=True)])


def regroup(dims: Sequence[Dim], sizes: Sequence[int]) -> list[Dim]:
    """Dimensions of a view with ``sizes``, in row-major order.

    Where an axis can't be split so, what can't be told apart is mixed, and nothing is known of it.
    """
    queue = [leaf for dim in dims for leaf in leaves(dim)]
    if 0 in sizes:
        return _regroup_nothing(queue, sizes)
    out: list[Dim] = []
    while len(out) < len(sizes):
        # the fewest dimensions that hold whole axes
        count = 1
        block: Dim = []
        while (size := math.prod(sizes[len(out) : len(out) + count])) != size_of(block):
            if size < size_of(block):
                count += 1
            else:
                block.append(queue.pop(0))
        here = sizes[len(out) : len(out) + count]
        found = _regroup_block(block, here)
        if found is None:
            mix(block, "a view that cuts across it")
            found = [opaque(size) for size in here]
        out += found
    return out


def _regroup_nothing(queue: Dim, sizes: Sequence[int]) -> list[Dim]:
    """`regroup` where one dimension is empty: those before and after it are told by their sizes."""
    empty = list(sizes).index(0)
    before, after = sizes[:empty], sizes[empty + 1 :]
    head = next((i for i in range(len(queue)) if size_of(queue[:i]) == math.prod(before)), None)
    tail = next((i for i in range(len(queue)) if size_of(queue[i + 1 :]) == math.prod(after)), None)
    if 0 in after or head is None or tail is None or head > tail:
        mix(queue, "a view of nothing")
        return [opaque(size) for size in sizes]
    inner = queue[head : tail + 1]
    return [*regroup([queue[:head]], before), inner, *regroup([queue[tail + 1 :]], after)]


def _regroup_block(queue: Sequence[Axis], sizes: Sequence[int]) -> list[Dim] | None:
    queue = list(queue)
    out: list[Dim] = []
    for size in sizes:
        dim: Dim = []
        left = size
        while left != 1:
            queue[0:1] = leaves(queue[:1])  # one that comes twice may have been split meanwhile
            head = queue.pop(0)
            if left % head.size == 0:
                dim.append(head)
                left //= head.size
                continue
            halves = split_factors(head, left) if head.size % left == 0 else None
            if halves is None:
                return None
            dim.append(halves[0])
            queue.insert(0, halves[1])
            left = 1
        out.append(dim)
    return out


def mix_crossed(dims: Sequence[Dim]) -> None:
    """Mix what comes twice in one activation, as in an outer product with itself: of its square
    ranks would hold the diagonal blocks only.
    """
    seen: dict[int, Axis] = {}
    for leaf in (leaf for dim in dims for leaf in leaves(dim)):
        here = {id(part): part for part in parts(leaf)}
        mix([part for key, part in here.items() if key in seen], "it meets itself across")
        seen |= here
