"""What the library of the command line finds wrong, in the words of every other error here."""

from __future__ import annotations

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

from moe_dist.errors import ConfigError


def in_our_words(error: CycloptsError) -> ConfigError:
    """A ConfigError that names the flag, the value, the rule and what is legal."""
    command = " ".join(["moe-dist", *(error.command_chain or ())])
    listed = f"what {command} --help lists"
    if isinstance(error, UnknownOptionError):
        given = error.token.keyword or error.token.value
        return ConfigError("option", given, f"{command} has none of this name", _flags(error.argument_collection))
    if isinstance(error, UnusedCliTokensError):
        return ConfigError("argument", (error.unused_tokens or [""])[0], f"{command} takes none such", listed)
    if isinstance(error, RepeatArgumentError):
        return ConfigError(error.token.keyword or "argument", error.token.value or None, "is given twice", "once")
    if error.argument is None:
        return ConfigError("arguments", " ".join(error.root_input_tokens or ()), str(error), listed)
    name, legal = name_of(error.argument), _legal(error.argument)
    if isinstance(error, MissingArgumentError):
        return ConfigError(name, None, "has no value" if name.startswith("-") else "is missing", legal)
    if isinstance(error, CoercionError) and error.token is not None:
        return ConfigError(name, error.token.value, "is no legal value", legal)
    return ConfigError(name, None, str(error), legal)


def name_of(argument: Argument) -> str:
    """As a message has it: `--model`, and `file` for what stands there without a flag."""
    return argument.name if argument.name.startswith("-") else argument.name.lower()


def _flags(arguments: ArgumentCollection) -> list[str]:
    return sorted(flag for argument in arguments if argument.parse for flag in argument.positives if flag[:2] == "--")


def _legal(argument: Argument) -> tuple[str, ...] | str:
    if choices := argument.get_choices(force=True):
        return choices
    if argument.is_flag():
        return "the flag alone"
    return "a whole number" if argument.parameter.converter else "a value"
