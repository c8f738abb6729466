"""The world in which `bench/schedule.py` tries the strategies: what is asked, and a backend that counts quota.

Everything that is random is in the trace, which is made from a seed before any strategy runs: who asks
what when, how many tokens that is, which accounts there are, when which of them fails or is reset. The
strategies meet it through the real pool, on a clock that the simulation moves.
"""

import heapq
import json
import math
import random
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from codex_proxy.accounts.account import Account
from codex_proxy.accounts.pool import Lease, Pool, Want
from codex_proxy.accounts.scheduler import Strategy, cost_of
from codex_proxy.accounts.state import State
from codex_proxy.accounts.store import Credential, Scan
from codex_proxy.accounts.tokens import NO_SECRET, Identity, Secret
from codex_proxy.errors import PoolError, UpstreamError, Verdict
from codex_proxy.upstream.backend import refusal

MINUTE = 60.0
HOUR = 3_600.0
DAY = 86_400.0
START = 1_800_000_000.0

SHORT_LENGTH = 5 * HOUR
LONG_LENGTH = 7 * DAY
CACHE_LIFE = HOUR
"""How long a conversation's beginning stays in its account's prompt cache after a turn."""

DAYS = 14
TURNS = 10_000
MODEL = "gpt-5"

WEEK_IN_HOURS_WINDOWS = 4.0
"""A week's quota is that many times the quota of five hours: the weekly window is what runs out."""

PLANS: dict[str, tuple[float, bool]] = {
    "plus": (1.0, True),
    "prolite": (2.0, True),
    "pro": (4.0, True),
    "free": (0.3, False),
}
"""By plan: its weekly quota against that of plus, and whether it has a window of hours beside it."""

MAX_RETRIES = 3
CHECK_SECONDS = 5 * MINUTE
"""How often a resting account is asked for its quota, as upkeep does."""


# --- what is asked


@dataclass(slots=True, frozen=True)
class Turn:
    """One request, the same for every strategy."""

    at: float
    """Seconds since the trace began."""
    conversation: int
    input: int
    prefix: int
    """How much of the input the turn before it has left in the cache, if that was on the same account."""
    output: int
    seconds: float
    ideal: float
    """What it costs if its conversation never moved: the unit in which demand is counted."""


@dataclass(slots=True, frozen=True)
class Life:
    """An account from one forced reset to the next: for the bound, each is an account of its own."""

    account: int
    begins: float
    ends: float
    plan: str
    used: float = 0.0
    """Of its weekly window at the begin, as a share; 0 where the window has not begun."""
    resets_at: float | None = None
    """When the weekly window it begins with ends; None: it starts with the first use."""


@dataclass(slots=True, frozen=True)
class Incident:
    """A time in which an account's requests often fail."""

    account: int
    begins: float
    ends: float
    share: float
    kind: str
    """`server` or `rate`."""


@dataclass(slots=True)
class Trace:
    """All that will happen, but for what a strategy decides."""

    seed: int
    days: float
    turns: list[Turn]
    lives: list[Life]
    incidents: list[Incident]
    demand: float

    def weeks(self) -> float:
        """Return how many weekly quotas of plus there are in the whole trace, if no window ever stands still."""
        total = 0.0
        for life in self.lives:
            size, _ = PLANS[life.plan]
            fresh_from = life.begins if life.resets_at is None else min(life.resets_at, life.ends)
            if life.resets_at is not None:
                total += size * (1.0 - life.used)
            total += size * max(0.0, life.ends - fresh_from) / LONG_LENGTH
        return total

    def week_of_plus(self, load: float) -> float:
        """Return plus's weekly quota at which the demand is *load* times what all accounts have."""
        return self.demand / (load * self.weeks())


def make_trace(seed: int, *, days: float = DAYS, turns: int = TURNS) -> Trace:
    """Make the trace of that seed."""
    rng = random.Random(f"schedule {seed}")
    asked = _conversations(rng, days, turns)
    lives = _lives(rng, days)
    count = max(life.account for life in lives) + 1
    incidents = [
        Incident(
            rng.randrange(count),
            begins := rng.uniform(0, days * DAY),
            begins + rng.uniform(2 * MINUTE, 20 * MINUTE),
            rng.uniform(0.3, 0.9),
            rng.choice(["server", "rate"]),
        )
        for _ in range(int(days * 0.75))
    ]
    return Trace(seed, days, asked, lives, incidents, sum(turn.ideal for turn in asked))


def _lives(rng: random.Random, days: float) -> list[Life]:
    plans = ["plus"] * rng.randint(3, 4) + ["prolite"] + ["free"] * rng.randint(1, 2)
    if rng.random() < 0.5:
        plans[0] = "pro"
    end = days * DAY
    lives: list[Life] = []
    for index, plan in enumerate(plans):
        resets_at: float | None = rng.uniform(0.05, 0.98) * LONG_LENGTH
        assert resets_at is not None
        # Used about as far as its week is, give or take.
        used = min(0.95, max(0.0, (1 - resets_at / LONG_LENGTH) * rng.uniform(0.3, 1.2)))
        if rng.random() < 0.15:
            used, resets_at = 0.0, None
        begins = 0.0
        if rng.random() < 0.04:
            # The backend resets it early, or its owner changes the plan.
            at = rng.uniform(0.1, 0.9) * end
            lives.append(Life(index, 0.0, at, plan, used, resets_at))
            begins, used, resets_at = at, 0.0, None
            if rng.random() < 0.5:
                plan = "prolite" if plan != "prolite" else "plus"
        lives.append(Life(index, begins, end, plan, used, resets_at))
    return lives


def _conversations(rng: random.Random, days: float, count: int) -> list[Turn]:
    """Make conversations until there are about *count* turns, begun as often as each hour is busy."""
    rate = _busyness(rng, days)
    top = max(rate)
    starts: list[float] = []
    length = 25.0
    while len(starts) < count / length:
        at = rng.uniform(0, days * DAY)
        if rng.random() * top > rate[int(at // HOUR)]:
            continue
        starts.append(at)
        if rng.random() < 0.06:
            # Somebody fans out: many at once.
            starts += [at + rng.uniform(0, 15 * MINUTE) for _ in range(rng.randint(3, 8))]
    turns: list[Turn] = []
    for conversation, at in enumerate(sorted(starts)):
        turns += _conversation(rng, conversation, at, days * DAY, length)
    turns.sort(key=lambda turn: turn.at)
    return turns


def _busyness(rng: random.Random, days: float) -> list[float]:
    hours = int(days * 24)
    rate: list[float] = []
    shift = rng.randrange(7)
    for hour in range(hours):
        day, of_day = divmod(hour, 24)
        daily = 0.15 + math.exp(-(((of_day - 14) / 4.0) ** 2))
        weekly = 0.3 if (day + shift) % 7 >= 5 else 1.0
        rate.append(daily * weekly)
    for _ in range(rng.randint(2, 4)):
        # A deadline somewhere: up to two days busier than usual.
        begin, lasts, times = rng.randrange(hours), rng.randint(6, 48), rng.uniform(1.3, 2.2)
        for hour in range(begin, min(hours, begin + lasts)):
            rate[hour] *= times
    return rate


def _conversation(
    rng: random.Random, conversation: int, at: float, end: float, length: float
) -> Iterator[Turn]:
    context = rng.randint(8_000, 20_000)
    cached, last = 0, -math.inf
    for _ in range(1 + int(rng.expovariate(1.0 / length))):
        if at >= end:
            return
        added = min(20_000, int(rng.lognormvariate(7.6, 0.9)))
        output = min(4_000, 50 + int(rng.lognormvariate(5.8, 0.8)))
        whole = context + added
        prefix = cached if at - last <= CACHE_LIFE else 0
        seconds = 2.0 + output / 60.0
        yield Turn(at, conversation, whole, cached, output, seconds, cost_of(whole, prefix, output))
        last, cached = at, whole
        context = whole + output
        if context > 120_000:
            # The client compacts: what follows begins anew.
            context, cached = 15_000, 0
        pause = rng.lognormvariate(3.2, 0.8)
        if rng.random() < 0.05:
            pause = rng.uniform(5 * MINUTE, 2 * HOUR)
        at += seconds + pause


# --- the backend


@dataclass(slots=True)
class Limit:
    """A window as the backend counts it: it starts with the first use, and is gone after its length."""

    length: float
    size: float
    begun: float | None = None
    used: float = 0.0
    spilt: float = 0.0
    """Unused when its windows ended while demand was refused meanwhile."""
    refused_at_begin: float = 0.0

    def ends(self) -> float:
        return self.begun + self.length if self.begun is not None else math.inf

    def roll(self, now: float, refused: float) -> None:
        """Forget a window that is over."""
        if self.begun is not None and now >= self.begun + self.length:
            self.close(refused)

    def close(self, refused: float) -> None:
        self.spilt += min(self.size - self.used, refused - self.refused_at_begin)
        self.begun, self.used = None, 0.0

    def begin(self, now: float, refused: float) -> None:
        if self.begun is None:
            self.begun, self.used, self.refused_at_begin = now, 0.0, refused


@dataclass(slots=True)
class Server:
    """One account, at the backend."""

    plan: str
    long: Limit
    short: Limit | None

    def limits(self) -> tuple[Limit, ...]:
        return (self.long,) if self.short is None else (self.short, self.long)

    def full_until(self) -> float | None:
        """Return when the last window that is used up ends; None: it can serve."""
        ends = [limit.ends() for limit in self.limits() if limit.used >= limit.size]
        return max(ends) if ends else None

    def book(self, now: float, cost: float, refused: float) -> float:
        """Charge a turn to every window, which begins with it if it has not; return the share that they could pay."""
        paid = 1.0
        for limit in self.limits():
            limit.begin(now, refused)
            paid = min(paid, (limit.size - limit.used) / cost)
        for limit in self.limits():
            # Full is full: what rounding leaves is no quota.
            limit.used = limit.size if limit.used + cost > limit.size * (1 - 1e-9) else limit.used + cost
        return paid

    def headers(self, now: float) -> dict[str, str]:
        """Say how much is used, in whole percents, as the backend does."""
        headers = {"x-codex-plan-type": self.plan, "x-codex-active-limit": "codex"}
        limits = self.limits()
        for place, limit in zip(("primary", "secondary"), limits, strict=False):
            resets_at = limit.ends() if limit.begun is not None else now + limit.length
            prefix = f"x-codex-{place}-"
            headers[prefix + "used-percent"] = str(min(100, int(100 * limit.used / limit.size)))
            headers[prefix + "window-minutes"] = str(int(limit.length / 60))
            headers[prefix + "reset-at"] = str(math.ceil(START + resets_at))
        if len(limits) == 1:
            headers["x-codex-secondary-used-percent"] = "0"
        return headers


def make_server(life: Life, week_of_plus: float) -> Server:
    """Make the backend's side of an account's life."""
    size, has_short = PLANS[life.plan]
    week = size * week_of_plus
    long = Limit(LONG_LENGTH, week)
    if life.resets_at is not None:
        long.begun, long.used = life.resets_at - LONG_LENGTH, life.used * week
    return Server(life.plan, long, Limit(SHORT_LENGTH, week / WEEK_IN_HOURS_WINDOWS) if has_short else None)


class SimulatedClock:
    """A clock that the simulation sets; seconds since the trace began are `at`."""

    def __init__(self) -> None:
        self.at = 0.0

    def now(self) -> float:
        return START + self.at

    def monotonic(self) -> float:
        return self.at

    async def sleep(self, seconds: float) -> None:
        raise AssertionError("nobody sleeps in a simulation")


# --- a run


@dataclass(slots=True)
class Outcome:
    """What became of a trace."""

    demand: float
    served: float = 0.0
    """In ideal cost; a turn for which its window had only a part left counts in that part."""
    cost: float = 0.0
    refused: float = 0.0
    refused_turns: int = 0
    spilt: float = 0.0
    """Weekly quota that ended unused, as far as demand was refused in its time."""
    input: int = 0
    cached: int = 0
    moves: int = 0
    turns: int = 0

    @property
    def share(self) -> float:
        """The share of the demand that was served."""
        return self.served / self.demand

    @property
    def cached_share(self) -> float:
        return self.cached / max(1, self.input)


# By conversation, which servers have its beginning in their caches: since when, and how much of it.
Caches = dict[int, dict[int, tuple[float, int]]]


def cached_of(turn: Turn, caches: Caches, server: int) -> int:
    """Return how much of a turn's input is cached on *server*.

    A server knows nothing of the others: what it has read it keeps for as long as a cache lives,
    wherever the conversation goes meanwhile.
    """
    since, known = caches.get(turn.conversation, {}).get(server, (-math.inf, 0))
    return min(known, turn.prefix) if turn.at - since <= CACHE_LIFE else 0


def remember(turn: Turn, caches: Caches, server: int) -> None:
    """Note that *server* has read a turn."""
    caches.setdefault(turn.conversation, {})[server] = (turn.at, turn.input)


class World:
    """One trace, one strategy."""

    def __init__(self, trace: Trace, load: float, strategy: Strategy) -> None:
        self.trace = trace
        self.clock = SimulatedClock()
        self.week = trace.week_of_plus(load)
        # What fails is the trace's; it must not depend on how often somebody asks for a number.
        self.pool = Pool(self.clock, rng=random.Random(trace.seed), strategy=strategy)
        count = max(life.account for life in trace.lives) + 1
        first = [next(life for life in trace.lives if life.account == index) for index in range(count)]
        self.servers = [make_server(life, self.week) for life in first]
        credentials = [
            make_credential(index, PLANS[life.plan][0], life.plan) for index, life in enumerate(first)
        ]
        self.pool.apply(Scan(credentials, []))
        self.numbers = {one.key: index for index, one in enumerate(credentials)}
        self.accounts: list[Account] = []
        for one in credentials:
            account = self.pool.get(one.key)
            assert account is not None
            self.accounts.append(account)
        self.last: dict[int, int] = {}
        """By conversation: who served it last."""
        self.caches: Caches = {}
        self.outcome = Outcome(trace.demand)
        self.running: list[tuple[float, int, Lease, float]] = []
        self.tickets = 0
        self.changes = sorted((life for life in trace.lives if life.begins > 0), key=lambda life: life.begins)
        self.checked = 0.0

    def run(self) -> Outcome:
        """Play the whole trace."""
        for index, turn in enumerate(self.trace.turns):
            self._advance(turn.at)
            self._serve(turn, index)
        self._advance(self.trace.days * DAY)
        for server in self.servers:
            self.outcome.spilt += server.long.spilt
        return self.outcome

    def _advance(self, at: float) -> None:
        while True:
            done = self.running[0][0] if self.running else math.inf
            change = self.changes[0].begins if self.changes else math.inf
            check = self.checked + CHECK_SECONDS
            first = min(done, change, check)
            if first > at:
                break
            self.clock.at = first
            if first == done:
                _, _, lease, cost = heapq.heappop(self.running)
                self.pool.spent(lease.account, cost)
                lease.release()
            elif first == change:
                self._change(self.changes.pop(0))
            else:
                self.checked = check
                self._check()
        self.clock.at = at

    def _change(self, life: Life) -> None:
        old = self.servers[life.account]
        new = make_server(life, self.week)
        old.long.close(self.outcome.refused)
        new.long.spilt = old.long.spilt
        self.servers[life.account] = new

    def _check(self) -> None:
        """Ask the usage endpoint about who rests, as upkeep does."""
        for index, account in enumerate(self.accounts):
            if account.state is not State.COOLING:
                continue
            server = self._server(index)
            if server.full_until() is None:
                self.pool.read_headers(account, server.headers(self.clock.at))
                self.pool.relieve(account)

    def _server(self, index: int) -> Server:
        server = self.servers[index]
        for limit in server.limits():
            limit.roll(self.clock.at, self.outcome.refused)
        return server

    def _serve(self, turn: Turn, number: int) -> None:
        if turn.prefix == 0:
            # It begins anew, also where the client has compacted: nobody has read this beginning.
            self.caches.pop(turn.conversation, None)
        want = Want(MODEL, session=str(turn.conversation), tokens=turn.input)
        tried: list[str] = []
        faults = 0
        while faults <= MAX_RETRIES:
            try:
                lease = self.pool.pick(want, tried)
            except PoolError:
                break
            error = self._ask(lease, turn, number)
            if error is None:
                return
            tried.append(lease.account.key)
            lease.failed(error)
            lease.release()
            faults += error.verdict is not Verdict.EXHAUSTED
        self.outcome.refused += turn.ideal
        self.outcome.refused_turns += 1

    def _ask(self, lease: Lease, turn: Turn, number: int) -> UpstreamError | None:
        now = self.clock.at
        index = self.numbers[lease.account.key]
        failure = self._failure(index, number, now)
        if failure is not None:
            return failure
        server = self._server(index)
        full_until = server.full_until()
        if full_until is not None:
            headers = server.headers(now)
            self.pool.read_headers(lease.account, headers)
            return self._limit_reached(headers, server.plan, full_until)
        outcome = self.outcome
        for limit in server.limits():
            limit.begin(now, outcome.refused)
        # Its numbers go out with the first bytes, before the turn's own tokens are counted.
        self.pool.read_headers(lease.account, server.headers(now))
        if self.last.get(turn.conversation, index) != index:
            outcome.moves += 1
        cached = cached_of(turn, self.caches, index)
        cost = cost_of(turn.input, cached, turn.output)
        paid = server.book(now, cost, outcome.refused)
        outcome.served += paid * turn.ideal
        outcome.refused += (1.0 - paid) * turn.ideal
        outcome.cost += cost
        outcome.turns += 1
        outcome.input += turn.input
        outcome.cached += cached
        self.last[turn.conversation] = index
        remember(turn, self.caches, index)
        lease.ok()
        self.tickets += 1
        heapq.heappush(self.running, (now + turn.seconds, self.tickets, lease, cost))
        return None

    def _failure(self, index: int, number: int, now: float) -> UpstreamError | None:
        share, kind = 0.001, "server"
        for incident in self.trace.incidents:
            if incident.account == index and incident.begins <= now < incident.ends:
                share, kind = incident.share, incident.kind
        # The same turn meets the same luck on the same account, whoever sends it there.
        luck = zlib.crc32(b"%d %d %d" % (self.trace.seed, number, index)) / 2**32
        if luck >= share:
            return None
        if kind == "rate":
            body = b'{"error":{"code":"rate_limit_exceeded","message":"slow down"}}'
            return refusal(429, {"retry-after": "20"}, body, now=self.clock.now())
        return refusal(502, {}, b'{"error":{"message":"bad gateway"}}', now=self.clock.now())

    def _limit_reached(self, headers: dict[str, str], plan: str, until: float) -> UpstreamError:
        error = {
            "type": "usage_limit_reached",
            "message": "The usage limit has been reached",
            "plan_type": plan,
            "resets_at": math.ceil(START + until),
            "resets_in_seconds": math.ceil(until - self.clock.at),
        }
        return refusal(429, headers, json.dumps({"error": error}).encode(), now=self.clock.now())


def make_credential(index: int, weight: float, plan: str) -> Credential:
    """Make an account's file, as if it had been read."""
    path = Path(f"/nowhere/{index}.json")
    return Credential(
        path=path,
        target=path,
        shape="flat",
        raw={},
        access=Secret(f"access-{index}"),
        refresh=Secret(f"refresh-{index}"),
        id=NO_SECRET,
        expires_at=None,
        last_refresh=None,
        identity=Identity(f"user-{index}", f"account-{index}", plan=plan),
        alias=f"{plan}-{index}",
        disabled=False,
        proxy_url=None,
        weight=weight,
    )
