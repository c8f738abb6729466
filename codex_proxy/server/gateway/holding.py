"""The page of a key's holder over HTTP: it is shown its own, and nothing of the owner's."""

import importlib
from collections.abc import AsyncGenerator, Callable
from typing import Any

from aiohttp import web

from codex_proxy.errors import KeyRefused
from codex_proxy.protocol.sse import frame
from codex_proxy.protocol.wire import JsonObject, dumps
from codex_proxy.server.access import Level
from codex_proxy.server.app import Route
from codex_proxy.server.dashboard.sessions import Sessions
from codex_proxy.server.dashboard.shell import HEADERS
from codex_proxy.server.front import Handler, Incoming
from codex_proxy.server.gateway.desk import Desk
from codex_proxy.server.onlooker import Pause, tell

HOLDER_ROUTES: tuple[Route, ...] = (
    Route("GET", "/ui/api/own", "ui_own", Level.VISITOR),
    Route("GET", "/ui/api/own/usage", "ui_own_usage", Level.VISITOR),
    Route("GET", "/ui/api/own/setup", "ui_own_setup", Level.VISITOR),
    Route("GET", "/ui/api/own/live", "ui_own_live", Level.VISITOR),
)

# A key that is revoked ends its page within so much.
_LOOK_SECONDS = 0.5
_TELL_EVERY = 2

Setup = Callable[[web.Request, Callable[[str], bool]], JsonObject]
"""What to paste into clients, of the models that a filter lets through."""


def holder_handlers(desk: Desk, sessions: Sessions, setup: Setup) -> dict[str, Handler]:
    """Return the handlers by the names in `HOLDER_ROUTES`."""

    def key_of(request: web.Request) -> str:
        key_id = sessions.key_of(request)
        if key_id is None:
            raise KeyRefused("there is no client key behind this session", code="no_client_key")
        return key_id

    async def own(request: web.Request) -> web.StreamResponse:
        return _answer(await _module("own").own(desk, key_of(request)))

    async def own_usage(request: web.Request) -> web.StreamResponse:
        key_id = key_of(request)
        query = _module("performing").decode_query(request.query, _module("shapes").OwnQuery)
        return _answer(await _module("own").own_usage(desk, key_id, query))

    async def own_setup(request: web.Request) -> web.StreamResponse:
        may_use = _module("own").models_of(desk, key_of(request))
        return _answer(setup(request, may_use))

    async def own_live(request: web.Request) -> web.StreamResponse:
        _ = key_of(request)
        assert isinstance(request, Incoming)

        async def frames(pause: Pause) -> AsyncGenerator[bytes, None]:
            looks = 0
            while sessions.is_valid(request):
                if looks % _TELL_EVERY == 0:
                    yield frame("own", dumps({"at": desk.clock.now()}))
                looks += 1
                if not await pause(_LOOK_SECONDS):
                    break
            yield frame("end", b"{}")

        return await tell(request, HEADERS, frames)

    return {"ui_own": own, "ui_own_usage": own_usage, "ui_own_setup": own_setup, "ui_own_live": own_live}


def _module(name: str) -> Any:
    """Return a module of this package that needs the ledger; whoever has a key of the ledger has one."""
    return importlib.import_module(f"{__package__}.{name}")


def _answer(value: object) -> web.Response:
    return web.Response(
        body=_module("performing").encode(value),
        content_type="application/json",
        headers={**HEADERS, "Cache-Control": "no-store"},
    )
