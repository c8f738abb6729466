"""What is asked of the records; each question is a few milliseconds' work on a million turns."""

from collections.abc import Sequence
from typing import Any

from sqlalchemy import Column, ColumnElement, Connection, RowMapping, func, select, union

from codex_proxy.protocol.wire import JsonObject
from codex_proxy.records.asking import Filter, Found
from codex_proxy.records.story import request_of, trace_of
from codex_proxy.records.tables import KEY_BITS, KEYS_A_SECOND, captures, turns

MAX_NAMES = 500
"""How many different callers, accounts, models are told of at most."""

_POINTS = 96
"""How many points a series has, about."""

_SHOWN = [column for column in turns.c if column.name not in {"story", "request_bytes", "answer_bytes"}]
_NAMES = [column.name for column in _SHOWN]


def at_of(key: int) -> float:
    """Return when the turn with this key came."""
    return (key >> KEY_BITS) / 1_000_000


def listing(connection: Connection, wanted: Filter, *, limit: int, before: int | None = None) -> JsonObject:
    """Return up to *limit* turns, those before the cursor *before*, and what there is to choose from."""
    found, cursor = page(connection, wanted, limit=limit, before=before)
    return {
        "requests": found,
        # Text, because JavaScript has no such number.
        "next": None if cursor is None else str(cursor),
        "since": oldest(connection),
        **names(connection),
    }


def page(
    connection: Connection, wanted: Filter, *, limit: int, before: int | None = None
) -> tuple[list[JsonObject], int | None]:
    """Return up to *limit* turns, the newest first, and the cursor of those that follow if there are any."""
    query = select(*_SHOWN).where(*_conditions(wanted)).order_by(turns.c.key.desc()).limit(limit + 1)
    if before is not None:
        query = query.where(turns.c.key < before)
    # As plain dicts, which take a tenth of the time.
    rows = [dict(zip(_NAMES, row, strict=True)) for row in connection.execute(query)]
    shown = rows[:limit]
    return (
        [request_of(row, at_of(row["key"])) for row in shown],
        shown[-1]["key"] if len(rows) > limit else None,
    )


def _conditions(wanted: Filter) -> list[ColumnElement[bool]]:
    found: list[ColumnElement[bool]] = [
        turns.c[name] == value
        for name in ("caller", "account", "model", "outcome", "route", "client")
        if (value := getattr(wanted, name)) is not None
    ]
    if wanted.outcome is not None and wanted.outcome != "completed":
        # Said again as the index says it, or it would not be used.
        found.append(turns.c.outcome != "completed")
    if wanted.q:
        # The small indexes are looked through, and not the table.
        ids = select(turns.c.key).where(turns.c.id.contains(wanted.q, autoescape=True))
        errors = select(turns.c.key).where(
            turns.c.outcome != "completed", turns.c.error.contains(wanted.q, autoescape=True)
        )
        found.append(turns.c.key.in_(union(ids, errors)))
    if wanted.since is not None:
        found.append(turns.c.key >= int(wanted.since * KEYS_A_SECOND))
    if wanted.until is not None:
        found.append(turns.c.key < int(wanted.until * KEYS_A_SECOND))
    if wanted.min_seconds is not None:
        found.append(turns.c.seconds >= wanted.min_seconds)
    return found


def one(connection: Connection, request_id: str) -> Found | None:
    """Return the turn with this id, the last one where several have it."""
    query = select(turns).where(turns.c.id == request_id).order_by(turns.c.key.desc()).limit(1)
    row = connection.execute(query).mappings().first()
    if row is None:
        return None
    said = connection.execute(select(captures).where(captures.c.key == row["key"])).mappings().first()
    capture = (
        None
        if said is None
        else {"request": said["request"], "answer": said["answer"], "is_cut": bool(said["is_cut"])}
    )
    return Found(trace_of(row, at_of(row["key"])), capture)


def names(connection: Connection) -> dict[str, list[str]]:
    """Return the callers, accounts and models that there are."""
    return {
        "callers": _distinct(connection, turns.c.caller),
        "accounts": _distinct(connection, turns.c.account),
        "models": _distinct(connection, turns.c.model),
    }


def _distinct(connection: Connection, column: Column[Any]) -> list[str]:
    # From each to the next one by the index; DISTINCT would look at every turn.
    found = select(func.min(column).label("name")).cte("found", recursive=True)
    follows = select(func.min(column)).where(column > found.c.name).scalar_subquery()
    found = found.union_all(select(follows).where(found.c.name.is_not(None)))
    query = select(found.c.name).where(found.c.name.is_not(None)).limit(MAX_NAMES)
    return list(connection.execute(query).scalars())


def oldest(connection: Connection) -> float | None:
    """Return when the oldest turn came that is kept; None when there is none."""
    key = connection.execute(select(func.min(turns.c.key))).scalar()
    return None if key is None else at_of(key)


def cache(connection: Connection, *, since: float, until: float) -> JsonObject:
    """Return how well the prompt caches were hit in a span of time, by what may have made a difference."""
    step = max(300.0, (until - since) / _POINTS)
    keys_a_step = int(step * KEYS_A_SECOND)
    first = int(since * KEYS_A_SECOND)
    groups = {
        "by_client": turns.c.client,
        "by_binding": turns.c.binding,
        "by_model": turns.c.model,
        "by_account": turns.c.account,
        "by_rule": turns.c.rule,
    }
    # One pass over the turns; what it finds is put together in different ways.
    bucket = (turns.c.key - first) // keys_a_step
    query = (
        select(
            bucket.label("bucket"),
            *groups.values(),
            func.count().label("turns"),
            func.sum(turns.c.input_tokens).label("input"),
            func.sum(turns.c.cached_tokens).label("cached"),
        )
        .where(turns.c.key >= first, turns.c.input_tokens.is_not(None))
        .group_by(bucket, *groups.values())
    )
    rows = connection.execute(query).mappings().all()
    series: dict[int, list[int]] = {}
    for row in rows:
        point = series.setdefault(int(row["bucket"]), [0, 0])
        point[0] += int(row["input"])
        point[1] += int(row["cached"])
    return {
        "since": round(since, 3),
        "turns": sum(row["turns"] for row in rows),
        "input_tokens": sum(int(row["input"]) for row in rows),
        "cached_tokens": sum(int(row["cached"]) for row in rows),
        **{name: _summed(rows, column.name) for name, column in groups.items()},
        "series": [
            [round(since + step * place, 3), *series.get(place, (0, 0))]
            for place in range(int((until - since) / step) + 1)
        ],
    }


def _summed(rows: Sequence[RowMapping], name: str) -> list[JsonObject]:
    """Put the rows together by one of their columns, the one with the most input first."""
    sums: dict[str, list[int]] = {}
    for row in rows:
        entry = sums.setdefault(row[name] or "none", [0, 0, 0])
        entry[0] += row["turns"]
        entry[1] += int(row["input"])
        entry[2] += int(row["cached"])
    return [
        {
            "name": key,
            "turns": count,
            "input_tokens": put_in,
            "cached_tokens": cached,
            "cached_share": round(cached / put_in, 4) if put_in else None,
        }
        for key, (count, put_in, cached) in sorted(sums.items(), key=lambda one: -one[1][1])
    ]
