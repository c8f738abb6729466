"""Requests for upstreams that speak their dialect: not a byte changes but what must."""

from typing import Any

import orjson
import pytest

from codex_proxy.errors import RequestError
from codex_proxy.protocol.native import Native, passing_headers, read_native, standard_body
from codex_proxy.protocol.request import BackendRequest

BODIES = [
    b'{"model":"m","messages":[]}',
    b' {\n "messages": [ {"content": "\\u00e9\\ud83d"} ] , "model" : "m", "x": 1.50e3 , "big": 123456789012345678901 }\n',
    '{"model":"m","messages":[{"content":"日本"}],"stream":true}'.encode(),
]


def native(body: bytes, capability: str = "chat", **more: Any) -> Native:
    found = read_native(capability, body, {})[0]
    for name, value in more.items():
        setattr(found, name, value)
    return found


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("capability", ["responses", "completions", "embeddings", "messages"])
def test_a_body_goes_as_it_came(body: bytes, capability: str) -> None:
    assert native(body, capability).body_for("m") is body


@pytest.mark.parametrize("body", BODIES)
def test_a_renamed_model_changes_nothing_else(body: bytes) -> None:
    there = native(body, "messages").body_for("theirs")
    try:
        old, new = orjson.loads(body), orjson.loads(there)
    except orjson.JSONDecodeError:
        assert b'"theirs"' in there
        assert b"\\ud83d" in there
        return
    assert new == {**old, "model": "theirs"}
    assert list(new) == list(old)


def test_numbers_keep_their_spelling_and_half_characters_their_place() -> None:
    there = native(BODIES[1], "messages").body_for("theirs")
    for spelled in (b"123456789012345678901", b"\\u00e9\\ud83d", b'"theirs"'):
        assert spelled in there
    body = b'{"model":"m", "x" : 1.50e3, "y":{ "z":"\\u00e9" }}'
    assert native(body, "messages").body_for("n") == b'{"model":"n","x":1.50e3,"y":{ "z":"\\u00e9" }}'


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (b"", {"include_usage": True}),
        (b',"stream_options":null', {"include_usage": True}),
        (b',"stream_options":{"include_usage":false,"y":1}', {"include_usage": True, "y": 1}),
    ],
)
def test_a_streamed_chat_asks_for_its_usage(options: bytes, expected: Any) -> None:
    body = b'{"model":"m","stream":true' + options + b"}"
    found = native(body)
    assert not found.wants_usage
    for model in ("m", "theirs"):
        sent = orjson.loads(found.body_for(model))
        assert sent == {"model": model, "stream": True, "stream_options": expected}


def test_who_asked_for_usage_and_who_does_not_stream_are_left_alone() -> None:
    for body in (
        b'{"model":"m","stream":true,"stream_options":{"include_usage":true}}',
        b'{"model":"m","stream":true,"stream_options":"odd"}',
        b'{"model":"m"}',
    ):
        assert native(body).body_for("m") is body


def test_an_engine_stands_in_the_path() -> None:
    found = read_native("engines", b'{"prompt":"x"}', {}, engine="gpt-5.5")[0]
    assert found.path == "engines/gpt-5.5/completions"
    assert found.path_for("a/b ?") == "engines/a%2Fb%20%3F/completions"
    assert found.body_for("other") == b'{"prompt":"x"}'


@pytest.mark.parametrize("body", [b"", b"[]", b"{", b"{}", b'{"model":3}', b'{"model":"a b"}', b"\xff"])
def test_what_cannot_be_sent_on_is_refused(body: bytes) -> None:
    with pytest.raises(RequestError):
        read_native("chat", body, {})


def test_only_headers_that_matter_pass() -> None:
    assert passing_headers({
        "authorization": "Bearer sk-1",
        "x-api-key": "sk-1",
        "cookie": "c",
        "host": "h",
        "connection": "keep-alive",
        "content-length": "3",
        "x-codex-turn-state": "t",
        "x-codex-window-id": "w",
        "openai-beta": "b",
        "anthropic-version": "v",
        "user-agent": "bad\x80agent",
        "idempotency-key": "bad\nkey",
    }) == {"x-codex-window-id": "w", "openai-beta": "b", "anthropic-version": "v"}


@pytest.mark.parametrize(("limit", "sent"), [(None, None), (1, 16), (16, 16), (900, 900)])
def test_an_output_limit_is_told_where_it_is_understood(limit: int | None, sent: int | None) -> None:
    body = orjson.dumps({"model": "m", "input": [], "include": ["reasoning.encrypted_content"]})
    request = BackendRequest("responses", "m-high", "m", body, max_output_tokens=limit)
    fields = orjson.loads(standard_body(request, "theirs", thinks=False))
    assert fields.pop("max_output_tokens", None) == sent
    assert fields == {"model": "theirs", "input": []}
    assert b"include" in standard_body(request, "theirs", thinks=True)
