"""Many at once, and callers who leave: nothing is lost, nothing is kept, nobody is blamed."""

import asyncio
import logging
from pathlib import Path

import aiohttp
import pytest

from codex_proxy.accounts.state import State
from codex_proxy.protocol.wire import JsonObject, dumps
from codex_proxy.simulator import Script
from codex_proxy.trace import End, Trace, UsageSource
from tests.harness import STANDARD, Answer, Stand, question, standing


def _listen(stand: Stand) -> list[Trace]:
    traces: list[Trace] = []
    stand.daemon.executor.listen(traces.append)
    return traces


async def _read_until(response: aiohttp.ClientResponse, mark: bytes, count: int) -> None:
    seen = b""
    while seen.count(mark) < count:
        chunk = await response.content.readany()
        assert chunk, "the stream ended early"
        seen += chunk


async def _left_cleanly(stand: Stand, traces: list[Trace]) -> None:
    """Check what has to hold whenever a caller has left in the middle."""
    await stand.until(lambda: len(traces) == 1)
    (turn,) = stand.sim.turns or stand.sim.requests
    await stand.until(turn.closed.is_set)
    assert turn.cancelled
    assert not turn.finished
    (trace,) = traces
    assert trace.end is End.CALLER_GONE
    assert trace.usage.source is UsageSource.ESTIMATE
    assert trace.usage.input_tokens > 0
    for account in stand.daemon.pool.accounts():
        assert account.in_flight == 0
        assert account.state is State.READY
        assert not account.strikes
        assert account.total_errors == 0
    assert stand.daemon.executor.in_flight == 0
    # It is in the account's numbers.
    used = [a["usage"] for a in (await stand.stats())["accounts"] if a["usage"]["total_completions"]]
    assert len(used) == 1
    assert used[0]["input_tokens"] == trace.usage.input_tokens
    assert used[0]["output_tokens"] == trace.usage.output_tokens


@pytest.mark.parametrize("codex", [False, True])
async def test_a_caller_who_leaves_in_the_middle_stops_the_backend(tmp_path: Path, codex: bool) -> None:
    async with standing(tmp_path) as stand:
        traces = _listen(stand)
        stand.sim.script(Script.long_text(1000, delay=0.005))
        async with stand.asking("a question of some length", codex=codex) as response:
            await _read_until(response, b"event: response.output_text.delta", 10)
        await _left_cleanly(stand, traces)
        # About what was delivered: ten words and a little, never the thousand.
        assert 10 <= traces[0].usage.output_tokens < 100
        assert traces[0].status == 200


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("where", ["headers", "created"])
async def test_a_caller_who_leaves_before_the_first_event_stops_the_backend(
    tmp_path: Path, where: str, stream: bool
) -> None:
    async with standing(tmp_path) as stand:
        traces = _listen(stand)
        stand.sim.set_all("stall", where=where)
        asking = asyncio.ensure_future(stand.ask("hi", stream=stream))  # noqa: TID251 -- a caller
        await stand.until(lambda: len(stand.sim.turns) == 1)
        await asyncio.sleep(0.02)
        asking.cancel()
        await _left_cleanly(stand, traces)
        assert traces[0].usage.output_tokens == 0


@pytest.mark.parametrize("stream", [True, False])
async def test_a_caller_who_leaves_during_a_silence_stops_the_backend(tmp_path: Path, stream: bool) -> None:
    async with standing(tmp_path) as stand:
        traces = _listen(stand)
        stand.sim.set_all("stall", where="middle")
        asking = asyncio.ensure_future(stand.ask("one two three", stream=stream))  # noqa: TID251 -- a caller
        await stand.until(lambda: any(a.in_flight and a.quota.seen_at for a in stand.daemon.pool))
        await asyncio.sleep(0.05)
        asking.cancel()
        await _left_cleanly(stand, traces)
        assert traces[0].usage.output_tokens > 0


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (
            "/v1/responses/compact",
            {"model": STANDARD, "input": [{"type": "message", "role": "user", "content": "x"}]},
        ),
        ("/v1/images/generations", {"model": "gpt-image-1", "prompt": "a dot"}),
    ],
)
async def test_a_caller_who_leaves_another_endpoint_stops_the_backend(
    tmp_path: Path, path: str, body: JsonObject
) -> None:
    async with standing(tmp_path) as stand:
        traces = _listen(stand)
        stand.sim.set_all("stall", where="headers")
        asking = asyncio.ensure_future(stand.post(path, body))  # noqa: TID251 -- a caller
        await stand.until(lambda: len(stand.sim.requests) == 1)
        await asyncio.sleep(0.02)
        asking.cancel()
        await _left_cleanly(stand, traces)


async def test_a_caller_who_leaves_while_all_rest_is_let_go(tmp_path: Path) -> None:
    async with standing(tmp_path, accounts=1) as stand:
        traces = _listen(stand)
        stand.sim.set_all("rate_limit", retry_after=2)
        asking = asyncio.ensure_future(stand.ask("hi"))  # noqa: TID251 -- a caller
        await stand.until(
            lambda: len(stand.sim.turns) == 1 and stand.daemon.pool.accounts()[0].in_flight == 0
        )
        asking.cancel()
        await stand.until(lambda: len(traces) == 1)
        assert traces[0].end is End.CALLER_GONE
        # Nothing was read by a model.
        assert traces[0].usage.total_tokens == 0
        assert stand.daemon.executor.in_flight == 0


async def test_a_caller_who_leaves_right_after_the_end_has_had_it_all(tmp_path: Path) -> None:
    async with standing(tmp_path) as stand:
        traces = _listen(stand)
        # The backend closes its body only a while after the last event.
        stand.sim.script(Script.text("all", delay=0.1))
        # A client of its own: one that keeps connections would keep this one, for the answer is whole.
        reader, writer = await asyncio.open_connection("127.0.0.1", stand.daemon.port)
        body = dumps(question("hi"))
        writer.write(
            b"POST /v1/responses HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            b"Content-Length: %d\r\n\r\n%b" % (len(body), body)
        )
        await reader.readuntil(b"event: response.completed")
        assert traces == []
        writer.close()
        await writer.wait_closed()
        await stand.until(lambda: len(traces) == 1)
        assert traces[0].end is End.COMPLETED
        assert traces[0].usage.source is UsageSource.BACKEND


async def test_a_caller_who_reads_nothing_is_given_up(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with standing(tmp_path, idle_timeout=0.3) as stand:
        traces = _listen(stand)
        stand.sim.script(Script.long_text(200, text="x" * 65_536))
        async with stand.asking("hi", codex=True) as response:
            await _left_cleanly(stand, traces)
            # Should it read on after all, what it got does not look like a whole answer.
            with pytest.raises(aiohttp.ClientError):
                await response.read()
    assert "turn broke" not in caplog.text
    assert [record for record in caplog.records if record.levelno >= logging.ERROR] == []


async def test_callers_who_leave_in_crowds_leave_nothing_behind(tmp_path: Path) -> None:
    async with standing(tmp_path) as stand:
        stand.sim.set_all("slow", delay=0.03, per_event=0.003)
        asking = [asyncio.ensure_future(stand.ask(f"{n}")) for n in range(60)]  # noqa: TID251 -- callers
        for number in range(0, 60, 3):
            await asyncio.sleep(0.005)
            asking[number].cancel()
        answers = await asyncio.gather(*asking, return_exceptions=True)
        served = [answer for answer in answers if isinstance(answer, Answer)]
        assert 40 <= len(served) < 60
        assert {answer.status for answer in served} == {200}
        assert {answer.types[-1] for answer in served} == {"response.completed"}
        await stand.idle()
        assert {account.in_flight for account in stand.daemon.pool} == {0}
        assert {account.state for account in stand.daemon.pool.accounts()} == {State.READY}
        assert {account.total_errors for account in stand.daemon.pool} == {0}


async def test_two_hundred_streams_lose_nothing(tmp_path: Path) -> None:
    """Each text is its own, in pieces that the network and the reads cut anywhere."""
    texts = [f"<{n}> " + f"naïve 日本語 {n} 👩‍👩‍👧 " * 25 for n in range(200)]
    async with standing(tmp_path) as stand:
        stand.sim.script(
            *(Script.text(text, delay=0.001 if n % 4 == 0 else 0.0) for n, text in enumerate(texts))
        )
        answers = await asyncio.gather(
            *(stand.ask("hi", codex=n % 2 == 0, stream=n % 5 != 4) for n in range(200))
        )
        assert {answer.status for answer in answers} == {200}
        assert sorted(answer.text for answer in answers) == sorted(texts)
        for n, answer in enumerate(answers):
            if n % 5 == 4:
                continue
            assert answer.types[-1] == "response.completed"
            last = answer.events[-1].json["response"]
            assert last["output"][0]["content"][0]["text"] == answer.text
            numbers = [e.json["sequence_number"] for e in answer.events if "sequence_number" in e.json]
            assert numbers == list(range(len(numbers)))
        assert len(stand.sim.turns) == 200
        await stand.idle()


async def test_turns_spread_over_accounts_of_equal_quota(tmp_path: Path) -> None:
    async with standing(tmp_path) as stand:
        stand.sim.latency = 0.05
        await asyncio.gather(*(stand.ask("hi") for _ in range(30)))
        tried = stand.tried()
        assert [tried.count(account.name) for account in stand.accounts] == [10, 10, 10]


async def test_a_conversation_stays_on_its_account(tmp_path: Path) -> None:
    async with standing(tmp_path) as stand:
        for _ in range(4):
            assert (await stand.ask("hi", prompt_cache_key="one")).status == 200
            assert (await stand.ask("hi", prompt_cache_key="two")).status == 200
        keys: dict[str, set[str | None]] = {}
        for turn in stand.sim.turns:
            keys.setdefault(turn.json["prompt_cache_key"], set()).add(turn.account)
        assert [len(accounts) for accounts in keys.values()] == [1, 1]


async def test_what_turns_used_is_in_their_accounts_numbers(tmp_path: Path) -> None:
    async with standing(tmp_path, accounts=1) as stand:
        streamed = (await stand.ask("one", codex=True)).events[-1].json["response"]["usage"]
        whole = (await stand.ask("two", stream=False)).json["usage"]
        message = {"type": "message", "role": "user", "content": "long story"}
        answer = await stand.post("/v1/responses/compact", {"model": STANDARD, "input": [message]})
        compacted = answer.json["usage"]
        stand.sim.script(Script.no_usage("no numbers from the backend"))
        assert (await stand.ask("three")).status == 200
        await stand.idle()

        (account,) = (await stand.stats())["accounts"]
        told = (streamed, whole, compacted)
        assert account["usage"]["total_completions"] == 4
        # The one without numbers is estimated, never nothing.
        assert account["usage"]["input_tokens"] > sum(usage["input_tokens"] for usage in told)
        assert account["usage"]["output_tokens"] > sum(usage["output_tokens"] for usage in told)
        assert account["total_requests"] == 4
        assert account["total_errors"] == 0
