"""A placement as a small JSON file, which an experiment names as `map:FILE`."""

from __future__ import annotations

import json
from typing import Any

from moe_dist.errors import ConfigError
from moe_dist.files import read_small_text, unique_keys
from moe_dist.model.spec import ParallelSpec

KIND = "map:"  # before the path, where placements are named
KEYS = ("tp", "ep", "expert_map", "replicas")
LARGEST_FILE = 16 << 20  # bytes
LEGAL = "a file that moe-dist balance --out wrote"


def placement_text(parallel: ParallelSpec) -> str:
    """What the file holds."""
    return json.dumps(parallel.model_dump(mode="json", include=set(KEYS))) + "\n"


def read_placement(path: str) -> ParallelSpec:
    """Raises ConfigError for a file that is none of a placement."""
    try:
        found: Any = json.loads(read_small_text(path, LARGEST_FILE), object_pairs_hook=unique_keys)
    except OSError as error:
        raise _refusal(path, f"can't be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise _refusal(path, f"is no JSON: {error}") from None
    if not isinstance(found, dict) or set(found) != set(KEYS):
        raise _refusal(path, f"does not hold the keys {', '.join(KEYS)}")
    try:
        parallel = ParallelSpec(**found)
    except ConfigError as error:
        raise error.of(f"{path}: {error.field.removeprefix('parallel.')}") from None
    for expert, group in enumerate(parallel.expert_map):
        if not 0 <= group < parallel.ep:
            rule = "is no group of experts"
            raise ConfigError(f"{path}: expert_map.{expert}", group, rule, f"0 to {parallel.ep - 1}")
    return parallel


def _refusal(path: str, rule: str) -> ConfigError:
    return ConfigError("experiment.placements", f"{KIND}{path}", rule, LEGAL)
