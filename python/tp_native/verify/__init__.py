"""Compare a parallelized model with its dense twin, module by module."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..agreement import agreed
from ..errors import PlanError
from ..group import current_group
from ..plan import ShardPlan
from ..state import state_of, unwrap
from .comparison import compare
from .recording import Recording, kept, record, recorded

__all__ = ["Recording", "compare", "record", "verify"]


def verify(
    parallel_model: nn.Module, dense_model: nn.Module, *inputs: Any, rtol: float | None = None
) -> None:
    """Run both models on ``inputs`` (a Mapping as last input: keyword arguments) and compare.

    Every floating tensor of every module's output is compared with the dense model's, or with this
    rank's part of it where the module is cut; so is what a cut layer gets. ``rtol`` bounds
    ``max|parallel - dense| / max|dense|``; default by the coarsest dtype so far: 1e-10 fp64, 1e-4
    fp32, 2e-2 fp16, 6e-2 bf16. Collective, no gradients, eval mode; modes, buffers, the inputs and
    the random state are afterwards what they were.
    Raises: PlanError naming the first module, in forward order, that departs, by how much, how it
    is cut and what may be wrong, or the module that raised; the same on every rank.
    """
    state = state_of(parallel_model)
    group = state.group if state is not None else current_group(None)
    dense = unwrap(dense_model)
    with agreed(group):
        if state is None and group.size > 1:
            raise PlanError(
                f"verify got {type(parallel_model).__name__} as parallel_model, which is not "
                "parallelized; pass the parallelized model first and the dense one second"
            )
        if state is not None and state_of(dense) is not None:
            raise PlanError(
                f"verify got {type(dense).__name__} as dense_model, which is parallelized too; "
                "pass the model as it was before parallelize, for example a copy"
            )
        if state is not None:
            _check_same_model(dense, state.plan)
    # What is put back is so on all ranks before any goes on: threads share the random state.
    with agreed(group), kept(dense):
        recording = recorded(dense, inputs, lambda: agreed(group))
    plan = state.plan if state is not None else None
    compare(unwrap(parallel_model), recording, inputs, plan, group, rtol)


def _check_same_model(dense: nn.Module, plan: ShardPlan) -> None:
    params = dense.named_parameters(remove_duplicate=False)
    shapes = {name: tuple(param.shape) for name, param in params}
    if shapes != dict(plan.shapes):
        odd = sorted(shapes.items() ^ plan.shapes.items())[:4]
        raise PlanError(f"dense_model is another model than the parallel one: they differ in {odd}")
