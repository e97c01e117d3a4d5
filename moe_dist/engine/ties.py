"""When two medians are tied: the one rule of comparisons, diffs, predictions, `auto` and docs/choosing.md."""

from __future__ import annotations

from math import hypot

SCATTERS = 3  # standard errors: where there is nothing but scatter, two differences in a hundred are larger
# Another start of the ranks moves a median too, which no round sees: by 0.7 % in the middle and by more than this for 3
# of the 16 rows that benchmarks/2026-11-22-h200x2-backends.json and 2026-11-23-h200x2.json have in common.
ANOTHER_START = 0.02


def explained_us(times: tuple[float, float], scatters: tuple[float, float], together: bool = True) -> float:
    """Microseconds of the difference of two medians that scatter explains: that of both rows' rounds (`scatters`, the
    standard errors), or that of another start of the ranks; of rows that two starts have measured (not `together`),
    both."""
    explained = SCATTERS * hypot(*scatters), ANOTHER_START * min(times)
    return max(explained) if together else sum(explained)
