"""The package as it is installed: everything that a command needs travels in the wheel."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from moe_dist.commands.cli import COMMANDS, parse

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.timeout(400)


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the wheel holds, and nothing of the checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    # A copy: building leaves folders beside the sources.
    copied = folder / "checkout"
    files = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True, timeout=60).stdout
    for name in filter(None, files.decode().split("\0")):
        source, target = ROOT / name, copied / name
        if source.is_file() and name.split("/")[0] in ("moe_dist", "pyproject.toml", "README.md", "LICENSE"):
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(source.read_bytes())
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(folder), str(copied)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    (wheel,) = folder.glob("moe_dist-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def moe_dist(installed: Path, cwd: Path, *arguments: str) -> str:
    environment = os.environ | {"PYTHONPATH": str(installed), "RAY_USAGE_STATS_ENABLED": "0"}
    command = [sys.executable, "-m", "moe_dist", *arguments]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, f"{arguments}: {done.stdout}{done.stderr}"
    return done.stdout


def test_it_is_the_wheel_that_is_tried(installed: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", "import moe_dist; print(moe_dist.__file__)"]
    environment = os.environ | {"PYTHONPATH": str(installed)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
    assert Path(done.stdout.strip()).is_relative_to(installed)


def commands() -> list[list[str]]:
    """Those that docs/usage.md begins with, as they stand there."""
    lines = (ROOT / "docs" / "usage.md").read_text().split("\n\n")[2].splitlines()
    return [shlex.split(line, comments=True) for line in lines]


@pytest.mark.slow
def test_every_command_of_the_docs_outside_of_a_checkout(installed: Path, tmp_path: Path) -> None:
    experiment = "configs/experiments/cpu.yaml"
    (tmp_path / experiment).parent.mkdir(parents=True)
    (tmp_path / experiment).write_text((ROOT / experiment).read_text())
    (tmp_path / "results").mkdir()
    few = {
        "run": ["--device", "cpu", "iters=2"],
        "bench": ["--device", "cpu", "--output-len", "2", "iters=2"],
        "compare": ["--device", "cpu", "iters=6", "worlds=[2]", "skews=[uniform]", "tokens=[8]", "exchanges=[ag_rs]"],
        "check": ["--device", "cpu", "--tokens", "1"],
    }
    printed = {}
    for program, command, *arguments in commands():
        assert program == "moe-dist"
        printed[command] = moe_dist(installed, tmp_path, command, *arguments, *few.get(command, []))
    # tune needs a GPU to have something to choose from, and simulate rows that were measured on some. eval and
    # train-tiny need transformers; they run in tests/stacks.
    assert set(printed) == {*COMMANDS} - {"tune", "simulate", "eval", "train-tiny"}
    assert "Verdict: " in printed["compare"]
    assert " 0 slower, 0 faster" in printed["diff"]
    assert "agree with the oracle" in printed["check"]
    assert "torch: ready" in printed["build"]
    for command, text in printed.items():  # names of files are not cut, so that they can be copied
        assert max(len(line) for line in text.splitlines() if "--" not in line) <= 80, command


def test_the_program_of_the_readme(installed: Path, tmp_path: Path) -> None:
    code, _ = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    (tmp_path / "program.py").write_text(code)
    moe_dist(installed, tmp_path, "demo-checkpoint", "demo")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "program.py"]
    environment = os.environ | {"PYTHONPATH": str(installed), "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    for rank in range(2):
        assert f"rank {rank}: EP2 ag_rs (5, 256)" in done.stdout


def lines_of(page: str) -> list[str]:
    """Every line of a page's code blocks that calls the command."""
    text = re.sub(r"\\\n *", "", (ROOT / page).read_text())  # one command may go over two lines
    found = re.findall(r"^    moe-dist (.*)$", text, re.M)
    return [line for line in found if not line.startswith("·")]


PAGES = ["README.md", *(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")), "launch/README.md"]


@pytest.mark.parametrize("page", sorted(PAGES))
def test_every_other_command_line_of_the_docs_is_one(page: str) -> None:
    for line in lines_of(page):
        if not line.startswith("compare nvl.yaml"):  # recorded as it was typed
            parse(shlex.split(line, comments=True))
