"""Guards of a model in training: what must be equal on all ranks is compared now and then.

Ranks that get different data, or that change replicated gradients each in its own way, train
something that is not the dense model, without any error of their own.
"""

from __future__ import annotations

import functools
import inspect
import math
import weakref
import zlib
from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook
from typing_extensions import Self

from .group import Group, GroupLike, current_group
from .nn import RowParallelLinear, VocabParallelEmbedding, mark_of
from .state import state_of, unwrap

Named = list[tuple[str, Tensor]]
_CHUNK = 1 << 20  # words of 8 bytes hashed at once: bounds what that takes in memory


def guard(
    model: nn.Module,
    group: GroupLike | None = None,
    every: int = 100,
    first: int = 3,
    *,
    inputs: bool | None = None,
) -> Guard:
    """Compare over the ranks what is equal where ``model`` is trained rightly. In place of the
    guard that it has: `parallelize` gives it one.

    Compared are, of the ``first`` and then every ``every``-th forward pass in training mode with
    gradients, the tensors among the model's arguments, bit by bit; of as many steps of each
    ``torch.optim`` optimizer, before it updates anything, the gradients of parameters that every
    rank holds whole, bit by bit, then but for rounding. Each time this is one all-gather of two
    numbers, and the device is waited for. Nothing is compared in eval mode, without gradients, in
    compiled code, or while CUDA captures a graph.

    ``group``: default the parallelized model's, else that of its first sharded parameter.
    ``inputs``: False if each rank gets its own part; None: as the model's first layer says.
    The result's ``remove()`` ends it, and so does leaving it as a context manager.
    Raises: from then on ValueError, the same on all ranks, with the name of the argument or
    parameter and the ranks that hold one value and another.
    """
    if every < 1 or first < 0:
        raise ValueError(f"guard: every={every}, first={first}; expected at least 1 and 0")
    model = unwrap(model)
    for known in _guards_of(model):
        known.remove()
    if inputs is None:
        inputs = not _takes_parts(model)
    made = Guard(model, _group_of(model, group), every, first, inputs)
    if made.group.size > 1:
        model.register_forward_pre_hook(made.before_forward, with_kwargs=True)
        made.watch_optimizers()
    return made


class Guard:
    """What `guard` returns: ``remove()`` ends it."""

    def __init__(
        self, model: nn.Module, group: Group, every: int, first: int, inputs: bool
    ) -> None:
        self.group, self.every, self.first, self.inputs = group, every, first, inputs
        self._model = weakref.ref(model)  # the model's hooks hold the guard
        self._forwards = 0
        self._steps: weakref.WeakKeyDictionary[Optimizer, int] = weakref.WeakKeyDictionary()

    def remove(self) -> None:
        """Compare nothing any more. Idempotent."""
        model = self._model()
        hooks = {} if model is None else model._forward_pre_hooks
        for key in [key for key, hook in hooks.items() if _owner(hook) is self]:
            del hooks[key]
            if model is not None:
                model._forward_pre_hooks_with_kwargs.pop(key, None)
        _watching().pop(weakref.ref(self), None)

    def watch_optimizers(self) -> None:
        """Be told of steps, from now on."""
        _watching()[weakref.ref(self, _forget)] = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.remove()

    def __deepcopy__(self, memo: dict[int, Any]) -> Guard:
        model = memo.get(id(self._model()))
        if not isinstance(model, nn.Module):
            return self
        twin = Guard(model, self.group, self.every, self.first, self.inputs)
        twin.watch_optimizers()  # the copied hooks hold it
        return twin

    def __reduce__(self) -> NoReturn:
        self.group.__reduce__()

    def before_forward(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """The model's forward pre-hook: compare its arguments."""
        if torch.compiler.is_compiling() or not (model.training and torch.is_grad_enabled()):
            return
        count, self._forwards = self._forwards, self._forwards + 1
        if not (self.inputs and self._is_due(count)):
            return
        found = differing(self.group, [*_arguments(model, args, kwargs)])
        if found:
            raise ValueError(
                f"{type(model).__name__} was called in training with arguments that are not equal "
                f"on all ranks: {_told(found)}. Every rank needs the same batch: give the "
                "DataLoader's sampler the same seed on all ranks (and a DistributedSampler the "
                "data-parallel rank, not the tensor-parallel one), or broadcast the batch"
            )

    def before_step(self, optimizer: Optimizer) -> None:
        """Before an optimizer's step: compare the gradients that it is about to use."""
        count = self._steps.get(optimizer, 0)
        self._steps[optimizer] = count + 1
        model = self._model()
        if model is None or not self._is_due(count):
            return
        held = {id(p) for some in optimizer.param_groups for p in some["params"]}
        whole = [(name, p) for name, p in _whole_parameters(model) if id(p) in held]
        if not whole:  # another model's optimizer, or one of shards only
            return
        grads = [(name, _gradient(p)) for name, p in whole]
        found = differing(self.group, grads)
        if found:
            found = beyond_rounding(self.group, dict(grads), found)
        if found:
            raise ValueError(
                f"{type(optimizer).__name__}.step() got gradients that are not equal on all ranks, "
                f"of parameters that every rank holds whole: {_told(found)}. Nothing was updated. "
                "Clip with tp.clip_grad_norm_ (torch.nn.utils.clip_grad_norm_ takes each rank's "
                "own norm), scale with tp.GradScaler, compute the same loss on every rank; if "
                "ranks are meant to differ there, call tp.guard(model).remove()"
            )

    def _is_due(self, count: int) -> bool:
        if count >= self.first and count % self.every:
            return False
        return self.group.device.type != "cuda" or not torch.cuda.is_current_stream_capturing()


@functools.cache
def _watching() -> dict[weakref.ref[Guard], None]:
    """Guards of this process, in the order in which they came, which ranks share. The first one
    makes torch tell of all optimizers' steps.
    """
    watching: dict[weakref.ref[Guard], None] = {}

    def before_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if torch.compiler.is_compiling():
            return
        for reference in list(watching):  # thread ranks come and go meanwhile
            known = reference()
            if known is not None:
                known.before_step(optimizer)

    register_optimizer_step_pre_hook(before_step)
    return watching


def _forget(gone: weakref.ref[Guard]) -> None:
    _watching().pop(gone, None)


def fingerprint(t: Tensor) -> Tensor:
    """64 bits of ``t``'s bytes and their order, int64, computed on its device. Equal bytes give
    equal numbers.

    Source: Steele et al., Fast Splittable Pseudorandom Number Generators, OOPSLA 2014 (the mixing
    function).
    """
    raw = t.detach().contiguous().view(-1)
    if raw.storage_offset():  # words must begin where the storage allows it
        raw = raw.clone()
    octets = raw.view(torch.uint8)
    missing = -octets.numel() % 8
    words = (F.pad(octets, (0, missing)) if missing else octets).view(torch.int64)
    total = torch.zeros((), dtype=torch.int64, device=t.device)
    for start in range(0, words.numel(), _CHUNK):
        some = words[start : start + _CHUNK]
        place = torch.arange(start + 1, start + 1 + some.numel(), device=t.device)
        x = some + place * -0x61C8864680B583EB
        for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)):
            x = (x ^ _shifted(x, shift)) * factor
        total += (x ^ _shifted(x, 31)).sum()
    return total


def _shifted(x: Tensor, bits: int) -> Tensor:
    """Right, without copies of the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def differing(group: Group, tensors: Named) -> dict[str, list[list[int]]]:
    """Of tensors that should be equal on all ranks, those that are not: the ranks that hold each
    value. Collective: one all-gather of two numbers, and one more if any differ.
    """
    kinds = ", ".join(f"{name} {t.dtype} {[*t.shape]}" for name, t in tensors)
    prints = [fingerprint(t).to(group.device) for _, t in tensors]
    own = torch.stack([*prints, torch.zeros_like(group.order[0])])
    kind = torch.full_like(own[0], zlib.crc32(kinds.encode()))
    seen = group.all_gather(torch.stack([kind, fingerprint(own)])).view(-1, 2).tolist()
    if len({kind for kind, _ in seen}) > 1:
        return {f"names, dtypes or shapes (here {kinds})": _alike([kind for kind, _ in seen])}
    if len({value for _, value in seen}) == 1:
        return {}
    of_rank = group.all_gather(own).view(group.size, -1).tolist()
    of_tensor = zip(*of_rank, strict=True)
    by_name = zip((name for name, _ in tensors), of_tensor, strict=False)
    return {name: _alike(values) for name, values in by_name if len(set(values)) > 1}


def beyond_rounding(
    group: Group, tensors: dict[str, Tensor], found: dict[str, list[list[int]]]
) -> dict[str, list[list[int]]]:
    """``found`` without what may be rounding of kernels that add in no fixed order: what departs
    from rank 0's by less than half of the digits. A factor in common, as clipping puts on them, is
    seen 64 times finer, since rounding averages out in it. Collective, the same on all ranks.
    """
    sums = []
    for name in found:
        mine = tensors[name].to(group.device)
        theirs = group.broadcast_(mine.clone(), 0).double()
        gap = mine.double() - theirs
        sums.append(torch.stack([theirs.square().sum(), gap.square().sum(), (gap * theirs).sum()]))
    shape = (group.size, len(sums), 3)
    of_rank = group.all_gather(torch.stack(sums)).view(shape).tolist()
    digits = {name: math.sqrt(torch.finfo(tensors[name].dtype).eps) for name in found}
    departs = {
        name
        for i, name in enumerate(found)
        if any(gap > digits[name] ** 2 * whole for whole, gap, _ in (rank[i] for rank in of_rank))
    }
    for rank in of_rank:
        whole, _, along = (sum(column) for column in zip(*rank, strict=True))
        if abs(along) > max(digits.values()) / 64 * whole:
            departs.update(found)
    return {name: ranks for name, ranks in found.items() if name in departs}


def _alike(values: list[int] | tuple[int, ...]) -> list[list[int]]:
    by_value: dict[int, list[int]] = {}
    for rank, value in enumerate(values):
        by_value.setdefault(value, []).append(rank)
    return [*by_value.values()]


def _told(found: dict[str, list[list[int]]]) -> str:
    some = [
        f"{name} is one thing on ranks {' and another on ranks '.join(map(str, ranks))}"
        for name, ranks in [*found.items()][:3]
    ]
    return "; ".join(some) + (f"; and {len(found) - 3} more" if len(found) > 3 else "")


def _arguments(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Iterator[tuple[str, Tensor]]:
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    known = inspect.signature(model.forward).parameters.values()
    names = [p.name for p in known if p.kind in positional]
    names += [f"argument {i}" for i in range(len(names), len(args))]
    for name, value in [*zip(names, args, strict=False), *kwargs.items()]:
        yield from _tensors(name, value)


def _tensors(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        # those of other classes (fake ones, of a tracer) have no bytes
        if type(value) in (Tensor, nn.Parameter) and not value.is_meta:
            yield name, value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _tensors(f"{name}[{key!r}]", inner)
    elif isinstance(value, (list, tuple)):
        for i, inner in enumerate(value):
            yield from _tensors(f"{name}[{i}]", inner)


def _whole_parameters(model: nn.Module) -> Named:
    state = state_of(model)
    cut = set() if state is None else {n for n in state.plan.shapes if state.plan.shard(n)}
    return [(n, p) for n, p in model.named_parameters() if mark_of(p) is None and n not in cut]


def _gradient(parameter: Tensor) -> Tensor:
    if parameter.grad is None:
        return torch.zeros_like(parameter)
    return parameter.grad.to_dense() if parameter.grad.is_sparse else parameter.grad


def _group_of(model: nn.Module, group: GroupLike | None) -> Group:
    state = state_of(model)
    if group is None and state is not None:
        return state.group
    marks = (mark_of(p) for p in model.parameters())
    mark = None if group is not None else next((m for m in marks if m is not None), None)
    return current_group(group) if mark is None else mark.group


def _takes_parts(model: nn.Module) -> bool:
    """Whether the ranks' inputs are parts: of the tokens, or of the features."""
    while isinstance(model, nn.Sequential) and len(model):
        model = model[0]
    if isinstance(model, RowParallelLinear):
        return model.input_is_parallel
    is_on_shards = getattr(model, "sequence_parallel", False) is True
    return is_on_shards and not isinstance(model, VocabParallelEmbedding)


def _guards_of(model: nn.Module) -> list[Guard]:
    owners = (_owner(hook) for hook in model._forward_pre_hooks.values())
    return [owner for owner in owners if isinstance(owner, Guard)]


def _owner(hook: object) -> object:
    return getattr(hook, "__self__", None)
