"""The errors that moe_dist raises on purpose. Every one survives pickling, so Ray can carry it to the driver."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from typing import Any

from moe_dist.messages.printable import printable

LONGEST_VALUE = 300  # characters of a wrong value that a message repeats
UNKNOWN_KEY = "unknown key"  # a rule that the field's own name breaks, whatever its value is
LONGEST_MISTYPED, FEW_LETTERS = 60, 3  # of a name that may be a slip of another, and of one's beginning
ALIKE = 0.7  # the two, by difflib's ratio


class MoeDistError(Exception):
    """Base class. Not a ValueError, so that pydantic passes it on untouched instead of wrapping it.

    `raised_on`: the rank whose function raised it, of a group of ranks; None for any other."""

    raised_on: int | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return (_rebuild, (type(self), self.args, self.__dict__))


def _rebuild(cls: type[MoeDistError], args: tuple[Any, ...], state: dict[str, Any]) -> MoeDistError:
    error = cls.__new__(cls)
    error.args = args
    error.__dict__.update(state)
    return error


class ConfigError(MoeDistError):
    """A value that can't work. Names the field, the value, the rule it breaks and what is legal."""

    def __init__(self, field: str, value: object, rule: str, legal: object = None) -> None:
        self.field, self.value, self.rule, self.legal = field, value, rule, legal
        text = f"{printable(field)} = {shown(value)}: {rule}"  # a field's name may come from a file
        given = field.replace(": ", ".").rpartition(".")[2] if rule == UNKNOWN_KEY else value
        if isinstance(given, str) and isinstance(legal, (list, tuple)):
            text += did_you_mean(given, map(str, legal))
        if legal is not None:
            text += f" (legal: {listed(legal)})"
        super().__init__(text)

    @property
    def brief(self) -> str:
        """For a sentence that is about something else: without what is legal."""
        return f"{printable(self.field)} = {shown(self.value)}: {self.rule}"

    def of(self, field: str) -> ConfigError:
        """The same with another name for the field."""
        return type(self)(field, self.value, self.rule, self.legal)


class NoRowsError(ConfigError):
    """A file that is read well and holds no rows of results."""


class UnsupportedError(MoeDistError):
    """A legal request that nothing here can serve. `reasons` says why, one line each."""

    def __init__(self, what: str, reasons: Iterable[str], supported: object = None) -> None:
        self.what, self.reasons, self.supported = what, tuple(reasons), supported
        text = f"{what} is not supported: " + "; ".join(self.reasons)
        if supported is not None:
            text += f" (supported: {listed(supported)})"
        super().__init__(text)

    @property
    def brief(self) -> str:
        """For a sentence that names other possibilities itself."""
        return f"{self.what}: {'; '.join(self.reasons)}"


class CheckpointError(MoeDistError):
    """A checkpoint on disk that is missing, truncated, inconsistent or holds NaN."""

    def __init__(self, path: object, problem: str) -> None:
        self.path, self.problem = str(path), problem
        super().__init__(f"checkpoint {printable(path)}: {problem}")


class ResourceError(MoeDistError):
    """The machine or the Ray cluster is too small. Says what is short, by how much, and what helps."""

    def __init__(self, resource: str, needed: object, available: object, hint: str) -> None:
        self.resource, self.needed, self.available, self.hint = resource, needed, available, hint
        super().__init__(f"not enough {resource}: {needed} needed, {available} available. {hint}")


class InstallationError(MoeDistError):
    """A library that moe_dist needs is missing or broken."""

    def __init__(self, problem: object) -> None:
        self.problem = str(problem)
        super().__init__(f"this installation lacks something: {problem}")


class RankFailure(MoeDistError):
    """A rank failed, died or did not answer in time. `seq` counts that rank's collectives; -1 if none was running.
    `node`: the name of the rank's machine, "" while nobody has said it."""

    node = ""

    def __init__(self, rank: int, op: str, seq: int, cause: str) -> None:
        self.rank, self.op, self.seq, self.cause = rank, op, seq, cause
        super().__init__(f"rank {rank} failed in {op} (sequence number {seq}): {cause}")

    def locate(self, nodes: Sequence[str]) -> None:
        """Note the node, given that of each rank; the message has it where there are several."""
        if not 0 <= self.rank < len(nodes) or self.node:
            return
        self.node = nodes[self.rank]
        if len(set(nodes)) > 1:
            where = f"rank {self.rank} on {printable(self.node)}"
            self.args = (f"{where} failed in {self.op} (sequence number {self.seq}): {self.cause}",)


class ClusterLost(MoeDistError):
    """The Ray cluster that the ranks run on went away: its head, or the connection to it."""

    def __init__(self, address: str, doing: str, cause: str) -> None:
        self.address, self.doing, self.cause = address, doing, cause
        super().__init__(f"the Ray cluster at {address} was lost while {doing}: {cause}")


class OutputError(MoeDistError):
    """Results that were measured but can't be written where they were asked for."""

    def __init__(self, path: object, problem: str) -> None:
        self.path, self.problem = str(path), problem
        super().__init__(f"{path} can't be written: {problem}")


def shown(value: object) -> str:
    """`repr` as a message takes it: cut where it is long, and no error where it has none (an int of 5,000 digits)."""
    try:
        text = repr(value)
    except Exception:
        return f"<{type(value).__name__}>"
    return text if len(text) <= LONGEST_VALUE else f"{text[:LONGEST_VALUE]}… ({len(text):,} characters)"


def nearest_name(given: str, names: Iterable[str]) -> str | None:
    """The name that is most like a mistyped one, has its letters or begins with it, if any."""
    by_letters = {name.lower(): name for name in names}
    if not given or len(given) > LONGEST_MISTYPED or given in by_letters.values():
        return None
    letters = given.lower()
    found = get_close_matches(letters, by_letters, n=1, cutoff=ALIKE)
    found += [name for name in by_letters if sorted(name) == sorted(letters)]
    found += [name for name in by_letters if name.startswith(letters) and len(letters) >= FEW_LETTERS]
    return by_letters[found[0]] if found else None


def did_you_mean(given: str, names: Iterable[str]) -> str:
    """For the end of a rule: the nearest name, if any."""
    name = nearest_name(given, names)
    return f"; did you mean {name}?" if name else ""


def listed(values: object) -> str:
    """Legal values as a reader wants them: a sequence joined by commas, anything else as it is."""
    if isinstance(values, (list, tuple, set, frozenset)):
        items = sorted(map(str, values)) if isinstance(values, (set, frozenset)) else map(str, values)
        return ", ".join(items)
    return str(values)
