"""What was used, and what it costs: row by row, added up, and as tables for a spreadsheet."""

import asyncio
import csv
import io
from collections.abc import Sequence
from datetime import date, timedelta
from typing import get_args

import msgspec

from codex_proxy.errors import RequestError
from codex_proxy.ledger import queries
from codex_proxy.server.gateway.amounts import dollars
from codex_proxy.server.gateway.desk import Call, Csv, Desk, millis, moment
from codex_proxy.server.gateway.shapes import (
    Attempt,
    Group,
    Nothing,
    SumQuery,
    UsageDetail,
    UsageFilter,
    UsagePage,
    UsageQuery,
    UsageRow,
    UsageSum,
    UsageSums,
    UsageTotal,
)

MOST_CSV_ROWS = 100_000
"""Of one table; a spreadsheet takes a million, and the answer is put together in memory."""

# So many are made into what is told at a time: some milliseconds.
_SLICE = 500
_EPOCH = date(1970, 1, 1)
# Some spreadsheets take the wide forms too.
_FORMULA = frozenset("=+-@\t\r\n\uff1d\uff0b\uff0d\uff20")
_TOKENS = ("input_tokens", "cached_tokens", "cache_write_tokens", "output_tokens", "reasoning_tokens")


async def list_usage(desk: Desk, call: Call[UsageQuery, Nothing]) -> UsagePage:
    """List what requests have used."""
    return await usage_page(desk, filter_of(call.query), call.query.limit, call.query.before)


async def usage_page(desk: Desk, wanted: queries.UsageFilter, limit: int, before: str | None) -> UsagePage:
    """Return a page of what requests have used."""
    page = await desk.ledger.read(
        lambda connection: queries.usage_page(connection, wanted, limit=limit, before=before)
    )
    return UsagePage(usage=[_row(desk, one) for one in page.rows], next=page.next)


async def get_usage(desk: Desk, call: Call[Nothing, Nothing]) -> UsageDetail:
    """Tell what one request has used, and where it was tried."""
    found = await usage_of(desk, call.name)
    if found is None:
        raise RequestError(
            f"no usage of a request {call.name[:128]!r} is known", status=404, code="unknown_request"
        )
    return found


async def usage_of(desk: Desk, request_id: str) -> UsageDetail | None:
    """Return what one request has used; None when there is nothing of it."""
    found = await desk.ledger.read(lambda connection: queries.usage_of(connection, request_id))
    if found is None:
        return None
    attempts = [
        Attempt(target=one.target, outcome=one.outcome, status=one.status, seconds=one.milliseconds / 1000)
        for one in found.attempts or ()
    ]
    return UsageDetail(**msgspec.structs.asdict(_row(desk, found)), attempts=attempts)


async def sum_usage(desk: Desk, call: Call[SumQuery, Nothing]) -> UsageSums:
    """Add up what was used."""
    by, wanted = _groups(call.query.by), filter_of(call.query)
    return UsageSums(by=by, sums=await sums_by(desk, by, wanted), total=await total_of(desk, wanted))


async def sums_by(desk: Desk, by: Sequence[str], wanted: queries.UsageFilter) -> list[UsageSum]:
    """Return what was used, told apart by some of user, key, model and day."""
    found = await desk.ledger.read(lambda connection: queries.usage_sums(connection, by, wanted))
    sums: list[UsageSum] = []
    for start in range(0, len(found), _SLICE):
        sums += [_sum(desk, one) for one in found[start : start + _SLICE]]
        # There may be thousands; other work gets its turn.
        await asyncio.sleep(0)
    return sums


async def total_of(desk: Desk, wanted: queries.UsageFilter) -> UsageTotal:
    """Return what all of it comes to."""
    return _total(await desk.ledger.read(lambda connection: queries.usage_sums(connection, (), wanted)))


# -- tables -------------------------------------------------------------------------------


async def usage_csv(desk: Desk, call: Call[UsageFilter, Nothing]) -> Csv:
    """Return what requests have used as a table, the newest first; more than 100,000 rows are refused, not cut."""
    wanted = filter_of(call.query)
    names = [one.name for one in msgspec.structs.fields(UsageRow)]
    text = io.StringIO()
    table = csv.writer(text)
    table.writerow(names)
    before: str | None = None
    for _ in range(0, MOST_CSV_ROWS, _SLICE):
        page = await usage_page(desk, wanted, _SLICE, before)
        table.writerows([_cell(getattr(row, name)) for name in names] for row in page.usage)
        before = page.next
        if before is None:
            break
    else:
        raise RequestError(
            f"there are more than {MOST_CSV_ROWS:,} requests: ask for a shorter span with since and until",
            param="since",
            code="too_many_rows",
        )
    return Csv("usage.csv", text.getvalue().encode())


async def sums_csv(desk: Desk, call: Call[SumQuery, Nothing]) -> Csv:
    """Return sums as a table."""
    by = _groups(call.query.by)
    sums = await sums_by(desk, by, filter_of(call.query))
    names = [name for one in by for name in ((f"{one}_id", one) if one in ("user", "key") else (one,))]
    names += [one.name for one in msgspec.structs.fields(UsageTotal)]
    text = io.StringIO()
    table = csv.writer(text)
    table.writerow(names)
    table.writerows([_cell(getattr(row, name)) for name in names] for row in sums)
    return Csv("usage-sums.csv", text.getvalue().encode())


def _cell(value: object) -> object:
    """Return a value as a cell; a text that a spreadsheet would take for a formula begins with an apostrophe."""
    if isinstance(value, bool):
        # As JSON has it.
        return "true" if value else "false"
    if isinstance(value, list):
        value = " ".join(map(str, value))
    elif isinstance(value, dict):
        value = " ".join(f"{name}={amount}" for name, amount in value.items())
    elif hasattr(value, "isoformat"):
        return value.isoformat()
    if isinstance(value, str) and value[:1] in _FORMULA and not _is_number(value):
        return f"'{value}"
    return value


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


# -- shapes -------------------------------------------------------------------------------


def filter_of(query: UsageFilter) -> queries.UsageFilter:
    """Return a filter as the ledger has it.

    Raises:
        RequestError: If it ends before it begins.
    """
    since = None if query.since is None else millis(query.since)
    until = None if query.until is None else millis(query.until)
    if since is not None and until is not None and until <= since:
        raise RequestError("until: is not after since", param="until")
    return queries.UsageFilter(query.user, query.key, query.model, since, until)


def _groups(text: str) -> list[Group]:
    known: tuple[Group, ...] = get_args(Group)
    wanted = text.split(",")
    return [one for one in known if one in wanted]


def _total(found: Sequence[queries.UsageSum]) -> UsageTotal:
    """Return the one sum of everything; of nothing there is none."""
    if not found:
        return UsageTotal(
            turns=0,
            unpriced=0,
            **dict.fromkeys(_TOKENS, 0),
            cost=dollars(0),
            debit=dollars(0),
            shortfall=dollars(0),
        )
    one = found[0]
    return UsageTotal(
        turns=one.turns,
        unpriced=one.turns - one.priced,
        **{name: getattr(one, name) for name in _TOKENS},
        cost=dollars(one.cost),
        debit=dollars(one.debit),
        shortfall=dollars(one.shortfall),
    )


def _sum(desk: Desk, one: queries.UsageSum) -> UsageSum:
    return UsageSum(
        user_id=one.user,
        user=None if one.user is None else desk.name_of_user(one.user),
        key_id=one.key,
        key=None if one.key is None else desk.name_of_key(one.key),
        model=one.model,
        day=None if one.day is None else (_EPOCH + timedelta(days=one.day)).isoformat(),
        turns=one.turns,
        unpriced=one.turns - one.priced,
        **{name: getattr(one, name) for name in _TOKENS},
        cost=dollars(one.cost),
        debit=dollars(one.debit),
        shortfall=dollars(one.shortfall),
    )


def _row(desk: Desk, row: queries.UsageRow) -> UsageRow:
    return UsageRow(
        request_id=row.request_id,
        at=moment(row.at),
        user_id=row.user_id,
        user=desk.name_of_user(row.user_id),
        key_id=row.key_id,
        key=desk.name_of_key(row.key_id),
        route=row.route,
        asked_model=row.asked_model,
        model=row.model,
        tier=row.tier,
        target=row.target,
        upstream=row.upstream,
        client=row.client,
        end=row.end,
        status=row.status,
        error=row.error,
        **{name: getattr(row, name) for name in _TOKENS},
        source=row.source,
        flags=list(row.flags),
        cost=None if row.cost is None else dollars(row.cost),
        is_billed=row.is_billed,
        debit=dollars(row.debit),
        shortfall=dollars(row.shortfall),
        prices=dict(row.prices),
        price_id=row.price_id,
        seconds=row.milliseconds / 1000,
    )
