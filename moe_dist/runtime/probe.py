"""Whether a Ray head answers, asked by a process that can be killed: Ray's own clients wait for minutes."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from dataclasses import dataclass

from moe_dist.errors import ConfigError

LEGAL = "host:port of a running head, or auto"
CONNECT_TIMEOUT_S = 5.0

# Without authentication first where no mode is set: a token goes only to a service that speaks as a Ray head and asks.
_ASK = """
import json, os, sys
address, tell = sys.argv[1], os.dup(1)
os.dup2(2, 1)
import ray
from ray._private import services
from ray._raylet import AuthenticationTokenLoader, Config, GcsClient
from ray.exceptions import AuthenticationError
def answer(**found):
    os.write(tell, json.dumps(found).encode()); os._exit(0)
try:
    if address == "auto":
        address = services.canonicalize_bootstrap_address(address)
except BaseException as error:
    answer(problem=f"{type(error).__name__}: {error}")
wanted = False
while True:
    try:
        GcsClient(address=address)
        answer(address=address, token_wanted=wanted)
    except AuthenticationError as error:
        has = AuthenticationTokenLoader.instance().has_token(ignore_auth_mode=True)
        if wanted or not has or "RAY_AUTH_MODE" in os.environ:
            answer(refused=True, has_token=has)
        os.environ["RAY_AUTH_MODE"] = "token"
        Config.initialize("")
        AuthenticationTokenLoader.instance().reset_cache()
        wanted = True
    except BaseException as error:
        answer(problem=f"{type(error).__name__}: {error}")
"""


@dataclass(frozen=True)
class Found:
    """A head that answered. `token_wanted`: it wants a token, there is one, and RAY_AUTH_MODE has to be set for it."""

    address: str
    token_wanted: bool


def probe(address: str, timeout_s: float) -> Found:
    """Raises ConfigError within `timeout_s` if no Ray head answers there, or if it refuses this user's token."""
    if "://" in address:
        raise ConfigError("ray.address", address, "can't be joined: ranks need a driver inside the cluster", LEGAL)
    if address != "auto":
        _reach(address)
    try:
        asked = subprocess.run(
            [sys.executable, "-c", _ASK, address], stdin=subprocess.DEVNULL, capture_output=True, timeout=timeout_s
        )
        found = json.loads(asked.stdout)
    except subprocess.TimeoutExpired:
        rule = f"something listens there, but did not answer as a Ray head within {timeout_s:g} s"
        raise ConfigError("ray.address", address, rule, LEGAL) from None
    except ValueError:
        said = (asked.stderr.decode(errors="replace").strip().splitlines() or ["no answer"])[-1]
        raise ConfigError("ray.address", address, f"can't be joined: {said[:300]}", LEGAL) from None
    if "problem" in found:
        said = found["problem"].strip().splitlines()[0][:300]
        raise ConfigError("ray.address", address, f"can't be joined: {said}", LEGAL)
    if found.get("refused"):
        raise ConfigError("ray.address", address, _refusal(found["has_token"]), LEGAL)
    return Found(found["address"], found["token_wanted"])


def _refusal(has_token: bool) -> str:
    mode = os.environ.get("RAY_AUTH_MODE")
    if mode is not None and mode != "token":
        return f"can't be joined: it wants a token, but RAY_AUTH_MODE is {mode!r}; set RAY_AUTH_MODE=token"
    if has_token:
        return "can't be joined: it refuses the token of RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token"
    return "can't be joined: it wants a token; set RAY_AUTH_TOKEN_PATH to the file with it, or RAY_AUTH_TOKEN"


def _reach(address: str) -> None:
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_TIMEOUT_S).close()
    except (OSError, ValueError, OverflowError) as error:
        said = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ConfigError("ray.address", address, f"can't be joined: {said}", LEGAL) from error
