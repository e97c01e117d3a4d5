"""What of `eval` and `train-tiny` needs no transformers: task files, answers, scores, the tables, and what is refused
before anything is loaded. The rest is in tests/stacks."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from moe_dist.checkpoint import Checkpoint, layer_spec, load_shard, make_checkpoint
from moe_dist.checkpoint.quantizing import quantize_checkpoint
from moe_dist.commands import cli
from moe_dist.commands.eval_table import document, print_rows
from moe_dist.commands.terminal import WIDTH, Terminal
from moe_dist.errors import ConfigError, UnsupportedError
from moe_dist.exits.exit_codes import BAD_INPUT, TOO_SMALL
from moe_dist.integrations.evaluation import asking, harness
from moe_dist.integrations.evaluation.asking import counted
from moe_dist.integrations.evaluation.running import Row, Work
from moe_dist.integrations.evaluation.scores import Answers, Logits, mean_and_error, mean_of_rows, score
from moe_dist.integrations.evaluation.setup import Setup, Variant
from moe_dist.integrations.evaluation.sums import codes_of, split_sums, write_task
from moe_dist.integrations.evaluation.task import answer_in, is_right, read_task
from moe_dist.model.placement import Placement
from moe_dist.model.spec import ParallelSpec
from moe_dist.model.weights import quantize_weights

GSM8K = {"question": "How many?", "answer": "There are 2 * 600 = 1200.\n#### 1,200"}


def written(folder: Path, *lines: object) -> str:
    path = folder / "task.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return str(path)


def test_prompts_and_answers(tmp_path: Path) -> None:
    path = written(tmp_path, {"prompt": "1+1=", "answer": "2"}, "", {"prompt": "2+2=", "answer": " 4 "})
    task = read_task(path)
    assert task.name == "task"
    assert [each.prompt for each in task.questions] == ["1+1=", "2+2="]
    question = task.questions[1]
    for text, answer, right in (("4\n5", "4", True), (" \n 4 ", "4", True), ("5", "5", False), (" \n", None, False)):
        assert answer_in(text, question) == answer
        assert is_right(answer_in(text, question), question) is right


def test_gsm8k_s_convention(tmp_path: Path) -> None:
    question = read_task(written(tmp_path, GSM8K)).questions[0]
    assert question.prompt == "Question: How many?\nAnswer:"
    assert question.answer == "1,200"
    assert is_right(answer_in(" 1200 it is\n#### 1200.\n", question), question)
    assert is_right(answer_in("#### 1,200", question), question)
    assert answer_in("it is 1200", question) is None


def test_patterns_of_the_command_and_of_lines(tmp_path: Path) -> None:
    path = written(tmp_path, {"prompt": "a", "answer": "7"}, {"prompt": "b", "answer": "7", "pattern": "x(.)"})
    first, second = read_task(path, pattern=r"\d").questions
    assert answer_in("is 7", first) == "7"
    assert answer_in("7 or x8", second) == "8"


def test_examples_stand_before_every_prompt(tmp_path: Path) -> None:
    path = written(tmp_path, *({"prompt": f"{n}=", "answer": str(n)} for n in range(5)))
    task = read_task(path, shots=2, limit=2)
    assert [each.prompt for each in task.questions] == ["0=0\n\n1=1\n\n2=", "0=0\n\n1=1\n\n3="]
    gsm8k = read_task(written(tmp_path, GSM8K, GSM8K), shots=1).questions[0].prompt
    assert gsm8k.startswith("Question: How many?\nAnswer: There are 2 * 600 = 1200.\n#### 1,200\n\nQuestion:")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "line 1 = '{': is no JSON"),
        ("[1]", "line 1 = '[1]': is no JSON object"),
        ('{"prompt": "a", "prompt": "b", "answer": "c"}', "stands there twice"),
        ({"prompt": "a"}, "line 1: answer = None: is no text"),
        ({"prompt": "", "answer": "1"}, "line 1: prompt = '': is no text"),
        ({"answer": "#### 1"}, "line 1: question = None: is no text"),
        ({"question": "a", "answer": "1"}, "line 1: answer = '1': has no line \"#### N\""),
        ({"prompt": "a", "answer": "1", "pattern": "("}, "line 1: pattern = '(': is no regular expression"),
        ({"prompt": "a", "answer": "1", "pattern": "(a)(b)"}, "has 2 groups, and one is the answer"),
        ({"prompt": "a", "answer": "1", "pattern": 7}, "line 1: pattern = 7: finds the answer"),
        ("", "has 0 lines"),
    ],
)
def test_lines_of_another_form(line: object, said: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        read_task(written(tmp_path, line))
    assert said in str(error.value)


def test_standard_errors() -> None:
    mean, error = mean_and_error([1.0] * 30 + [0.0] * 10)
    assert (mean, error) == (0.75, pytest.approx(math.sqrt(0.75 * 0.25 / 39)))
    assert mean_and_error([1.0]) == (1.0, None)
    assert mean_of_rows([2.0, 4.0], [1, 2]) == (2.0, 0.0)
    mean, error = mean_of_rows([1.0, 3.0], [1, 1])
    assert (mean, error) == (2.0, pytest.approx(mean_and_error([1.0, 3.0])[1]))


def answers(right: int, wrong: int, invalid: int = 0) -> Answers:
    count = right + wrong
    marks = tuple(place < right for place in range(count))
    return Answers(marks, (True,) * (count - invalid) + (False,) * invalid, 4 * count, (0.5,) * count, 10.0)


@pytest.mark.parametrize(("right", "lost"), [(95, False), (93, False), (70, True), (0, True), (100, False)])
def test_a_score_is_compared_question_by_question(right: int, lost: bool) -> None:
    found = score(answers(right, 100 - right, 3), answers(95, 5))
    assert found.lost is lost
    assert found.difference == pytest.approx((right - 95) / 100)
    assert (found.accuracy, found.invalid, found.latency_s, found.tokens_per_s) == (right / 100, 3, 0.5, 40.0)
    assert score(answers(right, 1)).difference is None


def test_equal_answers_have_no_difference_whatever_their_error() -> None:
    assert score(answers(5, 0), answers(5, 0)).lost is False


def test_what_belongs_to_a_text_that_ends() -> None:
    new = torch.tensor([[5, 1, 0, 1], [5, 6, 7, 8], [1, 1, 1, 1]])
    assert counted(new, [1]).sum(1).tolist() == [2, 4, 1]


def test_held_out_sums_share_none_with_those_trained_on(tmp_path: Path) -> None:
    training, asked = split_sums(0)
    assert len({*training, *asked}) == 10_000
    assert not {*training} & {*asked}
    assert split_sums(1) != (training, asked)
    write_task(tmp_path / "sums.jsonl", [(7, 95)])
    question = read_task(str(tmp_path / "sums.jsonl")).questions[0]
    assert (question.prompt, question.answer) == ("07+95=", "102")
    assert len(codes_of(7, 95)) == 10


def rows() -> tuple[list[Row], Work]:
    parallel = ParallelSpec(tp=4, ep=2)
    setup = Setup("fp8", "bf16", 32, 256, 60.0)
    logits = Logits(900, 40, 8.5e-4, 2.2e-4, 1234.5, 1233.1, 0.985)
    base = Row(None, score(answers(95, 5)), logits, ("1", None))
    variants = [Variant(parallel, "all_reduce", name, None, "fp8_block") for name in ("torch", "deep_gemm")]
    others = [Row(each, score(answers(60, 40, 40), answers(95, 5)), logits, ("2", "3")) for each in variants]
    return [base, *others], Work(setup, None, 1000, 0)


def test_the_tables_fit_eighty_columns(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    found, work = rows()
    task = read_task(written(tmp_path, *({"prompt": str(n), "answer": "1"} for n in range(100))))
    work = Work(work.setup, task, 1000, 0)
    print_rows(Terminal(width=WIDTH), found, work)
    lines = capsys.readouterr().out.splitlines()
    text = "\n".join(lines)
    assert max(len(line) for line in lines if "transformers' own" not in line) <= WIDTH
    for part in ("95.0 ± 2.2", "-35.0 ± 4.8", "8.5e-04 ± 2.2e-04", "TP4xEP2", "2 of 2 answer worse than chance"):
        assert part in text
    assert sum(line.startswith("deep_gemm ") for line in lines) == 2  # on one line each


def test_the_document(tmp_path: Path) -> None:
    found, work = rows()
    made = json.loads(json.dumps(document(found, work, {"commit": "abc"}), allow_nan=False))
    assert (made["commit"], made["task"], made["baseline"]) == ("abc", None, "bf16")
    assert [each["experts"] for each in made["rows"]] == ["eager", "torch", "deep_gemm"]
    assert made["rows"][1]["score"]["lost"] is True
    assert made["rows"][0]["answers"] == ["1", None]


def test_numbers_of_the_harness() -> None:
    given = {"alias": "t", "exact_match,none": 0.9, "exact_match_stderr,none": 0.03, "ppl,flexible": 7, "n,none": "N/A"}
    given["ppl_stderr,flexible"] = "N/A"
    found = harness.metrics(given, {"exact_match": True, "ppl": False})
    assert [(each.name, each.value, each.error) for each in found] == [
        ("exact_match", 0.9, 0.03),
        ("ppl (flexible)", 7.0, None),
    ]
    given = {"exact_match,none": 0.5, "exact_match_stderr,none": 0.04, "ppl,flexible": 9}
    worse = harness.metrics(given, {"exact_match": True})
    exact, ppl = harness.compared(worse, found)
    assert (exact.difference, exact.difference_error) == (pytest.approx(-0.4), pytest.approx(0.05))
    assert exact.lost
    assert not ppl.lost  # there is no error to judge by
    assert not harness.compared(found, worse)[0].lost
    assert Row(None, metrics=(exact,)).lost


def test_without_the_harness(said, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moe_dist.commands.eval.installed", lambda: "5.24.0")
    monkeypatch.setattr(harness, "version", _nowhere)
    make_checkpoint("made", hidden=128, intermediate=128, num_experts=4, top_k=2, layers=1)
    assert "--harness needs the package lm-eval" in said("eval", "made", "--harness", "gsm8k", code=TOO_SMALL)


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.chdir(tmp_path)

    def call(*words: str, code: int = BAD_INPUT) -> str:
        assert cli.main(list(words)) == code
        out, err = capsys.readouterr()
        assert (out, len(err.splitlines())) == ("", 1)
        return err.removeprefix("moe-dist: ")

    return call


@pytest.mark.parametrize(
    ("words", "begins"),
    [
        (["eval", "nosuch"], "--task = None: there is nothing to ask"),
        (["eval", "nosuch", "--logits", "9"], "checkpoint nosuch/config.json: no such file"),
        (["eval", "nosuch", "--logits", "0"], "--logits = 0"),
        (["eval", "a", "--logits", "9", "--placements", "tp2", "--tp", "2"], "--placements = ['tp2']: contradicts"),
        (["eval", "a", "--logits", "9", "--placements", "tp2x"], "--placements = 'tp2x': names no sizes"),
        (["eval", "a", "--logits", "9", "--placements", "xep2"], "--placements = 'xep2': names no sizes"),
        (["eval", "a", "--task", "task.jsonl", "--limit", "0"], "--limit = 0"),
        (["eval", "a", "--task", "task.jsonl", "--shots", "3"], "--shots = 3: task.jsonl has 2 lines"),
        (["eval", "a", "--task", "task.jsonl", "--pattern", "("], "--pattern = '(': is no regular expression"),
        (["eval", "a", "--harness-tasks", "."], "--harness-tasks = '.': is of --harness"),
        (["eval", "a", "--logits", "9", "--limit", "3"], "--limit = 3: is of a task, and none is given"),
        (["eval", "a", "--logits", "9", "--baseline", "b"], "--baseline = 'b': no such file"),
        (["train-tiny", "."], "directory = '.': is there already and not empty"),
        (["train-tiny", "new", "--steps", "0"], "--steps = 0"),
    ],
)
def test_what_is_refused(words: list[str], begins: str, said, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moe_dist.commands.eval.installed", lambda: "5.24.0")
    Path("task.jsonl").write_text('{"prompt": "a", "answer": "b"}\n' * 2)
    assert said(*words).startswith(begins)


def test_a_placement_that_the_checkpoint_can_t_have(said, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moe_dist.commands.eval.installed", lambda: "5.24.0")
    make_checkpoint("made", hidden=128, intermediate=128, num_experts=4, top_k=2, layers=1)
    assert "128" in said("eval", "made", "--logits", "9", "--tp", "2")


def test_logits_without_room_are_refused_before_anything_is_loaded(said, monkeypatch: pytest.MonkeyPatch) -> None:
    """A vocabulary of 1,000 in float32 on two ranks, and as much again for another draw of text."""
    monkeypatch.setattr("moe_dist.commands.eval.installed", lambda: "5.24.0")
    monkeypatch.setattr("moe_dist.commands.eval.available_memory", lambda: 2 << 30)
    monkeypatch.setattr("moe_dist.commands.eval.weight_bytes", lambda _: 1 << 20)
    make_checkpoint("made", hidden=128, intermediate=128, num_experts=4, top_k=2, layers=1)
    config = json.loads(Path("made/config.json").read_text())
    Path("made/config.json").write_text(json.dumps(config | {"vocab_size": 1000}))
    most = (int(0.9 * (2 << 30)) - 2 * 2 * (1 << 20)) // (2 * 2 * 4 * 1000)
    words = ["eval", "made", "--ep", "2", "--device", "cpu", "--logits"]
    told = said(*words, str(most + 1))
    assert told.startswith(f"--logits = {most + 1}: the baseline's logits over 1,000 tokens of vocabulary would take")
    assert f"on 2 ranks, and 1.8 GiB of memory are left for them (legal: 1 to {most:,})" in told
    monkeypatch.setattr("moe_dist.commands.eval.available_memory", lambda: 1 << 20)
    assert "fewer ranks or a machine with more memory" in said(*words, "1")


class Bigrams:
    """A model whose next token depends on the last one alone."""

    def __init__(self, seed: int) -> None:
        self.table = torch.randn(11, 11, generator=torch.Generator().manual_seed(seed))

    def __call__(self, ids: torch.Tensor, use_cache: bool) -> SimpleNamespace:
        return SimpleNamespace(logits=self.table[ids])


def test_logits_are_compared_token_by_token() -> None:
    """Against all of them at once. One row ends early and one has a single token."""
    ids = torch.randint(11, (3, 6), generator=torch.Generator().manual_seed(3))
    used = torch.tensor([[0, 1, 1, 1, 1, 1], [0, 1, 1, 0, 0, 0], [0, 1, 0, 0, 0, 0]]).bool()
    models = [Bigrams(seed) for seed in (1, 2)]
    memo = {"model": (models[0], None)}
    context: Any = SimpleNamespace(device=torch.device("cpu"), progress=lambda _: None, memo=memo)
    asking.keep_logits(context, ids, used)
    assert [each.shape for each in context.memo["baseline"]] == [(5, 11), (2, 11), (1, 11)]
    context.memo["model"] = models[1], None
    found = asking.compare_logits(context, ids, used)
    p, q = (model.table[ids[:, :-1]].log_softmax(-1) for model in models)
    kept = used[:, 1:]
    assert (found.tokens, found.rows) == (8, 3)
    assert found.kl == pytest.approx(float((p.exp() * (p - q)).sum(-1)[kept].mean()))
    for told, each in ((found.perplexity, q), (found.baseline_perplexity, p)):
        assert math.log(told) == pytest.approx(-float(each.gather(-1, ids[:, 1:, None])[..., 0][kept].mean()))
    assert found.same_top == pytest.approx(float((p.argmax(-1) == q.argmax(-1))[kept].float().mean()))


def test_without_transformers(said, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moe_dist.integrations.package.version", _nowhere)
    make_checkpoint("made", hidden=128, intermediate=128, num_experts=4, top_k=2, layers=1)
    for words in (["eval", "made", "--logits", "9"], ["train-tiny", "new"]):
        told = said(*words, code=TOO_SMALL)
        assert "the package transformers is not installed (pip install 'moe_dist[stacks]' or " in told
        assert "pip install 'moe_dist[eval]'); this was checked against" in told


def _nowhere(name: str) -> str:
    from importlib.metadata import PackageNotFoundError

    raise PackageNotFoundError(name)


def test_a_checkpoint_s_experts_in_fp8_blocks(tmp_path: Path) -> None:
    """What the loader reads of it is what it would make of the bf16 experts itself."""
    sizes = {"hidden": 256, "intermediate": 128, "num_experts": 4, "top_k": 2, "layers": 2}
    source = make_checkpoint(tmp_path / "bf16", **sizes, quant="none")
    made = quantize_checkpoint(source, tmp_path / "fp8")
    spec = layer_spec(made, 1)
    assert spec.quant == "fp8_block"
    placement = Placement.build(spec, ParallelSpec())
    dense = load_shard(source, 1, Placement.build(layer_spec(source, 1), ParallelSpec()), 0)
    wanted = quantize_weights(dense.w13_eFH, dense.w2_eHi, spec)
    assert load_shard(made, 1, placement, 0).fingerprint() == wanted.fingerprint()
    router = "model.layers.1.mlp.gate.weight"
    assert torch.equal(Checkpoint(made).read(router), Checkpoint(source).read(router))
    with pytest.raises(ConfigError, match="is there already"):
        quantize_checkpoint(source, made)
    with pytest.raises(UnsupportedError, match="fp8_block already"):
        quantize_checkpoint(made, tmp_path / "again")


def test_sizes_that_blocks_do_not_fit(tmp_path: Path) -> None:
    source = make_checkpoint(
        tmp_path / "bf16", hidden=256, intermediate=160, num_experts=4, top_k=2, layers=1, quant="none"
    )
    with pytest.raises(UnsupportedError, match="intermediate is 160, no multiple of 128"):
        quantize_checkpoint(source, tmp_path / "fp8")
