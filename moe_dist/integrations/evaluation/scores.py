"""What answers and logits come to, with their errors. docs/accuracy.md has the formulas and where they come from."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

LOST = 3.0  # standard errors by which a difference below zero is no chance


@dataclass(frozen=True)
class Answers:
    """Of one model to all questions, in their order. `seconds` holds each question's wait: how long its batch took.
    `generating_s` is the time of all batches, one after the other."""

    right: tuple[bool, ...]
    valid: tuple[bool, ...]
    tokens: int
    seconds: tuple[float, ...]
    generating_s: float


@dataclass(frozen=True)
class Score:
    """Shares are from 0 to 1. Standard errors are None of a single question, `difference` of the baseline itself."""

    questions: int
    accuracy: float
    accuracy_error: float | None
    invalid: int
    latency_s: float
    tokens_per_s: float
    difference: float | None = None
    difference_error: float | None = None

    @property
    def lost(self) -> bool:
        """Whether it answers worse than the baseline by more than chance explains."""
        if self.difference is None or self.difference_error is None:
            return False
        return self.difference < 0 and self.difference < -LOST * self.difference_error


@dataclass(frozen=True)
class Logits:
    """`kl` in nats, of the baseline's distribution of the next token from this one's, mean over `tokens` of the
    baseline's own text in `rows`. Perplexities are of that text. `same_top`: the share of tokens before which both find
    the same token the likeliest."""

    tokens: int
    rows: int
    kl: float
    kl_error: float | None
    perplexity: float
    baseline_perplexity: float
    same_top: float


def score(answers: Answers, baseline: Answers | None = None) -> Score:
    """`baseline`: the answers to the same questions that these are compared with."""
    count = len(answers.right)
    accuracy = sum(answers.right) / count
    difference = error = None
    if baseline is not None:
        pairs = zip(answers.right, baseline.right, strict=True)
        difference, error = mean_and_error([int(own) - int(other) for own, other in pairs])
    return Score(
        questions=count,
        accuracy=accuracy,
        accuracy_error=mean_and_error([float(each) for each in answers.right])[1],
        invalid=answers.valid.count(False),
        latency_s=sum(answers.seconds) / count,
        tokens_per_s=answers.tokens / max(answers.generating_s, 1e-9),
        difference=difference,
        difference_error=error,
    )


def mean_and_error(values: Sequence[float]) -> tuple[float, float | None]:
    """The mean and its standard error, the sample's standard deviation over √n; None for a single value. For a share p
    of n answers that is √(p (1 - p) / (n - 1))."""
    count = len(values)
    mean = sum(values) / count
    if count < 2:
        return mean, None
    return mean, math.sqrt(sum((each - mean) ** 2 for each in values) / (count - 1) / count)


def mean_of_rows(sums: Sequence[float], counts: Sequence[int]) -> tuple[float, float | None]:
    """The mean over all tokens of rows with these sums and numbers of tokens, and its standard error. Tokens of a row
    depend on each other, so that rows are what is independent."""
    total, rows = sum(counts), len(counts)
    mean = sum(sums) / total
    if rows < 2:
        return mean, None
    off = sum((each - mean * count) ** 2 for each, count in zip(sums, counts, strict=True))
    return mean, math.sqrt(off * rows / (rows - 1)) / total
