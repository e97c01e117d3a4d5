"""A job's results file, carried home in the job's log: no disk has to be shared. Standard library only but for `fetch`.

    carry.py check FILE               here, before the job: can results be written to FILE?
    carry.py run NAME ARGS...         on the cluster: `moe-dist ARGS... --out NAME`, then that file as lines of the log
    carry.py home FILE ADDRESS JOB    here: standard input is the job's log; shows it, and writes the file in it
    carry.py fetch FILE ADDRESS JOB   here: the same of the log that the cluster has kept

Exit codes are moe-dist's: `run` ends with that of the command, the others with 0, 2 (bad input) or 6 (no file came).
The file is compressed and its digest travels with it, so that a log with a gap in it is noticed.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

BAD_INPUT, NOT_WRITTEN = 2, 6
MARK = "moe-dist-results:"  # what begins the lines that carry the file
WIDTH = 4000  # characters of a line


class Parcel:
    """A file in the lines of a log: its name, size and digest, its bytes, and its end."""

    def __init__(self) -> None:
        self._digest: str | None = None
        self._data: list[str] = []
        self.missing = False  # the job says that it has written no file
        self.content: bytes | None = None

    @staticmethod
    def lines(content: bytes) -> Iterable[str]:
        text = base64.b64encode(gzip.compress(content, mtime=0)).decode()
        yield f"{MARK} begin {hashlib.sha256(content).hexdigest()}"
        yield from (f"{MARK} data {text[start : start + WIDTH]}" for start in range(0, len(text), WIDTH))
        yield f"{MARK} end"

    def take(self, line: str) -> str:
        """Keep what the line carries; what is left of it is to be shown."""
        shown, mark, carried = line.partition(MARK)
        if not mark:
            return line
        kind, _, value = carried.strip().partition(" ")
        if kind == "none":
            self.missing = True
        elif kind == "begin":
            self._digest, self._data = value, []
        elif kind == "data":
            self._data.append(value)
        elif kind == "end":
            self._unpack()
        return shown

    def _unpack(self) -> None:
        try:
            content = gzip.decompress(base64.b64decode("".join(self._data), validate=True))
        except (ValueError, OSError, EOFError):
            return
        if hashlib.sha256(content).hexdigest() == self._digest:
            self.content = content


def check(path: Path) -> str | None:
    """What speaks against writing results there."""
    if not path.parent.is_dir():
        return f"--out {path}: its folder {path.parent} is not there"
    if not os.access(path.parent, os.W_OK):
        return f"--out {path}: its folder {path.parent} can't be written to"
    if not path.exists():
        return None
    if not path.is_file():
        return f"--out {path}: is no regular file"
    try:
        held = json.loads(path.read_text())
    except (OSError, ValueError):
        held = None
    if not isinstance(held, dict) or not {"rows", "refused"} <= held.keys():
        return f"--out {path}: holds something else than results of moe-dist; give a new name"
    return None


def run(name: str, arguments: list[str]) -> int:
    """The command, and whatever it has left as results, also where it failed or was stopped."""
    for number in (signal.SIGINT, signal.SIGTERM):  # `ray job stop` sends it to the command too, which keeps its rows
        signal.signal(number, lambda *_: None)
    with tempfile.TemporaryDirectory(prefix="moe-dist-") as folder:
        out = Path(folder) / name
        code = subprocess.call([sys.executable, "-m", "moe_dist", *arguments, "--out", str(out)])
        try:
            lines = Parcel.lines(out.read_bytes())
        except OSError as error:
            lines = [f"{MARK} none ({error.strerror})"]
        print("\n".join(lines), flush=True)
    return code if code >= 0 else 128 - code


def bring(lines: Iterable[str], path: Path, address: str, job: str, live: bool) -> int:
    """Write the file that these lines carry. `live`: they are shown, and where they carry none, the cluster's own copy
    of the log may."""
    parcel = Parcel()
    for line in lines:
        left = parcel.take(line)
        if live and left:
            print(left, end="", flush=True)
    if parcel.content is None and live and not parcel.missing:
        return bring(kept_log(address, job), path, address, job, live=False)
    if parcel.content is None:
        again = f"; if the job still runs: launch/submit.sh --fetch {job} --out {path}"
        say(f"no results came, {path} is as it was" + ("; the job has written none" if parcel.missing else again))
        return NOT_WRITTEN
    try:
        replace(path, parcel.content)
    except OSError as error:
        say(f"{path} can't be written: {error.strerror}; launch/submit.sh --fetch {job} --out FILE gets it again")
        return NOT_WRITTEN
    say(f"results of job {job} are in {path}")
    return 0


def kept_log(address: str, job: str) -> list[str]:
    try:
        from ray.job_submission import JobSubmissionClient

        text: str = JobSubmissionClient(address).get_job_logs(job)
    except Exception as error:  # of Ray's, of its HTTP client's, of nobody's list
        say(f"the log of job {job} can't be read at {address}: {str(error).strip().splitlines()[:1]}")
        return []
    return text.splitlines(keepends=True)


def replace(path: Path, content: bytes) -> None:
    descriptor, part = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    try:
        with open(descriptor, "wb") as file:
            file.write(content)
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(part, 0o666 & ~mask)
        os.replace(part, path)
    except BaseException:
        os.unlink(part)
        raise


def say(text: str) -> None:
    print(f"launch/submit.sh: {text}", file=sys.stderr, flush=True)


def main(arguments: list[str]) -> int:
    command, first, *rest = arguments
    if command == "run":
        return run(first, rest)
    path = Path(first)
    if command == "check":
        if problem := check(path):
            say(problem)
        return BAD_INPUT if problem else 0
    address, job = rest
    live = command == "home"
    return bring(sys.stdin if live else kept_log(address, job), path, address, job, live)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
