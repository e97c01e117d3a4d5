"""The front door: a checkpoint's layer in one call gives on any grid what it gives on one rank."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from dist.pool import Pool

import moe_dist
from moe_dist import Comm, MoEStack, load_layer
from moe_dist.checkpoint import make_checkpoint
from moe_dist.engine import planning
from moe_dist.engine.choosing import choose
from moe_dist.engine.records import Pick
from moe_dist.errors import CheckpointError, ConfigError, RankFailure, UnsupportedError
from moe_dist.oracle.reference import relative_error

CLOSE = 1e-2  # partial sums cross in bf16
LAYER = 1


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    sizes = {"hidden": 256, "intermediate": 512, "num_experts": 8, "top_k": 2}
    folder = tmp_path_factory.mktemp("checkpoints")
    return {kind: make_checkpoint(folder / kind, model_type=kind, **sizes) for kind in ("qwen3_moe", "deepseek_v3")}


def tokens(count: int, start: int = 0) -> torch.Tensor:
    return torch.randn(20, 256, generator=torch.Generator().manual_seed(3)).bfloat16()[start : start + count]


def output(comm: Comm, checkpoint: Path, options: dict[str, Any]) -> torch.Tensor:
    """All tokens' results, or this rank's share of them where they are sharded: 3 on rank 0, 4 on rank 1 and so on."""
    layer = load_layer(checkpoint, LAYER, comm=comm, **options)
    if layer.plan.token_layout == "replicated":
        return layer(tokens(20))
    return layer(tokens(3 + comm.rank, 3 * comm.rank + comm.rank * (comm.rank - 1) // 2))


@pytest.mark.parametrize("kind", ["qwen3_moe", "deepseek_v3"])
@pytest.mark.parametrize(
    ("world", "options"),
    [
        (2, {}),
        (2, {"tp": 2}),
        (4, {"tp": 2, "ep": 2, "exchange": "all_to_all"}),
        (3, {"ep": 3, "token_layout": "replicated"}),
        (2, {"exchange": "auto", "backend": "auto"}),
    ],
    ids=lambda each: " ".join(f"{k}={v}" for k, v in each.items()) if isinstance(each, dict) else None,
)
def test_every_grid_gives_what_one_rank_gives(
    pool: Pool, checkpoints: dict[str, Path], kind: str, world: int, options: dict[str, Any]
) -> None:
    found = pool.run(world, output, checkpoints[kind], options)
    alone = load_layer(checkpoints[kind], LAYER)(tokens(20))
    if options.get("token_layout") == "replicated":
        assert all(relative_error(y, alone) < CLOSE for y in found)
    else:
        y = torch.cat(found)
        assert relative_error(y, alone[: len(y)]) < CLOSE


def chosen_apart(comm: Comm, checkpoint: Path) -> str:
    """Each rank has records of its own."""

    def choose_own(*given: Any) -> list[Pick]:
        exchange = ("ag_rs", "all_to_all")[comm.rank]
        assert given[-1](exchange, "torch")  # its plan is made
        return [Pick(exchange, "torch", None, "a test's")]

    planning.choose = choose_own
    try:
        load_layer(checkpoint, LAYER, comm=comm, exchange="auto", backend="torch")
    except ConfigError as error:
        return str(error)
    finally:
        planning.choose = choose
    return ""


def test_ranks_that_choose_differently_are_refused(pool: Pool, checkpoints: dict[str, Path]) -> None:
    for said in pool.run(2, chosen_apart, checkpoints["qwen3_moe"]):
        assert "plan.exchange = " in said
        assert "must be the same on all ranks (rank 0: ag_rs; rank 1: all_to_all)" in said


def another_layer(comm: Comm, checkpoint: Path) -> tuple[str, bool]:
    """Rank 1 asks for the other layer; whether its weights were read."""
    read: list[int] = []
    try:
        load_layer(checkpoint, comm.rank, comm=comm, progress=lambda: read.append(1))
    except ConfigError as error:
        return str(error), bool(read)
    return "", bool(read)


def alone_in_trouble(comm: Comm, checkpoint: Path, when: str) -> tuple[str, str, float]:
    """Rank 1 has another folder, or fails as it reads; what each rank raises, and how long that took."""
    began = time.monotonic()

    def progress() -> None:
        if when == "loading" and comm.rank == 1:
            raise CheckpointError("a file", "is cut short")

    try:
        place = checkpoint / "nowhere" if when == "planning" and comm.rank == 1 else checkpoint
        load_layer(place, LAYER, comm=comm, progress=progress)
    except (CheckpointError, RankFailure) as error:
        return type(error).__name__, str(error), time.monotonic() - began
    return "", "", 0.0


@pytest.mark.parametrize("when", ["planning", "loading"])
def test_what_one_rank_can_not_load_the_others_hear_of(pool: Pool, checkpoints: dict[str, Path], when: str) -> None:
    answers = pool.run(3, alone_in_trouble, checkpoints["qwen3_moe"], when)
    assert [name for name, _, _ in answers] == ["RankFailure", "CheckpointError", "RankFailure"]
    for _, said, seconds in (answers[0], answers[2]):
        assert said.startswith(f"rank 1 failed in {when} a layer (sequence number ")
        assert "CheckpointError: checkpoint " in said
        assert seconds < 10


def test_ranks_that_load_different_layers_are_refused_before_weights_are_read(
    pool: Pool, checkpoints: dict[str, Path]
) -> None:
    for rank, (said, read) in enumerate(pool.run(2, another_layer, checkpoints["qwen3_moe"])):
        assert said.startswith(f"layer = '{rank}': must be the same on all ranks (rank 0: 0; rank 1: 1)")
        assert not read


def test_the_shared_expert_comes_with_the_model(checkpoints: dict[str, Path]) -> None:
    whole = load_layer(checkpoints["deepseek_v3"], LAYER)
    assert whole.plan.spec.shared_experts == "replicated"
    routed = load_layer(checkpoints["deepseek_v3"], LAYER, shared_experts="none")
    assert relative_error(routed(tokens(9)), whole(tokens(9))) > 10 * CLOSE
    assert load_layer(checkpoints["qwen3_moe"], LAYER).plan.spec.shared_experts == "none"


def test_a_bf16_layer_is_quantized_where_that_is_asked_for(tmp_path: Path, checkpoints: dict[str, Path]) -> None:
    """Its shared expert too."""
    sizes = {"hidden": 256, "intermediate": 512, "num_experts": 8, "top_k": 2}
    made = make_checkpoint(tmp_path / "bf16", model_type="deepseek_v3", quant="none", **sizes)
    plain, quantized = load_layer(made, LAYER), load_layer(made, LAYER, quant="fp8_block")
    assert (plain.plan.spec.quant, quantized.plan.spec.quant) == ("none", "fp8_block")
    assert {shard.kind for shard in quantized._weights} == {"fp8_block"}
    error = relative_error(quantized(tokens(20)), plain(tokens(20)))
    assert 1e-3 < error < 0.1
    with pytest.raises(ConfigError, match="quant"):
        load_layer(checkpoints["qwen3_moe"], LAYER, quant="fp8_channel")


def test_what_is_named_is_taken_or_refused(checkpoints: dict[str, Path]) -> None:
    given = checkpoints["qwen3_moe"], LAYER
    assert load_layer(*given).plan.backend == "torch"
    with pytest.raises(UnsupportedError, match="backend triton"):
        load_layer(*given, backend="triton")
    with pytest.raises(ConfigError, match=r"tp · ep = 4: .* number of ranks in the process group, 1 .*torchrun"):
        load_layer(*given, tp=2, ep=2)
    with pytest.raises(ConfigError, match="layer"):
        load_layer(checkpoints["qwen3_moe"], 99)
    with pytest.raises(ConfigError, match="has no shared expert"):
        load_layer(*given, shared_experts="tp")
    with pytest.raises((CheckpointError, ConfigError), match="nowhere"):
        load_layer("nowhere", 0)
    for wrong in ({"layer": "0"}, {"layer": True}, {"layer": 0, "tp": "x"}, {"layer": 0, "ep": 1.0}):
        with pytest.raises(ConfigError, match="a whole number"):
            load_layer(given[0], **wrong)
    with pytest.raises(ConfigError, match="the path of a folder"):
        load_layer(None, 0)
    with pytest.raises(ConfigError, match="a stack is made of several"):
        MoEStack(load_layer(*given))


def test_the_names_of_the_package_are_there_and_wait_until_they_are_asked_for() -> None:
    code = (
        "import sys, moe_dist; assert 'torch' not in sys.modules and len(dir(moe_dist)) > 10;"
        "[getattr(moe_dist, name) for name in moe_dist.__all__]; assert 'torch' in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert set(moe_dist._HOMES) == set(moe_dist.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = moe_dist.nothing
