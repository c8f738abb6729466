"""The pool as its owner may see it: accounts by alias, names masked, times plain."""

from collections.abc import AsyncIterator, Callable, Sequence
from typing import Literal

from codex_proxy.accounts.account import Account, Cause
from codex_proxy.accounts.pool import Pool
from codex_proxy.accounts.quota import MAIN_FAMILY, Quota
from codex_proxy.accounts.state import State
from codex_proxy.accounts.tokens import mask_email, mask_name
from codex_proxy.accounts.upkeep import Keeper, Result
from codex_proxy.clock import Clock
from codex_proxy.server.admin import (
    AccountView,
    Health,
    Item,
    ProblemView,
    Progress,
    QuotaView,
    Rounds,
    Status,
    TokensView,
    WindowView,
)
from codex_proxy.tasks import Background
from codex_proxy.trace import Trace, UsageSource

Phase = Literal["starting", "ready", "draining"]

_STATUS: dict[State, Status] = {
    State.READY: "active",
    State.COOLING: "cooldown",
    State.UNAVAILABLE: "unavailable",
    State.NEEDS_LOGIN: "needs_login",
    State.DISABLED: "disabled",
}


class PoolAdmin:
    """Answers the owner's questions about the pool."""

    def __init__(
        self, pool: Pool, keeper: Keeper, *, clock: Clock, background: Background, phase: Callable[[], Phase]
    ) -> None:
        self._pool = pool
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
        return Health(len(accounts), active, self._phase())

    def accounts(self) -> Sequence[AccountView]:
        """Return a view of every account, by alias."""
        now = self._clock.now()
        return sorted((account_view(a, now) for a in self._pool.accounts()), key=lambda view: view.alias)

    def problems(self) -> Sequence[ProblemView]:
        """Return what is wrong with the files of auth-dir."""
        return [ProblemView(problem.name, problem.reason) for problem in self._pool.problems]

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


async def _items(results: AsyncIterator[Result]) -> AsyncIterator[Item]:
    async for result in results:
        yield Item(result.account.alias, _email(result.account), result.success, result.reason or None)


def _email(account: Account) -> str | None:
    email = account.credential.identity.email
    return mask_email(email) if email else None


def account_view(account: Account, now: float) -> AccountView:
    """Return what an owner may see of one account."""
    credential, usage = account.credential, account.usage
    limited = account.holds.get(Cause.LIMIT)
    return AccountView(
        alias=account.alias,
        status=_STATUS[account.state],
        email=_email(account),
        file=mask_name(credential.path.name),
        reason=account.reason() or None,
        plan_type=account.quota.plan,
        account_id=_mask_id(credential.identity.account_id),
        total_requests=account.total_requests,
        total_errors=account.total_errors,
        consecutive_failures=max((s.count for s in account.strikes.values()), default=0),
        in_flight=account.in_flight,
        last_used_at=account.last_used,
        last_refreshed_at=credential.last_refresh,
        cooldown_until=account.cooling_until(),
        quota_exhausted=limited is not None,
        quota_resets_at=limited,
        token_expire=credential.expires_at,
        usage=TokensView(
            account.completions,
            usage.input_tokens,
            usage.cached_tokens,
            usage.output_tokens,
            usage.reasoning_tokens,
            usage.total_tokens,
        ),
        quota=_quota_view(account.quota, now),
    )


def _quota_view(quota: Quota, now: float) -> QuotaView | None:
    if quota.seen_at is None and quota.usage_at is None:
        return None
    windows: list[WindowView] = []
    for family in quota.families.values():
        for which, window in family.windows():
            name = which if family.id == MAIN_FAMILY else f"{family.id} {which}"
            windows.append(
                WindowView(
                    name,
                    window.minutes,
                    window.used_percent,
                    window.resets_at,
                    max(0.0, now - window.seen_at),
                )
            )
    valid = None if quota.usage_status is None else quota.usage_status == 200
    return QuotaView(valid, quota.usage_status, quota.usage_at, quota.source, quota.plan, tuple(windows))


def _mask_id(account_id: str | None) -> str | None:
    return f"{account_id[:4]}…{account_id[-4:]}" if account_id and len(account_id) > 12 else None


def count_turn(pool: Pool, trace: Trace) -> None:
    """Add a finished turn to the numbers of the account that served it."""
    if trace.usage.source is UsageSource.NONE:
        return
    alias = trace.alias or (trace.attempts[-1].alias if trace.attempts else "")
    account = pool.by_alias(alias)
    if account is None:
        return
    account.completions += 1
    total, turn = account.usage, trace.usage
    total.input_tokens += turn.input_tokens
    total.cached_tokens += turn.cached_tokens
    total.cache_write_tokens += turn.cache_write_tokens
    total.output_tokens += turn.output_tokens
    total.reasoning_tokens += turn.reasoning_tokens
