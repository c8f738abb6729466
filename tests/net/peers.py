"""Other sides for outbound calls, and the means to call them."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest
from aiohttp import web

from codex_proxy.config import Live, Settings
from codex_proxy.net import Deadlines, NetError, Outbound

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
Peer = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]

SOON = Deadlines(connect=5.0, first_byte=0.05, idle=0.05)
LATER = Deadlines(connect=5.0, first_byte=5.0, idle=5.0)


transport = "native"
"""What carries the calls of `calling`; a fixture sets it."""


@contextlib.asynccontextmanager
async def calling(**settings: Any) -> AsyncIterator[Outbound]:
    outbound = Outbound(Live(Settings(**{"upstream_transport": transport, **settings})))
    try:
        yield outbound
    finally:
        await outbound.aclose()


@contextlib.asynccontextmanager
async def serving(handler: Handler) -> AsyncIterator[str]:
    """Serve every path with *handler*; yields the base URL."""
    app = web.Application(client_max_size=64 * 1024 * 1024)
    app.router.add_route("*", "/{path:.*}", handler)
    runner = web.AppRunner(app, shutdown_timeout=0.01)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


@contextlib.asynccontextmanager
async def listening(peer: Peer) -> AsyncIterator[int]:
    """Give every connection to *peer*; yields the port."""
    tasks: set[asyncio.Task[Any]] = set()

    async def on_connection(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        tasks.add(task)
        try:
            await peer(reader, writer)
        except (asyncio.CancelledError, ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            tasks.discard(task)
            writer.close()

    server = await asyncio.start_server(on_connection, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        for task in list(tasks):
            task.cancel()
        if tasks:
            await asyncio.wait(set(tasks))
        server.close()
        await server.wait_closed()


async def unused_port() -> int:
    async with listening(hang_up) as port:
        pass
    return port


async def hang_up(_: asyncio.StreamReader, __: asyncio.StreamWriter) -> None:
    """Close at once."""


async def say_nothing(reader: asyncio.StreamReader, _: asyncio.StreamWriter) -> None:
    """Take whatever comes and never answer."""
    while await reader.read(65_536):
        pass


async def hello(_: web.Request) -> web.StreamResponse:
    return web.Response(text="hello")


async def failing(outbound: Outbound, url: str, deadlines: Deadlines = LATER, **more: Any) -> NetError:
    with pytest.raises(NetError) as caught:
        await outbound.open("GET", url, headers={}, body=None, deadlines=deadlines, **more)
    return caught.value


async def until(condition: Callable[[], bool], seconds: float = 5.0) -> None:
    """Wait until *condition* holds; fail when it does not in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the awaited condition did not come true"
        await asyncio.sleep(0.001)
