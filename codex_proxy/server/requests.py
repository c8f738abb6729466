"""What became of requests, for the owner: from the records, or from memory where none are kept."""

from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping

from aiohttp import web

from codex_proxy.errors import RequestError
from codex_proxy.protocol.sse import frame
from codex_proxy.protocol.wire import JsonObject, dumps
from codex_proxy.records.asking import Page
from codex_proxy.records.records import Records
from codex_proxy.records.story import detail_json, story
from codex_proxy.server.admin import json_answer
from codex_proxy.server.dashboard.recent import Recent, Tail
from codex_proxy.server.front import Handler, Incoming
from codex_proxy.server.onlooker import Pause, tell

MAX_HOURS = 24 * 3650.0

# How often who follows is told, and how long a silence may last.
_TELL_SECONDS = 0.5
_SILENCE_SECONDS = 15.0


class Requests:
    """Answers questions about requests.

    Args:
        recent: What is remembered, for a daemon that keeps no records.
    """

    def __init__(self, records: Records, recent: Recent) -> None:
        self._records = records
        self._recent = recent
        self.usage_of: Callable[[str], Awaitable[JsonObject | None]] | None = None
        """What one has used and cost, by the ledger, where there is one."""

    def feed(self) -> Tail:
        """Return what tells of turns as they finish."""
        return self._recent.feed()

    async def page(self, query: Mapping[str, str]) -> JsonObject:
        """Return some of them, as the filters in *query* say.

        Raises:
            RequestError: If a filter is none.
        """
        page = Page.of(query)
        if not self._records.is_on:
            return await self._recent.page(page)
        return await self._records.page(page)

    async def find(self, request_id: str) -> JsonObject | None:
        """Return all that is known of one."""
        told = await self._find(request_id)
        if told is None or self.usage_of is None:
            return told
        return {**told, "ledger": await self.usage_of(request_id)}

    async def _find(self, request_id: str) -> JsonObject | None:
        if self._records.is_on:
            found = await self._records.find(request_id)
            if found is not None:
                return {**detail_json(found.trace), "capture": found.capture}
        # One that has just ended is there already.
        return await self._recent.find(request_id)

    async def story(self, request_id: str) -> JsonObject | None:
        """Return why one went where it went, as `server.decisions` tells it; None when it is not recorded."""
        found = await self._records.find(request_id) if self._records.is_on else None
        return None if found is None else story(found.trace)

    async def cache(self, hours: float) -> JsonObject:
        """Return how well caches were hit."""
        if not self._records.is_on:
            return await self._recent.cache(hours)
        return await self._records.cache(min(hours, MAX_HOURS))


def requests_handlers(requests: Requests) -> dict[str, Handler]:
    """Return the handlers by the names in `app.ROUTES`."""

    async def listed(request: web.Request) -> web.StreamResponse:
        return json_answer(await requests.page(request.query))

    async def one(request: web.Request) -> web.StreamResponse:
        request_id = request.match_info["request_id"]
        found = await requests.find(request_id)
        if found is None:
            raise RequestError(
                f"no finished request with the id {request_id[:100]!r} is known",
                status=404,
                code="unknown_request",
            )
        return json_answer(found)

    async def follow(pause: Pause) -> AsyncGenerator[bytes, None]:
        tail, silence = requests.feed(), 0.0
        try:
            while True:
                told, dropped = tail.take()
                silence = 0.0 if told else silence + _TELL_SECONDS
                if told:
                    yield frame("requests", dumps({"requests": list(told), "dropped": dropped}))
                elif silence >= _SILENCE_SECONDS:
                    silence = 0.0
                    yield b": keep-alive\n\n"
                if not await pause(_TELL_SECONDS):
                    return
        finally:
            tail.close()

    async def live(request: web.Request) -> web.StreamResponse:
        assert isinstance(request, Incoming)
        return await tell(request, {}, follow)

    return {"requests": listed, "request": one, "requests_live": live}
