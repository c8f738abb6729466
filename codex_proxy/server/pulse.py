"""How it goes right now: the last ten minutes in steps of two seconds, and what is under way.

Made of finished turns, one step at a time, with a few counters and two small histograms each: no list of
samples, so a busy minute takes no more memory than a quiet one. Percentiles are read off histograms with
eight bounds to an octave, so they are right to a few percent.
"""

import math
from bisect import bisect_left
from collections import Counter, deque
from collections.abc import Callable, Mapping
from typing import Protocol

from codex_proxy import __version__
from codex_proxy.accounts.pool import Pool
from codex_proxy.clock import Clock
from codex_proxy.protocol.wire import JsonObject
from codex_proxy.server.admin import STATUSES
from codex_proxy.server.views import STATUS
from codex_proxy.tasks import Job
from codex_proxy.trace import End, Trace

STEP_SECONDS = 2.0
KEPT_SECONDS = 600.0
WINDOW_SECONDS = 60.0
"""What rates, shares and percentiles are taken over."""

_KEPT_STEPS = int(KEPT_SECONDS / STEP_SECONDS)
_WINDOW_STEPS = int(WINDOW_SECONDS / STEP_SECONDS)

LAG_SECONDS = 0.1
"""How often the loop's lag is measured: a stall of that length is always seen."""

# From a tenth of a millisecond to beyond ten minutes, eight to an octave.
_BOUNDS: tuple[float, ...] = tuple([0.0001 * 2.0 ** (step / 8) for step in range(8 * 23)])


class Work(Protocol):
    """Who knows what is under way."""

    @property
    def in_flight(self) -> int:
        """How many turns are under way."""
        ...

    @property
    def streams(self) -> int:
        """How many of them are answered as a stream."""
        ...

    @property
    def retrying(self) -> int:
        """How many of them hold a place in the retry budget."""
        ...


class LoopLag:
    """Measures how late the loop is: the one place that does, for all who want to know."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._due: float | None = None
        self._listeners: list[Callable[[float], object]] = []

    def listen(self, listener: Callable[[float], object]) -> None:
        """Have *listener* called with each measurement, in seconds."""
        self._listeners.append(listener)

    def jobs(self) -> list[Job]:
        """Return what runs by itself: the measuring."""
        return [Job("loop-lag", lambda: LAG_SECONDS, self.look)]

    async def look(self) -> None:
        """Tell how much later than it should this has been called."""
        now = self._clock.monotonic()
        if self._due is not None:
            late = max(0.0, now - self._due)
            for listener in self._listeners:
                listener(late)
        self._due = now + LAG_SECONDS


class _Step:
    """Two seconds."""

    __slots__ = ("cached", "errors", "firsts", "input", "lag_max", "lags", "number", "output", "requests")

    def __init__(self, number: int) -> None:
        self.number = number
        """Which of all steps since the monotonic clock began."""
        self.requests = 0
        self.errors = 0
        self.input = 0
        self.cached = 0
        self.output = 0
        self.lag_max = 0.0
        self.firsts: dict[int, int] = {}
        """Seconds to the first token: place among the bounds to number of turns."""
        self.lags: dict[int, int] = {}


class Pulse:
    """What the page shows of the moment, and what alerts judge by."""

    def __init__(self, pool: Pool, work: Work, *, clock: Clock) -> None:
        self._pool = pool
        self._work = work
        self._clock = clock
        self._started = clock.monotonic()
        self._offset = clock.now() - self._started
        """From the monotonic clock, in which steps are counted, to the wall clock, in which they are shown."""
        self._step = _Step(self._number())
        self._steps: deque[_Step] = deque([self._step], maxlen=_KEPT_STEPS + 1)

    def note(self, trace: Trace) -> None:
        """Count a finished turn."""
        finished = trace.finished
        if finished is None:
            return
        step, number = self._step, int(finished / STEP_SECONDS)
        if number > step.number:
            step = self._begin(number)
        step.requests += 1
        usage = trace.usage
        step.input += usage.input_tokens
        step.cached += usage.cached_tokens
        step.output += usage.output_tokens
        if trace.end is End.FAILED and is_trouble(trace):
            step.errors += 1
        first = trace.first_text if trace.first_text is not None else trace.first_event
        if first is not None:
            place = bisect_left(_BOUNDS, first - trace.started)
            step.firsts[place] = step.firsts.get(place, 0) + 1

    def note_lag(self, seconds: float) -> None:
        """Count a measurement of the loop's lag."""
        step, number = self._step, self._number()
        if number > step.number:
            step = self._begin(number)
        if seconds > step.lag_max:
            step.lag_max = seconds
        place = bisect_left(_BOUNDS, seconds)
        step.lags[place] = step.lags.get(place, 0) + 1

    def _number(self) -> int:
        return int(self._clock.monotonic() / STEP_SECONDS)

    def _begin(self, number: int) -> _Step:
        self._step = _Step(number)
        self._steps.append(self._step)
        return self._step

    # -- what is shown --------------------------------------------------------------------

    def now(self, since: float | None = None) -> JsonObject:
        """Return how it goes, with the steps that are newer than *since*; with all of them for None."""
        now = self._clock.monotonic()
        steps, seconds = self._recent(WINDOW_SECONDS)
        requests = sum(step.requests for step in steps)
        errors = sum(step.errors for step in steps)
        sent = sum(step.input for step in steps)
        cached = sum(step.cached for step in steps)
        output = sum(step.output for step in steps)
        firsts, lags = _merged([step.firsts for step in steps]), _merged([step.lags for step in steps])
        return {
            "at": round(self._clock.now(), 3),
            "uptime_seconds": round(now - self._started, 3),
            "version": __version__,
            "in_flight": self._work.in_flight,
            "streams": self._work.streams,
            "queued": self._pool.waiting,
            "requests_per_second": round(requests / seconds, 3),
            "tokens_per_second": {
                "input": round(sent / seconds, 1),
                "cached": round(cached / seconds, 1),
                "output": round(output / seconds, 1),
            },
            "error_share": _share(errors, requests),
            "first_token_seconds": {"p50": _percentile(firsts, 0.5), "p95": _percentile(firsts, 0.95)},
            "cached_share": _share(cached, sent),
            "loop_lag_seconds": {
                "p50": _percentile(lags, 0.5),
                "max": round(max(step.lag_max for step in steps), 4) if lags else None,
            },
            "accounts": self._accounts(),
            "window_seconds": int(WINDOW_SECONDS),
            "series": {"step_seconds": int(STEP_SECONDS), "points": self.points(since)},
        }

    def points(self, since: float | None = None) -> list[list[float | None]]:
        """Return the steps that are over and newer than *since*, oldest first; all of them for None.

        Each is when it began, requests, errors, input, cached and output tokens, the median of the first
        token, the largest lag of the loop. One in which nothing was noted is there too.
        """
        current = self._number()
        offset = self._wall_offset()
        oldest = max(current - _KEPT_STEPS, math.ceil(self._started / STEP_SECONDS))
        if since is not None:
            # Whoever asks has the time of the last one, rounded.
            oldest = max(oldest, math.floor((since - offset + 0.01) / STEP_SECONDS) + 1)
        known = {step.number: step for step in self._steps if oldest <= step.number < current}
        nothing = _Step(0)
        found: list[list[float | None]] = []
        for number in range(oldest, current):
            step = known.get(number, nothing)
            found.append([
                round(number * STEP_SECONDS + offset, 3),
                step.requests,
                step.errors,
                step.input,
                step.cached,
                step.output,
                _percentile(step.firsts, 0.5),
                round(step.lag_max, 4),
            ])
        return found

    def errors(self, seconds: float) -> tuple[int, int]:
        """Return how many turns ended in the last *seconds* (ten minutes at most), and how many of them in trouble."""
        steps, _ = self._recent(seconds)
        return sum(step.requests for step in steps), sum(step.errors for step in steps)

    def _recent(self, seconds: float) -> tuple[list[_Step], float]:
        """Return the steps of the last *seconds*, and how long they are, the one that is not over included."""
        now = self._clock.monotonic()
        oldest = int(now / STEP_SECONDS) - int(seconds / STEP_SECONDS) + 1
        steps = [step for step in self._steps if step.number >= oldest]
        return steps or [_Step(0)], max(1.0, now - max(oldest * STEP_SECONDS, self._started))

    def _wall_offset(self) -> float:
        """Return the way to the wall clock: the same until that is set, so that times told can be compared."""
        offset = self._clock.now() - self._clock.monotonic()
        if abs(offset - self._offset) > STEP_SECONDS:
            self._offset = offset
        return self._offset

    def _accounts(self) -> dict[str, int]:
        states = Counter([account.state for account in self._pool.accounts()])
        by_status: dict[str, int] = dict.fromkeys(STATUSES, 0)
        for state, count in states.items():
            by_status[STATUS[state]] += count
        return {"total": states.total(), **by_status}


def is_trouble(trace: Trace) -> bool:
    """Tell whether a failed turn is the proxy's or the backend's trouble, and not its caller's own mistake."""
    if 400 <= trace.status < 500 and trace.status != 429:
        return False
    return not trace.attempts or trace.attempts[-1].outcome != "caller"


def _merged(histograms: list[dict[int, int]]) -> dict[int, int]:
    found: Counter[int] = Counter()
    for one in histograms:
        found.update(one)
    return found


def _percentile(histogram: Mapping[int, int], share: float) -> float | None:
    """Return the value below which *share* of what was counted lies; None for nothing."""
    wanted = sum(histogram.values()) * share
    for place in sorted(histogram):
        count = histogram[place]
        if wanted <= count:
            high = _BOUNDS[min(place, len(_BOUNDS) - 1)]
            low = _BOUNDS[place - 1] if place else 0.0
            return round(low + (high - low) * wanted / count, 5)
        wanted -= count
    return None


def _share(part: int, whole: int) -> float | None:
    return round(part / whole, 4) if whole else None
