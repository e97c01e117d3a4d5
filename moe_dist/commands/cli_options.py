"""The command's arguments."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

from moe_dist.backends import BACKENDS
from moe_dist.commands.config import model_names, override
from moe_dist.commands.yaml_loader import integer
from moe_dist.errors import ConfigError
from moe_dist.exits.exit_codes import MEANINGS
from moe_dist.files import one_path, require_text
from moe_dist.messages.printable import one_line
from moe_dist.model.spec import TOKEN_LAYOUTS

Command = Callable[[argparse.Namespace], int]

ASSIGNMENT = re.compile(r"[A-Za-z_][\w.]*=.*", re.DOTALL)
LIST_KEYS = {  # flags, and the experiment's keys that they set
    "model": "models", "world": "worlds", "exchange": "exchanges", "backend": "backends", "tokens": "tokens",
    "token_layout": "token_layouts", "skew": "skews",
}  # fmt: skip
SKEWS_HELP = """how the router spreads tokens: balanced, uniform, zipf:S, hot:N, limited:GxN, single, router (the
checkpoint's own), or file:PATH, a trace saved by torch.save({"ids": ids, "weights": weights}, PATH): whole-number ids
[rows, top_k] from 0 to experts - 1, -1 for none, and floating-point weights of the same shape"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        super().error(one_line(message))


class _Value(argparse.Action):
    """Stores one value, and notes in `given` which flag it came by."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: str | None = None
    ) -> None:
        setattr(namespace, self.dest, values)
        _note(self, namespace)


def _note(action: argparse.Action, namespace: argparse.Namespace) -> None:
    if action.dest in namespace.given:
        raise argparse.ArgumentError(action, "is given twice")
    name = action.option_strings[0] if action.option_strings else action.dest
    namespace.given = {**namespace.given, action.dest: name}


class _Several(argparse.Action):
    """One value or more; a `key=value` among them is an override that stands behind them."""

    def __init__(self, option_strings: Sequence[str], dest: str, convert: Callable[[str], Any] = str, **given: Any):
        super().__init__(option_strings, dest, nargs="+", **given)
        self._convert = convert

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: str | None = None
    ) -> None:
        namespace.swallowed += [value for value in values if ASSIGNMENT.fullmatch(value)]
        own = [value for value in values if not ASSIGNMENT.fullmatch(value)]
        if not own:
            raise argparse.ArgumentError(self, "expected at least one value")
        try:
            setattr(namespace, self.dest, [self._convert(value) for value in own])
            _note(self, namespace)
        except ValueError:
            raise argparse.ArgumentError(self, f"invalid {self._convert.__name__} values: {' '.join(own)}") from None


def parse(given: Sequence[str] | None, commands: Mapping[str, Command]) -> argparse.Namespace:
    """argparse takes positional arguments in one run only; here `key=value` may stand anywhere between the flags."""
    parser = _parser(commands)
    args, rest = parser.parse_known_args(given)
    strange = [item for item in rest if item.startswith("-") or "=" not in item or "overrides" not in args]
    if strange:
        parser.error(f"unrecognized arguments: {' '.join(strange)}")
    first = getattr(args, "file", None)
    if first and "=" in first and not os.path.isfile(first):  # no file: the first override stands there
        args.file, args.overrides = None, [first, *args.overrides]
    if rest or args.swallowed:
        args.overrides = [*args.overrides, *rest, *args.swallowed]  # in any order: no key stands there twice
    return args


def check_flags(args: argparse.Namespace) -> None:
    """Raise ConfigError for an empty value, for one that is no UTF-8 text, and for a flag that says otherwise than a
    `key=value`."""
    for assignment in getattr(args, "overrides", ()):
        require_text("override", assignment)
    for dest, flag in args.given.items():
        value = getattr(args, dest)
        values = value if isinstance(value, list) else [value]
        if dest != "overrides" and "" in values:
            raise ConfigError(flag, value, "is empty", "a value, or no such flag")
        for text in values:
            if isinstance(text, str):
                require_text(flag, text)
    keys = override({}, getattr(args, "overrides", ()))
    for dest, flag in args.given.items():
        for key, meant in _meant(args, dest).items():
            if key in keys and _plainly(key, said := keys[key]) != _plainly(key, meant):
                value = " ".join(map(str, value)) if isinstance(value := getattr(args, dest), list) else value
                raise ConfigError(key, said, f"contradicts {flag} {value}", "one of the two")


def _plainly(key: str, value: Any) -> Any:
    """What can be compared: true is not 1, a model's name has no case, and its file one path."""
    if isinstance(value, (list, tuple)):
        return [_plainly(key, item) for item in value]
    if key == "models" and isinstance(value, str):
        return one_path(value) if value.endswith((".yaml", ".yml")) else value.lower()
    return type(value), value


def _meant(args: argparse.Namespace, dest: str) -> dict[str, Any]:
    """The experiment's keys that a flag sets, with what it sets them to. `source` looks after its own."""
    value = getattr(args, dest)
    if dest in ("tp", "ep"):
        return {"placements": [f"tp{args.tp}xep{args.ep}"], "worlds": [args.tp * args.ep]}
    if dest in LIST_KEYS:
        return {LIST_KEYS[dest]: value if isinstance(value, list) else [value]}
    return {dest: value} if dest in ("device", "runtime", "payload", "iters", "layers") else {}


def _parser(functions: Mapping[str, Command]) -> argparse.ArgumentParser:
    codes = "\n".join(f"  {code:<4} {meaning}" for code, meaning in MEANINGS.items())
    parser = _Parser(
        prog="moe-dist",
        description="Compare distributed FP8 MoE layers.",
        epilog=f"exit codes:\n{codes}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="command")

    def command(name: str, text: str) -> argparse.ArgumentParser:
        sub: argparse.ArgumentParser = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(command=functions[name], swallowed=[], given={})
        sub.register("action", None, _Value)
        sub.add_argument("--json", action="store_true", help="print JSON instead of tables")
        return sub

    command("doctor", "what this machine has, and what can run on it")
    sub = command("plan", "what would run, and why not something else; loads no weights")
    _model_flags(sub)
    _grid_flags(sub)
    sub = command("run", "measure one configuration")
    _model_flags(sub)
    _stack_flag(sub)
    _grid_flags(sub)
    _measuring_flags(sub)
    sub = command("compare", "placements × exchanges × backends × tokens × skews, side by side")
    sub.add_argument("file", nargs="?", help="experiment file (YAML); without one, the small embedded default")
    _model_flags(sub)
    _stack_flag(sub)
    _measuring_flags(sub)
    sub = command("check", "numbers against the oracle at a model's real shapes")
    _model_flags(sub)
    sub.add_argument("--world", type=integer, default=2, help="ranks (default 2)")
    sub.add_argument("--tokens", action=_Several, convert=integer, default=[1, 16], help="global tokens")
    sub.add_argument("--backend", action=_Several, help=BACKEND_HELP)
    sub.add_argument("--skew", action=_Several, default=["uniform", "single"], help=SKEWS_HELP)
    _measuring_flags(sub)
    sub = command("build", "compile what a backend needs, once; can take many minutes")
    sub.add_argument("backend", choices=BACKENDS.names())
    _tune_flags(
        command("tune", "find a backend's fastest configs for a model's shapes (random weights), for its tables")
    )
    sub = command("demo-checkpoint", "write a small checkpoint of random weights to try things on")
    sub.add_argument("directory")
    sub.add_argument("--model-type", default="qwen3_moe", choices=("qwen3_moe", "deepseek_v3"))
    sub.add_argument("--seed", type=integer, default=0)
    return parser


BACKEND_HELP = "default: triton on a Hopper GPU that it can serve, else torch"


def _source_flags(sub: argparse.ArgumentParser) -> None:
    source = sub.add_mutually_exclusive_group()
    names = ", ".join(model_names()).replace("%", "%%")
    source.add_argument("--model", help=f"one of {names}, or a YAML file; random weights")
    source.add_argument("--checkpoint", help="folder of a Hugging Face checkpoint; its own experts and router")
    sub.add_argument("--layer", type=integer, help="which layer of the checkpoint (default 0)")
    sub.add_argument("--device", choices=("auto", "cpu", "cuda"), help="default auto")
    sub.add_argument("overrides", nargs="*", metavar="key=value", help="keys of the experiment: model.quant=none")


def _model_flags(sub: argparse.ArgumentParser) -> None:
    _source_flags(sub)
    sub.add_argument("--runtime", choices=("ray", "torchrun"), help="who starts the ranks (default ray)")


def _stack_flag(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--layers", type=integer, help="a stack of so many layers with residuals as one step (default 1: one layer)"
    )


def _measuring_flags(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--build", action="store_true", help="first build backends that are not built (many minutes)")
    sub.add_argument(
        "--out", help="keep results in this file, written after every row; a device or a pipe gets them last"
    )


def _tune_flags(sub: argparse.ArgumentParser) -> None:
    _source_flags(sub)
    sub.add_argument("--tp", type=integer, default=1)
    sub.add_argument("--ep", type=integer, default=1)
    sub.add_argument("--backend", default="triton", help="default triton")
    sub.add_argument("--rows", default="1,8,32,128,512,2048,8192", help="rows entering a rank (default %(default)s)")
    sub.add_argument("--seeds", type=integer, default=3, help="inputs to time and check with (default 3)")
    sub.add_argument("--out", metavar="DIR", help="folder for the tables (default: the user's cache)")


def _grid_flags(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--tp", type=integer, default=1)
    sub.add_argument("--ep", type=integer, default=1)
    sub.add_argument("--exchange", help="default: local on one rank, ag_rs on more")
    sub.add_argument("--backend", help=BACKEND_HELP)
    sub.add_argument("--tokens", type=integer, default=64, help="global tokens of a step (default 64)")
    sub.add_argument("--token-layout", default="sharded", choices=TOKEN_LAYOUTS)
    sub.add_argument("--skew", default="uniform", help=SKEWS_HELP)
    sub.add_argument("--payload", default="auto")
    sub.add_argument("--iters", type=integer, default=100)
