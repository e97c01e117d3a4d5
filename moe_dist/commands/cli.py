"""The command `moe-dist`: its commands' names, and how one is called. Exit codes stand in exit_codes.py.

Each command is a function in a file of its own, imported when it is called: `--help` and a slip of the keyboard don't
wait for torch.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.metadata import version
from inspect import BoundArguments
from typing import Any, NamedTuple

from cyclopts import App, ArgumentCollection, CycloptsError, Parameter

from moe_dist.bench.devices import open_descriptors
from moe_dist.commands.call import Call
from moe_dist.commands.ending import Ending
from moe_dist.commands.misused import in_our_words
from moe_dist.commands.terminal import Terminal, say, to_standard_output
from moe_dist.errors import ConfigError, InstallationError
from moe_dist.exits.exit_codes import MEANINGS, OK
from moe_dist.messages.notices import telling
from moe_dist.runtime.voice import check_log_format, death, leave_code, speaks, together, torchrun_is_meant

COMMANDS = {
    "doctor": "What this machine has, and what can run on it.",
    "plan": "What would run, and why not something else; loads no weights.",
    "run": "Measure one configuration.",
    "bench": "Prefill and decode of a model's MoE layers, as bench_one_batch_server of SGLang shows a model's.",
    "compare": "Placements × exchanges × backends × tokens × skews, side by side.",
    "diff": "Two results files, row by row: what became slower or faster.",
    "report": "One page from results files: which placement is fastest, charts, all rows.",
    "balance": "Loads of experts, a placement that evens them out, and what it is predicted to gain.",
    "simulate": "Predicted steps of a machine that is not at hand, from measured rows.",
    "check": "Numbers against the oracle at a model's real shapes.",
    "eval": "Accuracy of a whole model with moe_dist's experts in it, against transformers' own in bf16.",
    "build": "Compile what a backend needs, once; can take many minutes.",
    "tune": "Find a backend's fastest configs for a model's shapes (random weights), for its tables.",
    "demo-checkpoint": "Write a small checkpoint of random weights to try things on.",
    "train-tiny": "Train a tiny MoE model to add two numbers, to try eval on; a minute or two on a CPU.",
}
VALUES = """\
A flag that takes several values takes them as `1 2` or as `1,2`. A key takes a
list as `key=[1,2]`; quote what holds spaces: 'key=[1, 2]'."""


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code. With `arguments` it leaves the process as it was; without, it is all that the process does."""
    descriptors = open_descriptors(inherited=arguments is None)  # before any of our own
    words = list(sys.argv[1:] if arguments is None else arguments)
    ending = Ending(speaks, leave_code, death)
    ending.as_json = "--json" in words  # of what is wrong with the others, too
    together(torchrun_is_meant(words))

    def command() -> int:
        check_log_format()
        function, bound, left, named = parse(words)
        if isinstance(getattr(function, "__self__", None), App):  # the library's own: --help
            with to_standard_output():
                function(*bound.args, **bound.kwargs)
            return OK
        if "call" in left:
            bound.arguments["call"] = Call(ending, descriptors)
        ending.as_json = bound.arguments.get("json", False)
        together(bound.arguments.get("runtime") == "torchrun")
        try:
            code: int = function(*bound.args, **bound.kwargs)
        except ConfigError as error:
            raise named(error) from error.__cause__
        return code

    with telling(lambda text: say(text) if speaks() else None):
        return ending.code_of(command, last=arguments is None)


def application(check: Callable[..., None] | None = None) -> App:
    """All commands. None is imported before it is asked for. `check`: of a command's arguments, before it is called."""
    codes = "exit codes:\n" + "\n".join(f"  {code:<4} {meaning}" for code, meaning in MEANINGS.items())
    app = App(
        name="moe-dist",
        help="Compare distributed FP8 MoE layers.",
        help_format="plaintext",
        help_epilogue=f"{VALUES}\n\n{codes}",
        version=_version,
        config=check,
        console=Terminal(quiet=not speaks()),
        default_parameter=Parameter(negative=(), allow_repeating=False, json_list=False, json_dict=False),
    )
    for place, (name, text) in enumerate(COMMANDS.items()):
        module = name.replace("-", "_")
        app.command(f"moe_dist.commands.{module}:{module}", name=name, help=text, help_epilogue=codes, sort_key=place)
    return app


def _version() -> str:
    """The package's, and the commit where there is a checkout."""
    from moe_dist.bench.results import commit

    return f"moe-dist {version('moe_dist')}, commit {commit()}"


class Parsed(NamedTuple):
    """The command's function, its arguments, and those that are not on the command line, by name. `named` gives an
    error of the function the names that the user knows."""

    function: Any
    bound: BoundArguments
    left: dict[str, Any]
    named: Callable[[ConfigError], ConfigError]


def parse(words: Sequence[str]) -> Parsed:
    """Raises ConfigError for what is wrong with the words, and InstallationError where the command can't be
    imported."""
    names = [lambda error: error]

    def check(app: App, commands: tuple[str, ...], arguments: ArgumentCollection) -> None:
        from moe_dist.commands.given import check_given  # with the command: it brings models, and they torch

        names.append(check_given(arguments).named)

    app = application(check)
    if not words or words[0] not in (*COMMANDS, *app.help_flags, *app.version_flags):
        first, rule = (words[0], "is none") if words else (None, "is missing")
        raise ConfigError("command", first, rule, [*COMMANDS, "--help", "--version"])
    if words[0] not in COMMANDS and len(words) > 1:
        raise ConfigError(
            "argument", words[1], f"{words[0]} takes none", f"{words[0]} alone, or moe-dist COMMAND --help"
        )
    try:
        if words[0] in COMMANDS:
            words = [words[0], *_overrides_last(_imported(app, words[0]), words[1:])]
        function, bound, left = app.parse_args(words, exit_on_error=False, print_error=False)
    except CycloptsError as error:
        raise in_our_words(error) from None
    bound.apply_defaults()
    return Parsed(function, bound, left, names[-1])


def _imported(app: App, command: str) -> App:
    try:
        return app[command]
    except ImportError as error:
        raise InstallationError(error.__cause__ or error) from None


def _overrides_last(command: App, words: Sequence[str]) -> list[str]:
    from moe_dist.commands.given import overrides_last

    return overrides_last(words, command.assemble_argument_collection())
