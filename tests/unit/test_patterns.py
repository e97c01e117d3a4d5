"""Patterns of config.json: what they match is what Python's matcher says, and none of them takes for ever."""

from __future__ import annotations

import fnmatch
import re
import time

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from profiles import examples

from moe_dist.checkpoint import graphs
from moe_dist.checkpoint.patterns import LONGEST, Pattern
from moe_dist.checkpoint.quantization import Exceptions, Quantization
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


globs = st.lists(st.sampled_from(["a", "b", ".", "*", "?", "[ab]", "[!a]", "[a-b]", "[]a]", "[^a]", "[", "]", "\\",
                                  "!"]),
                 max_size=8).map("".join)  # fmt: skip


@examples(300)
@example(text="[]", names=["[]"])
@example(text="[!]", names=["[!]"])
@given(text=globs, names=st.lists(st.text("ab.[]^!\\", max_size=6), min_size=1, max_size=5))
def test_a_glob_matches_what_fnmatch_does(text, names):
    ours = Pattern.glob(text)
    for name in names:
        assert ours.matches(name) == fnmatch.fnmatchcase(name, text), (text, name)


@examples(100)
@given(
    texts=st.lists(texts, min_size=1, max_size=4), names=st.lists(st.text("ab1._{", max_size=7), min_size=1, max_size=5)
)
def test_many_match_where_one_of_them_does(texts, names):
    try:
        alone = [Pattern.parse(text) for text in texts]
    except re.error:
        return
    together = Pattern.any_of(alone)
    for name in names:
        assert together.matches(name) == any(pattern.matches(name) for pattern in alone), (texts, name)


@pytest.mark.parametrize("forget", [False, True])
def test_remembered_steps_change_nothing(forget, monkeypatch):
    if forget:
        monkeypatch.setattr(graphs, "MOST_KEPT", 20)
    texts = [rf".*experts\.{number}\.up" for number in range(0, 60, 2)]
    together = Pattern.any_of([Pattern.parse(text) for text in texts])
    for expert in (3, 8, 58, 59, 8, 60, 3):
        assert together.matches(f"mlp.experts.{expert}.up_proj") == (expert % 2 == 0 and expert < 60)


@pytest.mark.parametrize(
    ("entries", "experts", "layers"),
    [
        ([f"re:.*x{number}.*y" for number in range(1000)], 2048, 2),
        ([rf"re:.*layers\.{number}\.self_attn.*" for number in range(400)], 384, 60),
        ([f"model.layers.{number}.self_attn*" for number in range(400)], 384, 60),
        ([rf"re:.*mlp\.experts\.{number}\.gate_proj_of_old" for number in range(384)], 384, 1),
    ],
    ids=["a thousand", "a model's", "ModelOpt's", "each expert"],
)
def test_long_lists_are_fast(entries, experts, layers):
    start = time.monotonic()
    found = Quantization("a section", (), Exceptions.parse(entries, "ignore", "config.json"))
    for _ in range(3):  # a layer is looked up once
        assert all(found.converts(f"model.layers.{layer}.mlp.experts", experts) for layer in range(layers))
    assert time.monotonic() - start < 8


def test_what_would_take_too_long_is_refused_in_bounded_time():
    entries = [rf"re:.*mlp\.experts\.{number}[0-9]\..*Z" for number in range(400)]
    found = Quantization("a section", (), Exceptions.parse(entries, "ignore", "config.json"))
    start = time.monotonic()
    with pytest.raises(CheckpointError, match="400 patterns for 49,152 modules of model"):
        found.converts("model.layers.0.mlp.experts", 16_384)
    assert time.monotonic() - start < 12
    start = time.monotonic()
    with pytest.raises(
        CheckpointError, match=r"ignore is too much: its 1,000 patterns, written out, have [0-9,]* parts"
    ):
        Exceptions.parse(["re:" + "(.*model.*layers.*){9}"] * 1000, "ignore", "config.json")
    assert time.monotonic() - start < 8


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
