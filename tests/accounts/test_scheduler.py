"""The choice among accounts that could serve."""

from collections import Counter

from codex_proxy.accounts.account import Account
from codex_proxy.accounts.quota import Window
from codex_proxy.accounts.scheduler import Ask, QuotaBalance
from tests.accounts.making import NOW, account


def with_left(user: str, left: float | None, *, in_flight: int = 0) -> Account:
    one = account(user)
    one.in_flight = in_flight
    if left is not None:
        one.quota.family("codex").primary = Window(100.0 - left, 300, NOW + 100, NOW, "headers")
    return one


def choose(*accounts: Account, times: int = 1) -> list[str]:
    strategy = QuotaBalance()
    return [strategy.choose(accounts, Ask(), NOW).account.alias for _ in range(times)]


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
