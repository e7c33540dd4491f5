"""An optimizer's state in a checkpoint: whole tensors under the parameters' names, so that any
number of ranks can go on with it.

Element-wise optimizers keep tensors of the parameter's shape, which are cut as it is, and scalars.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CheckpointError
from ..nn import mark_of, put_mark
from .reader import SafetensorsFile, read_shard

OPTIMIZER_TENSORS = "optimizer.safetensors"
OPTIMIZER_SETTINGS = "optimizer.json"
_VERSION = 1


def optimizer_tensors(
    model: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[list[tuple[str, Tensor]], str]:
    """State tensors by name (marked as shards where their parameter is), and the settings as JSON.

    Raises: CheckpointError for a parameter that is not the model's and for state of another shape.
    """
    names = _names(model)
    tensors: list[tuple[str, Tensor]] = []
    values: dict[str, dict[str, Any]] = {}
    for parameter in _parameters(optimizer):
        name = _name_of(names, parameter)
        for key, value in optimizer.state.get(parameter, {}).items():
            if not isinstance(value, Tensor):
                values.setdefault(name, {})[key] = value
                continue
            if value.dim() > 0 and value.shape != parameter.shape:
                raise CheckpointError(
                    f"{type(optimizer).__name__} keeps {key} of shape {list(value.shape)} for "
                    f"{name} of {list(parameter.shape)}: only element-wise optimizers, whose state "
                    "has the parameter's shape, can be saved"
                )
            held = value.detach()
            put_mark(held, mark_of(parameter) if value.dim() > 0 else None)
            tensors.append((f"{name}.{key}", held))
    groups = [
        {
            **{k: _plain(v) for k, v in settings.items() if k != "params"},
            "params": [_name_of(names, parameter) for parameter in settings["params"]],
        }
        for settings in optimizer.param_groups
    ]
    record = {"version": _VERSION, "param_groups": groups, "values": values}
    try:
        return tensors, json.dumps(record, indent=1) + "\n"
    except TypeError as error:
        raise CheckpointError(
            f"{type(optimizer).__name__} has a setting that JSON cannot hold: {error}"
        ) from error


def load_optimizer(
    folder: str | os.PathLike[str], model: nn.Module, optimizer: torch.optim.Optimizer
) -> None:
    """Give ``optimizer`` the state that a folder holds: this rank's parts of it.

    Raises: CheckpointError if the folder has none, or one of other parameters or shapes; the
    optimizer is then as it was.
    """
    names = _names(model)
    path = Path(folder) / OPTIMIZER_SETTINGS
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        version, groups, values = (record[key] for key in ("version", "param_groups", "values"))
        theirs = [group.pop("params") for group in groups]
        values = {name: dict(values[name]) for name in values}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{path}: no optimizer's state to load ({error}); save with "
            "CheckpointSaver.save(model, optimizer), or load without an optimizer"
        ) from error
    mine = [[_name_of(names, p) for p in group["params"]] for group in optimizer.param_groups]
    if version != _VERSION or mine != theirs:
        odd = sorted({n for g in mine for n in g} ^ {str(n) for g in theirs for n in g})[:10]
        raise CheckpointError(
            f"{path}: version {version} with {len(theirs)} parameter groups; expected "
            f"{_VERSION} and this optimizer's {len(mine)} over the same parameters in the same "
            f"order; names in one only: {odd}"
        )
    state: dict[nn.Parameter, dict[str, Any]] = {}
    with SafetensorsFile(Path(folder) / OPTIMIZER_TENSORS) as file:
        left = dict(file.tensors)
        for parameter in _parameters(optimizer):
            name = _name_of(names, parameter)
            own = state.setdefault(parameter, values.get(name, {}))
            for full_name in [n for n in left if n.rpartition(".")[0] == name]:
                own[full_name.rpartition(".")[2]] = _read(file, full_name, parameter)
                del left[full_name]
    if left:
        raise CheckpointError(f"{file.path}: {sorted(left)[:10]} belong to no parameter")
    for parameter, entries in state.items():
        if entries:
            optimizer.state[parameter] = entries
    for group, settings in zip(optimizer.param_groups, groups, strict=True):
        group.update(settings)


def _read(file: SafetensorsFile, name: str, parameter: nn.Parameter) -> Tensor:
    info, mark = file.tensors[name], mark_of(parameter)
    if not info.shape:
        out = torch.empty((), dtype=info.dtype)  # a count of steps: on the CPU, as torch keeps it
        file.read_into(name, out)
        return out
    whole = tuple(parameter.shape) if mark is None else mark.full_shape(parameter)
    if info.shape != whole:
        raise CheckpointError(
            f"{file.path}: {name} has shape {list(info.shape)}, expected {list(whole)}"
        )
    out = torch.empty(parameter.shape, dtype=info.dtype, device=parameter.device)
    read_shard(file, name, out, mark)
    return out


def _names(model: nn.Module) -> dict[int, str]:
    return {id(parameter): name for name, parameter in model.named_parameters()}


def _name_of(names: dict[int, str], parameter: nn.Parameter) -> str:
    name = names.get(id(parameter))
    if name is None:
        raise CheckpointError(
            f"the optimizer holds a parameter of shape {list(parameter.shape)} that is not the "
            "model's; make it from model.parameters() after tp.parallelize"
        )
    return name


def _parameters(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.item()
    return list(value) if isinstance(value, tuple) else value
