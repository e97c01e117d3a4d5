"""How many examples a property test runs: few in `make test`, 2,000 with MOE_DIST_HYPOTHESIS=nightly."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

PROFILE = os.environ.get("MOE_DIST_HYPOTHESIS") or "default"
NIGHTLY = 2000
QUIET = [HealthCheck.too_slow, HealthCheck.data_too_large]


def register() -> None:
    """The profiles `default` and `nightly`; MOE_DIST_HYPOTHESIS names the one to take."""
    settings.register_profile("default", deadline=None)
    settings.register_profile(
        "nightly", deadline=None, max_examples=NIGHTLY, suppress_health_check=QUIET, print_blob=True
    )
    settings.load_profile(PROFILE)


def examples(short: int) -> settings:
    """A decorator for a test that is too slow for hypothesis's 100 examples: `short` of them, 2,000 at night."""
    return settings(max_examples=NIGHTLY if PROFILE == "nightly" else short)
