"""What goes upstream for a Chat request: golden cases, what is refused and where, and odd bodies."""

import json
import time
from pathlib import Path
from typing import Any

import orjson
import pytest

from codex_proxy.errors import RequestError
from codex_proxy.protocol.catalog import Catalog
from codex_proxy.protocol.chat_request import LEFT_OUT, Ask, read
from codex_proxy.protocol.fields import MAX_STOP_CHARACTERS, MAX_STOPS
from codex_proxy.simulator.checks import check_shape
from tests.protocol.upstream_body import shown

GOLDEN = sorted((Path(__file__).parent / "golden" / "chat_request").glob("*.json"))
CATALOG = Catalog()
USER: dict[str, Any] = {"role": "user", "content": "hi"}
LONG = "a_tool_with_a_name_that_is_longer_than_the_backend_takes_by_some_letters"


def ask(*messages: Any, headers: dict[str, str] | None = None, **fields: Any) -> Ask:
    body = {"model": "gpt-5.5", "messages": list(messages) or [USER], **fields}
    return read(json.dumps(body).encode(), headers or {}, catalog=CATALOG)


def sent(asked: Ask) -> dict[str, Any]:
    return shown(asked.request)


def refused(*messages: Any, **fields: Any) -> RequestError:
    with pytest.raises(RequestError) as caught:
        ask(*messages, **fields)
    return caught.value


def function(name: str, **fields: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, **fields}}


def user(*parts: Any) -> dict[str, Any]:
    return {"role": "user", "content": list(parts)}


def calling(*calls: Any, **fields: Any) -> dict[str, Any]:
    return {"role": "assistant", "tool_calls": list(calls), **fields}


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_the_body_that_goes_upstream(path: Path) -> None:
    case = json.loads(path.read_text(encoding="utf-8"))
    asked = read(json.dumps(case["request"]).encode(), {}, catalog=CATALOG)
    assert sent(asked) == case["sent"]


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
@pytest.mark.parametrize("model", ["gpt-5.5", "gpt-6.1-sol"])
def test_the_strict_backend_refuses_none_of_it(path: Path, model: str) -> None:
    request = {**json.loads(path.read_text(encoding="utf-8"))["request"], "model": model}
    asked = read(json.dumps(request).encode(), {}, catalog=CATALOG)
    assert check_shape(sent(asked), asked.request.headers, "strict") is None


def test_every_body_streams_stores_nothing_and_asks_for_the_sealed_reasoning() -> None:
    for stream in (True, False, None):
        asked = ask(stream=stream, include=["of.mine"], store=True)
        body = sent(asked)
        assert (body["stream"], body["store"], body["instructions"]) == (True, False, "")
        assert body["include"] == ["reasoning.encrypted_content"]
        assert asked.request.stream is bool(stream)


def test_instructions_beside_the_messages_are_not_lost() -> None:
    assert sent(ask(instructions="be brief"))["instructions"] == "be brief"


def test_what_is_kept_here_does_not_go_upstream() -> None:
    asked = ask(max_completion_tokens=7, max_tokens=9, stop=["x", "", "yy"])
    assert asked.request.max_output_tokens == 7
    assert asked.stop == ("x", "yy")
    assert not {"max_completion_tokens", "max_tokens", "stop"} & set(sent(asked))
    assert ask(max_tokens=9).request.max_output_tokens == 9
    assert ask(stop="x").stop == ("x",)
    assert ask(stop=None).stop == ask(stop="").stop == ask().stop == ()


@pytest.mark.parametrize("name", sorted(LEFT_OUT))
def test_a_knob_is_left_out_whatever_it_holds(name: str) -> None:
    for value in (1, "x", [1], {"a": 1}, None):
        fields: dict[str, Any] = {name: value}
        assert sent(ask(**fields)) == sent(ask())


def test_usage_is_shown_when_asked_for() -> None:
    assert ask(stream_options={"include_usage": True}).shows_usage
    for options in (
        None,
        {},
        {"include_usage": False},
        {"include_usage": None},
        {"include_obfuscation": True},
    ):
        assert not ask(stream_options=options).shows_usage


def test_names_are_the_same_in_every_turn() -> None:
    tools = [function(f"{LONG}{number}") for number in range(3)]
    first = ask(tools=tools)
    later = ask(USER, calling({"id": "c", **function(f"{LONG}2", arguments="{}")}), tools=tools)
    names = [tool["name"] for tool in sent(first)["tools"]]
    assert len(set(names)) == 3
    assert all(len(name) <= 64 for name in names)
    assert sent(later)["tools"] == sent(first)["tools"]
    assert sent(later)["input"][1]["name"] == names[2]
    assert [first.names.asked(name) for name in names] == [f"{LONG}{number}" for number in range(3)]


def test_only_tools_in_chats_own_shape_are_answered_as_custom() -> None:
    asked = ask(
        tools=[
            {"type": "custom", "custom": {"name": "nested"}},
            {"type": "custom", "name": "flat"},
            {"type": "custom", "custom": {"name": "both"}},
            function("both"),
        ]
    )
    assert asked.customs == {"nested"}


def test_functions_are_answered_in_their_form_only_when_there_are_no_tools() -> None:
    assert ask(functions=[{"name": "old"}]).uses_functions
    both = ask(functions=[{"name": "old"}], tools=[function("new")])
    assert not both.uses_functions
    assert [tool["name"] for tool in sent(both)["tools"]] == ["new", "old"]
    for choice in ("auto", "none"):
        assert sent(ask(functions=[{"name": "old"}], function_call=choice))["tool_choice"] == choice


def test_a_search_that_is_declared_is_not_declared_twice() -> None:
    tools = [{"type": "web_search", "search_context_size": "high"}]
    assert sent(ask(tools=tools, web_search_options={}))["tools"] == tools
    location = {"type": "approximate", "city": "Oslo"}
    flat = ask(web_search_options={"user_location": location})
    assert sent(flat)["tools"] == [{"type": "web_search", "user_location": location}]


def test_a_conversation_has_a_session_of_its_own_unless_the_caller_names_one() -> None:
    named = ask(prompt_cache_key="mine").request
    assert orjson.loads(named.body)["prompt_cache_key"] == named.headers["session-id"] == "mine"
    assert named.session == ask(USER, USER, headers={"session-id": "mine"}).request.session
    first = ask({"role": "system", "content": "s"}, USER).request
    later = ask({"role": "system", "content": "s"}, USER, {"role": "assistant", "content": "a"}, USER).request
    other = ask({"role": "system", "content": "s"}, user({"type": "text", "text": "other"})).request
    assert first.session == later.session != other.session
    assert orjson.loads(first.body)["prompt_cache_key"] == first.session == first.headers["session-id"]
    assert (first.is_opening, later.is_opening) == (True, False)


def test_a_lite_model_gets_the_lite_shape() -> None:
    asked = ask(
        {"role": "system", "content": "s"},
        USER,
        calling({"id": "c", **function("look", arguments="{}")}),
        {"role": "tool", "tool_call_id": "c", "content": "seen"},
        model="gpt-6.1-sol",
        tools=[function("look")],
        tool_choice=function("look"),
    )
    body = sent(asked)
    assert asked.request.lite
    assert "tools" not in body
    assert body["input"][0]["tools"][0]["tools"][0]["name"] == "look"
    assert body["input"][3]["namespace"] == body["tool_choice"]["namespace"] == "functions"


def test_what_chat_says_beside_a_responses_body_counts() -> None:
    raw = {"model": "gpt-5.5", "input": "hi", "stop": "x", "stream_options": {"include_usage": True}}
    asked = read(json.dumps({**raw, "stream": True, "max_tokens": 3}).encode(), {}, catalog=CATALOG)
    assert asked.stop == ("x",)
    assert asked.shows_usage
    assert asked.request.max_output_tokens == 3
    with pytest.raises(RequestError) as caught:
        read(json.dumps({**raw, "n": 2}).encode(), {}, catalog=CATALOG)
    assert caught.value.param == "n"
    with pytest.raises(RequestError) as caught:
        read(b'{"model":"gpt-5.5","instructions":"only"}', {}, catalog=CATALOG)
    assert caught.value.param == "input"


def test_the_encoding_of_odd_letters_survives() -> None:
    text = 'half \\ud83e, nul \\u0000, "\\ud83e\\udd8a"'
    raw = b'{"model":"gpt-5.5","messages":[{"role":"user","content":"%b"}]}'
    asked = read(raw % text.replace('"', '\\"').encode(), {}, catalog=CATALOG)
    item = json.loads(asked.request.body)["input"][0]
    assert item["content"][0]["text"] == 'half \ud83e, nul \0, "🦊"'


# What is refused ----------------------------------------------------------------------------------

WRONG: list[tuple[str, dict[str, Any]]] = [
    ("messages", {"messages": None}),
    ("messages", {"messages": []}),
    ("messages", {"messages": "hi"}),
    ("messages", {"messages": {"role": "user"}}),
    ("messages.0", {"messages": ["hi"]}),
    ("messages.1", {"messages": [USER, None]}),
    ("messages.0.role", {"messages": [{"content": "x"}]}),
    ("messages.0.role", {"messages": [{"role": 5, "content": "x"}]}),
    ("messages.0.role", {"messages": [{"role": "narrator", "content": "x"}]}),
    ("messages.0.content", {"messages": [{"role": "user"}]}),
    ("messages.0.content", {"messages": [{"role": "user", "content": 5}]}),
    ("messages.0.content", {"messages": [{"role": "user", "content": []}]}),
    ("messages.0.content", {"messages": [{"role": "system", "content": {"text": "x"}}]}),
    ("messages.0.content", {"messages": [{"role": "assistant", "content": 5}]}),
    ("messages.0.content", {"messages": [{"role": "tool", "tool_call_id": "c", "content": 5}]}),
    ("messages.0.content.0", {"messages": [user("bare")]}),
    ("messages.0.content.0.type", {"messages": [user({"text": "x"})]}),
    ("messages.0.content.1.type", {"messages": [user({"type": "text", "text": "x"}, {"type": "video"})]}),
    ("messages.0.content.0.text", {"messages": [user({"type": "text"})]}),
    ("messages.0.content.0.text", {"messages": [user({"type": "text", "text": ["x"]})]}),
    ("messages.0.content.0", {"messages": [user({"type": "image_url"})]}),
    ("messages.0.content.0.image_url", {"messages": [user({"type": "image_url", "image_url": {}})]}),
    ("messages.0.content.0.image_url", {"messages": [user({"type": "image_url", "image_url": 5})]}),
    (
        "messages.0.content.0.image_url.url",
        {"messages": [user({"type": "image_url", "image_url": {"url": 5}})]},
    ),
    (
        "messages.0.content.0.image_url.detail",
        {"messages": [user({"type": "image_url", "image_url": {"url": "u", "detail": 5}})]},
    ),
    ("messages.0.content.0.file", {"messages": [user({"type": "file", "file": "x"})]}),
    ("messages.0.content.0.file", {"messages": [user({"type": "file", "file": {"filename": "x"}})]}),
    ("messages.0.content.0.file.file_data", {"messages": [user({"type": "file", "file": {"file_data": 5}})]}),
    ("messages.0.content.0.input_audio", {"messages": [user({"type": "input_audio"})]}),
    (
        "messages.0.content.0.input_audio.format",
        {"messages": [user({"type": "input_audio", "input_audio": {"data": "x"}})]},
    ),
    *(
        ("messages.0.content.0.type", {"messages": [{"role": role, "content": [part]}]})
        for role in ("system", "developer", "assistant")
        for part in (
            {"type": "image_url", "image_url": {"url": "u"}},
            {"type": "file", "file": {"file_id": "f"}},
            {"type": "input_audio", "input_audio": {"data": "x", "format": "wav"}},
            {"type": "hologram"},
        )
    ),
    ("messages.0.refusal", {"messages": [{"role": "assistant", "refusal": 5}]}),
    ("messages.0.tool_calls", {"messages": [{"role": "assistant", "tool_calls": {"id": "c"}}]}),
    ("messages.0.tool_calls.0", {"messages": [calling("x")]}),
    ("messages.0.tool_calls.0.type", {"messages": [calling({"id": "c"})]}),
    ("messages.0.tool_calls.0.type", {"messages": [calling({"type": "mcp"})]}),
    ("messages.0.tool_calls.0.function", {"messages": [calling({"type": "function", "function": 5})]}),
    ("messages.0.tool_calls.0.function.name", {"messages": [calling({"type": "function", "function": {}})]}),
    ("messages.0.tool_calls.0.function.name", {"messages": [calling(function(""))]}),
    ("messages.0.tool_calls.0.function.arguments", {"messages": [calling(function("f", arguments=5))]}),
    (
        "messages.0.tool_calls.0.custom.input",
        {"messages": [calling({"type": "custom", "custom": {"name": "f", "input": 5}})]},
    ),
    ("messages.0.tool_calls.0.id", {"messages": [calling({**function("f"), "id": 5})]}),
    ("messages.0.function_call", {"messages": [{"role": "assistant", "function_call": "f"}]}),
    ("messages.0.function_call.name", {"messages": [{"role": "assistant", "function_call": {}}]}),
    ("messages.0.tool_call_id", {"messages": [{"role": "tool", "tool_call_id": 5, "content": "x"}]}),
    (
        "messages.0.reasoning_details",
        {"messages": [{"role": "assistant", "content": "x", "reasoning_details": "y"}]},
    ),
    (
        "messages.0.reasoning_details.0",
        {"messages": [{"role": "assistant", "content": "x", "reasoning_details": [5]}]},
    ),
    ("messages.0.images.0", {"messages": [{"role": "assistant", "images": ["x"]}]}),
    ("model", {"model": None}),
    ("model", {"model": 5}),
    ("model", {"model": "gpt\n5"}),
    ("stream", {"stream": "yes"}),
    ("stream_options", {"stream_options": "x"}),
    ("stream_options.include_usage", {"stream_options": {"include_usage": "yes"}}),
    ("n", {"n": 2}),
    ("n", {"n": 0}),
    ("n", {"n": "1"}),
    ("n", {"n": True}),
    ("modalities", {"modalities": ["text", "audio"]}),
    ("modalities", {"modalities": "audio"}),
    ("stop", {"stop": 5}),
    ("stop.1", {"stop": ["x", 5]}),
    ("stop", {"stop": ["x"] * (MAX_STOPS + 1)}),
    ("stop", {"stop": ["x" * (MAX_STOP_CHARACTERS + 1)]}),
    ("max_tokens", {"max_tokens": 0}),
    ("max_tokens", {"max_tokens": "7"}),
    ("max_completion_tokens", {"max_completion_tokens": 1.5}),
    ("service_tier", {"service_tier": 5}),
    ("prompt_cache_key", {"prompt_cache_key": 5}),
    ("parallel_tool_calls", {"parallel_tool_calls": "no"}),
    ("reasoning_effort", {"reasoning_effort": 5}),
    ("reasoning", {"reasoning": "high"}),
    ("reasoning.effort", {"reasoning": {"effort": 5}}),
    ("reasoning.summary", {"reasoning": {"summary": 5}}),
    ("instructions", {"instructions": 5}),
    ("verbosity", {"verbosity": 5}),
    ("text", {"text": "low"}),
    ("text.verbosity", {"text": {"verbosity": 5}}),
    ("response_format", {"response_format": "json"}),
    ("response_format.type", {"response_format": {}}),
    ("response_format.type", {"response_format": {"type": "yaml"}}),
    ("response_format.json_schema", {"response_format": {"type": "json_schema", "json_schema": 5}}),
    ("response_format.json_schema.name", {"response_format": {"type": "json_schema", "json_schema": {}}}),
    (
        "response_format.json_schema.schema",
        {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": 5}}},
    ),
    (
        "response_format.json_schema.strict",
        {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "strict": "yes"}}},
    ),
    ("tools", {"tools": {"type": "function"}}),
    ("tools.0", {"tools": ["f"]}),
    ("tools.0.type", {"tools": [{"name": "f"}]}),
    ("tools.0.type", {"tools": [{"type": ["function"]}]}),
    ("tools.0.function", {"tools": [{"type": "function", "function": "f"}]}),
    ("tools.0.name", {"tools": [{"type": "function"}]}),
    ("tools.0.function.name", {"tools": [function("")]}),
    ("tools.0.function.description", {"tools": [function("f", description=5)]}),
    ("tools.0.function.parameters", {"tools": [function("f", parameters="{}")]}),
    ("tools.0.function.strict", {"tools": [function("f", strict="yes")]}),
    ("tools.0.custom.format", {"tools": [{"type": "custom", "custom": {"name": "c", "format": "text"}}]}),
    (
        "tools.0.custom.format.grammar",
        {
            "tools": [
                {"type": "custom", "custom": {"name": "c", "format": {"type": "grammar", "grammar": "g"}}}
            ]
        },
    ),
    ("functions", {"functions": "f"}),
    ("functions.0", {"functions": ["f"]}),
    ("functions.0.name", {"functions": [{}]}),
    ("function_call.name", {"functions": [{"name": "f"}], "function_call": {}}),
    ("function_call", {"functions": [{"name": "f"}], "function_call": 5}),
    ("tool_choice", {"tool_choice": 5}),
    ("tool_choice.type", {"tool_choice": {}}),
    ("tool_choice.function.name", {"tool_choice": {"type": "function", "function": {}}}),
    (
        "tool_choice.allowed_tools.tools",
        {"tool_choice": {"type": "allowed_tools", "allowed_tools": {"mode": "auto"}}},
    ),
    (
        "tool_choice.allowed_tools.mode",
        {"tool_choice": {"type": "allowed_tools", "allowed_tools": {"tools": []}}},
    ),
    (
        "tool_choice.allowed_tools.tools.0",
        {"tool_choice": {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": ["f"]}}},
    ),
    ("web_search_options", {"web_search_options": True}),
    ("web_search_options.search_context_size", {"web_search_options": {"search_context_size": 5}}),
    ("web_search_options.user_location", {"web_search_options": {"user_location": "Oslo"}}),
]


@pytest.mark.parametrize(
    ("param", "fields"), WRONG, ids=[f"{place}-{param}" for place, (param, _) in enumerate(WRONG)]
)
def test_what_cannot_be_served_is_refused_by_its_path(param: str, fields: dict[str, Any]) -> None:
    error = refused(**fields)
    assert error.param == param
    assert error.status == 400
    assert error.type == "invalid_request_error"


def test_a_part_in_the_wrong_role_is_told_where_it_may_stand() -> None:
    part = {"type": "image_url", "image_url": {"url": "u"}}
    assert "user's message" in refused({"role": "system", "content": [part]}).message
    assert "unknown" in refused(user({"type": "hologram"})).message


def test_an_error_repeats_no_megabytes() -> None:
    word = "x" * 1_000_000
    for error in (
        refused({"role": word, "content": "x"}),
        refused(user({"type": word})),
        refused(calling({"type": word})),
        refused(response_format={"type": word}),
    ):
        assert "xxx..." in error.message
        assert len(error.message) < 200


@pytest.mark.parametrize("raw", [b"", b"[]", b"5", b"{", b"\xff", b'{"messages":[NaN]}', b"null"])
def test_what_is_no_object_is_refused(raw: bytes) -> None:
    with pytest.raises(RequestError):
        read(raw, {}, catalog=CATALOG)


# Hostile bodies -----------------------------------------------------------------------------------

PLACES = [
    '{"model":"gpt-5.5","messages":%s}',
    '{"model":"gpt-5.5","messages":[%s]}',
    '{"model":"gpt-5.5","messages":[{"role":"user","content":[%s]}]}',
    '{"model":"gpt-5.5","messages":[{"role":"user","content":[{"type":"text","text":%s}]}]}',
    '{"model":"gpt-5.5","messages":[{"role":"tool","content":%s}]}',
    '{"model":"gpt-5.5","messages":[{"role":"tool","content":[%s]}]}',
    '{"model":"gpt-5.5","messages":[{"role":"tool","content":[{"type":"image_url","image_url":"u"},%s]}]}',
    '{"model":"gpt-5.5","messages":[{"role":"assistant","tool_calls":[{"function":{"name":"f","arguments":%s}}]}]}',
    '{"model":"gpt-5.5","messages":[{"role":"user","content":"x"}],"tools":[{"type":"new","x":%s}]}',
    '{"model":"gpt-5.5","messages":[{"role":"user","content":"x"}],"tools":[{"function":{"name":"f","parameters":%s}}]}',
    '{"model":"gpt-5.5","messages":[{"role":"user","content":"x"}],"tool_choice":{"type":"new","x":%s}}',
    '{"model":"gpt-5.5","messages":[{"role":"user","content":"x"}],"response_format":{"type":"json_schema",'
    '"json_schema":{"name":"n","schema":{"x":%s}}}}',
    '{"model":"gpt-5.5","messages":[{"role":"user","content":"x"}],"unknown":%s}',
    '{"model":"gpt-5.5","input":[%s]}',
    '{"model":"gpt-5.5","input":[{"type":"message","role":"user","content":[{"type":"input_text","x":%s}]}]}',
]
VALUES = {
    "lists": lambda depth: "[" * depth + "]" * depth,
    "objects": lambda depth: '{"a":' * depth + "1" + "}" * depth,
    "schemas": lambda depth: '{"type":"object","properties":{"a":' * depth + "{}" + "}}" * depth,
    "parts": lambda depth: '{"type":"text","text":' * depth + "1" + "}" * depth,
}


@pytest.mark.parametrize("place", PLACES, ids=range(len(PLACES)))
@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("depth", [300, 500, 980, 5_000, 200_000])
def test_deep_nesting_is_served_or_refused_and_never_crashes(place: str, value: str, depth: int) -> None:
    raw = (place % VALUES[value](depth)).encode()
    started = time.process_time()
    try:
        body = read(raw, {}, catalog=CATALOG).request.body
    except RequestError:
        body = b""
    # What is served is JSON again.
    assert not body or body.endswith(b"}")
    assert time.process_time() - started < 1.0


@pytest.mark.parametrize(
    "content",
    [
        "x" * 10_000_000,
        "\0" * 1_000_000,
        '[{"type":"image_url"' * 200_000,
        "[" * 2_000_000 + '"image_url"',
        '["image_url",' + "[" * 100_000,
        " " * 5_000_000 + '[{"type":"input_image","image_url":"u"}]',
    ],
    ids=["long", "nul", "unclosed", "brackets", "deep", "spaces"],
)
@pytest.mark.parametrize("role", ["user", "tool", "assistant", "system"])
def test_a_huge_text_is_read_within_a_second(role: str, content: str) -> None:
    raw = json.dumps({"model": "gpt-5.5", "messages": [USER, {"role": role, "content": content}]}).encode()
    started = time.process_time()
    asked = read(raw, {}, catalog=CATALOG)
    assert time.process_time() - started < 1.0
    assert len(asked.request.body) > 100


def test_many_messages_and_calls_take_linear_time() -> None:
    def seconds(number: int) -> float:
        messages: list[Any] = [USER]
        for index in range(number):
            # The same id again and again, and outputs that nobody asked for.
            messages.append(calling({"id": "c", **function(f"f.{index}", arguments="{}")}))
            messages.append({"role": "tool", "tool_call_id": "c" if index % 2 else "lost", "content": "x"})
        raw = json.dumps({"model": "gpt-5.5", "messages": messages}).encode()
        started = time.process_time()
        read(raw, {}, catalog=CATALOG)
        return time.process_time() - started

    seconds(100)
    small = min(seconds(2_000) for _ in range(3))
    large = min(seconds(8_000) for _ in range(5))
    assert large < small * 4 * 2.5
