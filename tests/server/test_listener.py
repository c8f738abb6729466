"""The sockets that callers reach us by, and how they close: nothing that was begun is broken off."""

import asyncio
import contextlib
import shutil
import tempfile
from collections.abc import AsyncIterator, Iterator, Mapping
from pathlib import Path

import pytest
from aiohttp import web

from codex_proxy.config import Live, Settings
from codex_proxy.protocol.responses import render_error
from codex_proxy.server.access import Access, Level
from codex_proxy.server.app import Route, Takes, build_app
from codex_proxy.server.body import read_body
from codex_proxy.server.front import Front, Handler
from codex_proxy.server.listener import Listener

BIG = b"x" * 8_000_000
ASK_BIG = b"GET /big HTTP/1.1\r\nHost: localhost\r\n\r\n"

ROUTES = (
    Route("GET", "/big", "big", Level.PUBLIC),
    Route("POST", "/echo", "echo", Level.PUBLIC, Takes.JSON),
)


async def big(_: web.Request) -> web.StreamResponse:
    return web.Response(body=BIG)


async def echo(request: web.Request) -> web.StreamResponse:
    return web.Response(body=await read_body(request, limit=1000))


def an_app() -> Front:
    handlers: Mapping[str, Handler] = {"big": big, "echo": echo}
    return build_app(Access(Live(Settings())), handlers, {"openai": render_error}, ROUTES)


@contextlib.asynccontextmanager
async def listening() -> AsyncIterator[tuple[Listener, int]]:
    listener = Listener()
    try:
        yield listener, await listener.open_port(an_app(), "127.0.0.1", 0)
    finally:
        await listener.aclose()


@pytest.fixture
def short() -> Iterator[Path]:
    """A folder whose name leaves room for a socket's, which may have 107 bytes."""
    folder = Path(tempfile.mkdtemp(prefix="cp-"))
    yield folder
    shutil.rmtree(folder)


async def test_what_a_slow_reader_has_not_got_yet_is_waited_for() -> None:
    async with listening() as (listener, port):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(ASK_BIG)
        head = await reader.readuntil(b"\r\n\r\n")
        await listener.refuse()

        async def everything_out() -> None:
            await listener.wait_idle()
            await listener.flush()

        waiting = asyncio.get_running_loop().create_task(everything_out())
        done, _ = await asyncio.wait({waiting}, timeout=0.05)
        assert not done, "it did not wait for bytes that cannot have left"
        body = await asyncio.wait_for(reader.read(), 10)
        await asyncio.wait_for(waiting, 2)
        writer.close()
    assert head.startswith(b"HTTP/1.1 200 ")
    assert body == BIG


async def test_bytes_that_only_wait_in_our_buffer_are_unsent() -> None:
    """Their handler has ended; the connection is idle, and closed as such."""
    async with listening() as (listener, port):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET /nowhere HTTP/1.1\r\nHost: localhost\r\n\r\n")
        head = await reader.readuntil(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 404 ")
        await asyncio.wait_for(listener.flush(), 1)
        (transport,) = listener._transports()
        # More than any socket takes in while nobody reads.
        transport.write(BIG * 2)
        assert listener.in_work == 0
        await listener.refuse()
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(listener.flush(), 0.05)
        assert (await asyncio.wait_for(reader.read(), 10)).endswith(BIG * 2)
        await asyncio.wait_for(listener.flush(), 1)
        writer.close()


async def test_closing_up_lets_a_body_finish_and_closes_idle_connections() -> None:
    async with listening() as (listener, port):
        busy, busy_writer = await asyncio.open_connection("127.0.0.1", port)
        idle, idle_writer = await asyncio.open_connection("127.0.0.1", port)
        head = b"POST /echo HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 4\r\n\r\n"
        busy_writer.write(head + b"12")
        idle_writer.write(head + b"1234")
        await idle.readuntil(b"1234")
        assert listener.in_work == 1

        await listener.refuse()
        assert await asyncio.wait_for(idle.read(), 1) == b""
        with pytest.raises(ConnectionRefusedError):
            await asyncio.open_connection("127.0.0.1", port)
        waiting = asyncio.get_running_loop().create_task(listener.wait_idle())
        busy_writer.write(b"34" + head + b"5678")
        answer = await asyncio.wait_for(busy.read(), 1)
        assert answer.startswith(b"HTTP/1.1 200 ")
        assert b"\r\nConnection: close\r\n" in answer
        assert answer.endswith(b"1234"), "a request sent ahead is not begun any more"
        await asyncio.wait_for(waiting, 1)
        assert listener.in_work == 0
        busy_writer.close()
        idle_writer.close()


async def test_a_connection_whose_answer_had_begun_has_one_more_after_a_hand_over() -> None:
    """Its caller cannot know that it should not send the next request."""
    async with listening() as (listener, port):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(ASK_BIG)
        head = await reader.readuntil(b"\r\n\r\n")
        assert b"connection: close" not in head.lower()
        await listener.retire()
        with pytest.raises(ConnectionRefusedError):
            await asyncio.open_connection("127.0.0.1", port)
        await reader.readexactly(len(BIG))
        waiting = asyncio.get_running_loop().create_task(listener.wait_left(10.0))
        writer.write(ASK_BIG)
        head = await reader.readuntil(b"\r\n\r\n")
        assert b"connection: close" in head.lower()
        assert await asyncio.wait_for(reader.read(), 10) == BIG
        await asyncio.wait_for(waiting, 2)
        writer.close()


async def test_idle_connections_are_not_waited_for_for_ever() -> None:
    async with listening() as (listener, port):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET /nowhere HTTP/1.1\r\nHost: localhost\r\n\r\n")
        await reader.readuntil(b"\r\n\r\n")
        await listener.retire()
        await asyncio.wait_for(listener.wait_left(0.05), 2)
        assert listener.in_work == 0
        await listener.refuse()
        await asyncio.wait_for(reader.read(), 1)
        writer.close()


async def test_whoever_comes_while_nobody_is_taken_in_waits_and_is_served() -> None:
    async with listening() as (listener, port):
        await listener.pause()
        asked = [await asyncio.open_connection("127.0.0.1", port) for _ in range(20)]
        for _, writer in asked:
            writer.write(b"GET /nowhere HTTP/1.1\r\nHost: localhost\r\n\r\n")
        await asyncio.sleep(0.02)
        assert not any(listener._transports())
        await listener.resume()
        # Twice is once.
        await listener.resume()
        for reader, writer in asked:
            assert (await asyncio.wait_for(reader.readline(), 2)).startswith(b"HTTP/1.1 404 ")
            writer.close()


async def test_a_control_socket_that_another_daemon_has_made_is_left_to_it(short: Path) -> None:
    path = short / "control.sock"
    old, new = Listener(), Listener()
    try:
        assert await old.open_unix(an_app(), path)
        path.unlink()
        assert await new.open_unix(an_app(), path)
        await old.refuse()
        assert path.is_socket()
        await new.refuse()
        assert not path.exists()
    finally:
        await old.aclose()
        await new.aclose()


async def test_a_file_in_the_socket_s_place_is_not_taken_away(short: Path) -> None:
    path = short / "control.sock"
    await asyncio.to_thread(path.write_text, "mine", encoding="utf-8")
    listener = Listener()
    try:
        assert not await listener.open_unix(an_app(), path)
        await listener.refuse()
        assert await asyncio.to_thread(path.read_text, encoding="utf-8") == "mine"
    finally:
        await listener.aclose()


async def test_any_free_port_on_every_interface_is_one_port() -> None:
    listener = Listener()
    try:
        port = await listener.open_port(an_app(), None, 0)
        assert port > 0
        bound = {address[1] for place in listener._places for address in place.runner.addresses}
        assert bound == {port}
    finally:
        await listener.aclose()
