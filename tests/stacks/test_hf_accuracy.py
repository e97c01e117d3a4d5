"""`eval` on a tiny model that was trained on the spot: right layers answer as transformers' own experts in bf16 do, and
each of the mistakes that FP8 experts are prone to shows as lost accuracy."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from moe_dist import Comm
from moe_dist.checkpoint import check_layer, make_checkpoint
from moe_dist.commands import cli
from moe_dist.exits.exit_codes import BAD_INPUT, OK, OUT_OF_TOLERANCE
from moe_dist.integrations.evaluation import training
from moe_dist.integrations.evaluation.running import Evaluation, Row, Work
from moe_dist.integrations.evaluation.setup import Setup, planned
from moe_dist.integrations.evaluation.task import read_task
from moe_dist.integrations.evaluation.training import Trained
from moe_dist.machine.machine import Machine
from moe_dist.model.spec import ParallelSpec
from moe_dist.runtime.context import RankContext

pytestmark = [pytest.mark.stacks, pytest.mark.timeout(900)]  # the first test of the file waits for the training

QUESTIONS, LAYERS, EXPERTS = 200, 2, 4
FAR = 5  # standard errors
Tensors = dict[str, Tensor]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """Once a session: all tests with it are in this file, and a file is one process's."""
    return training.train_tiny(tmp_path_factory.mktemp("trained") / "tiny")


class Alone:
    """A group of one rank in this process."""

    world, runtime, nodes = 1, "ray", (1,)

    def __init__(self) -> None:
        self.context = RankContext(Comm.single(), "ray")

    def run(self, function: Callable[..., Any], *arguments: Any, timeout_s: float, shown: Callable[[str], None]) -> Any:
        with torch.inference_mode():
            return [function(self.context, *arguments)]

    def describe(self) -> Sequence[str]:
        return ["rank 0: cpu"]

    def close(self) -> None:
        pass


def evaluated(trained: Trained, checkpoint: Path, tokens: int = 0, quant: Any = None) -> Iterator[Row]:
    """The baseline's row and that of one rank with the experts of `checkpoint`."""
    made, _ = planned(str(checkpoint), ParallelSpec(), None, "torch", quant, Machine.detect("cpu"))
    setup = Setup(str(checkpoint), str(trained.bf16), 50, 6, 60.0)
    work = Work(setup, read_task(str(trained.task), limit=QUESTIONS), tokens, 0)
    return Evaluation(work, lambda *_: Alone(), lambda _: None, lambda: None).rows([made], 1)


def test_it_has_learned_to_add(trained: Trained) -> None:
    assert trained.accuracy > 0.9
    check_layer(trained.bf16, 0)
    check_layer(trained.fp8_block, LAYERS - 1)


def test_training_is_seeded(tmp_path: Path) -> None:
    first, again, other = (
        load_file(training.train_tiny(tmp_path / name, steps=3, seed=seed).fp8_block / "model.safetensors")
        for name, seed in (("first", 0), ("again", 0), ("other", 1))
    )
    assert all(torch.equal(values.view(torch.uint8), again[name].view(torch.uint8)) for name, values in first.items())
    assert any(
        not torch.equal(values.view(torch.uint8), other[name].view(torch.uint8)) for name, values in first.items()
    )


@pytest.mark.parametrize("quant", [None, "fp8_block", "fp8_channel", "fp8_tensor_dynamic"])
def test_right_experts_answer_as_the_baseline(trained: Trained, quant: str | None) -> None:
    """bf16, and the bf16 checkpoint quantized as it is loaded."""
    baseline, row = evaluated(trained, trained.bf16, 300, quant)
    assert baseline.score is not None
    assert row.score is not None
    assert row.logits is not None
    assert baseline.score.accuracy > 0.8
    assert within(row)
    assert row.score.invalid == baseline.score.invalid == 0
    assert row.logits.kl < (1e-3 if quant is None else 2e-2)
    assert row.logits.perplexity == pytest.approx(row.logits.baseline_perplexity, rel=0.05)


def within(row: Row) -> bool:
    """Whether the difference is one that chance explains, or there is none."""
    assert row.score is not None
    assert row.score.difference is not None
    return abs(row.score.difference) <= 2 * (row.score.difference_error or 0)


def test_the_command_on_one_and_two_ranks(trained: Trained, capsys: pytest.CaptureFixture[str]) -> None:
    """FP8 experts as they are stored, under Ray, in both placements."""
    words = ["eval", str(trained.fp8_block), "--baseline", str(trained.bf16), "--task", str(trained.task)]
    words += ["--limit", str(QUESTIONS), "--batch-size", "50", "--max-new-tokens", "6", "--logits", "300"]
    assert cli.main([*words, "--placements", "tp1", "tp2", "ep2", "--device", "cpu", "--json"]) == OK
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [(row["experts"], row["placement"], row["exchange"], row["format"]) for row in rows] == [
        ("eager", "single", None, "bf16"),
        ("torch", "single", "local", "fp8_block"),
        ("torch", "TP2", "all_reduce", "fp8_block"),
        ("torch", "EP2", "all_reduce", "fp8_block"),
    ]
    for row in rows[1:]:
        assert abs(row["score"]["difference"]) <= 2 * row["score"]["difference_error"]
        assert 0 < row["logits"]["kl"] < 1e-2
        assert len(row["answers"]) == QUESTIONS


def swap_gate_and_up(tensors: Tensors) -> None:
    for name in [each for each in tensors if ".gate_proj." in each]:
        other = name.replace(".gate_proj.", ".up_proj.")
        tensors[name], tensors[other] = tensors[other].clone(), tensors[name].clone()


def swap_them_in_one_layer(tensors: Tensors) -> None:
    inner = {name: values for name, values in tensors.items() if ".layers.1." in name}
    swap_gate_and_up(inner)
    tensors |= inner


def forget_scales(tensors: Tensors) -> None:
    for name in scales(tensors):
        tensors[name] = torch.ones_like(tensors[name])


def invert_scales(tensors: Tensors) -> None:
    for name in scales(tensors):
        tensors[name] = 1 / tensors[name]


def double_scales(tensors: Tensors) -> None:
    for name in scales(tensors, "up_proj"):
        tensors[name] *= 2


def scales(tensors: Tensors, matrix: str = "") -> list[str]:
    return [name for name in tensors if name.endswith("_scale_inv") and matrix in name]


MISTAKES = [swap_gate_and_up, swap_them_in_one_layer, forget_scales, invert_scales, double_scales]


def broken(trained: Trained, into: Path, change: Callable[[Tensors], None]) -> Path:
    shutil.copytree(trained.fp8_block, into)
    tensors = load_file(into / "model.safetensors")
    change(tensors)
    whole = {name: values.contiguous() for name, values in tensors.items()}
    save_file(whole, into / "model.safetensors", metadata={"format": "pt"})
    return into


def standard_errors_lost(row: Row) -> float:
    assert row.score is not None
    assert row.score.difference is not None
    assert row.score.difference_error is not None
    return -row.score.difference / max(row.score.difference_error, 1e-9)


@pytest.mark.parametrize("mistake", MISTAKES, ids=[each.__name__ for each in MISTAKES])
def test_a_mistake_in_all_experts(trained: Trained, tmp_path: Path, mistake: Callable[[Tensors], None]) -> None:
    *_, row = evaluated(trained, broken(trained, tmp_path / "broken", mistake))
    assert row.score is not None
    assert row.score.lost
    assert standard_errors_lost(row) > FAR


@pytest.mark.parametrize("layer", range(LAYERS))
def test_a_lost_expert(trained: Trained, tmp_path: Path, layer: int) -> None:
    """Its output is next to nothing: the loader refuses zeros. Experts that no token of the task needs are not missed,
    so not each of them must show; at least half do."""
    found = []
    for expert in range(EXPERTS):
        name = f"model.layers.{layer}.mlp.experts.{expert}.down_proj.weight_scale_inv"

        def lose(tensors: Tensors, name: str = name) -> None:
            tensors[name] *= 1e-6

        *_, row = evaluated(trained, broken(trained, tmp_path / str(expert), lose))
        found.append(standard_errors_lost(row))
    assert sum(each > FAR for each in found) >= EXPERTS // 2, found


def test_the_command_says_that_accuracy_was_lost(
    trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = broken(trained, tmp_path / "broken", swap_gate_and_up)
    words = ["eval", str(folder), "--baseline", str(trained.bf16), "--task", str(trained.task), "--limit", "50"]
    code = cli.main([*words, "--batch-size", "50", "--max-new-tokens", "6", "--tp", "2", "--device", "cpu"])
    assert code == OUT_OF_TOLERANCE
    out = capsys.readouterr().out
    assert "sums: 50 questions, batches of 50, greedy" in out
    assert "1 of 1 answers worse than chance explains" in out


def test_skipped_experts(trained: Trained, monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer that drops each token's second expert, as one that loses a part of an exchange would."""
    from moe_dist.integrations.transformers import steps

    routing_of = steps.routing_of

    def dropping(ids: Tensor, weights: Tensor) -> Any:
        kept = ids.clone()
        kept[:, 1:] = -1
        return routing_of(kept, weights)

    monkeypatch.setattr("moe_dist.integrations.transformers.replacing.routing_of", dropping)
    *_, row = evaluated(trained, trained.fp8_block)
    assert standard_errors_lost(row) > FAR


def test_a_task_of_the_harness(trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """lm-evaluation-harness asks the same questions; the task is a file here, so nothing is fetched."""
    pytest.importorskip("lm_eval", reason="the extra `eval` is not installed")
    task = {
        "task": "held_out_sums", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(trained.task)}},
        "test_split": "test", "output_type": "generate_until", "doc_to_text": "{{prompt}}",
        "doc_to_target": "{{answer}}", "generation_kwargs": {"max_gen_toks": 6, "do_sample": False, "until": ["\n"]},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }  # fmt: skip
    (tmp_path / "held_out_sums.yaml").write_text(json.dumps(task))  # which is YAML, too
    words = ["eval", str(trained.fp8_block), "--baseline", str(trained.bf16), "--harness", "held_out_sums"]
    words += ["--harness-tasks", str(tmp_path), "--limit", "50", "--batch-size", "50", "--device", "cpu", "--json"]
    assert cli.main(words) == OK
    baseline, row = json.loads(capsys.readouterr().out)["rows"]
    assert [each["name"] for each in row["metrics"]] == ["exact_match"]
    assert baseline["metrics"][0]["value"] > 0.8
    assert row["metrics"][0]["higher"] is True
    assert row["metrics"][0]["difference"] == pytest.approx(
        row["metrics"][0]["value"] - baseline["metrics"][0]["value"]
    )


def test_a_checkpoint_without_attention(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """transformers would draw what is missing at random."""
    made = make_checkpoint(tmp_path / "made", hidden=128, intermediate=128, num_experts=4, top_k=2, layers=1)
    training.tokenizer().save_pretrained(made)
    config = json.loads((made / "config.json").read_text()) | {"vocab_size": 16, "num_attention_heads": 4}
    (made / "config.json").write_text(json.dumps(config))
    assert cli.main(["eval", str(made), "--logits", "9", "--device", "cpu"]) == BAD_INPUT
    assert "weights of the model are missing: lm_head.weight" in capsys.readouterr().err
