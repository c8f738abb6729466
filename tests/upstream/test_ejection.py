"""When an upstream is left alone, and when it is tried again."""

import random

import pytest

from codex_proxy.upstream.ejection import (
    AT_LEAST,
    BASE_SECONDS,
    CALM_SECONDS,
    CONSECUTIVE,
    LONGEST_SECONDS,
    WINDOW,
    Outlier,
    may_eject,
)


def test_five_in_a_row_are_one_too_many_and_an_answer_between_begins_anew() -> None:
    one = Outlier()
    assert [one.bad(float(i)) for i in range(CONSECUTIVE - 1)] == [False] * (CONSECUTIVE - 1)
    one.good(4.0)
    assert [one.bad(5.0 + i) for i in range(CONSECUTIVE)] == [False] * (CONSECUTIVE - 1) + [True]


def test_more_than_half_of_twenty_are_one_too_many() -> None:
    one = Outlier()
    told = []
    for number in range(AT_LEAST):
        if number % 2:
            one.good(number / 10)
        else:
            told.append(one.bad(number / 10))
    assert not any(told)
    assert one.bad(2.0)
    assert not one.is_ejected(2.0)


def test_what_is_older_than_the_window_does_not_count() -> None:
    one = Outlier()
    for number in range(4):
        one.bad(float(number) / 10)
    one.good(1.0)
    for number in range(4):
        one.bad(1.0 + number / 10)
    one.good(2.0)
    for number in range(AT_LEAST):
        one.good(WINDOW + 5.0 + number / 100)
    assert not one.bad(WINDOW + 6.0)


def eject(one: Outlier, now: float) -> float:
    while not one.bad(now):
        pass
    return one.eject(now)


def test_it_stays_away_for_longer_each_time_up_to_five_minutes() -> None:
    one = Outlier()
    now, lasted = 0.0, [eject(one, 0.0)]
    for _ in range(12):
        now = one.until
        assert one.is_half_open(now)
        one.is_probed = True
        assert one.is_ejected(now)
        assert one.bad(now)
        lasted.append(one.eject(now))
    assert lasted[:4] == [BASE_SECONDS * n for n in (1, 2, 3, 4)]
    assert lasted[-1] == LONGEST_SECONDS == max(lasted)


def test_a_good_probe_brings_it_back_and_calm_makes_the_next_one_shorter() -> None:
    one = Outlier()
    eject(one, 0.0)
    one.good(one.until)
    assert not one.is_ejected(BASE_SECONDS)
    assert not one.is_half_open(BASE_SECONDS)
    assert eject(one, BASE_SECONDS + 1) == 2 * BASE_SECONDS
    back = one.until
    one.good(back)
    assert eject(one, back + 2 * CALM_SECONDS) == BASE_SECONDS


def test_an_answer_from_before_the_ejection_does_not_end_it() -> None:
    one = Outlier()
    eject(one, 0.0)
    one.good(1.0)
    assert one.is_ejected(1.0)


def test_a_probe_that_tells_nothing_leaves_room_for_another() -> None:
    one = Outlier()
    eject(one, 0.0)
    one.is_probed = True
    assert one.is_ejected(BASE_SECONDS)
    assert not one.is_half_open(BASE_SECONDS)
    one.unprobed()
    assert one.is_half_open(BASE_SECONDS)


@pytest.mark.parametrize(("members", "most"), [(1, 1), (2, 1), (3, 1), (4, 2), (5, 2), (9, 4)])
def test_at_most_half_are_ejected(members: int, most: int) -> None:
    ejected = 0
    while may_eject(ejected, members):
        ejected += 1
    assert ejected == most


def test_whatever_happens_it_is_in_one_state_and_comes_back() -> None:
    for seed in range(100):
        rng = random.Random(seed)
        one, now = Outlier(), 0.0
        for _ in range(300):
            now += rng.choice((0.0, 0.01, 1.0, 40.0))
            states = (one.is_ejected(now), one.is_half_open(now), one.until == 0.0)
            assert sum(states) == 1
            assert len(one._seconds) <= WINDOW
            step = rng.random()
            if one.is_half_open(now) and step < 0.5:
                one.is_probed = True
            elif step < 0.4:
                one.good(now)
            elif step < 0.9:
                if one.bad(now):
                    assert BASE_SECONDS <= one.eject(now) <= LONGEST_SECONDS
            else:
                one.unprobed()
        one.unprobed()
        assert not one.is_ejected(now + LONGEST_SECONDS)
        one.good(now + LONGEST_SECONDS)
        assert one.until == 0.0
