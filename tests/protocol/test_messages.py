"""What comes back for a Messages request: the stream's grammar, the same answer in one piece, errors, round trips."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import orjson
import pytest
from anthropic.lib.streaming._messages import accumulate_event
from anthropic.types import Message, RawMessageStreamEvent
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter

from codex_proxy.errors import (
    BackendFault,
    ConfigError,
    KeyRefused,
    PoolEmpty,
    PoolError,
    PoolExhausted,
    PoolShortage,
    ProxyError,
    RequestError,
    TooManyGuesses,
    UpstreamError,
    Verdict,
)
from codex_proxy.protocol.catalog import Catalog
from codex_proxy.protocol.collect import Collector
from codex_proxy.protocol.dialect import Surroundings
from codex_proxy.protocol.messages import MESSAGES, PICTURE, RAW, MessagesEncoder, render_error, reword
from codex_proxy.protocol.messages_request import Thinking
from codex_proxy.protocol.names import ToolNames
from codex_proxy.protocol.request import BackendRequest
from codex_proxy.protocol.sse import Batch, Event, Parser
from codex_proxy.protocol.wire import JsonObject
from codex_proxy.simulator.checks import check_shape
from codex_proxy.trace import End, UsageSource
from tests.protocol.replay import play, replay, variants

HERE = Path(__file__).parent
GOLDEN = HERE / "golden" / "messages"
OWN = sorted((HERE / "fixtures_messages").glob("*.sse"))
FIXTURES = [*sorted((HERE / "fixtures").glob("*.sse")), *OWN]
AROUND = Surroundings(now=lambda: 1_700_000_000.0, unique="0123")
EACH = pytest.mark.parametrize("path", FIXTURES, ids=lambda path: path.stem)
SHOWN = Thinking.SHOWN


def encoder(
    *,
    names: Sequence[str] = (),
    thinking: Thinking = SHOWN,
    stop: Sequence[str] = (),
    **fields: Any,
) -> MessagesEncoder:
    request = BackendRequest(**{
        "endpoint": "responses",
        "asked_model": "claude-sonnet",
        "model": "gpt-5.5",
        "body": b"",
        "stream": True,
        "input_bytes": 400,
        "context_window": 272_000,
        **fields,
    })
    return MessagesEncoder(request, AROUND, names=ToolNames(names), thinking=thinking, stop=stop)


def frames(data: bytes) -> list[JsonObject]:
    """Return the frames of a stream; each must have the two lines that the SDKs read."""
    parts = data.split(b"\n\n")
    assert parts.pop() == b""
    found: list[JsonObject] = []
    for part in parts:
        first, second = part.split(b"\n")
        value = json.loads(second.removeprefix(b"data: "))
        assert first == b"event: " + value["type"].encode()
        found.append(value)
    return found


def follow(data: bytes) -> tuple[JsonObject | None, JsonObject | None]:
    """Hold a stream to the grammar; return the message that it makes, or its error."""
    message: JsonObject | None = None
    block: JsonObject | None = None
    pieces: list[str] = []
    ended = False
    shown = frames(data)
    for number, frame in enumerate(shown):
        assert not ended, "nothing follows the end"
        kind = frame["type"]
        if kind == "ping":
            continue
        if kind == "error":
            assert number == len(shown) - 1, "nothing follows an error"
            assert set(frame) == {"type", "error"}
            assert set(frame["error"]) == {"type", "message"}
            return None, frame["error"]
        if kind == "message_start":
            assert message is None, "a stream begins once"
            message = frame["message"]
            assert message["content"] == []
            assert message["stop_reason"] is None
            continue
        assert message is not None, "nothing comes before the beginning"
        content = message["content"]
        match kind:
            case "content_block_start":
                assert block is None, "one block at a time"
                assert "stop_reason" not in message or message["stop_reason"] is None
                assert frame["index"] == len(content), "indexes rise by one"
                block = frame["content_block"]
                assert block["type"] in {
                    "text", "thinking", "tool_use", "server_tool_use", "web_search_tool_result",
                }  # fmt: skip
                content.append(block)
                pieces = []
            case "content_block_delta":
                assert block is not None, "a delta belongs to an open block"
                assert frame["index"] == len(content) - 1
                delta = frame["delta"]
                match delta["type"], block["type"]:
                    case "text_delta", "text":
                        assert delta["text"]
                        block["text"] += delta["text"]
                    case "thinking_delta", "thinking":
                        assert not block["signature"], "what is signed is whole"
                        block["thinking"] += delta["thinking"]
                    case "signature_delta", "thinking":
                        assert not block["signature"], "signed once"
                        block["signature"] = delta["signature"]
                    case "input_json_delta", "tool_use" | "server_tool_use":
                        pieces.append(delta["partial_json"])
                    case "citations_delta", "text":
                        block.setdefault("citations", []).append(delta["citation"])
                    case other:
                        pytest.fail(f"{other} do not belong together")
            case "content_block_stop":
                assert block is not None, "what is closed is open"
                assert frame["index"] == len(content) - 1
                if text := "".join(pieces):
                    block["input"] = _input(text)
                block, pieces = None, []
            case "message_delta":
                assert block is None, "all blocks are closed before the end"
                assert message["stop_reason"] is None, "a stream ends once"
                message |= frame["delta"]
                message["usage"] |= frame["usage"]
                assert message["stop_reason"]
            case "message_stop":
                assert message["stop_reason"], "the reason comes first"
                ended = True
            case _:
                pytest.fail(f"unknown frame {kind}")
    return (message if ended else None), None


def _input(text: str) -> JsonObject:
    try:
        value = json.loads(text)
    except ValueError:
        return {RAW: text}
    assert isinstance(value, dict), "only what broke off is no object"
    return value


def joined(value: Any) -> Any:
    """Join halves of characters, which a stream may tell apart."""
    return json.loads(json.dumps(value))


def batch(*events: JsonObject) -> Batch:
    return [Event.of(event) for event in events]


CREATED: JsonObject = {"type": "response.created", "response": {"id": "resp_1"}}


def ended(status: str = "completed", **response: Any) -> JsonObject:
    return {"type": f"response.{status}", "response": {"id": "resp_1", **response}}


def cut_off(reason: str, **response: Any) -> JsonObject:
    return ended("incomplete", incomplete_details={"reason": reason}, **response)


def done(index: int, **item: Any) -> JsonObject:
    return {"type": "response.output_item.done", "output_index": index, "item": item}


def text_item(text: str) -> JsonObject:
    return {"type": "message", "content": [{"type": "output_text", "text": text}]}


def call_item(number: int = 1, arguments: str = "{}", **fields: Any) -> JsonObject:
    return {
        "type": "function_call",
        "id": f"fc_{number}",
        "call_id": f"call_{number}",
        "name": "look",
        "arguments": arguments,
        **fields,
    }


def told(*events: JsonObject, **fields: Any) -> JsonObject:
    """Return the message for *events*, told as a stream, which is the one told as a whole."""
    message, error = follow(encoder(**fields).encode(batch(CREATED, *events)))
    assert error is None
    assert message is not None
    collector = Collector(encoder(**{**fields, "stream": False}))
    collector.feed(batch(CREATED, *events))
    assert joined(message) == json.loads(collector.result())
    return message


# Whole streams.


@EACH
def test_however_a_stream_comes_the_callers_bytes_are_the_same(path: Path) -> None:
    expected = (GOLDEN / f"{path.stem}.sse").read_bytes()
    for out in replay(encoder, variants(path.read_bytes())):
        assert out == expected


@EACH
def test_a_whole_answer(path: Path) -> None:
    whole = encoder(stream=False)
    assert play(whole, [path.read_bytes()]) == b"", "nothing goes out before it is whole"
    golden = GOLDEN / f"{path.stem}.json"
    if whole.ended in (End.COMPLETED, End.INCOMPLETE):
        assert orjson.loads(whole.whole()) == orjson.loads(golden.read_bytes())
    else:
        assert whole.failure is not None
        assert not golden.exists()


@EACH
@pytest.mark.parametrize("thinking", Thinking)
@pytest.mark.parametrize("limits", [{}, {"max_output_tokens": 2}, {"stop": ("o", "an")}], ids=str)
def test_a_stream_and_a_whole_answer_agree(path: Path, thinking: Thinking, limits: JsonObject) -> None:
    stream, whole = encoder(thinking=thinking, **limits), encoder(thinking=thinking, stream=False, **limits)
    message, error = follow(play(stream, [path.read_bytes()]))
    play(whole, [path.read_bytes()])
    assert (stream.ended, stream.usage, stream.delivered) == (whole.ended, whole.usage, whole.delivered)
    if message is None:
        assert error is not None
        assert stream.ended is whole.ended is End.FAILED
    else:
        assert joined(message) == json.loads(whole.whole())


FRAME: TypeAdapter[Any] = TypeAdapter(RawMessageStreamEvent)


@EACH
def test_the_sdk_reads_every_frame_and_makes_the_same_message(path: Path) -> None:
    snapshot: Any = None
    buffers: dict[int, bytes] = {}
    shown = frames(play(encoder(), [path.read_bytes()]))
    for frame in shown:
        if frame["type"] != "error":
            event = FRAME.validate_python(frame)
            assert event.type == frame["type"]
            assert not _unknown(event)
            snapshot = accumulate_event(event=event, current_snapshot=snapshot, json_bufs=buffers)
    if shown[-1]["type"] == "error":
        return
    whole = encoder(stream=False)
    play(whole, [path.read_bytes()])
    message = Message.model_validate_json(whole.whole())
    assert not _unknown(message)
    ours, theirs = (json.loads(one.model_dump_json(exclude_none=True)) for one in (message, snapshot))
    for block, other in zip(ours["content"], theirs["content"], strict=True):
        if RAW in block.get("input", {}) and not other["input"].keys() & {RAW}:
            # It broke off: the SDK reads as much as there is.
            assert ours["stop_reason"] == "max_tokens"
            block["input"] = other["input"]
    assert ours == theirs


def _unknown(model: Any) -> Any:
    """Return what the SDK's model has no field for."""
    return model.model_extra or [
        found
        for value in dict(model).values()
        for one in (value if isinstance(value, list) else [value])
        if hasattr(one, "model_extra")
        for found in [_unknown(one)]
        if found
    ]


# Any events at all.

WORDS = st.sampled_from(["", "a", "ab", "END", '{"a"', ":1}", "é🦊", "\ud83d", "\n", "[1"])
PLACE = st.fixed_dictionaries(
    {},
    optional={
        "output_index": st.sampled_from([0, 1, 2, "x"]),
        "item_id": st.sampled_from(["i0", "i1", "i2"]),
        "call_id": st.sampled_from(["c0", "c1"]),
        "summary_index": st.sampled_from([0, 1]),
        "delta": WORDS,
        "text": WORDS,
        "refusal": WORDS,
        "arguments": WORDS,
        "input": WORDS,
        "partial_image_b64": WORDS,
        "annotation": st.sampled_from([{"type": "url_citation", "url": "u"}, {"type": "file_path"}]),
        "name": st.sampled_from(["look", "run"]),
    },
)
PART = st.one_of(
    st.builds(lambda text: {"type": "output_text", "text": text, "annotations": [{}]}, WORDS),
    st.builds(lambda text: {"type": "refusal", "refusal": text}, WORDS),
    st.builds(lambda text: {"type": "summary_text", "text": text}, WORDS),
)
ITEM = st.fixed_dictionaries(
    {
        "type": st.sampled_from([
            "message", "reasoning", "function_call", "custom_tool_call", "web_search_call",
            "image_generation_call", "of_tomorrow",
        ])
    },
    optional={
        "id": st.sampled_from(["i0", "i1", "i2"]),
        "call_id": st.sampled_from(["c0", "c1"]),
        "name": st.sampled_from(["look", "run"]),
        "arguments": WORDS,
        "input": WORDS,
        "result": WORDS,
        "status": st.sampled_from(["completed", "incomplete", "failed"]),
        "encrypted_content": st.sampled_from(["gAAAAone", "gAAAAtwo", ""]),
        "content": st.lists(PART, max_size=2),
        "summary": st.lists(PART, max_size=2),
        "action": st.sampled_from([{"query": "q"}, {"sources": [{"url": "u"}, {"url": "u"}, 5]}, {}]),
    },
)  # fmt: skip
PIECES = [
    "response.in_progress", "response.output_text.delta", "response.output_text.done", "response.refusal.delta",
    "response.refusal.done", "response.output_text.annotation.added", "response.reasoning_summary_text.delta",
    "response.reasoning_summary_text.done", "response.reasoning_text.delta",
    "response.function_call_arguments.delta", "response.function_call_arguments.done",
    "response.custom_tool_call_input.delta", "response.custom_tool_call_input.done",
    "response.image_generation_call.partial_image", "response.of_tomorrow", "keepalive",
]  # fmt: skip
EVENT = st.one_of(
    st.builds(lambda kind, place: {**place, "type": kind}, st.sampled_from(PIECES), PLACE),
    st.builds(
        lambda kind, place, item: {**place, "type": kind, "item": item},
        st.sampled_from(["response.output_item.added", "response.output_item.done"]),
        PLACE,
        ITEM,
    ),
    st.builds(lambda place, part: {**place, "type": "response.content_part.done", "part": part}, PLACE, PART),
)
ENDING = st.one_of(
    st.builds(lambda items: ended(output=items), st.lists(ITEM, max_size=3)),
    st.builds(
        lambda reason, items: cut_off(reason, output=items),
        st.sampled_from(["max_output_tokens", "content_filter", "of_tomorrow"]),
        st.lists(ITEM, max_size=3),
    ),
    st.sampled_from([
        ended("failed", error={"code": "server_error"}),
        {"type": "error", "message": "boom"},
        None,
    ]),
)


@settings(max_examples=400, deadline=None)
@given(
    st.lists(EVENT, max_size=20),
    ENDING,
    st.sampled_from(list(Thinking)),
    st.sampled_from([None, 1, 3]),
    st.sampled_from([(), ("END",), ("ab", "b")]),
)
def test_whatever_the_backend_says_the_grammar_holds(
    events: list[JsonObject],
    ending: JsonObject | None,
    thinking: Thinking,
    limit: int | None,
    stop: tuple[str, ...],
) -> None:
    stream, whole = (
        encoder(thinking=thinking, stop=stop, max_output_tokens=limit, stream=stream)
        for stream in (True, False)
    )
    last = [ending] if ending is not None else []
    out = b"".join(stream.encode(batch(event)) for event in [*events, *last])
    out += stream.cut(UpstreamError(Verdict.CUT, BackendFault("cut")))
    whole.encode(batch(*events, *last))
    message, error = follow(out)
    assert (message is None) != (error is None)
    assert stream.finished
    if message is not None:
        assert joined(message) == json.loads(whole.whole())
    if thinking is Thinking.OFF:
        assert b"thinking_delta" not in out
        assert b'"thinking"' not in out
    assert stream.encode(batch(*events, ended())) == b""
    assert stream.cut(UpstreamError(Verdict.CUT, BackendFault("cut"))) == b""


# Single things.


def test_the_message_begins_with_its_name_its_model_and_an_estimate() -> None:
    out = frames(encoder(input_bytes=401).encode(batch(CREATED)))
    assert [frame["type"] for frame in out] == ["message_start"]
    assert out[0]["message"] == {
        "id": "msg_1",
        "type": "message",
        "role": "assistant",
        "model": "claude-sonnet",
        "content": [],
        "stop_reason": None,
        "stop_sequence": None,
        "usage": {
            "input_tokens": 101,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": 0,
            "output_tokens": 1,
        },
    }


def test_a_ping_says_nothing_and_may_come_before_the_beginning() -> None:
    out = encoder()
    ping = out.keepalive()
    assert ping == b'event: ping\ndata: {"type": "ping"}\n\n'
    message, _ = follow(ping + out.encode(batch(CREATED)) + ping + out.encode(batch(ended())) + b"")
    assert message is not None
    assert message["content"] == []


def thoughts(thinking: Thinking, *events: JsonObject) -> list[JsonObject]:
    content: list[JsonObject] = told(*events, ended(), thinking=thinking)["content"]
    return content


def test_thinking_is_shown_signed_or_left_out_as_the_caller_asked() -> None:
    item = {
        "type": "reasoning",
        "id": "rs_1",
        "summary": [{"type": "summary_text", "text": "One."}, {"type": "summary_text", "text": "Two."}],
        "encrypted_content": "gAAAAAx",
    }
    assert thoughts(Thinking.SHOWN, done(0, **item)) == [
        {"type": "thinking", "thinking": "One.\n\nTwo.", "signature": "gAAAAAx"}
    ]
    assert thoughts(Thinking.SIGNED, done(0, **item)) == [
        {"type": "thinking", "thinking": "", "signature": "gAAAAAx"}
    ]
    assert thoughts(Thinking.OFF, done(0, **item), done(1, **text_item("Hello."))) == [
        {"type": "text", "text": "Hello."}
    ]


def test_a_block_of_thinking_begins_with_all_its_fields() -> None:
    """A client that adds the signature's pieces up needs something to add them to."""
    item = {"type": "reasoning", "summary": [], "encrypted_content": "gAAAAAx"}
    shown = frames(encoder().encode(batch(CREATED, done(0, **item))))
    assert shown[1]["content_block"] == {"type": "thinking", "thinking": "", "signature": ""}


def test_the_seal_of_the_end_is_the_one_that_counts() -> None:
    added: JsonObject = {
        "type": "response.output_item.added",
        "output_index": 0,
        "item": {"type": "reasoning", "id": "rs_1", "encrypted_content": "gAAAAAearly"},
    }
    late = done(0, type="reasoning", id="rs_1", encrypted_content="gAAAAAlate")
    without = done(0, type="reasoning", id="rs_1")
    assert [block["signature"] for block in thoughts(SHOWN, added, late)] == ["gAAAAAlate"]
    assert [block["signature"] for block in thoughts(SHOWN, added, without)] == ["gAAAAAearly"]
    assert thoughts(SHOWN, added) == [], "a beginning alone seals nothing"


def test_thinking_without_a_seal_is_closed_before_what_comes_next() -> None:
    delta: JsonObject = {
        "type": "response.reasoning_summary_text.delta",
        "item_id": "rs_1",
        "output_index": 0,
        "delta": "Hm.",
    }
    assert thoughts(SHOWN, delta, done(1, **text_item("Hello."))) == [
        {"type": "thinking", "thinking": "Hm.", "signature": ""},
        {"type": "text", "text": "Hello."},
    ]


def test_names_and_ids_come_back_as_the_caller_takes_them() -> None:
    name = "files.read/" + "all" * 30
    short = ToolNames([name]).sent(name)
    content = told(
        done(0, **call_item(1, name=short, call_id="call one/" + "x" * 80)),
        done(1, **call_item(2, name="undeclared", call_id=None)),
        ended(),
        names=[name],
    )["content"]
    assert [block["name"] for block in content] == [name, "undeclared"]
    for block in content:
        assert len(block["id"]) <= 64
        assert set(block["id"]) <= set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ('{"a":1}', {"a": 1}),
        (' \n{"a":1}', {"a": 1}),
        ("", {}),
        ("  ", {}),
        ("{}", {}),
        ("[1]", {RAW: "[1]"}),
        ("null", {RAW: "null"}),
        ("no JSON", {RAW: "no JSON"}),
        ('say "\\"', {RAW: 'say "\\"'}),
        ('{"a":', {RAW: '{"a":'}),
        ('{"a":"\\ud83d"}', {"a": "\ud83d"}),
    ],
)
def test_the_input_of_a_call_is_an_object_and_loses_nothing(arguments: str, expected: JsonObject) -> None:
    assert told(done(0, **call_item(arguments=arguments)), ended())["content"][0]["input"] == expected


def test_arguments_that_come_in_pieces_make_an_object() -> None:
    for pieces in (["[", "1]"], [" ", "\n", '{"a"', ":1}"], ['"', "x", '"']):
        item = call_item(arguments="")
        deltas: list[JsonObject] = [
            {"type": "response.function_call_arguments.delta", "item_id": "fc_1", "delta": piece}
            for piece in pieces
        ]
        added: JsonObject = {"type": "response.output_item.added", "output_index": 0, "item": item}
        given = told(added, *deltas, done(0, **item), ended())["content"][0]["input"]
        text = "".join(pieces).lstrip()
        assert given == (json.loads(text) if text.startswith("{") else {RAW: text})


def test_a_picture_is_told_once_in_words() -> None:
    partial: JsonObject = {
        "type": "response.image_generation_call.partial_image",
        "item_id": "ig_1",
        "output_index": 0,
        "partial_image_b64": "aGk=",
    }
    item = {"type": "image_generation_call", "id": "ig_1", "result": "aGkh"}
    content = told(partial, partial, done(0, **item), ended())["content"]
    assert content == [{"type": "text", "text": PICTURE}]


def test_a_note_of_a_page_is_a_citation_and_one_of_a_file_is_dropped() -> None:
    item = text_item("It rains.")
    item["content"][0]["annotations"] = [
        {"type": "url_citation", "url": "https://example.com/a", "title": "A", "start_index": 0},
        {"type": "file_citation", "file_id": "file_1"},
        {"type": "url_citation", "url": "https://example.com/b"},
    ]
    (block,) = told(done(0, **item), ended())["content"]
    assert [(one["url"], one["title"]) for one in block["citations"]] == [
        ("https://example.com/a", "A"),
        ("https://example.com/b", None),
    ]


def test_a_search_is_told_once_with_what_it_found() -> None:
    action = {
        "type": "search",
        "query": "q",
        "sources": [{"url": "u"}, {"url": "v", "title": "V"}, {"url": "u"}],
    }
    item = {"type": "web_search_call", "id": "ws_1", "status": "completed", "action": action}
    opened = {"type": "web_search_call", "id": "ws_2", "action": {"type": "open_page", "url": "u"}}
    message = told(done(0, **item), done(0, **item), done(1, **opened), ended(output=[item, opened]))
    use, found = message["content"]
    assert use == {
        "type": "server_tool_use",
        "id": "srvtoolu_ws_1",
        "name": "web_search",
        "input": {"query": "q"},
    }
    assert found["tool_use_id"] == use["id"]
    assert [(page["url"], page["title"]) for page in found["content"]] == [("u", "u"), ("v", "V")]
    assert message["usage"]["server_tool_use"] == {"web_search_requests": 1, "web_fetch_requests": 0}
    assert message["stop_reason"] == "end_turn"


def test_searches_have_ids_of_their_own_that_the_api_takes() -> None:
    items = [
        {"type": "web_search_call", "id": identity, "action": {"query": "q"}}
        for identity in ("ws_" + "0" * 60 + "1", "ws_" + "0" * 60 + "2", "ws-3", "ws_4", None)
    ]
    content = told(*(done(index, **item) for index, item in enumerate(items)), ended())["content"]
    ids = [block["id"] for block in content if block["type"] == "server_tool_use"]
    assert len(set(ids)) == 5
    assert all(re.fullmatch("srvtoolu_[A-Za-z0-9_]{1,55}", one) for one in ids)
    assert ids == [block["tool_use_id"] for block in content if block["type"] == "web_search_tool_result"]


def test_without_a_search_none_is_counted() -> None:
    assert "server_tool_use" not in told(done(0, **text_item("x")), ended())["usage"]


# How it ends.

HALF = call_item(arguments='{"path":"a","te')
WHOLE = done(0, **call_item())
REFUSED = done(0, type="message", content=[{"type": "refusal", "refusal": "No."}])
WORD = done(0, **text_item("word"))


@pytest.mark.parametrize(
    ("events", "reason"),
    [
        ([WORD, ended()], "end_turn"),
        ([ended()], "end_turn"),
        ([WHOLE, ended()], "tool_use"),
        ([WHOLE, done(1, **text_item("and words")), ended()], "tool_use"),
        ([REFUSED, ended()], "refusal"),
        ([REFUSED, cut_off("content_filter")], "refusal"),
        ([WORD, cut_off("content_filter")], "refusal"),
        ([WORD, cut_off("max_output_tokens")], "max_tokens"),
        ([WORD, cut_off("max_tokens")], "max_tokens"),
        ([WORD, cut_off("pause_turn")], "pause_turn"),
        ([WORD, cut_off("model_context_window_exceeded")], "model_context_window_exceeded"),
        ([WORD, cut_off("of_tomorrow")], "end_turn"),
        ([WORD, ended("incomplete")], "end_turn"),
        ([WHOLE, cut_off("max_output_tokens")], "tool_use"),
        (
            [
                {"type": "response.output_item.added", "output_index": 0, "item": HALF},
                cut_off("max_output_tokens"),
            ],
            "max_tokens",
        ),
        ([done(0, **HALF, status="incomplete"), cut_off("max_output_tokens")], "max_tokens"),
        ([cut_off("max_output_tokens", output=[HALF])], "max_tokens"),
        (
            [WHOLE, done(1, **{**HALF, "id": "fc_2", "call_id": "call_2"}), cut_off("max_output_tokens")],
            "max_tokens",
        ),
        ([done(0, type="function_call", id="fc_1", arguments="{}"), ended()], "end_turn"),
    ],
)
def test_why_an_answer_ended(events: list[JsonObject], reason: str) -> None:
    message = told(*events)
    assert message["stop_reason"] == reason
    assert message["stop_sequence"] is None


def text_delta(text: str) -> JsonObject:
    return {"type": "response.output_text.delta", "item_id": "msg_1", "output_index": 0, "delta": text}


def test_a_stop_sequence_ends_the_answer_before_it() -> None:
    out = encoder(stop=("END", "never"))
    parts = [out.encode(batch(CREATED))]
    parts += [out.encode(batch(text_delta(piece))) for piece in ("one E", "ND", " two")]
    message, _ = follow(b"".join(parts))
    assert message is not None
    assert message["content"] == [{"type": "text", "text": "one "}]
    assert (message["stop_reason"], message["stop_sequence"]) == ("stop_sequence", "END")
    assert out.ended_early
    assert out.usage.source is UsageSource.ESTIMATE
    assert message["usage"]["output_tokens"] == 1


def test_what_only_began_like_a_stop_sequence_is_not_lost() -> None:
    message = told(text_delta("one E"), text_delta("N"), ended(), stop=("END",))
    assert message["content"] == [{"type": "text", "text": "one EN"}]
    assert message["stop_reason"] == "end_turn"


def test_the_output_limit_ends_the_answer() -> None:
    message = told(*[text_delta("word ")] * 5, max_output_tokens=3)
    assert message["content"] == [{"type": "text", "text": "word word wo"}]
    assert message["stop_reason"] == "max_tokens"
    call = told(done(0, **call_item(arguments='{"path":"' + "x" * 40 + '"}')), max_output_tokens=3)
    assert call["stop_reason"] == "max_tokens"


def test_usage_is_the_backends_with_the_cache_counted_apart() -> None:
    usage = {
        "input_tokens": 100,
        "input_tokens_details": {"cached_tokens": 60, "cache_write_tokens": 30},
        "output_tokens": 20,
        "output_tokens_details": {"reasoning_tokens": 7},
    }
    expected = {
        "input_tokens": 10,
        "cache_creation_input_tokens": 30,
        "cache_read_input_tokens": 60,
        "output_tokens": 20,
        "output_tokens_details": {"thinking_tokens": 7},
    }
    assert told(WORD, ended(usage=usage))["usage"] == expected
    odd = {**usage, "input_tokens": 50}
    assert told(WORD, ended(usage=odd))["usage"]["input_tokens"] == 0
    assert told(WORD, ended())["usage"] == {
        "input_tokens": 100,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": 0,
        "output_tokens": 1,
        "output_tokens_details": {"thinking_tokens": 0},
    }


# Failures in the stream.

SECRET = "the account owner@example.com is at its limit"


def upstream(
    verdict: Verdict, code: str | None = None, message: str = SECRET, **fields: Any
) -> UpstreamError:
    return UpstreamError(verdict, BackendFault(message, code=code), **fields)


ACCOUNT_TROUBLE = [
    Verdict.MODEL,
    Verdict.ENCRYPTED,
    Verdict.UNAUTHORIZED,
    Verdict.EXHAUSTED,
    Verdict.UNENTITLED,
    Verdict.LIMITED,
    Verdict.OVERLOADED,
    Verdict.FORBIDDEN,
    Verdict.PATH,
]
IN_STREAM: list[tuple[ProxyError, str, str]] = [
    *((upstream(verdict), "overloaded_error", "no room") for verdict in ACCOUNT_TROUBLE),
    (upstream(Verdict.SERVER, "server_error", "boom"), "api_error", "boom"),
    (upstream(Verdict.SERVER, "account_broken"), "api_error", "the backend failed"),
    (upstream(Verdict.CUT, message="the stream was cut"), "api_error", "was cut"),
    (upstream(Verdict.SILENT, message="no byte for 60 s"), "api_error", "no byte"),
    (
        upstream(Verdict.CALLER, "cyber_policy", "refused by policy"),
        "invalid_request_error",
        "refused by policy",
    ),
    (
        upstream(Verdict.CALLER, "context_length_exceeded", "too long"),
        "invalid_request_error",
        "prompt is too long: 272001 tokens > 272000 maximum",
    ),
    (PoolExhausted("all are at their limits", resets_at=9.0, retry_after=9.0), "rate_limit_error", "limits"),
    (PoolEmpty("there is no account"), "rate_limit_error", "no account"),
    (PoolShortage("none is free", retry_after=2.0), "overloaded_error", "none is free"),
    (RequestError("is wrong", param="messages.0"), "invalid_request_error", "messages.0: is wrong"),
    (ConfigError("/etc/secret: line 5"), "api_error", "wrong setting"),
    (ProxyError("we broke"), "api_error", "we broke"),
]


@pytest.mark.parametrize(("error", "kind", "words"), IN_STREAM, ids=lambda value: str(value)[:40])
def test_a_failure_ends_the_stream_in_the_apis_words(error: ProxyError, kind: str, words: str) -> None:
    for events in ((), (CREATED,), (CREATED, text_delta("half"))):
        out = encoder()
        data = out.encode(batch(*events)) + out.cut(error)
        message, said = follow(data)
        assert message is None
        assert said is not None
        assert said["type"] == kind
        assert words in said["message"]
        assert "owner" not in said["message"]
        assert "secret" not in said["message"]
        assert b"message_stop" not in data
        assert b"content_block_stop" not in data, "what is open stays open"
        assert out.ended is End.FAILED


def test_a_failure_of_the_backends_is_kept_for_the_account() -> None:
    out = encoder()
    failed = ended("failed", error={"code": "usage_limit_reached", "message": SECRET})
    _, said = follow(out.encode(batch(CREATED, text_delta("half"), failed)))
    assert said == {
        "type": "overloaded_error",
        "message": "the backend has no room for this just now, please try again in a moment",
    }
    assert out.failure is not None
    assert out.failure.verdict is Verdict.EXHAUSTED


def test_a_collected_answer_that_fails_says_nothing_itself() -> None:
    collector = Collector(encoder(stream=False))
    collector.feed(batch(CREATED, text_delta("half"), {"type": "error", "message": "boom"}))
    with pytest.raises(UpstreamError) as caught:
        collector.result()
    assert caught.value.fault.message == "boom"


# Failures as a status.


def rendered(error: ProxyError) -> tuple[int, dict[str, str], JsonObject]:
    status, headers, body = render_error(error, request_id="req_1")
    value: JsonObject = orjson.loads(body)
    assert headers["content-type"] == "application/json"
    assert headers["request-id"] == headers["x-request-id"] == "req_1"
    assert set(value) == {"type", "error", "request_id"}
    assert (value["type"], value["request_id"]) == ("error", "req_1")
    assert set(value["error"]) == {"type", "message"}
    assert value["error"]["message"]
    return status, headers, value["error"]


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, "invalid_request_error"),
        (401, "authentication_error"),
        (402, "billing_error"),
        (403, "permission_error"),
        (404, "not_found_error"),
        (405, "invalid_request_error"),
        (408, "invalid_request_error"),
        (413, "request_too_large"),
        (415, "invalid_request_error"),
        (429, "rate_limit_error"),
        (500, "api_error"),
        (502, "api_error"),
        (504, "timeout_error"),
        (529, "overloaded_error"),
    ],
)
def test_the_type_of_an_error_is_that_of_its_status(status: int, kind: str) -> None:
    assert rendered(RequestError("no", status=status))[0::2] == (status, {"type": kind, "message": "no"})


def test_an_error_begins_with_the_path_of_its_field_once() -> None:
    for message in ("messages.0 must be an object", "must be an object"):
        error = RequestError(message, param="messages.0")
        assert rendered(error)[2]["message"] == "messages.0: must be an object"


def test_a_wrong_method_names_the_right_ones() -> None:
    assert rendered(RequestError("no", status=405, allow="POST"))[1]["allow"] == "POST"


def test_a_refused_key() -> None:
    status, headers, error = rendered(KeyRefused("no client key"))
    assert (status, error["type"]) == (401, "authentication_error")
    assert headers["www-authenticate"] == "Bearer"


def test_too_many_wrong_keys() -> None:
    status, headers, error = rendered(TooManyGuesses("too many wrong keys", retry_after=1.2))
    assert (status, error["type"], headers["retry-after"]) == (429, "rate_limit_error", "2")


def test_an_exhausted_pool_is_a_limit_that_is_not_tried_again() -> None:
    """The SDK would sleep for as long as it is told, which may be days."""
    status, headers, error = rendered(PoolExhausted("used up", resets_at=9.0, retry_after=86_400.2))
    assert (status, error["type"]) == (429, "rate_limit_error")
    assert (headers["retry-after"], headers["x-should-retry"]) == ("86401", "false")
    assert rendered(PoolExhausted("used up", resets_at=9.0, retry_after=0.0))[1]["x-should-retry"] == "false"


def test_an_empty_pool_is_not_tried_again() -> None:
    status, headers, error = rendered(PoolEmpty("there is no account"))
    assert (status, error["type"]) == (429, "rate_limit_error")
    assert headers["x-should-retry"] == "false"
    assert "retry-after" not in headers


@pytest.mark.parametrize(
    ("wait", "said", "retries"), [(0.2, "1", None), (30.0, "30", None), (300.0, "300", "false")]
)
def test_a_shortage_passes(wait: float, said: str, retries: str | None) -> None:
    status, headers, error = rendered(PoolShortage("none is free", retry_after=wait))
    assert (status, error["type"]) == (529, "overloaded_error")
    assert (headers["retry-after"], headers.get("x-should-retry")) == (said, retries)


@pytest.mark.parametrize("verdict", [one for one in Verdict if one is not Verdict.CALLER])
@pytest.mark.parametrize("status", [401, 402, 403, 404, 429, 500, None])
def test_an_accounts_trouble_never_gets_out(verdict: Verdict, status: int | None) -> None:
    got, headers, error = rendered(upstream(verdict, "deactivated_workspace", status=status))
    assert (got, error["type"], headers["retry-after"]) == (529, "overloaded_error", "1")
    assert "owner" not in error["message"]
    assert "workspace" not in error["message"]


@pytest.mark.parametrize(
    ("fields", "status"),
    [
        ({"status": 400}, 400),
        ({"status": 413}, 413),
        ({"status": 422}, 422),
        ({"status": 404}, 400),
        ({"status": 429}, 400),
        ({"status": 500}, 400),
        ({"status": 413, "in_stream": True}, 400),
        ({}, 400),
    ],
)
def test_the_callers_own_fault_is_told_in_the_backends_words(fields: JsonObject, status: int) -> None:
    got, headers, error = rendered(upstream(Verdict.CALLER, "invalid_prompt", "no such thing", **fields))
    assert (got, error["message"]) == (status, "no such thing")
    assert "retry-after" not in headers


def test_settings_are_their_owners_business() -> None:
    status, _, error = rendered(ConfigError("/etc/secret: line 5"))
    assert (status, error["type"]) == (500, "api_error")
    assert "secret" not in error["message"]


def test_any_other_trouble_of_the_pool_or_of_ours_has_a_shape_too() -> None:
    assert rendered(PoolError("no account"))[0::2] == (
        429,
        {"type": "rate_limit_error", "message": "no account"},
    )
    assert rendered(ProxyError("we broke"))[0::2] == (500, {"type": "api_error", "message": "we broke"})


@pytest.mark.parametrize(
    ("size", "window", "words"),
    [
        (2_000_000, 272_000, "prompt is too long: 500000 tokens > 272000 maximum"),
        (400, 272_000, "prompt is too long: 272001 tokens > 272000 maximum"),
        (400, 0, "prompt is too long: 200001 tokens > 200000 maximum"),
    ],
)
def test_a_prompt_that_is_too_long_is_told_as_claude_code_knows_it(
    size: int, window: int, words: str
) -> None:
    request = encoder(input_bytes=size, context_window=window).request
    error = reword(upstream(Verdict.CALLER, "context_length_exceeded", "too long", status=400), request)
    assert rendered(error)[0::2] == (400, {"type": "invalid_request_error", "message": words})


def test_other_errors_are_not_reworded() -> None:
    request = encoder().request
    for error, _, _ in IN_STREAM:
        if not (isinstance(error, UpstreamError) and error.fault.code == "context_length_exceeded"):
            assert reword(error, request) is error


# Round trips.

CATALOG = Catalog()
FIRST: JsonObject = {
    "model": "gpt-5.5",
    "max_tokens": 4096,
    "thinking": {"type": "adaptive"},
    "messages": [{"role": "user", "content": "How is the weather, and how late is it?"}],
    "tools": [
        {"name": "weather.of/city", "input_schema": {"type": "object", "properties": {}}},
        {"name": "clock", "input_schema": {"type": "object", "properties": {}}},
    ],
}


def answer_of(body: JsonObject, path: Path, *, stream: bool) -> JsonObject:
    decoded = MESSAGES.decode(orjson.dumps({**body, "stream": stream}), {}, catalog=CATALOG)
    stream_bytes = path.read_bytes().replace(b'"name":"weather"', b'"name":"weather_of_city"')
    out = decoded.make_encoder(AROUND)
    data = play(out, [stream_bytes])
    message = follow(data)[0] if stream else orjson.loads(out.whole())
    assert message is not None
    return message


@pytest.mark.parametrize("display", ["summarized", "omitted"])
@pytest.mark.parametrize("stream", [True, False])
def test_what_was_answered_comes_back_to_the_backend_as_it_was(stream: bool, display: str) -> None:
    """Thinking, words and parallel calls: sent back as history they are the same items in the same order."""
    path = HERE / "fixtures_messages" / "thinking_text_and_interleaved_calls.sse"
    first = {**FIRST, "thinking": {"type": "adaptive", "display": display}}
    message = answer_of(first, path, stream=stream)
    assert message["stop_reason"] == "tool_use"
    calls = [block for block in message["content"] if block["type"] == "tool_use"]
    assert [call["name"] for call in calls] == ["weather.of/city", "clock"]
    results = [{"type": "tool_result", "tool_use_id": call["id"], "content": "seen"} for call in calls]
    history = [
        *FIRST["messages"],
        {"role": message["role"], "content": message["content"]},
        {"role": "user", "content": results},
    ]
    request = MESSAGES.decode(orjson.dumps({**first, "messages": history}), {}, catalog=CATALOG).request
    body = orjson.loads(request.body)
    assert check_shape(body, request.headers, "strict") is None
    assert request.encrypted == ("gAAAAA-late",)

    said = [
        event.json["item"] for event in Parser().feed(path.read_bytes()) if event.type.endswith("item.done")
    ]
    said.sort(key=lambda item: item["id"][-1])
    reasoning, words, *called, one, two = body["input"][1:]
    assert reasoning["encrypted_content"] == said[0]["encrypted_content"]
    summary = "\n\n".join(part["text"] for part in said[0]["summary"])
    assert [part["text"] for part in reasoning["summary"]] == ([summary] if display == "summarized" else [])
    assert words["content"] == [{"type": "output_text", "text": said[1]["content"][0]["text"]}]
    sent_names = [tool["name"] for tool in body["tools"]]
    assert [(c["call_id"], c["name"], json.loads(c["arguments"])) for c in called] == [
        (item["call_id"], name, json.loads(item["arguments"]))
        for item, name in zip(said[2:], sent_names, strict=True)
    ]
    assert [(out["call_id"], out["output"]) for out in (one, two)] == [
        (item["call_id"], "seen") for item in said[2:]
    ]


def test_a_search_comes_back_as_words() -> None:
    path = HERE / "fixtures_messages" / "searches_with_sources_and_notes.sse"
    first = {**FIRST, "tools": [{"type": "web_search_20250305", "name": "web_search"}]}
    message = answer_of(first, path, stream=False)
    history = [*FIRST["messages"], {"role": "assistant", "content": message["content"]}]
    history.append({"role": "user", "content": "Thanks."})
    request = MESSAGES.decode(orjson.dumps({**first, "messages": history}), {}, catalog=CATALOG).request
    words = json.dumps(orjson.loads(request.body)["input"])
    for text in (
        "fjord weather",
        "https://example.com/a",
        "B: https://example.com/b",
        "sea, ice",
        "It rains.",
    ):
        assert text in words


def test_the_dialect_is_whole() -> None:
    assert MESSAGES.name == "anthropic"
    assert MESSAGES.keeps_alive_early
    assert MESSAGES.render_error is render_error
    assert MESSAGES.reword is reword
