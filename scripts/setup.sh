#!/bin/sh
# usage: setup.sh [extra...]   Prints the interpreter of an environment that has torch and a current tp_native.
#  - an active virtualenv or conda environment that has torch is used as it is;
#  - a system Python that has torch is seen through --system-site-packages;
#  - else torch is installed into $VENV: the CPU build where there is no NVIDIA GPU.
# pip runs with --no-compile: Python compiles what it imports, not the thousands of files that nobody does.
# Only what changed is done again. The stamp lies in the environment, so a new environment is always set up.
set -eu
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
VENV=${VENV:-.venv}
TORCH=${TORCH:-torch==2.13.0}
CPU_INDEX=${CPU_INDEX:-https://download.pytorch.org/whl/cpu}
export PIP_DISABLE_PIP_VERSION_CHECK=1

say() { echo "setup: $*" >&2; }
die() { say "$*"; exit 1; }
torch_of() { "$1" cmake/where_torch.py 2>/dev/null; }
is_environment() {
  [ -n "${CONDA_PREFIX:-}" ] || "$PYTHON" -c 'import sys; sys.exit(sys.prefix == sys.base_prefix)'
}

"$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null ||
  die "$PYTHON is not Python 3.10 or newer: run make PYTHON=/path/to/python"

if is_environment && torch_of "$PYTHON" >/dev/null; then
  PY=$("$PYTHON" -c 'import sys; print(sys.executable)')
else
  PY=$PWD/$VENV/bin/python
  case $VENV in /*) PY=$VENV/bin/python ;; esac
  if ! "$PY" -m pip --version >/dev/null 2>&1; then
    say "making $VENV"
    site=
    if torch_of "$PYTHON" >/dev/null; then site=--system-site-packages; fi
    "$PYTHON" -m venv $site "$VENV" >&2 || die "$PYTHON cannot make virtual environments (Debian: apt install python3-venv)"
  fi
  if ! torch_of "$PY" >/dev/null; then
    if [ -e /dev/nvidiactl ] || command -v nvidia-smi >/dev/null 2>&1; then
      say "NVIDIA GPU found, installing $TORCH"
      "$PY" -m pip install -q --no-compile "$TORCH" >&2
    else
      # The +cpu build sorts above the plain one, so it wins wherever an index offers it.
      # --retries 0: an index that cannot be reached costs nothing.
      say "no NVIDIA GPU, installing the CPU build of $TORCH"
      "$PY" -m pip install -q --no-compile --retries 0 --extra-index-url "$CPU_INDEX" "$TORCH" >&2
    fi
  fi
fi

stamp=$("$PY" -c 'import sys; print(sys.prefix)')/.tp_native_ready
before=$(sed -n 's/^extras: //p' "$stamp" 2>/dev/null || true)
extras=$(printf '%s\n' test hf $before "$@" | sort -u | paste -sd ' ' -)
state="tree: $PWD
torch: $(torch_of "$PY")
extras: $extras
modules: $(find python -name '*.py' | sort | cksum)"

# Folders are listed too: their times change when a file comes or goes. Python sources are used in place, but the
# list of modules is made at installation.
if [ "$(cat "$stamp" 2>/dev/null)" = "$state" ]; then
  newer=$(find CMakeLists.txt pyproject.toml README.md cmake _build csrc bench/*.cpp bench/*.h bench/gpu \
    scripts/setup.sh -name __pycache__ -prune -o -name '*.pyc' -o -newer "$stamp" -print 2>/dev/null |
    head -n 1)
  if [ -z "$newer" ]; then
    echo "$PY"
    exit 0
  fi
  say "$newer changed"
fi

has_tool() {  # a cmake or ninja that the build will find
  [ -x "$(dirname "$PY")/$1" ] || command -v "$1" >/dev/null 2>&1
}
tools="scikit-build-core>=1.1 pybind11>=3.0"
has_tool ninja || tools="$tools ninja"
cmake_version=$(PATH="$(dirname "$PY"):$PATH" cmake --version 2>/dev/null | sed -n 's/^cmake version //p')
case ${cmake_version:-none} in none|[012].*|3.[0-9].*|3.1?.*|3.2[0-3].*) tools="$tools cmake>=3.24" ;; esac

started=$(mktemp)
trap 'rm -f "$started"' EXIT
say "building tp_native with $PY"
# shellcheck disable=SC2086
"$PY" -m pip install -q --no-compile $tools >&2
"$PY" -m pip install -q --no-compile --no-build-isolation -e ".[$(echo "$extras" | tr ' ' ,)]" >&2
echo "$state" > "$stamp"
touch -r "$started" "$stamp"  # what changed during the build is newer
echo "$PY"
