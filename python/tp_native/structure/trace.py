"""One forward pass of a dense model, followed function by function: which axis of which weight each
dimension of each activation is.

Runs on fake tensors: no weight is read and nothing is computed. A function that the rules in
`rules` don't know mixes whatever goes into it, so what is not understood is never cut.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from math import nan
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from . import rules
from .axes import Axis, Dim, join, leaves, mix, mix_crossed, opaque
from .twin import FACTORIES, Kind, mode_of, stand_ins, twin_of


@dataclass(eq=False)
class Value:
    """One activation: its dimensions' axes (None: of no weight) and whether gradients reach it."""

    tensor: Tensor
    dims: list[Dim] | None
    is_differentiable: bool
    parameter: str | None = None
    is_input: bool = False
    is_free: bool = False  # made from neither inputs nor parameters
    is_constant: bool = False  # one number everywhere: any part is like any other

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)


@dataclass(eq=False)
class Event:
    """One call: a function's, or a leaf module's (``leaf`` names it)."""

    name: str
    module: str
    ins: list[Value]
    outs: list[Value]
    constants: tuple[Any, ...]
    leaf: str | None = None
    drops: float = 0.0  # the probability with which it drops elements
    starts: list[tuple[int, int]] = field(default_factory=list)  # of slices


@dataclass(eq=False)
class Leaf:
    """One Linear, Conv1D or Embedding: the axes of its weight."""

    name: str
    kind: str  # "linear", "conv1d", "embedding", "attention"
    module: nn.Module
    in_axis: Axis | None = None
    out_axis: Axis | None = None


@dataclass(eq=False)
class Span:
    """One call of a module: its first event, the one after its last, and its outputs."""

    module: str
    start: int
    stop: int
    outs: list[Value]


@dataclass
class Trace:
    """What one forward pass showed."""

    leaves: dict[str, Leaf]
    events: list[Event] = field(default_factory=list)
    spans: list[Span] = field(default_factory=list)
    reached: set[str] = field(default_factory=set)
    read_elsewhere: dict[str, str] = field(default_factory=dict)  # leaf -> where
    readers: dict[str, set[str]] = field(default_factory=dict)  # leaf -> modules
    reads: dict[str, set[str]] = field(default_factory=dict)  # leaf -> its parameters
    outputs: list[Value] = field(default_factory=list)
    kind: Kind = "meta"


def leaf_kind(module: nn.Module) -> str | None:
    """What a module is to the planner; None for one that is no leaf."""
    forward: Any = type(module).forward
    if isinstance(module, (nn.Linear, nn.Embedding)) and module._parameters.get("weight") is None:
        return None  # made from other parameters before each call
    if isinstance(module, nn.MultiheadAttention):
        return "attention" if forward is nn.MultiheadAttention.forward else None
    if isinstance(module, nn.Linear):
        return "linear" if forward is nn.Linear.forward or _is_affine(module) else None
    if isinstance(module, nn.Embedding):
        if module.max_norm is not None or module.sparse or module.scale_grad_by_freq:
            return None
        plain = forward is nn.Embedding.forward
        return "embedding" if plain or _looks_up_by_super(module) else None
    if type(module).__name__ == "Conv1D" and hasattr(module, "nf") and hasattr(module, "nx"):
        return "conv1d"
    return None


def _is_affine(module: nn.Linear) -> bool:
    """Whether a Linear with a forward of its own computes what nn.Linear does, tried on numbers."""
    twin = copy.copy(module)
    twin.__dict__ = {**module.__dict__, "_forward_hooks": {}, "_forward_pre_hooks": {}}
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    weight = nn.Parameter(drawn(3, 2), requires_grad=False)
    bias = nn.Parameter(drawn(3), requires_grad=False) if module.bias is not None else None
    twin.__dict__["_parameters"] = {"weight": weight, "bias": bias}
    if set(module._parameters) != {"weight", "bias"} or module._buffers or module._modules:
        return False
    x = drawn(2, 4, 2)
    try:
        with torch.no_grad():
            forward: Any = type(module).forward
            y = forward(twin, x)
    except Exception:
        return False
    return isinstance(y, Tensor) and torch.allclose(y, nn.functional.linear(x, weight, bias))


def _looks_up_by_super(module: nn.Embedding) -> bool:
    """Whether an Embedding with a forward of its own uses its weight by ``super().forward`` only,
    tried on numbers: the weight itself is NaN meanwhile.
    """
    ids = torch.arange(4)[None]
    return _tried(module, ids) or _tried(module, ids.shape)  # some make positions from a shape


def _tried(module: nn.Embedding, given: Any) -> bool:
    kind = type(module)
    if any(b.is_meta for b in module.buffers()) or set(module._parameters) != {"weight"}:
        return False
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(64, module.embedding_dim, generator=generator)

    class _Base(nn.Embedding):
        def forward(self, input: Tensor) -> Tensor:
            return nn.functional.embedding(input, table)

    try:
        probe = type(kind.__name__, (kind, _Base), {})
        results = []
        kinds: list[tuple[Any, Tensor]] = [(kind, table), (probe, torch.full_like(table, nan))]
        for cls, weight in kinds:
            twin = copy.copy(module)
            twin.__dict__ = {**module.__dict__, "padding_idx": None, "num_embeddings": 64}
            twin.__dict__["_parameters"] = {"weight": nn.Parameter(weight, requires_grad=False)}
            twin.__class__ = cls

            with torch.no_grad():
                results.append(cls.forward(twin, given))
    except Exception:
        return False
    return isinstance(results[0], Tensor) and torch.equal(*results)


def find_leaves(model: nn.Module) -> dict[str, Leaf]:
    """The leaves of a model by their first names; those inside a leaf are part of it."""
    found: dict[str, Leaf] = {}
    inside: set[int] = set()
    for name, module in model.named_modules():
        kind = leaf_kind(module)
        if kind is None or id(module) in inside:
            continue
        inside.update(id(child) for child in module.modules())
        found[name] = new_leaf(name, module, kind)
    return found


def new_leaf(name: str, module: nn.Module, kind: str) -> Leaf:
    """A leaf with axes of its own."""
    leaf = Leaf(name, kind, module)
    widths: Any = module
    if kind == "linear":
        leaf.in_axis, leaf.out_axis = Axis(widths.in_features), Axis(widths.out_features)
    elif kind == "conv1d":
        leaf.in_axis, leaf.out_axis = Axis(widths.nx), Axis(widths.nf)
    elif kind == "embedding":
        leaf.out_axis = Axis(widths.embedding_dim)
    return leaf


class Tracer(TorchFunctionMode):
    """Follows functions while a model runs; `trace` is the way in."""

    def __init__(self, model: nn.Module, found: dict[str, Leaf], kind: Kind = "real") -> None:
        super().__init__()
        self.model = model
        self.trace = Trace(found, kind=kind)
        self.values: dict[int, Value] = {}
        self.stack: list[tuple[str, int]] = []
        self.leaf_parameters: dict[int, str] = {}
        self.paused = 0

    # -- values

    def value_of(self, tensor: Tensor) -> Value:
        """What is known of a tensor; one not seen before is a constant or a buffer."""
        known = self.values.get(id(tensor))
        if known is None:
            known = self._remember(tensor, None, False)
            known.is_free = True
        return known

    def _remember(self, tensor: Tensor, dims: list[Dim] | None, differentiable: bool) -> Value:
        value = Value(tensor, dims, differentiable and tensor.is_floating_point())
        self.values[id(tensor)] = value  # keeps the tensor, so that its id stays its own
        return value

    def add_parameter(self, name: str, tensor: Tensor, leaf: str | None) -> None:
        """A parameter of the model; ``leaf``: the leaf module that it belongs to."""
        self._remember(tensor, None, True).parameter = name
        if leaf is not None:
            self.leaf_parameters[id(tensor)] = leaf

    def add_input(self, tensor: Tensor) -> None:
        """A tensor that the caller gives."""
        self._remember(tensor, None, tensor.is_floating_point()).is_input = True

    # -- functions

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        name = rules.name_of(func)
        if name in FACTORIES and self.trace.kind == "meta":
            kwargs = {**kwargs, "device": "meta"}
        if self.paused or name in rules.METADATA:
            return func(*args, **kwargs)
        if name == "__iter__":  # its pieces would come from nowhere
            return iter(self.call(Tensor.unbind, "unbind", args, kwargs))
        return self.call(func, name, args, kwargs)

    def call(
        self, func: Callable[..., Any], name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Run one function and note what comes out."""
        given = list(rules.tensors((args, kwargs)))
        for tensor in given:
            owner = self.leaf_parameters.get(id(tensor))
            if owner is not None:
                self.trace.read_elsewhere.setdefault(owner, self._place(name))
                self.trace.readers.setdefault(owner, set()).add(self._module())
                read = self.value_of(tensor).parameter or ""
                self.trace.reads.setdefault(owner, set()).add(read.rpartition(".")[2])
        ins = [self.value_of(tensor) for tensor in given]
        starts = rules.starts(name, args, kwargs)
        result = func(*args, **kwargs)
        outs = outputs_of(name, args, result)
        if not outs:
            self._without_output(name, ins)
            return result
        labels = self._labels(name, args, kwargs, ins, result, outs)
        differentiable = any(value.is_differentiable for value in ins) and name != "detach"
        made = []
        for tensor, dims in zip(outs, labels, strict=True):
            known = self.values.get(id(tensor))
            if known is not None and any(tensor is t for t in given):  # in place, or a no-op
                known.dims = dims if known.parameter is None else known.dims
                known.is_differentiable |= differentiable and tensor.is_floating_point()
                made.append(known)
            else:
                made.append(self._remember(tensor, dims, differentiable))
        constant = name in rules.CONSTANT or (
            name in rules.KEEPS_CONSTANT and bool(ins) and all(v.is_constant for v in ins)
        )
        free = all(value.is_free for value in ins)
        for value in made:
            value.is_constant, value.is_free = constant, free
        constants = tuple(rules.constants((args, kwargs)))
        event = Event(name, self._module(), ins, made, constants, starts=starts)
        if name in rules.RANDOM:
            event.drops = rules.drop_probability(name, args, kwargs)
        self.trace.events.append(event)
        return result

    def _without_output(self, name: str, ins: Sequence[Value]) -> None:
        """What reads values (``tolist``, ``equal``) needs all of them."""
        if name != "type":
            for value in ins:
                for dim in value.dims or ():
                    mix(dim, self._place(name))

    def _labels(
        self,
        name: str,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        ins: list[Value],
        result: Any,
        outs: list[Tensor],
    ) -> list[list[Dim] | None]:
        if all(value.dims is None for value in ins):
            return [None] * len(outs)
        if name in rules.CONSTANT and name.startswith("new_"):
            return [None] * len(outs)
        lookup = _Lookup(self)
        try:
            labels = rules.follow(name, lookup, args, kwargs, outs)
        except rules.NotFollowed as reason:
            why = f"{self._place(name)}{f': {reason}' if str(reason) else ''}"
            for value in ins:
                for dim in value.dims or ():
                    mix(dim, why)
            return [None] * len(outs)
        return labels

    def _module(self) -> str:
        return self.stack[-1][0] if self.stack else ""

    def _place(self, name: str) -> str:
        return f"{name} in {self._module() or type(self.model).__name__}"

    # -- modules

    def enter(self, name: str) -> None:
        """A module's call begins."""
        self.stack.append((name, len(self.trace.events)))

    def leave(self, output: Any) -> None:
        """The innermost module's call ends."""
        name, start = self.stack.pop()
        outs = [self.value_of(tensor) for tensor in rules.tensors(output)]
        self.trace.spans.append(Span(name, start, len(self.trace.events), outs))

    def call_leaf(self, leaf: Leaf, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """A leaf's own forward, as one event."""
        ins = [self.value_of(tensor) for tensor in rules.tensors((args, kwargs))]
        with self._pause():
            result = forward(*args, **kwargs)
        self.trace.reached.add(leaf.name)
        outs = list(rules.tensors(result))
        if leaf.kind == "attention" or not ins:
            for value in ins:
                for dim in value.dims or ():
                    mix(dim, f"{leaf.name} takes it whole")
            made = [self._remember(t, None, True) for t in outs]
        else:
            made = [self._remember(outs[0], self._through(leaf, ins[0], outs[0]), True)]
        self.trace.events.append(Event("leaf", leaf.name, ins, made, (), leaf.name))
        return result

    def _through(self, leaf: Leaf, x: Value, out: Tensor) -> list[Dim]:
        assert leaf.out_axis is not None
        if leaf.in_axis is None:
            return [*(opaque(size) for size in out.shape[:-1]), [leaf.out_axis]]
        if x.dims is None:
            mix([leaf.in_axis], "what comes from no weight is whole on every rank")
            return [*(opaque(size) for size in out.shape[:-1]), [leaf.out_axis]]
        join(x.dims[-1], [leaf.in_axis], f"the input of {leaf.name}")
        dims = [*x.dims[:-1], [leaf.out_axis]]
        mix_crossed(dims)
        return dims

    @contextlib.contextmanager
    def _pause(self) -> Iterator[None]:
        self.paused += 1
        try:
            yield
        finally:
            self.paused -= 1


def outputs_of(name: str, args: tuple[Any, ...], result: Any) -> list[Tensor]:
    """The tensors that a call gives; an assignment gives what it writes into."""
    return [args[0]] if name == "__setitem__" else list(rules.tensors(result))


class _Lookup:
    """The rules' view of the tracer: axes of a tensor, opaque ones where it has none."""

    def __init__(self, tracer: Tracer) -> None:
        self._tracer = tracer

    def is_followed(self, tensor: Tensor) -> bool:
        """Whether some dimension of it is known to be a weight's."""
        return self._tracer.value_of(tensor).dims is not None

    def is_constant(self, tensor: Tensor) -> bool:
        """Whether it holds one number everywhere."""
        return self._tracer.value_of(tensor).is_constant

    def dims(self, tensor: Tensor) -> list[Dim]:
        """Its dimensions' axes."""
        dims = self._tracer.value_of(tensor).dims
        return [opaque(size) for size in tensor.shape] if dims is None else list(dims)


def run(
    twin: nn.Module,
    mode: contextlib.AbstractContextManager[Any],
    tracer: Tracer,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    *,
    is_training: bool = False,
) -> Any:
    """The twin's forward under ``mode``, every function and leaf through ``tracer``."""
    owners: dict[int, str] = {}
    for name, leaf in tracer.trace.leaves.items():
        module = twin.get_submodule(name)
        owners |= {id(parameter): name for parameter in module.parameters()}
        module.__dict__["forward"] = partial(_call, tracer.call_leaf, leaf, module.forward)
    for name, module in twin.named_modules():
        module.register_forward_pre_hook(partial(_enter, tracer, name))
        module.register_forward_hook(partial(_leave, tracer), always_call=True)
    given = stand_ins((tuple(args), dict(kwargs)), tracer.trace.kind, mode, twin)
    twin.train(is_training)
    with torch.enable_grad(), mode:
        for name, parameter in twin.named_parameters():
            tracer.add_parameter(name, parameter, owners.get(id(parameter)))
        for tensor in rules.tensors(given):
            tracer.add_input(tensor)
        with tracer:
            return twin(*given[0], **given[1])


def _call(call: Callable[..., Any], leaf: Leaf, forward: Any, *args: Any, **kwargs: Any) -> Any:
    return call(leaf, forward, args, kwargs)


def _enter(tracer: Tracer, name: str, module: nn.Module, args: Any) -> None:
    tracer.enter(name)


def _leave(tracer: Tracer, module: nn.Module, args: Any, output: Any) -> None:
    tracer.leave(output)


def trace_training(
    model: nn.Module, seen: Trace, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Trace:
    """Follow one forward pass in training, with the axes of an earlier trace.

    Raises: whatever the model raises.
    """
    mode = mode_of(seen.kind)
    twin = twin_of(model, seen.kind, mode)
    tracer = Tracer(twin, seen.leaves, seen.kind)
    run(twin, mode, tracer, args, kwargs, is_training=True)
    return tracer.trace


def trace(
    model: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    found: Mapping[str, Leaf] | None = None,
    kind: Kind = "meta",
) -> Trace:
    """Follow one forward pass of a twin of ``model``, with leaves ``found`` if they are known; its
    weights are read only where ``kind`` is "real".

    Raises: whatever the model raises on these inputs.
    """
    mode = mode_of(kind)
    twin = twin_of(model, kind, mode)
    found = find_leaves(model) if found is None else found
    fresh = {name: new_leaf(name, leaf.module, leaf.kind) for name, leaf in found.items()}
    tracer = Tracer(twin, fresh, kind)
    output = run(twin, mode, tracer, args, kwargs)
    for tensor in rules.tensors(output):
        value = tracer.value_of(tensor)
        tracer.trace.outputs.append(value)
        for dim in value.dims or ():
            mix(leaves(dim), "the model's output")
    return tracer.trace
