"""YAML files and `key=value` overrides to plain dictionaries, and models by name."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from shlex import quote
from typing import Any

from moe_dist.bench.case import Experiment
from moe_dist.bench.source_spec import SourceSpec
from moe_dist.commands.yaml_loader import INTEGER, LONGEST_TEXT, load_yaml
from moe_dist.errors import UNKNOWN_KEY, ConfigError, listed
from moe_dist.files import read_small_text
from moe_dist.model.spec import MoESpec, Section
from moe_dist.runtime.context import RaySpec

EXPERIMENTS_OWN = {*Experiment.model_fields, "model"} - set(MoESpec.model_fields)  # keys that only these files have
SECTIONS: dict[str, type[Section]] = {"model": MoESpec, "source": SourceSpec, "ray": RaySpec}
MODELS_OWN = set(MoESpec.model_fields) - set(Experiment.model_fields)
KEY_VALUE = "key=value, with dots for nested keys and quotes around what holds spaces"
KNOWN = Path(__file__).parents[1] / "model" / "known"  # which a checkout has as configs/models too


def read_yaml(path: Path | str) -> dict[str, Any]:
    """A YAML mapping. Raises ConfigError for a missing file, bad YAML or anything but a mapping."""
    try:
        text = read_small_text(path, LONGEST_TEXT)
    except OSError as error:
        raise ConfigError("file", str(path), f"can't be read: {error.strerror}") from None
    loaded = load_yaml(text, "file", str(path))
    if not isinstance(loaded, dict):
        held = "a list" if isinstance(loaded, list) else "nothing" if loaded is None else "a single value"
        raise ConfigError("file", str(path), f"holds {held}", "keys with values, as in `tokens: [8]`")
    return loaded


def read_experiment(path: str) -> dict[str, Any]:
    """An experiment file's keys. Raises ConfigError as `read_yaml`, and with the right command for what is something
    else that the commands know: a model, by its file or its name, a checkpoint, results."""
    if path.lower() in map(str.lower, model_names()) and not Path(path).exists():
        raise ConfigError("file", path, "is a model's name", f"moe-dist compare --model {path}")
    if _is_checkpoint(path):
        rule = "is a checkpoint's folder, not an experiment's file"
        raise ConfigError("file", path, rule, f"moe-dist compare --checkpoint {quote(path)}")
    keys = read_yaml(path)
    if keys.keys() & EXPERIMENTS_OWN:
        return keys
    if keys.keys() & MODELS_OWN:
        rule = "is a model's file, not an experiment's"
        raise ConfigError("file", path, rule, f"moe-dist compare --model {quote(path)}")
    if keys.keys() >= {"rows", "refused"}:
        raise ConfigError("file", path, "holds results, not an experiment", f"moe-dist diff {quote(path)} OTHER")
    return keys


def _is_checkpoint(path: str) -> bool:
    try:
        return (Path(path) / "config.json").is_file()
    except (OSError, ValueError):  # ValueError: a NUL byte in the name
        return False


def override(config: dict[str, Any], assignments: Iterable[str]) -> dict[str, Any]:
    """`config` with dotted `key=value` assignments; values are YAML (8, true, [1, 2], fp8_block). Raises ConfigError
    for what is none, and for a key that is given twice, be it within another one's section."""
    result = dict(config)
    seen: dict[tuple[str, ...], str] = {}
    for assignment in assignments:
        dotted, equals, text = assignment.partition("=")
        *parents, last = dotted.split(".")
        if not equals or not all([*parents, last]):
            raise ConfigError("override", assignment, f"not an assignment{_meant(assignment)}", KEY_VALUE)
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


def _meant(word: str) -> str:
    """For the end of a rule about what is no `key=value`."""
    if word in EXPERIMENTS_OWN:
        return f"; did you mean {word}=VALUE?"
    if word.lower() in map(str.lower, model_names()):
        return f"; did you mean --model {word}?"
    if INTEGER.match(word):
        return "; a flag of one value takes no second one"
    if word.endswith((".yaml", ".yml")):
        return "; a model's file is given by --model, and an experiment's is compare's first argument"
    return ""


def model_names() -> list[str]:
    return sorted({path.stem for folder in _model_folders() for path in folder.glob("*.yaml")})


def find_model(name: str) -> MoESpec:
    """A model by the name of its file in the working directory's configs/models or among those that come with the
    package (any case), or by the path of a YAML file."""
    if name.endswith((".yaml", ".yml")):
        return _read_model(name)
    for folder in _model_folders():
        for path in folder.glob("*.yaml"):
            if path.stem.lower() == name.lower():
                return _read_model(str(path))
    if _is_checkpoint(name):
        raise ConfigError("experiment.models", name, "is a checkpoint's folder", f"--checkpoint {quote(name)}")
    raise ConfigError("experiment.models", name, "no model of this name", [*model_names(), "the path of a YAML file"])


def _read_model(path: str) -> MoESpec:
    """Its errors name the file and the file's key."""
    try:
        keys = read_yaml(path)
    except ConfigError as error:
        raise error.of("experiment.models") from None
    if keys.keys() & EXPERIMENTS_OWN and not keys.keys() & MODELS_OWN:
        rule = "is an experiment's file, not a model's"
        raise ConfigError("experiment.models", path, rule, f"moe-dist compare {quote(path)}, or a model's file")
    try:
        return MoESpec(**keys)
    except ConfigError as error:
        raise error.of(f"{path}: {error.field.removeprefix('model.')}") from None


def _model_folders() -> list[Path]:
    """The working directory's first, then the package's."""
    folders = [Path("configs/models"), KNOWN]
    return [folder for folder in folders if folder.is_dir()]


def check_keys(config: dict[str, Any]) -> None:
    """Raise ConfigError for a key that is none of the experiment's, such as the key of a section that stands where the
    experiment's are. `model` is one: a section that `resolve_models` takes out."""
    fields = list(Experiment.model_fields)
    keys = (*fields[: fields.index("models") + 1], "model", *fields[fields.index("models") + 1 :])
    for key, value in config.items():
        if key in keys:
            continue
        section = next((name for name, cls in SECTIONS.items() if key in cls.model_fields), None)
        if section is None:
            raise ConfigError(f"experiment.{key}", value, UNKNOWN_KEY, keys)
        raise ConfigError(f"experiment.{key}", value, f"{UNKNOWN_KEY}; did you mean {section}.{key}?", listed(keys))


def resolve_models(config: dict[str, Any]) -> dict[str, Any]:
    """Replace model names by specs, and lay a `model` section over each of them: `model.quant=none` changes all."""
    result = dict(config)
    changes = result.pop("model", {})
    if not isinstance(changes, dict):
        rule = "is no section: it changes keys of every model"
        raise ConfigError("model", changes, rule, "a section of a model's keys; models are named in `models`")
    models = result.get("models", [])
    if not isinstance(models, list) or not models:
        rule = "is empty" if models == [] else "is no list"
        raise ConfigError("experiment.models", models, rule, f"a list with one or more of {listed(model_names())}")
    specs = [_model(model, number) for number, model in enumerate(models)]
    result["models"] = tuple(spec.with_changes(**changes) if changes else spec for spec in specs)
    return result


def _model(given: Any, number: int) -> MoESpec:
    """`number`: its place in the list."""
    place = f"experiment.models.{number}"
    if isinstance(given, str):
        return find_model(given)
    if not isinstance(given, dict):
        raise ConfigError(place, given, "is neither a name nor a section of a model's keys", model_names())
    try:
        return MoESpec(**given)
    except ConfigError as error:
        raise error.of(f"{place}{error.field.removeprefix('model')}") from None
