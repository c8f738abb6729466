"""What keys may set aside without a look for each of their turns: a part of what their users have, on the loop.

A look takes a commit: each turn would wait for one before it begins, and pay for being suspended. So a key that is in
use gets more than its turn needs, where that is little of what there is. Its next turns take from that at once, and
the writer hears of them as of everything else, in the order in which it came. The book counts it as taken, so that
nobody else can have it.

It is in no database, because it ends with the process: there are allotments only where one process alone writes the
database. One counts for a few seconds by the wall clock, as budgets do: then it is looked at again what there is.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from codex_proxy.ledger.model import Budget, Hold

MILLISECONDS = 5_000
"""How long one counts."""
_TURNS = 16
"""For how many turns at first, of the size of the one that asks for it."""
_MOST_TURNS = 256


@dataclass(slots=True, eq=False)
class Allotment:
    """What one key has."""

    user_id: str
    key_id: str
    budgets: tuple[tuple[str, Budget], ...]
    """Those that were looked at."""
    since: int
    """Epoch milliseconds."""
    left: int = 0
    is_asked: bool = False
    """The writer was asked for more of it, and has not answered."""
    turns: int = _TURNS
    """For how many turns is asked at a time."""

    def counts(self, at: int) -> bool:
        """Tell whether it is for that moment."""
        return 0 <= at - self.since < MILLISECONDS

    def take(self, nanos: int) -> bool:
        """Take *nanos* of it; False when there is not so much."""
        if self.left >= nanos:
            self.left -= nanos
            return True
        if self.is_asked and self.turns < _MOST_TURNS:
            # It is used up faster than it can be asked for.
            self.turns *= 2
        return False

    def wish(self, nanos: int) -> int:
        """Return how much more to ask for when turns of *nanos* take from it; 0 when it is not time for that."""
        if self.is_asked or self.left >= nanos * self.turns // 2:
            return 0
        self.is_asked = True
        return nanos * self.turns

    def answered(self, nanos: int, at: int) -> None:
        """Know by how much it has grown, as of a moment: 0 when that would have been much of what there is."""
        self.is_asked = False
        if nanos:
            self.left += nanos
            self.since = max(at, self.since)
        elif self.turns > _TURNS:
            # Less may be little enough.
            self.turns //= 2

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to give back."""
        return not self.left and not self.is_asked


class Allotments:
    """Those of all keys. Whoever takes one out has to tell the writer, before anything else."""

    def __init__(self) -> None:
        self._of: dict[str, dict[str, Allotment]] = {}
        """By user and key."""
        self._taken_out: dict[str, int] = {}

    def find(self, hold: Hold) -> Allotment | None:
        """Return what the key of a turn has; None when it has nothing."""
        some = self._of.get(hold.user_id)
        return None if some is None else some.get(hold.key_id)

    def put(self, allotment: Allotment) -> None:
        """Take one in."""
        self._of.setdefault(allotment.user_id, {})[allotment.key_id] = allotment

    def take_out(self, allotment: Allotment) -> None:
        """Forget one."""
        some = self._of[allotment.user_id]
        del some[allotment.key_id]
        if not some:
            del self._of[allotment.user_id]
        self._count(allotment.user_id)

    def clear(self) -> bool:
        """Forget all; whether there were any."""
        had_some = bool(self._of)
        for user_id in self._of:
            self._count(user_id)
        self._of.clear()
        return had_some

    def taken_out(self, user_id: str) -> int:
        """Return how often something was taken out that keys of a user had."""
        return self._taken_out.get(user_id, 0)

    def _count(self, user_id: str) -> None:
        self._taken_out[user_id] = self.taken_out(user_id) + 1

    def of_user(self, user_id: str) -> list[Allotment]:
        """Return those of all keys of a user."""
        return list(self._of.get(user_id, {}).values())

    def __iter__(self) -> Iterator[Allotment]:
        return iter([one for some in self._of.values() for one in some.values()])
