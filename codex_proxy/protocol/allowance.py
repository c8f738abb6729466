"""What is left under a caller's limits, as the headers that OpenAI's and Anthropic's clients read."""

import math
from datetime import UTC, datetime

from codex_proxy.trace import Allowance, Room


def openai_headers(allowance: Allowance, now: float) -> dict[str, str]:
    """Return `x-ratelimit-*`; a reset is a span there, such as `6m0s`."""
    headers: dict[str, str] = {}
    for name, room in _rooms(allowance):
        headers[f"x-ratelimit-limit-{name}"] = str(room.limit)
        headers[f"x-ratelimit-remaining-{name}"] = str(room.remaining)
        headers[f"x-ratelimit-reset-{name}"] = _span(room.resets_in)
    return headers


def anthropic_headers(allowance: Allowance, now: float) -> dict[str, str]:
    """Return `anthropic-ratelimit-*`; a reset is a moment there, in RFC 3339.

    Args:
        now: Wall clock.
    """
    headers: dict[str, str] = {}
    for name, room in _rooms(allowance):
        moment = datetime.fromtimestamp(math.ceil(now + room.resets_in), UTC)
        headers[f"anthropic-ratelimit-{name}-limit"] = str(room.limit)
        headers[f"anthropic-ratelimit-{name}-remaining"] = str(room.remaining)
        headers[f"anthropic-ratelimit-{name}-reset"] = moment.strftime("%Y-%m-%dT%H:%M:%SZ")
    return headers


def _rooms(allowance: Allowance) -> list[tuple[str, Room]]:
    rooms = (("requests", allowance.requests), ("tokens", allowance.tokens))
    return [(name, room) for name, room in rooms if room is not None]


def _span(seconds: float) -> str:
    if seconds < 1.0:
        return f"{math.ceil(seconds * 1000)}ms"
    minutes, rest = divmod(math.ceil(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h{minutes}m{rest}s"
    return f"{minutes}m{rest}s" if minutes else f"{rest}s"
