"""Styles by name: the user's rules, a model's own ``tp_plan``, and what each name means here."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import nn

from ..errors import PlanError
from .shards import COLUMN, COLUMN_GATHER, EMBEDDING_COLUMN, ROW, ROW_SPLIT, VOCABULARY

REPLICATE = "replicate"
# Whole on every rank, but each rank sees only its share of the gradient (per-head norms).
SUM_GRADIENT = "replicated_with_grad_allreduce"
PACKED_COLUMN, PACKED_ROW = "packed_colwise", "packed_rowwise"
ALL_REDUCE = "all_reduce"

# Every name that is accepted, and what it means here.
_MEANING = {
    COLUMN: COLUMN,
    COLUMN_GATHER: COLUMN_GATHER,
    "colwise_rep": COLUMN_GATHER,
    ROW: ROW,
    "rowwise_rep": ROW,
    ROW_SPLIT: ROW_SPLIT,
    VOCABULARY: VOCABULARY,
    EMBEDDING_COLUMN: EMBEDDING_COLUMN,
    PACKED_COLUMN: PACKED_COLUMN,
    PACKED_ROW: PACKED_ROW,
    "sequence_parallel": REPLICATE,  # a norm on whole sequences gives the same
    SUM_GRADIENT: SUM_GRADIENT,
    ALL_REDUCE: ALL_REDUCE,
    "local_params": REPLICATE,  # parameters are plain local tensors here anyway
    REPLICATE: REPLICATE,
}
_BARE = "a bare parameter's"  # not a module's
_REFUSED = {
    _BARE: "mixtures of experts and attention sinks keep parameters that are no module's weight",
    "mla_kv_a_proj": "multi-head latent attention shares one rotary key among all heads",
    "moe_tp_experts": "mixtures of experts keep all experts in one parameter",
    "moe_identity_expert": "mixtures of experts keep all experts in one parameter",
    "ep_dispatch_experts": "expert parallelism sends tokens between ranks",
    "grouped_gemm": "expert parallelism sends tokens between ranks",
}
SUPPORTED_STYLES = tuple(_MEANING)


@dataclass(frozen=True)
class Given:
    """A style that somebody gave a module: the user by a rule, or the model by its own plan."""

    style: str
    is_rule: bool


def given_styles(
    model: nn.Module, modules: Mapping[str, nn.Module], rules: Mapping[str, str] | None
) -> dict[str, Given]:
    """The style of each module that the user or the model itself names; the user's win.

    Raises: PlanError for an unknown or refused style, a rule that matches nothing, or one for a
    parameter that can't be cut alone. Warns of the model's own rules that match nothing.
    Source: transformers, ``distributed/tensor_parallel.py`` (styles and pattern words).
    """
    name = type(model).__name__
    own = getattr(model, "tp_plan", None) or getattr(model, "_tp_plan", None) or {}
    styles: dict[str, Given] = {}
    matched = _match(own, modules)
    # A tied or bare model has no head of its own for the rule to match: nothing to say then.
    unmatched = [pattern for pattern, names in matched.items() if not names]
    if unmatched:
        warnings.warn(
            f"tp_plan rules {unmatched} match nothing in {name} and will not be applied",
            stacklevel=3,
        )
    for pattern, found in matched.items():
        for path, bare in found:
            refused = bare is not None and _MEANING.get(own[pattern]) != REPLICATE
            styles[path] = Given(_BARE if refused else own[pattern], False)
    mine = _matched_rules(rules or {}, modules, name)
    for pattern, names in sorted(mine.items(), key=lambda item: "*" not in item[0]):
        styles.update(dict.fromkeys(names, Given((rules or {})[pattern], True)))
    return {path: _known(path, given, name) for path, given in styles.items()}


def check_rules(model: nn.Module, rules: Mapping[str, str]) -> None:
    """Raise PlanError if a rule's style is unknown or refused, or it matches no module."""
    name = type(model).__name__
    for pattern, style in rules.items():
        _known(pattern, Given(style, True), name)
    _matched_rules(rules, dict(model.named_modules()), name)


def _matched_rules(
    rules: Mapping[str, str], modules: Mapping[str, nn.Module], model_name: str
) -> dict[str, list[str]]:
    matched = {}
    for pattern, found in _match(rules, modules).items():
        if not found:
            raise PlanError(
                f"rule {pattern!r} matches no module of {model_name}; `*` stands for one number, "
                f"names look like {_examples(modules)}"
            )
        for _, bare in found:
            if bare is not None and _MEANING.get(rules[pattern]) != REPLICATE:
                raise PlanError(
                    f"{model_name}: rule {pattern!r}: {rules[pattern]!r} names a parameter "
                    f"({bare}) that is no weight of a Linear or Embedding; only those are cut, "
                    "name the module"
                )
        matched[pattern] = [name for name, _ in found]
    return matched


def _known(path: str, given: Given, model_name: str) -> Given:
    meaning = _MEANING.get(given.style)
    if meaning is not None:
        return Given(meaning, given.is_rule)
    why = _REFUSED.get(given.style)
    raise PlanError(
        f"{model_name}: style {given.style!r} of {path} is not supported"
        f"{f' ({why})' if why else ''}; supported styles are {list(SUPPORTED_STYLES)}. "
        f"rules={{{path!r}: 'replicate'}} keeps the module whole on every rank"
    )


def _match(
    rules: Mapping[str, str], modules: Mapping[str, nn.Module]
) -> dict[str, list[tuple[str, str | None]]]:
    """Modules that each pattern covers: ``*`` is one whole number between dots, the rest literal.

    A pattern for a module's weight means the module. One for another parameter gives the module
    that has it, and the parameter's name.
    """
    if not isinstance(rules, Mapping):
        raise PlanError(f"rules must be a dict of pattern to style, got {type(rules).__name__}")
    params = {
        f"{name}.{local}".lstrip("."): (name, local)
        for name, module in modules.items()
        for local, _ in module.named_parameters(recurse=False)
    }
    matched = {}
    for pattern in rules:
        words = [r"\d+" if word == "*" else re.escape(word) for word in pattern.split(".")]
        regex = re.compile(r"\.".join(words))
        found: list[tuple[str, str | None]] = [(n, None) for n in modules if regex.fullmatch(n)]
        for path in filter(regex.fullmatch, params):
            module, local = params[path]
            found.append((module, None if _is_matrix(modules[module], local) else path))
        matched[pattern] = found
    return matched


def _is_matrix(module: nn.Module, local: str) -> bool:
    return local == "weight" and (
        isinstance(module, (nn.Linear, nn.Embedding)) or type(module).__name__ == "Conv1D"
    )


def _examples(modules: Iterable[str] | Mapping[str, nn.Module]) -> list[str]:
    assert isinstance(modules, Mapping)
    kinds = (nn.Linear, nn.Embedding, nn.MultiheadAttention)
    return [name for name, module in modules.items() if isinstance(module, kinds)][:3]
