"""What a turn costs: to the nanodollar, by model, tier and day, and never by a guess."""

import dataclasses
from datetime import UTC, datetime
from decimal import ROUND_CEILING, Decimal
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from codex_proxy.ledger.money import NANOS, format_money
from codex_proxy.ledger.prices import (
    CLAMPED,
    MOST_READ,
    MOST_WRITTEN,
    TIERS,
    OwnPrice,
    Price,
    PriceBook,
    Rates,
    clamped,
    cost,
    estimate,
    read_price,
)
from codex_proxy.trace import Usage, UsageSource

BOOK = PriceBook.load()


def at(day: str) -> int:
    """The first moment of a day."""
    return int(datetime.fromisoformat(day).replace(tzinfo=UTC).timestamp()) * 1000


NOW = at("2026-11-26")


def own(
    definition: dict[str, Any] | None,
    *,
    number: int = 1,
    model: str = "gpt-5",
    tier: str = "standard",
    since: int = 0,
) -> OwnPrice:
    """A price that an owner has set, or with None its end."""
    price = None
    if definition is not None:
        price = read_price(definition, id=f"own/{number}", model=model, tier=tier, since=since)
    return OwnPrice(number, model, tier, since, price)


def found(model: str, when: int = NOW, tier: str | None = None, book: PriceBook = BOOK) -> Price:
    price = book.find(model, when, tier)
    assert price is not None
    return price


def dollars(model: str, when: int = NOW, tier: str | None = None, *, read: int = 1) -> tuple[str, str, str]:
    """What a million tokens cost: input, cached input, output."""
    rates = found(model, when, tier).rates(read)
    return rates.texts["input"], rates.texts["cached"], rates.texts["output"]


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ("gpt-5", ("1.25", "0.125", "10.00")),
        ("gpt-5-codex", ("1.25", "0.125", "10.00")),
        ("gpt-5.1-codex-max", ("1.25", "0.125", "10.00")),
        ("gpt-5-mini", ("0.25", "0.025", "2.00")),
        ("gpt-5.1-codex-mini", ("0.25", "0.025", "2.00")),
        ("gpt-5-nano", ("0.05", "0.005", "0.40")),
        ("gpt-5-pro", ("15.00", "15.00", "120.00")),
        ("gpt-5.2-codex", ("1.75", "0.175", "14.00")),
        ("gpt-5.3-codex", ("1.75", "0.175", "14.00")),
        ("gpt-5.4", ("2.50", "0.25", "15.00")),
        ("gpt-5.4-mini", ("0.75", "0.075", "4.50")),
        ("gpt-5.4-nano", ("0.20", "0.02", "1.25")),
        ("gpt-5.5", ("5.00", "0.50", "30.00")),
        ("gpt-5.6-sol", ("4.00", "0.40", "20.00")),
        ("gpt-5.6-terra", ("2.00", "0.20", "12.00")),
        ("gpt-5.6-luna", ("0.20", "0.02", "1.20")),
        ("codex-mini", ("1.50", "0.375", "6.00")),
        ("gpt-6-sol", ("2.00", "0.20", "10.00")),
        ("gpt-6-luna", ("0.10", "0.01", "0.50")),
        ("gpt-6-astra", ("10.00", "1.00", "50.00")),
        ("gpt-6.1-sol", ("2.00", "0.10", "10.00")),
        ("gpt-6.1-terra", ("1.00", "0.05", "5.00")),
    ],
)
def test_models_cost_what_their_maker_says(model: str, expected: tuple[str, str, str]) -> None:
    assert dollars(model) == expected


def test_a_changed_price_counts_from_its_day_on() -> None:
    assert dollars("gpt-5.6-sol", at("2026-08-21") - 1) == ("5.00", "0.50", "30.00")
    assert dollars("gpt-5.6-sol", at("2026-08-21")) == ("4.00", "0.40", "20.00")
    assert dollars("gpt-5.6-luna", at("2026-07-29")) == ("1.00", "0.10", "6.00")


def test_a_tier_is_known_only_since_the_last_change_of_its_price() -> None:
    assert BOOK.find("gpt-5.6-sol", at("2026-08-20"), "priority") is None
    assert dollars("gpt-5.6-sol", at("2026-08-21"), "priority") == ("8.00", "0.80", "40.00")


def test_a_long_context_makes_the_whole_turn_dearer() -> None:
    assert dollars("gpt-5.4", read=272_000) == ("2.50", "0.25", "15.00")
    assert dollars("gpt-5.4", read=272_001) == ("5.00", "0.50", "22.50")
    assert dollars("gpt-5.4", tier="flex", read=272_001) == ("2.50", "0.25", "11.25")
    assert cost(found("gpt-5.4"), Usage(272_001, output_tokens=10)).nanos == 272_001 * 5_000 + 10 * 22_500


def test_a_cache_write_costs_more_where_it_is_charged_for() -> None:
    usage = Usage(1_000_000, cached_tokens=600_000, cache_write_tokens=100_000)
    small = Usage(100_000, cached_tokens=60_000, cache_write_tokens=10_000)
    assert cost(found("gpt-6-sol"), small).nanos == 30_000 * 2_000 + 60_000 * 200 + 10_000 * 2_500
    # All three dearer.
    assert cost(found("gpt-6-sol"), usage).nanos == 300_000 * 4_000 + 600_000 * 400 + 100_000 * 5_000
    # Where nothing is charged for it, it is input like any other.
    assert cost(found("gpt-5"), small).nanos == 40_000 * 1_250 + 60_000 * 125


def test_reasoning_is_part_of_the_output() -> None:
    with_it = Usage(10, output_tokens=100, reasoning_tokens=90)
    assert cost(found("gpt-5"), with_it).nanos == cost(found("gpt-5"), Usage(10, output_tokens=100)).nanos


# -- which price --------------------------------------------------------------------------


@pytest.mark.parametrize("tier", [None, "", "auto", "default", "standard"])
def test_no_tier_in_particular_is_the_standard_one(tier: str | None) -> None:
    assert found("gpt-5", tier=tier).tier == "standard"


def test_a_cheaper_tier_without_a_price_costs_what_the_standard_one_does() -> None:
    assert BOOK.find("gpt-5-codex", NOW, "flex") == BOOK.find("gpt-5-codex", NOW)


@pytest.mark.parametrize("tier", ["priority", "scale", "ultrafast", "Flex"])
def test_a_dearer_or_an_unknown_tier_without_a_price_has_none(tier: str) -> None:
    assert BOOK.find("gpt-5-codex", NOW, tier) is None


def test_a_snapshot_is_found_without_its_date_and_before_that_by_its_own_name() -> None:
    assert found("gpt-5-2025-08-07").model == "gpt-5"
    assert found("gpt-5.6-2026-05-01").model == "gpt-5.6-sol"
    assert found("gpt-4o-2024-05-13").model == "gpt-4o-2024-05-13"
    assert found("gpt-4o-2024-05-13") != found("gpt-4o")


@pytest.mark.parametrize(
    "model",
    ["", "gpt-5-", "GPT-5", "gpt-5-ultra", "gpt-5-2025-8-7", "gpt-5-2025-08-07-x", "openai/gpt-5", "gpt-5.3-codex-spark",
     "gpt-5-high", "o3\n", "claude-opus-5"],
)  # fmt: skip
def test_what_only_looks_like_a_model_has_no_price(model: str) -> None:
    assert BOOK.find(model, NOW) is None
    # The same when asked again.
    assert BOOK.find(model, NOW) is None


def test_made_up_names_are_not_kept_for_ever() -> None:
    book = PriceBook.load()
    for number in range(5000):
        assert book.find(f"model-{number}", NOW) is None
    assert len(book._names) <= 1024
    assert book.find("gpt-5", NOW) is not None
    # A tier may be as long as a body.
    for number in range(10):
        assert book.find("gpt-5", NOW, f"tier-{number}" * 1000) is None
    assert len(book._found) <= 1024
    assert not [tier for _, tier in book._found if tier is not None and len(tier) > 100]


# -- sums ---------------------------------------------------------------------------------

tokens = st.integers(min_value=0, max_value=2_000_000)
rate = st.integers(min_value=0, max_value=200 * NANOS)


@settings(deadline=None)
@given(tokens, tokens, tokens, tokens, st.tuples(rate, rate, rate, rate))
def test_a_cost_is_exact_but_for_one_rounding_up(
    into: int, cached: int, writes: int, out: int, rates: tuple[int, int, int, int]
) -> None:
    """Held beside decimal arithmetic on the texts of the prices."""
    price = Price("p", "m", "standard", 0, Rates(*rates))
    result = cost(price, Usage(into, cached, writes, out))
    used = result.usage
    parts = zip(
        (used.input_tokens - used.cached_tokens - used.cache_write_tokens, used.cached_tokens,
         used.cache_write_tokens, used.output_tokens),
        ("input", "cached", "cache_write", "output"),
        strict=True,
    )  # fmt: skip
    exact = sum((Decimal(count) * Decimal(result.prices[name]) for count, name in parts), Decimal(0))
    nanos = (exact / 1_000_000 * NANOS).to_integral_value(ROUND_CEILING)
    assert result.nanos == nanos
    assert format_money(result.nanos).count(".") == 1


numbers = st.integers(min_value=-(10**18), max_value=10**20)


@settings(deadline=None)
@given(numbers, numbers, numbers, numbers, numbers)
def test_absurd_numbers_are_clamped_and_flagged(
    into: int, cached: int, writes: int, out: int, reasoning: int
) -> None:
    price = found("gpt-5")
    asked = Usage(into, cached, writes, out, reasoning, UsageSource.BACKEND)
    before = dataclasses.replace(asked)
    result = cost(price, asked)
    used = result.usage
    assert asked == before
    assert 0 <= used.cached_tokens + used.cache_write_tokens <= used.input_tokens <= price.most_read
    assert 0 <= used.reasoning_tokens <= used.output_tokens <= price.most_written
    assert used.source is UsageSource.BACKEND
    assert (result.flags == (CLAMPED,)) == (used != asked)
    assert 0 <= result.nanos <= estimate(price, price.most_read, price.most_written)


def test_the_bounds_are_the_models_own_or_stated() -> None:
    assert clamped(Usage(10**12, output_tokens=10**12), found("gpt-5"))[0] == Usage(
        400_000, output_tokens=128_000
    )
    assert clamped(Usage(10**12, output_tokens=10**12))[0] == Usage(MOST_READ, output_tokens=MOST_WRITTEN)
    usage = Usage(5, 5, 0, 5, 5)
    assert clamped(usage) == (usage, ())


@settings(deadline=None)
@given(st.integers(0, 3_000_000), st.integers(0, 600_000), st.floats(0, 1), st.floats(0, 1))
def test_an_estimate_is_never_less_than_what_such_a_turn_costs(
    into: int, out: int, cached: float, written: float
) -> None:
    for name in ("gpt-5", "gpt-6-sol", "text-embedding-3-small"):
        hits = int(into * cached)
        usage = Usage(into, hits, int((into - hits) * written), out)
        assert cost(found(name), usage).nanos <= estimate(found(name), into, out)


# -- an owner's own prices ----------------------------------------------------------------


def test_an_owners_price_takes_the_place_of_all_the_package_says_of_a_model() -> None:
    book = BOOK.with_own([own({"input": "2.5", "output": "20"})])
    price = found("gpt-5", book=book)
    assert (price.id, price.short.texts["input"], price.short.cached) == ("own/1", "2.50", price.short.input)
    # A dearer tier has no price until the owner says one; a cheaper one has the standard price.
    assert book.find("gpt-5", NOW, "priority") is None
    assert found("gpt-5", tier="flex", book=book) == price
    # Snapshots and aliases follow.
    assert found("gpt-5-2025-08-07", book=book) == price
    assert found("gpt-5-codex", book=book).id == "package/gpt-5-codex/standard"


def test_an_owners_price_for_one_tier_leaves_the_others_as_they_are() -> None:
    """Who says what is dearer has not said that the rest has no price."""
    book = BOOK.with_own([own({"input": "7", "output": "8"}, tier="priority", since=2_000)])
    assert found("gpt-5", tier="priority", book=book).id == "own/1"
    assert found("gpt-5", 1_999, tier="priority", book=book).id == "package/gpt-5/priority"
    assert found("gpt-5", book=book).id == "package/gpt-5/standard"
    assert found("gpt-5", tier="flex", book=book).id == found("gpt-5", tier="flex").id
    assert [one.id for one in book.all_at(NOW) if one.model == "gpt-5" and one.tier == "priority"] == [
        "own/1"
    ]


def test_an_owners_price_counts_from_its_moment_on_until_it_is_ended() -> None:
    rows = [
        own({"input": "2", "output": "2"}, number=1, since=1_000),
        own({"input": "3", "output": "3"}, number=2, since=2_000),
        own(None, number=3, since=3_000),
    ]
    book = BOOK.with_own(reversed(rows))
    ids = [found("gpt-5", when, book=book).id for when in (999, 1_000, 1_999, 2_000, 2_999, 3_000)]
    assert ids == ["package/gpt-5/standard", "own/1", "own/1", "own/2", "own/2", "package/gpt-5/standard"]


def test_a_later_row_for_the_same_moment_corrects_the_earlier_one() -> None:
    rows = [own({"input": "3", "output": "3"}, number=8), own({"input": "2", "output": "2"}, number=7)]
    assert found("gpt-5", book=BOOK.with_own(rows)).id == "own/8"


def test_a_model_of_nobody_elses_can_have_a_price_and_it_may_be_nothing() -> None:
    book = BOOK.with_own([own({"input": "0", "output": "0"}, model="house-model")])
    assert cost(found("house-model", book=book), Usage(1000, output_tokens=1000)).nanos == 0
    assert book.find("house-model", NOW, "priority") is None
    assert book.find("house-model-2", NOW) is None
    ended = BOOK.with_own([own(None, model="house-model")])
    assert ended.find("house-model", NOW) is None


def test_all_prices_can_be_listed() -> None:
    book = BOOK.with_own([
        own({"input": "0", "output": "0"}, model="house-model"),
        own({"input": "1", "output": "1"}),
    ])
    listed = book.all_at(NOW)
    assert [price.id for price in listed if price.model in ("gpt-5", "house-model")] == ["own/1", "own/1"]
    assert [(p.model, p.tier) for p in listed if p.model == "gpt-5.6-sol"] == [
        ("gpt-5.6-sol", tier) for tier in ("standard", "flex", "batch", "priority")
    ]
    assert all(book.find(price.model, NOW, price.tier) == price for price in listed)
    assert book.aliases_of("gpt-5.6-sol") == ["gpt-5.6"]


def test_a_whole_definition() -> None:
    price = read_price(
        {"input": "1.25", "cached": "0.1", "cache_write": "2", "output": "10.000000001", "long": {"input": "3", "output": "4"},
         "long_above": 100, "reads": 1000, "writes": 200},
        id="own/1", model="m", tier="priority", since=5,
    )  # fmt: skip
    assert price.short == Rates(1_250_000_000, 100_000_000, 2_000_000_000, 10_000_000_001)
    assert price.rates(101) == Rates(3 * NANOS, 3 * NANOS, 3 * NANOS, 4 * NANOS)
    assert (price.most_read, price.most_written, price.tier, price.since) == (1000, 200, "priority", 5)


GOOD = {"input": "1", "output": "2"}


@pytest.mark.parametrize(
    ("definition", "said"),
    [
        ([], "prices: not an object"),
        ({}, "input: is missing"),
        ({"input": "1"}, "output: is missing"),
        ({"input": None, "output": "1"}, "input: is missing"),
        ({**GOOD, "input": 1.25}, "input: not a text"),
        ({**GOOD, "input": "-1"}, "input: not from 0"),
        ({**GOOD, "input": "100000.000000001"}, "input: not from 0 to 100000"),
        ({**GOOD, "output": "1.0000000001"}, "output: not an amount"),
        ({**GOOD, "cached": "free"}, "cached: not an amount"),
        ({**GOOD, "cache_write": True}, "cache_write: not a text"),
        ({**GOOD, "cached_input": "1"}, "cached_input: not a field"),
        ({**GOOD, "long": "2"}, "long: not an object"),
        ({**GOOD, "long": {"input": "2"}}, "long.output: is missing"),
        ({**GOOD, "long": {**GOOD, "long": {}}}, "long.long: not a field"),
        ({**GOOD, "long_above": 5}, "long_above: there is no price"),
        ({**GOOD, "long": GOOD, "long_above": 0}, "long_above: not a whole number"),
        ({**GOOD, "reads": 1.5}, "reads: not a whole number"),
        ({**GOOD, "writes": True}, "writes: not a whole number"),
        ({**GOOD, "writes": 10**9}, "writes: not a whole number from 1 to 100000000"),
    ],
)
def test_a_wrong_definition_is_refused_by_its_field(definition: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        read_price(definition, id="own/1", model="m", tier="standard", since=0)


def test_an_unknown_tier_is_refused() -> None:
    with pytest.raises(ValueError, match=r"tier: 'fast' is none of standard"):
        read_price(GOOD, id="own/1", model="m", tier="fast", since=0)
    assert TIERS[0] == "standard"
