"""Time: the machine's, and one that a test moves."""

import asyncio
import time

from codex_proxy.clock import Clock, ManualClock, SystemClock


async def test_the_systems_clock_is_the_machines() -> None:
    clock: Clock = SystemClock()
    before = time.time()
    assert before <= clock.now() <= time.time()
    began = clock.monotonic()
    await clock.sleep(0.01)
    assert clock.monotonic() - began >= 0.009


async def test_a_manual_clock_stands_still_until_it_is_moved() -> None:
    clock = ManualClock(100.0)
    monotonic = clock.monotonic()
    await asyncio.sleep(0.002)
    assert (clock.now(), clock.monotonic()) == (100.0, monotonic)
    clock.advance(2.5)
    assert (clock.now(), clock.monotonic()) == (102.5, monotonic + 2.5)


async def test_sleeping_moves_a_manual_clock_and_lets_others_run() -> None:
    clock: Clock = ManualClock(100.0)
    order: list[str] = []

    async def other() -> None:
        order.append("other")

    task = asyncio.get_running_loop().create_task(other())
    await clock.sleep(60.0)
    order.append("slept")
    await task
    assert order == ["other", "slept"]
    assert clock.now() == 160.0
    await clock.sleep(-5.0)
    assert clock.now() == 160.0
