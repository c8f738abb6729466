"""Our own connection without a network: every script cut up in every way, and scripts that nobody wrote."""

import asyncio
import itertools
import random
import ssl
from collections.abc import Sequence

import pytest

from codex_proxy.net import NetError, NetKind
from codex_proxy.net.answer import READ_SIZE
from codex_proxy.net.head import Place
from codex_proxy.net.native import NativeAnswer, NativeTransport, _Connection
from tests.net import scripts
from tests.net.scripts import Case, Seen

pytestmark = pytest.mark.asyncio(loop_factories=["asyncio"])


class Wire(asyncio.Transport):
    """A transport that goes nowhere."""

    def __init__(self) -> None:
        super().__init__()
        self.written = b""
        self.is_aborted = False
        self.reads = True

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.written += data

    def get_write_buffer_size(self) -> int:
        return 0

    def is_closing(self) -> bool:
        return self.is_aborted

    def abort(self) -> None:
        self.is_aborted = True

    def pause_reading(self) -> None:
        self.reads = False

    def resume_reading(self) -> None:
        self.reads = True


class Played:
    """A connection, and what is made of what it is fed."""

    def __init__(self, pool: NativeTransport, method: str = "GET") -> None:
        self.wire = Wire()
        self.connection = _Connection(pool, Place(False, "backend.test", 80))
        self.connection.connection_made(self.wire)
        self._pool = pool
        self.answer = NativeAnswer(pool.loop, pool._wheel, method, 5.0)
        self.connection.send(self.answer, b"GET / HTTP/1.1\r\n\r\n", None)

    def feed(self, pieces: Sequence[bytes]) -> None:
        for piece in pieces:
            for start in range(0, len(piece), READ_SIZE):
                part = piece[start : start + READ_SIZE]
                if not self.wire.is_aborted:
                    self.connection.get_buffer(-1)[: len(part)] = part
                    self.connection.buffer_updated(len(part))

    def end(self) -> None:
        if not self.wire.is_aborted:
            self.connection.eof_received()

    def seen(self) -> Seen:
        """Return what the caller sees; nothing more is to come."""
        again = self.connection in self._pool._idle
        if not self.answer.status:
            failed = self.answer._failure is not None
            return Seen(None, kind=NetKind.CUT if failed else NetKind.TIMEOUT, again=again)
        body, kind = b"", None
        try:
            while data := self.answer.read_nowait():
                body += data
            if data is None:
                kind = NetKind.TIMEOUT
        except NetError as exc:
            kind = exc.kind
        return Seen(self.answer.status, body, kind, again=again)

    def leave(self) -> None:
        self.connection.abort()
        self.connection.connection_lost(None)


@pytest.fixture
async def pool() -> NativeTransport:
    transport = NativeTransport(ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT), lambda: 120.0)
    transport._loop = asyncio.get_running_loop()
    return transport


def play(pool: NativeTransport, case: Case, pieces: Sequence[bytes]) -> Seen:
    played = Played(pool, case.method)
    played.feed(pieces)
    if case.ends:
        played.end()
    seen = played.seen()
    played.leave()
    return seen


@pytest.mark.parametrize("case", scripts.ALL, ids=str)
async def test_every_way_to_cut_a_script_in_two(case: Case, pool: NativeTransport) -> None:
    expected = {case.sees, *case.also}
    script = case.script
    assert play(pool, case, [script]) in expected
    # What is long is so for its length: a few places stand for all.
    step = 1 if len(script) < 1000 else len(script) // 10
    for cut in range(1, len(script), step):
        assert play(pool, case, [script[:cut], script[cut:]]) in expected, cut
    size = 1 if len(script) < 1000 else 997
    pieces = [script[at : at + size] for at in range(0, len(script), size)]
    assert play(pool, case, pieces) in expected


@pytest.mark.parametrize("case", [case for case in scripts.WHOLE if len(case.script) < 90], ids=str)
async def test_every_way_to_cut_a_short_script_in_three(case: Case, pool: NativeTransport) -> None:
    script = case.script
    for one, two in itertools.combinations(range(1, len(script)), 2):
        assert play(pool, case, [script[:one], script[one:two], script[two:]]) == case.sees, (one, two)


def _spoilt(rng: random.Random, script: bytes) -> bytes:
    """Return *script* with a few bytes changed, left out, doubled or put in."""
    data = bytearray(script)
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(len(data) or 1)
        match rng.randrange(4):
            case 0:
                data[at : at + 1] = bytes([rng.randrange(256)])
            case 1:
                del data[at : at + rng.randint(1, 4)]
            case 2:
                data[at:at] = data[at : at + rng.randint(1, 12)]
            case _:
                data[at:at] = rng.choice([
                    b"\r\n",
                    b"\r\n\r\n",
                    b"\0",
                    b"0",
                    b" ",
                    b"\n",
                    b":",
                    b"HTTP/1.1 200 OK\r\n",
                ])
    return bytes(data)


@pytest.mark.parametrize("seed", range(20))
async def test_a_spoilt_script_is_seen_the_same_however_it_is_cut(seed: int, pool: NativeTransport) -> None:
    """Whatever comes is an answer, or its loss, or not all of it; and how it was cut up never matters."""
    rng = random.Random(seed)
    plain = [
        case
        for case in scripts.WHOLE
        if (len(case.script) < 300 and b"Encoding: " not in case.script) or b"chunked" in case.script
    ]
    for _ in range(60):
        case = rng.choice(plain)
        script = _spoilt(rng, case.script)
        spoilt = Case("spoilt", script, case.sees, method=case.method, ends=case.ends)
        whole = play(pool, spoilt, [script])
        for _ in range(6):
            cuts = sorted(rng.sample(range(len(script) + 1), min(len(script), rng.randint(1, 5))))
            pieces = [script[a:b] for a, b in itertools.pairwise([0, *cuts, len(script)]) if b > a]
            assert play(pool, spoilt, pieces) == whole, (script, cuts)
        assert play(pool, spoilt, [script[at : at + 1] for at in range(len(script))]) == whole, script
    assert pool.statistics() == {"open": 0, "idle": 0}
    assert pool._wheel._entries <= {pool}
