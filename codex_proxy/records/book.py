"""Turns on their way into the database, and out of it again when they are old or too many."""

import importlib
import itertools
import random
from collections.abc import Iterator, Sequence

from sqlalchemy import Connection, Dialect, Table, delete, func, select

from codex_proxy.clock import Clock
from codex_proxy.config import Live
from codex_proxy.records.capture import Captured
from codex_proxy.records.story import row_of
from codex_proxy.records.tables import KEY_BITS, KEYS_A_SECOND, captures, turns
from codex_proxy.storage.engine import give_back, used_bytes
from codex_proxy.storage.spool import Row
from codex_proxy.trace import Trace

SLICE = 1_000
"""How many turns are deleted at a time: a few milliseconds, in which nothing is written."""

# How full the database is left when it was too full, so that not every new turn costs an old one.
_ROOM = 0.95


class Book:
    """What the writer thread does with turns; see `storage.store.Keeper`."""

    def __init__(self, live: Live, clock: Clock) -> None:
        self._live = live
        self._clock = clock
        self._is_emptying = False
        self._numbers: Iterator[int] = itertools.count(random.getrandbits(KEY_BITS))

    def render(self, items: Sequence[Trace | Captured]) -> list[Row]:
        """Return *items* as rows; those of what was said name their table."""
        rows: list[Row] = []
        for item in items:
            if isinstance(item, Captured):
                key = self._key(item.trace.started_wall)
                rows += row_of(item.trace, key), {"captures": item.row(key)}
            else:
                rows.append(row_of(item, self._key(item.started_wall)))
        return rows

    def _key(self, at: float) -> int:
        number = next(self._numbers) & ((1 << KEY_BITS) - 1)
        return max(0, round(at * 1_000_000)) << KEY_BITS | number

    def write(self, connection: Connection, rows: Sequence[Row]) -> None:
        """Write *rows*; those that are there already stay as they are."""
        said = [row["captures"] for row in rows if "captures" in row]
        told = [row for row in rows if "captures" not in row] if said else rows
        _insert(connection, turns, told)
        if said:
            _insert(connection, captures, said)

    def tend(self, connection: Connection) -> bool:
        """Delete a slice of what is too old, or too much; True when there is more of it."""
        settings, now = self._live.current, self._clock.now()
        self._is_emptying = prune(
            connection,
            before=now - settings.records_max_age,
            captured_before=now - settings.capture_max_age,
            max_bytes=int(settings.records_max_size * (_ROOM if self._is_emptying else 1.0)),
        )
        return self._is_emptying


# So many rows go into one statement, as far as there are so many. Each statement lets the loop's thread have the
# interpreter and has to get it back, which takes more than writing a row.
_TOGETHER = (32, 4, 1)

_statements: dict[tuple[str, str, int], tuple[str, tuple[str, ...]]] = {}


def _insertion(table: Table, dialect: Dialect, count: int) -> tuple[str, tuple[str, ...]]:
    """Return the statement that adds rows to *table* unless their keys are there, and the columns in order.

    Rendered once: to have it done for every batch takes half as long again as writing the batch.
    """
    known = _statements.get((table.name, dialect.name, count))
    if known is None:
        # Each has its own word for it, and the other one's takes long to import.
        dialects = importlib.import_module(f"sqlalchemy.dialects.{dialect.name}")
        names = tuple(column.name for column in table.c)
        rows = [dict.fromkeys(names)] * count
        compiled = dialects.insert(table).values(rows).on_conflict_do_nothing().compile(dialect=dialect)
        known = str(compiled), names
        _statements[table.name, dialect.name, count] = known
    return known


def _insert(connection: Connection, table: Table, rows: Sequence[Row]) -> None:
    start = 0
    for count in _TOGETHER:
        if len(rows) - start < count:
            continue
        statement, names = _insertion(table, connection.dialect, count)
        while len(rows) - start >= count:
            some = rows[start : start + count]
            connection.exec_driver_sql(statement, tuple([row[name] for row in some for name in names]))
            start += count


def prune(connection: Connection, *, before: float, captured_before: float, max_bytes: int) -> bool:
    """Delete a slice of turns from before a moment, or the oldest while there are too many.

    Returns:
        Whether there is more to delete.
    """
    old = max(0, int(captured_before * KEYS_A_SECOND))
    connection.execute(delete(captures).where(captures.c.key < old))
    limit = max(0, int(before * KEYS_A_SECOND))
    more = _delete_before(connection, limit)
    is_sqlite = connection.dialect.name == "sqlite"
    if not more and is_sqlite and used_bytes(connection) > max_bytes:
        newest = connection.execute(select(func.max(turns.c.key))).scalar()
        if newest is not None:
            _delete_before(connection, newest)
            more = used_bytes(connection) > max_bytes
    if is_sqlite:
        give_back(connection, SLICE)
    return more


def _delete_before(connection: Connection, limit: int) -> bool:
    """Delete up to a slice of the oldest turns with a key below *limit*; tell whether there are more."""
    oldest = (
        select(turns.c.key).where(turns.c.key < limit).order_by(turns.c.key).offset(SLICE).limit(1)
    )  # fmt: skip
    end = connection.execute(oldest).scalar()
    connection.execute(delete(turns).where(turns.c.key < (limit if end is None else end)))
    return end is not None
