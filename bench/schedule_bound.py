"""How much of a trace could be served at most, by somebody who knew it all beforehand.

`upper_bound` is the optimum of a linear program that relaxes the real problem: nothing that a strategy can do
is forbidden in it, so no strategy can serve more. What it relaxes:

- Turns may be split among accounts, and every turn costs its ideal cost: no conversation ever moves.
- Windows may begin in fractions: half a window now and half a window in three hours.
- Time is in slots of an hour. A window of hours covers one slot more than its length, because it may begin and
  end in the middle of one. Weekly windows begin in blocks of up to 12 hours (of one hour where one is likely to
  begin) and cover all that one that begins anywhere in its block can reach.
- Nothing fails.

`best_of` is the real optimum of a small instance, by search over every assignment of its turns.
"""

import itertools
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from scipy.optimize import linprog
from scipy.sparse import coo_matrix

from bench.schedule_world import (
    CACHE_LIFE,
    DAY,
    HOUR,
    LONG_LENGTH,
    MINUTE,
    SHORT_LENGTH,
    Caches,
    Life,
    Server,
    Trace,
    Turn,
    cached_of,
    make_server,
)
from codex_proxy.accounts.scheduler import cost_of

SLOT = HOUR
BLOCK = 12 * HOUR


class _Program:
    """A linear program in the making: maximize, variables from 0, rows `<=`."""

    def __init__(self) -> None:
        self.gains: list[float] = []
        self.rows: list[int] = []
        self.columns: list[int] = []
        self.values: list[float] = []
        self.limits: list[float] = []

    def variable(self, gain: float = 0.0) -> int:
        self.gains.append(gain)
        return len(self.gains) - 1

    def row(self, limit: float) -> int:
        self.limits.append(limit)
        return len(self.limits) - 1

    def put(self, row: int, column: int, value: float) -> None:
        self.rows.append(row)
        self.columns.append(column)
        self.values.append(value)

    def solve(self) -> float:
        """Return the greatest gain."""
        shape = (len(self.limits), len(self.gains))
        matrix = coo_matrix((self.values, (self.rows, self.columns)), shape=shape).tocsr()
        found = linprog(-np.array(self.gains), A_ub=matrix, b_ub=np.array(self.limits), method="highs-ipm")
        if found.status != 0:
            raise RuntimeError(f"the bound was not found: {found.message}")
        return -float(found.fun)


def upper_bound(trace: Trace, load: float) -> float:
    """Return what share of the demand could be served at most."""
    slots = math.ceil(trace.days * DAY / SLOT)
    demand = [0.0] * (slots + 1)
    for turn in trace.turns:
        demand[int(turn.at // SLOT)] += turn.ideal
    # In weekly quotas of plus, so that the solver sees numbers near 1.
    week = trace.week_of_plus(load)
    program = _Program()
    asked = [program.row(amount / week) for amount in demand]
    for life in trace.lives:
        server = make_server(life, 1.0)
        _add(program, server, life.begins, life.ends, asked)
    return min(1.0, program.solve() * week / trace.demand)


def _add(program: _Program, server: Server, begins: float, ends: float, asked: list[int]) -> None:
    """Add one account's life to the program."""
    first, last = int(begins // SLOT), min(int(ends // SLOT), len(asked) - 1)
    long, short = server.long, server.short
    fresh = first if long.begun is None else min(int(long.ends() // SLOT), last)
    blocks = _blocks(first, fresh, last + 1)
    # What flows in a block out of weekly windows bounds what is served in it.
    balance = [program.row(0.0) for _ in blocks]
    if long.begun is not None:
        room = program.row(long.size - long.used)
        for block, row in zip(blocks, balance, strict=True):
            if block.start <= fresh:
                flow = program.variable()
                program.put(room, flow, 1.0)
                program.put(row, flow, -1.0)
    if long.begun is None or long.ends() < ends:
        starts = [block for block in blocks if block.start >= fresh]
        rows = balance[len(blocks) - len(starts) :]
        for index, flow in _windows(program, starts, int(LONG_LENGTH // SLOT), long.size):
            program.put(rows[index], flow, -1.0)
    of_slot = [row for block, row in zip(blocks, balance, strict=True) for _ in block]
    slots = [range(slot, slot + 1) for slot in range(first, last + 1)]
    flows = (
        _windows(program, slots, int(SHORT_LENGTH // SLOT), short.size)
        if short is not None
        else ((index, program.variable()) for index in range(len(slots)))
    )
    for index, flow in flows:
        program.gains[flow] = 1.0
        program.put(asked[first + index], flow, 1.0)
        program.put(of_slot[index], flow, 1.0)


def _blocks(first: int, fresh: int, end: int) -> list[range]:
    """Cut the slots of a life into blocks; finely where a weekly window ends or is likely to begin."""
    week = int(LONG_LENGTH // SLOT)
    cuts = {first, end, *range(first, end, int(BLOCK // SLOT))}
    for begin in range(fresh, end, week):
        cuts |= {begin, begin + 1}
    inside = sorted(cut for cut in cuts if first <= cut <= end)
    return [range(one, other) for one, other in itertools.pairwise(inside)]


def _windows(program: _Program, times: list[range], length: int, size: float) -> Iterator[tuple[int, int]]:
    """Add windows that may begin at any of *times*, one after another, each *length* slots long.

    Returns:
        A variable for what flows out of them, by the place of its time in *times*.
    """
    begun = [program.variable() for _ in times]
    for index, time in enumerate(times):
        # Of starts that are less than a length apart, wherever in their times they are, there is one.
        row = program.row(1.0)
        for other in range(index, -1, -1):
            if other < index and times[other].start < time.stop - length:
                break
            program.put(row, begun[other], 1.0)
        room = program.row(0.0)
        program.put(room, begun[index], -size)
        for at in range(index, len(times)):
            if times[at].start >= time.stop + length:
                break
            flow = program.variable()
            program.put(room, flow, 1.0)
            yield at, flow


# --- a small instance, exactly


@dataclass(slots=True, frozen=True)
class Small:
    """A few turns of a few conversations, and a few accounts: small enough to try everything."""

    trace: Trace
    week_of_plus: float
    load: float


def small_instance(seed: int) -> Small:
    """Make the small instance of that seed: three accounts, a dozen turns in a day and a half."""
    rng = random.Random(f"small {seed}")
    days = 1.5
    turns: list[Turn] = []
    for conversation in range(4):
        at, whole, cached = rng.uniform(0, (days - 0.3) * DAY), rng.randint(20_000, 40_000), 0
        for _ in range(3):
            output = rng.randint(500, 2_000)
            ideal = cost_of(whole, cached, output)
            turns.append(Turn(at, conversation, whole, cached, output, 20.0, ideal))
            at += rng.uniform(MINUTE, CACHE_LIFE)
            whole, cached = whole + rng.randint(2_000, 10_000), whole
    turns.sort(key=lambda turn: turn.at)
    end = days * DAY
    lives = [
        Life(0, 0.0, end, "plus", rng.uniform(0.6, 0.9), rng.uniform(0.2, 0.8) * end),
        Life(1, 0.0, end, "plus", rng.uniform(0.8, 0.95), rng.uniform(1.0, 3.0) * end),
        Life(2, 0.0, end, "free"),
    ]
    trace = Trace(seed, days, turns, lives, [], sum(turn.ideal for turn in turns))
    # Of what a day and a half has of a week, most is there at once.
    load = rng.uniform(1.2, 2.4)
    return Small(trace, trace.week_of_plus(load), load)


def best_of(small: Small) -> float:
    """Return what share of a small instance the best of all assignments serves, moves and all."""
    turns = small.trace.turns
    rest = [0.0]
    for turn in reversed(turns):
        rest.append(rest[-1] + turn.ideal)
    rest.reverse()
    servers = [make_server(life, small.week_of_plus) for life in small.trace.lives]
    best = 0.0

    def search(index: int, served: float, caches: Caches) -> None:
        nonlocal best
        best = max(best, served)
        if index == len(turns) or served + rest[index] <= best:
            return
        turn = turns[index]
        for number, server in enumerate(servers):
            limits = server.limits()
            before = [(limit.begun, limit.used) for limit in limits]
            for limit in limits:
                limit.roll(turn.at, 0.0)
            if server.full_until() is None:
                cost = cost_of(turn.input, cached_of(turn, caches, number), turn.output)
                paid = server.book(turn.at, cost, 0.0)
                known = {**caches.get(turn.conversation, {}), number: (turn.at, turn.input)}
                search(index + 1, served + paid * turn.ideal, {**caches, turn.conversation: known})
            for limit, (begun, used) in zip(limits, before, strict=True):
                limit.begun, limit.used = begun, used
        search(index + 1, served, caches)

    search(0, 0.0, {})
    return best / small.trace.demand
