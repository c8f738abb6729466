"""WebSockets go through: bytes in both directions, whatever they say."""

import asyncio

import pytest

from tests.forwarder.desk import desk, fields, lines, until

ASKED = (
    b"GET /v1/responses HTTP/1.1\r\nHost: near\r\nConnection: keep-alive, Upgrade\r\nUpgrade: websocket\r\n"
    b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
    b"Sec-WebSocket-Extensions: permessage-deflate\r\nAuthorization: Bearer theirs\r\n\r\n"
)
SWITCHED = (
    b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n\r\n"
)


async def test_the_far_server_is_asked_as_the_caller_asks() -> None:
    async with desk() as d:
        caller, far, head = await d.ask(ASKED)
        assert lines(head)[2:] == [
            b"Sec-WebSocket-Version: 13",
            b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
            b"Sec-WebSocket-Extensions: permessage-deflate",
            b"Authorization: Bearer theirs",
            b"Connection: Upgrade",
            b"Upgrade: websocket",
        ]
        far.write(SWITCHED)
        answer = await caller.head()
        assert answer.startswith(b"HTTP/1.1 101 Switching Protocols\r\n")
        assert fields(answer) == {
            "upgrade": "websocket",
            "sec-websocket-accept": "s3pPLMBiTxaQ9kYGzzhZRbK+xOo=",
            "connection": "Upgrade",
        }


async def test_bytes_go_both_ways_in_turn() -> None:
    async with desk() as d:
        caller, far, _ = await d.ask(ASKED)
        far.write(SWITCHED + b"\x81\x05first")
        await caller.head()
        assert await caller.read(7) == b"\x81\x05first"
        for number in range(5):
            caller.write(b"up%d" % number)
            assert await far.read(3) == b"up%d" % number
            far.write(b"GET / HTTP/1.1\r\n\r\n" if number == 3 else b"down%d" % number)
            expected = b"GET / HTTP/1.1\r\n\r\n" if number == 3 else b"down%d" % number
            assert await caller.read(len(expected)) == expected


async def test_what_comes_right_behind_the_request_is_not_lost() -> None:
    async with desk() as d:
        caller, far, _ = await d.ask(ASKED + b"\x81\x85early")
        caller.write(b"later")
        far.write(SWITCHED)
        await caller.head()
        assert await far.read(12) == b"\x81\x85earlylater"


async def test_a_refusal_is_an_answer_and_the_connection_goes_on() -> None:
    async with desk() as d:
        caller, far, _ = await d.ask(ASKED)
        far.write(b"HTTP/1.1 426 Upgrade Required\r\nUpgrade: websocket\r\nContent-Length: 2\r\n\r\nno")
        assert lines(await caller.head())[:2] == [b"HTTP/1.1 426 Upgrade Required", b"Upgrade: websocket"]
        assert await caller.read(2) == b"no"
        caller.write(b"GET /v1/models HTTP/1.1\r\nHost: near\r\n\r\n")
        assert b"/v1/models" in await far.head()


@pytest.mark.parametrize("who", ["caller", "far"])
async def test_the_end_on_one_side_is_the_end_on_the_other(who: str) -> None:
    async with desk() as d:
        caller, far, _ = await d.ask(ASKED)
        far.write(SWITCHED)
        await caller.head()
        ends = (caller, far) if who == "caller" else (far, caller)
        ends[0].write(b"\x88\x02\x03\xe8")
        ends[0].close()
        assert await ends[1].rest() == b"\x88\x02\x03\xe8"
        await until(lambda: not d.forwarder._busy)
        assert d.forwarder._relays.statistics() == {"open": 0, "idle": 0}


@pytest.mark.asyncio(loop_factories=["asyncio"])
async def test_silence_ends_no_tunnel() -> None:
    async with desk(timeout=0.3) as d:
        caller, far, _ = await d.ask(ASKED)
        far.write(SWITCHED)
        await caller.head()
        await asyncio.sleep(0.5)
        caller.write(b"hello")
        assert await far.read(5) == b"hello"


@pytest.mark.parametrize("who", ["caller", "far"])
async def test_who_reads_slowly_slows_the_other_side_down(who: str) -> None:
    size = 12 * 1024 * 1024
    async with desk() as d:
        caller, far, _ = await d.ask(ASKED)
        far.write(SWITCHED)
        await caller.head()
        slow, fast = (caller, far) if who == "caller" else (far, caller)
        slow.writer.transport.pause_reading()  # type: ignore[attr-defined]
        fast.write(b"x" * size)
        await asyncio.sleep(0.1)
        (connection,) = d.forwarder._relays._all
        assert connection._wire is not None
        assert connection._wire.get_write_buffer_size() < 1024 * 1024
        # The other direction goes on meanwhile.
        slow.write(b"still here")
        assert await fast.read(10) == b"still here"
        slow.writer.transport.resume_reading()  # type: ignore[attr-defined]
        assert await slow.read(size) == b"x" * size


async def test_another_protocol_than_websockets_is_not_asked_for() -> None:
    async with desk() as d:
        _, _, head = await d.ask(
            b"GET /v1/x HTTP/1.1\r\nHost: near\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\n"
            b"HTTP2-Settings: AAMAAABkAAQ\r\n\r\n"
        )
        assert len(lines(head)) == 2
