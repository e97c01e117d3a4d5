"""Every command of docs/usage.md and the README's program, as they stand there, on GPUs."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from shutil import copytree

import pytest
import torch

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]

SHORTER = {"tune": ["--rows", "64"]}  # all sizes take many minutes
ENVIRONMENT = os.environ | {"PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}", "RAY_USAGE_STATS_ENABLED": "0"}


def blocks() -> list[list[str]]:
    """The commands of docs/usage.md, block by block: a later line of one may need what an earlier one wrote."""
    text = (ROOT / "docs" / "usage.md").read_text()
    found = re.findall(r"(?:^    moe-dist .*\n)+", text, re.M)
    if find_spec("transformers") is None:
        found = [block for block in found if not block.startswith("    moe-dist train-tiny")]
    return [[shlex.join(shlex.split(line, comments=True)[1:]) for line in block.splitlines()] for block in found]


BLOCKS = blocks()


def ranks(words: list[str]) -> int:
    """Which a measuring command asks for by its flags."""
    sizes = [int(words[words.index(flag) + 1]) for flag in ("--tp", "--ep", "--world") if flag in words]
    return torch.Size(sizes).numel() if words[0] in ("run", "bench", "check", "compare") else 1


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> dict[str, subprocess.CompletedProcess[str]]:
    """Each command's end. Blocks run side by side, since no time is looked at here."""

    def run(block: list[str], folder: Path) -> dict[str, subprocess.CompletedProcess[str]]:
        copytree(ROOT / "configs", folder / "configs")
        (folder / "results").mkdir()
        command = [sys.executable, "-m", "moe_dist"]
        ended = {}
        for line in block:
            words = shlex.split(line)
            words += SHORTER.get(words[0], []) if "--rows" not in words else []
            ended[line] = subprocess.run(
                [*command, *words], cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, timeout=400
            )
        return ended

    folders = [tmp_path_factory.mktemp(f"user{number}") for number in range(len(BLOCKS))]  # not safe in threads
    with ThreadPoolExecutor(len(BLOCKS)) as pool:
        return {line: done for part in pool.map(run, BLOCKS, folders) for line, done in part.items()}


@pytest.mark.parametrize("line", [line for block in BLOCKS for line in block])
def test_a_command_of_the_docs(ended, line):
    done, words = ended[line], shlex.split(line)
    if ranks(words) > torch.cuda.device_count():
        assert done.returncode in (2, 3), f"{done.stdout}{done.stderr}"
        assert "GPU" in done.stderr
        return
    assert done.returncode == 0, f"{done.stdout}{done.stderr}"
    if "--wide" not in words:
        for text in done.stdout.splitlines():
            assert len(text) <= 80 or "--" in text or "/" in text, text  # flags and paths stay whole


def test_the_program_of_the_readme_on_gpus(tmp_path):
    """With the changes that the README names for GPUs."""
    code, _ = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    for here, on_gpus in (
        ('dist.init_process_group("gloo")', 'dist.init_process_group("nccl")'),
        ("from moe_dist", "torch.cuda.set_device(int(__import__('os').environ['LOCAL_RANK']))\nfrom moe_dist"),
        (".bfloat16()", ".bfloat16().cuda()"),
    ):
        assert code.count(here) == 1
        code = code.replace(here, on_gpus)
    (tmp_path / "program.py").write_text(code)
    make = [sys.executable, "-m", "moe_dist", "demo-checkpoint", "demo"]
    subprocess.run(make, cwd=tmp_path, env=ENVIRONMENT, check=True, timeout=60)
    world = min(2, torch.cuda.device_count())
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world)]
    done = subprocess.run([*command, "program.py"], cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True,
                          timeout=200)  # fmt: skip
    assert done.returncode == 0, done.stderr
    for rank in range(world):
        assert f"rank {rank}: " in done.stdout
        assert "(5, 256)" in done.stdout
