"""Who is named when a group fails: the rank that did not come, not the one that waited for it."""

from __future__ import annotations

import pickle
import traceback
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from moe_dist.errors import MoeDistError, RankFailure
from moe_dist.messages import logs
from moe_dist.messages.printable import encodable
from moe_dist.runtime.context import RankContext
from moe_dist.runtime.pulse import Sight

Dumps = Callable[[object], bytes]

STOPPED = "its process is stopped (SIGSTOP, or a debugger)"
STOPPED_S = 3.0  # what stopped it could not wake it in less, and nobody is told later than 5 s after that
UNHEARD_S = 3.0  # of a rank that gives a sign of life once a second
SILENT_S = 5.0  # a rank that gave no sign of life for so long is suspected before one that is merely behind


def as_failure(
    error: BaseException, context: RankContext, dumps: Dumps = pickle.dumps, said: Sequence[str] = ()
) -> MoeDistError:
    """What a rank's function raised, as it travels: with the rank, what it was doing and its number at that moment.

    Errors of moe_dist keep their type, where `dumps` can carry them. `trace` keeps the rank's own traceback, which
    exceptions lose on their way, and `notices` what the rank had `said` before. Every text in it can be encoded: a lone
    surrogate would break what carries it.
    """
    failure = _own(error) if isinstance(error, MoeDistError) else None
    if failure is None or not _travels(failure, dumps):
        failure = own_failure(context, said_by(error))
    failure.trace = _trace(error)  # type: ignore[attr-defined]
    failure.notices = {encodable(text): [context.rank] for text in said}  # type: ignore[attr-defined]
    failure.raised_on = context.rank
    return failure


def log_failure(failure: MoeDistError) -> None:
    """Write what a rank's function raised to this process's standard error: its traceback, or with JSON its message
    with the traceback under `trace`."""
    trace = getattr(failure, "trace", "")
    if logs.as_json():
        logs.write(str(failure), "error", trace=trace)
    else:
        logs.write(trace, before="")


def own_failure(context: RankContext, cause: str) -> RankFailure:
    """A failure that is this rank's own fault, and no echo of another's."""
    failure = RankFailure(context.rank, encodable(context.status), context.comm.sequence, encodable(cause))
    failure.own = True  # type: ignore[attr-defined]
    return failure


def packed(outcome: object, context: RankContext, dumps: Dumps = pickle.dumps, said: Sequence[str] = ()) -> bytes:
    """A rank's result and what it had to say, as they travel. Raises RankFailure where the result can't."""
    try:
        return dumps((outcome, tuple(said)))
    except BaseException as error:
        cause = f"its result, of type {type(outcome).__name__}, can't be pickled: {said_by(error)}"
        raise own_failure(context, cause) from error


def unpacked(results: Sequence[bytes], doing: str) -> list[tuple[Any, tuple[str, ...]]]:
    """(result, what the rank had to say) as `packed` made them, in rank order. Raises RankFailure for the rank whose
    result can't be read."""
    outcomes = []
    for rank, result in enumerate(results):
        try:
            outcomes.append(pickle.loads(result))
        except Exception as error:
            failure = RankFailure(rank, doing, -1, f"its result can't be unpickled: {said_by(error)}")
            failure.own = True  # type: ignore[attr-defined]
            raise failure from error
    return outcomes


def said_by(error: BaseException) -> str:
    """The type and the first line of the message of any exception, also of one whose __str__ fails."""
    name = type(error).__name__
    try:
        lines = str(error).strip().splitlines()
    except BaseException as second:  # whatever it is: what counts is the first
        return f"{name} (its message can't be shown: __str__ raised {type(second).__name__})"
    return encodable(f"{name}: {lines[0]}" if lines else name)


def _own(error: MoeDistError) -> MoeDistError:
    error.args = tuple(encodable(arg) if isinstance(arg, str) else arg for arg in error.args)
    for name, value in error.__dict__.items():
        if isinstance(value, str):
            error.__dict__[name] = encodable(value)
    return error


def _travels(error: MoeDistError, dumps: Dumps) -> bool:
    try:
        encodable(str(error))
        return isinstance(pickle.loads(dumps(error)), MoeDistError)
    except BaseException:
        return False


def _trace(error: BaseException) -> str:
    try:
        return encodable("".join(traceback.format_exception(error)))
    except BaseException:  # attributes of it that a traceback shows may fail as __str__ does
        return "".join(traceback.format_tb(error.__traceback__)) + said_by(error) + "\n"


def is_echo(error: Exception) -> bool:
    """Whether this may be the consequence of another rank's failure: a collective that broke or timed out."""
    return isinstance(error, RankFailure) and not getattr(error, "own", False)


def blamed(failures: Sequence[RankFailure], sights: Sequence[Sight]) -> RankFailure:
    """Of collectives that broke or timed out (`failures`, at least one), the failure of the rank that did not come."""
    first = min(failures, key=lambda failure: (failure.seq, failure.rank))
    ops = {failure.rank: failure.op for failure in failures}
    rest = [replace(sight, op=ops.get(sight.rank, sight.op)) for sight in sights if sight.rank != first.rank]
    suspect = _suspect(first, rest)
    if suspect is None:
        return first
    sight, why = suspect
    waited = f"rank {first.rank} waited in {first.op} (sequence number {first.seq}): {first.cause}"
    return RankFailure(sight.rank, sight.doing, sight.sequence, f"{why}; {waited}")


def left_early(sights: Sequence[Sight]) -> RankFailure | None:
    """A rank whose function has returned while another one is in a collective that it took no part in."""
    for waiting in sights:
        if waiting.finished or not waiting.op:
            continue
        for gone in sights:
            if gone.finished and gone.sequence < waiting.sequence:
                waited = f"rank {waiting.rank} waits in {waiting.op} (sequence number {waiting.sequence})"
                return RankFailure(gone.rank, gone.doing, gone.sequence, f"{_returned(gone)}; {waited}")
    return None


def silence(sights: Sequence[Sight], timeout_s: float) -> RankFailure | None:
    """The failure of a rank that gave no sign of life for too long, with who waits for it. For less long if its process
    is stopped: it may be busy otherwise, and a debugger holds it on purpose."""
    given = {sight.rank: min(timeout_s, STOPPED_S) if sight.stopped and not sight.traced else timeout_s
             for sight in sights}  # fmt: skip
    quiet = [sight for sight in sights if not sight.finished and sight.silent_s > given[sight.rank]]
    if not quiet:
        return None
    sight = max(quiet, key=lambda sight: sight.silent_s)
    why = f"silent for {sight.silent_s:.0f} s" + (f": {STOPPED}" if sight.stopped else "")
    return RankFailure(sight.rank, sight.doing, sight.sequence, why + _waits(sights, sight))


def stalled(sights: Sequence[Sight]) -> RankFailure | None:
    """The failure of a rank that takes longer than its own status allows (RankContext.progress): between collectives,
    or in one that others don't come to. Ranks that compute are looked at first: who waits, waits for them."""
    over = [sight for sight in sights if not sight.finished and 0 < sight.limit_s < sight.noted_s]
    busy, waiting = [s for s in over if not s.op], [s for s in over if s.op]
    if busy:
        late = max(busy, key=lambda sight: (-sight.sequence, sight.noted_s - sight.limit_s))
        why = f"in no collective for {_over(late)}" + _at(late)
        return RankFailure(late.rank, late.doing, late.sequence, why + _waits(sights, late))
    if not waiting:
        return None
    first = min(waiting, key=lambda sight: (sight.sequence, sight.rank))
    rest = [sight for sight in sights if sight.rank != first.rank]
    failure = RankFailure(first.rank, first.op, first.sequence, f"not over after {_over(first)}")
    if _suspect(failure, rest) is not None:
        return blamed([failure], sights)
    for sight in waiting:
        if sight.where or (not sight.fresh and sight.noted_s > UNHEARD_S):
            doing = _at(sight) if sight.where else " and not heard of since"
            why = f"in {sight.op} for {_over(sight)}{doing}"
            return RankFailure(sight.rank, sight.doing, sight.sequence, why + _waits(sights, sight))
    return failure if all(sight.fresh for sight in waiting) else None  # who is really there shows soon


def _over(sight: Sight) -> str:
    return f"{sight.noted_s:.1f} s, where its limit is {sight.limit_s:g} s"


def _at(sight: Sight) -> str:
    return f", at {sight.where}" if sight.where else ""


def overdue(sights: Sequence[Sight], timeout_s: float) -> RankFailure:
    """The failure of a call that took too long: of the rank that is furthest behind, which the others wait for."""
    unfinished = [sight for sight in sights if not sight.finished]
    behind = min(unfinished, key=lambda sight: (not sight.stopped, sight.sequence, bool(sight.op), sight.rank))
    why = f"not done within {timeout_s:g} s, here for {behind.doing_s:.0f} s{_at(behind)}" + (
        f"; {STOPPED}" if behind.stopped else ""
    )
    waits = f", in {behind.op}" if behind.op else _waits(sights, behind)
    return RankFailure(behind.rank, behind.doing, behind.sequence, why + waits)


def _suspect(failure: RankFailure, rest: Sequence[Sight]) -> tuple[Sight, str] | None:
    for sight in rest:
        if sight.ended:
            return sight, sight.ended
    for sight in rest:
        if sight.stopped:
            return sight, STOPPED
    for sight in rest:
        if sight.silent_s > SILENT_S and sight.sequence <= failure.seq:
            return sight, f"silent for {sight.silent_s:.0f} s"
    behind = [sight for sight in rest if sight.sequence < failure.seq]
    if behind:
        last = min(behind, key=lambda sight: sight.sequence)
        missed = f"did not come to sequence number {last.sequence + 1}{_at(last)}"
        return last, _returned(last) if last.finished else missed
    for sight in rest:
        differ = _is_collective(sight.op) and _is_collective(failure.op) and sight.op != failure.op
        if sight.sequence == failure.seq and differ:
            return sight, f"was in {sight.op} where rank {failure.rank} was in {failure.op}"
    return None


def _is_collective(op: str) -> bool:
    """And no wait for the device, which may be that of a collective before, or for a peer's writes."""
    return op not in ("", "to_host") and not op.startswith("nvlink")


def _returned(sight: Sight) -> str:
    return f"returned after {sight.sequence} collectives"


def _waits(sights: Sequence[Sight], sight: Sight) -> str:
    """Who waits for `sight`'s rank, as the end of a sentence."""
    waiting = next((other for other in sights if other.op and other.rank != sight.rank and not other.finished), None)
    if waiting is None:
        return ""
    return f"; rank {waiting.rank} waits in {waiting.op} (sequence number {waiting.sequence})"
