"""Whether everything adds up."""

from sqlalchemy import Connection, text

from codex_proxy.ledger.model import Window
from codex_proxy.ledger.tables import SUMS
from codex_proxy.ledger.windows import DAY

_ADDED = ", ".join(f"coalesce(sum({name}), 0)" for name in SUMS[2:])


def _apart(one: str, other: str) -> str:
    """Return the question for the users with a row in only one of two questions' answers."""
    return (
        f"SELECT user_id FROM (SELECT * FROM ({one}) AS a EXCEPT SELECT * FROM ({other}) AS b) AS c "
        f"UNION SELECT user_id FROM (SELECT * FROM ({other}) AS d EXCEPT SELECT * FROM ({one}) AS e) AS f"
    )


_QUESTIONS = {
    "held is not what open holds hold": """
        SELECT users.id FROM users LEFT JOIN
            (SELECT user_id, sum(nanos) AS nanos FROM holds WHERE is_billed GROUP BY user_id) AS open
            ON open.user_id = users.id
        WHERE users.held <> coalesce(open.nanos, 0)""",
    "the balance is not the sum of the entries": """
        SELECT users.id FROM users LEFT JOIN
            (SELECT user_id, sum(nanos) AS nanos FROM entries GROUP BY user_id) AS moved ON moved.user_id = users.id
        WHERE users.balance <> coalesce(moved.nanos, 0)""",
    "the balance does not cover what is held": "SELECT id FROM users WHERE held < 0 OR balance < held",
    "what turns cost is not debits and shortfalls": """
        SELECT DISTINCT user_id FROM usage WHERE is_billed AND coalesce(cost, 0) <> debit + shortfall""",
    "turns were paid that are not billed": """
        SELECT DISTINCT user_id FROM usage WHERE NOT is_billed AND (debit <> 0 OR shortfall <> 0)""",
    "debits are not what turns have paid": _apart(
        "SELECT user_id, sum(debit) AS nanos FROM usage GROUP BY user_id HAVING sum(debit) <> 0",
        "SELECT user_id, -sum(nanos) AS nanos FROM entries WHERE request_id <> '' GROUP BY user_id "
        "HAVING sum(nanos) <> 0",
    ),
    "a turn holds something and is settled": """
        SELECT holds.user_id FROM holds JOIN usage ON usage.request_id = holds.request_id WHERE usage."end" <> 'lost'""",
    "the sums of days are not those of their turns": _apart(
        f"SELECT user_id, key_id, model, day, {', '.join(SUMS)} FROM usage_days WHERE turns <> 0",
        f"""SELECT user_id, key_id, model, at / {DAY} AS day, count(*), count(cost), {_ADDED} FROM usage
            GROUP BY user_id, key_id, model, at / {DAY}""",
    ),
    # Of whole days their sums tell, which are looked at above: to add up the turns for each counter would take for ever.
    "a counter of a budget is not what was spent": f"""
        SELECT owner FROM counters WHERE period <> '{Window.HOURS_5.value}' AND spent <> coalesce(
            (SELECT sum(cost) FROM usage_days WHERE (user_id = owner OR key_id = owner)
                AND day >= start / {DAY} AND day < until / {DAY}), 0)
        UNION SELECT owner FROM counters WHERE period = '{Window.HOURS_5.value}' AND spent <> coalesce(
            (SELECT sum(cost) FROM usage WHERE (user_id = owner OR key_id = owner) AND at >= start AND at < until), 0)""",
}

# More than so many names help nobody.
_NAMED = 5


def check(connection: Connection) -> list[str]:
    """Return what does not add up, and for whom; empty when everything does."""
    wrong = []
    for what, question in _QUESTIONS.items():
        found = sorted({str(row[0]) for row in connection.execute(text(question))})
        if found:
            more = f" and {len(found) - _NAMED} more" if len(found) > _NAMED else ""
            wrong.append(f"{what}: {', '.join(found[:_NAMED])}{more}")
    return wrong
