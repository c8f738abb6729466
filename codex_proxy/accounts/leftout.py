"""Those who could not serve a request: who, why, and for how long. Pure.

Of few accounts there is a list; of many there are shelves, and nothing is asked of each account on them that
can be asked of the shelf.
"""

import heapq
import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import inf
from typing import Protocol

from codex_proxy.accounts.account import Account, Cause
from codex_proxy.accounts.crowd import Shelf
from codex_proxy.accounts.shelves import cooled
from codex_proxy.accounts.telling import EXCLUSIONS_TOLD, PASSING_RULES, Excluded, Rule

LACKING = (Rule.LACKS_MODEL, Rule.NOT_ALLOWED)


@dataclass(slots=True)
class Wait:
    """What is to be waited for, of those that time alone brings back."""

    now: float
    monotonic: float
    family: str | None
    """The limit that counts for the request beside the main one."""
    is_any: bool = False
    is_untried: bool = False
    """Whether one of them has not been tried for this request."""
    is_full: bool = False
    """Whether one carries all it may."""
    is_on_trial: bool = False
    limit: float = inf
    """When the first comes back whose limit is reached."""
    passing: float = inf
    """When the first of the others does."""

    def note(self, account: Account, rule: Rule) -> None:
        """Take in one of them; those of other rules are none."""
        if rule not in PASSING_RULES:
            return
        self.is_any = True
        self.is_untried |= rule is not Rule.TRIED
        until = account.cooling_until()
        family = account.family_holds.get(self.family) if self.family is not None else None
        if family is not None and family <= self.now:
            family = None
        if rule is Rule.BUSY:
            self.is_full = True
        elif rule is Rule.ON_TRIAL:
            self.is_on_trial = True
            self.passing = min(self.passing, self.now + account.trial_left(self.monotonic))
        elif until is not None and (family is None or until >= family):
            self.cools(until, at_limit=account.cooling_cause() is Cause.LIMIT)
        elif family is not None:
            self.limit = min(self.limit, family)
        else:
            # Ready, but tried in vain for this request.
            self.passing = min(self.passing, self.now + 1.0)

    def cools(self, until: float, *, at_limit: bool) -> None:
        """Take in that somebody rests until then."""
        self.is_any = self.is_untried = True
        if at_limit:
            self.limit = min(self.limit, until)
        else:
            self.passing = min(self.passing, until)


class LeftOut(Protocol):
    """Who could not serve a request, in the order of the accounts."""

    def __bool__(self) -> bool: ...

    def some(self) -> Sequence[Excluded]:
        """Return the first few."""
        ...

    def counts(self) -> Sequence[tuple[Rule, int]]:
        """Return how many each rule left out, in the order in which the rules come first."""
        ...

    def wait(self, wait: Wait) -> Wait:
        """Return *wait* with all of them taken in."""
        ...

    def others(self) -> Iterator[Account]:
        """Return those who do not lack what was asked for."""
        ...


class Listed:
    """Some that were looked at one by one."""

    __slots__ = ("excluded",)

    def __init__(self, excluded: list[Excluded]) -> None:
        self.excluded = excluded

    def __bool__(self) -> bool:
        return bool(self.excluded)

    def some(self) -> Sequence[Excluded]:
        return self.excluded[:EXCLUSIONS_TOLD]

    def counts(self) -> Sequence[tuple[Rule, int]]:
        return list(Counter(rule for _, rule in self.excluded).items()) if self.excluded else ()

    def wait(self, wait: Wait) -> Wait:
        for account, rule in self.excluded:
            wait.note(account, rule)
        return wait

    def others(self) -> Iterator[Account]:
        return (account for account, rule in self.excluded if rule not in LACKING)


class Shelved:
    """Whole shelves, but for those on them that were tried for the request.

    Args:
        closed: Shelves that could not serve.
        tried: Accounts that could have, if they had not been tried; by place.
        lesser: Shelves that could have served too, but worse than others; told after all others.
        guest: One on these that may serve all the same.
    """

    __slots__ = ("_closed", "_guest", "_lesser", "_tried")

    def __init__(
        self,
        closed: Sequence[tuple[Shelf, Rule]],
        tried: Mapping[int, Account],
        lesser: Sequence[tuple[Shelf, Rule]] = (),
        guest: Account | None = None,
    ) -> None:
        self._closed = closed
        self._tried = tried
        self._lesser = lesser
        self._guest = guest

    def __bool__(self) -> bool:
        return bool(self._closed or self._tried or self._lesser)

    def some(self) -> Sequence[Excluded]:
        tried = ((place, account, Rule.TRIED) for place, account in sorted(self._tried.items()))
        closed = self._on([*self._closed])
        both = heapq.merge(tried, *closed, key=_place_of)
        told = itertools.chain(both, heapq.merge(*self._on([*self._lesser]), key=_place_of))
        return [(account, rule) for _, account, rule in itertools.islice(told, EXCLUSIONS_TOLD)]

    def _on(self, shelves: Iterable[tuple[Shelf, Rule]]) -> list[Iterator[tuple[int, Account, Rule]]]:
        return [self._members(shelf, rule) for shelf, rule in shelves]

    def _members(self, shelf: Shelf, rule: Rule) -> Iterator[tuple[int, Account, Rule]]:
        for place in shelf.places:
            account = shelf.members[place]
            if place not in self._tried and account is not self._guest:
                yield place, account, rule

    def counts(self) -> Sequence[tuple[Rule, int]]:
        found: list[tuple[Rule, int]] = []
        for some, is_first in ((self._closed, True), (self._lesser, False)):
            count: Counter[Rule] = Counter()
            begins: dict[Rule, int] = {}
            if is_first and self._tried:
                count[Rule.TRIED], begins[Rule.TRIED] = len(self._tried), min(self._tried)
            for shelf, rule in some:
                first = next(self._members(shelf, rule), None)
                if first is None:
                    continue
                count[rule] += len(shelf) - sum(place in shelf.members for place in self._tried)
                if self._guest is not None and self._guest.place in shelf.members:
                    count[rule] -= 1
                begins[rule] = min(begins.get(rule, first[0]), first[0])
            found += sorted(count.items(), key=lambda one: begins[one[0]])
        return found

    def wait(self, wait: Wait) -> Wait:
        for account in self._tried.values():
            wait.note(account, Rule.TRIED)
        for shelf, rule in self._closed:
            if rule is Rule.COOLING and wait.family not in (shelf.profile.families or ()):
                first = cooled(shelf, wait.now).first()
                assert first is not None
                wait.cools(first[0][0], at_limit=shelf.profile.at_limit)
            elif rule in PASSING_RULES:
                for _, account, _ in self._members(shelf, rule):
                    wait.note(account, rule)
                    if rule is Rule.BUSY:
                        # One says it for all.
                        break
        return wait

    def others(self) -> Iterator[Account]:
        yield from self._tried.values()
        for shelf, rule in self._closed:
            if rule not in LACKING:
                yield from (account for _, account, _ in self._members(shelf, rule))


def _place_of(one: tuple[int, Account, Rule]) -> int:
    return one[0]
