"""What another placement of experts is predicted to gain in a step, what it costs once, and from which skew it pays."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from math import ceil
from statistics import median

from moe_dist.balance.balancer import balanced
from moe_dist.balance.loads import RankLoads, expert_loads, rank_loads
from moe_dist.model.placement import Placement
from moe_dist.model.routing import Routing
from moe_dist.model.sizes import cdiv
from moe_dist.model.spec import MoESpec, ParallelSpec, split_bounds
from moe_dist.model.weights import ExpertWeights
from moe_dist.simulate.cost import CostModel
from moe_dist.simulate.work import Work, padded_bytes, row_bytes, work_of
from moe_dist.workloads.skews import synthetic_routing

EXCHANGE = "ag_rs"  # of the step that a gain is a part of; it sends the same whatever the routing
EXPONENTS = [step / 10 for step in range(21)]  # of zipf, 0 to 2
SEEDS = 3  # whose median counts: where the busy experts lie is luck
SAMPLE = 1 << 12  # tokens that a placement is made for, and that it is judged on at most: with more, pairs are scaled


@dataclass(frozen=True)
class Gain:
    """µs of a step with one placement and with the other, both predicted; `scatter_us`: of a difference, what scatter
    explains."""

    before_us: float
    after_us: float
    scatter_us: float

    @property
    def gain_us(self) -> float:
        return self.before_us - self.after_us

    @property
    def seen(self) -> bool:
        """Whether a measurement would show it."""
        return self.gain_us > self.scatter_us


@dataclass(frozen=True)
class Change:
    """A grid `before`, and `after`, the same with another map of experts and perhaps copies."""

    spec: MoESpec
    before: ParallelSpec
    after: ParallelSpec

    @cached_property
    def placements(self) -> tuple[Placement, Placement]:
        return Placement.build(self.spec, self.before), Placement.build(self.spec, self.after)

    def loads(self, routing: Routing) -> tuple[RankLoads, RankLoads]:
        """By rank, of a step whose tokens are sharded in equal parts."""
        bounds = split_bounds(routing.tokens, self.before.world)
        first, second = (rank_loads(routing, placement, bounds) for placement in self.placements)
        return first, second

    def moved_bytes(self) -> list[int]:
        """By rank: weights, scales included, of the experts that come to it."""
        first, second = self.placements
        return [
            ExpertWeights.bytes_of(
                self.spec, len({*second.experts_of(rank)} - {*first.experts_of(rank)}), second.width_of(rank)
            )
            for rank in range(first.world)
        ]

    def work(self, routing: Routing, tokens: int) -> tuple[Work, Work]:
        """Of the busiest rank in a step of `tokens`, of which `routing` is all or a sample."""
        share = cdiv(tokens, self.before.world)
        row = row_bytes(self.spec, "fp8" if self.spec.quantized else self.spec.dtype, self.spec.torch_dtype.itemsize)
        first, second = (
            work_of(
                self.spec,
                placement,
                max(loads.pairs) * tokens // routing.tokens,
                max(loads.active),
                padded_bytes(placement, share, row),
            )
            for placement, loads in zip(self.placements, self.loads(routing), strict=True)
        )
        return first, second

    def gain(self, model: CostModel, backend: str, routing: Routing, tokens: int) -> Gain:
        """In such a step. Raises UnsupportedError as the model."""
        before_us, after_us = (model.step_us(EXCHANGE, backend, work) for work in self.work(routing, tokens))
        return Gain(before_us, after_us, model.scatter * min(before_us, after_us))


def steps_to_pay(gain: Gain, moved: int, gbps: float) -> int | None:
    """Steps whose gain is as long as moving `moved` bytes takes; None where nothing is gained."""
    return ceil(moved / (1e3 * gbps) / gain.gain_us) if gain.gain_us > 0 else None


@dataclass(frozen=True)
class Sweep:
    """Over exponents of zipf:S, for a grid whose experts are rearranged, with `redundant` copies. A placement is made
    for SAMPLE tokens and judged on a step of others with the same odds: a step's own loads are not known before it."""

    model: CostModel
    backend: str
    spec: MoESpec
    parallel: ParallelSpec
    redundant: int
    tokens: int

    def break_even(self) -> float | None:
        """The least of EXPONENTS from which on the gain is more than scatter explains, the median over SEEDS draws;
        None where that of the largest is not. Raises UnsupportedError as the model."""
        found = None
        for exponent in EXPONENTS:
            gains = [self.gain(exponent, seed) for seed in range(SEEDS)]
            seen = median(gain.gain_us - gain.scatter_us for gain in gains) > 0
            found = (exponent if found is None else found) if seen else None
        return found

    def gain(self, exponent: float, seed: int) -> Gain:
        """Of one draw."""
        judged = min(self.tokens, SAMPLE)
        drawn = synthetic_routing(self.spec, SAMPLE + judged, f"zipf:{exponent:g}", seed)
        earlier, later = drawn.rows(0, SAMPLE), drawn.rows(SAMPLE, SAMPLE + judged)
        after = balanced(expert_loads(earlier, self.spec.num_experts), self.parallel, self.redundant)
        return Change(self.spec, self.parallel, after).gain(self.model, self.backend, later, self.tokens)
