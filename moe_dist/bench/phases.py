"""Prefill and decode of a model's MoE layers, as serving has them: which steps they consist of, and what the times of
these steps come to."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Literal

from pydantic import Field

from moe_dist.bench.case import Case, ChosenBy, Experiment
from moe_dist.bench.row import Number, Provenance, Result, Row, Some
from moe_dist.bench.runner import plan_cases
from moe_dist.errors import CheckpointError, ConfigError, ResourceError
from moe_dist.machine.machine import Machine
from moe_dist.model.spec import MOST_TOKENS, TokenLayout, TokenSplit

UNCHUNKED = -1  # as SGLang has it
MOST_LAYERS = 10_000
MEASURED = 4  # layers, unless told otherwise: enough that a layer does not find its own weights in a cache
SCOPE: Literal["MoE layers only"] = "MoE layers only"


@dataclass(frozen=True)
class Request:
    """A batch of `batch_size` prompts of `input_len` tokens, each of which gets `output_len` tokens."""

    batch_size: int
    input_len: int
    output_len: int
    chunk: int

    def prefill(self) -> dict[int, int]:
        """How many steps there are of so many global tokens: chunks, and what is left over."""
        tokens = self.batch_size * self.input_len
        size = tokens if self.chunk == UNCHUNKED else min(self.chunk, tokens)
        rest = tokens % size
        return {size: tokens // size} | ({rest: 1} if rest else {})


def requests_of(
    batch_sizes: Sequence[int], input_lens: Sequence[int], output_lens: Sequence[int], chunk: int
) -> list[Request]:
    """Every combination, each once. Raises ConfigError for a size that is none."""
    for field, values in (("batch_size", batch_sizes), ("input_len", input_lens), ("output_len", output_lens)):
        for value in values:
            if not 1 <= value <= MOST_TOKENS:
                what = "sequences" if field == "batch_size" else "tokens of a sequence"
                raise ConfigError(field, value, f"is a number of {what}", f"1 to {MOST_TOKENS:,}")
    if chunk != UNCHUNKED and not 1 <= chunk <= MOST_TOKENS:
        legal = f"1 to {MOST_TOKENS:,}, or {UNCHUNKED} for no chunks"
        raise ConfigError("chunked_prefill_size", chunk, "is a number of global tokens of a step", legal)
    found = [Request(*sizes, chunk) for sizes in dict.fromkeys(product(batch_sizes, input_lens, output_lens))]
    largest = max(tokens for request in found for tokens in request.prefill())
    if largest > MOST_TOKENS:
        rule = f"makes a step of {largest:,} tokens"
        raise ConfigError("chunked_prefill_size", chunk, rule, f"1 to {MOST_TOKENS:,}")
    return found


def step_sizes(requests: Iterable[Request]) -> list[int]:
    """Global tokens of all steps, of both phases."""
    return sorted({tokens for request in requests for tokens in (request.batch_size, *request.prefill())})


def phase_cases(
    experiment: Experiment, device: str, chosen_by: ChosenBy, requests: Sequence[Request]
) -> dict[str, list[Case]]:
    """The steps of each phase, by its name. Where no mode is named, prefill runs eagerly and decode as a CUDA graph on
    a GPU, as serving does. Raises ConfigError for two modes."""
    modes = experiment.modes or ("eager", "graph" if device == "cuda" else "eager")
    if experiment.modes and len(experiment.modes) > 1:
        rule = "each phase runs in one mode; without this key prefill runs eagerly and decode as a CUDA graph on GPUs"
        raise ConfigError("experiment.modes", list(experiment.modes), rule, "[eager] or [graph], for both phases")
    sizes = {
        "prefill": sorted({tokens for request in requests for tokens in request.prefill()}),
        "decode": sorted({request.batch_size for request in requests}),
    }
    return {
        phase: list(experiment.with_changes(tokens=tuple(tokens), modes=(mode,)).cases(device, chosen_by))
        for (phase, tokens), mode in zip(sizes.items(), (modes[0], modes[-1]), strict=True)
    }


def fitting_layers(
    experiment: Experiment, machine: Machine, requests: Sequence[Request], layers: int
) -> tuple[int, str]:
    """How many of `layers` are measured where nobody says it, and why no more where that is less than MEASURED: as many
    as fit and, of a checkpoint, as are there. 1 where not even one does, which planning refuses then."""
    reason = ""
    for count in range(min(layers, MEASURED), 1, -1):
        of_phases = phase_cases(experiment.with_changes(layers=count), machine.device, "name", requests)
        try:
            plan_cases([case for cases in of_phases.values() for case in cases], machine)
            return count, reason
        except (ResourceError, ConfigError, CheckpointError) as error:
            reason = str(error)
    return 1, reason


class TimedSteps(Result):
    """Steps of one size in one phase."""

    tokens: Some = Field(description="global tokens of a step")
    steps: Some = Field(description="how many of these steps the phase has")
    timed: Some = Field(description="how many were timed")
    p50_us: Number = Field(description="µs, median of those, of the measured layers together")
    exchange: str = Field(description="as in a row")
    backend: str = Field(description="as in a row")
    payload_dtype: str = Field(description="as in a row")
    graph: bool = Field(description="whether they ran as a CUDA graph")
    ok: bool | None = Field(description="as in a row")


class BenchResult(Result):
    """What the MoE layers of a model take of one batch. Names and units of the first keys are those of SGLang's
    bench_one_batch_server."""

    run_name: str = Field(description="what --run-name says")
    batch_size: Some = Field(description="sequences")
    input_len: Some = Field(description="tokens of each prompt")
    output_len: Some = Field(description="tokens that each sequence gets, a decode step for each")
    latency: Number = Field(description="s, prefill and all decode steps")
    ttft: Number = Field(description="s, all steps of prefill")
    itl_ms: Number = Field(description="ms, a decode step; the same for every step, see measuring.md")
    input_throughput: Number = Field(description="tok/s, batch_size × input_len / ttft")
    output_throughput: Number = Field(description="tok/s, batch_size × output_len / (latency − ttft)")
    overall_throughput: Number = Field(description="tok/s, batch_size × (input_len + output_len) / latency")
    scope: Literal["MoE layers only"] = Field(
        description="what was timed: neither attention nor anything else of a model"
    )
    layers: Some = Field(description="MoE layers that the times above are for")
    measured_layers: Some = Field(
        description="layers that were timed as one stack; the times above are theirs × layers / measured_layers"
    )
    chunked_prefill_size: int = Field(description="most global tokens of a step of prefill; -1: no chunks")
    prefill: tuple[TimedSteps, ...] = Field(strict=False, description="steps of prefill by size, see below")
    decode: TimedSteps = Field(description="steps of decode, see below")
    model: str = Field(description="as in a row, like all below but the last three")
    source: str = Field(description="where its weights come from")
    quant: str = Field(description="number format")
    placement: str = Field(description="the grid's name")
    world: Some = Field(description="ranks")
    token_layout: TokenLayout = Field(description="sharded or replicated")
    token_split: TokenSplit = Field(description="how sharded tokens were divided")
    skew: str = Field(description="which routing")
    seed: int = Field(description="of tokens and routing")
    runtime: str = Field(description="what started the ranks")
    device: str = Field(description="name of the GPU or CPU")
    date: str = Field(description="UTC, when the command began")
    commit: str = Field(description="of moe_dist")
    ok: bool | None = Field(
        description="whether every step's errors are within their tolerances; null if none exceeds it but the oracle"
        " was not asked"
    )


def combined(
    request: Request,
    of_phases: dict[str, list[Case]],
    rows: Sequence[Row],
    run_name: str,
    layers: int,
    about: Provenance,
) -> BenchResult:
    """A batch from the rows of its steps. Raises KeyError where one was not measured."""
    measured = {(row.global_tokens, row.graph): row for row in rows}
    graphs = {phase: cases[0].graph for phase, cases in of_phases.items()}
    count = of_phases["decode"][0].layers
    prefill = [_steps(measured[tokens, graphs["prefill"]], steps) for tokens, steps in request.prefill().items()]
    decode = _steps(row := measured[request.batch_size, graphs["decode"]], request.output_len)
    scale = layers / count / 1e6
    ttft, decoding = scale * sum(each.steps * each.p50_us for each in prefill), scale * decode.steps * decode.p50_us
    verdicts = [each.ok for each in (*prefill, decode)]
    came_in, went_out = request.batch_size * request.input_len, request.batch_size * request.output_len
    return BenchResult(
        run_name=run_name,
        batch_size=request.batch_size,
        input_len=request.input_len,
        output_len=request.output_len,
        latency=ttft + decoding,
        ttft=ttft,
        itl_ms=1e3 * decoding / request.output_len,
        input_throughput=came_in / ttft,
        output_throughput=went_out / decoding,
        overall_throughput=(came_in + went_out) / (ttft + decoding),
        scope=SCOPE,
        layers=layers,
        measured_layers=count,
        chunked_prefill_size=request.chunk,
        prefill=tuple(prefill),
        decode=decode,
        **{
            key: getattr(row, key)
            for key in (
                "model", "source", "quant", "placement", "world", "token_layout", "token_split", "skew", "seed",
                "runtime",
            )
        },
        device=about.machine.gpu or about.machine.cpu or "unknown",
        date=about.date,
        commit=about.commit,
        ok=False if False in verdicts else None if None in verdicts else True,
    )  # fmt: skip


def _steps(row: Row, steps: int) -> TimedSteps:
    if row.p50_us is None:
        raise ValueError(f"{row.global_tokens} tokens were not timed")
    return TimedSteps(
        tokens=row.global_tokens,
        steps=steps,
        timed=row.iters,
        p50_us=row.p50_us,
        exchange=row.exchange,
        backend=row.backend,
        payload_dtype=row.payload_dtype,
        graph=row.graph,
        ok=row.ok,
    )
