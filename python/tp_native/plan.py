"""How a model is cut: which module, along which dimension, at what cost. Pure; meta will do.

The cut comes from the model's own tensor-parallel plan (transformers' ``tp_plan``), from its
embedding and head, and from the user's rules. No table of model names lives here.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from .errors import PlanError
from .partition import Partition

# What each style does to a Linear: (sharded dimension of each parameter, outputs are gathered).
_LINEAR_STYLES: dict[str, tuple[dict[str, int], bool]] = {
    "colwise": ({"weight": 0, "bias": 0}, False),
    "colwise_gather_output": ({"weight": 0, "bias": 0}, True),
    "colwise_rep": ({"weight": 0, "bias": 0}, True),
    "rowwise": ({"weight": 1}, False),
}
_EMBEDDING_STYLES = ("embedding_rowwise", "rowwise")
# Whole on every rank, but each rank sees only its share of the gradient (per-head norms).
SUM_GRADIENT = "replicated_with_grad_allreduce"
SUPPORTED_STYLES = (*_LINEAR_STYLES, "embedding_rowwise", "replicate", SUM_GRADIENT)


@dataclass(frozen=True)
class Shard:
    """One parameter's cut: ``partition`` along dimension ``dim``."""

    dim: int
    partition: Partition


@dataclass(frozen=True)
class ShardEntry:
    """One module's cut. ``dims`` maps a parameter's local name to its sharded dimension."""

    style: str
    partition: Partition
    dims: Mapping[str, int]
    features: int  # width of the collective that ends the module, 0 if it has none
    gather_output: bool = False


@dataclass(frozen=True)
class ShardPlan:
    """The whole cut of one model for ``world_size`` ranks; made by `plan`.

    ``entries`` is keyed by module name, ``shapes`` holds every parameter's dense shape,
    ``item_bytes`` its bytes per element, ``aliases`` maps a tied name to its first name.
    ``partial_gradients`` names modules that stay whole but see only this rank's share of the
    gradient (norms inside attention heads).
    """

    world_size: int
    model_name: str
    entries: Mapping[str, ShardEntry]
    shapes: Mapping[str, tuple[int, ...]]
    item_bytes: Mapping[str, int]
    aliases: Mapping[str, str]
    partial_gradients: tuple[str, ...] = ()

    def shard(self, param_name: str) -> Shard | None:
        """The cut of a parameter by its dense name; None if every rank holds the whole."""
        if param_name not in self.shapes:
            raise ValueError(
                f"{param_name!r} is not a parameter of {self.model_name}; names look like "
                f"{next(iter(self.shapes), 'none: it has no parameters')!r}"
            )
        module_name, _, local_name = param_name.rpartition(".")
        entry = self.entries.get(module_name)
        if entry is None or local_name not in entry.dims:
            return None
        return Shard(entry.dims[local_name], entry.partition)

    def local_shape(self, param_name: str, rank: int) -> tuple[int, ...]:
        """Shape of what ``rank`` holds of a parameter."""
        cut = self.shard(param_name)
        shape = self.shapes[param_name]
        if cut is None:
            return shape
        return (*shape[: cut.dim], cut.partition[rank], *shape[cut.dim + 1 :])

    def local_bytes(self, rank: int) -> int:
        """Bytes of parameters on ``rank``; tied parameters count once."""
        return sum(
            math.prod(self.local_shape(name, rank)) * self.item_bytes[name]
            for name in self.shapes
            if name not in self.aliases
        )

    def collectives(self) -> tuple[int, int]:
        """(collectives in one forward pass, bytes per token that they combine)."""
        ending = {name: entry.features for name, entry in self.entries.items() if entry.features}
        if self.world_size == 1:
            return 0, 0
        token_bytes = (n * self.item_bytes[f"{name}.weight"] for name, n in ending.items())
        return len(ending), sum(token_bytes)

    def explain(self) -> str:
        """A table: modules folded by layer, shards, bytes per rank, collectives per forward."""
        rows = [("module", "count", "style", "cut", "bytes per rank")]
        for pattern, names in self._folded():
            entry = self.entries[names[0]]
            params = [f"{name}.{local}" for name in names for local in entry.dims]
            held = [p for p in params if p not in self.aliases]
            sizes = [
                sum(math.prod(self.local_shape(p, rank)) * self.item_bytes[p] for p in held)
                for rank in range(self.world_size)
            ]
            cut = f"{_slashes(entry.partition.sizes)} of {entry.partition.size}"
            what = _slashes(sizes) if held else "tied"
            rows.append((pattern, str(len(names)), entry.style, cut, what))
        widths = [max(len(row[i]) for row in rows) for i in range(5)]
        table = ["  ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)) for r in rows]
        count, token_bytes = self.collectives()
        owned = [name for name in self.shapes if name not in self.aliases]
        whole = sum(math.prod(self.shapes[name]) * self.item_bytes[name] for name in owned)
        per_rank = [self.local_bytes(rank) for rank in range(self.world_size)]
        return "\n".join(
            [
                f"{self.model_name} on {self.world_size} ranks",
                *(line.rstrip() for line in table),
                f"weights per rank: {_slashes(per_rank)} bytes of {whole}",
                f"collectives per forward: {count}, {token_bytes} bytes per token",
            ]
        )

    def _folded(self) -> list[tuple[str, list[str]]]:
        folded: dict[tuple[str, str, Partition], list[str]] = {}
        for name, entry in self.entries.items():
            pattern = re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", name)
            folded.setdefault((pattern, entry.style, entry.partition), []).append(name)
        return [(key[0], names) for key, names in folded.items()]


def plan(
    model: nn.Module,
    world_size: int,
    *,
    rules: Mapping[str, str] | None = None,
    ratios: Sequence[float] | None = None,
) -> ShardPlan:
    """Work out how ``model`` is cut for ``world_size`` ranks.

    The model's own ``tp_plan`` is read, its input embedding is cut by vocabulary and its output
    head by vocabulary with gathered logits; ``rules`` (module pattern to style, ``*`` for one
    number in a dotted name) win over all of it. Attention is cut on whole key/value groups.
    ``ratios`` gives each rank's share, default equal.

    Raises: PlanError if a style is unknown, a rule of the user's matches nothing, there are
    fewer key/value heads than ranks, or an unknown model comes without ``rules``.
    Source: transformers, ``distributed/tensor_parallel.py`` (styles and pattern words).
    """
    if isinstance(world_size, bool) or not isinstance(world_size, int) or world_size < 1:
        raise PlanError(f"plan got world_size {world_size!r}, expected an int >= 1")
    if ratios is not None and len(ratios) != world_size:
        raise PlanError(
            f"plan got {len(ratios)} ratios {list(ratios)} for {world_size} ranks; give one each"
        )
    modules = dict(model.named_modules())
    styles = _styles(model, modules, rules)
    cutter = _Cutter(model, modules, world_size, ratios)
    whole = ("replicate", SUM_GRADIENT)
    entries = {
        name: cutter.entry(name, modules[name], styles[name])
        for name in modules
        if styles.get(name, "replicate") not in whole
    }
    partial = tuple(name for name in modules if styles.get(name) == SUM_GRADIENT)
    shapes, item_bytes, aliases = {}, {}, {}
    first_names: dict[int, str] = {}
    for name, param in model.named_parameters(remove_duplicate=False):
        shapes[name] = tuple(param.shape)
        item_bytes[name] = param.element_size()
        first = first_names.setdefault(id(param), name)
        if first != name:
            aliases[name] = first
    made = ShardPlan(
        world_size, type(model).__name__, entries, shapes, item_bytes, aliases, partial
    )
    _check_ties(made)
    return made


def _styles(
    model: nn.Module, modules: dict[str, nn.Module], rules: Mapping[str, str] | None
) -> dict[str, str]:
    own = getattr(model, "tp_plan", None) or getattr(model, "_tp_plan", None) or {}
    if not own and not rules:
        raise PlanError(
            f"{type(model).__name__} has no tensor-parallel plan (`tp_plan`) of its own; pass "
            'rules={"layers.*.fc1": "colwise", "layers.*.fc2": "rowwise", ...} with the names '
            f"of its Linear modules; styles are {list(SUPPORTED_STYLES)}"
        )
    styles: dict[str, str] = {}
    for getter, style in (
        ("get_input_embeddings", "embedding_rowwise"),
        ("get_output_embeddings", "colwise_gather_output"),
    ):
        module = _ask(model, getter)
        kind = nn.Embedding if style == "embedding_rowwise" else nn.Linear
        styles.update((n, style) for n, m in modules.items() if m is module and type(m) is kind)
    matched = _match(own, modules)
    unmatched = [pattern for pattern, names in matched.items() if not names]
    # A tied or bare model has no head of its own for the rule to match: nothing to say then.
    if unmatched:
        warnings.warn(
            f"tp_plan rules {unmatched} match nothing in {type(model).__name__} "
            "and will not be applied",
            stacklevel=3,
        )
    for pattern, names in matched.items():
        styles.update(dict.fromkeys(names, own[pattern]))
    for name in _follow_own_embedding(styles, modules):
        styles[name] = "replicate"
    mine = _match(rules or {}, modules)
    for pattern, names in sorted(mine.items(), key=lambda item: "*" not in item[0]):
        if not names:
            raise PlanError(
                f"rule {pattern!r} matches no module of {type(model).__name__}; `*` stands for "
                f"one number, names look like {_examples(modules)}"
            )
        styles.update(dict.fromkeys(names, (rules or {})[pattern]))
    return styles


def _match(rules: Mapping[str, str], modules: dict[str, nn.Module]) -> dict[str, list[str]]:
    """Names that each pattern covers: ``*`` is one whole number between dots, the rest literal."""
    if not isinstance(rules, Mapping):
        raise PlanError(f"rules must be a dict of pattern to style, got {type(rules).__name__}")
    params = {
        f"{name}.{local}"
        for name, module in modules.items()
        for local, _ in module.named_parameters(recurse=False)
    }
    matched = {}
    for pattern, style in rules.items():
        words = [r"\d+" if word == "*" else re.escape(word) for word in pattern.split(".")]
        regex = re.compile(r"\.".join(words))
        matched[pattern] = [name for name in modules if regex.fullmatch(name)]
        hit = next(filter(regex.fullmatch, params), None)
        if hit is not None:
            raise PlanError(
                f"rule {pattern!r}: {style!r} names a parameter ({hit}); only whole modules "
                f"are cut, with styles {list(SUPPORTED_STYLES)}"
            )
    return matched


def _follow_own_embedding(styles: dict[str, str], modules: dict[str, nn.Module]) -> list[str]:
    """Embeddings with a forward of their own stay whole, and so does what is tied to them."""
    whole = [
        name
        for name, style in styles.items()
        if style in _EMBEDDING_STYLES and isinstance(modules[name], nn.Embedding)
        if not _is_plain_embedding(modules[name])
    ]
    if not whole:
        return []
    warnings.warn(
        f"{whole} stay whole on every rank: {type(modules[whole[0]]).__name__} does more than "
        "look rows up",
        stacklevel=4,
    )
    weights = {id(modules[name].weight) for name in whole}
    return [name for name in styles if id(getattr(modules[name], "weight", None)) in weights]


def _is_plain_embedding(module: nn.Module) -> bool:
    return type(module) is nn.Embedding and module.max_norm is None and not module.sparse


class _Cutter:
    """Makes one module's entry: checks the style, finds the unit, cuts."""

    def __init__(
        self,
        model: nn.Module,
        modules: dict[str, nn.Module],
        world_size: int,
        ratios: Sequence[float] | None,
    ) -> None:
        self.model_name = type(model).__name__
        self.modules = modules
        self.world_size = world_size
        self.ratios = ratios

    def entry(self, name: str, module: nn.Module, style: str) -> ShardEntry:
        if style not in SUPPORTED_STYLES:
            raise PlanError(
                f"{self.model_name}: style {style!r} of {name} is not supported; supported "
                f"styles are {list(SUPPORTED_STYLES)}. rules={{{name!r}: 'replicate'}} keeps "
                "the module whole on every rank"
            )
        if isinstance(module, nn.Embedding) and style in _EMBEDDING_STYLES:
            if not _is_plain_embedding(module):
                raise PlanError(
                    f"{name} is a {type(module).__name__}: only a plain nn.Embedding without "
                    f"max_norm and sparse can be cut; use rules={{{name!r}: 'replicate'}}"
                )
            rows = self._cut(module.num_embeddings)
            return ShardEntry("embedding_rowwise", rows, {"weight": 0}, module.embedding_dim)
        if type(module) is not nn.Linear or style not in _LINEAR_STYLES:
            raise PlanError(
                f"{name} is a {type(module).__name__}, which style {style!r} cannot cut: "
                "colwise and rowwise take nn.Linear, embedding_rowwise takes nn.Embedding"
            )
        dims, gather = _LINEAR_STYLES[style]
        columns = dims["weight"] == 0
        size = module.out_features if columns else module.in_features
        dims = {local: dim for local, dim in dims.items() if getattr(module, local) is not None}
        features = module.out_features if gather or not columns else 0
        return ShardEntry(style, self._features(name, size), dims, features, gather)

    def _features(self, name: str, size: int) -> Partition:
        """Cut a Linear's split dimension; inside attention on whole key/value groups."""
        heads, where = self._kv_heads(name)
        if heads is None:
            return self._cut(size)
        if size % heads:
            raise PlanError(
                f"{name} has {size} features, not a whole number per key/value head ({heads} in "
                f"{where}); use rules={{{name!r}: 'replicate'}} or a style for each module of it"
            )
        if heads < self.world_size:
            raise PlanError(
                f"{self.model_name}: total number of attention heads must be divisible by tensor "
                f"parallel size or cut unevenly by whole key/value groups: {where} has {heads} "
                f"key/value heads for {self.world_size} ranks; nearest legal sizes are 1 to {heads}"
            )
        groups = self._cut(heads)
        if 0 in groups.sizes:
            raise PlanError(
                f"ratios {list(self.ratios or ())} leave a rank without any of the {heads} "
                f"key/value heads of {where}: {list(groups)}; give it a larger share"
            )
        return groups.scaled(size // heads)

    def _kv_heads(self, name: str) -> tuple[int | None, str]:
        parent = name
        while parent:
            parent = parent.rpartition(".")[0]
            module = self.modules[parent]
            config = getattr(module, "config", None)
            if config is not None and any(
                hasattr(module, word) for word in ("num_key_value_groups", "head_dim", "head_size")
            ):
                for owner in (module, config):
                    heads = getattr(owner, "num_key_value_heads", None)
                    if isinstance(heads, int) and heads > 0:
                        return heads, parent
                heads = getattr(config, "num_attention_heads", None)
                return (heads, parent) if isinstance(heads, int) else (None, "")
        return None, ""

    def _cut(self, size: int) -> Partition:
        if self.ratios is None:
            return Partition.even(size, self.world_size)
        return Partition.from_ratios(size, self.ratios)


def _check_ties(made: ShardPlan) -> None:
    for name, first in made.aliases.items():
        if made.shard(name) != made.shard(first):
            raise PlanError(
                f"{name} and {first} are one tied parameter but would be cut differently; give "
                "both modules styles that split the same dimension, or 'replicate' for both"
            )


def _ask(model: nn.Module, getter: str) -> object:
    """A transformers accessor's answer; None where the model has none."""
    ask = getattr(model, getter, None)
    if not callable(ask):
        return None
    try:
        answer: object = ask()
    except (NotImplementedError, AttributeError):
        return None
    return answer


def _examples(modules: dict[str, nn.Module]) -> list[str]:
    kinds = (nn.Linear, nn.Embedding)
    return [name for name, module in modules.items() if isinstance(module, kinds)][:3]


def _slashes(sizes: Sequence[int]) -> str:
    return "/".join(map(str, sizes)) if len(set(sizes)) > 1 else str(sizes[0])
