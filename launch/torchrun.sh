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
HUNG_UP=129
INTERRUPTED=130
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

signalled= # the exit code of the first signal that has come
pid=
pass_on() {
    signalled=${signalled:-$2}
    [ -z "$pid" ] || kill -"$1" "$pid" 2>/dev/null
}
trap 'pass_on TERM "$TERMINATED"' TERM
trap 'pass_on HUP "$HUNG_UP"' HUP
trap 'signalled=${signalled:-$INTERRUPTED}' INT # the terminal sends it to torchrun too

# What a script starts in the background ignores Ctrl-C, unless that is taken back.
(trap - INT QUIT && exec "$TORCHRUN" "$@") <&0 &
pid=$!
case $signalled in "$TERMINATED" | "$HUNG_UP") kill "$pid" 2>/dev/null ;; esac # it came before there was a process
while :; do
    wait "$pid"
    own=$?
    kill -0 "$pid" 2>/dev/null || break # a signal ends `wait` before torchrun has ended
done

fail() {
    echo "launch/torchrun.sh: $1" >&2
    exit "$2"
}

code=$(cat "$MOE_DIST_EXIT_CODE_FILE")
if [ -z "$code" ]; then # no rank of moe-dist's has come to its end
    [ -z "$signalled" ] || [ "$own" -eq 0 ] || fail "ended by a signal" "$signalled"
    case "$own $* " in
        "1 "*) fail "a rank failed without an exit code of moe-dist's; see above" "$RANK_FAILED" ;;
        "0 "*" moe_dist "* | "0 "*"moe-dist "*) fail "the ranks ended before their work did" "$RANK_FAILED" ;;
    esac
elif [ "$own" -eq 1 ] && [ "$code" -eq 0 ]; then # 1 would mean a number out of tolerance
    fail "a rank died after its work was done; see above" "$RANK_FAILED"
fi
exit "${code:-$own}"
