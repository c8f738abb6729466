"""The local output limit: where it ends an answer, and that the end looks like the backend's own."""

from pathlib import Path
from typing import Any

import pytest

from codex_proxy.protocol.request import BackendRequest
from codex_proxy.protocol.responses import Encoder
from codex_proxy.protocol.sse import Event, Parser
from codex_proxy.protocol.wire import JsonObject
from codex_proxy.trace import End, UsageSource

FIXTURES = sorted((Path(__file__).parent / "fixtures").glob("*.sse"))


def encoder(limit: int | None) -> Encoder:
    # One token per character makes a limit easy to see.
    return Encoder(
        BackendRequest("responses", "gpt-5.5", "gpt-5.5", b"", max_output_tokens=limit, input_bytes=40),
        count=len,
    )


def run(out: Encoder, events: list[JsonObject]) -> list[JsonObject]:
    """Feed the events one by one, numbered, and return what goes out."""
    told: list[JsonObject] = []
    for number, event in enumerate(events):
        told += [e.json for e in out.events([Event.of({**event, "sequence_number": number})])]
    return told


CREATED: JsonObject = {
    "type": "response.created",
    "response": {"id": "resp_1", "object": "response", "output": []},
}
COMPLETED: JsonObject = {"type": "response.completed", "response": {"id": "resp_1", "object": "response"}}


def part(text: str, **fields: Any) -> JsonObject:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": [], **fields}


def message(*deltas: str, index: int = 0) -> list[JsonObject]:
    where = {"item_id": f"msg_{index}", "output_index": index, "content_index": 0}
    item = {
        "id": f"msg_{index}",
        "type": "message",
        "role": "assistant",
        "status": "in_progress",
        "content": [],
    }
    text = "".join(deltas)
    return [
        {"type": "response.output_item.added", "output_index": index, "item": item},
        {"type": "response.content_part.added", **where, "part": part("")},
        *(
            {"type": "response.output_text.delta", **where, "delta": delta, "logprobs": [1]}
            for delta in deltas
        ),
        {"type": "response.output_text.done", **where, "text": text},
        {"type": "response.content_part.done", **where, "part": part(text)},
        {
            "type": "response.output_item.done",
            "output_index": index,
            "item": {**item, "status": "completed", "content": [part(text)]},
        },
    ]


def call(*deltas: str, index: int = 0, custom: bool = False) -> list[JsonObject]:
    kind, field = ("custom_tool_call", "input") if custom else ("function_call", "arguments")
    name = "response.custom_tool_call_input" if custom else "response.function_call_arguments"
    item = {
        "id": f"call_{index}",
        "type": kind,
        "name": "f",
        "call_id": "c",
        field: "",
        "status": "in_progress",
    }
    where = {"item_id": item["id"], "output_index": index}
    text = "".join(deltas)
    return [
        {"type": "response.output_item.added", "output_index": index, "item": item},
        *({"type": f"{name}.delta", **where, "delta": delta} for delta in deltas),
        {"type": f"{name}.done", **where, field: text},
        {
            "type": "response.output_item.done",
            "output_index": index,
            "item": {**item, "status": "completed", field: text},
        },
    ]


def reasoning(*deltas: str, index: int = 0) -> list[JsonObject]:
    where = {"item_id": "rs_1", "output_index": index, "summary_index": 0}
    item = {"id": "rs_1", "type": "reasoning", "summary": []}
    text = "".join(deltas)
    return [
        {"type": "response.output_item.added", "output_index": index, "item": item},
        {
            "type": "response.reasoning_summary_part.added",
            **where,
            "part": {"type": "summary_text", "text": ""},
        },
        *({"type": "response.reasoning_summary_text.delta", **where, "delta": delta} for delta in deltas),
        {"type": "response.reasoning_summary_text.done", **where, "text": text},
        {
            "type": "response.reasoning_summary_part.done",
            **where,
            "part": {"type": "summary_text", "text": text},
        },
        {
            "type": "response.output_item.done",
            "output_index": index,
            "item": {**item, "summary": [{"type": "summary_text", "text": text}]},
        },
    ]


def text_of(item: JsonObject) -> str:
    content = "".join(part.get("text", part.get("refusal", "")) for part in item.get("content", []))
    return str(content + item.get("arguments", "") + item.get("input", ""))


def check_grammar(events: list[JsonObject]) -> None:
    """Everything opened is closed, texts equal their deltas, numbers count up."""
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    dones = [
        (event["type"], event.get("output_index"), event.get("content_index"), event.get("summary_index"))
        for event in events
        if event["type"].endswith(".done")
    ]
    assert len(dones) == len(set(dones))
    opened: list[int] = []
    texts: dict[int, str] = {}
    for event in events:
        kind, index = event["type"], event.get("output_index", -1)
        if kind == "response.output_item.added":
            opened.append(index)
        elif kind.endswith(".delta") and "summary" not in kind:
            texts[index] = texts.get(index, "") + event["delta"]
        elif kind == "response.output_text.done":
            assert event["text"] == texts.get(index, "")
        elif kind == "response.output_item.done":
            opened.remove(index)
            assert text_of(event["item"]) == texts.get(index, "")
    assert opened == []
    items = [event["item"] for event in events if event["type"] == "response.output_item.done"]
    assert events[-1]["response"]["output"] == items


def test_text_at_the_limit_is_closed_the_way_the_backend_does_it() -> None:
    out = encoder(5)
    told = run(out, [CREATED, *message("abc", "defg", "hi"), COMPLETED])
    check_grammar(told)
    where = {"item_id": "msg_0", "output_index": 0, "content_index": 0}
    item = {
        "id": "msg_0",
        "type": "message",
        "role": "assistant",
        "status": "incomplete",
        "content": [part("abcde")],
    }
    assert told[4:] == [
        {
            "type": "response.output_text.delta",
            **where,
            "delta": "de",
            "logprobs": [],
            "sequence_number": 4,
        },
        {
            "type": "response.output_text.done",
            **where,
            "text": "abcde",
            "logprobs": [],
            "sequence_number": 5,
        },
        {"type": "response.content_part.done", **where, "part": part("abcde"), "sequence_number": 6},
        {"type": "response.output_item.done", "output_index": 0, "item": item, "sequence_number": 7},
        {
            "type": "response.incomplete",
            "response": {
                "id": "resp_1",
                "object": "response",
                "output": [item],
                "model": "gpt-5.5",
                "status": "incomplete",
                "incomplete_details": {"reason": "max_output_tokens"},
                "usage": {
                    "input_tokens": 10,
                    "output_tokens": 5,
                    "total_tokens": 15,
                    "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
                    "output_tokens_details": {"reasoning_tokens": 0},
                },
            },
            "sequence_number": 8,
        },
    ]
    assert (out.ended, out.ended_early, out.finished) == (End.INCOMPLETE, True, True)
    assert out.usage.source is UsageSource.ESTIMATE
    assert out.failure is None


def test_an_answer_that_ends_exactly_at_the_limit_is_whole() -> None:
    out = encoder(5)
    told = run(out, [CREATED, *message("abc", "de"), COMPLETED])
    assert told[-1]["type"] == "response.completed"
    assert (out.ended, out.ended_early) == (End.COMPLETED, False)


@pytest.mark.parametrize("limit", range(9))
@pytest.mark.parametrize("custom", [True, False])
def test_arguments_count_and_are_closed(limit: int, custom: bool) -> None:
    out = encoder(limit)
    told = run(out, [CREATED, *call('{"a"', ":1}!", custom=custom), COMPLETED])
    check_grammar(told)
    field = "input" if custom else "arguments"
    calls = told[-1]["response"]["output"]
    assert [item[field] for item in calls] == ([] if limit == 0 else ['{"a":1}!'[:limit]])
    assert told[-1]["type"] == ("response.completed" if limit == 8 else "response.incomplete")


@pytest.mark.parametrize("limit", range(13))
def test_a_limit_anywhere_leaves_nothing_open(limit: int) -> None:
    events = [CREATED, *reasoning("think", "ing"), *message("ab", "cdef", index=1), *call("{", "}", index=2)]
    events += [*message("last", index=3), COMPLETED]
    told = run(encoder(limit), events)
    check_grammar(told)
    shown = "".join(text_of(item) for item in told[-1]["response"]["output"])
    assert shown == "abcdef{}last"[:limit]


def test_items_open_side_by_side_are_all_closed_in_order() -> None:
    text, tool, thought = message("abcd"), call("{}", index=1), reasoning("hm", index=2)
    events = [CREATED, *text[:2], *tool[:1], *thought[:3], *tool[1:2], *text[2:]]
    told = run(encoder(3), events)
    check_grammar(told)
    items = told[-1]["response"]["output"]
    assert [item["id"] for item in items] == ["msg_0", "call_1", "rs_1"]
    assert {item["status"] for item in items} == {"incomplete"}
    assert items[2]["summary"] == [{"type": "summary_text", "text": "hm"}]
    assert [event["type"] for event in told if "reasoning" in event["type"]] == [
        "response.reasoning_summary_part.added",
        "response.reasoning_summary_text.delta",
        "response.reasoning_summary_text.done",
        "response.reasoning_summary_part.done",
    ]


def test_reasoning_does_not_count_but_is_estimated() -> None:
    out = encoder(2)
    told = run(out, [CREATED, *reasoning("12345678"), *message("abc", index=1)])
    assert text_of(told[-1]["response"]["output"][1]) == "ab"
    assert told[-1]["response"]["usage"]["output_tokens"] == 2 + 2


@pytest.mark.parametrize("ends", [2, 1, 0])
def test_what_is_closed_already_is_not_closed_again(ends: int) -> None:
    """The limit is reached in a second part while the first has all, one or none of its ends."""
    events = message("abc")
    second = [
        {**event, "content_index": 1, **({"part": part("")} if "part" in event else {})}
        for event in events[1:3]
    ]
    told = run(encoder(4), [CREATED, *events[: 3 + ends], *second, *events[3 + ends :], COMPLETED])
    assert [
        (event["type"].removeprefix("response."), event.get("content_index"))
        for event in told
        if event["type"].endswith(".done")
    ] == [
        ("output_text.done", 0),
        ("content_part.done", 0),
        ("output_text.done", 1),
        ("content_part.done", 1),
        ("output_item.done", None),
    ]
    assert [part["text"] for part in told[-1]["response"]["output"][0]["content"]] == ["abc", "a"]


def test_an_item_that_comes_whole_is_cut_whole() -> None:
    told = run(encoder(4), [CREATED, message("abcdef")[-1]])
    assert [event["type"] for event in told] == [
        "response.created",
        "response.output_item.done",
        "response.incomplete",
    ]


def test_annotations_stay_with_their_text() -> None:
    events = [CREATED, *message("abcd", "ef")]
    note = {"type": "response.output_text.annotation.added", "output_index": 0, "content_index": 0}
    events.insert(4, {**note, "annotation_index": 0, "annotation": {"type": "url_citation"}})
    told = run(encoder(4), events)
    assert told[-1]["response"]["output"][0]["content"] == [
        part("abcd", annotations=[{"type": "url_citation"}])
    ]


@pytest.mark.parametrize("kept", [{0, 1, 3, 4, 5}, {0, 1, 4, 5}, {0, 1, 5}, {0, 5}, {5}], ids=str)
def test_text_that_comes_without_deltas_is_cut_too(kept: set[int]) -> None:
    events = [event for place, event in enumerate(message("abcdef")) if place in kept]
    told = run(encoder(4), [CREATED, *events, COMPLETED])
    assert told[-1]["type"] == "response.incomplete"
    assert [text_of(item) for item in told[-1]["response"]["output"]] == ["abcd"]
    assert "abcde" not in str(told)
    assert [event["sequence_number"] for event in told] == list(range(len(told)))


def test_text_that_comes_without_deltas_and_fits_passes() -> None:
    events = [CREATED, *message("abcdef")[-1:], COMPLETED]
    assert [event["type"] for event in run(encoder(6), events)] == [event["type"] for event in events]


@pytest.mark.parametrize("path", FIXTURES, ids=lambda path: path.stem)
def test_a_limit_that_is_never_reached_changes_nothing(path: Path) -> None:
    data = path.read_bytes()
    assert encoder(100_000).encode(Parser().feed(data)) == encoder(None).encode(Parser().feed(data))


@pytest.mark.parametrize("limit", range(0, 40, 3))
@pytest.mark.parametrize("path", FIXTURES, ids=lambda path: path.stem)
def test_every_cut_of_a_limited_stream_gives_the_same_bytes(path: Path, limit: int) -> None:
    data = path.read_bytes()
    whole = encoder(limit).encode(Parser().feed(data))
    for cut in range(0, len(data), 97):
        parser, out = Parser(), encoder(limit)
        assert out.encode(parser.feed(data[:cut])) + out.encode(parser.feed(data[cut:])) == whole
