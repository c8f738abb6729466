"""What is asked of many records: right, and without looking at all of them."""

import itertools
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Connection, event

from codex_proxy.records import queries
from codex_proxy.records.asking import Filter
from codex_proxy.records.tables import KEYS_A_SECOND
from codex_proxy.trace import Caller, End, Trace, Usage, UsageSource
from tests.records.making import AT, book, database, new_database, turn

MANY = 100_000

FILL = """
WITH RECURSIVE n(i) AS (SELECT 0 UNION ALL SELECT i + 1 FROM n WHERE i < :many - 1)
INSERT INTO turns
SELECT (CAST(:at AS INTEGER) + i) * :keys, 'req_' || i, 'responses', 'caller' || (i % 7), 'codex', 'gpt-' || (i % 3),
    'acct-' || (i % 40), 'expires first', 'prompt_cache_key', CASE WHEN i % 50 = 3 THEN 'failed' ELSE 'completed' END,
    200, CASE WHEN i % 50 = 3 THEN 'error_' || (i % 4) END, 1, 1, 0.5, 0.6, i % 30, 1000, 500, 10, 5, 'backend', 100,
    2000, '[null,null,0,[],[]]'
FROM n
"""


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Connection]:
    """A hundred thousand turns, one a second."""
    engine = new_database(tmp_path_factory.mktemp("many") / "records.db")
    with engine.begin() as connection:
        connection.exec_driver_sql(FILL, {"many": MANY, "at": AT, "keys": KEYS_A_SECOND})
    with engine.begin() as connection:
        yield connection
    engine.dispose()


def pages(connection: Connection, wanted: Filter, limit: int) -> Iterator[list[Any]]:
    before: int | None = None
    while True:
        found, before = queries.page(connection, wanted, limit=limit, before=before)
        yield found
        if before is None:
            return


def test_paging_shows_every_turn_once_and_the_newest_first(many: Connection) -> None:
    found = [
        int(request["id"][4:]) for page in pages(many, Filter(caller="caller3"), 500) for request in page
    ]
    assert found == list(reversed(range(3, MANY, 7)))
    # All of them would be too much for a test: as many as fit.
    some = itertools.islice(pages(many, Filter(), 1_000), 10)
    assert [int(request["id"][4:]) for page in some for request in page] == list(
        reversed(range(MANY - 10_000, MANY))
    )


def test_a_page_far_back_is_found_as_soon_as_the_first_one(many: Connection) -> None:
    steps: list[int] = []
    for before in (None, int((AT + 50) * KEYS_A_SECOND)):
        count = [0]

        def note(count: list[int] = count) -> None:
            count[0] += 1

        raw = many.connection.driver_connection
        assert raw is not None
        raw.set_progress_handler(note, 100)
        found, _ = queries.page(many, Filter(), limit=50, before=before)
        raw.set_progress_handler(None, 0)
        assert len(found) == 50
        steps.append(count[0])
    assert max(steps) < 100, steps


def plan(connection: Connection, wanted: Filter, **options: Any) -> str:
    """Return how SQLite goes about a page."""
    statements: list[tuple[str, Any]] = []

    def note(_: Any, __: Any, statement: str, parameters: Any, *___: Any) -> None:
        statements.append((statement, parameters))

    event.listen(connection, "before_cursor_execute", note)
    try:
        queries.page(connection, wanted, limit=100, **options)
    finally:
        event.remove(connection, "before_cursor_execute", note)
    ((statement, parameters),) = statements
    steps = connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {statement}", parameters).all()
    return "\n".join(str(step[-1]) for step in steps)


@pytest.mark.parametrize(
    ("wanted", "by"),
    [
        (Filter(), "SCAN turns"),
        (Filter(caller="caller3"), "turns_by_caller"),
        (Filter(account="acct-7"), "turns_by_account"),
        (Filter(model="gpt-1"), "turns_by_model"),
        (Filter(outcome="failed"), "turns_gone_wrong"),
        (Filter(since=AT + 5_000, until=AT + 6_000), "PRIMARY KEY"),
        (Filter(account="acct-7", since=AT + 5_000, until=AT + 6_000), "turns_by_account"),
    ],
)
def test_a_page_is_found_by_an_index_and_sorts_nothing(many: Connection, wanted: Filter, by: str) -> None:
    for options in ({}, {"before": int((AT + 50_000) * KEYS_A_SECOND)}):
        steps = plan(many, wanted, **options)
        assert by in steps or (options and "PRIMARY KEY" in steps)
        assert "TEMP B-TREE" not in steps, steps


def test_names_are_found_by_an_index(many: Connection) -> None:
    assert queries.names(many) == {
        "callers": [f"caller{number}" for number in range(7)],
        "accounts": sorted(f"acct-{number}" for number in range(40)),
        "models": ["gpt-0", "gpt-1", "gpt-2"],
    }
    assert queries.oldest(many) == AT


def odd_turns() -> list[Trace]:
    rng = random.Random(7)
    found = []
    for number in range(400):
        trace = turn(
            number,
            at=AT + rng.randrange(2_000) / 10,
            caller=Caller("k", rng.choice(["laptop", "phone", "100%_a"])),
            alias=rng.choice(["work", "home", ""]),
            model=rng.choice(["gpt-5.5", "gpt-6", ""]),
            route=rng.choice(["chat", "responses"]),
            client=rng.choice(["codex", "other", ""]),
            error=rng.choice(["", "usage_limit_reached", "50%", "under_score"]),
            end=rng.choice([End.COMPLETED, End.COMPLETED, End.FAILED, End.CALLER_GONE, End.INCOMPLETE]),
            seconds=rng.randrange(100) / 10,
        )
        if trace.end is End.COMPLETED:
            trace.error = ""
        found.append(trace)
    return found


WANTED = [
    Filter(),
    Filter(caller="phone"),
    Filter(caller="100%_a", account="work"),
    Filter(model="gpt-6", outcome="failed"),
    Filter(outcome="completed", route="chat", client="codex"),
    Filter(outcome="caller_gone", account="home"),
    Filter(q="REQ_1"),
    Filter(q="50%"),
    Filter(q="_"),
    Filter(q="r_s"),
    Filter(q="usage_limit", caller="laptop"),
    Filter(since=AT + 50, until=AT + 60.5),
    Filter(since=AT + 50.1, min_seconds=5.0),
    Filter(caller="nobody"),
    Filter(since=AT + 10_000),
]


def fits(trace: Trace, wanted: Filter) -> bool:
    same = {
        "caller": trace.caller.name, "account": trace.alias, "model": trace.model, "outcome": trace.end.value,
        "route": trace.route, "client": trace.client,
    }  # fmt: skip
    part = (wanted.q or "").lower()
    return (
        all(getattr(wanted, name) in (None, value) for name, value in same.items())
        and (part in trace.id.lower() or part in trace.error.lower())
        and (wanted.since is None or trace.started_wall >= wanted.since)
        and (wanted.until is None or trace.started_wall < wanted.until)
        and (wanted.min_seconds is None or trace.seconds >= wanted.min_seconds)
    )


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Connection, list[Trace]]]:
    traces = odd_turns()
    with database(tmp_path_factory.mktemp("odd") / "records.db", traces) as connection:
        yield connection, traces


@pytest.mark.parametrize("wanted", WANTED, ids=str)
@pytest.mark.parametrize("limit", [7, 1_000])
def test_filters_are_right(odd: tuple[Connection, list[Trace]], wanted: Filter, limit: int) -> None:
    connection, traces = odd
    found = [request for page in pages(connection, wanted, limit) for request in page]
    expected = {trace.id for trace in traces if fits(trace, wanted)}
    assert {request["id"] for request in found} == expected
    assert len(found) == len(expected)
    times = [request["at"] for request in found]
    assert times == sorted(times, reverse=True)


def test_a_page_stays_where_it_was_when_new_turns_come(tmp_path: Path) -> None:
    with database(tmp_path / "records.db", [turn(number) for number in range(20)]) as connection:
        first, cursor = queries.page(connection, Filter(), limit=10)
        writer = book()
        writer.write(connection, writer.render([turn(number) for number in range(20, 40)]))
        second, end = queries.page(connection, Filter(), limit=10, before=cursor)
    assert [request["id"] for request in first + second] == [
        f"req_{number}" for number in reversed(range(20))
    ]
    assert end is None


def test_turns_of_one_moment_are_all_there(tmp_path: Path) -> None:
    with database(tmp_path / "records.db", [turn(number, at=AT) for number in range(500)]) as connection:
        found = [request["id"] for page in pages(connection, Filter(), 50) for request in page]
    assert sorted(found) == sorted(f"req_{number}" for number in range(500))


def test_of_two_turns_with_one_id_the_last_is_meant(tmp_path: Path) -> None:
    turns = [turn(1, at=AT, model="old"), turn(1, at=AT + 5, model="new"), turn(2, at=AT + 9)]
    with database(tmp_path / "records.db", turns) as connection:
        found = queries.one(connection, "req_1")
        assert found is not None
        assert (found.trace.model, found.trace.started_wall, found.capture) == ("new", AT + 5, None)
        assert queries.one(connection, "req_9") is None
        assert queries.one(connection, "") is None


def test_how_caches_were_hit(tmp_path: Path) -> None:
    def used(number: int, at: float, asked: int, cached: int, **fields: Any) -> Trace:
        usage = Usage(asked, cached, 0, 1, 0, UsageSource.BACKEND)
        return turn(number, at=AT + at, usage=usage, **fields)

    turns = [
        used(1, 0, 100, 0),
        used(2, 1_000, 300, 200, client="other"),
        used(3, 2_000, 100, 100, alias="home", binding=""),
        used(4, -1, 999, 999),
        turn(5, at=AT + 10, usage=Usage()),
    ]
    with database(tmp_path / "records.db", turns) as connection:
        told = queries.cache(connection, since=AT, until=AT + 3_600)
    assert (told["turns"], told["input_tokens"], told["cached_tokens"]) == (3, 500, 300)
    assert told["by_client"] == [
        {"name": "other", "turns": 1, "input_tokens": 300, "cached_tokens": 200, "cached_share": 0.6667},
        {"name": "codex", "turns": 2, "input_tokens": 200, "cached_tokens": 100, "cached_share": 0.5},
    ]
    assert {row["name"]: row["cached_share"] for row in told["by_account"]} == {"work": 0.5, "home": 1.0}
    assert {row["name"]: row["turns"] for row in told["by_binding"]} == {"prompt_cache_key": 2, "none": 1}
    assert [row["turns"] for row in told["by_rule"]] == [3]
    points = {round(at - AT): (asked, cached) for at, asked, cached in told["series"]}
    assert sum(asked for asked, _ in points.values()) == 500
    assert points[0] == (100, 0)
    assert points[900] == (300, 200)
    assert points[1_800] == (100, 100)
    assert points[300] == (0, 0)
