"""Health, statistics and rounds, as an owner's client sees them."""

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any
from urllib.parse import quote

import aiohttp
import pytest
import yarl
from aiohttp import web

from codex_proxy import __version__
from codex_proxy.accounts.actions import Action, Done, unknown_account
from codex_proxy.clock import ManualClock
from codex_proxy.config import Live, Settings
from codex_proxy.errors import ProxyError
from codex_proxy.protocol.sse import Parser
from codex_proxy.protocol.wire import JsonObject, dumps
from codex_proxy.server.access import Access, Level
from codex_proxy.server.admin import (
    AccountView,
    CacheView,
    CreditsView,
    Health,
    Item,
    ProblemView,
    Progress,
    QuotaView,
    Rounds,
    SpendView,
    Summary,
    TokensView,
    WindowView,
    admin_handlers,
    control_handlers,
    rfc3339,
)
from codex_proxy.server.app import ACCOUNT_ROUTES, ROUTES, SERVER_OPTIONS, build_app
from codex_proxy.server.decisions import Decisions
from codex_proxy.tasks import Background
from codex_proxy.trace import LOCAL, End, Trace

NAMES = {"health", "livez", "readyz", "stats", "accounts", "why", "refresh", "check_quota"}
ADMIN_ROUTES = [route for route in ROUTES if route.handler in NAMES]

BUSY = AccountView(
    alias="acct-1",
    status="cooldown",
    email="j***@e***.com",
    file="j***@e***.com.json",
    reason="usage limit",
    plan_type="plus",
    account_id="3f9a…",
    total_requests=7,
    total_errors=2,
    consecutive_failures=1,
    in_flight=3,
    last_used_at=1_800_000_000.9,
    last_refreshed_at=1_800_000_001,
    cooldown_until=1_800_000_002,
    quota_exhausted=True,
    quota_resets_at=1_800_000_003,
    token_expire=1_800_000_004,
    usage=TokensView(5, 100, 40, 20, 8, 120),
    quota=QuotaView(
        valid=True,
        status_code=200,
        checked_at=1_800_000_005,
        source="headers",
        plan="plus",
        windows=(
            WindowView("5h", "codex", 300, 99.5, 1_800_000_006, "headers", 12.34),
            WindowView("secondary", "codex_spark"),
        ),
        credits=CreditsView(True, False, "12.50", False, "headers", 3.14),
        spend=SpendView(False, "100", "25", 25.0, 1_800_000_007, "usage", 2.22),
    ),
    login="uncertain",
    login_reason="cut off",
    last_error="refresh uncertain",
    priority=2,
    weight=1.5,
    max_concurrency=4,
    models_allowed=("gpt-5*",),
    models_denied=("*-mini",),
)
FRESH = AccountView(alias="acct-2", status="active")


class FakeAdmin:
    """A pool of views, and rounds that a test lets go step by step."""

    def __init__(self, background: Background, clock: ManualClock) -> None:
        self.views: list[AccountView] = []
        self.found: list[ProblemView] = []
        self.phase: Any = "ready"
        self.steps: asyncio.Queue[Item | Exception | None] = asyncio.Queue()
        self.planned = 0
        self.started = 0
        self.bound: dict[str, CacheView] = {}
        self.acted: list[tuple[str, str]] = []
        self.decisions = Decisions()
        self._rounds = Rounds("refresh", self._work, background, clock.monotonic)
        self._quota = Rounds("quota", self._work, background, clock.monotonic)

    def _work(self) -> tuple[int, AsyncIterator[Item]]:
        self.started += 1
        return self.planned, self._items()

    async def _items(self) -> AsyncIterator[Item]:
        for _ in range(self.planned):
            step = await self.steps.get()
            if isinstance(step, Exception):
                raise step
            if step is None:
                return
            yield step

    def plan(self, *items: Item | Exception) -> None:
        self.planned = len(items)
        for item in items:
            self.steps.put_nowait(item)

    def upstreams(self) -> list[JsonObject]:
        return []

    def health(self) -> Health:
        return Health(len(self.views), sum(view.status == "active" for view in self.views), self.phase)

    def accounts(self) -> list[AccountView]:
        return self.views

    def summary(self) -> Summary:
        found = Summary()
        for view in self.views:
            found.by_status[view.status] += 1
            found.in_flight += view.in_flight
            found.total_requests += view.total_requests
        return found

    def account(self, alias: str) -> AccountView | None:
        return next((view for view in self.views if view.alias == alias), None)

    def problems(self) -> list[ProblemView]:
        return self.found

    def cache(self) -> dict[str, CacheView]:
        return self.bound

    async def act(self, alias: str, action: Action) -> Done:
        if self.account(alias) is None:
            raise unknown_account(alias, [view.alias for view in self.views])
        self.acted.append((alias, action))
        return Done(alias, action != "check", f"{action} was done")

    def refresh_all(self) -> Progress:
        return self._rounds.join()

    def check_quota(self) -> Progress:
        return self._quota.join()


class Place:
    def __init__(self, admin: FakeAdmin, clock: ManualClock, background: Background, url: str) -> None:
        self.admin = admin
        self.clock = clock
        self.background = background
        self.url = url
        self.session = aiohttp.ClientSession()

    async def get(self, path: str) -> tuple[int, Any]:
        async with self.session.get(self.url + path) as answer:
            assert answer.headers["Content-Type"].startswith("application/json")
            return answer.status, json.loads(await answer.read())

    async def round(self, path: str) -> list[tuple[str, dict[str, Any]]]:
        async with self.session.post(self.url + path) as answer:
            assert answer.status == 200
            assert answer.headers["Content-Type"] == "text/event-stream"
            assert answer.headers["X-Accel-Buffering"] == "no"
            body = await answer.read()
        names = [line[7:].decode() for line in body.split(b"\n") if line.startswith(b"event: ")]
        return list(zip(names, (event.json for event in Parser().feed(body)), strict=True))


def render(error: ProxyError, *, request_id: str) -> tuple[int, dict[str, str], bytes]:
    return error.status, {}, dumps({"message": error.message, "param": getattr(error, "param", None)})


@asynccontextmanager
async def served() -> AsyncIterator[Place]:
    clock, background = ManualClock(), Background()
    admin = FakeAdmin(background, clock)
    app = build_app(
        Access(Live(Settings(listen="127.0.0.1:1"))),
        {**admin_handlers(admin, admin.decisions, clock.monotonic), **control_handlers(admin)},
        {"openai": render},
        # As on the control socket, which only the owner can open.
        [*ADMIN_ROUTES, *(replace(route, level=Level.PUBLIC) for route in ACCOUNT_ROUTES)],
    )
    runner = web.ServerRunner(app.server(**SERVER_OPTIONS))
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    place = Place(admin, clock, background, f"http://127.0.0.1:{runner.addresses[0][1]}")
    try:
        yield place
    finally:
        await place.session.close()
        await background.aclose()
        await runner.cleanup()


async def until(condition: Callable[[], bool]) -> None:
    for _ in range(400):
        if condition():
            return
        await asyncio.sleep(0.002)
    raise AssertionError("it did not happen")


def test_the_handlers_are_those_of_the_table() -> None:
    admin = FakeAdmin(Background(), ManualClock())
    assert set(admin_handlers(admin, admin.decisions, ManualClock().monotonic)) == NAMES
    assert {route.handler for route in ROUTES if route.level is not Level.KEYED} >= NAMES
    assert set(control_handlers(admin)) == {route.handler for route in ACCOUNT_ROUTES}


def test_what_changes_an_account_needs_the_admin_key() -> None:
    assert {route.level for route in ACCOUNT_ROUTES} == {Level.ADMIN}
    assert {(route.method, route.path) for route in ACCOUNT_ROUTES} == {
        ("POST", f"/accounts/{{alias}}/{action}")
        for action in ("disable", "enable", "remove", "logout", "refresh", "reset", "check")
    }
    assert not {route.handler for route in ACCOUNT_ROUTES} & {route.handler for route in ROUTES}
    assert not [route for route in ROUTES if route.path.startswith("/accounts/")]


# --- health


@pytest.mark.parametrize(
    ("views", "status"),
    [([], "unavailable"), ([BUSY], "degraded"), ([BUSY, FRESH], "ok"), ([FRESH], "ok")],
)
async def test_health_is_always_200_and_says_how_it_is(views: list[AccountView], status: str) -> None:
    async with served() as place:
        place.admin.views = views
        active = sum(view is FRESH for view in views)
        expected = {"status": status, "accounts": len(views), "active": active, "version": __version__}
        assert await place.get("/health") == (200, expected)


@pytest.mark.parametrize(
    ("phase", "views", "code", "status"),
    [
        ("starting", [FRESH], 503, "starting"),
        ("ready", [], 503, "no_accounts"),
        ("ready", [BUSY], 200, "ready"),
        ("draining", [FRESH], 503, "draining"),
    ],
)
async def test_ready_is_accepting_with_an_account(
    phase: str, views: list[AccountView], code: int, status: str
) -> None:
    async with served() as place:
        place.admin.views, place.admin.phase = views, phase
        assert await place.get("/readyz") == (code, {"status": status})
        assert await place.get("/livez") == (200, {"status": "ok"})


# --- statistics


async def test_an_account_is_shown_in_full() -> None:
    async with served() as place:
        place.admin.views = [BUSY]
        status, answer = await place.get("/stats")
    assert status == 200
    assert answer["accounts"] == [
        {
            "alias": "acct-1",
            "email": "j***@e***.com",
            "file_path": "j***@e***.com.json",
            "status": "cooldown",
            "reason": "usage limit",
            "disable_reason": None,
            "plan_type": "plus",
            "account_id": "3f9a…",
            "total_requests": 7,
            "total_errors": 2,
            "consecutive_failures": 1,
            "in_flight": 3,
            "last_used_at": "2027-01-15T08:00:00Z",
            "last_refreshed_at": "2027-01-15T08:00:01Z",
            "cooldown_until": "2027-01-15T08:00:02Z",
            "quota_exhausted": True,
            "quota_resets_at": "2027-01-15T08:00:03Z",
            "token_expire": "2027-01-15T08:00:04Z",
            "usage": {
                "total_completions": 5,
                "input_tokens": 100,
                "cached_tokens": 40,
                "output_tokens": 20,
                "reasoning_tokens": 8,
                "total_tokens": 120,
            },
            "cached_share": 0.4,
            "login": "uncertain",
            "login_reason": "cut off",
            "last_error": "refresh uncertain",
            "priority": 2,
            "weight": 1.5,
            "max_concurrency": 4,
            "models_allowed": ["gpt-5*"],
            "models_denied": ["*-mini"],
            "quota": {
                "valid": True,
                "status_code": 200,
                "checked_at": "2027-01-15T08:00:05Z",
                "source": "headers",
                "plan": "plus",
                "windows": [
                    {
                        "window": "5h",
                        "limit": "codex",
                        "limit_name": None,
                        "minutes": 300,
                        "used_percent": 99.5,
                        "resets_at": "2027-01-15T08:00:06Z",
                        "source": "headers",
                        "age": 12.3,
                    },
                    {
                        "window": "secondary",
                        "limit": "codex_spark",
                        "limit_name": None,
                        "minutes": None,
                        "used_percent": None,
                        "resets_at": None,
                        "source": None,
                        "age": None,
                    },
                ],
                "credits": {
                    "has_credits": True,
                    "unlimited": False,
                    "balance": "12.50",
                    "overage_limit_reached": False,
                    "source": "headers",
                    "age": 3.1,
                },
                "spend": {
                    "reached": False,
                    "limit": "100",
                    "used": "25",
                    "used_percent": 25.0,
                    "resets_at": "2027-01-15T08:00:07Z",
                    "source": "usage",
                    "age": 2.2,
                },
            },
        }
    ]


async def test_what_is_unset_is_null_and_what_is_zero_is_zero() -> None:
    async with served() as place:
        place.admin.views = [FRESH]
        account = (await place.get("/stats"))[1]["accounts"][0]
    for name in (
        "last_used_at",
        "last_refreshed_at",
        "cooldown_until",
        "quota_resets_at",
        "token_expire",
        "quota",
    ):
        assert account[name] is None
    assert account["total_requests"] == account["usage"]["total_tokens"] == account["in_flight"] == 0


@pytest.mark.parametrize("status", ["unavailable", "needs_login", "disabled"])
async def test_an_account_out_of_use_has_its_reason_under_the_name_that_clients_know(status: Any) -> None:
    async with served() as place:
        place.admin.views = [AccountView(alias="a", status=status, reason="plan ended")]
        account = (await place.get("/stats"))[1]["accounts"][0]
    assert account["disable_reason"] == account["reason"] == "plan ended"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (None, None),
        (0.0, None),
        (-1.0, None),
        (1e20, None),
        (float("inf"), None),
        (float("nan"), None),
        (1.9, "1970-01-01T00:00:01Z"),
    ],
)
def test_times_are_rfc_3339_or_null(seconds: float | None, text: str | None) -> None:
    assert rfc3339(seconds) == text


async def test_a_page_comes_with_the_summary_of_all() -> None:
    async with served() as place:
        place.admin.views = [BUSY, FRESH, BUSY, AccountView(alias="x", status="needs_login")]
        place.admin.found = [ProblemView("broken.json", "not JSON")]
        place.clock.advance(12.5)
        answer = (await place.get("/stats?page=2&page_size=3"))[1]
    assert list(answer)[:3] == ["summary", "accounts", "pagination"]
    assert (answer["summary"]["total"], answer["summary"]["in_flight"]) == (4, 6)
    assert (answer["summary"]["cooldown"], answer["summary"]["disabled"]) == (2, 0)
    assert answer["problems"] == [{"file": "broken.json", "reason": "not JSON"}]
    assert answer["version"] == __version__
    assert answer["uptime_seconds"] == 12.5
    assert [account["alias"] for account in answer["accounts"]] == ["x"]


async def test_pages_come_only_to_those_who_ask() -> None:
    async with served() as place:
        place.admin.views = [AccountView(alias=f"acct-{n}", status="active") for n in range(250)]
        everything = (await place.get("/stats?include_quota=1"))[1]
        assert len(everything["accounts"]) == 250
        assert "pagination" not in everything

        first = (await place.get("/stats?page=1"))[1]
        assert len(first["accounts"]) == 100
        assert first["pagination"] == {
            "page": 1, "page_size": 100, "total": 250, "filtered_total": 250, "total_pages": 3,
            "returned": 100, "has_prev": False, "has_next": True, "query": "",
        }  # fmt: skip
        last = (await place.get("/stats?page=2&page_size=200"))[1]
        assert [a["alias"] for a in last["accounts"]] == [f"acct-{n}" for n in range(200, 250)]
        assert (last["pagination"]["has_prev"], last["pagination"]["has_next"]) == (True, False)
        beyond = (await place.get("/stats?page=9"))[1]
        assert beyond["accounts"] == []

        found = (await place.get("/stats?q=ACCT-24"))[1]
        assert [a["alias"] for a in found["accounts"]] == ["acct-24", *(f"acct-{n}" for n in range(240, 250))]
        assert found["pagination"]["filtered_total"] == 11
        assert found["pagination"]["query"] == "ACCT-24"
        assert found["summary"]["total"] == 250
        none = (await place.get("/stats?q=nobody"))[1]
        assert (none["accounts"], none["pagination"]["total_pages"]) == ([], 1)


@pytest.mark.parametrize(
    "query", ["page=0", "page=x", "page=-1", "page=%C2%B2", "page_size=201", "page_size=0", "page=9999999999"]
)
async def test_a_page_that_is_none_is_named(query: str) -> None:
    async with served() as place:
        status, answer = await place.get(f"/stats?{query}")
    assert status == 400
    assert answer["param"] == query.partition("=")[0]


# --- accounts, one by one


async def test_the_accounts_are_told_without_the_rest_of_the_statistics() -> None:
    async with served() as place:
        place.admin.views = [BUSY, FRESH]
        place.admin.found = [ProblemView("broken.json", "not JSON")]
        place.clock.advance(3)
        status, answer = await place.get("/accounts")
        everything = (await place.get("/stats"))[1]
    assert status == 200
    assert answer["accounts"] == everything["accounts"]
    assert answer["problems"] == [{"file": "broken.json", "reason": "not JSON"}]
    assert (answer["version"], answer["uptime_seconds"]) == (__version__, 3.0)


@pytest.mark.parametrize("alias", ["acct-2", "a b", "a/b", "..", "日本", "disable", "a%2Fb", "50%"])
async def test_an_action_is_done_to_the_account_that_is_named(alias: str) -> None:
    async with served() as place:
        place.admin.views = [AccountView(alias=alias, status="active")]
        path = f"{place.url}/accounts/{quote(alias, safe='').replace('.', '%2E')}/disable"
        async with place.session.post(yarl.URL(path, encoded=True)) as answer:
            assert answer.status == 200
            told = await answer.json()
    assert place.admin.acted == [(alias, "disable")]
    assert told["account"]["alias"] == alias
    del told["account"]
    assert told == {"alias": alias, "action": "disable", "success": True, "message": "disable was done"}


async def test_an_action_that_failed_is_told_as_such_and_not_as_an_error() -> None:
    async with served() as place:
        place.admin.views = [FRESH]
        async with place.session.post(f"{place.url}/accounts/acct-2/check") as answer:
            assert (answer.status, (await answer.json())["success"]) == (200, False)


async def test_an_account_that_there_is_not_is_named_with_those_like_it() -> None:
    async with served() as place:
        place.admin.views = [FRESH]
        async with place.session.post(f"{place.url}/accounts/acct-22/enable") as answer:
            assert answer.status == 404
            assert "did you mean acct-2?" in (await answer.json())["message"]
        async with place.session.post(f"{place.url}/accounts/acct-2/explode") as answer:
            assert answer.status == 404
        async with place.session.get(f"{place.url}/accounts/acct-2/enable") as answer:
            assert answer.status == 405


async def test_the_share_of_cached_tokens_is_told_by_what_conversations_were_known_by() -> None:
    async with served() as place:
        place.admin.bound = {"none": CacheView(3, 0, 0), "session": CacheView(2, 1000, 250)}
        answer = (await place.get("/stats"))[1]
    assert answer["cache"]["by_source"] == {
        "none": {"turns": 3, "input_tokens": 0, "cached_tokens": 0, "cached_share": None},
        "session": {"turns": 2, "input_tokens": 1000, "cached_tokens": 250, "cached_share": 0.25},
    }


async def test_the_last_decisions_are_shown_and_each_can_be_asked_for() -> None:
    async with served() as place:
        for number in range(25):
            trace = Trace(f"req_{number}", "responses", LOCAL, 100.0, 1_800_000_000.0, model="gpt-5.5")
            trace.finish(End.COMPLETED, 101.5)
            place.admin.decisions.note(trace)
        shown = (await place.get("/stats"))[1]["decisions"]
        status, told = await place.get("/why/req_3")
        missing, error = await place.get("/why/req_99")
    assert [one["id"] for one in shown] == [f"req_{number}" for number in range(24, 4, -1)]
    assert (status, told["id"], told["seconds"]) == (200, "req_3", 1.5)
    assert missing == 404
    assert "no finished turn with the id 'req_99' is known" in error["message"]


# --- rounds

GOOD = Item("acct-1", "j***@e***.com", True)
BAD = Item("acct-2", None, False, "refresh_token_reused")


@pytest.mark.parametrize(("path", "what"), [("/refresh", "refresh"), ("/check-quota", "quota check")])
async def test_a_round_is_told_account_by_account(path: str, what: str) -> None:
    async with served() as place:
        place.admin.views = [BUSY, FRESH]
        place.admin.plan(GOOD, BAD)
        events = await place.round(path)
    assert events == [
        (
            "item",
            {
                "type": "item", "email": "j***@e***.com", "alias": "acct-1", "success": True,
                "total": 2, "current": 1, "reason": None,
            },
        ),
        (
            "item",
            {
                "type": "item", "email": None, "alias": "acct-2", "success": False,
                "total": 2, "current": 2, "reason": "refresh_token_reused",
            },
        ),
        (
            "done",
            {
                "type": "done", "message": f"{what} done: 1 succeeded, 1 failed", "total": 2,
                "success_count": 1, "failed_count": 1, "remaining": 2, "duration": "0.000s",
            },
        ),
    ]  # fmt: skip


async def test_an_empty_pool_is_one_event_with_its_zeros() -> None:
    async with served() as place:
        assert await place.round("/refresh") == [
            (
                "done",
                {
                    "type": "done", "message": "no accounts", "total": 0, "success_count": 0,
                    "failed_count": 0, "remaining": 0, "duration": "0.000s",
                },
            )
        ]  # fmt: skip


async def test_the_duration_is_that_of_the_round() -> None:
    async with served() as place:
        place.admin.planned = 1
        asking = place.background.spawn(place.round("/refresh"), name="asking")
        await until(lambda: place.admin.started == 1)
        place.clock.advance(1.234)
        place.admin.steps.put_nowait(GOOD)
        events = await asking
    assert events[-1][1]["duration"] == "1.234s"


async def test_whoever_asks_while_a_round_runs_hears_all_of_it() -> None:
    async with served() as place:
        place.admin.planned = 2
        first = place.background.spawn(place.round("/refresh"), name="first")
        place.admin.steps.put_nowait(GOOD)
        await until(lambda: place.admin.started == 1 and place.admin.steps.empty())
        second = place.background.spawn(place.round("/refresh"), name="second")
        # The other kind of round is its own.
        third = place.background.spawn(place.round("/check-quota"), name="third")
        await until(lambda: place.admin.started == 2)
        for item in (BAD, BAD, BAD):
            place.admin.steps.put_nowait(item)
        told = await first
        assert await second == told
        assert [name for name, _ in told] == ["item", "item", "done"]
        await third
        assert place.admin.started == 2

        place.admin.plan(GOOD)
        assert [name for name, _ in await place.round("/refresh")] == ["item", "done"]
        assert place.admin.started == 3


async def test_a_round_goes_on_when_its_caller_leaves(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "codex_proxy")
    async with served() as place:
        place.admin.planned = 3
        async with place.session.post(place.url + "/refresh") as answer:
            place.admin.steps.put_nowait(GOOD)
            assert await answer.content.readline() == b"event: item\n"
            answer.close()
        progress = place.admin.refresh_all()
        assert place.admin.started == 1
        for item in (GOOD, BAD):
            place.admin.steps.put_nowait(item)
            await asyncio.sleep(0.005)
        await until(lambda: progress.ended is not None)
        assert [item.success for item in progress.items] == [True, True, False]
        await until(lambda: "goes on without its caller" in caplog.text)
    assert "round done name=refresh total=3 failed=1 whole=True" in caplog.text
    assert not [record for record in caplog.records if record.levelno > logging.INFO]


async def test_a_round_that_dies_says_that_it_stopped(caplog: pytest.LogCaptureFixture) -> None:
    async with served() as place:
        place.admin.plan(GOOD, RuntimeError("inner words"))
        events = await place.round("/refresh")
    assert [name for name, _ in events] == ["item", "done"]
    assert events[-1][1]["message"] == "refresh stopped early: 1 of 2 accounts done"
    assert (events[-1][1]["success_count"], events[-1][1]["failed_count"]) == (1, 0)
    assert "inner words" not in json.dumps(events)
    assert "task died name=round:refresh" in caplog.text


@pytest.mark.parametrize("at_once", [True, False])
async def test_a_round_that_is_stopped_lets_its_listeners_go(at_once: bool) -> None:
    async def items() -> AsyncIterator[Item]:
        await asyncio.Event().wait()
        yield GOOD

    background = Background()
    progress = Rounds("refresh", lambda: (1, items()), background, ManualClock().monotonic).join()
    if not at_once:
        await asyncio.sleep(0)
    await background.aclose()
    assert [item async for item in progress.listen()] == []
    assert progress.ended is not None
    assert not progress.is_whole


async def test_silence_is_told_so_that_the_line_stays_open() -> None:
    progress = Progress(2, 0.0)
    heard = progress.listen(silence=0.005)
    assert await anext(heard) is None
    progress.add(GOOD)
    assert await anext(heard) is GOOD
    assert await anext(heard) is None
    progress.add(BAD)
    progress.finish(1.0, is_whole=True)
    assert [item async for item in heard] == [BAD]


async def test_many_listeners_lose_nothing() -> None:
    progress = Progress(300, 0.0)

    async def follow(pause: int) -> list[Item | None]:
        heard = []
        async for item in progress.listen():
            heard.append(item)
            if pause and len(heard) % pause == 0:
                await asyncio.sleep(0)
        return heard

    items = [Item(f"acct-{n}", None, n % 3 > 0) for n in range(300)]
    async with asyncio.TaskGroup() as group:
        followers = [group.create_task(follow(pause)) for pause in (0, 1, 2, 7, 50)]
        for n, item in enumerate(items):
            progress.add(item)
            if n % 5 == 0:
                await asyncio.sleep(0)
        progress.finish(1.0, is_whole=True)
    assert all(follower.result() == items for follower in followers)
    assert [item async for item in progress.listen()] == items
