"""Dependencies point down. The two tables are the architecture; this test is their authority."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CSRC = ROOT / "csrc"
PACKAGE = ROOT / "python" / "tp_native"

# Room of csrc/: what it may include besides itself, the standard library and the system.
NATIVE = {
    "core": set(),
    "kernels": {"core"},
    "comm": {"core", "kernels"},
    "overlap": {"core", "kernels", "comm"},
    "ops": {"core", "kernels", "comm", "overlap", "torch"},
    "bind": {"core", "kernels", "comm", "overlap", "python"},
}
FOREIGN = {
    "torch": re.compile(r"(torch|ATen|c10)/"),
    "python": re.compile(r"pybind11/|Python\.h$"),
}
# Lowest first: a room imports only from rows above its own.
PYTHON = [
    {"_C", "partition", "errors", "config", "flight"},
    {"_native"},
    {"_ops", "shm", "gpu"},
    {"c10d"},
    {"links"},
    {"group"},
    {"collectives", "simulate"},
    {"agreement"},
    {"nn"},
    {"structure", "optim"},
    {"plan"},
    {"state"},
    {"guards", "masks", "translated", "tune", "verify", "whole_reads"},
    {"checkpoint", "checkpoint.reader"},
    {"checkpoint.layouts", "checkpoint.optimizer"},
    {"checkpoint.items"},
    {"checkpoint.skeleton", "checkpoint.writer"},
    {"huggingface"},
    {"parallelize"},
    {"checkpoint.adapter", "checkpoint.loader"},
    {"generate", "orchestrator", "show_plan"},
    {"launch"},
    {"cli"},
    {"__init__", "__main__"},
]
LEVEL = {room: level for level, rooms in enumerate(PYTHON) for room in rooms}

SOURCES = sorted(p for p in CSRC.rglob("*") if p.suffix in {".h", ".cpp", ".cu", ".cuh"})
MODULES = sorted(PACKAGE.rglob("*.py"))


def room_of_source(path: Path) -> str:
    return path.relative_to(CSRC).parts[0]


def room_of_module(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return room_named(parts)


def room_named(parts: tuple[str, ...]) -> str:
    """The room of ``tp_native.<parts>``: two names deep where PYTHON has such a row."""
    return next((r for r in (".".join(parts[:2]), *parts[:1]) if r in LEVEL), parts[0])


def rooms_included(path: Path) -> set[str]:
    rooms = set()
    for header in re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', path.read_text(), re.MULTILINE):
        first = header.split("/")[0]
        if first in NATIVE and "/" in header:
            rooms.add(first)
        rooms |= {name for name, pattern in FOREIGN.items() if pattern.match(header)}
    return rooms - {room_of_source(path)}


def rooms_imported(path: Path) -> set[str]:
    """Rooms of tp_native that a module imports, at its top or inside a function."""
    package = ["tp_native", *path.relative_to(PACKAGE).parts[:-1]]
    names: list[str] = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *filter(None, [node.module])])
            if module == "tp_native":  # the room of that name where there is one, else __init__
                names += [f"{module}.{alias.name}" for alias in node.names]
            else:
                names.append(module)
    rooms = set()
    for name in names:
        parts = name.split(".")
        if parts[0] == "tp_native":
            room = room_named(tuple(parts[1:])) if len(parts) > 1 else "__init__"
            rooms.add(room if room in LEVEL else "__init__")
    return rooms - {room_of_module(path)}


def test_both_trees_are_checked() -> None:
    assert {room_of_source(p) for p in SOURCES} >= {"core", "kernels", "comm", "ops", "bind"}
    assert {room_of_module(p) for p in MODULES} >= {"partition", "group", "nn", "plan", "__init__"}
    assert any(rooms_included(p) == {"core"} for p in SOURCES)
    assert any("torch" in rooms_included(p) for p in SOURCES if room_of_source(p) == "ops")
    assert any("partition" in rooms_imported(p) for p in MODULES if room_of_module(p) == "nn")


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_native_includes_point_down(path: Path) -> None:
    room = room_of_source(path)
    assert room in NATIVE, f"csrc/{room}: give it a line in NATIVE"
    wrong = rooms_included(path) - NATIVE[room]
    assert not wrong, f"{room} includes {sorted(wrong)}, allowed: {sorted(NATIVE[room])}"


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_python_imports_point_down(path: Path) -> None:
    room = room_of_module(path)
    assert room in LEVEL, f"{room}: give it a row in PYTHON"
    wrong = {name for name in rooms_imported(path) if LEVEL[name] >= LEVEL[room]}
    assert "import_module" not in path.read_text(), f"{room} hides an import from this test"
    assert not wrong, f"{room} imports {sorted(wrong)}, which is not below it"
