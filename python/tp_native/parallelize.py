"""Turn a dense model into this rank's share of it: the same object, its modules swapped."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from . import huggingface
from .agreement import agreed, check_same
from .collectives import all_reduce_sum
from .errors import PlanError
from .group import Group, GroupLike, current_group
from .guards import guard
from .masks import draw_own_masks
from .nn import (
    ColumnParallelConv1D,
    ColumnParallelEmbedding,
    ColumnParallelLinear,
    ParallelMultiheadAttention,
    RowParallelConv1D,
    RowParallelLinear,
    ShardedModule,
    VocabParallelEmbedding,
    is_conv1d,
    mark_of,
    summed,
    without_fused_layers,
)
from .nn.lora import has_lora
from .nn.sharded import take
from .partition import Partition
from .plan import plan as make_plan
from .plan.shards import COLUMN_GATHER, ROW, ROW_SPLIT, VOCABULARY, ShardEntry, ShardPlan
from .state import (
    ParallelState,
    attach_state,
    full_state_dict,
    iter_full_state,
    state_of,
    unwrap,
)
from .translated import translate_modules
from .verify import Recording, compare, record, verify
from .whole_reads import let_read_whole

__all__ = [
    "DistributedModelWrapper",
    "full_state_dict",
    "iter_full_state",
    "parallelize",
    "unwrap",
    "verify",
]

# Shared with the dense module, so that a handle taken before the swap still removes its hook.
_HOOKS = (
    "_backward_hooks",
    "_backward_pre_hooks",
    "_forward_hooks",
    "_forward_hooks_always_called",
    "_forward_hooks_with_kwargs",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_load_state_dict_post_hooks",
    "_load_state_dict_pre_hooks",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
)


def parallelize(
    model: nn.Module,
    group: GroupLike | None = None,
    *,
    plan: ShardPlan | None = None,
    verify: Sequence[Any] | Mapping[str, Any] | Tensor | None = None,
) -> nn.Module:
    """Cut ``model`` in place for ``group``, and return it.

    Its Linears and Embeddings that ``plan`` names (default: `tp_native.plan` of the model) are
    swapped for parallel ones holding this rank's slices; forward, class, keys, hooks, dtype,
    device and ``requires_grad`` stay, a tied weight stays one Parameter, meta stays meta. In a
    world of one nothing is swapped. Collective: all ranks pass the same dense model. In training
    it is guarded, see `guard`.

    ``verify`` (inputs for one forward pass): the plan is made with them, and the model runs on them
    before and after; a PlanError undoes the swap if an output departs. Keeps both models in memory
    meanwhile.
    Raises: PlanError if the model can't be cut, is parallel already, or doesn't fit ``plan``;
    ValueError if the ranks hold different models.
    """
    group = current_group(group)
    dense: Recording | None = None
    inputs = (verify,) if isinstance(verify, (Tensor, Mapping)) else verify
    with agreed(group):
        if state_of(model) is not None or _has_parallel_modules(model):
            raise PlanError(
                f"{type(model).__name__} is parallelized already; start from a dense model"
            )
        if has_lora(model) and group.size > 1:
            raise PlanError(
                f"{type(model).__name__} has LoRA adapters: parallelize first, then add_lora, or "
                "load_lora where they are saved"
            )
        if plan is None and group.size > 1:
            plan = make_plan(model, group.size, inputs=verify)
        if plan is not None:
            _check_fit(model, plan, group.size)
    if plan is None or group.size == 1:
        return model
    check_same(group, _fingerprint(model, plan), "weights or plans of the dense models")
    with agreed(group):
        if inputs is not None:
            dense = record(model, *inputs)
    undo: list[Callable[[], None]] = []
    try:
        with agreed(group):
            _apply(model, plan, group, undo)
        if dense is not None and inputs is not None:
            compare(model, dense, inputs, plan, group)
    except BaseException:
        for step in reversed(undo):
            step()
        raise
    attach_state(model, ParallelState(group, plan))
    huggingface.attach(model, group)
    guard(model)
    return model


class DistributedModelWrapper(nn.Module):
    """A parallelized model behind one module: calls, attributes and keys go through to it.

    ``world_size`` and ``rank`` are only checked against the group. ``state_dict`` has the
    model's own keys, without a prefix; the model itself is ``.wrapped_model``. A model that is
    parallelized for this group already is taken as it is.
    Raises: ValueError if ``world_size`` or ``rank`` is not the group's; what `parallelize` raises.
    """

    def __init__(
        self,
        model: nn.Module,
        group: GroupLike | None = None,
        *,
        world_size: int | None = None,
        rank: int | None = None,
        plan: ShardPlan | None = None,
        verify: Sequence[Any] | Mapping[str, Any] | Tensor | None = None,
    ) -> None:
        super().__init__()
        group = current_group(group)
        for what, given, actual in (
            ("world_size", world_size, group.size),
            ("rank", rank, group.rank),
        ):
            if given is not None and given != actual:
                raise ValueError(
                    f"DistributedModelWrapper got {what} {given}, but the group has {what} "
                    f"{actual}; leave it out, or start {'that many' if what != 'rank' else 'the'} "
                    "ranks with torchrun and call init_tensor_parallel first"
                )
        state = state_of(model)
        if state is None or plan is not None or verify is not None or state.group is not group:
            parallelize(model, group, plan=plan, verify=verify)
        # Not registered as a submodule: sharing its tables keeps every key free of a prefix.
        self.__dict__["wrapped_model"] = model
        for table in ("_modules", "_parameters", "_buffers"):
            self.__dict__[table] = model.__dict__[table]
        self.__dict__["training"] = model.training

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own forward."""
        return self.wrapped_model(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name == "wrapped_model":
            raise AttributeError(name)
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.wrapped_model, name)

    def train(self, mode: bool = True) -> DistributedModelWrapper:
        """Set the model's training flag and the wrapper's."""
        self.wrapped_model.train(mode)
        self.training = mode
        return self

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """This rank's part of the model's ``state_dict``, under the model's keys."""
        return self.wrapped_model.state_dict(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Load this rank's state, or a whole dense one, which is sliced."""
        return self.wrapped_model.load_state_dict(*args, **kwargs)


def _has_parallel_modules(model: nn.Module) -> bool:
    return any(isinstance(module, ShardedModule) for module in model.modules())


def _check_fit(model: nn.Module, plan: ShardPlan, size: int) -> None:
    if plan.world_size != size:
        raise PlanError(
            f"the plan is for {plan.world_size} ranks but the group has {size}; "
            f"make it with tp.plan(model, {size})"
        )
    params = model.named_parameters(remove_duplicate=False)
    shapes = {name: tuple(param.shape) for name, param in params}
    if shapes != dict(plan.shapes):
        odd = sorted(shapes.items() ^ plan.shapes.items())[:4]
        raise PlanError(f"the plan was made for another model; they differ in {odd}")


def _fingerprint(model: nn.Module, plan: ShardPlan) -> int:
    """63 bits of a few values of every parameter and of the plan."""
    said = (  # all but the reasons, which are for readers
        {name: replace(entry, note="") for name, entry in plan.entries.items()},
        *(sorted(t) for t in (plan.partial_gradients, plan.summed, plan.translated)),
        *(sorted(t.items()) for t in (plan.attributes, plan.random, plan.followers)),
        sorted(plan.read_whole),
    )
    digest = hashlib.sha256(repr(said).encode())
    for name, param in model.named_parameters():
        digest.update(f"{name}{param.dtype}{param.device.type}".encode())
        if param.device.type != "meta":
            head = param.detach().flatten()[:8].to("cpu").double()
            digest.update(repr(head.tolist()).encode())
    return int.from_bytes(digest.digest()[:8], "little") >> 1


def _apply(model: nn.Module, plan: ShardPlan, group: Group, undo: list[Callable[[], None]]) -> None:
    """Cut the model as planned; ``undo`` gets what undoes it, in order."""
    held: dict[str, nn.Parameter] = {}
    twins: dict[int, nn.Module] = {}
    for name, entry in plan.entries.items():
        old = model.get_submodule(name)
        twins[id(old)] = _parallel_module(name, old, entry, plan, group, held)
    for parent in list(model.modules()):
        for child, held_module in list(parent._modules.items()):
            if id(held_module) in twins:
                parent._modules[child] = twins[id(held_module)]
                undo.append(partial(parent._modules.__setitem__, child, held_module))
    for name, values in plan.attributes.items():
        module = model.get_submodule(name)
        for attribute, per_rank in values.items():
            undo.append(partial(setattr, module, attribute, getattr(module, attribute)))
            setattr(module, attribute, per_rank[group.rank])
    for name, locals_ in _by_module(plan.partial_gradients).items():
        module = model.get_submodule(name)
        undo.append(partial(setattr, module, "__class__", type(module)))
        _sum_gradients(module, locals_, group)
    for name in plan.read_whole:
        undo.append(let_read_whole(model.get_submodule(name)))
    undo += translate_modules(model, plan, group)
    for name, is_cut in plan.random.items():
        undo.append(draw_own_masks(model.get_submodule(name), is_cut, group))
    undo += _switches_of_fused_layers(model)
    without_fused_layers(model)
    for follower, owner in plan.followers.items():
        name, _, local = follower.rpartition(".")
        module = model.get_submodule(name)
        undo.append(partial(module._parameters.__setitem__, local, module._parameters[local]))
        module._parameters[local] = model.get_parameter(owner)
        register: Any = module.register_load_state_dict_pre_hook
        handle = register(partial(_take_share, local))
        undo.append(handle.remove)
    for name in plan.summed:
        handle = model.get_submodule(name).register_forward_hook(partial(_sum_output, group))
        undo.append(handle.remove)


def _parallel_module(
    name: str,
    old: nn.Module,
    entry: ShardEntry,
    plan: ShardPlan,
    group: Group,
    made: dict[str, nn.Parameter],
) -> nn.Module:
    """The parallel twin of ``old`` with its slices; ``made`` keeps tied parameters one."""
    new = _empty_twin(old, entry, group)
    for path, dense in old.named_parameters():
        full_name = f"{name}.{path}" if name else path
        first = plan.aliases.get(full_name, full_name)
        cut = entry.shards.get(path)
        owner = new.get_submodule(path.rpartition(".")[0])
        local = path.rpartition(".")[2]
        if first not in made:
            if cut is None:
                made[first] = dense
            else:
                share = take(dense.detach(), cut.dim, cut.layout().ranges[group.rank])
                # clone(), not contiguous(): a view would keep the dense storage alive.
                share = share.clone(memory_format=torch.contiguous_format)
                made[first] = nn.Parameter(share, requires_grad=dense.requires_grad)
                made[first].__dict__.update(dense.__dict__)
                made[first].__dict__.update(getattr(owner, local).__dict__)
        owner.register_parameter(local, made[first])
    new.train(old.training)
    for table in _HOOKS:
        if table in old.__dict__:
            hooks = old.__dict__[table]
            hooks.update(new.__dict__.get(table, {}))
            new.__dict__[table] = hooks
    return new


def _empty_twin(old: nn.Module, entry: ShardEntry, group: Group) -> nn.Module:
    """The parallel module for ``old``, on meta."""
    if isinstance(old, nn.MultiheadAttention):
        assert isinstance(entry.partition, Partition)
        return ParallelMultiheadAttention.from_dense(old, group=group, partition=entry.partition)
    place: dict[str, Any] = {
        "group": group,
        "partition": entry.partition,
        "device": "meta",
        "dtype": old.get_parameter("weight").dtype,
    }
    if isinstance(old, nn.Embedding):
        sizes = (old.num_embeddings, old.embedding_dim, old.padding_idx)
        if entry.style == VOCABULARY:
            return _in_class_of(old, VocabParallelEmbedding(*sizes, **place))
        return ColumnParallelEmbedding(*sizes, gather_output=entry.features > 0, **place)
    row: type[RowParallelLinear] = RowParallelLinear
    column: type[ColumnParallelLinear] = ColumnParallelLinear
    if is_conv1d(old):
        row, column = RowParallelConv1D, ColumnParallelConv1D
    widths = (*column._widths(old), old.bias is not None)
    if entry.style in (ROW, ROW_SPLIT):
        return row(*widths, input_is_parallel=entry.style == ROW, **place)
    gather = entry.style == COLUMN_GATHER
    return column(*widths, gather_output=gather, gather_grad=entry.gather_grad, **place)


def _in_class_of(old: nn.Embedding, new: VocabParallelEmbedding) -> nn.Module:
    """``new`` with the forward of ``old``'s own class, whose ``super().forward`` is then ours."""
    kind = type(old)
    if kind is nn.Embedding:
        return new
    base = type("_VocabParallelBase", (VocabParallelEmbedding, nn.Embedding), {})
    new.__class__ = type(kind.__name__, (kind, base), {"__module__": kind.__module__})
    for name, value in old.__dict__.items():
        new.__dict__.setdefault(name, value)
    new._buffers.update(old._buffers)
    new._non_persistent_buffers_set |= old._non_persistent_buffers_set
    return new


def _switches_of_fused_layers(model: nn.Module) -> list[Callable[[], None]]:
    return [
        partial(setattr, module, name, getattr(module, name))
        for module in model.modules()
        for name in ("activation_relu_or_gelu", "use_nested_tensor")
        if isinstance(module, (nn.TransformerEncoder, nn.TransformerEncoderLayer))
        and hasattr(module, name)
    ]


def _by_module(names: Sequence[str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name in names:
        module, _, local = name.rpartition(".")
        found.setdefault(module, []).append(local)
    return found


def _sum_gradients(module: nn.Module, names: Sequence[str], group: Group) -> None:
    """Make parameters of a whole module sum their gradients over the ranks.

    The module's class becomes a subclass of its own, of the same name, whose parameter
    attributes pass through `summed`; stored parameters and keys stay as they are.
    """

    def reader(name: str) -> Callable[[Any], Tensor]:
        return lambda self: summed(group, self._parameters[name])[0]

    kind = type(module)
    body: dict[str, Any] = {name: property(reader(name)) for name in names}
    body |= {"__module__": kind.__module__, "group": group, "partial_gradients": tuple(names)}
    module.__class__ = type(kind.__name__, (kind,), body)


def _take_share(
    local: str, module: nn.Module, state_dict: dict[str, Any], prefix: str, *rest: Any
) -> None:
    """A hook on loading: this rank's part of a whole parameter that follows a cut one."""
    key, parameter = prefix + local, module._parameters[local]
    value = state_dict.get(key)
    mark = mark_of(parameter) if parameter is not None else None
    if not isinstance(value, Tensor) or parameter is None or mark is None:
        return
    if value.shape != parameter.shape:
        state_dict[key] = mark.local(value)


def _sum_output(group: Group, module: nn.Module, args: Any, output: Any) -> Any:
    """A forward hook: the sum of the ranks' outputs."""
    return all_reduce_sum(output, group)
