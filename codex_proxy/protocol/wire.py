"""JSON as the wire has it: fast where it is well-formed, lossless where it is odd."""

import json
from typing import Any

import orjson

JsonObject = dict[str, Any]


class BadJson(ValueError):
    """The bytes are not JSON; the message says where."""


def loads(data: bytes | bytearray | memoryview | str) -> Any:
    """Parse JSON strictly (no NaN, no lone surrogates, bounded depth).

    Raises:
        BadJson: If it is anything else.
    """
    try:
        return orjson.loads(data)
    except orjson.JSONDecodeError as exc:
        raise BadJson(str(exc)) from exc


def loads_lenient(data: bytes) -> Any:
    """Parse what the backend sent, lone surrogates included.

    A delta may hold half of a UTF-16 pair as an escape; orjson refuses that, the standard
    library keeps it, and `dumps` writes it back as it came.

    Raises:
        BadJson: If it is no JSON at all.
    """
    try:
        return orjson.loads(data)
    except orjson.JSONDecodeError:
        try:
            return json.loads(data.decode("utf-8", "replace"))
        except (ValueError, RecursionError) as exc:
            raise BadJson(str(exc)) from exc


def dumps(value: Any) -> bytes:
    """Render compact JSON; strings that UTF-8 cannot hold keep their escapes."""
    try:
        return orjson.dumps(value)
    except (TypeError, orjson.JSONEncodeError):
        # Lone surrogates and integers beyond 64 bits.
        return json.dumps(value, separators=(",", ":")).encode("ascii")
