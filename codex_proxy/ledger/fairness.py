"""How many turns are under way at a time, and who is next when there are more: fair among users and their keys.

While there is room a turn begins at once. Under pressure it waits in the queue of its key, and a place that becomes
free goes to the key whose user has the fewest turns under way, then to the one that has the fewest itself, then to
the one that has had its last one longest ago. So whoever asks for much gets what the others leave, and nobody waits for ever behind them.
The queues are bounded, and so is the time in them.
"""

import asyncio
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

MAX_WAITING = 4096
"""How many turns wait in all, at most."""
MAX_WAITING_OF_ONE = 256
"""How many of them may be of one key."""
MAX_WAITING_OF_USER = 1024
"""How many of them may be of all keys of one user: many keys leave the others room in the queue too."""


class Ceilings(NamedTuple):
    """How many turns may be under way: of the key, of its user, of all; None is any number."""

    key: int | None = None
    user: int | None = None
    all: int | None = None


@dataclass(slots=True)
class Crowded(Exception):
    """There was no place, and no time or no room to wait for one; says whose ceiling it was."""

    whose: str
    """"key", "user" or "all"."""
    limit: int


@dataclass(slots=True, eq=False)
class _Ticket:
    key: str
    user: str
    place: asyncio.Future[None]
    is_queued: bool = True


class Places:
    """The places of turns; *ceilings* is asked at every look, so that a change counts at once."""

    def __init__(self, ceilings: Callable[[str, str], Ceilings]) -> None:
        """Make them; *ceilings* gets the ids of a key and its user."""
        self._ceilings = ceilings
        self._taken = 0
        self._keys: dict[str, int] = {}
        self._users: dict[str, int] = {}
        self._queues: dict[str, deque[_Ticket]] = {}
        self._waiting = 0
        self._waiting_of: dict[str, int] = {}
        """How many of them are of each user."""
        self._last: dict[str, int] = {}
        """When a key got its last place, in numbers of places given; of keys that have one, or wait."""
        self._given = 0

    @property
    def taken(self) -> int:
        """How many turns are under way."""
        return self._taken

    @property
    def waiting(self) -> int:
        """How many wait."""
        return self._waiting

    def try_enter(self, key: str, user: str) -> bool:
        """Take a place if there is one and nobody has been waiting for it; no await, no future."""
        if self._waiting:
            # What held them up may be over. Those who wait on then do so because there is no place for their key.
            self.look()
        if self._full(key, user) is not None:
            return False
        self._take(key, user)
        return True

    async def enter(self, key: str, user: str, seconds: float) -> None:
        """Take a place, and wait for it up to *seconds*.

        Raises:
            Crowded: If there was none in time, or too many wait already.
        """
        if self.try_enter(key, user):
            return
        queue = self._queues.get(key)
        if (
            seconds <= 0
            or self._waiting >= MAX_WAITING
            or self._waiting_of.get(user, 0) >= MAX_WAITING_OF_USER
            or (queue is not None and len(queue) >= MAX_WAITING_OF_ONE)
        ):
            raise self._crowded(key, user)
        ticket = _Ticket(key, user, asyncio.get_running_loop().create_future())
        self._queues.setdefault(key, deque()).append(ticket)
        # Whoever comes anew, or back, is next after those who have waited longer for theirs: before all of them,
        # a few that only ever ask again after each end would have every place, for ever.
        self._last.setdefault(key, self._given - 1)
        self._waiting += 1
        self._waiting_of[user] = self._waiting_of.get(user, 0) + 1
        try:
            async with asyncio.timeout(seconds):
                await ticket.place
        except TimeoutError as exc:
            if not self._withdraw(ticket):
                # It came at the very moment.
                return
            raise self._crowded(key, user) from exc
        except BaseException:
            # Whoever leaves gives its place up, also one that it has just got and has not heard of.
            if not self._withdraw(ticket):
                self.leave(key, user)
            raise

    def leave(self, key: str, user: str) -> None:
        """Give a place back; it goes to whoever is next."""
        self._taken -= 1
        _less(self._keys, key)
        _less(self._users, user)
        self._forget(key)
        if self._waiting:
            self.look()

    def look(self) -> None:
        """Give places to those who wait, as many as there are."""
        # Who cannot have one because of a ceiling of its own does not hold up the others.
        while self._queues and not self._is_full():
            best: _Ticket | None = None
            rank: tuple[int, int, int] = (0, 0, 0)
            for key, queue in list(self._queues.items()):
                ticket = queue[0]
                if ticket.place.done():
                    # Who waited has just left, and has had no time to say so.
                    self._drop(ticket)
                    break
                own = (self._users.get(ticket.user, 0), self._keys.get(key, 0), self._last.get(key, 0))
                if (best is None or own < rank) and self._full(key, ticket.user) is None:
                    best, rank = ticket, own
            else:
                if best is None:
                    return
                self._drop(best)
                self._take(best.key, best.user)
                best.place.set_result(None)

    def _is_full(self) -> bool:
        """Tell whether there is no place for anybody, which spares a look at each of many."""
        ticket = next(iter(self._queues.values()))[0]
        most = self._ceilings(ticket.key, ticket.user).all
        return most is not None and self._taken >= most

    def _full(self, key: str, user: str) -> tuple[str, int] | None:
        """Return whose ceiling leaves no place, and the ceiling."""
        most = self._ceilings(key, user)
        if most.key is not None and self._keys.get(key, 0) >= most.key:
            return "key", most.key
        if most.user is not None and self._users.get(user, 0) >= most.user:
            return "user", most.user
        if most.all is not None and self._taken >= most.all:
            return "all", most.all
        return None

    def _crowded(self, key: str, user: str) -> Crowded:
        # With room, but not for this one: others of its key wait before it.
        whose, limit = self._full(key, user) or ("all", self._taken)
        return Crowded(whose, limit)

    def _take(self, key: str, user: str) -> None:
        self._taken += 1
        self._given += 1
        self._last[key] = self._given
        self._keys[key] = self._keys.get(key, 0) + 1
        self._users[user] = self._users.get(user, 0) + 1

    def _withdraw(self, ticket: _Ticket) -> bool:
        """Take a ticket out of its queue; False when it has a place already."""
        if ticket.place.done() and not ticket.place.cancelled():
            return False
        if ticket.is_queued:
            self._drop(ticket)
        return True

    def _drop(self, ticket: _Ticket) -> None:
        ticket.is_queued = False
        queue = self._queues[ticket.key]
        if queue[0] is ticket:
            queue.popleft()
        else:
            queue.remove(ticket)
        if not queue:
            del self._queues[ticket.key]
            self._forget(ticket.key)
        self._waiting -= 1
        _less(self._waiting_of, ticket.user)

    def _forget(self, key: str) -> None:
        if key not in self._keys and key not in self._queues:
            self._last.pop(key, None)


def _less(counts: dict[str, int], name: str) -> None:
    left = counts[name] - 1
    if left:
        counts[name] = left
    else:
        del counts[name]
