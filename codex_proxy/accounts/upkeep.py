"""What accounts need without being asked: fresh tokens, known quota, known models, saved files.

`Keeper` is all that runs by itself for the accounts. How tokens are exchanged is told in
`exchange`, how the folder is followed in `watching`; here are the questions to the backend
(usage, models, a sign of life), and the rounds over many accounts.
"""

import asyncio
import dataclasses
import logging
import math
import random
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Mapping
from pathlib import Path
from typing import Any

from codex_proxy.accounts.account import Account, Backoff, Cause
from codex_proxy.accounts.dues import Agenda
from codex_proxy.accounts.exchange import Exchanges, Reason, of_the_pool
from codex_proxy.accounts.pending import Pending
from codex_proxy.accounts.pool import Pool
from codex_proxy.accounts.quota import MAIN_FAMILY, Quota, limits_told
from codex_proxy.accounts.state import State
from codex_proxy.accounts.tokens import Secret
from codex_proxy.accounts.watching import AccountFiles
from codex_proxy.clock import Clock
from codex_proxy.config import Live
from codex_proxy.net import NetError, Outbound
from codex_proxy.protocol.wire import BadJson, loads
from codex_proxy.tasks import Background, Job, Slots

logger = logging.getLogger(__name__)

# How long an exchange may take; shutdown waits for it as long.
EXCHANGE_SECONDS = 30.0

# A model list changes with releases, and an answer's etag tells of that at once.
MODELS_SECONDS = 6 * 3_600.0
MODELS_RETRY_SECONDS = 300.0

# How soon an account that rests for a limit, or is not entitled, is asked whether it still has
# to, and how soon one whose window has started again is asked for its numbers: spread, so that accounts that
# met their limit together do not knock together.
_PROBE_SECONDS = (180.0, 300.0)
_RESET_SECONDS = (5.0, 60.0)
# One that has just come, of which nothing is known.
_NEW_SECONDS = (0.5, 3.0)

# How soon the same answer is believed again that a not entitled account may go on, after the
# request that tried it was refused: a wrong one costs that request a failover each time.
_BELIEVED = Backoff(180.0, 1_800.0)
# How long the timer of these questions sleeps at most.
_PROBE_LOOK_SECONDS = 30.0

_KEEPALIVE_TIMEOUT = 10.0
# A pool may have a proxy per account; more than these are warmed by its requests alone.
_MAX_WAYS = 64
_WAYS_AT_A_TIME = 8

_AT_REST = (State.DISABLED, State.NEEDS_LOGIN)


@dataclasses.dataclass(slots=True, frozen=True)
class Result:
    """How one account fared in a round over many."""

    account: Account
    success: bool
    reason: str


@dataclasses.dataclass(slots=True, frozen=True)
class _Probe:
    """When an account is asked next, and for which of the reasons, told by their pauses."""

    between: tuple[float, float]
    at: float


class Keeper:
    """Keep accounts alive."""

    def __init__(
        self,
        pool: Pool,
        *,
        live: Live,
        clock: Clock,
        background: Background,
        outbound: Outbound,
        rng: random.Random | None = None,
    ) -> None:
        self._pool = pool
        self._live = live
        self._clock = clock
        self._background = background
        self._outbound = outbound
        self._rng = rng if rng is not None else random.Random()
        self._checks = Slots(lambda: live.current.health_check_concurrency)
        self._models_after: dict[str, float] = {}
        self._model_lists = Agenda(pool, self._model_list_at, clock.now)
        self._probes: dict[str, _Probe] = {}
        self._questions = Agenda(pool, self._question_at, clock.now)
        self._asking: set[str] = set()
        """The accounts whose usage is being asked for, or waits for its turn."""
        self._believe_after: dict[str, float] = {}
        """When an answer is believed again that was believed in vain, by account."""
        self.files = AccountFiles(pool, live=live, clock=clock)
        self.exchanges = Exchanges(
            pool,
            live=live,
            clock=clock,
            background=background,
            outbound=outbound,
            rng=self._rng,
            seconds=lambda: EXCHANGE_SECONDS,
            on_end=self.files.look_again,
        )

    def end(self) -> None:
        """Begin no further exchange; those whose request is under way go on."""
        self.exchanges.end()

    @property
    def auth_dir(self) -> Path:
        """The folder of the credential files."""
        return self.files.folder

    async def load(self) -> None:
        """Read the files that changed, and make the pool what they say."""
        await self.files.load()

    async def follow_files(self) -> None:
        """Make the pool what the files say, if any of them changed."""
        await self.files.follow()

    # -- tokens ---------------------------------------------------------------------------

    async def token(self, account: Account, *, refused: Secret | None = None) -> Secret | None:
        """Return an access token that can be sent, exchanging for one if need be; None if there is none.

        Args:
            refused: The access token that the backend has just answered with a 401.
        """
        return await self.exchanges.token(account, refused=refused)

    async def refresh(self, account: Account, reason: Reason) -> bool:
        """Exchange the account's refresh token; one exchange serves all who ask meanwhile."""
        return await self.exchanges.refresh(account, reason)

    async def refresh_one(self, account: Account) -> Result:
        """Exchange the account's refresh token because its owner wants it, also while it is disabled."""
        if not account.credential.refresh:
            return Result(account, False, "no refresh token")
        # A token that was refused before gets another chance.
        lost, account.login_lost = account.login_lost, ""
        account.touch()
        success = await self.refresh(account, "proactive_expiry")
        if success:
            return Result(account, True, "")
        # An issuer that could not be asked has not changed what it said before.
        account.login_lost = account.login_lost or lost
        account.touch()
        return Result(account, False, account.login_lost or account.last_error or "see the log")

    async def refresh_due(self) -> None:
        """Start the exchanges whose time has come; they run side by side."""
        await self.exchanges.refresh_due()

    async def save_unsaved(self) -> None:
        """Try again to write tokens that their files could not take."""
        await self.exchanges.save_unsaved()

    async def only_here(self) -> list[str]:
        """Return the accounts whose newest tokens are on no disk, by alias: they end with this process."""
        unsaved = [account for account in self._pool if account.unsaved]
        if not unsaved:
            return []
        waiting = (await asyncio.to_thread(Pending.load, self._live.current.data_dir)).by_new
        return [account.alias for account in unsaved if account.credential.refresh.digest() not in waiting]

    # -- questions to the backend ---------------------------------------------------------

    async def check_usage(self, account: Account) -> Result:
        """Ask the usage endpoint; costs no quota and proves that the login works."""
        now = self._clock.now()
        before = _Rests(account, now)
        try:
            status, body = await self._ask(account, f"{self._chatgpt_base()}/wham/usage")
        except NetError as exc:
            return Result(account, False, exc.kind.value)
        account.quota.usage_at = now
        account.quota.usage_status = status
        self._judge(account, status)
        if status is None:
            disabled = "disabled" if account.credential.disabled else ""
            return Result(account, False, account.login_lost or disabled or "no usable token")
        if status != 200 or not isinstance(body, Mapping):
            return Result(account, False, f"status {status}")
        if account.quota.read_usage(body, self._clock.now(), asked=now):
            self._pool.plan_changed(account)
        self._relieve(account, body, before)
        return Result(account, True, "")

    def _relieve(self, account: Account, usage: Mapping[str, Any], before: "_Rests") -> None:
        """Let an account go on where the usage endpoint has just said plainly that it may.

        What was met while the question was on its way is newer than the answer, and stays.
        """
        now = self._clock.now()
        told = limits_told(usage)
        may_go_on = _may_go_on(account, told, MAIN_FAMILY, now)
        if may_go_on and before.limit is not None and account.holds.get(Cause.LIMIT) == before.limit:
            self._pool.relieve(account)
        for family, until in before.families.items():
            if account.family_holds.get(family) == until and _may_go_on(account, told, family, now):
                self._pool.relieve(account, family)
        if may_go_on and before.unavailable > now and account.unavailable_until == before.unavailable:
            self._entitle(account, before, now)

    def _entitle(self, account: Account, before: "_Rests", now: float) -> None:
        """Let one request find out whether the backend serves an account again, whose usage says that it may.

        That cannot be known: the endpoint may have said the same when a request was refused. What it
        has not said before is believed at once.
        """
        self._believe_after = of_the_pool(self._believe_after, self._pool)
        is_news = _purse(account.quota, now) != before.purse
        if is_news or now >= self._believe_after.get(account.key, 0.0):
            pause = _BELIEVED.seconds(account.unavailable_count, self._rng.random())
            self._believe_after[account.key] = now + pause
            self._pool.entitle(account)

    def _judge(self, account: Account, status: int | None) -> None:
        """Take a login for lost when fresh tokens are refused again and again; nothing else counts.

        A 403 comes from the way there as well, a 429 says nothing of a login, and a backend
        that is down refuses everybody.
        """
        if status != 401:
            if status == 200:
                account.check_failures = 0
            return
        if not account.access_is_valid(self._clock.now()):
            # The refused token could not be exchanged, which may be the issuer's trouble.
            return
        account.check_failures += 1
        if account.check_failures >= self._live.current.health_check_max_failures:
            # A new login is judged anew.
            account.check_failures = 0
            self._pool.reject(account)
            self._pool.login_lost(account, "its tokens are refused, new ones too")

    async def _ask(self, account: Account, url: str) -> tuple[int | None, Any]:
        """GET with the account's own token; a 401 is answered by one exchange. None: no token."""
        settings = self._live.current
        refused: Secret | None = None
        while True:
            token = await self.token(account, refused=refused)
            if token is None:
                return (None if refused is None else 401), None
            reply = await self._outbound.fetch(
                "GET",
                url,
                headers={
                    **account.headers(token),
                    "originator": settings.originator,
                    "user-agent": settings.user_agent,
                    "accept": "application/json",
                },
                timeout=20.0,
                proxy_url=account.proxy_url,
            )
            if reply.status != 401 or refused is not None:
                break
            refused = token
        try:
            return reply.status, loads(reply.body)
        except BadJson:
            return reply.status, None

    def _chatgpt_base(self) -> str:
        """The backend's root: the usage endpoint lies beside `/codex`, not below it."""
        return self._live.current.base_url.removesuffix("/codex")

    async def check_all(self) -> None:
        """Ask for the usage of every account whose numbers are older than the interval."""
        now = self._clock.now()
        interval = self._live.current.health_check_interval
        stale = [
            account
            for account in self._pool.accounts()
            if account.state not in _AT_REST
            and (account.quota.seen_at is None or now - account.quota.seen_at >= interval * 0.9)
        ]
        async for result in self.each_usage(stale):
            if not result.success:
                logger.debug("usage check failed alias=%s reason=%s", result.account.alias, result.reason)

    async def probe_due(self) -> None:
        """Ask for the usage of those that rest for a limit, are not entitled or new, or whose window has started again.

        So a reset that came early, a new plan and bought credits count within minutes. No
        answer makes a cooldown longer, and only one that says so plainly ends it.
        """
        due = sorted(self._due_questions(self._clock.now()), key=lambda account: account.place)
        async for result in self.each_usage(due):
            if not result.success:
                logger.debug("usage probe failed alias=%s reason=%s", result.account.alias, result.reason)

    def seconds_to_next_probe(self) -> float:
        """Return how long the timer may sleep; 0 when no questions are asked by themselves."""
        if self._live.current.health_check_interval <= 0:
            return 0.0
        return min(_PROBE_LOOK_SECONDS, max(1.0, self._questions.first() - self._clock.now()))

    def _due_questions(self, now: float) -> list[Account]:
        """Return the accounts whose time has come, and give each its next one."""
        found: list[Account] = []
        # Again, because for some it is only the time at which a reason begins or ends.
        while due := list(self._questions.due(now)):
            for account in due:
                self._question_at(account)
                probe = self._probes.get(account.key)
                if probe is not None and probe.at <= now:
                    next_at = now + self._spread(_PROBE_SECONDS)
                    self._probes[account.key] = dataclasses.replace(probe, at=next_at)
                    found.append(account)
        return found

    def _question_at(self, account: Account) -> float | None:
        """Keep a time for the next question about an account that has a reason for one.

        Returns that time, or an earlier one at which the reason may be another.
        """
        now, key = self._clock.now(), account.key
        between = self._reason_for_question(account, now)
        if between is None:
            self._probes.pop(key, None)
            return _next_reason(account, now)
        known = self._probes.get(key)
        if known is None or known.between != between:
            fresh = now + self._spread(between)
            known = self._probes[key] = _Probe(between, fresh if known is None else min(fresh, known.at))
        return min(known.at, _next_reason(account, now))

    def _reason_for_question(self, account: Account, now: float) -> tuple[float, float] | None:
        """Return how soon to ask about an account, None where there is nothing to ask."""
        if account.removed or account.state in _AT_REST or account.key in self._asking:
            return None
        if (
            account.holds.get(Cause.LIMIT, now) > now
            or account.unavailable_until > now
            or any(until > now for until in account.family_holds.values())
        ):
            return _PROBE_SECONDS
        if _has_passed_reset(account, now):
            return _RESET_SECONDS
        if account.quota.seen_at is None and account.quota.usage_at is None:
            return _NEW_SECONDS
        return None

    def _spread(self, between: tuple[float, float]) -> float:
        first, last = between
        return first + (last - first) * self._rng.random()

    async def keep_connections(self) -> None:
        """Let each way to the backend carry something, so that its connection stays open.

        The next request then waits neither for a name nor for a proxy nor for TLS. No token goes
        with it, and what is answered does not matter.
        """
        settings = self._live.current
        ways = {account.proxy_url for account in self._pool if account.state not in _AT_REST}
        slots = Slots(lambda: _WAYS_AT_A_TIME)

        async def one(proxy_url: str | None) -> None:
            async with slots:
                try:
                    reply = await self._outbound.fetch(
                        "HEAD",
                        self._chatgpt_base(),
                        headers={"user-agent": settings.user_agent},
                        timeout=_KEEPALIVE_TIMEOUT,
                        proxy_url=proxy_url,
                    )
                except NetError as exc:
                    logger.debug("connection not kept warm reason=%s", exc.kind.value)
                else:
                    logger.debug("connection kept warm status=%d", reply.status)

        some = sorted(ways, key=lambda way: way or "")[:_MAX_WAYS]
        tasks = [self._background.spawn(one(way), name="keepalive") for way in some]
        if tasks:
            await asyncio.wait(tasks)

    async def fetch_models(self) -> None:
        """Fetch the model lists that are missing, old, or announced to have changed."""
        now = self._clock.now()
        self._models_after = of_the_pool(self._models_after, self._pool)
        wanting = sorted(self._model_lists.due(now), key=lambda account: account.place)
        for account in wanting:
            self._models_after[account.key] = now + MODELS_RETRY_SECONDS

        async def one(account: Account) -> Result:
            async with self._checks:
                return await self._fetch_models(account)

        async for result in self._each(wanting, one):
            if not result.success:
                logger.debug("model list not fetched alias=%s reason=%s", result.account.alias, result.reason)

    def _model_list_at(self, account: Account) -> float | None:
        """Return when an account's model list is to be fetched."""
        if account.removed or account.state in _AT_REST:
            return None
        old_at = account.models_at + MODELS_SECONDS if account.models_at is not None else 0.0
        return max(old_at, self._models_after.get(account.key, 0.0))

    async def _fetch_models(self, account: Account) -> Result:
        settings = self._live.current
        url = f"{settings.base_url}/models?client_version={settings.models_client_version}"
        try:
            status, body = await self._ask(account, url)
        except NetError as exc:
            return Result(account, False, exc.kind.value)
        objects = body.get("models") if isinstance(body, Mapping) else None
        if status != 200 or not isinstance(objects, list):
            return Result(account, False, f"status {status}")
        self._pool.set_models(account, [o for o in objects if isinstance(o, dict)])
        return Result(account, True, "")

    # -- rounds over many -----------------------------------------------------------------

    async def each_usage(self, accounts: Iterable[Account]) -> AsyncIterator[Result]:
        """Ask for the usage of *accounts*, several at a time, in the order they finish."""

        async def one(account: Account) -> Result:
            try:
                if account.state is State.DISABLED:
                    # No questions with its token, unless it is asked for by name.
                    return Result(account, False, "disabled")
                async with self._checks:
                    return await self.check_usage(account)
            finally:
                self._asking.discard(account.key)
                self._questions.again([account])

        asked = list(accounts)
        self._asking.update(account.key for account in asked)
        self._questions.again(asked)
        async for result in self._each(asked, one):
            yield result

    async def each_refresh(self, accounts: Iterable[Account]) -> AsyncIterator[Result]:
        """Exchange the tokens of *accounts*, spread over time, in the order they finish."""

        async def one(account: Account) -> Result:
            # The issuer sees logins that act together as one actor; a person would not mind waiting.
            await self._clock.sleep(self._rng.random() * 0.5)
            if account.state is State.DISABLED:
                return Result(account, False, "disabled")
            return await self.refresh_one(account)

        async for result in self._each(accounts, one):
            yield result

    async def _each(
        self, accounts: Iterable[Account], one: Callable[[Account], Coroutine[Any, Any, Result]]
    ) -> AsyncIterator[Result]:
        tasks = {self._background.spawn(one(account), name=f"round:{account.alias}") for account in accounts}
        for task in asyncio.as_completed(tasks):
            yield await task

    def jobs(self) -> list[Job]:
        """Return what runs by itself."""
        files, exchanges = self.files, self.exchanges
        return [
            Job("files", files.seconds_to_next_look, self.follow_files),
            Job("watch", files.seconds_to_next_watch, files.watch, at_once=True),
            Job("refresh", exchanges.seconds_to_next, self.refresh_due, at_once=True),
            Job("saves", lambda: exchanges.save_pause, self.save_unsaved),
            Job("usage", lambda: self._live.current.health_check_interval, self.check_all, at_once=True),
            Job("probes", self.seconds_to_next_probe, self.probe_due),
            Job("models", lambda: 30.0, self.fetch_models, at_once=True),
            Job("keepalive", lambda: self._live.current.keepalive_interval, self.keep_connections),
        ]


class _Rests:
    """What an account rests for when its usage is asked for."""

    __slots__ = ("families", "limit", "purse", "unavailable")

    def __init__(self, account: Account, now: float) -> None:
        self.limit = account.holds.get(Cause.LIMIT)
        self.families = dict(account.family_holds)
        self.unavailable = account.unavailable_until
        self.purse = _purse(account.quota, now)


def _purse(quota: Quota, now: float) -> tuple[object, ...]:
    """Return what an answer tells of an account that somebody has paid for, or whose limits are others now."""
    bought, spend = quota.credits, quota.spend
    stops = spend is not None and spend.stops(now)
    return (bought.pay, bought.balance, quota.is_spent(now), stops)


def _may_go_on(
    account: Account, told: Mapping[str, list[Mapping[str, Any]]], family: str, now: float
) -> bool:
    """Tell whether the usage endpoint has just said plainly that an account has quota for *family*."""
    limits = told.get(family)
    if not limits or any(
        limit.get("allowed") is not True or limit.get("limit_reached") is True for limit in limits
    ):
        return False
    spend = account.quota.spend
    return not account.quota.is_spent(now, family) and not (spend is not None and spend.stops(now))


def _has_passed_reset(account: Account, now: float) -> bool:
    """Tell whether a window of the main limit has started again since we last heard of it."""
    family = account.quota.families.get(MAIN_FAMILY)
    return family is not None and any(window.is_over(now) for _, window in family.windows())


def _next_reason(account: Account, now: float) -> float:
    """Return when time alone gives a reason for a question about an account, or takes one away."""
    moments = [account.holds.get(Cause.LIMIT, now), account.unavailable_until, *account.family_holds.values()]
    family = account.quota.families.get(MAIN_FAMILY)
    if family is not None:
        moments += [window.ends_at for _, window in family.windows()]
    return min((moment for moment in moments if moment > now), default=math.inf)
