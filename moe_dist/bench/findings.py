"""What the ranks found of one case: each rank's, and the group's."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median

from moe_dist.bench.peer_plan import PEER
from moe_dist.bench.prepared import Prepared
from moe_dist.errors import MoeDistError
from moe_dist.messages.notices import by_text
from moe_dist.peers.module import PeerModule

ERRORS = ("err_oracle", "err_exact", "err_whole", "err_token", "err_repeat", "err_again")


@dataclass(frozen=True)
class Ran:
    """What a rank's layers ran, by their own word: a row's labels. `splits`: see Exchange.splits. `peer`: package and
    version, where another one's layer ran."""

    placement: str
    token_layout: str
    exchange: str
    backend: str
    form: str
    payload_dtype: str
    combine_dtype: str
    graph: bool
    splits: str | None
    peer: str | None = None

    @classmethod
    def by(cls, step: Prepared) -> Ran:
        layer, captured = step.layers[0], step.graph is not None
        plan, choice = layer.plan, layer.plan.choice(step.bucket)
        splits = layer.exchange.splits(step.bucket, captured=captured)
        if isinstance(step.module, PeerModule):
            name, peer = step.module.name, step.module.peer
            labels = PEER, name, PEER, peer.payload, peer.combine
            return cls(plan.parallel.label, plan.token_layout, *labels, captured, None, peer.label())
        names = choice.exchange, choice.backend, choice.form, choice.payload
        return cls(plan.parallel.label, plan.token_layout, *names, plan.combine_dtype, captured, splits)


@dataclass(frozen=True)
class RankResult:
    """One rank's findings. `rounds_us`: an entry for each iteration of each round so far. `chained_us`: for each queue
    of `chained_steps` the time of a step in it; `clock_us`: of a step that does nothing; see bench/clock.py.
    `stages_us`, `unstaged_us`: see Prepared.staged. Errors are the whole group's, see bench/check.py; `err_repeat` is
    what the worst token of a later output differs by from that of the first, `err_again` the same of an output on
    changed inputs. `max_memory`: bytes of a GPU, the weights and the most that making and running the step took beside
    them. `rows` are those of all layers and all routings that steps take in turn, `active_experts` the most of any, and
    `by_layer` has both of each layer, routing by routing. `config`: see Backend.config_sources. `notices`: what this
    rank had to say in this turn. `trace_short`: see draws.shortage."""

    rounds_us: list[list[float]]
    stages_us: dict[str, float]
    unstaged_us: float | None
    bytes_sent: int
    rows: int
    active_experts: int
    err_oracle: float | None
    err_exact: float | None
    err_whole: float | None
    err_token: float | None
    max_memory: int | None
    ran: Ran
    by_layer: tuple[tuple[int, int], ...] = ()
    err_repeat: float | None = None
    err_again: float | None = None
    config: tuple[str, ...] = ()
    notices: tuple[str, ...] = ()
    chained_us: tuple[float, ...] = ()
    chained_steps: int | None = None
    clock_us: float | None = None
    trace_short: str | None = None


@dataclass(frozen=True)
class GroupResult:
    """The group's figures, which a row is made of. `errors`: by the names in ERRORS, None where not measured, infinite
    or NaN where an output was. `by_layer`: for each layer its rows and its active experts, each by rank, and so on for
    each further routing that steps take in turn. `config`, `notices`: see RankResult; of each notice which ranks gave
    it."""

    rounds_us: list[list[float]]
    stages_us: dict[str, float]
    unstaged_us: float | None
    bytes_sent: int
    rows_per_rank: list[int]
    active_experts: int
    by_layer: list[tuple[list[int], list[int]]]
    errors: dict[str, float | None]
    max_memory: int | None
    ran: Ran
    config: str | None
    notices: dict[str, list[int]]
    chained_us: float | None
    chained_steps: int | None
    clock_us: float | None
    trace_short: str | None


def merge(results: list[RankResult]) -> GroupResult:
    """The group's figures: an iteration is as long as its slowest rank, and so is a queue of steps, of which the median
    is taken; stages are those of the slowest rank. Raises MoeDistError where ranks ran different things: no
    label would be true."""
    if others := [f"rank {rank}: {result.ran}" for rank, result in enumerate(results) if result.ran != results[0].ran]:
        raise MoeDistError("; ".join([f"ranks ran different things: rank 0: {results[0].ran}", *others]))
    rounds = zip(*(result.rounds_us for result in results), strict=True)
    by_layer = [result.by_layer or ((result.rows, result.active_experts),) for result in results]
    chains = [max(times) for times in zip(*(result.chained_us for result in results), strict=True)]
    slowest = max(results, key=lambda result: sum(result.stages_us.values()))
    first = results[0]
    return GroupResult(
        rounds_us=[[max(times) for times in zip(*ranks, strict=True)] for ranks in rounds],
        stages_us=slowest.stages_us,
        unstaged_us=slowest.unstaged_us,
        bytes_sent=max(result.bytes_sent for result in results),
        rows_per_rank=[result.rows for result in results],
        active_experts=max(result.active_experts for result in results),
        by_layer=[_by_rank(ranks) for ranks in zip(*by_layer, strict=True)],
        errors={name: getattr(first, name) for name in ERRORS},
        max_memory=max((result.max_memory or 0) for result in results) or None,
        ran=first.ran,
        config=", ".join(dict.fromkeys(source for result in results for source in result.config)) or None,
        notices=by_text([result.notices for result in results]),
        chained_us=median(chains) if chains else None,
        chained_steps=first.chained_steps,
        clock_us=max((result.clock_us for result in results if result.clock_us is not None), default=None),
        trace_short=first.trace_short,
    )


def _by_rank(found: tuple[tuple[int, int], ...]) -> tuple[list[int], list[int]]:
    """Of one layer, rows and active experts apart."""
    return [rows for rows, _ in found], [active for _, active in found]
