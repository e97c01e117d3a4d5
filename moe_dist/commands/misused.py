"""What the library of the command line finds wrong, in the words of every other error here."""

from __future__ import annotations

from collections.abc import Iterable
from typing import get_args

from cyclopts import (
    Argument,
    ArgumentCollection,
    CoercionError,
    CycloptsError,
    MissingArgumentError,
    RepeatArgumentError,
    UnknownOptionError,
    UnusedCliTokensError,
)

from moe_dist.errors import ConfigError, did_you_mean, listed


def in_our_words(error: CycloptsError) -> ConfigError:
    """A ConfigError that names the flag, the value, the rule and what is legal."""
    command = " ".join(["moe-dist", *(error.command_chain or ())])
    lists = f"what {command} --help lists"
    if isinstance(error, UnknownOptionError):
        return _unknown(error.token.keyword or error.token.value, command, error.argument_collection)
    if isinstance(error, UnusedCliTokensError):
        return ConfigError("argument", (error.unused_tokens or [""])[0], f"{command} takes none such", lists)
    if isinstance(error, RepeatArgumentError):
        return ConfigError(error.token.keyword or "argument", error.token.value or None, "is given twice", "once")
    if error.argument is None:
        return ConfigError("arguments", " ".join(error.root_input_tokens or ()), str(error), lists)
    name, legal = name_of(error.argument), _legal(error.argument)
    if isinstance(error, MissingArgumentError):
        return ConfigError(name, None, "has no value" if name.startswith("-") else "is missing", legal)
    if isinstance(error, CoercionError) and error.token is not None:
        return ConfigError(name, error.token.value, "is no legal value", legal)
    return ConfigError(name, None, str(error), legal)


def _unknown(given: str, command: str, arguments: ArgumentCollection | None) -> ConfigError:
    """What is no flag may be a key of the experiment, or another command's flag for one."""
    from moe_dist.bench.case import Experiment  # the command is imported by now, and has brought it
    from moe_dist.commands.flags import MODEL_KEYS_HELP, SETS

    flags = _flags(arguments or ())
    name = given.partition("=")[0]
    own = name.lstrip("-").replace("-", "_")
    key = own if own in Experiment.model_fields else SETS.get(name, ("",))[0]
    rest = [argument.parameter.help for argument in arguments or () if argument.is_var_positional()]
    takes_keys = rest and rest != [MODEL_KEYS_HELP]
    meant = f"; did you mean the key {key}?" if key and takes_keys else did_you_mean(name, flags)
    return ConfigError("option", given, f"{command} has none of this name{meant}", listed(flags))


def name_of(argument: Argument) -> str:
    """As a message has it: `--model`, and `file` for what stands there without a flag."""
    return argument.name if argument.name.startswith("-") else argument.name.lower()


def _flags(arguments: Iterable[Argument]) -> list[str]:
    return sorted(flag for argument in arguments if argument.parse for flag in argument.positives if flag[:2] == "--")


def _legal(argument: Argument) -> tuple[str, ...] | str:
    if choices := argument.get_choices(force=True):
        return choices
    if argument.is_flag():
        return "the flag alone"
    numbers = int in (argument.hint, *get_args(argument.hint))
    if argument.token_count()[1]:
        return "whole numbers, as 1 2 or 1,2" if numbers else "values, as a b or a,b"
    return "a whole number" if numbers else "a value"
