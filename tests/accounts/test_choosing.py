"""Who may serve a request, who may not, and how the pool tells why."""

import asyncio
from typing import Any

import pytest

from codex_proxy.accounts.account import TRIAL_SECONDS, Cause, Login
from codex_proxy.accounts.affinity import digest
from codex_proxy.accounts.pool import Lease, Pool, Rule, Want
from codex_proxy.accounts.scheduler import STRATEGIES
from codex_proxy.accounts.state import State
from codex_proxy.accounts.store import Scan
from codex_proxy.accounts.tokens import Identity
from codex_proxy.clock import ManualClock
from codex_proxy.config import Settings
from codex_proxy.errors import (
    PoolBusy,
    PoolEmpty,
    PoolError,
    PoolExhausted,
    PoolShortage,
    RequestError,
    Verdict,
)
from codex_proxy.patterns import fits
from codex_proxy.trace import Attempt, Caller, Decision, Trace, Usage, UsageSource
from tests.accounts.making import DAY, HOUR, NOW, credential, failure, make_pool, named

WANT = Want("gpt-5.5")


def pool_of(*credentials: Any, **settings: Any) -> tuple[Pool, ManualClock]:
    pool, clock = make_pool()
    pool.apply_settings(Settings(strategy="quota-balance", **settings))
    pool.apply(Scan(list(credentials), []))
    return pool, clock


def take(pool: Pool, want: Want = WANT, *, but: tuple[str, ...] = ()) -> Lease:
    return pool.pick(want, {named(pool, user).key for user in but})


def served(pool: Pool, count: int, want: Want = WANT) -> list[str]:
    """Serve *count* requests, one after the other, and say who did."""
    names = []
    for _ in range(count):
        lease = pool.pick(want)
        lease.ok()
        lease.release()
        names.append(lease.account.alias)
    return names


def limit(pool: Pool, user: str, seconds: float = HOUR) -> None:
    key = named(pool, user).key
    lease = pool.pick(WANT, {a.key for a in pool if a.key != key})
    lease.failed(failure(Verdict.EXHAUSTED, resets_at=NOW + seconds))
    lease.release()


# -- what the file of an account says ------------------------------------------------------


def test_a_lesser_priority_serves_only_while_no_better_one_can() -> None:
    pool, _ = pool_of(credential("a", priority=5), credential("b"), credential("c", priority=5))
    assert set(served(pool, 6)) == {"b"}
    limit(pool, "b")
    assert set(served(pool, 6)) == {"a", "c"}


def test_a_conversation_stays_where_it_is_when_a_better_priority_comes_back() -> None:
    pool, clock = pool_of(credential("a"), credential("b", priority=1))
    limit(pool, "a", 60.0)
    talk = Want("gpt-5.5", session="talk")
    assert served(pool, 2, talk) == ["b", "b"]
    clock.advance(61.0)
    assert served(pool, 2, talk) == ["b", "b"]
    assert served(pool, 2) == ["a", "a"]


def test_an_account_serves_only_the_models_that_its_file_allows() -> None:
    pool, _ = pool_of(
        credential("a", models_allowed=("gpt-5*",)), credential("b", models_denied=("*mini*", "gpt-6"))
    )
    assert set(served(pool, 4, Want("gpt-5-mini"))) == {"a"}
    assert set(served(pool, 4, Want("gpt-6.1-sol"))) == {"b"}
    assert set(served(pool, 4, Want("gpt-5.5"))) == {"a", "b"}
    with pytest.raises(RequestError) as caught:
        pool.pick(Want("gpt-6"))
    assert (caught.value.status, caught.value.param) == (400, "model")


@pytest.mark.parametrize(
    ("pattern", "name", "fit"),
    [
        ("gpt-5", "gpt-5", True),
        ("gpt-5", "gpt-5.5", False),
        ("GPT-*", "gpt-5.5", True),
        ("*", "", True),
        ("*sol", "gpt-6-sol", True),
        ("*sol", "gpt-6-sol-x", False),
        ("a*b*c", "a-b-b-c", True),
        ("a*b*c", "ac", False),
        ("ab*ba", "aba", False),
        ("[a]*", "a", False),
        ("a**b", "ab", True),
    ],
)
def test_a_star_stands_for_anything_and_nothing_else_is_special(pattern: str, name: str, fit: bool) -> None:
    assert fits(pattern, name) is fit


def test_an_account_carries_no_more_than_it_may() -> None:
    pool, _ = pool_of(credential("a", max_concurrency=1), credential("b", max_concurrency=2))
    leases = [take(pool) for _ in range(3)]
    assert sorted(lease.account.alias for lease in leases) == ["a", "b", "b"]
    with pytest.raises(PoolBusy):
        take(pool)
    next(lease for lease in leases if lease.account.alias == "a").release()
    assert take(pool).account.alias == "a"


def test_the_settings_limit_every_account_whose_file_does_not() -> None:
    pool, _ = pool_of(credential("a"), credential("b", max_concurrency=0), max_concurrency=1)
    leases = [take(pool) for _ in range(5)]
    assert [lease.account.alias for lease in leases].count("a") == 1
    pool.apply_settings(Settings(strategy="quota-balance", max_concurrency=3))
    assert {take(pool, but=("b",)).account.alias for _ in range(2)} == {"a"}
    with pytest.raises(PoolBusy):
        take(pool, but=("b",))


def test_a_request_that_is_tried_in_vain_everywhere_is_not_told_to_wait_for_a_place() -> None:
    pool, _ = pool_of(credential("a", max_concurrency=1))
    lease = take(pool)
    with pytest.raises(PoolShortage) as caught:
        take(pool, but=("a",))
    assert not isinstance(caught.value, PoolBusy)
    lease.release()


# -- places --------------------------------------------------------------------------------


async def test_a_place_goes_to_whoever_asked_first() -> None:
    pool, _ = pool_of(credential("a", max_concurrency=1))
    lease = take(pool)
    order: list[str] = []

    async def wait(name: str, ticket: float) -> None:
        await pool.wait_for_place(WANT, (), seconds=60.0, ticket=ticket)
        order.append(name)

    late, early = asyncio.ensure_future(wait("late", 2.0)), asyncio.ensure_future(wait("early", 1.0))  # noqa: TID251
    await asyncio.sleep(0)
    lease.release()
    await early
    assert order == ["early"]
    take(pool).release()
    await late
    assert order == ["early", "late"]


async def test_nobody_waits_longer_than_asked() -> None:
    pool, _ = pool_of(credential("a", max_concurrency=1))
    await pool.wait_for_place(WANT, (), seconds=0.01, ticket=1.0)


async def test_a_place_is_not_lost_to_one_who_has_left() -> None:
    pool, _ = pool_of(credential("a", max_concurrency=1))
    lease = take(pool)
    left = asyncio.ensure_future(pool.wait_for_place(WANT, (), seconds=60.0, ticket=1.0))  # noqa: TID251
    stays = asyncio.ensure_future(pool.wait_for_place(WANT, (), seconds=60.0, ticket=2.0))  # noqa: TID251
    await asyncio.sleep(0)
    left.cancel()
    await asyncio.sleep(0)
    lease.release()
    await asyncio.wait_for(stays, 1.0)


async def test_a_place_that_came_as_its_caller_left_goes_to_the_next() -> None:
    pool, _ = pool_of(credential("a", max_concurrency=1))
    lease = take(pool)
    left = asyncio.ensure_future(pool.wait_for_place(WANT, (), seconds=60.0, ticket=1.0))  # noqa: TID251
    stays = asyncio.ensure_future(pool.wait_for_place(WANT, (), seconds=60.0, ticket=2.0))  # noqa: TID251
    await asyncio.sleep(0)
    lease.release()
    left.cancel()
    await asyncio.wait_for(stays, 1.0)


async def test_a_new_account_is_room_for_those_who_wait() -> None:
    pool, _ = pool_of(credential("a", max_concurrency=1))
    waits = asyncio.ensure_future(pool.wait_for_place(WANT, (), seconds=60.0, ticket=1.0))  # noqa: TID251
    await asyncio.sleep(0)
    pool.apply(Scan([credential("a", max_concurrency=1), credential("b")], []))
    await asyncio.wait_for(waits, 1.0)


async def test_those_who_wait_are_told_of_what_is_good_for_them_and_of_nothing_else() -> None:
    pool, _ = pool_of(
        credential("a", max_concurrency=1, models_allowed=("m-a",)),
        credential("b", max_concurrency=1, models_allowed=("m-b",)),
    )
    of_a, of_b = pool.pick(Want("m-a")), pool.pick(Want("m-b"))
    first = asyncio.ensure_future(pool.wait_for_place(Want("m-a"), (), seconds=60.0, ticket=1.0))  # noqa: TID251
    second = asyncio.ensure_future(pool.wait_for_place(Want("m-b"), (), seconds=60.0, ticket=2.0))  # noqa: TID251
    await asyncio.sleep(0)
    of_b.release()
    await asyncio.wait_for(second, 1.0)
    assert not first.done()
    of_a.release()
    await asyncio.wait_for(first, 1.0)


async def test_a_change_of_the_settings_makes_everybody_look_once() -> None:
    pool, _ = pool_of(credential("a", max_concurrency=1))
    lease = take(pool)
    looks = 0

    async def wait(ticket: float) -> None:
        nonlocal looks
        for _ in range(2):
            await pool.wait_for_place(WANT, (), seconds=0.2, ticket=ticket)
            looks += 1

    waits = [asyncio.ensure_future(wait(float(number))) for number in range(5)]  # noqa: TID251
    await asyncio.sleep(0)
    pool.apply_settings(Settings(strategy="quota-balance"))
    for _ in range(50):
        await asyncio.sleep(0)
    assert looks == 5, "they wake each other"
    lease.release()
    await asyncio.gather(*waits)


async def test_those_who_give_up_leave_nothing_behind() -> None:
    pool, _ = pool_of(credential("a", max_concurrency=1))
    take(pool)
    await asyncio.gather(*(pool.wait_for_place(WANT, (), seconds=0.0, ticket=float(n)) for n in range(50)))
    assert pool._waiting == []


# -- after a rest --------------------------------------------------------------------------


def test_after_a_rest_one_request_goes_ahead() -> None:
    pool, clock = pool_of(credential("a"))
    limit(pool, "a")
    clock.advance(HOUR + 1)
    first = take(pool)
    with pytest.raises(PoolBusy):
        take(pool)
    first.ok()
    assert [take(pool).account.alias for _ in range(3)] == ["a"] * 3


def test_a_trial_that_fails_does_not_hurt_the_others() -> None:
    pool, clock = pool_of(credential("a"), credential("b"))
    limit(pool, "a")
    clock.advance(HOUR + 1)
    trial = take(pool, but=("b",))
    assert served(pool, 5) == ["b"] * 5
    trial.failed(failure(Verdict.EXHAUSTED, resets_at=NOW + 3 * HOUR))
    trial.release()
    assert named(pool, "a").state is State.COOLING


def test_a_trial_whose_caller_left_is_taken_up_by_the_next() -> None:
    pool, clock = pool_of(credential("a"))
    limit(pool, "a")
    clock.advance(HOUR + 1)
    take(pool).release()
    assert take(pool).account.alias == "a"


def test_a_trial_that_shows_nothing_holds_the_others_up_for_a_moment_only() -> None:
    pool, clock = pool_of(credential("a"))
    limit(pool, "a")
    clock.advance(HOUR + 1)
    take(pool)
    clock.advance(TRIAL_SECONDS)
    assert take(pool).account.alias == "a"


def test_a_trial_is_over_with_the_first_answer_however_late_that_begins() -> None:
    pool, clock = pool_of(credential("a"))
    limit(pool, "a")
    clock.advance(HOUR + 1)
    first = take(pool)
    clock.advance(TRIAL_SECONDS)
    leases = [take(pool) for _ in range(5)]
    clock.advance(5.0)
    first.ok()
    assert not named(pool, "a").on_trial
    assert len(leases) == 5


def test_a_trial_is_waited_for_even_without_a_queue() -> None:
    pool, clock = pool_of(credential("a"), queue_timeout=0.0)
    limit(pool, "a")
    clock.advance(HOUR + 1)
    take(pool)
    clock.advance(4.0)
    with pytest.raises(PoolBusy, match="one request is finding out") as caught:
        take(pool)
    assert caught.value.patience == TRIAL_SECONDS
    assert caught.value.retry_after == 5.0


def test_a_conversation_waits_a_moment_for_its_own_account_on_trial() -> None:
    pool, clock = pool_of(credential("a"), credential("b"))
    talk = Want("gpt-5.5", session="talk", tokens=100_000)
    take(pool, talk, but=("b",)).ok()
    limit(pool, "a", 60.0)
    clock.advance(61.0)
    take(pool, but=("b",))
    with pytest.raises(PoolBusy) as caught:
        pool.pick(talk)
    assert 0 < caught.value.retry_after <= 2.0
    clock.advance(2.0)
    assert pool.pick(talk).account.alias == "b"


def test_quota_that_comes_back_early_ends_the_rest_at_once() -> None:
    pool, _ = pool_of(credential("a"))
    limit(pool, "a", 3 * DAY)
    pool.relieve(named(pool, "a"))
    assert named(pool, "a").state is State.READY
    lease = take(pool)
    with pytest.raises(PoolBusy):
        take(pool)
    lease.ok()
    assert served(pool, 1) == ["a"]


def test_quota_that_comes_back_ends_no_other_rest() -> None:
    pool, _ = pool_of(credential("a"))
    limit(pool, "a", 3 * DAY)
    account = named(pool, "a")
    account.hold(Cause.FORBIDDEN, NOW + 60)
    pool.relieve(account)
    assert (account.state, account.cooling_cause()) == (State.COOLING, Cause.FORBIDDEN)


def test_a_reset_forgets_all_that_keeps_an_account_from_serving() -> None:
    pool, _ = pool_of(credential("a"))
    account = named(pool, "a")
    account.quota.read_headers(
        {"x-codex-primary-used-percent": "100", "x-codex-primary-window-minutes": "300"}, NOW
    )
    limit(pool, "a", 3 * DAY)
    account.refusals[WANT.refusal] = NOW + HOUR
    account.unavailable_until = NOW + HOUR
    pool.reset(account)
    assert account.state is State.READY
    assert account.left(NOW, None) is None
    assert served(pool, 2) == ["a", "a"]


def test_a_reset_does_not_undo_what_the_owner_wants() -> None:
    pool, _ = pool_of(credential("a", disabled=True))
    pool.reset(named(pool, "a"))
    assert named(pool, "a").state is State.DISABLED


# -- conversations -------------------------------------------------------------------------


def test_an_account_that_could_not_serve_is_left_without_being_forgotten() -> None:
    pool, clock = pool_of(credential("a"), credential("b"), credential("c"))
    talk = Want("gpt-5.5", session="talk")
    home = pool.pick(talk, {named(pool, "b").key, named(pool, "c").key})
    home.ok()
    home.release()
    limit(pool, "a", 60.0)
    away = served(pool, 1, talk)[0]
    clock.advance(61.0)
    # The cache is there now; the first home is the next best place.
    assert served(pool, 1, talk) == [away]
    limit(pool, away, 600.0)
    assert served(pool, 1, talk) == ["a"]


def test_a_conversation_that_had_to_leave_its_account_is_told_as_such() -> None:
    for few in (0, 32):
        pool, _ = pool_of(credential("a"), credential("b"), credential("c"))
        pool.few = few
        talk = Want("gpt-5.5", session="talk")
        first = pool.pick(talk, ())
        assert "cannot serve" not in first.decision.rule
        first.ok()
        first.release()
        again = pool.pick(talk, ())
        assert (again.decision.alias, again.decision.rule) == (first.decision.alias, "conversation")
        again.release()
        limit(pool, first.decision.alias, 600.0)
        away = pool.pick(talk, ())
        assert away.decision.rule.endswith(", its own cannot serve"), few
        away.release()


def test_without_affinity_every_request_goes_anew() -> None:
    pool, _ = pool_of(credential("a"), credential("b"), session_affinity=False)
    assert set(served(pool, 6, Want("gpt-5.5", session="talk"))) == {"a", "b"}
    pool.apply_settings(Settings(strategy="quota-balance"))
    assert len(set(served(pool, 6, Want("gpt-5.5", session="talk"))[1:])) == 1


def test_a_conversation_is_remembered_as_long_as_the_settings_say() -> None:
    pool, clock = pool_of(credential("a"), credential("b"), session_affinity_ttl=100.0)
    talk = Want("gpt-5.5", session="talk")
    home = served(pool, 1, talk)[0]
    clock.advance(99.0)
    assert served(pool, 1, talk) == [home]
    clock.advance(101.0)
    assert pool.affinity.homes("talk", clock.now()) == ()


def test_foreign_reasoning_is_looked_for_only_where_it_may_be() -> None:
    pool, _ = pool_of(credential("a"), credential("b"))
    talk = Want("gpt-5.5", session="talk")
    first = take(pool, talk, but=("b",))
    assert first.has_moved
    first.ok()
    assert not take(pool, talk).has_moved
    assert take(pool, talk, but=("a",)).has_moved


def test_what_another_workspace_issued_cannot_be_read() -> None:
    kin = Identity("user-k", "acc-a")
    pool, _ = pool_of(credential("a"), credential("b"), credential("k", identity=kin))
    a, b, k = named(pool, "a"), named(pool, "b"), named(pool, "k")
    pool.wrote(a, "thought", is_history=False)
    assert [pool.cannot_read(one, "thought") for one in (a, b, k)] == [False, True, False]
    assert not pool.cannot_read(b, "of unknown origin")


def test_reasoning_of_another_account_is_looked_for_under_any_name_of_the_conversation() -> None:
    pool, _ = pool_of(credential("a"), credential("b"))
    pool.wrote(named(pool, "a"), "old thought", is_history=False)
    fork = Want("gpt-5.5", session="fork", encrypted=("old thought",))
    first = take(pool, fork, but=("a",))
    assert first.has_moved
    first.ok()
    pool.wrote(named(pool, "b"), "new thought", is_history=False)
    assert take(pool, Want("gpt-5.5", session="fork", encrypted=("old thought", "new thought"))).has_moved
    assert not take(pool, Want("gpt-5.5", session="fork", encrypted=("new thought",))).has_moved


def test_a_new_plan_undoes_what_the_old_one_lacked() -> None:
    pool, _ = pool_of(credential("a"))
    account = named(pool, "a")
    take(pool).failed(failure(Verdict.UNENTITLED, status=402))
    account.refuse(WANT.refusal, NOW + HOUR, NOW)
    assert account.state is State.UNAVAILABLE
    pool.plan_changed(account)
    assert served(pool, 1) == ["a"]


def test_a_new_plan_in_an_answer_counts_at_once() -> None:
    pool, _ = pool_of(credential("a"))
    account = named(pool, "a")
    for plan, lacks in (("free", True), ("free", True), ("plus", False)):
        pool.read_headers(account, {"x-codex-plan-type": plan})
        if lacks:
            account.refuse(WANT.refusal, NOW + HOUR, NOW)
        assert account.lacks(WANT.refusal, NOW) is lacks
    account.refuse(WANT.refusal, NOW + HOUR, NOW)
    pool.read_event(account, {"type": "codex.rate_limits", "plan_type": "plus", "rate_limits": {}})
    pool.read_event(account, {"type": "codex.rate_limits", "plan_type": "pro", "rate_limits": {}})
    assert not account.lacks(WANT.refusal, NOW)


def test_the_limit_of_a_family_ends_by_its_own_numbers() -> None:
    pool, _ = pool_of(credential("a"))
    account = named(pool, "a")
    account.family_holds = {"x": NOW + DAY, "y": NOW + DAY}
    pool.relieve(account, "x")
    assert account.family_holds == {"y": NOW + DAY}


# -- compacted history ---------------------------------------------------------------------


HISTORY = Want("gpt-5.5", compacted=("history",))


def historians(**of_a: Any) -> tuple[Pool, ManualClock]:
    pool, clock = pool_of(credential("a", **of_a), credential("b"), credential("c"))
    pool.wrote(named(pool, "a"), "history", is_history=True)
    return pool, clock


def test_history_goes_to_the_account_that_wrote_it() -> None:
    pool, clock = historians()
    assert served(pool, 5, HISTORY) == ["a"] * 5
    clock.advance(400 * DAY)
    assert pool.owners.get(digest("history")) is not None


def test_history_waits_for_its_owner_and_says_how_long() -> None:
    pool, _ = historians()
    limit(pool, "a", 2 * HOUR)
    with pytest.raises(PoolExhausted) as caught:
        pool.pick(HISTORY)
    assert caught.value.resets_at == NOW + 2 * HOUR
    assert caught.value.is_for_history


def test_history_may_be_read_by_another_account_of_its_workspace() -> None:
    pool, _ = pool_of(credential("a"), credential("b"), credential("k", identity=Identity("user-k", "acc-a")))
    pool.wrote(named(pool, "a"), "history", is_history=True)
    limit(pool, "a", 2 * HOUR)
    lease = pool.pick(HISTORY)
    assert (lease.account.alias, lease.why) == ("k", "workspace of the compacted history")


def test_history_waits_for_whoever_of_its_workspace_is_back_first() -> None:
    kin = Identity("user-k", "acc-a")
    pool, clock = pool_of(credential("a"), credential("b"), credential("k", identity=kin))
    pool.wrote(named(pool, "a"), "history", is_history=True)
    limit(pool, "a", 5 * DAY)
    named(pool, "k").hold(Cause.OVERLOAD, NOW + 2)
    with pytest.raises(PoolShortage) as caught:
        pool.pick(HISTORY)
    assert caught.value.retry_after == 2.0
    # The same when the owner is gone, or switched off.
    pool.apply(Scan([credential("b"), credential("k", identity=kin)], []))
    with pytest.raises(PoolShortage):
        pool.pick(HISTORY)
    pool.apply(Scan([credential("a", disabled=True), credential("b"), credential("k", identity=kin)], []))
    with pytest.raises(PoolShortage):
        pool.pick(HISTORY)
    clock.advance(3.0)
    assert pool.pick(HISTORY).account.alias == "k"


def test_history_of_an_unknown_owner_waits_for_one_that_has_not_been_asked() -> None:
    pool, _ = pool_of(credential("a"), credential("b"))
    limit(pool, "a", 2 * HOUR)
    with pytest.raises(PoolError) as caught:
        take(pool, Want("gpt-5.5", compacted=("unknown",)), but=("b",))
    assert caught.value.is_for_history


def test_history_whose_owner_is_gone_is_a_clear_refusal() -> None:
    pool, _ = historians()
    pool.apply(Scan([credential("b"), credential("c")], []))
    with pytest.raises(RequestError) as caught:
        pool.pick(HISTORY)
    assert (caught.value.status, caught.value.param, caught.value.code) == (
        400,
        "input",
        "compaction_owner_gone",
    )


def test_history_whose_owner_needs_help_says_so() -> None:
    pool, _ = historians()
    account = named(pool, "a")
    pool.apply(Scan([credential("a", disabled=True), credential("b"), credential("c")], []))
    assert account.state is State.DISABLED
    with pytest.raises(PoolEmpty, match="account a only"):
        pool.pick(HISTORY)


def test_history_whose_owner_was_tried_in_vain_does_not_promise_that_waiting_helps() -> None:
    pool, _ = historians()
    with pytest.raises(PoolShortage) as caught:
        take(pool, HISTORY, but=("a",))
    assert not caught.value.is_for_history


def test_history_of_an_unknown_owner_is_tried_where_its_conversation_has_lived_and_beside() -> None:
    kin = Identity("user-k", "acc-a")
    pool, _ = pool_of(credential("a"), credential("b"), credential("c"), credential("k", identity=kin))
    take(pool, Want("gpt-5.5", session="talk"), but=("b", "c", "k")).ok()
    lost = Want("gpt-5.5", session="talk", compacted=("unknown",))
    assert take(pool, lost).account.alias == "a"
    # As after a refusal: the home has been tried, so nobody knows where it lived.
    lease = take(pool, lost, but=("a",))
    assert lease.account.alias in {"b", "c", "k"}
    lease.ok()
    assert served(pool, 3, lost) == [lease.account.alias] * 3


# -- why -----------------------------------------------------------------------------------


def test_a_choice_tells_who_was_left_out_and_why() -> None:
    pool, _ = pool_of(
        credential("a"),
        credential("b", disabled=True),
        credential("c", models_denied=("gpt-5.5",)),
        credential("d", max_concurrency=1),
        credential("e", priority=3),
    )
    limit(pool, "a")
    pool.pick(WANT, {named(pool, u).key for u in "abce"})
    decision = take(pool).decision
    assert (decision.alias, decision.strategy) == ("e", "quota-balance")
    told = {one.alias: (one.rule, one.evidence) for one in decision.excluded}
    assert told["a"][0] == Rule.COOLING.value
    assert "usage limit, 1 h left" in told["a"][1]
    assert told["b"][0] == Rule.DISABLED.value
    assert told["c"][0] == Rule.NOT_ALLOWED.value
    assert told["d"] == (Rule.BUSY.value, "1 in flight")
    assert dict(decision.counts)[Rule.COOLING.value] == 1


def test_the_scores_of_the_default_strategy_are_told_best_first() -> None:
    pool, _ = make_pool()
    pool.apply_settings(Settings())
    pool.apply(Scan([credential(f"u{number}") for number in range(20)], []))
    decision = pool.pick(WANT).decision
    assert decision.strategy == "horizon"
    assert decision.compared == 20
    assert len(decision.candidates) == 5
    scores = [one.score for one in decision.candidates]
    assert scores == sorted(scores, reverse=True)
    assert decision.candidates[0].alias == decision.alias
    assert all(one.parts for one in decision.candidates)


def test_a_choice_that_finds_nobody_tells_why_too() -> None:
    pool, _ = pool_of(*(credential(f"u{number}") for number in range(30)))
    for number in range(30):
        limit(pool, f"u{number}")
    with pytest.raises(PoolExhausted) as caught:
        take(pool)
    decision = caught.value.decision
    assert isinstance(decision, Decision)
    assert decision.alias == ""
    assert dict(decision.counts) == {Rule.COOLING.value: 30}
    assert len(decision.excluded) < 30


def test_every_strategy_that_the_settings_name_is_there_and_can_be_changed_to() -> None:
    pool, _ = pool_of(credential("a"), credential("b"))
    for name in STRATEGIES:
        pool.apply_settings(Settings(strategy=name))
        assert pool.strategy_name == name
        assert set(served(pool, 8)) <= {"a", "b"}


def test_a_strategy_that_stays_keeps_what_it_has_learned() -> None:
    pool, _ = pool_of(credential("a"))
    strategy = pool._strategy
    pool.apply_settings(Settings(strategy="quota-balance", max_concurrency=3))
    assert pool._strategy is strategy


def test_a_bare_429_is_what_the_accounts_own_numbers_say() -> None:
    pool, _ = pool_of(credential("a"), credential("b"))
    for user, used in (("a", "100"), ("b", "60")):
        pool.read_headers(
            named(pool, user),
            {
                "x-codex-primary-used-percent": used,
                "x-codex-primary-window-minutes": "300",
                "x-codex-primary-reset-after-seconds": "7000",
            },
        )
        bare = failure(Verdict.LIMITED, status=429, code=None)
        lease = take(pool, but=("b",) if user == "a" else ("a",))
        lease.failed(bare)
    assert named(pool, "a").holds == {Cause.LIMIT: NOW + 7000}
    assert set(named(pool, "b").holds) == {Cause.RATE}


# -- numbers -------------------------------------------------------------------------------


def turn(
    alias: str, binding: str, *, tokens: int, cached: int, source: UsageSource = UsageSource.BACKEND
) -> Trace:
    trace = Trace("id", "responses", Caller("c", "c"), 0.0, NOW)
    trace.attempts.append(Attempt(alias, 0.0, "ok"))
    trace.alias, trace.binding = alias, binding
    trace.usage = Usage(tokens, cached, 0, 10, 0, source)
    return trace


def test_cached_tokens_are_counted_by_account_and_by_what_conversations_were_known_by() -> None:
    pool, _ = pool_of(credential("a"), credential("b"))
    pool.count_turn(turn("a", "prompt_cache_key", tokens=100, cached=90))
    pool.count_turn(turn("a", "", tokens=100, cached=0))
    pool.count_turn(turn("b", "prompt_cache_key", tokens=50, cached=10))
    pool.count_turn(turn("nobody", "", tokens=50, cached=10))
    pool.count_turn(turn("b", "", tokens=0, cached=0, source=UsageSource.NONE))
    assert (named(pool, "a").usage.input_tokens, named(pool, "a").usage.cached_tokens) == (200, 90)
    assert (named(pool, "a").completions, named(pool, "b").completions) == (2, 1)
    known = pool.bindings["prompt_cache_key"]
    assert (known.turns, known.usage.input_tokens, known.usage.cached_tokens) == (2, 150, 100)
    assert pool.bindings[""].turns == 1


def test_the_kinds_of_names_are_bounded() -> None:
    pool, _ = pool_of(credential("a"))
    for number in range(1000):
        pool.count_turn(turn("a", f"kind {number}", tokens=1, cached=0))
    assert len(pool.bindings) < 40
    assert sum(group.turns for group in pool.bindings.values()) == 1000


def test_an_account_knows_whether_its_login_is_of_use() -> None:
    pool, _ = pool_of(credential("a"), credential("b", interrupted=NOW - 5))
    assert (named(pool, "a").login, named(pool, "b").login) == (Login.OK, Login.UNCERTAIN)
    assert named(pool, "b").refresh_due(0.5) == 0.0
    pool.login_lost(named(pool, "b"), "refresh_token_reused")
    assert named(pool, "b").login is Login.LOST
    assert named(pool, "b").state is State.READY
