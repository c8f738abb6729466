"""What is told of a choice: noted at once, put into words when somebody asks, and true of then."""

import gc
from types import FunctionType, ModuleType

import pytest

from codex_proxy.accounts import telling
from codex_proxy.accounts.account import Account, Cause
from codex_proxy.accounts.pool import Pool, Want
from codex_proxy.accounts.scheduler import make_strategy
from codex_proxy.accounts.store import Scan
from codex_proxy.accounts.telling import EXCLUSIONS_TOLD, Later, Rule, text_of
from codex_proxy.clock import ManualClock
from codex_proxy.trace import Exclusion
from tests.accounts.making import HOUR, NOW, Middle, credential, named

WANT = Want("gpt-5.5")


def pool_of(count: int, *, few: int, name: str = "horizon") -> tuple[Pool, ManualClock]:
    clock = ManualClock(NOW)
    pool = Pool(clock, rng=Middle(), strategy=make_strategy(name))
    pool.few = few
    pool.apply(Scan([credential(f"u{number}") for number in range(count)], []))
    return pool, clock


@pytest.mark.parametrize("few", [0, 100])
def test_nothing_is_put_into_words_that_nobody_asks_for(few: int, monkeypatch: pytest.MonkeyPatch) -> None:
    pool, _ = pool_of(20, few=few)
    for number in range(10):
        named(pool, f"u{number}").hold(Cause.LIMIT, NOW + HOUR)
    said: list[Rule] = []
    evidence = telling._evidence

    def saying(rule: Rule, now: float, shows: tuple[object, ...]) -> str:
        said.append(rule)
        return evidence(rule, now, shows)

    monkeypatch.setattr(telling, "_evidence", saying)
    decision = pool.pick(WANT).decision
    assert (len(decision.candidates), len(decision.excluded), dict(decision.counts)) == (
        5,
        10,
        {"cooling": 10},
    )
    assert text_of(decision.excluded) > 0
    assert said == []
    assert decision.excluded[0].evidence == "usage limit, 1 h left"
    assert len(said) == 10
    assert decision.excluded[3] is decision.excluded[3]


@pytest.mark.parametrize("few", [0, 100])
def test_what_is_told_later_is_what_was_true(few: int) -> None:
    pool, clock = pool_of(4, few=few)
    one, other = named(pool, "u0"), named(pool, "u1")
    one.hold(Cause.OVERLOAD, NOW + 90)
    one.last_error = "server server_error"
    other.credential.priority = 3
    other.touch()
    lease = pool.pick(WANT)
    decision, score = lease.decision, lease.decision.candidates
    clock.advance(3_000)
    one.hold(Cause.LIMIT, NOW + 9_000)
    one.last_error, one.alias, other.credential.priority = "", "renamed", 0
    lease.account.alias = "renamed too"
    assert [(said.alias, said.rule, said.evidence) for said in decision.excluded] == [
        ("u0", "cooling", "overloaded, 2 min left; the last time the backend broke (server_error)"),
        ("u1", "of lesser priority", "priority 3"),
    ]
    assert {one.alias for one in score} == {"u2", "u3"}


@pytest.mark.parametrize("few", [0, 100])
def test_what_is_remembered_of_a_choice_keeps_no_account(few: int) -> None:
    """A removed account's tokens must not live on in the story of a turn."""
    pool, _ = pool_of(8, few=few)
    named(pool, "u0").hold(Cause.LIMIT, NOW + HOUR)
    lease = pool.pick(WANT)
    decision = lease.decision
    lease.release()
    del lease
    seen: list[object] = [decision]
    found = {id(decision)}
    for thing in seen:
        assert not isinstance(thing, Account)
        for inner in gc.get_referents(thing):
            if not isinstance(inner, type | FunctionType | ModuleType) and id(inner) not in found:
                found.add(id(inner))
                seen.append(inner)
    assert len(seen) > 20


def test_few_of_many_are_told_and_all_are_counted() -> None:
    pool, _ = pool_of(60, few=0, name="round-robin")
    for number in range(0, 60, 2):
        named(pool, f"u{number}").hold(Cause.RATE, NOW + 30)
    decision = pool.pick(WANT, {named(pool, "u1").key}).decision
    told = [(one.alias, one.rule) for one in decision.excluded]
    assert told[:4] == [
        ("u0", "cooling"),
        ("u1", "tried for this request"),
        ("u2", "cooling"),
        ("u4", "cooling"),
    ]
    assert len(told) == EXCLUSIONS_TOLD
    assert decision.counts == (("cooling", 30), ("tried for this request", 1))
    assert decision.compared == 29


def test_a_sequence_that_is_made_later_is_made_once() -> None:
    made: list[int] = []

    def make(number: int) -> Exclusion:
        made.append(number)
        return Exclusion(str(number), "rule", "evidence")

    later = Later([1, 2, 3], make)
    assert (len(later), bool(later), made) == (3, True, [])
    assert [one.alias for one in later[1:]] == ["2", "3"]
    assert (later[0].alias, len(later), list(later.raw)) == ("1", 3, [])
    assert made == [1, 2, 3]
    assert text_of(later) == 3 * (1 + len("evidence"))
