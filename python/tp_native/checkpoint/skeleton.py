"""Build a transformers model from a folder's config without its weights: parameters on meta.

Buffers are real and computed as in a normal build (rotary ``inv_freq`` is in no checkpoint).
Never runs code from the folder, never touches the network.
"""

from __future__ import annotations

import math
import re
import threading
from collections import Counter
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

# How layers allocate weights: what they hold comes from the checkpoint.
_UNINITIALIZED: tuple[Callable[..., Any], ...] = (torch.empty, torch.randn, torch.rand)
# How they are drawn, by tensors' methods or by functions of nn.init, which transformers replaces.
_DRAWS = ("normal_", "uniform_", "log_normal_", "exponential_", "kaiming_uniform_")


class _NoDraws(TorchFunctionMode):
    """Draws no random number: weights are allocated on ``device``, and are NaN if they are real.

    Of this thread only.
    """

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device = device

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func in _UNINITIALIZED:
            kwargs["device"] = self.device
            kwargs.pop("pin_memory", None)
            made = func(*args, **kwargs)
            return made.fill_(math.nan) if made.is_floating_point() else made
        if getattr(func, "__name__", None) in _DRAWS:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


def read_config(folder: Path) -> Any:
    """The folder's transformers config.

    Raises: CheckpointError if the folder or ``config.json`` is missing or unreadable, if
    transformers has no model for it, or the weights are quantized.
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
            from transformers import AutoConfig
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
        try:
            _model_class(config)
        except CheckpointError as error:
            raise CheckpointError(f"{folder}/config.json: {error}") from error
    if getattr(config, "quantization_config", None):
        raise CheckpointError(
            f"{folder}/config.json: quantized weights are not supported; load a folder in "
            "float32, bfloat16 or float16"
        )
    return config


def _model_class(config: Any) -> Any:
    """The class that ``architectures`` names, else the causal language model, else the bare model.

    Only transformers' own classes are looked at: a name of another package's, or of code in the
    folder, falls through to what transformers builds for the config's type.
    """
    import transformers

    for name in getattr(config, "architectures", None) or ():
        kind = getattr(transformers, name, None) if isinstance(name, str) else None
        if not isinstance(kind, type) or not issubclass(kind, transformers.PreTrainedModel):
            continue
        if not isinstance(config, kind.config_class or ()):
            raise CheckpointError(
                f"architectures {config.architectures} do not belong to model_type "
                f"{config.model_type!r}; one of the two is wrong"
            )
        return kind
    for auto in (transformers.AutoModelForCausalLM, transformers.AutoModel):
        if type(config) in auto._model_mapping:
            return auto
    raise CheckpointError(
        f"model_type {getattr(config, 'model_type', None)!r} (architectures "
        f"{getattr(config, 'architectures', None)}) has no model in transformers"
    )


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
        kind = _model_class(config)
        with _NoDraws("meta"):
            if issubclass(kind, nn.Module):
                model = kind._from_config(config, dtype=dtype)
            else:
                model = kind.from_config(config, dtype=dtype, trust_remote_code=False)
        assert isinstance(model, nn.Module)
        _move_rest_to_meta(model)
        _compute_rest(model)
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


def _compute_rest(model: nn.Module) -> None:
    """Compute anew what transformers computes once more as it loads: buffers, in float32 whatever
    the weights' dtype, and parameters that no checkpoint need hold (tables of sines, say).

    Such a parameter stays on meta, and is missed, if its initialization draws it.
    """
    patterns = getattr(model, "_keys_to_ignore_on_load_missing", None) or ()
    absent: list[tuple[nn.Module, str, nn.Parameter]] = []
    times = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    for path, param in model.named_parameters() if patterns else ():
        if times[id(param)] == 1 and any(re.search(pattern, path) for pattern in patterns):
            module_name, _, name = path.rpartition(".")
            module = model.get_submodule(module_name)
            absent.append((module, name, param))
            room = torch.full(param.shape, math.nan, dtype=param.dtype)
            module._parameters[name] = nn.Parameter(room, param.requires_grad)
    with _NoDraws("cpu"), torch.no_grad():
        _initialize(model, model)
    for module, name, param in absent:
        computed = module._parameters[name]
        if computed is not None and computed.isnan().any():
            module._parameters[name] = param


def _initialize(module: nn.Module, owner: Any) -> None:
    """Call each module's initialization, that of the model it belongs to, children first."""
    owner = module if hasattr(module, "_init_weights") else owner
    for child in module.children():
        _initialize(child, owner)
    if hasattr(owner, "_init_weights"):
        owner._init_weights(module)


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
