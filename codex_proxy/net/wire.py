"""What every connection of ours does with bytes that come: heads are cut off them, bodies end where they say they do.

Who takes an answer, and in what form, is the business of the two kinds there are: `native` and `relaying`.
"""

import abc
import asyncio
from collections.abc import Callable
from typing import Any, Final, cast

import httptools

from codex_proxy.net.answer import MAX_HEAD_SIZE
from codex_proxy.net.connections import Connections, Member
from codex_proxy.net.head import CHUNKED, END, TO_THE_END, BadHead, Place, check_begun

LOST: Final = "the connection was lost"

BAD_CHUNKS: Final = "the chunks of its answer are none"

# To the parser of chunks every answer looks like this: the head has been read already.
_CHUNKED_HEAD = b"HTTP/1.1 200 \r\ntransfer-encoding: chunked\r\n\r\n"


class SaidMoreError(Exception):
    """There is something behind the end."""


class Wire(Member):
    """One connection; it carries one exchange at a time. What it does with bytes that come is its state, `_feed`."""

    __slots__ = (
        "_feed",
        "_head",
        "_is_paused",
        "_keeps_alive",
        "_left",
        "_parser",
        "_pool",
        "_said_all",
        "_seen",
        "_tail",
        "_view",
        "_wire",
    )

    def __init__(self, pool: Connections[Any], place: Place) -> None:
        super().__init__(place)
        self._pool = pool
        self._view = pool.view
        self._wire: asyncio.Transport | None = None
        self._feed: Callable[[bytes], None] = self._feed_idle
        self._is_paused = False
        # the head of the answer
        self._head = b""
        self._seen = 0
        """How large all heads of the exchange were."""
        self._keeps_alive = False
        # its body
        self._left = 0
        self._parser: Any = None
        self._tail = b""
        self._said_all = False

    @property
    def is_open(self) -> bool:
        """Whether a request can go out on it."""
        return self._wire is not None and not self._wire.is_closing()

    # -- what the loop calls ---------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See `asyncio.BaseProtocol`."""
        # uvloop's transports are none by inheritance.
        self._wire = cast(asyncio.Transport, transport)
        self._pool.entered(self)

    def get_buffer(self, sizehint: int) -> memoryview:
        """Lend the buffer that all connections share: it is empty again before the next one reads."""
        return self._view

    def buffer_updated(self, nbytes: int) -> None:
        """Take what has come."""
        self._feed(self._view[:nbytes].tobytes())

    def eof_received(self) -> None:
        """Take the end of the connection: half of one is none."""
        self._lost(is_clean=True)

    def connection_lost(self, exc: Exception | None) -> None:
        """See `asyncio.BaseProtocol`."""
        self._lost(is_clean=exc is None)
        self._wire = self._parser = None
        self._pool.left(self)

    def pause(self) -> None:
        """Read nothing more for now."""
        if not self._is_paused and self._wire is not None and not self._wire.is_closing():
            self._is_paused = True
            self._wire.pause_reading()

    def resume(self) -> None:
        """Read on."""
        if self._is_paused and self._wire is not None and not self._wire.is_closing():
            self._is_paused = False
            self._wire.resume_reading()

    # -- the end ---------------------------------------------------------------------------

    @abc.abstractmethod
    def _lost(self, *, is_clean: bool) -> None:
        """Take the end of the connection."""

    @abc.abstractmethod
    def _done(self, *, is_clean: bool) -> None:
        """End the exchange: the other side has said all."""

    def _close(self) -> None:
        """Have nothing more come nor go out."""
        self._feed = ignore
        if self._wire is not None:
            self._wire.abort()
        self._pool.forget(self)

    def _keep_or_abort(self, *, is_clean: bool) -> None:
        """Keep it for another exchange, if both sides have said all of this one and no more."""
        wire = self._wire
        if (
            is_clean
            and self._keeps_alive
            and wire is not None
            and not wire.is_closing()
            and not wire.get_write_buffer_size()
        ):
            self.resume()
            self._pool.put(self)
        else:
            self.abort()

    # -- the states ------------------------------------------------------------------------

    def _feed_idle(self, data: bytes) -> None:
        # Nobody asked for it, and whoever asks next must not get it.
        self.abort()

    def _cut_head(self, data: bytes) -> tuple[bytes, bytes] | None:
        """Return a head and what follows it; None as long as it is not whole.

        Raises:
            BadHead: If it is none, or too large.
        """
        start = max(0, len(self._head) - len(END) + 1)
        data = self._head + data if self._head else data
        end = data.find(END, start)
        if end < 0:
            check_begun(data, len(self._head))
            self._head = data
            return None
        self._seen += end + len(END)
        if self._seen > MAX_HEAD_SIZE:
            raise BadHead(f"the head of its answer is larger than {MAX_HEAD_SIZE} bytes")
        self._head = b""
        return data[:end], data[end + len(END) :]

    def _begin_body(self, length: int) -> None:
        if length == CHUNKED:
            if self._parser is None:
                self._parser = httptools.HttpResponseParser(self._chunks())
            self._tail = b""
            self._said_all = False
            self._parser.feed_data(_CHUNKED_HEAD)
            self._feed = self._feed_chunks
        elif length == TO_THE_END:
            self._feed = self._feed_rest
        elif length:
            self._left = length
            self._feed = self._feed_length
        else:
            # What comes behind it in the same read finds the connection idle, and closes it.
            self._done(is_clean=True)

    @abc.abstractmethod
    def _chunks(self) -> object:
        """Return what the parser of chunks calls."""

    @abc.abstractmethod
    def _feed_length(self, data: bytes) -> None:
        """Take of a body whose length is known."""

    @abc.abstractmethod
    def _feed_rest(self, data: bytes) -> None:
        """Take of a body that ends with the connection."""

    @abc.abstractmethod
    def _feed_chunks(self, data: bytes) -> None:
        """Take of a body in chunks."""

    def on_said_all(self) -> None:
        """Note that the last chunk and the trailers are over."""
        self._said_all = True

    def on_begin(self) -> None:
        """Stop the parser at a message behind the first: nobody asked for it."""
        if self._said_all:
            raise SaidMoreError

    def _keep_tail(self, data: bytes) -> None:
        """Remember how chunks end."""
        self._tail = data[-5:] if len(data) >= 5 else (self._tail + data)[-5:]

    def _ends_with(self, data: bytes) -> bool:
        """Tell whether chunks end exactly with *data*: an end is one only when nothing follows, and an empty line more would go unnoticed."""
        tail = (self._tail + data)[-5:]
        return tail[1:] == END and tail[:1] not in (b"\r", b"\n")


def ignore(_: bytes) -> None:
    """Do nothing: take what comes on a connection that is being closed."""
