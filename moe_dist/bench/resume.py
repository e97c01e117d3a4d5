"""Going on with an earlier run of the same experiment: its finished rows are kept where nothing has changed that moves
numbers; what has is named."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from pydantic import ValidationError

from moe_dist.bench.case import Case
from moe_dist.bench.guards import LARGEST_SEEN
from moe_dist.bench.identity import case_key
from moe_dist.bench.results import Outcome
from moe_dist.bench.row import Document, Failed, Hardware, Provenance, Row
from moe_dist.engine.plan import Plan
from moe_dist.errors import ConfigError
from moe_dist.files import read_small_text
from moe_dist.messages.counts import count_of, noun
from moe_dist.model.refused import as_config_error

FLAG = "--resume"
Planned = list[tuple[Case, Plan]]


def resumed(path: str, about: Provenance, planned: Planned, runtime: str) -> tuple[Outcome, Planned]:
    """What is in the results file at `path`, and the cases that are not finished there. A case is finished when its row
    has all its rounds and its queues; others stay until the case has a new one, failures too. A file that is not there
    yet holds nothing. Finished rows come first.

    Raises ConfigError for a file that this version did not write, for one of another commit, machine or version of a
    library, and for one with a case that is none of `planned` or stands there twice.
    """
    document = _read(path)
    if document is None:
        return Outcome(), planned
    if found := differences(document, about):
        rule = f"was measured by another commit or machine: {'; '.join(found)}"
        raise ConfigError(FLAG, path, rule, "the same as then; or start anew, without --resume")
    cases = {case_key(case, plan, runtime): (case, plan) for case, plan in planned}
    measured: list[Row | Failed] = [*document.rows, *document.failed]
    if strangers := [each for each in measured if each.key not in cases]:
        some = f"{len(strangers)} of {count_of(len(measured), 'case')}"
        rule = f"holds {some} that this experiment does not have: {_name(strangers[0])}"
        raise ConfigError(FLAG, path, rule, "the experiment of that file, or one with more cases")
    times = Counter(each.key for each in measured)
    if repeated := [each for each in measured if times[each.key] > 1]:
        rule = f"holds a case more than once: {_name(repeated[0])}"
        raise ConfigError(FLAG, path, rule, "a file as it was written; or start anew, without --resume")
    finished = {row.key for row in document.rows if _is_finished(row, cases[row.key][0].iters)}
    outcome = Outcome(
        rows=sorted(document.rows, key=lambda row: row.key not in finished),
        places={world: list(lines) for world, lines in document.ranks.items()},
        notices={notice.text: list(notice.ranks) for notice in document.notices},
        failed=list(document.failed),
        earlier=list(document.runs),
    )
    return outcome, [pair for key, pair in cases.items() if key not in finished]


def _is_finished(row: Row, iters: int) -> bool:
    return row.iters == iters and (row.chained_us is not None or not iters)


def differences(document: Provenance, about: Provenance) -> list[str]:
    """What forbids that numbers of the one stand beside those of the other."""
    pairs = {name: (getattr(document, name), getattr(about, name)) for name in ("commit", "code")}
    pairs |= {name: (getattr(document.machine, name), getattr(about.machine, name)) for name in Hardware.model_fields}
    return [f"{name} {before} then, {now} now" for name, (before, now) in pairs.items() if before != now]


def _read(path: str) -> Document | None:
    try:
        return Document.model_validate_json(read_small_text(Path(path), LARGEST_SEEN))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ConfigError(FLAG, path, f"can't be read: {error.strerror}", "a results file of --out") from None
    except ValidationError as error:
        first = as_config_error(error, Document, "")
        what = f" ({first.field}: {first.rule})" if first.field else ""
        rule = f"is no results file that this version wrote{what}"
        raise ConfigError(FLAG, path, rule, "that of the same version; or start anew, without --resume") from None


def _name(stranger: Row | Failed) -> str:
    if isinstance(stranger, Failed):
        return stranger.case
    row, mode = stranger, "graph" if stranger.graph else "eager"
    tokens = f"{row.global_tokens} {row.token_layout} {noun(row.global_tokens, 'token')}"
    return (
        f"{row.model} {row.placement} {row.exchange} {row.backend} {tokens}"
        f" {row.skew} {mode}, {row.source}, seed {row.seed}, {row.iters} {noun(row.iters, 'iteration')}"
    )
