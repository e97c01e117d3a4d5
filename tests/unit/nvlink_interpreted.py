"""The nvlink exchange's kernels in Triton's interpreter, all ranks' windows in one process; run by test_kernels.py."""

from __future__ import annotations

import random
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import triton_interpreter  # noqa: F401  # before any kernel is decorated

from moe_dist.comm.symmetric import Aside, Symmetric
from moe_dist.errors import RankFailure
from moe_dist.exchange.nvlink import Nvlink, engines, flags, reduce_kernels, row_kernels, sum_kernels, window
from moe_dist.exchange.nvlink.replicated import NvlinkReplicated
from moe_dist.exchange.nvlink.replicated import _sizes as reduced
from moe_dist.exchange.nvlink.window import Ends, Regions, Visit
from moe_dist.exchange.rows import activations_of, parts_of, payload_row_bytes
from moe_dist.kernels import quantize_rows
from moe_dist.kernels.triton.pipeline import _weighted_sum
from moe_dist.model.placement import Placement
from moe_dist.model.quantization import QuantizedRows
from moe_dist.model.routing import Routing
from moe_dist.model.spec import MoESpec, ParallelSpec
from moe_dist.step import Sink, Step, Workspace
from moe_dist.step.workspace import bytes_of

EXPERTS, TOP_K = 7, 3
CPU = torch.device("cpu")


class Window(Symmetric):
    """Of one rank; `addresses_W` and what peers call theirs come when all are there."""

    def __init__(self, sizes: tuple[int, int]) -> None:
        self.sizes, self.starts, nbytes = sizes, (0, sizes[0]), sum(sizes)
        self.local = torch.full((nbytes,), 0x5A, dtype=torch.uint8)  # what lies there is of no account
        self.words = self.local.view(torch.int32)
        self.words[: window.HEADER_BYTES // 4] = 0
        self.failed = torch.zeros(4, dtype=torch.int32)
        self._views = {}


def windows_of(world: int, sizes: tuple[int, int]) -> list[Window]:
    """One of each rank."""
    windows = [Window(sizes) for _ in range(world)]
    for rank, each in enumerate(windows):
        in_turn = windows[rank:] + windows[:rank]
        each.addresses_W = torch.tensor([other.local.data_ptr() for other in in_turn])
        each.by_rank_W = torch.tensor([other.local.data_ptr() for other in windows])
        each._everyone = [other.local for other in windows]
    return windows


class Ranks:
    """All of them in this process, in turns: nobody waits."""

    def __init__(self, parallel: ParallelSpec, payload: str, dtype: torch.dtype, most: int, hidden: int = 256) -> None:
        self.hidden = hidden
        self.spec = MoESpec(hidden=hidden, intermediate=256, num_experts=EXPERTS, top_k=TOP_K)
        self.placement = Placement.build(self.spec, parallel)
        self.payload, self.dtype, self.world = payload, dtype, self.placement.world
        needed = Regions.of(self.spec, self.world, payload, dtype, most).sizes, reduced(hidden, self.world, dtype, most)
        sizes = max(needed[0][0], needed[1][0]), max(needed[0][1], needed[1][1])
        self.windows = windows_of(self.world, sizes)
        self.ends = [Ends(rank, self.world, 10**9, waits=False) for rank in range(self.world)]

    def begin(self, counts: list[int], bucket: int, seed: int) -> list[SimpleNamespace]:
        """Each rank's tokens, its visit, and no row sent yet."""
        regions = Regions.of(self.spec, self.world, self.payload, self.dtype, bucket)
        ahead = engines.columns_ahead(self.spec, self.placement, bucket, self.dtype.itemsize)
        steps = []
        for rank, tokens in enumerate(counts):
            generator = torch.Generator().manual_seed(1000 * seed + rank)
            x = torch.randn(tokens, self.hidden, generator=generator).bfloat16()
            ids = torch.randint(-1, EXPERTS, (tokens, TOP_K), generator=generator, dtype=torch.int32)
            routing = Routing(ids, torch.rand(tokens, TOP_K, generator=generator))
            rows = quantize_rows(x, "fp8_block") if self.payload == "fp8" else x
            served = torch.full((tokens, self.world), 7, dtype=torch.int8)
            slots = self.windows[rank].view(regions.row_starts[-2], *regions.rows[-2])
            visit = Visit(self.windows[rank], regions, bucket, ahead, tokens, served, slots, Aside(CPU))
            steps.append(SimpleNamespace(rank=rank, x=x, rows=rows, routing=routing, visit=visit))
        return steps

    def send_rows(self, step: SimpleNamespace) -> None:
        row_kernels.send_rows(step.visit, parts_of(step.rows), self.placement, step.routing, self.ends[step.rank])

    def part(self, source: int, target: int) -> int:
        """Which of the parts of a rank's rows come from that source: its own are the first."""
        return (source - target) % self.world

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
            first = self.part(step.rank, target) * visit.bucket
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

    def compute(self, step: SimpleNamespace, seed: int) -> None:
        """Partial sums of this rank's own, and garbage where none is wanted."""
        generator = torch.Generator().manual_seed(1000 * seed + step.rank)
        step.sums = torch.randn(self.world * step.visit.bucket, self.hidden, generator=generator).to(self.dtype)
        step.sums[(step.visit.slots_RK < 0).all(1)] = float("nan")

    def send_sums(self, step: SimpleNamespace) -> None:
        sum_kernels.send_sums(step.visit, step.sums, self.ends[step.rank])

    def finish(self, steps: list[SimpleNamespace], rank: int) -> None:
        step = steps[rank]
        y = torch.full((step.visit.tokens, self.hidden), -1.0).to(self.dtype)
        sum_kernels.add_sums(step.visit, None, 0, y, self.ends[rank])
        step.visit.window.open = False  # as the exchange does
        assert torch.equal(y, self.expected(steps, rank))

    def expected(self, steps: list[SimpleNamespace], rank: int) -> torch.Tensor:
        """A rank's tokens: added in float32 in the order of ranks, so every way of sending gives these bits."""
        visit = steps[rank].visit
        total = torch.zeros(visit.tokens, self.hidden)
        for other in steps:
            first = self.part(rank, other.rank) * visit.bucket
            theirs = other.sums[first : first + visit.tokens].float()
            total += torch.where(visit.served_TW[:, other.rank, None] != 0, theirs, 0)
        return total.to(self.dtype)

    def exchange(self, rank: int) -> Nvlink:
        comm = SimpleNamespace(
            rank=rank, world=self.world, timeout_s=1.0, device=CPU, sequence=0, window=lambda *_: self.windows[rank]
        )
        exchange = Nvlink(comm, self.placement, self.spec, self.payload, None, "token", self.dtype)
        exchange._ends = self.ends[rank]
        return exchange

    def check_flags(self, ended: int, copied: int = 0) -> None:
        """After so many steps. `copied`: the last one whose rows were copied."""
        for each in self.windows:
            assert each.words[window.STEP] == ended
            assert not each.words[window.TICKETS : window.TICKETS + 2].any()
            flags = each.words[window.FLAGS : window.HEADER_BYTES // 4].view(window.PHASES, window.MOST_RANKS)
            assert bool((flags[: window.COPIED, : self.world] == ended).all())
            assert bool((flags[window.COPIED, 1 : self.world] == copied).all())
            assert not flags[:, self.world :].any()


class Replicated:
    """Ranks of replicated tokens that share `ranks`' windows, each of which must have room."""

    def __init__(self, ranks: Ranks) -> None:
        self.ranks, self.exchanges = ranks, []
        for rank in range(ranks.world):
            comm = SimpleNamespace(
                rank=rank, world=ranks.world, timeout_s=1.0, device=CPU, window=partial(self.window, rank)
            )
            exchange = NvlinkReplicated(comm, ranks.placement, ranks.spec, "none", None, "token", ranks.dtype)
            exchange._ends = ranks.ends[rank]
            self.exchanges.append(exchange)

    def window(self, rank: int, *sizes: int) -> Window:
        found = self.ranks.windows[rank]
        assert all(size <= room for size, room in zip(sizes, found.sizes, strict=True))
        return found

    def step(self, tokens: int, seed: int, routed: bool) -> None:
        """All ranks in turns, and each one's result against the sum of what all had, added in the order of ranks."""
        ranks, generator = self.ranks, torch.Generator().manual_seed(seed)
        ids = torch.randint(-1, EXPERTS, (tokens, TOP_K), generator=generator, dtype=torch.int32)
        routing = Routing(ids, torch.rand(tokens, TOP_K, generator=generator))
        x = torch.randn(tokens, ranks.hidden, generator=generator).bfloat16()
        taken = []
        for rank, exchange in enumerate(self.exchanges):
            step = Step(Workspace(CPU))
            rows, handle = exchange.dispatch(step, x, routing)
            assert torch.equal(rows.slots_RK, ranks.placement.slots_on(rank, ids, None))
            assert exchange.stored_bytes() <= exchange.wire_bytes(
                ranks.spec, ranks.placement, tokens, "none", ranks.dtype.itemsize
            )
            sink = exchange.sink(step, rows, handle, ranks.dtype)
            sums = torch.randn(tokens, ranks.hidden, generator=generator).to(ranks.dtype)
            if routed:
                store(sink, *sink.columns()[0], sums)
            else:
                sink.put(*sink.columns()[0], sums)
                if tokens:
                    reduce_kernels.send_shares(handle, sums, ranks.ends[rank])
            taken.append((sums, handle))
        expected = torch.zeros(tokens, ranks.hidden)
        for sums, _ in taken:
            expected += sums.float()
        if tokens:
            for rank, (_, handle) in enumerate(taken):
                reduce_kernels.add_share(handle, ranks.ends[rank])
        for rank, (_, handle) in enumerate(taken):
            y = torch.full((tokens, ranks.hidden), torch.nan).to(ranks.dtype)
            if tokens:
                reduce_kernels.gather_shares(handle, y, ranks.ends[rank])
            assert torch.equal(y, expected.to(ranks.dtype))


def store(sink: Sink, start: int, stop: int, sums: torch.Tensor, slots_R1: torch.Tensor | None = None) -> None:
    """What a weighted sum of one pair a row does by routes, whose kernel is tested elsewhere. `slots_R1`: -1 where a
    row has none."""
    routes, one, hidden = sink.routes_of(start, stop), torch.ones(len(sums), 1), sums.shape[1]
    slots = one.int() if slots_R1 is None else slots_R1
    grid, at = (len(routes.addresses_W) * routes.each, 1, 1), routes.at + (start - routes.start) * sums.itemsize
    if len(sums):
        _weighted_sum[grid](
            sums, slots, one, one, routes.addresses_W, len(sums), start, at, routes.each, routes.first,
            routes.stop - routes.start, H=hidden, COLUMNS=stop - start, K=1, SPLIT_K=1, PLACED=False, ROUTED=True,
            EVERY=routes.every, WIDE=sums.dtype == torch.float32, BLOCK=1024, PDL=False,
        )  # fmt: skip
    sink.store(start, stop)


COPIES = ParallelSpec(ep=3, replicas={0: (1,), 5: (0, 1)})
GRIDS = [ParallelSpec(ep=3), ParallelSpec(tp=2), ParallelSpec(tp=2, ep=2), ParallelSpec(), COPIES]


@pytest.mark.parametrize("parallel", GRIDS, ids=lambda each: each.label)
@pytest.mark.parametrize(("payload", "dtype"), [("fp8", torch.bfloat16), ("bf16", torch.float32)])
@pytest.mark.parametrize("few", [0, 512])
def test_rows_and_sums_arrive(parallel, payload, dtype, few, monkeypatch):
    monkeypatch.setattr(flags, "FEW", few)
    ranks = Ranks(parallel, payload, dtype, 6)
    for seed, bucket in enumerate((6, 1, 4)):  # one window for all
        counts = [random.Random(seed + rank).randint(0, bucket) for rank in range(ranks.world)]
        steps = ranks.begin(counts, bucket, seed)
        for step in steps:
            ranks.send_rows(step)
        for rank in range(ranks.world):
            ranks.check_rows(steps, rank)
        for step in steps:
            ranks.compute(step, seed)
            ranks.send_sums(step)
        for rank in range(ranks.world):
            ranks.finish(steps, rank)
        ranks.check_flags(seed + 1)


@pytest.mark.parametrize("hidden", [256, 272, 1104])
def test_few_rows_are_quantized_as_they_are_sent(hidden, monkeypatch):
    """With the bits of quantizing first, whatever is left of the last group of columns."""
    ranks = Ranks(ParallelSpec(ep=3), "fp8", torch.bfloat16, 6, hidden)
    exchanges = [ranks.exchange(rank) for rank in range(3)]
    for seed, (bucket, few, most) in enumerate(((6, 512, 6), (4, 512, 4), (6, 5, 6), (6, 512, 5))):
        monkeypatch.setattr(flags, "FEW", few)
        monkeypatch.setattr(row_kernels, "QUANTIZED_UP_TO", most)
        steps = ranks.begin([bucket, 0, bucket - 1], bucket, seed)
        for step, exchange in zip(steps, exchanges, strict=True):
            step.step = Step(Workspace(CPU), bucket)
            given = exchange.to_payload(step.step, step.x, step.routing)
            assert isinstance(given, torch.Tensor) == (bucket <= most)
            step.taken, step.visit = exchange.dispatch(step.step, given, step.routing)
            assert isinstance(step.taken.x, QuantizedRows)
        for step in steps:
            ranks.check_rows(steps, step.rank)
            ranks.compute(step, seed)
            ranks.send_sums(step)
        for rank in range(3):
            ranks.finish(steps, rank)
    ranks.check_flags(4)


@pytest.mark.parametrize("buckets", [(1, 6), (6, 1), (2, 5)])
def test_a_rank_may_be_a_step_ahead(buckets):
    """It sends rows of the next step, of another size, while others have not read their sums yet; then its sums, while
    others have not sent theirs."""
    ranks = Ranks(ParallelSpec(ep=3), "fp8", torch.bfloat16, 6)
    first, second = (ranks.begin([bucket] * 3, bucket, bucket) for bucket in buckets)
    for step in first:
        ranks.send_rows(step)
    for step in first:
        ranks.compute(step, 1)
        ranks.send_sums(step)
    ranks.finish(first, 0)
    ranks.send_rows(second[0])
    for rank in (1, 2):
        ranks.finish(first, rank)
        ranks.send_rows(second[rank])
    ranks.compute(second[0], 2)
    ranks.send_sums(second[0])
    for rank in (1, 2):
        ranks.check_rows(second, rank)
        ranks.compute(second[rank], 2)
        ranks.send_sums(second[rank])
    for rank in range(3):
        ranks.finish(second, rank)
    ranks.check_flags(2)


def test_a_step_that_raises_after_its_rows_were_sent_is_the_last():
    """Its number would be that of the next one, whose rows nobody would wait for. Padding alone sends nothing."""
    ranks = Ranks(ParallelSpec(ep=3), "fp8", torch.bfloat16, 6)
    exchange, (step, *_) = ranks.exchange(0), ranks.begin([4, 4, 4], 4, 1)
    nobody = Routing(step.routing.ids_TK[:0], step.routing.weights_TK[:0])
    exchange.dispatch(Step(Workspace(CPU), 0), step.x[:0], nobody)
    exchange.dispatch(Step(Workspace(CPU), 4), step.rows, step.routing)
    with pytest.raises(RankFailure, match=r"rank 0 .*an earlier step raised after its rows had been sent"):
        exchange.dispatch(Step(Workspace(CPU), 4), step.rows, step.routing)


@pytest.mark.parametrize("parallel", [ParallelSpec(tp=2), ParallelSpec(ep=3), ParallelSpec()],
                         ids=lambda each: each.label)  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("few", [0, 512])
def test_sums_of_replicated_tokens(parallel, dtype, few, monkeypatch):
    """Steps of changing sizes, none and fewer tokens than ranks among them, stored by routes or sent by a launch."""
    monkeypatch.setattr(flags, "FEW", few)
    ranks = Ranks(parallel, "bf16", dtype, 6)
    replicated, steps = Replicated(ranks), 0
    for seed, tokens in enumerate((5, 1, 0, 6, 2)):
        for routed in (True, False):
            replicated.step(tokens, seed, routed)
            steps += tokens > 0
    ranks.check_flags(steps)


def test_layers_of_sharded_and_of_replicated_tokens_share_windows():
    ranks = Ranks(ParallelSpec(ep=3), "bf16", torch.bfloat16, 6)
    replicated = Replicated(ranks)
    for seed, bucket in enumerate((6, 2, 5)):
        replicated.step(4, seed, True)
        steps = ranks.begin([bucket] * 3, bucket, seed)
        for step in steps:
            ranks.send_rows(step)
        for step in steps:
            ranks.compute(step, seed)
            ranks.send_sums(step)
        for rank in range(3):
            ranks.finish(steps, rank)
    ranks.check_flags(6)


def in_ranges(sink, sums: torch.Tensor, slots_R1: torch.Tensor) -> None:
    for start, stop in sink.columns():
        sink.put(start, stop, sink.target(start, stop).copy_(sums[:, start:stop]))


def in_ranges_of_its_own(sink, sums: torch.Tensor, slots_R1: torch.Tensor) -> None:
    """A backend may hand over memory that is not the sink's."""
    for start, stop in sink.columns():
        sink.put(start, stop, sums[:, start:stop].contiguous())


def by_routes(sink, sums: torch.Tensor, slots_R1: torch.Tensor) -> None:
    """As triton and cutlass do: the last range is stored."""
    *first, last = sink.columns()
    for each in first:
        assert sink.routes_of(*each) is None
        sink.put(*each, sink.target(*each).copy_(sums[:, slice(*each)]))
    store(sink, *last, sums, slots_R1)


@pytest.mark.parametrize(
    "parallel", [ParallelSpec(ep=3), ParallelSpec(tp=2, ep=2), COPIES], ids=lambda each: each.label
)
@pytest.mark.parametrize(
    ("payload", "dtype", "part", "widths", "twice"),
    [
        ("fp8", torch.bfloat16, 0.6, [512, 256], [256, 256, 256]),
        ("bf16", torch.float32, 0.2, [256, 512], [256, 256, 256]),
        ("bf16", torch.bfloat16, 1.0, [768, 16], [256, 256, 272]),
        ("bf16", torch.bfloat16, 0.4, [512, 528], [512, 512, 16]),
    ],
)
def test_some_columns_of_sums_go_ahead(parallel, payload, dtype, part, widths, twice, monkeypatch):
    """Steps of all kinds in one window: from 4 tokens a rank on, columns go ahead, and from 5 on, rows are copied; from
    6 on, two ranges go ahead."""
    hidden = sum(widths)
    ranks = Ranks(parallel, payload, dtype, 6, hidden)
    monkeypatch.setattr(engines, "AHEAD_PART", part)
    monkeypatch.setattr(engines, "TWICE_PART", part)
    monkeypatch.setattr(engines, "TWICE_FROM", 6 * (ranks.world - 1) * hidden * dtype.itemsize)
    monkeypatch.setattr(engines, "MOST_PAIRS", TOP_K)
    monkeypatch.setattr(engines, "AHEAD_FROM", 4 * (ranks.world - 1) * hidden * dtype.itemsize)
    row_bytes = payload_row_bytes(ranks.spec, payload) - 8 * TOP_K
    monkeypatch.setattr(engines, "COPIED_FROM", 5 * (ranks.world - 1) * row_bytes)
    exchanges, copied = [ranks.exchange(rank) for rank in range(ranks.world)], 0
    for seed, bucket in enumerate((6, 2, 4, 5, 1)):
        monkeypatch.setattr(flags, "FEW", (512, 0)[seed % 3 % 2])
        counts = [random.Random(seed + rank).choice((0, bucket, random.Random(seed * rank).randint(0, bucket)))
                  for rank in range(ranks.world)]  # fmt: skip
        steps = ranks.begin(counts, bucket, seed)
        wanted = [] if bucket < 4 else widths if bucket < 6 else twice
        assert steps[0].visit.ahead.columns == sum(wanted[:-1])
        copied = seed + 1 if bucket >= 5 else copied
        for step, exchange in zip(steps, exchanges, strict=True):
            step.step = Step(Workspace(CPU), bucket)
            if seed % 2 and step.visit.tokens:  # where a GPU quantizes them to
                room = exchange.payload_room(step.step, step.visit.tokens)
                placed = [room(tuple(part.shape), part.dtype).copy_(part) for part in parts_of(step.rows)]
                step.rows = activations_of(step.rows, placed)
            step.taken, step.visit = exchange.dispatch(step.step, step.rows, step.routing)
        for step, exchange in zip(steps, exchanges, strict=True):
            arrivals = step.taken.arrivals
            assert (arrivals is not None) == (bucket >= 5)
            if arrivals is not None:
                assert (arrivals.each, arrivals.rank, len(arrivals.flags_P)) == (bucket, step.rank, ranks.world)
                assert bool((arrivals.flags_P[1:] == arrivals.step + 1).all())
                if seed == 0:
                    step.taken = exchange.arrived(step.step, step.taken, step.visit)
                    assert step.taken.arrivals is None
            ranks.check_rows(steps, step.rank)
            ranks.compute(step, seed)
            if bucket < 4:
                ranks.send_sums(step)
                continue
            step.sink = exchange.sink(step.step, step.taken, step.visit, dtype)
            assert [stop - start for start, stop in step.sink.columns()] == wanted
            how = (by_routes, in_ranges, in_ranges_of_its_own)[(seed + step.rank) % 3]  # each rank as it likes
            how(step.sink, step.sums, step.visit.slots_RK.amax(1, keepdim=True))
            used = step.step.workspace.high_water
            assert used <= bytes_of(exchange.scratch(ranks.spec, ranks.placement, payload, dtype, bucket))
        for step, exchange in zip(steps, exchanges, strict=True):
            if bucket < 4:
                ranks.finish(steps, step.rank)
            else:
                y = exchange.combine(step.step, step.sink, step.visit)
                assert torch.equal(y, ranks.expected(steps, step.rank))
        ranks.check_flags(seed + 1, copied)


@pytest.mark.parametrize("few", [0, 512])
def test_ranks_may_differ_in_how_they_send(few, monkeypatch):
    """In a step whose first columns go ahead, rank 0 goes through both ranges, rank 1 has all columns at once. Rank 2
    holds nothing and adds zeros."""
    ranks = Ranks(ParallelSpec(tp=3, allow_empty_shards=True), "fp8", torch.bfloat16, 6, 768)
    monkeypatch.setattr(flags, "FEW", few)
    monkeypatch.setattr(engines, "AHEAD_FROM", 1)
    monkeypatch.setattr(engines, "MOST_PAIRS", TOP_K)
    exchanges, steps = [ranks.exchange(rank) for rank in range(3)], ranks.begin([5, 0, 6], 6, 1)
    for step, exchange in zip(steps, exchanges, strict=True):
        step.step = Step(Workspace(CPU), 6)
        step.taken, step.visit = exchange.dispatch(step.step, step.rows, step.routing)
    for step, exchange in zip(steps, exchanges, strict=True):
        ranks.compute(step, 1)
        step.sink = exchange.sink(step.step, step.taken, step.visit, torch.bfloat16)
        assert len(step.sink.columns()) == 2
    in_ranges(steps[0].sink, steps[0].sums, steps[0].visit.slots_RK)
    steps[1].sink.put_all(steps[1].sink.whole(steps[1].step).copy_(steps[1].sums))
    unsent, *_ = steps[1].sink.finish()
    sum_kernels.send_sums(steps[1].visit, unsent, ranks.ends[1])  # `combine` does it too, after rank 0's here
    steps[2].sink.put_zeros()
    steps[2].sums.zero_()
    for step, exchange in zip(steps, exchanges, strict=True):
        y = exchange.combine(step.step, step.sink, step.visit)
        assert torch.equal(y, ranks.expected(steps, step.rank))
    ranks.check_flags(1)


def test_only_large_steps_are_cut(monkeypatch):
    """DeepSeek-V3 on four ranks: 2,048 tokens a rank send 88 MB of sums. By hand."""
    large = MoESpec(hidden=7168, intermediate=2048, num_experts=256, top_k=8)
    ep4, tp4, one = (Placement.build(large, ParallelSpec(**size)) for size in ({"ep": 4}, {"tp": 4}, {}))
    assert engines.columns_ahead(large, ep4, 1024, 2) == (0, 0)
    assert engines.columns_ahead(large, ep4, 2048, 2) == engines.columns_ahead(large, ep4, 8192, 2) == (3584, 1)
    assert engines.columns_ahead(large, tp4, 8192, 2) == (0, 0)  # each row has eight pairs
    assert engines.columns_ahead(large, one, 1 << 20, 2) == (0, 0)
    monkeypatch.setattr(engines, "TWICE_FROM", 256 << 20)
    assert engines.columns_ahead(large, ep4, 2048, 2) == (3584, 1)
    assert engines.columns_ahead(large, ep4, 8192, 2) == (2560, 2)
    monkeypatch.setattr(engines, "AHEAD_FROM", 1)
    narrow = MoESpec(hidden=256, intermediate=256, num_experts=8, top_k=2)
    two = Placement.build(narrow, ParallelSpec(ep=2))
    assert engines.columns_ahead(narrow, two, 8192, 2) == (0, 0)  # of one tile
    assert not engines.rows_are_copied(4, 2048, 7168 + 224)
    assert engines.rows_are_copied(4, 8192, 7168 + 224)
    spec = MoESpec(hidden=512, intermediate=256, num_experts=EXPERTS, top_k=1)
    placement, (row, pairs, total) = Placement.build(spec, ParallelSpec(ep=3)), (512 + 4 * 4, 8, 512 * 2)
    for ahead, copied in ((0, 0), (1, 0), (0, 1)):
        monkeypatch.setattr(engines, "AHEAD_FROM", ahead)
        monkeypatch.setattr(engines, "COPIED_FROM", copied)
        sent = 4 * (2 * pairs + row * (1 + copied) + total * 2)
        assert Nvlink.wire_bytes(spec, placement, 12, "fp8", 2) == sent


@pytest.mark.parametrize(("ahead", "copied"), [(0, 0), (1, 0), (1, 1)])
@pytest.mark.parametrize("routed", [False, True])
def test_the_exchange_counts_what_it_stores_elsewhere(ahead, copied, routed, monkeypatch):
    """By hand: rows, sums, and every token's slots and weights, to other ranks only. Copies have no gaps."""
    monkeypatch.setattr(engines, "AHEAD_FROM", ahead)
    monkeypatch.setattr(engines, "MOST_PAIRS", TOP_K)
    monkeypatch.setattr(engines, "COPIED_FROM", copied)
    ranks = Ranks(ParallelSpec(ep=3), "fp8", torch.bfloat16, 6, 512)
    steps, exchanges = ranks.begin([4, 6, 0], 6, 1), [ranks.exchange(rank) for rank in range(3)]
    for step, exchange in zip(steps, exchanges, strict=True):
        assert exchange.stored_bytes() == 0
        step.step = Step(Workspace(CPU), bucket=6)
        step.taken, step.visit = exchange.dispatch(step.step, step.rows, step.routing)
    for step, exchange in zip(steps, exchanges, strict=True):
        sink = exchange.sink(step.step, step.taken, step.visit, torch.bfloat16)
        if ahead and routed:
            ranks.compute(step, 1)
            by_routes(sink, step.sums, step.visit.slots_RK.amax(1, keepdim=True))
        else:
            sink.put_zeros()
        exchange.combine(step.step, sink, step.visit)
    row, pairs = 512 + 4 * 4, 8 * TOP_K
    slots = [
        torch.stack([ranks.placement.slots_on(target, step.routing.ids_TK, 6).ge(0).any(1) for target in range(3)])
        for step in steps
    ]
    for rank, exchange in enumerate(exchanges):
        others = [other for other in range(3) if other != rank]
        leaving = 2 * (4, 6, 0)[rank] if copied else int(slots[rank][others].sum())
        needed = sum(int(slots[other][rank].sum()) for other in others)
        gapless = 0 if not ahead else 256 if routed else 512  # columns
        stored = 2 * 6 * pairs + leaving * row + 2 * (2 * 6 * gapless + needed * (512 - gapless))
        assert exchange.stored_bytes() == stored <= Nvlink.wire_bytes(ranks.spec, ranks.placement, 18, "fp8", 2)
