"""What is due when, and how little is looked at to know it."""

import random
from math import inf

import pytest

from codex_proxy.accounts.account import Account, Cause
from codex_proxy.accounts.dues import Agenda, Dues
from codex_proxy.accounts.store import Scan
from codex_proxy.clock import ManualClock
from tests.accounts.making import NOW, credential, make_pool, named

# -- times ---------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(10))
def test_what_is_due_is_what_a_look_at_all_times_would_say(seed: int) -> None:
    rng, dues, plain = random.Random(seed), Dues(), dict[int, float]()
    now = 0.0
    for _ in range(3_000):
        match rng.randrange(4):
            case 0 | 1:
                number, at = rng.randrange(40), rng.choice([inf, now + rng.randrange(20), now - 1.0])
                dues.set(number, at)
                plain.pop(number, None)
                if at < inf:
                    plain[number] = at
            case 2:
                now += rng.random() * 3
            case _:
                due = sorted((at, number) for number, at in plain.items() if at <= now)
                assert list(dues.pop(now)) == [number for _, number in due]
                for _, number in due:
                    del plain[number]
        assert dues.first() == min(plain.values(), default=inf)
        assert len(dues) == len(plain)
        # What counts no more does not pile up.
        assert len(dues._heap) <= 2 * 40 + 51


# -- an agenda -----------------------------------------------------------------------------


class Kept:
    """An agenda of when limits end, and of whom it has asked."""

    def __init__(self, count: int) -> None:
        self.pool, self.clock = make_pool(*(f"u{number}" for number in range(count)))
        self.asked: list[str] = []
        self.agenda = Agenda(self.pool, self.when, self.clock.now)

    def when(self, account: Account) -> float | None:
        self.asked.append(account.alias)
        return account.holds.get(Cause.LIMIT)

    def due(self) -> list[str]:
        return [account.alias for account in self.agenda.due(self.clock.now())]

    def newly_asked(self) -> list[str]:
        asked, self.asked = self.asked, []
        return asked


def test_of_many_only_those_are_asked_that_have_changed() -> None:
    kept = Kept(200)
    assert kept.agenda.first() == inf
    assert len(kept.newly_asked()) == 200
    named(kept.pool, "u7").hold(Cause.LIMIT, NOW + 50)
    named(kept.pool, "u9").hold(Cause.LIMIT, NOW + 40)
    named(kept.pool, "u9").hold(Cause.LIMIT, NOW + 60)
    assert kept.agenda.first() == NOW + 50
    assert kept.newly_asked() == ["u7", "u9"]
    assert kept.due() == []
    kept.clock.advance(55)
    assert kept.due() == ["u7"]
    assert kept.newly_asked() == []
    # Asked again by itself; still due, it is told again.
    assert kept.due() == ["u7"]
    assert kept.newly_asked() == ["u7"]


def test_few_are_asked_each_time() -> None:
    kept = Kept(3)
    for _ in range(2):
        kept.agenda.first()
        assert kept.newly_asked() == ["u0", "u1", "u2"]


def test_those_that_come_are_asked_and_those_that_go_are_forgotten() -> None:
    kept = Kept(60)
    gone = named(kept.pool, "u5")
    gone.hold(Cause.LIMIT, NOW + 5)
    assert kept.agenda.first() == NOW + 5
    kept.newly_asked()
    # A file that did not change gives the same credential.
    kept.pool.apply(Scan([*(one.credential for one in kept.pool if one is not gone), credential("u60")], []))
    assert kept.agenda.first() == inf
    assert sorted(kept.newly_asked()) == ["u5", "u60"]
    kept.clock.advance(10)
    assert kept.due() == []
    assert gone.place not in kept.agenda._known


def test_one_that_goes_while_another_is_seen_to_is_not_told_of() -> None:
    kept = Kept(60)
    for alias in ("u5", "u6"):
        named(kept.pool, alias).hold(Cause.LIMIT, NOW + 5)
    kept.clock.advance(10)
    due = kept.agenda.due(kept.clock.now())
    assert next(due).alias == "u5"
    gone = named(kept.pool, "u6")
    kept.pool.apply(Scan([one.credential for one in kept.pool if one is not gone], []))
    kept.agenda.first()
    assert "u6" not in [account.alias for account in due]


def test_a_clock_that_was_set_back_makes_all_be_asked_again() -> None:
    kept = Kept(40)
    kept.agenda.first()
    kept.newly_asked()
    kept.clock.advance(-1)
    kept.agenda.first()
    assert len(kept.newly_asked()) == 40


def test_an_agenda_is_told_of_each_change_once() -> None:
    kept, clock = Kept(40), ManualClock(NOW)
    other = Agenda(kept.pool, lambda account: None, clock.now)
    for agenda in (kept.agenda, other):
        agenda.first()
    one = named(kept.pool, "u3")
    for _ in range(1_000):
        one.touch()
    assert len(kept.agenda._changed) == len(other._changed) == 1
    assert one.watchers == []
