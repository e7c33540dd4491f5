"""Write a model as a Hugging Face folder: gathered tensor by tensor, swapped in atomically.

The old folder stays whole until the new one is complete and on disk; then one rename decides.
"""

from __future__ import annotations

import contextlib
import copy
import ctypes
import errno
import fcntl
import glob
import json
import math
import os
import re
import secrets
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..agreement import agree, agreed
from ..errors import CheckpointError
from ..group import Group, GroupLike, current_group
from ..state import state_of, unwrap
from .items import Item, items_of, widest_first
from .optimizer import OPTIMIZER_SETTINGS, OPTIMIZER_TENSORS, optimizer_tensors
from .reader import DTYPES

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_COPY_BYTES = 64 << 20
_SLACK_BYTES = 1 << 20  # headers, index, configs
_OURS = re.compile(
    r"(model(-\d+-of-\d+)?\.safetensors(\.index\.json)?|(generation_)?config\.json"
    r"|optimizer\.(safetensors|json))"
)
_RENAME_EXCHANGE = 2  # linux/fs.h
_AT_FDCWD = -100  # linux/fcntl.h


def save_pretrained(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    max_shard_bytes: int = 5_000_000_000,
    optimizer: torch.optim.Optimizer | None = None,
    group: GroupLike | None = None,
) -> None:
    """Write ``model`` as a Hugging Face folder that transformers loads bit for bit. Collective.

    Rank 0 writes ``config.json``, ``generation_config.json`` and ``model.safetensors`` (or
    shards of at most ``max_shard_bytes`` and their index), holding one whole tensor at a time;
    a tied weight is written once. With ``optimizer`` its state lies beside it, whole and under the
    parameters' names too. Other files of an existing folder are kept. The folder is replaced in one
    rename: whatever happens, ``path`` is the old checkpoint or the new one.

    Raises: CheckpointError, the same on every rank, if there is no room, a write fails or the
    optimizer keeps state that is not cut as its parameter is; the old folder is then as it was and
    nothing temporary is left.
    """
    state = state_of(model)
    group = state.group if state is not None else current_group(group)
    inner = unwrap(model)
    texts: dict[str, str] = {}

    def lay_out() -> list[tuple[str, list[Item]]]:
        if not isinstance(max_shard_bytes, int) or max_shard_bytes < 1:
            raise ValueError(f"max_shard_bytes must be an int > 0, got {max_shard_bytes!r}")
        files = _lay_out(items_of(inner), max_shard_bytes)
        if optimizer is not None:
            tensors, texts[OPTIMIZER_SETTINGS] = optimizer_tensors(inner, optimizer)
            files.append((OPTIMIZER_TENSORS, widest_first(Item(*t) for t in tensors)))
        return files

    def add_rest(folder: Path, files: Sequence[tuple[str, list[Item]]]) -> None:
        weights = [part for part in files if part[0] != OPTIMIZER_TENSORS]
        if len(weights) > 1:
            _write_index(folder, weights)
        for name, text in texts.items():
            (folder / name).write_text(text)
        _write_configs(inner, folder)

    write_folder(path, group, lay_out, add_rest, _OURS)


def write_folder(
    path: str | os.PathLike[str],
    group: Group,
    lay_out: Callable[[], list[tuple[str, list[Item]]]],
    add_rest: Callable[[Path, Sequence[tuple[str, list[Item]]]], None],
    stale: re.Pattern[str],
) -> None:
    """Write what ``lay_out`` says and ``add_rest`` adds, in place of ``path`` in one rename.

    Collective. Of an existing folder all files are kept but those written anew and those whose
    names ``stale`` matches. ``lay_out`` runs on every rank, ``add_rest`` on rank 0.
    """
    staging: _Staging | None = None
    try:
        with agreed(group):
            files = lay_out()
            if group.rank == 0:
                staging = _Staging(Path(os.path.realpath(path)))
                staging.check_room(sum(item.nbytes for _, items in files for item in items))
        for file, items in files:
            agree(group, _write_file(items, staging, file))
        with agreed(group):
            if staging is not None:
                staging.commit(lambda folder: add_rest(folder, files), stale)
    finally:
        if staging is not None:
            staging.remove()


class CheckpointSaver:
    """Saves a model to one folder, again and again, each time atomically."""

    def __init__(self, path: str | os.PathLike[str], group: GroupLike | None = None) -> None:
        self.path = Path(path)
        self.group = group

    def save(self, model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Write ``model``, and the optimizer's state, as `save_pretrained` does. Collective."""
        save_pretrained(model, self.path, optimizer=optimizer, group=self.group)


def parse_bytes(size: int | str) -> int:
    """Bytes of a size like ``5GB`` or ``200MiB``; an int passes through."""
    if isinstance(size, int):
        return size
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?\s*", size, re.IGNORECASE)
    if match is None:
        raise ValueError(f"size {size!r} is not a number of bytes like 5GB or 200MiB")
    power = " KMGT".index(match[2].upper() or " ")
    return int(float(match[1]) * (1024 if match[3] else 1000) ** power)


def _lay_out(items: Sequence[Item], max_bytes: int) -> list[tuple[str, list[Item]]]:
    """Fill files in order up to ``max_bytes``; a larger tensor gets a file of its own."""
    groups: list[list[Item]] = [[]]
    room = max_bytes
    for item in items:
        if item.nbytes > room and groups[-1]:
            groups.append([])
            room = max_bytes
        groups[-1].append(item)
        room -= item.nbytes
    if len(groups) == 1:
        return [("model.safetensors", groups[0])]
    total = len(groups)
    return [(f"model-{i:05d}-of-{total:05d}.safetensors", g) for i, g in enumerate(groups, 1)]


def _write_file(items: Sequence[Item], staging: _Staging | None, file: str) -> Exception | None:
    """Gather a file's tensors and, on rank 0, write them; a failure to write is returned.

    After one, rank 0 keeps gathering to the file's end, in step with the other ranks.
    """
    error: Exception | None = None
    with contextlib.ExitStack() as stack:
        writer: _FileWriter | None = None
        for item in items:
            whole = item.whole()
            if staging is None or error is not None:
                continue
            try:
                writer = writer or stack.enter_context(_FileWriter(staging.path / file, items))
                writer.write(whole)
            except Exception as failure:
                error = staging.explain(failure)
        if writer is not None and staging is not None and error is None:
            try:
                writer.sync()
            except OSError as failure:
                error = staging.explain(failure)
    return error


class _FileWriter:
    """One safetensors file: its header first, then its tensors in the header's order."""

    def __init__(self, path: Path, items: Sequence[Item]) -> None:
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for item in items:
            header[item.name] = {
                "dtype": _NAMES[item.dtype],
                "shape": list(item.shape),
                "data_offsets": [offset, offset + item.nbytes],
            }
            offset += item.nbytes
        raw = json.dumps(header, separators=(",", ":")).encode()
        raw += b" " * (-len(raw) % 8)
        # Unbuffered: a full disk is an error of the write that met it, not of a later close.
        self._stream = path.open("wb", buffering=0)
        self._write_all(memoryview(len(raw).to_bytes(8, "little") + raw))

    def __enter__(self) -> _FileWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._stream.close()

    def write(self, tensor: Tensor) -> None:
        flat = tensor.contiguous().view(-1)
        step = max(1, _COPY_BYTES // flat.dtype.itemsize)
        for start in range(0, flat.numel(), step):
            part = flat[start : start + step].cpu()
            nbytes = part.numel() * part.itemsize
            block = (ctypes.c_char * nbytes).from_address(part.data_ptr())
            self._write_all(memoryview(block).cast("B"))

    def sync(self) -> None:
        os.fsync(self._stream.fileno())

    def _write_all(self, block: memoryview) -> None:
        while block:
            block = block[self._stream.write(block) :]


class _Staging:
    """A hidden sibling folder that becomes the target in one rename. Rank 0 only.

    Its lock marks it as in use: what a killed save left behind is swept by the next one.
    """

    def __init__(self, target: Path) -> None:
        self.target = target
        if target.exists() and not target.is_dir():
            raise CheckpointError(f"{target}: exists and is not a folder; choose another path")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            self._sweep()
            self.path = target.parent / f".{target.name}.tmp-{secrets.token_hex(6)}"
            self.path.mkdir()
            self._lock = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise self.explain(error) from error
        fcntl.flock(self._lock, fcntl.LOCK_EX)

    def check_room(self, weight_bytes: int) -> None:
        """Raise CheckpointError if the file system lacks the bytes; removes the folder then."""
        system = os.statvfs(self.path)
        have, need = system.f_bavail * system.f_frsize, weight_bytes + _SLACK_BYTES
        if have < need:
            self.remove()
            raise CheckpointError(
                f"{self.target}: no room to save: need {need} bytes, have {have}; the old and the "
                "new checkpoint lie side by side until the new one is complete"
            )

    def commit(self, add_rest: Callable[[Path], None], stale: re.Pattern[str]) -> None:
        """Add the small files and the target's other ones, reach the disk, and swap."""
        try:
            add_rest(self.path)
            self._carry_over(stale)
            for root, _, names in os.walk(self.path):
                for name in names:
                    if not name.endswith(".safetensors"):  # synced as they were written
                        _sync(os.path.join(root, name))
                _sync(root)
            self._swap()
            _sync(self.target.parent)
        except Exception as failure:
            raise self.explain(failure) from failure

    def remove(self) -> None:
        """Delete the folder (after a swap it holds the old checkpoint). Idempotent."""
        if self._lock >= 0:
            shutil.rmtree(self.path, ignore_errors=True)
            os.close(self._lock)
            self._lock = -1

    def explain(self, failure: Exception) -> Exception:
        """The failure as users see it."""
        if isinstance(failure, CheckpointError):
            return failure
        return CheckpointError(
            f"{self.target}: saving failed: {type(failure).__name__}: {failure}; "
            "what was there before is unchanged"
        )

    def _sweep(self) -> None:
        for left in self.target.parent.glob(f".{glob.escape(self.target.name)}.tmp-*"):
            with contextlib.suppress(OSError):
                fd = os.open(left, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
                try:
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(left)
                finally:
                    os.close(fd)

    def _carry_over(self, stale: re.Pattern[str]) -> None:
        if not self.target.is_dir():
            return
        shutil.copymode(self.target, self.path)
        for entry in os.scandir(self.target):
            to = self.path / entry.name
            if stale.fullmatch(entry.name) or to.exists():
                continue
            if entry.is_dir(follow_symlinks=False):
                shutil.copytree(entry.path, to, symlinks=True, copy_function=_link)
            else:
                _link(entry.path, str(to))

    def _swap(self) -> None:
        if not self.target.is_dir():
            os.rename(self.path, self.target)
            return
        libc = ctypes.CDLL(None, use_errno=True)
        names = (os.fsencode(self.path), os.fsencode(self.target))
        exchange = getattr(libc, "renameat2", None)
        if exchange is not None:
            if exchange(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE) == 0:
                return
            code = ctypes.get_errno()
            if code not in (errno.ENOSYS, errno.EINVAL):
                raise OSError(code, os.strerror(code), str(self.target))
        raise CheckpointError(
            f"{self.target}: this file system cannot swap two folders in one step "
            "(renameat2); save to a new folder"
        )


def _write_index(folder: Path, files: Sequence[tuple[str, list[Item]]]) -> None:
    items = [item for _, group in files for item in group]
    index = {
        "metadata": {
            "total_parameters": sum(math.prod(item.shape) for item in items),
            "total_size": sum(item.nbytes for item in items),
        },
        "weight_map": {item.name: file for file, group in files for item in group},
    }
    text = json.dumps(index, indent=2, sort_keys=True) + "\n"
    (folder / "model.safetensors.index.json").write_text(text)


def _write_configs(model: nn.Module, folder: Path) -> None:
    config: Any = copy.deepcopy(getattr(model, "config", None))
    if not hasattr(config, "save_pretrained"):
        return
    config.architectures = [type(model).__name__]
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), None)
    if dtype is not None:
        config.dtype = str(dtype).removeprefix("torch.")
    config.save_pretrained(str(folder))
    settings: Any = getattr(model, "generation_config", None)
    if hasattr(settings, "save_pretrained"):
        settings.save_pretrained(str(folder))


def _link(source: str, to: str) -> None:
    """A second name for a file that is kept as it is; a copy where links are not possible."""
    try:
        os.link(source, to, follow_symlinks=False)
    except OSError:
        shutil.copy2(source, to, follow_symlinks=False)


def _sync(path: str | Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
