"""How many tokens a request has: texts by a count that is passed in, the rest by rules that are written here.

The rules, for what only the backend could count exactly:

- **Pictures** cost by tiles of 512 pixels, `image_tokens`; their size is read from the head of the
  file. One that is elsewhere, or whose head says nothing, costs what a square one does.
- **Documents** that are text are counted as text. Others (PDF, office files) cost by the page, with
  a page guessed per 50 kB: the text of a page and a picture of it.
- **Audio** costs ten tokens per second, with the seconds guessed from the bytes.
- **Encrypted contents** cost by their size. Reasoning counts from the last message of the user on:
  what the model thought in the turn that is under way is read again after each tool call, and what it
  thought in earlier turns is not, unless the request asks for all of it.
"""

import binascii
import codecs
from collections.abc import Callable, Iterator
from typing import Any

from codex_proxy.protocol.wire import JsonObject, dumps

Count = Callable[[str], int]

# What the roles and separators around a message cost.
ITEM_OVERHEAD = 4

IMAGE_BASE_TOKENS = 85
IMAGE_TILE_TOKENS = 170
LOW_DETAIL_IMAGE_TOKENS = IMAGE_BASE_TOKENS
# A picture whose size is not known: as a square one of high detail, which has four tiles.
IMAGE_TOKENS = IMAGE_BASE_TOKENS + 4 * IMAGE_TILE_TOKENS
# As it is, a picture is taken up to this size, and never costs more than this budget.
ORIGINAL_PIXELS = 6_000
ORIGINAL_IMAGE_TOKENS = 10_000

PAGE_TOKENS = 1_500
PAGE_BYTES = 50_000
# A text beyond this fits no model's window; it need not be taken apart to say so.
MAX_TEXT_DOCUMENT_BYTES = 4 * 1024 * 1024

AUDIO_TOKENS_PER_SECOND = 10
# 24 kHz, 16 bit, mono; and what compression at 128 kbit/s leaves of it.
WAVE_BYTES_PER_SECOND = 48_000
AUDIO_BYTES_PER_SECOND = 16_000

# What is around the text in an encrypted reasoning item, as the Codex CLI has it too.
REASONING_WRAPPING_BYTES = 650


def estimate(text: str) -> int:
    """Return about how many tokens *text* has: a fourth of its UTF-8 bytes, rounded up.

    Near the truth for English and code; other scripts come out higher than they are.
    """
    return -(-len(text.encode("utf-8", "surrogatepass")) // 4)


def count_request(body: JsonObject, count: Count = estimate) -> int:
    """Count what the model reads of a Responses request: instructions, input, tools, output format.

    *count* is asked once for each text and its answers are only added up, so a caller may keep
    the texts, answer zero and count them later.
    """
    return sum(found if isinstance(found, int) else count(found) for found in _walk(body))


def image_tokens(width: int, height: int, detail: str = "auto") -> int:
    """Return what a picture of this size costs.

    `high` and `auto` make it fit into 2048 x 2048 and shrink its shorter side to 768; `low` has one
    price; `original` keeps its size, up to 6000 pixels, at 10,000 tokens at most. Nothing is enlarged.
    """
    if detail == "low":
        return LOW_DETAIL_IMAGE_TOKENS
    long, short = max(width, height), min(width, height)
    # As a fraction, so that sizes at the edge of a tile come out right.
    times, by = 1, 1
    for limit, side in ((ORIGINAL_PIXELS, long),) if detail == "original" else ((2048, long), (768, short)):
        if limit * by < side * times:
            times, by = limit, side
    tiles = -(-width * times // (512 * by)) * -(-height * times // (512 * by))
    total = IMAGE_BASE_TOKENS + IMAGE_TILE_TOKENS * tiles
    return min(total, ORIGINAL_IMAGE_TOKENS) if detail == "original" else total


def image_size(encoded: str, start: int = 0) -> tuple[int, int] | None:
    """Return width and height of the PNG, JPEG, GIF or WebP whose base64 begins at *start*.

    Only its head is decoded. None means that it says nothing.
    """
    image = _Base64(encoded, start)
    try:
        head = image.read(0, 32)
        if len(head) < _SMALLEST_IMAGE:
            return None
        if head.startswith(b"\x89PNG\r\n\x1a\n") and head[12:16] == b"IHDR":
            size = _big(head[16:20]), _big(head[20:24])
        elif head.startswith((b"GIF87a", b"GIF89a")):
            size = _little(head[6:8]), _little(head[8:10])
        elif head[:4] == b"RIFF" and head[8:12] == b"WEBP":
            size = _webp_size(head)
        elif head.startswith(b"\xff\xd8"):
            size = _jpeg_size(image)
        else:
            return None
    except ValueError:
        return None
    return size if all(size) else None


# -- the walk -----------------------------------------------------------------------------


def _walk(body: JsonObject) -> Iterator[str | int]:
    """Yield the texts, and the tokens of what is none; one walk, so that nothing counts twice."""
    if isinstance(instructions := body.get("instructions"), str):
        yield instructions
    items = body.get("input")
    if isinstance(items, str):
        yield ITEM_OVERHEAD
        yield items
    elif isinstance(items, list):
        current = _turn_under_way(body, items)
        for index, item in enumerate(items):
            yield ITEM_OVERHEAD
            if isinstance(item, dict):
                yield from _item(item, is_current=index >= current)
    if isinstance(tools := body.get("tools"), list) and tools:
        yield _rendered(tools)
    text = body.get("text")
    if isinstance(text, dict) and isinstance(text.get("format"), dict):
        schema = text["format"].get("schema")
        if schema is not None:
            yield _rendered(schema)


def _turn_under_way(body: JsonObject, items: list[Any]) -> int:
    """Return where the reasoning begins that the model reads again."""
    reasoning = body.get("reasoning")
    if isinstance(reasoning, dict) and reasoning.get("context") == "all_turns":
        return 0
    for index in range(len(items) - 1, -1, -1):
        item = items[index]
        if isinstance(item, dict) and item.get("role") == "user":
            return index
    return 0


_PARTS = frozenset({"content", "output", "summary"})


def _item(item: JsonObject, *, is_current: bool) -> Iterator[str | int]:
    for key in ("role", "name", "arguments", "input", "output", "content", "summary", "tools", "action"):
        value = item.get(key)
        if isinstance(value, str):
            yield value
        elif isinstance(value, list) and key in _PARTS:
            for part in value:
                if isinstance(part, dict):
                    yield from _part(part)
        elif key == "output" and isinstance(value, dict) and "image_url" in value:
            # A screenshot.
            yield _image(value.get("image_url"), value.get("detail"))
        elif isinstance(value, dict | list) and value:
            yield _rendered(value)
    kind = item.get("type")
    encrypted = item.get("encrypted_content")
    if isinstance(encrypted, str):
        if kind != "reasoning":
            yield _encrypted(encrypted)
        elif is_current:
            yield max(len(encrypted) * 3 // 4 - REASONING_WRAPPING_BYTES, 0) // 4
    if kind == "image_generation_call" and isinstance(result := item.get("result"), str):
        yield _image(result, None)


def _part(part: JsonObject) -> Iterator[str | int]:
    for word in ("text", "refusal", "filename"):
        if isinstance(part.get(word), str):
            yield part[word]
    kind = part.get("type")
    if kind == "input_image":
        yield _image(part.get("image_url"), part.get("detail"))
    elif kind == "input_audio":
        yield _audio(part)
    elif isinstance(data := part.get("file_data"), str):
        yield _document(data)
    elif isinstance(part.get("file_url"), str):
        # Nobody has seen it here.
        yield PAGE_TOKENS
    elif isinstance(encrypted := part.get("encrypted_content"), str):
        yield _encrypted(encrypted)


def _image(url: Any, detail: Any) -> int:
    detail = detail if isinstance(detail, str) else "auto"
    if detail == "low":
        return LOW_DETAIL_IMAGE_TOKENS
    if not isinstance(url, str):
        return IMAGE_TOKENS
    size = image_size(url, _data_url(url)[1])
    return image_tokens(*size, detail) if size is not None else IMAGE_TOKENS


def _document(data: str) -> str | int:
    kind, start = _data_url(data)
    size = (len(data) - start) * 3 // 4
    encoded = _Base64(data, start)
    try:
        head = encoded.read(0, 1024)
        if kind.startswith("text/") or _is_text(head):
            if size > MAX_TEXT_DOCUMENT_BYTES:
                return size // 4
            return encoded.read(0, size).decode("utf-8", "replace")
    except ValueError:
        # No base64: the backend will say so, or knows better.
        pass
    return max(1, -(-size // PAGE_BYTES)) * PAGE_TOKENS


def _is_text(head: bytes) -> bool:
    if b"\0" in head or head.startswith(b"%PDF"):
        return False
    try:
        # Not final: the head may end in the midst of a character.
        codecs.getincrementaldecoder("utf-8")().decode(head)
    except UnicodeDecodeError:
        return False
    return True


def _audio(part: JsonObject) -> int:
    inner = part.get("input_audio")
    inner = inner if isinstance(inner, dict) else part
    data = inner.get("data")
    if not isinstance(data, str):
        return 0
    pace = WAVE_BYTES_PER_SECOND if inner.get("format") == "wav" else AUDIO_BYTES_PER_SECOND
    return -(-len(data) * 3 * AUDIO_TOKENS_PER_SECOND // (4 * pace))


def _encrypted(text: str) -> int:
    """Return the tokens of a text that comes as base64 of bytes that only the backend can read."""
    return len(text) * 3 // 16


def _rendered(value: Any) -> str:
    try:
        return dumps(value).decode("utf-8", "replace")
    except RecursionError:
        # Deeper than any tool; the request itself is refused elsewhere.
        return ""


# -- what is inside of base64 -------------------------------------------------------------


def _data_url(text: str) -> tuple[str, int]:
    """Return the media type of a data: URL and where its base64 begins; other text is all base64."""
    if text[:5].lower() != "data:":
        return "", 0
    # The head is short; what follows may be megabytes and is not copied.
    comma = text.find(",", 5, 1024)
    return (text[5:comma].partition(";")[0].strip().lower(), comma + 1) if comma > 0 else ("", 0)


class _Base64:
    """Bytes in base64 from *start* on, of which only what is asked for gets decoded."""

    __slots__ = ("_start", "_text")

    def __init__(self, text: str, start: int) -> None:
        self._text = text
        self._start = start

    def read(self, offset: int, size: int) -> bytes:
        """Return the bytes there, fewer at the end.

        Raises:
            ValueError: If that is no base64.
        """
        first, last = offset // 3, -(-(offset + size) // 3)
        quads = self._text[self._start + 4 * first : self._start + 4 * last]
        quads += "=" * (-len(quads) % 4)
        return binascii.a2b_base64(quads)[offset - 3 * first :][:size]


# An empty GIF; the others need more.
_SMALLEST_IMAGE = 26


def _big(data: bytes) -> int:
    return int.from_bytes(data, "big")


def _little(data: bytes) -> int:
    return int.from_bytes(data, "little")


def _webp_size(head: bytes) -> tuple[int, int]:
    match head[12:16]:
        case b"VP8 " if len(head) > 29 and head[23:26] == b"\x9d\x01\x2a":
            return _little(head[26:28]) & 0x3FFF, _little(head[28:30]) & 0x3FFF
        case b"VP8L" if head[20:21] == b"\x2f":
            bits = _little(head[21:25])
            return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
        case b"VP8X" if len(head) > 29:
            return _little(head[24:27]) + 1, _little(head[27:30]) + 1
        case _:
            return 0, 0


# Start of frame, in all its kinds; C4, C8 and CC in their midst are something else.
_JPEG_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
# A profile and a preview come in segments of 64 KiB; more than this many are no picture.
_MAX_JPEG_SEGMENTS = 256


def _jpeg_size(image: _Base64) -> tuple[int, int]:
    """Hop from segment to segment, whose contents are never decoded, to the one with the size."""
    offset = 2
    for _ in range(_MAX_JPEG_SEGMENTS):
        head = image.read(offset, 9)
        if len(head) < 9 or head[0] != 0xFF:
            break
        if head[1] == 0xFF:
            # A filling byte.
            offset += 1
        elif head[1] in _JPEG_FRAMES:
            return _big(head[7:9]), _big(head[5:7])
        else:
            offset += 2 + _big(head[2:4])
    return 0, 0
