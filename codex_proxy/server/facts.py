"""What the alerts judge by, as the pool and the pulse have it."""

from codex_proxy.accounts.account import Login
from codex_proxy.accounts.pool import Pool
from codex_proxy.accounts.state import State
from codex_proxy.accounts.words import words
from codex_proxy.alerts.rules import Facts
from codex_proxy.clock import Clock
from codex_proxy.server.pulse import Pulse

_MINUTES = 5


def facts_of(pool: Pool, pulse: Pulse, clock: Clock) -> Facts:
    """Return how things are now."""
    requests, errors = pulse.errors(_MINUTES * 60.0)
    accounts = [account for account in pool.accounts() if account.state is not State.DISABLED]
    left, resets_at = _left(pool)
    return Facts(
        accounts=len(accounts),
        ready=sum(account.state is State.READY for account in accounts),
        left=left,
        resets_in=None if resets_at is None else max(0.0, resets_at - clock.now()),
        needs_login={
            account.alias: words(account.login_lost) or "it has no token that can be used"
            for account in accounts
            if account.login is Login.LOST or account.state is State.NEEDS_LOGIN
        },
        requests=requests,
        errors=errors,
        minutes=_MINUTES,
        refresh_failures={
            account.alias: account.refresh_failures for account in accounts if account.refresh_failures
        },
    )


def _left(pool: Pool) -> tuple[float | None, float | None]:
    """Return what share is left in the pool's window of which least is, and when that starts again."""
    told = (pool.pool_limits() or {}).get("rate_limits", {})
    windows = [
        (1.0 - window["used_percent"] / 100, window.get("reset_at"))
        for window in (told.get("primary"), told.get("secondary"))
        if isinstance(window, dict) and "used_percent" in window
    ]
    return min(windows, key=lambda window: window[0], default=(None, None))
