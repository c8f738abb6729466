"""What a process lends after it has handed its ledger over."""

from typing import Any

import pytest
from sqlalchemy import text

from codex_proxy.errors import LedgerAway, OutOfFunds
from codex_proxy.ledger import rows as rows_module
from codex_proxy.ledger import writer as module
from codex_proxy.ledger.ledger import Ledger
from codex_proxy.ledger.model import Budget, Window
from codex_proxy.ledger.spooling import spools_in
from tests.ledger.conftest import Database
from tests.ledger.making import clock, hold, holder, money, running, settlement
from tests.ledger.test_faults import _begin, is_back, soon, until  # noqa: F401


async def rows(ledger: Ledger, question: str) -> list[tuple[Any, ...]]:
    return await ledger.read(lambda connection: [tuple(row) for row in connection.execute(text(question))])


async def test_a_turn_booked_by_another_process_holds_nothing_after_the_ledger_is_back(
    sqlite: Database,
) -> None:
    async with running(sqlite) as old:
        team = await holder(old, 100)
        await old.hand_over()
        async with running(sqlite) as new:
            assert await _begin(old, team, ["one"]) == ["one"]
            # Too early: the other one is still there.
            await old.take_back()
            await old.settled(settlement(team, "one", 10))
            await until(lambda: money(new, team)[0] == 90)
        await until(lambda: is_back(old))
        assert await rows(old, "SELECT request_id FROM holds") == []
        await until(lambda: money(old, team) == (90, 0))
        assert await old.check() == []
        assert await rows(old, 'SELECT request_id, "end", cost FROM usage') == [("one", "completed", 10)]
        assert not (sqlite.folder / "ledger-refused.jsonl").exists()


async def test_a_settlement_repays_its_loan_though_the_ledger_was_to_be_taken_back(sqlite: Database) -> None:
    async with running(sqlite) as old:
        team = await holder(old, 100)
        await old.hand_over()
        async with running(sqlite) as new:
            await old.authorize(hold(team, "one", 50))
            await new.authorize(hold(team, "two", 50))
            await old.take_back()
            await old.settled(settlement(team, "one", 50))
            await until(lambda: bool(new.statistics().writer.settled))
            assert await rows(new, "SELECT shortfall FROM usage") == [(0,)]
            await new.settled(settlement(team, "two", 50))
            await old.aclose()
            await new.reap()
            assert money(new, team) == (0, 0)
            assert await new.check() == []


async def test_what_could_not_be_announced_is_not_lent(
    sqlite: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running(sqlite) as old:
        team = await holder(old, 100)
        monkeypatch.setattr(old._spool, "open", lambda: False)
        await old.hand_over()
        async with running(sqlite) as new:
            by_old = await _begin(old, team, [f"o{n}" for n in range(20)])
            by_new = await _begin(new, team, [f"n{n}" for n in range(20)])
            assert len(by_old) + len(by_new) <= 10
            monkeypatch.undo()


async def test_a_ledger_that_is_taken_back_at_once_serves_at_once(
    sqlite: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_LOOK_SECONDS", 0.5)
    async with running(sqlite) as old:
        team = await holder(old, 100)
        await old.hand_over()
        await old.take_back()
        assert not old.is_away
        await old.authorize(hold(team, "one", 60))
        await old.settled(settlement(team, "one", 60))
        assert money(old, team) == (40, 0)
        assert await old.check() == []


async def test_a_loan_that_was_refused_is_not_lent(sqlite: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    async with running(sqlite) as old:
        team = await holder(old, 100)
        write = rows_module.write

        def broken(connection: Any, changes: Any) -> None:
            if any(one.startswith("loan~") for one in changes.granted):
                raise ValueError("it will not")
            write(connection, changes)

        monkeypatch.setattr(rows_module, "write", broken)
        await old.hand_over()
        monkeypatch.undo()
        async with running(sqlite) as new:
            by_old = await _begin(old, team, [f"o{n}" for n in range(20)])
            by_new = await _begin(new, team, [f"n{n}" for n in range(20)])
            assert len(by_old) + len(by_new) <= 10
            await old.aclose()


async def test_what_a_turn_has_not_used_is_lent_to_the_next(sqlite: Database) -> None:
    """A turn is lent many times what it costs, and callers on kept connections go on for a while."""
    async with running(sqlite) as old:
        team = await holder(old, 100)
        await old.hand_over()
        async with running(sqlite) as new:
            for number in range(20):
                await old.authorize(hold(team, f"cheap {number}", 30))
                await old.settled(settlement(team, f"cheap {number}", number % 3))
            with pytest.raises(LedgerAway):
                await old.authorize(hold(team, "too large", 50 - 19 + 1))
            # What it costs beyond what it was lent comes out of the other half.
            await old.authorize(hold(team, "dear", 10))
            await old.settled(settlement(team, "dear", 25))
            await old.authorize(hold(team, "rest", 50 - 19 - 10))
            with pytest.raises(LedgerAway):
                await old.authorize(hold(team, "more", 1))
            await until(lambda: money(new, team) == (100 - 19 - 25, 50 - 19 - 10))
            await new.authorize(hold(team, "own", 50 - 15))
            with pytest.raises(OutOfFunds):
                await new.authorize(hold(team, "own more", 1))
            await new.settled(settlement(team, "own", 50 - 15))
            await old.settled(settlement(team, "rest", 50 - 19 - 10))
            await old.aclose()
            await until(lambda: money(new, team) == (0, 0))
            assert await rows(new, "SELECT sum(shortfall) FROM usage") == [(0,)]
            assert await new.check() == []


async def test_a_lent_turn_that_ends_after_it_was_given_up_is_settled_all_the_same(sqlite: Database) -> None:
    time = clock()
    async with running(sqlite, at=time) as old:
        team = await holder(old, 100)
        await old.hand_over()
        async with running(sqlite, at=time) as new:
            await old.authorize(hold(team, "one", 50))
            await new.authorize(hold(team, "two", 50))
            time.advance(601.0)
            await old.reap()
            await old.settled(settlement(team, "one", 50))
            await until(lambda: bool(new.statistics().writer.settled))
            assert await rows(new, "SELECT shortfall FROM usage") == [(0,)]
            await new.settled(settlement(team, "two", 50))


async def test_three_processes_in_a_row_spend_no_money_twice(sqlite: Database) -> None:
    async with running(sqlite) as a:
        team = await holder(a, 160)
        await a.authorize(hold(team, "a0", 10))
        await a.hand_over()
        async with running(sqlite) as b:
            assert await _begin(a, team, ["a1", "a2"]) == ["a1", "a2"]
            assert await _begin(b, team, ["b1"]) == ["b1"]
            await a.settled(settlement(team, "a1", 10))
            await until(lambda: money(b, team)[0] == 150)
            await b.hand_over()
            async with running(sqlite) as c:
                began: dict[str, list[str]] = {}
                for name, one in (("a", a), ("b", b), ("c", c)):
                    began[name] = await _begin(one, team, [f"{name}x{n}" for n in range(30)])
                assert sum(map(len, began.values())) <= 16
                for name, one in (("a", a), ("b", b), ("c", c)):
                    for turn in [*began[name], *{"a": ["a0", "a2"], "b": ["b1"], "c": []}[name]]:
                        await one.settled(settlement(team, turn, 10))
                await b.aclose()
                await a.aclose()
                await until(lambda: money(c, team)[1] == 0)
                assert await rows(c, "SELECT sum(shortfall) FROM usage") == [(0,)]
                assert await rows(c, "SELECT count(*) FROM holds") == [(0,)]
                assert await c.check() == []
                assert spools_in(sqlite.folder) == []


async def test_a_ledger_may_be_taken_back_again_and_again(sqlite: Database) -> None:
    async with running(sqlite) as old:
        team = await holder(old, 1000)
        for n in range(5):
            await old.hand_over()
            await old.authorize(hold(team, f"k{n}", 10))
            await old.authorize(hold(team, f"s{n}", 10))
            await old.settled(settlement(team, f"s{n}", 5))
            await old.take_back()
        await until(lambda: is_back(old))
        await until(lambda: money(old, team) == (975, 50))
        for n in range(5):
            await old.settled(settlement(team, f"k{n}", 10))
        assert money(old, team) == (925, 0)
        assert await old.check() == []


async def test_what_was_lent_is_held_afterwards_whatever_budgets_say_by_then(sqlite: Database) -> None:
    async with running(sqlite) as old:
        team = await holder(old, 1000)
        budgets = ((team.user_id, Budget(Window.DAY, 40)),)
        await old.hand_over()
        for n in range(6):
            await old.authorize(hold(team, f"k{n}", 10, budgets=budgets))
        await old.settled(settlement(team, "k0", 10, budgets=budgets))
        await old.take_back()
        await until(lambda: is_back(old))
        assert money(old, team) == (990, 50)
        for n in range(1, 6):
            await old.settled(settlement(team, f"k{n}", 10, budgets=budgets))
        assert await old.check() == []


async def test_who_is_suspended_or_billed_no_more_meanwhile_is_settled(sqlite: Database) -> None:
    async with running(sqlite) as old:
        team = await holder(old, 100)
        other = await holder(old, 100, name="other")
        await old.hand_over()
        async with running(sqlite) as new:
            await old.authorize(hold(team, "one", 10))
            await old.authorize(hold(other, "two", 10))
            await new.update_user(team.user_id, {"status": "suspended"}, "x")
            await new.update_user(other.user_id, {"is_billed": False}, "x")
            await old.settled(settlement(team, "one", 10))
            await old.settled(settlement(other, "two", 10))
            await old.aclose()
            await until(lambda: money(new, team) == (90, 0) and money(new, other) == (90, 0))
            assert await new.check() == []
