"""A stream of server-sent events cut into its frames, each with the very bytes it came in.

For streams that pass unchanged: what is not whole yet is held, so that something of ours (a sign of life, an end)
can always stand between two frames. `sse.Parser` is for streams of which only the events count.
"""

import re
from collections.abc import Iterator

from codex_proxy.protocol.sse import MAX_EVENT_SIZE, EventTooLarge
from codex_proxy.protocol.wire import BadJson, loads_lenient

_BLANK = re.compile(rb"(?>\r\n|\n|\r)(?>\r\n|\n|\r)")

# As much of what was searched must be looked at again as a blank line that has begun can measure.
_OVERLAP = 3

DONE = b"[DONE]"


class Frame:
    """One frame: its bytes, with the blank line that ends it, and what its `data` lines say."""

    __slots__ = ("raw",)

    def __init__(self, raw: bytes) -> None:
        self.raw = raw

    @property
    def lines(self) -> list[bytes]:
        """The values of the `data` lines; a comment has none."""
        return [
            line[6:] if line[5:6] == b" " else line[5:]
            for line in self.raw.removeprefix(b"\xef\xbb\xbf").splitlines()
            if line.startswith(b"data:")
        ]

    def payloads(self) -> Iterator[bytes]:
        """Yield what it says: one text, or several where a relay has lost the blank lines between them."""
        lines = self.lines
        if len(lines) < 2:
            yield from lines
            return
        whole = b"\n".join(lines)
        if is_json(whole):
            yield whole
        else:
            yield from lines


class Frames:
    """Cut bytes into frames, however the network cut them before.

    Linear: what was searched is not searched again, and what is held is joined once.
    """

    __slots__ = ("_parts", "_size", "_tail")

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self._size = 0
        self._tail = b""
        """The end of what is held."""

    def feed(self, chunk: bytes) -> list[Frame]:
        """Take bytes and return the frames that they complete.

        Raises:
            EventTooLarge: If a frame grows past `MAX_EVENT_SIZE`.
        """
        seen = len(self._tail)
        found = _ends(self._tail + chunk if seen else chunk)
        if not found:
            self._hold(chunk)
            return []
        data = b"".join([*self._parts, chunk]) if self._parts else chunk
        # Places were counted from where the tail begins.
        shift = self._size - seen
        self._parts.clear()
        self._size, self._tail = 0, b""
        frames, start = [], 0
        for end in found:
            frames.append(Frame(data[start : end + shift]))
            start = end + shift
        if start < len(data):
            self._hold(data[start:])
        return frames

    def finish(self) -> list[Frame]:
        """Return the last frame if only its blank line is missing; it gets one. What is cut off is none."""
        rest = b"".join(self._parts)
        self._parts.clear()
        self._size, self._tail = 0, b""
        # One that ends with a CR was held only for an LF that might have followed.
        frame = Frame(rest if rest.endswith((b"\r\r", b"\n\r")) else rest.rstrip(b"\r\n") + b"\n\n")
        is_whole = bool(frame.lines) and all(line == DONE or is_json(line) for line in frame.payloads())
        return [frame] if is_whole else []

    def _hold(self, data: bytes) -> None:
        self._parts.append(data)
        self._size += len(data)
        self._tail = (self._tail + data)[-_OVERLAP:] if len(data) < _OVERLAP else data[-_OVERLAP:]
        if self._size > MAX_EVENT_SIZE:
            raise EventTooLarge(f"one event is larger than {MAX_EVENT_SIZE} bytes")


def _ends(data: bytes) -> list[int]:
    """Return where the blank lines in *data* end; one whose last CR may still get its LF has no end yet."""
    if b"\r" not in data:
        # Found several times faster, and what nearly everybody sends.
        ends, at = [], data.find(b"\n\n")
        while at >= 0:
            ends.append(at + 2)
            at = data.find(b"\n\n", at + 2)
        return ends
    return [m.end() for m in _BLANK.finditer(data) if m.end() < len(data) or data[-1:] != b"\r"]


def is_json(data: bytes) -> bool:
    """Tell whether *data* is JSON."""
    try:
        loads_lenient(data)
    except BadJson:
        return False
    return True
