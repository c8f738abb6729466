"""What becomes of allotments when the database fails in odd ways, and at random."""

import asyncio
import random
import time
from collections.abc import Callable
from typing import Any

import pytest

from codex_proxy.errors import LedgerAway, OutOfFunds, ProxyError
from codex_proxy.ledger.bases import Away
from codex_proxy.ledger.ledger import Ledger
from codex_proxy.ledger.model import Budget, Window
from tests.ledger.conftest import Database
from tests.ledger.making import Holder, clock, hold, holder, money, running, settlement
from tests.ledger.test_allotments import PLENTY, TURN, allotted, begins, flush
from tests.ledger.test_faults import count, soon, until

__all__ = ["soon"]


def failing(
    ledger: Ledger,
    monkeypatch: pytest.MonkeyPatch,
    before: Callable[[], None],
    after: Callable[[], None] = lambda: None,
) -> None:
    """Have *before* and *after* be called with each transaction; if it is not one of turns, *before* may be away only."""
    own: Any = ledger._writer
    real = own._transaction

    def transaction(work: Any, **named: Any) -> Any:
        is_of_turns = work.__qualname__.startswith("Writer._apply.")
        try:
            before()
        except RuntimeError:
            if is_of_turns:
                raise
        done = real(work, **named)
        if is_of_turns:
            after()
        return done

    monkeypatch.setattr(own, "_transaction", transaction)


class Once:
    """Fails when it is due, and then no more."""

    def __init__(self, error: type[Exception], *, is_due: bool = True) -> None:
        self.error = error
        self.is_due = is_due

    def __call__(self) -> None:
        if self.is_due:
            self.is_due = False
            raise self.error("once")


async def settle_all(ledger: Ledger, of: Holder, *names: str) -> None:
    for name in names:
        await ledger.settled(settlement(of, name, TURN))


async def test_one_failure_costs_nobody_what_was_taken_or_given_back(
    sqlite: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a transaction with nothing else in it."""
    now = clock()
    async with running(sqlite, at=now) as ledger:
        team = await holder(ledger, PLENTY)
        await allotted(ledger, team)
        once = Once(RuntimeError, is_due=False)
        monkeypatch.setattr(ledger._writer, "_look", lambda: None)
        failing(ledger, monkeypatch, once)
        once.is_due = True
        assert begins(ledger, team, "second")
        await until(lambda: not once.is_due)
        await flush(ledger, team)
        assert money(ledger, team) == (PLENTY, 2 * TURN)
        once.is_due = True
        now.advance(10.0)
        await ledger.recall_idle()
        await until(lambda: not once.is_due)
        await flush(ledger, team)
        assert not ledger._writer._allotted
        await settle_all(ledger, team, "second")
        once.is_due = True
        now.advance(700.0)
        await ledger.reap()
        await until(lambda: not once.is_due)
        await flush(ledger, team)
        assert money(ledger, team) == (PLENTY - TURN, 0)
        assert ledger.statistics().writer.reaped == 1


@pytest.mark.parametrize("error", [Away, RuntimeError])
async def test_what_was_written_though_it_seemed_not_is_written_once(
    sqlite: Database, monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    async with running(sqlite) as ledger:
        team = await holder(ledger, PLENTY)
        await allotted(ledger, team)
        failing(ledger, monkeypatch, lambda: None, Once(error))
        assert begins(ledger, team, "second")
        await settle_all(ledger, team, "second")
        await until(lambda: not (ledger.is_away or ledger.statistics().writer.spooled))
        await settle_all(ledger, team, "first")
        assert money(ledger, team) == (PLENTY - 2 * TURN, 0)
        assert ledger.statistics().writer.refused == 0
        assert await ledger.check() == []


@pytest.mark.parametrize("times", [1, 2])
async def test_what_has_begun_comes_first_when_the_database_is_back(
    sqlite: Database, monkeypatch: pytest.MonkeyPatch, times: int
) -> None:
    """Also when it fails then: first in an odd way, then again as it did before."""
    async with running(sqlite) as ledger:
        team = await holder(ledger, PLENTY)
        await allotted(ledger, team)
        own = ledger._writer
        failures: list[Exception] = []
        is_cut = True

        def fail() -> None:
            if is_cut:
                raise Away("cut")
            if own._unsure == [] and failures:
                raise failures.pop(0)

        failing(ledger, monkeypatch, fail)
        assert begins(ledger, team, "second")
        assert begins(ledger, team, "third")
        await settle_all(ledger, team, "second")
        assert ledger.is_away
        failures = [RuntimeError("odd"), Away("cut again")][:times]
        is_cut = False
        await until(lambda: not (ledger.is_away or ledger.statistics().writer.spooled))
        assert failures == []
        await settle_all(ledger, team, "first", "third")
        # What is left to be done is done with a look.
        await ledger.reap()
        await flush(ledger, team)
        assert money(ledger, team) == (PLENTY - 3 * TURN, 0)
        assert await ledger.check() == []


@pytest.mark.parametrize("mode", ["billing", "personal"])
@pytest.mark.parametrize("seed", range(3))
async def test_money_for_so_many_turns_is_for_all_of_them(sqlite: Database, mode: Any, seed: int) -> None:
    """Whatever keys they have, and however they race: nobody is refused, and then everybody."""
    rnd, now = random.Random(seed), clock()
    async with running(sqlite, mode=mode, at=now) as ledger:
        turns = (5, 150, 400)[seed]
        team = await holder(ledger, turns * TURN)
        keys = [team]
        for number in range((4, 1, 30)[seed]):
            key, _ = await ledger.create_key(team.user_id, f"key {number}", actor="test")
            keys.append(Holder(team.user_id, key.id))
        budgets = () if mode == "billing" else ((team.user_id, Budget(Window.DAY, turns * TURN)),)
        fields: dict[str, Any] = {"budgets": budgets, "is_billed": mode == "billing"}
        left, served = iter(range(turns)), 0

        def at() -> int:
            return round(now.now() * 1_000)

        async def caller() -> None:
            nonlocal served
            for number in left:
                of, name, grows = rnd.choice(keys), f"turn {number}", rnd.random() < 0.3
                nanos = TURN // 2 if grows else TURN
                await ledger.authorize(hold(of, name, nanos, at=at(), budgets=budgets))
                assert not grows or await ledger.top_up(name, TURN // 2)
                await asyncio.sleep(rnd.choice([0, 0, 0.002]))
                ledger.settle(settlement(of, name, TURN, at=at(), **fields))
                served += 1

        async def keeper() -> None:
            while served < turns:
                await asyncio.sleep(rnd.random() * 0.02)
                now.advance(rnd.choice([0.001, 1.0, 6.0]))
                await ledger.recall_idle()
                if rnd.random() < 0.3:
                    await ledger.update_key(rnd.choice(keys).key_id, {"name": f"{rnd.random()}"}, "test")

        await asyncio.gather(keeper(), *(caller() for _ in range(50)))
        with pytest.raises(OutOfFunds):
            await ledger.authorize(hold(team, "one more", 1, at=at(), budgets=budgets))
        assert ledger.statistics().writer.shortfalls == 0
        assert await ledger.check() == []


@pytest.mark.parametrize("seed", range(4))
async def test_a_database_that_fails_at_random(
    sqlite: Database, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """What the loop and the writer believe of allotments is the same afterwards, and all is paid once."""
    rnd, now, faults = random.Random(seed), clock(), random.Random(-seed)
    fails, ends = False, time.monotonic() + 1.0
    back = 0.0

    def before() -> None:
        nonlocal back
        if not fails:
            return
        if faults.random() < 0.01:
            back = time.monotonic() + faults.random() * 0.05
        if time.monotonic() < back:
            raise Away("cut")
        if faults.random() < 0.03:
            raise RuntimeError("odd")

    def after() -> None:
        if fails and faults.random() < 0.03:
            raise Away("after all")

    async with running(sqlite, at=now) as ledger:
        failing(ledger, monkeypatch, before, after)
        keys = []
        for nanos in (130, 400, 3_000):
            team = await holder(ledger, nanos * TURN, name=f"{nanos}")
            key, _ = await ledger.create_key(team.user_id, "other", actor="test")
            keys += [team, Holder(team.user_id, key.id)]
        settled, numbers = 0, iter(range(1_000_000))

        async def caller() -> None:
            nonlocal settled
            while time.monotonic() < ends:
                of, name = rnd.choice(keys), f"turn {next(numbers)}"
                nanos = rnd.choice([1, TURN // 2, TURN, TURN, 30 * TURN])
                try:
                    async with asyncio.timeout(0.001 if rnd.random() < 0.05 else 10.0):
                        await ledger.authorize(hold(of, name, nanos, at=round(now.now() * 1_000)))
                except ProxyError:
                    continue
                except TimeoutError:
                    nanos = 0
                await asyncio.sleep(rnd.choice([0, 0, 0.003]))
                settled += 1
                ledger.settle(settlement(of, name, rnd.choice([0, nanos])))

        async def keeper() -> None:
            while time.monotonic() < ends:
                await asyncio.sleep(rnd.random() * 0.05)
                now.advance(rnd.choice([0.001, 1.0, 6.0]))
                await ledger.recall_idle()
                try:
                    await ledger.update_key(rnd.choice(keys).key_id, {"name": f"{rnd.random()}"}, "test")
                except LedgerAway:
                    await ledger.reap()

        fails = True
        await asyncio.gather(keeper(), *(caller() for _ in range(20)))
        fails = False
        await until(lambda: not (ledger.is_away or ledger.statistics().writer.spooled))
        await flush(ledger, keys[0])
        left: dict[str, int] = {}
        for one in ledger._allotments:
            for owner in (one.user_id, one.key_id):
                if one.left:
                    left[owner] = left.get(owner, 0) + one.left
        assert left == ledger._writer._allotted
        assert ledger.statistics().holds_open == ledger.statistics().writer.refused == 0
        assert await ledger.read(count("SELECT count(*) FROM usage")) == settled + 1
        assert await ledger.read(count("SELECT count(*) FROM holds")) == 0
        assert await ledger.read(count("SELECT sum(shortfall) FROM usage")) == 0
        assert await ledger.check() == []
