"""What waits to be written: bounded, and putting something in never waits."""

import contextlib
import threading
from collections import deque
from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")


class Queue(Generic[T]):
    """Items on their way to the writer thread; when it is full the oldest one goes, and is counted.

    Put in from one thread, taken out by another.
    """

    def __init__(self, limit: int) -> None:
        self._items: deque[T] = deque()
        self._limit = limit
        self.wake = threading.Event()
        """Set when there is something to do."""
        self.dropped = 0
        """How many items nobody will ever write: there was no room, or writing failed."""

    def __len__(self) -> int:
        return len(self._items)

    def put(self, item: T) -> None:
        """Add *item*."""
        items = self._items
        items.append(item)
        waiting = len(items)
        if waiting == 1:
            # The others are taken with the first.
            self.wake.set()
        elif waiting > self._limit:
            # The other thread may have taken all of them just now.
            with contextlib.suppress(IndexError):
                items.popleft()
                self.dropped += 1

    def take(self, most: int) -> list[T]:
        """Take out up to *most* items, the oldest first."""
        items = self._items
        taken: list[T] = []
        with contextlib.suppress(IndexError):
            while len(taken) < most:
                taken.append(items.popleft())
        return taken


@dataclass(slots=True, frozen=True)
class Statistics:
    """How the writing goes."""

    waiting: int
    written: int
    dropped: int
    trouble: str
    """What keeps it from going on; empty when nothing does."""
    is_writing: bool
    """Whether the database is open, and this process the one that writes it."""
