"""A far server that speaks TLS: whom it has to be, and that bytes still pass both ways."""

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator

import pytest
import trustme

from tests.forwarder.desk import Desk, Far, fields, forwarding, wanted

LARGE = 3 * 1024 * 1024


@pytest.fixture(scope="module")
def ca() -> trustme.CA:
    return trustme.CA()


@contextlib.asynccontextmanager
async def secured(ca: trustme.CA, *trusted: trustme.CA, name: str = "127.0.0.1") -> AsyncIterator[Desk]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    ca.issue_cert(name).configure_cert(context)
    far = Far()
    server = await asyncio.start_server(far.on_connection, "127.0.0.1", 0, ssl=context, limit=LARGE)
    far.port = int(server.sockets[0].getsockname()[1])
    async with forwarding(wanted(f"https://127.0.0.1:{far.port}")) as forwarder:
        for one in trusted:
            one.configure_trust(forwarder._relays._tls)
        desk = Desk(far, forwarder)
        try:
            yield desk
        finally:
            desk.hang_up()
            server.close()
            for end in far.ends:
                end.abort()
            await asyncio.sleep(0)


async def test_bytes_pass_both_ways_on_a_connection_that_is_kept(ca: trustme.CA) -> None:
    body = bytes(range(256)) * (LARGE // 256)
    async with secured(ca, ca) as d:
        caller = await d.call()
        far = None
        for _ in range(2):
            caller.write(b"POST /v1/x HTTP/1.1\r\nHost: n\r\nContent-Length: %d\r\n\r\n" % LARGE + body)
            far = far or await d.far.take()
            await far.head()
            assert await far.read(LARGE) == body
            far.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % LARGE + body)
            await caller.head()
            assert await caller.read(LARGE) == body
        assert len(d.far.ends) == 1


async def test_a_caller_who_leaves_ends_it(ca: trustme.CA) -> None:
    async with secured(ca, ca) as d:
        caller, far, _ = await d.ask(b"GET /v1/x HTTP/1.1\r\nHost: n\r\n\r\n")
        caller.abort()
        assert await far.is_over()


@pytest.mark.parametrize("name", ["127.0.0.1", "elsewhere.test"])
async def test_a_server_that_is_not_the_one_that_was_meant_gets_nothing(ca: trustme.CA, name: str) -> None:
    trusted = [] if name == "127.0.0.1" else [ca]
    async with secured(ca, *trusted, name=name) as d:
        caller = await d.call(b"GET /v1/x HTTP/1.1\r\nHost: n\r\nAuthorization: Bearer secret\r\n\r\n")
        head = await caller.head()
        assert head.startswith(b"HTTP/1.1 502")
        assert b"upstream_unreachable" in await caller.read(int(fields(head)["content-length"]))
        assert d.far.ends == []
