"""Our own transport, for the calls that carry everything: a protocol on the loop, and a pool of connections.

One connection carries one exchange at a time. What has arrived belongs to its answer, so a connection is free
as soon as the other side has said all of it, and only then; whatever else befalls it closes it:
bytes that nobody asked for, a request that was not sent to its end, an answer that nobody reads to its end.
"""

import asyncio
import ssl
import time
from collections.abc import Callable, Mapping
from typing import Final

import httptools

from codex_proxy.compression import CODINGS
from codex_proxy.net.answer import (
    LARGE_BODY_SIZE,
    READ_SIZE,
    Answer,
    Deadlines,
    NetError,
    NetKind,
    not_reached,
)
from codex_proxy.net.connections import STALE_SECONDS, Connections
from codex_proxy.net.decoding import BadCoding, Decoder
from codex_proxy.net.head import (
    Address,
    BadHead,
    Place,
    address_of,
    encode_request,
    parse_head,
)
from codex_proxy.net.wheel import NEVER, SHORT_SECONDS, Wheel
from codex_proxy.net.wire import BAD_CHUNKS, LOST, Wire

HIGH_WATER: Final = 64 * 1024
"""When so much is unread, the other side has to wait; it goes on at half of it."""

# A body so small is copied behind its head: one write, one packet, no waiting for an acknowledgement.
_JOINED_SIZE = 64 * 1024

# What of a large body is handed over at a time.
_PIECE_SIZE = 128 * 1024

# What may come in chunks without a byte of a body: extensions and trailers, which nobody reads.
_MAX_BARREN_SIZE = 64 * 1024

_MAX_ADDRESSES = 256
"""How many URLs are remembered taken apart."""


class NativeAnswer(Answer):
    """An exchange, from its request on: first there is no head, then no end."""

    __slots__ = (
        "_connection",
        "_decoder",
        "_failure",
        "_has_ended",
        "_idle",
        "_loop",
        "_parts",
        "_size",
        "_timer",
        "_waiter",
        "_wheel",
        "deadline",
        "has_heard",
        "method",
    )

    def __init__(self, loop: asyncio.AbstractEventLoop, wheel: Wheel, method: str, idle: float) -> None:
        self.status = 0
        self.headers: Mapping[str, str] = {}
        self.head_seconds = None
        self.method = method
        self.has_heard = False
        """Whether a byte of it has come."""
        self.deadline = NEVER
        self._loop = loop
        self._wheel = wheel
        self._idle = idle
        self._connection: _Connection | None = None
        """Until the other side has said all."""
        self._parts: list[bytes] = []
        self._size = 0
        self._has_ended = False
        self._failure: str | None = None
        self._waiter: asyncio.Future[bool] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._decoder: Decoder | None = None

    # -- whoever reads it ------------------------------------------------------------------

    async def wait_head(self, within: float) -> bool:
        """Wait for the head; False when it did not come in time.

        Raises:
            NetError: If the connection was lost.
        """
        if not self.status and self._failure is None:
            waiter = self._arm(within)
            try:
                await waiter
            finally:
                self._disarm()
        if self.status:
            return True
        if self._failure is not None:
            raise NetError(NetKind.CUT, self._failure)
        return False

    async def read(self, within: float | None = None) -> bytes:
        """See `Answer.read`."""
        data = self.read_nowait()
        if data is not None:
            return data
        left = wait = self._idle if within is None else within
        until = self._loop.time() + wait if self._decoder is not None else NEVER
        while True:
            waiter = self._arm(left)
            try:
                in_time = await waiter
            finally:
                self._disarm()
            data = self.read_nowait()
            if data is not None:
                return data
            if not in_time:
                raise NetError(NetKind.TIMEOUT, f"no byte for {wait:g} s")
            # What came is compressed, and no byte of the body yet.
            left = until - self._loop.time()

    def read_nowait(self) -> bytes | None:
        """See `Answer.read_nowait`."""
        if self._decoder is not None:
            return self._decoded(self._decoder)
        if self._parts:
            return self._take()
        if self._has_ended:
            return b""
        if self._failure is not None:
            raise NetError(NetKind.CUT, self._failure)
        return None

    def close(self) -> None:
        """See `Answer.close`."""
        if self._connection is not None:
            self._connection.abort()
        if self._parts or self._decoder is not None:
            # What has come and was not read is no end.
            self._parts.clear()
            self._size = 0
            self._decoder = None
            self._has_ended = False
            self._failure = self._failure or LOST

    def release(self) -> None:
        """See `Answer.release`."""
        self.close()

    def _take(self) -> bytes:
        parts = self._parts
        if len(parts) == 1:
            data = parts.pop()
        elif self._size <= READ_SIZE:
            data = b"".join(parts)
            parts.clear()
        else:
            # None of them is larger than a read.
            count = size = 0
            while size + len(parts[count]) <= READ_SIZE:
                size += len(parts[count])
                count += 1
            data = b"".join(parts[:count])
            del parts[:count]
        self._size -= len(data)
        if self._connection is not None and self._size <= HIGH_WATER // 2:
            self._connection.resume()
        return data

    def _decoded(self, decoder: Decoder) -> bytes | None:
        try:
            while True:
                data = decoder.get(READ_SIZE)
                if data:
                    return data
                if not self._parts:
                    break
                decoder.put(self._take())
            if self._has_ended:
                decoder.finish()
                return b""
        except BadCoding as exc:
            self._failure = str(exc)
            self.close()
        if self._failure is not None:
            raise NetError(NetKind.CUT, self._failure)
        return None

    def _arm(self, seconds: float) -> asyncio.Future[bool]:
        """Return what is done when something has come (True) or *seconds* are over (False)."""
        if seconds < SHORT_SECONDS:
            self._timer = self._loop.call_later(max(0.0, seconds), self.expire)
        else:
            self.deadline = deadline = self._loop.time() + seconds
            if deadline < self._wheel.due:
                self._wheel.advance(deadline)
        waiter = self._waiter = self._loop.create_future()
        return waiter

    def _disarm(self) -> None:
        self._waiter = None
        self.deadline = NEVER
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    # -- whoever fills it ------------------------------------------------------------------

    def attach(self, connection: "_Connection") -> None:
        """Begin on *connection*."""
        self._connection = connection
        self._wheel.enter(self)

    def begin(self, status: int, headers: Mapping[str, str], *, has_body: bool) -> None:
        """Take the head."""
        self.status = status
        self.headers = headers
        coding = headers.get("content-encoding")
        if coding is not None and has_body and coding.lower() in CODINGS:
            self._decoder = Decoder(coding.lower())
        self._wake()

    def put(self, data: bytes) -> None:
        """Take a part of the body, no more than a read takes."""
        self._parts.append(data)
        self._size += len(data)
        waiter = self._waiter
        if waiter is not None and not waiter.done():
            waiter.set_result(True)
        if self._size > HIGH_WATER and self._connection is not None:
            self._connection.pause()

    def end(self) -> None:
        """Take the end; the connection is another's."""
        self._has_ended = True
        self._detach()

    def lose(self, failure: str) -> None:
        """Take the loss of the connection."""
        self._failure = self._failure or failure
        self._detach()

    def expire(self) -> None:
        """End the wait for something that has not come."""
        self.deadline = NEVER
        waiter = self._waiter
        if waiter is not None and not waiter.done():
            waiter.set_result(False)

    def _detach(self) -> None:
        self._connection = None
        self._wheel.leave(self)
        self._wake()

    def _wake(self) -> None:
        waiter = self._waiter
        if waiter is not None and not waiter.done():
            waiter.set_result(True)


class _Connection(Wire):
    """One connection, whose answers are a caller's of ours."""

    __slots__ = ("_answer", "_barren", "_is_full", "_parts", "_unsent")

    def __init__(self, transport: "NativeTransport", place: Place) -> None:
        super().__init__(transport, place)
        self._answer: NativeAnswer | None = None
        # the request
        self._unsent: memoryview | None = None
        self._is_full = False
        # the chunks of the answer
        self._parts: list[bytes] = []
        self._barren = 0

    # -- the request -----------------------------------------------------------------------

    def send(self, answer: NativeAnswer, head: bytes, body: bytes | None) -> None:
        """Send a request whose answer goes to *answer*."""
        wire = self._wire
        if wire is None or wire.is_closing():
            answer.lose(LOST)
            return
        self._answer = answer
        answer.attach(self)
        self._feed = self._feed_head
        if not body:
            wire.write(head)
        elif len(body) <= _JOINED_SIZE:
            wire.write(head + body)
        elif len(body) <= LARGE_BODY_SIZE:
            wire.writelines((head, body))
        else:
            self._unsent = memoryview(body)[_JOINED_SIZE:]
            wire.write(head + body[:_JOINED_SIZE])
            self._send_piece()

    def _send_piece(self) -> None:
        """Hand over a piece of a large body; others have their turn before the next one."""
        unsent, wire = self._unsent, self._wire
        if unsent is None or wire is None or self._is_full or wire.is_closing():
            return
        self._unsent = unsent[_PIECE_SIZE:] if len(unsent) > _PIECE_SIZE else None
        wire.write(unsent[:_PIECE_SIZE])
        if self._unsent is not None and not self._is_full:
            self._pool.loop.call_soon(self._send_piece)

    def pause_writing(self) -> None:
        """See `asyncio.BaseProtocol`."""
        self._is_full = True

    def resume_writing(self) -> None:
        """See `asyncio.BaseProtocol`."""
        self._is_full = False
        self._send_piece()

    # -- the end ---------------------------------------------------------------------------

    def abort(self, why: str = LOST) -> None:
        """Close at once: nothing more comes, and nothing goes out; its answer, if it has one, is lost."""
        answer, self._answer, self._unsent = self._answer, None, None
        self._close()
        if answer is not None:
            answer.lose(why)

    def _lost(self, *, is_clean: bool) -> None:
        answer = self._answer
        if answer is not None and is_clean and self._feed == self._feed_rest:
            self._answer = None
            answer.end()
        self.abort()

    def _done(self, *, is_clean: bool) -> None:
        answer = self._answer
        assert answer is not None
        self._answer = None
        self._feed = self._feed_idle
        self._keep_or_abort(is_clean=is_clean and self._unsent is None)
        answer.end()

    # -- the states ------------------------------------------------------------------------

    def _feed_head(self, data: bytes) -> None:
        answer = self._answer
        assert answer is not None
        answer.has_heard = True
        try:
            while True:
                found = self._cut_head(data)
                if found is None:
                    return
                said, data = found
                head = parse_head(said, answer.method)
                if head.status >= 200:
                    break
                if head.status == 101:
                    raise BadHead("it changes to a protocol that nobody asked for")
                if not data:
                    return
        except BadHead as exc:
            self.abort(str(exc))
            return
        self._seen = 0
        self._keeps_alive = head.keeps_alive
        if head.status >= 400:
            # It does not want the rest.
            unsent, self._unsent = self._unsent, None
            self._keeps_alive = head.keeps_alive and unsent is None
        answer.begin(head.status, head.headers, has_body=head.length != 0)
        self._begin_body(head.length)
        if data:
            self._feed(data)

    def _begin_body(self, length: int) -> None:
        self._barren = 0
        super()._begin_body(length)

    def _chunks(self) -> object:
        return _Chunks(self, self._parts)

    def _feed_length(self, data: bytes) -> None:
        answer = self._answer
        assert answer is not None
        left = self._left - len(data)
        if left > 0:
            self._left = left
            answer.put(data)
        else:
            answer.put(data if left == 0 else data[:left])
            self._done(is_clean=left == 0)

    def _feed_rest(self, data: bytes) -> None:
        answer = self._answer
        assert answer is not None
        answer.put(data)

    def _feed_chunks(self, data: bytes) -> None:
        answer, parts = self._answer, self._parts
        assert answer is not None
        is_valid = True
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError:
            is_valid = False
        if parts:
            self._barren = 0
            body = parts[0] if len(parts) == 1 else b"".join(parts)
            parts.clear()
            answer.put(body)
        else:
            self._barren += len(data)
        if self._said_all:
            self._done(is_clean=is_valid and self._ends_with(data))
        elif not is_valid:
            self.abort(BAD_CHUNKS)
        elif self._barren > _MAX_BARREN_SIZE:
            self.abort("the chunks of its answer hold nothing")
        else:
            self._keep_tail(data)


class _Chunks:
    """What the parser of chunks calls; trailers are not among it, and so never kept."""

    def __init__(self, connection: _Connection, parts: list[bytes]) -> None:
        self.on_body = parts.append
        self.on_message_begin = connection.on_begin
        self.on_message_complete = connection.on_said_all


class NativeTransport(Connections[_Connection]):
    """Calls without a proxy, on connections that are kept while the other side keeps them."""

    def __init__(self, tls: ssl.SSLContext, idle_seconds: Callable[[], float]) -> None:
        super().__init__(tls, idle_seconds)
        self._addresses: dict[str, Address] = {}

    def make(self, place: Place) -> _Connection:
        """See `Connections.make`."""
        return _Connection(self, place)

    async def open(
        self,
        method: str,
        url: str,
        *,
        headers: Mapping[str, str],
        body: bytes | None,
        deadlines: Deadlines,
        proxy: str,
        may_repeat: bool,
        is_guarded: bool,
    ) -> Answer:
        """See `Outbound.open`."""
        try:
            address = self._addresses.get(url) or self._take_apart(url)
            head = encode_request(method, address, headers, body)
        except ValueError as exc:
            raise not_reached(NetKind.CONNECT, _host_in(url)) from exc
        place = address.place
        if may_repeat or method in _IDEMPOTENT:
            connection = self.take(place)
            if connection is not None:
                may_be_stale = self.loop.time() - connection.idle_since >= STALE_SECONDS
                answer = await self._ask(connection, method, head, body, deadlines, may_be_stale=may_be_stale)
                if answer is not None:
                    return answer
        # A request that must not be sent twice never meets a connection that the other side is just closing.
        connection = await self.connect(place, deadlines.connect, is_guarded=is_guarded)
        # The loop's own clock stands still between two of its turns.
        connected = time.monotonic()
        answer = await self._ask(connection, method, head, body, deadlines, may_be_stale=False)
        assert answer is not None
        answer.head_seconds = time.monotonic() - connected
        return answer

    async def _ask(
        self,
        connection: _Connection,
        method: str,
        head: bytes,
        body: bytes | None,
        deadlines: Deadlines,
        *,
        may_be_stale: bool,
    ) -> Answer | None:
        """Send a request; None when it has to be sent again: the connection was at its end already."""
        answer = NativeAnswer(self.loop, self._wheel, method, deadlines.idle)
        host = connection.place.host
        try:
            connection.send(answer, head, body)
            in_time = await answer.wait_head(deadlines.first_byte)
        except NetError as exc:
            if may_be_stale and not answer.has_heard:
                return None
            reason = str(exc)
            words = f"the connection to {host} was lost" if reason == LOST else f"{host}: {reason}"
            raise NetError(exc.kind, words) from exc
        except BaseException:
            answer.close()
            raise
        if not in_time:
            answer.close()
            raise NetError(NetKind.TIMEOUT, f"no answer from {host} in time")
        return answer

    def _take_apart(self, url: str) -> Address:
        if len(self._addresses) >= _MAX_ADDRESSES:
            self._addresses.clear()
        address = self._addresses[url] = address_of(url)
        return address


_IDEMPOTENT = frozenset({"GET", "HEAD", "OPTIONS", "TRACE", "PUT", "DELETE"})


def _host_in(url: str) -> str:
    try:
        return address_of(url).place.host
    except ValueError:
        return ""
