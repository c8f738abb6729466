"""A recorded stream in every disguise that a network or a relay may give it: what is told stays the same."""

from collections.abc import Callable, Iterable, Iterator

import orjson

from codex_proxy.protocol.dialect import Encoder
from codex_proxy.protocol.sse import Event, Parser, Run

EVERY_SPLIT_UP_TO = 16 * 1024
"""Streams up to this size are cut at every byte; larger ones at the seams of their frames and now and then."""

UNKNOWN = (
    b'event: response.of_tomorrow\ndata: {"type":"response.of_tomorrow","delta":"?","output_index":0}\n\n'
)
FOREIGN = b'event: codex.of_tomorrow\ndata: {"type":"codex.of_tomorrow","rate_limits":{"x":1}}\n\n'
KEEPALIVE = b'data: {"type":"keepalive"}\n\n'
COMMENT = b": keep-alive\n\n"
LARGE = (
    b'event: response.of_tomorrow\ndata: {"type":"response.of_tomorrow","payload":"'
    + b"x" * (2 * 1024 * 1024)
    + b'"}\n\n'
)
READ = 64 * 1024


def play(encoder: Encoder, chunks: list[bytes], *, runs: bool = True) -> bytes:
    """Feed the reads to *encoder* as the executor does, and return what goes out."""
    return b"".join([encoder.encode(batch) for batch in _batches(chunks, runs=runs)])


def replay(
    make: Callable[[], Encoder], variants: Iterable[list[bytes]], *, runs: bool = True
) -> Iterator[bytes]:
    """Yield what goes out for each of some reads.

    Every one of them is read. What an encoder is told is the same for many, such as for all cuts within one frame, and then it
    is told once.
    """
    known: dict[tuple[object, ...], bytes] = {}
    for chunks in variants:
        told = _told(list(_batches(chunks, runs=runs)))
        out = known.get(told)
        if out is None:
            # Read anew: an event remembers what was looked at in it.
            out = known[told] = play(make(), chunks, runs=runs)
        yield out


def _batches(chunks: list[bytes], *, runs: bool) -> Iterator[list[Event]]:
    parser = Parser(runs=runs)
    for chunk in chunks:
        yield parser.feed(chunk)
    yield parser.finish()


def _told(batches: list[list[Event]]) -> tuple[object, ...]:
    """Return all that an encoder can see of some batches: also which runs share the object that says their place."""
    places: dict[int, int] = {}
    return tuple([
        tuple([
            (
                event.type,
                event.data,
                orjson.dumps(event.place),
                places.setdefault(id(event.place), len(places)),
                *event.pieces.spelled,
            )
            if isinstance(event, Run)
            else (event.type, event.data)
            for event in batch
        ])
        for batch in batches
    ])


def variants(stream: bytes) -> Iterator[list[bytes]]:
    """Yield reads that say the same as *stream*: cut anywhere, dressed otherwise, with noise in between.

    *stream* must be in the backend's own form: LF, an `event:` and a `data:` line per frame.
    """
    yield [stream]
    yield from _cut(stream)
    yield _bytes(stream)
    for other in (
        stream.replace(b"\n", b"\r\n"),
        stream.replace(b"\n", b"\r"),
        _without_event_lines(stream),
        stream.replace(b"\ndata: ", b"\ndata:"),
        stream.replace(b"\n\n", b"\n\n\n\n"),
        stream.removesuffix(b"\n\n"),
        b"\xef\xbb\xbf" + stream,
        *(_between(stream, noise) for noise in (UNKNOWN, FOREIGN, KEEPALIVE, COMMENT)),
    ):
        yield [other]
        yield _bytes(other)
    # Once, at the first seam: the frames around it are small.
    first, seam, rest = stream.partition(b"\n\n")
    yield _reads(first + seam + LARGE + rest, READ)


def _cut(stream: bytes) -> Iterator[list[bytes]]:
    if len(stream) <= EVERY_SPLIT_UP_TO:
        places: list[int] = list(range(1, len(stream)))
    else:
        seams = [place for place in range(len(stream)) if stream.startswith(b"\n\n", place)]
        around = {seam + offset for seam in seams for offset in (-1, 0, 1, 2, 3)}
        places = sorted({*around, *range(1, len(stream), 997)} & set(range(1, len(stream))))
    for place in places:
        yield [stream[:place], stream[place:]]


def _bytes(stream: bytes) -> list[bytes]:
    return _reads(stream, 1)


def _reads(stream: bytes, size: int) -> list[bytes]:
    return [stream[start : start + size] for start in range(0, len(stream), size)]


def _without_event_lines(stream: bytes) -> bytes:
    return b"\n".join(line for line in stream.split(b"\n") if not line.startswith(b"event:"))


def _between(stream: bytes, noise: bytes) -> bytes:
    return noise + stream.replace(b"\n\n", b"\n\n" + noise)
