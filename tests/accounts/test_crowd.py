"""Accounts on shelves, and what strategies make of them: the same as of a list of those accounts."""

import random

import pytest

from codex_proxy.accounts.account import Account
from codex_proxy.accounts.crowd import BEYOND, Crowd, Order, Ranked, Shelf
from codex_proxy.accounts.quota import Window
from codex_proxy.accounts.scheduler import STRATEGIES, Ask, Choice, make_strategy
from tests.accounts.making import DAY, NOW, account


def accounts(count: int, rng: random.Random | None = None) -> list[Account]:
    made = []
    for place in range(count):
        weight = rng.choice([0.0, 1.0, 1.0, 3.0, 0.1]) if rng is not None else 1.0
        one = account(f"u{place}", weight=weight)
        one.place = place
        made.append(one)
    return made


def shelf_of(*some: Account) -> Shelf:
    shelf = Shelf("alike")
    for one in some:
        shelf.add(one, NOW)
    return shelf


# -- a crowd -------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(20))
def test_the_accounts_of_a_crowd_are_counted_in_the_order_of_their_places(seed: int) -> None:
    rng = random.Random(seed)
    some = accounts(rng.randrange(3, 30))
    rng.shuffle(some)
    cut = rng.randrange(1, len(some))
    shelves = [shelf_of(*part) for part in (some[:cut], some[cut:-1]) if part]
    without = sorted(rng.sample([one.place for one in some[:-1]], rng.randrange(len(some) - 1)))
    guest = some[-1] if rng.random() < 0.5 else None
    crowd = Crowd(shelves, without, guest)
    expected = sorted((one for one in some[:-1] if one.place not in without), key=lambda one: one.place)
    assert list(crowd) == [*expected, *([guest] if guest is not None else [])]
    assert len(crowd) == len(list(crowd))
    places = [one.place for one in expected] + [BEYOND] * (guest is not None)
    assert [crowd.place_of(rank) for rank in range(len(crowd))] == places


def test_an_order_follows_the_accounts_of_its_shelf() -> None:
    some = accounts(5)
    shelf = shelf_of(*some[:4])

    def make() -> Order:
        return Ranked(lambda one, now: one.in_flight)

    order = shelf.order(None, make, NOW)
    assert shelf.order(None, make, NOW) is order
    some[0].in_flight = 3
    shelf.again(some[0], NOW)
    assert order.first() == (0, 1)
    assert order.first({1, 2}) == (0, 3)
    assert (order.next(0, 2), order.next(0, 2, {2, 3}), order.next(1, 0)) == (2, None, None)
    shelf.remove(some[1])
    shelf.add(some[4], NOW)
    assert [order.next(0, place) for place in range(6)] == [2, 2, 2, 3, 4, None]
    assert order.next(3, 0) == 0


def test_a_shelf_keeps_orders_for_a_few_limits_only() -> None:
    shelf = shelf_of(*accounts(3))
    for number in range(50):
        shelf.order(f"family {number}", lambda: Ranked(lambda one, now: 0), NOW)
    assert len(shelf.orders) <= 4


# -- choosing among one --------------------------------------------------------------------


def told(choice: Choice) -> list[object]:
    scores = [(one.account.alias, one.value, one.parts) for one in choice.scores]
    scores.sort(key=lambda one: -one[1])
    return [choice.account.alias, choice.rule, scores[:5]]


class Hall:
    """Accounts on three shelves, of whom one strategy is asked by shelves and one by list."""

    def __init__(self, name: str, rng: random.Random) -> None:
        self.rng = rng
        self.now = NOW
        self.accounts = accounts(rng.choice([3, 8, 25]), rng)
        self.by_shelves, self.by_list = make_strategy(name), make_strategy(name)
        self.shelves = [Shelf(number) for number in range(3)]
        self.shelf_of: dict[str, Shelf] = {}
        for one in self.accounts:
            self.put(one)

    def put(self, one: Account) -> None:
        shelf = self.rng.choice(self.shelves)
        shelf.add(one, self.now)
        self.shelf_of[one.alias] = shelf

    def take(self, one: Account) -> None:
        self.shelf_of.pop(one.alias).remove(one)

    def again(self, one: Account) -> None:
        self.shelf_of[one.alias].again(one, self.now)

    def hear(self) -> None:
        one, rng = self.rng.choice(self.accounts), self.rng
        family = one.quota.family(rng.choice(["codex", "codex", "codex_x"]))
        used, ends = float(rng.randrange(101)), self.now + rng.uniform(10, 4 * DAY)
        if rng.random() < 0.5:
            family.primary = Window(used, 300, min(ends, self.now + 18_000), self.now, "headers")
        else:
            family.secondary = Window(used, 10_080, ends, self.now, "headers")
        one.in_flight = rng.randrange(4)
        self.again(one)

    def ask(self) -> None:
        rng = self.rng
        shelves = [shelf for shelf in self.shelves if shelf.places and rng.random() < 0.7]
        on_shelves = [one for one in self.accounts if self.shelf_of[one.alias] in shelves]
        others = [one for one in self.accounts if one not in on_shelves]
        tried = rng.sample(on_shelves, rng.randrange(len(on_shelves))) if on_shelves else []
        guest = rng.choice(others) if others and (rng.random() < 0.3 or not on_shelves) else None
        home = guest
        if home is None and rng.random() < 0.4:
            home = rng.choice([one for one in on_shelves if one not in tried] or [None])
        if guest is not None:
            # A guest stands on no shelf while others are asked.
            self.take(guest)
        crowd = Crowd(shelves, [one.place for one in tried], guest)
        ask = Ask(rng.choice([None, "codex_x"]), home, rng.choice([0, 50_000]), rng.choice([1.0, 9_000.0]))
        listed = list(crowd)
        by_list = self.by_list.choose(listed, ask, self.now)
        assert told(self.by_shelves.pick(crowd, ask, self.now)) == told(by_list)
        if guest is not None:
            self.put(guest)
        by_list.account.in_flight += 1
        self.again(by_list.account)

    def learn(self) -> None:
        one, cost = self.rng.choice(self.accounts), self.rng.lognormvariate(9, 1)
        for strategy in (self.by_shelves, self.by_list):
            strategy.spent(one, cost, self.now)
        self.again(one)

    def forget(self) -> None:
        one = self.rng.choice(self.accounts)
        self.take(one)
        for strategy in (self.by_shelves, self.by_list):
            strategy.forget(one.key)
        self.put(one)

    def wait(self) -> None:
        # Not so long that a window ends: whoever keeps the shelves puts accounts anew then.
        ends = [
            window.ends_at
            for one in self.accounts
            for family in one.quota.families.values()
            for _, window in family.windows()
            if window.ends_at > self.now
        ]
        self.now = min([self.now + self.rng.choice([0.5, 60.0, 4_000.0]), *ends])
        for one in self.accounts:
            if any(self.now >= w.ends_at for f in one.quota.families.values() for _, w in f.windows()):
                self.again(one)


@pytest.mark.parametrize("name", STRATEGIES)
@pytest.mark.parametrize("seed", range(15))
def test_a_strategy_picks_from_shelves_whom_it_chooses_from_a_list(name: str, seed: int) -> None:
    hall = Hall(name, random.Random(f"{name} {seed}"))
    for _ in range(150):
        hall.rng.choice([hall.ask, hall.ask, hall.ask, hall.hear, hall.learn, hall.wait, hall.forget])()
