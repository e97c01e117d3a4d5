#!/usr/bin/env bash
# A Ray head with token authentication on this machine, for `launch/submit.sh`.
#
#   launch/head.sh start [OPTIONS of ray start...]   in the background; returns when jobs can be submitted
#   launch/head.sh run [OPTIONS of ray start...]     in the foreground
#   launch/head.sh stop                              end it, by its process id
#
# HEAD_DIR             its pid file, log and Ray's temporary files (default /tmp/moe-dist-UID; Ray needs a short path)
# DASHBOARD_PORT       where jobs are submitted, on the loopback interface only (default 8265)
# RAY_AUTH_TOKEN_PATH  the file with its token (default ~/.ray/auth_token); made if it is missing
# RAY                  the `ray` command (default .venv/bin/ray, else the one on PATH)
#
# Ray's own services (GCS, raylet) listen on every interface, whatever the options: the token is what guards them.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

START_TIMEOUT_S=120
STOP_TIMEOUT_S=40 # Ray drains for up to 30 s
HEAD_DIR=${HEAD_DIR:-/tmp/moe-dist-$(id -u)}
PORT=${DASHBOARD_PORT:-8265}
PID_FILE=$HEAD_DIR/head.pid
LOG=$HEAD_DIR/head.log
venv_ray=$here/../.venv/bin/ray
RAY=${RAY:-$([ -x "$venv_ray" ] && echo "$venv_ray" || command -v ray || true)}
export RAY_TMPDIR=$HEAD_DIR RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0
export RAY_AUTH_TOKEN_PATH=${RAY_AUTH_TOKEN_PATH:-$HOME/.ray/auth_token}

fail() {
    echo "launch/head.sh: $1" >&2
    exit "${2:-2}"
}

running() { # the pid, if that process is still a Ray head: after a reboot the number may be anyone's
    local pid
    pid=$(cat "$PID_FILE" 2>/dev/null) || return 1
    tr '\0' ' ' 2>/dev/null <"/proc/$pid/cmdline" | grep -q -e "start --head --block" -e "head.sh run" || return 1
    echo "$pid"
}

prepare() {
    [ -n "$RAY" ] && command -v "$RAY" >/dev/null || fail "no \`ray\` command: run \`make compare\` once, or set RAY"
    umask 077
    mkdir -p "$HEAD_DIR" "$(dirname "$RAY_AUTH_TOKEN_PATH")"
    [ -O "$HEAD_DIR" ] || fail "$HEAD_DIR belongs to somebody else; set HEAD_DIR"
    ! pid=$(running) || fail "a head is running already, process $pid ($PID_FILE)"
    ! (exec 3<>"/dev/tcp/127.0.0.1/$PORT") 2>/dev/null ||
        fail "the port is taken: something listens at 127.0.0.1:$PORT already; set DASHBOARD_PORT"
    if [ -z "${RAY_AUTH_TOKEN:-}" ] && [ ! -s "$RAY_AUTH_TOKEN_PATH" ]; then
        od -An -N32 -tx1 /dev/urandom | tr -d ' \n' >"$RAY_AUTH_TOKEN_PATH"
    fi
    if [ -z "${RAY_AUTH_TOKEN:-}" ] && [ -n "$(find -L "$RAY_AUTH_TOKEN_PATH" -perm /077)" ]; then
        chmod 600 "$RAY_AUTH_TOKEN_PATH" || fail "$RAY_AUTH_TOKEN_PATH can be read by others: give a file of your own"
        echo "launch/head.sh: $RAY_AUTH_TOKEN_PATH could be read by others; it is private now" >&2
    fi
}

run() {
    prepare
    # `python` in a job's entry point is found through the head's PATH: it must be the one that Ray runs in.
    PATH=$(cd "$(dirname "$(command -v "$RAY")")" && pwd):$PATH
    export PATH
    unset RAY_ADDRESS
    echo $$ >"$PID_FILE"
    exec "$RAY" start --head --block --disable-usage-stats --dashboard-host=127.0.0.1 --dashboard-port="$PORT" \
        --dashboard-agent-listen-port=0 --min-worker-port=0 --max-worker-port=0 "$@"
}

start() {
    prepare
    : >"$LOG"
    setsid "${BASH_SOURCE[0]}" run "$@" >"$LOG" 2>&1 </dev/null &
    local pid=$! waited=0
    until grep -q "Ray runtime started" "$LOG" && (exec 3<>"/dev/tcp/127.0.0.1/$PORT") 2>/dev/null; do
        kill -0 "$pid" 2>/dev/null || fail "the head ended at once: $(tail -n 5 "$LOG")" 3
        [ $((waited += 1)) -le "$START_TIMEOUT_S" ] || {
            kill "$pid"
            fail "the head did not come up within $START_TIMEOUT_S s; see $LOG" 3
        }
        sleep 1
    done
    # That something answers there is no proof: the token of this cluster would go to whoever does.
    problem=$("$(dirname "$(command -v "$RAY")")/python" "$here/service.py" belongs "$PORT" "$pid") || {
        kill "$pid"
        fail "$problem" 3
    }
    echo "Ray head is up: process $pid, log $LOG"
    echo "submit: RAY_ADDRESS=http://127.0.0.1:$PORT RAY_AUTH_TOKEN_PATH=$RAY_AUTH_TOKEN_PATH launch/submit.sh run --ep 2"
    echo "stop:   HEAD_DIR=$HEAD_DIR launch/head.sh stop (or: kill $pid)"
}

stop() {
    local pid waited=0
    pid=$(running) || fail "no head of $PID_FILE is running"
    kill "$pid" # SIGTERM: it ends its own services and workers before itself
    while kill -0 "$pid" 2>/dev/null; do
        [ $((waited += 1)) -le "$STOP_TIMEOUT_S" ] || {
            echo "launch/head.sh: killing process $pid" >&2
            kill -KILL "$pid" # its services end when they miss it; some agents only minutes later
            break
        }
        sleep 1
    done
    rm -f "$PID_FILE"
}

command=${1:-}
[ $# -eq 0 ] || shift
case $command in
    run) run "$@" ;;
    start) start "$@" ;;
    stop) stop ;;
    *) fail "give one of start, run, stop" ;;
esac
