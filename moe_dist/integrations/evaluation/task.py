"""Questions of a file of JSON lines, and what of a model's words is its answer."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_dist.errors import ConfigError
from moe_dist.files import read_small_text, require_text, unique_keys
from moe_dist.messages.counts import count_of

LONGEST_FILE = 256 << 20  # bytes; GSM8K's 1,319 questions are 0.7 MiB
LONGEST_PATTERN = 1000
FORMS = 'objects with "prompt" and "answer", or "question" and "answer" with GSM8K\'s line "#### N"'
MARK = re.compile(r"####\s*(\S.*)")
GSM8K_PATTERN = r"####\s*(-?[0-9.,]*[0-9])"
FIRST_LINE = r"\s*([^\n]*[^\s])"


@dataclass(frozen=True)
class Question:
    """`pattern`: the first match in what the model says is its answer, or that match's group if it has one. `example`:
    the prompt with all of the given answer behind it, as it stands before other prompts."""

    prompt: str
    answer: str
    pattern: str
    example: str


@dataclass(frozen=True)
class Task:
    """`questions` with the examples before each prompt already."""

    name: str
    questions: tuple[Question, ...]


def read_task(path: str, *, pattern: str | None = None, limit: int | None = None, shots: int = 0) -> Task:
    """`pattern` counts for lines without one of their own. The first `shots` lines are examples that stand before every
    prompt, and are not asked; of the others at most `limit` are. Raises ConfigError: for a file that can't be read or
    has a line of another form, a pattern that is none, and numbers that can't be."""
    for field, value, least in (("limit", limit, 1), ("shots", shots, 0)):
        if value is not None and value < least:
            raise ConfigError(field, value, "is a number of lines of the task", f"{least} and more")
    if pattern is not None:
        check_pattern("pattern", pattern)
    require_text("task", path)
    try:
        text = read_small_text(path, LONGEST_FILE)
    except OSError as error:
        raise ConfigError("task", path, f"can't be read: {error.strerror}", "a file of JSON lines") from None
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    found = [_question(path, number, line, pattern) for number, line in lines]
    if len(found) <= shots:
        rule = f"{path} has {count_of(len(found), 'line')}, and at least one must be left to ask"
        raise ConfigError("shots" if found else "task", shots if found else path, rule, "fewer examples, or more lines")
    before = "".join(f"{each.example}\n\n" for each in found[:shots])
    asked = found[shots:][:limit]
    prompts = (Question(before + each.prompt, each.answer, each.pattern, each.example) for each in asked)
    return Task(Path(path).stem, tuple(prompts))


def answer_in(text: str, question: Question) -> str | None:
    """The model's answer in what it said, None where there is none that the pattern finds."""
    found = re.search(question.pattern, text)
    if found is None:
        return None
    return _plain(found[1] if found.re.groups and found[1] is not None else found[0], question)


def is_right(answer: str | None, question: Question) -> bool:
    return answer is not None and answer == _plain(question.answer, question)


def check_pattern(field: str, pattern: object) -> str:
    """Raises ConfigError for what is no regular expression of at most one group."""
    legal = f"a regular expression of Python's with at most one group and {LONGEST_PATTERN} characters"
    if not isinstance(pattern, str) or not 0 < len(pattern) <= LONGEST_PATTERN:
        raise ConfigError(field, pattern, "finds the answer in what the model says", legal)
    try:
        groups = re.compile(pattern).groups
    except (re.error, OverflowError, RecursionError) as error:
        raise ConfigError(field, pattern, f"is no regular expression: {error}", legal) from None
    if groups > 1:
        raise ConfigError(field, pattern, f"has {groups} groups, and one is the answer", legal)
    return pattern


def _plain(answer: str, question: Question) -> str:
    """Of GSM8K numbers without commas, as its own scoring has them."""
    return answer.strip().replace(",", "") if question.pattern == GSM8K_PATTERN else answer.strip()


def _question(path: str, number: int, line: str, pattern: str | None) -> Question:
    where = f"{path}, line {number}"
    try:
        found = json.loads(line, object_pairs_hook=unique_keys)
    except (ValueError, RecursionError) as error:
        raise ConfigError(where, line.strip(), f"is no JSON: {error}", FORMS) from None
    if not isinstance(found, dict):
        raise ConfigError(where, line.strip(), "is no JSON object", FORMS)
    given = check_pattern(f"{where}: pattern", found["pattern"]) if "pattern" in found else pattern
    answer = _text(where, found, "answer")
    if "prompt" in found:
        prompt = _text(where, found, "prompt")
        return Question(prompt, answer, given or FIRST_LINE, prompt + answer)
    prompt = f"Question: {_text(where, found, 'question')}\nAnswer:"
    marked = MARK.search(answer)
    if marked is None:
        raise ConfigError(f"{where}: answer", answer, 'has no line "#### N"', FORMS)
    return Question(prompt, marked[1].strip(), given or GSM8K_PATTERN, f"{prompt} {answer}")


def _text(where: str, found: Mapping[str, Any], key: str) -> str:
    value = found.get(key)
    if not isinstance(value, str) or not value.strip():
        raise ConfigError(f"{where}: {key}", value, "is no text", FORMS)
    return value
