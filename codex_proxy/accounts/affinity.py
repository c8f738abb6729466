"""Memory of what belongs to which account: conversations, and encrypted items.

A conversation that stays on its account keeps its prompt cache; encrypted reasoning can be
read only by the account that issued it (contract, section 2.4). Bounded, in memory, pure.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Iterator
from typing import Generic, TypeVar

V = TypeVar("V")


class Recent(Generic[V]):
    """A mapping that forgets: the least recently used entry past *size*, any after *ttl* seconds."""

    def __init__(self, size: int, ttl: float) -> None:
        self._size = size
        self._ttl = ttl
        self._entries: OrderedDict[str, tuple[float, V]] = OrderedDict()

    def put(self, key: str, value: V, now: float) -> None:
        """Remember *value*; an entry that is there starts a new life."""
        self._entries[key] = (now + self._ttl, value)
        self._entries.move_to_end(key)
        while len(self._entries) > self._size:
            self._entries.popitem(last=False)

    def get(self, key: str, now: float) -> V | None:
        """Return what is remembered, None when nothing is."""
        entry = self._entries.get(key)
        if entry is None:
            return None
        if entry[0] <= now:
            del self._entries[key]
            return None
        self._entries.move_to_end(key)
        return entry[1]

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)


class Affinity:
    """Which account a conversation lives on."""

    def __init__(self, size: int = 20_000, ttl: float = 6 * 3600.0) -> None:
        self._sessions: Recent[str] = Recent(size, ttl)

    def bind(self, session: str, account: str, now: float) -> None:
        """Note that *account* served *session*."""
        self._sessions.put(session, account, now)

    def find(self, session: str | None, now: float) -> str | None:
        """Return the key of the account that served *session* last."""
        return self._sessions.get(session, now) if session is not None else None

    def __len__(self) -> int:
        return len(self._sessions)


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
        self._issued.put(_digest(content), account, now)

    def of(self, content: str, now: float) -> str | None:
        """Return the key of the account that issued an item, when that is known."""
        return self._issued.get(_digest(content), now)

    def refused(self, content: str, account: str, now: float) -> None:
        """Note that *account* could not read an item."""
        self._refused.put(f"{account}:{_digest(content)}", True, now)

    def is_foreign(self, content: str, account: str, now: float) -> bool:
        """Tell whether an item is not known to come from *account*."""
        return self.of(content, now) != account

    def was_refused(self, content: str, account: str, now: float) -> bool:
        """Tell whether *account* has refused this item before."""
        if not self._refused:
            return False
        return self._refused.get(f"{account}:{_digest(content)}", now) is not None

    @property
    def any_refused(self) -> bool:
        """Whether anything was ever refused; while not, nobody needs to look."""
        return len(self._refused) > 0


def _digest(content: str) -> str:
    return hashlib.blake2b(content.encode("utf-8", "surrogatepass"), digest_size=12).hexdigest()
