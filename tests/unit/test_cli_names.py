"""What an error of the command calls a value: the flag, the `key=value` or the file's key that it came by."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from cyclopts import Argument

from moe_dist.bench.case import Experiment, SourceSpec
from moe_dist.commands import cli, measuring
from moe_dist.commands.flags import SETS
from moe_dist.exits.exit_codes import BAD_INPUT
from moe_dist.model.spec import MoESpec
from moe_dist.runtime.context import RaySpec

# Flags that set no key of an experiment.
OTHERS = {
    "--baseline", "--build", "--calibrate", "--csv", "--format", "--harness", "--harness-tasks", "--json", "--limit",
    "--lines", "--logits", "--machine", "--max-new-tokens", "--measure", "--measured-layers", "--model-type",
    "--move-gbps", "--network-gbps", "--network-us", "--out", "--output-len", "--pairs", "--pattern", "--profile",
    "--profile-output-dir", "--profile-steps", "--quant", "--redundant", "--remember", "--result-filename",
    "--resume", "--rows", "--run-name", "--seeds", "--shots", "--show-report", "--skip-warmup", "--steps", "--task",
    "--verbose", "--wide",
}  # fmt: skip
WRONG = {
    "--model": "nosuch", "--checkpoint": "nosuch", "--layer": "-1", "--layers": "0", "--device": "tpu",
    "--runtime": "slurm", "--world": "0", "--tp": "99999", "--ep": "99999", "--exchange": "nosuch",
    "--backend": "nosuch", "--tokens": "0", "--token-layout": "striped", "--skew": "nosuch", "--payload": "fp4",
    "--iters": "-1", "--machine": "h300x4", "--seeds": "0", "--rows": "0", "--seed": "9" * 30, "--out": "/",
    "--model-type": "llama", "--token-split": "striped", "--record-routing": "nosuch/r.pt", "--format": "pdf",
    "--batch-size": "0", "--input-len": "0", "--output-len": "0", "--chunked-prefill-size": "0",
    "--measured-layers": "2", "--run-name": "", "--result-filename": "/", "--profile-steps": "0",
    "--profile-output-dir": "nosuch/traces", "--lines": "/",
    "--peers": "nosuch", "--placement": "tp",
    "--calibrate": "nosuch.json", "--network-gbps": "0", "--network-us": "-1", "--redundant": "-1", "--move-gbps": "0",
    "--baseline": "nosuch", "--harness": "", "--harness-tasks": "nosuch", "--limit": "0", "--logits": "0",
    "--max-new-tokens": "0", "--pattern": "(",
    "--quant": "fp4", "--shots": "-1", "--steps": "0", "--task": "nosuch",
    "--placements": "pp", "--exchanges": "nosuch", "--backends": "nosuch", "--tokens-per-rank": "0",
}  # fmt: skip
ELSEWHERE = {
    ("tune", "--out"),  # in test_tune.py, with a backend that can be tuned here
    ("report", "--out"),  # in test_report.py, with a file to report of
}
FEW = {
    "diff": ["a", "b"],
    "build": ["torch"],
    "demo-checkpoint": ["made"],
    "report": ["a"],
    "eval": ["a"],
    "train-tiny": ["made"],
}


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(measuring, "group_starter", lambda *_: pytest.fail("started"))

    def call(*words: str) -> str:
        assert cli.main(list(words)) == BAD_INPUT
        out, err = capsys.readouterr()
        assert (out, len(err.splitlines())) == ("", 1)
        return err.removeprefix("moe-dist: ")

    return call


def options() -> Iterator[tuple[str, Argument]]:
    """(command, flag) of all commands."""
    app = cli.application()
    for command in cli.COMMANDS:
        for argument in app[command].assemble_argument_collection():
            if argument.parse and argument.name.startswith("--"):
                yield command, argument


def test_every_flag_sets_a_key_or_none():
    found = {argument.name for _, argument in options()}
    assert found == {*SETS, *OTHERS}, "a new flag: does it set a key?"
    of_library = {"batch_size", "input_len", "chunked_prefill_size"}
    keys = {key for names in SETS.values() for key in names if not key.startswith("parallel.")} - of_library
    assert {key for key in keys if "." not in key} <= set(Experiment.model_fields)
    assert {key for key in keys if "." in key} == {"source.checkpoint", "source.layer"}


VALUED = [(command, each.name) for command, each in options() if not each.is_flag()]


@pytest.mark.parametrize(("command", "flag"), [pair for pair in VALUED if pair not in ELSEWHERE])
def test_a_flag_s_value_is_called_by_the_flag(command, flag, said):
    found = said(command, *FEW.get(command, []), flag, WRONG[flag])
    assert found.startswith("checkpoint /" if flag == "--checkpoint" else f"{flag} = "), found


@pytest.mark.parametrize(
    ("words", "name"),
    [
        (["run", "--tp", "6"], "--tp = 6"),
        (["run", "--ep", "300"], "--ep = 300"),
        (["run", "--tp", "3", "--ep", "4000"], "--tp × --ep = 12000"),
        (["run", "--tp", "3", "--ep", "11"], "--ep = 11"),
        (["run", "--payload", "fp8"], "--payload = 'fp8'"),
        (["check", "--tokens", "1", "0"], "--tokens = 0"),
        (["check", "--skew", "uniform", "file:nosuch"], "--skew = 'file:"),
        (["run", "--ep", "2", "--exchange", "x" * 400], "--exchange = 'xxx"),
        (["run", "--layer", "3"], "--layer = 3"),
        (["run", "tokens=[0]"], "tokens.0 = 0"),
        (["run", "iters=many"], "iters = 'many'"),
        (["run", "skews=[nosuch]"], "skews = 'nosuch'"),
        (["run", "exchanges=[nosuch]"], "exchanges = 'nosuch'"),
        (["run", "backends=[nosuch]"], "backends = 'nosuch'"),
        (["run", "payload=fp4"], "payload = 'fp4'"),
        (["run", "models=[nosuch]"], "models = 'nosuch'"),
        (["run", "models=[{name: a}]"], "models.0.hidden = None"),
        (["run", "models=[]"], "models = []"),
        (["run", "model.hidden=0"], "model.hidden = 0"),
        (["run", "--model", "tiny", "model.quant=fp4"], "model.quant = 'fp4'"),
        (["run", "ray.strategy=any"], "ray.strategy = 'any'"),
        (["run", "source.layer=3"], "source.layer = 3"),
        (["run", "source.checkpoint=a"], "source.layer = None"),
        (
            ["bench", "--batch-size", "16", "--chunked-prefill-size", "-1", "--input-len", "9999999"],
            "--chunked-prefill-size = -1",
        ),
        (["bench", "tokens=[8]"], "tokens = [8]"),
        (["bench", "layers=2"], "layers = 2"),
        (["bench", "iters=0"], "iters = 0"),
        (["bench", "--iters", "0"], "--iters = 0"),
        (["bench", "skews=[uniform, balanced]"], "skews = ['uniform', 'balanced']"),
        (["bench", "modes=[eager, graph]"], "modes = ['eager', 'graph']"),
        (["bench", "--skip-warmup", "warmup=3"], "warmup = 3: contradicts --skip-warmup"),
        (["bench", "--seed", "3", "seed=4"], "seed = 4: contradicts --seed 3"),
        (["bench", "--profile", "--profile-steps", "0"], "--profile-steps = 0"),
        (["run", "--profile", "--profile-output-dir", "e.yaml"], "--profile-output-dir = "),
        (["run", "--profile", "--profile-output-dir", "."], "--profile-output-dir = "),
        (["run", "--profile", "--profile-output-dir", "e.yaml/traces"], "--profile-output-dir = "),
        (["bench", "--result-filename", "e.yaml"], "--result-filename = 'e.yaml': does not end in a line"),
        (["bench", "--result-filename", "nosuch/r.jsonl"], "--result-filename = 'nosuch/r.jsonl'"),
        (["bench", "--result-filename", "a", "--out", "a"], "--result-filename = 'a': is the file of --out too"),
        (["compare", "e.yaml", "tokens=[]"], "tokens = []"),
        (["compare", "e.yaml", "--layers", "1000"], "--layers = 1000"),
        (["compare", "e.yaml", "--layer", "5"], "e.yaml: source.layer = 3: contradicts --layer 5"),
    ],
)
def test_a_name_that_the_user_knows(words, name, said):
    Path("e.yaml").write_text("models: [tiny]\nsource: {layer: 3}\n" if "--layer" in words else "models: [tiny]\n")
    assert said(*words).startswith(name)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("tokens: [8, 0]", "e.yaml: tokens.1 = 0"),
        ("iters: many", "e.yaml: iters = 'many'"),
        ("skews: [nosuch]", "e.yaml: skews = 'nosuch'"),
        ("exchanges: []", "e.yaml: exchanges = []: is empty (legal: a list with one or more of local, all_reduce"),
        ("backends: [nosuch]", "e.yaml: backends = 'nosuch'"),
        ("models: [tinny]", "e.yaml: models = 'tinny': no model of this name; did you mean tiny?"),
        ("models: [{name: a}]", "e.yaml: models.0.hidden = None"),
        ("models: [m.yaml]", "m.yaml: top_k = 9"),
        ("model: {quant: fp4}", "e.yaml: model.quant = 'fp4'"),
        ("ray: {strategy: any}", "e.yaml: ray.strategy = 'any'"),
        ("source: {layer: 3}", "e.yaml: source.layer = 3"),
        ("token: [8]", "e.yaml: token = [8]: unknown key; did you mean tokens?"),
        ("quant: none\ntokens: [8]", "e.yaml: quant = 'none': unknown key; did you mean model.quant?"),
    ],
)
def test_a_file_s_value_is_called_by_the_file_and_its_key(text, name, said):
    Path("m.yaml").write_text("hidden: 128\nintermediate: 128\nnum_experts: 4\ntop_k: 9\n")
    Path("e.yaml").write_text(f"{text}\n")
    assert said("compare", "e.yaml").startswith(name)


@pytest.mark.parametrize(
    ("words", "rule", "hint"),
    [
        (["compare", "m.yaml"], "is a model's file", "moe-dist compare --model m.yaml"),
        (["compare", "TINY"], "is a model's name", "moe-dist compare --model TINY"),
        (["compare", "a folder"], "is a checkpoint's folder", "moe-dist compare --checkpoint 'a folder'"),
        (["compare", "r.json"], "holds results", "moe-dist diff r.json"),
        (["run", "--model", "e.yaml"], "--model = 'e.yaml': is an experiment's file", "moe-dist compare e.yaml"),
        (["run", "--model", "a folder"], "is a checkpoint's folder", "--checkpoint 'a folder'"),
        (["run", "tiny"], "not an assignment", "did you mean --model tiny?"),
        (["run", "tokens", "8"], "not an assignment", "did you mean tokens=VALUE?"),
        (["run", "e.yaml"], "not an assignment", "compare's first argument"),
        (["run", "tp=2"], "unknown key", "did you mean --tp?"),
        (["run", "cpus_per_rank=2"], "unknown key", "did you mean ray.cpus_per_rank?"),
        (["run", "model.hiden=2"], "unknown key", "did you mean hidden?"),
        (["run", "ray.cpus=2"], "unknown key", "did you mean cpus_per_rank?"),
        (["compare", "--tokens", "8"], "moe-dist compare has none of this name", "did you mean the key tokens?"),
        (["compare", "--seed=8"], "moe-dist compare has none of this name", "did you mean the key seed?"),
        (["run", "--placement", "tp"], "moe-dist run has none of this name", "did you mean the key placements?"),
        (["run", "--quant", "none"], "moe-dist run has none of this name", "did you mean the key model.quant?"),
        (["tune", "--quant", "none"], "moe-dist tune has none of this name", "did you mean the key model.quant?"),
        (["tune", "--layers", "3"], "moe-dist tune has none of this name", "did you mean --layer?"),
        (["check", "--tp", "2"], "moe-dist check has none of this name", "did you mean the key placements?"),
        (["run", "--dtype", "bf16"], "moe-dist run has none of this name", "did you mean the key model.dtype?"),
        (["run", "--tokens", "8", "16"], "not an assignment", "a flag of one value takes no second one"),
        (["run", "--model", "none.yaml"], "--model = 'none.yaml': can't be read", ""),
        (["run", "--model", "typo.yaml"], "typo.yaml: hiden = 8: unknown key", "did you mean hidden?"),
        (["run", "--toknes=8"], "moe-dist run has none of this name", "did you mean --tokens?"),
        (["rnu"], "is none", "did you mean run?"),
        (["help"], "is none", "did you mean --help?"),
        (["--help", "run"], "argument = 'run': --help takes none", "moe-dist COMMAND --help"),
        (["run", "worlds=[2]"], "none of placements tp1xep1 fits any of worlds 2", ""),
    ],
)
def test_what_was_meant(words, rule, hint, said):
    Path("m.yaml").write_text("name: m\nhidden: 128\n")
    Path("e.yaml").write_text("name: e\nmodels: [tiny]\n")
    Path("r.json").write_text('{"date": "", "rows": [], "refused": []}')
    Path("typo.yaml").write_text("name: m\nhiden: 8\n")
    Path("a folder").mkdir()
    Path("a folder", "config.json").touch()
    found = said(*words)
    assert rule in found
    assert hint in found


@pytest.mark.parametrize("words", [["tune", "--skew", "uniform"], ["doctor", "--tokens", "8"], ["run", "a=1"]])
def test_no_hint_about_what_is_not_taken_or_not_alike(words, said):
    assert "did you mean" not in said(*words)


@pytest.mark.parametrize("words", [["1", "16"], ["1,16"], ["1,", "16"], ["1,x"], [",1"], ["1", ""]])
def test_numbers_of_a_list_stand_apart_or_have_commas(words, said):
    bad = any(part in ("", "x") for word in words for part in word.split(","))
    for command, flag in (("check", "--tokens"), ("tune", "--rows")):
        if bad:
            assert said(command, flag, *words).startswith(f"{flag} = ")
        else:
            assert cli.parse([command, flag, *words]).bound.arguments[flag.removeprefix("--")] == [1, 16]


@pytest.mark.parametrize(
    ("words", "names"),
    [
        (["uniform,single"], ["uniform", "single"]),
        (["uniform", "single"], ["uniform", "single"]),
        (["uniform,hot:2", "file:a,b.pt"], ["uniform", "hot:2", "file:a,b.pt"]),  # a path may have commas
    ],
)
def test_names_of_a_list_too(words, names):
    assert cli.parse(["check", "--skew", *words]).bound.arguments["skew"] == names
    assert cli.parse(["check", "--backend", "torch,triton"]).bound.arguments["backend"] == ["torch", "triton"]


def test_a_name_that_is_missing_between_commas(said):
    assert said("check", "--backend", "torch,").startswith("--backend = 'torch,': is no legal value (legal: values")


def keys_in_help(command: str, capsys: pytest.CaptureFixture[str]) -> set[str]:
    """Those that stand beside KEY=VALUE, with dots."""
    assert cli.main([command, "--help"]) == 0
    text = capsys.readouterr().out
    box = re.search(r"KEY=VALUE(.*?)╰", text, re.DOTALL)
    if box is None:
        return set()
    said = " ".join(box[1].replace("│", " ").split())
    found = set()
    for sentence in said.rstrip(".").split(". "):
        head, _, names = sentence.partition(": ")
        section = head.partition(".KEY")[0] if ".KEY" in head else ""
        found |= {f"{section}.{name}".lstrip(".") for name in names.split(", ")}
    return found


def test_help_lists_the_keys_that_a_command_takes_and_no_others(capsys):
    inner = {"source": SourceSpec, "ray": RaySpec, "model": MoESpec}
    models = {f"model.{key}" for key in MoESpec.model_fields}
    every = {*Experiment.model_fields} | {f"{name}.{key}" for name, cls in inner.items() for key in cls.model_fields}
    takes = {"run": every, "plan": every, "compare": every, "check": every - {"check"}, "tune": models}
    takes["bench"] = every - {"tokens", "layers", "record_routing"}
    for command in cli.COMMANDS:
        assert keys_in_help(command, capsys) == takes.get(command, set()), command
        for key in sorted(every - takes.get(command, set())):
            assert cli.main([command, *FEW.get(command, []), f"{key}=false"]) == BAD_INPUT, (command, key)
