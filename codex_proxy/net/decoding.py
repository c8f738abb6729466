"""Compressed bodies, which nobody asked for, decoded as they are read.

Never more is decoded than a read takes: a kilobyte may stand for a gigabyte.
"""

import zlib
from collections.abc import Callable

from codex_proxy.compression import BROKEN, MULTIPLE, Brotli, Frame, Zlib, Zstd, gzip_frame

# One frame is what a server sends. A body of nothing but empty frames costs, and says nothing.
_MAX_FRAMES = 1000


class BadCoding(Exception):
    """A body is not what its head calls it."""


class _Deflate:
    """What is called deflate: zlib by the standard, raw deflate as half the world sends it."""

    def __init__(self) -> None:
        self._inner: Zlib | None = None

    @property
    def has_ended(self) -> bool:
        return self._inner is not None and self._inner.has_ended

    @property
    def rest(self) -> bytes:
        return self._inner.rest if self._inner is not None else b""

    def step(self, data: bytes, most: int) -> bytes:
        if self._inner is None:
            if not data:
                return b""
            # A zlib header says "deflate" in its first byte; in raw deflate that would be a block of a kind
            # that no compressor begins with.
            is_zlib = data[0] & 0x0F == zlib.DEFLATED
            self._inner = Zlib(zlib.MAX_WBITS if is_zlib else -zlib.MAX_WBITS)
        return self._inner.step(data, most)


_FRAMES: dict[str, Callable[[], Frame]] = {
    "gzip": gzip_frame,
    "x-gzip": gzip_frame,
    "deflate": _Deflate,
    "br": Brotli,
    "zstd": Zstd,
}


class Decoder:
    """Undoes one content coding: `put` what came, `get` until there is no more."""

    __slots__ = ("_coding", "_frame", "_frames", "_input", "_surplus")

    def __init__(self, coding: str) -> None:
        self._coding = coding
        self._frame: Frame | None = None
        """The one that has begun and not ended."""
        self._frames = 0
        self._input = b""
        self._surplus = b""
        """What a frame gave beyond what it was asked for: brotli's buffers grow by blocks."""

    def put(self, data: bytes) -> None:
        """Take more input; all that was there before must have been got."""
        self._input += data

    def get(self, most: int) -> bytes:
        """Return *most* bytes of the body at most; none when it needs more input.

        Raises:
            BadCoding: If it is not what it is called.
        """
        out = self._surplus or self._step(most)
        self._surplus = out[most:]
        return out[:most]

    def _step(self, most: int) -> bytes:
        while True:
            frame = self._frame
            if frame is None:
                if self._frames and "gzip" in self._coding:
                    # Padding with zeros after a member is allowed and meaningless.
                    self._input = self._input.lstrip(b"\0")
                if not self._input:
                    return b""
                frame = self._frame = self._begin()
            data, self._input = self._input, b""
            try:
                out = frame.step(data, most)
            except BROKEN as exc:
                raise BadCoding(f"the body is not valid {self._coding}") from exc
            if frame.has_ended:
                self._frame, self._input = None, frame.rest
            elif not data and not out:
                return b""
            if out:
                return out

    def finish(self) -> None:
        """Take the end of the input.

        Raises:
            BadCoding: If the body is not whole.
        """
        if self._frame is not None:
            raise BadCoding(f"the body ends in the middle of its {self._coding}")

    def _begin(self) -> Frame:
        if self._frames and (self._coding not in MULTIPLE or self._frames >= _MAX_FRAMES):
            raise BadCoding(f"the body goes on after its {self._coding}")
        self._frames += 1
        return _FRAMES[self._coding]()
