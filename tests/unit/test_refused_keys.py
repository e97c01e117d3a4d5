"""What a section of the config refuses, it refuses in our words and says what is legal: every section, every kind of
constraint."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import pytest
from pydantic import BaseModel, Field, ValidationError

import moe_dist.bench.case
import moe_dist.tables  # noqa: F401
from moe_dist.bench.case import Experiment
from moe_dist.errors import ConfigError, MoeDistError
from moe_dist.model import refused
from moe_dist.model.refused import EXTRA, RULES, as_config_error, legal_in
from moe_dist.model.spec import MoESpec, ParallelSpec, Section, WorkloadSpec

SECTIONS = sorted(Section.__subclasses__(), key=lambda cls: cls.__name__)
SIZES = {"hidden": 128, "intermediate": 128, "num_experts": 4, "top_k": 2}
GOOD = {
    "MoESpec": SIZES,
    "WorkloadSpec": {"tokens": 1},
    "Experiment": {"models": [SIZES]},
    "ProfileSpec": {"folder": "/traces", "name": "EP2"},
    "Case": {"model": SIZES, "parallel": {}, "exchange": "local", "backend": "torch", "workload": {"tokens": 1}},
}
BAD = [
    None, True, 3, -(10**30), 10**30, 1.5, float("nan"), float("inf"), "", "x", "x" * 1000, "\udcff", [], [None], {},
    {"nosuch": 1}, [[]], [[1, 2, 3]], [["x", [1]]], [""], ["x" * 1000], [10**30], object(),
]  # fmt: skip
# What a JSON schema says of a value that `legal_in` or the error's kind has words for, and what constrains nothing.
KNOWN = {
    "type", "enum", "const", "anyOf", "$ref", "$defs", "legal", "properties", "required", "additionalProperties",
    "items", "prefixItems", "minItems", "maxItems", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum",
    "minLength", "maxLength", "pattern", "minProperties",
}  # fmt: skip
SILENT = {"title", "description", "default"}


def keywords(schema: Any) -> Iterator[str]:
    """Every keyword in a JSON schema; names of properties and definitions are none."""
    if isinstance(schema, list):
        for each in schema:
            yield from keywords(each)
    if not isinstance(schema, dict):
        return
    for name, value in schema.items():
        yield name
        if name in ("properties", "$defs"):
            yield from keywords(list(value.values()))
        elif name not in ("default", "enum", "const", "legal"):
            yield from keywords(value)


def test_all_sections_are_looked_at():
    assert {cls.__name__ for cls in SECTIONS} >= {
        "MoESpec", "ParallelSpec", "WorkloadSpec", "SourceSpec", "Case", "Experiment", "RaySpec", "TuningTable",
    }  # fmt: skip


@pytest.mark.parametrize("cls", SECTIONS, ids=lambda cls: cls.__name__)
def test_every_constraint_of_a_schema_has_words(cls):
    schema = cls.model_json_schema()
    assert set(keywords(schema)) - KNOWN - SILENT == set()
    for name, field in schema["properties"].items():
        assert legal_in(field, schema), name


@pytest.mark.parametrize("cls", SECTIONS, ids=lambda cls: cls.__name__)
def test_whatever_is_refused_is_refused_in_our_words(cls, monkeypatch):
    kinds = set()

    def noted(error: ValidationError, *rest: Any) -> ConfigError:
        kinds.update(each["type"] for each in error.errors())
        return as_config_error(error, *rest)

    monkeypatch.setattr("moe_dist.model.spec.as_config_error", noted)
    refusals = []
    for name in [*cls.model_fields, "nosuch"]:
        for value in BAD:
            try:
                cls(**{**GOOD.get(cls.__name__, {}), name: value})
            except ConfigError as error:
                refusals.append(error)
            except MoeDistError:  # unsupported: that is another matter
                continue
    assert len(refusals) > 20
    assert kinds <= {*RULES, *EXTRA}
    for error in refusals:
        said = str(error)
        assert not any(word in said.lower() for word in ("input should", "should have", "should be", "pydantic")), said
        if error.rule in RULES.values():
            assert error.legal, said


class Odd(BaseModel):
    """Constraints that no section has yet."""

    kind: Literal["a", "b"] = "a"
    step: int = Field(default=4, multiple_of=4)
    most: float = Field(default=0, gt=-1, ge=0, lt=2)


def test_a_new_constraint_can_not_slip_through():
    assert "multipleOf" in set(keywords(Odd.model_json_schema())) - KNOWN - SILENT
    with pytest.raises(ValidationError) as caught:
        Odd(step=3)
    assert caught.value.errors()[0]["type"] not in RULES
    assert str(as_config_error(caught.value, Odd, "odd")) == "odd.step = 3: is no legal value (legal: a whole number)"
    with pytest.raises(ValidationError) as caught:
        Odd(most=2)
    assert str(as_config_error(caught.value, Odd, "odd")) == "odd.most = 2: is too large (legal: 0 to below 2)"


@pytest.mark.parametrize(
    ("cls", "values", "said"),
    [
        (MoESpec, SIZES | {"hiden": 3}, "model.hiden = 3: unknown key; did you mean hidden? (legal: name, hidden, "),
        (MoESpec, SIZES | {"zzz": 3}, "model.zzz = 3: unknown key (legal: name, hidden, "),
        (MoESpec, SIZES | {"quant": "fp8_blok"}, "is no legal value; did you mean fp8_block? (legal: none, fp8_block"),
        (MoESpec, {}, "model.hidden = None: this key is required (legal: 1 to 1,048,576)"),
        (ParallelSpec, {"replicas": {0: 1}}, "parallel.replicas.0.1 = 1: is no list (legal: a list of -131,072 to"),
        (WorkloadSpec, {"tokens": "8"}, "workload.tokens = '8': is no whole number (legal: 1 to 16,777,216)"),
        (WorkloadSpec, {"tokens": 1, "trace": "x"}, "(legal: text that ^[0-9a-f]{64}$ matches)"),
        (Experiment, {"exchanges": []}, "is empty (legal: a list with one or more of local, all_reduce, ag_rs"),
        (Experiment, {"backends": []}, "is empty (legal: a list with one or more of torch, "),
        (Experiment, {"placements": []}, "is empty (legal: a list with one or more of tp, ep, tp2xep2 and the like, "),
        (Experiment, {"skews": []}, "is empty (legal: a list with one or more of balanced, uniform, "),
        (Experiment, {"tokens": []}, "is empty (legal: a list with one or more of 1 to 16,777,216)"),
        (Experiment, {"worlds": []}, "is empty (legal: a list with one or more of 1 to 4,096)"),
        (Experiment, {"token_layouts": []}, "is empty (legal: a list with one or more of replicated, sharded)"),
        (Experiment, {"modes": []}, "is empty (legal: a list with one or more of eager, graph)"),
        (Experiment, {"exchanges": [3]}, "experiment.exchanges.0 = 3: is no text (legal: local, all_reduce, "),
        (Experiment, {"payload": 8}, "experiment.payload = 8: is no text (legal: auto, unquantized, fp8)"),
        (Experiment, {"ray": 5}, "experiment.ray = 5: is no section (legal: a section of address, strategy, "),
    ],
)  # fmt: skip
def test_what_is_said(cls, values, said):
    with pytest.raises(ConfigError) as caught:
        cls(**GOOD["Experiment"] | values if cls is Experiment else values)
    assert said in str(caught.value)


def test_what_has_no_schema_of_its_own_says_nothing_wrong():
    assert legal_in({}, {}) is None
    assert refused._at({"type": "object"}, ("a", 0, "b"), {}) == {}
