"""What a database would refuse is mended before it gets there: one such value would hold up all that is written with it."""

from dataclasses import fields, replace
from typing import Any

from codex_proxy.ledger.book import MOST_COST
from codex_proxy.ledger.model import AttemptRow, Hold, Settlement

_TOKEN_BITS = 40
MOST_TOKENS = (1 << _TOKEN_BITS) - 1
"""More than any turn has; so many can be added up."""
# The year 9000: the last one that has a month after it is 9999.
_MOST_TIME = 221_845_392_000_000
# Less than that, and less than MOST_COST.
_TIME_BITS = 47
_MOST_TEXT = 1_000

ODD = "odd"
"""The mark of a turn that had something in it that could not be written as it was."""

_TEXTS = tuple(
    one.name for one in fields(Settlement) if one.type in (str, "str") and one.name not in ("request_id",)
)
_TOKENS = ("input_tokens", "cached_tokens", "cache_write_tokens", "output_tokens", "reasoning_tokens")


def clean(one: Settlement) -> Settlement:
    """Return *one*, or what can be written of it."""
    texts = (
        f"{one.request_id}{one.user_id}{one.key_id}{one.route}{one.asked_model}{one.model}{one.tier}{one.target}"
        f"{one.upstream}{one.client}{one.end}{one.error}{one.price_id}"
    )
    try:
        # Of numbers that are none of them negative no bit is beyond those of the largest.
        tokens = (
            one.input_tokens
            | one.cached_tokens
            | one.cache_write_tokens
            | one.output_tokens
            | one.reasoning_tokens
        )
        is_plain = (
            not tokens >> _TOKEN_BITS
            and not (one.at | one.milliseconds | one.status | (one.cost or 0)) >> _TIME_BITS
            and one.status <= 999
            and len(texts) <= _MOST_TEXT
            and texts.isascii()
            and "\0" not in texts
            and (not one.attempts or all(map(_is_plain, one.attempts)))
            and (not one.flags or all(map(str.isascii, one.flags)))
        )
    except TypeError:
        # Something is no whole number.
        is_plain = False
    if is_plain:
        return one
    values: dict[str, Any] = {name: _text(getattr(one, name)) for name in _TEXTS}
    values |= {name: _number(getattr(one, name), MOST_TOKENS) for name in _TOKENS}
    cleaned = replace(
        one,
        request_id=_text(one.request_id),
        at=_number(one.at, _MOST_TIME),
        status=_number(one.status, 999),
        milliseconds=_number(one.milliseconds, _MOST_TIME),
        cost=None if one.cost is None else _number(one.cost, MOST_COST),
        flags=tuple(map(_text, one.flags)),
        prices={_text(name): _text(price) for name, price in one.prices.items()},
        attempts=tuple(_attempt(attempt) for attempt in one.attempts),
        **values,
    )
    # A text that is only not ASCII is as it was.
    return one if cleaned == one else replace(cleaned, flags=(*cleaned.flags, ODD))


def clean_hold(one: Hold) -> Hold:
    """Return *one*, or what can be written of it."""
    texts = f"{one.request_id}{one.user_id}{one.key_id}{one.model}"
    if texts.isascii() and "\0" not in texts and len(texts) <= _MOST_TEXT:
        return one
    return replace(one, request_id=_text(one.request_id), user_id=_text(one.user_id), key_id=_text(one.key_id), model=_text(one.model))  # fmt: skip


def _is_plain(attempt: AttemptRow) -> bool:
    texts = attempt.target + attempt.outcome
    return (
        texts.isascii()
        and "\0" not in texts
        and type(attempt.milliseconds) is int
        and 0 <= attempt.milliseconds <= _MOST_TIME
        and (attempt.status is None or (type(attempt.status) is int and 0 <= attempt.status <= 999))
    )


def _attempt(attempt: AttemptRow) -> AttemptRow:
    return AttemptRow(
        _text(attempt.target),
        _text(attempt.outcome),
        None if attempt.status is None else _number(attempt.status, 999),
        _number(attempt.milliseconds, _MOST_TIME),
    )


def _text(value: object) -> str:
    # PostgreSQL has no NUL, and neither has half of a surrogate pair.
    text = str(value).encode("utf-8", "replace").decode().replace("\0", "\N{REPLACEMENT CHARACTER}")
    return text[:_MOST_TEXT]


def _number(value: object, most: int) -> int:
    if not isinstance(value, int | float) or value != value:
        return 0
    return int(min(max(value, 0), most))
