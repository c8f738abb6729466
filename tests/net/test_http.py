"""Outbound calls over real sockets: deadlines, proxies, and what never happens."""

import asyncio
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from codex_proxy.config import TRANSPORTS
from codex_proxy.net import Deadlines, NetError, NetKind, Outbound
from tests.net import peers
from tests.net.peers import LATER, SOON, calling, failing, hello, listening, say_nothing, serving, unused_port


@pytest.fixture(params=TRANSPORTS, autouse=True)
def transport(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run each test over each transport."""
    monkeypatch.setattr(peers, "transport", request.param)


# -- an answer ---------------------------------------------------------------------------


async def test_a_call_and_its_answer() -> None:
    seen: list[tuple[str, str, bytes, dict[str, str]]] = []

    async def handler(request: web.Request) -> web.StreamResponse:
        seen.append((request.method, request.path_qs, await request.read(), dict(request.headers)))
        return web.Response(status=418, body=b"tea", headers={"X-Kind": "Pot"})

    async with serving(handler) as url, calling() as outbound:
        reply = await outbound.fetch("POST", f"{url}/a%2Fb?q=%20", headers={"x-mine": "1"}, body=b"{}")
    assert (reply.status, reply.body, reply.headers["x-kind"]) == (418, b"tea", "Pot")
    method, path, body, headers = seen[0]
    assert (method, path, body) == ("POST", "/a%2Fb?q=%20", b"{}")
    assert headers["x-mine"] == "1"
    assert headers["Accept-Encoding"] == "identity"
    # Who we are is the caller's to say.
    assert "User-Agent" not in headers
    assert "Accept" not in headers


async def test_a_large_body_goes_out_whole() -> None:
    body = bytes(range(256)) * 20_000
    seen: list[tuple[bytes, str | None]] = []

    async def handler(request: web.Request) -> web.StreamResponse:
        seen.append((await request.read(), request.headers.get("Content-Length")))
        return web.Response()

    async with serving(handler) as url, calling() as outbound:
        await outbound.fetch("POST", url, headers={}, body=body)
    assert seen == [(body, str(len(body)))]


async def test_an_answer_is_read_as_it_comes() -> None:
    go_on = asyncio.Event()

    async def handler(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        await response.write(b"one")
        await go_on.wait()
        await response.write(b"two")
        return response

    async with serving(handler) as url, calling() as outbound:
        answer = await outbound.open("GET", url, headers={}, body=None, deadlines=LATER)
        assert answer.status == 200
        assert await answer.read() == b"one"
        go_on.set()
        assert await answer.read() == b"two"
        assert await answer.read() == b""
        answer.release()


async def test_a_read_takes_no_more_than_it_must_hold_for_a_stalled_reader() -> None:
    data = bytes(range(256)) * 4096

    async def handler(request: web.Request) -> web.StreamResponse:
        return web.Response(body=data)

    async with serving(handler) as url, calling() as outbound:
        answer = await outbound.open("GET", url, headers={}, body=None, deadlines=LATER)
        parts: list[bytes] = []
        while part := await answer.read():
            parts.append(part)
        answer.release()
    assert b"".join(parts) == data
    assert max(map(len, parts)) <= 64 * 1024


async def test_what_has_arrived_is_read_without_a_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    async def peer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        # In one write, so that the body is there when the head is.
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nwhole")

    deadlines: list[float | None] = []
    timeout = asyncio.timeout

    def counted(seconds: float | None) -> asyncio.Timeout:
        deadlines.append(seconds)
        return timeout(seconds)

    async with listening(peer) as port, calling() as outbound:
        url = f"http://127.0.0.1:{port}"
        answer = await outbound.open("GET", url, headers={}, body=None, deadlines=LATER)
        with monkeypatch.context() as patch:
            patch.setattr(asyncio, "timeout", counted)
            assert await answer.read() == b"whole"
            assert await answer.read() == b""
        answer.release()
    assert deadlines == []


async def test_a_read_that_times_out_loses_no_byte() -> None:
    data, kinds = bytes(range(250)), set[NetKind]()

    async def peer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 250\r\n\r\n")
        for i in range(0, 250, 5):
            writer.write(data[i : i + 5])
            await asyncio.sleep(0.002)

    async with listening(peer) as port, calling() as outbound:
        answer = await outbound.open(
            "GET", f"http://127.0.0.1:{port}", headers={}, body=None, deadlines=LATER
        )
        got, timeouts = b"", 0
        while len(got) < len(data):
            try:
                got += await answer.read(0.0005)
            except NetError as exc:
                kinds.add(exc.kind)
                timeouts += 1
        assert await answer.read() == b""
    assert got == data
    assert timeouts > 0
    assert kinds == {NetKind.TIMEOUT}


async def test_a_connection_is_used_again_when_the_answer_was_read() -> None:
    ports: list[int] = []

    async def handler(request: web.Request) -> web.StreamResponse:
        assert request.transport is not None
        ports.append(request.transport.get_extra_info("peername")[1])
        return web.Response(body=b"x" * (8_000_000 if request.path == "/large" else 100_000))

    async with serving(handler) as url, calling() as outbound:
        for _ in range(2):
            answer = await outbound.open("GET", url, headers={}, body=None, deadlines=LATER)
            assert len(await answer.read_all()) == 100_000
            answer.release()
        assert ports[0] == ports[1]
        # One whose answer is still under way is not.
        answer = await outbound.open("GET", f"{url}/large", headers={}, body=None, deadlines=LATER)
        answer.release()
        await outbound.fetch("GET", url, headers={})
        assert ports[3] != ports[2]


async def test_closing_an_answer_closes_the_connection() -> None:
    gone = asyncio.Event()

    async def peer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 250\r\n\r\nsome")
        await reader.read()
        gone.set()

    async with listening(peer) as port, calling() as outbound:
        answer = await outbound.open(
            "GET", f"http://127.0.0.1:{port}", headers={}, body=None, deadlines=LATER
        )
        assert await answer.read() == b"some"
        answer.close()
        await asyncio.wait_for(gone.wait(), 5.0)


async def test_an_answer_has_a_limit() -> None:
    async def handler(_: web.Request) -> web.StreamResponse:
        return web.Response(body=b"x" * 1000)

    async with serving(handler) as url, calling() as outbound:
        answer = await outbound.open("GET", url, headers={}, body=None, deadlines=LATER)
        with pytest.raises(NetError, match="larger than 999 bytes") as caught:
            await answer.read_all(999)
        assert caught.value.kind is NetKind.CUT
        answer.close()
        answer = await outbound.open("GET", url, headers={}, body=None, deadlines=LATER)
        assert len(await answer.read_all(1000)) == 1000
        answer.release()


# -- what never happens ------------------------------------------------------------------


async def test_a_redirect_is_not_followed() -> None:
    paths: list[str] = []

    async def handler(request: web.Request) -> web.StreamResponse:
        paths.append(request.path)
        return web.Response(status=307, headers={"Location": "/elsewhere"})

    async with serving(handler) as url, calling() as outbound:
        reply = await outbound.fetch("GET", f"{url}/first", headers={"authorization": "Bearer x"})
    assert reply.status == 307
    assert paths == ["/first"]


async def test_no_cookie_is_kept() -> None:
    cookies: list[str | None] = []

    async def handler(request: web.Request) -> web.StreamResponse:
        cookies.append(request.headers.get("Cookie"))
        return web.Response(headers={"Set-Cookie": "__cf_bm=abc; Path=/"})

    async with serving(handler) as url, calling() as outbound:
        for _ in range(2):
            await outbound.fetch("GET", url, headers={})
    assert cookies == [None, None]


async def test_proxies_of_the_environment_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    port = await unused_port()
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{port}")
    async with serving(hello) as url, calling() as outbound:
        assert (await outbound.fetch("GET", url, headers={})).body == b"hello"


# -- failures ----------------------------------------------------------------------------


async def test_a_refused_connection_is_the_ways_fault() -> None:
    port = await unused_port()
    async with calling() as outbound:
        error = await failing(outbound, f"http://127.0.0.1:{port}/secret?token=1")
    assert error.kind is NetKind.CONNECT
    assert error.kind.is_path
    assert str(error) == "connect failed for 127.0.0.1"


class Names(aiohttp.abc.AbstractResolver):
    """A resolver of one answer, so that no name leaves the machine."""

    def __init__(self, wait: float = 0.0) -> None:
        self._wait = wait

    async def resolve(self, host: str, port: int = 0, family: Any = 0) -> list[Any]:
        await asyncio.sleep(self._wait)
        raise OSError(-2, "Name or service not known")

    async def close(self) -> None:
        pass


def resolve_by(outbound: Outbound, resolver: Names) -> None:
    outbound.native.resolve = resolver.resolve
    connector = outbound.aiohttp._session("").connector
    assert isinstance(connector, aiohttp.TCPConnector)
    connector._resolver = resolver


async def test_an_unknown_name_is_the_ways_fault() -> None:
    async with calling() as outbound:
        resolve_by(outbound, Names())
        error = await failing(outbound, "http://backend.invalid/x")
    assert error.kind is NetKind.DNS
    assert error.kind.is_path
    assert str(error) == "dns failed for backend.invalid"


async def test_a_name_that_is_looked_up_for_ever_ends_with_the_connect_deadline() -> None:
    async with calling() as outbound:
        resolve_by(outbound, Names(wait=30.0))
        error = await failing(outbound, "http://backend.invalid/x", Deadlines(0.05, 30.0, 30.0))
    assert error.kind is NetKind.CONNECT


async def test_a_peer_that_speaks_no_tls_is_the_ways_fault() -> None:
    async def peer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(10)
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")

    async with listening(peer) as port, calling() as outbound:
        error = await failing(outbound, f"https://127.0.0.1:{port}")
    assert error.kind is NetKind.TLS
    assert error.kind.is_path


async def test_a_tls_handshake_that_never_ends_has_the_connect_deadline() -> None:
    async with listening(say_nothing) as port, calling() as outbound:
        error = await failing(outbound, f"https://127.0.0.1:{port}", Deadlines(0.05, 30.0, 30.0))
    assert error.kind is NetKind.CONNECT


async def test_a_connection_lost_before_the_answer_is_a_cut() -> None:
    async def peer(reader: asyncio.StreamReader, _: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")

    async with listening(peer) as port, calling() as outbound:
        error = await failing(outbound, f"http://127.0.0.1:{port}")
    assert error.kind is NetKind.CUT
    assert not error.kind.is_path


@pytest.mark.parametrize("head", [b"Content-Length: 100", b"Transfer-Encoding: chunked"])
async def test_a_connection_lost_in_the_answer_is_a_cut_after_what_came(head: bytes) -> None:
    async def peer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\n" + head + b"\r\n\r\n")
        writer.write(b"5\r\nhello\r\n" if b"chunked" in head else b"hello")

    async with listening(peer) as port, calling() as outbound:
        answer = await outbound.open(
            "GET", f"http://127.0.0.1:{port}", headers={}, body=None, deadlines=LATER
        )
        with pytest.raises(NetError) as caught:
            await answer.read_all()
        assert caught.value.kind is NetKind.CUT
        answer.close()


async def test_no_answer_in_time_is_a_timeout() -> None:
    async with listening(say_nothing) as port, calling() as outbound:
        error = await failing(outbound, f"http://127.0.0.1:{port}", SOON)
    assert error.kind is NetKind.TIMEOUT
    assert not error.kind.is_path


async def test_the_wait_for_the_first_byte_begins_with_the_connection() -> None:
    async with listening(say_nothing) as port, calling() as outbound:
        began = asyncio.get_running_loop().time()
        error = await failing(outbound, f"http://127.0.0.1:{port}", Deadlines(30.0, 0.05, 30.0))
        assert error.kind is NetKind.TIMEOUT
        assert asyncio.get_running_loop().time() - began < 5.0


async def test_silence_in_the_answer_is_a_timeout() -> None:
    async def peer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nhello")
        await reader.read()

    async with listening(peer) as port, calling() as outbound:
        answer = await outbound.open(
            "GET", f"http://127.0.0.1:{port}", headers={}, body=None, deadlines=Deadlines(5.0, 5.0, 0.05)
        )
        assert await answer.read() == b"hello"
        with pytest.raises(NetError, match=r"no byte for 0\.05 s") as caught:
            await answer.read()
        assert caught.value.kind is NetKind.TIMEOUT
        answer.close()


async def test_a_slow_answer_has_no_total_deadline() -> None:
    async def peer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 30\r\n\r\n")
        for _ in range(30):
            await asyncio.sleep(0.01)
            writer.write(b"x")

    async with listening(peer) as port, calling() as outbound:
        answer = await outbound.open(
            "GET", f"http://127.0.0.1:{port}", headers={}, body=None, deadlines=Deadlines(5.0, 5.0, 0.2)
        )
        assert await answer.read_all() == b"x" * 30
        answer.release()


async def test_a_whole_answer_must_come_in_time() -> None:
    async def peer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
        while True:
            writer.write(b"x")
            await asyncio.sleep(0.01)

    async with listening(peer) as port, calling() as outbound:
        with pytest.raises(NetError) as caught:
            await outbound.fetch("GET", f"http://127.0.0.1:{port}", headers={}, timeout=0.2)
    assert caught.value.kind is NetKind.TIMEOUT


async def test_a_cancelled_call_is_cancelled() -> None:
    async with listening(say_nothing) as port, calling() as outbound:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.02):
                await outbound.open("GET", f"http://127.0.0.1:{port}", headers={}, body=None, deadlines=LATER)
