#!/bin/sh
# usage: gpu_check.sh [--dry-run]
# All checks that need an NVIDIA GPU, and the benchmarks, in under ten minutes and without a network: on a machine
# with torch, nvcc, cmake, ninja, pybind11, scikit-build-core and pytest. Figures go to bench/results/, named by the
# device. --dry-run: every step up to the device, where there is none.
# An active environment that has torch is installed into; else $VENV, if it has torch; else a new one over the
# system's packages, in build/gpu-env.
set -eu
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
VENV=${VENV:-.venv}
TIME_S=${TIME_S:-570}
export PIP_DISABLE_PIP_VERSION_CHECK=1
# Kernels of ranks that share a GPU wait for each other: no two in one queue, and none loaded meanwhile.
export CUDA_DEVICE_MAX_CONNECTIONS=32 CUDA_MODULE_LOADING=EAGER

die() { echo "gpu-check: $*" >&2; exit 1; }
torch_of() { "$1" cmake/where_torch.py >/dev/null 2>&1; }

find_python() {
  if [ -n "${CONDA_PREFIX:-}" ] || "$PYTHON" -c 'import sys; sys.exit(sys.prefix == sys.base_prefix)'; then
    if torch_of "$PYTHON"; then "$PYTHON" -c 'import sys; print(sys.executable)'; return; fi
  fi
  if torch_of "$VENV/bin/python"; then echo "$VENV/bin/python"; return; fi
  torch_of "$PYTHON" || die "$PYTHON has no torch: run make setup where there is a network"
  [ -x build/gpu-env/bin/python ] || "$PYTHON" -m venv --system-site-packages --without-pip build/gpu-env >&2
  echo "$PWD/build/gpu-env/bin/python"
}

# ---- the steps; each runs in a process of its own: gpu_check.sh --run NAME [ARGUMENT]

run_module() {
  "$PY" -m pip install -q --no-compile --no-index --no-deps --no-build-isolation -e .
  "$PY" -c 'from tp_native import _C; assert _C.has_cuda_kernels(), "built without the CUDA kernels: is nvcc on PATH?"'
}

run_tests_built() {
  cmake --log-level=WARNING -S . -B build/csrc -G Ninja -DTPN_MODULE=OFF -DTPN_TESTS=ON -DTPN_CUDA=ON \
    -DCMAKE_CXX_FLAGS_RELEASE=-O2 -DPython_EXECUTABLE="$PY"
  cmake --build build/csrc
}

# pip's build and the tests' have nothing in common but ccache: both at once.
run_build() {
  run_module &
  module=$!
  status=0
  run_tests_built || status=$?
  wait "$module" || status=$?
  return "$status"
}

# Those that need no GPU are .ci/run's. A test that is skipped beside a GPU lacks something else: a failure.
run_ctest() {
  out=build/gpu-check/ctest.txt
  status=0
  LD_LIBRARY_PATH=$FOLDERS${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH} \
    ctest --test-dir build/csrc --output-on-failure -R '_gpu$|^test_cuda_' > "$out" 2>&1 || status=$?
  cat "$out"
  [ "$status" -eq 0 ] || return "$status"
  if grep -q '\*\*\*Skipped' "$out"; then
    echo "skipped: $(sed -n 's/.*Test *#[0-9]*: \([^ ]*\) .*Skipped.*/\1/p' "$out" | paste -sd ' ' -)"
    if [ "$DEVICE" = none ]; then return 77; fi
    return 1
  fi
}

# addopts and their --strict-config: pytest-timeout, which has a setting here, may not be on the machine.
run_pytest() {
  out=build/gpu-check/pytest.txt
  status=0
  "$PY" -m pytest -o addopts= -p no:cacheprovider -ra -q --tb=short -o faulthandler_timeout=90 -m cuda \
    tests/test_cuda.py > "$out" 2>&1 || status=$?
  cat "$out"
  [ "$status" -eq 0 ] || return "$status"
  if ! grep -q ' passed' "$out"; then return 77; fi
}

run_microbench() {
  build/csrc/tpn_microbench --gpu --libraries "$FOLDERS" --commit "$COMMIT" \
    --json "$RESULTS/microbench_gpu_$DEVICE.json"
}

run_bench() {
  "$PY" bench/bench_gpu.py --commit "$COMMIT" --json "$RESULTS/gpu_$DEVICE.json"
}

# compute-sanitizer does not know every device: then it is one line.
run_sanitizer() {
  tool=$(command -v compute-sanitizer || true)
  if [ -z "$tool" ] && [ -n "${CUDA_HOME:-}" ]; then tool=$CUDA_HOME/bin/compute-sanitizer; fi
  if [ ! -x "$tool" ]; then echo "no compute-sanitizer on PATH or in CUDA_HOME"; return 77; fi
  found=0
  for test in build/csrc/test_cuda_kernels*; do
    [ -f "$test" ] && [ -x "$test" ] || continue
    found=1
    status=0
    timeout -k 5 80 "$tool" --tool "$1" --error-exitcode 99 "$test" > "build/gpu-check/$1.txt" 2>&1 || status=$?
    cat "build/gpu-check/$1.txt"
    if grep -qi 'not supported\|unable to\|no attachable process' "build/gpu-check/$1.txt"; then
      echo "compute-sanitizer refuses: $(grep -i 'not supported\|unable to\|no attachable' "build/gpu-check/$1.txt" | head -n 1)"
      return 77
    fi
    case $status in  # without the sanitizer ctest has seen it end
      124 | 137) echo "did not end under $1, which may run one kernel at a time, after: $(grep -c '^ok' "build/gpu-check/$1.txt") tests passed"
        return 77 ;;
      0) ;;
      *) return "$status" ;;
    esac
  done
  if [ "$found" -eq 0 ]; then echo "no build/csrc/test_cuda_kernels*"; return 77; fi
}

if [ "${1:-}" = --run ]; then
  shift
  name=$1
  shift
  "run_$name" "$@"
  exit
fi

# ---- all of them

is_dry=
case "${1:-}" in
  '') ;;
  --dry-run) is_dry=1 ;;
  *) die "unknown argument $1: gpu_check.sh [--dry-run]" ;;
esac
if [ -n "$is_dry" ]; then
  DEVICE=none RESULTS=build/gpu-check
else
  names=$(nvidia-smi --query-gpu=name --format=csv,noheader 2>/dev/null) && [ -n "$names" ] ||
    die "no NVIDIA GPU on this machine; this target runs the device tests"
  echo "$names"
  DEVICE=$(echo "$names" | head -n 1 | sed 's/^NVIDIA //' | tr 'A-Z ' 'a-z_' | tr -cd 'a-z0-9_-')
  RESULTS=bench/results
fi
mkdir -p build/gpu-check "$RESULTS"
PY=$(find_python)
FOLDERS=$("$PY" scripts/cuda_folders.py)
COMMIT=${COMMIT:-$(git rev-parse HEAD 2>/dev/null || echo unknown)}
PATH=$(dirname "$PY"):$PATH
export PY FOLDERS DEVICE RESULTS COMMIT PATH

# shellcheck source=scripts/steps.sh
. scripts/steps.sh
STEPS_DEADLINE=$(($(date +%s) + TIME_S)) STEPS_LOGS=build/gpu-check
me=scripts/gpu_check.sh
step build 300 sh "$me" --run build
step ctest 120 sh "$me" --run ctest
step pytest 180 sh "$me" --run pytest
step microbench 150 sh "$me" --run microbench
step bench 150 sh "$me" --run bench
step memcheck 90 sh "$me" --run sanitizer memcheck
step racecheck 90 sh "$me" --run sanitizer racecheck
steps_end
