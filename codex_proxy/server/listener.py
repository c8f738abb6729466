"""The sockets that callers reach us by: opened, closed to newcomers, closed altogether."""

import asyncio
import contextlib
import logging
import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from aiohttp import web

from codex_proxy.server.app import SERVER_OPTIONS
from codex_proxy.server.front import Front, InWork

logger = logging.getLogger(__name__)

# What a handler may still take when everything closes.
_LAST_SECONDS = 1.0

_FLUSH_POLL_SECONDS = 0.01


@dataclass(slots=True)
class _Place:
    """One application on one address."""

    runner: web.ServerRunner
    in_work: InWork
    site: web.BaseSite | None = None
    path: Path | None = None
    inode: int = 0


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
        if host is None and port == 0:
            # Each family would get a port of its own.
            with socket.create_server(("", 0)) as probe:
                port = int(probe.getsockname()[1])
        place = await self._run(app)
        place.site = web.TCPSite(place.runner, host, port, reuse_address=True)
        await place.site.start()
        return port or int(place.runner.addresses[0][1])

    async def is_taken(self, path: Path) -> bool:
        """Tell whether somebody listens on the socket at *path*."""
        return await asyncio.to_thread(_is_in_use, path)

    async def open_unix(self, app: Front, path: Path) -> bool:
        """Serve *app* on a socket that only this user can open; False, with a warning, if that fails."""
        if await asyncio.to_thread(_is_in_use, path):
            logger.warning("control socket is in use by another daemon path=%s", path)
            return False
        place = await self._run(app)
        site = web.UnixSite(place.runner, path)
        before = os.umask(0o177)
        try:
            await site.start()
            place.inode = _inode(path)
        except OSError as exc:
            logger.warning("no control socket path=%s reason=%s", path, exc.strerror or exc)
            return False
        finally:
            os.umask(before)
        place.site, place.path = site, path
        return True

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

    async def refuse(self) -> None:
        """Take no new connections; idle ones close now, busy ones after their answer."""
        for place in self._places:
            place.in_work.close()
            if place.site is not None:
                await place.site.stop()
                place.site = None
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
