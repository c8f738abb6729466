"""How it goes: steps, rates, shares and percentiles of the last minutes, and what they cost."""

import time

import pytest

from codex_proxy.accounts.pool import Pool
from codex_proxy.clock import ManualClock
from codex_proxy.server.pulse import KEPT_SECONDS, LAG_SECONDS, STEP_SECONDS, LoopLag, Pulse, is_trouble
from codex_proxy.trace import LOCAL, Attempt, End, Trace, Usage, UsageSource


class Work:
    in_flight = 3
    streams = 2
    retrying = 1


def pulse(clock: ManualClock) -> Pulse:
    return Pulse(Pool(clock), Work(), clock=clock)


def turn(
    clock: ManualClock,
    *,
    end: End = End.COMPLETED,
    status: int = 200,
    first: float | None = 0.5,
    tokens: tuple[int, int, int] = (100, 60, 10),
    outcome: str = "ok",
) -> Trace:
    """Return a turn that ends now."""
    began = clock.monotonic() - 1.0
    trace = Trace("req_1", "responses", LOCAL, began, clock.now() - 1.0, status=status)
    trace.attempts.append(Attempt("acct-1", began, outcome))
    trace.usage = Usage(tokens[0], tokens[1], 0, tokens[2], 0, UsageSource.BACKEND)
    trace.first_event = None if first is None else began + first
    trace.finish(end, clock.monotonic())
    return trace


def test_nothing_has_happened_yet() -> None:
    now = pulse(ManualClock()).now()
    assert now["requests_per_second"] == 0
    assert now["error_share"] is now["cached_share"] is None
    assert now["first_token_seconds"] == {"p50": None, "p95": None}
    assert now["loop_lag_seconds"] == {"p50": None, "max": None}
    assert now["accounts"] == {
        "total": 0,
        "active": 0,
        "cooldown": 0,
        "unavailable": 0,
        "needs_login": 0,
        "disabled": 0,
    }
    assert (now["in_flight"], now["streams"], now["queued"]) == (3, 2, 0)
    assert now["series"] == {"step_seconds": 2, "points": []}


def test_rates_and_shares_are_those_of_the_last_minute() -> None:
    clock = ManualClock()
    kept = pulse(clock)
    for _ in range(500):
        kept.note(turn(clock, end=End.FAILED, status=500))
    clock.advance(61.0)
    for number in range(60):
        kept.note(turn(clock, end=End.FAILED if number < 6 else End.COMPLETED, status=429))
        clock.advance(1.0)
    now = kept.now()
    assert now["requests_per_second"] == pytest.approx(1.0, rel=0.05)
    assert now["tokens_per_second"]["input"] == pytest.approx(100, rel=0.05)
    assert now["tokens_per_second"]["cached"] == pytest.approx(60, rel=0.05)
    assert now["tokens_per_second"]["output"] == pytest.approx(10, rel=0.05)
    assert now["cached_share"] == 0.6
    assert now["error_share"] == pytest.approx(0.1, abs=0.03)
    assert now["uptime_seconds"] == 121.0


def test_a_young_daemon_divides_by_what_it_has_lived() -> None:
    clock = ManualClock()
    kept = pulse(clock)
    clock.advance(10.0)
    for _ in range(50):
        kept.note(turn(clock))
    assert kept.now()["requests_per_second"] == pytest.approx(5.0)


@pytest.mark.parametrize(
    ("end", "status", "outcome", "is_error"),
    [
        (End.FAILED, 429, "exhausted", True),
        (End.FAILED, 500, "server", True),
        (End.FAILED, 200, "cut", True),
        (End.FAILED, 400, "caller", False),
        (End.FAILED, 413, "ok", False),
        # The refusal of a caller's own request that went out as an event.
        (End.FAILED, 200, "caller", False),
        (End.CALLER_GONE, 0, "", False),
        (End.INCOMPLETE, 200, "ok", False),
    ],
)
def test_a_callers_own_mistake_is_no_error(end: End, status: int, outcome: str, is_error: bool) -> None:
    clock = ManualClock()
    kept = pulse(clock)
    kept.note(turn(clock, end=end, status=status, outcome=outcome))
    assert kept.now()["error_share"] == float(is_error)
    assert kept.errors(60.0) == (1, int(is_error))


def test_a_turn_that_no_account_was_tried_for_is_trouble() -> None:
    trace = turn(ManualClock(), end=End.FAILED, status=429)
    trace.attempts.clear()
    assert is_trouble(trace)


def test_percentiles_are_right_to_a_few_percent() -> None:
    clock = ManualClock()
    kept = pulse(clock)
    for number in range(1, 1001):
        kept.note(turn(clock, first=number / 500))
    first = kept.now()["first_token_seconds"]
    assert first["p50"] == pytest.approx(1.0, rel=0.06)
    assert first["p95"] == pytest.approx(1.9, rel=0.06)


@pytest.mark.parametrize("seconds", [0.0, 1e-9, 5e4])
def test_times_beyond_the_bounds_are_counted_too(seconds: float) -> None:
    clock = ManualClock()
    kept = pulse(clock)
    kept.note(turn(clock, first=seconds))
    p50 = kept.now()["first_token_seconds"]["p50"]
    assert p50 is not None
    assert 0 <= p50 < 2_000


def test_points_are_told_once_and_only_when_they_are_over() -> None:
    clock = ManualClock()
    kept = pulse(clock)
    kept.note(turn(clock, end=End.FAILED, status=503))
    assert kept.points() == []
    clock.advance(STEP_SECONDS)
    (point,) = kept.points()
    assert point == [clock.now() - STEP_SECONDS, 1, 1, 100, 60, 10, pytest.approx(0.5, rel=0.06), 0.0]
    # Two steps in which nothing happens are there as well: a line in a chart goes down to them.
    clock.advance(2 * STEP_SECONDS)
    kept.note(turn(clock))
    since = point[0]
    assert since is not None
    assert [row[1] for row in kept.points(since)] == [0, 0]
    assert [row[1] for row in kept.points()] == [1, 0, 0]
    newest = kept.points()[-1][0]
    assert kept.points(newest) == []
    clock.advance(STEP_SECONDS)
    assert [row[1] for row in kept.points(newest)] == [1]
    assert kept.points(clock.now() + 1000) == []


def test_a_clock_that_is_set_moves_the_times_and_breaks_nothing() -> None:
    clock = ManualClock()
    kept = pulse(clock)
    clock.advance(STEP_SECONDS)
    clock._now += 3600.0
    assert kept.points()[-1][0] == clock.now() - STEP_SECONDS
    clock._now += 0.3
    assert kept.points()[-1][0] == pytest.approx(clock.now() - STEP_SECONDS - 0.3)


def test_ten_minutes_are_kept_and_no_more() -> None:
    clock = ManualClock()
    kept = pulse(clock)
    for _ in range(2_000):
        kept.note(turn(clock))
        clock.advance(1.0)
    points = kept.points()
    assert len(points) == KEPT_SECONDS / STEP_SECONDS
    assert len(kept._steps) <= len(points) + 1
    assert {row[1] for row in points} == {2}


async def test_the_lag_of_the_loop_is_how_late_a_look_comes() -> None:
    clock = ManualClock()
    lag, kept = LoopLag(clock), pulse(clock)
    seen: list[float] = []
    lag.listen(seen.append)
    lag.listen(kept.note_lag)
    for late in (0.0, 0.0, 0.25, 0.01):
        await lag.look()
        clock.advance(LAG_SECONDS + late)
    await lag.look()
    assert seen == pytest.approx([0.0, 0.0, 0.25, 0.01])
    told = kept.now()["loop_lag_seconds"]
    assert told["max"] == pytest.approx(0.25)
    assert told["p50"] < 0.02
    clock.advance(STEP_SECONDS)
    assert kept.points()[-1][-1] == pytest.approx(0.25)


def test_a_turn_costs_next_to_nothing() -> None:
    """Generous, because of what else a machine does: it takes half a microsecond."""
    clock = ManualClock()
    kept, one = pulse(clock), turn(clock)
    begun = time.process_time()
    for _ in range(20_000):
        kept.note(one)
    assert (time.process_time() - begun) / 20_000 < 10e-6
