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
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from . import rules
from .axes import Axis, leaves
from .solve import Solution
from .trace import Event, Leaf, Trace, Tracer, Value, outputs_of, run
from .translate import Translator
from .twin import mode_of, twin_of

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
        "__setitem__",
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
        self,
        model: nn.Module,
        found: dict[str, Leaf],
        trace: Trace,
        solution: Solution,
        rank: int,
        regions: Collection[str],
    ) -> None:
        super().__init__(model, found, trace.kind)
        self.dense = trace.events
        self.spans = trace.spans
        self.regions = regions
        self.translator: Translator | None = None
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

    def enter(self, name: str) -> None:
        """Nothing to note."""

    def leave(self, output: Any) -> None:
        """Nothing to note."""

    def call(
        self, func: Callable[..., Any], name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        starts = rules.starts(name, args, kwargs)
        result = func(*args, **kwargs)
        outs = outputs_of(name, args, result)
        if outs:
            self._compare(name, outs, tuple(rules.constants((args, kwargs))), starts)
        return result

    def _compare(
        self,
        name: str,
        outs: Sequence[Tensor],
        constants: tuple[Any, ...],
        starts: Sequence[tuple[int, int]] = (),
    ) -> None:
        while (event := self.event) is not None and event.name != name:
            # such as repeating each key/value head once, or what the code keeps from call to call
            if not self._does_nothing(event) and not all(value.is_free for value in event.outs):
                break
            self.at += 1
        event = self.event
        if event is None or event.name != name:
            raise Departure(event, f"calls {name} instead of {event.name if event else 'nothing'}")
        if len(event.outs) != len(outs):
            raise Departure(event, f"{name} gives {len(outs)} tensors, not {len(event.outs)}")
        for value, out in zip(event.outs, outs, strict=True):
            expected = self.expected(value)
            if tuple(out.shape) != expected and not value.is_constant:
                raise Departure(event, f"{name} gives {list(out.shape)}, expected {list(expected)}")
        constant = all(value.is_constant for value in event.outs)
        if not constant and not _alike(event.constants, constants, name in _SIZED):
            raise Departure(event, f"{name} gets {constants} instead of {event.constants}")
        if not constant and all(out.numel() for out in outs):
            expected_starts = [(at, self._start(event.ins[0], at, a)) for at, a in event.starts]
            if list(starts) != expected_starts:
                raise Departure(event, f"{name} starts at {starts}, not {expected_starts}")
        self.at += 1

    def _start(self, value: Value, at: int, start: int) -> int:
        """Where the part of a slice that this rank holds begins in the rank's part."""
        if value.dims is None:
            return start
        ranges = self.solution.ranges(value.dims[at], self.rank)
        return sum(max(0, min(b, start) - a) for a, b in ranges)

    def _does_nothing(self, event: Event) -> bool:
        """Whether on this rank's sizes a call only renames dimensions: code may leave it out."""
        if event.name not in _SHAPES or not event.ins:
            return False
        before, after = (math.prod(self.expected(v)) for v in (event.ins[0], event.outs[0]))
        return len(event.outs) == 1 and before == after

    def call_region(self, name: str, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """A translated module's forward: what it gives is compared, not how."""
        if self.translator is not None:
            return forward(*args, **kwargs)
        span = next((s for s in self.spans if s.module == name and s.start == self.at), None)
        if span is None:
            raise Departure(self.event, f"calls {name}")
        self.translator = Translator(self.solution, self.rank, name, lambda tensor: tensor)
        try:
            with self._pause(), self.translator:
                result = forward(*args, **kwargs)
        finally:
            self.translator = None
        outs = list(rules.tensors(result))
        expected = [self.expected(value) for value in span.outs]
        if [tuple(out.shape) for out in outs] != expected:
            raise Departure(self.event, f"{name} gives other shapes than {expected}")
        self.at = span.stop
        return result

    def _in_region(self, leaf: Leaf, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        assert self.translator is not None
        x = next(rules.tensors((args, kwargs)))
        with torch._C.DisableTorchFunction():
            if leaf.name in self.columns:
                assert leaf.out_axis is not None
                y = _blank(leaf, x, self.solution.local_size([leaf.out_axis], self.rank))
            elif leaf.name in self.rows:
                assert leaf.in_axis is not None and leaf.out_axis is not None
                if x.shape[-1] != self.solution.local_size([leaf.in_axis], self.rank):
                    raise Departure(None, f"{leaf.name} gets {list(x.shape)}")
                y = _blank(leaf, x, leaf.out_axis.size)
            else:
                return forward(*args, **kwargs)
        return self.translator.leaf_output(
            y, x, leaf.out_axis if leaf.name in self.columns else None
        )

    def call_leaf(self, leaf: Leaf, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        if self.translator is not None:
            return self._in_region(leaf, forward, args, kwargs)
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


def _blank(leaf: Leaf, x: Tensor, width: int) -> Tensor:
    weight = next(leaf.module.parameters())
    shape = x.shape if leaf.kind == "embedding" else x.shape[:-1]
    return (
        torch.zeros((*shape, width), dtype=weight.dtype, device=x.device).requires_grad_().clone()
    )


def _alike(dense: tuple[Any, ...], local: tuple[Any, ...], are_sizes: bool) -> bool:
    if len(dense) != len(local):
        return False
    return all(
        a == b or (are_sizes and type(a) is int and type(b) is int)
        for a, b in zip(dense, local, strict=True)
    )


def replay(
    model: nn.Module,
    trace: Trace,
    solution: Solution,
    rank: int,
    attributes: Attributes,
    regions: Collection[str],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
) -> None:
    """Run the model on ``rank``'s sizes, ``regions`` translated.

    Raises: Departure where its code does not follow the cuts.
    """
    runner = _Replay(model, trace.leaves, trace, solution, rank, regions)
    mode = mode_of(trace.kind)
    twin = twin_of(model, trace.kind, mode)
    for name, values in attributes.items():
        for attribute, per_rank in values.items():
            setattr(twin.get_submodule(name), attribute, per_rank[rank])
    for name in regions:
        region = twin.get_submodule(name)
        region.__dict__["forward"] = partial(_call_region, runner, name, region.forward)
    with _quiet():
        try:
            run(twin, mode, runner, args, kwargs)
        except Departure:
            raise
        except Exception as error:
            raise Departure(runner.event, f"{type(error).__name__}: {error}") from error
    if runner.event is not None:
        raise Departure(runner.event, "stops early")


def _call_region(runner: _Replay, name: str, forward: Any, *args: Any, **kwargs: Any) -> Any:
    return runner.call_region(name, forward, args, kwargs)


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
    """How the model's code is brought to run on local sizes: values for attributes that it reads,
    and ``regions``, modules that are translated. ``departure``: where it still departs.
    """

    attributes: Attributes = field(default_factory=dict)
    regions: dict[str, str] = field(default_factory=dict)
    departure: Departure | None = None


class Fitter:
    """Finds a `Fit` for one model and its cuts."""

    def __init__(
        self,
        model: nn.Module,
        trace: Trace,
        solution: Solution,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
    ) -> None:
        self.model, self.trace, self.solution = model, trace, solution
        self.args, self.kwargs = args, kwargs
        self.ranks = _unlike_ranks(solution)
        self.fit = Fit()

    def find(self) -> Fit:
        """Attribute values first, tried on all modules of a class together: the fewest integers
        that equal a size which is cut. Where none do, modules of that class are translated.
        """
        tried: set[tuple[str, str]] = set()
        while True:
            self.fit.departure = departure = self._first_departure()
            if departure is None or departure.event is None:
                return self.fit
            owner = _owner(departure.event)
            if ("attributes", owner) not in tried:
                tried.add(("attributes", owner))
                best = self._attributes_for(owner, departure)
                if best is not None:
                    self.fit.attributes.update(best)
                    continue
            region = self._region_for(owner)
            if region is None or ("region", region) in tried:
                return self.fit
            tried.add(("region", region))
            self._translate(region, str(departure))

    def _translate(self, region: str, why: str) -> None:
        """Translate a module and all of its class."""
        kind = type(self.model.get_submodule(region))
        called = {span.module for span in self.trace.spans}
        for name, module in self.model.named_modules():
            if type(module) is kind and name in called:
                self.fit.regions[name] = why
                self.fit.attributes.pop(name, None)

    def _region_for(self, owner: str) -> str | None:
        """The nearest module around ``owner`` that has leaves of both sides of a pair."""
        while True:
            inside = f"{owner}." if owner else ""
            for cut in self.solution.cuts:
                sides = (cut.pair.producers, cut.pair.consumers)
                if all(any(name.startswith(inside) for name in side) for side in sides):
                    return owner
            if not owner:
                return None
            owner = owner.rpartition(".")[0]

    def _attributes_for(self, owner: str, departure: Departure) -> Attributes | None:
        """Values for all modules of the owner's class that get past its departure."""
        kind = type(self.model.get_submodule(owner))
        alike = [name for name, module in self.model.named_modules() if type(module) is kind]
        choices = {name: self._candidates(name) for name in alike}
        names = sorted({attribute for values in choices.values() for attribute in values})
        reached = _position(self.trace, departure)
        for count in range(1, len(names) + 1 if len(names) <= 6 else 3):
            for chosen in itertools.combinations(names, count):
                attributes = {
                    name: kept
                    for name, values in choices.items()
                    if (kept := {a: v for a, v in values.items() if a in chosen})
                }
                left = self._first_departure({**self.fit.attributes, **attributes})
                if left is None or (
                    _position(self.trace, left) > reached
                    and left.event is not None
                    and type(self.model.get_submodule(left.event.module)) is not kind
                ):
                    return attributes
        return None

    def _first_departure(self, attributes: Attributes | None = None) -> Departure | None:
        attributes = self.fit.attributes if attributes is None else attributes
        for rank in self.ranks:
            try:
                replay(
                    self.model,
                    self.trace,
                    self.solution,
                    rank,
                    attributes,
                    self.fit.regions,
                    self.args,
                    self.kwargs,
                )
            except Departure as departure:
                return departure
        return None

    def _candidates(self, owner: str) -> dict[str, tuple[int, ...]]:
        """Integer attributes of a module that equal a size which is cut there: local values."""
        sizes: dict[int, tuple[int, ...]] = {}
        for event in self.trace.events:
            here = event.module == owner or event.module.rpartition(".")[0] == owner
            for value in [*event.ins, *event.outs] if here else ():
                for dim in value.dims or ():
                    for part in (dim, *([leaf] for leaf in leaves(dim))):
                        self._add_size(sizes, part)
        local = dict(sizes)
        # heads per key/value head
        for (a, many), (b, few) in itertools.permutations(sizes.items(), 2):
            divides = a > b and a % b == 0 and a // b not in sizes
            if divides and all(y and x % y == 0 for x, y in zip(many, few, strict=True)):
                ratio = tuple(x // y for x, y in zip(many, few, strict=True))
                if set(ratio) != {a // b}:
                    local[a // b] = ratio
        return {
            name: local[value]
            for name, value in vars(self.model.get_submodule(owner)).items()
            if type(value) is int and value in local
        }

    def _add_size(self, sizes: dict[int, tuple[int, ...]], part: Sequence[Axis]) -> None:
        whole = math.prod(axis.size for axis in part)
        ranks = range(self.solution.ranks)
        per_rank = tuple(self.solution.local_size(part, rank) for rank in ranks)
        if set(per_rank) != {whole}:
            sizes[whole] = per_rank


def _position(trace: Trace, departure: Departure) -> int:
    if departure.event is None:
        return len(trace.events)
    return trace.events.index(departure.event)


def _unlike_ranks(solution: Solution) -> list[int]:
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


def _owner(event: Event) -> str:
    """The module whose code made the call."""
    return event.module.rpartition(".")[0] if event.leaf is not None else event.module
