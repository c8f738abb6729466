"""What only the control socket answers: the numbers of now for a terminal, and a restart.

Whoever may start processes here owns the machine's account, so nobody does it over a network.
"""

import asyncio
import contextlib
import math
from collections.abc import Callable

from aiohttp import web

from codex_proxy.errors import RequestError
from codex_proxy.protocol.wire import JsonObject
from codex_proxy.server.access import Level
from codex_proxy.server.admin import json_answer
from codex_proxy.server.app import Route
from codex_proxy.server.front import Handler

LOCAL_ROUTES: tuple[Route, ...] = (
    Route("GET", "/now", "now", Level.OWNER),
    Route("POST", "/restart", "restart", Level.OWNER),
)


def local_handlers(
    now: Callable[[float | None], JsonObject], restart: "Callable[[], asyncio.Task[JsonObject]]"
) -> dict[str, Handler]:
    """Return the handlers of `LOCAL_ROUTES`.

    Args:
        now: How it goes, with the steps of the series that are newer than a moment.
        restart: Begins a restart, and says what came of it.
    """

    async def handle_now(request: web.Request) -> web.Response:
        return json_answer(now(_since(request.query.get("since"))))

    async def handle_restart(_: web.Request) -> web.Response:
        # Whoever asked may leave; what was begun is ended.
        return json_answer(await asyncio.shield(restart()))

    return {"now": handle_now, "restart": handle_restart}


def _since(text: str | None) -> float | None:
    if text is None:
        return None
    with contextlib.suppress(ValueError):
        if math.isfinite(at := float(text)):
            return at
    raise RequestError("since must be a time in seconds since 1970", param="since")
