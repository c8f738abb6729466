"""Time, passed in: the wall clock, the monotonic clock and sleep, so that a test can move all three."""

import asyncio
import time
from typing import Protocol


class Clock(Protocol):
    """What the daemon knows of time; seconds as float everywhere."""

    def now(self) -> float:
        """Return the wall clock as seconds since the epoch."""
        ...

    def monotonic(self) -> float:
        """Return a clock that never jumps; only differences mean something."""
        ...

    async def sleep(self, seconds: float) -> None:
        """Wait for *seconds*."""
        ...


class SystemClock:
    """The machine's own clock."""

    def now(self) -> float:
        return time.time()

    def monotonic(self) -> float:
        return time.monotonic()

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)


class ManualClock:
    """A clock that stands still until a test advances it.

    `sleep` returns at once after moving the clock, so a job that repeats itself runs its
    rounds as fast as the loop turns; it yields once, so other tasks get their turn.
    """

    def __init__(self, now: float = 1_800_000_000.0) -> None:
        self._now = now
        self._monotonic = 1_000.0

    def now(self) -> float:
        return self._now

    def monotonic(self) -> float:
        return self._monotonic

    def advance(self, seconds: float) -> None:
        """Move both clocks forward."""
        self._now += seconds
        self._monotonic += seconds

    async def sleep(self, seconds: float) -> None:
        self.advance(max(seconds, 0.0))
        await asyncio.sleep(0)
