"""A checkpoint as an experiment's source, given by flags or by keys: its layer, and the model that follows from it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from moe_dist.bench.case import Case
from moe_dist.bench.source_spec import SourceSpec
from moe_dist.checkpoint import check_layer, layer_spec
from moe_dist.errors import ConfigError
from moe_dist.files import one_path
from moe_dist.model.spec import MoESpec

FREE = ("name", "shared_experts")  # what a user may say of a checkpoint's layer; the rest is in its files


def with_source(config: dict[str, Any], checkpoint: str | None, layer: int | None) -> dict[str, Any]:
    """`config` with flags laid over its `source`: a checkpoint by its absolute path, as ranks have a working directory
    of their own, and with its layer as the model where `models` names none.

    The layer is 0 where --checkpoint comes without one. Raises ConfigError for a flag that contradicts a key, for half
    a source, and what `layer_spec` raises.
    """
    given = config.get("source") or {}
    if not isinstance(given, dict):
        raise ConfigError("experiment.source", given, "is no section", tuple(SourceSpec.model_fields))
    keys = dict(given)
    for key, flag in (("checkpoint", checkpoint), ("layer", layer)):
        if flag is None:
            continue
        if keys.get(key) is not None and _plainly(keys[key]) != _plainly(flag):
            raise ConfigError(f"source.{key}", keys[key], f"contradicts --{key} {flag}", "one of the two")
        keys[key] = flag
    if checkpoint is not None and keys.get("layer") is None:
        keys["layer"] = 0
    source = SourceSpec(**keys)
    if source.checkpoint is None or source.layer is None:
        return {**config, "source": keys}
    path = str(Path(source.checkpoint).absolute())
    stored = layer_spec(path, source.layer)
    return {"models": [stored.model_dump()], **config, "source": {**keys, "checkpoint": path}}


def _plainly(value: Any) -> Any:
    """What can be compared: a folder has one path, and false is not 0."""
    return one_path(value) if isinstance(value, str) else (type(value), value)


def check_stored(case: Case) -> None:
    """Raise ConfigError where the checkpoint's layer is not the case's model, and where those behind it in a stack are
    no MoE layers or none of its format; what `check_layer` raises for any of them."""
    for number in range(case.layers):
        source = case.at(number).source
        if source.checkpoint is None or source.layer is None:
            return
        stored = check_layer(source.checkpoint, source.layer, case.model.shared_experts != "none").spec
        if number == 0:
            check_models([case.model], source, stored)
            continue
        for key in sorted(MoESpec.model_fields.keys() - set(FREE)):
            first, found = getattr(case.model, key), getattr(stored, key)
            if first != found:
                rule = f"layer {source.layer} has {key} {found!r}, and the first one of the stack {first!r}"
                raise ConfigError("experiment.layers", case.layers, rule, f"1 to {number} from that one on")


def check_models(models: Iterable[MoESpec], source: SourceSpec, stored: MoESpec) -> None:
    """Raise ConfigError for a model that isn't the checkpoint's: with its sizes or its format, other numbers than the
    stored ones would be computed."""
    for model in models:
        for key in MoESpec.model_fields:
            asked, found = getattr(model, key), getattr(stored, key)
            if key not in FREE and asked != found:
                rule = f"is {found!r} in layer {source.layer} of {source.checkpoint}, whose files decide it"
                raise ConfigError(f"model.{key}", asked, rule, f"{found!r}, or no source.checkpoint")
