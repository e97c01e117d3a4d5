"""Steps of the nvlink exchange in orders that its waits allow: which rank goes on is drawn, and copies are as late as
they can be. In Triton's interpreter, all ranks in one process; run by test_kernels.py."""

from __future__ import annotations

import random
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from nvlink_interpreted import COPIES, CPU, EXPERTS, TOP_K, Ranks, store, windows_of
from side_streams import CUDA, Turns

from moe_dist.comm.symmetric import Aside
from moe_dist.exchange.nvlink import engines, exchange, flags, reduce_kernels, row_kernels, sinks, sum_kernels, window
from moe_dist.exchange.nvlink.replicated import NvlinkReplicated
from moe_dist.exchange.nvlink.window import Ends
from moe_dist.exchange.rows import activations_of, parts_of
from moe_dist.model.routing import Routing
from moe_dist.model.spec import ParallelSpec
from moe_dist.step import Sink, Step, TokenRows, Workspace

MOST = 6  # tokens a rank
FIRST = 2**31 - 4  # the number of the last step before those here: numbers wrap around in the middle

# Layer and bucket of each step. In layer 0 rows are copied from 4 tokens a rank on, and columns go ahead from 5 on, in
# two ranges from 6 on. In layer 1 columns go ahead from 4 on, and rows are copied from 6 on. Layer 2 has replicated
# tokens.
STEPS = [(0, 6), (1, 6), (0, 2), (0, 4), (2, 4), (1, 4), (0, 4), (1, 2), (0, 5)]


class Waits:
    """Launches that wait as on a GPU: one that awaits flags is over when they are there. In the interpreter it asks for
    them at its end, so a launch must not read what is behind them: nothing but rows ends its phase `at_once`."""

    def __init__(self, turns: Turns, windows: list[Any], patch: pytest.MonkeyPatch) -> None:
        self.turns, self.windows = turns, windows
        self._asked: list[Callable[[], bool]] = []
        self._launch = flags.launch
        for module in (flags, row_kernels, sum_kernels, reduce_kernels):
            patch.setattr(module, "launch", self._launched)
            patch.setattr(module, "await_flags", self._await, raising=False)
        for module in (sum_kernels, reduce_kernels):
            patch.setattr(module, "few", lambda grid: False)

    def _launched(self, kernel: Any, *given: Any, **options: Any) -> None:
        if kernel is flags._meet and given[-1][0] == window.SUMS:
            assert self.turns.stream.joined, "the others may begin a step while copies of this one are under way"
        self._launch(kernel, *given, **options)
        self.turns.stream.launched += 1
        asked, self._asked = self._asked, []
        self.turns.pause(lambda: all(there() for there in asked))

    def _await(self, header: Any, failed: Any, phase: Any, first: Any, number: Any, *_: Any) -> None:
        phase, number = int(getattr(phase, "value", phase)), int(number.handle.data.item())
        at = window.FLAGS + phase * window.MOST_RANKS
        words = self.windows[self.turns.rank].words[at : at + self.turns.world]
        copied = phase == window.COPIED
        self._asked.append(lambda: bool(((words == number) if copied else (words - number >= 0)).all()))


class Stack:
    """Two layers of sharded tokens and one of replicated ones, of several widths, that share windows and scratch."""

    def __init__(self, parallel: ParallelSpec, turns: Turns, patch: pytest.MonkeyPatch) -> None:
        self.turns = turns
        self.layers = [
            Ranks(parallel, "fp8", torch.bfloat16, MOST, 768),
            Ranks(parallel, "fp8", torch.float32, MOST, 528),
        ]
        both = zip(*(ranks.windows[0].sizes for ranks in self.layers), strict=True)
        windows = windows_of(turns.world, tuple(max(sizes) for sizes in both))
        for each in windows:
            each.words[window.STEP] = FIRST
            of_phases = each.words[window.FLAGS : window.HEADER_BYTES // 4].view(window.PHASES, window.MOST_RANKS)
            of_phases[: window.COPIED, : turns.world] = FIRST
        Waits(turns, windows, patch)
        for ranks in self.layers:
            ranks.windows = windows
            ranks.ends = [Ends(rank, turns.world, 10**9) for rank in range(turns.world)]
        self.exchanges = [[ranks.exchange(rank) for ranks in self.layers] for rank in range(turns.world)]
        for rank, exchanges in enumerate(self.exchanges):
            exchanges.append(self._replicated(rank))
        self.steps = [self._inputs(number, *each) for number, each in enumerate(STEPS)]

    def _replicated(self, rank: int) -> NvlinkReplicated:
        ranks, world = self.layers[0], self.turns.world
        comm = SimpleNamespace(rank=rank, world=world, timeout_s=1.0, device=CPU, window=lambda *_: ranks.windows[rank])
        made = NvlinkReplicated(comm, ranks.placement, ranks.spec, "none", None, "token", ranks.dtype)
        made._ends = ranks.ends[rank]
        return made

    def _inputs(self, seed: int, layer: int, bucket: int) -> list[SimpleNamespace]:
        """Each rank's tokens: all, some or none of the bucket; in every third step all of them for rank 0."""
        chance = random.Random(seed)
        if layer == 2:
            ids = torch.randint(-1, EXPERTS, (bucket, TOP_K), dtype=torch.int32)
            given = SimpleNamespace(routing=Routing(ids, torch.rand(bucket, TOP_K)), x=torch.zeros(bucket, 768))
            given.sums = [torch.randn(bucket, 768).bfloat16() for _ in range(self.turns.world)]
            return [given] * self.turns.world
        ranks = self.layers[layer]
        counts = [bucket, *(chance.choice((0, bucket, chance.randint(0, bucket))) for _ in range(ranks.world - 1))]
        steps = ranks.begin(counts, bucket, seed)
        if seed % 3 == 0:
            for step in steps:
                step.routing.ids_TK.clamp_(max=0)
        return steps

    def run(self, rank: int) -> None:
        """All steps of one rank. Its scratch begins as NaN in each."""
        workspace = Workspace(CPU)
        workspace.reserve(1 << 20)
        for number, (layer, bucket) in enumerate(STEPS):
            workspace.begin(poisoned=True)
            step, steps = Step(workspace, bucket), self.steps[number]
            if layer == 2:
                self._replicated_step(step, steps[rank], rank)
            else:
                self._sharded_step(step, steps, layer, number, rank)
            assert workspace.high_water <= workspace.nbytes

    def _sharded_step(self, step: Step, steps: list[SimpleNamespace], layer: int, number: int, rank: int) -> None:
        here, ranks, mine = self.exchanges[rank][layer], self.layers[layer], steps[rank]
        given = mine.rows
        if number % 2 and mine.visit.tokens:  # where a GPU quantizes them to
            room = here.payload_room(step, mine.visit.tokens)
            given = activations_of(given, [room(tuple(each.shape), each.dtype).copy_(each) for each in parts_of(given)])
        rows, mine.visit = here.dispatch(step, given, mine.routing)
        if (number + rank) % 3 == 0:
            rows = here.arrived(step, rows, mine.visit)
        self._check_rows(ranks, steps, rank, rows)
        ranks.compute(mine, number)
        sink = here.sink(step, rows, mine.visit, ranks.dtype)
        self._give(step, sink, mine.sums, mine.visit.slots_RK.amax(1, keepdim=True), (number // 2 + rank) % 4)
        y = here.combine(step, sink, mine.visit)
        assert torch.equal(y, ranks.expected(steps, rank))

    def _check_rows(self, ranks: Ranks, steps: list[SimpleNamespace], target: int, rows: TokenRows) -> None:
        """As GEMM1 reads them: part by part, and only those that are needed here."""
        bucket, arrivals = steps[0].visit.bucket, rows.arrivals
        for part in range(ranks.world):
            source = steps[(target + part) % ranks.world]
            padded = torch.full((bucket, TOP_K), -1, dtype=torch.int32)
            padded[: len(source.x)] = source.routing.ids_TK
            everyone = torch.full((ranks.world * bucket, TOP_K), -1, dtype=torch.int32)
            everyone[source.rank * bucket :][:bucket] = padded
            slots = ranks.placement.slots_on(target, everyone, bucket)[source.rank * bucket :][:bucket]
            assert torch.equal(rows.slots_RK[part * bucket :][:bucket], slots)
            used = (slots >= 0).any(1)
            if not used.any():
                continue
            if arrivals is not None and part:
                flag = arrivals.flags_P[part]
                self.turns.pause(lambda flag=flag: bool(flag == arrivals.step + 1))
            for sent, there in zip(parts_of(source.rows), parts_of(rows.x), strict=True):
                came = there[part * bucket :][: len(sent)].view(torch.uint8).flatten(1)
                wanted = sent.contiguous().view(torch.uint8).flatten(1)
                assert torch.equal(came[used[: len(sent)]], wanted[used[: len(sent)]])

    def _give(self, step: Step, sink: Sink, sums: torch.Tensor, slots_R1: torch.Tensor, how: int) -> None:
        """By routes, from the sink's memory, from other memory, or all at once."""
        if how == 3:
            sink.put_all(sink.whole(step).copy_(sums))
            return
        for start, stop in sink.columns():
            self.turns.pause()
            if how == 0 and sink.routes_of(start, stop) is not None:
                store(sink, start, stop, sums, slots_R1)
            elif how == 1:
                sink.put(start, stop, sums[:, start:stop].contiguous())
            else:
                sink.put(start, stop, sink.target(start, stop).copy_(sums[:, start:stop]))

    def _replicated_step(self, step: Step, given: SimpleNamespace, rank: int) -> None:
        here, sums = self.exchanges[rank][2], given.sums[rank]
        rows, handle = here.dispatch(step, given.x, given.routing)
        sink = here.sink(step, rows, handle, torch.bfloat16)
        if rank:
            store(sink, *sink.columns()[0], sums)
        else:
            sink.put_all(sink.whole(step).copy_(sums))
        expected = torch.zeros_like(sums, dtype=torch.float32)
        for each in given.sums:
            expected += each.float()
        assert torch.equal(here.combine(step, sink, handle), expected.bfloat16())


EP3, TP2 = ParallelSpec(ep=3), ParallelSpec(tp=2)
ORDERS = [(EP3, "late", 512), (EP3, "at any time", 0), (EP3, "at once", 512), (COPIES, "late", 0),
          (COPIES, "at any time", 512), (TP2, "late", 512), (TP2, "at any time", 0)]  # fmt: skip


@pytest.mark.parametrize(("parallel", "copies", "few"), ORDERS, ids=lambda each: getattr(each, "label", each))
def test_ranks_and_copies_in_any_order(parallel, copies, few, monkeypatch):
    monkeypatch.setattr(flags, "FEW", few)
    world = parallel.world
    turns = Turns(world, few, copies)
    turns.stand_in(monkeypatch)
    for module in (exchange, sinks):
        monkeypatch.setattr(module, "Aside", lambda device: Aside(CUDA))
    others = world - 1
    monkeypatch.setattr(engines, "MOST_PAIRS", TOP_K)
    monkeypatch.setattr(engines, "AHEAD_FROM", 5 * others * 768 * 2)
    monkeypatch.setattr(engines, "TWICE_FROM", 6 * others * 768 * 2)
    monkeypatch.setattr(engines, "COPIED_FROM", 4 * others * (768 + 24))
    stack = Stack(parallel, turns, monkeypatch)
    turns.play(stack.run)
    for each in stack.layers[0].windows:
        assert each.words[window.STEP] == FIRST + len(STEPS) - 2**32
        assert not each.open
    assert all(stream.joined for stream in turns.streams)
