"""What every request gets: an id, one place where errors become answers, and no surprises.

A handler raises; here the error is rendered in the words of the route's dialect. Something
nobody foresaw becomes a 500 that says nothing but the request's id, under which the log has
the rest.
"""

import asyncio
import contextlib
import logging
import os
import re
from collections.abc import Awaitable, Callable, Mapping
from typing import Protocol

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError
from aiohttp.typedefs import Middleware
from multidict import CIMultiDict

from codex_proxy.errors import ProxyError, RequestError
from codex_proxy.trace import Caller

logger = logging.getLogger(__name__)

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

REQUEST_ID = web.RequestKey("request_id", str)
"""Set before anything else; also the answer's `x-request-id`."""
DIALECT = web.RequestKey("dialect", str)
"""Whose error shape counts; set once the route is known."""
CALLER = web.RequestKey("caller", Caller)
"""Who is asking; set on every route that is not public."""
IS_TURN = web.RequestKey("is_turn", bool)
"""The route serves turns, whose handlers tell their own story once they run."""
ENTERED = web.RequestKey("entered", bool)
"""The route's handler has the request."""
ANSWER = web.RequestKey("answer", web.StreamResponse)
"""The answer whose head is written, so that no second one may follow."""

DEFAULT_DIALECT = "openai"


class InWork:
    """The connections that have a request in work, for an end that breaks none of them off.

    aiohttp's own way to close up stops reading at once, which a request whose body is still
    on its way does not survive.
    """

    def __init__(self) -> None:
        self._connections: set[object] = set()
        self._idle = asyncio.Event()
        self._idle.set()
        self.is_closing = False
        """Every answer from now on is the last one of its connection."""
        self._endings: set[Callable[[], None]] = set()

    def __len__(self) -> int:
        return len(self._connections)

    def __contains__(self, connection: object) -> bool:
        return connection in self._connections

    def enter(self, connection: object) -> None:
        """Note that a request has come; a connection has one at a time."""
        self._connections.add(connection)
        self._idle.clear()

    def leave(self, connection: object) -> None:
        """Note that its answer is out."""
        self._connections.discard(connection)
        if not self._connections:
            self._idle.set()

    def on_closing(self, end: Callable[[], None]) -> None:
        """Have *end* called when everything closes: a WebSocket is in work for as long as it is open."""
        self._endings.add(end)

    def forget(self, end: Callable[[], None]) -> None:
        """Call *end* no more."""
        self._endings.discard(end)

    def close(self) -> None:
        """Let what is in work be the last."""
        self.is_closing = True
        for end in list(self._endings):
            end()

    async def wait_idle(self) -> None:
        """Wait until no request is in work."""
        await self._idle.wait()


IN_WORK = web.AppKey("in_work", InWork)

_SANE_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")


class Renderer(Protocol):
    """Say an error in the words of one dialect: status, headers, body."""

    def __call__(self, error: ProxyError, *, request_id: str) -> tuple[int, Mapping[str, str], bytes]: ...


def request_id_of(request: web.Request) -> str:
    """Return the caller's own `x-request-id` if it is fit to be logged, else a new one."""
    theirs = request.headers.get("x-request-id", "")
    return theirs if _SANE_ID.fullmatch(theirs) else f"req_{os.urandom(16).hex()}"


async def on_prepare(request: web.Request, response: web.StreamResponse) -> None:
    """Put the request's id on every answer, and remember that its head goes out now."""
    request[ANSWER] = response
    headers = response.headers
    headers["x-request-id"] = request[REQUEST_ID]
    if request.get(DIALECT) == "anthropic":
        # Where the SDKs of that API look for it.
        headers["request-id"] = request[REQUEST_ID]
    headers["Server"] = "codex-proxy"
    if request.app[IN_WORK].is_closing:
        # The header has been decided on before this is called.
        headers["Connection"] = "close"
        response.force_close()


def edge(renderers: Mapping[str, Renderer]) -> Middleware:
    """Return the middleware; *renderers* has one entry per dialect, `openai` among them."""

    @web.middleware
    async def watch(request: web.Request, handler: Handler) -> web.StreamResponse:
        in_work, connection = request.app[IN_WORK], request.protocol
        in_work.enter(connection)
        try:
            response = await handle(request, handler)
            # Written here and not after us, so that it counts as work until it is out. Who has
            # left meanwhile is found out once more by whoever called us.
            with contextlib.suppress(ConnectionError):
                await response.prepare(request)
                await response.write_eof()
            if in_work.is_closing:
                # Its head may have gone out before that was so.
                response.force_close()
            return response
        finally:
            in_work.leave(connection)

    async def handle(request: web.Request, handler: Handler) -> web.StreamResponse:
        request_id = request[REQUEST_ID] = request_id_of(request)
        error: ProxyError
        try:
            response = await handler(request)
        except ProxyError as exc:
            error = exc
        except web.HTTPException as exc:
            if exc.status < 400:
                raise
            error = RequestError(exc.reason.lower(), status=exc.status, allow=exc.headers.get("Allow"))
        except Exception as exc:
            if isinstance(exc, ConnectionError) and _is_gone(request):
                # Nobody will read it. Raising would make the server log a traceback.
                return web.Response(status=499, reason="Client Closed Request")
            logger.error(
                "request failed id=%s method=%s path=%s error=%s",
                request_id, request.method, request.path, type(exc).__name__, exc_info=exc,
            )  # fmt: skip
            error = ProxyError(f"the proxy failed on this request; its log says why under {request_id}")
        else:
            _log(request, response.status, logging.DEBUG)
            return response

        answer: web.StreamResponse | None = request.get(ANSWER)
        if answer is not None:
            # The head is out. Ending the answer in order would make half of it look whole.
            logger.error("answer cut id=%s path=%s error=%s", request_id, request.path, type(error).__name__)
            if request.transport is not None:
                request.transport.abort()
            return answer
        response = _render(renderers, error, request, request_id)
        refused = request.get(IS_TURN, False) and not request.get(ENTERED, False)
        _log(request, response.status, logging.INFO if refused else logging.DEBUG, error.code)
        return response

    return watch


def _render(
    renderers: Mapping[str, Renderer], error: ProxyError, request: web.Request, request_id: str
) -> web.Response:
    render = renderers[request.get(DIALECT, DEFAULT_DIALECT)]
    status, headers, body = render(error, request_id=request_id)
    headers = CIMultiDict(headers)
    headers.setdefault("Content-Type", "application/json")
    response = web.Response(status=status, headers=headers, body=body)
    if status == 401:
        response.headers.setdefault("WWW-Authenticate", "Bearer")
    if not request.content.is_eof():
        if status == 408:
            # Nobody waits for the rest of a body that does not come.
            request.protocol.close()
            request.content.feed_eof()
        # A rest that is on its way is read away for some seconds, so that the caller gets to
        # see the answer; one that waits for a "100 Continue" may never come.
        if status in (408, 413) or "Expect" in request.headers:
            response.force_close()
    return response


def _is_gone(request: web.Request) -> bool:
    transport = request.transport
    return transport is None or transport.is_closing()


def _log(request: web.Request, status: int, level: int, code: str | None = None) -> None:
    if logger.isEnabledFor(level):
        logger.log(
            level, "answered id=%s method=%s path=%s status=%d code=%s",
            request[REQUEST_ID], request.method, request.path[:200], status, code,
        )  # fmt: skip


class QuietProtocol(logging.Filter):
    """Make what is no HTTP one DEBUG line instead of a traceback with the caller's bytes in it."""

    def filter(self, record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        if not isinstance(error, HttpProcessingError):
            return True
        record.levelno, record.levelname = logging.DEBUG, "DEBUG"
        record.msg, record.args = "bad request error=%s", (type(error).__name__,)
        record.exc_info = record.exc_text = None
        return logging.getLogger(record.name).isEnabledFor(logging.DEBUG)


protocol_logger = logging.getLogger(f"{__name__}.protocol")
protocol_logger.addFilter(QuietProtocol())
