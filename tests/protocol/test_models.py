"""The model listings in three shapes."""

from typing import Any

import orjson
import pytest

from codex_proxy.errors import RequestError
from codex_proxy.protocol.catalog import Catalog
from codex_proxy.protocol.models import anthropic_list, anthropic_one, codex_list, openai_list, openai_one

SMALL = Catalog(
    lists=[
        [
            {"slug": "gpt-5.5", "visibility": "list"},
            {
                "slug": "tiny",
                "display_name": "Tiny",
                "supported_reasoning_levels": [{"effort": "low"}],
                "service_tiers": [],
                "max_context_window": 300_000,
                "visibility": "list",
            },
            {"slug": "secret", "visibility": "hide", "supported_reasoning_levels": [{"effort": "high"}]},
        ]
    ]
)
NAMES = [
    "gpt-5.5",
    "gpt-5.5-low",
    "gpt-5.5-medium",
    "gpt-5.5-high",
    "gpt-5.5-xhigh",
    "gpt-5.5-fast",
    "gpt-5.5-low-fast",
    "gpt-5.5-medium-fast",
    "gpt-5.5-high-fast",
    "gpt-5.5-xhigh-fast",
    "tiny",
    "tiny-low",
]

# Claude Code shows only names with "claude" in them.
ALL = [*NAMES, *(f"claude-{name}" for name in NAMES)]


def test_the_listing_has_each_visible_model_with_the_suffixes_that_it_has() -> None:
    listing = openai_list(SMALL)
    assert listing["object"] == "list"
    assert [entry["id"] for entry in listing["data"]] == NAMES
    assert all(entry["object"] == "model" and entry["owned_by"] == "openai" for entry in listing["data"])
    assert all(type(entry["created"]) is int for entry in listing["data"])


def test_the_built_in_listing_names_no_combination_that_a_model_lacks() -> None:
    names = {entry["id"] for entry in openai_list(Catalog())["data"]}
    assert {"gpt-6.1-sol-ultra-fast", "gpt-5.4-none", "gpt-5.4-auto-fast", "gpt-5.1-codex-max"} <= names
    assert not {"gpt-5-xhigh", "gpt-5.5-max", "codex-auto-review", "gpt-daybreak-red-latest"} & names


@pytest.mark.parametrize("name", [*ALL, "secret", "secret-high", "tiny-auto", "TINY-low"])
def test_one_model_is_found_by_any_name_that_it_has(name: str) -> None:
    assert openai_one(SMALL, name)["id"] == name
    assert anthropic_one(SMALL, name)["id"] == name


@pytest.mark.parametrize("name", ["tiny-high", "tiny-fast", "gpt-5.4", "nobody", "", "gpt-5.5-2025-08-01"])
def test_a_model_that_is_not_served_is_not_found(name: str) -> None:
    with pytest.raises(RequestError) as caught:
        openai_one(SMALL, name)
    assert (caught.value.status, caught.value.code, caught.value.param) == (404, "model_not_found", "model")


def test_anthropics_shape_has_what_its_clients_require() -> None:
    page = anthropic_list(SMALL, limit="1000")
    assert [entry["id"] for entry in page["data"]] == ALL
    assert (page["has_more"], page["first_id"], page["last_id"]) == (False, ALL[0], ALL[-1])
    assert page["data"][len(NAMES) - 1] == {
        "type": "model",
        "id": "tiny-low",
        "display_name": "Tiny (low)",
        "created_at": "2025-01-01T00:00:00Z",
        "lifecycle": "active",
        "max_input_tokens": 300_000,
        "max_tokens": 128_000,
        "capabilities": None,
    }


def test_pages_forwards_and_backwards_cover_the_list_once() -> None:
    forwards: list[str] = []
    after: str | None = None
    while True:
        page = anthropic_list(SMALL, limit="5", after_id=after)
        forwards += [entry["id"] for entry in page["data"]]
        after = page["last_id"]
        if not page["has_more"]:
            break
    assert forwards == ALL
    backwards: list[str] = []
    before = ALL[-1]
    while True:
        page = anthropic_list(SMALL, limit="4", before_id=before)
        backwards = [entry["id"] for entry in page["data"]] + backwards
        before = page["first_id"]
        if not page["has_more"]:
            break
    assert backwards == ALL[:-1]


def test_a_page_after_the_last_entry_is_empty() -> None:
    page = anthropic_list(SMALL, after_id=ALL[-1])
    assert page == {"data": [], "has_more": False, "first_id": None, "last_id": None}


@pytest.mark.parametrize(
    ("query", "param"),
    [
        ({"limit": "0"}, "limit"),
        ({"limit": "1001"}, "limit"),
        ({"limit": "-1"}, "limit"),
        ({"limit": "ten"}, "limit"),
        ({"limit": ""}, "limit"),
        ({"limit": "²"}, "limit"),
        ({"limit": "9" * 5000}, "limit"),
        ({"after_id": "nobody"}, "after_id"),
        ({"before_id": "nobody"}, "before_id"),
        ({"after_id": "tiny", "before_id": "tiny"}, "before_id"),
    ],
)
def test_a_query_that_means_nothing_is_refused_by_name(query: dict[str, Any], param: str) -> None:
    with pytest.raises(RequestError) as caught:
        anthropic_list(SMALL, **query)
    assert (caught.value.status, caught.value.param) == (400, param)


def test_names_of_the_configured_map_are_listed_for_claude_and_patterns_are_not() -> None:
    own = {"my-opus": ("tiny-low",), "my-*": ("tiny",), "lost": ("nowhere",)}
    catalog = Catalog(lists=[[{"slug": "tiny", "service_tiers": []}]], model_map=own)
    page = anthropic_list(catalog, limit="1000")
    assert {entry["id"] for entry in page["data"]} == {"tiny", "claude-tiny", "my-opus"}
    assert anthropic_one(catalog, "my-opus")["id"] == "my-opus"
    assert anthropic_one(catalog, "claude-tiny")["display_name"] == "tiny"
    assert [entry["id"] for entry in openai_list(catalog)["data"]] == ["tiny", "my-opus"]


def test_a_name_that_is_mapped_and_listed_is_listed_once() -> None:
    own = {"tiny": ("other",), "claude-tiny": ("other",)}
    catalog = Catalog(
        lists=[[{"slug": slug, "service_tiers": []} for slug in ("tiny", "other")]], model_map=own
    )
    names = [entry["id"] for entry in anthropic_list(catalog, limit="1000")["data"]]
    assert sorted(names) == ["claude-other", "claude-tiny", "other", "tiny"]


def test_codex_clients_get_the_backends_objects_untouched() -> None:
    plus: list[dict[str, Any]] = [{"slug": "a", "odd": {"x": [1, 2.5, None]}}, {"slug": "b", "v": 1}]
    pro: list[dict[str, Any]] = [{"slug": "b", "v": 2}, {"slug": "c", "name": "ü"}, {"no": "slug"}]
    body, etag = codex_list([plus, pro])
    assert orjson.loads(body) == {"models": [plus[0], plus[1], pro[1]]}
    assert codex_list([plus, pro]) == (body, etag)
    assert etag.startswith('"')
    assert etag.endswith('"')
    assert codex_list([pro, plus])[1] != etag


def test_no_list_is_the_empty_list_which_the_cli_accepts() -> None:
    assert codex_list([])[0] == b'{"models":[]}'
    assert codex_list([[]]) == codex_list([])
