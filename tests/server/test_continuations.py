"""What is remembered of conversations: whose, how much, how long, and when not."""

import asyncio
from typing import Any

import pytest

from codex_proxy.clock import ManualClock
from codex_proxy.errors import RequestError
from codex_proxy.protocol.catalog import Catalog
from codex_proxy.protocol.dialect import Decoded, Surroundings
from codex_proxy.protocol.sse import Event
from codex_proxy.protocol.transcript import Transcript
from codex_proxy.protocol.wire import dumps, loads
from codex_proxy.server.continuations import TTL, Continuations
from codex_proxy.trace import Caller
from tests.harness import CODEX_HEADERS, STANDARD

ANNA, BERT = Caller("key-a", "anna"), Caller("key-b", "bert")
OVERHEAD = 512


def turn(size: int, before: Transcript | None = None) -> Transcript:
    """Return a turn that measures *size*, what it costs to keep included."""
    return Transcript(b"x" * (size - OVERHEAD), b"", before)


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


# Keeping -----------------------------------------------------------------------------------


def test_what_is_put_is_found_by_its_caller_alone(clock: ManualClock) -> None:
    kept = Continuations(clock)
    one = turn(1000)
    kept.put(ANNA, "resp_1", one)
    assert kept.get(ANNA, "resp_1") is one
    assert kept.get(BERT, "resp_1") is None
    assert kept.get(ANNA, "resp_2") is None
    # The same id of two callers is two answers.
    other = turn(1000)
    kept.put(BERT, "resp_1", other)
    assert kept.get(ANNA, "resp_1") is one
    assert kept.get(BERT, "resp_1") is other


def test_an_answer_is_forgotten_after_its_time_and_each_use_renews_it(clock: ManualClock) -> None:
    kept = Continuations(clock)
    kept.put(ANNA, "used", turn(1000))
    kept.put(ANNA, "unused", turn(1000))
    clock.advance(TTL - 1)
    assert kept.get(ANNA, "used") is not None
    clock.advance(2)
    assert kept.get(ANNA, "used") is not None
    assert kept.get(ANNA, "unused") is None
    clock.advance(TTL)
    assert kept.get(ANNA, "used") is None


def test_a_sweep_gives_the_memory_back(clock: ManualClock) -> None:
    kept = Continuations(clock)
    kept.put(ANNA, "resp_1", turn(1000))
    clock.advance(TTL / 2)
    kept.put(BERT, "resp_1", turn(1000))
    asyncio.run(kept.sweep())
    assert (len(kept), kept.size) == (2, 2000)
    clock.advance(TTL / 2)
    asyncio.run(kept.sweep())
    assert (len(kept), kept.size) == (1, 1000)
    clock.advance(TTL)
    (job,) = kept.jobs()
    asyncio.run(job.run())  # type: ignore[arg-type]  # what it awaits is a coroutine
    assert (len(kept), kept.size) == (0, 0)


def test_a_caller_has_a_number_of_answers_and_the_longest_unused_go(clock: ManualClock) -> None:
    kept = Continuations(clock, max_caller_entries=3)
    for number in range(3):
        kept.put(ANNA, f"resp_{number}", turn(1000))
    assert kept.get(ANNA, "resp_0") is not None
    kept.put(ANNA, "resp_3", turn(1000))
    found = [kept.get(ANNA, f"resp_{number}") is not None for number in range(4)]
    assert found == [True, False, True, True]


def test_a_caller_has_a_number_of_bytes(clock: ManualClock) -> None:
    kept = Continuations(clock, max_caller_bytes=3000)
    for number in range(4):
        kept.put(ANNA, f"resp_{number}", turn(1000))
    kept.put(BERT, "resp_0", turn(1000))
    assert [kept.get(ANNA, f"resp_{number}") is not None for number in range(4)] == [False, True, True, True]
    assert kept.get(BERT, "resp_0") is not None
    # What is too large by itself is not kept, and leaves nothing behind.
    kept.put(BERT, "resp_1", turn(3001))
    assert kept.get(BERT, "resp_1") is None
    assert kept.size == 3000


def test_turns_that_conversations_share_are_counted_once(clock: ManualClock) -> None:
    kept = Continuations(clock)
    one = turn(1000)
    two, other = turn(2000, one), turn(3000, one)
    kept.put(ANNA, "one", one)
    kept.put(ANNA, "two", two)
    kept.put(ANNA, "other", other)
    assert kept.size == 6000
    kept = Continuations(clock, max_caller_entries=1)
    kept.put(ANNA, "one", one)
    kept.put(ANNA, "two", two)
    # The first answer cannot be named any more, but the second one needs its items.
    assert kept.get(ANNA, "one") is None
    assert (len(kept), kept.size) == (1, 3000)
    kept.put(ANNA, "alone", turn(1500))
    assert (len(kept), kept.size) == (1, 1500)


def test_an_answer_that_is_put_again_counts_once(clock: ManualClock) -> None:
    kept = Continuations(clock)
    one = turn(1000)
    kept.put(ANNA, "resp_1", one)
    kept.put(ANNA, "resp_1", one)
    kept.put(ANNA, "resp_1", turn(2000))
    assert (len(kept), kept.size) == (1, 2000)


def test_when_all_is_full_whoever_holds_most_gives(clock: ManualClock) -> None:
    kept = Continuations(clock, max_bytes=10_000, max_caller_bytes=10_000)
    kept.put(BERT, "small", turn(1000))
    for number in range(12):
        kept.put(ANNA, f"resp_{number}", turn(1000))
    assert kept.size <= 10_000
    assert kept.get(BERT, "small") is not None
    assert kept.get(ANNA, "resp_11") is not None
    assert kept.get(ANNA, "resp_0") is None


# Turns -------------------------------------------------------------------------------------


def decode(
    kept: Continuations, body: dict[str, Any], caller: Caller = ANNA, headers: dict[str, str] | None = None
) -> Decoded:
    return kept.decode(dumps(body), headers or {}, catalog=Catalog(), caller=caller, limit=2**20)


def answer(decoded: Decoded, response_id: str = "resp_1", kind: str = "completed") -> None:
    """Let the backend answer."""
    item = {
        "type": "message",
        "id": "msg_1",
        "role": "assistant",
        "content": [{"type": "output_text", "text": "pong"}],
    }
    encoder = decoded.make_encoder(Surroundings(now=lambda: 0.0))
    events: list[dict[str, Any]] = [
        {"type": "response.created", "response": {"id": response_id}},
        {"type": "response.output_item.done", "output_index": 0, "item": item},
        {"type": f"response.{kind}", "response": {"id": response_id, "object": "response", "output": []}},
    ]
    encoder.encode([Event.of(event) for event in events])
    assert encoder.finished


def said(decoded: Decoded) -> list[str]:
    return [item["content"][0]["text"] for item in loads(decoded.request.body)["input"]]


def test_an_answer_is_remembered_with_what_was_asked(clock: ManualClock) -> None:
    kept = Continuations(clock)
    answer(decode(kept, {"model": STANDARD, "input": "one"}))
    second = decode(kept, {"model": STANDARD, "input": "two", "previous_response_id": "resp_1"})
    assert said(second) == ["one", "pong", "two"]
    assert second.request.previous_response_id == "resp_1"
    answer(second, "resp_2", "incomplete")
    third = decode(kept, {"model": STANDARD, "input": "three", "previous_response_id": "resp_2"})
    assert said(third) == ["one", "pong", "two", "pong", "three"]


@pytest.mark.parametrize("store", [None, True])
def test_no_word_about_storing_lets_it_be_remembered(store: bool | None, clock: ManualClock) -> None:
    kept = Continuations(clock)
    answer(decode(kept, {"model": STANDARD, "input": "one", "store": store}))
    assert len(kept) == 1


@pytest.mark.parametrize("store", [False, 0, "false", []])
def test_what_is_not_to_be_stored_is_not_remembered(store: object, clock: ManualClock) -> None:
    kept = Continuations(clock)
    answer(decode(kept, {"model": STANDARD, "input": "one", "store": store}))
    assert len(kept) == 0


def test_codex_clients_are_not_remembered(clock: ManualClock) -> None:
    kept = Continuations(clock)
    headers = {name.lower(): value for name, value in CODEX_HEADERS.items()}
    answer(decode(kept, {"model": STANDARD, "input": "one"}, headers=headers))
    assert len(kept) == 0


def test_an_answer_that_failed_is_not_remembered(clock: ManualClock) -> None:
    kept = Continuations(clock)
    decoded = decode(kept, {"model": STANDARD, "input": "one"})
    answer(decoded, kind="failed")
    assert len(kept) == 0


def test_a_body_that_is_too_large_to_be_kept_is_served_all_the_same(clock: ManualClock) -> None:
    kept = Continuations(clock, max_caller_bytes=1000)
    answer(decode(kept, {"model": STANDARD, "input": "x" * 2000}))
    assert len(kept) == 0


def test_a_continuation_of_a_stored_answer_need_not_be_stored_itself(clock: ManualClock) -> None:
    kept = Continuations(clock)
    answer(decode(kept, {"model": STANDARD, "input": "one"}))
    answer(
        decode(kept, {"model": STANDARD, "input": "two", "store": False, "previous_response_id": "resp_1"}),
        "resp_2",
    )
    assert kept.get(ANNA, "resp_2") is None
    assert kept.get(ANNA, "resp_1") is not None


def test_another_callers_answer_is_not_found(clock: ManualClock) -> None:
    kept = Continuations(clock)
    answer(decode(kept, {"model": STANDARD, "input": "one"}))
    with pytest.raises(RequestError) as caught:
        decode(kept, {"model": STANDARD, "input": "two", "previous_response_id": "resp_1"}, BERT)
    assert caught.value.code == "previous_response_not_found"


@pytest.mark.parametrize("value", ["null", '""'])
def test_naming_no_answer_is_no_continuation(value: str, clock: ManualClock) -> None:
    kept = Continuations(clock)
    raw = f'{{"model": "{STANDARD}", "input": "one", "previous_response_id": {value}}}'.encode()
    decoded = kept.decode(raw, {}, catalog=Catalog(), caller=ANNA, limit=2**20)
    assert said(decoded) == ["one"]
    assert decoded.request.previous_response_id is None


def test_an_id_in_disguise_is_not_silently_dropped(clock: ManualClock) -> None:
    kept = Continuations(clock)
    raw = f'{{"model": "{STANDARD}", "input": "one", "previous\\u005fresponse_id": "resp_1"}}'.encode()
    with pytest.raises(RequestError) as caught:
        kept.decode(raw, {}, catalog=Catalog(), caller=ANNA, limit=2**20)
    assert caught.value.code == "previous_response_not_found"


def test_a_word_in_a_text_is_no_continuation(clock: ManualClock) -> None:
    kept = Continuations(clock)
    assert said(decode(kept, {"model": STANDARD, "input": 'say "previous_response_id"'})) == [
        'say "previous_response_id"'
    ]
    assert said(decode(kept, {"model": STANDARD, "input": "previous_response_id"})) == [
        "previous_response_id"
    ]


def test_a_conversation_without_a_name_keeps_one_of_its_own(clock: ManualClock) -> None:
    kept = Continuations(clock)
    first = decode(kept, {"model": STANDARD, "input": "one"})
    assert first.request.binding is not None
    own = first.request.binding.also
    # It binds to an account here, and is nothing that the backend hears of.
    assert own
    assert own.encode() not in first.request.body
    assert own not in first.request.headers.values()
    answer(first)
    second = decode(kept, {"model": STANDARD, "input": "two", "previous_response_id": "resp_1"})
    assert second.request.session == own
    # Another begins alike, and one that brings its whole conversation is known by that.
    other = decode(kept, {"model": STANDARD, "input": "one"})
    assert other.request.session == first.request.session
    assert other.request.binding is not None
    assert other.request.binding.also not in (None, own)
    # For the backend all of it is one conversation.
    keys = {loads(one.request.body)["prompt_cache_key"] for one in (first, second)}
    assert keys == {first.request.session}
    assert second.request.headers == first.request.headers


def test_callers_share_no_binding(clock: ManualClock) -> None:
    kept = Continuations(clock)
    one, other = (decode(kept, {"model": STANDARD, "input": "one"}, caller=who) for who in (ANNA, BERT))
    assert one.request.session != other.request.session
    assert one.request.body != other.request.body
