"""The endpoints whose bodies pass untouched, and the local token count."""

import json
import random
from typing import Any

import orjson
import pytest

from codex_proxy.errors import RequestError
from codex_proxy.protocol.catalog import Catalog
from codex_proxy.protocol.compact import (
    COMPACT,
    IMAGES,
    PASSTHROUGH,
    SEARCH,
    decode_count,
    decode_passthrough,
    render_count,
)
from codex_proxy.protocol.request import BackendRequest
from codex_proxy.protocol.responses_request import decode
from codex_proxy.protocol.tokens import Count, count_request, estimate
from codex_proxy.protocol.wire import JsonObject


def input_tokens(raw: bytes, count: Count = estimate) -> JsonObject:
    """Read a request, count it and render the answer, as the server does with a counter between."""
    return render_count(count_request(decode_count(raw), count))


CATALOG = Catalog()
CODEX = {"originator": "codex_exec", "session-id": "s-1"}
BODY: dict[str, Any] = {
    "model": "gpt-5.5",
    "input": [
        {"type": "message", "role": "system", "content": "left as it is"},
        {"type": "reasoning", "id": "odd", "summary": [], "encrypted_content": "sealed"},
        {"type": "compaction", "encrypted_content": "older"},
    ],
    "instructions": "be brief",
    "temperature": 1,
    "parallel_tool_calls": True,
}


def ask(endpoint: str, body: Any, headers: dict[str, str] | None = None) -> BackendRequest:
    return decode_passthrough(endpoint, json.dumps(body).encode(), headers or {}, catalog=CATALOG)


def test_a_compactions_bytes_go_on_as_they_came() -> None:
    raw = json.dumps(BODY, indent=2).encode()
    request = decode_passthrough(COMPACT, raw, CODEX, catalog=CATALOG)
    assert request.body is raw
    assert (request.endpoint, request.model, request.stream) == ("responses/compact", "gpt-5.5", False)
    assert request.binding is not None
    assert (request.binding.source, request.is_codex, bool(request.compacted)) == ("session-id", True, True)
    assert request.encrypted == ("sealed",)
    assert request.headers["x-codex-routing-hint"] == "model=gpt-5.5"
    stripped = request.body_for(None, lambda _: True)
    assert [item["type"] for item in orjson.loads(stripped)["input"]] == ["message", "compaction"]


@pytest.mark.parametrize(
    ("fields", "changes"),
    [
        ({"model": "gpt-5.5-high-fast"}, {"reasoning": {"effort": "high"}, "service_tier": "priority"}),
        ({"model": "gpt-5.5-auto", "reasoning": {"effort": "low"}}, {"reasoning": None}),
        (
            {"model": "gpt-5.5-max", "reasoning": {"summary": "auto"}},
            {"reasoning": {"summary": "auto", "effort": "xhigh"}},
        ),
        ({"stream": False}, {"stream": None}),
    ],
)
def test_a_suffix_is_resolved_and_nothing_else_is_touched(
    fields: dict[str, Any], changes: dict[str, Any]
) -> None:
    request = ask(COMPACT, {**BODY, **fields})
    wanted = {key: value for key, value in {**BODY, **changes}.items() if value is not None}
    assert orjson.loads(request.body) == wanted
    assert request.asked_model == fields.get("model", "gpt-5.5")
    assert request.service_tier == changes.get("service_tier")


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({**BODY, "stream": True}, "stream"),
        ({**BODY, "stream": "no"}, "stream"),
        ({"input": []}, "model"),
        ({**BODY, "model": 7}, "model"),
        ({**BODY, "previous_response_id": "resp_1"}, "previous_response_id"),
        ([], None),
    ],
)
def test_a_compaction_that_cannot_be_is_refused_by_its_path(body: Any, param: str | None) -> None:
    with pytest.raises(RequestError) as caught:
        ask(COMPACT, body)
    assert (caught.value.status, caught.value.param) == (400, param)


def test_a_compaction_is_part_of_the_conversation_that_it_compacts() -> None:
    """The account whose cache holds the conversation shortens it, also for those who name nothing."""
    items = [
        {"role": "user", "content": "a long story"},
        {"role": "assistant", "content": "go on"},
    ]
    turn = decode(json.dumps({"model": "gpt-5.5-high", "input": items}).encode(), {}, catalog=CATALOG)
    compaction = ask(COMPACT, {"model": "gpt-5.5", "input": items})
    assert compaction.session == turn.session
    assert compaction.headers == {"session-id": turn.session}
    assert orjson.loads(compaction.body) == {"model": "gpt-5.5", "input": items}
    assert not compaction.is_opening


@pytest.mark.parametrize("endpoint", [SEARCH, *IMAGES])
def test_what_is_no_conversation_is_known_by_a_name_only(endpoint: str) -> None:
    assert ask(endpoint, {"input": "x", "user": "anna"}).binding is None
    assert ask(endpoint, {"input": "x"}, {"session-id": "s"}).session


@pytest.mark.parametrize("endpoint", [SEARCH, *IMAGES])
def test_searches_and_pictures_pass_untouched(endpoint: str) -> None:
    raw = b'{ "model" : "gpt-image-9-high", "query": "x", "prompt_cache_key": "k" }'
    request = decode_passthrough(
        endpoint, raw, {"content-type": "application/json; charset=utf-8"}, catalog=CATALOG
    )
    assert request.body is raw
    assert request.model == "gpt-image-9-high"
    assert request.binding is not None
    assert request.binding.source == "prompt_cache_key"
    assert "session-id" not in request.headers
    assert request.content_type == "application/json; charset=utf-8"
    assert ask(endpoint, {"query": "x"}).model == ""


def test_a_routing_hint_is_corrected_where_one_was_sent() -> None:
    hint = "x-codex-routing-hint"
    sent = {**CODEX, hint: "model=stale"}
    assert ask(SEARCH, {"model": "gpt-5.5"}, sent).headers[hint] == "model=gpt-5.5"
    assert hint not in ask(SEARCH, {"model": "gpt-5.5"}, CODEX).headers
    assert hint not in ask(SEARCH, {}, sent).headers


def test_a_form_passes_with_its_boundary() -> None:
    raw = b"--b\r\ncontent-disposition: form-data; name=model\r\n\r\n\xff\x00\r\n--b--"
    headers = {"content-type": "multipart/form-data; boundary=b"}
    request = decode_passthrough("images/edits", raw, headers, catalog=CATALOG)
    assert request.body is raw
    assert request.content_type == headers["content-type"]
    assert (request.model, request.input_bytes) == ("", 0)


def test_pictures_may_be_streamed() -> None:
    assert ask("images/generations", {"stream": True}).stream
    assert not ask(SEARCH, {"stream": True}).stream


def test_bytes_that_call_themselves_json_must_be() -> None:
    for endpoint in PASSTHROUGH:
        with pytest.raises(RequestError):
            decode_passthrough(endpoint, b"{", {"content-type": "application/json"}, catalog=CATALOG)


def test_the_lite_flag_and_the_turn_state_go_along() -> None:
    headers = {**CODEX, "x-openai-internal-codex-responses-lite": "true", "x-codex-turn-state": "wrapped"}
    request = ask(COMPACT, {**BODY, "client_metadata": {"x-codex-turn-state": "in-body"}}, headers)
    assert request.lite
    assert request.turn_state == "wrapped"
    assert orjson.loads(request.body_for(None))["client_metadata"] == {}


ODD: list[Any] = [None, True, 0, "", "x", [], {}, [None], [{"type": []}], {"type": {}}, "\ud800"]


def test_no_json_is_a_crash() -> None:
    dice = random.Random(7)
    for _ in range(500):
        body = {key: dice.choice([value, *ODD]) for key, value in BODY.items()}
        body["client_metadata"] = dice.choice(ODD)
        body["reasoning"] = dice.choice(ODD)
        body["model"] = dice.choice(["gpt-5.5-high", *ODD])
        body["stream"] = dice.choice([None, False, *ODD])
        statuses = {200}
        try:
            ask(dice.choice(PASSTHROUGH), body)
        except RequestError as error:
            statuses.add(error.status)
        try:
            statuses.add(200 if input_tokens(json.dumps(body).encode())["input_tokens"] >= 0 else 500)
        except RequestError as error:
            statuses.add(error.status)
        assert statuses <= {200, 400}


def test_tokens_are_counted_here() -> None:
    raw = orjson.dumps({"model": "gpt-5.5", "input": "one two three", "instructions": "be brief"})
    assert input_tokens(raw, lambda text: len(text.split())) == {
        "object": "response.input_tokens",
        "input_tokens": 10,
    }
    assert input_tokens(b"{}") == {"object": "response.input_tokens", "input_tokens": 0}
    assert input_tokens(orjson.dumps({"input": "x" * 400}))["input_tokens"] >= 100


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"input": 7}, "input"),
        ({"input": [7]}, "input.0"),
        ({"tools": 7}, "tools"),
        ({"model": 7}, "model"),
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
    ],
)
def test_a_count_of_what_cannot_be_sent_is_refused(body: dict[str, Any], param: str) -> None:
    with pytest.raises(RequestError) as caught:
        input_tokens(orjson.dumps(body))
    assert caught.value.param == param
