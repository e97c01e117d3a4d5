"""Sums of two numbers of two digits, as a tiny model reads them: fixed width, a character a token."""

from __future__ import annotations

import json
from pathlib import Path

from moe_dist.workloads.streams import Stream

STEPS = 800  # of training: enough for nearly all of the sums
NUMBERS = 100
TRAINED_ON = 8000  # of the 10,000 sums; the others are asked
PAD, END, UNKNOWN = "<pad>", "<end>", "<unk>"
VOCABULARY = (PAD, END, UNKNOWN, *"0123456789+=")
PROMPT = 6  # characters of "12+34="


def prompt_of(first: int, second: int) -> str:
    return f"{first:02d}+{second:02d}="


def answer_of(first: int, second: int) -> str:
    return f"{first + second:03d}"


def split_sums(seed: int) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """All sums in an order drawn from `seed`: those to train on, and those to ask, which share none."""
    order = Stream("sums", seed).permutation(NUMBERS * NUMBERS).tolist()
    pairs = [divmod(number, NUMBERS) for number in order]
    return pairs[:TRAINED_ON], pairs[TRAINED_ON:]


def codes_of(first: int, second: int) -> list[int]:
    """A whole sum as tokens, with its end."""
    code = {text: number for number, text in enumerate(VOCABULARY)}
    return [code[letter] for letter in prompt_of(first, second) + answer_of(first, second)] + [code[END]]


def write_task(path: Path, pairs: list[tuple[int, int]]) -> None:
    """The questions of `pairs` in the form that `--task` takes. Raises OSError."""
    lines = [json.dumps({"prompt": prompt_of(*pair), "answer": answer_of(*pair)}) for pair in pairs]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
