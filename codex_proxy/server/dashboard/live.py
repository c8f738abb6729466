"""The page's live stream: one connection tells a page what its visible screen shows, as it changes.

What is shown is made once however many pages look, and only while one does. A page that hides
closes its stream, so nothing is told to nobody.
"""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping, Sequence
from typing import Protocol

from aiohttp import web

from codex_proxy.clock import Clock
from codex_proxy.errors import RequestError
from codex_proxy.protocol.sse import frame
from codex_proxy.protocol.wire import JsonObject, dumps
from codex_proxy.server.dashboard.shell import HEADERS
from codex_proxy.server.front import Incoming
from codex_proxy.server.onlooker import Pause, tell

TOPICS = ("now", "accounts", "horizon", "requests", "cache", "setup")

MAX_PAGES = 64

_TICK_SECONDS = 0.5
_NOW_SECONDS = 1.0
_ACCOUNTS_SECONDS = 2.0
_HORIZON_SECONDS = 10.0


class Feed(Protocol):
    """Finished turns as they finish, for one listener."""

    def take(self) -> tuple[Sequence[JsonObject], int]:
        """Return those since the last call, the newest first and no more than fit, and how many were left out."""
        ...

    def close(self) -> None:
        """Listen no more."""
        ...


class Shared:
    """Something that is made anew at most every so often, for all who want it."""

    def __init__(self, clock: Clock, seconds: float, make: Callable[[], Awaitable[bytes]]) -> None:
        self._clock = clock
        self._seconds = seconds
        self._make = make
        self._made_at: float | None = None
        self._value = b""
        self._turn = asyncio.Lock()

    async def get(self) -> bytes:
        """Return it, made anew if it is old."""
        async with self._turn:
            now = self._clock.monotonic()
            if self._made_at is None or now - self._made_at >= self._seconds - 0.01:
                self._value = await self._make()
                self._made_at = now
            return self._value


class AccountBoard:
    """All accounts as the page gets them: rendered once for all pages, numbered by when they last changed."""

    def __init__(self, clock: Clock, render: Callable[[], AsyncIterator[tuple[str, JsonObject]]]) -> None:
        self._clock = clock
        self._render = render
        self._rows: dict[str, tuple[int, bytes, bytes]] = {}
        """By alias: when it changed, what it is without its ages, and what is told."""
        self._version = 0
        self._gone: dict[str, int] = {}
        self._looked_at: float | None = None
        self._turn = asyncio.Lock()

    async def look(self) -> int:
        """Look at the accounts, unless that was just done; return the number of the last change."""
        async with self._turn:
            now = self._clock.monotonic()
            if self._looked_at is not None and now - self._looked_at < _ACCOUNTS_SECONDS - 0.01:
                return self._version
            version = self._version + 1
            seen: set[str] = set()
            async for alias, account in self._render():
                seen.add(alias)
                essence = dumps(_ageless(account))
                row = self._rows.get(alias)
                if row is None or row[1] != essence:
                    self._rows[alias] = (version, essence, dumps(account))
                    self._gone.pop(alias, None)
                    self._version = version
            for alias in self._rows.keys() - seen:
                del self._rows[alias]
                self._gone[alias] = self._version = version
            self._looked_at = now
            return self._version

    def since(self, version: int) -> tuple[list[bytes], list[str]]:
        """Return the accounts that have changed since, and the names of those that are gone."""
        changed = [told for number, _, told in self._rows.values() if number > version]
        return changed, [alias for alias, number in self._gone.items() if number > version]


def _ageless(account: JsonObject) -> JsonObject:
    """Return an account without what changes with every second."""
    quota = account["quota"]
    if quota is None:
        return account
    quota = {
        **quota,
        "windows": [{**window, "age": None} for window in quota["windows"]],
        "credits": quota["credits"] and {**quota["credits"], "age": None},
        "spend": quota["spend"] and {**quota["spend"], "age": None},
    }
    return {**account, "quota": quota}


class Live:
    """Serves the streams."""

    def __init__(
        self,
        *,
        clock: Clock,
        pulse: Callable[[float | None], JsonObject],
        board: AccountBoard,
        problems: Callable[[], list[JsonObject]],
        horizon: Shared,
        feed: Callable[[], Feed],
        alerts: Callable[[], list[JsonObject]],
    ) -> None:
        self._clock = clock
        self._pulse = pulse
        self._board = board
        self._problems = problems
        self._horizon = horizon
        self._feed = feed
        self._alerts = alerts
        self._pages = 0

    async def serve(self, request: Incoming, is_valid: Callable[[], bool]) -> web.StreamResponse:
        """Tell a page what its screen shows, until it leaves, its session is over or the daemon ends.

        Raises:
            RequestError: 400 for an unknown topic, 429 if too many pages look.
        """
        topic = request.query.get("topic", "now")
        if topic not in TOPICS:
            raise RequestError(f"topic must be one of {', '.join(TOPICS)}", param="topic")
        if self._pages >= MAX_PAGES:
            raise RequestError("too many pages are open already", status=429, code="too_many_pages")
        self._pages += 1
        try:
            return await tell(request, HEADERS, lambda pause: self._events(topic, pause, is_valid))
        finally:
            self._pages -= 1

    async def _events(
        self, topic: str, pause: Pause, is_valid: Callable[[], bool]
    ) -> AsyncGenerator[bytes, None]:
        """Yield what is to be written; something at least every second, so that a page that is gone is noticed."""
        last_point: float | None = None
        version = -1
        problems: list[JsonObject] | None = None
        due: dict[str, float] = {}
        feed = self._feed() if topic == "requests" else None

        def is_due(name: str, seconds: float) -> bool:
            now = self._clock.monotonic()
            if now < due.get(name, 0.0):
                return False
            due[name] = now + seconds - 0.05
            return True

        try:
            while is_valid():
                if is_due("now", _NOW_SECONDS):
                    now = self._pulse(last_point)
                    points = now["series"]["points"]
                    last_point = points[-1][0] if points else last_point
                    yield frame("now", dumps({**now, "alerts": self._alerts()}))
                if topic == "accounts" and is_due("accounts", _ACCOUNTS_SECONDS):
                    newest = await self._board.look()
                    told = self._problems()
                    if newest != version or told != problems:
                        changed, gone = self._board.since(version)
                        yield frame(
                            "accounts", _accounts(self._clock.now(), version < 0, changed, gone, told)
                        )
                        version, problems = newest, told
                if topic == "horizon" and is_due("horizon", _HORIZON_SECONDS):
                    yield frame("horizon", await self._horizon.get())
                if feed is not None:
                    requests, dropped = feed.take()
                    if requests:
                        yield frame("requests", dumps({"requests": requests, "dropped": dropped}))
                if not await pause(_TICK_SECONDS):
                    break
            yield frame("end", b"{}")
        finally:
            if feed is not None:
                feed.close()


def _accounts(
    at: float,
    is_all: bool,
    changed: Sequence[bytes],
    gone: Sequence[str],
    problems: Sequence[Mapping[str, object]],
) -> bytes:
    head = dumps({"at": at, "all": is_all, "gone": [] if is_all else gone, "problems": problems})
    return b'%b,"accounts":[%b]}' % (head[:-1], b",".join(changed))
