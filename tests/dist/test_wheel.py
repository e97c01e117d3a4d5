"""The package as it is installed: everything that a command needs travels in the wheel."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

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


def test_every_command_outside_of_a_checkout(installed: Path, tmp_path: Path) -> None:
    assert json.loads(moe_dist(installed, tmp_path, "doctor", "--json"))
    plan = json.loads(moe_dist(installed, tmp_path, "plan", "--model", "DeepSeek-V3", "--ep", "4", "--json"))
    assert plan["model"]["num_experts"] == 256
    moe_dist(installed, tmp_path, "demo-checkpoint", "demo")
    few, one = ("--device", "cpu", "iters=2"), ("exchanges=[ag_rs]", "skews=[uniform]", "tokens=[8]")
    measured = moe_dist(installed, tmp_path, "run", "--ep", "2", "--tokens", "8", *few, "--json")
    assert json.loads(measured)["rows"][0]["ok"] is True
    answer = moe_dist(installed, tmp_path, "compare", "--checkpoint", "demo", "worlds=[2]", *few, *one)
    assert "Verdict: " in answer
    assert "agree with the oracle" in moe_dist(installed, tmp_path, "check", "--world", "1", "--device", "cpu", "--tokens", "1")
    assert "torch: ready" in moe_dist(installed, tmp_path, "build", "torch")
