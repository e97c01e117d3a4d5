"""Scratch that steps share: who gets what, and when it grows."""

from __future__ import annotations

import threading
import weakref

import pytest
import torch

from moe_dist.comm import Comm
from moe_dist.engine.layer import MoELayer
from moe_dist.engine.planning import make_plan
from moe_dist.machine.machine import Machine
from moe_dist.model.spec import MoESpec, ParallelSpec
from moe_dist.step import Workspace, workspace, workspace_of
from moe_dist.step.workspace import ALIGNMENT, GRAIN, MOST_VIEWS
from moe_dist.workloads.random_weights import random_weights
from moe_dist.workloads.skews import synthetic_routing

CPU = torch.device("cpu")
WANTED = [((3, 5), torch.float32), ((7,), torch.int32), ((2, 0, 4), torch.bfloat16), ((11, 128), torch.float8_e4m3fn)]


def taken(made: Workspace) -> list[torch.Tensor]:
    made.begin()
    return [made.take(shape, dtype) for shape, dtype in WANTED]


def test_tensors_of_a_step_do_not_overlap():
    made = Workspace(CPU)
    for _ in range(3):  # beyond the arena, in it, and once more
        tensors = taken(made)
        for number, (tensor, (shape, dtype)) in enumerate(zip(tensors, WANTED, strict=True)):
            assert (tuple(tensor.shape), tensor.dtype) == (shape, dtype)
            assert tensor.is_contiguous()
            assert tensor.data_ptr() % 16 == 0
            tensor.view(torch.uint8).fill_(number)
        for number, tensor in enumerate(tensors):
            assert (tensor.view(torch.uint8) == number).all()


def test_the_next_step_gets_the_same_memory():
    made = Workspace(CPU)
    taken(made)
    first, second = taken(made), taken(made)
    assert [one.data_ptr() for one in first] == [one.data_ptr() for one in second]
    assert all(one is other for one, other in zip(first, second, strict=True))
    assert made.nbytes == GRAIN
    assert made.high_water == 2 * ALIGNMENT + 11 * 128 + 128  # the empty one takes nothing


def test_it_grows_between_steps_and_never_shrinks():
    made = Workspace(CPU)
    sizes = []
    for rows in (1, 3_000_000, 5, 3_000_001, 1):
        made.begin()
        made.take((rows,), torch.uint8)
        made.begin()
        sizes.append(made.nbytes)
    assert sizes == [GRAIN, 3 * GRAIN, 3 * GRAIN, 3 * GRAIN, 3 * GRAIN]


def test_what_an_earlier_arena_holds_stays_with_who_holds_it():
    made = Workspace(CPU)
    made.reserve(100)
    made.begin()
    kept, arena = made.take((4,), torch.int32).fill_(7), made.arena
    made.reserve(GRAIN + 1)
    made.begin()
    made.take((4,), torch.int32).fill_(8)
    assert made.arena is not arena
    assert kept.tolist() == [7] * 4


def test_steps_of_ever_new_sizes_collect_no_views():
    made = Workspace(CPU)
    made.reserve(GRAIN)
    for rows in range(MOST_VIEWS + 10):
        made.begin()
        made.take((rows,), torch.uint8)
    assert len(made._views) <= MOST_VIEWS


def test_tensors_made_in_inference_mode_can_be_filled_outside():
    made = Workspace(CPU)
    with torch.inference_mode():
        taken(made)
        taken(made)
    for tensor in taken(made):
        tensor.zero_()


def test_each_thread_has_its_own():
    found = []
    thread = threading.Thread(target=lambda: found.extend([workspace_of(CPU), workspace_of(CPU)]))
    thread.start()
    thread.join()
    assert found[0] is found[1]
    assert workspace_of(CPU) is workspace_of(CPU)
    assert workspace_of(CPU) is not found[0]


def test_a_thread_s_scratch_ends_with_it():
    found = []

    def step():
        made = workspace_of(CPU)
        made.reserve(GRAIN)
        found.append(weakref.ref(made))

    thread = threading.Thread(target=step)
    thread.start()
    thread.join()
    assert found[0]() is None


def test_views_that_are_known_count_too():
    made = Workspace(CPU)
    taken(made)
    taken(made)
    most, made.high_water = made.high_water, 0
    taken(made)
    assert made.high_water == most > 0


def test_a_thread_that_replays_a_graph_takes_its_workspace_over():
    mine = workspace_of(CPU)
    thread = threading.Thread(target=mine.enter)
    thread.start()
    thread.join()
    assert workspace_of(CPU) is not mine


@pytest.mark.parametrize("layout", ["sharded", "replicated"])
def test_a_hundred_layers_need_the_scratch_of_one(layout, monkeypatch):
    monkeypatch.setattr(workspace, "_own", workspace._Own())
    spec = MoESpec(hidden=256, intermediate=256, num_experts=4, top_k=2)
    machine = Machine("cpu", 1, "a test's CPU")
    plan = make_plan(spec, ParallelSpec(), exchange="ag_rs", backend="torch", token_layout=layout, machine=machine)
    weights = random_weights(spec, seed=1)
    layers = [MoELayer(plan, weights, Comm.single()) for _ in range(100)]
    x, routing = torch.randn(40, 256).bfloat16(), synthetic_routing(spec, 40, "uniform", 1)
    first = layers[0](x, routing)
    alone = workspace_of(CPU).high_water
    assert alone > 0
    for layer in layers:
        assert torch.equal(layer(x, routing), first)
    assert workspace_of(CPU).high_water == alone
    assert first is not layers[0](x, routing)  # what a layer gave stays: it is no scratch


def test_poisoned_scratch_is_nan_and_no_expert_in_the_arena_and_beside_it():
    made = Workspace(CPU)
    for _ in range(2):  # beside the arena, then in it
        made.begin(poisoned=True)
        floats = [made.take((5, 3), dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16)]
        assert all(tensor.isnan().all() for tensor in floats)
        assert made.take((4, 128), torch.float8_e4m3fn).float().isnan().all()
        assert (made.take((7,), torch.int32) == -1).all()
        made.take((100, 128), torch.float32).zero_()
    made.begin()
    assert (made.arena[-1] == 0xFF).all()
    made.arena.zero_()
    made.begin()
    assert not made.take((5, 3), torch.float32).any(), "without the switch nothing is written"
