"""What pydantic finds wrong with a section, in our words: a rule for each kind of error, and what is legal, which the
section's JSON schema says."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from pydantic import BaseModel, TypeAdapter, ValidationError

from moe_dist.errors import UNKNOWN_KEY, ConfigError, listed

Schema = Mapping[str, Any]

# By pydantic's names of its errors. The test of this table goes through all that the sections can raise.
RULES = {
    "bool_type": "is neither true nor false",
    "dataclass_type": "is no section",
    "dict_type": "is no section",
    "finite_number": "is no finite number",
    "float_type": "is no number",
    "greater_than": "is too small",
    "greater_than_equal": "is too small",
    "int_parsing": "is no whole number",
    "int_type": "is no whole number",
    "json_invalid": "is no JSON",
    "less_than": "is too large",
    "less_than_equal": "is too large",
    "list_type": "is no list",
    "literal_error": "is no legal value",
    "missing": "this key is required",
    "model_type": "is no section",
    "string_pattern_mismatch": "is no legal value",
    "string_too_long": "is too long",
    "string_too_short": "is empty",
    "string_type": "is no text",
    "string_unicode": "is no UTF-8 text",
    "too_long": "has too many values",
    "too_short": "has too few values",
    "tuple_type": "is no list",
}
EXTRA = ("extra_forbidden", "unexpected_keyword_argument")  # the latter in a dataclass


def legal(values: Callable[[], Iterable[str] | str]) -> Callable[[dict[str, Any]], None]:
    """For `json_schema_extra` of a field whose type doesn't say what it takes, or what each value of its list is."""

    def add(schema: dict[str, Any]) -> None:
        found = values()
        schema["legal"] = found if isinstance(found, str) else list(found)

    return add


def as_config_error(error: ValidationError, cls: type[BaseModel] | TypeAdapter[Any], section: str) -> ConfigError:
    """The first thing that is wrong, unknown keys before others: a key that is missing may be there under a wrong name.
    `section` is how messages call what `cls` describes."""
    first = min(error.errors(include_url=False), key=lambda each: each["type"] not in EXTRA)
    kind, given, place = first["type"], first["input"], first["loc"]
    path = ".".join([section, *map(str, place)]).strip(".")
    whole = cls.json_schema() if isinstance(cls, TypeAdapter) else cls.model_json_schema()
    if kind in EXTRA:
        keys = tuple(_at(whole, place[:-1], whole).get("properties", ()))
        return ConfigError(path, given, UNKNOWN_KEY, keys)
    if kind == "missing":
        given = None  # pydantic gives what it is missing in
    rule = "is empty" if kind == "too_short" and not given else RULES.get(kind, "is no legal value")
    return ConfigError(path, given, rule, legal_in(_at(whole, place, whole), whole))


def legal_in(schema: Schema, whole: Schema) -> object:
    """What a value of this schema may be, as a message has it. `whole` has the definitions that it refers to."""
    schema = _resolved(schema, whole)
    if "legal" in schema:
        return _several(schema, schema["legal"]) if schema.get("type") == "array" else schema["legal"]
    if "enum" in schema or "const" in schema:
        return tuple(schema.get("enum") or [schema["const"]])
    match schema.get("type"):
        case "boolean":
            return ("true", "false")
        case "integer" | "number" as kind:
            return _bounds(schema) or ("a whole number" if kind == "integer" else "a number")
        case "string":
            return _text(schema)
        case "array" if "prefixItems" in schema:
            return f"a list of {len(schema['prefixItems'])} values"
        case "array":
            return _several(schema, legal_in(schema["items"], whole))
        case "object" if "properties" in schema:
            return f"a section of {listed(list(schema['properties']))}"
        case "object":
            return "a section with one key or more" if schema.get("minProperties") else "a section"
    return None


def _at(schema: Schema, place: Iterable[int | str], whole: Schema) -> Schema:
    """The schema of what lies at `place` in a value of `schema`; an empty one where nothing is known of it."""
    schema = _resolved(schema, whole)
    for step in place:
        if isinstance(step, int) and "legal" in schema:
            inner: Schema = {"legal": schema["legal"]}
        elif isinstance(step, int):
            fixed = schema.get("prefixItems", ())
            inner = fixed[step] if step < len(fixed) else schema.get("items", {})
        else:
            inner = schema.get("properties", {}).get(step) or schema.get("additionalProperties") or {}
        schema = _resolved(inner if isinstance(inner, Mapping) else {}, whole)
    return schema


def _resolved(schema: Schema, whole: Schema) -> Schema:
    """The schema itself, where this one refers to it or is of a value or null. Null is the same as no such key."""
    if "$ref" in schema:
        return _resolved(whole["$defs"][schema["$ref"].rpartition("/")[2]], whole)
    if "anyOf" in schema:
        return _resolved(next(each for each in schema["anyOf"] if each.get("type") != "null"), whole)
    return schema


def _bounds(schema: Schema) -> str | None:
    """1 to 8, 1 and more, above 0 to 5. Of two bounds at one end the tighter one counts."""
    least, above = schema.get("minimum"), schema.get("exclusiveMinimum")
    most, below = schema.get("maximum"), schema.get("exclusiveMaximum")
    low = high = None
    if least is not None or above is not None:
        open_ended = least is None or (above is not None and above >= least)
        low = f"above {_number(above)}" if open_ended else _number(least)
    if most is not None or below is not None:
        open_ended = most is None or (below is not None and below <= most)
        high = f"below {_number(below)}" if open_ended else _number(most)
    if low and high:
        return f"{low} to {high}"
    return f"{low} and more" if low else f"at most {high}" if high else None


def _number(value: Any) -> str:
    return f"{int(value) if value == int(value) else value:,}"


def _text(schema: Schema) -> str:
    if "pattern" in schema:
        return f"text that {schema['pattern']} matches"
    least, most = schema.get("minLength", 0), schema.get("maxLength")
    return f"text of {least} to {most} characters" if most else "text"


def _several(schema: Schema, each: object) -> str:
    return f"a list with one or more of {listed(each)}" if schema.get("minItems") else f"a list of {listed(each)}"
