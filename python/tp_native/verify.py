"""Compare a parallelized model with its dense twin, module by module."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .agreement import agree, agreed
from .errors import PlanError
from .group import Group, current_group
from .nn.sharded import take
from .partition import ShardLayout
from .plan import ShardPlan
from .state import state_of, unwrap

# Sums in another order: a few ulps per layer, with room for deep models.
_RTOL = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 6e-2}


@dataclass
class Recording:
    """Each module's first output tensor of one forward pass, in the order they finished."""

    outputs: dict[str, Tensor] = field(default_factory=dict)


def verify(
    parallel_model: nn.Module, dense_model: nn.Module, *inputs: Any, rtol: float | None = None
) -> None:
    """Run both models on ``inputs`` (a Mapping as last input: keyword arguments) and compare.

    ``rtol`` bounds ``max|parallel - dense| / max|dense|`` of every module's output; default by
    dtype: 1e-10 fp64, 1e-4 fp32, 2e-2 fp16, 6e-2 bf16. Collective, no gradients, eval mode.
    Raises: PlanError naming the first module, in forward order, whose output departs, and by
    how much; the same on every rank.
    """
    state = state_of(parallel_model)
    group = state.group if state is not None else current_group(None)
    if state is None and group.size > 1:
        raise PlanError(
            f"verify got {type(parallel_model).__name__} as parallel_model, which is not "
            "parallelized; pass the parallelized model first and the dense one second"
        )
    with agreed(group):
        dense = record(dense_model, *inputs)
    plan = state.plan if state is not None else None
    compare(unwrap(parallel_model), dense, inputs, plan, group, rtol)


def record(model: nn.Module, *inputs: Any) -> Recording:
    """One forward pass in eval mode without gradients, every module's output kept."""
    recording = Recording()
    handles = []

    def keeper(name: str) -> Any:
        def keep(module: nn.Module, args: Any, output: Any) -> None:
            tensor = _first_tensor(output)
            if tensor is not None and name not in recording.outputs:
                recording.outputs[name] = tensor.detach().clone()

        return keep

    modes = {module: module.training for module in model.modules()}
    for name, module in model.named_modules():
        handles.append(module.register_forward_hook(keeper(name)))
    args, kwargs = _split(inputs)
    try:
        model.eval()
        with torch.no_grad():
            model(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
        for module, training in modes.items():
            module.training = training
    return recording


def compare(
    model: nn.Module,
    dense: Recording,
    inputs: Sequence[Any],
    plan: ShardPlan | None,
    group: Group,
    rtol: float | None = None,
) -> None:
    """Run the parallel ``model`` and compare with ``dense``; PlanError on all ranks alike."""
    ours = record(model, *inputs)
    error: Exception | None = None
    for name, expected in dense.outputs.items():
        actual = ours.outputs.get(name)
        entry = plan.entries.get(name) if plan is not None else None
        if actual is None:
            continue
        if entry is not None and entry.is_local:
            ranges = ShardLayout.of(entry.partition).ranges[group.rank]
            expected = take(expected, -1, ranges)
        elif name and actual.shape != expected.shape:
            continue  # inside a sharded region: the next whole output tells
        limit = rtol if rtol is not None else _RTOL.get(expected.dtype, 0.0)
        error = _departure(name or type(model).__name__, actual, expected, limit)
        if error is not None:
            break
    agree(group, error)


def _departure(name: str, actual: Tensor, expected: Tensor, limit: float) -> PlanError | None:
    if actual.shape != expected.shape:
        return PlanError(
            f"{name}: output has shape {tuple(actual.shape)}, the dense model's has "
            f"{tuple(expected.shape)}; a column split without its row split, perhaps"
        )
    if expected.numel() == 0:
        return None
    scale = expected.double().abs().max()
    gap = (actual.double() - expected.double()).abs().max()
    relative = float(gap / scale) if scale > 0 else float(gap)
    if relative <= limit:
        return None
    return PlanError(
        f"{name}: output departs from the dense model by {relative:.3g} of its largest value "
        f"(limit {limit:.3g}), the first module to do so; its style or its inputs' is wrong"
    )


def _first_tensor(output: Any) -> Tensor | None:
    if isinstance(output, Tensor):
        return output if output.is_floating_point() else None
    values = output.values() if isinstance(output, Mapping) else output
    if isinstance(output, (tuple, list, Mapping)):
        return next((v for v in values if isinstance(v, Tensor) and v.is_floating_point()), None)
    return None


def _split(inputs: Sequence[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if inputs and isinstance(inputs[-1], Mapping):
        return tuple(inputs[:-1]), dict(inputs[-1])
    return tuple(inputs), {}
