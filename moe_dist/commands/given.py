"""What was given on the command line, checked before anything is done with it: every flag's text, and whether a flag
and a `key=value` contradict each other."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from cyclopts import Argument, ArgumentCollection

from moe_dist.bench.case import LISTS
from moe_dist.commands.config import override
from moe_dist.commands.flags import SETS
from moe_dist.commands.misused import name_of
from moe_dist.commands.named import Names
from moe_dist.errors import ConfigError
from moe_dist.files import one_path, require_text

ASSIGNMENT = re.compile(r"[A-Za-z_][\w.]*=.*", re.DOTALL)


def overrides_last(words: Sequence[str], arguments: ArgumentCollection) -> list[str]:
    """Every `key=value` behind all flags, so that none of them is taken for one more value of a flag that has several.
    Behind a flag that takes one value it is that value: a file may be called so."""
    kept: list[str] = []
    moved: list[str] = []
    value_follows = False
    for place, word in enumerate(words):
        if word == "--":
            return [*kept, "--", *moved, *words[place + 1 :]]
        own = value_follows or not ASSIGNMENT.fullmatch(word)
        (kept if own else moved).append(word)
        value_follows = word.startswith("-") and _takes_one(word, arguments)
    return [*kept, "--", *moved]


def _takes_one(word: str, arguments: ArgumentCollection) -> bool:
    try:
        argument, _, _ = arguments.match(word)
    except ValueError:  # no flag of this command, or one with its value behind a `=`
        return False
    return bool(argument.token_count() == (1, False))


def check_given(arguments: ArgumentCollection) -> Names:
    """What the user calls what was given. Raises ConfigError for an empty value, for one that is no UTF-8 text, and for
    a flag that says otherwise than a `key=value`."""
    _take_for_override(arguments)
    assignments: list[str] = []
    for argument in arguments:
        values = [token.value for token in argument.tokens]
        if argument.is_var_positional():
            assignments = values
            for value in values:
                require_text("override", value)
        elif not argument.is_flag():
            _check_text(name_of(argument), values)
    keys = override({}, assignments)
    for argument in arguments:
        if not argument.has_tokens or argument.is_positional_only():
            continue
        for key, meant in _meant(argument, arguments).items():
            if key in keys and _plainly(key, keys[key]) != _plainly(key, meant):
                flag = " ".join([argument.name, *(token.value for token in argument.tokens)])
                raise ConfigError(key, keys[key], f"contradicts {flag}", "one of the two")
    flags = [argument for argument in arguments if argument.name.startswith("--")]
    return Names(
        flags=tuple(argument.name for argument in flags),
        given=tuple(argument.name for argument in flags if argument.has_tokens),
        keys=tuple(assignment.partition("=")[0] for assignment in assignments),
        file=next((argument.tokens[0].value for argument in arguments if _is_file(argument)), None),
    )


def _is_file(argument: Argument) -> bool:
    """Whether it is the experiment's file, and there is one."""
    return name_of(argument) == "file" and argument.has_tokens


def _take_for_override(arguments: ArgumentCollection) -> None:
    """Where a file may stand and none does, the first override stands there."""
    for first, rest in pairwise(arguments):
        if rest.is_var_positional() and first.is_positional_only() and first.tokens:
            word = first.tokens[0].value
            if "=" in word and not os.path.isfile(word):
                rest.tokens.insert(0, first.tokens.pop())


def _check_text(name: str, values: list[str]) -> None:
    if "" in values:
        raise ConfigError(name, values if len(values) > 1 else "", "is empty", "a value, or no such flag")
    for value in values:
        require_text(name, value)


def _meant(argument: Argument, arguments: ArgumentCollection) -> dict[str, Any]:
    """The experiment's keys that a flag sets, with what it sets them to. `source` looks after its own."""
    name = argument.name
    if name in ("--tp", "--ep"):
        tp, ep = (arguments[size].convert() if arguments[size].has_tokens else 1 for size in ("--tp", "--ep"))
        return {"placements": [f"tp{tp}xep{ep}"], "worlds": [tp * ep]}
    key = SETS.get(name, ("source",))[0]
    if key.startswith("source"):
        return {}
    value = argument.convert()
    return {key: value if key not in LISTS or isinstance(value, list) else [value]}


def _plainly(key: str, value: Any) -> Any:
    """What can be compared: true is not 1, a model's name has no case, and its file one path."""
    if isinstance(value, (list, tuple)):
        return [_plainly(key, item) for item in value]
    if key == "models" and isinstance(value, str):
        return one_path(value) if value.endswith((".yaml", ".yml")) else value.lower()
    return type(value), value
