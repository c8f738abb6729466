"""Where conversations go: the same order everywhere, shares by weight, and no moves but those that must be."""

import math
from collections import Counter

import pytest

from codex_proxy.upstream.rendezvous import order, score

KEYS = [f"conv_{number}" for number in range(4_000)]
MEMBERS = {"a": 1.0, "b": 1.0, "c": 2.0, "d": 4.0}


def first(key: str, members: dict[str, float]) -> str:
    return order(key, members.items())[0][0]


def test_the_order_depends_on_nothing_but_names_and_weights() -> None:
    for key in KEYS[:200]:
        assert order(key, MEMBERS.items()) == order(key, reversed(MEMBERS.items()))


def test_each_gets_its_share() -> None:
    got = Counter(first(key, MEMBERS) for key in KEYS)
    for name, weight in MEMBERS.items():
        expected = len(KEYS) * weight / sum(MEMBERS.values())
        assert got[name] == pytest.approx(expected, abs=4 * math.sqrt(expected))


@pytest.mark.parametrize("gone", MEMBERS)
def test_who_goes_moves_only_its_own(gone: str) -> None:
    rest = {name: weight for name, weight in MEMBERS.items() if name != gone}
    for key in KEYS:
        before = first(key, MEMBERS)
        after = first(key, rest)
        assert after == before or before == gone
        # The second choice was known before.
        assert before != gone or after == order(key, MEMBERS.items())[1][0]


def test_who_grows_only_takes() -> None:
    grown = {**MEMBERS, "b": 3.0}
    for key in KEYS:
        after = first(key, grown)
        assert after in (first(key, MEMBERS), "b")


def test_a_score_is_a_number_whatever_the_hash_says(monkeypatch: pytest.MonkeyPatch) -> None:
    class Hash:
        def __init__(self, value: bytes) -> None:
            self.value = value

        def digest(self) -> bytes:
            return self.value

    for data in (b"\0" * 8, b"\xff" * 8):
        monkeypatch.setattr("hashlib.blake2b", lambda *_args, data=data, **_options: Hash(data))
        assert 0.0 < score("k", "n", 1.0) < math.inf


def test_names_and_keys_do_not_run_into_each_other() -> None:
    assert score("ab", "c", 1.0) != score("a", "bc", 1.0)
    assert score("\ud800", "n", 1.0) > 0
