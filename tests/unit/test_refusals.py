"""What the command refuses before any rank is started: one line that names the field, the value and what is legal."""

from __future__ import annotations

import pytest
import torch

from moe_dist import cli


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["plan", "--ep", "2", "worlds=[4]"], "plan is for one configuration"),
        (["plan", "tokens=[1,2]"], "plan is for one configuration"),
        (["compare", "backends=[torch,nope]"], "no backend has this name"),
        (["compare", "exchanges=[nope]"], "no exchange has this name"),
        (["run", "--skew", "hot:99"], "legal: hot:1 to hot:10"),
        (["run", "--skew", "limited:9x9"], "limited:2x1, limited:5x2, limited:10x4"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_refused_before_anything_starts(arguments, said, capsys, monkeypatch):
    monkeypatch.setattr(cli, "group_starter", lambda *_: pytest.fail("started"))
    assert cli.main(arguments) == cli.BAD_INPUT
    assert said in capsys.readouterr().err


def test_ray_is_not_started_by_each_of_torchrun_s_ranks(monkeypatch, capsys):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    monkeypatch.setattr(cli, "group_starter", lambda *_: pytest.fail("started"))
    assert cli.main(["run"]) == cli.BAD_INPUT
    assert "legal: --runtime torchrun" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["plan", "run", "compare", "check", "tune"])
def test_no_gpu_where_one_is_asked_for(command, monkeypatch, capsys):
    """The machine is too small; the words are all right."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    backend = ["--backend", "triton"] if command == "tune" else []
    assert cli.main([command, "--model", "Qwen3-30B-A3B", *backend, "--device", "cuda"]) == cli.TOO_SMALL
    assert "not enough CUDA devices: 1 needed, 0 available" in capsys.readouterr().err


@pytest.mark.parametrize(("text", "said"), [(b"\xff\xfe1", "is no UTF-8 text"), (b"1: 2", "keys are names"),
                                           (b"models: [{1: 2}]", "keys are names")])  # fmt: skip
def test_broken_experiment_files(text, said, tmp_path, capsys):
    (tmp_path / "e.yaml").write_bytes(text)
    assert cli.main(["compare", str(tmp_path / "e.yaml")]) == cli.BAD_INPUT
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["run", "--tokens", "16777216", "model.hidden=4096"], "GiB of weights and tokens needed"),
        (["run", "--model", "DeepSeek-V3", "model.num_experts=100000"], "GiB of weights needed"),
    ],
)
def test_more_than_the_memory_holds(arguments, said, monkeypatch, capsys):
    monkeypatch.setattr(cli, "group_starter", lambda *_: pytest.fail("started"))
    assert cli.main(arguments) == cli.TOO_SMALL
    assert said in capsys.readouterr().err
