"""From what was asked to rows: the baseline first, then each variant, on groups of ranks of its own size."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from moe_dist.integrations.evaluation import asking, harness
from moe_dist.integrations.evaluation.harness import Metric
from moe_dist.integrations.evaluation.scores import Answers, Logits, Score, score
from moe_dist.integrations.evaluation.setup import Setup, Variant
from moe_dist.integrations.evaluation.task import Question, Task, answer_in, is_right
from moe_dist.runtime.context import Group

BATCH_TIMEOUT_S = 600.0  # of a batch of answers, or of loading a model
HARNESS_TIMEOUT_S = 24 * 3600.0  # of a whole task, which is one call
ROW_TOKENS = 32  # of the baseline's own text: short rows need little memory for their logits

Start = Callable[[int, Callable[[str], None]], Group]


@dataclass(frozen=True)
class Row:
    """What one variant came to; `variant` None is the baseline. `said`: its answers as they were taken, None for one
    that was invalid."""

    variant: Variant | None
    score: Score | None = None
    logits: Logits | None = None
    said: tuple[str | None, ...] = ()
    metrics: tuple[Metric, ...] = ()

    @property
    def lost(self) -> bool:
        """Whether it answers worse than the baseline by more than chance explains."""
        return bool(self.score and self.score.lost) or any(each.lost for each in self.metrics)


@dataclass(frozen=True)
class Harness:
    """A task of lm-evaluation-harness, `folder`: of further tasks' YAML files."""

    task: str
    folder: str | None
    limit: int | None
    shots: int


@dataclass(frozen=True)
class Work:
    """`tokens`: how many of the baseline's own text, for logits; 0 for none."""

    setup: Setup
    task: Task | None
    tokens: int
    seed: int
    harness: Harness | None = None

    def batches(self) -> list[list[Question]]:
        asked = self.task.questions if self.task else ()
        size = self.setup.batch_size
        return [list(asked[at : at + size]) for at in range(0, len(asked), size)]

    def steps(self, variants: Iterable[Variant]) -> int:
        """Of progress: a model that is loaded, a batch, logits, a task of the harness."""
        return (1 + len(list(variants))) * (1 + len(self.batches()) + bool(self.tokens) + bool(self.harness))


class Evaluation:
    """`start` starts ranks, `shown` gets progress texts, `step` is called as each step of `Work.steps` is done."""

    def __init__(self, work: Work, start: Start, shown: Callable[[str], None], step: Callable[[], None]) -> None:
        self._work, self._start, self._shown, self._step = work, start, shown, step
        self._text: tuple[Tensor, Tensor] | None = None
        self._answers: Answers | None = None
        self._metrics: tuple[Metric, ...] = ()
        self._begun = False

    def rows(self, variants: list[Variant], world_of_baseline: int) -> Iterator[Row]:
        """The baseline's row, then one for each variant, in their order but for those of one number of ranks, which
        come together. `world_of_baseline`: how many ranks compute it, each all of it; 1 where the group is our own."""
        worlds = dict.fromkeys([world_of_baseline, *(each.parallel.world for each in variants)])
        for world in worlds:
            with closing(self._start(world, self._shown)) as group:
                if not self._begun:
                    self._begun = True
                    yield self._baseline(group)
                elif self._text is not None:  # of another group, which these ranks know nothing of
                    self._run(group, asking.prepare, self._work.setup, None)
                    self._run(group, asking.keep_logits, *self._text)
                for variant in variants:
                    if variant.parallel.world == world:
                        yield self._variant(group, variant)

    def _baseline(self, group: Group) -> Row:
        self._run(group, asking.prepare, self._work.setup, None)
        self._step()
        made, said = self._asked(group)
        self._answers = made
        logits = None
        if self._work.tokens:
            given = self._work.tokens, ROW_TOKENS, self._work.seed
            self._text = self._run(group, asking.own_text, *given)[0]
            self._run(group, asking.keep_logits, *self._text)
            logits = self._compared(group)
        self._metrics = self._measured(group)
        return Row(None, score(made) if made else None, logits, said, self._metrics)

    def _variant(self, group: Group, variant: Variant) -> Row:
        self._run(group, asking.prepare, self._work.setup, variant)
        self._step()
        made, said = self._asked(group)
        logits = self._compared(group) if self._text is not None else None
        metrics = harness.compared(self._measured(group), self._metrics)
        return Row(variant, score(made, self._answers) if made else None, logits, said, metrics)

    def _asked(self, group: Group) -> tuple[Answers | None, tuple[str | None, ...]]:
        batches, most = self._work.batches(), self._work.setup.new_tokens
        if not batches:
            return None, ()
        self._run(group, asking.answers, [each.prompt for each in batches[0]], 2)  # what is made at a first call
        found: list[str | None] = []
        right: list[bool] = []
        waits: list[float] = []
        tokens, generating_s = 0, 0.0
        for batch in batches:
            said = self._run(group, asking.answers, [each.prompt for each in batch], most)
            taken = [answer_in(text, each) for text, each in zip(said[0].texts, batch, strict=True)]
            right += [is_right(answer, each) for answer, each in zip(taken, batch, strict=True)]
            found += taken
            seconds = max(each.seconds for each in said)  # a batch is done when all ranks are
            waits += [seconds] * len(batch)
            tokens, generating_s = tokens + said[0].tokens, generating_s + seconds
            self._step()
        valid = tuple(answer is not None for answer in found)
        return Answers(tuple(right), valid, tokens, tuple(waits), generating_s), tuple(found)

    def _compared(self, group: Group) -> Logits:
        assert self._text is not None
        found: Logits = self._run(group, asking.compare_logits, *self._text)[0]
        self._step()
        return found

    def _measured(self, group: Group) -> tuple[Metric, ...]:
        asked = self._work.harness
        if asked is None:
            return ()
        given = asked.task, asked.folder, asked.limit, asked.shots, self._work.setup.batch_size
        found: tuple[Metric, ...] = group.run(harness.run, *given, timeout_s=HARNESS_TIMEOUT_S, shown=self._shown)[0]
        self._step()
        return found

    def _run(self, group: Group, function: Callable[..., Any], *arguments: Any) -> Any:
        return group.run(function, *arguments, timeout_s=BATCH_TIMEOUT_S, shown=self._shown)
