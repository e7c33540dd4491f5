"""What a plan says: which parameter of which module is cut how. Data only; `plan` makes it."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, overload

from ..partition import Partition, ShardLayout
from ..structure.axes import Axis
from ..structure.solve import Solution

if TYPE_CHECKING:
    from rich.console import RenderableType

# What a module does in the cut model.
COLUMN = "colwise"
COLUMN_GATHER = "colwise_gather_output"
ROW = "rowwise"
ROW_SPLIT = "rowwise_split_input"
VOCABULARY = "embedding_rowwise"
EMBEDDING_COLUMN = "embedding_colwise"
ATTENTION = "attention"


@dataclass(frozen=True)
class Shard:
    """One parameter's cut: ``partition`` along dimension ``dim``."""

    dim: int
    partition: Partition | ShardLayout

    def layout(self) -> ShardLayout:
        """The cut as ranges of the whole."""
        return ShardLayout.of(self.partition)

    def local_size(self, rank: int) -> int:
        """Elements of the cut dimension on ``rank``."""
        return self.layout().local_sizes[rank]


@dataclass(frozen=True)
class ShardEntry:
    """One module's cut: ``style``, and the cut of each of its parameters that is cut.

    ``partition`` is the cut of its features (of the heads for attention), ``features`` the width of
    the collective that ends its forward, 0 if it has none. ``gather_grad``: whether each rank gets
    the whole gradient of a gathered output ("replicated") or a summand ("partial"). ``note``: why
    it is cut so, where there is a choice.
    """

    style: str
    partition: Partition | ShardLayout
    shards: Mapping[str, Shard]
    features: int = 0
    gather_grad: str = "replicated"
    note: str = ""

    @property
    def gather_output(self) -> bool:
        """Whether the ranks' outputs are gathered."""
        return self.style == COLUMN_GATHER

    @property
    def is_local(self) -> bool:
        """Whether the module's output is this rank's part."""
        return self.features == 0 and self.style in (COLUMN, EMBEDDING_COLUMN)


@dataclass(frozen=True)
class Cuts:
    """How axes are cut, and the axis of the output of each leaf that is cut by columns."""

    solution: Solution
    out_axes: Mapping[str, Axis]


@dataclass(frozen=True)
class ShardPlan:
    """The whole cut of one model for ``world_size`` ranks; made by `plan`.

    ``entries`` is keyed by module name, ``shapes`` holds every parameter's dense shape,
    ``item_bytes`` its bytes per element, ``aliases`` maps a tied name to its first name.
    ``partial_gradients`` names parameters that stay whole but get only this rank's share of the
    gradient (norms inside attention heads). ``attributes``: integers that modules read as sizes,
    by module and name, with each rank's value. ``translated``: modules whose code has whole sizes
    written into it and runs with these translated to local ones. ``random``: modules that draw
    dropout masks of cut activations, and which of the masks of one call are. ``summed``: modules
    whose outputs are summed over the ranks. ``read_whole``: cut modules whose weight other code
    reads. ``whole``: modules with matrices that every rank holds whole, and why. ``followers``:
    tied parameters that a module keeps but never reads, with the name under which it is cut.
    ``calls``: how often a forward pass calls each module that can be cut, empty where none was
    followed. ``kinds``: class names of modules with parameters. ``cuts``: the axes behind it, for
    translation.
    """

    world_size: int
    model_name: str
    entries: Mapping[str, ShardEntry]
    shapes: Mapping[str, tuple[int, ...]]
    item_bytes: Mapping[str, int]
    aliases: Mapping[str, str]
    partial_gradients: tuple[str, ...] = ()
    attributes: Mapping[str, Mapping[str, tuple[int, ...]]] = field(default_factory=dict)
    translated: Mapping[str, str] = field(default_factory=dict)
    random: Mapping[str, tuple[bool, ...]] = field(default_factory=dict)
    summed: tuple[str, ...] = ()
    read_whole: tuple[str, ...] = ()
    whole: Mapping[str, str] = field(default_factory=dict)
    followers: Mapping[str, str] = field(default_factory=dict)
    calls: Mapping[str, int] = field(default_factory=dict)
    kinds: Mapping[str, str] = field(default_factory=dict)
    cuts: Cuts | None = field(default=None, repr=False, compare=False)

    def shard(self, param_name: str) -> Shard | None:
        """The cut of a parameter by its dense name; None if every rank holds the whole."""
        if param_name not in self.shapes:
            raise ValueError(
                f"{param_name!r} is not a parameter of {self.model_name}; names look like "
                f"{next(iter(self.shapes), 'none: it has no parameters')!r}"
            )
        param_name = self.followers.get(param_name, param_name)
        module, local = param_name, ""
        while module:
            module, _, name = module.rpartition(".")
            local = f"{name}.{local}" if local else name
            entry = self.entries.get(module)
            if entry is not None:
                return entry.shards.get(local)
        return None

    def local_shape(self, param_name: str, rank: int) -> tuple[int, ...]:
        """Shape of what ``rank`` holds of a parameter."""
        cut = self.shard(param_name)
        shape = self.shapes[param_name]
        if cut is None:
            return shape
        return (*shape[: cut.dim], cut.local_size(rank), *shape[cut.dim + 1 :])

    def held_bytes(self, param_name: str, rank: int) -> int:
        """Bytes of a parameter on ``rank``."""
        return math.prod(self.local_shape(param_name, rank)) * self.item_bytes[param_name]

    def cuts_for_one_rank(self) -> Cuts:
        """A copy of ``cuts``: translating code notes more about the axes as it runs."""
        assert self.cuts is not None
        return copy.deepcopy(self.cuts)

    def owned(self) -> list[str]:
        """Names of all parameters, a tied one once."""
        return [name for name in self.shapes if name not in self.aliases]

    def local_bytes(self, rank: int) -> int:
        """Bytes of parameters on ``rank``; tied parameters count once."""
        return sum(self.held_bytes(name, rank) for name in self.owned())

    def whole_bytes(self) -> int:
        """Bytes of the dense model's parameters; tied parameters count once."""
        return sum(math.prod(self.shapes[n]) * self.item_bytes[n] for n in self.owned())

    def calls_of(self, module: str) -> int:
        """How often a forward pass calls a module; 1 where no pass was followed."""
        return self.calls.get(module, 0) if self.calls else 1

    def collectives(self) -> tuple[int, int]:
        """(collectives in one forward pass, bytes per token that they combine)."""
        from .facts import FORWARD, collectives

        found = [one for one in collectives(self) if one.direction == FORWARD]
        return sum(c.calls for c in found), sum(c.calls * c.bytes_per_token for c in found)

    @overload
    def explain(self, format: Literal["text", "json"] = "text") -> str: ...

    @overload
    def explain(self, format: Literal["rich"]) -> RenderableType: ...

    def explain(self, format: str = "text") -> str | RenderableType:
        """The plan for readers: what is cut how, what stays whole and why, bytes and collectives.

        ``format``: "text" (modules folded by layer, 100 columns), "rich" (the same, to be printed
        by ``rich``), or "json" (every module, see `as_json` for the keys).
        Raises: ValueError for another format; ModuleNotFoundError for "rich" without ``rich``.
        """
        from . import as_json, explain

        if format == "text":
            return explain.as_text(self)
        if format == "json":
            return as_json.as_json(self)
        if format == "rich":
            return explain.as_rich(self)
        raise ValueError(f"explain got format {format!r}, expected 'text', 'json' or 'rich'")
