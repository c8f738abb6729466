"""What happens to a stream: held, released, failed, cut and silent, before and after its first event."""

import asyncio
import time
from pathlib import Path
from typing import Any

import pytest

from codex_proxy.accounts.account import Cause
from codex_proxy.accounts.state import State
from codex_proxy.errors import PoolShortage
from codex_proxy.protocol.sse import Parser, frame
from codex_proxy.protocol.wire import JsonObject, dumps
from codex_proxy.simulator import Script
from codex_proxy.simulator.compose import TERMINAL
from tests.harness import Answer, Stand, standing

IMPATIENT: dict[str, Any] = {"connect_timeout": 0.3, "first_byte_timeout": 0.3, "idle_timeout": 0.3}
KEEPALIVE = b'data: {"type":"keepalive"}\n\n'

CALLERS = pytest.mark.parametrize("codex", [False, True], ids=["sdk", "codex"])


def _one_end(answer: Answer) -> JsonObject:
    """Check that a stream ends once, last and in order, and return its end's response."""
    assert answer.status == 200
    assert [kind for kind in answer.types if kind in TERMINAL] == [answer.types[-1]]
    # Those without a number are no events of the API, and go to Codex clients only.
    numbers = [e.json["sequence_number"] for e in answer.events if "sequence_number" in e.json]
    assert numbers == sorted(set(numbers))
    response: JsonObject = answer.events[-1].json["response"]
    return response


async def _blameless(stand: Stand) -> None:
    await stand.idle()
    for account in stand.daemon.pool.accounts():
        assert account.state is State.READY
        assert account.total_errors == 0
        assert account.in_flight == 0


# After the first good event ---------------------------------------------------------------------

LATE: list[tuple[str, str, str, State, Cause | None]] = [
    ("usage_limit_reached", "rate_limit_exceeded", "try again in 1s", State.COOLING, Cause.LIMIT),
    ("rate_limit_exceeded", "rate_limit_exceeded", "try again in 1s", State.COOLING, Cause.RATE),
    ("server_is_overloaded", "rate_limit_exceeded", "try again in 1s", State.COOLING, Cause.OVERLOAD),
    ("slow_down", "rate_limit_exceeded", "try again in 1s", State.COOLING, Cause.OVERLOAD),
    ("insufficient_quota", "rate_limit_exceeded", "try again in 1s", State.UNAVAILABLE, None),
    ("credit_balance_exhausted", "rate_limit_exceeded", "try again in 1s", State.UNAVAILABLE, None),
    ("usage_not_included", "rate_limit_exceeded", "try again in 1s", State.READY, None),
    ("server_error", "server_error", "server_error", State.COOLING, Cause.SERVER),
    ("never_heard_of", "server_error", "the backend failed", State.COOLING, Cause.SERVER),
    ("context_length_exceeded", "context_length_exceeded", "context window", State.READY, None),
    ("invalid_prompt", "invalid_prompt", "usage policy", State.READY, None),
    ("bio_policy", "bio_policy", "bio_policy", State.READY, None),
    ("cyber_policy", "cyber_policy", "cyber_policy", State.READY, None),
    ("misalignment_policy_violation", "misalignment_policy_violation", "policy", State.READY, None),
]


@CALLERS
@pytest.mark.parametrize("how", ["failed", "error"])
@pytest.mark.parametrize(("code", "told", "words", "left_as", "cause"), LATE, ids=[row[0] for row in LATE])
async def test_a_late_failure_ends_the_stream_in_words_the_client_understands(
    tmp_path: Path,
    code: str,
    told: str,
    words: str,
    left_as: State,
    cause: Cause | None,
    how: str,
    codex: bool,
) -> None:
    async with standing(tmp_path) as stand:
        stand.in_order()
        first = stand.accounts[0]
        first.set("failed", code=code, after=4, how=how)
        answer = await stand.ask("hi", codex=codex)
        response = _one_end(answer)
        assert answer.types[-1] == "response.failed"
        assert "response.output_text.delta" in answer.types
        assert response["status"] == "failed"
        assert response["error"]["code"] == told
        assert words in response["error"]["message"]
        # Nothing was tried behind what the caller had seen.
        assert stand.tried() == [first.name]
        await stand.idle()
        known = stand.known(first)
        assert known.state is left_as
        assert known.cooling_cause() is cause
        assert known.in_flight == 0


async def test_a_late_failure_of_a_collected_answer_is_a_status(tmp_path: Path) -> None:
    async with standing(tmp_path) as stand:
        stand.in_order()
        first = stand.accounts[0]
        first.set("failed", code="usage_limit_reached", after=4)
        answer = await stand.ask("hi", stream=False)
        assert answer.status == 429
        assert answer.json["error"]["code"] == "rate_limit_exceeded"
        assert answer.headers["retry-after"] == "1"
        assert stand.known(first).cooling_cause() is Cause.LIMIT
        assert len(stand.sim.turns) == 1


@CALLERS
@pytest.mark.parametrize("stream", [True, False])
async def test_an_incomplete_answer_is_an_answer(tmp_path: Path, stream: bool, codex: bool) -> None:
    async with standing(tmp_path) as stand:
        stand.sim.script(Script.incomplete("max_output_tokens", text="so far"))
        answer = await stand.ask("hi", stream=stream, codex=codex)
        response = _one_end(answer) if stream else answer.json
        assert answer.status == 200
        assert answer.text == "so far"
        assert response["status"] == "incomplete"
        assert response["incomplete_details"] == {"reason": "max_output_tokens"}
        assert response["output"][0]["content"][0]["text"] == "so far"
        await _blameless(stand)
        assert len(stand.sim.turns) == 1


@pytest.mark.parametrize("after", [3, 4, 5, 8])
@pytest.mark.parametrize("way", [{}, {"clean": True}, {"reset": True}], ids=["abort", "clean", "reset"])
@CALLERS
async def test_a_cut_stream_never_looks_finished(
    tmp_path: Path, way: JsonObject, after: int, codex: bool
) -> None:
    async with standing(tmp_path) as stand:
        stand.in_order()
        first, second, _ = stand.accounts
        first.set("cut", after=after, **way)
        first.script(Script.text("one two three four five"))
        second.script(Script.text("the other"))
        answer = await stand.ask("hi", codex=codex)
        response = _one_end(answer)
        if answer.text == "the other":
            # A reset may outrun what was written before it; then nothing had been said.
            assert way == {"reset": True}
            return
        assert answer.types[-1] == "response.failed"
        assert response["error"]["code"] == "server_error"
        assert stand.tried() == [first.name]
        assert stand.known(first).cooling_cause() is Cause.CUT


@pytest.mark.parametrize("missing", [1, 4, 40])
@CALLERS
async def test_an_end_that_is_cut_is_no_end(tmp_path: Path, missing: int, codex: bool) -> None:
    item = {"type": "message", "id": "msg_1", "role": "assistant", "content": []}
    whole = b"".join(
        frame(str(event["type"]), dumps(event))
        for event in (
            {"type": "response.created", "response": {"id": "resp_1", "status": "in_progress"}},
            {"type": "response.output_item.done", "output_index": 0, "item": item},
            {"type": "response.completed", "response": {"id": "resp_1", "status": "completed", "usage": {}}},
        )
    )
    async with standing(tmp_path) as stand:
        stand.in_order()
        first = stand.accounts[0]
        first.script(Script.recorded(whole[: -2 - missing]))
        answer = await stand.ask(codex=codex)
        assert answer.types == ["response.created", "response.output_item.done", "response.failed"]
        assert stand.known(first).cooling_cause() is Cause.CUT
        stand.known(first).holds.clear()
        first.script(Script.recorded(whole[: -2 - missing]))
        assert (await stand.ask(codex=codex, stream=False)).status == 429


async def test_a_cut_answer_that_is_collected_is_a_status(tmp_path: Path) -> None:
    async with standing(tmp_path) as stand:
        stand.in_order()
        stand.accounts[0].set("cut", after=6)
        answer = await stand.ask("hi", stream=False)
        assert answer.status == 429
        assert answer.json["error"]["code"] == "rate_limit_exceeded"
        assert answer.headers["retry-after"] == "1"


@CALLERS
async def test_silence_in_the_middle_ends_the_stream(tmp_path: Path, codex: bool) -> None:
    async with standing(tmp_path, **IMPATIENT) as stand:
        stand.in_order()
        first = stand.accounts[0]
        first.set("stall", where="middle")
        answer = await stand.ask("one two three", codex=codex)
        response = _one_end(answer)
        assert answer.types[-1] == "response.failed"
        assert response["error"]["code"] == "server_error"
        assert "silent" in response["error"]["message"]
        (turn,) = stand.sim.turns
        await turn.closed.wait()
        assert turn.cancelled
        assert stand.known(first).cooling_cause() is Cause.SILENT


async def test_a_stream_that_goes_on_slowly_is_not_silent(tmp_path: Path) -> None:
    async with standing(tmp_path, **IMPATIENT) as stand:
        # Longer in all than any deadline; there is none for the whole.
        stand.sim.script(Script.long_text(8, delay=0.06))
        answer = await stand.ask("hi")
        assert _one_end(answer)["status"] == "completed"
        assert answer.text == "word " * 8
        assert len(stand.sim.turns) == 1


@pytest.mark.parametrize(
    "tail",
    [
        [{"type": "response.output_text.delta", "delta": "more", "item_id": "m", "output_index": 0}],
        [{"type": "response.completed", "response": {"id": "resp_2", "status": "completed"}}],
        [{"type": "response.failed", "response": {"error": {"code": "server_error", "message": "late"}}}],
        [{"type": "error", "error": {"code": "usage_limit_reached", "message": "late"}}],
        [b": comment\n\n", b"data: nonsense\n\n"],
    ],
)
@pytest.mark.parametrize("end", ["completed", "incomplete", "failed"])
@CALLERS
async def test_nothing_follows_the_end(tmp_path: Path, end: str, tail: list[Any], codex: bool) -> None:
    response = {"id": "resp_1", "status": "in_progress", "output": []}
    last: JsonObject = {"id": "resp_1", "status": end, "output": []}
    if end == "failed":
        last["error"] = {"code": "invalid_prompt", "message": "no"}
    events: list[Any] = [
        {"type": "response.created", "response": response, "sequence_number": 0},
        {"type": "response.output_text.delta", "delta": "hi", "sequence_number": 1, "output_index": 0},
        {"type": f"response.{end}", "response": last, "sequence_number": 2},
    ]
    async with standing(tmp_path, accounts=1) as stand:
        stand.sim.extra_events = False
        stand.sim.script(Script.raw([*events, *tail]), Script.raw([*events, *tail], chunk=17))
        for _ in range(2):
            answer = await stand.ask("hi", codex=codex)
            _one_end(answer)
            assert answer.types == [
                "response.created", "response.output_text.delta", f"response.{end}",
            ]  # fmt: skip
            assert answer.text == "hi"
        await _blameless(stand)


# Held back ---------------------------------------------------------------------------------------


@CALLERS
@pytest.mark.parametrize(
    ("state", "options"),
    [
        ("failed", {"code": "server_error"}),
        ("overloaded_in_stream", {"how": "error"}),
        ("cut", {"after": 2}),
        ("cut", {"after": 1, "clean": True}),
        ("stall", {"where": "created"}),
    ],
)
async def test_a_failure_while_the_greeting_is_held_is_never_seen(
    tmp_path: Path, state: str, options: JsonObject, codex: bool
) -> None:
    async with standing(tmp_path, **IMPATIENT) as stand:
        stand.in_order()
        first, second, _ = stand.accounts
        first.set(state, **options)
        answer = await stand.ask("hi", codex=codex)
        assert _one_end(answer)["status"] == "completed"
        assert stand.tried() == [first.name, second.name]
        # All that the caller saw is the second account's.
        assert answer.types.count("response.created") == 1
        ids = {e.json["response"]["id"] for e in answer.events if "response" in e.json}
        assert len(ids) == 1
        assert second.tag in ids.pop()
        assert first.tag.encode() not in answer.body


async def test_a_long_silence_releases_the_greeting_and_signs_of_life_follow(tmp_path: Path) -> None:
    async with standing(tmp_path, hold_created=0.25, keep_alive_after=0.1) as stand:
        stand.in_order()
        stand.accounts[0].set("stall", where="created", seconds=0.8)
        started = time.monotonic()
        async with stand.asking("hi", codex=True) as response:
            released = time.monotonic() - started
            assert response.status == 200
            body = await response.read()
        assert 0.2 <= released < 0.75
        head, life, rest = body.partition(KEEPALIVE)
        # The greeting comes first, then nothing but signs of life, then the answer.
        assert b'"type":"response.created"' in head
        assert b"output_text" not in head
        assert life
        assert 1 <= rest.count(KEEPALIVE) + 1 <= 6
        assert rest.endswith(b"\n\n")
        parser = Parser()
        types = [event.type for event in parser.feed(body) + parser.finish() if event.type != "keepalive"]
        assert types[0] in ("codex.rate_limits", "response.created")
        assert types[-1] == "response.completed"
        assert len(stand.sim.turns) == 1


async def test_no_sign_of_life_comes_before_its_time(tmp_path: Path) -> None:
    async with standing(tmp_path, hold_created=5, keep_alive_after=0.25) as stand:
        # Held: nothing is written at all, however long the silence.
        stand.sim.set_all("stall", where="created", seconds=0.6)
        answer = await stand.ask("hi", codex=True)
        assert answer.status == 200
        assert KEEPALIVE not in answer.body
        # Under way: silence is what counts, not time.
        stand.sim.set_all("ok")
        stand.sim.script(Script.long_text(12, delay=0.03))
        answer = await stand.ask("hi", codex=True)
        assert KEEPALIVE not in answer.body


@CALLERS
async def test_a_pause_in_the_answer_is_bridged(tmp_path: Path, codex: bool) -> None:
    async with standing(tmp_path, keep_alive_after=0.05) as stand:
        stand.sim.set_all("stall", where="middle", seconds=0.3)
        answer = await stand.ask("one two three four", codex=codex)
        assert 2 <= answer.body.count(KEEPALIVE) <= 7
        assert answer.text == "pong: one two three four"
        assert answer.types[-1] == "response.completed"


async def test_after_the_release_no_other_account_is_tried(tmp_path: Path) -> None:
    async with standing(tmp_path, hold_created=0.1, idle_timeout=0.3) as stand:
        stand.in_order()
        stand.accounts[0].set("stall", where="created")
        answer = await stand.ask("hi", codex=True)
        assert _one_end(answer)["error"]["code"] == "server_error"
        assert answer.types[-1] == "response.failed"
        assert stand.tried() == [stand.accounts[0].name]


async def test_a_collected_answer_waits_past_the_hold(tmp_path: Path) -> None:
    async with standing(tmp_path, hold_created=0.05, idle_timeout=0.3) as stand:
        stand.in_order()
        first, second, _ = stand.accounts
        first.set("stall", where="created")
        answer = await stand.ask("hi", stream=False)
        assert answer.status == 200
        assert stand.tried() == [first.name, second.name]


async def test_the_hold_begins_with_the_turn_not_with_the_attempt(tmp_path: Path) -> None:
    async with standing(tmp_path, hold_created=0.6, idle_timeout=0.4, keep_alive_after=5) as stand:
        stand.in_order()
        for account in stand.accounts:
            account.set("stall", where="created")
        started = time.monotonic()
        async with stand.asking("hi", codex=True) as response:
            # The first account's silence took 0.4 s of it; the second's greeting is let go 0.2 s later.
            assert response.status == 200
            assert 0.55 <= time.monotonic() - started < 0.95
        assert stand.tried()[:2] == [account.name for account in stand.accounts[:2]]


async def test_a_greeting_too_large_to_hold_begins_the_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("codex_proxy.upstream.executor.MAX_HELD_BYTES", 1000)
    async with standing(tmp_path, accounts=1) as stand:
        stand.accounts[0].set("stall", where="created", seconds=0.9)
        started = time.monotonic()
        async with stand.asking("hi", codex=True, instructions="x" * 2000) as response:
            assert response.status == 200
            assert time.monotonic() - started < 0.7
            body = await response.read()
        assert b"response.completed" in body


async def test_signs_of_life_of_the_backend_are_heard(tmp_path: Path) -> None:
    """A backend that only sends comments is not silent, and its comments are no answer."""
    async with standing(tmp_path, idle_timeout=0.3, first_byte_timeout=0.3) as stand:
        created = {"type": "response.created", "response": {"id": "resp_1"}, "sequence_number": 0}
        completed = {"type": "response.completed", "response": {"id": "resp_1"}, "sequence_number": 1}
        stand.sim.script(Script.raw([created, *[b": busy\n\n"] * 6, completed], delay=0.07))
        answer = await stand.ask("hi")
        assert answer.types == ["response.created", "response.completed"]
        assert b"busy" not in answer.body
        assert len(stand.sim.turns) == 1


async def test_a_stream_that_does_not_begin_is_given_up_before_one_that_pauses(tmp_path: Path) -> None:
    async with standing(tmp_path, first_byte_timeout=0.3, idle_timeout=5) as stand:
        stand.in_order()
        first, second, _ = stand.accounts
        first.set("stall", after=0)
        second.set("stall", where="created", seconds=0.5)
        started = time.monotonic()
        assert (await stand.ask("hi")).status == 200
        assert 0.7 <= time.monotonic() - started < 4
        assert stand.tried() == [first.name, second.name]


@CALLERS
async def test_a_stream_that_is_no_stream_is_a_failure(tmp_path: Path, codex: bool) -> None:
    async with standing(tmp_path) as stand:
        stand.in_order()
        first, second, _ = stand.accounts
        first.script(Script.raw([b"<html>hello</html>"]))
        answer = await stand.ask("hi", codex=codex)
        assert _one_end(answer)["status"] == "completed"
        assert stand.tried() == [first.name, second.name]


async def test_an_answer_without_a_greeting_is_an_answer(tmp_path: Path) -> None:
    async with standing(tmp_path, accounts=1) as stand:
        item = {
            "type": "message",
            "id": "msg_1",
            "role": "assistant",
            "content": [{"type": "output_text", "text": "hi", "annotations": []}],
        }
        events = [
            {"type": "response.output_item.done", "output_index": 0, "item": item, "sequence_number": 3},
            {"type": "response.completed", "response": {"id": "resp_1"}, "sequence_number": 4},
        ]
        stand.sim.script(Script.raw(events), Script.raw(events))
        streamed = await stand.ask("hi")
        assert streamed.types[0] == "response.created"
        assert _one_end(streamed)["output"] == [item]
        whole = await stand.ask("hi", stream=False)
        assert whole.json["output"] == [item]


async def test_our_own_end_of_a_turn_is_said_in_the_stream(tmp_path: Path) -> None:
    async with standing(tmp_path) as stand:
        stand.sim.set_all("stall", where="middle")
        async with stand.asking("one two three", codex=True) as response:
            await response.content.readany()
            stand.daemon.executor.cut_all(PoolShortage("the proxy is being restarted"))
            body = await response.read()
        parser = Parser()
        last = (parser.feed(body) + parser.finish())[-1]
        assert last.type == "response.failed"
        assert last.json["response"]["error"]["code"] == "rate_limit_exceeded"
        await _blameless(stand)
        (turn,) = stand.sim.turns
        await stand.until(lambda: turn.cancelled)


async def test_our_own_end_of_a_turn_that_has_said_nothing_is_a_status(tmp_path: Path) -> None:
    async with standing(tmp_path) as stand:
        stand.sim.set_all("stall", where="created")
        asking = asyncio.ensure_future(stand.ask("hi"))  # noqa: TID251 -- a caller, not the daemon
        await stand.until(lambda: len(stand.sim.turns) == 1)
        stand.daemon.executor.cut_all(PoolShortage("the proxy is being restarted"))
        answer = await asking
        assert answer.status == 429
        assert answer.headers["retry-after"] == "1"
        await _blameless(stand)


async def test_a_backend_that_never_ends_its_body_keeps_nobody_waiting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("codex_proxy.upstream.executor._TAIL_SECONDS", 0.1)
    created = {"type": "response.created", "response": {"id": "resp_1"}}
    completed = {"type": "response.completed", "response": {"id": "resp_1"}}
    async with standing(tmp_path, accounts=1) as stand:
        stand.sim.script(Script.raw([created, completed, *[b": still here\n\n"] * 200], delay=0.02))
        started = time.monotonic()
        answer = await stand.ask("hi", stream=False)
        assert answer.status == 200
        assert time.monotonic() - started < 1.0
        await _blameless(stand)
        (turn,) = stand.sim.turns
        await stand.until(lambda: turn.cancelled)
