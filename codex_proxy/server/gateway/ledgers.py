"""The ledger as a whole: how it does, and whether the money adds up."""

import dataclasses
from typing import Any

from codex_proxy.server.gateway.amounts import dollars
from codex_proxy.server.gateway.desk import Call, Desk
from codex_proxy.server.gateway.shapes import CheckResult, LedgerStatus, Nothing


async def ledger_status(desk: Desk, call: Call[Nothing, Nothing]) -> LedgerStatus:
    """Tell how the ledger does."""
    ledger = desk.ledger
    users = list(ledger.directory.users())
    return LedgerStatus(
        mode=ledger.mode,
        is_away=ledger.is_away,
        users=len(users),
        keys=len(list(ledger.directory.keys())),
        balance=dollars(sum(user.balance for user in users)),
        held=dollars(sum(user.held for user in users)),
        figures=_figures(ledger.statistics()),
    )


async def ledger_check(desk: Desk, call: Call[Nothing, Nothing]) -> CheckResult:
    """Look whether all sums agree; on a large database it takes a while."""
    problems = await desk.ledger.check()
    return CheckResult(ok=not problems, problems=problems)


def _figures(statistics: Any) -> dict[str, int | float | str | bool]:
    """Return the numbers of a snapshot, those of its parts with their names before them."""
    found: dict[str, int | float | str | bool] = {}
    for one in dataclasses.fields(statistics):
        value = getattr(statistics, one.name)
        if dataclasses.is_dataclass(value):
            found |= {f"{one.name}_{name}": figure for name, figure in _figures(value).items()}
        elif isinstance(value, int | float | str):
            found[one.name] = value
    return found
