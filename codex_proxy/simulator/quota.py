"""How the backend tells about limits: headers, the rate-limit event, the usage page."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from codex_proxy.simulator.account import SimAccount, Window


def quota_headers(account: "SimAccount") -> dict[str, str]:
    """Return the x-codex-* headers that every answer of *account* carries."""
    headers = {
        "x-codex-active-limit": account.active_limit,
        "x-codex-plan-type": account.plan,
        "x-codex-primary-over-secondary-limit-percent": "0",
        "x-codex-credits-has-credits": "False",
        "x-codex-credits-unlimited": "False",
        "x-codex-credits-balance": "",
    }
    now = account.now()
    _window_headers(headers, "x-codex-primary", account.primary, now)
    _window_headers(headers, "x-codex-secondary", account.secondary, now)
    for family in account.families.values():
        prefix = "x-" + family.name.replace("_", "-")
        _window_headers(headers, f"{prefix}-primary", family.primary, now)
        _window_headers(headers, f"{prefix}-secondary", family.secondary, now)
        headers[f"{prefix}-limit-name"] = family.title
    return headers


def rate_limits_event(account: "SimAccount") -> dict[str, Any]:
    """Return the `codex.rate_limits` event; it has no sequence number."""
    now = account.now()
    primary = account.primary.view(now)
    secondary = account.secondary.view(now) if account.secondary.minutes else None
    reached = primary["used_percent"] >= 100 or (secondary is not None and secondary["used_percent"] >= 100)
    return {
        "type": "codex.rate_limits",
        "plan_type": account.plan,
        "metered_limit_name": None,
        "limit_name": None,
        "rate_limits": {
            "allowed": not reached,
            "limit_reached": reached,
            "primary": primary,
            "secondary": secondary,
        },
        "code_review_rate_limits": None,
        "credits": {"has_credits": False, "unlimited": False, "balance": None},
        "promo": None,
    }


def usage_page(account: "SimAccount") -> dict[str, Any]:
    """Return the body of /wham/usage; a state that limits the account shows here too."""
    now = account.now()
    fault = account.current_fault()
    limited: dict[str, float] = {}
    if fault is not None and fault.state == "usage_limit" and fault.until is not None:
        limited[str(fault.options.get("family", "codex"))] = fault.until
    return {
        "user_id": account.user_id,
        "account_id": account.account_id,
        "email": account.email,
        "plan_type": account.plan,
        "rate_limit": _limit(account.primary, account.secondary, now, limited.get("codex")),
        "code_review_rate_limit": None,
        "additional_rate_limits": [
            {
                "limit_name": family.title,
                "metered_feature": family.name,
                "rate_limit": _limit(family.primary, family.secondary, now, limited.get(family.name)),
            }
            for family in account.families.values()
        ]
        or None,
        "credits": {
            "has_credits": False,
            "unlimited": False,
            "overage_limit_reached": False,
            "balance": "0",
            "approx_local_messages": [0, 0],
            "approx_cloud_messages": [0, 0],
        },
        "spend_control": {"reached": False, "individual_limit": None},
        "rate_limit_reached_type": None,
        "rate_limit_reset_credits": {"available_count": 0},
        "promo": None,
    }


def _limit(primary: "Window", secondary: "Window", now: float, limited_until: float | None) -> dict[str, Any]:
    first = _usage_window(primary, now)
    second = _usage_window(secondary, now) if secondary.minutes else None
    if limited_until is not None:
        first |= {
            "used_percent": 100,
            "reset_at": round(limited_until),
            "reset_after_seconds": max(0, round(limited_until - now)),
        }
    reached = first["used_percent"] >= 100 or (second is not None and second["used_percent"] >= 100)
    return {
        "allowed": not reached,
        "limit_reached": reached,
        "primary_window": first,
        "secondary_window": second,
    }


def _usage_window(window: "Window", now: float) -> dict[str, int]:
    view = window.view(now)
    return {
        "used_percent": view["used_percent"],
        "limit_window_seconds": window.minutes * 60,
        "reset_after_seconds": view["reset_after_seconds"],
        "reset_at": view["reset_at"],
    }


def _window_headers(headers: dict[str, str], prefix: str, window: "Window", now: float) -> None:
    if not window.minutes:
        # A plan without a second window says so with zeros and an empty time.
        headers[f"{prefix}-used-percent"] = headers[f"{prefix}-window-minutes"] = "0"
        headers[f"{prefix}-reset-at"] = headers[f"{prefix}-reset-after-seconds"] = ""
        return
    for key, value in window.view(now).items():
        headers[f"{prefix}-{key.replace('_', '-')}"] = str(value)
