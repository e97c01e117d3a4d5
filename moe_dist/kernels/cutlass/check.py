"""python -m moe_dist.kernels.cutlass.check: compile one instance for sm_90a, and look at what ptxas made of it.

Where the sources don't compile it says what nvcc says. It fails too where a kernel's registers spill or its products
are serialized, which is far slower and no error. What was found is kept: nothing is compiled twice.
"""

from __future__ import annotations

import re
import sys

from moe_dist.errors import MoeDistError
from moe_dist.kernels.cutlass.library import UP_GATED, compile_object, gemm_defines, library_path

MOST_SPILLED = 64  # bytes, outside the loop over the sum


def main() -> int:
    try:
        path = library_path().parent / "check.txt"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            target = path.parent / "check.o"
            said = compile_object("grouped_gemm.cu", target, gemm_defines(UP_GATED, 1, variant=True), ("-Xptxas", "-v"))
            target.unlink()
            path.write_text(said)
        said = path.read_text()
        problem = problem_of(said)
    except MoeDistError as error:
        print(f"kernels-check: {error}", file=sys.stderr)
        return 2
    print(f"kernels-check: {problem or 'compiled, nothing serialized, spills ' + str(spilled(said)) + ' bytes'}")
    return 1 if problem else 0


def problem_of(said: str) -> str | None:
    """From what ptxas says with -v."""
    if "bytes spill stores" not in said:
        return f"ptxas has not said what it made: {said.strip()[-300:]}"
    if found := re.search(r".*wgmma.*serializ.*", said, re.IGNORECASE):
        return found.group(0).strip()
    if max(spilled(said)) > MOST_SPILLED:
        return f"registers spill: {spilled(said)} bytes, at most {MOST_SPILLED} are accepted"
    return None


def spilled(said: str) -> list[int]:
    """Bytes that each kernel stores, in ptxas's order."""
    return [int(number) for number in re.findall(r"(\d+) bytes spill stores", said)]


if __name__ == "__main__":
    sys.exit(main())
