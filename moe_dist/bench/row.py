"""What results files hold: a row for each measured case, the cases that could not run, and their provenance.

`model_dump(mode="json")` is what is printed and written; `Document.model_json_schema()` describes it to other programs.
A key that is not known or not there, a value of another type, NaN and infinity are refused when a model is made.
docs/results.md is the same list for readers, and a test holds the two together.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from moe_dist.bench.case import ChosenBy
from moe_dist.model.spec import QUANT_KINDS, TokenLayout, TokenSplit

Count = Annotated[int, Field(ge=0)]
Some = Annotated[int, Field(ge=1)]
Number = Annotated[float, Field(ge=0)]


class Result(BaseModel):
    """Base of everything here: frozen, finite, strict about keys and types. Raises pydantic's ValidationError: a result
    that breaks a rule is a fault of moe_dist and not of its user."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=())


class Row(Result):
    """One measured case. Labels are what the ranks say that they ran. Times, bytes, rates and the floor are those of
    the whole step; the description of a key says where it is of one layer of a stack."""

    model: str = Field(description="name of the model")
    source: str = Field(description="where its weights come from: `random:SEED` or `checkpoint:NAME layer N`")
    hidden: Some = Field(description="columns of a token")
    intermediate: Some = Field(description="width of one whole expert's hidden layer")
    num_experts: Some = Field(description="routed experts of a layer")
    top_k: Some = Field(description="experts that a token goes to")
    activation: str = Field(description="between an expert's two GEMMs: `swiglu`, `geglu`, `relu2` or `swigluoai`")
    shared_experts: str = Field(description="how the shared expert is computed: `none`, `replicated` or `tp`")
    quant: str = Field(
        description=f"number format: `bf16`, `fp32`, {', '.join(f'`{kind}`' for kind in QUANT_KINDS[1:])}"
    )
    tp: Some = Field(description="ranks that share an expert, each with a slice of it")
    ep: Some = Field(description="groups of ranks that the experts are spread over")
    world: Some = Field(description="ranks, tp × ep")
    placement: str = Field(description="the grid's name: `single`, `TP4`, `EP4`, `TP2xEP2`")
    token_layout: TokenLayout = Field(
        description="on both ends of the step: `sharded` (each token on one rank) or `replicated` (all on every rank)"
    )
    exchange: str = Field(description="how tokens and sums travelled between ranks; `peer` in a peer's step")
    backend: str = Field(description="what computed the experts; in a peer's step the peer's name")
    peer: str | None = Field(
        description="package and version whose whole layer ran in place of moe_dist's, exchange included; null for"
        " moe_dist's own"
    )
    form: str = Field(
        description="order of the rows that the exchange handed to the backend: `token` or `expert`; `layer` where one"
        " kernel does the whole layer; `peer` in a peer's step"
    )
    payload_dtype: str = Field(description="what rows travelled as: `none` (they did not), `bf16`, `fp32` or `fp8`")
    combine_dtype: str = Field(description="what partial sums travelled as: `bf16` or `fp32`")
    graph: bool = Field(description="whether the step ran as a CUDA graph")
    splits: str | None = Field(
        description="how `all_to_all` cut what it sent, `even` or `exact`; null where an exchange has no choice"
    )
    layer: str = Field(description="`whole` (one layer, exchange included) or `stack:N` (N layers as one step)")
    global_tokens: Some = Field(description="tokens of a step, of all ranks together")
    tokens_per_rank: Some = Field(
        description="of them, the most that a rank has: if sharded as token_split says, else all"
    )
    token_split: TokenSplit = Field(
        description="how sharded tokens were divided: `even`, `ragged` (ranks have different numbers) or `one_rank`"
        " (one has all)"
    )
    skew: str = Field(description="which routing; a trace by the first 12 digits of its SHA-256")
    trace_short: str | None = Field(
        description="in what a recorded routing has fewer rows, layers or steps than were asked for, and what was taken"
        " in their place; null where it has enough, and for a routing that was drawn"
    )
    seed: int = Field(description="of tokens and routing; weights have their own, see source")
    iters: Count = Field(description="timed iterations so far; 0 where only numbers were checked")
    runtime: str = Field(description="what started the ranks: `ray` or `torchrun`")
    key: str = Field(
        description="names the case exactly: the first 32 digits of a SHA-256 over everything that decides a row, see"
        " below"
    )
    run: Count = Field(description="which of the document's runs measured it")
    start: Count = Field(description="which start of ranks within that run; after a failure ranks are started anew")
    config: str | None = Field(
        description="where the kernel configs that ran came from: `tuned`, `nearest:M`, `default` or several of them;"
        " null where the backend has no choice"
    )
    p50_us: Number | None = Field(
        description="µs, median over all iterations; an iteration is as long as its slowest rank; null without"
        " iterations"
    )
    p99_us: Number | None = Field(description="µs, 99th percentile; null with fewer than 100 iterations")
    chained_us: Number | None = Field(
        description="µs, period of a step in a queue of chained_steps launched back to back, on the slowest rank;"
        " median of as many queues as rounds (on a CPU half as many); null without iterations"
    )
    chained_steps: Some | None = Field(
        description="steps in that queue: 32, or fewer, at least 4, where they would take over 2 s (30 ms on a CPU);"
        " null without iterations"
    )
    clock_us: Number | None = Field(
        description="µs, what the clock of p50_us finds for a step that does nothing: median of 20, on the slowest"
        " rank, once for a group of ranks and mode; null without iterations"
    )
    per_layer_us: Number | None = Field(description="µs, p50_us / layers of the stack; null without iterations")
    round_p50_us: tuple[Number, ...] = Field(strict=False, description="µs, the median of each round of iterations")
    scatter_us: Number | None = Field(
        description="µs, standard error of round_p50_us: standard deviation / √rounds; null with fewer than 3 rounds"
    )
    routing_p50_us: tuple[Number, ...] = Field(
        strict=False,
        description="µs, the median of each routing's iterations, where steps take several in turn; empty with one",
    )
    floor_us: Number | None = Field(
        description="µs, least time of the busiest rank's arithmetic and weight traffic, those of a shared expert"
        " included, exchange not counted, at the peak rates measured on such a device, the median of several routings;"
        " null for a device that none were measured on"
    )
    balanced_floor_us: Number | None = Field(
        description="µs, what floor_us would be with pairs and active experts spread perfectly over the groups of"
        " experts: no balancer can bring it lower; null as floor_us"
    )
    err_oracle: Number | None = Field(
        description="‖y − o‖ / ‖o‖, y being all ranks' output and o that of the oracle, which quantizes alike"
    )
    err_exact: Number | None = Field(description="the same against the float32 layer on dequantized weights")
    err_whole: Number | None = Field(
        description="the largest such error of a token of the float32 layer made of shards, against whole experts, and"
        " of the router's weights against the checkpoint's router"
    )
    err_token: Number | None = Field(description="the largest such error of a token against the oracle")
    err_repeat: Number | None = Field(
        description="what the worst token of a later output on the same inputs differed by from the first output"
    )
    err_again: Number | None = Field(description="likewise on changed inputs, from what the first output lets expect")
    not_finite: tuple[str, ...] = Field(
        strict=False,
        description="errors (err_…) that were infinite or NaN: null here, and ok is false; any other null error was not"
        " measured",
    )
    active_experts: Count = Field(description="experts with rows, on the rank and in the layer that have most")
    imbalance: Number = Field(
        description="rows of the busiest rank / mean over ranks; of a stack the mean over its layers, by their rows;"
        " of several routings the median"
    )
    rows_per_rank: tuple[Count, ...] = Field(
        strict=False, description="(token, expert) pairs on each rank, of all layers and routings together"
    )
    pairs: Count = Field(description="(token, expert) pairs of one layer, a pair of several slices counted once")
    bytes_sent: Count = Field(
        description="bytes, what the rank sends that sends most, in the mean over several routings; a row for itself is"
        " not sent; 0 of a peer, whose bytes are not counted"
    )
    stages_us: dict[str, Number] = Field(
        description="µs by stage on the rank whose stages take longest, medians of up to 10 further steps with stamps"
        " in them; stages don't overlap; `layer` is that of a kernel which does the whole layer; empty without"
        " iterations, and of a peer"
    )
    unstaged_us: float | None = Field(
        description="µs in no stage, on the same rank in the same steps: median of (time of the step with its stamps −"
        " sum of its stages); not p50_us − sum, which are other steps; a little below 0 where clocks are coarse; null"
        " without iterations, and of a peer"
    )
    max_memory: Count | None = Field(
        description="bytes on the GPU that holds most: weights and the most that making and running the step took"
        " beside them; null on a CPU"
    )
    chosen_by: ChosenBy = Field(
        description="who chose the backend: `name` (the user), `default` (the machine's) or, of it and of the exchange,"
        " `auto`"
    )
    why: str | None = Field(description="over what `auto` took them, by how much, by which record; else null")
    tflops: Number | None = Field(
        description="TFLOP/s, the busiest rank's arithmetic, that of a shared expert included, / p50_us; null without"
        " p50_us"
    )
    hbm_gbps: Number | None = Field(
        description="GB/s, bytes of the busiest rank's active experts, a shared one among them, scales not counted, /"
        " p50_us; null without p50_us"
    )
    link_gbps: Number | None = Field(description="GB/s, bytes_sent / p50_us; null without p50_us, and of a peer")
    ok: bool | None = Field(
        description="whether every error is within its tolerance; null if none exceeds it but the oracle was not asked"
    )


class Refused(Result):
    """A case of a sweep that can't run."""

    case: str = Field(description="what was to be measured")
    reason: str = Field(description="why it can't run")


class Failed(Result):
    """A case of a sweep that failed while it ran. It has no row."""

    key: str = Field(description="as in a row")
    run: Count = Field(description="which of the document's runs it failed in")
    case: str = Field(description="what was to be measured")
    error: str = Field(description="the kind: `RankFailure`, or another error of `moe_dist/errors.py`")
    rank: int | None = Field(description="the rank that failed; null where the error names none")
    op: str | None = Field(description="what that rank was doing; null where the error does not say")
    reason: str = Field(description="the root cause")
    exit_code: Count = Field(description="what the command ends with for such an error")


class Notice(Result):
    """What ranks had to say while they ran."""

    text: str = Field(description="one line")
    ranks: tuple[Count, ...] = Field(strict=False, description="those that said it")


class Hardware(Result):
    """The machine and what is installed on it."""

    gpu: str | None = Field(description="the GPU's name; null on a CPU")
    cpu: str | None = Field(description="the CPU's name; null on GPUs")
    cores: Some = Field(description="CPU cores of the machine")
    count: Some = Field(description="GPUs that torch sees; 1 on a CPU")
    driver: str | None = Field(description="version of NVIDIA's driver; null on a CPU")
    python: str = Field(description="version")
    torch: str = Field(description="version")
    triton: str | None = Field(description="version; null if it is not installed, as of all below")
    nccl: str | None = Field(description="version; null on a CPU")
    flashinfer: str | None = Field(description="version")
    deep_gemm: str | None = Field(description="version of sgl-deep-gemm")


class Provenance(Result):
    """When, by what and on what something was measured."""

    date: str = Field(description="UTC, 2026-11-27T21:13:12Z")
    commit: str = Field(description="of moe_dist, with `+changes` if files differed from it; `unknown` without git")
    code: str = Field(description="the first 32 digits of a SHA-256 over all files of the package")
    command: str = Field(description="as it was typed, but absolute paths without their folders")
    machine: Hardware = Field(description="see below")


class Document(Provenance):
    """A results file, and what `--json` prints."""

    runs: tuple[Provenance, ...] = Field(
        strict=False,
        description="the commands that measured what is here: one, and those before it that it resumed; the last is"
        " also above",
    )
    ranks: dict[int, tuple[str, ...]] = Field(description="by number of ranks, a line for each: device, GPU, process")
    notices: tuple[Notice, ...] = Field(strict=False, description="what ranks had to say, see below")
    rows: tuple[Row, ...] = Field(strict=False, description="see below; a case has one, which grows with its rounds")
    refused: tuple[Refused, ...] = Field(strict=False, description="cases that could not run, see below")
    failed: tuple[Failed, ...] = Field(strict=False, description="cases that failed while they ran, see below")
