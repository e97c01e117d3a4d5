#!/usr/bin/env bash
# `moe-dist ARGS...` on the nodes of a Slurm allocation: a Ray head on the first one, workers on the others, then the job.
#
#   sbatch --nodes=2 --gpus-per-node=8 launch/slurm.sh compare worlds=[16] ray.strategy=PACK --out results/slurm.json
#
# Submit it in the checkout: batch scripts are copied, and this one finds the rest in the folder of the submission, which
# all nodes must see. It ends with moe-dist's exit code, and everything it has started ends with it.
#
# PYTHON        Python on every node, with moe-dist's dependencies (default .venv/bin/python of the checkout)
# HEAD_ADDRESS  the first node's address that the others reach (default: what its name resolves to)
#SBATCH --job-name=moe-dist
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
set -euo pipefail

START_TIMEOUT_S=${START_TIMEOUT_S:-120}
BAD_INPUT=2
TOO_LITTLE=3

fail() {
    echo "launch/slurm.sh: $1" >&2
    exit "$2"
}

[ $# -gt 0 ] || fail "give a moe-dist command, such as: sbatch launch/slurm.sh run --ep 16 ray.strategy=PACK" "$BAD_INPUT"
[ -n "${SLURM_JOB_ID:-}" ] && [ -n "${SLURM_JOB_NODELIST:-}" ] ||
    fail "runs in a Slurm job: sbatch launch/slurm.sh ..." "$BAD_INPUT"
cd "${SLURM_SUBMIT_DIR:-.}"
[ -f launch/nodes.py ] || fail "$PWD is not the checkout: submit it there" "$BAD_INPUT"
PYTHON=${PYTHON:-$PWD/.venv/bin/python}
command -v "$PYTHON" >/dev/null || fail "PYTHON=$PYTHON is not there" "$BAD_INPUT"
ray=$(dirname "$(command -v "$PYTHON")")/ray

mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
[ ${#nodes[@]} -gt 0 ] || fail "scontrol knows no node of SLURM_JOB_NODELIST=$SLURM_JOB_NODELIST" "$TOO_LITTLE"
head=${nodes[0]} others=$((${#nodes[@]} - 1))
address=${HEAD_ADDRESS:-}
if [ -z "$address" ]; then
    address=$(getent ahostsv4 "$head" | awk 'NR == 1 { print $1 }')
    case $address in # some systems give a machine's own name to its loopback interface
        '' | 127.*) address=$(srun --overlap --nodes=1 --ntasks=1 --nodelist="$head" hostname -I | awk '{ print $1 }') ;;
    esac
fi
[ -n "$address" ] || fail "$head has no address; set HEAD_ADDRESS" "$TOO_LITTLE"
port=$((20000 + SLURM_JOB_ID % 20000)) # two jobs of one node must not meet

# The token reaches the nodes in the environment, which srun passes on; a command line could be read by others.
RAY_AUTH_TOKEN=$(od -An -N32 -tx1 /dev/urandom | tr -d ' \n')
export RAY_AUTH_TOKEN RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0
export RAY_TMPDIR=/tmp/moe-dist-$SLURM_JOB_ID # of each node; Ray's sockets need a short path
unset RAY_ADDRESS RAY_AUTH_TOKEN_PATH

started=()
end() {
    trap - EXIT INT TERM
    [ ${#started[@]} -eq 0 ] || kill "${started[@]}" 2>/dev/null || true
    wait || true
    srun --overlap --nodes=${#nodes[@]} --ntasks-per-node=1 rm -rf "$RAY_TMPDIR" || true
}
trap end EXIT
trap 'exit 143' TERM
trap 'exit 130' INT

alive() {
    for pid in "${started[@]}"; do
        kill -0 "$pid" 2>/dev/null || fail "a node's Ray ended at once; its words are above" "$TOO_LITTLE"
    done
}

srun --overlap --nodes=1 --ntasks=1 --nodelist="$head" --export=ALL \
    "$ray" start --head --block --disable-usage-stats --include-dashboard=false --node-ip-address="$address" --port="$port" &
started+=($!)
deadline=$((SECONDS + START_TIMEOUT_S))
until (exec 3<>"/dev/tcp/$address/$port") 2>/dev/null; do
    alive
    [ "$SECONDS" -le "$deadline" ] ||
        fail "no Ray head at $address:$port ($head) within $START_TIMEOUT_S s" "$TOO_LITTLE"
    sleep 0.2
done
if [ "$others" -gt 0 ]; then
    srun --overlap --nodes="$others" --ntasks="$others" --ntasks-per-node=1 --exclude="$head" --export=ALL \
        "$ray" start --block --disable-usage-stats --address="$address:$port" &
    started+=($!)
fi
"$PYTHON" launch/nodes.py "$address:$port" "${#nodes[@]}" "$START_TIMEOUT_S" || exit "$TOO_LITTLE"
alive

code=0
RAY_ADDRESS=$address:$port "$PYTHON" -m moe_dist "$@" & # in the background: bash runs traps only between commands
job=$!
trap 'kill "$job" 2>/dev/null' TERM INT
wait "$job" || code=$?
while kill -0 "$job" 2>/dev/null; do # a signal has ended `wait`, and moe-dist is saving what it has
    code=0
    wait "$job" || code=$?
done
exit "$code"
