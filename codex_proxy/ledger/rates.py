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

COUNTS = 8
"""How often the tokens of something may be counted for each request that may be made: clients do it several times a turn."""


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
        return self.wait_at(units, limit, _moment(now))

    def wait_at(self, units: int, limit: int, moment: int) -> float:
        """Return the same, for a moment in nanoseconds."""
        if limit <= 0:
            return 60.0
        self._look(limit, moment)
        over = self.level + ((units if units < limit else limit) - limit) * MINUTE
        # Up to the next nanosecond, so that it does fit then.
        return -(-over // limit) / 1e9 if over > 0 else 0.0

    def take(self, units: int, now: float) -> None:
        """Count *units*, whether or not they fit; negative ones are given back."""
        self.take_at(units, _moment(now))

    def take_at(self, units: int, moment: int) -> None:
        """Do the same at a moment in nanoseconds."""
        self._look(self.limit, moment)
        level = self.level + units * MINUTE
        self.level = level if level > 0 else 0

    def room(self, limit: int, now: float) -> Room:
        """Return what is left."""
        self._look(limit, _moment(now))
        return self.left(limit)

    def left(self, limit: int) -> Room:
        """Return what is left at the moment that was looked at last."""
        free = limit * MINUTE - self.level
        return Room(
            limit, free // MINUTE if free > 0 else 0, -(-self.level // limit) / 1e9 if limit > 0 else 60.0
        )

    def _look(self, limit: int, moment: int) -> None:
        """Have leaked what has leaked by a moment, and leak by *limit* from then on."""
        if self.level and moment > self.at:
            level = self.level - (moment - self.at) * self.limit
            self.level = level if level > 0 else 0
        # A clock that goes back has nothing leak, and what leaked stays so.
        self.at = moment
        if limit != self.limit:
            if 0 < limit < self.limit:
                # What a higher one has let through is no debt under this one: a thousand in a minute, then lowered to
                # ten, would keep everything out for an hour and a half.
                self.level = min(self.level, max(limit * MINUTE, self.level * limit // self.limit))
            self.limit = limit


def _moment(now: float) -> int:
    return int(now * 1e9)


@dataclass(slots=True)
class _Meter:
    """The buckets of one key, or of one user with all its keys."""

    requests: Bucket = field(default_factory=Bucket)
    tokens: Bucket = field(default_factory=Bucket)
    counts: Bucket = field(default_factory=Bucket)


Owners = Sequence[tuple[str, Limits]]
"""Whose limits count for a turn: its key's and its user's, by their ids."""


@dataclass(slots=True, frozen=True)
class Refusal:
    """Which limit has no room, and when it has."""

    owner: str
    what: str
    """"requests", "tokens" or "counts"."""
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
        requested, tokened, worst, moment = [], [], None, _moment(now)
        for owner, limits in owners:
            meter = self._meters.get(owner) or self._meter(owner)
            if (limit := limits.requests_per_minute) is not None:
                requested.append((meter.requests, limit))
                if seconds := meter.requests.wait_at(1, limit, moment):
                    worst = _longer(worst, owner, "requests", limit, seconds)
            if (limit := limits.tokens_per_minute) is not None:
                tokened.append((meter.tokens, limit))
                if seconds := meter.tokens.wait_at(tokens, limit, moment):
                    worst = _longer(worst, owner, "tokens", limit, seconds)
        if worst is None:
            for bucket, _ in requested:
                bucket.level += MINUTE
            for bucket, _ in tokened:
                bucket.level += tokens * MINUTE
        if not requested and not tokened:
            return worst, None
        return worst, Allowance(_tightest(requested), _tightest(tokened))

    def count(self, owners: Owners, now: float) -> Refusal | None:
        """Count one request that is no turn, for all *owners* or for none; the longest wait where it was for none."""
        buckets, worst, moment = [], None, _moment(now)
        for owner, limits in owners:
            if limits.requests_per_minute is None:
                continue
            bucket, limit = self._meter(owner).counts, limits.requests_per_minute * COUNTS
            buckets.append(bucket)
            if seconds := bucket.wait_at(1, limit, moment):
                worst = _longer(worst, owner, "counts", limit, seconds)
        if worst is None:
            for bucket in buckets:
                bucket.level += MINUTE
        return worst

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
        moment = _moment(now)
        for owner, limits in owners:
            meter = self._meters.get(owner) or self._meter(owner)
            if requests and limits.requests_per_minute is not None:
                meter.requests.take_at(requests, moment)
            if tokens and limits.tokens_per_minute is not None:
                meter.tokens.take_at(tokens, moment)

    def _meter(self, owner: str) -> _Meter:
        meter = self._meters.get(owner)
        if meter is None:
            meter = self._meters[owner] = _Meter()
        return meter


def _longer(worst: Refusal | None, owner: str, what: str, limit: int, seconds: float) -> Refusal | None:
    return Refusal(owner, what, limit, seconds) if worst is None or seconds > worst.seconds else worst


def _tightest(buckets: Sequence[tuple[Bucket, int]]) -> Room | None:
    """Return what is left in the one that has the least; all of them were just looked at."""
    if not buckets:
        return None
    bucket, limit = min(buckets, key=_left) if len(buckets) > 1 else buckets[0]
    return bucket.left(limit)


def _left(one: tuple[Bucket, int]) -> int:
    bucket, limit = one
    return limit * MINUTE - bucket.level


def _remaining(room: Room) -> int:
    return room.remaining
