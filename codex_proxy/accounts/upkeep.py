"""What accounts need without being asked: fresh tokens, known quota, known models, saved files.

A refresh token is used once. One exchange is in flight per account and process, one per
account and machine (a lock beside the file); it is never cancelled, and its answer is on disk
before it is used. What a failure means is the issuer's word, not ours: only a permanent one
costs the login, and even then a valid access token serves to its end.
"""

import asyncio
import contextlib
import dataclasses
import logging
import random
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from codex_proxy.accounts import oauth, store
from codex_proxy.accounts.account import Account, Backoff
from codex_proxy.accounts.pool import Pool
from codex_proxy.accounts.state import State
from codex_proxy.accounts.tokens import NewTokens, Secret
from codex_proxy.clock import Clock
from codex_proxy.config import Live
from codex_proxy.net import NetError, Outbound
from codex_proxy.protocol.wire import BadJson, loads
from codex_proxy.tasks import Background, Job, Slots

logger = logging.getLogger(__name__)

# How long an exchange may take; shutdown waits for it as long.
EXCHANGE_SECONDS = 30.0

# How often the folder is looked at; watching for notices comes on top of it, not instead.
FILES_SECONDS = 2.0

# How soon a save is tried again; ever more seldom while data-dir keeps what no file takes.
SAVE_SECONDS = 10.0
MAX_SAVE_SECONDS = 640.0

# A model list changes with releases, and an answer's etag tells of that at once.
MODELS_SECONDS = 6 * 3_600.0
MODELS_RETRY_SECONDS = 300.0

_REFRESH_BACKOFF = Backoff(30.0, 900.0)

# Another process that holds the lock needs at most an exchange's time.
_LOCK_WAIT_SECONDS = EXCHANGE_SECONDS + 5.0
_LOCK_POLL_SECONDS = 0.25

Reason = Literal["proactive_expiry", "unauthorized_recovery"]


@dataclasses.dataclass(slots=True, frozen=True)
class Result:
    """How one account fared in a round over many."""

    account: Account
    success: bool
    reason: str


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
        self._exchanges = Slots(lambda: live.current.refresh_concurrency)
        self._checks = Slots(lambda: live.current.health_check_concurrency)
        self._jitter: dict[str, float] = {}
        self._signature: store.Signature | None = None
        self._is_ending = False
        self._models_after: dict[str, float] = {}
        self._save_pause = SAVE_SECONDS

    def end(self) -> None:
        """Begin no further exchange; those whose request is under way go on."""
        self._is_ending = True

    # -- files ----------------------------------------------------------------------------

    @property
    def auth_dir(self) -> Path:
        """The folder of the credential files."""
        return self._live.current.auth_dir

    async def load(self) -> None:
        """Read all files; broken ones are named once."""
        signature, scan = await asyncio.to_thread(self._scan)
        known = {(p.path, p.reason) for p in self._pool.problems}
        self._pool.apply(scan)
        for problem in scan.problems:
            if (problem.path, problem.reason) not in known:
                logger.warning("account file problem file=%s", problem)
        # An account whose exchange was in flight was left alone: look again.
        busy = any(account.refreshing is not None for account in self._pool)
        self._signature = None if busy else signature

    def _scan(self) -> tuple[store.Signature, store.Scan]:
        settings = self._live.current
        # The signature first: a change during the scan is then seen by the next look.
        signature = store.signature(settings.auth_dir)
        return signature, store.scan(settings.auth_dir, settings.data_dir)

    async def follow_files(self) -> None:
        """Read the folder again when anything in it changed."""
        signature = await asyncio.to_thread(store.signature, self.auth_dir)
        if signature != self._signature:
            await self.load()

    async def save_unsaved(self) -> None:
        """Try again to write tokens that their files could not take."""
        self._save_pause = min(2.0 * self._save_pause, MAX_SAVE_SECONDS)
        unsaved = [account for account in self._pool if account.unsaved and account.refreshing is None]
        if not unsaved:
            self._save_pause = SAVE_SECONDS
        for account in unsaved:
            credential = account.credential
            try:
                saved = await asyncio.to_thread(
                    store.save,
                    credential,
                    credential.all_tokens(),
                    now=self._clock.now(),
                    data_dir=self._live.current.data_dir,
                )
            except store.NotSaved as exc:
                # In data-dir they are safe: a folder that nobody may write is somebody's choice.
                level = logging.DEBUG if exc.is_pending else logging.ERROR
                logger.log(level, "account tokens still not saved alias=%s reason=%s", account.alias, exc)
                if not exc.is_pending:
                    self._save_pause = SAVE_SECONDS
                continue
            self._save_pause = SAVE_SECONDS
            if account.credential is not credential:
                continue
            if saved.key != account.key:
                # The file is another account's by now; ours waits in data-dir.
                account.unsaved = False
                continue
            account.unsaved = False
            self._pool.adopt(account, saved)
            logger.info("account tokens saved alias=%s", account.alias)

    # -- tokens ---------------------------------------------------------------------------

    async def token(self, account: Account, *, refused: Secret | None = None) -> Secret | None:
        """Return an access token that can be sent, exchanging for one if need be; None if there is none.

        Args:
            refused: The access token that the backend has just answered with a 401.
        """
        if refused is not None and account.credential.access == refused:
            self._pool.reject(account)
        if account.access_is_valid(self._clock.now()):
            return account.credential.access
        if not account.can_refresh():
            return None
        resting = account.refresh_after > self._clock.now()
        if resting and account.refreshing is None:
            # The issuer could not be asked a moment ago; every caller asking again is a flood.
            return None
        await self.refresh(account, "unauthorized_recovery" if refused is not None else "proactive_expiry")
        return account.credential.access if account.access_is_valid(self._clock.now()) else None

    async def refresh(self, account: Account, reason: Reason) -> bool:
        """Exchange the account's refresh token; one exchange serves all who ask meanwhile.

        The exchange goes on when its callers leave: its answer exists only once.
        """
        return await asyncio.shield(self._start(account, reason))

    def _start(self, account: Account, reason: Reason) -> asyncio.Task[bool]:
        if account.refreshing is None:
            account.refreshing = self._background.spawn(
                self._exchange(account, reason), name=f"exchange:{account.alias}", critical=True
            )
        return account.refreshing

    async def _exchange(self, account: Account, reason: Reason) -> bool:
        try:
            async with self._exchanges:
                return not self._is_ending and await self._exchange_once(account, reason)
        finally:
            account.refreshing = None
            # Files were left alone meanwhile.
            self._signature = None

    async def _exchange_once(self, account: Account, reason: Reason) -> bool:
        if await self._reread(account) and account.access_is_valid(self._clock.now()):
            return True
        async with self._lock(account) as is_ours:
            # Whoever held the lock before us has written what it got.
            if await self._reread(account) and account.access_is_valid(self._clock.now()):
                return True
            if self._is_ending:
                return False
            if not is_ours:
                self._rest(account, "another process is exchanging it")
                return False
            if not account.can_refresh():
                return False
            return await self._ask_issuer(account, reason)

    async def _ask_issuer(self, account: Account, reason: Reason) -> bool:
        settings = self._live.current
        credential = account.credential
        await asyncio.to_thread(store.note_exchange, settings.data_dir, credential, now=self._clock.now())
        try:
            tokens = await oauth.refresh(
                self._outbound.fetch,
                issuer=settings.oauth_issuer,
                refresh_token=credential.refresh,
                reason=reason,
                originator=settings.originator,
                user_agent=settings.user_agent,
                timeout=EXCHANGE_SECONDS,
                proxy_url=account.proxy_url,
            )
        except oauth.RefreshFailed as exc:
            return await self._refresh_failed(account, exc)
        except BaseException:
            # Whatever else happens here, the token may be spent; the record stays and says so.
            self._rest(account, "exchange broke off")
            raise
        await self._keep(account, credential, tokens)
        await asyncio.to_thread(store.clear_exchange, settings.data_dir, credential)
        self._pool.refreshed(account)
        logger.info("account refreshed alias=%s reason=%s", account.alias, reason)
        is_valid = account.access_is_valid(self._clock.now())
        if not is_valid:
            # Due again at once, it would be exchanged over and over.
            self._rest(account, "the answer brought no access token that can be used")
        return is_valid

    async def _keep(self, account: Account, credential: store.Credential, tokens: NewTokens) -> None:
        """Write new tokens to disk, then use them. They are used even when no disk takes them."""
        try:
            saved = await asyncio.to_thread(
                store.save,
                credential,
                tokens,
                now=self._clock.now(),
                data_dir=self._live.current.data_dir,
            )
        except store.NotSaved as exc:
            logger.error(
                "account tokens not saved alias=%s reason=%s pending=%s", account.alias, exc, exc.is_pending
            )
            account.credential = exc.credential
            account.unsaved = not isinstance(exc, store.Vanished)
            self._save_pause = SAVE_SECONDS
            return
        if saved.key != account.key:
            # The file is another account's by now; the next look at the folder sorts that out.
            account.credential = credential.merged(tokens, now=self._clock.now())
            return
        account.unsaved = False
        account.credential = saved

    async def _refresh_failed(self, account: Account, exc: oauth.RefreshFailed) -> bool:
        data_dir = self._live.current.data_dir
        credential = account.credential
        account.last_error = f"refresh {exc.code or exc.kind.value}"
        was_interrupted = credential.interrupted is not None
        if exc.kind is not oauth.RefreshFailure.UNCERTAIN and not was_interrupted:
            await asyncio.to_thread(store.clear_exchange, data_dir, credential)
        match exc.kind:
            case oauth.RefreshFailure.PERMANENT:
                # Somebody else may have exchanged it: then the file has the answer.
                if await self._reread(account):
                    return account.access_is_valid(self._clock.now())
                reason = exc.code or "refused"
                if was_interrupted:
                    reason += " (an exchange was interrupted before its answer was saved)"
                self._pool.login_lost(account, reason)
            case oauth.RefreshFailure.PASSING | oauth.RefreshFailure.LIMITED | oauth.RefreshFailure.UNCERTAIN:
                self._rest(account, exc.code or exc.kind.value, exc.retry_after)
        return False

    def _rest(self, account: Account, reason: str, seconds: float | None = None) -> None:
        account.refresh_failures += 1
        if seconds is None:
            seconds = _REFRESH_BACKOFF.seconds(account.refresh_failures, self._rng.random())
        account.refresh_after = max(account.refresh_after, self._clock.now() + seconds)
        logger.warning(
            "account not refreshed alias=%s reason=%s again_in=%.0f", account.alias, reason, seconds
        )

    async def _reread(self, account: Account) -> bool:
        """Take over what the account's file says now; True when its tokens are other ones."""
        if account.removed:
            return False
        try:
            credential = await asyncio.to_thread(store.load, account.credential.path)
        except store.Unusable:
            return False
        if credential.key != account.key:
            return False
        if credential.refresh == account.credential.refresh:
            # A scan knows of interrupted exchanges, a look at the file alone does not.
            credential.interrupted = account.credential.interrupted
        return self._pool.adopt(account, credential)

    @contextlib.asynccontextmanager
    async def _lock(self, account: Account) -> AsyncIterator[bool]:
        """Hold the machine-wide right to exchange; False when another process kept it all the time."""
        deadline = self._clock.monotonic() + _LOCK_WAIT_SECONDS
        while True:
            with contextlib.ExitStack() as stack:
                held = await asyncio.to_thread(stack.enter_context, store.exchange_lock(account.credential))
                if held or self._is_ending or self._clock.monotonic() >= deadline:
                    yield held
                    return
            await self._clock.sleep(_LOCK_POLL_SECONDS)

    async def refresh_due(self) -> None:
        """Start the exchanges whose time has come; they run side by side."""
        now = self._clock.now()
        for account in self._pool.accounts():
            due = self._due(account)
            if due is not None and due <= now and account.refreshing is None:
                _ = self._start(account, "proactive_expiry")

    def seconds_to_next_refresh(self) -> float:
        """Return how long the timer may sleep; refresh-interval at most."""
        now = self._clock.now()
        longest = self._live.current.refresh_interval
        times = [due for account in self._pool if (due := self._due(account)) is not None]
        # Asked again each second of the pause (`tasks.Job`), so a new account need not wait.
        return min(longest, max(0.2, min(times, default=now + longest) - now))

    def _due(self, account: Account) -> float | None:
        if account.state is State.DISABLED:
            return None
        jitter = self._jitter.setdefault(account.key, self._rng.random())
        return account.refresh_due(jitter)

    # -- questions to the backend ---------------------------------------------------------

    async def check_usage(self, account: Account) -> Result:
        """Ask the usage endpoint; costs no quota and proves that the login works."""
        now = self._clock.now()
        try:
            status, body = await self._ask(account, f"{self._chatgpt_base()}/wham/usage")
        except NetError as exc:
            return Result(account, False, exc.kind.value)
        account.quota.usage_at = now
        account.quota.usage_status = status
        self._judge(account, status)
        if status is None:
            return Result(account, False, account.login_lost or "no usable token")
        if status != 200 or not isinstance(body, Mapping):
            return Result(account, False, f"status {status}")
        account.quota.read_usage(body, self._clock.now())
        return Result(account, True, "")

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
            if account.state not in (State.DISABLED, State.NEEDS_LOGIN)
            and (account.quota.seen_at is None or now - account.quota.seen_at >= interval * 0.9)
        ]
        async for result in self.each_usage(stale):
            if not result.success:
                logger.debug("usage check failed alias=%s reason=%s", result.account.alias, result.reason)

    async def fetch_models(self) -> None:
        """Fetch the model lists that are missing, old, or announced to have changed."""
        now = self._clock.now()
        wanting: list[Account] = []
        for account in self._pool.accounts():
            if account.state in (State.DISABLED, State.NEEDS_LOGIN):
                continue
            if self._models_after.get(account.key, 0.0) > now:
                continue
            if account.models_at is not None and now - account.models_at < MODELS_SECONDS:
                continue
            self._models_after[account.key] = now + MODELS_RETRY_SECONDS
            wanting.append(account)

        async def one(account: Account) -> Result:
            async with self._checks:
                return await self._fetch_models(account)

        async for result in self._each(wanting, one):
            if not result.success:
                logger.debug("model list not fetched alias=%s reason=%s", result.account.alias, result.reason)

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
            async with self._checks:
                return await self.check_usage(account)

        async for result in self._each(accounts, one):
            yield result

    async def each_refresh(self, accounts: Iterable[Account]) -> AsyncIterator[Result]:
        """Exchange the tokens of *accounts*, spread over time, in the order they finish."""

        async def one(account: Account) -> Result:
            # The issuer sees logins that act together as one actor; a person would not mind waiting.
            await self._clock.sleep(self._rng.random() * 0.5)
            if account.state is State.DISABLED:
                return Result(account, False, "disabled")
            if not account.credential.refresh:
                return Result(account, False, "no refresh token")
            # Asked for by its owner: a token that was refused before gets another chance.
            account.login_lost = ""
            success = await self.refresh(account, "proactive_expiry")
            return Result(account, success, "" if success else (account.login_lost or account.last_error))

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
        return [
            Job("files", lambda: FILES_SECONDS, self.follow_files),
            Job("refresh", self.seconds_to_next_refresh, self.refresh_due, at_once=True),
            Job("saves", lambda: self._save_pause, self.save_unsaved),
            Job("usage", lambda: self._live.current.health_check_interval, self.check_all, at_once=True),
            Job("models", lambda: 30.0, self.fetch_models, at_once=True),
        ]
