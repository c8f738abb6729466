"""Connections on which somebody else's messages go through as they are.

What a relay needs and a caller of ours does not: a request whose body comes bit by bit, an answer with all of its
fields in their order, a body handed on as it stands on the wire, chunks and trailers included, and a
connection that turns into a tunnel. Who takes an answer is told of it by plain calls, at once: between the
read from one socket and the write to the other nothing waits for its turn.
"""

import asyncio
import ssl
from collections.abc import Callable
from typing import Final, Protocol

import httptools

from codex_proxy.net.connections import Connections
from codex_proxy.net.head import BadHead, Place
from codex_proxy.net.passing import SWITCHING, PassedHead, read_head
from codex_proxy.net.wheel import NEVER, Wheel
from codex_proxy.net.wire import BAD_CHUNKS, LOST, Wire, ignore

SILENT: Final = "it said nothing for too long"


class Taker(Protocol):
    """Who takes an answer. None of the calls may wait, nor fail."""

    def interim(self, head: PassedHead) -> None:
        """Take a head that comes before the answer's own, such as 100 Continue."""
        ...

    def begin(self, head: PassedHead) -> None:
        """Take the head."""
        ...

    def put(self, data: bytes) -> None:
        """Take a part of the body as it stands on the wire, or of what comes through a tunnel."""
        ...

    def flush(self) -> None:
        """Nothing more has come for now."""
        ...

    def drained(self) -> None:
        """More can be sent: the other side has taken enough of what was."""
        ...

    def end(self) -> None:
        """Take the end."""
        ...

    def lose(self, why: str) -> None:
        """Take the loss of the connection: there will be no end."""
        ...


class _Chunks:
    """What the parser of chunks calls: the bytes themselves are passed on, so only their end is told."""

    def __init__(self, connection: "RelayConnection") -> None:
        self.on_message_begin = connection.on_begin
        self.on_message_complete = connection.on_said_all


class RelayConnection(Wire):
    """One connection; it carries one exchange at a time, and may turn into a tunnel."""

    __slots__ = (
        "_loop",
        "_method",
        "_not_full",
        "_sent_all",
        "_silence",
        "_taker",
        "_upgrades",
        "_wheel",
        "deadline",
        "has_heard",
    )

    def __init__(self, pool: "Relays", place: Place) -> None:
        super().__init__(pool, place)
        self.deadline = NEVER
        self.has_heard = False
        """Whether a byte of the answer has come."""
        self._loop = pool.loop
        self._wheel: Wheel = pool.wheel
        self._taker: Taker | None = None
        # the request
        self._method = ""
        self._upgrades = False
        self._sent_all = False
        self._not_full: asyncio.Future[None] | None = None
        self._silence = NEVER

    # -- the request -----------------------------------------------------------------------

    def send(
        self, taker: Taker, data: bytes, *, method: str, is_all: bool, upgrades: bool, silence: float
    ) -> None:
        """Send a request, or the beginning of one, whose answer goes to *taker*.

        Args:
            is_all: Nothing of it is to follow.
            upgrades: It asks for another protocol, so the answer may turn the connection into a tunnel.
            silence: How many seconds the other side may say nothing, once all of the request was sent.
        """
        wire = self._wire
        if wire is None or wire.is_closing():
            taker.lose(LOST)
            return
        self._taker = taker
        self._method, self._upgrades, self._sent_all, self._silence = method, upgrades, is_all, silence
        self.has_heard = False
        self._seen = 0
        self._feed = self._feed_head
        self._wheel.enter(self)
        self._wait_on()
        wire.write(data)

    def write(self, data: bytes, *, is_last: bool = False) -> bool:
        """Send more of the request, or through the tunnel; False when nobody wants it any more."""
        wire = self._wire
        if self._taker is None or wire is None or wire.is_closing():
            return False
        if data:
            wire.write(data)
        if is_last:
            self._sent_all = True
            self._wait_on()
        return True

    @property
    def is_full(self) -> bool:
        """Whether the other side is slow to take what was sent."""
        return self._not_full is not None

    async def wait_not_full(self) -> None:
        """Wait until the other side has taken enough of what was sent, or the connection is lost."""
        if self._not_full is not None:
            await asyncio.wait([self._not_full])

    def pause_writing(self) -> None:
        """See `asyncio.BaseProtocol`."""
        self._not_full = self._loop.create_future()

    def resume_writing(self) -> None:
        """See `asyncio.BaseProtocol`."""
        waiter, self._not_full = self._not_full, None
        if waiter is not None and not waiter.done():
            waiter.set_result(None)
        if self._taker is not None:
            self._taker.drained()

    # -- the wire --------------------------------------------------------------------------

    def connection_lost(self, exc: Exception | None) -> None:
        """See `asyncio.BaseProtocol`."""
        super().connection_lost(exc)
        self.resume_writing()

    def pause(self) -> None:
        """Read nothing more for now; meanwhile nobody waits for the other side."""
        self.deadline = NEVER
        super().pause()

    def resume(self) -> None:
        """Read on."""
        was_paused = self._is_paused
        super().resume()
        if was_paused and not self._is_paused and self._taker is not None:
            self._wait_on()

    def abort(self, why: str = LOST) -> None:
        """Close at once: nothing more comes, and nothing goes out; who takes its answer is told of the loss."""
        taker = self._leave()
        self._close()
        if taker is not None:
            taker.lose(why)

    def hang_up(self) -> None:
        """Close once all that was sent has gone; nobody takes what may still come."""
        self._leave()
        self._feed = ignore
        if self._wire is not None:
            self._wire.close()
        self._pool.forget(self)

    def expire(self) -> None:
        """See `wheel.Waiting`."""
        self.deadline = NEVER
        if self._taker is not None:
            self.abort(SILENT)

    def _wait_on(self) -> None:
        if not self._sent_all:
            # It may be waiting for us.
            return
        self.deadline = deadline = self._loop.time() + self._silence
        if deadline < self._wheel.due:
            self._wheel.advance(deadline)

    def _leave(self) -> Taker | None:
        taker, self._taker = self._taker, None
        self.deadline = NEVER
        self._wheel.leave(self)
        return taker

    def _lost(self, *, is_clean: bool) -> None:
        if is_clean and self._feed in (self._feed_rest, self._feed_tunnel):
            taker = self._leave()
            self.abort()
            if taker is not None:
                taker.end()
        else:
            self.abort()

    def _done(self, *, is_clean: bool) -> None:
        taker = self._leave()
        self._feed = self._feed_idle
        self._keep_or_abort(is_clean=is_clean and self._sent_all)
        if taker is not None:
            taker.end()

    # -- the states ------------------------------------------------------------------------

    def _feed_head(self, data: bytes) -> None:
        taker = self._taker
        assert taker is not None
        self.has_heard = True
        try:
            while True:
                found = self._cut_head(data)
                if found is None:
                    return
                said, data = found
                head = read_head(said, self._method)
                if head.status >= 200 or head.status == SWITCHING:
                    break
                taker.interim(head)
                self._wait_on()
                if not data:
                    return
            if head.status == SWITCHING and not self._upgrades:
                raise BadHead("it changes to a protocol that nobody asked for")
        except BadHead as exc:
            self.abort(str(exc))
            return
        self._keeps_alive = head.keeps_alive
        taker.begin(head)
        if self._taker is not taker:
            return
        if head.status == SWITCHING:
            # Silence is what most of a conversation consists of.
            self.deadline = self._silence = NEVER
            self._feed = self._feed_tunnel
        else:
            self._begin_body(head.length)
        if data:
            self._feed(data)
        else:
            taker.flush()

    def _begin_body(self, length: int) -> None:
        super()._begin_body(length)
        if self._taker is not None:
            self._wait_on()

    def _chunks(self) -> object:
        return _Chunks(self)

    def _feed_length(self, data: bytes) -> None:
        taker = self._taker
        assert taker is not None
        left = self._left - len(data)
        if left > 0:
            self._left = left
            self._wait_on()
            taker.put(data)
        else:
            taker.put(data if left == 0 else data[:left])
            self._done(is_clean=left == 0)

    def _feed_rest(self, data: bytes) -> None:
        taker = self._taker
        assert taker is not None
        self._wait_on()
        taker.put(data)

    def _feed_tunnel(self, data: bytes) -> None:
        taker = self._taker
        assert taker is not None
        taker.put(data)

    def _feed_chunks(self, data: bytes) -> None:
        taker = self._taker
        assert taker is not None
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError:
            # Nothing of what cannot be read goes on: who reads it otherwise would see another answer in it.
            self.abort(BAD_CHUNKS)
            return
        if not self._said_all:
            self._keep_tail(data)
            self._wait_on()
            taker.put(data)
            return
        if not self._ends_with(data):
            self.abort("something follows the end of its answer")
            return
        taker.put(data)
        self._done(is_clean=True)


class Relays(Connections[RelayConnection]):
    """The connections of a relay."""

    def __init__(self, tls: ssl.SSLContext, idle_seconds: Callable[[], float]) -> None:
        super().__init__(tls, idle_seconds)
        self.wheel = self._wheel

    def make(self, place: Place) -> RelayConnection:
        """See `Connections.make`."""
        return RelayConnection(self, place)
