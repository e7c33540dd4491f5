"""What the sharded layers share: which parameter is cut where, state dicts that slice or refuse,
and marks on the parameters by which optimizers' helpers know a shard.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Self

from ..collectives import all_gather_tensor
from ..group import Group, GroupLike, current_group
from ..partition import Partition, ShardLayout

_MARK = "tensor_parallel"


@dataclass(frozen=True)
class ShardMark:
    """What a sharded parameter knows of itself, as ``parameter.tensor_parallel``."""

    group: Group
    dim: int
    layout: ShardLayout

    def __deepcopy__(self, memo: dict[int, Any]) -> ShardMark:
        return self

    def owned(self, local: Tensor) -> list[Tensor]:
        """Views of this rank's shard (or its gradient) that together, over all ranks, are every
        element once.
        """
        return [
            local.narrow(self.dim, start, stop - start)
            for start, stop in self.layout.owned(self.group.rank)
        ]

    def full_shape(self, local: Tensor) -> tuple[int, ...]:
        """The dense tensor's shape."""
        return (*local.shape[: self.dim], self.layout.size, *local.shape[self.dim + 1 :])

    def local(self, full: Tensor) -> Tensor:
        """This rank's part of a dense tensor."""
        return take(full, self.dim, self.layout.ranges[self.group.rank])

    def full(self, local: Tensor) -> Tensor:
        """The dense tensor from every rank's part. Collective; no gradient."""
        if self.group.size == 1:
            gathered = local.detach().clone()
        else:
            gathered = self.group.all_gather(local.detach(), self.dim, self.layout.local_sizes)
        return take(gathered, self.dim, self.layout.dense_order)


def take(full: Tensor, dim: int, ranges: tuple[tuple[int, int], ...]) -> Tensor:
    """Ranges of one dimension, side by side; itself where they are all of it, a view where it is
    one range.
    """
    if ranges == ((0, full.size(dim)),):
        return full
    pieces = [full.narrow(dim, start, stop - start) for start, stop in ranges]
    return pieces[0] if len(pieces) == 1 else torch.cat([full.narrow(dim, 0, 0), *pieces], dim)


def check_gather_grad(given: str) -> None:
    """Raise ValueError for what is no kind of gradient of a gathered tensor."""
    if given not in ("replicated", "partial"):
        raise ValueError(f'gather_grad {given!r}: expected "replicated" or "partial"')


def put_mark(tensor: Tensor, mark: ShardMark | None) -> None:
    """Mark a parameter, or a tensor of its shape, as a shard; None leaves it unmarked."""
    if mark is not None:
        setattr(tensor, _MARK, mark)


def full_of(value: Tensor) -> Tensor:
    """A parameter put together from all ranks; as it is where it is not sharded. Collective."""
    mark = mark_of(value)
    return value.detach() if mark is None else mark.full(value)


def mark_of(parameter: Tensor) -> ShardMark | None:
    """The mark of a sharded parameter; None for one that every rank holds whole."""
    mark = getattr(parameter, _MARK, None)
    return mark if isinstance(mark, ShardMark) else None


class ShardedModule(nn.Module):
    """A layer of which this rank holds a part.

    ``shard_dims``: the dimension that is cut, for each parameter that is; the others are
    replicated. ``state_dict()`` is local and carries rank, size and partition in its metadata;
    loading takes dense tensors, of which it keeps its slice, or this rank's own shards.
    """

    shard_dims: dict[str, int]

    def __init__(
        self, group: GroupLike | None, size: int, partition: Partition | ShardLayout | None
    ) -> None:
        super().__init__()
        self.group = current_group(group)
        self.shard_dims = {}
        cut = partition or Partition.even(size, self.group.size)
        cut.check(size, self.group.size)
        self.layout = ShardLayout.of(cut)
        self.partition = self.layout.local_sizes
        self._dense_order = self.layout.dense_order

    def mark(self, name: str) -> ShardMark | None:
        """How the parameter ``name`` is cut; None if it is replicated."""
        dim = self.shard_dims.get(name)
        return None if dim is None else ShardMark(self.group, dim, self._layout_of(name))

    def _layout_of(self, name: str) -> ShardLayout:
        """How the dimension ``shard_dims[name]`` is cut; this module's layout unless overridden."""
        return self.layout

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As ``nn.Module``'s; a sharded parameter is marked."""
        super().register_parameter(name, param)
        self._put_mark(name)

    def _put_mark(self, name: str) -> None:
        parameter = self._parameters.get(name)
        if parameter is not None:
            put_mark(parameter, self.mark(name))

    # both make parameters anew without registering them
    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name in self.shard_dims:
            self._put_mark(name)
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        for name in self.shard_dims:
            self._put_mark(name)

    def full_parameter(self, name: str) -> Tensor:
        """The dense parameter ``name``, on every rank. Collective; no gradient."""
        local = self.get_parameter(name)
        mark = self.mark(name)
        return local.detach().clone() if mark is None else mark.full(local)

    def full_weight(self) -> Tensor:
        """The dense weight, on every rank. Collective; no gradient."""
        return self.full_parameter("weight")

    def filled_from(self, dense: nn.Module) -> Self:
        """This layer, made on meta, with its part of a dense one's parameters, mode and device."""
        device = next(dense.parameters()).device
        self.to_empty(device=device).train(dense.training)
        with torch.no_grad():
            for name, parameter in self.named_parameters(recurse=False):
                source = dense.get_parameter(name)
                if not parameter.is_meta:
                    parameter.copy_(self._local(name, source))
                parameter.requires_grad_(source.requires_grad)
        return self

    def _local(self, name: str, full: Tensor) -> Tensor:
        mark = self.mark(name)
        return full if mark is None else mark.local(full)

    def _gathered(self, y: Tensor, grad: str) -> Tensor:
        """The last dimension of all ranks' ``y``, in the whole's order."""
        if self.group.size > 1:
            y = all_gather_tensor(y, -1, self.group, grad, partition=self.partition)
        return take(y, -1, self._dense_order)

    def _shard_record(self) -> dict[str, Any]:
        record: dict[str, Any] = {
            "rank": self.group.rank,
            "size": self.group.size,
            "partition": list(self.partition.sizes),
        }
        if not self.layout.is_consecutive:
            record["ranges"] = [list(place) for place in self.layout.ranges[self.group.rank]]
        return record

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        metadata = getattr(destination, "_metadata", None)
        if metadata is not None:
            metadata.setdefault(prefix[:-1], {})["tp_native"] = self._shard_record()

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        record = local_metadata.get("tp_native")
        own = self._shard_record()
        if record is not None and record.get("size") == 1:
            record = None  # of a world of one: whole tensors
        if record is not None and record != own:
            error_msgs.append(
                f"{prefix[:-1]}: these are the shards of {record}, this rank is {own}; load full "
                "tensors or its own shards"
            )
            return
        replaced = {}
        for name in self.shard_dims:
            key = prefix + name
            value = state_dict.get(key)
            local, mark = getattr(self, name, None), self.mark(name)
            if record is not None or not isinstance(value, Tensor) or local is None or mark is None:
                continue
            full = mark.full_shape(local)
            if value.shape == full:
                replaced[key] = value
                piece = self._local(name, value)
                if local_metadata.get("assign_to_params_buffers", False):
                    # taken as it is: a view would keep the whole tensor's memory
                    piece = piece.clone(memory_format=torch.contiguous_format)
                state_dict[key] = piece
            elif value.shape == local.shape:
                error_msgs.append(
                    f"{key}: shape {list(value.shape)} is a shard's, and the state dict does not "
                    "say which rank's; "
                    f"pass the dense tensor {list(full)} or keep state_dict()'s metadata"
                )
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        state_dict.update(replaced)  # the caller's dict may be loaded elsewhere too
