"""A made checkpoint that is there already: whole, or said not to be."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from unit.test_lines import no_more_than

from moe_dist.checkpoint import make_checkpoint
from moe_dist.checkpoint.reader import INDEX_FILE, SINGLE_FILE
from moe_dist.commands.cli import main
from moe_dist.errors import ConfigError
from moe_dist.exits.exit_codes import NOT_WRITTEN

SIZES: dict[str, Any] = {"hidden": 128, "intermediate": 128, "num_experts": 8, "top_k": 2}


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def emptied(path: Path) -> None:
    index = json.loads(path.read_text())
    path.write_text(json.dumps(index | {"weight_map": {}}))


def test_one_that_finds_no_room_is_said_to_be_no_fault_of_ours(tmp_path, capsys):
    with no_more_than(100_000):
        assert main(["demo-checkpoint", str(tmp_path / "made")]) == NOT_WRITTEN
    assert "made can't be written: File too large" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
@pytest.mark.parametrize("quant", ["fp8_block", "none"])
@pytest.mark.parametrize("shards", [1, 3])
def test_a_whole_one_is_left_and_one_with_something_missing_is_refused(tmp_path, family, quant, shards):
    options = SIZES | {"model_type": family, "quant": quant, "shards": shards}
    made = make_checkpoint(tmp_path / "made", **options)
    before = {path: path.stat().st_mtime_ns for path in made.iterdir()}
    assert make_checkpoint(made, **options) == made
    assert {path: path.stat().st_mtime_ns for path in made.iterdir()} == before
    damages = [(path.name, how) for path in made.glob("*.safetensors") for how in (Path.unlink, cut)]
    if shards > 1:
        damages += [(INDEX_FILE, Path.unlink), (INDEX_FILE, emptied)]
    for name, damage in damages:
        broken = Path(shutil.copytree(made, tmp_path / "broken"))
        damage(broken / name)
        with pytest.raises(ConfigError, match="not whole any more"):
            make_checkpoint(broken, **options)
        shutil.rmtree(broken)
    for path in made.iterdir():
        if path.name != "config.json":
            path.unlink()
    with pytest.raises(ConfigError, match=f"not whole any more .*{SINGLE_FILE}"):
        make_checkpoint(made, **options)


@pytest.mark.parametrize(("given", "field"), [
    ({"directory": "a\0b"}, "directory"), ({"directory": "a\udcff"}, "directory"), ({"directory": " "}, "directory"),
    ({"seed": 1 << 63}, "seed"), ({"seed": -(1 << 63) - 1}, "seed"),
])  # fmt: skip
def test_what_can_not_be_made(tmp_path, monkeypatch, given, field):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as caught:
        make_checkpoint(**{"directory": "made"} | SIZES | given)
    assert caught.value.field == field
    assert list(tmp_path.iterdir()) == []
