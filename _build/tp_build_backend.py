"""scikit-build-core, plus the choice of the torch to build against.

Under build isolation pip hides the target environment, so a plain ``torch`` in ``requires`` would
fetch the newest torch and build against that: an ABI mismatch that shows only at import. Here the
torch of the target environment is used where there is one; else one exact version is asked for.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from scikit_build_core import build as _skbuild
from scikit_build_core.build import *  # noqa: F403  the hooks that are not replaced below

DEFAULT_TORCH = "torch==2.13.0"
WHERE_TORCH = Path(__file__).parents[1] / "cmake" / "where_torch.py"


def _ask(python: str, env: dict[str, str]) -> tuple[str, str] | None:
    """Folder and version of the torch that ``python`` would import."""
    answer = subprocess.run(
        [python, str(WHERE_TORCH)], env=env, capture_output=True, text=True, check=False
    )
    if answer.returncode != 0:
        return None
    folder, version, _ = answer.stdout.strip().split(";")
    return folder, version


def find_torch() -> tuple[str, str] | None:
    """Folder and version of the torch to build against; None where one has to be fetched first."""
    if "TP_NATIVE_TORCH_DIR" in os.environ:
        return _ask(sys.executable, dict(os.environ))
    # pip isolates by PYTHONPATH: without it the same interpreter shows the target environment.
    # Tools that isolate by a new environment leave the active one in VIRTUAL_ENV.
    bare = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONNOUSERSITE")}
    pythons = [sys.executable]
    active = Path(os.environ.get("VIRTUAL_ENV", "")) / "bin" / _python_name()
    if "VIRTUAL_ENV" in os.environ and active.exists():
        pythons.append(str(active))
    for python in pythons:
        found = _ask(python, bare)
        if found:
            return found
    return _ask(sys.executable, dict(os.environ))  # fetched for this build


def _python_name() -> str:
    return f"python{sys.version_info.major}.{sys.version_info.minor}"


def _with_torch(requires: list[str]) -> list[str]:
    return requires if find_torch() else [*requires, DEFAULT_TORCH]


def _point_cmake_at_torch() -> None:
    found = find_torch()
    if found:
        os.environ["TP_NATIVE_TORCH_DIR"] = found[0]


def get_requires_for_build_wheel(config_settings: Any = None) -> list[str]:
    return _with_torch(_skbuild.get_requires_for_build_wheel(config_settings))


def get_requires_for_build_editable(config_settings: Any = None) -> list[str]:
    return _with_torch(_skbuild.get_requires_for_build_editable(config_settings))


def build_wheel(*args: Any, **kwargs: Any) -> str:
    _point_cmake_at_torch()
    return _skbuild.build_wheel(*args, **kwargs)


def build_editable(*args: Any, **kwargs: Any) -> str:
    _point_cmake_at_torch()
    return _skbuild.build_editable(*args, **kwargs)
