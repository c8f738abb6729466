"""The choice among accounts that could serve."""

import math
from collections import Counter
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from codex_proxy.accounts.account import Account
from codex_proxy.accounts.pool import Pool, Want
from codex_proxy.accounts.quota import Window
from codex_proxy.accounts.scheduler import (
    STRATEGIES,
    Ask,
    Choice,
    FillFirst,
    Horizon,
    QuotaBalance,
    RoundRobin,
    Strategy,
    Weighted,
    cost_of,
    make_strategy,
)
from codex_proxy.accounts.store import Scan
from codex_proxy.clock import ManualClock
from codex_proxy.config import STRATEGIES as NAMES
from tests.accounts.making import DAY, HOUR, NOW, Middle, account, credential

WEEK = 7 * DAY


def with_left(user: str, left: float | None, *, in_flight: int = 0) -> Account:
    one = account(user)
    one.in_flight = in_flight
    if left is not None:
        one.quota.family("codex").primary = Window(100.0 - left, 300, NOW + 100, NOW, "headers")
    return one


def plus(
    user: str,
    *,
    hours_left: float = 100.0,
    hours_reset: float = 4 * HOUR,
    week_left: float = 50.0,
    week_reset: float = WEEK / 2,
    in_flight: int = 0,
    plan: str = "plus",
) -> Account:
    """Make an account with both windows running; by default its week is used at an even pace."""
    one = account(user)
    one.in_flight = in_flight
    one.quota.plan = plan
    family = one.quota.family("codex")
    family.primary = Window(100.0 - hours_left, 300, NOW + hours_reset, NOW, "headers")
    family.secondary = Window(100.0 - week_left, 10_080, NOW + week_reset, NOW, "headers")
    return one


def free(user: str, *, week_left: float, week_reset: float) -> Account:
    """Make an account that has a weekly window only, in the first place."""
    one = account(user)
    one.quota.plan = "free"
    one.quota.family("codex").primary = Window(100.0 - week_left, 10_080, NOW + week_reset, NOW, "headers")
    return one


def choose(*accounts: Account, times: int = 1) -> list[str]:
    strategy = QuotaBalance()
    return [strategy.choose(accounts, Ask(), NOW).account.alias for _ in range(times)]


def chosen(strategy: Strategy, *accounts: Account, times: int = 1) -> str:
    """Return the aliases of the accounts chosen one after another."""
    return "".join(strategy.choose(accounts, Ask(), NOW).account.alias for _ in range(times))


def by_key(*users: str) -> list[Account]:
    return sorted((account(user) for user in users), key=lambda one: one.key)


# --- all of them


def test_every_name_that_the_configuration_takes_is_a_strategy() -> None:
    assert set(STRATEGIES) == set(NAMES)
    assert all(make_strategy(name).name == name for name in NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_two_of_a_name_share_nothing(name: str) -> None:
    accounts = by_key(*"abc")
    one, other = make_strategy(name), make_strategy(name)
    first = [one.choose(accounts, Ask(), NOW).account.alias for _ in range(5)]
    assert [other.choose(accounts, Ask(), NOW).account.alias for _ in range(5)] == first


@pytest.mark.parametrize("name", sorted(set(NAMES) - {"horizon"}))
def test_a_conversation_stays_where_it_is(name: str) -> None:
    strategy = make_strategy(name)
    assert strategy.stays(Ask(home=with_left("a", 1)), NOW) == "conversation"
    assert strategy.stays(Ask(), NOW) is None


WINDOWS = st.none() | st.builds(
    Window,
    st.floats() | st.integers(-50, 250).map(float),
    st.none() | st.sampled_from([0, -5, 1, 300, 1440, 10_080, 43_200]),
    st.none() | st.floats() | st.floats(NOW - WEEK, NOW + 2 * WEEK),
    st.floats(NOW - 2 * WEEK, NOW),
    st.just("headers"),
)


@st.composite
def accounts_of_any_kind(draw: st.DrawFn) -> list[Account]:
    found: list[Account] = []
    for index in range(draw(st.integers(1, 5))):
        one = account(f"u{index}", weight=draw(st.floats() | st.sampled_from([0.0, 1.0, 5.0])))
        one.in_flight = draw(st.integers(0, 50))
        one.quota.plan = draw(st.sampled_from([None, "plus", "free"]))
        for family in ("codex", "codex_x"):
            if draw(st.booleans()):
                one.quota.family(family).primary = draw(WINDOWS)
                one.quota.family(family).secondary = draw(WINDOWS)
        found.append(one)
    return found


@pytest.mark.parametrize("name", NAMES)
@settings(deadline=None)
@given(
    accounts=accounts_of_any_kind(),
    costs=st.lists(st.floats(), max_size=4),
    tokens=st.integers(-5, 10**9),
    family=st.sampled_from([None, "codex", "codex_x", "codex_y"]),
    steps=st.floats(-DAY, WEEK),
)
def test_one_of_the_accounts_is_chosen_whatever_their_numbers_say(
    name: str, accounts: list[Account], costs: list[float], tokens: int, family: str | None, steps: float
) -> None:
    strategy = make_strategy(name)
    now = NOW
    for home in (None, accounts[-1], accounts[0]):
        ask = Ask(family, home, tokens)
        assert strategy.stays(ask, now) in (None, "conversation")
        choice = strategy.choose(accounts, ask, now)
        assert any(choice.account is one for one in accounts)
        assert choice.rule
        for score in choice.scores:
            assert math.isfinite(score.value)
            assert score.value == pytest.approx(sum(part for _, part in score.parts))
        for cost in costs:
            strategy.spent(choice.account, cost, now)
        # Clocks jump, too.
        now += steps
    strategy.forget(accounts[0].key)
    strategy.forget("nobody's")


def test_cached_input_costs_a_tenth_and_output_eight_times_as_much() -> None:
    assert cost_of(1_000, 0, 0) == 1_000
    assert cost_of(1_000, 1_000, 0) == pytest.approx(100)
    assert cost_of(1_000, 400, 10) == pytest.approx(600 + 40 + 80)
    assert cost_of(0, 500, 0) == pytest.approx(50), "more cached than there was costs no less than nothing"


# --- quota-balance


def test_the_account_with_the_most_quota_left_serves() -> None:
    accounts = [with_left("a", 20), with_left("b", 80, in_flight=9), with_left("c", 79)]
    assert choose(*accounts, times=3) == ["b", "b", "b"]
    assert QuotaBalance().choose(accounts, Ask(), NOW).rule == "most quota left"


def test_the_idlest_serves_on_a_tie() -> None:
    accounts = [
        with_left("a", 50, in_flight=2),
        with_left("b", 50, in_flight=1),
        with_left("c", 50, in_flight=3),
    ]
    assert choose(*accounts, times=3) == ["b", "b", "b"]


def test_less_than_a_percent_is_a_tie() -> None:
    assert choose(with_left("a", 50.4, in_flight=1), with_left("b", 49.6)) == ["b"]


def test_each_has_its_turn_when_all_are_alike() -> None:
    accounts = [with_left(user, 50) for user in "abcd"]
    order = choose(*accounts, times=8)
    assert set(order[:4]) == set(order[4:]) == set("abcd")
    assert order[:4] == order[4:]


def test_turns_are_fair_when_the_candidates_change() -> None:
    strategy = QuotaBalance()
    accounts = [with_left(user, 50) for user in "abc"]
    count: Counter[str] = Counter()
    for i in range(300):
        count[strategy.choose(accounts[: 2 + i % 2], Ask(), NOW).account.alias] += 1
    assert min(count.values()) >= 50


def test_unknown_quota_is_neither_the_best_nor_the_worst() -> None:
    assert choose(with_left("a", None), with_left("b", 80)) == ["b"]
    assert choose(with_left("a", None), with_left("b", 20)) == ["a"]


def test_a_window_that_is_over_is_unknown() -> None:
    over = with_left("a", 0)
    over.quota.family("codex").primary = Window(100.0, 300, NOW - 1, NOW - 100, "headers")
    assert choose(over, with_left("b", 20)) == ["a"]
    assert choose(over, with_left("b", 80)) == ["b"]


def test_a_model_of_another_family_counts_on_that_family() -> None:
    one, other = with_left("a", 10), with_left("b", 90)
    one.quota.family("codex_x").primary = Window(5.0, 300, NOW + 100, NOW, "headers")
    other.quota.family("codex_x").primary = Window(99.0, 300, NOW + 100, NOW, "headers")
    strategy = QuotaBalance()
    assert strategy.choose([one, other], Ask("codex_x"), NOW).account is one
    assert strategy.choose([one, other], Ask(), NOW).account is other


# --- round-robin


def test_round_robin_gives_each_its_turn() -> None:
    accounts = by_key(*"abcd")
    order = chosen(RoundRobin(), *accounts, times=8)
    assert order == "".join(one.alias for one in accounts) * 2


def test_round_robin_does_not_look_at_quota() -> None:
    assert sorted(chosen(RoundRobin(), with_left("a", 1), with_left("b", 99), times=4)) == list("aabb")


def test_round_robin_owes_an_account_that_rested_one_turn_only() -> None:
    one, two, three = by_key(*"abc")
    strategy = RoundRobin()
    chosen(strategy, one, two, three, times=3)
    assert chosen(strategy, one, two, times=4) == (one.alias + two.alias) * 2
    assert chosen(strategy, one, two, three, times=4) == three.alias + one.alias + two.alias + three.alias


def test_round_robin_treats_a_forgotten_account_as_new() -> None:
    one, two = by_key(*"ab")
    strategy = RoundRobin()
    chosen(strategy, one, two, times=2)
    strategy.forget(two.key)
    assert chosen(strategy, one, two, times=2) == two.alias + one.alias


# --- fill-first


def test_fill_first_stays_with_one_until_it_is_used_up() -> None:
    one, two, three = by_key(*"abc")
    one.quota.family("codex").primary = Window(99.0, 300, NOW + 100, NOW, "headers")
    strategy = FillFirst()
    assert strategy.choose([three, one, two], Ask(), NOW).account is one
    one.quota.family("codex").primary = Window(100.0, 300, NOW + 100, NOW, "headers")
    assert strategy.choose([three, one, two], Ask(), NOW).account is two
    assert strategy.choose([three, one, two], Ask(), NOW + 101).account is one, "its window began anew"


def test_fill_first_takes_a_used_up_account_rather_than_none() -> None:
    one, two = with_left("a", 0), with_left("b", 0)
    assert FillFirst().choose([one, two], Ask(), NOW).account is min(one, two, key=lambda a: a.key)


# --- weighted


def weighted(**weights: float) -> list[Account]:
    return [account(user, weight=weight) for user, weight in weights.items()]


def test_weighted_gives_shares_and_mixes_them() -> None:
    assert chosen(Weighted(), *weighted(a=5.0, b=1.0, c=1.0), times=7) == "aabacaa"


def test_weighted_follows_a_weight_that_changes() -> None:
    one, two = weighted(a=1.0, b=1.0)
    strategy = Weighted()
    chosen(strategy, one, two, times=10)
    one.credential.weight = 3.0
    assert Counter(chosen(strategy, one, two, times=40)) == {"a": 30, "b": 10}


@pytest.mark.parametrize("nothing", [0.0, -1.0, math.nan, math.inf])
def test_weighted_leaves_an_account_of_no_weight_to_when_there_is_no_other(nothing: float) -> None:
    one, two = weighted(a=nothing, b=1.0)
    strategy = Weighted()
    assert chosen(strategy, one, two, times=5) == "bbbbb"
    assert chosen(strategy, one, times=2) == "aa"
    assert chosen(strategy, one, two, times=5) == "bbbbb"


# --- horizon: what expires first


def horizon(*accounts: Account, home: Account | None = None, tokens: int = 0) -> Choice:
    return Horizon().choose(accounts, Ask(home=home, tokens=tokens), NOW)


def test_what_resets_first_is_spent_first() -> None:
    soon, later = plus("soon", week_reset=1 * DAY), plus("later", week_reset=6 * DAY)
    assert horizon(soon, later).account is soon
    assert horizon(later, soon).account is soon
    assert horizon(later, soon).rule == "expires first"


def test_of_two_windows_of_hours_the_one_that_ends_first_is_spent_first() -> None:
    soon, later = plus("soon", hours_reset=HOUR), plus("later", hours_reset=4 * HOUR)
    assert horizon(later, soon).account is soon


def test_the_weekly_wall_is_not_run_into_while_another_idles() -> None:
    scarce = plus("scarce", week_left=4, week_reset=5 * DAY)
    ample = plus("ample", week_left=60, week_reset=6 * DAY)
    assert horizon(scarce, ample).account is ample


def test_a_little_quota_that_expires_tonight_does_not_call_a_new_conversation() -> None:
    # It would have to move as soon as that is gone.
    rest = plus("rest", week_left=1, week_reset=2 * HOUR)
    assert horizon(rest, plus("ample", week_left=60, week_reset=5 * DAY)).account.alias == "ample"


def test_room_in_the_window_of_hours_is_kept() -> None:
    tight = plus("tight", hours_left=2, hours_reset=3 * HOUR, week_left=50, week_reset=2 * DAY)
    roomy = plus("roomy", hours_left=90, hours_reset=3 * HOUR, week_left=50, week_reset=4 * DAY)
    assert horizon(tight, roomy).account is roomy


def test_windows_are_told_apart_by_their_length() -> None:
    soon = free("soon", week_left=90, week_reset=DAY)
    later = free("later", week_left=90, week_reset=6 * DAY)
    score = next(s for s in horizon(later, soon).scores if s.account is soon)
    assert dict(score.parts)["week"] > 0
    assert dict(score.parts)["hours"] == 0
    assert horizon(later, soon).account is soon


def test_a_model_of_another_family_counts_on_the_windows_of_that_family() -> None:
    one, other = plus("one", week_reset=DAY), plus("other", week_reset=6 * DAY)
    one.quota.family("codex_x").secondary = Window(50.0, 10_080, NOW + 6 * DAY, NOW, "headers")
    other.quota.family("codex_x").secondary = Window(50.0, 10_080, NOW + DAY, NOW, "headers")
    strategy = Horizon()
    assert strategy.choose([one, other], Ask(), NOW).account is one
    assert strategy.choose([one, other], Ask("codex_x"), NOW).account is other
    assert strategy.choose([one, other], Ask("codex_unheard_of"), NOW).account is one


# --- horizon: windows that stand still, and what nobody has said


def test_a_week_that_has_not_begun_is_begun() -> None:
    # The clock of a window starts with its first use: begun today, it is whole again in a week.
    idle = plus("idle", week_left=100, week_reset=-DAY)
    assert horizon(plus("running", week_left=80, week_reset=4 * DAY), idle).account is idle


def untouched(user: str) -> Account:
    """Make an account of which a probe has said that none of its windows has begun."""
    return plus(user, week_left=100, week_reset=WEEK, hours_reset=5 * HOUR)


def test_a_week_that_would_begin_with_the_question_has_not_begun() -> None:
    # So the backend tells of an account that was used up, after its reset.
    running = plus("running", week_left=80, week_reset=2 * DAY)
    assert horizon(running, untouched("idle")).account.alias == "idle"


def test_a_week_that_has_begun_since_its_numbers_were_told_is_not_begun_again() -> None:
    strategy, idle = Horizon(), untouched("idle")
    running = plus("running", week_left=80, week_reset=2 * DAY)
    assert strategy.choose([running, idle], Ask(), NOW + 1).account is idle
    # Less than a percent: the numbers stay what they were.
    strategy.spent(idle, 10_000.0, NOW + 30)
    assert strategy.choose([running, idle], Ask(), NOW + 31).account is running


def seen_by(strategy: Horizon, *accounts: Account) -> None:
    """Have a strategy learn what the weeks of those accounts are like."""
    for one in accounts:
        strategy.spent(one, 1.0, NOW - DAY)


def test_while_there_is_plenty_a_week_that_ends_soon_is_spent_before_one_that_is_further_ahead() -> None:
    # Of both more is left than at an even pace, but the first one's rest is lost the sooner.
    soon = plus("soon", week_left=20, week_reset=0.16 * WEEK)
    later = plus("later", week_left=100, week_reset=0.75 * WEEK)
    strategy = Horizon()
    seen_by(strategy, soon, later)
    assert strategy.choose([soon, later], Ask(), NOW).account is soon


def test_without_plenty_every_account_keeps_pace_so_that_all_can_serve_at_once() -> None:
    soon = plus("soon", week_left=20, week_reset=0.16 * WEEK)
    later = plus("later", week_left=100, week_reset=0.75 * WEEK)
    spent = [plus(f"spent-{n}", week_left=1, week_reset=0.9 * WEEK) for n in range(4)]
    strategy = Horizon()
    seen_by(strategy, soon, later, *spent)
    assert strategy.choose([soon, later], Ask(), NOW).account is later


def test_unknown_quota_is_explored() -> None:
    unknown = account("unknown")
    assert horizon(plus("known", week_left=60), unknown).account is unknown


def test_one_request_explores_while_the_others_go_where_quota_is_known() -> None:
    unknown, known = account("unknown"), plus("known", week_left=60)
    unknown.in_flight = 1
    assert horizon(known, unknown).account is known


def test_what_was_explored_counts_like_any_other() -> None:
    seen, other = plus("seen", week_left=5, week_reset=6 * DAY), plus("other", week_left=60)
    assert horizon(seen, other).account is other


def test_a_window_past_its_reset_is_not_full() -> None:
    over = plus("over", hours_left=0, hours_reset=-1.0)
    assert horizon(over, plus("scarce", hours_left=20)).account is over


def test_a_window_whose_reset_nobody_told_is_over_after_its_length() -> None:
    old = plus("old")
    old.quota.family("codex").primary = Window(100.0, 300, None, NOW - 6 * HOUR, "headers")
    recent = plus("recent")
    recent.quota.family("codex").primary = Window(100.0, 300, None, NOW - HOUR, "headers")
    assert horizon(recent, old).account is old


# --- horizon: load


def test_equals_take_turns() -> None:
    accounts = [plus(user) for user in "abcd"]
    assert set(chosen(Horizon(), *accounts, times=4)) == set("abcd")


def test_the_idler_of_two_equals_serves() -> None:
    busy, idle = plus("busy", in_flight=6), plus("idle")
    assert [horizon(busy, idle).account, horizon(idle, busy).account] == [idle, idle]


def test_conversations_that_begin_together_are_spread() -> None:
    # None of them has cost anything yet, and no percent has moved.
    better = plus("a", week_left=55)
    accounts = [better, *(plus(user) for user in "bcd")]
    assert len(set(chosen(Horizon(), *accounts, times=12))) == 4


def test_a_percent_of_a_larger_plan_is_learned_to_be_worth_more() -> None:
    strategy = Horizon()
    accounts = {"plus": plus("small"), "pro": plus("large", plan="pro")}
    for step in range(30):
        for plan, one in accounts.items():
            family = one.quota.family("codex")
            for window, percent in ((family.primary, 2.0 * step), (family.secondary, 0.5 * step)):
                assert window is not None
                told = Window(percent, window.minutes, window.resets_at, NOW, "headers")
                if window is family.primary:
                    family.primary = told
                else:
                    family.secondary = told
            strategy.spent(one, 2_000_000.0 if plan == "pro" else 20_000.0, NOW)
    # A day later: the load is forgotten, what a percent is worth is not.
    newcomers: Sequence[Account] = [plus("x", week_left=40), plus("y", week_left=40, plan="pro")]
    for one in newcomers:
        for place in ("primary", "secondary"):
            window = getattr(one.quota.family("codex"), place)
            moved = Window(window.used_percent, window.minutes, window.resets_at + DAY, NOW + DAY, "headers")
            setattr(one.quota.family("codex"), place, moved)
    choice = strategy.choose(newcomers, Ask(), NOW + DAY)
    assert choice.account.alias == "y"


# --- horizon: conversations


def test_a_conversation_stays_although_another_account_is_a_little_better() -> None:
    home, other = plus("home"), plus("other", week_reset=WEEK / 2 - 8 * HOUR)
    assert horizon(home, other).account is other
    assert horizon(home, other, home=home, tokens=50_000).account is home
    assert horizon(home, other, home=home, tokens=50_000).rule == "conversation"


def test_a_conversation_moves_only_when_what_expires_is_worth_more_than_its_cache() -> None:
    home = plus("home", hours_left=60, week_left=20, week_reset=6 * DAY)
    expiring = plus("expiring", hours_reset=HOUR, week_left=90, week_reset=DAY)
    choice = horizon(home, expiring, home=home, tokens=100_000)
    assert choice.account is expiring
    assert choice.rule == "expires first, worth a move"
    little = plus("little", hours_reset=HOUR, week_left=3, week_reset=HOUR)
    assert horizon(home, little, home=home, tokens=1_000_000).account is home
    assert horizon(home, expiring, home=home, tokens=100_000_000).account is home


def test_a_conversation_whose_cache_has_gone_cold_moves_freely() -> None:
    home, better = plus("home"), plus("better", week_reset=WEEK / 2 - 16 * HOUR)
    strategy = Horizon()
    warm = Ask(home=home, tokens=100_000, idle=600.0)
    cold = Ask(home=home, tokens=100_000, idle=2 * HOUR)
    assert strategy.choose([home, better], warm, NOW).account is home
    assert strategy.stays(warm, NOW) == "conversation"
    assert strategy.stays(cold, NOW) is None
    assert strategy.choose([home, better], cold, NOW).account is better


class Recording(RoundRobin):
    """Round-robin that keeps what it was asked."""

    def __init__(self) -> None:
        super().__init__()
        self.asks: list[Ask] = []

    def stays(self, ask: Ask, now: float) -> str | None:
        self.asks.append(ask)
        return super().stays(ask, now)


def test_the_pool_says_how_long_a_conversation_was_idle() -> None:
    clock, strategy = ManualClock(NOW), Recording()
    pool = Pool(clock, rng=Middle(), strategy=strategy)
    pool.apply(Scan([credential("a"), credential("b")], []))
    for pause in (0, 30, 5_000):
        clock.advance(pause)
        lease = pool.pick(Want("gpt-5", session="s", tokens=900))
        lease.ok()
        lease.release()
    assert [(ask.idle, ask.tokens) for ask in strategy.asks] == [(30.0, 900), (5_000.0, 900)]


def test_a_running_conversation_does_not_hop_from_one_unknown_account_to_the_next() -> None:
    home = plus("home")
    strategy, unknown = Horizon(), [account(user) for user in "abc"]
    idle = plus("idle", week_left=100, week_reset=-DAY)
    for tokens in (0, 10, 20_000):
        ask = Ask(home=home, tokens=tokens, idle=30.0)
        assert strategy.choose([home, idle, *unknown], ask, NOW).account is home
        assert strategy.stays(ask, NOW) == "conversation"


def test_what_a_move_costs_is_among_the_parts_of_the_home_only() -> None:
    home, other = plus("home"), plus("other")
    parts = {s.account.alias: dict(s.parts) for s in horizon(home, other, home=home, tokens=80_000).scores}
    assert parts["home"]["cache"] > 1
    assert "cache" not in parts["other"]
    assert set(parts["other"]) == {"week", "hours", "room", "start"}


def test_a_comparison_speaks_for_the_others_for_a_minute() -> None:
    strategy = Horizon()
    home, other = plus("home"), plus("other")
    ask = Ask(home=home, tokens=50_000)
    assert strategy.stays(ask, NOW) is None, "nothing has been compared yet"
    strategy.choose([home, other], ask, NOW)
    assert strategy.stays(ask, NOW + 59) == "conversation"
    assert strategy.stays(ask, NOW + 61) is None
    assert strategy.stays(ask, NOW - 5) is None, "the clock was set back"


def test_a_home_that_has_become_far_worse_is_compared_again() -> None:
    strategy = Horizon()
    home, other = plus("home"), plus("other")
    ask = Ask(home=home, tokens=1_000)
    strategy.choose([home, other], ask, NOW)
    assert strategy.stays(ask, NOW + 1) == "conversation"
    home.quota.family("codex").secondary = Window(99.0, 10_080, NOW + 6 * DAY, NOW, "headers")
    assert strategy.stays(ask, NOW + 2) is None


def test_forgetting_takes_what_was_learned_away() -> None:
    strategy, one, other = Horizon(), plus("one"), plus("other")
    for _ in range(40):
        strategy.spent(one, 50_000.0, NOW)
    assert chosen(strategy, one, other, times=2) == "otherother"
    strategy.forget(one.key)
    assert chosen(strategy, one, other) == "one"
