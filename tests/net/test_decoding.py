"""Compressed bodies."""

import gzip
import random
import sys
import zlib

import brotli
import pytest

from codex_proxy.compression import CODINGS
from codex_proxy.net.decoding import BadCoding, Decoder

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

TEXT = random.Random(1).randbytes(3000) + b"text " * 60_000


def encoded(coding: str, data: bytes) -> bytes:
    match coding:
        case "gzip" | "x-gzip":
            return gzip.compress(data)
        case "deflate":
            return zlib.compress(data)
        case "br":
            compressed: bytes = brotli.compress(data, quality=5)
            return compressed
        case _:
            return zstd.compress(data)


def decoded(decoder: Decoder, data: bytes, *, size: int, most: int) -> bytes:
    out = b""
    for at in range(0, len(data), size):
        decoder.put(data[at : at + size])
        while part := decoder.get(most):
            assert len(part) <= most
            out += part
    decoder.finish()
    return out


@pytest.mark.parametrize("coding", sorted(CODINGS))
@pytest.mark.parametrize("size", [1, 7, 1000, 10_000_000])
@pytest.mark.parametrize("most", [1000, 65_536])
def test_what_comes_in_pieces_of_any_size_is_whole(coding: str, size: int, most: int) -> None:
    assert decoded(Decoder(coding), encoded(coding, TEXT), size=size, most=most) == TEXT


@pytest.mark.parametrize("coding", sorted(CODINGS))
def test_nothing_is_nothing(coding: str) -> None:
    decoder = Decoder(coding)
    assert decoder.get(100) == b""
    decoder.finish()


@pytest.mark.parametrize("coding", sorted(CODINGS))
def test_a_body_that_ends_early_is_not_whole(coding: str) -> None:
    data = encoded(coding, b"some words, and more of them")
    for end in range(1, len(data)):
        decoder = Decoder(coding)
        decoder.put(data[:end])
        while decoder.get(10):
            pass
        with pytest.raises(BadCoding, match="in the middle"):
            decoder.finish()


@pytest.mark.parametrize("coding", sorted(CODINGS))
def test_noise_is_refused(coding: str) -> None:
    decoder = Decoder(coding)
    with pytest.raises(BadCoding):
        decoded(decoder, b"\xff\xfe\xfd" * 200, size=50, most=100)


@pytest.mark.parametrize("coding", sorted(CODINGS))
def test_a_bomb_is_decoded_step_by_step(coding: str) -> None:
    decoder = Decoder(coding)
    decoder.put(encoded(coding, bytes(50_000_000)))
    for _ in range(50):
        assert 0 < len(decoder.get(1000)) <= 1000
    assert len(decoder._surplus) <= 128 * 1024


def test_frames_without_end_are_refused() -> None:
    decoder = Decoder("gzip")
    decoder.put(gzip.compress(b"") * 2000)
    with pytest.raises(BadCoding, match="goes on"):
        decoder.get(100)


def test_a_window_that_takes_all_memory_is_refused() -> None:
    window: dict[int, int] = {zstd.CompressionParameter.window_log: 27}
    compressor = zstd.ZstdCompressor(options=window)
    # In two steps, so that it cannot know how little there is.
    data = compressor.compress(bytes(100)) + compressor.flush()
    decoder = Decoder("zstd")
    decoder.put(data)
    with pytest.raises(BadCoding):
        decoder.get(100)
