"""What goes upstream for a Messages request: golden cases, Claude Code's own requests, what is refused and where."""

import copy
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import orjson
import pytest

from codex_proxy.errors import RequestError
from codex_proxy.protocol.catalog import Catalog
from codex_proxy.protocol.fields import MAX_STOP_CHARACTERS, MAX_STOPS
from codex_proxy.protocol.messages import render_error
from codex_proxy.protocol.messages_request import (
    LEFT_OUT,
    Asked,
    Thinking,
    countable,
    decode,
)
from codex_proxy.protocol.tokens import count_request
from codex_proxy.simulator.checks import check_shape
from tests.protocol.upstream_body import shown

HERE = Path(__file__).parent
FIXTURES = HERE / "fixtures_messages"
GOLDEN = sorted((HERE / "golden" / "messages_request").glob("*.json"))
CATALOG = Catalog()

Body = dict[str, Any]
MINIMAL: Body = {
    "model": "gpt-5.5",
    "max_tokens": 1024,
    "messages": [{"role": "user", "content": "hi"}],
}
LOOK: Body = {"name": "look", "input_schema": {"type": "object", "properties": {}}}
SEARCH: Body = {"type": "web_search_20250305", "name": "web_search"}


def asked(body: Body | None = None, headers: dict[str, str] | None = None, **fields: Any) -> Asked:
    raw = json.dumps({**(MINIMAL if body is None else body), **fields}).encode()
    return decode(raw, headers or {}, catalog=CATALOG)


def sent(body: Body | None = None, headers: dict[str, str] | None = None, **fields: Any) -> Body:
    return shown(asked(body, headers, **fields).request)


def refused(**fields: Any) -> RequestError:
    with pytest.raises(RequestError) as caught:
        asked(**fields)
    return caught.value


def says(*content: Any, role: str = "user") -> list[Body]:
    return [{"role": role, "content": list(content)}]


def load(path: Path) -> tuple[Body, dict[str, str], Body]:
    """Return a golden case: the request, its headers, and what is sent for it."""
    case = json.loads(path.read_text(encoding="utf-8"))
    if "fixture" not in case:
        return case["request"], {}, case["sent"]
    recorded = json.loads((FIXTURES / case["fixture"]).read_text(encoding="utf-8"))
    headers = {name.lower(): value for name, value in recorded["headers"].items()}
    return recorded["body"], headers, case["sent"]


# What goes upstream.


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_the_body_that_goes_upstream(path: Path) -> None:
    body, headers, expected = load(path)
    assert sent(body, headers) == expected


@pytest.mark.parametrize("model", [None, "gpt-6.1-sol", "claude-sonnet-4-5-20250929"])
@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_the_strict_backend_takes_what_goes_upstream(path: Path, model: str | None) -> None:
    body, headers, _ = load(path)
    request = asked({**body, "model": model or body["model"]}, headers).request
    assert check_shape(orjson.loads(request.body), request.headers, "strict") is None


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_the_same_request_gives_the_same_bytes(path: Path) -> None:
    """The prompt cache sees them, so nothing in them may depend on chance."""
    body, headers, _ = load(path)
    assert asked(body, headers).request.body == asked(copy.deepcopy(body), headers).request.body


def test_whatever_was_asked_the_backend_is_asked_for_a_stream_that_is_not_stored() -> None:
    for stream in (True, False, None):
        request = asked(stream=stream).request
        assert request.stream is bool(stream)
        body = orjson.loads(request.body)
        assert (body["stream"], body["store"]) == (True, False)
        assert body["include"] == ["reasoning.encrypted_content"]


@pytest.mark.parametrize("key", sorted(LEFT_OUT))
def test_each_knob_is_left_out_whatever_it_holds(key: str) -> None:
    for value in (None, 0, "auto", {"a": 1}, [1]):
        assert sent({**MINIMAL, key: value}) == sent()


def test_the_output_limit_is_kept_here() -> None:
    assert asked(max_tokens=7).request.max_output_tokens == 7
    assert "max_output_tokens" not in sent(max_tokens=7)


def test_stop_sequences_are_kept_here() -> None:
    assert asked(stop_sequences=["END", "\n\n", "END"]).stop == ("END", "\n\n")
    assert asked(stop_sequences=None).stop == ()
    assert sent(stop_sequences=["END"]) == sent()


@pytest.mark.parametrize(
    ("fields", "tier"),
    [
        ({"service_tier": "priority"}, "priority"),
        ({"service_tier": "fast"}, "priority"),
        ({"service_tier": "auto"}, None),
        ({"service_tier": "standard_only"}, None),
        ({"speed": "fast", "service_tier": "standard_only"}, "priority"),
        ({"speed": "standard"}, None),
        ({"speed": None}, None),
    ],
)
def test_speed_and_tier(fields: Body, tier: str | None) -> None:
    assert sent(**fields).get("service_tier") == tier


# Thinking.

SUMMARY = {"summary": "auto"}


@pytest.mark.parametrize(
    ("fields", "reasoning", "thinking"),
    [
        ({}, None, Thinking.OFF),
        ({"thinking": None}, None, Thinking.OFF),
        ({"output_config": {"effort": "high"}}, {"effort": "high"}, Thinking.OFF),
        ({"output_config": {"effort": "max"}}, {"effort": "xhigh"}, Thinking.OFF),
        ({"output_config": {"effort": "HIGH"}}, {"effort": "high"}, Thinking.OFF),
        ({"output_config": {"effort": None, "task_budget": {"total": 9}}}, None, Thinking.OFF),
        ({"thinking": {"type": "enabled", "budget_tokens": 1}}, {"effort": "low", **SUMMARY}, Thinking.SHOWN),
        ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, {"effort": "low", **SUMMARY}, Thinking.SHOWN),
        ({"thinking": {"type": "enabled", "budget_tokens": 1025}}, {"effort": "medium", **SUMMARY}, Thinking.SHOWN),
        ({"thinking": {"type": "enabled", "budget_tokens": 8192}}, {"effort": "medium", **SUMMARY}, Thinking.SHOWN),
        ({"thinking": {"type": "enabled", "budget_tokens": 24576}}, {"effort": "high", **SUMMARY}, Thinking.SHOWN),
        (
            {"thinking": {"type": "enabled", "budget_tokens": 31999, "display": "omitted"}},
            {"effort": "xhigh"},
            Thinking.SIGNED,
        ),
        ({"thinking": {"type": "adaptive"}}, SUMMARY, Thinking.SHOWN),
        ({"thinking": {"type": "adaptive", "display": "summarized"}}, SUMMARY, Thinking.SHOWN),
        ({"thinking": {"type": "adaptive", "display": "omitted"}}, None, Thinking.SIGNED),
        (
            {"thinking": {"type": "adaptive", "display": "omitted"}, "output_config": {"effort": "low"}},
            {"effort": "low"},
            Thinking.SIGNED,
        ),
        ({"thinking": {"type": "disabled"}}, {"effort": "low"}, Thinking.OFF),
        (
            {"thinking": {"type": "disabled"}, "output_config": {"effort": "high"}},
            {"effort": "high"},
            Thinking.OFF,
        ),
        ({"model": "gpt-5.4", "thinking": {"type": "disabled"}}, {"effort": "none"}, Thinking.OFF),
        ({"model": "gpt-5.5-low", "output_config": {"effort": "high"}}, {"effort": "low"}, Thinking.OFF),
    ],
)  # fmt: skip
def test_thinking_and_effort(fields: Body, reasoning: Body | None, thinking: Thinking) -> None:
    assert sent(**fields).get("reasoning") == reasoning
    assert asked(**fields).thinking is thinking


# Tools.


@pytest.mark.parametrize(
    ("choice", "expected", "parallel"),
    [
        (None, None, True),
        ({"type": "auto"}, "auto", True),
        ({"type": "any"}, "required", True),
        ({"type": "none"}, "none", True),
        ({"type": "tool", "name": "look"}, {"type": "function", "name": "look"}, True),
        ({"type": "tool", "name": "web_search"}, {"type": "web_search"}, True),
        ({"type": "auto", "disable_parallel_tool_use": True}, "auto", False),
        ({"type": "any", "disable_parallel_tool_use": False}, "required", True),
        ({"type": "none", "disable_parallel_tool_use": None}, "none", True),
    ],
)
def test_the_choice_among_tools(choice: Body | None, expected: Any, parallel: bool) -> None:
    body = sent(tools=[LOOK, SEARCH], tool_choice=choice)
    assert body.get("tool_choice") == expected
    assert body["parallel_tool_calls"] is parallel


def test_without_tools_nothing_is_said_of_them() -> None:
    for tools in (
        None,
        [],
        [{"name": "DeferredToolPlaceholder"}],
        [{"type": "tool_search_tool_bm25_20251119"}],
    ):
        for choice in ({"type": "auto"}, {"type": "none"}, None):
            assert sent(tools=tools, tool_choice=choice) == sent()


def test_a_function_comes_before_a_search_of_the_same_name() -> None:
    tools = [SEARCH, {**LOOK, "name": "web_search"}]
    choice = {"type": "tool", "name": "web_search"}
    assert sent(tools=tools, tool_choice=choice)["tool_choice"] == {"type": "function", "name": "web_search"}


def test_names_that_do_not_fit_are_the_same_everywhere_and_come_back() -> None:
    name = "mcp__files__" + "read_" * 15 + "all"
    history = [
        *MINIMAL["messages"],
        *says({"type": "tool_use", "id": "c1", "name": name, "input": {}}, role="assistant"),
        *says({"type": "tool_result", "tool_use_id": "c1", "content": "x"}),
    ]
    request = asked(
        messages=history, tools=[{**LOOK, "name": name}], tool_choice={"type": "tool", "name": name}
    )
    body = orjson.loads(request.request.body)
    short = body["tools"][0]["name"]
    assert len(short) <= 64
    assert body["tool_choice"]["name"] == short
    assert [item["name"] for item in body["input"] if item["type"] == "function_call"] == [short]
    assert request.names.asked(short) == name


def test_many_long_names_of_one_beginning_take_no_time() -> None:
    tools = [{**LOOK, "name": "x" * 70 + str(number)} for number in range(4000)]
    begun = time.perf_counter()
    names = [tool["name"] for tool in sent(tools=tools)["tools"]]
    assert time.perf_counter() - begun < 5
    assert len(set(names)) == 4000
    assert max(map(len, names)) == 64


# Whose conversation it is.

SESSION = "00000000-0000-4000-8000-000000000001"


def key(headers: dict[str, str] | None = None, **fields: Any) -> str:
    request = asked(None, headers, **fields).request
    value: str = orjson.loads(request.body)["prompt_cache_key"]
    assert request.session == value
    return value


def test_a_session_has_one_cache_key_wherever_it_is_named() -> None:
    by_header = key({"x-claude-code-session-id": SESSION})
    assert SESSION not in by_header
    assert key(metadata={"user_id": json.dumps({"device_id": "d", "session_id": SESSION})}) == by_header
    assert key(metadata={"user_id": f"user_0a_account__session_{SESSION}"}) == by_header
    assert key({"x-claude-code-session-id": SESSION}, model="gpt-6.1-sol", system="other") == by_header


def test_agents_of_a_session_have_keys_of_their_own() -> None:
    main = key({"x-claude-code-session-id": SESSION})
    first = key({"x-claude-code-session-id": SESSION, "x-claude-code-agent-id": "a1"})
    assert len({main, first, key({"x-claude-code-session-id": SESSION, "x-claude-code-agent-id": "a2"})}) == 3
    assert first == key({"x-claude-code-session-id": SESSION, "x-claude-code-agent-id": "a1"})


def test_nothing_that_names_the_user_goes_upstream() -> None:
    user = json.dumps({"device_id": "device-17", "account_uuid": "account-17", "session_id": SESSION})
    request = asked(None, {"x-claude-code-session-id": SESSION}, metadata={"user_id": user}).request
    for word in (b"device-17", b"account-17", SESSION.encode(), b"metadata"):
        assert word not in request.body
        assert word.decode() not in json.dumps(request.headers)


@pytest.mark.parametrize(
    "user", [None, "", "somebody", "{", "{}", '{"session_id":5}', '["session_id"]', "x_session_"]
)
def test_a_user_without_a_session_is_known_by_how_the_conversation_begins(user: str | None) -> None:
    assert key(metadata={"user_id": user}) == key()
    request = asked(None, metadata={"user_id": user}).request
    assert request.binding is not None
    assert request.binding.source == "beginning"


# Claude Code.


@pytest.mark.parametrize("path", sorted(FIXTURES.glob("claude_code_*.json")), ids=lambda path: path.stem)
def test_claude_codes_requests_are_understood_whole(path: Path) -> None:
    """Every word that is for the model is there; what is for Anthropic's servers only is not."""
    recorded = json.loads(path.read_text(encoding="utf-8"))
    body, headers = recorded["body"], {k.lower(): v for k, v in recorded["headers"].items()}
    request = asked(body, headers).request
    upstream = json.dumps(orjson.loads(request.body), ensure_ascii=False)
    for text in _texts([body["system"], body["messages"]]):
        if text.startswith("x-anthropic-billing-header"):
            assert text not in upstream
        else:
            assert json.dumps(text, ensure_ascii=False)[1:-1] in upstream
    names = [tool["name"] for tool in orjson.loads(request.body)["tools"]]
    assert names == [t["name"] for t in body["tools"] if t["name"] != "DeferredToolPlaceholder"]
    for key_ in ("cache_control", "defer_loading", "$schema", "context_management", "device_id"):
        assert key_ not in upstream


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, list):
        for one in value:
            yield from _texts(one)
    elif isinstance(value, dict):
        for name, one in value.items():
            if name in ("text", "content", "tool_name") and isinstance(one, str):
                yield one
            elif name in ("content", "input"):
                yield from (one.values() if name == "input" else _texts(one))


def test_a_marked_system_message_and_a_plain_one_are_the_same_upstream() -> None:
    """Claude Code sends it marked for caching at first, and as a string from then on."""
    marked = [{"type": "text", "text": "rules", "cache_control": {"type": "ephemeral"}}]
    first = sent(messages=[*MINIMAL["messages"], {"role": "system", "content": marked}])
    later = sent(messages=[*MINIMAL["messages"], {"role": "system", "content": "rules"}])
    assert first == later


# Counting.


def test_what_is_counted_is_what_would_be_sent() -> None:
    for path in GOLDEN:
        body, headers, _ = load(path)
        fields = countable(json.dumps(body).encode(), headers, catalog=CATALOG)
        standard = Catalog({"gpt-6.1-sol": "standard"})
        upstream = orjson.loads(decode(json.dumps(body).encode(), headers, catalog=standard).request.body)
        assert fields["input"] == upstream["input"]
        assert fields.get("tools") == upstream.get("tools")
        assert count_request(fields) == count_request(upstream)


def test_counting_needs_no_limit_and_no_more_than_messages() -> None:
    body = {"model": "gpt-5.5", "messages": [{"role": "user", "content": "foo"}], "tools": []}
    fields = countable(json.dumps(body).encode(), {}, catalog=CATALOG)
    assert fields["input"][0]["content"] == [{"type": "input_text", "text": "foo"}]
    assert count_request(fields, len) >= len("foo")
    assert countable(json.dumps({"messages": body["messages"]}).encode(), {}, catalog=CATALOG) == fields


def test_counting_refuses_what_cannot_be_read() -> None:
    for body, param in (
        ({"model": 5, "messages": [{"role": "user", "content": "x"}]}, "model"),
        ({"model": "gpt-5.5"}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "??"}]}]}, "messages.0.content.0.type"),
    ):
        with pytest.raises(RequestError) as caught:
            countable(json.dumps(body).encode(), {}, catalog=CATALOG)
        assert caught.value.param == param


# What is refused, and where.

FILE = {"type": "file", "file_id": "file_1"}
CALL: Body = {"type": "tool_use", "id": "c1", "name": "look", "input": {}}


def block(value: Any) -> Body:
    return {"messages": says(value)}


def spoken(value: Any) -> Body:
    return {"messages": says(value, role="assistant")}


def result(value: Any) -> Body:
    return {"messages": [*says(CALL, role="assistant"), *says(value)]}


REFUSALS: list[tuple[Body, str]] = [
    ({"model": None}, "model"),
    ({"model": 5}, "model"),
    ({"model": "no name\n"}, "model"),
    ({"max_tokens": None}, "max_tokens"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": "5"}, "max_tokens"),
    ({"max_tokens": True}, "max_tokens"),
    ({"max_tokens": 1.5}, "max_tokens"),
    ({"stream": "yes"}, "stream"),
    ({"messages": None}, "messages"),
    ({"messages": []}, "messages"),
    ({"messages": "hi"}, "messages"),
    ({"messages": [{"role": "user", "content": ""}]}, "messages"),
    ({"messages": ["hi"]}, "messages.0"),
    ({"messages": [{"content": "hi"}]}, "messages.0.role"),
    ({"messages": [{"role": 5, "content": "hi"}]}, "messages.0.role"),
    ({"messages": [{"role": "tool", "content": "hi"}]}, "messages.0.role"),
    ({"messages": [{"role": "user"}]}, "messages.0.content"),
    ({"messages": [{"role": "user", "content": 5}]}, "messages.0.content"),
    ({"messages": [{"role": "user", "content": {}}]}, "messages.0.content"),
    ({"system": 5}, "system"),
    ({"system": [{"type": "text"}]}, "system.0.text"),
    ({"system": [{"type": "audio"}]}, "system.0.type"),
    (block("hi"), "messages.0.content.0"),
    (block({"text": "hi"}), "messages.0.content.0.type"),
    (block({"type": 5}), "messages.0.content.0.type"),
    (block({"type": "of_tomorrow"}), "messages.0.content.0.type"),
    (block({"type": "container_upload", "file_id": "f"}), "messages.0.content.0.type"),
    (block(CALL), "messages.0.content.0.type"),
    (block({"type": "text", "text": None}), "messages.0.content.0.text"),
    (block({"type": "image"}), "messages.0.content.0.source"),
    (block({"type": "image", "source": "x"}), "messages.0.content.0.source"),
    (block({"type": "image", "source": FILE}), "messages.0.content.0.source.type"),
    (block({"type": "image", "source": {"type": "text"}}), "messages.0.content.0.source.type"),
    (block({"type": "image", "source": {"type": "base64"}}), "messages.0.content.0.source.data"),
    (block({"type": "image", "source": {"type": "base64", "data": 5}}), "messages.0.content.0.source.data"),
    (block({"type": "image", "source": {"type": "url", "url": ""}}), "messages.0.content.0.source.url"),
    (block({"type": "document", "source": FILE}), "messages.0.content.0.source.type"),
    (block({"type": "document", "source": {"type": "text"}}), "messages.0.content.0.source.data"),
    (block({"type": "document", "source": {"type": "base64"}}), "messages.0.content.0.source.data"),
    (
        block({"type": "document", "title": 5, "source": {"type": "url", "url": "u"}}),
        "messages.0.content.0.title",
    ),
    (
        block({"type": "document", "source": {"type": "content", "content": [{"type": "document"}]}}),
        "messages.0.content.0.source.content.0.type",
    ),
    (
        block({"type": "search_result", "title": "", "source": "", "content": [{"type": "image"}]}),
        "messages.0.content.0.content.0.type",
    ),
    (spoken({"type": "image", "source": {"type": "url", "url": "u"}}), "messages.0.content.0.type"),
    (spoken({"type": "tool_result"}), "messages.0.content.0.type"),
    (spoken({**CALL, "id": 5}), "messages.0.content.0.id"),
    (spoken({**CALL, "name": None}), "messages.0.content.0.name"),
    (spoken({**CALL, "input": "{}"}), "messages.0.content.0.input"),
    (spoken({"type": "thinking", "thinking": 5, "signature": "s"}), "messages.0.content.0.thinking"),
    (spoken({"type": "thinking", "thinking": "", "signature": []}), "messages.0.content.0.signature"),
    (spoken({"type": "server_tool_use", "id": "s"}), "messages.0.content.0.name"),
    (spoken({"type": "web_search_tool_result", "content": 5}), "messages.0.content.0.content"),
    (result({"type": "tool_result", "tool_use_id": 5}), "messages.1.content.0.tool_use_id"),
    (result({"type": "tool_result", "is_error": "yes"}), "messages.1.content.0.is_error"),
    (result({"type": "tool_result", "content": 5}), "messages.1.content.0.content"),
    (
        result({"type": "tool_result", "content": [{"type": "of_tomorrow"}]}),
        "messages.1.content.0.content.0.type",
    ),
    (
        {
            "messages": [
                *MINIMAL["messages"],
                {"role": "system", "content": [{"type": "tool_addition", "tool": {"definition": {}}}]},
            ]
        },
        "messages.1.content.0.tool",
    ),
    ({"tools": {}}, "tools"),
    ({"tools": ["look"]}, "tools.0"),
    ({"tools": [{"type": 5}]}, "tools.0.type"),
    ({"tools": [{"name": 5}]}, "tools.0.name"),
    ({"tools": [{}]}, "tools.0.name"),
    ({"tools": [LOOK, {"name": "a", "description": 5}]}, "tools.1.description"),
    ({"tools": [{"name": "a", "input_schema": "{}"}]}, "tools.0.input_schema"),
    ({"tools": [{"name": "a", "strict": "yes"}]}, "tools.0.strict"),
    ({"tools": [{"type": "web_fetch_20250910", "name": "web_fetch"}]}, "tools.0.type"),
    ({"tools": [{"type": "code_execution_20250825", "name": "code_execution"}]}, "tools.0.type"),
    ({"tools": [{"type": "computer_toolset_20260801"}]}, "tools.0.type"),
    ({"tools": [{"type": "mcp_toolset", "mcp_server_name": "a"}]}, "tools.0.type"),
    ({"tools": [{**SEARCH, "allowed_domains": "x"}]}, "tools.0.allowed_domains"),
    ({"tools": [{**SEARCH, "user_location": "x"}]}, "tools.0.user_location"),
    ({"tools": [{**SEARCH, "user_location": {"city": 5}}]}, "tools.0.user_location.city"),
    ({"tools": [LOOK], "tool_choice": "auto"}, "tool_choice"),
    ({"tools": [LOOK], "tool_choice": {}}, "tool_choice.type"),
    ({"tools": [LOOK], "tool_choice": {"type": "some"}}, "tool_choice.type"),
    ({"tools": [LOOK], "tool_choice": {"type": "tool"}}, "tool_choice.name"),
    ({"tools": [LOOK], "tool_choice": {"type": "tool", "name": "other"}}, "tool_choice.name"),
    ({"tool_choice": {"type": "any"}}, "tool_choice.type"),
    (
        {"tools": [LOOK], "tool_choice": {"type": "auto", "disable_parallel_tool_use": 1}},
        "tool_choice.disable_parallel_tool_use",
    ),
    ({"thinking": "on"}, "thinking"),
    ({"thinking": {}}, "thinking.type"),
    ({"thinking": {"type": "of_tomorrow"}}, "thinking.type"),
    ({"thinking": {"type": "enabled"}}, "thinking.budget_tokens"),
    ({"thinking": {"type": "enabled", "budget_tokens": "9"}}, "thinking.budget_tokens"),
    ({"thinking": {"type": "enabled", "budget_tokens": 0}}, "thinking.budget_tokens"),
    ({"thinking": {"type": "adaptive", "display": "loud"}}, "thinking.display"),
    ({"output_config": []}, "output_config"),
    ({"output_config": {"effort": 5}}, "output_config.effort"),
    ({"output_config": {"format": "json"}}, "output_config.format"),
    ({"output_config": {"format": {}}}, "output_config.format.type"),
    ({"output_config": {"format": {"type": "xml"}}}, "output_config.format.type"),
    ({"output_config": {"format": {"type": "json_schema"}}}, "output_config.format.schema"),
    ({"output_format": {"type": "json_schema", "schema": []}}, "output_format.schema"),
    ({"stop_sequences": "END"}, "stop_sequences"),
    ({"stop_sequences": ["a", 5]}, "stop_sequences.1"),
    ({"stop_sequences": [""]}, "stop_sequences.0"),
    ({"stop_sequences": [str(n) for n in range(MAX_STOPS + 1)]}, "stop_sequences"),
    ({"stop_sequences": ["x" * (MAX_STOP_CHARACTERS + 1)]}, "stop_sequences"),
    ({"metadata": "me"}, "metadata"),
    ({"metadata": {"user_id": 5}}, "metadata.user_id"),
    ({"service_tier": 5}, "service_tier"),
    ({"speed": 5}, "speed"),
    ({"mcp_servers": [{"type": "url", "url": "u", "name": "n"}]}, "mcp_servers"),
    ({"thread": {"type": "create"}}, "thread"),
    ({"compaction": {"type": "summarize"}}, "compaction"),
    ({"inference_geo": "eu"}, "inference_geo"),
]


@pytest.mark.parametrize(
    ("fields", "param"), REFUSALS, ids=[f"{n}-{one[1]}" for n, one in enumerate(REFUSALS)]
)
def test_what_cannot_be_served_is_refused_by_its_path(fields: Body, param: str) -> None:
    error = refused(**fields)
    assert error.param == param
    status, _, body = render_error(error, request_id="r")
    assert status == 400
    said = orjson.loads(body)["error"]
    assert said["type"] == "invalid_request_error"
    assert said["message"].startswith(f"{param}: ")
    assert not said["message"].removeprefix(f"{param}: ").startswith(param)


def test_a_missing_field_is_told_in_the_apis_own_words() -> None:
    for key_ in ("max_tokens", "model", "messages"):
        body = orjson.loads(render_error(refused(**{key_: None}), request_id="r")[2])
        assert body["error"]["message"] == f"{key_}: Field required"


# Odd bodies.

RICH: Body = {
    **MINIMAL,
    "stream": True,
    "system": [{"type": "text", "text": "s"}],
    "messages": [
        *says(
            {"type": "text", "text": "t"},
            {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AA=="}},
            {"type": "document", "title": "t", "context": "c", "source": {"type": "text", "data": "d"}},
            {"type": "document", "source": {"type": "content", "content": [{"type": "text", "text": "t"}]}},
            {
                "type": "search_result",
                "title": "t",
                "source": "s",
                "content": [{"type": "text", "text": "t"}],
            },
        ),
        *says(
            {"type": "thinking", "thinking": "t", "signature": "gAAAAAx"},
            {"type": "server_tool_use", "id": "s", "name": "web_search", "input": {"query": "q"}},
            {"type": "web_search_tool_result", "content": [{"type": "web_search_result", "url": "u"}]},
            {"type": "code_execution_tool_result", "content": {"stdout": "x", "parts": [1]}},
            {"type": "mcp_tool_use", "name": "n", "server_name": "s", "input": {}},
            {"type": "compaction", "content": "c"},
            {"type": "tool_use", "id": "c1", "name": "look", "input": {"a": 1}},
            role="assistant",
        ),
        *says({
            "type": "tool_result",
            "tool_use_id": "c1",
            "is_error": True,
            "content": [
                {"type": "text", "text": "t"},
                {"type": "tool_reference", "tool_name": "n"},
                {"type": "image", "source": {"type": "url", "url": "u"}},
            ],
        }),
        {"role": "system", "content": "s", "clear_at": "never"},
    ],
    "tools": [
        {**LOOK, "description": "d", "strict": True, "input_examples": [{}]},
        {**SEARCH, "allowed_domains": ["d"], "user_location": {"city": "c"}},
        {"type": "computer_20251124", "name": "computer", "display_width_px": 9, "enable_zoom": True},
        {"type": "text_editor_20250728", "name": "str_replace_based_edit_tool"},
    ],
    "tool_choice": {"type": "tool", "name": "look", "disable_parallel_tool_use": True},
    "thinking": {"type": "enabled", "budget_tokens": 2000, "display": "omitted"},
    "output_config": {
        "effort": "low",
        "format": {
            "type": "json_schema",
            "schema": {
                "type": "object",
                "properties": {"a": {"anyOf": [{"type": "array", "items": {"type": "string"}}]}},
                "required": ["a"],
                "additionalProperties": False,
                "$defs": {"b": {"type": "string"}},
            },
        },
    },
    "stop_sequences": ["x"],
    "metadata": {"user_id": "u_session_x"},
    "service_tier": "auto",
    "speed": "fast",
    "inference_geo": None,
    "mcp_servers": [],
}
DEEP: Any = "x"
for _ in range(400):
    DEEP = {"a": [DEEP]}
ODD: list[Any] = [
    None, True, 0, -1, 10**30, 1.5, "", "x", "\0", "\ud83d", [], {}, [None], [[]], {"type": None}, {"": None},
    {"type": "text"}, {"type": ["text"]}, DEEP,
]  # fmt: skip


def _places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    for step, inner in (
        value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    ):
        yield (*path, step)
        yield from _places(inner, (*path, step))


def test_the_rich_body_is_a_good_one() -> None:
    """Else what follows would prove nothing."""
    request = asked(RICH).request
    assert check_shape(orjson.loads(request.body), request.headers, "strict") is None


@pytest.mark.parametrize("place", list(_places(RICH)), ids=lambda place: ".".join(map(str, place)))
def test_anything_anywhere_is_served_or_refused(place: tuple[Any, ...]) -> None:
    for odd in ODD:
        body = copy.deepcopy(RICH)
        target = body
        for step in place[:-1]:
            target = target[step]
        target[place[-1]] = odd
        raw = json.dumps(body).encode()
        for read in (decode, countable):
            error = refusal_of(raw, read)
            if error is None:
                continue
            assert error.status == 400
            assert len(error.message) < 500
            # In the caller's words: not a path in what we made of it.
            assert error.param is None or error.param.partition(".")[0] in RICH


def refusal_of(raw: bytes, read: Callable[..., object] = decode) -> RequestError | None:
    try:
        read(raw, {}, catalog=CATALOG)
    except RequestError as error:
        return error
    return None


def test_a_body_nested_without_end_is_refused() -> None:
    for raw in (
        b'{"model":"m","max_tokens":1,"messages":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b"",
        b"null",
        b"[]",
        b'"x"',
        b"\xff",
    ):
        with pytest.raises(RequestError):
            decode(raw, {}, catalog=CATALOG)


HUGE = "x" * 10_000_000


@pytest.mark.parametrize(
    "fields",
    [
        {"messages": [{"role": "user", "content": HUGE}]},
        {"system": "x-anthropic-billing-header:\n" * 350_000},
        block({"type": HUGE}),
        block({"type": "image", "source": {"type": "base64", "data": HUGE}}),
        spoken({**CALL, "id": HUGE, "name": HUGE}),
        spoken({"type": "thinking", "thinking": "", "signature": f"gAAAA{HUGE}!"}),
        {"messages": [{"role": HUGE, "content": "x"}]},
        {"model": HUGE},
        {"tools": [{"name": "." * 10_000_000}]},
        {"tools": [{"type": HUGE, "name": "x"}]},
        {"tools": [LOOK], "tool_choice": {"type": "tool", "name": HUGE}},
        {"metadata": {"user_id": "_session_" * 1_000_000}},
        {"stop_sequences": [HUGE]},
    ],
)
def test_huge_texts_take_no_time_and_are_not_repeated(fields: Body) -> None:
    raw = json.dumps({**MINIMAL, **fields}).encode()
    begun = time.process_time()
    error = refusal_of(raw)
    assert time.process_time() - begun < 2
    assert error is None or len(error.message) < 500


def test_half_characters_and_nul_are_kept() -> None:
    words = "a\ud83d\0b"
    history = [
        *says({"type": "text", "text": words}),
        *says({"type": "tool_use", "id": words, "name": "look", "input": {words: words}}, role="assistant"),
        *says({"type": "tool_result", "tool_use_id": words, "content": words}),
    ]
    items = json.loads(asked(messages=history, metadata={"user_id": f"_session_{words}"}).request.body)[
        "input"
    ]
    assert items[0]["content"][0]["text"] == words
    assert json.loads(items[1]["arguments"]) == {words: words}
    assert items[2] == {"type": "function_call_output", "call_id": items[1]["call_id"], "output": words}
