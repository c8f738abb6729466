"""The table of an account's life: total, and each cell what it should be."""

import itertools

import pytest

from codex_proxy.accounts.state import TRANSITIONS, Signal, State, step

READY, COOLING, UNAVAILABLE = State.READY, State.COOLING, State.UNAVAILABLE
NEEDS_LOGIN, DISABLED = State.NEEDS_LOGIN, State.DISABLED

# Written out a second time, by signal instead of by state, so that a slip in one of the two shows.
#                        from: READY        COOLING      UNAVAILABLE  NEEDS_LOGIN  DISABLED
EXPECTED: dict[Signal, tuple[State, State, State, State, State]] = {
    Signal.OK: (READY, COOLING, UNAVAILABLE, NEEDS_LOGIN, DISABLED),
    Signal.HELD: (COOLING, COOLING, UNAVAILABLE, NEEDS_LOGIN, DISABLED),
    Signal.RESTED: (READY, READY, READY, NEEDS_LOGIN, DISABLED),
    Signal.ABSOLVED: (READY, READY, UNAVAILABLE, NEEDS_LOGIN, DISABLED),
    Signal.UNENTITLED: (UNAVAILABLE, UNAVAILABLE, UNAVAILABLE, NEEDS_LOGIN, DISABLED),
    Signal.LOGIN_LOST: (NEEDS_LOGIN, NEEDS_LOGIN, NEEDS_LOGIN, NEEDS_LOGIN, DISABLED),
    Signal.REFRESHED: (READY, COOLING, UNAVAILABLE, READY, DISABLED),
    Signal.SWITCHED_OFF: (DISABLED, DISABLED, DISABLED, DISABLED, DISABLED),
    Signal.SWITCHED_ON: (READY, COOLING, UNAVAILABLE, NEEDS_LOGIN, READY),
}


def test_the_table_has_every_state_and_every_signal() -> None:
    assert set(TRANSITIONS) == set(State)
    for state, row in TRANSITIONS.items():
        assert set(row) == set(Signal), state


@pytest.mark.parametrize(("state", "signal"), list(itertools.product(State, Signal)))
def test_each_signal_leads_where_it_should(state: State, signal: Signal) -> None:
    assert step(state, signal) is EXPECTED[signal][list(State).index(state)]


def test_only_its_owner_brings_a_disabled_account_back() -> None:
    assert [signal for signal in Signal if step(DISABLED, signal) is not DISABLED] == [Signal.SWITCHED_ON]


def test_only_new_tokens_bring_back_an_account_that_needs_a_login() -> None:
    leaving = {signal for signal in Signal if step(NEEDS_LOGIN, signal) is not NEEDS_LOGIN}
    assert leaving == {Signal.REFRESHED, Signal.SWITCHED_OFF}


def test_new_tokens_and_answers_end_no_cooldown() -> None:
    for signal in (Signal.REFRESHED, Signal.OK, Signal.SWITCHED_ON):
        assert step(COOLING, signal) is COOLING
