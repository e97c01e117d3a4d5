"""`bench`: which steps the phases consist of, what their rows come to, and what is shown and kept of that."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from unit.test_bench import CPU, row
from unit.test_lines import no_more_than

from moe_dist.bench.case import Case, Experiment
from moe_dist.bench.diff import read_results
from moe_dist.bench.phases import (
    MEASURED,
    BenchResult,
    Request,
    combined,
    fitting_layers,
    phase_cases,
    requests_of,
    step_sizes,
)
from moe_dist.bench.results import provenance
from moe_dist.commands import measuring
from moe_dist.commands.cli import main
from moe_dist.errors import ConfigError, OutputError
from moe_dist.machine.machine import Machine
from moe_dist.model.spec import MoESpec
from moe_dist.report.recorded import read_files

SPEC = MoESpec(name="small", hidden=128, intermediate=128, num_experts=4, top_k=2)
EXPERIMENT = Experiment(models=(SPEC,), worlds=(2,), placements=("ep",), exchanges=("ag_rs",), layers=4)
ABOUT = provenance(CPU)


@pytest.mark.parametrize("tokens", [(1, 1), (3, 100), (16, 1024), (7, 1171)])
@pytest.mark.parametrize("chunk", [1, 64, 8192, -1])
def test_prefill_is_all_tokens_in_full_chunks_and_a_rest(tokens, chunk):
    steps = Request(*tokens, 8, chunk).prefill()
    total = tokens[0] * tokens[1]
    assert sum(size * count for size, count in steps.items()) == total
    sizes = [size for size, count in steps.items() for _ in range(count)]
    assert all(size == min(total, chunk if chunk > 0 else total) for size in sizes[:-1])
    assert sizes[-1] <= (chunk if chunk > 0 else total)


def test_requests_are_all_combinations_each_once():
    found = requests_of([1, 16, 1], [8], [2, 3], 64)
    assert [(each.batch_size, each.output_len) for each in found] == [(1, 2), (1, 3), (16, 2), (16, 3)]
    assert step_sizes(found) == [1, 8, 16, 64]


@pytest.mark.parametrize(
    ("sizes", "field"),
    [
        (([0], [8], [2], 64), "batch_size = 0"),
        (([1], [-3], [2], 64), "input_len = -3"),
        (([1], [8], [1 << 25], 64), "output_len"),
        (([1], [8], [2], -2), "chunked_prefill_size = -2"),
        (([4096], [8192], [2], -1), "makes a step of 33,554,432 tokens"),
    ],
)
def test_sizes_that_are_none(sizes, field):
    with pytest.raises(ConfigError, match=field):
        requests_of(*sizes)


@pytest.mark.parametrize(
    ("device", "modes", "graphs"),
    [
        ("cpu", None, (False, False)),
        ("cuda", None, (False, True)),
        ("cuda", ("eager",), (False, False)),
        ("cuda", ("graph",), (True, True)),
    ],
)
def test_prefill_runs_eagerly_and_decode_as_a_graph_on_gpus(device, modes, graphs):
    of_phases = phase_cases(EXPERIMENT.with_changes(modes=modes), device, "name", requests_of([2], [100], [3], 128))
    assert [case.workload.tokens for case in of_phases["prefill"]] == [72, 128]
    assert [case.workload.tokens for case in of_phases["decode"]] == [2]
    assert tuple({case.graph for case in cases} for cases in of_phases.values()) == tuple({each} for each in graphs)


def test_as_many_layers_are_measured_as_fit():
    requests = requests_of([2], [100], [3], 128)
    large = EXPERIMENT.with_changes(models=(SPEC.with_changes(hidden=1024, intermediate=1024, num_experts=16),))
    (case,) = phase_cases(large, "cpu", "name", requests)["decode"]
    layer = sum(case.plan(CPU).weight_bytes(rank) for rank in range(2))

    class Room(Machine):
        bytes = 0

        @property
        def room(self) -> int:
            return self.bytes

    found = []
    for layers in (0, 1, 2, 3, 1000):  # and half a layer for all that is beside weights
        Room.bytes = int((layers + 0.5) * layer / 0.9)
        found.append(fitting_layers(large, Room("cpu", 1, "a test's CPU"), requests, 58))
    assert [count for count, _ in found] == [1, 1, 2, 3, MEASURED]
    assert ["not enough memory" in reason for _, reason in found] == [True, True, True, True, False]
    assert fitting_layers(large, Room("cpu", 1, "a test's CPU"), requests, 3) == (3, "")


def rows_of(request: Request, **changes: Any) -> list[Any]:
    """A row for each step, of 1,000 µs and as many as it has tokens."""
    sizes = step_sizes([request])
    return [row(global_tokens=size, p50_us=1000.0 + size, iters=7, graph=False, **changes) for size in sizes]


def test_what_steps_come_to():
    request = Request(4, 50, 10, 64)  # 200 tokens: 3 steps of 64 and one of 8
    of_phases = phase_cases(EXPERIMENT, "cpu", "name", [request])
    found = combined(request, of_phases, rows_of(request), "mine", 6, ABOUT)
    ttft, step = 1.5 * (3 * 1064 + 1008) / 1e6, 1.5 * 1004 / 1e6  # 4 layers were measured, of 6
    assert found.ttft == pytest.approx(ttft)
    assert found.itl_ms == pytest.approx(1e3 * step)
    assert found.latency == pytest.approx(ttft + 10 * step)
    assert found.input_throughput == pytest.approx(200 / ttft)
    assert found.output_throughput == pytest.approx(40 / (10 * step))
    assert found.itl_ms == pytest.approx(1e3 / (found.output_throughput / 4))  # SGLang's formula
    assert found.overall_throughput == pytest.approx(240 / (ttft + 10 * step))
    assert (found.layers, found.measured_layers, found.run_name) == (6, 4, "mine")
    assert [(each.tokens, each.steps, each.timed) for each in found.prefill] == [(64, 3, 7), (8, 1, 7)]
    assert (found.decode.tokens, found.decode.steps, found.decode.timed) == (4, 10, 7)


@pytest.mark.parametrize(("verdicts", "ok"), [([True, True], True), ([True, None], None), ([None, False], False)])
@pytest.mark.parametrize("turned", [False, True])
def test_one_wrong_step_makes_its_batches_wrong(verdicts, ok, turned):
    request = Request(4, 16, 10, 64)
    of_phases = phase_cases(EXPERIMENT, "cpu", "name", [request])
    rows = [
        each.model_copy(update={"ok": verdict})
        for each, verdict in zip(rows_of(request), verdicts[::-1] if turned else verdicts, strict=True)
    ]
    assert combined(request, of_phases, rows, "default", 4, ABOUT).ok is ok


@pytest.fixture
def without_ranks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Case]:
    """`bench` measures nothing: its rows are made up, the largest step's is out of tolerance."""
    measured: list[Case] = []

    def run_cases(planned: Any, start: Any, timeout_s: float, outcome: Any, *_: Any) -> None:
        measured.extend(case for case, _ in planned)
        largest = max(case.workload.tokens for case in measured)
        for case in measured:
            tokens, ok = case.workload.tokens, case.workload.tokens < largest
            outcome.rows.append(row(global_tokens=tokens, p50_us=123456.0 * tokens, graph=case.graph, ok=ok))

    monkeypatch.setattr(measuring, "run_cases", run_cases)
    monkeypatch.chdir(tmp_path)
    return measured


SIZES = [
    "bench",
    "--device",
    "cpu",
    "--batch-size",
    "1",
    "16",
    "--input-len",
    "8",
    "--output-len",
    "2",
    "--layers",
    "58",
]


def test_a_wrong_step_ends_the_command_with_1_and_is_marked(without_ranks, capsys):
    assert main([*SIZES, "--measured-layers", "2", "--chunked-prefill-size", "64", "--show-report"]) == 1
    out = capsys.readouterr().out
    table, report = out.split("###")
    lines = [line.split() for line in table.splitlines()]
    assert [(line[0], line[-1]) for line in lines if line[-1:] in (["yes"], ["NO"])] == [("1", "yes"), ("16", "NO")]
    assert all(len(line) <= 80 for line in table.splitlines())
    assert "| 16 | 8 | 2 |" in report
    for text in (table, report):
        plain = " ".join(text.split())
        assert "2 of 58 layers were timed, as one stack; times are multiplied by 29" in plain
        assert "attention, dense layers, embeddings, sampling and scheduling are not timed" in plain
    assert {case.layers for case in without_ranks} == {2}
    assert sorted(case.workload.tokens for case in without_ranks) == [1, 8, 16, 64]


def test_lines_are_appended_and_the_file_has_rows_for_other_commands(without_ranks, capsys):
    for number in (1, 2):
        arguments = ["--result-filename", "r.jsonl", "--run-name", f"run {number}", "--out", "r.json", "--json"]
        assert main([*SIZES, *arguments]) == 1
        document = json.loads(capsys.readouterr().out)
    lines = [BenchResult.model_validate_json(line) for line in Path("r.jsonl").read_text().splitlines()]
    assert [(line.run_name, line.batch_size) for line in lines] == [
        ("run 1", 1), ("run 1", 16), ("run 2", 1), ("run 2", 16),
    ]  # fmt: skip
    assert document["bench"] == [line.model_dump(mode="json") for line in lines[2:]]
    assert json.loads(Path("r.json").read_text()) == document
    assert len(read_results("r.json")["rows"]) == len(read_files(["r.json"])[0].rows) == len(document["rows"])


def test_a_file_that_can_t_be_written_costs_no_results(without_ranks, monkeypatch, capsys):
    def full(path: str, results: Any) -> None:
        raise OutputError(path, "No space left on device")

    monkeypatch.setattr("moe_dist.commands.bench.append_lines", full)
    assert main([*SIZES, "--result-filename", "r.jsonl"]) == 6
    out, err = capsys.readouterr()
    assert "throughput" in out
    assert "results:" not in out
    assert "r.jsonl can't be written: No space left on device" in err


def test_a_disk_that_is_full_cuts_no_line(without_ranks, capsys):
    """Without a word the system writes as much of it as there is room for."""
    assert main([*SIZES, "--result-filename", "r.jsonl"]) == 1
    before = Path("r.jsonl").read_bytes()
    with no_more_than(len(before) + 100):
        assert main([*SIZES, "--result-filename", "r.jsonl"]) == 6
    assert "r.jsonl can't be written: No space left on device" in capsys.readouterr().err
    assert Path("r.jsonl").read_bytes() == before


@pytest.mark.parametrize("there", ["{}\n", '{"run_name": "a"}\n', "no JSON\n", "[" * 9999 + "\n", '{"run_name": 1'])
def test_another_file_is_not_appended_to(without_ranks, there, capsys):
    Path("r.jsonl").write_text(there)
    assert main([*SIZES, "--result-filename", "r.jsonl"]) == 2
    assert "--result-filename = 'r.jsonl': does not end in a line of JSON that bench wrote" in capsys.readouterr().err
    assert Path("r.jsonl").read_text() == there
    assert not without_ranks


def test_results_as_csv(without_ranks, capsys):
    assert main([*SIZES, "--csv"]) == 1
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.split(",") == list(BenchResult.model_fields)
    assert len(lines) == 2


def test_a_warm_up_is_skipped_only_where_that_is_asked_for(without_ranks):
    main(SIZES)
    assert {case.warmup for case in without_ranks} == {3}
    without_ranks.clear()
    main([*SIZES, "--skip-warmup"])
    assert {case.warmup for case in without_ranks} == {0}


def test_traces_go_beside_the_results_under_names_of_their_own(without_ranks, tmp_path):
    main([*SIZES, "--profile", "--profile-steps", "2", "--result-filename", "r.jsonl"])
    asked = [case.profile for case in without_ranks]
    assert {each.folder for each in asked} == {str(tmp_path / "r-profile")}
    assert {each.steps for each in asked} == {2}
    names = [each.name for each in asked]
    assert len({*names}) == len(names)
    assert {"single-prefill-128tokens-eager", "single-decode-16tokens-eager"} <= set(names)
    without_ranks.clear()
    main(SIZES)
    assert {case.profile for case in without_ranks} == {None}
