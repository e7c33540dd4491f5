"""Read slices of safetensors files with pread: no mmap, so a truncated file is no signal.

Owns the format's checks and the folder's index. Knows nothing of models or ranks.
Source: huggingface/safetensors, README "Format" and the crate's ``Metadata::validate``.
"""

from __future__ import annotations

import ctypes
import json
import math
import os
import stat
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..nn import ShardMark

DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "I64": torch.int64,
    "U64": torch.uint64,
    "F64": torch.float64,
    "C64": torch.complex64,
}
_HEADER_CAP = 100_000_000  # the crate's own limit
_STAGE_BYTES = 16 << 20  # staging block for casts and devices; bounds memory, not speed
_READ_BYTES = 64 << 20  # one read: as long as a peer's death may go unnoticed
_LISTED = 50  # names in one error message
_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies: ``begin`` counts from the start of the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    nbytes: int


class SafetensorsFile:
    """One open file with a checked header. ``bytes_read`` counts payload bytes, not the header.

    ``check`` is called before every read of a tensor's bytes (64 MiB at most): what it raises ends
    the reading.
    Raises: CheckpointError if the header breaks the format, or says more than the file holds.
    """

    def __init__(
        self, path: str | os.PathLike[str], check: Callable[[], None] = lambda: None
    ) -> None:
        self.path = Path(path)
        self.bytes_read = 0
        self._check = check
        self._fd = _open_regular(self.path)
        try:
            self.tensors = self._parse(os.fstat(self._fd).st_size)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the file; reading after it is an error."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> SafetensorsFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def read_into(self, name: str, out: Tensor, dim: int = 0, start: int = 0) -> int:
        """Fill ``out`` with the tensor's elements from ``start`` on along ``dim``.

        ``out`` is contiguous; its other dimensions are the tensor's, its dtype may differ (then
        values are cast), it may lie on any device. Reads exactly the slice's bytes, straight
        into ``out`` where dtype and device allow. Returns the number of elements filled.
        Raises: CheckpointError naming file, tensor and offset if the file is too short.
        """
        info = self.tensors[name]
        shape = list(info.shape)
        length = out.shape[dim] if shape else 1
        if shape:
            if not 0 <= start <= start + length <= shape[dim]:
                raise ValueError(f"{name}: slice {start}:{start + length} of {shape} along {dim}")
            shape[dim] = length
        if list(out.shape) != shape or not out.is_contiguous():
            raise ValueError(f"{name}: cannot fill {tuple(out.shape)}, expected {tuple(shape)}")
        if out.numel() == 0:
            return 0
        outer = math.prod(info.shape[:dim])
        inner = math.prod(info.shape[dim + 1 :]) * info.dtype.itemsize
        run, stride = length * inner, math.prod(info.shape[dim:]) * info.dtype.itemsize
        begin = info.begin + start * inner
        if out.dtype == info.dtype and out.device.type == "cpu":
            self._gather(name, out.data_ptr(), begin, outer, run, stride)
        else:
            self._stage(name, out, info.dtype, begin, outer, run, stride)
        return out.numel()

    def _gather(
        self, name: str, address: int, begin: int, rows: int, run: int, stride: int
    ) -> None:
        """Copy ``rows`` runs of ``run`` bytes, ``stride`` apart in the file, to ``address``."""
        if run == stride:
            rows, run = 1, rows * run
        block = memoryview((ctypes.c_char * (rows * run)).from_address(address)).cast("B")
        for row in range(rows):
            self._pread(name, block[row * run : (row + 1) * run], begin + row * stride)

    def _stage(
        self,
        name: str,
        out: Tensor,
        dtype: torch.dtype,
        begin: int,
        rows: int,
        run: int,
        stride: int,
    ) -> None:
        flat = out.view(-1)
        done = 0
        for row in range(rows):
            for at in range(0, run, _STAGE_BYTES):
                nbytes = min(_STAGE_BYTES, run - at)
                stage = torch.empty(nbytes // dtype.itemsize, dtype=dtype)
                self._gather(name, stage.data_ptr(), begin + row * stride + at, 1, nbytes, nbytes)
                flat[done : done + stage.numel()].copy_(stage)
                done += stage.numel()

    def _pread(self, name: str, into: memoryview, offset: int) -> None:
        got = 0
        while got < len(into):
            self._check()
            try:
                count = os.preadv(self._fd, [into[got : got + _READ_BYTES]], offset + got)
            except OSError as error:
                raise CheckpointError(
                    f"{self.path}: reading tensor {name} at byte {offset + got} failed: {error}"
                ) from error
            if count == 0:
                raise CheckpointError(
                    f"{self.path}: truncated in tensor {name}: need {len(into)} bytes at byte "
                    f"{offset}, have {got}; copy the file again"
                )
            got += count
            self.bytes_read += count

    def _parse(self, size: int) -> dict[str, TensorInfo]:
        if size < 8:
            raise self._bad(f"{size} bytes is too short for a header; need at least 8")
        length = int.from_bytes(os.pread(self._fd, 8, 0), "little")
        if length > _HEADER_CAP:
            raise self._bad(f"header length {length} is above the limit of {_HEADER_CAP}")
        if length > size - 8:
            raise self._bad(f"truncated: the header needs {length} bytes, the file has {size - 8}")
        raw = os.pread(self._fd, length, 8)
        if len(raw) != length:
            raise self._bad(f"truncated: the header needs {length} bytes, got {len(raw)}")
        try:
            header = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique)
        except (ValueError, RecursionError) as error:
            raise self._bad(f"the header is not JSON: {error}") from error
        if not isinstance(header, dict) or not raw.startswith(b"{"):
            raise self._bad("the header is not a JSON object")
        metadata = header.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(
            isinstance(value, str) for value in metadata.values()
        ):
            raise self._bad("__metadata__ is not an object of strings")
        tensors, spans = {}, []
        for name, entry in header.items():
            begin, end, dtype, shape = self._entry(name, entry)
            tensors[name] = TensorInfo(dtype, shape, 8 + length + begin, end - begin)
            spans.append((begin, end, name))
        position = 0
        for begin, end, name in sorted(spans):
            if begin != position:
                word = "overlaps" if begin < position else "leaves a hole after"
                raise self._bad(f"tensor {name} at {begin} {word} the data before it ({position})")
            position = end
        have = size - 8 - length
        if position != have:
            last = max(spans)[2] if spans else "(none)"
            word = "truncated" if position > have else "trailing bytes"
            raise self._bad(
                f"{word}: tensor {last} ends at offset {position} of the data: need {position} "
                f"bytes, have {have}"
            )
        return tensors

    def _entry(self, name: str, entry: Any) -> tuple[int, int, torch.dtype, tuple[int, ...]]:
        if "\0" in name:
            raise self._bad(f"tensor name {name!r} has a NUL")
        if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
            raise self._bad(f"tensor {name} must have dtype, shape and data_offsets")
        dtype = DTYPES.get(entry["dtype"]) if isinstance(entry["dtype"], str) else None
        if dtype is None:
            raise self._bad(f"tensor {name} has unknown dtype {entry['dtype']!r}")
        shape, offsets = entry["shape"], entry["data_offsets"]
        if not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2:
            raise self._bad(f"tensor {name} has shape {shape!r} and data_offsets {offsets!r}")
        begin, end = offsets
        need = math.prod(shape) * dtype.itemsize
        if end - begin != need:
            raise self._bad(
                f"tensor {name} spans {end - begin} bytes, but {entry['dtype']} {shape} is {need}"
            )
        return begin, end, dtype, tuple(shape)

    def _bad(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: {what}")


class CheckpointFolder:
    """All tensors of a Hugging Face folder: one ``model.safetensors``, or shards and their index.

    ``tensors`` maps every name to its `TensorInfo`; headers only are read until asked for more.
    ``check``: as in `SafetensorsFile`.
    Raises: CheckpointError if files are missing, unsafe, or disagree with the index.
    """

    def __init__(
        self, path: str | os.PathLike[str], check: Callable[[], None] = lambda: None
    ) -> None:
        self.path = Path(path)
        self._check = check
        self._files: dict[str, SafetensorsFile] = {}
        self._file_of: dict[str, str] = {}
        try:
            self._open()
        except BaseException:
            self.close()
            raise

    @property
    def tensors(self) -> dict[str, TensorInfo]:
        """Every tensor in the folder."""
        return {name: self._files[f].tensors[name] for name, f in self._file_of.items()}

    @property
    def bytes_read(self) -> int:
        """Payload bytes read so far, over all files."""
        return sum(file.bytes_read for file in self._files.values())

    def read_into(self, name: str, out: Tensor, dim: int = 0, start: int = 0) -> int:
        """As `SafetensorsFile.read_into`, from the file that holds ``name``."""
        return self._files[self._file_of[name]].read_into(name, out, dim, start)

    def where(self, name: str) -> Path:
        """The file that holds ``name``."""
        return self.path / self._file_of[name]

    def close(self) -> None:
        """Close all files."""
        for file in self._files.values():
            file.close()

    def __enter__(self) -> CheckpointFolder:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _open(self) -> None:
        if (self.path / _SINGLE).exists():
            self._add(_SINGLE, None)
            return
        if not (self.path / _INDEX).exists():
            old = sorted(p.name for p in self.path.glob("*.bin"))
            hint = (
                f"; found {old[:3]}, which are pickles: convert them to safetensors" if old else ""
            )
            raise CheckpointError(f"{self.path}: no {_SINGLE} and no {_INDEX}{hint}")
        weight_map = self._weight_map()
        by_file: dict[str, set[str]] = {}
        for name, file in weight_map.items():
            by_file.setdefault(file, set()).add(name)
        for file, names in sorted(by_file.items()):
            self._add(file, names)

    def _weight_map(self) -> dict[str, str]:
        path = self.path / _INDEX
        _check_inside(self.path, path)
        try:
            fd = _open_regular(path)
            with os.fdopen(fd, "rb") as stream:
                index = json.loads(stream.read(_HEADER_CAP).decode(), object_pairs_hook=_unique)
            weight_map = index["weight_map"]
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise CheckpointError(f"{path}: not a readable index: {error}") from error
        if not isinstance(weight_map, dict):
            raise CheckpointError(f"{path}: weight_map is not an object")
        for name, file in weight_map.items():
            if not isinstance(file, str) or not _is_plain_name(file):
                raise CheckpointError(
                    f"{path}: {name} points to {file!r}; expected a file name inside the folder"
                )
        return weight_map

    def _add(self, file: str, names: Iterable[str] | None) -> None:
        path = self.path / file
        _check_inside(self.path, path)
        opened = SafetensorsFile(path, self._check)
        self._files[file] = opened
        wanted = set(opened.tensors) if names is None else set(names)
        absent = sorted(wanted - set(opened.tensors))
        if absent:
            raise CheckpointError(f"{path}: the index promises tensors it lacks: {absent[:50]}")
        # A name in a shard but not in the index still counts: the loader reports it as unexpected.
        for name in opened.tensors:
            if name in self._file_of:
                raise CheckpointError(f"{path}: tensor {name} is in {self._file_of[name]} as well")
            self._file_of[name] = file


def raise_if_any(path: Path, model_name: str, **problems: list[str]) -> None:
    """Raise CheckpointError with the names of each kind of problem, if there is one."""
    if not any(problems.values()):
        return
    room, lines = _LISTED, []
    for word, names in problems.items():
        if names:
            shown = names[:room]
            room -= len(shown)
            more = f" and {len(names) - len(shown)} more" if len(names) > len(shown) else ""
            lines.append(f"{len(names)} {word}: {', '.join(shown)}{more}")
    raise CheckpointError(
        f"{path} does not fit {model_name}; no weight was loaded. " + "; ".join(lines)
    )


def read_shard(
    files: CheckpointFolder | SafetensorsFile, name: str, out: Tensor, mark: ShardMark | None
) -> int:
    """Fill ``out`` with this rank's part of a tensor on file; the number of elements."""
    if mark is None:
        return files.read_into(name, out)
    ranges = mark.layout.ranges[mark.group.rank]
    if len(ranges) == 1:
        return files.read_into(name, out, mark.dim, ranges[0][0])
    count = at = 0
    for start, stop in ranges:
        piece = out.narrow(mark.dim, at, stop - start)
        room = piece if piece.is_contiguous() else torch.empty_like(piece).contiguous()
        count += files.read_into(name, room, mark.dim, start)
        if room is not piece:
            piece.copy_(room)
        at += stop - start
    return count


def _open_regular(path: Path) -> int:
    try:
        # O_NONBLOCK: opening a FIFO must not wait for a writer.
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot open: {error.strerror}") from error
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise CheckpointError(f"{path}: not a regular file")
    return fd


def _check_inside(folder: Path, path: Path) -> None:
    """Refuse a link that leaves the folder; the hub cache's own links to its blobs may."""
    root, target = folder.resolve(), path.resolve()
    blobs = root.parent.parent / "blobs" if root.parent.name == "snapshots" else root
    if target.parent not in (root, blobs) and root not in target.parents:
        raise CheckpointError(f"{path}: links to {target}, outside the folder; copy the file in")


def _is_plain_name(file: str) -> bool:
    return bool(file) and file not in (".", "..") and not set(file) & {"/", "\\", "\0"}


def _are_sizes(values: Any) -> bool:
    return isinstance(values, list) and all(
        isinstance(v, int) and not isinstance(v, bool) and 0 <= v < 2**63 for v in values
    )


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        counts = Counter(name for name, _ in pairs)
        raise ValueError(f"duplicate keys {[n for n, count in counts.items() if count > 1][:5]}")
    return made
