"""What is due when, for thousands of accounts, without a look at each: pure."""

import heapq
from collections.abc import Callable, Iterable, Iterator
from math import inf
from typing import Protocol

from codex_proxy.accounts.account import Account


class Dues:
    """Times by number, and which of them have come."""

    __slots__ = ("_at", "_heap")

    def __init__(self) -> None:
        self._at: dict[int, float] = {}
        self._heap: list[tuple[float, int]] = []
        """With entries that count no more, because they are not what `_at` says."""

    def __len__(self) -> int:
        return len(self._at)

    def set(self, number: int, at: float) -> None:
        """Note when something is due, instead of what was noted before; `inf` is never."""
        if at == inf:
            self._at.pop(number, None)
            return
        if self._at.get(number) == at:
            return
        self._at[number] = at
        if len(self._heap) > 2 * len(self._at) + 50:
            self._heap = [(time, one) for one, time in self._at.items()]
            heapq.heapify(self._heap)
        else:
            heapq.heappush(self._heap, (at, number))

    def first(self) -> float:
        """Return when the first is due; `inf` when nothing is."""
        heap = self._heap
        while heap and self._at.get(heap[0][1]) != heap[0][0]:
            heapq.heappop(heap)
        return heap[0][0] if heap else inf

    def pop(self, now: float) -> Iterator[int]:
        """Yield those whose time has come, and forget them."""
        while self.first() <= now:
            _, number = heapq.heappop(self._heap)
            del self._at[number]
            yield number


class Accounts(Protocol):
    """The accounts of a pool."""

    arrivals: "list[list[Account]]"
    """Lists that every account which comes is put on."""

    def __iter__(self) -> Iterator[Account]: ...

    def __len__(self) -> int: ...


FEW = 32
"""A look at each of so few accounts takes no longer than to keep up with what changes in them."""


class Agenda:
    """When something is due for each account of a pool; asked again only of those that have changed.

    Args:
        when: Returns when it is due for an account by what is known now, None for never. A time at which
            that should be asked again is one, too. Of an account that has left it is asked once more.
        now: The clock by which it is due.
    """

    def __init__(
        self, accounts: Accounts, when: Callable[[Account], float | None], now: Callable[[], float]
    ) -> None:
        self._accounts = accounts
        self._when = when
        self._now = now
        self._last = -inf
        self._dues = Dues()
        self._known: dict[int, Account] = {}
        self._changed: list[Account] = list(accounts)
        self.few = FEW
        self.looks = 0
        """How often it was asked when something is due."""
        accounts.arrivals.append(self._changed)

    def first(self) -> float:
        """Return when something is due first; `inf` when nothing is."""
        self._update()
        return self._dues.first()

    def due(self, now: float) -> Iterator[Account]:
        """Yield those for whom something is due, the first of all first; each is asked again after that."""
        self._update()
        for place in self._dues.pop(now):
            # One that was taken away while another was seen to is gone.
            account = self._known.get(place)
            if account is not None:
                self._changed.append(account)
                yield account

    def again(self, accounts: Iterable[Account]) -> None:
        """Have accounts asked again, whatever they say of themselves."""
        self._changed += accounts

    def _update(self) -> None:
        now = self._now()
        if len(self._accounts) <= self.few or now < self._last:
            # By a clock that was set back other things are over.
            self._changed.extend(self._accounts)
        self._last = now
        if not self._changed:
            return
        # Each once, in their order: what is due for them may be spread by chance.
        changed = {account.place: account for account in self._changed}
        self._changed.clear()
        for place, account in sorted(changed.items()):
            self.looks += 1
            at = self._when(account)
            if account.removed:
                # Nothing is due for it any more, whatever it says.
                self._dues.set(place, inf)
                self._known.pop(place, None)
                continue
            self._dues.set(place, at if at is not None else inf)
            self._known[place] = account
            if not any(one is self._changed for one in account.watchers):
                account.watchers.append(self._changed)
