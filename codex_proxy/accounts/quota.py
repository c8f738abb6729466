"""What is known of an account's quota: every number has its source and its age.

Unknown is not empty: a window that nobody has told us of, or whose reset has passed, says
nothing about what is left. The rules, each with its test:

- A window is what its length says (hours, or days), not its place: free plans put the week first.
- A report replaces what it speaks of. Zeros and nulls say that the plan has no such window, and a
  window of the same length in the other place is what the plan had before.
- Reports overtake each other: what an answer says is as old as the question, and an older report
  never replaces a newer one. A use that falls is believed: it was reset, or the plan changed.
- Nothing that comes from outside breaks this or makes it grow: what is no number says nothing.

Facts: backend contract, sections 4.1, 4.2 and 8.1.
"""

import functools
import math
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol, get_args

Source = Literal["headers", "event", "usage"]
Place = Literal["primary", "secondary"]

MAIN_FAMILY = "codex"
"""The limit that counts for every model which has none of its own."""

# No window of any plan is longer than a month; a later reset is a wrong unit or a broken clock.
MAX_RESET_SECONDS = 32 * 86_400.0

SHORT_MINUTES = 24 * 60
"""A plan has a window of hours and one of days; up to this length one is of hours."""

MAX_FAMILIES = 32
"""How many limits an account can have; there are two or three."""

# No answer is on its way for so long. What looks newer by more was seen before the clock was set back.
MAX_LATE_SECONDS = 3_600.0

# How far our clock and the backend's may differ before its distances are believed instead of its times.
_SKEW_SECONDS = 60.0

# A window ends no later than its length from now; seconds are rounded on the way.
_SLACK_SECONDS = 300.0

_MAX_MINUTES = MAX_RESET_SECONDS / 60
_MAX_WORD = 64
_MAX_NAME = 100
_MAX_DIGITS = 40
_MAX_COUNT = 1_000_000

_PRIMARY = "-primary-used-percent"
_PLACES: tuple[Place, Place] = ("primary", "secondary")

# A set of header names is studied once while it is no larger; what is larger is no answer of the backend's.
_MAX_HEADERS = 100


@dataclass(slots=True)
class Window:
    """One rolling limit: how much is used, how long it is, when it starts again.

    Other numbers are another object. Only when and by whom the same ones were told moves in it, so that
    whoever made something of them need not look again.
    """

    used_percent: float
    minutes: int | None
    """Its length; windows are told apart by this, not by their place (free plans put the week first)."""
    resets_at: float | None
    """Wall clock, seconds since the epoch."""
    seen_at: float
    """When the number was true: when the answer that told it was asked for."""
    source: Source

    @property
    def numbers(self) -> tuple[float, int | None, float | None]:
        """What it says, without when that was told."""
        return self.used_percent, self.minutes, self.resets_at

    @property
    def ends_at(self) -> float:
        """When it starts again at the latest: its reset, else its length from when it was seen."""
        if self.resets_at is not None:
            return self.resets_at
        return self.seen_at + (self.minutes * 60.0 if self.minutes is not None else MAX_RESET_SECONDS)

    def is_over(self, now: float) -> bool:
        """Tell whether its reset has passed, so that `used_percent` is history.

        So is one that was seen in a future: the clock was set back, and its times are wrong.
        """
        return now >= self.ends_at or now < self.seen_at - MAX_LATE_SECONDS

    @property
    def is_untouched(self) -> bool:
        """Tell whether nothing had begun it when it was seen: its whole length was still to come.

        The backend tells of a window that nobody has begun as if it began with the question.
        """
        return (
            self.used_percent <= 0.0
            and self.minutes is not None
            and self.ends_at - self.seen_at > self.minutes * 60.0 - _SKEW_SECONDS
        )


@dataclass(slots=True)
class Family:
    """The windows of one limit: the account's own, or that of a model family beside it."""

    id: str
    name: str | None = None
    primary: Window | None = None
    secondary: Window | None = None
    is_blocked: bool = False
    """Whether the last report said that the limit is reached, whatever its rounded percents are."""
    told_at: dict[Place, float] = field(default_factory=dict)
    """When each place was last spoken of, also to say that there is no window."""
    moves: int = field(default=0, compare=False, repr=False)
    """How often a report has changed a window."""

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
        return self.classes()[0]

    @property
    def long(self) -> Window | None:
        """The window of days: a week for most plans, in either place."""
        return self.classes()[1]

    def classes(self) -> tuple[Window | None, Window | None]:
        """Return the window of hours and that of days; of two of a class the one that is used more."""
        first, second = self.primary, self.secondary
        if first is None or second is None:
            if first is not None:
                return (None, first) if _is_long("primary", first) else (first, None)
            if second is not None:
                return (None, second) if _is_long("secondary", second) else (second, None)
            return None, None
        is_long = _is_long("primary", first)
        if _is_long("secondary", second) is not is_long:
            return (second, first) if is_long else (first, second)
        more = second if second.used_percent > first.used_percent else first
        return (None, more) if is_long else (more, None)

    def running(self, now: float) -> Iterator[Window]:
        """Return the windows that still say something."""
        for window in (self.primary, self.secondary):
            if window is not None and not window.is_over(now):
                yield window

    def left(self, now: float) -> float | None:
        """Return the percent left in the scarcest running window; None when nothing is known."""
        least: float | None = None
        for window in self.running(now):
            left = 0.0 if self.is_blocked else 100.0 - window.used_percent
            least = left if least is None or left < least else least
        return least

    def limit_of(self, now: float) -> Window | None:
        """Return the running window that is used up; of two the one that lasts longer.

        A limit that is reached although no window looks full is that of the fullest.
        """
        full = [window for window in self.running(now) if window.used_percent >= 100.0]
        if not full and self.is_blocked:
            full = sorted(self.running(now), key=lambda w: -w.used_percent)[:1]
        return max(full, key=lambda window: window.ends_at) if full else None

    def spent_until(self, now: float) -> float | None:
        """Return when what is used up starts again, if something is and the backend said when."""
        limit = self.limit_of(now)
        if limit is None:
            return None
        resets = [
            w.resets_at for w in self.running(now) if w.used_percent >= 100.0 and w.resets_at is not None
        ]
        return max(resets, default=limit.resets_at)

    def seen_at(self) -> float:
        """Return when it was last spoken of."""
        return max([*self.told_at.values(), *(window.seen_at for _, window in self.windows())], default=0.0)

    def take(self, told: Mapping[Place, Window | None], at: float, *, plan_changed: bool = False) -> bool:
        """Take a report of what each place holds; places it does not speak of are not in it.

        Args:
            at: When the report was true.
            plan_changed: Whether what it does not speak of was another plan's.

        Returns:
            Whether it was news.
        """
        fresh = {place: window for place, window in told.items() if not _is_older(at, self._told(place))}
        for place, window in fresh.items():
            self.moves += self._put(place, window, at)
        for place, other in self.windows():
            if place in told or _is_older(at, other.seen_at) or not fresh:
                continue
            if plan_changed or any(_is_twin(window, other) for window in fresh.values()):
                self.moves += self._put(place, None, at)
        return bool(fresh)

    def _told(self, place: Place) -> float | None:
        window = self.primary if place == "primary" else self.secondary
        return window.seen_at if window is not None else self.told_at.get(place)

    def _is_still_untouched(self, before: Window, window: Window) -> bool:
        """Tell whether nobody has begun a window yet, which is told with another reset each time.

        Only of the limits beside the main one: most accounts have some that are never used, and each of their
        answers speaks of them.
        """
        return (
            self.id != MAIN_FAMILY
            and before.minutes == window.minutes
            and before.seen_at <= window.seen_at
            and before.is_untouched
            and window.is_untouched
        )

    def _put(self, place: Place, window: Window | None, at: float) -> bool:
        """Note what a place holds; True when that is another window than before, or it ends later."""
        self.told_at[place] = at
        before = self.primary if place == "primary" else self.secondary
        if before is None and window is None:
            return False
        if (
            before is not None
            and window is not None
            and before.numbers == window.numbers
            # What was seen by a clock that was ahead may be over by that alone, and whether anything has begun a
            # window that was untouched depends on when it was seen.
            and before.seen_at <= window.seen_at
            and not before.is_untouched
        ):
            before.seen_at, before.source = window.seen_at, window.source
            return window.resets_at is None
        if before is not None and window is not None and self._is_still_untouched(before, window):
            before.resets_at, before.seen_at, before.source = window.resets_at, window.seen_at, window.source
            return False
        if place == "primary":
            self.primary = window
        else:
            self.secondary = window
        return True


@dataclass(slots=True)
class Credits:
    """Bought credits, as the backend reports them; only when and by whom that was told moves in it."""

    has_credits: bool | None = None
    unlimited: bool | None = None
    balance: str | None = None
    overage_limit_reached: bool | None = None
    seen_at: float | None = None
    source: Source | None = None

    @property
    def words(self) -> tuple[bool | None, bool | None, str | None, bool | None]:
        """What they say, without when that was told."""
        return self.has_credits, self.unlimited, self.balance, self.overage_limit_reached

    @property
    def pay(self) -> bool:
        """Whether requests beyond the plan's windows are paid for by credits."""
        if self.overage_limit_reached:
            return False
        return self.unlimited is True or (self.has_credits is True and _number(self.balance) != 0.0)


@dataclass(slots=True, frozen=True)
class Spend:
    """What an owner of a workspace lets one person spend, as the usage endpoint reports it."""

    reached: bool | None = None
    limit: str | None = None
    used: str | None = None
    used_percent: float | None = None
    resets_at: float | None = None
    seen_at: float | None = None
    source: Source | None = None

    def stops(self, now: float) -> bool:
        """Tell whether it forbids requests beyond the plan's windows."""
        return self.reached is True and (self.resets_at is None or now < self.resets_at)


@dataclass(slots=True)
class Fact:
    """Something that was said, by whom and when; only the last two move in it."""

    value: str | int
    seen_at: float
    source: Source


class Owner(Protocol):
    """Whose quota it is."""

    def touch(self) -> None:
        """Hear that it is another one now."""
        ...


@dataclass(slots=True)
class Quota:
    """Everything that one account's answers have told us about its limits.

    The readers take `asked`: when the answer was asked for, which is how old its numbers are;
    without it they are of *now*. They return whether the plan is another one than before.

    Most answers say what the one before them said, and are not read anew (`_Report`).
    """

    families: dict[str, Family] = field(default_factory=dict)
    credits: Credits = field(default_factory=Credits)
    plan: str | None = None
    plan_at: float | None = None
    """When an answer told the plan; None when it is only the token's word."""
    plan_source: Source | None = None
    told_plans: dict[Source, str] = field(default_factory=dict, compare=False)
    """The plan by each source's own last word: two that spell one plan differently change nothing."""
    spend: Spend | None = None
    reset_credits: Fact | None = None
    """How many times the owner can have the windows reset."""
    reached: Fact | None = None
    """Which kind of limit the backend says is reached."""
    seen_at: float | None = None
    """Of the newest number of any window."""
    source: Source | None = None
    usage_status: int | None = None
    """The status of the last usage query; None when there was none."""
    usage_at: float | None = None
    owner: Owner | None = field(default=None, compare=False, repr=False)
    """Told of what changes but for ages."""
    _is_news: bool = field(default=False, compare=False, repr=False)
    _headers: "_Heard | None" = field(default=None, compare=False, repr=False)
    _event: "_Heard | None" = field(default=None, compare=False, repr=False)

    def family(self, name: str) -> Family:
        """Return the family of that id, made at first sight; beyond a bound it is not kept."""
        found = self.families.get(name)
        if found is None:
            found = Family(name)
            if len(self.families) < MAX_FAMILIES:
                self.families[name] = found
        return found

    def left(self, now: float, family: str = MAIN_FAMILY) -> float | None:
        """Return the percent left for requests that count on *family*; None when unknown."""
        known = self.families.get(family)
        return known.left(now) if known is not None else None

    def limit_of(self, now: float, family: str = MAIN_FAMILY) -> Window | None:
        """Return the window of *family* that is used up, None when none is known to be."""
        known = self.families.get(family)
        return known.limit_of(now) if known is not None else None

    def spent_until(self, now: float, family: str = MAIN_FAMILY) -> float | None:
        """Return when *family* can be used again, if it is used up and the backend said when."""
        known = self.families.get(family)
        return known.spent_until(now) if known is not None else None

    def is_spent(self, now: float, family: str = MAIN_FAMILY) -> bool:
        """Tell whether requests that count on *family* are known to be refused.

        Not when credits pay for them: then a full window is the plan's, not the account's.
        """
        if self.limit_of(now, family) is None:
            return False
        return not self.credits.pay or (self.spend is not None and self.spend.stops(now))

    # -- reading --------------------------------------------------------------------------

    def read_headers(self, headers: Mapping[str, str], now: float, *, asked: float | None = None) -> bool:
        """Take what an answer's `x-<family>-...` headers say; *headers* has lower-case names."""
        at = now if asked is None else asked
        heard = self._headers
        layout: _Layout
        if heard is not None and heard.layout is not None and headers.keys() == heard.layout.names:
            layout = heard.layout
        else:
            layout = _layout(frozenset(headers)) if len(headers) <= _MAX_HEADERS else _make_layout(headers)
        said = layout.said(headers)
        parts: list[_Part | None] | None = None
        if heard is not None and heard.layout is layout and heard.said == said:
            distances = [headers.get(name) for name in layout.distances]
            resets = [headers.get(name) for name in layout.resets]
            if heard.report is not None and self._is_said_again(heard.report, distances, resets, now, at):
                return False
            parts = []
        before = self._plan_by("headers")
        plan = headers.get("x-codex-plan-type")
        changed = self._take_plan(plan, at, "headers") if plan else False
        for number, family in enumerate(layout.families):
            told: dict[Place, _Told] = {
                place: (headers.get(use), headers.get(length), headers.get(reset), headers.get(distance))
                for place, use, length, reset, distance in family.places
            }
            self._take(
                family.name, headers.get(family.title), told, now, at, "headers", plan_changed=changed,
                parts=parts, number=number,
            )  # fmt: skip
        kind = headers.get("x-codex-rate-limit-reached-type")
        if kind:
            self._take_reached(kind, at, "headers")
        has_credits = "x-codex-credits-has-credits" in headers
        if has_credits:
            self._take_credits(
                headers["x-codex-credits-has-credits"],
                headers.get("x-codex-credits-unlimited"),
                headers.get("x-codex-credits-balance"),
                None,
                at,
                "headers",
            )
        if heard is not None and parts is not None:
            plan_told, kind_told = plan is not None and plan != "", bool(kind)
            heard.report = self._report(
                parts, now, at, "headers", plan=plan_told, kind=kind_told, bought=has_credits
            )
        else:
            is_small = len(headers) <= _MAX_HEADERS and max(map(len, said), default=0) <= _MAX_NAME
            self._headers = _Heard(layout, said) if is_small else None
        self._tell()
        return before is not None and self._plan_by("headers") != before

    def read_event(self, event: Mapping[str, Any], now: float, *, asked: float | None = None) -> bool:
        """Take what a `codex.rate_limits` event says."""
        at = now if asked is None else asked
        limits: Any = event.get("rate_limits")
        if type(limits) is not dict and not isinstance(limits, Mapping):
            return False
        name = event.get("metered_limit_name") or event.get("limit_name") or MAIN_FAMILY
        first, second = _window_of(limits, "primary"), _window_of(limits, "secondary")
        bought: Any = event.get("credits")
        said: _Said = (
            event.get("plan_type"), name, limits.get("limit_reached"), limits.get("allowed"),
            first.get("used_percent"), first.get("window_minutes"), first.get("reset_at"),
            second.get("used_percent"), second.get("window_minutes"), second.get("reset_at"),
        )  # fmt: skip
        has_credits = type(bought) is dict or isinstance(bought, Mapping)
        if has_credits:
            said += (
                bought.get("has_credits"), bought.get("unlimited"), bought.get("balance"),
                bought.get("overage_limit_reached"),
            )  # fmt: skip
        distances = [first.get("reset_after_seconds"), second.get("reset_after_seconds")]
        heard = self._event
        parts: list[_Part | None] | None = None
        # The kinds as well: True is no 1, which is a number.
        if heard is not None and heard.said == said and heard.kinds == tuple(map(type, said)):
            if heard.report is not None and self._is_said_again(heard.report, distances, None, now, at):
                return False
            parts = []
        before = self._plan_by("event")
        changed = self._take_plan(said[0], at, "event")
        told: dict[Place, _Told] = {
            "primary": (said[4], said[5], said[6], distances[0]),
            "secondary": (said[7], said[8], said[9], distances[1]),
        }
        self._take(
            name, None, told, now, at, "event", limits=limits, plan_changed=changed, parts=parts
        )  # fmt: skip
        self._read_credits(bought, at, "event")
        if heard is not None and parts is not None:
            plan = _text(said[0], _MAX_WORD) is not None
            heard.report = self._report(parts, now, at, "event", plan=plan, kind=False, bought=has_credits)
        else:
            is_small = all(map(_is_small, said))
            self._event = _Heard(None, said, tuple(map(type, said))) if is_small else None
        self._tell()
        return before is not None and self._plan_by("event") != before

    def read_usage(self, usage: Mapping[str, Any], now: float, *, asked: float | None = None) -> bool:
        """Take what the usage endpoint says."""
        at = now if asked is None else asked
        before = self._plan_by("usage")
        changed = self._take_plan(usage.get("plan_type"), at, "usage")
        self._read_limit(MAIN_FAMILY, None, usage.get("rate_limit"), now, at, plan_changed=changed)
        extra = usage.get("additional_rate_limits")
        for entry in extra[:MAX_FAMILIES] if isinstance(extra, list) else []:
            if isinstance(entry, Mapping):
                self._read_limit(
                    entry.get("metered_feature"), entry.get("limit_name"), entry.get("rate_limit"), now, at
                )
        self._read_credits(usage.get("credits"), at, "usage")
        self._read_spend(usage.get("spend_control"), now, at)
        resets = usage.get("rate_limit_reset_credits")
        count = _number(resets.get("available_count")) if isinstance(resets, Mapping) else None
        if count is not None and not _is_older(at, _seen(self.reset_credits)):
            self.reset_credits = Fact(int(min(max(count, 0.0), _MAX_COUNT)), at, "usage")
        if "rate_limit_reached_type" in usage:
            kind = usage["rate_limit_reached_type"]
            self._take_reached(kind.get("type") if isinstance(kind, Mapping) else kind, at, "usage")
        self._tell()
        return before is not None and self._plan_by("usage") != before

    def _read_limit(
        self, family: Any, name: Any, limit: Any, now: float, at: float, *, plan_changed: bool = False
    ) -> None:
        if not isinstance(limit, Mapping):
            return
        told: dict[Place, _Told] = {}
        for place in _PLACES:
            data = _window_of(limit, f"{place}_window")
            seconds = _number(data.get("limit_window_seconds"))
            told[place] = (
                data.get("used_percent"),
                seconds / 60 if seconds is not None else None,
                data.get("reset_at"),
                data.get("reset_after_seconds"),
            )
        self._take(family, name, told, now, at, "usage", limits=limit, plan_changed=plan_changed)

    def _read_credits(self, data: Any, at: float, source: Source) -> None:
        if isinstance(data, Mapping):
            self._take_credits(
                data.get("has_credits"),
                data.get("unlimited"),
                data.get("balance"),
                data.get("overage_limit_reached"),
                at,
                source,
            )

    def _read_spend(self, data: Any, now: float, at: float) -> None:
        if not isinstance(data, Mapping) or _is_older(at, _seen(self.spend)):
            return
        own = data.get("individual_limit")
        own = own if isinstance(own, Mapping) else {}
        used = _number(own.get("used_percent"))
        self._is_news = True
        self.spend = Spend(
            _boolean(data.get("reached")),
            _text(own.get("limit"), _MAX_DIGITS),
            _text(own.get("used"), _MAX_DIGITS),
            None if used is None else _percent(used),
            reset_time(own.get("reset_at"), own.get("reset_after_seconds"), now),
            at,
            "usage",
        )

    # -- taking ---------------------------------------------------------------------------

    def _take(
        self,
        family: Any,
        name: Any,
        told: Mapping[Place, "_Told"],
        now: float,
        at: float,
        source: Source,
        *,
        limits: Mapping[str, Any] | None = None,
        plan_changed: bool = False,
        parts: "list[_Part | None] | None" = None,
        number: int = 0,
    ) -> None:
        """Take a report about one family; one that says nothing makes none.

        Args:
            parts: Where to add what it comes to, when that is of use.
            number: The family's place in the report.
        """
        known = self.families.get(family) if isinstance(family, str) else None
        key = known.id if known is not None else _key(family)
        if key is None:
            return
        if known is None:
            known = self.families.get(key)
        report: dict[Place, Window | None] = {}
        for place, (used, minutes, resets_at, after) in told.items():
            percent = _number(used)
            if percent is None:
                continue
            before = None if known is None else known.primary if place == "primary" else known.secondary
            report[place] = _window(percent, minutes, resets_at, after, now, at, source, before)
        if not report:
            return
        if known is None and not self._has_room(now):
            if parts is not None:
                parts.append(None)
            return
        if known is None:
            known = self.families[key] = Family(key)
        if name and name != known.name:
            known.name = _text(name, _MAX_NAME) or known.name
            self._is_news = True
        moves, was_blocked = known.moves, known.is_blocked
        if not known.take(report, at, plan_changed=plan_changed and key == MAIN_FAMILY):
            if parts is not None:
                parts.append(None)
            return
        known.is_blocked = (
            limits is not None
            and _boolean(limits.get("limit_reached")) is True
            and _boolean(limits.get("allowed")) is False
        )
        if known.moves != moves or known.is_blocked is not was_blocked:
            self._is_news = True
        if any(window is not None for window in report.values()) and not _is_older(at, self.seen_at):
            self.seen_at = at
            self.source = source
        if parts is not None:
            parts.append(_part(known, report, told, now, at, 2 * number))

    def _has_room(self, now: float) -> bool:
        """Tell whether one more family can be known; one that says nothing any more makes room."""
        if len(self.families) < MAX_FAMILIES:
            return True
        for key, family in self.families.items():
            if key != MAIN_FAMILY and not any(family.running(now)):
                del self.families[key]
                self._is_news = True
                return True
        return False

    def _take_plan(self, plan: Any, at: float, source: Source) -> bool:
        """Take the name of the plan; True when it is another one than was known."""
        word = plan if plan == self.plan else _text(plan, _MAX_WORD)
        if word is None or _is_older(at, self.plan_at):
            return False
        before, self.plan = self.plan, word
        if before != word:
            self._is_news = True
        self.plan_at, self.plan_source = at, source
        self.told_plans[source] = word
        return before is not None and before != word

    def _plan_by(self, source: Source) -> str | None:
        """Return the plan by the last word of *source*, by another's while it has not told any."""
        return self.told_plans.get(source, self.plan)

    def _take_reached(self, kind: Any, at: float, source: Source) -> None:
        if _is_older(at, _seen(self.reached)):
            return
        word = _text(kind, _MAX_WORD)
        known = self.reached
        if known is not None and known.value == word:
            known.seen_at, known.source = at, source
        else:
            self.reached = Fact(word, at, source) if word is not None else None

    def _take_credits(
        self, has_credits: Any, unlimited: Any, balance: Any, overage: Any, at: float, source: Source
    ) -> None:
        if not _is_older(at, self.credits.seen_at):
            words = (
                _boolean(has_credits),
                _boolean(unlimited),
                _text(balance, _MAX_DIGITS),
                _boolean(overage),
            )
            if words == self.credits.words:
                self.credits.seen_at, self.credits.source = at, source
                return
            self.credits = Credits(*words, at, source)
            self._is_news = True

    # -- what is told again ---------------------------------------------------------------

    def _report(
        self,
        parts: "list[_Part | None]",
        now: float,
        at: float,
        source: Source,
        *,
        plan: bool,
        kind: bool,
        bought: bool,
    ) -> "_Report | None":
        """Return what a report has come to; None when the same words may come to something else later."""
        kept: list[_Part] = []
        for part in parts:
            if part is None:
                return None
            kept.append(part)
        # What was overtaken came to nothing.
        if (
            (plan and self.plan_at != at)
            or (bought and self.credits.seen_at != at)
            or (kind and (self.reached is None or self.reached.seen_at != at))
        ):
            return None
        return _Report(
            source,
            now,
            at,
            min((part.until for part in kept), default=math.inf),
            kept,
            self.plan if plan else None,
            self.credits if bought else None,
            self.reached if kind else None,
        )

    def _is_said_again(
        self, last: "_Report", distances: Sequence[Any], resets: Sequence[Any] | None, now: float, at: float
    ) -> bool:
        """Take a report that is worded as *last* was; False when it may mean something else now.

        *resets* are the times it told, where they are no part of what was compared.
        """
        if not last.now <= now < last.until or at < last.at or (self.seen_at or at) > at:
            return False
        plan, bought, reached, source = last.plan, last.credits, last.reached, last.source
        if plan is not None and (plan != self.plan or (self.plan_at or at) > at):
            return False
        if bought is not None and (bought is not self.credits or (bought.seen_at or at) > at):
            return False
        if reached is not None and (reached is not self.reached or reached.seen_at > at):
            return False
        for part in last.parts:
            if not part.is_unchanged(self.families, distances, resets, now, at):
                return False
        for part in last.parts:
            part.tell(resets, at, source)
            if part.has_window:
                self.seen_at, self.source = at, source
        if plan is not None:
            self.plan_at, self.plan_source = at, source
            self.told_plans[source] = plan
        if bought is not None:
            bought.seen_at, bought.source = at, source
        if reached is not None:
            reached.seen_at, reached.source = at, source
        last.at, last.now = at, now
        return True

    def _tell(self) -> None:
        """Tell the owner if there is news."""
        if self._is_news:
            self._is_news = False
            if self.owner is not None:
                self.owner.touch()

    # -- keeping --------------------------------------------------------------------------

    def to_json(self) -> dict[str, Any]:
        """Return all of it as plain JSON."""
        return {
            "families": {
                family.id: {
                    "name": family.name,
                    "blocked": family.is_blocked,
                    "told_at": dict(family.told_at),
                    "windows": {
                        place: [w.used_percent, w.minutes, w.resets_at, w.seen_at, w.source]
                        for place, w in family.windows()
                    },
                }
                for family in self.families.values()
            },
            "credits": [
                self.credits.has_credits,
                self.credits.unlimited,
                self.credits.balance,
                self.credits.overage_limit_reached,
                self.credits.seen_at,
                self.credits.source,
            ],
            "plan": [self.plan, self.plan_at, self.plan_source],
            "spend": None
            if self.spend is None
            else [
                self.spend.reached,
                self.spend.limit,
                self.spend.used,
                self.spend.used_percent,
                self.spend.resets_at,
                self.spend.seen_at,
                self.spend.source,
            ],
            "reset_credits": _fact_to_json(self.reset_credits),
            "reached": _fact_to_json(self.reached),
            "seen": [self.seen_at, self.source],
            "usage": [self.usage_status, self.usage_at],
        }

    @classmethod
    def from_json(cls, document: object, now: float) -> "Quota":
        """Return what `to_json` said, as far as it can be true; anything else says nothing."""
        quota = cls()
        if not isinstance(document, Mapping):
            return quota
        families = document.get("families")
        for key, said in families.items() if isinstance(families, Mapping) else ():
            family = _family_from_json(key, said, now)
            if family is not None and len(quota.families) < MAX_FAMILIES:
                quota.families[family.id] = family
        has, unlimited, balance, overage, at, source = _row(document.get("credits"), 6)
        seen, by = _moment(at, now), _source(source)
        if seen is not None and by is not None:
            quota._take_credits(has, unlimited, balance, overage, seen, by)
        plan, at, source = _row(document.get("plan"), 3)
        quota.plan = _text(plan, _MAX_WORD)
        quota.plan_at, quota.plan_source = _moment(at, now), _source(source)
        quota.spend = _spend_from_json(document.get("spend"), now)
        quota.reset_credits = _fact_from_json(document.get("reset_credits"), now, int)
        quota.reached = _fact_from_json(document.get("reached"), now, str)
        at, source = _row(document.get("seen"), 2)
        quota.seen_at, quota.source = _moment(at, now), _source(source)
        status, at = _row(document.get("usage"), 2)
        if isinstance(status, int) and not isinstance(status, bool) and 100 <= status <= 599:
            quota.usage_status, quota.usage_at = status, _moment(at, now)
        return quota


def limits_told(usage: Mapping[str, Any]) -> dict[str, list[Mapping[str, Any]]]:
    """Return what a usage answer says of each limit, by family; of one it may say more than one thing."""
    told: dict[str, list[Mapping[str, Any]]] = {}
    extra = usage.get("additional_rate_limits")
    main = {"metered_feature": MAIN_FAMILY, "rate_limit": usage.get("rate_limit")}
    for entry in [main, *(extra[:MAX_FAMILIES] if isinstance(extra, list) else [])]:
        key = _key(entry.get("metered_feature")) if isinstance(entry, Mapping) else None
        limit = entry.get("rate_limit") if key is not None else None
        if key is not None and isinstance(limit, Mapping):
            told.setdefault(key, []).append(limit)
    return told


_Told = tuple[Any, Any, Any, Any]
"""What a report says of a place: use, length in minutes, reset as a time, reset as a distance."""

_Said = tuple[Any, ...]
"""All that a report says but for distances, which differ from answer to answer and mean the same."""


_SCALARS = frozenset({bool, int, float, type(None)})


class _FamilyNames(NamedTuple):
    """The headers of one limit."""

    name: str
    title: str
    places: tuple[tuple[Place, str, str, str, str], ...]
    """By place: use, length, reset as a time, reset as a distance."""


@dataclass(slots=True, frozen=True)
class _Layout:
    """What of a set of header names concerns quota."""

    names: frozenset[str]
    families: tuple[_FamilyNames, ...]
    said: Callable[[Mapping[str, str]], _Said]
    """Takes the values of all names but the resets' and the distances'."""
    distances: tuple[str, ...]
    resets: tuple[str, ...]


def _make_layout(headers: Iterable[str]) -> _Layout:
    """Find the limits that a set of header names speaks of."""
    names = frozenset(headers)
    prefixes = [h[: -len(_PRIMARY)] for h in headers if h.endswith(_PRIMARY) and h.startswith("x-")]
    prefixes.sort()
    # The main one first: nothing that stands beside it may take its place.
    prefixes.sort(key=lambda prefix: prefix != f"x-{MAIN_FAMILY}")
    families = tuple(
        _FamilyNames(
            prefix.removeprefix("x-"),
            f"{prefix}-limit-name",
            tuple(
                (
                    place,
                    f"{prefix}-{place}-used-percent",
                    f"{prefix}-{place}-window-minutes",
                    f"{prefix}-{place}-reset-at",
                    f"{prefix}-{place}-reset-after-seconds",
                )
                for place in _PLACES
            ),
        )
        for prefix in prefixes[:MAX_FAMILIES]
    )
    words = ["x-codex-plan-type", "x-codex-rate-limit-reached-type"]
    words += [f"x-codex-credits-{word}" for word in ("has-credits", "unlimited", "balance")]
    for family in families:
        words.append(family.title)
        words += [name for place in family.places for name in place[1:3]]
    told = [word for word in words if word in names]
    distances = tuple(place[4] for family in families for place in family.places)
    resets = tuple(place[3] for family in families for place in family.places)
    return _Layout(names, families, _getter(told), distances, resets)


# Answers have the same few sets of names.
_layout = functools.lru_cache(maxsize=64)(_make_layout)


def _getter(names: list[str]) -> Callable[[Mapping[str, str]], _Said]:
    match names:
        case []:
            return lambda _: ()
        case [name]:
            return lambda headers: (headers[name],)
        case _:
            return operator.itemgetter(*names)


def _is_small(word: Any) -> bool:
    kind = type(word)
    return len(word) <= _MAX_NAME if kind is str else kind in _SCALARS


@dataclass(slots=True)
class _Part:
    """What a report came to for one family."""

    family: Family
    primary: Window | None
    secondary: Window | None
    is_blocked: bool
    told: tuple[Place, ...]
    resets: tuple[tuple[int, float | None, Any, Window | None], ...]
    """By the number of its distance: the reset that was told as a time, None where there is no window; how it was
    told; the window, if it is one that nobody has begun."""
    until: float
    """When the same words mean something else, because a reset has passed."""
    has_window: bool

    def is_unchanged(
        self,
        families: Mapping[str, Family],
        distances: Sequence[Any],
        resets: Sequence[Any] | None,
        now: float,
        at: float,
    ) -> bool:
        """Tell whether the same words said at *at* would change nothing but ages."""
        family = self.family
        if (
            family.primary is not self.primary
            or family.secondary is not self.secondary
            or family.is_blocked is not self.is_blocked
            or families.get(family.id) is not family
        ):
            return False
        for place in self.told:
            known = family._told(place)
            if known is None or known > at:
                return False
        for number, reset, words, untouched in self.resets:
            if untouched is not None:
                if resets is None:
                    return False
                reset = _number(resets[number])
                if reset is None or not _begins_at(untouched, reset, now, at):
                    return False
            elif resets is not None and resets[number] != words:
                return False
            distance = _number(distances[number])
            if (
                distance is not None
                and 0 < distance <= MAX_RESET_SECONDS
                and (reset is None or abs(now + distance - reset) > _SKEW_SECONDS)
            ):
                return False
        return True

    def tell(self, resets: Sequence[Any] | None, at: float, source: Source) -> None:
        """Note that it was said again."""
        for number, _, _, untouched in self.resets:
            if untouched is not None and resets is not None:
                untouched.resets_at = _number(resets[number])
        told_at = self.family.told_at
        for place in self.told:
            told_at[place] = at
            window = self.primary if place == "primary" else self.secondary
            if window is not None:
                window.seen_at, window.source = at, source


@dataclass(slots=True)
class _Heard:
    """The last report of one kind."""

    layout: _Layout | None
    said: _Said
    kinds: tuple[type, ...] = ()
    """Of what was said; headers are all text."""
    report: "_Report | None" = None
    """What it came to, from the second time on: many are heard once."""


@dataclass(slots=True)
class _Report:
    """What a report came to."""

    source: Source
    now: float
    """When it was read last."""
    at: float
    """When it was true."""
    until: float
    parts: list[_Part]
    plan: str | None
    credits: Credits | None
    reached: Fact | None


def _begins_at(window: Window, reset: float, now: float, at: float) -> bool:
    """Tell whether a window that nobody had begun is told again as one, with that reset."""
    if window.minutes is None:
        return False
    seconds = window.minutes * 60.0
    return at + seconds - _SKEW_SECONDS < reset <= now + seconds + _SLACK_SECONDS


def _part(
    family: Family,
    report: Mapping[Place, Window | None],
    told: Mapping[Place, _Told],
    now: float,
    at: float,
    number: int,
) -> _Part | None:
    """Return what a report came to; None when it was overtaken, or would mean something else another time.

    Such a one leaves something to what was known before, or tells a reset as a distance only.
    """
    until = math.inf
    resets: list[tuple[int, float | None, Any, Window | None]] = []
    for index, place in enumerate(_PLACES):
        window = family.primary if place == "primary" else family.secondary
        if place not in report:
            if window is not None and any(_is_twin(fresh, window) for fresh in report.values()):
                return None
            continue
        _, minutes, resets_at, _ = told[place]
        reset, length = _number(resets_at), _number(minutes)
        if reset is not None and reset > 1e12:
            reset /= 1000.0
        if family._told(place) != at or (window is None) is not (report[place] is None):
            return None
        if window is None:
            if minutes is None or (reset is not None and reset > now):
                return None
        elif (
            length is None
            or reset is None
            or window.minutes != round(length)
            or window.resets_at != reset
            or (window.is_untouched and family.id == MAIN_FAMILY)
        ):
            return None
        elif window.is_untouched:
            resets.append((number + index, reset, resets_at, window))
            continue
        else:
            until = min(until, reset)
        resets.append((number + index, None if window is None else reset, resets_at, None))
    return _Part(
        family,
        family.primary,
        family.secondary,
        family.is_blocked,
        tuple(report),
        tuple(resets),
        until,
        any(window is not None for window in report.values()),
    )


def _window(
    percent: float,
    minutes: Any,
    resets_at: Any,
    after: Any,
    now: float,
    at: float,
    source: Source,
    before: Window | None,
) -> Window | None:
    """Return the window that a report describes; None when it says that there is none."""
    length = _number(minutes)
    reset = reset_time(resets_at, after, now)
    if percent <= 0 and not length and reset is None and (minutes is not None or before is None):
        # The backend fills windows that a plan does not have with zeros (contract, section
        # 4.1); one that we know is then that of an earlier plan.
        return None
    whole = round(length) if length is not None and 1 <= length <= _MAX_MINUTES else None
    percent = _percent(percent)
    if before is not None and not before.is_over(now):
        # A report that leaves things out speaks of the window that we know.
        if minutes is None:
            whole = before.minutes
        if reset is None and whole == before.minutes and percent >= before.used_percent:
            reset = before.resets_at
    if reset is not None and whole is not None and reset > now + whole * 60.0 + _SLACK_SECONDS:
        reset = None
    return Window(percent, whole, reset, at, source)


def _is_long(place: Place, window: Window) -> bool:
    return window.minutes > SHORT_MINUTES if window.minutes is not None else place == "secondary"


def _is_twin(window: Window | None, other: Window) -> bool:
    """Tell whether two windows are the same limit, told in two places."""
    if window is None or window.minutes is None or other.minutes is None:
        return False
    return (window.minutes > SHORT_MINUTES) is (other.minutes > SHORT_MINUTES)


def _is_older(at: float, known: float | None) -> bool:
    """Tell whether a report of *at* was overtaken by one of *known*.

    One that looks newer by more than any answer takes was seen by a clock that was wrong.
    """
    return known is not None and at < known <= at + MAX_LATE_SECONDS


def _seen(said: "Fact | Spend | None") -> float | None:
    return said.seen_at if said is not None else None


def reset_time(resets_at: Any, after_seconds: Any, now: float) -> float | None:
    """Return a plausible reset as wall clock, from an absolute time or from a distance.

    A reset that has passed, or is further away than any window is long, is no reset. Where the
    two disagree our clock is wrong, and what the backend counted needs none.
    """
    absolute = _number(resets_at)
    if absolute is not None and absolute > 1e12:
        absolute /= 1000.0
    distance = _number(after_seconds)
    counted = now + distance if distance is not None and 0 < distance <= MAX_RESET_SECONDS else None
    if absolute is None or not now < absolute <= now + MAX_RESET_SECONDS:
        return counted
    if counted is not None and abs(counted - absolute) > _SKEW_SECONDS:
        return counted
    return absolute


def _window_of(limits: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    data = limits.get(name, {})
    if type(data) is dict:
        # As nearly always; to ask for any mapping takes a while.
        return data
    if data is None:
        # Null and zeros say the same: the plan has no such window.
        return {"used_percent": 0, "window_minutes": 0, "limit_window_seconds": 0}
    return data if isinstance(data, Mapping) else {}


def _key(family: Any) -> str | None:
    """Return the id of a family out of a header's or a person's spelling of it."""
    word = _text(family, _MAX_WORD)
    return word.lower().replace("-", "_") if word is not None else None


def _row(value: object, length: int) -> Sequence[Any]:
    """Return a list of that length; nothing but None when it is none."""
    return value if isinstance(value, list) and len(value) == length else [None] * length


def _family_from_json(key: object, said: object, now: float) -> Family | None:
    word = _text(key, _MAX_WORD)
    if word is None or not isinstance(said, Mapping):
        return None
    family = Family(word, _text(said.get("name"), _MAX_NAME), is_blocked=said.get("blocked") is True)
    windows, told = said.get("windows"), said.get("told_at")
    for place in _PLACES:
        window = _window_from_json(windows.get(place), now) if isinstance(windows, Mapping) else None
        if window is not None:
            family._put(place, window, window.seen_at)
        moment = _moment(told.get(place), now) if isinstance(told, Mapping) else None
        if moment is not None:
            family.told_at[place] = moment
    return family


def _window_from_json(said: object, now: float) -> Window | None:
    used, minutes, resets_at, at, source = _row(said, 5)
    percent, length, reset = _number(used), _number(minutes), _number(resets_at)
    seen, by = _moment(at, now), _source(source)
    if percent is None or seen is None or by is None:
        return None
    if length is not None and not 1 <= length <= _MAX_MINUTES:
        return None
    # Seen when it was asked for, and told up to an hour later.
    if reset is not None and not seen < reset <= seen + MAX_RESET_SECONDS + MAX_LATE_SECONDS:
        return None
    return Window(_percent(percent), round(length) if length is not None else None, reset, seen, by)


def _spend_from_json(said: object, now: float) -> Spend | None:
    reached, limit, used, percent, resets_at, at, source = _row(said, 7)
    seen, by, number = _moment(at, now), _source(source), _number(percent)
    if seen is None or by is None:
        return None
    return Spend(
        _boolean(reached),
        _text(limit, _MAX_DIGITS),
        _text(used, _MAX_DIGITS),
        None if number is None else _percent(number),
        reset_time(resets_at, None, now),
        seen,
        by,
    )


def _fact_to_json(fact: Fact | None) -> list[Any] | None:
    return None if fact is None else [fact.value, fact.seen_at, fact.source]


def _fact_from_json(said: object, now: float, kind: type[int] | type[str]) -> Fact | None:
    value, at, source = _row(said, 3)
    seen, by = _moment(at, now), _source(source)
    if seen is None or by is None or isinstance(value, bool) or not isinstance(value, kind):
        return None
    if isinstance(value, str):
        word = _text(value, _MAX_WORD)
        return None if word is None else Fact(word, seen, by)
    return Fact(value, seen, by) if 0 <= value <= _MAX_COUNT else None


def _moment(value: object, now: float) -> float | None:
    """Return a time that has been, and so recently that it still says something."""
    number = _number(value)
    return number if number is not None and now - MAX_RESET_SECONDS <= number <= now else None


def _source(value: object) -> Source | None:
    for source in get_args(Source):
        if value == source:
            found: Source = source
            return found
    return None


def _percent(value: float) -> float:
    return min(max(value, 0.0), 100.0)


def _number(value: Any) -> float | None:
    kind = type(value)
    if kind is str:
        if not 0 < len(value) <= _MAX_DIGITS:
            return None
    elif kind is not float and kind is not int:
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _text(value: Any, limit: int) -> str | None:
    """Return *value* as a short text to show, None when it is none; a number is one."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        try:
            value = str(value)
        except ValueError:  # more digits than Python prints
            return None
    if not isinstance(value, str) or not 0 < len(value) <= limit:
        return None
    stripped = value.strip()
    return stripped if stripped and stripped.isprintable() else None


def _boolean(value: Any) -> bool | None:
    if isinstance(value, bool):
        return value
    if isinstance(value, str):
        return _BOOLEANS.get(value.strip().lower())
    return None


_BOOLEANS = {"true": True, "1": True, "false": False, "0": False}
