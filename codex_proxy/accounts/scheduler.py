"""Which of the accounts that could serve does: a pure choice behind one interface."""

from collections.abc import Sequence
from typing import Protocol

from codex_proxy.accounts.account import Account

# An account whose quota nobody has seen is neither the best nor the worst.
UNKNOWN_LEFT = 50.0


class Strategy(Protocol):
    """Choose one of several accounts; the list is never empty."""

    def choose(self, accounts: Sequence[Account], family: str | None, now: float) -> tuple[Account, str]:
        """Return the account, and the rule that chose it."""
        ...


class MostQuotaLeft:
    """Take the account with the most quota left, the idlest on a tie, each in turn after that."""

    def __init__(self) -> None:
        self._turn = 0

    def choose(self, accounts: Sequence[Account], family: str | None, now: float) -> tuple[Account, str]:
        self._turn += 1
        best: Account = accounts[0]
        best_rank: tuple[float, int, int] | None = None
        count = len(accounts)
        for index, account in enumerate(accounts):
            left = account.left(now, family)
            # Whole percents: the backend reports no finer, and a tie must be a tie.
            rank = (
                -round(left if left is not None else UNKNOWN_LEFT),
                account.in_flight,
                (index - self._turn) % count,
            )
            if best_rank is None or rank < best_rank:
                best, best_rank = account, rank
        return best, "most quota left"
