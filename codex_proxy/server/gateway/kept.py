"""Upstreams that were added while the daemon runs, kept in the ledger's database; imported only where there is one.

Their keys are there as they are, because they have to be sent; nothing tells them again.
"""

import logging
from collections.abc import Callable
from typing import Any

from sqlalchemy import Connection, delete, insert, select, update

from codex_proxy.config import BadUpstream, Upstream, masked_upstream, read_upstream
from codex_proxy.errors import LedgerAway, RequestError
from codex_proxy.ledger.changes import note_audit, note_change
from codex_proxy.ledger.ledger import Ledger
from codex_proxy.ledger.tables import upstreams
from codex_proxy.protocol.wire import BadJson, dumps, loads
from codex_proxy.tasks import Job
from codex_proxy.upstream.providers import Providers

logger = logging.getLogger(__name__)

_LOOK_SECONDS = 1.0


class KeptUpstreams:
    """Writes them, and lets the registry of upstreams have them."""

    def __init__(self, ledger: Ledger, providers: Providers, now: Callable[[], float]) -> None:
        self._ledger = ledger
        self._providers = providers
        self._now = now
        self._is_stale = False
        ledger.on_change.append(self._note)

    def _note(self) -> None:
        self._is_stale = True

    def jobs(self) -> list[Job]:
        """Return what runs by itself: what another daemon on the same database has changed is taken over."""
        return [Job("kept-upstreams", lambda: _LOOK_SECONDS, self._look)]

    async def _look(self) -> None:
        if self._is_stale:
            await self.load()

    async def load(self) -> None:
        """Take over what the database says, or what it said last while it cannot be read."""
        self._is_stale = False
        try:
            rows = await self._ledger.read(_rows)
        except LedgerAway as exc:
            logger.warning("upstreams of the database are looked at again later reason=%s", exc.message)
            self._is_stale = True
            return
        # One whose name the configuration has meanwhile is left out, until one of the two has another one.
        taken = {one.name for one in self._providers.all() if one.source == "config"}
        found = []
        for name, definition in rows:
            if definition is None:
                logger.error("upstream of the database cannot be read and is left out name=%s", name)
            elif name in taken:
                logger.error(
                    "upstream of the database is left out: the configuration has one of that name name=%s",
                    name,
                )
            else:
                found.append(definition)
        self._providers.replace(found, source="database")

    async def put(self, definition: Upstream, before: Upstream | None, *, actor: str) -> None:
        """Write an upstream, new or changed.

        Raises:
            RequestError: 409, if somebody else was faster.
        """
        at = int(self._now() * 1000)
        await self._ledger.write(lambda connection: _put(connection, definition, before, actor, at))
        await self.load()

    async def drop(self, definition: Upstream, *, actor: str) -> None:
        """Forget an upstream, and its key."""
        at = int(self._now() * 1000)
        await self._ledger.write(lambda connection: _drop(connection, definition, actor, at))
        await self.load()


def _rows(connection: Connection) -> list[tuple[str, Upstream | None]]:
    return [
        (row.name, _read(row.definition, row.api_key))
        for row in connection.execute(select(upstreams).order_by(upstreams.c.name))
    ]


def _read(definition: str, key: str) -> Upstream | None:
    try:
        return read_upstream({**loads(definition), "api-key": key})
    except (BadJson, BadUpstream, TypeError):
        return None


def _put(connection: Connection, definition: Upstream, before: Upstream | None, actor: str, at: int) -> None:
    there = connection.execute(select(upstreams.c.name).where(upstreams.c.name == definition.name)).first()
    if before is None and there is not None:
        raise RequestError(
            f"there is an upstream {definition.name!r} already", param="name", status=409, code="name_taken"
        )
    if before is not None and there is None:
        # Taken away meanwhile: a change does not bring it back.
        raise RequestError(f"there is no upstream {definition.name!r}", status=404, code="upstream_not_found")
    values = {"definition": dumps(_shown(definition)).decode(), "api_key": definition.api_key, "updated": at}
    if there is None:
        connection.execute(insert(upstreams).values(name=definition.name, created=at, **values))
    else:
        connection.execute(update(upstreams).where(upstreams.c.name == definition.name).values(**values))
    note_audit(
        connection,
        at=at,
        actor=actor,
        action="upstream.add" if there is None else "upstream.update",
        target=definition.name,
        before=None if before is None else _shown(before),
        after={**_shown(definition), **_key_news(definition, before)},
    )
    note_change(connection)


def _drop(connection: Connection, definition: Upstream, actor: str, at: int) -> None:
    gone = connection.execute(delete(upstreams).where(upstreams.c.name == definition.name))
    if not gone.rowcount:
        return
    note_audit(
        connection,
        at=at,
        actor=actor,
        action="upstream.remove",
        target=definition.name,
        before=_shown(definition),
    )
    note_change(connection)


def _shown(definition: Upstream) -> dict[str, Any]:
    """Return an upstream as the configuration would have it, without anything of its key."""
    return {
        name: value
        for name, value in masked_upstream(definition).items()
        if name not in ("api-key", "api-key-file", "api-key-env")
    }


def _key_news(definition: Upstream, before: Upstream | None) -> dict[str, str]:
    if before is not None and before.api_key == definition.api_key:
        return {}
    return {"api-key": "set" if definition.api_key else "none"}
