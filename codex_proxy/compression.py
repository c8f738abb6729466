"""What bodies are compressed with, frame by frame: never more is inflated than is asked for.

A kilobyte may stand for a gigabyte, so whoever takes a compressed body says how much of it he wants at a time.
"""

import sys
import zlib
from typing import Final, Protocol

import brotli

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

__all__ = ["BROKEN", "CODINGS", "MULTIPLE", "Brotli", "Frame", "Zlib", "Zstd", "gzip_frame", "zstd"]

CODINGS: Final = frozenset({"zstd", "gzip", "x-gzip", "br", "deflate"})
"""The content codings that can be undone."""

MULTIPLE: Final = frozenset({"zstd", "gzip", "x-gzip"})
"""Those of which a second frame may follow the first: where the format says so."""

BROKEN: Final = (zlib.error, zstd.ZstdError, brotli.error, EOFError)
"""What a frame raises that is not what it is called."""

# RFC 9659: content coded as zstd must not need a window beyond 8 MB. A frame of a few bytes
# could otherwise ask for 128 MiB of ours; the format itself allows gigabytes.
_ZSTD_WINDOW_LOG = 23


class Frame(Protocol):
    """One frame being inflated."""

    @property
    def has_ended(self) -> bool: ...

    @property
    def rest(self) -> bytes:
        """Input past the end of the frame."""
        ...

    def step(self, data: bytes, most: int) -> bytes:
        """Take *data* and return about *most* bytes; nothing when given nothing means that more is needed."""
        ...


class Zlib:
    """gzip, zlib or raw deflate, as `wbits` says."""

    def __init__(self, wbits: int) -> None:
        self._inner = zlib.decompressobj(wbits)

    @property
    def has_ended(self) -> bool:
        return self._inner.eof

    @property
    def rest(self) -> bytes:
        return self._inner.unused_data

    def step(self, data: bytes, most: int) -> bytes:
        return self._inner.decompress(self._inner.unconsumed_tail + data, most)


def gzip_frame() -> Frame:
    """Return a frame of gzip."""
    return Zlib(16 + zlib.MAX_WBITS)


class Zstd:
    """A frame of zstd."""

    def __init__(self) -> None:
        self._inner = zstd.ZstdDecompressor(
            options={zstd.DecompressionParameter.window_log_max: _ZSTD_WINDOW_LOG}
        )

    @property
    def has_ended(self) -> bool:
        return self._inner.eof

    @property
    def rest(self) -> bytes:
        return self._inner.unused_data

    def step(self, data: bytes, most: int) -> bytes:
        return self._inner.decompress(data, most)


class Brotli:
    """Brotli, which has one frame."""

    rest = b""

    def __init__(self) -> None:
        self._inner = brotli.Decompressor()

    @property
    def has_ended(self) -> bool:
        return bool(self._inner.is_finished())

    def step(self, data: bytes, most: int) -> bytes:
        out: bytes = self._inner.process(data, output_buffer_limit=most)
        return out
