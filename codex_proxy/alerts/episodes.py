"""Episodes of trouble: begun when it lasts, ended when it has been calm for a while; pure.

Told twice: at the begin and at the end. What goes on is written down, so that a restart in the middle of an
episode does not tell of it again.
"""

import math
from collections import Counter, deque
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from codex_proxy.alerts.rules import Key

# How long it must be calm until an episode is over.
CALM_SECONDS = 60.0

_MAX_RECENT = 50
# An account each; beyond this nobody reads on.
_MAX_EPISODES = 5_000
_MAX_TEXT = 300


@dataclass(slots=True)
class Episode:
    """One stretch of trouble. Times are seconds since the epoch."""

    name: str
    about: str
    text: str
    since: float
    """When it was first seen."""
    is_told: bool = False
    """It has lasted long enough to be told of."""
    calm_since: float | None = None
    """When it was last seen to be over, if it was."""

    @property
    def key(self) -> Key:
        """Which episode it is."""
        return self.name, self.about


@dataclass(slots=True, frozen=True)
class Told:
    """What is said of an episode."""

    name: str
    text: str
    since: float
    resolved_at: float | None = None
    """None while it goes on."""


class Episodes:
    """All that go on, and the last ones that ended."""

    def __init__(self) -> None:
        self._open: dict[Key, Episode] = {}
        self._recent: deque[Told] = deque(maxlen=_MAX_RECENT)

    @property
    def begun(self) -> frozenset[Key]:
        """The episodes that have been told of."""
        return frozenset([key for key, episode in self._open.items() if episode.is_told])

    def firing(self) -> list[Told]:
        """Return what goes on, the latest first."""
        told = [Told(one.name, one.text, one.since) for one in self._open.values() if one.is_told]
        return sorted(told, key=lambda one: -one.since)

    def recent(self) -> list[Told]:
        """Return the last ones that ended, the latest first."""
        return list(self._recent)

    def count(self) -> Counter[str]:
        """Return how many of each rule go on."""
        return Counter([name for name, _ in self.begun])

    def update(self, found: Mapping[Key, str], patience: Mapping[str, float], now: float) -> list[Told]:
        """Take in what is wrong *now*, and return what is to be told.

        Args:
            found: What is wrong, in words.
            patience: How long it has to last, by rule; a rule that is not there is switched off.
        """
        news: list[Told] = []
        for key, text in found.items():
            episode = self._open.get(key)
            if episode is None:
                if len(self._open) >= _MAX_EPISODES:
                    continue
                episode = self._open[key] = Episode(*key, "", now)
            episode.text, episode.calm_since = text[:_MAX_TEXT], None
            # A clock that was set back must not keep it waiting.
            episode.since = min(episode.since, now)
            if not episode.is_told and now - episode.since >= patience.get(episode.name, 0.0):
                episode.is_told = True
                news.append(Told(episode.name, episode.text, episode.since))
        for key in [key for key in self._open if key not in found]:
            news += self._calm(self._open[key], patience, now)
        return news

    def _calm(self, episode: Episode, patience: Mapping[str, float], now: float) -> Iterator[Told]:
        """Let an episode of which nothing is seen end, if it has been so for long enough."""
        needed = patience.get(episode.name)
        if not episode.is_told or needed is None:
            # Too short to be told of, or nobody wants to hear of it any more.
            del self._open[episode.key]
            return
        if episode.calm_since is None or episode.calm_since > now:
            episode.calm_since = now
        if now - episode.calm_since >= max(CALM_SECONDS, needed):
            del self._open[episode.key]
            told = Told(episode.name, episode.text, episode.since, now)
            self._recent.appendleft(told)
            yield told

    # -- over a restart -------------------------------------------------------------------

    def dump(self) -> dict[str, Any]:
        """Return what to keep: those that have been told of, and the last ones that ended."""
        return {
            "episodes": [asdict(one) for one in self._open.values() if one.is_told],
            "recent": [asdict(one) for one in self._recent],
        }

    def restore(self, said: Mapping[str, Any], now: float) -> None:
        """Take back what `dump` returned; whatever is wrong in it is left out."""
        for entry in _list(said.get("episodes"))[:_MAX_EPISODES]:
            told = told_of(entry)
            about = entry.get("about")
            if told is not None and isinstance(about, str) and told.since <= now:
                # How calm it was while nobody looked is not known.
                self._open[told.name, about] = Episode(told.name, about, told.text, told.since, is_told=True)
        for entry in _list(said.get("recent"))[:_MAX_RECENT]:
            told = told_of(entry)
            if told is not None and told.resolved_at is not None:
                self._recent.append(told)


def told_of(entry: object) -> Told | None:
    """Return what was said of an episode, out of a file; None for anything else."""
    if not isinstance(entry, dict):
        return None
    name, text, since = entry.get("name"), entry.get("text"), time_of(entry.get("since"))
    if not isinstance(name, str) or not isinstance(text, str) or since is None:
        return None
    return Told(name, text[:_MAX_TEXT], since, time_of(entry.get("resolved_at")))


def time_of(value: object) -> float | None:
    """Return a time out of a file; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def _list(value: object) -> list[Any]:
    return [entry for entry in value if isinstance(entry, dict)] if isinstance(value, list) else []
