"""What alerts judge by, out of a real pool."""

import pytest

from codex_proxy.accounts.pool import Pool
from codex_proxy.accounts.store import Scan
from codex_proxy.alerts.rules import Facts
from codex_proxy.clock import ManualClock
from codex_proxy.server.facts import facts_of
from codex_proxy.server.pulse import Pulse
from codex_proxy.trace import End
from tests.accounts.making import HOUR, NOW, credential, make_pool, named
from tests.server.test_pulse import Work, turn


def facts(pool: Pool, clock: ManualClock, pulse: Pulse | None = None) -> Facts:
    return facts_of(pool, pulse if pulse is not None else Pulse(pool, Work(), clock=clock), clock)


def test_an_empty_pool_has_nothing_to_say() -> None:
    pool, clock = make_pool()
    assert facts(pool, clock) == Facts()


def test_what_is_left_is_that_of_the_window_of_which_least_is() -> None:
    pool, clock = make_pool("a", "b")
    for user, used in (("a", 90), ("b", 98)):
        pool.read_headers(
            named(pool, user),
            {
                "x-codex-primary-used-percent": "10",
                "x-codex-primary-window-minutes": "300",
                "x-codex-primary-reset-at": str(int(NOW + HOUR)),
                "x-codex-secondary-used-percent": str(used),
                "x-codex-secondary-window-minutes": "10080",
                "x-codex-secondary-reset-at": str(int(NOW + 10 * HOUR)),
            },
        )
    said = facts(pool, clock)
    assert said.left == pytest.approx(0.06)
    assert said.resets_in == pytest.approx(10 * HOUR)
    assert (said.accounts, said.ready) == (2, 2)


def test_accounts_that_are_switched_off_are_nobodys_trouble() -> None:
    clock = ManualClock(NOW)
    pool = Pool(clock)
    pool.apply(Scan([credential("a", disabled=True), credential("b")], []))
    off = named(pool, "a")
    off.login_lost, off.refresh_failures = "invalid_grant", 9
    said = facts(pool, clock)
    assert (said.accounts, said.ready, said.needs_login, said.refresh_failures) == (1, 1, {}, {})


def test_a_login_that_is_lost_counts_while_the_account_still_serves() -> None:
    pool, clock = make_pool("a", "b")
    lost = named(pool, "a")
    pool.login_lost(lost, "invalid_grant")
    lost.refresh_failures = 2
    said = facts(pool, clock)
    assert said.ready == 2
    assert said.needs_login == {
        lost.alias: "the issuer does not know its refresh token any more (invalid_grant)"
    }
    assert said.refresh_failures == {lost.alias: 2}


def test_errors_are_those_of_five_minutes() -> None:
    pool, clock = make_pool("a")
    pulse = Pulse(pool, Work(), clock=clock)
    pulse.note(turn(clock, end=End.FAILED, status=500))
    clock.advance(400)
    for number in range(4):
        pulse.note(turn(clock, end=End.FAILED if number else End.COMPLETED, status=503))
        clock.advance(60)
    said = facts(pool, clock, pulse)
    assert (said.requests, said.errors, said.minutes) == (4, 3, 5)
