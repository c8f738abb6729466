"""Settlements that cannot be written now: in a file of this process's own, until they can.

Bounded in bytes and rows, and on disk before anybody is told that they are kept. When not even that is possible
they stay in memory, and the spool is full: nothing that costs may begin.
"""

import logging
import os
import time
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import orjson

from codex_proxy.ledger.model import AttemptRow, Budget, Settlement, Window
from codex_proxy.storage.spool import SUFFIX, Row, SpoolWriter
from codex_proxy.trace import UsageSource

logger = logging.getLogger(__name__)

PREFIX = "ledger-"
REFUSED = "ledger-refused.jsonl"
"""In data-dir."""

MOST_BYTES = 64 * 1024 * 1024
MOST_ROWS = 100_000

_FIELDS = tuple(one.name for one in fields(Settlement))


def row_of(settlement: Settlement) -> Row:
    """Return *settlement* as JSON can hold it."""
    row: Row = {name: getattr(settlement, name) for name in _FIELDS}
    row["source"] = settlement.source.value
    row["prices"] = dict(settlement.prices)
    row["budgets"] = [(owner, one.window.value, one.nanos) for owner, one in settlement.budgets]
    row["attempts"] = [(one.target, one.outcome, one.status, one.milliseconds) for one in settlement.attempts]
    return row


def settlement_of(row: Row) -> Settlement:
    """Return the settlement in a row.

    Raises:
        ValueError: If there is none in it.
    """
    try:
        # Another version may have written it; what it does not know yet has a default.
        values: dict[str, Any] = {name: row[name] for name in _FIELDS if name in row}
        values["source"] = UsageSource(row["source"])
        values["flags"] = tuple(row["flags"])
        values["budgets"] = tuple(
            (owner, Budget(Window(window), nanos)) for owner, window, nanos in row.get("budgets", ())
        )
        values["attempts"] = tuple(AttemptRow(*one) for one in row.get("attempts", ()))
        return Settlement(**values)
    except (KeyError, TypeError) as exc:
        raise ValueError(f"not a settlement: {type(exc).__name__}") from exc


class Spool:
    """What one process could not write.

    Args:
        process: Its id, by which whoever reads the file knows whose holds they were.
    """

    def __init__(
        self, folder: Path, process: str, *, most_bytes: int = MOST_BYTES, most_rows: int = MOST_ROWS
    ) -> None:
        self._folder = folder
        self._process = process
        self._most_bytes = most_bytes
        self._most_rows = most_rows
        self._writer: SpoolWriter | None = None
        self.rows = 0
        """How many were put into it since it was empty."""
        self.bytes = 0
        self.kept: list[Settlement] = []
        """Those that are not even on disk."""
        self.trouble = ""

    @property
    def path(self) -> Path | None:
        """The file that is open."""
        return None if self._writer is None else self._writer.path

    @property
    def is_full(self) -> bool:
        """Whether nothing more should come to be settled."""
        # Asked from another thread, also while what is kept is just being written.
        return (
            bool(self.kept and self.trouble) or self.rows >= self._most_rows or self.bytes >= self._most_bytes
        )

    def open(self) -> bool:
        """Have the file; False when it cannot be had."""
        if self._writer is not None and not self._writer.path.exists():
            # Somebody has removed it, and nobody would ever read what is added to it.
            self._writer.close()
            self._writer = None
        if self._writer is None:
            name = f"{PREFIX}{self._process}-{time.time_ns():x}{SUFFIX}"
            try:
                self._writer = SpoolWriter(self._folder / name)
            except OSError as exc:
                self.trouble = exc.strerror or type(exc).__name__
                return False
        return True

    def put(self, settlements: Sequence[Settlement]) -> bool:
        """Take in *settlements*; whether they are on disk.

        Beyond its bounds too: what was served is settled, only nothing new begins.
        """
        self.kept += settlements
        if not self.open():
            return False
        assert self._writer is not None
        try:
            self.bytes = self._writer.append([row_of(one) for one in self.kept])
        except OSError as exc:
            self.trouble = exc.strerror or type(exc).__name__
            return False
        except TypeError as exc:
            # Something in it is nothing for JSON; the database may take it.
            self.trouble = type(exc).__name__
            return False
        self.rows += len(self.kept)
        self.kept.clear()
        self.trouble = ""
        return True

    def close(self, *, is_awaited: bool = False) -> None:
        """End the file, which is read and removed like any other; an empty one is there only if somebody waits for it."""
        if self._writer is None:
            return
        path = self._writer.path
        self._writer.close()
        self._writer = None
        if not self.rows and not is_awaited:
            path.unlink(missing_ok=True)

    def renew(self) -> None:
        """End the file for another one, so that there is one all the time: whoever has none is taken for gone."""
        before = self._writer
        if before is None or not before.path.exists() or not before.path.stat().st_size:
            self.open()
            return
        self._writer = None
        if self.open():
            before.close()
        else:
            self._writer = before

    def emptied(self) -> None:
        """Know that all of it was written where it belongs."""
        self.rows = self.bytes = 0


def process_of(path: Path) -> str:
    """Return whose spool a file is."""
    return path.name.removeprefix(PREFIX).partition("-")[0]


def spools_in(folder: Path) -> list[Path]:
    """Return all spools of ledgers in *folder*, the oldest of a process first."""
    names = [name for name in os.listdir(folder) if name.startswith(PREFIX) and name.endswith(SUFFIX)]
    return [folder / name for name in sorted(names)]


def set_apart(path: Path) -> None:
    """Keep a spool of which something could not be read, where nobody reads it any more."""
    kept = path.with_name(f"{path.name}.damaged")
    try:
        os.rename(path, kept)
    except OSError as exc:
        logger.error("a damaged spool cannot be kept path=%s: %s", path, exc.strerror or type(exc).__name__)
    else:
        logger.error("a spool was damaged; what could be read of it is booked kept=%s", kept)


def keep_refused(folder: Path, settlement: Settlement) -> None:
    """Write down what no database will have, for its owner to look at."""
    path = folder / REFUSED
    try:
        line = orjson.dumps(row_of(settlement), default=repr, option=orjson.OPT_APPEND_NEWLINE)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        try:
            os.write(descriptor, line)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except (OSError, TypeError, AttributeError) as exc:
        logger.error("a refused settlement cannot be kept path=%s: %s", path, type(exc).__name__)
