"""Fresh tokens for accounts: when one is exchanged, and what becomes of the answer.

A refresh token is used once. One exchange is in flight per account and process, one per
account and machine (a lock beside the file); it is never cancelled, and its answer is on disk
before it is used. What a failure means is the issuer's word, not ours: only a permanent one
costs the login, and even then a valid access token serves to its end.

A token whose answer was lost may be spent and may be not. It is tried once more; only then is
the login lost, and the reason says so.
"""

import asyncio
import contextlib
import dataclasses
import logging
import random
from collections import Counter
from collections.abc import AsyncIterator, Callable
from typing import Literal

from codex_proxy.accounts import oauth, store
from codex_proxy.accounts.account import Account, Backoff
from codex_proxy.accounts.dues import Agenda
from codex_proxy.accounts.pool import Pool
from codex_proxy.accounts.state import State
from codex_proxy.accounts.tokens import NewTokens, Secret
from codex_proxy.clock import Clock
from codex_proxy.config import Live
from codex_proxy.net import Outbound
from codex_proxy.tasks import Background, Slots

logger = logging.getLogger(__name__)

# How soon a save is tried again; ever more seldom while data-dir keeps what no file takes.
SAVE_SECONDS = 10.0
MAX_SAVE_SECONDS = 640.0

# How soon the file of an account is looked for again that has none now.
_GONE_SECONDS = 30.0

_REFRESH_BACKOFF = Backoff(30.0, 900.0)

_LOCK_POLL_SECONDS = 0.25
# What the holder of a lock needs beside its exchange.
_LOCK_GRACE_SECONDS = 5.0

# The timer looks every fifth of a second while something is due: 25 exchanges a second.
_STARTS_AT_ONCE = 5

Reason = Literal["proactive_expiry", "unauthorized_recovery"]

_OK, _BROKEN_OFF = "ok", "broken_off"
RESULTS = (_OK, *(kind.value for kind in oauth.RefreshFailure), _BROKEN_OFF)
"""What may come of an exchange, in a word."""

_INTERRUPTED = "an exchange was interrupted before its answer was saved"

# What a look at the file of an account found.
_Found = Literal["same", "other tokens", "gone"]


def of_the_pool(kept: dict[str, float], pool: Pool) -> dict[str, float]:
    """Return what is kept by account, without those that have left when they are as many as there are."""
    if len(kept) <= 2 * len(pool):
        return kept
    return {key: value for key, value in kept.items() if pool.get(key) is not None}


class Exchanges:
    """Exchange refresh tokens, each of them once.

    Args:
        seconds: How long one may take.
        on_end: Called when one is over, because the account's file was left alone meanwhile.
    """

    def __init__(
        self,
        pool: Pool,
        *,
        live: Live,
        clock: Clock,
        background: Background,
        outbound: Outbound,
        rng: random.Random,
        seconds: Callable[[], float],
        on_end: Callable[[], None],
    ) -> None:
        self._pool = pool
        self._live = live
        self._clock = clock
        self._background = background
        self._outbound = outbound
        self._rng = rng
        self._seconds = seconds
        self._on_end = on_end
        self._slots = Slots(lambda: live.current.refresh_concurrency)
        self._jitter: dict[str, float] = {}
        self._agenda = Agenda(pool, self.due, clock.now)
        self._is_ending = False
        self.save_pause = SAVE_SECONDS
        """How long to wait with the next try to save what could not be saved."""
        self.results = Counter(dict.fromkeys(RESULTS, 0))
        """How many exchanges there were, by what came of them."""

    def end(self) -> None:
        """Begin no further exchange; those whose request is under way go on."""
        self._is_ending = True

    # -- who asks -------------------------------------------------------------------------

    async def token(self, account: Account, *, refused: Secret | None = None) -> Secret | None:
        """Return an access token that can be sent, exchanging for one if need be; None if there is none.

        Args:
            refused: The access token that the backend has just answered with a 401.
        """
        if refused is not None and account.credential.access == refused:
            self._pool.reject(account)
        if account.access_is_valid(self._clock.now()):
            return account.credential.access
        if not account.can_refresh() or account.removed or account.credential.disabled:
            # What its owner switched off or took away is spent on nobody's account.
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

    async def refresh_due(self) -> None:
        """Start the exchanges whose time has come, a few at each look; they run side by side.

        After a long rest all are due at once, and logins that act together look like one actor to
        the issuer. A request that needs one of them does not wait for its turn here.
        """
        room = _STARTS_AT_ONCE
        for account in self._agenda.due(self._clock.now()):
            if account.refreshing is None:
                _ = self._start(account, "proactive_expiry")
                room -= 1
                if not room:
                    return

    def seconds_to_next(self) -> float:
        """Return how long the timer may sleep; refresh-interval at most."""
        now = self._clock.now()
        self._jitter = of_the_pool(self._jitter, self._pool)
        # Asked again each second of the pause (`tasks.Job`), so a new account need not wait.
        return min(self._live.current.refresh_interval, max(0.2, self._agenda.first() - now))

    def due(self, account: Account) -> float | None:
        """Return when the account's token is to be exchanged by itself, if ever."""
        if account.removed or account.state is State.DISABLED:
            return None
        jitter = self._jitter.setdefault(account.key, self._rng.random())
        return account.refresh_due(jitter)

    # -- one exchange ---------------------------------------------------------------------

    def _start(self, account: Account, reason: Reason) -> asyncio.Task[bool]:
        if account.refreshing is None:
            account.refreshing = self._background.spawn(
                self._exchange(account, reason), name=f"exchange:{account.alias}", critical=True
            )
        return account.refreshing

    async def _exchange(self, account: Account, reason: Reason) -> bool:
        try:
            async with self._slots:
                return not self._is_ending and await self._exchange_once(account, reason)
        finally:
            account.refreshing = None
            account.touch()
            self._on_end()

    async def _exchange_once(self, account: Account, reason: Reason) -> bool:
        # Others may change them while we wait: whoever looks at the folder takes them over too.
        before = account.credential
        found = await self._reread(account, before)
        if found == "same":
            async with self._lock(account) as is_ours:
                # Whoever held the lock before us has written what it got.
                found = await self._reread(account, before)
                if found == "same":
                    if self._is_ending or not account.can_refresh():
                        return False
                    if not is_ours:
                        self._rest(account, "another process is exchanging it")
                        return False
                    return await self._ask_issuer(account, reason)
        if found == "gone":
            # Taken away: whoever has it now would find its token spent.
            account.refresh_after = max(account.refresh_after, self._clock.now() + _GONE_SECONDS)
            account.last_error = "its file is not there"
            logger.info("account not refreshed alias=%s reason=its file is not there", account.alias)
            return False
        if account.access_is_valid(self._clock.now()):
            return True
        # Other tokens, and those are over as well.
        return await self._exchange_once(account, reason)

    async def _ask_issuer(self, account: Account, reason: Reason) -> bool:
        settings = self._live.current
        credential, began = account.credential, self._clock.now()
        await asyncio.to_thread(store.note_exchange, settings.data_dir, credential, now=began)
        try:
            tokens = await oauth.refresh(
                self._outbound.fetch,
                issuer=settings.oauth_issuer,
                refresh_token=credential.refresh,
                reason=reason,
                originator=settings.originator,
                user_agent=settings.user_agent,
                timeout=self._seconds(),
                proxy_url=account.proxy_url,
            )
        except oauth.RefreshFailed as exc:
            self.results[exc.kind.value] += 1
            return await self._failed(account, credential, exc, began)
        except BaseException:
            self.results[_BROKEN_OFF] += 1
            # Whatever else happens here, the token may be spent; the record stays and says so.
            self._interrupted(account, credential, began)
            self._rest(account, "exchange broke off")
            raise
        self.results[_OK] += 1
        is_kept = await self._keep(account, credential, tokens)
        account.touch()
        if is_kept:
            await asyncio.to_thread(store.clear_exchange, settings.data_dir, credential)
        self._pool.refreshed(account)
        logger.info("account refreshed alias=%s reason=%s", account.alias, reason)
        is_valid = account.access_is_valid(self._clock.now())
        if not is_valid:
            # Due again at once, it would be exchanged over and over.
            self._rest(account, "the answer brought no access token that can be used")
        return is_valid

    async def _keep(self, account: Account, credential: store.Credential, tokens: NewTokens) -> bool:
        """Write new tokens to disk, then use them; False when no disk took them. They are used all the same."""
        try:
            saved = await self._save(credential, tokens)
        except store.NotSaved as exc:
            logger.error(
                "account tokens not saved alias=%s reason=%s pending=%s", account.alias, exc, exc.is_pending
            )
            account.credential = exc.credential
            account.unsaved = not isinstance(exc, store.Vanished)
            self.save_pause = SAVE_SECONDS
            return exc.is_pending or tokens.refresh is None
        except Exception:
            # A mistake of ours, and the answer exists only here: another try may write it.
            logger.exception("account tokens not saved alias=%s", account.alias)
            account.credential = credential.merged(tokens, now=self._clock.now())
            account.unsaved = True
            self.save_pause = SAVE_SECONDS
            return False
        if saved.key != account.key:
            # The file is another account's by now; the next look at the folder sorts that out.
            account.credential = credential.merged(tokens, now=self._clock.now())
            return True
        account.unsaved = False
        account.credential = saved
        return True

    async def _save(self, credential: store.Credential, tokens: NewTokens) -> store.Credential:
        return await asyncio.to_thread(
            store.save, credential, tokens, now=self._clock.now(), data_dir=self._live.current.data_dir
        )

    async def _failed(
        self, account: Account, credential: store.Credential, exc: oauth.RefreshFailed, began: float
    ) -> bool:
        data_dir = self._live.current.data_dir
        account.last_error = f"refresh {exc.code or exc.kind.value}"
        was_interrupted = credential.interrupted is not None
        if exc.kind is not oauth.RefreshFailure.UNCERTAIN and not was_interrupted:
            await asyncio.to_thread(store.clear_exchange, data_dir, credential)
        match exc.kind:
            case oauth.RefreshFailure.PERMANENT:
                # Somebody else may have exchanged it: then the file has the answer.
                if await self._reread(account, credential) == "other tokens":
                    return account.access_is_valid(self._clock.now())
                reason = exc.code or "refused"
                if was_interrupted:
                    reason = f"{reason} ({_INTERRUPTED})"
                    # Once is all it is tried: the next start knows what came of it.
                    await asyncio.to_thread(store.note_refusal, data_dir, credential, reason, now=began)
                self._pool.login_lost(account, reason)
            case oauth.RefreshFailure.UNCERTAIN:
                self._interrupted(account, credential, began)
                self._rest(account, exc.code or exc.kind.value, exc.retry_after)
            case oauth.RefreshFailure.PASSING | oauth.RefreshFailure.LIMITED:
                self._rest(account, exc.code or exc.kind.value, exc.retry_after)
        return False

    def _interrupted(self, account: Account, credential: store.Credential, began: float) -> None:
        """Note that the token may be spent, as the next start would find it; unless it is another one by now."""
        if account.credential.refresh == credential.refresh and account.credential.interrupted is None:
            account.credential = dataclasses.replace(account.credential, interrupted=began)

    def _rest(self, account: Account, reason: str, seconds: float | None = None) -> None:
        account.refresh_failures += 1
        if seconds is None:
            seconds = _REFRESH_BACKOFF.seconds(account.refresh_failures, self._rng.random())
        account.refresh_after = max(account.refresh_after, self._clock.now() + seconds)
        logger.warning(
            "account not refreshed alias=%s reason=%s again_in=%.0f", account.alias, reason, seconds
        )

    async def _reread(self, account: Account, before: store.Credential) -> _Found:
        """Take over what the account's file says now; say whether its tokens are still those of *before*."""
        if account.removed:
            return "gone"
        try:
            credential = await asyncio.to_thread(store.load, account.credential.path)
        except store.Unusable as exc:
            # Half written, it tells nothing.
            return "gone" if exc.is_final else "same"
        if credential.key != account.key:
            return "gone"
        if credential.refresh == account.credential.refresh:
            # A scan knows of interrupted exchanges, a look at the file alone does not.
            credential.interrupted = account.credential.interrupted
            credential.refused = account.credential.refused
        _ = self._pool.adopt(account, credential)
        now = account.credential
        return "same" if (now.access, now.refresh) == (before.access, before.refresh) else "other tokens"

    @contextlib.asynccontextmanager
    async def _lock(self, account: Account) -> AsyncIterator[bool]:
        """Hold the machine-wide right to exchange; False when another process kept it all the time."""
        # Another process that holds the lock needs at most an exchange's time.
        deadline = self._clock.monotonic() + self._seconds() + _LOCK_GRACE_SECONDS
        while True:
            with contextlib.ExitStack() as stack:
                held = await asyncio.to_thread(stack.enter_context, store.exchange_lock(account.credential))
                if held or self._is_ending or self._clock.monotonic() >= deadline:
                    yield held
                    return
            await self._clock.sleep(_LOCK_POLL_SECONDS)

    # -- another try ----------------------------------------------------------------------

    async def save_unsaved(self) -> None:
        """Try again to write tokens that their files could not take."""
        self.save_pause = min(2.0 * self.save_pause, MAX_SAVE_SECONDS)
        unsaved = [account for account in self._pool if account.unsaved and account.refreshing is None]
        if not unsaved:
            self.save_pause = SAVE_SECONDS
        for account in unsaved:
            credential = account.credential
            try:
                saved = await self._save(credential, credential.all_tokens())
            except store.NotSaved as exc:
                # In data-dir they are safe: a folder that nobody may write is somebody's choice.
                level = logging.DEBUG if exc.is_pending else logging.ERROR
                logger.log(level, "account tokens still not saved alias=%s reason=%s", account.alias, exc)
                if not exc.is_pending:
                    self.save_pause = SAVE_SECONDS
                continue
            self.save_pause = SAVE_SECONDS
            if account.credential is not credential:
                continue
            if saved.key != account.key:
                # The file is another account's by now; ours waits in data-dir.
                account.unsaved = False
                continue
            account.unsaved = False
            self._pool.adopt(account, saved)
            logger.info("account tokens saved alias=%s", account.alias)
