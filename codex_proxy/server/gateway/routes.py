"""The admin API over HTTP: for holders of the admin-key, for the page's sessions, on the control socket.

The page has the same rows below its own path, where its cookie is sent.
"""

import importlib
import logging
import re
from dataclasses import dataclass
from typing import Any

from aiohttp import web

from codex_proxy.errors import LedgerAway, ProxyError
from codex_proxy.protocol.wire import JsonObject, loads
from codex_proxy.server.access import Level, address_of
from codex_proxy.server.app import ROUTE, Route, Takes
from codex_proxy.server.body import read_body
from codex_proxy.server.dashboard.shell import HEADERS
from codex_proxy.server.front import CALLER, Handler
from codex_proxy.server.gateway.desk import Desk
from codex_proxy.server.gateway.operations import BASE, OPERATIONS, Operation

audit = logging.getLogger("codex_proxy.audit")

PAGE_BASE = "/ui/api/admin"

MAX_BODY_BYTES = 256 * 1024

CONTROL = "control socket"
"""Who asks where no key is needed because only the owner can ask."""

_SEGMENT = re.compile(r"\{(\w+)\}")


@dataclass(slots=True, frozen=True)
class _Place:
    """Where the rows are served, and to whom."""

    base: str
    level: Level
    mark: str
    """What the names of their handlers begin with."""


_API = _Place(BASE, Level.ADMIN, "gateway")
_PAGE = _Place(PAGE_BASE, Level.SESSION, "ui_gateway")


def _routes(place: _Place) -> tuple[Route, ...]:
    return tuple(
        Route(
            one.method,
            f"{place.base}{one.path}",
            f"{place.mark}_{one.name}",
            place.level,
            Takes.JSON if one.has_body else Takes.NOTHING,
        )
        for one in OPERATIONS
    )


_MOVED = {
    "/admin/upstreams": "/ui#/gateway/upstreams",
    "/admin/settings": "/ui#/setup",
    "/dashboard": "/ui",
}
"""Addresses of pages that people know from elsewhere, and where ours are."""

GATEWAY_ROUTES = _routes(_API)
GATEWAY_UI_ROUTES = (
    *(Route("GET", path, "ui_moved", Level.PUBLIC) for path in _MOVED),
    *_routes(_PAGE),
)


def gateway_handlers(desk: Desk) -> dict[str, Handler]:
    """Return the handlers by the names in `GATEWAY_ROUTES`."""
    return _handlers(desk, _API)


def gateway_ui_handlers(desk: Desk) -> dict[str, Handler]:
    """Return the handlers by the names in `GATEWAY_UI_ROUTES`."""

    async def moved(request: web.Request) -> web.StreamResponse:
        place = _MOVED[request[ROUTE].path]
        return web.Response(status=302, headers={"Location": place, "Cache-Control": "no-store"})

    return {**_handlers(desk, _PAGE), "ui_moved": moved}


async def usage_told(desk: Desk, request_id: str) -> JsonObject | None:
    """Return what one request has used and cost, as the API tells it; None when the ledger has nothing of it."""
    usage, performing = _module("usage"), _module("performing")
    try:
        found = await usage.usage_of(desk, request_id)
    except LedgerAway:
        return None
    told: JsonObject | None = None if found is None else loads(performing.encode(found))
    return told


def _module(name: str) -> Any:
    """Return a module of this package that needs the ledger."""
    return importlib.import_module(f"{__package__}.{name}")


def _handlers(desk: Desk, place: _Place) -> dict[str, Handler]:
    return {f"{place.mark}_{one.name}": _handler(desk, one, place) for one in OPERATIONS}


def _handler(desk: Desk, one: Operation, place: _Place) -> Handler:
    found = _SEGMENT.search(one.path)
    segment = None if found is None else found[1]
    headers = {"Cache-Control": "no-store", **(HEADERS if place.level is Level.SESSION else {})}

    def note(request: web.Request, name: str, is_good: bool) -> None:
        caller = request.get(CALLER)
        audit.info(
            "gateway action=%s target=%s success=%s by=%s from=%s",
            one.name.replace("_", "-"),
            re.sub(r"[^\w.@:-]", "?", name)[:100] or "-",
            is_good,
            CONTROL if caller is None else caller.name,
            address_of(request, desk.live.current) or "-",
        )

    async def handle(request: web.Request) -> web.StreamResponse:
        name = "" if segment is None else request.match_info[segment]
        body = await read_body(request, limit=MAX_BODY_BYTES) if one.has_body else b""
        caller = request.get(CALLER)
        actor = CONTROL if caller is None else caller.name
        try:
            done = await one.perform(desk, name, request.query, body, actor)
        except ProxyError:
            if one.method != "GET":
                note(request, name, False)
            raise
        if one.method != "GET":
            note(request, name, True)
        response = web.Response(
            status=done.status,
            body=done.body,
            content_type=done.content_type,
            charset="utf-8" if done.content_type.startswith("text/") else None,
            headers=headers,
        )
        if done.file is not None:
            response.headers["Content-Disposition"] = f'attachment; filename="{done.file}"'
        return response

    return handle
