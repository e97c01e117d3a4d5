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

from moe_dist.errors import ConfigError, listed, nearest_name


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
    flags, name = _flags(arguments or ()), given.partition("=")[0]
    help_of_keys = (argument.parameter.help for argument in arguments or () if argument.is_var_positional())
    meant = _meant(name, flags, next(help_of_keys, None))
    hint = f"; did you mean {meant}?" if meant else ""
    return ConfigError("option", given, f"{command} has none of this name{hint}", listed(flags))


def _meant(name: str, flags: list[str], help_of_keys: str | None) -> str | None:
    """What is no flag may be a key or another command's flag for one, and else a slip of a flag or a key."""
    from moe_dist.commands.flags import SETS, keys_of  # the command is imported by now, and has brought it

    keys = keys_of(help_of_keys)
    by_name = {key.rpartition(".")[2]: key for key in reversed(keys)}
    own = name.lstrip("-").replace("-", "_")
    key = by_name.get(own) or next((key for key in SETS.get(name, ()) if key in keys), None)
    if key is None and (flag := nearest_name(name.lstrip("-"), [flag.removeprefix("--") for flag in flags])):
        return f"--{flag}"
    near = nearest_name(own, by_name)
    key = key or (by_name[near] if near else None)
    return key and f"the key {key}"


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
