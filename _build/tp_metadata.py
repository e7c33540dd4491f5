"""Dependencies of the wheel: the torch minor it is built against, because C++ ABI ends there."""

from __future__ import annotations

from typing import Any

from tp_build_backend import DEFAULT_TORCH, find_torch

DEPENDENCIES = ["safetensors>=0.4.3", "numpy>=1.26", "tqdm>=4.64", "typing_extensions>=4.10"]


def dynamic_metadata(field: str, settings: Any = None, *_: Any) -> list[str]:
    if field != "dependencies":
        raise ValueError(f"tp_metadata provides 'dependencies', asked for {field!r}")
    found = find_torch()
    version = found[1] if found else DEFAULT_TORCH.removeprefix("torch==")
    major, minor = version.split(".")[:2]
    return [f"torch=={major}.{minor}.*", *DEPENDENCIES]
