"""Memory of what belongs to which account: conversations, and encrypted items.

A conversation that stays on its account keeps its prompt cache; encrypted reasoning can be
read only by the account that issued it (contract, section 2.4). Bounded, in memory, pure.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

V = TypeVar("V")


class Recent(Generic[V]):
    """A mapping that forgets: the least recently used entry past *size*, any after *ttl* seconds."""

    def __init__(self, size: int, ttl: float) -> None:
        self._size = size
        self.ttl = ttl
        self.puts = 0
        """How often something was remembered."""
        self._entries: OrderedDict[str, tuple[float, V]] = OrderedDict()

    def put(self, key: str, value: V, now: float) -> None:
        """Remember *value*; an entry that is there starts a new life."""
        self.puts += 1
        self._entries[key] = (now, value)
        self._entries.move_to_end(key)
        while len(self._entries) > self._size:
            self._entries.popitem(last=False)

    def get(self, key: str, now: float) -> V | None:
        """Return what is remembered, None when nothing is."""
        entry = self._entries.get(key)
        if entry is None:
            return None
        if entry[0] + self.ttl <= now:
            del self._entries[key]
            return None
        self._entries.move_to_end(key)
        return entry[1]

    def put_at(self, key: str) -> float | None:
        """Return when *key* was put last; None when it is not there."""
        entry = self._entries.get(key)
        return entry[0] if entry is not None else None

    def entries(self) -> Iterator[tuple[str, float, V]]:
        """Yield keys, times and values, the least recently used first; it may change meanwhile."""
        for key in list(self._entries):
            entry = self._entries.get(key)
            if entry is not None:
                yield key, *entry

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)


class Affinity:
    """Which accounts a conversation has lived on, the last one first.

    An account that could not serve is left without being forgotten: the conversation has moved,
    and where it was before is the next best place.
    """

    PLACES = 3
    """How many places are remembered of one conversation."""

    def __init__(self, size: int = 20_000, ttl: float = 6 * 3600.0) -> None:
        self._sessions: Recent[tuple[str, ...]] = Recent(size, ttl)

    @property
    def ttl(self) -> float:
        """How long after its last turn a conversation is remembered; may be changed."""
        return self._sessions.ttl

    @ttl.setter
    def ttl(self, seconds: float) -> None:
        self._sessions.ttl = seconds

    def bind(self, session: str, account: str, now: float) -> None:
        """Note that *account* served *session*."""
        before = self._sessions.get(session, now) or ()
        if before[:1] != (account,):
            before = (account, *(one for one in before if one != account))[: self.PLACES]
        self._sessions.put(session, before, now)

    def homes(self, session: str | None, now: float) -> tuple[str, ...]:
        """Return the keys of the accounts that served *session*, the last one first."""
        return (self._sessions.get(session, now) or ()) if session is not None else ()

    def idle(self, session: str | None, now: float) -> float:
        """Return how many seconds ago *session* was served last; 0 when that is not remembered."""
        at = self._sessions.put_at(session) if session is not None else None
        return max(0.0, now - at) if at is not None else 0.0

    @property
    def changes(self) -> int:
        """How often something was noted; while it is the same, `dump` yields the same or less."""
        return self._sessions.puts

    def dump(self) -> Iterator[tuple[str, float, tuple[str, ...]]]:
        """Yield all of it, ready to be JSON: session, time, accounts; the least recent first."""
        return self._sessions.entries()

    def restore(self, entries: list[object], now: float) -> None:
        """Take up what `dump` returned; whatever else stands there is left out."""
        for entry in entries:
            match entry:
                case [str(session), float() | int() as at, [*homes]] if at <= now:
                    places = tuple(home for home in homes if isinstance(home, str))[: self.PLACES]
                    if places:
                        self._sessions.put(session, places, float(at))

    def __len__(self) -> int:
        return len(self._sessions)


@dataclass(slots=True, frozen=True)
class Owner:
    """Who wrote a piece of compacted history."""

    account: str
    workspace: str


class Ownership(Protocol):
    """Who wrote which compacted history; it cannot be left out of a conversation, nor be read by others."""

    def get(self, digest: str) -> Owner | None:
        """Return the owner of the item with that digest, when it is known."""
        ...

    def add(self, digest: str, account: str, workspace: str, now: float) -> None:
        """Note an owner."""
        ...


class OwnersInMemory:
    """Ownership for as long as the process lives."""

    def __init__(self) -> None:
        self._owners: dict[str, Owner] = {}

    def get(self, digest: str) -> Owner | None:
        return self._owners.get(digest)

    def add(self, digest: str, account: str, workspace: str, now: float) -> None:
        self._owners[digest] = Owner(account, workspace)


class Origins:
    """Which encrypted items an account issued, and which it has refused.

    Only digests are kept. An account is told again about an item it refused in vain, so what
    it refused once is left out the next time.
    """

    def __init__(self, size: int = 100_000, ttl: float = 24 * 3600.0) -> None:
        self._issued: Recent[str] = Recent(size, ttl)
        self._refused: Recent[bool] = Recent(size, ttl)

    def issued(self, content: str, account: str, now: float) -> None:
        """Note that *account* issued an item."""
        self._issued.put(digest(content), account, now)

    def of(self, content: str, now: float) -> str | None:
        """Return the key of the account that issued an item, when that is known."""
        return self._issued.get(digest(content), now)

    def refused(self, content: str, account: str, now: float) -> None:
        """Note that *account* could not read an item."""
        self._refused.put(f"{account}:{digest(content)}", True, now)

    def is_foreign(self, content: str, account: str, now: float) -> bool:
        """Tell whether an item is not known to come from *account*."""
        return self.of(content, now) != account

    def was_refused(self, content: str, account: str, now: float) -> bool:
        """Tell whether *account* has refused this item before."""
        if not self._refused:
            return False
        return self._refused.get(f"{account}:{digest(content)}", now) is not None

    @property
    def any_refused(self) -> bool:
        """Whether anything was ever refused; while not, nobody needs to look."""
        return len(self._refused) > 0


def digest(content: str) -> str:
    """Return the name of an encrypted item: short, and nothing of what is in it."""
    return hashlib.blake2b(content.encode("utf-8", "surrogatepass"), digest_size=12).hexdigest()
