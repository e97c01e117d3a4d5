"""What an error advises must be there: keys that the command takes, and its flags."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import moe_dist
from moe_dist.bench.case import Experiment
from moe_dist.bench.source_spec import SourceSpec
from moe_dist.commands import cli
from moe_dist.exits.exit_codes import BAD_INPUT, OK
from moe_dist.model.spec import MoESpec
from moe_dist.runtime.context import RaySpec

ROOT = Path(moe_dist.__file__).parent
ERRORS = {"ConfigError", "UnsupportedError", "ResourceError", "CheckpointError", "InstallationError", "RankFailure",
          "ClusterLost", "OutputError", "Support"}  # fmt: skip
SECTIONS = {"model": MoESpec, "ray": RaySpec, "source": SourceSpec}
# Of the stacks that a plug-in is loaded by, which its errors name.
OF_OTHERS = {
    "--moe-runner-backend", "--speculative-moe-runner-backend", "--moe-a2a-backend", "--enable-pdmux",
    "--all2all-backend", "--max-restarts",
}  # fmt: skip
NOT_KEYS = ("experiment", "parallel", "workload", "case")  # sections of the code, not of the command


def advice() -> Iterator[tuple[str, str]]:
    """(place, text) of what errors say beside the field that they name."""
    for path in sorted(ROOT.rglob("*.py")):
        tree = ast.parse(path.read_text())
        rules = {}  # `rule = "…"` and the like, which an error is made of further down
        for node in ast.walk(tree):
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                rules.setdefault(node.targets[0].id, []).append(node.value)
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and getattr(node.func, "id", None) in ERRORS:
                first = 1 if node.func.id == "ConfigError" else 0
                for argument in [*node.args[first:], *(keyword.value for keyword in node.keywords)]:
                    parts = rules.get(argument.id, []) if isinstance(argument, ast.Name) else [argument]
                    for part in parts:
                        for inner in ast.walk(part):
                            if isinstance(inner, ast.Constant) and isinstance(inner.value, str):
                                yield f"{path.name}:{node.lineno}", inner.value


def known(key: str) -> bool:
    first, _, rest = key.partition(".")
    if rest:
        return first in SECTIONS and (rest in SECTIONS[first].model_fields or rest == "key")
    return first in Experiment.model_fields or first in ("model", "key")


def wrong_in(text: str) -> list[str]:
    dotted = re.findall(rf"\b((?:{'|'.join([*SECTIONS, *NOT_KEYS])})\.[a-z_]+)\b(?!\()", text)
    assigned = re.findall(r"(?<![\w-])([a-z][a-z_.]+)=(?!=)", text)
    return [key for key in [*dotted, *assigned] if not known(key)]


def test_every_key_in_a_hint_is_one_that_the_command_takes():
    found = [f"{place}: {key}" for place, text in advice() for key in wrong_in(text)]
    assert found == []
    texts = [text for _, text in advice()]
    assert sum("allow_empty_shards=true" in text for text in texts) >= 2  # the search finds what it is for
    assert wrong_in("set parallel.allow_empty_shards") == ["parallel.allow_empty_shards"]
    assert wrong_in("(hidden=3)") == ["hidden"]


def test_every_flag_in_a_hint_is_there():
    app = cli.application()
    arguments = [argument for name in cli.COMMANDS for argument in app[name].assemble_argument_collection()]
    arguments = [argument for argument in arguments if argument.parse]
    flags = {"--help", "--version", *(name for argument in arguments for name in argument.names)}
    texts = [(place, flag) for place, text in advice() for flag in re.findall(r"(?<!\w)--[a-z][a-z0-9-]+", text)]
    assert [f"{place}: {flag}" for place, flag in texts if flag not in flags | OF_OTHERS] == []
    assert any(flag == "--runtime" for _, flag in texts)


@pytest.mark.parametrize(("size", "most"), [("tp", 6), ("ep", 11)])
def test_the_hint_about_empty_shards_works(size, most, capsys):
    arguments = ["plan", f"--{size}", str(most)]
    assert cli.main(arguments) == BAD_INPUT
    hint = re.search(r"(allow_empty_shards=true)", capsys.readouterr().err)
    assert hint
    assert cli.main([*arguments, hint[1]]) == OK
