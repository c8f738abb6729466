"""What becomes of the pool's quota: how fast it goes is measured, the coming week is played through."""

import dataclasses
import math
from collections.abc import Sequence
from unittest import mock

import pytest
from hypothesis import given
from hypothesis import strategies as st

from codex_proxy.accounts.account import Account, Cause
from codex_proxy.accounts.outlook import AHEAD_SECONDS, LOOK_SECONDS, STEP_SECONDS, Forecast, Outlook, _Side
from codex_proxy.accounts.quota import Window
from codex_proxy.accounts.state import Signal
from tests.accounts.making import DAY, HOUR, NOW, account

WEEK = 7 * DAY


def with_windows(
    user: str,
    short: tuple[float, float] | None = (0.0, 5 * HOUR),
    long: tuple[float, float] | None = (0.0, WEEK),
) -> Account:
    """Return an account whose windows have so much used, and so many seconds to their reset."""
    one = account(user)
    family = one.quota.family("codex")
    if short is not None:
        family.primary = Window(short[0], 300, NOW + short[1], NOW, "headers")
    if long is not None:
        family.secondary = Window(long[0], 10_080, NOW + long[1], NOW, "headers")
    return one


def spend(one: Account, short: float, long: float, at: float) -> None:
    """Let an answer tell of that much more use."""
    family = one.quota.family("codex")
    assert family.primary is not None
    assert family.secondary is not None
    family.primary = dataclasses.replace(
        family.primary, used_percent=family.primary.used_percent + short, seen_at=at
    )
    family.secondary = dataclasses.replace(
        family.secondary, used_percent=family.secondary.used_percent + long, seen_at=at
    )


def watched(accounts: Sequence[Account], *, short: float, long: float, minutes: int = 60) -> Outlook:
    """Return an outlook that has seen the first account spend so many percent of its windows an hour."""
    outlook = Outlook()
    begin = NOW - minutes * 60.0
    ghost = with_windows("ghost")
    outlook.note([*accounts, ghost], begin)
    for minute in range(1, minutes + 1):
        spend(ghost, short / 60, long / 60, begin + 60.0 * minute)
        outlook.note([*accounts, ghost], begin + 60.0 * minute)
    return outlook


def look(accounts: Sequence[Account], *, short: float = 0.0, long: float = 0.0) -> Forecast:
    return watched(accounts, short=short, long=long).forecast(accounts, NOW)


def test_nothing_is_said_before_the_pool_was_watched_for_a_while() -> None:
    accounts = [with_windows("a", (99.0, HOUR), (99.0, DAY))]
    told = watched(accounts, short=30.0, long=10.0, minutes=9).forecast(accounts, NOW)
    assert not told.is_known
    assert told.dry_at is None
    assert [(one.exhausted_at, one.unused_percent) for one in told.windows[account("a").alias]] == [
        (None, None)
    ] * 2
    assert told.next_reset == NOW + HOUR


def test_how_fast_the_pool_spends_is_what_all_windows_have_grown_by() -> None:
    rate = watched([], short=30.0, long=6.0).rate(NOW)
    assert rate is not None
    assert rate[0] * 3_600 == pytest.approx(30.0)
    assert rate[1] * 3_600 == pytest.approx(6.0)


def test_a_window_that_began_anew_is_no_spending_backwards() -> None:
    outlook, one = Outlook(), with_windows("a", (80.0, 60.0))
    outlook.note([one], NOW)
    one.quota.family("codex").primary = Window(3.0, 300, NOW + 5 * HOUR, NOW + 120.0, "headers")
    outlook.note([one], NOW + 120.0)
    outlook.note([one], NOW + 3_600.0)
    rate = outlook.rate(NOW + 3_600.0)
    assert rate is not None
    assert rate[0] * 3_600 == pytest.approx(3.0)


def test_an_account_that_just_came_has_spent_nothing_yet() -> None:
    outlook = Outlook()
    outlook.note([], NOW)
    outlook.note([with_windows("a", (90.0, HOUR))], NOW + HOUR)
    assert outlook.rate(NOW + HOUR) == (0.0, 0.0)


def test_the_night_before_is_forgotten() -> None:
    outlook, one = Outlook(), with_windows("a")
    outlook.note([one], NOW)
    spend(one, 50.0, 10.0, NOW + 60)
    outlook.note([one], NOW + 60)
    for minute in range(2, 181):
        outlook.note([one], NOW + 60.0 * minute)
    assert outlook.rate(NOW + 180 * 60.0) == (0.0, 0.0)


def test_a_pool_that_spends_more_than_it_has_runs_dry_until_a_reset() -> None:
    # 40 percent of an hour window are left, and go at 20 an hour: dry after two hours, back at its reset.
    told = look([with_windows("a", (60.0, 4 * HOUR), (0.0, WEEK))], short=20.0, long=0.1)
    assert told.dry_at is not None
    assert told.dry_at - NOW == pytest.approx(2 * HOUR, abs=STEP_SECONDS)
    assert told.back_at is not None
    assert told.back_at - NOW == pytest.approx(4 * HOUR, abs=STEP_SECONDS)
    short, long = told.windows[account("a").alias]
    assert short.exhausted_at == pytest.approx(NOW + 2 * HOUR, abs=STEP_SECONDS)
    assert short.unused_percent == pytest.approx(0.0, abs=1e-6)
    assert long.exhausted_at is None


def test_what_ends_soonest_is_spent_first_and_what_is_left_expires() -> None:
    first = with_windows("a", None, (50.0, DAY))
    second = with_windows("b", None, (0.0, WEEK - 3 * HOUR))
    told = look([second, first], short=0.0, long=0.5)
    (soon,), (late,) = told.windows[first.alias], told.windows[second.alias]
    assert soon.unused_percent == pytest.approx(50.0 - 12.0, abs=0.2)
    # From then on the other one ends sooner, and carries it all.
    assert late.unused_percent == pytest.approx(100.0 - 0.5 * (7 * 24 - 3 - 24), abs=0.2)
    assert told.dry_at is None


def test_a_pool_that_rests_wastes_all_it_has() -> None:
    told = look([with_windows("a", (10.0, HOUR), (30.0, DAY))])
    assert [one.unused_percent for one in told.windows[account("a").alias]] == [90.0, 70.0]
    assert told.dry_at is None


def test_who_cannot_serve_is_no_help_and_no_loss() -> None:
    off = with_windows("a", (0.0, HOUR), (0.0, DAY))
    off.signal(Signal.SWITCHED_OFF)
    told = look([off], short=10.0, long=1.0)
    assert told.dry_at == NOW
    assert told.back_at is None
    assert [one.unused_percent for one in told.windows[account("a").alias]] == [None, None]


def test_an_account_that_cools_serves_from_then_on() -> None:
    one = with_windows("a", (0.0, 5 * HOUR), (0.0, WEEK))
    one.hold(Cause.LIMIT, NOW + 2 * HOUR)
    told = look([one], short=1.0, long=0.1)
    assert told.dry_at == NOW
    assert told.back_at is not None
    assert told.back_at - NOW == pytest.approx(2 * HOUR, abs=STEP_SECONDS)


def test_an_account_of_which_nothing_is_known_counts_as_able() -> None:
    told = look([account("a")], short=50.0, long=50.0)
    assert told.dry_at is None
    assert told.windows[account("a").alias] == ()


def test_an_empty_pool_is_dry() -> None:
    told = Outlook().forecast([], NOW)
    assert told.dry_at == NOW
    assert told.back_at is None


windows = st.none() | st.tuples(st.floats(0, 120, allow_nan=False), st.floats(-DAY, 8 * DAY, allow_nan=False))


@given(
    st.lists(st.tuples(windows, windows), max_size=6),
    st.floats(0, 500, allow_nan=False),
    st.floats(0, 200, allow_nan=False),
)
def test_a_forecast_of_anything_is_one(
    each: list[tuple[tuple[float, float] | None, tuple[float, float] | None]], short: float, long: float
) -> None:
    accounts = [with_windows(f"u{place}", *two) for place, two in enumerate(each)]
    told = look(accounts, short=short, long=long)
    assert told.windows.keys() == {one.alias for one in accounts}
    end = NOW + AHEAD_SECONDS + STEP_SECONDS
    for at in (told.dry_at, told.back_at):
        assert at is None or NOW <= at <= end
    if told.back_at is not None:
        assert told.dry_at is not None
        assert told.back_at > told.dry_at
    for rows in told.windows.values():
        for row in rows:
            assert row.unused_percent is None or 0.0 <= row.unused_percent <= 100.0
            assert row.exhausted_at is None or NOW <= row.exhausted_at <= end
            if row.exhausted_at is not None and row.unused_percent is not None:
                assert row.unused_percent == pytest.approx(0.0, abs=1e-6)


def test_a_thousand_accounts_are_played_through_without_looking_at_all_of_them_at_each_step() -> None:
    import sys

    accounts = [
        with_windows(f"u{n}", (n % 100, (n % 5 + 1) * HOUR), (n % 90, (n % 7 + 1) * DAY))
        for n in range(1_000)
    ]
    outlook = watched([], short=300.0, long=60.0)
    calls = 0

    def count(frame: object, event: str, argument: object) -> None:
        nonlocal calls
        calls += event == "call"

    sys.setprofile(count)
    try:
        outlook.forecast(accounts, NOW)
    finally:
        sys.setprofile(None)
    # A week has 1,008 steps and a thousand accounts some 34 resets each.
    assert calls < 8 * 34 * 1_000
    assert math.isfinite(LOOK_SECONDS)


def test_windows_of_a_minute_cost_no_more_than_others() -> None:
    one = with_windows("a", (10.0, 60.0))
    one.quota.family("codex").primary = Window(10.0, 1, NOW + 60.0, NOW, "headers")
    outlook = watched([], short=1.0, long=0.1)
    begun = 0
    real = _Side.begin_anew

    def count(side: _Side, now: float) -> None:
        nonlocal begun
        begun += 1
        real(side, now)

    with mock.patch.object(_Side, "begin_anew", count):
        told = outlook.forecast([one], NOW)
    assert told.windows[one.alias][0].unused_percent == pytest.approx(90.0, abs=0.5)
    # One for each step; each minute of the week would be ten times as many.
    assert begun < 1.1 * AHEAD_SECONDS / STEP_SECONDS


def test_a_clock_that_is_set_back_begins_the_watch_anew() -> None:
    one = with_windows("a")
    outlook = watched([one], short=30.0, long=6.0)
    back = NOW - 100 * DAY
    outlook.note([one], back)
    assert outlook.rate(back) is None
    for minute in range(1, 31):
        spend(one, 1.0, 0.1, back + 60.0 * minute)
        outlook.note([one], back + 60.0 * minute)
    rate = outlook.rate(back + 1_800.0)
    assert rate is not None
    assert rate[0] * 3_600 == pytest.approx(60.0)


def test_once_it_has_begun_the_accounts_may_change() -> None:
    one = with_windows("a", (60.0, 4 * HOUR))
    one.hold(Cause.LIMIT, NOW + 2 * HOUR)
    outlook = watched([], short=20.0, long=0.1)
    expected = outlook.forecast([one], NOW)
    play = outlook.begin([one], NOW)
    one.holds.clear()
    one.quota.families.clear()
    outlook.note([], NOW + 60.0)
    assert play() == expected
