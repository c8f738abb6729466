"""Why an account was chosen, and why others could not be: noted at once, put into words when somebody asks. Pure.

A choice is made for every turn, and few are ever asked for. What is noted are plain values, never an
account: it would be kept for as long as the turn is remembered, and be another one by then.
"""

import enum
import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Generic, TypeVar, overload

from codex_proxy.accounts.account import Account
from codex_proxy.accounts.scheduler import Choice
from codex_proxy.accounts.state import State
from codex_proxy.accounts.words import words
from codex_proxy.trace import Candidate, Decision, Exclusion

T = TypeVar("T")
R = TypeVar("R")

# What a decision tells: the best candidates, and some of those left out. The counts are of all.
CANDIDATES_TOLD = 5
EXCLUSIONS_TOLD = 12


class Rule(enum.Enum):
    """Why an account cannot serve a request."""

    DISABLED = "disabled"
    NEEDS_LOGIN = "needs login"
    UNAVAILABLE = "unavailable"
    COOLING = "cooling"
    TRIED = "tried for this request"
    LACKS_MODEL = "lacks the model"
    NOT_ALLOWED = "its file does not allow the model"
    FAMILY_LIMIT = "limit of the model's family"
    BUSY = "carries all it may"
    ON_TRIAL = "is being tried after its rest"
    LESSER_PRIORITY = "of lesser priority"
    RENEWING = "its token is being renewed"


OF_STATE: dict[State, Rule] = {
    State.COOLING: Rule.COOLING,
    State.UNAVAILABLE: Rule.UNAVAILABLE,
    State.NEEDS_LOGIN: Rule.NEEDS_LOGIN,
    State.DISABLED: Rule.DISABLED,
}

PASSING_RULES = frozenset({Rule.COOLING, Rule.TRIED, Rule.FAMILY_LIMIT, Rule.BUSY, Rule.ON_TRIAL})
"""Those that time alone undoes."""

Excluded = tuple[Account, Rule]


class Later(Sequence[T], Generic[R, T]):
    """A sequence of which only the raw parts are there until somebody looks."""

    __slots__ = ("_made", "_make", "_parts")

    def __init__(self, parts: Sequence[R], make: Callable[[R], T]) -> None:
        self._parts = parts
        self._make = make
        self._made: tuple[T, ...] | None = None

    @property
    def raw(self) -> Sequence[R]:
        """What is there of it while nobody has looked."""
        return self._parts

    # The parts first, here and below: another thread may look too, and gives them up once it has made all of them.

    def __len__(self) -> int:
        parts = self._parts
        return len(parts) if self._made is None else len(self._made)

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[T]: ...
    def __getitem__(self, index: int | slice) -> T | Sequence[T]:
        parts = self._parts
        if self._made is None:
            self._made = tuple(map(self._make, parts))
            self._parts = ()
        return self._made[index]


def decision(
    choice: Choice | None,
    rule: str,
    strategy: str,
    now: float,
    *,
    compared: int,
    excluded: Iterable[Excluded] = (),
    counts: Iterable[tuple[Rule, int]] = (),
) -> Decision:
    """Note a choice, or that there was none.

    Args:
        excluded: Some of those that were left out, the first of all.
        counts: How many of all each rule has left out.
    """
    return Decision(
        choice.account.alias if choice is not None else "",
        rule,
        strategy,
        now,
        _candidates(choice) if choice is not None and choice.scores else (),
        compared,
        Later([_note(account, why, now) for account, why in excluded], _in_words) if excluded else (),
        tuple([(why.value, count) for why, count in counts]),
    )


def _candidates(choice: Choice) -> Sequence[Candidate]:
    scores = choice.scores
    best = [(account.alias, value, parts) for value, account, parts in scores.best(CANDIDATES_TOLD)]
    return Later(best, partial(_candidate, scores.names))


def _candidate(names: tuple[str, ...], best: tuple[str, float, tuple[float, ...]]) -> Candidate:
    alias, value, parts = best
    return Candidate(alias, value, tuple(zip(names, parts, strict=False)))


_Note = tuple[str, Rule, float, tuple[object, ...]]
"""Who, why, when, and what shows it."""


def _note(account: Account, rule: Rule, now: float) -> _Note:
    shows: tuple[object, ...] = ()
    match rule:
        case Rule.COOLING:
            shows = account.reason(), account.cooling_until(), account.last_error
        case Rule.UNAVAILABLE:
            shows = account.reason(), account.unavailable_until
        case Rule.NEEDS_LOGIN | Rule.DISABLED:
            shows = (account.reason(),)
        case Rule.TRIED:
            shows = (account.last_error,)
        case Rule.LACKS_MODEL:
            shows = (bool(account.refusals),)
        case Rule.NOT_ALLOWED:
            shows = account.credential.models_allowed, account.credential.models_denied
        case Rule.FAMILY_LIMIT:
            shows = tuple(account.family_holds), max(account.family_holds.values(), default=now)
        case Rule.BUSY:
            shows = (account.in_flight,)
        case Rule.LESSER_PRIORITY:
            shows = (account.credential.priority,)
        case Rule.ON_TRIAL | Rule.RENEWING:
            pass
    return account.alias, rule, now, shows


def evidence_of(account: Account, rule: Rule, now: float) -> str:
    """Say what shows that *rule* keeps an account from serving; '' when the rule says it all."""
    return _in_words(_note(account, rule, now)).evidence


def text_of(excluded: Sequence[Exclusion]) -> int:
    """Return about how many letters those left out are told in, without putting them into words."""
    notes: Sequence[_Note] = excluded.raw if isinstance(excluded, Later) else ()
    if notes:
        return sum(_USUAL_TEXT + len(alias) + _letters(shows) for alias, _, _, shows in notes)
    return sum(len(one.alias) + len(one.evidence) for one in excluded)


# What is said beside what was noted.
_USUAL_TEXT = 40


def _letters(shown: object) -> int:
    if isinstance(shown, str):
        return len(shown)
    return sum(map(_letters, shown)) if isinstance(shown, tuple) else 0


def _in_words(note: _Note) -> Exclusion:
    alias, rule, now, shows = note
    return Exclusion(alias, rule.value, _evidence(rule, now, shows))


def _evidence(rule: Rule, now: float, shows: tuple[object, ...]) -> str:
    match rule, shows:
        case Rule.COOLING, (str(reason), until, str(error)):
            rest = f", {in_words(until - now)} left" if isinstance(until, float | int) else ""
            said = f"; the last time {words(error)}" if error else ""
            return f"{words(reason)}{rest}{said}"
        case Rule.UNAVAILABLE, (str(reason), float() | int() as until):
            return f"{words(reason)}, tried again in {in_words(until - now)}"
        case ((Rule.NEEDS_LOGIN | Rule.DISABLED), (str(reason),)):
            return words(reason)
        case Rule.TRIED, (str(error),):
            return words(error) if error else "it could not answer this request"
        case Rule.LACKS_MODEL, (has_refused,):
            return "refused it lately" if has_refused else "not in its model list"
        case Rule.NOT_ALLOWED, ([*allowed], [*denied]):
            return f"models: {', '.join([*map(str, allowed), *(f'!{one}' for one in denied)])}"
        case Rule.FAMILY_LIMIT, ([*families], float() | int() as until):
            return f"{', '.join(sorted(map(str, families)))}: {in_words(until - now)} left"
        case Rule.BUSY, (count,):
            return f"{count} in flight"
        case Rule.ON_TRIAL, _:
            return "one request goes ahead after its rest"
        case Rule.LESSER_PRIORITY, (priority,):
            return f"priority {priority}"
        case _:
            return "others need no exchange first"


def in_words(seconds: float) -> str:
    """Return a time as people say it, rounded up; clients show it, and not all of them know the headers."""
    minutes = max(1, math.ceil(seconds / 60))
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days} d {hours} h" if hours else f"{days} d"
    if hours:
        return f"{hours} h {minutes} min" if minutes else f"{hours} h"
    return f"{minutes} min"
