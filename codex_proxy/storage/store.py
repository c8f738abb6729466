"""One database file of data-dir and the one thread that writes it.

Whoever has something to write puts it into the queue and goes on; the thread takes what has gathered and writes
it in one transaction. Whatever goes wrong there costs what was to be written, is counted and said once, and is
tried again: nobody who serves requests hears of it.

The thread writes while the process has the lock of its data-dir. Until it has it, what comes waits, bounded.
Once it was told to hand over it has not, and appends to a spool instead: the process that has the lock reads all
spools it finds, and removes those that are over.
"""

import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Generic, Protocol, TypeVar

from sqlalchemy import Connection, Engine
from sqlalchemy.exc import DBAPIError

from codex_proxy.storage.engine import (
    is_broken,
    is_whole,
    network_file_system,
    reader_engine,
    reason_of,
    writer_engine,
)
from codex_proxy.storage.lock import StoreLock
from codex_proxy.storage.migrating import ForeignSchema, Schema, bring_up, check, revision_of
from codex_proxy.storage.queue import Queue, Statistics
from codex_proxy.storage.spool import SUFFIX, Row, SpoolReader, SpoolWriter

logger = logging.getLogger(__name__)

T = TypeVar("T")
R = TypeVar("R")
T_contra = TypeVar("T_contra", contravariant=True)

GATHER_SECONDS = 1.0
"""How long the first item of a batch waits for others: many are written in half the time that few take, each."""

# How often it is looked whether the lock is free, a spool is there, a fault has passed.
LOOK_SECONDS = 2.0
_TEND_SECONDS = 60.0
# What is done of it before what has come meanwhile is written.
_TEND_SLICES = 8
_RETRY_SECONDS = 30.0

# What is rendered at a time: the loop has its turn in between.
_SLICE = 64

_STOP_SECONDS = 10.0


class Keeper(Protocol[T_contra]):
    """What a store's thread does with what it is given; all of it is called in that thread."""

    def render(self, items: Sequence[T_contra]) -> list[Row]:
        """Return *items* as rows that JSON can hold."""
        ...

    def write(self, connection: Connection, rows: Sequence[Row]) -> None:
        """Write *rows*; what is there already is left alone, because a spool may be read twice."""
        ...

    def tend(self, connection: Connection) -> bool:
        """Do a little of what has to be done now and then; True when there is more of it."""
        ...


class NotKept(Exception):
    """There is no database that could be read, and why."""


class NoDatabase(NotKept):
    """There is none."""


class BrokenDatabase(NotKept):
    """It is there, and damaged."""


class Store(Generic[T]):
    """A database, and what is on its way there.

    Args:
        folder: The data-dir.
        lock: Its lock, which other stores may share.
        queue: What is to be written.
    """

    def __init__(
        self,
        folder: Path,
        schema: Schema,
        keeper: Keeper[T],
        *,
        lock: StoreLock,
        queue: Queue[T],
        gather_seconds: float | None = None,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self.path = folder / f"{schema.name}.db"
        self.may_write = True
        """Whether the lock may be taken; another process may be meant to have it."""
        self._folder = folder
        self._schema = schema
        self._keeper = keeper
        self._lock = lock
        self._queue = queue
        self._gather_seconds = GATHER_SECONDS if gather_seconds is None else gather_seconds
        self._monotonic = monotonic
        self._engine: Engine | None = None
        self._reading = Reading(self.path, schema)
        self._spool: SpoolWriter | None = None
        self._spools: dict[Path, SpoolReader] = {}
        self._is_handing_over = False
        self._has_handed_over = threading.Event()
        self._ending = threading.Event()
        self._thread: threading.Thread | None = None
        self._trouble = ""
        self._lost = 0
        """How many were lost since the trouble began."""
        self._retry_at = 0.0
        self._tend_at = 0.0
        self._written = 0

    # -- from other threads ----------------------------------------------------------------

    def start(self) -> None:
        """Begin to write."""
        self._thread = threading.Thread(target=self._work, name=f"store:{self._schema.name}", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Write what waits, close, and let another process have the lock. Takes a moment."""
        self._ending.set()
        self._queue.wake.set()
        if self._thread is not None:
            self._thread.join(_STOP_SECONDS)
            if self._thread.is_alive():
                logger.error("database is not closed, writing it hangs path=%s", self.path)
        self._reading.close()

    def hand_over(self) -> None:
        """Write what waits, let another process have the lock, and from now on append to a spool. Takes a moment."""
        self._is_handing_over = True
        self._queue.wake.set()
        self._has_handed_over.wait(_STOP_SECONDS)

    def take_back(self) -> None:
        """Write the database again after all, when nobody else does."""
        self._is_handing_over = False
        self._queue.wake.set()

    def read(self, question: Callable[[Connection], R]) -> R:
        """Ask the database something; it takes a moment, so not on a loop.

        Raises:
            NotKept: If there is nothing to ask, or it cannot be read.
        """
        try:
            return self._reading.ask(question)
        except BrokenDatabase:
            # The writer looks, and begins a new one.
            self._reading.is_suspect = True
            self._queue.wake.set()
            raise

    def statistics(self) -> Statistics:
        """Return how it goes."""
        return Statistics(
            len(self._queue), self._written, self._queue.dropped, self._trouble, self._engine is not None
        )

    # -- the thread ------------------------------------------------------------------------

    def _work(self) -> None:
        wake = self._queue.wake
        more = False
        while not self._ending.is_set():
            wake.wait(self._gather_seconds if more else LOOK_SECONDS)
            if not self._is_handing_over:
                # What comes meanwhile is written with it.
                self._ending.wait(self._gather_seconds if len(self._queue) else 0.0)
            wake.clear()
            more = self._guarded_round()
        self._guarded_round()
        self._close()

    def _guarded_round(self) -> bool:
        try:
            return self._round()
        except Exception:
            # Whatever it is, the next round may do better; a thread that is gone never would.
            logger.exception("writing failed path=%s", self.path)
            return False

    def _round(self) -> bool:
        """Write what waits; True when there is more to do soon."""
        if self._is_handing_over:
            if self._spool is None:
                self._begin_spool()
            if self._spool is not None:
                self._write_all(self._append)
            return False
        if self._spool is not None:
            # Taken back: it is over, and read like any other.
            self._has_handed_over.clear()
            self._spool.close()
            self._spool = None
        if not self._is_ready():
            return False
        if self._reading.is_suspect:
            self._look_through()
        self._read_spools()
        self._write_all(self._write)
        now = self._monotonic()
        if now < self._tend_at or self._engine is None:
            return False
        for _ in range(_TEND_SLICES):
            if not self._in_transaction(self._keeper.tend):
                self._tend_at = now + _TEND_SECONDS
                return False
        return True

    def _write_all(self, write: Callable[[list[Row]], bool]) -> None:
        """Take out all that waits, in one transaction if there is not too much of it."""
        while items := self._queue.take(_SLICE * 16):
            rows: list[Row] = []
            try:
                for start in range(0, len(items), _SLICE):
                    rows += self._keeper.render(items[start : start + _SLICE])
                    # The other threads have waited for this one.
                    time.sleep(0)  # noqa: TID251 -- a thread of our own, and it does not wait
                is_written = write(rows)
            except Exception:
                self._queue.dropped += len(items)
                raise
            if is_written:
                self._written += len(rows)
                self._recovered()
            else:
                self._queue.dropped += len(rows)
                self._lost += len(rows)

    def _write(self, rows: list[Row]) -> bool:
        def work(connection: Connection) -> bool:
            self._keeper.write(connection, rows)
            return True

        return self._in_transaction(work) is True

    def _append(self, rows: list[Row]) -> bool:
        assert self._spool is not None
        try:
            self._spool.append(rows)
        except OSError as exc:
            self._failed(exc.strerror or type(exc).__name__)
            return False
        return True

    def _in_transaction(self, work: Callable[[Connection], R]) -> R | None:
        """Do *work* in a transaction; None when that failed, even on a new database in the place of a broken one."""
        for _ in range(2):
            if self._engine is None and not self._is_ready():
                return None
            assert self._engine is not None
            try:
                with self._engine.begin() as connection:
                    return work(connection)
            except DBAPIError as exc:
                if not is_broken(exc):
                    self._failed(reason_of(exc))
                    return None
                self._set_aside("broken", reason_of(exc))
        return None

    # -- open and close --------------------------------------------------------------------

    def _is_ready(self) -> bool:
        """Tell whether there is an open database, and open it when it is time."""
        if not self.may_write:
            if self._engine is not None:
                self._dispose()
            self._lock.release(self._schema.name)
            return False
        if self._engine is not None:
            return True
        if not len(self._queue) and not self.path.exists() and not self._find_spools():
            # Nothing to write yet, so there need be no file.
            return False
        now = self._monotonic()
        if now < self._retry_at:
            return False
        self._retry_at = now + _RETRY_SECONDS
        try:
            if not self._lock.acquire(self._schema.name):
                self._retry_at = now + LOOK_SECONDS
                return False
            kind = network_file_system(self._folder)
            if kind is not None:
                self._failed(
                    f"data-dir is on a network file system ({kind}), where a database would be damaged"
                )
                return False
            self._open()
        except OSError as exc:
            self._failed(exc.strerror or type(exc).__name__)
            return False
        self._retry_at = 0.0
        return self._engine is not None

    def _open(self) -> None:
        for _ in range(2):
            engine = writer_engine(self.path, self._schema.synchronous)
            try:
                with engine.begin() as connection:
                    bring_up(connection, self._schema)
            except ForeignSchema as exc:
                engine.dispose()
                self._set_aside("foreign", str(exc))
            except DBAPIError as exc:
                engine.dispose()
                if not is_broken(exc):
                    self._failed(reason_of(exc))
                    return
                self._set_aside("broken", reason_of(exc))
            except BaseException:
                engine.dispose()
                raise
            else:
                self._engine = engine
                return

    def _set_aside(self, why: str, reason: str) -> None:
        """Give a database that cannot be used another name, so that a new one can begin."""
        self._dispose()
        stamp = time.strftime("%Y%m%d-%H%M%S")
        kept = self.path.with_name(f"{self.path.name}.{why}-{stamp}")
        for suffix in ("", "-wal", "-shm"):
            with contextlib.suppress(FileNotFoundError):
                os.replace(f"{self.path}{suffix}", f"{kept}{suffix}")
        logger.error(
            "database cannot be used and was set aside, a new one begins path=%s kept=%s reason=%s",
            self.path, kept.name, reason,
        )  # fmt: skip

    def _look_through(self) -> None:
        """See whether a database is as broken as a reader said."""
        self._reading.is_suspect = False
        if self._in_transaction(is_whole) is False:
            self._set_aside("broken", "what was to be read is damaged")
            self._is_ready()

    def _dispose(self) -> None:
        self._reading.close()
        if self._engine is not None:
            self._engine.dispose()
            self._engine = None

    def _close(self) -> None:
        """Leave the database to whoever takes the lock next."""
        self._dispose()
        if self._spool is not None:
            self._spool.close()
            self._spool = None
        self._lock.release(self._schema.name)

    # -- spools ----------------------------------------------------------------------------

    def _begin_spool(self) -> None:
        if not self._has_handed_over.is_set():
            if self._is_ready():
                self._write_all(self._write)
            self._close()
        name = f"{self._schema.name}-{os.getpid()}-{time.time_ns():x}{SUFFIX}"
        try:
            self._spool = SpoolWriter(self._folder / name)
        except OSError as exc:
            self._failed(exc.strerror or type(exc).__name__)
        self._has_handed_over.set()

    def _find_spools(self) -> list[Path]:
        # Looked for in every round; `glob` takes ten times as long.
        begin = f"{self._schema.name}-"
        names = [
            name for name in os.listdir(self._folder) if name.startswith(begin) and name.endswith(SUFFIX)
        ]
        return [self._folder / name for name in sorted(names)]

    def _read_spools(self) -> None:
        """Write what other processes have left in their spools; the keys keep what is read twice from being there twice."""
        for path in self._find_spools():
            reader = self._spools.setdefault(path, SpoolReader(path))
            try:
                # Before it is read to its end.
                is_over = reader.is_over()
                for rows in reader.read():
                    if not self._write(rows):
                        # Read again from there the next time.
                        return
                    self._written += len(rows)
                if is_over:
                    path.unlink()
                    del self._spools[path]
            except OSError as exc:
                self._failed(exc.strerror or type(exc).__name__)

    # -- trouble ---------------------------------------------------------------------------

    def _failed(self, reason: str) -> None:
        if not self._trouble:
            logger.warning(
                "nothing is written for now: %s path=%s; tried again until it works", reason, self.path
            )
        self._trouble = reason

    def _recovered(self) -> None:
        if self._trouble:
            logger.warning("writing works again path=%s lost=%d", self.path, self._lost)
            self._trouble, self._lost = "", 0


class Reading:
    """The way to read a database, on connections of its own; any thread may ask."""

    def __init__(self, path: Path, schema: Schema) -> None:
        self._path = path
        self._schema = schema
        self._engine: Engine | None = None
        self._guard = threading.Lock()
        self.is_suspect = False
        """Something was found damaged."""

    def ask(self, question: Callable[[Connection], R]) -> R:
        """Ask *question*.

        Raises:
            NotKept: If there is no database, or it cannot be read.
        """
        if not self._path.exists():
            raise NoDatabase("there is none yet")
        try:
            with self._get().begin() as connection:
                return question(connection)
        except ForeignSchema as exc:
            raise NotKept(str(exc)) from exc
        except DBAPIError as exc:
            if is_broken(exc):
                raise BrokenDatabase(reason_of(exc)) from exc
            raise NotKept(reason_of(exc)) from exc

    def _get(self) -> Engine:
        with self._guard:
            if self._engine is None:
                engine = reader_engine(self._path)
                try:
                    with engine.begin() as connection:
                        revision = revision_of(connection)
                        if revision is None:
                            # Its first moment: the tables are just being made.
                            raise NoDatabase("there is nothing in it yet")
                        check(revision, self._schema)
                except BaseException:
                    engine.dispose()
                    raise
                self._engine = engine
            return self._engine

    def close(self) -> None:
        """Close what nobody is using; those in use follow when they are given back."""
        with self._guard:
            if self._engine is not None:
                self._engine.dispose()
                self._engine = None
