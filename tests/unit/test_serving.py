"""What a choice is called in serving stacks, and the call that makes it here."""

from __future__ import annotations

import ast
import inspect
from io import StringIO

import pytest
from unit.test_bench import row

from moe_dist import load_layer
from moe_dist.bench.answer import answers
from moe_dist.bench.serving import python, sglang, vllm
from moe_dist.commands.outcome import print_next
from moe_dist.commands.terminal import Terminal


@pytest.mark.parametrize(
    ("changes", "of_sglang", "of_vllm"),
    [
        ({"ep": 4, "exchange": "nvlink"},
         "--tp-size 4 --ep-size 4 --enable-dp-attention --dp-size 4 --moe-a2a-backend deepep",
         "--data-parallel-size 4 --enable-expert-parallel --all2all-backend deepep_high_throughput"),
        ({"ep": 4}, "--tp-size 4 --ep-size 4 --enable-dp-attention --dp-size 4",
         "--data-parallel-size 4 --enable-expert-parallel --all2all-backend allgather_reducescatter"),
        ({"tp": 4}, "--tp-size 4 --enable-dp-attention --dp-size 4", "--data-parallel-size 4"),
        ({"tp": 4, "exchange": "all_reduce", "token_layout": "replicated"}, "--tp-size 4", "--tensor-parallel-size 4"),
        ({"ep": 2, "exchange": "all_reduce", "token_layout": "replicated"}, "--tp-size 2 --ep-size 2",
         "--tensor-parallel-size 2 --enable-expert-parallel"),
        ({"tp": 2, "ep": 2}, "--tp-size 4 --ep-size 2 --enable-dp-attention --dp-size 4", None),
    ],
)  # fmt: skip
def test_flags_mean_the_same_placement(changes, of_sglang, of_vllm):
    assert sglang(row(**changes)) == of_sglang
    assert vllm(row(**changes)) == of_vllm


@pytest.mark.parametrize("changes", [{"ep": 4}, {"tp": 2, "ep": 2}, {"tp": 4, "token_layout": "replicated"}])
def test_the_call_names_arguments_that_there_are(changes):
    call = ast.parse("\n".join(python(row(**changes)))).body[0].value
    given = {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords}
    inspect.signature(load_layer).bind("checkpoint", 0, **given)
    assert given.get("tp", 1) * given.get("ep", 1) == row(**changes).world
    assert given["exchange"] == "ag_rs"


def said(rows) -> list[str]:
    out = StringIO()
    print_next(Terminal(file=out, width=80), answers(rows))
    return out.getvalue().splitlines()


def test_each_placement_that_wins_at_an_end_is_told_once():
    fast, slow = {"p50": 50.0, "floor_us": 9.0}, {"p50": 90.0, "floor_us": 9.0}
    decode = [row(tp=2, **fast), row(ep=2, **slow)]
    prefill = [row(tp=2, global_tokens=4096, **slow), row(ep=2, global_tokens=4096, **fast)]
    lines = said(decode + prefill)
    assert [line for line in lines if line.startswith("To use")] == [
        "To use TP2, the fastest at 64 tokens:", "To use EP2, the fastest at 4,096 tokens:",
    ]  # fmt: skip
    assert [line.split()[0] for line in lines[1:4]] == ["SGLang", "vLLM", "Python"]
    assert len(said(decode)) == 5  # the call has two lines
    assert said([]) == []


def test_a_cpu_does_not_answer_for_gpus():
    assert "your GPUs" in " ".join(" ".join(said([row(tp=2), row(ep=2)])).split())


def test_a_gpu_without_recorded_peaks_is_no_cpu():
    rows = [row(tp=2, p50=50.0, max_memory=1 << 30), row(ep=2, p50=90.0, max_memory=1 << 30)]
    assert said(rows)[0] == "To use TP2, the fastest at 64 tokens:"
