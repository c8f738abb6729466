"""What another side may send as an answer, byte for byte, and what is to be made of it.

A case says what our own transport sees, which is the same however the bytes are cut up. Where aiohttp's
client sees something else the case says what, and why ours is no worse; that may depend on the cuts.
"""

import gzip
import sys
import zlib
from dataclasses import dataclass

import brotli

from codex_proxy.net import NetKind
from codex_proxy.net.answer import MAX_HEAD_SIZE

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd


@dataclass(slots=True, frozen=True)
class Seen:
    """What a caller sees of an exchange."""

    status: int | None
    """None when there was no answer."""
    body: bytes = b""
    kind: NetKind | None = None
    """How it failed."""
    again: bool = False
    """Whether the connection serves the next request."""


@dataclass(slots=True, frozen=True)
class Case:
    """One script."""

    name: str
    script: bytes
    sees: Seen
    aiohttp: tuple[Seen, ...] = ()
    """What aiohttp's client may see instead."""
    why: str = ""
    """Why that is so, and ours is as it is."""
    method: str = "GET"
    ends: bool = False
    """Whether the other side closes behind it."""
    headers: tuple[tuple[str, str], ...] = ()
    """Some of what the head says."""
    also: tuple[Seen, ...] = ()
    """What else our own may see."""

    def __str__(self) -> str:
        return self.name


OK = b"HTTP/1.1 200 OK\r\n"
FIVE = OK + b"Content-Length: 5\r\n"
CHUNKED = OK + b"Transfer-Encoding: chunked\r\n\r\n"
LAST = b"0\r\n\r\n"
HELLO = Seen(200, b"hello", again=True)
CLOSES = Seen(200, b"hello")
REFUSED = Seen(None, kind=NetKind.CUT)
BROKEN = Seen(200, kind=NetKind.CUT)
HUNG = Seen(200, kind=NetKind.TIMEOUT)


def chunks(*parts: bytes) -> bytes:
    return b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in parts)


def coded(coding: bytes, data: bytes) -> bytes:
    return OK + b"Content-Encoding: %b\r\nContent-Length: %d\r\n\r\n%b" % (coding, len(data), data)


def field(line: bytes) -> bytes:
    return OK + line + b"\r\nContent-Length: 5\r\n\r\nhello"


TEXT = b"hello" * 3
GZIP = gzip.compress(TEXT, mtime=0)
ZLIB = zlib.compress(TEXT)
RAW = zlib.compress(TEXT, wbits=-15)
BROTLI = brotli.compress(TEXT)
ZSTD = zstd.compress(TEXT)
DECODED = Seen(200, TEXT, again=True)

WHOLE = [
    Case("a length", FIVE + b"\r\nhello", HELLO, headers=(("content-length", "5"),)),
    Case("no body", OK + b"Content-Length: 0\r\n\r\n", Seen(200, again=True)),
    Case("chunks", CHUNKED + chunks(b"he", b"llo") + LAST, HELLO),
    Case("extensions of chunks", CHUNKED + b'5;a=b;c="d"\r\nhello\r\n0;x\r\n\r\n', HELLO),
    Case("trailers", CHUNKED + chunks(b"hello") + b"0\r\nX-T: 1\r\nY: 2\r\n\r\n", HELLO),
    Case("zeros before a size", CHUNKED + b"0000000005\r\nhello\r\n00\r\n\r\n", HELLO),
    Case("to the end", OK + b"\r\nhello", CLOSES, ends=True),
    Case("nothing to the end", OK + b"\r\n", Seen(200), ends=True),
    Case("100 before", b"HTTP/1.1 100 Continue\r\n\r\n" + FIVE + b"\r\nhello", HELLO),
    Case(
        "103 twice before",
        b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n" * 2 + FIVE + b"\r\nhello",
        HELLO,
    ),
    Case("100 with a length", b"HTTP/1.1 100 Go\r\nContent-Length: 5\r\n\r\n" + FIVE + b"\r\nhello", HELLO),
    Case("204", b"HTTP/1.1 204 No Content\r\n\r\n", Seen(204, again=True)),
    Case("204 with a length", b"HTTP/1.1 204 X\r\nContent-Length: 5\r\n\r\n", Seen(204, again=True)),
    Case(
        "304 with a length", b"HTTP/1.1 304 Not Modified\r\nContent-Length: 5\r\n\r\n", Seen(304, again=True)
    ),
    Case("HEAD with a length", FIVE + b"\r\n", Seen(200, again=True), method="HEAD"),
    Case("HEAD with chunks", CHUNKED, Seen(200, again=True), method="HEAD"),
    Case(
        "HEAD with a coding",
        OK + b"Content-Encoding: gzip\r\nContent-Length: 20\r\n\r\n",
        Seen(200, again=True),
        method="HEAD",
    ),
    Case("close said", FIVE + b"Connection: close\r\n\r\nhello", CLOSES),
    Case("close said among others", FIVE + b"Connection: x, Close\r\n\r\nhello", CLOSES),
    Case("HTTP/1.0", b"HTTP/1.0 200 OK\r\nContent-Length: 5\r\n\r\nhello", CLOSES),
    Case(
        "HTTP/1.0 that stays",
        b"HTTP/1.0 200 OK\r\nConnection: keep-alive\r\nContent-Length: 5\r\n\r\nhello",
        HELLO,
    ),
    Case("HTTP/1.0 to the end", b"HTTP/1.0 200 OK\r\n\r\nhello", CLOSES, ends=True),
    Case("no reason", b"HTTP/1.1 200\r\nContent-Length: 5\r\n\r\nhello", HELLO),
    Case("an empty reason", b"HTTP/1.1 200 \r\nContent-Length: 5\r\n\r\nhello", HELLO),
    Case("a reason in UTF-8", "HTTP/1.1 200 Schön\r\nContent-Length: 5\r\n\r\nhello".encode(), HELLO),
    Case(
        "an unknown status",
        b"HTTP/1.1 599 X\r\nContent-Length: 5\r\n\r\nhello",
        Seen(599, b"hello", again=True),
    ),
    Case("space around a value", field(b"X: \t a b \t"), HELLO, headers=(("x", "a b"),)),
    Case("a tab in a value", field(b"X: a\tb"), HELLO, headers=(("x", "a\tb"),)),
    Case("an empty value", field(b"X:"), HELLO, headers=(("x", ""),)),
    Case("a value in UTF-8", field("X: ä".encode()), HELLO, headers=(("x", "ä"),)),
    Case("a value in Latin-1", field(b"X: \xe4"), HELLO, headers=(("x", "\udce4"),)),
    Case("a name in capitals", field(b"X-KIND: Pot"), HELLO, headers=(("x-kind", "Pot"),)),
    Case("a field twice", field(b"X: a\r\nX: b"), HELLO, headers=(("x", "b"),)),
    Case("Chunked", OK + b"TRANSFER-ENCODING: Chunked\r\n\r\n" + chunks(b"hello") + LAST, HELLO),
    Case("a large field", field(b"X: " + b"a" * 60_000), HELLO),
    Case("gzip", coded(b"gzip", GZIP), DECODED),
    Case("GZIP", coded(b"GZIP", GZIP), DECODED),
    Case("gzip twice", coded(b"gzip", GZIP * 2), Seen(200, TEXT * 2, again=True)),
    Case("nothing in gzip", coded(b"gzip", b""), Seen(200, again=True)),
    Case(
        "gzip in chunks",
        OK
        + b"Content-Encoding: gzip\r\nTransfer-Encoding: chunked\r\n\r\n"
        + chunks(GZIP[:7], GZIP[7:])
        + LAST,
        DECODED,
    ),
    Case("gzip to the end", OK + b"Content-Encoding: gzip\r\n\r\n" + GZIP, Seen(200, TEXT), ends=True),
    Case("deflate", coded(b"deflate", ZLIB), DECODED),
    Case("raw deflate", coded(b"deflate", RAW), DECODED),
    Case("br", coded(b"br", BROTLI), DECODED),
    Case("zstd", coded(b"zstd", ZSTD), DECODED),
    Case("zstd twice", coded(b"zstd", ZSTD * 2), Seen(200, TEXT * 2, again=True)),
    Case("a coding that is none", coded(b"identity", b"hello"), HELLO),
    Case("a coding nobody knows", coded(b"compress", b"hello"), HELLO),
    Case("codings upon each other", coded(b"gzip, br", b"hello"), HELLO),
]
"""Answers that are as they should be, or nearly so."""

_LOOSE = "aiohttp's client reads loosely, and so reads what others may read otherwise"
_LATE = (
    "aiohttp loses what came before when the fault comes in the same read as the head, and when it comes later never "
    "tells it to who reads: that one waits for the deadline"
)
_WITH_HEAD = "aiohttp loses a whole answer when what is behind it comes in the same read"
_POISONED = "aiohttp gives what is behind an answer to the next request when it comes in a read of its own"
_UNCHECKED = "aiohttp does not look whether a compressed body is whole"


def _not_chunks(name: str, script: bytes, body: bytes = b"") -> Case:
    return Case(
        name,
        CHUNKED + script,
        Seen(200, body, NetKind.CUT),
        (REFUSED, Seen(200, body, NetKind.TIMEOUT), Seen(200, body, NetKind.CUT)),
        _LATE,
    )


HOSTILE = [
    Case("nothing", b"", REFUSED, ends=True),
    Case("the start of a head", b"HTTP/1.1 200 OK\r\nConte", REFUSED, ends=True),
    Case("the start of a length", FIVE + b"\r\nhel", Seen(200, b"hel", NetKind.CUT), ends=True),
    Case("the start of a chunk", CHUNKED + b"5\r\nhel", Seen(200, b"hel", NetKind.CUT), ends=True),
    Case("no last chunk", CHUNKED + chunks(b"hello"), Seen(200, b"hello", NetKind.CUT), ends=True),
    Case(
        "half a last chunk",
        CHUNKED + chunks(b"hello") + b"0\r\n",
        Seen(200, b"hello", NetKind.CUT),
        ends=True,
    ),
    Case("garbage", b"garbage\r\n\r\n", REFUSED),
    Case("garbage without end", b"SSH-2.0-OpenSSH_9\r\n", REFUSED),
    Case("an alert of TLS", b"\x15\x03\x01\x00\x02\x02\x46", REFUSED),
    Case("HTTP/2", b"HTTP/2 200\r\nContent-Length: 5\r\n\r\nhello", REFUSED),
    Case("HTTP/2.0", b"HTTP/2.0 200 OK\r\nContent-Length: 5\r\n\r\nhello", REFUSED, (CLOSES, HELLO), _LOOSE),
    Case("HTTP/1.2", b"HTTP/1.2 200 OK\r\nContent-Length: 5\r\n\r\nhello", REFUSED),
    Case("HTTP/0.9", b"HTTP/0.9 200 OK\r\nContent-Length: 5\r\n\r\nhello", REFUSED, (CLOSES,), _LOOSE),
    Case("http/1.1", b"http/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello", REFUSED),
    Case("a status of two digits", b"HTTP/1.1 99 X\r\nContent-Length: 5\r\n\r\nhello", REFUSED),
    Case("a status of four digits", b"HTTP/1.1 1000 X\r\nContent-Length: 5\r\n\r\nhello", REFUSED),
    Case("a status of letters", b"HTTP/1.1 abc X\r\nContent-Length: 5\r\n\r\nhello", REFUSED),
    Case(
        "a status of zeros",
        b"HTTP/1.1 000 X\r\nContent-Length: 5\r\n\r\nhello",
        REFUSED,
        (Seen(0, b"hello", again=True),),
        _LOOSE,
    ),
    Case("two spaces", b"HTTP/1.1  200 OK\r\nContent-Length: 5\r\n\r\nhello", REFUSED),
    Case("an empty line first", b"\r\n" + FIVE + b"\r\nhello", REFUSED, (HELLO,), _LOOSE),
    Case("lines without CR", b"HTTP/1.1 200 OK\nContent-Length: 5\n\nhello", REFUSED, (HELLO,), _LOOSE),
    Case("one line without CR", field(b"X: y\nY: z"), REFUSED, (HELLO,), _LOOSE),
    Case("CR in a value", field(b"X: a\rb"), REFUSED),
    Case("NUL in a value", field(b"X: a\0b"), REFUSED),
    Case("a control in a value", field(b"X: a\x01b"), REFUSED, (HELLO,), _LOOSE),
    Case("DEL in a value", field(b"X: a\x7fb"), REFUSED, (HELLO,), _LOOSE),
    Case("a folded line", field(b"X: a\r\n b"), REFUSED, (HELLO,), _LOOSE),
    Case("a line folded by a tab", field(b"X: a\r\n\tb"), REFUSED, (HELLO,), _LOOSE),
    Case("a folded length", OK + b"Content-Length:\r\n 5\r\n\r\nhello", REFUSED, (HELLO,), _LOOSE),
    Case("a space before the colon", OK + b"Content-Length : 5\r\n\r\nhello", REFUSED, (HELLO,), _LOOSE),
    Case("a space before a name", field(b" X: a"), REFUSED, (HELLO,), _LOOSE),
    Case("no colon", field(b"X"), REFUSED),
    Case("no name", field(b": x"), REFUSED),
    Case("a name with brackets", field(b"X(Y): x"), REFUSED),
    Case("a name in UTF-8", field("ä: x".encode()), REFUSED),
    Case("a length twice", FIVE + b"Content-Length: 5\r\n\r\nhello", REFUSED),
    Case("two lengths", FIVE + b"Content-Length: 4\r\n\r\nhello", REFUSED),
    *(
        Case(f"a length of {value!r}", OK + b"Content-Length: " + value + b"\r\n\r\nhello", REFUSED)
        for value in (
            b"5, 5",
            b"5 5",
            b"+5",
            b"-5",
            b"0x5",
            b"",
            b"1_0",
            b"5.0",
            b"9" * 30,
            "\u0665".encode(),
        )
    ),
    Case(
        "a length and chunks", FIVE + b"Transfer-Encoding: chunked\r\n\r\n" + chunks(b"hello") + LAST, REFUSED
    ),
    Case(
        "chunks and a length",
        OK + b"Transfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n" + chunks(b"hello") + LAST,
        REFUSED,
    ),
    Case(
        "chunked twice",
        OK + b"Transfer-Encoding: chunked\r\n" * 2 + b"\r\n" + chunks(b"hello") + LAST,
        REFUSED,
        (HELLO,),
        _LOOSE,
    ),
    *(
        Case(
            f"a transfer coding of {value!r}",
            OK + b"Transfer-Encoding: " + value + b"\r\n\r\n" + chunks(b"hello") + LAST,
            REFUSED,
            (HELLO,),
            _LOOSE,
        )
        for value in (b"chunked, chunked", b"gzip, chunked")
    ),
    *(
        Case(
            f"a transfer coding of {value!r}",
            OK + b"Transfer-Encoding: " + value + b"\r\n\r\nhello",
            REFUSED,
            (CLOSES,),
            _LOOSE,
            ends=True,
        )
        for value in (b"identity", b"xchunked", b"chunked, gzip")
    ),
    Case(
        "chunks in HTTP/1.0",
        b"HTTP/1.0 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + chunks(b"hello") + LAST,
        REFUSED,
        (CLOSES,),
        _LOOSE,
    ),
    Case(
        "another protocol",
        b"HTTP/1.1 101 Switching\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\nhello",
        REFUSED,
        (Seen(101),),
        "aiohttp's client leaves it to the caller, and ours has none who wants it",
    ),
    *(
        _not_chunks(f"a size of {size!r}", size + b"\r\nhello\r\n0\r\n\r\n")
        for size in (b"g", b"", b"0x5", b"+5", b"-5", b" 5", b"f" * 17, b"5;a=\x01")
    ),
    _not_chunks("a size without CR", b"5\nhello\r\n0\r\n\r\n"),
    _not_chunks("more than the size", b"5\r\nhelloX\r\n0\r\n\r\n", b"hello"),
    _not_chunks("no end of a chunk", b"5\r\nhello0\r\n\r\n", b"hello"),
    _not_chunks(
        "a length among the trailers", chunks(b"hello") + b"0\r\nContent-Length: 3\r\n\r\n", b"hello"
    ),
    _not_chunks("a trailer that is none", chunks(b"hello") + b"0\r\nbad trailer\r\n\r\n", b"hello"),
    Case("a size and a space", CHUNKED + b"5 \r\nhello\r\n" + LAST, BROKEN, (HELLO,), _LOOSE),
    Case("an extension without CR", CHUNKED + b"5;a\nhello\r\n" + LAST, BROKEN, (HELLO,), _LOOSE),
    Case(
        "a chunk that ends without CR",
        CHUNKED + b"5\r\nhello\n" + LAST,
        Seen(200, b"hello", NetKind.CUT),
        (HELLO,),
        _LOOSE,
    ),
    Case("two answers", FIVE + b"\r\nhello" + FIVE + b"\r\nworld", CLOSES, (HELLO,), _POISONED),
    Case(
        "two answers in chunks",
        CHUNKED + chunks(b"hello") + LAST + CHUNKED + chunks(b"world") + LAST,
        CLOSES,
        (HELLO,),
        _POISONED,
    ),
    Case("a length too small", FIVE + b"\r\nhellojunk", CLOSES, (REFUSED,), _WITH_HEAD),
    Case("junk behind chunks", CHUNKED + chunks(b"hello") + LAST + b"junk", CLOSES, (REFUSED,), _WITH_HEAD),
    Case("a line behind a length", FIVE + b"\r\nhello\r\n", CLOSES, (HELLO,), _LOOSE),
    Case("a line behind chunks", CHUNKED + chunks(b"hello") + LAST + b"\r\n", CLOSES, (HELLO,), _LOOSE),
    Case(
        "a line behind trailers",
        CHUNKED + chunks(b"hello") + b"0\r\nX: y\r\n\r\n\r\n",
        CLOSES,
        (HELLO,),
        _LOOSE,
    ),
    Case(
        "a body behind 204",
        b"HTTP/1.1 204 X\r\nContent-Length: 5\r\n\r\nhello",
        Seen(204),
        (REFUSED,),
        _WITH_HEAD,
    ),
    Case("a body behind HEAD", FIVE + b"\r\nhello", Seen(200), (REFUSED,), _WITH_HEAD, method="HEAD"),
    Case("a field too large", field(b"X: " + b"a" * (MAX_HEAD_SIZE + 500)), REFUSED),
    Case("a field without end", OK + b"X: " + b"a" * 200_000, REFUSED),
    Case("a name without end", OK + b"X" * 200_000, REFUSED),
    Case(
        "a reason too large",
        b"HTTP/1.1 200 " + b"a" * 66_000 + b"\r\nContent-Length: 5\r\n\r\nhello",
        REFUSED,
    ),
    Case(
        "fields without end",
        OK + b"".join(b"X-%d: aaaaaaaa\r\n" % number for number in range(6000)),
        REFUSED,
    ),
    Case(
        "100 without end",
        b"HTTP/1.1 100 Continue\r\n\r\n" * 3000,
        REFUSED,
        (Seen(None, kind=NetKind.TIMEOUT),),
        "aiohttp's client has no bound but the deadline",
    ),
    Case(
        "extensions without end",
        CHUNKED + b"5;" + b"a" * 200_000,
        BROKEN,
        (REFUSED, HUNG),
        _LATE,
    ),
    Case(
        "trailers without end",
        CHUNKED + chunks(b"hello") + b"0\r\n" + b"X: aaaaaaaaaaaa\r\n" * 10_000,
        Seen(200, b"hello", NetKind.CUT),
        (REFUSED, Seen(200, b"hello", NetKind.TIMEOUT)),
        _LATE,
    ),
    Case(
        "a coding twice",
        OK
        + b"Content-Encoding: gzip\r\nContent-Encoding: gzip\r\nContent-Length: %d\r\n\r\n" % len(GZIP)
        + GZIP,
        REFUSED,
        (DECODED,),
        _LOOSE,
    ),
]
"""Answers that are none, or more than one."""


def _not_coded(name: str, coding: bytes, data: bytes, *theirs: Seen, why: str = "") -> Case:
    # Some of the body may come before the fault, and all of it: then the connection is of use again.
    broken = [
        Seen(200, TEXT[:size], NetKind.CUT, again=again)
        for size in range(len(TEXT) + 1)
        for again in (False, True)
    ]
    return Case(name, coded(coding, data), BROKEN, theirs, why, also=tuple(broken))


_GONE = tuple(Seen(200, TEXT[:size], NetKind.CUT) for size in range(len(TEXT) + 1))
_APART = "its connection is in order, and ours serves on"

CODED = [
    _not_coded("gzip that is none", b"gzip", b"hello", *_GONE, why=_APART),
    _not_coded("gzip with a wrong sum", b"gzip", GZIP[:-8] + b"abcd" + GZIP[-4:], *_GONE, why=_APART),
    _not_coded("gzip and junk", b"gzip", GZIP + b"junk", *_GONE, why=_APART),
    _not_coded("deflate and junk", b"deflate", ZLIB + b"junk", *_GONE, why=_APART),
    _not_coded("br and junk", b"br", BROTLI + b"x", *_GONE, why=_APART),
    _not_coded("zstd and junk", b"zstd", ZSTD + b"junk", *_GONE, why=_APART),
    _not_coded("half of gzip", b"gzip", GZIP[:-9], DECODED, why=_UNCHECKED),
    _not_coded(
        "half of deflate", b"deflate", ZLIB[:-5], REFUSED, Seen(200, TEXT, NetKind.TIMEOUT), why=_UNCHECKED
    ),
    _not_coded("half of br", b"br", BROTLI[:-2], Seen(200, again=True), why=_UNCHECKED),
    _not_coded("half of zstd", b"zstd", ZSTD[:-2], Seen(200, again=True), why=_UNCHECKED),
    Case("zeros behind gzip", coded(b"gzip", GZIP + b"\0" * 20), DECODED, _GONE, "they mean nothing"),
    Case(
        "gzip by its old name",
        coded(b"x-gzip", GZIP),
        DECODED,
        (Seen(200, GZIP, again=True),),
        "aiohttp does not know it",
    ),
]
"""Bodies that are not what they are called."""

ALL = [*WHOLE, *HOSTILE, *CODED]
