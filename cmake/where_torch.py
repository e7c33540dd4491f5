"""Prints ``folder;version;cuda`` of this interpreter's torch, without importing it.

``TP_NATIVE_TORCH_DIR`` names another folder. Exit status 1: there is no torch.
"""

import importlib.util
import os
import re
import sys
from pathlib import Path


def main() -> int:
    folder = os.environ.get("TP_NATIVE_TORCH_DIR")
    if not folder:
        spec = importlib.util.find_spec("torch")
        if spec is None or spec.origin is None:
            print("no torch", file=sys.stderr)
            return 1
        folder = str(Path(spec.origin).parent)
    facts = (Path(folder) / "version.py").read_text()
    version = re.search(r"^__version__\b.*?= *['\"](.+?)['\"]", facts, re.MULTILINE)
    cuda = re.search(r"^cuda\b.*?= *['\"](.+?)['\"]", facts, re.MULTILINE)
    if version is None:
        print(f"{folder}/version.py names no version", file=sys.stderr)
        return 1
    print(folder, version[1], cuda[1] if cuda else "none", sep=";")
    return 0


if __name__ == "__main__":
    sys.exit(main())
