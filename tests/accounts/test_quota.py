"""Quota as the backend tells it: headers, events and the usage endpoint, and what is unknown."""

from typing import Any

import pytest

from codex_proxy.accounts.quota import MAX_RESET_SECONDS, Credits, Quota, Window, reset_time

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
    assert quota.credits == Credits(False, False, None)
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
    assert quota.credits == Credits(True, False, "12.5")
    quota.read_usage({"credits": {"has_credits": True, "unlimited": True, "balance": 3}}, NOW)
    assert quota.credits == Credits(True, True, "3")


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
    assert quota.credits == Credits(False, False, "0")
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
