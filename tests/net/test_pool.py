"""Our own transport's connections: which of them carry another exchange, and which are closed, and when."""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Callable

import pytest

from codex_proxy.net import Answer, Deadlines, NetError, NetKind, Outbound, connections, native
from codex_proxy.net.connections import AddrInfo
from tests.net.peers import LATER, calling, hang_up, listening, until

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


class Serving:
    """Another side that answers as it is told, and notes what came on which connection."""

    def __init__(self) -> None:
        self.port = 0
        self.seen: list[tuple[int, str]] = []
        """The connection's number and the method of each request."""
        self.opened = 0
        self.closed: list[int] = []
        self.writers: list[asyncio.StreamWriter] = []
        self.answers: list[bytes | None] = []
        """What to answer, in order; None hangs up instead. Then `OK`."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/x"

    @property
    def connections(self) -> list[int]:
        return [number for number, _ in self.seen]

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        number = self.opened
        self.opened += 1
        self.writers.append(writer)
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                self.seen.append((number, head.split(b" ", 1)[0].decode()))
                answer = self.answers.pop(0) if self.answers else OK
                if answer is None:
                    return
                writer.write(answer)
        finally:
            self.closed.append(number)


@contextlib.asynccontextmanager
async def serving() -> AsyncIterator[tuple[Serving, Outbound]]:
    peer = Serving()
    async with listening(peer) as peer.port, calling() as outbound:
        yield peer, outbound


async def ask(outbound: Outbound, peer: Serving, method: str = "GET", *, may_repeat: bool = False) -> bytes:
    answer = await outbound.open(
        method, peer.url, headers={}, body=None, deadlines=LATER, may_repeat=may_repeat
    )
    data = await answer.read_all()
    answer.release()
    return data


async def opened(outbound: Outbound, peer: Serving, method: str = "GET") -> Answer:
    return await outbound.open(method, peer.url, headers={}, body=None, deadlines=LATER)


HELD = b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\n"
"""An answer that ends with one byte more."""


async def idle(outbound: Outbound, count: int) -> None:
    """Wait until so many connections carry nothing."""
    await until(lambda: outbound.native.statistics()["idle"] == count)


async def several(outbound: Outbound, peer: Serving, count: int) -> list[Answer]:
    """Ask at the same time, so that each has a connection of its own."""
    return await asyncio.gather(*[opened(outbound, peer) for _ in range(count)])


class Ahead:
    """The loop's time, which a test can move; uvloop's cannot be, so the loop is ours."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        loop = asyncio.get_running_loop()
        real, self.seconds = loop.time, 0.0
        monkeypatch.setattr(loop, "time", lambda: real() + self.seconds)

    async def by(self, seconds: float) -> None:
        self.seconds += seconds
        for _ in range(5):
            await asyncio.sleep(0)


on_asyncio = pytest.mark.asyncio(loop_factories=["asyncio"])


# -- which one carries the next exchange ---------------------------------------------------


async def test_the_connection_used_last_is_used_next() -> None:
    async with serving() as (peer, outbound):
        peer.answers = [HELD] * 3
        await several(outbound, peer, 3)
        for count, number in enumerate((2, 0, 1)):
            peer.writers[number].write(b"x")
            await idle(outbound, count + 1)
        await ask(outbound, peer)
        await ask(outbound, peer)
        assert peer.connections[3:] == [1, 1]


async def test_an_answer_that_has_come_but_was_not_read_leaves_its_connection_in_order() -> None:
    async with serving() as (peer, outbound):
        answer = await opened(outbound, peer)
        answer.release()
        assert await ask(outbound, peer) == b"ok"
        assert peer.connections == [0, 0]


async def test_each_place_has_connections_of_its_own() -> None:
    async with serving() as (one, outbound), serving() as (other, _):
        for peer in (one, other, one, other):
            await ask(outbound, peer)
        assert (one.connections, other.connections) == ([0, 0], [0, 0])
        host = one.url.replace("127.0.0.1", "localhost")
        await (await outbound.open("GET", host, headers={}, body=None, deadlines=LATER)).read_all()
        assert one.opened == 2


async def test_a_request_that_may_not_be_repeated_never_meets_an_old_connection() -> None:
    async with serving() as (peer, outbound):
        await ask(outbound, peer)
        await ask(outbound, peer, "POST")
        await ask(outbound, peer, "POST", may_repeat=True)
        assert peer.connections == [0, 1, 1]


# -- which ones are closed -----------------------------------------------------------------


@pytest.mark.parametrize(
    "surplus", [b"x", b"\r\n", OK, b"HTTP/1.1 408 Request Timeout\r\nConnection: close\r\n\r\n"]
)
async def test_a_connection_on_which_something_comes_while_it_is_idle_is_closed(surplus: bytes) -> None:
    async with serving() as (peer, outbound):
        await ask(outbound, peer)
        peer.writers[0].write(surplus)
        await until(lambda: peer.closed == [0])
        assert outbound.native.statistics() == {"open": 0, "idle": 0}
        assert await ask(outbound, peer) == b"ok"
        assert peer.connections == [0, 1]


async def test_a_connection_that_the_other_side_closes_while_it_is_idle_is_forgotten() -> None:
    async with serving() as (peer, outbound):
        await ask(outbound, peer)
        peer.writers[0].close()
        await until(lambda: outbound.native.statistics()["open"] == 0)
        # Also for one that must not be sent twice.
        assert await ask(outbound, peer, "POST") == b"ok"
        assert peer.connections == [0, 1]


async def test_an_aborted_answer_is_noticed_at_once_on_the_other_side() -> None:
    async with serving() as (peer, outbound):
        peer.answers = [b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nsome"]
        answer = await opened(outbound, peer)
        answer.close()
        assert outbound.native.statistics()["idle"] == 0
        await until(lambda: peer.closed == [0])
        with pytest.raises(NetError) as caught:
            await answer.read()
        assert caught.value.kind is NetKind.CUT
        answer.close()
        answer.release()


async def test_what_was_not_read_when_an_answer_is_closed_never_looks_like_its_end() -> None:
    async with serving() as (peer, outbound):
        answer = await opened(outbound, peer)
        await idle(outbound, 1)
        answer.close()
        with pytest.raises(NetError) as caught:
            await answer.read()
        assert caught.value.kind is NetKind.CUT
        # One that was read stays at its end.
        answer = await opened(outbound, peer)
        assert await answer.read_all() == b"ok"
        answer.close()
        assert await answer.read() == b""


async def test_aborting_wakes_who_reads() -> None:
    async with serving() as (peer, outbound):
        peer.answers = [b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n"]
        answer = await opened(outbound, peer)
        reading = asyncio.gather(answer.read(), return_exceptions=True)
        await asyncio.sleep(0)
        answer.close()
        (error,) = await reading
        assert isinstance(error, NetError)
        assert error.kind is NetKind.CUT


async def test_a_cancelled_call_closes_its_connection() -> None:
    async with serving() as (peer, outbound):
        peer.answers = [b""]
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await opened(outbound, peer)
        await until(lambda: peer.closed == [0])
        assert outbound.native.statistics()["open"] == 0


async def test_a_call_that_times_out_closes_its_connection() -> None:
    async with serving() as (peer, outbound):
        peer.answers = [b"HTTP/1.1 200"]
        with pytest.raises(NetError):
            await outbound.open("GET", peer.url, headers={}, body=None, deadlines=Deadlines(5.0, 0.05, 5.0))
        await until(lambda: peer.closed == [0])


async def test_a_cancelled_read_loses_nothing_and_keeps_its_connection() -> None:
    async with serving() as (peer, outbound):
        peer.answers = [b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\none"]
        answer = await opened(outbound, peer)
        assert await answer.read() == b"one"
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01):
                await answer.read()
        peer.writers[0].write(b"two")
        assert await answer.read_all() == b"two"
        answer.release()
        assert outbound.native.statistics() == {"open": 1, "idle": 1}


# -- how many, and for how long --------------------------------------------------------------


async def test_only_so_many_are_kept_and_the_oldest_goes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "MAX_IDLE", 3)
    async with serving() as (peer, outbound):
        peer.answers = [HELD] * 5
        await several(outbound, peer, 5)
        for count, number in enumerate((4, 0, 1, 3, 2)):
            peer.writers[number].write(b"x")
            await idle(outbound, min(count + 1, 3))
        await until(lambda: sorted(peer.closed) == [0, 4])
        assert outbound.native.statistics() == {"open": 3, "idle": 3}


@on_asyncio
async def test_what_has_been_idle_for_too_long_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving() as (peer, outbound):
        ahead = Ahead(monkeypatch)
        await several(outbound, peer, 2)
        await idle(outbound, 2)
        await ahead.by(60)
        await ask(outbound, peer)
        await ahead.by(61)
        # The first is 121 s old, the other one 61.
        await until(lambda: len(peer.closed) == 1)
        assert outbound.native.statistics() == {"open": 1, "idle": 1}
        await ahead.by(61)
        await until(lambda: len(peer.closed) == 2)
        assert outbound.native.statistics() == {"open": 0, "idle": 0}
        assert len(outbound.native._wheel) == 0


@on_asyncio
async def test_an_old_connection_is_not_used_though_nobody_has_closed_it_yet(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with serving() as (peer, outbound):
        await ask(outbound, peer)
        ahead = Ahead(monkeypatch)
        ahead.seconds += 1000
        await ask(outbound, peer)
        assert peer.connections == [0, 1]


async def test_closing_closes_all_of_them_and_leaves_no_socket() -> None:
    async with serving() as (peer, outbound):
        peer.answers = [OK, OK, b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nsome"]
        answers = await several(outbound, peer, 3)
        await idle(outbound, 2)
        sockets = [
            connection._wire.get_extra_info("socket")
            for connection in outbound.native._all
            if connection._wire is not None
        ]
        assert len(sockets) == 3
        await outbound.aclose()
        assert [one.fileno() for one in sockets] == [-1] * 3
        assert outbound.native.statistics() == {"open": 0, "idle": 0}
        ends = await asyncio.gather(*[answer.read_all() for answer in answers], return_exceptions=True)
        # What has come whole can still be read.
        assert sorted(str(end) for end in ends) == ["b'ok'", "b'ok'", "the connection was lost"]
        # It opens new ones for who asks again.
        assert await ask(outbound, peer) == b"ok"


# -- a kept connection that is lost before a byte of an answer -----------------------------


async def test_a_request_that_meets_the_end_of_its_connection_is_sent_once_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(native, "STALE_SECONDS", 0.0)
    async with serving() as (peer, outbound):
        peer.answers = [OK, None]
        await ask(outbound, peer)
        assert await ask(outbound, peer, "POST", may_repeat=True) == b"ok"
        assert peer.seen == [(0, "GET"), (0, "POST"), (1, "POST")]


async def test_it_is_sent_once_more_only_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "STALE_SECONDS", 0.0)
    async with serving() as (peer, outbound):
        await several(outbound, peer, 2)
        await idle(outbound, 2)
        peer.answers = [None, None]
        with pytest.raises(NetError) as caught:
            await ask(outbound, peer, "POST", may_repeat=True)
        assert caught.value.kind is NetKind.CUT
        # Not on the other kept one, which may be as old.
        (_, first), (_, then) = [(method, number) for number, method in peer.seen if method == "POST"]
        assert first in (0, 1)
        assert then == 2


async def test_nothing_is_sent_again_after_a_byte_of_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "STALE_SECONDS", 0.0)

    requests: list[bytes] = []

    async def peer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        requests.append(await reader.readuntil(b"\r\n\r\n"))
        writer.write(OK)
        requests.append(await reader.readuntil(b"\r\n\r\n"))
        writer.write(b"H")

    async with listening(peer) as port, calling() as outbound:
        url = f"http://127.0.0.1:{port}/x"
        await outbound.fetch("GET", url, headers={})
        with pytest.raises(NetError) as caught:
            await outbound.open("POST", url, headers={}, body=b"{}", deadlines=LATER, may_repeat=True)
        assert caught.value.kind is NetKind.CUT
        assert len(requests) == 2


async def test_what_is_lost_right_after_an_answer_is_lost_because_of_what_was_asked() -> None:
    async with serving() as (peer, outbound):
        peer.answers = [OK, None]
        await ask(outbound, peer)
        with pytest.raises(NetError) as caught:
            await ask(outbound, peer, "POST", may_repeat=True)
        assert caught.value.kind is NetKind.CUT
        assert peer.connections == [0, 0]


async def test_a_silent_connection_is_no_reason_to_send_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "STALE_SECONDS", 0.0)
    async with serving() as (peer, outbound):
        peer.answers = [OK, b""]
        await ask(outbound, peer)
        with pytest.raises(NetError) as caught:
            await outbound.open(
                "POST",
                peer.url,
                headers={},
                body=None,
                deadlines=Deadlines(5.0, 0.05, 5.0),
                may_repeat=True,
            )
        assert caught.value.kind is NetKind.TIMEOUT
        assert peer.connections == [0, 0]


async def test_a_connection_that_is_closed_as_soon_as_it_is_there_is_a_cut() -> None:
    async with listening(hang_up) as port, calling() as outbound:
        for _ in range(20):
            with pytest.raises(NetError) as caught:
                await outbound.open(
                    "POST", f"http://127.0.0.1:{port}", headers={}, body=b"x", deadlines=LATER
                )
            assert caught.value.kind is NetKind.CUT
        assert outbound.native.statistics()["idle"] == 0


# -- new connections -------------------------------------------------------------------------


def addresses(*hosts: tuple[str, int]) -> Callable[[str, int], object]:
    async def resolve(_: str, port: int) -> list[AddrInfo]:
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (host, other or port)) for host, other in hosts]

    return resolve


async def test_the_next_address_is_tried_when_one_refuses() -> None:
    async with listening(hang_up) as refused:
        pass
    async with serving() as (peer, outbound):
        outbound.native.resolve = addresses(("127.0.0.1", refused), ("127.0.0.1", 0))  # type: ignore[assignment]
        url = peer.url.replace("127.0.0.1", "backend.invalid")
        assert (await outbound.fetch("GET", url, headers={})).body == b"ok"


async def test_an_address_that_says_nothing_is_overtaken_by_the_next() -> None:
    full = socket.socket()
    full.bind(("127.0.0.1", 0))
    # A queue that is full takes no more, and says nothing.
    full.listen(0)
    fillers = [socket.socket() for _ in range(4)]
    try:
        for filler in fillers:
            filler.setblocking(False)
            filler.connect_ex(full.getsockname())
        async with serving() as (peer, outbound):
            outbound.native.resolve = addresses(  # type: ignore[assignment]
                ("127.0.0.1", full.getsockname()[1]), ("127.0.0.1", 0)
            )
            url = peer.url.replace("127.0.0.1", "backend.invalid")
            assert (await outbound.fetch("GET", url, headers={})).body == b"ok"
    finally:
        for one in (full, *fillers):
            one.close()


async def test_many_who_ask_at_once_ask_the_resolver_once() -> None:
    asked: list[str] = []
    go_on = asyncio.Event()
    async with serving() as (peer, outbound):

        async def resolve(host: str, port: int) -> list[AddrInfo]:
            asked.append(host)
            await go_on.wait()
            return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", port))]

        outbound.native.resolve = resolve
        url = peer.url.replace("127.0.0.1", "backend.invalid")
        calls = [asyncio.ensure_future(outbound.fetch("GET", url, headers={})) for _ in range(5)]  # noqa: TID251 -- gathered below
        await asyncio.sleep(0)
        # Who asks for all of them may leave.
        calls[0].cancel()
        await asyncio.sleep(0)
        go_on.set()
        answers = await asyncio.gather(*calls, return_exceptions=True)
        assert isinstance(answers[0], asyncio.CancelledError)
        assert [answer.body for answer in answers[1:] if not isinstance(answer, BaseException)] == [b"ok"] * 4
        assert asked == ["backend.invalid"] * 2


async def test_a_packet_is_never_held_back_for_another() -> None:
    async with serving() as (peer, outbound):
        await ask(outbound, peer)
        (connection,) = outbound.native._all
        assert connection._wire is not None
        sock = connection._wire.get_extra_info("socket")
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


# -- the request ---------------------------------------------------------------------------


class Counting:
    """A transport that counts what is written."""

    def __init__(self, wire: asyncio.Transport) -> None:
        self._wire = wire
        self.sent: list[int] = []

    def write(self, data: bytes) -> None:
        self.sent.append(len(data))
        self._wire.write(data)

    def writelines(self, data: list[bytes]) -> None:
        self.sent.append(sum(map(len, data)))
        self._wire.writelines(data)

    def __getattr__(self, name: str) -> object:
        return getattr(self._wire, name)


@pytest.mark.parametrize("size", [0, 1, 65_536, 65_537, 1_048_576])
async def test_head_and_body_go_out_in_one_write(size: int) -> None:
    async with serving() as (peer, outbound):
        await ask(outbound, peer)
        (connection,) = outbound.native._all
        assert connection._wire is not None
        wire = Counting(connection._wire)
        connection._wire = wire  # type: ignore[assignment]
        answer = await outbound.open(
            "POST", peer.url, headers={}, body=b"x" * size, deadlines=LATER, may_repeat=True
        )
        await answer.read_all()
        assert len(wire.sent) == 1
        assert wire.sent[0] > size


@pytest.mark.parametrize(
    "headers",
    [
        {"x": "a\r\nEvil: 1"},
        {"x": "a\nEvil: 1"},
        {"x": "a\rEvil: 1"},
        {"x": "a\0b"},
        {"x": "\udc80"},
        {"x\r\nEvil": "1"},
        {"x: y\r\nz": "1"},
        {"": "1"},
        {"a b": "1"},
        {"ä": "1"},
        {"Content-Length": "3"},
        {"transfer-encoding": "chunked"},
    ],
)
async def test_a_field_that_cannot_be_sent_is_not(headers: dict[str, str]) -> None:
    async with serving() as (peer, outbound):
        for _ in range(2):
            with pytest.raises(NetError) as caught:
                await outbound.open("POST", peer.url, headers=headers, body=b"x", deadlines=LATER)
            assert caught.value.kind is NetKind.CONNECT
            assert "Evil" not in str(caught.value)
        assert peer.opened == 0


@pytest.mark.parametrize(
    "url",
    [
        "ftp://h/x",
        "http://",
        "http:///x",
        "nothing",
        "http://h/a b",
        "http://h/ä",
        "http://h:99999/",
    ],
)
async def test_a_url_that_cannot_be_called_is_not(url: str) -> None:
    async with calling() as outbound:
        with pytest.raises(NetError) as caught:
            await outbound.open("GET", url, headers={}, body=None, deadlines=LATER)
        assert caught.value.kind is NetKind.CONNECT
