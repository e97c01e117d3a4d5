#!/usr/bin/env bash
# Run `moe-dist ARGS...` as a Ray job on a running cluster, show its log and end with its exit code.
#
#   launch/submit.sh compare --model Qwen3-30B-A3B worlds=[4] --json
#
# RAY_ADDRESS          the dashboard's URL (default http://127.0.0.1:8265)
# RAY_AUTH_TOKEN_PATH  the file with the cluster's token (default ~/.ray/auth_token); or RAY_AUTH_TOKEN, the token itself
# RAY                  the `ray` command (default .venv/bin/ray, else the one on PATH)
# JOB_PYTHON           Python as the cluster's nodes call it (default python)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

BAD_INPUT=2

fail() {
    echo "launch/submit.sh: $1" >&2
    exit "$BAD_INPUT"
}

[ $# -gt 0 ] || fail "give a moe-dist command, such as: launch/submit.sh run --ep 2"

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

# The token goes with every request: first ask without it. What can be proven of a service on this machine is whose it
# is; of any other, that it is a Ray dashboard which wants a token (README.md, "Security").
problem=$("$python" launch/service.py dashboard "$address") || fail "no token was sent: $problem"

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
code=0
"$RAY" job submit --address "$address" --submission-id "$job" --working-dir . --runtime-env-json "$environment" \
    -- "${JOB_PYTHON:-python}" -m moe_dist "$@" || code=$?
[ "$code" -ne 0 ] || exit 0

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
