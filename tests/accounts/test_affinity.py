"""What belongs to which account is remembered for a while, and only so much of it."""

from codex_proxy.accounts.affinity import Affinity, Origins, Recent


def test_a_conversation_is_found_until_it_is_old() -> None:
    affinity = Affinity(ttl=100.0)
    affinity.bind("talk", "a", 0.0)
    assert affinity.homes("talk", 99.9) == ("a",)
    assert affinity.homes("talk", 100.0) == ()
    assert len(affinity) == 0
    assert affinity.homes("other", 1.0) == ()
    assert affinity.homes(None, 1.0) == ()


def test_the_last_account_of_a_conversation_counts_and_starts_its_life_anew() -> None:
    affinity = Affinity(ttl=100.0)
    affinity.bind("talk", "a", 0.0)
    affinity.bind("talk", "b", 90.0)
    assert affinity.homes("talk", 150.0) == ("b", "a")
    assert len(affinity) == 1


def test_the_least_recently_used_entry_is_forgotten_first() -> None:
    recent: Recent[int] = Recent(2, 100.0)
    recent.put("one", 1, 0.0)
    recent.put("two", 2, 0.0)
    assert recent.get("one", 1.0) == 1
    recent.put("three", 3, 2.0)
    assert list(recent) == ["one", "three"]
    assert recent.get("two", 2.0) is None


def test_memory_is_bounded() -> None:
    affinity, origins = Affinity(size=10), Origins(size=10)
    for i in range(100):
        affinity.bind(f"talk {i}", "a", 0.0)
        origins.issued(f"item {i}", "a", 0.0)
        origins.refused(f"item {i}", "b", 0.0)
    assert len(affinity) == 10
    assert affinity.homes("talk 99", 0.0) == ("a",)
    assert affinity.homes("talk 89", 0.0) == ()
    assert origins.is_foreign("item 89", "a", 0.0)
    assert not origins.is_foreign("item 99", "a", 0.0)
    assert not origins.was_refused("item 89", "b", 0.0)
    assert origins.was_refused("item 99", "b", 0.0)


def test_an_item_is_foreign_to_all_but_the_account_that_issued_it() -> None:
    origins = Origins(ttl=100.0)
    origins.issued("gAAAA", "a", 0.0)
    assert not origins.is_foreign("gAAAA", "a", 1.0)
    assert origins.is_foreign("gAAAA", "b", 1.0)
    assert origins.is_foreign("gBBBB", "a", 1.0)
    assert origins.is_foreign("gAAAA", "a", 100.0)


def test_a_refused_item_is_known_for_the_account_that_refused_it() -> None:
    origins = Origins(ttl=100.0)
    before = origins.any_refused
    assert not origins.was_refused("gAAAA", "b", 0.0)
    origins.refused("gAAAA", "b", 0.0)
    assert (before, origins.any_refused) == (False, True)
    assert origins.was_refused("gAAAA", "b", 1.0)
    assert not origins.was_refused("gAAAA", "a", 1.0)
    assert not origins.was_refused("gBBBB", "b", 1.0)
    assert not origins.was_refused("gAAAA", "b", 100.0)


def test_items_are_kept_as_digests_only() -> None:
    origins = Origins()
    origins.issued("a secret \ud800 thought", "a", 0.0)
    origins.refused("a secret \ud800 thought", "b", 0.0)
    assert all("thought" not in key for table in (origins._issued, origins._refused) for key in table)
