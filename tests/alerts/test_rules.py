"""What is trouble, from which number on, and until which."""

from typing import Any

import pytest

from codex_proxy.alerts.rules import Facts, findings
from codex_proxy.config import Settings

RULES = Settings().alerts


def found(*begun: tuple[str, str], **facts: Any) -> dict[tuple[str, str], str]:
    return findings(RULES, Facts(**facts), begun)


def test_all_is_well() -> None:
    assert found() == {}
    assert found(accounts=3, ready=3, left=0.5, requests=1_000, errors=3) == {}


@pytest.mark.parametrize(
    ("left", "begun", "is_dry"),
    [
        (0.101, False, False),
        (0.099, False, True),
        (0.149, True, True),
        (0.151, True, False),
        (None, False, False),
    ],
)
def test_a_pool_is_nearly_dry_until_there_is_half_as_much_more(
    left: float | None, begun: bool, is_dry: bool
) -> None:
    key = ("pool-nearly-dry", "")
    assert (key in found(*([key] if begun else []), accounts=3, ready=3, left=left)) is is_dry


def test_the_words_say_how_much_and_until_when() -> None:
    said = found(accounts=12, ready=3, left=0.08, resets_in=5_000.0)
    assert said == {
        (
            "pool-nearly-dry",
            "",
        ): "8% of the pool's quota is left, 3 of 12 accounts can serve now; the next reset is in 1 h 24 min"
    }


def test_a_pool_of_which_nobody_can_serve_is_dry_whatever_the_numbers_say() -> None:
    assert "no account can serve" in found(accounts=2, ready=0, left=0.9)["pool-nearly-dry", ""]


def test_a_pool_without_accounts_is_not_dry() -> None:
    assert found(accounts=0, ready=0) == {}


def test_each_account_that_needs_a_login_is_an_episode_of_its_own() -> None:
    said = found(accounts=2, ready=1, needs_login={"work": "its login has expired", "home": "gone"})
    assert said["account-needs-login", "work"] == "work needs a login: its login has expired"
    assert ("account-needs-login", "home") in said


@pytest.mark.parametrize(
    ("requests", "errors", "begun", "is_trouble"),
    [
        (100, 20, False, False),
        (100, 21, False, True),
        # Too few to say anything, until it has begun.
        (19, 19, False, False),
        (19, 19, True, True),
        (100, 11, True, True),
        (100, 10, True, False),
        (0, 0, True, False),
    ],
)
def test_the_share_of_errors_counts_from_some_turns_on(
    requests: int, errors: int, begun: bool, is_trouble: bool
) -> None:
    key = ("error-share", "")
    said = found(*([key] if begun else []), accounts=1, ready=1, requests=requests, errors=errors)
    assert (key in said) is is_trouble


@pytest.mark.parametrize(
    ("count", "begun", "is_trouble"), [(2, False, False), (3, False, True), (1, True, True)]
)
def test_exchanges_fail_until_one_succeeds(count: int, begun: bool, is_trouble: bool) -> None:
    key = ("refresh-failing", "work")
    said = found(*([key] if begun else []), accounts=1, ready=1, refresh_failures={"work": count})
    assert (key in said) is is_trouble


def test_a_rule_that_is_off_finds_nothing() -> None:
    facts = Facts(accounts=1, ready=1, left=0.01, needs_login={"work": "gone"})
    assert set(findings({"pool-nearly-dry": {"left": 0.1}}, facts, ())) == {("pool-nearly-dry", "")}


def test_an_issuers_words_carry_no_secret_out() -> None:
    said = found(
        accounts=1, ready=1, needs_login={"work": "refused for jane@example.com with rt_0123456789abc"}
    )
    assert said["account-needs-login", "work"] == "work needs a login: refused for [email] with [token]"
