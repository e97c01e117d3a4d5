"""YAML files and `key=value` overrides to plain dictionaries, and models by name."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from moe_dist.commands.yaml_loader import LONGEST_TEXT, load_yaml
from moe_dist.errors import ConfigError
from moe_dist.files import read_small_text
from moe_dist.model.spec import MoESpec

KNOWN = Path(__file__).parents[1] / "model" / "known"  # which a checkout has as configs/models too


def read_yaml(path: Path | str) -> dict[str, Any]:
    """A YAML mapping. Raises ConfigError for a missing file, bad YAML or anything but a mapping."""
    try:
        text = read_small_text(path, LONGEST_TEXT)
    except OSError as error:
        raise ConfigError("file", str(path), f"can't be read: {error.strerror}") from None
    loaded = load_yaml(text, "file", str(path))
    if not isinstance(loaded, dict):
        raise ConfigError("file", str(path), f"holds {type(loaded).__name__}", "a mapping of keys to values")
    return loaded


def override(config: dict[str, Any], assignments: Iterable[str]) -> dict[str, Any]:
    """`config` with dotted `key=value` assignments; values are YAML (8, true, [1, 2], fp8_block). Raises ConfigError
    for what is none, and for a key that is given twice, be it within another one's section."""
    result = dict(config)
    seen: dict[tuple[str, ...], str] = {}
    for assignment in assignments:
        dotted, equals, text = assignment.partition("=")
        *parents, last = dotted.split(".")
        if not equals or not all([*parents, last]):
            raise ConfigError("override", assignment, "not an assignment", "key=value, with dots for nested keys")
        value = load_yaml(text, "override", assignment)
        own = (*parents, last)
        for other, before in seen.items():
            if own[: len(other)] == other[: len(own)]:
                raise ConfigError("override", assignment, f"sets what {before} sets too", "each key once")
        seen[own] = assignment
        section = result
        for parent in parents:
            inner = section.get(parent, {})
            if not isinstance(inner, dict):
                raise ConfigError("override", assignment, f"{parent} is a value, not a section")
            section[parent] = dict(inner)
            section = section[parent]
        section[last] = value
    return result


def model_names() -> list[str]:
    return sorted({path.stem for folder in _model_folders() for path in folder.glob("*.yaml")})


def find_model(name: str) -> MoESpec:
    """A model by the name of its file in the working directory's configs/models or among those that come with the
    package (any case), or by the path of a YAML file."""
    if name.endswith((".yaml", ".yml")):
        return MoESpec(**read_yaml(name))
    for folder in _model_folders():
        for path in folder.glob("*.yaml"):
            if path.stem.lower() == name.lower():
                return MoESpec(**read_yaml(path))
    raise ConfigError("model", name, "no model of this name", [*model_names(), "the path of a YAML file"])


def _model_folders() -> list[Path]:
    """The working directory's first, then the package's."""
    folders = [Path("configs/models"), KNOWN]
    return [folder for folder in folders if folder.is_dir()]


def resolve_models(config: dict[str, Any]) -> dict[str, Any]:
    """Replace model names by specs, and lay a `model` section over each of them: `model.quant=none` changes all."""
    result = dict(config)
    changes = result.pop("model", {})
    if not isinstance(changes, dict):
        raise ConfigError("model", changes, "changes keys of every model", "a section; name models in `models`")
    models = result.get("models", [])
    if not isinstance(models, list):
        raise ConfigError("experiment.models", models, "must be a list", model_names())
    specs = [_model(model) for model in models]
    result["models"] = tuple(spec.with_changes(**changes) if changes else spec for spec in specs)
    return result


def _model(given: Any) -> MoESpec:
    if isinstance(given, dict):
        return MoESpec(**given)
    if not isinstance(given, str):
        raise ConfigError("experiment.models", given, "neither a name nor a section of the model's keys", model_names())
    return find_model(given)
