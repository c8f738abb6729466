"""The schemas of tools: only what the backend asks for is added, and nothing is lost."""

import copy
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from codex_proxy.errors import RequestError
from codex_proxy.protocol.schema import MAX_DEPTH, repair_parameters

EMPTY: dict[str, Any] = {"type": "object", "properties": {}}


def repair(value: Any, *, strict: bool = False) -> dict[str, Any]:
    return repair_parameters(value, path="tools.0.function.parameters", strict=strict)


@pytest.mark.parametrize(
    ("schema", "repaired"),
    [
        (None, EMPTY),
        ({}, EMPTY),
        ("x", EMPTY),
        ([], EMPTY),
        ({"type": "object"}, EMPTY),
        ({"type": "object", "properties": None}, EMPTY),
        ({"properties": {"a": {}}}, {"type": "object", "properties": {"a": {}}}),
        ({"$schema": "http://json-schema.org/draft-07/schema#", **EMPTY}, EMPTY),
        ({"$ref": "#/$defs/a", "$defs": {"a": EMPTY}}, {"$ref": "#/$defs/a", "$defs": {"a": EMPTY}}),
        ({"anyOf": [EMPTY]}, {"anyOf": [EMPTY]}),
    ],
)
def test_parameters_are_an_object_with_properties(schema: Any, repaired: dict[str, Any]) -> None:
    assert repair(schema) == repaired


ARRAY = {"type": "array"}
WHOLE = {"type": "array", "items": {}}


@pytest.mark.parametrize(
    ("inner", "repaired"),
    [
        (ARRAY, WHOLE),
        ({"type": ["array", "null"]}, {"type": ["array", "null"], "items": {}}),
        ({"type": "array", "items": None}, WHOLE),
        ({"type": "array", "items": ARRAY}, {"type": "array", "items": WHOLE}),
        ({"type": "array", "items": [ARRAY, 5]}, {"type": "array", "items": [WHOLE, 5]}),
        ({"type": "array", "items": False}, {"type": "array", "items": False}),
        ({"type": "array", "prefixItems": [ARRAY]}, {"type": "array", "prefixItems": [WHOLE]}),
        ({"anyOf": [ARRAY, {"type": "string"}]}, {"anyOf": [WHOLE, {"type": "string"}]}),
        ({"not": ARRAY}, {"not": WHOLE}),
        ({"additionalProperties": ARRAY}, {"additionalProperties": WHOLE}),
        ({"patternProperties": {"^a": ARRAY}}, {"patternProperties": {"^a": WHOLE}}),
        ({"$defs": {"a": ARRAY}}, {"$defs": {"a": WHOLE}}),
        ({"type": "object", "properties": None}, {"type": "object", "properties": {}}),
        (
            {"properties": {"type": {"type": "string"}, "a": 5}},
            {"properties": {"type": {"type": "string"}, "a": 5}},
        ),
        ({"enum": [{"type": "array"}], "default": {"type": "array"}}, {"enum": [ARRAY], "default": ARRAY}),
        ({"type": {"odd": 1}}, {"type": {"odd": 1}}),
        (True, True),
        (5, 5),
    ],
)
def test_an_array_says_what_is_in_it_wherever_it_stands(inner: Any, repaired: Any) -> None:
    schema = {"type": "object", "properties": {"a": inner}}
    assert repair(schema) == {"type": "object", "properties": {"a": repaired}}


def test_strict_objects_are_closed_and_others_are_not() -> None:
    schema = {
        "type": "object",
        "properties": {
            "closed": {"type": "object", "properties": {}},
            "open": {"type": "object", "additionalProperties": True},
            "maybe": {"type": ["object", "null"]},
        },
    }
    assert repair(schema) == schema
    assert repair(schema, strict=True) == {
        "type": "object",
        "properties": {
            "closed": {"type": "object", "properties": {}, "additionalProperties": False},
            "open": {"type": "object", "additionalProperties": True},
            "maybe": {"type": ["object", "null"], "additionalProperties": False},
        },
        "additionalProperties": False,
    }


def test_keys_keep_their_order_and_the_callers_own_schema_is_not_touched() -> None:
    schema = {
        "properties": {"z": ARRAY, "a": {"description": "d", "type": "string"}},
        "type": "object",
        "x": 1,
    }
    before = copy.deepcopy(schema)
    repaired = repair(schema, strict=True)
    assert schema == before
    assert json.dumps(repaired).startswith(
        '{"properties": {"z": {"type": "array", "items": {}}, "a": {"description"'
    )
    assert list(repaired) == ["properties", "type", "x", "additionalProperties"]


def test_a_schema_deeper_than_anybody_reads_is_refused_by_its_path() -> None:
    def nested(depth: int) -> dict[str, Any]:
        schema: dict[str, Any] = {"type": "string"}
        for _ in range(depth):
            schema = {"type": "object", "properties": {"a": schema}}
        return schema

    assert repair(nested(MAX_DEPTH)) == nested(MAX_DEPTH)
    for depth in (MAX_DEPTH + 1, 100_000):
        with pytest.raises(RequestError) as caught:
            repair(nested(depth))
        assert caught.value.param == "tools.0.function.parameters"


KEYS = st.sampled_from(["type", "items", "properties", "anyOf", "not", "$defs", "additionalProperties", "a"])
TYPES = st.sampled_from(["array", "object", "string", None, 5]) | st.lists(
    st.sampled_from(["array", "object"])
)
SCHEMAS: st.SearchStrategy[Any] = st.recursive(
    TYPES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4), max_leaves=12
)


@settings(derandomize=True, deadline=None, max_examples=300, database=None)
@given(SCHEMAS, st.booleans())
def test_any_json_is_repaired_once_and_for_all(value: Any, strict: bool) -> None:
    once = repair(value, strict=strict)
    assert repair(once, strict=strict) == once
