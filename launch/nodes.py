"""Wait until a Ray cluster has so many nodes: nodes.py HOST:PORT NODES SECONDS.

Exit code 0, or 3 and a line that says how many came.
"""

from __future__ import annotations

import sys
import time

import ray

TOO_LITTLE = 3
EVERY_S = 1.0


def main(address: str, nodes: int, timeout_s: float) -> int:
    deadline = time.monotonic() + timeout_s
    ray.init(address=address, logging_level="error", log_to_driver=False)
    while True:
        there = sorted(node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"])
        if len(there) >= nodes:
            return 0
        if time.monotonic() > deadline:
            came = f"{len(there)} of {nodes} nodes came within {timeout_s:g} s: {', '.join(there)}"
            print(f"launch/nodes.py: {came}", file=sys.stderr)
            return TOO_LITTLE
        time.sleep(EVERY_S)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], int(sys.argv[2]), float(sys.argv[3])))
