"""Which slice of a dimension is whose: pure arithmetic, no torch, no group."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Partition:
    """One dimension cut into consecutive shards, one per rank; uneven and empty shards are legal.

    ``p[rank]`` is a shard's size, ``p.slice(rank)`` its place in the whole.
    Raises: ValueError if a size is negative or not an int, or if there is no rank.
    """

    sizes: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.sizes:
            raise ValueError("Partition got no sizes, expected one per rank; pass at least one")
        for rank, size in enumerate(self.sizes):
            if not _is_int(size) or size < 0:
                raise ValueError(
                    f"Partition got size {size!r} for rank {rank}, expected an int >= 0; "
                    "give every rank a whole number of elements (0 is legal)"
                )

    @classmethod
    def even(cls, size: int, ranks: int, granule: int = 1) -> Partition:
        """Cut ``size`` elements as evenly as whole units of ``granule`` elements allow.

        The first ``units % ranks`` ranks get one unit more; the last unit may be short.
        Raises: ValueError if ``size < 0``, ``ranks < 1`` or ``granule < 1``.
        """
        units = _units(size, granule)
        _check_ranks(ranks)
        base, extra = divmod(units, ranks)
        return cls._from_units([base + (rank < extra) for rank in range(ranks)], size, granule)

    @classmethod
    def from_ratios(cls, size: int, ratios: Sequence[float], granule: int = 1) -> Partition:
        """Cut ``size`` in proportion to ``ratios`` (any scale, 0 legal), in units of ``granule``.

        Largest remainder first, ties to the lower rank; the last unit may be short.
        Raises: ValueError if a ratio is negative or not finite, or if all are 0.
        """
        units = _units(size, granule)
        weights = [float(ratio) for ratio in ratios]
        _check_ranks(len(weights))
        total = math.fsum(weights)
        if not all(w >= 0 and math.isfinite(w) for w in weights) or not 0 < total < math.inf:
            raise ValueError(
                f"Partition.from_ratios got ratios {list(ratios)}, expected finite numbers >= 0 "
                "with a sum above 0; give each rank its relative speed, for example [2, 1, 1]"
            )
        exact = [units * (w / total) for w in weights]
        counts = [int(e) for e in exact]
        # Rounding in `exact` may leave the floors a little above the whole.
        by_need = sorted(range(len(weights)), key=lambda rank: (counts[rank] - exact[rank], rank))
        candidates = [rank for rank in by_need if weights[rank] > 0]
        short = units - sum(counts)
        step = 1 if short >= 0 else -1
        order = candidates if short >= 0 else [r for r in reversed(candidates) if counts[r] > 0]
        for i in range(abs(short)):
            counts[order[i % len(order)]] += step
        return cls._from_units(counts, size, granule)

    @classmethod
    def from_sizes(cls, sizes: Sequence[int]) -> Partition:
        """The partition with exactly these shard sizes, rank 0 first."""
        return cls(tuple(sizes))

    @classmethod
    def _from_units(cls, counts: Sequence[int], size: int, granule: int) -> Partition:
        sizes, left = [], size
        for count in counts:
            sizes.append(min(count * granule, left))
            left -= sizes[-1]
        return cls(tuple(sizes))

    @property
    def size(self) -> int:
        """Elements in the whole dimension."""
        return sum(self.sizes)

    @property
    def ranks(self) -> int:
        """Number of shards."""
        return len(self.sizes)

    @property
    def is_even(self) -> bool:
        """Whether all shards have one size."""
        return len(set(self.sizes)) == 1

    def __getitem__(self, rank: int) -> int:
        self._check_rank(rank)
        return self.sizes[rank]

    def __iter__(self) -> Iterator[int]:
        return iter(self.sizes)

    def __len__(self) -> int:
        return len(self.sizes)

    def offset(self, rank: int) -> int:
        """Index of the rank's first element in the whole."""
        self._check_rank(rank)
        return sum(self.sizes[:rank])

    def slice(self, rank: int) -> slice:
        """The rank's elements as a slice of the whole."""
        start = self.offset(rank)
        return slice(start, start + self.sizes[rank])

    def owner(self, index: int) -> int:
        """The rank that holds element ``index`` of the whole."""
        if _is_int(index) and index >= 0:
            end = 0
            for rank, size in enumerate(self.sizes):
                end += size
                if index < end:
                    return rank
        raise IndexError(f"Partition.owner got index {index!r}, expected 0..{self.size - 1}")

    def check(self, size: int, ranks: int) -> None:
        """Raise ValueError unless this partition cuts ``size`` elements for ``ranks`` ranks."""
        if self.ranks != ranks:
            raise ValueError(
                f"partition {list(self.sizes)} has {self.ranks} shards but the group has {ranks} "
                f"ranks; make one for this group, for example Partition.even({size}, {ranks})"
            )
        if self.size != size:
            raise ValueError(
                f"partition {list(self.sizes)} adds up to {self.size} but the dimension has "
                f"{size} elements; fix the sizes or use Partition.even({size}, {ranks})"
            )

    def _check_rank(self, rank: int) -> None:
        if not _is_int(rank) or not 0 <= rank < len(self.sizes):
            raise IndexError(
                f"partition {list(self.sizes)} got rank {rank!r}, expected 0..{self.ranks - 1}; "
                "use the rank of the group that the partition was made for"
            )

    def scaled(self, factor: int) -> Partition:
        """The same cut where every element stands for ``factor`` elements (heads to features)."""
        if not _is_int(factor) or factor < 1:
            raise ValueError(f"Partition.scaled got factor {factor!r}, expected an int >= 1")
        return Partition(tuple(size * factor for size in self.sizes))


@dataclass(frozen=True)
class ShardLayout:
    """One dimension of which each rank holds some ranges: several where parts lie stacked
    (``[gate | up]``), the same ones on several ranks where key/value heads are fewer than ranks.

    ``ranges[rank]`` are (start, stop) in the whole, in the order in which the rank stores them.
    Raises: ValueError if ranges overlap without being the same, reach beyond the whole or leave an
    element to nobody.
    """

    size: int
    ranges: tuple[tuple[tuple[int, int], ...], ...]

    def __post_init__(self) -> None:
        end = 0
        for start, stop in sorted({r for held in self.ranges for r in held if r[0] != r[1]}):
            if start != end or not start < stop <= self.size:
                raise ValueError(
                    f"ShardLayout of {self.size} elements got range {start}:{stop} after {end}; "
                    "every element must lie in one range, which several ranks may hold"
                )
            end = stop
        if end != self.size:
            raise ValueError(f"ShardLayout of {self.size} elements: nobody holds {end}:{self.size}")

    @classmethod
    def of(cls, cut: Partition | ShardLayout) -> ShardLayout:
        """Consecutive shards as a layout; a layout as it is."""
        if isinstance(cut, ShardLayout):
            return cut
        places = (cut.slice(rank) for rank in range(cut.ranks))
        return cls(cut.size, tuple(((place.start, place.stop),) for place in places))

    @classmethod
    def stacked(cls, parts: Sequence[Partition | ShardLayout]) -> ShardLayout:
        """Parts that lie one after another in the whole, each cut on its own."""
        layouts = [cls.of(part) for part in parts]
        counts = {len(layout.ranges) for layout in layouts}
        if len(counts) != 1:
            raise ValueError(f"ShardLayout.stacked got parts for {sorted(counts)} ranks")
        offsets = [sum(layout.size for layout in layouts[:i]) for i in range(len(layouts))]
        ranges = tuple(
            tuple(
                (offset + start, offset + stop)
                for offset, layout in zip(offsets, layouts, strict=True)
                for start, stop in layout.ranges[rank]
            )
            for rank in range(counts.pop())
        )
        return cls(sum(layout.size for layout in layouts), ranges)

    @property
    def ranks(self) -> int:
        """Number of shards."""
        return len(self.ranges)

    @property
    def local_sizes(self) -> Partition:
        """What each rank holds; adds up to more than ``size`` where ranges are replicated."""
        return Partition(tuple(sum(b - a for a, b in held) for held in self.ranges))

    @property
    def is_consecutive(self) -> bool:
        """Whether the shards, one after another, are the whole: what a `Partition` says."""
        return self == ShardLayout.of(self.local_sizes)

    @property
    def is_replicated(self) -> bool:
        """Whether an element is held by more than one rank."""
        return self.local_sizes.size > self.size

    @property
    def dense_order(self) -> tuple[tuple[int, int], ...]:
        """Ranges of all shards, one after another, that in this order are the whole; the lowest
        rank's of what several hold.
        """
        first: dict[tuple[int, int], int] = {}
        at = 0
        for start, stop in (place for held in self.ranges for place in held):
            first.setdefault((start, stop), at)
            at += stop - start
        return joined([(first[a, b], first[a, b] + b - a) for a, b in sorted(first)])

    def owned(self, rank: int) -> list[tuple[int, int]]:
        """Ranges of the rank's shard, in the shard's own indices, that no lower rank holds."""
        lower = {r for held in self.ranges[:rank] for r in held}
        mine, at = [], 0
        for start, stop in self.ranges[rank]:
            if (start, stop) not in lower:
                mine.append((at, at + stop - start))
            at += stop - start
        return mine

    def check(self, size: int, ranks: int) -> None:
        """Raise ValueError unless this layout cuts ``size`` elements for ``ranks`` ranks."""
        if (self.size, self.ranks) != (size, ranks):
            raise ValueError(
                f"the layout cuts {self.size} elements for {self.ranks} ranks, but the dimension "
                f"has {size} and the group {ranks}"
            )

    def scaled(self, factor: int) -> ShardLayout:
        """The same cut where every element stands for ``factor`` elements (heads to features)."""
        return ShardLayout(
            self.size * factor,
            tuple(tuple((a * factor, b * factor) for a, b in held) for held in self.ranges),
        )


def joined(ranges: Sequence[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """The ranges without empty ones, neighbours that continue each other as one."""
    found: list[tuple[int, int]] = []
    for start, stop in ranges:
        if start == stop:
            continue
        if found and found[-1][1] == start:
            start = found.pop()[0]
        found.append((start, stop))
    return tuple(found)


def cut_heads(
    num_heads: int, num_kv_heads: int, ranks: int, ratios: Sequence[float] | None = None
) -> tuple[Partition, ShardLayout]:
    """Query heads and key/value heads of each rank.

    A key/value head and its queries stay together. With fewer key/value heads than ranks each is
    replicated on consecutive ranks, over which its queries are divided; a rank left without
    queries holds no key/value head either. ``ratios``: the ranks' shares, default equal.
    Raises: ValueError if ``num_heads`` is no multiple of ``num_kv_heads``.
    Source: Ainslie et al., GQA, arXiv:2305.13245 (grouped queries).
    """
    if num_kv_heads < 1 or num_heads % num_kv_heads:
        legal = [n for n in range(1, num_heads + 1) if num_heads % n == 0]
        near = sorted(legal, key=lambda n: abs(n - num_kv_heads))[:3]
        raise ValueError(
            f"{num_heads} heads over {num_kv_heads} key/value heads: every key/value head needs "
            f"the same number of queries; the nearest legal num_kv_heads are {sorted(near)}"
        )
    per_group = num_heads // num_kv_heads
    shares = list(ratios) if ratios is not None else [1.0] * ranks
    if num_kv_heads >= ranks:
        groups = Partition.from_ratios(num_kv_heads, shares)
        return groups.scaled(per_group), ShardLayout.of(groups)
    queries: list[int] = []
    held: list[tuple[tuple[int, int], ...]] = []
    replicas = Partition.even(ranks, num_kv_heads)
    for head in range(num_kv_heads):
        for count in Partition.from_ratios(per_group, shares[replicas.slice(head)]):
            queries.append(count)
            held.append(((head, head + 1),) if count else ())
    return Partition(tuple(queries)), ShardLayout(num_kv_heads, tuple(held))


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _units(size: int, granule: int) -> int:
    if not _is_int(size) or size < 0:
        raise ValueError(
            f"Partition got size {size!r}, expected an int >= 0; pass the whole dimension's length"
        )
    if not _is_int(granule) or granule < 1:
        raise ValueError(
            f"Partition got granule {granule!r}, expected an int >= 1; pass the number of "
            "elements that must stay together (1 if any cut is legal)"
        )
    return -(-size // granule)


def _check_ranks(ranks: int) -> None:
    if not _is_int(ranks) or ranks < 1:
        raise ValueError(f"Partition got {ranks!r} ranks, expected at least 1; pass the group size")
