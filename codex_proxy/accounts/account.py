"""One account: its credential, its state, its quota, what it carries now. Pure; times come in."""

import enum
import functools
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from codex_proxy.accounts.quota import MAIN_FAMILY, Quota
from codex_proxy.accounts.state import Signal, State, step
from codex_proxy.patterns import fits
from codex_proxy.protocol.wire import JsonObject
from codex_proxy.trace import Usage

if TYPE_CHECKING:
    import asyncio

    from codex_proxy.accounts.store import Credential
    from codex_proxy.accounts.tokens import Secret

# A token is exchanged this long before it ends, as the Codex CLI does (contract, section 1.5).
REFRESH_BEFORE = 300.0


# How long "this account lacks this model" is believed.
REFUSAL_SECONDS = 3_600.0

# Callers choose the names that are refused.
MAX_REFUSALS = 256

# How long one request may try an account that has rested, before others follow it unasked.
TRIAL_SECONDS = 10.0


class Login(enum.Enum):
    """Whether an account's refresh token is of use."""

    OK = "ok"
    UNCERTAIN = "uncertain"
    """An exchange of it was cut off before its answer was saved: it may be spent, and is tried once."""
    LOST = "lost"


class Cause(enum.Enum):
    """Why an account cools."""

    LIMIT = "usage limit"
    RATE = "rate limit"
    OVERLOAD = "overloaded"
    SERVER = "server error"
    FORBIDDEN = "forbidden"
    REJECTED = "token refused"
    SILENT = "no answer in time"
    CUT = "stream cut"
    PATH = "unreachable"


@dataclass(slots=True, frozen=True)
class Backoff:
    """How long a cause cools when the backend names no time: doubling from `first` to `cap` seconds."""

    first: float
    cap: float

    def seconds(self, strikes: int, jitter: float) -> float:
        """Return the pause after the n-th strike; *jitter* in 0..1 spreads it by a fifth each way."""
        return float(min(self.cap, self.first * 2.0 ** max(0, min(strikes, 30) - 1)) * (0.8 + 0.4 * jitter))


BACKOFF: dict[Cause, Backoff] = {
    Cause.LIMIT: Backoff(60.0, 1_800.0),
    Cause.RATE: Backoff(5.0, 300.0),
    Cause.OVERLOAD: Backoff(2.0, 30.0),
    Cause.SERVER: Backoff(1.0, 30.0),
    Cause.FORBIDDEN: Backoff(30.0, 600.0),
    Cause.REJECTED: Backoff(60.0, 1_800.0),
    Cause.SILENT: Backoff(5.0, 60.0),
    Cause.CUT: Backoff(1.0, 30.0),
    Cause.PATH: Backoff(2.0, 30.0),
}

# How long an account that is not entitled rests before one request may try it again.
REPROBE = Backoff(1_800.0, 6 * 3_600.0)


@dataclass(slots=True)
class Strikes:
    """Failures of one cause in a row; a burst of parallel ones counts once."""

    count: int = 0
    last: float = float("-inf")
    """Monotonic time of the last one that counted."""

    def add(self, started: float, now: float) -> bool:
        """Count a failure of a request sent at *started*; False when it belongs to the last burst."""
        if started <= self.last:
            return False
        self.count += 1
        self.last = now
        return True


@dataclass(slots=True, eq=False)
class Account:
    """An account as the pool knows it.

    Three things are kept apart: what its owner wants (disabled), what the backend allows
    (cooldowns, entitlement), and whether its login works. `state` is their sum, moved only
    through the transition table.

    Whoever keeps something that was made of an account is told when it is another one (`touch`): of thousands
    of accounts only those are looked at again. What changes one here says so itself; whoever sets a field from
    outside calls `touch`.
    """

    credential: "Credential"
    alias: str
    state: State = State.READY
    quota: Quota = field(default_factory=Quota)
    holds: dict[Cause, float] = field(default_factory=dict)
    """Cooldowns by cause, as wall clock; the account rests until the last of them."""
    lengths: dict[Cause, float] = field(default_factory=dict)
    """How long those were to be that we chose ourselves: a clock that is set back must not stretch them."""
    family_holds: dict[str, float] = field(default_factory=dict)
    """Limits of one model family beside the main one."""
    refusals: dict[str, float] = field(default_factory=dict)
    """What the backend said this account lacks (endpoint and model), until when that is believed."""
    strikes: dict[Cause, Strikes] = field(default_factory=dict)
    unavailable_until: float = 0.0
    unavailable_reason: str = ""
    unavailable_count: int = 0
    login_lost: str = ""
    """Why its refresh token is of no use any more; its access token may still be."""
    rejected: str = ""
    """Digest of the access token that the backend refused."""
    models: frozenset[str] | None = None
    """The slugs of its model list; None while we have not seen one."""
    model_objects: list[JsonObject] = field(default_factory=list)
    models_at: float | None = None
    models_etag: str = ""

    refreshing: "asyncio.Task[bool] | None" = None
    refresh_after: float = 0.0
    """Wall clock before which no further exchange is tried on a timer."""
    refresh_failures: int = 0
    check_failures: int = 0
    """Health checks in a row that refused a token just exchanged."""
    last_error: str = ""
    unsaved: bool = False
    """Its new tokens could not be written to its file yet."""
    removed: bool = False
    """Its file is gone: no new requests, running ones may end."""
    on_trial: bool = False
    """It has rested, and no request has been answered since: one goes ahead, the others wait for its word."""
    trial_since: float | None = None
    """Monotonic time at which the one request went ahead; None while none has."""

    in_flight: int = 0
    total_requests: int = 0
    total_errors: int = 0
    last_used: float | None = None
    usage: Usage = field(default_factory=Usage)
    completions: int = 0

    place: int = 0
    """Its place in the order in which the accounts came to their pool."""
    watchers: "list[list[Account]]" = field(default_factory=list, repr=False)
    """Lists of those that have changed, which it joins at its next change; each is left by that."""
    filed: "list[Account] | None" = field(default=None, repr=False)
    """The same for the one who minds also how much it carries."""
    has_changed: bool = True
    """Whether it has since, in more than what it carries."""

    def __post_init__(self) -> None:
        self.quota.owner = self

    def touch(self) -> None:
        """Tell those who keep something made of it that it is another one now."""
        watchers = self.watchers
        if watchers:
            for changed in watchers:
                changed.append(self)
            watchers.clear()
        self.has_changed = True
        self.stir()

    def stir(self) -> None:
        """Tell those who mind that it carries more or less than before."""
        filed = self.filed
        if filed is not None:
            self.filed = None
            filed.append(self)

    def take_quota(self, quota: Quota) -> None:
        """Make *quota* what is known of its limits."""
        self.quota = quota
        quota.owner = self
        self.touch()

    @property
    def key(self) -> str:
        """Its identity: the same in every file and after every login."""
        return self.credential.key

    @property
    def workspace(self) -> str:
        """A name for the workspace it belongs to: what one of its accounts encrypts, the others may read."""
        return self.credential.workspace

    @property
    def login(self) -> Login:
        """Whether its refresh token is of use."""
        if self.login_lost:
            return Login.LOST
        return Login.UNCERTAIN if self.credential.interrupted is not None else Login.OK

    @property
    def proxy_url(self) -> str | None:
        """Its own way out; None where the configured one counts."""
        own = self.credential.proxy_url
        return own.reveal() if own else None

    # -- tokens ---------------------------------------------------------------------------

    @property
    def ends_at(self) -> float | None:
        """When its access token ends, by our clock; None when that is not known.

        A token that was over when it was issued shows that our clock is wrong, not the token:
        the backend judges it then, as it does one of unknown end.
        """
        ends_at, issued_at = self.credential.expires_at, self.credential.last_refresh
        return None if ends_at is not None and issued_at is not None and ends_at <= issued_at else ends_at

    def access_is_valid(self, now: float) -> bool:
        """Tell whether its access token can be sent: there, not refused, not known to be over."""
        credential = self.credential
        if not credential.access or (self.rejected and credential.access.digest() == self.rejected):
            return False
        # As `ends_at` says it; every look at an account asks this.
        ends_at, issued_at = credential.expires_at, credential.last_refresh
        return ends_at is None or ends_at > now or (issued_at is not None and ends_at <= issued_at)

    def can_refresh(self) -> bool:
        """Tell whether an exchange could bring a new access token."""
        return bool(self.credential.refresh) and not self.login_lost

    def refresh_due(self, jitter: float) -> float | None:
        """Return the wall clock at which its token should be exchanged; None when no timer knows.

        *jitter* (0..1) moves it up to a minute earlier, so that accounts logged in together
        do not knock together. A token that lives for minutes only serves half its life at least.
        """
        if not self.can_refresh():
            return None
        if self.credential.interrupted is not None:
            # Whether it is spent is found out at once, while the access token may still serve.
            return self.refresh_after
        if not self.credential.access or (self.rejected and self.rejected == self.credential.access.digest()):
            return self.refresh_after
        ends_at, issued_at = self.ends_at, self.credential.last_refresh
        if ends_at is None:
            return None
        due = ends_at - REFRESH_BEFORE - 60.0 * jitter
        if issued_at is not None:
            due = max(due, (issued_at + ends_at) / 2)
        return max(due, self.refresh_after)

    def headers(self, token: "Secret") -> dict[str, str]:
        """Return the headers that say whose request it is; the account's own, never a caller's."""
        headers = {"authorization": f"Bearer {token.reveal()}"}
        identity = self.credential.identity
        if identity.account_id:
            headers["chatgpt-account-id"] = identity.account_id
        if identity.is_fedramp:
            headers["x-openai-fedramp"] = "true"
        if identity.residency:
            headers["x-openai-internal-codex-residency"] = identity.residency
        return headers

    # -- states ---------------------------------------------------------------------------

    def signal(self, signal: Signal) -> bool:
        """Move along the table; True when the state changed."""
        before = self.state
        self.state = step(before, signal)
        if self.state is before:
            return False
        self.touch()
        return True

    def settle(self, now: float) -> bool:
        """Bring the state up to date with the clock; True when it changed."""
        before = self.state
        if before is State.READY:
            if (
                not self.holds
                and not self.family_holds
                and self.unavailable_until <= now
                and self.access_is_valid(now)
            ):
                # Nearly every account, and every choice asks some of them.
                return False
        elif before is State.DISABLED:
            return False
        for cause, length in self.lengths.items():
            if self.holds.get(cause, 0.0) > now + length + 1.0:
                # The clock was ahead when it was set.
                self.holds[cause] = now
        for cause in [cause for cause, until in self.holds.items() if until <= now]:
            del self.holds[cause]
            self.lengths.pop(cause, None)
            self.touch()
        for name in [name for name, until in self.family_holds.items() if until <= now]:
            del self.family_holds[name]
            self.touch()
        if self.unavailable_until > now + REPROBE.cap * 1.2:
            self.unavailable_until = now + REPROBE.cap * 1.2
            self.touch()
        usable = self.access_is_valid(now) or self.can_refresh()
        if self.state is State.NEEDS_LOGIN and usable:
            # Our clock was ahead for a moment, and a token only looked over.
            self.signal(Signal.REFRESHED)
        if self.state is State.UNAVAILABLE and self.unavailable_until <= now:
            self.signal(Signal.RESTED)
        if self.state is State.COOLING and not self.holds:
            self.signal(Signal.RESTED)
            self.begin_trial()
        if self.state is State.READY and self.unavailable_until > now:
            self.signal(Signal.UNENTITLED)
        if self.state is State.READY and self.holds:
            self.signal(Signal.HELD)
        if not usable:
            self.signal(Signal.LOGIN_LOST)
        return self.state is not before

    def hold(self, cause: Cause, until: float, *, length: float | None = None) -> bool:
        """Cool until *until*; a cooldown only ever grows. True when the state changed.

        *length* is given where the time is our own choice, counted from now.
        """
        self.holds[cause] = max(until, self.holds.get(cause, 0.0))
        if length is not None:
            self.lengths[cause] = max(length, self.lengths.get(cause, 0.0))
        else:
            self.lengths.pop(cause, None)
        self.touch()
        return self.signal(Signal.HELD)

    def absolve(self, cause: Cause) -> bool:
        """Take back what *cause* held, because it was not the account's fault."""
        self.strikes.pop(cause, None)
        self.lengths.pop(cause, None)
        if self.holds.pop(cause, None) is None:
            return False
        self.touch()
        return not self.holds and self.signal(Signal.ABSOLVED)

    def begin_trial(self) -> None:
        """Let one request find out whether it serves again, before many do."""
        self.on_trial = True
        self.trial_since = None
        self.touch()

    def end_trial(self) -> None:
        """Open it to all."""
        self.on_trial = False
        self.trial_since = None
        self.touch()

    def trial_left(self, now: float) -> float:
        """Return for how long others wait for the word of the one that went ahead; *now* is monotonic.

        One that shows nothing in that time has opened the account to all.
        """
        if not self.on_trial or self.trial_since is None:
            return 0.0
        left = self.trial_since + TRIAL_SECONDS - now
        if left <= 0.0:
            self.end_trial()
        return max(0.0, left)

    def reset(self) -> None:
        """Forget everything that keeps it from serving but its owner's wish and its login."""
        self.holds.clear()
        self.lengths.clear()
        self.family_holds.clear()
        self.refusals.clear()
        self.strikes.clear()
        self.unavailable_until = 0.0
        self.unavailable_reason = ""
        self.unavailable_count = 0
        self.check_failures = 0
        self.last_error = ""
        self.refresh_after = 0.0
        self.end_trial()
        self.take_quota(Quota(plan=self.quota.plan))

    def cooling_until(self) -> float | None:
        """Return when the last cooldown ends."""
        return max(self.holds.values()) if self.holds else None

    def cooling_cause(self) -> Cause | None:
        """Return the cause of the cooldown that ends last."""
        return max(self.holds, key=lambda cause: self.holds[cause]) if self.holds else None

    def succeeded(self, started: float) -> None:
        """Forget failures that are older than a request which has now been answered."""
        self.signal(Signal.OK)
        if self.strikes:
            for cause in [c for c, s in self.strikes.items() if s.last <= started]:
                del self.strikes[cause]
        if self.trial_since is not None and started >= self.trial_since:
            self.end_trial()
        if self.state is State.READY:
            self.unavailable_count = 0
            self.unavailable_reason = ""

    def reason(self) -> str:
        """Say in a few words why it is not ready; '' when it is."""
        match self.state:
            case State.READY:
                return ""
            case State.COOLING:
                cause = self.cooling_cause()
                return cause.value if cause is not None else ""
            case State.UNAVAILABLE:
                return self.unavailable_reason
            case State.NEEDS_LOGIN:
                return self.login_lost or "no usable token"
            case State.DISABLED:
                return "disabled in its file"

    def refuse(self, name: str, until: float, now: float) -> None:
        """Note that it lacks something, until *until*; of too many the oldest are forgotten."""
        if len(self.refusals) >= MAX_REFUSALS and name not in self.refusals:
            for old in [one for one, ends in self.refusals.items() if ends <= now]:
                del self.refusals[old]
            while len(self.refusals) >= MAX_REFUSALS:
                del self.refusals[next(iter(self.refusals))]
        self.refusals[name] = until
        self.touch()

    def lacks(self, name: str, now: float) -> bool:
        """Tell whether the backend said so lately; a time too far ahead is that of a clock that was wrong."""
        until = self.refusals.get(name)
        return until is not None and now < until <= now + REFUSAL_SECONDS

    def serves(self, model: str) -> bool:
        """Tell whether its owner lets it serve *model*."""
        credential = self.credential
        if not (credential.models_allowed or credential.models_denied):
            return True
        return is_allowed(credential.models_allowed, credential.models_denied, model)

    # -- quota ----------------------------------------------------------------------------

    def left(self, now: float, family: str | None) -> float | None:
        """Return the percent left for a model of *family* (None: the main limit)."""
        main = self.quota.left(now)
        if family is None or family == MAIN_FAMILY:
            return main
        own = self.quota.left(now, family)
        return own if own is not None else main


@functools.lru_cache(maxsize=4096)
def is_allowed(allowed: tuple[str, ...], denied: tuple[str, ...], model: str) -> bool:
    if any(fits(pattern, model) for pattern in denied):
        return False
    return not allowed or any(fits(pattern, model) for pattern in allowed)
