"""When an upstream is left alone for a while, by what became of the last requests that went there.

One `Outlier` for each model of an upstream: a gateway may have lost one model and serve all others. Only the
gateway's own failures count, never what is wrong with a request. It is pure: times are arguments.

    in use --5 in a row, or more than half of 20 in 30 s--> ejected --its time is over--> half open
       ^                                                       ^                            |
       +------------------- the probe is answered -------------|----------------------------+
                                                               +--- the probe fails --------+
"""

from dataclasses import dataclass, field

CONSECUTIVE = 5
"""Failures in a row that are enough."""

SHARE = 0.5
"""More failures than this part of the requests are enough too..."""
AT_LEAST = 20
"""...if there were so many..."""
WINDOW = 30
"""...in so many seconds."""

BASE_SECONDS = 30.0
"""How long the first ejection lasts; the second in a row lasts twice as long, and so on."""
LONGEST_SECONDS = 300.0

CALM_SECONDS = 60.0
"""After so long in use, the next ejection is a step shorter."""


@dataclass(slots=True)
class _Second:
    """What became of the requests of one second."""

    at: int
    good: int = 0
    bad: int = 0


@dataclass(slots=True)
class Outlier:
    """How one upstream does with one model."""

    in_a_row: int = 0
    """Failures since the last answer."""
    until: float = 0.0
    """When its ejection ends; 0 while it is in use."""
    times: int = 0
    """How often it was ejected of late."""
    is_probed: bool = False
    """One request is under way to see whether it is well again."""
    _back: float = 0.0
    """Since when it has been in use."""
    _seconds: list[_Second] = field(default_factory=list)

    def is_ejected(self, now: float) -> bool:
        """Tell whether nothing is to go there: its time is not over, or the one probe is under way."""
        return self.until > 0.0 and (now < self.until or self.is_probed)

    def is_half_open(self, now: float) -> bool:
        """Tell whether one request may go there, as a probe."""
        return self.until > 0.0 and now >= self.until and not self.is_probed

    def good(self, now: float) -> None:
        """Take in an answer; one from a time before the ejection ends it no sooner."""
        self.in_a_row = 0
        self._count(now).good += 1
        if self.until > 0.0 and now >= self.until:
            self.until, self.is_probed = 0.0, False
            self._back = now
            # What is old says nothing about what it is now.
            self._seconds.clear()

    def bad(self, now: float) -> bool:
        """Take in a failure; tell whether that is one too many."""
        self.in_a_row += 1
        self._count(now).bad += 1
        if self.until > 0.0:
            # The probe; whatever else was under way when it was ejected changes nothing.
            return now >= self.until
        return self.in_a_row >= CONSECUTIVE or self._share() > SHARE

    def eject(self, now: float) -> float:
        """Leave it alone from *now* on; return for how long."""
        if self.until == 0.0:
            self.times = max(0, self.times - int((now - self._back) / CALM_SECONDS))
        self.times += 1
        seconds = min(BASE_SECONDS * self.times, LONGEST_SECONDS)
        self.until, self.is_probed = now + seconds, False
        self.in_a_row = 0
        self._seconds.clear()
        return seconds

    def unprobed(self) -> None:
        """Take in that the probe told nothing: its caller left, or its request was wrong."""
        self.is_probed = False

    def _count(self, now: float) -> _Second:
        at = int(now)
        if not self._seconds or self._seconds[-1].at != at:
            self._seconds = [one for one in self._seconds if one.at > at - WINDOW]
            self._seconds.append(_Second(at))
        return self._seconds[-1]

    def _share(self) -> float:
        """Return the part of the requests of the window that failed; 0 when there were too few."""
        bad = sum(one.bad for one in self._seconds)
        count = bad + sum(one.good for one in self._seconds)
        return bad / count if count >= AT_LEAST else 0.0


def may_eject(ejected: int, members: int) -> bool:
    """Tell whether one more of *members* may be ejected: half of them at most, and always one."""
    return ejected + 1 <= max(1, members // 2)
