"""Peak rates: measured, kept, read, and which of them floors go by."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from moe_dist.bench import peaks
from moe_dist.bench.peaks import PEAKS, Peaks, keep, measure_peaks, measured, peaks_of
from moe_dist.bench.roofline import floor_us, group_work
from moe_dist.comm import Comm
from moe_dist.commands.cli import main
from moe_dist.errors import ConfigError
from moe_dist.model.placement import Placement
from moe_dist.model.spec import MoESpec, ParallelSpec

OTHER = "NVIDIA of tests"


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("MOE_DIST_CACHE", str(tmp_path))
    return tmp_path


def test_what_was_measured_gives_a_floor() -> None:
    spec = MoESpec(hidden=128, intermediate=128, num_experts=2, top_k=1)
    placement = Placement.build(spec, ParallelSpec())
    given = spec, group_work(spec, placement, [1000], [2]), OTHER
    assert peaks_of(OTHER) is None
    assert floor_us(*given) is None
    keep(OTHER, Peaks(1e9, 1e8, 1e30))
    assert peaks_of(OTHER) == Peaks(1e9, 1e8, 1e30)
    assert floor_us(*given) == pytest.approx(1e6 * 2 * 1000 * 128 * 3 * 128 / 1e9)
    keep("another", Peaks(1.0, 1.0, 1.0))
    assert set(measured()) == {OTHER, "another"}


def test_a_recorded_card_keeps_its_recorded_peaks() -> None:
    name = next(iter(PEAKS))
    keep(name, Peaks(1.0, 1.0, 1.0))
    assert peaks_of(name) == PEAKS[name]


@pytest.mark.parametrize(
    "content",
    ["{", "[1]", '{"a": {"fp8_flops": 1}}', '{"a": {"fp8_flops": 1, "bf16_flops": 0, "bandwidth": 1}}',
     '{"a": {"fp8_flops": 1, "bf16_flops": "x", "bandwidth": 1}}', '{"a": 3}',
     '{"a": {"fp8_flops": Infinity, "bf16_flops": 1, "bandwidth": 1}}'],
)  # fmt: skip
def test_a_broken_file_is_an_error_that_names_it(own_cache: Path, content: str) -> None:
    (own_cache / "peaks.json").write_text(content)
    with pytest.raises(ConfigError, match=r"peaks\.json.*doctor --measure"):
        measured()


def test_rates_are_work_over_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that says 2 s for whatever it times, whose three launches are real."""
    ran = []

    def clock(comm: Comm, step: object, iters: int, queued: bool) -> list[float]:
        ran.append(step())  # type: ignore[operator]
        return [2e6] * iters

    monkeypatch.setattr(peaks, "time_steps", clock)
    monkeypatch.setattr(torch, "_scaled_mm", lambda a, b, *_, out_dtype: (a.float() @ b.float()).to(out_dtype))
    found = measure_peaks(Comm.single(), size=64, copied=1000)
    assert found == Peaks(64.0**3, 64.0**3, 1000.0)
    assert [tuple(each.shape) for each in ran] == [(64, 64), (64, 64), (1000,)]
    assert ran[0].dtype == torch.bfloat16


def test_doctor_measures_gpus_only(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--measure"]) == 3
    assert "GPUs to measure" in capsys.readouterr().err
    assert main(["doctor", "--json"]) == 0
    assert set(json.loads(capsys.readouterr().out)["peaks"]) == {"recorded", "measured"}
