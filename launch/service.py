"""Who listens at a port: asked by head.sh and submit.sh before they trust it. Standard library only.

    service.py belongs PORT PID   is what listens on 127.0.0.1:PORT the process PID, or started by it?
    service.py dashboard URL      is it a Ray dashboard that wants a token, and on this machine nobody else's?

Exit code 0 if so. Otherwise 1 and a line that says what is there instead. No token is sent.
"""

from __future__ import annotations

import os
import sys
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

LISTEN = "0A"
TIMEOUT_S = 10


def listeners(port: int) -> list[tuple[int, int]]:
    """(user id, inode) of each socket of this machine that listens at a port, from /proc/net/tcp and tcp6."""
    found = []
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        try:
            lines = Path(table).read_text().splitlines()[1:]
        except OSError:
            continue
        for fields in map(str.split, lines):
            if fields[3] == LISTEN and int(fields[1].rpartition(":")[2], 16) == port:
                found.append((int(fields[7]), int(fields[9])))
    return found


def owners(inode: int) -> list[int]:
    """The processes that hold a socket."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if any(os.readlink(link) == f"socket:[{inode}]" for link in (process / "fd").iterdir()):
                found.append(int(process.name))
        except OSError:  # ended, or somebody else's
            continue
    return found


def descends(pid: int, ancestor: int) -> bool:
    while pid > 1:
        if pid == ancestor:
            return True
        try:
            pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            return False
    return False


def belongs(port: int, ancestor: int) -> str | None:
    there = listeners(port)
    if not there:
        return f"nothing listens at port {port}"
    for _, inode in there:
        if not any(descends(pid, ancestor) for pid in owners(inode)):
            return f"the port is taken: what listens at {port} was not started by this head"
    return None


def dashboard(url: str) -> str | None:
    place = urllib.parse.urlsplit(url)
    if place.hostname in ("localhost", "::1") or (place.hostname or "").startswith("127."):
        port = place.port or (443 if place.scheme == "https" else 80)
        strangers = {user for user, _ in listeners(port)} - {os.getuid(), 0}
        if strangers:
            return f"what listens at {url} belongs to another user (id {min(strangers)})"
    try:
        opener = urllib.request.build_opener(_NoRedirect)
        with opener.open(f"{url.rstrip('/')}/api/jobs/", timeout=TIMEOUT_S) as answer:
            return f"{url} answers without a token ({answer.status}): only clusters with token authentication"
    except urllib.error.HTTPError as refusal:
        said = refusal.read(1000).decode(errors="replace").lower()
        if refusal.code == 401 and "token" in said:
            return None
        return f"{url} is no Ray dashboard that wants a token (HTTP {refusal.code})"
    except (OSError, ValueError) as error:
        return f"{url} does not answer: {getattr(error, 'reason', error)}"


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: object) -> None:
        return None


def main(arguments: list[str]) -> int:
    command, *rest = arguments
    problem = belongs(*map(int, rest)) if command == "belongs" else dashboard(*rest)
    if problem:
        print(problem)
    return 1 if problem else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
