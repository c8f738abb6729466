"""The front of a socket: one handler for every path, the requests it gets, and which connections are in work.

aiohttp's server reads requests; its application layer (a router, middlewares, signals) is left out, because all
that is needed of it is one function, and it costs more than the rest of the server.
"""

import asyncio
import random
import re
import time
from collections.abc import Awaitable, Callable, Mapping
from types import MappingProxyType
from typing import Any

from aiohttp import web
from aiohttp.abc import AbstractStreamWriter
from aiohttp.http_parser import RawRequestMessage
from aiohttp.streams import StreamReader
from aiohttp.web_protocol import RequestHandler

from codex_proxy.inbound import MAX_HEAD_SIZE, BoundedHeads
from codex_proxy.protocol.wire import dumps
from codex_proxy.trace import Caller

SERVER = "codex-proxy"
"""How answers name us."""

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

_SANE_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")

# Ids need to differ, not to be secret: asking the kernel for each costs more than making one.
_random_bits = random.Random().getrandbits


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
        """Every answer that begins from now on is the last one of its connection, and says so."""
        self.is_over = False
        """Also one that began before that ends its connection."""
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
        self.is_over = True
        self.retire()

    def retire(self) -> None:
        """Let each connection have one more answer: its caller may have sent the next request already."""
        self.is_closing = True
        for end in list(self._endings):
            end()

    async def wait_idle(self) -> None:
        """Wait until no request is in work."""
        await self._idle.wait()


class Incoming(web.Request):
    """A request, as every handler gets it."""

    # aiohttp's debug mode warns of attributes that are not named here.
    ATTRS = web.Request.ATTRS | {"in_work", "segments"}

    in_work: InWork
    segments: Mapping[str, str] = MappingProxyType({})
    """What stands in the open segments of the route's path."""

    @property
    def match_info(self) -> Mapping[str, str]:  # type: ignore[override]  # there is no router whose match it could be
        return self.segments

    async def _prepare_hook(self, response: web.StreamResponse) -> None:
        """Put on every answer what all of them carry, and remember that its head goes out now."""
        self[ANSWER] = response
        response.headers.update(self.common_headers())
        if self.in_work.is_closing:
            # The header has been decided on before this is called.
            response.headers["Connection"] = "close"
            response.force_close()

    def common_headers(self) -> dict[str, str]:
        """Return the headers of every answer to this request."""
        request_id = self[REQUEST_ID]
        headers = {"x-request-id": request_id, "Server": SERVER}
        if self.get(DIALECT) == "anthropic":
            # Where the SDKs of that API look for it.
            headers["request-id"] = request_id
        return headers


class _Connection(BoundedHeads):
    """A caller's connection."""

    __slots__ = ()

    def too_large(self) -> bytes:
        """Return what is said to a head that is too large, in the words of the OpenAI API: its path is not known."""
        return _LARGE


_LARGE_BODY = dumps({
    "error": {
        "message": f"the head of a request may have {MAX_HEAD_SIZE // 1024} KB in all",
        "type": "invalid_request_error",
        "param": None,
        "code": "head_too_large",
    }
})
_LARGE = (
    b"HTTP/1.1 431 Request Header Fields Too Large\r\nContent-Type: application/json; charset=utf-8\r\n"
    b"Content-Length: %d\r\nServer: %b\r\nConnection: close\r\n\r\n%b"
) % (len(_LARGE_BODY), SERVER.encode("ascii"), _LARGE_BODY)


class _Server(web.Server):
    def __call__(self) -> RequestHandler:
        return _Connection(self, loop=self._loop, **self._kwargs)


Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Front:
    """One handler behind any number of sockets.

    Args:
        handle: Answers every request, errors included.
    """

    def __init__(self, handle: Handler) -> None:
        self.in_work = InWork()
        self._handle = handle

    def server(self, **options: Any) -> web.Server:
        """Return what serves connections; *options* are those of `web.Server`."""
        return _Server(
            self._handle,  # type: ignore[arg-type]  # every request that comes is one of ours
            request_factory=self._receive,
            **options,
        )

    def _receive(
        self,
        message: RawRequestMessage,
        payload: StreamReader,
        protocol: RequestHandler,
        writer: AbstractStreamWriter,
        task: "asyncio.Task[None]",
    ) -> Incoming:
        request = Incoming(message, payload, protocol, writer, task, protocol._loop)
        request.in_work = self.in_work
        theirs = message.headers.get("x-request-id")
        request[REQUEST_ID] = (
            theirs if theirs is not None and _SANE_ID.fullmatch(theirs) else f"req_{new_id()}"
        )
        return request


def new_id() -> str:
    """Return 32 hexadecimal digits that nothing else was called by; those of one moment are near each other.

    So what is looked up by them in a database is near each other too, and many new ones change few of its pages.
    """
    return f"{time.time_ns() // 1_000_000:012x}{_random_bits(80):020x}"
