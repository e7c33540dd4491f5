"""What the sharded layers share: which parameter is cut where, and state dicts that slice or
refuse.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Self

from ..collectives import all_gather_tensor
from ..group import GroupLike, current_group
from ..partition import Partition


class ShardedModule(nn.Module):
    """A layer of which this rank holds a part.

    ``shard_dims``: the dimension that is cut, for each parameter that is; the others are
    replicated. ``state_dict()`` is local and carries rank, size and partition in its metadata;
    loading takes dense tensors, of which it keeps its slice, or this rank's own shards.
    """

    shard_dims: dict[str, int]

    def __init__(self, group: GroupLike | None, size: int, partition: Partition | None) -> None:
        super().__init__()
        self.group = current_group(group)
        self.partition = partition or Partition.even(size, self.group.size)
        self.partition.check(size, self.group.size)

    def full_parameter(self, name: str) -> Tensor:
        """The dense parameter ``name``, on every rank. Collective; no gradient."""
        local = self.get_parameter(name).detach()
        if name not in self.shard_dims or self.group.size == 1:
            return local.clone()
        return all_gather_tensor(local, self.shard_dims[name], self.group, partition=self.partition)

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
        dim = self.shard_dims.get(name)
        if dim is None:
            return full
        return full.narrow(
            dim, self.partition.offset(self.group.rank), self.partition[self.group.rank]
        )

    def _shard_record(self) -> dict[str, Any]:
        return {
            "rank": self.group.rank,
            "size": self.group.size,
            "partition": list(self.partition.sizes),
        }

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
        if record is not None and record != own:
            error_msgs.append(
                f"{prefix[:-1]}: these are the shards of {record}, this rank is {own}; load full "
                "tensors or its own shards"
            )
            return
        replaced = {}
        for name, dim in self.shard_dims.items():
            key = prefix + name
            value = state_dict.get(key)
            local = getattr(self, name, None)
            if record is not None or not isinstance(value, Tensor) or local is None:
                continue
            full = list(local.shape)
            full[dim] = self.partition.size
            if list(value.shape) == full:
                replaced[key] = value
                state_dict[key] = self._local(name, value)
            elif value.shape == local.shape:
                error_msgs.append(
                    f"{key}: shape {list(value.shape)} is a shard's, and the state dict does not "
                    "say which rank's; "
                    f"pass the dense tensor {full} or keep state_dict()'s metadata"
                )
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        state_dict.update(replaced)  # the caller's dict may be loaded elsewhere too
