"""The best of many scores that all change with time and with every turn, found by a look at few: pure.

A score was computed some time ago, for a *frame*: what a turn costs, what a percent of each plan's windows is
worth. While nothing about its account changes, it has risen since by no more than its *rate* allows; so what it
was, lifted by that, is a *ceiling*. What a turn costs and what percents are worth changes for all accounts, but
not for all alike. A score says how room compares with need,

    -log2(1 + need / room) = -log2((room + turns + load) / room)

so where turns are a share *t* of that sum, and load a share *l*, turns that are *y* times as dear and percents
of which one is *1/z* times as much change the sum in proportion to `1 + t * (y - 1) + l * (z - 1)`, exactly.
Accounts of about the same shares and rates lie in one *bin*: what any account of it can have gained is little
more than what each of them has. Who may be the best is then asked for its score, those of the highest ceilings
first, until no ceiling is above what was found.
"""

import bisect
import heapq
import itertools
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from math import inf, log, log2
from typing import Any, NamedTuple

from codex_proxy.accounts.account import Account
from codex_proxy.accounts.dues import Dues

Unit = tuple[str | None, bool]
"""A plan, and whether its long window is meant: what a percent is worth is learned for it."""

OWN: Unit = ("", False)
"""What an account has shown itself; only it changes that."""

MOST_CHANGE = 1.5
"""How far the cost of a turn or the worth of a percent may be from the frame's, either way, until there is a new frame."""

_TURNS = 32
"""How many bins there are by the share of turns."""
_LOADS = (0.0, 0.03, 0.1, 0.3, 1.0)
"""Up to where a bin of load goes."""
_RATES = (0.0, 1e-5, 1e-4, 3e-4, 1e-3, 3e-3, 0.1, 1e6)
"""Up to where a bin of rates goes, a second."""

# Above what rounding can do.
_HAIR = 1e-6

# One that was looked at for nothing, and whose ceiling may have risen by so much more than its score, is put anew.
_LOOSE = 0.002


@dataclass(slots=True)
class Frame:
    """What scores were computed for."""

    since: float
    turn: float
    """What a turn costs."""
    worth: Mapping[str | None, tuple[float, float]]
    """What a percent of the short and of the long window is worth, by plan."""
    looks: float = 0.0
    """How many scores were asked for since, beyond what is usual, and as much other work."""
    is_over: bool = False


class Ceiling(NamedTuple):
    """What is known of an account's score in a frame."""

    value: float
    """It is not above this now, what a start is worth left out."""
    start: float
    """What a start is worth."""
    units: tuple[Unit, ...] = ()
    """What its percents are worth depends on these."""
    turns: float = 0.0
    """The share of turns in the sum."""
    load: float = 0.0
    rate: float = 0.0
    """How fast it can rise, a second, ..."""
    until: float = inf
    """... up to this time."""
    alike: Any = None
    """The scores of accounts that have this in common are the same at any time; None: it has a score of its own."""


_Entry = tuple[float, int, int]
"""The ceiling at the begin of the frame, negative; what it is alike in, as a number; and the place."""


class Bin:
    """The accounts whose ceilings move nearly alike."""

    __slots__ = ("entries", "head", "load", "number", "rate", "start", "turns", "units")

    def __init__(
        self, number: int, start: float, units: tuple[Unit, ...], turns: int, load: int, rate: int
    ) -> None:
        self.number = number
        self.start = start
        self.units = units
        self.turns = (turns / _TURNS, (turns + 1) / _TURNS)
        """The least and the most of any."""
        self.load = (_LOADS[load - 1] if load else 0.0, _LOADS[load])
        self.rate = _RATES[rate]
        self.entries: list[_Entry] = []
        """The highest first."""
        self.head: _Head | None = None


_Head = tuple[float, int, Bin]
"""A bin by the first of its entries, what a start is worth added; negative."""


class Ceilings:
    """An order by ceilings, which keeps itself to the frame.

    Args:
        frame: Returns the frame that counts.
        ceiling: Returns an account's ceiling in it.
    """

    __slots__ = (
        "_alike",
        "_bins",
        "_ceiling",
        "_dues",
        "_frame",
        "_made_for",
        "_numbers",
        "_where",
        "apart",
        "heads",
        "rates",
    )

    def __init__(self, frame: Callable[[], Frame], ceiling: Callable[[Account, float], Ceiling]) -> None:
        self._frame = frame
        self._ceiling = ceiling
        self._made_for: Frame | None = None
        self._bins: dict[Any, Bin] = {}
        self._where: dict[int, tuple[Any, _Entry, float]] = {}
        """By place: the bin, the entry there, and when it was put."""
        self._alike: dict[Any, tuple[int, float]] = {}
        self._numbers = itertools.count()
        self._dues = Dues()
        """When rates are to be asked for again."""
        self.heads: list[_Head] = []
        """Of all bins, the highest first."""
        self.apart: set[Bin] = set()
        """Bins in which a start counts against an account: without it, they would stand elsewhere among the heads."""
        self.rates: Counter[float] = Counter()
        """How many bins there are of each rate."""

    def put(self, account: Account, now: float) -> None:
        """Take an account in, or give it the place that it has now."""
        frame = self._made_for
        if frame is None or frame is not self._frame():
            # All are to be put anew before anybody is chosen.
            return
        place = account.place
        value, start, units, turns, load, rate, until, alike = self._ceiling(account, now)
        self._dues.set(place, until)
        turn_bin = min(int(turns * _TURNS), _TURNS - 1)
        load_bin = bisect.bisect_left(_LOADS, load) if load else 0
        rate_bin = bisect.bisect_left(_RATES, rate) if rate else 0
        key = (start, units, turn_bin, load_bin, rate_bin)
        at_begin = _RATES[rate_bin] * (now - frame.since) - value
        if alike is None:
            number = -1 - place
        else:
            # Those that are alike stand together.
            number, at_begin = self._alike.setdefault((key, alike), (next(self._numbers), at_begin))
        entry: _Entry = (at_begin, number, place)
        before = self._where.get(place)
        if before is not None:
            if before[0] == key and before[1] == entry:
                return
            self._remove(before[0], before[1])
        one = self._bins.get(key)
        if one is None:
            one = self._bins[key] = Bin(next(self._numbers), start, units, turn_bin, load_bin, rate_bin)
            self.rates[one.rate] += 1
            if start < 0.0:
                self.apart.add(one)
        bisect.insort(one.entries, entry)
        self._where[place] = (key, entry, now)
        if one.entries[0] is entry:
            self._head(one)
        if len(self._alike) > 2 * len(self._where) + 1_000:
            # What nobody is like any more.
            self._alike.clear()

    def put_at(self, account: Account) -> float:
        """Return when an account was put."""
        return self._where[account.place][2]

    def drop(self, account: Account) -> None:
        """Leave an account out that is in it."""
        before = self._where.pop(account.place, None)
        if before is not None:
            self._remove(before[0], before[1])
            self._dues.set(account.place, inf)

    def _remove(self, key: Any, entry: _Entry) -> None:
        one = self._bins[key]
        index = bisect.bisect_left(one.entries, entry)
        del one.entries[index]
        if index == 0:
            self._head(one)
        if not one.entries:
            del self._bins[key]
            self.apart.discard(one)
            self.rates[one.rate] -= 1
            if not self.rates[one.rate]:
                del self.rates[one.rate]

    def _head(self, one: Bin) -> None:
        """Give a bin the place among the others that its first entry has."""
        if one.head is not None:
            del self.heads[bisect.bisect_left(self.heads, one.head)]
        one.head = None
        if one.entries:
            one.head = (one.entries[0][0] - one.start, one.number, one)
            bisect.insort(self.heads, one.head)

    def update(self, members: Mapping[int, Account], now: float) -> None:
        """Bring it into the frame of now; *members* are all that are in it, by place."""
        frame = self._frame()
        if self._made_for is not frame:
            self._made_for = frame
            for kept in (self._bins, self._where, self._alike, self.heads, self.apart, self.rates):
                kept.clear()
            for account in members.values():
                self.put(account, now)
        elif self._dues.first() <= now:
            for place in list(self._dues.pop(now)):
                self.put(members[place], now)


Score = tuple[float, float, float, float, float]
"""A score, and its parts; the last is what a start is worth."""


class Drift:
    """How far the cost of a turn and the worth of percents are from the frame's.

    Args:
        turns: How many times as dear turns are.
        percents: How many times as much percents are worth.
    """

    __slots__ = ("_changes", "_percents", "_turns", "is_any", "most_rise")

    def __init__(self, turns: float, percents: Mapping[Unit, float]) -> None:
        self._turns = turns
        self._percents = percents
        self._changes: dict[tuple[Unit, ...], tuple[float, float]] = {}
        self.is_any = turns != 1.0 or any(part != 1.0 for part in percents.values())
        self.most_rise = log2(max(1.0, *percents.values(), 1.0) / min(1.0, turns))
        """How much any score can have risen by it."""

    def rise(self, one: "Bin") -> float:
        """Return how much the scores of a bin can have risen by it."""
        if not self.is_any:
            return 0.0
        change = self._changes.get(one.units)
        if change is None:
            # By which part turns and load cost more, against what percents of these windows are worth.
            better = max([self._percents.get(unit, 1.0) for unit in one.units], default=1.0)
            change = self._changes[one.units] = (self._turns / better - 1.0, 1.0 / better - 1.0)
        turns, load = change
        # What gets cheaper counts as much as it does for any of them, what gets dearer as little.
        part = one.turns[turns < 0.0] * turns + one.load[load < 0.0] * load
        if -0.4 < part < 0.4:
            # -log2(1 + part), or a little more.
            return part * (part - 1.0) * _PER_LN2
        # The sum is no less than if all of it had changed by the least.
        return -log2(1.0 + max(part, min(0.0, turns, load)))


@dataclass(slots=True)
class Found:
    """The best of a crowd."""

    best: list[tuple[float, bool, int, Account, Score]] = field(default_factory=list)
    """Score (negative), whether it comes before the first place, place; sorted."""
    top: float = -inf
    """The highest score, what a start is worth left out."""
    looks: int = 0
    """How many were asked for their score."""
    opened: int = 0
    """In how many bins there may have been one of the best."""


class Search:
    """One search for the best in some orders.

    Args:
        orders: With the accounts by place.
        drift: How far things are from the frame.
        elapsed: Seconds since it began.
        weigh: Returns the score of an account, by the limit of *family*.
        counts_start: Whether what a start is worth counts for it.
        first: The place that comes first among equals.
        without: Places that are left out.
    """

    def __init__(
        self,
        orders: Sequence[tuple[Ceilings, Mapping[int, Account]]],
        drift: Drift,
        elapsed: float,
        weigh: Callable[[Account, str | None, float], Score],
        family: str | None,
        now: float,
        *,
        counts_start: bool,
        first: int,
        without: Collection[int],
    ) -> None:
        self._orders = orders
        self._drift = drift
        self._elapsed = elapsed
        fastest = max([max(order.rates, default=0.0) for order, _ in orders], default=0.0)
        self._most_rise = drift.most_rise + fastest * elapsed + _HAIR
        self._weigh = weigh
        self._family = family
        self._now = now
        self._counts_start = counts_start
        self._first = first
        self._without = without
        self._next: dict[Bin, int] = {}
        """The entry of each opened bin that was not looked at yet."""
        self._loose: list[tuple[Ceilings, Account, float]] = []
        self.found = Found()

    def run(self, count: int) -> Found:
        """Find the best *count*, and how high the highest is without what a start is worth."""
        best, most, counts_start, after = self.found.best, self._most_rise, self._counts_start, self._next
        look, drift, elapsed = self._look, self._drift, self._elapsed
        opened: list[tuple[float, int, Bin, int, float]] = []
        streams = [order.heads for order, _ in self._orders]
        at = [0] * len(streams)
        while True:
            limit = best[-1][0] if len(best) >= count else inf
            nearest = opened[0][0] if opened and opened[0][0] < limit else limit
            for index, heads in enumerate(streams):
                here, end = at[index], len(heads)
                while here < end and heads[here][0] - most <= nearest:
                    one = heads[here][2]
                    here += 1
                    # As `_rise` says.
                    lift = one.rate * elapsed + _HAIR
                    if drift.is_any:
                        lift += drift.rise(one)
                    if counts_start or one.start < 0.0:
                        lift += one.start
                    bound = one.entries[0][0] - lift
                    if bound <= limit:
                        heapq.heappush(opened, (bound, len(after), one, index, lift))
                        if bound < nearest:
                            nearest = bound
                    after[one] = 0
                at[index] = here
            if not opened or opened[0][0] > limit:
                break
            _, number, one, index, lift = opened[0]
            look(one, index, count)
            then = after[one]
            if then < len(one.entries):
                bound = one.entries[then][0] - lift
                heapq.heapreplace(opened, (bound, number, one, index, lift))
            else:
                heapq.heappop(opened)
        self._find_top()
        self.found.opened = len(after)
        return self.found

    def put_anew(self) -> None:
        """Give those that were looked at for nothing lower ceilings, where they have risen for long."""
        now = self._now
        for order, account, rate in self._loose:
            if rate * (now - order.put_at(account)) > _LOOSE:
                order.put(account, now)

    def _find_top(self) -> None:
        """Go on where a score could be higher than those found that has no start."""
        found, most = self.found, self._most_rise
        for index, (order, _) in enumerate(self._orders):
            for head, _, one in order.heads:
                if head - most >= -found.top:
                    break
                self._climb(one, index)
            for one in order.apart:
                self._climb(one, index)

    def _climb(self, one: Bin, index: int) -> None:
        entries, found = one.entries, self.found
        after = self._next.setdefault(one, 0)
        if after >= len(entries) or self._most_rise - entries[after][0] <= found.top:
            return
        rise = self._rise(one)
        while after < len(entries) and rise - entries[after][0] > found.top:
            self._look(one, index, 0)
            after = self._next[one]

    def _rise(self, one: Bin) -> float:
        """Return how much the scores of a bin can have risen since the frame began."""
        return self._drift.rise(one) + one.rate * self._elapsed + _HAIR

    def _look(self, one: Bin, index: int, count: int) -> None:
        """Ask for the next score of a bin, which may be that of several; keep the best *count*."""
        at = self._next[one]
        order, members = self._orders[index]
        _, alike, place = one.entries[at]
        if alike >= 0:
            places = self._equals(one, at, count)
            if not places:
                return
            place = places[0]
        else:
            self._next[one] = at + 1
            if place in self._without:
                return
            places = (place,)
        found, account = self.found, members[place]
        found.looks += 1
        score = self._weigh(account, self._family, self._now)
        start = score[4]
        plain = score[0] - start
        if plain > found.top:
            found.top = plain
        if alike < 0 and one.rate * self._elapsed > _LOOSE:
            self._loose.append((order, account, one.rate))
        if not count:
            return
        if start > 0.0 and not self._counts_start:
            score = (plain, *score[1:4], 0.0)
        best, first, negative = found.best, self._first, -score[0]
        for place in places:
            if len(best) >= count and negative > best[-1][0]:
                return
            bisect.insort(best, (negative, place < first, place, members[place], score))
            if len(best) > count:
                best.pop()

    def _equals(self, one: Bin, at: int, count: int) -> Sequence[int]:
        """Return the places of the first *count* of those that have the same score, which are all looked at by that."""
        entries, without = one.entries, self._without
        value, alike, _ = entries[at]
        end = bisect.bisect_left(entries, (value, alike + 1), at + 1)
        middle = bisect.bisect_left(entries, (value, alike, self._first), at, end)
        self._next[one] = end
        turned = (entries[number][2] for number in (*range(middle, end), *range(at, middle)))
        return list(itertools.islice((place for place in turned if place not in without), max(count, 1)))


_PER_LN2 = 1.0 / log(2.0)
