"""The nvlink exchange's kernels in Triton's interpreter, all ranks' windows in one process; run by test_kernels.py."""

from __future__ import annotations

import random
from types import SimpleNamespace

import pytest
import torch
import triton_interpreter  # noqa: F401  # before any kernel is decorated

from moe_dist.exchange.nvlink import kernels, window
from moe_dist.exchange.nvlink.window import Ends, Regions, Visit
from moe_dist.exchange.rows import parts_of
from moe_dist.kernels import quantize_rows
from moe_dist.model.placement import Placement
from moe_dist.model.routing import Routing
from moe_dist.model.spec import MoESpec, ParallelSpec

HIDDEN, EXPERTS, TOP_K = 256, 7, 3


class Window:
    """Of one rank; `addresses_W` come when all are there."""

    def __init__(self, nbytes: int) -> None:
        self.local = torch.full((nbytes,), 0x5A, dtype=torch.uint8)  # what lies there is of no account
        self.words = self.local.view(torch.int32)
        self.words[: window.HEADER_BYTES // 4] = 0
        self.failed = torch.zeros(4, dtype=torch.int32)

    def view(self, start, shape, dtype):
        count = torch.Size(shape).numel() * dtype.itemsize
        return self.local[start : start + count].view(dtype).view(shape)


class Ranks:
    """All of them in this process, in turns: nobody waits."""

    def __init__(self, parallel: ParallelSpec, payload: str, dtype: torch.dtype, most: int) -> None:
        self.spec = MoESpec(hidden=HIDDEN, intermediate=256, num_experts=EXPERTS, top_k=TOP_K)
        self.placement = Placement.build(self.spec, parallel)
        self.payload, self.dtype, self.world = payload, dtype, self.placement.world
        nbytes = Regions.of(self.spec, self.world, payload, dtype, most).nbytes
        self.windows = [Window(nbytes) for _ in range(self.world)]
        for each in self.windows:
            each.addresses_W = torch.tensor([other.local.data_ptr() for other in self.windows])
        self.ends = [Ends(rank, self.world, 10**9, waits=False) for rank in range(self.world)]

    def begin(self, counts: list[int], bucket: int, seed: int) -> list[SimpleNamespace]:
        """Each rank's tokens, its visit, and no row sent yet."""
        regions = Regions.of(self.spec, self.world, self.payload, self.dtype, bucket)
        steps = []
        for rank, tokens in enumerate(counts):
            generator = torch.Generator().manual_seed(1000 * seed + rank)
            x = torch.randn(tokens, HIDDEN, generator=generator).bfloat16()
            ids = torch.randint(-1, EXPERTS, (tokens, TOP_K), generator=generator, dtype=torch.int32)
            routing = Routing(ids, torch.rand(tokens, TOP_K, generator=generator))
            rows = quantize_rows(x, "fp8_block") if self.payload == "fp8" else x
            served = torch.full((tokens, self.world), 7, dtype=torch.int8)
            slots = self.windows[rank].view(regions.row_starts[-2], *regions.rows[-2])
            visit = Visit(self.windows[rank], regions, bucket, tokens, served, slots)
            steps.append(SimpleNamespace(rank=rank, x=x, rows=rows, routing=routing, visit=visit))
        return steps

    def send_rows(self, step: SimpleNamespace) -> None:
        kernels.send_rows(step.visit, parts_of(step.rows), self.placement, step.routing, self.ends[step.rank])

    def check_rows(self, steps: list[SimpleNamespace], target: int) -> None:
        """What rank `target` computes is what every source has for it."""
        visit = steps[target].visit
        came = [visit.window.view(*place) for place in
                zip(visit.regions.row_starts, *zip(*visit.regions.rows, strict=True), strict=True)]  # fmt: skip
        every_id = torch.full((self.world * visit.bucket, TOP_K), -1, dtype=torch.int32)
        for step in steps:
            every_id[step.rank * visit.bucket :][: step.visit.tokens] = step.routing.ids_TK
        every_slot = self.placement.slots_on(target, every_id, visit.bucket)
        for step in steps:
            first, tokens = step.rank * visit.bucket, step.visit.tokens
            slots_TK = every_slot[first : first + tokens]
            found = came[-2][first : first + visit.bucket]
            assert torch.equal(found[:tokens], slots_TK)
            assert bool((found[tokens:] == -1).all())
            here = slots_TK >= 0
            wanted = torch.where(here, step.routing.weights_TK, 0)
            assert torch.equal(came[-1][first : first + tokens], wanted)
            used = here.any(1)
            assert torch.equal(step.visit.served_TW[:, target], used.to(torch.int8))
            for part, there in zip(parts_of(step.rows), came[:-2], strict=True):
                sent = there[first : first + tokens].view(torch.uint8).flatten(1)
                assert torch.equal(sent[used], part.contiguous().view(torch.uint8).flatten(1)[used])

    def compute(self, step: SimpleNamespace) -> None:
        """Partial sums that say which rank made them of which row, and garbage where none is wanted."""
        rows, rank = self.world * step.visit.bucket, step.rank
        row = torch.arange(rows)[:, None] % 50
        step.sums = (row + (rank + 1) * 0.25 + torch.arange(HIDDEN) % 3).to(self.dtype)
        step.sums[(step.visit.slots_RK < 0).all(1)] = float("nan")

    def send_sums(self, step: SimpleNamespace) -> None:
        kernels.send_sums(step.visit, step.sums, self.ends[step.rank])

    def finish(self, steps: list[SimpleNamespace], rank: int) -> None:
        step, bucket = steps[rank], steps[rank].visit.bucket
        y = torch.full((step.visit.tokens, HIDDEN), -1.0).to(self.dtype)
        kernels.add_sums(step.visit, y, self.ends[rank])
        expected = torch.zeros(step.visit.tokens, HIDDEN)
        for other in steps:
            theirs = other.sums[rank * bucket : rank * bucket + step.visit.tokens].float()
            expected += torch.where(step.visit.served_TW[:, other.rank, None] != 0, theirs, 0)
        assert torch.equal(y, expected.to(self.dtype))


COPIES = ParallelSpec(ep=3, replicas={0: (1,), 5: (0, 1)})
GRIDS = [ParallelSpec(ep=3), ParallelSpec(tp=2), ParallelSpec(tp=2, ep=2), ParallelSpec(), COPIES]


@pytest.mark.parametrize("parallel", GRIDS, ids=lambda each: each.label)
@pytest.mark.parametrize(("payload", "dtype"), [("fp8", torch.bfloat16), ("bf16", torch.float32)])
@pytest.mark.parametrize("few", [0, 512])
def test_rows_and_sums_arrive(parallel, payload, dtype, few, monkeypatch):
    monkeypatch.setattr(kernels, "FEW", few)
    ranks = Ranks(parallel, payload, dtype, 6)
    for seed, bucket in enumerate((6, 1, 4)):  # one window for all
        counts = [random.Random(seed + rank).randint(0, bucket) for rank in range(ranks.world)]
        steps = ranks.begin(counts, bucket, seed)
        for step in steps:
            ranks.send_rows(step)
        for rank in range(ranks.world):
            ranks.check_rows(steps, rank)
        for step in steps:
            ranks.compute(step)
            ranks.send_sums(step)
        for rank in range(ranks.world):
            ranks.finish(steps, rank)
        for rank in range(ranks.world):
            words = ranks.windows[rank].words
            assert words[window.STEP] == seed + 1
            assert not words[window.TICKETS : window.TICKETS + 2].any()
            flags = words[window.FLAGS : window.HEADER_BYTES // 4].view(window.PHASES, window.MOST_RANKS)
            assert bool((flags[:, : ranks.world] == seed + 1).all())
            assert not flags[:, ranks.world :].any()


def test_the_exchange_counts_what_it_stores_elsewhere(monkeypatch):
    """By hand: rows, sums, and every token's slots and weights, to other ranks only."""
    from moe_dist.exchange.nvlink import Nvlink
    from moe_dist.step import Step, Workspace

    ranks = Ranks(ParallelSpec(ep=3), "fp8", torch.bfloat16, 6)
    steps, exchanges = ranks.begin([4, 6, 0], 6, 1), []
    for step in steps:
        comm = SimpleNamespace(
            rank=step.rank,
            world=3,
            timeout_s=1.0,
            device=torch.device("cpu"),
            window=lambda nbytes, rank=step.rank: ranks.windows[rank],
        )
        exchange = Nvlink(comm, ranks.placement, ranks.spec, "fp8", None, "token", torch.bfloat16)
        assert exchange.stored_bytes() == 0
        exchange._ends = ranks.ends[step.rank]
        exchange.dispatch(Step(Workspace(torch.device("cpu")), bucket=6), step.rows, step.routing)
        exchanges.append(exchange)
    row, pairs, total = HIDDEN + 4 * 2, 8 * TOP_K, HIDDEN * 2
    slots = [
        torch.stack([ranks.placement.slots_on(target, step.routing.ids_TK, 6).ge(0).any(1) for target in range(3)])
        for step in steps
    ]
    for rank, exchange in enumerate(exchanges):
        others = [other for other in range(3) if other != rank]
        leaving = int(slots[rank][others].sum())
        returning = sum(int(slots[other][rank].sum()) for other in others)
        assert exchange.stored_bytes() == 2 * 6 * pairs + leaving * row + returning * total
