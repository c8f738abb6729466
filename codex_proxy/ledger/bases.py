"""The database of a ledger: a file of this process alone, or a server that several share."""

import asyncio
import contextlib
import logging
import os
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol, TypeVar

from sqlalchemy import Connection, Engine
from sqlalchemy.exc import DBAPIError

from codex_proxy.errors import ProxyError
from codex_proxy.ledger.tables import SCHEMA
from codex_proxy.storage.engine import network_file_system, reason_of, writer_engine
from codex_proxy.storage.lock import StoreLock
from codex_proxy.storage.migrating import ForeignSchema, Schema, bring_up, revision_of
from codex_proxy.storage.store import NotKept, Reading

logger = logging.getLogger(__name__)

T = TypeVar("T")


class NotOpened(ProxyError):
    """The ledger's database cannot be used; the message says why, and what would help."""


class Away(Exception):
    """The database cannot be used now; another try may do."""

    is_passing = False
    """Whether a moment later it may be there."""


class Taken(Away):
    """Another process has it."""

    is_passing = True


class Again(Exception):
    """A transaction got into another's way and did nothing.

    Args:
        is_taken: What was to be written was there already, by another's doing; who looks again will see it.
    """

    def __init__(self, message: str, *, is_taken: bool = False) -> None:
        super().__init__(message)
        self.is_taken = is_taken


class Base(Protocol):
    """A database, as the one thread that writes it sees it."""

    is_alone: bool
    """Whether nobody else changes it, so that what was read stays true."""

    def open(self) -> None:
        """Open it, and give it its last shape.

        Raises:
            NotOpened: If it can never be used as it is.
            Away: If it cannot be used now.
        """
        ...

    def transaction(self, work: Callable[[Connection], T], *, is_trial: bool = False) -> T:
        """Do *work* in a transaction; a trial is not given much time.

        Raises:
            Away: If the database cannot be used now; whether it was done is not known.
            Again: If it did nothing, and is worth another try.
        """
        ...

    def give_up(self) -> None:
        """Close it, and let another process write it."""
        ...


class Reader(Protocol):
    """A database, as those see it who only ask."""

    async def ask(self, question: Callable[[Connection], T], *, is_long: bool = False) -> T:
        """Ask *question*; a long one is about everything, and may take its time.

        Raises:
            Away: If it cannot be read.
        """
        ...

    async def aclose(self) -> None:
        """End."""
        ...


class FileBase:
    """`ledger.db` in data-dir.

    Args:
        lock: The data-dir's; whoever has it is the only one that writes.
    """

    is_alone = True

    def __init__(self, folder: Path, lock: StoreLock, schema: Schema = SCHEMA) -> None:
        self.path = folder / f"{schema.name}.db"
        self._folder = folder
        self._lock = lock
        self._schema = schema
        self._engine: Engine | None = None
        self._connection: Connection | None = None

    def open(self) -> None:
        """Open it, and give it its last shape; what it was before is kept beside it."""
        try:
            if not self._lock.acquire(self._schema.name):
                raise Taken(
                    f"another process uses {self.path}: two daemons on one file are refused; stop the other one, or give this "
                    "one its own data-dir or a database-url"
                )
            kind = network_file_system(self._folder)
        except OSError as exc:
            raise Away(f"{self._folder}: {exc.strerror or type(exc).__name__}") from exc
        if kind is not None:
            raise NotOpened(
                f"data-dir {self._folder} is on a network file system ({kind}), where a database would be damaged: move "
                "it, or set database-url"
            )
        try:
            engine = writer_engine(self.path, self._schema.synchronous)
        except OSError as exc:
            raise Away(f"{self.path}: {exc.strerror or type(exc).__name__}") from exc
        try:
            with engine.begin() as connection:
                revision = revision_of(connection)
            if revision is not None and revision in self._schema.revisions[:-1]:
                self._back_up(engine, revision)
            with engine.begin() as connection:
                bring_up(connection, self._schema)
        except ForeignSchema as exc:
            engine.dispose()
            raise NotOpened(
                f"{self.path} cannot be used: {exc}. Use the version that made it, or move the file away"
            ) from exc
        except DBAPIError as exc:
            engine.dispose()
            raise Away(f"{self.path}: {reason_of(exc)}") from exc
        except BaseException:
            engine.dispose()
            raise
        self._engine, self._connection = engine, engine.connect()

    def _back_up(self, engine: Engine, revision: str) -> None:
        kept = self.path.with_name(f"{self.path.name}.before-{self._schema.revisions[-1]}")
        stamp = time.strftime("%Y%m%d-%H%M%S")
        if kept.exists():
            kept = kept.with_name(f"{kept.name}-{stamp}")
        new = kept.with_name(f"{kept.name}.new")
        with contextlib.suppress(FileNotFoundError):
            new.unlink()
        os.close(os.open(new, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
        with engine.connect() as connection:
            raw = connection.connection.driver_connection
            assert raw is not None
            copy = sqlite3.connect(new)
            try:
                raw.backup(copy)
            finally:
                copy.close()
        os.replace(new, kept)
        logger.info("database was copied before it changes its shape from=%s kept=%s", revision, kept)

    def transaction(self, work: Callable[[Connection], T], *, is_trial: bool = False) -> T:
        """Do *work* in a transaction."""
        if self._connection is None:
            raise Away("it is not open")
        try:
            with self._connection.begin():
                return work(self._connection)
        except DBAPIError as exc:
            if _is_away(exc.orig):
                raise Away(reason_of(exc)) from exc
            raise
        except sqlite3.Error as exc:
            # Not by way of SQLAlchemy (`storage.bulk`).
            if _is_away(exc):
                raise Away(str(exc)[:200]) from exc
            raise

    def give_up(self) -> None:
        """Close it, and let another process write it."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None
        if self._engine is not None:
            self._engine.dispose()
            self._engine = None
        self._lock.release(self._schema.name)


def _is_away(error: BaseException | None) -> bool:
    """Tell whether it is the file that does not do, and not what was to be written."""
    return isinstance(error, sqlite3.OperationalError) or type(error) is sqlite3.DatabaseError


class FileReader:
    """Asks `ledger.db` on threads of the loop's pool."""

    def __init__(self, path: Path, schema: Schema = SCHEMA) -> None:
        self._reading = Reading(path, schema)

    async def ask(self, question: Callable[[Connection], T], *, is_long: bool = False) -> T:
        """Ask *question*; nothing is too long for a file."""
        try:
            return await asyncio.to_thread(self._reading.ask, question)
        except NotKept as exc:
            raise Away(str(exc)) from exc

    async def aclose(self) -> None:
        """Close what nobody uses."""
        self._reading.close()
