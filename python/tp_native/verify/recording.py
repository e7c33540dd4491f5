"""One forward pass of a model with every module watched, and everything put back after it."""

from __future__ import annotations

import copy
import dataclasses
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import PlanError
from ..structure.inputs import split_inputs

# Sums in another order: a few ulps per layer, with room for deep models.
_RTOL = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 6e-2}
# Of torch's encoders: a fused kernel and nested tensors, which the cut model can't use and which
# give other values at padded places.
_SWITCHES = {"activation_relu_or_gelu": 0, "use_nested_tensor": False}
_ENCODERS = (nn.TransformerEncoder, nn.TransformerEncoderLayer)

Tensors = dict[str, Tensor]  # by their place in an output: "", "0", "logits", "1.0"


@dataclass
class Call:
    """One call of a module: what a leaf got, what the module gave, and how far another order of
    sums may take either.
    """

    inputs: Tensors
    outputs: Tensors
    limit: float


@dataclass
class Recording:
    """Every call of every module in one forward pass of the dense model, and its modules."""

    modules: dict[str, nn.Module]
    calls: dict[str, list[Call]] = field(default_factory=dict)


def record(model: nn.Module, *inputs: Any) -> Recording:
    """One forward pass of a dense model, in eval mode without gradients, every call kept."""
    with kept(model):
        return recorded(model, inputs)


def recorded(
    model: nn.Module,
    inputs: Sequence[Any],
    together: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> Recording:
    """As `record`, but for what `kept` puts back. ``together``: a block that all ranks end at once,
    because thread ranks may share the dense model: each has its hooks there before one runs it.
    """
    if any(parameter.is_meta for parameter in model.parameters()):
        raise PlanError(
            f"verify compares values, and {type(model).__name__} has parameters on meta; load it "
            "first, or leave verify out"
        )
    recording = Recording(dict(model.named_modules()))
    given: dict[str, Tensors] = {}
    limit = 0.0

    def before(name: str, module: nn.Module, tensors: Tensors) -> None:
        if isinstance(module, nn.MultiheadAttention) or not module._modules:
            given[name] = {key: tensor.clone() for key, tensor in tensors.items()}

    def after(name: str, module: nn.Module, tensors: Tensors) -> None:
        nonlocal limit
        inputs = given.pop(name, {})
        for tensor in (*inputs.values(), *tensors.values()):
            limit = max(limit, _RTOL.get(tensor.dtype, 0.0))
        outputs = {key: tensor.clone() for key, tensor in tensors.items()}
        recording.calls.setdefault(name, []).append(Call(inputs, outputs, limit))

    with hooked(model, before, after):
        with together():
            pass
        with together():
            forward(model, inputs)
    return recording


@contextmanager
def hooked(
    model: nn.Module,
    before: Callable[[str, nn.Module, Tensors], None],
    after: Callable[[str, nn.Module, Tensors], None],
    enter: Callable[[str], None] = lambda name: None,
) -> Iterator[None]:
    """Call ``before`` and ``after`` around the forward of every module that this thread runs, and
    ``enter`` before its other hooks.
    """
    thread = threading.get_ident()

    def first_hook(name: str) -> Any:
        def come(module: nn.Module, args: Any) -> None:
            if threading.get_ident() == thread:
                enter(name)

        return come

    def pre_hook(name: str) -> Any:
        def begin(module: nn.Module, args: Any, kwargs: Any) -> None:
            if threading.get_ident() == thread:
                # Code that runs on pieces sees whole shapes: look at the tensors themselves.
                with torch._C.DisableTorchFunction():
                    before(name, module, tensors((*args, *kwargs.values())))

        return begin

    def post_hook(name: str) -> Any:
        def end(module: nn.Module, args: Any, output: Any) -> None:
            if threading.get_ident() == thread:
                with torch._C.DisableTorchFunction():
                    after(name, module, tensors(output))

        return end

    with ExitStack() as stack:
        for name, module in model.named_modules():
            for handle in (
                module.register_forward_pre_hook(first_hook(name), prepend=True),
                module.register_forward_pre_hook(pre_hook(name), with_kwargs=True),
                module.register_forward_hook(post_hook(name)),
            ):
                stack.callback(handle.remove)
        yield


def forward(model: nn.Module, inputs: Sequence[Any]) -> None:
    """Eval mode, no gradients, on inputs of its own; `kept` undoes what this changes."""
    args, kwargs = split_inputs(inputs)
    for module in model.modules():
        module.training = False
        if isinstance(module, _ENCODERS):
            for name, off in _SWITCHES.items():
                if hasattr(module, name):
                    setattr(module, name, off)
    with torch.no_grad():
        model(*_copied(args), **_copied(kwargs))


@contextmanager
def kept(model: nn.Module) -> Iterator[None]:
    """Put back modes, switches, buffers and the random state, however the block ends."""
    attributes = [
        (module, name, module.__dict__[name])
        for module in model.modules()
        for name in ("training", *(_SWITCHES if isinstance(module, _ENCODERS) else ()))
        if name in module.__dict__
    ]
    buffers = [
        (module._buffers, name, buffer, buffer.detach().clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None and not buffer.is_meta
    ]
    devices = {p.device.index for p in model.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(sorted(devices)):
        try:
            yield
        finally:
            for module, name, value in attributes:
                setattr(module, name, value)
            for table, name, buffer, values in buffers:
                table[name] = buffer
                if not torch.equal(buffer, values):
                    buffer.data.copy_(values)


def tensors(value: Any, place: str = "") -> Tensors:
    """The floating tensors in an output or in arguments, by place."""
    if isinstance(value, Tensor):
        usable = value.is_floating_point() and not value.is_nested and not value.is_sparse
        return {place: value.detach()} if usable else {}
    if dataclasses.is_dataclass(value) and not isinstance(value, (type, Mapping)):
        value = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    if isinstance(value, (tuple, list)):
        value = dict(enumerate(value))
    if not isinstance(value, Mapping):
        return {}
    found: Tensors = {}
    for key, inner in value.items():
        found.update(tensors(inner, f"{place}.{key}" if place else str(key)))
    return found


def _copied(value: Any) -> Any:
    """Inputs whose changes in place stay their own."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if type(value) in (tuple, list):
        return type(value)(_copied(inner) for inner in value)
    if type(value) is dict:
        return {key: _copied(inner) for key, inner in value.items()}
    try:
        return copy.deepcopy(value)
    except (TypeError, RuntimeError):  # what holds a graph or a handle can't be copied
        return value
