"""Both transports over the same bytes: what they see is the same, or the table of scripts says why it is not."""

import asyncio
import contextlib
import dataclasses
import itertools
import socket
import struct
from collections.abc import AsyncIterator, Iterable, Sequence

import pytest

from codex_proxy.config import TRANSPORTS, Live, Settings
from codex_proxy.net import Deadlines, NetError, NetKind, Outbound
from tests.net import peers, scripts
from tests.net.peers import calling, listening
from tests.net.scripts import Case, Seen

PATIENT = Deadlines(5.0, 5.0, 5.0)
HASTY = Deadlines(5.0, 0.15, 0.15)
"""For those that wait for what will never come."""

NEXT = b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nnext"


@pytest.fixture(params=TRANSPORTS, autouse=True)
def transport(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run each test over each transport."""
    name: str = request.param
    monkeypatch.setattr(peers, "transport", name)
    return name


class Scripted:
    """Another side that answers with a script, piece by piece, and all that follows with `NEXT`."""

    def __init__(self) -> None:
        self.pieces: Sequence[bytes] = ()
        self.ends = False
        self.port = 0
        self._spoken = True
        self.by: list[int] = []
        """Which connection each request came on."""
        self._connections = itertools.count()

    def load(self, pieces: Sequence[bytes], *, ends: bool) -> None:
        """Answer the next request with *pieces*."""
        self.pieces, self.ends, self._spoken = pieces, ends, False

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        number = next(self._connections)
        while True:
            await reader.readuntil(b"\r\n\r\n")
            self.by.append(number)
            if self._spoken:
                writer.write(NEXT)
                continue
            self._spoken = True
            for piece in self.pieces:
                writer.write(piece)
                # Both sides share the loop: at the second turn the other one has read it.
                await asyncio.sleep(0)
                await asyncio.sleep(0)
            if self.ends:
                return


@contextlib.asynccontextmanager
async def speaking() -> AsyncIterator[tuple[Scripted, Outbound]]:
    scripted = Scripted()
    async with listening(scripted) as scripted.port, calling() as outbound:
        yield scripted, outbound


async def exchange(
    outbound: Outbound, scripted: Scripted, case: Case, pieces: Sequence[bytes]
) -> tuple[Seen, dict[str, str], bytes]:
    """Run a script; return what was seen, the head, and the body of the next answer."""
    scripted.load(pieces, ends=case.ends)
    url = f"http://127.0.0.1:{scripted.port}/x"
    hangs = peers.transport == "aiohttp" and any(seen.kind is NetKind.TIMEOUT for seen in case.aiohttp)
    deadlines = HASTY if hangs else PATIENT
    status, headers, body, kind = None, dict[str, str](), b"", None
    try:
        # Not GET, which is sent again when it got no answer.
        method = "POST" if case.method == "GET" else case.method
        answer = await outbound.open(method, url, headers={}, body=None, deadlines=deadlines)
        status, headers = answer.status, dict(answer.headers)
        try:
            while part := await answer.read():
                body += part
        finally:
            answer.release()
    except NetError as exc:
        kind = exc.kind
    # Until whatever comes late has come.
    for _ in range(4):
        await asyncio.sleep(0)
    before = scripted.by[-1]
    try:
        following = (await outbound.fetch("GET", url, headers={})).body
    except NetError:
        following = b"lost"
    return Seen(status, body, kind, again=scripted.by[-1] == before), headers, following


def expected(case: Case, transport: str) -> set[Seen]:
    # What aiohttp makes of a script may depend on what comes in one read; else it is as with ours.
    return {case.sees, *case.also, *(case.aiohttp if transport == "aiohttp" else ())}


async def check(
    outbound: Outbound, scripted: Scripted, case: Case, pieces: Sequence[bytes], transport: str
) -> None:
    seen, headers, following = await exchange(outbound, scripted, case, pieces)
    assert seen in expected(case, transport), [len(piece) for piece in pieces]
    if transport == "native" or not case.aiohttp:
        assert following == b"next"
    else:
        # Its connections may be one answer behind from now on.
        await outbound.aclose()
    if seen.status is not None:
        assert {name: headers.get(name) for name, _ in case.headers} == dict(case.headers)


def split(script: bytes, at: Iterable[int]) -> list[bytes]:
    cuts = [0, *at, len(script)]
    return [script[start:end] for start, end in itertools.pairwise(cuts)]


@pytest.mark.parametrize("case", scripts.ALL, ids=str)
async def test_a_script_is_seen_as_the_table_says(case: Case, transport: str) -> None:
    """At once, and byte by byte."""
    async with speaking() as (scripted, outbound):
        await check(outbound, scripted, case, [case.script], transport)
        # What is long is so for its length: its start and its end are cut up.
        size = len(case.script)
        cuts = [*range(1, min(size, 300)), *range(max(size - 50, 300), size)]
        await check(outbound, scripted, case, split(case.script, cuts), transport)


CUT_UP = [
    case
    for case in scripts.WHOLE
    if case.name in {"a length", "trailers", "103 twice before", "gzip", "to the end"}
]


@pytest.mark.parametrize("case", CUT_UP, ids=str)
async def test_where_an_answer_is_cut_up_makes_no_difference(case: Case, transport: str) -> None:
    async with speaking() as (scripted, outbound):
        for cut in range(1, len(case.script)):
            await check(outbound, scripted, case, split(case.script, [cut]), transport)


@pytest.mark.long
@pytest.mark.parametrize("case", [case for case in scripts.ALL if len(case.script) < 1000], ids=str)
async def test_where_a_script_is_cut_up_makes_no_difference(case: Case, transport: str) -> None:
    async with speaking() as (scripted, outbound):
        for cut in range(1, len(case.script)):
            await check(outbound, scripted, case, split(case.script, [cut]), transport)


ENDING = ["a length", "trailers", "100 before", "to the end", "gzip in chunks"]


@pytest.mark.parametrize("case", [case for case in scripts.WHOLE if case.name in ENDING], ids=str)
async def test_an_answer_that_ends_early_is_cut_wherever_it_ends(case: Case) -> None:
    whole = case.script
    head = whole.index(b"\r\n\r\n", whole.rindex(b"HTTP/1.1")) + 4
    async with speaking() as (scripted, outbound):
        for end in range(len(whole)):
            early = dataclasses.replace(case, ends=True, aiohttp=())
            seen, _, following = await exchange(outbound, scripted, early, [whole[:end]])
            assert following == b"next"
            assert not seen.again
            assert case.sees.body.startswith(seen.body)
            if end < head:
                assert seen == Seen(None, kind=NetKind.CUT)
            else:
                # Where nothing but the end of the connection ends a body, no end is early.
                assert (seen.status, seen.kind) == (200, None if case.ends else NetKind.CUT)


async def test_a_reset_ends_no_body(transport: str) -> None:
    """Not even one that only the end of its connection ends; aiohttp's client takes the one for the other."""

    async def peer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\n\r\nhello")
        await read.wait()
        # Closing resets it.
        writer.get_extra_info("socket").setsockopt(
            socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)
        )
        writer.transport.abort()

    read = asyncio.Event()
    async with listening(peer) as port, calling() as outbound:
        answer = await outbound.open(
            "POST", f"http://127.0.0.1:{port}/x", headers={}, body=None, deadlines=PATIENT
        )
        assert await answer.read() == b"hello"
        read.set()
        kind = None
        try:
            assert await answer.read() == b""
        except NetError as exc:
            kind = exc.kind
        assert kind is (NetKind.CUT if transport == "native" else None)
        answer.release()


async def test_the_setting_says_what_carries_a_call_and_counts_at_once(transport: str) -> None:
    async def peer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(NEXT)

    async with listening(peer) as port:
        live = Live(Settings(upstream_transport=transport))
        outbound = Outbound(live)
        for name in (transport, *(one for one in TRANSPORTS if one != transport)):
            live.replace(Settings(upstream_transport=name))
            assert (await outbound.fetch("GET", f"http://127.0.0.1:{port}", headers={})).body == b"next"
            assert bool(outbound.native.statistics()["open"]) is (name == "native")
            assert bool(outbound.aiohttp._sessions) is (name == "aiohttp")
            await outbound.aclose()


async def test_how_long_the_head_took_is_told_of_a_new_connection_only() -> None:
    async def peer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            await reader.readuntil(b"\r\n\r\n")
            await asyncio.sleep(0.02)
            writer.write(NEXT)

    told: list[float | None] = []
    async with listening(peer) as port, calling() as outbound:
        for _ in range(2):
            answer = await outbound.open(
                "GET", f"http://127.0.0.1:{port}/x", headers={}, body=None, deadlines=PATIENT
            )
            told.append(answer.head_seconds)
            await answer.read_all()
            answer.release()
    first, second = told
    assert first is not None
    assert 0.015 < first < 2.0
    assert second is None
