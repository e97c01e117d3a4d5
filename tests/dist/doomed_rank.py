"""`moe-dist run` under torchrun, in which one rank fails: torchrun --nproc-per-node 2 doomed_rank.py HOW RANK

HOW "import" is death before there is a group, "early" death as soon as there is one, "spin" computing that lets no
other thread of the process run."""

from __future__ import annotations

import os
import re
import signal
import sys
import threading
import time
from typing import Any

from moe_dist.bench import sweep
from moe_dist.bench.results import Outcome
from moe_dist.commands import cli
from moe_dist.runtime import torchrun_group
from moe_dist.runtime.context import RankContext
from moe_dist.runtime.pulse import Peer
from moe_dist.runtime.voice import speaks

HOW, DOOMED = sys.argv[1], int(sys.argv[2])
began = 0.0


def work(context: RankContext, *_: Any) -> Any:
    """Twenty collectives, then one rank fails while the other waits for it in the next."""
    global began
    if HOW == "early" and context.rank == DOOMED:
        os._exit(7)
    for _ in range(20):
        context.comm.barrier()
    context.progress("work of a doomed rank")
    began = time.monotonic()
    if context.rank == DOOMED:
        if HOW == "raise":
            raise ValueError("on purpose")
        if HOW == "interrupt":
            raise KeyboardInterrupt
        if HOW == "surrogate":
            raise ValueError("a\ud800b")
        if HOW == "result":
            return threading.Lock()
        if HOW == "spin":
            re.match(r"(a+)+$", "a" * 40 + "b")
        if HOW == "return":
            return None
        if HOW == "sleep":
            time.sleep(60)
        else:
            os.kill(os.getpid(), signal.Signals[HOW])
            time.sleep(5)  # a stop may reach another thread first
    context.comm.barrier()


def no_work(*_: Any) -> None:
    """Before it, so that the sequence numbers of `work` are its own."""


def slow_peer(*record: int) -> Peer:
    time.sleep(1)
    return Peer(*record)


def main() -> int:
    if HOW == "import" and int(os.environ["RANK"]) == DOOMED:
        time.sleep(2)  # the other one has come further by then
        os.kill(os.getpid(), signal.SIGKILL)
    if HOW == "early" and int(os.environ["RANK"]) != DOOMED:
        torchrun_group.Peer = slow_peer  # type: ignore[assignment, misc]
    if HOW == "wrong":
        Outcome.ok = property(lambda _: False)  # type: ignore[assignment]
    else:
        sweep.measure = work  # type: ignore[assignment]
        sweep.ready = no_work  # type: ignore[assignment]
    limits = [f"ray.silence_timeout_s={3 if HOW == 'spin' else 30}", f"case_timeout_s={4 if HOW == 'sleep' else 60}"]
    code = cli.main(["run", "--runtime", "torchrun", "--ep", "2", "--device", "cpu", "--iters", "0", "--json", *limits])
    if began:
        sys.stderr.write(f"failed after {time.monotonic() - began:.1f} s\n" * speaks())
    return code


if __name__ == "__main__":
    sys.exit(main())
