"""Load a Hugging Face folder: every rank reads its own slices, every key is accounted for."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..agreement import agreed
from ..errors import CheckpointError
from ..group import GroupLike, current_group
from ..nn import ShardMark, mark_of
from ..nn.lora import has_lora
from ..parallelize import parallelize
from ..plan import ShardPlan
from ..state import unwrap
from .layouts import Conversion, loaded, shapes_of
from .optimizer import load_optimizer
from .reader import CheckpointFolder, raise_if_any, read_shard
from .skeleton import (
    build_skeleton,
    load_generation_config,
    read_config,
    resolve_dtype,
)


@dataclass(frozen=True)
class _Job:
    """One tensor to fill: model name, name on file or what makes it, and this rank's cut of it."""

    name: str
    source: str | Conversion
    cut: ShardMark | None


def load_pretrained(
    path: str | os.PathLike[str],
    group: GroupLike | None = None,
    *,
    dtype: torch.dtype | str | None = None,
    plan: ShardPlan | None = None,
    device: torch.device | str | None = None,
    progress: bool = False,
) -> nn.Module:
    """Load a model from a local Hugging Face folder, cut for ``group``.

    It is of the transformers class that the folder's config names in ``architectures``, else the
    causal language model of its type, else the bare model. Collective. Each rank reads exactly its
    slices of the safetensors files and never holds the dense model. ``dtype=None`` keeps the
    folder's (the config's, else the file's); ``device`` defaults to the group's; ``progress`` shows
    a bar on rank 0. The result is in eval mode, with the folder's generation settings, and
    ``tp_load_stats`` (``bytes_read``, ``tensors``, ``seconds``). Code in the folder is never run
    and nothing is downloaded.

    Raises: CheckpointError, the same on every rank, if the folder, its config or its files are
    unusable or if any tensor is missing, unexpected or of the wrong shape or kind (all are
    listed, before a weight is read); PlanError if the model can't be cut for this group.
    """
    group = current_group(group)
    folder = Path(path)
    files: CheckpointFolder | None = None
    started = time.monotonic()
    try:
        with agreed(group):
            config = read_config(folder)
            files = CheckpointFolder(folder, check=group.check)
            chosen = resolve_dtype(config, files.tensors, dtype)
            config.name_or_path = str(folder)
            model = build_skeleton(config, chosen)
        parallelize(model, group, plan=plan)
        with agreed(group):
            jobs = _match(model, files)
        with agreed(group):
            target = torch.device(device) if device is not None else group.device
            count = _fill(model, files, jobs, target, chosen, progress and group.rank == 0)
            load_generation_config(model, folder)
            model.eval()
        _keep_stats(model, files.bytes_read, count, time.monotonic() - started)
    finally:
        if files is not None:
            files.close()
    return model


class DistributedCheckpointLoader:
    """Loads a Hugging Face folder into a model that exists already, parallelized or dense."""

    def __init__(self, path: str | os.PathLike[str], group: GroupLike | None = None) -> None:
        self.path = Path(path)
        self.group = current_group(group)

    def load(self, model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> nn.Module:
        """Fill ``model`` from the folder and return it. Collective.

        A parallelized model takes this rank's slices, a dense one whole tensors; parameters
        keep their dtype and device, those on meta move to the group's device. ``optimizer``: the
        state that `CheckpointSaver` saved of one over the same parameters, at any number of ranks.
        Raises: CheckpointError as `load_pretrained`, and for an optimizer over other parameters. If
        a file breaks while it is read, the model is left partly filled.
        """
        files: CheckpointFolder | None = None
        started = time.monotonic()
        inner = unwrap(model)
        try:
            with agreed(self.group):
                files = CheckpointFolder(self.path, check=self.group.check)
                jobs = _match(inner, files)
            with agreed(self.group):
                count = _fill(inner, files, jobs, self.group.device, None, False)
                if optimizer is not None:
                    load_optimizer(self.path, inner, optimizer)
            _keep_stats(inner, files.bytes_read, count, time.monotonic() - started)
        finally:
            if files is not None:
                files.close()
        return model


def _keep_stats(model: nn.Module, bytes_read: int, tensors: int, seconds: float) -> None:
    model.__dict__["tp_load_stats"] = {
        "bytes_read": bytes_read,
        "tensors": tensors,
        "seconds": seconds,
    }


def _match(model: nn.Module, files: CheckpointFolder) -> list[_Job]:
    """Pair every tensor of the model with one on file, or raise with all that do not fit."""
    if has_lora(model):
        raise CheckpointError(
            f"{type(model).__name__} has LoRA adapters: load the model's weights first, then "
            "load_lora"
        )
    expected = _expected(model)
    sources, clashes = _sources(model, files, expected)
    first_names: dict[int, str] = {}
    for name, value in expected.items():
        if name in sources:
            first_names.setdefault(id(value), name)
    missing, wrong, jobs = [], list(clashes), []
    for name, value in expected.items():
        source = sources.get(name)
        if source is None:
            if id(value) not in first_names and not _may_miss(model, name, value):
                missing.append(name)
            continue
        cut = mark_of(value)
        shape = tuple(value.shape) if cut is None else cut.full_shape(value)
        if source.shape != shape:
            wrong.append(f"{name}: shape {list(source.shape)} on file, expected {list(shape)}")
        elif source.dtype.is_floating_point != value.dtype.is_floating_point:
            wrong.append(f"{name}: dtype {source.dtype} on file, expected {value.dtype}")
        jobs.append(_Job(name, source.origin, cut))
    ignored = _ignored_patterns(model)
    unexpected = [
        name
        for name in sorted(set(files.tensors).difference(*(s.names for s in sources.values())))
        if not any(re.search(pattern, name) for pattern in ignored)
    ]
    raise_if_any(
        files.path, type(model).__name__, missing=missing, unexpected=unexpected, misfit=wrong
    )
    return jobs


def _expected(model: nn.Module) -> dict[str, Tensor]:
    state = model.state_dict(keep_vars=True)
    return {name: value for name, value in state.items() if isinstance(value, Tensor)}


@dataclass(frozen=True)
class _Source:
    """Where a tensor of the model comes from: its shape and dtype, and the names on file."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    origin: str | Conversion

    @property
    def names(self) -> list[str]:
        if isinstance(self.origin, str):
            return [self.origin]
        return [name for name, _ in self.origin.sources]


def _sources(
    model: nn.Module, files: CheckpointFolder, expected: Mapping[str, Tensor]
) -> tuple[dict[str, _Source], list[str]]:
    """Each tensor's source, after transformers' conversions of old checkpoints; what is wrong."""
    on_file = files.tensors
    names, conversions = loaded(model, on_file, expected)
    sources: dict[str, _Source] = {}
    wrong = []
    for source, name in sorted(names.items()):
        if name in sources:
            wrong.append(f"{name}: both {sources[name].origin} and {source} on file mean it")
        sources[name] = _Source(on_file[source].shape, on_file[source].dtype, source)

    def empty(source: str) -> Tensor:
        return torch.empty(on_file[source].shape, dtype=on_file[source].dtype, device="meta")

    for conversion in conversions:
        made = shapes_of(conversion, empty)
        if isinstance(made, CheckpointError):
            wrong.append(str(made))
            continue
        for name, value in made.items():
            if name in sources:
                wrong.append(f"{name}: {sources[name].names} and {conversion.sources} both mean it")
            if name in expected:
                sources[name] = _Source(tuple(value.shape), value.dtype, conversion)
    return sources, wrong


def _may_miss(model: nn.Module, name: str, value: Tensor) -> bool:
    """What was computed at build time may be absent if transformers says so."""
    patterns = getattr(model, "_keys_to_ignore_on_load_missing", None) or ()
    return value.device.type != "meta" and any(re.search(pattern, name) for pattern in patterns)


def _ignored_patterns(model: nn.Module) -> set[str]:
    patterns = set(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ())
    buffers = [name for name, _ in model.named_buffers()]
    # Buffers of old checkpoints that are computed today.
    if any(name.endswith("rotary_emb.inv_freq") for name in buffers):
        patterns.add(r"rotary_emb\.inv_freq")
    if any(name.endswith("position_ids") for name in buffers):
        patterns.add(r"(^|\.)position_ids$")
    return patterns


def _fill(
    model: nn.Module,
    files: CheckpointFolder,
    jobs: list[_Job],
    device: torch.device,
    dtype: torch.dtype | None,
    progress: bool,
) -> int:
    """Give every tensor its memory and its values; returns the number of tensors filled."""
    expected = _expected(model)
    filled: dict[int, Tensor] = {}
    made: dict[Conversion, dict[str, Tensor]] = {}
    for job in _with_bar(jobs, progress):
        old = expected[job.name]
        tied = filled.get(id(old))
        out = _room(model, job.name, old, device, dtype) if tied is None else torch.empty_like(tied)
        count = _read(files, job, out, made)
        if count != out.numel():
            raise CheckpointError(f"{job.name}: filled {count} of {out.numel()} elements")
        if tied is None:
            filled[id(old)] = out
        elif not torch.equal(out, tied):
            raise CheckpointError(
                f"{files.path}: {job.name} is tied to another tensor of the model "
                "but their values differ on file; set tie_word_embeddings to false in config.json"
            )
    _install(model, filled, device)
    return len(filled)


def _read(
    files: CheckpointFolder, job: _Job, out: Tensor, made: dict[Conversion, dict[str, Tensor]]
) -> int:
    """Fill ``out``; of converted tensors ``made`` keeps those that are still to be asked for."""
    if isinstance(job.source, str):
        return read_shard(files, job.source, out, job.cut)

    def whole(source: str) -> Tensor:
        info = files.tensors[source]
        value = torch.empty(info.shape, dtype=info.dtype)
        files.read_into(source, value)
        return value

    if job.source not in made:
        made[job.source] = job.source.run(whole)
    value = made[job.source].pop(job.name)
    if not made[job.source]:
        del made[job.source]
    out.copy_(value if job.cut is None else job.cut.local(value))
    return out.numel()


def _room(
    model: nn.Module, name: str, old: Tensor, device: torch.device, dtype: torch.dtype | None
) -> Tensor:
    """Memory to fill: the tensor's own, or a new one of NaN if it is on meta."""
    if old.device.type != "meta":
        own = old.detach()
        return own if own.is_contiguous() else torch.empty_like(own).contiguous()
    kind = _kept_dtype(model, name, dtype) or old.dtype
    value = float("nan") if kind.is_floating_point else 0
    return torch.full(old.shape, value, dtype=kind, device=device)


def _kept_dtype(model: nn.Module, name: str, dtype: torch.dtype | None) -> torch.dtype | None:
    """A wider dtype that the model's class insists on for this parameter."""
    plan = getattr(model, "_get_dtype_plan", None)
    if dtype is None or not callable(plan):
        return None
    for pattern, kind in plan(dtype).items():
        if re.search(pattern.replace("*", ".*"), name) and isinstance(kind, torch.dtype):
            return kind
    return None


def _install(model: nn.Module, filled: Mapping[int, Tensor], device: torch.device) -> None:
    """Put new memory in place of meta tensors; tied parameters stay one Parameter."""
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, param in module._parameters.items():
            if param is None or id(param) not in filled:
                continue
            values = filled[id(param)]
            if param.device.type != "meta":
                if values.data_ptr() != param.data_ptr():
                    param.data.copy_(values)
                continue
            if id(param) not in made:
                made[id(param)] = nn.Parameter(values, requires_grad=param.requires_grad)
                made[id(param)].__dict__.update(param.__dict__)
            module._parameters[name] = made[id(param)]
        for name, buffer in module._buffers.items():
            if buffer is None:
                continue
            values = filled.get(id(buffer), buffer)
            module._buffers[name] = values if buffer.device.type == "meta" else buffer
    if device.type != "cpu":
        _buffers_to(model, device)
    left = [name for name, tensor in _all_tensors(model) if tensor.device.type == "meta"]
    if left:
        raise CheckpointError(f"{type(model).__name__}: {left[:5]} were left without memory")


def _buffers_to(model: nn.Module, device: torch.device) -> None:
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.to(device)


def _all_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


def _with_bar(jobs: list[_Job], progress: bool) -> Any:
    if not progress:
        return jobs
    from tqdm import tqdm

    return tqdm(jobs, desc="loading", unit="tensor")
