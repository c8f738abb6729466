"""Which of the accounts that could serve does: pure strategies behind one interface.

The pool has already left out who cannot serve (state, model, concurrency, a worse priority), and
has followed the bonds that leave no choice (compacted history, a turn's state). A strategy sees
what the daemon sees: whole percents, their age, resets; never the future.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from codex_proxy.accounts.account import Account

# An account whose quota nobody has seen is neither the best nor the worst.
UNKNOWN_LEFT = 50.0


@dataclass(slots=True, frozen=True)
class Ask:
    """What a strategy needs to know of a request."""

    family: str | None = None
    """The limit that its model counts on beside the main one; None: the main one."""
    home: Account | None = None
    """The account on which its conversation lives, when that could serve; one of those to choose from."""
    tokens: int = 0
    """About how many input tokens it carries: what another account than `home` would read anew."""


@dataclass(slots=True, frozen=True)
class Score:
    """What speaks for one account."""

    account: Account
    value: float
    """Higher is better."""
    parts: tuple[tuple[str, float], ...] = ()
    """What the value is made of, by names that an owner understands."""


@dataclass(slots=True, frozen=True)
class Choice:
    """An account, and why."""

    account: Account
    rule: str
    scores: Sequence[Score] = ()
    """Of every account that was compared, in any order; empty when none were."""


class Strategy(Protocol):
    """Choose one of several accounts.

    One object lives as long as the pool uses it; what it has learned is by account key.
    """

    name: str

    def stays(self, ask: Ask, now: float) -> str | None:
        """Return the rule by which a conversation stays on `ask.home` without a look at the others.

        Asked first, so that the usual turn of a conversation costs nothing; None: compare all.
        """
        ...

    def choose(self, accounts: Sequence[Account], ask: Ask, now: float) -> Choice:
        """Return one of *accounts*, which is never empty."""
        ...

    def spent(self, account: Account, cost: float, now: float) -> None:
        """Learn that a turn on *account* cost about so many uncached input tokens' worth."""
        ...

    def forget(self, key: str) -> None:
        """Forget what was learned of the account with that key: it left, or its owner wants a fresh start."""
        ...


class QuotaBalance:
    """Take the account with the most quota left, the idlest on a tie, each in turn after that."""

    name = "quota-balance"

    def __init__(self) -> None:
        self._turn = 0

    def stays(self, ask: Ask, now: float) -> str | None:
        return "conversation" if ask.home is not None else None

    def choose(self, accounts: Sequence[Account], ask: Ask, now: float) -> Choice:
        self._turn += 1
        best: Account = accounts[0]
        best_rank: tuple[float, int, int] | None = None
        count = len(accounts)
        for index, account in enumerate(accounts):
            left = account.left(now, ask.family)
            # Whole percents: the backend reports no finer, and a tie must be a tie.
            rank = (
                -round(left if left is not None else UNKNOWN_LEFT),
                account.in_flight,
                (index - self._turn) % count,
            )
            if best_rank is None or rank < best_rank:
                best, best_rank = account, rank
        return Choice(best, "most quota left")

    def spent(self, account: Account, cost: float, now: float) -> None:
        pass

    def forget(self, key: str) -> None:
        pass


STRATEGIES: dict[str, Callable[[], Strategy]] = {
    "quota-balance": QuotaBalance,
}
"""By the names that the setting `strategy` takes."""


def make_strategy(name: str) -> Strategy:
    """Return a new strategy of that name."""
    return STRATEGIES.get(name, QuotaBalance)()
