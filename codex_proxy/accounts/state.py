"""The life of an account as one table: which state a signal leads to, from every state."""

import enum


class State(enum.Enum):
    """What an account is good for."""

    READY = "ready"
    COOLING = "cooling"
    """Resting until a known moment: a limit, or a back-off."""
    UNAVAILABLE = "unavailable"
    """Plan, credits or workspace forbid it; tried again slowly."""
    NEEDS_LOGIN = "needs-login"
    """Its login is lost and its access token can no longer be used."""
    DISABLED = "disabled"
    """Switched off by its owner."""


SERVING = frozenset({State.READY, State.COOLING})
"""The states of accounts that serve, now or after a rest."""


class Signal(enum.Enum):
    """What happened to an account."""

    OK = "ok"
    """It answered."""
    HELD = "held"
    """A cooldown was set, or is still running."""
    RESTED = "rested"
    """The moment it waited for has come."""
    ABSOLVED = "absolved"
    """What cooled it was the way to the backend, not the account."""
    UNENTITLED = "unentitled"
    LOGIN_LOST = "login-lost"
    REFRESHED = "refreshed"
    """It has new tokens: exchanged, or found in its file."""
    SWITCHED_OFF = "switched-off"
    SWITCHED_ON = "switched-on"


TRANSITIONS: dict[State, dict[Signal, State]] = {
    State.READY: {
        Signal.OK: State.READY,
        Signal.HELD: State.COOLING,
        Signal.RESTED: State.READY,
        Signal.ABSOLVED: State.READY,
        Signal.UNENTITLED: State.UNAVAILABLE,
        Signal.LOGIN_LOST: State.NEEDS_LOGIN,
        Signal.REFRESHED: State.READY,
        Signal.SWITCHED_OFF: State.DISABLED,
        Signal.SWITCHED_ON: State.READY,
    },
    State.COOLING: {
        # An answer to a request that was sent before the limit hit says nothing new.
        Signal.OK: State.COOLING,
        Signal.HELD: State.COOLING,
        Signal.RESTED: State.READY,
        Signal.ABSOLVED: State.READY,
        Signal.UNENTITLED: State.UNAVAILABLE,
        Signal.LOGIN_LOST: State.NEEDS_LOGIN,
        # New tokens do not bring quota back.
        Signal.REFRESHED: State.COOLING,
        Signal.SWITCHED_OFF: State.DISABLED,
        Signal.SWITCHED_ON: State.COOLING,
    },
    State.UNAVAILABLE: {
        Signal.OK: State.UNAVAILABLE,
        Signal.HELD: State.UNAVAILABLE,
        Signal.RESTED: State.READY,
        Signal.ABSOLVED: State.UNAVAILABLE,
        Signal.UNENTITLED: State.UNAVAILABLE,
        Signal.LOGIN_LOST: State.NEEDS_LOGIN,
        Signal.REFRESHED: State.UNAVAILABLE,
        Signal.SWITCHED_OFF: State.DISABLED,
        Signal.SWITCHED_ON: State.UNAVAILABLE,
    },
    State.NEEDS_LOGIN: {
        Signal.OK: State.NEEDS_LOGIN,
        Signal.HELD: State.NEEDS_LOGIN,
        Signal.RESTED: State.NEEDS_LOGIN,
        Signal.ABSOLVED: State.NEEDS_LOGIN,
        Signal.UNENTITLED: State.NEEDS_LOGIN,
        Signal.LOGIN_LOST: State.NEEDS_LOGIN,
        Signal.REFRESHED: State.READY,
        Signal.SWITCHED_OFF: State.DISABLED,
        Signal.SWITCHED_ON: State.NEEDS_LOGIN,
    },
    State.DISABLED: {
        Signal.OK: State.DISABLED,
        Signal.HELD: State.DISABLED,
        Signal.RESTED: State.DISABLED,
        Signal.ABSOLVED: State.DISABLED,
        Signal.UNENTITLED: State.DISABLED,
        Signal.LOGIN_LOST: State.DISABLED,
        Signal.REFRESHED: State.DISABLED,
        Signal.SWITCHED_OFF: State.DISABLED,
        # What it was before is found again from what is known of it (`Account.settle`).
        Signal.SWITCHED_ON: State.READY,
    },
}


def step(state: State, signal: Signal) -> State:
    """Return the state that *signal* leads to."""
    return TRANSITIONS[state][signal]
