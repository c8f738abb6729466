"""What every request gets: an id, one place where errors become answers, and no surprises.

A handler raises; here the error is rendered in the words of the route's dialect. Something
nobody foresaw becomes a 500 that says nothing but the request's id, under which the log has
the rest.
"""

import contextlib
import logging
from collections.abc import Mapping
from typing import Protocol

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError
from multidict import CIMultiDict

from codex_proxy.errors import ProxyError, RequestError
from codex_proxy.server.dashboard.shell import HEADERS as PAGE_HEADERS
from codex_proxy.server.front import ANSWER, DIALECT, ENTERED, IS_TURN, REQUEST_ID, Handler, Incoming

logger = logging.getLogger(__name__)

DEFAULT_DIALECT = "openai"


class Renderer(Protocol):
    """Say an error in the words of one dialect: status, headers, body."""

    def __call__(self, error: ProxyError, *, request_id: str) -> tuple[int, Mapping[str, str], bytes]: ...


def edge(renderers: Mapping[str, Renderer], dispatch: Handler) -> Handler:
    """Return what answers every request; *renderers* has one entry per dialect, `openai` among them."""

    async def watch(request: web.Request) -> web.StreamResponse:
        assert isinstance(request, Incoming)
        in_work, connection = request.in_work, request.protocol
        in_work.enter(connection)
        try:
            response = await handle(request)
            # Written here and not after us, so that it counts as work until it is out. Who has
            # left meanwhile is found out once more by whoever called us.
            with contextlib.suppress(ConnectionError):
                await response.prepare(request)
                await response.write_eof()
            if in_work.is_over:
                # Its head may have gone out before that was so.
                response.force_close()
            return response
        finally:
            in_work.leave(connection)

    async def handle(request: web.Request) -> web.StreamResponse:
        error: ProxyError
        try:
            response = await dispatch(request)
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
                request[REQUEST_ID], request.method, request.path, type(exc).__name__, exc_info=exc,
            )  # fmt: skip
            error = ProxyError(
                f"the proxy failed on this request; its log says why under {request[REQUEST_ID]}"
            )
        else:
            _log(request, response.status, logging.DEBUG)
            return response

        answer: web.StreamResponse | None = request.get(ANSWER)
        if answer is not None:
            # The head is out. Ending the answer in order would make half of it look whole.
            logger.error(
                "answer cut id=%s path=%s error=%s", request[REQUEST_ID], request.path, type(error).__name__
            )
            if request.transport is not None:
                request.transport.abort()
            return answer
        response = _render(renderers, error, request, request[REQUEST_ID])
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
    if request.path.startswith("/ui/"):
        headers.update({**PAGE_HEADERS, "Cache-Control": "no-store"})
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
