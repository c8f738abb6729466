"""A stream on a real socket: how many writes it takes, and how it ends for every kind of caller."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest
from aiohttp import web

from codex_proxy.server.app import SERVER_OPTIONS
from codex_proxy.server.eventstream import EventStream
from codex_proxy.server.front import DIALECT, REQUEST_ID, Front, Incoming

Play = Callable[[EventStream], Awaitable[None]]

ASK = b"GET / HTTP/1.1\r\nHost: here\r\nx-request-id: mine\r\n\r\n"


@contextlib.asynccontextmanager
async def serving(
    play: Play, headers: dict[str, str] | None = None, *, stall: float = 5.0, dialect: str = "openai"
) -> AsyncIterator[tuple[Front, int]]:
    """Answer every request with a stream on which *play* writes; yields the front and its port."""

    async def handle(request: web.Request) -> web.StreamResponse:
        assert isinstance(request, Incoming)
        request[DIALECT] = dialect
        stream = EventStream(request, headers or {}, stall)
        await play(stream)
        return stream

    front = Front(handle)
    runner = web.ServerRunner(front.server(**SERVER_OPTIONS), shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        yield front, runner.addresses[0][1]
    finally:
        await runner.cleanup()


async def say(port: int, *requests: bytes) -> bytes:
    """Send *requests* on one connection and return what comes, up to the last end or the connection's."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    said = b""
    try:
        writer.write(b"".join(requests))
        async with asyncio.timeout(5):
            while said.count(b"0\r\n\r\n") < len(requests) and (part := await reader.read(65_536)):
                said += part
        return said
    finally:
        writer.close()


@pytest.fixture
def writes(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """Record what goes to a transport, write by write."""
    seen: list[bytes] = []
    kind: Any = vars(asyncio.selector_events)["_SelectorSocketTransport"]
    write = kind.write

    def spy(self: asyncio.Transport, data: bytes) -> None:
        seen.append(bytes(data))
        write(self, data)

    monkeypatch.setattr(kind, "write", spy)
    return seen


async def test_a_short_answer_is_one_write(writes: list[bytes]) -> None:
    async def play(stream: EventStream) -> None:
        stream.put(b"data: 1\n\n", is_last=True)
        await stream.write_eof()

    async with serving(play, {"x-more": "yes"}) as (_, port):
        said = await say(port, ASK)
    assert writes == [ASK, said]
    head, _, body = said.partition(b"\r\n\r\n")
    lines = head.split(b"\r\n")
    assert lines[0] == b"HTTP/1.1 200 OK"
    assert {line.partition(b":")[0].lower() for line in lines[1:]} == {
        b"content-type", b"cache-control", b"x-accel-buffering", b"transfer-encoding", b"date", b"server",
        b"x-request-id", b"x-more",
    }  # fmt: skip
    assert b"x-request-id: mine" in lines
    assert b"Server: codex-proxy" in lines
    assert body == b"9\r\ndata: 1\n\n\r\n0\r\n\r\n"


async def test_each_further_write_is_one_chunk(writes: list[bytes]) -> None:
    async def play(stream: EventStream) -> None:
        await stream.write(b"a")
        await stream.write(b"bc")
        await stream.write_eof()

    async with serving(play) as (_, port):
        await say(port, ASK)
    assert [write.partition(b"\r\n\r\n")[2] or write for write in writes[1:]] == [
        b"1\r\na\r\n",
        b"2\r\nbc\r\n",
        b"0\r\n\r\n",
    ]


async def test_the_head_alone_can_go_first(writes: list[bytes]) -> None:
    async def play(stream: EventStream) -> None:
        stream.put(b"")
        stream.put(b"")
        await stream.write_eof(b"x")

    async with serving(play) as (_, port):
        await say(port, ASK)
    assert writes[1].endswith(b"\r\n\r\n")
    assert writes[2:] == [b"1\r\nx\r\n0\r\n\r\n"]


async def test_a_connection_serves_one_stream_after_another() -> None:
    async with serving(lambda stream: stream.write_eof(b"x")) as (_, port):
        said = await say(port, ASK, ASK, ASK)
    assert said.count(b"HTTP/1.1 200 OK") == said.count(b"\r\n0\r\n\r\n") == 3


@pytest.mark.parametrize("closing", [b"Connection: close\r\n", None])
async def test_the_last_answer_of_a_connection_says_so(closing: bytes | None) -> None:
    async with serving(lambda stream: stream.write_eof(b"x")) as (front, port):
        front.in_work.is_closing = closing is None
        # A second request that comes later is not served.
        said = await say(port, ASK[:-2] + (closing or b"") + b"\r\n", *([ASK] if closing is None else []))
    assert said.count(b"HTTP/1.1") == 1
    assert b"\r\nConnection: close\r\n\r\n" in said


async def test_an_old_caller_gets_no_chunks() -> None:
    async def play(stream: EventStream) -> None:
        await stream.write(b"data: 1\n\n")
        await stream.write_eof(b"data: 2\n\n")

    async with serving(play) as (_, port):
        said = await say(port, ASK.replace(b"HTTP/1.1", b"HTTP/1.0"))
    assert b"chunked" not in said
    assert said.endswith(b"\r\nConnection: close\r\n\r\ndata: 1\n\ndata: 2\n\n")


async def test_what_every_answer_carries_outranks_what_the_backend_said() -> None:
    headers = {"x-request-id": "theirs", "cf-ray": "1"}
    async with serving(lambda stream: stream.write_eof(b"x"), headers, dialect="anthropic") as (_, port):
        said = await say(port, ASK)
    assert said.count(b"request-id: mine") == 2
    assert b"theirs" not in said
    assert b"\r\ncf-ray: 1\r\n" in said


@pytest.mark.parametrize("value", ["a\r\nb: c", "a\nb", "a\0", "\x7f"])
async def test_no_header_writes_another_one(value: str) -> None:
    told: list[str] = []

    async def handle(request: web.Request) -> web.StreamResponse:
        assert isinstance(request, Incoming)
        with pytest.raises(ValueError, match="x-bad") as caught:
            EventStream(request, {"x-bad": value}, 5.0)
        told.append(str(caught.value))
        return web.Response(text=request[REQUEST_ID])

    front = Front(handle)
    runner = web.ServerRunner(front.server(**SERVER_OPTIONS), shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        await say(runner.addresses[0][1], ASK[:-2] + b"Connection: close\r\n\r\n")
    finally:
        await runner.cleanup()
    assert told
    assert value not in told[0]


async def test_a_caller_who_reads_nothing_is_given_up() -> None:
    lost: asyncio.Future[Exception] = asyncio.get_running_loop().create_future()
    written = 0

    async def play(stream: EventStream) -> None:
        nonlocal written
        try:
            while True:
                await stream.write(b"x" * 65_536)
                written += 65_536
        except ConnectionError as exc:
            lost.set_result(exc)
            raise

    async with serving(play, stall=0.2) as (_, port):
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1024)
        writer.write(ASK)
        error = await asyncio.wait_for(lost, 10)
        assert "stopped reading" in str(error)
        # What the kernel and one write hold, not all that could have been said.
        assert written < 64 * 1024 * 1024
        writer.close()
        assert not reader.exception()


async def test_writing_to_a_caller_who_has_left_fails() -> None:
    lost: asyncio.Future[Exception] = asyncio.get_running_loop().create_future()

    async def play(stream: EventStream) -> None:
        try:
            while True:
                stream.put(b"x")
                await asyncio.sleep(0.01)
        except (ConnectionError, asyncio.CancelledError) as exc:
            lost.set_result(ConnectionResetError() if isinstance(exc, asyncio.CancelledError) else exc)
            raise

    async with serving(play) as (_, port):
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(ASK)
        await asyncio.sleep(0.05)
        writer.transport.abort()
        assert isinstance(await asyncio.wait_for(lost, 5), ConnectionError)
