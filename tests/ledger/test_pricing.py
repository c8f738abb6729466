"""An owner's own prices, and what was used priced again: nothing is taken twice, and it adds up afterwards."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import pytest
from sqlalchemy import Connection, select

from codex_proxy.clock import ManualClock
from codex_proxy.errors import RequestError
from codex_proxy.ledger import changes
from codex_proxy.ledger import pricing as module
from codex_proxy.ledger.ledger import Ledger
from codex_proxy.ledger.model import OWNER_ID, Budget, Hold, Settlement, Window
from codex_proxy.ledger.money import NANOS
from codex_proxy.ledger.prices import cost
from codex_proxy.ledger.pricing import Pricing, Rerated
from codex_proxy.ledger.tables import audit, counters, entries, prices, usage
from codex_proxy.storage.lock import StoreLock
from codex_proxy.trace import Usage, UsageSource
from tests.ledger.conftest import Database

CENT = NANOS // 100
USED = Usage(1000, 0, 0, 100, 0, UsageSource.BACKEND)
COST = 1000 * 1_250 + 100 * 10_000
TWICE = {"input": "2.50", "output": "20"}
HALF = {"input": "0.625", "output": "5"}


@dataclass
class Shop:
    """A ledger with prices, and users who have bought something."""

    ledger: Ledger
    pricing: Pricing
    clock: ManualClock
    count: int = 0

    @property
    def now(self) -> int:
        return int(self.clock.now() * 1000)

    async def user(self, nanos: int) -> str:
        self.count += 1
        user = await self.ledger.create_user(f"user {self.count}", is_billed=True, actor="test")
        if nanos:
            await self.ledger.credit(
                user.id, nanos, reason="test", idempotency_key=f"{self.count}", actor="test"
            )
        return user.id

    async def buy(
        self, user_id: str, *, model: str = "gpt-5", used: Usage = USED, is_billed: bool = True, key: str = "key",
        budgets: tuple[tuple[str, Budget], ...] = (), ended_after: int = 0,
    ) -> None:  # fmt: skip
        """A turn that is settled at today's price."""
        self.count += 1
        request_id, at = f"req_{self.count}", self.now
        price = self.pricing.book.find(model, at)
        counted = None if price is None else cost(price, used)
        await self.ledger.authorize(Hold(request_id, user_id, key, 0, at, at + 1000, model, budgets))
        await self.ledger.settled(
            Settlement(
                request_id, user_id, key, at + ended_after, "responses", model, model, "", "a", "", "other", "completed", 200, "",
                used.input_tokens, used.cached_tokens, used.cache_write_tokens, used.output_tokens, 0, used.source, (),
                None if counted is None else counted.nanos, is_billed,
                {} if counted is None else counted.prices, "" if counted is None else counted.price_id, 5, budgets,
            )
        )  # fmt: skip

    async def balance(self, user_id: str) -> int:
        user = self.ledger.directory.user(user_id)
        assert user is not None
        return user.balance

    async def rerate(self, **values: Any) -> Rerated:
        return await self.pricing.rerate(**{"since": 0, "reason": "a wrong price", "actor": "test", **values})

    async def ask(self, question: Any) -> list[Any]:
        def rows(connection: Connection) -> list[Any]:
            return list(connection.execute(question).all())

        return await self.ledger.read(rows)


@pytest.fixture
async def shop(database: Database) -> AsyncIterator[Shop]:
    clock = ManualClock()
    ledger = Ledger(
        database.folder,
        mode="billing",
        clock=clock,
        lock=StoreLock(database.folder),
        database_url=database.url,
    )
    await ledger.start()
    pricing = Pricing(ledger, clock.now)
    await pricing.load()
    yield Shop(ledger, pricing, clock)
    await ledger.aclose()


async def run_jobs(pricing: Pricing) -> None:
    for job in pricing.jobs():
        await job.run()


# -- an owner's prices --------------------------------------------------------------------


async def test_a_price_that_is_set_counts_at_once_and_after_a_restart(shop: Shop) -> None:
    own = await shop.pricing.set("gpt-5", None, None, TWICE, actor="admin")
    assert (own.model, own.tier, own.since) == ("gpt-5", "standard", shop.now)
    found = shop.pricing.book.find("gpt-5", shop.now)
    assert found == own.price
    assert found is not None
    assert found.id == f"own/{own.id}"
    assert shop.pricing.book.find("gpt-5", shop.now - 1) != found
    other = Pricing(shop.ledger, shop.clock.now)
    await other.load()
    assert other.book.find("gpt-5", shop.now) == found
    rows = await shop.ask(select(audit).order_by(audit.c.id.desc()).limit(1))
    assert [(row.actor, row.action, row.target) for row in rows] == [("admin", "price.set", "gpt-5")]


async def test_a_price_that_is_ended_counts_no_more(shop: Shop) -> None:
    before = shop.pricing.book.find("gpt-5", shop.now)
    now = await shop.pricing.set("gpt-5", "standard", None, TWICE, actor="admin")
    later = await shop.pricing.set("gpt-5", "standard", shop.now + 60_000, HALF, actor="admin")
    shop.clock.advance(10.0)
    await shop.pricing.end(later.id, actor="admin")
    # It would have begun later, and never does.
    assert shop.pricing.book.find("gpt-5", shop.now + 120_000) == before
    assert shop.pricing.book.find("gpt-5", shop.now) == now.price
    await shop.pricing.end(now.id, actor="admin")
    assert shop.pricing.book.find("gpt-5", shop.now) == before
    # What was is not changed by that.
    assert shop.pricing.book.find("gpt-5", shop.now - 1) == now.price
    for number in (10**6, later.id + 1):
        with pytest.raises(RequestError) as refused:
            await shop.pricing.end(number, actor="admin")
        assert refused.value.code == "price_not_found"


async def test_a_price_that_another_has_replaced_cannot_be_ended(shop: Shop) -> None:
    """It would take the one with it that counts, and the package's price would count again."""
    old = await shop.pricing.set("gpt-5", None, None, HALF, actor="admin")
    shop.clock.advance(10.0)
    new = await shop.pricing.set("gpt-5", None, None, TWICE, actor="admin")
    for at in (0.0, 10.0):
        shop.clock.advance(at)
        with pytest.raises(RequestError) as refused:
            await shop.pricing.end(old.id, actor="admin")
        assert (refused.value.status, refused.value.code) == (409, "price_not_current")
        assert shop.pricing.book.find("gpt-5", shop.now) == new.price
    await shop.pricing.end(new.id, actor="admin")
    # Once is enough.
    with pytest.raises(RequestError) as refused:
        await shop.pricing.end(new.id, actor="admin")
    assert refused.value.code == "price_not_current"


async def test_what_was_read_before_a_change_is_not_taken_for_what_is(shop: Shop) -> None:
    """A slow look at the database from before a change comes back after the look that followed it."""
    may_go, has_read = asyncio.Event(), asyncio.Event()
    read = shop.ledger.read

    async def slow(question: Any) -> Any:
        found = await read(question)
        if not has_read.is_set():
            has_read.set()
            await may_go.wait()
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shop.ledger, "read", slow)
        loop = asyncio.get_running_loop()
        looking = loop.create_task(shop.pricing.load())
        await has_read.wait()
        setting = loop.create_task(shop.pricing.set("gpt-5", None, None, TWICE, actor="admin"))
        await shop.ledger.write(lambda _: None)
        await asyncio.sleep(0.02)
        may_go.set()
        await asyncio.gather(looking, setting)
    assert [one.model for one in shop.pricing.book.own] == ["gpt-5"]


async def test_another_processs_change_counts_soon(shop: Shop) -> None:
    at = shop.now

    def work(connection: Connection) -> None:
        module.set_price(
            connection, model="gpt-5", tier=None, since=0, definition=TWICE, actor="elsewhere", at=at
        )

    await shop.ledger.write(work)
    assert not shop.pricing.book.own
    await run_jobs(shop.pricing)
    assert [one.model for one in shop.pricing.book.own] == ["gpt-5"]


WRONG: list[tuple[tuple[Any, Any, Any, dict[str, Any]], str]] = [
    (("", None, None, TWICE), "model"),
    (("a b", None, None, TWICE), "model"),
    ((5, None, None, TWICE), "model"),
    (("m", "fast", None, TWICE), "tier"),
    (("m", 5, None, TWICE), "tier"),
    (("m", None, -1, TWICE), "effective_from"),
    (("m", None, True, TWICE), "effective_from"),
    (("m", None, "2026", TWICE), "effective_from"),
    (("m", None, None, {"input": "1"}), "output"),
    (("m", None, None, {**TWICE, "price": "1"}), "price"),
    (("m", None, None, {**TWICE, "long": {"input": "x", "output": "1"}}), "long.input"),
]


async def test_a_wrong_price_is_refused_by_its_field(shop: Shop) -> None:
    for values, param in WRONG:
        with pytest.raises(RequestError) as refused:
            await shop.pricing.set(*values, actor="admin")
        assert refused.value.param == param
    assert shop.pricing.book.own == ()


# -- history ------------------------------------------------------------------------------


async def test_pricing_again_books_the_difference(shop: Shop) -> None:
    user = await shop.user(10 * COST)
    for _ in range(3):
        await shop.buy(user)
    await shop.buy(user, model="gpt-5-mini")
    before = await shop.balance(user)
    own = await shop.pricing.set("gpt-5", None, 0, TWICE, actor="admin")
    shop.clock.advance(1.0)
    dry = await shop.rerate(is_dry=True)
    assert await shop.balance(user) == before
    done = await shop.rerate()
    assert dry == done
    assert (done.turns, done.changed, done.unpriced) == (4, 3, 0)
    assert (done.before, done.after, done.shortfall) == (3 * COST, 6 * COST, 0)
    assert dict(done.moved) == {user: -3 * COST}
    assert await shop.balance(user) == before - 3 * COST
    rows = await shop.ask(select(usage).where(usage.c.model == "gpt-5"))
    assert {(row.cost, row.debit, row.shortfall, row.price_id) for row in rows} == {
        (2 * COST, 2 * COST, 0, f"own/{own.id}")
    }
    assert rows[0].prices.startswith('{"input":"2.50"')
    booked = await shop.ask(select(entries).where(entries.c.kind == "adjust"))
    assert {(row.nanos, row.reason, row.actor) for row in booked} == {
        (-COST, "priced again: a wrong price", "test")
    }
    assert {row.request_id for row in booked} == {row.request_id for row in rows}
    (noted,) = await shop.ask(select(audit).where(audit.c.action == "usage.rerate"))
    assert noted.target == "all models"
    assert await shop.ledger.check() == []
    # A second time there is nothing left to do.
    assert (await shop.rerate()).changed == 0
    assert await shop.ledger.check() == []


async def test_only_those_are_read_anew_whose_balance_has_moved(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_SLICE", 2)
    users = [await shop.user(10 * NANOS) for _ in range(3)]
    for user in users * 3:
        await shop.buy(user)
    await shop.pricing.set("gpt-5", None, 0, TWICE, actor="admin")
    shop.clock.advance(1.0)
    with mock.patch.object(changes, "everybody", wraps=changes.everybody) as everybody:
        assert (await shop.rerate()).changed == 9
    # For what is noted at the end; a server is also looked at for what others have changed. There were five slices.
    assert everybody.call_count <= 2
    assert [await shop.balance(user) for user in users] == [10 * NANOS - 6 * COST] * 3


async def test_what_is_cheaper_is_given_back_but_for_what_nobody_has_paid(shop: Shop) -> None:
    poor, rich = await shop.user(COST // 4), await shop.user(10 * COST)
    for user in (poor, rich):
        await shop.buy(user)
    assert await shop.balance(poor) == 0
    await shop.pricing.set("gpt-5", None, 0, HALF, actor="admin")
    shop.clock.advance(1.0)
    done = await shop.rerate()
    assert dict(done.moved) == {rich: COST // 2}
    assert done.shortfall == -(COST // 2)
    assert (await shop.balance(poor), await shop.balance(rich)) == (0, 10 * COST - COST // 2)
    rows = await shop.ask(select(usage).order_by(usage.c.id))
    assert [(row.cost, row.debit, row.shortfall) for row in rows] == [
        (COST // 2, COST // 4, COST // 2 - COST // 4),
        (COST // 2, COST // 2, 0),
    ]
    assert await shop.ledger.check() == []
    # Cheaper still: now something of what was paid comes back.
    await shop.pricing.set("gpt-5", None, 0, {"input": "0", "output": "0"}, actor="admin")
    shop.clock.advance(1.0)
    await shop.rerate()
    assert (await shop.balance(poor), await shop.balance(rich)) == (COST // 4, 10 * COST)
    assert await shop.ledger.check() == []


async def test_what_cannot_be_taken_is_a_shortfall_and_held_money_is_left_alone(shop: Shop) -> None:
    user = await shop.user(3 * COST)
    await shop.buy(user)
    at = shop.now
    await shop.ledger.authorize(Hold("open", user, "key", 2 * COST - 10, at, at + 10_000, "gpt-5"))
    await shop.pricing.set("gpt-5", None, 0, TWICE, actor="admin")
    shop.clock.advance(1.0)
    done = await shop.rerate()
    assert (dict(done.moved), done.shortfall) == ({user: -10}, COST - 10)
    found = shop.ledger.directory.user(user)
    assert found is not None
    assert (found.balance, found.held) == (2 * COST - 10, 2 * COST - 10)
    assert await shop.ledger.check() == []


async def test_only_the_span_and_the_model_are_priced_again_by_what_counted_then(shop: Shop) -> None:
    user = await shop.user(100 * COST)
    for _ in range(3):
        await shop.buy(user)
        await shop.buy(user, model="gpt-5-mini")
        shop.clock.advance(100.0)
    start = shop.now - 300_000
    await shop.pricing.set("gpt-5", None, start + 50_000, TWICE, actor="admin")
    await shop.pricing.set("gpt-5-mini", None, 0, TWICE, actor="admin")
    done = await shop.rerate(model="gpt-5", since=start, until=start + 200_000)
    assert (done.turns, done.changed) == (2, 1)
    done = await shop.rerate(since=start + 200_000)
    assert (done.turns, done.changed) == (2, 2)
    assert await shop.ledger.check() == []


async def test_a_turn_that_began_before_a_price_keeps_the_one_before(shop: Shop) -> None:
    """It was priced when it began; priced again without a change of prices, nothing may change."""
    user = await shop.user(100 * COST)
    await shop.pricing.set("gpt-5", None, shop.now + 2, TWICE, actor="admin")
    price = shop.pricing.book.find("gpt-5", shop.now)
    await shop.buy(user, ended_after=3)
    assert price is not None
    assert price.id.startswith("package/")
    shop.clock.advance(1.0)
    done = await shop.rerate()
    assert (done.turns, done.changed) == (1, 0)
    assert await shop.balance(user) == 99 * COST


async def test_two_processes_that_price_again_at_once_do_it_once(database: Database) -> None:
    """Where two write the same database, the second one finds what the first has made of each turn."""
    if not database.url:
        pytest.skip("one process alone writes a file")
    async with asyncio.timeout(30):
        clock = ManualClock()
        shops = []
        for _ in range(2):
            ledger = Ledger(
                database.folder,
                mode="billing",
                clock=clock,
                lock=StoreLock(database.folder),
                database_url=database.url,
            )
            await ledger.start()
            shops.append(Shop(ledger, Pricing(ledger, clock.now), clock))
        one, other = shops
        user = await one.user(100 * COST)
        for _ in range(20):
            await one.buy(user)
        await one.pricing.set("gpt-5", None, 0, TWICE, actor="admin")
        await other.pricing.load()
        clock.advance(1.0)
        done = await asyncio.gather(*(shop.rerate() for shop in shops))
        assert sum(each.changed for each in done) == 20
        assert await one.ledger.check() == []
        assert sum(row.cost for row in await one.ask(select(usage.c.cost))) == 40 * COST
        assert sum(row.nanos for row in await one.ask(select(entries.c.nanos))) == 60 * COST
        for shop in shops:
            await shop.ledger.aclose()


async def test_what_is_not_billed_gets_its_price_and_nobody_pays(shop: Shop) -> None:
    await shop.buy(OWNER_ID, model="house-model", is_billed=False)
    await shop.buy(OWNER_ID, is_billed=False)
    assert [row.cost for row in await shop.ask(select(usage.c.cost).order_by(usage.c.id))] == [None, COST]
    await shop.pricing.set("house-model", None, 0, HALF, actor="admin")
    shop.clock.advance(1.0)
    done = await shop.rerate()
    assert (done.changed, done.before, done.after, dict(done.moved)) == (1, 0, COST // 2, {})
    assert [row.cost for row in await shop.ask(select(usage.c.cost).order_by(usage.c.id))] == [
        COST // 2,
        COST,
    ]
    assert await shop.ledger.check() == []


async def test_what_has_no_price_any_more_stays_as_it_is(shop: Shop) -> None:
    user = await shop.user(100 * COST)
    await shop.pricing.set("house-model", None, 0, TWICE, actor="admin")
    await shop.buy(user, model="house-model")

    # As if it had never been there.
    def forget(connection: Connection) -> None:
        connection.execute(prices.delete())

    await shop.ledger.write(forget)
    await shop.pricing.load()
    shop.clock.advance(1.0)
    done = await shop.rerate()
    assert (done.turns, done.changed, done.unpriced) == (1, 0, 1)
    assert await shop.balance(user) == 98 * COST
    assert await shop.ledger.check() == []


async def test_turns_without_tokens_are_left_out(shop: Shop) -> None:
    user = await shop.user(COST)
    await shop.buy(user, used=Usage())
    shop.clock.advance(1.0)
    assert (await shop.rerate()).turns == 0


async def test_it_goes_on_in_slices_and_budgets_follow(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_SLICE", 4)
    user = await shop.user(100 * COST)
    budgets = ((user, Budget(Window.DAY, 50 * COST)), ("key", Budget(Window.TOTAL, 50 * COST)))
    for _ in range(10):
        await shop.buy(user, budgets=budgets)
    await shop.pricing.set("gpt-5", None, 0, TWICE, actor="admin")
    shop.clock.advance(1.0)
    done = await shop.rerate()
    assert (done.turns, done.changed) == (10, 10)
    found = await shop.ask(select(counters.c.owner, counters.c.spent).order_by(counters.c.owner))
    assert [tuple(row) for row in found] == [("key", 20 * COST), (user, 20 * COST)]
    assert await shop.ledger.check() == []
    # The writer knows it too: there is room for 30 more.
    at = shop.now
    hold = Hold("next", user, "key", 30 * COST + 1, at, at + 1000, "gpt-5", budgets)
    with pytest.raises(Exception, match="used up"):
        await shop.ledger.authorize(hold)
    await shop.ledger.authorize(Hold("next", user, "key", 30 * COST, at, at + 1000, "gpt-5", budgets))


async def test_a_wrong_span_is_refused_by_its_field(shop: Shop) -> None:
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"since": -1}, "since"),
        ({"since": "yesterday"}, "since"),
        ({"until": 0}, "until"),
        ({"since": 5, "until": 5}, "until"),
        ({"model": "a b"}, "model"),
        ({"model": ""}, "model"),
        ({"reason": "  "}, "reason"),
        ({"reason": "two\nlines"}, "reason"),
        ({"reason": "x" * 201}, "reason"),
    ]
    for values, param in wrong:
        with pytest.raises(RequestError) as refused:
            await shop.rerate(**values)
        assert refused.value.param == param
