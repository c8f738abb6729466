"""Quota as the backend tells it: headers, events and the usage endpoint, and what is unknown."""

import copy
import json
import random
import tracemalloc
from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from codex_proxy.accounts.quota import (
    MAX_FAMILIES,
    MAX_RESET_SECONDS,
    Credits,
    Fact,
    Family,
    Place,
    Quota,
    Spend,
    Window,
    reset_time,
)
from codex_proxy.errors import Verdict, classify, fault_of

NOW = 1_795_220_001.0

# A whole set, as one answer of a Plus account carries it.
HEADERS = {
    "x-codex-active-limit": "codex",
    "x-codex-plan-type": "plus",
    "x-codex-primary-used-percent": "13",
    "x-codex-primary-window-minutes": "300",
    "x-codex-primary-reset-at": "1795223601",
    "x-codex-primary-reset-after-seconds": "3600",
    "x-codex-secondary-used-percent": "40",
    "x-codex-secondary-window-minutes": "10080",
    "x-codex-secondary-reset-at": "1795720001",
    "x-codex-secondary-reset-after-seconds": "500000",
    "x-codex-primary-over-secondary-limit-percent": "0",
    "x-codex-credits-has-credits": "False",
    "x-codex-credits-unlimited": "False",
    "x-codex-credits-balance": "",
    "x-codex-promo-message": "",
    "x-codex-bengalfox-primary-used-percent": "80",
    "x-codex-bengalfox-primary-window-minutes": "300",
    "x-codex-bengalfox-primary-reset-at": "1795223601",
    "x-codex-bengalfox-secondary-used-percent": "0",
    "x-codex-bengalfox-secondary-window-minutes": "0",
    "x-codex-bengalfox-secondary-reset-at": "",
    "x-codex-bengalfox-limit-name": "GPT-5.3-Codex-Spark",
    "content-type": "text/event-stream",
}


def event(**more: Any) -> dict[str, Any]:
    return {
        "type": "codex.rate_limits",
        "plan_type": "plus",
        "metered_limit_name": None,
        "limit_name": None,
        "rate_limits": {
            "allowed": True,
            "limit_reached": False,
            "primary": {
                "used_percent": 13,
                "window_minutes": 300,
                "reset_after_seconds": 3600,
                "reset_at": 1795223601,
            },
            "secondary": {"used_percent": 40, "window_minutes": 10080, "reset_after_seconds": 500000},
        },
        "code_review_rate_limits": None,
        "credits": {"has_credits": False, "unlimited": False, "balance": None},
        "promo": None,
        **more,
    }


USAGE: dict[str, Any] = {
    "user_id": "user-1",
    "plan_type": "plus",
    "rate_limit": {
        "allowed": True,
        "limit_reached": False,
        "primary_window": {
            "used_percent": 27,
            "limit_window_seconds": 18000,
            "reset_after_seconds": 13140,
            "reset_at": 1795233141,
        },
        "secondary_window": {
            "used_percent": 4,
            "limit_window_seconds": 604800,
            "reset_after_seconds": 566340,
            "reset_at": 1795786341,
        },
    },
    "code_review_rate_limit": None,
    "additional_rate_limits": [
        {
            "limit_name": "GPT-5.3-Codex-Spark",
            "metered_feature": "codex_bengalfox",
            "rate_limit": {"primary_window": {"used_percent": 90, "limit_window_seconds": 18000}},
        }
    ],
    "credits": {"has_credits": False, "unlimited": False, "overage_limit_reached": False, "balance": "0"},
    "rate_limit_reached_type": {"type": "workspace_member_credits_depleted"},
}


def test_a_whole_set_of_headers_is_read() -> None:
    quota = Quota()
    quota.read_headers(HEADERS, NOW)
    main = quota.families["codex"]
    assert main.primary == Window(13.0, 300, 1795223601.0, NOW, "headers")
    assert main.secondary == Window(40.0, 10080, 1795720001.0, NOW, "headers")
    assert quota.left(NOW) == 60.0
    assert quota.plan == "plus"
    assert (quota.plan_at, quota.plan_source) == (NOW, "headers")
    assert quota.credits == Credits(False, False, None, None, NOW, "headers")
    assert (quota.seen_at, quota.source) == (NOW, "headers")


def test_each_family_has_its_own_windows() -> None:
    quota = Quota()
    quota.read_headers(HEADERS, NOW)
    assert set(quota.families) == {"codex", "codex_bengalfox"}
    extra = quota.families["codex_bengalfox"]
    assert extra.name == "GPT-5.3-Codex-Spark"
    assert extra.secondary is None
    assert quota.left(NOW, "codex_bengalfox") == 20.0
    assert quota.left(NOW, "codex_other") is None


def test_a_week_in_the_first_place_is_a_week() -> None:
    quota = Quota()
    quota.read_headers(
        {
            "x-codex-plan-type": "free",
            "x-codex-primary-used-percent": "55",
            "x-codex-primary-window-minutes": "10080",
            "x-codex-primary-reset-after-seconds": "100",
            "x-codex-secondary-used-percent": "0",
            "x-codex-secondary-window-minutes": "0",
            "x-codex-secondary-reset-at": "",
        },
        NOW,
    )
    family = quota.families["codex"]
    assert family.windows() == [("primary", Window(55.0, 10080, NOW + 100, NOW, "headers"))]
    assert quota.left(NOW) == 45.0


def test_zeros_take_back_the_window_of_an_earlier_plan() -> None:
    quota = Quota()
    quota.read_headers({**HEADERS, "x-codex-secondary-used-percent": "100"}, NOW)
    assert quota.left(NOW) == 0.0
    zeros = {
        "x-codex-primary-used-percent": "10",
        "x-codex-primary-window-minutes": "10080",
        "x-codex-secondary-used-percent": "0",
        "x-codex-secondary-window-minutes": "0",
    }
    quota.read_headers(zeros, NOW + 1)
    assert quota.families["codex"].secondary is None
    assert quota.left(NOW + 1) == 90.0


@pytest.mark.parametrize("kind", ["event", "usage"])
def test_null_takes_back_the_window_of_an_earlier_plan(kind: str) -> None:
    quota = Quota()
    quota.read_headers(HEADERS, NOW)
    if kind == "event":
        quota.read_event(event(rate_limits={"primary": {"used_percent": 1}, "secondary": None}), NOW)
    else:
        quota.read_usage(
            {"rate_limit": {"primary_window": {"used_percent": 1}, "secondary_window": None}}, NOW
        )
    assert quota.families["codex"].secondary is None
    assert quota.left(NOW) == 99.0


def test_a_window_that_is_not_mentioned_stays() -> None:
    quota = Quota()
    quota.read_headers(HEADERS, NOW)
    quota.read_headers({"x-codex-primary-used-percent": "20"}, NOW)
    quota.read_event(event(rate_limits={"primary": {"used_percent": 30}}), NOW)
    quota.read_usage({"rate_limit": {"primary_window": {"used_percent": 31}}}, NOW)
    family = quota.families["codex"]
    assert family.primary is not None
    assert family.primary.used_percent == 31.0
    assert family.secondary is not None
    assert family.secondary.used_percent == 40.0


def test_an_unused_window_is_a_window() -> None:
    quota = Quota()
    quota.read_headers({"x-codex-primary-used-percent": "0", "x-codex-primary-window-minutes": "300"}, NOW)
    assert quota.left(NOW) == 100.0
    quota = Quota()
    quota.read_headers({"x-codex-primary-used-percent": "0", "x-codex-primary-reset-at": str(NOW + 60)}, NOW)
    assert quota.left(NOW) == 100.0


@pytest.mark.parametrize("used", ["", "many", "nan", "inf"])
def test_headers_without_a_number_say_nothing(used: str) -> None:
    quota = Quota()
    quota.read_headers({"x-codex-primary-used-percent": used, "x-codex-primary-window-minutes": "300"}, NOW)
    assert quota.left(NOW) is None
    assert quota.seen_at is None
    assert quota.source is None


def test_other_headers_are_nothing_to_quota() -> None:
    quota = Quota()
    quota.read_headers({"content-type": "x", "primary-used-percent": "9", "x-request-id": "1"}, NOW)
    assert quota == Quota()


def test_credits_are_read_in_any_spelling() -> None:
    quota = Quota()
    quota.read_headers(
        {
            "x-codex-credits-has-credits": "TRUE",
            "x-codex-credits-unlimited": "0",
            "x-codex-credits-balance": "12.5",
        },
        NOW,
    )
    assert quota.credits == Credits(True, False, "12.5", None, NOW, "headers")
    quota.read_usage({"credits": {"has_credits": True, "unlimited": True, "balance": 3}}, NOW)
    assert quota.credits == Credits(True, True, "3", None, NOW, "usage")


def test_an_event_is_read() -> None:
    quota = Quota()
    quota.read_event(event(), NOW)
    main = quota.families["codex"]
    assert main.primary == Window(13.0, 300, 1795223601.0, NOW, "event")
    assert main.secondary == Window(40.0, 10080, NOW + 500000, NOW, "event")
    assert quota.plan == "plus"
    assert (quota.seen_at, quota.source) == (NOW, "event")


def test_an_event_can_be_about_another_family() -> None:
    quota = Quota()
    quota.read_event(event(metered_limit_name="Codex-Bengalfox"), NOW)
    assert set(quota.families) == {"codex_bengalfox"}
    assert quota.left(NOW) is None
    assert quota.left(NOW, "codex_bengalfox") == 60.0


@pytest.mark.parametrize(
    "odd",
    [
        {"rate_limits": None},
        {"rate_limits": []},
        {"rate_limits": {"primary": "full", "secondary": 3}},
        {"rate_limits": {"primary": {"used_percent": True}}},
        {"rate_limits": {"primary": {"used_percent": {}}}},
    ],
)
def test_an_odd_event_says_nothing(odd: dict[str, Any]) -> None:
    quota = Quota()
    quota.read_event(event(credits="none", **odd), NOW)
    assert quota.left(NOW) is None
    assert quota.seen_at is None


def test_the_usage_endpoint_is_read() -> None:
    quota = Quota()
    quota.read_usage(USAGE, NOW)
    main = quota.families["codex"]
    assert main.primary == Window(27.0, 300, 1795233141.0, NOW, "usage")
    assert main.secondary == Window(4.0, 10080, 1795786341.0, NOW, "usage")
    assert quota.families["codex_bengalfox"].name == "GPT-5.3-Codex-Spark"
    assert quota.left(NOW, "codex_bengalfox") == 10.0
    assert quota.credits == Credits(False, False, "0", False, NOW, "usage")
    assert quota.reached == Fact("workspace_member_credits_depleted", NOW, "usage")
    assert (quota.seen_at, quota.source) == (NOW, "usage")


@pytest.mark.parametrize(
    "odd",
    [
        {"plan_type": "plus"},
        {"plan_type": "plus", "rate_limit": None, "additional_rate_limits": None, "credits": None},
        {
            "plan_type": "plus",
            "rate_limit": "no",
            "additional_rate_limits": [None, {}, {"metered_feature": 1}],
        },
    ],
)
def test_a_plan_alone_is_a_usage_answer(odd: dict[str, Any]) -> None:
    quota = Quota()
    quota.read_usage(odd, NOW)
    assert quota.plan == "plus"
    assert quota.left(NOW) is None
    assert quota.seen_at is None


def test_a_window_past_its_reset_says_nothing_about_what_is_left() -> None:
    quota = Quota()
    quota.read_headers(HEADERS, NOW)
    # The short window is over, the week still runs.
    assert quota.left(1795223601.0) == 60.0
    assert quota.left(1795720001.0) is None


def test_spent_until_is_the_last_reset_of_what_is_used_up() -> None:
    quota = Quota()
    quota.read_headers(HEADERS, NOW)
    family = quota.families["codex"]
    assert family.spent_until(NOW) is None
    quota.read_headers({**HEADERS, "x-codex-primary-used-percent": "100"}, NOW)
    assert family.spent_until(NOW) == 1795223601.0
    quota.read_headers(
        {**HEADERS, "x-codex-primary-used-percent": "100", "x-codex-secondary-used-percent": "101"}, NOW
    )
    assert family.spent_until(NOW) == 1795720001.0
    assert family.spent_until(1795720001.0) is None


@pytest.mark.parametrize(
    ("absolute", "after", "expected"),
    [
        (NOW + 60, None, NOW + 60),
        (str(int(NOW + 60)), None, float(int(NOW + 60))),
        ((NOW + 60) * 1000, None, NOW + 60),
        (None, 60, NOW + 60),
        (None, "60", NOW + 60),
        ("", "60", NOW + 60),
        # An absolute time that has passed gives way to the distance.
        (NOW - 1, 60, NOW + 60),
        (NOW, None, None),
        (NOW - 1, None, None),
        (None, 0, None),
        (None, -5, None),
        (NOW + MAX_RESET_SECONDS + 1, None, None),
        (None, MAX_RESET_SECONDS + 1, None),
        (None, MAX_RESET_SECONDS, NOW + MAX_RESET_SECONDS),
        # Where the two disagree, our clock is wrong, and what was counted needs none.
        (NOW + 7200, 600, NOW + 600),
        (NOW + 640, 600, NOW + 640),
        (NOW + 640, 0, NOW + 640),
        (10**400, None, None),
        (None, "9" * 5000, None),
        (float("nan"), None, None),
        (None, None, None),
        (True, True, None),
        ("soon", [], None),
    ],
)
def test_a_reset_is_plausible_or_none(absolute: Any, after: Any, expected: float | None) -> None:
    assert reset_time(absolute, after, NOW) == expected


def test_a_negative_use_is_no_use() -> None:
    quota = Quota()
    quota.read_headers({"x-codex-primary-used-percent": "-3", "x-codex-primary-window-minutes": "300"}, NOW)
    assert quota.left(NOW) == 100.0


# -- by length, not by place -------------------------------------------------------------

WEEK = 10_080

# What real answers of accounts with one window carry (contract, section 4.1): the week first, the
# second window as zeros, as empty texts, or not at all.
ONE_WINDOW = {
    "zeros": {"-used-percent": "0", "-window-minutes": "0", "-reset-at": "", "-reset-after-seconds": "0"},
    "empty": {"-used-percent": "0", "-window-minutes": "", "-reset-at": "", "-reset-after-seconds": ""},
    "absent": {},
}


def of_a_free_plan(second: dict[str, str], plan: str = "free") -> dict[str, str]:
    return {
        "x-codex-active-limit": "codex",
        "x-codex-plan-type": plan,
        "x-codex-primary-used-percent": "35",
        "x-codex-primary-window-minutes": str(WEEK),
        "x-codex-primary-reset-at": str(int(NOW) + 400_000),
        "x-codex-primary-reset-after-seconds": "400000",
        "x-codex-credits-has-credits": "False",
        "x-codex-credits-unlimited": "False",
        "x-codex-credits-balance": "",
        **{f"x-codex-secondary{name}": value for name, value in second.items()},
    }


@pytest.mark.parametrize("plan", ["free", "prolite"])
@pytest.mark.parametrize("second", ONE_WINDOW)
def test_a_week_in_the_first_place_leaves_no_twin(second: str, plan: str) -> None:
    """Before, the account had both windows, and the week in the second place."""
    quota = Quota()
    quota.read_headers({**HEADERS, "x-codex-secondary-used-percent": "100"}, NOW)
    quota.read_headers(of_a_free_plan(ONE_WINDOW[second], plan), NOW + 1)
    family = quota.families["codex"]
    assert family.short is None
    assert family.long == Window(35.0, WEEK, float(int(NOW) + 400_000), NOW + 1, "headers")
    assert [place for place, _ in family.windows()] == ["primary"]
    assert quota.left(NOW + 1) == 65.0
    assert quota.plan == plan


def test_a_week_that_moves_without_a_word_of_the_plan_leaves_no_twin() -> None:
    family = Family("codex")
    family.take({"primary": Window(5.0, 300, None, NOW, "usage")}, NOW)
    family.take({"secondary": Window(100.0, WEEK, None, NOW, "usage")}, NOW)
    family.take({"primary": Window(7.0, WEEK, None, NOW + 5, "usage")}, NOW + 5)
    assert family.windows() == [("primary", Window(7.0, WEEK, None, NOW + 5, "usage"))]


def test_another_plan_takes_back_what_it_does_not_speak_of() -> None:
    quota = Quota()
    quota.read_headers(HEADERS, NOW)
    quota.read_headers(
        {
            "x-codex-plan-type": "pro",
            "x-codex-primary-used-percent": "1",
            "x-codex-primary-window-minutes": "300",
        },
        NOW + 1,
    )
    family = quota.families["codex"]
    assert (family.short, family.long) == (
        Window(1.0, 300, None, NOW + 1, "headers"),
        None,
    )


def test_two_windows_of_one_class_in_one_report_are_two_windows() -> None:
    quota = Quota()
    month = 43_200
    limits = {
        "primary": {"used_percent": 10, "window_minutes": WEEK, "reset_after_seconds": 100},
        "secondary": {"used_percent": 100, "window_minutes": month, "reset_after_seconds": 900_000},
    }
    quota.read_event(event(rate_limits=limits), NOW)
    family = quota.families["codex"]
    assert len(family.windows()) == 2
    assert family.short is None
    assert family.long is not None
    assert family.long.minutes == month
    assert quota.left(NOW) == 0.0
    assert quota.spent_until(NOW) == NOW + 900_000


@pytest.mark.parametrize(
    ("first", "second", "short", "long"),
    [
        (300, WEEK, 300, WEEK),
        (WEEK, 300, 300, WEEK),
        (WEEK, None, None, WEEK),
        (1440, 1441, 1440, 1441),
    ],
)
def test_a_window_is_what_its_length_says(
    first: int, second: int | None, short: int | None, long: int | None
) -> None:
    limits: dict[str, Any] = {
        "primary": {"used_percent": 1, "window_minutes": first},
        "secondary": None if second is None else {"used_percent": 1, "window_minutes": second},
    }
    quota = Quota()
    quota.read_event(event(rate_limits=limits), NOW)
    family = quota.families["codex"]
    assert (family.short and family.short.minutes, family.long and family.long.minutes) == (short, long)


def test_a_report_without_lengths_speaks_of_the_windows_that_are_known() -> None:
    quota = Quota()
    quota.read_headers(HEADERS, NOW)
    quota.read_headers({"x-codex-primary-used-percent": "20"}, NOW + 1)
    assert quota.families["codex"].short == Window(20.0, 300, 1795223601.0, NOW + 1, "headers")
    # A use that falls was reset, so the reset that is known is an old one.
    quota.read_headers({"x-codex-primary-used-percent": "3"}, NOW + 2)
    assert quota.families["codex"].short == Window(3.0, 300, None, NOW + 2, "headers")


# -- out of order --------------------------------------------------------------------------


def limits_of(used: float, week: float = 10.0) -> dict[str, Any]:
    return {
        "primary": {"used_percent": used, "window_minutes": 300, "reset_after_seconds": 600},
        "secondary": {"used_percent": week, "window_minutes": WEEK, "reset_after_seconds": 6000},
    }


def test_a_report_that_was_overtaken_says_nothing() -> None:
    quota = Quota()
    quota.read_event(event(rate_limits=limits_of(50), plan_type="pro"), NOW + 10)
    late = {
        "plan_type": "plus",
        "rate_limit": {"primary_window": {"used_percent": 20, "limit_window_seconds": 18000}},
        "credits": {"has_credits": True, "unlimited": True},
        "rate_limit_reset_credits": {"available_count": 2},
        "spend_control": {"reached": True},
    }
    quota.read_usage(late, NOW + 12, asked=NOW + 9)
    family = quota.families["codex"]
    assert family.short == Window(50.0, 300, NOW + 610, NOW + 10, "event")
    assert quota.plan == "pro"
    assert quota.credits.unlimited is False
    assert (quota.seen_at, quota.source) == (NOW + 10, "event")
    # What only it knows is news.
    assert quota.reset_credits == Fact(2, NOW + 9, "usage")
    assert quota.spend == Spend(True, seen_at=NOW + 9, source="usage")
    # Asked later, it is believed, also where the use falls without a reset.
    quota.read_usage(late, NOW + 13, asked=NOW + 11)
    assert family.short is not None
    assert (family.short.used_percent, family.short.seen_at) == (20.0, NOW + 11)
    assert quota.plan == "plus"
    assert quota.credits.unlimited is True


def test_a_late_answer_does_not_bring_back_the_window_of_an_earlier_plan() -> None:
    quota = Quota()
    quota.read_headers(of_a_free_plan(ONE_WINDOW["zeros"]), NOW + 10)
    quota.read_headers(HEADERS, NOW + 12, asked=NOW + 2)
    family = quota.families["codex"]
    assert family.short is None
    assert family.long is not None
    assert family.long.used_percent == 35.0
    assert [place for place, _ in family.windows()] == ["primary"]
    assert quota.plan == "free"


def test_of_reports_of_one_moment_the_last_counts() -> None:
    quota = Quota()
    quota.read_event(event(rate_limits=limits_of(50)), NOW)
    quota.read_event(event(rate_limits=limits_of(51)), NOW)
    assert quota.left(NOW) == 49.0


def test_a_use_that_falls_without_a_reset_is_believed() -> None:
    quota = Quota()
    quota.read_event(event(rate_limits=limits_of(100, 100)), NOW)
    assert quota.is_spent(NOW)
    quota.read_event(event(rate_limits=limits_of(0, 3)), NOW + 1)
    assert quota.left(NOW + 1) == 97.0
    assert not quota.is_spent(NOW + 1)


def test_a_clock_that_is_set_back_blocks_nothing() -> None:
    """A year ahead, it saw a full window; its reset is a year away now, and so are newer reports."""
    year = 365 * 86_400.0
    quota = Quota()
    quota.read_event(event(rate_limits=limits_of(100)), NOW + year)
    assert quota.left(NOW + year) == 0.0
    assert quota.left(NOW) is None
    assert quota.spent_until(NOW) is None
    quota.read_event(event(rate_limits=limits_of(20)), NOW)
    assert quota.left(NOW) == 80.0


# -- what is used up -----------------------------------------------------------------------


def test_a_window_whose_reset_nobody_told_ends_with_its_length() -> None:
    quota = Quota()
    limits = {"primary": {"used_percent": 100, "window_minutes": 300}, "secondary": None}
    quota.read_event(event(rate_limits=limits), NOW)
    assert quota.left(NOW + 300 * 60 - 1) == 0.0
    assert quota.left(NOW + 300 * 60) is None
    # That it ends then at the latest is no time to wait for.
    assert quota.spent_until(NOW) is None
    assert quota.is_spent(NOW)


def test_a_reset_beyond_the_windows_length_is_none() -> None:
    quota = Quota()
    limits = {"primary": {"used_percent": 100, "window_minutes": 300, "reset_after_seconds": 86_400 * 20}}
    quota.read_event(event(rate_limits=limits), NOW)
    short = quota.families["codex"].short
    assert short is not None
    assert short.resets_at is None
    assert quota.left(NOW + 18_000) is None


@pytest.mark.parametrize(
    ("used", "week", "minutes", "until"),
    [(100, 10, 300, 600), (10, 100, WEEK, 6000), (100, 100, WEEK, 6000)],
)
def test_the_window_that_is_used_up_is_named(used: int, week: int, minutes: int, until: int) -> None:
    quota = Quota()
    quota.read_event(event(rate_limits=limits_of(used, week)), NOW)
    limit = quota.limit_of(NOW)
    assert limit is not None
    assert limit.minutes == minutes
    assert quota.spent_until(NOW) == NOW + until
    assert quota.limit_of(NOW + until) is None
    assert not quota.is_spent(NOW + until)


def test_nothing_known_is_not_used_up() -> None:
    quota = Quota()
    assert quota.limit_of(NOW) is None
    assert quota.spent_until(NOW) is None
    assert not quota.is_spent(NOW)
    assert not quota.is_spent(NOW, "codex_other")


def test_a_limit_that_is_reached_below_its_rounded_percents_is_reached() -> None:
    quota = Quota()
    limits = {**limits_of(99, 40), "allowed": False, "limit_reached": True}
    quota.read_event(event(rate_limits=limits), NOW)
    limit = quota.limit_of(NOW)
    assert limit is not None
    assert limit.minutes == 300
    assert quota.is_spent(NOW)
    assert quota.left(NOW) == 0.0
    assert quota.spent_until(NOW) == NOW + 600
    # A newer report that does not say so takes it back.
    quota.read_event(event(rate_limits=limits_of(99, 40)), NOW + 1)
    assert not quota.is_spent(NOW + 1)
    assert quota.left(NOW + 1) == 1.0


@pytest.mark.parametrize(
    ("bought", "pays"),
    [
        ({"has_credits": True, "unlimited": False, "balance": "12.5"}, True),
        ({"has_credits": True, "unlimited": False, "balance": None}, True),
        ({"has_credits": False, "unlimited": True}, True),
        ({"has_credits": True, "unlimited": False, "balance": "0"}, False),
        ({"has_credits": False, "unlimited": False, "balance": "5"}, False),
        ({"has_credits": True, "balance": "5", "overage_limit_reached": True}, False),
    ],
)
def test_credits_pay_for_what_the_windows_do_not_hold(bought: dict[str, Any], pays: bool) -> None:
    quota = Quota()
    quota.read_event(event(rate_limits=limits_of(100), credits=bought), NOW)
    assert quota.is_spent(NOW) is not pays
    assert quota.left(NOW) == 0.0


def test_what_an_owner_lets_one_person_spend_stops_the_credits() -> None:
    usage = {
        **USAGE,
        "rate_limit": {"primary_window": {"used_percent": 100, "limit_window_seconds": 18000}},
        "credits": {"has_credits": True, "unlimited": False, "balance": "100"},
        "spend_control": {
            "reached": True,
            "individual_limit": {
                "source": None,
                "limit": "25000",
                "used": "25000",
                "remaining": "0",
                "used_percent": 100,
                "remaining_percent": 0,
                "reset_after_seconds": 3600,
                "reset_at": 789,
            },
        },
        "rate_limit_reset_credits": {"available_count": 1},
    }
    quota = Quota()
    quota.read_usage(usage, NOW)
    assert quota.spend == Spend(True, "25000", "25000", 100.0, NOW + 3600, NOW, "usage")
    assert quota.reset_credits == Fact(1, NOW, "usage")
    assert quota.is_spent(NOW)
    assert not quota.is_spent(NOW + 3600)


# -- what a 429 means ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "verdict"),
    [
        ({"error": {"type": "usage_limit_reached", "resets_at": 1, "plan_type": "plus"}}, Verdict.EXHAUSTED),
        ({"error": {"code": "usage_limit_reached"}}, Verdict.EXHAUSTED),
        ({"error": {"type": "rate_limit_exceeded", "message": "slow down"}}, Verdict.LIMITED),
        ({"error": {"code": "rate_limit_exceeded", "type": "requests"}}, Verdict.LIMITED),
        ({"error": {"message": "no"}}, Verdict.LIMITED),
        ({"detail": "Too Many Requests"}, Verdict.LIMITED),
        (None, Verdict.LIMITED),
    ],
)
@pytest.mark.parametrize("used", [100, 97])
def test_a_429_is_split_by_its_word_and_never_by_the_windows(used: int, body: Any, verdict: Verdict) -> None:
    """A limit of usage may be reached at a rounded 97 %, and a full window may only be slowed down."""
    quota = Quota()
    quota.read_headers({**HEADERS, "x-codex-primary-used-percent": str(used)}, NOW)
    assert classify(429, fault_of(body)) is verdict
    assert (quota.limit_of(NOW) is not None) is (used == 100)


def test_a_refusal_says_which_kind_of_limit_it_was() -> None:
    quota = Quota()
    quota.read_headers({**HEADERS, "x-codex-rate-limit-reached-type": "rate_limit_reached"}, NOW)
    assert quota.reached == Fact("rate_limit_reached", NOW, "headers")
    quota.read_usage({**USAGE, "rate_limit_reached_type": None}, NOW + 1)
    assert quota.reached is None


# -- kept, and given back --------------------------------------------------------------------


def full() -> Quota:
    quota = Quota()
    quota.read_headers(HEADERS, NOW)
    quota.read_usage(
        {
            **USAGE,
            "spend_control": {
                "reached": False,
                "individual_limit": {
                    "limit": "5",
                    "used": "1",
                    "used_percent": 20,
                    "reset_after_seconds": 99,
                },
            },
            "rate_limit_reset_credits": {"available_count": 3},
        },
        NOW + 1,
    )
    quota.read_event(event(rate_limits=limits_of(12)), NOW + 2)
    quota.usage_status, quota.usage_at = 200, NOW + 1
    return quota


def test_all_of_it_can_be_kept_and_given_back() -> None:
    quota = full()
    kept = orjson.loads(orjson.dumps(quota.to_json()))
    assert Quota.from_json(kept, NOW + 3) == quota
    assert Quota.from_json(Quota().to_json(), NOW) == Quota()


def test_what_was_seen_in_a_future_is_not_given_back() -> None:
    """The clock was ahead when it was written."""
    given_back = Quota.from_json(full().to_json(), NOW - 10)
    assert given_back.families["codex"].windows() == []
    assert given_back.seen_at is None
    assert given_back.credits == Credits()
    assert given_back.plan == "plus"
    given_back.read_headers(HEADERS, NOW - 9)
    assert given_back.left(NOW - 9) == 60.0


def test_what_is_older_than_any_window_is_not_given_back() -> None:
    given_back = Quota.from_json(full().to_json(), NOW + MAX_RESET_SECONDS + 10)
    assert given_back.families["codex"].windows() == []
    assert given_back.credits == Credits()


# -- hostile -----------------------------------------------------------------------------------

ODD: list[Any] = [
    *(float("nan"), float("inf"), -1, -1e300, 1e300, 10**400, 0, 1, 99.9, True, False, None),
    *(
        "",
        "nan",
        "-5",
        "1e300",
        "9" * 100_000,
        "\ud800",
        "1_0",
        "٣",
        b"1",
        [],
        [[]],
        {},
        {"used_percent": {}},
    ),
]
odd = st.sampled_from(ODD) | st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=20), inner, max_size=3),
    max_leaves=10,
)
window = st.fixed_dictionaries(
    {},
    optional=dict.fromkeys(
        ("used_percent", "window_minutes", "limit_window_seconds", "reset_at", "reset_after_seconds"), odd
    ),
)
anything = odd | window
limit = st.fixed_dictionaries(
    {},
    optional=dict.fromkeys(
        ("primary", "secondary", "primary_window", "secondary_window", "allowed", "limit_reached"), anything
    ),
)


def is_sound(quota: Quota, now: float) -> None:
    """Check what everybody who reads a quota relies on."""
    assert len(quota.families) <= MAX_FAMILIES
    for name in [*quota.families, "codex"]:
        left = quota.left(now, name)
        assert left is None or 0.0 <= left <= 100.0
        until = quota.spent_until(now, name)
        assert until is None or now < until <= now + MAX_RESET_SECONDS
        quota.is_spent(now, name)
    for family in quota.families.values():
        for _, one in family.windows():
            assert 0.0 <= one.used_percent <= 100.0
            assert one.minutes is None or 1 <= one.minutes <= MAX_RESET_SECONDS / 60
            assert one.is_over(now + MAX_RESET_SECONDS)
    kept = orjson.dumps(quota.to_json())
    assert len(kept) < 100_000
    assert orjson.dumps(Quota.from_json(json.loads(kept), now).to_json()) == kept


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["event", "usage"]), limit | odd, odd, odd, odd), max_size=5))
def test_no_json_breaks_it(reports: list[tuple[str, Any, Any, Any, Any]]) -> None:
    quota = Quota()
    for kind, limits, name, plan, bought in reports:
        if kind == "event":
            quota.read_event(
                {"rate_limits": limits, "metered_limit_name": name, "plan_type": plan, "credits": bought}, NOW
            )
        else:
            extra = [{"metered_feature": name, "limit_name": plan, "rate_limit": limits}, bought]
            quota.read_usage(
                {
                    "rate_limit": limits,
                    "additional_rate_limits": extra,
                    "plan_type": plan,
                    "credits": {"has_credits": bought, "balance": name},
                    "spend_control": {"reached": True, "individual_limit": bought},
                    "rate_limit_reset_credits": {"available_count": bought},
                    "rate_limit_reached_type": bought,
                },
                NOW,
            )
    is_sound(quota, NOW)


header = st.tuples(
    st.sampled_from(["codex", "codex-x", "", "a" * 100]),
    st.sampled_from(["-primary", "-secondary"]),
    st.sampled_from(["-used-percent", "-window-minutes", "-reset-at", "-reset-after-seconds"]),
).map(lambda parts: "x-" + "".join(parts))
numbers = st.sampled_from(["0", "100", "-7", "nan", "inf", "1e300", "", "300", "10080", str(NOW + 60)])


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(header | st.text(max_size=30), numbers | st.text(max_size=30), max_size=12))
def test_no_headers_break_it(headers: dict[str, str]) -> None:
    quota = Quota()
    quota.read_headers(headers, NOW)
    is_sound(quota, NOW)


@settings(max_examples=300, deadline=None)
@given(
    odd,
    st.sampled_from(["families", "credits", "plan", "spend", "reset_credits", "reached", "seen", "usage"]),
)
def test_nothing_that_is_kept_breaks_it(value: Any, key: str) -> None:
    kept = full().to_json()
    kept[key] = value
    is_sound(Quota.from_json(kept, NOW + 3), NOW + 3)
    is_sound(Quota.from_json(value, NOW), NOW)


@settings(max_examples=300, deadline=None)
@given(st.lists(odd, min_size=5, max_size=5), odd)
def test_no_window_that_is_kept_breaks_it(row: list[Any], told: Any) -> None:
    kept = {"families": {"codex": {"windows": {"primary": row, "secondary": told}, "told_at": told}}}
    is_sound(Quota.from_json(kept, NOW), NOW)


def test_thousands_of_families_do_not_make_it_grow() -> None:
    quota = Quota()
    quota.read_headers(HEADERS, NOW)

    def report(name: str, now: float) -> None:
        quota.read_event(event(metered_limit_name=name, rate_limits=limits_of(5)), now)

    for number in range(5_000):
        report(f"family-{number}", NOW)
    many = {f"x-codex-{n}-primary-used-percent": "5" for n in range(5_000)}
    entries = [
        {"metered_feature": f"usage_{n}", "rate_limit": {"primary_window": {"used_percent": 5}}}
        for n in range(5_000)
    ]
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        for again in range(3):
            quota.read_headers({**many, **HEADERS}, NOW + 2 * again + 1)
            assert quota.left(NOW) == 60.0
            quota.read_usage({**USAGE, "additional_rate_limits": entries}, NOW + 2 * again + 2)
        after, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert after - before < 100_000
    assert len(quota.families) == MAX_FAMILIES
    assert quota.families["codex"].primary is not None
    assert quota.left(NOW) == 73.0
    # One that says nothing any more makes room, the main one never.
    report("latest", NOW + 7 * 86_400)
    assert quota.left(NOW + 7 * 86_400, "latest") == 90.0
    assert "codex" in quota.families
    assert len(quota.families) == MAX_FAMILIES


def test_a_family_that_is_asked_for_beyond_the_bound_is_not_kept() -> None:
    quota = Quota()
    for number in range(MAX_FAMILIES + 5):
        assert quota.family(f"f{number}").id == f"f{number}"
    assert len(quota.families) == MAX_FAMILIES


@pytest.mark.parametrize("place", ["primary", "secondary"])
def test_a_report_of_one_place_leaves_the_other(place: Place) -> None:
    family = Family("codex")
    family.take(
        {"primary": Window(1.0, 300, None, NOW, "event"), "secondary": Window(2.0, WEEK, None, NOW, "event")},
        NOW,
    )
    minutes = 300 if place == "primary" else WEEK
    assert family.take({place: Window(9.0, minutes, None, NOW + 1, "event")}, NOW + 1)
    assert sorted(w.used_percent for _, w in family.windows()) == (
        [2.0, 9.0] if place == "primary" else [1.0, 9.0]
    )


# -- another plan ------------------------------------------------------------------------------


def test_a_reader_says_when_the_plan_is_another_one() -> None:
    quota = Quota()
    assert not quota.read_usage({"plan_type": "free"}, NOW), "the first word is no change"
    assert not quota.read_usage({"plan_type": "free"}, NOW + 1)
    assert not quota.read_usage({}, NOW + 2)
    assert quota.read_usage({"plan_type": "plus"}, NOW + 3)
    assert not quota.read_usage({"plan_type": "free"}, NOW + 4, asked=NOW + 1), "it is older"
    assert quota.read_headers({"x-codex-plan-type": "pro"}, NOW + 5)
    assert quota.read_event({"plan_type": "team", "rate_limits": {}}, NOW + 6)


def test_the_plan_of_the_token_is_the_one_before() -> None:
    quota = Quota(plan="free")
    assert quota.read_usage({"plan_type": "plus"}, NOW)


def test_two_sources_that_name_one_plan_differently_do_not_change_it_all_the_time() -> None:
    quota = Quota()
    changes = 0
    for turn in range(10):
        changes += quota.read_usage({"plan_type": "self_serve_business"}, NOW + turn)
        changes += quota.read_headers({"x-codex-plan-type": "business"}, NOW + turn + 0.5)
    assert changes == 1


# -- what is told again --------------------------------------------------------------------------


class Owned:
    """A quota's owner, who counts what it is told of."""

    def __init__(self) -> None:
        self.told = 0

    def touch(self) -> None:
        self.told += 1


SAID = {
    "x-codex-plan-type": "plus",
    "x-codex-primary-used-percent": "13",
    "x-codex-primary-window-minutes": "300",
    "x-codex-primary-reset-at": str(NOW + 9_000),
    "x-codex-primary-reset-after-seconds": "9000",
    "x-codex-secondary-used-percent": "40",
    "x-codex-secondary-window-minutes": "10080",
    "x-codex-secondary-reset-at": str(NOW + 90_000),
    "x-codex-credits-has-credits": "False",
    "x-codex-credits-unlimited": "False",
    "x-codex-credits-balance": "",
}


UNTOUCHED = {
    "x-codex-bengalfox-primary-used-percent": "0",
    "x-codex-bengalfox-primary-window-minutes": "300",
    "x-codex-bengalfox-primary-reset-at": str(NOW + 18_000),
    "x-codex-bengalfox-primary-reset-after-seconds": "18000",
    "x-codex-bengalfox-limit-name": "GPT-5.3-Codex-Spark",
}
"""A limit beside the main one that nobody has used: told with another reset each second."""


@pytest.mark.parametrize("seed", range(80))
def test_what_is_told_again_comes_to_the_same_as_if_it_were_read_again(seed: int) -> None:
    """Reports of all kinds, mixed, old and new, by a clock that jumps; one quota forgets how they were worded."""
    rng = random.Random(seed)
    quick, slow = Quota(), Quota()
    now = NOW
    headers = [
        SAID,
        {**SAID, "x-codex-primary-used-percent": "14"},
        {**SAID, "x-codex-secondary-used-percent": "0", "x-codex-secondary-window-minutes": "0",
         "x-codex-secondary-reset-at": "0"},
        {name: value for name, value in SAID.items() if "secondary" not in name},
        {name: value for name, value in SAID.items() if "credits" not in name and "minutes" not in name},
        {**SAID, "x-codex-extra-primary-used-percent": "5", "x-codex-extra-primary-window-minutes": "300",
         "x-codex-extra-limit-name": "Extra", "x-codex-rate-limit-reached-type": "rate_limit_reached"},
        {**SAID, **UNTOUCHED},
        {**SAID, **UNTOUCHED, "x-codex-bengalfox-primary-used-percent": "1"},
        {**SAID, "x-codex-plan-type": "free", "x-codex-primary-window-minutes": "10080"},
        {**SAID, "x-codex-primary-reset-at": str((NOW + 9_000) * 1_000), "x-codex-credits-balance": "x" * 500},
    ]  # fmt: skip
    window = {"used_percent": 13, "window_minutes": 300, "reset_at": NOW + 9_000}
    events = [
        event(rate_limits={"primary": window, "secondary": {**window, "window_minutes": 10_080}}),
        event(rate_limits={"primary": window, "secondary": None, "limit_reached": True, "allowed": False}),
        event(rate_limits={"primary": window, "limit_reached": 1, "allowed": 0}),
        event(rate_limits={"primary": {**window, "used_percent": True}}, credits={"has_credits": True}),
        event(metered_limit_name="codex_extra", rate_limits={"primary": window}),
        event(plan_type="pro", rate_limits={"primary": window, "secondary": {"used_percent": 40}}),
        event(rate_limits={"primary": window, "limit_reached": True, "allowed": False}),
    ]
    # Of all that may be said, this account's answers say little, and mostly the same.
    headers, events = rng.sample(headers, 2), rng.sample(events, 2)
    for _ in range(120):
        if rng.random() < 0.5:
            now += rng.choice([0.1, 1.0, 30.0, 100.0, 5_000.0, -1.0, -8_000.0])
        asked = now - rng.choice([0.0, 0.0, 0.5, 20.0, 4_000.0])
        kind = rng.choice(["headers"] * 5 + ["event"] * 4 + ["usage"])
        said = dict(rng.choice(headers[: rng.choice([1, 1, 1, 2])]))
        for name in ("x-codex-primary-reset-after-seconds", "x-codex-secondary-reset-after-seconds"):
            if name in said and rng.random() < 0.9:
                said[name] = str(int(NOW + 9_000 - now) + rng.choice([0, 0, 0, 50, 500]))
        if "x-codex-bengalfox-primary-reset-at" in said:
            # As if it began with the question; or it has begun, or the clocks differ, or nonsense.
            reset = asked + 300 * 60 + rng.choice([0, 0, 0, 0, 1, -50, -70, -4_000, 250, 400])
            said["x-codex-bengalfox-primary-reset-at"] = rng.choice([str(int(reset))] * 9 + ["soon"])
            said["x-codex-bengalfox-primary-reset-after-seconds"] = rng.choice([
                "18000",
                "18000",
                "17000",
                "",
            ])
        told = copy.deepcopy(rng.choice(events[: rng.choice([1, 1, 1, 2])]))
        for name in ("primary", "secondary"):
            data = told["rate_limits"].get(name)
            if isinstance(data, dict) and rng.random() < 0.8:
                data["reset_after_seconds"] = NOW + 9_000 - now + rng.choice([0, 0, 90])
        changes = []
        slow._headers = slow._event = None
        for quota in (slow, quick):
            if kind == "headers":
                changes.append(quota.read_headers(said, now, asked=asked))
            elif kind == "event":
                changes.append(quota.read_event(told, now, asked=asked))
            else:
                changes.append(quota.read_usage(USAGE, now, asked=asked))
        assert changes[0] == changes[1]
        assert quick.to_json() == slow.to_json()


def test_only_news_are_told_to_the_owner() -> None:
    quota, owner = Quota(), Owned()
    quota.owner = owner
    for later in range(10):
        after = str(9_000 - later)
        quota.read_headers({**SAID, "x-codex-primary-reset-after-seconds": after}, NOW + later)
    assert owner.told == 1
    main = quota.families["codex"]
    assert main.primary is not None
    assert (main.primary.seen_at, main.told_at, quota.credits.seen_at) == (
        NOW + 9,
        {"primary": NOW + 9, "secondary": NOW + 9},
        NOW + 9,
    )
    same = main.primary
    quota.read_event(
        event(rate_limits={"primary": {"used_percent": 13, "window_minutes": 300, "reset_at": NOW + 9_000}}),
        NOW + 10,
    )
    assert (main.primary is same, same.source, owner.told) == (True, "event", 1)
    quota.read_headers({**SAID, "x-codex-primary-used-percent": "14"}, NOW + 11)
    assert (main.primary is same, same.used_percent, owner.told) == (False, 13.0, 2)
    quota.read_headers({**SAID, "x-codex-credits-has-credits": "True"}, NOW + 12)
    assert owner.told == 3
    quota.read_headers({**SAID, "x-codex-plan-type": "pro"}, NOW + 13)
    assert owner.told == 4


def test_a_limit_that_nobody_uses_is_no_news_however_its_reset_moves() -> None:
    quota, owner = Quota(), Owned()
    quota.owner = owner
    for later in range(30):
        moved = {"x-codex-bengalfox-primary-reset-at": str(NOW + 18_000 + later)}
        quota.read_headers({**SAID, **UNTOUCHED, **moved}, NOW + later)
    assert owner.told == 1
    beside = next(one.primary for name, one in quota.families.items() if "bengalfox" in name)
    assert beside is not None
    assert (beside.resets_at, beside.seen_at, beside.is_untouched) == (NOW + 18_029, NOW + 29, True)
    # Somebody has begun it: its reset stays where it is from now on.
    for later in range(30, 120):
        quota.read_headers(
            {
                **SAID,
                **UNTOUCHED,
                "x-codex-bengalfox-primary-reset-at": str(NOW + 18_029),
                "x-codex-bengalfox-primary-reset-after-seconds": str(18_029 - later),
                "x-codex-primary-reset-after-seconds": str(9_000 - later),
            },
            NOW + later,
        )
    begun = next(one.primary for name, one in quota.families.items() if "bengalfox" in name)
    assert begun is not None
    assert not begun.is_untouched
    assert owner.told == 2


def test_a_reset_that_has_passed_is_none_although_it_is_told_again() -> None:
    quota = Quota()
    for now in (NOW, NOW + 1, NOW + 2, NOW + 9_001):
        quota.read_headers({**SAID, "x-codex-primary-reset-after-seconds": ""}, now)
    main = quota.families["codex"].primary
    assert main is not None
    assert main.resets_at is None
