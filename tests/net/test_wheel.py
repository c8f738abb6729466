"""Many deadlines on one timer."""

import asyncio
from collections.abc import Callable

import pytest

from codex_proxy.net.wheel import NEVER, TICK_SECONDS, Wheel


class Loop:
    """The loop's clock and timers, moved by hand."""

    def __init__(self) -> None:
        self.now = 100.0
        self.timers: list[tuple[float, Callable[[], None]]] = []
        self.set = 0

    def time(self) -> float:
        return self.now

    def call_at(self, when: float, callback: Callable[[], None]) -> "Timer":
        self.set += 1
        entry = (when, callback)
        self.timers.append(entry)
        return Timer(self, entry)

    def to(self, now: float) -> None:
        """Move on, timer by timer."""
        while due := sorted((entry for entry in self.timers if entry[0] <= now), key=lambda entry: entry[0]):
            self.timers.remove(due[0])
            self.now = max(self.now, due[0][0])
            due[0][1]()
        self.now = now


class Timer:
    def __init__(self, loop: Loop, entry: tuple[float, Callable[[], None]]) -> None:
        self._loop, self._entry = loop, entry

    def cancel(self) -> None:
        self._loop.timers.remove(self._entry)


class Entry:
    """Waits on a wheel, and notes when it was told that it had waited long enough."""

    def __init__(self, loop: Loop, wheel: Wheel) -> None:
        self.deadline = NEVER
        self.expired: list[float] = []
        self._loop, self._wheel = loop, wheel
        wheel.enter(self)

    def wait(self, seconds: float) -> None:
        self.deadline = self._loop.now + seconds
        if self.deadline < self._wheel.due:
            self._wheel.advance(self.deadline)

    def expire(self) -> None:
        self.deadline = NEVER
        self.expired.append(self._loop.now)


@pytest.fixture
def loop(monkeypatch: pytest.MonkeyPatch) -> Loop:
    loop = Loop()
    monkeypatch.setattr(asyncio, "get_running_loop", lambda: loop)
    return loop


def test_a_deadline_is_noticed_once_and_late_by_a_tick_at_most(loop: Loop) -> None:
    wheel = Wheel()
    entries = [Entry(loop, wheel) for _ in range(100)]
    for number, entry in enumerate(entries):
        entry.wait(2.0 + number * 0.013)
    loop.to(200.0)
    for number, entry in enumerate(entries):
        (at,) = entry.expired
        assert 0 <= at - (102.0 + number * 0.013) <= TICK_SECONDS
    # 1.3 s of them, look by look.
    assert loop.set <= 1 + 1.3 / TICK_SECONDS + 1


def test_deadlines_that_are_taken_back_and_set_again_cost_a_timer_now_and_then(loop: Loop) -> None:
    wheel = Wheel()
    entry = Entry(loop, wheel)
    for step in range(10_000):
        entry.wait(15.0)
        loop.to(100.0 + step * 0.02)
        entry.deadline = NEVER
    assert entry.expired == []
    # 200 s of a stream whose every read may take 15.
    assert loop.set <= 200 / 15 + 2


def test_an_earlier_deadline_is_not_kept_waiting_by_a_later_one(loop: Loop) -> None:
    wheel = Wheel()
    late, soon = Entry(loop, wheel), Entry(loop, wheel)
    late.wait(300.0)
    soon.wait(1.0)
    loop.to(101.0)
    assert (late.expired, soon.expired) == ([], [101.0])
    loop.to(401.0)
    assert late.expired == [400.0]


def test_who_waits_again_when_told_is_told_again(loop: Loop) -> None:
    wheel = Wheel()
    entry = Entry(loop, wheel)

    def again() -> None:
        entry.expired.append(loop.now)
        entry.deadline = NEVER
        if len(entry.expired) < 3:
            entry.wait(1.0)

    entry.expire = again  # type: ignore[method-assign]
    entry.wait(1.0)
    loop.to(110.0)
    assert entry.expired == [101.0, 102.0, 103.0]


def test_who_leaves_is_not_told(loop: Loop) -> None:
    wheel = Wheel()
    entry = Entry(loop, wheel)
    entry.wait(1.0)
    wheel.leave(entry)
    wheel.leave(entry)
    loop.to(110.0)
    assert entry.expired == []
    assert (len(wheel), loop.timers, wheel.due) == (0, [], NEVER)


def test_it_looks_no_more_when_it_is_stopped(loop: Loop) -> None:
    wheel = Wheel()
    wheel.stop()
    entry = Entry(loop, wheel)
    entry.wait(1.0)
    wheel.stop()
    assert (loop.timers, wheel.due) == ([], NEVER)


async def test_it_runs_on_the_running_loop() -> None:
    wheel, done = Wheel(), asyncio.Event()

    class Waits:
        deadline = asyncio.get_running_loop().time() + 0.01

        def expire(self) -> None:
            self.deadline = NEVER
            done.set()

    entry = Waits()
    wheel.enter(entry)
    wheel.advance(entry.deadline)
    await asyncio.wait_for(done.wait(), 5.0)
