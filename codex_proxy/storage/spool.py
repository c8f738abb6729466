"""Rows of a process that may not write the database: appended to a file, read by the one that may.

A line is a checksum and JSON, and is on disk before the next one is begun. Who appends holds a lock on the
file, so whoever reads knows whether more may come; a last line that was cut by a crash is left out. Reading the
same lines twice does no harm, because rows have keys and are written once.
"""

import contextlib
import fcntl
import os
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import orjson

SUFFIX = ".spool"

# Read at a time.
_READ_SIZE = 4 * 1024 * 1024

Row = dict[str, Any]


class SpoolWriter:
    """Appends rows to a spool of this process's own.

    Raises:
        OSError: If there can be none.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        # Under its name only when it is locked: one that is not is taken for one that is over.
        new = path.with_name(f"{path.name}.new")
        self._is_torn = False
        self._descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.rename(new, path)
            _sync_folder(path.parent)
        except BaseException:
            os.close(self._descriptor)
            raise

    def append(self, rows: Sequence[Row]) -> int:
        """Add *rows*, and return how many bytes there are then; they are on disk when this returns, or none of them is.

        Raises:
            OSError: If they cannot be written.
        """
        data = b"".join([_line(row) for row in rows])
        if self._is_torn:
            # The rest of a line is one of its own.
            data = b"\n" + data
        before = os.fstat(self._descriptor).st_size
        try:
            view = memoryview(data)
            while view:
                view = view[os.write(self._descriptor, view) :]
            os.fsync(self._descriptor)
        except OSError:
            # Half a line would hide those after it.
            try:
                os.ftruncate(self._descriptor, before)
            except OSError:
                self._is_torn = True
            raise
        self._is_torn = False
        return before + len(data)

    def close(self) -> None:
        """End it: who reads it may remove it now."""
        os.close(self._descriptor)


class SpoolReader:
    """Reads a spool on, from where the last look ended."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.is_damaged = False
        """Some of its lines could not be read. One that was torn off is among them, which nobody was promised."""
        self._offset = 0

    def read(self) -> Iterator[list[Row]]:
        """Yield what has come since the last time.

        Raises:
            OSError: If it cannot be read.
        """
        with open(self.path, "rb") as file:
            file.seek(self._offset)
            rest = b""
            while chunk := file.read(_READ_SIZE):
                lines = (rest + chunk).split(b"\n")
                rest = lines.pop()
                rows = [row for row in map(_row, lines) if row is not None]
                self.is_damaged |= len(rows) < len(lines)
                if rows:
                    yield rows
                # Only now: what was not written is read again.
                self._offset = file.tell() - len(rest)

    def is_over(self) -> bool:
        """Tell whether nobody appends to it any more."""
        try:
            descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return False
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            return False
        finally:
            os.close(descriptor)
        return True


def _sync_folder(folder: Path) -> None:
    """Have the names in *folder* on disk, where that can be done: what is in a file that nobody finds is lost too."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _line(row: Row) -> bytes:
    data = orjson.dumps(row)
    return b"%08x %b\n" % (zlib.crc32(data), data)


def _row(line: bytes) -> Row | None:
    """Return the row in *line*; None when it is not whole."""
    checksum, _, data = line.partition(b" ")
    try:
        if int(checksum, 16) != zlib.crc32(data):
            return None
        row = orjson.loads(data)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None
