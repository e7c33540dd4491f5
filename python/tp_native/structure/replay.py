"""The model's own code, run on one rank's sizes: does it do what the trace says it must?

A second pass on fake tensors, with cut leaves giving local widths. Every call must be the dense
pass's, with the dense pass's constants, and give the local shape that follows from the cuts; sizes
that the code reads from its modules (``num_heads``) may be given local values.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from . import rules
from .axes import leaves
from .solve import Solution
from .trace import Event, Leaf, Trace, Tracer, Value, run

# Calls whose integers are sizes, which differ between ranks.
_SIZED = frozenset(
    [
        "view",
        "reshape",
        "expand",
        "expand_as",
        "split",
        "chunk",
        "unflatten",
        "narrow",
        "repeat",
        "repeat_interleave",
        "tile",
        "broadcast_to",
        "split_with_sizes",
        "tensor_split",
        "reshape_as",
        "view_as",
        "__getitem__",
    ]
)

_SHAPES = frozenset(
    [
        "view",
        "reshape",
        "expand",
        "flatten",
        "unflatten",
        "squeeze",
        "unsqueeze",
        "repeat_interleave",
        "__getitem__",
        "contiguous",
        "repeat",
    ]
)

# attribute values that modules get on each rank: module -> attribute -> one value per rank
Attributes = dict[str, dict[str, tuple[int, ...]]]


class Departure(Exception):
    """The code does something else on one rank's sizes; ``event`` is the dense call there."""

    def __init__(self, event: Event | None, why: str) -> None:
        super().__init__(why)
        self.event = event


class _Replay(Tracer):
    def __init__(
        self, model: nn.Module, found: dict[str, Leaf], trace: Trace, solution: Solution, rank: int
    ) -> None:
        super().__init__(model, found)
        self.dense = trace.events
        self.solution = solution
        self.rank = rank
        self.at = 0
        self.columns = {n for cut in solution.cuts for n in cut.pair.producers}
        self.rows = {n for cut in solution.cuts for n in cut.pair.consumers}

    @property
    def event(self) -> Event | None:
        return self.dense[self.at] if self.at < len(self.dense) else None

    def expected(self, value: Value) -> tuple[int, ...]:
        if value.dims is None:
            return value.shape
        return tuple(self.solution.local_size(dim, self.rank) for dim in value.dims)

    def call(
        self, func: Callable[..., Any], name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        result = func(*args, **kwargs)
        outs = list(rules.tensors(result))
        if outs:
            self._compare(name, outs, tuple(rules.constants((args, kwargs))))
        return result

    def _compare(self, name: str, outs: Sequence[Tensor], constants: tuple[Any, ...]) -> None:
        while self.event is not None and self.event.name != name and self._does_nothing(self.event):
            self.at += 1  # such as repeating each key/value head once
        event = self.event
        if event is None or event.name != name or len(event.outs) != len(outs):
            raise Departure(event, f"calls {name} instead of {event.name if event else 'nothing'}")
        for value, out in zip(event.outs, outs, strict=True):
            expected = self.expected(value)
            if tuple(out.shape) != expected and not value.is_constant:
                raise Departure(event, f"{name} gives {list(out.shape)}, expected {list(expected)}")
        constant = all(value.is_constant for value in event.outs)
        if not constant and not _alike(event.constants, constants, name in _SIZED):
            raise Departure(event, f"{name} gets {constants} instead of {event.constants}")
        self.at += 1

    def _does_nothing(self, event: Event) -> bool:
        """Whether on this rank's sizes a call only renames dimensions: code may leave it out."""
        if event.name not in _SHAPES or not event.ins:
            return False
        before, after = (math.prod(self.expected(v)) for v in (event.ins[0], event.outs[0]))
        return len(event.outs) == 1 and before == after

    def call_leaf(self, leaf: Leaf, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        event = self.event
        if leaf.name in self.rows or leaf.name in self.columns:
            if event is None or event.leaf != leaf.name:
                raise Departure(event, f"calls {leaf.name}")
            x = next(rules.tensors((args, kwargs)))
            if leaf.kind != "embedding":
                given = self.expected(event.ins[0])
                if tuple(x.shape) != given:
                    raise Departure(event, f"{leaf.name} gets {list(x.shape)}, not {list(given)}")
            with self._pause():
                result: Any = self._local(event.outs[0])
        else:
            with self._pause():
                result = forward(*args, **kwargs)
        self._compare("leaf", list(rules.tensors(result)), ())
        return result

    def _local(self, value: Value) -> Tensor:
        """This rank's part of a dense activation."""
        part = value.tensor
        for at, dim in enumerate(value.dims or ()):
            pieces = [part.narrow(at, a, b - a) for a, b in self.solution.ranges(dim, self.rank)]
            part = torch.cat(pieces, at) if pieces else part.narrow(at, 0, 0)
        return part.clone()


def _alike(dense: tuple[Any, ...], local: tuple[Any, ...], are_sizes: bool) -> bool:
    if len(dense) != len(local):
        return False
    return all(
        a == b or (are_sizes and type(a) is int and type(b) is int)
        for a, b in zip(dense, local, strict=True)
    )


@contextlib.contextmanager
def local_attributes(model: nn.Module, attributes: Attributes, rank: int) -> Iterator[None]:
    """Modules with this rank's attribute values while the block runs."""
    undo = []
    try:
        for name, values in attributes.items():
            module = model.get_submodule(name)
            for attribute, per_rank in values.items():
                undo.append((module, attribute, getattr(module, attribute)))
                setattr(module, attribute, per_rank[rank])
        yield
    finally:
        for module, attribute, value in reversed(undo):
            setattr(module, attribute, value)


def replay(
    model: nn.Module,
    trace: Trace,
    solution: Solution,
    rank: int,
    attributes: Attributes,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
) -> None:
    """Run the model on ``rank``'s sizes.

    Raises: Departure where its code does not follow the cuts.
    """
    runner = _Replay(model, trace.leaves, trace, solution, rank)
    mode = FakeTensorMode(allow_non_fake_inputs=True) if trace.is_fake else None
    with local_attributes(model, attributes, rank), _quiet():
        try:
            run(model, mode, runner, trace.leaves, args, kwargs)
        except Departure:
            raise
        except Exception as error:
            raise Departure(runner.event, f"{type(error).__name__}: {error}") from error
    if runner.event is not None:
        raise Departure(runner.event, "stops early")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Errors are expected here, so torch need not log them."""
    log = logging.getLogger("torch._subclasses.fake_tensor")
    before = log.disabled
    log.disabled = True
    try:
        yield
    finally:
        log.disabled = before


# -- sizes that the code reads from its modules


@dataclass
class Fit:
    """How the model's code is brought to run on local sizes."""

    attributes: Attributes = field(default_factory=dict)
    departure: Departure | None = None


def fit(
    model: nn.Module,
    trace: Trace,
    solution: Solution,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
) -> Fit:
    """Find attribute values with which the code runs on every rank's sizes.

    Tried on modules of a class together: none, then the fewest integers that equal a size which is
    cut. ``departure`` says where the code still departs.
    """
    found = Fit()
    ranks = _unlike_ranks(trace, solution)
    tried: set[str] = set()
    while True:
        found.departure = _first_departure(
            model, trace, solution, ranks, found.attributes, args, kwargs
        )
        if found.departure is None:
            return found
        event = found.departure.event
        owner = _owner(model, event) if event is not None else None
        if owner is None or owner in tried:
            return found
        tried.add(owner)
        best = _fit_class(model, trace, solution, ranks, found, owner, args, kwargs)
        if best is None:
            return found
        found.attributes.update(best)


def _fit_class(
    model: nn.Module,
    trace: Trace,
    solution: Solution,
    ranks: Sequence[int],
    found: Fit,
    owner: str,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
) -> Attributes | None:
    """Values for all modules of the owner's class that get past its departure."""
    kind = type(model.get_submodule(owner))
    alike = [name for name, module in model.named_modules() if type(module) is kind]
    choices = {name: _candidates(model, trace, solution, name) for name in alike}
    names = sorted({attribute for values in choices.values() for attribute in values})
    reached = _position(trace, found.departure)
    for count in range(1, len(names) + 1):
        for chosen in itertools.combinations(names, count):
            attributes = {
                name: {a: v for a, v in values.items() if a in chosen}
                for name, values in choices.items()
            }
            attempt = {**found.attributes, **{n: v for n, v in attributes.items() if v}}
            left = _first_departure(model, trace, solution, ranks, attempt, args, kwargs)
            if left is None or (
                _position(trace, left) > reached
                and left.event is not None
                and type(model.get_submodule(left.event.module)) is not kind
            ):
                return {n: v for n, v in attributes.items() if v}
        if len(names) > 6 and count == 2:
            break
    return None


def _position(trace: Trace, departure: Departure | None) -> int:
    if departure is None or departure.event is None:
        return len(trace.events)
    return trace.events.index(departure.event)


def _first_departure(
    model: nn.Module,
    trace: Trace,
    solution: Solution,
    ranks: Sequence[int],
    attributes: Attributes,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
) -> Departure | None:
    for rank in ranks:
        try:
            replay(model, trace, solution, rank, attributes, args, kwargs)
        except Departure as departure:
            return departure
    return None


def _unlike_ranks(trace: Trace, solution: Solution) -> list[int]:
    """One rank for each set of local sizes."""
    seen: dict[tuple[int, ...], int] = {}
    for rank in range(solution.ranks):
        sizes = tuple(
            size
            for cut in solution.cuts
            for size in (cut.outer.local_sizes[rank], cut.both[rank] if cut.both else -1)
        )
        seen.setdefault(sizes, rank)
    return sorted(seen.values())


def _owner(model: nn.Module, event: Event) -> str | None:
    """The module whose code made the call."""
    name = event.module
    return name.rpartition(".")[0] if event.leaf is not None else name


def _candidates(
    model: nn.Module, trace: Trace, solution: Solution, owner: str
) -> dict[str, tuple[int, ...]]:
    """Integer attributes of a module that equal a size which is cut there, with local values."""
    local: dict[int, tuple[int, ...]] = {}
    sizes: dict[int, tuple[int, ...]] = {}
    for event in trace.events:
        here = event.module == owner or event.module.rpartition(".")[0] == owner
        for value in [*event.ins, *event.outs] if here else ():
            for dim in value.dims or ():
                for part in (dim, *([leaf] for leaf in leaves(dim))):
                    whole = 1
                    for axis in part:
                        whole *= axis.size
                    per_rank = tuple(
                        solution.local_size(part, rank) for rank in range(solution.ranks)
                    )
                    if set(per_rank) != {whole}:
                        sizes[whole] = per_rank
    local.update(sizes)
    # heads per key/value head
    for (a, many), (b, few) in itertools.permutations(sizes.items(), 2):
        if a > b and a % b == 0 and a // b not in local:
            if all(y and x % y == 0 for x, y in zip(many, few, strict=True)):
                ratio = tuple(x // y for x, y in zip(many, few, strict=True))
                if set(ratio) != {a // b}:
                    local[a // b] = ratio
    module = model.get_submodule(owner)
    return {
        name: local[value]
        for name, value in vars(module).items()
        if type(value) is int and value in local
    }
