"""SQLite as an SQLAlchemy engine: who may do what, how durable, and what is wrong when something is.

The driver's own idea of transactions is switched off; each begins as what it is, so that one that will write
waits for its turn at the beginning and never in the middle.
"""

import os
import sqlite3
from pathlib import Path
from typing import Literal
from urllib.parse import quote

from sqlalchemy import Connection, Engine, create_engine, event, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.pool import QueuePool

Synchronous = Literal["NORMAL", "FULL"]
"""NORMAL: a crash of the machine may lose the last seconds, never more. FULL: what was committed stays."""

_BUSY_SECONDS = 5.0
_CACHE_KIB = 8 * 1024
# How long the log of changes grows before it is taken over, and what of it may stay on disk then: what changes
# again and again is taken over once.
_JOURNAL_PAGES = 4_000
_JOURNAL_BYTES = 16 * 1024 * 1024
_READERS = 3
# Statements over many rows have a text for each of several numbers of rows (`storage.bulk`).
_PREPARED = 256

_MOUNTS = Path("/proc/self/mountinfo")
# The log of changes is shared memory, and their locks are not to be relied on.
_NETWORK = ("nfs", "cifs", "smb", "afs", "ceph", "9p", "lustre", "gfs", "ocfs", "ncp", "fuse.sshfs", "fuse.gluster",
            "fuse.ceph", "fuse.s3fs", "fuse.rclone", "fuse.davfs", "davfs")  # fmt: skip

_BROKEN = frozenset({sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB})


def writer_engine(path: Path, synchronous: Synchronous) -> Engine:
    """Return the engine of the one thread that writes *path*."""
    # Not by the mask, which belongs to the whole process.
    os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
    return _engine(
        path,
        "rw",
        1,
        "IMMEDIATE",
        (
            # Before there is a table, or it has no effect.
            "auto_vacuum=INCREMENTAL",
            "journal_mode=WAL",
            f"synchronous={synchronous}",
            "foreign_keys=ON",
            f"cache_size=-{_CACHE_KIB}",
            f"wal_autocheckpoint={_JOURNAL_PAGES}",
            f"journal_size_limit={_JOURNAL_BYTES}",
        ),
    )


def reader_engine(path: Path) -> Engine:
    """Return an engine that can read *path*, from any thread."""
    return _engine(path, "ro", _READERS, "DEFERRED", ("query_only=ON",))


def _engine(path: Path, mode: str, connections: int, begin: str, pragmas: tuple[str, ...]) -> Engine:
    uri = f"file:{quote(str(path.absolute()))}?mode={mode}"

    def connect() -> sqlite3.Connection:
        connection = sqlite3.connect(
            uri,
            uri=True,
            timeout=_BUSY_SECONDS,
            isolation_level=None,
            check_same_thread=False,
            cached_statements=_PREPARED,
        )
        try:
            for pragma in pragmas:
                connection.execute(f"PRAGMA {pragma}")
        except BaseException:
            connection.close()
            raise
        return connection

    engine = create_engine(
        "sqlite+pysqlite://",
        creator=connect,
        poolclass=QueuePool,
        pool_size=connections,
        max_overflow=0,
        # An error is written to the log, and what was to be stored may be what somebody said.
        hide_parameters=True,
    )

    @event.listens_for(engine, "begin")
    def _(connection: Connection) -> None:
        connection.exec_driver_sql(f"BEGIN {begin}")

    return engine


def network_file_system(folder: Path) -> str | None:
    """Return the kind of file system that *folder* is on when it is another machine's; None when it is not, or unknown."""
    try:
        lines = _MOUNTS.read_text(encoding="utf-8", errors="replace").splitlines()
        place = str(folder.resolve())
    except OSError:
        return None
    best, kind = -1, ""
    for line in lines:
        mount, _, rest = line.partition(" - ")
        fields = mount.split(" ")
        if len(fields) < 5 or not rest:
            continue
        point = fields[4].replace("\\040", " ")
        is_below = point == "/" or place == point or place.startswith(point + "/")
        # Of two on one place the later one is what one sees.
        if is_below and len(point) >= best:
            best, kind = len(point), rest.split(" ")[0].lower()
    return kind if kind.startswith(_NETWORK) else None


def is_broken(error: DBAPIError) -> bool:
    """Tell whether the file is no database, or not a whole one."""
    return _code(error) in _BROKEN


def reason_of(error: DBAPIError) -> str:
    """Return what is wrong, in SQLite's own words; no statement, no values."""
    return str(error.orig)[:200]


def _code(error: DBAPIError) -> int:
    code = getattr(error.orig, "sqlite_errorcode", None)
    # The lower byte is the kind.
    return code & 0xFF if isinstance(code, int) else 0


def used_bytes(connection: Connection) -> int:
    """Return how much of the database is in use; pages that are free are not."""
    size, pages, free = (
        connection.execute(text(f"PRAGMA {name}")).scalar_one()
        for name in ("page_size", "page_count", "freelist_count")
    )
    return int(size * (pages - free))


def give_back(connection: Connection, pages: int) -> None:
    """Give up to *pages* free pages back to the file system."""
    raw = connection.connection.driver_connection
    assert raw is not None
    free = connection.execute(text("PRAGMA freelist_count")).scalar_one()
    for _ in range(min(pages, free)):
        # The driver asks for one row, of which there are none, and with each row one page would go.
        raw.execute("PRAGMA incremental_vacuum(1)")


def is_whole(connection: Connection) -> bool:
    """Look through the whole database; False when something is wrong with it."""
    try:
        return connection.execute(text("PRAGMA quick_check(1)")).scalar() == "ok"
    except DBAPIError as exc:
        if is_broken(exc):
            return False
        raise
