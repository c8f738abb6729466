"""The schemas of tools, made such as the backend takes them: nothing is lost, only what it asks for is added.

The backend refuses a tool without a schema, an array without `items` and, in strict mode, an
object that does not say it is closed. Keys keep their order, because the prompt cache sees them.
"""

from typing import Any

from codex_proxy.protocol.fields import FieldError
from codex_proxy.protocol.wire import JsonObject

# Deeper than any schema a person or a generator writes; the backend takes far less.
MAX_DEPTH = 200

_ONE = frozenset({
    "items", "additionalProperties", "not", "if", "then", "else", "contains", "propertyNames", "additionalItems",
    "unevaluatedItems", "unevaluatedProperties",
})  # fmt: skip
_MANY = frozenset({"anyOf", "oneOf", "allOf", "prefixItems", "items"})
_NAMED = frozenset({"properties", "$defs", "definitions", "patternProperties", "dependentSchemas"})
"""Where schemas stand in a schema: one, a list of them, some with names."""
_HOLDS = _ONE | _MANY | _NAMED

_HOLDERS = ("array", "object")
_PLAIN = ("string", "integer", "number", "boolean", "null")
_SAYS_WHAT = ("type", "anyOf", "oneOf", "allOf", "$ref")


def repair_parameters(value: Any, *, path: str = "parameters", strict: bool = False) -> JsonObject:
    """Return the schema of a function's parameters, whole.

    Missing, null or no object at all becomes an object without properties. The caller's own
    dicts are not touched: what is right stands in the result as it is.

    Args:
        path: Where it stands in the caller's request, for an error.
        strict: Whether the caller wants strict arguments, for which objects must be closed.

    Raises:
        FieldError: If it is nested deeper than anyone reads.
    """
    root: JsonObject = value if isinstance(value, dict) else {}
    if "$schema" in root:
        root = dict(root)
        del root["$schema"]
    if "type" not in root and not any(key in root for key in _SAYS_WHAT):
        root = {"type": "object", **root}
    try:
        repaired = _repair(root, strict, 0)
    except FieldError as exc:
        exc.within(path)
        raise
    if repaired.get("type") == "object" and not isinstance(repaired.get("properties"), dict):
        repaired = {**repaired, "properties": {}}
    return repaired


def _repair(schema: JsonObject, strict: bool, depth: int) -> JsonObject:
    """Return *schema* repaired; the very same object when nothing is wrong in it."""
    if depth > MAX_DEPTH:
        raise FieldError("", "is nested too deeply", code="invalid_value", begins=True)
    repaired = schema
    for key in _HOLDS.intersection(schema) if not _HOLDS.isdisjoint(schema) else ():
        whole = inner = schema[key]
        if isinstance(inner, dict):
            if key in _NAMED:
                whole = _repair_named(inner, strict, depth + 1)
            elif key in _ONE:
                whole = _repair(inner, strict, depth + 1)
        elif isinstance(inner, list) and key in _MANY:
            whole = _repair_many(inner, strict, depth + 1)
        if whole is not inner:
            if repaired is schema:
                repaired = dict(schema)
            repaired[key] = whole
    kinds = repaired.get("type")
    if kinds not in _HOLDERS and not isinstance(kinds, list):
        return repaired
    missing = _missing(repaired, kinds if isinstance(kinds, list) else [kinds], strict, depth)
    return {**repaired, **missing} if missing else repaired


def _repair_named(schemas: JsonObject, strict: bool, depth: int) -> JsonObject:
    repaired = schemas
    is_near = depth <= MAX_DEPTH
    for name, one in schemas.items():
        if not isinstance(one, dict) or (
            # A plain value, as most properties are.
            is_near and one.get("type") in _PLAIN and _HOLDS.isdisjoint(one)
        ):
            continue
        if (whole := _repair(one, strict, depth)) is not one:
            if repaired is schemas:
                repaired = dict(schemas)
            repaired[name] = whole
    return repaired


def _repair_many(schemas: list[Any], strict: bool, depth: int) -> list[Any]:
    repaired = schemas
    for index, one in enumerate(schemas):
        if isinstance(one, dict) and (whole := _repair(one, strict, depth)) is not one:
            if repaired is schemas:
                repaired = list(schemas)
            repaired[index] = whole
    return repaired


def _missing(schema: JsonObject, kinds: list[Any], strict: bool, depth: int) -> JsonObject:
    """Return what the backend wants a schema of *kinds* to say besides."""
    missing: JsonObject = {}
    if (
        "array" in kinds
        and "prefixItems" not in schema
        and not isinstance(schema.get("items"), dict | list | bool)
    ):
        missing["items"] = {}
    if "object" in kinds:
        if depth and "properties" in schema and schema["properties"] is None:
            missing["properties"] = {}
        if strict and "additionalProperties" not in schema:
            missing["additionalProperties"] = False
    return missing
