"""How a model is cut: which module, along which dimension, at what cost. Pure; meta will do.

The cut comes from the user's rules, then from the model's own tensor-parallel plan (transformers'
``tp_plan``), then from its structure: `structure` follows one forward pass on fake tensors and
finds which features belong together. No table of model names lives here.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from ..errors import PlanError
from ..partition import Partition, ShardLayout
from ..structure.follow import Followed, follow
from ..structure.inputs import split_inputs
from ..structure.solve import elements_of, is_inside
from ..structure.trace import Leaf, find_leaves
from .shards import (
    ATTENTION,
    COLUMN,
    COLUMN_GATHER,
    EMBEDDING_COLUMN,
    ROW,
    ROW_SPLIT,
    VOCABULARY,
    Cuts,
    Shard,
    ShardEntry,
    ShardPlan,
)
from .styles import (
    ALL_REDUCE,
    PACKED_COLUMN,
    PACKED_ROW,
    REPLICATE,
    SUM_GRADIENT,
    Given,
    given_styles,
)

# Matrices that together are no more of the model than this stay whole rather than cost a
# collective each.
_SMALL = 0.01
# So much of the model may lie on every rank to save a collective in each attention.
_SHARED = 0.04


def plan(
    model: nn.Module,
    world_size: int,
    *,
    rules: Mapping[str, str] | None = None,
    ratios: Sequence[float] | None = None,
    inputs: Sequence[Any] | Mapping[str, Any] | Tensor | None = None,
) -> ShardPlan:
    """Work out how ``model`` is cut for ``world_size`` ranks.

    ``rules`` (module pattern to style, ``*`` for one number in a dotted name) come first, then the
    model's own ``tp_plan``, then its structure: one forward pass is followed without memory (on the
    model's own weights only where it branches on values), and Linears whose features only meet
    their like (heads, the width of an MLP) are cut in pairs with one collective each. What can't be
    paired is cut alone and gathered, or stays whole; `ShardPlan.explain` says which and why.
    Key/value heads and their queries stay together; fewer of them than ranks are shared by several.
    ``ratios`` gives each rank's share, default equal. ``inputs``: arguments for a forward pass (a
    Mapping as last one: keyword arguments), where they can't be guessed.

    Raises: PlanError if a style is unknown or refused by name, a rule of the user's matches
    nothing or does not fit its module, or no rank of a shared key/value head has a share.
    Warns where the model can't be followed on any inputs that were tried.
    Source: Shoeybi et al., Megatron-LM, arXiv:1909.08053, section 3 (column and row pairs);
    transformers, ``distributed/tensor_parallel.py`` (styles and pattern words).
    """
    if isinstance(world_size, bool) or not isinstance(world_size, int) or world_size < 1:
        raise PlanError(f"plan got world_size {world_size!r}, expected an int >= 1")
    if ratios is not None and len(ratios) != world_size:
        raise PlanError(
            f"plan got {len(ratios)} ratios {list(ratios)} for {world_size} ranks; give one each"
        )
    modules = dict(model.named_modules())
    given = given_styles(model, modules, rules)
    planner = _Planner(model, modules, given, world_size, ratios)
    planner.follow(inputs)
    return planner.made()


class _Planner:
    """Collects entries: first pairs from structure, then given styles, then what is left."""

    def __init__(
        self,
        model: nn.Module,
        modules: Mapping[str, nn.Module],
        given: Mapping[str, Given],
        world_size: int,
        ratios: Sequence[float] | None,
    ) -> None:
        self.model = model
        self.name = type(model).__name__
        self.modules = modules
        self.world_size = world_size
        self.ratios = ratios
        self.leaves = find_leaves(model)
        self.given = {**self._accessors(), **given}
        self.entries: dict[str, ShardEntry] = {}
        self.whole: dict[str, str] = {}
        self.followed: Followed | None = None
        self.followers: dict[str, str] = {}
        self.read_whole: list[str] = []

    def _accessors(self) -> dict[str, Given]:
        """Embedding and head, where transformers' accessors name them."""
        found = {}
        for getter, kind, style in (
            ("get_input_embeddings", "embedding", VOCABULARY),
            ("get_output_embeddings", "linear", COLUMN_GATHER),
        ):
            module = _ask(self.model, getter)
            for name, leaf in self.leaves.items():
                if leaf.module is module and leaf.kind == kind:
                    found[name] = Given(style, False)
        return found

    # -- where the styles come from

    def follow(self, inputs: Sequence[Any] | Mapping[str, Any] | Tensor | None) -> None:
        """Cut pairs that the structure shows."""
        chosen = None if inputs is None else split_inputs(inputs)
        self.followed = follow(
            self.model, self.leaves, self._fits, self.world_size, self.ratios, chosen
        )
        if self.followed.failure:
            warnings.warn(
                f"{self.name} could not be followed ({self.followed.failure}): its modules are cut "
                "one by one, with a collective each; pass tp.plan(..., inputs=) what its forward "
                "takes, or rules",
                stacklevel=4,
            )
            return
        solution = self.followed.solution
        for cut in solution.cuts:
            for name in cut.pair.producers:
                leaf = self.leaves[name]
                assert leaf.out_axis is not None
                style = EMBEDDING_COLUMN if leaf.kind == "embedding" else COLUMN
                self.entries[name] = self._entry(leaf, style, solution.layout(leaf.out_axis))
            for name in cut.pair.consumers:
                leaf = self.leaves[name]
                assert leaf.in_axis is not None
                self.entries[name] = self._entry(leaf, ROW, solution.layout(leaf.in_axis))

    def _fits(self, producers: Sequence[str], consumers: Sequence[str]) -> bool:
        """Whether a pair is what the given styles of its leaves say."""
        for names, styles in ((producers, (COLUMN, PACKED_COLUMN)), (consumers, (ROW, PACKED_ROW))):
            for name in names:
                given = self.given.get(name)
                if (given is not None and given.style not in styles) or self._is_tied(name):
                    return False
        return True

    def _is_tied(self, name: str) -> bool:
        weight = getattr(self.modules[name], "weight", None)
        holders = {
            id(m) for m in self.modules.values() for p in m._parameters.values() if p is weight
        }
        return weight is not None and len(holders) > 1

    # -- entries

    def made(self) -> ShardPlan:
        """The plan."""
        for name, given in self.given.items():
            if name in self.leaves:
                if name not in self.entries:
                    self._add_given(name, given)
            elif given.style not in (REPLICATE, SUM_GRADIENT, ALL_REDUCE):
                if given.is_rule:
                    self._refuse(name, given)
                self.whole[name] = self._own_forward(name)
        self._add_rest()
        for name, module in self.modules.items():
            is_matrix = isinstance(module, (nn.Linear, nn.Embedding))
            if is_matrix and not {name, name.rpartition(".")[0]} & self.leaves.keys():
                self.whole.setdefault(name, self._own_forward(name))
        self._settle_ties()
        shapes, item_bytes, aliases = {}, {}, {}
        first_names: dict[int, str] = {}
        for name, param in self.model.named_parameters(remove_duplicate=False):
            shapes[name] = tuple(param.shape)
            item_bytes[name] = param.element_size()
            first = first_names.setdefault(id(param), name)
            if first != name:
                aliases[name] = first
        order = {name: i for i, name in enumerate(self.modules)}
        entries = dict(sorted(self.entries.items(), key=lambda item: order[item[0]]))
        return ShardPlan(
            self.world_size,
            self.name,
            entries,
            shapes,
            item_bytes,
            aliases,
            partial_gradients=self._partial(),
            attributes=self.followed.attributes if self.followed else {},
            translated=self.followed.translated if self.followed else {},
            random=self.followed.random if self.followed else {},
            summed=tuple(n for n, g in self.given.items() if g.style == ALL_REDUCE),
            whole=self.whole,
            followers=self.followers,
            read_whole=self._read_whole(),
            calls=self._calls(),
            kinds={n: type(m).__name__ for n, m in self.modules.items() if m._parameters},
            cuts=self._cuts(),
        )

    def _cuts(self) -> Cuts | None:
        if self.followed is None or not self.followed.translated:
            return None
        producers = {n for cut in self.followed.solution.cuts for n in cut.pair.producers}
        axes = {n: axis for n in producers if (axis := self.leaves[n].out_axis) is not None}
        return Cuts(self.followed.solution, axes)

    def _calls(self) -> Mapping[str, int]:
        events = self.followed.trace.events if self.followed else ()
        return Counter(event.leaf for event in events if event.leaf is not None)

    def _partial(self) -> tuple[str, ...]:
        partial = set(self.followed.partial) if self.followed else set()
        for name, given in self.given.items():
            if given.style == SUM_GRADIENT:
                module = self.modules[name]
                partial.update(f"{name}.{local}" for local, _ in module.named_parameters())
        return tuple(n for n, _ in self.model.named_parameters() if n in partial)

    def _add_given(self, name: str, given: Given) -> None:
        leaf, style = self.leaves[name], given.style
        if style == ROW and leaf.kind == "embedding":
            style = VOCABULARY
        if style in (REPLICATE, SUM_GRADIENT, ALL_REDUCE):
            self.whole[name] = "by rule" if given.is_rule else "by the model's own plan"
            return
        if style not in _STYLES_OF[leaf.kind]:
            self._refuse(name, given)
        paired = (COLUMN, ROW, PACKED_COLUMN, PACKED_ROW)
        if style in paired and not given.is_rule and self.followed and not self.followed.failure:
            return  # the structure shows that its pair can't be cut: alone
        why = self._unfit(name)
        if why is not None and not given.is_rule:
            self.whole[name] = why
            return
        size = _size(leaf, style)
        if style in (PACKED_COLUMN, PACKED_ROW):
            half = self._features(name, size // 2)
            layout: Partition | ShardLayout = ShardLayout.stacked([half, half])
            style = COLUMN if style == PACKED_COLUMN else ROW
        elif style in (COLUMN, ROW):
            layout = self._features(name, size)
        else:
            layout = self._cut(size)
        self.entries[name] = self._entry(leaf, style, layout)

    def _own_forward(self, name: str) -> str:
        kind = type(self.modules[name]).__name__
        return f"the forward of {kind} does more than its base class's"

    def _refuse(self, name: str, given: Given) -> None:
        raise PlanError(
            f"{name or self.name} is a {type(self.modules[name]).__name__}, which style "
            f"{given.style!r} cannot cut: colwise, rowwise and their kin take nn.Linear and "
            "Conv1D, embedding_rowwise and embedding_colwise take nn.Embedding; "
            f"rules={{{name!r}: 'replicate'}} keeps it whole"
        )

    def _unfit(self, name: str) -> str | None:
        """Why a leaf can't be cut at all."""
        trace = self.followed.trace if self.followed else None
        if trace is not None and name in trace.read_elsewhere:
            return f"its weight is read past its forward: {trace.read_elsewhere[name]}"
        if self.followed and name in self.followed.on_pieces:
            return "each rank calls it on other rows"
        return None

    def _read_whole(self) -> tuple[str, ...]:
        """Cut leaves whose weight other code reads, or may read where nothing was followed."""
        if self.followed is not None and self.followed.failure:
            kinds = ("linear", "embedding")
            return tuple(name for name in self.entries if self.leaves[name].kind in kinds)
        return tuple(name for name in self.read_whole if name in self.entries)

    def _can_be_read(self, leaf: Leaf) -> bool:
        """Whether code that reads a leaf's weight can be given the whole one: it must use it alike
        on every rank.
        """
        assert self.followed is not None
        names = {f"{leaf.name}.{local}" for local in leaf.module._parameters}
        return (
            leaf.kind in ("linear", "embedding")
            and self.followed.trace.reads.get(leaf.name) == {"weight"}
            and leaf.name not in self.followed.partial_outputs
            and not names & self.followed.partial
            and not any(
                is_inside(reader, self.followed.translated)
                for reader in self.followed.trace.readers.get(leaf.name, ())
            )
        )

    def _add_rest(self) -> None:
        """Leaves of no pair and no given style: alone, with a collective each, or whole."""
        rest = [n for n in self.leaves if n not in self.entries and n not in self.whole]
        partial = self.followed.partial_outputs if self.followed else set()
        total = sum(elements_of(leaf) for leaf in self.leaves.values())
        left = _SMALL * total
        shared = [n for n in rest if n in partial and self.leaves[n].kind in ("linear", "conv1d")]
        if sum(elements_of(self.leaves[n]) for n in shared) > _SHARED * total:
            shared = []
        for name in sorted(rest, key=lambda n: elements_of(self.leaves[n])):
            leaf, size = self.leaves[name], elements_of(self.leaves[name])
            why = self._unfit(name)
            if why is not None and self._can_be_read(leaf):
                self.entries[name] = self._alone(leaf, False)
                self.read_whole.append(name)
            elif why is not None:
                self.whole[name] = why
            elif name in partial and leaf.kind == "embedding":
                self.whole[name] = "its rows meet what is cut, on every rank another part of it"
            elif name in shared:
                self.entries[name] = self._held_by_all(leaf)
            elif size <= left and name not in partial and leaf.kind != "attention":
                left -= size
                self.whole[name] = "too small to be worth a collective"
            else:
                self.entries[name] = self._alone(leaf, name in partial)

    def _alone(self, leaf: Leaf, is_partial: bool) -> ShardEntry:
        note = self.followed.why_alone(leaf) if self.followed and not self.followed.failure else ""
        if leaf.kind == "attention":
            return self._attention(leaf)
        if leaf.kind == "embedding":
            return replace(
                self._entry(leaf, VOCABULARY, self._cut(_size(leaf, VOCABULARY))), note=note
            )
        is_narrow = _size(leaf, COLUMN) < self.world_size <= _size(leaf, ROW) and not is_partial
        style = ROW_SPLIT if is_narrow else COLUMN_GATHER
        entry = self._entry(leaf, style, self._cut(_size(leaf, style)))
        return replace(entry, note=note, gather_grad="partial" if is_partial else "replicated")

    def _held_by_all(self, leaf: Leaf) -> ShardEntry:
        """What every rank needs whole beside its part of something else: the one key/value head of
        multi-query attention.
        """
        size = _out_size(leaf)
        layout = ShardLayout(size, (((0, size),),) * self.world_size)
        entry = self._entry(leaf, COLUMN, layout)
        return replace(entry, note="every rank needs all of it beside its part of the heads")

    def _entry(self, leaf: Leaf, style: str, layout: Partition | ShardLayout) -> ShardEntry:
        dims = {name: 0 for name, p in leaf.module._parameters.items() if p is not None}
        if leaf.kind == "embedding":
            dims["weight"] = 1 if style == EMBEDDING_COLUMN else 0
        elif style in (ROW, ROW_SPLIT):
            dims = {"weight": 1}
        if leaf.kind == "conv1d":
            dims["weight"] = 1 - dims["weight"]  # stored (in, out)
        if isinstance(layout, ShardLayout) and layout.is_consecutive:
            layout = layout.local_sizes
        shards = {name: Shard(dim, layout) for name, dim in dims.items()}
        ends = (COLUMN_GATHER, ROW, ROW_SPLIT, VOCABULARY)
        features = _out_size(leaf) if style in ends else 0
        if style == EMBEDDING_COLUMN and leaf.name in self.given:
            features = _out_size(leaf)
        return ShardEntry(style, layout, shards, features)

    def _attention(self, leaf: Leaf) -> ShardEntry:
        module: Any = leaf.module
        heads = self._cut(module.num_heads)
        features = heads.scaled(module.head_dim)
        three = ShardLayout.stacked([features] * 3)
        places = {
            "in_proj_weight": Shard(0, three),
            "in_proj_bias": Shard(0, three),
            "q_proj_weight": Shard(0, features),
            "k_proj_weight": Shard(0, features),
            "v_proj_weight": Shard(0, features),
            "bias_k": Shard(2, features),
            "bias_v": Shard(2, features),
            "out_proj.weight": Shard(1, features),
        }
        held = {name for name, _ in module.named_parameters()}
        shards = {name: cut for name, cut in places.items() if name in held}
        return ShardEntry(ATTENTION, heads, shards, module.embed_dim)

    # -- sizes

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
                f"{self.name}: total number of attention heads must be divisible by tensor "
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

    # -- ties

    def _settle_ties(self) -> None:
        """One tied parameter is cut one way: else all its modules stay whole, if nobody minds.

        A module that only keeps a parameter for another one, and never reads it, follows.
        """
        holders: dict[int, list[tuple[str, str]]] = {}
        for name, module in self.modules.items():
            for local, param in module._parameters.items():
                if param is not None:
                    holders.setdefault(id(param), []).append((name, local))
        tied = [places for places in holders.values() if len(places) > 1]
        while odd := next((places for places in tied if self._is_torn(places)), None):
            if any((g := self.given.get(n)) is not None and g.is_rule for n, _ in odd):
                first, other = (f"{n}.{p}" for n, p in odd[:2])
                raise PlanError(
                    f"{other} and {first} are one tied parameter but would be cut differently; "
                    "give both modules styles that split the same dimension, or 'replicate' for "
                    "both"
                )
            for name, _ in odd:
                if self.entries.pop(name, None) is not None:
                    others = ", ".join(n for n, _ in odd if n != name)
                    self.whole[name] = f"tied to {others}, which can't be cut alike"
        for places in tied:
            cut = [".".join(place).lstrip(".") for place in places if self._cut_of(*place)]
            for name, local in places if cut else ():
                if name not in self.entries:
                    self.followers[f"{name}.{local}".lstrip(".")] = cut[0]

    def _is_torn(self, places: Sequence[tuple[str, str]]) -> bool:
        can_tell = self.followed is not None and not self.followed.failure
        is_read = self.followed is not None and any(
            name in self.followed.trace.read_elsewhere for name, _ in places
        )
        used = [p for p in places if p[0] in self.leaves or is_read or not can_tell]
        return len({self._cut_of(*place) for place in used}) > 1

    def _cut_of(self, module: str, local: str) -> tuple[Any, ...] | None:
        entry = self.entries.get(module)
        cut = entry.shards.get(local) if entry is not None else None
        return None if cut is None else (cut.dim, cut.layout())


_LINEAR = (COLUMN, COLUMN_GATHER, ROW, ROW_SPLIT, PACKED_COLUMN, PACKED_ROW)
_STYLES_OF: dict[str, tuple[str, ...]] = {
    "linear": _LINEAR,
    "conv1d": _LINEAR,
    "embedding": (VOCABULARY, EMBEDDING_COLUMN),
    "attention": (),
}


def _size(leaf: Leaf, style: str) -> int:
    """The dimension that a style cuts."""
    if style == VOCABULARY:
        rows: int = leaf.module.num_embeddings  # type: ignore[assignment]
        return rows
    if style in (ROW, ROW_SPLIT, PACKED_ROW):
        assert leaf.in_axis is not None
        return leaf.in_axis.size
    return _out_size(leaf)


def _out_size(leaf: Leaf) -> int:
    assert leaf.out_axis is not None
    return leaf.out_axis.size


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
