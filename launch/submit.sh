#!/usr/bin/env bash
# Run `moe-dist ARGS...` as a Ray job on a running cluster, show its log and end with its exit code.
#
#   launch/submit.sh compare --model Qwen3-30B-A3B worlds=[4] --out results/qwen3.json
#   launch/submit.sh --fetch JOB --out FILE    the results of a job that went on when this was interrupted
#
# The file of --out is written here: the job's log carries it home (launch/carry.py). Other files that a command writes
# stay on the cluster.
#
# RAY_ADDRESS          the dashboard's URL (default http://127.0.0.1:8265)
# RAY_AUTH_TOKEN_PATH  the file with the cluster's token (default ~/.ray/auth_token); or RAY_AUTH_TOKEN, the token itself
# RAY                  the `ray` command (default .venv/bin/ray, else the one on PATH)
# JOB_PYTHON           Python as the cluster's nodes call it (default python)
set -euo pipefail
started_in=$PWD
cd "$(dirname "${BASH_SOURCE[0]}")/.."

BAD_INPUT=2

fail() {
    echo "launch/submit.sh: $1" >&2
    exit "$BAD_INPUT"
}

[ $# -gt 0 ] || fail "give a moe-dist command, such as: launch/submit.sh run --ep 2"

# --out names a file here, from where this was started; everything else is the job's.
arguments=() out='' fetch='' resume='' profile='' traces=''
value() { # of the flag $1, which follows it
    [ -n "${2:-}" ] || fail "$1: give $3"
    echo "$2"
}
lasting() { # the flag or key $1 names $2, which is to be there when the job has ended
    case $2 in
        /*) ;;
        *) fail "$1 ${2:-''}: would lie in the job's own folder, which ends with it; give an absolute path of the cluster's" ;;
    esac
}
while [ $# -gt 0 ]; do
    case $1 in
        --lines | --record-routing | --result-filename | --profile-output-dir) lasting "$1" "${2:-}" ;;
        --lines=* | --record-routing=* | --result-filename=* | --profile-output-dir=* | record_routing=*)
            lasting "${1%%=*}" "${1#*=}"
            ;;
    esac
    case $1 in
        --profile) profile=1 ;;
        --profile-output-dir*) traces=1 ;;
    esac
    case $1 in
        --out | --out=*)
            [ -z "$out" ] || fail "--out is given twice"
            [ "$1" != --out ] || { set -- "--out=${2:-}" "${@:3}"; }
            out=$(value --out "${1#--out=}" "a file here")
            ;;
        --fetch) fetch=$(value --fetch "${2:-}" "a job's id") && shift ;;
        --resume) resume=1 ;;
        *) arguments+=("$1") ;;
    esac
    shift
done
case $out in '' | /*) ;; *) out=$started_in/$out ;; esac
[ -z "$resume" ] || fail "--resume: the job can't read a results file of this machine; submit what is missing anew"
case ${arguments[0]:-} in tune) [ -z "$out" ] || fail "--out: of tune it is a folder, and one file comes home" ;; esac
[ -z "$profile" ] || [ -n "$traces" ] || fail "--profile: give --profile-output-dir too, an absolute path of the cluster's"
[ -z "$fetch" ] || [ -n "$out" ] || fail "--fetch $fetch: give --out FILE too"
[ -z "$fetch" ] || [ ${#arguments[@]} -eq 0 ] || fail "--fetch $fetch: takes no command (${arguments[*]})"

RAY=${RAY:-$([ -x .venv/bin/ray ] && echo .venv/bin/ray || command -v ray || true)}
[ -n "$RAY" ] && command -v "$RAY" >/dev/null || fail "no \`ray\` command: run \`make compare\` once, or set RAY"
python=$(dirname "$(command -v "$RAY")")/python

address=${RAY_ADDRESS:-http://127.0.0.1:8265}
case $address in
    http://* | https://*) ;;
    *) fail "RAY_ADDRESS=$address is no dashboard URL; jobs go to the dashboard, such as http://127.0.0.1:8265" ;;
esac

[ "${RAY_AUTH_MODE:-token}" = token ] || fail "RAY_AUTH_MODE=$RAY_AUTH_MODE: only clusters with token authentication"
export RAY_AUTH_MODE=token
token_file=${RAY_AUTH_TOKEN_PATH:-$HOME/.ray/auth_token}
[ -n "${RAY_AUTH_TOKEN:-}" ] || [ -s "$token_file" ] ||
    fail "no token: copy the cluster's into $token_file, or set RAY_AUTH_TOKEN_PATH or RAY_AUTH_TOKEN"

[ -z "$out" ] || "$python" launch/carry.py check "$out" || exit "$BAD_INPUT"

# The token goes with every request: first ask without it. What can be proven of a service on this machine is whose it
# is; of any other, that it is a Ray dashboard which wants a token (README.md, "Security").
problem=$("$python" launch/service.py dashboard "$address") || fail "no token was sent: $problem"

[ -z "$fetch" ] || exec "$python" launch/carry.py fetch "$out" "$address" "$fetch"

# The copy on the cluster has no history, so the commit travels with the job: as moe_dist.bench.results.commit() words it.
commit=${MOE_DIST_COMMIT:-}
if [ -z "$commit" ]; then
    commit=$(git rev-parse HEAD 2>/dev/null || echo unknown)
    [ -z "$(git status --porcelain --untracked-files=no 2>/dev/null)" ] || commit+=+changes
fi

# `ray job submit` takes a runtime environment from a file or as JSON, not from both.
environment=$("$python" - "$commit" <<'PYTHON'
import json, sys, yaml
environment = yaml.safe_load(open("launch/runtime_env.yaml"))
environment.setdefault("env_vars", {})["MOE_DIST_COMMIT"] = sys.argv[1]
print(json.dumps(environment))
PYTHON
)

job=moe-dist-$(date -u +%Y%m%d-%H%M%S)-$$
code=0 brought=0
submit() {
    "$RAY" job submit --address "$address" --submission-id "$job" --working-dir . --runtime-env-json "$environment" -- "$@"
}
if [ -z "$out" ]; then
    submit "${JOB_PYTHON:-python}" -m moe_dist "${arguments[@]}" || code=$?
else
    codes=(0 0)
    submit "${JOB_PYTHON:-python}" launch/carry.py run "$(basename "$out")" "${arguments[@]}" |
        "$python" launch/carry.py home "$out" "$address" "$job" || codes=("${PIPESTATUS[@]}")
    code=${codes[0]} brought=${codes[1]}
fi
[ "$code" -ne 0 ] || exit "$brought" # 0, or 6: the job ended well, and its results are not here

# Ray says 1 for every failure; moe-dist's codes say more (2 bad input, 3 too little machine, 4 a rank failed, 5 cluster
# lost), and 1 is a number out of tolerance. So what has no code of moe-dist's gets one here.
exact=$("$python" - "$address" "$job" 2>/dev/null <<'PYTHON' || true
import sys
from ray.exceptions import AuthenticationError
from ray.job_submission import JobStatus, JobSubmissionClient
try:
    info = JobSubmissionClient(sys.argv[1]).get_job_info(sys.argv[2])
except AuthenticationError:
    print(2)
except ConnectionError:
    print(5)
else:
    ended = info.driver_exit_code
    if info.status == JobStatus.STOPPED:
        print(143)
    elif ended is None:  # the cluster failed it before or after moe-dist ran
        print(5)
    else:
        print(ended if ended >= 0 else 128 - ended)
PYTHON
)
[ "${exact:-0}" -ne 0 ] || exact=5 # the cluster can't tell any more, or Ray failed a job that ended well
exit "$exact"
