"""The layer: dispatch, local partial sum, combine. Usable in any process that has a process group."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple, SupportsIndex

import torch
from torch import Tensor, nn

from moe_dist.backends import BACKENDS, Backend, Problem
from moe_dist.comm import Comm
from moe_dist.engine.agreement import Agreement
from moe_dist.engine.debugging import check_repeats, check_result
from moe_dist.engine.fitting import check_fit
from moe_dist.engine.inputs import (
    NOT_TRACED,
    check_bucket,
    check_gradient,
    check_not_exported,
    check_routing,
    check_tokens,
    check_values,
    plain_rows,
)
from moe_dist.engine.plan import Choice, Plan
from moe_dist.engine.router import Router
from moe_dist.errors import ConfigError
from moe_dist.exchange import Exchange
from moe_dist.exchange.layout import with_layout
from moe_dist.kernels import token_gate
from moe_dist.machine.surroundings import settled
from moe_dist.machine.switches import debug_asked_for
from moe_dist.messages.counts import count_of
from moe_dist.model.routing import Routing
from moe_dist.model.spec import MOST_TOKENS
from moe_dist.model.weights import ExpertWeights
from moe_dist.step import NO_STAGES, Added, Stages, Step, Support, TokenRows, Whole, workspace_of

MADE_ANEW = frozenset({"paths", "_uncompiled"})  # of a layer that is copied with its weights


class Path(NamedTuple):
    """What runs for steps of one range of sizes."""

    exchange: Exchange[Any, Any]
    backend: Backend
    shared: Backend | None


class MoELayer(nn.Module):
    """One rank's part of a distributed MoE layer.

    `shard` is what `plan.placement` gives this rank (weights.shard, checkpoint.load_shard). `shared` is the shared
    expert, whole or this rank's slice, as `plan.spec.shared_experts` says. Forward is collective, it is not
    differentiated, and torch.compile leaves it as it is. The layer holds its process's communicator: torch.export is
    refused, and so is pickle where there are several ranks. `debug` (default: whether MOE_DIST_DEBUG is set) is the
    debug mode of docs/failures.md, which all ranks have or none. Values of the weights are the caller's to check, with
    ExpertWeights.check_finite: that is a pass over all of them.

    The layer stays on its communicator's device and in its plan's dtypes: `to`, `half` and the like change nothing, and
    raise ConfigError for another device.
    """

    def __init__(
        self,
        plan: Plan,
        shard: ExpertWeights,
        comm: Comm,
        *,
        router: Router | None = None,
        shared: ExpertWeights | None = None,
        debug: bool | None = None,
    ) -> None:
        super().__init__()
        check_fit(plan, shard, shared, router, comm)
        if not (debug is None or isinstance(debug, bool)):
            raise ConfigError("debug", debug, "switches the debug mode on or off", (True, False, None))
        self.debug = debug_asked_for() if debug is None else debug
        self.plan, self.comm, self.router = plan, comm, router
        self._weights = shard, shared
        self.agreement = Agreement(plan, shard, shared, router, self.debug)
        self._uncompiled: Callable[..., Tensor] | None = None
        self._assemble()

    def _assemble(self) -> None:
        made: dict[Choice, Path] = {}  # what runs again for larger steps is one
        paths = []
        for plan, _ in self.plan.parted(MOST_TOKENS):
            same = replace(plan.choice(), why="")
            made[same] = made.get(same) or self._path(plan)
            paths.append(made[same])
        self.paths = tuple(paths)
        self.number = self.comm.number_layer()  # on its process group
        self.met = False  # its ranks have found in some step that they run the same

    def _path(self, plan: Plan) -> Path:
        """What runs by a plan of one choice."""
        (shard, shared), rank = self._weights, self.comm.rank
        exchange = plan.exchange_class(
            self.comm, plan.placement, plan.spec, plan.payload, shard.a13, plan.form, plan.out_dtype
        )
        return Path(
            with_layout(exchange, plan.token_layout),
            _prepared(plan.backend, plan.problem(rank), shard),
            None if shared is None else _prepared(plan.backend, plan.shared_problem(rank), shared),
        )

    def path(self, tokens_per_rank: int) -> Path:
        """What runs in steps of so many tokens a rank."""
        return self.paths[self.plan.choices.index(self.plan.choice(tokens_per_rank))]

    @property
    def exchange(self) -> Exchange[Any, Any]:
        """Of the largest steps."""
        return self.paths[-1].exchange

    @property
    def backend(self) -> Backend:
        """Of the largest steps."""
        return self.paths[-1].backend

    @property
    def shared(self) -> Backend | None:
        """What computes the shared expert in the largest steps, if there is one."""
        return self.paths[-1].shared

    @property
    def needs_bucket(self) -> bool:
        """Whether all ranks must know the most tokens of any of them: an exchange pads to it, or it decides what
        runs."""
        chosen = len(self.paths) > 1 and self.plan.token_layout == "sharded"
        return chosen or any(path.exchange.needs_bucket for path in self.paths)

    def forward(
        self,
        x_TH: Tensor,
        routing: Routing | None = None,
        *,
        max_tokens_per_rank: int | None = None,
        captured: bool = False,
        stages: Stages = NO_STAGES,
    ) -> Tensor:
        """[T, H] in the spec's dtype to [T, H]. T may be zero where tokens are sharded, and differ between ranks.

        Without `routing` the layer's own router decides. `max_tokens_per_rank` is the bucket that all ranks step at,
        the same on all; a rank with more tokens raises, and the others wait for it until the collective's timeout.
        Without it they agree on one, which costs a small collective on the CPU. Raises ConfigError for tensors of
        another shape, dtype or device, and as inputs.check_values does on a CPU or with `debug`.

        `captured`: run as in a CUDA graph, with static shapes; set by graphs. `stages`: a clock for the parts.
        """
        check_not_exported()
        dynamo = sys.modules.get("torch._dynamo")
        if dynamo is None:
            return self._checked_forward(x_TH, routing, max_tokens_per_rank, captured, stages)
        if self._uncompiled is None:  # only somebody who compiles has imported it; this layer is no part of that
            self._uncompiled = dynamo.disable(self._checked_forward, reason=NOT_TRACED)
        y_TH: Tensor = self._uncompiled(x_TH, routing, max_tokens_per_rank, captured, stages)
        return y_TH

    def _checked_forward(
        self, x_TH: Tensor, routing: Routing | None, bucket: int | None, captured: bool, stages: Stages
    ) -> Tensor:
        self.comm.check_thread()
        self.comm.begin_step()
        check_gradient("x", x_TH)
        if isinstance(routing, Routing):
            check_gradient("routing.weights", routing.weights_TK)
        with torch.no_grad(), settled(self.comm.device):
            x_TH, routing = self.checked(x_TH, routing, bucket)
            step, path = self._step(x_TH, routing, bucket, captured, stages)
            return self._run(step, path, x_TH, routing)

    def _step(
        self, x_TH: Tensor, routing: Routing, bucket: int | None, captured: bool, stages: Stages
    ) -> tuple[Step, Path]:
        """What the parts are told, and which they are; the ranks agree on both where they must."""
        agreed, needed = bucket, self.needs_bucket
        # On a CPU, and in the debug mode, the ranks make sure that they are in one step; else in the first one, and
        # where they must.
        if ((needed and bucket is None) or self.meets or not self.met) and not self.comm.captures:
            alike = self.plan.token_layout == "replicated"
            same = partial(self.agreement.of, self.number, x_TH, routing, self.meets, captured)
            agreed = self.comm.meet(routing.tokens, bucket, alike, same, lambda: self.agreement.facts)
            self._has_met()
        bucket = agreed if bucket is None else bucket
        path = self.path(len(x_TH) if bucket is None else bucket)
        workspace = workspace_of(self.comm.device)
        workspace.begin(poisoned=self.debug)
        return Step(workspace, bucket if path.exchange.needs_bucket else None, captured, stages), path

    def _run(self, step: Step, path: Path, x_TH: Tensor, routing: Routing) -> Tensor:
        out_dtype, shared = self.plan.out_dtype, self.plan.spec.shared_experts
        rows, handle = self._dispatched(step, path, x_TH, routing)
        if step.stages.on:
            step.stages.saw(path, rows)
        sink = path.exchange.sink(step, rows, handle, out_dtype)
        sums = sink if shared != "tp" else Added(sink, self._of_shared(step, path, rows))
        path.backend.forward(step, rows, sums)
        y_TH: Tensor = path.exchange.combine(step, sink, handle)
        if shared == "replicated":
            y_TH = y_TH + self._of_shared(step, path, TokenRows(x_TH, routing.ids_TK, routing.weights_TK))
        y_TH = y_TH.to(self.plan.spec.torch_dtype)
        if self.debug and not self.comm.captures:
            check_result(y_TH, x_TH)
        return y_TH

    def _dispatched(self, step: Step, path: Path, x_TH: Tensor, routing: Routing) -> tuple[TokenRows, Any]:
        exchange = path.exchange
        if self.plan.spec.weights_on_input:
            x_TH, routing = _on_input(step, x_TH, routing)
        rows, handle = exchange.dispatch(step, exchange.to_payload(step, x_TH, routing), routing)
        if exchange.form == "expert":
            with step.stages("dispatch"):
                rows = exchange.in_form(step, rows)
        if not path.backend.awaits(rows):
            rows = exchange.arrived(step, rows, handle)
        return rows, handle

    def _of_shared(self, step: Step, path: Path, rows: TokenRows) -> Tensor:
        """The shared expert's part of these rows' sums, or all of it."""
        sink = Whole(step, (len(rows), self.plan.spec.hidden), self.plan.out_dtype, self.comm.device)
        _, weights = self._weights
        if path.shared is not None and weights is not None:
            path.shared.forward(step, _every_row(step, rows, weights.token_gate_eH), sink)
        return sink.y

    def warm_up(self, x_TH: Tensor, routing: Routing | None, max_tokens_per_rank: int, captured: bool = False) -> None:
        """Let the backend choose and compile what it needs for this bucket, then run a step: collective, not to be
        timed or captured. `captured`: for steps that will be."""
        self.comm.check_thread()
        with torch.no_grad(), settled(self.comm.device):
            x_TH, routing = self.checked(x_TH, routing, max_tokens_per_rank)
            step, path = self._step(x_TH, routing, max_tokens_per_rank, captured, NO_STAGES)
            rows, handle = self._dispatched(step, path, x_TH, routing)
            path.backend.tune(step, rows)
            sink = path.exchange.sink(step, rows, handle, self.plan.out_dtype)
            path.backend.forward(step, rows, sink)
            path.exchange.combine(step, sink, handle)
            self._run(*self._step(x_TH, routing, max_tokens_per_rank, captured, NO_STAGES), x_TH, routing)

    def checked(self, x_TH: Tensor, routing: Routing | None, bucket: int | None) -> tuple[Tensor, Routing]:
        """What came in, checked, contiguous, and with the own router's routing where none was given."""
        spec, device = self.plan.spec, self.comm.device
        check_tokens(x_TH, spec, device)
        own = routing is None
        if routing is None:
            if self.router is None:
                raise ConfigError("routing", None, "this layer has no router of its own")
            routing = self.router(x_TH)
        check_routing(routing, len(x_TH), spec, device)
        check_bucket(bucket, len(x_TH))
        if device.type == "cpu" or (self.debug and not self.comm.captures):
            check_values(routing, spec, x_TH if own else None)
        if self.debug and not self.comm.captures:
            check_repeats(routing)
        return plain_rows(x_TH.detach()), routing

    def _has_met(self) -> None:
        self.met = True
        if self.debug:  # as on all ranks, which is known now
            self.comm.guard()

    @property
    def meets(self) -> bool:
        """Whether the ranks make sure at each step that they are in one, whatever they must agree on."""
        return self.debug or self.comm.device.type == "cpu"

    @property
    def capturable(self) -> Support:
        """See Plan.capturable."""
        return self.plan.capturable

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> MoELayer:
        device = self.comm.device
        moved = fn(torch.empty(0, dtype=torch.float32, device=device)).device
        if moved != device:
            rule = "the layer's shard, its communicator and its kernels live on one device"
            raise ConfigError("device", str(moved), rule, str(device))
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> MoELayer:
        """With weights of its own, since kernels know where those of the original lie, on the same communicator."""
        copied = type(self).__new__(type(self))
        memo[id(self)], memo[id(self.plan)] = copied, self.plan
        for name, value in self.__dict__.items():
            copied.__dict__[name] = None if name in MADE_ANEW else deepcopy(value, memo)
        copied._assemble()
        return copied

    def __copy__(self) -> MoELayer:
        """Without what torch.compile made of the original."""
        copied = type(self).__new__(type(self))
        copied.__dict__.update(self.__dict__, _uncompiled=None)
        return copied

    def __reduce_ex__(self, protocol: SupportsIndex) -> Any:
        """Of one rank alone; `comm` refuses others. What is inside is written by torch.save: a plain pickle of an FP8
        tensor can't be read back."""
        file = io.BytesIO()
        torch.save({name: None if name in MADE_ANEW else value for name, value in self.__dict__.items()}, file)
        return _read_back, (type(self), file.getvalue())

    def get_extra_state(self) -> dict[str, Any]:
        """A state dict holds no expert: they come from a checkpoint, slice by slice. It says which they were."""
        return {"experts": [None if part is None else part.fingerprint() for part in self._weights]}

    def set_extra_state(self, state: Any) -> None:
        """Raises ConfigError where the state dict is another layer's. What went through JSON is the same."""
        if _as_json(state) != _as_json(self.get_extra_state()):
            rule = "the state dict is that of a layer with other experts, which it does not hold"
            given = state.get("experts") if isinstance(state, dict) else state
            raise ConfigError("state_dict.experts", given, rule, "weights from checkpoint.load_shard")

    def extra_repr(self) -> str:
        parts = [self.plan.parallel.label]
        for each in self.plan.choices:
            size = "" if each.up_to is None else f" up to {count_of(each.up_to, 'token')} a rank"
            parts.append(f"exchange={each.exchange}, backend={each.backend}, payload={each.payload}{size}")
        return ", ".join(parts)


def _read_back(cls: type[MoELayer], written: bytes) -> MoELayer:
    layer = cls.__new__(cls)
    layer.__dict__.update(torch.load(io.BytesIO(written), weights_only=False))
    layer._assemble()  # kernels know where the weights lie
    return layer


def _as_json(state: Any) -> str | None:
    """None for what is no plain data."""
    try:
        return json.dumps(state, sort_keys=True)
    except (TypeError, ValueError):
        return None


def _prepared(name: str, problem: Problem, weights: ExpertWeights) -> Backend:
    backend = BACKENDS.get(name)(problem)
    backend.prepare(weights)
    return backend


def _on_input(step: Step, x_TH: Tensor, routing: Routing) -> tuple[Tensor, Routing]:
    """The tokens times their weights, of which each has one, and a routing with weights of 1. The product is made in
    float32 and rounded once. A row without an expert may hold anything, as before."""
    with step.stages("dispatch"):
        scaled_TH = step.workspace.take(tuple(x_TH.shape), x_TH.dtype)
        torch.mul(x_TH, routing.weights_TK, out=scaled_TH)
        ones_TK = step.workspace.take(tuple(routing.weights_TK.shape), torch.float32).fill_(1.0)
    return scaled_TH, Routing(routing.ids_TK, ones_TK)


def _every_row(step: Step, rows: TokenRows, gate_1H: Tensor | None) -> TokenRows:
    """The same rows for a backend of one expert that every token picks with weight 1, or as much as its gate says."""
    count = rows.slots_RK.shape[0]
    slots = rows.slots_RK.new_zeros(count, 1)
    if gate_1H is None:
        return TokenRows(rows.x, slots, torch.ones(count, 1, dtype=torch.float32, device=slots.device))
    if not isinstance(rows.x, Tensor):  # MoESpec refuses a gated one that is sliced, which takes what has travelled
        raise RuntimeError("a gated shared expert takes its rank's own tokens, as they came")
    return TokenRows(rows.x, slots, token_gate(rows.x, gate_1H, step.workspace.take))
