"""What a parallelized model knows about itself, and its whole state put together again."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from .group import Group
from .nn import full_of
from .plan import ShardPlan

_KEY = "_tp_native"


@dataclass(frozen=True)
class ParallelState:
    """The group and plan of a parallelized model; shared by its copies."""

    group: Group
    plan: ShardPlan

    def __deepcopy__(self, memo: dict[int, Any]) -> ParallelState:
        return self


def attach_state(model: nn.Module, state: ParallelState) -> None:
    """Remember the state on the model."""
    model.__dict__[_KEY] = state


def state_of(model: nn.Module) -> ParallelState | None:
    """The state that `attach_state` left; None on a model that is still dense."""
    state = unwrap(model).__dict__.get(_KEY)
    return state if isinstance(state, ParallelState) else None


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside a `DistributedModelWrapper`, or the model itself."""
    inner = model.__dict__.get("wrapped_model")
    return inner if isinstance(inner, nn.Module) else model


def iter_full_state(model: nn.Module, *, tied: bool = True) -> Iterator[tuple[str, Tensor]]:
    """Yield (dense name, whole tensor) one at a time, in the order of ``state_dict``.

    Collective: every rank iterates to the end, in step. Holds one whole tensor at a time.
    ``tied=False`` yields a tied parameter once, under its first name.
    """
    model = unwrap(model)
    seen: set[int] = set()
    for name, value in model.state_dict(keep_vars=True).items():
        if not isinstance(value, Tensor):
            continue
        if id(value) in seen and not tied:
            continue
        seen.add(id(value))
        yield name, full_of(value)


def full_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The dense model's ``state_dict`` on every rank: same names, shapes and dtypes.

    Collective. Gathers tensor by tensor; every rank ends with the whole model in memory, so
    prefer `save_pretrained`, which holds one tensor at a time.
    """
    first_of: dict[int, str] = {}
    first_names = {}
    for name, value in unwrap(model).state_dict(keep_vars=True).items():
        if isinstance(value, Tensor):
            first_names[name] = first_of.setdefault(id(value), name)
    whole = dict(iter_full_state(model, tied=False))
    return {name: whole[first] for name, first in first_names.items()}
