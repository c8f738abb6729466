"""The schemas of tools, made such as the backend takes them: nothing is lost, only what it asks for is added.

The backend refuses a tool without a schema, an array without `items` and, in strict mode, an
object that does not say it is closed. Keys keep their order, because the prompt cache sees them.
"""

from typing import Any

from codex_proxy.errors import RequestError
from codex_proxy.protocol.wire import JsonObject

# Deeper than any schema a person or a generator writes; the backend takes far less.
MAX_DEPTH = 200

_ONE = ("items", "additionalProperties", "not", "if", "then", "else", "contains", "propertyNames",
        "additionalItems", "unevaluatedItems", "unevaluatedProperties")  # fmt: skip
_MANY = ("anyOf", "oneOf", "allOf", "prefixItems", "items")
_NAMED = ("properties", "$defs", "definitions", "patternProperties", "dependentSchemas")


def repair_parameters(value: Any, *, path: str, strict: bool = False) -> JsonObject:
    """Return the schema of a function's parameters, whole.

    Missing, null or no object at all becomes an object without properties; the caller's own
    dicts are not touched.

    Args:
        path: Where it stands in the caller's request, for an error.
        strict: Whether the caller wants strict arguments, for which objects must be closed.

    Raises:
        RequestError: If it is nested deeper than anyone reads.
    """
    if not isinstance(value, dict):
        value = {}
    root = {key: inner for key, inner in value.items() if key != "$schema"}
    if "type" not in root and not any(key in root for key in ("anyOf", "oneOf", "allOf", "$ref")):
        root = {"type": "object", **root}
    repaired = _repair(root, path, strict, 0)
    if repaired.get("type") == "object" and not isinstance(repaired.get("properties"), dict):
        repaired["properties"] = {}
    return repaired


def _repair(schema: JsonObject, path: str, strict: bool, depth: int) -> JsonObject:
    if depth > MAX_DEPTH:
        raise RequestError(f"{path} is nested too deeply", param=path, code="invalid_value")
    repaired = dict(schema)
    for key in _ONE:
        inner = repaired.get(key)
        if isinstance(inner, dict):
            repaired[key] = _repair(inner, path, strict, depth + 1)
    for key in _MANY:
        inner = repaired.get(key)
        if isinstance(inner, list):
            repaired[key] = [
                _repair(one, path, strict, depth + 1) if isinstance(one, dict) else one for one in inner
            ]
    for key in _NAMED:
        inner = repaired.get(key)
        if isinstance(inner, dict):
            repaired[key] = {
                name: _repair(one, path, strict, depth + 1) if isinstance(one, dict) else one
                for name, one in inner.items()
            }
    kinds = repaired.get("type")
    kinds = kinds if isinstance(kinds, list) else [kinds]
    if (
        "array" in kinds
        and "prefixItems" not in repaired
        and not isinstance(repaired.get("items"), dict | list | bool)
    ):
        repaired["items"] = {}
    if "object" in kinds:
        if depth and "properties" in repaired and repaired["properties"] is None:
            repaired["properties"] = {}
        if strict and "additionalProperties" not in repaired:
            repaired["additionalProperties"] = False
    return repaired
