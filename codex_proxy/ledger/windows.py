"""From when to when a budget's window is."""

from datetime import UTC, datetime, timedelta

from codex_proxy.ledger.model import Window

DAY = 86_400_000
"""Milliseconds."""
_HOURS_5 = 5 * 3_600_000
_ALWAYS = 1 << 62


def bounds(window: Window, at: int) -> tuple[int, int]:
    """Return the first moment of the *window* that *at* is in, and the first one after it.

    Five hours begin when they are first used, so without knowing better they begin at *at*.
    """
    day = at // DAY
    match window:
        case Window.HOURS_5:
            return at, at + _HOURS_5
        case Window.DAY:
            return day * DAY, (day + 1) * DAY
        case Window.WEEK:
            # 1970 began on a Thursday.
            monday = (day + 3) // 7 * 7 - 3
            return monday * DAY, (monday + 7) * DAY
        case Window.MONTH:
            first = datetime.fromtimestamp(day * 86_400, UTC).replace(day=1)
            following = (first + timedelta(days=32)).replace(day=1)
            return int(first.timestamp()) * 1_000, int(following.timestamp()) * 1_000
        case Window.TOTAL:
            return 0, _ALWAYS
