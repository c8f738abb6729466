"""Each thing that `ledger check` looks for is found when it is so, and named."""

import pytest
from sqlalchemy import Connection, text

from codex_proxy.ledger.checks import check
from codex_proxy.ledger.model import Budget, Window
from tests.ledger.conftest import Database
from tests.ledger.making import DOLLAR, hold, holder, running, settlement

WRONG = (
    ("held is not what open holds hold", "UPDATE users SET held = held + 1 WHERE name = 'team'"),
    (
        "the balance is not the sum of the entries",
        "UPDATE users SET balance = balance + 1 WHERE name = 'team'",
    ),
    ("what turns cost is not debits and shortfalls", "UPDATE usage SET shortfall = shortfall + 1"),
    ("turns were paid that are not billed", "UPDATE usage SET is_billed = NOT is_billed"),
    ("debits are not what turns have paid", "UPDATE usage SET debit = debit - 1, shortfall = shortfall + 1"),
    ("a turn holds something and is settled", "UPDATE holds SET request_id = 'one'"),
    ("the sums of days are not those of their turns", "UPDATE usage_days SET input_tokens = 1"),
    ("the sums of days are not those of their turns", "UPDATE usage_days SET day = day + 1"),
    ("a counter of a budget is not what was spent", "UPDATE counters SET spent = 1 WHERE period = 'day'"),
    ("a counter of a budget is not what was spent", "UPDATE counters SET spent = 1 WHERE period = 'total'"),
    ("a counter of a budget is not what was spent", "UPDATE counters SET spent = 1 WHERE period = '5h'"),
)


class UndoneError(Exception):
    """What was written is taken back."""


async def test_what_is_wrong_is_found_and_named(database: Database) -> None:
    async with running(database) as ledger:
        team = await holder(ledger)
        budgets = tuple(
            (owner, Budget(window, 5 * DOLLAR)) for window in Window for owner in (team.user_id, team.key_id)
        )
        await ledger.authorize(hold(team, "one", budgets=budgets))
        await ledger.settled(settlement(team, "one", budgets=budgets))
        await ledger.authorize(hold(team, "two", budgets=budgets))
        assert await ledger.check() == []
        for what, statement in WRONG:
            found: list[str] = []

            def work(connection: Connection, statement: str = statement, found: list[str] = found) -> None:
                assert connection.execute(text(statement)).rowcount >= 1
                found += check(connection)
                raise UndoneError

            with pytest.raises(UndoneError):
                await ledger.write(work)
            assert [line for line in found if line.startswith(f"{what}: ") and "_" in line], (what, found)
        assert await ledger.check() == []
