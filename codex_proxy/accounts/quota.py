"""What is known of an account's quota: every number has its source and its age.

Unknown is not empty: a window that nobody has told us of, or whose reset has passed, says
nothing about what is left. Facts: backend contract, sections 4.1, 4.2 and 8.1.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Source = Literal["headers", "event", "usage"]
Place = Literal["primary", "secondary"]

MAIN_FAMILY = "codex"
"""The limit that counts for every model which has none of its own."""

# No window of any plan is longer than a month; a later reset is a wrong unit or a broken clock.
MAX_RESET_SECONDS = 32 * 86_400.0

SHORT_MINUTES = 24 * 60
"""A plan has a window of hours and one of days; up to this length one is of hours."""

_PRIMARY = "-primary-used-percent"
_PLACES: tuple[Place, Place] = ("primary", "secondary")


@dataclass(slots=True, frozen=True)
class Window:
    """One rolling limit: how much is used, how long it is, when it starts again."""

    used_percent: float
    minutes: int | None
    """Its length; windows are told apart by this, not by their place (free plans put the week first)."""
    resets_at: float | None
    """Wall clock, seconds since the epoch."""
    seen_at: float
    source: Source

    def is_over(self, now: float) -> bool:
        """Tell whether its reset has passed, so that `used_percent` is history."""
        return self.resets_at is not None and now >= self.resets_at


@dataclass(slots=True)
class Family:
    """The windows of one limit: the account's own, or that of a model family beside it."""

    id: str
    name: str | None = None
    primary: Window | None = None
    secondary: Window | None = None

    def windows(self) -> list[tuple[Place, Window]]:
        """Return the windows that are known."""
        found: list[tuple[Place, Window]] = []
        if self.primary is not None:
            found.append(("primary", self.primary))
        if self.secondary is not None:
            found.append(("secondary", self.secondary))
        return found

    @property
    def short(self) -> Window | None:
        """The window of hours, by its length; by its place only where nobody told the length."""
        return next((w for place, w in self.windows() if not _is_long(place, w)), None)

    @property
    def long(self) -> Window | None:
        """The window of days: a week for most plans, in either place."""
        return next((w for place, w in self.windows() if _is_long(place, w)), None)

    def left(self, now: float) -> float | None:
        """Return the percent left in the scarcest running window; None when nothing is known."""
        least: float | None = None
        for window in (self.primary, self.secondary):
            if window is not None and not window.is_over(now):
                left = 100.0 - window.used_percent
                least = left if least is None or left < least else least
        return least

    def spent_until(self, now: float) -> float | None:
        """Return when the last window that is used up starts again, if one is."""
        resets = [
            w.resets_at
            for _, w in self.windows()
            if w.used_percent >= 100.0 and w.resets_at is not None and w.resets_at > now
        ]
        return max(resets) if resets else None


@dataclass(slots=True)
class Credits:
    """Bought credits, as the backend reports them."""

    has_credits: bool | None = None
    unlimited: bool | None = None
    balance: str | None = None


@dataclass(slots=True)
class Quota:
    """Everything that one account's answers have told us about its limits."""

    families: dict[str, Family] = field(default_factory=dict)
    credits: Credits = field(default_factory=Credits)
    plan: str | None = None
    seen_at: float | None = None
    source: Source | None = None
    usage_status: int | None = None
    """The status of the last usage query; None when there was none."""
    usage_at: float | None = None

    def family(self, name: str) -> Family:
        """Return the family of that id, made at first sight."""
        return self.families.setdefault(name, Family(name))

    def left(self, now: float, family: str = MAIN_FAMILY) -> float | None:
        """Return the percent left for requests that count on *family*; None when unknown."""
        known = self.families.get(family)
        return known.left(now) if known is not None else None

    def read_headers(self, headers: Mapping[str, str], now: float) -> None:
        """Take what an answer's `x-<family>-...` headers say; *headers* has lower-case names."""
        for header in headers:
            if not (header.startswith("x-") and header.endswith(_PRIMARY)):
                continue
            prefix = header[: -len(_PRIMARY)]
            family = self.family(prefix.removeprefix("x-").replace("-", "_"))
            family.name = headers.get(f"{prefix}-limit-name") or family.name
            for which in _PLACES:
                self._take(
                    family,
                    which,
                    headers.get(f"{prefix}-{which}-used-percent"),
                    headers.get(f"{prefix}-{which}-window-minutes"),
                    headers.get(f"{prefix}-{which}-reset-at"),
                    headers.get(f"{prefix}-{which}-reset-after-seconds"),
                    now,
                    "headers",
                )
        plan = headers.get("x-codex-plan-type")
        if plan:
            self.plan = plan
        if "x-codex-credits-has-credits" in headers:
            self.credits = Credits(
                _boolean(headers.get("x-codex-credits-has-credits")),
                _boolean(headers.get("x-codex-credits-unlimited")),
                headers.get("x-codex-credits-balance") or None,
            )

    def read_event(self, event: Mapping[str, Any], now: float) -> None:
        """Take what a `codex.rate_limits` event says."""
        limits = event.get("rate_limits")
        if not isinstance(limits, Mapping):
            return
        name = event.get("metered_limit_name") or event.get("limit_name") or MAIN_FAMILY
        family = self.family(str(name).lower().replace("-", "_"))
        for which in _PLACES:
            data = _window_of(limits, which)
            self._take(
                family,
                which,
                data.get("used_percent"),
                data.get("window_minutes"),
                data.get("reset_at"),
                data.get("reset_after_seconds"),
                now,
                "event",
            )
        if isinstance(event.get("plan_type"), str):
            self.plan = event["plan_type"]
        self._read_credits(event.get("credits"))

    def read_usage(self, usage: Mapping[str, Any], now: float) -> None:
        """Take what the usage endpoint says."""
        self._read_limit(self.family(MAIN_FAMILY), usage.get("rate_limit"), now)
        extra = usage.get("additional_rate_limits")
        for entry in extra if isinstance(extra, list) else []:
            if isinstance(entry, Mapping) and isinstance(entry.get("metered_feature"), str):
                family = self.family(entry["metered_feature"].lower().replace("-", "_"))
                if isinstance(entry.get("limit_name"), str):
                    family.name = entry["limit_name"]
                self._read_limit(family, entry.get("rate_limit"), now)
        if isinstance(usage.get("plan_type"), str):
            self.plan = usage["plan_type"]
        self._read_credits(usage.get("credits"))

    def _read_limit(self, family: Family, limit: Any, now: float) -> None:
        if not isinstance(limit, Mapping):
            return
        for which in _PLACES:
            data = _window_of(limit, f"{which}_window")
            seconds = _number(data.get("limit_window_seconds"))
            self._take(
                family,
                which,
                data.get("used_percent"),
                seconds / 60 if seconds is not None else None,
                data.get("reset_at"),
                data.get("reset_after_seconds"),
                now,
                "usage",
            )

    def _read_credits(self, data: Any) -> None:
        if isinstance(data, Mapping):
            balance = data.get("balance")
            self.credits = Credits(
                _boolean(data.get("has_credits")),
                _boolean(data.get("unlimited")),
                str(balance) if balance not in (None, "") else None,
            )

    def _take(
        self,
        family: Family,
        place: Place,
        used: Any,
        minutes: Any,
        resets_at: Any,
        after_seconds: Any,
        now: float,
        source: Source,
    ) -> None:
        percent, length = _number(used), _number(minutes)
        if percent is None:
            return
        reset = reset_time(resets_at, after_seconds, now)
        if percent == 0 and not length and reset is None:
            # The backend fills windows that a plan does not have with zeros (contract, section
            # 4.1); one that we know is then that of an earlier plan.
            window = None
        else:
            window = Window(max(0.0, percent), int(length) if length else None, reset, now, source)
        if place == "primary":
            family.primary = window
        else:
            family.secondary = window
        if window is not None:
            self.seen_at = now
            self.source = source


def _is_long(place: Place, window: Window) -> bool:
    return window.minutes > SHORT_MINUTES if window.minutes is not None else place == "secondary"


def reset_time(resets_at: Any, after_seconds: Any, now: float) -> float | None:
    """Return a plausible reset as wall clock, from an absolute time or from a distance.

    A reset that has passed, or is further away than any window is long, is no reset.
    """
    absolute = _number(resets_at)
    if absolute is not None and absolute > 1e12:
        absolute /= 1000.0
    if absolute is None or not now < absolute <= now + MAX_RESET_SECONDS:
        distance = _number(after_seconds)
        absolute = now + distance if distance is not None else None
    if absolute is None or not now < absolute <= now + MAX_RESET_SECONDS:
        return None
    return absolute


def _window_of(limits: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    data = limits.get(name, {})
    if data is None:
        # Null and zeros say the same: the plan has no such window.
        return {"used_percent": 0}
    return data if isinstance(data, Mapping) else {}


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or value is None:
        return None
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if number == number and abs(number) != float("inf") else None


def _boolean(value: Any) -> bool | None:
    if isinstance(value, bool):
        return value
    if isinstance(value, str):
        return {"true": True, "1": True, "false": False, "0": False}.get(value.strip().lower())
    return None
