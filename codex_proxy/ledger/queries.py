"""What is asked of the ledger: functions of a connection, for `Ledger.read`. On a million turns a page takes a few
milliseconds, a sum over everything some tens.

Sums come from the sums of days, which are written with each turn; so they are of whole days, by UTC. Lists come in
pages, the newest first: a page's cursor is the place of its last row, so what is new meanwhile moves nothing.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any, Generic, TypeVar

from sqlalchemy import (
    BigInteger,
    Column,
    ColumnElement,
    CompoundSelect,
    Connection,
    Row,
    Select,
    Table,
    and_,
    cast,
    func,
    null,
    or_,
    select,
    union,
)

from codex_proxy.errors import RequestError
from codex_proxy.ledger.changes import entry_of
from codex_proxy.ledger.model import AttemptRow, Budget, Entry, Window
from codex_proxy.ledger.tables import SUMS, audit, counters, entries, usage, usage_attempts, usage_days
from codex_proxy.ledger.windows import DAY, bounds
from codex_proxy.protocol.wire import loads

T = TypeVar("T")

GROUPS = ("user", "key", "model", "day")
"""By what usage can be added up, in any combination."""
MOST_SUMS = 20_000
"""Groups of one answer: there may be one for each key, model and day."""
MOST_NAMES = 500

# Between what a caller calls its request and what the gate has added; the next character ends all that begin so.
_MARK, _AFTER_MARK = "~", "\x7f"
_CURSOR = re.compile(r"([0-9]{1,18})-([0-9]{1,18})")
_NUMBER = re.compile(r"[0-9]{1,18}")
# Beyond every moment, and the last day that has a number.
_END, _LAST_DAY = 2**62, 2**31 - 1


@dataclass(slots=True, frozen=True)
class UsageFilter:
    """Which turns are meant, by ids and names; None leaves one aside."""

    user: str | None = None
    key: str | None = None
    model: str | None = None
    since: int | None = None
    """Epoch milliseconds."""
    until: int | None = None
    """The first moment after it."""


@dataclass(slots=True, frozen=True)
class Page(Generic[T]):
    """Some rows, and the cursor of those that follow; None when there are none."""

    rows: list[T]
    next: str | None


@dataclass(slots=True, frozen=True)
class UsageRow:
    """One turn, as it was settled. Times are epoch milliseconds, money is nanodollars."""

    id: int
    request_id: str
    """As the caller and the records know it."""
    user_id: str
    key_id: str
    at: int
    route: str
    asked_model: str
    model: str
    tier: str
    target: str
    upstream: str
    client: str
    end: str
    status: int
    error: str
    input_tokens: int
    cached_tokens: int
    cache_write_tokens: int
    output_tokens: int
    reasoning_tokens: int
    source: str
    flags: tuple[str, ...]
    cost: int | None
    """None: it has no price."""
    is_billed: bool
    debit: int
    shortfall: int
    prices: dict[str, str]
    price_id: str
    milliseconds: int
    attempts: tuple[AttemptRow, ...] | None = None
    """Only of one that was asked for by its id."""


@dataclass(slots=True, frozen=True)
class UsageSum:
    """What some turns have used together; what they are not told apart by is None."""

    user: str | None
    key: str | None
    model: str | None
    day: int | None
    """Days since 1970."""
    turns: int
    priced: int
    """How many of them have a price."""
    input_tokens: int
    cached_tokens: int
    cache_write_tokens: int
    output_tokens: int
    reasoning_tokens: int
    cost: int
    debit: int
    shortfall: int


@dataclass(slots=True, frozen=True)
class AuditRow:
    """Who has changed what."""

    id: int
    at: int
    actor: str
    action: str
    target: str
    before: str | None
    """JSON, as the next one."""
    after: str | None


@dataclass(slots=True, frozen=True)
class Spent:
    """How a budget stands."""

    window: Window
    nanos: int
    spent: int
    resets_at: int | None
    """Epoch milliseconds; None when it does not begin anew, or has not begun."""


# -- usage -----------------------------------------------------------------------------------


def usage_page(
    connection: Connection, wanted: UsageFilter, *, limit: int, before: str | None = None
) -> Page[UsageRow]:
    """Return up to *limit* turns, those before the cursor *before*.

    Raises:
        RequestError: If the cursor is none.
    """
    days = None
    if not wanted.user is wanted.key is wanted.model is None:
        days = select(usage_days.c.day).where(*_who(usage_days, wanted), usage_days.c.turns > 0)
    rows, following = _newest(
        connection,
        _all_of_usage.where(*_who(usage, wanted)),
        usage,
        days,
        wanted.since or 0,
        _END if wanted.until is None else wanted.until,
        limit,
        before,
    )
    return Page([_usage_row(row) for row in rows], following)


def _newest(
    connection: Connection,
    question: Select[Any],
    table: Table,
    days: Select[Any] | CompoundSelect[Any] | None,
    since: int,
    until: int,
    limit: int,
    before: str | None,
) -> tuple[list[Row[Any]], str | None]:
    """Return rows of *table*, the latest first, and the cursor of those that follow.

    Looked at are *days* (since 1970) alone, where they are given: an index says when something was, not whose it was.
    """
    last: tuple[int, int] | None = None
    if before is not None:
        match = _CURSOR.fullmatch(before)
        if match is None:
            raise _no_cursor()
        last = int(match[1]), int(match[2])
        until = min(until, last[0] + 1)
    rows: list[Row[Any]] = []
    for start, end in _spans(connection, days, since, until):
        found = question.where(table.c.at >= start, table.c.at < end)
        if last is not None and last[0] < end:
            found = found.where(or_(table.c.at < last[0], table.c.id < last[1]))
        found = found.order_by(table.c.at.desc(), table.c.id.desc()).limit(limit + 1 - len(rows))
        rows += connection.execute(found)
        if len(rows) > limit:
            break
    shown = rows[:limit]
    return shown, f"{shown[-1].at}-{shown[-1].id}" if len(rows) > limit and shown else None


def _spans(
    connection: Connection, days: Select[Any] | CompoundSelect[Any] | None, since: int, until: int
) -> Iterator[tuple[int, int]]:
    if days is None:
        yield since, until
        return
    day = days.subquery().c.day
    question = (
        select(day)
        .distinct()
        .where(day >= min(since // DAY, _LAST_DAY), day <= min((until - 1) // DAY, _LAST_DAY))
        .order_by(day.desc())
    )
    for number in connection.execute(question).scalars().all():
        yield max(since, number * DAY), min(until, (number + 1) * DAY)


def usage_of(connection: Connection, request_id: str) -> UsageRow | None:
    """Return the turn with this id, with its attempts; the last one where a caller has used it for several."""
    question = (
        _all_of_usage
        .where(
            or_(
                usage.c.request_id == request_id,
                and_(usage.c.request_id >= request_id + _MARK, usage.c.request_id < request_id + _AFTER_MARK),
            )
        )
        .order_by(usage.c.id.desc())
        .limit(1)
    )
    row = connection.execute(question).first()
    if row is None:
        return None
    found = connection.execute(
        select(usage_attempts)
        .where(usage_attempts.c.request_id == row.request_id)
        .order_by(usage_attempts.c.number)
    )
    attempts = [AttemptRow(one.target, one.outcome, one.status, one.milliseconds) for one in found]
    if not attempts and row.target:
        # Of one good attempt the row itself tells everything.
        attempts = [AttemptRow(row.target, "ok", row.status, row.milliseconds)]
    return _usage_row(row, tuple(attempts))


def usage_sums(connection: Connection, by: Sequence[str], wanted: UsageFilter) -> list[UsageSum]:
    """Return what was used, told apart by some of `GROUPS`: the last day first, then what has cost most.

    Days count as a whole, also those in which the span begins and ends.

    Raises:
        RequestError: If it cannot be told apart so.
    """
    for one in by:
        if one not in GROUPS:
            raise RequestError(f"usage is not added up by {one[:40]!r}: want {', '.join(GROUPS)}", param="by")
    columns = {
        "user": usage_days.c.user_id,
        "key": usage_days.c.key_id,
        "model": usage_days.c.model,
        "day": usage_days.c.day,
    }
    groups = [columns[name] for name in GROUPS if name in by]
    sums = [cast(func.sum(usage_days.c[name]), BigInteger) for name in SUMS]
    question = (
        select(*(columns[name] if name in by else null() for name in GROUPS), *sums)
        .where(*_days(wanted))
        .group_by(*groups)
        # A day that a turn was taken back from has a row and no turn.
        .having(func.sum(usage_days.c.turns) > 0)
        .limit(MOST_SUMS)
    )
    if "day" in by:
        question = question.order_by(usage_days.c.day.desc())
    question = question.order_by(func.sum(usage_days.c.cost).desc(), func.sum(usage_days.c.turns).desc())
    return [UsageSum(*row) for row in connection.execute(question)]


def names(connection: Connection) -> dict[str, list[str]]:
    """Return the ids of users and keys, and the models, of which there is usage."""
    return {
        name: list(connection.execute(_distinct(column)).scalars())
        for name, column in (
            ("users", usage_days.c.user_id),
            ("keys", usage_days.c.key_id),
            ("models", usage_days.c.model),
        )
    }


def _distinct(column: Column[Any]) -> Select[Any]:
    return select(column).distinct().order_by(column).limit(MOST_NAMES)


def _days(wanted: UsageFilter) -> Iterator[ColumnElement[bool]]:
    yield from _who(usage_days, wanted)
    if wanted.since is not None:
        yield usage_days.c.day >= wanted.since // DAY
    if wanted.until is not None:
        yield usage_days.c.day <= (wanted.until - 1) // DAY


def _who(table: Table, wanted: UsageFilter) -> Iterator[ColumnElement[bool]]:
    if wanted.key is not None:
        yield table.c.key_id == wanted.key
        if table is usage:
            # A key has one user, by whom its turns are found; the days know which.
            of_key = select(usage_days.c.user_id).where(usage_days.c.key_id == wanted.key)
            yield usage.c.user_id == of_key.limit(1).scalar_subquery()
    if wanted.user is not None:
        yield table.c.user_id == wanted.user
    if wanted.model is not None:
        yield table.c.model == wanted.model


_COLUMNS = [one.name for one in fields(UsageRow) if one.name != "attempts"]
_all_of_usage = select(*(usage.c[name] for name in _COLUMNS))
_REQUEST_ID, _FLAGS, _PRICES, _IS_BILLED = map(_COLUMNS.index, ("request_id", "flags", "prices", "is_billed"))


def _usage_row(row: Row[Any], attempts: tuple[AttemptRow, ...] | None = None) -> UsageRow:
    values = [*row, attempts]
    values[_REQUEST_ID] = values[_REQUEST_ID].partition(_MARK)[0]
    values[_FLAGS] = tuple(values[_FLAGS].split())
    values[_PRICES] = loads(values[_PRICES])
    values[_IS_BILLED] = bool(values[_IS_BILLED])
    return UsageRow(*values)


# -- money -----------------------------------------------------------------------------------


def entries_page(
    connection: Connection, *, user: str | None = None, limit: int, before: str | None = None
) -> Page[Entry]:
    """Return up to *limit* changes of balances, those before the cursor *before*.

    Raises:
        RequestError: If the cursor is none.
    """
    question, days = select(entries), None
    if user is not None:
        question = question.where(entries.c.user_id == user)
        # What turns have paid is on the days of the turns.
        days = union(
            select(usage_days.c.day).where(usage_days.c.user_id == user, usage_days.c.turns > 0),
            select((entries.c.at // DAY).label("day")).where(
                entries.c.user_id == user, entries.c.kind != "debit"
            ),
        )
    rows, following = _newest(connection, question, entries, days, 0, _END, limit, before)
    return Page([_entry(row) for row in rows], following)


def _entry(row: Row[Any]) -> Entry:
    entry = entry_of(row)
    shown: dict[str, Any] = {name: getattr(entry, name) for name in Entry.__slots__}
    return Entry(**{**shown, "request_id": entry.request_id.partition(_MARK)[0]})


def spent(connection: Connection, owner: str, budgets: Sequence[Budget], at: int) -> list[Spent]:
    """Return how the budgets of a key or a user stand at a moment."""
    found = connection.execute(
        select(counters).where(counters.c.owner == owner, counters.c.start <= at, counters.c.until > at)
    ).all()
    shown = []
    for budget in budgets:
        start, until = bounds(budget.window, at)
        rows = [row for row in found if row.period == budget.window.value]
        # Of five hours, those that have begun.
        if rows:
            fullest = max(rows, key=lambda row: int(row.spent))
            used, until = int(fullest.spent), int(fullest.until)
        elif budget.window is Window.HOURS_5:
            used = 0
        else:
            used = _spent_by_days(connection, owner, start, until)
        begins_anew = budget.window is not Window.TOTAL and (
            bool(rows) or budget.window is not Window.HOURS_5
        )
        shown.append(Spent(budget.window, budget.nanos, used, until if begins_anew else None))
    return shown


def _spent_by_days(connection: Connection, owner: str, start: int, until: int) -> int:
    total = 0
    for column in (usage_days.c.user_id, usage_days.c.key_id):
        question = select(cast(func.coalesce(func.sum(usage_days.c.cost), 0), BigInteger)).where(
            column == owner,
            usage_days.c.day >= start // DAY,
            # Without an end it is beyond every number of a day.
            usage_days.c.day < min(until // DAY, 2**31 - 1),
        )
        total += int(connection.execute(question).scalar_one())
    return total


# -- audit -----------------------------------------------------------------------------------


def audit_page(
    connection: Connection,
    *,
    actor: str | None = None,
    target: str | None = None,
    limit: int,
    before: str | None = None,
) -> Page[AuditRow]:
    """Return up to *limit* things that owners did, those before the cursor *before*; names may be parts of them.

    Raises:
        RequestError: If the cursor is none.
    """
    conditions = [
        column.contains(part, autoescape=True)
        for column, part in ((audit.c.actor, actor), (audit.c.target, target))
        if part
    ]
    question = select(audit).where(*conditions).order_by(audit.c.id.desc()).limit(limit + 1)
    if before is not None:
        if not _NUMBER.fullmatch(before):
            raise _no_cursor()
        question = question.where(audit.c.id < int(before))
    rows = connection.execute(question).all()
    shown = rows[:limit]
    following = str(shown[-1].id) if len(rows) > limit and shown else None
    return Page([AuditRow(**row._mapping) for row in shown], following)


def _no_cursor() -> RequestError:
    return RequestError("before is no cursor: want `next` of a page", param="before")
