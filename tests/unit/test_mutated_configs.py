"""Configs that were mutated at random: each is planned or refused by an error of moe_dist's own, in bounded time."""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from profiles import examples

from moe_dist.bench.case import MOST_CASES, Experiment
from moe_dist.bench.runner import plan_cases
from moe_dist.commands.asked import asked_for
from moe_dist.commands.config import override, read_yaml
from moe_dist.commands.flags import Source
from moe_dist.errors import ConfigError, MoeDistError
from moe_dist.machine.machine import Machine
from moe_dist.model.spec import MoESpec
from moe_dist.runtime.context import RaySpec

LONGEST_S = 20.0  # on a busy machine; the largest experiment that is allowed takes a part of it
MACHINE = Machine("cpu", 1, "CPU")
GOOD: dict[str, Any] = {
    "name": "compare",
    "models": ["tiny", {"name": "mine", "hidden": 128, "intermediate": 256, "num_experts": 4, "top_k": 2}],
    "source": {"seed": 1},
    "worlds": [1, 2],
    "placements": ["tp", "tp2xep1"],
    "exchanges": ["ag_rs"],
    "backends": ["torch"],
    "tokens": [8],
    "token_layouts": ["sharded"],
    "skews": ["uniform", "zipf:1.2"],
    "payload": "auto",
    "combine_dtype": None,
    "modes": ["eager"],
    "seed": 0,
    "iters": 2,
    "warmup": 1,
    "check": True,
    "allow_empty_shards": False,
    "device": "cpu",
    "runtime": "ray",
    "case_timeout_s": 60.0,
    "ray": {"cpus_per_rank": 0.25, "start_timeout_s": 60, "collective_timeout_s": 60, "silence_timeout_s": 30},
    "model": {"quant": "fp8_block"},
}
KEYS = [*GOOD, *(f"ray.{key}" for key in RaySpec.model_fields), *(f"model.{key}" for key in MoESpec.model_fields),
        "source.checkpoint", "source.layer", "self", "cls", "data", "models.tiny", "a b", "ünï", "__class__", "x" * 500,
        "\x1b[31m", "class", "model_config", "section"]  # fmt: skip

numbers = st.one_of(
    st.integers(),
    st.sampled_from([0, -1, 10**9, 10**21, 2**63, 2**64, -(2**63) - 1, 10**300]),
    st.floats(),
    st.sampled_from([1e300, -0.0, 1.0, 0.5, 1e-320]),
)
words = st.one_of(
    st.text(max_size=12),
    st.sampled_from(["", "tiny", "TINY", "fp32", "none", "all", "tp", "ep", "tp0xep1", "tp²", "tp99999999xep2", "hot:3",
                     "hot:" + "9" * 5000, "zipf:1e308", "limited:2x1", "limited:0x0", "file:", "file:/dev/zero",
                     "file:" + "x" * 5000, "file:a\0b", "[/foo]", "\x1b[31m", "a\0b.yaml", "/dev/zero.yaml", "router",
                     "local", "graph", "relu2", "x" * 5000, "2024-13-45", "1_000", "8"]),
)  # fmt: skip
values = st.recursive(
    st.none() | st.booleans() | numbers | words,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(KEYS) | st.integers() | st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=8,
)
raw = st.one_of(
    st.text(max_size=30),
    st.sampled_from(["!!int abc", "&x [*x]", "9" * 5000, "0x" + "f" * 5000, "[" * 5000, "{a: 1, a: 2}", "{1: 2}",
                     "? [a]", "{[1]: 2}", "2024-13-45", "!!timestamp 2024-13-45", "!!binary x", "\0", "<<", "*x",
                     "1:30", ".nan", "-.inf", "{<<: [1]}", "- " * 200 + "1", "'", "%YAML 9",
                     "!!python/name:os.system", "{a: {a: {}}}"]),
)  # fmt: skip


def text_of(value: Any) -> str:
    """A value as YAML, as a person or a program would write it."""
    try:
        return json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError):
        return yaml.safe_dump(value)


assignments = st.one_of(
    st.builds(lambda key, value: f"{key}={text_of(value)}", st.sampled_from(KEYS), values),
    st.builds(lambda key, text: f"{key}={text}", st.sampled_from(KEYS), raw),
    st.text(max_size=20),
)


@st.composite
def mutated(draw: st.DrawFn) -> dict[Any, Any]:
    """The good config with a few values replaced, keys renamed, taken out or put in somewhere."""
    config = json.loads(json.dumps(GOOD))
    for _ in range(draw(st.integers(0, 3))):
        place: Any = config
        while True:
            keys = list(place) if isinstance(place, dict) else list(range(len(place)))
            if not keys:
                break
            key = draw(st.sampled_from(keys))
            deeper = isinstance(place[key], (dict, list)) and draw(st.booleans())
            if not deeper:
                break
            place = place[key]
        if not keys:
            continue
        change = draw(st.sampled_from(["replace", "replace", "remove", "add", "repeat"]))
        if change == "replace":
            place[key] = draw(values)
        elif change == "remove":
            del place[key]
        elif isinstance(place, dict):
            place[draw(st.sampled_from(KEYS) | st.integers() | st.text(max_size=3))] = draw(values)
        else:
            place += [place[key]] * (1 if change == "repeat" else 1000)
    return config


def planned_or_refused(config: dict[str, Any], *overrides: str) -> None:
    """As `compare` does it, up to the plan."""
    start = time.monotonic()
    try:
        asked = asked_for(override(config, overrides), Source(device="cpu"), sweep=True)
        cases = list(asked.experiment.cases("cpu"))
        planned, refused = plan_cases(cases, MACHINE)
    except MoeDistError as error:
        said = str(error)
        assert "\n" not in said
        assert len(said) < 20_000
    else:
        assert len(planned) + len(refused) == len(cases) <= MOST_CASES
        for case, plan in planned:
            assert plan.placement.world == case.parallel.world
        for key in ("worlds", "tokens", "skews", "models", "exchanges"):
            listed = getattr(asked.experiment, key)
            assert len(set(listed)) == len(listed)
    assert time.monotonic() - start < LONGEST_S


@examples(100)
@given(st.lists(assignments, min_size=1, max_size=3))
def test_overrides(given_overrides):
    small = {"models": ["tiny"], "worlds": [2], "tokens": [8], "exchanges": ["ag_rs"]}
    planned_or_refused(small, *given_overrides)


@examples(100)
@given(mutated(), st.none() | st.tuples(st.integers(0, 900), raw))
def test_files(config, insertion):
    """The mutated config as a file, sometimes with other text in the middle."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "experiment.yaml"
        try:
            text = yaml.safe_dump(config, allow_unicode=True, sort_keys=False)
        except yaml.YAMLError:
            text = repr(config)
        if insertion:
            text = text[: insertion[0]] + insertion[1] + text[insertion[0] :]
        path.write_bytes(text.encode("utf-8", "surrogatepass"))
        read = refusal = None
        try:
            read = read_yaml(path)
        except ConfigError as error:
            refusal = str(error)
    if refusal is None:
        planned_or_refused(read)
    else:
        assert refusal.isprintable()


@examples(50)
@given(st.dictionaries(st.sampled_from(["self", "/", "data", "cls", "hidden", "a b"]) | st.text(max_size=3), values))
def test_sections_take_any_keys(data):
    for section in (MoESpec, Experiment, RaySpec):
        try:
            section(**data)
        except MoeDistError:
            continue


@pytest.mark.parametrize(
    ("assignment", "field"),
    [
        ("self=1", "experiment.self"),
        ("models=[{1: 2}]", "override"),
        ("tokens=2024-13-45", "experiment.tokens"),
        ("tokens=!!int abc", "override"),
        ("tokens=&x [*x]", "override"),
        ("iters=1000000000000000000000", "override"),
        ("iters=1000001", "experiment.iters"),
        ("iters=true", "experiment.iters"),
        ("iters=2.0", "experiment.iters"),
        ("iters='2'", "experiment.iters"),
        ("tokens=[true]", "experiment.tokens.0"),
        ("tokens=[8, 100000000]", "experiment.tokens.1"),
        ("check=1", "experiment.check"),
        ("seed=9223372036854775808", "experiment.seed"),
        ("case_timeout_s=.nan", "experiment.case_timeout_s"),
        ("case_timeout_s=.inf", "experiment.case_timeout_s"),
        ("ray.cpus_per_rank=-1", "ray.cpus_per_rank"),
        ("ray.cpus_per_rank=1.5", "ray.cpus_per_rank"),
        ("ray.start_timeout_s=.nan", "ray.start_timeout_s"),
        ("ray.silence_timeout_s=-1", "ray.silence_timeout_s"),
        ("ray.silence_timeout_s=.nan", "ray.silence_timeout_s"),
        ("ray.collective_timeout_s=0.00001", "ray.collective_timeout_s"),
        ("model.num_experts=1000000000", "model.num_experts"),
        ("model.hidden=1073741824", "model.hidden"),
        ("model.routed_scaling=.inf", "model.routed_scaling"),
        ("model.name=" + "x" * 1000, "model.name"),
        ("worlds=[100000]", "experiment.worlds.0"),
        ("placements=[tp²]", "experiment.placements"),
        ("placements=[tp99999xep99999]", "experiment.placements"),
        ("skews=['zipf:1e308']", "experiment.skews"),
        ("modes=[]", "experiment.modes"),
        (f"tokens={list(range(1, 6000))}", "experiment"),
    ],
    ids=lambda text: text[:40],
)
def test_refused_by_name(assignment, field):
    start = time.monotonic()
    with pytest.raises(ConfigError) as caught:
        asked_for(override({"models": ["tiny"]}, [assignment]), Source(device="cpu"), sweep=True)
    assert caught.value.field == field
    assert len(str(caught.value)) < 1500
    assert time.monotonic() - start < 5


def test_a_value_that_stands_twice_counts_once_and_that_is_said(capsys):
    lists = ["worlds=[2, 2]", "exchanges=[ag_rs, ag_rs, all_reduce]", "models=[tiny, TINY]", "tokens=[8]"]
    asked = asked_for(override({}, lists), Source(device="cpu"), sweep=True)
    found = asked.experiment
    assert (found.worlds, found.exchanges, len(found.models)) == ((2,), ("ag_rs", "all_reduce"), 1)
    assert capsys.readouterr().err.splitlines() == [
        "moe-dist: models: 1 of 2 values stands there already; each is measured once",
        "moe-dist: worlds: 1 of 2 values stands there already; each is measured once",
        "moe-dist: exchanges: 1 of 3 values stands there already; each is measured once",
    ]
