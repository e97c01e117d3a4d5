"""What is evaluated: a checkpoint, and how its experts run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from moe_dist.checkpoint import Checkpoint, layer_spec
from moe_dist.checkpoint.folder import CONFIG_LIMIT, read_json
from moe_dist.checkpoint.quantization import CONFIG_FILE
from moe_dist.engine.loading import plan_for
from moe_dist.engine.plan import Plan
from moe_dist.errors import CheckpointError
from moe_dist.machine.machine import Machine
from moe_dist.model.spec import MoESpec, ParallelSpec, QuantKind

BASELINE = "eager"  # the experts of transformers


@dataclass(frozen=True)
class Variant:
    """How moe_dist runs the experts; names as `replace_experts` takes them. `format`: what the experts then have."""

    parallel: ParallelSpec
    exchange: str
    backend: str
    quant: QuantKind | None
    format: str

    @property
    def placement(self) -> str:
        return self.parallel.label


@dataclass(frozen=True)
class Setup:
    """`checkpoint`: whose experts moe_dist runs. `baseline`: the one that transformers runs in bf16 to compare with."""

    checkpoint: str
    baseline: str
    batch_size: int
    new_tokens: int
    timeout_s: float


def planned(
    checkpoint: str,
    parallel: ParallelSpec,
    exchange: str | None,
    backend: str | None,
    quant: QuantKind | None,
    machine: Machine,
) -> tuple[Variant, Plan]:
    """What runs where names are left open, found out without any weights; the plan is that of the first MoE layer, and
    every layer must have one. Raises as `layer_spec` and `make_plan`."""
    specs = specs_of(checkpoint, quant)
    plans = [plan_for(spec, parallel, exchange, backend, "replicated", machine) for spec in dict.fromkeys(specs)]
    first = plans[0]
    return Variant(parallel, first.exchange, first.backend, quant, first.spec.quant_label), first


def specs_of(checkpoint: str, quant: QuantKind | None) -> list[MoESpec]:
    """Of every MoE layer. Raises CheckpointError, too, for a folder without weights, which `layer_spec` would take at
    its config.json's word."""
    opened = Checkpoint(checkpoint)
    if not opened.config.moe_layers or not opened.holds_weights:
        raise CheckpointError(checkpoint, "holds no weights")
    return [layer_spec(opened, layer, quant) for layer in opened.config.moe_layers]


def weight_bytes(checkpoint: str) -> int:
    """Of its files of weights."""
    opened = Checkpoint(checkpoint)
    return sum((Path(checkpoint) / name).stat().st_size for name in set(opened.files.values()))


def logits_bytes(folder: str, tokens: int) -> int:
    """What a rank keeps of the baseline for --logits, at most: float32 over the vocabulary for each token. Where rows
    of text end early, another draw gives up to as many tokens again."""
    return 2 * tokens * vocabulary(folder) * 4


def vocabulary(folder: str) -> int:
    """How many tokens a model can tell apart: the rows of its embedding, else what its config.json says; 1 where
    neither is to be found, which the model's own loader will say better."""
    opened = Checkpoint(folder)
    for name in opened.files:
        if name.endswith("embed_tokens.weight"):
            return opened.header(name)[1][0]
    raw = read_json(Path(folder), CONFIG_FILE, CONFIG_LIMIT)
    inner = raw.get("text_config")
    found = (inner if isinstance(inner, dict) else raw).get("vocab_size")
    return found if isinstance(found, int) and found > 0 else 1
