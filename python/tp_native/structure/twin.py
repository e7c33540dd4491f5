"""A model's twin to try things on: modules of its own, and tensors without memory."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def twin_of(model: nn.Module, mode: FakeTensorMode | None) -> nn.Module:
    """A copy of ``model`` whose parameters and buffers are fake tensors on the CPU, or the model's
    own ones where ``mode`` is None; hooks of the user's are left out.

    Raises: whatever copying an attribute of the model raises.
    """
    memo: dict[int, Any] = {}
    for tensor in itertools.chain(model.parameters(), model.buffers()):
        memo[id(tensor)] = tensor if mode is None else _stand_in(tensor, mode)
    twin = copy.deepcopy(model, memo)
    for module in twin.modules():
        for name in _HOOKS:
            hooks = module.__dict__.get(name, {})
            for key, hook in list(hooks.items()):
                # torch's own make weights (weight_norm); the user's would see fake tensors
                if not str(getattr(type(hook), "__module__", "")).startswith("torch."):
                    del hooks[key]
    return twin


def _stand_in(tensor: Tensor, mode: FakeTensorMode) -> Tensor:
    with mode:
        fake = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")
        if isinstance(tensor, nn.Parameter):
            return nn.Parameter(fake, requires_grad=tensor.is_floating_point())
    return fake


def stand_ins(given: Any, mode: FakeTensorMode | None, twin: nn.Module) -> Any:
    """Inputs for the twin in nested containers: fake ones, or copies where the twin is."""
    if isinstance(given, Tensor):
        if mode is None:
            place = next((p.device for p in twin.parameters()), None)
            return given.detach().to(place, copy=True)
        with mode:
            return torch.empty(given.shape, dtype=given.dtype, device="cpu")
    if isinstance(given, dict):
        return {key: stand_ins(item, mode, twin) for key, item in given.items()}
    if isinstance(given, (tuple, list)):
        return type(given)(stand_ins(item, mode, twin) for item in given)
    return given
