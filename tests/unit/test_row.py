"""Rows and documents as models: what they refuse, what docs/results.md says of them, and the files recorded before."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, TypeAdapter, ValidationError
from unit.test_bench import CPU, STAGES, row

from moe_dist.bench.findings import ERRORS
from moe_dist.bench.phases import BenchResult, TimedSteps
from moe_dist.bench.results import Outcome, provenance, results_document
from moe_dist.bench.row import Document, Failed, Hardware, Notice, Provenance, Refused, Row

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "results.md").read_text()
RECORDED = sorted(
    path for path in (ROOT / "benchmarks").glob("*.json") if "refused" in json.loads(path.read_text())
)  # of `compare`; other files there have rows of their own


class TestRefusals:
    @pytest.mark.parametrize("key", Row.model_fields)
    def test_a_key_that_is_missing(self, key):
        rest = {name: value for name, value in row().model_dump().items() if name != key}
        with pytest.raises(ValidationError, match=f"(?s){key}.*Field required"):
            Row(**rest)

    def test_a_key_that_is_not_known(self):
        with pytest.raises(ValidationError, match=r"(?s)p50_ms.*not permitted"):
            Row(**row().model_dump(), p50_ms=1.0)

    @pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
    @pytest.mark.parametrize("key", ["p50_us", "imbalance", "unstaged_us", *ERRORS])
    def test_numbers_that_are_not_finite(self, key, value):
        with pytest.raises(ValidationError, match=key):
            row(**{key: value})

    def test_numbers_that_are_not_finite_inside_of_others(self):
        for changes in ({"stages_us": STAGES | {"gemm1": math.nan}}, {"round_p50_us": (1.0, math.inf)}):
            with pytest.raises(ValidationError, match="finite"):
                row(**changes)

    @pytest.mark.parametrize(
        ("key", "value"),
        [("hidden", 8.0), ("hidden", True), ("hidden", "8"), ("world", 0), ("seed", None), ("p50_us", "1.0"),
         ("p50_us", -1.0), ("ok", 1), ("token_layout", "striped"), ("rows_per_rank", ("1",)), ("model", None)],
    )  # fmt: skip
    def test_other_types_and_numbers_out_of_bounds(self, key, value):
        with pytest.raises(ValidationError, match=key):
            row(**{key: value})

    def test_a_row_does_not_change(self):
        with pytest.raises(ValidationError, match="frozen"):
            row().ok = False

    def test_less_than_no_time_is_in_no_stage_where_clocks_are_coarse(self):
        assert row(unstaged_us=-0.3).unstaged_us == -0.3


class TestDocument:
    def test_is_read_back_as_it_was_written(self):
        outcome = Outcome([row(), row(tp=2)], [Refused(case="c", reason="r")], {2: ["a", "b"]}, {"said": [0, 1]})
        written = results_document(provenance(CPU), outcome)
        found = Document.model_validate_json(json.dumps(written, allow_nan=False))
        assert found.rows == tuple(outcome.rows)
        assert found.notices == (Notice(text="said", ranks=(0, 1)),)
        assert found.ranks == {2: ("a", "b")}
        assert found.runs == (provenance(CPU).model_copy(update={"date": found.date}),)
        assert found.model_dump(mode="json") == written

    def test_its_schema_says_what_every_key_means(self):
        definitions = Document.model_json_schema()["$defs"]
        assert definitions["Row"]["properties"]["unstaged_us"]["description"].startswith("µs in no stage")
        assert set(definitions["Row"]["required"]) == set(Row.model_fields)
        assert definitions["Row"]["additionalProperties"] is False


def kind(schema: dict[str, Any]) -> str:
    """A JSON schema's type in words."""
    if "anyOf" in schema:
        return " or ".join(kind(part) for part in schema["anyOf"])
    if "$ref" in schema:
        return schema["$ref"].rpartition("/")[2]
    names = {"string": "text", "boolean": "true or false", "object": "object", "array": "list"}
    name = names.get(schema["type"], schema["type"])
    inner = schema.get("items") or schema.get("additionalProperties")
    return f"{name} of {kind(inner)}" if isinstance(inner, dict) else name


def documented(model: type[BaseModel]) -> str:
    """A table of the model's keys, as docs/results.md has it."""
    rows = [
        f"| `{name}` | {kind(schema)} | {schema['description'].replace('|', '/')} |"
        for name, schema in model.model_json_schema()["properties"].items()
    ]
    return "\n".join(["| key | type | meaning |", "|---|---|---|", *rows])


class TestPage:
    @pytest.mark.parametrize(
        "model", [Document, Hardware, Provenance, Row, Notice, Refused, Failed, BenchResult, TimedSteps]
    )
    def test_has_every_key_as_the_model_has_it(self, model):
        wanted = documented(model)
        assert wanted in PAGE, f"docs/results.md must hold this table:\n{wanted}"

    def test_says_what_each_recorded_file_lacks(self):
        said = dict(re.findall(r"^\| \[(\S+\.json)\]\S+ \| (.*) \|$", PAGE, re.M))
        assert len(RECORDED) >= 7
        for path in RECORDED:
            missing = set(Row.model_fields).difference(*json.loads(path.read_text())["rows"])
            if missing:
                listed = re.findall(r"`(\w+)`", said.pop(path.name))
                assert listed == [key for key in Row.model_fields if key in missing]
        assert said == {}


@pytest.mark.parametrize("path", RECORDED, ids=lambda path: path.name)
def test_recorded_keys_still_mean_what_they_did(path):
    """Each key of an older file is a key of today, with a value that it may have."""
    for recorded in json.loads(path.read_text())["rows"]:
        for key, value in recorded.items():
            allowed = TypeAdapter(Row.model_fields[key].rebuild_annotation(), config={"strict": True})
            assert allowed.dump_python(allowed.validate_json(json.dumps(value)), mode="json") == value, key
