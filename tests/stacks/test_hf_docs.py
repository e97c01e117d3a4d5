"""The programs of docs/integration.md run as they stand there, on a small model."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from dist.pool import Pool
from tiny_models import outputs, prompts, tiny

from moe_dist import Comm

pytestmark = pytest.mark.stacks

PAGE = Path(__file__).parents[2] / "docs" / "integration.md"
MODEL = '"Qwen/Qwen3-30B-A3B"'
PROGRAMS = [each for each in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL) if MODEL in each]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made: Path = tmp_path_factory.mktemp("model")
    tiny("qwen3_moe", torch.bfloat16, hidden_size=128, moe_intermediate_size=256).save_pretrained(made)
    return made


def run(comm: Comm, program: str, folder: Path) -> torch.Size:
    """The shape of what the program's model gives."""
    os.environ |= {"RANK": str(comm.rank), "LOCAL_RANK": str(comm.rank), "WORLD_SIZE": str(comm.world)}
    program = program.replace(MODEL, repr(str(folder))).replace("dist.init_process_group()", "")
    names: dict[str, Any] = {}
    exec(program, names)
    return outputs(names["model"], prompts(1, 4)).shape


def test_there_are_three_ways_in() -> None:
    assert len(PROGRAMS) == 3


def test_on_one_gpu(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.setenv(name, "0")  # put back afterwards
    assert run(Comm.single(), PROGRAMS[0], folder) == (1, 4, 96)


@pytest.mark.parametrize("number", [1, 2])
def test_on_two_ranks(number: int, folder: Path) -> None:
    with Pool(size=2, timeout_s=120) as workers:
        assert workers.run(2, run, PROGRAMS[number], folder) == [(1, 4, 96)] * 2
