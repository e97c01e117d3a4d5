"""What `auto` takes as exchange and backend: by rows measured on such a machine, else by a rule, and it says which."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from moe_dist.engine.backend_rule import UNMEASURED, first_that_serves
from moe_dist.engine.records import Pick, Record, Setting, Timed, pick, records
from moe_dist.machine.machine import HOPPER, Machine
from moe_dist.model.spec import MoESpec, ParallelSpec

AUTO = "auto"
Payload = Callable[[str, str], str | None]  # how rows would travel with these names; None: they can't serve here


def plain_exchange(world: int, token_layout: str) -> str:
    """The one that nobody needs to name: it serves every layer on every machine."""
    return "local" if world == 1 else "ag_rs" if token_layout == "sharded" else "all_reduce"


def choose(
    spec: MoESpec,
    parallel: ParallelSpec,
    token_layout: str,
    graph: bool,
    machine: Machine,
    exchanges: Iterable[str],
    backends: Iterable[str],
    payload_of: Payload,
) -> list[Pick]:
    """By size of step, out of these names. The first record that has rows of such a layer decides, the user's own
    before the shipped ones; see Setting.nearest for the rows of one record. Without any, a rule does. Raises
    ConfigError for a broken record."""
    pairs = [(exchange, backend) for exchange in exchanges for backend in backends]
    payloads = {pair: payload_of(*pair) for pair in pairs}
    nearest = Setting.nearest(machine.device_name, spec, parallel, token_layout, graph)
    for record in records():
        for setting in nearest:
            if timed := _fitting(record, setting, payloads):
                unlike = setting.unlike(spec, graph)
                return [each._replace(why=each.why + unlike) for each in pick(record, timed)]
    able = [pair for pair in pairs if payloads[pair] is not None]
    return [_by_rule(parallel, token_layout, machine, able)] if able else []


def _fitting(record: Record, setting: Setting, payloads: dict[tuple[str, str], str | None]) -> list[Timed]:
    return [
        row for row in record.rows.get(setting, ()) if payloads.get((row.exchange, row.backend)) == row.payload
    ]  # fmt: skip


def _by_rule(parallel: ParallelSpec, token_layout: str, machine: Machine, able: list[tuple[str, str]]) -> Pick:
    """Of pairs that can serve: local on one rank, nvlink on Hopper GPUs of one host, else ag_rs or, for replicated
    tokens, all_reduce; and with it the backend of `backend_rule`; what comes first where none of them is there."""
    one_host = machine.capability == HOPPER and parallel.world <= machine.devices
    exchanges = ["local", *(["nvlink"] if one_host else []), plain_exchange(parallel.world, token_layout)]
    serving = {name: [backend for exchange, backend in able if exchange == name] for name, _ in able}
    exchange = next((name for name in exchanges if name in serving), able[0][0])
    order = [name for name in UNMEASURED if name in serving[exchange]] or serving[exchange][:1]
    backend = first_that_serves(order, ()).backend
    why = "by rule, as no row of such a layer was measured on such a machine; moe-dist compare --remember measures some"
    return Pick(exchange, backend, None, why)
