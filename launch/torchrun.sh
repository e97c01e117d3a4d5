#!/usr/bin/env bash
# torchrun with the given arguments, ending with moe-dist's own exit code: torchrun's is 1 whatever a rank ended with.
#
#   launch/torchrun.sh --nproc-per-node 4 -m moe_dist run --runtime torchrun --ep 4
#
# TORCHRUN  the `torchrun` command (default .venv/bin/torchrun, else the one on PATH)
set -uo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

BAD_INPUT=2
RANK_FAILED=4
TERMINATED=143

venv_torchrun=$here/../.venv/bin/torchrun
TORCHRUN=${TORCHRUN:-$([ -x "$venv_torchrun" ] && echo "$venv_torchrun" || command -v torchrun || true)}
[ $# -gt 0 ] && [ -n "$TORCHRUN" ] && command -v "$TORCHRUN" >/dev/null || {
    echo "launch/torchrun.sh: give torchrun's arguments, and set TORCHRUN if there is no torchrun on PATH" >&2
    exit "$BAD_INPUT"
}

MOE_DIST_EXIT_CODE_FILE=$(mktemp) || exit 3 # the rank that speaks for all leaves its code here; mode 600
export MOE_DIST_EXIT_CODE_FILE
trap 'rm -f "$MOE_DIST_EXIT_CODE_FILE"' EXIT

terminated=
"$TORCHRUN" "$@" <&0 &
pid=$!
trap 'terminated=yes; kill -TERM "$pid" 2>/dev/null' TERM
trap : INT # the terminal sends it to torchrun too
while :; do
    wait "$pid"
    own=$?
    kill -0 "$pid" 2>/dev/null || break # a signal ends `wait` before torchrun has ended
done

code=$(cat "$MOE_DIST_EXIT_CODE_FILE")
if [ "$own" -eq 0 ]; then
    exit "${code:-0}"
elif [ -n "$terminated" ] && [ -z "$code" ]; then
    exit "$TERMINATED"
elif [ "$own" -eq 1 ] && [ "${code:-0}" -eq 0 ]; then
    # A rank died before it could say why, or after its work was done. 1 would mean a number out of tolerance.
    echo "launch/torchrun.sh: a rank failed without an exit code of moe-dist's; see above" >&2
    exit "$RANK_FAILED"
fi
exit "${code:-$own}"
