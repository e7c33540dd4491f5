"""The machine code of the memory-bound CUDA kernels: 16-byte accesses, loads of all peers before
the first addition, nothing in local memory. No GPU is needed, only nvcc and a disassembler.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
KERNELS = ROOT / "csrc" / "kernels" / "cuda"
SOURCES = ["all_reduce", "glu", "epilogue", "gather", "gradient"]  # the slowest to compile first
ARCHITECTURES = ["sm_90a", "sm_80"]
CCACHE = [found] if (found := shutil.which("ccache")) else []

pytestmark = pytest.mark.timeout(600)  # half a minute on two cores that are free

FUNCTION = re.compile(r"^\s*Function : (\S+)", re.MULTILINE)
INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", re.MULTILINE)
SPILLS = re.compile(r"Function properties for (\S+)\n\s*(\d+) bytes stack frame, (\d+) bytes spill")
WIDE_LOAD = re.compile(r"LDG\.E(\.\w+)*\.128")
WIDE_STORE = re.compile(r"STG\.E(\.\w+)*\.128")
NARROW = re.compile(r"(LDG|STG)\.E(?!.*\.128)")


def disassembler() -> Path | None:
    on_path = shutil.which("cuobjdump")
    wheels = (p for folder in sys.path for p in Path(folder).glob("nvidia/*/bin/cuobjdump"))
    found = Path(on_path) if on_path else next(wheels, None)
    # it runs nvdisasm, of its own folder or on PATH
    if found and not ((found.parent / "nvdisasm").exists() or shutil.which("nvdisasm")):
        return None
    return found


class Build:
    """One source for one architecture: its kernels' instructions, and what ptxas says of them."""

    def __init__(self, nvcc: str, cuobjdump: Path, source: str, arch: str, folder: Path) -> None:
        built = folder / f"{source}.{arch}.o"
        flags = ["-std=c++20", "-O2", f"-I{ROOT / 'csrc'}", "-Xptxas", "-v", f"-arch={arch}"]
        compiled = subprocess.run(
            [*CCACHE, nvcc, *flags, "-c", "-o", built, KERNELS / f"{source}.cu"],
            capture_output=True,
            text=True,
        )
        assert compiled.returncode == 0, compiled.stderr
        self.stacks = {m[1]: (int(m[2]), int(m[3])) for m in SPILLS.finditer(compiled.stderr)}
        path = os.pathsep.join([str(cuobjdump.parent), os.environ.get("PATH", "")])
        text = subprocess.run(
            [cuobjdump, "-sass", built],
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ, "PATH": path},
        ).stdout
        parts = FUNCTION.split(text)[1:]
        self.kernels = {
            name: INSTRUCTION.findall(body)
            for name, body in zip(parts[::2], parts[1::2], strict=True)
        }


@pytest.fixture(scope="module")
def builds(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Build]:
    nvcc = os.environ.get("CUDACXX") or shutil.which("nvcc")
    if not nvcc:
        pytest.skip("no nvcc: put it on PATH or set CUDACXX")
    cuobjdump = disassembler()
    if not cuobjdump:
        pytest.skip("no disassembler: pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm")
    folder = tmp_path_factory.mktemp("sass")
    keys = [(source, arch) for source in SOURCES for arch in ARCHITECTURES]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        made = pool.map(lambda key: Build(nvcc, cuobjdump, *key, folder), keys)
        return dict(zip(keys, made, strict=True))


def matching(build: Build, pattern: str) -> dict[str, tuple[re.Match[str], list[str]]]:
    """Kernels by mangled name; a pattern that matches none would let anything pass."""
    found = {
        name: (match, code)
        for name, code in build.kernels.items()
        if (match := re.search(pattern, name))
    }
    assert found, f"no kernel matches {pattern}: {sorted(build.kernels)[:5]} ..."
    return found


def count(code: list[str], pattern: re.Pattern[str]) -> int:
    return sum(bool(pattern.match(instruction)) for instruction in code)


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("source", SOURCES)
def test_no_kernel_uses_local_memory(
    builds: dict[tuple[str, str], Build], source: str, arch: str
) -> None:
    build = builds[source, arch]
    assert build.kernels and build.kernels.keys() == build.stacks.keys()
    assert not {name: stack for name, stack in build.stacks.items() if stack != (0, 0)}
    local = re.compile(r"(LDL|STL)\b")
    assert not [name for name, code in build.kernels.items() if count(code, local)]


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_gated_activations_read_and_write_16_bytes_at_a_time(
    builds: dict[tuple[str, str], Build], arch: str
) -> None:
    for name, (match, code) in matching(
        builds["glu", arch], r"5gatedI.*ActivationE\dELi[248]ENS\d_\d(Forward|Backward)"
    ).items():
        loads, stores = (4, 2) if match[1] == "Forward" else (6, 4)  # of two places
        assert count(code, WIDE_LOAD) == loads, name
        assert count(code, WIDE_STORE) == stores, name
        assert count(code, NARROW) == 0, name


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_epilogues_and_gradients_read_and_write_16_bytes_at_a_time(
    builds: dict[tuple[str, str], Build], arch: str
) -> None:
    least = {
        ("epilogue", r"9add_termsI"): (6, 2),
        ("epilogue", r"18add_terms_and_normILi[248]ELb"): (7, 2),
        ("gradient", r"8backwardI"): (4, 2),
        ("gradient", r"8sum_partILi[248]E"): (1, 0),
        ("gather", r"12gather_partsI"): (12, 12),
    }
    for (source, pattern), (loads, stores) in least.items():
        for name, (_, code) in matching(builds[source, arch], pattern).items():
            assert count(code, WIDE_LOAD) >= loads, name
            assert count(code, WIDE_STORE) >= stores, name
    kept = matching(builds["epilogue", arch], r"18add_terms_and_normILi[248]ELb1E")
    for name, (_, code) in kept.items():  # the row is in shared memory, squares included
        assert count(code, NARROW) == 0, name


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_all_reduces_have_16_bytes_of_every_peer_in_flight_before_they_add(
    builds: dict[tuple[str, str], Build], arch: str
) -> None:
    build = builds["all_reduce", arch]
    loads = r"ELb\dELi(?P<batch>\d)ELi(?P<depth>\d)E"
    flat = r"(?:8one_shot|9in_slices)I.*OpFamilyE(?P<family>\d)" + loads
    rows = r"17one_shot_and_normI.*Li[248]" + loads
    for name, (match, code) in [*matching(build, flat).items(), *matching(build, rows).items()]:
        depth = int(match["depth"])
        in_flight = depth * int(match["batch"])
        assert count(code, WIDE_LOAD) >= 4 + in_flight, name  # staging, then the sum
        assert count(code, WIDE_STORE) >= 4 + depth, name
        met = next(i for i, x in enumerate(code) if x.startswith("BAR.RED"))
        added = next((i for i, x in enumerate(code) if i > met and x.startswith("FADD")), None)
        if added and match.groupdict().get("family") != "1":  # those compare
            assert count(code[met:added], WIDE_LOAD) >= in_flight, name
