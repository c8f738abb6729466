"""One account: its token, its cooldowns, what it forgets and what it keeps."""

import itertools

import pytest

from codex_proxy.accounts.account import (
    BACKOFF,
    MAX_REFUSALS,
    REFRESH_BEFORE,
    REPROBE,
    Backoff,
    Cause,
    Strikes,
)
from codex_proxy.accounts.quota import Window
from codex_proxy.accounts.state import Signal, State
from codex_proxy.accounts.tokens import Identity, Secret
from tests.accounts.making import DAY, NOW, account, state_of

# -- pauses ------------------------------------------------------------------------------


def test_every_cause_has_its_pause() -> None:
    assert set(BACKOFF) == set(Cause)
    for backoff in [*BACKOFF.values(), REPROBE]:
        assert 0 < backoff.first <= backoff.cap


@pytest.mark.parametrize("backoff", [*BACKOFF.values(), REPROBE], ids=[*(c.name for c in BACKOFF), "REPROBE"])
def test_a_pause_doubles_up_to_its_cap_and_jitter_is_a_fifth(backoff: Backoff) -> None:
    middle = [backoff.seconds(strikes, 0.5) for strikes in range(1, 200)]
    assert middle[0] == pytest.approx(backoff.first)
    assert max(middle) == pytest.approx(backoff.cap)
    assert middle[-1] == pytest.approx(backoff.cap)
    for one, next_one in itertools.pairwise(middle):
        assert next_one == pytest.approx(min(backoff.cap, one * 2))
    for strikes in (1, 2, 3, 50, 10_000):
        base = backoff.seconds(strikes, 0.5)
        assert backoff.seconds(strikes, 0.0) == pytest.approx(base * 0.8)
        assert backoff.seconds(strikes, 1.0) == pytest.approx(base * 1.2)


def test_no_strike_is_the_first_pause() -> None:
    assert Backoff(5.0, 300.0).seconds(0, 0.5) == 5.0


def test_failures_of_requests_that_were_under_way_together_are_one_strike() -> None:
    strikes = Strikes()
    assert strikes.add(started=10.0, now=12.0)
    assert not strikes.add(started=9.0, now=12.5)
    assert not strikes.add(started=12.0, now=13.0)
    assert strikes.count == 1
    assert strikes.add(started=12.1, now=13.0)
    assert strikes.count == 2
    # Those of the first burst that come late are still of the past.
    assert not strikes.add(started=11.0, now=60.0)
    assert (strikes.count, strikes.last) == (2, 13.0)


# -- tokens ------------------------------------------------------------------------------


def test_a_token_is_valid_until_its_end() -> None:
    one = account(ends=NOW + 10)
    assert one.access_is_valid(NOW + 9.9)
    assert not one.access_is_valid(NOW + 10)


def test_a_token_of_unknown_end_is_valid_until_it_is_refused() -> None:
    one = account(ends=None)
    assert one.access_is_valid(NOW + 1000 * DAY)
    one.rejected = one.credential.access.digest()
    assert not one.access_is_valid(NOW)
    one.rejected = Secret("another").digest()
    assert one.access_is_valid(NOW)


def test_no_token_is_not_valid() -> None:
    assert not account(access="").access_is_valid(NOW)


def test_a_token_is_due_five_to_six_minutes_before_its_end() -> None:
    one = account(ends=NOW + DAY)
    assert one.refresh_due(0.0) == NOW + DAY - REFRESH_BEFORE
    assert one.refresh_due(1.0) == NOW + DAY - REFRESH_BEFORE - 60
    assert REFRESH_BEFORE == 300


@pytest.mark.parametrize("lifetime", [1.0, 60.0, 300.0, 600.0])
def test_a_token_of_minutes_serves_half_its_life_before_it_is_due(lifetime: float) -> None:
    for jitter in (0.0, 0.5, 1.0):
        due = account(ends=NOW + lifetime, last_refresh=NOW).refresh_due(jitter)
        assert due is not None
        assert NOW + lifetime / 2 <= due < NOW + lifetime


def test_a_token_that_was_over_when_it_came_is_one_of_unknown_end() -> None:
    one = account(ends=NOW - DAY, last_refresh=NOW)
    assert one.access_is_valid(NOW)
    assert one.refresh_due(0.5) is None
    one.rejected = one.credential.access.digest()
    assert not one.access_is_valid(NOW)
    assert one.refresh_due(0.5) == 0.0


def test_no_timer_knows_a_token_of_unknown_end() -> None:
    assert account(ends=None).refresh_due(0.5) is None


def test_a_missing_access_token_is_due_at_once() -> None:
    one = account(access="", ends=None)
    assert one.refresh_due(0.5) == 0.0
    one.refresh_after = NOW + 30
    assert one.refresh_due(0.5) == NOW + 30


def test_a_refused_access_token_is_due_at_once_whatever_its_end() -> None:
    for ends in (NOW + DAY, None):
        one = account(ends=ends)
        one.rejected = one.credential.access.digest()
        one.refresh_after = NOW - 5
        assert one.refresh_due(0.5) == NOW - 5


def test_a_pause_after_a_failed_exchange_is_kept() -> None:
    one = account(ends=NOW)
    one.refresh_after = NOW + 30
    assert one.refresh_due(0.5) == NOW + 30


def test_nothing_is_due_without_a_refresh_token_or_a_login() -> None:
    assert account(refresh="").refresh_due(0.5) is None
    one = account()
    one.login_lost = "refresh_token_reused"
    assert one.refresh_due(0.5) is None
    assert not one.can_refresh()


def test_headers_say_whose_request_it_is() -> None:
    plain = account(identity=Identity())
    assert plain.headers(Secret("at")) == {"authorization": "Bearer at"}
    full = account(identity=Identity("u", "acc", is_fedramp=True, residency="us"))
    assert full.headers(Secret("at")) == {
        "authorization": "Bearer at",
        "chatgpt-account-id": "acc",
        "x-openai-fedramp": "true",
        "x-openai-internal-codex-residency": "us",
    }


# -- cooldowns ---------------------------------------------------------------------------


def test_a_cooldown_only_grows() -> None:
    one = account()
    assert one.hold(Cause.RATE, NOW + 60)
    assert state_of(one) is State.COOLING
    assert not one.hold(Cause.RATE, NOW + 10)
    assert one.cooling_until() == NOW + 60
    one.hold(Cause.RATE, NOW + 90)
    assert one.cooling_until() == NOW + 90


def test_an_account_rests_until_the_last_of_its_cooldowns() -> None:
    one = account()
    one.hold(Cause.SERVER, NOW + 5)
    one.hold(Cause.LIMIT, NOW + 100)
    one.hold(Cause.RATE, NOW + 50)
    assert one.cooling_until() == NOW + 100
    assert one.cooling_cause() is Cause.LIMIT
    assert one.reason() == "usage limit"
    assert not one.settle(NOW + 99.9)
    assert set(one.holds) == {Cause.LIMIT}
    assert one.settle(NOW + 100)
    assert state_of(one) is State.READY
    assert one.reason() == ""
    assert one.cooling_until() is None
    assert one.cooling_cause() is None


def test_absolution_takes_back_one_cause_only() -> None:
    one = account()
    one.hold(Cause.PATH, NOW + 5)
    one.hold(Cause.RATE, NOW + 50)
    one.strikes[Cause.PATH] = Strikes(3, 0.0)
    assert not one.absolve(Cause.PATH)
    assert state_of(one) is State.COOLING
    assert Cause.PATH not in one.strikes
    assert one.absolve(Cause.RATE)
    assert state_of(one) is State.READY
    assert not one.absolve(Cause.RATE)


def test_new_tokens_end_no_cooldown() -> None:
    one = account()
    one.hold(Cause.LIMIT, NOW + 100)
    one.signal(Signal.REFRESHED)
    one.settle(NOW)
    assert state_of(one) is State.COOLING
    assert one.cooling_until() == NOW + 100


def test_an_unavailable_account_rests_first_and_cools_after() -> None:
    one = account()
    one.unavailable_until, one.unavailable_reason = NOW + 100, "insufficient_quota"
    one.signal(Signal.UNENTITLED)
    one.hold(Cause.LIMIT, NOW + 200)
    assert state_of(one) is State.UNAVAILABLE
    assert one.reason() == "insufficient_quota"
    assert not one.settle(NOW + 99)
    assert one.settle(NOW + 100)
    assert state_of(one) is State.COOLING
    assert one.settle(NOW + 200)
    assert state_of(one) is State.READY


def test_limits_and_refusals_of_models_end_by_the_clock() -> None:
    one = account()
    one.family_holds = {"codex_x": NOW + 10, "codex_y": NOW + 20}
    one.refusals = {"responses m": NOW + 10, "responses n": NOW + 20}
    one.settle(NOW + 10)
    assert one.family_holds == {"codex_y": NOW + 20}
    assert [one.lacks(f"responses {name}", NOW + 10) for name in "mn"] == [False, True]
    assert state_of(one) is State.READY


def test_a_lost_login_serves_until_its_token_ends() -> None:
    one = account(ends=NOW + 10)
    one.login_lost = "refresh_token_reused"
    assert not one.settle(NOW)
    assert state_of(one) is State.READY
    assert one.settle(NOW + 10)
    assert state_of(one) is State.NEEDS_LOGIN
    assert one.reason() == "refresh_token_reused"


def test_an_account_without_a_refresh_token_needs_a_login_at_its_end() -> None:
    one = account(ends=NOW + 10, refresh="")
    assert not one.settle(NOW)
    assert one.settle(NOW + 11)
    assert state_of(one) is State.NEEDS_LOGIN
    assert one.reason() == "no usable token"


def test_an_expired_token_that_can_be_exchanged_is_no_reason_to_rest() -> None:
    one = account(ends=NOW - 10)
    assert not one.settle(NOW)
    assert state_of(one) is State.READY


def test_a_disabled_account_stays_so_and_wakes_up_as_what_it_is() -> None:
    one = account()
    one.hold(Cause.LIMIT, NOW + 100)
    one.signal(Signal.SWITCHED_OFF)
    assert one.reason() == "disabled in its file"
    assert not one.settle(NOW + 50)
    assert state_of(one) is State.DISABLED
    one.signal(Signal.SWITCHED_ON)
    one.settle(NOW + 50)
    assert state_of(one) is State.COOLING
    one.signal(Signal.SWITCHED_OFF)
    one.signal(Signal.SWITCHED_ON)
    one.settle(NOW + 100)
    assert state_of(one) is State.READY


def test_an_account_unavailable_when_disabled_is_so_when_enabled() -> None:
    one = account()
    one.unavailable_until = NOW + 100
    one.signal(Signal.UNENTITLED)
    one.signal(Signal.SWITCHED_OFF)
    one.signal(Signal.SWITCHED_ON)
    one.settle(NOW)
    assert state_of(one) is State.UNAVAILABLE


# -- success -----------------------------------------------------------------------------


def test_an_answer_forgets_the_failures_before_its_request_only() -> None:
    one = account()
    one.strikes = {Cause.SERVER: Strikes(4, last=10.0), Cause.RATE: Strikes(2, last=20.0)}
    one.succeeded(started=15.0)
    assert set(one.strikes) == {Cause.RATE}


def test_a_late_answer_ends_no_cooldown() -> None:
    one = account()
    one.hold(Cause.LIMIT, NOW + 100)
    one.succeeded(started=0.0)
    assert state_of(one) is State.COOLING
    assert one.cooling_until() == NOW + 100


def test_an_answer_of_a_ready_account_starts_the_reprobes_anew() -> None:
    one = account()
    one.unavailable_count, one.unavailable_reason = 3, "insufficient_quota"
    one.unavailable_until = NOW + 10
    one.settle(NOW)
    one.succeeded(started=0.0)
    assert one.unavailable_count == 3
    one.settle(NOW + 10)
    one.succeeded(started=20.0)
    assert (one.unavailable_count, one.unavailable_reason) == (0, "")


# -- quota -------------------------------------------------------------------------------


def test_a_model_family_counts_on_its_own_limit_when_that_is_known() -> None:
    one = account()
    assert one.left(NOW, None) is None
    one.quota.family("codex").primary = Window(30.0, 300, NOW + 100, NOW, "headers")
    assert one.left(NOW, None) == 70.0
    assert one.left(NOW, "codex") == 70.0
    assert one.left(NOW, "codex_x") == 70.0
    one.quota.family("codex_x").primary = Window(95.0, 300, NOW + 100, NOW, "headers")
    assert one.left(NOW, "codex_x") == 5.0
    assert one.left(NOW, None) == 70.0


def test_what_it_lacks_is_remembered_within_bounds() -> None:
    one = account()
    one.refuse("responses early", NOW + 5, NOW)
    for number in range(1000):
        one.refuse(f"responses made-up-{number}", NOW + 3600, NOW + 10)
    assert len(one.refusals) == MAX_REFUSALS
    assert one.lacks("responses made-up-999", NOW + 20)
    assert not one.lacks("responses early", NOW + 20)


def test_a_clock_that_was_ahead_does_not_stretch_a_pause() -> None:
    one = account(ends=NOW + 10 * DAY)
    one.hold(Cause.SERVER, NOW + DAY + 1, length=1.0)
    one.hold(Cause.LIMIT, NOW + DAY)
    one.settle(NOW)
    assert one.holds == {Cause.LIMIT: NOW + DAY}
    one.refuse("responses m", NOW + DAY, NOW + DAY - 3600)
    assert not one.lacks("responses m", NOW)


def test_a_token_that_only_looked_over_serves_again() -> None:
    one = account(refresh="", ends=NOW + 3600)
    one.settle(NOW + DAY)
    assert state_of(one) is State.NEEDS_LOGIN
    one.settle(NOW)
    assert state_of(one) is State.READY
