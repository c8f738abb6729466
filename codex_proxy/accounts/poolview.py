"""The quota of the whole pool as one account would tell it: pure.

A caller is served by any of the accounts, so one account's 98 % is not its caller's trouble. What
is shown, by length class (hours, days):

- Accounts count that serve, now or after a rest: not those that are disabled, need a login, or
  that the backend will not serve for plan or credits.
- The use is the mean over the accounts whose number is known, one account like another: how much
  a percent of each plan is worth, the backend does not say. Unknown is neither full nor empty.
- One that rests at its limit has nothing to give: its hours count as used up until it is free,
  even where it was the week that ran out.
- The reset is the earliest: then something comes back.
- A pool in which every account rests at its limit is used up, whatever the means say: 100 %, and
  the reset is when the first of them is free again.
"""

from collections import Counter
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Generic, TypeVar

from codex_proxy.accounts.account import Account, Cause
from codex_proxy.accounts.quota import MAIN_FAMILY, SHORT_MINUTES
from codex_proxy.accounts.state import SERVING
from codex_proxy.protocol.wire import JsonObject

T = TypeVar("T")

# Every answer to a Codex client carries the view: so many are looked at each time, more (some microseconds each)
# once a second.
_FEW = 100
_KEEP_SECONDS = 1.0


@dataclass(slots=True, frozen=True)
class Shown:
    """One window of the pool."""

    used_percent: int
    minutes: int | None
    """None where nobody told the length."""
    resets_at: float

    def in_seconds(self, now: float) -> int:
        """Return how long it still lasts."""
        return max(0, int(self.resets_at - now))


@dataclass(slots=True, frozen=True)
class Limit:
    """The pool's windows of one limit; None where nothing is known."""

    name: str | None
    short: Shown | None
    long: Shown | None
    is_reached: bool

    def __bool__(self) -> bool:
        return self.short is not None or self.long is not None


def limits_of(accounts: Iterable[Account], now: float) -> dict[str, Limit]:
    """Return what is known of each limit over all *accounts*; those of which nothing is, are not there."""
    serving = _serving(accounts)
    names = {MAIN_FAMILY: None, **{key: None for account in serving for key in account.quota.families}}
    limits = ((key, _limit(key, serving, now)) for key in names)
    return {key: limit for key, limit in limits if limit}


def _serving(accounts: Iterable[Account]) -> list[Account]:
    return [account for account in accounts if account.state in SERVING and not account.removed]


def rate_limits_event(accounts: Iterable[Account], now: float) -> JsonObject | None:
    """Return the pool's quota as a `codex.rate_limits` event; None when nothing is known."""
    limit = _limit(MAIN_FAMILY, _serving(accounts), now)
    if not limit:
        return None
    primary, secondary = _places(limit)
    return {
        "type": "codex.rate_limits",
        "plan_type": None,
        "metered_limit_name": None,
        "limit_name": None,
        "rate_limits": {
            "allowed": not limit.is_reached,
            "limit_reached": limit.is_reached,
            "primary": _in_event(primary, now),
            "secondary": _in_event(secondary, now),
        },
        "code_review_rate_limits": None,
        "credits": None,
        "promo": None,
    }


def usage_page(accounts: Iterable[Account], now: float) -> JsonObject:
    """Return the pool's quota in the shape of the backend's usage endpoint.

    Without user, account and address: a pool is nobody's.
    """
    limits = limits_of(accounts, now)
    main = limits.pop(MAIN_FAMILY, Limit(None, None, None, False))
    return {
        # The one field that must be there; the accounts may have several.
        "plan_type": "unknown",
        "rate_limit": _in_page(main, now),
        "code_review_rate_limit": None,
        "additional_rate_limits": [
            {"limit_name": limit.name or key, "metered_feature": key, "rate_limit": _in_page(limit, now)}
            for key, limit in limits.items()
        ]
        or None,
        "credits": None,
        "spend_control": None,
        "rate_limit_reached_type": {"type": "rate_limit_reached"} if main.is_reached else None,
        "promo": None,
    }


class _Kept(Generic[T]):
    """What is made of all accounts, kept for a moment where that takes long."""

    def __init__(self, make: Callable[[Collection[Account], float], T]) -> None:
        self._make = make
        self._made: tuple[float, T] | None = None

    def of(self, accounts: Collection[Account], now: float) -> T:
        """Return what was made a moment ago, or make it."""
        if len(accounts) <= _FEW:
            # Not kept: it says nothing of the many that come after them.
            self._made = None
            return self._make(accounts, now)
        if self._made is None or not self._made[0] <= now < self._made[0] + _KEEP_SECONDS:
            self._made = (now, self._make(accounts, now))
        return self._made[1]


class PoolView:
    """What is shown of the pool's quota, up to a second old where there are many accounts."""

    def __init__(self) -> None:
        self._event = _Kept(rate_limits_event)
        self._page = _Kept(usage_page)

    def event(self, accounts: Collection[Account], now: float) -> JsonObject | None:
        """Return it as `rate_limits_event` does."""
        return self._event.of(accounts, now)

    def page(self, accounts: Collection[Account], now: float) -> JsonObject:
        """Return it as `usage_page` does."""
        return self._page.of(accounts, now)


@dataclass(slots=True, frozen=True)
class _Part:
    """What one account puts into the mean."""

    used: float
    ends_at: float
    minutes: int | None


def _limit(key: str, accounts: list[Account], now: float) -> Limit:
    name: str | None = None
    short: list[_Part] = []
    long: list[_Part] = []
    counted = 0
    resting: list[float] = []
    for account in accounts:
        family = account.quota.families.get(key)
        if family is None and key != MAIN_FAMILY:
            continue
        counted += 1
        rests_until = _rests_until(account, key, now)
        if rests_until is not None:
            resting.append(rests_until)
            # It has nothing to give until then, whatever its hours say.
            short.append(_Part(100.0, rests_until, None))
        if family is None:
            continue
        name = name or family.name
        for window in family.running(now):
            # A window of unknown length has no class.
            if window.minutes is None:
                continue
            if window.minutes > SHORT_MINUTES:
                long.append(_Part(window.used_percent, window.ends_at, window.minutes))
            elif rests_until is None:
                short.append(_Part(window.used_percent, window.ends_at, window.minutes))
            else:
                short[-1] = _Part(100.0, rests_until, window.minutes)
    is_reached = bool(resting) and len(resting) == counted
    if is_reached:
        # The shortest window there is says it: clients warn of that one first.
        spent = _mean(short) or _mean(long)
        shown = Shown(100, spent.minutes if spent is not None else None, min(resting))
        if _mean(short) is None and spent is not None:
            return Limit(name, None, shown, True)
        return Limit(name, shown, _mean(long), True)
    return Limit(name, _mean(short), _mean(long), False)


def _rests_until(account: Account, key: str, now: float) -> float | None:
    """Return until when an account gives nothing of a limit; None while it may."""
    ends = [account.holds.get(Cause.LIMIT), account.family_holds.get(key)]
    limit = account.quota.limit_of(now, key)
    if limit is not None and account.quota.is_spent(now, key):
        ends.append(limit.ends_at)
    running = [end for end in ends if end is not None and end > now]
    return max(running) if running else None


def _mean(parts: list[_Part]) -> Shown | None:
    """Return the mean of what the accounts say; None when no window is known."""
    lengths = Counter(part.minutes for part in parts if part.minutes is not None)
    if not lengths:
        return None
    mean = sum(part.used for part in parts) / len(parts)
    # Of a window in which nothing is used, a reset brings nothing back.
    resets = [part.ends_at for part in parts if part.used > 0] or [part.ends_at for part in parts]
    return Shown(
        # All is used only when all is.
        round(mean) if mean >= 100.0 else min(99, round(mean)),
        max(lengths, key=lambda minutes: (lengths[minutes], minutes)),
        min(resets),
    )


def _places(limit: Limit) -> tuple[Shown | None, Shown | None]:
    """Return the windows as a backend places them: the first is never the empty one, clients look there."""
    return (limit.short, limit.long) if limit.short is not None else (limit.long, None)


def _in_event(shown: Shown | None, now: float) -> JsonObject | None:
    if shown is None:
        return None
    length = {"window_minutes": shown.minutes} if shown.minutes is not None else {}
    return {
        "used_percent": shown.used_percent,
        **length,
        "reset_at": int(shown.resets_at),
        "reset_after_seconds": shown.in_seconds(now),
    }


def _in_page(limit: Limit, now: float) -> JsonObject:
    first, second = _places(limit)
    return {
        "allowed": not limit.is_reached,
        "limit_reached": limit.is_reached,
        "primary_window": _window_in_page(first, now),
        "secondary_window": _window_in_page(second, now),
    }


def _window_in_page(shown: Shown | None, now: float) -> JsonObject | None:
    if shown is None:
        return None
    return {
        "used_percent": shown.used_percent,
        "limit_window_seconds": (shown.minutes or 0) * 60,
        "reset_after_seconds": shown.in_seconds(now),
        "reset_at": int(shown.resets_at),
    }
