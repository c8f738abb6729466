"""What becomes of turns and of their money while the database is full, locked, stopped, frozen, or another's."""

import asyncio
import contextlib
import sqlite3
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Connection, text

from codex_proxy.errors import BudgetUsedUp, ConfigError, LedgerAway, OutOfFunds
from codex_proxy.ledger import writer as module
from codex_proxy.ledger.bases import Away
from codex_proxy.ledger.keys import digest_of
from codex_proxy.ledger.ledger import Ledger
from codex_proxy.ledger.model import Budget, Window
from codex_proxy.ledger.spooling import Spool, row_of, settlement_of, spools_in
from tests.ledger.conftest import Database
from tests.ledger.making import DOLLAR, Holder, clock, hold, holder, make, money, running, settlement
from tests.ledger.postgres import Server, execute
from tests.ledger.postgres import running as running_server


def cut(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Have the database be away; what is returned brings it back."""
    own: Any = ledger._writer
    real = own._transaction
    is_away = True

    def transaction(*given: Any, **named: Any) -> Any:
        if is_away:
            raise Away("cut")
        return real(*given, **named)

    def back() -> None:
        nonlocal is_away
        is_away = False

    monkeypatch.setattr(own, "_transaction", transaction)
    return back


async def until(condition: Callable[[], bool | Awaitable[bool]], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while True:
        found = condition()
        if found if isinstance(found, bool) else await found:
            return
        assert time.monotonic() < deadline, "the awaited condition did not come true"
        await asyncio.sleep(0.005)


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is tried again after a while is tried again at once."""
    monkeypatch.setattr(module, "_LOOK_SECONDS", 0.02)
    monkeypatch.setattr(module, "_FIRST_RETRY_SECONDS", 0.02)
    monkeypatch.setattr(module, "_LAST_RETRY_SECONDS", 0.05)


def count(question: str) -> Callable[[Connection], int]:
    return lambda connection: int(connection.execute(text(question)).scalar_one())


async def usages(ledger: Ledger) -> int:
    return await ledger.read(count("SELECT count(*) FROM usage"))


def is_back(ledger: Ledger) -> bool:
    return not (ledger.is_away or ledger.statistics().writer.spooled)


@contextlib.contextmanager
def locked(database: Database, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Somebody else writes the file, and takes his time."""
    other = sqlite3.connect(database.folder / "ledger.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    yield
    other.execute("ROLLBACK")
    other.close()


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("codex_proxy.storage.engine._BUSY_SECONDS", 0.02)


# -- a file that cannot be written ------------------------------------------------------------


async def test_while_a_file_is_locked_what_ends_is_kept_and_what_costs_does_not_begin(
    sqlite: Database, monkeypatch: pytest.MonkeyPatch, impatient: None, caplog: pytest.LogCaptureFixture
) -> None:
    async with running(sqlite) as ledger:
        team = await holder(ledger, 100)
        free = await holder(ledger, 0, name="free", is_billed=False)
        await ledger.authorize(hold(team, "one", 30))
        await ledger.authorize(hold(team, "two", 30))
        with locked(sqlite, monkeypatch):
            # The one that finds it out, too.
            with pytest.raises(LedgerAway) as caught:
                await ledger.authorize(hold(team, "three", 30))
            assert caught.value.retry_after > 0
            assert ledger.is_away
            await ledger.settled(settlement(team, "one", 20))
            # It goes on for a while, and then no more.
            assert [await ledger.top_up("two", 10) for _ in range(5)] == [True] * 4 + [False]
            ledger.settle(settlement(team, "two", 40))
            # Where nothing is paid it goes on.
            await ledger.authorize(hold(free, "four", 30))
            await ledger.settled(settlement(free, "four", 10, is_billed=False))
            with pytest.raises(LedgerAway):
                await ledger.create_user("x", actor="test")
            assert ledger.statistics().writer.spooled == 3
            assert len(spools_in(sqlite.folder)) == 1
        await until(lambda: is_back(ledger))
        assert money(ledger, team) == (40, 0)
        found = await ledger.read(lambda c: [tuple(row) for row in c.execute(text("SELECT request_id, cost, debit, flags FROM usage ORDER BY id"))])  # fmt: skip
        assert found == [("one", 20, 20, ""), ("two", 40, 40, "blind_top_up"), ("four", 10, 0, "")]
        assert await ledger.check() == []
        assert spools_in(sqlite.folder) == []
        await ledger.authorize(hold(team, "five", 40))
    said = [record.getMessage() for record in caplog.records if record.levelname in ("WARNING", "ERROR")]
    assert len(said) == 2, said
    assert "locked" in said[0]
    assert said[1] == "the ledger can be written again"


async def test_a_spool_that_was_left_is_written_once_at_the_next_start(
    sqlite: Database, monkeypatch: pytest.MonkeyPatch, impatient: None
) -> None:
    async with running(sqlite) as ledger:
        team = await holder(ledger, 100)
        await ledger.authorize(hold(team, "one", 30))
        await ledger.settled(settlement(team, "zero", 1))
        with locked(sqlite, monkeypatch):
            await ledger.settled(settlement(team, "one", 20))
            await ledger.settled(settlement(team, "zero", 1))
            await ledger.aclose()
    (left,) = spools_in(sqlite.folder)
    copy = left.read_bytes()
    async with running(sqlite) as again:
        assert money(again, team) == (79, 0)
        assert await usages(again) == 2
        # The same lines again, with one that was cut by a crash.
        left.write_bytes(copy + copy[:-20])
        await until(lambda: not spools_in(sqlite.folder))
        assert money(again, team) == (79, 0)
        assert await again.check() == []


async def test_a_full_spool_stops_what_begins(
    sqlite: Database, monkeypatch: pytest.MonkeyPatch, impatient: None
) -> None:
    async with running(sqlite, mode="personal", spool_rows=3) as ledger:
        team = await holder(ledger, 0)
        with locked(sqlite, monkeypatch):
            for number in range(3):
                await ledger.authorize(hold(team, f"turn {number}"))
                await ledger.settled(settlement(team, f"turn {number}", 1, is_billed=False))
            with pytest.raises(LedgerAway):
                await ledger.authorize(hold(team, "one too many"))
            # What was served is settled all the same.
            await ledger.settled(settlement(team, "late", 1, is_billed=False))
        await until(lambda: not ledger.statistics().writer.is_spool_full)
        await ledger.authorize(hold(team, "after"))
        assert await usages(ledger) == 4
        assert await ledger.check() == []


async def test_a_spool_is_bounded_in_bytes_too(
    sqlite: Database, monkeypatch: pytest.MonkeyPatch, impatient: None
) -> None:
    async with running(sqlite, mode="personal", spool_bytes=1_000) as ledger:
        team = await holder(ledger, 0)
        with locked(sqlite, monkeypatch):
            for number in range(2):
                await ledger.settled(settlement(team, f"turn {number}", 1, is_billed=False))
            with pytest.raises(LedgerAway):
                await ledger.authorize(hold(team, "one too many"))


def no_room(spool: Spool) -> bool:
    """Stand for `Spool.open` on a disk that is full."""
    spool.trouble = "No space left on device"
    return False


async def test_where_not_even_a_spool_can_be_written_nothing_begins_and_nothing_is_lost(
    sqlite: Database, monkeypatch: pytest.MonkeyPatch, impatient: None
) -> None:
    async with running(sqlite, mode="personal") as ledger:
        team = await holder(ledger, 0)
        real = Spool.open

        monkeypatch.setattr(Spool, "open", no_room)
        with locked(sqlite, monkeypatch):
            await ledger.settled(settlement(team, "one", 1, is_billed=False))
            with pytest.raises(LedgerAway):
                await ledger.authorize(hold(team, "two"))
            await ledger.settled(settlement(team, "two", 1, is_billed=False))
        await until(lambda: not ledger.is_away)
        await ledger.authorize(hold(team, "three"))
        monkeypatch.setattr(Spool, "open", real)
        assert await usages(ledger) == 2
        assert await ledger.check() == []


async def test_a_full_disk_is_noticed_and_over_when_there_is_room(sqlite: Database) -> None:
    async with running(sqlite) as ledger:
        team = await holder(ledger, 10_000)
        for number in range(5):
            await ledger.authorize(hold(team, f"held {number}", 10))
        # SQLite itself finds no room.
        pages = await ledger.write(count("PRAGMA page_count"))
        await ledger.write(count(f"PRAGMA max_page_count={pages}"))
        number = 0
        while not ledger.is_away:
            ledger.settle(settlement(team, f"turn {number}", 1))
            number += 1
            await asyncio.sleep(0.001)
            assert number < 5_000
        assert "full" in ledger.statistics().writer.trouble
        for held in range(5):
            await ledger.settled(settlement(team, f"held {held}", 10))
        base: Any = ledger._base
        base._connection.connection.driver_connection.execute("PRAGMA max_page_count=100000")
        await until(lambda: is_back(ledger))
        assert await usages(ledger) == number + 5
        assert money(ledger, team) == (10_000 - number - 50, 0)
        assert await ledger.check() == []


async def test_budgets_hold_while_the_database_is_away(
    sqlite: Database, monkeypatch: pytest.MonkeyPatch, impatient: None
) -> None:
    """As far as this process knows what was spent."""
    async with running(sqlite, mode="personal") as ledger:
        team = await holder(ledger, 0)
        budgets = ((team.key_id, Budget(Window.DAY, 100)),)

        async def turn(name: str, cost: int) -> None:
            await ledger.authorize(hold(team, name, 1, budgets=budgets))
            await ledger.settled(settlement(team, name, cost, is_billed=False, budgets=budgets))

        await turn("one", 50)
        with locked(sqlite, monkeypatch):
            await turn("two", 40)
            await turn("three", 20)
            with pytest.raises(BudgetUsedUp):
                await turn("four", 1)
        await until(lambda: is_back(ledger))
        with pytest.raises(BudgetUsedUp):
            await turn("five", 1)
        assert await ledger.check() == []


def test_a_settlement_survives_a_spool() -> None:
    of = Holder("user_1", "key_1")
    one = settlement(of, "one", 5, flags=("clamped",), budgets=(("key_1", Budget(Window.WEEK, 7)),))
    assert settlement_of(row_of(one)) == one
    with pytest.raises(ValueError, match="not a settlement"):
        settlement_of({"request_id": "x"})


# -- from one process to the next --------------------------------------------------------------


async def test_a_ledger_is_handed_over_while_turns_go_on(sqlite: Database) -> None:
    async with running(sqlite) as old:
        team = await holder(old, 100)
        for name in ("one", "two", "lost"):
            await old.authorize(hold(team, name, 10))
        await old.hand_over()
        async with running(sqlite) as new:
            # Half of what is free stays with the old one.
            assert money(new, team) == (100, 30 + 35)
            assert await old.top_up("one", 5)
            await old.settled(settlement(team, "one", 12))
            await until(lambda: money(new, team) == (88, 20 + 30))
            await new.authorize(hold(team, "three", 30))
            await old.settled(settlement(team, "two", 10))
            # The old one ends, and what it has not settled is lost.
            await old.aclose()
            await until(lambda: money(new, team) == (78, 30))
            found = await new.read(lambda c: [tuple(row) for row in c.execute(text('SELECT request_id, cost, flags, "end" FROM usage ORDER BY id'))])  # fmt: skip
            assert found == [
                ("one", 12, "", "completed"),
                ("two", 10, "", "completed"),
                ("lost", None, "", "lost"),
            ]
            await new.settled(settlement(team, "three", 1))
            assert await new.check() == []
            assert spools_in(sqlite.folder) == []


async def test_what_a_process_that_handed_over_has_not_settled_is_released_when_it_ends(
    sqlite: Database,
) -> None:
    async with running(sqlite) as old:
        team = await holder(old, 100)
        await old.authorize(hold(team, "lost", 10))
        await old.hand_over()
        async with running(sqlite) as new:
            assert money(new, team) == (100, 10 + 45)
            await old.aclose()
            await until(lambda: money(new, team) == (100, 0))
            assert await new.check() == []
            assert spools_in(sqlite.folder) == []


async def test_a_ledger_is_taken_back_when_nobody_took_over(sqlite: Database) -> None:
    async with running(sqlite) as ledger:
        team = await holder(ledger, 100)
        await ledger.authorize(hold(team, "one", 10))
        await ledger.hand_over()
        await ledger.settled(settlement(team, "one", 12))
        assert ledger.is_away
        await ledger.take_back()
        await until(lambda: money(ledger, team) == (88, 0))
        await ledger.authorize(hold(team, "two", 10))
        await ledger.settled(settlement(team, "two", 10))
        assert await ledger.check() == []
        assert spools_in(sqlite.folder) == []


async def _begin(ledger: Ledger, team: Holder, names: list[str]) -> list[str]:
    """Those of some turns of 10 that may begin."""
    begun = []
    for name in names:
        with contextlib.suppress(OutOfFunds, LedgerAway):
            await ledger.authorize(hold(team, name, 10))
            begun.append(name)
    return begun


async def test_no_money_is_spent_twice_while_two_processes_serve(sqlite: Database) -> None:
    async with running(sqlite) as old:
        team = await holder(old, 100)
        await old.hand_over()
        async with running(sqlite) as new:
            by_old = await _begin(old, team, [f"old {number}" for number in range(20)])
            by_new = await _begin(new, team, [f"new {number}" for number in range(20)])
            assert (len(by_old), len(by_new)) == (5, 5)
            for ledger, names in ((new, by_new), (old, by_old)):
                for name in names:
                    await ledger.settled(settlement(team, name, 10))
            await old.aclose()
            await until(lambda: money(new, team) == (0, 0))
            shortfalls = await new.read(
                lambda c: c.execute(text("SELECT sum(shortfall) FROM usage")).scalar()
            )
            assert shortfalls == 0
            assert await new.check() == []


async def test_what_a_turn_did_not_need_of_a_loan_is_its_users_again_at_the_end(sqlite: Database) -> None:
    async with running(sqlite) as old:
        team = await holder(old, 100)
        await old.hand_over()
        async with running(sqlite) as new:
            assert await _begin(old, team, ["one"]) == ["one"]
            assert await old.top_up("one", 20)
            # What is left does not do, and it goes on for a little, with a mark.
            assert await old.top_up("one", 30)
            await old.settled(settlement(team, "one", 3))
            await until(lambda: money(new, team) == (97, 47))
            found = await new.read(lambda c: c.execute(text("SELECT flags, shortfall FROM usage")).one())
            assert tuple(found) == ("blind_top_up", 0)
            # The other half, and then what came back.
            await new.authorize(hold(team, "two", 50))
            await new.settled(settlement(team, "two", 50))
            assert await new.check() == []
            await old.aclose()
            await until(lambda: money(new, team) == (47, 0))
            await new.authorize(hold(team, "three", 47))


async def test_a_loan_is_in_no_budget(sqlite: Database) -> None:
    async with running(sqlite) as old:
        team = await holder(old, 100)
        await old.hand_over()
        async with running(sqlite) as new:
            budgets = ((team.user_id, Budget(Window.DAY, 30)),)
            await new.authorize(hold(team, "one", 20, budgets=budgets))
            await new.settled(settlement(team, "one", 20, budgets=budgets))
            assert await new.check() == []


async def test_a_ledger_that_is_taken_back_sets_aside_what_it_has_lent(sqlite: Database) -> None:
    async with running(sqlite) as ledger:
        team = await holder(ledger, 100)
        await ledger.authorize(hold(team, "before", 10))
        await ledger.hand_over()
        assert await _begin(ledger, team, ["one", "two"]) == ["one", "two"]
        assert await ledger.top_up("before", 5)
        await ledger.settled(settlement(team, "two", 7))
        await ledger.take_back()
        await until(lambda: money(ledger, team) == (93, 10 + 5 + 10))
        assert await ledger.top_up("one", 68)
        assert not await ledger.top_up("before", 1)
        await ledger.settled(settlement(team, "one", 60))
        await ledger.settled(settlement(team, "before", 15))
        assert money(ledger, team) == (18, 0)
        assert await ledger.check() == []


async def test_what_was_lent_to_a_turn_that_nobody_settles_is_released_too(sqlite: Database) -> None:
    time = clock()
    async with running(sqlite, at=time) as ledger:
        team = await holder(ledger, 100)
        await ledger.hand_over()
        assert await _begin(ledger, team, ["one"]) == ["one"]
        time.advance(601.0)
        await ledger.reap()
        await ledger.take_back()
        await until(lambda: money(ledger, team) == (100, 0))
        assert await ledger.check() == []


async def test_a_loan_that_is_not_known_to_be_written_is_not_spent_and_not_kept(
    sqlite: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running(sqlite) as ledger:
        team = await holder(ledger, 100)
        apply = ledger._writer._apply

        def torn(batch: Any) -> None:
            apply(batch)
            raise Away("it is gone")

        monkeypatch.setattr(ledger._writer, "_apply", torn)
        await ledger.hand_over()
        monkeypatch.undo()
        assert money(ledger, team) == (100, 50)
        assert await _begin(ledger, team, ["one"]) == []
        await ledger.take_back()
        await until(lambda: money(ledger, team) == (100, 0))
        assert await ledger.check() == []


async def test_in_personal_mode_nothing_is_lent(sqlite: Database) -> None:
    async with running(sqlite, mode="personal") as old:
        team = await holder(old, 100)
        await old.hand_over()
        async with running(sqlite, mode="personal") as new:
            assert money(new, team) == (100, 0)
            await old.authorize(hold(team, "one", 1_000))
            await old.settled(settlement(team, "one", 1_000, is_billed=False))
            await old.aclose()
            assert await new.check() == []


# -- a server ----------------------------------------------------------------------------------


async def test_two_daemons_on_one_server_share_the_money(postgres: Database, tmp_path: Path) -> None:
    other = Database(tmp_path / "other", postgres.url)
    other.folder.mkdir()
    async with running(postgres) as one, running(other) as two:
        team = await holder(one, 10 * DOLLAR)
        await until(lambda: two.directory.user(team.user_id) is not None)

        async def turn(ledger: Ledger, number: int) -> bool:
            try:
                await ledger.authorize(hold(team, f"turn {number}"))
            except OutOfFunds:
                return False
            await asyncio.sleep(0)
            await ledger.settled(settlement(team, f"turn {number}", DOLLAR))
            return True

        served = await asyncio.gather(*[turn((one, two)[number % 2], number) for number in range(50)])
        assert sum(served) == 10
        assert await one.check() == []
        assert await two.read(count("SELECT sum(balance) FROM users")) == 0
        # One settles what the other one has authorized, once.
        await one.credit(team.user_id, 100, reason="more", idempotency_key="more", actor="test")
        await one.authorize(hold(team, "shared", 60))
        await asyncio.gather(*[ledger.settled(settlement(team, "shared", 50)) for ledger in (one, two) * 3])
        assert await two.read(count("SELECT sum(balance) FROM users")) == 50
        assert await two.check() == []


async def test_another_daemon_sees_a_key_revoked(
    postgres: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_LOOK_SECONDS", 0.5)
    other = Database(tmp_path / "other", postgres.url)
    other.folder.mkdir()
    async with running(postgres) as one, running(other) as two:
        user = await one.create_user("team", actor="test")
        key, secret = await one.create_key(user.id, "laptop", actor="test")
        await until(lambda: two.directory.key_by_digest(digest_of(secret)) == key)
        changed: list[bool] = []
        two.on_change.append(lambda: changed.append(True))
        began = time.monotonic()
        await one.revoke_key(key.id, "test")
        await until(lambda: two.directory.key(key.id).status == "revoked")  # type: ignore[union-attr]
        assert time.monotonic() - began < 1.0
        assert changed


async def test_what_a_daemon_elsewhere_held_is_released_when_it_shows_no_life(
    postgres: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = Database(tmp_path / "other", postgres.url)
    other.folder.mkdir()
    monkeypatch.setattr(module, "_BEAT_SECONDS", 0.0)
    async with running(postgres) as one, running(other) as two:
        team = await holder(one, 100)
        await until(lambda: two.directory.user(team.user_id) is not None)
        await two.authorize(hold(team, "elsewhere", 30))
        await one.authorize(hold(team, "here", 30))
        for _ in range(3):
            await one.reap()
            await asyncio.sleep(0.03)
            # It lives, whatever clocks say.
        monkeypatch.setattr(module, "_DEAD_SECONDS", 0.05)
        monkeypatch.setattr(two._writer, "_beat", lambda connection, is_due: (two._writer._version, None))

        async def held() -> bool:
            await one.reap()
            return await one.read(count("SELECT sum(held) FROM users")) == 30

        await until(held)
        await one.settled(settlement(team, "here", 30))
        # It was only slow.
        await two.settled(settlement(team, "elsewhere", 30))
        assert await one.read(count("SELECT sum(balance) FROM users")) == 40
        assert await one.check() == []


@pytest.fixture
def own_server(postgres_data: Path) -> Iterator[Server]:
    """A server that only this test has, so that it may be stopped."""
    with running_server(postgres_data) as server:
        yield server


@pytest.mark.parametrize("how", ["stopped", "frozen"])
async def test_a_server_that_does_not_answer_is_waited_for_a_moment(
    own_server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    await asyncio.to_thread(execute, own_server.url(), "CREATE DATABASE ledger")
    async with running(Database(tmp_path, own_server.url("ledger"))) as ledger:
        team = await holder(ledger, 100)
        free = await holder(ledger, 0, name="free", is_billed=False)
        for name in ("one", "two", "three"):
            await ledger.authorize(hold(team, name, 20))
        for name in ("TRANSACTION_SECONDS", "_TRIAL_SECONDS"):
            monkeypatch.setattr(f"codex_proxy.ledger.server.{name}", 0.4)
        # What is under way has more time.
        await ledger.settled(settlement(team, "zero", 0))
        if how == "stopped":
            await asyncio.to_thread(own_server.stop)
        else:
            own_server.freeze()
        with pytest.raises(LedgerAway):
            await ledger.authorize(hold(team, "four", 20))
        assert ledger.is_away
        await ledger.settled(settlement(team, "one", 20))
        await ledger.authorize(hold(free, "five"))
        await ledger.settled(settlement(free, "five", 20, is_billed=False))
        with pytest.raises(LedgerAway):
            await ledger.create_user("x", actor="test")
        if how == "stopped":
            with pytest.raises(LedgerAway):
                await ledger.check()
            await asyncio.to_thread(own_server.start)
        else:
            own_server.thaw()
        monkeypatch.undo()
        await until(lambda: is_back(ledger))
        for name in ("two", "three"):
            await ledger.settled(settlement(team, name, 20))
        # The fourth was refused; whatever had reached the server of it is gone.
        await until(lambda: money(ledger, team) == (40, 0))
        assert await ledger.read(count("SELECT count(*) FROM holds")) == 0
        assert await usages(ledger) == 5
        assert await ledger.check() == []


async def test_a_server_that_is_not_there_ends_the_start_with_the_reason(
    tmp_path: Path,
) -> None:
    pytest.importorskip("asyncpg")
    database = Database(tmp_path, "postgresql://proxy:geheim@127.0.0.1:1/ledger")
    with pytest.raises(ConfigError) as caught:
        await make(database).start()
    assert "ledger = billing" in caught.value.message
    assert "geheim" not in caught.value.message


async def test_a_database_of_somebody_else_is_left_alone(empty_postgres: Database) -> None:
    await asyncio.to_thread(execute, empty_postgres.url, "CREATE TABLE theirs (a int)")
    with pytest.raises(Exception, match="Give the ledger one of its own"):
        await make(empty_postgres).start()
    assert await asyncio.to_thread(
        execute, empty_postgres.url, "SELECT count(*) FROM pg_tables WHERE schemaname = 'public'"
    ) == [(1,)]


def test_without_its_driver_it_is_said_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "asyncpg", None)
    with pytest.raises(ConfigError, match=r"pip install 'codex-proxy\[postgres\]'"):
        make(Database(tmp_path, "postgresql://127.0.0.1/ledger"))
