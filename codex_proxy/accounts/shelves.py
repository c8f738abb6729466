"""All accounts of a pool by what decides whether they can serve, kept up to date by what has changed: pure.

The rules are `Pool`'s, which looks at each account where there are few. Here an account is looked at again
when it has changed (`Account.touch`), or at the next moment at which time alone changes something about it:
a cooldown, a refusal or a trial ends, a token or a window is over. What a rule needs of a request is asked
of a shelf, not of each account on it.
"""

from collections.abc import Callable, Iterator
from math import inf
from typing import NamedTuple, Protocol

from codex_proxy.accounts.account import REFUSAL_SECONDS, TRIAL_SECONDS, Account, Cause, is_allowed
from codex_proxy.accounts.crowd import Ranked, Shelf
from codex_proxy.accounts.dues import Dues
from codex_proxy.accounts.quota import MAX_LATE_SECONDS
from codex_proxy.accounts.state import State
from codex_proxy.accounts.telling import OF_STATE, Rule


class Need(Protocol):
    """What a request asks of an account."""

    model: str

    @property
    def refusal(self) -> str:
        """The name under which it is remembered that an account lacks this."""
        ...


class Profile(NamedTuple):
    """What the accounts of a shelf are alike in."""

    rule: Rule | None
    """That of its state; the rest is of no matter then, but for a cooling one's limits."""
    at_limit: bool = False
    """Of a cooling one: whether it is its usage limit that ends last."""
    families: frozenset[str] | None = None
    """The limits beside the main one that are reached."""
    allowed: tuple[str, ...] = ()
    denied: tuple[str, ...] = ()
    models: frozenset[str] | None = None
    refusals: frozenset[str] | None = None
    closed: Rule | None = None
    """Why it can take nobody now."""
    priority: int = 0
    is_fresh: bool = True
    """Whether its token can be sent as it is."""

    def lacks(self, need: Need, *, is_listed: bool) -> Rule | None:
        """Return the rule by which these accounts can never serve such a request, as they are now.

        Args:
            is_listed: Whether any account's list names the model; what none does may still be served.
        """
        if self.rule is not None:
            return self.rule
        if (self.allowed or self.denied) and not is_allowed(self.allowed, self.denied, need.model):
            return Rule.NOT_ALLOWED
        if self.refusals is not None and need.refusal in self.refusals:
            return Rule.LACKS_MODEL
        if is_listed and self.models is not None and need.model not in self.models:
            return Rule.LACKS_MODEL
        return None

    def refuses(self, family: str | None) -> Rule | None:
        """Return the rule by which these accounts cannot serve now, though they could, what counts on *family*."""
        if self.families is not None and family in self.families:
            return Rule.FAMILY_LIMIT
        return self.closed


def _until(account: Account, now: float) -> tuple[float]:
    return (account.cooling_until() or now,)


class Shelves:
    """The accounts of a pool on their shelves.

    Args:
        settle: Brings an account's state up to date with the clock.
        most: Returns how many requests an account may carry at a time; 0: any number.
    """

    def __init__(self, settle: Callable[[Account, float], object], most: Callable[[Account], int]) -> None:
        self._settle = settle
        self._most = most
        self._shelves: dict[Profile, Shelf] = {}
        self._shelf_of: dict[int, Shelf] = {}
        self._accounts: dict[int, Account] = {}
        self._changed: list[Account] = []
        self._dues = Dues()
        self._trials = Dues()
        """By the monotonic clock."""
        self._now = -inf
        self.looks = 0
        """How often an account was looked at."""

    def __iter__(self) -> Iterator[Shelf]:
        return iter(self._shelves.values())

    def add(self, account: Account) -> None:
        """Take in an account that has come."""
        self._accounts[account.place] = account
        self._changed.append(account)

    def remove(self, account: Account) -> None:
        """Leave out one that has gone."""
        del self._accounts[account.place]
        self.lift(account)
        self._dues.set(account.place, inf)
        self._trials.set(account.place, inf)

    def lift(self, account: Account) -> None:
        """Take an account off its shelf until the next look, because what orders know of it changes otherwise."""
        shelf = self._shelf_of.pop(account.place, None)
        if shelf is not None:
            self._take_off(shelf, account)
        account.filed, account.has_changed = None, True
        self._changed.append(account)

    def clear(self) -> None:
        """Take all accounts off their shelves."""
        for account in self._accounts.values():
            self.lift(account)

    def of(self, account: Account) -> Shelf:
        """Return the shelf on which an account stands."""
        return self._shelf_of[account.place]

    def refresh(self, now: float, monotonic: float) -> None:
        """Bring all that has changed up to date."""
        changed = self._changed
        if now < self._now:
            # What is over by one clock may not be by another.
            changed += self._accounts.values()
            for account in self._accounts.values():
                account.filed, account.has_changed = None, True
        self._now = now
        if self._dues.first() <= now:
            self._come_due(self._dues.pop(now))
        if self._trials.first() <= monotonic:
            self._come_due(self._trials.pop(monotonic))
        if changed:
            batch = changed[:]
            changed.clear()
            for account in batch:
                if account.filed is None and account.place in self._accounts:
                    if account.has_changed or not self._again(account, now):
                        self._file(account, now, monotonic)
                    account.filed = changed

    def _come_due(self, places: Iterator[int]) -> None:
        for place in places:
            account = self._accounts[place]
            account.filed, account.has_changed = None, True
            self._changed.append(account)

    def _again(self, account: Account, now: float) -> bool:
        """Give an account its places in orders anew that carries more or less; False when it may be full, or on trial."""
        shelf = self._shelf_of.get(account.place)
        if (
            shelf is None
            or account.on_trial
            or shelf.profile.closed is not None
            or (self._most(account) and account.state is State.READY)
        ):
            return False
        self.looks += 1
        shelf.again(account, now)
        return True

    def _file(self, account: Account, now: float, monotonic: float) -> None:
        self.looks += 1
        self._settle(account, now)
        place = account.place
        profile = self._profile(account, now, monotonic)
        before = self._shelf_of.get(place)
        if before is not None and before.profile == profile:
            before.again(account, now)
        else:
            if before is not None:
                self._take_off(before, account)
            shelf = self._shelves.get(profile)
            if shelf is None:
                shelf = self._shelves[profile] = Shelf(profile)
            shelf.add(account, now)
            self._shelf_of[place] = shelf
        since = account.trial_since if profile.closed is Rule.ON_TRIAL else None
        self._trials.set(place, since + TRIAL_SECONDS if since is not None else inf)
        self._dues.set(place, _next_change(account, now))
        account.has_changed = False

    def _take_off(self, shelf: Shelf, account: Account) -> None:
        shelf.remove(account)
        if not shelf:
            del self._shelves[shelf.profile]

    def _profile(self, account: Account, now: float, monotonic: float) -> Profile:
        families = frozenset(account.family_holds) if account.family_holds else None
        if account.state is not State.READY:
            rule = OF_STATE[account.state]
            if rule is not Rule.COOLING:
                return Profile(rule)
            return Profile(rule, account.cooling_cause() is Cause.LIMIT, families)
        credential = account.credential
        refusals = (
            frozenset(name for name in account.refusals if account.lacks(name, now))
            if account.refusals
            else None
        )
        most = self._most(account)
        closed: Rule | None = None
        if most and account.in_flight >= most:
            closed = Rule.BUSY
        elif account.on_trial and account.trial_left(monotonic) > 0.0:
            closed = Rule.ON_TRIAL
        return Profile(
            None,
            False,
            families,
            credential.models_allowed,
            credential.models_denied,
            account.models,
            refusals,
            closed,
            credential.priority,
            account.access_is_valid(now),
        )


def cooled(shelf: Shelf, now: float) -> Ranked:
    """Return the order of a shelf of cooling accounts by when each is free."""
    order: Ranked = shelf.order("until", lambda: Ranked(_until), now)
    return order


def _next_change(account: Account, now: float) -> float:
    """Return when time alone changes something about an account."""
    first = inf
    credential = account.credential
    if credential.expires_at is not None and now < credential.expires_at:
        first = credential.expires_at
    if now < account.unavailable_until < first:
        first = account.unavailable_until
    for holds in (account.holds, account.family_holds):
        for until in holds.values():
            if now < until < first:
                first = until
    for until in account.refusals.values():
        # One that ends too late is that of a clock that was wrong, until it is near enough.
        for moment in (until - REFUSAL_SECONDS, until):
            if now < moment < first:
                first = moment
    for family in account.quota.families.values():
        for window in (family.primary, family.secondary):
            if window is not None:
                for moment in (window.ends_at, window.seen_at - MAX_LATE_SECONDS):
                    if now < moment < first:
                        first = moment
    return first
