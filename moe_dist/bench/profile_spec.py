"""What is asked of a profile: how many steps of a case, and where each rank's trace goes."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from moe_dist.model.spec import Name, Section

MOST_STEPS = 1000  # a trace of as many is hundreds of megabytes


class ProfileSpec(Section):
    """`folder`: an absolute path, on every rank's own machine. `name`: what the files of a case are called, before the
    rank."""

    section = "profile"

    folder: Name
    name: Name
    steps: Annotated[int, Field(strict=True, ge=1, le=MOST_STEPS)] = 3
