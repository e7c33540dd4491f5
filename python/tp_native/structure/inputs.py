"""Inputs for one forward pass of a model that nobody described: guessed, then tried."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

Inputs = tuple[tuple[Any, ...], dict[str, Any]]

_IDS = ("input_ids", "ids", "idx", "tokens", "token_ids", "src_tokens", "x", "input", "inputs")
# Two rows of five tokens: sizes that models rarely have themselves.
_ROWS, _TOKENS = 2, 5


def split_inputs(inputs: Sequence[Any] | Mapping[str, Any] | Tensor) -> Inputs:
    """Positional and keyword arguments; a Mapping as the last input holds keywords."""
    if isinstance(inputs, (Tensor, Mapping)):
        inputs = (inputs,)
    if inputs and isinstance(inputs[-1], Mapping):
        return tuple(inputs[:-1]), dict(inputs[-1])
    return tuple(inputs), {}


def guesses(model: nn.Module) -> Iterator[Inputs]:
    """Inputs that the model may take, likeliest first."""
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    for args, kwargs in _guesses(model):
        yield (
            tuple(_cast(value, dtype) for value in args),
            {name: _cast(value, dtype) for name, value in kwargs.items()},
        )


def _cast(value: Any, dtype: torch.dtype) -> Any:
    is_float = isinstance(value, Tensor) and value.is_floating_point()
    return value.to(dtype) if is_float else value


def _guesses(model: nn.Module) -> Iterator[Inputs]:
    if hasattr(model, "config") and hasattr(model, "main_input_name"):
        yield from _of_transformers(model)
        return
    accepted = [
        p
        for p in inspect.signature(model.forward).parameters.values()
        if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) and p.default is p.empty
    ]
    count = max(1, len(accepted))
    candidates = list(_tensors(model))
    for candidate in candidates:
        yield (candidate,) * count, {}
    if count == 2:
        for first in candidates:
            for second in candidates:
                if first is not second:
                    yield (first, second), {}


def _tensors(model: nn.Module) -> Iterator[Tensor]:
    ids = torch.arange(_ROWS * _TOKENS).view(_ROWS, _TOKENS)
    rows = [m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding)]
    if rows:
        yield ids % max(1, min(rows))
    conv = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
    if conv is not None:
        for side in (32, 224):
            yield torch.zeros(_ROWS, conv.in_channels, side, side)
    for width in dict.fromkeys(_widths(model)):
        yield torch.zeros(_ROWS, _TOKENS, width)
        yield torch.zeros(_ROWS, width)
        yield torch.zeros(_TOKENS, width)


def _widths(model: nn.Module) -> Iterator[int]:
    for module in model.modules():
        if isinstance(module, nn.MultiheadAttention):
            yield module.embed_dim
        elif isinstance(module, nn.Linear):
            yield module.in_features
        elif isinstance(module, nn.LayerNorm):
            yield module.normalized_shape[-1]
        elif isinstance(module, (nn.LSTM, nn.GRU, nn.RNN)):
            yield module.input_size
        elif isinstance(module, nn.Conv1d):
            yield module.in_channels
        elif hasattr(module, "nx") and isinstance(module.nx, int):
            yield module.nx


def _of_transformers(model: nn.Module) -> Iterator[Inputs]:
    config: Any = model.config
    accepted = inspect.signature(model.forward).parameters
    vocabulary = [m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding)]
    ids = torch.arange(_ROWS * _TOKENS).view(_ROWS, _TOKENS) % max(1, min([*vocabulary, 1 << 30]))
    options: dict[str, Any] = {}
    if "use_cache" in accepted:
        options["use_cache"] = False
    if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in accepted:
        options["decoder_input_ids"] = ids
    main = str(model.main_input_name)
    found: dict[str, Any] = {}
    if main == "input_ids" or "input_ids" in accepted:
        found["input_ids"] = ids
    if "pixel_values" in accepted and (main == "pixel_values" or _is_clip(accepted)):
        found["pixel_values"] = _pixels(config)
    if main in ("input_features", "input_values") and main in accepted:
        for shape in _sounds(config):
            yield (), {**options, main: torch.zeros(shape)}
        return
    if main == "pixel_values" and "input_ids" in found and not _is_clip(accepted):
        found.pop("input_ids")
    yield (), {**options, **found}
    if "input_ids" in found and "attention_mask" in accepted:
        yield (), {**options, **found, "attention_mask": torch.ones_like(ids)}
    if "pixel_values" in found and "input_ids" in found:
        yield (), {**options, "input_ids": ids}
    if len(vocabulary) and "input_ids" in accepted:
        longer = torch.arange(_ROWS * 64).view(_ROWS, 64) % max(1, min(vocabulary))
        yield (), {**options, **found, "input_ids": longer}


def _is_clip(accepted: Mapping[str, Any]) -> bool:
    return "return_loss" in accepted


def _pixels(config: Any) -> Tensor:
    vision = getattr(config, "vision_config", None) or config
    side = getattr(vision, "image_size", None) or 224
    height, width = (side, side) if isinstance(side, int) else tuple(side)[:2]
    return torch.zeros(_ROWS, getattr(vision, "num_channels", 3) or 3, height, width)


def _sounds(config: Any) -> Iterator[tuple[Any, ...]]:
    bins = getattr(config, "num_mel_bins", None) or getattr(config, "input_feat_per_channel", 80)
    positions = getattr(config, "max_source_positions", None)
    if positions:
        yield (_ROWS, bins, 2 * positions)
    yield (_ROWS, 400, bins)
    yield (_ROWS, 16000)
