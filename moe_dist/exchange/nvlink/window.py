"""Where things lie in the memory that ranks share: a header and rows that came in, partial sums that came back."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moe_dist.comm import Comm
from moe_dist.comm.symmetric import Aside, Symmetric
from moe_dist.exchange.nvlink.engines import Ranges
from moe_dist.exchange.rows import pair_specs, row_specs
from moe_dist.machine.machine import HOPPER, Machine
from moe_dist.machine.nodes import told
from moe_dist.model.placement import Placement
from moe_dist.model.sizes import cdiv
from moe_dist.model.spec import MoESpec
from moe_dist.step import Support, TensorSpec
from moe_dist.step.workspace import ALIGNMENT, bytes_of

# The header, in 32-bit words: the number of the last step that ended here, the number that copies leave behind them,
# tickets taken in each phase, and from FLAGS on each phase's flags: by source, and of copied rows by part.
STEP, NUMBER, TICKETS, FLAGS, MOST_RANKS, PHASES = 0, 1, 8, 32, 128, 3
ROWS, SUMS, COPIED = 0, 1, 2  # phases
# Whether launches of few thread blocks begin while the one before ends (programmatic dependent launch), where GPUs can.
# Off: on two H200s, with triton, steps of 8 tokens a rank were 1 to 1.6 µs shorter of 460 to 480, and steps of 128
# tokens 1 µs longer of 725 (benchmarks/2026-11-28-variants.json).
EARLY = False
HEADER_BYTES = 4 * (FLAGS + PHASES * MOST_RANKS)
FIRST_BYTES = cdiv(HEADER_BYTES, ALIGNMENT) * ALIGNMENT  # of the first area, up to what lies there


def served_here(spec: MoESpec, placement: Placement, machine: Machine) -> Support:
    """Whether there are such windows."""
    if machine.device != "cuda":
        return Support(False, "needs GPUs that reach each other through NVLink")
    if len(nodes := machine.nodes_of(placement.world)) > 1:
        return Support(
            False, f"reaches GPUs of one node, and these ranks are on {len(nodes)} nodes ({told(nodes)} ranks)"
        )
    if placement.world > MOST_RANKS:
        return Support(False, f"serves {MOST_RANKS} ranks of one host, not {placement.world}")
    if spec.hidden % 16:
        return Support(False, f"moves 16 bytes at a time: hidden ({spec.hidden}) must be a multiple of 16")
    return Support(True)


def begin(window: Symmetric, comm: Comm) -> None:
    """A step is about to tell the others of itself. Raises RankFailure where the last one that did has not ended."""
    if comm.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return  # nothing is told before the graph is replayed, which is all of it
    window.check_ended(comm.rank, comm.sequence)
    window.open = True


@dataclass(frozen=True)
class Regions:
    """Of a window for steps of one bucket, which all ranks agree on. `rows`: values, scales if there are any, slots and
    weights of the [world · bucket] rows, this rank's own first, then the next rank's, and so on; `sums`: [world,
    bucket · H], from each rank, in their order: each range of columns that goes ahead (`Visit.ahead`) as [bucket,
    columns], then the others.

    Rows lie in a window's first area, behind the header; their starts are in bytes. Sums have the second area: what
    steps of another size or layer write first must never meet what a step reads last."""

    rows: tuple[TensorSpec, ...]
    row_starts: tuple[int, ...]
    sums: TensorSpec
    sizes: tuple[int, int]

    @classmethod
    def of(cls, spec: MoESpec, world: int, payload: str, dtype: torch.dtype, bucket: int) -> Regions:
        """`dtype`: of partial sums."""
        places = world * bucket
        rows = (*row_specs(spec, payload, places), *pair_specs(spec, places))
        sums: TensorSpec = ((world, bucket * spec.hidden), dtype)
        starts = [FIRST_BYTES]
        for each in rows:
            starts.append(starts[-1] + bytes_of([each]))
        return cls(rows, tuple(starts[:-1]), sums, (starts[-1], bytes_of([sums])))


@dataclass(frozen=True)
class Ends:
    """Who exchanges, and how long a launch waits for the others at most. `waits`: False where one process plays all
    ranks in turn, in tests: then nobody may wait. `early`: see EARLY."""

    rank: int
    world: int
    limit_ns: int
    waits: bool = True
    early: bool = False

    @classmethod
    def of(cls, comm: Comm) -> Ends:
        can = comm.device.type == "cuda" and torch.cuda.get_device_capability(comm.device) >= HOPPER
        return cls(comm.rank, comm.world, int(comm.timeout_s * 1e9), early=EARLY and can)


@dataclass(frozen=True)
class Visit:
    """One step in a window: what lies where in it, which columns of the sums go ahead of the others, the number of this
    rank's tokens, which ranks send a sum back for each (`served_TW`, int8), the slots of the rows that came, and
    the copies of rows that are under way."""

    window: Symmetric
    regions: Regions
    bucket: int
    ahead: Ranges
    tokens: int
    served_TW: Tensor
    slots_RK: Tensor
    copies: Aside

    @property
    def sums_at(self) -> int:
        """Where sums begin in the window, in bytes."""
        return self.window.starts[1]
