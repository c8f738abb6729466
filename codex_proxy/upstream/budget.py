"""How many retries may be under way at once, so that a broken backend is not flooded."""

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator

# A fifth of what is under way, and a few however little that is.
SHARE = 0.2
AT_LEAST = 3


class RetryBudget:
    """Lets retries pass a few at a time; the others wait for their turn.

    A slot is held until the attempt has its first good event or its failure. While the
    backend works that is a moment, so nobody is refused who could have been served; while
    it is down, it is what bounds the load of retrying.
    """

    def __init__(self) -> None:
        self.active = 0
        """Exchanges under way."""
        self.retrying = 0
        self._waiting: deque[asyncio.Future[None]] = deque()

    @property
    def limit(self) -> int:
        """How many retries may be under way now."""
        return max(AT_LEAST, int(self.active * SHARE))

    @contextlib.asynccontextmanager
    async def slot(self) -> AsyncIterator["Slot"]:
        """Wait for the right to retry; `Slot.free` gives it back early."""
        while self.retrying >= self.limit:
            waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiting.append(waiter)
            try:
                await waiter
            except asyncio.CancelledError:
                if waiter.done() and not waiter.cancelled():
                    self._wake()
                raise
            finally:
                with contextlib.suppress(ValueError):
                    self._waiting.remove(waiter)
        self.retrying += 1
        slot = Slot(self)
        try:
            yield slot
        finally:
            slot.free()

    def _freed(self) -> None:
        self.retrying -= 1
        self._wake()

    def _wake(self) -> None:
        # As many as there is room for: the limit may have grown since they began to wait.
        room = self.limit - self.retrying
        for waiter in self._waiting:
            if room <= 0:
                return
            if not waiter.done():
                waiter.set_result(None)
                room -= 1


class Slot:
    """A retry's right to be under way."""

    __slots__ = ("_budget",)

    def __init__(self, budget: RetryBudget | None) -> None:
        self._budget = budget

    def free(self) -> None:
        """Give the right back; only the first call counts."""
        budget, self._budget = self._budget, None
        if budget is not None:
            budget._freed()
