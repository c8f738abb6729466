"""Connections to other machines: opened, kept while they carry nothing, given out again, closed.

What a connection says is none of its business: that is the protocol's, which is made by whoever has the pool.
"""

import abc
import asyncio
import socket
import ssl
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Generic, TypeVar

import aiohappyeyeballs

from codex_proxy.addresses import why_not
from codex_proxy.net.answer import READ_SIZE, NetKind, not_allowed, not_reached
from codex_proxy.net.head import Place
from codex_proxy.net.wheel import NEVER, Wheel

MAX_IDLE = 128
"""How many connections may carry nothing; past it the one that has done so longest is closed."""

STALE_SECONDS = 1.0
"""How long a connection must have been idle for its loss to mean that the other side had closed it just then.
None closes sooner; one that is lost so soon after its last answer is lost because of what was asked."""

# A resolver's answer serves those who come right after.
_NAMES_SECONDS = 10.0

# How long an address may take before the next one is tried beside it (RFC 8305).
_NEXT_ADDRESS_SECONDS = 0.25

# How long the loop may take to close sockets that are of no more use.
_CLOSE_SECONDS = 5.0

AddrInfo = tuple[int, int, int, str, Any]
Resolve = Callable[[str, int], Awaitable[list[AddrInfo]]]


class Member(asyncio.BufferedProtocol, abc.ABC):
    """What the pool needs of a connection."""

    __slots__ = ("idle_since", "place")

    def __init__(self, place: Place) -> None:
        self.place = place
        self.idle_since = 0.0

    @property
    @abc.abstractmethod
    def is_open(self) -> bool:
        """Whether a request can go out on it."""

    @abc.abstractmethod
    def abort(self) -> None:
        """Close at once, and have the pool forget it."""


C = TypeVar("C", bound=Member)


class _Names:
    """The addresses of a place, as a resolver said."""

    __slots__ = ("fresh_until", "infos", "lookup")

    def __init__(self) -> None:
        self.infos: list[AddrInfo] = []
        self.fresh_until = 0.0
        self.lookup: asyncio.Future[None] | None = None


class Connections(abc.ABC, Generic[C]):
    """The connections of one kind, to any number of places.

    Args:
        idle_seconds: How long one is kept that carries nothing.
    """

    def __init__(self, tls: ssl.SSLContext, idle_seconds: Callable[[], float]) -> None:
        self.view = memoryview(bytearray(READ_SIZE))
        self.resolve: Resolve = resolve
        self.deadline = NEVER
        """When the oldest idle connection has to go."""
        self._tls = tls
        self._idle_seconds = idle_seconds
        self._loop: asyncio.AbstractEventLoop | None = None
        self._wheel = Wheel()
        self._names: dict[Place, _Names] = {}
        self._all: set[C] = set()
        self._idle: dict[C, None] = {}
        """The one that has been idle longest comes first."""
        self._free: dict[Place, list[C]] = {}
        """The same, by place; the last one was used last."""
        self._emptied: asyncio.Future[None] | None = None

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        """The loop that all of it runs on."""
        if self._loop is None:
            self._loop = asyncio.get_running_loop()
        return self._loop

    @abc.abstractmethod
    def make(self, place: Place) -> C:
        """Return the protocol of a new connection."""

    async def aclose(self) -> None:
        """Close every connection."""
        for connection in list(self._all):
            connection.abort()
        self._wheel.stop()
        if self._all:
            # The loop tells when the sockets are closed.
            self._emptied = self.loop.create_future()
            await asyncio.wait([self._emptied], timeout=_CLOSE_SECONDS)
            self._emptied = None

    def statistics(self) -> dict[str, int]:
        """Return how many connections there are, and how many of them carry nothing."""
        return {"open": len(self._all), "idle": len(self._idle)}

    # -- connections that are there --------------------------------------------------------

    def entered(self, connection: C) -> None:
        """Know *connection* from now on."""
        self._all.add(connection)

    def left(self, connection: C) -> None:
        """Know it no longer: its socket is closed."""
        self._all.discard(connection)
        if not self._all and self._emptied is not None and not self._emptied.done():
            self._emptied.set_result(None)

    def put(self, connection: C) -> None:
        """Keep *connection* for another exchange."""
        connection.idle_since = now = self.loop.time()
        self._idle[connection] = None
        self._free.setdefault(connection.place, []).append(connection)
        if len(self._idle) > MAX_IDLE:
            next(iter(self._idle)).abort()
        if self.deadline == NEVER:
            self._watch(now + self._idle_seconds())

    def forget(self, connection: C) -> None:
        """Give *connection* to nobody."""
        if connection in self._idle:
            del self._idle[connection]
            free = self._free[connection.place]
            free.remove(connection)
            if not free:
                del self._free[connection.place]

    def expire(self) -> None:
        """Close what has been idle for too long."""
        self.deadline = NEVER
        seconds = self._idle_seconds()
        before = self.loop.time() - seconds
        while self._idle:
            oldest = next(iter(self._idle))
            if oldest.idle_since > before:
                self._watch(oldest.idle_since + seconds)
                return
            oldest.abort()
        self._wheel.leave(self)

    def _watch(self, deadline: float) -> None:
        self.deadline = deadline
        self._wheel.enter(self)
        if deadline < self._wheel.due:
            self._wheel.advance(deadline)

    def take(self, place: Place) -> C | None:
        before = self.loop.time() - self._idle_seconds()
        while free := self._free.get(place):
            connection = free[-1]
            self.forget(connection)
            if connection.idle_since > before and connection.is_open:
                return connection
            connection.abort()
        return None

    # -- new connections -------------------------------------------------------------------

    async def connect(self, place: Place, seconds: float, *, is_guarded: bool = False) -> C:
        """Open a connection: the name, TCP and TLS, all within *seconds*.

        Args:
            is_guarded: Whether addresses are left alone that nothing is to be sent to; see `addresses`.
        """
        try:
            async with asyncio.timeout(seconds):
                try:
                    infos = await self._look_up(place)
                except OSError as exc:
                    raise not_reached(NetKind.DNS, place.host) from exc
                if is_guarded:
                    infos = _allowed(place, infos)
                sock = await aiohappyeyeballs.start_connection(
                    infos, happy_eyeballs_delay=_NEXT_ADDRESS_SECONDS, interleave=1, loop=self.loop
                )
                _, connection = await self.loop.create_connection(
                    lambda: self.make(place),
                    sock=sock,
                    ssl=self._tls if place.is_tls else None,
                    server_hostname=place.host.rstrip(".") if place.is_tls else None,
                    ssl_handshake_timeout=seconds + 1.0 if place.is_tls else None,
                )
                return connection
        except TimeoutError as exc:
            raise not_reached(NetKind.CONNECT, place.host) from exc
        except ssl.SSLError as exc:
            raise not_reached(NetKind.TLS, place.host) from exc
        except (OSError, ValueError) as exc:
            self._names.pop(place, None)
            raise not_reached(NetKind.CONNECT, place.host) from exc

    async def _look_up(self, place: Place) -> list[AddrInfo]:
        """Return the addresses of *place*; many who ask at once ask the resolver once."""
        names = self._names.get(place)
        if names is None:
            names = self._names[place] = _Names()
        while not names.infos or names.fresh_until <= self.loop.time():
            if names.lookup is not None:
                await asyncio.wait([names.lookup])
                continue
            names.lookup = self.loop.create_future()
            try:
                names.infos = await self.resolve(place.host, place.port)
                names.fresh_until = self.loop.time() + _NAMES_SECONDS
            finally:
                names.lookup.set_result(None)
                names.lookup = None
            if not names.infos:
                raise OSError("no address")
        return names.infos


def _allowed(place: Place, infos: list[AddrInfo]) -> list[AddrInfo]:
    """Return the addresses that something may be sent to.

    Raises:
        NetError: If there is none.
    """
    why = {str(info[4][0]): why_not(str(info[4][0])) for info in infos}
    allowed = [info for info in infos if not why[str(info[4][0])]]
    if not allowed:
        raise not_allowed(place.host, next(iter(why.values())))
    return allowed


async def resolve(host: str, port: int) -> list[AddrInfo]:
    """Return the addresses of *host* in the resolver's order; a number is its own.

    Raises:
        OSError: If it has none.
    """
    infos: Sequence[AddrInfo]
    try:
        infos = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST)
    except socket.gaierror:
        loop = asyncio.get_running_loop()
        infos = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_ADDRCONFIG)
    return list(infos)
