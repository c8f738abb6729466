"""How the budgets of a key or a user stand: what was spent in each window, and when it ends."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from sqlalchemy import Connection, func, select

from codex_proxy.ledger.model import Budget, Window
from codex_proxy.ledger.tables import counters, usage_days
from codex_proxy.ledger.windows import DAY, bounds


@dataclass(slots=True, frozen=True)
class Standing:
    """One budget, and what is gone of it."""

    budget: Budget
    spent: int
    resets_at: int | None
    """None where it never does, or its window has not begun."""


def standing(
    connection: Connection,
    owner: str,
    kind: Literal["user", "key"],
    budgets: Iterable[Budget],
    at: int,
) -> list[Standing]:
    """Return how the *budgets* of a user or a key stand at a moment (epoch milliseconds)."""
    return [_standing(connection, owner, kind, budget, at) for budget in budgets]


def _standing(connection: Connection, owner: str, kind: str, budget: Budget, at: int) -> Standing:
    if budget.window is Window.HOURS_5:
        row = connection.execute(
            select(counters.c.spent, counters.c.until).where(
                counters.c.owner == owner,
                counters.c.period == budget.window.value,
                counters.c.start <= at,
                counters.c.until > at,
            )
        ).first()
        # It begins with the first use, so without one there is none.
        return Standing(budget, 0, None) if row is None else Standing(budget, row.spent, row.until)
    start, until = bounds(budget.window, at)
    # The other windows are whole days.
    column = usage_days.c.user_id if kind == "user" else usage_days.c.key_id
    spent = connection.execute(
        select(func.coalesce(func.sum(usage_days.c.cost), 0)).where(
            column == owner, usage_days.c.day >= start // DAY, usage_days.c.day <= at // DAY
        )
    ).scalar_one()
    return Standing(budget, int(spent), None if budget.window is Window.TOTAL else until)
