"""Deadlines for many that wait, on one timer.

A timer of the loop's own for every read costs more than the read. Here a deadline is a number
that is set and taken back; the timer looks at all of them when the earliest may be due.
"""

import asyncio
import math
from typing import Protocol

TICK_SECONDS = 0.25
"""How late a deadline may be noticed, and how often all are looked at, at most."""

SHORT_SECONDS = 1.0
"""A shorter wait would notice how coarse the wheel is: it takes a timer of its own."""

NEVER = math.inf


class Waiting(Protocol):
    """One that may wait for something."""

    deadline: float
    """The loop's time at which the wait is over; `NEVER` while there is none."""

    def expire(self) -> None:
        """End the wait; `deadline` is `NEVER` again."""
        ...


class Wheel:
    """Expires all whose deadline has come.

    Who will wait enters once, for many waits; each of them is `deadline = ...` and, when that is
    earlier than `due`, a call of `advance`.
    """

    __slots__ = ("_entries", "_timer", "due")

    def __init__(self) -> None:
        self._entries: set[Waiting] = set()
        self._timer: asyncio.TimerHandle | None = None
        self.due = NEVER
        """When the timer looks next."""

    def __len__(self) -> int:
        return len(self._entries)

    def enter(self, entry: Waiting) -> None:
        """Look after *entry* from now on."""
        self._entries.add(entry)

    def leave(self, entry: Waiting) -> None:
        """Forget *entry*."""
        self._entries.discard(entry)

    def advance(self, deadline: float) -> None:
        """Look at *deadline* instead of later."""
        if self._timer is not None:
            self._timer.cancel()
        self.due = deadline
        self._timer = asyncio.get_running_loop().call_at(deadline, self._look)

    def stop(self) -> None:
        """Look no more."""
        if self._timer is not None:
            self._timer.cancel()
        self._timer, self.due = None, NEVER

    def _look(self) -> None:
        now = asyncio.get_running_loop().time()
        self._timer, self.due = None, NEVER
        earliest = NEVER
        for entry in list(self._entries):
            deadline = entry.deadline
            if deadline <= now:
                entry.expire()
            elif deadline < earliest:
                earliest = deadline
        # Meanwhile one that expired may have set a new one.
        if earliest < self.due:
            self.advance(max(earliest, now + TICK_SECONDS))
