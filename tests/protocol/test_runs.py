"""Deltas in a row: taken at one stroke, and nobody downstream can tell."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from codex_proxy.errors import BackendFault, ProxyError, UpstreamError, Verdict
from codex_proxy.protocol import answer, responses
from codex_proxy.protocol.catalog import Catalog
from codex_proxy.protocol.chat import CHAT
from codex_proxy.protocol.collect import Collector
from codex_proxy.protocol.completions import COMPLETIONS, EDITS
from codex_proxy.protocol.dialect import Decoded, Dialect, Encoder, Surroundings
from codex_proxy.protocol.messages import MESSAGES
from codex_proxy.protocol.responses import RESPONSES
from codex_proxy.protocol.sse import Batch, Event, Parser, Run, singles
from codex_proxy.protocol.wire import JsonObject
from tests.counting import Calls
from tests.protocol.streams import MANNERS, NOISE, own, reads, streams

PROPERTY = settings(derandomize=True, deadline=None, max_examples=200, database=None)
LONG = settings(PROPERTY, max_examples=5000)
AROUND = Surroundings(lambda: 1_800_000_000.0, "ours")

HELLO = [{"role": "user", "content": "hello"}]
CODEX = {"originator": "codex_cli_rs", "user-agent": "codex_cli_rs/0.130.0"}
TOOLS = [
    {"type": "function", "function": {"name": "look"}},
    {"type": "custom", "custom": {"name": "run"}},
]
FUNCTIONS = [{"name": "look", "parameters": {"type": "object"}}]
ASKS: dict[str, tuple[Dialect, dict[str, Any], dict[str, str]]] = {
    "responses": (RESPONSES, {"input": "hi"}, {}),
    "responses, by Codex": (RESPONSES, {"input": "hi"}, CODEX),
    "responses, with a limit": (RESPONSES, {"input": "hi", "max_output_tokens": 6}, {}),
    "responses, under another name": (RESPONSES, {"input": "hi", "model": "gpt-5.5-high"}, {}),
    "chat": (CHAT, {"messages": HELLO, "tools": TOOLS}, {}),
    "chat, with its usage": (CHAT, {"messages": HELLO, "stream_options": {"include_usage": True}}, {}),
    "chat, with limits": (CHAT, {"messages": HELLO, "max_tokens": 6, "stop": ["STOP", "d\n"]}, {}),
    "chat, with a limit": (CHAT, {"messages": HELLO, "max_tokens": 6}, {}),
    "chat, with functions": (CHAT, {"messages": HELLO, "functions": FUNCTIONS}, {}),
    "messages": (MESSAGES, {"messages": HELLO, "max_tokens": 1000}, {}),
    "messages, thinking": (
        MESSAGES,
        {"messages": HELLO, "max_tokens": 2000, "thinking": {"type": "enabled", "budget_tokens": 1024}},
        {},
    ),
    "messages, with limits": (MESSAGES, {"messages": HELLO, "max_tokens": 7, "stop_sequences": ["STOP"]}, {}),
    "completions": (COMPLETIONS, {"prompt": "hi", "echo": True}, {}),
    "completions, with limits": (COMPLETIONS, {"prompt": "hi", "max_tokens": 5, "stop": "STOP"}, {}),
    "edits": (EDITS, {"instruction": "hi"}, {}),
}


def decoded(ask: str, *, stream: bool) -> Decoded:
    dialect, body, headers = ASKS[ask]
    whole = {"model": "gpt-5.5", **({"stream": stream} if dialect is not EDITS else {}), **body}
    return dialect.decode(json.dumps(whole).encode(), headers, catalog=Catalog())


EVERY_ASK = [
    (f"{ask}, {'streamed' if stream else 'collected'}", decoded(ask, stream=stream))
    for ask in ASKS
    for stream in (True, False)
    if not (stream and ask == "edits")
]
RESPONSES_ASKS = [
    asked for name, asked in EVERY_ASK if name.startswith("responses") and "collected" not in name
]
CUT = UpstreamError(Verdict.CUT, BackendFault("cut"))


def state(encoder: Encoder) -> tuple[Any, ...]:
    failure = encoder.failure
    return (
        encoder.ended,
        encoder.ended_early,
        encoder.finished,
        encoder.delivered,
        failure and (failure.verdict, failure.fault, failure.status),
    )


def told(asked: Decoded, chunks: list[bytes], *, runs: bool) -> tuple[Any, ...]:
    """Return all that an encoder makes of the reads: its bytes after each, and what it knows at the end."""
    encoder = asked.make_encoder(AROUND)
    parser = Parser(runs=runs)
    out: list[bytes] = []
    states: list[tuple[Any, ...]] = []
    for chunk in chunks:
        out.append(encoder.encode(parser.feed(chunk)))
        states.append(state(encoder))
    out.append(encoder.encode(parser.finish()))
    states.append(state(encoder))
    out.append(encoder.cut(CUT))
    return out, states, state(encoder), encoder.estimate()


def collected(asked: Decoded, chunks: list[bytes], *, runs: bool) -> tuple[Any, ...]:
    encoder = asked.make_encoder(AROUND)
    collector = Collector(encoder)
    parser = Parser(runs=runs)
    for chunk in chunks:
        collector.feed(parser.feed(chunk))
    collector.feed(parser.finish())
    try:
        result: Any = collector.result()
    except ProxyError as exc:
        result = (type(exc), exc.message)
    return result, state(encoder), encoder.estimate()


def agree(chunks: list[bytes], asks: list[tuple[str, Decoded]] = EVERY_ASK) -> None:
    """Check that runs change nothing: not what is said, nor when."""
    for name, asked in asks:
        tell = told if name.endswith("streamed") else collected
        assert tell(asked, chunks, runs=True) == tell(asked, chunks, runs=False), name


def same_events(chunks: list[bytes]) -> None:
    plain, quick = Parser(), Parser(runs=True)
    for chunk in [*chunks, None]:
        expected = plain.feed(chunk) if chunk is not None else plain.finish()
        found = quick.feed(chunk) if chunk is not None else quick.finish()
        assert facts(singles(found)) == facts(expected)
        assert b"".join(event.frame() for event in found) == b"".join(event.frame() for event in expected)
        for run in found:
            if isinstance(run, Run):
                assert run.pieces.texts == [event.json["delta"] for event in run.events()]
                assert run.pieces.text == "".join(run.pieces.texts)
                assert run.json == run.events()[0].json
                assert all(run.place.items() <= event.json.items() for event in run.events())
    assert not quick.pending


def facts(batch: Batch) -> list[tuple[str, bytes, Any]]:
    return [(event.type, event.data, event.json) for event in batch]


CASES = streams().flatmap(reads)
ODD_CASES = streams(odd=7).flatmap(reads)


@PROPERTY
@given(CASES)
def test_the_events_are_the_same(chunks: list[bytes]) -> None:
    same_events(chunks)


@PROPERTY
@given(ODD_CASES)
def test_what_is_written_oddly_is_read_all_the_same(chunks: list[bytes]) -> None:
    same_events(chunks)


@PROPERTY
@given(CASES, st.lists(st.sampled_from(EVERY_ASK), min_size=4, max_size=4))
def test_the_answers_are_the_same(chunks: list[bytes], asks: list[tuple[str, Decoded]]) -> None:
    agree(chunks, asks)


RESPONSE: JsonObject = {
    "id": "resp_1", "object": "response", "created_at": 1, "model": "gpt-5.5-2026", "output": [],
    "safety_identifier": "user-1", "usage": {"input_tokens": 1, "output_tokens": 2}, "user": "somebody",
}  # fmt: skip


def burst(deltas: int) -> list[bytes]:
    """Return the frames of one answer, all of which are the backend's own."""
    where = {"item_id": "msg_1", "output_index": 0, "content_index": 0}
    item = {"type": "message", "id": "msg_1", "role": "assistant", "content": []}
    text = " word" * deltas
    whole = {"type": "output_text", "text": text, "annotations": []}
    response = {"id": "resp_1", "created_at": 1, "output": []}
    events: list[JsonObject] = [
        {"type": "response.created", "response": response},
        {"type": "response.in_progress", "response": response},
        {"type": "response.output_item.added", "output_index": 0, "item": item},
        {"type": "response.content_part.added", **where, "part": {**whole, "text": ""}},
        *(
            {
                "type": "response.output_text.delta",
                **where,
                "delta": " word",
                "logprobs": [],
                "obfuscation": "a1B2c3",
            }
            for _ in range(deltas)
        ),
        {"type": "response.output_text.done", **where, "text": text},
        {"type": "response.content_part.done", **where, "part": whole},
        {"type": "response.output_item.done", "output_index": 0, "item": {**item, "content": [whole]}},
        {"type": "response.completed", "response": response},
    ]
    return [own({**event, "sequence_number": number}) for number, event in enumerate(events)]


BEGUN = [
    own({**json.loads(frame.split(b"data: ")[1]), "response": {**RESPONSE, "status": "in_progress"}})
    if b'"response":{' in frame
    else frame
    for frame in burst(2)
]
"""An answer with response objects that have something to change."""


def test_a_run_is_one_event_of_its_batch() -> None:
    batch = Parser(runs=True).feed(b"".join(burst(200)))
    assert len(batch) == 9
    (run,) = (event for event in batch if isinstance(event, Run))
    assert run.type == "response.output_text.delta"
    assert run.place == {
        "type": run.type, "content_index": 0, "item_id": "msg_1", "logprobs": [], "output_index": 0,
    }  # fmt: skip
    assert run.pieces.texts == [" word"] * 200
    assert len(run.events()) == 200
    assert run.json["sequence_number"] == 4


def test_no_runs_are_made_for_those_who_did_not_ask() -> None:
    assert not any(isinstance(event, Run) for event in Parser().feed(b"".join(burst(200))))


def test_deltas_of_another_place_are_another_run() -> None:
    one, two = burst(3)[4:7], [frame.replace(b"msg_1", b"msg_2") for frame in burst(3)[4:7]]
    batch = Parser(runs=True).feed(b"".join([*one, *two, *one]))
    assert [event.data for event in batch] == [b"".join(one), b"".join(two), b"".join(one)]
    first, second, third = batch
    assert isinstance(first, Run)
    assert isinstance(second, Run)
    assert isinstance(third, Run)
    assert first.place == third.place != second.place


def test_what_is_the_same_is_said_by_the_same_object() -> None:
    parser = Parser(runs=True)
    places = [
        event.place for frame in burst(9)[4:13] for event in parser.feed(frame) if isinstance(event, Run)
    ]
    assert len(places) == 9
    assert all(place is places[0] for place in places)


@pytest.mark.parametrize("manner", sorted(MANNERS))
def test_an_odd_frame_in_a_row_changes_nothing(manner: str) -> None:
    """Also what a row hides: the odd one is in its middle, at its beginning, at its end."""
    frames = burst(3)
    for place in (4, 5, 6):
        event = {**json.loads(frames[place].split(b"data: ")[1]), "obfuscation": "a1B2c3"}
        odd = [*frames[:place], MANNERS[manner](event), *frames[place + 1 :]]
        for chunks in ([b"".join(odd)], odd):
            same_events(chunks)
            agree(chunks)


def test_more_of_the_same_behind_a_frame_without_its_end_comes_after_it() -> None:
    """The row before it is told, but what follows is no row of its own yet."""
    one, two, three = burst(3)[4:7]
    same_events([one, b": a comment\n" + two[:-1], three])
    same_events([one, b": a comment\n" + two[:-1] + three, one])


def test_a_place_that_another_item_takes_meanwhile_is_looked_up_again() -> None:
    """An item without an id is known by its place alone; the words behind are another thought."""
    thought: JsonObject = {
        "type": "response.reasoning_summary_text.delta", "delta": "hm", "item_id": "", "output_index": 0,
        "summary_index": 0, "obfuscation": "x7", "sequence_number": 7,
    }  # fmt: skip
    item = {"type": "message", "id": "msg_2", "role": "assistant", "content": []}
    taken = own({"type": "response.output_item.added", "item": item, "output_index": 0, "sequence_number": 9})
    words = own(thought)
    agree([*burst(0)[:2], words, words, taken, words, words, *burst(0)[-1:]])
    told_apart = told(decoded("chat", stream=True), [*burst(0)[:2], words, taken, words], runs=True)[0]
    assert rb'"reasoning_content":"\n\nhm"' in b"".join(told_apart)


def test_a_row_that_passes_a_limit_is_told_as_far_as_it_goes() -> None:
    frames = burst(40)
    agree([b"".join(frames)])
    agree([b"".join(frames[:20]), b"".join(frames[20:])])


def test_an_end_of_ours_is_numbered_behind_a_row() -> None:
    frames = burst(40)
    agree([b"".join(frames[:20])])
    # Also when the last one has no number.
    agree([b"".join(frames[:20]) + NOISE[5]])


def test_every_cut_of_a_row_gives_the_same() -> None:
    data = b"".join(burst(3)[3:8])
    asked = decoded("chat", stream=True)
    whole = told(asked, [data], runs=False)
    for cut in range(len(data) + 1):
        same_events([data[:cut], data[cut:]])
        assert b"".join(told(asked, [data[:cut], data[cut:]], runs=True)[0]) == b"".join(whole[0])


def as_small_and_large(chunks: list[bytes]) -> list[Any]:
    """Return what the Responses dialect makes of a stream when response objects are read whole, and when not."""
    outcomes: list[Any] = []
    for large in (1 << 30, 0):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(responses, "_LARGE", large)
            outcomes.append([
                (told(asked, chunks, runs=True), collected(asked, chunks, runs=True))
                for asked in RESPONSES_ASKS
            ])
    return outcomes


@settings(PROPERTY, max_examples=100)
@given(streams(odd=0))
def test_a_large_response_object_is_changed_like_a_small_one(frames: list[bytes]) -> None:
    small, large = as_small_and_large(frames)
    assert small == large


ODD_RESPONSES = {
    "no UTF-8": (b'"object":"', b'"object":"\xff'),
    "half a character": (b'"object":"', rb'"object":"\ud83d'),
    "no number": (b'"created_at":1', b'"created_at":NaN'),
    "a field beside it": (b',"sequence_number":', b',"novelty":[1],"sequence_number":'),
    "a type twice": (b',"sequence_number":', b',"type":"other","sequence_number":'),
    "a response twice": (b',"sequence_number":', b',"response":{"id":"resp_2"},"sequence_number":'),
    "a number twice": (b',"sequence_number":', b',"sequence_number":3,"sequence_number":'),
    "no number of its own": (b',"sequence_number":', b',"other_number":'),
    "a name twice": (b'"object":', b'"object":"first","object":'),
    "no object": (b'"response":{', b'"response":null,"other":{'),
    "broken": (b'"object":', b'"object"'),
}


@pytest.mark.parametrize("odd", ODD_RESPONSES)
def test_odd_response_objects_are_changed_alike(odd: str) -> None:
    frames = [frame.replace(*ODD_RESPONSES[odd]) if b'"response":{' in frame else frame for frame in BEGUN]
    small, large = as_small_and_large(frames)
    assert small == large


@pytest.mark.parametrize("odd", ["", *ODD_RESPONSES])
@pytest.mark.parametrize("ask", ["chat, with its usage", "messages, thinking", "completions"])
def test_what_makes_an_answer_is_what_the_whole_response_object_says(
    ask: str, odd: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    frames = [frame.replace(*ODD_RESPONSES[odd]) if odd else frame for frame in BEGUN]
    asked = decoded(ask, stream=True)
    found = told(asked, frames, runs=True)
    assert found[0][0]
    monkeypatch.setattr(answer, "_Essence", Whole)
    assert told(asked, frames, runs=True) == found


class Whole(answer._Essence):
    """The same, found the long way."""

    @classmethod
    def of(cls, event: Event) -> "Whole | None":
        response = event.json.get("response")
        if not isinstance(response, dict):
            return cls() if event.json else None
        return cls(**{name: response[name] for name in cls.__struct_fields__ if name in response})


@pytest.mark.parametrize("odd", ["", *ODD_RESPONSES])
def test_what_in_progress_repeats_is_changed_as_if_it_came_alone(odd: str) -> None:
    created, progress, *_ = [frame.replace(*ODD_RESPONSES[odd]) if odd else frame for frame in BEGUN]
    asked = decoded("responses, by Codex", stream=True)
    for second in (
        progress,
        progress.replace(b'in_progress",', b'queued",'),
        progress.replace(b"resp_1", b"resp_2"),
    ):
        after, alone = asked.make_encoder(AROUND), asked.make_encoder(AROUND)
        after.encode(Parser().feed(created))
        assert after.encode(Parser().feed(second)) == alone.encode(Parser().feed(second))


# Counting, not timing: what a delta costs must not creep back.


def calls(asked: Decoded, before: list[bytes], read: bytes) -> int:
    """Return how many calls it takes to make an answer's bytes of a read."""
    encoder, parser = asked.make_encoder(AROUND), Parser(runs=True)
    for chunk in before:
        encoder.encode(parser.feed(chunk))
    with Calls() as counted:
        encoder.encode(parser.feed(read))
    return counted.by_code.total()


STREAMED = [pytest.param(asked, id=name) for name, asked in EVERY_ASK if "limit" not in name]


@pytest.mark.parametrize("asked", STREAMED)
def test_a_row_costs_as_many_calls_as_one_delta(asked: Decoded) -> None:
    frames = burst(200)
    first = frames[:6]
    single = calls(asked, first, frames[6])
    assert single <= 18
    assert calls(asked, first, b"".join(frames[6:204])) <= single + 4


@pytest.mark.parametrize("asked", STREAMED)
def test_a_whole_answer_costs_less_than_a_call_for_each_event(asked: Decoded) -> None:
    assert calls(asked, [], b"".join(burst(200))) <= 180


@pytest.mark.long
@LONG
@given(CASES | ODD_CASES)
def test_thousands_of_answers_are_the_same(chunks: list[bytes]) -> None:
    same_events(chunks)
    agree(chunks)
