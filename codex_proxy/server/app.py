"""The routes, all of them in one table, and the application made from it.

`ROUTES` says for each route who may use it, in whose words it fails and what body it takes;
which function serves it is looked up by name when the application is built, so the table can
be read, and tested, without a daemon. One lookup of our own serves all paths: it makes the
aliases, the tolerance for slashes and the JSON 404 and 405 one matter.
"""

import enum
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from aiohttp import web

from codex_proxy.accounts.actions import ACTIONS
from codex_proxy.errors import RequestError
from codex_proxy.server.access import Access, Level
from codex_proxy.server.body import require_json
from codex_proxy.server.front import CALLER, DIALECT, ENTERED, IS_TURN, Front, Handler, Incoming
from codex_proxy.server.middleware import DEFAULT_DIALECT, Renderer, edge, protocol_logger

CODEX_PREFIX = "/backend-api/codex"


class Takes(enum.Enum):
    """What body a route takes."""

    NOTHING = "nothing"
    """One that comes is not looked at."""
    JSON = "json"
    FORM = "form"
    """JSON, or a form with files in it."""


@dataclass(slots=True, frozen=True)
class Route:
    """One row of the table."""

    method: str
    path: str
    """A segment in braces matches whatever stands there, as `request.match_info`; as the last one, whatever is left."""
    handler: str
    """The name under which `build_app` is given the function."""
    level: Level = Level.KEYED
    takes: Takes = Takes.NOTHING
    dialect: str = DEFAULT_DIALECT
    codex: bool = False
    """Also below the path that the Codex CLI uses."""
    turn: bool = False
    """Serves turns: the handler writes the request's line in the log."""

    @property
    def paths(self) -> tuple[str, ...]:
        """Every path of this route: base URLs come with `/v1`, without it, and with it twice."""
        if not self.path.startswith("/v1/"):
            return (self.path,)
        rest = self.path.removeprefix("/v1")
        found = (self.path, rest, f"/v1/v1{rest}")
        return (*found, CODEX_PREFIX + rest) if self.codex else found


def _turn(
    method: str,
    path: str,
    handler: str,
    takes: Takes = Takes.JSON,
    *,
    dialect: str = DEFAULT_DIALECT,
    codex: bool = False,
) -> Route:
    return Route(method, path, handler, takes=takes, dialect=dialect, codex=codex, turn=True)


ROUTES: tuple[Route, ...] = (
    Route("GET", "/health", "health", Level.PUBLIC),
    Route("GET", "/livez", "livez", Level.PUBLIC),
    Route("GET", "/readyz", "readyz", Level.PUBLIC),
    Route("GET", "/metrics", "metrics", Level.METRICS),
    Route("GET", "/stats", "stats", Level.OWNER),
    Route("GET", "/accounts", "accounts", Level.OWNER),
    Route("GET", "/why/{request_id}", "why", Level.OWNER),
    Route("GET", "/requests", "requests", Level.OWNER),
    Route("GET", "/requests/live", "requests_live", Level.OWNER),
    Route("GET", "/requests/{request_id}", "request", Level.OWNER),
    Route("POST", "/refresh", "refresh", Level.OWNER),
    Route("POST", "/check-quota", "check_quota", Level.OWNER),
    _turn("POST", "/v1/responses", "responses", codex=True),
    Route("GET", "/v1/responses", "responses_socket", codex=True),
    _turn("POST", "/v1/responses/compact", "compact", codex=True),
    Route("POST", "/v1/responses/input_tokens", "input_tokens", takes=Takes.JSON, codex=True),
    _turn("POST", "/v1/alpha/search", "alpha_search", codex=True),
    _turn("POST", "/v1/images/generations", "images_generations", codex=True),
    _turn("POST", "/v1/images/edits", "images_edits", Takes.FORM, codex=True),
    _turn("POST", "/v1/chat/completions", "chat"),
    _turn("POST", "/v1/completions", "completions"),
    _turn("POST", "/v1/engines/{engine}/completions", "engine_completions"),
    _turn("POST", "/v1/edits", "edits"),
    _turn("POST", "/v1/embeddings", "embeddings"),
    _turn("POST", "/v1/messages", "messages", dialect="anthropic"),
    Route("POST", "/v1/messages/count_tokens", "count_tokens", takes=Takes.JSON, dialect="anthropic"),
    # Claude Code asks this first, to see whether anybody is there.
    Route("GET", "/api/hello", "hello", Level.PUBLIC),
    Route("GET", "/", "hello", Level.PUBLIC),
    Route("GET", "/v1/models", "models", codex=True),
    Route("GET", "/v1/models/{model}", "model", codex=True),
    Route("GET", "/backend-api/wham/usage", "usage"),
    Route("GET", "/wham/usage", "usage"),
    Route("GET", "/api/codex/usage", "usage"),
)

ACCOUNT_ROUTES: tuple[Route, ...] = tuple(
    Route("POST", f"/accounts/{{alias}}/{action}", f"account_{action}", Level.ADMIN) for action in ACTIONS
)
"""What changes one account: with the admin-key, or on the control socket, which only its owner can open.

While no admin-key is set every client key is an owner's, and whoever was given one to ask models with
must not be able to take accounts away.
"""

UI_ROUTES: tuple[Route, ...] = (
    Route("GET", "/ui", "ui", Level.PUBLIC),
    Route("GET", "/ui/static/{file}", "ui_static", Level.PUBLIC),
    # Whoever has no session yet needs one to say so.
    Route("GET", "/ui/api/session", "ui_session", Level.PUBLIC),
    Route("POST", "/ui/api/session", "ui_log_in", Level.PUBLIC, takes=Takes.JSON),
    Route("DELETE", "/ui/api/session", "ui_log_out", Level.VISITOR),
    Route("GET", "/ui/api/live", "ui_live", Level.SESSION),
    Route("GET", "/ui/api/requests", "ui_requests", Level.SESSION),
    Route("GET", "/ui/api/requests/{request_id}", "ui_request", Level.SESSION),
    Route("GET", "/ui/api/cache", "ui_cache", Level.SESSION),
    Route("GET", "/ui/api/setup", "ui_setup", Level.SESSION),
    Route("POST", "/ui/api/try", "ui_try", Level.SESSION, takes=Takes.JSON),
    Route("POST", "/ui/api/refresh", "ui_refresh", Level.SESSION),
    Route("POST", "/ui/api/check-quota", "ui_check_quota", Level.SESSION),
    Route("POST", "/ui/api/import", "ui_import", Level.SESSION, takes=Takes.JSON),
    Route("POST", "/ui/api/login", "ui_login", Level.SESSION),
    Route("GET", "/ui/api/login/{login_id}", "ui_login_state", Level.SESSION),
    Route("DELETE", "/ui/api/login/{login_id}", "ui_login_cancel", Level.SESSION),
    Route("GET", "/ui/api/alerts", "ui_alerts", Level.SESSION),
    *(
        Route("POST", f"/ui/api/accounts/{{alias}}/{action}", f"ui_account_{action}", Level.SESSION)
        for action in ACTIONS
    ),
)
"""The page and what it asks for."""

ROUTE = web.RequestKey("route", Route)
IS_CODEX_PATH = web.RequestKey("is_codex_path", bool)
"""The request came below `/backend-api/codex`, where only Codex clients ask."""

SERVER_OPTIONS: Mapping[str, Any] = {
    # A caller who leaves ends its handler, which tells the exchange.
    "handler_cancellation": True,
    # Bodies come as they are: see body.py.
    "auto_decompress": False,
    # Also the deadline of slow heads. The Codex CLI keeps an idle connection for 90 s; closing
    # later than it does never meets a request on its way.
    "keepalive_timeout": 95.0,
    # How long the rest of a refused body is read away, so that the caller gets to see the answer.
    # It is spent in full when the caller just leaves.
    "lingering_time": 5.0,
    # Codex clients send turn metadata and our wrapped turn state as headers.
    "max_field_size": 64 * 1024,
    "max_line_size": 16 * 1024,
    "access_log": None,
    "logger": protocol_logger,
}
"""How the server behind `build_app` must be made."""


def build_app(
    access: Access,
    handlers: Mapping[str, Handler],
    renderers: Mapping[str, Renderer],
    routes: Sequence[Route] = ROUTES,
) -> Front:
    """Make the application; its server is made by `server(**SERVER_OPTIONS)`.

    Raises:
        ValueError: If a route has no handler, a handler no route, or two rows claim one path.
    """
    table = _Table(routes, handlers)
    missing = {route.dialect for route in routes} - renderers.keys()
    if missing or DEFAULT_DIALECT not in renderers:
        raise ValueError(f"no renderer for {sorted(missing) or DEFAULT_DIALECT}")

    async def dispatch(request: web.Request) -> web.StreamResponse:
        path = request.path
        methods, rest = table.find(path)
        if methods is None:
            request[DIALECT] = dialect_of(request, DEFAULT_DIALECT)
            raise RequestError(
                f"unknown path: {request.method} {path[:200]!r}; requests go to /v1/responses, "
                "/v1/chat/completions or /v1/messages, the list of models is at /v1/models",
                status=404,
                code="unknown_url",
            )
        found = methods.get(request.method)
        if found is None:
            request[DIALECT] = next(iter(methods.values()))[0].dialect
            allow = ", ".join(sorted(methods))
            raise RequestError(
                f"method {request.method} is not served at {path[:200]!r}; use {allow}",
                status=405,
                code="method_not_allowed",
                allow=allow,
            )
        route, handler, is_codex_path = found
        request[ROUTE] = route
        request[DIALECT] = route.dialect if route.turn else dialect_of(request, route.dialect)
        request[IS_TURN] = route.turn
        request[IS_CODEX_PATH] = is_codex_path
        if rest is not None:
            assert isinstance(request, Incoming)
            request.segments = rest
        if route.level is not Level.PUBLIC:
            request[CALLER] = access.admit(request, route.level)
        if route.takes is not Takes.NOTHING and request.body_exists:
            require_json(request, multipart=route.takes is Takes.FORM)
        request[ENTERED] = True
        return await handler(request)

    return Front(edge(renderers, dispatch))


def dialect_of(request: web.Request, default: str) -> str:
    """Return in whose words to fail where the path alone does not say it."""
    return "anthropic" if "anthropic-version" in request.headers else default


_Methods = dict[str, tuple[Route, Handler, bool]]


class _Table:
    """Path to methods to what serves them, and whether the path is a Codex client's."""

    def __init__(self, routes: Iterable[Route], handlers: Mapping[str, Handler]) -> None:
        self._exact: dict[str, _Methods] = {}
        self._open: dict[tuple[str, str], tuple[str, _Methods]] = {}
        """What stands before and after an open segment, to its name and what is served there."""
        unused = set(handlers)
        for route in routes:
            handler = handlers.get(route.handler)
            if handler is None:
                raise ValueError(f"no handler {route.handler!r} for {route.method} {route.path}")
            unused.discard(route.handler)
            for path in route.paths:
                self._add(path, route, handler)
        if unused:
            raise ValueError(f"handlers without a route: {sorted(unused)}")

    def _add(self, path: str, route: Route, handler: Handler) -> None:
        prefix, brace, name = path.partition("{")
        if brace:
            name, _, suffix = name.partition("}")
            methods = self._open.setdefault((prefix, suffix), (name, {}))[1]
        else:
            methods = self._exact.setdefault(path, {})
        if route.method in methods and methods[route.method][0].method == route.method:
            raise ValueError(f"two routes claim {route.method} {path}")
        served = (route, handler, path.startswith(CODEX_PREFIX))
        methods[route.method] = served
        if route.method == "GET":
            methods.setdefault("HEAD", served)

    def find(self, path: str) -> tuple[_Methods | None, dict[str, str] | None]:
        """Return what *path* serves, and what its open segment holds."""
        methods = self._exact.get(path)
        if methods is not None:
            return methods, None
        # Base URLs end with a slash, and are joined with one.
        tidy = "/" + "/".join(part for part in path.split("/") if part)
        methods = self._exact.get(tidy)
        if methods is not None:
            return methods, None
        for (prefix, suffix), (name, methods) in self._open.items():
            if tidy.startswith(prefix) and tidy.endswith(suffix) and len(tidy) > len(prefix) + len(suffix):
                return methods, {name: tidy[len(prefix) : len(tidy) - len(suffix)]}
        return None, None
