"""What becomes of the pool's quota if the work goes on as it does: when it is used up, what expires unused. Pure.

How fast the pool spends is measured where it counts, in percent of windows: what the accounts'
windows have grown by lately, all together, because work moves between accounts. Then the coming
week is played through: what ends soonest is spent first, windows begin anew at their resets, and
what cannot be served any more is the moment at which the pool is dry. It is a forecast: whole
percents are coarse, and nobody knows what people will ask tomorrow.
"""

import heapq
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import inf

from codex_proxy.accounts.account import Account
from codex_proxy.accounts.quota import MAIN_FAMILY, Window
from codex_proxy.accounts.state import SERVING

AHEAD_SECONDS = 7 * 86_400.0
STEP_SECONDS = 600.0

LOOK_SECONDS = 60.0
"""How often `note` should be called."""
# Lately: what an afternoon of work looks like, and not the night before it.
_LATELY_SECONDS = 2 * 3_600.0
# Before that much has been seen, nothing is said.
_LEAST_SECONDS = 600.0
_NOTHING = 1e-9


@dataclass(slots=True, frozen=True)
class Ahead:
    """What is to come for one window."""

    window: Window
    exhausted_at: float | None = None
    """When it is used up, if that is before its reset; wall clock."""
    unused_percent: float | None = None
    """What is left of it at its reset; None where its reset is further away than one looks, or unknown."""


@dataclass(slots=True, frozen=True)
class Forecast:
    """The coming week of the pool. Times are wall clock."""

    at: float
    is_known: bool
    """Whether the pool was watched for long enough to say how fast it spends."""
    spent_per_hour: tuple[float, float]
    """Percent of a window of hours, and of one of days, that all accounts together spend in an hour."""
    dry_at: float | None
    """When nobody can serve; None when that does not come within the time one looks ahead."""
    back_at: float | None
    """When somebody can again after that."""
    next_reset: float | None
    """The first reset to come."""
    windows: dict[str, tuple[Ahead, ...]]
    """By alias."""


class Outlook:
    """Watches how fast the pool spends."""

    def __init__(self) -> None:
        self._seen: dict[str, tuple[tuple[float, float | None] | None, ...]] = {}
        """By account: use and reset of its windows at the last look."""
        self._grown: deque[tuple[float, float, float]] = deque()
        """When one looked, and by how much windows of hours and of days had grown."""
        self._since: float | None = None

    def note(self, accounts: Iterable[Account], now: float) -> None:
        """Take in what has been spent since the last look."""
        if self._grown and now < self._grown[-1][0]:
            # The clock was set back: what was seen lies in a future, and is as if not seen.
            self._since = None
            self._grown.clear()
        total = [0.0, 0.0]
        seen: dict[str, tuple[tuple[float, float | None] | None, ...]] = {}
        for account in accounts:
            found = tuple(_mark(window, now) for window in _windows(account))
            before = self._seen.get(account.key)
            seen[account.key] = found
            if before is None:
                continue
            for kind, (old, new) in enumerate(zip(before, found, strict=True)):
                if old is not None and new is not None:
                    # One that has begun anew has spent at least what it shows.
                    is_same = old[1] is None or new[1] is None or abs(old[1] - new[1]) < 3_600.0
                    total[kind] += max(0.0, new[0] - old[0]) if is_same else new[0]
        self._seen = seen
        if self._since is None:
            self._since = now
        self._grown.append((now, total[0], total[1]))
        while self._grown and self._grown[0][0] <= now - _LATELY_SECONDS:
            self._grown.popleft()

    def rate(self, now: float) -> tuple[float, float] | None:
        """Return how many percent of windows of hours and of days are spent in a second; None while unknown."""
        if self._since is None:
            return None
        watched = min(_LATELY_SECONDS, now - self._since)
        if watched < _LEAST_SECONDS:
            return None
        return sum(one[1] for one in self._grown) / watched, sum(one[2] for one in self._grown) / watched

    def forecast(self, accounts: Sequence[Account], now: float) -> Forecast:
        """Play the coming week through."""
        return self.begin(accounts, now)()

    def begin(self, accounts: Sequence[Account], now: float) -> Callable[[], Forecast]:
        """Look at the accounts, and return what plays the coming week through, once.

        That takes long for thousands, and needs the accounts no more: it may be done in a thread.
        """
        rate, lots = self.rate(now), [_Lot.of(account, now) for account in accounts]
        return lambda: _forecast(rate, lots, now)


def _forecast(rate: tuple[float, float] | None, lots: Sequence["_Lot"], now: float) -> Forecast:
    resets = [side.resets_at for lot in lots for side in lot.sides if side is not None and side.is_first]
    play = _Play([lot for lot in lots if lot.can_serve], now, rate or (0.0, 0.0))
    play.run()
    is_known = rate is not None
    return Forecast(
        now,
        is_known,
        (3_600.0 * rate[0], 3_600.0 * rate[1]) if rate is not None else (0.0, 0.0),
        play.dry_at if is_known or not play.has_any else None,
        play.back_at if is_known or not play.has_any else None,
        min((at for at in resets if at < inf), default=None),
        {
            lot.alias: tuple(
                Ahead(
                    side.window,
                    side.exhausted_at if is_known else None,
                    side.unused if is_known or not lot.can_serve else None,
                )
                for side in lot.sides
                if side is not None
            )
            for lot in lots
        },
    )


def _windows(account: Account) -> tuple[Window | None, Window | None]:
    family = account.quota.families.get(MAIN_FAMILY)
    return (None, None) if family is None else (family.short, family.long)


def _mark(window: Window | None, now: float) -> tuple[float, float | None] | None:
    if window is None:
        return None
    return (0.0 if window.is_over(now) else window.used_percent), window.resets_at


@dataclass(slots=True)
class _Side:
    """One window on its way through the week."""

    window: Window
    used: float
    resets_at: float
    """Inf where nobody told its length, so that nobody knows."""
    seconds: float
    is_first: bool = True
    """It has not begun anew: what is told is told of this one."""
    exhausted_at: float | None = None
    unused: float | None = None

    @classmethod
    def of(cls, window: Window | None, now: float) -> "_Side | None":
        if window is None:
            return None
        seconds = window.minutes * 60.0 if window.minutes else inf
        if window.is_over(now):
            # It begins with the next request.
            return cls(window, 0.0, now + seconds, seconds, is_first=False)
        return cls(window, min(100.0, window.used_percent), window.ends_at, seconds)

    @property
    def room(self) -> float:
        return max(0.0, 100.0 - self.used)

    def begin_anew(self, now: float) -> None:
        if self.is_first:
            self.unused = self.room
            self.is_first = False
        self.used = 0.0
        # Those of a minute, which nobody has seen yet, come and go within one step.
        self.resets_at += self.seconds * max(1.0, (now - self.resets_at) // self.seconds + 1.0)

    def spend(self, percent: float, now: float) -> None:
        self.used += percent
        if self.is_first and self.used >= 100.0 - _NOTHING and self.exhausted_at is None:
            self.exhausted_at = now


@dataclass(slots=True)
class _Lot:
    """One account on its way through the week."""

    alias: str
    can_serve: bool
    sides: tuple[_Side | None, _Side | None]
    rests_until: float

    @classmethod
    def of(cls, account: Account, now: float) -> "_Lot":
        short, long = _windows(account)
        sides = _Side.of(short, now), _Side.of(long, now)
        return cls(account.alias, account.state in SERVING, sides, account.cooling_until() or now)

    @property
    def ends(self) -> float:
        """When what it has expires: of its longest window, because the short one comes back soon."""
        return max([side.resets_at for side in self.sides if side is not None], default=inf)

    @property
    def has_room(self) -> bool:
        return all(side is None or side.room > _NOTHING for side in self.sides)


class _Play:
    """The week itself, in steps; only who spends or begins anew is looked at in one."""

    def __init__(self, lots: Sequence[_Lot], now: float, rate: tuple[float, float]) -> None:
        self._lots = lots
        self._now = now
        self._need = tuple(STEP_SECONDS * each for each in rate)
        self._events: list[tuple[float, int, int]] = []
        """When something of whom changes: the place of a window, -1 for the end of a rest."""
        self._free: list[tuple[float, int]] = []
        self._is_free = [False] * len(lots)
        self.dry_at: float | None = None
        self.back_at: float | None = None
        self.has_any = bool(lots)

    def run(self) -> None:
        for place, lot in enumerate(self._lots):
            for kind, side in enumerate(lot.sides):
                if side is not None and side.resets_at < inf:
                    self._events.append((side.resets_at, place, kind))
            if lot.rests_until > self._now:
                self._events.append((lot.rests_until, place, -1))
            self._offer(place, self._now)
        heapq.heapify(self._events)
        if not self._lots:
            self.dry_at = self._now
            return
        # What spends nothing changes nothing but by resets, which the steps would only wait for.
        at = self._now
        while at < self._now + AHEAD_SECONDS:
            self._pass(at)
            if self._is_served(at):
                if self.dry_at is not None and self.back_at is None:
                    self.back_at = at
            elif self.dry_at is None:
                self.dry_at = at
            at += STEP_SECONDS
        self._pass(at)

    def _pass(self, at: float) -> None:
        """Let happen what happens up to *at*."""
        while self._events and self._events[0][0] <= at:
            when, place, kind = heapq.heappop(self._events)
            if kind >= 0:
                side = self._lots[place].sides[kind]
                assert side is not None
                side.begin_anew(at)
                if side.resets_at < inf:
                    heapq.heappush(self._events, (side.resets_at, place, kind))
            self._offer(place, when)

    def _offer(self, place: int, at: float) -> None:
        lot = self._lots[place]
        if not self._is_free[place] and lot.rests_until <= at and lot.has_room:
            self._is_free[place] = True
            heapq.heappush(self._free, (lot.ends, place))

    def _is_served(self, at: float) -> bool:
        """Spend what a step needs, from whoever loses it soonest; False when there is not enough."""
        wanted = 1.0
        while self._free:
            if wanted <= _NOTHING:
                return True
            ends, place = self._free[0]
            lot = self._lots[place]
            if ends != lot.ends:
                # It has begun anew since it was put here, and ends later now.
                heapq.heapreplace(self._free, (lot.ends, place))
                continue
            share = wanted
            for side, need in zip(lot.sides, self._need, strict=True):
                if side is not None and need > 0.0:
                    share = min(share, side.room / need)
            for side, need in zip(lot.sides, self._need, strict=True):
                if side is not None:
                    side.spend(share * need, at)
            wanted -= share
            if not lot.has_room:
                heapq.heappop(self._free)
                self._is_free[place] = False
        return wanted <= _NOTHING
