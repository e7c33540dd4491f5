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
