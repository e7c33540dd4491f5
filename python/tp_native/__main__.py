"""``python -m tp_native``: the same as ``tp-native``."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
