"""Calls through proxies; whatever `upstream-transport` says, they are aiohttp's."""

import asyncio
import struct
from dataclasses import dataclass, field

import pytest
from aiohttp import web

from codex_proxy.config import Live, Settings
from codex_proxy.net import Deadlines, NetKind, Outbound
from tests.net.peers import LATER, calling, failing, hello, listening, say_nothing, serving, unused_port


async def pipe(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(65_536):
        writer.write(data)
        await writer.drain()
    writer.close()


async def join(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, host: str, port: int) -> None:
    there, back = await asyncio.open_connection(host, port)
    try:
        await asyncio.gather(pipe(reader, back), pipe(there, writer))
    finally:
        back.close()


@dataclass
class HttpProxy:
    """A proxy that speaks HTTP: CONNECT, and plain requests with the whole address in them."""

    asked: list[str] = field(default_factory=list)
    passwords: list[str] = field(default_factory=list)
    refusal: bytes = b""

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        lines = head.decode().split("\r\n")
        self.asked.append(lines[0])
        self.passwords += [line for line in lines if line.lower().startswith("proxy-authorization")]
        if self.refusal:
            if self.refusal != b"hang up":
                writer.write(self.refusal)
                await writer.drain()
            return
        method, target, _ = lines[0].split(" ")
        if method == "CONNECT":
            host, _, port = target.rpartition(":")
            writer.write(b"HTTP/1.1 200 Connection established\r\n\r\n")
            await join(reader, writer, host, int(port))
            return
        host, _, port = target.removeprefix("http://").partition("/")[0].rpartition(":")
        there, back = await asyncio.open_connection(host, int(port))
        back.write(head)
        await asyncio.gather(pipe(reader, back), pipe(there, writer))


@dataclass
class SocksProxy:
    """A SOCKS5 proxy without passwords."""

    asked: list[tuple[str, int]] = field(default_factory=list)
    code: int = 0
    addresses: dict[str, str] = field(default_factory=dict)

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        _, methods = await reader.readexactly(2)
        await reader.readexactly(methods)
        writer.write(b"\x05\x00")
        _, command, _, kind = await reader.readexactly(4)
        assert command == 1
        if kind == 3:
            host = (await reader.readexactly((await reader.readexactly(1))[0])).decode()
        else:
            host = ".".join(str(byte) for byte in await reader.readexactly(4))
        (port,) = struct.unpack(">H", await reader.readexactly(2))
        self.asked.append((host, port))
        writer.write(bytes([5, self.code, 0, 1, 0, 0, 0, 0, 0, 0]))
        await writer.drain()
        if self.code == 0:
            await join(reader, writer, self.addresses.get(host, host), port)


async def test_plain_http_goes_through_the_proxy() -> None:
    proxy = HttpProxy()
    async with (
        serving(hello) as url,
        listening(proxy) as port,
        calling(proxy_url=f"http://me:pass@127.0.0.1:{port}") as outbound,
    ):
        reply = await outbound.fetch("GET", f"{url}/x", headers={})
    assert reply.body == b"hello"
    assert proxy.asked == [f"GET {url}/x HTTP/1.1"]
    assert proxy.passwords == ["Proxy-Authorization: Basic bWU6cGFzcw=="]


async def test_https_goes_through_the_proxys_tunnel() -> None:
    proxy, greetings = HttpProxy(), list[bytes]()

    async def peer(reader: asyncio.StreamReader, _: asyncio.StreamWriter) -> None:
        greetings.append(await reader.read(3))

    async with (
        listening(peer) as backend,
        listening(proxy) as port,
        calling(proxy_url=f"http://127.0.0.1:{port}") as outbound,
    ):
        error = await failing(outbound, f"https://127.0.0.1:{backend}/x")
    assert proxy.asked == [f"CONNECT 127.0.0.1:{backend} HTTP/1.1"]
    # The start of a TLS handshake, end to end.
    assert greetings[0][:2] == b"\x16\x03"
    # Which the backend broke off before it had the request.
    assert error.kind.is_path


async def test_socks_goes_through_the_proxy() -> None:
    proxy = SocksProxy()
    async with (
        serving(hello) as url,
        listening(proxy) as port,
        calling(proxy_url=f"socks5://127.0.0.1:{port}") as outbound,
    ):
        replies = [await outbound.fetch("GET", url, headers={}) for _ in range(2)]
    assert [reply.body for reply in replies] == [b"hello", b"hello"]
    backend = int(url.rpartition(":")[2])
    # One connection served both.
    assert proxy.asked == [("127.0.0.1", backend)]


async def test_socks5h_leaves_the_name_to_the_proxy() -> None:
    proxy = SocksProxy(addresses={"backend.invalid": "127.0.0.1"})
    async with serving(hello) as url, listening(proxy) as port:
        backend = int(url.rpartition(":")[2])
        async with calling(proxy_url=f"socks5h://127.0.0.1:{port}") as outbound:
            reply = await outbound.fetch("GET", f"http://backend.invalid:{backend}/", headers={})
    assert reply.body == b"hello"
    assert proxy.asked == [("backend.invalid", backend)]


@pytest.mark.parametrize("scheme", ["http", "socks5", "socks5h"])
async def test_a_proxy_that_is_not_there_is_an_error_and_nothing_goes_direct(scheme: str) -> None:
    reached: list[str] = []

    async def handler(request: web.Request) -> web.StreamResponse:
        reached.append(request.path)
        return web.Response()

    port = await unused_port()
    async with serving(handler) as url, calling(proxy_url=f"{scheme}://127.0.0.1:{port}") as outbound:
        error = await failing(outbound, url)
    assert error.kind is NetKind.PROXY
    assert error.kind.is_path
    assert reached == []


@pytest.mark.parametrize(
    "refusal",
    [
        b"HTTP/1.1 407 Proxy Authentication Required\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 502 Bad Gateway\r\nContent-Length: 0\r\n\r\n",
        b"hang up",
    ],
)
async def test_a_tunnel_that_is_refused_never_carried_the_request(refusal: bytes) -> None:
    proxy = HttpProxy(refusal=refusal)
    async with listening(proxy) as port, calling(proxy_url=f"http://127.0.0.1:{port}") as outbound:
        error = await failing(outbound, "https://127.0.0.1:1/x")
    assert error.kind is NetKind.PROXY
    assert len(proxy.asked) == 1


async def test_a_socks_proxy_that_refuses_never_carried_the_request() -> None:
    proxy = SocksProxy(code=5)
    async with listening(proxy) as port, calling(proxy_url=f"socks5://127.0.0.1:{port}") as outbound:
        error = await failing(outbound, "http://127.0.0.1:1/x")
    assert error.kind is NetKind.PROXY
    assert proxy.asked == [("127.0.0.1", 1)]


@pytest.mark.parametrize("scheme", ["http", "socks5"])
async def test_a_proxy_that_never_answers_has_the_connect_deadline(scheme: str) -> None:
    async with listening(say_nothing) as port, calling(proxy_url=f"{scheme}://127.0.0.1:{port}") as outbound:
        error = await failing(outbound, "https://127.0.0.1:1/x", Deadlines(0.05, 30.0, 30.0))
    assert error.kind.is_path


async def test_tls_that_fails_behind_a_socks_proxy_is_the_ways_fault() -> None:
    async def peer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(10)
        writer.write(b"no TLS here, nor will there be any\r\n")

    proxy = SocksProxy()
    async with (
        listening(peer) as backend,
        listening(proxy) as port,
        calling(proxy_url=f"socks5://127.0.0.1:{port}") as outbound,
    ):
        error = await failing(outbound, f"https://127.0.0.1:{backend}")
    assert error.kind is NetKind.TLS


@pytest.mark.parametrize(
    "proxy", ["ftp://127.0.0.1:1", "socks9://127.0.0.1:1", "http://127.0.0.1:99999", "http://"]
)
async def test_a_proxy_that_nobody_can_call_is_an_error_of_the_way(proxy: str) -> None:
    async with serving(hello) as url, calling() as outbound:
        error = await failing(outbound, url, proxy_url=proxy)
    assert error.kind is NetKind.PROXY


async def test_an_own_proxy_outranks_the_configured_one() -> None:
    proxy = HttpProxy()
    port = await unused_port()
    async with (
        serving(hello) as url,
        listening(proxy) as own,
        calling(proxy_url=f"http://127.0.0.1:{port}") as outbound,
    ):
        reply = await outbound.fetch("GET", f"{url}/x", headers={}, proxy_url=f"http://127.0.0.1:{own}")
    assert reply.body == b"hello"
    assert len(proxy.asked) == 1


async def test_a_changed_proxy_serves_new_calls_while_old_answers_go_on() -> None:
    go_on = asyncio.Event()

    async def handler(request: web.Request) -> web.StreamResponse:
        if request.path != "/slow":
            return web.Response(text="hello")
        response = web.StreamResponse()
        await response.prepare(request)
        await response.write(b"one")
        await go_on.wait()
        await response.write(b"two")
        return response

    proxy = HttpProxy()
    async with serving(handler) as url, listening(proxy) as port:
        live = Live(Settings())
        outbound = Outbound(live)
        slow = await outbound.open("GET", f"{url}/slow", headers={}, body=None, deadlines=LATER)
        live.replace(Settings(proxy_url=f"http://127.0.0.1:{port}"))
        assert (await outbound.fetch("GET", f"{url}/new", headers={})).body == b"hello"
        go_on.set()
        assert await slow.read_all() == b"onetwo"
        slow.release()
        await outbound.aclose()
    assert proxy.asked == [f"GET {url}/new HTTP/1.1"]
