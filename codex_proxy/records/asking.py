"""What can be asked of the records, and what is answered while there are none."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields

from codex_proxy.errors import RequestError
from codex_proxy.protocol.wire import JsonObject
from codex_proxy.trace import End, Trace

DEFAULT_LIMIT = 100
MAX_LIMIT = 1_000

OUTCOMES = tuple(end.value for end in End if end is not End.OPEN)

_CURSOR = re.compile(r"[0-9]{1,18}|[1-8][0-9]{18}")
# What of a text is looked for.
_LONGEST = 256


@dataclass(slots=True, frozen=True)
class Filter:
    """Which turns are meant; None means all."""

    caller: str | None = None
    account: str | None = None
    model: str | None = None
    outcome: str | None = None
    route: str | None = None
    client: str | None = None
    q: str | None = None
    """A part of the id or of the error."""
    since: float | None = None
    until: float | None = None
    min_seconds: float | None = None


_NAMES = frozenset({"limit", "before", *(one.name for one in fields(Filter))})


@dataclass(slots=True, frozen=True)
class Found:
    """One turn, whole."""

    trace: Trace
    capture: JsonObject | None
    """What was said, if that was stored."""


@dataclass(slots=True, frozen=True)
class Page:
    """A part of a list that is asked for."""

    wanted: Filter
    limit: int
    before: int | None

    @classmethod
    def of(cls, query: Mapping[str, str]) -> "Page":
        """Read it from a query; what is empty is as if it were not there.

        Raises:
            RequestError: If something in it does not fit; names it.
        """
        for name in query:
            if name not in _NAMES:
                # Without it the answer would be another one than was asked for.
                raise RequestError(
                    f"there is no filter {name[:100]!r}: there are {', '.join(sorted(_NAMES))}",
                    param=name[:100],
                )
        outcome = _word(query, "outcome")
        if outcome is not None and outcome not in OUTCOMES:
            raise RequestError(f"outcome must be one of {', '.join(OUTCOMES)}", param="outcome")
        limit, before = query.get("limit", ""), query.get("before", "")
        if limit and not (
            limit.isascii() and limit.isdigit() and len(limit) <= 9 and 1 <= int(limit) <= MAX_LIMIT
        ):
            raise RequestError(f"limit must be a whole number from 1 to {MAX_LIMIT}", param="limit")
        if before and not _CURSOR.fullmatch(before):
            raise RequestError("before must be the `next` of another answer", param="before")
        return cls(
            Filter(
                caller=_word(query, "caller"),
                account=_word(query, "account"),
                model=_word(query, "model"),
                outcome=outcome,
                route=_word(query, "route"),
                client=_word(query, "client"),
                q=_word(query, "q"),
                since=_number(query, "since"),
                until=_number(query, "until"),
                min_seconds=_number(query, "min_seconds"),
            ),
            int(limit) if limit else DEFAULT_LIMIT,
            int(before) if before else None,
        )


def _word(query: Mapping[str, str], name: str) -> str | None:
    text = query.get(name, "").strip()[:_LONGEST]
    # Such a text cannot be encoded, and so is nowhere.
    return text.encode("utf-8", "replace").decode() or None


def _number(query: Mapping[str, str], name: str) -> float | None:
    text = query.get(name, "").strip()
    if not text:
        return None
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    # Beyond it a key has no room.
    if not 0.0 <= value < 8e9:
        raise RequestError(f"{name} must be a number of seconds", param=name)
    return value


def no_listing() -> JsonObject:
    """Return the list of no turns."""
    return {"requests": [], "next": None, "since": None, "callers": [], "accounts": [], "models": []}


def no_cache() -> JsonObject:
    """Return how caches were hit by no turns."""
    groups: JsonObject = {f"by_{name}": [] for name in ("client", "binding", "model", "account", "rule")}
    return {"since": None, "turns": 0, "input_tokens": 0, "cached_tokens": 0, **groups, "series": []}
