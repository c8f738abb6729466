"""Requests and tokens a minute: never more than the limit lets through, and exactly so soon again."""

from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from codex_proxy.ledger.model import Limits
from codex_proxy.ledger.rates import MINUTE, Bucket, Meters, Owners, Refusal
from codex_proxy.trace import Allowance, Room

NOW = 1000.0


def full(limit: int, now: float = NOW) -> Bucket:
    """A bucket that holds a minute's worth."""
    bucket = Bucket()
    assert bucket.wait(limit, limit, now) == 0.0
    bucket.take(limit, now)
    return bucket


def test_a_minutes_worth_passes_at_once_and_the_next_one_waits_for_its_share() -> None:
    bucket = full(60)
    assert bucket.wait(1, 60, NOW) == 1.0
    assert bucket.wait(30, 60, NOW) == 30.0
    assert bucket.wait(1, 60, NOW + 0.999) == pytest.approx(0.001)
    assert bucket.wait(1, 60, NOW + 1.0) == 0.0


@settings(deadline=None)
@given(st.integers(1, 10_000_000), st.integers(1, 10_000_000), st.floats(0, 1e7))
def test_a_wait_is_exact(limit: int, units: int, now: float) -> None:
    """So soon it fits, and a moment earlier it does not."""
    units = min(units, limit)
    bucket = full(limit, now)
    seconds = bucket.wait(units, limit, now)
    assert seconds == pytest.approx(60.0 * units / limit, abs=1e-6)
    # Nanoseconds are finer than a float of so many seconds.
    slack = 1e-6 + now * 1e-15
    assert bucket.wait(units, limit, now + seconds - min(slack, seconds / 2)) > 0
    assert bucket.wait(units, limit, now + seconds + slack) == 0.0


steps = st.lists(st.tuples(st.integers(0, 90_000), st.integers(1, 50)), min_size=1, max_size=60)


@settings(deadline=None)
@given(st.integers(1, 100), steps)
def test_no_span_of_time_lets_more_through_than_a_minutes_worth_and_what_leaked(
    limit: int, asked: list[tuple[int, int]]
) -> None:
    """Milliseconds between requests, and how large they are; every span between two of them is looked at."""
    bucket, moment = Bucket(), 0
    passed: list[tuple[int, int]] = []
    for pause, units in asked:
        moment += pause
        now = moment / 1000
        if units <= limit and bucket.wait(units, limit, now) == 0.0:
            bucket.take(units, now)
            passed.append((moment, units))
    for first in range(len(passed)):
        total = 0
        for last in range(first, len(passed)):
            total += passed[last][1]
            span = passed[last][0] - passed[first][0]
            assert total <= limit + Fraction(limit * span, 60_000)


@settings(deadline=None)
@given(st.integers(1, 1000), st.integers(1, 400))
def test_as_much_passes_in_the_long_run_as_the_limit_says(limit: int, minutes: int) -> None:
    """Whoever asks again when told gets all of it, to the last unit."""
    bucket, now, count = full(limit), NOW, 0
    for _ in range(min(limit, 50)):
        now += bucket.wait(1, limit, now)
        bucket.take(1, now)
        count += 1
    assert now - NOW == pytest.approx(60.0 * count / limit, abs=1e-3)
    bucket.take(0, now + 60.0 * minutes)
    # But for what leaks in a nanosecond: moments are floats.
    assert bucket.level <= limit


def test_more_than_a_minutes_worth_needs_an_empty_bucket_and_is_paid_for_by_those_that_follow() -> None:
    bucket = Bucket()
    assert bucket.wait(1, 60, NOW) == 0.0
    bucket.take(1, NOW)
    assert bucket.wait(100, 60, NOW) == 1.0
    assert bucket.wait(100, 60, NOW + 1) == 0.0
    bucket.take(100, NOW + 1)
    assert bucket.wait(1, 60, NOW + 1) == 41.0
    assert bucket.room(60, NOW + 1) == Room(60, 0, 100.0)


def test_what_was_taken_too_much_is_given_back_and_never_more_than_that() -> None:
    bucket = full(100)
    bucket.take(-40, NOW)
    assert bucket.room(100, NOW) == Room(100, 40, 36.0)
    bucket.take(-1000, NOW)
    assert bucket.room(100, NOW) == Room(100, 100, 0.0)


@settings(deadline=None)
@given(st.lists(st.floats(-5000, 5000), max_size=30))
def test_a_clock_that_goes_back_lets_nothing_more_through(jumps: list[float]) -> None:
    """What leaks is what went forward."""
    bucket, now, forward = full(60), NOW, 0.0
    for jump in jumps:
        now += jump
        forward += max(jump, 0.0)
        left = bucket.room(60, now).remaining
        assert left <= forward + 1e-3
        if forward < 59:
            assert bucket.wait(60, 60, now) > 0


def test_after_a_clock_went_back_the_wait_is_no_longer_than_before() -> None:
    bucket = full(60)
    assert bucket.wait(1, 60, NOW - 900) == 1.0
    assert bucket.wait(1, 60, NOW - 899) == 0.0


def test_another_limit_counts_at_once() -> None:
    bucket = full(60)
    assert bucket.room(120, NOW).remaining == 60
    assert bucket.room(30, NOW).remaining == 0
    assert bucket.wait(1, 30, NOW) == 2.0
    assert bucket.wait(1, 0, NOW) == 60.0


def test_a_lowered_limit_makes_no_debt_of_what_was_allowed() -> None:
    """A thousand in a minute were allowed; now it is ten a minute, and not none for an hour and a half."""
    bucket = full(1000)
    assert bucket.wait(1, 10, NOW) == 6.0
    assert bucket.wait(10, 10, NOW + 60) == 0.0
    # What was a debt is one as long as it was.
    bucket = full(1000)
    bucket.take(2000, NOW)
    assert bucket.room(1000, NOW).resets_in == 180.0
    assert bucket.room(10, NOW).resets_in == 180.0


def test_time_before_a_change_leaks_by_the_limit_of_that_time() -> None:
    bucket = full(60)
    # Half a minute at sixty, then the limit is raised; nobody had asked meanwhile.
    assert bucket.room(6000, NOW + 30) == Room(6000, 5970, 0.3)


def test_a_correction_by_limits_of_another_time_changes_nothing_else() -> None:
    meters = Meters()
    before, after = Limits(tokens_per_minute=6000), Limits(tokens_per_minute=60)
    assert meters.take([("key", before)], 6000, NOW)[0] is None
    _, allowance = meters.take([("key", after)], 0, NOW)
    assert allowance == Allowance(None, Room(60, 0, 60.0))
    meters.correct([("key", before)], 0, 0, NOW + 30)
    meters.correct([("key", before)], 0, -10, NOW + 30)
    _, allowance = meters.take([("key", after)], 0, NOW + 30)
    assert allowance == Allowance(None, Room(60, 40, 20.0))


def test_levels_stay_whole_numbers_for_years() -> None:
    bucket = Bucket(limit=13)
    for number in range(1000):
        bucket.take(7, number * 86_400.123456)
    assert bucket.level == 7 * MINUTE


# -- keys and users -----------------------------------------------------------------------

KEY = ("key", Limits(requests_per_minute=2, tokens_per_minute=1000))
USER = ("user", Limits(requests_per_minute=100, tokens_per_minute=1500))


def refusal_of(meters: Meters, owners: Owners, tokens: int) -> Refusal | None:
    return meters.take(owners, tokens, NOW)[0]


def test_a_turn_counts_for_its_key_and_its_user_or_for_neither() -> None:
    meters = Meters()
    refusal, allowance = meters.take([KEY, USER], 900, NOW)
    assert refusal is None
    assert allowance == Allowance(Room(2, 1, 30.0), Room(1000, 100, 54.0))
    refusal, allowance = meters.take([KEY, USER], 700, NOW)
    # The key has room in 36 s, the user in 4 s; nothing was counted.
    assert refusal == Refusal("key", "tokens", 1000, 36.0)
    assert allowance == Allowance(Room(2, 1, 30.0), Room(1000, 100, 54.0))
    other = ("key-2", KEY[1])
    assert refusal_of(meters, [other, USER], 700) == Refusal("user", "tokens", 1500, 4.0)
    refusal, allowance = meters.take([other, USER], 600, NOW)
    assert refusal is None
    assert allowance == Allowance(Room(2, 1, 30.0), Room(1500, 0, 60.0))


def test_requests_have_a_limit_of_their_own() -> None:
    meters = Meters()
    assert [refusal_of(meters, [KEY], 0) for _ in range(2)] == [None, None]
    assert refusal_of(meters, [KEY], 0) == Refusal("key", "requests", 2, 30.0)
    meters.correct([KEY], -1, 0, NOW)
    assert refusal_of(meters, [KEY], 0) is None


def test_without_limits_nothing_is_counted_and_nothing_told() -> None:
    meters = Meters()
    free = [("key", Limits()), ("user", Limits())]
    for _ in range(1000):
        assert meters.take(free, 10**9, NOW) == (None, None)
    _, allowance = meters.take([("key", Limits(tokens_per_minute=5))], 0, NOW)
    assert allowance == Allowance(None, Room(5, 5, 0.0))


def test_counts_are_apart_from_turns_and_for_all_owners_or_for_none() -> None:
    meters = Meters()
    owners: Owners = (("key", Limits(requests_per_minute=2)), ("user", Limits(requests_per_minute=1)))
    for _ in range(8):
        assert meters.count(owners, NOW) is None
    refusal = meters.count(owners, NOW)
    assert refusal == Refusal("user", "counts", 8, 7.5)
    assert meters.take(owners, 1, NOW)[0] is None
    for _ in range(8):
        assert meters.count(owners[:1], NOW) is None
    assert meters.count(owners[:1], NOW) == Refusal("key", "counts", 16, 3.75)
    assert meters.count((("free", Limits(tokens_per_minute=1)),), NOW) is None
    assert meters.count(owners, NOW + 7.5) is None
