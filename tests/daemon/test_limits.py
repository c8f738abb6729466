"""Limits: who rests for how long, what a pool at its end says, and what never ends a rest early."""

import asyncio
import time
from pathlib import Path

import pytest

from codex_proxy.accounts.account import BACKOFF, Cause
from codex_proxy.accounts.state import State
from codex_proxy.protocol.wire import JsonObject
from tests.harness import STANDARD, standing

SPARK = "gpt-5.3-codex-spark"
SPARK_FAMILY = "codex_bengalfox"


# Everybody at the limit ------------------------------------------------------------------------


@pytest.mark.parametrize("codex", [False, True])
@pytest.mark.parametrize("stream", [False, True])
async def test_a_pool_at_its_end_names_the_earliest_reset(tmp_path: Path, stream: bool, codex: bool) -> None:
    async with standing(tmp_path) as stand:
        for account, seconds in zip(stand.accounts, (3600, 1800, 7200), strict=True):
            account.set("usage_limit", resets_in=seconds)
        answer = await stand.ask("hi", stream=stream, codex=codex)
        now = time.time()
        assert answer.status == 429
        error = answer.json["error"]
        assert error["type"] == "usage_limit_reached"
        assert error["code"] == "usage_limit_reached"
        assert error["resets_at"] == pytest.approx(now + 1800, abs=3)
        assert error["resets_in_seconds"] == pytest.approx(1800, abs=3)
        assert int(answer.headers["retry-after"]) == pytest.approx(1800, abs=3)
        assert answer.headers["x-should-retry"] == "false"
        assert len(stand.sim.turns) == 3
        # Known by now: nobody is asked again.
        again = await stand.ask("hi", stream=stream, codex=codex)
        assert again.status == 429
        assert again.json["error"]["resets_at"] == error["resets_at"]
        assert len(stand.sim.turns) == 3


async def test_a_short_wait_may_be_waited_for(tmp_path: Path) -> None:
    async with standing(tmp_path) as stand:
        stand.sim.set_all("usage_limit", resets_in=30)
        answer = await stand.ask("hi")
        assert answer.status == 429
        assert answer.json["error"]["code"] == "usage_limit_reached"
        assert 28 <= int(answer.headers["retry-after"]) <= 31
        assert "x-should-retry" not in answer.headers


async def test_one_account_in_passing_trouble_makes_it_a_shortage(tmp_path: Path) -> None:
    async with standing(tmp_path) as stand:
        first, second, third = stand.accounts
        first.set("usage_limit", resets_in=3600)
        second.set("usage_limit", resets_in=3600)
        third.set("rate_limit", retry_after=20)
        answer = await stand.ask("hi")
        assert answer.status == 429
        assert answer.json["error"]["code"] == "rate_limit_exceeded"
        assert answer.json["error"]["type"] == "rate_limit_exceeded"
        assert 18 <= int(answer.headers["retry-after"]) <= 20
        assert "x-should-retry" not in answer.headers


@pytest.mark.parametrize("state", ["payment", "insufficient_quota", "revoked"])
async def test_accounts_that_need_a_person_do_not_hide_the_reset_of_the_others(
    tmp_path: Path, state: str
) -> None:
    async with standing(tmp_path) as stand:
        first, second, third = stand.accounts
        first.set("usage_limit", resets_in=3600)
        second.set("usage_limit", resets_in=600)
        third.set(state)
        answer = await stand.ask("hi")
        assert answer.status == 429
        assert answer.json["error"]["code"] == "usage_limit_reached"
        assert answer.json["error"]["resets_in_seconds"] == pytest.approx(600, abs=3)


async def test_after_the_reset_the_account_serves_again(tmp_path: Path) -> None:
    async with standing(tmp_path, accounts=1) as stand:
        (account,) = stand.accounts
        account.set("usage_limit", resets_in=1.2)
        assert (await stand.ask("hi")).status == 429
        await stand.until(lambda: stand.known(account).state is State.READY)
        # The backend rounds the reset to a second; its own window is over by then.
        account.set("ok")
        assert (await stand.ask("hi")).status == 200


async def test_a_window_that_is_full_is_a_limit_too(tmp_path: Path) -> None:
    async with standing(tmp_path) as stand:
        stand.in_order()
        first, second, _ = stand.accounts
        first.use(primary=0, secondary=100)
        answer = await stand.ask("hi")
        assert answer.status == 200
        assert stand.tried() == [first.name, second.name]
        until = stand.known(first).cooling_until()
        assert until == pytest.approx(first.secondary.reset_at, abs=2)


# How long one rests ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("state", "options", "low", "high"),
    [
        ("usage_limit", {"resets_in": 5000}, 4997, 5002),
        ("usage_limit", {"resets_in": 5000, "headers": False}, 4997, 5002),
        ("usage_limit", {"resets_in": 5000, "body_reset": False}, 4997, 5002),
        ("usage_limit", {"resets_in": 5000, "headers": False, "body_reset": False}, 45, 75),
        ("rate_limit", {"retry_after": 40}, 39, 41),
        ("rate_limit", {"message": "Slow down. Please try again in 12s."}, 11, 13),
        ("rate_limit", {}, 3.5, 6.5),
        ("overloaded", {"retry_after": 25}, 24, 26),
        ("overloaded", {}, 1.0, 2.5),
        ("failed", {"code": "rate_limit_exceeded", "message": "Please try again in 33s"}, 32, 34),
        ("forbidden", {}, 23, 37),
        ("server_error", {}, 0.5, 1.3),
    ],
)
async def test_an_account_rests_as_long_as_the_backend_says(
    tmp_path: Path, state: str, options: JsonObject, low: float, high: float
) -> None:
    async with standing(tmp_path) as stand:
        stand.in_order()
        first = stand.accounts[0]
        first.set(state, **options)
        assert (await stand.ask("hi")).status == 200
        until = stand.known(first).cooling_until()
        assert until is not None
        assert low <= until - time.time() <= high


async def test_a_rest_only_grows(tmp_path: Path) -> None:
    async with standing(tmp_path, accounts=1, max_retry=0) as stand:
        (account,) = stand.accounts
        known = stand.known(account)
        account.set("usage_limit", resets_in=3600)
        assert (await stand.ask("hi")).status == 429
        long = known.cooling_until()
        stand.sim.latency = 0.05
        # Requests that were under way fail later, with less to say.
        for state, options in (("usage_limit", {"resets_in": 60}), ("rate_limit", {"retry_after": 5})):
            account.set(state, **dict(options))
            known.holds, kept = {}, dict(known.holds)
            known.state = State.READY
            late = asyncio.ensure_future(stand.ask("hi"))  # noqa: TID251 -- a caller, not the daemon
            await stand.until(lambda: known.in_flight == 1)
            known.holds = kept
            assert (await late).status == 429
            assert known.cooling_until() == long
        assert known.state is State.COOLING


@pytest.mark.parametrize("state", ["rate_limit", "overloaded", "usage_limit"])
async def test_twenty_failures_at_once_count_once(tmp_path: Path, state: str) -> None:
    options = {"headers": False, "body_reset": False} if state == "usage_limit" else {}
    cause = {"rate_limit": Cause.RATE, "overloaded": Cause.OVERLOAD, "usage_limit": Cause.LIMIT}[state]
    async with standing(tmp_path, accounts=1, max_retry=0) as stand:
        (account,) = stand.accounts
        account.set(state, **dict(options))
        stand.sim.latency = 0.05
        answers = await asyncio.gather(*(stand.ask("hi") for _ in range(20)))
        assert {answer.status for answer in answers} == {429}
        assert len(stand.sim.turns) == 20
        known = stand.known(account)
        assert known.strikes[cause].count == 1
        until = known.cooling_until()
        assert until is not None
        assert until - time.time() <= BACKOFF[cause].first * 1.2

        # The next failure, after the rest, is a second one.
        known.holds.clear()
        assert (await stand.ask("hi")).status == 429
        assert known.strikes[cause].count == 2


async def test_an_answer_forgets_older_failures(tmp_path: Path) -> None:
    async with standing(tmp_path, accounts=1, max_retry=0) as stand:
        (account,) = stand.accounts
        account.set("server_error", times=1)
        assert (await stand.ask("hi")).status == 429
        known = stand.known(account)
        assert known.strikes[Cause.SERVER].count == 1
        known.holds.clear()
        assert (await stand.ask("hi")).status == 200
        assert not known.strikes
        assert known.last_error == ""


async def test_new_tokens_bring_no_quota_back(tmp_path: Path) -> None:
    async with standing(tmp_path) as stand:
        stand.in_order()
        first, second, _ = stand.accounts
        first.set("usage_limit", resets_in=3600)
        assert (await stand.ask("hi")).status == 200
        until = stand.known(first).cooling_until()

        async with stand.session.post("/refresh") as response:
            frames = (await response.read()).decode()
        assert frames.count("event: item") == 3
        assert len(stand.sim.exchanges) == 3
        assert stand.known(first).state is State.COOLING
        assert stand.known(first).cooling_until() == until

        # Nor does a new login in its file.
        first.issue()
        stand.sim.write_auth_files(stand.auths)
        await stand.daemon.keeper.load()
        assert stand.known(first).credential.access.reveal() == first.tokens.access
        assert stand.known(first).cooling_until() == until
        assert (await stand.ask("hi")).status == 200
        assert stand.tried() == [first.name, second.name, second.name]


# A limit of one model family --------------------------------------------------------------------


async def test_a_familys_limit_leaves_the_other_models_alone(tmp_path: Path) -> None:
    async with standing(tmp_path) as stand:
        stand.in_order()
        first, second, _ = stand.accounts
        first.set("usage_limit", family=SPARK_FAMILY, resets_in=3600)
        assert (await stand.ask("hi", model=SPARK)).status == 200
        assert stand.tried() == [first.name, second.name]
        known = stand.known(first)
        assert known.state is State.READY
        assert known.family_holds[SPARK_FAMILY] == pytest.approx(time.time() + 3600, abs=3)
        # The family is left alone there, everything else is not.
        assert (await stand.ask("hi", model=SPARK)).status == 200
        assert (await stand.ask("hi", model=STANDARD)).status == 200
        assert stand.tried()[2] != first.name
        assert stand.tried()[3] == first.name


async def test_a_familys_limit_everywhere_is_told_for_the_family_only(tmp_path: Path) -> None:
    async with standing(tmp_path) as stand:
        for account, seconds in zip(stand.accounts, (900, 1200, 1500), strict=True):
            account.set("usage_limit", family=SPARK_FAMILY, resets_in=seconds)
        answer = await stand.ask("hi", model=SPARK)
        assert answer.status == 429
        assert answer.json["error"]["code"] == "usage_limit_reached"
        assert answer.json["error"]["resets_in_seconds"] == pytest.approx(900, abs=3)
        assert (await stand.ask("hi", model=STANDARD)).status == 200
        assert len(stand.sim.turns) == 4


async def test_the_accounts_own_limit_counts_for_every_model(tmp_path: Path) -> None:
    async with standing(tmp_path) as stand:
        stand.in_order()
        first, second, _ = stand.accounts
        first.set("usage_limit", family="codex", resets_in=3600)
        assert (await stand.ask("hi", model=SPARK)).status == 200
        assert (await stand.ask("hi", model=STANDARD)).status == 200
        assert stand.tried() == [first.name, second.name, second.name]


# Not entitled -----------------------------------------------------------------------------------


async def test_an_account_without_credits_is_tried_again_slowly(tmp_path: Path) -> None:
    async with standing(tmp_path) as stand:
        stand.in_order()
        first, second, _ = stand.accounts
        first.set("payment")
        assert (await stand.ask("hi")).status == 200
        known = stand.known(first)
        assert known.reason() == "deactivated_workspace"
        first_pause = known.unavailable_until - time.time()
        assert 20 * 60 < first_pause < 40 * 60

        # Its time has come, and nothing has changed: the next pause is longer.
        known.unavailable_until = time.time() - 1
        assert (await stand.ask("hi")).status == 200
        assert stand.tried() == [first.name, second.name, first.name, second.name]
        assert known.unavailable_until - time.time() > first_pause * 1.2

        # Then somebody pays.
        first.set("ok")
        known.unavailable_until = time.time() - 1
        assert (await stand.ask("hi")).status == 200
        assert stand.tried()[-1] == first.name
        assert known.state is State.READY
        assert known.unavailable_count == 0
