"""Looks at the facts again and again, keeps the episodes, and has them told of."""

import asyncio
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from codex_proxy.accounts import files
from codex_proxy.alerts.episodes import Episodes, Told
from codex_proxy.alerts.outbox import Fetch, Outbox
from codex_proxy.alerts.rules import Facts, findings
from codex_proxy.alerts.shapes import Message
from codex_proxy.clock import Clock
from codex_proxy.config import Live
from codex_proxy.protocol.wire import BadJson, JsonObject, dumps, loads
from codex_proxy.tasks import Background, Job

logger = logging.getLogger(__name__)

FILE = "alerts.json"
"""In data-dir: what goes on, what was over lately, and what still has to be told."""

LOOK_SECONDS = 10.0

# What goes into one message; a pool of thousands that needs logins all at once is told of by some of them.
_MAX_NEWS = 500

_VERSION = 1
_MAX_FILE_BYTES = 16 * 1024 * 1024


class Alerts:
    """The alerts of one daemon.

    Args:
        facts: What the rules look at, as it is now.
        may_act: Whether this process keeps the episodes: of two daemons on one data-dir one does.
        host: How messages call this machine.
    """

    def __init__(
        self,
        facts: Callable[[], Facts],
        fetch: Fetch,
        *,
        live: Live,
        clock: Clock,
        background: Background,
        may_act: Callable[[], bool],
        host: str,
    ) -> None:
        self._facts = facts
        self._live = live
        self._clock = clock
        self._may_act = may_act
        self._episodes = Episodes()
        self._is_loaded = False
        self._saving = asyncio.Lock()
        self._saved = b""
        self._is_failing = False
        self.outbox = Outbox(
            fetch,
            live=live,
            clock=clock,
            background=background,
            host=host,
            may_act=may_act,
            on_change=self._save,
        )

    def jobs(self) -> list[Job]:
        """Return what runs by itself: the looks at the facts."""
        return [Job("alerts", lambda: LOOK_SECONDS, self.look)]

    def firing(self) -> list[JsonObject]:
        """Return what goes on now, the latest first."""
        return [_shown(told) for told in self._episodes.firing()]

    def recent(self) -> list[JsonObject]:
        """Return what was over lately, the latest first."""
        return [{**_shown(told), "resolved_at": told.resolved_at} for told in self._episodes.recent()]

    def count(self) -> dict[str, int]:
        """Return how many episodes of each rule go on; of rules that are on."""
        return {**dict.fromkeys(self._live.current.alerts, 0), **self._episodes.count()}

    async def look(self) -> None:
        """Look at the facts, and have told what is new."""
        if not self._may_act():
            # Who acts meanwhile writes the file; it is read again when that is us.
            self._is_loaded = False
            return
        await self.load()
        rules, now = self._live.current.alerts, self._clock.now()
        found = findings(rules, self._facts(), self._episodes.begun)
        news = self._episodes.update(found, {name: options["for"] for name, options in rules.items()}, now)
        for told in news:
            logger.log(
                logging.WARNING if told.resolved_at is None else logging.INFO,
                "alert %s name=%s text=%s",
                "firing" if told.resolved_at is None else "resolved", told.name, told.text,
            )  # fmt: skip
        if news:
            self.outbox.put(Message(now, tuple(news[:_MAX_NEWS])))
        # On disk before it is sent, so that no kill makes a second episode of it.
        await self._save()
        self.outbox.start()

    # -- over a restart -------------------------------------------------------------------

    @property
    def _path(self) -> Path:
        return self._live.current.data_dir / FILE

    async def load(self) -> None:
        """Read what went on before, if that is not done yet: it is shown from the first moment on."""
        if self._is_loaded or not self._may_act():
            return
        self._episodes = Episodes()
        document = await asyncio.to_thread(_read, self._path)
        self._episodes.restore(document, self._clock.now())
        self.outbox.restore(document.get("waiting"))
        # Where nothing ever went wrong there is no file.
        self._saved = self._state()
        self._is_loaded = True

    def _state(self) -> bytes:
        return dumps({"version": _VERSION, **self._episodes.dump(), "waiting": self.outbox.dump()})

    async def _save(self) -> None:
        """Write down what has changed since the last time."""
        async with self._saving:
            if not self._is_loaded or not self._may_act():
                return
            data = self._state()
            if data == self._saved:
                return
            try:
                await asyncio.to_thread(files.write_atomic, self._path, data)
            except OSError as exc:
                if not self._is_failing:
                    logger.warning(
                        "alerts not saved file=%s reason=%s", FILE, exc.strerror or type(exc).__name__
                    )
                self._is_failing = True
                return
            self._is_failing = False
            self._saved = data


def _read(path: Path) -> dict[str, Any]:
    """Return what the file says; nothing where it cannot be read, which is no reason not to start."""
    try:
        with path.open("rb") as file:
            document = loads(file.read(_MAX_FILE_BYTES))
    except FileNotFoundError:
        return {}
    except (OSError, BadJson) as exc:
        logger.warning("alerts not restored file=%s reason=%s", FILE, type(exc).__name__)
        return {}
    if not isinstance(document, dict) or document.get("version") != _VERSION:
        logger.warning("alerts not restored file=%s reason=of another version", FILE)
        return {}
    return document


def _shown(told: Told) -> JsonObject:
    return {"name": told.name, "text": told.text, "since": told.since}
