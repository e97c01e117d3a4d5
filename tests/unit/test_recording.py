"""Routing recorded from layers, stacks and routers, the files it is saved in, and what `file:PATH` makes of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from unit.test_lines import no_more_than

from moe_dist import Recorder
from moe_dist.bench.case import Case, Experiment
from moe_dist.bench.draws import draws
from moe_dist.comm import Comm
from moe_dist.commands.cli import main
from moe_dist.engine.layer import MoELayer
from moe_dist.engine.planning import make_plan
from moe_dist.engine.router import Router
from moe_dist.engine.stack import MoEStack
from moe_dist.errors import ConfigError, OutputError
from moe_dist.machine.machine import Machine
from moe_dist.model.routing import Routing
from moe_dist.model.spec import MoESpec, ParallelSpec
from moe_dist.workloads.random_weights import random_weights
from moe_dist.workloads.skews import synthetic_routing
from moe_dist.workloads.streams import Stream
from moe_dist.workloads.traces import join_traces, read_trace, save_trace

SPEC = MoESpec(hidden=128, intermediate=128, num_experts=8, top_k=2)
COMM = Comm.single()


def layer_of(seed: int = 0, routed: bool = True) -> MoELayer:
    plan = make_plan(SPEC, ParallelSpec(), exchange="local", backend="torch", machine=Machine.detect("cpu"))
    router = Router(plan, Stream("router of a test", seed).normal(8, 128)) if routed else None
    return MoELayer(plan, random_weights(SPEC, seed), COMM, router=router)


def tokens(count: int, seed: int = 0) -> torch.Tensor:
    return Stream("tokens of a test", seed).normal(count, 128).bfloat16()


def routing_of(count: int, seed: int) -> Routing:
    return synthetic_routing(SPEC, count, "uniform", seed)


def read(path: Path) -> Any:
    return read_trace(SPEC, f"file:{path}")


def same(trace: Any, layer: int, *wanted: Routing) -> bool:
    ids, weights = (torch.cat([getattr(each, name) for each in wanted]) for name in ("ids_TK", "weights_TK"))
    return torch.equal(trace.ids[layer], ids.long()) and torch.equal(trace.weights[layer], weights)


def case_of(path: Path, tokens: int, layers: int = 1) -> Case:
    keys: dict[str, Any] = {"worlds": (1,), "placements": ("tp",), "exchanges": ("local",), "models": (SPEC,)}
    (case,) = Experiment(tokens=(tokens,), skews=(f"file:{path}",), layers=layers, **keys).cases("cpu")
    return case


def test_a_layer_s_own_router_and_routings_that_it_is_given(tmp_path: Path) -> None:
    layer, given = layer_of(), routing_of(4, 1)
    with Recorder(layer) as recorder:
        layer.warm_up(tokens(9), None, 9)  # is no step
        layer(tokens(3))
        layer(tokens(4), given)
        layer(tokens(2), routing=given.rows(0, 2))
    layer(tokens(5))  # nobody listens any more
    recorder.save(tmp_path / "r.pt")
    trace = read(tmp_path / "r.pt")
    assert (trace.layers, trace.rows, trace.steps) == (1, 9, (3, 4, 2))
    assert layer.router is not None
    assert same(trace, 0, layer.router(tokens(3)), given, given.rows(0, 2))


def test_what_is_recorded_is_what_it_was(tmp_path: Path) -> None:
    """A serving stack may reuse its buffers."""
    recorder, routing = Recorder(), routing_of(4, 1)
    recorder.add(routing)
    routing.ids_TK.zero_()
    recorder.save(tmp_path / "r.pt")
    assert same(read(tmp_path / "r.pt"), 0, routing_of(4, 1))


@pytest.mark.parametrize("routed", [True, False])
def test_each_layer_of_a_stack(tmp_path: Path, routed: bool) -> None:
    stack = MoEStack([layer_of(seed, routed) for seed in range(3)])
    steps = [None if routed else [routing_of(count, 10 * count + number) for number in range(3)] for count in (5, 2)]
    seen: list[list[Routing]] = [[], [], []]
    for number, layer in enumerate(stack.layers):
        if layer.router is not None:
            layer.router.register_forward_hook(lambda *call, number=number: seen[number].append(call[2]))
    with Recorder(stack) as recorder:
        for count, routings in zip((5, 2), steps, strict=True):
            stack(tokens(count, count), routings)
    recorder.save(tmp_path / "r.pt")
    trace = read(tmp_path / "r.pt")
    assert (trace.layers, trace.rows, trace.steps) == (3, 7, (5, 2))
    for number in range(3):
        assert same(trace, number, *(seen[number] if routed else [step[number] for step in steps if step]))


def test_a_router_of_a_serving_stack_alone(tmp_path: Path) -> None:
    router = layer_of().router
    assert router is not None
    with Recorder(router) as recorder:
        wanted = router(tokens(6))
    recorder.save(tmp_path / "r.pt")
    assert same(read(tmp_path / "r.pt"), 0, wanted)


def test_what_can_not_be_recorded_is_refused() -> None:
    with pytest.raises(ConfigError, match="recorder = 'Linear': can't be recorded"):
        Recorder(torch.nn.Linear(2, 2))  # type: ignore[arg-type]
    layer = layer_of()
    with Recorder(layer), pytest.raises(ConfigError, match="captured = True: a graph's replays run no Python"):
        layer(tokens(3), captured=True)
    with pytest.raises(ConfigError, match="layer = 2: layers are numbered without gaps"):
        Recorder().add(routing_of(1, 0), layer=2)
    with pytest.raises(ConfigError, match="layer = '0': layers are numbered without gaps"):
        Recorder().add(routing_of(1, 0), layer="0")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="routing = 'tuple'"):
        Recorder().add((1, 2))  # type: ignore[arg-type]


def test_nothing_is_written_over(tmp_path: Path) -> None:
    path = tmp_path / "r.pt"
    with pytest.raises(ConfigError, match="no step"):
        Recorder().save(path)
    uneven = Recorder()
    uneven.add(routing_of(2, 0))
    uneven.add(routing_of(3, 0), layer=1)
    with pytest.raises(ConfigError, match="layer 1 was recorded in steps of other numbers of rows"):
        uneven.save(path)
    path.write_text("mine")
    recorder = Recorder()
    recorder.add(routing_of(2, 0))
    with pytest.raises(ConfigError, match="is there already"):
        recorder.save(path)
    with pytest.raises(ConfigError, match="its folder is not there"):
        recorder.save(tmp_path / "none" / "r.pt")
    assert path.read_text() == "mine"


def test_a_recording_that_finds_no_room_leaves_nothing(tmp_path: Path) -> None:
    """Half of one would be no trace, and would be in the way of the next."""
    path, recorder = tmp_path / "r.pt", Recorder()
    recorder.add(routing_of(500, 0))
    with no_more_than(1000), pytest.raises(OutputError, match=r"r\.pt can't be written: File too large"):
        recorder.save(path)
    assert list(tmp_path.iterdir()) == []
    recorder.save(path)
    assert read_trace(SPEC, f"file:{path}").rows == 500


def test_routings_of_two_models_are_no_one_recording(tmp_path: Path) -> None:
    recorder = Recorder()
    recorder.add(routing := routing_of(3, 0))
    recorder.add(Routing(routing.ids_TK[:, :1], routing.weights_TK[:, :1]))
    with pytest.raises(ConfigError, match=r"recording = \[1, 2\]: experts a token"):
        recorder.save(tmp_path / "r.pt")


def test_ranks_recordings_become_one_in_the_order_of_their_tokens(tmp_path: Path) -> None:
    steps = [[routing_of(5, 1), routing_of(5, 2)], [routing_of(4, 3), routing_of(4, 4)]]  # step, layer
    cuts = [(0, 2, 5), (0, 4, 4)]  # the second rank has no token in the second step
    for rank in range(2):
        recorder = Recorder()
        for step, cut in zip(steps, cuts, strict=True):
            for number, routing in enumerate(step):
                recorder.add(routing.rows(cut[rank], cut[rank + 1]), number)
        recorder.save(tmp_path / f"{rank}.pt")
    join_traces([tmp_path / "0.pt", tmp_path / "1.pt"], tmp_path / "all.pt")
    trace = read(tmp_path / "all.pt")
    assert trace.steps == (5, 4)
    assert same(trace, 0, steps[0][0], steps[1][0])
    assert same(trace, 1, steps[0][1], steps[1][1])
    good = torch.load(tmp_path / "0.pt")
    one_layer = {name: good[name][0] for name in ("ids", "weights")}
    for other in (
        {"ids": good["ids"], "weights": good["weights"]},
        good | one_layer,
        good | {"steps": torch.tensor([2, 3])},
        good | {"steps": torch.tensor([6])},
        good | {"weights": good["weights"][:, 1:]},
    ):
        torch.save(other, tmp_path / "other.pt")
        with pytest.raises(ConfigError, match=r"other\.pt.*no recording of the same layers"):
            join_traces([tmp_path / "0.pt", tmp_path / "other.pt"], tmp_path / "more.pt")


# What file:PATH makes of several layers and steps


def test_layers_and_steps_of_a_trace(tmp_path: Path) -> None:
    """A layer has its own rows, a step the rows that come next, as far as whole steps reach."""
    path = tmp_path / "r.pt"
    layers = [[routing_of(4, 10 * layer + step) for step in range(3)] for layer in range(2)]
    save_trace(path, layers)
    for count, steps in ((4, 3), (5, 2), (12, 1), (20, 1), (1, 3)):
        found = draws(SPEC, case_of(path, count, layers=2).workload, 2)
        assert len(found) == steps
        for step, routings in enumerate(found):
            for layer, routing in enumerate(routings):
                rows = torch.cat([each.ids_TK for each in layers[layer]])
                assert torch.equal(routing.ids_TK, rows[(step * count + torch.arange(count)) % 12])
    ((first,), *_) = draws(SPEC, case_of(path, 4).workload, 1)
    assert torch.equal(first.ids_TK, layers[0][0].ids_TK)  # one layer alone is the first
    with pytest.raises(ConfigError, match="holds 2 layers, and the stack has 3"):
        case_of(path, 4, layers=3)


def test_at_most_eight_steps_are_taken(tmp_path: Path) -> None:
    save_trace(tmp_path / "r.pt", [[routing_of(2, step) for step in range(20)]])
    assert len(draws(SPEC, case_of(tmp_path / "r.pt", 2).workload, 1)) == 8


@pytest.mark.parametrize(
    ("steps", "said"),
    [
        (torch.tensor([1, 3]), "steps of 4 rows"),
        (torch.tensor([4, -1]), "the least of them -1"),
        (torch.tensor(3), "steps ()"),
        (torch.tensor([[3]]), "steps (1, 1)"),
        (torch.tensor([3.0]), "steps of torch.float32"),
        (torch.tensor([], dtype=torch.int64), "steps (0,)"),
    ],
)
def test_steps_that_are_none(tmp_path: Path, steps: torch.Tensor, said: str) -> None:
    path = tmp_path / "r.pt"
    torch.save({"ids": torch.tensor([[0, 1]] * 3), "weights": torch.ones(3, 2), "steps": steps}, path)
    with pytest.raises(ConfigError) as caught:
        read(path)
    assert said in str(caught.value)


def test_a_row_with_an_expert_twice_is_named_with_its_layer(tmp_path: Path) -> None:
    ids = torch.tensor([[[0, 1]], [[2, 2]]])
    torch.save({"ids": ids, "weights": torch.ones(2, 1, 2)}, tmp_path / "r.pt")
    with pytest.raises(ConfigError, match="holds expert 2 twice in row 0 of layer 1"):
        read(tmp_path / "r.pt")


# The command


SMALL = ["--device", "cpu", "model.hidden=64", "model.intermediate=64", "model.num_experts=8", "model.top_k=2"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--record-routing", "{there}"], "--record-routing = '{there}': is there already"),
        (["--record-routing", "{none}/r.pt"], "its folder is not there"),
        (["--record-routing", "{new}", "tokens=[4,8]"], "holds one routing, and there are 2 tokens"),
        (["--record-routing", "{new}", "record_routing={none}"], "contradicts --record-routing"),
        (["--record-routing", "{new}", "--out", "{new}"], "is the file that the routing is saved in"),
        (["--token-split", "odd"], "odd"),
        (["--token-split", "ragged", "--token-layout", "replicated"], "divides sharded tokens"),
        (["--token-split", "ragged", "token_splits=[even]"], "contradicts --token-split ragged"),
    ],
)
def test_what_the_command_refuses(tmp_path: Path, capsys: Any, arguments: list[str], said: str) -> None:
    paths = {"there": tmp_path / "there", "none": tmp_path / "none", "new": tmp_path / "new.pt"}
    paths["there"].write_text("")
    assert main(["run", *(each.format(**paths) for each in arguments), *SMALL]) == 2
    assert said.format(**paths) in capsys.readouterr().err
    assert not paths["new"].exists()


def test_a_plan_counts_the_tokens_of_the_rank_with_most(capsys: Any) -> None:
    for split, pairs in (("even", 8), ("one_rank", 16)):
        assert main(["plan", "--ep", "2", "--tokens", "4", "--token-split", split, *SMALL]) == 0
        assert f"at most {pairs} (token, expert) pairs" in capsys.readouterr().out


def test_a_plan_s_bytes_are_those_of_the_rank_with_most(capsys: Any) -> None:
    sent = []
    for count, split in (("4", "one_rank"), ("8", "even")):
        assert main(["plan", "--ep", "2", "--tokens", count, "--token-split", split, "--json", *SMALL]) == 0
        sent.append(json.loads(capsys.readouterr().out)["wire_bytes"])
    assert sent[0] == sent[1] > 0
