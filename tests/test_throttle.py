"""How slow guessing is, by the throttle alone; `server/test_sessions.py` and `test_access.py` play it at the doors."""

from collections.abc import Callable

import pytest

from codex_proxy.clock import ManualClock
from codex_proxy.throttle import Throttle

HOME, AWAY = "203.0.113.7", "198.51.100.1"


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def throttle(clock: ManualClock) -> Throttle:
    return Throttle(clock.monotonic)


def test_a_wrong_key_that_comes_again_and_again_is_one_guess(clock: ManualClock, throttle: Throttle) -> None:
    """A tool that polls with an old key, for hours."""
    assert throttle.guessed(HOME, "old")
    for _ in range(1_000):
        clock.advance(15.0)
        assert not throttle.guessed(HOME, "old")
        throttle.forget()
        assert throttle.wait(HOME) == 0
    # Somebody else may have it wrong too.
    assert throttle.guessed(AWAY, "old")


@pytest.mark.parametrize("forget", [Throttle.forget, lambda _: None])
def test_after_a_long_silence_it_is_a_guess_again(
    clock: ManualClock, throttle: Throttle, forget: Callable[[Throttle], None]
) -> None:
    assert throttle.guessed(HOME, "old")
    clock.advance(901.0)
    forget(throttle)
    assert throttle.guessed(HOME, "old")


def test_what_is_long_ago_is_kept_no_more(clock: ManualClock, throttle: Throttle) -> None:
    for number in range(10):
        throttle.guessed(f"203.0.113.{number}", "wrong")
    clock.advance(901.0)
    throttle.guessed(AWAY, "wrong")
    throttle.forget()
    assert [len(kept) for kept in (throttle._wrong, throttle._failures)] == [1, 2]


def test_keys_that_differ_add_up_and_the_pause_doubles(clock: ManualClock, throttle: Throttle) -> None:
    for number in range(5):
        assert throttle.wait(HOME) == 0
        throttle.guessed(HOME, f"guess {number}")
    waits = []
    for number in range(5, 14):
        waits.append(wait := throttle.wait(HOME))
        clock.advance(wait)
        assert throttle.wait(HOME) == 0
        throttle.guessed(HOME, f"guess {number}")
    assert waits == [2, 4, 8, 16, 32, 64, 128, 256, 300]
    assert throttle.wait(AWAY) == 0


def test_a_right_key_that_comes_with_requests_makes_no_guess_free(throttle: Throttle) -> None:
    """Else whoever has the address of a tool that polls could guess for as long as that does."""
    for number in range(5):
        throttle.guessed(HOME, f"guess {number}")
        throttle.admitted(HOME)
    assert throttle.wait(HOME) > 0


def test_where_a_right_key_came_from_others_keep_nobody_out(throttle: Throttle) -> None:
    throttle.admitted(HOME)
    for number in range(70):
        throttle.guessed(f"192.0.2.{number}", "wrong")
    assert throttle.wait(AWAY) > 0
    assert throttle.wait(HOME) == 0


def test_that_somebody_is_kept_out_is_news_once_for_each_guess(throttle: Throttle) -> None:
    throttle.guessed(HOME, "one")
    assert [throttle.is_news() for _ in range(3)] == [True, False, False]
    throttle.guessed(HOME, "one")
    assert not throttle.is_news()
    throttle.guessed(HOME, "two")
    assert throttle.is_news()
