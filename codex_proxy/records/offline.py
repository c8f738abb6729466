"""The records as their file has them, for commands: read only, beside a running daemon or without one."""

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from sqlalchemy import Connection

from codex_proxy.errors import ProxyError
from codex_proxy.protocol.wire import JsonObject
from codex_proxy.records import queries
from codex_proxy.records.asking import Filter, Found
from codex_proxy.records.tables import SCHEMA
from codex_proxy.storage.store import NoDatabase, NotKept, Reading

T = TypeVar("T")


class Unreadable(ProxyError):
    """The file is not there, or cannot be read; the message says why."""


class File:
    """The file of a data-dir.

    Raises:
        Unreadable: From every question, if it cannot be answered.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / f"{SCHEMA.name}.db"
        self._reading = Reading(self._path, SCHEMA)

    def page(
        self, wanted: Filter, *, limit: int, before: int | None = None
    ) -> tuple[list[JsonObject], int | None]:
        """Return some turns, the newest first, and the cursor of those that follow."""
        return self._ask(lambda connection: queries.page(connection, wanted, limit=limit, before=before))

    def find(self, request_id: str) -> Found | None:
        """Return one turn."""
        return self._ask(lambda connection: queries.one(connection, request_id))

    def close(self) -> None:
        """Close it."""
        self._reading.close()

    def _ask(self, question: Callable[[Connection], T]) -> T:
        try:
            return self._reading.ask(question)
        except NoDatabase:
            raise Unreadable(
                f"there are no records at {self._path}: a daemon with this configuration keeps them there, while "
                "`records` is on"
            ) from None
        except NotKept as exc:
            raise Unreadable(f"the records at {self._path} cannot be read: {exc}") from exc
