"""What is worth telling of: pure rules over what is known at one moment.

Each rule has two thresholds, one to begin and a milder one to go on, so that a number that dances around
the first one makes one episode and not twenty.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field

from codex_proxy.accounts.telling import in_words
from codex_proxy.errors import Redact

Options = Mapping[str, float]
Key = tuple[str, str]
"""A rule, and what it is about: an account's alias, or nothing for the whole daemon."""

# An episode goes on while this many times as much is left, or this part of the share still fails.
_MORE_LEFT = 1.5
_LESS_FAILS = 0.5


@dataclass(slots=True, frozen=True)
class Facts:
    """What the rules look at."""

    accounts: int = 0
    """Those that are not switched off."""
    ready: int = 0
    """Those of them that could serve now."""
    left: float | None = None
    """The share of the pool's quota that is left in the window of which least is; None while that is unknown."""
    resets_in: float | None = None
    """Seconds to the reset of that window."""
    needs_login: Mapping[str, str] = field(default_factory=dict)
    """By alias: why."""
    requests: int = 0
    """Turns that ended in the last minutes."""
    errors: int = 0
    """Those of them that failed without their callers' doing."""
    minutes: int = 5
    refresh_failures: Mapping[str, int] = field(default_factory=dict)
    """Exchanges that failed in a row, by alias."""


def findings(rules: Mapping[str, Options], facts: Facts, begun: Collection[Key]) -> dict[Key, str]:
    """Return what is wrong now, in words; for what is in *begun* the milder threshold counts."""
    found: dict[Key, str] = {}
    for name, options in rules.items():
        for about, text in _RULES[name](name, options, facts, begun):
            # It leaves this machine, and an issuer's or a backend's words may be in it.
            found[name, about] = Redact.text(text)
    return found


_Found = Iterator[tuple[str, str]]


def _pool_nearly_dry(name: str, options: Options, facts: Facts, begun: Collection[Key]) -> _Found:
    if not facts.accounts:
        return
    able = f"{facts.ready} of {facts.accounts} account{'s' if facts.accounts != 1 else ''} can serve now"
    back = f"; the next reset is in {in_words(facts.resets_in)}" if facts.resets_in is not None else ""
    least = options["left"] * (_MORE_LEFT if (name, "") in begun else 1.0)
    if not facts.ready:
        yield "", f"no account can serve: all {facts.accounts} rest or need help{back}"
    elif facts.left is not None and facts.left < least:
        yield "", f"{facts.left:.0%} of the pool's quota is left, {able}{back}"


def _account_needs_login(name: str, options: Options, facts: Facts, begun: Collection[Key]) -> _Found:
    for alias, why in facts.needs_login.items():
        yield alias, f"{alias} needs a login: {why}"


def _error_share(name: str, options: Options, facts: Facts, begun: Collection[Key]) -> _Found:
    has_begun = (name, "") in begun
    if not facts.requests or (facts.requests < options["requests"] and not has_begun):
        return
    share = facts.errors / facts.requests
    if share > options["above"] * (_LESS_FAILS if has_begun else 1.0):
        yield "", f"{facts.errors} of {facts.requests} turns failed in {facts.minutes} min ({share:.0%})"


def _refresh_failing(name: str, options: Options, facts: Facts, begun: Collection[Key]) -> _Found:
    for alias, count in facts.refresh_failures.items():
        if count >= options["failures"] or (count and (name, alias) in begun):
            yield (
                alias,
                f"the token of {alias} could not be refreshed {count} time{'s' if count != 1 else ''} in a row",
            )


_RULES: dict[str, Callable[[str, Options, Facts, Collection[Key]], _Found]] = {
    "pool-nearly-dry": _pool_nearly_dry,
    "account-needs-login": _account_needs_login,
    "error-share": _error_share,
    "refresh-failing": _refresh_failing,
}
