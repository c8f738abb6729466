"""What a request costs: texts by a count, everything else by rules."""

import base64
import struct
import time
from collections.abc import Callable
from typing import Any

import pytest

from codex_proxy.protocol.tokens import (
    IMAGE_TOKENS,
    ITEM_OVERHEAD,
    LOW_DETAIL_IMAGE_TOKENS,
    MAX_TEXT_DOCUMENT_BYTES,
    PAGE_TOKENS,
    count_request,
    estimate,
    image_size,
    image_tokens,
)


@pytest.mark.parametrize(
    ("text", "tokens"), [("", 0), ("a", 1), ("abcd", 1), ("abcde", 2), ("äöü", 2), ("\ud83d", 1), ("漢字", 2)]
)
def test_an_estimate_is_a_fourth_of_the_bytes_rounded_up(text: str, tokens: int) -> None:
    assert estimate(text) == tokens


def words(text: str) -> int:
    return len(text.split())


def message(content: Any, role: str = "user") -> dict[str, Any]:
    return {"type": "message", "role": role, "content": content}


@pytest.mark.parametrize(
    ("body", "tokens"),
    [
        ({}, 0),
        ({"input": "one two three"}, 3 + ITEM_OVERHEAD),
        ({"instructions": "be brief", "input": []}, 2),
        ({"input": [message("one two")]}, 3 + ITEM_OVERHEAD),
        ({"input": [message([{"type": "input_text", "text": "one two"}])]}, 3 + ITEM_OVERHEAD),
        ({"input": [message([{"type": "refusal", "refusal": "no no no"}], "assistant")]}, 4 + ITEM_OVERHEAD),
        (
            {"input": [{"type": "function_call", "call_id": "c", "name": "look", "arguments": "a b"}]},
            3 + ITEM_OVERHEAD,
        ),
        ({"input": [{"type": "function_call_output", "call_id": "c", "output": "a b c"}]}, 3 + ITEM_OVERHEAD),
        (
            {"input": [{"type": "function_call_output", "output": [{"type": "input_text", "text": "a b"}]}]},
            2 + ITEM_OVERHEAD,
        ),
        (
            {
                "input": [
                    message([{"type": "input_image", "image_url": "data:image/png;base64," + "A" * 9000}])
                ]
            },
            1 + IMAGE_TOKENS + ITEM_OVERHEAD,
        ),
        (
            {"input": [message([{"type": "input_image", "detail": "low", "image_url": "u"}])]},
            1 + LOW_DETAIL_IMAGE_TOKENS + ITEM_OVERHEAD,
        ),
        (
            {"input": [{"type": "reasoning", "summary": [{"text": "a b"}], "encrypted_content": "g" * 800}]},
            2 + ITEM_OVERHEAD,
        ),
        ({"input": [{"type": "compaction", "encrypted_content": "g" * 1600}]}, 300 + ITEM_OVERHEAD),
        ({"tools": [{"type": "function", "name": "f"}]}, 1),
        ({"text": {"format": {"type": "json_schema", "schema": {"type": "object"}}}}, 1),
    ],
)
def test_a_request_counts_what_the_model_reads(body: dict[str, Any], tokens: int) -> None:
    assert count_request(body, words) == tokens


@pytest.mark.parametrize("odd", [None, 7, True, [], {}, [None, 7, [], {"type": []}], {"a": 1}, "\ud800"])
def test_anything_can_be_counted(odd: Any) -> None:
    for key in ("instructions", "input", "tools", "text"):
        assert count_request({key: odd}) >= 0
    for key in ("role", "content", "summary", "output", "action", "encrypted_content", "type", "tools"):
        assert count_request({"input": [{key: odd}]}) >= 0
        assert count_request({"input": [{"content": [{key: odd}]}]}) >= 0
    for kind in ("input_image", "input_file", "input_audio"):
        for key in ("image_url", "detail", "file_data", "file_url", "input_audio", "data", "format"):
            part = {"type": kind, "image_url": "data:,", "input_audio": {"data": "", key: odd}, key: odd}
            assert count_request({"input": [{"output": [part]}, {"output": part}]}) >= 0
    assert count_request({"input": [{"type": "image_generation_call", "result": odd}]}) >= 0


def test_a_bottomless_tool_is_no_crash() -> None:
    deep: dict[str, Any] = {}
    for _ in range(100_000):
        deep = {"a": deep}
    assert count_request({"tools": [deep]}) == 0


# -- pictures -----------------------------------------------------------------------------


def png(width: int, height: int) -> bytes:
    header = struct.pack(">II", width, height) + b"\x08\x06\0\0\0"
    return b"\x89PNG\r\n\x1a\n\0\0\0\x0dIHDR" + header + bytes(60)


def gif(width: int, height: int, version: bytes = b"GIF89a") -> bytes:
    return version + struct.pack("<HH", width, height) + b"\xf0\0\0" + bytes(20)


def jpeg(width: int, height: int, *before: bytes, frame: int = 0xC0) -> bytes:
    head = b"\xff\xd8\xff\xe0\0\x10JFIF\0\x01\x01\0\0\x01\0\x01\0\0"
    return (
        head
        + b"".join(before)
        + bytes([0xFF, frame])
        + struct.pack(">HBHHB", 17, 8, height, width, 3)
        + bytes(9)
    )


def segment(marker: int, content: bytes) -> bytes:
    return bytes([0xFF, marker]) + struct.pack(">H", len(content) + 2) + content


def webp(kind: bytes, content: bytes) -> bytes:
    content = kind + struct.pack("<I", len(content)) + content
    return b"RIFF" + struct.pack("<I", len(content) + 4) + b"WEBP" + content


def lossy(width: int, height: int) -> bytes:
    # The upper two bits of each say how to enlarge it.
    return webp(
        b"VP8 ", b"\x30\x01\0\x9d\x01\x2a" + struct.pack("<HH", width | 0x4000, height | 0x8000) + bytes(9)
    )


def lossless(width: int, height: int) -> bytes:
    return webp(b"VP8L", b"\x2f" + struct.pack("<I", width - 1 | height - 1 << 14 | 1 << 28) + bytes(9))


def extended(width: int, height: int) -> bytes:
    sizes = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    return webp(b"VP8X", b"\x10\0\0\0" + sizes + bytes(20))


# With a preview that is a picture of its own, and more profile than one segment holds.
CAMERA = (
    segment(0xE1, b"Exif\0\0" + jpeg(160, 120)),
    segment(0xE2, bytes(65_000)),
    b"\xff",
    segment(0xDB, bytes(65)),
)

FORMATS: dict[str, Callable[[int, int], bytes]] = {
    "png": png,
    "gif": gif,
    "gif87": lambda width, height: gif(width, height, b"GIF87a"),
    "jpeg": jpeg,
    "jpeg-progressive": lambda width, height: jpeg(width, height, frame=0xC2),
    "jpeg-of-a-camera": lambda width, height: jpeg(width, height, *CAMERA),
    "webp-lossy": lossy,
    "webp-lossless": lossless,
    "webp-extended": extended,
}


def base64_of(data: bytes) -> str:
    return base64.b64encode(data).decode()


def data_url(data: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64_of(data)}"


@pytest.mark.parametrize("size", [(1, 1), (512, 300), (1025, 4097), (16_383, 16_383)])
@pytest.mark.parametrize("name", FORMATS)
def test_the_size_of_a_picture_is_read_from_its_head(name: str, size: tuple[int, int]) -> None:
    encoded = base64_of(FORMATS[name](*size))
    assert image_size(encoded) == size
    for start in range(1, 5):
        assert image_size("," * start + encoded, start) == size
    assert image_size(encoded.rstrip("=")) == size


@pytest.mark.parametrize(
    ("encoded", "size"),
    [
        ("R0lGODlhAQABAIAAAAAAAP///yH5BAEAAAAALAAAAAABAAEAAAIBRAA7", (1, 1)),
        ("UklGRhoAAABXRUJQVlA4TA0AAAAvAAAAEAcQERGIiP4HAA==", (1, 1)),
        ("UklGRiIAAABXRUJQVlA4IBYAAAAwAQCdASoBAAEADsD+JaQAA3AAAAAA", (1, 1)),
        (
            "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg==",
            (1, 1),
        ),
    ],
)
def test_the_size_of_a_picture_that_others_made(encoded: str, size: tuple[int, int]) -> None:
    assert image_size(encoded) == size


@pytest.mark.parametrize("name", FORMATS)
def test_a_picture_that_ends_early_has_its_size_or_none(name: str) -> None:
    data = FORMATS[name](300, 200)
    for end in range(min(len(data), 400)):
        assert image_size(base64_of(data[:end])) in (None, (300, 200))


@pytest.mark.parametrize(
    "odd",
    [
        b"",
        b"BM" + bytes(60),
        b"<svg xmlns='http://www.w3.org/2000/svg' width='9' height='9'/>",
        png(0, 5),
        b"\xff\xd8" + bytes(60),
        b"\xff\xd8" + b"\xff" * 1000,
        b"\xff\xd8" + segment(0xE0, b"") * 1000,
        webp(b"VP9 ", bytes(30)),
        b"RIFF\0\0\0\0WAVE" + bytes(60),
    ],
)
def test_a_picture_that_says_nothing_has_no_size(odd: bytes) -> None:
    assert image_size(base64_of(odd)) is None


@pytest.mark.parametrize("odd", ["ä" * 40, "-_-_" * 20, "A", "AAAAA", "\ud800" * 40, "=" * 40])
def test_what_is_no_base64_is_no_picture(odd: str) -> None:
    assert image_size(odd) is None


@pytest.mark.parametrize(
    ("width", "height", "detail", "tokens"),
    [
        # As OpenAI's guide counts them.
        (1024, 1024, "high", 765),
        (2048, 4096, "high", 1105),
        (4096, 8192, "low", 85),
        (1, 1, "auto", 255),
        (512, 512, "auto", 255),
        (513, 512, "auto", 425),
        (512, 513, "auto", 425),
        (768, 768, "auto", 765),
        # Fits into 2048, and its short side is short enough.
        (2048, 768, "auto", 85 + 8 * 170),
        (2049, 768, "auto", 85 + 8 * 170),
        (100_000, 1, "auto", 85 + 4 * 170),
        (65_500, 65_500, "auto", 765),
        # 1440 x 1080 becomes 1024 x 768: two by two tiles and not a hair more.
        (1440, 1080, "high", 765),
        (1441, 1080, "high", 85 + 6 * 170),
        (1024, 1024, "original", 765),
        (1440, 1080, "original", 85 + 9 * 170),
        (2048, 4096, "original", 85 + 32 * 170),
        (6000, 512, "original", 85 + 12 * 170),
        (60_000, 5120, "original", 85 + 12 * 170),
        (6000, 6000, "original", 10_000),
        (1024, 1024, "of a kind to come", 765),
    ],
)
def test_a_picture_costs_by_its_tiles(width: int, height: int, detail: str, tokens: int) -> None:
    assert image_tokens(width, height, detail) == tokens
    assert image_tokens(height, width, detail) == tokens


def counted(*parts: dict[str, Any]) -> int:
    """Return the tokens of parts alone."""
    return count_request({"input": [{"content": list(parts)}]}, words) - ITEM_OVERHEAD


def image(url: Any, **more: Any) -> dict[str, Any]:
    return {"type": "input_image", "image_url": url, **more}


def test_a_picture_in_a_request_costs_by_its_own_size() -> None:
    small, large = data_url(png(512, 512)), data_url(jpeg(4000, 3000, *CAMERA), "image/jpeg")
    assert counted(image(small)) == 255
    assert counted(image(small, detail=None)) == 255
    assert counted(image(large, detail="high")) == 765
    assert counted(image(large, detail="low")) == LOW_DETAIL_IMAGE_TOKENS
    assert counted(image(large, detail="original")) == 85 + 48 * 170
    assert counted(image(small), image(large)) == 255 + 765
    output = {"type": "function_call_output", "call_id": "c", "output": [image(small)]}
    assert count_request({"input": [output]}, words) == 255 + ITEM_OVERHEAD


def test_a_screenshot_and_a_made_picture_are_pictures_and_no_text() -> None:
    screenshot = {"type": "computer_screenshot", "image_url": data_url(png(512, 512))}
    output = {"type": "computer_call_output", "call_id": "c", "output": screenshot}
    assert count_request({"input": [output]}, words) == 255 + ITEM_OVERHEAD
    made = {"type": "image_generation_call", "result": base64_of(png(1024, 1024))}
    assert count_request({"input": [made]}, words) == 765 + ITEM_OVERHEAD


@pytest.mark.parametrize(
    "url",
    [
        "https://example.com/a.png",
        "data:image/png;base64,",
        "data:image/png;base64,!!!!",
        "data:image/png;base64," + base64_of(bytes(90)),
        "data:" + "a" * 5000,
        "ä" * 100,
        "",
        None,
        {"url": "x"},
    ],
)
def test_a_picture_that_cannot_be_looked_at_costs_what_a_square_one_does(url: Any) -> None:
    assert counted(image(url)) == IMAGE_TOKENS
    assert counted(image(url, detail="low")) == LOW_DETAIL_IMAGE_TOKENS


def test_only_the_head_of_a_large_picture_is_decoded() -> None:
    url = data_url(png(512, 512) + bytes(20_000_000))
    started = time.perf_counter()
    assert counted(image(url)) == 255
    # Microseconds; decoding it takes tens of milliseconds.
    assert time.perf_counter() - started < 0.02


# -- documents and audio ------------------------------------------------------------------


def file(data: bytes, kind: str = "application/octet-stream") -> dict[str, Any]:
    return {"type": "input_file", "file_data": data_url(data, kind)}


@pytest.mark.parametrize(
    ("part", "tokens"),
    [
        (file(b"one two\nthree", "text/plain"), 3),
        (file(b'{"a": 1, "b": 2}', "application/json"), 4),
        (file("eins zwei drei \u4f60".encode()), 4),
        # A sniffed head that ends in the midst of a character.
        (file("é ".encode() * 2000), 2000),
        # Another encoding, that says it is text.
        (file("für alle".encode("latin-1"), "text/plain"), 2),
        ({"type": "input_file", "file_data": base64_of(b"one two")}, 2),
        ({"type": "input_file", "file_data": data_url(b"a b", "text/csv"), "filename": "a b c"}, 3 + 2),
        (file(b"%PDF-1.7\n" + b"x" * 100, "application/pdf"), PAGE_TOKENS),
        (file(b"%PDF-1.7\n" + b"x" * 100_000), 3 * PAGE_TOKENS),
        (file(b"PK\x03\x04\x14\0" + bytes(10)), PAGE_TOKENS),
        (file(b"\xd0\xcf\x11\xe0" + bytes(149_990)), 3 * PAGE_TOKENS),
        (file(b"a" * (MAX_TEXT_DOCUMENT_BYTES + 4), "text/plain"), MAX_TEXT_DOCUMENT_BYTES // 4 + 1),
        ({"type": "input_file", "file_data": "äöü"}, PAGE_TOKENS),
        ({"type": "input_file", "file_url": "https://example.com/a.pdf"}, PAGE_TOKENS),
        ({"type": "input_file", "file_data": ""}, 0),
        ({"type": "input_file"}, 0),
        ({"type": "input_audio", "input_audio": {"data": "A" * 64_000, "format": "wav"}}, 10),
        ({"type": "input_audio", "input_audio": {"data": "A" * 64_000, "format": "mp3"}}, 30),
        ({"type": "input_audio", "data": "A" * 4, "format": "mp3"}, 1),
        ({"type": "input_audio", "input_audio": None}, 0),
        ({"type": "encrypted_content", "encrypted_content": "g" * 1600}, 300),
    ],
)
def test_documents_and_audio_are_counted(part: dict[str, Any], tokens: int) -> None:
    assert counted(part) == tokens


# -- reasoning ----------------------------------------------------------------------------


def thought(text: str = "g" * 2000) -> dict[str, Any]:
    return {"type": "reasoning", "summary": [], "encrypted_content": text}


THOUGHT = (1500 - 650) // 4


@pytest.mark.parametrize(
    ("items", "thoughts"),
    [
        ([message("q"), thought(), message("a", "assistant"), message("q")], 0),
        ([message("q"), thought(), thought()], 2),
        (
            [
                message("q"),
                thought(),
                message("q"),
                thought(),
                {"type": "function_call_output", "output": ""},
            ],
            1,
        ),
        ([thought()], 1),
        ([message("q"), thought("")], 0),
    ],
)
def test_reasoning_counts_in_the_turn_under_way(items: list[dict[str, Any]], thoughts: int) -> None:
    body: dict[str, Any] = {"input": items}
    assert count_request(body) - count_request(without_thoughts(body)) == thoughts * THOUGHT


def without_thoughts(body: dict[str, Any]) -> dict[str, Any]:
    return {"input": [{**item, "encrypted_content": None} for item in body["input"]]}


def test_reasoning_of_all_turns_counts_if_it_is_asked_for() -> None:
    body: dict[str, Any] = {"input": [message("q"), thought(), message("q")]}
    less = count_request(body)
    assert count_request({**body, "reasoning": {"context": "all_turns"}}) == less + THOUGHT
    others: list[Any] = [{"context": "auto"}, {"context": []}, {}, None, "all_turns"]
    for odd in others:
        assert count_request({**body, "reasoning": odd}) == less


def test_a_count_may_be_made_later() -> None:
    """The texts can be kept and counted elsewhere, because they are only added up."""
    body: dict[str, Any] = {
        "instructions": "a b",
        "input": [message([image(None), file(b"x y z", "text/plain")]), thought()],
        "tools": [{"name": "f"}],
    }
    texts: list[str] = []

    def keep(text: str) -> int:
        texts.append(text)
        return 0

    assert count_request(body, keep) + sum(map(words, texts)) == count_request(body, words)
    assert "x y z" in texts
