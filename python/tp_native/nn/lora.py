"""Low-rank adapters (LoRA) on linear layers, cut as the layers' weights are.

The layers stay where they are and keep their own parameters and names; each gets ``lora_A`` and
``lora_B`` beside them.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..collectives import all_gather_tensor, all_reduce_sum, copy_to_ranks, reduce_scatter_sum
from ..group import Group, GroupLike, current_group
from ..partition import Partition
from .dropout import ParallelDropout
from .gradients import summed, summed_over_replicas
from .linear import ColumnParallelLinear, RowParallelLinear, add_rms_norm, matrix_of
from .sharded import ShardedModule, ShardMark, mark_of

Targets = str | Sequence[str] | Callable[[str, nn.Module], bool]
_NAMES = ("lora_A", "lora_B")


@dataclass(frozen=True)
class LoRAOptions:
    """What all adapters of a model have in common.

    Raises: ValueError for a rank below 1, an ``alpha`` that is not finite, a dropout outside 0..1.
    """

    rank: int
    alpha: float
    dropout: float = 0.0
    use_rslora: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.rank, bool) or not isinstance(self.rank, int) or self.rank < 1:
            raise ValueError(f"LoRA got rank {self.rank!r}, expected an int >= 1")
        if not math.isfinite(self.alpha):
            raise ValueError(f"LoRA got alpha {self.alpha!r}, expected a finite number")
        if not 0 <= self.dropout <= 1:
            raise ValueError(f"LoRA got dropout {self.dropout!r}, expected 0 to 1")

    @property
    def scaling(self) -> float:
        """What ``B A`` is multiplied by: ``alpha / rank``, or ``alpha / sqrt(rank)``.

        Source: Kalajdzievski, A Rank Stabilization Scaling Factor, arXiv:2312.03732 (rsLoRA).
        """
        return self.alpha / (math.sqrt(self.rank) if self.use_rslora else self.rank)


class LoRAModule(nn.Module):
    """What the adapted layers share. A layer becomes one by `add_lora`, never by its constructor.

    While merged, ``B A`` is in the weight: the layer is then a plain one, in its ``state_dict``
    too.
    """

    weight: nn.Parameter
    lora_A: nn.Parameter
    lora_B: nn.Parameter
    lora_options: LoRAOptions
    lora_dropout: ParallelDropout
    lora_is_merged: bool

    def _low_rank(self, x: Tensor) -> Tensor:
        """``scaling * B A x`` of this rank; adapters may be wider than the layer."""
        a, b = self._adapter()
        inner = F.linear(self.lora_dropout(x).to(a.dtype), a)
        return F.linear(inner * self.lora_options.scaling, b)

    def _adapter(self) -> tuple[Tensor, Tensor]:
        return self.lora_A, self.lora_B

    def _with_low_rank(self, y: Tensor, x: Tensor) -> Tensor:
        return y if self.lora_is_merged else y + self._low_rank(x).to(y.dtype)

    def _draw_lora(self, group: Group, in_features: int) -> None:
        """``A`` as a whole linear layer is drawn, of which a shard keeps its part; ``B`` zero."""
        if self.lora_A.is_meta:
            return
        full = self.lora_A.new_empty(self.lora_A.shape[0], in_features)
        generator = group.init_generator(full.device)
        nn.init.kaiming_uniform_(full, a=math.sqrt(5), generator=generator)
        mark = mark_of(self.lora_A)
        with torch.no_grad():
            self.lora_A.copy_(full if mark is None else mark.local(full))
            self.lora_B.zero_()

    @torch.no_grad()
    def _move_into_weight(self, is_merged: bool) -> None:
        if is_merged == self.lora_is_merged:
            return
        # float32 at least, rounded once: a bfloat16 weight loses no more than that
        weight = matrix_of(self)
        wide = torch.promote_types(weight.dtype, torch.float32)
        delta = self.lora_B.to(wide) @ self.lora_A.to(wide)
        sign = 1 if is_merged else -1
        weight.copy_(weight.to(wide) + sign * self.lora_options.scaling * delta)
        self.lora_is_merged = is_merged

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.lora_is_merged:
            for name in _NAMES:
                del destination[prefix + name]

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, metadata: Any, strict: bool, *lists: list[str]
    ) -> None:
        if self.lora_is_merged:
            lists[-1].append(f"{prefix[:-1]}: LoRA is merged into the weight; unmerge_lora first")
            return
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, *lists)

    def extra_repr(self) -> str:
        """The layer's own, and the adapter's."""
        options = self.lora_options
        more = f"lora_rank={options.rank}, lora_alpha={options.alpha:g}"
        if options.dropout:
            more += f", lora_dropout={options.dropout}"
        return f"{super().extra_repr()}, {more}" + (", merged" if self.lora_is_merged else "")


class LoRALinear(LoRAModule, nn.Linear):  # type: ignore[misc]
    """``nn.Linear`` with an adapter, in a world of one."""

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output and the adapter's."""
        return self._with_low_rank(super().forward(x), x)


class LoRAColumnParallelLinear(LoRAModule, ColumnParallelLinear):
    """``A`` whole on every rank, of ``B`` the rows that the rank has of the weight.

    No collective forward. Backward one all-reduce of ``dx`` for layer and adapter together, and the
    sum of ``A``'s gradient, of which each rank has what its rows give; `deferred_gradients` takes
    that once per step.
    """

    def _adapter(self) -> tuple[Tensor, Tensor]:
        (a,) = summed(self.group, self.lora_A)
        b, mark = self.lora_B, mark_of(self.lora_B)
        if mark is None or not self.layout.is_replicated:
            return a, b
        return a, summed_over_replicas(b, mark)

    def _product(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return self._with_low_rank(super()._product(x, weight, bias), x)

    def _of_replicated(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if self.lora_is_merged:
            return super()._of_replicated(x, weight, bias)
        self._check_width(x)
        if x.requires_grad and torch.is_grad_enabled():
            # a copy, which sums what both paths send back
            x = copy_to_ranks(x, self.group)
        return self._activated(self._product(x, weight, bias))

    def _of_tokens(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, tokens: Partition | None
    ) -> Tensor:
        if self.lora_is_merged:
            return super()._of_tokens(x, weight, bias, tokens)
        self._check_width(x)
        # the gather's backward sums what both paths send back
        x = all_gather_tensor(x, self.sequence_dim, self.group, "partial", partition=tokens)
        return self._activated(self._product(x, weight, bias))


class LoRARowParallelLinear(LoRAModule, RowParallelLinear):
    """Of ``A`` the columns that the rank has of the weight, ``B`` whole on every rank.

    ``B``'s product with the rank's part of ``A x`` joins its summand, so the layer's one collective
    completes both. Backward the sum of ``B``'s gradient, of which each rank has what its columns
    give; `deferred_gradients` takes that once per step.
    """

    def _adapter(self) -> tuple[Tensor, Tensor]:
        (b,) = summed(self.group, self.lora_B)
        return self.lora_A, b

    def _product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return self._with_low_rank(super()._product(x, bias), x)

    def _reduced(self, x: Tensor, bias: Tensor | None) -> Tensor:
        if self.lora_is_merged:
            return super()._reduced(x, bias)
        if x.shape[-1] != self.local_in_features:
            raise ValueError(
                f"RowParallelLinear: the input's last dimension is {x.shape[-1]}, expected this "
                f"rank's part of in_features, {self.local_in_features} of {self.in_features}"
            )
        y = all_reduce_sum(self._product(x, None), self.group)
        return y if bias is None else y + bias

    def _scattered(self, x: Tensor, tokens: Partition | None) -> Tensor:
        if self.lora_is_merged:
            return super()._scattered(x, tokens)
        # zeros before the sum: their gradient is the bias's over all tokens, on every rank
        bias = None if self.bias is None else self.bias - self.bias.detach()
        y = self._product(x, bias)
        y = reduce_scatter_sum(y, self.sequence_dim, self.group, partition=tokens)
        return y if self.bias is None else y + self.bias.detach().to(y.dtype)  # autocast's

    def forward_add_rms_norm(
        self, x: Tensor, residual: Tensor, norm_weight: Tensor, eps: float = 1e-6
    ) -> tuple[Tensor, Tensor]:
        """As the layer's own; step by step while not merged."""
        if self.lora_is_merged:
            return super().forward_add_rms_norm(x, residual, norm_weight, eps)
        self._check_whole_sum()
        return add_rms_norm(cast(Tensor, self.forward(x)), residual, norm_weight, eps)


_ADAPTED: dict[type[nn.Module], type[LoRAModule]] = {
    ColumnParallelLinear: LoRAColumnParallelLinear,
    RowParallelLinear: LoRARowParallelLinear,
    nn.Linear: LoRALinear,
}


def add_lora(
    model: nn.Module,
    rank: int,
    *,
    alpha: float | None = None,
    dropout: float = 0.0,
    targets: Targets | None = None,
    use_rslora: bool = False,
    dtype: torch.dtype | None = None,
    group: GroupLike | None = None,
) -> list[str]:
    """Give linear layers of ``model`` adapters, freeze everything else, and return their names.

    ``y = layer(x) + scaling * B A dropout(x)``, ``A`` ``(rank, in_features)`` drawn as
    ``nn.Linear`` draws its weight (the same for any number of ranks), ``B`` ``(out_features,
    rank)`` zero; ``scaling`` is ``alpha / rank``, with ``use_rslora`` ``alpha / sqrt(rank)``,
    ``alpha`` by default ``rank``. ``dtype``: the adapters', default the weights'.

    ``targets``: names or their ends after a dot, with ``*`` wildcards (``"q_proj"``,
    ``"layers.0.*"``), or a function of name and module. Default: every column- and row-parallel
    layer, in a world of one every ``nn.Linear`` too, but none whose weight is tied to another
    module's. Gradients equal the dense model's; what is to be trained besides is unfrozen after.

    Raises: ValueError for a rank, alpha or dropout out of range, a target that names no such layer,
    a model that has adapters already.
    Source: Hu et al., LoRA, arXiv:2106.09685.
    """
    options = LoRAOptions(rank, float(rank if alpha is None else alpha), dropout, use_rslora)
    here = lora_group(model, group)
    if has_lora(model):
        raise ValueError(
            f"{type(model).__name__} has LoRA adapters already; add them once, with all targets"
        )
    chosen = _chosen(model, targets, here)
    model.requires_grad_(False)
    for layer in chosen.values():
        _adapt(layer, options, dtype, here)
    return list(chosen)


def merge_lora(model: nn.Module) -> None:
    """Add ``scaling * B A`` to the weights, shards to shards; forward is then the plain layer's.

    No collective. ``state_dict`` and `save_pretrained` give the merged model, without adapters.
    Raises: ValueError for a model without adapters, or a weight that another module has as well.
    """
    layers = dict(lora_layers(model))
    shared = _shared_weights(model)
    tied = [name for name, layer in layers.items() if id(layer.weight) in shared]
    if tied:
        raise ValueError(f"merge_lora would change what is tied to the weights of {tied}")
    for layer in layers.values():
        layer._move_into_weight(True)


def unmerge_lora(model: nn.Module) -> None:
    """Subtract what `merge_lora` added: the weights as they were but for one rounding each way.

    Raises: ValueError for a model without adapters.
    """
    for _, layer in lora_layers(model):
        layer._move_into_weight(False)


def has_lora(model: nn.Module) -> bool:
    """Whether `add_lora` gave it adapters."""
    return any(isinstance(module, LoRAModule) for module in model.modules())


def lora_layers(model: nn.Module) -> Iterator[tuple[str, LoRAModule]]:
    """The adapted layers by name. Raises: ValueError if there is none."""
    if not has_lora(model):
        raise ValueError(f"{type(model).__name__} has no LoRA adapters; add_lora makes them")
    for name, module in model.named_modules():
        if isinstance(module, LoRAModule):
            yield name, module


def lora_group(model: nn.Module, group: GroupLike | None) -> Group:
    """The group of the model's sharded layers, else ``group``, else the current one."""
    own = next((m.group for m in model.modules() if isinstance(m, ShardedModule)), None)
    if own is None:
        return current_group(group)
    if group is not None and current_group(group) is not own:
        raise ValueError(f"{type(model).__name__} is cut for {own}, not for {current_group(group)}")
    return own


def lora_candidates(model: nn.Module, group: Group) -> dict[str, nn.Module]:
    """The layers that can have an adapter, by name."""
    kinds = (ColumnParallelLinear, RowParallelLinear)
    return {
        name: module
        for name, module in model.named_modules()
        # only nn.Linear itself: MultiheadAttention never calls the forward of its subclass
        if isinstance(module, kinds) or (type(module) is nn.Linear and group.size == 1)
    }


def lora_marks(layer: nn.Module) -> dict[str, ShardMark]:
    """How a layer's ``lora_A`` and ``lora_B`` are cut, whether it has them yet or not."""
    if isinstance(layer, ColumnParallelLinear):
        return {"lora_B": ShardMark(layer.group, 0, layer.layout)}
    if isinstance(layer, RowParallelLinear):
        return {"lora_A": ShardMark(layer.group, 1, layer.layout)}
    return {}


def _chosen(model: nn.Module, targets: Targets | None, group: Group) -> dict[str, nn.Module]:
    """The layers that ``targets`` names; an error that lists what there is if it names none."""
    layers = lora_candidates(model, group)
    if targets is None:
        shared = _shared_weights(model)
        chosen: dict[str, nn.Module] = {
            n: m for n, m in layers.items() if id(cast(Tensor, m.weight)) not in shared
        }
        unmatched: list[Any] = [] if chosen else ["any"]
    elif callable(targets):
        chosen = {n: m for n, m in layers.items() if targets(n, m)}
        unmatched = [] if chosen else [targets]
    else:
        patterns = [targets] if isinstance(targets, str) else list(targets)
        hits = {p: [n for n in layers if _matches(n, p)] for p in patterns}
        wanted = {name for names in hits.values() for name in names}
        chosen = {n: m for n, m in layers.items() if n in wanted}
        unmatched = [p for p, names in hits.items() if not names] or ([] if patterns else ["[]"])
    if unmatched:
        ends = sorted({name.rpartition(".")[2] for name in layers})
        hint = "" if group.size == 1 else "; in several ranks parallelize(model) comes first"
        raise ValueError(
            f"LoRA target {unmatched} is no layer that can have an adapter in "
            f"{type(model).__name__}; there are {ends}{hint}"
        )
    return chosen


def _matches(name: str, pattern: str) -> bool:
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}")


def _shared_weights(model: nn.Module) -> set[int]:
    held = Counter(id(p) for m in model.modules() for p in m._parameters.values() if p is not None)
    return {key for key, count in held.items() if count > 1}


def _adapted(kind: type[nn.Module]) -> type[nn.Module]:
    """The class of an adapted ``kind``, which stays an instance of its own class."""
    base = next(b for b in _ADAPTED if issubclass(kind, b))
    if kind is base:
        return _ADAPTED[base]
    return type(f"LoRA{kind.__name__}", (_ADAPTED[base], kind), {"__module__": kind.__module__})


def _adapt(
    module: nn.Module, options: LoRAOptions, dtype: torch.dtype | None, group: Group
) -> None:
    marks = lora_marks(module)
    is_row = "lora_A" in marks
    module.__class__ = _adapted(type(module))
    layer = cast(LoRAModule, module)
    if isinstance(layer, ShardedModule):
        layer.shard_dims = {**layer.shard_dims, **{name: m.dim for name, m in marks.items()}}
        # of what is not cut each rank sees the part of what is
        layer.__dict__["partial_gradients"] = tuple(set(_NAMES) - set(marks))
    layer.lora_options, layer.lora_is_merged = options, False
    layer.lora_dropout = ParallelDropout(options.dropout, is_sharded=is_row, group=group)
    layer.lora_dropout.train(layer.training)
    local_out, local_in = matrix_of(layer).shape
    layer.lora_A = nn.Parameter(layer.weight.new_empty(options.rank, local_in, dtype=dtype))
    layer.lora_B = nn.Parameter(layer.weight.new_empty(local_out, options.rank, dtype=dtype))
    layer._draw_lora(group, cast(int, layer.in_features))
