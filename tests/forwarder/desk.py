"""Both ends of a forwarder as plain sockets: what goes over the wire is what is looked at."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

from codex_proxy.forwarder import settings
from codex_proxy.forwarder.service import Forwarder

PATIENCE_SECONDS = 10.0


class End:
    """One end of a connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def read(self, size: int) -> bytes:
        """Return exactly *size* bytes."""
        async with asyncio.timeout(PATIENCE_SECONDS):
            return await self.reader.readexactly(size)

    async def until(self, mark: bytes) -> bytes:
        """Return all up to *mark*, which is included."""
        async with asyncio.timeout(PATIENCE_SECONDS):
            return await self.reader.readuntil(mark)

    async def head(self) -> bytes:
        """Return the head of the next message, without the empty line."""
        return (await self.until(b"\r\n\r\n"))[:-4]

    async def rest(self) -> bytes:
        """Return all that comes until the connection ends in order.

        Raises:
            ConnectionError: If it does not.
        """
        async with asyncio.timeout(PATIENCE_SECONDS):
            return await self.reader.read()

    async def is_over(self) -> bool:
        """Wait for the end of the connection, in order or not, with nothing more before it."""
        try:
            return await self.rest() == b""
        except ConnectionError:
            return True

    def write(self, data: bytes) -> None:
        self.writer.write(data)

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        async with asyncio.timeout(PATIENCE_SECONDS):
            await self.writer.drain()

    def close(self) -> None:
        self.writer.close()

    def abort(self) -> None:
        self.writer.transport.abort()


class Far:
    """The far server: its connections come in turn."""

    def __init__(self) -> None:
        self.port = 0
        self.ends: list[End] = []
        self._queue: asyncio.Queue[End] = asyncio.Queue()

    async def take(self) -> End:
        """Return the next new connection."""
        async with asyncio.timeout(PATIENCE_SECONDS):
            return await self._queue.get()

    async def on_connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        end = End(reader, writer)
        self.ends.append(end)
        self._queue.put_nowait(end)


@contextlib.asynccontextmanager
async def far_server() -> AsyncIterator[Far]:
    far = Far()
    server = await asyncio.start_server(far.on_connection, "127.0.0.1", 0, limit=1024 * 1024)
    far.port = int(server.sockets[0].getsockname()[1])
    try:
        yield far
    finally:
        server.close()
        for end in far.ends:
            end.abort()
        await asyncio.sleep(0)


class Desk:
    """A forwarder between a far server and callers."""

    def __init__(self, far: Far, forwarder: Forwarder) -> None:
        self.far = far
        self.forwarder = forwarder
        self._ends: list[End] = []

    async def call(self, data: bytes = b"") -> End:
        """Open a connection to the forwarder, and send *data*."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.forwarder.port, limit=1024 * 1024)
        end = End(reader, writer)
        self._ends.append(end)
        if data:
            end.write(data)
        return end

    async def ask(self, data: bytes) -> tuple[End, End, bytes]:
        """Send a request; return the caller's end, the far one, and the head that came there."""
        caller = await self.call(data)
        far = await self.far.take()
        return caller, far, await far.head()

    async def own(self, data: bytes) -> tuple[bytes, bytes]:
        """Send a request that the forwarder answers by itself; return head and body."""
        caller = await self.call(data)
        head = await caller.head()
        length = int(fields(head)["content-length"])
        return head, await caller.read(length)

    def hang_up(self) -> None:
        for end in self._ends:
            end.abort()


def wanted(*upstreams: str, **more: Any) -> settings.Settings:
    """Return settings as flags of the command line give them."""
    flags = {name: value if isinstance(value, list) else str(value) for name, value in more.items()}
    return settings.load({"upstream": list(upstreams), "port": "0", **flags}, {})


@contextlib.asynccontextmanager
async def forwarding(
    made: settings.Settings, now: Callable[[], float] = time.monotonic
) -> AsyncIterator[Forwarder]:
    forwarder = Forwarder(made, now)
    await forwarder.start()
    try:
        yield forwarder
    finally:
        await forwarder.aclose()


@contextlib.asynccontextmanager
async def desk(now: Callable[[], float] = time.monotonic, **more: Any) -> AsyncIterator[Desk]:
    """Start a far server and a forwarder in front of it."""
    async with (
        far_server() as far,
        forwarding(wanted(f"http://127.0.0.1:{far.port}", **more), now) as forwarder,
    ):
        made = Desk(far, forwarder)
        try:
            yield made
        finally:
            made.hang_up()
            await asyncio.sleep(0)


def fields(head: bytes) -> dict[str, str]:
    """Return the fields of a head by name, in lower case."""
    lines = head.decode("latin-1").split("\r\n")[1:]
    return {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}


def lines(head: bytes) -> list[bytes]:
    return head.split(b"\r\n")


async def until(condition: Callable[[], bool]) -> None:
    """Wait until *condition* holds; fail when it does not in time."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < deadline, "the awaited condition did not come true"
        await asyncio.sleep(0.001)
