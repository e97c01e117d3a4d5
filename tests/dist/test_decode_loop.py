"""examples/decode_loop.py, on two CPU ranks: as a program, and request by request."""

from __future__ import annotations

import importlib.util
import runpy
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import ray
from checkpoints import edit

from moe_dist.checkpoint import make_checkpoint

ROOT = Path(__file__).parents[2]
PROGRAM = ROOT / "examples" / "decode_loop.py"
pytestmark = pytest.mark.usefixtures("local_ray")


@pytest.fixture(scope="module")
def loop() -> ModuleType:
    spec = importlib.util.spec_from_file_location("decode_loop", PROGRAM)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["decode_loop"] = module  # dataclasses look there
    spec.loader.exec_module(module)
    ray.cloudpickle.register_pickle_by_value(module)  # actors can't import it
    return module


def test_it_is_the_text_of_the_docs_and_short() -> None:
    text = PROGRAM.read_text()
    assert len(text.splitlines()) < 80
    assert f"```python\n{text}```\n" in (ROOT / "docs" / "integration.md").read_text()


def test_it_runs_as_a_program(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On FP8 layers. Requests of different lengths arrive and leave: 40 of them in fewer steps than one rank's largest
    bucket would let run one after another."""
    folder = make_checkpoint(tmp_path / "demo", hidden=256, intermediate=256, num_experts=8, top_k=2)
    monkeypatch.setattr(sys, "argv", [str(PROGRAM), str(folder), "2"])
    runpy.run_path(str(PROGRAM), run_name="__main__")
    steps, *lines = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in lines] == [str(number) for number in range(40)]
    lengths = [len(line.split(",")) for line in lines]
    assert lengths == [4 + 5 * number % 17 for number in range(40)]
    assert steps == "27 steps"  # the last of them arrives before step 9, and nobody waits for the others to end


def in_float32(folder: Path) -> Path:
    """Without rounding to bf16 no token goes to another expert, or becomes another one, for a last bit."""
    make_checkpoint(folder, hidden=128, intermediate=128, num_experts=8, top_k=2, layers=3, quant="none", shards=1)
    return edit(folder, {"torch_dtype": "float32"}, lambda found: {name: each.float() for name, each in found.items()})


def test_a_request_does_not_depend_on_the_others(loop: ModuleType, tmp_path: Path) -> None:
    """Alone, among few and among more than fit at once, on the one rank or on the other, with a place in the batch that
    changes as others leave."""
    actors = loop.start(in_float32(tmp_path / "float32"), 2)

    def request(number: int, arrives: int = 0) -> Any:
        return loop.Request(number, [number, 7, 9][: 1 + number % 3], 3 + 4 * number % 11, arrives)

    together = [request(number, arrives=number // 24) for number in range(48)]  # two ranks take 32 at once
    assert loop.decode(actors, together) > max(each.length for each in together)  # some had to wait
    assert all(len(each.tokens) == each.length for each in together)
    few = [request(number) for number in (40, 5, 6, 23)]
    loop.decode(actors, few)
    for each in few:
        assert each.tokens == together[each.number].tokens
        alone = request(each.number)
        loop.decode(actors, [alone])
        assert alone.tokens == each.tokens
    sampled = {tuple(each.tokens[1 + each.number % 3 :][:3]) for each in together}
    assert len(sampled) > 30  # they are not all alike

    def without_layers(rank: Any) -> None:
        rank.stack = lambda x_TH, max_tokens_per_rank: x_TH

    ray.get([actor.__ray_call__.remote(without_layers) for actor in actors], timeout=60)
    other = request(5)
    loop.decode(actors, [other])
    assert other.tokens != together[5].tokens  # so all of this says something about the layers

    ray.kill(actors[1])
    begun = time.monotonic()
    with pytest.raises(ray.exceptions.RayError):  # the dead rank's, or what the other one raised for want of it
        loop.decode(actors, [request(5)])
    assert time.monotonic() - begun < 30  # of 120 that a wait may take
