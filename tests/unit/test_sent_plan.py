"""One plan for all ranks, and rows that are labelled with what they say they ran."""

from dataclasses import replace

import pytest
import torch

from moe_dist.bench.case import Case
from moe_dist.bench.findings import merge
from moe_dist.bench.measure import measure
from moe_dist.bench.results import make_row
from moe_dist.comm import Comm
from moe_dist.errors import ConfigError, MoeDistError
from moe_dist.machine.machine import Machine, check_machine
from moe_dist.model.spec import MoESpec
from moe_dist.runtime.context import RankContext

CPU = Machine("cpu", 1, "a test's CPU")
CASE = Case(
    model=MoESpec(hidden=256, intermediate=256, num_experts=4, top_k=2),
    parallel={},
    exchange="local",
    backend="torch",
    workload={"tokens": 5},
    iters=2,
)


def measured(plan):
    return measure(RankContext(Comm.single("cpu"), "test"), CASE, plan)


def test_a_row_is_labelled_by_what_ran_and_not_by_what_was_asked_for():
    asked = CASE.plan(CPU)
    other = replace(asked, choices=(replace(asked.choice(), exchange="ag_rs", form="expert"),))
    result = measured(other)
    row = make_row(CASE, asked, merge([result]), "test")
    assert (row.exchange, row.form, row.backend) == ("ag_rs", "expert", "torch")
    assert row.ok


def test_ranks_that_ran_different_things_have_no_row():
    result = measured(CASE.plan(CPU))
    other = replace(result, ran=replace(result.ran, backend="triton"))
    with pytest.raises(MoeDistError, match=r"ranks ran different things: rank 0: .*torch.*; rank 1: .*triton"):
        merge([result, other])


def test_a_plan_for_another_device_is_refused_where_it_comes():
    gpu = Machine("cuda", 4, "NVIDIA H200", (9, 0), 1 << 37)
    plan = replace(CASE.plan(CPU), machine=gpu)
    with pytest.raises(ConfigError, match=r"machine = 'cpu'.*not what the plan was made for.*NVIDIA H200"):
        measured(plan)
    check_machine(CPU, torch.device("cpu"))  # the CPU's name is of no account
