"""What the integrations do without the library that they are for, and how a step is chosen: eager or one of its graphs.
The rest is in tests/stacks, which has the libraries."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import PackageNotFoundError
from typing import Any

import pytest
import torch
import torch.distributed as dist
from dist.pool import Pool, group_of

import moe_dist.integrations.transformers as integration
from moe_dist import Comm, MoELayer, MoESpec, ParallelSpec, Routing, make_plan
from moe_dist.errors import ConfigError, InstallationError, UnsupportedError
from moe_dist.integrations.transformers import steps as steps_module
from moe_dist.integrations.transformers.comms import comm_of
from moe_dist.integrations.transformers.settings import Settings
from moe_dist.integrations.transformers.steps import Steps
from moe_dist.model.routing import route
from moe_dist.model.weights import shard
from moe_dist.step import Support
from moe_dist.workloads.random_weights import random_weights

SPEC = MoESpec(hidden=32, intermediate=32, num_experts=4, top_k=2, quant="none", dtype="fp32")


def test_importing_it_imports_no_transformers() -> None:
    code = (
        "import sys, moe_dist, moe_dist.integrations.transformers as i;"
        "i.register; i.replace_experts; assert 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
    assert set(integration.__all__) <= set(dir(integration))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        integration.nothing  # noqa: B018


def test_without_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    def nowhere(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr("moe_dist.integrations.package.version", nowhere)
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.delitem(sys.modules, "transformers.integrations.moe", raising=False)
    for call in (integration.register, lambda: integration.replace_experts(torch.nn.Linear(1, 1), token_layout="even")):
        with pytest.raises(InstallationError, match=r"transformers is not installed.*checked against"):
            call()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"exchange": "alltoall"}, "exchange = 'alltoall'"),
        ({"backend": "torhc"}, "backend = 'torhc': no backend has this name; did you mean torch"),
        ({"graph_buckets": [8]}, r"graph_buckets = \[8\]: are sizes of steps"),
        ({"graph_buckets": (True,)}, "graph_buckets = "),
        ({"graph_buckets": (0, 8)}, "graph_buckets = .*not ascending sizes"),
        ({"graph_buckets": (8, 8)}, "graph_buckets = .*not ascending sizes"),
        ({"timeout_s": "5"}, "timeout_s = '5': bounds every wait"),
    ],
)
def test_settings_that_can_not_be(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Settings(**arguments)


class Recorded:
    """In the place of a StepGraph, which needs a GPU: runs eagerly, into one buffer, and says that it was there."""

    made: list[int]  # the buckets, in the order of captures

    def __init__(self, layer: MoELayer, bucket: int, x: torch.Tensor, routing: Routing) -> None:
        self.layer, self.y = layer, torch.zeros(bucket, SPEC.hidden)
        self.bucket = bucket
        self.made.append(bucket)

    def __call__(self, x: torch.Tensor, routing: Routing) -> torch.Tensor:
        self.y[: len(x)] = self.layer(x, routing, max_tokens_per_rank=self.bucket)
        return self.y[: len(x)]


def layer_on(comm: Comm, layout: Any) -> MoELayer:
    exchange = "local" if comm.world == 1 else {"replicated": "all_reduce", "sharded": "ag_rs"}[layout]
    plan = make_plan(SPEC, ParallelSpec(ep=comm.world), exchange=exchange, backend="torch", token_layout=layout)
    return MoELayer(plan, shard(random_weights(SPEC, 0), plan.placement, comm.rank), comm)


def tokens(count: int, seed: int = 1) -> tuple[torch.Tensor, Routing]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, SPEC.hidden, generator=generator)
    return x, route(torch.randn(count, SPEC.num_experts, generator=generator), SPEC)


def buckets_taken(comm: Comm, layout: str, counts: list[list[int]]) -> list[int]:
    """Of graphs for 2 and 8 tokens, those that were captured in steps of counts[step][rank] tokens; each result is
    compared with a layer that has no graph."""
    Recorded.made = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(steps_module, "StepGraph", Recorded)
        return taken(comm, layout, counts)


def taken(comm: Comm, layout: str, counts: list[list[int]]) -> list[int]:
    graphed, plain = Steps(layer_on(comm, layout), (2, 8)), Steps(layer_on(comm, layout))
    for step in counts:
        x, routing = tokens(step[comm.rank], seed=comm.rank if layout == "sharded" else 9)
        assert torch.equal(graphed(x, routing), plain(x, routing))
    return Recorded.made


def test_small_steps_take_a_graph_of_the_next_size() -> None:
    assert buckets_taken(Comm.single(), "replicated", [[1], [2], [9], [3], [8]]) == [2, 8]


def test_ranks_take_the_same_graph(pool: Pool) -> None:
    """By the most tokens of any of them where they have their own; none where one has too many for a graph."""
    assert pool.run(2, buckets_taken, "sharded", [[0, 1], [1, 9], [0, 5], [2, 2]]) == [[2, 8]] * 2
    assert pool.run(2, buckets_taken, "replicated", [[5, 5], [1, 1]]) == [[8, 2]] * 2


def test_what_a_graph_gave_is_not_written_to_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps_module, "StepGraph", Recorded)
    Recorded.made = []
    steps = Steps(layer_on(Comm.single(), "replicated"), (8,))
    first = steps(*tokens(3, seed=1))
    kept = first.clone()
    steps(*tokens(3, seed=2))
    assert torch.equal(first, kept)


def test_inside_of_a_capture_the_step_is_part_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph can't be replayed in a capture of another."""
    said: list[dict[str, Any]] = []
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)

    class Layer:
        capturable = Support(True)

        def __call__(self, x: Any, routing: Any, **named: Any) -> Any:
            said.append(named)
            return x

    class OnGpu(list[int]):
        is_cuda = True

    Steps(Layer(), (8,))(OnGpu([1, 2, 3]), None)  # type: ignore[arg-type]
    assert said == [{"max_tokens_per_rank": 3, "captured": True}]
    Layer.capturable = Support(False, "backend torch is not capturable")
    with pytest.raises(UnsupportedError, match=r"a CUDA graph around the model.*backend torch is not capturable"):
        Steps(Layer(), (8,))(OnGpu([1, 2, 3]), None)  # type: ignore[arg-type]


def shared(comm: Comm) -> tuple[bool, bool, bool, bool]:
    group = group_of(comm.world)
    first = comm_of(group, "cpu", 60.0)
    whole = comm_of(None, "cpu", 60.0)
    kept = first.is_of(group), comm_of(group, "cpu", 60.0) is first
    return *kept, comm_of(group, "cpu", 61.0) is first, whole is first or not whole.is_of(dist.group.WORLD)


def test_layers_of_one_process_group_share_a_communicator(pool: Pool) -> None:
    """As long as timeout and device are the same; that of another group is another one."""
    assert pool.run(2, shared) == [(True, True, False, False)] * 2
