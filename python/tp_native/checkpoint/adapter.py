"""Adapters (LoRA) on disk, in peft's layout: whole tensors under dense names, and their settings.

Source: huggingface/peft, "Checkpoint format" in its documentation.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..agreement import agreed
from ..errors import CheckpointError
from ..group import Group, GroupLike
from ..nn import LoRAModule, add_lora
from ..nn.lora import (
    LoRAOptions,
    has_lora,
    lora_candidates,
    lora_group,
    lora_layers,
    lora_marks,
)
from ..state import unwrap
from .items import Item, widest_first
from .reader import SafetensorsFile, raise_if_any, read_shard
from .writer import write_folder

_WEIGHTS = "adapter_model.safetensors"
_CONFIG = "adapter_config.json"
_PREFIX = "base_model.model."
_KEY = re.compile(re.escape(_PREFIX) + r"(.+)\.lora_[AB]\.weight")
_STALE = re.compile(r"adapter_model\.(safetensors|bin)|adapter_config\.json")
# What changes the function and is not done here, with the values that change nothing.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "bias": (None, "none"),
    "modules_to_save": (None, []),
    "rank_pattern": (None, {}),
    "alpha_pattern": (None, {}),
    "layer_replication": (None,),
    "target_parameters": (None, []),
    "fan_in_fan_out": (None, False),
    "lora_bias": (None, False),
    "use_dora": (None, False),
    "use_qalora": (None, False),
    "alora_invocation_tokens": (None,),
}


def save_lora(
    model: nn.Module, path: str | os.PathLike[str], *, group: GroupLike | None = None
) -> None:
    """Write the adapters of ``model`` to a folder that peft reads. Collective.

    Rank 0 writes ``adapter_model.safetensors`` and ``adapter_config.json``, holding one whole
    tensor at a time. The folder is replaced in one rename, with its other files as they were.
    Raises: ValueError for a model without adapters; CheckpointError, the same on every rank, if
    there is no room or a write fails.
    """
    model = unwrap(model)
    layers = dict(lora_layers(model))

    def lay_out() -> list[tuple[str, list[Item]]]:
        items = []
        for name, layer in layers.items():
            for key, value in zip(_keys(name), _adapters(layer), strict=True):
                if value.is_meta:
                    raise CheckpointError(f"{name} is on meta: load weights before saving")
                items.append(Item(key, value))
        return [(_WEIGHTS, widest_first(items))]

    def add_rest(folder: Path, _: Sequence[tuple[str, list[Item]]]) -> None:
        text = json.dumps(_settings(model, layers), indent=2, sort_keys=True) + "\n"
        (folder / _CONFIG).write_text(text)

    write_folder(path, lora_group(model, group), lay_out, add_rest, _STALE)


def load_lora(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    group: GroupLike | None = None,
) -> list[str]:
    """Fill the adapters of ``model`` from a folder of `save_lora` or of peft; returns the layers'
    names. Collective.

    A model without adapters gets those of the folder, as `add_lora` makes them, ``dtype`` as there.
    Each rank reads its parts, whatever the number of ranks that wrote them.
    Raises: CheckpointError, the same on every rank, before the model is changed: for files or
    settings that cannot be used, and for tensors that are missing, unexpected or of another shape,
    all of them listed.
    """
    model = unwrap(model)
    here = lora_group(model, group)
    folder = Path(path)
    with agreed(here):
        options = _options(folder)
        with SafetensorsFile(folder / _WEIGHTS, here.check) as file:
            layers = _match(model, options, file, here)
            values = {name: _read(name, layer, dtype, file) for name, layer in layers.items()}
    if not has_lora(model):
        add_lora(
            model,
            options.rank,
            alpha=options.alpha,
            dropout=options.dropout,
            use_rslora=options.use_rslora,
            targets=lambda name, _: name in layers,
            dtype=dtype,
            group=group,
        )
    with torch.no_grad():
        for name, layer in lora_layers(model):
            for parameter, value in zip(_adapters(layer), values[name], strict=True):
                parameter.copy_(value)
    return list(layers)


def _adapters(layer: LoRAModule) -> tuple[nn.Parameter, nn.Parameter]:
    return layer.lora_A, layer.lora_B


def _keys(name: str) -> tuple[str, str]:
    return f"{_PREFIX}{name}.lora_A.weight", f"{_PREFIX}{name}.lora_B.weight"


def _settings(model: nn.Module, layers: dict[str, LoRAModule]) -> dict[str, Any]:
    options = next(iter(layers.values())).lora_options
    alpha = int(options.alpha) if options.alpha.is_integer() else options.alpha
    source = getattr(getattr(model, "config", None), "name_or_path", None)
    is_causal = type(model).__name__.endswith("ForCausalLM")
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if is_causal else None,
        "base_model_name_or_path": source or None,
        "r": options.rank,
        "lora_alpha": alpha,
        "lora_dropout": options.dropout,
        "use_rslora": options.use_rslora,
        "target_modules": _target_modules(model, list(layers)),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": None,
        "rank_pattern": {},
        "alpha_pattern": {},
    }


def _target_modules(model: nn.Module, names: list[str]) -> list[str]:
    """The last words of the names, which mean every module that ends so; whole names where that
    is too many.
    """
    words = sorted({name.rpartition(".")[2] for name in names})
    meant = {n for n, _ in model.named_modules() if n.rpartition(".")[2] in words}
    return words if meant == set(names) else sorted(names)


def _options(folder: Path) -> LoRAOptions:
    """The folder's settings; an error for those that would mean another function."""
    path = folder / _CONFIG
    try:
        found = json.loads(path.read_text())
        kind, rank, alpha = found["peft_type"], found["r"], float(found["lora_alpha"])
        options = LoRAOptions(
            rank, alpha, float(found.get("lora_dropout") or 0), bool(found.get("use_rslora"))
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: not usable: {type(error).__name__}: {error}") from error
    odd = [f"{key}={found[key]!r}" for key, same in _NEUTRAL.items() if found.get(key) not in same]
    if kind != "LORA":
        odd.insert(0, f"peft_type={kind!r}")
    if odd:
        raise CheckpointError(f"{path}: not supported: {', '.join(odd)}")
    return options


def _match(
    model: nn.Module, options: LoRAOptions, file: SafetensorsFile, group: Group
) -> dict[str, nn.Module]:
    """The layers whose adapters the file holds, or an error with all that does not fit."""
    layers = lora_candidates(model, group)
    if has_lora(model):
        own = dict(lora_layers(model))
        _check_own(own, options, file)
        layers = {**own}
    else:
        named = {match[1] for key in file.tensors if (match := _KEY.fullmatch(key))}
        layers = {name: layer for name, layer in layers.items() if name in named}
    shapes: dict[str, tuple[int, int]] = {}
    for name, layer in layers.items():
        a, b = _keys(name)
        shapes[a] = (options.rank, cast(int, layer.in_features))
        shapes[b] = (cast(int, layer.out_features), options.rank)
        if cast(Tensor, layer.weight).is_meta:
            raise CheckpointError(f"{name} is on meta: load the model's weights first")
    on_file = file.tensors
    misfit = [
        f"{key}: {on_file[key].dtype} {list(on_file[key].shape)} on file, expected {list(shape)}"
        for key, shape in shapes.items()
        if key in on_file
        and (on_file[key].shape != shape or not on_file[key].dtype.is_floating_point)
    ]
    raise_if_any(
        file.path,
        type(model).__name__,
        missing=[key for key in shapes if key not in on_file],
        unexpected=sorted(key for key in on_file if key not in shapes),
        misfit=misfit,
    )
    if not layers:
        raise CheckpointError(f"{file.path}: holds no adapter")
    return layers


def _check_own(own: dict[str, LoRAModule], found: LoRAOptions, file: SafetensorsFile) -> None:
    merged = [name for name, layer in own.items() if layer.lora_is_merged]
    if merged:
        raise CheckpointError(
            f"LoRA is merged into the weights of {merged[:5]}; unmerge_lora first"
        )
    mine = next(iter(own.values())).lora_options
    if (mine.rank, mine.scaling) != (found.rank, found.scaling):
        raise CheckpointError(
            f"{file.path}: adapters of rank {found.rank}, scaled by {found.scaling:g}; the model's "
            f"have rank {mine.rank} and {mine.scaling:g}"
        )


def _read(
    name: str, layer: nn.Module, dtype: torch.dtype | None, file: SafetensorsFile
) -> list[Tensor]:
    """This rank's part of ``A`` and ``B``."""
    weight = cast(Tensor, layer.weight)
    marks = lora_marks(layer)
    parts = []
    for key, which in zip(_keys(name), ("lora_A", "lora_B"), strict=True):
        own = layer._parameters.get(which)
        kind = dtype or weight.dtype if own is None else own.dtype
        mark, shape = marks.get(which), [*file.tensors[key].shape]
        if mark is not None:
            shape[mark.dim] = mark.layout.local_sizes[mark.group.rank]
        part = torch.empty(shape, dtype=kind, device=weight.device)
        read_shard(file, key, part, mark)
        parts.append(part)
    return parts
