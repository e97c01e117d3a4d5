"""Flags that several commands have: what they are called, what they take, what `--help` says of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from cyclopts import CoercionError, Parameter, Token

from moe_dist.backends import BACKENDS
from moe_dist.bench.case import Experiment
from moe_dist.commands.config import model_names
from moe_dist.commands.yaml_loader import integer
from moe_dist.engine.planning import PAYLOADS
from moe_dist.errors import ConfigError
from moe_dist.exchange import EXCHANGES
from moe_dist.model.spec import TOKEN_LAYOUTS

# Flags, and the lists of an experiment that they set. Those of KEYS are called as their keys are.
LISTS = {
    "--model": "models", "--world": "worlds", "--exchange": "exchanges", "--backend": "backends", "--tokens": "tokens",
    "--token-layout": "token_layouts", "--skew": "skews",
}  # fmt: skip
KEYS = ("device", "runtime", "payload", "iters", "layers")


def numbers(_: Any, tokens: Sequence[Token]) -> list[int]:
    """Whole numbers as YAML has them here, so that a flag takes what `key=value` takes."""
    found = []
    for token in tokens:
        try:
            found.append(integer(token.value))
        except ValueError:
            raise CoercionError(token=token, target_type=int) from None
    return found


def number(_: Any, tokens: Sequence[Token]) -> int:
    return numbers(_, tokens)[0]


def shown(values: Sequence[Any]) -> str:
    """A default as it would be typed."""
    return " ".join(map(str, values))


NUMBER = Parameter(converter=number)
SEVERAL = Parameter(consume_multiple=(1, None), show_default=shown)

SKEWS_HELP = """How the router spreads tokens: balanced, uniform, zipf:S, hot:N, limited:GxN, single, router (the
checkpoint's own), or file:PATH, a trace saved by torch.save({"ids": ids, "weights": weights}, PATH): whole-number ids
[rows, top_k] from 0 to experts - 1, -1 for none, and floating-point weights of the same shape.""".replace("\n", " ")
BACKEND_HELP = f"Of {', '.join(BACKENDS.names())}. Default: triton on a Hopper GPU that it can serve, else torch."
EXCHANGE_HELP = f"Of {', '.join(EXCHANGES.names())}. Default: local on one rank, ag_rs on more."
KEYS_HELP = f"""Keys of the experiment ({", ".join(Experiment.model_fields)}), or of the model in it:
model.quant=none.""".replace("\n", " ")

Json = Annotated[bool, Parameter(show_default=False, help="Print JSON instead of tables.")]
Overrides = Annotated[str, Parameter(name="key=value", help=KEYS_HELP)]
Runtime = Annotated[Literal["ray", "torchrun"] | None, Parameter(help="Who starts the ranks (default ray).")]
Layers = Annotated[
    int | None, NUMBER, Parameter(help="A stack of so many layers with residuals as one step (default 1: one layer).")
]
Tp = Annotated[int, NUMBER, Parameter(help="Ranks that an expert is cut over.")]
Ep = Annotated[int, NUMBER, Parameter(help="Ranks that experts are spread over.")]


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Source:
    """Whose weights and sizes, and on which device. Raises ConfigError for a model beside a checkpoint."""

    model: Annotated[
        str | None, Parameter(help=f"One of {', '.join(model_names())}, or a YAML file; random weights.")
    ] = None
    checkpoint: Annotated[
        str | None, Parameter(help="Folder of a Hugging Face checkpoint; its own experts and router.")
    ] = None
    layer: Annotated[int | None, NUMBER, Parameter(help="Which layer of the checkpoint (default 0).")] = None
    device: Annotated[Literal["auto", "cpu", "cuda"] | None, Parameter(help="Default: auto.")] = None

    def __post_init__(self) -> None:
        if self.model is not None and self.checkpoint is not None:
            rule = f"is not taken beside --model {self.model}: the checkpoint's layer is the model"
            raise ConfigError("--checkpoint", self.checkpoint, rule, "one of the two")


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Grid:
    """One configuration."""

    tp: Tp = 1
    ep: Ep = 1
    exchange: Annotated[str | None, Parameter(help=EXCHANGE_HELP)] = None
    backend: Annotated[str | None, Parameter(help=BACKEND_HELP)] = None
    tokens: Annotated[int, NUMBER, Parameter(help="Global tokens of a step.")] = 64
    token_layout: Annotated[
        str, Parameter(choices=TOKEN_LAYOUTS, help="Whether each rank has all tokens or a share of them.")
    ] = "sharded"
    skew: Annotated[str, Parameter(help=SKEWS_HELP)] = "uniform"
    payload: Annotated[str, Parameter(help=f"How rows travel: {', '.join(PAYLOADS)}.")] = "auto"
    iters: Annotated[int, NUMBER, Parameter(help="Timed steps.")] = 100


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Measuring:
    """What is done beside measuring, and where results are kept."""

    build: Annotated[
        bool, Parameter(show_default=False, help="First build backends that are not built (many minutes).")
    ] = False
    out: Annotated[
        str | None,
        Parameter(help="Keep results in this file, written after every row; a device or a pipe gets them last."),
    ] = None
    lines: Annotated[
        str | None,
        Parameter(help="Write a line of JSON for every finished row into this file, a device or a pipe, at once."),
    ] = None
    verbose: Annotated[bool, Parameter(show_default=False, help="Show what Ray and the ranks log.")] = False
    csv: Annotated[bool, Parameter(show_default=False, help="Print rows as CSV instead of tables.")] = False
    wide: Annotated[bool, Parameter(show_default=False, help="Show every row with all columns.")] = False


NO_SOURCE, ONE, NOT_KEPT = Source(), Grid(), Measuring()  # what commands have where no such flag is given
