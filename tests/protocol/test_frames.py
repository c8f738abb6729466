"""A stream cut into frames: the same ones, however the network cuts the bytes, and not a byte lost."""

import random

import pytest

from codex_proxy.protocol import frames as module
from codex_proxy.protocol.frames import Frame, Frames
from codex_proxy.protocol.sse import EventTooLarge

STREAMS = {
    "lf": b'event: a\ndata: {"x":1}\n\n: ping\n\ndata: {"y":2}\n\ndata: [DONE]\n\n',
    "crlf": b'event: a\r\ndata: {"x":1}\r\n\r\n: ping\r\n\r\ndata: [DONE]\r\n\r\n',
    "cr": b'event: a\rdata: {"x":1}\r\rdata: [DONE]\r\r',
    "mixed": b'data: {"x":1}\r\n\ndata: {"y":2}\n\r\ndata: {"z":3}\r\r\n\n\ndata: 4\n\n\n\n',
    "marked": b'\xef\xbb\xbfdata: {"x":1}\n\ndata: 2\n\n',
}


def cut(stream: bytes, places: list[int]) -> list[Frame]:
    frames, found, start = Frames(), [], 0
    for place in [*places, len(stream)]:
        found += frames.feed(stream[start:place])
        start = place
    return found + frames.finish()


@pytest.mark.parametrize("name", STREAMS)
def test_chunking_never_matters(name: str) -> None:
    stream = STREAMS[name]
    whole = cut(stream, [])
    told = [(one.raw, one.lines) for one in whole]
    assert b"".join(raw for raw, _ in told) == stream
    for first in range(len(stream) + 1):
        assert [(one.raw, one.lines) for one in cut(stream, [first])] == told
        for second in range(first, len(stream) + 1):
            assert [(one.raw, one.lines) for one in cut(stream, [first, second])] == told
    assert [(one.raw, one.lines) for one in cut(stream, list(range(1, len(stream))))] == told


def test_random_bytes_are_cut_alike_and_none_is_lost() -> None:
    for seed in range(300):
        rng = random.Random(seed)
        stream = bytes(rng.choice(b"\n\n\r\rda: {x}") for _ in range(rng.randrange(60))) + b"\n\n"
        places = sorted(rng.randrange(len(stream) + 1) for _ in range(rng.randrange(6)))
        one, other = cut(stream, []), cut(stream, places)
        assert [frame.raw for frame in one] == [frame.raw for frame in other]
        assert b"".join(frame.raw for frame in one).startswith(stream.rstrip(b"\r\n"))


def test_what_is_cut_off_is_no_frame_and_a_last_one_without_its_blank_line_is() -> None:
    frames = Frames()
    assert [one.raw for one in frames.feed(b'data: {"a":1}\n\ndata: {"b"')] == [b'data: {"a":1}\n\n']
    assert frames.finish() == []
    assert [one.raw for one in cut(b"data: [DONE]", [])] == [b"data: [DONE]\n\n"]
    assert [one.raw for one in cut(b'data: {"a":1}\n', [])] == [b'data: {"a":1}\n\n']


def test_lines_without_blank_lines_between_them_are_payloads_of_their_own() -> None:
    assert list(Frame(b'data: {"a":1}\ndata: {"b":2}\n\n').payloads()) == [b'{"a":1}', b'{"b":2}']
    assert list(Frame(b'data: {"a":\ndata: 1}\n\n').payloads()) == [b'{"a":\n1}']
    assert list(Frame(b": only a comment\n\n").payloads()) == []


def test_a_frame_without_end_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_EVENT_SIZE", 1000)
    frames = Frames()
    for _ in range(10):
        frames.feed(b"x" * 100)
    with pytest.raises(EventTooLarge):
        frames.feed(b"x")
