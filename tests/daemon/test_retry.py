"""How often a turn is tried again, how fast, and what keeps a broken backend from being flooded."""

import asyncio
import time
from pathlib import Path

import pytest

from codex_proxy.accounts.account import BACKOFF, Backoff, Cause
from codex_proxy.protocol.wire import JsonObject
from tests.harness import standing

PASSING: list[tuple[str, JsonObject]] = [
    ("server_error", {"status": 500}),
    ("overloaded", {}),
    ("forbidden", {}),
    ("cloudflare", {}),
    ("refuse", {}),
    ("cut", {"after": 2}),
]


@pytest.fixture
def brief(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let accounts rest for a moment only, where the number of tries is the subject."""
    for cause in Cause:
        monkeypatch.setitem(BACKOFF, cause, Backoff(0.01, 0.02))


@pytest.mark.parametrize("max_retry", [0, 1, 2])
@pytest.mark.parametrize(("state", "options"), PASSING, ids=[state for state, _ in PASSING])
async def test_passing_faults_are_counted(
    tmp_path: Path, state: str, options: JsonObject, max_retry: int
) -> None:
    async with standing(tmp_path, accounts=5, max_retry=max_retry) as stand:
        for account in stand.accounts:
            account.set(state, **dict(options))
        answer = await stand.ask("hi")
        assert answer.status == 429
        assert answer.json["error"]["code"] == "rate_limit_exceeded"
        assert len(stand.sim.turns) == max_retry + 1
        # Each on an account of its own.
        assert len(set(stand.tried())) == max_retry + 1


async def test_silence_is_counted(tmp_path: Path) -> None:
    async with standing(
        tmp_path, accounts=5, max_retry=1, connect_timeout=0.1, first_byte_timeout=0.1
    ) as stand:
        stand.sim.set_all("stall", where="headers")
        assert (await stand.ask("hi")).status == 429
        assert len(stand.sim.turns) == 2


async def test_quick_refusals_are_not_counted(tmp_path: Path) -> None:
    async with standing(tmp_path, accounts=8, max_retry=0) as stand:
        stand.in_order()
        states = (
            "usage_limit", "rate_limit", "payment", "bad_model", "not_included", "insufficient_quota", "revoked",
        )  # fmt: skip
        for account, state in zip(stand.accounts, states, strict=False):
            account.set(state)
        answer = await stand.ask("hi")
        assert answer.status == 200
        assert stand.tried() == [account.name for account in stand.accounts]


async def test_quick_refusals_leave_the_retries_for_what_costs_time(tmp_path: Path) -> None:
    async with standing(tmp_path, accounts=4, max_retry=1) as stand:
        stand.in_order()
        for account, state in zip(stand.accounts, ("usage_limit", "server_error", "payment"), strict=False):
            account.set(state)
        assert (await stand.ask("hi")).status == 200
        assert stand.tried() == [account.name for account in stand.accounts]


async def test_quick_refusals_end_with_the_time_for_the_first_byte(tmp_path: Path) -> None:
    async with standing(tmp_path, accounts=6, connect_timeout=1, first_byte_timeout=0.25) as stand:
        stand.sim.set_all("usage_limit")
        stand.sim.latency = 0.1
        answer = await stand.ask("hi")
        assert answer.status == 429
        assert answer.json["error"]["code"] == "rate_limit_exceeded"
        assert 1 <= len(stand.sim.turns) <= 3


async def test_the_only_account_is_tried_again_after_its_rest(tmp_path: Path, brief: None) -> None:
    async with standing(tmp_path, accounts=1) as stand:
        (account,) = stand.accounts
        account.set("server_error", times=2)
        answer = await stand.ask("hi")
        assert answer.status == 200
        assert [turn.status for turn in stand.sim.turns] == [500, 500, 200]


@pytest.mark.parametrize("max_retry", [0, 1, 2])
async def test_the_only_account_is_not_tried_more_often_than_many(
    tmp_path: Path, brief: None, max_retry: int
) -> None:
    async with standing(tmp_path, accounts=1, max_retry=max_retry) as stand:
        stand.sim.set_all("server_error")
        assert (await stand.ask("hi")).status == 429
        assert len(stand.sim.turns) == max_retry + 1


async def test_a_short_retry_after_is_waited_for(tmp_path: Path) -> None:
    async with standing(tmp_path, accounts=1) as stand:
        (account,) = stand.accounts
        account.set("rate_limit", retry_after=0.2, times=1)
        started = time.monotonic()
        answer = await stand.ask("hi")
        assert answer.status == 200
        assert time.monotonic() - started >= 0.19
        assert len(stand.sim.turns) == 2


async def test_waiting_for_a_rate_limit_comes_to_an_end(tmp_path: Path) -> None:
    async with standing(tmp_path, accounts=1, max_retry=2) as stand:
        stand.sim.set_all("rate_limit", retry_after=0.05)
        answer = await stand.ask("hi")
        assert answer.status == 429
        assert answer.json["error"]["code"] == "rate_limit_exceeded"
        assert answer.headers["retry-after"] == "1"
        assert len(stand.sim.turns) == 3


async def test_a_long_rest_is_told_at_once(tmp_path: Path) -> None:
    async with standing(tmp_path) as stand:
        stand.sim.set_all("rate_limit", retry_after=10)
        started = time.monotonic()
        answer = await stand.ask("hi")
        assert time.monotonic() - started < 5
        assert answer.status == 429
        assert 9 <= int(answer.headers["retry-after"]) <= 10
        assert len(stand.sim.turns) == 3


async def test_a_turn_that_finds_all_at_rest_waits_for_the_first(tmp_path: Path) -> None:
    async with standing(tmp_path) as stand:
        for account, seconds in zip(stand.accounts, (30.0, 0.15, 60.0), strict=True):
            stand.known(account).hold(Cause.SERVER, time.time() + seconds)
        answer = await stand.ask("hi")
        assert answer.status == 200
        assert stand.tried() == [stand.accounts[1].name]


async def test_no_retry_means_no_waiting_either(tmp_path: Path) -> None:
    async with standing(tmp_path, max_retry=0) as stand:
        for account in stand.accounts:
            stand.known(account).hold(Cause.SERVER, time.time() + 2)
        answer = await stand.ask("hi")
        assert answer.status == 429
        assert 1 <= int(answer.headers["retry-after"]) <= 2
        assert stand.sim.turns == []


async def test_a_broken_backend_is_not_flooded(tmp_path: Path, brief: None) -> None:
    callers = 40
    async with standing(tmp_path, max_retry=2) as stand:
        stand.sim.set_all("server_error")
        stand.sim.latency = 0.03
        peak = 0

        def look() -> bool:
            nonlocal peak
            turns = stand.sim.turns
            # Once the first tries are over all others are retries.
            if sum(turn.closed.is_set() for turn in turns) >= callers:
                peak = max(peak, sum(not turn.closed.is_set() for turn in turns))
            return asking.done()

        asking = asyncio.gather(*(stand.ask("hi") for _ in range(callers)))
        await stand.until(look)
        assert {answer.status for answer in await asking} == {429}
        # A fifth of what is under way, which only gets less; and of an account that has rested, one.
        assert 1 <= peak <= callers // 5
        assert stand.daemon.executor.in_flight == 0


async def test_who_gets_no_place_to_retry_is_told(tmp_path: Path) -> None:
    async with standing(tmp_path, first_byte_timeout="300ms") as stand:
        stand.in_order()
        first, *others = stand.accounts
        first.set("server_error")
        for account in others:
            account.set("stall", where="created", seconds=0.8)
        stand.sim.latency = 0.02
        answers = await asyncio.gather(*(stand.ask("hi") for _ in range(6)))
        assert sorted(answer.status for answer in answers) == [200, 200, 200, 429, 429, 429]
        for answer in answers:
            if answer.status == 429:
                assert answer.json["error"]["code"] == "rate_limit_exceeded"
                assert answer.headers["retry-after"] == "1"
        await stand.idle()
        assert all(account.in_flight == 0 for account in stand.daemon.pool)


async def test_a_wave_of_retries_is_absorbed_by_an_account_that_is_slow(tmp_path: Path, brief: None) -> None:
    async with standing(tmp_path, accounts=2) as stand:
        stand.in_order()
        first, second = stand.accounts
        first.set("server_error")
        second.set("slow", delay=0.5)
        answers = await asyncio.gather(*(stand.ask("hi") for _ in range(12)))
        assert {answer.status for answer in answers} == {200}


async def test_a_retry_chooses_when_its_turn_has_come(tmp_path: Path, brief: None) -> None:
    """What was learned while a retry waited for its place counts."""
    async with standing(tmp_path, accounts=4) as stand:
        stand.in_order()
        first, second, third, _ = stand.accounts
        first.set("server_error", times=5)
        second.set("usage_limit")
        stand.sim.latency = 0.03
        answers = await asyncio.gather(*(stand.ask("hi") for _ in range(5)))
        assert {answer.status for answer in answers} == {200}
        # Three retries were under way at once; the others knew of the limit by then.
        assert stand.tried().count(second.name) == 3
        assert stand.tried().count(third.name) == 5


async def test_a_retry_is_over_with_its_first_good_event(tmp_path: Path) -> None:
    """A place in the budget is held for a moment, not for as long as the answer takes."""
    callers = 6
    async with standing(tmp_path) as stand:
        stand.in_order()
        first, second, _ = stand.accounts
        first.set("server_error")
        second.set("stall", where="middle")
        stand.sim.latency = 0.02
        asking = [asyncio.ensure_future(stand.ask("one two")) for _ in range(callers)]  # noqa: TID251 -- callers
        # All of them are under way at once, though only three may retry at a time.
        await stand.until(
            lambda: sum(t.account == second.name and t.status == 200 for t in stand.sim.turns) == callers
        )
        assert not any(turn.closed.is_set() for turn in stand.sim.turns if turn.account == second.name)
        for one in asking:
            one.cancel()
        await asyncio.gather(*asking, return_exceptions=True)
        await stand.idle()
