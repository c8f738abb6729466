"""Between the database and a book: loads what operations are about, and writes what they have changed."""

from collections.abc import Iterable, Sequence
from typing import Any

import orjson
from sqlalchemy import Connection, text

from codex_proxy.ledger.book import (
    Account,
    Book,
    Changes,
    Charge,
    Counter,
    KeyFacts,
    Reserved,
    Settled,
    Wanted,
)
from codex_proxy.ledger.model import Window
from codex_proxy.ledger.tables import (
    SUMS,
    client_keys,
    counters,
    entries,
    holds,
    usage,
    usage_attempts,
    usage_days,
    users,
)
from codex_proxy.ledger.windows import DAY, bounds
from codex_proxy.storage.bulk import Bulk, change, deletion, insertion, look_up

_ACCOUNT = (users.c.id, users.c.status, users.c.is_billed, users.c.balance, users.c.held, users.c.is_past_due)
_HOLD = tuple(holds.c)
_SETTLED = (usage.c.request_id, usage.c.end, usage.c.at, usage.c.user_id, usage.c.key_id, usage.c.model)

# Whoever has a user's row decides alone what the user's keys, holds and counters become. In the order of their ids, so
# that nobody waits for one who waits for him.
_find_accounts_locked = look_up(users.c.id, _ACCOUNT, ending="ORDER BY id FOR UPDATE")
_find_accounts = look_up(users.c.id, _ACCOUNT)
_find_keys = look_up(client_keys.c.id, (client_keys.c.id, client_keys.c.status, client_keys.c.expires))
_find_holds = look_up(holds.c.request_id, _HOLD)
# A key is one user's, so what it holds is among that.
_find_held = Bulk(
    [holds.c.user_id],
    lambda rows: (
        f"SELECT user_id, key_id, CAST(sum(nanos) AS BIGINT) FROM holds WHERE user_id IN ({rows}) "
        "GROUP BY user_id, key_id"
    ),
)
_find_settled = look_up(usage.c.request_id, _SETTLED)
_find_counters = look_up(counters.c.owner, tuple(counters.c))

_change_accounts = change(users.c.id, (users.c.balance, users.c.held, users.c.is_past_due))
_add_holds = insertion(holds)
_change_holds = change(holds.c.request_id, (holds.c.nanos,))
_delete_holds = deletion(holds.c.request_id)
_delete_lost = deletion(usage.c.request_id, where="usage.\"end\" = 'lost'")
_add_usage = insertion(usage, leaving_out=("id",))
_add_attempts = insertion(usage_attempts, on_conflict="DO NOTHING")
_add_entries = insertion(entries, leaving_out=("id", "idempotency_key"))
_put_counters = insertion(counters, on_conflict="(owner, period, start) DO UPDATE SET spent = excluded.spent")
_add_to_days = insertion(
    usage_days,
    on_conflict="(day, user_id, key_id, model) DO UPDATE SET "
    + ", ".join(f"{name} = usage_days.{name} + excluded.{name}" for name in SUMS),
)

_WINDOWS = {window.value: window for window in Window}


class Loader:
    """Loads into a book what is not there yet.

    With *is_alone* nobody else changes the database, so what the book has is right, and a book begins with all open
    holds; otherwise the users' rows are locked, and a book serves for one transaction.
    """

    def __init__(self, connection: Connection, book: Book, *, is_alone: bool) -> None:
        self._connection = connection
        self._book = book
        self._is_alone = is_alone

    def load_all_holds(self) -> None:
        """Take in every open hold."""
        for row in self._connection.execute(holds.select()):
            self._book.add_hold(_reserved(row))

    def load(self, wanted: Wanted) -> None:
        """Load what is *wanted*."""
        book, connection = self._book, self._connection
        find = _find_accounts if self._is_alone else _find_accounts_locked
        for row in find.fetch(connection, _rows(wanted.users)):
            user_id, status, is_billed, balance, held, is_past_due = row
            book.accounts[user_id] = Account(
                user_id, status, bool(is_billed), balance, held, bool(is_past_due)
            )
        for key_id, status, expires in _find_keys.fetch(connection, _rows(wanted.keys)):
            book.keys[key_id] = KeyFacts(status, expires)
        if not self._is_alone:
            for row in _find_holds.fetch(connection, _rows(wanted.requests)):
                hold = _reserved(row)
                # What all of them hold in all is counted below, where it matters.
                book.holds[hold.request_id] = hold
        for row in _find_settled.fetch(connection, _rows(wanted.requests.difference(book.holds))):
            book.settled[row[0]] = Settled(*row)
        self._load_counters(wanted)

    def _load_counters(self, wanted: Wanted) -> None:
        book = self._book
        owners = _rows(wanted.owners)
        for (owner,) in owners:
            book.counters[owner] = []
        for owner, period, start, until, spent in _find_counters.fetch(self._connection, owners):
            book.add_counter(Counter(owner, _WINDOWS[period], start, until, spent), is_new=False)
        for (user_id, _), (budgets, moments) in wanted.budgets.items():
            for owner, budget in budgets:
                self._have_counters(owner, budget.window, moments, is_user=owner == user_id)
        if not self._is_alone:
            self._load_held({(user_id,) for user_id, _ in wanted.budgets})

    def _have_counters(self, owner: str, window: Window, moments: list[int], *, is_user: bool) -> None:
        """Have a counter for each of some moments, which are nearly always in one window."""
        book = self._book
        for counter in book.counters[owner]:
            if counter.window is window and counter.start <= min(moments) and max(moments) < counter.until:
                return
        for at in moments:
            if book.counter(owner, window, at) is None:
                start, until = bounds(window, at)
                spent = self._spent(is_user, owner, window, start, until)
                book.add_counter(Counter(owner, window, start, until, spent), is_new=True)

    def _spent(self, is_user: bool, owner: str, window: Window, start: int, until: int) -> int:
        """Return what was spent in a window so far."""
        column = "user_id" if is_user else "key_id"
        if window is Window.HOURS_5:
            # It begins now; there can be something only if a clock was set back.
            question = f"SELECT CAST(coalesce(sum(cost), 0) AS BIGINT) FROM usage WHERE at >= :start AND at < :until AND {column} = :owner"
            values = {"start": start, "until": until, "owner": owner}
        else:
            question = f"SELECT CAST(coalesce(sum(cost), 0) AS BIGINT) FROM usage_days WHERE {column} = :owner AND day >= :start AND day < :until"
            # A day is a smaller number than a moment.
            values = {"owner": owner, "start": start // DAY, "until": min(until // DAY, 2**31 - 1)}
        return int(self._connection.execute(text(question), values).scalar_one())

    def _load_held(self, of: Iterable[tuple[str]]) -> None:
        held = self._book.held
        for user_id, key_id, nanos in _find_held.fetch(self._connection, sorted(of)):
            for owner in {user_id, key_id}:
                held[owner] = held.get(owner, 0) + int(nanos)


def write(connection: Connection, changes: Changes) -> None:
    """Write what a book has changed."""
    _delete_holds.run(connection, [(one,) for one in changes.released])
    _add_holds.run(
        connection,
        [
            (
                one.request_id,
                one.user_id,
                one.key_id,
                one.nanos,
                one.is_billed,
                one.at,
                one.model,
                one.process,
            )
            for one in changes.granted.values()
        ],
    )
    _change_holds.run(connection, [(one.request_id, one.nanos) for one in changes.grown.values()])
    _delete_lost.run(connection, [(one,) for one in changes.undone])
    _add_usage.run(connection, [_usage_row(one) for one in changes.charges])
    _add_attempts.run(
        connection,
        [
            (one.settlement.request_id, number, try_.target, try_.outcome, try_.status, try_.milliseconds)
            for one in changes.charges
            if not _is_plain(one)
            for number, try_ in enumerate(one.settlement.attempts, 1)
        ],
    )
    _add_entries.run(
        connection,
        [
            (
                one.settlement.user_id,
                "debit",
                -one.debit,
                one.balance_after,
                one.settlement.at,
                one.settlement.request_id,
                "",
                "",
            )
            for one in changes.charges
            if one.debit
        ],
    )
    _put_counters.run(
        connection,
        [(one.owner, one.window.value, one.start, one.until, one.spent) for one in changes.counters.values()],
    )
    _add_to_days.run(connection, [(*place, *sums) for place, sums in sorted(changes.days.items())])
    _change_accounts.run(
        connection,
        [(one.id, one.balance, one.held, one.is_past_due) for one in changes.accounts.values()],
    )


def _is_plain(charge: Charge) -> bool:
    """Tell whether a turn's usage row says all that there is to say of its attempts."""
    attempts = charge.settlement.attempts
    return len(attempts) == 1 and attempts[0].outcome == "ok"


def _usage_row(charge: Charge) -> tuple[object, ...]:
    one = charge.settlement
    return (
        one.request_id,
        one.user_id,
        one.key_id,
        one.at,
        one.route,
        one.asked_model,
        one.model,
        one.tier,
        one.target,
        one.upstream,
        one.client,
        one.end,
        one.status,
        one.error,
        one.input_tokens,
        one.cached_tokens,
        one.cache_write_tokens,
        one.output_tokens,
        one.reasoning_tokens,
        one.source._value_,
        " ".join(one.flags),
        charge.cost,
        charge.is_billed,
        charge.debit,
        charge.shortfall,
        orjson.dumps(dict(one.prices)).decode(),
        one.price_id,
        one.milliseconds,
    )


def _reserved(row: Sequence[Any]) -> Reserved:
    request_id, user_id, key_id, nanos, is_billed, at, model, process = row
    return Reserved(request_id, user_id, key_id, nanos, bool(is_billed), at, model, process)


def _rows(ids: Iterable[str]) -> list[tuple[str]]:
    # In order, because rows are locked in it.
    return [(one,) for one in sorted(ids)]
