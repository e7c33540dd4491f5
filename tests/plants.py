"""Wrong plans and damaged models, made from a right one, each with the modules that may be named
for it: the first whose output departs, whose input is wrong, or that raises.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from tp_native.nn import ParallelMultiheadAttention, RowParallelLinear
from tp_native.partition import Partition, ShardLayout
from tp_native.plan import Shard, ShardEntry, ShardPlan
from tp_native.plan.shards import ATTENTION, COLUMN, ROW, VOCABULARY


@dataclass(frozen=True)
class WrongPlan:
    """A plan that `parallelize(verify=)` has to refuse, naming one of ``names``."""

    kind: str
    plan: ShardPlan
    names: tuple[str, ...]


@dataclass(frozen=True)
class Damage:
    """What to do to a parallelized model on ``ranks``; ``apply`` gives what undoes it."""

    kind: str
    name: str
    apply: Callable[[nn.Module], Callable[[], None]]


Pair = tuple[list[str], str]


def pairs_of(plan: ShardPlan) -> list[Pair]:
    """Each row layer with the column layers right before it."""
    found: list[Pair] = []
    columns: list[str] = []
    for name, entry in plan.entries.items():
        if entry.style == COLUMN:
            columns.append(name)
        elif entry.style == ROW:
            if columns:
                found.append((columns, name))
            columns = []
    return found


def around(row: str, columns: list[str]) -> tuple[str, ...]:
    """The row layer, and the modules whose code may raise between it and its column layers: the
    nearest that hold all column layers, and all of them and the row layer.
    """
    return tuple(dict.fromkeys([row, holder(columns), holder([*columns, row])]))


def holder(names: list[str]) -> str:
    """The innermost module that holds all."""
    paths = [name.split(".")[:-1] for name in names]
    common = []
    for parts in zip(*paths, strict=False):
        if len(set(parts)) > 1:
            break
        common.append(parts[0])
    return ".".join(common)


def with_entries(plan: ShardPlan, changes: Mapping[str, ShardEntry | None]) -> ShardPlan:
    """The plan with some entries changed, or left out where None."""
    entries = {name: changes.get(name, entry) for name, entry in plan.entries.items()}
    return replace(plan, entries={n: e for n, e in entries.items() if e is not None})


def recut(entry: ShardEntry, layout: Partition | ShardLayout) -> ShardEntry:
    """The same style with other boundaries."""
    shards = {name: Shard(cut.dim, layout) for name, cut in entry.shards.items()}
    return replace(entry, partition=layout, shards=shards)


def turned(plan: ShardPlan, name: str, sizes: tuple[int, int], dim: int) -> ShardEntry:
    """A column layer as a row layer, or the other way round; ``sizes`` are (out, in), ``dim`` is
    the dimension of its weight that was cut.
    """
    if plan.entries[name].style == COLUMN:
        cut = Partition.even(sizes[1], plan.world_size)
        return ShardEntry(ROW, cut, {"weight": Shard(1 - dim, cut)}, sizes[0])
    cut = Partition.even(sizes[0], plan.world_size)
    dims = {"weight": 1 - dim, "bias": 0}
    held = {local: at for local, at in dims.items() if f"{name}.{local}" in plan.shapes}
    return ShardEntry(COLUMN, cut, {local: Shard(at, cut) for local, at in held.items()})


def is_held_by_all(entry: ShardEntry) -> bool:
    """Whether every rank holds all of it: the one key/value head of multi-query attention."""
    layout = ShardLayout.of(entry.partition)
    return all(sum(b - a for a, b in held) == layout.size for held in layout.ranges)


def wrong_plans(model: nn.Module, plan: ShardPlan, rng: random.Random) -> Iterator[WrongPlan]:
    """One of each kind that the plan has room for, at random places."""
    pairs = pairs_of(plan)
    if not pairs:
        return
    columns, row = rng.choice(pairs)
    yield WrongPlan("row layer left whole", with_entries(plan, {row: None}), (row,))
    columns, row = rng.choice(pairs)
    without: dict[str, ShardEntry | None] = dict.fromkeys(columns)
    yield WrongPlan("column layers left whole", with_entries(plan, without), around(row, columns))
    many = [pair for pair in pairs if len(pair[0]) > 1]
    if many:
        columns, row = rng.choice(many)
        one = rng.choice([name for name in columns if not is_held_by_all(plan.entries[name])])
        names = around(row, columns)
        yield WrongPlan("one column layer left whole", with_entries(plan, {one: None}), names)
    single = [pair for pair in pairs if len(pair[0]) == 1 and is_plain(plan, *pair)]
    if single:
        (column,), row = rng.choice(single)
        changes: dict[str, ShardEntry | None] = {}
        for name in (column, row):
            dim = plan.entries[name].shards["weight"].dim
            out_dim = dim if name == column else 1 - dim
            shape = plan.shapes[f"{name}.weight"]
            sizes = (shape[out_dim], shape[1 - out_dim])
            changes[name] = turned(plan, name, sizes, dim)
        yield WrongPlan("column and row swapped", with_entries(plan, changes), (column,))
    yield from torn(plan, pairs, rng)


def is_plain(plan: ShardPlan, columns: list[str], row: str) -> bool:
    return all(isinstance(plan.entries[n].partition, Partition) for n in (*columns, row))


def torn(plan: ShardPlan, pairs: list[Pair], rng: random.Random) -> Iterator[WrongPlan]:
    """Layers whose boundaries don't fit each other's."""
    ranks = plan.world_size
    movable = [pair for pair in pairs if is_plain(plan, *pair)]
    if movable:
        columns, row = rng.choice(movable)
        one = rng.choice(columns)
        cut = plan.entries[one].partition
        assert isinstance(cut, Partition)
        giver = max(range(ranks), key=lambda rank: cut[rank])
        taker = (giver + 1) % ranks
        sizes = [n - (r == giver) + (r == taker) for r, n in enumerate(cut)]
        change = {one: recut(plan.entries[one], Partition.from_sizes(sizes))}
        names = around(row, columns)
        yield WrongPlan("one column layer on other boundaries", with_entries(plan, change), names)
    attention = [pair for pair in movable if len(pair[0]) == 3]
    for kind, which in (("queries", slice(0, 1)), ("keys", slice(1, 2)), ("values", slice(2, 3))):
        if not attention:
            break
        columns, row = rng.choice(attention)
        (one,) = columns[which]
        entry = plan.entries[one]
        sizes = list(ShardLayout.of(entry.partition).local_sizes)
        places = [p for held in ShardLayout.of(entry.partition).ranges for p in held]
        if len(set(sizes)) > 1 or len(places) != ranks:
            continue  # of one size on every rank, so that the other rank's part fits as well
        layout = ShardLayout(sum(sizes), tuple((p,) for p in reversed(places)))
        change = {one: recut(entry, layout)}
        names = around(row, columns)
        yield WrongPlan(f"{kind} of another rank", with_entries(plan, change), names)
    fused = [pair for pair in pairs if is_fused(plan, pair)]
    if fused:
        columns, row = rng.choice(fused)
        layout = ShardLayout.of(plan.entries[columns[0]].partition)
        change = {
            columns[0]: recut(
                plan.entries[columns[0]], Partition.from_sizes(layout.local_sizes.sizes)
            )
        }
        names = around(row, columns)
        yield WrongPlan("fused projection cut as one", with_entries(plan, change), names)


def is_fused(plan: ShardPlan, pair: Pair) -> bool:
    layout = ShardLayout.of(plan.entries[pair[0][0]].partition)
    return len(pair[0]) == 1 and not layout.is_consecutive


# -- damage


def damages(plan: ShardPlan, order: list[str], rng: random.Random) -> Iterator[Damage]:
    """One of each kind that the plan has room for; ``order``: modules as they run."""
    at = {name: i for i, name in enumerate(order)}
    by_style: dict[str, list[str]] = {}
    for name, entry in plan.entries.items():
        if name in at:
            by_style.setdefault(entry.style, []).append(name)
    shapes = plan.shapes
    rows, columns = by_style.get(ROW, []), by_style.get(COLUMN, [])
    for names, kind in ((rows, "row"), (columns, "column")):
        biased = [n for n in names if f"{n}.bias" in shapes]
        if biased:
            yield Damage(f"{kind} bias doubled", rng.choice(biased), adds_bias)
        if names:
            yield Damage(f"{kind} weight shifted", rng.choice(names), shifts("weight"))
    if rows:
        yield Damage("row not summed", rng.choice(rows), not_summed)
    for name in rng.sample(by_style.get(ATTENTION, []), min(1, len(by_style.get(ATTENTION, [])))):
        yield Damage("attention not summed", name, not_summed)
        yield Damage("attention's projection shifted", name, shifts("in_proj_weight"))
    tables = [n for n in by_style.get(VOCABULARY, []) if is_first_of_its_weight(plan, n, at)]
    if tables:
        yield Damage("rows of the vocabulary shifted", rng.choice(tables), shifts())
    alike = [
        (a, b)
        for names in (rows, columns)
        for a in names
        for b in names
        if at[a] < at[b] and shapes[f"{a}.weight"] == shapes[f"{b}.weight"]
        if plan.entries[a].partition == plan.entries[b].partition
    ]
    if alike:
        first, second = rng.choice(alike)
        yield Damage("weights swapped", first, swaps(first, second))
    norms = [n.rpartition(".")[0] for n, shape in shapes.items() if len(shape) == 1]
    norms = [n for n in norms if n in at and f"{n}.weight" in shapes]
    norms = [n for n in norms if len(shapes[f"{n}.weight"]) == 1]
    if norms:
        yield Damage("a norm of its own on the last rank", rng.choice(norms), one_rank(scales))
    if rows:
        yield Damage("an error on one rank", rng.choice(rows), one_rank(raises))


def is_first_of_its_weight(plan: ShardPlan, name: str, at: Mapping[str, int]) -> bool:
    """Whether no module that shares its weight runs before it."""
    own = plan.aliases.get(f"{name}.weight", f"{name}.weight")
    holders = [n for n in at if plan.aliases.get(f"{n}.weight", f"{n}.weight") == own]
    return min(holders, key=lambda holder: at[holder]) == name


def adds_bias(layer: Any) -> Callable[[], None]:
    handle = layer.register_forward_hook(lambda module, args, output: output + module.bias)
    return handle.remove


def not_summed(layer: Any) -> Callable[[], None]:
    row = layer.out_proj if isinstance(layer, ParallelMultiheadAttention) else layer
    assert isinstance(row, RowParallelLinear)
    row.reduce_results = False
    return lambda: setattr(row, "reduce_results", True)


def shifts(local: str = "weight") -> Callable[[Any], Callable[[], None]]:
    """Every slice one further along the dimension that is cut."""

    def apply(layer: Any) -> Callable[[], None]:
        parameter = getattr(layer, local)
        before = parameter.detach().clone()
        with torch.no_grad():
            parameter.copy_(before.roll(1, layer.shard_dims[local]))

        def undo() -> None:
            with torch.no_grad():
                parameter.copy_(before)

        return undo

    return apply


def swaps(first: str, second: str) -> Callable[[Any], Callable[[], None]]:
    def apply(model: Any) -> Callable[[], None]:
        a, b = (model.get_submodule(name).weight for name in (first, second))

        def swap() -> None:
            with torch.no_grad():
                kept = a.clone()
                a.copy_(b)
                b.copy_(kept)

        swap()
        return swap

    apply.__dict__["whole_model"] = True
    return apply


def one_rank(damage: Callable[[Any], Callable[[], None]]) -> Callable[[Any], Callable[[], None]]:
    """On the last rank alone."""

    def apply(layer: Any) -> Callable[[], None]:
        return damage(layer)

    apply.__dict__["last_rank"] = True
    return apply


def scales(norm: Any) -> Callable[[], None]:
    with torch.no_grad():
        norm.weight.mul_(1.5)

    def undo() -> None:
        with torch.no_grad():
            norm.weight.div_(1.5)

    return undo


def raises(layer: Any) -> Callable[[], None]:
    def fail(module: Any, args: Any) -> None:
        raise KeyError("planted")

    return layer.register_forward_pre_hook(fail).remove  # type: ignore[no-any-return]


def skips(layer: Any) -> Callable[[], None]:
    """Takes no part in the sum of the others."""
    layer.forward = lambda x: x.new_zeros(*x.shape[:-1], layer.out_features)

    def undo() -> None:
        del layer.forward

    return undo


@contextmanager
def damaged(model: nn.Module, damage: Damage, rank: int, size: int) -> Iterator[None]:
    """The model damaged within the block."""
    target: Any = model.get_submodule(damage.name)
    marks = damage.apply.__dict__
    if marks.get("whole_model"):
        target = model
    undo: Callable[[], None] = lambda: None  # noqa: E731
    if rank == size - 1 or not marks.get("last_rank"):
        undo = damage.apply(target)
    try:
        yield
    finally:
        undo()
