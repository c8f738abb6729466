"""What becomes of turns when several things fail at once, or one of them in another way than expected."""

import asyncio
import os
import threading
from pathlib import Path
from typing import Any

import pytest

from codex_proxy.errors import LedgerAway
from codex_proxy.ledger import spooling
from codex_proxy.ledger import writer as module
from codex_proxy.ledger.cleaning import clean
from codex_proxy.ledger.model import Budget, Window
from codex_proxy.ledger.spooling import Spool, row_of, settlement_of, spools_in
from codex_proxy.storage.spool import SpoolReader, SpoolWriter
from tests.ledger.conftest import Database
from tests.ledger.making import NOON, Holder, clock, hold, holder, money, running, settlement
from tests.ledger.postgres import execute
from tests.ledger.test_faults import count, cut, is_back, locked, no_room, soon, until, usages

__all__ = ["soon"]


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("codex_proxy.storage.engine._BUSY_SECONDS", 0.02)


async def test_a_hold_that_nobody_settles_is_released_though_the_database_was_away_then(
    sqlite: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    at = clock()
    async with running(sqlite, at=at) as ledger:
        team = await holder(ledger, 100)
        await ledger.authorize(hold(team, "forgotten", 30))
        at.advance(601.0)
        with locked(sqlite, monkeypatch):
            await ledger.settled(settlement(team, "other", 0))
            assert ledger.is_away
            await ledger.reap()
        await until(lambda: is_back(ledger))
        await ledger.reap()
        assert money(ledger, team) == (100, 0)
        assert await ledger.read(count("SELECT count(*) FROM usage WHERE \"end\" = 'lost'")) == 1
        assert await ledger.check() == []


async def test_a_process_that_has_left_two_spools_is_not_gone_when_one_is_read(sqlite: Database) -> None:
    async with running(sqlite) as old:
        team = await holder(old, 100)
        await old.authorize(hold(team, "earlier", 10))
        await old.authorize(hold(team, "under way", 50))
        # Its database came back and went again before all of it was read.
        left = SpoolWriter(sqlite.folder / f"ledger-{old.process}-0.spool")
        left.append([row_of(settlement(team, "earlier", 10))])
        left.close()
        await old.hand_over()
        async with running(sqlite) as new:
            await until(lambda: len(spools_in(sqlite.folder)) == 1)
            assert money(new, team) == (90, 50 + 20)
            await old.settled(settlement(team, "under way", 50))
            await until(lambda: money(new, team) == (40, 20))
            await old.aclose()
            await until(lambda: money(new, team) == (40, 0))
            assert await new.check() == []


async def test_on_a_server_a_process_that_reads_its_spool_is_not_gone(
    postgres: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two in one folder, as while one is restarted."""
    async with running(postgres) as one:
        team = await holder(one, 100)
        async with running(postgres) as two:
            await until(lambda: two.directory.user(team.user_id) is not None)
            await one.authorize(hold(team, "under way", 50))
            back = cut(one, monkeypatch)
            await one.settled(settlement(team, "earlier", 10))
            # It lets the other one read, which is no slower than a disk can be.
            monkeypatch.setattr(one._writer, "_read_spools", lambda: None)
            monkeypatch.setattr(
                spooling, "SpoolWriter", lambda path: threading.Event().wait(0.6) or SpoolWriter(path)
            )
            back()
            await until(lambda: two.directory.user(team.user_id).balance == 90)  # type: ignore[union-attr]
            await until(lambda: one.is_away is False)
            await asyncio.sleep(1.2)
            assert money(two, team) == (90, 50)
            await one.settled(settlement(team, "under way", 50))
            assert await two.check() == []


async def test_what_only_memory_has_goes_to_disk_when_there_is_room_again(
    sqlite: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also while the database is still away: nothing would begin until then."""
    async with running(sqlite, mode="personal") as ledger:
        team = await holder(ledger, 0)
        real = Spool.open

        with locked(sqlite, monkeypatch):
            monkeypatch.setattr(Spool, "open", no_room)
            await ledger.settled(settlement(team, "one", 1, is_billed=False))
            assert ledger.statistics().writer.is_spool_full
            monkeypatch.setattr(Spool, "open", real)
            await until(lambda: not ledger.statistics().writer.is_spool_full, 2.0)
            await ledger.authorize(hold(team, "two"))
        await until(lambda: is_back(ledger))
        assert await usages(ledger) == 1


async def test_nobody_waits_for_ever_for_a_writer_that_fails(
    sqlite: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running(sqlite) as ledger:
        team = await holder(ledger, 100)

        def fail(*_: Any, **__: Any) -> bool:
            raise RuntimeError("never thought of")

        with monkeypatch.context() as patch, locked(sqlite, monkeypatch):
            patch.setattr(Spool, "put", fail)
            for turn in (ledger.settled(settlement(team, "one", 1)), ledger.authorize(hold(team, "two"))):
                with pytest.raises(LedgerAway):
                    await asyncio.wait_for(turn, 2.0)
        await until(lambda: is_back(ledger))
        with monkeypatch.context() as patch:
            patch.setattr(ledger._writer, "_release_dead", fail)
            with pytest.raises(LedgerAway):
                await asyncio.wait_for(ledger.reap(), 2.0)
        await ledger.reap()


async def test_turns_go_on_while_the_folder_cannot_be_read(
    sqlite: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With too many open files, say."""
    async with running(sqlite) as ledger:
        team = await holder(ledger, 100)

        def fail(_: Path) -> list[str]:
            raise OSError(24, "Too many open files")

        with monkeypatch.context() as patch:
            patch.setattr("codex_proxy.ledger.spooling.os.listdir", fail)
            monkeypatch.setattr(module, "_LOOK_SECONDS", 0.001)
            await asyncio.sleep(0.03)
            await asyncio.wait_for(ledger.authorize(hold(team, "one", 10)), 2.0)
            await asyncio.wait_for(ledger.settled(settlement(team, "one", 10)), 2.0)
        assert await usages(ledger) == 1


async def test_a_spool_that_was_removed_is_begun_anew(
    sqlite: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running(sqlite) as ledger:
        team = await holder(ledger, 100)
        with locked(sqlite, monkeypatch):
            await ledger.settled(settlement(team, "zero", 1))
            (path,) = spools_in(sqlite.folder)
            path.unlink()
            await asyncio.wait_for(ledger.settled(settlement(team, "one", 1)), 2.0)
        await until(lambda: is_back(ledger))
        assert await usages(ledger) == 1


async def test_a_turn_that_began_while_the_database_was_away_may_grow(
    sqlite: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has no hold, and is not cut for that."""
    async with running(sqlite, mode="personal") as ledger:
        team = await holder(ledger, 0)
        budgets = ((team.key_id, Budget(Window.DAY, 1_000)),)
        with locked(sqlite, monkeypatch):
            await ledger.settled(settlement(team, "other", 1, is_billed=False))
            await ledger.authorize(hold(team, "one", 10, budgets=budgets))
        await until(lambda: is_back(ledger))
        assert await ledger.top_up("one", 10)
        await ledger.settled(settlement(team, "one", 20, is_billed=False, budgets=budgets))
        assert await ledger.check() == []


async def test_a_turn_that_got_more_without_a_look_is_marked_though_the_database_is_back(
    sqlite: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running(sqlite) as ledger:
        team = await holder(ledger, 100)
        await ledger.authorize(hold(team, "one", 10))
        got: list[bool] = []
        for times in (3, 2):
            with locked(sqlite, monkeypatch):
                await ledger.settled(settlement(team, "other", 0))
                got = [await ledger.top_up("one", 10) for _ in range(times)]
            await until(lambda: is_back(ledger))
        # Not as often again each time that it goes.
        assert got == [True, False]
        await ledger.settled(settlement(team, "one", 20))
        assert await ledger.read(count("SELECT count(*) FROM usage WHERE flags = 'blind_top_up'")) == 1
        assert ledger._writer._blind == {}


async def test_settlements_wait_while_a_server_is_restored(postgres: Database) -> None:
    """Its tables are not there for a moment: nothing is wrong with what was to be written."""
    async with running(postgres) as ledger:
        team = await holder(ledger, 100)
        await ledger.authorize(hold(team, "one", 30))
        await asyncio.to_thread(execute, postgres.url, "ALTER TABLE usage RENAME TO gone")
        try:
            await ledger.settled(settlement(team, "one", 20))
            assert ledger.is_away
            assert ledger.statistics().writer.refused == 0
        finally:
            await asyncio.to_thread(execute, postgres.url, "ALTER TABLE gone RENAME TO usage")
        await until(lambda: is_back(ledger))
        await until(lambda: money(ledger, team) == (80, 0))
        assert await ledger.check() == []


async def test_a_server_whose_columns_change_refuses_nothing(postgres: Database) -> None:
    """A newer daemon gives it another shape while this one goes on."""
    async with running(postgres) as ledger:
        team = await holder(ledger, 100)
        kinds = ("text", "varchar")
        for number in range(len(kinds)):
            await ledger.authorize(hold(team, f"turn {number}", 10))
        try:
            for number, kind in enumerate(kinds):
                change = f"ALTER TABLE holds ALTER COLUMN model TYPE {kind}"
                await asyncio.to_thread(execute, postgres.url, change)
                await ledger.settled(settlement(team, f"turn {number}", 10))
        finally:
            await asyncio.to_thread(
                execute, postgres.url, "ALTER TABLE holds ALTER COLUMN model TYPE varchar"
            )
        assert money(ledger, team) == (80, 0)
        assert await ledger.check() == []


async def test_after_the_end_nobody_waits(sqlite: Database) -> None:
    async with running(sqlite) as ledger:
        team = await holder(ledger, 100)
    with pytest.raises(LedgerAway):
        await asyncio.wait_for(ledger.settled(settlement(team, "late", 1)), 2.0)


@pytest.mark.parametrize("odd", [{"prices": {"input": 1 << 80}}, {"flags": ("a\0b",)}])
async def test_what_is_odd_beside_the_money_makes_no_turn_free(
    database: Database, odd: dict[str, Any]
) -> None:
    async with running(database) as ledger:
        team = await holder(ledger, 100)
        await ledger.authorize(hold(team, "one", 30))
        await ledger.settled(settlement(team, "one", 20, **odd))
        assert money(ledger, team) == (80, 0)
        assert ledger.statistics().writer.refused == 0
        assert await ledger.check() == []


async def test_a_moment_beyond_all_calendars_is_settled(sqlite: Database) -> None:
    async with running(sqlite) as ledger:
        team = await holder(ledger, 100)
        budgets = ((team.key_id, Budget(Window.MONTH, 1_000)),)
        await ledger.settled(settlement(team, "one", 20, at=1 << 49, budgets=budgets))
        assert money(ledger, team) == (80, 0)
        assert clean(settlement(team, "two", at=NOON)).at == NOON


def test_half_a_line_hides_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    of = Holder("user_1", "key_1")
    writer = SpoolWriter(tmp_path / "ledger-x-0.spool")
    first, second = (row_of(settlement(of, name)) for name in ("one", "two"))
    real = os.write

    def torn(descriptor: int, data: Any) -> int:
        real(descriptor, bytes(data)[:50])
        raise OSError(28, "No space left on device")

    def fail(*_: Any) -> None:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr("codex_proxy.storage.spool.os.write", torn)
        patch.setattr("codex_proxy.storage.spool.os.ftruncate", fail)
        with pytest.raises(OSError, match="No space"):
            writer.append([first])
    size = writer.append([first, second])
    assert size == writer.path.stat().st_size
    (rows,) = SpoolReader(writer.path).read()
    assert [row["request_id"] for row in rows] == ["one", "two"]
    writer.close()


def test_a_row_of_an_older_version_is_a_settlement() -> None:
    row = row_of(settlement(Holder("user_1", "key_1"), "one"))
    del row["attempts"], row["budgets"]
    assert settlement_of(row).request_id == "one"
    del row["cost"]
    with pytest.raises(ValueError, match="not a settlement"):
        settlement_of(row)


def _add(path: Path, data: bytes) -> None:
    with open(path, "ab") as file:
        file.write(data)


@pytest.mark.parametrize(
    ("between", "at_end", "is_kept"),
    [
        (b"", b"", False),
        # What is torn off nobody was promised.
        (b"", b"00000000 {", False),
        (b"00000000 {}\n", b"", True),
        (b'e5827392 {"source":1}\n', b"", True),
    ],
)
async def test_a_spool_with_a_line_that_cannot_be_read_is_kept(
    sqlite: Database, between: bytes, at_end: bytes, is_kept: bool
) -> None:
    async with running(sqlite) as ledger:
        team = await holder(ledger, 100)
        for name in ("one", "two"):
            await ledger.authorize(hold(team, name, 10))
    spool = sqlite.folder / "ledger-gone-0.spool"
    writer = SpoolWriter(spool)
    writer.append([row_of(settlement(team, "one", 5))])
    _add(spool, between)
    writer.append([row_of(settlement(team, "two", 5))])
    writer.close()
    _add(spool, at_end)
    async with running(sqlite) as ledger:
        await until(lambda: money(ledger, team) == (90, 0))
        assert await ledger.check() == []
    left = [path.name for path in sqlite.folder.glob("ledger-*.spool*")]
    assert left == (["ledger-gone-0.spool.damaged"] if is_kept else [])


async def test_what_is_written_on_a_server_is_written_whatever_it_is_set_to(postgres: Database) -> None:
    name = postgres.url.rpartition("/")[2]
    await asyncio.to_thread(execute, postgres.url, f"ALTER DATABASE {name} SET synchronous_commit = off")
    try:
        async with running(postgres) as ledger:
            found = await ledger.write(lambda c: c.exec_driver_sql("SHOW synchronous_commit").scalar())
            assert found == "on"
    finally:
        await asyncio.to_thread(execute, postgres.url, f"ALTER DATABASE {name} RESET synchronous_commit")
