"""The pool as its owner sees it: what all accounts come to, and views made of those that are shown."""

import asyncio
import itertools
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import make_mocked_request

from codex_proxy.accounts.account import Account, Cause
from codex_proxy.accounts.pool import Pool
from codex_proxy.accounts.upkeep import Result
from codex_proxy.clock import ManualClock
from codex_proxy.server import views
from codex_proxy.server.admin import AccountView, Summary, admin_handlers, summary_json
from codex_proxy.server.decisions import Decisions
from codex_proxy.server.views import PoolAdmin, account_view
from codex_proxy.tasks import Background
from tests.accounts.making import HOUR, NOW, make_pool, named


class NoKeeper:
    """Asks nobody anything."""

    async def each(self, accounts: list[Account]) -> AsyncIterator[Result]:
        for account in accounts:
            yield Result(account, True, "")

    each_usage = each_refresh = each


def admin_of(pool: Pool, clock: ManualClock) -> PoolAdmin:
    keeper: Any = NoKeeper()
    actions: Any = None
    return PoolAdmin(pool, keeper, actions, clock=clock, background=Background(), phase=lambda: "ready")


def lived(count: int) -> tuple[Pool, ManualClock]:
    """Make a pool some of whose accounts have served, rest, were asked, or are off."""
    pool, clock = make_pool(*(f"u{number:04}" for number in range(count)))
    for number, one in enumerate(pool):
        one.total_requests, one.total_errors, one.completions = number, number % 3, number % 5
        one.usage.input_tokens, one.usage.cached_tokens, one.usage.output_tokens = 10 * number, number, 3
        one.usage.reasoning_tokens, one.in_flight = 1, number % 2
        if number % 4 == 0:
            one.hold(Cause.LIMIT if number % 8 else Cause.RATE, NOW + HOUR)
        if number % 7 == 0:
            one.quota.usage_at, one.quota.usage_status = NOW - 5, (200, 401, None)[number % 3]
        if number % 11 == 0:
            pool.login_lost(one, "refused")
            pool.reject(one)
    return pool, clock


def of(shown: list[AccountView]) -> Summary:
    """Count and add up what views show, one by one."""
    found = Summary()
    for view in shown:
        found.by_status[view.status] += 1
        found.in_flight += view.in_flight
        found.total_requests += view.total_requests
        found.total_errors += view.total_errors
        found.quota_exhausted += view.quota_exhausted
        for name in ("total_completions", "input_tokens", "cached_tokens", "output_tokens"):
            setattr(found.usage, name, getattr(found.usage, name) + getattr(view.usage, name))
        found.usage.reasoning_tokens += view.usage.reasoning_tokens
        found.usage.total_tokens += view.usage.total_tokens
        if view.quota is not None and view.quota.checked_at:
            found.quota_checked += 1
            found.quota_valid += view.quota.valid is True
            found.quota_invalid += view.quota.valid is False
    return found


def test_the_summary_is_what_the_views_add_up_to() -> None:
    pool, clock = lived(100)
    admin = admin_of(pool, clock)
    summary = summary_json(admin.summary())
    assert summary == summary_json(of(list(admin.accounts())))
    assert (summary["total"], summary["needs_login"], summary["in_flight"]) == (100, 10, 50)
    assert all(summary[name] > 0 for name in ("cooldown", "quota_valid", "quota_invalid", "quota_exhausted"))
    assert summary["quota_checked"] > summary["quota_valid"] + summary["quota_invalid"]


def test_the_views_are_in_the_order_of_the_names() -> None:
    pool, clock = make_pool("b", "c", "a")
    shown = admin_of(pool, clock).accounts()
    assert [view.alias for view in shown] == ["a", "b", "c"]
    assert (shown[1].alias, shown[-1].alias, len(shown[1:]), shown[1:][0].alias) == ("b", "c", 2, "b")


class Asked:
    """The owner's routes over a pool, and the views that were made for them."""

    def __init__(self, pool: Pool, clock: ManualClock, monkeypatch: pytest.MonkeyPatch) -> None:
        self.made: list[str] = []
        self.handlers = admin_handlers(admin_of(pool, clock), Decisions(), clock.monotonic)

        def making(account: Account, now: float) -> AccountView:
            self.made.append(account.alias)
            return account_view(account, now)

        monkeypatch.setattr(views, "account_view", making)

    async def get(self, path: str) -> Any:
        self.made.clear()
        name = path[1:].partition("?")[0]
        answer = await self.handlers[name](make_mocked_request("GET", path))
        assert isinstance(answer, web.Response)
        assert isinstance(answer.body, bytes)
        return json.loads(answer.body)


async def test_a_page_costs_as_much_as_it_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    pool, clock = lived(2_000)
    asked = Asked(pool, clock, monkeypatch)
    answer = await asked.get("/stats?page=2&page_size=20")
    assert [one["alias"] for one in answer["accounts"]] == [f"u{n:04}" for n in range(20, 40)]
    assert (answer["pagination"]["total"], answer["summary"]["total"]) == (2_000, 2_000)
    assert len(asked.made) == 20


@pytest.mark.parametrize("path", ["/stats", "/accounts", "/stats?q=u0"])
async def test_a_long_page_lets_others_have_their_turn(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pool, clock = lived(600)
    asked = Asked(pool, clock, monkeypatch)
    turns: list[int] = []

    async def others() -> None:
        while True:
            turns.append(len(asked.made))
            await asyncio.sleep(0)

    async with asyncio.TaskGroup() as group:
        watching = group.create_task(others())
        answer = await group.create_task(asked.get(path))
        watching.cancel()
    assert len(answer["accounts"]) in (600, 100)
    between = [later - earlier for earlier, later in itertools.pairwise(turns)]
    assert max(between) <= 50
    assert len(turns) >= 12


async def test_what_is_shown_in_slices_is_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    pool, clock = lived(130)
    asked = Asked(pool, clock, monkeypatch)
    everything, accounts = await asked.get("/stats"), await asked.get("/accounts")
    assert [one["alias"] for one in everything["accounts"]] == [f"u{n:04}" for n in range(130)]
    assert accounts["accounts"] == everything["accounts"]
    assert list(everything) == [
        "summary", "accounts", "problems", "cache", "decisions", "version", "uptime_seconds",
    ]  # fmt: skip
    empty, clock = make_pool()
    nobody = Asked(empty, clock, monkeypatch)
    assert (await nobody.get("/stats"))["accounts"] == (await nobody.get("/accounts"))["accounts"] == []


async def test_an_account_that_leaves_while_a_page_is_made_is_on_it(monkeypatch: pytest.MonkeyPatch) -> None:
    pool, clock = lived(120)
    asked = Asked(pool, clock, monkeypatch)
    page = asyncio.ensure_future(asked.get("/stats"))  # noqa: TID251 -- awaited below
    await asyncio.sleep(0)
    pool._remove(named(pool, "u0119"))
    assert len((await page)["accounts"]) == 120
