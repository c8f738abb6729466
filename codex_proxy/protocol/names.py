"""Names that the backend takes: ids of input items and calls, and the tools' names.

Ids get a prefix per type and at most 64 characters.
"""

import hashlib
import re
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


MAX_NAME_LENGTH = 64
"""What a tool's name may measure at the backend, which takes letters, digits, `_` and `-` only."""

_UNFIT = re.compile(r"[^a-zA-Z0-9_-]")
_MCP = "mcp__"


class ToolNames:
    """The tools' names as the backend takes them, and back as the caller wrote them.

    A name that fits keeps itself. Others are made to fit, and numbered where two would meet; the
    result depends on nothing but the order of the declared names, so that every turn of a
    conversation sends the same ones (the prompt cache sees them first).
    """

    __slots__ = ("_asked", "_numbers", "_sent")

    def __init__(self, declared: Iterable[str] = ()) -> None:
        self._sent: dict[str, str] = {}
        self._asked: dict[str, str] = {}
        self._numbers: dict[str, int] = {}
        """The last number behind each name: names that all meet are not counted through again and again."""
        misfits: list[str] = []
        for name in declared:
            if fits(name):
                self._sent[name] = self._asked[name] = name
            else:
                misfits.append(name)
        for name in misfits:
            self.sent(name)

    def sent(self, name: str) -> str:
        """Return what goes upstream for *name*; a name that was never declared is treated the same way."""
        known = self._sent.get(name)
        if known is not None:
            return known
        fitting = base = name if fits(name) else _fit(name)
        # Names of one beginning are made alike by the number behind them.
        group = base[: MAX_NAME_LENGTH - 4]
        while fitting in self._asked:
            number = self._numbers[group] = self._numbers.get(group, 0) + 1
            tail = f"_{number}"
            fitting = base[: MAX_NAME_LENGTH - len(tail)] + tail
        self._sent[name] = fitting
        self._asked[fitting] = name
        return fitting

    def asked(self, name: str) -> str:
        """Return the caller's own name for one that came from the backend."""
        return self._asked.get(name, name)


def fits(name: str) -> bool:
    """Tell whether the backend takes *name*, of a tool or of a call, as it is."""
    return 0 < len(name) <= MAX_NAME_LENGTH and _UNFIT.search(name) is None


def _fit(name: str) -> str:
    # The server's name in the middle of an MCP tool's says least.
    if len(name) > MAX_NAME_LENGTH and name.startswith(_MCP):
        name = _MCP + name.rpartition("__")[2]
    return _UNFIT.sub("_", name[:MAX_NAME_LENGTH]) or "tool"


def fit_call_id(call_id: str) -> str:
    """Return a call's id as every side takes it: at most 64 characters, letters, digits, `_` and `-`.

    The same text gives the same id, so a call and its output still meet.
    """
    if len(call_id) <= MAX_ID_LENGTH and _UNFIT.search(call_id) is None:
        return call_id
    return shorten(call_id, "call")


_SEAL = re.compile(r"gAAAA[A-Za-z0-9_-]*={0,2}")


def is_sealed(content: str) -> bool:
    """Tell whether *content* looks like encrypted reasoning of the backend's; another provider's it refuses.

    What the backend seals is a Fernet token, which begins like this because of its version byte.
    """
    return _SEAL.fullmatch(content) is not None
