"""Timing in rounds: each case a little, then all of them again. What is busy for a while, or drifts, then meets all
alike, and how far one case's rounds lie apart says which differences between cases mean something.

Queues of steps come when all rounds are over: they keep a GPU so busy that it lowers its clock, and whatever was timed
next would take longer. On two H200s a step of 2.9 ms took 75 µs more where a queue had run before it
(benchmarks/2026-11-28-before-after.json).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby

from moe_dist.bench.case import Case
from moe_dist.engine.plan import Plan

ROUNDS = 5
ROOM = 0.4  # of memory: as much may the weights of placements take that are measured in turns


@dataclass(frozen=True)
class Turn:
    """A case's share of one round. Cases of one `batch` take turns, and what is dear to make is kept until the next:
    after `of` turns with iterations comes one with queues. None: it has all its time at once, and nobody else's weights
    are kept."""

    number: int = 0
    of: int = 1
    batch: int | None = None

    @property
    def last(self) -> bool:
        return self.batch is None or self.number == self.of

    def iters(self, total: int) -> int:
        """Of so many in all."""
        return total // self.of + (self.number < total % self.of) if self.number < self.of else 0

    @property
    def queues(self) -> int:
        return self.of if self.last else 0


def rounds(case: Case) -> int:
    return min(ROUNDS, case.iters)


def turns(case: Case) -> int:
    """One more than rounds, for the queues; one for a case without iterations."""
    return rounds(case) + 1


def schedule(planned: list[tuple[Case, Plan]], memory: int) -> Iterator[tuple[int, Turn]]:
    """Which case is measured when, by its index: rounds over all of a batch, each beginning with another case. `memory`
    in bytes: of one GPU, or of a CPU's ranks together."""
    for number, batch in enumerate(batches(planned, memory)):
        for turn in range(ROUNDS):
            first = turn * len(batch) // ROUNDS
            for index in batch[first:] + batch[:first]:
                of = rounds(planned[index][0])
                if turn < of:
                    yield index, Turn(turn, of, number)
        for index in batch:
            of = rounds(planned[index][0])
            yield index, Turn(of, of, number)


def batches(planned: list[tuple[Case, Plan]], memory: int) -> list[list[int]]:
    """Neighbours of one model, where all its placements' weights have room beside each other, else of one placement:
    weights are made once."""

    def model(index: int) -> str:
        case = planned[index][0]
        return f"{case.model!r} {case.source!r} {case.layers}"

    found = []
    for _, of_model in groupby(range(len(planned)), key=model):
        together = list(of_model)
        by_placement = [
            list(share) for _, share in groupby(together, key=lambda index: repr(planned[index][0].parallel))
        ]
        weights = planned[together[0]][0].layers * sum(group_bytes(planned[share[0]][1]) for share in by_placement)
        found += [together] if weights <= ROOM * memory else by_placement
    return found


def group_bytes(plan: Plan) -> int:
    """Of a placement's weights in one layer, on the GPU that holds most or in the one memory of a CPU's ranks."""
    ranks = [plan.weight_bytes(rank) for rank in range(plan.placement.world)]
    return max(ranks) if plan.machine.device == "cuda" else sum(ranks)
