"""Turns made by hand, and a database of records to put them into."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine

from codex_proxy.clock import Clock, ManualClock
from codex_proxy.config import Live, Settings
from codex_proxy.records.book import Book
from codex_proxy.records.capture import Captured
from codex_proxy.records.tables import SCHEMA
from codex_proxy.storage.engine import writer_engine
from codex_proxy.storage.lock import StoreLock
from codex_proxy.storage.migrating import bring_up
from codex_proxy.storage.queue import Queue
from codex_proxy.storage.store import Store
from codex_proxy.trace import (
    Attempt,
    Caller,
    Candidate,
    Capture,
    Decision,
    End,
    Exclusion,
    Trace,
    Usage,
    UsageSource,
)

AT = 1_800_000_000.0

GATHER = 0.01


def turn(number: int = 1, at: float | None = None, **fields: Any) -> Trace:
    """Return a turn that a `laptop` asked and `work` answered; *fields* are those of the trace."""
    trace = Trace(
        f"req_{number}",
        "responses",
        Caller("k", "laptop"),
        started=1_000.0,
        started_wall=AT + number if at is None else at,
        model="gpt-5.5",
        stream=True,
        client="codex",
        alias="work",
        binding="prompt_cache_key",
        status=200,
        request_bytes=100,
        answer_bytes=2_000,
        read=1_000.001,
        first_event=1_000.5,
        first_text=1_000.75,
        usage=Usage(1_000, 800, 0, 50, 20, UsageSource.BACKEND),
    )
    trace.attempts.append(Attempt("work", 1_000.002, "ok", 200, 2.0, 1_000.1, 1_000.25))
    trace.decisions.append(
        Decision(
            "work",
            "expires first",
            "horizon",
            AT,
            candidates=(
                Candidate("work", 4.25, (("week", 3.0), ("room", 1.25))),
                Candidate("日本", -0.5, (("week", -0.5), ("room", 0.0))),
            ),
            compared=9,
            excluded=(Exclusion("old", "cooling", "usage limit until 09:00"),),
            counts=(("cooling", 1),),
        )
    )
    end = fields.pop("end", End.COMPLETED)
    seconds = fields.pop("seconds", 2.0)
    for name, value in fields.items():
        setattr(trace, name, value)
    trace.finish(end, 1_000.0 + seconds)
    return trace


def said(trace: Trace, asked: bytes, *answered: bytes, limit_bytes: int = 1_000) -> Captured:
    """Return a turn with what was said in it."""
    kept = Capture(limit_bytes)
    kept.ask(asked)
    for part in answered:
        kept.add(part)
    return Captured(trace, kept)


def book(clock: Clock | None = None, **settings: Any) -> Book:
    """Return what writes turns."""
    return Book(Live(Settings(**settings)), clock if clock is not None else ManualClock(AT))


def store(folder: Path, queue: Queue[Any] | None = None, **options: Any) -> Store[Any]:
    """Return a store that is not started."""
    return Store(
        folder,
        SCHEMA,
        options.pop("keeper", None) or book(),
        lock=StoreLock(folder),
        queue=queue if queue is not None else Queue(10_000),
        gather_seconds=GATHER,
        **options,
    )


def new_database(path: Path) -> Engine:
    """Make a database with all tables."""
    engine = writer_engine(path, "NORMAL")
    with engine.begin() as connection:
        bring_up(connection, SCHEMA)
    return engine


@contextmanager
def database(path: Path, turns: Sequence[Any] = ()) -> Iterator[Connection]:
    """Open a database with *turns* in it, in a transaction."""
    engine = new_database(path)
    try:
        with engine.begin() as connection:
            if turns:
                writer = book()
                writer.write(connection, writer.render(turns))
            yield connection
    finally:
        engine.dispose()


def ids(path: Path) -> list[str]:
    """Return the ids in a database, in the order of their times."""
    engine = writer_engine(path, "NORMAL")
    try:
        with engine.begin() as connection:
            return list(connection.exec_driver_sql("SELECT id FROM turns ORDER BY key").scalars())
    finally:
        engine.dispose()
