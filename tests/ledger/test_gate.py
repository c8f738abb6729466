"""The gate: in which order a turn is looked at, what it gives back, and that its money adds up whatever its end."""

import asyncio
import dataclasses
import random
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Row, select

from codex_proxy.clock import ManualClock
from codex_proxy.config import Live, Settings
from codex_proxy.errors import (
    BudgetUsedUp,
    KeyRefused,
    LedgerAway,
    NotAllowed,
    OutOfFunds,
    ProxyError,
    RateLimited,
    RequestError,
)
from codex_proxy.ledger.gate import TurnGate, TurnPassage, input_tokens
from codex_proxy.ledger.ledger import Ledger
from codex_proxy.ledger.model import Budget, Key, Limits, Mode, User, Window
from codex_proxy.ledger.money import NANOS
from codex_proxy.ledger.prices import estimate
from codex_proxy.ledger.pricing import Pricing
from codex_proxy.ledger.queries import usage_of
from codex_proxy.ledger.tables import usage
from codex_proxy.protocol.compact import COMPACT
from codex_proxy.protocol.native import Native
from codex_proxy.protocol.request import BackendRequest
from codex_proxy.storage.lock import StoreLock
from codex_proxy.trace import LOCAL, Attempt, Caller, End, Trace, Usage, UsageSource

CENT = NANOS // 100
MODEL = "gpt-5"
# 1,000 tokens in, 100 out.
BACKEND = Usage(1000, 0, 0, 100, 0, UsageSource.BACKEND)
COST = 1000 * 1_250 + 100 * 10_000


@dataclass
class Desk:
    """A gate on a ledger of its own, and turns that pass it as the executor has them pass."""

    ledger: Ledger
    gate: TurnGate
    clock: ManualClock
    live: Live
    count: int = 0
    traces: dict[int, Trace] = field(default_factory=dict)

    async def user(self, dollars_in_cents: int = 0, *, is_billed: bool = True, **limits: Any) -> User:
        """A user with some money."""
        self.count += 1
        user = await self.ledger.create_user(
            f"user {self.count}", is_billed=is_billed, limits=Limits(**limits), actor="test"
        )
        if dollars_in_cents:
            await self.ledger.credit(
                user.id,
                dollars_in_cents * CENT,
                reason="test",
                idempotency_key=f"k{self.count}",
                actor="test",
            )
        return user

    async def key(self, user: User, *, expires: int | None = None, **limits: Any) -> Key:
        """A key of *user*."""
        key, _ = await self.ledger.create_key(
            user.id, "key", limits=Limits(**limits), expires=expires, actor="test"
        )
        return key

    async def holder(self, cents: int = 100, **limits: Any) -> Key:
        """A key of a user of its own, who is billed."""
        return await self.key(await self.user(cents), **limits)

    def passage(
        self,
        caller: Key | Caller = LOCAL,
        *,
        route: str = "responses",
        model: str = MODEL,
        asked: str | None = None,
        input_bytes: int = 4000,
        name: str | None = None,
        endpoint: str = "responses",
        **request: Any,
    ) -> TurnPassage:
        """A turn at the gate."""
        self.count += 1
        caller = caller if isinstance(caller, Caller) else Caller(caller.id, caller.name)
        trace = Trace(
            name or f"req_{self.count}",
            route,
            caller,
            self.clock.monotonic(),
            self.clock.now(),
            model=asked or model,
        )
        passage = self.gate.enter(
            trace,
            BackendRequest(endpoint, asked or model, model, b"{}", input_bytes=input_bytes, **request),
        )
        self.traces[id(passage)] = trace
        return passage

    async def admitted(self, caller: Key | Caller = LOCAL, **request: Any) -> TurnPassage:
        """A turn that was let in."""
        passage = self.passage(caller, **request)
        await passage.admit()
        return passage

    def end(
        self,
        passage: TurnPassage,
        used: Usage = BACKEND,
        end: End = End.COMPLETED,
        *,
        answer_bytes: int = 500,
        upstream: str = "",
    ) -> None:
        """Have it end, and settle."""
        trace = self.traces[id(passage)]
        trace.usage, trace.answer_bytes, trace.status = used, answer_bytes, 200
        trace.alias, trace.upstream = "account-1", upstream
        trace.attempts.append(Attempt("account-1", trace.started, "ok", 200, 1.5))
        trace.finish(end, self.clock.monotonic() + 2.0)
        passage.settle()

    async def refused(self, passage: TurnPassage) -> ProxyError:
        """What a turn is refused with; it settles all the same."""
        taken = self.gate.places.taken
        with pytest.raises(ProxyError) as refusal:
            await passage.admit()
        # Whatever the answer takes, its place is free.
        assert self.gate.places.taken <= taken
        self.traces[id(passage)].finish(End.FAILED, self.clock.monotonic())
        passage.settle()
        return refusal.value

    async def rows(self) -> list[Row[Any]]:
        """The usage rows, once all is written."""
        await self.ledger.write(lambda _: None)
        return list(await self.ledger.read(lambda one: one.execute(select(usage).order_by(usage.c.id)).all()))

    async def balance(self, key: Key) -> tuple[int, int]:
        """What a key's user has, and how much of it is held."""
        await self.ledger.write(lambda _: None)
        user = self.ledger.directory.user(key.user_id)
        assert user is not None
        return user.balance, user.held

    async def adds_up(self) -> bool:
        await self.ledger.write(lambda _: None)
        assert await self.ledger.check() == []
        return self.gate.places.taken == 0 and self.gate.places.waiting == 0


async def opened(folder: Path, mode: Mode, **settings: Any) -> Desk:
    clock = ManualClock()
    live = Live(Settings(**{"queue_timeout": 0.0, "reserve_tokens": 1000, **settings}))
    ledger = Ledger(folder, mode=mode, clock=clock, lock=StoreLock(folder))
    await ledger.start()
    pricing = Pricing(ledger, clock.now)
    await pricing.load()
    return Desk(ledger, TurnGate(ledger, pricing, live=live, clock=clock), clock, live)


@pytest.fixture
async def desk(tmp_path: Path) -> AsyncIterator[Desk]:
    """In billing mode."""
    made = await opened(tmp_path, "billing")
    yield made
    await made.ledger.aclose()


# -- a turn that goes well ----------------------------------------------------------------


async def test_a_turn_holds_what_it_may_cost_and_pays_what_it_did(desk: Desk) -> None:
    key = await desk.holder(100)
    passage = await desk.admitted(key)
    price = desk.gate.pricing.book.find(MODEL, 2**50)
    assert price is not None
    assert await desk.balance(key) == (100 * CENT, estimate(price, 1000, 1000))
    desk.end(passage)
    assert await desk.balance(key) == (100 * CENT - COST, 0)
    (row,) = await desk.rows()
    assert (row.user_id, row.key_id, row.model, row.asked_model) == (key.user_id, key.id, MODEL, MODEL)
    assert (row.cost, row.debit, row.shortfall, row.is_billed) == (COST, COST, 0, True)
    assert (row.input_tokens, row.output_tokens, row.source, row.flags) == (1000, 100, "backend", "")
    assert row.price_id == "package/gpt-5/standard"
    assert row.prices == '{"input":"1.25","cached":"0.125","cache_write":"1.25","output":"10.00"}'
    assert (row.target, row.end, row.status, row.milliseconds) == ("account-1", "completed", 200, 2000)
    told = await desk.ledger.read(lambda one: usage_of(one, row.request_id.partition("~")[0]))
    assert told is not None
    assert told.attempts is not None
    assert [(one.target, one.outcome, one.status) for one in told.attempts] == [("account-1", "ok", 200)]
    assert await desk.adds_up()


async def test_whoever_has_no_key_of_the_ledger_is_the_owner_and_only_counted(desk: Desk) -> None:
    for caller in (LOCAL, Caller("key-01234567", "laptop")):
        desk.end(await desk.admitted(caller))
    desk.end(await desk.admitted(LOCAL, model="house-model"))
    rows = await desk.rows()
    assert [(row.user_id, row.key_id, row.is_billed, row.cost) for row in rows] == [
        ("owner", "local", False, COST),
        ("owner", "key-01234567", False, COST),
        ("owner", "local", False, None),
    ]
    assert await desk.adds_up()


async def test_in_personal_mode_nobody_pays_and_an_unknown_price_is_shown_as_such(tmp_path: Path) -> None:
    desk = await opened(tmp_path, "personal")
    key = await desk.holder(0)
    desk.end(await desk.admitted(key))
    desk.end(await desk.admitted(key, model="house-model"))
    desk.end(await desk.admitted(key, model="gpt-5-codex", service_tier="priority"))
    assert [(row.cost, row.debit, row.tier) for row in await desk.rows()] == [
        (COST, 0, ""),
        (None, 0, ""),
        (None, 0, "priority"),
    ]
    assert await desk.adds_up()
    await desk.ledger.aclose()


async def test_two_requests_that_call_themselves_the_same_are_two(desk: Desk) -> None:
    key = await desk.holder(100)
    for _ in range(3):
        desk.end(await desk.admitted(key, name="mine"))
    rows = await desk.rows()
    assert [row.request_id.partition("~")[0] for row in rows] == ["mine"] * 3
    assert await desk.balance(key) == (100 * CENT - 3 * COST, 0)


# -- permission ---------------------------------------------------------------------------


async def test_a_key_that_was_ended_is_refused(desk: Desk) -> None:
    key = await desk.holder()
    waiting = desk.passage(key)
    await desk.ledger.revoke_key(key.id, "test")
    error = await desk.refused(waiting)
    assert (type(error), error.code) == (KeyRefused, "key_revoked")
    soon = await desk.key(await desk.user(is_billed=False), expires=int(desk.clock.now() * 1000) + 1000)
    desk.end(await desk.admitted(soon))
    desk.clock.advance(1.0)
    error = await desk.refused(desk.passage(soon))
    assert (type(error), error.code) == (KeyRefused, "key_expired")
    other = await desk.holder()
    await desk.ledger.update_user(other.user_id, {"status": "suspended"}, "test")
    error = await desk.refused(desk.passage(other))
    assert (type(error), error.code) == (KeyRefused, "user_suspended")
    assert len(await desk.rows()) == 1
    assert await desk.adds_up()


@pytest.mark.parametrize("where", ["key", "user"])
async def test_endpoints_and_models_are_those_of_the_key_and_of_its_user(desk: Desk, where: str) -> None:
    limits: dict[str, Any] = {"models": ("gpt-5-*", "claude-*"), "endpoints": ("chat", "compact", "images")}
    user = await desk.user(100, **(limits if where == "user" else {}))
    key = await desk.key(user, **(limits if where == "key" else {}))
    good: list[dict[str, Any]] = [
        {"route": "chat", "model": "gpt-5-mini"},
        {"route": "chat", "model": "gpt-5", "asked": "claude-opus-5"},
        {"route": "responses/compact", "model": "GPT-5-codex", "service_tier": "flex"},
    ]
    for request in good[:2]:
        desk.end(await desk.admitted(key, **request))
    # Allowed, and without a price.
    error = await desk.refused(desk.passage(key, **good[2]))
    assert error.code == "model_price_missing"
    error = await desk.refused(desk.passage(key, route="chat", model="gpt-5"))
    assert isinstance(error, NotAllowed)
    assert (error.code, error.param) == ("model_not_allowed", "model")
    assert "'gpt-5'" in error.message
    error = await desk.refused(desk.passage(key, route="responses", model="gpt-5-mini"))
    assert (type(error), error.code) == (NotAllowed, "endpoint_not_allowed")
    # What stands in a form is not looked at: left open, or not allowed, it is the same.
    error = await desk.refused(desk.passage(key, route="images/edits", model=""))
    assert (type(error), error.code) == (NotAllowed, "model_not_allowed")


async def test_a_search_names_no_model_and_so_has_no_price(desk: Desk) -> None:
    key = await desk.holder(models=("gpt-5",))
    error = await desk.refused(desk.passage(key, route="alpha/search", model=""))
    assert error.code == "model_price_missing"
    assert "names no model" in error.message
    free = await desk.key(await desk.user(is_billed=False), models=("gpt-5",))
    desk.end(await desk.admitted(free, route="alpha/search", model=""))


async def test_a_key_that_is_not_there_any_more_is_not_the_owners(desk: Desk) -> None:
    """A row that somebody deleted, or that a database put back does not have: never a turn for nothing."""
    for one in ("key_0123456789abcdef", "key_"):
        error = await desk.refused(desk.passage(Caller(one, "gone")))
        assert (type(error), error.code) == (KeyRefused, "invalid_api_key")
    desk.end(await desk.admitted(Caller("key-01234567", "of the configuration")))


async def test_the_models_that_a_caller_sees_are_those_it_may_use(desk: Desk) -> None:
    key = await desk.key(await desk.user(models=("gpt-*",)), models=("*-mini", "gpt-6*"))
    assert desk.gate.models_of(key.id) == (("*-mini", "gpt-6*"), ("gpt-*",))
    assert desk.gate.models_of("local") == ()
    assert desk.gate.models_of((await desk.holder()).id) == ()


# -- limits -------------------------------------------------------------------------------


async def test_a_rate_is_refused_with_the_exact_wait_and_what_is_left_is_told(desk: Desk) -> None:
    key = await desk.holder(requests_per_minute=2, tokens_per_minute=5000)
    first = await desk.admitted(key)
    allowance = desk.traces[id(first)].allowance
    assert allowance is not None
    assert allowance.requests is not None
    assert allowance.tokens is not None
    assert (allowance.requests.remaining, allowance.tokens.remaining) == (1, 3000)
    desk.end(first)
    # It was estimated at 2,000 tokens and had 1,100.
    second = await desk.admitted(key)
    allowance = desk.traces[id(second)].allowance
    assert allowance is not None
    assert allowance.tokens is not None
    assert allowance.tokens.remaining == 1900
    desk.end(second)
    third = desk.passage(key)
    error = await desk.refused(third)
    assert isinstance(error, RateLimited)
    assert error.retry_after == 30.0
    assert "2 requests a minute" in error.message
    assert desk.traces[id(third)].allowance is not None
    desk.clock.advance(30.0)
    desk.end(await desk.admitted(key))
    assert len(await desk.rows()) == 3


async def test_tokens_a_minute_count_as_they_were_in_the_end(desk: Desk) -> None:
    key = await desk.holder(1000, tokens_per_minute=10_000)
    # Much more than was thought: those that follow wait the longer.
    desk.end(await desk.admitted(key), Usage(30_000, 0, 0, 100, 0, UsageSource.BACKEND))
    error = await desk.refused(desk.passage(key))
    assert isinstance(error, RateLimited)
    assert error.retry_after == pytest.approx(60.0 * (30_100 + 2_000 - 10_000) / 10_000)
    desk.clock.advance(error.retry_after)
    desk.end(await desk.admitted(key))


async def test_what_a_refused_turn_has_taken_is_given_back(desk: Desk) -> None:
    poor = await desk.holder(0, requests_per_minute=1, tokens_per_minute=2000, concurrency=1)
    for _ in range(3):
        # Place and rates are taken before the money is asked for.
        assert isinstance(await desk.refused(desk.passage(poor)), OutOfFunds)
    for _ in range(3):
        assert isinstance(await desk.refused(desk.passage(poor, model="house-model")), RequestError)
    await desk.ledger.credit(poor.user_id, 50 * CENT, reason="test", idempotency_key="late", actor="test")
    desk.end(await desk.admitted(poor))
    assert await desk.adds_up()


async def test_whoever_is_refused_is_told_what_is_left_without_that_turn(desk: Desk) -> None:
    limits = {"requests_per_minute": 5, "tokens_per_minute": 10_000}
    poor = await desk.key(await desk.user(0), **limits)
    calm = await desk.key(await desk.user(100, tokens_per_minute=9_000), concurrency=1, **limits)
    under_way = await desk.admitted(calm)
    told = {}
    for name, key, model in (("money", poor, MODEL), ("price", poor, "house-model"), ("place", calm, MODEL)):
        passage = desk.passage(key, model=model)
        assert isinstance(await desk.refused(passage), OutOfFunds | RequestError | RateLimited)
        allowance = desk.traces[id(passage)].allowance
        assert allowance is not None
        assert allowance.requests is not None
        assert allowance.tokens is not None
        told[name] = (allowance.requests.remaining, allowance.tokens.limit, allowance.tokens.remaining)
    # Of the one that is under way there is a thousand in, and a thousand out; its user's limit is the tighter one.
    assert told == {"money": (5, 10_000, 10_000), "price": (5, 10_000, 10_000), "place": (4, 9_000, 7_000)}
    desk.end(under_way)


async def test_turns_at_a_time_are_limited_and_each_end_makes_room(desk: Desk) -> None:
    user = await desk.user(1000, concurrency=3)
    one, other = await desk.key(user, concurrency=2), await desk.key(user)
    under_way = [await desk.admitted(one), await desk.admitted(one)]
    error = await desk.refused(desk.passage(one))
    assert isinstance(error, RateLimited)
    assert "this key has 2 requests under way" in error.message
    under_way.append(await desk.admitted(other))
    error = await desk.refused(desk.passage(other))
    assert "all keys of this user together have 3 requests" in error.message
    for passage in under_way:
        desk.end(passage)
    desk.end(await desk.admitted(one))
    assert await desk.adds_up()


async def test_the_ceiling_for_all_counts_for_the_owner_too_and_at_once(desk: Desk) -> None:
    key = await desk.holder()
    desk.live.current = dataclasses.replace(desk.live.current, max_turns=1)
    first = await desk.admitted(key)
    error = await desk.refused(desk.passage(LOCAL))
    assert isinstance(error, RateLimited)
    assert error.retry_after > 0
    desk.live.current = dataclasses.replace(desk.live.current, max_turns=0)
    desk.end(await desk.admitted(LOCAL))
    desk.end(first)
    assert await desk.adds_up()


async def test_who_waits_for_a_place_is_looked_at_again_when_it_has_one(desk: Desk) -> None:
    desk.live.current = dataclasses.replace(desk.live.current, queue_timeout=5.0)
    key = await desk.key(await desk.user(is_billed=False), concurrency=1)
    first, second = await desk.admitted(key), desk.passage(key)
    waiting = asyncio.get_running_loop().create_task(desk.refused(second))
    await asyncio.sleep(0)
    assert desk.gate.places.waiting == 1
    await desk.ledger.revoke_key(key.id, "test")
    desk.end(first)
    error = await waiting
    assert (type(error), error.code) == (KeyRefused, "key_revoked")
    assert await desk.adds_up()


async def test_who_leaves_the_queue_leaves_nothing_behind(desk: Desk) -> None:
    desk.live.current = dataclasses.replace(desk.live.current, queue_timeout=5.0)
    key = await desk.holder(concurrency=1, requests_per_minute=2)
    first, second = await desk.admitted(key), desk.passage(key)
    task = asyncio.get_running_loop().create_task(second.admit())
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    second.settle()
    desk.end(first)
    desk.end(await desk.admitted(key))
    assert len(await desk.rows()) == 2
    assert await desk.adds_up()


# -- money --------------------------------------------------------------------------------


async def test_a_budget_with_a_window_says_when_it_begins_anew(desk: Desk) -> None:
    key = await desk.holder(100, budgets=(Budget(Window.DAY, 2 * COST),))
    desk.live.current = dataclasses.replace(desk.live.current, reserve_tokens=256)
    desk.end(await desk.admitted(key, max_output_tokens=100))
    error = await desk.refused(desk.passage(key))
    assert isinstance(error, BudgetUsedUp)
    assert 0 < error.retry_after <= 86_400
    assert error.resets_at == pytest.approx(desk.clock.now() + error.retry_after, abs=1)
    # One that fits.
    desk.end(await desk.admitted(key, max_output_tokens=100))
    assert isinstance(await desk.refused(desk.passage(key, max_output_tokens=1, input_bytes=4)), BudgetUsedUp)
    desk.clock.advance(error.retry_after)
    desk.end(await desk.admitted(key))
    assert await desk.adds_up()


async def test_budgets_count_also_for_those_who_pay_nothing(tmp_path: Path) -> None:
    desk = await opened(tmp_path, "personal", reserve_tokens=256)
    key = await desk.holder(0, budgets=(Budget(Window.TOTAL, COST + 1),))
    desk.end(await desk.admitted(key, max_output_tokens=100))
    assert isinstance(await desk.refused(desk.passage(key, max_output_tokens=100)), OutOfFunds)
    # What has no price spends nothing of it.
    desk.end(await desk.admitted(key, model="house-model"))
    assert await desk.adds_up()
    await desk.ledger.aclose()


@pytest.mark.parametrize(
    ("used", "end", "answer_bytes", "tokens"),
    [
        # The upstream refused, or broke before anything was there.
        (Usage(), End.FAILED, 0, (0, 0)),
        # A whole answer was to be collected and broke in the midst.
        (Usage(1000, 0, 0, 50, 0, UsageSource.ESTIMATE), End.FAILED, 0, (0, 0)),
        (Usage(1000, 0, 0, 50, 0, UsageSource.BACKEND), End.FAILED, 0, (0, 0)),
        # A stream had begun, with nothing in it.
        (Usage(1000, 0, 0, 0, 0, UsageSource.ESTIMATE), End.FAILED, 300, (0, 0)),
        # It had something in it.
        (Usage(1000, 0, 0, 50, 0, UsageSource.ESTIMATE), End.FAILED, 900, (1000, 50)),
        (Usage(1000, 0, 0, 0, 0, UsageSource.BACKEND), End.FAILED, 300, (1000, 0)),
        # Its caller left: before it was sent, while it was read, in its midst.
        (Usage(), End.CALLER_GONE, 0, (0, 0)),
        (Usage(1000, 0, 0, 0, 0, UsageSource.ESTIMATE), End.CALLER_GONE, 0, (1000, 0)),
        (Usage(1000, 0, 0, 20, 0, UsageSource.ESTIMATE), End.CALLER_GONE, 400, (1000, 20)),
        # The caller's own limit ended it.
        (Usage(1000, 0, 0, 20, 0, UsageSource.ESTIMATE), End.INCOMPLETE, 400, (1000, 20)),
    ],
)
async def test_what_is_paid_of_a_turn_that_ended_in_another_way(
    desk: Desk, used: Usage, end: End, answer_bytes: int, tokens: tuple[int, int]
) -> None:
    key = await desk.holder()
    desk.end(await desk.admitted(key), used, end, answer_bytes=answer_bytes)
    (row,) = await desk.rows()
    assert (row.input_tokens, row.output_tokens, row.end) == (*tokens, end.value)
    assert row.cost == tokens[0] * 1_250 + tokens[1] * 10_000 == row.debit
    assert row.source == (used.source.value if any(tokens) else "none")
    assert await desk.adds_up()


async def test_absurd_usage_is_clamped_and_flagged(desk: Desk) -> None:
    key = await desk.holder(10_000)
    desk.end(await desk.admitted(key), Usage(10**12, 5, 0, 10**12, 0, UsageSource.BACKEND), upstream="odd")
    desk.end(await desk.admitted(LOCAL, model="house-model"), Usage(10**30, source=UsageSource.BACKEND))
    first, second = await desk.rows()
    assert (first.input_tokens, first.output_tokens, first.flags) == (400_000, 128_000, "clamped")
    assert (first.cost, first.upstream) == (399_995 * 1_250 + 5 * 125 + 128_000 * 10_000, "odd")
    assert (second.input_tokens, second.flags, second.cost) == (2_000_000, "clamped", None)
    assert await desk.adds_up()


async def test_who_leaves_while_the_hold_is_asked_for_holds_nothing(desk: Desk) -> None:
    key = await desk.holder()
    for waits in range(4):
        passage = desk.passage(key)
        task = asyncio.get_running_loop().create_task(passage.admit())
        for _ in range(waits):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        desk.traces[id(passage)].finish(End.CALLER_GONE, desk.clock.monotonic())
        passage.settle()
    assert await desk.balance(key) == (100 * CENT, 0)
    assert all(row.cost == 0 for row in await desk.rows())
    assert await desk.adds_up()


async def test_settling_twice_is_settling_once_and_never_fails(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = await desk.holder(concurrency=1)
    passage = await desk.admitted(key)
    desk.end(passage)
    passage.settle()
    assert len(await desk.rows()) == 1
    second = await desk.admitted(key)

    def broken(_: object) -> None:
        raise RuntimeError("broken")

    monkeypatch.setattr(desk.ledger, "settle", broken)
    desk.end(second)
    # Its place is free all the same.
    assert desk.gate.places.taken == 0


async def test_a_ledger_that_is_full_lets_nobody_begin(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    key = await desk.holder(requests_per_minute=1)

    def away(_: object) -> None:
        raise LedgerAway("away")

    with monkeypatch.context() as patch:
        patch.setattr(desk.ledger, "begin", away)
        for _ in range(2):
            assert isinstance(await desk.refused(desk.passage(key)), LedgerAway)
    desk.end(await desk.admitted(key))


# -- longer than was set aside ------------------------------------------------------------


async def test_a_stream_gets_more_before_its_hold_is_used_up(desk: Desk) -> None:
    key = await desk.holder(100)
    passage = await desk.admitted(key)
    _, held = await desk.balance(key)
    # 1,000 tokens are covered; at 800 there is more.
    assert await passage.top_up(3199)
    assert await desk.balance(key) == (100 * CENT, held)
    assert await passage.top_up(3200)
    assert await desk.balance(key) == (100 * CENT, held + 1000 * 10_000)
    # One read may bring much.
    assert await passage.top_up(4 * 5000)
    assert (await desk.balance(key))[1] == held + 6 * 1000 * 10_000
    desk.end(passage, Usage(1000, 0, 0, 5200, 0, UsageSource.BACKEND))
    (row,) = await desk.rows()
    assert (row.debit, row.shortfall) == (1000 * 1_250 + 5200 * 10_000, 0)
    assert await desk.adds_up()


async def test_a_stream_without_money_may_use_up_its_hold_and_is_cut_then(desk: Desk) -> None:
    key = await desk.holder(2)
    passage = await desk.admitted(key)
    assert await passage.top_up(3200)
    assert await passage.top_up(3999)
    assert not await passage.top_up(4000)
    # Also of an answer that nobody has seen yet: it was the caller's own money that ended it.
    desk.end(passage, Usage(1000, 0, 0, 1000, 0, UsageSource.ESTIMATE), End.FAILED, answer_bytes=0)
    (row,) = await desk.rows()
    assert row.debit == 1000 * 1_250 + 1000 * 10_000
    assert row.shortfall == 0
    assert await desk.adds_up()


async def test_money_that_comes_meanwhile_lets_a_stream_go_on(desk: Desk) -> None:
    key = await desk.holder(2)
    passage = await desk.admitted(key)
    assert await passage.top_up(3200)
    await desk.ledger.credit(key.user_id, CENT, reason="test", idempotency_key="more", actor="test")
    assert await passage.top_up(4000)
    desk.end(passage)
    assert await desk.adds_up()


async def test_nothing_more_is_set_aside_where_the_caller_has_a_limit_or_nothing_to_pay(desk: Desk) -> None:
    key = await desk.holder(100)
    passage = await desk.admitted(key, max_output_tokens=900)
    _, held = await desk.balance(key)
    assert held == 1000 * 1_250 + 900 * 10_000
    # Some tokens are long.
    assert await passage.top_up(900 * 4 * 2 - 1)
    assert await desk.balance(key) == (100 * CENT, held)
    desk.end(passage)
    embedding = await desk.admitted(key, route="embeddings", model="text-embedding-3-small")
    assert (await desk.balance(key))[1] == 1000 * 20
    assert await embedding.top_up(10**9)
    desk.end(embedding, Usage(900, source=UsageSource.BACKEND))
    free = await desk.admitted(LOCAL)
    assert await free.top_up(10**9)
    desk.end(free)
    assert await desk.adds_up()


async def test_a_compaction_sets_aside_as_much_as_it_can_become(desk: Desk) -> None:
    """There is no moment at which more could be set aside for it; and it is no longer than what it is made of."""
    key = await desk.holder(1000)
    passage = await desk.admitted(key, route=COMPACT, endpoint=COMPACT, input_bytes=400_000)
    # 100,000 tokens, in and out.
    assert (await desk.balance(key))[1] == 100_000 * (1_250 + 10_000)
    assert await passage.top_up(10**6)
    desk.end(passage, Usage(100_000, 0, 0, 90_000, 0, UsageSource.BACKEND))
    small = await desk.admitted(key, route=COMPACT, endpoint=COMPACT, input_bytes=40)
    assert (await desk.balance(key))[1] == 10 * 1_250 + 1_000 * 10_000
    desk.end(small)
    poor = await desk.holder(100)
    refused = await desk.refused(desk.passage(poor, route=COMPACT, endpoint=COMPACT, input_bytes=400_000))
    assert isinstance(refused, OutOfFunds)
    assert "stream" not in refused.message
    assert [row.shortfall for row in await desk.rows()] == [0, 0]
    assert await desk.adds_up()


NATIVES = [
    None,
    Native("chat", b"{}", {}, MODEL, stream=True),
    Native("chat", b"{}", {}, MODEL, stream=False),
]


@pytest.mark.parametrize("native", NATIVES)
async def test_what_comes_beyond_a_callers_limit_has_to_be_paid_for(
    desk: Desk, native: Native | None
) -> None:
    """It bounds what an account says, not what it thinks; and an upstream may not keep it at all."""
    key = await desk.holder(2)
    passage = await desk.admitted(key, native=native, max_output_tokens=10)
    held = (await desk.balance(key))[1]
    assert await passage.top_up(79)
    assert (await desk.balance(key))[1] == held
    # A thousand tokens more, at ten dollars a million.
    assert await passage.top_up(80)
    assert (await desk.balance(key))[1] == held + CENT
    assert not await passage.top_up(100_000)
    desk.end(passage, Usage(1000, 0, 0, 1500, 0, UsageSource.BACKEND), End.FAILED)
    (row,) = await desk.rows()
    assert row.debit > CENT
    embedded = await desk.admitted(await desk.holder(1), route="embeddings", native=native)
    assert await embedded.top_up(0)
    desk.end(embedded)
    assert await desk.adds_up()


def test_the_input_is_estimated_by_its_bytes() -> None:
    def request(**values: Any) -> BackendRequest:
        return BackendRequest("responses", MODEL, MODEL, b"", **values)

    assert input_tokens(request()) == 0
    assert input_tokens(request(input_bytes=4001)) == 1001
    assert input_tokens(request(input_bytes=4000, compacted=("x" * 160, "y" * 16))) == 1033
    assert input_tokens(request(input_bytes=4_000_000, context_window=272_000)) == 272_000


# -- many at once -------------------------------------------------------------------------


@pytest.mark.parametrize("factor", [0.5, 1.0, 3.0])
async def test_fifty_at_once_with_money_for_ten_are_never_served_unpaid(desk: Desk, factor: float) -> None:
    """Each costs *factor* times what was thought of it."""
    probe = await desk.holder(100)
    passage = await desk.admitted(probe)
    _, held = await desk.balance(probe)
    desk.end(passage)
    key = await desk.key(await desk.user())
    await desk.ledger.credit(key.user_id, 10 * held, reason="test", idempotency_key="ten", actor="test")
    served = 0

    async def turn() -> None:
        nonlocal served
        passage = desk.passage(key)
        try:
            await passage.admit()
        except OutOfFunds:
            desk.traces[id(passage)].finish(End.FAILED, desk.clock.monotonic())
            passage.settle()
            return
        served += 1
        await asyncio.sleep(0.001)
        desk.end(passage, Usage(int(1000 * factor), 0, 0, int(1000 * factor), 0, UsageSource.BACKEND))

    await asyncio.gather(*[turn() for _ in range(50)])
    rows = [row for row in await desk.rows() if row.key_id == key.id]
    assert len(rows) == served == 10
    assert all(row.debit > 0 for row in rows)
    balance, still_held = await desk.balance(key)
    assert (balance, still_held) == (max(0, 10 * held - sum(row.cost for row in rows)), 0)
    assert sum(row.cost for row in rows) == sum(row.debit + row.shortfall for row in rows)
    # What was set aside for the others stays theirs.
    assert all(row.shortfall <= max(0, row.cost - held) for row in rows)
    assert await desk.adds_up()


@pytest.mark.parametrize("seed", range(3))
async def test_whatever_turns_do_it_adds_up(desk: Desk, seed: int) -> None:
    rng = random.Random(seed)
    desk.live.current = dataclasses.replace(desk.live.current, queue_timeout=0.05, max_turns=12)
    users = [await desk.user(rng.randint(0, 5), concurrency=rng.choice([None, 4])) for _ in range(3)]
    keys = [
        await desk.key(
            rng.choice(users),
            concurrency=rng.choice([None, 2]),
            requests_per_minute=rng.choice([None, 20]),
            budgets=rng.choice([(), (Budget(Window.HOURS_5, CENT),)]),
        )
        for _ in range(6)
    ]
    callers: list[Key | Caller] = [*keys, LOCAL]

    async def turn() -> None:
        caller = rng.choice(callers)
        passage = desk.passage(
            caller, model=rng.choice([MODEL, "gpt-6-luna", "house-model"]),
            max_output_tokens=rng.choice([None, 50]), input_bytes=rng.randint(0, 4000),
        )  # fmt: skip
        try:
            await passage.admit()
            text = 0
            for _ in range(rng.randint(0, 5)):
                await asyncio.sleep(rng.choice([0, 0.001]))
                text += rng.randint(0, 2000)
                if not await passage.top_up(text):
                    break
        except ProxyError:
            pass
        finally:
            desk.end(
                passage,
                Usage(rng.randint(0, 3000), 0, 0, rng.randint(0, 3000), 0, rng.choice(list(UsageSource))),
                rng.choice([End.COMPLETED, End.FAILED, End.CALLER_GONE]),
                answer_bytes=rng.choice([0, 500]),
            )

    tasks = [asyncio.get_running_loop().create_task(turn()) for _ in range(150)]
    for task in rng.sample(tasks, 40):
        await asyncio.sleep(rng.choice([0, 0.001]))
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert await desk.adds_up()
    assert desk.ledger.statistics().holds_open == 0
    assert all(user.held == 0 <= user.balance for user in desk.ledger.directory.users())
