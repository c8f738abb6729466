"""Backend events to the caller's Responses stream: what passes, what is changed, how it ends."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from codex_proxy.errors import (
    BackendFault,
    ConfigError,
    KeyRefused,
    PoolEmpty,
    PoolExhausted,
    PoolShortage,
    ProxyError,
    RequestError,
    UpstreamError,
    Verdict,
)
from codex_proxy.protocol.request import BackendRequest
from codex_proxy.protocol.responses import (
    Encoder,
    failure_of,
    has_text,
    is_handshake,
    read_reset,
    render_error,
    visible_headers,
    words_of,
)
from codex_proxy.protocol.sse import Batch, Event, Parser
from codex_proxy.protocol.wire import JsonObject
from codex_proxy.trace import End, Usage, UsageSource
from tests.protocol.replay import replay

HERE = Path(__file__).parent
FIXTURES = sorted((HERE / "fixtures").glob("*.sse"))
CALLERS = pytest.mark.parametrize("is_codex", [True, False], ids=["codex", "other"])
LIMITS = {"plan_type": "pro", "rate_limits": {"allowed": True, "limit_reached": False}}


def request(**fields: Any) -> BackendRequest:
    return BackendRequest(**{
        "endpoint": "responses",
        "asked_model": "gpt-5.5-high",
        "model": "gpt-5.5",
        "body": b"",
        "stream": True,
        **fields,
    })


def encoder(**fields: Any) -> Encoder:
    return Encoder(
        request(**fields),
        pool_limits=lambda: LIMITS,
        wrap_turn_state=lambda value: f"a1.{value}",
        models_etag='W/"ours"',
        now=lambda: 1_800_000_000.0,
        response_id="resp_ours",
    )


def parse(data: bytes) -> Batch:
    parser = Parser()
    return [*parser.feed(data), *parser.finish()]


def batch(*events: JsonObject) -> Batch:
    return [Event.of(event) for event in events]


def shown(data: bytes) -> list[JsonObject]:
    return [event.json for event in parse(data)]


def types(data: bytes) -> list[str]:
    return [event.type for event in parse(data)]


def created(number: int = 0, **fields: Any) -> JsonObject:
    response = {"id": "resp_1", "object": "response", "status": "in_progress", "model": "m", "output": []}
    return {"type": "response.created", "response": {**response, **fields}, "sequence_number": number}


def completed(number: int = 9, **fields: Any) -> JsonObject:
    response = {"id": "resp_1", "object": "response", "status": "completed", "model": "m", "output": []}
    return {"type": "response.completed", "response": {**response, **fields}, "sequence_number": number}


def delta(text: str, number: int = 1) -> JsonObject:
    return {
        "type": "response.output_text.delta",
        "item_id": "msg_1",
        "output_index": 0,
        "content_index": 0,
        "delta": text,
        "sequence_number": number,
    }


# Whole streams


def golden_encoder(name: str, is_codex: bool) -> Encoder:
    return encoder(is_codex=is_codex, was_lite_encoded=name == "lite_tools" and not is_codex)


@CALLERS
@pytest.mark.parametrize("path", FIXTURES, ids=lambda path: path.stem)
def test_every_cut_of_a_stream_gives_the_same_bytes(path: Path, is_codex: bool) -> None:
    data = path.read_bytes()
    who = "codex" if is_codex else "other"
    expected = (HERE / "golden" / "responses" / f"{path.stem}.{who}.sse").read_bytes()
    cuts = ([data[:cut], data[cut:]] for cut in range(len(data) + 1))
    for cut, out in enumerate(replay(lambda: golden_encoder(path.stem, is_codex), cuts, runs=False)):
        assert out == expected, cut


@CALLERS
@pytest.mark.parametrize("path", FIXTURES, ids=lambda path: path.stem)
def test_every_stream_ends_once_and_counts_upwards(path: Path, is_codex: bool) -> None:
    out = golden_encoder(path.stem, is_codex)
    events = shown(out.encode(parse(path.read_bytes())))
    terminal = {"response.completed", "response.incomplete", "response.failed"}
    assert [event["type"] in terminal for event in events] == [False] * (len(events) - 1) + [True]
    numbers = [event["sequence_number"] for event in events if "sequence_number" in event]
    assert numbers == sorted(set(numbers))
    assert out.finished


@CALLERS
def test_events_that_need_no_change_pass_byte_for_byte(is_codex: bool) -> None:
    odd = b'{"type":"response.output_text.delta", "delta" : "\\ud83e\\u0041", "n":1.0, "sequence_number":3}'
    unknown = b'{"type":"response.brand_new.thing","x":[],"sequence_number":4}'
    quiet = b'{"type":"response.in_progress","response":{"id" : "r","model":"gpt-5.5-high"}}'
    ending = (
        b'{"type":"response.completed","response":{"id" : "r","object":"response","model":"gpt-5.5-high",'
        b'"output":[{"id":"msg_1"}],"usage":null}}'
    )
    out = encoder(is_codex=is_codex)
    out.encode(batch(created()))
    events = [Event.read(data) for data in (odd, unknown, quiet, ending)]
    assert [event.data for event in out.events(events)] == [odd, unknown, quiet, ending]


def test_a_plain_delta_is_never_parsed(monkeypatch: pytest.MonkeyPatch) -> None:
    out = encoder()
    out.encode(batch(created()))
    data = json.dumps(delta("hello")).encode()
    monkeypatch.setattr(Event, "json", property(lambda _: pytest.fail("a delta was parsed")))
    assert out.encode([Event.read(data)]) == b"event: response.output_text.delta\ndata: " + data + b"\n\n"


# Response objects


@CALLERS
@pytest.mark.parametrize("kind", ["created", "queued", "in_progress", "completed", "incomplete"])
def test_response_objects_echo_what_was_asked_and_hide_the_owner(kind: str, is_codex: bool) -> None:
    out = encoder(is_codex=is_codex)
    out.encode(batch(created()))
    response: JsonObject = {"id": "r", "object": "response", "model": "gpt-mock", "metadata": {"k": "v"}}
    response |= {"safety_identifier": "user-1", "user": "u"}
    response["headers"] = {"openai-model": "gpt-mock", "x-codex-plan-type": "plus"}
    event = {"type": f"response.{kind}", "response": response, "sequence_number": 4}
    (answer,) = shown(out.encode(batch(event)))
    assert answer["response"]["model"] == "gpt-5.5-high"
    assert answer["response"]["safety_identifier"] is None
    assert answer["response"]["user"] is None
    assert answer["response"]["metadata"] == {"k": "v"}
    assert answer["response"].get("headers") == ({"openai-model": "gpt-5.5-high"} if is_codex else None)


def test_the_backend_s_own_event_is_not_changed_in_place() -> None:
    event = Event.of(created(safety_identifier="user-1"))
    encoder().encode([event])
    assert event.json["response"]["safety_identifier"] == "user-1"


def test_a_missing_model_is_filled_in_and_missing_owners_are_not() -> None:
    (answer,) = shown(encoder().encode(batch({"type": "response.created", "response": {"id": "r"}})))
    assert answer["response"] == {"id": "r", "model": "gpt-5.5-high"}


def item_done(index: int, item: JsonObject) -> JsonObject:
    return {
        "type": "response.output_item.done",
        "output_index": index,
        "item": item,
        "sequence_number": index + 2,
    }


@pytest.mark.parametrize("output", [[], None])
def test_an_empty_output_is_rebuilt_in_order(output: list[Any] | None) -> None:
    out = encoder()
    items = [{"type": "reasoning", "id": "rs_1"}, {"type": "message", "id": "msg_1"}]
    events = batch(created(), item_done(1, items[1]), item_done(0, items[0]), completed(output=output))
    assert shown(out.encode(events))[-1]["response"]["output"] == items


def test_items_without_an_id_get_it_from_their_done_event() -> None:
    out = encoder()
    told = [{"type": "message", "content": []}, {"type": "message", "id": "own"}, "odd"]
    events = batch(
        created(), item_done(0, {"id": "msg_1"}), item_done(1, {"id": "x"}), completed(output=told)
    )
    assert shown(out.encode(events))[-1]["response"]["output"] == [
        {"type": "message", "content": [], "id": "msg_1"},
        {"type": "message", "id": "own"},
        "odd",
    ]


def test_the_echo_of_a_tool_choice_names_no_namespace_of_ours() -> None:
    ours = {"type": "custom", "name": "exec", "namespace": "functions"}
    theirs = {"type": "function", "name": "f", "namespace": "mcp"}
    for choice, plain in (
        (ours, {"type": "custom", "name": "exec"}),
        (theirs, theirs),
        (
            {"type": "allowed_tools", "tools": [ours, theirs, 5]},
            {"type": "allowed_tools", "tools": [{"type": "custom", "name": "exec"}, theirs, 5]},
        ),
        ("auto", "auto"),
    ):
        out = encoder(was_lite_encoded=True)
        told = shown(out.encode(batch(created(tool_choice=choice), completed(tool_choice=choice))))
        assert [event["response"]["tool_choice"] for event in told] == [plain, plain]


def test_items_without_an_id_get_it_by_their_order_when_the_indexes_have_gaps() -> None:
    out = encoder()
    told = [{"type": "message"}, {"type": "function_call"}]
    events = batch(
        created(), item_done(1, {"id": "msg_1"}), item_done(4, {"id": "fc_1"}), completed(output=told)
    )
    output = shown(out.encode(events))[-1]["response"]["output"]
    assert [item["id"] for item in output] == ["msg_1", "fc_1"]


def test_two_items_that_claim_one_place_are_both_kept() -> None:
    out = encoder()
    events = batch(
        created(),
        item_done(0, {"id": "msg_1"}),
        item_done(0, {"id": "msg_2"}),
        item_done(0, {"id": "msg_2", "told": "twice"}),
        completed(),
    )
    output = shown(out.encode(events))[-1]["response"]["output"]
    assert output == [{"id": "msg_1"}, {"id": "msg_2", "told": "twice"}]


@CALLERS
def test_an_end_that_cannot_be_read_is_none(is_codex: bool) -> None:
    out = encoder(is_codex=is_codex)
    data = out.encode([
        Event.of(created()),
        Event("response.completed", b'{"type":"response.completed","response":{"id":"r"}'),
    ])
    assert types(data) == ["response.created"]
    assert not out.finished


@pytest.mark.parametrize("usage", [{"input_tokens": "7"}, {"output_tokens": None, "total_tokens": 1.5}, {}])
def test_usage_has_the_numbers_without_which_a_client_takes_the_stream_for_broken(usage: JsonObject) -> None:
    out = encoder(is_codex=True)
    told = shown(out.encode(batch(created(), completed(usage=usage))))[-1]["response"]["usage"]
    assert (told["input_tokens"], told["output_tokens"], told["total_tokens"]) == (0, 0, 0)


def test_usage_that_is_no_object_is_none() -> None:
    out = encoder()
    told = shown(out.encode(batch(created(), completed(usage="much"))))[-1]["response"]
    assert told["usage"] is None


def test_a_failure_may_be_one_word() -> None:
    event = Event.of({"type": "response.failed", "response": {"error": "usage_limit_reached"}})
    failure = failure_of(event, now=0.0)
    assert failure is not None
    assert failure.verdict is Verdict.EXHAUSTED


@pytest.mark.parametrize(("told", "family"), [("Codex-Bengalfox", "codex_bengalfox"), (" ", None), (5, None)])
def test_a_limit_inside_a_stream_has_the_name_that_it_has_as_a_header(
    told: object, family: str | None
) -> None:
    event = Event.of({
        "type": "error",
        "status": 429,
        "error": {"type": "usage_limit_reached"},
        "headers": {"X-Codex-Active-Limit": told},
    })
    failure = failure_of(event, now=0.0)
    assert failure is not None
    assert failure.limit_family == family


def test_usage_gets_the_details_that_strict_readers_ask_for() -> None:
    out = encoder()
    usage = {"input_tokens": 7, "output_tokens": 3, "input_tokens_details": {"cached_tokens": 5}}
    told = shown(out.encode(batch(created(), completed(usage=usage))))[-1]["response"]["usage"]
    assert told == {
        "input_tokens": 7,
        "output_tokens": 3,
        "input_tokens_details": {"cached_tokens": 5, "cache_write_tokens": 0},
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": 10,
    }
    assert out.usage == Usage(input_tokens=7, cached_tokens=5, output_tokens=3, source=UsageSource.BACKEND)
    assert out.estimate() == out.usage


def test_an_answer_without_usage_stays_without_and_is_estimated_for_us() -> None:
    out = encoder(input_bytes=400)
    told = shown(out.encode(batch(created(), delta("abcdefgh"), delta('"\\"'), completed(usage=None))))
    assert told[-1]["response"]["usage"] is None
    assert out.usage.source is UsageSource.NONE
    # Escapes count as they stand on the wire.
    assert out.delivered == len("abcdefgh") + len(r"\"\\\"")
    assert out.estimate() == Usage(input_tokens=100, output_tokens=4, source=UsageSource.ESTIMATE)


@pytest.mark.parametrize("text", ["", "x", "\\", 'x"', '\\"', '"', "\\\\", 'a"b\\c"d'])
def test_what_was_delivered_is_measured_as_it_stands_on_the_wire(text: str) -> None:
    out = encoder()
    out.encode(batch(created(), delta(text)))
    assert out.delivered == len(json.dumps(text)) - 2


def test_a_delta_that_is_no_text_or_never_ends_counts_nothing_odd() -> None:
    out = encoder(is_codex=True)
    cut = b'{"type":"response.x.delta","delta":"abc'
    out.encode([Event.read(b'{"type":"response.x.delta","delta":5}'), Event("response.x.delta", cut)])
    assert out.delivered == 3


def test_items_that_came_without_deltas_are_estimated_too() -> None:
    out = encoder()
    item = {"type": "message", "content": [{"type": "output_text", "text": "x" * 40}]}
    out.encode(batch(created(), item_done(0, item), item_done(1, {"arguments": "y" * 8}), completed()))
    assert out.estimate().output_tokens == 12


@CALLERS
def test_a_bare_final_response_is_made_whole_for_sdk_readers(is_codex: bool) -> None:
    out = encoder(is_codex=is_codex)
    bare = {"type": "response.completed", "response": {"id": "resp_1"}, "sequence_number": 3}
    response = shown(out.encode(batch(created(store=False), bare)))[-1]["response"]
    assert response["output"] == []
    assert response.get("status") == (None if is_codex else "completed")
    assert response.get("store") == (None if is_codex else False)


# Who may see what


def test_nothing_comes_before_created_for_a_caller_that_is_no_codex_client() -> None:
    out = encoder()
    early = batch(
        {"type": "codex.rate_limits"},
        {"type": "response.metadata", "headers": {}},
        {"type": "response.queued", "response": {}},
        {"type": "keepalive"},
    )
    assert out.encode(early) == b""
    assert types(out.encode(batch(created()))) == ["response.created"]


def test_a_stream_without_created_gets_one() -> None:
    events = shown(encoder().encode(batch(delta("hi", 4), completed(5))))
    assert [event["type"] for event in events] == [
        "response.created",
        "response.output_text.delta",
        "response.completed",
    ]
    assert events[0]["sequence_number"] == 3
    assert events[0]["response"]["id"] == "resp_ours"
    assert events[0]["response"]["created_at"] == 1_800_000_000


@CALLERS
def test_events_of_codex_go_to_codex_clients_only(is_codex: bool) -> None:
    out = encoder(is_codex=is_codex)
    out.encode(batch(created()))
    foreign = batch(
        {"type": "responsesapi.websocket_timing"}, {"type": "keepalive"}, {"type": "codex.new"}, {"n": 1}
    )
    seen = ["responsesapi.websocket_timing", "keepalive", "codex.new"] if is_codex else []
    assert types(out.encode(foreign)) == seen


def test_a_codex_client_sees_the_pool_s_limits_or_none() -> None:
    event = {
        "type": "codex.rate_limits",
        "plan_type": "plus",
        "rate_limits": {"primary": {"used_percent": 98}},
    }
    assert shown(encoder(is_codex=True).encode(batch(event))) == [{"type": "codex.rate_limits", **LIMITS}]
    assert Encoder(request(is_codex=True)).encode(batch(event)) == b""


def test_metadata_is_filtered_for_codex_clients() -> None:
    headers = {"OpenAI-Model": "gpt-mock", "X-Codex-Turn-State": "node", "x-models-etag": "theirs"}
    headers |= {"x-codex-primary-used-percent": "98", "set-cookie": "a=b", "cf-ray": "1"}
    event = {"type": "response.metadata", "headers": headers, "metadata": {"a": 1}}
    (told,) = shown(encoder(is_codex=True).encode(batch(event)))
    assert told["metadata"] == {"a": 1}
    assert told["headers"] == {
        "OpenAI-Model": "gpt-5.5-high",
        "X-Codex-Turn-State": "a1.node",
        "x-models-etag": 'W/"ours"',
        "cf-ray": "1",
    }


def test_headers_come_down_to_codex_clients_only() -> None:
    headers = {"x-codex-turn-state": "node", "openai-model": "m", "x-models-etag": "e", "x-request-id": "r"}
    wrap: Callable[[str], str] = "a1.{}".format
    assert visible_headers(headers, request(is_codex=True), wrap_turn_state=wrap) == {
        "x-codex-turn-state": "a1.node",
        "openai-model": "gpt-5.5-high",
        "x-request-id": "r",
    }
    assert visible_headers(headers, request(), wrap_turn_state=wrap) == {}


@pytest.mark.parametrize("was_lite_encoded", [True, False])
def test_our_own_namespace_is_taken_off_again(was_lite_encoded: bool) -> None:
    out = encoder(was_lite_encoded=was_lite_encoded)
    ours = {"type": "function_call", "id": "fc_1", "namespace": "functions"}
    theirs = {"type": "function_call", "id": "fc_2", "namespace": "clock"}
    events = batch(
        created(),
        {"type": "response.output_item.added", "output_index": 0, "item": ours},
        item_done(0, ours),
        item_done(1, theirs),
        completed(output=[ours, theirs]),
    )
    told = shown(out.encode(events))
    expected = {"type": "function_call", "id": "fc_1"} if was_lite_encoded else ours
    assert [event["item"] for event in told[1:4]] == [expected, expected, theirs]
    assert told[4]["response"]["output"] == [expected, theirs]


def test_a_keepalive_is_json_as_soon_as_the_caller_can_take_it() -> None:
    out = encoder()
    assert out.keepalive() == b": keepalive\n\n"
    out.encode(batch(created()))
    assert out.keepalive() == b'data: {"type":"keepalive"}\n\n'
    assert encoder(is_codex=True).keepalive() == b'data: {"type":"keepalive"}\n\n'


# Failures after the answer began

RETRY = {
    "code": "rate_limit_exceeded",
    "message": "the backend has no room for this just now, please try again in 1s",
}


def failed(code: str | None, message: str = "words") -> JsonObject:
    return {
        "type": "response.failed",
        "response": {"id": "resp_1", "error": {"code": code, "message": message}},
        "sequence_number": 5,
    }


FAILURES: list[tuple[JsonObject, JsonObject, Verdict]] = [
    (failed("usage_limit_reached"), RETRY, Verdict.EXHAUSTED),
    (failed("rate_limit_exceeded", "try again in 20s"), RETRY, Verdict.LIMITED),
    (failed("server_is_overloaded"), RETRY, Verdict.OVERLOADED),
    (failed("slow_down"), RETRY, Verdict.OVERLOADED),
    (failed("insufficient_quota"), RETRY, Verdict.UNENTITLED),
    (failed("usage_not_included"), RETRY, Verdict.MODEL),
    (failed("invalid_encrypted_content"), RETRY, Verdict.ENCRYPTED),
    (failed(None, "Selected model is at capacity."), RETRY, Verdict.OVERLOADED),
    (failed("server_error", "it broke"), {"code": "server_error", "message": "it broke"}, Verdict.SERVER),
    (
        failed("account_on_fire", "call owner"),
        {"code": "server_error", "message": "the backend failed while it answered"},
        Verdict.SERVER,
    ),
    (
        failed("context_length_exceeded", "too long"),
        {"code": "context_length_exceeded", "message": "too long"},
        Verdict.CALLER,
    ),
    (failed("cyber_policy", "no"), {"code": "cyber_policy", "message": "no"}, Verdict.CALLER),
    (failed("image_too_large", "big"), {"code": "image_too_large", "message": "big"}, Verdict.CALLER),
    (
        {"type": "error", "code": "server_error", "message": "flat", "sequence_number": 5},
        {"code": "server_error", "message": "flat"},
        Verdict.SERVER,
    ),
    (
        {
            "type": "error",
            "error": {"type": "usage_limit_reached", "message": "nested"},
            "sequence_number": 5,
        },
        RETRY,
        Verdict.EXHAUSTED,
    ),
    (
        {"error": {"type": "invalid_request_error", "message": "bad words"}},
        {"code": "invalid_prompt", "message": "bad words"},
        Verdict.CALLER,
    ),
    ({"error": "rate_limit_exceeded"}, RETRY, Verdict.LIMITED),
    (
        {"detail": "The 'x' model is not supported when using Codex with a ChatGPT account."},
        RETRY,
        Verdict.MODEL,
    ),
    (
        {"type": "response.failed", "response": None},
        {"code": "server_error", "message": "the backend failed while it answered"},
        Verdict.SERVER,
    ),
    (
        {"type": "stream_error", "error": {"code": "server_error", "message": "typed"}},
        {"code": "server_error", "message": "typed"},
        Verdict.SERVER,
    ),
]


@CALLERS
@pytest.mark.parametrize(("event", "error", "verdict"), FAILURES)
def test_a_late_failure_is_one_failed_response(
    event: JsonObject, error: JsonObject, verdict: Verdict, is_codex: bool
) -> None:
    out = encoder(is_codex=is_codex)
    out.encode(batch(created(store=False), delta("part")))
    (told,) = shown(out.encode(batch(event, delta("more"), completed())))
    assert told["type"] == "response.failed"
    assert told["sequence_number"] == max(event.get("sequence_number", 0), 2)
    response = told["response"]
    assert (response["id"], response["status"], response["error"]) == ("resp_1", "failed", error)
    assert response["model"] == "gpt-5.5-high"
    assert response["store"] is False
    assert out.ended is End.FAILED
    assert out.failure is not None
    assert (out.failure.verdict, out.failure.in_stream) == (verdict, True)
    assert out.encode(batch(delta("after"))) == b""


def test_no_secret_and_no_endless_text_comes_with_a_failure() -> None:
    message = "Bearer abc.def for owner@example.com: " + "x" * 9000
    out = encoder()
    (_, told) = shown(out.encode(batch(created(), failed("server_error", message))))
    words = told["response"]["error"]["message"]
    assert "abc.def" not in words
    assert "owner@" not in words
    assert len(words) <= 2048


def test_the_usage_of_a_failed_answer_counts() -> None:
    out = encoder()
    event = failed("server_error")
    event["response"]["usage"] = {"input_tokens": 4, "output_tokens": 2}
    out.encode(batch(created(), event))
    assert out.usage == Usage(input_tokens=4, output_tokens=2, source=UsageSource.BACKEND)


def upstream(
    verdict: Verdict, message: str = "words", code: str | None = None, **fields: Any
) -> UpstreamError:
    return UpstreamError(verdict, BackendFault(message, code=code, param="input.0"), **fields)


CUTS: list[tuple[ProxyError, JsonObject]] = [
    (upstream(Verdict.CUT, "the stream broke"), {"code": "server_error", "message": "the stream broke"}),
    (upstream(Verdict.SILENT, "no word in 300 s"), {"code": "server_error", "message": "no word in 300 s"}),
    (upstream(Verdict.PATH, "10.1.2.3 refused"), RETRY),
    (upstream(Verdict.UNAUTHORIZED, "your token"), RETRY),
    (PoolExhausted("used up", resets_at=1_800_000_900, retry_after=900), RETRY),
    (PoolEmpty("nobody there"), RETRY),
    (PoolShortage("busy"), RETRY),
    (
        PoolShortage("busy", retry_after=4.2),
        {"code": "rate_limit_exceeded", "message": "no account is free just now, please try again in 5s"},
    ),
    (RequestError("unknown item", param="input.0"), {"code": "invalid_prompt", "message": "unknown item"}),
    (RequestError("no such id", code="gone"), {"code": "gone", "message": "no such id"}),
    (ProxyError("the proxy is stopping"), {"code": "server_error", "message": "the proxy is stopping"}),
]


@CALLERS
@pytest.mark.parametrize(("error", "words"), CUTS)
def test_our_own_end_is_a_failed_response(error: ProxyError, words: JsonObject, is_codex: bool) -> None:
    out = encoder(is_codex=is_codex)
    out.encode(batch(created(2), delta("part", 7)))
    (told,) = shown(out.cut(error))
    assert (told["type"], told["sequence_number"]) == ("response.failed", 8)
    assert told["response"] | {"error": None} == created()["response"] | {
        "model": "gpt-5.5-high",
        "status": "failed",
        "error": None,
    }
    assert told["response"]["error"] == words
    assert (out.finished, out.ended) == (True, End.FAILED)
    assert out.failure is None
    assert out.cut(error) == b""


def test_an_end_before_created_brings_its_own() -> None:
    told = shown(encoder().cut(ProxyError("stopping")))
    assert [(event["type"], event["sequence_number"]) for event in told] == [
        ("response.created", 0),
        ("response.failed", 1),
    ]
    assert told[1]["response"]["id"] == told[0]["response"]["id"] == "resp_ours"
    assert told[0]["response"]["status"] == "in_progress"


def test_a_stream_that_has_ended_cannot_be_cut() -> None:
    out = encoder()
    out.encode(batch(created(), completed()))
    assert out.cut(ProxyError("late")) == b""
    assert out.ended is End.COMPLETED


def test_an_incomplete_answer_says_so() -> None:
    out = encoder()
    event = completed(incomplete_details={"reason": "content_filter"}) | {"type": "response.incomplete"}
    out.encode(batch(created(), event))
    assert (out.ended, out.ended_early, out.failure) == (End.INCOMPLETE, False, None)


@CALLERS
@pytest.mark.parametrize(
    "value", [None, 5, "x", [], [1], {}, {"output": 5}, {"output": [1], "usage": []}, True]
)
def test_no_odd_shape_breaks_the_encoder(value: Any, is_codex: bool) -> None:
    kinds = [
        "response.created", "response.in_progress", "response.output_item.added", "response.output_item.done",
        "response.metadata", "codex.rate_limits", "response.output_text.delta", "response.content_part.added",
        "response.failed", "response.completed", "error", "", "odd",
    ]  # fmt: skip
    keys = (
        "response",
        "item",
        "headers",
        "delta",
        "part",
        "error",
        "detail",
        "output_index",
        "sequence_number",
    )
    for kind in kinds:
        for lite in (True, False):
            for limit in (None, 3):
                out = encoder(is_codex=is_codex, was_lite_encoded=lite, max_output_tokens=limit)
                shape = Event.of(
                    {"type": kind, **dict.fromkeys(keys, value)} if kind else dict.fromkeys(keys, value)
                )
                first = out.encode([shape])
                rest = out.encode([shape, *batch(completed(usage={"input_tokens": "x"}))])
                assert types(first + rest)[-1] in ("response.completed", "response.failed")
                out.estimate()


# Reading failures


@pytest.mark.parametrize(
    "kind",
    ["response.created", "response.queued", "response.in_progress", "response.metadata", "keepalive",
     "codex.rate_limits", "codex.response.metadata", "responsesapi.websocket_timing", "unheard.of"],
)  # fmt: skip
def test_a_greeting_lets_another_account_try(kind: str) -> None:
    event = Event.of({"type": kind, "response": {"error": None}})
    assert is_handshake(event)
    assert failure_of(event, now=0.0) is None


@pytest.mark.parametrize(
    "kind", ["response.output_item.added", "response.output_text.delta", "response.completed", "response.new"]
)
def test_anything_of_an_answer_is_a_good_event(kind: str) -> None:
    event = Event.of({"type": kind, "delta": "usage_limit_reached", "error": {"code": "usage_limit_reached"}})
    assert not is_handshake(event)
    assert failure_of(event, now=0.0) is None


@pytest.mark.parametrize(("event", "_error", "verdict"), FAILURES)
def test_a_failure_is_neither_greeting_nor_answer(
    event: JsonObject, _error: JsonObject, verdict: Verdict
) -> None:
    read = Event.of(event)
    assert not is_handshake(read)
    failure = failure_of(read, now=0.0)
    assert failure is not None
    assert failure.verdict is verdict


def test_a_failure_with_status_and_headers_is_read_whole() -> None:
    event = {
        "type": "error",
        "status": 429,
        "error": {"type": "too_fast", "message": "slow"},
        "headers": {"X-Codex-Active-Limit": "codex_bengalfox", "Retry-After": "7"},
    }
    failure = failure_of(Event.of(event), now=0.0)
    assert failure is not None
    assert (failure.verdict, failure.status) == (Verdict.LIMITED, 429)
    assert (failure.limit_family, failure.retry_after) == ("codex_bengalfox", 7.0)


NOW = 1_800_000_000.0


@pytest.mark.parametrize(
    ("payload", "expected"),
    [
        ({"error": {"resets_at": NOW + 60}}, (NOW + 60, 60.0)),
        ({"error": {"resets_at": (NOW + 60) * 1000}}, (NOW + 60, 60.0)),
        ({"error": {"resets_at": NOW - 60}}, (NOW - 60, 0.0)),
        ({"error": {"resets_at": NOW + 60, "resets_in_seconds": 30}}, (NOW + 60, 30.0)),
        ({"detail": {"resets_in_seconds": "30"}}, (NOW + 30, 30.0)),
        ({"resets_in_seconds": 30}, (NOW + 30, 30.0)),
        ({"error": {"message": "Please try again in 1.5s."}}, (None, 1.5)),
        ({"error": {"message": "try again in 250ms"}}, (None, 0.25)),
        ({"error": {"message": "Try again in 11 seconds"}}, (None, 11.0)),
        ({"error": {"message": "try again in 2 minutes"}}, (None, 120.0)),
        ({"error": {"message": "try again in 2 moons"}}, (None, None)),
        ({"error": {"resets_at": 0, "resets_in_seconds": -1}}, (None, None)),
        ({"error": {"resets_at": True, "resets_in_seconds": "soon"}}, (None, None)),
        ({"error": {"resets_at": float("inf"), "resets_in_seconds": None}}, (None, None)),
        ({"error": {"resets_at": "1" * 400}}, (None, None)),
        ({"error": {"retry_after": 3}}, (None, 3.0)),
        ({"error": None}, (None, None)),
    ],
)
def test_the_end_of_a_limit_is_read_wherever_it_stands(
    payload: JsonObject, expected: tuple[float | None, float | None]
) -> None:
    assert read_reset(payload, now=NOW) == expected


# Errors as HTTP answers

ERRORS: list[tuple[ProxyError, int, JsonObject, dict[str, str]]] = [
    (
        RequestError("input must be a list", param="input"),
        400,
        {"message": "input must be a list", "type": "invalid_request_error", "param": "input", "code": None},
        {},
    ),
    (
        RequestError("only POST", status=405, allow="POST"),
        405,
        {"message": "only POST", "type": "invalid_request_error", "param": None, "code": None},
        {"allow": "POST"},
    ),
    (
        KeyRefused("no key; `codex-proxy key` prints it"),
        401,
        {
            "message": "no key; `codex-proxy key` prints it",
            "type": "invalid_request_error",
            "param": None,
            "code": "invalid_api_key",
        },
        {"www-authenticate": "Bearer"},
    ),
    (
        PoolExhausted("all used up", resets_at=NOW + 59.5, retry_after=59.5),
        429,
        {
            "message": "all used up",
            "type": "usage_limit_reached",
            "param": None,
            "code": "usage_limit_reached",
            "resets_at": int(NOW) + 60,
            "resets_in_seconds": 60,
        },
        {"retry-after": "60"},
    ),
    (
        PoolExhausted("all used up", resets_at=NOW + 7200, retry_after=7200),
        429,
        {
            "message": "all used up",
            "type": "usage_limit_reached",
            "param": None,
            "code": "usage_limit_reached",
            "resets_at": int(NOW) + 7200,
            "resets_in_seconds": 7200,
        },
        {"retry-after": "7200", "x-should-retry": "false"},
    ),
    (
        PoolShortage("busy", retry_after=0.2),
        429,
        {"message": "busy", "type": "rate_limit_exceeded", "param": None, "code": "rate_limit_exceeded"},
        {"retry-after": "1"},
    ),
    (
        PoolEmpty("no account"),
        429,
        {
            "message": "no account",
            "type": "no_account_available",
            "param": None,
            "code": "no_account_available",
        },
        {"x-should-retry": "false"},
    ),
    (
        upstream(Verdict.CALLER, "too long", "context_length_exceeded", status=413),
        413,
        {
            "message": "too long",
            "type": "invalid_request_error",
            "param": "input.0",
            "code": "context_length_exceeded",
        },
        {},
    ),
    (
        upstream(Verdict.CALLER, "no", "invalid_prompt", status=413, in_stream=True),
        400,
        {"message": "no", "type": "invalid_request_error", "param": "input.0", "code": "invalid_prompt"},
        {},
    ),
    (
        upstream(Verdict.CALLER, "no", "invalid_prompt", status=500),
        400,
        {"message": "no", "type": "invalid_request_error", "param": "input.0", "code": "invalid_prompt"},
        {},
    ),
    (
        ProxyError("stopping"),
        500,
        {"message": "stopping", "type": "server_error", "param": None, "code": None},
        {},
    ),
    (
        ConfigError("api-keys: 'secret' is too short"),
        500,
        {
            "message": "the proxy has a wrong setting; its log says which",
            "type": "server_error",
            "param": None,
            "code": None,
        },
        {},
    ),
]


@pytest.mark.parametrize(("error", "status", "body", "headers"), ERRORS)
def test_an_error_has_openai_s_shape(
    error: ProxyError, status: int, body: JsonObject, headers: dict[str, str]
) -> None:
    told = render_error(error, request_id="req_1")
    assert (told[0], json.loads(told[2])) == (status, {"error": body})
    assert told[1] == {"content-type": "application/json", "x-request-id": "req_1", **headers}


@pytest.mark.parametrize("verdict", [verdict for verdict in Verdict if verdict is not Verdict.CALLER])
def test_no_account_s_trouble_reaches_the_caller(verdict: Verdict) -> None:
    status, headers, body = render_error(
        upstream(verdict, "account a1 is broken", "deactivated_workspace", status=402), request_id="req_1"
    )
    error = json.loads(body)["error"]
    assert (status, error["code"], headers["retry-after"]) == (429, "rate_limit_exceeded", "1")
    assert b"a1" not in body
    assert b"deactivated" not in body


@pytest.mark.parametrize("status", [401, 402, 403, 404, 407, 429, 503])
def test_a_status_that_speaks_of_an_account_never_goes_out(status: int) -> None:
    assert render_error(upstream(Verdict.CALLER, status=status), request_id="r")[0] == 400


# --- words

SPOKEN: list[tuple[JsonObject, str]] = [
    ({"type": "response.output_text.delta", "delta": "hel\u00fc\ud83d"}, "helü?"),
    ({"type": "response.refusal.delta", "delta": "no"}, "no"),
    ({"type": "response.function_call_arguments.delta", "delta": "{}"}, "{}"),
    ({"type": "response.custom_tool_call_input.delta", "delta": "ls"}, "ls"),
    ({"type": "response.output_item.done", "item": {"type": "message", "content": []}}, ""),
    ({"type": "response.output_text.delta"}, ""),
    ({"type": "response.output_text.delta", "delta": 7}, ""),
]
SILENT: list[tuple[JsonObject, str]] = [
    ({"type": "response.created", "response": {}}, ""),
    ({"type": "response.reasoning_summary_text.delta", "delta": "I think"}, ""),
    ({"type": "response.reasoning_text.delta", "delta": "I think"}, ""),
    ({"type": "response.output_item.done", "item": {"type": "reasoning"}}, ""),
    ({"type": "response.output_item.added", "item": {"type": "reasoning"}}, ""),
    ({"type": "response.output_item.added", "item": {"type": "message"}}, "\n"),
    ({"type": "response.output_item.added", "item": {"type": "function_call", "name": "run"}}, "\n[run] "),
    ({"type": "response.output_item.added", "item": 7}, ""),
    ({"type": "codex.rate_limits"}, ""),
]


@pytest.mark.parametrize(("event", "words"), SPOKEN)
def test_words_are_recognised(event: JsonObject, words: str) -> None:
    batch = [Event.of(event)]
    assert has_text([Event.of({"type": "response.in_progress"}), *batch])
    assert words_of(batch).decode() == words


@pytest.mark.parametrize(("event", "words"), SILENT)
def test_what_is_no_word_of_the_answer(event: JsonObject, words: str) -> None:
    batch = [Event.of(event)]
    assert not has_text(batch)
    assert words_of(batch).decode() == words


def test_words_of_deltas_in_a_row() -> None:
    texts = ["one ", 'tw"o ', "drei\n", "日本"]
    frames = b"".join(
        Event.of({"type": "response.output_text.delta", "delta": text, "sequence_number": number}).frame()
        for number, text in enumerate(texts, 1)
    )
    batch = Parser(runs=True).feed(frames)
    assert has_text(batch)
    assert words_of(batch).decode() == "".join(texts)
