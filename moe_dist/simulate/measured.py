"""Rows of results files that a cost model can be calibrated on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from moe_dist.bench.diff import LEAST_US, MOST_US, read_results
from moe_dist.bench.peaks import PEAKS
from moe_dist.errors import ConfigError
from moe_dist.messages.counts import count_of
from moe_dist.model.placement import Placement
from moe_dist.model.refused import as_config_error
from moe_dist.model.spec import MOST_TOKENS, Experts, MoESpec, ParallelSpec, Ranks, Size, Tokens
from moe_dist.simulate.work import Work, even_bytes, row_bytes, work_of

# A row that differs in one of these is no step that the model describes. What an older row lacks was so.
ALIKE = {"graph": True, "layer": "whole", "token_layout": "sharded", "token_split": "even", "shared_experts": "none"}
INSEPARABLE = ("local", "fused")  # nothing is exchanged, or in the launch that computes


class Keys(BaseModel):
    """What is taken from a row; its keys are those of docs/results.md."""

    model_config = ConfigDict(extra="ignore", frozen=True, protected_namespaces=())

    model: str
    hidden: Size
    intermediate: Size
    num_experts: Experts
    top_k: Experts
    activation: str
    quant: str
    tp: Ranks
    ep: Ranks
    exchange: str
    backend: str
    payload_dtype: str
    combine_dtype: str
    tokens_per_rank: Tokens
    active_experts: Experts
    rows_per_rank: tuple[int, ...] = Field(min_length=1)
    bytes_sent: int = Field(ge=0)
    p50_us: float = Field(ge=LEAST_US, le=MOST_US)
    scatter_us: float | None = Field(default=None, ge=0, le=MOST_US)


@dataclass(frozen=True)
class Measured:
    """One row: its file's name, what the busiest rank did, and how long the step took."""

    file: str
    gpu: str
    work: Work
    exchange: str
    backend: str
    tokens_per_rank: int
    p50_us: float
    scatter_us: float | None


def read_measured(paths: Sequence[str]) -> tuple[list[Measured], int]:
    """Whole layers of sharded tokens in a CUDA graph on GPUs whose peaks are known, and how many other rows there are.
    Raises ConfigError for a file of no results, and for a key of such a row that holds no legal value."""
    found: list[Measured] = []
    others = 0
    for path in paths:
        try:
            document = read_results(path)
        except ConfigError as error:
            raise error.of("calibrate" if error.field == "file" else error.field) from None
        gpu = str((document.get("machine") or {}).get("gpu"))
        for number, row in enumerate(document["rows"]):
            if gpu in PEAKS and _fits(row):
                found.append(_measured(path, gpu, number, row))
            else:
                others += 1
    return found, others


def _fits(row: Mapping[str, Any]) -> bool:
    alike = all(row.get(key, value) == value for key, value in ALIKE.items())
    alike = alike and row.get("exchange") not in INSEPARABLE
    timed = row.get("p50_us") is not None and row.get("ok") is not False and not row.get("routing_p50_us")
    plain = row.get("placement") in _labels(row.get("tp"), row.get("ep"))  # where experts lie is not in a row
    return alike and timed and plain and row.get("world") != 1 and row.get("peer") is None


def _labels(tp: Any, ep: Any) -> tuple[str, ...]:
    try:
        return (ParallelSpec(tp=tp, ep=ep).label,)
    except ConfigError:
        return ()


def _measured(path: str, gpu: str, number: int, row: Mapping[str, Any]) -> Measured:
    try:
        keys = Keys(**row)
        spec = spec_of(keys)
        placement = Placement.build(spec, ParallelSpec(tp=keys.tp, ep=keys.ep))
    except ValidationError as error:
        raise as_config_error(error, Keys, f"{path}: rows.{number}") from None
    except ConfigError as error:
        raise error.of(f"{path}: rows.{number}.{error.field}") from None
    if len(keys.rows_per_rank) != placement.world or not 0 < sum(keys.rows_per_rank) <= MOST_TOKENS * placement.world:
        rule = f"are not the pairs of {count_of(placement.world, 'rank')}"
        raise ConfigError(f"{path}: rows.{number}.rows_per_rank", keys.rows_per_rank, rule, "see docs/results.md")
    sent = float(keys.bytes_sent)
    if keys.exchange == "nvlink" and not sent:  # older rows don't count stores into peers' memory
        sent = even_bytes(spec, placement, keys.tokens_per_rank, _row(spec, keys))
    work = work_of(spec, placement, max(keys.rows_per_rank), keys.active_experts, sent)
    return Measured(path, gpu, work, keys.exchange, keys.backend, keys.tokens_per_rank, keys.p50_us, keys.scatter_us)


def _row(spec: MoESpec, keys: Keys) -> int:
    return row_bytes(spec, keys.payload_dtype, 4 if keys.combine_dtype == "fp32" else 2)


def spec_of(keys: Keys) -> MoESpec:
    """The layer that a row was measured with, as far as its time depends on it."""
    label = {"bf16": ("none", "bf16"), "fp32": ("none", "fp32")}
    quant, dtype = label.get(keys.quant, (keys.quant, "bf16"))
    sizes = {name: getattr(keys, name) for name in ("hidden", "intermediate", "num_experts", "top_k", "activation")}
    return MoESpec(name="row", quant=quant, dtype=dtype, **sizes)
