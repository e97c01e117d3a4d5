"""Text of unknown origin on its way to a terminal: names, paths and messages may hold what a terminal obeys."""

from __future__ import annotations


def printable(text: object) -> str:
    """`text` with control and format characters, lone surrogates and line ends written as escapes such as \\x1b."""
    given = str(text)
    if given.isprintable():
        return given
    return "".join(char if char.isprintable() else _escape(char) for char in given)


def one_line(text: object) -> str:
    """The same on one line: runs of white space, line ends among them, are one space."""
    return printable(" ".join(str(text).split()))


def encodable(text: str) -> str:
    """`text` with lone surrogates as escapes: nothing else keeps text from UTF-8."""
    return text.encode(errors="backslashreplace").decode()


def _escape(char: str) -> str:
    return char.encode("unicode_escape").decode("ascii")
