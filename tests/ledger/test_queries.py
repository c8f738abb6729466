"""What is asked of the ledger: pages that nothing falls out of, sums that are those of the turns."""

import random
from collections import defaultdict
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from sqlalchemy import Connection

from codex_proxy.clock import ManualClock
from codex_proxy.errors import RequestError
from codex_proxy.ledger import queries
from codex_proxy.ledger.ledger import Ledger
from codex_proxy.ledger.model import AttemptRow, Budget, Hold, Settlement, Window
from codex_proxy.ledger.queries import GROUPS, Page, Spent, UsageFilter, UsageRow
from codex_proxy.ledger.tables import SUMS
from codex_proxy.ledger.windows import DAY
from codex_proxy.storage.lock import StoreLock
from codex_proxy.trace import UsageSource
from tests.ledger.conftest import Database

# A key has one user.
HOLDERS = [
    {"user_id": "alice", "key_id": "a"},
    {"user_id": "alice", "key_id": "c"},
    {"user_id": "bob", "key_id": "b"},
]
NOON = 1_800_000_000_000 // DAY * DAY + DAY // 2


@pytest.fixture
async def ledger(database: Database) -> AsyncIterator[Ledger]:
    made = Ledger(
        database.folder,
        mode="billing",
        clock=ManualClock(NOON / 1000),
        lock=StoreLock(database.folder),
        database_url=database.url,
    )
    await made.start()
    yield made
    await made.aclose()


def settlement(request_id: str, *, at: int = NOON, **values: Any) -> Settlement:
    """A turn of "alice" by her key "a"."""
    known: dict[str, Any] = {
        "user_id": "alice", "key_id": "a", "route": "responses", "asked_model": "claude-x", "model": "gpt-5",
        "tier": "", "target": "account-1", "upstream": "", "client": "codex", "end": "completed", "status": 200,
        "error": "", "input_tokens": 100, "cached_tokens": 40, "cache_write_tokens": 5, "output_tokens": 10,
        "reasoning_tokens": 4, "source": UsageSource.BACKEND, "flags": (), "cost": 1000, "is_billed": False,
        "prices": {"input": "1.25"}, "price_id": "package/gpt-5/standard", "milliseconds": 1500,
    }  # fmt: skip
    return Settlement(request_id, at=at, **{**known, **values})


async def settle(ledger: Ledger, *settlements: Settlement) -> None:
    for one in settlements:
        ledger.settle(one)
    await ledger.write(lambda _: None)


async def all_pages(
    turn: Callable[[str | None], Callable[[Connection], Page[Any]]], ledger: Ledger
) -> list[Any]:
    """Everything, page by page."""
    rows: list[Any] = []
    before = None
    while True:
        page = await ledger.read(turn(before))
        assert page.rows or before is None
        rows += page.rows
        if page.next is None:
            return rows
        before = page.next


def turns(wanted: UsageFilter, limit: int) -> Callable[[str | None], Callable[[Connection], Page[UsageRow]]]:
    return lambda before: lambda one: queries.usage_page(one, wanted, limit=limit, before=before)


def moves(user: str | None, limit: int) -> Callable[[str | None], Callable[[Connection], Page[Any]]]:
    return lambda before: lambda one: queries.entries_page(one, user=user, limit=limit, before=before)


async def test_a_row_tells_all_that_was_settled(ledger: Ledger) -> None:
    tries = (AttemptRow("account-2", "limited", 429, 20), AttemptRow("account-1", "ok", 200, 1400))
    await settle(
        ledger,
        settlement("req_1~ab1", flags=("clamped", "blind_top_up"), attempts=tries, upstream="other"),
        settlement("req_2~ab2", cost=None, prices={}, price_id=""),
    )
    page = await ledger.read(lambda one: queries.usage_page(one, UsageFilter(), limit=10))
    assert page.next is None
    second, first = page.rows
    assert (first.request_id, first.at, first.user_id, first.key_id) == ("req_1", NOON, "alice", "a")
    assert (first.asked_model, first.model, first.upstream) == ("claude-x", "gpt-5", "other")
    assert (first.input_tokens, first.cached_tokens, first.cache_write_tokens) == (100, 40, 5)
    assert (first.output_tokens, first.reasoning_tokens, first.source) == (10, 4, "backend")
    assert (first.flags, first.prices) == (("clamped", "blind_top_up"), {"input": "1.25"})
    assert (first.cost, first.is_billed, first.attempts) == (1000, False, None)
    assert (second.request_id, second.cost, second.flags, second.prices) == ("req_2", None, (), {})
    whole = await ledger.read(lambda one: queries.usage_of(one, "req_1"))
    assert whole is not None
    assert whole.attempts == tries
    assert (whole.id, whole.request_id) == (first.id, "req_1")


async def test_a_turn_is_found_by_the_id_that_its_caller_knows(ledger: Ledger) -> None:
    await settle(
        ledger,
        *[settlement(f"mine~ab{number}", milliseconds=number) for number in range(3)],
        settlement("mine-too~ab9"),
        settlement("mine.~ab9"),
        settlement("plain"),
    )

    async def found(request_id: str) -> tuple[str, int] | None:
        row = await ledger.read(lambda one: queries.usage_of(one, request_id))
        return None if row is None else (row.request_id, row.milliseconds)

    assert await found("mine") == ("mine", 2)
    assert await found("mine-too") == ("mine-too", 1500)
    assert await found("plain") == ("plain", 1500)
    for other in ("min", "mine~", "Mine", "mine%", "", "mine~ab", "x" * 5000):
        assert await found(other) is None


async def test_pages_leave_nothing_out_and_tell_nothing_twice(ledger: Ledger) -> None:
    rng = random.Random(5)
    # Several in one moment, and some that were written down later than they were.
    made = [
        settlement(
            f"req_{number}", at=NOON - rng.randint(0, 9) * 1000, **rng.choice(HOLDERS),
            model=rng.choice(["gpt-5", "gpt-6-sol"]),
        )
        for number in range(60)
    ]  # fmt: skip
    await settle(ledger, *made)
    everything = await all_pages(turns(UsageFilter(), 7), ledger)
    assert len({row.id for row in everything}) == 60
    assert [(row.at, row.id) for row in everything] == sorted(
        ((row.at, row.id) for row in everything), reverse=True
    )
    for wanted in (
        UsageFilter(user="bob"),
        UsageFilter(key="a", model="gpt-6-sol"),
        UsageFilter(user="alice", key="b"),
        UsageFilter(user="bob", key="b"),
        UsageFilter(user="alice", key="a", since=NOON - 5000, until=NOON - 1000),
        UsageFilter(since=NOON - 2000),
        UsageFilter(model="nothing"),
    ):
        expected = {
            one.request_id
            for one in made
            if wanted.user in (None, one.user_id)
            and wanted.key in (None, one.key_id)
            and wanted.model in (None, one.model)
            and (wanted.since or 0) <= one.at < (wanted.until or NOON + 1)
        }
        for limit in (1, 5, 100):
            found = [row.request_id for row in await all_pages(turns(wanted, limit), ledger)]
            assert len(found) == len(expected)
            assert set(found) == expected
    # What comes meanwhile is on no later page.
    first = await ledger.read(turns(UsageFilter(), 10)(None))
    await settle(ledger, settlement("new"))
    rest = await ledger.read(turns(UsageFilter(), 100)(first.next))
    assert [row.id for row in rest.rows] == [row.id for row in everything[10:]]


async def test_a_wrong_cursor_is_refused(ledger: Ledger) -> None:
    for cursor in ("", "5", "a-b", "5-", "-5-5", "5-5-5", "1" * 19 + "-1", "5;--"):
        with pytest.raises(RequestError) as refused:
            await ledger.read(turns(UsageFilter(), 5)(cursor))
        assert refused.value.param == "before"


async def test_sums_are_those_of_the_turns(ledger: Ledger) -> None:
    rng = random.Random(7)
    made = [
        settlement(
            f"req_{number}", at=NOON - rng.randint(0, 3) * DAY, **rng.choice(HOLDERS),
            model=rng.choice(["gpt-5", "gpt-6-sol"]), cost=rng.choice([None, 0, 700, 9001]),
            input_tokens=rng.randint(0, 10**9), output_tokens=rng.randint(0, 10**6),
        )
        for number in range(80)
    ]  # fmt: skip
    await settle(ledger, *made)
    for wanted in (
        UsageFilter(),
        UsageFilter(user="alice"),
        UsageFilter(user="alice", key="b"),
        UsageFilter(user="bob", key="b"),
        UsageFilter(key="b", model="gpt-5"),
        UsageFilter(since=NOON - DAY, until=NOON),
        UsageFilter(until=NOON // DAY * DAY),
    ):
        for by in ((), ("user",), ("day", "model"), ("key", "user"), GROUPS):
            expected: dict[tuple[object, ...], list[int]] = defaultdict(lambda: [0] * len(SUMS))
            for one in made:
                day = one.at // DAY
                if (
                    wanted.user not in (None, one.user_id)
                    or wanted.key not in (None, one.key_id)
                    or wanted.model not in (None, one.model)
                    or (wanted.since is not None and day < wanted.since // DAY)
                    or (wanted.until is not None and day > (wanted.until - 1) // DAY)
                ):
                    continue
                place = {"user": one.user_id, "key": one.key_id, "model": one.model, "day": day}
                sums = expected[tuple(place[name] if name in by else None for name in GROUPS)]
                added = (
                    1, one.cost is not None, one.input_tokens, one.cached_tokens, one.cache_write_tokens,
                    one.output_tokens, one.reasoning_tokens, one.cost or 0, 0, 0,
                )  # fmt: skip
                for position, value in enumerate(added):
                    sums[position] += value
            found = await ledger.read(lambda one, by=by, wanted=wanted: queries.usage_sums(one, by, wanted))  # type: ignore[misc]
            assert {
                (row.user, row.key, row.model, row.day): [getattr(row, name) for name in SUMS]
                for row in found
            } == (expected)
            if "day" in by:
                days = [row.day or 0 for row in found]
                assert days == sorted(days, reverse=True)
            else:
                assert [row.cost for row in found] == sorted((row.cost for row in found), reverse=True)
    assert await ledger.read(queries.names) == {
        "users": ["alice", "bob"],
        "keys": ["a", "b", "c"],
        "models": ["gpt-5", "gpt-6-sol"],
    }


async def test_without_turns_there_is_nothing(ledger: Ledger) -> None:
    assert await ledger.read(lambda one: queries.usage_sums(one, (), UsageFilter())) == []
    assert await ledger.read(lambda one: queries.usage_page(one, UsageFilter(), limit=5)) == Page([], None)
    with pytest.raises(RequestError, match="'week'") as refused:
        await ledger.read(lambda one: queries.usage_sums(one, ("week",), UsageFilter()))
    assert refused.value.param == "by"


async def test_entries_and_audit_come_in_pages(ledger: Ledger) -> None:
    alice = await ledger.create_user("alice", is_billed=True, actor="admin")
    bob = await ledger.create_user("bob", is_billed=True, actor="page")
    for number in range(5):
        for user in (alice, bob):
            await ledger.credit(
                user.id, 100 + number, reason="test", idempotency_key=f"{user.id}{number}", actor="admin"
            )
    await settle(ledger, settlement("req_1~ab", user_id=alice.id, is_billed=True, cost=50))

    def mine(before: str | None) -> Callable[[Connection], Page[Any]]:
        return lambda one: queries.entries_page(one, user=alice.id, limit=2, before=before)

    entries = await all_pages(mine, ledger)
    assert [(one.kind, one.nanos, one.request_id) for one in entries] == [
        ("debit", -50, "req_1"),
        *[("credit", 104 - number, "") for number in range(5)],
    ]
    assert entries[0].balance_after == 460
    every = await ledger.read(lambda one: queries.entries_page(one, limit=100))
    assert len(every.rows) == 11

    def whole(before: str | None) -> Callable[[Connection], Page[Any]]:
        return lambda one: queries.audit_page(one, limit=3, before=before)

    noted = await all_pages(whole, ledger)
    assert len(noted) == 12
    assert [one.id for one in noted] == sorted((one.id for one in noted), reverse=True)
    found = await ledger.read(lambda one: queries.audit_page(one, actor="pag", target=bob.id, limit=5))
    assert [(one.actor, one.action) for one in found.rows] == [("page", "user.create")]
    assert found.rows[0].before is None
    assert found.rows[0].after is not None
    assert not (await ledger.read(lambda one: queries.audit_page(one, actor="%", limit=5))).rows
    for ask, wrong in ((queries.entries_page, "1"), (queries.audit_page, "1-1")):
        with pytest.raises(RequestError):
            await ledger.read(lambda one, ask=ask, wrong=wrong: ask(one, limit=5, before=wrong))  # type: ignore[misc]


async def test_entries_are_found_on_the_days_of_turns_and_on_those_of_owners(ledger: Ledger) -> None:
    rng = random.Random(11)
    people = [await ledger.create_user(name, actor="admin") for name in ("alice", "bob")]
    for user in people:
        await ledger.credit(user.id, 10**6, reason="test", idempotency_key=f"{user.id}-0", actor="admin")
    clock = ledger._clock
    assert isinstance(clock, ManualClock)
    for number in range(60):
        user = rng.choice(people)
        if rng.random() < 0.2:
            await ledger.credit(user.id, 5, reason="test", idempotency_key=f"more-{number}", actor="admin")
        else:
            # Some are written down days after they were.
            at = round(clock.now() * 1000) - rng.choice((0, 0, 3 * DAY))
            await settle(ledger, settlement(f"req_{number}", at=at, user_id=user.id, is_billed=True, cost=7))
        clock.advance(rng.choice((1.0, 1.0, 40_000.0, 200_000.0)))
    whole = await all_pages(moves(None, 9), ledger)
    assert len(whole) == 62
    assert [(one.at, one.id) for one in whole] == sorted(((one.at, one.id) for one in whole), reverse=True)
    for user in people:
        for limit in (1, 4, 100):
            mine = await all_pages(moves(user.id, limit), ledger)
            assert mine == [one for one in whole if one.user_id == user.id]


async def test_budgets_tell_how_they_stand(ledger: Ledger) -> None:
    alice = await ledger.create_user("alice", is_billed=False, actor="admin")
    day, hours, total = Budget(Window.DAY, 5000), Budget(Window.HOURS_5, 6000), Budget(Window.TOTAL, 7000)
    asked = (day, hours, total)

    async def standing(at: int) -> list[Spent]:
        return await ledger.read(lambda one: queries.spent(one, alice.id, asked, at))

    midnight = NOON // DAY * DAY + DAY
    assert await standing(NOON) == [
        Spent(Window.DAY, 5000, 0, midnight),
        Spent(Window.HOURS_5, 6000, 0, None),
        Spent(Window.TOTAL, 7000, 0, None),
    ]
    budgets = tuple((alice.id, one) for one in asked)
    await settle(ledger, settlement("before", user_id=alice.id, at=NOON - DAY, cost=300))
    await ledger.authorize(Hold("req_1", alice.id, "a", 10, NOON, NOON + 1000, "gpt-5", budgets))
    await settle(ledger, settlement("req_1", user_id=alice.id, budgets=budgets, at=NOON + 5))
    assert await standing(NOON + 10) == [
        Spent(Window.DAY, 5000, 1000, midnight),
        Spent(Window.HOURS_5, 6000, 1000, NOON + 5 * 3_600_000),
        Spent(Window.TOTAL, 7000, 1300, None),
    ]
    # Another day; its counters are made when they are asked for.
    assert await standing(NOON + DAY) == [
        Spent(Window.DAY, 5000, 0, midnight + DAY),
        Spent(Window.HOURS_5, 6000, 0, None),
        Spent(Window.TOTAL, 7000, 1300, None),
    ]
