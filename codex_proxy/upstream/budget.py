"""How many retries may be under way at once, so that a broken backend is not flooded."""

import contextlib
from collections.abc import AsyncIterator

from codex_proxy.tasks import Slots

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
        self._slots = Slots(lambda: self.limit)

    @property
    def limit(self) -> int:
        """How many retries may be under way now."""
        return max(AT_LEAST, int(self.active * SHARE))

    @property
    def retrying(self) -> int:
        """How many are."""
        return self._slots.taken

    @contextlib.asynccontextmanager
    async def slot(self) -> AsyncIterator["Slot"]:
        """Wait for the right to retry; `Slot.free` gives it back early."""
        await self._slots.acquire()
        slot = Slot(self._slots)
        try:
            yield slot
        finally:
            slot.free()


class Slot:
    """A retry's right to be under way; without slots, the right of a first try, which needs none."""

    __slots__ = ("_slots",)

    def __init__(self, slots: Slots | None = None) -> None:
        self._slots = slots

    def free(self) -> None:
        """Give the right back; only the first call counts."""
        slots, self._slots = self._slots, None
        if slots is not None:
            slots.release()
