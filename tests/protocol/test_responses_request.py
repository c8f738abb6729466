"""What goes upstream for a Responses request: golden cases, what is refused and where, and odd bodies."""

import json
import random
from pathlib import Path
from typing import Any

import orjson
import pytest

from codex_proxy.errors import RequestError
from codex_proxy.protocol.catalog import Catalog
from codex_proxy.protocol.request import BackendRequest
from codex_proxy.protocol.responses_request import LEFT_OUT, decode
from tests.protocol.upstream_body import DERIVED, shown

GOLDEN = sorted((Path(__file__).parent / "golden" / "responses_request").glob("*.json"))
CATALOG = Catalog()
CODEX = {"originator": "codex_exec", "user-agent": "codex_exec/0.169.0", "session-id": "session-1"}
LITE = {**CODEX, "x-openai-internal-codex-responses-lite": "true"}
INCLUDE = ["reasoning.encrypted_content"]


def ask(body: dict[str, Any], headers: dict[str, str] | None = None, **fields: Any) -> BackendRequest:
    return decode(json.dumps({**body, **fields}).encode(), headers or {}, catalog=CATALOG)


def sent(request: BackendRequest) -> dict[str, Any]:
    return shown(request)


def message(content: Any = "hello", role: str = "user") -> dict[str, Any]:
    return {"type": "message", "role": role, "content": content}


MINIMAL: dict[str, Any] = {"model": "gpt-5.5", "input": "hello"}

NORMAL: dict[str, Any] = {
    "model": "gpt-5.5",
    "stream": True,
    "store": False,
    "instructions": "",
    "include": INCLUDE,
    "tools": [{"type": "function", "name": "look", "parameters": {}}],
    "parallel_tool_calls": True,
    "input": [
        message(),
        {"type": "reasoning", "id": "rs_1", "summary": [], "encrypted_content": "gAAAA"},
        {"type": "function_call", "id": "fc_1", "call_id": "c", "name": "look", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c", "output": "seen"},
    ],
}

FROM_CODEX: dict[str, Any] = {
    "model": "gpt-6.1-sol",
    "stream": True,
    "service_tier": "priority",
    "input": [
        {
            "type": "additional_tools",
            "id": "at_1",
            "role": "developer",
            "tools": [{"type": "namespace", "tools": []}],
        },
        {
            **message([{"type": "input_text", "text": "base"}], "developer"),
            "id": "msg_1",
            "extra": {"turn_id": "t"},
        },
        {"type": "reasoning", "id": "rs_1", "summary": [], "content": None, "encrypted_content": "gAAAA"},
        {"type": "custom_tool_call", "call_id": "c", "name": "exec", "namespace": "functions", "input": "ls"},
        {"type": "custom_tool_call_output", "call_id": "c", "output": [{"type": "input_text", "text": "a"}]},
        {"type": "agent_message", "author": "/root", "recipient": "/a", "content": "go"},
        {"type": "configuration_update", "reasoning": {"effort": "xhigh"}},
        {"type": "compaction_trigger"},
    ],
    "tool_choice": "auto",
    "parallel_tool_calls": False,
    "reasoning": {"effort": "xhigh", "context": "all_turns"},
    "store": False,
    "include": INCLUDE,
    "prompt_cache_key": "session-1",
    "text": {"verbosity": "low"},
    "client_metadata": {"turn_id": "t"},
}


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_the_body_that_goes_upstream(path: Path) -> None:
    case = json.loads(path.read_text(encoding="utf-8"))
    assert sent(ask(case["request"])) == case["sent"]


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_what_went_upstream_is_normal_and_goes_unchanged_the_second_time(path: Path) -> None:
    case = json.loads(path.read_text(encoding="utf-8"))
    once = ask(case["request"])
    again = decode(once.body, {}, catalog=Catalog({"gpt-6-sol": "standard"}) if not once.lite else CATALOG)
    if not once.lite:
        assert again.body is once.body
    else:
        assert sent_any(again) == sent_any(once)


# Codex clients.


@pytest.mark.parametrize("headers", [LITE, CODEX])
def test_a_codex_clients_bytes_go_on_as_they_came(headers: dict[str, str]) -> None:
    raw = json.dumps(FROM_CODEX, indent=1).encode()
    request = decode(raw, headers, catalog=CATALOG)
    assert request.body is raw
    assert request.is_codex
    assert not request.was_lite_encoded
    assert request.binding is not None
    assert request.binding.source == "session-id"
    assert request.encrypted == ("gAAAA",)
    assert request.headers["x-codex-routing-hint"] == "model=gpt-6.1-sol;tier=priority"
    assert request.lite is (headers is LITE)
    assert request.headers.get("x-openai-internal-codex-responses-lite") == (
        "true" if headers is LITE else None
    )


def test_the_lite_flag_may_stand_in_the_metadata() -> None:
    flag = {"ws_request_header_x_openai_internal_codex_responses_lite": "true"}
    request = ask(FROM_CODEX, CODEX, client_metadata=flag)
    assert request.lite
    assert request.headers["x-openai-internal-codex-responses-lite"] == "true"


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"store": True}, {"store": False}),
        ({"stream": False}, {"stream": True}),
        ({"include": []}, {"include": INCLUDE}),
        ({"include": ["a.new.one"]}, {"include": ["a.new.one", *INCLUDE]}),
        (
            {"reasoning": {"effort": "ultra", "summary": "auto"}},
            {"reasoning": {"effort": "xhigh", "summary": "auto"}},
        ),
        ({"reasoning": {"effort": "auto", "summary": "auto"}}, {"reasoning": {"summary": "auto"}}),
        ({"max_output_tokens": 7}, {}),
    ],
)
def test_what_is_forced_on_a_codex_client(fields: dict[str, Any], expected: dict[str, Any]) -> None:
    wanted = {**FROM_CODEX, **fields, **expected}
    wanted.pop("max_output_tokens", None)
    assert sent(ask(FROM_CODEX, LITE, **fields)) == wanted


def test_a_codex_clients_own_effort_is_not_bent() -> None:
    for effort in ("none", "minimal", "max", "of-tomorrow"):
        body = {**FROM_CODEX, "reasoning": {"effort": effort}}
        assert sent(ask(body, LITE)) == body
    body = {**FROM_CODEX, "reasoning": {"effort": None}}
    assert sent(ask(body, LITE)) == body


def test_a_suffix_that_a_codex_client_types_wins_over_its_body() -> None:
    request = ask(FROM_CODEX, LITE, model="gpt-6.1-sol-low-fast", service_tier=None)
    body = sent(request)
    assert (request.asked_model, request.model) == ("gpt-6.1-sol-low-fast", "gpt-6.1-sol")
    assert body["model"] == "gpt-6.1-sol"
    assert body["service_tier"] == request.service_tier == "priority"
    assert body["reasoning"] == {"effort": "low", "context": "all_turns"}
    assert body["input"][-2] == {"type": "configuration_update", "reasoning": {"effort": "low"}}
    assert request.headers["x-codex-routing-hint"] == "model=gpt-6.1-sol;tier=priority"


def test_auto_typed_as_a_suffix_takes_every_effort_out() -> None:
    body = sent(ask(FROM_CODEX, LITE, model="gpt-6.1-sol-auto"))
    assert body["reasoning"] == {"context": "all_turns"}
    assert [item["type"] for item in body["input"]].count("configuration_update") == 0


def test_a_codex_client_that_does_not_know_its_models_name_is_encoded_for_it() -> None:
    """The CLI writes the standard shape for names it has not heard of, suffixes included."""
    body = {**NORMAL, "model": "gpt-6-sol-high", "instructions": "base"}
    request = ask(body, CODEX)
    assert request.lite
    assert request.was_lite_encoded
    assert "tools" not in sent(request)
    assert not ask({**body, "model": "gpt-6-sol"}, CODEX).lite
    assert not ask({**body, "tools": [{"type": "web_search"}]}, CODEX).lite
    assert not ask({**body, "tools": [{"type": ["odd"]}]}, CODEX).lite


def test_the_turn_state_is_the_headers_or_the_metadatas() -> None:
    metadata = {"x-codex-turn-state": "in-body"}
    request = ask(FROM_CODEX, {**LITE, "x-codex-turn-state": "in-header"}, client_metadata=metadata)
    assert request.turn_state == "in-header"
    assert request.has_body_turn_state
    assert "x-codex-turn-state" not in request.headers
    request = ask(FROM_CODEX, LITE, client_metadata=metadata)
    assert request.turn_state == "in-body"
    assert orjson.loads(request.body_for("raw"))["client_metadata"] == {"x-codex-turn-state": "raw"}
    assert ask(FROM_CODEX, LITE).turn_state is None
    assert ask(FROM_CODEX, LITE, client_metadata={"x-codex-turn-state": 7}).turn_state is None


# Other callers.


def test_a_body_that_is_already_normal_is_not_rendered_again() -> None:
    raw = json.dumps({**NORMAL, "prompt_cache_key": "talk"}, indent=2).encode()
    assert decode(raw, {}, catalog=CATALOG).body is raw


@pytest.mark.parametrize("space", ["", " \n\t"])
def test_a_body_that_only_lacks_a_name_gets_it_and_is_not_rendered_again(space: str) -> None:
    raw = (space + json.dumps(NORMAL, indent=2)).encode()
    request = decode(raw, {}, catalog=CATALOG)
    assert request.body.endswith(raw.lstrip()[1:])
    assert sent(request) == {**NORMAL, "prompt_cache_key": DERIVED}


@pytest.mark.parametrize("empty", [None, ""])
def test_a_cache_key_that_says_nothing_is_none(empty: str | None) -> None:
    request = ask({**NORMAL, "prompt_cache_key": empty})
    assert request.body.count(b"prompt_cache_key") == 1
    assert sent(request)["prompt_cache_key"] == DERIVED


@pytest.mark.parametrize("key", sorted(LEFT_OUT))
def test_each_knob_that_is_left_out_is_left_out_whatever_it_holds(key: str) -> None:
    for value in (None, 0, "auto", {"a": 1}, [1]):
        assert key not in sent(ask({**NORMAL, key: value}))


@pytest.mark.parametrize("key", ["max_output_tokens", "max_completion_tokens", "max_tokens"])
def test_an_output_limit_is_kept_here_and_not_sent(key: str) -> None:
    request = ask({**MINIMAL, key: 50})
    assert request.max_output_tokens == 50
    assert key not in sent(request)
    assert ask({**MINIMAL, key: None}).max_output_tokens is None


@pytest.mark.parametrize(
    ("model", "fields", "effort"),
    [
        ("gpt-5.5", {}, None),
        ("gpt-5.5", {"reasoning": {"effort": "high"}}, "high"),
        ("gpt-5.5", {"reasoning": {"effort": "HIGH"}}, "high"),
        ("gpt-5.5", {"reasoning_effort": "high"}, "high"),
        ("gpt-5.5", {"variant": "high"}, "high"),
        ("gpt-5.5", {"reasoning": {"effort": "low"}, "reasoning_effort": "high", "variant": "xhigh"}, "low"),
        ("gpt-5.5-xhigh", {"reasoning": {"effort": "low"}, "reasoning_effort": "high"}, "xhigh"),
        ("gpt-5.5-auto", {"reasoning": {"effort": "low"}}, None),
        ("gpt-5.5", {"reasoning": {"effort": "auto"}}, None),
        ("gpt-5.5", {"reasoning": {"effort": None}}, None),
        ("gpt-5.5", {"reasoning": {}}, None),
        ("gpt-5.5", {"reasoning": {"effort": "max"}}, "xhigh"),
        ("gpt-5.5-minimal", {}, "low"),
        ("gpt-5.5-8192", {}, "medium"),
        ("gpt-5.5", {"reasoning": {"effort": "brand-new"}}, "brand-new"),
        ("unknown-one", {"reasoning": {"effort": "ultra"}}, "xhigh"),
        ("unknown-one-max", {}, "max"),
    ],
)
def test_the_effort_is_the_suffixs_then_the_bodys(
    model: str, fields: dict[str, Any], effort: str | None
) -> None:
    body = sent(ask({"model": model, "input": "x"}, **fields))
    assert body.get("reasoning") == (None if effort is None else {"effort": effort})
    assert not {"reasoning_effort", "variant"} & set(body)


@pytest.mark.parametrize(
    ("model", "tier", "expected"),
    [
        ("gpt-5.5", None, None),
        ("gpt-5.5", "priority", "priority"),
        ("gpt-5.5", "fast", "priority"),
        ("gpt-5.5", "default", None),
        ("gpt-5.5", "flex", None),
        ("gpt-5.5-fast", "flex", "priority"),
        ("gpt-5.5-high-fast", None, "priority"),
        ("gpt-daybreak-red-latest-fast", None, None),
        ("unknown-one-fast", None, "priority"),
    ],
)
def test_only_the_fast_tier_goes_upstream(model: str, tier: str | None, expected: str | None) -> None:
    request = ask({"model": model, "input": "x"}, service_tier=tier)
    assert sent(request).get("service_tier") == request.service_tier == expected


def test_other_callers_send_no_headers_of_their_own() -> None:
    request = ask(
        MINIMAL, {"user-agent": "OpenAI/Python", "x-stainless-lang": "python", "authorization": "Bearer k"}
    )
    assert request.headers == {"session-id": request.session}
    assert not request.is_codex
    lite = ask({**MINIMAL, "model": "gpt-6-sol"})
    assert lite.headers == {
        "session-id": lite.session,
        "x-openai-internal-codex-responses-lite": "true",
    }


def test_the_caller_wants_a_stream_only_when_it_says_so() -> None:
    assert not ask(MINIMAL).stream
    assert not ask(MINIMAL, stream=None).stream
    assert ask(MINIMAL, stream=True).stream


def test_the_lite_shape_is_written_for_models_that_take_it() -> None:
    request = ask({**NORMAL, "model": "gpt-6-sol"})
    assert (request.lite, request.was_lite_encoded) == (True, True)
    request = ask(NORMAL)
    assert (request.lite, request.was_lite_encoded) == (False, False)
    overridden = decode(json.dumps(NORMAL).encode(), {}, catalog=Catalog({"gpt-5.5": "lite"}))
    assert overridden.was_lite_encoded


def test_a_body_in_the_lite_shape_is_not_encoded_twice() -> None:
    body = {**FROM_CODEX, "parallel_tool_calls": True}
    request = ask(body)
    assert (request.lite, request.was_lite_encoded) == (True, False)
    assert sent(request) == {**body, "parallel_tool_calls": False}
    flagged = ask(
        {"model": "gpt-6-sol", "input": [message()]}, {"x-openai-internal-codex-responses-lite": "true"}
    )
    assert (flagged.lite, flagged.was_lite_encoded) == (True, False)
    assert "instructions" not in sent(flagged)


def test_a_namespace_that_is_called_like_ours_keeps_the_standard_shape() -> None:
    tools = [{"type": "namespace", "name": "functions", "tools": []}]
    assert not ask({"model": "gpt-6-sol", "input": "x", "tools": tools}).lite


def test_chosen_tools_get_the_namespace_too() -> None:
    tools = [{"type": "function", "name": "a"}, {"type": "custom", "name": "b"}]
    choice = {
        "type": "allowed_tools",
        "mode": "auto",
        "tools": [*tools, {"type": "function", "namespace": "n"}],
    }
    body = sent(ask({"model": "gpt-6-sol", "input": "x", "tools": tools, "tool_choice": choice}))
    assert [tool["namespace"] for tool in body["tool_choice"]["tools"]] == ["functions", "functions", "n"]


def test_long_ids_are_shortened_and_stay_different() -> None:
    items = [{**message(), "id": "x" * 100 + str(index)} for index in range(50)]
    items += [{**message(), "id": "a"}, {**message(), "id": "msg_a"}]
    ids = [item["id"] for item in sent(ask({"model": "gpt-5.5", "input": items}))["input"]]
    assert len(set(ids)) == 52
    assert all(value.startswith("msg") and len(value) <= 64 for value in ids)
    assert ids == [item["id"] for item in sent(ask({"model": "gpt-5.5", "input": items}))["input"]]


def test_ids_of_types_we_do_not_know_are_only_kept_short() -> None:
    items = [
        {"type": "web_search_call", "id": "anything goes", "status": "completed"},
        {"type": "web_search_call", "id": "ws_" + "1" * 80, "status": "completed"},
        {"type": "compaction", "id": "cmp_" + "1" * 80, "encrypted_content": "g"},
    ]
    kept, short, sealed = sent(ask({"model": "gpt-5.5", "input": items}))["input"]
    assert kept == items[0]
    assert short["id"].startswith("ws_")
    assert len(short["id"]) <= 64
    assert sealed == {"type": "compaction", "encrypted_content": "g"}


def test_a_call_and_its_output_still_meet_when_their_id_is_too_long() -> None:
    items = [
        {"type": "function_call", "call_id": "c" * 65, "name": "f", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c" * 65, "output": "r"},
        {"type": "function_call", "call_id": "c" * 64, "name": "f", "arguments": "{}"},
    ]
    call, output, other = sent(ask({"model": "gpt-5.5", "input": items}))["input"]
    assert call["call_id"] == output["call_id"]
    assert len(call["call_id"]) <= 64
    assert other["call_id"] == "c" * 64


def test_tools_that_the_caller_runs_stand_beside_the_namespace() -> None:
    tools = [{"type": "tool_search", "execution": "client"}, {"type": "function", "name": "f"}]
    request = ask({"model": "gpt-6-sol", "input": "x", "tools": tools})
    assert [tool["type"] for tool in sent(request)["input"][0]["tools"]] == ["namespace", "tool_search"]
    assert not ask({"model": "gpt-6-sol", "input": "x", "tools": [*tools, {"type": "mcp"}]}).lite


def test_pictures_and_seals_do_not_count_as_text() -> None:
    picture = {"type": "input_image", "image_url": "data:image/png;base64," + "A" * 50_000}
    seal = {"type": "compaction", "encrypted_content": "g" * 50_000}
    request = ask({"model": "gpt-5.5", "input": [message([picture]), seal]})
    assert request.compacted
    assert 0 < request.input_bytes < 1000
    assert request.encrypted == ()


# What is refused, and where.


@pytest.mark.parametrize("headers", [{}, LITE], ids=["other", "codex"])
@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"model": None}, "model"),
        ({"model": ""}, "model"),
        ({"model": 7}, "model"),
        ({"input": None}, "input"),
        ({"input": 7}, "input"),
        ({"input": {}}, "input"),
        ({"input": ["text"]}, "input.0"),
        ({"input": [message(), None]}, "input.1"),
        ({"input": [{"type": 7, "role": "user"}]}, "input.0.type"),
        ({"input": [message(7)]}, "input.0.content"),
        ({"input": [message({"type": "input_text"})]}, "input.0.content"),
        ({"input": [message(["text"])]}, "input.0.content.0"),
        ({"input": [message([{"type": "input_text", "text": "x"}, 7])]}, "input.0.content.1"),
        ({"input": [{"type": "function_call_output", "call_id": "c", "output": [7]}]}, "input.0.output.0"),
        ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "input.0"),
        ({"input": [message(), {"id": "msg_1"}]}, "input.1"),
        ({"stream": "yes"}, "stream"),
        ({"tools": {}}, "tools"),
        ({"tools": ["web_search"]}, "tools.0"),
        ({"reasoning": "high"}, "reasoning"),
        ({"reasoning": {"effort": 7}}, "reasoning.effort"),
        ({"text": "low"}, "text"),
        ({"include": "all"}, "include"),
        ({"include": [7]}, "include.0"),
        ({"instructions": ["be brief"]}, "instructions"),
        ({"service_tier": 1}, "service_tier"),
        ({"prompt_cache_key": 7}, "prompt_cache_key"),
        ({"client_metadata": "x"}, "client_metadata"),
        ({"max_output_tokens": "7"}, "max_output_tokens"),
        ({"max_output_tokens": True}, "max_output_tokens"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"max_output_tokens": 1.5}, "max_output_tokens"),
        ({"background": True}, "background"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"prompt": {"id": "pmpt_1"}}, "prompt"),
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
    ],
)
def test_what_cannot_be_served_is_refused_by_its_path(
    fields: dict[str, Any], param: str, headers: dict[str, str]
) -> None:
    with pytest.raises(RequestError) as caught:
        ask(MINIMAL, headers, **fields)
    assert (caught.value.status, caught.value.param) == (400, param)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": [{}]}, "input.0.type"),
        ({"input": [{"role": 7, "content": "x"}]}, "input.0.role"),
        ({"input": [{"type": "message", "content": "x"}]}, "input.0.role"),
        ({"input": [message(None)]}, "input.0.content"),
        ({"input": [message([{"text": "x"}])]}, "input.0.content.0.type"),
        (
            {"input": [{"type": "function_call", "call_id": "c", "name": "f", "arguments": {}}]},
            "input.0.arguments",
        ),
        ({"input": [{"type": "function_call", "name": "f", "arguments": ""}]}, "input.0.call_id"),
        ({"input": [{"type": "function_call_output", "call_id": "c", "output": None}]}, "input.0.output"),
        ({"input": [{"type": "custom_tool_call", "call_id": "c", "name": "f"}]}, "input.0.input"),
        ({"input": [{**message(), "id": 7}]}, "input.0.id"),
        (
            {"input": [{"type": "reasoning", "encrypted_content": "g", "summary": "s"}]},
            "input.0.summary",
        ),
        ({"tools": [{}]}, "tools.0.type"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools.0.name"),
        ({"tools": [{"type": "namespace", "name": "n"}]}, "tools.0.tools"),
        ({"tool_choice": 7}, "tool_choice"),
        ({"tool_choice": {"type": "allowed_tools", "tools": 7}}, "tool_choice.tools"),
        ({"tool_choice": {"type": "allowed_tools", "tools": [7]}}, "tool_choice.tools.0"),
        ({"parallel_tool_calls": "no"}, "parallel_tool_calls"),
        ({"reasoning_effort": 7}, "reasoning_effort"),
        ({"variant": []}, "variant"),
        ({"stream_options": 7}, "stream_options"),
    ],
)
def test_other_callers_are_held_to_the_api(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(RequestError) as caught:
        ask(MINIMAL, **fields)
    assert (caught.value.status, caught.value.param) == (400, param)


def test_a_continuation_is_refused_in_the_words_that_make_clients_resend() -> None:
    with pytest.raises(RequestError) as caught:
        ask(MINIMAL, previous_response_id="resp_1")
    assert caught.value.code == "previous_response_not_found"


def test_a_body_nested_beyond_reason_is_refused_when_it_must_be_rendered() -> None:
    for depth in (300, 900, 1020):
        deep = b'{"a":' * depth + b"1" + b"}" * depth
        raw = (
            b'{"model":"gpt-5.5","input":"x","tools":[{"type":"function","name":"f","parameters":'
            + deep
            + b"}]}"
        )
        try:
            outcome = sent(decode(raw, {}, catalog=CATALOG))["model"]
        except RequestError as error:
            outcome = error.message
        assert outcome in ("gpt-5.5", "the body is nested too deeply")


def test_half_a_surrogate_pair_in_the_input_goes_upstream_as_it_came() -> None:
    raw = rb'{"model":"gpt-5.5","input":"cut \ud83d"}'
    assert rb"cut \ud83d" in decode(raw, {}, catalog=CATALOG).body


# Anything at all.

ODD: list[Any] = [
    None,
    True,
    False,
    0,
    -1,
    1.5,
    10**30,
    "",
    "x",
    "ultra",
    "\ud800",
    [],
    [None],
    {},
    {"type": None},
]
ODD += [
    {"type": ["x"]},
    {"type": {}},
    [[]],
    [{}],
    ["x"],
    {"id": "x"},
    [{"type": "function"}],
    {"tools": [{}]},
]


def mutate(value: Any, dice: random.Random) -> Any:
    """Return *value* with one random place of it replaced, doubled or removed."""
    if isinstance(value, dict) and value and dice.random() < 0.85:
        key = dice.choice(sorted(value))
        copy = dict(value)
        if dice.random() < 0.2:
            del copy[key]
        else:
            copy[key] = mutate(value[key], dice)
        return copy
    if isinstance(value, list) and value and dice.random() < 0.85:
        index = dice.randrange(len(value))
        kept = list(value)
        kept[index] = mutate(value[index], dice)
        return kept if dice.random() < 0.8 else kept + kept[index:]
    return dice.choice(ODD)


@pytest.mark.parametrize("headers", [{}, CODEX, LITE], ids=["other", "codex", "lite"])
@pytest.mark.parametrize("seed", range(4))
def test_no_json_is_a_crash(seed: int, headers: dict[str, str]) -> None:
    """Whatever comes, it is decoded, or refused with a message that is fit to be shown."""
    dice = random.Random(seed)
    rich = {**NORMAL, **FROM_CODEX, "tool_choice": {"type": "allowed_tools", "tools": [{"type": "function"}]}}
    rich["tools"] = [
        *NORMAL["tools"],
        {"type": "namespace", "name": "n", "tools": []},
        {"type": "web_search"},
    ]
    rich["input"] = NORMAL["input"] + FROM_CODEX["input"]
    decoded = 0
    for _ in range(400):
        body: Any = dice.choice([rich, NORMAL, FROM_CODEX, {**NORMAL, "model": "gpt-6-sol-high"}])
        for _ in range(dice.randint(1, 4)):
            body = mutate(body, dice)
        request: BackendRequest | RequestError
        try:
            request = decode(json.dumps(body).encode(), headers, catalog=CATALOG)
        except RequestError as error:
            request = error
        if isinstance(request, RequestError):
            assert (request.status, bool(request.message)) == (400, True)
            continue
        decoded += 1
        value = sent_any(request)
        assert value["store"] is False
        assert value["stream"] is True
        assert "reasoning.encrypted_content" in value["include"]
        assert isinstance(value["input"], list)
        request.body_for(None, lambda _: True)
    assert decoded > 20


def sent_any(request: BackendRequest) -> dict[str, Any]:
    value: dict[str, Any] = json.loads(request.body)
    return value


@pytest.mark.parametrize(
    ("key", "headers", "header"),
    [
        ("talk-1", {}, "talk-1"),
        ("talk-1", {"session-id": "own"}, "own"),
        # What no header holds is known by its digest there.
        ("talk\n1", {}, None),
        ("gespräch", {}, None),
        ("x" * 300, {}, None),
    ],
)
def test_the_name_of_a_conversation_goes_out_as_a_header_too(
    key: str, headers: dict[str, str], header: str | None
) -> None:
    body = {"model": "gpt-5.5", "input": "hi", "prompt_cache_key": key}
    request = ask(body, headers)
    assert request.headers["session-id"] == (header or request.session)
    assert sent_any(request)["prompt_cache_key"] == key
