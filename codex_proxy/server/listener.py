"""The sockets that callers reach us by: opened or taken over, closed to newcomers, closed altogether."""

import asyncio
import contextlib
import errno
import logging
import os
import socket
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aiohttp import web

from codex_proxy.server.app import SERVER_OPTIONS
from codex_proxy.server.front import Front, InWork

logger = logging.getLogger(__name__)

# What a handler may still take when everything closes.
_LAST_SECONDS = 1.0

_FLUSH_POLL_SECONDS = 0.01
_LEAVE_POLL_SECONDS = 0.05

# How many newcomers the kernel holds for us, as many as it lets us have: while one process hands
# over to the next nobody takes them in, and one too many would wait for a second.
_BACKLOG = 4096


@dataclass(slots=True)
class _Place:
    """One application on the sockets that lead to it."""

    runner: web.ServerRunner
    in_work: InWork
    sockets: list[socket.socket] = field(default_factory=list)
    sites: list[web.BaseSite] = field(default_factory=list)
    """Empty while nobody is taken in."""
    path: Path | None = None
    inode: int = 0

    async def open(self) -> None:
        """Take newcomers in."""
        for sock in self.sockets:
            site = _Site(self.runner, sock)
            self.sites.append(site)
            await site.start()

    async def close_doors(self) -> None:
        """Leave newcomers where they are: to the kernel, for as long as somebody has the sockets."""
        loop = asyncio.get_running_loop()
        if isinstance(loop, asyncio.SelectorEventLoop):
            # It makes a connection in two steps, and fails in the second when its server is closed.
            for site in self.sites:
                for listening in getattr(site._server, "sockets", ()):
                    loop.remove_reader(listening.fileno())
        # A connection that was taken in this very moment gets to its handler first.
        for _ in range(3):
            await asyncio.sleep(0)
        while self.sites:
            await self.sites.pop().stop()


class _Site(web.BaseSite):
    """Serves an open socket of either family; the socket outlives it."""

    def __init__(self, runner: web.ServerRunner, sock: socket.socket) -> None:
        super().__init__(runner, backlog=_BACKLOG)
        self._sock = sock

    @property
    def name(self) -> str:
        return str(self._sock.getsockname())

    async def start(self) -> None:
        await super().start()
        loop = asyncio.get_running_loop()
        server = self._runner.server
        assert server is not None
        # Closing the server closes what it was given.
        own = self._sock.dup()
        if own.family == socket.AF_UNIX:
            options: dict[str, Any] = {}
            if sys.version_info >= (3, 13) and isinstance(loop, asyncio.SelectorEventLoop):
                # Its path may be the next process's by then.
                options["cleanup_socket"] = False
            self._server = await loop.create_unix_server(server, sock=own, backlog=self._backlog, **options)
        else:
            self._server = await loop.create_server(server, sock=own, backlog=self._backlog)


class Listener:
    """Serves applications over TCP and Unix sockets."""

    def __init__(self) -> None:
        self._places: list[_Place] = []
        # Closed with the last bytes of an answer still in them, perhaps.
        self._closing: list[asyncio.Transport] = []

    async def open_port(self, app: Front, host: str | None, port: int) -> int:
        """Serve *app* on a TCP port (0: a free one; host None: every interface); return the port.

        Raises:
            OSError: If the port cannot be opened.
        """
        sockets = await open_sockets(host, port)
        await self.serve(app, sockets)
        return int(sockets[0].getsockname()[1])

    async def serve(self, app: Front, sockets: Sequence[socket.socket]) -> None:
        """Serve *app* on sockets that are open."""
        place = await self._run(app)
        place.sockets += sockets
        await place.open()

    async def is_taken(self, path: Path) -> bool:
        """Tell whether somebody listens on the socket at *path*."""
        return await asyncio.to_thread(_is_in_use, path)

    async def open_unix(self, app: Front, path: Path) -> bool:
        """Serve *app* on a socket that only this user can open; False, with a warning, if that fails."""
        if await asyncio.to_thread(_is_in_use, path):
            logger.warning("control socket is in use by another daemon path=%s", path)
            return False
        try:
            sock = _bind_unix(path)
        except OSError as exc:
            logger.warning("no control socket path=%s reason=%s", path, exc.strerror or exc)
            return False
        await self.serve_unix(app, path, sock)
        return True

    async def serve_unix(self, app: Front, path: Path, sock: socket.socket) -> None:
        """Serve *app* on a Unix socket that is open at *path*."""
        place = await self._run(app)
        place.sockets.append(sock)
        place.path, place.inode = path, _inode(path)
        await place.open()

    async def _run(self, app: Front) -> _Place:
        runner = web.ServerRunner(app.server(**SERVER_OPTIONS), shutdown_timeout=_LAST_SECONDS)
        await runner.setup()
        place = _Place(runner, app.in_work)
        self._places.append(place)
        return place

    @property
    def in_work(self) -> int:
        """How many requests are being served."""
        return sum(len(place.in_work) for place in self._places)

    @property
    def ports(self) -> list[socket.socket]:
        """The sockets that clients connect to."""
        return [sock for place in self._places if place.path is None for sock in place.sockets]

    @property
    def control(self) -> socket.socket | None:
        """The socket that commands connect to."""
        return next((sock for place in self._places if place.path for sock in place.sockets), None)

    # -- handing over ---------------------------------------------------------------------

    async def pause(self) -> None:
        """Leave newcomers to the kernel's queue, until `resume` or whoever else has the sockets."""
        for place in self._places:
            await place.close_doors()

    async def resume(self) -> None:
        """Take in those who waited."""
        for place in self._places:
            if not place.sites:
                await place.open()

    async def retire(self) -> None:
        """Leave the sockets to another process; each connection has one more answer, a WebSocket its end.

        An idle connection stays for now: a request may be on its way to it.
        """
        await self.pause()
        for place in self._places:
            place.path = None
            _close(place)
            place.in_work.retire()

    async def wait_left(self, patience: float) -> None:
        """Wait until all connections have gone, or, after *patience* seconds, until no request is in work."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + patience
        while any(self._transports()) and (self.in_work or loop.time() < deadline):  # noqa: ASYNC110 -- nobody tells of the last one
            await asyncio.sleep(_LEAVE_POLL_SECONDS)

    # -- the end --------------------------------------------------------------------------

    async def refuse(self) -> None:
        """Take no new connections; idle ones close now, busy ones after their answer."""
        for place in self._places:
            place.in_work.close()
            await place.close_doors()
            _close(place)
            if place.path is not None and _inode(place.path) == place.inode:
                # Not when the next daemon has put its own there already.
                with contextlib.suppress(OSError):
                    place.path.unlink()
        # A request that was read in this very moment gets to its handler first.
        for _ in range(3):
            await asyncio.sleep(0)
        for place in self._places:
            if place.runner.server is not None:
                for connection in place.runner.server.connections:
                    if connection not in place.in_work:
                        if connection.transport is not None:
                            self._closing.append(connection.transport)
                        # Its milder `close` leaves the connection open with nobody reading.
                        connection.force_close()

    async def wait_idle(self) -> None:
        """Wait until no request is in work, those whose body is still coming included."""
        for place in self._places:
            await place.in_work.wait_idle()

    async def flush(self) -> None:
        """Wait until everything written has left for the network."""
        while any(transport.get_write_buffer_size() for transport in self._transports()):  # noqa: ASYNC110 -- nobody tells of an empty buffer
            await asyncio.sleep(_FLUSH_POLL_SECONDS)

    def _transports(self) -> Iterator[asyncio.Transport]:
        yield from self._closing
        for place in self._places:
            if place.runner.server is not None:
                for connection in place.runner.server.connections:
                    if connection.transport is not None:
                        yield connection.transport

    async def aclose(self) -> None:
        """Close what is left."""
        for place in self._places:
            await place.runner.cleanup()
            _close(place)


async def open_sockets(host: str | None, port: int) -> list[socket.socket]:
    """Open a TCP port (0: a free one) on every address of *host* (None: every interface).

    Raises:
        OSError: If that cannot be done; none is open then.
    """
    loop = asyncio.get_running_loop()
    found = await loop.getaddrinfo(
        host, port, type=socket.SOCK_STREAM, proto=socket.IPPROTO_TCP, flags=socket.AI_PASSIVE
    )
    sockets: list[socket.socket] = []
    try:
        for family, _, _, _, address in dict.fromkeys(found):
            # Each family would get a free port of its own.
            number = sockets[0].getsockname()[1] if port == 0 and sockets else address[1]
            try:
                sockets.append(_bind((family, (address[0], number, *address[2:]))))
            except OSError as exc:
                # A machine whose IPv6 is switched off still names its addresses.
                if exc.errno not in (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL) or len(found) == 1:
                    raise
        if not sockets:
            raise OSError(errno.EADDRNOTAVAIL, os.strerror(errno.EADDRNOTAVAIL).lower())
    except BaseException:
        for sock in sockets:
            sock.close()
        raise
    return sockets


def _bind(address: tuple[int, tuple[Any, ...]]) -> socket.socket:
    family, name = address
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            # IPv4 has a socket of its own.
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.setblocking(False)
        sock.bind(name)
        sock.listen(_BACKLOG)
    except BaseException:
        sock.close()
        raise
    return sock


def _bind_unix(path: Path) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    before = os.umask(0o177)
    try:
        sock.setblocking(False)
        sock.bind(str(path))
        sock.listen(_BACKLOG)
    except BaseException:
        sock.close()
        raise
    finally:
        os.umask(before)
    return sock


def _close(place: _Place) -> None:
    while place.sockets:
        place.sockets.pop().close()


def _inode(path: Path) -> int:
    try:
        return path.stat().st_ino
    except OSError:
        return 0


def _is_in_use(path: Path) -> bool:
    """Tell whether somebody answers at a Unix socket; a dead one is taken away."""
    if not path.is_socket():
        return False
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(str(path))
        except OSError:
            with contextlib.suppress(OSError):
                path.unlink()
            return False
    return True
