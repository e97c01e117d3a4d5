"""What every exchange owes its caller, whatever the backend does: rows arrive where their experts live, once, and what
the ranks return adds up. A backend that returns x times the weights of its slots makes dispatch and combine the
identity times the sum of the weights.

Values are small integers and weights multiples of 1/64, so float32 sums are exact in any order and results are compared
bit by bit.
"""

from __future__ import annotations

import os
import random
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from dist.pool import Pool
from exchanges import exchanges_here
from torch import Tensor

from moe_dist.comm import Comm
from moe_dist.errors import ConfigError
from moe_dist.exchange import EXCHANGES, Exchange
from moe_dist.exchange.all_to_all.exchange import PACKED_UP_TO, AllToAll
from moe_dist.exchange.layout import with_layout
from moe_dist.model.placement import Placement
from moe_dist.model.quantization import FP8, QuantizedRows, dequantize_rows, quantize_rows
from moe_dist.model.routing import Routing
from moe_dist.model.spec import MoESpec, ParallelSpec, split_bounds
from moe_dist.step import Step, TokenRows, workspace_of

SEED = int(os.environ.get("MOE_DIST_TEST_SEED") or int.from_bytes(os.urandom(4), "little"))
DRAWS = 12
SPREADING = [name for name in exchanges_here() if name != "local"]


@dataclass(frozen=True)
class Draw:
    """One random problem, the same on every rank. `counts[r]` tokens on rank r where tokens are sharded."""

    spec: MoESpec
    placement: Placement
    counts: tuple[int, ...]
    x: Tensor
    routing: Routing

    def bounds(self, rank: int, layout: str) -> tuple[int, int]:
        if layout == "replicated":
            return 0, sum(self.counts)
        return sum(self.counts[:rank]), sum(self.counts[: rank + 1])


def draw(seed: int, world: int, quant: str = "none", spread_evenly: bool = False) -> Draw:
    """`spread_evenly`: the shards are those that a replicated batch is cut into."""
    choose = random.Random(f"{seed} {world} {quant}")
    tp = choose.choice([1, 1, *(n for n in range(1, world + 1) if world % n == 0)])
    ep = world // tp
    experts = choose.randint(1, 12)
    spec = MoESpec(
        hidden=choose.choice([1, 16, 130, 256]), intermediate=128 * tp, num_experts=experts,
        top_k=choose.randint(1, min(experts, 5)), quant=quant, dtype="fp32" if quant == "none" else "bf16",
    )  # fmt: skip
    owner = [group for group, (a, b) in enumerate(split_bounds(experts, ep)) for _ in range(a, b)]
    expert_map = choose.choice([(), tuple(choose.choices(range(ep), k=experts))])
    owner = list(expert_map or owner)
    replicas = {}
    for expert in choose.sample(range(experts), choose.randint(0, experts)) if choose.random() < 0.8 else []:
        others = [group for group in range(ep) if group != owner[expert]]
        if others:
            replicas[expert] = tuple(choose.sample(others, choose.randint(1, min(2, len(others)))))
    parallel = ParallelSpec(tp=tp, ep=ep, expert_map=expert_map, replicas=replicas, allow_empty_shards=True)
    placement = Placement.build(spec, parallel)
    most = choose.choice([1, 5, 9, 9])
    counts = tuple(choose.choice([0, choose.randint(0, most), most]) for _ in range(world))
    if spread_evenly:
        counts = tuple(b - a for a, b in split_bounds(sum(counts), world))

    generator = torch.Generator().manual_seed(seed)
    tokens = sum(counts)
    x = torch.randint(-8, 9, (tokens, spec.hidden), generator=generator).to(spec.torch_dtype)
    if quant != "none":
        x = torch.randn(tokens, spec.hidden, generator=generator).to(spec.torch_dtype)
    ids = torch.rand(tokens, experts, generator=generator).argsort(1)[:, : spec.top_k].to(torch.int32)
    hole = torch.rand(ids.shape, generator=generator) < choose.choice([0.0, 0.2, 0.8])
    weights = torch.randint(1, 65, ids.shape, generator=generator) / 64
    return Draw(spec, placement, counts, x, Routing(ids.masked_fill(hole, -1), weights.masked_fill(hole, 0.0)))


def serving_ranks(problem: Draw, token: int, source: int) -> dict[int, list[int]]:
    """Brute force for exchanges with sharded tokens: the ranks that must see a token, and its experts on each."""
    placement = problem.placement
    row = token - sum(problem.counts[:source])
    ranks: dict[int, list[int]] = {}
    for expert in problem.routing.ids_TK[token].tolist():
        if expert < 0:
            continue
        own = [placement.owners[expert]]
        copies = own + [g for g, held in enumerate(placement.homes) if expert in held and g not in own]
        home = source // placement.tp
        group = home if home in copies else copies[(row + expert) % len(copies)]
        for rank in range(group * placement.tp, (group + 1) * placement.tp):
            ranks.setdefault(rank, []).append(expert)
    return ranks


def identity(rows: TokenRows, static_scale: Tensor | None, placement: Placement, rank: int) -> Tensor:
    """The backend: x times the weights of the slots that are here. A TP member does its part of it: parts of different
    sizes (1/2, 1/4, ... and the last one again) that add up to exactly 1."""
    member = rank % placement.tp
    part = 0.5 ** min(member + 1, placement.tp - 1)
    x = dequantize_rows(rows.x, static_scale) if isinstance(rows.x, QuantizedRows) else rows.x.float()
    return x * torch.where(rows.slots_RK >= 0, rows.weights_RK, 0.0).sum(1, keepdim=True) * part


def pairs(slots_RK: Tensor, weights_RK: Tensor) -> list[tuple[int, float]]:
    """What a rank computes, without regard to the order of rows: slot and weight of each (token, expert) pair."""
    here = slots_RK >= 0
    return sorted(zip(slots_RK[here].tolist(), weights_RK[here].tolist(), strict=True))


def identified(problem: Draw, moved: Exchange[Any, Any], rank: int, layout: str) -> list[tuple[int, float]]:
    """The pairs that rank `rank` computes by what the exchange tells the oracle."""
    bounds = [(0, sum(problem.counts))]
    if layout == "sharded":
        bounds = [problem.bounds(source, layout) for source in range(problem.placement.world)]
    ids = problem.routing.ids_TK
    groups = problem.placement.serving_groups(ids, *moved.identify(bounds))
    return pairs(problem.placement.local_slots(ids, groups, rank), problem.routing.weights_TK)


def made(
    comm: Comm, problem: Draw, exchange: str, layout: str, payload: str, static: Tensor | None = None
) -> Exchange[Any, Any]:
    return with_layout(EXCHANGES.get(exchange)(comm, problem.placement, problem.spec, payload, static), layout)


def through(
    comm: Comm,
    problem: Draw,
    exchange: str,
    layout: str,
    payload: str,
    bucket: int | None,
    static: Tensor | None,
    exact: bool = False,
) -> tuple[Tensor, TokenRows, int]:
    """This rank's result, the rows it was sent and the bytes it sent. `exact`: all_to_all pads nothing."""
    moved = made(comm, problem, exchange, layout, payload, static)
    inner = getattr(moved, "inner", moved)
    if exact and isinstance(inner, AllToAll):
        inner.padding_up_to = -1
    start, stop = problem.bounds(comm.rank, layout)
    if bucket is None and moved.needs_bucket:
        bucket = max(problem.counts)
    before = comm.bytes_sent
    step = Step(workspace_of(comm.device), bucket if moved.needs_bucket else None)
    step.workspace.begin()
    routing = problem.routing.rows(start, stop)
    rows, handle = moved.dispatch(step, moved.to_payload(step, problem.x[start:stop].clone(), routing), routing)
    sums = identity(rows, static, problem.placement, comm.rank)
    sink = moved.sink(step, rows, handle, sums.dtype)
    sink.put_all(sink.whole(step).copy_(sums))
    y = moved.combine(step, sink, handle)
    return y, rows, comm.bytes_sent - before


BUCKET = 1025  # tokens a rank


def nothing_wrong(by_rank: list[list[str]]) -> None:
    lines = [line for lines in by_rank for line in lines]
    assert not lines, f"{len(lines)} findings, MOE_DIST_TEST_SEED={SEED}:\n" + "\n".join(lines[:20])


def check_identity(comm: Comm, exchange: str, layout: str, seeds: list[int]) -> list[str]:
    wrong = []
    for seed in seeds:
        problem = draw(seed, comm.world)
        start, stop = problem.bounds(comm.rank, layout)
        expected = problem.x[start:stop] * problem.routing.weights_TK[start:stop].sum(1, keepdim=True)
        computed = identified(problem, made(comm, problem, exchange, layout, "fp32"), comm.rank, layout)
        needed = max(problem.counts)  # what None stands for
        # all_to_all packs its rows, pads its splits to even ones, and beyond that agrees on exact ones.
        tried = [(bucket, False) for bucket in (None, needed + 3, needed + PACKED_UP_TO)]
        for bucket, exact in [*tried, (None, exchange == "all_to_all"), (needed + 3, exchange == "all_to_all")]:
            y, rows, _ = through(comm, problem, exchange, layout, "fp32", bucket, None, exact)
            label = (
                f"seed {seed} bucket {bucket} exact {exact} rank {comm.rank} {problem.placement.homes} {problem.counts}"
            )
            if rows.slots_RK.dtype != torch.int32 or rows.weights_RK.dtype != torch.float32:
                wrong.append(f"{label}: slots are {rows.slots_RK.dtype}, weights {rows.weights_RK.dtype}")
            if y.shape != expected.shape or not torch.equal(y, expected):
                wrong.append(f"{label}: not the identity")
            if pairs(rows.slots_RK, rows.weights_RK) != computed:
                wrong.append(f"{label}: computes other pairs than identify() says")
            if bool((rows.slots_RK >= len(problem.placement.experts_of(comm.rank))).any()):
                wrong.append(f"{label}: a slot that this rank does not have")
    return wrong


@pytest.mark.parametrize("layout", ["sharded", "replicated"])
@pytest.mark.parametrize(
    ("world", "exchange"),
    [
        pytest.param(world, exchange, marks=[pytest.mark.slow] * (world >= 6 and exchange != "all_to_all"))
        for world in (1, 2, 3, 4, 6, 8) for exchange in (SPREADING if world > 1 else exchanges_here())
    ],
)  # fmt: skip
def test_dispatch_then_combine_is_the_identity(pool: Pool, world: int, exchange: str, layout: str) -> None:
    seeds = [SEED + i for i in range(DRAWS)]
    nothing_wrong(pool.run(world, check_identity, exchange, layout, seeds))


def check_all_to_all(comm: Comm, seeds: list[int]) -> list[str]:
    """Rows and bytes of an all_to_all with uneven splits against a count by hand; x tells which token a row is."""
    wrong = []
    for seed in seeds:
        problem = draw(seed, comm.world)
        tokens = sum(problem.counts)
        tags = torch.arange(1.0, tokens + 1)[:, None].expand(tokens, problem.spec.hidden)
        problem = Draw(problem.spec, problem.placement, problem.counts, tags, problem.routing)
        _, rows, sent = through(comm, problem, "all_to_all", "sharded", "fp32", BUCKET, None, exact=True)
        label = f"seed {seed} rank {comm.rank}"

        source_of = [rank for rank, count in enumerate(problem.counts) for _ in range(count)]
        wanted = [serving_ranks(problem, token, source) for token, source in enumerate(source_of)]
        expected = [token for token in range(tokens) if comm.rank in wanted[token]]
        expected.sort(key=lambda token: source_of[token] != comm.rank)  # its own, which don't travel, come first
        found = [int(tag) - 1 for tag in rows.x[:, 0]]
        if found != expected:
            wrong.append(f"{label}: got tokens {found}, not {expected}")
            continue
        held = problem.placement.experts_of(comm.rank)
        for token, slots, weights in zip(found, rows.slots_RK.tolist(), rows.weights_RK, strict=True):
            here = [expert in wanted[token][comm.rank] for expert in problem.routing.ids_TK[token].tolist()]
            own = [held[slot] if slot >= 0 else None for slot in slots]
            if own != [e if yes else None for e, yes in zip(problem.routing.ids_TK[token].tolist(), here, strict=True)]:
                wrong.append(f"{label}: token {token} has experts {own}, not {wanted[token][comm.rank]}")
            if not torch.equal(weights, problem.routing.weights_TK[token] * torch.tensor(here)):
                wrong.append(f"{label}: token {token} has weights {weights}")

        row_bytes, pair_bytes = 4 * problem.spec.hidden, 8 * problem.spec.top_k
        away = sum(len(wanted[t].keys() - {comm.rank}) for t in range(tokens) if source_of[t] == comm.rank)
        back = sum(source_of[token] != comm.rank for token in expected)
        listed = (comm.world - 1) * (BUCKET + 1) * pair_bytes  # padded, and a place for the number
        if sent != (away + back) * row_bytes + listed:
            wrong.append(f"{label}: {sent} bytes for {away} rows out and {back} back")
    return wrong


@pytest.mark.parametrize("world", [2, 3, 4, 8])
def test_all_to_all_sends_a_token_once_to_each_rank_that_needs_it(pool: Pool, world: int) -> None:
    seeds = [SEED + 100 + i for i in range(DRAWS)]
    nothing_wrong(pool.run(world, check_all_to_all, seeds))


def count_bytes(comm: Comm, exchange: str, layout: str, bucket: int, seeds: list[int]) -> list[str]:
    """Bytes against the formulas that the exchanges are chosen by, with fixed splits."""
    wrong = []
    for seed in seeds:
        problem = draw(seed, comm.world)
        spec, world, T = problem.spec, comm.world, sum(problem.counts)
        _, _, sent = through(comm, problem, exchange, layout, "fp32", bucket, None)
        row, y_row = 4 * spec.hidden + 8 * spec.top_k, 4 * spec.hidden
        share = -(-T // world)
        at = bucket if layout == "sharded" else share
        gather = (world - 1) * at * row if layout == "sharded" else 0
        spread_again = (world - 1) * share * y_row if layout == "replicated" else 0
        expected = {
            "ag_rs": (world - 1) * at * (row + y_row) + spread_again,
            "all_to_all": (world - 1) * at * (row + y_row) + spread_again,
            "all_reduce": gather + 2 * (world * at if layout == "sharded" else T) * y_row * (world - 1) // world,
        }[exchange]
        if sent != expected:
            wrong.append(f"seed {seed} rank {comm.rank}: {sent} bytes, not {expected}")
        declared = EXCHANGES.get(exchange).wire_bytes(spec, problem.placement, T, "fp32", 4)
        if layout == EXCHANGES.get(exchange).token_layout == "replicated" and sent != declared:
            wrong.append(f"seed {seed} rank {comm.rank}: {sent} bytes, the plan says {declared}")
        if layout == "replicated" and sent - spread_again > declared:
            wrong.append(f"seed {seed} rank {comm.rank}: {sent - spread_again} bytes, the plan says at most {declared}")
    return wrong


@pytest.mark.parametrize("layout", ["sharded", "replicated"])
@pytest.mark.parametrize("exchange", ["all_reduce", "ag_rs", "all_to_all"])
def test_bytes_sent_are_what_the_formulas_say(pool: Pool, exchange: str, layout: str) -> None:
    for world in (2, 3):
        nothing_wrong(pool.run(world, count_bytes, exchange, layout, 11, [SEED + i for i in range(6)]))


def compare_payloads(comm: Comm, exchange: str, layout: str, quant: str, seed: int) -> dict[str, Any]:
    """The same problem with rows as FP8 and as bf16."""
    problem = draw(seed, comm.world, quant, spread_evenly=layout == "replicated")
    static = torch.tensor(0.013) if quant == "fp8_tensor_static" else None
    start, stop = problem.bounds(comm.rank, layout)
    y, rows, sent = through(comm, problem, exchange, layout, "fp8", None, static)
    _, _, plain = through(comm, problem, exchange, layout, "bf16", None, static)
    # Every source quantizes its own tokens; an exchange of replicated tokens that are cut up, each even share.
    shards = [problem.bounds(rank, "sharded") for rank in range(comm.world)]
    routed_T = problem.routing.legal(problem.spec.num_experts).any(1)
    dense = [dequantize_rows(quantize_rows(problem.x[a:b], quant, static, routed_T[a:b]), static) for a, b in shards]
    expected = (torch.cat(dense) * problem.routing.weights_TK.sum(1, keepdim=True))[start:stop]
    scales = 0 if static is not None else 4 * (-(-problem.spec.hidden // 128) if quant == "fp8_block" else 1)
    return {
        "fp8": isinstance(rows.x, QuantizedRows) and rows.x.values_RH.dtype == FP8,
        "same": torch.allclose(y, expected, rtol=1e-5, atol=1e-5),
        "saved": plain - sent,
        "per_row": problem.spec.hidden - scales,
        "rows": rows_sent(problem, exchange, comm.rank),
    }


def rows_sent(problem: Draw, exchange: str, rank: int) -> int:
    """To other ranks, in a dispatch of few rows: padded to even splits, or on one node those that are needed."""
    if exchange != "hierarchical":
        return (problem.placement.world - 1) * max(problem.counts)
    own = range(*problem.bounds(rank, "sharded"))
    return sum(len(serving_ranks(problem, token, rank).keys() - {rank}) for token in own)


@pytest.mark.parametrize("quant", ["fp8_block", "fp8_tensor_static", "fp8_tensor_dynamic", "fp8_channel"])
@pytest.mark.parametrize(
    ("exchange", "layout"),
    [(e, l) for e in SPREADING for l in ("sharded", "replicated") if "sharded" in (l, EXCHANGES.get(e).token_layout)],
)
def test_fp8_rows_travel_as_fp8(pool: Pool, exchange: str, layout: str, quant: str) -> None:
    for seed in range(SEED, SEED + 3):
        for world in (2, 4):
            for rank, found in enumerate(pool.run(world, compare_payloads, exchange, layout, quant, seed)):
                text = f"rank {rank} of {world}, MOE_DIST_TEST_SEED={SEED}, seed {seed}: {found}"
                assert found["fp8"], text
                assert found["same"], text
                assert found["saved"] == found["rows"] * found["per_row"], text  # a bf16 value costs a byte more


def overflow(comm: Comm, exchange: str, layout: str) -> list[str]:
    """Every rank has 5 tokens. What is raised for a bucket of 4, of 5 and of nothing at all."""
    problem = draw(0, comm.world)
    counts = (5,) * comm.world
    x = torch.ones(5 * comm.world, problem.spec.hidden)
    ids = torch.zeros(len(x), problem.spec.top_k, dtype=torch.int32)
    routing = Routing(ids, torch.ones(ids.shape))
    problem = Draw(problem.spec, problem.placement, counts, x, routing)
    moved = made(comm, problem, exchange, layout, "fp32")
    start, stop = problem.bounds(comm.rank, layout)
    raised = []
    for bucket in (4, 5, None):
        try:
            moved.dispatch(Step(workspace_of(comm.device), bucket), x[start:stop], routing.rows(start, stop))
            raised.append("")
        except ConfigError as error:
            raised.append(str(error))
    return raised


@pytest.mark.parametrize("exchange", SPREADING)
def test_overflow_of_the_bucket_raises(pool: Pool, exchange: str) -> None:
    for small, fits, missing in pool.run(2, overflow, exchange, "sharded"):
        assert small.startswith("max_tokens_per_rank = 4:")
        assert "5 and more" in small
        assert fits == ""
        assert missing.startswith("max_tokens_per_rank = None:")


def test_brute_force_sees_replicas() -> None:
    """The generator makes what it is for: replicas, maps of experts, idle ranks, holes, uneven shards."""
    problems = [draw(seed, world) for seed in range(DRAWS) for world in (2, 3, 4, 8)]
    assert sum(problem.placement.replicated for problem in problems) > 5
    assert sum(problem.placement.owners != tuple(sorted(problem.placement.owners)) for problem in problems) > 5
    assert sum(0 in problem.counts and any(problem.counts) for problem in problems) > 5
    assert sum(bool((problem.routing.ids_TK < 0).any()) for problem in problems) > 5
    assert {problem.placement.tp for problem in problems} >= {1, 2, 3, 4}
