"""Ranks whose processes or layers are not alike are refused before they compute, with field, values and ranks."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from dist.pool import Pool

from moe_dist.comm import Comm, greeting
from moe_dist.engine.agreement import plan_facts
from moe_dist.engine.layer import MoELayer
from moe_dist.engine.planning import make_plan
from moe_dist.engine.router import Router
from moe_dist.errors import ConfigError
from moe_dist.machine import switches
from moe_dist.machine.machine import Machine
from moe_dist.model.spec import MoESpec, ParallelSpec
from moe_dist.model.weights import shard
from moe_dist.tables import Entry, Shape, TuningTable, find_table
from moe_dist.workloads.random_weights import random_expert, random_weights
from moe_dist.workloads.skews import synthetic_routing
from moe_dist.workloads.streams import Stream

SPEC = MoESpec(name="small", hidden=128, intermediate=128, num_experts=8, top_k=2)
SECONDS = 5.0  # a refusal takes two small collectives; the group's own timeout is a minute


def said_by(call: Any) -> tuple[str, str]:
    """(field, rule) of the refusal; it must come at once."""
    began = time.monotonic()
    try:
        call()
    except ConfigError as error:
        assert time.monotonic() - began < SECONDS
        return error.field, error.rule
    return "", ""


# Processes


def strange_process(comm: Comm, what: str, value: str) -> list[tuple[str, str]]:
    """What the first collective of a group says where the last rank is another, and what a later one says where it is
    as the others again."""
    comm._user.greeted = False  # as on a group that is new
    found, last = [], comm.rank == comm.world - 1
    real, real_switches = greeting.facts_of_process, dict(os.environ)
    import moe_dist.comm.bounded as bounded

    if last and what.startswith("environment."):
        os.environ[what.removeprefix("environment.")] = value
    elif last:
        bounded.facts_of_process = lambda device: real(device) | {what: value}
    try:
        found.append(said_by(comm.barrier))
    finally:
        bounded.facts_of_process = real
        os.environ.pop(what.removeprefix("environment."), None)
        os.environ.update(real_switches)
    found.append(said_by(comm.barrier))
    return found


@pytest.mark.parametrize(
    ("what", "value", "others", "own"),
    [
        ("torch", "0.0.1", torch.__version__, "0.0.1"),
        ("moe_dist", "0.0.1", greeting.facts_of_process(torch.device("cpu"))["moe_dist"], "0.0.1"),
        ("environment.MOE_DIST_DEBUG", "1", "off", "on"),
        ("environment.MOE_DIST_DEBUG", "maybe", "off", "maybe"),
        ("environment.NVIDIA_TF32_OVERRIDE", "1", "not set", "1"),
    ],
)
def test_a_process_that_is_not_as_the_others_is_refused(
    pool: Pool, what: str, value: str, others: str, own: str
) -> None:
    for first, later in pool.run(3, strange_process, what, value):
        assert first == (what, f"must be the same on all ranks (ranks 0, 1: {others}; rank 2: {own})")
        assert later == ("", "")


def test_on_gpus_nccl_and_its_switches_count_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda.nccl, "version", lambda: (2, 28, 9))
    monkeypatch.setenv("NCCL_ALGO", "Ring")
    on_gpus, on_cpus = (greeting.facts_of_process(torch.device(kind)) for kind in ("cuda", "cpu"))
    assert (on_gpus["NCCL"], on_gpus["environment.NCCL_ALGO"]) == ("2.28.9", "Ring")
    assert on_gpus["environment.NCCL_PROTO"] == "not set"
    assert {f"environment.{name}" for name in switches.NCCL_SWITCHES} == on_gpus.keys() - on_cpus.keys() - {"NCCL"}


# Layers


def strange_layer(comm: Comm, what: str) -> tuple[str, str]:
    """Rank 1's layer differs. On a GPU only a first step meets, so that is what runs here."""
    kind = "fp8_tensor_static" if what == "shard.a13" else "fp8_block"
    shared = {"shared_experts": "replicated", "shared_intermediate": 128} if what == "shared" else {}
    spec, odd = SPEC.with_changes(quant=kind, router_bias=what == "router.weight, bias", **shared), comm.rank == 1
    machine = Machine.detect("cpu")
    plan = make_plan(spec, ParallelSpec(ep=comm.world), exchange="all_to_all", backend="torch", machine=machine)
    own = shard(random_weights(spec, 0), plan.placement, comm.rank)
    given: dict[str, Any] = {}
    if what == "shard.a13" and odd and own.a13 is not None:
        own = own.with_tensors(a13=own.a13 * 2)
    if what == "shared":
        given["shared"] = random_expert(spec.shared_spec(), spec.num_experts, int(odd))
    if what == "router.weight":
        given["router"] = Router(plan, Stream("gate", 0).normal(8, 128) + float(odd))
    if what == "router.weight, bias":
        given["router"] = Router(plan, Stream("gate", 0).normal(8, 128), logit_bias_E=torch.full((8,), float(odd)))
    layer = MoELayer(plan, own, comm, debug=what == "debug" and odd, **given)
    x, routing = Stream("tokens", comm.rank).normal(4, 128).bfloat16(), synthetic_routing(spec, 4, "uniform", 0)
    before, MoELayer.meets = MoELayer.meets, False
    try:
        found = said_by(lambda: layer(x, routing, max_tokens_per_rank=4, captured=what == "captured" and odd))
        if what == "":
            counted, meet = [], comm.meet
            comm.meet = lambda *given: (counted.append(given), meet(*given))[1]
            said_by(lambda: layer(x, routing, max_tokens_per_rank=4))
            assert not counted, "only the first step meets"
        return found
    finally:
        MoELayer.meets = before
        comm.__dict__.pop("meet", None)
        assert not comm._user.guarded


@pytest.mark.parametrize(
    "what", ["", "shard.a13", "shared", "router.weight", "router.weight, bias", "debug", "captured"]
)
def test_a_layer_that_is_not_as_the_others_is_refused_in_its_first_step(pool: Pool, what: str) -> None:
    for field, rule in pool.run(3, strange_layer, what):
        assert field == what.partition(",")[0]
        if what == "debug":
            assert rule == "must be the same on all ranks (ranks 0, 2: False; rank 1: True)"
        elif what == "captured":
            assert rule == "must be the same on all ranks, alike are: ranks 0, 2; rank 1"
        elif what:
            assert rule.startswith("must be the same on all ranks (ranks 0, 2: ")
            assert "; rank 1: " in rule


def strange_table(comm: Comm, folder: str, broken: bool) -> tuple[str, str]:
    """Plans for GPUs, with a user's tuning table that only rank 1 has, and which may be no JSON."""
    before = os.environ.get("MOE_DIST_CACHE")
    os.environ["MOE_DIST_CACHE"] = f"{folder}/{comm.rank}"
    try:
        plan = make_plan(
            SPEC, ParallelSpec(ep=comm.world), exchange="all_to_all", backend="triton", machine=Machine.named("h200x2")
        )
        (part, revision), *_ = plan.tuned_parts()
        if comm.rank == 1:
            write_table(part.shape, revision)
            if broken:
                (Path(folder) / "1" / "tables" / part.shape.file_name).write_text("{")
                find_table.cache_clear()
        return said_by(lambda: comm.compare(plan_facts(plan)))
    finally:
        os.environ.pop("MOE_DIST_CACHE") if before is None else os.environ.update(MOE_DIST_CACHE=before)
        find_table.cache_clear()


def write_table(shape: Shape, revision: int) -> None:
    entry = Entry(config={"block_m": 16}, us=3.0, floor_us=None, default_us=4.0, err_oracle=0.01)
    table = TuningTable(
        shape=shape, revision=revision, date="2026-01-01", commit="abc", command="tune", machine={}, entries={8: entry}
    )
    table.write(Path(os.environ["MOE_DIST_CACHE"]) / "tables")


@pytest.mark.parametrize("broken", [False, True])
def test_tuning_tables_that_differ_are_refused(pool: Pool, tmp_path: Path, broken: bool) -> None:
    for field, rule in pool.run(2, strange_table, str(tmp_path), broken):
        assert field.startswith("table triton--")
        assert "(rank 0: none; rank 1: " in rule
        assert ("is no valid JSON" if broken else "of 2026-01-01, commit abc, checksum ") in rule


# How it is told


def told(comm: Comm, facts: list[dict[str, str]]) -> tuple[str, str]:
    return said_by(lambda: comm.compare(facts[comm.rank]))


def test_what_a_rank_does_not_have_is_none_of_its_affair(pool: Pool) -> None:
    assert pool.run(3, told, [{"a": "1"}, {"a": "1", "b": "x"}, {"b": "x"}]) == [("", "")] * 3


def test_many_fields_and_long_values_are_cut(pool: Pool) -> None:
    facts = [{f"field {n:02}": f"{rank} " * 500 for n in range(20)} for rank in range(3)]
    for field, rule in pool.run(3, told, facts):
        assert field == "field 00"
        assert rule.count("so must") == 1
        assert rule.endswith(" and 14 more")
        assert "rank 2: " in rule
        assert len(rule) < 8_000
