"""The database of a ledger on a PostgreSQL server; imported only where there is one."""

import asyncio
import threading
from collections.abc import Callable
from typing import TypeVar

from sqlalchemy import Connection, text
from sqlalchemy.exc import DBAPIError

from codex_proxy.ledger.bases import Again, Away, NotOpened
from codex_proxy.ledger.tables import SCHEMA
from codex_proxy.storage.migrating import ForeignSchema, Schema, bring_up, revision_of
from codex_proxy.storage.postgres import TRANSACTION_SECONDS, InTheWay, Postgres, Unreachable

T = TypeVar("T")

# It is only about the shape of one database.
_SHAPE_LOCK = 0x0C0DE_1ED6E5
# How long a change of the shape may take, or another process's.
_SHAPE_SECONDS = 1_800.0

# For a server that does not answer there are others who wait.
_TRIAL_SECONDS = 1.5
_QUESTION_SECONDS = 30.0
# One about all that there is.
_LONG_SECONDS = 1_800.0
_READERS = 3


class ServerBase:
    """A PostgreSQL database.

    Args:
        url: As libpq has it.
    """

    is_alone = False

    def __init__(self, url: str, schema: Schema = SCHEMA) -> None:
        self._server = Postgres(url, connections=1, is_writer=True)
        self._schema = schema
        self._loop: asyncio.AbstractEventLoop | None = None

    def open(self) -> None:
        """Give the database its last shape, one process at a time."""
        if self._loop is None:
            self._loop = asyncio.new_event_loop()

        def work(connection: Connection) -> None:
            connection.execute(text("SET LOCAL statement_timeout = 0"))
            connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": _SHAPE_LOCK})
            bring_up(connection, self._schema)

        try:
            if self.transaction(revision_of) != self._schema.revisions[-1]:
                self._run(work, _SHAPE_SECONDS)
        except ForeignSchema as exc:
            raise NotOpened(
                f"the database that database-url names cannot be used: {exc}. Give the ledger one of its own"
            ) from exc
        except DBAPIError as exc:
            raise NotOpened(
                f"the database that database-url names cannot be used: {type(exc.orig).__name__}"
            ) from exc

    def transaction(self, work: Callable[[Connection], T], *, is_trial: bool = False) -> T:
        """Do *work* in a transaction."""
        return self._run(work, _TRIAL_SECONDS if is_trial else TRANSACTION_SECONDS)

    def _run(self, work: Callable[[Connection], T], seconds: float) -> T:
        if self._loop is None:
            raise Away("it is not open")
        try:
            return self._loop.run_until_complete(self._server.transaction(work, seconds=seconds))
        except Unreachable as exc:
            raise Away(str(exc)) from exc
        except InTheWay as exc:
            raise Again(str(exc), is_taken=exc.is_taken) from exc

    def give_up(self) -> None:
        """Close it."""
        if self._loop is not None:
            self._loop.run_until_complete(self._server.aclose())
            self._loop.close()
            self._loop = None


class ServerReader:
    """Asks a PostgreSQL database, on a thread of its own: a long answer keeps nobody waiting but who asked."""

    def __init__(self, url: str) -> None:
        self._server = Postgres(url, connections=_READERS, is_writer=False)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None

    async def ask(self, question: Callable[[Connection], T], *, is_long: bool = False) -> T:
        """Ask *question*; a long one is about everything, and may take its time."""
        seconds = _LONG_SECONDS if is_long else _QUESTION_SECONDS

        def work(connection: Connection) -> T:
            connection.execute(text(f"SET LOCAL statement_timeout = {round(seconds * 1_000.0)}"))
            return question(connection)

        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            self._thread = threading.Thread(target=self._loop.run_forever, name="ledger-reader", daemon=True)
            self._thread.start()
        asked = self._server.transaction(work, seconds=seconds, is_reading=True)
        try:
            return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(asked, self._loop))
        except (Unreachable, InTheWay) as exc:
            raise Away(str(exc)) from exc

    async def aclose(self) -> None:
        """End."""
        loop, self._loop = self._loop, None
        if loop is None or self._thread is None:
            return
        await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(self._server.aclose(), loop))
        loop.call_soon_threadsafe(loop.stop)
        await asyncio.to_thread(self._thread.join)
        loop.close()
