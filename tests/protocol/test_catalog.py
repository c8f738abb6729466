"""Model names: suffixes, budgets, live lists over the table, the wire profile."""

import itertools
from typing import Any

import pytest

from codex_proxy.protocol.catalog import BUILT_IN, EFFORTS, Catalog, Resolved
from codex_proxy.protocol.responses_request import decode
from codex_proxy.protocol.wire import JsonObject, dumps, loads

CATALOG = Catalog()


def live(slug: str, **fields: Any) -> dict[str, Any]:
    return {
        "slug": slug,
        "display_name": slug.upper(),
        "supported_reasoning_levels": [
            {"effort": "low", "description": "l"},
            {"effort": "high", "description": "h"},
        ],
        "visibility": "list",
        **fields,
    }


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("gpt-5.4", Resolved("gpt-5.4")),
        ("gpt-5.4-high", Resolved("gpt-5.4", "high")),
        ("gpt-5.4-fast", Resolved("gpt-5.4", None, True)),
        ("gpt-5.4-high-fast", Resolved("gpt-5.4", "high", True)),
        ("gpt-5.4-fast-high", Resolved("gpt-5.4", "high", True)),
        ("gpt-5.4-HIGH-Fast", Resolved("gpt-5.4", "high", True)),
        ("GPT-5.4-xhigh", Resolved("gpt-5.4", "xhigh")),
        ("gpt-5.4-auto", Resolved("gpt-5.4", "auto")),
        ("gpt-6-sol-ultra", Resolved("gpt-6-sol", "ultra")),
        # A known slug wins over its own tail.
        ("gpt-5.1-codex-max", Resolved("gpt-5.1-codex-max")),
        ("gpt-5.1-codex-max-high", Resolved("gpt-5.1-codex-max", "high")),
        ("gpt-5.1-codex-max-fast", Resolved("gpt-5.1-codex-max", None, True)),
        ("gpt-5.1-codex-max-max", Resolved("gpt-5.1-codex-max", "max")),
        # Only one effort and one -fast.
        ("gpt-5.4-high-low", Resolved("gpt-5.4-high", "low")),
        ("gpt-5.4-fast-fast", Resolved("gpt-5.4-fast", None, True)),
        # Budgets, of known models only.
        ("gpt-5.4-512", Resolved("gpt-5.4", "minimal")),
        ("gpt-5.4-513", Resolved("gpt-5.4", "low")),
        ("gpt-5.4-1024", Resolved("gpt-5.4", "low")),
        ("gpt-5.4-8192", Resolved("gpt-5.4", "medium")),
        ("gpt-5.4-24576", Resolved("gpt-5.4", "high")),
        ("gpt-5.4-24577-fast", Resolved("gpt-5.4", "xhigh", True)),
        ("gpt-5.4-fast-24577", Resolved("gpt-5.4", "xhigh", True)),
        ("gpt-5.4-100", Resolved("gpt-5.4-100")),
        ("some-model-2025", Resolved("some-model-2025")),
        ("gpt-5.4-2026-03-05", Resolved("gpt-5.4-2026-03-05")),
        # Nobody knows these, so they pass, less a word that is a suffix.
        ("gpt-9-nova", Resolved("gpt-9-nova")),
        ("gpt-9-nova-high-fast", Resolved("gpt-9-nova", "high", True)),
        ("-high", Resolved("-high")),
        ("fast", Resolved("fast")),
        ("-", Resolved("-")),
    ],
)
def test_a_name_is_taken_apart_from_its_end(name: str, expected: Resolved) -> None:
    assert CATALOG.resolve(name) == expected


def test_every_listed_name_of_every_model_means_that_model() -> None:
    """No suffix of one model runs into the slug of another, `gpt-5.1-codex` + max excepted."""
    collisions = []
    for facts, suffix in itertools.chain.from_iterable(((f, s) for s in f.suffixes) for f in BUILT_IN):
        if CATALOG.resolve(facts.slug + suffix).model != facts.slug:
            collisions.append(facts.slug + suffix)
    assert collisions == ["gpt-5.1-codex-max", "gpt-5.1-codex-max-fast"]


def test_a_model_of_a_live_list_is_known_whatever_its_name_ends_in() -> None:
    catalog = Catalog(lists=[[live("gpt-9-codex-max")]])
    assert CATALOG.resolve("gpt-9-codex-max") == Resolved("gpt-9-codex", "max")
    assert catalog.resolve("gpt-9-codex-max") == Resolved("gpt-9-codex-max")
    assert catalog.resolve("gpt-9-codex-max-8000") == Resolved("gpt-9-codex-max", "medium")


@pytest.mark.parametrize(
    ("model", "effort", "expected"),
    [
        ("gpt-5.5", "high", "high"),
        ("gpt-5.5", "max", "xhigh"),
        ("gpt-5.5", "none", "low"),
        ("gpt-5.5", "minimal", "low"),
        ("gpt-5.4", "minimal", "none"),
        ("gpt-5.4", "none", "none"),
        # Two are equally near: the lesser one.
        ("gpt-5.1-codex", "xhigh", "high"),
        ("gpt-6-sol", "ultra", "xhigh"),
        ("gpt-6-luna", "ultra", "xhigh"),
        ("gpt-5", "ultra", "high"),
        ("nobody-knows", "ultra", "xhigh"),
        ("nobody-knows", "max", "max"),
        ("gpt-5.5", "brand-new", "brand-new"),
    ],
)
def test_an_effort_goes_to_the_nearest_that_the_model_has(model: str, effort: str, expected: str) -> None:
    assert CATALOG.nearest(model, effort) == expected


def test_no_effort_goes_out_that_a_known_model_lacks() -> None:
    for facts, effort in itertools.product(BUILT_IN, EFFORTS):
        assert CATALOG.nearest(facts.slug, effort) in set(facts.efforts) - {"ultra"}


def test_the_profile_is_the_configured_one_then_the_lists_then_the_tables() -> None:
    assert CATALOG.profile("gpt-6-sol") == "lite"
    assert CATALOG.profile("gpt-5.5") == "standard"
    assert CATALOG.profile("nobody-knows") == "standard"
    lists = [
        [live("gpt-6-sol", use_responses_lite=False), live("gpt-5.5", use_responses_lite=True), live("new")]
    ]
    catalog = Catalog({"gpt-6-luna": "standard", "new": "lite"}, lists)
    assert catalog.profile("gpt-6-sol") == "standard"
    assert catalog.profile("gpt-5.5") == "lite"
    assert catalog.profile("gpt-6-luna") == "standard"
    assert catalog.profile("new") == "lite"
    assert catalog.profile("gpt-6-astra") == "lite"


def test_a_live_list_outranks_the_table_and_the_first_list_wins() -> None:
    first = live(
        "gpt-5.5",
        supported_reasoning_levels=[{"effort": "max"}, {"effort": "low"}],
        default_reasoning_level="max",
        service_tiers=[],
        additional_speed_tiers=[],
        context_window=1000,
        max_context_window=2000,
    )
    catalog = Catalog(lists=[[first], [live("gpt-5.5"), live("other", visibility="hide")]])
    facts = catalog.facts("gpt-5.5")
    assert facts is not None
    assert (facts.efforts, facts.default, facts.fast) == (("low", "max"), "max", False)
    assert (facts.context_window, facts.max_context_window) == (1000, 2000)
    assert [(facts.slug, facts.hidden) for facts in catalog.models] == [("gpt-5.5", False), ("other", True)]
    assert catalog.nearest("gpt-5.5", "medium") == "low"
    assert not catalog.has_fast("gpt-5.5")
    assert catalog.has_fast("nobody-knows")


def test_what_a_live_object_does_not_say_comes_from_the_table() -> None:
    catalog = Catalog(lists=[[{"slug": "gpt-6-luna"}]])
    assert catalog.facts("gpt-6-luna") == CATALOG.facts("gpt-6-luna")


@pytest.mark.parametrize(
    "entry",
    [
        None,
        7,
        [],
        {},
        {"slug": None},
        {"slug": ""},
        {"slug": 7},
        {"slug": "odd", "supported_reasoning_levels": "high", "service_tiers": {"id": "priority"}},
        {
            "slug": "odd",
            "supported_reasoning_levels": [None, {"effort": ["low"]}, "low"],
            "service_tiers": [[], None],
        },
        {
            "slug": "odd",
            "context_window": True,
            "max_context_window": -1,
            "visibility": None,
            "display_name": 5,
        },
        {"slug": "odd", "use_responses_lite": "yes", "default_reasoning_level": {}},
    ],
)
def test_a_garbled_list_does_no_harm(entry: Any) -> None:
    catalog = Catalog(lists=[[entry, live("fine")]])
    assert catalog.known("fine")
    assert catalog.resolve("fine-high") == Resolved("fine", "high")
    assert catalog.profile("odd") == "standard"


def test_without_lists_the_table_is_what_there_is() -> None:
    assert Catalog(lists=[[], []]).models is BUILT_IN
    assert len({facts.slug for facts in BUILT_IN}) == len(BUILT_IN)


# --- the model map

LIVE = [[{"slug": "gpt-5.5"}, {"slug": "gpt-6-luna"}]]


@pytest.mark.parametrize(
    ("name", "model", "effort", "mapped", "fast"),
    [
        # Claude Code's own names get the strongest model that is served, haiku the small fast one.
        ("claude-opus-4-8", "gpt-5.5", None, None, False),
        ("claude-sonnet-4-5-20250929", "gpt-5.5", None, None, False),
        ("Claude-Fable-5[1m]", "gpt-5.5", None, None, False),
        ("claude-haiku-4-5-20251001", "gpt-6-luna", None, "low", False),
        ("claude-3-5-haiku-latest", "gpt-6-luna", None, "low", False),
        ("opus", "gpt-5.5", None, None, False),
        # What the caller types as a suffix stays what the caller asked for.
        ("claude-opus-4-8-high", "gpt-5.5", "high", None, False),
        ("claude-haiku-4-5-xhigh-fast", "gpt-6-luna", "xhigh", "low", True),
        # An alias is the model itself.
        ("claude-gpt-5.5", "gpt-5.5", None, None, False),
        ("claude-gpt-5.5-high-fast", "gpt-5.5", "high", None, True),
        # Also one that nobody has: to get another model for it would be a surprise.
        ("claude-gpt-6.1-sol", "gpt-6.1-sol", None, None, False),
        ("claude-gpt-5.5-hihg", "gpt-5.5-hihg", None, None, False),
        ("claude-gpt-9", "gpt-9", None, None, False),
        # The rest is untouched.
        ("gpt-5.5-high", "gpt-5.5", "high", None, False),
        ("gemini-9", "gemini-9", None, None, False),
        ("claude", "claude", None, None, False),
    ],
)
def test_claudes_names_stand_for_models_of_ours(
    name: str, model: str, effort: str | None, mapped: str | None, fast: bool
) -> None:
    assert Catalog(lists=LIVE).resolve(name) == Resolved(model, effort, fast, mapped)


def test_without_lists_the_strongest_known_model_stands_for_claude() -> None:
    assert Catalog().resolve("claude-opus-4-8").model == "gpt-6.1-sol"


def test_the_configured_map_goes_before_all_that_is_built_in() -> None:
    own = {
        "claude-*": ("gpt-5.5-high",),
        "claude-opus-*": ("gpt-9-nowhere", "gpt-6-luna-max"),
        "gpt-5.5": ("gpt-6-luna",),
        "My-Name": ("gpt-5.5-fast",),
        "nowhere": ("gpt-9-nowhere", "gpt-8-nowhere"),
        "gpt-5.2*": ("gpt-5.5-fast",),
    }
    catalog = Catalog(lists=LIVE, model_map=own)
    for name, expected in {
        "claude-haiku-4-5": Resolved("gpt-5.5", None, False, "high"),
        "claude-opus-4-8": Resolved("gpt-6-luna", None, False, "max"),
        "claude-opus-4-8-low": Resolved("gpt-6-luna", "low", False, "max"),
        "gpt-5.5": Resolved("gpt-6-luna"),
        "gpt-5.5-high": Resolved("gpt-6-luna", "high"),
        "gpt-5.5(low)": Resolved("gpt-6-luna", "low"),
        # What only the table knows does not stand in the way of a pattern, what is served does.
        "gpt-5.2-high": Resolved("gpt-5.5", "high", True),
        "gpt-6-luna-high": Resolved("gpt-6-luna", "high"),
        "gpt-5.1": Resolved("gpt-5.1"),
        "claude-gpt-5.5": Resolved("gpt-5.5"),
        "claude-gpt-5.4": Resolved("gpt-5.5", None, False, "high"),
        "my-name": Resolved("gpt-5.5", None, True),
        "my-name-high": Resolved("gpt-5.5", "high", True),
        "nowhere": Resolved("gpt-9-nowhere"),
    }.items():
        assert catalog.resolve(name) == expected, name


@pytest.mark.parametrize(
    ("name", "body", "sent"),
    [
        ("mine", {}, "low"),
        ("mine", {"reasoning": {"effort": "high"}}, "high"),
        ("mine-xhigh", {"reasoning": {"effort": "high"}}, "xhigh"),
        ("mine-auto", {}, None),
    ],
)
def test_effort_is_what_was_typed_then_the_bodys_then_the_maps(
    name: str, body: JsonObject, sent: str | None
) -> None:
    catalog = Catalog(model_map={"mine": ("gpt-5.5-low",)})
    raw = dumps({"model": name, "input": "x", **body})
    request = decode(raw, {}, catalog=catalog)
    fields = loads(request.body)
    assert (fields["model"], request.asked_model) == ("gpt-5.5", name)
    assert fields.get("reasoning", {}).get("effort") == sent


@pytest.mark.parametrize(
    ("name", "model", "effort", "fast"),
    [
        ("gpt-5.5(high)", "gpt-5.5", "high", False),
        ("gpt-5.5(HIGH)", "gpt-5.5", "high", False),
        ("gpt-5.5-fast(xhigh)", "gpt-5.5", "xhigh", True),
        ("gpt-5.5(8192)", "gpt-5.5", "medium", False),
        ("gpt-5.5(50)", "gpt-5.5", "minimal", False),
        ("gpt-5.5(0)", "gpt-5.5", "none", False),
        ("gpt-5.5(-1)", "gpt-5.5", "auto", False),
        ("gpt-5.5(auto)", "gpt-5.5", "auto", False),
        ("claude-opus-4-8(low)", "gpt-6.1-sol", "low", False),
        ("gpt-9-new(max)", "gpt-9-new", "max", False),
        # What is neither stays part of the name.
        ("gpt-5.5(fast)", "gpt-5.5(fast)", None, False),
        ("gpt-5.5()", "gpt-5.5()", None, False),
        ("(high)", "(high)", None, False),
        # Only one effort is typed: the one in parentheses.
        ("gpt-5.5-low(high)", "gpt-5.5-low", "high", False),
    ],
)
def test_an_effort_may_stand_in_parentheses(name: str, model: str, effort: str | None, fast: bool) -> None:
    resolved = Catalog().resolve(name)
    assert (resolved.model, resolved.effort, resolved.fast) == (model, effort, fast)


def test_what_names_mean_is_remembered_and_made_up_ones_take_no_memory_for_ever() -> None:
    catalog = Catalog()
    first = catalog.resolve("gpt-5.5-high")
    assert catalog.resolve("gpt-5.5-high") is first
    for number in range(5000):
        assert catalog.resolve(f"made-up-{number}-low").effort == "low"
        catalog.resolve("x" * 300 + str(number))
    assert len(catalog._resolved) <= 1024
    assert max(map(len, catalog._resolved)) <= 256
    assert catalog.resolve("gpt-5.5-high") == first
