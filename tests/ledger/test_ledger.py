"""The ledger as the gate and the owners use it, on both databases: what is paid, refused, repeated, left half-way."""

import asyncio
import dataclasses
import json
import random
from collections.abc import Awaitable, Callable
from typing import Any, cast

import pytest
from sqlalchemy import Connection, text

from codex_proxy.errors import BudgetUsedUp, KeyRefused, LedgerAway, OutOfFunds, RequestError
from codex_proxy.ledger.keys import digest_of, is_well_formed
from codex_proxy.ledger.ledger import Ledger
from codex_proxy.ledger.model import OWNER_ID, AttemptRow, Budget, Limits, Window
from codex_proxy.ledger.windows import DAY
from tests.ledger.conftest import Database
from tests.ledger.making import DOLLAR, NOON, Holder, clock, hold, holder, make, money, running, settlement


def rows(question: str) -> Any:
    return lambda connection: [tuple(row) for row in connection.execute(text(question))]


async def usage(ledger: Ledger, columns: str = "request_id, cost, debit, shortfall") -> list[tuple[Any, ...]]:
    found: list[tuple[Any, ...]] = await ledger.read(rows(f"SELECT {columns} FROM usage ORDER BY id"))
    return found


# -- turns ----------------------------------------------------------------------------------


async def test_a_turn_sets_aside_what_it_may_cost_and_pays_what_it_costs(database: Database) -> None:
    async with running(database) as ledger:
        team = await holder(ledger)
        await ledger.authorize(hold(team, "one", 3 * DOLLAR))
        assert money(ledger, team) == (10 * DOLLAR, 3 * DOLLAR)
        assert await ledger.top_up("one", 2 * DOLLAR)
        assert money(ledger, team) == (10 * DOLLAR, 5 * DOLLAR)
        await ledger.settled(settlement(team, "one", 4 * DOLLAR))
        assert money(ledger, team) == (6 * DOLLAR, 0)
        assert await usage(ledger) == [("one", 4 * DOLLAR, 4 * DOLLAR, 0)]
        assert await ledger.read(
            rows("SELECT kind, nanos, balance_after, request_id FROM entries ORDER BY id")
        ) == [
            ("credit", 10 * DOLLAR, 10 * DOLLAR, ""),
            ("debit", -4 * DOLLAR, 6 * DOLLAR, "one"),
        ]
        assert await ledger.check() == []
        assert ledger.statistics().holds_open == 0


async def test_where_many_are_under_way_those_who_begin_wait_for_others(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For a moment; whoever is alone waits for nobody, and neither do they when they are all that is to be expected."""
    monkeypatch.setattr("codex_proxy.ledger.writer._PACE_SECONDS", 30.0)
    async with running(database, allots=False) as ledger, asyncio.timeout(20.0):
        team = await holder(ledger)
        # Each right after the one before.
        await ledger.authorize(hold(team, "alone", 1))
        await ledger.authorize(hold(team, "alone too", 1))
        await asyncio.gather(*(ledger.authorize(hold(team, f"all {number}", 1)) for number in range(40)))
        async with asyncio.TaskGroup() as group:
            few = [group.create_task(ledger.authorize(hold(team, f"few {number}", 1))) for number in range(9)]
            await asyncio.sleep(0.1)
            assert not any(task.done() for task in few)
            # A fourth of those under way is enough; and whatever is not paced takes along what waits before it.
            await ledger.settled(settlement(team, "alone", 1))
            await asyncio.sleep(0)
            assert all(task.done() for task in few)
            for number in range(20):
                group.create_task(ledger.authorize(hold(team, f"many {number}", 1)))
        assert money(ledger, team)[1] == 70
        assert await ledger.check() == []


async def test_what_is_not_there_cannot_be_set_aside(database: Database) -> None:
    async with running(database) as ledger:
        team = await holder(ledger, 10)
        await ledger.authorize(hold(team, "one", 6))
        with pytest.raises(OutOfFunds, match="balance"):
            await ledger.authorize(hold(team, "two", 5))
        assert not await ledger.top_up("one", 5)
        assert await ledger.top_up("one", 4)
        # Nothing more may begin, and nothing ends before it has begun.
        assert not await ledger.top_up("two", 1)
        assert money(ledger, team) == (10, 10)
        await ledger.settled(settlement(team, "one", 0))
        assert money(ledger, team) == (10, 0)
        assert await ledger.check() == []


async def test_a_turn_that_costs_more_takes_what_is_free_and_no_more(database: Database) -> None:
    async with running(database) as ledger:
        team = await holder(ledger, 100)
        await ledger.authorize(hold(team, "other", 60))
        await ledger.authorize(hold(team, "one", 30))
        await ledger.settled(settlement(team, "one", 75))
        # 30 of its own and the 10 that nobody had set aside; 60 are another turn's.
        assert await usage(ledger) == [("one", 75, 40, 35)]
        assert money(ledger, team) == (60, 60)
        user = ledger.directory.user(team.user_id)
        assert user is not None
        assert user.is_past_due
        await ledger.settled(settlement(team, "other", 60))
        assert money(ledger, team) == (0, 0)
        assert await ledger.check() == []
        await ledger.credit(team.user_id, 5, reason="paid", idempotency_key="k", actor="test")
        user = ledger.directory.user(team.user_id)
        assert user is not None
        assert not user.is_past_due
        assert await ledger.check() == []


async def test_a_turn_is_settled_once(database: Database) -> None:
    async with running(database) as ledger:
        team = await holder(ledger, 100)
        await ledger.authorize(hold(team, "one", 30))
        for _ in range(3):
            ledger.settle(settlement(team, "one", 20))
        await ledger.settled(settlement(team, "one", 99))
        assert money(ledger, team) == (80, 0)
        assert await usage(ledger) == [("one", 20, 20, 0)]
        assert await ledger.check() == []


async def test_a_caller_who_leaves_while_it_is_decided_leaves_nothing_behind(database: Database) -> None:
    async with running(database) as ledger:
        team = await holder(ledger, 100)
        for number in range(20):
            waiting = asyncio.ensure_future(ledger.authorize(hold(team, f"turn {number}", 60)))  # noqa: TID251
            await asyncio.sleep(0)
            waiting.cancel()
            ledger.settle(settlement(team, f"turn {number}", 1))
        await ledger.settled(settlement(team, "last", 0))
        assert money(ledger, team) == (80, 0)
        assert await ledger.check() == []
        assert await ledger.read(rows("SELECT count(*) FROM holds")) == [(0,)]


async def test_a_settlement_of_nothing_that_was_set_aside_is_paid_from_what_there_is(
    database: Database,
) -> None:
    async with running(database) as ledger:
        team = await holder(ledger, 50)
        await ledger.settled(settlement(team, "never granted", 70))
        assert await usage(ledger) == [("never granted", 70, 50, 20)]
        nobody = dataclasses.replace(team, user_id="user_gone", key_id="key_gone")
        await ledger.settled(settlement(nobody, "of nobody", 70))
        assert (await usage(ledger))[1] == ("of nobody", 70, 0, 0)
        assert await ledger.check() == []


async def test_racing_turns_are_never_served_unpaid(database: Database) -> None:
    """50 at a time, money for 10, and each costs half to three times of what was expected."""
    dice = random.Random(7)
    step = DOLLAR // 2
    async with running(database) as ledger:
        team = await holder(ledger, 10 * DOLLAR)
        served: list[tuple[int, int]] = []

        async def turn(number: int) -> None:
            actual, held = round(DOLLAR * dice.uniform(0.5, 3.0)), DOLLAR
            try:
                await ledger.authorize(hold(team, f"turn {number}"))
            except OutOfFunds:
                return
            # As a stream does: it stops when it cannot go on.
            used = 0
            while used < actual:
                used = min(actual, held)
                if used < actual:
                    if not await ledger.top_up(f"turn {number}", step):
                        break
                    held += step
                balance, _ = money(ledger, team)
                assert balance >= 0
            await ledger.settled(settlement(team, f"turn {number}", used))
            served.append((used, held))

        async with asyncio.TaskGroup() as group:
            for number in range(50):
                group.create_task(turn(number))
        assert await ledger.check() == []
        found = await usage(ledger)
        assert len(found) == len(served)
        assert all(shortfall == 0 for *_, shortfall in found)
        paid = sum(debit for _, _, debit, _ in found)
        assert paid == sum(used for used, _ in served) <= 10 * DOLLAR
        assert money(ledger, team) == (10 * DOLLAR - paid, 0)
        assert 4 <= len(served) <= 20


async def test_racing_turns_that_cannot_be_stopped_leave_a_shortfall_that_is_known(
    database: Database,
) -> None:
    dice = random.Random(8)
    async with running(database) as ledger:
        team = await holder(ledger, 10 * DOLLAR)

        async def turn(number: int) -> None:
            try:
                await ledger.authorize(hold(team, f"turn {number}"))
            except OutOfFunds:
                return
            await asyncio.sleep(0)
            await ledger.settled(settlement(team, f"turn {number}", round(DOLLAR * dice.uniform(0.5, 3.0))))

        async with asyncio.TaskGroup() as group:
            for number in range(50):
                group.create_task(turn(number))
        assert await ledger.check() == []
        for _, cost, debit, shortfall in await usage(ledger):
            assert cost == debit + shortfall
            # What was set aside is always paid.
            assert debit >= min(cost, DOLLAR)
        assert money(ledger, team)[1] == 0


async def test_where_nothing_is_paid_nothing_is_set_aside_and_what_it_costs_is_known(
    database: Database,
) -> None:
    async with running(database, mode="personal") as ledger:
        team = await holder(ledger, 0)
        await ledger.authorize(hold(team, "one"))
        assert await ledger.top_up("one", DOLLAR)
        assert await ledger.read(rows("SELECT count(*) FROM holds")) == [(0,)]
        await ledger.settled(settlement(team, "one", 5, is_billed=False))
        await ledger.settled(settlement(team, "two", None, is_billed=False))
        assert await usage(ledger) == [("one", 5, 0, 0), ("two", None, 0, 0)]
        assert await ledger.check() == []
        assert await ledger.read(rows("SELECT turns, priced, cost, input_tokens FROM usage_days")) == [
            (2, 1, 5, 2_000)
        ]


async def test_attempts_are_kept_where_there_is_more_to_say(database: Database) -> None:
    async with running(database) as ledger:
        team = await holder(ledger)
        tries = (AttemptRow("a", "overloaded", 503, 20), AttemptRow("b", "ok", 200, 900))
        await ledger.settled(settlement(team, "plain", 1))
        await ledger.settled(settlement(team, "second", 1, attempts=tries))
        assert await ledger.read(
            rows(
                "SELECT request_id, number, target, outcome, status, milliseconds FROM usage_attempts ORDER BY number"
            )
        ) == [("second", 1, "a", "overloaded", 503, 20), ("second", 2, "b", "ok", 200, 900)]


ABSURD: list[dict[str, Any]] = [
    {"asked_model": "gpt\0\0", "error": "\0"},
    {"asked_model": "\ud800half", "client": "\udfff"},
    {"asked_model": "ü" * 100_000},
    {"input_tokens": 10**30, "cost": 10**30},
    {"output_tokens": -5, "cost": -5},
    {"input_tokens": 12.0, "cached_tokens": float("nan"), "milliseconds": float("inf")},
    {"status": None, "cost": 1.5},
    {"flags": ("\0",), "attempts": (AttemptRow("\ud800", "\0", 10**12, -1),)},
]


async def test_absurd_values_do_not_harm_the_others(database: Database) -> None:
    async with running(database) as ledger:
        team = await holder(ledger, 1_000)
        for number in range(len(ABSURD)):
            await ledger.authorize(hold(team, f"odd {number}", 10))
        for number, values in enumerate(ABSURD):
            ledger.settle(settlement(team, f"plain {number}", 10))
            ledger.settle(settlement(team, f"odd {number}", **{"cost": 5, **values}))
        await ledger.settled(settlement(team, "last", 10))
        found = await usage(ledger, "request_id, flags")
        assert len(found) == 2 * len(ABSURD) + 1
        for request_id, flags in found:
            assert ("odd" in flags.split()) is request_id.startswith("odd"), request_id
        assert await ledger.check() == []
        assert ledger.statistics().writer.refused == 0


async def test_one_that_the_database_will_not_have_harms_no_other(
    database: Database, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("codex_proxy.ledger.ledger.clean", lambda one: one)
    async with running(database) as ledger:
        team = await holder(ledger, 1_000)
        await ledger.authorize(hold(team, "bad", 500))
        bad = settlement(team, "bad", 5, asked_model=None)
        for number in range(10):
            ledger.settle(settlement(team, f"turn {number}", 10))
            if number == 4:
                ledger.settle(bad)
        await ledger.settled(settlement(team, "last", 10))
        assert len(await usage(ledger)) == 12
        assert money(ledger, team) == (890, 0)
        assert ledger.statistics().writer.refused == 1
        assert (await ledger.read(rows("SELECT \"end\" FROM usage WHERE request_id = 'bad'"))) == [("lost",)]
        assert await ledger.check() == []
    assert "bad" in caplog.text
    kept = database.folder / "ledger-refused.jsonl"
    assert kept.stat().st_mode & 0o777 == 0o600
    assert [(one["request_id"], one["cost"]) for one in map(json.loads, kept.read_text().splitlines())] == [
        ("bad", 5)
    ]


# -- budgets --------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["personal", "billing"])
async def test_a_budget_is_used_up_and_comes_back_with_its_window(database: Database, mode: Any) -> None:
    at = clock()
    async with running(database, mode=mode, at=at) as ledger:
        team = await holder(ledger, 100 * DOLLAR)
        budgets = ((team.key_id, Budget(Window.DAY, 2 * DOLLAR)),)
        await ledger.authorize(hold(team, "one", DOLLAR, budgets=budgets))
        await ledger.authorize(hold(team, "two", DOLLAR, budgets=budgets))
        # Held counts as spent.
        with pytest.raises(BudgetUsedUp) as caught:
            await ledger.authorize(hold(team, "three", 1, budgets=budgets))
        assert caught.value.resets_at == (NOON + DAY // 2) / 1_000
        assert caught.value.retry_after == DAY / 2_000
        assert not await ledger.top_up("one", 1)
        await ledger.settled(settlement(team, "one", DOLLAR, budgets=budgets))
        await ledger.settled(settlement(team, "two", DOLLAR // 2, budgets=budgets))
        await ledger.authorize(hold(team, "four", DOLLAR // 2, budgets=budgets))
        await ledger.settled(settlement(team, "four", DOLLAR // 2, budgets=budgets))
        with pytest.raises(BudgetUsedUp):
            # Nothing is left, whatever it would cost.
            await ledger.authorize(hold(team, "five", 0, budgets=budgets))
        await ledger.authorize(hold(team, "six", DOLLAR, at=NOON + DAY, budgets=budgets))
        await ledger.settled(settlement(team, "six", DOLLAR, at=NOON + DAY, budgets=budgets))
        assert await ledger.check() == []


async def test_a_budget_counts_what_was_spent_before_there_was_one(database: Database) -> None:
    async with running(database) as ledger:
        team = await holder(ledger, 100)
        for number, at in enumerate((NOON - 40 * DAY, NOON - DAY, NOON)):
            await ledger.settled(settlement(team, f"turn {number}", 10, at=at))
        for window, spent in ((Window.DAY, 10), (Window.TOTAL, 30)):
            for owner in (team.user_id, team.key_id):
                budgets = ((owner, Budget(window, spent + 5)),)
                await ledger.authorize(hold(team, f"fits {window} {owner}", 5, budgets=budgets))
                await ledger.settled(settlement(team, f"fits {window} {owner}", 0))
                with pytest.raises(OutOfFunds) as caught:
                    await ledger.authorize(hold(team, "too much", 6, budgets=budgets))
                assert isinstance(caught.value, BudgetUsedUp) is (window is not Window.TOTAL)
        assert await ledger.check() == []


async def test_five_hours_begin_with_the_first_use(database: Database) -> None:
    hour = 3_600_000
    async with running(database, mode="personal") as ledger:
        team = await holder(ledger, 0)
        budgets = ((team.user_id, Budget(Window.HOURS_5, 100)),)

        async def turn(name: str, hours: float, cost: int = 60) -> None:
            at = NOON + round(hours * hour)
            await ledger.authorize(hold(team, name, 1, at=at, budgets=budgets))
            await ledger.settled(settlement(team, name, cost, at=at, is_billed=False, budgets=budgets))

        await turn("one", 0.0)
        await turn("two", 4.0)
        with pytest.raises(BudgetUsedUp) as caught:
            await turn("three", 4.9)
        assert caught.value.resets_at == (NOON + 5 * hour) / 1_000
        await turn("four", 7.0)
        await turn("five", 11.9)
        with pytest.raises(BudgetUsedUp) as caught:
            await turn("six", 11.95)
        assert caught.value.resets_at == (NOON + 12 * hour) / 1_000
        assert await ledger.check() == []


async def test_a_clock_that_is_set_back_and_forth_changes_no_sum(database: Database) -> None:
    async with running(database, mode="personal") as ledger:
        team = await holder(ledger, 0)
        budgets = tuple((team.user_id, Budget(window, 1_000)) for window in Window)
        moments = [0, DAY, 0, -DAY, 3 * 3_600_000, -2 * 3_600_000, 400 * DAY, 1]
        for number, offset in enumerate(moments):
            at = NOON + offset
            await ledger.authorize(hold(team, f"turn {number}", 1, at=at, budgets=budgets))
            await ledger.settled(
                settlement(team, f"turn {number}", 10, at=at, is_billed=False, budgets=budgets)
            )
        assert await ledger.check() == []
        # One that is used up stays so, whatever the clock says.
        spent = 10 * len(moments)
        with pytest.raises(OutOfFunds):
            await ledger.authorize(
                hold(
                    team, "x", 1, at=NOON - 900 * DAY, budgets=((team.user_id, Budget(Window.TOTAL, spent)),)
                )
            )


async def test_racing_turns_do_not_overrun_a_budget(database: Database) -> None:
    async with running(database, mode="personal") as ledger:
        team = await holder(ledger, 0)
        budgets = ((team.key_id, Budget(Window.MONTH, 100)), (team.user_id, Budget(Window.WEEK, 1_000)))

        async def turn(number: int) -> bool:
            try:
                await ledger.authorize(hold(team, f"turn {number}", 10, budgets=budgets))
            except BudgetUsedUp:
                return False
            await asyncio.sleep(0)
            await ledger.settled(settlement(team, f"turn {number}", 10, is_billed=False, budgets=budgets))
            return True

        served = await asyncio.gather(*[turn(number) for number in range(50)])
        assert sum(served) == 10
        assert await ledger.check() == []


# -- who may --------------------------------------------------------------------------------


async def test_who_is_suspended_or_revoked_begins_nothing(database: Database) -> None:
    async with running(database) as ledger:
        team = await holder(ledger)
        await ledger.update_user(team.user_id, {"status": "suspended"}, "test")
        with pytest.raises(KeyRefused, match="suspended"):
            await ledger.authorize(hold(team, "one"))
        await ledger.update_user(team.user_id, {"status": "active"}, "test")
        await ledger.authorize(hold(team, "two"))
        await ledger.update_key(team.key_id, {"expires": NOON + 1_000}, "test")
        await ledger.authorize(hold(team, "three", at=NOON + 999))
        with pytest.raises(KeyRefused, match="expired"):
            await ledger.authorize(hold(team, "four", at=NOON + 1_000))
        await ledger.revoke_key(team.key_id, "test")
        with pytest.raises(KeyRefused, match="revoked"):
            await ledger.authorize(hold(team, "five"))
        # What has begun goes on.
        assert await ledger.top_up("two", 1)
        for name in ("two", "three"):
            await ledger.settled(settlement(team, name, 1))
        assert await ledger.check() == []


async def test_keys_are_found_by_their_digest_and_never_kept(database: Database) -> None:
    at = clock()
    async with running(database, at=at) as ledger:
        user = await ledger.create_user("team", actor="test")
        key, secret = await ledger.create_key(user.id, "laptop", limits=Limits(concurrency=3), actor="test")
        assert is_well_formed(secret)
        assert key.hint == f"{secret[:6]}...{secret[-4:]}"
        assert ledger.directory.key_by_digest(digest_of(secret)) == key
        assert ledger.directory.key_by_digest(digest_of("sk-other")) is None
        rotated, new = await ledger.rotate_key(key.id, 60, "test")
        assert rotated.id == key.id
        assert new != secret
        for one in (secret, new):
            assert ledger.directory.key_by_digest(digest_of(one)) == rotated
        at.advance(60)
        assert ledger.directory.key_by_digest(digest_of(secret)) is None
        assert ledger.directory.key_by_digest(digest_of(new)) == rotated
        await ledger.rotate_key(key.id, 0, "test")
        assert ledger.directory.key_by_digest(digest_of(new)) is None
        revoked = await ledger.revoke_key(key.id, "test")
        assert revoked.status == "revoked"
        with pytest.raises(RequestError, match="revoked"):
            await ledger.rotate_key(key.id, 0, "test")
        everything = str(await ledger.read(_everything))
        assert secret not in everything
        assert new not in everything
    async with running(database, at=at) as again:
        assert again.directory.key(key.id) == revoked
        assert again.directory.users()[0].id == OWNER_ID


def _everything(connection: Connection) -> list[Any]:
    return [
        [tuple(row) for row in connection.execute(text(f"SELECT * FROM {table}"))]
        for table in ("users", "client_keys", "audit", "entries", "state")
    ]


async def test_when_a_key_was_used_is_written_now_and_then(database: Database) -> None:
    async with running(database) as ledger:
        team = await holder(ledger)
        (used,) = [job for job in ledger.jobs() if job.name == "ledger-used"]
        assert used.every() == 60
        ledger.settle(settlement(team, "one", 1, at=NOON + 5))
        await ledger.settled(settlement(team, "two", 1))
        assert await ledger.read(rows("SELECT last_used FROM client_keys")) == [(None,)]
        ledger.settle(settlement(team, "three", 1, at=NOON + 9))
        await used.run()
        await ledger.settled(settlement(team, "four", 1))
        assert await ledger.read(rows("SELECT last_used FROM client_keys")) == [(NOON + 9,)]
        key = ledger.directory.key(team.key_id)
        assert key is not None
        assert key.last_used == NOON + 9


# -- what owners do -------------------------------------------------------------------------


async def test_a_credit_is_given_once_for_each_idempotency_key(database: Database) -> None:
    async with running(database) as ledger:
        team = await holder(ledger, 0)
        entries = [
            await ledger.credit(team.user_id, 100, reason="paid", idempotency_key="a", actor="test")
            for _ in range(3)
        ]
        assert len({entry.id for entry in entries}) == 1
        both = await asyncio.gather(*[
            ledger.credit(team.user_id, 7, reason="paid", idempotency_key="b", actor="test") for _ in range(5)
        ])
        assert len({entry.id for entry in both}) == 1
        assert money(ledger, team) == (107, 0)
        with pytest.raises(RequestError) as caught:
            await ledger.credit(team.user_id, 101, reason="paid", idempotency_key="a", actor="test")
        assert (caught.value.status, caught.value.param) == (409, "idempotency_key")
        assert await ledger.check() == []


async def test_what_turns_have_set_aside_cannot_be_taken(database: Database) -> None:
    async with running(database) as ledger:
        team = await holder(ledger, 100)
        await ledger.authorize(hold(team, "one", 60))
        with pytest.raises(RequestError, match=r"0\.00000004 dollars can be taken"):
            await ledger.credit(
                team.user_id, -41, kind="adjust", reason="back", idempotency_key="x", actor="test"
            )
        entry = await ledger.credit(
            team.user_id, -40, kind="adjust", reason="back", idempotency_key="x", actor="test"
        )
        assert entry.balance_after == 60
        await ledger.settled(settlement(team, "one", 60))
        assert money(ledger, team) == (0, 0)
        assert await ledger.check() == []


UNFIT: list[tuple[Callable[[Ledger, Holder], Awaitable[Any]], str]] = [
    (lambda ledger, team: ledger.create_user("", actor="test"), "name"),
    (lambda ledger, team: ledger.create_user("a\nb", actor="test"), "name"),
    (lambda ledger, team: ledger.create_user("x" * 101, actor="test"), "name"),
    (lambda ledger, team: ledger.create_user("team", actor="test"), "name"),
    (lambda ledger, team: ledger.create_user("y", actor=""), "actor"),
    (lambda ledger, team: ledger.create_user("y", is_billed=cast(bool, 1), actor="test"), "is_billed"),
    (lambda ledger, team: ledger.update_user(team.user_id, {"balance": 5}, "test"), "balance"),
    (lambda ledger, team: ledger.update_user(team.user_id, {"status": "gone"}, "test"), "status"),
    (lambda ledger, team: ledger.update_user("user_x", {}, "test"), "user"),
    (lambda ledger, team: ledger.update_user(OWNER_ID, {"is_billed": True}, "test"), "is_billed"),
    (lambda ledger, team: ledger.update_user(OWNER_ID, {"status": "suspended"}, "test"), "status"),
    (lambda ledger, team: ledger.create_key("user_x", "k", actor="test"), "user"),
    (lambda ledger, team: ledger.create_key(team.user_id, "k", expires=-1, actor="test"), "expires"),
    (
        lambda ledger, team: ledger.create_key(team.user_id, "k", limits=Limits(concurrency=0), actor="test"),
        "limits.concurrency",
    ),
    (
        lambda ledger, team: ledger.create_key(
            team.user_id, "k", limits=Limits(networks=("10.0.0.0/99",)), actor="t"
        ),
        "limits.networks.0",
    ),
    (
        lambda ledger, team: ledger.create_key(
            team.user_id, "k", limits=Limits(budgets=(Budget(Window.DAY, 1),) * 2), actor="test"
        ),
        "limits.budgets.1.window",
    ),
    (lambda ledger, team: ledger.update_key(team.key_id, {"digest": b""}, "test"), "digest"),
    (lambda ledger, team: ledger.update_key("key_x", {}, "test"), "key"),
    (
        lambda ledger, team: ledger.credit(team.user_id, 0, reason="r", idempotency_key="k", actor="test"),
        "amount",
    ),
    (
        lambda ledger, team: ledger.credit(team.user_id, -5, reason="r", idempotency_key="k", actor="test"),
        "amount",
    ),
    (
        lambda ledger, team: ledger.credit(
            team.user_id, 10**19, reason="r", idempotency_key="k", actor="test"
        ),
        "amount",
    ),
    (
        lambda ledger, team: ledger.credit(team.user_id, 5, reason="", idempotency_key="k", actor="test"),
        "reason",
    ),
    (
        lambda ledger, team: ledger.credit(team.user_id, 5, reason="r", idempotency_key="", actor="test"),
        "idempotency_key",
    ),
]


async def test_what_does_not_fit_is_refused_by_name(sqlite: Database) -> None:
    async with running(sqlite) as ledger:
        team = await holder(ledger, 100)
        before = await ledger.read(rows("SELECT count(*) FROM audit"))
        for number, (change, param) in enumerate(UNFIT):
            with pytest.raises(RequestError) as caught:
                await change(ledger, team)
            assert caught.value.param == param, number
        assert await ledger.read(rows("SELECT count(*) FROM audit")) == before
        assert await ledger.check() == []


async def test_everything_an_owner_does_is_written_down(database: Database) -> None:
    async with running(database) as ledger:
        team = await holder(ledger, 100)
        limits = Limits(models=("gpt-5*",), budgets=(Budget(Window.DAY, DOLLAR),), tokens_per_minute=5)
        await ledger.update_user(team.user_id, {"limits": limits, "name": "the team"}, "alice")
        await ledger.update_user(team.user_id, {"name": "the team"}, "alice")
        await ledger.update_key(team.key_id, {"limits": limits}, "alice")
        await ledger.rotate_key(team.key_id, 0, "alice")
        await ledger.revoke_key(team.key_id, "alice")
        assert ledger.directory.user(team.user_id).limits == limits  # type: ignore[union-attr]
        found = await ledger.read(rows("SELECT actor, action, target FROM audit ORDER BY id"))
        assert found == [
            ("test", "user.create", team.user_id),
            ("test", "key.create", team.key_id),
            ("test", "user.credit", team.user_id),
            ("alice", "user.update", team.user_id),
            ("alice", "key.update", team.key_id),
            ("alice", "key.rotate", team.key_id),
            ("alice", "key.revoke", team.key_id),
        ]
    async with running(database) as again:
        assert again.directory.user(team.user_id).limits == limits  # type: ignore[union-attr]


async def test_what_was_written_down_cannot_be_changed(database: Database) -> None:
    async with running(database) as ledger:
        await holder(ledger, 100)
        for table in ("entries", "audit"):
            for change in (f"UPDATE {table} SET actor = 'nobody'", f"DELETE FROM {table}"):
                with pytest.raises(Exception, match=f"rows of {table} stay as they are"):
                    await ledger.write(lambda connection, change=change: connection.execute(text(change)))  # type: ignore[misc]
        assert await ledger.check() == []


async def test_a_failing_change_harms_no_other(database: Database) -> None:
    async with running(database) as ledger:
        team = await holder(ledger, 1_000)

        def fail(connection: Connection) -> None:
            connection.execute(text("UPDATE users SET balance = balance + 1"))
            raise ZeroDivisionError

        turns = [ledger.authorize(hold(team, f"turn {number}", 10)) for number in range(10)]
        results = await asyncio.gather(*turns[:5], ledger.write(fail), *turns[5:], return_exceptions=True)
        assert [type(one) for one in results if one is not None] == [ZeroDivisionError]
        assert money(ledger, team) == (1_000, 100)
        for number in range(10):
            ledger.settle(settlement(team, f"turn {number}", 10))
        await ledger.settled(settlement(team, "last", 0))
        assert money(ledger, team) == (900, 0)
        assert await ledger.check() == []


async def test_a_change_from_outside_the_book_is_seen_by_the_next_turn(database: Database) -> None:
    async with running(database) as ledger:
        team = await holder(ledger, 100)
        await ledger.settled(settlement(team, "one", 10))
        changes: list[bool] = []
        ledger.on_change.append(lambda: changes.append(True))
        await ledger.write(
            lambda connection: connection.execute(
                text("UPDATE users SET status = 'suspended' WHERE name = 'team'")
            )
        )
        assert changes
        with pytest.raises(KeyRefused):
            await ledger.authorize(hold(team, "two"))


# -- life -----------------------------------------------------------------------------------


async def test_what_adds_up_is_checked(database: Database) -> None:
    async with running(database) as ledger:
        team = await holder(ledger, 100)
        await ledger.authorize(hold(team, "open", 10))
        budgets = ((team.user_id, Budget(Window.DAY, 100)),)
        await ledger.authorize(hold(team, "one", 10, budgets=budgets))
        await ledger.settled(settlement(team, "one", 10))
        assert await ledger.check() == []
        for damage, found in [
            ("UPDATE users SET balance = balance + 1 WHERE balance > 0", "sum of the entries"),
            ("UPDATE users SET held = held - 1 WHERE held > 0", "open holds"),
            ("UPDATE holds SET nanos = nanos + 1", "open holds"),
            ("UPDATE usage SET cost = cost + 1", "debits and shortfalls"),
            ("UPDATE usage SET debit = debit + 1, cost = cost + 1", "turns have paid"),
            ("UPDATE usage_days SET turns = turns + 1", "sums of days"),
            ("UPDATE counters SET spent = spent + 1", "counter"),
        ]:
            undo = damage.replace("+", "~").replace("-", "+").replace("~", "-")
            await ledger.write(lambda connection, damage=damage: connection.execute(text(damage)))  # type: ignore[misc]
            wrong = await ledger.check()
            assert any(found in one for one in wrong), (damage, wrong)
            assert team.user_id in str(wrong)
            await ledger.write(lambda connection, undo=undo: connection.execute(text(undo)))  # type: ignore[misc]
            assert await ledger.check() == []


async def test_after_its_end_nothing_begins(database: Database) -> None:
    async with running(database) as ledger:
        team = await holder(ledger, 100)
        await ledger.authorize(hold(team, "one", 10))
        ledger.settle(settlement(team, "one", 10))
        await ledger.aclose()
        with pytest.raises(LedgerAway):
            await ledger.authorize(hold(team, "two", 10))
        with pytest.raises(LedgerAway):
            await ledger.create_user("x", actor="test")
    async with running(database) as again:
        assert await usage(again) == [("one", 10, 10, 0)]
        assert await again.check() == []
    if database.is_file:
        assert sorted(path.name for path in database.folder.iterdir()) == ["ledger.db", "store.lock"]
    else:
        assert list(database.folder.iterdir()) == []


async def test_a_turn_that_nobody_settles_is_released_and_told(database: Database) -> None:
    at = clock()
    async with running(database, at=at) as ledger:
        team = await holder(ledger, 100)
        await ledger.authorize(hold(team, "forgotten", 30))
        await ledger.authorize(hold(team, "alive", 30))
        at.advance(500)
        assert await ledger.top_up("alive", 1)
        at.advance(200)
        await ledger.reap()
        assert money(ledger, team) == (100, 31)
        assert await usage(ledger, 'request_id, "end", cost, debit') == [("forgotten", "lost", None, 0)]
        assert ledger.statistics().writer.reaped == 1
        assert await ledger.check() == []
        # It was alive after all.
        await ledger.settled(settlement(team, "forgotten", 40))
        await ledger.settled(settlement(team, "alive", 10))
        assert await usage(ledger) == [("forgotten", 40, 40, 0), ("alive", 10, 10, 0)]
        assert money(ledger, team) == (50, 0)
        assert await ledger.check() == []


async def test_a_wall_clock_that_jumps_releases_nothing(database: Database) -> None:
    at = clock()
    async with running(database, at=at) as ledger:
        team = await holder(ledger, 100)
        await ledger.authorize(hold(team, "one", 30))
        at._now += 86_400.0
        await ledger.reap()
        at._now -= 2 * 86_400.0
        await ledger.reap()
        assert money(ledger, team) == (100, 30)
        await ledger.settled(settlement(team, "one", 30))
        assert await ledger.check() == []


async def test_a_second_daemon_on_one_file_is_refused(
    sqlite: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("codex_proxy.ledger.ledger._LOCK_SECONDS", 0.0)
    async with running(sqlite):
        with pytest.raises(Exception, match=r"ledger = billing: another process uses .*ledger\.db"):
            await make(sqlite).start()
