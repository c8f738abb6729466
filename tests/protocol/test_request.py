"""The backend request: what each account gets of it, and which headers go along."""

import dataclasses
from typing import Any

import orjson
import pytest

from codex_proxy.errors import RequestError
from codex_proxy.protocol.binding import Binding
from codex_proxy.protocol.request import (
    BackendRequest,
    forwardable,
    is_codex_client,
    model_of,
    parse_body,
    render_body,
    set_routing_hint,
    set_session,
)

REASONING: list[dict[str, Any]] = [
    {"type": "reasoning", "summary": [], "encrypted_content": value} for value in ("one", "two")
]
BODY: dict[str, Any] = {
    "model": "gpt-5.5",
    "input": [
        {"type": "compaction", "encrypted_content": "one"},
        *REASONING,
        {"type": "message", "role": "user", "content": "hello"},
    ],
    "client_metadata": {"x-codex-turn-state": "wrapped", "turn_id": "t"},
}


def request(*, state: bool = False, **fields: object) -> BackendRequest:
    body = {**BODY, **fields}
    return BackendRequest(
        endpoint="responses",
        asked_model="gpt-5.5",
        model="gpt-5.5",
        body=orjson.dumps(body),
        encrypted=("one", "two"),
        has_body_turn_state=state,
    )


def test_the_bytes_are_the_same_when_nothing_differs() -> None:
    asked = request()
    assert asked.body_for(None) is asked.body
    assert asked.body_for("raw", lambda _: False) is asked.body


def test_refused_reasoning_goes_and_compactions_stay() -> None:
    asked = request()
    body = asked.body_for(None, lambda value: value == "one")
    assert orjson.loads(body) == {**BODY, "input": [BODY["input"][0], *BODY["input"][2:]]}
    everything = asked.body_for(None, lambda _: True)
    assert [item["type"] for item in orjson.loads(everything)["input"]] == ["compaction", "message"]
    assert orjson.loads(asked.body) == BODY


def test_the_turn_state_in_the_body_is_the_accounts_own_or_none() -> None:
    asked = request(state=True)
    assert orjson.loads(asked.body_for("raw"))["client_metadata"] == {
        "x-codex-turn-state": "raw",
        "turn_id": "t",
    }
    assert orjson.loads(asked.body_for(None))["client_metadata"] == {"turn_id": "t"}
    assert asked.body_for("wrapped") is asked.body
    both = orjson.loads(asked.body_for(None, lambda _: True))
    assert [item["type"] for item in both["input"]] == ["compaction", "message"]
    assert both["client_metadata"] == {"turn_id": "t"}


def test_a_released_request_holds_no_body() -> None:
    asked = dataclasses.replace(request(), packed=(b"{}", b"packed"))
    asked.release()
    assert asked.body == b""
    assert asked.packed is None
    assert asked.body_for(None, lambda _: True) == b""


@pytest.mark.parametrize("body", [b"", b"[]", b"nonsense", b'{"input":7}', b'{"input":"text"}'])
def test_a_body_of_another_shape_is_left_alone(body: bytes) -> None:
    asked = request(state=True)
    asked.body = body
    assert asked.body_for("raw", lambda _: True) is body


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ({"originator": "codex_exec"}, True),
        ({"originator": "codex_cli_rs"}, True),
        ({"originator": "codex-tui"}, True),
        ({"originator": "codex_vscode"}, True),
        ({"originator": "Codex Desktop"}, True),
        ({"user-agent": "codex_exec/0.169.0 (Debian 12.0.0; x86_64) unknown (codex_exec; 0.169.0)"}, True),
        ({"user-agent": "Codex/1.0"}, True),
        ({"originator": "codex"}, True),
        ({"originator": "codex_proxy", "user-agent": "codex-proxy/1.0"}, False),
        ({"originator": "codexual"}, False),
        ({"originator": "my codex_exec"}, False),
        ({"user-agent": "OpenAI/Python 3.52.0"}, False),
        ({}, False),
    ],
)
def test_a_codex_client_says_so_in_its_headers(headers: dict[str, str], expected: bool) -> None:
    assert is_codex_client(headers) is expected


SENT = {
    "authorization": "Bearer secret",
    "x-api-key": "secret",
    "cookie": "a=b",
    "chatgpt-account-id": "other",
    "x-openai-fedramp": "true",
    "x-openai-internal-codex-residency": "us",
    "x-openai-account-routing-override": "us",
    "x-oai-attestation": "a",
    "host": "h",
    "connection": "close",
    "content-length": "1",
    "content-encoding": "zstd",
    "accept": "text/event-stream",
    "x-forwarded-for": "10.0.0.1",
    "forwarded": "for=10.0.0.1",
    "x-real-ip": "10.0.0.1",
    "x-codex-turn-state": "wrapped",
    "x-codex-routing-hint": "model=other",
    "originator": "codex_exec",
    "user-agent": "codex_exec/0.169.0",
    "version": "0.169.0",
    "session-id": "s",
    "thread-id": "t",
    "x-client-request-id": "t",
    "x-codex-window-id": "t:0",
    "x-codex-turn-metadata": "{}",
    "x-openai-subagent": "review",
    "x-openai-internal-codex-responses-lite": "true",
    "traceparent": "00-1-2-01",
    "x-codex-broken": "a\udcffb",
}


def test_only_what_a_codex_client_needs_goes_upstream() -> None:
    assert list(forwardable(SENT, True)) == [
        "originator",
        "user-agent",
        "version",
        "session-id",
        "thread-id",
        "x-client-request-id",
        "x-codex-window-id",
        "x-codex-turn-metadata",
        "x-openai-subagent",
        "x-openai-internal-codex-responses-lite",
        "traceparent",
    ]


def test_of_another_caller_only_the_session_goes_upstream() -> None:
    assert forwardable(SENT, False) == {"session-id": "s"}
    assert forwardable({"session-id": "\udcff"}, False) == {}


def test_the_routing_hint_names_what_goes_upstream() -> None:
    headers: dict[str, str] = {}
    set_routing_hint(headers, "gpt-5.5", None)
    assert headers == {"x-codex-routing-hint": "model=gpt-5.5"}
    set_routing_hint(headers, "gpt-5.5", "priority")
    assert headers == {"x-codex-routing-hint": "model=gpt-5.5;tier=priority"}


@pytest.mark.parametrize(
    ("given", "key", "header"),
    [
        ({}, None, "conv_1"),
        ({}, "", "conv_1"),
        ({}, "talk", "talk"),
        ({"session-id": "own"}, "talk", "own"),
        ({"session-id": "own"}, None, "own"),
        # No header holds them.
        ({}, "x" * 257, "conv_1"),
        ({}, "two\nlines", "conv_1"),
        ({}, "gespräch", "conv_1"),
    ],
)
def test_the_session_that_goes_out_is_the_callers_else_ours(
    given: dict[str, str], key: str | None, header: str
) -> None:
    headers = dict(given)
    set_session(headers, key, Binding("conv_1", "beginning"))
    assert headers == {"session-id": header}


def test_what_has_no_binding_names_no_session() -> None:
    headers: dict[str, str] = {}
    set_session(headers, None, None)
    assert headers == {}


def test_a_request_is_known_by_its_binding() -> None:
    asked = request()
    assert (asked.session, asked.is_opening) == (None, False)
    asked.binding = Binding("conv_1", "beginning", is_opening=True)
    assert (asked.session, asked.is_opening) == ("conv_1", True)


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (b"", "no JSON"),
        (b"{", "no JSON"),
        (b"[]", "no JSON object"),
        (b'"text"', "no JSON object"),
        (b'{"a":NaN}', "no JSON"),
        (b'{"a":-1e999}', "no JSON"),
        (b'{"a":"\xff"}', "not UTF-8"),
        (b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deeply"),
        (b'{"a":' + b"9" * 5000 + b"}", "no JSON"),
    ],
)
def test_a_body_that_is_no_json_object_is_refused(raw: bytes, words: str) -> None:
    with pytest.raises(RequestError, match=words) as caught:
        parse_body(raw)
    assert caught.value.status == 400


def test_half_a_surrogate_pair_survives() -> None:
    raw = rb'{"a":"\ud83d"}'
    assert render_body(parse_body(raw)) == raw


@pytest.mark.parametrize(
    "value", [None, "", 7, ["gpt-5.5"], "two words", "line\nbreak", "ünicode", "x" * 300, "\ud800"]
)
def test_a_model_must_be_a_name_that_a_header_can_carry(value: object) -> None:
    with pytest.raises(RequestError) as caught:
        model_of({"model": value})
    assert caught.value.param == "model"
