"""Retention: what is old goes, what is too much goes, a little at a time."""

import sqlite3
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, func, select

from codex_proxy.clock import ManualClock
from codex_proxy.records.book import SLICE, prune
from codex_proxy.records.queries import one
from codex_proxy.records.tables import captures, turns
from codex_proxy.storage.engine import used_bytes
from tests.records.making import AT, book, database, new_database, said, turn

FOREVER = 1 << 60


def count(connection: Connection, table: Any = turns) -> int:
    return int(connection.execute(select(func.count()).select_from(table)).scalar_one())


def fill(path: Path, number: int, **fields: Any) -> Engine:
    engine = new_database(path)
    writer = book()
    with engine.begin() as connection:
        writer.write(connection, writer.render([turn(place, **fields) for place in range(number)]))
    return engine


def test_what_is_old_goes_in_slices(tmp_path: Path) -> None:
    engine = fill(tmp_path / "records.db", 2_500)
    left = []
    with engine.begin() as connection:
        more = True
        while more:
            more = prune(connection, before=AT + 2_400, captured_before=0.0, max_bytes=FOREVER)
            left.append(count(connection))
    assert left == [2_500 - SLICE, 2_500 - 2 * SLICE, 100]
    engine.dispose()


def test_too_many_go_until_there_is_room_and_the_file_shrinks(tmp_path: Path) -> None:
    path = tmp_path / "records.db"
    engine = fill(path, 4_500)
    clock = ManualClock(AT)
    with engine.begin() as connection:
        full = used_bytes(connection)
    limit = full // 2
    writer = book(clock, records_max_size=limit)
    rounds = 0
    more = True
    while more:
        with engine.begin() as connection:
            more = writer.tend(connection)
        rounds += 1
    with engine.begin() as connection:
        # With room for those to come, or each would cost another.
        assert used_bytes(connection) <= limit * 0.96
        newest = connection.execute(select(turns.c.id).order_by(turns.c.key.desc())).scalars().first()
        assert newest == "req_4499"
        left = count(connection)
        assert 1_000 < left < 2_500
        assert (
            connection.execute(select(turns.c.id).order_by(turns.c.key)).scalars().first()
            == f"req_{4_500 - left}"
        )
        for _ in range(3):
            writer.tend(connection)
        assert count(connection) == left
    assert rounds >= 3
    engine.dispose()
    assert path.stat().st_size < full * 0.75


def test_a_limit_below_what_an_empty_database_takes_ends(tmp_path: Path) -> None:
    engine = fill(tmp_path / "records.db", 50)
    with engine.begin() as connection:
        for _ in range(5):
            prune(connection, before=0.0, captured_before=0.0, max_bytes=1)
        assert count(connection) <= 1
        assert not prune(connection, before=AT * 2, captured_before=0.0, max_bytes=1)
    engine.dispose()


def test_age_and_clock_are_those_of_the_settings(tmp_path: Path) -> None:
    clock = ManualClock(AT)
    writer = book(clock, records_max_age=100.0)
    with database(tmp_path / "records.db", [turn(number) for number in range(50)]) as connection:
        writer.tend(connection)
        assert count(connection) == 50
        clock.advance(110.0)
        writer.tend(connection)
        assert count(connection) == 40


def test_what_was_said_goes_sooner_and_never_outlives_its_turn(tmp_path: Path) -> None:
    turns = [said(turn(number), b"asked", b"answered") for number in range(20)]
    with database(tmp_path / "records.db", turns) as connection:
        assert (count(connection), count(connection, captures)) == (20, 20)
        prune(connection, before=0.0, captured_before=AT + 5, max_bytes=FOREVER)
        assert (count(connection), count(connection, captures)) == (20, 15)
        prune(connection, before=AT + 15, captured_before=AT + 5, max_bytes=FOREVER)
        assert (count(connection), count(connection, captures)) == (5, 5)


def test_what_was_said_can_be_anything(tmp_path: Path) -> None:
    odd = said(turn(1), b"\xff\0\xe6\x97", "日本".encode(), limit_bytes=4)
    with database(tmp_path / "records.db", [odd, turn(2)]) as connection:
        found = one(connection, "req_1")
        assert found is not None
        assert found.capture == {"request": "\ufffd\ufffd\ufffd", "answer": "日\ufffd", "is_cut": True}
        other = one(connection, "req_2")
        assert other is not None
        assert other.capture is None


def test_what_is_written_twice_is_there_once(tmp_path: Path) -> None:
    with database(tmp_path / "records.db") as connection:
        writer = book()
        rows = writer.render([turn(1), turn(2), said(turn(3), b"a", b"b")])
        writer.write(connection, rows)
        writer.write(connection, rows)
        assert (count(connection), count(connection, captures)) == (3, 1)


def test_a_clock_before_its_time_does_no_harm(tmp_path: Path) -> None:
    with database(tmp_path / "records.db", [turn(1, at=-5.0), turn(2, at=0.0)]) as connection:
        assert count(connection) == 2
    assert sqlite3.connect(tmp_path / "records.db").execute("SELECT min(key) >= 0 FROM turns").fetchone() == (
        1,
    )
