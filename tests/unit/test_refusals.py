"""What the command refuses before any rank is started: one line that names the field, the value and what is legal."""

from __future__ import annotations

import pytest
import torch

from moe_dist.commands import cli, measuring
from moe_dist.exits.exit_codes import BAD_INPUT, TOO_SMALL


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["plan", "worlds=[1,2]", "placements=[tp]"], "worlds = [1, 2]: plan is for one configuration"),
        (["plan", "tokens=[1,2]"], "tokens = [1, 2]: plan is for one configuration"),
        (["plan", "models=[DeepSeek-V3,tiny]"], "models = ['DeepSeek-V3', 'tiny']: plan is for one configuration"),
        (["plan", "worlds=[2]", "placements=[tp2xep2]"], "placements = ['tp2xep2']: has not the 2 ranks of worlds"),
        (["plan", "--machine", "h200x99"], "is no host that is known (legal: h100x1 to h100x8, h200x1 to h200x8)"),
        (["plan", "--machine", "h20x4"], "did you mean h200x4? (legal: h100x1 to"),
        (["plan", "--tp", "0"], "--tp = 0: is a number of ranks (legal: 1 to 4,096)"),
        (["plan", "--tp", "4097"], "--tp = 4097: is too large (legal: 1 to 4,096)"),
        (["compare", "modl=3"], "modl = 3: unknown key; did you mean model? (legal: name, models, model, source,"),
        (["simulate", "--skew", "router"], "--skew = 'router': is a checkpoint's own, and this command reads none"),
        (["balance", "--model", "tiny", "--ep", "2", "--skew", "x"], "limited:GxN (N of G groups), single, file:PATH"),
        (["check", "check=false"], "check = False: contradicts the command"),
        (["compare", "backends=[torch,nope]"], "no backend has this name"),
        (["compare", "exchanges=[nope]"], "no exchange has this name"),
        (["compare", "--peers", "nope"], "no peer has this name (legal: a peer that a package brings; none here does)"),
        (["run", "peers=[deep_gemm_mega]"], "is about one configuration (legal: moe-dist compare)"),
        (["run", "--skew", "hot:99"], "legal: hot:1 to hot:10"),
        (["run", "--skew", "limited:9x9"], "limited:2x1, limited:5x2, limited:10x4"),
        (["compare", "worlds=[7]", "placements=[tp]"], "placements = 7: 640 has only 5 slices"),
        (["plan", "--tp", "9", "--exchange", "auto"], "--tp = 9: 640 has only 5 slices"),
        (
            ["run", "--ep", "2", "--exchange", "auto", "--backend", "cutlass", "--device", "cpu"],
            "is not supported: exchange local: one rank only, not 2; backend cutlass: needs",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_refused_before_anything_starts(arguments, said, capsys, monkeypatch):
    monkeypatch.setattr(measuring, "group_starter", lambda *_: pytest.fail("started"))
    assert cli.main(arguments) == BAD_INPUT
    line = capsys.readouterr().err
    assert said in line
    assert line.count("is not supported") + line.count("(legal: ") == 1  # no error within an error


@pytest.mark.parametrize(
    ("command", "flag", "value", "key"),
    [
        ("plan", "--model", "tiny", "models=[DeepSeek-V3]"),
        ("run", "--device", "cpu", "device=cuda"),
        ("compare", "--runtime", "ray", "runtime=torchrun"),
        ("run", "--tp", "2", "worlds=[4]"),
        ("run", "--ep", "2", "placements=[tp]"),
        ("run", "--exchange", "ag_rs", "exchanges=[local]"),
        ("run", "--backend", "torch", "backends=[triton]"),
        ("run", "--tokens", "64", "tokens=[8]"),  # 64 is what it would be without the flag, too
        ("run", "--token-layout", "sharded", "token_layouts=[replicated]"),
        ("run", "--skew", "uniform", "skews=[single]"),
        ("run", "--payload", "auto", "payload=bf16"),
        ("run", "--iters", "100", "iters=3"),
        ("check", "--world", "2", "worlds=[1]"),
        ("check", "--tokens", "5", "tokens=[6]"),
        ("run", "--iters", "1", "iters=true"),
        ("run", "--tokens", "1", "tokens=[true]"),
        ("run", "--tokens", "8", "tokens=8"),
        ("run", "--skew", "file:/A", "skews=['file:/a']"),
        ("run", "--model", "a.yaml", 'models=["a\\0.yaml"]'),
    ],
)
def test_a_flag_and_a_key_that_contradict_each_other(command, flag, value, key, capsys, monkeypatch):
    monkeypatch.setattr(measuring, "group_starter", lambda *_: pytest.fail("started"))
    for arguments in ([flag, value, key], [key, f"{flag}={value}"]):
        assert cli.main([command, *arguments]) == BAD_INPUT
        said = capsys.readouterr().err
        assert said.startswith(f"moe-dist: {key.split('=')[0]} = ")
        assert f"contradicts {flag} {value} (legal: one of the two)" in said


def test_a_flag_and_a_key_that_say_the_same(capsys):
    assert cli.main(["plan", "--tokens", "8", "tokens=[8]", "--ep", "2", "worlds=[2]", "--device", "cpu"]) == 0
    assert cli.main(["plan", "--model", "tiny", "models=[TINY]", "--device", "cpu"]) == 0
    assert cli.main(["plan", "--model", "x/../no.yaml", "models=[./no.yaml]"]) == BAD_INPUT
    assert "can't be read: No such file" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        ["run", "--out", ""], ["run", "--model="], ["plan", "--exchange", ""], ["plan", "--backend", ""],
        ["check", "--backend", "torch", ""], ["compare", ""], ["tune", "--out", ""], ["run", "--checkpoint", ""],
        ["demo-checkpoint", ""], ["tune", "--rows", ""],
    ],
)  # fmt: skip
def test_an_empty_value_is_refused(arguments, capsys, monkeypatch):
    monkeypatch.setattr(measuring, "group_starter", lambda *_: pytest.fail("started"))
    assert cli.main(arguments) == BAD_INPUT
    flag = next((word.strip("=") for word in arguments if word.startswith("--")), "")
    name = flag or {"compare": "file", "demo-checkpoint": "directory"}[arguments[0]]
    assert f"{name} = " in (said := capsys.readouterr().err)
    assert "is empty" in said


@pytest.mark.parametrize(
    "arguments",
    [
        ["run", "--out", "a\udcff"], ["plan", "--model", "a\udcff"], ["compare", "a\udcff"], ["run", "name=\udcff"],
        ["check", "--backend", "torch", "a\udcff"], ["tune", "--rows", "\udcff"], ["demo-checkpoint", "a\udcff"],
        ["plan", "--checkpoint", "a\udcff"], ["check", "--skew", "uniform", "name=\udcff"], ["demo-checkpoint", "a\0b"],
    ],
)  # fmt: skip
def test_an_argument_that_is_no_text_is_refused(arguments, capsys, monkeypatch, tmp_path):
    """Bytes that are no UTF-8 come in as lone surrogates. Ray would take none of them."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(measuring, "group_starter", lambda *_: pytest.fail("started"))
    assert cli.main(arguments) == BAD_INPUT
    name = next((word for word in arguments if word.startswith("--")), "")
    name = {"compare": "file", "demo-checkpoint": "directory"}.get(arguments[0], name)
    said = capsys.readouterr().err
    assert f"{'override' if arguments[-1].startswith('name') else name} = " in said
    assert "no UTF-8 text" in said or "a NUL character" in said


@pytest.mark.parametrize(("flag", "value"), [("--tokens", "\uff18"), ("--iters", "8 "), ("--tp", "1__0")])
def test_a_number_of_other_digits_is_none(flag, value, capsys):
    assert cli.main(["plan", flag, value]) == BAD_INPUT
    said = capsys.readouterr().err
    assert f"{flag} = {value!r}: " in said
    assert "legal: a whole number" in said


def test_rows_are_numbers_of_our_digits(capsys):
    assert cli.main(["tune", "--rows", "1,\u0668", "--device", "cpu"]) == BAD_INPUT
    assert "rows = " in capsys.readouterr().err


def test_ray_is_not_started_by_each_of_torchrun_s_ranks(monkeypatch, capsys):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    monkeypatch.setattr(measuring, "group_starter", lambda *_: pytest.fail("started"))
    assert cli.main(["run"]) == BAD_INPUT
    assert "legal: --runtime torchrun" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["plan", "run", "compare", "check", "tune"])
def test_no_gpu_where_one_is_asked_for(command, monkeypatch, capsys):
    """The machine is too small; the words are all right."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    backend = ["--backend", "triton"] if command == "tune" else []
    assert cli.main([command, "--model", "Qwen3-30B-A3B", *backend, "--device", "cuda"]) == TOO_SMALL
    assert "not enough CUDA devices: 1 needed, 0 available" in capsys.readouterr().err


@pytest.mark.parametrize(("text", "said"), [(b"\xff\xfe1", "is no UTF-8 text"), (b"1: 2", "keys are names"),
                                           (b"models: [{1: 2}]", "keys are names")])  # fmt: skip
def test_broken_experiment_files(text, said, tmp_path, capsys):
    (tmp_path / "e.yaml").write_bytes(text)
    assert cli.main(["compare", str(tmp_path / "e.yaml")]) == BAD_INPUT
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["run", "--tokens", "16777216", "model.hidden=4096"], "GiB of weights, tokens and scratch needed"),
        (["run", "--model", "DeepSeek-V3", "model.num_experts=100000"], "GiB of weights needed"),
    ],
)
def test_more_than_the_memory_holds(arguments, said, monkeypatch, capsys):
    monkeypatch.setattr(measuring, "group_starter", lambda *_: pytest.fail("started"))
    assert cli.main(arguments) == TOO_SMALL
    assert said in capsys.readouterr().err
