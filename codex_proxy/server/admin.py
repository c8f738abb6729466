"""Health, statistics, decisions, rounds over all accounts, and what an owner does to one of them.

What is shown is what `Admin` hands over: views with an alias and masked names, so nothing
here could leak a token if it tried. The shapes are those of the Go daemon with more fields;
a time that is unset is null, a zero is a zero.
"""

import asyncio
import functools
import logging
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Literal, Protocol

from aiohttp import web

from codex_proxy import __version__
from codex_proxy.accounts.actions import ACTIONS, Action, Done
from codex_proxy.errors import RequestError
from codex_proxy.protocol.sse import frame
from codex_proxy.protocol.wire import JsonObject, dumps
from codex_proxy.server.decisions import Decisions
from codex_proxy.server.front import Handler
from codex_proxy.tasks import Background

logger = logging.getLogger(__name__)

Status = Literal["active", "cooldown", "unavailable", "needs_login", "disabled"]
STATUSES: tuple[Status, ...] = ("active", "cooldown", "unavailable", "needs_login", "disabled")

# While nothing happens in a round, this is said, so that no relay between takes it for dead.
KEEP_ALIVE_SECONDS = 15.0

MAX_PAGE_SIZE = 200
DEFAULT_PAGE_SIZE = 100

# Between so many accounts other work gets its turn: some milliseconds.
_SLICE = 50


# The views of an account are not frozen: thousands are made for one page, in half the time.


@dataclass(slots=True)
class WindowView:
    """One quota window."""

    window: str
    """What people call it, by its length: `5h`, `week`; by its place where nobody told the length."""
    limit: str = "codex"
    """Which limit it belongs to: the account's own, or that of a model family beside it."""
    minutes: int | None = None
    used_percent: float | None = None
    """None when the window has started again since we were told: unknown, not full."""
    resets_at: float | None = None
    source: str | None = None
    age: float | None = None
    """Seconds since this was learned."""
    limit_name: str | None = None
    """What the backend calls that limit, if it has a name for people."""


@dataclass(slots=True)
class CreditsView:
    """Bought credits; None where the backend did not say it."""

    has_credits: bool | None
    unlimited: bool | None
    balance: str | None
    overage_limit_reached: bool | None
    source: str | None
    age: float | None


@dataclass(slots=True)
class SpendView:
    """What a workspace lets this person spend; None where the backend did not say it."""

    reached: bool | None
    limit: str | None
    used: str | None
    used_percent: float | None
    resets_at: float | None
    source: str | None
    age: float | None


@dataclass(slots=True)
class QuotaView:
    """What is known of an account's quota, and from when."""

    valid: bool | None = None
    status_code: int | None = None
    checked_at: float | None = None
    source: str | None = None
    plan: str | None = None
    windows: tuple[WindowView, ...] = ()
    credits: CreditsView | None = None
    spend: SpendView | None = None


@dataclass(slots=True)
class TokensView:
    """What an account has served since start."""

    total_completions: int = 0
    input_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    reasoning_tokens: int = 0
    total_tokens: int = 0


@dataclass(slots=True)
class AccountView:
    """One account as an owner may see it. Times are seconds since the epoch."""

    alias: str
    status: Status
    email: str | None = None
    """Masked."""
    file: str | None = None
    """The file's name, e-mail in it masked."""
    reason: str | None = None
    plan_type: str | None = None
    account_id: str | None = None
    """Masked."""
    total_requests: int = 0
    total_errors: int = 0
    consecutive_failures: int = 0
    in_flight: int = 0
    last_used_at: float | None = None
    last_refreshed_at: float | None = None
    cooldown_until: float | None = None
    quota_exhausted: bool = False
    quota_resets_at: float | None = None
    token_expire: float | None = None
    usage: TokensView = field(default_factory=TokensView)
    quota: QuotaView | None = None
    login: Literal["ok", "uncertain", "lost"] = "ok"
    login_reason: str | None = None
    last_error: str | None = None
    priority: int = 0
    weight: float = 1.0
    max_concurrency: int | None = None
    """None where its file does not say it."""
    models_allowed: Sequence[str] = ()
    models_denied: Sequence[str] = ()


@dataclass(slots=True, frozen=True)
class CacheView:
    """How well the prompt caches were hit by conversations that were known in one way."""

    turns: int
    input_tokens: int
    cached_tokens: int


@dataclass(slots=True, frozen=True)
class ProblemView:
    """A file of auth-dir that is not in use, and why; e-mail in its name masked."""

    file: str
    reason: str


@dataclass(slots=True, frozen=True)
class Health:
    """What the liveness routes need, cheap to ask for however large the pool is."""

    accounts: int
    active: int
    """Accounts that could take a request now."""
    phase: Literal["starting", "ready", "draining"] = "ready"
    upstreams: int = 0
    """HTTP upstreams that are switched on."""
    upstreams_active: int = 0
    """Those of them that could take a request now."""


@dataclass(slots=True)
class Summary:
    """What all accounts come to, also those that a page leaves out."""

    by_status: Counter[Status] = field(default_factory=Counter)
    in_flight: int = 0
    total_requests: int = 0
    total_errors: int = 0
    usage: TokensView = field(default_factory=TokensView)
    quota_checked: int = 0
    quota_valid: int = 0
    quota_invalid: int = 0
    quota_exhausted: int = 0

    @property
    def total(self) -> int:
        return self.by_status.total()


@dataclass(slots=True, frozen=True)
class Item:
    """What a round did to one account."""

    alias: str
    email: str | None
    """Masked."""
    success: bool
    reason: str | None = None


class Progress:
    """One round over the accounts, told to any number of listeners.

    The items are kept and listeners read on from where they are: whoever comes late hears it
    all, and one that reads slowly costs no more than its place in the list.
    """

    def __init__(self, total: int, started: float) -> None:
        self.total = total
        self.started = started
        self.ended: float | None = None
        """When the round was over, in the clock of `started`."""
        self.is_whole = False
        """Every account had its turn; set at the end."""
        self.items: list[Item] = []
        self._news = asyncio.Event()

    def add(self, item: Item) -> None:
        """Tell of one account."""
        self.items.append(item)
        self._wake()

    def finish(self, now: float, *, is_whole: bool) -> None:
        """Tell that nothing more comes."""
        self.ended = now
        self.is_whole = is_whole
        self._wake()

    def _wake(self) -> None:
        news, self._news = self._news, asyncio.Event()
        news.set()

    async def listen(self, silence: float = KEEP_ALIVE_SECONDS) -> AsyncIterator[Item | None]:
        """Yield every item, from the first one, until the end; None after *silence* seconds without one."""
        position = 0
        while True:
            # Taken before looking: what happens between the look and the wait is not missed.
            news = self._news
            while position < len(self.items):
                position += 1
                yield self.items[position - 1]
            if news is not self._news:
                continue
            if self.ended is not None:
                return
            try:
                await asyncio.wait_for(news.wait(), silence)
            except TimeoutError:
                yield None


Work = Callable[[], tuple[int, AsyncIterator[Item]]]
"""Start a round: how many accounts it has, and what becomes of each, as it becomes known."""


class Rounds:
    """Run one kind of round, one at a time: whoever asks while one runs joins it.

    The round is owned by *background*, so it goes on when whoever asked leaves.
    """

    def __init__(self, name: str, work: Work, background: Background, monotonic: Callable[[], float]) -> None:
        self._name = name
        self._work = work
        self._background = background
        self._monotonic = monotonic
        self._current: Progress | None = None

    def join(self) -> Progress:
        """Return the running round, else a new one."""
        if self._current is None or self._current.ended is not None:
            total, items = self._work()
            progress = self._current = Progress(total, self._monotonic())
            task = self._background.spawn(self._run(progress, items), name=f"round:{self._name}")
            # Also when the task is cancelled before its first step, where no `finally` runs.
            task.add_done_callback(lambda _: self._end(progress))
        return self._current

    async def _run(self, progress: Progress, items: AsyncIterator[Item]) -> None:
        async for item in items:
            progress.add(item)
        progress.is_whole = True

    def _end(self, progress: Progress) -> None:
        progress.finish(self._monotonic(), is_whole=progress.is_whole)
        failed = sum(not item.success for item in progress.items)
        logger.info(
            "round done name=%s total=%d failed=%d whole=%s",
            self._name, progress.total, failed, progress.is_whole,
        )  # fmt: skip


class Admin(Protocol):
    """What the handlers here need of the pool."""

    def health(self) -> Health: ...

    def accounts(self) -> Sequence[AccountView]:
        """Return a view of every account, in a stable order; one may be made only when it is looked at."""
        ...

    def summary(self) -> Summary:
        """Count and add up over all accounts."""
        ...

    def account(self, alias: str) -> AccountView | None: ...

    def problems(self) -> Sequence[ProblemView]: ...

    def cache(self) -> Mapping[str, CacheView]:
        """Return, by what conversations were known by, how well caches were hit."""
        ...

    def upstreams(self) -> list[JsonObject]:
        """Return what there is to say of each HTTP upstream; none where there are none."""
        ...

    async def act(self, alias: str, action: Action) -> Done:
        """Do what the owner wants to one account.

        Raises:
            RequestError: If there is no such account.
        """
        ...

    def refresh_all(self) -> Progress:
        """Refresh every account's tokens, or join the round that does."""
        ...

    def check_quota(self) -> Progress:
        """Ask for every account's quota, or join the round that does."""
        ...


async def _no_record(request_id: str) -> JsonObject | None:
    """Know no turn."""
    return None


def admin_handlers(
    admin: Admin,
    decisions: Decisions,
    monotonic: Callable[[], float],
    recorded: Callable[[str], Awaitable[JsonObject | None]] = _no_record,
) -> dict[str, Handler]:
    """Return the handlers of the owner's and the liveness routes, by the names in `app.ROUTES`.

    Args:
        recorded: Where the story of a turn is looked for that is remembered no longer.
    """
    started = monotonic()

    async def health(request: web.Request) -> web.Response:
        now = admin.health()
        can_serve = now.active or now.upstreams_active
        status = "ok" if can_serve else "degraded" if now.accounts or now.upstreams else "unavailable"
        return json_answer({
            "status": status,
            "accounts": now.accounts,
            "active": now.active,
            **(
                {"upstreams": now.upstreams, "upstreams_active": now.upstreams_active}
                if now.upstreams
                else {}
            ),
            "version": __version__,
        })

    async def livez(request: web.Request) -> web.Response:
        return json_answer({"status": "ok"})

    async def readyz(request: web.Request) -> web.Response:
        now = admin.health()
        has_targets = now.accounts or now.upstreams
        status: str = now.phase if now.phase != "ready" or has_targets else "no_accounts"
        return json_answer({"status": status}, 200 if status == "ready" else 503)

    async def stats(request: web.Request) -> web.Response:
        views = admin.accounts()
        shown, pagination = await _page(views, request.query)
        rest: JsonObject = {} if pagination is None else {"pagination": pagination}
        rest["problems"] = [asdict(problem) for problem in admin.problems()]
        rest["cache"] = {"by_source": {name: cache_json(view) for name, view in admin.cache().items()}}
        rest["decisions"] = decisions.last()
        upstreams = admin.upstreams()
        if upstreams:
            rest["upstreams"] = upstreams
        rest["version"] = __version__
        rest["uptime_seconds"] = round(monotonic() - started, 3)
        return _body(await _around(shown, {"summary": summary_json(admin.summary())}, rest))

    async def accounts(request: web.Request) -> web.Response:
        rest: JsonObject = {
            "problems": [asdict(problem) for problem in admin.problems()],
            "version": __version__,
            "uptime_seconds": round(monotonic() - started, 3),
        }
        return _body(await _around(admin.accounts(), {}, rest))

    async def why(request: web.Request) -> web.Response:
        request_id = request.match_info["request_id"]
        told = decisions.find(request_id) or await recorded(request_id)
        if told is None:
            raise RequestError(
                f"no finished turn with the id {request_id[:100]!r} is known: of those since the daemon started the "
                f"last {decisions.limit} are remembered, and as many as the settings say are on record. The id is an "
                "answer's x-request-id, and stands in the log; a request that was refused for its key is no turn",
                status=404,
                code="unknown_request",
            )
        return json_answer(told)

    async def refresh(request: web.Request) -> web.StreamResponse:
        return await _tell(request, admin.refresh_all(), admin, "refresh", monotonic)

    async def check_quota(request: web.Request) -> web.StreamResponse:
        return await _tell(request, admin.check_quota(), admin, "quota check", monotonic)

    handlers: dict[str, Callable[[web.Request], Awaitable[web.StreamResponse]]] = {
        "health": health,
        "livez": livez,
        "readyz": readyz,
        "stats": stats,
        "accounts": accounts,
        "why": why,
        "refresh": refresh,
        "check_quota": check_quota,
    }
    return handlers


def control_handlers(admin: Admin) -> dict[str, Handler]:
    """Return the handlers that change an account, by the names in `app.ACCOUNT_ROUTES`."""

    def handler(action: Action) -> Handler:
        async def act(request: web.Request) -> web.Response:
            return json_answer(await act_json(admin, request.match_info["alias"], action))

        return act

    return {f"account_{action}": handler(action) for action in ACTIONS}


async def act_json(admin: Admin, alias: str, action: Action) -> JsonObject:
    """Do *action* to one account, and render what became of it.

    Raises:
        RequestError: If there is no such account.
    """
    done = await admin.act(alias, action)
    view = admin.account(done.alias)
    return {
        "alias": done.alias,
        "action": action,
        "success": done.success,
        "message": done.message,
        "account": None if view is None else account_json(view),
    }


def accounts_json(views: Sequence[AccountView], problems: Sequence[ProblemView]) -> JsonObject:
    """Render all accounts, and the files that make none."""
    return {
        "accounts": [account_json(view) for view in views],
        "problems": [asdict(problem) for problem in problems],
    }


async def _around(views: Sequence[AccountView], before: JsonObject, after: JsonObject) -> bytes:
    """Render an object with the accounts among its members; of many in slices, so that other work gets its turn."""
    slices = [
        b",".join([dumps(account_json(view)) for view in some]) async for some in _slices(views)
    ]  # fmt: skip
    head, tail = dumps(before)[:-1], dumps(after)[1:]
    return b"".join([head, b"," if before else b"", b'"accounts":[', b",".join(slices), b"],", tail])


async def _slices(views: Sequence[AccountView]) -> AsyncIterator[Sequence[AccountView]]:
    for start in range(0, len(views), _SLICE):
        yield views[start : start + _SLICE]
        await asyncio.sleep(0)


def cache_json(view: CacheView) -> JsonObject:
    """Render how well caches were hit."""
    return {**asdict(view), "cached_share": _share(view.cached_tokens, view.input_tokens)}


def _share(part: int, whole: int) -> float | None:
    return round(part / whole, 4) if whole else None


def rfc3339(seconds: float | None) -> str | None:
    """Return a time as RFC 3339 in UTC; None for one that is unset or beyond any calendar."""
    if not seconds or seconds < 0:
        return None
    try:
        day, second = divmod(int(seconds), 86_400)
        minute, second = divmod(second, 60)
        return f"{_day(day)}T{minute // 60:02}:{minute % 60:02}:{second:02}Z"
    except (OverflowError, ValueError, OSError):
        return None


@functools.lru_cache(maxsize=512)
def _day(number: int) -> str:
    """Return the date of a day, counted from 1970; a page of accounts names few."""
    return datetime.fromtimestamp(number * 86_400, UTC).date().isoformat()


def account_json(view: AccountView) -> JsonObject:
    """Render one account of /stats."""
    return {
        "alias": view.alias,
        "email": view.email,
        "file_path": view.file,
        "status": view.status,
        "reason": view.reason,
        "disable_reason": view.reason if view.status in ("unavailable", "needs_login", "disabled") else None,
        "plan_type": view.plan_type,
        "account_id": view.account_id,
        "total_requests": view.total_requests,
        "total_errors": view.total_errors,
        "consecutive_failures": view.consecutive_failures,
        "in_flight": view.in_flight,
        "last_used_at": rfc3339(view.last_used_at),
        "last_refreshed_at": rfc3339(view.last_refreshed_at),
        "cooldown_until": rfc3339(view.cooldown_until),
        "quota_exhausted": view.quota_exhausted,
        "quota_resets_at": rfc3339(view.quota_resets_at),
        "token_expire": rfc3339(view.token_expire),
        "usage": _tokens_json(view.usage),
        "cached_share": _share(view.usage.cached_tokens, view.usage.input_tokens),
        "quota": None if view.quota is None else _quota_json(view.quota),
        "login": view.login,
        "login_reason": view.login_reason,
        "last_error": view.last_error,
        "priority": view.priority,
        "weight": view.weight,
        "max_concurrency": view.max_concurrency,
        "models_allowed": list(view.models_allowed),
        "models_denied": list(view.models_denied),
    }


def _tokens_json(usage: TokensView) -> JsonObject:
    # Written out, here and below: to ask the class for its fields takes longer than all the rest of a page.
    return {
        "total_completions": usage.total_completions,
        "input_tokens": usage.input_tokens,
        "cached_tokens": usage.cached_tokens,
        "output_tokens": usage.output_tokens,
        "reasoning_tokens": usage.reasoning_tokens,
        "total_tokens": usage.total_tokens,
    }


def _quota_json(quota: QuotaView) -> JsonObject:
    bought, spend = quota.credits, quota.spend
    return {
        "valid": quota.valid,
        "status_code": quota.status_code,
        "checked_at": rfc3339(quota.checked_at),
        "source": quota.source,
        "plan": quota.plan,
        "windows": [
            {
                "window": window.window,
                "limit": window.limit,
                "limit_name": window.limit_name,
                "minutes": window.minutes,
                "used_percent": window.used_percent,
                "resets_at": rfc3339(window.resets_at),
                "source": window.source,
                "age": _age(window.age),
            }
            for window in quota.windows
        ],
        "credits": None
        if bought is None
        else {
            "has_credits": bought.has_credits,
            "unlimited": bought.unlimited,
            "balance": bought.balance,
            "overage_limit_reached": bought.overage_limit_reached,
            "source": bought.source,
            "age": _age(bought.age),
        },
        "spend": None
        if spend is None
        else {
            "reached": spend.reached,
            "limit": spend.limit,
            "used": spend.used,
            "used_percent": spend.used_percent,
            "resets_at": rfc3339(spend.resets_at),
            "source": spend.source,
            "age": _age(spend.age),
        },
    }


def _age(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 1)


def summary_json(summary: Summary) -> JsonObject:
    """Render what all accounts come to."""
    usage = summary.usage
    return {
        "total": summary.total,
        **{status: summary.by_status[status] for status in STATUSES},
        "in_flight": summary.in_flight,
        "total_requests": summary.total_requests,
        "total_errors": summary.total_errors,
        "total_completions": usage.total_completions,
        "total_input_tokens": usage.input_tokens,
        "total_cache_read_tokens": usage.cached_tokens,
        "total_output_tokens": usage.output_tokens,
        "total_reasoning_tokens": usage.reasoning_tokens,
        "total_tokens": usage.total_tokens,
        "quota_checked": summary.quota_checked,
        "quota_valid": summary.quota_valid,
        "quota_invalid": summary.quota_invalid,
        "quota_exhausted": summary.quota_exhausted,
    }


async def _page(
    views: Sequence[AccountView], query: Mapping[str, str]
) -> tuple[Sequence[AccountView], JsonObject | None]:
    """Return the page that was asked for; all, and no pagination, when none was."""
    if not query.keys() & {"page", "page_size", "q"}:
        return views, None
    page = _number(query, "page", 1, 1_000_000)
    size = _number(query, "page_size", DEFAULT_PAGE_SIZE, MAX_PAGE_SIZE)
    wanted = query.get("q", "").strip()[:200]
    needle = wanted.lower()
    matching: Sequence[AccountView] = views
    if needle:
        matching = [
            view
            async for some in _slices(views)
            for view in some
            if any(
                needle in (text or "").lower() for text in (view.alias, view.email, view.file, view.status)
            )
        ]
    pages = max(1, -(-len(matching) // size))
    shown = matching[(page - 1) * size : page * size]
    return shown, {
        "page": page,
        "page_size": size,
        "total": len(views),
        "filtered_total": len(matching),
        "total_pages": pages,
        "returned": len(shown),
        "has_prev": page > 1,
        "has_next": page < pages,
        "query": wanted,
    }


def _number(query: Mapping[str, str], name: str, default: int, most: int) -> int:
    text = query.get(name, "")
    if not text:
        return default
    # ASCII digits only: `isdigit` alone also knows superscripts, which int refuses.
    if not (text.isascii() and text.isdigit() and len(text) <= 9 and 1 <= int(text) <= most):
        raise RequestError(f"{name} must be a whole number from 1 to {most}", param=name)
    return int(text)


def json_answer(value: JsonObject, status: int = 200) -> web.Response:
    """Return an answer for the owner, which nobody between may keep."""
    return _body(dumps(value), status)


def _body(body: bytes, status: int = 200) -> web.Response:
    return web.Response(
        status=status,
        body=body,
        content_type="application/json",
        headers={"Cache-Control": "no-store"},
    )


async def _tell(
    request: web.Request, progress: Progress, admin: Admin, what: str, monotonic: Callable[[], float]
) -> web.StreamResponse:
    """Stream *progress* as events until its end; the caller may leave, the round does not care."""
    response = web.StreamResponse(
        headers={
            "Content-Type": "text/event-stream",
            "Cache-Control": "no-cache",
            # nginx would hold the frames back until the round is over.
            "X-Accel-Buffering": "no",
        }
    )
    await response.prepare(request)
    current = good = 0
    try:
        async for item in progress.listen():
            if item is None:
                await response.write(b": keep-alive\n\n")
                continue
            current += 1
            good += item.success
            await response.write(frame("item", dumps(item_json(item, current, progress.total))))
        ended = progress.ended if progress.ended is not None else monotonic()
        await response.write(
            frame(
                "done",
                dumps({
                    "type": "done",
                    "message": _message(what, progress, current, good),
                    "total": progress.total,
                    "success_count": good,
                    "failed_count": current - good,
                    # What the pool still has: with us a failure takes no account away.
                    "remaining": admin.health().accounts,
                    "duration": f"{ended - progress.started:.3f}s",
                }),
            )
        )
        await response.write_eof()
    except ConnectionError:
        logger.debug("round goes on without its caller what=%s", what)
    return response


def item_json(item: Item, current: int, total: int) -> JsonObject:
    """Render what a round did to one account."""
    return {
        "type": "item",
        "email": item.email,
        "alias": item.alias,
        "success": item.success,
        "total": total,
        "current": current,
        "reason": item.reason,
    }


def _message(what: str, progress: Progress, current: int, good: int) -> str:
    if not progress.is_whole:
        return f"{what} stopped early: {current} of {progress.total} accounts done"
    if not progress.total:
        return "no accounts"
    return f"{what} done: {good} succeeded, {current - good} failed"
