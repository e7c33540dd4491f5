"""A model's twin to try things on: modules of its own, and tensors without memory.

Tensors are on meta where that does: it needs nothing imported. Models that mind their device get
fake tensors on the CPU, those that look at numbers get numbers.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
from typing import Any, Literal

import torch
from torch import Tensor, nn

Kind = Literal["meta", "fake", "real"]

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
# Makers of tensors, which go to meta with the others.
FACTORIES = frozenset(
    {"arange", "as_tensor", "empty", "eye", "full", "linspace", "logspace", "ones", "rand"}
    | {"randint", "randn", "randperm", "range", "scalar_tensor", "tensor", "tril_indices"}
    | {"triu_indices", "zeros"}
)


def mode_of(kind: Kind) -> contextlib.AbstractContextManager[Any]:
    """What tensors of a kind need around them."""
    if kind != "fake":
        return contextlib.nullcontext()
    # here, not above: it takes torch._dynamo along, seconds that most models don't need
    from torch._subclasses.fake_tensor import FakeTensorMode

    return FakeTensorMode(allow_non_fake_inputs=True)


def twin_of(
    model: nn.Module, kind: Kind, mode: contextlib.AbstractContextManager[Any]
) -> nn.Module:
    """A copy of ``model`` whose parameters and buffers have no memory, or are the model's own where
    ``kind`` is "real"; hooks of the user's are left out.

    Raises: whatever copying an attribute of the model raises.
    """
    memo: dict[int, Any] = {}
    for tensor in itertools.chain(model.parameters(), model.buffers()):
        memo[id(tensor)] = tensor if kind == "real" else _stand_in(tensor, kind, mode)
    twin = copy.deepcopy(model, memo)
    for module in twin.modules():
        for name in _HOOKS:
            hooks = module.__dict__.get(name, {})
            for key, hook in list(hooks.items()):
                # torch's own make weights (weight_norm); the user's would see fake tensors
                if not str(getattr(type(hook), "__module__", "")).startswith("torch."):
                    del hooks[key]
    return twin


def _stand_in(tensor: Tensor, kind: Kind, mode: contextlib.AbstractContextManager[Any]) -> Tensor:
    device = "meta" if kind == "meta" else "cpu"
    with mode:
        made = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
        if isinstance(tensor, nn.Parameter):
            return nn.Parameter(made, requires_grad=tensor.is_floating_point())
    return made


def stand_ins(
    given: Any, kind: Kind, mode: contextlib.AbstractContextManager[Any], twin: nn.Module
) -> Any:
    """Inputs for the twin in nested containers: without memory, or copies where the twin is."""
    if isinstance(given, Tensor):
        if kind == "real":
            place = next((p.device for p in twin.parameters()), None)
            return given.detach().to(place, copy=True)
        with mode:
            device = "meta" if kind == "meta" else "cpu"
            return torch.empty(given.shape, dtype=given.dtype, device=device)
    if isinstance(given, dict):
        return {key: stand_ins(item, kind, mode, twin) for key, item in given.items()}
    if isinstance(given, (tuple, list)):
        return type(given)(stand_ins(item, kind, mode, twin) for item in given)
    return given
