"""Flags that several commands have: what they are called, what they take, what `--help` says of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from cyclopts import CoercionError, Parameter, Token

from moe_dist.backends import BACKENDS
from moe_dist.bench.case import Experiment
from moe_dist.bench.defaults import MODELS, SMALL
from moe_dist.bench.source_spec import SourceSpec
from moe_dist.commands.config import SECTIONS, model_names
from moe_dist.commands.yaml_loader import integer
from moe_dist.engine.planning import PAYLOADS
from moe_dist.errors import ConfigError
from moe_dist.exchange import EXCHANGES
from moe_dist.model.spec import TOKEN_LAYOUTS, TOKEN_SPLITS, MoESpec
from moe_dist.runtime.context import RaySpec

# Flags, and the keys of an experiment that they set; of those that make a key together, what the library calls them
# too. A test holds that every flag of every command stands here or sets no key.
SETS = {
    "--model": ("models",), "--checkpoint": ("source.checkpoint",), "--layer": ("source.layer",),
    "--device": ("device",), "--runtime": ("runtime",), "--layers": ("layers",), "--world": ("worlds",),
    "--tp": ("placements", "worlds", "parallel.tp"), "--ep": ("placements", "worlds", "parallel.ep"),
    "--exchange": ("exchanges",), "--backend": ("backends",), "--tokens": ("tokens",),
    "--token-layout": ("token_layouts",), "--token-split": ("token_splits",), "--skew": ("skews",),
    "--payload": ("payload",), "--iters": ("iters",), "--record-routing": ("record_routing",), "--seed": ("seed",),
    "--batch-size": ("tokens", "batch_size"), "--input-len": ("tokens", "input_len"),
    "--chunked-prefill-size": ("tokens", "chunked_prefill_size"),
    "--placements": ("placements",), "--exchanges": ("exchanges",), "--backends": ("backends",),
    "--tokens-per-rank": ("tokens",), "--peers": ("peers",),
    "--placement": ("placements",),
}  # fmt: skip


def number(_: Any, tokens: Sequence[Token]) -> int:
    """A whole number as YAML has it here, so that a flag takes what `key=value` takes."""
    return _integer(tokens[0].value, tokens[0])


def numbers(_: Any, tokens: Sequence[Token]) -> list[int]:
    return [_integer(text, token) for token in tokens for text in token.value.split(",")]


def _integer(text: str, token: Token) -> int:
    try:
        return integer(text)
    except ValueError:
        raise CoercionError(token=token, target_type=int) from None


def names(_: Any, tokens: Sequence[Token]) -> list[str]:
    """A path may have commas, so `file:PATH` is one value."""
    found = []
    for token in tokens:
        parts = [token.value] if token.value.startswith("file:") else token.value.split(",")
        if "" in parts:
            raise CoercionError(token=token, target_type=str)
        found += parts
    return found


def shown(values: Sequence[Any]) -> str:
    """A default as it would be typed."""
    return " ".join(map(str, values))


NUMBER = Parameter(converter=number)
# `1 2` or `1,2`, as the help of moe-dist itself says.
NUMBERS, NAMES = (
    Parameter(converter=each, consume_multiple=(1, None), show_default=shown) for each in (numbers, names)
)

SKEWS_HELP = """How the router spreads tokens: balanced, uniform, zipf:S, hot:N, hot_rank:RxS (one of R runs of experts
gets S times its share), burst:N (a quarter of the tokens share N experts), limited:GxN, single, rotating:SKEW (the heat
moves from step to step), spread:R:SKEW (evenly over R runs of experts), router (the checkpoint's own), or file:PATH, a
trace saved by --record-routing, moe_dist.Recorder or torch.save({"ids": ids, "weights": weights}, PATH): whole-number
ids [rows, top_k] from 0 to experts - 1, -1 for none, and floating-point weights of the same shape.""".replace(
    "\n", " "
)
AUTO_HELP = "auto: what was fastest when measured, by size of step"
BACKEND_NAMES = ", ".join(BACKENDS.names())
BACKEND_HELP = f"""Of {BACKEND_NAMES}; {AUTO_HELP}. Default: triton on a Hopper GPU that it can serve, else
torch.""".replace("\n", " ")
EXCHANGE_HELP = f"Of {', '.join(EXCHANGES.names())}; {AUTO_HELP}. Default: local on one rank, ag_rs on more."
MODEL_KEYS_HELP = f"model.KEY, of every model: {', '.join(MoESpec.model_fields)}."


def keys_help(*refused: str) -> str:
    """Of `key=value` in a command that takes all keys of an experiment but these."""
    keys = [key for key in Experiment.model_fields if key not in refused]
    source, ray = ", ".join(SourceSpec.model_fields), ", ".join(RaySpec.model_fields)
    own = f"Keys of the experiment: {', '.join(keys)}."
    return f"{own} source.KEY: {source}. ray.KEY: {ray}. {MODEL_KEYS_HELP}"


def keys_of(help_text: str | None) -> list[str]:
    """The keys that a command with this help of `key=value` takes; None is a command without any."""
    sections = {"model": MoESpec} if help_text == MODEL_KEYS_HELP else SECTIONS
    dotted = [f"{name}.{key}" for name, section in sections.items() for key in section.model_fields]
    if help_text is None:
        return []
    return dotted if help_text == MODEL_KEYS_HELP else [*Experiment.model_fields, *dotted]


MODEL_HELP = f"One of {', '.join(model_names())}, or a YAML file."
DEFAULT_MODEL_HELP = f"Default: on GPUs the first of {', '.join(MODELS)} that fits the ranks, {SMALL} on a CPU."
Json = Annotated[bool, Parameter(show_default=False, help="Print JSON instead of tables.")]
Overrides = Annotated[str, Parameter(name="key=value", help=keys_help())]
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

    model: Annotated[str | None, Parameter(help=f"{MODEL_HELP[:-1]}; random weights. {DEFAULT_MODEL_HELP}")] = None
    checkpoint: Annotated[
        str | None, Parameter(help="Folder of a Hugging Face checkpoint; its own experts and router.")
    ] = None
    layer: Annotated[int | None, NUMBER, Parameter(help="Which layer of the checkpoint (default 0).")] = None
    device: Annotated[
        Literal["auto", "cpu", "cuda"] | None, Parameter(help="auto, the default, takes GPUs where there are any.")
    ] = None

    def __post_init__(self) -> None:
        if self.model is not None and self.checkpoint is not None:
            rule = f"is not taken beside --model {self.model}: the checkpoint's layer is the model"
            raise ConfigError("--checkpoint", self.checkpoint, rule, "one of the two")


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Configuration:
    """How a step is computed, and on what workload but for its size."""

    tp: Tp = 1
    ep: Ep = 1
    exchange: Annotated[str | None, Parameter(help=EXCHANGE_HELP)] = None
    backend: Annotated[str | None, Parameter(help=BACKEND_HELP)] = None
    token_layout: Annotated[
        str, Parameter(choices=TOKEN_LAYOUTS, help="Whether each rank has all tokens or a share of them.")
    ] = "sharded"
    token_split: Annotated[
        str,
        Parameter(choices=TOKEN_SPLITS, help="Shares of sharded tokens: equal, drawn at random, or all on one rank."),
    ] = "even"
    skew: Annotated[str, Parameter(help=SKEWS_HELP)] = "uniform"
    payload: Annotated[
        str, Parameter(help=f"How rows travel: {', '.join(PAYLOADS)}. auto is fp8 where model and backend take it.")
    ] = "auto"


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Grid(Configuration):
    """One configuration on steps of one size."""

    tokens: Annotated[int, NUMBER, Parameter(help="Global tokens of a step.")] = 64
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


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Profiling:
    """Traces of steps. Raises ConfigError for what is said of them where none is asked for."""

    profile: Annotated[
        bool, Parameter(show_default=False, help="Trace a few further steps of each case, a file a rank for Perfetto.")
    ] = False
    profile_steps: Annotated[int | None, NUMBER, Parameter(help="How many steps (default 3).")] = None
    profile_output_dir: Annotated[
        str | None,
        Parameter(help="New or empty folder for the traces (default: beside the results, or moe-dist-profile here)."),
    ] = None

    def __post_init__(self) -> None:
        for field in ("profile_steps", "profile_output_dir"):
            value = getattr(self, field)
            if value is not None and not self.profile:
                flag = f"--{field.replace('_', '-')}"
                raise ConfigError(flag, value, "is of a profile, and none is asked for", "--profile beside it")


Model = Annotated[str, Parameter(help=MODEL_HELP)]
Calibrate = Annotated[
    list[str] | None,
    Parameter(
        consume_multiple=(1, None),
        help="Results files whose rows predictions are calibrated on (default: those of a checkout's benchmarks).",
    ),
]
Recording = Annotated[
    str | None, Parameter(help="Save the routing that was measured in this new file, for --skew file:PATH.")
]

PREDICTED = MODELS[0]  # the model of commands that predict: nothing is loaded, so the largest always fits

# What commands have where no such flag is given.
NO_SOURCE, ONE, NOT_KEPT, NO_PROFILE = Source(), Grid(), Measuring(), Profiling()
