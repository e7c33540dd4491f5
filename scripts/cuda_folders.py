"""Prints the folders of installed wheels that hold cuBLASLt or NCCL, joined by ":"; for programs
that are not Python."""

import glob
import importlib.util
import os

spec = importlib.util.find_spec("nvidia")
places = list(spec.submodule_search_locations or []) if spec is not None else []
spec = importlib.util.find_spec("torch")
if spec is not None and spec.origin is not None:
    places.append(os.path.dirname(spec.origin))  # some builds of torch carry their own
found = [
    os.path.dirname(file)
    for place in places
    for name in ("libcublasLt.so.*", "libnccl.so.*")
    for file in glob.glob(os.path.join(place, "**", "lib", name), recursive=True)
]
print(":".join(dict.fromkeys(found)))
