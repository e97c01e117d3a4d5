"""The cost model: rows that it is calibrated on, factors that are known, held-out rows, machines that are not here."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from itertools import product
from math import comb
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moe_dist.balance.loads import RankLoads
from moe_dist.bench.peaks import PEAKS
from moe_dist.bench.roofline import floor_us, group_work
from moe_dist.commands.config import find_model
from moe_dist.engine.planning import make_plan
from moe_dist.errors import ConfigError, UnsupportedError
from moe_dist.model.placement import Placement
from moe_dist.model.spec import MoESpec, ParallelSpec
from moe_dist.simulate.calibration import RECORDED, calibration, folds
from moe_dist.simulate.cluster import Cluster, Network
from moe_dist.simulate.cost import CostModel, Link, calibrated, held_out
from moe_dist.simulate.measured import Measured, read_measured
from moe_dist.simulate.predict import SAMPLE, Wanted, loads_of, predictions, sent_bytes
from moe_dist.simulate.work import even_bytes, work_of

SPEC = MoESpec(name="m", hidden=1024, intermediate=512, num_experts=32, top_k=4)
GPU = "NVIDIA H200"
TWO, FOUR = RECORDED / "2026-11-27-h200x2-backends.json", RECORDED / "2026-11-28-h200x4-nvlink.json"
MANY = RECORDED / "2026-11-22-h200x4.json"
TRUE = {"a": (1.5, 1.1, 0.5), "b": (2.0, 0.9, 0.0)}
LINKS = {"ag_rs": Link(80.0, 1e-3 / 200), "all_to_all": Link(50.0, 1e-3 / 300)}


def known_rows() -> list[Measured]:
    """Of a machine whose factors are TRUE and LINKS."""
    rows = []
    grids = ((1, 2), (2, 1), (1, 4), (4, 1))
    for number, ((tp, ep), pairs, backend, exchange) in enumerate(
        product(grids, (64, 1000, 20_000, 300_000), TRUE, LINKS)
    ):
        placement = Placement.build(SPEC, ParallelSpec(tp=tp, ep=ep))
        work = work_of(SPEC, placement, pairs, 32 // ep, 900.0 * pairs / ep * (tp * ep - 1) + 7 * number)
        times = work.at_peak_us(PEAKS[GPU])
        local = sum(factor * us for factor, us in zip(TRUE[backend], times, strict=True))
        us = local + LINKS[exchange].latency_us + LINKS[exchange].byte_us * work.sent_bytes
        rows.append(Measured(f"file {number % 3}", GPU, work, exchange, backend, pairs, us, 0.001 * us))
    return rows


@pytest.fixture(scope="module")
def recorded() -> CostModel:
    return calibration(None).model


class TestRows:
    def test_what_is_taken(self, tmp_path):
        document = json.loads(TWO.read_text())
        rows = document["rows"][:8]
        changes: list[dict[str, Any]] = [
            {}, {"graph": False}, {"ok": False}, {"p50_us": None}, {"layer": "stack:4"}, {"placement": "EP2+1@abcdef"},
            {"routing_p50_us": [1.0, 2.0]}, {"token_layout": "replicated"},
        ]  # fmt: skip
        document["rows"] = [row | change for row, change in zip(rows, changes, strict=True)]
        path = tmp_path / "r.json"
        path.write_text(json.dumps(document))
        found, others = read_measured([str(path)])
        assert (len(found), others) == (1, 7)
        assert (found[0].p50_us, found[0].work.pairs) == (rows[0]["p50_us"], max(rows[0]["rows_per_rank"]))
        document["machine"]["gpu"] = "Another GPU"
        path.write_text(json.dumps(document))
        assert read_measured([str(path)]) == ([], 8)

    @pytest.mark.parametrize(
        ("change", "field"),
        [
            ({"hidden": 0}, "rows.0.hidden"),
            ({"hidden": "wide"}, "rows.0.hidden"),
            ({"rows_per_rank": [1, 2, 3]}, "rows.0.rows_per_rank"),
            ({"rows_per_rank": [0, 0]}, "rows.0.rows_per_rank"),
            ({"quant": "fp4"}, "rows.0.model.quant"),
            ({"bytes_sent": -1}, "rows.0.bytes_sent"),
        ],
    )
    def test_a_value_that_is_none(self, tmp_path, change, field):
        document = json.loads(TWO.read_text())
        document["rows"] = [document["rows"][0] | change]
        path = tmp_path / "r.json"
        path.write_text(json.dumps(document))
        with pytest.raises(ConfigError) as caught:
            read_measured([str(path)])
        assert caught.value.field == f"{path}: {field}"

    def test_the_floor_is_the_larger_of_arithmetic_and_weights(self):
        found, _ = read_measured([str(FOUR)])
        rows = [row for row in json.loads(FOUR.read_text())["rows"] if row["exchange"] != "fused"]
        for row, measured in zip(rows, found, strict=True):
            arithmetic, weights, _ = measured.work.at_peak_us(PEAKS[GPU])
            spec = find_model(row["model"])
            placement = Placement.build(spec, ParallelSpec(tp=row["tp"], ep=row["ep"]))
            most = [max(row["rows_per_rank"])] * row["world"], [row["active_experts"]] * row["world"]
            assert max(arithmetic, weights) == pytest.approx(floor_us(spec, group_work(spec, placement, *most), GPU))

    @pytest.mark.parametrize("path", [TWO, FOUR, MANY], ids=lambda path: path.stem)
    def test_bytes_are_those_that_ranks_counted(self, path):
        checked = 0
        for row in json.loads(path.read_text())["rows"]:
            if not row["graph"] or row["exchange"] in ("nvlink", "fused") or row["backend"] == "deep_gemm":
                continue  # nvlink's and fused's depend on the routing, deep_gemm's payload can't be asked for here
            parallel = ParallelSpec(tp=row["tp"], ep=row["ep"])
            machine = Cluster.named(f"h200x{row['world']}", None).machine
            kept = {"exchange": row["exchange"], "backend": row["backend"], "graph": True, "machine": machine}
            plan = make_plan(find_model(row["model"]), parallel, **kept)
            assert sent_bytes(plan, row["tokens_per_rank"]) == row["bytes_sent"]
            checked += 1
        assert checked >= 16


class TestModel:
    def test_known_factors_are_found(self):
        model = calibrated(known_rows())
        for backend, factors in TRUE.items():
            assert model.local[backend] == pytest.approx(factors, abs=2e-3)
        for name, link in LINKS.items():
            assert model.links[name].latency_us == pytest.approx(link.latency_us, rel=1e-3)
            assert model.links[name].gbps == pytest.approx(link.gbps, rel=1e-3)
        found = held_out(known_rows(), folds(known_rows())["sweeps"])
        assert (found.rows, found.unknown) == (len(known_rows()), 0)
        assert found.worst is not None
        assert found.worst < 1e-3

    def test_no_factor_is_negative(self):
        rows = [replace(row, p50_us=max(1.0, 1000 - row.work.pairs / 400)) for row in known_rows()]
        model = calibrated(rows)
        assert min(min(factors) for factors in model.local.values()) == 0
        assert min(min(link.latency_us, link.byte_us) for link in model.links.values()) >= 0
        assert np.isfinite([*model.local.values()]).all()

    def test_what_was_held_out_counts(self):
        """A file whose times are twice as long is predicted at half of them, whatever the others say."""
        rows = [replace(row, p50_us=2 * row.p50_us) if row.file == "file 1" else row for row in known_rows()]
        alone = [row for row in rows if row.file == "file 1"]
        model = calibrated([row for row in rows if row.file != "file 1"])
        errors = [model.step_us(row.exchange, row.backend, row.work) / row.p50_us for row in alone]
        assert errors == pytest.approx([0.5] * len(alone), rel=0.01)
        worst = held_out(rows, lambda row: row.file).worst
        assert worst is not None
        assert worst >= 0.49

    def test_an_exchange_of_one_file_is_unknown_where_that_is_held_out(self):
        rows = [replace(row, exchange="nvlink") if row.file == "file 1" else row for row in known_rows()]
        found = held_out(rows, lambda row: row.file)
        assert (found.rows, found.unknown) == (43, 21)

    def test_scatter_is_that_of_ties(self):
        assert calibrated(known_rows()).scatter == 0.02
        loud = [replace(row, scatter_us=0.01 * row.p50_us) for row in known_rows()]
        assert calibrated(loud).scatter == pytest.approx(3 * 2**0.5 * 0.01)
        assert calibrated([replace(row, scatter_us=None) for row in known_rows()]).scatter == 0.02

    def test_refused(self):
        with pytest.raises(ConfigError, match="19 rows"):
            calibrated(known_rows()[:19])
        with pytest.raises(ConfigError, match="one kind of GPU"):
            calibrated([*known_rows(), replace(known_rows()[0], gpu="NVIDIA H300")])
        model, work = calibrated(known_rows()), known_rows()[0].work
        with pytest.raises(UnsupportedError, match="backend torch"):
            model.local_us("torch", work)
        with pytest.raises(UnsupportedError, match="exchange nvlink"):
            model.step_us("nvlink", "a", work)
        with pytest.raises(UnsupportedError, match="bf16 with gate"):
            model.local_us("a", replace(work, quant="bf16", quantized=False))
        with pytest.raises(UnsupportedError, match="fp8_block without gate"):
            model.local_us("a", replace(work, gated=False))

    def test_beyond_what_was_measured(self):
        model, work = calibrated(known_rows()), known_rows()[0].work
        assert model.beyond(work) == []
        assert model.beyond(replace(work, world=8, hidden=64)) == [
            "8 ranks (measured: 2 to 4)", "64 hidden (measured: 1,024 to 1,024)",
        ]  # fmt: skip

    def test_recorded_rows_that_were_held_out(self):
        """docs/measuring.md says what this gives."""
        found = calibration(None).held_out
        said = " ".join((RECORDED.parent / "docs" / "measuring.md").read_text().split())
        middle = "{:.0f} %, {:.0f} % and {:.0f} %".format(*(100 * (each.median or 0) for each in found.values()))
        worst = "{:.0f} %, {:.0f} % and {:.0f} %".format(*(100 * (each.worst or 0) for each in found.values()))
        rows, unknown = found["sweeps"].rows, found["numbers of GPUs"].unknown
        assert f"({rows} rows) give a median of {middle}, and a worst row of {worst}." in said
        assert f"say nothing of it ({unknown} rows)" in said
        assert found["sweeps"].median is not None
        assert found["sweeps"].median < 0.10
        assert found["numbers of GPUs"].median is not None
        assert found["numbers of GPUs"].median < 0.20
        for each in found.values():
            assert each.rows > 200
            assert each.worst is not None
            assert each.worst < 0.6

    @pytest.mark.parametrize(("backend", "least", "most"), [("triton", 0.6, 1.1), ("cutlass", 0.6, 1.1),
                                                            ("flashinfer_cutlass", 0.6, 1.1)])  # fmt: skip
    def test_what_a_busy_rank_costs(self, backend, least, most):
        """Between rows of even and of skewed routing, in a file that was held out: what a balancer would gain."""
        files = [str(path) for path in RECORDED.glob("*x[0-9]*.json") if path != TWO]
        model = calibrated(read_measured(files)[0])
        document = json.loads(TWO.read_text())["rows"]
        names = ("placement", "backend", "tokens_per_rank", "skew")
        rows = {tuple(row[name] for name in names): each
                for row, each in zip(document, read_measured([str(TWO)])[0], strict=True)}  # fmt: skip
        said = (RECORDED.parent / "docs" / "measuring.md").read_text()
        (first, last), *_ = re.findall(r"predicted at (\S+) to (\S+) of the measured difference", said)
        for tokens in (2048, 8192):
            even, busy = (rows["EP2", backend, tokens, skew] for skew in ("uniform", "zipf:1.2"))
            predicted = model.local_us(backend, busy.work) - model.local_us(backend, even.work)
            assert least < predicted / (busy.p50_us - even.p50_us) < most
            assert float(first) <= round(predicted / (busy.p50_us - even.p50_us), 2) <= float(last)


class TestCluster:
    @pytest.mark.parametrize(
        ("text", "world", "nodes"), [("h200x4", 4, 1), ("H200x8", 8, 1), ("4xh200x8", 32, 4), ("8xh200x8", 64, 8)]
    )
    def test_named(self, text, world, nodes):
        network = Network(50, 5) if nodes > 1 else None
        cluster = Cluster.named(text, network)
        assert (cluster.world, cluster.nodes, cluster.machine.devices) == (world, nodes, world)

    @pytest.mark.parametrize(
        "text", ["", "h200", "h200x9", "9xh200x8", "0xh200x8", "b200x8", "2x2xh200x2", "h200x08", "h200x1"]
    )
    def test_none(self, text):
        with pytest.raises(ConfigError) as caught:
            Cluster.named(text, None)
        assert caught.value.field == "machine"

    def test_a_network_belongs_to_several_hosts(self):
        with pytest.raises(ConfigError, match="no network between them"):
            Cluster.named("2xh200x8", None)
        with pytest.raises(ConfigError, match="is one host"):
            Cluster.named("h200x8", Network(50, 5))

    def test_what_crosses(self):
        link, sent = Link(80.0, 1e-3 / 200), 15e6
        assert Cluster.named("h200x8", None).exchange_us("ag_rs", link, sent) == pytest.approx(80 + 75)
        cluster = Cluster.named("2xh200x8", Network(10, 5))
        pairwise = cluster.exchange_us("all_to_all", link, sent)  # 8 of 15 others are on the other host
        assert pairwise == pytest.approx(80 + 2 * 5 + 15e6 * 8 / 15 / 10e3)
        ring = cluster.exchange_us("ag_rs", link, sent)  # spread over 8 adapters
        assert ring == pytest.approx(80 + 2 * 5 + 15e6 / 8 / 10e3)
        fast = Cluster.named("2xh200x8", Network(1e4, 5)).exchange_us("ag_rs", link, sent)
        assert fast == pytest.approx(80 + 2 * 5 + 75)  # NVLink is the slower one


class TestPredictions:
    def test_what_can_and_what_can_not(self, recorded):
        spec = find_model("DeepSeek-V3")
        wanted = Wanted(spec, ("tp", "ep", "tp2xep2"), ("ag_rs", "nvlink"), ("cutlass", "torch"), (8, 8192))
        cluster = Cluster.named("2xh200x8", Network(45, 10))
        found, refused = predictions(recorded, cluster, wanted)
        assert {(row.placement, row.exchange, row.backend) for row in found} == {
            ("TP16", "ag_rs", "cutlass"), ("EP16", "ag_rs", "cutlass"),
        }  # fmt: skip
        assert [row.tokens_per_rank for row in found] == [8, 8, 8192, 8192]
        for row in found:
            assert row.predicted_us == pytest.approx(row.predicted_local_us + row.predicted_exchange_us)
            assert {"16 ranks (measured: 2 to 4)", "a network between hosts (measured: one host)"} <= set(row.beyond)
        assert found[2].predicted_us < found[3].predicted_us
        assert refused["tp2xep2"] == "is no placement of 16 ranks"
        assert "memory of GPUs of one host" in refused["EP16 nvlink cutlass"]
        assert "backend torch is not capturable" in refused["EP16 ag_rs torch"]

    def test_a_measured_step_is_not_beyond(self, recorded):
        wanted = Wanted(find_model("DeepSeek-V3"), ("ep",), ("ag_rs",), ("cutlass",), (2048,))
        (found,), refused = predictions(recorded, Cluster.named("h200x4", None), wanted)
        assert (found.beyond, refused) == ([], {})
        rows = json.loads(FOUR.read_text())["rows"]
        (measured,) = (
            row["p50_us"] for row in rows
            if (row["placement"], row["exchange"], row["tokens_per_rank"]) == ("EP4", "ag_rs", 2048)
            and row["backend"] == "cutlass"
        )  # fmt: skip
        assert found.predicted_us == pytest.approx(measured, rel=0.3)

    def test_what_a_shared_expert_takes_is_said_to_be_left_out(self, recorded):
        """No measured row has one."""
        spec = find_model("DeepSeek-V3").with_changes(shared_experts="replicated", shared_intermediate=2048)
        wanted = Wanted(spec, ("ep",), ("ag_rs",), ("cutlass",), (2048,))
        (found,), _ = predictions(recorded, Cluster.named("h200x4", None), wanted)
        assert found.beyond == ["a shared expert, whose time is left out (measured: none)"]

    def test_a_busy_rank_takes_longer(self, recorded):
        cluster, spec = Cluster.named("h200x4", None), find_model("DeepSeek-V3")
        times = [
            predictions(recorded, cluster, Wanted(spec, ("ep",), ("ag_rs",), ("cutlass",), (2048,), skew))[0][0]
            for skew in ("balanced", "hot_rank:4x2")
        ]
        assert times[0].imbalance == pytest.approx(1, abs=0.01)
        assert times[1].imbalance == pytest.approx(2, abs=0.01)
        assert times[1].predicted_us > 1.2 * times[0].predicted_us

    def test_other_gpus_and_formats(self, recorded):
        wanted = Wanted(find_model("DeepSeek-V3"), ("ep",), ("ag_rs",), ("cutlass",), (8,))
        with pytest.raises(ConfigError, match="nothing is known of its GPUs"):
            predictions(recorded, Cluster.named("h100x8", None), wanted)
        with pytest.raises(ConfigError, match=r"placements = 'auto': .*nothing was \(legal: tp, ep, and grids"):
            predictions(recorded, Cluster.named("h200x8", None), replace(wanted, placements=("auto",)))
        found, refused = predictions(
            recorded, Cluster.named("h200x8", None), replace(wanted, spec=find_model("Mixtral-8x7B"))
        )
        assert found == []
        assert "fp8_tensor_static with gate" in refused["EP8 ag_rs cutlass"]

    def test_weights_that_do_not_fit(self, recorded):
        spec = find_model("DeepSeek-V3").with_changes(intermediate=65536)
        wanted = Wanted(spec, ("ep",), ("ag_rs",), ("cutlass",), (8,))
        found, refused = predictions(recorded, Cluster.named("h200x2", None), wanted)
        assert found == []
        assert "don't fit" in refused["EP2 ag_rs cutlass"]

    def test_a_skew_that_the_model_does_not_allow(self, recorded):
        wanted = Wanted(SPEC, ("ep",), ("ag_rs",), ("cutlass",), (8,), "hot:64")
        with pytest.raises(ConfigError, match="more hot experts"):
            predictions(recorded, Cluster.named("h200x4", None), wanted)

    def test_pairs_of_a_sample_are_scaled(self):
        wanted = Wanted(SPEC, ("ep",), ("ag_rs",), ("cutlass",), (SAMPLE,), "balanced")
        placement = Placement.build(SPEC, ParallelSpec(ep=4))
        assert loads_of(wanted, placement, SAMPLE) == RankLoads([SAMPLE * 4] * 4, [8] * 4)

    def test_rows_that_only_some_ranks_need(self):
        placement = Placement.build(SPEC, ParallelSpec(tp=2, ep=2))
        reached = 2 * 2 * (1 - comb(16, 4) / comb(32, 4))
        assert even_bytes(SPEC, placement, 10, 100) == pytest.approx(1000 * reached * 3 / 4)


def test_no_files_at_all(monkeypatch, tmp_path):
    monkeypatch.setattr("moe_dist.simulate.calibration.RECORDED", Path(tmp_path))
    with pytest.raises(ConfigError, match="an installed package has none") as caught:
        calibration(None)
    assert caught.value.field == "calibrate"
