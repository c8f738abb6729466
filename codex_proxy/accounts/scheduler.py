"""Which of the accounts that could serve does: pure strategies behind one interface.

The pool has already left out who cannot serve (state, model, concurrency, a worse priority), and
has followed the bonds that leave no choice (compacted history, a turn's state). A strategy sees
what the daemon sees: whole percents, their age, resets; never the future.

`docs/scheduling.md` says in plain words how each decides, with figures.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import exp, inf, log2
from typing import Protocol

from codex_proxy.accounts.account import Account
from codex_proxy.accounts.quota import MAIN_FAMILY, SHORT_MINUTES, Window

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


@dataclass(slots=True, frozen=True)
class Ask:
    """What a strategy needs to know of a request."""

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


@dataclass(slots=True, frozen=True)
class Choice:
    """An account, and why."""

    account: Account
    rule: str
    scores: Sequence[Score] = ()
    """Of every account that was compared, in any order; empty when none were."""


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
        """Return one of *accounts*, which is never empty."""
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
        best_rank: tuple[float, int, int] | None = None
        count = len(accounts)
        for index, account in enumerate(accounts):
            left = account.left(now, ask.family)
            # Whole percents: the backend reports no finer, and a tie must be a tie. What is no
            # number is as good as unknown.
            rank = (
                -round(left if left is not None and -inf < left < inf else UNKNOWN_LEFT),
                account.in_flight,
                (index - self._turn) % count,
            )
            if best_rank is None or rank < best_rank:
                best, best_rank = account, rank
        return Choice(best, "most quota left")


class RoundRobin(_Sticky):
    """Take the account whose last turn to be chosen is longest ago."""

    name = "round-robin"

    def __init__(self) -> None:
        self._turn = 0
        self._chosen: dict[str, int] = {}

    def choose(self, accounts: Sequence[Account], ask: Ask, now: float) -> Choice:
        # By when it was chosen, not by place: then candidates may come and go, and one that
        # rested is owed one turn, not all that it missed.
        best = min(accounts, key=lambda account: (self._chosen.get(account.key, 0), account.key))
        self._turn += 1
        self._chosen[best.key] = self._turn
        return Choice(best, "its turn")

    def forget(self, key: str) -> None:
        self._chosen.pop(key, None)


class FillFirst(_Sticky):
    """Take one account until it is used up, then the next; always in the same order."""

    name = "fill-first"

    def choose(self, accounts: Sequence[Account], ask: Ask, now: float) -> Choice:
        # An account that its numbers call used up comes last: the backend will say the same.
        best = min(accounts, key=lambda account: (_is_used_up(account, ask.family, now), account.key))
        return Choice(best, "first that is not used up")


class Weighted(_Sticky):
    """Give each account the share of the choices that its file's `weight` says, evenly mixed."""

    name = "weighted"

    def __init__(self) -> None:
        self._owed: dict[str, float] = {}

    def choose(self, accounts: Sequence[Account], ask: Ask, now: float) -> Choice:
        # Each is owed its weight at every choice, and who is chosen has paid for all: a weight of
        # 5 against 1 and 1 gives a a b a c a a, not a a a a a b c.
        weights = [_weight(account) for account in accounts]
        if not any(weights):
            weights = [1.0] * len(accounts)
        best, most = accounts[0], -inf
        for account, weight in zip(accounts, weights, strict=True):
            owed = self._owed.get(account.key, 0.0) + weight
            self._owed[account.key] = owed
            # One of weight 0 serves only while there is no other.
            if weight and owed > most:
                best, most = account, owed
        self._owed[best.key] -= sum(weights)
        return Choice(best, "its share")

    def forget(self, key: str) -> None:
        self._owed.pop(key, None)


def _is_used_up(account: Account, family: str | None, now: float) -> bool:
    left = account.left(now, family)
    return left is not None and left <= 0.0


def _weight(account: Account) -> float:
    weight = account.credential.weight
    return weight if 0.0 < weight < inf else 0.0


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
START_WEEK = 8.0
"""A weekly window begins with its first use: the sooner, the sooner there is another."""
START_HOURS = 0.5
EXPLORE = 8.0
"""Quota that nobody has seen is looked at first: a turn shows it, and begins its windows."""
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


class Horizon:
    """Spend first what expires first, where there is room, and move a conversation only when that pays.

    Every account gets a score: the binary logarithm of how cheap its quota is. Compared with an
    even pace to its reset, quota of which twice as much is left is half as dear. An account that
    has little room, or much to do, is dearer; so is one that would have to read the conversation
    anew.
    """

    name = "horizon"

    def __init__(self) -> None:
        self._meters: dict[str, _Meter] = {}
        self._plans: dict[tuple[str | None, bool], tuple[float, float]] = {}
        """What percents of the long (True) and short windows of a plan have cost: costs, percents."""
        self._turn = TYPICAL_TURN
        self._best: dict[str | None, tuple[float, float]] = {}
        """The best score of the last comparison, and when that was, by family."""
        self._round = 0

    # -- deciding -------------------------------------------------------------------------

    def stays(self, ask: Ask, now: float) -> str | None:
        if ask.home is None:
            return None
        best, seen_at = self._best.get(ask.family, (0.0, -inf))
        if not 0.0 <= now - seen_at <= LOOK_SECONDS:
            return None
        value, _, _, _, start = self._weigh(ask.home, ask.family, now)
        moving = self._price_of_moving(ask)
        if moving <= START_PRICE:
            return None
        return "conversation" if value - start + moving >= best else None

    def choose(self, accounts: Sequence[Account], ask: Ask, now: float) -> Choice:
        home = ask.home
        self._round += 1
        count = len(accounts)
        turn = self._round % count
        moving = self._price_of_moving(ask) if home is not None else 0.0
        # A window is begun, and an account explored, by a conversation that has nothing to lose.
        may_start = moving <= START_PRICE
        weigh = self._weigh
        scores: list[Score] = []
        best, most, top = accounts[0], -inf, -inf
        # From another one each time, so that equals take turns.
        for index in range(-turn, count - turn):
            account = accounts[index]
            value, week, hours, room, start = weigh(account, ask.family, now)
            top = max(top, value - start)
            if start > 0.0 and not may_start:
                value -= start
                start = 0.0
            if account is home:
                value += moving
                parts: tuple[tuple[str, float], ...] = (
                    ("week", week),
                    ("hours", hours),
                    ("room", room),
                    ("start", start),
                    ("cache", moving),
                )
            else:
                parts = (("week", week), ("hours", hours), ("room", room), ("start", start))
            scores.append(Score(account, value, parts))
            if value > most:
                best, most = account, value
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

    def _weigh(
        self, account: Account, family: str | None, now: float
    ) -> tuple[float, float, float, float, float]:
        """Return an account's score and its parts: week, hours, room, start."""
        # This runs for every account of a comparison, so it asks nothing twice and calls little.
        families = account.quota.families
        limit = families.get(family) if family is not None else None
        if limit is None or (limit.primary is None and limit.secondary is None):
            limit = families.get(MAIN_FAMILY)
        in_flight = account.in_flight
        if limit is None or (limit.primary is None and limit.secondary is None):
            # One request finds out; until it has, the next one takes another.
            start = EXPLORE if in_flight == 0 else -float(in_flight)
            return start, 0.0, 0.0, 0.0, start
        meter = self._meters.get(account.key)
        plan = account.quota.plan
        busy = in_flight * self._turn
        if meter is not None:
            busy += LOAD_FACTOR * self._load(meter, now)
        week = hours = start = 0.0
        room = inf
        for window, is_first in ((limit.primary, True), (limit.secondary, False)):
            if window is None:
                continue
            minutes = window.minutes
            if minutes is None or minutes <= 0:
                is_long = not is_first
                minutes = 10_080 if is_long else 300
            else:
                is_long = minutes > SHORT_MINUTES
            if window.is_over(now):
                # Its next one begins with its next request: as good as full, but nobody has said so.
                share = pressure = 1.0
                if in_flight == 0:
                    start += START_WEEK if is_long else START_HOURS
            else:
                share = 1.0 - window.used_percent / 100.0
                if limit.is_blocked or not share > 0.0:
                    share = 0.0
                share = min(share, 1.0)
                ahead = (window.ends_at - now) / (minutes * 60.0)
                pressure = share / ahead if 0.0 < ahead < 1.0 else share
            # Twice an even pace is one better, half of it one worse.
            score = log2(pressure) if pressure > _LEAST else -CLIP
            score = min(score, CLIP)
            if is_long:
                week = (WEEK_UP if score > 0.0 else WEEK_DOWN) * score
            else:
                hours = HOURS_FACTOR * score
            room = min(room, share * 100.0 * self._unit(meter, plan, is_long))
        need = self._turn * NEED_TURNS + busy
        tight = -ROOM_FACTOR * log2(1.0 + need / max(room, self._turn / 4))
        return week + hours + tight + start, week, hours, tight, start

    # -- learning -------------------------------------------------------------------------

    def spent(self, account: Account, cost: float, now: float) -> None:
        if not cost > 0.0:
            return
        cost = min(cost, MOST_OF_A_TURN)
        meter = self._meter(account)
        self._turn += 0.02 * (cost - self._turn)
        meter.load = self._load(meter, now) + cost
        meter.load_at = now
        limit = account.quota.families.get(MAIN_FAMILY)
        if limit is None:
            return
        # An answer's numbers were told before its own tokens were counted.
        for is_long, window, gauge in ((False, limit.short, meter.short), (True, limit.long, meter.long)):
            if window is None:
                continue
            learned = gauge.read(window)
            gauge.cost += cost
            if learned is not None:
                costs, percents = self._plans.get((meter.plan, is_long), (0.0, 0.0))
                self._plans[meter.plan, is_long] = _faded(costs + learned[1], percents + learned[0])

    def forget(self, key: str) -> None:
        self._meters.pop(key, None)

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
        if meter is not None and meter.plan == plan:
            gauge = meter.long if is_long else meter.short
            if gauge.percents >= 3.0:
                return gauge.costs / gauge.percents
        costs, percents = self._plans.get((plan, is_long), (0.0, 0.0))
        if percents >= 3.0:
            return costs / percents
        return TYPICAL_PERCENT * WEEKS_HOURS if is_long else TYPICAL_PERCENT


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
