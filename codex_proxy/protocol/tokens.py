"""How many tokens a text has, about: an estimate, or an exact count with an encoding that is passed in."""

from collections.abc import Callable, Iterator
from typing import Any

from codex_proxy.protocol.wire import JsonObject, dumps

Count = Callable[[str], int]

# What the roles and separators around a message cost.
ITEM_OVERHEAD = 4
# A picture's price depends on its size, which takes decoding it to know: one tile more than
# the least for the high detail, the fixed price for the low one.
IMAGE_TOKENS = 765
LOW_DETAIL_IMAGE_TOKENS = 85


def estimate(text: str) -> int:
    """Return about how many tokens *text* has: a fourth of its UTF-8 bytes, rounded up.

    Near the truth for English and code; other scripts come out higher than they are.
    """
    return -(-len(text.encode("utf-8", "surrogatepass")) // 4)


def count_request(body: JsonObject, count: Count = estimate) -> int:
    """Count what the model reads of a Responses request: instructions, input, tools, output format.

    Encrypted contents are counted by their size, as nobody else can read them.
    """
    total = 0
    for text in _texts(body):
        total += count(text)
    items = body.get("input")
    if isinstance(items, str):
        return total + ITEM_OVERHEAD
    if isinstance(items, list):
        for item in items:
            total += ITEM_OVERHEAD
            if isinstance(item, dict):
                total += _fixed(item)
    return total


def _texts(body: JsonObject) -> Iterator[str]:
    """Walk over the texts; one function, so that nothing is counted twice."""
    if isinstance(instructions := body.get("instructions"), str):
        yield instructions
    items = body.get("input")
    if isinstance(items, str):
        yield items
    elif isinstance(items, list):
        for item in items:
            if isinstance(item, dict):
                yield from _item_texts(item)
    if isinstance(tools := body.get("tools"), list) and tools:
        yield _rendered(tools)
    text = body.get("text")
    if isinstance(text, dict) and isinstance(text.get("format"), dict):
        schema = text["format"].get("schema")
        if schema is not None:
            yield _rendered(schema)


def _item_texts(item: JsonObject) -> Iterator[str]:
    for key in ("role", "name", "arguments", "input", "output", "content", "summary", "tools", "action"):
        value = item.get(key)
        if isinstance(value, str):
            yield value
        elif isinstance(value, list) and key in _PARTS:
            for part in value:
                if isinstance(part, dict):
                    for word in ("text", "refusal", "filename"):
                        if isinstance(part.get(word), str):
                            yield part[word]
        elif isinstance(value, dict | list) and value:
            yield _rendered(value)


_PARTS = frozenset({"content", "output", "summary"})


def _fixed(item: JsonObject) -> int:
    """Return the tokens of what is no text."""
    total = 0
    encrypted = item.get("encrypted_content")
    if isinstance(encrypted, str) and item.get("type") != "reasoning":
        # Base64 of a text of its own; the reasoning of earlier turns is mostly not read again.
        total += len(encrypted) * 3 // 16
    for key in ("content", "output"):
        parts = item.get(key)
        for part in parts if isinstance(parts, list) else ():
            if not isinstance(part, dict):
                continue
            if part.get("type") == "input_image":
                total += LOW_DETAIL_IMAGE_TOKENS if part.get("detail") == "low" else IMAGE_TOKENS
            elif isinstance(data := part.get("file_data"), str):
                total += len(data) * 3 // 16
    return total


def _rendered(value: Any) -> str:
    try:
        return dumps(value).decode("utf-8", "replace")
    except RecursionError:
        # Deeper than any tool; the request itself is refused elsewhere.
        return ""
