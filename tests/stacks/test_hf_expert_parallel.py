"""DistributedConfig(ep_implementation="moe_dist"): models that transformers itself loads in parts, over gloo."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from dist.pool import Pool
from tiny_models import experts_of, outputs, prompts, tiny

from moe_dist import Comm
from moe_dist.errors import ConfigError, RankFailure, UnsupportedError
from moe_dist.integrations.transformers import register, replace_experts

pytestmark = pytest.mark.stacks

CLOSE = 2e-5
EIGHT = {
    "qwen3_moe": {"num_experts": 8},
    "mixtral": {"num_local_experts": 8},
    "deepseek_v3": {"n_routed_experts": 8},
    "olmoe": {"num_experts": 8},
    "glm4_moe": {"n_routed_experts": 8},
    "nemotron_h": {"n_routed_experts": 8},
}
# World, sizes, and where tokens lie then: the group of experts is that of a batch, of other batches, or of both.
SIZES: list[tuple[int, dict[str, int], str]] = [
    (2, {"tp_size": 2, "ep_size": 2}, "all_reduce"),
    (2, {"fsdp_size": 2, "ep_size": 2}, "ag_rs"),
    (4, {"fsdp_size": 4, "ep_size": 2}, "ag_rs"),
    (4, {"tp_size": 2, "fsdp_size": 2, "ep_size": 4}, "ag_rs"),
    (4, {"tp_size": 2, "fsdp_size": 2, "ep_size": 2}, "all_reduce"),
]


@pytest.fixture(scope="module")
def two() -> Iterator[Pool]:
    with Pool(size=2, timeout_s=150) as workers:
        yield workers


@pytest.fixture(scope="module")
def four() -> Iterator[Pool]:
    with Pool(size=4, timeout_s=150) as workers:
        yield workers


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folders = {}
    for model_type, eight in EIGHT.items():
        folders[model_type] = tmp_path_factory.mktemp(model_type)
        tiny(model_type, **eight).save_pretrained(folders[model_type])
    return folders


def loaded(comm: Comm, folder: Path, sizes: dict[str, int], **arguments: Any) -> tuple[Any, Any]:
    """The model with eager's experts, whole, and this rank's part of the one that moe_dist runs."""
    from transformers import AutoModelForCausalLM, DistributedConfig

    os.environ |= {"RANK": str(comm.rank), "LOCAL_RANK": str(comm.rank), "WORLD_SIZE": str(comm.world)}
    register(**arguments)
    parts = DistributedConfig(**sizes, ep_implementation="moe_dist")
    whole = AutoModelForCausalLM.from_pretrained(folder, experts_implementation="eager")
    return whole.eval(), AutoModelForCausalLM.from_pretrained(folder, distributed_config=parts).eval()


def batch_of(comm: Comm, sizes: dict[str, int]) -> int:
    """The number of this rank's batch: the ranks of a group of tensor parallelism share one."""
    return comm.rank // sizes.get("tp_size", 1)


def far(comm: Comm, folder: Path, sizes: dict[str, int], arguments: dict[str, Any]) -> tuple[float, int, set[str]]:
    """The largest difference of a logit on this rank, its tokens, and the exchanges that ran."""
    from moe_dist import MoELayer

    whole, model = loaded(comm, folder, sizes, timeout_s=60.0, **arguments)
    ran = set()
    forward = MoELayer.forward

    def seen(self: MoELayer, *given: Any, **named: Any) -> torch.Tensor:
        ran.add(self.plan.exchange)
        return forward(self, *given, **named)

    MoELayer.forward = seen  # type: ignore[method-assign]
    try:
        batch = batch_of(comm, sizes)
        ids = prompts(1 + batch, 5 + 2 * batch, seed=batch)  # 5 or 14 tokens: tp ranks have 3 and 2 of the five
        y = outputs(model, ids)
        y = y.full_tensor() if hasattr(y, "full_tensor") else y
        return float((y - outputs(whole, ids)).abs().max()), ids.numel(), ran
    finally:
        MoELayer.forward = forward  # type: ignore[method-assign]


@pytest.mark.parametrize(("world", "sizes", "exchange"), SIZES, ids=str)
@pytest.mark.parametrize("model_type", ["qwen3_moe", "deepseek_v3"])
def test_meshes(
    two: Pool, four: Pool, saved: dict[str, Path], model_type: str, world: int, sizes: dict[str, int], exchange: str
) -> None:
    for difference, _, ran in (two if world == 2 else four).run(world, far, saved[model_type], sizes, {}):
        assert difference < CLOSE
        assert ran == {exchange}


@pytest.mark.parametrize("exchange", ["all_to_all", "all_reduce"])
def test_another_exchange(four: Pool, saved: dict[str, Path], exchange: str) -> None:
    sizes = {"tp_size": 2, "fsdp_size": 2, "ep_size": 4}
    for difference, _, ran in four.run(4, far, saved["mixtral"], sizes, {"exchange": exchange}):
        assert difference < CLOSE
        assert ran == {exchange}


@pytest.mark.parametrize("model_type", sorted(set(EIGHT) - {"qwen3_moe", "deepseek_v3"}))
def test_families(two: Pool, saved: dict[str, Path], model_type: str) -> None:
    found = two.run(2, far, saved[model_type], {"tp_size": 2, "ep_size": 2}, {})
    assert all(difference < CLOSE for difference, *_ in found)


def generated(comm: Comm, folder: Path, sizes: dict[str, int]) -> bool:
    whole, model = loaded(comm, folder, sizes)
    batch = batch_of(comm, sizes)
    ids, own = prompts(1 + batch, 4, seed=batch), sizes.get("fsdp_size", 1) > 1
    new = {"max_new_tokens": 3 + 2 * batch, "do_sample": False}
    return torch.equal(model.generate(ids, **new, synced_gpus=own), whole.generate(ids, **new))


@pytest.mark.parametrize(("world", "sizes", "_"), SIZES[:2] + SIZES[3:4], ids=str)
def test_generate(two: Pool, four: Pool, saved: dict[str, Path], world: int, sizes: dict[str, int], _: str) -> None:
    assert all((two if world == 2 else four).run(world, generated, saved["qwen3_moe"], sizes))


def saved_again(comm: Comm, folder: Path, into: Path) -> float:
    """Experts stay the model's own tensors, so transformers saves them."""
    from transformers import AutoModelForCausalLM

    whole, model = loaded(comm, folder, {"tp_size": 2, "ep_size": 2})
    ids = prompts(2, 5)
    outputs(model, ids)
    model.save_pretrained(into)
    torch.distributed.barrier()
    again = AutoModelForCausalLM.from_pretrained(into, experts_implementation="eager").eval()
    return float((outputs(again, ids) - outputs(whole, ids)).abs().max())


def test_a_saved_model_is_the_same_again(two: Pool, saved: dict[str, Path], tmp_path: Path) -> None:
    assert two.run(2, saved_again, saved["qwen3_moe"], tmp_path) == [0.0, 0.0]


def refusals(comm: Comm, folder: Path) -> list[str]:
    """Of a gradient, of replacing experts that are in parts already, and of a rank that does not come."""
    _, model = loaded(comm, folder, {"tp_size": 2, "ep_size": 2}, timeout_s=3.0)
    said = []
    for call in (
        lambda: model(prompts(1, 4)),
        lambda: replace_experts(model, token_layout="replicated", tp=2),
    ):
        try:
            call()
        except (ConfigError, UnsupportedError) as error:
            said.append(str(error))
    module = next(iter(experts_of(model).values()))
    inputs = torch.zeros(2, 64), torch.zeros(2, 3, dtype=torch.int64), torch.ones(2, 3)
    with torch.no_grad():
        module(*inputs)
        if comm.rank == 0:
            start = time.monotonic()
            try:
                module(*inputs)
            except RankFailure as error:
                said.append(f"{type(error).__name__} {time.monotonic() - start < 20}")
        else:
            time.sleep(4.5)
    return said


def test_what_is_refused(saved: dict[str, Path]) -> None:
    with Pool(size=2, timeout_s=100) as alone:  # its ranks are out of step afterwards
        first, second = alone.run(2, refusals, saved["mixtral"])
    for said in (first, second):
        assert "hidden_states.requires_grad" in said[0]
        assert "loaded with a DistributedConfig" in said[1]
    assert first[2] == "RankFailure True"


def graphs_under_fsdp(comm: Comm, folder: Path) -> str:
    _, model = loaded(comm, folder, {"fsdp_size": 2, "ep_size": 2}, graph_buckets=(8,))
    try:
        outputs(model, prompts(1, 4))
    except UnsupportedError as error:
        return str(error)
    return ""


def test_graphs_where_the_weights_come_and_go(saved: dict[str, Path]) -> None:
    with Pool(size=2, timeout_s=100) as alone:
        for said in alone.run(2, graphs_under_fsdp, saved["mixtral"]):
            assert "FSDP takes the experts' weights away" in said


def built_in(comm: Comm, folder: Path, sizes: dict[str, int], how: str) -> float:
    """transformers' own exchange with moe_dist's function for the experts of each rank."""
    from transformers import AutoModelForCausalLM, DistributedConfig

    os.environ |= {"RANK": str(comm.rank), "LOCAL_RANK": str(comm.rank), "WORLD_SIZE": str(comm.world)}
    register()
    whole = AutoModelForCausalLM.from_pretrained(folder, experts_implementation="eager").eval()
    parts = DistributedConfig(**sizes, ep_implementation=how)
    model = AutoModelForCausalLM.from_pretrained(
        folder, experts_implementation="moe_dist", distributed_config=parts
    ).eval()
    ids = prompts(2, 5)
    return float((outputs(model, ids) - outputs(whole, ids)).abs().max())


@pytest.mark.parametrize(("world", "how"), [(2, "all_reduce"), (2, "all_to_all"), (4, "all_reduce")], ids=str)
def test_transformers_own_exchange(two: Pool, four: Pool, saved: dict[str, Path], world: int, how: str) -> None:
    """With four ranks each has two experts, fewer than a token's three."""
    sizes = {"tp_size": world, "ep_size": world} if world == 2 else {"tp_size": 4, "ep_size": 4}
    workers = two if world == 2 else four
    assert all(each < CLOSE for each in workers.run(world, built_in, saved["olmoe"], sizes, how))
