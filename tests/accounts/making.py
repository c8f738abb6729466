"""Accounts, pools and credential files, made in a line."""

import base64
import json
import random
from pathlib import Path
from typing import Any

import orjson

from codex_proxy.accounts.account import Account, Login
from codex_proxy.accounts.pool import Pool
from codex_proxy.accounts.scheduler import QuotaBalance
from codex_proxy.accounts.state import State
from codex_proxy.accounts.store import Credential, Scan
from codex_proxy.accounts.tokens import AUTH_CLAIM, NO_SECRET, Identity, Secret
from codex_proxy.clock import ManualClock
from codex_proxy.errors import BackendFault, UpstreamError, Verdict

NOW = 1_800_000_000.0
HOUR = 3_600.0
DAY = 86_400.0


class Middle(random.Random):
    """Randomness without any: always the middle, where jitter changes nothing."""

    def random(self) -> float:
        return 0.5


def jwt(**payload: Any) -> str:
    body = base64.urlsafe_b64encode(orjson.dumps(payload)).decode().rstrip("=")
    return f"eyJhbGciOiJub25lIn0.{body}.sig"


def access_token(user: str = "a", *, ends: float | None = NOW + DAY, n: int = 0) -> str:
    said = {AUTH_CLAIM: {"chatgpt_user_id": f"user-{user}", "chatgpt_account_id": f"acc-{user}"}}
    return jwt(n=n, **said, **({} if ends is None else {"exp": int(ends)}))


def credential(
    user: str = "a",
    *,
    ends: float | None = NOW + DAY,
    access: str | None = None,
    refresh: str | None = None,
    n: int = 0,
    **more: Any,
) -> Credential:
    """Make a credential that was never in a file; `refresh=""` leaves the refresh token out."""
    token = access_token(user, ends=ends, n=n) if access is None else access
    path = Path(f"/nowhere/{user}.json")
    values: dict[str, Any] = {
        "path": path,
        "target": path,
        "shape": "flat",
        "raw": {},
        "access": Secret(token) if token else NO_SECRET,
        "refresh": Secret(f"rt_{user}_{n}" if refresh is None else refresh),
        "id": NO_SECRET,
        "expires_at": ends,
        "last_refresh": None,
        "identity": Identity(f"user-{user}", f"acc-{user}"),
        "alias": user,
        "disabled": False,
        "proxy_url": None,
        **more,
    }
    return Credential(**values)


def account(user: str = "a", **more: Any) -> Account:
    return Account(credential(user, **more), user)


def make_pool(*users: str, clock: ManualClock | None = None) -> tuple[Pool, ManualClock]:
    """Make a pool of accounts called *users*, on a clock that stands at NOW."""
    clock = clock if clock is not None else ManualClock(NOW)
    pool = Pool(clock, rng=Middle(), strategy=QuotaBalance())
    pool.apply(Scan([credential(user) for user in users], []))
    return pool, clock


def named(pool: Pool, user: str) -> Account:
    return next(a for a in pool if a.alias == user)


def failure(verdict: Verdict, **more: Any) -> UpstreamError:
    return UpstreamError(verdict, BackendFault("no", code=more.pop("code", verdict.value)), **more)


def write_file(
    folder: Path, user: str = "a", *, ends: float | None = NOW + DAY, n: int = 0, **more: Any
) -> Path:
    """Write a credential file."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{user}.json"
    content = {
        "access_token": access_token(user, ends=ends, n=n),
        "refresh_token": f"rt_{user}_{n}",
        "account_id": f"acc-{user}",
        "alias": user,
        "type": "codex",
        "mine": {"kept": True},
        **more,
    }
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def read_file(path: Path) -> dict[str, Any]:
    document = json.loads(path.read_bytes())
    assert isinstance(document, dict)
    return document


def state_of(one: Account) -> State:
    """Return the account's state; asked by a call, a checker does not take it for settled."""
    return one.state


def login_of(one: Account) -> Login:
    """Return whether the account's refresh token is of use; asked by a call, as `state_of`."""
    return one.login
