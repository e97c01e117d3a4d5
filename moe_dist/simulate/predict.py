"""Predicted steps: placements × exchanges × backends × tokens on one machine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

from moe_dist.balance.loads import RankLoads, rank_loads
from moe_dist.bench.case import check_step, parse_placement
from moe_dist.engine.plan import Plan
from moe_dist.engine.planning import AUTO, make_plan
from moe_dist.errors import ConfigError, UnsupportedError
from moe_dist.exchange.fused import pair_bytes
from moe_dist.messages.counts import count_of
from moe_dist.model.placement import Placement
from moe_dist.model.spec import MoESpec, ParallelSpec, split_bounds
from moe_dist.simulate.cluster import Cluster
from moe_dist.simulate.cost import CostModel, left_out
from moe_dist.simulate.work import Work, even_bytes, padded_bytes, row_bytes, work_of
from moe_dist.workloads.skews import synthetic_routing

SAMPLE = 1 << 14  # tokens whose routing is drawn; with more, their pairs are scaled


@dataclass(frozen=True)
class Wanted:
    """What is to be predicted; the lists as in an experiment. Tokens are sharded in equal parts."""

    spec: MoESpec
    placements: Sequence[str]
    exchanges: Sequence[str]
    backends: Sequence[str]
    tokens_per_rank: Sequence[int]
    skew: str = "uniform"
    seed: int = 0


@dataclass(frozen=True)
class Prediction:
    """One step of a CUDA graph. `beyond`: in what it lies outside of the rows that the model was calibrated on."""

    placement: str
    exchange: str
    backend: str
    tokens_per_rank: int
    predicted_us: float
    predicted_local_us: float
    predicted_exchange_us: float
    imbalance: float
    beyond: list[str]


def predictions(model: CostModel, cluster: Cluster, wanted: Wanted) -> tuple[list[Prediction], dict[str, str]]:
    """Those that can be made, the fastest of each number of tokens first, and by case why others can't. Raises
    ConfigError for another GPU than the model's, and for a placement, a skew or a number of tokens that is none."""
    if cluster.machine.name != model.gpu:
        rule = f"nothing is known of its GPUs: the rows were measured on {model.gpu}"
        raise ConfigError("machine", cluster.text, rule, f"GPUs of the kind {model.gpu}")
    if AUTO in wanted.placements:
        rule = "is what was fastest when measured, and of a machine that is not at hand nothing was"
        raise ConfigError("experiment.placements", AUTO, rule, "tp, ep, and grids such as tp8xep4")
    found: list[Prediction] = []
    refused: dict[str, str] = {}
    for name, tokens in product(wanted.placements, sorted(set(wanted.tokens_per_rank))):
        check_step(tokens * cluster.world, wanted.spec)
        parallel = parse_placement(name, cluster.world)
        if parallel is None:
            refused[name] = f"is no placement of {count_of(cluster.world, 'rank')}"
            continue
        loads: RankLoads | None = None
        for exchange, backend in product(wanted.exchanges, wanted.backends):
            try:
                plan = _planned(model, cluster, wanted.spec, parallel, exchange, backend)
                loads = loads or loads_of(wanted, plan.placement, tokens)
                found.append(_predicted(model, cluster, plan, loads, tokens))
            except (ConfigError, UnsupportedError) as error:
                if isinstance(error, ConfigError) and error.field == "workload.skew":
                    raise
                refused[f"{parallel.label} {exchange} {backend}"] = str(error)
    return sorted(found, key=lambda each: (each.tokens_per_rank, each.predicted_us)), refused


def loads_of(wanted: Wanted, placement: Placement, tokens_per_rank: int) -> RankLoads:
    """Of a drawn routing; of more than SAMPLE tokens, that of so many with its pairs in proportion."""
    tokens = tokens_per_rank * placement.world
    drawn = min(tokens, SAMPLE)
    routing = synthetic_routing(wanted.spec, drawn, wanted.skew, wanted.seed)
    found = rank_loads(routing, placement, split_bounds(drawn, placement.world))
    return RankLoads([pairs * tokens // drawn for pairs in found.pairs], found.active)


def _planned(
    model: CostModel, cluster: Cluster, spec: MoESpec, parallel: ParallelSpec, exchange: str, backend: str
) -> Plan:
    """What could run there and can be predicted; raises ConfigError or UnsupportedError with the reason."""
    if exchange in ("nvlink", "fused") and cluster.nodes > 1:
        raise UnsupportedError(f"exchange {exchange}", ["it stores into memory of GPUs of one host"])
    model.link(exchange)
    plan = make_plan(spec, parallel, exchange=exchange, backend=backend, graph=True, machine=cluster.machine)
    if max(map(plan.weight_bytes, range(parallel.world))) > cluster.machine.room:
        raise UnsupportedError(f"{spec.name} as {parallel.label}", ["a rank's weights don't fit into its GPU"])
    return plan


def _predicted(model: CostModel, cluster: Cluster, plan: Plan, loads: RankLoads, tokens_per_rank: int) -> Prediction:
    work = work_of(plan.spec, plan.placement, max(loads.pairs), max(loads.active), sent_bytes(plan, tokens_per_rank))
    local_us = model.local_us(plan.backend, work)
    exchange_us = cluster.exchange_us(plan.exchange, model.link(plan.exchange), work.sent_bytes)
    return Prediction(
        placement=plan.parallel.label,
        exchange=plan.exchange,
        backend=plan.backend,
        tokens_per_rank=tokens_per_rank,
        predicted_us=local_us + exchange_us,
        predicted_local_us=local_us,
        predicted_exchange_us=exchange_us,
        imbalance=loads.imbalance,
        beyond=_beyond(model, cluster, work) + left_out(plan.spec),
    )


def _beyond(model: CostModel, cluster: Cluster, work: Work) -> list[str]:
    return model.beyond(work) + ["a network between hosts (measured: one host)"] * (cluster.nodes > 1)


def sent_bytes(plan: Plan, tokens_per_rank: int) -> float:
    """By a rank in a captured step of equal shares of tokens, where `all_to_all` pads to equal parts."""
    row = row_bytes(plan.spec, plan.payload, plan.out_dtype.itemsize)
    if plan.exchange == "nvlink":
        return even_bytes(plan.spec, plan.placement, tokens_per_rank, row)
    if plan.exchange == "fused":
        pairs = plan.spec.top_k * tokens_per_rank * (1 - 1 / plan.placement.world)
        return pairs * (pair_bytes(plan.spec, plan.payload) + plan.spec.hidden * plan.out_dtype.itemsize)
    if plan.exchange == "all_to_all":
        return padded_bytes(plan.placement, tokens_per_rank, row)
    return float(plan.wire_bytes(tokens_per_rank * plan.placement.world))
