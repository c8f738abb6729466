"""The accounts together: who serves next, and what a failure means for whom.

Every decision is synchronous: nothing else runs between looking and taking, so there is no
lock. What a failure does to an account is one `match` over its verdict (`Pool.failed`).
"""

import dataclasses
import logging
import math
import random
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

from codex_proxy.accounts.account import BACKOFF, REPROBE, Account, Cause, Strikes
from codex_proxy.accounts.affinity import Affinity, Origins
from codex_proxy.accounts.quota import MAIN_FAMILY, Window, reset_time
from codex_proxy.accounts.scheduler import Ask, QuotaBalance, Strategy
from codex_proxy.accounts.state import Signal, State
from codex_proxy.accounts.store import Credential, Problem, Scan
from codex_proxy.clock import Clock
from codex_proxy.errors import (
    PoolEmpty,
    PoolError,
    PoolExhausted,
    PoolShortage,
    RequestError,
    UpstreamError,
    Verdict,
)
from codex_proxy.protocol.wire import JsonObject

logger = logging.getLogger(__name__)

# How long "this account lacks this model" is believed.
REFUSAL_SECONDS = 3_600.0

# Failures that speak of the way to the backend, seen on several accounts within this time,
# are the way's fault.
EGRESS_WINDOW = 30.0

_DAY_MINUTES = 24 * 60
"""Which windows are the short ones: a plan has one of hours and one of days."""

_SERVING = frozenset({State.READY, State.COOLING})
"""The states of accounts that serve, now or after a rest."""

_CAUSES: dict[Verdict, Cause] = {
    Verdict.LIMITED: Cause.RATE,
    Verdict.OVERLOADED: Cause.OVERLOAD,
    Verdict.SERVER: Cause.SERVER,
    Verdict.FORBIDDEN: Cause.FORBIDDEN,
    Verdict.UNAUTHORIZED: Cause.REJECTED,
    Verdict.SILENT: Cause.SILENT,
    Verdict.CUT: Cause.CUT,
}


@dataclass(slots=True, frozen=True)
class Want:
    """What a request needs of an account."""

    model: str
    endpoint: str = "responses"
    session: str | None = None
    prefer: str | None = None
    """The key of the account that the caller's turn is bound to."""
    compacted: tuple[str, ...] = ()
    """Encrypted history, which only the account that wrote it can read."""
    encrypted: tuple[str, ...] = ()
    """Encrypted reasoning, which others can do without."""
    tokens: int = 0
    """About how many input tokens it carries."""
    is_opening: bool = False
    """Whether `session` is only to be remembered: many conversations may begin alike."""

    @property
    def refusal(self) -> str:
        """The name under which an account's "I lack this" is remembered."""
        return f"{self.endpoint} {self.model}"

    @property
    def counted(self) -> str:
        """What a limit is learned for: the model, or the endpoint where a request names none."""
        return self.model or self.endpoint


class Lease:
    """The right to send one request with one account; reported once, released once."""

    __slots__ = ("_pool", "_released", "_reported", "account", "started", "want", "why")

    def __init__(self, pool: "Pool", account: Account, want: Want, why: str, started: float) -> None:
        self._pool = pool
        self._released = False
        self._reported = False
        self.account = account
        self.want = want
        self.why = why
        self.started = started
        """Monotonic seconds."""

    def ok(self) -> None:
        """Report that the account answered."""
        if not self._reported:
            self._reported = True
            self._pool.succeeded(self)
            if self.want.compacted or self.want.encrypted:
                # Nobody asks again, and a long stream need not hold a long conversation's items.
                self.want = dataclasses.replace(self.want, compacted=(), encrypted=())

    def failed(self, error: UpstreamError) -> None:
        """Report a failure; one that follows an `ok` (a late one) counts too."""
        self._reported = True
        self._pool.failed(self, error)

    def release(self) -> None:
        """Give the account back; only the first call counts."""
        if not self._released:
            self._released = True
            self.account.in_flight -= 1


class Pool:
    """All accounts, by identity.

    Args:
        clock: Where times come from.
        jitter: Where randomness comes from; 0..1.
        strategy: How one of several good accounts is chosen.
    """

    def __init__(
        self, clock: Clock, *, rng: random.Random | None = None, strategy: Strategy | None = None
    ) -> None:
        self._clock = clock
        self._rng = rng if rng is not None else random.Random()
        self._strategy: Strategy = strategy if strategy is not None else QuotaBalance()
        self._accounts: dict[str, Account] = {}
        self._aliases: dict[str, Account] = {}
        self._affinity = Affinity()
        self.origins = Origins()
        self._families: dict[str, str] = {}
        """Which limit a model (or an endpoint without one) counts on, learned from refusals."""
        self._listed: frozenset[str] = frozenset()
        self._lists: list[list[JsonObject]] = []
        self._path_faults: dict[str, float] = {}
        self._egress_told = float("-inf")
        self.problems: list[Problem] = []
        self.lists_version = 0
        """Moves when any account's model list does."""

    def __iter__(self) -> Iterator[Account]:
        return iter(list(self._accounts.values()))

    def __len__(self) -> int:
        return len(self._accounts)

    def accounts(self) -> list[Account]:
        """Return all accounts, their states brought up to date."""
        now = self._clock.now()
        for account in self._accounts.values():
            self._settle(account, now)
        return list(self._accounts.values())

    def get(self, key: str) -> Account | None:
        """Return the account of that identity."""
        return self._accounts.get(key)

    def by_alias(self, alias: str) -> Account | None:
        """Return the account of that name."""
        return self._aliases.get(alias)

    def by_tag(self, tag: str) -> Account | None:
        """Return the account whose identity starts with *tag*."""
        return next((a for a in self._accounts.values() if a.key.startswith(tag)), None) if tag else None

    # -- loading --------------------------------------------------------------------------

    def apply(self, scan: Scan) -> None:
        """Make the accounts what the files say: new ones come, changed ones follow, gone ones go.

        A file that cannot be read now is not gone: somebody may be writing it, and what is
        known of its account (tokens, cooldowns, quota) would be lost.
        """
        self.problems = list(scan.problems)
        seen: set[str] = set()
        for credential in scan.credentials:
            seen.add(credential.key)
            account = self._accounts.get(credential.key)
            if account is None:
                self._add(credential)
            elif account.refreshing is None:
                self.adopt(account, credential)
        removed = False
        for key in [key for key in self._accounts if key not in seen]:
            account = self._accounts[key]
            if account.refreshing is not None or _may_come_back(account, scan):
                # The next look at the folder decides.
                continue
            account.removed = True
            del self._accounts[key]
            self._aliases.pop(account.alias, None)
            removed = True
            logger.info("account removed alias=%s in_flight=%d", account.alias, account.in_flight)
        if removed:
            self._relist()
        for credential in scan.credentials:
            self._name(self._accounts[credential.key], credential)

    def adopt(self, account: Account, credential: Credential) -> bool:
        """Take over what the account's file says; True when its tokens are other ones."""
        old = account.credential
        if credential.refresh and credential.refresh.digest() in old.superseded:
            # The file, or a look at it before our save, still shows what we have spent.
            return False
        if credential.refresh == old.refresh:
            if account.unsaved and not credential.is_unsaved:
                # The exchange brought an access token only, and the file could not take it.
                return False
            # What no file says goes on being known.
            credential.superseded |= old.superseded
        account.unsaved = credential.is_unsaved
        account.credential = credential
        now = self._clock.now()
        if credential.disabled != (account.state is State.DISABLED):
            self._signal(account, Signal.SWITCHED_OFF if credential.disabled else Signal.SWITCHED_ON, now)
        if _same_tokens(old, credential):
            return False
        self.refreshed(account)
        logger.info("account tokens changed in its file alias=%s", account.alias)
        return True

    def _add(self, credential: Credential) -> None:
        account = Account(credential, credential.default_alias)
        self._name(account, credential)
        account.unsaved = credential.is_unsaved
        account.quota.plan = credential.identity.plan
        self._accounts[credential.key] = account
        if credential.disabled:
            account.signal(Signal.SWITCHED_OFF)
        self._settle(account, self._clock.now())
        logger.info("account loaded alias=%s state=%s", account.alias, account.state.value)

    def _name(self, account: Account, credential: Credential) -> None:
        """Call an account what its file says, or else after its identity; no two are called the same."""
        wish = credential.alias or credential.default_alias
        alias, number = wish, 2
        while self._aliases.get(alias, account) is not account:
            alias, number = f"{wish}-{number}", number + 1
        if self._aliases.get(account.alias) is account:
            del self._aliases[account.alias]
        account.alias = alias
        self._aliases[alias] = account

    # -- choosing -------------------------------------------------------------------------

    def pick(self, want: Want, exclude: Collection[str] = ()) -> Lease:
        """Take an account for one request.

        The account of the caller's turn comes first, then that of the conversation, then the
        strategy's choice.

        Raises:
            PoolError: If none can serve now; it says when one can.
            RequestError: If every account lacks the model.
        """
        now = self._clock.now()
        account, why = self._bound(want, exclude, now) or self._best(want, exclude, now)
        account.in_flight += 1
        account.total_requests += 1
        account.last_used = now
        return Lease(self, account, want, why, self._clock.monotonic())

    def _bound(self, want: Want, exclude: Collection[str], now: float) -> tuple[Account, str] | None:
        """Choose the account that a request belongs to, without a look at all the others."""
        for key, why in self._bonds(want, now):
            account = self._accounts.get(key) if key is not None else None
            if account is not None and self._can_serve(account, want, exclude, now):
                return account, why
        return None

    def _best(self, want: Want, exclude: Collection[str], now: float) -> tuple[Account, str]:
        ready = [a for a in self._accounts.values() if self._can_serve(a, want, exclude, now)]
        if not ready:
            raise self._nobody(want, now)
        # A caller need not wait for an exchange while another account's token is good.
        fresh = [account for account in ready if account.access_is_valid(now)]
        choice = self._strategy.choose(fresh or ready, Ask(self._families.get(want.counted)), now)
        return choice.account, choice.rule

    def _bonds(self, want: Want, now: float) -> Iterator[tuple[str | None, str]]:
        """Name the accounts that a request belongs to, the strongest bond first."""
        if want.prefer is not None:
            yield want.prefer, "turn state"
        if want.compacted:
            yield self.origins.of(want.compacted[-1], now), "compacted history"
        if want.session is not None and not want.is_opening:
            yield self._affinity.find(want.session, now), "conversation"
        if want.encrypted:
            # A caller that names no conversation still carries its last account's reasoning.
            yield self.origins.of(want.encrypted[-1], now), "reasoning"

    def _can_serve(self, account: Account, want: Want, exclude: Collection[str], now: float) -> bool:
        self._settle(account, now)
        return (
            account.state is State.READY
            and account.key not in exclude
            and self._has(account, want)
            and self._family_hold(account, want, now) is None
        )

    def _has(self, account: Account, want: Want) -> bool:
        if account.refusals and want.refusal in account.refusals:
            return False
        return (
            not want.model
            or account.models is None
            or want.model in account.models
            # What no list names may still be served: lists lag behind.
            or want.model not in self._listed
        )

    def _family_hold(self, account: Account, want: Want, now: float) -> float | None:
        if not account.family_holds:
            return None
        family = self._families.get(want.counted)
        until = account.family_holds.get(family) if family is not None else None
        return until if until is not None and until > now else None

    def _nobody(self, want: Want, now: float) -> PoolError | RequestError:
        if not self._accounts:
            return PoolEmpty("no account is loaded: put account files into the auth-dir")
        usable = [a for a in self._accounts.values() if a.state in _SERVING]
        if not usable:
            counts: dict[str, int] = {}
            for account in self._accounts.values():
                counts[account.state.value] = counts.get(account.state.value, 0) + 1
            states = ", ".join(f"{number} {state}" for state, number in sorted(counts.items()))
            return PoolEmpty(f"no account can serve without help: {states}; see /stats for the reasons")
        able = [a for a in usable if self._has(a, want)]
        if not able:
            if any(want.model in (a.models or ()) for a in self._accounts.values() if a not in usable):
                return PoolEmpty(f"no account that has the model {want.model!r} can serve without help")
            return self._no_model(want)
        owner = self._resting_owner(want, able, now)
        error = self._shortage([owner] if owner is not None else able, want, now)
        error.is_for_history = owner is not None
        return error

    def _resting_owner(self, want: Want, able: list[Account], now: float) -> Account | None:
        """Return the account that wrote the history, if it rests: the others cannot stand in for it."""
        key = self.origins.of(want.compacted[-1], now) if want.compacted else None
        return next(
            (
                account
                for account in able
                if account.key == key
                and (account.state is State.COOLING or self._family_hold(account, want, now) is not None)
            ),
            None,
        )

    def _shortage(self, able: list[Account], want: Want, now: float) -> PoolError:
        limits: list[float] = []
        passing: list[float] = []
        for account in able:
            cause = account.cooling_cause()
            until = account.cooling_until()
            family = self._family_hold(account, want, now)
            if until is not None and (family is None or until >= family):
                (limits if cause is Cause.LIMIT else passing).append(until)
            elif family is not None:
                limits.append(family)
            else:
                # Ready, but tried in vain for this request.
                passing.append(now + 1.0)
        if passing and (not limits or min(passing) <= min(limits)):
            return PoolShortage(
                "every account that could serve this is busy or in passing trouble; try again in a moment",
                retry_after=max(0.0, min(passing) - now),
            )
        resets_at = min(limits)
        return PoolExhausted(
            "the usage limit of every account that could serve this has been reached; "
            f"the first is free again in {_in_words(resets_at - now)}",
            resets_at=resets_at,
            retry_after=max(0.0, resets_at - now),
        )

    def _no_model(self, want: Want) -> RequestError:
        if not want.model:
            return RequestError(f"no account's backend serves {want.endpoint}", code="not_supported")
        served = sorted(self._listed - {want.model})
        names = f"; they serve: {', '.join(served)}" if served else ""
        return RequestError(
            f"the model {want.model!r} is not available on any of the accounts{names}",
            param="model",
            code="model_not_found",
        )

    # -- what happened --------------------------------------------------------------------

    def succeeded(self, lease: Lease) -> None:
        """Note that an account answered: its conversation stays, old failures are forgotten."""
        account, now = lease.account, self._clock.now()
        before = account.state
        account.succeeded(lease.started)
        self._note(account, before, now)
        account.last_error = ""
        self._path_faults.clear()
        if lease.want.session is not None:
            self._affinity.bind(lease.want.session, account.key, now)
        for content in lease.want.compacted:
            # It could read that, so it wrote it, also before we were started.
            self.origins.issued(content, account.key, now)

    def spent(self, account: Account, cost: float) -> None:
        """Note what a turn on *account* cost, in uncached input tokens' worth."""
        self._strategy.spent(account, cost, self._clock.now())

    def failed(self, lease: Lease, error: UpstreamError) -> None:
        """Draw the consequences of a failure for its account, and for nobody else."""
        account, now = lease.account, self._clock.now()
        match error.verdict:
            case Verdict.CALLER | Verdict.ENCRYPTED:
                return
            case Verdict.MODEL:
                account.refusals[lease.want.refusal] = now + REFUSAL_SECONDS
                logger.info("account lacks model alias=%s model=%s", account.alias, lease.want.model)
                return
            case Verdict.UNENTITLED:
                self._unentitled(account, lease, error, now)
            case Verdict.EXHAUSTED:
                self._exhausted(account, lease, error, now)
            case Verdict.PATH:
                self._path_fault(account, lease, error, now)
            case (
                Verdict.LIMITED
                | Verdict.OVERLOADED
                | Verdict.SERVER
                | Verdict.FORBIDDEN
                | Verdict.UNAUTHORIZED
                | Verdict.SILENT
                | Verdict.CUT
            ):
                self._cool(account, _CAUSES[error.verdict], lease, error, now)
        account.total_errors += 1
        account.last_error = f"{error.verdict.value} {error.fault.code or error.fault.type or error.status}"

    def _exhausted(self, account: Account, lease: Lease, error: UpstreamError, now: float) -> None:
        family = error.limit_family or MAIN_FAMILY
        until = reset_time(error.resets_at, None, now)
        if until is None:
            known = account.quota.families.get(family)
            until = known.spent_until(now) if known is not None else None
        if family != MAIN_FAMILY:
            self._families[lease.want.counted] = family
            if until is None:
                until = now + (error.retry_after or BACKOFF[Cause.LIMIT].seconds(1, self._rng.random()))
            account.family_holds[family] = max(until, account.family_holds.get(family, 0.0))
            logger.info("account limit alias=%s family=%s seconds=%.0f", account.alias, family, until - now)
            return
        self._cool(account, Cause.LIMIT, lease, error, now, until)

    def _unentitled(self, account: Account, lease: Lease, error: UpstreamError, now: float) -> None:
        before = account.state
        if account.unavailable_until <= now:
            account.unavailable_count += 1
        pause = REPROBE.seconds(account.unavailable_count, self._rng.random())
        account.unavailable_until = max(account.unavailable_until, now + pause)
        account.unavailable_reason = error.fault.code or error.fault.type or f"status {error.status}"
        account.signal(Signal.UNENTITLED)
        self._note(account, before, now)

    def _cool(
        self,
        account: Account,
        cause: Cause,
        lease: Lease,
        error: UpstreamError,
        now: float,
        until: float | None = None,
    ) -> None:
        strikes = account.strikes.setdefault(cause, Strikes())
        counted = strikes.add(lease.started, self._clock.monotonic())
        if until is None and error.retry_after is not None:
            until = reset_time(None, error.retry_after, now)
        if until is None:
            if not counted and cause in account.holds:
                # One of many that failed together: the first has said it all.
                return
            until = now + BACKOFF[cause].seconds(strikes.count, self._rng.random())
        before = account.state
        account.hold(cause, until)
        self._note(account, before, now)

    def _path_fault(self, account: Account, lease: Lease, error: UpstreamError, now: float) -> None:
        self._path_faults = {k: t for k, t in self._path_faults.items() if now - t < EGRESS_WINDOW}
        self._path_faults[account.key] = now
        others = [a for a in self._accounts.values() if a is not account and a.state in _SERVING]
        if len(self._path_faults) > 1 or not others:
            # The same failure from several accounts (or from the only one): the way there is
            # broken, and resting accounts would not mend it.
            for key in self._path_faults:
                other = self._accounts.get(key)
                if other is not None:
                    before = other.state
                    other.absolve(Cause.PATH)
                    self._note(other, before, now)
            if self._clock.monotonic() - self._egress_told >= EGRESS_WINDOW:
                # Not once per attempt: then every attempt of every caller fails so.
                self._egress_told = self._clock.monotonic()
                logger.warning("the way to the backend fails accounts=%d", len(self._path_faults))
            return
        self._cool(account, Cause.PATH, lease, error, now)

    def refreshed(self, account: Account) -> None:
        """Note that an account has new tokens; its cooldowns stay."""
        before = account.state
        account.login_lost = ""
        account.rejected = ""
        account.refresh_after = 0.0
        account.refresh_failures = 0
        account.holds.pop(Cause.REJECTED, None)
        account.signal(Signal.REFRESHED)
        account.settle(self._clock.now())
        self._note(account, before, self._clock.now())

    def login_lost(self, account: Account, reason: str) -> None:
        """Note that an account's refresh token is dead; its access token may serve to its end."""
        before = account.state
        account.login_lost = reason
        account.settle(self._clock.now())
        logger.warning("account login lost alias=%s reason=%s", account.alias, reason)
        self._note(account, before, self._clock.now())

    def reject(self, account: Account) -> None:
        """Note that the backend refused an account's access token."""
        before = account.state
        account.rejected = account.credential.access.digest()
        account.settle(self._clock.now())
        self._note(account, before, self._clock.now())

    def read_headers(self, account: Account, headers: Mapping[str, str]) -> None:
        """Take quota and model-list news from an answer's headers."""
        account.quota.read_headers(headers, self._clock.now())
        etag = headers.get("x-models-etag")
        if etag and etag != account.models_etag:
            if account.models_etag:
                # The list changed since we read it.
                account.models_at = None
            account.models_etag = etag

    def set_models(self, account: Account, objects: list[JsonObject]) -> None:
        """Note an account's model list.

        Most accounts have the same one, which is large: it is kept once, and only a list that
        nobody has had makes the catalogue anew.
        """
        known = next((one for one in self._lists if one == objects), None)
        is_news = known is None or (account.models is not None and account.model_objects is not known)
        account.model_objects = objects if known is None else known
        account.models = frozenset(o["slug"] for o in objects if isinstance(o.get("slug"), str))
        account.models_at = self._clock.now()
        if is_news:
            self._relist()
        for name in account.models:
            account.refusals.pop(f"responses {name}", None)

    def _relist(self) -> None:
        self.lists_version += 1
        accounts = self._accounts.values()
        self._listed = frozenset().union(*{a.models for a in accounts if a.models is not None})
        self._lists = list(
            {id(a.model_objects): a.model_objects for a in accounts if a.model_objects}.values()
        )

    def model_lists(self) -> list[list[JsonObject]]:
        """Return the model lists that accounts have, each once."""
        return self._lists

    def pool_limits(self) -> JsonObject | None:
        """Return the pool's quota as one `codex.rate_limits` event; None when nothing is known.

        The mean over all accounts, and the earliest reset: one account's 98 % is not its
        caller's trouble.
        """
        now = self._clock.now()
        short: list[Window] = []
        long: list[Window] = []
        for account in self._accounts.values():
            family = account.quota.families.get(MAIN_FAMILY)
            if family is None or account.state in (State.DISABLED, State.NEEDS_LOGIN):
                continue
            for window in (family.primary, family.secondary):
                if window is not None and window.minutes is not None:
                    (short if window.minutes <= _DAY_MINUTES else long).append(window)
        if not short and not long:
            return None
        return {
            "type": "codex.rate_limits",
            "plan_type": None,
            "metered_limit_name": None,
            "limit_name": None,
            "rate_limits": {
                "allowed": True,
                "limit_reached": False,
                "primary": _mean(short, now),
                "secondary": _mean(long, now),
            },
            "code_review_rate_limits": None,
            "credits": None,
            "promo": None,
        }

    # -- helpers --------------------------------------------------------------------------

    def _settle(self, account: Account, now: float) -> None:
        before = account.state
        if account.settle(now):
            self._note(account, before, now)

    def _signal(self, account: Account, signal: Signal, now: float) -> None:
        before = account.state
        account.signal(signal)
        account.settle(now)
        self._note(account, before, now)

    def _note(self, account: Account, before: State, now: float) -> None:
        if account.state is before:
            return
        until = account.cooling_until() if account.state is State.COOLING else None
        logger.info(
            "account state alias=%s from=%s to=%s reason=%s seconds=%.0f",
            account.alias,
            before.value,
            account.state.value,
            account.reason() or "-",
            until - now if until is not None else 0.0,
        )


def _may_come_back(account: Account, scan: Scan) -> bool:
    """Tell whether the file of an account was not found out about, or the whole folder was not."""
    path = account.credential.path
    return any(
        problem.skipped and not problem.is_final and problem.path in (path, path.parent)
        for problem in scan.problems
    )


def _mean(windows: list[Window], now: float) -> JsonObject | None:
    if not windows:
        return None
    used = [0.0 if window.is_over(now) else min(100.0, window.used_percent) for window in windows]
    resets = [w.resets_at for w in windows if w.resets_at is not None and w.resets_at > now]
    entry: JsonObject = {
        "used_percent": round(sum(used) / len(used)),
        "window_minutes": max(window.minutes or 0 for window in windows),
    }
    if resets:
        entry["reset_at"] = int(min(resets))
        entry["reset_after_seconds"] = int(min(resets) - now)
    return entry


def _same_tokens(one: Credential, other: Credential) -> bool:
    return one.access == other.access and one.refresh == other.refresh


def _in_words(seconds: float) -> str:
    """Return a time as people say it, rounded up; clients show it, and not all of them know the headers."""
    minutes = max(1, math.ceil(seconds / 60))
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days} d {hours} h" if hours else f"{days} d"
    if hours:
        return f"{hours} h {minutes} min" if minutes else f"{hours} h"
    return f"{minutes} min"
