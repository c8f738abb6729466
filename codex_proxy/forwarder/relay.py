"""One request on its way: to the far server, and its answer back.

The answer is written by the very call that read it (`net.relaying`); the handler's task only waits: for the end,
or for whichever side is slow. So there is one wake-up for each request, and none for each piece.
"""

import asyncio
import contextlib
import socket
import struct
from collections.abc import Callable
from typing import Final

from aiohttp import HttpVersion11
from aiohttp.streams import EMPTY_PAYLOAD
from aiohttp.web_protocol import RequestPayloadError

from codex_proxy.forwarder.heads import answer_head, chunk
from codex_proxy.forwarder.incoming import Incoming
from codex_proxy.net.head import CHUNKED, TO_THE_END
from codex_proxy.net.passing import SWITCHING, PassedHead
from codex_proxy.net.relaying import SILENT, RelayConnection
from codex_proxy.net.wire import LOST
from codex_proxy.tasks import Background

# What a transport holds before it says that its reader is slow.
_HIGH_WATER = 64 * 1024

# What of a request is kept so that it can be sent once more.
_MAX_KEPT_SIZE = 1024 * 1024

# How long a caller has to take what came before its answer broke off.
_LAST_SECONDS = 5.0


class Failed(Exception):
    """An exchange that came to no end. The text names no path, and nothing that was sent."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message


class CallerGoneError(ConnectionResetError):
    """Nobody is there to take the answer."""


def _no_body() -> Failed:
    return Failed(400, "bad_body", "the body of the request cannot be read")


class Body:
    """The body of a request, framed as it goes on: what has come, and what is still to come.

    Raises:
        Failed: If what has come is no body.
    """

    __slots__ = ("_is_chunked", "_payload", "_size", "is_all", "sent")

    def __init__(self, http: Incoming) -> None:
        payload = http.payload
        self._payload = payload
        self._is_chunked = http.message.chunked
        self._size = 0
        self.sent: list[bytes] | None = []
        """All that came so far; None when that is more than is kept."""
        self.is_all = payload is EMPTY_PAYLOAD
        if not self.is_all:
            self._take(payload.read_nowait())
            if http.protocol._messages and not payload.at_eof():
                # Behind a body that has not ended stands an error, if anything.
                raise _no_body()

    async def more(self) -> bytes:
        """Wait for more of it; empty when it ends without a byte more.

        Raises:
            RequestPayloadError: If what comes is no body.
        """
        data = self._take(await self._payload.readany())
        if self._size > _MAX_KEPT_SIZE:
            self.sent = None
        return data

    def _take(self, data: bytes) -> bytes:
        self.is_all = self._payload.at_eof()
        if self._is_chunked:
            data = chunk(data, is_last=self.is_all)
        if self.sent is not None and data:
            self.sent.append(data)
            self._size += len(data)
        return data

    def forget(self) -> None:
        """Keep nothing of what is sent: nothing will be sent anew."""
        self.sent = None


class Relay:
    """An exchange; to the far side it takes the answer, to aiohttp's server it is the answer.

    Args:
        patience: How many seconds either side may do nothing.
        is_closing: Tells whether no request is to follow this one.
    """

    __slots__ = (
        "_connection",
        "_fault",
        "_goes_to_the_end",
        "_http",
        "_is_closing",
        "_is_last",
        "_is_over",
        "_is_slow",
        "_loop",
        "_patience",
        "_pending",
        "_waiter",
        "failure",
        "is_tunnel",
        "keep_alive",
        "size",
        "status",
    )

    def __init__(self, http: Incoming, patience: float, is_closing: Callable[[], bool]) -> None:
        self.status = 0
        """Of the answer; 0 until it has begun."""
        self.size = 0
        """How many bytes of an answer were handed to the caller, as they stand on the wire."""
        self.failure: str | None = None
        """Why it came to no end."""
        self.keep_alive = False
        self.is_tunnel = False
        self._is_last = http.message.should_close or http.message.version < HttpVersion11
        self._http = http
        self._patience = patience
        self._is_closing = is_closing
        self._loop = asyncio.get_running_loop()
        self._connection: RelayConnection | None = None
        self._fault: Failed | None = None
        """Why we broke it off."""
        self._pending = b""
        self._is_over = False
        self._is_slow = False
        self._goes_to_the_end = False
        self._waiter: asyncio.Future[None] | None = None

    # -- what the server asks of an answer ---------------------------------------------------

    async def prepare(self, request: Incoming) -> None:
        """Do nothing: it is out."""

    async def write_eof(self) -> None:
        """Do nothing: it is out."""

    # -- the far side's calls -----------------------------------------------------------------

    def interim(self, head: PassedHead) -> None:
        """Pass on a head before the answer's own; whoever speaks 1.0 knows none."""
        if self._http.message.version >= HttpVersion11:
            self._write(answer_head(head, is_last=False))

    def begin(self, head: PassedHead) -> None:
        """Keep the head until there is something to write it with."""
        if head.status == SWITCHING:
            self.is_tunnel = self._is_last = True
        elif head.length == TO_THE_END:
            self._is_last = self._goes_to_the_end = True
        elif head.length == CHUNKED and self._http.message.version < HttpVersion11:
            assert self._connection is not None
            self._connection.abort("it sends chunks to who asked in HTTP/1.0")
            return
        if self._is_closing():
            self._is_last = True
        self.status = head.status
        self._pending = answer_head(head, is_last=self._is_last)
        if self.is_tunnel:
            self.flush()
            # What the caller sends from now on is no request; some of it may be here already.
            self._http.protocol.set_parser(_Tunnel(self))  # type: ignore[arg-type]  # it is fed, and told of the end

    def put(self, data: bytes) -> None:
        """Write what has come, and the head before it."""
        if self._pending:
            data = self._pending + data
            self._pending = b""
        self._write(data)

    def flush(self) -> None:
        """Write the head by itself."""
        if self._pending:
            data, self._pending = self._pending, b""
            self._write(data)

    def drained(self) -> None:
        """Let the caller go on with what it sends through a tunnel."""
        if self.is_tunnel and (transport := self._http.protocol.transport) is not None:
            transport.resume_reading()

    def end(self) -> None:
        """Let the handler go on to the next request."""
        self.flush()
        self.keep_alive = not self._is_last
        self._over()

    def lose(self, why: str) -> None:
        """Remember why there will be no end."""
        self.failure = why
        self._over()

    def _over(self) -> None:
        # It may be another exchange's from now on.
        self._connection = None
        self._is_over = True
        self._wake()

    def _write(self, data: bytes) -> None:
        transport = self._http.protocol.transport
        connection = self._connection
        if transport is None or transport.is_closing():
            if connection is not None:
                connection.abort(_LEFT)
            return
        size = len(data)
        self.size += size
        # The server looks there for whether an answer has begun.
        self._http.writer.output_size += size
        transport.write(data)
        if transport.get_write_buffer_size() > _HIGH_WATER:
            if connection is not None:
                connection.pause()
            self._is_slow = True
            self._wake()

    def _wake(self) -> None:
        waiter = self._waiter
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    # -- through a tunnel ---------------------------------------------------------------------

    def send(self, data: bytes) -> None:
        """Pass on what the caller says."""
        connection, transport = self._connection, self._http.protocol.transport
        if connection is not None:
            connection.write(data)
            if connection.is_full and transport is not None:
                transport.pause_reading()

    # -- the handler's side -------------------------------------------------------------------

    async def exchange(
        self,
        connection: RelayConnection,
        head: bytes,
        body: Body,
        *,
        upgrades: bool,
        may_repeat: bool,
        background: Background,
    ) -> bool:
        """Send the request and wait until its answer is out; False when it must be sent anew.

        Args:
            may_repeat: The connection may have been at its end already, so that its loss says nothing of the request.

        Raises:
            Failed: If there is no answer, or no whole one.
            CallerGoneError: If nobody is there to take it.
        """
        assert body.sent is not None
        data = b"".join((head, *body.sent))
        if not may_repeat:
            body.forget()
        self._start(connection)
        upload: asyncio.Task[None] | None = None
        try:
            connection.send(
                self,
                data,
                method=self._http.message.method,
                is_all=body.is_all,
                upgrades=upgrades,
                silence=self._patience,
            )
            if not body.is_all:
                upload = background.spawn(self._upload(connection, body), name="upload")
            while not self._is_over:
                self._waiter = self._loop.create_future()
                await self._waiter
                if self._is_slow:
                    await self._caught_up()
        finally:
            self._leave()
            if upload is not None and not upload.done():
                upload.cancel()
                await asyncio.wait([upload])
        if self.failure is None:
            return True
        if may_repeat and not connection.has_heard and self._fault is None and body.sent is not None:
            return False
        if self.failure == _LEFT:
            raise CallerGoneError
        raise self._fault or _failed(self.failure, connection.place.host)

    def _start(self, connection: RelayConnection) -> None:
        self._is_over, self.failure = False, None
        self._connection = connection

    def _leave(self) -> None:
        """Close the connection to the far side, unless its exchange is over."""
        connection, self._connection = self._connection, None
        if connection is not None:
            # Who leaves a tunnel has said good-bye in it.
            (connection.hang_up if self.is_tunnel else connection.abort)()

    async def _caught_up(self) -> None:
        """Wait for a caller who is slow to read."""
        http = self._http
        try:
            async with asyncio.timeout(self._patience):
                await http.writer.drain()
        except TimeoutError:
            if http.protocol.transport is not None:
                http.protocol.transport.abort()
            raise CallerGoneError from None
        self._is_slow = False
        if self._connection is not None:
            self._connection.resume()

    async def _upload(self, connection: RelayConnection, body: Body) -> None:
        """Send the rest of the body as it comes."""
        try:
            while not body.is_all:
                if connection.is_full:
                    async with asyncio.timeout(self._patience):
                        await connection.wait_not_full()
                try:
                    async with asyncio.timeout(self._patience):
                        data = await body.more()
                except TimeoutError:
                    self._give_up(
                        connection, Failed(408, "body_timeout", "the body of the request came too slowly")
                    )
                    return
                if not connection.write(data, is_last=body.is_all):
                    return
        except TimeoutError:
            self._give_up(connection, _failed(SILENT, connection.place.host))
        except (RequestPayloadError, ConnectionError):
            self._give_up(connection, _no_body())

    def _give_up(self, connection: RelayConnection, fault: Failed) -> None:
        if self._connection is connection:
            self._fault = fault
            connection.abort(fault.message)

    @property
    def has_begun(self) -> bool:
        """Whether the caller has something of the answer."""
        return self.status > 0 and not self._pending

    async def break_off(self) -> None:
        """End the caller's connection so that nobody takes it for the end of an answer."""
        transport = self._http.protocol.transport
        if transport is None:
            return
        if self._goes_to_the_end:
            # Its end is that of the connection, so only a reset tells of a break.
            sock = transport.get_extra_info("socket")
            if sock is not None:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        else:
            # What came before the break is the caller's.
            transport.set_write_buffer_limits(high=0)
            with contextlib.suppress(TimeoutError, ConnectionError):
                async with asyncio.timeout(_LAST_SECONDS):
                    await self._http.writer.drain()
        transport.abort()


_LEFT: Final = "the caller has left"


def _failed(why: str, host: str) -> Failed:
    if why == SILENT:
        return Failed(504, "upstream_timeout", f"{host} did not answer in time")
    if why == LOST:
        return Failed(502, "upstream_lost", f"the connection to {host} was lost")
    return Failed(502, "bad_upstream_answer", f"{host}: {why}")


class _Tunnel:
    """Where the server puts what comes behind a request that asked for another protocol."""

    __slots__ = ("_relay",)

    def __init__(self, relay: Relay) -> None:
        self._relay = relay

    def feed_data(self, data: bytes) -> tuple[bool, bytes]:
        """Take it."""
        self._relay.send(data)
        return False, b""

    def feed_eof(self) -> None:
        """Take the end: the handler is told of it by itself."""
