"""Backend events to Chat's chunks and completions: what is told where, how it ends, and that both agree."""

import json
import re
from pathlib import Path
from typing import Any

import orjson
import pytest
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from codex_proxy.errors import (
    BackendFault,
    PoolExhausted,
    PoolShortage,
    ProxyError,
    RequestError,
    UpstreamError,
    Verdict,
)
from codex_proxy.protocol.catalog import Catalog
from codex_proxy.protocol.chat import CHAT, decode
from codex_proxy.protocol.collect import Collector
from codex_proxy.protocol.dialect import Decoded, Encoder, Surroundings
from codex_proxy.protocol.sse import Event, Parser
from codex_proxy.protocol.wire import JsonObject
from codex_proxy.simulator.checks import check_shape
from codex_proxy.trace import End, UsageSource
from tests.protocol.replay import play, replay, variants

HERE = Path(__file__).parent
GOLDEN = HERE / "golden" / "chat"
FIXTURES = sorted([*(HERE / "fixtures").glob("*.sse"), *(HERE / "fixtures_chat").glob("*.sse")])
each_fixture = pytest.mark.parametrize("path", FIXTURES, ids=lambda path: path.stem)
BROKEN = {"error_event", "failed_late"}
AROUND = Surroundings(lambda: 1_800_000_000.0, "ours")
HELLO: JsonObject = {"role": "user", "content": "hello there"}
TOOLS: list[JsonObject] = [
    {"type": "function", "function": {"name": "look"}},
    {"type": "custom", "custom": {"name": "run"}},
]


def ask(**fields: Any) -> Decoded:
    body = {"model": "gpt-5.5-high", "messages": [HELLO], "stream": True, **fields}
    return decode(json.dumps(body).encode(), {}, catalog=Catalog())


def encoder(**fields: Any) -> Encoder:
    return ask(**fields).make_encoder(AROUND)


GOLDEN_STREAM, GOLDEN_PLAIN = (
    ask(tools=TOOLS, stream=stream, stream_options={"include_usage": True}) for stream in (True, False)
)


def golden_encoder(*, stream: bool = True) -> Encoder:
    return (GOLDEN_STREAM if stream else GOLDEN_PLAIN).make_encoder(AROUND)


def tell(out: Encoder, *events: JsonObject) -> bytes:
    """Feed the events, a read each."""
    return b"".join(
        out.encode([Event.of({**event, "sequence_number": number})]) for number, event in enumerate(events)
    )


def chunks(data: bytes) -> list[JsonObject]:
    """Return the chunks of a stream, which is lines of `data:` and nothing else."""
    frames = data.decode().split("\n\n")
    assert frames.pop() == ""
    assert all(re.fullmatch(r"data: .*", frame) for frame in frames)
    return [orjson.loads(frame.removeprefix("data: ")) for frame in frames if frame != "data: [DONE]"]


def deltas(data: bytes) -> list[JsonObject]:
    """Return what is new in each chunk, without the role."""
    told = [choice["delta"] for chunk in chunks(data) for choice in chunk["choices"]]
    assert told[0] == {"role": "assistant", "content": ""}
    return [one for one in told[1:] if one]


def fold(data: bytes) -> JsonObject:
    """Put a stream together as the SDKs do: texts are joined, entries of lists go by their index."""
    whole: JsonObject = {}
    message: JsonObject = {}
    for chunk in chunks(data):
        for choice in chunk["choices"]:
            _merge(message, choice["delta"])
            whole["finish_reason"] = choice["finish_reason"] or whole.get("finish_reason")
        whole |= {key: value for key, value in chunk.items() if key not in ("choices", "object")}
    return {**whole, "message": message}


def _merge(into: JsonObject, delta: JsonObject) -> None:
    for key, value in delta.items():
        if isinstance(value, list):
            entries = into.setdefault(key, [])
            for entry in value:
                index = entry.pop("index")
                assert index <= len(entries)
                if index == len(entries):
                    entries.append({})
                _merge(entries[index], entry)
        elif isinstance(value, dict):
            _merge(into.setdefault(key, {}), value)
        elif isinstance(value, str) and key not in ("type", "role"):
            into[key] = into.get(key, "") + value
        else:
            into[key] = value


def created(**fields: Any) -> JsonObject:
    return {"type": "response.created", "response": {"id": "resp_1", "created_at": 5, **fields}}


def said(text: str, *, index: int = 0) -> JsonObject:
    where = {"item_id": f"msg_{index}", "output_index": index, "content_index": 0}
    return {"type": "response.output_text.delta", **where, "delta": text}


def done(index: int, kind: str, **item: Any) -> JsonObject:
    item = {"id": f"i{index}", "type": kind, **item}
    return {"type": "response.output_item.done", "output_index": index, "item": item}


def called(index: int = 0, name: str = "look", arguments: str = "{}", **item: Any) -> JsonObject:
    return done(
        index, "function_call", **{"call_id": f"c{index}", "name": name, "arguments": arguments, **item}
    )


def custom(index: int = 0, name: str = "run", text: str = "ls") -> JsonObject:
    return done(index, "custom_tool_call", call_id=f"c{index}", name=name, input=text)


def end(kind: str = "completed", **response: Any) -> JsonObject:
    return {"type": f"response.{kind}", "response": {"id": "resp_1", "output": [], **response}}


def cut_short(reason: str) -> JsonObject:
    return end("incomplete", incomplete_details={"reason": reason})


def collected(*events: JsonObject, **fields: Any) -> JsonObject:
    out = encoder(stream=False, **fields)
    assert tell(out, *events) == b"", "a collected answer has no chunks"
    value: JsonObject = orjson.loads(out.whole())
    return value


# Whole streams


@each_fixture
def test_the_bytes_of_a_stream(path: Path) -> None:
    assert play(golden_encoder(), [path.read_bytes()]) == (GOLDEN / f"{path.stem}.sse").read_bytes()


@each_fixture
def test_every_disguise_of_a_stream_gives_the_same_bytes(path: Path) -> None:
    expected = (GOLDEN / f"{path.stem}.sse").read_bytes()
    for out in replay(golden_encoder, variants(path.read_bytes())):
        assert out == expected


@each_fixture
def test_a_stream_put_together_is_the_collected_answer(path: Path) -> None:
    out = golden_encoder(stream=False)
    assert path.stem in BROKEN or play(out, [path.read_bytes()]) == b""
    if path.stem in BROKEN:
        return
    whole = orjson.loads(out.whole())
    assert whole == json.loads((GOLDEN / f"{path.stem}.json").read_text(encoding="utf-8"))
    told = fold((GOLDEN / f"{path.stem}.sse").read_bytes())
    (choice,) = whole["choices"]
    message = {key: value for key, value in choice["message"].items() if value is not None}
    # A stream says "" before it knows whether there will be words.
    assert told.pop("message") == {"content": "", **message}
    assert told == {
        **{key: value for key, value in whole.items() if key not in ("choices", "object")},
        "finish_reason": choice["finish_reason"],
    }


@each_fixture
def test_every_stream_has_openais_grammar(path: Path) -> None:
    data = (GOLDEN / f"{path.stem}.sse").read_bytes()
    told = chunks(data)
    is_broken = path.stem in BROKEN
    assert data.count(b"[DONE]") == (not is_broken)
    assert data.endswith(b"data: [DONE]\n\n") == (not is_broken)
    assert [("error" in chunk) for chunk in told] == [False] * (len(told) - 1) + [is_broken]
    told = told[: len(told) - is_broken]
    for key, value in (("object", "chat.completion.chunk"), ("model", "gpt-5.5-high")):
        assert {chunk[key] for chunk in told} == {value}
    assert len({(chunk["id"], chunk["created"]) for chunk in told}) == 1
    assert all(re.fullmatch(r"chatcmpl-[a-z0-9]+", chunk["id"]) for chunk in told)
    choices = [chunk["choices"] for chunk in told]
    roles = ["role" in choice["delta"] for one in choices for choice in one]
    assert roles == [True] + [False] * (len(roles) - 1)
    assert all(one[0]["index"] == 0 and one[0]["logprobs"] is None for one in choices if one)
    reasons = [one[0]["finish_reason"] for one in choices if one]
    if not is_broken:
        assert [reason is not None for reason in reasons] == [False] * (len(reasons) - 1) + [True]
        assert choices[-1] == [], "the usage comes last"
        assert choices[-2][0]["delta"] == {}
    assert [chunk["usage"] is not None for chunk in told] == [one == [] for one in choices]
    for one in choices:
        for delta in (choice["delta"] for choice in one):
            assert None not in delta.values()
            for call in delta.get("tool_calls", ()):
                assert None not in {**call, **call.get("function", {}), **call.get("custom", {})}.values()


@each_fixture
def test_the_sdks_own_models_take_every_chunk_and_answer(path: Path) -> None:
    for chunk in chunks((GOLDEN / f"{path.stem}.sse").read_bytes()):
        if "error" in chunk or b'"custom"' in orjson.dumps(chunk):
            # Its chunks know no custom calls, although its answers do.
            continue
        ChatCompletionChunk.model_validate(chunk)
    if path.stem not in BROKEN:
        ChatCompletion.model_validate_json((GOLDEN / f"{path.stem}.json").read_bytes())


def test_a_delta_of_two_megabytes_is_one_chunk_however_it_comes() -> None:
    text = "é" * 1024 * 1024
    frame = Event.of(said(text)).frame()
    (only,) = deltas(play(encoder(), [frame[at : at + 4096] for at in range(0, len(frame), 4096)]))
    assert only == {"content": text}


# Words


def test_the_first_chunk_says_who_speaks_before_anything_is_said() -> None:
    (first,) = chunks(tell(encoder(), created(service_tier="default")))
    assert first == {
        "id": "chatcmpl-1",
        "object": "chat.completion.chunk",
        "created": 5,
        "model": "gpt-5.5-high",
        "choices": [
            {
                "index": 0,
                "delta": {"role": "assistant", "content": ""},
                "logprobs": None,
                "finish_reason": None,
            }
        ],
        "service_tier": "default",
    }


def test_an_answer_without_a_beginning_has_an_id_and_a_time_of_ours() -> None:
    first, *_ = chunks(tell(encoder(), said("x")))
    assert (first["id"], first["created"], first["model"]) == ("chatcmpl-ours", 1_800_000_000, "gpt-5.5-high")


def test_empty_deltas_say_nothing() -> None:
    assert deltas(tell(encoder(), created(), said(""), said("a"), said(""))) == [{"content": "a"}]


def test_halves_of_a_character_in_two_deltas_make_one() -> None:
    parser = Parser()
    half = [
        b'data: {"type":"response.output_text.delta","item_id":"m","delta":"%b"}\n\n' % escape
        for escape in (b"\\ud83e", b"\\udd8a")
    ]
    data = encoder().encode([event for one in half for event in parser.feed(one)])
    told = [json.loads(line.removeprefix("data: ")) for line in data.decode().split("\n\n") if line]
    text = "".join(one["choices"][0]["delta"]["content"] for one in told)
    assert text.encode("utf-16", "surrogatepass").decode("utf-16") == "🦊"


def test_two_messages_are_one_content_and_empty_ones_add_nothing() -> None:
    parts = [{"type": "output_text", "text": text} for text in ("one ", "two ")]
    messages = [
        done(0, "message", content=parts),
        done(1, "message", content=[{"type": "output_text", "text": "three"}]),
        done(2, "message", content=[{"type": "output_text", "text": ""}]),
    ]
    (choice,) = collected(created(), *messages, end())["choices"]
    assert choice["message"] == {"role": "assistant", "content": "one two three", "refusal": None}


def test_an_item_told_only_when_done_or_only_at_the_end_is_told() -> None:
    message = done(0, "message", content=[{"type": "output_text", "text": "late"}])
    for events in ([created(), message, end()], [end(output=[message["item"]])]):
        assert deltas(tell(encoder(), *events)) == [{"content": "late"}]


def test_a_refusal_is_told_as_one() -> None:
    refusal = done(0, "message", content=[{"type": "refusal", "refusal": "no"}])
    assert deltas(tell(encoder(), created(), refusal, end())) == [{"refusal": "no"}]
    (choice,) = collected(created(), refusal, end())["choices"]
    assert choice["message"] == {"role": "assistant", "content": None, "refusal": "no"}
    assert choice["finish_reason"] == "stop"


def test_a_citation_counts_from_the_start_of_the_whole_text() -> None:
    note = {"type": "url_citation", "start_index": 0, "end_index": 3, "title": "t", "url": "u"}
    text = {"type": "output_text", "text": "abc", "annotations": [note]}
    (choice,) = collected(
        created(), done(0, "message", content=[text]), done(1, "message", content=[text]), end()
    )["choices"]
    cited = {"title": "t", "url": "u"}
    assert choice["message"]["annotations"] == [
        {"type": "url_citation", "url_citation": {"start_index": 0, "end_index": 3, **cited}},
        {"type": "url_citation", "url_citation": {"start_index": 3, "end_index": 6, **cited}},
    ]


def test_a_citation_of_a_later_part_counts_from_the_start_of_the_whole_text_too() -> None:
    note = {"type": "url_citation", "start_index": 0, "end_index": 3, "title": "t", "url": "u"}
    parts = [
        {"type": "output_text", "text": "ab"},
        {"type": "output_text", "text": "cde", "annotations": [note]},
    ]
    messages = [done(place, "message", content=parts) for place in range(2)]
    (choice,) = collected(created(), *messages, end())["choices"]
    told = [one["url_citation"] for one in choice["message"]["annotations"]]
    assert [(one["start_index"], one["end_index"]) for one in told] == [(2, 5), (7, 10)]


def test_notes_of_other_kinds_keep_their_kind() -> None:
    note = {"type": "file_citation", "file_id": "f", "index": 3}
    text = {"type": "output_text", "text": "abc", "annotations": [note]}
    (choice,) = collected(created(), done(0, "message", content=[text]), end())["choices"]
    assert choice["message"]["annotations"] == [
        {"type": "file_citation", "file_citation": {"file_id": "f", "index": 3}}
    ]


def test_a_break_stands_between_thoughts_and_not_after_the_last() -> None:
    parts = [{"type": "summary_text", "text": text} for text in ("a", "b")]
    thoughts = [done(0, "reasoning", summary=parts), done(1, "reasoning", summary=parts[:1])]
    told = deltas(tell(encoder(), created(), *thoughts, end()))
    assert "".join(one["reasoning_content"] for one in told) == "a\n\nb\n\na"


# Calls


def test_a_call_without_deltas_is_told_whole() -> None:
    assert deltas(tell(encoder(), created(), called(arguments='{"a":1}'), end())) == [
        {
            "tool_calls": [
                {"index": 0, "id": "c0", "type": "function", "function": {"name": "look", "arguments": ""}}
            ]
        },
        {"tool_calls": [{"index": 0, "function": {"arguments": '{"a":1}'}}]},
    ]


def test_calls_are_numbered_by_themselves_and_not_by_their_place() -> None:
    told = deltas(tell(encoder(), created(), said("x"), called(4), called(7), end()))
    assert [one["tool_calls"][0]["index"] for one in told if "tool_calls" in one] == [0, 0, 1, 1]


def test_the_callers_names_come_back_in_every_form() -> None:
    name = "files.read/" + "x" * 80
    tools = [
        {"type": "function", "function": {"name": name}},
        {"type": "custom", "custom": {"name": f"{name}!"}},
    ]
    out = ask(tools=tools)
    sent = [tool["name"] for tool in orjson.loads(out.request.body)["tools"]]
    told = tell(out.make_encoder(AROUND), created(), called(0, sent[0]), custom(1, sent[1]), end())
    names = [
        call.get("function", call.get("custom")).get("name")
        for one in deltas(told)
        for call in one["tool_calls"]
    ]
    assert names == [name, None, f"{name}!", None]
    (choice,) = collected(created(), called(0, sent[0]), custom(1, sent[1]), end(), tools=tools)["choices"]
    assert [call[call["type"]]["name"] for call in choice["message"]["tool_calls"]] == [name, f"{name}!"]


def test_a_custom_call_has_the_shape_in_which_its_tool_was_declared() -> None:
    tools = [{"type": "custom", "custom": {"name": "run"}}, {"type": "custom", "name": "flat"}]
    events = [created(), custom(0, "run", "ls"), custom(1, "flat", "pwd"), custom(2, "unknown", "id"), end()]
    (choice,) = collected(*events, tools=tools)["choices"]
    assert choice["message"]["tool_calls"] == [
        {"id": "c0", "type": "custom", "custom": {"name": "run", "input": "ls"}},
        {"id": "c1", "type": "function", "function": {"name": "flat", "arguments": "pwd"}},
        {"id": "c2", "type": "function", "function": {"name": "unknown", "arguments": "id"}},
    ]
    told = deltas(tell(encoder(tools=tools), *events))
    assert told[:2] == [
        {"tool_calls": [{"index": 0, "id": "c0", "type": "custom", "custom": {"name": "run", "input": ""}}]},
        {"tool_calls": [{"index": 0, "custom": {"input": "ls"}}]},
    ]


def test_a_call_without_an_id_gets_one_that_is_its_own() -> None:
    bare = [done(index, "function_call", id=None, name="look", arguments="{}") for index in (0, 1)]
    (choice,) = collected(created(), *bare, end())["choices"]
    assert [call["id"] for call in choice["message"]["tool_calls"]] == ["call_ours_0", "call_ours_1"]


def test_a_caller_who_knows_functions_only_gets_a_function_call() -> None:
    functions = [{"name": "look"}]
    events = [created(), called(arguments='{"a":1}'), end()]
    told = tell(encoder(functions=functions), *events)
    assert deltas(told) == [
        {"function_call": {"name": "look", "arguments": ""}},
        {"function_call": {"arguments": '{"a":1}'}},
    ]
    assert chunks(told)[-1]["choices"][0]["finish_reason"] == "function_call"
    (choice,) = collected(*events, functions=functions)["choices"]
    assert choice["message"] == {
        "role": "assistant",
        "content": None,
        "refusal": None,
        "function_call": {"name": "look", "arguments": '{"a":1}'},
    }
    assert choice["finish_reason"] == "function_call"


def test_a_second_call_that_the_older_form_has_no_room_for_is_not_lost() -> None:
    events = [created(), called(0), called(1, arguments='{"b":2}'), end()]
    (choice,) = collected(*events, functions=[{"name": "look"}])["choices"]
    assert choice["message"]["function_call"] == {"name": "look", "arguments": "{}"}
    second = {"id": "c1", "type": "function", "function": {"name": "look", "arguments": '{"b":2}'}}
    assert choice["message"]["tool_calls"] == [second]
    assert fold(tell(encoder(functions=[{"name": "look"}]), *events))["message"] == {
        **{key: value for key, value in choice["message"].items() if value is not None},
        "content": "",
    }


# Pictures


@pytest.mark.parametrize(
    ("media", "mime"),
    [("png", "png"), ("jpeg", "jpeg"), ("webp", "webp"), ("gif", "gif"), ("x", "png"), (None, "png")],
)
def test_a_picture_is_a_data_url_of_its_format(media: str | None, mime: str) -> None:
    painted = done(0, "image_generation_call", result="QUJD", output_format=media)
    picture = {"type": "image_url", "image_url": {"url": f"data:image/{mime};base64,QUJD"}}
    assert deltas(tell(encoder(), created(), painted, end())) == [{"images": [{**picture, "index": 0}]}]
    (choice,) = collected(created(), painted, end())["choices"]
    assert choice["message"]["images"] == [picture]


def test_a_stream_shows_unfinished_pictures_and_an_answer_the_last_of_each() -> None:
    def unfinished(data: str) -> JsonObject:
        kind = "response.image_generation_call.partial_image"
        return {"type": kind, "item_id": "i0", "output_index": 0, "partial_image_b64": data}

    painted = done(0, "image_generation_call", result="C")
    events = [created(), unfinished("A"), unfinished("B"), painted, end()]
    told = [one["images"][0] for one in deltas(tell(encoder(), *events))]
    assert [one["index"] for one in told] == [0, 1, 2]
    assert [one["image_url"]["url"][-1] for one in told] == ["A", "B", "C"]
    (choice,) = collected(*events)["choices"]
    assert [one["image_url"]["url"][-1] for one in choice["message"]["images"]] == ["C"]
    # The last unfinished one is often the finished one again.
    assert len(deltas(tell(encoder(), created(), unfinished("C"), painted, end()))) == 1


# Ends


@pytest.mark.parametrize(
    ("ending", "plain", "with_call"),
    [
        (end(), "stop", "tool_calls"),
        (cut_short("max_output_tokens"), "length", "length"),
        (cut_short("max_tokens"), "length", "length"),
        (cut_short("content_filter"), "content_filter", "content_filter"),
        (cut_short("of_tomorrow"), "stop", "stop"),
        (end("incomplete"), "stop", "stop"),
    ],
)
def test_the_reason_of_the_end(ending: JsonObject, plain: str, with_call: str) -> None:
    for event, reason in ((said("x"), plain), (called(), with_call)):
        assert chunks(tell(encoder(), created(), event, ending))[-1]["choices"][0]["finish_reason"] == reason
        assert collected(created(), event, ending)["choices"][0]["finish_reason"] == reason


def test_a_stop_sequence_ends_the_answer_before_it() -> None:
    out = encoder(stop=["<end>"], stream_options={"include_usage": True})
    data = tell(
        out, created(), said("say <e"), said("nd> more"), said("never"), end(usage={"input_tokens": 1})
    )
    assert deltas(data) == [{"content": "say "}]
    assert chunks(data)[-2]["choices"][0]["finish_reason"] == "stop"
    assert chunks(data)[-1]["usage"]["completion_tokens"] == 1
    assert data.count(b"[DONE]") == 1
    assert (out.ended, out.ended_early, out.usage.source) == (End.COMPLETED, True, UsageSource.ESTIMATE)


def test_what_was_held_back_comes_at_the_end() -> None:
    assert deltas(tell(encoder(stop="<end>"), created(), said("say <e"), end())) == [
        {"content": "say "},
        {"content": "<e"},
    ]


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_the_callers_limit_ends_the_answer_by_length(name: str) -> None:
    out = encoder(**{name: 1})
    data = tell(out, created(), said("abcdefg"), said("never"), end())
    assert deltas(data) == [{"content": "abcd"}]
    assert chunks(data)[-1]["choices"][0]["finish_reason"] == "length"
    assert (out.ended, out.ended_early) == (End.INCOMPLETE, True)


# Usage

SPENT = {
    "input_tokens": 30,
    "input_tokens_details": {"cached_tokens": 10, "cache_write_tokens": 4},
    "output_tokens": 9,
    "output_tokens_details": {"reasoning_tokens": 5},
    "total_tokens": 39,
}


def test_usage_is_told_in_a_last_chunk_without_choices_when_it_was_asked_for() -> None:
    silent = chunks(tell(encoder(), created(), said("x"), end(usage=SPENT)))
    assert all("usage" not in chunk and chunk["choices"] for chunk in silent)
    *others, last = chunks(
        tell(encoder(stream_options={"include_usage": True}), created(), said("x"), end(usage=SPENT))
    )
    assert all(chunk["usage"] is None and chunk["choices"] for chunk in others)
    assert last["choices"] == []
    assert last["usage"] == {
        "prompt_tokens": 30,
        "completion_tokens": 9,
        "total_tokens": 39,
        "prompt_tokens_details": {"cached_tokens": 10, "cache_write_tokens": 4},
        "completion_tokens_details": {"reasoning_tokens": 5},
    }
    assert collected(created(), end(usage=SPENT))["usage"] == last["usage"]


@pytest.mark.parametrize(
    ("details", "told"),
    [
        ({"cached_tokens": 1, "cache_write_tokens": 0}, {"cached_tokens": 1, "cache_write_tokens": 0}),
        ({"cached_tokens": 1}, {"cached_tokens": 1}),
        (None, {"cached_tokens": 0}),
    ],
)
def test_tokens_written_to_the_cache_are_told_when_the_backend_counts_them(
    details: JsonObject | None, told: JsonObject
) -> None:
    usage = {"input_tokens": 1, "output_tokens": 1, "input_tokens_details": details}
    assert collected(created(), end(usage=usage))["usage"]["prompt_tokens_details"] == told


def test_an_end_without_usage_gets_an_estimate() -> None:
    usage = collected(created(), said("12345678"), end())["usage"]
    assert usage["completion_tokens"] == 2
    assert usage["prompt_tokens"] > 0
    assert usage["total_tokens"] == usage["prompt_tokens"] + 2


def test_the_tier_is_the_one_that_served() -> None:
    data = tell(encoder(), created(service_tier="auto"), said("x"), end(service_tier="priority"))
    assert [chunk["service_tier"] for chunk in chunks(data)] == ["auto", "auto", "priority"]
    assert collected(created(), end(service_tier="priority"))["service_tier"] == "priority"
    assert "service_tier" not in collected(created(), end())


# Failures

FAILURES: list[ProxyError] = [
    UpstreamError(Verdict.CUT, BackendFault("cut")),
    UpstreamError(Verdict.SILENT, BackendFault("silent")),
    UpstreamError(Verdict.SERVER, BackendFault("account 7 broke", code="account_broke")),
    UpstreamError(Verdict.EXHAUSTED, BackendFault("account 7 is used up", code="usage_limit_reached")),
    UpstreamError(Verdict.UNAUTHORIZED, BackendFault("account 7 must log in"), status=401),
    UpstreamError(Verdict.CALLER, BackendFault("too long", code="context_length_exceeded"), in_stream=True),
    PoolExhausted("used up", resets_at=1_800_000_100.0, retry_after=100.0),
    PoolShortage("busy", retry_after=3.0),
    RequestError("wrong", param="messages.0"),
    ProxyError("broken"),
]


@pytest.mark.parametrize("error", FAILURES, ids=lambda error: f"{type(error).__name__}-{error.message}")
def test_a_failure_is_told_in_the_stream_and_never_looks_like_an_end(error: ProxyError) -> None:
    for events in ([], [created()], [created(), said("x")], [created(), called()]):
        out = encoder()
        data = tell(out, *events) + out.cut(error)
        *before, last = chunks(data)
        assert b"[DONE]" not in data
        assert all(choice["finish_reason"] is None for chunk in before for choice in chunk["choices"])
        assert {"message", "type", "param", "code"} <= set(last["error"])
        assert "account 7" not in last["error"]["message"]
        assert out.ended is End.FAILED
        assert out.cut(error) == tell(out, said("late"), end()) == b""


@pytest.mark.parametrize("error", FAILURES, ids=lambda error: f"{type(error).__name__}-{error.message}")
def test_a_failure_before_the_answer_is_a_status_in_openais_shape(error: ProxyError) -> None:
    status, headers, body = CHAT.render_error(error, request_id="req_1")
    assert 400 <= status <= 500
    assert status not in (401, 402, 403, 404)
    assert headers["x-request-id"] == "req_1"
    assert {"message", "type", "param", "code"} <= set(orjson.loads(body)["error"])


def test_the_backends_failure_in_the_middle_is_told_and_kept_for_the_account() -> None:
    error = {"code": "context_length_exceeded", "message": "too long"}
    for event in (
        {"type": "response.failed", "response": {"error": error}},
        {"type": "error", "error": error},
    ):
        out = encoder()
        data = tell(out, created(), said("x"), event, end())
        assert chunks(data)[-1]["error"]["code"] == "context_length_exceeded"
        assert b"[DONE]" not in data
        assert out.failure is not None


def test_a_collected_answer_that_breaks_is_an_error() -> None:
    for event in ([], [created(), said("x")], [created(), {"type": "error", "message": "broken"}]):
        collector = Collector(encoder(stream=False))
        for one in event:
            collector.feed([Event.of(one)])
        with pytest.raises(UpstreamError):
            collector.result()


def test_a_sign_of_life_is_a_comment_before_and_after_the_beginning() -> None:
    out = encoder()
    assert out.keepalive() == b": keep-alive\n\n"
    tell(out, created(), said("x"))
    assert out.keepalive() == b": keep-alive\n\n"
    assert CHAT.keeps_alive_early
    assert Parser().feed(out.keepalive()) == []


def test_events_that_nobody_knows_and_odd_ones_change_nothing() -> None:
    odd: list[JsonObject] = [
        {"type": "response.of_tomorrow", "delta": "?"},
        {"type": "codex.rate_limits", "rate_limits": {}},
        {"type": "keepalive"},
        {"type": "response.output_text.delta", "delta": 5},
        {"type": "response.output_item.done", "item": None},
        {"type": "response.output_item.done", "item": {"type": "hologram", "id": "h", "content": "x"}},
    ]
    assert deltas(tell(encoder(), created(), *odd, said("x"), *odd, end())) == [{"content": "x"}]


# There and back


def test_a_tool_loop_keeps_its_reasoning_its_names_and_its_calls() -> None:
    """A caller who sends the message back as it came loses nothing."""
    name = "files.read/all"
    tools = [{"type": "function", "function": {"name": name}}, {"type": "custom", "custom": {"name": "run"}}]
    summary = [{"type": "summary_text", "text": "hm"}]
    events = [
        created(),
        done(0, "reasoning", summary=summary, encrypted_content="gAAAAABsealed_1="),
        done(
            1,
            "message",
            content=[{"type": "output_text", "text": "I look."}, {"type": "refusal", "refusal": "no"}],
        ),
        called(2, "files_read_all", '{"a": 1}'),
        custom(3, "run", "ls -l"),
        done(4, "image_generation_call", result="QUJD"),
        end(),
    ]
    (choice,) = collected(*events, tools=tools)["choices"]
    streamed = fold(tell(encoder(tools=tools), *events))["message"]
    for message in (choice["message"], streamed):
        outputs = [
            {"role": "tool", "tool_call_id": call["id"], "content": f"out {call['id']}"}
            for call in message["tool_calls"]
        ]
        request = ask(messages=[HELLO, message, *outputs], tools=tools).request
        body = orjson.loads(request.body)
        assert body["input"][1:] == [
            {"type": "reasoning", "summary": [], "encrypted_content": "gAAAAABsealed_1="},
            {
                "type": "message",
                "role": "assistant",
                "content": [{"type": "output_text", "text": "I look."}, {"type": "refusal", "refusal": "no"}],
            },
            {
                "type": "message",
                "role": "user",
                "content": [
                    {"type": "input_text", "text": "[generated by the assistant]"},
                    {"type": "input_image", "image_url": "data:image/png;base64,QUJD"},
                ],
            },
            {"type": "function_call", "name": "files_read_all", "call_id": "c2", "arguments": '{"a": 1}'},
            {"type": "custom_tool_call", "name": "run", "call_id": "c3", "input": "ls -l"},
            {"type": "function_call_output", "output": "out c2", "call_id": "c2"},
            {"type": "custom_tool_call_output", "output": "out c3", "call_id": "c3"},
        ]
        assert request.encrypted == ("gAAAAABsealed_1=",)
        assert check_shape(body, request.headers, "strict") is None


def test_the_older_form_goes_there_and_back_too() -> None:
    functions = [{"name": "look"}]
    (choice,) = collected(created(), called(arguments='{"a":1}'), end(), functions=functions)["choices"]
    answer = {"role": "function", "name": "look", "content": "seen"}
    body = orjson.loads(ask(messages=[HELLO, choice["message"], answer], functions=functions).request.body)
    assert [item["type"] for item in body["input"]] == ["message", "function_call", "function_call_output"]
    assert body["input"][1]["arguments"] == '{"a":1}'
    assert body["input"][1]["call_id"] == body["input"][2]["call_id"]


def test_a_responses_body_is_answered_as_chat() -> None:
    raw = {"model": "gpt-5.5", "input": "hi", "stream": True, "tools": [{"type": "custom", "name": "run"}]}
    decoded = decode(json.dumps(raw).encode(), {}, catalog=Catalog())
    data = tell(decoded.make_encoder(AROUND), created(), said("x"), custom(1), end())
    assert deltas(data)[0] == {"content": "x"}
    assert deltas(data)[1]["tool_calls"][0]["type"] == "function"
    assert chunks(data)[-1]["choices"][0]["finish_reason"] == "tool_calls"
