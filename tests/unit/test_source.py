"""Where weights come from: a checkpoint with its layer or neither, by flags or by keys, and never another model."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_dist.bench.case import Case
from moe_dist.bench.runner import plan_cases
from moe_dist.bench.source import with_source
from moe_dist.bench.source_spec import SourceSpec
from moe_dist.checkpoint import layer_spec, make_checkpoint
from moe_dist.commands.cli import main
from moe_dist.errors import CheckpointError, ConfigError
from moe_dist.machine.machine import Machine
from moe_dist.model.spec import MoESpec, ParallelSpec, WorkloadSpec
from moe_dist.model.weights import ExpertWeights
from moe_dist.workloads.random_weights import random_expert, random_weights

CPU = Machine("cpu", 1, "a test's CPU")
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("source") / "model"
    return make_checkpoint(directory, hidden=256, intermediate=384, num_experts=8, top_k=2, model_type="deepseek_v3")


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    """A command that must not start ranks: its code and what it wrote on both streams."""

    def refuse(*_: object, **__: object) -> None:
        pytest.fail("ranks were started")

    monkeypatch.setattr("moe_dist.runtime.ray_group.RayGroup.__init__", refuse)

    def call(*arguments: str | Path) -> tuple[int, str, str]:
        capsys.readouterr()
        return (main([str(argument) for argument in arguments]), *capsys.readouterr())

    return call


@pytest.mark.parametrize(
    ("keys", "field"),
    [
        ({"layer": 3}, "source.layer = 3"),
        ({"checkpoint": "/a"}, "source.layer = None"),
        ({"checkpoint": "", "layer": 3}, "source.checkpoint = ''"),
        ({"checkpoint": " ", "layer": 3}, "source.checkpoint = ' '"),
        ({"checkpoint": "/a", "layer": 3, "seed": 1}, "source.seed = 1"),
    ],
)
def test_half_a_source_is_refused(keys: dict[str, Any], field: str) -> None:
    with pytest.raises(ConfigError, match=field):
        SourceSpec(**keys)


def test_labels_hold_no_path_of_the_machine(tmp_path: Path) -> None:
    assert SourceSpec(seed=7).label == "random:7"
    assert SourceSpec(checkpoint="/data/models/Qwen3", layer=4).label == "checkpoint:Qwen3 layer 4"
    snapshot = tmp_path / "models--Qwen--Qwen3-30B-A3B" / "snapshots" / "0123456789abcdef"
    snapshot.mkdir(parents=True)
    (tmp_path / "here").symlink_to(snapshot)
    for path in (snapshot, tmp_path / "here"):
        label = SourceSpec(checkpoint=str(path), layer=0).label
        assert label == "checkpoint:Qwen/Qwen3-30B-A3B@01234567 layer 0"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--layer", "5"], ["--layer = 5", "source.checkpoint"]),
        (["--model", "tiny", "--layer", "5"], ["--layer = 5"]),
        (["--checkpoint", ""], ["--checkpoint = ''"]),
        (["source.layer=3"], ["source.layer = 3"]),
        (["source.checkpoint=/does/not/exist"], ["source.layer = None"]),
        (["source.checkpoint=/does/not/exist", "source.layer=0"], ["/does/not/exist/config.json", "no such file"]),
        (["source=5"], ["source = 5"]),
        (["source.checkpoint=HERE", "source.layer=1", "--model", "DeepSeek-V3"], ["model.hidden = 7168", "256"]),
        (["source.checkpoint=HERE", "source.layer=1", "model.top_k=3"], ["model.top_k = 3", "is 2 in layer 1"]),
        (["--checkpoint", "HERE", "--layer", "1", "model.quant=none"], ["model.quant = 'none'", "'fp8_block'"]),
        (["--checkpoint", "HERE", "--layer", "1", "source.layer=0"], ["source.layer = 0", "--layer 1"]),
        (["--checkpoint", "HERE", "--layer", "1", "source.checkpoint=/other"], ["'/other'", "--checkpoint"]),
        (["--checkpoint", "HERE", "--layer", "0", "source.layer=false"], ["source.layer = False", "--layer 0"]),
        (["--checkpoint", "HERE", "--layer", "9"], [": --layer = 9"]),
        (["--checkpoint", "HERE"], [": --layer = 0", "dense"]),
        (["source.checkpoint=HERE", "source.layer=0"], [": source.layer = 0", "dense"]),
    ],
    ids=" ".join,
)  # fmt: skip
@pytest.mark.parametrize("name", ["run", "compare", "check", "plan"])
def test_what_is_no_source_is_refused_before_ranks_start(
    command: Any, made: Path, name: str, arguments: list[str], said: list[str]
) -> None:
    code, out, err = command(name, *(argument.replace("HERE", str(made)) for argument in arguments))
    assert (code, out) == (2, "")
    assert len(err.splitlines()) == 1
    assert all(text in err for text in said)


def test_keys_do_what_flags_do(command: Any, made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(made.parent)
    spellings = (
        ("--checkpoint", made, "--layer", "1"),
        (f"source.checkpoint={made}", "source.layer=1"),
        ("source.checkpoint=model", "source.layer=1"),
        ("source.checkpoint=model", "--layer", "1"),
        ("--checkpoint", "model", f"source.checkpoint={made}", "source.layer=1"),
        ("--checkpoint", "model/../model/", "source.checkpoint=./model", "source.layer=1"),
    )
    plans = [json.loads(command("plan", *spelling, "--json")[1]) for spelling in spellings]
    assert all(found == plans[0] for found in plans)
    assert plans[0]["model"]["num_experts"] == 8


def test_a_plan_says_if_it_has_only_the_config(command: Any, made: Path, tmp_path: Path) -> None:
    assert command("plan", "--checkpoint", made, "--layer", "1")[2] == ""
    (tmp_path / "config.json").write_text((made / "config.json").read_text())
    code, out, err = command("plan", "--checkpoint", tmp_path, "--layer", "1", "--json")
    assert (code, json.loads(out)["model"]["quant"]) == (0, "fp8_block")
    assert "holds no weights" in err
    assert command("run", "--checkpoint", tmp_path, "--layer", "1")[0] == 2


def test_the_default_comparison_takes_the_router_of_a_checkpoint_given_by_keys(made: Path) -> None:
    keys = with_source({"source": {"checkpoint": str(made), "layer": 1}}, None, None)
    assert [model["hidden"] for model in keys["models"]] == [256]
    assert with_source({"tokens": [3]}, None, None) == {"tokens": [3], "source": {}}


def of(made: Path, model: MoESpec) -> Case:
    source = SourceSpec(checkpoint=str(made), layer=1)
    return Case(model=model, source=source, parallel=ParallelSpec(), exchange="local", backend="torch",
                workload=WorkloadSpec(tokens=4))  # fmt: skip


def test_a_case_of_another_model_than_its_checkpoint_is_refused(made: Path) -> None:
    stored = layer_spec(made, 1)
    plan_cases([of(made, stored.with_changes(name="other", shared_experts="tp"))], CPU)
    for changes in ({"intermediate": 256}, {"activation": "geglu"}, {"routed_scaling": 1.0}, {"quant": "fp8_channel"}):
        with pytest.raises(ConfigError, match=rf"model\.{next(iter(changes))} = .*whose files decide it"):
            plan_cases([of(made, stored), of(made, stored.with_changes(**changes))], CPU)
    with pytest.raises(CheckpointError, match="no such file"):
        plan_cases([of(made / "nothing", stored)], CPU)


def test_make_compare_does_not_take_the_demo_for_a_name_that_is_empty() -> None:
    def recipe(*given: str) -> str:
        call = ["make", "-n", "compare", *given]
        clean = {name: value for name, value in os.environ.items() if name not in ("CHECKPOINT", "MAKEFLAGS")}
        return subprocess.run(call, cwd=ROOT, env=clean, capture_output=True, text=True, check=True).stdout

    assert '--checkpoint "" --layer 3' in recipe("CHECKPOINT=", "LAYER=3")
    assert "demo-checkpoint" not in recipe("CHECKPOINT=")
    assert "demo-checkpoint" in recipe()


# Weights made in this process


def broken(weights: ExpertWeights, name: str, change: Any) -> ExpertWeights:
    tensor = getattr(weights, name).clone()
    change(tensor.view(torch.uint8) if tensor.dtype.itemsize == 1 else tensor)
    return weights.with_tensors(**{name: tensor})


@pytest.mark.parametrize("quant", ["none", "fp8_block", "fp8_channel", "fp8_tensor_static"])
@pytest.mark.parametrize("name", ["w13_eFH", "w2_eHi"])
def test_an_expert_of_zeros_is_named(quant: Any, name: str) -> None:
    weights = random_weights(MoESpec(hidden=128, intermediate=128, num_experts=4, top_k=2, quant=quant), 0)
    weights.check_finite()
    for last in (slice(None), slice(128, None)) if name == "w13_eFH" else (slice(None),):
        zeros = broken(weights, name, lambda tensor, last=last: tensor[2, last].zero_())
        with pytest.raises(ConfigError, match=rf"weights\.{name} = 'all zeros': expert 2 was not loaded"):
            zeros.check_finite()
        with pytest.raises(ConfigError, match="expert 12 was not loaded"):
            zeros.check_finite([10, 11, 12, 13])
    negative = broken(weights, name, lambda tensor: tensor[1].fill_(0x80 if quant != "none" else -0.0))
    with pytest.raises(ConfigError, match="expert 1 was not loaded"):
        negative.check_finite()


@pytest.mark.parametrize(("quant", "name"), [("none", "w2_eHi"), ("fp8_block", "s13"), ("fp8_channel", "s2")])
def test_what_overflows_is_named(quant: Any, name: str) -> None:
    weights = random_weights(MoESpec(hidden=128, intermediate=128, num_experts=4, top_k=2, quant=quant), 0)
    huge = weights.with_tensors(**{name: torch.full_like(getattr(weights, name), 3e38)})
    with pytest.raises(ConfigError, match=rf"weights\.{name}.*results overflow"):
        huge.check_finite()


@pytest.mark.parametrize("code", [0x7F, 0xFF])
def test_nan_codes_are_found(code: int) -> None:
    weights = random_weights(MoESpec(hidden=128, intermediate=128, num_experts=4, top_k=2), 0)
    found = broken(weights, "w2_eHi", lambda tensor: tensor[3, 5].fill_(code))
    with pytest.raises(ConfigError, match=r"weights\.w2_eHi = 'NaN or infinite'.*expert 3"):
        found.check_finite()
    broken(weights, "w2_eHi", lambda tensor: tensor[3, 5].fill_(code - 1)).check_finite()  # ±448


def test_half_precision_and_empty_shards_are_checked_alike() -> None:
    spec = MoESpec(hidden=32, intermediate=32, num_experts=2, top_k=1, quant="none")
    half = random_expert(spec, 0, 0)
    half = half.with_tensors(w13_eFH=half.w13_eFH.half(), w2_eHi=half.w2_eHi.half())
    half.check_finite()
    with pytest.raises(ConfigError, match="NaN or infinite"):
        broken(half, "w13_eFH", lambda tensor: tensor[0, 0].fill_(float("inf"))).check_finite()
    half.with_tensors(w13_eFH=half.w13_eFH[:0], w2_eHi=half.w2_eHi[:0]).check_finite()
    half.with_tensors(w13_eFH=half.w13_eFH[:, :0], w2_eHi=half.w2_eHi[:, :, :0]).check_finite()


def test_results_are_not_written_over_what_is_read(command, made: Path, tmp_path: Path) -> None:
    trace, experiment = tmp_path / "trace.pt", tmp_path / "experiment.yaml"
    torch.save({"ids": torch.zeros(1, 4, dtype=torch.int32) + torch.arange(4), "weights": torch.ones(1, 4)}, trace)
    experiment.write_text("worlds: [1]\nexchanges: [local]\ntokens: [8]\n")
    model = tmp_path / "model.yaml"
    model.write_text("{hidden: 128, intermediate: 128, num_experts: 8, top_k: 2}")
    shard = next(made.glob("*.safetensors"))
    before = {path: path.read_bytes() for path in (trace, experiment, model, shard, made / "config.json")}
    for arguments, out in (
        (["run", "--checkpoint", made, "--layer", 1], shard),
        (["run", "--checkpoint", made, "--layer", 1], made / "config.json"),
        (["check", f"source.checkpoint={made}", "source.layer=1"], made / "new.json"),
        (["run", "--skew", f"file:{trace}"], trace),
        (["compare", experiment], experiment),
        (["run", "--model", model], model),
    ):
        code, _, error = command(*arguments, "--device", "cpu", "--out", out)
        assert (code, "out = " in error) == (2, True), (arguments, error)
    assert {path: path.read_bytes() for path in before} == before
    assert not (made / "new.json").exists()
