"""`replace_experts` on several ranks over gloo: every placement gives each rank what eager gives it alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from dist.pool import Pool, group_of
from tiny_models import FAMILIES, outputs, prompts, tiny

from moe_dist import Comm
from moe_dist.errors import ConfigError, RankFailure
from moe_dist.integrations.transformers import replace_experts
from moe_dist.model.weights import quantize_weights, shard

pytestmark = pytest.mark.stacks

CLOSE = 2e-5
WIDE = {"moe_intermediate_size": 64, "intermediate_size": 64}  # 16 columns for each of four ranks


@pytest.fixture(scope="module")
def ranks() -> Iterator[Pool]:
    with Pool(size=4, timeout_s=120) as workers:
        yield workers


def replaced(comm: Comm, model_type: str, arguments: dict[str, Any], **changes: Any) -> tuple[Any, Any]:
    """The model with eager's experts, and the one with moe_dist's."""
    eager, model = tiny(model_type, **changes), tiny(model_type, **changes)
    group = group_of(comm.world) if comm.world > 1 else None
    assert replace_experts(model, group=group, timeout_s=60, **arguments)
    return eager, model


def far(comm: Comm, model_type: str, arguments: dict[str, Any]) -> tuple[float, str]:
    """The largest difference of a logit on this rank, and what ran. A sharded rank has rank + 1 prompts of its own."""
    sharded = arguments["token_layout"] == "sharded"
    eager, model = replaced(comm, model_type, arguments, **WIDE)
    ids = prompts(comm.rank + 1 if sharded else 3, 5, seed=comm.rank if sharded else 0)
    found = (outputs(model, ids) - outputs(eager, ids)).abs()
    layer = next(each for name, each in model.named_modules() if name.endswith("experts.layer"))
    return float(found.max()), f"{layer.plan.parallel.label} {layer.plan.exchange}"


PLACEMENTS: list[tuple[int, str, dict[str, Any]]] = [
    (2, "TP2 all_reduce", {"token_layout": "replicated", "tp": 2}),
    (2, "EP2 all_reduce", {"token_layout": "replicated", "ep": 2}),
    (2, "TP2 ag_rs", {"token_layout": "sharded", "tp": 2}),
    (2, "EP2 all_to_all", {"token_layout": "sharded", "exchange": "all_to_all"}),
    (4, "TP2xEP2 all_reduce", {"token_layout": "replicated", "tp": 2}),
    (4, "TP2xEP2 all_to_all", {"token_layout": "sharded", "tp": 2, "exchange": "all_to_all"}),
    (4, "EP4 ag_rs", {"token_layout": "sharded"}),  # 6 experts: 2, 2, 1, 1
    (4, "TP4 all_reduce", {"token_layout": "replicated", "tp": 4}),
    (3, "EP3@b4b148 all_to_all", {
        "token_layout": "sharded", "exchange": "all_to_all", "expert_map": [2, 0, 0, 0, 1, 0]}),
    (3, "EP3+3 ag_rs", {"token_layout": "sharded", "replicas": {0: [1, 2], 5: [0]}}),
    (2, "EP2 ag_rs", {"token_layout": "replicated", "exchange": "ag_rs"}),
    (2, "EP2 ag_rs", {"token_layout": "sharded", "exchange": "auto", "backend": "auto"}),
]  # fmt: skip


@pytest.mark.parametrize(
    ("world", "label", "arguments"), PLACEMENTS, ids=[f"{each[1]} {each[2]['token_layout']}" for each in PLACEMENTS]
)
def test_placements(ranks: Pool, world: int, label: str, arguments: dict[str, Any]) -> None:
    for difference, ran in ranks.run(world, far, "deepseek_v3", arguments):
        assert difference < CLOSE
        assert ran.split("@")[0] == label.split("@")[0]


@pytest.mark.parametrize("model_type", sorted(set(FAMILIES) - {"deepseek_v3"}))
def test_families_on_a_grid(ranks: Pool, model_type: str) -> None:
    found = ranks.run(4, far, model_type, {"token_layout": "sharded", "tp": 2, "exchange": "all_to_all"})
    assert all(difference < CLOSE for difference, _ in found)


def without_tokens(comm: Comm, arguments: dict[str, Any]) -> float:
    """The largest difference in what experts give, where rank r has r tokens; transformers' own attention takes no
    empty batch, so the experts are called directly."""
    eager, model = replaced(comm, "mixtral", {"token_layout": "sharded", **arguments}, **WIDE)
    generator = torch.Generator().manual_seed(comm.rank)
    x, ids = torch.randn(comm.rank, 64, generator=generator), torch.tensor([[0, 5, 2]]).repeat(comm.rank, 1)
    weights = torch.rand(comm.rank, 3, generator=generator)
    with torch.no_grad():
        pairs = zip(model.model.layers, eager.model.layers, strict=True)
        found = [one.mlp.experts(x, ids, weights) - two.mlp.experts(x, ids, weights) for one, two in pairs]
    assert [each.shape for each in found] == [x.shape] * 2
    return max((float(each.abs().max()) for each in found if comm.rank), default=0.0)


@pytest.mark.parametrize("arguments", [{}, {"exchange": "all_to_all"}, {"tp": 2}, {"exchange": "all_reduce"}], ids=str)
def test_a_rank_without_tokens(ranks: Pool, arguments: dict[str, Any]) -> None:
    assert all(difference < CLOSE for difference in ranks.run(4, without_tokens, arguments))


def generated(comm: Comm, model_type: str, arguments: dict[str, Any]) -> bool:
    """Whether this rank's prompts go on as eager's; where they are its own, ranks stop at different lengths."""
    sharded = arguments["token_layout"] == "sharded"
    eager, model = replaced(comm, model_type, arguments, **WIDE)
    ids = prompts(1 + comm.rank if sharded else 2, 4, seed=comm.rank if sharded else 0)
    new = {"max_new_tokens": 3 + 2 * comm.rank if sharded else 4, "do_sample": False}
    return torch.equal(model.generate(ids, **new, synced_gpus=sharded), eager.generate(ids, **new))


@pytest.mark.parametrize("model_type", ["qwen3_moe", "deepseek_v3", "nemotron_h"])
def test_generate_with_one_batch(ranks: Pool, model_type: str) -> None:
    assert all(ranks.run(4, generated, model_type, {"token_layout": "replicated", "tp": 2}))


def test_generate_with_batches_of_their_own_that_end_at_different_lengths(ranks: Pool) -> None:
    """synced_gpus keeps the ranks that are done in step."""
    assert all(ranks.run(4, generated, "mixtral", {"token_layout": "sharded", "exchange": "all_to_all"}))


def quantized(comm: Comm, quant: Any, tp: int) -> bool:
    """Whether a rank's weights are its slices of whole experts that were quantized by the checkpoint loader's rules."""
    model = tiny("mixtral", torch.bfloat16, hidden_size=128, moe_intermediate_size=256, intermediate_size=256)
    experts = model.model.layers[1].mlp.experts
    dense = experts.gate_up_proj.detach(), experts.down_proj.detach()
    replace_experts(model, token_layout="replicated", tp=tp, quant=quant, group=group_of(comm.world))
    layer = model.model.layers[1].mlp.experts.layer
    whole = quantize_weights(*dense, layer.plan.spec)
    return layer._weights[0].fingerprint() == shard(whole, layer.plan.placement, comm.rank).fingerprint()


@pytest.mark.parametrize("quant", ["fp8_block", "fp8_channel", "fp8_tensor_dynamic"])
def test_experts_that_are_quantized_and_sliced(ranks: Pool, quant: str) -> None:
    assert all(ranks.run(4, quantized, quant, 2))


def wrong_layout(comm: Comm) -> str:
    """Tokens of its own on each rank, where they are said to be the same."""
    _, model = replaced(comm, "mixtral", {"token_layout": "replicated"}, **WIDE)
    try:
        outputs(model, prompts(1, 4, seed=comm.rank))
    except ConfigError as error:
        return str(error)
    return ""


def test_batches_that_differ_where_they_are_said_to_be_one(ranks: Pool) -> None:
    """On a CPU ranks compare them. On a GPU they do so in the debug mode only."""
    assert all("must be the same on all ranks" in said for said in ranks.run(2, wrong_layout))


def with_one_rank_s_expert_broken(comm: Comm) -> tuple[str, str, bool]:
    model = tiny("deepseek_v3")
    if comm.rank == 1:
        experts = [module for name, module in model.named_modules() if name.endswith("mlp.experts")]
        experts[-1].down_proj.data[-1, 0, 0] = float("nan")
    try:
        replace_experts(model, token_layout="replicated", ep=comm.world, group=group_of(comm.world), timeout_s=20)
    except (ConfigError, RankFailure) as error:
        replaced = any(type(module).__name__ == "DistributedExperts" for module in model.modules())
        return type(error).__name__, str(error), replaced
    return "nothing", "", True


def test_what_one_rank_refuses_is_known_to_all_before_anything_is_replaced(ranks: Pool) -> None:
    """The others would wait for it in the model's first step."""
    first, second = ranks.run(2, with_one_rank_s_expert_broken)
    assert first[0] == "RankFailure"
    assert "rank 1 failed in checking a model's experts" in first[1]
    assert second[0] == "ConfigError"
    assert "experts" in second[1]
    assert (first[2], second[2]) == (False, False)
