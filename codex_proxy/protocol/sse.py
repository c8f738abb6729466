"""Server-sent events: bytes in, events out, once.

The type of an event is what its JSON says: the backend's clients read only that (contract,
section 3), and a frame may come without its `event:` line.

Most of a stream is deltas: some bytes of text in some hundred bytes of frame. Those that come in a row are
found at one stroke and stay together as a `Run`, so that nobody who passes them on, or shows their words, has
to look at each of them. Only what is written exactly as the backend writes it is taken so; everything else is
read line by line, and the outcome is the same.
"""

import functools
import re
from collections.abc import Callable
from typing import Any

from codex_proxy.protocol.wire import BadJson, JsonObject, Pieces, dumps, loads, loads_lenient

# Generous on purpose: one event may carry a whole response object with images in it. Past
# this limit we assume a peer that never ends its frame.
MAX_EVENT_SIZE = 64 * 1024 * 1024

_NAME = re.compile(r"[\x20-\x7e]+")
_TYPE_FIRST = re.compile(rb'\s*\{\s*"type"\s*:\s*"([A-Za-z0-9_.\-]+)"')


class EventTooLarge(ValueError):
    """A frame passed `MAX_EVENT_SIZE` without ending."""


class Event:
    """One event: its type, its JSON as it came, and a dict when somebody looks inside.

    `data` is never changed in place; an encoder that must change an event renders a new one.
    """

    __slots__ = ("_parsed", "data", "type")

    def __init__(self, type: str, data: bytes, parsed: JsonObject | None = None) -> None:  # noqa: A002 -- the wire's own word
        self.type = type
        self.data = data
        self._parsed = parsed

    @property
    def json(self) -> JsonObject:
        """The event as a dict, parsed at the first look; empty when the bytes are no object."""
        if self._parsed is None:
            try:
                value = loads_lenient(self.data)
            except BadJson:
                value = None
            self._parsed = value if isinstance(value, dict) else {}
        return self._parsed

    @classmethod
    def of(cls, value: JsonObject) -> "Event":
        """Render *value* as an event; its `type` names it."""
        return Event(str(value.get("type", "")), dumps(value), value)

    @classmethod
    def read(cls, data: bytes) -> "Event":
        """Take the JSON of one frame; an event without a type, or without an end, has the type ''."""
        match = _TYPE_FIRST.match(data)
        if match is not None and data.rstrip().endswith(b"}"):
            return Event(match[1].decode("ascii"), data)
        event = Event("", data)
        kind: Any = event.json.get("type")
        # A name goes into a line of its own, so it is held to what a line may contain.
        if isinstance(kind, str) and _NAME.fullmatch(kind):
            event.type = kind
        return event

    def frame(self) -> bytes:
        """Return the event as an SSE frame with both lines."""
        return frame(self.type, self.data)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.type!r}, {len(self.data)} bytes)"


class Run(Event):
    """Deltas of one text in a row: several events that differ only in a few words.

    `data` are their frames as they came, which are the frames of the single events too. `json` is the first
    one's. Who must look at each of them takes the single `events`.
    """

    __slots__ = ("_begin", "_pieces", "place")

    def __init__(
        self,
        type: str,  # noqa: A002 -- the wire's own word
        data: bytes,
        place: JsonObject,
        begin: int,
        only: bytes | None,
    ) -> None:
        # Written out: where the backend's events come one by one, this is done for each.
        self.type = type
        self.data = data
        self._parsed = None
        self.place = place
        """What all of them say: item, place and part. One object, as long as they say the same."""
        self._begin = begin
        self._pieces = None if only is None else Pieces([only])

    @property
    def pieces(self) -> Pieces:
        """Their texts."""
        if self._pieces is None:
            self._pieces = Pieces(_deltas_from(self._begin)(self.data))
        return self._pieces

    @property
    def json(self) -> JsonObject:
        """The first of them as a dict."""
        if self._parsed is None:
            self._parsed = self.events()[0].json
        return self._parsed

    def events(self) -> "Batch":
        """Return the single events."""
        # The line with the name, and how the other one begins, are of one length.
        begin = self.data.index(b"\n") + len(b"\ndata: ")
        return [Event(self.type, frame[begin:]) for frame in self.data.split(b"\n\n")[:-1]]

    def frame(self) -> bytes:
        """Return their frames."""
        return self.data


Batch = list[Event]
"""All events of one upstream read; some may be runs."""


def singles(batch: Batch) -> Batch:
    """Return the events of *batch* one by one."""
    return [one for event in batch for one in (event.events() if isinstance(event, Run) else (event,))]


def frame(kind: str, data: bytes) -> bytes:
    """Return one SSE frame; a line break inside the JSON becomes a second `data:` line."""
    # Numbers, not bytes: eight times faster, and this runs once per event.
    if 0x0A in data or 0x0D in data:
        data = b"\ndata: ".join(data.splitlines())
    return b"%b%b\n\n" % (_head(kind), data)


@functools.lru_cache(maxsize=256)
def _head(kind: str) -> bytes:
    """Return what stands before the JSON; there are few kinds of events and many events."""
    return b"event: " + kind.encode() + b"\ndata: " if kind else b"data: "


_DELTA_TYPES = frozenset({
    b"response.output_text.delta",
    b"response.refusal.delta",
    b"response.reasoning_summary_text.delta",
    b"response.reasoning_text.delta",
    b"response.function_call_arguments.delta",
    b"response.custom_tool_call_input.delta",
})

# How the backend writes a delta. No quantifier that repeats leaves anything to try again: a match is one pass.
# Escapes that `dumps` writes too. Halves of characters are among those that it does not.
_TEXT = rb'[^"\\\x00-\x1f]*+(?:\\["\\bfnrt][^"\\\x00-\x1f]*+)*+'
_SHARED = rb'"(?:(?:content|output|summary)_index":(?:0|[1-9]\d{0,8})|item_id":"[\w.\-]*+"|logprobs":\[\])'
# Random letters, so that the length of a frame does not tell that of its text.
_PADDING = rb"[A-Za-z0-9]*+"
_NUMBER = rb"[1-9]\d{0,15}+"

_RUN = re.compile(
    # 1: up to the text, with the type as 2; 3: the text; 4: up to the padding; 5: up to the number; 6: the rest.
    rb'(event: (response\.[a-z_]+\.delta)\ndata: \{"type":"\2",(?:%(shared)b,)*"delta":")'
    rb'(%(text)b)("(?:,%(shared)b)*,"(?:obfuscation":"|sequence_number":))'
    rb'(?:%(padding)b("(?:,%(shared)b)*,"sequence_number":))?(?<=:)%(number)b((?:,%(shared)b)*\}\n\n)'
    rb"(?:\1%(text)b\4(?(5)%(padding)b\5)%(number)b\6)*+"
    % {
        b"text": _TEXT,
        b"shared": _SHARED,
        b"padding": _PADDING,
        b"number": _NUMBER,
    }
).match
"""Matches deltas that differ only in text, padding and number."""

_MORE = re.compile(
    rb"([^\0]*+)\0([^\0]*+)\0([^\0]++)?\0([^\0]*+)\0(?:\1(%b)\2(?(3)%b\3)%b\4)++" % (_TEXT, _PADDING, _NUMBER)
).match
"""Matches more of the same, when what they share is put before them: half the time for a single one."""

_FRAME = re.compile(rb'event: ([A-Za-z0-9_.\-]+)\ndata: (?=\{"type":"\1")').match
"""Matches a frame of two lines up to its JSON."""

_UNFINISHED = re.compile(rb"event: [^\r\n]*+(?:\n(?:[^\r\n]++\n?+)?+)?+").fullmatch
"""Matches the beginning of a frame, as long as reading it line by line would not tell anything either."""

# A beginning that is longer is taken in at once, so that none of it is looked at again and again.
_LONGEST_BEGINNING = 4096


@functools.lru_cache(maxsize=128)
def _deltas_from(begin: int) -> Callable[[bytes], list[bytes]]:
    """Return what finds the texts in a run whose frames have them from byte *begin* on."""
    return re.compile(rb'(?s:.{%d})(%b)"[^\n]*+\n\n' % (begin, _TEXT)).findall


def is_utf8(data: bytes) -> bool:
    """Tell whether *data* is text."""
    if data.isascii():
        return True
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


def _split(chunk: bytes) -> list[bytes]:
    """Split at line feeds; what is large is mostly the first line or the last, and those are found faster."""
    first = chunk.find(b"\n")
    if first < 0:
        return [chunk]
    last = chunk.rfind(b"\n")
    between = chunk[first + 1 : last].split(b"\n") if first < last else ()
    return [chunk[:first], *between, chunk[last + 1 :]]


def _end_of_frame(chunk: bytes) -> int:
    """Return where the first blank line ends; 0 when there is none. To look for both bytes at once takes far longer."""
    end = chunk.find(b"\n")
    while end >= 0 and not chunk.startswith(b"\n", end + 1):
        end = chunk.find(b"\n", end + 1)
    return end + 2 if end >= 0 else 0


_LINE_END = re.compile(rb"\r\n|\n|\r")


class Parser:
    """Cut a byte stream into events, however the network cuts the bytes.

    Linear: bytes that were searched once are not searched again, and a long line is joined
    once, when it ends. Lines end with LF, CRLF or CR; a CR at the end of a read waits for
    the next byte. Comments, `id`, `retry` and the `[DONE]` mark are skipped.

    Args:
        runs: Whether deltas in a row may stay together.
    """

    __slots__ = (
        "_beginning",
        "_buffered",
        "_data",
        "_expected",
        "_key",
        "_parts",
        "_place",
        "_runs",
        "_shared",
        "_skip_lf",
        "_started",
        "_text_begin",
        "_type",
    )

    def __init__(self, *, runs: bool = False) -> None:
        self._runs = runs
        self._parts: list[bytes] = []
        self._buffered = 0
        self._data: list[bytes] = []
        self._skip_lf = False
        self._started = False
        self._beginning = b""
        """A frame that has only begun, and was not read by lines yet."""
        self._expected = b""
        """The key, when all that came before has been told and more of the same may follow."""
        self._shared: tuple[bytes | None, ...] = ()
        """What the last deltas had in common: groups of `_RUN`; with what follows from them."""
        self._key = b""
        """The same as `_MORE` wants it."""
        self._type = ""
        self._place: JsonObject = {}
        self._text_begin = 0

    @property
    def pending(self) -> bool:
        """Whether bytes of an unfinished frame are held."""
        return bool(self._parts or self._data or self._beginning)

    def feed(self, chunk: bytes) -> Batch:
        """Take bytes and return the events that they complete.

        Raises:
            EventTooLarge: If a frame grows past `MAX_EVENT_SIZE`.
        """
        if not self._runs:
            return self._read(chunk)
        if self._beginning:
            chunk = self._beginning + chunk
            self._beginning = b""
        events: Batch = []
        start = 0
        key = self._expected
        if key:
            match = _MORE(key + chunk)
            if match is not None:
                start = match.end() - len(key)
                data = chunk[:start]
                if data.isascii() or is_utf8(data):
                    only = match[5] if match.start(5) == len(key) + self._text_begin else None
                    events.append(Run(self._type, data, self._place, self._text_begin, only))
                    if start == len(chunk):
                        return events
                else:
                    start = 0
            self._expected = b""
        elif (
            self._parts or self._data or self._skip_lf or not (self._started or chunk.startswith(b"event: "))
        ):
            # A frame is under way, or a byte order mark: by lines, to where a frame begins for certain.
            start = _end_of_frame(chunk)
            if not start:
                return self._read(chunk)
            events = self._read(chunk[:start])
        self._started = True
        while start < len(chunk):
            head = _FRAME(chunk, start)
            if head is None:
                break
            begin = head.end()
            end = chunk.find(b"\n", begin)
            if end < 0 or not chunk.startswith(b"}\n\n", end - 1):
                break
            kind = head[1]
            match = _RUN(chunk, start) if kind in _DELTA_TYPES else None
            if match is not None:
                end = match.end()
                data = chunk[start:end]
                if not is_utf8(data):
                    # Not a look more: what follows would be matched again and again.
                    break
                self._learn(match)
                only = match[3] if end == match.end(6) else None
                events.append(Run(self._type, data, self._place, self._text_begin, only))
                start = end
                continue
            if chunk.find(b"\r", begin, end) >= 0:
                break
            events.append(Event(kind.decode("ascii"), chunk[begin:end]))
            start = end + 2
        rest = chunk[start:]
        if rest and (len(rest) > _LONGEST_BEGINNING or _UNFINISHED(rest) is None):
            return events + self._read(rest)
        self._beginning = rest
        self._expected = self._key
        return events

    def _learn(self, match: re.Match[bytes]) -> None:
        """Take in what the deltas of *match* have in common."""
        shared: tuple[bytes | None, ...] = match.group(1, 4, 5, 6)
        if shared == self._shared:
            return
        self._shared = shared
        self._key = b"%b\0%b\0%b\0%b\0" % tuple(part or b"" for part in shared)
        self._type = match[2].decode("ascii")
        self._text_begin = len(match[1])
        self._place = loads(match.string[match.end(2) + len("\ndata: ") : match.end(6)])
        for name in ("delta", "obfuscation", "sequence_number"):
            self._place.pop(name, None)

    def _read(self, chunk: bytes) -> Batch:
        """Read by lines."""
        events: Batch = []
        if not self._started:
            # A byte order mark may come first, and may come cut.
            if self._parts:
                chunk = b"".join([*self._parts, chunk])
                self._parts.clear()
                self._buffered = 0
            if chunk[:3] != b"\xef\xbb\xbf" and b"\xef\xbb\xbf".startswith(chunk[:3]):
                self._parts.append(chunk)
                self._buffered = len(chunk)
                return events
            chunk = chunk.removeprefix(b"\xef\xbb\xbf")
            self._started = True
        if self._skip_lf and chunk:
            self._skip_lf = False
            if chunk[:1] == b"\n":
                chunk = chunk[1:]
        if 0x0D in chunk:
            lines = _LINE_END.split(chunk)
            self._skip_lf = chunk.endswith(b"\r")
        else:
            # Three times faster, and what the backend sends.
            lines = _split(chunk)
        rest = lines.pop()
        if lines and self._parts:
            self._parts.append(lines[0])
            lines[0] = b"".join(self._parts)
            self._parts.clear()
            self._buffered = sum(map(len, self._data))
        for line in lines:
            self._line(line, events)
        if rest:
            self._parts.append(rest)
            self._buffered += len(rest)
            if self._buffered > MAX_EVENT_SIZE:
                raise EventTooLarge(f"one event is larger than {MAX_EVENT_SIZE} bytes")
        return events

    def finish(self) -> Batch:
        """Return the event of a last frame that came without its blank line, if it is whole."""
        beginning, self._beginning = self._beginning, b""
        events = self._read(beginning) if beginning else []
        if self._parts:
            line = b"".join(self._parts)
            self._parts.clear()
            self._line(line, events)
        self._dispatch(events)
        # What was cut may look like an event, even like the terminal one.
        return [event for event in events if event.json]

    def _line(self, line: bytes, events: Batch) -> None:
        if not line:
            self._dispatch(events)
        elif line.startswith(b"data:"):
            value = line[6:] if line[5:6] == b" " else line[5:]
            # Some relays lose the blank line between frames: a second complete JSON object
            # in what would be one frame is a frame of its own.
            if self._data and _is_complete(self._data) and value.lstrip()[:1] == b"{":
                self._dispatch(events)
            self._data.append(value)
            self._buffered += len(value)
            if self._buffered > MAX_EVENT_SIZE:
                raise EventTooLarge(f"one event is larger than {MAX_EVENT_SIZE} bytes")
        elif line.startswith(b"event:") and self._data and _is_complete(self._data):
            self._dispatch(events)

    def _dispatch(self, events: Batch) -> None:
        if not self._data:
            return
        data = self._data[0] if len(self._data) == 1 else b"\n".join(self._data)
        self._data.clear()
        self._buffered = 0
        if data.strip() in (b"", b"[DONE]"):
            return
        events.append(Event.read(data))


def _is_complete(lines: list[bytes]) -> bool:
    """Tell whether one line alone is a whole object; parsing several again and again would be quadratic."""
    if len(lines) != 1 or not lines[0].rstrip().endswith(b"}"):
        return False
    try:
        loads_lenient(lines[0])
    except BadJson:
        return False
    return True
