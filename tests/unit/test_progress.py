"""Progress as a log gets it: how far a sweep is, and about how long the rest takes."""

from __future__ import annotations

import pytest

from moe_dist.commands import progress
from moe_dist.commands.progress import Reporter
from moe_dist.commands.terminal import terminal


@pytest.fixture
def reported(monkeypatch, capsys):
    """What a reporter of ten steps says, 3 s after `steps` of them, which took 10 s each."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])

    def report(*steps, **options):
        now[0] = 1000.0
        reporter = Reporter(10, **options)
        for step in steps:
            now[0] += 10.0
            reporter.step(*step)
        now[0] += 3.0
        reporter.shown("measuring")
        return capsys.readouterr().err.strip()

    return report


def test_steps_that_are_alike_are_estimated_by_their_mean(reported):
    assert reported((), remaining=True) == "[1/10] measuring, about 2 min left"
    assert reported(()) == "[1/10] measuring"
    assert reported(remaining=True) == "[0/10] measuring"


def test_of_others_it_is_told_and_time_goes_on(reported):
    assert reported((9, 60.0)) == "[1/10] measuring, about 57 s left"
    assert reported((9, 60.0), (8, 4000.0)) == "[2/10] measuring, about 67 min left"
    assert reported((9, None)) == "[1/10] measuring"
    assert reported((9, 2.0)) == "[1/10] measuring"  # later than was thought: nothing is known


def test_steps_may_have_to_be_done_again(reported):
    assert reported((9, None), (12, None)) == "[2/14] measuring"


@pytest.mark.parametrize(("columns", "width"), [("0", 80), ("1", 80), ("40", 40), ("99999", 1000)])
def test_a_width_that_is_none_is_the_usual_one(columns, width, monkeypatch):
    """As containers have it, whose terminal has no size yet."""
    monkeypatch.setenv("COLUMNS", columns)
    assert terminal().width == width
