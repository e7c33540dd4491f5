"""The safetensors reader: slices equal the safetensors library's; broken files are errors."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from tp_native.checkpoint.reader import DTYPES, CheckpointFolder, SafetensorsFile
from tp_native.errors import CheckpointError


def sample(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(len(shape))
    raw = torch.randint(0, 2, (*shape, dtype.itemsize), dtype=torch.uint8, generator=generator)
    return raw.view(dtype).reshape(shape) if shape else raw.view(dtype)[0].clone()


@pytest.fixture(scope="module")
def every_dtype(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("reader") / "all.safetensors"
    tensors = {f"{name}-{n}": sample(t, *([5] * n)) for name, t in DTYPES.items() for n in range(4)}
    tensors["empty"] = torch.empty(3, 0)
    save_file(tensors, path)
    return path


def test_whole_tensors_of_every_dtype(every_dtype: Path) -> None:
    with SafetensorsFile(every_dtype) as file, safe_open(every_dtype, "pt") as oracle:
        assert set(file.tensors) == set(oracle.keys())
        for name, info in file.tensors.items():
            expected = oracle.get_tensor(name)
            out = torch.empty(info.shape, dtype=info.dtype)
            before = file.bytes_read
            assert file.read_into(name, out) == expected.numel()
            assert file.bytes_read - before == info.nbytes
            assert out.dtype == expected.dtype
            ours, theirs = (t.contiguous().view(-1).view(torch.uint8) for t in (out, expected))
            assert torch.equal(ours, theirs), name


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_slices_are_the_librarys_and_read_only_their_bytes(
    data: st.DataObject, every_dtype: Path
) -> None:
    name = data.draw(
        st.sampled_from([f"{t}-{n}" for t in ("F32", "BF16", "I8") for n in (1, 2, 3)])
    )
    with SafetensorsFile(every_dtype) as file, safe_open(every_dtype, "pt") as oracle:
        info = file.tensors[name]
        dim = data.draw(st.integers(0, len(info.shape) - 1))
        start = data.draw(st.integers(0, 5))
        stop = data.draw(st.integers(start, 5))
        expected = oracle.get_tensor(name).narrow(dim, start, stop - start)
        out = torch.empty(expected.shape, dtype=info.dtype)
        file.read_into(name, out, dim, start)
        assert torch.equal(out.view(torch.int8), expected.contiguous().view(torch.int8))
        assert file.bytes_read == expected.numel() * info.dtype.itemsize


def test_values_are_cast_to_the_destinations_dtype(every_dtype: Path, tmp_path: Path) -> None:
    whole = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
    save_file({"w": whole}, tmp_path / "w.safetensors")
    with SafetensorsFile(tmp_path / "w.safetensors") as file:
        out = torch.empty(6, 2, dtype=torch.bfloat16)
        file.read_into("w", out, 1, 2)
        assert torch.equal(out, whole[:, 2:4].to(torch.bfloat16))
        assert file.bytes_read == 6 * 2 * 4
        with pytest.raises(ValueError, match="cannot fill"):
            file.read_into("w", torch.empty(5, 6))
        with pytest.raises(ValueError, match="slice 4:6"):
            file.read_into("w", torch.empty(6, 2), 1, 4)


def test_a_file_cut_while_open_names_tensor_offset_need_and_have(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    save_file({"w": torch.ones(64, 64)}, path)
    with SafetensorsFile(path) as file:
        os.truncate(path, path.stat().st_size - 100)
        with pytest.raises(
            CheckpointError, match=r"w\.safetensors.*tensor w: need 16384 .* have 162"
        ):
            file.read_into("w", torch.empty(64, 64))


def entry(begin: int, end: int, **changes: Any) -> dict[str, Any]:
    shape = [(end - begin) // 4]
    return {"dtype": "F32", "shape": shape, "data_offsets": [begin, end], **changes}


def packed(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(raw) if length is None else length).to_bytes(8, "little") + raw + data


BROKEN: dict[str, tuple[bytes, str]] = {
    "no length": (b"\x01\x02", "too short"),
    "long header": (packed({}, length=100_000_001), "above the limit"),
    "header past the end": (packed({}, length=50), "truncated: the header needs 50"),
    "not utf-8": (packed(b"{\xff}"), "not JSON"),
    "not json": (packed(b"{'a'}"), "not JSON"),
    "deep": (packed(b'{"a":' + b"[" * 100_000), "not JSON"),
    "a list": (packed([]), "not a JSON object"),
    "leading space": (packed(b" {}"), "not a JSON object"),
    "twice": (packed(b'{"a":1,"a":2}'), r"duplicate keys \['a'\]"),
    "metadata": (packed({"__metadata__": {"a": 1}}), "object of strings"),
    "no shape": (packed({"a": {"dtype": "F32"}}), "must have dtype"),
    "extra key": (packed({"a": entry(0, 4, more=1)}, bytes(4)), "must have dtype"),
    "unknown dtype": (packed({"a": entry(0, 4, dtype="F33")}, bytes(4)), "unknown dtype 'F33'"),
    "dtype list": (packed({"a": entry(0, 4, dtype=[])}, bytes(4)), "unknown dtype"),
    "negative": (packed({"a": entry(0, 4, shape=[-1])}, bytes(4)), "has shape"),
    "float size": (packed({"a": entry(0, 4, shape=[1.0])}, bytes(4)), "has shape"),
    "three offsets": (packed({"a": entry(0, 4, data_offsets=[0, 4, 8])}, bytes(4)), "has shape"),
    "backwards": (packed({"a": entry(0, 4, data_offsets=[4, 0])}, bytes(4)), "spans -4"),
    "wrong size": (packed({"a": entry(0, 4, shape=[2])}, bytes(4)), "spans 4 bytes, but F32"),
    "overflow": (packed({"a": entry(0, 4, shape=[2**62, 4])}, bytes(4)), "spans 4 bytes"),
    "past the end": (packed({"a": entry(0, 8)}, bytes(4)), "truncated.*need 8 bytes, have 4"),
    "trailing": (packed({"a": entry(0, 4)}, bytes(8)), "trailing bytes"),
    "overlap": (packed({"a": entry(0, 8), "b": entry(4, 12)}, bytes(12)), "overlaps"),
    "hole": (packed({"a": entry(0, 4), "b": entry(8, 12)}, bytes(12)), "leaves a hole"),
    "NUL": (packed({"a\0": entry(0, 4)}, bytes(4)), "has a NUL"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_headers_are_refused(case: str, tmp_path: Path) -> None:
    content, words = BROKEN[case]
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    descriptors = len(os.listdir("/proc/self/fd"))
    with pytest.raises(CheckpointError, match=words):
        SafetensorsFile(path)
    assert len(os.listdir("/proc/self/fd")) == descriptors


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(at=st.integers(0, 400), to=st.integers(0, 255), cut=st.integers(0, 600))
def test_a_flipped_or_cut_file_is_refused_or_read_as_the_library_reads_it(
    at: int, to: int, cut: int, tmp_path: Path
) -> None:
    path = tmp_path / "flip.safetensors"
    save_file({"a": torch.ones(3, 4), "b": torch.ones(8, dtype=torch.int16)}, path)
    raw = bytearray(path.read_bytes())
    raw[at % len(raw)] = to
    path.write_bytes(bytes(raw[: len(raw) - cut] if cut < len(raw) and cut % 3 == 0 else raw))
    try:
        with SafetensorsFile(path) as file:
            ours = {n: (tuple(i.shape), i.dtype) for n, i in file.tensors.items()}
            for name, info in file.tensors.items():
                file.read_into(name, torch.empty(info.shape, dtype=info.dtype))
    except CheckpointError:
        return
    with safe_open(path, "pt") as oracle:
        theirs = {n: oracle.get_tensor(n) for n in oracle.keys()}  # noqa: SIM118
    assert ours == {name: (tuple(t.shape), t.dtype) for name, t in theirs.items()}


def folder_with(tmp_path: Path, weight_map: object) -> Path:
    save_file({"a": torch.ones(2)}, tmp_path / "one.safetensors")
    save_file({"b": torch.ones(2)}, tmp_path / "two.safetensors")
    index = {"weight_map": weight_map}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    return tmp_path


def test_an_index_joins_its_shards(tmp_path: Path) -> None:
    path = folder_with(tmp_path, {"a": "one.safetensors", "b": "two.safetensors"})
    with CheckpointFolder(path) as folder:
        assert set(folder.tensors) == {"a", "b"}
        out = torch.empty(2)
        folder.read_into("b", out)
        assert torch.equal(out, torch.ones(2))
        assert folder.bytes_read == 8


@pytest.mark.parametrize(
    ("weight_map", "words"),
    [
        ({"a": "../one.safetensors"}, "inside the folder"),
        ({"a": "/etc/passwd"}, "inside the folder"),
        ({"a": ".."}, "inside the folder"),
        ({"a": ""}, "inside the folder"),
        ({"a": 3}, "inside the folder"),
        ([], "not an object"),
        ({"c": "one.safetensors"}, r"promises tensors it lacks: \['c'\]"),
        ({"a": "three.safetensors"}, "cannot open: No such file"),
        ({"a": "link.safetensors"}, "outside the folder"),
        ({"a": "pipe"}, "not a regular file"),
    ],
)
def test_unsafe_or_wrong_indexes_are_refused(
    weight_map: object, words: str, tmp_path: Path
) -> None:
    inside = tmp_path / "inside"
    inside.mkdir()
    folder_with(inside, weight_map)
    save_file({"a": torch.ones(2)}, tmp_path / "outside.safetensors")
    (inside / "link.safetensors").symlink_to(tmp_path / "outside.safetensors")
    os.mkfifo(inside / "pipe")
    with pytest.raises(CheckpointError, match=words):
        CheckpointFolder(inside)


def test_links_inside_and_into_the_hub_cache_are_followed(tmp_path: Path) -> None:
    snapshot = tmp_path / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (tmp_path / "blobs").mkdir()
    save_file({"a": torch.ones(2)}, tmp_path / "blobs" / "123")
    (snapshot / "model.safetensors").symlink_to("../../blobs/123")
    with CheckpointFolder(snapshot) as folder:
        assert set(folder.tensors) == {"a"}


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    folder_with(tmp_path, {"a": "one.safetensors", "b": "two.safetensors"})
    save_file({"a": torch.ones(2), "b": torch.ones(2)}, tmp_path / "two.safetensors")
    with pytest.raises(CheckpointError, match=r"tensor a is in one\.safetensors as well"):
        CheckpointFolder(tmp_path)


def test_no_weights_at_all(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match="are pickles"):
        CheckpointFolder(tmp_path)
