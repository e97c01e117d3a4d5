"""YAML of unknown origin: plain data of bounded size, or one line that says why not."""

from __future__ import annotations

import time

import pytest

from moe_dist.commands.yaml_loader import integer, load_yaml
from moe_dist.errors import ConfigError


def bomb() -> str:
    """Nine aliases of nine aliases of …: 9^8 values in 300 characters."""
    lines = ["a: &a [x,x,x,x,x,x,x,x,x]"]
    for above, name in zip("abcdefgh", "bcdefghi", strict=True):
        lines.append(f"{name}: &{name} [{','.join([f'*{above}'] * 9)}]")
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[1, 2", "expected ',' or ']'"),
        ("!!int abc", "the tag 'tag:yaml.org,2002:int' is not taken here at line 1, column 1"),
        ("a:\n  b: !!bool maybe", "is not taken here at line 2, column 6"),
        ("!!int 1:30", "tag"),
        ("!!int 010", "tag"),
        ("!!str 5", "tag"),
        ("[!!seq []]", "tag"),
        ("! 5", "tag"),
        ("!!timestamp 2024-13-45", "tag"),
        ("!!binary aGk=", "tag"),
        ("!!python/object/apply:os.getcwd []", "tag"),
        ("!mine 1", "tag"),
        ("&x [*x]", "holds itself"),
        ("a: &x {b: *x}", "holds itself"),
        ("*nobody", "undefined alias"),
        ("9" * 5000, "a number of 5,000 characters"),
        ("0x" + "f" * 5000, "a number of 5,002 characters"),
        ("18446744073709551616", "beyond 64 bits"),
        ("[" * 100_000, "deeper than 24 levels"),
        ("- " * 1000 + "1", "deeper than 24 levels"),
        ("{a: 1, a: 2}", "the key a stands here twice"),
        ("a:\n  b: 1\n  c: 2\n  b: 3", "the key b stands here twice"),
        ("{1: 2}", "1 is a key of type int"),
        ("[{b: {true: 2}}]", "true is a key of type bool"),
        ("? [a]\n: b", "a key of type seq"),
        ("{2024: 1}", "2024 is a key of type int"),
        ("{~: 1}", "a key of type null"),
        ("a\0b", "special characters"),
        ("\ud800", "special characters"),
        ("1: 2: 3", "mapping values"),
        ("--- 1\n--- 2", "single document"),
        ("{<<: 3}", "mapping"),
        (bomb(), "once aliases unfold"),
        ("x" * 300_000, "at most 262,144"),
    ],
    ids=lambda text: text[:20].encode("unicode_escape").decode(),
)
def test_what_is_refused(text, said):
    start = time.monotonic()
    with pytest.raises(ConfigError) as caught:
        load_yaml(text, "override", "given")
    assert time.monotonic() - start < 5
    assert (caught.value.field, caught.value.value) == ("override", "given")
    assert said in str(caught.value)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("8", 8),
        ("-0x1f", -31),
        ("1_000", 1000),
        ("1e3", 1000.0),
        ("1.5", 1.5),
        (".inf", float("inf")),
        ("true", True),
        ("", None),
        ("fp8_block", "fp8_block"),
        ("2024-01-02", "2024-01-02"),  # no date
        ("1:30", "1:30"),  # not 90
        ("010", "010"),  # not 8
        ("1__", "1__"),
        ("1__0", "1__0"),
        ("0x_f", "0x_f"),
        ("1_0", 10),
        ("[&a {x: 1}, *a]", [{"x": 1}, {"x": 1}]),
        ("{<<: {a: 1, b: 2}, a: 3}", {"a": 3, "b": 2}),
    ],
)
def test_what_is_read(text, value):
    found = load_yaml(text, "f", "v")
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(("text", "value"), [("8", 8), ("-3", -3), ("+3", 3), ("0", 0), ("1_000", 1000), ("0x1f", 31)])
def test_a_flags_number_is_a_files(text, value):
    assert integer(text) == value == load_yaml(text, "f", "v")


@pytest.mark.parametrize(
    "text", ["\uff18", "\u0663", "8 ", " 8", "8\n", "", "010", "1__0", "1e3", "1.0", "0b", "8" * 5000]
)
def test_what_is_no_number_of_a_flag(text):
    with pytest.raises(ValueError, match="no whole number"):
        integer(text)
