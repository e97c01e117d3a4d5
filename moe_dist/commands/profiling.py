"""`--profile`: which cases are traced, and where the traces go."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from moe_dist.bench.case import Case
from moe_dist.bench.profile import SUFFIX
from moe_dist.bench.profile_spec import MOST_STEPS, ProfileSpec
from moe_dist.commands.flags import Profiling
from moe_dist.commands.printing import print_line
from moe_dist.errors import ConfigError

STEPS = 3
FOLDER = "moe-dist-profile"  # where there is no file of results


def profiled(of_phases: Mapping[str, Sequence[Case]], profiling: Profiling, results: str | None) -> list[Case]:
    """All cases, each told to leave a trace where `profiling` asks for one. `of_phases`: cases by what their steps are
    called. `results`: the file beside which the folder lies if none is given. Raises ConfigError."""
    cases = [(phase, case) for phase, cases in of_phases.items() for case in cases]
    if not profiling.profile:
        return [case for _, case in cases]
    steps = STEPS if profiling.profile_steps is None else profiling.profile_steps
    if not 1 <= steps <= MOST_STEPS:
        raise ConfigError("profile_steps", steps, "is a number of steps", f"1 to {MOST_STEPS:,}")
    folder, seen, found = _folder(profiling.profile_output_dir, results), Counter[str](), []
    for phase, case in cases:
        mode = "graph" if case.graph else "eager"
        name = f"{case.parallel.label}-{phase}-{case.workload.tokens}tokens-{mode}"
        seen[name] += 1
        if seen[name] > 1:
            name += f"-{seen[name]}"
        found.append(case.with_changes(profile=ProfileSpec(folder=str(folder), name=name, steps=steps)))
    return found


def print_traces(cases: Sequence[Case]) -> None:
    """Where they are, which is on each rank's own machine."""
    asked = [case.profile for case in cases if case.profile]
    if asked:
        print_line(f"traces: {asked[0].folder}/*{SUFFIX}, for https://ui.perfetto.dev")


def _folder(given: str | None, results: str | None) -> Path:
    beside = Path(results) if results and (Path(results).is_file() or not Path(results).exists()) else None
    folder = Path(given or (beside.with_name(f"{beside.stem}-profile") if beside else FOLDER)).absolute()
    field, legal = "profile_output_dir", "a new folder, or an empty one"
    there = next(path for path in (folder, *folder.parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise ConfigError(field, str(folder), f"{there} is no folder that can be written to", legal)
    try:
        holds = there == folder and any(folder.iterdir())
    except OSError as error:
        raise ConfigError(field, str(folder), f"can't be read: {error.strerror}", legal) from None
    if holds:
        raise ConfigError(field, str(folder), "holds files already, and none is overwritten", legal)
    return folder
