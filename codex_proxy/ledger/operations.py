"""What the writer of a ledger is asked to do; it does it in the order in which it was asked."""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from codex_proxy.ledger.allotments import Allotment
from codex_proxy.ledger.book import Book, Wanted
from codex_proxy.ledger.model import Budget, Hold, Key, Settlement, User

if TYPE_CHECKING:
    from sqlalchemy import Connection

Promise = asyncio.Future[Any] | None
"""Who waits for what comes of it."""


@dataclass(slots=True)
class Authorize:
    """Set something aside."""

    hold: Hold
    is_billed: bool
    """As far as this process knows; what the database says decides."""
    promise: Promise = None
    is_allotted: bool = False
    """It was taken from what its key has, and its turn has begun."""
    allotment: Allotment | None = None
    """What is to grow with it."""
    wish: int = 0
    """By how much."""
    tried: int = 0
    """How often it was to be done and may not be: then it may be done all the same, and its turn over."""

    @property
    def request_id(self) -> str:
        """Which turn it is about."""
        return self.hold.request_id

    def want(self, wanted: Wanted) -> None:
        """Say what has to be known for it."""
        wanted.begin(self.hold)
        if self.tried:
            wanted.requests.add(self.request_id)

    def decide(self, book: Book) -> None:
        """Do it."""
        hold = self.hold
        book.authorize(hold, is_allotted=self.is_allotted)
        if self.allotment is not None:
            book.allot(self.allotment, self.wish, hold.budgets, hold.at)


@dataclass(slots=True)
class TopUp:
    """Set aside more."""

    request_id: str
    user_id: str
    key_id: str
    nanos: int
    at: int
    is_billed: bool
    budgets: tuple[tuple[str, Budget], ...]
    promise: Promise

    def want(self, wanted: Wanted) -> None:
        """Say what has to be known for it."""
        wanted.go_on(self.request_id, self.user_id, self.key_id, self.budgets, self.at)

    def decide(self, book: Book) -> bool:
        """Do it; whether there was so much."""
        return book.top_up(self.request_id, self.nanos, self.budgets, self.at)


@dataclass(slots=True)
class Settle:
    """Release what was set aside, and take what it cost."""

    settlement: Settlement
    promise: Promise = None

    @property
    def request_id(self) -> str:
        """Which turn it is about."""
        return self.settlement.request_id

    def want(self, wanted: Wanted) -> None:
        """Say what has to be known for it."""
        of = self.settlement
        wanted.go_on(of.request_id, of.user_id, of.key_id, of.budgets, of.at)

    def decide(self, book: Book) -> bool:
        """Do it; whether it was not done before."""
        return book.settle(self.settlement)


@dataclass(slots=True)
class Reap:
    """Release what nobody will settle."""

    request_id: str
    user_id: str
    key_id: str
    at: int
    promise: Promise = None
    tried: int = 0

    def want(self, wanted: Wanted) -> None:
        """Say what has to be known for it."""
        wanted.go_on(self.request_id, self.user_id, self.key_id, (), self.at)

    def decide(self, book: Book) -> bool:
        """Do it; whether there was something."""
        return book.reap(self.request_id, self.at)


@dataclass(slots=True)
class Drop:
    """Release what may have been set aside for a turn that was refused, because that was not known."""

    request_id: str
    user_id: str
    key_id: str
    at: int
    promise: Promise = None
    tried: int = 0

    def want(self, wanted: Wanted) -> None:
        """Say what has to be known for it."""
        wanted.go_on(self.request_id, self.user_id, self.key_id, (), self.at)

    def decide(self, book: Book) -> None:
        """Do it."""
        book.drop(self.request_id)


@dataclass(slots=True)
class Recall:
    """End what was allotted to a key, or to all; nothing is taken from it after this."""

    user_id: str = ""
    key_id: str = ""
    promise: Promise = None

    @property
    def request_id(self) -> str:
        """It is about no turn."""
        return ""

    def want(self, wanted: Wanted) -> None:
        """Say what has to be known for it: nothing."""

    def decide(self, book: Book) -> None:
        """Do it."""
        if self.key_id:
            book.recall(self.user_id, self.key_id)
        else:
            book.recall_all()


@dataclass(slots=True)
class Work:
    """Change something else, in a transaction of its own.

    What it may change of users and keys is read again after it: those named, or all.
    """

    work: "Callable[[Connection], Any]"
    promise: Promise
    concerns: Callable[[Any], tuple[str, ...]] | None = None
    """Tells which users what *work* gives is about, if it is about no others and no keys."""
    users: tuple[str, ...] = ()
    keys: tuple[str, ...] = ()
    is_quiet: bool = False
    """It changes nothing that anybody remembers."""


@dataclass(slots=True)
class Errand:
    """Have the writer do something of its own: hand over, take back, end."""

    name: str
    promise: Promise


Decided = Authorize | TopUp | Settle | Reap | Drop | Recall
Operation = Decided | Work | Errand


@dataclass(slots=True, frozen=True)
class Everybody:
    """All users and keys; a key with the digest of the text it had before, and until when that counts."""

    users: list[User]
    keys: list[tuple[Key, bytes | None, int | None]]


@dataclass(slots=True)
class News:
    """What has come of a batch, for the loop."""

    answers: list[tuple[asyncio.Future[Any], Any, BaseException | None]]
    balances: list[tuple[str, int, int, bool]]
    users: list[User]
    keys: list[tuple[Key, bytes | None, int | None]]
    everybody: Everybody | None = None
    allotted: Sequence[tuple[Allotment, int, int]] = ()
