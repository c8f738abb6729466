"""Episodes: one message when they begin, one when they end, nothing in between, whatever the numbers do."""

import json
from typing import Any

import pytest

from codex_proxy.alerts.episodes import CALM_SECONDS, Episodes, Told
from tests.accounts.making import NOW

KEY = ("error-share", "")
PATIENCE = {"error-share": 120.0, "account-needs-login": 0.0}


class Watch:
    """Looks every ten seconds."""

    def __init__(self) -> None:
        self.kept = Episodes()
        self.now = NOW
        self.told: list[Told] = []

    def look(
        self, *found: tuple[str, str], times: int = 1, patience: dict[str, float] | None = None
    ) -> list[Told]:
        news: list[Told] = []
        for _ in range(times):
            text = f"seen at {self.now:.0f}"
            news += self.kept.update(
                dict.fromkeys(found, text), PATIENCE if patience is None else patience, self.now
            )
            self.now += 10.0
        self.told += news
        return news


def test_what_lasts_is_told_once_and_its_end_is_told_once() -> None:
    watch = Watch()
    assert watch.look(KEY, times=12) == []
    (begun,) = watch.look(KEY, times=100)
    assert (begun.name, begun.since, begun.resolved_at) == ("error-share", NOW, None)
    assert [told.name for told in watch.kept.firing()] == ["error-share"]
    assert watch.kept.count() == {"error-share": 1}
    assert watch.look(times=12) == []
    (ended,) = watch.look(times=100)
    assert ended.since == NOW
    assert ended.resolved_at == NOW + 1120.0 + 120.0
    assert watch.kept.firing() == []
    assert watch.kept.recent() == [ended]


def test_what_is_short_is_not_told_at_all() -> None:
    watch = Watch()
    for _ in range(20):
        watch.look(KEY, times=11)
        watch.look(times=1)
    assert watch.told == []
    assert watch.kept.firing() == []


def test_what_flaps_is_one_episode() -> None:
    watch = Watch()
    watch.look(KEY, times=13)
    for _ in range(50):
        watch.look(times=5)
        watch.look(KEY, times=1)
    assert len(watch.told) == 1


def test_an_end_is_calm_for_a_minute_even_without_patience() -> None:
    watch, key = Watch(), ("account-needs-login", "work")
    assert len(watch.look(key)) == 1
    assert watch.look(times=int(CALM_SECONDS / 10)) == []
    assert len(watch.look()) == 1


def test_episodes_of_one_rule_are_told_apart_by_what_they_are_about() -> None:
    watch = Watch()
    watch.look(("account-needs-login", "work"))
    assert len(watch.look(("account-needs-login", "work"), ("account-needs-login", "home"))) == 1
    assert watch.kept.count() == {"account-needs-login": 2}
    assert [told.since for told in watch.kept.firing()] == [NOW + 10, NOW]


def test_a_rule_that_is_switched_off_ends_its_episodes_in_silence() -> None:
    watch = Watch()
    watch.look(KEY, times=13)
    assert watch.look(patience={}, times=50) == []
    assert watch.kept.firing() == []


def test_a_clock_that_is_set_back_keeps_nothing_waiting() -> None:
    watch = Watch()
    watch.look(KEY)
    watch.now = NOW - 1e6
    assert len(watch.look(KEY, times=14)) == 1
    watch.look()
    watch.now -= 1e6
    assert len(watch.look(times=14)) == 1


# --- over a restart


def restarted(watch: Watch) -> Watch:
    other = Watch()
    other.now = watch.now
    other.kept.restore(json.loads(json.dumps(watch.kept.dump())), watch.now)
    return other


def test_a_restart_tells_nothing_again() -> None:
    watch = Watch()
    watch.look(KEY, times=13)
    later = restarted(watch)
    assert later.look(KEY, times=100) == []
    assert [told.since for told in later.kept.firing()] == [NOW]
    later.look(times=14)
    assert [told.resolved_at is not None for told in later.told] == [True]
    assert len(restarted(later).kept.recent()) == 1


def test_what_was_not_told_yet_begins_anew() -> None:
    watch = Watch()
    watch.look(KEY, times=5)
    later = restarted(watch)
    assert later.look(KEY, times=12) == []
    assert len(later.look(KEY)) == 1


@pytest.mark.parametrize(
    "said",
    [
        {},
        {"episodes": 3, "recent": None},
        {"episodes": [3, None, {}, {"name": 1}, {"name": "a", "about": "", "text": "t", "since": "soon"}]},
        {"episodes": [{"name": "a", "about": "", "text": "t", "since": NOW + 1e9}]},
        {"episodes": [{"name": "a", "about": None, "text": "t", "since": 1.0}]},
        {"recent": [{"name": "a", "text": "t", "since": True, "resolved_at": 5}, {"name": "a"}]},
    ],
)
def test_nonsense_in_the_file_is_left_out(said: dict[str, Any]) -> None:
    kept = Episodes()
    kept.restore(said, NOW)
    assert kept.firing() == kept.recent() == []


def test_what_is_kept_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("codex_proxy.alerts.episodes._MAX_EPISODES", 10)
    watch = Watch()
    watch.look(*[("account-needs-login", f"acct-{number}") for number in range(100)])
    assert len(watch.kept.firing()) == 10
    watch.look(times=20)
    for number in range(200):
        watch.look(("account-needs-login", f"acct-{number}"))
        watch.look(times=8)
    assert len(watch.kept.recent()) == 50
    assert all(len(told.text) <= 300 for told in watch.kept.recent())
