"""Errors reach the driver whole; registries load what is chosen and nothing else."""

import copy
import pickle
import sys
from types import SimpleNamespace

import pytest

from moe_dist import errors, registry
from moe_dist.errors import (
    CheckpointError,
    ClusterLost,
    ConfigError,
    MoeDistError,
    OutputError,
    RankFailure,
    ResourceError,
    UnsupportedError,
    listed,
)
from moe_dist.registry import Registry

EXAMPLES = [
    (
        ConfigError("model.top_k", 9, "too many", (1, 2)),
        {"field": "model.top_k", "value": 9, "rule": "too many", "legal": (1, 2)},
    ),
    (ConfigError("a", None, "b"), {"field": "a", "value": None, "rule": "b", "legal": None}),
    (UnsupportedError("x", iter(["r1", "r2"]), ["y"]), {"what": "x", "reasons": ("r1", "r2"), "supported": ["y"]}),
    (CheckpointError("/c", "truncated"), {"path": "/c", "problem": "truncated"}),
    (ResourceError("GPUs", 8, 4, "Use tp 4."), {"resource": "GPUs", "needed": 8, "available": 4, "hint": "Use tp 4."}),
    (
        ClusterLost("10.0.0.1:6379", "timing", "no answer"),
        {"address": "10.0.0.1:6379", "doing": "timing", "cause": "no answer"},
    ),
    (OutputError("out.json", "no space left"), {"path": "out.json", "problem": "no space left"}),
    (RankFailure(3, "combine", 17, "died"), {"rank": 3, "op": "combine", "seq": 17, "cause": "died"}),
]


@pytest.mark.parametrize(("error", "fields"), EXAMPLES)
@pytest.mark.parametrize("clone", [lambda e: pickle.loads(pickle.dumps(e)), copy.copy, copy.deepcopy])
def test_errors_survive_copies_with_all_fields(error, fields, clone):
    twin = clone(error)
    assert type(twin) is type(error)
    assert str(twin) == str(error)
    assert vars(twin) == vars(error) == fields


def test_every_error_class_has_an_example():
    defined = {c for c in vars(errors).values() if isinstance(c, type) and issubclass(c, MoeDistError)}
    assert {type(error) for error, _ in EXAMPLES} == defined - {MoeDistError}


def test_notes_survive_pickle():
    error = RankFailure(1, "dispatch", -1, "timeout")
    error.add_note("on node b")
    twin = pickle.loads(pickle.dumps(error))
    assert str(twin) == str(error)
    assert twin.__notes__ == ["on node b"]


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (ConfigError("f.g", "v", "the rule", (2, 1)), "f.g = 'v': the rule (legal: 2, 1)"),
        (ConfigError("f", 1, "the rule"), "f = 1: the rule"),
        (UnsupportedError("x", ["r1", "r2"], {"b", "a"}), "x is not supported: r1; r2 (supported: a, b)"),
        (CheckpointError("/c", "truncated"), "checkpoint /c: truncated"),
        (ResourceError("GPUs", 8, 4, "Use tp 4."), "not enough GPUs: 8 needed, 4 available. Use tp 4."),
        (RankFailure(3, "combine", 17, "died"), "rank 3 failed in combine (sequence number 17): died"),
    ],
)
def test_messages_say_everything(error, text):
    assert str(error) == text


def test_no_error_is_a_value_error():  # pydantic would wrap it
    assert not issubclass(MoeDistError, ValueError)


@pytest.mark.parametrize(
    ("values", "text"), [((3, 1), "3, 1"), ([], ""), ({"b", "a"}, "a, b"), ("1 to 4", "1 to 4"), (7, "7")]
)
def test_listed(values, text):
    assert listed(values) == text


# --- registry ---


@pytest.fixture
def module(tmp_path, monkeypatch):
    """A module that is not imported yet, with the class Hammer."""
    name = "moe_dist_test_hammer"
    (tmp_path / f"{name}.py").write_text("class Hammer:\n    pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield name
    sys.modules.pop(name, None)


def test_the_target_is_imported_by_get_and_not_before(module):
    tools = Registry("tool", {"hammer": f"{module}:Hammer", "broken": "no_such_module_at_all:X"})
    assert tools.names() == ("hammer", "broken")
    assert module not in sys.modules
    found = tools.get("hammer")
    assert found is sys.modules[module].Hammer
    assert tools.get("hammer") is found
    with pytest.raises(ModuleNotFoundError):
        tools.get("broken")


def test_a_class_may_be_registered_and_taken_out():
    tools = Registry("tool", {})
    tools.register("int", int)
    assert tools.get("int") is int
    tools.unregister("int")
    assert tools.names() == ()
    with pytest.raises(ConfigError):
        tools.get("int")


def test_a_taken_name_raises_and_keeps_the_first():
    tools = Registry("tool", {"saw": "a:B"})
    with pytest.raises(ConfigError, match=r"saw.*registered already: a:B"):
        tools.register("saw", int)
    tools.unregister("saw")
    tools.register("saw", int)
    assert tools.get("saw") is int


def test_an_unknown_name_lists_the_legal_ones():
    with pytest.raises(ConfigError) as caught:
        Registry("tool", {"saw": "a:B", "axe": "a:C"}).get("spoon")
    assert (caught.value.field, caught.value.value) == ("tool", "spoon")
    assert caught.value.legal == ("saw", "axe")


def test_entry_points_are_read_once_from_the_group_of_the_kind(module, monkeypatch):
    asked = []

    def points(group):
        asked.append(group)
        return [SimpleNamespace(name="theirs", value=f"{module}:Hammer")]

    monkeypatch.setattr(registry, "entry_points", points)
    tools = Registry("tool", {"saw": "a:B"})
    assert asked == []  # nothing is read before someone asks
    assert tools.names() == ("saw", "theirs")
    assert module not in sys.modules
    assert tools.get("theirs").__name__ == "Hammer"
    assert asked == ["moe_dist.tools"]


def test_an_entry_point_can_not_take_a_built_in_name(monkeypatch):
    monkeypatch.setattr(registry, "entry_points", lambda group: [SimpleNamespace(name="saw", value="evil:Saw")])
    tools = Registry("tool", {"saw": "a:B"})
    with pytest.raises(ConfigError, match="registered already"):
        tools.get("saw")


def test_a_clash_does_not_hide_later_entry_points(monkeypatch):
    points = [SimpleNamespace(name="saw", value="evil:Saw"), SimpleNamespace(name="axe", value="a:Axe")]
    monkeypatch.setattr(registry, "entry_points", lambda group: points)
    tools = Registry("tool", {"saw": "a:B"})
    with pytest.raises(ConfigError, match="registered already"):
        tools.names()
    try:
        names = tools.names()  # either the clash is said again, or the rest is there
    except ConfigError:
        return
    assert "axe" in names
