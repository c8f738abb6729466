"""aiohttp's server, with as little around a request as it lets one have.

Its parser reads what callers send, strictly; of a request a relay needs the fields as they came and the body as
it comes, so what `web.Request` and `web.Response` add is left out.
"""

import asyncio
import json
import logging
from collections.abc import Mapping
from typing import Any, cast

from aiohttp import web
from aiohttp.abc import AbstractStreamWriter
from aiohttp.http_parser import RawRequestMessage
from aiohttp.streams import StreamReader
from aiohttp.web_protocol import RequestHandler, RequestPayloadError

from codex_proxy.inbound import MAX_HEAD_SIZE, BoundedHeads

logger = logging.getLogger(__name__)

# What a transport holds before an answer of our own waits for who is to read it, and how long it waits.
_HIGH_WATER = 64 * 1024
_TAKE_SECONDS = 30.0

# Requests that were read behind the one in work.
_MAX_WAITING = 2

SERVER_OPTIONS: Mapping[str, Any] = {
    # A caller who leaves ends its handler, which closes the connection to the far server.
    "handler_cancellation": True,
    "auto_decompress": False,
    # Also the deadline of slow heads. The Codex CLI keeps an idle connection for 90 s; closing later than it
    # does never meets a request on its way.
    "keepalive_timeout": 95.0,
    # How long the rest of a body that nobody wants is read away, so that the caller gets to see the answer.
    "lingering_time": 5.0,
    "max_field_size": 64 * 1024,
    "max_line_size": 16 * 1024,
    # What of a body waits here for a slow server is a few times as much.
    "read_bufsize": 64 * 1024,
    "access_log": None,
    "logger": logger,
}


class Incoming:
    """A request, as the server made it."""

    __slots__ = ("_task", "message", "payload", "protocol", "writer")

    def __init__(
        self,
        message: RawRequestMessage,
        payload: StreamReader,
        protocol: RequestHandler,
        writer: AbstractStreamWriter,
        task: object,
    ) -> None:
        self.message = message
        self.payload = payload
        self.protocol = protocol
        self.writer = writer
        self._task = task

    @property
    def peer(self) -> str:
        """The address at the other end of the connection; empty on a Unix socket."""
        name = self.protocol.peername
        return str(name[0]) if isinstance(name, tuple) else ""

    def fields(self, name: bytes) -> list[str]:
        """Return the values of a field, named in lower case, in their order."""
        return [
            value.decode("utf-8", "surrogateescape")
            for key, value in self.message.raw_headers
            if key.lower() == name
        ]

    # -- what the server asks of a request -------------------------------------------------

    def _cancel(self, exc: BaseException) -> None:
        self.payload.set_exception(exc)

    def _finish(self) -> None:
        pass


class Said:
    """An answer of our own, or the end of one that has been written already."""

    __slots__ = ("data", "keep_alive", "status")

    def __init__(self, status: int, data: bytes, *, keep_alive: bool) -> None:
        self.status = status
        self.keep_alive = keep_alive
        self.data = data

    async def prepare(self, request: Incoming) -> None:
        """Write it."""
        transport = request.protocol.transport
        if transport is None or transport.is_closing():
            raise ConnectionResetError("the caller has left")
        transport.write(self.data)
        if transport.get_write_buffer_size() > _HIGH_WATER:
            try:
                async with asyncio.timeout(_TAKE_SECONDS):
                    await request.writer.drain()
            except TimeoutError:
                transport.abort()
                raise ConnectionResetError("the caller takes nothing") from None

    async def write_eof(self) -> None:
        """Do nothing: it is out."""


_REASONS = {
    200: "OK", 400: "Bad Request", 401: "Unauthorized", 403: "Forbidden", 404: "Not Found",
    405: "Method Not Allowed", 408: "Request Timeout", 429: "Too Many Requests", 431: "Request Header Fields Too Large",
    500: "Internal Server Error", 501: "Not Implemented", 502: "Bad Gateway", 503: "Service Unavailable", 504: "Gateway Timeout",
}  # fmt: skip


def page(
    status: int,
    document: Mapping[str, Any],
    *,
    method: str = "GET",
    keep_alive: bool = False,
    headers: Mapping[str, str] | None = None,
) -> Said:
    """Return a JSON answer; *keep_alive* says whether another request may follow it."""
    body = json.dumps(document, ensure_ascii=False).encode("utf-8")
    lines = [
        f"HTTP/1.1 {status} {_REASONS[status]}",
        "Content-Type: application/json; charset=utf-8",
        f"Content-Length: {len(body)}",
        "Cache-Control: no-store",
        "Server: codex-proxy",
        *(f"{name}: {value}" for name, value in (headers or {}).items()),
        *(() if keep_alive else ("Connection: close",)),
        "\r\n",
    ]
    head = "\r\n".join(lines).encode("ascii")
    return Said(status, head if method == "HEAD" else head + body, keep_alive=keep_alive)


def error(
    status: int,
    code: str,
    message: str,
    *,
    method: str = "GET",
    keep_alive: bool = False,
    headers: Mapping[str, str] | None = None,
) -> Said:
    """Return an error of our own, in the shape that OpenAI's clients read."""
    kind = "api_error" if status >= 500 else "invalid_request_error"
    document = {"error": {"message": message, "type": kind, "param": None, "code": code}}
    return page(status, document, method=method, keep_alive=keep_alive, headers=headers)


class _Protocol(BoundedHeads):
    """A connection whose errors are told as all of ours are, and which holds no more than it has to."""

    __slots__ = ()

    def __init__(self, manager: "Server", **options: Any) -> None:
        super().__init__(manager, **options)
        self._max_msg_queue_size, self._msg_queue_resume_size = _MAX_WAITING, _MAX_WAITING // 2

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin, unless there are as many as there may be."""
        if isinstance(self._manager, Server) and self._manager.is_full:
            self.refuse(cast(asyncio.Transport, transport), _FULL.data)
            return
        super().connection_made(transport)

    def data_received(self, data: bytes) -> None:
        """Take what has come; a body that turns out to be none ends, which nobody else tells its reader."""
        super().data_received(data)
        request: Any = self._current_request
        # Behind a body that has not ended stands an error, if anything.
        if self._messages and request is not None and not request.payload.is_eof():
            request.payload.set_exception(RequestPayloadError("the body is none"))

    def too_large(self) -> bytes:
        """Return what is said to a head that is too large."""
        return _LARGE.data

    def log_exception(self, *args: Any, **kw: Any) -> None:
        """Tell of a failure of the server's; that a caller left while its body was read away is none."""
        if self.transport is not None:
            super().log_exception(*args, **kw)

    def handle_error(  # type: ignore[override]  # what is done with the answer is all in `Said`
        self,
        request: Incoming,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> Said:
        """Return the answer to a request that cannot be read, or at which we failed."""
        if status >= 500:
            logger.error("request failed error=%s", type(exc).__name__, exc_info=exc)
        else:
            # Its text quotes what was sent.
            logger.debug("not a request: reason=%s", type(exc).__name__)
        if request.writer.output_size > 0:
            raise ConnectionResetError("an answer has begun")
        if status >= 500:
            return error(500, "internal_error", "the forwarder failed; its log says more")
        return error(400, "bad_request", "this is no HTTP/1.1 request that can be passed on")


_LARGE = error(431, "head_too_large", f"the head of a request may have {MAX_HEAD_SIZE // 1024} KB")
_FULL = error(
    503, "too_many_connections", "this forwarder has as many connections as it may have", headers={"Retry-After": "5"}
)  # fmt: skip


class Server(web.Server):
    """Serves connections of this kind, so many at a time."""

    def __init__(self, handler: Any, *, max_connections: int, **options: Any) -> None:
        super().__init__(handler, **options)
        self._max_connections = max_connections
        self._has_told = False

    @property
    def is_full(self) -> bool:
        """Whether nobody more is let in; the log is told once, until half of them have left."""
        count = len(self._connections)
        if count < self._max_connections:
            self._has_told = self._has_told and count > self._max_connections // 2
            return False
        if not self._has_told:
            self._has_told = True
            logger.warning("full: no more callers are let in connections=%d", count)
        return True

    def __call__(self) -> RequestHandler:
        return _Protocol(self, loop=self._loop, **self._kwargs)
