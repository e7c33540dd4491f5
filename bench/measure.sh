#!/bin/sh
# usage: measure.sh PEERS_DIR
# Measures everything in bench/results on the CPU, one program after another. The machine should do
# nothing else. PEERS_DIR: filled by install_peers.sh. PYTHON: default python3.
set -eu
[ $# = 1 ] || { sed -n 2,4p "$0"; exit 2; }
PEERS=$1
BENCH=$(cd "$(dirname "$0")" && pwd)
RESULTS=$BENCH/results
PYTHON=${PYTHON:-python3}

echo "measure: load $(cut -d ' ' -f 1 /proc/loadavg), should be below 0.3"
microbench=$(PYTHONPATH=$BENCH "$PYTHON" -c 'import bench_collectives as b; print(b.find_microbench())')
"$microbench" --json "$RESULTS/microbench_cpu.json"
"$PYTHON" "$BENCH/bench_collectives.py" --json "$RESULTS/collectives_cpu.json"
"$PYTHON" "$BENCH/bench_overhead.py" --json "$RESULTS/overhead_cpu.json"
"$PYTHON" "$BENCH/bench_linear.py" --json "$RESULTS/linear_cpu.json"
"$PYTHON" "$BENCH/bench_peers.py" --peers "$PEERS" --ranks 2,4 \
  --json "$RESULTS/collectives_peers_cpu.json"
"$PYTHON" "$BENCH/plot_collectives.py" "$RESULTS/collectives_peers_cpu.json"
