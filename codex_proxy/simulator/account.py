"""One simulated account: who it is, what it may use, how much of it is used, and how it behaves."""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any
from uuid import NAMESPACE_URL, uuid5

from codex_proxy.simulator.catalog import model_info, model_of, models_of
from codex_proxy.simulator.faults import Fault, check_state
from codex_proxy.simulator.issuer import Issuer, Tokens
from codex_proxy.simulator.script import Script

PRIMARY_MINUTES = 300
SECONDARY_MINUTES = 10_080


@dataclass(slots=True)
class Window:
    """A quota window: fills with use, empties when its time is over."""

    minutes: int
    limit_tokens: float
    used_percent: float = 0.0
    reset_at: float = 0.0

    def roll(self, now: float) -> None:
        """Start a new window when the old one is over."""
        if now >= self.reset_at:
            if self.reset_at:
                self.used_percent = 0.0
            self.reset_at = now + self.minutes * 60

    def use(self, tokens: float, now: float) -> None:
        """Count *tokens*."""
        self.roll(now)
        if self.limit_tokens > 0:
            self.used_percent = min(100.0, self.used_percent + tokens * 100.0 / self.limit_tokens)

    def view(self, now: float) -> dict[str, int]:
        """Return what the backend tells about it."""
        self.roll(now)
        return {
            "used_percent": int(self.used_percent),
            "window_minutes": self.minutes,
            "reset_after_seconds": max(0, round(self.reset_at - now)),
            "reset_at": round(self.reset_at),
        }


@dataclass(slots=True)
class Family:
    """A limit beside the main one, for the models that count against it."""

    name: str
    """As in `x-codex-active-limit`: `codex_<name>`."""
    title: str
    primary: Window
    secondary: Window


@dataclass(slots=True, eq=False)
class SimAccount:
    """An account; tests set its state and its answers, and read what became of it."""

    name: str
    issuer: Issuer
    now: Callable[[], float]
    plan: str = "plus"
    models: list[str] = field(default_factory=list)
    email: str = ""
    account_id: str = ""
    user_id: str = ""
    fedramp: bool = False
    quota_tokens: float = 50_000_000
    """How many tokens fill the primary window; the secondary takes eight times as many. 0: it never fills."""
    active_limit: str = "codex"
    primary: Window = field(init=False)
    secondary: Window = field(init=False)
    families: dict[str, Family] = field(init=False, default_factory=dict)
    tokens: Tokens = field(init=False)
    fault: Fault | None = field(init=False, default=None)
    scripts: deque[Script] = field(init=False, default_factory=deque)
    refresh_mode: str = field(init=False, default="ok")
    refresh_seconds: float = field(init=False, default=0.2)
    cache: dict[str, int] = field(init=False, default_factory=dict)
    """Input tokens of the last turn, by prompt cache key."""
    turns: int = field(init=False, default=0)
    """How many answers it completed."""

    def __post_init__(self) -> None:
        self.email = self.email or f"{self.name}@example.com"
        self.account_id = self.account_id or str(uuid5(NAMESPACE_URL, f"simulator/account/{self.name}"))
        digest = sha256(f"simulator/user/{self.name}".encode()).hexdigest()
        self.user_id = self.user_id or f"user-{digest[:24]}"
        self.models = self.models or models_of(self.plan)
        # Free and prolite accounts have the week in the first window and no second one.
        weekly_first = self.plan in {"free", "prolite"}
        minutes = SECONDARY_MINUTES if weekly_first else PRIMARY_MINUTES
        self.primary = Window(minutes, self.quota_tokens)
        self.secondary = Window(0 if weekly_first else SECONDARY_MINUTES, self.quota_tokens * 8)
        for slug in self.models:
            self.add_family(slug)
        self.tokens = self.issuer.issue(self)

    def __repr__(self) -> str:
        return f"SimAccount({self.name!r}, {self.plan!r}, {self.state!r})"

    def add_family(self, slug: str) -> None:
        """Give the account the limit that *slug* counts against, when that is not the main one."""
        model = model_of(slug)
        if model.family != "codex" and model.family not in self.families:
            self.families[model.family] = Family(
                model.family,
                model.family_name or model.name,
                Window(PRIMARY_MINUTES, self.quota_tokens),
                Window(SECONDARY_MINUTES, self.quota_tokens * 8),
            )

    @property
    def tag(self) -> str:
        """What ids and encrypted content of this account carry."""
        return sha256(f"{self.user_id}/{self.account_id}".encode()).hexdigest()[:8]

    @property
    def state(self) -> str:
        """The name of the state it is in now."""
        fault = self.current_fault()
        return "ok" if fault is None else fault.state

    @property
    def used_percent(self) -> dict[str, float]:
        """How full both windows are."""
        now = self.now()
        self.primary.roll(now)
        self.secondary.roll(now)
        return {"primary": self.primary.used_percent, "secondary": self.secondary.used_percent}

    def use(self, primary: float | None = None, secondary: float | None = None) -> None:
        """Say how full the windows are."""
        now = self.now()
        for window, percent in ((self.primary, primary), (self.secondary, secondary)):
            window.roll(now)
            if percent is not None:
                window.used_percent = float(percent)

    def set(self, state: str, *, times: int | None = None, **options: Any) -> None:
        """Put the account into *state*, until told otherwise or for the next *times* requests.

        `refresh=` says how its token exchanges end from now on; `ok` clears everything.

        Raises:
            ValueError: If there is no such state, or it has no such option.
        """
        check_state(state, options)
        if state == "ok":
            self.fault = None
            self.refresh_mode, self.refresh_seconds = "ok", 0.2
            self.tokens.access_revoked = self.tokens.refresh_expired = self.tokens.login.revoked = False
        if "refresh" in options:
            self.refresh_mode = str(options.pop("refresh"))
        if "refresh_seconds" in options:
            self.refresh_seconds = float(options.pop("refresh_seconds"))
        if state == "revoked":
            self.issuer.revoke(self)
        if state != "ok" or options:
            until = None
            if state == "usage_limit":
                options.setdefault("resets_in", 3600.0)
                until = self.now() + float(options["resets_in"])
            self.fault = Fault(state, options, times, until)
        if state == "unauthorized" and times is None:
            self.tokens.access_revoked = True

    def script(self, *scripts: Script | str) -> None:
        """Queue answers for the next turns."""
        self.scripts.extend(Script.text(item) if isinstance(item, str) else item for item in scripts)

    def issue(self, expires_in: float | None = None) -> Tokens:
        """Log in anew: fresh tokens, which expire in *expires_in* seconds, become the account's own."""
        self.tokens = self.issuer.issue(self, expires_in)
        return self.tokens

    def expire_access(self) -> None:
        """Let the access token be expired, whatever the token itself says."""
        self.tokens.expires_at = self.now() - 1

    def revoke_access(self) -> None:
        """Refuse the access token until it is refreshed."""
        self.tokens.access_revoked = True

    def expire_refresh(self) -> None:
        """Let the refresh token be expired."""
        self.tokens.refresh_expired = True

    def current_fault(self) -> Fault | None:
        """Return the fault in force, if any, and forget one that is over."""
        fault = self.fault
        if fault is None:
            return None
        over = (fault.until is not None and self.now() >= fault.until) or fault.times == 0
        # A refused token is the state: a refresh ends the one, a new login the other.
        if fault.state == "unauthorized" and fault.times is None:
            over = not self.tokens.access_revoked
        elif fault.state == "revoked":
            over = over or not self.tokens.login.revoked
        if over:
            self.fault = None
            return None
        return fault

    def take_fault(self, slug: str, *, is_turn: bool) -> Fault | None:
        """Return the fault that a request for *slug* meets, counting it."""
        fault = self.current_fault()
        if fault is None or not fault.hits(model_of(slug).family, is_turn=is_turn):
            return None
        if fault.times is not None:
            fault.times -= 1
        return fault

    def full_family(self, slug: str) -> str | None:
        """Return the limit that *slug* would run into, if it is reached."""
        now = self.now()
        family = self.families.get(model_of(slug).family)
        windows = (family.primary, family.secondary) if family else (self.primary, self.secondary)
        for window in windows:
            window.roll(now)
            if window.used_percent >= 100 and window.minutes:
                return family.name if family else "codex"
        return None

    def count(self, slug: str, tokens: float) -> None:
        """Count the *tokens* of a finished turn."""
        now = self.now()
        self.turns += 1
        family = self.families.get(model_of(slug).family)
        for window in (family.primary, family.secondary) if family else (self.primary, self.secondary):
            window.use(tokens, now)

    def model_list(self) -> list[dict[str, Any]]:
        """Return the objects with which the backend lists this account's models."""
        return [model_info(slug) for slug in self.models]

    def etag(self) -> str:
        """Return the tag of the model list: the same list, the same tag."""
        return 'W/"' + sha256("\n".join(self.models).encode()).hexdigest()[:32] + '"'

    def flat_file(self) -> dict[str, Any]:
        """Return the account file in the shape of the Go daemon."""
        return {
            "access_token": self.tokens.access,
            "refresh_token": self.tokens.refresh,
            "id_token": self.tokens.id_token,
            "account_id": self.account_id,
            "email": self.email,
            "type": "codex",
            "expired": self.issuer.rfc3339(self.tokens.expires_at),
            "last_refresh": self.issuer.rfc3339(self.tokens.issued_at),
        }

    def codex_file(self) -> dict[str, Any]:
        """Return the account file in the shape of the Codex CLI's `auth.json`."""
        return {
            "auth_mode": "chatgpt",
            "OPENAI_API_KEY": None,
            "tokens": {
                "id_token": self.tokens.id_token,
                "access_token": self.tokens.access,
                "refresh_token": self.tokens.refresh,
                "account_id": self.account_id,
                "oauth_provenance": {"issuer": "https://auth.openai.com", "client_id": self.issuer.client_id},
                "login_owner_id": self.tag,
            },
            "last_refresh": self.issuer.rfc3339(self.tokens.issued_at),
        }
