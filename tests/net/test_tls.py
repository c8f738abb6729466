"""TLS to the backend: whom it trusts, and what a failure is called; over both transports."""

import asyncio
import contextlib
import datetime
import ssl
from collections.abc import AsyncIterator

import pytest
import trustme

from codex_proxy.config import TRANSPORTS
from codex_proxy.net import Deadlines, NetError, NetKind, Outbound
from codex_proxy.net.connections import AddrInfo, resolve
from tests.net import peers
from tests.net.peers import LATER, calling, failing, until

MEBI = 1024 * 1024
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
YEAR = datetime.timedelta(days=365)


@pytest.fixture(params=TRANSPORTS, autouse=True)
def transport(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run each test over each transport."""
    name: str = request.param
    monkeypatch.setattr(peers, "transport", name)
    return name


@pytest.fixture(scope="module")
def ca() -> trustme.CA:
    return trustme.CA()


class Server:
    """Speaks TLS with one certificate, and answers `OK` or what it is told."""

    def __init__(self) -> None:
        self.port = 0
        self.answer = OK
        self.names: list[str | None] = []
        """Whom each connection asked for."""
        self.requests: list[bytes] = []
        self.closed = 0
        self.hangs_up = False

    def context(self, certificate: trustme.LeafCert) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        certificate.configure_cert(context)
        context.sni_callback = lambda _, name, __: self.names.append(name)
        return context

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0] or b"0")
                self.requests.append(await reader.readexactly(length))
                writer.write(self.answer)
                await writer.drain()
                if self.hangs_up:
                    return
        except (asyncio.IncompleteReadError, ConnectionError, ssl.SSLError):
            pass
        finally:
            self.closed += 1
            writer.transport.abort()


@contextlib.asynccontextmanager
async def serving(
    certificate: trustme.LeafCert, *trusted: trustme.CA
) -> AsyncIterator[tuple[Server, Outbound]]:
    server = Server()
    listener = await asyncio.start_server(server, "127.0.0.1", 0, ssl=server.context(certificate))
    server.port = listener.sockets[0].getsockname()[1]
    try:
        async with calling() as outbound:
            for one in trusted:
                one.configure_trust(outbound.native._tls)
            yield server, outbound
    finally:
        listener.close()
        await listener.wait_closed()


async def get(outbound: Outbound, server: Server, host: str = "127.0.0.1") -> bytes:
    return (await outbound.fetch("GET", f"https://{host}:{server.port}/x", headers={})).body


async def test_a_trusted_certificate_is_good_and_its_connection_is_kept(ca: trustme.CA) -> None:
    async with serving(ca.issue_cert("127.0.0.1"), ca) as (server, outbound):
        assert [await get(outbound, server) for _ in range(3)] == [b"ok"] * 3
        await outbound.aclose()
        await until(lambda: server.closed == 1)


async def test_the_host_is_named_in_the_handshake(ca: trustme.CA) -> None:
    async with serving(ca.issue_cert("localhost"), ca) as (server, outbound):
        assert await get(outbound, server, "localhost") == b"ok"
        assert server.names == ["localhost"]


async def test_a_point_at_the_end_of_the_host_is_no_part_of_its_name(ca: trustme.CA, transport: str) -> None:
    async with serving(ca.issue_cert("backend.test"), ca) as (server, outbound):

        async def there(_: str, port: int) -> list[AddrInfo]:
            return await resolve("127.0.0.1", port)

        if transport == "native":
            outbound.native.resolve = there
            assert await get(outbound, server, "backend.test.") == b"ok"
            assert server.names == ["backend.test"]


async def test_a_certificate_of_an_unknown_issuer_is_refused(ca: trustme.CA) -> None:
    async with serving(trustme.CA().issue_cert("127.0.0.1"), ca) as (server, outbound):
        error = await failing(outbound, f"https://127.0.0.1:{server.port}/secret")
    assert error.kind is NetKind.TLS
    assert str(error) == "tls failed for 127.0.0.1"
    assert server.requests == []


@pytest.mark.parametrize("name", ["backend.test", "127.0.0.2"])
async def test_a_certificate_of_another_host_is_refused(ca: trustme.CA, name: str) -> None:
    async with serving(ca.issue_cert(name), ca) as (server, outbound):
        error = await failing(outbound, f"https://127.0.0.1:{server.port}")
    assert error.kind is NetKind.TLS
    assert server.requests == []


async def test_a_certificate_that_has_expired_is_refused(ca: trustme.CA) -> None:
    now = datetime.datetime.now(datetime.UTC)
    certificate = ca.issue_cert("127.0.0.1", not_before=now - 2 * YEAR, not_after=now - YEAR)
    async with serving(certificate, ca) as (server, outbound):
        error = await failing(outbound, f"https://127.0.0.1:{server.port}")
    assert error.kind is NetKind.TLS
    assert server.requests == []


async def test_large_bodies_go_both_ways(ca: trustme.CA) -> None:
    async with serving(ca.issue_cert("127.0.0.1"), ca) as (server, outbound):
        body = bytes(range(256)) * (12 * 1024)
        server.answer = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)
        answer = await outbound.open(
            "POST", f"https://127.0.0.1:{server.port}/x", headers={}, body=body, deadlines=LATER
        )
        assert await answer.read_all() == body
        answer.release()
        assert server.requests == [body]


async def test_a_reader_that_stalls_makes_the_other_side_wait(ca: trustme.CA, transport: str) -> None:
    async with serving(ca.issue_cert("127.0.0.1"), ca) as (server, outbound):
        size = 30 * MEBI
        server.answer = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (size, bytes(size))
        answer = await outbound.open(
            "GET", f"https://127.0.0.1:{server.port}/x", headers={}, body=None, deadlines=LATER
        )
        if transport == "native":
            (connection,) = outbound.native._all
            await until(lambda: connection._is_paused)
        got = 0
        while part := await answer.read():
            assert len(part) <= 64 * 1024
            got += len(part)
        answer.release()
        assert got == size
        assert await get(outbound, server)


async def test_an_aborted_answer_is_noticed_at_once_on_the_other_side(ca: trustme.CA) -> None:
    async with serving(ca.issue_cert("127.0.0.1"), ca) as (server, outbound):
        server.answer = b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nsome"
        answer = await outbound.open(
            "GET", f"https://127.0.0.1:{server.port}/x", headers={}, body=None, deadlines=LATER
        )
        assert await answer.read() == b"some"
        answer.close()
        await until(lambda: server.closed == 1)


async def test_a_body_is_cut_when_its_connection_ends_early(ca: trustme.CA) -> None:
    async with serving(ca.issue_cert("127.0.0.1"), ca) as (server, outbound):
        server.answer, server.hangs_up = b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nsome", True
        answer = await outbound.open(
            "GET", f"https://127.0.0.1:{server.port}/x", headers={}, body=None, deadlines=LATER
        )
        with pytest.raises(NetError) as caught:
            await answer.read_all()
        answer.release()
    assert caught.value.kind is NetKind.CUT


async def test_a_handshake_that_never_ends_is_given_up_with_its_connection() -> None:
    gone = asyncio.Event()

    async def peer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await peers.say_nothing(reader, writer)
        gone.set()

    async with peers.listening(peer) as port, calling() as outbound:
        error = await failing(outbound, f"https://127.0.0.1:{port}", Deadlines(0.05, 5.0, 5.0))
        assert error.kind is NetKind.CONNECT
        await until(gone.is_set)
        assert outbound.native.statistics() == {"open": 0, "idle": 0}
