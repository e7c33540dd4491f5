"""From a trace to cuts: which axes are cut, so that each leaf is cut in one dimension at most."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from ..errors import PlanError
from ..partition import Partition, ShardLayout, cut_heads
from .axes import Axis, leaves, parts
from .trace import Event, Leaf, Trace, Value

Range = tuple[int, int]


@dataclass(eq=False)
class Pair:
    """Axes that are cut alike: the leaves that make them (cut by output features) and those that
    sum over them (cut by input features).

    ``inner``: the axis of each key/value head's queries, cut as well where heads are fewer than
    ranks.
    """

    axis: Axis
    producers: list[str]
    consumers: list[str]
    elements: int
    inner: Axis | None = None

    @property
    def members(self) -> list[str]:
        """Names of all leaves of the pair."""
        return [*self.producers, *self.consumers]


@dataclass
class Cut:
    """How one pair's axes lie on the ranks."""

    pair: Pair
    outer: ShardLayout
    both: Partition | None = None  # of axis * inner

    def local(self, axis: Axis, rank: int) -> int | None:
        """This rank's part of ``axis``; None if the pair does not cut it."""
        root = axis.find()
        if root is self.pair.axis.find():
            return self.outer.local_sizes[rank]
        inner = self.pair.inner
        if self.both is None or inner is None or root is not inner.find():
            return None
        held = self.outer.local_sizes[rank]
        return self.both[rank] // held if held else 0


@dataclass
class Solution:
    """The pairs that are cut, and what the ranks hold of every axis."""

    ranks: int
    cuts: list[Cut] = field(default_factory=list)

    def cut_of(self, axis: Axis) -> Cut | None:
        """The cut of an axis, if it is cut."""
        root = axis.find()
        for cut in self.cuts:
            inner = cut.pair.inner.find() if cut.both is not None and cut.pair.inner else None
            if root is cut.pair.axis.find() or root is inner:
                return cut
        return None

    def is_cut(self, value: Value) -> bool:
        """Whether ranks hold unlike parts of an activation."""
        return value.dims is not None and any(map(self.is_cut_dim, value.dims))

    def is_cut_dim(self, dim: Sequence[Axis]) -> bool:
        """Whether ranks hold unlike parts of a dimension."""
        return any(self.cut_of(leaf) is not None for axis in dim for leaf in parts(axis))

    def local_size(self, dim: Sequence[Axis], rank: int) -> int:
        """A dimension's size on one rank."""
        total = 1
        for leaf in leaves(dim):
            if leaf.segments is not None:
                total *= sum(self.local_size([part], rank) for part in leaf.segments)
                continue
            cut = self.cut_of(leaf)
            local = cut.local(leaf, rank) if cut is not None else None
            total *= leaf.size if local is None else local
        return total

    def layout(self, axis: Axis) -> ShardLayout:
        """Where each rank's part of a weight's axis lies."""
        held = [_merged(self.ranges([axis], rank)) for rank in range(self.ranks)]
        sizes = [sum(b - a for a, b in ranges) for ranges in held]
        if sum(sizes) == axis.size:
            even = ShardLayout.of(Partition.from_sizes(sizes))
            if all(
                not mine or tuple(mine) == one for mine, one in zip(held, even.ranges, strict=True)
            ):
                return even  # where a rank has nothing, too
        return ShardLayout(axis.size, _aligned(held))

    def ranges(self, dim: Sequence[Axis], rank: int) -> list[Range]:
        """Where one rank's part of a dimension lies in the whole."""
        factors = leaves(dim)
        held: list[Range] = [(0, 1)]
        size = 1
        at = len(factors) - 1
        while at >= 0:
            leaf = factors[at]
            cut = self.cut_of(leaf)
            mine: list[Range]
            if leaf.segments is not None:
                mine, whole = self._of_segments(leaf.segments, rank), leaf.size
            elif cut is None:
                mine, whole = [(0, leaf.size)], leaf.size
            elif leaf is cut.pair.axis.find():
                mine, whole = list(cut.outer.ranges[rank]), leaf.size
            else:
                assert cut.both is not None and at > 0
                assert factors[at - 1] is cut.pair.axis.find()
                place = cut.both.slice(rank)
                mine, whole = [(place.start, place.stop)], cut.both.size
                at -= 1
            held = _times(mine, held, size)
            size *= whole
            at -= 1
        return held

    def _of_segments(self, segments: Sequence[Axis], rank: int) -> list[Range]:
        held, start = [], 0
        for part in segments:
            held += [(start + a, start + b) for a, b in self.ranges([part], rank)]
            start += part.size
        return held


def _times(outer: Sequence[Range], inner: Sequence[Range], size: int) -> list[Range]:
    if list(inner) == [(0, size)]:
        return [(a * size, b * size) for a, b in outer]
    return [
        (i * size + a, i * size + b) for lo, hi in outer for i in range(lo, hi) for a, b in inner
    ]


def _merged(ranges: Sequence[Range]) -> list[Range]:
    out: list[Range] = []
    for a, b in ranges:
        if a == b:
            continue
        if out and out[-1][1] == a:
            out[-1] = (out[-1][0], b)
        else:
            out.append((a, b))
    return out


def _aligned(held: Sequence[Sequence[Range]]) -> tuple[tuple[Range, ...], ...]:
    """Ranges cut so that any two are the same or apart."""
    bounds = sorted({bound for ranges in held for place in ranges for bound in place})
    if all(not any(a < bound < b for bound in bounds) for ranges in held for a, b in ranges):
        return tuple(tuple(ranges) for ranges in held)
    return tuple(
        tuple((x, y) for a, b in ranges for x, y in itertools.pairwise(bounds) if a <= x and y <= b)
        for ranges in held
    )


# -- which axes may be cut


def find_pairs(trace: Trace, fits: Callable[[Pair], bool]) -> list[Pair]:
    """Pairs that could be cut, best first: none mixed, all of them such as ``fits``."""
    makers: dict[int, list[str]] = {}
    takers: dict[int, list[str]] = {}
    roots: dict[int, Axis] = {}
    for name, leaf in trace.leaves.items():
        if name not in trace.reached:
            continue
        for table, axis in ((makers, leaf.out_axis), (takers, leaf.in_axis)):
            for part in _unique(parts(axis)) if axis is not None else ():
                roots[id(part)] = part
                table.setdefault(id(part), []).append(name)
    pairs = []
    for key, root in roots.items():
        producers, consumers = makers.get(key, []), takers.get(key, [])
        members = {*producers, *consumers}
        if root.size == 1 or root.mixed or root.is_open or not producers or not consumers:
            continue
        if members & trace.read_elsewhere.keys() or set(producers) & set(consumers):
            continue
        elements = sum(elements_of(trace.leaves[name]) for name in members)
        pair = Pair(root, producers, consumers, elements)
        if fits(pair):
            pairs.append(pair)
    order = {name: i for i, name in enumerate(trace.leaves)}
    # Of two cuts of the same leaves (heads, or a part of each value head) the outer one, with
    # fewer and longer pieces.
    pairs.sort(key=lambda pair: (-pair.elements, min(order[n] for n in pair.members)))
    return _without_overlap(trace, pairs)


def _unique(axes: Iterator[Axis]) -> list[Axis]:
    return list({id(axis): axis for axis in axes}.values())


def elements_of(leaf: Leaf) -> int:
    """Elements of a leaf's matrices."""
    return sum(p.numel() for p in leaf.module.parameters() if p.dim() > 1)


def _without_overlap(trace: Trace, pairs: Sequence[Pair]) -> list[Pair]:
    taken: dict[str, Pair] = {}
    chosen = []
    for pair in pairs:
        if any(name in taken for name in pair.members):
            _note_inner(trace, pair, taken)
            continue
        taken.update(dict.fromkeys(pair.members, pair))
        chosen.append(pair)
    return chosen


def _note_inner(trace: Trace, pair: Pair, taken: Mapping[str, Pair]) -> None:
    """Remember a key/value head's queries: always the factor right after the heads."""
    owners = {id(taken[name]): taken[name] for name in pair.members if name in taken}
    if len(owners) != 1 or not all(name in taken for name in pair.members):
        return
    (owner,) = owners.values()
    outer, inner = owner.axis.find(), pair.axis.find()
    if not inner.is_spread:
        return
    for name in owner.members:
        leaf = trace.leaves[name]
        axis = leaf.out_axis if name in owner.producers else leaf.in_axis
        assert axis is not None
        if not _always_follows([axis], outer, inner):
            return
    if owner.inner is None and any(n in pair.producers for n in owner.producers):
        owner.inner = pair.axis


def _always_follows(dim: Sequence[Axis], outer: Axis, inner: Axis) -> bool:
    factors = leaves(dim)
    for at, leaf in enumerate(factors):
        if leaf.segments is not None:
            if not all(_always_follows([part], outer, inner) for part in leaf.segments):
                return False
        elif leaf is inner and (at == 0 or factors[at - 1] is not outer):
            return False
    return True


def cut_pair(pair: Pair, ranks: int, ratios: Sequence[float] | None) -> Cut:
    """Cut a pair's axis evenly, or by ``ratios``; key/value heads fewer than ranks are shared."""
    size = pair.axis.find().size
    if size < ranks and pair.inner is not None:
        try:
            both, outer = cut_heads(size * pair.inner.find().size, size, ranks, ratios)
        except ValueError as error:
            raise PlanError(
                f"{ranks} ranks with shares {list(ratios or ())} over {size} key/value heads "
                f"({pair.members[0]}): {error}; give every rank a share above 0"
            ) from error
        return Cut(pair, outer, both)
    if ratios is None:
        return Cut(pair, ShardLayout.of(Partition.even(size, ranks)))
    return Cut(pair, ShardLayout.of(Partition.from_ratios(size, ratios)))


def crossing(event: Event, solution: Solution) -> Pair | None:
    """The smaller of two pairs that cut one activation both, in unlike factors: a rank would hold
    its block of each, and nobody the others.
    """
    for value in event.outs:
        found: list[Cut] = []
        for leaf in (leaf for dim in value.dims or () for leaf in leaves(dim)):
            here = [cut for part in parts(leaf) if (cut := solution.cut_of(part)) is not None]
            for cut in here:
                other = next((c for c in found if c is not cut), None)
                if other is not None:
                    return min(cut.pair, other.pair, key=lambda pair: pair.elements)
            found += here
    return None


# -- gradients


@dataclass
class Gradients:
    """What backward has to add up: ``partial`` parameters, whose gradients each rank has a summand
    of; ``partial_outputs``, leaves whose whole output gets summands; ``on_pieces``, leaves that
    stay whole because each rank calls them on rows of its own; ``conflict``: why a cut would give
    wrong gradients, by the module where.
    """

    partial: set[str] = field(default_factory=set)
    partial_outputs: set[str] = field(default_factory=set)
    on_pieces: set[str] = field(default_factory=set)
    conflict: tuple[Event, str] | None = None


def gradients(trace: Trace, solution: Solution, regions: Collection[str] = ()) -> Gradients:
    """Follow gradients back: a whole activation that meets a cut one gets only a summand.

    ``regions``: modules inside which whatever is whole sums its gradient where it meets a cut
    activation.
    """
    found = Gradients()
    uses: dict[int, set[str]] = {}
    columns = {n for cut in solution.cuts for n in cut.pair.producers}
    rows = {n for cut in solution.cuts for n in cut.pair.consumers}
    for value in trace.outputs:
        uses.setdefault(id(value), set()).add("whole")
    for event in reversed(trace.events):
        given = set().union(*(uses.get(id(out), set()) for out in event.outs))
        cut_out = any(solution.is_cut(out) for out in event.outs)
        cut_in = any(solution.is_cut(value) for value in event.ins)
        if event.leaf in rows:
            if "summand" in given:
                return _conflict(found, event, "its sum is used as a part by each rank")
            continue
        if event.leaf in columns:
            given = {"whole"}
        elif event.leaf is not None and cut_in:
            found.on_pieces.add(event.leaf)
            if not is_inside(event.module, regions):  # where gradients are summed as they come
                module = trace.leaves[event.leaf].module
                found.partial |= {f"{event.leaf}.{name}" for name, _ in module.named_parameters()}
            continue
        elif event.leaf is not None:
            if given == {"summand"}:
                found.partial_outputs.add(event.leaf)
                given = {"whole"}
            elif len(given) > 1:
                return _conflict(found, event, "its output is used both whole and in parts")
        elif cut_out:
            if any(not solution.is_cut(o) and "whole" in uses.get(id(o), ()) for o in event.outs):
                return _conflict(found, event, "a whole part of it is used by every rank alike")
            given = {"whole" if is_inside(event.module, regions) else "summand"}
        elif cut_in and "whole" in given:
            return _conflict(found, event, "a whole part of it is used by every rank alike")
        for value in event.ins:
            if not value.is_differentiable or solution.is_cut(value):
                continue
            known = uses.setdefault(id(value), set())
            known |= given
            if len(known) > 1:
                return _conflict(found, event, "an activation is used both whole and in parts")
            if "summand" in known:
                if value.parameter is not None:
                    found.partial.add(value.parameter)
                elif value.is_input:
                    return _conflict(found, event, "an input would get a part of its gradient")
    for event in trace.events:
        if event.leaf in found.on_pieces and not any(map(solution.is_cut, event.ins)):
            return _conflict(found, event, "it is called on whole rows and on parts of them")
    return found


def is_inside(module: str, regions: Collection[str]) -> bool:
    """Whether a module is one of ``regions`` or lies in one."""
    return any(not region or f"{module}.".startswith(f"{region}.") for region in regions)


def _conflict(found: Gradients, event: Event, why: str) -> Gradients:
    found.conflict = (event, why)
    return found
