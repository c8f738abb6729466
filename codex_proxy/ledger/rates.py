"""How much may be asked in a minute: GCRA, in its form as a bucket that leaks evenly. Pure.

A limit of 60 a minute is a bucket that holds 60 and empties by one a second. So whoever was quiet may ask for a
minute's worth at once, and in any span of time never more than that and what has leaked meanwhile. Levels are whole
numbers (units times nanoseconds a minute), so nothing is lost or won by rounding, however long it runs.

They are kept in memory, by each process for itself: a restart forgets them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from codex_proxy.ledger.model import Limits
from codex_proxy.trace import Allowance, Room

MINUTE = 60_000_000_000
"""In nanoseconds."""


@dataclass(slots=True)
class Bucket:
    """What one limit has let through of late. Times are seconds of a clock of which only differences count."""

    level: int = 0
    """Units times `MINUTE`."""
    at: int = 0
    """Nanoseconds; when `level` was right."""
    limit: int = 0
    """At which it leaks since then."""

    def wait(self, units: int, limit: int, now: float) -> float:
        """Return after how many seconds *units* fit; 0 when they do now.

        What is larger than a whole minute's worth fits an empty bucket: it could never be asked otherwise, and
        what follows waits the longer.
        """
        if limit <= 0:
            return 60.0
        self._leak(now)
        self._have(limit)
        over = self.level + (min(units, limit) - limit) * MINUTE
        # Up to the next nanosecond, so that it does fit then.
        return -(-over // limit) / 1e9 if over > 0 else 0.0

    def take(self, units: int, now: float) -> None:
        """Count *units*, whether or not they fit; negative ones are given back."""
        self._leak(now)
        self.level = max(0, self.level + units * MINUTE)

    def room(self, limit: int, now: float) -> Room:
        """Return what is left."""
        self._leak(now)
        self._have(limit)
        remaining = max(0, limit * MINUTE - self.level) // MINUTE
        return Room(limit, remaining, -(-self.level // limit) / 1e9 if limit > 0 else 60.0)

    def _leak(self, now: float) -> None:
        moment = int(now * 1e9)
        # A clock that goes back has nothing leak, and what leaked stays so.
        if moment > self.at:
            self.level = max(0, self.level - (moment - self.at) * self.limit)
        self.at = moment

    def _have(self, limit: int) -> None:
        """Leak by *limit* from now on."""
        if 0 < limit < self.limit:
            # What a higher one has let through is no debt under this one: a thousand in a minute, then lowered to
            # ten, would keep everything out for an hour and a half.
            self.level = min(self.level, max(limit * MINUTE, self.level * limit // self.limit))
        self.limit = limit


@dataclass(slots=True)
class _Meter:
    """The buckets of one key, or of one user with all its keys."""

    requests: Bucket = field(default_factory=Bucket)
    tokens: Bucket = field(default_factory=Bucket)


Owners = Sequence[tuple[str, Limits]]
"""Whose limits count for a turn: its key's and its user's, by their ids."""


@dataclass(slots=True, frozen=True)
class Refusal:
    """Which limit has no room, and when it has."""

    owner: str
    what: str
    """"requests" or "tokens"."""
    limit: int
    seconds: float


class Meters:
    """The buckets of all keys and users that have limits."""

    def __init__(self) -> None:
        self._meters: dict[str, _Meter] = {}

    def take(self, owners: Owners, tokens: int, now: float) -> tuple[Refusal | None, Allowance | None]:
        """Count one request of so many tokens for all *owners*, or for none.

        Returns:
            The longest wait where it was for none; and what may still be asked, by the limit of each kind that leaves
            the least.
        """
        requested, tokened, worst = [], [], None
        for owner, limits in owners:
            meter = self._meter(owner)
            if (limit := limits.requests_per_minute) is not None:
                requested.append((meter.requests, limit))
                worst = _longer(worst, owner, "requests", limit, meter.requests.wait(1, limit, now))
            if (limit := limits.tokens_per_minute) is not None:
                tokened.append((meter.tokens, limit))
                worst = _longer(worst, owner, "tokens", limit, meter.tokens.wait(tokens, limit, now))
        if worst is None:
            for bucket, _ in requested:
                bucket.level += MINUTE
            for bucket, _ in tokened:
                bucket.level += tokens * MINUTE
        if not requested and not tokened:
            return worst, None
        return worst, Allowance(_tightest(requested, now), _tightest(tokened, now))

    def left(self, owners: Owners, now: float) -> Allowance | None:
        """Return what may still be asked, as `take` does, and count nothing."""
        requests, tokens = [], []
        for owner, limits in owners:
            meter = self._meter(owner)
            if (limit := limits.requests_per_minute) is not None:
                requests.append(meter.requests.room(limit, now))
            if (limit := limits.tokens_per_minute) is not None:
                tokens.append(meter.tokens.room(limit, now))
        if not requests and not tokens:
            return None
        return Allowance(
            min(requests, key=_remaining, default=None), min(tokens, key=_remaining, default=None)
        )

    def correct(self, owners: Owners, requests: int, tokens: int, now: float) -> None:
        """Count so many more; negative numbers are given back."""
        for owner, limits in owners:
            meter = self._meter(owner)
            if requests and limits.requests_per_minute is not None:
                meter.requests.take(requests, now)
            if tokens and limits.tokens_per_minute is not None:
                meter.tokens.take(tokens, now)

    def _meter(self, owner: str) -> _Meter:
        meter = self._meters.get(owner)
        if meter is None:
            meter = self._meters[owner] = _Meter()
        return meter


def _longer(worst: Refusal | None, owner: str, what: str, limit: int, seconds: float) -> Refusal | None:
    if seconds > 0 and (worst is None or seconds > worst.seconds):
        return Refusal(owner, what, limit, seconds)
    return worst


def _tightest(buckets: Sequence[tuple[Bucket, int]], now: float) -> Room | None:
    if not buckets:
        return None
    bucket, limit = min(buckets, key=_left) if len(buckets) > 1 else buckets[0]
    return bucket.room(limit, now)


def _left(one: tuple[Bucket, int]) -> int:
    bucket, limit = one
    return limit * MINUTE - bucket.level


def _remaining(room: Room) -> int:
    return room.remaining
