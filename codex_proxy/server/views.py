"""The pool as its owner may see it: accounts by alias, names masked, times plain."""

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Literal, overload

from codex_proxy.accounts.account import Account, Cause, Login
from codex_proxy.accounts.actions import Action, Actions, Done
from codex_proxy.accounts.pool import Pool
from codex_proxy.accounts.quota import Quota, Window
from codex_proxy.accounts.state import State
from codex_proxy.accounts.tokens import mask_email, mask_name
from codex_proxy.accounts.upkeep import Keeper, Result
from codex_proxy.accounts.words import words
from codex_proxy.clock import Clock
from codex_proxy.protocol.wire import JsonObject
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
    Status,
    Summary,
    TokensView,
    WindowView,
)
from codex_proxy.tasks import Background
from codex_proxy.trace import Usage
from codex_proxy.upstream.providers import Providers

Phase = Literal["starting", "ready", "draining"]

STATUS: dict[State, Status] = {
    State.READY: "active",
    State.COOLING: "cooldown",
    State.UNAVAILABLE: "unavailable",
    State.NEEDS_LOGIN: "needs_login",
    State.DISABLED: "disabled",
}

_LOGIN: dict[Login, Literal["ok", "uncertain", "lost"]] = {
    Login.OK: "ok",
    Login.UNCERTAIN: "uncertain",
    Login.LOST: "lost",
}

_DAY_MINUTES = 24 * 60
_WEEK_MINUTES = 7 * _DAY_MINUTES


class PoolAdmin:
    """Answers the owner's questions about the pool."""

    def __init__(
        self,
        pool: Pool,
        keeper: Keeper,
        actions: Actions,
        *,
        clock: Clock,
        background: Background,
        phase: Callable[[], Phase],
        providers: Providers | None = None,
    ) -> None:
        self._pool = pool
        self._providers = providers
        self._actions = actions
        self._clock = clock
        self._phase = phase
        self._refreshes = Rounds(
            "refresh", lambda: self._round(keeper.each_refresh), background, clock.monotonic
        )
        self._checks = Rounds("quota", lambda: self._round(keeper.each_usage), background, clock.monotonic)

    def health(self) -> Health:
        """Count the accounts, and those that could serve now."""
        accounts = self._pool.accounts()
        active = sum(account.state is State.READY for account in accounts)
        on, well = (0, 0) if self._providers is None else self._providers.count()
        return Health(len(accounts), active, self._phase(), on, well)

    def upstreams(self) -> list[JsonObject]:
        """Return what there is to say of each upstream."""
        return [] if self._providers is None else self._providers.state()

    def accounts(self) -> Sequence[AccountView]:
        """Return a view of every account, by alias; made when it is looked at."""
        return _Views(sorted(self._pool.accounts(), key=lambda account: account.alias), self._clock.now())

    def summary(self) -> Summary:
        """Count and add up over all accounts."""
        found = Summary()
        tokens = Usage()
        completions = 0
        for account in self._pool.accounts():
            found.by_status[STATUS[account.state]] += 1
            found.in_flight += account.in_flight
            found.total_requests += account.total_requests
            found.total_errors += account.total_errors
            found.quota_exhausted += Cause.LIMIT in account.holds
            status = account.quota.usage_status
            if account.quota.usage_at:
                found.quota_checked += 1
                found.quota_valid += status == 200
                found.quota_invalid += status is not None and status != 200
            completions += account.completions
            tokens.add(account.usage)
        found.usage = _tokens_view(completions, tokens)
        return found

    def account(self, alias: str) -> AccountView | None:
        """Return a view of the account called *alias*."""
        account = self._pool.by_alias(alias)
        return None if account is None else account_view(account, self._clock.now())

    def problems(self) -> Sequence[ProblemView]:
        """Return what is wrong with the files of auth-dir."""
        return [ProblemView(problem.name, problem.reason) for problem in self._pool.problems]

    def cache(self) -> Mapping[str, CacheView]:
        """Return how well caches were hit, by what conversations were known by."""
        return {
            source or "none": CacheView(
                binding.turns, binding.usage.input_tokens, binding.usage.cached_tokens
            )
            for source, binding in sorted(self._pool.bindings.items())
        }

    async def act(self, alias: str, action: Action) -> Done:
        """Do what the owner wants to one account."""
        return await self._actions.act(alias, action)

    def refresh_all(self) -> Progress:
        """Exchange every account's tokens, or join the round that does."""
        return self._refreshes.join()

    def check_quota(self) -> Progress:
        """Ask for every account's quota, or join the round that does."""
        return self._checks.join()

    def _round(
        self, each: Callable[[list[Account]], AsyncIterator[Result]]
    ) -> tuple[int, AsyncIterator[Item]]:
        accounts = self._pool.accounts()
        return len(accounts), _items(each(accounts))


class _Views(Sequence[AccountView]):
    """Views of accounts as they are when one looks; with the age that their numbers have at *now*."""

    def __init__(self, accounts: Sequence[Account], now: float) -> None:
        self._accounts = accounts
        self._now = now

    def __len__(self) -> int:
        return len(self._accounts)

    @overload
    def __getitem__(self, index: int) -> AccountView: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[AccountView]: ...
    def __getitem__(self, index: int | slice) -> AccountView | Sequence[AccountView]:
        if isinstance(index, slice):
            return _Views(self._accounts[index], self._now)
        return account_view(self._accounts[index], self._now)


async def _items(results: AsyncIterator[Result]) -> AsyncIterator[Item]:
    async for result in results:
        yield Item(result.account.alias, _email(result.account), result.success, words(result.reason) or None)


def _email(account: Account) -> str | None:
    email = account.credential.identity.email
    return mask_email(email) if email else None


def account_view(account: Account, now: float) -> AccountView:
    """Return what an owner may see of one account."""
    credential = account.credential
    limited = account.holds.get(Cause.LIMIT)
    return AccountView(
        alias=account.alias,
        status=STATUS[account.state],
        email=_email(account),
        file=mask_name(credential.path.name),
        reason=words(account.reason()) or None,
        plan_type=account.quota.plan,
        account_id=_mask_id(credential.identity.account_id),
        total_requests=account.total_requests,
        total_errors=account.total_errors,
        consecutive_failures=max([one.count for one in account.strikes.values()], default=0),
        in_flight=account.in_flight,
        last_used_at=account.last_used,
        last_refreshed_at=credential.last_refresh,
        cooldown_until=account.cooling_until(),
        quota_exhausted=limited is not None,
        quota_resets_at=limited,
        token_expire=credential.expires_at,
        usage=_tokens_view(account.completions, account.usage),
        quota=_quota_view(account.quota, now),
        login=_LOGIN[account.login],
        login_reason=_login_reason(account),
        last_error=words(account.last_error) or None,
        priority=credential.priority,
        weight=credential.weight,
        max_concurrency=credential.max_concurrency,
        models_allowed=credential.models_allowed,
        models_denied=credential.models_denied,
    )


def _tokens_view(completions: int, usage: Usage) -> TokensView:
    return TokensView(
        completions,
        usage.input_tokens,
        usage.cached_tokens,
        usage.output_tokens,
        usage.reasoning_tokens,
        usage.total_tokens,
    )


def _login_reason(account: Account) -> str | None:
    match account.login:
        case Login.OK:
            return None
        case Login.UNCERTAIN:
            return "an exchange of its token was cut off before the answer was saved; the token is tried once"
        case Login.LOST:
            return words(account.login_lost)


def _quota_view(quota: Quota, now: float) -> QuotaView | None:
    bought, spend = _credits_view(quota, now), _spend_view(quota, now)
    if quota.seen_at is None and quota.usage_at is None and bought is None and spend is None:
        return None
    windows = tuple([
        _window_view(family.id, family.name, place, window, now)
        for family in quota.families.values()
        for place, window in family.windows()
    ])
    valid = None if quota.usage_status is None else quota.usage_status == 200
    return QuotaView(
        valid, quota.usage_status, quota.usage_at, quota.source, quota.plan, windows, bought, spend
    )


def _credits_view(quota: Quota, now: float) -> CreditsView | None:
    told = quota.credits
    if told.seen_at is None:
        return None
    return CreditsView(
        told.has_credits,
        told.unlimited,
        told.balance,
        told.overage_limit_reached,
        told.source,
        max(0.0, now - told.seen_at),
    )


def _spend_view(quota: Quota, now: float) -> SpendView | None:
    told = quota.spend
    if told is None or told.seen_at is None:
        return None
    return SpendView(
        told.reached,
        told.limit,
        told.used,
        told.used_percent,
        told.resets_at,
        told.source,
        max(0.0, now - told.seen_at),
    )


def _window_view(limit: str, name: str | None, place: str, window: Window, now: float) -> WindowView:
    is_over = window.is_over(now)
    return WindowView(
        window=window_name(window.minutes) or place,
        limit=limit,
        limit_name=name,
        minutes=window.minutes,
        used_percent=None if is_over else window.used_percent,
        resets_at=None if is_over else window.resets_at,
        source=window.source,
        age=max(0.0, now - window.seen_at),
    )


def window_name(minutes: int | None) -> str | None:
    """Return what people call a window of that length; plans put them in different places."""
    if minutes is None or minutes <= 0:
        return None
    if minutes == _WEEK_MINUTES:
        return "week"
    if minutes % _DAY_MINUTES == 0:
        return f"{minutes // _DAY_MINUTES}d"
    if minutes % 60 == 0:
        return f"{minutes // 60}h"
    return f"{minutes}min"


def _mask_id(account_id: str | None) -> str | None:
    return f"{account_id[:4]}…{account_id[-4:]}" if account_id and len(account_id) > 12 else None
