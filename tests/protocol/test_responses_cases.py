"""What the Responses dialect does at its edges: large bodies, names of conversations, compacted history."""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import orjson
import pytest

from codex_proxy.protocol.catalog import Catalog
from codex_proxy.protocol.chat import CHAT
from codex_proxy.protocol.messages import MESSAGES
from codex_proxy.protocol.request import BackendRequest
from codex_proxy.protocol.responses import RESPONSES
from codex_proxy.protocol.responses_request import decode, prepare
from codex_proxy.protocol.wire import JsonObject
from codex_proxy.simulator.faults import Reply
from tests.harness import CODEX_HEADERS, STANDARD, standing

CATALOG = Catalog()


def message(text: str, role: str = "user") -> JsonObject:
    kind = "output_text" if role == "assistant" else "input_text"
    return {"type": "message", "role": role, "content": [{"type": kind, "text": text}]}


def translated(*items: JsonObject, headers: dict[str, str] | None = None, **fields: Any) -> BackendRequest:
    """Return the request that another dialect's body became."""
    return prepare({"model": STANDARD, **fields, "input": list(items)}, headers or {}, catalog=CATALOG)


# Bodies that need no change.


@pytest.mark.parametrize("headers", [{}, CODEX_HEADERS], ids=["other", "codex"])
@pytest.mark.parametrize("megabytes", [1, 8])
def test_a_large_body_that_is_already_normal_is_passed_on_and_not_copied(
    megabytes: int, headers: dict[str, str]
) -> None:
    piece = 'äöü \\ " \n' * 100
    body = {
        "model": STANDARD,
        "stream": True,
        "store": False,
        "instructions": "",
        "include": ["reasoning.encrypted_content"],
        "input": [message(piece)] * (megabytes * 1024 * 1024 // len(orjson.dumps(message(piece)))),
    }
    raw = orjson.dumps(body)
    lowered = {name.lower(): value for name, value in headers.items()}
    started = time.process_time()
    request = decode(raw, lowered, catalog=CATALOG)
    assert time.process_time() - started < 0.25 * megabytes
    sent = request.body
    if headers:
        assert sent is raw
    else:
        # Only the name that it lacked was put in, without another rendering.
        assert sent.endswith(raw[1:])
        assert len(sent) < len(raw) + 100
    assert request.body_for(None, lambda _: False) is sent


# The name of a conversation.


def test_a_conversation_without_a_name_has_the_same_one_in_every_turn() -> None:
    opening = [message("be brief", "developer"), message("hello")]
    first = translated(*opening)
    later = translated(*opening, message("hi", "assistant"), message("how are you?"))
    key = orjson.loads(first.body)["prompt_cache_key"]
    assert key
    assert orjson.loads(later.body)["prompt_cache_key"] == key
    assert first.session == later.session == key
    assert first.headers["session-id"] == later.headers["session-id"] == key
    # Many conversations may open alike; only one that goes on is bound to its account.
    assert (first.is_opening, later.is_opening) == (True, False)


def test_another_beginning_or_model_is_another_conversation() -> None:
    requests = [
        translated(message("hello")),
        translated(message("hello there")),
        translated(message("be brief", "developer"), message("hello")),
        translated(message("hello"), model="gpt-6-sol"),
        translated(message("hello"), instructions="be verbose"),
    ]
    assert len({request.session for request in requests}) == len(requests)


@pytest.mark.parametrize(
    ("fields", "headers", "key", "header"),
    [
        ({"prompt_cache_key": "mine"}, {}, "mine", "mine"),
        ({"prompt_cache_key": "mine"}, {"session-id": "other"}, "mine", "other"),
        # What the caller did not give is ours.
        ({}, {"session-id": "other"}, None, "other"),
        ({}, {"x-session-id": "other"}, None, None),
        ({"user": "anna"}, {}, None, None),
    ],
)
def test_a_name_that_the_caller_gave_is_kept(
    fields: dict[str, Any], headers: dict[str, str], key: str | None, header: str | None
) -> None:
    request = translated(message("hello"), headers=headers, **fields)
    assert orjson.loads(request.body)["prompt_cache_key"] == (key or request.session)
    assert request.headers["session-id"] == (header or request.session)


@pytest.mark.parametrize("path", ["/responses", "/chat/completions"])
def test_a_conversation_is_named_alike_whoever_names_it_for_the_backend(path: str) -> None:
    """A Responses caller is treated as one of any other dialect."""
    dialect = RESPONSES if path == "/responses" else CHAT
    key = "input" if path == "/responses" else "messages"
    body: JsonObject = {"model": STANDARD, key: [{"role": "user", "content": "hello"}]}
    first = dialect.decode(orjson.dumps(body), {}, catalog=CATALOG).request
    body[key] += [{"role": "assistant", "content": "hi"}, {"role": "user", "content": "and now?"}]
    later = dialect.decode(orjson.dumps(body), {}, catalog=CATALOG).request
    assert first.session == later.session
    assert (first.is_opening, later.is_opening) == (True, False)
    for request in (first, later):
        assert orjson.loads(request.body)["prompt_cache_key"] == request.session
        assert request.headers["session-id"] == request.session


def test_a_codex_client_gets_no_name_that_it_did_not_give() -> None:
    """Its conversation is known by how it begins all the same, and nothing of that is on the wire."""
    body = {"model": STANDARD, "stream": True, "store": False, "include": ["reasoning.encrypted_content"]}
    raw = orjson.dumps({**body, "input": [message("hello")]})
    lowered = {name.lower(): value for name, value in CODEX_HEADERS.items()}
    request = decode(raw, lowered, catalog=CATALOG)
    assert request.body is raw
    assert "session-id" not in request.headers
    assert request.binding is not None
    assert request.binding.source == "beginning"


def test_each_agent_of_a_claude_session_has_a_conversation_of_its_own() -> None:
    """They run side by side, and each has a beginning of its own in the backend's cache."""

    def session(text: str = "hello", **headers: str) -> str | None:
        body = {"model": STANDARD, "max_tokens": 100, "messages": [{"role": "user", "content": text}]}
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        request = MESSAGES.decode(orjson.dumps(body), named, catalog=CATALOG).request
        assert orjson.loads(request.body)["prompt_cache_key"] == request.session
        return request.session

    main = session(x_claude_code_session_id="s-1")
    helper = session(x_claude_code_session_id="s-1", x_claude_code_agent_id="a-1")
    other = session(x_claude_code_session_id="s-1", x_claude_code_agent_id="a-2")
    assert len({main, helper, other, session(x_claude_code_session_id="s-2")}) == 4
    # However the conversation goes on.
    assert session("go on", x_claude_code_session_id="s-1", x_claude_code_agent_id="a-1") == helper
    assert "s-1" not in str(main)


# Compacted history.


async def test_compacted_history_comes_back_byte_for_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is filled in: not the details of its usage, not a model."""
    odd = (
        b'{ "id" : "resp_1", "object":"response.compaction", "output":[{"type":"compaction",'
        b'"encrypted_content":"gAAAAA\\u003d"}], "usage":{"input_tokens":3, "output_tokens":2}, "new":[1.0] }'
    )

    def answer(value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Reply:
        return Reply(200, odd, headers=headers or {})

    async with standing(tmp_path, accounts=1) as stand:
        monkeypatch.setattr(Reply, "json", answer)
        for headers in ({}, CODEX_HEADERS):
            body = {"model": STANDARD, "input": [message("a long story")], "stream": False}
            answered = await stand.post("/v1/responses/compact", body, headers=headers)
            assert (answered.status, answered.body) == (200, odd)
            assert "stream" not in stand.sim.requests[-1].json
