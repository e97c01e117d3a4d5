"""Patterns of config.json: what they match is what Python's matcher says, and none of them takes for ever."""

from __future__ import annotations

import re
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from profiles import examples

from moe_dist.checkpoint.patterns import LONGEST, Pattern
from moe_dist.checkpoint.quantization import Exceptions
from moe_dist.errors import CheckpointError

NAME = "model.layers.11.mlp.experts.127.gate_proj"
atoms = st.sampled_from(["a", "b", ".", r"\.", "[ab]", "[^a]", r"\d", "1", "[]a]", r"\w", "^", "$", "_", "{"])
counts = st.sampled_from(["", "", "*", "+", "?", "*?", "{2}", "{1,2}", "{,2}", "{1,}"])


def combined(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    group = st.tuples(st.sampled_from(["(", "(?:", "(?P<x>"]), inner, st.just(")"), counts).map("".join)
    return st.one_of(group, st.tuples(inner, inner).map("".join), st.tuples(inner, inner).map("|".join))


texts = st.recursive(st.tuples(atoms, counts).map("".join), combined, max_leaves=8)


@examples(300)
@given(text=texts, names=st.lists(st.text("ab1._{", max_size=7), min_size=1, max_size=5))
def test_it_matches_what_pythons_matcher_does(text, names):
    try:
        theirs = re.compile(text)
    except re.error:
        if "(?P<x>" not in text:  # a name twice is nothing to us: nobody asks for groups
            with pytest.raises(re.error):
                Pattern.parse(text)
        return
    ours = Pattern.parse(text)
    for name in names:
        assert ours.matches(name) == bool(theirs.match(name)), (text, name)


@pytest.mark.parametrize(
    "text",
    [
        "(.|.)*Z", "(.?){30}Z", 60 * ".?" + "Z", "(.*)*Z", 100 * ".*" + "Z", "(.+)+Z", "((.|m)*|(.?)*)+Z",
        "(" * 60 + "." + ")*" * 60 + "Z", "(a|b|.)*.{20}Z",
    ],
)  # fmt: skip
def test_none_takes_for_ever(text):
    start = time.monotonic()
    found = Exceptions.parse([f"re:{text}"], "ignore", "config.json")
    assert not any(found.cover(f"model.layers.11.mlp.experts.{expert}.gate_proj") for expert in range(100))
    assert time.monotonic() - start < 3


@pytest.mark.parametrize(
    "text",
    [
        ".*model.*layers.*mlp.*experts.*proj.*", r"model\.layers\.\d+\.mlp\.experts\.\d{1,3}\.(gate|up|down)_proj$",
        "^model[.]layers[.](9|1[0-9])[.].*", "(.*)*gate_proj", "(.|.)*j", r"\A.*_proj\Z",
    ],
)  # fmt: skip
def test_harmless_ones_are_read(text):
    assert Exceptions.parse([f"re:{text}"], "ignore", "config.json").cover(NAME)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("(?!x).*", "look-around"), ("(?i)x", "flags"), (r"(a)\1", "escape"), (r"\bx", "escape"), ("(a", "missing"),
        ("a)", "unbalanced"), ("[a", "unterminated"), ("*", "nothing to repeat"), ("a**", "multiple repeat"),
        ("a++", "multiple repeat"), ("a{3,2}", "min repeat"), ("((a{99}){99}){99}", "written out"),
        ("((){9999}){9999}", "written out"), ("a" * (LONGEST + 1), "characters"), ("(" * 400, ""),
    ],
)  # fmt: skip
def test_what_is_not_read_says_why(text, said):
    start = time.monotonic()
    with pytest.raises(CheckpointError, match=f"no pattern: .*{said}"):
        Exceptions.parse([f"re:{text}"], "ignore", "config.json")
    assert time.monotonic() - start < 1
