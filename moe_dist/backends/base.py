"""The contract of a backend."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from moe_dist.model.placement import Placement
from moe_dist.model.spec import MoESpec
from moe_dist.model.weights import ExpertWeights
from moe_dist.oracle.numerics import Numerics
from moe_dist.registry import unknown
from moe_dist.step import FORMS, NO_STAGES, Sink, Stages, Step, Support, TokenRows, Whole, workspace_of


@dataclass(frozen=True)
class Problem:
    """What one rank would compute, known before any weight is loaded."""

    spec: MoESpec
    width: int  # this rank's slice of the intermediate size
    num_local: int  # experts on this rank
    device: str  # cpu or cuda
    capability: tuple[int, int] | None  # of the CUDA device, else None
    payload: str  # what token rows arrive as: none (unquantized, nothing travelled), bf16, fp32 or fp8
    device_name: str = ""  # as tables have it


class Backend(ABC):
    """One rank's expert computation.

    `capturable`: its forward can be captured in a CUDA graph. `deterministic`: equal inputs give equal bits.
    `table_revision`: raised when its configs mean something else; older tables are then passed over. `sums`: in which
    of a plan's combine_dtypes it gives sums that were not rounded to a narrower one before. `takes`: the forms of rows
    that it has use for (step.rows.FORMS), the one it likes best first. A backend takes token rows, as those for a
    shared expert are, and rows sorted by expert are token rows too; or it computes whole layers, and takes `layer`
    alone. `gate_first`: the only order of gate and up that it reads, to which `prepare` turns weights in place; None
    reads them as they come.
    """

    capturable: ClassVar[bool]
    deterministic: ClassVar[bool]
    table_revision: ClassVar[int] = 0
    quick_build: ClassVar[bool] = False  # `build` takes a minute at most: some commands do it unasked
    sums: ClassVar[frozenset[str]] = frozenset({"bf16", "fp32"})
    takes: ClassVar[tuple[str, ...]] = ("token",)
    gate_first: ClassVar[bool | None] = None

    def __init__(self, problem: Problem) -> None:
        """For the problem that `supports` was asked about."""
        self.problem, self.spec = problem, problem.spec

    @property
    def numerics(self) -> Numerics:
        return self.numerics_of(self.spec)

    @classmethod
    def numerics_of(cls, spec: MoESpec) -> Numerics:
        """Where it rounds beyond the prescribed quantization; the oracle follows."""
        return Numerics()

    @classmethod
    def declared_wrong(cls) -> str | None:
        """What its attributes say that nobody knows."""
        return unknown("takes", cls.takes, FORMS) or unknown("sums", sorted(cls.sums), ("bf16", "fp32"))

    @classmethod
    @abstractmethod
    def payloads(cls, spec: MoESpec) -> frozenset[str]:
        """The forms of rows it takes for this spec: none (as they are, nothing travelled), bf16, fp32, fp8."""

    @classmethod
    @abstractmethod
    def supports(cls, problem: Problem) -> Support:
        """Whether it computes this exactly as asked; the reason if not. Loads nothing heavy."""

    @classmethod
    def refused(cls, spec: MoESpec, activations: Iterable[str]) -> Support | None:
        """Why not, for a backend that computes these activations, and experts without biases only; None where it does
        compute the spec's."""
        if spec.activation not in activations:
            return Support(False, f"computes {', '.join(activations)}, not {spec.activation}")
        if spec.expert_bias:
            return Support(False, "computes experts without biases, and model.expert_bias is True")
        return None

    @classmethod
    def available(cls, device: str) -> Support:
        """Whether it can run on this machine at all, for `doctor`."""
        return Support(True)

    @classmethod
    def build(cls) -> None:
        """Compile what must be compiled before first use, showing progress. Most backends have nothing to build."""
        return

    @classmethod
    def scratch_bytes(cls, problem: Problem, rows: int) -> int:
        """The most that a forward of so many rows takes from the workspace or, as this estimate for backends that
        allocate by themselves, from elsewhere: both GEMMs' outputs and GEMM2's inputs, in bf16."""
        spec, width = problem.spec, problem.width
        pairs = rows * min(spec.top_k, problem.num_local)
        return 2 * pairs * (spec.w13_rows(width) + width + spec.hidden)

    @classmethod
    def window_bytes(cls, spec: MoESpec, placement: Placement, bucket: int) -> int:
        """Of the memory that ranks share after steps of up to so many tokens a rank, where the backend reaches others
        by itself; for plans."""
        return 0

    @classmethod
    def copied_bytes(cls, problem: Problem) -> int:
        """Of the copies that `prepare` keeps beside the shard; for plans."""
        return 0

    @classmethod
    def candidates(cls, problem: Problem, rows: int) -> list[dict[str, Any]]:
        """The configs worth trying for so many rows entering this rank, the default one first; asked for problems that
        it does not support too; JSON values only. Most backends have no choice."""
        return []

    @classmethod
    def default_config(cls, problem: Problem, rows: int) -> dict[str, Any]:
        """What it runs with where no table is."""
        return next(iter(cls.candidates(problem, rows)), {})

    @classmethod
    def compile_ahead(cls, wanted: list[tuple[Problem, int, dict[str, Any]]]) -> Iterator[int]:
        """Compile what these configs need for so many rows, all at once where that is quicker than at each one's first
        use; yields how many are done. What can't be compiled fails at its use."""
        return iter(())

    def use_config(self, config: dict[str, Any] | None) -> None:
        """Take this config for every forward from now on; None: the table's again, or the default."""
        return

    def config_sources(self) -> tuple[str, ...]:
        """Where the configs come from that it has run with, each once: "tuned" (a table's entry of just so many rows),
        "nearest:M" (its entry of M rows), "default" (no table), "given" (by `use_config`). Empty for a backend without
        a choice, and before it ran."""
        return ()

    @abstractmethod
    def prepare(self, weights: ExpertWeights) -> None:
        """Take the shard over, in the canonical form; called once, before any forward."""

    def awaits(self, rows: TokenRows) -> bool:
        """Whether `forward` takes these rows as they are: those that are on their way it must not read before they are
        here."""
        return rows.arrivals is None

    def tune(self, step: Step, rows: TokenRows) -> None:
        """Choose kernels for this number of rows, outside any timed or captured work. Most backends have no choice."""
        return

    @abstractmethod
    def forward(self, step: Step, rows: TokenRows, sink: Sink) -> None:
        """The weighted sum over the local experts of each row, summed in float32, to `sink` in its dtype; zero for a
        row without a local slot. R may be zero."""

    def forward_alone(self, rows: TokenRows, dtype: torch.dtype, stages: Stages = NO_STAGES) -> Tensor:
        """`forward` as a step of its own, outside of any layer: [R, H] in `dtype`."""
        device = rows.slots_RK.device
        step = Step(workspace_of(device), stages=stages)
        step.workspace.begin()
        sink = Whole(step, (len(rows), self.spec.hidden), dtype, device, lasting=True)
        self.forward(step, rows, sink)
        return sink.y
