"""What a folder will hold: tensor by tensor, under the names and in the layout of its files."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..errors import CheckpointError
from ..nn import LoRAModule, full_of, mark_of
from .layouts import Conversion, saved, shapes_of
from .reader import DTYPES


@dataclass(frozen=True)
class Item:
    """One tensor of the folder to be: its name there, and this rank's part, marked if it is one."""

    name: str
    local: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        mark = mark_of(self.local)
        return tuple(self.local.shape) if mark is None else mark.full_shape(self.local)

    @property
    def dtype(self) -> torch.dtype:
        return self.local.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def whole(self) -> Tensor:
        """The dense tensor. Collective."""
        return full_of(self.local)


@dataclass(frozen=True)
class _Converted(Item):
    """A tensor that lies on file otherwise than in the model: ``batch`` makes it, with others.

    ``local`` is without memory and has the tensor's shape on file.
    """

    batch: _Batch

    def whole(self) -> Tensor:
        """The tensor as it lies on file. Collective."""
        return self.batch.take(self.name)


class _Batch:
    """One conversion of some tensors of the model, made when the first of its results is asked."""

    def __init__(self, conversion: Conversion, parts: dict[str, Item]) -> None:
        self.conversion, self.parts = conversion, parts
        self.made: dict[str, Tensor] = {}

    def items(self) -> list[Item]:
        made = shapes_of(self.conversion, lambda name: _empty(self.parts[name]))
        if isinstance(made, CheckpointError):
            raise made
        return [_Converted(name, value, self) for name, value in made.items()]

    def take(self, name: str) -> Tensor:
        """One result. Collective, and called for each in the same order on all ranks."""
        if not self.made:
            self.made = self.conversion.run(lambda source: self.parts[source].whole())
        return self.made.pop(name)


def _empty(item: Item) -> Tensor:
    return torch.empty(item.shape, dtype=item.dtype, device="meta")


def items_of(model: nn.Module) -> list[Item]:
    """What a model's folder holds, in the order of its files; a tied weight once."""
    if any(not layer.lora_is_merged for layer in model.modules() if isinstance(layer, LoRAModule)):
        raise CheckpointError(
            f"{type(model).__name__} has LoRA adapters, which no other model would load: "
            "save_lora(model, folder) writes them, and after merge_lora(model) they are saved in "
            "the weights"
        )
    parts: dict[str, Item] = {}
    seen = set()
    for name, value in model.state_dict(keep_vars=True).items():
        if not isinstance(value, Tensor) or id(value) in seen:
            continue
        seen.add(id(value))
        if value.device.type == "meta":
            raise CheckpointError(f"{name} is on meta: load weights before saving")
        if value.dtype not in DTYPES.values():
            raise CheckpointError(f"{name} has dtype {value.dtype}, which safetensors cannot hold")
        parts[name] = Item(name, value)
    names, conversions = saved(model, parts)
    items = [Item(names[name], part.local) for name, part in parts.items() if name in names]
    for conversion in conversions:
        items += _Batch(conversion, parts).items()
    doubled = [name for name, count in Counter(item.name for item in items).items() if count > 1]
    if doubled:
        raise CheckpointError(f"{doubled[:5]}: two tensors would have this name on file")
    return widest_first(items)


def widest_first(items: Iterable[Item]) -> list[Item]:
    """Readers map tensors in place, so each must lie on its own alignment."""
    return sorted(items, key=lambda item: -item.dtype.itemsize)
