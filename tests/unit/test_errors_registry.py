"""Errors reach the driver whole; registries load what is chosen and nothing else."""

import copy
import pickle
import sys
from types import SimpleNamespace

import pytest

from moe_dist import errors, registry
from moe_dist.backends import BACKENDS
from moe_dist.backends.torch_reference import TorchBackend
from moe_dist.commands import cli
from moe_dist.commands.config import find_model
from moe_dist.commands.examined import examine
from moe_dist.engine.planning import make_plan
from moe_dist.errors import (
    CheckpointError,
    ClusterLost,
    ConfigError,
    InstallationError,
    MoeDistError,
    NoRowsError,
    OutputError,
    RankFailure,
    ResourceError,
    UnsupportedError,
    listed,
)
from moe_dist.exchange import Exchange
from moe_dist.exits.exit_codes import BAD_INPUT
from moe_dist.model.spec import ParallelSpec
from moe_dist.registry import Registry

EXAMPLES = [
    (
        ConfigError("model.top_k", 9, "too many", (1, 2)),
        {"field": "model.top_k", "value": 9, "rule": "too many", "legal": (1, 2)},
    ),
    (ConfigError("a", None, "b"), {"field": "a", "value": None, "rule": "b", "legal": None}),
    (NoRowsError("file", "a", "b"), {"field": "file", "value": "a", "rule": "b", "legal": None}),
    (UnsupportedError("x", iter(["r1", "r2"]), ["y"]), {"what": "x", "reasons": ("r1", "r2"), "supported": ["y"]}),
    (CheckpointError("/c", "truncated"), {"path": "/c", "problem": "truncated"}),
    (ResourceError("GPUs", 8, 4, "Use tp 4."), {"resource": "GPUs", "needed": 8, "available": 4, "hint": "Use tp 4."}),
    (
        ClusterLost("10.0.0.1:6379", "timing", "no answer"),
        {"address": "10.0.0.1:6379", "doing": "timing", "cause": "no answer"},
    ),
    (InstallationError("libcudart.so is missing"), {"problem": "libcudart.so is missing"}),
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


def theirs(monkeypatch, *points):
    found = [SimpleNamespace(name=name, value=value) for name, value in points]
    monkeypatch.setattr(registry, "entry_points", lambda group: found)


def test_a_name_that_is_taken_is_left_out_and_said_once(monkeypatch, capsys):
    theirs(monkeypatch, ("saw", "evil:Saw"), ("axe", "a:Axe"), ("axe", "a:Axe"), ("axe", "b:Axe"))
    tools = Registry("tool", {"saw": "builtins:int"})
    assert tools.names() == tools.names() == ("saw", "axe")
    assert tools.get("saw") is int
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "moe-dist: tool saw of the entry point evil:Saw is left out: its name is taken by builtins:int",
        "moe-dist: tool axe of the entry point b:Axe is left out: its name is taken by a:Axe",
    ]


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("no_such_module_at_all:X", "No module named"),
        ("moe_dist.errors:Nothing", "no attribute"),
        ("moe_dist.errors", "attribute"),
        ("builtins:len", "no subclass of Exchange"),
        ("builtins:int", "no subclass of Exchange"),
        ("moe_dist.exchange.base:Exchange", "lacks token_layout, capturable"),
    ],
)
def test_what_can_not_be_used_breaks_nothing_else(monkeypatch, capsys, value, said):
    theirs(monkeypatch, ("theirs", value))
    exchanges = Registry("exchange", {"local": "moe_dist.exchange.replicated:Local"}, Exchange)
    assert [name for name, _ in exchanges.usable()] == ["local"]
    assert [name for name, _ in exchanges.usable()] == ["local"]
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line
    with pytest.raises(ConfigError, match="can't be used") as caught:
        exchanges.get("theirs")
    assert said in str(caught.value)


def test_metadata_that_can_not_be_read(monkeypatch, capsys):
    def fail(group):
        raise ValueError("bad\nmetadata")

    monkeypatch.setattr(registry, "entry_points", fail)
    assert Registry("tool", {"saw": "a:B"}).names() == ("saw",)
    assert "can't be read: ValueError: bad metadata" in capsys.readouterr().err


class Careless(TorchBackend):
    @classmethod
    def available(cls, device):
        raise RuntimeError("theirs fails when asked")


def test_a_third_party_s_own_failure_is_its_answer(monkeypatch, capsys):
    """plan, doctor and every measuring command ask all backends, whoever was named."""
    monkeypatch.setitem(BACKENDS._targets, "careless", Careless)
    with pytest.raises(RuntimeError, match="theirs fails"):  # one of ours: a fault to be seen
        make_plan(find_model("tiny"), ParallelSpec(), exchange="local", backend="torch")
    monkeypatch.setitem(BACKENDS._foreign, "careless", "the entry point theirs:Careless")
    monkeypatch.setenv("COLUMNS", "200")  # where a reason stands in one line
    capsys.readouterr()
    assert cli.main(["plan"]) == 0
    assert "theirs fails when asked" in capsys.readouterr().out
    assert examine()["backends"]["careless"] == {"ok": False, "reason": "RuntimeError: theirs fails when asked"}
    assert cli.main(["plan", "--backend", "careless"]) == BAD_INPUT


def test_a_field_s_name_is_one_line_too():
    error = errors.ConfigError("ray.\n\x1b[2J", None, "unknown key")
    assert str(error) == "ray.\\n\\x1b[2J = None: unknown key"
    assert str(errors.CheckpointError("a\nb", "is gone")) == "checkpoint a\\nb: is gone"


@pytest.mark.parametrize(
    ("nodes", "said", "node"),
    [
        (["a", "b"], "rank 1 on b failed in barrier (sequence number 3): lost", "b"),
        (["a", "a"], "rank 1 failed in barrier (sequence number 3): lost", "a"),
        (["a"], "rank 1 failed in barrier (sequence number 3): lost", ""),  # which has no rank 1
    ],
)
def test_a_failure_names_its_node_where_there_are_several(nodes: list[str], said: str, node: str) -> None:
    failure = RankFailure(1, "barrier", 3, "lost")
    failure.locate(nodes)
    again = pickle.loads(pickle.dumps(failure))
    assert (str(again), again.node) == (said, node)
    again.locate(["x", "y"])
    assert again.node == (node or "y")  # what is known stays
