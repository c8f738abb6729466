"""The ids of input items, made such as the backend takes: a prefix per type, at most 64 characters."""

import hashlib
from collections.abc import Iterable

from codex_proxy.protocol.wire import JsonObject

MAX_ID_LENGTH = 64

ID_PREFIXES = {
    "message": "msg",
    "reasoning": "rs",
    "function_call": "fc",
    "function_call_output": "fco",
    "custom_tool_call": "ctc",
    "custom_tool_call_output": "ctco",
}
"""The types whose ids other backends make differently. Those of other types are only kept short."""


def shorten(text: str, prefix: str) -> str:
    """Return an id of *text* that is short enough, and another one for every other text."""
    return f"{prefix}_{hashlib.sha256(text.encode('utf-8', 'surrogatepass')).hexdigest()[:40]}"


class ItemIds:
    """Repair the ids of one request so that two different ids stay different.

    An id that is right as it came keeps its name; a repaired one that would meet it gets a
    hash instead.
    """

    def __init__(self, items: Iterable[JsonObject]) -> None:
        self._owner: dict[str, str] = {}
        for item in items:
            value = item.get("id")
            if isinstance(value, str) and self._is_right(value, ID_PREFIXES.get(str(item.get("type")), "")):
                self._owner[value] = value

    def repair(self, value: str, kind: str) -> str:
        """Return the id for an item of type *kind*; the same one when nothing is wrong with it."""
        prefix = ID_PREFIXES.get(kind)
        if prefix is None:
            # Other types are not known well enough to judge more than the length.
            return value if len(value) <= MAX_ID_LENGTH else shorten(value, value.partition("_")[0][:8])
        if self._is_right(value, prefix):
            return value
        repaired = value if value.startswith(prefix) else f"{prefix}_{value}"
        if len(repaired) > MAX_ID_LENGTH or self._owner.setdefault(repaired, value) != value:
            return shorten(value, prefix)
        return repaired

    @staticmethod
    def _is_right(value: str, prefix: str) -> bool:
        return value.startswith(prefix) and len(value) <= MAX_ID_LENGTH
