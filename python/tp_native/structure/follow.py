"""Follow a model, choose the pairs to cut, and make sure that its own code runs on the pieces."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch import nn

from . import rules
from .axes import parts
from .inputs import Inputs, guesses
from .replay import Attributes, Fitter
from .solve import Pair, Solution, crossing, cut_pair, find_pairs, gradients
from .trace import Event, Leaf, Trace, trace, trace_training
from .twin import Kind

Fits = Callable[[Sequence[str], Sequence[str]], bool]


@dataclass
class Followed:
    """What following a model gave: cuts, and what its modules need besides.

    ``failure``: why it could not be followed at all; then nothing else is known.
    """

    trace: Trace
    solution: Solution
    attributes: Attributes = field(default_factory=dict)
    partial: set[str] = field(default_factory=set)
    partial_outputs: set[str] = field(default_factory=set)
    on_pieces: set[str] = field(default_factory=set)
    translated: dict[str, str] = field(default_factory=dict)
    random: dict[str, tuple[bool, ...]] = field(default_factory=dict)
    dropped: dict[str, str] = field(default_factory=dict)  # leaf -> why its pair was given up
    failure: str = ""

    def why_alone(self, leaf: Leaf) -> str:
        """Why a leaf is in no pair."""
        if leaf.name in self.dropped:
            return self.dropped[leaf.name]
        if leaf.name not in self.trace.reached:
            return "the forward pass that was followed does not reach it"
        if leaf.out_axis is None:
            return ""
        return next((part.mixed for part in parts(leaf.out_axis) if part.mixed), "")


def follow(
    model: nn.Module,
    found: dict[str, Leaf],
    fits: Fits,
    ranks: int,
    ratios: Sequence[float] | None,
    inputs: Inputs | None,
) -> Followed:
    """Trace ``model`` (on guessed inputs unless given) and cut what can be cut in pairs.

    ``fits(producers, consumers)`` says whether a pair is wanted. A pair is given up where the
    model's code can't run on its pieces or its gradients would be wrong.
    """
    seen, used, failure = _trace(model, found, inputs)
    if seen is None or used is None:
        return Followed(Trace(found), Solution(ranks), failure=failure)
    for name, leaf in found.items():  # the planner's own leaves get the axes that were traced
        leaf.in_axis, leaf.out_axis = seen.leaves[name].in_axis, seen.leaves[name].out_axis
    result = Followed(seen, Solution(ranks))
    pairs = find_pairs(seen, lambda pair: fits(pair.producers, pair.consumers))
    while True:
        cuts = [cut_pair(pair, ranks, ratios) for pair in pairs]
        result.solution = Solution(ranks, cuts)
        bad = _overlapping(result, pairs)
        if not bad:
            fitted = Fitter(model, seen, result.solution, *used).find()
            if fitted.departure is not None:
                blamed = _blame(result, pairs, fitted.departure.event)
                bad = {id(pair): f"its code has whole sizes: {fitted.departure}" for pair in blamed}
        if not bad:
            flow = gradients(seen, result.solution, fitted.regions)
            if flow.conflict is None:
                result.attributes = fitted.attributes
                result.translated = fitted.regions
                result.partial = flow.partial
                result.partial_outputs = flow.partial_outputs
                result.random = _random(model, result, used)
                result.on_pieces = flow.on_pieces
                return result
            event, why = flow.conflict
            bad = {id(p): f"{why} ({_place(event)})" for p in _blame(result, pairs, event)}
        for pair in pairs:
            if id(pair) in bad:
                result.dropped.update(dict.fromkeys(pair.members, bad[id(pair)]))
        pairs = [pair for pair in pairs if id(pair) not in bad]


def _random(model: nn.Module, result: Followed, used: Inputs) -> dict[str, tuple[bool, ...]]:
    """Modules that draw masks of cut activations when they train: for each mask of one call,
    whether it is one.
    """
    drops = any(
        event.name in rules.RANDOM and event.name != "scaled_dot_product_attention"
        for event in result.trace.events
    )
    if not result.solution.cuts or not (drops or _may_drop(model)):
        return {}
    try:
        seen = trace_training(model, result.trace, *used)
    except Exception:  # a training forward that wants more than these inputs: labels, a step
        return {}
    found: dict[str, tuple[bool, ...]] = {}
    for span in seen.spans:
        events = [e for e in seen.events[span.start : span.stop] if e.module == span.module]
        cut = tuple(result.solution.is_cut(event.outs[0]) for event in events if event.drops > 0)
        if any(cut):
            found.setdefault(span.module, cut)
    return found


def _may_drop(model: nn.Module) -> bool:
    """Whether any module, or its config, has a dropout probability above 0."""
    tables = [vars(module) for module in model.modules()]
    tables += [
        vars(config) for table in tables if hasattr(config := table.get("config"), "__dict__")
    ]
    return any(
        isinstance(m, nn.modules.dropout._DropoutNd) and m.p > 0 for m in model.modules()
    ) or any(
        "drop" in name and type(value) is float and value > 0
        for table in tables
        for name, value in table.items()
    )


def _trace(
    model: nn.Module, found: dict[str, Leaf], inputs: Inputs | None
) -> tuple[Trace | None, Inputs | None, str]:
    failure = ""
    kinds: tuple[Kind, ...] = ("meta", "fake", "real")
    if any(p.is_meta for p in model.parameters()):
        kinds = ("meta", "fake")
    for args, kwargs in [inputs] if inputs is not None else guesses(model):
        for kind in kinds:
            try:
                return trace(model, args, kwargs, found, kind), (args, kwargs), ""
            except Exception as error:
                said = (str(error).splitlines() or [""])[0]
                failure = failure or f"{type(error).__name__}: {said}"
    return None, None, failure or "no inputs to try"


def _overlapping(result: Followed, pairs: Sequence[Pair]) -> dict[int, str]:
    """Pairs whose sums would count something twice."""
    bad = {}
    for pair in pairs:
        for name in pair.consumers:
            axis = result.trace.leaves[name].in_axis
            assert axis is not None
            if result.solution.layout(axis).is_replicated:
                bad[id(pair)] = f"{name} would sum a part that several ranks hold"
    for event in result.trace.events:
        crossed = crossing(event, result.solution)
        if crossed is not None:
            bad[id(crossed)] = f"ranks would hold blocks of an outer product ({_place(event)})"
    return bad


def _blame(result: Followed, pairs: Sequence[Pair], event: Event | None) -> list[Pair]:
    """The pairs that an event has to do with: those of its axes, else those nearest to it."""
    if event is None:
        return list(pairs)
    axes = [
        part
        for value in [*event.ins, *event.outs]
        for dim in value.dims or ()
        for axis in dim
        for part in parts(axis)
    ]
    involved = {id(cut.pair) for axis in axes if (cut := result.solution.cut_of(axis)) is not None}
    if event.leaf is not None:
        involved |= {id(pair) for pair in pairs if event.leaf in pair.members}
    name = event.module
    while not involved:
        prefix = f"{name}." if name else ""
        involved = {id(p) for p in pairs if any(m.startswith(prefix) for m in p.members)}
        if not name:
            break
        name = name.rpartition(".")[0]
    return [pair for pair in pairs if id(pair) in involved] or list(pairs)


def _place(event: Event) -> str:
    return f"{event.name} in {event.module or 'the model'}"
