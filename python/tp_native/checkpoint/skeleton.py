"""Build a transformers model from a folder's config without its weights: parameters on meta.

Buffers are real and computed as in a normal build (rotary ``inv_freq`` is in no checkpoint).
Never runs code from the folder, never touches the network.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from ..errors import CheckpointError
from .reader import TensorInfo

# transformers sets torch's default dtype, which is process-wide, while it builds.
_build_lock = threading.Lock()

_UNINITIALIZED: tuple[Callable[..., Any], ...] = (torch.empty,)


class _EmptyOnMeta(TorchFunctionMode):
    """Sends ``torch.empty``, which is how layers allocate weights, to meta; this thread only."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func in _UNINITIALIZED:
            kwargs["device"] = "meta"
            kwargs.pop("pin_memory", None)
        return func(*args, **kwargs)


def read_config(folder: Path) -> Any:
    """The folder's transformers config.

    Raises: CheckpointError if the folder or ``config.json`` is missing or unreadable, if the
    architecture is not one of transformers' causal language models, or the weights quantized.
    """
    if not folder.is_dir():
        raise CheckpointError(
            f"{folder}: no such folder; expected a Hugging Face model folder with config.json "
            "and model.safetensors (models are not downloaded)"
        )
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder}: no config.json; expected a Hugging Face model folder")
    with _build_lock:
        try:
            from transformers import AutoConfig, AutoModelForCausalLM
        except ModuleNotFoundError as error:
            raise CheckpointError(
                f'{error.name} is not installed, and models are built by it: pip install ".[hf]" '
                "in tp_native's folder"
            ) from error
        try:
            config = AutoConfig.from_pretrained(
                str(folder), local_files_only=True, trust_remote_code=False
            )
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise CheckpointError(f"{folder}/config.json: not readable: {error}") from error
        if type(config) not in AutoModelForCausalLM._model_mapping:
            raise CheckpointError(
                f"{folder}/config.json: model_type {getattr(config, 'model_type', None)!r} "
                f"(architectures {getattr(config, 'architectures', None)}) has no causal language "
                "model in transformers; only those can be loaded"
            )
    if getattr(config, "quantization_config", None):
        raise CheckpointError(
            f"{folder}/config.json: quantized weights are not supported; load a folder in "
            "float32, bfloat16 or float16"
        )
    return config


def resolve_dtype(
    config: Any, tensors: dict[str, TensorInfo], dtype: torch.dtype | str | None
) -> torch.dtype:
    """The parameters' dtype: as asked, else the config's, else the first floating one on file."""
    if isinstance(dtype, str) and dtype != "auto":
        dtype = getattr(torch, dtype, None)
        if not isinstance(dtype, torch.dtype):
            raise ValueError("dtype must be a torch.dtype, its name, 'auto' or None")
    if isinstance(dtype, torch.dtype):
        if not dtype.is_floating_point or dtype.itemsize < 2:
            raise ValueError(f"dtype {dtype} cannot hold a model; use float32, bfloat16 or float16")
        return dtype
    stored = getattr(config, "dtype", None)
    if isinstance(stored, str):
        stored = getattr(torch, stored, None)
    if isinstance(stored, torch.dtype):
        return stored
    for info in tensors.values():
        if info.dtype.is_floating_point and info.dtype.itemsize > 1:
            return info.dtype
    return torch.float32


def build_skeleton(config: Any, dtype: torch.dtype) -> nn.Module:
    """The model with all parameters on meta, tied as configured, and real buffers.

    Raises: CheckpointError if a buffer would stay without a value.
    """
    with _build_lock:
        from transformers import AutoModelForCausalLM

        with _EmptyOnMeta():
            model = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
                config, dtype=dtype, trust_remote_code=False
            )
    assert isinstance(model, nn.Module)
    _move_rest_to_meta(model)
    persistent = model.state_dict().keys()
    lost = [n for n, b in model.named_buffers() if b.device.type == "meta" and n not in persistent]
    if lost:
        raise CheckpointError(
            f"{type(model).__name__}: buffers {lost[:5]} are allocated uninitialized and are in no "
            "checkpoint; build the model yourself and load with DistributedCheckpointLoader"
        )
    return model


def _move_rest_to_meta(model: nn.Module) -> None:
    """Parameters that were made from values (norms' ones) follow the others."""
    moved: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, param in module._parameters.items():
            if param is None or param.device.type == "meta":
                continue
            if id(param) not in moved:
                empty = torch.empty_like(param, device="meta")
                moved[id(param)] = nn.Parameter(empty, requires_grad=param.requires_grad)
                moved[id(param)].__dict__.update(param.__dict__)
            module._parameters[name] = moved[id(param)]


def load_generation_config(model: nn.Module, folder: Path) -> None:
    """Give the model the folder's generation settings, as transformers does."""
    can_generate = getattr(model, "can_generate", None)
    if not callable(can_generate) or not can_generate():
        return
    from transformers import GenerationConfig

    try:
        if (folder / "generation_config.json").is_file():
            settings = GenerationConfig.from_pretrained(str(folder), local_files_only=True)
        else:
            settings = GenerationConfig.from_pretrained(
                str(folder),
                config_file_name="config.json",
                local_files_only=True,
                _from_model_config=True,
            )
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"{folder}/generation_config.json: not readable: {error}") from error
    model.__dict__["generation_config"] = settings
