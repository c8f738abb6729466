"""Counting beside the loop: exact, in a process that comes and goes, and an estimate where there is none."""

import asyncio
import contextlib
import gc
import logging
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
import tiktoken

from codex_proxy.protocol import tokens
from codex_proxy.server import counting, encoding
from codex_proxy.server.counting import TokenCounter, command
from tests.harness import standing

TEXTS = {
    "english": "It's the economy, they'd say: 1,234,567 words.\n\n" * 20,
    "code": 'async def f(x: int) -> str:\n    return f"{x!r:>{10}}"\n\n' * 20,
    "cjk": "お誕生日おめでとう。今天天气很好。한국어" * 20,
    "emoji": "👩‍👩‍👧‍👦 🇩🇪 ✨ ok👍🏽" * 20,
    "special": "<|endoftext|><|endofprompt|>",
    "surrogates": "a\ud83d b\ude00 \ud83d\ude00",
    "none": "",
}


@pytest.fixture(scope="module")
def exact() -> Callable[[str], int]:
    """Return a count by tiktoken in this process, of whole texts."""
    o200k: tiktoken.Encoding = encoding.load()
    return lambda text: len(o200k.encode_ordinary(text))


@pytest_asyncio.fixture
async def counter() -> AsyncIterator[TokenCounter]:
    made = TokenCounter()
    yield made
    await made.aclose()


@contextlib.asynccontextmanager
async def closing(counter: TokenCounter) -> AsyncIterator[TokenCounter]:
    try:
        yield counter
    finally:
        await counter.aclose()


async def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10.0
    while not condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.005)


def is_gone(pid: int) -> bool:
    """Tell whether there is no such process, not even one that nobody has waited for."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


def asking(text: str) -> dict[str, Any]:
    return {
        "instructions": "Be brief.",
        "input": [
            {"type": "message", "role": "user", "content": [{"type": "input_text", "text": text}]},
            {
                "type": "function_call",
                "call_id": "c",
                "name": "look",
                "arguments": '{"at":"' + text[:99] + '"}',
            },
            {"type": "function_call_output", "call_id": "c", "output": text[::-1]},
        ],
        "tools": [{"type": "function", "name": "look", "parameters": {"type": "object"}}],
        "text": {"format": {"type": "json_schema", "schema": {"type": "object"}}},
    }


# -- exact --------------------------------------------------------------------------------


async def test_texts_and_requests_are_counted_as_tiktoken_does(
    counter: TokenCounter, exact: Callable[[str], int]
) -> None:
    for text in TEXTS.values():
        assert await counter.count_text(text) == exact(text)
        body = asking(text)
        assert await counter.count_request(body) == tokens.count_request(body, exact)
    assert await counter.count_text(TEXTS["special"]) > 10
    assert counter.pid is not None


async def test_nothing_to_count_starts_nothing(counter: TokenCounter) -> None:
    assert await counter.count_request({}) == 0
    assert await counter.count_text("") == 0
    assert await counter.count_request({"input": [{"type": "x"}]}) == tokens.ITEM_OVERHEAD
    assert counter.pid is None


async def test_what_fits_no_window_is_estimated(
    counter: TokenCounter, exact: Callable[[str], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(counting, "EXACT_BYTES", 1000)
    huge = "tokenization " * 100
    small = TEXTS["code"][:500]
    body: dict[str, Any] = {"instructions": huge, "input": small, "tools": [{"name": "f"}]}
    left = exact(small) + exact('[{"name":"f"}]') + tokens.ITEM_OVERHEAD
    assert await counter.count_request(body) == left + tokens.estimate(huge)


async def test_a_monstrous_run_takes_no_ages_and_no_process(counter: TokenCounter) -> None:
    started = time.perf_counter()
    assert await counter.count_text(" " * 1_000_000 + "x") == 7_814
    assert time.perf_counter() - started < 10.0
    assert counter.pid is not None


async def test_many_large_requests_at_once_do_not_hold_up_the_loop(exact: Callable[[str], int]) -> None:
    """24 requests of 200 KB, the first load included.

    Within a second, and with a loop that is late by less than 50 ms, where nothing else runs. A
    busy machine is late by itself, so the limits leave room and the best of three counts; in a
    thread of this process, each load alone would make the loop late by more than 200 ms.
    """
    text = "".join(path.read_text("utf-8") for path in sorted(Path(counting.__file__).parent.glob("*.py")))
    text = (text * 4)[:250_000]
    bodies = [{"input": text[1000 * number :][:200_000]} for number in range(24)]
    expected = [tokens.count_request(body, exact) for body in bodies]
    late = seconds = 0.0

    async def tick() -> None:
        nonlocal late
        while True:
            asleep = time.perf_counter()
            await asyncio.sleep(0.001)
            late = max(late, time.perf_counter() - asleep - 0.001)

    for _ in range(3):
        late = 0.0
        async with closing(TokenCounter()) as counter, asyncio.TaskGroup() as group:
            ticker = group.create_task(tick())
            started = time.perf_counter()
            counts = await asyncio.gather(*(counter.count_request(body) for body in bodies))
            seconds = time.perf_counter() - started
            ticker.cancel()
        sys.stdout.write(
            f"24 requests of 200 KB: {seconds:.3f} s, loop late by {late * 1000:.1f} ms at most\n"
        )
        assert counts == expected
        if late < 0.15 and seconds < 10.0:
            return
    pytest.fail(f"the loop was late by {late:.3f} s, the counts took {seconds:.3f} s")


async def test_the_endpoint_answers_with_the_exact_count(tmp_path: Path, exact: Callable[[str], int]) -> None:
    text = TEXTS["code"] + TEXTS["cjk"]
    async with standing(tmp_path) as stand:
        answer = await stand.post("/v1/responses/input_tokens", {"model": "gpt-5.5", "input": text})
    assert answer.status == 200
    counted = exact(text) + exact("user") + tokens.ITEM_OVERHEAD
    assert answer.json == {"object": "response.input_tokens", "input_tokens": counted}


# -- the process comes and goes -----------------------------------------------------------


async def test_a_process_that_is_gone_is_started_again(
    counter: TokenCounter, exact: Callable[[str], int], caplog: pytest.LogCaptureFixture
) -> None:
    await counter.count_text("a")
    first = counter.pid
    assert first is not None
    os.kill(first, signal.SIGKILL)
    await asyncio.to_thread(os.waitid, os.P_PID, first, os.WEXITED | os.WNOWAIT)
    assert await counter.count_text(TEXTS["cjk"]) == exact(TEXTS["cjk"])
    assert counter.pid not in (None, first)
    assert not caplog.records


async def test_without_work_it_ends_and_comes_back(exact: Callable[[str], int]) -> None:
    async with closing(TokenCounter(idle_seconds=0.0)) as counter:
        await counter.count_text("a")
        await until(lambda: counter.pid is None)
        assert await counter.count_text(TEXTS["cjk"]) == exact(TEXTS["cjk"])


async def test_closing_ends_the_process_and_who_waits_gets_an_estimate() -> None:
    counter = TokenCounter()
    await counter.count_text("a")
    pid = counter.pid
    assert pid is not None
    async with asyncio.TaskGroup() as group:
        waiting = [group.create_task(counter.count_text("abcd" * 2_000_000)) for _ in range(4)]
        await asyncio.sleep(0)
        await counter.aclose()
        assert is_gone(pid)
    assert [task.result() for task in waiting] == [2_000_000] * 4


async def test_closing_what_never_counted_is_no_work() -> None:
    await TokenCounter().aclose()


async def test_a_counter_that_nobody_closed_leaves_no_process() -> None:
    counter = TokenCounter()
    await counter.count_text("a")
    pid = counter.pid
    assert pid is not None
    # As when its loop ends: what was to end it later holds it.
    assert counter._rest is not None
    counter._rest.cancel()
    del counter
    # Its thread lets go of the last count a moment after the answer.
    await until(lambda: gc.collect() >= 0 and is_gone(pid))


async def test_a_caller_who_leaves_disturbs_nobody(
    counter: TokenCounter, exact: Callable[[str], int]
) -> None:
    async with asyncio.TaskGroup() as group:
        leaving = [group.create_task(counter.count_text(TEXTS["english"])) for _ in range(3)]
        staying = group.create_task(counter.count_text(TEXTS["cjk"]))
        await asyncio.sleep(0)
        for task in leaving:
            task.cancel()
    assert staying.result() == exact(TEXTS["cjk"])


# -- where it cannot be exact -------------------------------------------------------------


def damaged(folder: Path) -> list[str]:
    path = folder / "ranks.gz"
    path.write_bytes(encoding.RANKS.read_bytes()[:-1000])
    return command(path)


STARTS: dict[str, tuple[Callable[[Path], list[str]], str]] = {
    "damaged": (damaged, "damaged"),
    "missing": (lambda folder: command(folder / "nothing"), "FileNotFoundError"),
    # -S: no site-packages, so no tiktoken.
    "no-tiktoken": (
        lambda _: [sys.executable, "-S", "-P", encoding.__file__, str(encoding.RANKS)],
        "No module named 'tiktoken'",
    ),
    "no-program": (lambda folder: [str(folder / "nothing")], "No such file"),
    "no-word": (lambda _: [sys.executable, "-S", "-c", ""], "its process ended"),
}


@pytest.mark.parametrize("case", STARTS)
async def test_without_an_exact_counter_there_is_an_estimate_and_one_warning(
    case: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    start, reason = STARTS[case]
    async with closing(TokenCounter(start(tmp_path))) as counter:
        for text in ("abcde", *TEXTS.values()):
            assert await counter.count_text(text) == tokens.estimate(text)
            assert await counter.count_request(asking(text)) == tokens.count_request(asking(text))
        assert counter.pid is None
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "estimate" in caplog.messages[0]
    assert reason in caplog.messages[0]


@pytest.mark.parametrize(
    ("then", "text"),
    [
        pytest.param("sys.stdin.readline()", "secret words", id="dies"),
        # More than a pipe takes, so that it is the writing that hangs.
        pytest.param("time.sleep(60)", "secret words" * 100_000, id="hangs"),
    ],
)
async def test_a_count_that_kills_or_hangs_the_process_is_an_estimate(
    then: str, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    start = [sys.executable, "-S", "-c", f"import sys, time; print('ready', flush=True); {then}"]
    async with closing(TokenCounter(start, limit_seconds=1.0)) as counter:
        assert await counter.count_text(text) == tokens.estimate(text)
        assert counter.pid is None
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "secret" not in caplog.text


async def test_ending_twice_is_ending_and_what_comes_later_is_estimated() -> None:
    counter = TokenCounter()
    await counter.aclose()
    await counter.aclose()
    assert await counter.count_text("hello there") == tokens.estimate("hello there")
