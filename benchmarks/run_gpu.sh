#!/usr/bin/env bash
# The GPU tests and the recorded comparison in one go, on a machine with NVIDIA GPUs:
#
#   benchmarks/run_gpu.sh OUT_DIR [EXPERIMENT] [moe-dist arguments...]
#
# Runs tests/gpu, then the experiment (default configs/experiments/h200x4.yaml) as an authenticated Ray job on a head of
# its own. OUT_DIR gets the tests' log and rows, the job's log and the results file; the exit code is the first failure's.
# PYTEST_ARGS: more arguments for the tests; SKIP_TESTS=1 leaves them out.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
[ $# -gt 0 ] || { echo "benchmarks/run_gpu.sh: give the folder for the results" >&2; exit 2; }
out=$(mkdir -p "$1" && cd "$1" && pwd)
experiment=${2:-configs/experiments/h200x4.yaml}
shift $(($# > 1 ? 2 : 1))
python=$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)
code=0

if [ -z "${SKIP_TESTS:-}" ]; then
    GPU_TEST_ROWS=$out "$python" -m pytest -q -m gpu tests/gpu ${PYTEST_ARGS:-} >"$out/tests.log" 2>&1 || code=$?
    tail -n 15 "$out/tests.log"
fi

export HEAD_DIR=${HEAD_DIR:-/tmp/moe-dist-bench-$(id -u)} DASHBOARD_PORT=${DASHBOARD_PORT:-8265}
export RAY_AUTH_TOKEN_PATH=${RAY_AUTH_TOKEN_PATH:-$HEAD_DIR/token} RAY_ADDRESS=http://127.0.0.1:$DASHBOARD_PORT
launch/head.sh start --num-gpus="$(nvidia-smi -L | wc -l)"
trap 'launch/head.sh stop' EXIT
name=$(basename "$experiment" .yaml)
job=0
launch/submit.sh compare "$experiment" --out "$out/$name.json" "$@" >"$out/$name.log" 2>&1 || job=$?
tail -n 12 "$out/$name.log"
echo "tests: exit code $code; job: exit code $job; results in $out"
[ "$code" -ne 0 ] || code=$job
exit "$code"
