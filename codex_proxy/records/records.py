"""Keeps what became of each request; the one way in, and the one way to ask.

What is written is written by a thread (`storage.store`), which is also where SQLAlchemy is imported: with
`records: off` it never is.
"""

import asyncio
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from codex_proxy.clock import Clock
from codex_proxy.config import Live
from codex_proxy.errors import ProxyError
from codex_proxy.protocol.wire import JsonObject
from codex_proxy.records.asking import Found, Page, no_cache, no_listing
from codex_proxy.records.capture import Captured
from codex_proxy.storage.lock import StoreLock
from codex_proxy.storage.queue import Queue, Statistics
from codex_proxy.tasks import Job
from codex_proxy.trace import Trace

if TYPE_CHECKING:
    from types import ModuleType

    from sqlalchemy import Connection

    from codex_proxy.storage.store import Store

T = TypeVar("T")

# A busy daemon's last seconds; each is some kilobytes.
MAX_WAITING = 5_000

# What was said in them may be large, and is the first to go when it cannot be written.
_MAX_SAID_WAITING = 50

_LOOK_SECONDS = 1.0

# A question may look at every turn that there is; others, who use the same threads, go on meanwhile.
_QUESTIONS = 2


class Unavailable(ProxyError):
    """Records cannot be read now; the message says why."""

    status = 503
    code = "records_unavailable"


class Records:
    """The records of one daemon.

    `may_write` follows whether the daemon is the one of its data-dir that writes.

    Args:
        lock: That of the data-dir, where other stores share it.
    """

    def __init__(self, folder: Path, *, live: Live, clock: Clock, lock: StoreLock | None = None) -> None:
        self._folder = folder
        self._live = live
        self._clock = clock
        self._queue: Queue[Trace | Captured] = Queue(MAX_WAITING)
        self._lock = StoreLock(folder) if lock is None else lock
        self._store: Store[Trace | Captured] | None = None
        self._may_write = False
        self._changing = asyncio.Lock()
        self._asking = asyncio.Semaphore(_QUESTIONS)
        self._is_over = False

    # -- what has ended --------------------------------------------------------------------

    def note(self, trace: Trace) -> None:
        """Take in a turn that has ended, and does not change any more."""
        said = trace.said
        if said is not None:
            trace.said = None
        if self._live.current.records == "on":
            if said is not None and self._may_write and len(self._queue) < _MAX_SAID_WAITING:
                self._queue.put(Captured(trace, said))
            else:
                self._queue.put(trace)

    # -- life ------------------------------------------------------------------------------

    def jobs(self) -> list[Job]:
        """Return what runs by itself: following the setting."""
        return [Job("records", lambda: _LOOK_SECONDS, self.look, at_once=True)]

    @property
    def may_write(self) -> bool:
        """Whether this process may take the right to write."""
        return self._may_write

    @may_write.setter
    def may_write(self, value: bool) -> None:
        self._may_write = value
        if self._store is not None:
            self._store.may_write = value

    async def look(self) -> None:
        """Begin or end, as the setting says."""
        async with self._changing:
            is_on = self.is_on and not self._is_over
            if is_on and self._store is None:
                store = await asyncio.to_thread(self._make)
                store.may_write = self._may_write
                self._store = store
                store.start()
            elif not is_on and self._store is not None:
                store, self._store = self._store, None
                await asyncio.to_thread(store.stop)

    async def prepare(self) -> None:
        """Import what the writing takes, so that it holds up no request later."""
        if self.is_on:
            await asyncio.to_thread(importlib.import_module, "codex_proxy.records.book")
            await asyncio.to_thread(importlib.import_module, "codex_proxy.storage.store")

    def _make(self) -> "Store[Trace | Captured]":
        # A third of a second of imports, and 16 MB, for those who need them.
        from codex_proxy.records.book import Book
        from codex_proxy.records.tables import SCHEMA
        from codex_proxy.storage.store import Store

        book = Book(self._live, self._clock)
        return Store(self._folder, SCHEMA, book, lock=self._lock, queue=self._queue)

    async def hand_over(self) -> None:
        """Let another process write from now on; what still comes here reaches it through a spool."""
        async with self._changing:
            if self._store is not None:
                await asyncio.to_thread(self._store.hand_over)

    async def take_back(self) -> None:
        """Write again after all: nobody else does."""
        if self._store is not None:
            self._store.take_back()

    async def aclose(self) -> None:
        """Write what waits, and end."""
        if len(self._queue) and self._may_write:
            # It was too short a life for the job's first round.
            await self.look()
        self._is_over = True
        await self.look()

    def statistics(self) -> Statistics:
        """Return how the writing goes."""
        if self._store is None:
            return Statistics(len(self._queue), 0, self._queue.dropped, "", False)
        return self._store.statistics()

    # -- questions -------------------------------------------------------------------------

    @property
    def is_on(self) -> bool:
        """Whether records are kept."""
        return self._live.current.records == "on"

    async def page(self, page: Page) -> JsonObject:
        """Return some turns, the newest first, and what there is to choose from.

        Raises:
            Unavailable: If the database cannot be read.
        """
        queries = _queries()
        return await self._ask(
            lambda connection: queries.listing(connection, page.wanted, limit=page.limit, before=page.before),
            no_listing,
        )

    async def find(self, request_id: str) -> Found | None:
        """Return a turn by its id; None when there is none.

        Raises:
            Unavailable: If the database cannot be read.
        """
        queries = _queries()
        return await self._ask(lambda connection: queries.one(connection, request_id), lambda: None)

    async def cache(self, hours: float) -> JsonObject:
        """Return how well the prompt caches were hit in the last *hours*.

        Raises:
            Unavailable: If the database cannot be read.
        """
        queries, now = _queries(), self._clock.now()
        return await self._ask(
            lambda connection: queries.cache(connection, since=now - hours * 3_600.0, until=now), no_cache
        )

    async def _ask(self, question: "Callable[[Connection], T]", nothing: Callable[[], T]) -> T:
        store_module = importlib.import_module("codex_proxy.storage.store")
        if self._store is None:
            # It is just being opened.
            await self.look()
        store = self._store
        if store is None:
            return nothing()
        try:
            async with self._asking:
                return await asyncio.to_thread(store.read, question)
        except store_module.NoDatabase:
            return nothing()
        except store_module.NotKept as exc:
            raise Unavailable(f"the records cannot be read: {exc}") from exc


def _queries() -> "ModuleType":
    return importlib.import_module("codex_proxy.records.queries")
