"""The quota of the whole pool as one account would tell it."""

from collections.abc import Callable
from typing import Any

import pytest

from codex_proxy.accounts.account import Account, Cause
from codex_proxy.accounts.poolview import PoolView, rate_limits_event, usage_page
from codex_proxy.accounts.quota import Family, Window
from codex_proxy.accounts.state import State
from codex_proxy.protocol.wire import JsonObject
from tests.accounts.making import DAY, HOUR, NOW, account

WEEK = 10_080


def one(
    user: str,
    hours: float | None = None,
    week: float | None = None,
    *,
    hours_end: float = HOUR,
    week_ends: float = DAY,
    family: str = "codex",
) -> Account:
    """Make an account whose windows are used by so much, and end in so many seconds."""
    made = account(user)
    known = made.quota.family(family)
    if hours is not None:
        known.primary = Window(hours, 300, NOW + hours_end, NOW, "headers")
    if week is not None:
        known.secondary = Window(week, WEEK, NOW + week_ends, NOW, "headers")
    return made


def limits(*accounts: Account, now: float = NOW) -> JsonObject:
    event = rate_limits_event(accounts, now)
    assert event is not None
    shown: JsonObject = event["rate_limits"]
    return shown


def shown(used: int, minutes: int, seconds: float) -> JsonObject:
    return {
        "used_percent": used,
        "window_minutes": minutes,
        "reset_at": int(NOW + seconds),
        "reset_after_seconds": int(seconds),
    }


def test_nothing_known_is_nothing_said() -> None:
    assert rate_limits_event([], NOW) is None
    assert rate_limits_event([account("a")], NOW) is None


def test_the_use_is_the_mean_and_the_reset_the_earliest() -> None:
    pool = [
        one("a", 98, 10, hours_end=3000, week_ends=30_000),
        one("b", 20, 51, hours_end=1000, week_ends=10_000),
    ]
    assert rate_limits_event(pool, NOW) == {
        "type": "codex.rate_limits",
        "plan_type": None,
        "metered_limit_name": None,
        "limit_name": None,
        "rate_limits": {
            "allowed": True,
            "limit_reached": False,
            "primary": shown(59, 300, 1000),
            "secondary": shown(30, WEEK, 10_000),
        },
        "code_review_rate_limits": None,
        "credits": None,
        "promo": None,
    }


def test_an_account_of_unknown_quota_is_neither_full_nor_empty() -> None:
    assert limits(one("a", 60), account("b"))["primary"]["used_percent"] == 60
    # A window that is over says nothing either.
    assert limits(one("a", 60), one("b", 100, hours_end=-1))["primary"]["used_percent"] == 60


@pytest.mark.parametrize("state", [State.DISABLED, State.NEEDS_LOGIN, State.UNAVAILABLE])
def test_an_account_that_does_not_serve_does_not_count(state: State) -> None:
    other = one("b", 100, 100)
    other.state = state
    assert limits(one("a", 40, 20), other)["primary"] == shown(40, 300, HOUR)
    assert rate_limits_event([other], NOW) is None


def test_an_account_whose_file_is_gone_does_not_count() -> None:
    other = one("b", 100, 100)
    other.removed = True
    assert limits(one("a", 40), other)["limit_reached"] is False
    assert limits(one("a", 40), other)["primary"]["used_percent"] == 40


def test_the_windows_are_told_apart_by_their_length() -> None:
    free = account("a")
    free.quota.family("codex").primary = Window(80.0, WEEK, NOW + DAY, NOW, "headers")
    both = limits(one("b", 10, 20), free)
    assert (both["primary"]["used_percent"], both["secondary"]["used_percent"]) == (10, 50)
    # Alone it stands first, where clients look.
    alone = limits(free)
    assert (alone["primary"], alone["secondary"]) == (shown(80, WEEK, DAY), None)


def test_a_window_of_unknown_length_has_no_class() -> None:
    odd = account("a")
    odd.quota.family("codex").primary = Window(80.0, None, NOW + DAY, NOW, "headers")
    assert rate_limits_event([odd], NOW) is None


def test_the_length_is_that_of_most() -> None:
    month = account("m")
    month.quota.family("codex").secondary = Window(50.0, 43_200, NOW + DAY, NOW, "headers")
    assert limits(one("a", None, 1), one("b", None, 1), month)["primary"]["window_minutes"] == WEEK


def test_a_reset_of_what_is_unused_brings_nothing_back() -> None:
    pool = [one("a", 0, hours_end=60), one("b", 50, hours_end=600)]
    assert limits(*pool)["primary"] == shown(25, 300, 600)
    assert limits(one("a", 0, hours_end=60))["primary"] == shown(0, 300, 60)


def test_one_that_has_used_up_its_week_has_no_hours_left_either() -> None:
    pool = [one("a", 0, 100, hours_end=60, week_ends=2 * DAY), one("b", 20, 50, hours_end=1800)]
    view = limits(*pool)
    assert view["primary"] == shown(60, 300, 1800)
    assert view["secondary"]["used_percent"] == 75
    assert (view["allowed"], view["limit_reached"]) == (True, False)


def test_one_that_rests_at_its_limit_gives_nothing_whatever_its_windows_say() -> None:
    resting = one("a", 97, 10)
    resting.hold(Cause.LIMIT, NOW + 900)
    assert limits(resting, one("b", 20, hours_end=1800))["primary"] == shown(60, 300, 900)
    silent = account("c")
    silent.hold(Cause.LIMIT, NOW + 900)
    assert limits(silent, one("b", 20))["primary"]["used_percent"] == 60


def test_one_that_rests_for_another_cause_has_its_quota() -> None:
    resting = one("a", 30)
    resting.hold(Cause.OVERLOAD, NOW + 900)
    assert limits(resting)["primary"] == shown(30, 300, HOUR)
    assert limits(resting)["limit_reached"] is False


def test_a_pool_that_is_used_up_says_when_the_first_is_free() -> None:
    pool = [
        # Full by its week; its hours end sooner, which frees nothing.
        one("a", 5, 100, hours_end=60, week_ends=2 * DAY),
        one("b", 100, 30, hours_end=7200),
        one("c", 100, 30, hours_end=9000),
    ]
    pool[2].hold(Cause.LIMIT, NOW + 5400)
    view = limits(*pool)
    assert (view["allowed"], view["limit_reached"]) == (False, True)
    assert view["primary"] == shown(100, 300, 7200)
    assert view["secondary"]["used_percent"] == 53
    # With one account whose quota is unknown it is not.
    assert limits(*pool, account("d"))["limit_reached"] is False


def test_a_used_up_pool_of_weeks_says_it_in_the_week() -> None:
    pool = [one("a", None, 100, week_ends=2 * DAY), one("b", None, 100, week_ends=DAY)]
    view = limits(*pool)
    assert (view["primary"], view["secondary"]) == (shown(100, WEEK, DAY), None)


def test_a_used_up_pool_of_which_no_window_is_known_says_so_too() -> None:
    silent = account("a")
    silent.hold(Cause.LIMIT, NOW + 900)
    view = limits(silent)
    assert view["limit_reached"] is True
    assert view["primary"] == {"used_percent": 100, "reset_at": int(NOW + 900), "reset_after_seconds": 900}
    assert usage_page([silent], NOW)["rate_limit"]["primary_window"]["limit_window_seconds"] == 0


def test_a_pool_is_not_used_up_while_a_percent_is_left() -> None:
    pool = [one("a", 100), one("b", 99), one("c", 100), one("d", 100)]
    assert limits(*pool)["primary"]["used_percent"] == 99


def test_an_account_whose_credits_pay_goes_on() -> None:
    rich = one("a", 100)
    rich.quota.read_event({"rate_limits": {}, "credits": {"has_credits": True, "unlimited": True}}, NOW)
    view = limits(rich)
    assert (view["limit_reached"], view["primary"]["used_percent"]) == (False, 100)


def test_the_usage_page_has_the_backends_shape_and_nobodys_name() -> None:
    pool = [one("a", 20, 40), one("b", 40, 60)]
    extra = pool[0].quota.family("codex_bengalfox")
    extra.name = "GPT-5.3-Codex-Spark"
    extra.primary = Window(90.0, 300, NOW + HOUR, NOW, "usage")

    def window(used: int, minutes: int, seconds: float) -> dict[str, Any]:
        return {
            "used_percent": used,
            "limit_window_seconds": minutes * 60,
            "reset_after_seconds": int(seconds),
            "reset_at": int(NOW + seconds),
        }

    assert usage_page(pool, NOW) == {
        "plan_type": "unknown",
        "rate_limit": {
            "allowed": True,
            "limit_reached": False,
            "primary_window": window(30, 300, HOUR),
            "secondary_window": window(50, WEEK, DAY),
        },
        "code_review_rate_limit": None,
        "additional_rate_limits": [
            {
                "limit_name": "GPT-5.3-Codex-Spark",
                "metered_feature": "codex_bengalfox",
                "rate_limit": {
                    "allowed": True,
                    "limit_reached": False,
                    "primary_window": window(90, 300, HOUR),
                    "secondary_window": None,
                },
            }
        ],
        "credits": None,
        "spend_control": None,
        "rate_limit_reached_type": None,
        "promo": None,
    }


def test_the_usage_page_of_a_pool_of_which_nothing_is_known() -> None:
    page = usage_page([account("a")], NOW)
    assert page["plan_type"] == "unknown"
    assert page["rate_limit"] == {
        "allowed": True,
        "limit_reached": False,
        "primary_window": None,
        "secondary_window": None,
    }
    assert page["additional_rate_limits"] is None


def test_the_limit_of_a_models_family_is_its_own() -> None:
    pool = [one("a", 10, family="codex"), one("b", 10, family="codex")]
    pool[0].quota.families["codex_x"] = Family("codex_x", primary=Window(100.0, 300, NOW + 50, NOW, "usage"))
    pool[1].family_holds["codex_x"] = NOW + 80
    pool[1].quota.families["codex_x"] = Family("codex_x", primary=Window(30.0, 300, NOW + 90, NOW, "usage"))
    page = usage_page(pool, NOW)
    assert page["rate_limit"]["limit_reached"] is False
    (extra,) = page["additional_rate_limits"]
    assert extra["limit_name"] == "codex_x"
    assert extra["rate_limit"]["limit_reached"] is True
    assert extra["rate_limit"]["primary_window"]["reset_after_seconds"] == 50
    # An account that rests as a whole gives nothing of it either.
    pool[0].hold(Cause.LIMIT, NOW + 500)
    (extra,) = usage_page(pool, NOW)["additional_rate_limits"]
    assert extra["rate_limit"]["primary_window"]["reset_after_seconds"] == 80


def in_event(view: PoolView, pool: list[Account], now: float) -> int:
    event = view.event(pool, now)
    assert event is not None
    percent: int = event["rate_limits"]["primary"]["used_percent"]
    return percent


def in_page(view: PoolView, pool: list[Account], now: float) -> int:
    percent: int = view.page(pool, now)["rate_limit"]["primary_window"]["used_percent"]
    return percent


@pytest.mark.parametrize("used", [in_event, in_page])
@pytest.mark.parametrize(("count", "seen"), [(100, [10, 50, 50, 50]), (101, [10, 10, 50, 50])])
def test_few_accounts_are_looked_at_each_time_and_many_once_a_second(
    used: Callable[[PoolView, list[Account], float], int], count: int, seen: list[int]
) -> None:
    pool = [one(f"u{number}", 10) for number in range(count)]
    view = PoolView()
    found = [used(view, pool, NOW)]
    for member in pool:
        member.quota.family("codex").primary = Window(50.0, 300, NOW + HOUR, NOW, "headers")
    # The last: the clock was set back.
    found += [used(view, pool, NOW + after) for after in (0.9, 1.0, -5.0)]
    assert found == seen


def test_a_pool_that_has_just_grown_or_shrunk_to_few_is_looked_at() -> None:
    many = [one(f"u{number}", 10) for number in range(101)]
    view = PoolView()
    assert in_page(view, many, NOW) == 10
    assert in_page(view, [one("a", 30)], NOW) == 30
    # What few were is not what many are.
    assert in_page(view, [*many[:-1], one("b", 90)], NOW + 0.5) == 11
