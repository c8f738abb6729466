"""JSON as the wire has it: fast where it is well-formed, lossless where it is odd."""

import json
from typing import Any

import msgspec
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


_write_spelled = msgspec.json.Encoder().encode


class Fields:
    """The fields of a JSON object, read or still as they are spelled: of a large one most are only passed on."""

    __slots__ = ("_fields", "_spelled", "is_changed")

    def __init__(self, fields: dict[str, Any], *, spelled: bool = False) -> None:
        self._fields = fields
        self._spelled = spelled
        """Whether the values are `msgspec.Raw`."""
        self.is_changed = False

    def __contains__(self, name: str) -> bool:
        return name in self._fields

    def get(self, name: str) -> Any:
        """Return a value; None when there is none."""
        value = self._fields.get(name)
        return loads_lenient(bytes(value)) if self._spelled and value is not None else value

    def put(self, name: str, value: Any) -> None:
        """Set a value, in its old place if it has one."""
        if name not in self._fields or self.get(name) != value:
            self._fields[name] = msgspec.Raw(dumps(value)) if self._spelled else value
            self.is_changed = True

    def drop(self, name: str) -> None:
        """Take a value out."""
        del self._fields[name]
        self.is_changed = True

    def render(self) -> bytes:
        """Render the object."""
        return _write_spelled(self._fields) if self._spelled else dumps(self._fields)

    def whole(self) -> JsonObject:
        """Return the object as a dict, which is not to be changed."""
        return {name: self.get(name) for name in self._fields} if self._spelled else self._fields


class Pieces:
    """A text in the pieces in which it came, each also as JSON spells it.

    What is only passed on so is neither read nor rendered: its spelling is copied.
    """

    __slots__ = ("_text", "spelled")

    def __init__(self, spelled: list[bytes], text: str | None = None) -> None:
        self.spelled = spelled
        """The pieces as `dumps` writes them, without the quote marks."""
        self._text = text

    @classmethod
    def of(cls, text: str) -> "Pieces":
        """Take a text that came in one piece."""
        return cls([spell(text)], text)

    @property
    def text(self) -> str:
        """The whole text."""
        if self._text is None:
            spelled = self.spelled[0] if len(self.spelled) == 1 else b"".join(self.spelled)
            # Most have no escapes.
            self._text = loads_lenient(b'"%b"' % spelled) if b"\\" in spelled else spelled.decode()
            assert self._text is not None
        return self._text

    @property
    def texts(self) -> list[str]:
        """The pieces."""
        if len(self.spelled) < 2:
            return [self.text] if self.spelled else []
        texts: list[str] = loads_lenient(b'["%b"]' % b'","'.join(self.spelled))
        return texts

    def part(self, start: int, stop: int) -> "Pieces":
        """Return what stands between two characters."""
        spelled: list[bytes] = []
        place = 0
        for piece in self.texts:
            kept = piece[max(start - place, 0) : max(stop - place, 0)]
            place += len(piece)
            if kept:
                spelled.append(spell(kept))
        return Pieces(spelled, self.text[start:stop])

    def after(self, text: str) -> "Pieces":
        """Return the same with *text* before it, in its first piece."""
        spelled = self.spelled
        return Pieces([spell(text) + spelled[0], *spelled[1:]], text + self.text)

    def nested(self) -> "Pieces":
        """Return how the text is spelled, as a text again: what stands in a string within a string."""
        return Pieces([piece.replace(b"\\", b"\\\\").replace(b'"', b'\\"') for piece in self.spelled])

    def __bool__(self) -> bool:
        return any(self.spelled)


def spell(text: str) -> bytes:
    """Render a text as JSON, without the quote marks."""
    return dumps(text)[1:-1]
