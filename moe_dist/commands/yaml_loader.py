"""The one loader of YAML, for files and for the values of overrides: plain data of bounded size, or a ConfigError."""

from __future__ import annotations

import re
from typing import Any

import yaml
from yaml.constructor import ConstructorError
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from moe_dist.errors import ConfigError
from moe_dist.messages.printable import one_line

LONGEST_TEXT = 256 << 10  # characters: PyYAML reads about so much in two seconds
DEEPEST = 24  # levels of nesting
MOST_NODES = 100_000  # with each alias counted as what it stands for
BITS = 64  # of an integer
INTEGER = re.compile(r"^[-+]?(?:0|[1-9](?:_?[0-9])*|0b[01](?:_?[01])*|0x[0-9a-fA-F](?:_?[0-9a-fA-F])*)\Z")

TAG = "tag:yaml.org,2002:"
PLAIN_TAGS = {TAG + kind for kind in ("null", "bool", "int", "float", "str", "seq", "map", "merge")}


class _Loader(yaml.SafeLoader):
    """YAML 1.1 as PyYAML has it, without what turns a slip into another value: dates (2024-13-45), numbers to the base
    60 (1:30 was 90) and octal numbers without a letter (010 was 8) are text here. Tags that are written out would bring
    them back, and are not taken."""

    depth = 0

    def compose_node(self, parent: Node | None, index: int) -> Node | None:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        if getattr(event, "tag", None) is not None:
            raise ConstructorError(None, None, f"the tag {event.tag!r} is not taken here", event.start_mark)
        self.depth += 1
        if self.depth > DEEPEST:
            raise ConstructorError(None, None, f"nested deeper than {DEEPEST} levels", event.start_mark)
        node: Node | None = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_int(self, node: ScalarNode) -> int:
        text = self.construct_scalar(node)
        if len(str(text)) > BITS + 4:  # 0b and 64 digits, and a sign
            raise ConstructorError(None, None, f"a number of {len(str(text)):,} characters", node.start_mark)
        value: int = super().construct_yaml_int(node)
        if abs(value) >= 1 << BITS:
            raise ConstructorError(None, None, f"{value} is beyond {BITS} bits", node.start_mark)
        return value


_Loader.add_constructor(TAG + "int", _Loader.construct_int)
_Loader.yaml_implicit_resolvers = {
    first: [(tag, regex) for tag, regex in found if tag not in (TAG + "int", TAG + "float", TAG + "timestamp")]
    for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    TAG + "int",
    INTEGER,
    list("-+0123456789"),
)
_Loader.add_implicit_resolver(
    TAG + "float",
    re.compile(
        r"^(?:[-+]?[0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?|[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+"
        r"|[-+]?\.[0-9_]+(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
    ),
    list("-+0123456789."),
)


def integer(text: str) -> int:
    """A whole number as YAML has it here, for flags. Raises ValueError: int() takes other digits than 0 to 9 too."""
    if not INTEGER.match(text) or len(text) > BITS + 4:
        raise ValueError(f"{text!r} is no whole number")
    return int(text, 0)


def load_yaml(text: str, field: str, value: str) -> Any:
    """What `text` holds: None, booleans, numbers of at most 64 bits, text, lists and mappings of names to these.

    `field` and `value` are what a ConfigError names. It is raised for whatever is no such YAML: wrong syntax, other
    tags, keys that are no names or stand twice, and what is too long, too deep, holds itself or unfolds without end.
    """
    if len(text) > LONGEST_TEXT:
        raise ConfigError(field, value, f"holds {len(text):,} characters", f"at most {LONGEST_TEXT:,}")
    try:
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            _check(node, {}, set())
            return loader.construct_document(node)
        finally:
            loader.dispose()
    except yaml.YAMLError as error:
        raise ConfigError(field, value, f"is no valid YAML: {_said(error)}") from None
    except Exception as error:  # PyYAML lets errors of int(), float() and its own look-ups through
        raise ConfigError(field, value, f"is no valid YAML: {type(error).__name__}: {_said(error)}") from None


def _said(error: Exception) -> str:
    return one_line(str(error).replace('in "<unicode string>", ', "at "))


def _check(node: Node, sizes: dict[int, int], open_nodes: set[int]) -> int:
    """How many nodes this one unfolds to. Raises ConstructorError for what a config can't hold."""
    key = id(node)
    if key in open_nodes:
        raise ConstructorError(None, None, "a value that holds itself", node.start_mark)
    if key in sizes:
        return sizes[key]
    if node.tag not in PLAIN_TAGS:
        raise ConstructorError(None, None, f"the tag {node.tag!r} is not taken here", node.start_mark)
    open_nodes.add(key)
    size = 1
    if isinstance(node, SequenceNode):
        size += sum(_check(child, sizes, open_nodes) for child in node.value)
    elif isinstance(node, MappingNode):
        _check_keys(node)
        size += sum(1 + _check(child, sizes, open_nodes) for _, child in node.value)
    if size > MOST_NODES:
        raise ConstructorError(None, None, f"more than {MOST_NODES:,} values once aliases unfold", node.start_mark)
    open_nodes.remove(key)
    sizes[key] = size
    return size


def _check_keys(node: MappingNode) -> None:
    """Keys are names, each once. `<<` merges other mappings, which this one's own keys go over."""
    seen = set()
    for key, _ in node.value:
        if not isinstance(key, ScalarNode) or key.tag not in (TAG + "str", TAG + "merge"):
            kind = key.tag.removeprefix(TAG)
            said = f"{key.value} " if isinstance(key, ScalarNode) else ""
            raise ConstructorError(None, None, f"{said}is a key of type {kind}, and keys are names", key.start_mark)
        if key.value in seen:
            raise ConstructorError(None, None, f"the key {key.value} stands here twice", key.start_mark)
        seen.add(key.value)
