"""The accounts together: who serves, what a failure means for whom, and what the files change."""

import logging
from pathlib import Path
from typing import Any

import pytest

from codex_proxy.accounts.account import BACKOFF, REFUSAL_SECONDS, REPROBE, Account, Cause
from codex_proxy.accounts.pool import EGRESS_WINDOW, Lease, Pool, Want
from codex_proxy.accounts.quota import Window
from codex_proxy.accounts.state import State
from codex_proxy.accounts.store import Credential, Problem, Scan
from codex_proxy.clock import ManualClock
from codex_proxy.errors import PoolEmpty, PoolError, PoolExhausted, PoolShortage, RequestError, Verdict
from tests.accounts.making import DAY, HOUR, NOW, Middle, credential, failure, make_pool, named, state_of

WANT = Want("gpt-5.5")


def take(pool: Pool, user: str, want: Want = WANT) -> Lease:
    """Take that account, whatever the strategy would say."""
    return pool.pick(want, exclude={a.key for a in pool if a.alias != user})


def fail(pool: Pool, user: str, verdict: Verdict, want: Want = WANT, **more: Any) -> Account:
    """Let one request of that account fail; a moment passes between taking and failing."""
    lease = take(pool, user, want)
    lease.failed(failure(verdict, **more))
    lease.release()
    return lease.account


def refused(pool: Pool, want: Want = WANT, exclude: set[str] | None = None) -> PoolError | RequestError:
    with pytest.raises((PoolError, RequestError)) as caught:
        pool.pick(want, exclude or set())
    assert isinstance(caught.value, (PoolError, RequestError))
    return caught.value


# -- choosing ----------------------------------------------------------------------------


def test_a_lease_counts_while_it_is_held_and_is_released_once() -> None:
    pool, _ = make_pool("a")
    lease = pool.pick(WANT)
    assert (lease.account.in_flight, lease.account.total_requests, lease.account.last_used) == (1, 1, NOW)
    lease.release()
    lease.release()
    assert lease.account.in_flight == 0


def test_a_lease_forgets_the_conversation_once_its_account_has_answered() -> None:
    pool, _ = make_pool("a", "b")
    want = Want("gpt-5.5", session="s", compacted=("history",), encrypted=("one", "two"))
    lease = take(pool, "b", want)
    assert lease.want is want
    lease.ok()
    assert (lease.want.compacted, lease.want.encrypted) == ((), ())
    # What a later failure needs is still known, and so is who wrote the history.
    assert (lease.want.refusal, lease.want.session) == (want.refusal, "s")
    assert pool.pick(Want("gpt-5.5", compacted=("history",))).account is lease.account


def test_the_account_of_the_turn_comes_before_that_of_the_conversation() -> None:
    pool, _ = make_pool("a", "b", "c")
    pool.pick(Want("gpt-5.5", session="s"), {named(pool, "a").key, named(pool, "c").key}).ok()
    b, c = named(pool, "b").key, named(pool, "c").key
    lease = pool.pick(Want("gpt-5.5", session="s", prefer=c))
    assert (lease.account.key, lease.why) == (c, "turn state")
    for _ in range(5):
        lease = pool.pick(Want("gpt-5.5", session="s"))
        assert (lease.account.key, lease.why) == (b, "conversation")
    assert pool.pick(Want("gpt-5.5")).why == "most quota left"


def test_a_bound_account_that_cannot_serve_is_left() -> None:
    pool, _ = make_pool("a", "b")
    a = named(pool, "a")
    take(pool, "a", Want("gpt-5.5", session="s")).ok()
    fail(pool, "a", Verdict.EXHAUSTED, resets_at=NOW + HOUR)
    assert pool.pick(Want("gpt-5.5", session="s", prefer=a.key)).account.alias == "b"


def test_who_belongs_to_an_account_costs_no_look_at_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    pool, _ = make_pool(*(f"u{number}" for number in range(50)))
    want = Want("gpt-5.5", session="s")
    home = take(pool, "u7", want)
    home.ok()
    looked: list[str] = []
    settle = Account.settle

    def watched(account: Account, now: float) -> bool:
        looked.append(account.alias)
        return settle(account, now)

    monkeypatch.setattr(Account, "settle", watched)
    assert pool.pick(want).account is home.account
    assert looked == ["u7"]


def test_no_choice_computes_who_an_account_is(monkeypatch: pytest.MonkeyPatch) -> None:
    pool, _ = make_pool(*"abcde")
    asked: list[Credential] = []

    def watched(credential: Credential) -> str:
        asked.append(credential)
        return ""

    monkeypatch.setattr(Credential, "_key", watched)
    assert pool.pick(WANT, {named(pool, "a").key}).account.alias != "a"
    assert asked == []


def test_a_conversation_moves_with_the_account_that_answered_last() -> None:
    pool, _ = make_pool("a", "b")
    want = Want("gpt-5.5", session="s")
    take(pool, "a", want).ok()
    take(pool, "b", want).ok()
    assert pool.pick(want).account.alias == "b"


def test_conversations_that_begin_alike_spread_and_then_stay() -> None:
    pool, _ = make_pool("a", "b", "c")
    opening = Want("gpt-5.5", session="derived", is_opening=True)
    aliases = []
    for _ in range(3):
        lease = pool.pick(opening)
        aliases.append(lease.account.alias)
        lease.ok()
    assert sorted(aliases) == ["a", "b", "c"]
    lease = pool.pick(Want("gpt-5.5", session="derived"))
    assert (lease.account.alias, lease.why) == (aliases[-1], "conversation")


def test_a_failure_binds_no_conversation() -> None:
    pool, _ = make_pool("a", "b")
    want = Want("gpt-5.5", session="s")
    fail(pool, "a", Verdict.CALLER, want)
    assert pool.pick(want).why == "most quota left"


def test_the_account_with_most_quota_left_serves_and_equals_take_turns() -> None:
    pool, _ = make_pool("a", "b", "c")
    named(pool, "b").quota.family("codex").primary = Window(10.0, 300, NOW + 100, NOW, "headers")
    assert [pool.pick(WANT).account.alias for _ in range(3)] == ["b", "b", "b"]
    pool, _ = make_pool("a", "b", "c")
    seen = []
    for _ in range(6):
        lease = pool.pick(WANT)
        seen.append(lease.account.alias)
        lease.release()
    assert sorted(seen[:3]) == sorted(seen[3:]) == ["a", "b", "c"]


def test_an_account_whose_token_must_be_exchanged_first_is_the_last_choice() -> None:
    pool, clock = make_pool("a", "b")
    pool.apply(Scan([credential("a", ends=NOW + 10), credential("b")], []))
    named(pool, "a").quota.family("codex").primary = Window(0.0, 300, NOW + DAY, NOW, "headers")
    named(pool, "b").quota.family("codex").primary = Window(90.0, 300, NOW + DAY, NOW, "headers")
    assert pool.pick(WANT).account.alias == "a"
    clock.advance(11)
    assert pool.pick(WANT).account.alias == "b"
    assert pool.pick(WANT, {named(pool, "b").key}).account.alias == "a"


def test_excluded_accounts_are_not_taken() -> None:
    pool, _ = make_pool("a", "b")
    assert pool.pick(WANT, {named(pool, "a").key}).account.alias == "b"


# -- nobody ------------------------------------------------------------------------------


def test_an_empty_pool_says_what_to_do() -> None:
    pool, _ = make_pool()
    error = refused(pool)
    assert isinstance(error, PoolEmpty)
    assert "auth-dir" in error.message


def test_accounts_that_need_a_person_are_counted_by_state() -> None:
    pool, _ = make_pool()
    pool.apply(
        Scan([credential("a", disabled=True), credential("b", ends=NOW - 1, refresh=""), credential("c")], [])
    )
    fail(pool, "c", Verdict.UNENTITLED)
    error = refused(pool)
    assert isinstance(error, PoolEmpty)
    assert "1 disabled, 1 needs-login, 1 unavailable" in error.message
    assert error.status == 429


def test_all_at_their_limit_names_the_earliest_reset() -> None:
    pool, clock = make_pool("a", "b", "c")
    for user, hours in (("a", 3), ("b", 1), ("c", 2)):
        fail(pool, user, Verdict.EXHAUSTED, resets_at=NOW + hours * HOUR)
    clock.advance(60)
    error = refused(pool)
    assert isinstance(error, PoolExhausted)
    assert error.resets_at == NOW + HOUR
    assert error.retry_after == HOUR - 60
    clock.advance(HOUR)
    assert pool.pick(WANT).account.alias == "b"


def test_an_account_in_passing_trouble_makes_it_a_shortage() -> None:
    pool, _ = make_pool("a", "b")
    fail(pool, "a", Verdict.EXHAUSTED, resets_at=NOW + HOUR)
    fail(pool, "b", Verdict.LIMITED, retry_after=7)
    error = refused(pool)
    assert isinstance(error, PoolShortage)
    assert error.retry_after == 7
    assert error.code == "rate_limit_exceeded"


def test_a_limit_that_ends_before_the_passing_trouble_is_the_way_out() -> None:
    pool, _ = make_pool("a", "b")
    fail(pool, "a", Verdict.EXHAUSTED, resets_at=NOW + 10)
    fail(pool, "b", Verdict.LIMITED, retry_after=60)
    error = refused(pool)
    assert isinstance(error, PoolExhausted)
    assert error.resets_at == NOW + 10


def test_an_account_rests_for_what_ends_last() -> None:
    pool, _ = make_pool("a")
    fail(pool, "a", Verdict.EXHAUSTED, resets_at=NOW + 10)
    named(pool, "a").hold(Cause.RATE, NOW + 100)
    error = refused(pool)
    assert isinstance(error, PoolShortage)
    assert error.retry_after == 100


def test_accounts_that_were_tried_are_worth_another_moment() -> None:
    pool, _ = make_pool("a", "b")
    error = refused(pool, exclude={a.key for a in pool})
    assert isinstance(error, PoolShortage)
    assert error.retry_after == 1


def test_a_model_that_every_account_lacks_is_the_callers_mistake() -> None:
    pool, _ = make_pool("a", "b")
    for account in pool:
        pool.set_models(account, [{"slug": "gpt-5.5"}, {"slug": "gpt-5.4"}])
    want = Want("gpt-9")
    # In no list: passed on all the same, because lists lag behind.
    fail(pool, "a", Verdict.MODEL, want)
    fail(pool, "b", Verdict.MODEL, want)
    error = refused(pool, want)
    assert isinstance(error, RequestError)
    assert (error.status, error.param, error.code) == (400, "model", "model_not_found")
    assert "'gpt-9'" in error.message
    assert "they serve: gpt-5.4, gpt-5.5" in error.message


def test_an_endpoint_that_every_account_lacks_is_named() -> None:
    pool, _ = make_pool("a")
    want = Want("", endpoint="alpha/search")
    fail(pool, "a", Verdict.MODEL, want)
    error = refused(pool, want)
    assert isinstance(error, RequestError)
    assert "alpha/search" in error.message
    assert pool.pick(WANT).account.alias == "a"


def test_a_model_that_only_a_resting_account_has_is_no_mistake_of_the_caller() -> None:
    pool, clock = make_pool("a", "b")
    pool.set_models(named(pool, "a"), [{"slug": "gpt-6"}])
    pool.set_models(named(pool, "b"), [{"slug": "gpt-5.5"}])
    fail(pool, "a", Verdict.EXHAUSTED, Want("gpt-6"), resets_at=NOW + HOUR)
    assert isinstance(refused(pool, Want("gpt-6")), PoolExhausted)
    clock.advance(HOUR)
    fail(pool, "a", Verdict.UNENTITLED, Want("gpt-6"))
    error = refused(pool, Want("gpt-6"))
    assert isinstance(error, PoolEmpty)
    assert "gpt-6" in error.message


# -- models ------------------------------------------------------------------------------


def test_a_listed_model_goes_to_the_accounts_that_list_it() -> None:
    pool, _ = make_pool("a", "b")
    pool.set_models(named(pool, "a"), [{"slug": "gpt-5.5"}])
    pool.set_models(named(pool, "b"), [{"slug": "gpt-5.5"}, {"slug": "gpt-6"}])
    assert {pool.pick(Want("gpt-6")).account.alias for _ in range(4)} == {"b"}
    assert {pool.pick(Want("gpt-5.5")).account.alias for _ in range(12)} == {"a", "b"}
    # In no list: anybody may try.
    assert {pool.pick(Want("gpt-9")).account.alias for _ in range(8)} == {"a", "b"}


def test_an_account_without_a_list_may_have_any_model() -> None:
    pool, _ = make_pool("a", "b")
    pool.set_models(named(pool, "b"), [{"slug": "gpt-6"}])
    assert {pool.pick(Want("gpt-6")).account.alias for _ in range(4)} == {"a", "b"}


def test_a_refused_model_is_believed_for_an_hour_and_for_that_account_only() -> None:
    pool, clock = make_pool("a", "b")
    account = fail(pool, "a", Verdict.MODEL)
    assert state_of(account) is State.READY
    assert account.total_errors == 0
    for _ in range(4):
        assert pool.pick(WANT).account.alias == "b"
    assert {pool.pick(Want("gpt-5.4")).account.alias for _ in range(8)} == {"a", "b"}
    assert {pool.pick(Want("gpt-5.5", "responses/compact")).account.alias for _ in range(8)} == {"a", "b"}
    clock.advance(REFUSAL_SECONDS)
    assert {pool.pick(WANT).account.alias for _ in range(8)} == {"a", "b"}


def test_a_new_list_that_has_the_model_ends_its_refusal() -> None:
    pool, _ = make_pool("a")
    account = fail(pool, "a", Verdict.MODEL)
    pool.set_models(account, [{"slug": "gpt-5.4"}])
    assert isinstance(refused(pool), RequestError)
    pool.set_models(account, [{"slug": "gpt-5.5"}, {"no": "slug"}])
    assert pool.pick(WANT).account is account


def test_lists_are_forgotten_with_their_accounts() -> None:
    pool, _ = make_pool("a", "b")
    pool.set_models(named(pool, "a"), [{"slug": "gpt-5.5"}])
    pool.set_models(named(pool, "b"), [{"slug": "gpt-6"}])
    version = pool.lists_version
    assert len(pool.model_lists()) == 2
    pool.apply(Scan([credential("a")], []))
    assert pool.lists_version > version
    # What no list names any more is passed on.
    assert pool.pick(Want("gpt-6")).account.alias == "a"


def test_a_list_that_many_accounts_have_is_kept_once() -> None:
    pool, _ = make_pool(*"abcde")
    version = pool.lists_version
    for account in pool:
        pool.set_models(account, [{"slug": "gpt-5.5"}, {"slug": "gpt-6"}])
    assert len({id(account.model_objects) for account in pool}) == len(pool.model_lists()) == 1
    # The catalogue is made anew whenever this moves.
    assert pool.lists_version == version + 1


def test_an_account_that_changes_to_a_list_of_others_takes_its_own_away() -> None:
    pool, _ = make_pool("a", "b")
    pool.set_models(named(pool, "a"), [{"slug": "gpt-5.5"}])
    pool.set_models(named(pool, "b"), [{"slug": "gpt-6"}])
    version = pool.lists_version
    pool.set_models(named(pool, "b"), [{"slug": "gpt-5.5"}])
    assert pool.lists_version > version
    assert pool.model_lists() == [[{"slug": "gpt-5.5"}]]
    pool.set_models(named(pool, "b"), [{"slug": "gpt-5.5"}])
    assert pool.lists_version == version + 1


def test_a_changed_etag_makes_the_list_old() -> None:
    pool, _ = make_pool("a")
    account = named(pool, "a")
    pool.set_models(account, [{"slug": "gpt-5.5"}])
    seen = []
    for etag in ('W/"1"', 'W/"1"', "", 'W/"2"'):
        pool.read_headers(account, {"x-models-etag": etag})
        seen.append(account.models_at)
    assert seen == [NOW, NOW, NOW, None]
    assert account.models == frozenset({"gpt-5.5"})


# -- what failures do --------------------------------------------------------------------


@pytest.mark.parametrize("verdict", [Verdict.CALLER, Verdict.ENCRYPTED])
def test_a_fault_of_the_request_punishes_nobody(verdict: Verdict) -> None:
    pool, _ = make_pool("a")
    account = fail(pool, "a", verdict, status=400)
    assert state_of(account) is State.READY
    assert (account.holds, account.strikes, account.total_errors, account.last_error) == ({}, {}, 0, "")


@pytest.mark.parametrize(
    ("verdict", "cause"),
    [
        (Verdict.LIMITED, Cause.RATE),
        (Verdict.OVERLOADED, Cause.OVERLOAD),
        (Verdict.SERVER, Cause.SERVER),
        (Verdict.FORBIDDEN, Cause.FORBIDDEN),
        (Verdict.UNAUTHORIZED, Cause.REJECTED),
        (Verdict.SILENT, Cause.SILENT),
        (Verdict.CUT, Cause.CUT),
        (Verdict.PATH, Cause.PATH),
        (Verdict.EXHAUSTED, Cause.LIMIT),
    ],
)
def test_each_failure_cools_for_its_own_time_which_doubles(verdict: Verdict, cause: Cause) -> None:
    pool, clock = make_pool("a", "b")
    total = 0
    for strike in range(1, 14):
        # Nothing of the way's faults may be remembered from the round before.
        clock.advance(1)
        account = fail(pool, "a", verdict)
        pause = BACKOFF[cause].seconds(strike, 0.5)
        assert account.cooling_until() == pytest.approx(clock.now() + pause)
        assert account.cooling_cause() is cause
        assert account.total_errors == (total := total + 1)
        assert account.last_error == f"{verdict.value} {verdict.value}"
        clock.advance(pause)
    assert BACKOFF[cause].seconds(13, 0.5) == BACKOFF[cause].cap
    # An answer ends the row.
    clock.advance(1)
    lease = take(pool, "a")
    lease.ok()
    assert lease.account.last_error == ""
    clock.advance(1)
    account = fail(pool, "a", verdict)
    assert account.cooling_until() == pytest.approx(clock.now() + BACKOFF[cause].first)


@pytest.mark.parametrize(
    "verdict", [Verdict.LIMITED, Verdict.OVERLOADED, Verdict.SERVER, Verdict.CUT, Verdict.PATH]
)
def test_many_failures_at_once_are_one(verdict: Verdict) -> None:
    pool, clock = make_pool("a", "b")
    leases = [take(pool, "a") for _ in range(20)]
    clock.advance(1)
    for lease in leases:
        lease.failed(failure(verdict))
        clock.advance(0.001)
    account = named(pool, "a")
    (strikes,) = account.strikes.values()
    assert strikes.count == 1
    until = account.cooling_until()
    assert until is not None
    (cause,) = account.holds
    assert until == pytest.approx(NOW + 1 + BACKOFF[cause].first)
    assert account.total_errors == 20


def test_a_burst_that_names_its_time_grows_to_the_longest() -> None:
    pool, clock = make_pool("a")
    leases = [take(pool, "a") for _ in range(3)]
    clock.advance(1)
    for lease, seconds in zip(leases, (10, 30, 20), strict=True):
        lease.failed(failure(Verdict.LIMITED, retry_after=seconds))
    assert named(pool, "a").cooling_until() == NOW + 31


def test_a_cooldown_only_grows() -> None:
    pool, clock = make_pool("a")
    first, second = take(pool, "a"), take(pool, "a")
    first.failed(failure(Verdict.EXHAUSTED, resets_at=NOW + 5 * HOUR))
    clock.advance(5)
    second.failed(failure(Verdict.EXHAUSTED, resets_at=NOW + HOUR))
    assert named(pool, "a").cooling_until() == NOW + 5 * HOUR


@pytest.mark.parametrize(("wait", "expected"), [(0, 5.0), (-3, 5.0), (90, 90.0), (1e12, 5.0)])
def test_an_impossible_wait_is_no_wait(wait: float, expected: float) -> None:
    pool, _ = make_pool("a")
    account = fail(pool, "a", Verdict.LIMITED, retry_after=wait)
    assert account.cooling_until() == NOW + expected


def test_a_limit_without_a_reset_ends_with_the_window_that_is_used_up() -> None:
    pool, _ = make_pool("a")
    account = named(pool, "a")
    account.quota.family("codex").primary = Window(100.0, 300, NOW + 777, NOW, "headers")
    fail(pool, "a", Verdict.EXHAUSTED)
    assert account.cooling_until() == NOW + 777


def test_a_limit_without_any_reset_ends_when_the_backend_says_or_after_a_minute() -> None:
    pool, _ = make_pool("a", "b")
    assert fail(pool, "a", Verdict.EXHAUSTED, retry_after=40).cooling_until() == NOW + 40
    assert fail(pool, "b", Verdict.EXHAUSTED).cooling_until() == NOW + 60


def test_a_reset_in_the_past_is_none() -> None:
    pool, _ = make_pool("a")
    account = fail(pool, "a", Verdict.EXHAUSTED, resets_at=NOW - 5)
    assert account.cooling_until() == NOW + 60


def test_a_late_failure_counts_after_an_answer_had_begun() -> None:
    pool, _ = make_pool("a")
    lease = pool.pick(WANT)
    lease.ok()
    lease.failed(failure(Verdict.EXHAUSTED, resets_at=NOW + HOUR))
    lease.ok()
    assert named(pool, "a").cooling_until() == NOW + HOUR


def test_an_answer_to_an_older_request_ends_no_cooldown() -> None:
    pool, clock = make_pool("a")
    older = take(pool, "a")
    clock.advance(1)
    fail(pool, "a", Verdict.LIMITED, retry_after=30)
    older.ok()
    account = named(pool, "a")
    assert state_of(account) is State.COOLING
    assert account.strikes[Cause.RATE].count == 1


# -- limits of one family ----------------------------------------------------------------


def test_a_limit_of_one_family_leaves_the_rest_of_the_account_alone() -> None:
    pool, clock = make_pool("a", "b")
    spark = Want("gpt-5.3-spark")
    account = fail(pool, "a", Verdict.EXHAUSTED, spark, limit_family="codex_bengalfox", resets_at=NOW + HOUR)
    assert state_of(account) is State.READY
    assert account.family_holds == {"codex_bengalfox": NOW + HOUR}
    assert {pool.pick(spark).account.alias for _ in range(4)} == {"b"}
    assert {pool.pick(WANT).account.alias for _ in range(8)} == {"a", "b"}
    clock.advance(HOUR)
    assert {pool.pick(spark).account.alias for _ in range(8)} == {"a", "b"}


def test_which_family_a_model_counts_on_is_learned_for_all_accounts() -> None:
    pool, _ = make_pool("a", "b")
    spark, other = Want("gpt-5.3-spark"), Want("gpt-5.3-spark-mini")
    fail(pool, "a", Verdict.EXHAUSTED, spark, limit_family="codex_x", resets_at=NOW + HOUR)
    fail(pool, "b", Verdict.EXHAUSTED, other, limit_family="codex_x", resets_at=NOW + 2 * HOUR)
    # Known of `other` by now, so `a` is not asked in vain.
    error = refused(pool, other)
    assert isinstance(error, PoolExhausted)
    assert error.resets_at == NOW + HOUR
    assert isinstance(refused(pool, spark), PoolExhausted)
    assert pool.pick(WANT).account.alias in {"a", "b"}


def test_the_limit_of_a_family_only_grows_and_has_a_pause_when_no_reset_is_named() -> None:
    pool, _ = make_pool("a")
    first, second, third = (take(pool, "a") for _ in range(3))
    first.failed(failure(Verdict.EXHAUSTED, limit_family="codex_x"))
    assert named(pool, "a").family_holds == {"codex_x": NOW + 60}
    second.failed(failure(Verdict.EXHAUSTED, limit_family="codex_x", retry_after=100))
    assert named(pool, "a").family_holds == {"codex_x": NOW + 100}
    third.failed(failure(Verdict.EXHAUSTED, limit_family="codex_x", resets_at=NOW + 50))
    assert named(pool, "a").family_holds == {"codex_x": NOW + 100}


def test_the_window_of_the_family_tells_its_reset() -> None:
    pool, _ = make_pool("a")
    account = named(pool, "a")
    account.quota.family("codex_x").primary = Window(100.0, 300, NOW + 777, NOW, "headers")
    fail(pool, "a", Verdict.EXHAUSTED, limit_family="codex_x")
    assert account.family_holds == {"codex_x": NOW + 777}


def test_a_family_limit_of_a_request_without_a_model_stays_with_its_endpoint() -> None:
    pool, _ = make_pool("a")
    search = Want("", "alpha/search")
    account = fail(pool, "a", Verdict.EXHAUSTED, search, limit_family="codex_search", resets_at=NOW + HOUR)
    assert state_of(account) is State.READY
    assert isinstance(refused(pool, search), PoolExhausted)
    assert pool.pick(WANT).account is account


@pytest.mark.parametrize("family", [None, "codex"])
def test_the_main_limit_cools_the_whole_account(family: str | None) -> None:
    pool, _ = make_pool("a")
    account = fail(pool, "a", Verdict.EXHAUSTED, limit_family=family, resets_at=NOW + HOUR)
    assert state_of(account) is State.COOLING
    assert account.family_holds == {}


# -- entitlement -------------------------------------------------------------------------


def test_an_account_that_is_not_entitled_is_tried_again_more_and_more_slowly() -> None:
    pool, clock = make_pool("a", "b")
    pauses = []
    for _ in range(7):
        account = fail(pool, "a", Verdict.UNENTITLED, code="insufficient_quota")
        assert state_of(account) is State.UNAVAILABLE
        assert account.reason() == "insufficient_quota"
        pauses.append(account.unavailable_until - clock.now())
        clock.advance(pauses[-1])
        pool.accounts()
        assert state_of(account) is State.READY
    assert pauses == [REPROBE.seconds(n, 0.5) for n in range(1, 8)]
    assert (pauses[0], pauses[-1]) == (1_800.0, 21_600.0)
    take(pool, "a").ok()
    account = fail(pool, "a", Verdict.UNENTITLED)
    assert account.unavailable_until - clock.now() == 1_800.0


def test_many_refusals_at_once_are_one_reprobe() -> None:
    pool, _ = make_pool("a")
    leases = [take(pool, "a") for _ in range(10)]
    for lease in leases:
        lease.failed(failure(Verdict.UNENTITLED))
    assert named(pool, "a").unavailable_count == 1
    assert named(pool, "a").unavailable_until == NOW + 1_800.0


# -- the way there -----------------------------------------------------------------------


def test_a_broken_way_is_told_once_and_not_per_attempt(caplog: pytest.LogCaptureFixture) -> None:
    pool, clock = make_pool("a", "b", "c")
    fail(pool, "a", Verdict.PATH)

    def told() -> int:
        for user in "bc" * 10:
            fail(pool, user, Verdict.PATH)
        return sum(record.levelno >= logging.WARNING for record in caplog.records)

    assert told() == 1
    clock.advance(EGRESS_WINDOW)
    assert told() == 2


def test_a_fault_of_the_way_seen_on_two_accounts_cools_nobody() -> None:
    pool, clock = make_pool("a", "b", "c")
    first = fail(pool, "a", Verdict.PATH)
    assert state_of(first) is State.COOLING
    clock.advance(EGRESS_WINDOW - 1)
    second = fail(pool, "b", Verdict.PATH)
    third = fail(pool, "c", Verdict.PATH)
    for account in (first, second, third):
        assert state_of(account) is State.READY
        assert Cause.PATH not in account.strikes
    # And as long as it goes on, nobody.
    clock.advance(1)
    assert state_of(fail(pool, "a", Verdict.PATH)) is State.READY


def test_faults_far_apart_are_each_accounts_own() -> None:
    pool, clock = make_pool("a", "b", "c")
    fail(pool, "a", Verdict.PATH)
    clock.advance(EGRESS_WINDOW)
    assert state_of(fail(pool, "b", Verdict.PATH)) is State.COOLING


def test_an_answer_in_between_shows_that_the_way_is_good() -> None:
    pool, _ = make_pool("a", "b", "c")
    fail(pool, "a", Verdict.PATH)
    take(pool, "c").ok()
    assert state_of(fail(pool, "b", Verdict.PATH)) is State.COOLING
    assert state_of(named(pool, "a")) is State.COOLING


def test_the_only_account_is_not_cooled_for_the_way() -> None:
    pool, _ = make_pool("a")
    assert state_of(fail(pool, "a", Verdict.PATH)) is State.READY


def test_the_only_account_that_could_serve_is_not_cooled_for_the_way() -> None:
    pool, _ = make_pool()
    pool.apply(Scan([credential("a"), credential("b", disabled=True)], []))
    assert state_of(fail(pool, "a", Verdict.PATH)) is State.READY


def test_only_the_ways_part_is_taken_back() -> None:
    pool, _ = make_pool("a", "b")
    fail(pool, "a", Verdict.PATH)
    named(pool, "a").hold(Cause.LIMIT, NOW + HOUR)
    fail(pool, "b", Verdict.PATH)
    assert named(pool, "a").holds == {Cause.LIMIT: NOW + HOUR}
    assert state_of(named(pool, "a")) is State.COOLING


# -- logins ------------------------------------------------------------------------------


def test_new_tokens_end_no_cooldown_but_that_of_the_refused_token() -> None:
    pool, _ = make_pool("a")
    account = fail(pool, "a", Verdict.UNAUTHORIZED)
    assert account.cooling_cause() is Cause.REJECTED
    pool.refreshed(account)
    assert state_of(account) is State.READY
    lease = take(pool, "a")
    lease.failed(failure(Verdict.UNAUTHORIZED))
    account.hold(Cause.LIMIT, NOW + HOUR)
    pool.refreshed(account)
    assert state_of(account) is State.COOLING
    assert account.holds == {Cause.LIMIT: NOW + HOUR}


def test_a_lost_login_serves_to_the_end_of_its_token() -> None:
    pool, clock = make_pool("a")
    account = named(pool, "a")
    pool.login_lost(account, "refresh_token_reused")
    assert pool.pick(WANT).account is account
    clock.advance(DAY)
    assert isinstance(refused(pool), PoolEmpty)
    assert account.reason() == "refresh_token_reused"
    pool.refreshed(account)
    account.credential.expires_at = None
    assert pool.pick(WANT).account is account


def test_a_refused_token_with_a_lost_login_needs_a_login() -> None:
    pool, _ = make_pool("a")
    account = named(pool, "a")
    pool.login_lost(account, "invalid_grant")
    pool.reject(account)
    assert state_of(account) is State.NEEDS_LOGIN


# -- files -------------------------------------------------------------------------------


def test_accounts_come_and_go_with_their_files() -> None:
    pool, _ = make_pool("a", "b")
    gone = named(pool, "a")
    lease = take(pool, "a")
    pool.apply(Scan([credential("b"), credential("c")], []))
    assert [a.alias for a in pool] == ["b", "c"]
    assert len(pool) == 2
    assert gone.removed
    assert pool.get(gone.key) is None
    # What it carries ends in peace.
    lease.ok()
    lease.release()
    assert gone.in_flight == 0


def test_a_new_login_in_the_file_is_taken_over_and_ends_no_cooldown() -> None:
    pool, _ = make_pool("a")
    account = named(pool, "a")
    pool.login_lost(account, "refresh_token_reused")
    account.hold(Cause.LIMIT, NOW + HOUR)
    pool.apply(Scan([credential("a", n=2)], []))
    assert named(pool, "a") is account
    assert account.credential.refresh.reveal() == "rt_a_2"
    assert account.login_lost == ""
    assert account.holds == {Cause.LIMIT: NOW + HOUR}


def test_a_file_that_shows_a_spent_token_is_behind() -> None:
    pool, _ = make_pool("a")
    account = named(pool, "a")
    spent = account.credential
    account.credential = credential("a", n=1, superseded=frozenset({spent.refresh.digest()}))
    assert not pool.adopt(account, credential("a", n=0))
    assert account.credential.refresh.reveal() == "rt_a_1"
    # Seen again in its file, the newer one still knows what it replaced.
    assert not pool.adopt(account, credential("a", n=1))
    assert not pool.adopt(account, credential("a", n=0))
    assert account.credential.refresh.reveal() == "rt_a_1"


def test_an_access_token_that_no_file_took_is_not_given_up_for_the_older_one() -> None:
    pool, _ = make_pool("a")
    account = named(pool, "a")
    account.credential = credential("a", refresh="rt_same", n=1)
    account.unsaved = True
    assert not pool.adopt(account, credential("a", refresh="rt_same", n=0, ends=NOW - 1))
    assert account.credential.expires_at == NOW + DAY
    assert account.unsaved


def test_what_its_owner_wants_counts_while_its_token_is_exchanged() -> None:
    pool, _ = make_pool("a", "b")
    account = named(pool, "a")
    account.refreshing = object()  # type: ignore[assignment]
    pool.apply(Scan([credential("a", disabled=True), credential("b")], []))
    assert account.state is State.DISABLED
    pool.apply(Scan([credential("b")], []))
    assert pool.get(account.key) is None
    assert account.removed


def test_a_spent_token_stays_spent_whatever_the_file_said_meanwhile() -> None:
    pool, _ = make_pool("a")
    account = named(pool, "a")
    spent = account.credential.refresh.digest()
    account.credential.superseded = frozenset({"older"})
    pool.apply(Scan([credential("a", n=5)], []))
    assert account.credential.refresh.reveal() == "rt_a_5"
    assert account.credential.superseded >= {"older"}
    assert spent not in account.credential.superseded


@pytest.mark.parametrize("path", ["/nowhere/a.json", "/nowhere"])
def test_a_file_that_cannot_be_read_now_costs_nothing_that_is_known(path: str) -> None:
    pool, _ = make_pool("a")
    account = named(pool, "a")
    account.hold(Cause.LIMIT, NOW + HOUR)
    problem = Problem(Path(path), "not JSON: half a file")
    pool.apply(Scan([], [problem]))
    assert pool.get(account.key) is account
    assert pool.problems == [problem]
    pool.apply(Scan([credential("a")], []))
    assert named(pool, "a") is account
    assert state_of(account) is State.COOLING


@pytest.mark.parametrize(
    "problem",
    [
        Problem(Path("/nowhere/a.json"), "the same account as b.json", is_final=True),
        Problem(Path("/nowhere/a.json"), "alias is left out", skipped=False),
        Problem(Path("/nowhere/other.json"), "not JSON"),
    ],
)
def test_an_account_goes_when_its_file_says_so(problem: Problem) -> None:
    pool, _ = make_pool("a")
    pool.apply(Scan([], [problem]))
    assert len(pool) == 0


def test_an_account_is_switched_off_and_on_in_its_file() -> None:
    pool, _ = make_pool("a")
    account = named(pool, "a")
    account.hold(Cause.LIMIT, NOW + HOUR)
    pool.apply(Scan([credential("a", disabled=True)], []))
    assert state_of(account) is State.DISABLED
    assert isinstance(refused(pool), PoolEmpty)
    pool.apply(Scan([credential("a")], []))
    assert state_of(account) is State.COOLING


def test_an_alias_follows_the_file_and_goes_back_to_the_default() -> None:
    pool, _ = make_pool("a")
    account = named(pool, "a")
    pool.apply(Scan([credential("a", alias="work")], []))
    assert account.alias == "work"
    pool.apply(Scan([credential("a", alias=None)], []))
    assert account.alias == f"acct-{account.key[:8]}"


def test_no_two_accounts_are_called_the_same_and_names_do_not_move() -> None:
    pool, _ = make_pool()
    scan = Scan([credential("a", alias="work"), credential("b", alias="work")], [])
    for _ in range(3):
        pool.apply(scan)
        assert sorted(a.alias for a in pool) == ["work", "work-2"]
        assert pool.get(scan.credentials[0].key) is named(pool, "work")


def test_a_plan_is_known_from_the_token() -> None:
    pool, _ = make_pool()
    pool.apply(Scan([credential("a")], []))
    assert named(pool, "a").quota.plan is None


def test_an_account_is_found_by_the_start_of_its_identity() -> None:
    pool, _ = make_pool("a", "b")
    account = named(pool, "b")
    assert pool.by_tag(account.key[:12]) is account
    assert pool.by_tag("") is None
    assert pool.by_tag("zzz") is None


def test_each_change_of_state_is_one_line(caplog: pytest.LogCaptureFixture) -> None:
    pool, clock = make_pool("a", "b")
    with caplog.at_level(logging.INFO, logger="codex_proxy.accounts.pool"):
        fail(pool, "a", Verdict.LIMITED, retry_after=30)
        clock.advance(30)
        pool.accounts()
        pool.accounts()
    assert [record.getMessage() for record in caplog.records] == [
        "account state alias=a from=ready to=cooling reason=rate limit seconds=30",
        "account state alias=a from=cooling to=ready reason=- seconds=0",
    ]


# -- the pool's own quota ----------------------------------------------------------------


def test_nothing_known_is_nothing_said() -> None:
    pool, _ = make_pool("a")
    assert pool.pool_limits() is None


def test_the_pools_quota_is_the_mean_and_its_reset_the_earliest() -> None:
    pool, _ = make_pool("a", "b", "c")
    for user, used, week, reset in (("a", 98.0, 10.0, 3000.0), ("b", 20.0, 50.0, 1000.0)):
        family = named(pool, user).quota.family("codex")
        family.primary = Window(used, 300, NOW + reset, NOW, "headers")
        family.secondary = Window(week, 10_080, NOW + reset * 10, NOW, "headers")
    limits = pool.pool_limits()
    assert limits is not None
    assert limits["type"] == "codex.rate_limits"
    assert limits["plan_type"] is None
    assert limits["credits"] is None
    assert limits["rate_limits"] == {
        "allowed": True,
        "limit_reached": False,
        "primary": {
            "used_percent": 59,
            "window_minutes": 300,
            "reset_at": int(NOW + 1000),
            "reset_after_seconds": 1000,
        },
        "secondary": {
            "used_percent": 30,
            "window_minutes": 10_080,
            "reset_at": int(NOW + 10_000),
            "reset_after_seconds": 10_000,
        },
    }


def test_randomness_is_passed_in() -> None:
    one, other = Pool(ManualClock(NOW), rng=Middle()), Pool(ManualClock(NOW))
    assert one._rng.random() == 0.5
    assert 0.0 <= other._rng.random() < 1.0


def test_an_account_is_found_by_the_name_that_it_has_now() -> None:
    pool, _ = make_pool("a", "b")
    first, second = named(pool, "a"), named(pool, "b")
    pool.apply(Scan([credential("a", alias="x"), credential("b", alias="x")], []))
    assert pool.by_alias("x") is first
    assert pool.by_alias("x-2") is second
    assert pool.by_alias("a") is pool.by_alias("b") is None
    pool.apply(Scan([credential("b", alias="x")], []))
    assert pool.by_alias("x") is second
    assert pool.by_alias("x-2") is None


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0, "1 min"), (59, "1 min"), (61, "2 min"), (3600, "1 h"), (3601, "1 h 1 min"), (7 * 3600 + 1800, "7 h 30 min"),
     (86_400, "1 d"), (6 * 86_400 + 5 * 3600, "6 d 5 h")],
)  # fmt: skip
def test_a_pool_at_its_limit_says_in_words_when_it_is_free(seconds: float, words: str) -> None:
    pool, _ = make_pool("a")
    fail(pool, "a", Verdict.EXHAUSTED, resets_at=NOW + seconds)
    with pytest.raises(PoolExhausted) as caught:
        pool.pick(WANT)
    assert caught.value.message.endswith(f"the first is free again in {words}")
