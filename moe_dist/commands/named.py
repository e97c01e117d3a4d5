"""An error's field as the user has given it: by a flag, by a `key=value`, or by a key of a file."""

from __future__ import annotations

import re
from dataclasses import dataclass

from moe_dist.commands.config import read_yaml
from moe_dist.commands.flags import SETS
from moe_dist.errors import UNKNOWN_KEY, ConfigError, listed

# What the library calls it, and the experiment's key.
KEYS = {
    "world": "worlds", "exchange": "exchanges", "backend": "backends", "peer": "peers", "token_layout": "token_layouts",
    "token_split": "token_splits", "skew": "skews", "parallel.tp": "placements", "parallel.ep": "placements",
    "parallel.expert_map": "placements", "parallel.replicas": "placements", "checkpoint.layer": "source.layer",
    "checkpoint": "source.checkpoint",
}  # fmt: skip
SECTIONS = re.compile(r"^(experiment|workload|case)\.")  # which the user's keys are not under


@dataclass(frozen=True)
class Names:
    """The flags that the command has, those that were `given`, the `keys` of `key=value`, and the experiment's file."""

    flags: tuple[str, ...] = ()
    given: tuple[str, ...] = ()
    keys: tuple[str, ...] = ()
    file: str | None = None

    def named(self, error: ConfigError) -> ConfigError:
        """The same error, under the name that the user knows."""
        own = SECTIONS.sub("", error.field)
        flag = f"--{own.replace('_', '-')}"
        if error.rule == UNKNOWN_KEY and flag in self.flags:
            error = ConfigError(error.field, error.value, f"{UNKNOWN_KEY}; did you mean {flag}?", listed(error.legal))
        return error.of(self._name(error, own, KEYS.get(own, own)))

    def _name(self, error: ConfigError, own: str, key: str) -> str:
        for name in (own, key):
            if any(_is_under(name, given) for given in self.keys):
                return name
        flags = self._flags(error, own, key)
        if given := [flag for flag in flags if flag in self.given]:
            return " × ".join(given)
        if self._stands_in_file(key):
            return f"{self.file}: {key}"
        if any(given.split(".")[0] == key.split(".")[0] for given in self.keys):  # it goes with the section's others
            return key
        return flags[0] if flags else own

    def _flags(self, error: ConfigError, own: str, key: str) -> list[str]:
        """Those that set it. One that the error's rule names is what the value contradicts."""
        sets = {flag: SETS.get(flag, (flag.removeprefix("--").replace("-", "_"),)) for flag in self.flags}
        for name in (own, key):
            found = [flag for flag, names in sets.items() if any(_is_under(name, each) for each in names)]
            found = [flag for flag in found if flag not in error.rule.split()]
            if found:
                return found
        return []

    def _stands_in_file(self, key: str) -> bool:
        if self.file is None:
            return False
        try:
            return key.split(".")[0] in read_yaml(self.file)
        except ConfigError:  # it is the file itself that the error is about
            return False


def _is_under(name: str, key: str) -> bool:
    """`tokens.0` is under `tokens`."""
    return name == key or name.startswith(f"{key}.")
