"""Partition: shards tile the whole, in whole units, for any size, rank count and granule."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tp_native.partition import Partition, ShardLayout, cut_heads

SIZES = st.integers(0, 10_000)
RANKS = st.integers(1, 17)
GRANULES = st.integers(1, 130)


def assert_tiles(p: Partition, size: int, ranks: int, granule: int) -> None:
    assert p.ranks == len(p) == ranks
    assert p.size == size == sum(p)
    end = 0
    for rank in range(ranks):
        piece = p.slice(rank)
        assert piece.start == end == p.offset(rank)
        assert piece.stop - piece.start == p[rank] >= 0
        end = piece.stop
        # Every cut lies on a unit's edge, or at the very end.
        assert end % granule == 0 or end == size
    p.check(size, ranks)


@given(SIZES, RANKS, GRANULES)
def test_even_tiles_the_whole_in_units(size: int, ranks: int, granule: int) -> None:
    p = Partition.even(size, ranks, granule)
    assert_tiles(p, size, ranks, granule)
    units = [-(-shard // granule) for shard in p]
    assert units == sorted(units, reverse=True)
    assert max(units) - min(units) <= 1


@given(
    SIZES,
    st.lists(st.floats(0, 1e6, allow_subnormal=False), min_size=1, max_size=9),
    GRANULES,
)
def test_ratios_tile_the_whole_and_come_close(size: int, ratios: list[float], granule: int) -> None:
    if sum(ratios) == 0:
        with pytest.raises(ValueError, match="sum above 0"):
            Partition.from_ratios(size, ratios, granule)
        return
    p = Partition.from_ratios(size, ratios, granule)
    assert_tiles(p, size, len(ratios), granule)
    for ratio, shard in zip(ratios, p, strict=True):
        assert abs(shard - size * ratio / sum(ratios)) <= 2 * granule
        if ratio == 0:
            assert shard == 0


@given(SIZES, RANKS, st.integers(1, 8))
def test_equal_ratios_are_even(size: int, ranks: int, scale: int) -> None:
    assert Partition.from_ratios(size, [float(scale)] * ranks) == Partition.even(size, ranks)


@given(st.lists(st.integers(0, 50), min_size=1, max_size=9), st.integers(1, 9))
def test_scaled_cuts_at_the_same_places(sizes: list[int], factor: int) -> None:
    p = Partition.from_sizes(sizes)
    q = p.scaled(factor)
    for rank in range(p.ranks):
        assert q.offset(rank) == factor * p.offset(rank)
        assert q[rank] == factor * p[rank]


@given(st.lists(st.integers(0, 50), min_size=1, max_size=9))
def test_owner_is_the_rank_whose_slice_holds_the_index(sizes: list[int]) -> None:
    p = Partition.from_sizes(sizes)
    for index in range(p.size):
        piece = p.slice(p.owner(index))
        assert piece.start <= index < piece.stop
    with pytest.raises(IndexError):
        p.owner(p.size)


def test_eight_heads_on_three_ranks() -> None:
    assert Partition.even(8, 3).sizes == (3, 3, 2)
    assert Partition.even(8 * 64, 3, granule=64).sizes == (192, 192, 128)


def test_short_last_unit() -> None:
    assert Partition.even(10, 3, granule=4).sizes == (4, 4, 2)
    assert Partition.even(5, 4, granule=4).sizes == (4, 1, 0, 0)


def test_more_ranks_than_elements() -> None:
    assert Partition.even(2, 4).sizes == (1, 1, 0, 0)


def test_equal_partitions_hash_alike() -> None:
    assert len({Partition.even(6, 3), Partition.from_sizes([2, 2, 2])}) == 1
    with pytest.raises(AttributeError):
        Partition.even(6, 3).sizes = (1,)  # type: ignore[misc]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Partition.even(-1, 2), "size -1"),
        (lambda: Partition.even(4, 0), "0 ranks"),
        (lambda: Partition.even(4, 2, granule=0), "granule 0"),
        (lambda: Partition.from_ratios(4, [1, -1]), r"ratios \[1, -1\]"),
        (lambda: Partition.from_ratios(4, [float("nan"), 1]), "finite"),
        (lambda: Partition.from_ratios(4, []), "0 ranks"),
        (lambda: Partition.from_sizes([]), "no sizes"),
        (lambda: Partition.from_sizes([1, -2]), "size -2 for rank 1"),
        (lambda: Partition.from_sizes([1, 2.5]), "2.5"),  # type: ignore[list-item]
        (lambda: Partition.even(4, 2).scaled(0), "factor 0"),
    ],
)
def test_bad_arguments_are_named(make: object, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make()  # type: ignore[operator]


def test_check_names_both_values_and_the_way_out() -> None:
    p = Partition.from_sizes([3, 3])
    with pytest.raises(ValueError, match=r"adds up to 6 but .* 7 .*Partition.even\(7, 2\)"):
        p.check(7, 2)
    with pytest.raises(ValueError, match="2 shards but the group has 3"):
        p.check(6, 3)
    with pytest.raises(IndexError, match=r"rank 2, expected 0\.\.1"):
        p[2]
    with pytest.raises(IndexError):
        p.offset(-1)


def test_heads_are_cut_as_promised_for_every_size() -> None:
    """Promise 3: each query beside its key/value head, every one once, and as even as groups
    allow.
    """
    for heads in range(1, 65):
        for kv_heads in (n for n in range(1, heads + 1) if heads % n == 0):
            for ranks in range(1, 9):
                queries, kv = cut_heads(heads, kv_heads, ranks)
                queries.check(heads, ranks)
                kv.check(kv_heads, ranks)
                for rank in range(ranks):
                    held = [h for a, b in kv.ranges[rank] for h in range(a, b)]
                    mine = queries.slice(rank)
                    needed = {q * kv_heads // heads for q in range(mine.start, mine.stop)}
                    assert set(held) == needed and len(held) == len(needed)
                    assert not held or queries[rank] % len(held) == 0
                    # sdpa pairs queries with key/value heads in runs of equal length
                    runs = [q * kv_heads // heads for q in range(mine.start, mine.stop)]
                    assert all(runs.count(h) == queries[rank] // len(held) for h in held)
                owned = [kv.owned(rank) for rank in range(ranks)]
                assert sum(b - a for places in owned for a, b in places) == kv_heads
                assert kv.is_replicated == (kv.local_sizes.size > kv_heads)
                groups_per_rank = -(-kv_heads // ranks)
                assert max(queries) <= groups_per_rank * (heads // kv_heads)


@given(st.integers(1, 3000), st.integers(1, 8), st.integers(1, 64), st.integers(0, 2**32))
def test_every_token_is_one_ranks_row(vocab: int, ranks: int, granule: int, seed: int) -> None:
    """What an embedding relies on, for 3, 5, 6 and 7 ranks too: id -> (rank, local row) is one to
    one, and the rows put together in rank order are the table.
    """
    cut = Partition.even(vocab, ranks, granule)
    draw = random.Random(seed)
    ids = [draw.randrange(vocab) for _ in range(50)] + [0, vocab - 1]
    table = [
        row for rank in range(ranks) for row in range(cut.slice(rank).start, cut.slice(rank).stop)
    ]
    assert table == list(range(vocab))
    for token in ids:
        holders = [r for r in range(ranks) if cut.offset(r) <= token < cut.offset(r) + cut[r]]
        assert holders == [cut.owner(token)]
        assert table[cut.offset(holders[0]) :][token - cut.offset(holders[0])] == token


def test_stacked_parts_are_cut_each_on_its_own() -> None:
    gate = Partition.from_sizes([3, 2])
    layout = ShardLayout.stacked([gate, gate])
    assert layout.ranges == (((0, 3), (5, 8)), ((3, 5), (8, 10)))
    assert layout.local_sizes == Partition.from_sizes([6, 4]) and not layout.is_consecutive
    assert layout.owned(1) == [(0, 2), (2, 4)] and layout.scaled(2).ranges[1] == ((6, 10), (16, 20))
    assert ShardLayout.of(gate).is_consecutive and ShardLayout.of(layout) is layout
    shared = ShardLayout(2, (((0, 1),), ((0, 1),), ((1, 2),)))
    assert shared.is_replicated and [shared.owned(rank) for rank in range(3)] == [
        [(0, 1)],
        [],
        [(0, 1)],
    ]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: ShardLayout(4, (((0, 2),), ((3, 4),))), "range 3:4 after 2"),
        (lambda: ShardLayout(4, (((0, 3),), ((2, 4),))), "range 2:4 after 3"),
        (lambda: ShardLayout(4, (((0, 2),), ((2, 3),))), "nobody holds 3:4"),
        (lambda: ShardLayout(4, (((0, 5),), ())), "range 0:5"),
        (lambda: ShardLayout.of(Partition.even(4, 2)).check(4, 3), "for 2 ranks, but"),
        (
            lambda: ShardLayout.stacked([Partition.even(4, 2), Partition.even(4, 3)]),
            r"parts for \[2, 3\] ranks",
        ),
        (lambda: cut_heads(28, 5, 2), r"nearest legal num_kv_heads are \[2, 4, 7\]"),
    ],
)
def test_bad_layouts_are_named(make: Callable[[], object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make()
