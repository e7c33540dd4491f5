"""Loads the native module, after torch and only beside the torch it was built against."""

from __future__ import annotations

import logging
import os

import torch

from .errors import make_error

_REMEDY = (
    "rebuild it for this torch: "
    "pip install --no-build-isolation --force-reinstall --no-deps <tp_native source>"
)

try:
    from . import _C
except ImportError as error:
    raise ImportError(
        f"tp_native's native module does not load beside torch {torch.__version__}: {error}; "
        f"{_REMEDY}"
    ) from error

_built = _C.TORCH_VERSION.split("+")[0].split(".")[:2]
if torch.__version__.split("+")[0].split(".")[:2] != _built:
    raise ImportError(
        f"tp_native was built against torch {_C.TORCH_VERSION} and runs beside "
        f"{torch.__version__}; {_REMEDY}"
    )
_C.install(make_error, logging.getLogger("tp_native").warning)
_C.arm_fault(os.environ.get("TP_NATIVE_FAULT", ""))  # tests: see csrc/core/fault.h

__all__ = ["_C"]
