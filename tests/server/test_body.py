"""Bodies over real sockets: every coding, every lie about one, limits and deadlines."""

import asyncio
import gzip
import random
import sys
import threading
import tracemalloc
import zlib
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from unittest import mock

import aiohttp
import brotli
import pytest
from aiohttp import web
from aiohttp.test_utils import make_mocked_request

from codex_proxy.config import Live, Settings
from codex_proxy.errors import ProxyError, RequestError
from codex_proxy.protocol.wire import dumps
from codex_proxy.server import body as body_module
from codex_proxy.server.access import Access, Level
from codex_proxy.server.app import SERVER_OPTIONS, Route, build_app
from codex_proxy.server.body import PATIENCE, Patience, content_codings, inflate, read_body

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

JSON = b'{"input":"' + b"caf\xc3\xa9 " * 400 + b'"}'


def raw_deflate(data: bytes) -> bytes:
    packer = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    return packer.compress(data) + packer.flush()


def packed_gzip(data: bytes) -> bytes:
    return gzip.compress(data, mtime=0)


def size_of(value: bytes | str | None) -> str | None:
    """Name a parameter: bytes by their number, the rest as pytest would."""
    return f"{len(value)}B" if isinstance(value, bytes) else None


def streamed_zstd(data: bytes) -> bytes:
    """Compress as a stream does: without knowing the size beforehand."""
    packer = zstd.ZstdCompressor()
    return b"".join([packer.compress(data[:100]), packer.compress(data[100:]), packer.flush()])


PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "zstd": zstd.compress,
    "gzip": packed_gzip,
    "x-gzip": packed_gzip,
    "br": lambda data: bytes(brotli.compress(data, quality=3)),
    "deflate": zlib.compress,
}


def render(error: ProxyError, *, request_id: str) -> tuple[int, dict[str, str], bytes]:
    return error.status, {}, dumps({"code": error.code, "message": error.message})


class Place:
    """A server that answers with the body it read, or with the error."""

    def __init__(self, url: str, port: int) -> None:
        self.url = url
        self.port = port
        self.lost: list[BaseException] = []

    async def post(self, data: object, coding: str | None = None) -> tuple[int, bytes]:
        headers = {"Content-Encoding": coding} if coding is not None else {}
        async with (
            aiohttp.ClientSession(auto_decompress=False) as session,
            session.post(self.url, data=data, headers=headers) as answer,
        ):
            return answer.status, await answer.read()

    @asynccontextmanager
    async def socket(self, head: str) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        try:
            writer.write(head.replace("\n", "\r\n").encode() + b"\r\n\r\n")
            await writer.drain()
            yield reader, writer
        finally:
            writer.close()


@asynccontextmanager
async def place(
    limit: int = 100_000, patience: Patience = PATIENCE, *, cancels: bool = False
) -> AsyncIterator[Place]:
    async def echo(request: web.Request) -> web.StreamResponse:
        try:
            return web.Response(body=await read_body(request, limit=limit, patience=patience))
        except (ConnectionError, asyncio.CancelledError) as exc:
            here.lost.append(exc)
            raise

    routes = (Route("POST", "/echo", "echo", Level.PUBLIC),)
    app = build_app(Access(Live(Settings())), {"echo": echo}, {"openai": render}, routes)
    options = {**SERVER_OPTIONS, "lingering_time": 0.02, "handler_cancellation": cancels}
    runner = web.ServerRunner(app.server(**options))
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    port: int = runner.addresses[0][1]
    here = Place(f"http://127.0.0.1:{port}/echo", port)
    try:
        yield here
    finally:
        await runner.cleanup()


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Record of each inflation whether it ran beside the loop."""
    seen: list[bool] = []

    def spy(raw: bytes, codings: list[str], limit: int) -> bytes:
        seen.append(threading.current_thread() is not threading.main_thread())
        return inflate(raw, codings, limit)

    monkeypatch.setattr(body_module, "inflate", spy)
    return seen


@pytest.mark.parametrize(
    ("coding", "data"),
    [
        *((name, packer(JSON)) for name, packer in PACKERS.items()),
        ("GZIP", packed_gzip(JSON)),
        ("deflate", raw_deflate(JSON)),
        ("zstd", streamed_zstd(JSON)),
        ("zstd", zstd.compress(JSON[:50]) + zstd.compress(JSON[50:])),
        ("zstd", b"\x50\x2a\x4d\x18\x04\x00\x00\x00note" + zstd.compress(JSON)),
        ("gzip", packed_gzip(JSON[:50]) + packed_gzip(JSON[50:]) + b"\0" * 40_000),
        ("gzip, zstd", zstd.compress(packed_gzip(JSON))),
        ("br,identity , deflate", zlib.compress(brotli.compress(JSON))),
        ("identity", JSON),
        ("", JSON),
        (None, JSON),
    ],
    ids=size_of,
)
async def test_every_coding_is_undone(coding: str | None, data: bytes) -> None:
    async with place() as here:
        assert await here.post(data, coding) == (200, JSON)


@pytest.mark.parametrize(
    ("coding", "data"),
    [
        *((name, JSON) for name in PACKERS),
        *((name, b" \n[1]") for name in PACKERS),
        ("zstd", packed_gzip(JSON)),
        ("gzip", zstd.compress(JSON)),
        (None, packed_gzip(JSON)),
        (None, zstd.compress(JSON)),
        ("identity", zstd.compress(JSON)),
        ("gzip, zstd", packed_gzip(JSON)),
    ],
    ids=size_of,
)
async def test_a_wrong_label_does_no_harm(coding: str | None, data: bytes) -> None:
    plain = JSON if data is not JSON and data[:1] != b" " else data
    async with place() as here:
        assert await here.post(data, coding) == (200, plain)


@pytest.mark.parametrize("coding", PACKERS)
async def test_an_empty_body_is_empty_whatever_its_label(coding: str) -> None:
    async with place() as here:
        assert await here.post(b"", coding) == (200, b"")


@pytest.mark.parametrize("coding", ["gzip", "zstd", "br", "deflate"])
def test_a_body_may_be_cut_nowhere(coding: str) -> None:
    whole = PACKERS[coding](JSON)
    for size in range(1, len(whole)):
        with pytest.raises(RequestError) as caught:
            inflate(whole[:size], [coding], 100_000)
        assert (caught.value.status, caught.value.code) == (400, "invalid_body")
    assert inflate(whole, [coding], 100_000) == JSON


@pytest.mark.parametrize(
    ("coding", "data"),
    [
        ("gzip", b"not gzip"),
        ("zstd", b"not zstd"),
        ("br", b"\xff\xff\xff"),
        ("deflate", b"\xff\xff\xff"),
        ("gzip", packed_gzip(JSON) + b"more"),
        ("zstd", zstd.compress(JSON) + b"more"),
        ("br", brotli.compress(JSON) + b"more"),
        ("br", brotli.compress(JSON) + b"more" * 20_000),
        ("deflate", zlib.compress(JSON) + b"more"),
        ("zstd", b"\x50\x2a\x4d\x18\x00\x00\x00\x00" * 5000),
        ("zstd", zstd.compress(b"x" * 50_000, options={zstd.CompressionParameter.window_log: 27})[:-1]),
    ],
    ids=size_of,
)
async def test_a_broken_coding_is_the_callers_fault(coding: str, data: bytes) -> None:
    async with place() as here:
        status, answer = await here.post(data, coding)
    assert status == 400
    assert b"invalid_body" in answer


def test_a_frame_may_not_ask_for_a_huge_window() -> None:
    packer = zstd.ZstdCompressor(options={zstd.CompressionParameter.window_log: 27})
    frame = packer.compress(b"x") + packer.flush()
    with pytest.raises(RequestError) as caught:
        inflate(frame, ["zstd"], 1000)
    assert caught.value.status == 400


@pytest.mark.parametrize("coding", ["compress", "gzip, lzma", "zstd;q=1", "aws-chunked"])
async def test_an_unknown_coding_is_refused(coding: str) -> None:
    async with place() as here:
        status, answer = await here.post(JSON, coding)
    assert status == 415
    assert b"unsupported_content_encoding" in answer


def test_codings_are_not_stacked_without_end() -> None:
    assert content_codings(["gzip, br", "identity", " zstd"]) == ["gzip", "br", "zstd"]
    with pytest.raises(RequestError):
        content_codings(["gzip," * 5])


@pytest.mark.parametrize("coding", ["gzip", "zstd", "br", "deflate"])
def test_a_bomb_is_never_inflated_past_the_limit(coding: str) -> None:
    size, limit = 40_000_000, 200_000
    bomb = PACKERS[coding](bytes(size))
    window = len(bomb) + 1_000_000  # what the library keeps for itself
    tracemalloc.start()
    try:
        with pytest.raises(RequestError) as caught:
            inflate(bomb, [coding], limit)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert caught.value.status == 413
    assert peak < 2 * (limit + 64 * 1024) + window


@pytest.mark.parametrize("coding", ["gzip", "zstd", "br", "deflate"])
async def test_the_limit_counts_inflated_bytes_to_the_byte(coding: str) -> None:
    async with place(limit=5000) as here:
        fits, over = PACKERS[coding](b"[" + b" " * 4998 + b"]"), PACKERS[coding](b"[" + b" " * 4999 + b"]")
        assert (await here.post(fits, coding))[0] == 200
        assert (await here.post(over, coding))[0] == 413


async def test_the_limit_counts_plain_bytes_to_the_byte() -> None:
    async def chunks(size: int) -> AsyncIterator[bytes]:
        for start in range(0, size, 1000):
            yield b"x" * min(1000, size - start)

    async with place(limit=5000) as here:
        assert await here.post(b"x" * 5000) == (200, b"x" * 5000)
        assert await here.post(chunks(5000)) == (200, b"x" * 5000)
        for data in (b"x" * 5001, chunks(5001)):
            status, answer = await here.post(data)
            assert status == 413
            assert b"request_too_large" in answer
            assert b"max-body-bytes" in answer


async def test_a_declared_length_past_the_limit_is_refused_unread() -> None:
    async with (
        place() as here,
        here.socket("POST /echo HTTP/1.1\nHost: x\nContent-Length: 100001") as (reader, _),
    ):
        head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 5)
    assert head.startswith(b"HTTP/1.1 413 ")
    assert b"connection: close" in head.lower()


async def test_small_inflations_stay_on_the_loop_and_big_ones_leave_it(threads: list[bool]) -> None:
    noise = random.Random(1).randbytes(300_000)
    big = b"[" + b" " * 1_100_000 + b"]"
    async with place(limit=2_000_000) as here:
        assert (await here.post(packed_gzip(JSON), "gzip"))[0] == 200
        assert threads == [False]
        # Much input.
        assert await here.post(packed_gzip(noise), "gzip") == (200, noise)
        assert threads == [False, True]
        # Little input that becomes much: given up on the loop after the first part.
        assert await here.post(zstd.compress(big), "zstd") == (200, big)
        assert threads == [False, True, False, True]


async def test_a_stalled_body_is_answered_and_closed() -> None:
    async with (
        place(patience=Patience(stall=0.02)) as here,
        here.socket("POST /echo HTTP/1.1\nHost: x\nContent-Length: 10") as (reader, writer),
    ):
        writer.write(b"12345")
        # All there is to read until the end: the connection closes at once, not after a linger.
        answer = await asyncio.wait_for(reader.read(), 2)
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b"request_timeout" in answer


async def test_a_dripping_body_is_answered_and_closed() -> None:
    async def drip(writer: asyncio.StreamWriter) -> None:
        while True:
            writer.write(b"x")
            await asyncio.sleep(0.002)

    async with (
        place(patience=Patience(stall=5, grace=0.03, pace=1e6)) as here,
        here.socket("POST /echo HTTP/1.1\nHost: x\nContent-Length: 90000") as (reader, writer),
        asyncio.TaskGroup() as group,
    ):
        dripping = group.create_task(drip(writer))
        head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 2)
        dripping.cancel()
    assert head.startswith(b"HTTP/1.1 408 ")


async def test_a_body_in_pieces_at_a_fair_pace_is_read() -> None:
    async with (
        place(patience=Patience(stall=5, grace=0.0, pace=10)) as here,
        here.socket("POST /echo HTTP/1.1\nHost: x\nContent-Length: 20\nConnection: close") as (
            reader,
            writer,
        ),
    ):
        for _ in range(4):
            writer.write(b"12345")
            await asyncio.sleep(0.002)
        answer = await asyncio.wait_for(reader.read(), 2)
    assert answer.startswith(b"HTTP/1.1 200 ")
    assert answer.endswith(b"12345" * 4)


async def test_a_caller_who_waits_is_asked_for_the_body() -> None:
    head = "POST /echo HTTP/1.1\nHost: x\nContent-Length: 5\nExpect: 100-continue\nConnection: close"
    async with place() as here, here.socket(head) as (reader, writer):
        go_on = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 2)
        writer.write(b"[1,2]")
        answer = await asyncio.wait_for(reader.read(), 2)
    assert go_on == b"HTTP/1.1 100 Continue\r\n\r\n"
    assert answer.startswith(b"HTTP/1.1 200 ")
    assert answer.endswith(b"[1,2]")


async def test_a_caller_who_waits_with_too_much_is_not_asked_for_it() -> None:
    head = "POST /echo HTTP/1.1\nHost: x\nContent-Length: 200000\nExpect: 100-continue"
    async with place() as here, here.socket(head) as (reader, _):
        first = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 2)
    assert first.startswith(b"HTTP/1.1 413 ")
    assert b"connection: close" in first.lower()


async def test_broken_framing_ends_by_the_deadline() -> None:
    """The compiled parser tells nobody that a chunk is none; the body just does not go on."""
    head = "POST /echo HTTP/1.1\nHost: x\nTransfer-Encoding: chunked"
    async with place(patience=Patience(stall=0.02)) as here, here.socket(head) as (reader, writer):
        writer.write(b"5\r\n[1,2]\r\n")
        await writer.drain()
        await asyncio.sleep(0.005)
        writer.write(b"no length\r\n")
        answer = await asyncio.wait_for(reader.read(), 2)
    assert answer.startswith(b"HTTP/1.1 408 ")


async def test_broken_framing_that_is_noticed_is_the_callers_fault() -> None:
    protocol = mock.Mock()
    content = aiohttp.StreamReader(protocol, 2**16, loop=asyncio.get_running_loop())
    content.set_exception(web.RequestPayloadError("bad chunk"))
    request = make_mocked_request("POST", "/echo", payload=content)
    with pytest.raises(RequestError) as caught:
        await read_body(request, limit=10)
    assert (caught.value.status, caught.value.code) == (400, "invalid_body")


@pytest.mark.parametrize("cancels", [True, False])
async def test_a_caller_who_leaves_in_the_middle_is_no_error(
    cancels: bool, caplog: pytest.LogCaptureFixture
) -> None:
    async with place(cancels=cancels) as here:
        async with here.socket("POST /echo HTTP/1.1\nHost: x\nContent-Length: 10") as (_, writer):
            writer.write(b"123")
            await writer.drain()
            await asyncio.sleep(0.01)
        for _ in range(200):
            if here.lost:
                break
            await asyncio.sleep(0.005)
    assert len(here.lost) == 1
    assert not caplog.records
