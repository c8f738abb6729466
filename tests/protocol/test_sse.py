"""The event parser: the network's cuts, line ends and sloppy relays never matter."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from codex_proxy.protocol import sse
from codex_proxy.protocol.sse import Batch, Event, EventTooLarge, Parser, frame, singles

FIXTURES = sorted((Path(__file__).parent / "fixtures").glob("*.sse"))

STREAM = (
    b": hello\n"
    b"event: response.created\nid: 7\nretry: 10\n"
    b'data: {"type":"response.created","n":1}\n\n'
    b'data:{"type":"response.output_text.delta","delta":"\xf0\x9f\xa6\x8a"}\n\n'
    b'event: x\ndata: {"n":2,\ndata: "type":"two.lines"}\n\n'
    b'data: {"n":3}\n\n\n'
    b"data: [DONE]\n\n"
)
EVENTS = [
    ("response.created", b'{"type":"response.created","n":1}'),
    ("response.output_text.delta", b'{"type":"response.output_text.delta","delta":"\xf0\x9f\xa6\x8a"}'),
    ("two.lines", b'{"n":2,\n"type":"two.lines"}'),
    ("", b'{"n":3}'),
]


def parse(*chunks: bytes) -> list[tuple[str, bytes]]:
    """Return the events, which are the same when deltas in a row stay together."""
    one, other = (read(Parser(runs=runs), chunks) for runs in (False, True))
    assert one == other
    return one


def read(parser: Parser, chunks: tuple[bytes, ...]) -> list[tuple[str, bytes]]:
    events: Batch = []
    for chunk in chunks:
        events += parser.feed(chunk)
    events += parser.finish()
    return [(event.type, event.data) for event in singles(events)]


def in_chunks(data: bytes, size: int) -> Iterator[bytes]:
    for start in range(0, len(data), size):
        yield data[start : start + size]


LINE_ENDS = pytest.mark.parametrize("line_end", [b"\n", b"\r\n", b"\r"], ids=["lf", "crlf", "cr"])
BOMS = pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"], ids=["plain", "bom"])


@BOMS
@LINE_ENDS
def test_every_cut_gives_the_same_events(line_end: bytes, bom: bytes) -> None:
    data = bom + STREAM.replace(b"\n", line_end)
    for cut in range(len(data) + 1):
        assert parse(data[:cut], data[cut:]) == EVENTS, cut


@BOMS
@LINE_ENDS
def test_every_chunk_size_gives_the_same_events(line_end: bytes, bom: bytes) -> None:
    data = bom + STREAM.replace(b"\n", line_end)
    for size in range(1, len(data) + 1):
        assert parse(*in_chunks(data, size)) == EVENTS, size


def test_an_empty_read_changes_nothing() -> None:
    assert parse(b"", *in_chunks(STREAM, 7), b"") == EVENTS


@pytest.mark.parametrize("path", FIXTURES, ids=lambda path: path.stem)
def test_every_cut_of_a_whole_stream_gives_the_same_events(path: Path) -> None:
    data = path.read_bytes()
    whole = parse(data)
    assert whole
    assert b"".join(frame(kind, payload) for kind, payload in whole) == data
    for cut in range(len(data)):
        assert parse(data[:cut], data[cut:]) == whole, cut


def test_mixed_line_ends_are_line_ends() -> None:
    assert parse(b'data: {"type":"a"}\r\n\rdata: {"type":"b"}\n\r\ndata: {"type":"c"}\r\r') == [
        ("a", b'{"type":"a"}'),
        ("b", b'{"type":"b"}'),
        ("c", b'{"type":"c"}'),
    ]


def test_a_carriage_return_ends_the_event_without_the_next_byte() -> None:
    parser = Parser()
    assert [event.type for event in parser.feed(b'data: {"type":"a"}\r\r')] == ["a"]
    assert parser.feed(b"\n") == []
    assert not parser.pending


def test_frames_that_lost_their_blank_line_are_still_two_frames() -> None:
    one, two = b'data: {"type":"a"}\n', b'event: b\ndata: {"type":"b"}\n'
    assert parse(one + two) == parse(one + b"\n" + two + b"\n")
    assert parse(one + two[9:]) == [("a", b'{"type":"a"}'), ("b", b'{"type":"b"}')]


@pytest.mark.parametrize("cut", range(5))
def test_a_byte_order_mark_before_the_first_frame_is_skipped(cut: int) -> None:
    data = b'\xef\xbb\xbfdata: {"type":"a"}\n\n'
    assert parse(data[:cut], data[cut:]) == [("a", b'{"type":"a"}')]


def test_a_last_frame_without_its_blank_line_counts() -> None:
    parser = Parser()
    assert parser.feed(b'data: {"type":"a"}') == []
    assert parser.pending
    assert [event.type for event in parser.finish()] == ["a"]
    assert not parser.pending


def test_comments_are_not_passed() -> None:
    parser = Parser()
    assert parser.feed(b": one\n\n:two\n\n") == []
    assert not parser.pending


def test_one_leading_space_is_dropped_and_no_more() -> None:
    assert parse(b'data:  {"type":"a"}\n\n') == [("a", b' {"type":"a"}')]


@pytest.mark.parametrize("data", [b"data\n\n", b"data:\n\n", b"data: \n\n", b"event: a\n\n", b"\n\n\n"])
def test_a_frame_without_data_is_none(data: bytes) -> None:
    assert parse(data) == []


def test_a_long_line_in_small_reads_is_joined_once() -> None:
    """2 MiB in 4 KiB reads: each byte is copied into the parts and once into the line, not per read."""

    class Counting(Parser):
        __slots__ = ("joined",)

        def __init__(self) -> None:
            super().__init__()
            self.joined = 0

        def _line(self, line: bytes, events: Batch) -> None:
            self.joined += len(line)
            super()._line(line, events)

    payload = b'{"type":"big","x":"' + b"x" * (2 << 20) + b'"}'
    parser = Counting()
    events: Batch = []
    reads = list(in_chunks(b"data: " + payload + b"\n\n", 4096))
    most_held = 0
    for read in reads:
        events += parser.feed(read)
        most_held = max(most_held, len(parser._parts))
    assert [event.data for event in events] == [payload]
    assert parser.joined == len(payload) + len(b"data: ")
    # One part per read: had the parser glued them as they came, there would be one in all.
    assert most_held >= len(reads) - 2


@pytest.mark.parametrize("size", [1, 64, 4096])
def test_a_frame_that_never_ends_is_refused(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr(sse, "MAX_EVENT_SIZE", 1000)
    for endless in (b"data: " + b"x" * 8000, b'data: {"a":1,\n' * 600):
        with pytest.raises(EventTooLarge):
            parse(*in_chunks(endless, size))


def test_a_frame_of_many_lines_may_fill_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sse, "MAX_EVENT_SIZE", 1000)
    line = b"data: " + b"x" * 300 + b"\n"
    assert len(parse(*in_chunks(line * 3 + b"\n", 7))) == 1


def test_many_small_frames_never_reach_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sse, "MAX_EVENT_SIZE", 1000)
    parser = Parser()
    events = [e for chunk in in_chunks(b'data: {"type":"a"}\n\n' * 500, 333) for e in parser.feed(chunk)]
    assert len(events) == 500


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (b'{"type":"a.b_c-1"}', "a.b_c-1"),
        (b' { "type" : "spaced" }', "spaced"),
        (b'{"n":1,"type":"later"}', "later"),
        (b'{"n":{"type":"inner"}}', ""),
        (b'{"type":5}', ""),
        (b'{"type":"\\u0061"}', "a"),
        (b"[1]", ""),
        (b"no json", ""),
    ],
)
def test_the_type_is_what_the_json_says(data: bytes, kind: str) -> None:
    assert Event.read(data).type == kind


def test_an_event_that_is_no_object_is_empty() -> None:
    assert Event.read(b"[1,2]").json == {}
    assert Event.read(b"nonsense").json == {}


@pytest.mark.parametrize("line_end", [b"\n", b"\r", b"\r\n"])
def test_a_line_break_inside_the_json_cannot_break_the_frame(line_end: bytes) -> None:
    assert frame("a", b'{"a":' + line_end + b"1}") == b'event: a\ndata: {"a":\ndata: 1}\n\n'


def test_a_frame_round_trips_with_a_line_break_inside() -> None:
    assert parse(frame("two.lines", b'{"type":"two.lines",\r\n"n":2}')) == [
        ("two.lines", b'{"type":"two.lines",\n"n":2}')
    ]


@pytest.mark.parametrize(
    "cut", [b'{"type":"response.completed","response":{"id":"r"}', b'{"type":"a","x":"y', b"{"]
)
def test_what_the_end_of_the_stream_has_cut_is_no_event(cut: bytes) -> None:
    assert parse(b'data: {"type":"a"}\n\ndata: ' + cut) == [("a", b'{"type":"a"}')]


def test_an_event_without_an_end_has_no_type() -> None:
    assert Event.read(b'{"type":"response.output_text.delta","delta":"x').type == ""


@pytest.mark.parametrize("name", ["a\\nb", "a\\ud83d", ""])
def test_a_type_that_is_no_name_stays_out_of_the_event_line(name: str) -> None:
    data = b'{"type":"' + name.encode() + b'"}'
    assert Event.read(data).frame() == b"data: " + data + b"\n\n"
