"""The experts that one rank of another serving stack holds, run by one of our backends. Router, exchange, placement and
weights are the stack's; nothing here is collective."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moe_dist.backends import BACKENDS, Backend, Problem
from moe_dist.engine.inputs import (
    check_gradient,
    check_routing,
    check_shard,
    check_tokens,
    check_weights,
    plain_rows,
    routing_from,
)
from moe_dist.errors import ConfigError, UnsupportedError
from moe_dist.kernels import slots_on
from moe_dist.machine.machine import Machine
from moe_dist.machine.surroundings import settled
from moe_dist.machine.switches import debug_asked_for
from moe_dist.messages.counts import count_of
from moe_dist.model.placement import Placement, tables_on
from moe_dist.model.spec import MoESpec
from moe_dist.model.weights import ExpertWeights
from moe_dist.step import Step, Support, TokenRows, Whole, workspace_of


def backend_for(name: str, problem: Problem) -> type[Backend]:
    """Raises ConfigError for a name that no backend has, UnsupportedError with the reason for what it can't compute."""
    backend = BACKENDS.get(name)
    support = backend.supports(problem)
    if "token" not in backend.takes:
        support = Support(False, "computes whole layers, exchange included, and not the experts of one rank")
    if not support.ok:
        raise UnsupportedError(f"backend {name} for {_sizes(problem)}", [support.reason])
    return backend


def problem_of(spec: MoESpec, experts: int, device: torch.device) -> Problem:
    """Of a rank that holds `experts` experts. `spec.intermediate` is its slice, `spec.num_experts` are those of all
    ranks, as tuning tables have it."""
    machine = Machine.detect(device.type)
    return Problem(spec, spec.intermediate, experts, machine.device, machine.capability, "none", machine.device_name)


class LocalExperts:
    """`weights` stay the stack's: they are read where they lie, and turned there if the backend wants [up; gate].

    `held`: of each local slot the id that the stack's router gives its expert, out of `ids` such ids; without it the
    ids are the slots. Raises ConfigError and UnsupportedError for what the backend can't compute, before it builds or
    launches anything.
    """

    def __init__(
        self, backend: str, spec: MoESpec, weights: ExpertWeights, held: Sequence[int] | None = None, ids: int = 0
    ) -> None:
        for field, value, kind in (("spec", spec, MoESpec), ("weights", weights, ExpertWeights)):
            if not isinstance(value, kind):
                raise ConfigError(field, type(value).__name__, f"is no {kind.__name__}", kind.__name__)
        _check_spec(spec)
        device, experts = weights.device, weights.num_experts
        _check_held(held, ids, experts)
        problem = problem_of(spec, experts, device)
        backend_class = backend_for(backend, problem)
        check_shard("weights", weights, spec, experts, spec.intermediate, device, "this rank")
        self.name, self.spec, self.weights, self.device = backend, spec, weights, device
        self._placement = _placement(spec, range(experts) if held is None else held, ids or experts)
        self._tables = tables_on(self._placement, device)  # graphs read them: they must not be dropped from the cache
        self._arenas: list[Tensor] = []
        self._debug = debug_asked_for()
        gate_first = weights.gate_first
        backend_class.build()
        self.backend = backend_class(problem)
        self.backend.prepare(weights)
        if weights.gate_first != gate_first and backend_class.gate_first is None:
            weights.turn(gate_first)
            reason = "it re-lays weights in place and does not declare so (Backend.gate_first)"
            raise UnsupportedError(f"backend {backend} on another stack's weights", [reason])

    def __call__(self, x_TH: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        """x [T, H] bf16, ids [T, K] of any integer dtype, weights [T, K] of any float dtype, to this rank's weighted
        partial sums [T, H] in bf16, in memory that no later step writes to. An id that no slot has adds nothing. T may
        be zero. Neither waits for the device nor lets the host wait, if the backend is capturable.

        Raises ConfigError for other shapes, dtypes and devices, and on a CPU or in the debug mode for a weight that is
        NaN or infinite beside an expert's id; UnsupportedError in a CUDA graph for a backend that
        can't be captured.
        """
        y_TH: Tensor = self._run(x_TH, ids_TK, weights_TK)
        return y_TH

    @torch.compiler.disable
    def _run(self, x_TH: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        check_gradient("x", x_TH)
        with torch.no_grad(), settled(self.device):
            check_tokens(x_TH, self.spec, self.device)
            captured = self.device.type == "cuda" and torch.cuda.is_current_stream_capturing()
            look = self.device.type == "cpu" or (self._debug and not captured)
            routing = routing_from(ids_TK, weights_TK, look)
            check_routing(routing, len(x_TH), self.spec, self.device)
            if look:
                check_weights(routing, self._placement.num_experts)
            workspace = workspace_of(self.device)
            if captured:
                self._keep(workspace.arena)
            workspace.begin(poisoned=self._debug)
            slots_TK = slots_on(self._placement, 0, routing.ids_TK, None, workspace.take)
            rows = TokenRows(plain_rows(x_TH), slots_TK, routing.weights_TK)
            step = Step(workspace, captured=captured)
            sink = Whole(step, (len(x_TH), self.spec.hidden), torch.bfloat16, self.device, lasting=True)
            self.backend.forward(step, rows, sink)
            return sink.y

    def reads(self, *tensors: Tensor) -> bool:
        """Whether the stack's w13, w2 and their scales still lie where they were prepared. Their values may change."""
        held = self.weights
        own = [each for each in (held.w13_eFH, held.w2_eHi, held.s13, held.s2) if each is not None]
        return [each.data_ptr() for each in own] == [each.data_ptr() for each in tensors]

    def _keep(self, arena: Tensor) -> None:
        """The graph that is being captured writes to it for as long as it is replayed, and the graph is the stack's."""
        if not self.backend.capturable:
            raise UnsupportedError("a CUDA graph", [f"backend {self.name} can't be captured"])
        if not any(each is arena for each in self._arenas):
            self._arenas.append(arena)


def _check_spec(spec: MoESpec) -> None:
    """Raise ConfigError for what a layer does around its backend, and nobody would here."""
    rules = {
        "weights_on_input": "weights multiply what comes out of these experts; whoever wants them on the inputs"
        " multiplies the tokens and gives weights of 1",
        "token_gate": "no gate is computed here; whoever has one gives its values as weights",
    }
    for name, rule in rules.items():
        if getattr(spec, name):
            raise ConfigError(f"spec.{name}", True, rule, (False,))


def _check_held(held: Sequence[int] | None, ids: int, experts: int) -> None:
    """Raise ConfigError unless each of so many slots has an id of its own."""
    if type(ids) is not int or not (ids >= experts or ids == 0):
        raise ConfigError("ids", ids, f"is the number of ids, of which {experts} are held here", f"{experts} and more")
    if held is None:
        return
    legal = f"{experts} different ids, 0 to {(ids or experts) - 1}"
    if not isinstance(held, (list, tuple)) or any(type(each) is not int for each in held):
        raise ConfigError("held", held, "is no list of integers", legal)
    if len(held) != experts or len(set(held)) != experts or not all(0 <= each < (ids or experts) for each in held):
        raise ConfigError("held", held, "must give each slot an id of its own", legal)


def _placement(spec: MoESpec, held: Sequence[int], ids: int) -> Placement:
    """A group that holds these experts in the order of their slots, and where there are more one that holds the
    others."""
    own = tuple(held)
    others = tuple(expert for expert in range(ids) if expert not in set(own))
    owners = tuple(int(expert not in set(own)) for expert in range(ids))
    return Placement(ids, spec.intermediate, ((0, spec.intermediate),), owners, (own, others) if others else (own,))


def _sizes(problem: Problem) -> str:
    spec = problem.spec
    held = count_of(problem.num_local, "expert")
    return f"{held} of {spec.quant_label}, {spec.activation}, {spec.hidden} × {problem.width}"
