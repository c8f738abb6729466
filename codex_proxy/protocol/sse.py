"""Server-sent events: bytes in, events out, once.

The type of an event is what its JSON says: the backend's clients read only that (contract,
section 3), and a frame may come without its `event:` line.
"""

import functools
import re
from typing import Any

from codex_proxy.protocol.wire import BadJson, JsonObject, dumps, loads_lenient

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
        return cls(str(value.get("type", "")), dumps(value), value)

    @classmethod
    def read(cls, data: bytes) -> "Event":
        """Take the JSON of one frame; an event without a type, or without an end, has the type ''."""
        match = _TYPE_FIRST.match(data)
        if match is not None and data.rstrip().endswith(b"}"):
            return cls(match[1].decode("ascii"), data)
        event = cls("", data)
        kind: Any = event.json.get("type")
        # A name goes into a line of its own, so it is held to what a line may contain.
        if isinstance(kind, str) and _NAME.fullmatch(kind):
            event.type = kind
        return event

    def frame(self) -> bytes:
        """Return the event as an SSE frame with both lines."""
        return frame(self.type, self.data)

    def __repr__(self) -> str:
        return f"Event({self.type!r}, {len(self.data)} bytes)"


Batch = list[Event]
"""All events of one upstream read."""


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


_LINE_END = re.compile(rb"\r\n|\n|\r")


class Parser:
    """Cut a byte stream into events, however the network cuts the bytes.

    Linear: bytes that were searched once are not searched again, and a long line is joined
    once, when it ends. Lines end with LF, CRLF or CR; a CR at the end of a read waits for
    the next byte. Comments, `id`, `retry` and the `[DONE]` mark are skipped.
    """

    __slots__ = ("_buffered", "_data", "_parts", "_skip_lf", "_started")

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self._buffered = 0
        self._data: list[bytes] = []
        self._skip_lf = False
        self._started = False

    @property
    def pending(self) -> bool:
        """Whether bytes of an unfinished frame are held."""
        return bool(self._parts or self._data)

    def feed(self, chunk: bytes) -> Batch:
        """Take bytes and return the events that they complete.

        Raises:
            EventTooLarge: If a frame grows past `MAX_EVENT_SIZE`.
        """
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
            lines = chunk.split(b"\n")
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
        events: Batch = []
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
