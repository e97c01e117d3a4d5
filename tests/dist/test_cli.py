"""Every command as a user calls it: exit codes, what it prints, what it writes."""

from __future__ import annotations

import csv
import json
import os
import re
import time
from io import StringIO
from pathlib import Path
from typing import Any

import pytest

from moe_dist.bench import tolerance
from moe_dist.commands import measuring
from moe_dist.commands.cli import COMMANDS, main
from moe_dist.commands.config import model_names
from moe_dist.errors import ClusterLost

SMALL = ["model.hidden=128", "model.intermediate=256", "model.num_experts=4", "model.top_k=2"]
FEW = ["iters=2", "warmup=1"]


class Done:
    """What a command ended with and printed."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err

    @property
    def document(self) -> Any:
        return json.loads(self.out)


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]):
    def call(*arguments: str | Path) -> Done:
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        return Done(code, *capsys.readouterr())

    return call


@pytest.fixture
def no_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """For what must fail before any rank is started."""

    def refuse(*_: object, **__: object) -> None:
        pytest.fail("ranks were started")

    monkeypatch.setattr("moe_dist.runtime.ray_group.RayGroup.__init__", refuse)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("demo") / "checkpoint"
    assert main(["demo-checkpoint", str(directory)]) == 0
    return directory


class TestWithoutRanks:
    pytestmark = pytest.mark.usefixtures("no_ranks")

    def test_doctor(self, command):
        found = command("doctor", "--json")
        assert found.code == 0
        document = found.document
        assert {"python", "machine", "packages", "nvcc", "collectives", "backends", "exchanges"} <= set(document)
        assert document["backends"]["torch"]["ok"] is True
        assert {"local", "all_reduce", "ag_rs", "all_to_all"} <= set(document["exchanges"])
        assert document["collectives"]["gloo"] is True
        text = command("doctor").out
        for name in (*document["backends"], *document["exchanges"], "torch 2."):
            assert name in text

    def test_plan(self, command):
        arguments = ["plan", "--model", "DeepSeek-V3", "--tp", "2", "--ep", "2", "--exchange", "all_to_all"]
        found = command(*arguments, "--device", "cpu", "--json")
        assert found.code == 0
        document = found.document
        assert document["placement"] == "TP2xEP2"
        assert (document["exchange"], document["backend"], document["payload_dtype"]) == ("all_to_all", "torch", "fp8")
        assert document["experts"] == [128] * 4
        assert sorted(map(tuple, document["slices"])) == [(0, 1024), (0, 1024), (1024, 2048), (1024, 2048)]
        assert document["wire_bytes"] > 0
        chosen = {(choice["kind"], choice["name"]) for choice in document["options"] if choice["chosen"]}
        assert chosen == {("exchange", "all_to_all"), ("backend", "torch")}
        assert all(choice["reason"] for choice in document["options"] if not choice["chosen"])
        text = " ".join(command(*arguments, "--device", "cpu").out.split())
        assert (
            "DeepSeek-V3 fp8_block, no shared expert, as TP2xEP2, sharded tokens: exchange all_to_all, backend torch"
            in text
        )
        assert "not asked for" in text

    def test_plan_for_a_machine_that_is_not_here(self, command):
        arguments = ["plan", "--model", "DeepSeek-V3", "--ep", "4", "--exchange", "nvlink"]
        document = command(*arguments, "--machine", "h200x4", "--json").document
        assert (document["backend"], document["exchange"], document["capturable"]["ok"]) == ("triton", "nvlink", True)
        assert document["machine"]["name"] == "NVIDIA H200"
        assert set(document["tables"].values()) == {"shipped"}
        assert command(*arguments, "--machine", "h100x8").code == 0
        assert command(*arguments).code == 2  # a CPU has no NVLink
        for machine, code, said in (
            ("h300x4", 2, "h100x1 to h100x8, h200x1 to h200x8"),
            ("h200", 2, "h100x1 to h100x8, h200x1 to h200x8"),
            ("h200x0", 2, "h100x1 to h100x8, h200x1 to h200x8"),
            ("h200x2", 3, "not enough GPUs: 4 needed, 2 available"),
        ):
            found = command(*arguments, "--machine", machine)
            assert found.code == code
            assert said in found.err, found.err
        found = command(*arguments, "--machine", "h200x4", "--device", "cpu")
        assert found.code == 2
        assert "contradicts --machine h200x4" in found.err

    def test_the_version_names_the_commit(self, command):
        found = command("--version")
        assert found.code == 0
        assert re.fullmatch(r"moe-dist \d+\.\d+\.\d+, commit (unknown|[0-9a-f]{7,40}(\+changes)?)\n", found.out)

    def test_demo_checkpoint(self, command, tmp_path: Path):
        path = tmp_path / "made"
        assert command("demo-checkpoint", path, "--json").document == {"checkpoint": str(path)}
        assert (path / "config.json").is_file()
        assert command("demo-checkpoint", path).code == 0  # made already: fine
        other = command("demo-checkpoint", path, "--seed", "1")
        assert other.code == 2
        assert "seed" in other.err

    @pytest.mark.parametrize(
        ("arguments", "said"),
        [
            (["run", "--model", "nosuch"], ["model = 'nosuch'", "tiny", "DeepSeek-V3"]),
            (["run", "--exchange", "nosuch", "--ep", "2"], ["'nosuch'", "all_reduce", "ag_rs", "all_to_all"]),
            (["run", "--backend", "nosuch"], ["'nosuch'", "torch"]),
            (["run", "--skew", "nosuch"], ["'nosuch'", "balanced", "uniform", "zipf:S"]),
            (["run", "--payload", "nosuch", "--ep", "2"], ["'nosuch'", "auto", "unquantized", "fp8"]),
            (["run", "--skew", "router"], ["router", "checkpoint"]),
            (["run", "nosuch=1"], ["nosuch = 1: unknown key", "tokens", "skews"]),
            (["run", "model.nosuch=1"], ["model.nosuch", "unknown key", "num_experts"]),
            (["run", "ray.nosuch=1"], ["nosuch", "unknown key", "cpus_per_rank"]),
            (["run", "model.quant=nosuch"], ["model.quant = 'nosuch'", "fp8_block"]),
            (["run", "iters=nosuch"], ["iters = 'nosuch'"]),
            (["run", "iters"], ["not an assignment", "key=value"]),
            (["run", "--tokens", "0"], ["tokens = 0", "1 to 16,777,216"]),
            (["run", "--ep", "0"], ["--ep = 0", "1 to 4,096"]),
            (["run", "--tp", "6"], ["6", "1 to 5"]),
            (["run", "--ep", "2", "--exchange", "local"], ["exchange local", "supported: all_reduce"]),
            (["plan", "--model", "nosuch"], ["model = 'nosuch'", "tiny"]),
            (["check", "--backend", "nosuch"], ["'nosuch'", "torch"]),
            (["compare", "placements=[dp]"], ["'dp'", "tp2xep2"]),
            (["compare", "nothing.yaml"], ["nothing.yaml", "can't be read"]),
            (["run", "--checkpoint", "nothing"], ["nothing", "config.json"]),
        ],
        ids=" ".join,
    )  # fmt: skip
    def test_bad_input_names_what_is_legal(self, command, arguments, said):
        found = command(*arguments)
        assert found.code == 2
        for text in said:
            assert text in found.err
        assert len(found.err.strip().splitlines()) == 1
        as_json = command(*arguments, "--json")
        assert as_json.code == 2
        assert set(as_json.document) == {"error", "message"}
        assert as_json.document["message"] in as_json.err

    def test_a_command_that_is_none(self, command):
        found = command("nosuch")
        assert found.code == 2
        assert "command = 'nosuch'" in found.err
        for name in ("doctor", "plan", "run", "compare", "check", "tune", "demo-checkpoint"):
            assert name in found.err

    @pytest.mark.parametrize(
        ("arguments", "said"),
        [
            (["run", "iters=1", "--ep", "2", "--nosuch"], ["option = '--nosuch'", "moe-dist run", "--tokens"]),
            (["run", "iters=1", "--ep", "2", "--nosuch=1"], ["option = '--nosuch=1'", "moe-dist run", "--tokens"]),
            (["run", "iters=1", "--ep", "2", "-x"], ["option = '-x'", "moe-dist run", "--tokens"]),
            (["run", "iters=1", "--ep", "2", "--no-json"], ["option = '--no-json'", "--json"]),
            (["run", "iters=1", "--ep", "2", "file.yaml"], ["'file.yaml'", "not an assignment", "key=value"]),
            (["run", "--tokens"], ["--tokens = None", "has no value", "a whole number"]),
            (["run", "--device", "gpu"], ["--device = 'gpu'", "auto, cpu, cuda"]),
            (["plan", "--token-layout", "even"], ["--token-layout = 'even'", "replicated, sharded"]),
            (["run", "--json=perhaps"], ["--json = 'perhaps'"]),
            (["run", "--ep", "2", "--ep=2"], ["--ep = '2'", "is given twice"]),
            (["run", "--model", "tiny", "--checkpoint", "c"], ["--checkpoint = 'c'", "--model tiny", "one of the two"]),
            (["doctor", "a=1"], ["argument = 'a=1'", "moe-dist doctor"]),
            (["build"], ["backend = None", "is missing", "torch, triton"]),
            (["build", "nosuch"], ["backend = 'nosuch'", "torch, triton"]),
            (["build", "torch", "triton"], ["argument = 'triton'", "moe-dist build"]),
            (["demo-checkpoint"], ["directory = None", "is missing"]),
            (["demo-checkpoint", "d", "--model-type", "llama"], ["--model-type = 'llama'", "qwen3_moe, deepseek_v3"]),
            (["--json"], ["command = '--json'", "doctor"]),
            (["--versions"], ["command = '--versions'", "doctor"]),
            (["plan", "--tp", "0"], ["--tp = 0", "1 to 4,096"]),
            (["run", "--ep", "-2"], ["--ep = -2", "1 to 4,096"]),
            (["tune", "--tp", "-1"], ["--tp = -1", "1 to 4,096"]),
            (["__complete"], ["command = '__complete'", "doctor"]),
            ([], ["command = None", "is missing", "doctor", "--help"]),
        ],
        ids=" ".join,
    )  # fmt: skip
    def test_a_command_line_that_is_none(self, command, arguments, said):
        found = command(*arguments)
        assert found.code == 2
        for text in said:
            assert text in found.err
        assert found.err.startswith("moe-dist: ")
        assert len(found.err.strip().splitlines()) == 1
        assert "--call" not in found.err  # which is no flag
        if arguments:
            assert command(*arguments, "--json").document["message"] in found.err

    def test_an_experiment_s_file_may_be_named_as_an_assignment(self, command, tmp_path: Path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        Path("a=1.yaml").write_text("nosuch: 1\n")
        assert "a=1.yaml: nosuch = 1" in command("compare", "a=1.yaml").err
        assert ": a = '2.yaml'" in command("compare", "a=2.yaml").err  # no file: an override
        assert ": b = 2" in command("compare", "--device", "cpu", "b=2", "a=1.yaml").err  # in any order

    def test_bad_yaml(self, command, tmp_path: Path):
        path = tmp_path / "bad.yaml"
        path.write_text("tokens: [1, 2\n")
        found = command("compare", path)
        assert found.code == 2
        assert "bad.yaml" in found.err
        assert "no valid YAML" in found.err

    def test_a_truncated_checkpoint_is_found_before_ranks_start(self, command, tmp_path: Path):
        directory = tmp_path / "cut"
        command("demo-checkpoint", directory)
        victim = max(directory.glob("*.safetensors"), key=lambda path: path.stat().st_size)
        os.truncate(victim, victim.stat().st_size // 2)
        begin = time.monotonic()
        found = command("run", "--checkpoint", directory)
        assert time.monotonic() - begin < 5.0
        assert found.code == 2
        assert victim.name in found.err
        assert "truncated" in found.err

    def test_more_than_the_memory_holds(self, command):
        found = command("run", "--model", "DeepSeek-V3", "model.num_experts=100000")
        assert found.code == 3
        assert "not enough memory" in found.err

    @pytest.mark.parametrize("name", [".", "file/below.json"])
    def test_results_that_could_not_be_kept_are_not_measured(self, command, tmp_path: Path, name):
        (tmp_path / "file").touch()
        found = command("run", "--out", tmp_path / name)
        assert found.code == 2
        assert "can't be written" in found.err

    def test_help_names_the_models(self, command):
        found = command("run", "--help")
        assert found.code == 0
        assert all(name in found.out for name in model_names())

    @pytest.mark.parametrize("name", [None, *COMMANDS])
    def test_help_fits_a_terminal_and_lists_the_exit_codes(self, command, monkeypatch, name):
        monkeypatch.setenv("COLUMNS", "80")
        found = command(*([name] if name else []), "--help")
        assert (found.code, found.err) == (0, "")
        assert max(map(len, found.out.splitlines())) <= 80
        assert "2    bad input" in found.out
        for other in COMMANDS if name is None else ():
            assert other in found.out

    @pytest.mark.parametrize(("columns", "widest"), [("0", 80), ("1", 80), ("9" * 20, 1000)])
    def test_columns_that_are_a_slip(self, command, monkeypatch, columns, widest):
        for arguments in (["diff", "--help"], ["plan"]):
            with monkeypatch.context() as patch:  # pytest -v goes by it too, as soon as the test is over
                patch.setenv("COLUMNS", columns)
                found = command(*arguments)
            assert found.code == 0
            assert 3 < max(map(len, found.out.splitlines())) <= widest

    def test_help_says_what_is_taken_without_a_flag(self, command):
        said = " ".join(command("check", "--help").out.replace("│", " ").split())
        for text in ("[default: 1 16]", "[default: uniform single]", "[choices: auto, cpu, cuda]", "(default ray)"):
            assert text in said


@pytest.mark.usefixtures("local_ray")
class TestWithRanks:
    def test_run(self, command, tmp_path: Path):
        path = tmp_path / "results" / "run.json"
        arguments = ["--ep", "2", "--tokens", "17", "--iters", "3", "--skew", "zipf:1.2", "--device", "cpu"]
        found = command("run", *arguments, "--json", "--out", path)
        assert found.code == 0
        document = found.document
        assert {"date", "commit", "command", "machine", "rows", "refused"} <= set(document)
        (row,) = document["rows"]
        labels = {
            "model": "tiny", "quant": "fp8_block", "tp": 1, "ep": 2, "world": 2, "layer": "whole", "exchange": "ag_rs",
            "backend": "torch", "token_layout": "sharded", "global_tokens": 17, "tokens_per_rank": 9,
            "skew": "zipf:1.2", "seed": 0, "iters": 3, "graph": False, "runtime": "ray", "payload_dtype": "fp8",
            "combine_dtype": "bf16", "p99_us": None, "chosen_by": "default", "ok": True,
        }  # fmt: skip
        assert {name: row[name] for name in labels} == labels
        assert row["p50_us"] > 0
        assert 0 < row["err_oracle"] < row["err_exact"] < 5e-2
        assert sum(row["rows_per_rank"]) == 17 * 4
        assert row["bytes_sent"] > 0
        assert set(row["stages_us"]) == {
            "dispatch", "convert", "quantize", "gemm1", "activation", "gemm2", "combine",
        }  # fmt: skip
        written = json.loads(path.read_text())
        assert written["rows"] == document["rows"]
        assert written["machine"] == document["machine"]
        assert [entry.name for entry in path.parent.iterdir()] == ["run.json"]

    def test_a_number_out_of_tolerance(self, command, monkeypatch):
        monkeypatch.setitem(tolerance.EXACT_TOLERANCE, "fp8_block", 0.0)
        found = command("run", "--tokens", "4", "--iters", "1", *SMALL)
        assert found.code == 1
        assert next(line for line in found.out.splitlines() if "single" in line).rstrip(" │").endswith("NO")
        assert "1 of 1 row is out of tolerance." in found.out

    @pytest.mark.slow
    def test_a_placement_that_balance_made(self, command, tmp_path: Path):
        workload = ["--model", "tiny", "--device", "cpu", "worlds=[2]", "exchanges=[ag_rs]", "tokens=[64]"]
        plain = command("balance", "--model", "tiny", "--ep", "2", "--tokens", "64", "--out", tmp_path / "moved")
        assert plain.code == 0
        options = ["--tokens", "64", "--redundant", "2", "--out", tmp_path / "copied", "--json"]
        said = command("balance", "--model", "tiny", "--ep", "2", *options).document
        placements = f"placements=[ep,map:{tmp_path / 'moved'},map:{tmp_path / 'copied'}]"
        found = command("compare", *workload, placements, "skews=['zipf:1.2']", "iters=1", "warmup=0", "--json")
        assert found.code == 0
        before, moved, copied = found.document["rows"]
        assert (before["placement"], copied["placement"]) == ("EP2", said["placement"])
        assert copied["placement"].startswith("EP2+2@")
        assert all(row["ok"] is True for row in (before, moved, copied))
        assert before["pairs"] == moved["pairs"] == copied["pairs"] == 64 * 4
        assert before["rows_per_rank"] == said["before"]["pairs"]  # as it was predicted
        assert copied["rows_per_rank"] == said["after"]["pairs"]
        assert before["imbalance"] > 1.3
        assert max(moved["imbalance"], copied["imbalance"]) < 1.1

    def test_compare_on_a_checkpoint(self, command, demo: Path, tmp_path: Path):
        experiment = tmp_path / "experiment.yaml"
        experiment.write_text(
            "worlds: [2]\nplacements: [tp, ep]\nexchanges: [ag_rs, local]\ntokens: [8, 24]\n"
            "token_layouts: [sharded, replicated]\nskews: [router]\niters: 50\n"
        )
        path = tmp_path / "compare.json"
        found = command("compare", experiment, "--checkpoint", demo, "--layer", "1", "--out", path, *FEW)
        assert found.code == 0
        document = json.loads(path.read_text())
        rows = document["rows"]
        assert len(rows) == 8
        assert {row["iters"] for row in rows} == {2}  # an override stands over the file
        assert {row["skew"] for row in rows} == {"router"}
        assert all(row["ok"] for row in rows)
        assert len({tuple(row["rows_per_rank"]) for row in rows if row["ep"] == 2}) > 1  # the router is not even

        lines = found.out.splitlines()
        assert max(map(len, lines)) <= 80 or all(str(path) in line for line in lines if len(line) > 80)
        # Rows of two iterations have no scatter, by which a tie could be told.
        assert sum(bool(re.search(r"\d +(not claimed|fastest)\s*$", line)) for line in lines) == 4
        assert sum(bool(re.match(r"\s+[TE]P2 .*\d\.\d\dx(, not claimed)?\s*$", line)) for line in lines) == 4
        assert any(line.startswith("Verdict: 4 comparisons:") for line in lines)
        assert "8 rows measured and checked; --wide shows all" in found.out
        few = ("tokens=[8]", "exchanges=[ag_rs]", "token_layouts=[sharded]")
        wide = command("compare", "--checkpoint", demo, "--layer", "1", "worlds=[2]", "skews=[router]", "--wide",
                       *few, *FEW).out  # fmt: skip
        (title,) = [line for line in wide.splitlines() if "· routing router" in line]
        assert "2 ranks · 8 sharded tokens" in title
        assert wide.count("err exact") == 1

        assert len(document["refused"]) == 8
        assert all("exchange local" in item["reason"] for item in document["refused"])
        assert "Not run, and why" in found.out
        assert f"results: {path}" in found.out

    @pytest.mark.slow
    def test_rows_as_csv(self, command):
        found = command("run", "--ep", "2", "--tokens", "8", "--csv", *FEW)
        assert found.code == 0
        (line,) = csv.DictReader(StringIO(found.out))
        assert (line["placement"], line["global_tokens"], line["ok"]) == ("EP2", "8", "True")
        assert set(json.loads(line["stages_us"])) >= {"dispatch", "combine"}
        both = command("run", "--csv", "--json", *FEW)
        assert both.code == 2
        assert "--csv" in both.err
        assert "--json" in both.err

    def test_check(self, command):
        found = command("check", "--tokens", "5", "--skew", "single", "--json", *SMALL)
        assert found.code == 0
        rows = found.document["rows"]
        shown = {(row["placement"], row["exchange"]) for row in rows}
        assert shown == {(place, name) for place in ("TP2", "EP2") for name in ("all_reduce", "ag_rs", "all_to_all")}
        assert all(row["ok"] is True and row["p50_us"] is None and row["iters"] == 0 for row in rows)

    @pytest.mark.slow
    def test_results_that_can_not_be_written_are_printed_all_the_same(self, command):
        found = command("run", "--tokens", "4", "--iters", "1", "--json", "--out", "/dev/full", *SMALL)
        assert found.code == 6
        assert [row["ok"] for row in found.document["rows"]] == [True]  # one document, no second one with the error
        assert "/dev/full can't be written: No space left on device" in found.err

    @pytest.mark.parametrize(
        ("error", "code"),
        [pytest.param(ClusterLost("a:1", "measuring", "gone"), 5, marks=pytest.mark.slow), (KeyboardInterrupt(), 130)],
    )
    def test_what_was_measured_before_the_end_is_kept(self, command, tmp_path: Path, monkeypatch, error, code):
        measured = measuring.run_cases

        def run_cases(planned, *rest):
            measured(planned[:1], *rest)
            raise error

        monkeypatch.setattr(measuring, "run_cases", run_cases)
        two = ["compare", "worlds=[1]", "exchanges=[local]", "skews=[uniform]", "tokens=[4, 8]", "iters=1", *SMALL]
        path = tmp_path / "out.json"
        found = command(*two, "--out", path)
        assert found.code == code
        assert len(json.loads(path.read_text())["rows"]) == 1
        assert found.err.rstrip().endswith(f"1 row is in {path}")
        if code == 130:
            return
        found = command(*two)
        assert found.code == code
        assert "4 sharded tokens" in " ".join(found.out.split())
        assert "1 row is on standard output, in no file" in found.err
        found = command(*two, "--json")
        assert len(found.document["results"]["rows"]) == 1

    def test_a_call_that_takes_too_long(self, command):
        found = command("run", "--tokens", "4", "--iters", "1000000", "case_timeout_s=6", "--json", *SMALL)
        assert found.code == 4
        assert found.document["error"] == "RankFailure"
        assert "rank 0 failed in tiny single local torch 4 sharded tokens uniform" in found.document["message"]
        assert "not done within 6 s" in found.err

    def test_a_cluster_too_small(self, command):
        found = command("run", "--ep", "2", "ray.cpus_per_rank=50")
        assert found.code == 3
        assert "not enough CPUs in the Ray cluster: 100 CPU needed, 2 CPU available" in found.err

    def test_a_cluster_too_small_for_the_second_group(self, command):
        """The first one, which would fit, is not started."""
        found = command("compare", "worlds=[1,2]", "placements=[tp,ep]", "exchanges=[ag_rs]", "backends=[torch]",
                        "tokens=[4]", "ray.cpus_per_rank=2", *SMALL)  # fmt: skip
        assert found.code == 3
        assert "not enough CPUs in the Ray cluster: 4 CPU needed, 2 CPU available" in found.err
        assert "timing" not in found.err
