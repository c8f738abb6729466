"""Statements over many rows, in SQLite and PostgreSQL alike, one for all rows and with few different texts.

Having a text rendered for every batch takes longer than running it. And each statement lets the other threads
have the interpreter, and has to get it back: many rows are written in one, not one after the other.
"""

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from sqlalchemy import Column, Connection, Dialect, Table

# SQLite takes each value of each row by itself. There is a text for each of these numbers of rows; what a batch does
# not fill is left empty.
_SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128)

Values = Sequence[Any]
"""One row, in the order of the columns; its first value is never None."""


class Bulk:
    """One statement over rows of *columns*.

    Args:
        write: Makes its text out of one that gives the rows.
    """

    def __init__(self, columns: Iterable[Column[Any]], write: Callable[[str], str]) -> None:
        self._columns = tuple(columns)
        self._write = write
        # The driver binds numbers at once, and asks around for what becomes of anything else.
        self._empty = (None, *[0] * (len(self._columns) - 1))
        self._texts: dict[tuple[str, int], str] = {}

    def run(self, connection: Connection, rows: Sequence[Values]) -> None:
        """Run it for all *rows*."""
        for some in _parts(rows):
            _execute(connection, *self._prepare(connection.dialect, some))

    def fetch(self, connection: Connection, rows: Sequence[Values]) -> list[Any]:
        """Run it for all *rows*, and return what it gives."""
        found: list[Any] = []
        for some in _parts(rows):
            found += _execute(connection, *self._prepare(connection.dialect, some)).fetchall()
        return found

    def _prepare(self, dialect: Dialect, rows: Sequence[Values]) -> tuple[str, tuple[Any, ...]]:
        if dialect.name == "postgresql":
            # A list for each column, and so one text for any number of rows.
            return self._text(dialect, 0), tuple(list(column) for column in zip(*rows, strict=True))
        size = next(size for size in _SIZES if size >= len(rows))
        missing = itertools.repeat(self._empty, size - len(rows))
        return self._text(dialect, size), tuple(itertools.chain.from_iterable((*rows, *missing)))

    def _text(self, dialect: Dialect, size: int) -> str:
        text = self._texts.get((dialect.name, size))
        if text is None:
            text = self._write(self._source(dialect, size))
            if dialect.name == "sqlite":
                # Who fails here rolls back all of it. Being able to take back this statement alone would cost a copy of
                # each page that it changes.
                for verb in ("INSERT", "UPDATE"):
                    text = text.replace(f") {verb} ", f") {verb} OR FAIL ", 1)
            self._texts[dialect.name, size] = text
        return text

    def _source(self, dialect: Dialect, size: int) -> str:
        if dialect.name != "postgresql":
            row = f"({', '.join('?' * len(self._columns))})"
            return f"VALUES {', '.join([row] * size)}"
        kinds = [column.type.dialect_impl(dialect).compile(dialect) for column in self._columns]
        # How a column is sorted is no part of a value's kind.
        lists = [f"${number}::{kind.partition(' COLLATE ')[0]}[]" for number, kind in enumerate(kinds, 1)]
        return f"SELECT * FROM unnest({', '.join(lists)})"


def _execute(connection: Connection, text: str, values: tuple[Any, ...]) -> Any:
    if connection.dialect.name == "sqlite":
        # Past SQLAlchemy, which would take a fifth of the time to do the same.
        return connection.connection.driver_connection.execute(text, values)  # type: ignore[union-attr]
    return connection.exec_driver_sql(text, values)


def _parts(rows: Sequence[Values]) -> Iterable[Sequence[Values]]:
    most = _SIZES[-1]
    if len(rows) > most:
        return [rows[start : start + most] for start in range(0, len(rows), most)]
    return [rows] if rows else ()


def insertion(table: Table, *, leaving_out: Sequence[str] = (), on_conflict: str = "") -> Bulk:
    """Return what adds rows to *table*; its columns are given in their order, but for those left out."""
    columns = [column for column in table.c if column.name not in leaving_out]
    names = _names(columns)
    ending = f" ON CONFLICT {on_conflict}" if on_conflict else ""
    return Bulk(
        columns,
        lambda rows: (
            f"WITH news ({names}) AS ({rows}) INSERT INTO {table.name} ({names}) SELECT {names} FROM news "
            f"WHERE {_names(columns[:1])} IS NOT NULL{ending}"
        ),
    )


def deletion(column: Column[Any], *, where: str = "TRUE") -> Bulk:
    """Return what deletes the rows whose *column* is one of the values."""
    return Bulk(
        [column],
        lambda rows: f"DELETE FROM {column.table} WHERE {_names([column])} IN ({rows}) AND {where}",
    )


def change(key: Column[Any], columns: Sequence[Column[Any]]) -> Bulk:
    """Return what gives *columns* of the rows with a *key* new values; a row is the key and these."""
    changes = ", ".join(f'"{column.name}" = news."{column.name}"' for column in columns)
    return Bulk(
        [key, *columns],
        lambda rows: (
            f"WITH news ({_names([key, *columns])}) AS ({rows}) UPDATE {key.table} SET {changes} FROM news "
            f'WHERE {key.table}."{key.name}" = news."{key.name}"'
        ),
    )


def look_up(key: Column[Any], columns: Sequence[Column[Any]], *, ending: str = "") -> Bulk:
    """Return what finds *columns* of the rows whose *key* is one of the values."""
    return Bulk(
        [key],
        lambda rows: f"SELECT {_names(columns)} FROM {key.table} WHERE {_names([key])} IN ({rows}) {ending}",
    )


def _names(columns: Iterable[Column[Any]]) -> str:
    # Some are words of the language.
    return ", ".join(f'"{column.name}"' for column in columns)
