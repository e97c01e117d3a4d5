"""One rank of torchrun with a fault in it: launch/torchrun.sh … torchrun_rank.py FAULT, as JSON."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from faults.inject import Injector
from faults.kinds import COLLECTIVE_S, Fault
from faults.work import healthy, load, work

from moe_dist.commands.ending import Ending
from moe_dist.runtime.torchrun_group import TorchrunGroup
from moe_dist.runtime.voice import death, leave_code, speaks, together

CALL_S = 60.0
START_S = 60.0  # on a busy machine ranks start many seconds apart


def command(fault: Fault) -> int:
    """Every rank's digest, in one line of the rank that speaks. A fault while loading must not wait for another."""
    Injector(fault, int(os.environ["RANK"])).at("before")
    patience_s = COLLECTIVE_S if fault.moment == "before" else START_S
    group = TorchrunGroup(fault.world, "cpu", patience_s)
    loaded = fault if fault.moment == "loading" else healthy(world=fault.world)
    group.run(load, loaded, timeout_s=CALL_S, shown=len)
    results = group.run(work, fault, timeout_s=CALL_S, shown=len)
    if speaks():
        print(json.dumps({"results": results}), flush=True)
    group.close()
    return 0


def main() -> int:
    fault = Fault(**json.loads(sys.argv[1]))
    ending = Ending(speaks, leave_code, death)
    ending.as_json = True
    together(True)
    return ending.code_of(lambda: command(fault), last=True)


if __name__ == "__main__":
    sys.exit(main())
