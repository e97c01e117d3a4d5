"""examples/generate.py on a tiny model: our experts and transformers' own give the same tokens, on one rank and two."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from dist.pool import Pool
from tiny_models import prompts, tiny

from moe_dist import Comm
from moe_dist.errors import ConfigError, MoeDistError

pytestmark = [pytest.mark.stacks, pytest.mark.timeout(300)]

ROOT = Path(__file__).parents[2]
EXAMPLES, PROGRAM = ROOT / "examples", ROOT / "examples" / "generate.py"
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]


def run(world: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    start = [*TORCHRUN, str(world)] if world > 1 else []
    environment = os.environ | {
        "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}", "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }  # fmt: skip
    command = [sys.executable, *start, str(PROGRAM), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment)


def document(world: int, *arguments: str) -> dict[str, Any]:
    done = run(world, "--json", *arguments)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)  # one document and nothing else, from rank 0
    return found


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import generate

    return generate


def parsed(example: ModuleType, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> Any:
    monkeypatch.setattr(sys, "argv", ["generate.py", *arguments])
    return example.arguments()


EVERY = [("eager", "eager"), ("batched_mm", "grouped_mm"), ("grouped_mm", "grouped_mm"), ("moe_dist", "moe_dist")]


@pytest.mark.parametrize(("world", "arguments"), [(1, []), (2, ["--tp", "2"])], ids=["one rank", "TP2"])
def test_the_same_tokens(world: int, arguments: list[str], tmp_path: Path) -> None:
    out = tmp_path / "generated.json"
    found = document(world, *arguments, "--backend", "torch", "--batch-size", "1", "4", "--out", str(out))
    rows = found["generated"]
    assert [(row["experts"], row["prefill_experts"], row["batch"]) for row in rows] == [
        (*each, batch) for each in EVERY for batch in (1, 4)
    ]
    assert {row["same_tokens"] for row in rows} == {1.0}
    for row in rows:
        decoded, every = row["batch"] * (row["output_len"] - 1), row["batch"] * row["output_len"]
        assert row["decode_tokens_per_s"] == pytest.approx(decoded / row["decode_ms"] * 1e3, rel=0.01)
        assert row["tokens_per_s"] == pytest.approx(every / (row["ttft_ms"] + row["decode_ms"]) * 1e3, rel=0.01)
    assert found["command"].startswith("examples/generate.py --json")
    assert str(tmp_path) not in found["command"]
    assert (found["ranks"], found["weights"], found["arguments"]["quant"]) == (world, "random", "none")
    assert found["machine"]["cpu"]
    written = json.loads(out.read_text())
    assert {**written, "date": ""} == {**found, "date": ""}


def rows(comm: Comm, folder: str, *arguments: str) -> list[tuple[str, float]]:
    """Each variant, and what part of its tokens is the first one's."""
    sys.path.insert(0, folder)
    import generate
    import generate_models

    sys.argv = ["generate.py", *arguments]
    args = generate.arguments()
    generate.check(args)
    ranks = generate_models.Ranks(comm.rank, comm.world, comm.device, args.tp, comm.world // args.tp)
    with torch.no_grad():
        found = list(generate.measured(args, generate_models.config_of(args), ranks))
    return [(row.experts, row.same_tokens) for row in found]


@pytest.fixture(scope="module")
def two() -> Iterator[Pool]:
    with Pool(size=2, timeout_s=120) as workers:
        yield workers


@pytest.mark.parametrize(
    "arguments", [["--ep", "2", "--exchange", "ag_rs"], ["--exchange", "all_to_all"]], ids=["ag_rs", "all_to_all"]
)
def test_the_same_tokens_under_ep(two: Pool, arguments: list[str]) -> None:
    wanted = [(experts, 1.0) for experts, _ in EVERY]
    assert two.run(2, rows, str(EXAMPLES), *arguments) == [wanted] * 2


@pytest.mark.parametrize("model_type", ["qwen3_moe", "mixtral"])
def test_a_checkpoint(two: Pool, model_type: str, tmp_path: Path) -> None:
    tiny(model_type).save_pretrained(tmp_path / "model")
    given = ["--tp", "2", "--checkpoint", str(tmp_path / "model"), "--native", "eager", "--layers", "1"]
    assert two.run(2, rows, str(EXAMPLES), *given) == [[("eager", 1.0), ("moe_dist", 1.0)]] * 2


def test_a_table(tmp_path: Path) -> None:
    done = run(1, "--native", "", "--quant", "fp8_block", "--dtype", "bfloat16", "--batch-size", "2")
    assert done.returncode == 0, done.stderr
    head, row = done.stdout.splitlines()
    assert head.split()[:3] == ["experts", "decode", "batch"]
    assert re.fullmatch(r" *moe_dist +eager +2( +[0-9.]+){3} +1\.0", row)


def made(comm: Comm, folder: str) -> tuple[int, tuple[int, ...], int, int]:
    """Experts that transformers' model has on this rank, the shape of its attention's weight, our layers, and the
    communicators that they share."""
    sys.path.insert(0, folder)
    import generate
    import generate_models

    sys.argv = ["generate.py", "--tp", str(comm.world)]
    args = generate.arguments()
    ranks = generate_models.Ranks(comm.rank, comm.world, comm.device, comm.world, 1)
    config = generate_models.config_of(args)
    native = generate_models.theirs(args, config, ranks).model.layers[0]
    layers = [each.mlp.experts.layer for each in generate_models.ours(args, config, ranks, ()).model.layers]
    local = native.mlp.experts.down_proj.to_local()
    return len(local), tuple(native.self_attn.q_proj.weight.shape), len(layers), len({id(each.comm) for each in layers})


def test_on_two_ranks_experts_are_spread_and_nothing_else(two: Pool) -> None:
    assert two.run(2, made, str(EXAMPLES)) == [(4, (128, 128), 3, 1)] * 2


@pytest.mark.parametrize("decode", ["eager", "graph"])
def test_its_loop_is_that_of_transformers(example: ModuleType, monkeypatch: pytest.MonkeyPatch, decode: str) -> None:
    """With something else in the place of a CUDA graph: its warm-up leaves nothing in the cache."""

    def captured(call: Callable[[], object], warm_up: Callable[[], object]) -> tuple[SimpleNamespace, None]:
        for _ in range(3):
            warm_up()
        return SimpleNamespace(replay=call), None

    monkeypatch.setattr(example, "capture", captured)
    model, ids_BL = tiny("qwen3_moe"), prompts(3, 6)
    variant = example.Variant("eager", decode)
    with torch.no_grad():
        prefill_ms, decode_ms, tokens_BN = example.generate(model, variant, ids_BL, 5, repeats=2)
        wanted = model.generate(ids_BL, max_new_tokens=5, do_sample=False)
    assert torch.equal(tokens_BN, wanted[:, 6:])
    assert len(prefill_ms) == len(decode_ms) == 2


def test_every_variant_that_can_be(example: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of transformers' own experts eager ones wait for the host, so they are neither compiled nor captured."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    found = [tuple(each) for each in example.variants(parsed(example, monkeypatch))]
    assert found == [
        ("eager", "eager"), ("batched_mm", "eager"), ("batched_mm", "graph"), ("batched_mm", "compiled"),
        ("grouped_mm", "eager"), ("grouped_mm", "graph"), ("grouped_mm", "compiled"),
        ("moe_dist", "layers"), ("moe_dist", "graph"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--native", "eager,nope"], r"--native = '?nope'?: is no name that is known \(legal: eager, batched_mm"),
        (["--theirs", "graph"], r"--theirs = '?graph'?: needs CUDA graphs, and there is no GPU \(legal: eager, comp"),
        (["--ours", "layers"], r"--ours = '?layers'?: needs CUDA graphs"),
        (["--theirs", "compiled"], r"--theirs = '?compiled'?: experts eager of transformers wait for the host"),
        (["--backend", "tritn"], r"backend = '?tritn'?: no backend has this name; did you mean triton"),
        (["--layers", "4"], r"--layers = 4: is more than the model has \(legal: 1 to 3\)"),
        (["--input-len", "50000"], r"--input-len \+ --output-len = 50008: "),
        (["--checkpoint", "/nowhere"], r"--checkpoint = '?/nowhere'?: has no model that transformers reads"),
        (["--native", "", "--ours", ""], "nothing is left to run"),
        (["--output-len", "1"], r"--output-len = 1: is too small \(legal: 2 and more\)"),
        (["--layers", "0"], "--layers = 0: "),
        (["--batch-size", "2", "0"], "--batch-size = "),
        (["--tp", "2"], "--tp · --ep = 2: tp · ep must be the number of ranks, and 1 were started"),
    ],
)
def test_what_is_refused(example: ModuleType, monkeypatch: pytest.MonkeyPatch, arguments: list[str], said: str) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    args = parsed(example, monkeypatch, *arguments)

    def start() -> None:
        example.check(args)
        example.variants(args)
        example.begin(args)
        example.config_of(args)

    with pytest.raises(ConfigError, match=said):
        start()
    assert issubclass(ConfigError, MoeDistError)  # which the program ends with, as a line


def test_a_cache_goes_by_the_name_that_a_model_takes(example: ModuleType) -> None:
    class Older(torch.nn.Module):
        def forward(self, input_ids: torch.Tensor, past_key_values: Any = None, **kwargs: Any) -> None: ...

    class Neither(torch.nn.Module):
        def forward(self, input_ids: torch.Tensor, **kwargs: Any) -> None: ...

    assert example.cache_name(tiny("qwen3_moe")) in ("cache", "past_key_values")
    assert example.cache_name(Older()) == "past_key_values"
    with pytest.raises(ConfigError, match="Neither takes no cache by a known name"):
        example.cache_name(Neither())


def test_experts_that_are_not_spread_are_refused(example: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """As with transformers before 5.23, on two ranks."""
    for name, value in {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(example, "SPREADS", False)
    with pytest.raises(ConfigError, match=r"--native = .*does not spread experts over ranks"):
        example.begin(parsed(example, monkeypatch, "--tp", "2"))
