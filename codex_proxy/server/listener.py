"""The sockets that callers reach us by: opened, closed to newcomers, closed altogether."""

import asyncio
import contextlib
import logging
import os
import socket
from pathlib import Path

from aiohttp import web

from codex_proxy.server.app import SERVER_OPTIONS

logger = logging.getLogger(__name__)

# What a handler that is not a turn may still take when everything closes.
_LAST_SECONDS = 1.0


class Listener:
    """Serves applications over TCP and Unix sockets."""

    def __init__(self) -> None:
        self._runners: list[web.AppRunner] = []
        self._sites: list[web.BaseSite] = []
        self._unix: list[Path] = []

    async def open_port(self, app: web.Application, host: str | None, port: int) -> int:
        """Serve *app* on a TCP port (0: a free one; host None: every interface); return the port.

        Raises:
            OSError: If the port cannot be opened.
        """
        runner = await self._run(app)
        site = web.TCPSite(runner, host, port, reuse_address=True)
        await site.start()
        self._sites.append(site)
        return port or int(runner.addresses[0][1])

    async def open_unix(self, app: web.Application, path: Path) -> bool:
        """Serve *app* on a socket that only this user can open; False, with a warning, if that fails."""
        if await asyncio.to_thread(_is_in_use, path):
            logger.warning("control socket is in use by another daemon path=%s", path)
            return False
        runner = await self._run(app)
        site = web.UnixSite(runner, path)
        before = os.umask(0o177)
        try:
            await site.start()
        except OSError as exc:
            logger.warning("no control socket path=%s reason=%s", path, exc.strerror or type(exc).__name__)
            return False
        finally:
            os.umask(before)
        self._sites.append(site)
        self._unix.append(path)
        return True

    async def _run(self, app: web.Application) -> web.AppRunner:
        runner = web.AppRunner(
            app,
            # A caller who leaves ends its handler, which tells the exchange.
            handler_cancellation=True,
            shutdown_timeout=_LAST_SECONDS,
            **SERVER_OPTIONS,
        )
        await runner.setup()
        self._runners.append(runner)
        return runner

    async def refuse(self) -> None:
        """Take no new connections; idle ones close now, busy ones after their answer."""
        for site in self._sites:
            await site.stop()
        for runner in self._runners:
            if runner.server is not None:
                runner.server.pre_shutdown()

    async def aclose(self) -> None:
        """Close what is left."""
        for runner in self._runners:
            await runner.cleanup()
        for path in self._unix:
            with contextlib.suppress(OSError):
                path.unlink()


def _is_in_use(path: Path) -> bool:
    """Tell whether somebody answers at a Unix socket; a dead one is taken away."""
    if not path.exists():
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
