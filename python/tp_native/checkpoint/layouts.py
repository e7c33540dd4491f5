"""How a model's tensors lie on file where that is not how the model holds them.

transformers renames tensors of older checkpoints, and joins, splits or turns some, as it loads; as
it saves it goes the other way. Its own tables say what becomes what: none lives here.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CheckpointError
from ..nn import mark_of


@dataclass(frozen=True, eq=False)
class Conversion:
    """Some tensors that are made from others: ``sources`` are (name, pattern that it matched)."""

    first: str
    sources: tuple[tuple[str, str], ...]
    converter: Any
    model: Any
    rename: Callable[[str], str]

    def run(self, read: Callable[[str], Tensor]) -> dict[str, Tensor]:
        """The tensors made, by name, from what ``read`` gives for each source."""
        converter = copy.deepcopy(self.converter)
        for source, pattern in self.sources:
            converter.add_tensor(self.first, source, pattern, read(source))
        made = converter.convert(self.first, model=self.model, config=self.model.config)
        firsts = {n: v[0] if isinstance(v, list) else v for n, v in made.items()}
        return {self.rename(name): value for name, value in firsts.items()}


class _Dense:
    """The model as conversions ask it: parameters have their dense shapes."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def get_parameter(self, name: str) -> Tensor:
        """A tensor of the parameter's dense shape, without memory."""
        param = self.model.get_parameter(name)
        mark = mark_of(param)
        shape = param.shape if mark is None else mark.full_shape(param)
        return torch.empty(shape, dtype=param.dtype, device="meta")


def loaded(
    model: nn.Module, names: Iterable[str], expected: Mapping[str, Tensor]
) -> tuple[dict[str, str], list[Conversion]]:
    """What tensors on file become in ``model``: file name to model name, and what is converted.

    Names that the model does not have are left out of the first; a conversion may make such.
    """
    if not hasattr(model, "base_model_prefix"):
        return {name: name for name in names if name in expected}, []
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import dot_natural_key, rename_source_key

    renamings, converters = _split(get_model_conversion_mapping(model))  # type: ignore[arg-type]
    prefix = str(model.base_model_prefix)
    found: dict[str, str] = {}
    groups: dict[str, tuple[Any, list[tuple[str, str]]]] = {}
    for source in sorted(names, key=dot_natural_key):  # the order of merged lists, experts say
        name, pattern = rename_source_key(source, renamings, converters, prefix, dict(expected))
        if pattern is not None:
            converter = next(c for c in converters if pattern in c.source_patterns)
            groups.setdefault(name, (converter, []))[1].append((source, pattern))
        elif name in expected:
            found[source] = name
        elif source in expected:
            found[source] = source
    return found, _conversions(model, groups, lambda name: name)


def saved(model: nn.Module, names: Iterable[str]) -> tuple[dict[str, str], list[Conversion]]:
    """What the model's tensors become on file: model name to file name, and what is converted.

    Names that transformers would not save are in neither.
    """
    if not hasattr(model, "base_model_prefix"):
        return {name: name for name in names}, []
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        PrefixChange,
        apply_converters,
        apply_renamings,
        dot_natural_key,
    )

    table = get_model_conversion_mapping(model, add_legacy=False)  # type: ignore[arg-type]
    # transformers reads both, with the prefix and without.
    kept = [entry for entry in table if not isinstance(entry, PrefixChange)]
    renamings, converters = _split([entry.reverse_transform() for entry in kept[::-1]])
    dropped = set(getattr(model, "_keys_to_ignore_on_save", None) or ())
    found: dict[str, str] = {}
    groups: dict[str, tuple[Any, list[tuple[str, str]]]] = {}
    for name in sorted(set(names) - dropped, key=dot_natural_key):
        key, pattern = apply_converters(name, converters)
        if pattern is None:
            found[name] = apply_renamings(name, renamings)
        else:
            converter = next(c for c in converters if pattern in c.source_patterns)
            groups.setdefault(key, (converter, []))[1].append((name, pattern))
    return found, _conversions(model, groups, lambda name: apply_renamings(name, renamings))


def shapes_of(
    conversion: Conversion, empty: Callable[[str], Tensor]
) -> dict[str, Tensor] | CheckpointError:
    """Tensors without memory that the conversion makes, or why it cannot."""
    try:
        return conversion.run(empty)
    except Exception as error:
        sources = [source for source, _ in conversion.sources]
        more = f" and {len(sources) - 3} more" if len(sources) > 3 else ""
        return CheckpointError(
            f"{conversion.first}: cannot be made of {sources[:3]}{more}: {error}"
        )


def _split(table: Iterable[Any]) -> tuple[list[Any], list[Any]]:
    from transformers.core_model_loading import WeightConverter, WeightRenaming

    entries = list(table)
    renamings = [entry for entry in entries if isinstance(entry, WeightRenaming)]
    return renamings, [entry for entry in entries if isinstance(entry, WeightConverter)]


def _conversions(
    model: nn.Module,
    groups: Mapping[str, tuple[Any, list[tuple[str, str]]]],
    rename: Callable[[str], str],
) -> list[Conversion]:
    dense = _Dense(model)
    return [
        Conversion(first, tuple(sources), converter, dense, rename)
        for first, (converter, sources) in groups.items()
    ]
