"""Views, slices and joins of axes, and the layouts that cuts of them give, against real tensors."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pieces import partition, sliced
from tp_native.partition import Partition, ShardLayout, cut_heads
from tp_native.structure.axes import (
    Axis,
    Dim,
    join,
    leaves,
    mix,
    mix_crossed,
    opaque,
    parts,
    regroup,
    segment,
    size_of,
    united,
)
from tp_native.structure.solve import Cut, Pair, Solution

SIZES = st.lists(st.sampled_from([1, 2, 3, 4, 6, 8, 12]), min_size=1, max_size=4)


def reshaped(draw: Any, total: int) -> list[int]:
    """Any sizes whose product is ``total``."""
    sizes = []
    while total > 1:
        sizes.append(draw(st.sampled_from([n for n in range(1, total + 1) if total % n == 0])))
        total //= sizes[-1]
    return sizes


def cut_alone(axis: Axis, sizes: list[int]) -> Solution:
    return Solution(
        len(sizes), [Cut(Pair(axis, [], [], 0), ShardLayout.of(Partition(tuple(sizes))))]
    )


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_a_view_keeps_sizes_and_order(data: st.DataObject) -> None:
    sizes = data.draw(SIZES)
    dims: list[Dim] = [
        [Axis(n, is_opaque=data.draw(st.booleans()))] if n > 1 else [] for n in sizes
    ]
    to = reshaped(data.draw, math.prod(sizes))
    found = regroup(dims, to)
    assert [size_of(dim) for dim in found] == to
    before = [leaf for dim in dims for leaf in leaves(dim)]
    after = [leaf for dim in found for leaf in leaves(dim)]
    kept = [leaf for leaf in after if not leaf.is_opaque]
    assert kept == [leaf for leaf in before if leaf in kept]
    lost = [leaf for leaf in before if not leaf.is_opaque and leaf not in kept]
    assert all(leaf.mixed for leaf in lost)


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_a_view_of_a_slice_is_the_slice_of_the_view(data: st.DataObject) -> None:
    sizes = data.draw(SIZES)
    dims: list[Dim] = [[Axis(n)] if n > 1 else [] for n in sizes]
    found = regroup(dims, to := reshaped(data.draw, math.prod(sizes)))
    whole = torch.arange(math.prod(sizes)).view(sizes)
    for leaf in [leaf for dim in found for axis in dim for leaf in parts(axis)]:
        if leaf.mixed or leaf.is_opaque:
            continue
        cuts = partition(random.Random(data.draw(st.integers())), leaf.size, 2)
        solution = cut_alone(leaf, list(cuts))
        for rank in range(2):
            local = [solution.local_size(dim, rank) for dim in found]
            mine = sliced(whole, dims, solution, rank).reshape(local)
            assert torch.equal(mine, sliced(whole.reshape(to), found, solution, rank))


def test_a_view_mixes_only_what_it_cuts_across() -> None:
    first, second, third = Axis(4), Axis(6), Axis(5)
    found = regroup([[first], [second], [third]], [4, 10, 3])
    assert found[0] == [first] and not first.mixed
    assert second.mixed and third.mixed


def test_a_view_of_nothing_mixes() -> None:
    axis = Axis(4)
    assert [size_of(dim) for dim in regroup([[axis], [Axis(0)]], [0, 2])] == [0, 2]
    assert axis.mixed


def test_an_axis_that_comes_twice_is_split_once() -> None:
    axis = Axis(6)
    found = regroup([[axis], [axis]], [2, 3, 2, 3])
    assert found[0] == found[2] and found[1] == found[3]
    assert not axis.mixed


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_segments_tile_their_axis(data: st.DataObject) -> None:
    size = data.draw(st.integers(2, 12))
    axis = Axis(size)
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, size - 1))
        stop = data.draw(st.integers(start + 1, size))
        part = segment(axis, start, stop)
        assert part is None or part.size == stop - start
    assert sum(part.size for part in parts(axis)) == size
    again = [leaf for leaf in parts(axis)]
    at = 0
    for leaf in again:
        assert segment(axis, at, at + leaf.size) is leaf or leaf.size == size
        at += leaf.size


def test_a_segment_of_an_opaque_or_split_axis_is_not_known() -> None:
    assert segment(opaque(4)[0], 0, 2) is None
    axis = Axis(4)
    regroup([[axis]], [2, 2])
    assert segment(axis, 0, 2) is None


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), max_size=8))
@settings(max_examples=60, deadline=None)
def test_joins_are_transitive(pairs: list[tuple[int, int]]) -> None:
    axes = [Axis(6) for _ in range(6)]
    groups = {i: {i} for i in range(6)}
    for a, b in pairs:
        assert join([axes[a]], [axes[b]], "")
        merged = groups[a] | groups[b]
        groups.update(dict.fromkeys(merged, merged))
    for a in range(6):
        for b in range(6):
            assert (axes[a].find() is axes[b].find()) == (b in groups[a])
    mix([axes[0]], "whole")
    assert all(bool(axes[i].find().mixed) == (i in groups[0]) for i in range(6))


def test_joins_of_two_in_both_orders_end() -> None:
    a, b = Axis(4), Axis(4)
    assert join([a, b], [b, a], "")
    assert a.find() is b.find()


@pytest.mark.parametrize("swapped", [False, True])
def test_a_split_and_a_whole_axis_are_joined(swapped: bool) -> None:
    heads, width, all_ = Axis(3), Axis(4), Axis(12)
    given = ([heads, width], [all_])
    assert join(*(given[::-1] if swapped else given), "")
    assert leaves([all_]) == [heads.find(), width.find()]


@pytest.mark.parametrize("swapped", [False, True])
def test_splits_that_do_not_fit_mix_both(swapped: bool) -> None:
    left, right = [Axis(2), Axis(3)], [Axis(3), Axis(2)]
    assert not (join(right, left, "why") if swapped else join(left, right, "why"))
    assert all(axis.find().mixed == "why" for axis in [*left, *right])


def test_segments_that_do_not_fit_mix_both() -> None:
    left, right = Axis(6), Axis(6)
    parts_ = [segment(left, 0, 2), segment(right, 0, 3)]
    assert not join([left], [right], "why")
    assert all(part is not None and part.find().mixed == "why" for part in parts_)


def test_segments_are_joined_one_by_one() -> None:
    left, right, plain = Axis(6), Axis(6), Axis(6)
    a, b = segment(left, 0, 2), segment(right, 0, 2)
    assert join([plain], [left], "") and join([left], [right], "")
    assert a is not None and b is not None and a.find() is b.find()
    assert leaves([plain]) == leaves([right])


def test_a_join_with_no_weight_s_axis_leaves_it_to_be_cut() -> None:
    axis = Axis(6)
    other = opaque(6)
    assert join([axis], other, "why")
    assert not axis.mixed and axis.meets_whole
    assert united(other, [axis]) == [axis] == united([axis], other)


def test_the_union_of_parts_takes_a_weight_s_axes() -> None:
    head, width = Axis(3), Axis(4)
    a, b = [*opaque(3), width], [head, *opaque(4)]
    assert join(a, b, "")
    assert united(a, b) == [head, width]
    whole = opaque(12)
    assert join(whole, [head, width], "")
    assert united(whole, [head, width]) == [head, width]


def test_what_meets_itself_across_is_mixed() -> None:
    axis, other, halves = Axis(4), Axis(4), Axis(8)
    mix_crossed([[axis], [other]])
    assert not axis.mixed
    first, second = segment(halves, 0, 4), segment(halves, 4, 8)
    assert first is not None and second is not None and join([first], [second], "")
    mix_crossed([[halves]])  # a gated unit's halves lie side by side, not across
    assert not first.find().mixed
    mix_crossed([[axis], [axis]])
    assert axis.mixed and not other.mixed


# -- layouts


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_layouts_tile_the_whole_and_keep_its_order(data: st.DataObject) -> None:
    """Segments of products, some factors cut: against slices of counted elements."""
    rng = random.Random(data.draw(st.integers()))
    ranks = data.draw(st.sampled_from([1, 2, 3]))
    shapes = data.draw(
        st.lists(
            st.lists(st.sampled_from([2, 3, 4]), min_size=1, max_size=3), min_size=1, max_size=3
        )
    )
    sizes = [math.prod(shape) for shape in shapes]
    axis, at = Axis(sum(sizes)), 0
    factors: list[Dim] = []
    for shape, size in zip(shapes, sizes, strict=True):
        part = segment(axis, at, at + size)
        assert part is not None
        factors.append([leaf for dim in regroup([[part]], shape) for leaf in leaves(dim)])
        at += size
    chosen = [(dim, rng.randrange(len(dim))) for dim in factors if rng.random() < 0.8]
    solution = Solution(
        ranks,
        [
            Cut(Pair(dim[i], [], [], 0), ShardLayout.of(partition(rng, dim[i].size, ranks)))
            for dim, i in chosen
        ],
    )
    layout = solution.layout(axis)
    counted = torch.arange(axis.size)
    for rank in range(ranks):
        pieces = []
        for dim, piece in zip(factors, counted.split(sizes), strict=True):
            block = piece.view([leaf.size for leaf in dim])
            for at, leaf in enumerate(dim):
                cut = solution.cut_of(leaf)
                if cut is not None:
                    start = cut.outer.ranges[rank][0][0]
                    block = block.narrow(at, start, cut.outer.local_sizes[rank])
            pieces.append(block.flatten())
        mine = torch.cat(pieces)
        held = [i for a, b in layout.ranges[rank] for i in range(a, b)]
        assert mine.tolist() == held
        assert solution.local_size([axis], rank) == len(held)


@pytest.mark.parametrize("kv_heads, queries, ranks", [(2, 3, 3), (2, 4, 4), (2, 5, 3)])
def test_shared_key_value_heads_lie_with_their_queries(
    kv_heads: int, queries: int, ranks: int
) -> None:
    width = 2
    heads, inner = Axis(kv_heads), Axis(queries, is_open=True)
    both, outer = cut_heads(kv_heads * queries, kv_heads, ranks)
    pair = Pair(heads, [], [], 0, inner)
    solution = Solution(ranks, [Cut(pair, outer, both)])
    q: Dim = [heads, inner, Axis(width)]
    k: Dim = [heads, Axis(width)]
    counted = torch.arange(kv_heads * queries * width).view(-1, width)
    seen: list[int] = []
    for rank in range(ranks):
        held = [i for a, b in solution.ranges(q, rank) for i in range(a, b)]
        assert held == counted[both.slice(rank)].flatten().tolist()
        assert solution.local_size(q, rank) == len(held)
        kv = [i // width for a, b in solution.ranges(k, rank) for i in range(a, b)]
        assert {i // (queries * width) for i in held} == set(kv)
        seen += held
    assert seen == list(range(counted.numel()))
