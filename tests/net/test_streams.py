"""Bodies that are large, slow, or in each other's way, over our own transport."""

import asyncio
import contextlib
import gzip
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Self

import brotli
import pytest

from codex_proxy.net import Deadlines, NetError, NetKind, Outbound, native, wheel
from codex_proxy.net.answer import READ_SIZE
from codex_proxy.net.native import HIGH_WATER, NativeAnswer
from tests.net.peers import LATER, calling, listening, until

MEBI = 1024 * 1024
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"

Script = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@contextlib.asynccontextmanager
async def answered(script: Script, body: bytes | None = None) -> AsyncIterator[tuple[NativeAnswer, Outbound]]:
    """Ask another side that has read the head of the request when *script* begins."""

    async def peer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        await script(reader, writer)

    async with listening(peer) as port, calling() as outbound:
        answer = await outbound.open(
            "POST", f"http://127.0.0.1:{port}/x", headers={}, body=body, deadlines=LATER
        )
        assert isinstance(answer, NativeAnswer)
        try:
            yield answer, outbound
        finally:
            answer.close()


class Turns:
    """How often others had their turn."""

    def __init__(self) -> None:
        self.count = 0
        self._loop = asyncio.get_running_loop()
        self._ends = False

    def _turn(self) -> None:
        if not self._ends:
            self.count += 1
            self._loop.call_soon(self._turn)

    def __enter__(self) -> Self:
        self._turn()
        return self

    def __exit__(self, *_: object) -> None:
        self._ends = True


# -- large requests ------------------------------------------------------------------------


@pytest.mark.parametrize("size", [MEBI + 1, 5 * MEBI + 17])
async def test_a_large_body_goes_out_in_pieces_and_arrives_whole(size: int) -> None:
    body = (bytes(range(251)) * (size // 251 + 1))[:size]
    got: list[bytes] = []

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        got.append(await reader.readexactly(size))
        writer.write(OK)

    async with answered(script, body) as (answer, outbound):
        assert await answer.read_all() == b"ok"
        assert got[0] == body
        assert outbound.native.statistics() == {"open": 1, "idle": 1}


async def test_others_have_their_turn_while_a_large_body_goes_out(monkeypatch: pytest.MonkeyPatch) -> None:
    pieces = 0
    write = native._Connection._send_piece

    def counted(self: native._Connection) -> None:
        nonlocal pieces
        pieces += 1
        write(self)

    monkeypatch.setattr(native._Connection, "_send_piece", counted)

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readexactly(20 * MEBI)
        writer.write(OK)

    with Turns() as turns:
        async with answered(script, bytes(20 * MEBI)) as (answer, _):
            assert await answer.read_all() == b"ok"
    # However fast the other side reads, no turn hands over more than a piece.
    assert pieces >= 20 * MEBI // native._PIECE_SIZE
    assert turns.count >= pieces


async def test_what_a_slow_side_has_not_taken_is_not_copied_meanwhile() -> None:
    taken = asyncio.Event()

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n")
        await taken.wait()
        await reader.readexactly(30 * MEBI)
        writer.write(b"ok")

    async with answered(script, bytes(30 * MEBI)) as (answer, outbound):
        (connection,) = outbound.native._all
        assert connection._wire is not None
        # As much as the kernel takes, and a piece; the rest waits where it is.
        await until(lambda: connection._is_full)
        assert connection._wire.get_write_buffer_size() <= native._PIECE_SIZE + HIGH_WATER
        taken.set()
        assert await answer.read_all() == b"ok"


@pytest.mark.parametrize("size", [MEBI, 8 * MEBI])
async def test_an_answer_that_comes_before_the_body_has_gone_is_told(size: int) -> None:
    closed = asyncio.Event()

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 413 Too Large\r\nContent-Length: 5\r\n\r\nlarge")
        try:
            # It drains what comes, as a friendly server does.
            while await reader.read(65_536):
                pass
        finally:
            closed.set()

    async with answered(script, bytes(size)) as (answer, outbound):
        assert (answer.status, await answer.read_all()) == (413, b"large")
        answer.release()
        if size > MEBI:
            # What was left of it never goes out, so nothing else can.
            await until(closed.is_set)
            assert outbound.native.statistics() == {"open": 0, "idle": 0}


async def test_an_early_answer_of_a_server_that_hangs_up_is_told_too() -> None:
    async def script(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 413 Too Large\r\nContent-Length: 5\r\n\r\nlarge")

    for _ in range(10):
        async with answered(script, bytes(8 * MEBI)) as (answer, _):
            assert (answer.status, await answer.read_all()) == (413, b"large")


async def test_an_answer_may_stream_while_the_body_still_goes_out() -> None:
    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\none")
        await reader.readexactly(8 * MEBI)
        writer.write(b"two")

    async with answered(script, bytes(8 * MEBI)) as (answer, outbound):
        assert await answer.read_all() == b"onetwo"
        assert outbound.native.statistics() == {"open": 1, "idle": 1}


# -- large answers -------------------------------------------------------------------------


async def test_a_reader_that_stalls_makes_the_other_side_wait() -> None:
    total, sent = 40 * MEBI, 0

    async def script(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % total)
        piece = bytes(range(256)) * 256
        while sent < total:
            writer.write(piece)
            sent += len(piece)
            await writer.drain()

    async with answered(script) as (answer, outbound):
        (connection,) = outbound.native._all
        await until(lambda: connection._is_paused)
        before = -1
        while before != sent:
            before = sent
            await asyncio.sleep(0.02)
        # The kernel's buffers are full, and ours are small.
        assert sent < total
        assert HIGH_WATER < answer._size <= HIGH_WATER + READ_SIZE
        # One read is not enough to go on, half of it is.
        sizes = [len(await answer.read())]
        paused = [connection._is_paused]
        while connection._is_paused:
            sizes.append(len(await answer.read()))
            paused.append(connection._is_paused)
        assert paused == [True] * (len(paused) - 1) + [False]
        assert len(paused) > 1
        size = sum(sizes)
        assert answer._size <= HIGH_WATER // 2
        while part := await answer.read():
            assert len(part) <= READ_SIZE
            size += len(part)
        assert size == total
        assert outbound.native.statistics() == {"open": 1, "idle": 1}


async def test_a_stalled_answer_can_be_aborted() -> None:
    gone = asyncio.Event()

    async def script(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
        try:
            while True:
                writer.write(bytes(65_536))
                await writer.drain()
        finally:
            gone.set()

    async with answered(script) as (answer, outbound):
        (connection,) = outbound.native._all
        await until(lambda: connection._is_paused)
        answer.close()
        assert answer._size == 0
        await until(gone.is_set)


@pytest.mark.parametrize("coding", ["gzip", "br"])
async def test_a_bomb_is_decoded_no_faster_than_it_is_read(coding: str) -> None:
    size = 200 * MEBI
    data = gzip.compress(bytes(size), 1) if coding == "gzip" else brotli.compress(bytes(size), quality=1)

    async def script(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Encoding: %b\r\n\r\n" % coding.encode())
        writer.write(data)
        await writer.drain()

    async with answered(script) as (answer, _):
        for _ in range(100):
            part = await answer.read()
            assert 0 < len(part) <= READ_SIZE
        # All that is held is what came.
        assert answer._decoder is not None
        assert answer._size + len(answer._decoder._input) + len(answer._decoder._surplus) <= 4 * HIGH_WATER
        with pytest.raises(NetError, match="larger than"):
            await answer.read_all(MEBI)


# -- reading -------------------------------------------------------------------------------


def at_once(answer: NativeAnswer) -> bytes:
    """Read without giving the loop a turn; fail where it would."""
    reading = answer.read()
    try:
        reading.send(None)
    except StopIteration as end:
        data: bytes = end.value
        return data
    finally:
        reading.close()
    raise AssertionError("it waits")


async def test_all_pieces_of_one_read_are_handed_over_together_and_at_once() -> None:
    async def script(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        chunks = b"".join(b"1\r\n%c\r\n" % (97 + number % 26) for number in range(100))
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + chunks)
        await asyncio.sleep(0.02)
        writer.write(b"3\r\nend\r\n0\r\n\r\n")

    async with answered(script) as (answer, _):
        assert len(at_once(answer)) == 100
        assert answer.read_nowait() is None
        assert await answer.read() == b"end"
        assert at_once(answer) == b""
        assert answer.read_nowait() == b""


async def test_parts_that_came_one_by_one_are_read_together() -> None:
    async def script(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 240000\r\n\r\n")
        for number in range(40):
            writer.write(b"%c" % (65 + number) * 3000)
            await asyncio.sleep(0)
            await asyncio.sleep(0)

    async with answered(script) as (answer, outbound):
        (connection,) = outbound.native._all
        await until(lambda: connection._is_paused)
        first = at_once(answer)
        # Whole parts only, as many as fit.
        assert READ_SIZE - 3000 < len(first) <= READ_SIZE
        assert first == b"".join(b"%c" % (65 + number) * 3000 for number in range(len(first) // 3000))


class Timers:
    """A loop that counts the timers it is asked for."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self.count = 0

    def call_later(self, delay: float, callback: Callable[[], None]) -> asyncio.TimerHandle:
        self.count += 1
        return self._loop.call_later(delay, callback)

    def __getattr__(self, name: str) -> object:
        return getattr(self._loop, name)


async def test_a_read_that_waits_costs_no_timer_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    go_on, advanced = asyncio.Event(), list[float]()

    async def script(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
        while True:
            await go_on.wait()
            go_on.clear()
            writer.write(b"x")

    def counted(self: wheel.Wheel, deadline: float) -> None:
        advanced.append(deadline)
        advance(self, deadline)

    advance = wheel.Wheel.advance
    monkeypatch.setattr(wheel.Wheel, "advance", counted)
    async with answered(script) as (answer, _):
        timers = Timers(answer._loop)
        answer._loop = timers  # type: ignore[assignment]
        for _ in range(200):
            go_on.set()
            assert await answer.read(15.0) == b"x"
        assert timers.count == 0
        # The wheel's own timer was set for the call, and it may have been for the first read.
        assert len(advanced) <= 2
        go_on.set()
        assert await answer.read(0.9) == b"x"
        assert timers.count == 1


@pytest.mark.parametrize("short_seconds", [wheel.SHORT_SECONDS, 0.0])
async def test_a_deadline_is_kept_by_a_timer_or_by_the_wheel(
    monkeypatch: pytest.MonkeyPatch, short_seconds: float
) -> None:
    monkeypatch.setattr(native, "SHORT_SECONDS", short_seconds)

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
        await reader.read()

    loop = asyncio.get_running_loop()
    async with answered(script) as (answer, outbound):
        for wait in (0.05, 0.0, 0.02):
            began = loop.time()
            with pytest.raises(NetError, match=rf"no byte for {wait:g} s") as caught:
                await answer.read(wait)
            assert caught.value.kind is NetKind.TIMEOUT
            assert wait - 0.005 <= loop.time() - began < wait + 2.0
        assert len(outbound.native._wheel) == 1
    assert len(outbound.native._wheel) == 0


async def test_many_wait_on_one_timer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "SHORT_SECONDS", 0.0)
    looks = 0
    look = wheel.Wheel._look

    def counted(self: wheel.Wheel) -> None:
        nonlocal looks
        looks += 1
        look(self)

    monkeypatch.setattr(wheel.Wheel, "_look", counted)

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        await reader.read()

    async with listening(script) as port, calling() as outbound:

        async def one(wait: float) -> None:
            with pytest.raises(NetError) as caught:
                await outbound.open(
                    "POST",
                    f"http://127.0.0.1:{port}/x",
                    headers={},
                    body=None,
                    deadlines=Deadlines(5.0, wait, 5.0),
                )
            assert caught.value.kind is NetKind.TIMEOUT

        await asyncio.gather(*[one(0.2 + number / 1000) for number in range(50)])
        # They are due within a fifth of a tick, so two looks see to them all.
        assert looks <= 3
        assert len(outbound.native._wheel) == 0


async def test_nothing_waits_for_an_acknowledgement() -> None:
    """A small request on a kept connection, hundreds of times: one delayed packet each would be seconds."""

    async def peer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        sock = writer.get_extra_info("socket")
        while True:
            await reader.readuntil(b"\r\n\r\n")
            await reader.readexactly(3000)
            # As a peer does that delays its acknowledgements.
            if hasattr(socket, "TCP_QUICKACK"):
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 0)
            writer.write(OK)

    async with listening(peer) as port, calling() as outbound:
        loop = asyncio.get_running_loop()
        began = loop.time()
        for _ in range(200):
            answer = await outbound.open(
                "POST",
                f"http://127.0.0.1:{port}/x",
                headers={},
                body=bytes(3000),
                deadlines=LATER,
                may_repeat=True,
            )
            assert await answer.read_all() == b"ok"
        assert outbound.native.statistics() == {"open": 1, "idle": 1}
        # 200 times 40 ms is 8 s.
        assert loop.time() - began < 4.0
