"""What a user may hand to a layer's doors by mistake: each is refused by field, value and rule, or does no harm."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_dist import Comm, MoELayer, MoESpec, MoEStack, ParallelSpec, Routing, load_layer, make_plan
from moe_dist.checkpoint import make_checkpoint
from moe_dist.engine.fitting import check_fit
from moe_dist.engine.inputs import routing_from
from moe_dist.engine.router import Router
from moe_dist.errors import ConfigError
from moe_dist.integrations.local_experts import LocalExperts
from moe_dist.machine.machine import Machine
from moe_dist.model.spec import MOST_TOKENS
from moe_dist.model.weights import shard
from moe_dist.workloads.random_weights import random_weights
from moe_dist.workloads.skews import synthetic_routing
from moe_dist.workloads.streams import Stream

SPEC = MoESpec(hidden=128, intermediate=128, num_experts=8, top_k=2)
PLAIN = SPEC.with_changes(quant="none")
ALONE, CPU, COMM = ParallelSpec(), Machine.detect("cpu"), Comm.single()


def plan_of(spec: Any = SPEC, parallel: Any = ALONE, **given: Any) -> Any:
    return make_plan(spec, parallel, **{"exchange": "local", "backend": "torch", "machine": CPU} | given)


def layer_of(**given: Any) -> MoELayer:
    parts = {"plan": plan_of(), "shard": random_weights(SPEC, 0), "comm": COMM} | given
    return MoELayer(parts.pop("plan"), parts.pop("shard"), parts.pop("comm"), **parts)


def experts_of(**given: Any) -> LocalExperts:
    parts = {"backend": "torch", "spec": PLAIN, "weights": random_weights(PLAIN, 0)} | given
    return LocalExperts(**parts)


def inputs() -> tuple[torch.Tensor, Routing]:
    return Stream("attacks", 0).normal(4, 128).bfloat16(), synthetic_routing(SPEC, 4, "uniform", 0)


def nested() -> torch.Tensor:
    rows = [torch.zeros(128, dtype=torch.bfloat16)] * 2
    return torch.nested.nested_tensor(rows, layout=torch.jagged)


X, ROUTING = inputs()
IDS, WEIGHTS = ROUTING.ids_TK, ROUTING.weights_TK

LAYERS: dict[str, Callable[[], Any]] = {
    "plan = 'NoneType': is no Plan": lambda: layer_of(plan=None),
    "plan = 'MoESpec': is no Plan": lambda: layer_of(plan=SPEC),
    "comm = 'NoneType': is no Comm": lambda: layer_of(comm=None),
    "comm = 'str': is no Comm": lambda: layer_of(comm="cpu"),
    "shard = 'NoneType'": lambda: layer_of(shard=None),
    "router = 'Linear': is no Router": lambda: layer_of(router=torch.nn.Linear(128, 8)),
    "router = 'function': is no Router": lambda: layer_of(router=lambda x: ROUTING),
    "debug = 'no': switches": lambda: layer_of(debug="no"),
    "debug = 2: switches": lambda: layer_of(debug=2),
    "x.layout = 'nested'": lambda: layer_of()(nested(), ROUTING),
    "routing.ids.layout = torch.sparse_coo": lambda: layer_of()(X, Routing(IDS.to_sparse(), WEIGHTS)),
    f"max_tokens_per_rank = {MOST_TOKENS + 1}": lambda: layer_of()(X, ROUTING, max_tokens_per_rank=MOST_TOKENS + 1),
    "plan = 'NoneType': is no Plan (legal: what": lambda: Router(None, torch.zeros(8, 128)),
    "layers = 'NoneType': is no list": lambda: MoEStack(None),
    "layers = 'int': is no list": lambda: MoEStack(3),
    "routings[1].ids = 94": lambda: MoEStack([layer_of(), layer_of()])(
        X, [ROUTING, Routing(IDS.clone().fill_(94), WEIGHTS)]
    ),
    "token_layout = 'x': unknown (legal: replicated, sharded)": lambda: plan_of(token_layout="x"),
    "token_layout = None: unknown": lambda: plan_of(token_layout=None),
    "exchange = ['local']: no exchange has this name": lambda: plan_of(exchange=["local"]),
    "spec = 'small': is str": lambda: plan_of(spec="small"),
    "parallel = {'ep': 2}: is dict": lambda: plan_of(parallel={"ep": 2}),
}


@pytest.mark.parametrize("said", LAYERS)
def test_what_is_handed_to_a_layer_by_mistake(said: str) -> None:
    with pytest.raises(ConfigError) as raised:
        LAYERS[said]()
    assert str(raised.value).startswith(said)


def test_a_second_bias_in_every_slice_would_count_several_times() -> None:
    spec = PLAIN.with_changes(expert_bias=True)
    plan, whole = plan_of(spec, ParallelSpec(tp=2), exchange="all_reduce"), random_weights(spec, 0)
    for rank in range(2):
        check_fit(plan, shard(whole, plan.placement, rank), None, None, Comm(rank, 2, torch.device("cpu")))
    everywhere = shard(whole, plan.placement, 1).with_tensors(b2_eH=whole.b2_eH)
    with pytest.raises(ConfigError, match=r"^shard\.b2 = .*: rank 1 has .* from column 64 on; .*legal: zeros"):
        check_fit(plan, everywhere, None, None, Comm(1, 2, torch.device("cpu")))


LOCAL: dict[str, Callable[[], Any]] = {
    "spec = 'NoneType': is no MoESpec": lambda: experts_of(spec=None),
    "weights = 'NoneType': is no ExpertWeights": lambda: experts_of(weights=None),
    "spec.weights_on_input = True: weights multiply what comes out": lambda: experts_of(
        spec=PLAIN.with_changes(top_k=1, weights_on_input=True)),
    "spec.token_gate = True: no gate is computed here": lambda: experts_of(
        spec=(gated := PLAIN.with_changes(num_experts=1, top_k=1, token_gate=True)), weights=random_weights(gated, 0)),
    "held = [0, 0, 1, 2, 3, 4, 5, 6]: must give each slot": lambda: experts_of(held=[0, 0, 1, 2, 3, 4, 5, 6], ids=8),
    "held = [0, 1]: must give each slot": lambda: experts_of(held=[0, 1], ids=8),
    "held = [-1, 1, 2, 3, 4, 5, 6, 7]: must": lambda: experts_of(held=[-1, 1, 2, 3, 4, 5, 6, 7], ids=8),
    "held = [0, 1, 2, 3, 4, 5, 6, 99]: must": lambda: experts_of(held=[0, 1, 2, 3, 4, 5, 6, 99], ids=8),
    "held = '01234567': is no list": lambda: experts_of(held="01234567", ids=8),
    "ids = 3: is the number of ids, of which 8": lambda: experts_of(ids=3),
    "routing.ids = 'list'": lambda: experts_of()(X, IDS.tolist(), WEIGHTS),
    "routing.weights = 'NoneType'": lambda: experts_of()(X, IDS, None),
    "routing.ids.dtype = torch.float32": lambda: experts_of()(X, IDS + 0.5, WEIGHTS),
    "routing.ids.dtype = torch.bool": lambda: experts_of()(X, IDS > 0, WEIGHTS),
    "routing.weights.dtype = torch.int32": lambda: experts_of()(X, IDS, WEIGHTS.int()),
    "routing.weights.dtype = torch.complex64": lambda: experts_of()(X, IDS, WEIGHTS.to(torch.complex64)),
    "routing.weights = nan: of token 2, place 1": lambda: experts_of()(X, IDS, WEIGHTS.clone().index_put_(
        (torch.tensor(2), torch.tensor(1)), torch.tensor(float("nan")))),
}  # fmt: skip


@pytest.mark.parametrize("said", LOCAL)
def test_what_is_handed_to_local_experts_by_mistake(said: str) -> None:
    with pytest.raises(ConfigError) as raised:
        LOCAL[said]()
    assert str(raised.value).startswith(said)


def test_ids_beyond_32_bits_are_no_expert_and_not_another_one() -> None:
    experts = experts_of()
    assert experts(X, IDS.long(), WEIGHTS).any()
    for beyond in (1 << 32, -(1 << 32), 1 << 62):
        assert not experts(X, IDS.long() + beyond, WEIGHTS).any()
    assert routing_from(IDS.long() - (1 << 40), WEIGHTS, look=True).ids_TK.unique().tolist() == [-2]
    assert torch.equal(routing_from(IDS.to(torch.uint8), WEIGHTS.double(), look=True).ids_TK, IDS)


def test_views_that_lie_oddly_in_memory_are_read_right() -> None:
    layer = layer_of()
    expected = layer(X, ROUTING)
    for odd in (X.T.contiguous().T, torch._neg_view(-X), torch.cat([X, X], 1)[:, :128]):
        assert torch.equal(layer(odd, ROUTING), expected)
    turned = Routing(IDS.T.contiguous().T, WEIGHTS.T.contiguous().T)
    assert torch.equal(layer(X, turned), expected)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("attacked")
    return make_checkpoint(folder / "m", model_type="qwen3_moe", hidden=128, intermediate=128, num_experts=4, top_k=2)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"token_layout": "x"}, "token_layout = 'x': unknown"),
        ({"token_layout": None}, "token_layout = None: unknown"),
        ({"exchange": ["local"]}, "exchange = ['local']: no exchange has this name"),
        ({"exchange": ""}, "exchange = '': no exchange has this name"),
        ({"comm": "cpu"}, "comm = 'cpu': is str"),
        ({"progress": 3}, "progress = 3: is called after each expert"),
    ],
)
def test_what_is_handed_to_load_layer_by_mistake(checkpoint: Path, given: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as raised:
        load_layer(checkpoint, 1, **given)
    assert str(raised.value).startswith(said)


def test_a_checkpoint_without_a_name() -> None:
    """Under the argument's own name; the commands call it as the user did."""
    with pytest.raises(ConfigError, match=r"^checkpoint = '': is empty"):
        load_layer("", 1)


class Around(torch.nn.Module):
    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.inner(x)


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
@pytest.mark.parametrize("stacked", [False, True])
def test_what_would_leave_the_process_of_its_communicator(checkpoint: Path, stacked: bool) -> None:
    layer = load_layer(checkpoint, 1)
    module = Around(MoEStack([layer]) if stacked else layer)
    read = pickle.loads(pickle.dumps(module))  # of one rank
    assert torch.equal(read(X), module(X))
    assert copy.copy(layer).paths is layer.paths
    layer.comm = Comm(0, 2, torch.device("cpu"))
    for written in (pickle.dumps, lambda whole: torch.save(whole, io.BytesIO())):
        with pytest.raises(ConfigError, match=r"^comm = 'that of rank 0 of 2': belongs .* can be pickled \(legal: "):
            written(module)
    layer.comm = Comm.single()
    with pytest.raises(ConfigError, match=r"^layer = 'inside of torch\.export': it works with its process's ranks"):
        torch.export.export(module, (X,))
    with pytest.raises(ConfigError, match=r"^layer = 'inside of torch\.jit\.trace': it works"):
        torch.jit.trace(module, (X,))
    with pytest.raises(Exception, match=r"it works with its process's ranks"):  # torch's own, with our reason
        torch.export.export(module, (X,), strict=True)
    assert torch.equal(module(X), torch.compile(module, backend="eager")(X))
