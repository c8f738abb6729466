"""Scores that all change at once: the best is found although few are asked for theirs."""

import random

import pytest

from codex_proxy.accounts.account import Account
from codex_proxy.accounts.ceilings import OWN, Drift, Unit
from codex_proxy.accounts.crowd import Crowd, Shelf
from codex_proxy.accounts.quota import Window
from codex_proxy.accounts.scheduler import TYPICAL_TURN, Ask, Choice, Horizon
from tests.accounts.making import DAY, HOUR, NOW, account


def made(
    place: int, *, left: float, ends: float, plan: str = "free", hours_left: float | None = None
) -> Account:
    """Make an account that has so much left of a week that ends in so many seconds, and perhaps of some hours."""
    one = account(f"u{place}")
    one.place = place
    one.quota.plan = plan
    family = one.quota.family("codex")
    family.secondary = Window(100.0 - left, 10_080, NOW + ends, NOW, "headers")
    if hours_left is not None:
        family.primary = Window(100.0 - hours_left, 300, NOW + 4 * HOUR, NOW, "headers")
    return one


class Both:
    """One strategy that looks at each account, and one that does not."""

    def __init__(self, *accounts: Account) -> None:
        self.accounts = accounts
        self.plain, self.shelved = Horizon(), Horizon()
        self.shelf = Shelf("alike")
        for one in accounts:
            self.shelf.add(one, NOW)

    def pick(self, now: float = NOW, ask: Ask | None = None) -> Account:
        asked = ask if ask is not None else Ask()
        plain = self.plain.choose(self.accounts, asked, now)
        shelved = self.shelved.pick(Crowd([self.shelf]), asked, now)
        assert told(shelved) == told(plain)
        assert self.shelved._best == self.plain._best
        self.shelf.again(plain.account, now)
        return plain.account

    def spent(self, one: Account, cost: float, now: float = NOW) -> None:
        for strategy in (self.plain, self.shelved):
            strategy.spent(one, cost, now)
        self.shelf.again(one, now)


def told(choice: Choice) -> list[object]:
    best = sorted(choice.scores, key=lambda one: -one.value)[:5]
    return [choice.account.alias, choice.rule, [(one.account.alias, one.value, one.parts) for one in best]]


def test_a_turn_that_costs_far_more_than_any_before_leaves_nobody_out() -> None:
    # It has next to nothing left, for a minute: of that there is no less than none, whatever turns cost.
    rest = made(0, left=0.2, ends=60.0)
    spender = made(1, left=1.0, ends=5 * DAY)
    both = Both(rest, spender, *(made(place, left=36.0, ends=0.7 * DAY) for place in range(2, 10)))
    assert both.pick() is rest
    both.spent(spender, 1e7)
    assert both.pick() is rest


def test_percents_that_are_learned_to_be_worth_more_lift_all_of_their_plan() -> None:
    large = [made(place, left=40.0, ends=3.4 * DAY, plan="pro") for place in range(10)]
    small = [made(place, left=45.0, ends=3.6 * DAY, plan="plus") for place in range(10, 20)]
    shown = made(20, left=60.0, ends=6 * DAY, plan="pro")
    both = Both(*large, *small, shown)
    assert both.pick() in small
    family = shown.quota.family("codex")
    for used in range(41, 50):
        family.secondary = Window(float(used), 10_080, NOW + 6 * DAY, NOW, "headers")
        # As much as always, but many more of them for one percent.
        for _ in range(60):
            both.spent(shown, TYPICAL_TURN)
    assert both.pick(NOW + 1) in large


@pytest.mark.parametrize("seed", range(6))
def test_a_score_rises_with_time_until_its_window_ends(seed: int) -> None:
    rng = random.Random(seed)
    accounts = [
        made(
            place,
            left=rng.uniform(1, 60),
            ends=rng.uniform(1.0, 2.0) * DAY,
            hours_left=rng.choice([None, 50.0]),
        )
        for place in range(40)
    ]
    both, now = Both(*accounts), NOW
    for one in accounts[:20]:
        both.spent(one, rng.lognormvariate(11, 1))
    while now < NOW + 0.9 * DAY:
        both.pick(now)
        # Past the windows of hours there is no more to learn here.
        now += rng.choice([1.0, 500.0, 6_000.0])
        for one in accounts:
            if (hours := one.quota.families["codex"].primary) is not None and hours.is_over(now):
                both.shelf.again(one, now)


def test_thousands_that_are_alike_are_scored_once() -> None:
    unknown = [account(f"u{place}") for place in range(300)]
    for place, one in enumerate(unknown):
        one.place = place
    both = Both(*unknown)
    both.pick()
    before = both.shelved.looks
    seen = set()
    for _ in range(50):
        one = both.pick()
        one.in_flight += 1
        both.shelf.again(one, NOW)
        seen.add(one.alias)
    # Whom nobody knows is tried in turn; one says for all what they score.
    assert len(seen) == 50
    assert both.shelved.looks - before <= 50 * 3


def test_an_account_that_is_being_explored_counts_for_what_speaks_for_it_otherwise() -> None:
    """It is no choice while one request finds out, and all the same better than accounts with less than an even pace."""
    explored = account("explored")
    explored.in_flight = 1
    both = Both(explored, *(made(place, left=40.0, ends=4 * DAY) for place in range(1, 10)))
    assert both.pick() is not explored
    assert both.plain._best[None] == (0.0, NOW)


def test_the_least_that_a_drift_can_have_lifted_is_no_less_than_what_it_has() -> None:
    """The bound of a bin against the formula, for shares at its edges and between."""
    rng = random.Random(1)
    units: tuple[Unit, ...] = (("plus", False), OWN)
    for _ in range(2_000):
        turns, worth = rng.uniform(0.67, 1.5), rng.uniform(0.67, 1.5)
        drift = Drift(turns, {("plus", False): worth})
        low, load = rng.uniform(0.0, 0.6), rng.uniform(0.0, 0.3)

        class OneBin:
            units: tuple[Unit, ...] = ()
            turns = (low, low + 1 / 32)
            load: tuple[float, float] = (0.0, 0.0)

        one = OneBin()
        one.units, one.load = units, (load, load + 0.05)
        better = max(worth, 1.0)
        for share in (low, low + 1 / 64, low + 1 / 32):
            for part in (load, load + 0.02, load + 0.05):
                whole = 1.0 + share * (turns / better - 1.0) + part * (1.0 / better - 1.0)
                assert 2.0 ** -drift.rise(one) <= whole + 1e-9  # type: ignore[arg-type]  # as far as is asked
                assert drift.rise(one) <= drift.most_rise + 1e-9  # type: ignore[arg-type]
