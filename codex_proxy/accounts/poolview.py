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
from math import inf
from typing import Generic, TypeVar

from codex_proxy.accounts.account import Account, Cause
from codex_proxy.accounts.quota import MAIN_FAMILY, SHORT_MINUTES, Family, Window
from codex_proxy.accounts.state import SERVING
from codex_proxy.protocol.wire import JsonObject

T = TypeVar("T")

# Every answer to a Codex client carries the view: so many are looked at each time, more once a second.
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

    def seconds(self, now: float) -> tuple[int, int]:
        """Return how long each of the windows still lasts."""
        short, long = self.short, self.long
        return (
            short.in_seconds(now) if short is not None else 0,
            long.in_seconds(now) if long is not None else 0,
        )


_Part = tuple[float, float, int | None]
"""What one window puts into the mean: use, end, length."""


@dataclass(slots=True, eq=False)
class _Record:
    """What one account puts into the pool's view of a limit, and of what that was made."""

    family: Family | None
    primary: Window | None
    secondary: Window | None
    since: float
    until: float
    """It is the same up to this time; it is not found again when that has passed at once."""
    rests_until: float | None
    short: tuple[_Part, ...]
    long: tuple[_Part, ...]


class _Known:
    """The pool's view of one limit; an account whose numbers are the same is not read again."""

    __slots__ = ("_key", "_limit", "_records", "_since", "_told", "_until")

    def __init__(self, key: str) -> None:
        self._key = key
        self._records: dict[Account, _Record] = {}
        self._told: list[_Record] = []
        self._limit = Limit(None, None, None, False)
        self._since, self._until = inf, -inf

    def limit(self, accounts: Collection[Account], now: float) -> Limit:
        """Return what is known of the limit over all *accounts*."""
        key, records = self._key, self._records
        told: list[_Record] = []
        for account in accounts:
            if account.state not in SERVING or account.removed:
                continue
            family = account.quota.families.get(key)
            record = records.get(account)
            if (
                record is None
                or record.family is not family
                or account.holds
                or account.family_holds
                or not record.since <= now < record.until
                or (
                    family is not None
                    and (
                        record.primary is not family.primary
                        or record.secondary is not family.secondary
                        or family.is_blocked
                    )
                )
            ):
                record = records[account] = _read(account, family, key, now)
            if family is not None or key == MAIN_FAMILY:
                told.append(record)
        if len(records) > len(accounts):
            self._records = {account: record for account, record in records.items() if not account.removed}
            if len(self._records) > 2 * len(accounts) + _FEW:
                self._records.clear()
        if told == self._told and self._since <= now < self._until:
            return self._limit
        self._told, self._since = told, now
        self._until = min([record.until for record in told], default=inf)
        self._limit = _limit(told)
        return self._limit


def _read(account: Account, family: Family | None, key: str, now: float) -> _Record:
    """Return what an account puts into the view of a limit."""
    rests_until = _rests_until(account, key, now)
    short: list[_Part] = []
    long: list[_Part] = []
    until = inf
    if rests_until is not None:
        # It has nothing to give until then, whatever its hours say.
        short.append((100.0, rests_until, None))
    if account.holds or account.family_holds or rests_until is not None:
        until = -inf
    if family is None:
        return _Record(None, None, None, now, until, rests_until, tuple(short), ())
    for window in family.running(now):
        ends_at = window.ends_at
        until = min(until, ends_at)
        if window.resets_at is None or window.used_percent >= 100.0 or family.is_blocked:
            # Its end moves, or it depends on credits whether it counts.
            until = -inf
        # A window of unknown length has no class.
        if window.minutes is None:
            continue
        if window.minutes > SHORT_MINUTES:
            long.append((window.used_percent, ends_at, window.minutes))
        elif rests_until is None:
            short.append((window.used_percent, ends_at, window.minutes))
        else:
            short[-1] = (100.0, rests_until, window.minutes)
    if any(now < window.seen_at for _, window in family.windows()):
        # The clock was set back: what is over by that runs again some time.
        until = -inf
    return _Record(
        family, family.primary, family.secondary, now, until, rests_until, tuple(short), tuple(long)
    )


def _limit(told: list[_Record]) -> Limit:
    name = next((one.family.name for one in told if one.family is not None and one.family.name), None)
    short = [part for one in told for part in one.short]
    long = [part for one in told for part in one.long]
    resting = [one.rests_until for one in told if one.rests_until is not None]
    if resting and len(resting) == len(told):
        # The shortest window there is says it: clients warn of that one first.
        hours = _mean(short)
        spent = hours or _mean(long)
        shown = Shown(100, spent.minutes if spent is not None else None, min(resting))
        if hours is None and spent is not None:
            return Limit(name, None, shown, True)
        return Limit(name, shown, _mean(long), True)
    return Limit(name, _mean(short), _mean(long), False)


def _mean(parts: list[_Part]) -> Shown | None:
    """Return the mean of what the accounts say; None when no window is known."""
    lengths = Counter([minutes for _, _, minutes in parts if minutes is not None])
    if not lengths:
        return None
    mean = sum(used for used, _, _ in parts) / len(parts)
    # Of a window in which nothing is used, a reset brings nothing back.
    resets = [ends_at for used, ends_at, _ in parts if used > 0] or [ends_at for _, ends_at, _ in parts]
    return Shown(
        # All is used only when all is.
        round(mean) if mean >= 100.0 else min(99, round(mean)),
        max(lengths, key=lambda minutes: (lengths[minutes], minutes)),
        min(resets),
    )


def limits_of(accounts: Iterable[Account], now: float) -> dict[str, Limit]:
    """Return what is known of each limit over all *accounts*; those of which nothing is, are not there."""
    return PoolView().limits(list(accounts), now)


def rate_limits_event(accounts: Iterable[Account], now: float) -> JsonObject | None:
    """Return the pool's quota as a `codex.rate_limits` event; None when nothing is known."""
    return _event(_Known(MAIN_FAMILY).limit(list(accounts), now), now)


def usage_page(accounts: Iterable[Account], now: float) -> JsonObject:
    """Return the pool's quota in the shape of the backend's usage endpoint.

    Without user, account and address: a pool is nobody's.
    """
    return _page(limits_of(accounts, now), now)


def _event(limit: Limit, now: float) -> JsonObject | None:
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


def _page(limits: dict[str, Limit], now: float) -> JsonObject:
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
        self._known: dict[str, _Known] = {}
        self._told: tuple[Limit, tuple[int, int], JsonObject | None] | None = None
        """The last event, and of what it was made."""
        self._event = _Kept(self._make_event)
        self._page = _Kept(self._make_page)

    def event(self, accounts: Collection[Account], now: float) -> JsonObject | None:
        """Return it as `rate_limits_event` does; nobody may change it."""
        return self._event.of(accounts, now)

    def page(self, accounts: Collection[Account], now: float) -> JsonObject:
        """Return it as `usage_page` does; nobody may change it."""
        return self._page.of(accounts, now)

    def limits(self, accounts: Collection[Account], now: float) -> dict[str, Limit]:
        """Return it as `limits_of` does."""
        keys = {MAIN_FAMILY: None}
        for account in accounts:
            if account.state in SERVING and not account.removed:
                for key in account.quota.families:
                    keys.setdefault(key)
        self._known = {key: self._known.get(key) or _Known(key) for key in keys}
        found = ((key, known.limit(accounts, now)) for key, known in self._known.items())
        return {key: limit for key, limit in found if limit}

    def _make_event(self, accounts: Collection[Account], now: float) -> JsonObject | None:
        known = self._known.get(MAIN_FAMILY)
        if known is None:
            known = self._known[MAIN_FAMILY] = _Known(MAIN_FAMILY)
        limit = known.limit(accounts, now)
        seconds = limit.seconds(now)
        if self._told is None or self._told[0] is not limit or self._told[1] != seconds:
            self._told = (limit, seconds, _event(limit, now))
        return self._told[2]

    def _make_page(self, accounts: Collection[Account], now: float) -> JsonObject:
        return _page(self.limits(accounts, now), now)


def _rests_until(account: Account, key: str, now: float) -> float | None:
    """Return until when an account gives nothing of a limit; None while it may."""
    ends = [account.holds.get(Cause.LIMIT), account.family_holds.get(key)]
    limit = account.quota.limit_of(now, key)
    if limit is not None and account.quota.is_spent(now, key):
        ends.append(limit.ends_at)
    running = [end for end in ends if end is not None and end > now]
    return max(running) if running else None


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
