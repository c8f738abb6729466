"""Which of the accounts that could serve does: pure strategies behind one interface.

The pool has already left out who cannot serve (state, model, concurrency, a worse priority), and
has followed the bonds that leave no choice (compacted history, a turn's state). A strategy sees
what the daemon sees: whole percents, their age, resets; never the future.

`docs/scheduling.md` says in plain words how each decides, with figures.
"""

import bisect
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from math import exp, frexp, inf, log, log2
from operator import itemgetter
from typing import Protocol, overload

from codex_proxy.accounts.account import Account
from codex_proxy.accounts.ceilings import MOST_CHANGE, OWN, Ceiling, Ceilings, Drift, Frame, Search, Unit
from codex_proxy.accounts.crowd import BEYOND, Crowd, Order, Rank, Ranked, Shelf
from codex_proxy.accounts.quota import MAIN_FAMILY, MAX_LATE_SECONDS, SHORT_MINUTES, Family, Window

# An account whose quota nobody has seen is neither the best nor the worst.
UNKNOWN_LEFT = 50.0

# What tokens cost against each other: the ratio of the public API prices (cached input a tenth of
# fresh input, output eight times it). How the backend really counts is not published.
CACHED_COST = 0.1
OUTPUT_COST = 8.0


def cost_of(input_tokens: int, cached_tokens: int, output_tokens: int) -> float:
    """Return what a turn costs, in uncached input tokens' worth; *input_tokens* includes the cached ones."""
    return (
        max(0, input_tokens - cached_tokens)
        + CACHED_COST * max(0, cached_tokens)
        + OUTPUT_COST * output_tokens
    )


@dataclass(slots=True)
class Ask:
    """What a strategy needs to know of a request; nobody changes it."""

    family: str | None = None
    """The limit that its model counts on beside the main one; None: the main one."""
    home: Account | None = None
    """The account on which its conversation lives, when that could serve; one of those to choose from."""
    tokens: int = 0
    """About how many input tokens it carries: what another account than `home` would read anew."""
    idle: float = 0.0
    """Seconds since its conversation was last served; a cache does not live for ever."""


@dataclass(slots=True, frozen=True)
class Score:
    """What speaks for one account."""

    account: Account
    value: float
    """Higher is better."""
    parts: tuple[tuple[str, float], ...] = ()
    """What the value is made of, by names that an owner understands."""


Row = tuple[float, Account, tuple[float, ...]]
"""A score as it is computed: value, account, parts; nearly all are thrown away."""


class Scores(Sequence[Score]):
    """Scores whose parts have the names *names*, made when somebody looks; the last parts may be missing."""

    __slots__ = ("names", "rows")

    def __init__(self, rows: Sequence[Row] = (), names: tuple[str, ...] = ()) -> None:
        self.rows = rows
        self.names = names

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, index: int) -> Score: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Score]: ...
    def __getitem__(self, index: int | slice) -> Score | Sequence[Score]:
        if isinstance(index, slice):
            return Scores(self.rows[index], self.names)
        value, account, parts = self.rows[index]
        return Score(account, value, tuple(zip(self.names, parts, strict=False)))

    def best(self, count: int) -> Sequence[Row]:
        """Return the best few, the best first; of equals the earlier."""
        return sorted(self.rows, key=_value_of, reverse=True)[:count]


_value_of: Callable[[Row], float] = itemgetter(0)
_NO_SCORES = Scores()


@dataclass(slots=True)
class Choice:
    """An account, and why."""

    account: Account
    rule: str
    scores: Scores = _NO_SCORES
    """Of every account that was compared, or of the best at least; in any order, empty when none were."""


class Strategy(Protocol):
    """Choose one of several accounts.

    One object lives as long as the pool uses it; what it has learned is by account key.
    """

    name: str

    def stays(self, ask: Ask, now: float) -> str | None:
        """Return the rule by which a conversation stays on `ask.home` without a look at the others.

        Asked first, so that the usual turn of a conversation costs nothing; None: compare all.
        """
        ...

    def choose(self, accounts: Sequence[Account], ask: Ask, now: float) -> Choice:
        """Return one of *accounts*, which is never empty, after a look at each.

        Whoever asks tells the account that it carries more now (`Account.stir`).
        """
        ...

    def order(self, family: str | None) -> Order:
        """Return a new order for a shelf of accounts, by the quota of *family*."""
        ...

    def pick(self, crowd: Crowd, ask: Ask, now: float) -> Choice:
        """Return what `choose` would of the same accounts in the order of their places, with a look at few.

        The orders of the crowd's shelves are up to date.
        """
        ...

    def spent(self, account: Account, cost: float, now: float) -> None:
        """Learn that a turn on *account* cost about so many uncached input tokens' worth."""
        ...

    def forget(self, key: str) -> None:
        """Forget what was learned of the account with that key: it left, or its owner wants a fresh start."""
        ...


class _Sticky:
    """What the simple strategies share: conversations stay where they are, and nothing is learned."""

    def stays(self, ask: Ask, now: float) -> str | None:
        return "conversation" if ask.home is not None else None

    def spent(self, account: Account, cost: float, now: float) -> None:
        pass

    def forget(self, key: str) -> None:
        pass


class QuotaBalance(_Sticky):
    """Take the account with the most quota left, the idlest on a tie, each in turn after that."""

    name = "quota-balance"

    def __init__(self) -> None:
        self._turn = 0

    def choose(self, accounts: Sequence[Account], ask: Ask, now: float) -> Choice:
        self._turn += 1
        best: Account = accounts[0]
        best_rank: tuple[tuple[float, int], int] | None = None
        count = len(accounts)
        for index, account in enumerate(accounts):
            rank = (self._rank(account, now, ask.family), (index - self._turn) % count)
            if best_rank is None or rank < best_rank:
                best, best_rank = account, rank
        return Choice(best, "most quota left")

    def order(self, family: str | None) -> Order:
        return Ranked(partial(self._rank, family=family))

    def pick(self, crowd: Crowd, ask: Ask, now: float) -> Choice:
        self._turn += 1
        best, tied = _first_of(crowd, self, ask.family, now)
        guest = crowd.guest
        if guest is not None:
            rank = self._rank(guest, now, ask.family)
            if best is None or rank < best:
                best, tied = rank, []
            elif rank > best:
                guest = None
        # The one whose turn it is, then those after it, the guest as the last of all; then from the beginning.
        turn = crowd.place_of(self._turn % len(crowd))
        for start in (turn, 0):
            found = [
                (place, shelf.members[place])
                for order, shelf in tied
                if (place := order.next(best, start, crowd.without)) is not None
            ]
            if found:
                return Choice(min(found, key=_place_of)[1], "most quota left")
            if guest is not None:
                return Choice(guest, "most quota left")
        raise AssertionError("a crowd has somebody")

    def _rank(self, account: Account, now: float, family: str | None) -> tuple[float, int]:
        left = account.left(now, family)
        # Whole percents: the backend reports no finer, and a tie must be a tie. What is no
        # number is as good as unknown.
        known = left if left is not None and -inf < left < inf else UNKNOWN_LEFT
        return -round(known), account.in_flight


class RoundRobin(_Sticky):
    """Take the account whose last turn to be chosen is longest ago."""

    name = "round-robin"

    def __init__(self) -> None:
        self._turn = 0
        self._chosen: dict[str, int] = {}

    def choose(self, accounts: Sequence[Account], ask: Ask, now: float) -> Choice:
        # By when it was chosen, not by place: then candidates may come and go, and one that
        # rested is owed one turn, not all that it missed.
        return self._chose(min(accounts, key=self._rank))

    def order(self, family: str | None) -> Order:
        return Ranked(lambda account, now: self._rank(account))

    def pick(self, crowd: Crowd, ask: Ask, now: float) -> Choice:
        best = _first_account(crowd, self, now, self._rank)
        return self._chose(best)

    def _rank(self, account: Account) -> tuple[int, str]:
        return self._chosen.get(account.key, 0), account.key

    def _chose(self, account: Account) -> Choice:
        self._turn += 1
        self._chosen[account.key] = self._turn
        return Choice(account, "its turn")

    def forget(self, key: str) -> None:
        self._chosen.pop(key, None)


class FillFirst(_Sticky):
    """Take one account until it is used up, then the next; always in the same order."""

    name = "fill-first"

    def choose(self, accounts: Sequence[Account], ask: Ask, now: float) -> Choice:
        best = min(accounts, key=partial(self._rank, now=now, family=ask.family))
        return Choice(best, "first that is not used up")

    def order(self, family: str | None) -> Order:
        return Ranked(partial(self._rank, family=family))

    def pick(self, crowd: Crowd, ask: Ask, now: float) -> Choice:
        best = _first_account(crowd, self, now, partial(self._rank, now=now, family=ask.family), ask.family)
        return Choice(best, "first that is not used up")

    def _rank(self, account: Account, now: float, family: str | None) -> tuple[bool, str]:
        # An account that its numbers call used up comes last: the backend will say the same.
        return _is_used_up(account, family, now), account.key


class Weighted(_Sticky):
    """Give each account the share of the choices that its file's `weight` says, evenly mixed.

    Counted in whole units, so that no rounding decides between equals.
    """

    name = "weighted"

    def __init__(self) -> None:
        self._owed: dict[str, int] = {}
        """Of those that are in no order; the others' is kept there."""

    def choose(self, accounts: Sequence[Account], ask: Ask, now: float) -> Choice:
        # Each is owed its weight at every choice, and who is chosen has paid for all: a weight of
        # 5 against 1 and 1 gives a a b a c a a, not a a a a a b c.
        weights = [_units(account) for account in accounts]
        if not any(weights):
            weights = [_UNIT] * len(accounts)
        best: Account | None = None
        most = 0
        for account, weight in zip(accounts, weights, strict=True):
            owed = self._owed.get(account.key, 0) + weight
            self._owed[account.key] = owed
            # One of weight 0 serves only while there is no other.
            if weight and (best is None or owed > most):
                best, most = account, owed
        assert best is not None
        self._owed[best.key] -= sum(weights)
        return Choice(best, "its share")

    def order(self, family: str | None) -> Order:
        return _Debts(self._owed)

    def pick(self, crowd: Crowd, ask: Ask, now: float) -> Choice:
        without, guest = crowd.without, crowd.guest
        groups = [
            (group, shelf.members)
            for shelf in crowd.shelves
            for group in shelf.order(None, lambda: self.order(None), now).groups.values()
        ]
        weighty = [one for one in groups if one[0].weight and one[0].count(without)]
        own = _units(guest) if guest is not None else 0
        if not weighty and not own:
            weighty, own = [one for one in groups if one[0].count(without)], _UNIT
        total, most = 0, 0
        best: Account | None = None
        best_group: _Debt | None = None
        for group, members in weighty:
            weight = group.weight or _UNIT
            total += weight * group.grow(weight, without)
            owed, place = group.first(without)
            if best is None or (owed, -place) > (most, -best.place):
                best, most, best_group = members[place], owed, group
        if guest is not None and own:
            total += own
            self._owed[guest.key] = self._owed.get(guest.key, 0) + own
            if best is None or self._owed[guest.key] > most:
                best, best_group = guest, None
        assert best is not None
        if best_group is None:
            self._owed[best.key] -= total
        else:
            best_group.pay(best.place, total)
        return Choice(best, "its share")

    def forget(self, key: str) -> None:
        self._owed.pop(key, None)


class _Debt:
    """What the accounts of one weight are owed; what all of them are owed alike is kept once."""

    __slots__ = ("_added", "_base", "_entries", "weight")

    def __init__(self, weight: int) -> None:
        self.weight = weight
        self._added = 0
        self._base: dict[int, int] = {}
        self._entries: list[tuple[int, int]] = []
        """What is not owed to all alike, negative, and the place; who is owed most is the first."""

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, place: int) -> bool:
        return place in self._base

    def count(self, without: Collection[int]) -> int:
        """Return how many there are."""
        return len(self._entries) - sum(place in self._base for place in without)

    def add(self, place: int, owed: int) -> None:
        self._base[place] = owed - self._added
        bisect.insort(self._entries, (self._added - owed, place))

    def remove(self, place: int) -> int:
        """Leave one out; return what it is owed."""
        base = self._base.pop(place)
        del self._entries[bisect.bisect_left(self._entries, (-base, place))]
        return base + self._added

    def grow(self, weight: int, without: Collection[int]) -> int:
        """Owe each so much more but for those *without*; return how many that are."""
        self._added += weight
        left_out = [place for place in without if place in self._base]
        for place in left_out:
            self.pay(place, weight)
        return len(self._entries) - len(left_out)

    def first(self, without: Collection[int]) -> tuple[int, int]:
        """Return how much is owed to whom most is, and its place."""
        base, place = next(entry for entry in self._entries if entry[1] not in without)
        return self._added - base, place

    def pay(self, place: int, amount: int) -> None:
        """Owe one so much less."""
        self.add(place, self.remove(place) - amount)


class _Debts:
    """An order by what is owed, in groups of one weight."""

    __slots__ = ("_group_of", "_owed", "groups")

    def __init__(self, owed: dict[str, int]) -> None:
        self._owed = owed
        self._group_of: dict[int, _Debt] = {}
        self.groups: dict[int, _Debt] = {}

    def put(self, account: Account, now: float) -> None:
        weight, place = _units(account), account.place
        group = self._group_of.get(place)
        if group is not None:
            if group.weight == weight:
                return
            self.drop(account)
        group = self.groups.get(weight)
        if group is None:
            group = self.groups[weight] = _Debt(weight)
        group.add(place, self._owed.pop(account.key, 0))
        self._group_of[place] = group

    def drop(self, account: Account) -> None:
        group = self._group_of.pop(account.place)
        self._owed[account.key] = group.remove(account.place)
        if not group:
            del self.groups[group.weight]


def _first_of(
    crowd: Crowd, strategy: Strategy, family: str | None, now: float
) -> tuple[Rank | None, list[tuple[Ranked, Shelf]]]:
    """Return the first rank of all shelves, and the orders that have it."""
    best: Rank | None = None
    tied: list[tuple[Ranked, Shelf]] = []
    for shelf in crowd.shelves:
        order: Ranked = shelf.order(family, partial(strategy.order, family), now)
        entry = order.first(crowd.without)
        if entry is None:
            continue
        if best is None or entry[0] < best:
            best, tied = entry[0], [(order, shelf)]
        elif entry[0] == best:
            tied.append((order, shelf))
    return best, tied


def _first_account(
    crowd: Crowd,
    strategy: Strategy,
    now: float,
    rank: Callable[[Account], Rank],
    family: str | None = None,
) -> Account:
    """Return the account of the first rank, where no two have the same."""
    best, tied = _first_of(crowd, strategy, family, now)
    if crowd.guest is not None and (best is None or rank(crowd.guest) < best):
        return crowd.guest
    order, shelf = tied[0]
    entry = order.first(crowd.without)
    assert entry is not None
    return shelf.members[entry[1]]


_place_of: Callable[[tuple[int, Account]], int] = itemgetter(0)


def _is_used_up(account: Account, family: str | None, now: float) -> bool:
    left = account.left(now, family)
    return left is not None and left <= 0.0


# A weight is a floating-point number, and so is exact in units that are small enough.
_UNIT_BITS = 60
_UNIT = 1 << _UNIT_BITS


def _units(account: Account) -> int:
    """Return an account's weight in whole units; 0 where its file says nothing that is one."""
    weight = account.credential.weight
    if weight == 1.0:
        # As nearly always.
        return _UNIT
    if not 0.0 < weight < inf:
        return 0
    numerator, denominator = weight.as_integer_ratio()
    return max(1, (numerator << _UNIT_BITS) // denominator)


# --- horizon

# Scores are binary logarithms, so that parts add up as factors do: one more is twice as good.
# These were tuned on the traces 1 to 20 of bench/schedule.py, never on those it reports.

CLIP = 4.0
"""How far from an even pace still counts: sixteen times as much left, or a sixteenth."""
_LEAST = 2.0**-CLIP
WEEK_UP = 3.0
"""What a doubling counts where more of the week is left than an even pace would leave: that expires."""
WEEK_DOWN = 0.25
"""What a halving counts where less is left. Little, because `room` speaks of that, too."""
WEEK_SOON = 1.0
"""What a halving of the time to a week's reset counts while there is plenty: what ends soon is spent first."""
SOONEST = 0.02
"""How near a reset still makes a difference, as a share of its week."""
PLENTY_FROM = 0.85
"""From how much of an even pace of all accounts together there begins to be plenty; below, all keep pace."""
PLENTY_SPAN = 0.2
"""How much more it is until there is."""
HOURS_FACTOR = 0.25
"""The same for the window of hours, which comes back soon: what expires in it is worth less."""
ROOM_FACTOR = 1.0
NEED_TURNS = 50.0
"""An account should have room for so many turns, in its scarcest window, beside what it is busy with."""
LOAD_FACTOR = 2.0
LOAD_SECONDS = 1_800.0
"""How long a turn goes on telling how busy its account is."""
MOVE_FACTOR = 1.5
"""How much more than it costs a move must be worth."""
STAY_ANYWAY = 0.5
"""What speaks for a conversation's own account beside the cache: it alone reads its encrypted reasoning."""
CACHE_SECONDS = 3_600.0
"""How long a prompt cache keeps a conversation: an hour is the most that is documented for it in memory."""
START_PRICE = STAY_ANYWAY
"""What moving may cost at most where it only begins a window or explores an account: what a cold one costs."""
START_WEEK = 50.0
"""A weekly window begins with its first use: the sooner, the sooner there is another. One turn does it."""
START_HOURS = 0.5
EXPLORE = 50.0
"""Quota that nobody has seen is looked at first: a turn shows it, and begins its windows."""
WEEK_SECONDS = 7 * 86_400.0
LOOK_SECONDS = 60.0
"""How long the last comparison speaks for the accounts that a conversation did not choose."""

# No turn costs more; what claims to is a mistake, which must not be learned from.
MOST_OF_A_TURN = 10_000_000.0

# Until turns have shown it.
TYPICAL_TURN = 15_000.0
TYPICAL_PERCENT = 30_000.0
"""What a percent of a window of hours is worth where nothing of that plan has been learned."""
WEEKS_HOURS = 4.0
"""How many windows of hours a week holds, likewise."""


# So many percents tell what one is worth.
_ENOUGH = 3.0


@dataclass(slots=True)
class _Gauge:
    """How many tokens' worth a percent of one window is, learned from the turns between two reports."""

    percent: float = -1.0
    """As last reported."""
    resets_at: float = 0.0
    cost: float = 0.0
    """Spent since `percent` was first reported."""
    at_edge: bool = False
    """Whether `percent` was seen to begin: from the first report on, part of it may be long spent."""
    costs: float = 0.0
    percents: float = 0.0
    """Between edges, all in all."""
    worth: float | None = None
    """What a percent was worth; None where too few have passed."""

    def read(self, window: Window) -> tuple[float, float] | None:
        """Take a report; return the percents that passed since the last edge, and what they cost."""
        used, resets_at = window.used_percent, window.resets_at or 0.0
        if used < self.percent or abs(resets_at - self.resets_at) > 900.0:
            self.percent, self.resets_at, self.cost, self.at_edge = used, resets_at, 0.0, False
            return None
        if not used > self.percent:
            return None
        passed, cost, counts = used - self.percent, self.cost, self.at_edge
        self.percent, self.cost, self.at_edge = used, 0.0, True
        if not counts or cost <= 0.0:
            return None
        self.costs, self.percents = _faded(self.costs + cost, self.percents + passed)
        self.worth = self.costs / self.percents if self.percents >= _ENOUGH else None
        return passed, cost


def _faded(costs: float, percents: float) -> tuple[float, float]:
    """Halve what was learned once it is plenty, so that a change of the backend's counting is followed."""
    return (costs / 2, percents / 2) if percents > 100.0 else (costs, percents)


@dataclass(slots=True)
class _Meter:
    """What was learned of one account."""

    plan: str | None = None
    short: _Gauge = field(default_factory=_Gauge)
    long: _Gauge = field(default_factory=_Gauge)
    load: float = 0.0
    """What its conversations have cost lately, fading; also what a new one is expected to."""
    load_at: float = 0.0


_Slice = tuple[bool, float, float, float]
"""A window: whether it is long, the share that is left, when it ends, how many seconds it is long."""


@dataclass(slots=True)
class _Sheet:
    """What of an account's numbers its score is made of, good while they are the same and no window ends."""

    limit: Family | None
    primary: Window | None
    secondary: Window | None
    is_blocked: bool
    since: float
    until: float
    load_at: float
    """Until when the account's own turns were known that may have begun a window."""
    slices: tuple[_Slice, ...]
    """None where nothing is known. One that is over is as good as full, and does not end."""
    start: float
    """What it is worth that windows begin."""


# Of the limits beside the main one there are two or three; what is kept for each is found again.
_MAX_SHEETS = 16

_BEST = 5
_USUAL_LOOKS = 24.0
"""How many scores of many accounts are worth telling."""

# To put an account anew costs as much as so many looks.
_LOOKS_OF_A_FRAME = 3

# What rises faster, a second, is taken for as high as it can be.
_FASTEST = 0.001

LN2 = log(2.0)

# Where an account has less room than this many turns, its need is more than fifty times as much, or it has none.
_NO_ROOM = -ROOM_FACTOR * log2(1.0 + NEED_TURNS / (MOST_CHANGE * MOST_CHANGE))

_PARTS = ("week", "hours", "room", "start", "cache")


class Horizon:
    """Spend first what expires first, where there is room, and move a conversation only when that pays.

    Every account gets a score: the binary logarithm of how cheap its quota is. Compared with an
    even pace to its reset, quota of which twice as much is left is half as dear. An account that
    has little room, or much to do, is dearer; so is one that would have to read the conversation
    anew.

    Of many accounts only those are scored that may be the best (`ceilings`). That rests on this: while
    neither its numbers nor what it carries change and none of its windows ends, an account's score only
    rises with time; costlier turns lower it, percents that are worth more lift it.
    """

    name = "horizon"

    def __init__(self) -> None:
        self._meters: dict[str, _Meter] = {}
        self._plans: dict[Unit, tuple[float, float]] = {}
        """What percents of the long (True) and short windows of a plan have cost: costs, percents."""
        self._worth: dict[str | None, tuple[float, float]] = {}
        """What a percent of the short and of the long window of a plan is worth by that."""
        self._turn = TYPICAL_TURN
        self._best: dict[str | None, tuple[float, float]] = {}
        """The best score of the last comparison, and when that was, by family."""
        self._soon = 0.0
        """What a halving of the time to a reset counts now, between 0 and `WEEK_SOON`."""
        self._soon_at = -inf
        self._round = 0
        self._sheets: dict[str | None, dict[str, _Sheet]] = {}
        """By family and account."""
        self._frame = Frame(0.0, TYPICAL_TURN, {}, is_over=True)
        self._drift: Drift | None = None
        self.looks = 0
        """How often an account was scored."""

    # -- deciding -------------------------------------------------------------------------

    def stays(self, ask: Ask, now: float) -> str | None:
        home = ask.home
        if home is None:
            return None
        best, seen_at = self._best.get(ask.family, _NEVER)
        if not 0.0 <= now - seen_at <= LOOK_SECONDS:
            return None
        moving = self._price_of_moving(ask)
        if moving <= START_PRICE:
            return None
        score = self._weigh(home, ask.family, now)
        return "conversation" if score[0] - score[4] + moving >= best else None

    def choose(self, accounts: Sequence[Account], ask: Ask, now: float) -> Choice:
        home = ask.home
        self._round += 1
        self._look_around(now)
        count = len(accounts)
        turn = self._round % count
        moving = self._price_of_moving(ask) if home is not None else 0.0
        # A window is begun, and an account explored, by a conversation that has nothing to lose.
        may_start = moving <= START_PRICE
        weigh = self._weigh
        rows: list[Row] = []
        best, most, top = accounts[0], -inf, -inf
        # From another one each time, so that equals take turns.
        for index in range(-turn, count - turn):
            account = accounts[index]
            score = weigh(account, ask.family, now)
            value, _, _, _, start = score
            if value - start > top:
                top = value - start
            if start > 0.0 and not may_start:
                value -= start
                score = (value, *score[1:4], 0.0)
            if account is home:
                value += moving
                rows.append((value, account, (*score[1:], moving)))
            else:
                rows.append((value, account, score[1:]))
            if value > most:
                best, most = account, value
        return self._chose(best, ask, now, top, rows)

    def order(self, family: str | None) -> Order:
        return Ceilings(lambda: self._frame, partial(self._ceiling, family=family))

    def pick(self, crowd: Crowd, ask: Ask, now: float) -> Choice:
        home, family = ask.home, ask.family
        self._round += 1
        turn = self._round % len(crowd)
        moving = self._price_of_moving(ask) if home is not None else 0.0
        may_start = moving <= START_PRICE
        first = crowd.place_of(len(crowd) - turn) if turn else crowd.place_of(0)
        self._look_around(now)
        self._look_ahead(len(crowd), now)
        orders: list[tuple[Ceilings, Mapping[int, Account]]] = []
        for shelf in crowd.shelves:
            order: Ceilings = shelf.order(family, partial(self.order, family), now)
            order.update(shelf.members, now)
            orders.append((order, shelf.members))
        frame = self._frame
        search = Search(
            orders,
            self._drifted(),
            now - frame.since,
            self._weigh,
            family,
            now,
            counts_start=may_start,
            first=first,
            without=crowd.without if home is None else {*crowd.without, home.place},
        )
        if home is not None:
            # Its score is the only one that a move would lower.
            score = self._weigh(home, family, now)
            search.found.top = score[0] - score[4]
            if score[4] > 0.0 and not may_start:
                score = (score[0] - score[4], *score[1:4], 0.0)
            place = BEYOND if home is crowd.guest else home.place
            search.found.best.append((-(score[0] + moving), place < first, place, home, score))
        found = search.run(_BEST)
        search.put_anew()
        frame.looks += max(0.0, found.looks + found.opened / 2 - _USUAL_LOOKS)
        rows: list[Row] = [
            (-value, account, score[1:] if account is not home else (*score[1:], moving))
            for value, _, _, account, score in found.best
        ]
        return self._chose(found.best[0][3], ask, now, found.top, rows)

    def _chose(self, best: Account, ask: Ask, now: float, top: float, rows: Sequence[Row]) -> Choice:
        home, scores = ask.home, Scores(rows, _PARTS)
        self._best[ask.family] = (top, now)
        if home is not None and (best is home or not self._is_worth_a_move(best, ask, now)):
            return Choice(home, "conversation", scores)
        meter = self._meter(best)
        meter.load = self._load(meter, now) + self._turn * NEED_TURNS / 4
        meter.load_at = now
        return Choice(best, "expires first" if home is None else "expires first, worth a move", scores)

    def _is_worth_a_move(self, account: Account, ask: Ask, now: float) -> bool:
        """Tell whether more expires on *account* than the conversation would read anew there."""
        if ask.idle > CACHE_SECONDS:
            return True
        families = account.quota.families
        limit = (families.get(ask.family) if ask.family is not None else None) or families.get(MAIN_FAMILY)
        if limit is None:
            return False
        meter, plan = self._meters.get(account.key), account.quota.plan
        expires, room = 0.0, inf
        for window, is_long in ((limit.long, True), (limit.short, False)):
            if window is None or window.is_over(now):
                continue
            unit = self._unit(meter, plan, is_long)
            length = (window.minutes or (10_080 if is_long else 300)) * 60.0
            left = 1.0 - window.used_percent / 100.0
            expires = max(expires, (left - (window.ends_at - now) / length) * 100.0 * unit)
            # What one window lets expire, the other must have as well.
            room = min(room, left * 100.0 * unit)
        return min(expires, room) > self._anew(ask)

    def _price_of_moving(self, ask: Ask) -> float:
        """Return how much dearer another account than the conversation's own is."""
        if ask.idle > CACHE_SECONDS:
            # Read anew it must be wherever it goes.
            return STAY_ANYWAY
        return log2(1.0 + MOVE_FACTOR * self._anew(ask) / self._turn) + STAY_ANYWAY

    def _anew(self, ask: Ask) -> float:
        """Return what another account would pay for what the conversation's own one has in its cache."""
        # Where nobody counted the tokens, there is still a conversation.
        return (1.0 - CACHED_COST) * (ask.tokens if ask.tokens > 0 else self._turn)

    def _sheet(self, account: Account, family: str | None, now: float) -> _Sheet:
        """Return an account's numbers; found again while they are the same."""
        families = account.quota.families
        limit = families.get(family) if family is not None else None
        if limit is None or (limit.primary is None and limit.secondary is None):
            limit = families.get(MAIN_FAMILY)
        sheets = self._sheets.get(family)
        if sheets is None:
            if len(self._sheets) >= _MAX_SHEETS:
                self._sheets.clear()
            sheets = self._sheets[family] = {}
        sheet = sheets.get(account.credential.key)
        meter = self._meters.get(account.credential.key)
        load_at = meter.load_at if meter is not None else -inf
        if (
            sheet is None
            or sheet.limit is not limit
            or sheet.load_at < load_at
            or not sheet.since <= now < sheet.until
        ):
            is_good = False
        elif limit is None:
            is_good = True
        else:
            is_good = (
                sheet.primary is limit.primary
                and sheet.secondary is limit.secondary
                and sheet.is_blocked is limit.is_blocked
            )
        if not is_good or sheet is None:
            sheet = sheets[account.credential.key] = _read(limit, now, load_at)
        return sheet

    def _weigh(
        self, account: Account, family: str | None, now: float
    ) -> tuple[float, float, float, float, float]:
        """Return an account's score and its parts: week, hours, room, start."""
        # This runs for every account of a comparison, so it asks nothing twice and calls little.
        self.looks += 1
        sheet = self._sheet(account, family, now)
        in_flight = account.in_flight
        if not sheet.slices:
            # One request finds out; until it has, the next one takes another.
            start = EXPLORE if in_flight == 0 else -float(in_flight)
            return start, 0.0, 0.0, 0.0, start
        meter = self._meters.get(account.credential.key)
        plan, turn = account.quota.plan, self._turn
        short, long = self._worth.get(plan, _TYPICAL)
        busy = in_flight * turn
        if meter is not None:
            if meter.load:
                busy += LOAD_FACTOR * self._load(meter, now)
            if meter.plan == plan:
                short, long = meter.short.worth or short, meter.long.worth or long
        week = hours = 0.0
        room = inf
        for is_long, share, ends_at, seconds in sheet.slices:
            ahead = (ends_at - now) / seconds
            pressure = share / ahead if 0.0 < ahead < 1.0 else share
            # Twice an even pace is one better, half of it one worse.
            score = log2(pressure) if pressure > _LEAST else -CLIP
            if score > CLIP:
                score = CLIP
            if is_long:
                # Where the time to the reset counts by itself, it counts that much less against what is left.
                week = (WEEK_UP - self._soon if score > 0.0 else WEEK_DOWN) * score
                if self._soon and share > 0.0 and ahead < 1.0:
                    week -= self._soon * log2(ahead if ahead > SOONEST else SOONEST)
                size = share * 100.0 * long
            else:
                hours = HOURS_FACTOR * score
                size = share * 100.0 * short
            if size < room:
                room = size
        start = sheet.start if in_flight == 0 else 0.0
        need = turn * NEED_TURNS + busy
        least = turn / 4
        tight = -ROOM_FACTOR * log2(1.0 + need / (room if room > least else least))
        return week + hours + tight + start, week, hours, tight, start

    # -- looking ahead --------------------------------------------------------------------

    def _look_ahead(self, count: int, now: float) -> None:
        """Have a frame that holds now; a new one where the old one has cost as much as making one."""
        frame = self._frame
        if frame.is_over or now < frame.since or frame.looks > max(_LOOKS_OF_A_FRAME * count, 100):
            self._frame = Frame(now, self._turn, dict(self._worth))
            self._drift = None

    def _drifted(self) -> Drift:
        """Return how far things are from the frame; found again while nothing was learned."""
        if self._drift is None:
            percents = {
                (plan, is_long): self._worth[plan][is_long] / worth[is_long]
                for plan, worth in self._frame.worth.items()
                for is_long in (False, True)
            }
            self._drift = Drift(self._turn / self._frame.turn, percents)
        return self._drift

    def _ends_frame(self) -> None:
        """End the frame when what it holds for constant has changed too much, or was not known in it."""
        frame = self._frame
        if not frame.turn / MOST_CHANGE < self._turn < frame.turn * MOST_CHANGE:
            frame.is_over = True

    def _ends_worth(self, plan: str | None, is_long: bool) -> None:
        """The same of what a percent is worth."""
        was = self._frame.worth.get(plan, _TYPICAL)[is_long]
        if (
            plan not in self._frame.worth
            or not was / MOST_CHANGE < self._worth[plan][is_long] < was * MOST_CHANGE
        ):
            self._frame.is_over = True

    def _ceiling(self, account: Account, now: float, family: str | None) -> Ceiling:
        """Return what an account's score is at most in the frame, and how fast it can rise."""
        sheet = self._sheet(account, family, now)
        in_flight = account.in_flight
        if not sheet.slices:
            return Ceiling(0.0, EXPLORE if in_flight == 0 else -float(in_flight), alike=in_flight)
        frame = self._frame
        meter, plan = self._meters.get(account.credential.key), account.quota.plan
        short, long = frame.worth.get(plan, _TYPICAL)
        own_short: float | None = None
        own_long: float | None = None
        load = 0.0
        if meter is not None:
            if meter.load:
                load = LOAD_FACTOR * self._load(meter, now)
            if meter.plan == plan:
                own_short, own_long = meter.short.worth, meter.long.worth
                short, long = own_short or short, own_long or long
        week = hours = rate = 0.0
        room = until = inf
        units: tuple[Unit, ...] = ()
        for is_long, share, ends_at, seconds in sheet.slices:
            left = ends_at - now
            ahead = left / seconds
            pressure = share / ahead if 0.0 < ahead < 1.0 else share
            score = log2(pressure) if pressure > _LEAST else -CLIP
            counts = WEEK_UP - self._soon if is_long else HOURS_FACTOR
            soon = 0.0
            if is_long and self._soon and share > 0.0 and ahead < 1.0:
                soon = -log2(ahead if ahead > SOONEST else SOONEST)
            if share > 0.0 and ends_at < inf:
                # It rises the faster, the nearer its end is, until it is as pressing, or as soon, as one can be; asked
                # again when half of the time has passed, or nearly so, rounded to what stays the same meanwhile.
                half = 2.0 ** (frexp(left * 0.999)[1] - 1)
                pressing = seconds * share / 2.0**CLIP if score < CLIP else inf
                soonest = seconds * SOONEST if is_long and self._soon and ahead > SOONEST else inf
                if half > min(pressing, soonest):
                    until = min(until, ends_at - half)
                steepest = 0.0
                if pressing < inf:
                    up = counts if not is_long or share * seconds > half else WEEK_DOWN
                    steepest += up / (LN2 * max(half, pressing))
                if soonest < inf:
                    steepest += self._soon / (LN2 * max(half, soonest))
                if steepest > _FASTEST:
                    score = CLIP if pressing < inf else score
                    soon = -log2(SOONEST) if soonest < inf else soon
                else:
                    rate += steepest
            score = min(score, CLIP)
            if is_long:
                week = (counts if score > 0.0 else WEEK_DOWN) * score + self._soon * soon
                units += (OWN,) if own_long else ((plan, True),)
                room = min(room, share * 100.0 * long)
            else:
                hours = HOURS_FACTOR * score
                units += (OWN,) if own_short else ((plan, False),)
                room = min(room, share * 100.0 * short)
        start = sheet.start if in_flight == 0 else 0.0
        # Without a load that fades, two of the same numbers score alike.
        alike = (sheet.slices, in_flight, plan, short, long) if not load else None
        if room < frame.turn:
            return Ceiling(week + hours + _NO_ROOM, start, rate=rate, until=until)
        turns = frame.turn * (NEED_TURNS + in_flight)
        whole = room + turns + load
        if load:
            rate += min(1.0, load / whole * MOST_CHANGE**3) * ROOM_FACTOR / (LN2 * LOAD_SECONDS)
        value = week + hours + ROOM_FACTOR * log2(room / whole)
        return Ceiling(value, start, units, turns / whole, load / whole, rate, until, alike)

    def _look_around(self, now: float) -> None:
        """Find out once a minute what a halving of the time to a reset counts; another value is another frame."""
        if not 0.0 <= now - self._soon_at <= LOOK_SECONDS:
            soon, self._soon_at = WEEK_SOON * self._plenty(now), now
            if soon != self._soon:
                self._soon = soon
                self._frame.is_over = True

    def _plenty(self, now: float) -> float:
        """Return how far the weeks of all accounts together are ahead of an even pace: 0 behind, 1 plenty.

        Then little is lost when one account is spent before the others, and much when its week ends
        with something left; behind it every account is needed for what is asked at once.
        """
        left = pace = 0.0
        for meter in self._meters.values():
            gauge = meter.long
            if gauge.percent < 0.0:
                continue
            unit = self._unit(meter, meter.plan, is_long=True)
            ahead = (gauge.resets_at - now) / WEEK_SECONDS
            if ahead <= 0.0:
                left, pace = left + unit, pace + unit
            else:
                left += unit * max(0.0, 1.0 - gauge.percent / 100.0)
                pace += unit * min(1.0, ahead)
        if not pace > 0.0:
            return 0.0
        return min(1.0, max(0.0, (left / pace - PLENTY_FROM) / PLENTY_SPAN))

    # -- learning -------------------------------------------------------------------------

    def spent(self, account: Account, cost: float, now: float) -> None:
        if not cost > 0.0:
            return
        cost = min(cost, MOST_OF_A_TURN)
        meter = self._meter(account)
        self._turn += 0.02 * (cost - self._turn)
        self._drift = None
        self._ends_frame()
        meter.load = self._load(meter, now) + cost
        meter.load_at = now
        account.stir()
        limit = account.quota.families.get(MAIN_FAMILY)
        if limit is None:
            return
        # An answer's numbers were told before its own tokens were counted.
        hours, days = limit.classes()
        for is_long, window, gauge in ((False, hours, meter.short), (True, days, meter.long)):
            if window is None:
                continue
            learned = gauge.read(window)
            gauge.cost += cost
            if learned is not None:
                unit = (meter.plan, is_long)
                costs, percents = self._plans.get(unit, (0.0, 0.0))
                costs, percents = self._plans[unit] = _faded(costs + learned[1], percents + learned[0])
                if percents >= _ENOUGH:
                    short, long = self._worth.get(meter.plan, _TYPICAL)
                    worth = costs / percents
                    self._worth[meter.plan] = (short, worth) if is_long else (worth, long)
                    self._ends_worth(meter.plan, is_long)

    def forget(self, key: str) -> None:
        self._meters.pop(key, None)
        for sheets in self._sheets.values():
            sheets.pop(key, None)

    def _meter(self, account: Account) -> _Meter:
        meter = self._meters.get(account.key)
        if meter is None or meter.plan != account.quota.plan:
            # Another plan has other windows.
            meter = self._meters[account.key] = _Meter(account.quota.plan)
        return meter

    def _load(self, meter: _Meter, now: float) -> float:
        age = now - meter.load_at
        if age <= 0.0:
            return meter.load
        return meter.load * exp(-age / LOAD_SECONDS) if age < 10 * LOAD_SECONDS else 0.0

    def _unit(self, meter: _Meter | None, plan: str | None, is_long: bool) -> float:
        """Return what a percent is worth: on this account, else on its plan, else what is usual."""
        own = None
        if meter is not None and meter.plan == plan:
            own = (meter.long if is_long else meter.short).worth
        return own if own is not None else self._worth.get(plan, _TYPICAL)[is_long]


_TYPICAL = (TYPICAL_PERCENT, TYPICAL_PERCENT * WEEKS_HOURS)
"""Where nothing of a plan has been learned: of the short window, of the long one."""

_NEVER = (0.0, -inf)


def _read(limit: Family | None, now: float, load_at: float) -> _Sheet:
    """Read an account's windows as they are now; *load_at* says when a turn of its own ended last."""
    if limit is None:
        return _Sheet(None, None, None, False, -inf, inf, inf, (), 0.0)
    slices: list[_Slice] = []
    start, until, known_until = 0.0, inf, inf
    for window, is_first in ((limit.primary, True), (limit.secondary, False)):
        if window is None:
            continue
        minutes = window.minutes
        if minutes is None or minutes <= 0:
            is_long = not is_first
            minutes = 10_080 if is_long else 300
        else:
            is_long = minutes > SHORT_MINUTES
        if window.resets_at is None:
            # Its end moves with every answer that tells the same of it.
            until = -inf
        is_over = window.is_over(now)
        is_untouched = window.is_untouched
        if is_untouched:
            # A turn of its own may have begun it since.
            known_until = load_at
        if is_over or (is_untouched and load_at <= window.seen_at):
            # Its next one begins with its next request: as good as full, but nobody has said so.
            slices.append((is_long, 1.0, inf, 1.0))
            start += START_WEEK if is_long else START_HOURS
            if not is_over:
                until = min(until, window.ends_at)
            elif now < window.ends_at:
                # Seen by a clock that was ahead.
                until = min(until, window.seen_at - MAX_LATE_SECONDS)
            continue
        share = 1.0 - window.used_percent / 100.0
        if limit.is_blocked or not share > 0.0:
            share = 0.0
        slices.append((is_long, min(share, 1.0), window.ends_at, minutes * 60.0))
        until = min(until, window.ends_at)
    return _Sheet(
        limit, limit.primary, limit.secondary, limit.is_blocked, now, until, known_until, tuple(slices), start
    )


STRATEGIES: dict[str, Callable[[], Strategy]] = {
    "horizon": Horizon,
    "quota-balance": QuotaBalance,
    "round-robin": RoundRobin,
    "fill-first": FillFirst,
    "weighted": Weighted,
}
"""By the names that the setting `strategy` takes."""


def make_strategy(name: str) -> Strategy:
    """Return a new strategy of that name."""
    return STRATEGIES[name]()
