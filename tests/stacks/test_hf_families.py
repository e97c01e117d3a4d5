"""Models of transformers, whole and in one process: with moe_dist's experts they compute what they computed before."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import COPIED, FAMILIES, experts_of, outputs, prompts, tiny

from moe_dist import MoELayer
from moe_dist.integrations.transformers import register, replace_experts

pytestmark = pytest.mark.stacks

CLOSE = 2e-5  # float32, logits of about 1
GENERATE = sorted(set(FAMILIES) - COPIED - {"qwen3_vl_moe"})  # which is a text model without a head


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of tokens of each step that a layer of moe_dist has run."""
    counted: list[int] = []
    forward = MoELayer.forward

    def counting(self: MoELayer, x_TH: torch.Tensor, *given: Any, **named: Any) -> torch.Tensor:
        counted.append(len(x_TH))
        return forward(self, x_TH, *given, **named)

    monkeypatch.setattr(MoELayer, "forward", counting)
    return counted


@pytest.mark.parametrize("model_type", sorted(set(FAMILIES) - COPIED))
def test_experts_implementation_gives_the_logits_of_eager(model_type: str, steps: list[int]) -> None:
    assert register().experts
    model, ids = tiny(model_type), prompts(2, 7)
    eager = outputs(model, ids)
    model.set_experts_implementation("moe_dist")
    torch.testing.assert_close(outputs(model, ids), eager, atol=CLOSE, rtol=0)
    assert steps == [14] * len(experts_of(model))


@pytest.mark.parametrize("model_type", FAMILIES)
def test_replaced_experts_give_the_logits_of_eager(model_type: str, steps: list[int]) -> None:
    model, ids = tiny(model_type), prompts(2, 7)
    eager, names = outputs(model, ids), tuple(experts_of(model))
    assert replace_experts(model, token_layout="replicated") == names
    torch.testing.assert_close(outputs(model, ids), eager, atol=CLOSE, rtol=0)
    assert steps == [14] * len(names)
    assert not experts_of(model)


@pytest.mark.parametrize("model_type", GENERATE)
def test_generate_gives_the_tokens_of_eager(model_type: str) -> None:
    register()
    model, ids = tiny(model_type), prompts(2, 5)
    wanted = model.generate(ids, max_new_tokens=4, do_sample=False)
    model.set_experts_implementation("moe_dist")
    assert torch.equal(model.generate(ids, max_new_tokens=4, do_sample=False), wanted)
    replace_experts(model, token_layout="replicated")
    assert torch.equal(model.generate(ids, max_new_tokens=4, do_sample=False), wanted)


def test_the_experts_count() -> None:
    """The comparisons above would pass with any experts if those added nothing."""
    model, ids = tiny("mixtral"), prompts(2, 7)
    before = outputs(model, ids)
    with torch.no_grad():
        for module in experts_of(model).values():
            module.down_proj.mul_(0.9)
    assert (outputs(model, ids) - before).abs().max() > 1000 * CLOSE


def test_weights_that_change_are_seen() -> None:
    """In place, by loading, and by moving: the layers are made of the tensors that the model has at the call."""
    register()
    model, ids, other = tiny("qwen3_moe"), prompts(2, 7), tiny("qwen3_moe", seed=7)
    model.set_experts_implementation("moe_dist")
    outputs(model, ids)
    model.load_state_dict(other.state_dict())
    torch.testing.assert_close(outputs(model, ids), outputs(other, ids), atol=CLOSE, rtol=0)
    third = tiny("qwen3_moe", seed=9)
    model.load_state_dict(third.state_dict(), assign=True)
    torch.testing.assert_close(outputs(model, ids), outputs(third, ids), atol=CLOSE, rtol=0)
    rounded = outputs(third.bfloat16().float(), ids)
    torch.testing.assert_close(outputs(model.bfloat16().float(), ids), rounded, atol=CLOSE, rtol=0)


def test_a_saved_model_is_the_same(tmp_path: Any) -> None:
    """experts_implementation leaves the model's tensors as they were."""
    register()
    model, ids = tiny("deepseek_v3"), prompts(2, 7)
    model.set_experts_implementation("moe_dist")
    ours = outputs(model, ids)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path, experts_implementation="eager")
    torch.testing.assert_close(outputs(again, ids), ours, atol=CLOSE, rtol=0)
    again = type(model).from_pretrained(tmp_path, experts_implementation="moe_dist")
    torch.testing.assert_close(outputs(again, ids), ours, atol=CLOSE, rtol=0)


def test_compiled_models() -> None:
    """torch.compile goes around the experts."""
    register()
    model, ids = tiny("olmoe"), prompts(2, 7)
    eager = outputs(model, ids)
    model.set_experts_implementation("moe_dist")
    torch.testing.assert_close(outputs(torch.compile(model, backend="eager"), ids), eager, atol=CLOSE, rtol=0)
    replace_experts(model, token_layout="replicated")
    torch._dynamo.reset()
    torch.testing.assert_close(outputs(torch.compile(model, backend="eager"), ids), eager, atol=CLOSE, rtol=0)


def test_copies_and_pickles_of_a_model_with_replaced_experts() -> None:
    import copy

    model, ids = tiny("mixtral"), prompts(2, 7)
    replace_experts(model, token_layout="replicated")
    before = outputs(model, ids)
    assert torch.equal(outputs(copy.deepcopy(model), ids), before)
    assert torch.equal(outputs(model.to("cpu"), ids), before)


def test_no_tokens_at_all() -> None:
    register()
    model = tiny("mixtral")
    module = experts_of(model)["model.layers.0.mlp.experts"]
    model.set_experts_implementation("moe_dist")
    with torch.no_grad():
        assert module(torch.zeros(0, 64), torch.zeros(0, 3, dtype=torch.int64), torch.zeros(0, 3)).shape == (0, 64)
