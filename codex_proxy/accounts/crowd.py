"""Many accounts, arranged so that a choice among them looks at few: pure.

Accounts that the same requests can be served by stand on one *shelf*; a *crowd* is what is left of the
shelves for one request. A strategy keeps an *order* of each shelf, in which an account is put anew when it
has changed; so a choice costs what a look at the first of each order costs.

Wherever a plain look at all candidates says "the next one after that", places are meant: the order in which
the accounts came to the pool.
"""

import bisect
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, Protocol

from codex_proxy.accounts.account import Account

# Beside the main limit there are one or two.
_MAX_ORDERS = 4

BEYOND = 2**62
"""A place after that of every account."""


class Order(Protocol):
    """The accounts of one shelf as a strategy sees them."""

    def put(self, account: Account, now: float) -> None:
        """Take an account in, or give it the place that it has now."""
        ...

    def drop(self, account: Account) -> None:
        """Leave an account out that is in it."""
        ...


class Shelf:
    """The accounts that are alike in all that decides whether they can serve."""

    __slots__ = ("members", "orders", "places", "profile")

    def __init__(self, profile: Any) -> None:
        self.profile = profile
        """What they are alike in."""
        self.places: list[int] = []
        """The smallest first."""
        self.members: dict[int, Account] = {}
        self.orders: dict[str | None, Order] = {}
        """By the family whose quota is asked for."""

    def __len__(self) -> int:
        return len(self.places)

    def add(self, account: Account, now: float) -> None:
        """Put an account on it."""
        bisect.insort(self.places, account.place)
        self.members[account.place] = account
        for order in self.orders.values():
            order.put(account, now)

    def remove(self, account: Account) -> None:
        """Take an account off it."""
        del self.places[bisect.bisect_left(self.places, account.place)]
        del self.members[account.place]
        for order in self.orders.values():
            order.drop(account)

    def again(self, account: Account, now: float) -> None:
        """Give an account that is on it the places that it has now."""
        for order in self.orders.values():
            order.put(account, now)

    def order(self, family: str | None, make: Callable[[], Order], now: float) -> Any:
        """Return its order by the quota of *family*, made at first sight."""
        order = self.orders.get(family)
        if order is None:
            if len(self.orders) >= _MAX_ORDERS:
                # Each costs something with every change of an account.
                self.orders.clear()
            order = self.orders[family] = make()
            for account in self.members.values():
                order.put(account, now)
        return order


class Crowd:
    """The accounts that could serve one request.

    Args:
        shelves: Where they stand.
        without: The places of those on the shelves that it has tried.
        guest: One that stands elsewhere, the conversation's own; the last of all.
    """

    __slots__ = ("_count", "guest", "shelves", "without")

    def __init__(
        self, shelves: Sequence[Shelf], without: Collection[int] = (), guest: Account | None = None
    ) -> None:
        self.shelves = shelves
        self.without = without
        self.guest = guest
        self._count = sum(map(len, shelves)) - len(without) + (guest is not None)

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Account]:
        """Return them in the order of their places."""
        found = [
            (place, account)
            for shelf in self.shelves
            for place, account in shelf.members.items()
            if place not in self.without
        ]
        found.sort(key=lambda one: one[0])
        yield from (account for _, account in found)
        if self.guest is not None:
            yield self.guest

    def place_of(self, rank: int) -> int:
        """Return the place of the account with that many before it; `BEYOND` for the guest."""
        if self.guest is not None and rank == self._count - 1:
            return BEYOND
        if len(self.shelves) == 1 and not self.without:
            return self.shelves[0].places[rank]
        low = min(shelf.places[0] for shelf in self.shelves)
        high = max(shelf.places[-1] for shelf in self.shelves)
        # The first place up to which there are more than *rank*.
        while low < high:
            middle = (low + high) // 2
            if self._up_to(middle) > rank:
                high = middle
            else:
                low = middle + 1
        return low

    def _up_to(self, place: int) -> int:
        count = sum(bisect.bisect_right(shelf.places, place) for shelf in self.shelves)
        return count - sum(one <= place for one in self.without)


Rank = Any
"""What a strategy sorts by; the smallest first."""


class Ranked:
    """An order by a rank that changes only when its account does, or at a time that is known for it."""

    __slots__ = ("_entries", "_known", "_rank")

    def __init__(self, rank: Callable[[Account, float], Rank]) -> None:
        self._rank = rank
        self._entries: list[tuple[Rank, int]] = []
        self._known: dict[int, tuple[Rank, int]] = {}

    def put(self, account: Account, now: float) -> None:
        """Take an account in, or give it the place that it has now."""
        entry, before = (self._rank(account, now), account.place), self._known.get(account.place)
        if before == entry:
            return
        if before is not None:
            del self._entries[bisect.bisect_left(self._entries, before)]
        self._known[account.place] = entry
        bisect.insort(self._entries, entry)

    def drop(self, account: Account) -> None:
        """Leave an account out that is in it."""
        del self._entries[bisect.bisect_left(self._entries, self._known.pop(account.place))]

    def first(self, without: Collection[int] = ()) -> tuple[Rank, int] | None:
        """Return the first rank and its first place."""
        return next((entry for entry in self._entries if entry[1] not in without), None)

    def next(self, rank: Rank, place: int, without: Collection[int] = ()) -> int | None:
        """Return the first place of that rank that is not before *place*; None when there is none."""
        entries = self._entries
        for index in range(bisect.bisect_left(entries, (rank, place)), len(entries)):
            found, at = entries[index]
            if found != rank:
                return None
            if at not in without:
                return at
        return None
