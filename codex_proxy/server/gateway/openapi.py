"""The document of the admin API, made of the table of operations."""

import inspect
from collections.abc import Sequence
from typing import Any

import msgspec

from codex_proxy import __version__
from codex_proxy.server.gateway.desk import Call, Csv, Desk
from codex_proxy.server.gateway.operations import BASE, OPERATIONS, Operation
from codex_proxy.server.gateway.performing import types_of
from codex_proxy.server.gateway.shapes import Nothing

_SCHEMA = "#/components/schemas/{name}"

_ERROR = {
    "title": "Error",
    "type": "object",
    "properties": {
        "error": {
            "type": "object",
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"], "description": "The field that is meant."},
                "code": {"type": ["string", "null"]},
            },
            "required": ["message", "type", "param", "code"],
        }
    },
    "required": ["error"],
}


async def describe_api(desk: Desk, call: Call[Nothing, Nothing]) -> dict[str, Any]:
    """Return this API's own description."""
    return document(OPERATIONS)


def document(operations: Sequence[Operation]) -> dict[str, Any]:
    """Return the document, as OpenAPI 3.1."""
    shown = [one for one in operations if not one.is_alias]
    # Asked for all at once, so that a type that many share is described once.
    kinds = [kind for one in shown for kind in types_of(one) if kind not in (Csv, Nothing)]
    schemas, components = msgspec.json.schema_components(kinds, ref_template=_SCHEMA)
    schema_of = dict(zip(map(id, kinds), schemas, strict=True))
    paths: dict[str, dict[str, Any]] = {}
    for one in shown:
        query, body, answer = types_of(one)
        told: dict[str, Any] = {
            "operationId": one.name,
            "summary": one.summary,
            "description": inspect.getdoc(one.handler()) or "",
            "tags": [one.path.split("/")[1].split(".")[0]],
            "parameters": [*_segments(one.path), *_parameters(schema_of.get(id(query)), components)],
            "responses": {
                str(one.status): {
                    "description": "Done.",
                    "content": _content(answer, schema_of),
                },
                "default": {
                    "description": "What kept it from being done.",
                    "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}},
                },
            },
        }
        if body is not Nothing:
            told["requestBody"] = {
                "required": True,
                "content": {"application/json": {"schema": schema_of[id(body)]}},
            }
        paths.setdefault(f"{BASE}{one.path}", {})[one.method.lower()] = told
    asked = {query.__name__ for query, _, _ in (types_of(one) for one in shown)}
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "codex-proxy: the admin API of the gateway",
            "version": __version__,
            "description": "Users, client keys, money, prices, upstreams and usage. All of it needs the admin-key.",
        },
        "security": [{"bearer": []}, {"header": []}],
        "paths": paths,
        "components": {
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer"},
                "header": {"type": "apiKey", "in": "header", "name": "x-api-key"},
            },
            # What is asked for in a query is told as parameters.
            "schemas": {
                **{name: one for name, one in sorted(components.items()) if name not in asked},
                "Error": _ERROR,
            },
        },
    }


def _content(answer: Any, schema_of: dict[int, Any]) -> dict[str, Any]:
    if answer is Csv:
        return {"text/csv": {"schema": {"type": "string"}}}
    schema = {"type": "object"} if answer is Nothing else schema_of[id(answer)]
    return {"application/json": {"schema": schema}}


def _segments(path: str) -> list[dict[str, Any]]:
    _, brace, rest = path.partition("{")
    if not brace:
        return []
    return [{"name": rest.partition("}")[0], "in": "path", "required": True, "schema": {"type": "string"}}]


def _parameters(schema: dict[str, Any] | None, components: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the fields of a query as parameters."""
    if schema is None:
        return []
    fields = components[schema["$ref"].rpartition("/")[2]]
    return [
        {
            "name": name,
            "in": "query",
            "required": name in fields["required"],
            "schema": field,
            **({"description": field["description"]} if "description" in field else {}),
        }
        for name, field in fields["properties"].items()
    ]
