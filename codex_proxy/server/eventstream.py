"""An answer that is written as it comes: its head goes out with its first bytes, its end with its last ones.

What `web.StreamResponse` does in three writes is one here when all of an answer is there at once, and a
write to a socket costs more than anything else that a short answer needs.
"""

import asyncio
import re
import time
from collections.abc import Mapping
from email.utils import formatdate

from aiohttp import HttpVersion11, web

from codex_proxy.server.front import ANSWER, Incoming

# What the transport holds before it says that its reader is slow.
_HIGH_WATER = 64 * 1024

_FIXED = (
    b"Content-Type: text/event-stream; charset=utf-8\r\n"
    b"Cache-Control: no-cache\r\n"
    # nginx would hold a stream back to fill its buffers.
    b"X-Accel-Buffering: no\r\n"
)
_FORBIDDEN = re.compile(r"[\x00-\x08\x0a-\x1f\x7f]")


class EventStream(web.StreamResponse):
    """A stream of server-sent events with status 200.

    Writing is a plain call, so that two who write cannot come between each other's bytes; only waiting for a
    slow reader takes an await.

    Args:
        headers: More headers for the caller.
        stall_seconds: How long the caller may read nothing.
    """

    def __init__(self, request: Incoming, headers: Mapping[str, str], stall_seconds: float) -> None:
        super().__init__()
        self._incoming = request
        self._stall_seconds = stall_seconds
        self._is_chunked = request.version >= HttpVersion11
        self._is_last = (
            not request.keep_alive
            or request.in_work.is_closing
            # Its end is that of the connection.
            or not self._is_chunked
        )
        self._is_ended = False
        self._head = self._render_head(headers)
        request[ANSWER] = self

    def _render_head(self, headers: Mapping[str, str]) -> bytes:
        common = self._incoming.common_headers()
        text = "".join([f"{name}: {value}\r\n" for name, value in common.items()])
        for name, value in headers.items():
            if _FORBIDDEN.search(value) is not None:
                raise ValueError(f"the header {name} holds what none may hold")
            if name not in common:
                text += f"{name}: {value}\r\n"
        begin = (
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n"
            if self._is_chunked
            else b"HTTP/1.0 200 OK\r\n"
        )
        ending = b"Connection: close\r\n\r\n" if self._is_last else b"\r\n"
        return b"%b%bDate: %b\r\n%b%b" % (begin, _FIXED, _date(), text.encode("utf-8"), ending)

    # -- what the server asks of a response -------------------------------------------------

    @property
    def prepared(self) -> bool:
        return True

    @property
    def keep_alive(self) -> bool | None:
        return not self._is_last

    def force_close(self) -> None:
        self._is_last = True

    async def prepare(self, request: web.BaseRequest) -> None:
        """Do nothing: the head is ready."""

    async def write(self, data: bytes | bytearray | memoryview) -> None:
        """Write *data*, and wait for a caller who is slow to read."""
        self.put(bytes(data))
        await self.caught_up()

    async def write_eof(self, data: bytes = b"") -> None:
        """End the body."""
        if not self._is_ended:
            self.put(data, is_last=True)
            await self.caught_up()

    # -- what the sinks use -----------------------------------------------------------------

    def put(self, data: bytes, *, is_last: bool = False) -> None:
        """Write *data*, and with it whatever has to stand before and after it.

        Raises:
            ConnectionError: If the caller has left.
        """
        transport = self._incoming.transport
        if transport is None or transport.is_closing():
            raise ConnectionResetError("the caller has left")
        head, self._head = self._head, b""
        if self._is_chunked:
            end = b"0\r\n\r\n" if is_last else b""
            written = b"%b%x\r\n%b\r\n%b" % (head, len(data), data, end) if data else head + end
        else:
            written = head + data if head else data
        self._is_ended = is_last
        if written:
            # Whoever handles a failure looks there for whether an answer has begun.
            self._incoming.writer.output_size += len(written)
            transport.write(written)

    async def caught_up(self) -> None:
        """Wait until the caller has read enough of what was written.

        Raises:
            ConnectionError: If it has left, or reads nothing for too long.
        """
        transport = self._incoming.transport
        if transport is None or transport.get_write_buffer_size() <= _HIGH_WATER:
            return
        try:
            async with asyncio.timeout(self._stall_seconds):
                await self._incoming.writer.drain()
        except TimeoutError as exc:
            # Give up a caller who reads nothing for so long; an ending would not be read either.
            self.abort()
            raise ConnectionResetError("the caller stopped reading") from exc

    def abort(self) -> None:
        """Break the connection off."""
        transport = self._incoming.transport
        if transport is not None:
            transport.abort()


_dated: tuple[int, bytes] = (0, b"")


def _date() -> bytes:
    """Return the time as HTTP writes it, made once a second."""
    global _dated
    now = int(time.time())
    if _dated[0] != now:
        _dated = now, formatdate(now, usegmt=True).encode("ascii")
    return _dated[1]
