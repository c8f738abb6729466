"""What a process that drains still learns, and the one that has taken over adds to what it knows."""

import json
from typing import Any

import pytest

from codex_proxy.accounts.memory import Afterwards, take_news
from codex_proxy.accounts.pool import Pool
from codex_proxy.accounts.store import Scan
from codex_proxy.clock import ManualClock
from codex_proxy.trace import Usage
from tests.accounts.making import credential, make_pool, named


def pool_of(*users: str) -> tuple[Pool, ManualClock]:
    pool, clock = make_pool(clock=ManualClock())
    pool.apply(Scan([credential(user) for user in users], []))
    return pool, clock


def serve(pool: Pool, user: str, tokens: int) -> None:
    account = named(pool, user)
    account.total_requests += 1
    account.completions += 1
    account.usage.add(Usage(input_tokens=tokens, cached_tokens=tokens // 2, output_tokens=1))


def counts(pool: Pool, user: str) -> tuple[int, int, int]:
    account = named(pool, user)
    return account.total_requests, account.usage.input_tokens, account.usage.cached_tokens


def over_the_wire(news: Any) -> Any:
    return json.loads(json.dumps(news))


def test_only_what_is_new_is_told_and_it_is_added() -> None:
    old, old_clock = pool_of("a", "b")
    new, new_clock = pool_of("b", "a")
    serve(old, "a", 100)
    serve(new, "a", 7)
    afterwards = Afterwards(old, old_clock)
    assert afterwards.news() is None
    serve(old, "a", 50)
    take_news(new, over_the_wire(afterwards.news()), new_clock.now())
    assert counts(new, "a") == (2, 57, 28)
    assert counts(new, "b") == (0, 0, 0)
    assert afterwards.news() is None
    serve(old, "a", 1)
    serve(old, "b", 4)
    take_news(new, over_the_wire(afterwards.news()), new_clock.now())
    assert counts(new, "a") == (3, 58, 28)
    assert counts(new, "b") == (1, 4, 2)


def test_an_account_that_came_meanwhile_counts_from_nothing_and_one_that_went_is_left_out() -> None:
    old, clock = pool_of("a")
    afterwards = Afterwards(old, clock)
    old.apply(Scan([credential("a"), credential("b")], []))
    serve(old, "b", 10)
    news = over_the_wire(afterwards.news())
    only_a, _ = pool_of("a")
    take_news(only_a, news, clock.now())
    both, _ = pool_of("a", "b")
    take_news(both, news, clock.now())
    assert counts(both, "b") == (1, 10, 5)


def test_conversations_that_went_somewhere_meanwhile_go_there_again() -> None:
    old, clock = pool_of("a", "b")
    new, new_clock = pool_of("a", "b")
    a, b = named(old, "a"), named(old, "b")
    old.affinity.bind("before", a.key, clock.now())
    clock.advance(10)
    afterwards = Afterwards(old, clock)
    clock.advance(10)
    old.affinity.bind("fresh", b.key, clock.now())
    old.affinity.bind("moved", a.key, clock.now())
    news = over_the_wire(afterwards.news())
    assert {row[0] for row in news["conversations"]} == {"fresh", "moved"}
    new_clock.advance(30)
    # What happened here is newer.
    new.affinity.bind("moved", b.key, new_clock.now())
    take_news(new, news, new_clock.now())
    assert {session: homes[0] for session, _, homes in new.affinity.dump()} == {
        "fresh": b.key,
        "moved": b.key,
    }


@pytest.mark.parametrize(
    "news",
    [
        {},
        {"totals": 1, "conversations": "x"},
        {"totals": {"?": [1]}, "conversations": [1, [], ["x", "soon", []], [None, 1, ["a"]]]},
    ],
)
def test_nonsense_changes_nothing(news: dict[str, Any]) -> None:
    pool, clock = pool_of("a")
    take_news(pool, news, clock.now())
    key = named(pool, "a").key
    for wrong in ([1, 2], ["x"] * 8, None, [-1] * 8):
        take_news(pool, {**news, "totals": {key: wrong}}, clock.now())
    assert counts(pool, "a") == (0, 0, 0)
    assert len(pool.affinity) == 0
