"""What all ranks of a layer must have alike, as they tell each other when a step begins (Comm.meet)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property

from torch import Tensor

from moe_dist.comm.agreements import FACTS
from moe_dist.comm.teller import MODULUS, digest, number_of
from moe_dist.engine.plan import Plan
from moe_dist.engine.router import Router
from moe_dist.errors import ConfigError
from moe_dist.model.routing import Routing
from moe_dist.model.weights import ExpertWeights, position_sum
from moe_dist.tables import Shape, find_table


class Agreement:
    """Of one layer. The backend is each rank's own affair: their partial sums add up all the same."""

    def __init__(
        self,
        plan: Plan,
        shard: ExpertWeights,
        shared: ExpertWeights | None = None,
        router: Router | None = None,
        debug: bool = False,
    ) -> None:
        self._plan, self._shard, self._shared, self._router, self._debug = plan, shard, shared, router, debug
        self._alike = plan.token_layout == "replicated"
        self._every_row = plan.spec.shared_experts != "none"

    @cached_property
    def facts(self) -> dict[str, str]:
        """By name, in words. Made at the first step, where the host may wait for a GPU."""
        found = {"debug": str(self._debug), **plan_facts(self._plan)}
        if self._shard.a13 is not None:  # with which one rank quantizes rows that another one computes
            found["shard.a13"] = repr(float(self._shard.a13))
        if self._shared is not None and self._plan.spec.shared_experts == "replicated":
            found["shared"] = f"an expert with the checksum {number_of(repr(self._shared.fingerprint())):x}"
        if self._router is not None:
            held = (self._router.gate_EH, self._router.bias_E, self._router.logit_bias_E)
            sums = [position_sum(each) for each in held if each is not None]
            found["router.weight"] = f"values with the checksum {number_of(repr(sums)):x}"
        return found

    @cached_property
    def digest(self) -> int:
        return digest(self.facts)

    def of(self, layer: int, x_TH: Tensor, routing: Routing, values: bool, captured: bool = False) -> dict[str, int]:
        """By name. `layer`: its number among those made on the process group. Tokens that are replicated, and where
        they go, are looked at if `values`: the host waits for a GPU. Rows that no expert takes, and weights beside no
        expert, may hold anything."""
        routed = x = 0
        if self._alike and values:
            nobody_TK = routing.ids_TK < 0
            weights_TK = routing.weights_TK.masked_fill(nobody_TK, 0.0)
            routed = (position_sum(routing.ids_TK) + 3 * position_sum(weights_TK)) % MODULUS
            if not self._every_row:
                x_TH = x_TH.masked_fill(nobody_TK.all(1, keepdim=True), 0.0)
            x = position_sum(x_TH) % MODULUS
        return {FACTS: self.digest, "layer": layer, "captured": int(captured), "routing": routed, "x": x}


def plan_facts(plan: Plan) -> dict[str, str]:
    """What of a plan, and of the tuning tables that its ranks find, must be the same on all of them."""
    said = {f"plan.{name}": str(getattr(plan, name)) for name in ("token_layout", "combine_dtype")}
    for name in ("exchange", "payload", "up_to"):
        said[f"plan.{name}"] = ", ".join(str(getattr(each, name)) for each in plan.choices)
    for name, value in plan.spec.model_dump(mode="json", exclude={"name"}).items():
        said[f"plan.spec.{name}"] = str(value)
    said["plan.placement"] = plan.parallel.label
    said["plan.placement.slices"] = ", ".join(f"{start}-{stop - 1}" for start, stop in plan.placement.slices)
    for group, experts in enumerate(plan.placement.homes):
        owned = [expert for expert in experts if plan.placement.owners[expert] == group]
        said[f"plan.placement.experts[{group}]"] = _in_ranges(experts)
        said[f"plan.placement.owned[{group}]"] = _in_ranges(owned)
    return said | {f"table {name}": text for name, text in _tables(plan).items()}


def _in_ranges(numbers: Sequence[int]) -> str:
    """In their order, as 0-63, 7, 8-9."""
    found: list[list[int]] = []
    for number in numbers:
        if found and number == found[-1][1] + 1:
            found[-1][1] = number
        else:
            found.append([number, number])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in found)


def _tables(plan: Plan) -> dict[str, str]:
    """Of each table that ranks look for: which one it is. A backend that another rank does not run has none there."""
    found = {}
    for part, revision in plan.tuned_parts():
        found[part.shape.file_name] = _table(part.shape, revision)
    return found


def _table(shape: Shape, revision: int) -> str:
    try:
        table = find_table(shape, revision)
    except ConfigError as error:  # of this rank alone, perhaps, and then the others are to hear of it here
        return error.brief
    if table is None:
        return "none"
    checksum = number_of(json.dumps(table.document(), sort_keys=True))
    return f"of {table.date}, commit {table.commit}, checksum {checksum:x}"


def of_stack(agreements: Sequence[Agreement], layers: Sequence[int]) -> dict[str, int]:
    """By name, what the ranks of a stack must have alike, in numbers: all that its layers must, and their numbers."""
    return {FACTS: digest(stack_facts(agreements)), "layer": number_of(repr(list(layers)))}


def stack_facts(agreements: Sequence[Agreement]) -> dict[str, str]:
    facts = {"layers": str(len(agreements))}
    for number, each in enumerate(agreements):
        facts |= {f"layers[{number}].{name}": value for name, value in each.facts.items()}
    return facts
