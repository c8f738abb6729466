"""The package's table of prices: its form, and that it is what its two sources say."""

import importlib.metadata
import json
import re
import subprocess
import sys
import zipfile
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from codex_proxy.ledger.prices import COLUMNS, TIERS
from codex_proxy.protocol.catalog import BUILT_IN
from tools import update_prices
from tools.update_prices import TARGET, Disagreement, Model, Row, kept_wheel, merged

TEXT = TARGET.read_text(encoding="utf-8")
TABLE: dict[str, Any] = json.loads(TEXT)
MODELS: dict[str, Any] = TABLE["models"]

UNPRICED = {"codex-auto-review", "gpt-5.3-codex-spark", "gpt-5-codex-mini"}
"""Models of the Codex CLI for which nobody has published a price."""


def installed(source: str) -> str | None:
    try:
        return importlib.metadata.version(source)
    except importlib.metadata.PackageNotFoundError:
        return None


def test_the_head_says_where_it_comes_from() -> None:
    assert TABLE["unit"] == "dollars for a million tokens"
    assert re.fullmatch(r"20\d\d-\d\d-\d\d", TABLE["date"])
    assert set(TABLE["sources"]) == {"genai-prices", "litellm"}
    for source in TABLE["sources"].values():
        assert re.fullmatch(r"[0-9a-f]{64}", source["sha256"])
        assert re.fullmatch(r"\d+(\.\d+)+", source["version"])
    assert tuple(TABLE["columns"]) == COLUMNS
    assert len(TEXT) < 20_000


@pytest.mark.parametrize("name", MODELS)
def test_every_row_is_well_formed(name: str) -> None:
    model = MODELS[name]
    assert set(model) <= {"aliases", "reads", "writes", "prices"}
    seen = [(row["tier"], row.get("since", "")) for row in model["prices"]]
    assert len(set(seen)) == len(seen)
    # Sorted, so that the last one of a tier is today's.
    assert [tier for tier, _ in seen] == sorted((tier for tier, _ in seen), key=TIERS.index)
    for row in model["prices"]:
        assert set(row) <= {"tier", "since", "short", "long"}
        assert row["tier"] in TIERS
        for prices in [row["short"], *([row["long"]] if "long" in row else [])]:
            assert len(prices) == 4
            assert all(price is None or re.fullmatch(r"\d+(\.\d{1,9})?", price) for price in prices)
            into, cached, _, out = prices
            assert into is not None
            # The embeddings alone give nothing out.
            assert out is not None or name.startswith("text-embedding")
            assert Decimal(into) > 0
            assert cached is None or Decimal(cached) <= Decimal(into)
        if "long" in row:
            assert all(
                (a is None) == (b is None) and (a is None or Decimal(a) < Decimal(b))
                for a, b in zip(row["short"], row["long"], strict=True)
            )


def test_no_name_stands_for_two_models() -> None:
    names = [*MODELS, *(alias for model in MODELS.values() for alias in model.get("aliases", ()))]
    assert len(set(names)) == len(names)


def test_the_models_of_the_codex_cli_have_prices_but_for_those_that_nobody_knows() -> None:
    names = {*MODELS, *(alias for model in MODELS.values() for alias in model.get("aliases", ()))}
    assert {facts.slug for facts in BUILT_IN} - names == UNPRICED


def test_every_exception_has_its_reason() -> None:
    assert all(source in TABLE["sources"] and len(why) > 20 for source, why in update_prices.ALLOWED.values())


@pytest.mark.skipif(
    installed("genai-prices") != TABLE["sources"]["genai-prices"]["version"],
    reason="genai-prices is not installed in the version that the table was made of",
)
def test_it_says_what_genai_prices_says() -> None:
    known = update_prices.genai_models()
    for name in ("gpt-5", "gpt-5.6-sol", "gpt-6.1-terra", "o3", "gpt-4.1-mini"):
        ours = [row for row in MODELS[name]["prices"] if row["tier"] == "standard"]
        assert len(ours) == len(known[name].rows)
        for row, theirs in zip(ours, known[name].rows, strict=True):
            assert [None if price is None else Decimal(price) for price in row["short"]] == list(theirs.short)


@pytest.mark.skipif(
    kept_wheel() is None or installed("genai-prices") != TABLE["sources"]["genai-prices"]["version"],
    reason="the table's two sources are not here: `make fetch-prices` gets them",
)
def test_it_is_up_to_date_with_its_sources() -> None:
    text, _ = update_prices.build(kept_wheel(), TABLE["date"])
    assert text == TEXT


# -- the comparison -----------------------------------------------------------------------


def row(*prices: str | None, tier: str = "standard", long: tuple[str | None, ...] | None = None) -> Row:
    def values(texts: tuple[str | None, ...]) -> tuple[Decimal | None, ...]:
        return tuple(None if text is None else Decimal(text) for text in texts)

    return Row(tier, values(prices), None if long is None else values(long))


@pytest.fixture(autouse=True)
def nothing_is_allowed(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "merge" in request.node.name:
        monkeypatch.setattr(update_prices, "ALLOWED", {})


@pytest.mark.parametrize(
    "other",
    [
        row("1", "0.1", None, "3"),
        row("1", "0.2", None, "2"),
        row("1", "0.1", "1.25", "2"),
        row("1", "0.1", None, "2", long=("2", "0.2", None, "3")),
        row("1", "0.1", None, "2", tier="flex"),
    ],
)
def test_a_merge_of_sources_that_differ_fails_and_names_the_model(other: Row) -> None:
    ours = {"gpt-9": Model([row("1", "0.1", None, "2")]), "gpt-8": Model([row("1", None, None, "2")])}
    with pytest.raises(Disagreement, match=r"^gpt-9: genai-prices "):
        merged(ours, {"gpt-9": Model([other]), "gpt-8": Model([row("1", None, None, "2")])})


def test_a_merge_takes_what_is_allowed_and_leaves_out_what_one_source_knows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    one, other = row("1", None, None, "2"), row("2", None, None, "4")
    flex = row("1", None, None, "2", tier="flex")
    genai = {"gpt-9": Model([one]), "gpt-8": Model([one])}
    litellm = {"gpt-9": Model([other, flex], 1000, 100), "gpt-7": Model([one])}
    monkeypatch.setattr(update_prices, "ALLOWED", {"gpt-9": ("litellm", "for a test")})
    models, left_out = merged(genai, litellm)
    assert [(r.tier, r.short[0]) for r in models["gpt-9"].rows] == [
        ("standard", Decimal(2)),
        ("flex", Decimal(1)),
    ]
    assert (models["gpt-9"].reads, models["gpt-9"].writes) == (1100, 100)
    assert left_out == ["gpt-7", "gpt-8"]
    monkeypatch.setattr(update_prices, "ALLOWED", {"gpt-9": ("genai-prices", "for a test")})
    models, _ = merged(genai, litellm)
    assert models["gpt-9"].rows[0].short[0] == Decimal(1)


def test_a_merge_does_not_keep_exceptions_that_nothing_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(update_prices, "ALLOWED", {"gpt-9": ("litellm", "for a test")})
    same = {"gpt-9": Model([row("1", None, None, "2")])}
    with pytest.raises(Disagreement, match="gpt-9: ALLOWED, and there is nothing to allow"):
        merged(same, same)


def test_a_merge_finds_equals_and_snapshots() -> None:
    def models() -> dict[str, Model]:
        same = {
            name: Model([row("1", None, None, "2")]) for name in ("gpt-9", "gpt-9-codex", "gpt-9-2026-01-02")
        }
        return {**same, "gpt-9-2025-01-01": Model([row("3", None, None, "4")])}

    found, left_out = merged(models(), models())
    assert {name: model.aliases for name, model in found.items()} == {
        "gpt-9": ["gpt-9-codex"],
        "gpt-9-2025-01-01": [],
    }
    assert left_out == []


# -- what the file was made of ------------------------------------------------------------

LITELLM = {
    "litellm_provider": "openai",
    "mode": "chat",
    "input_cost_per_token": 1e-6,
    "output_cost_per_token": 2e-6,
}


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file of prices, made of sources of ours: of litellm's two wheels are here, and the older one was used."""
    for version, price in (("1.2.3", 1e-6), ("1.2.4", 9e-6)):
        with zipfile.ZipFile(tmp_path / f"litellm-{version}-py3-none-any.whl", "w") as wheel:
            wheel.writestr(
                update_prices.TABLE, json.dumps({"gpt-9": {**LITELLM, "input_cost_per_token": price}})
            )
    monkeypatch.setattr(update_prices, "TARGET", tmp_path / "prices.json")
    monkeypatch.setattr(update_prices, "WHEELS", tmp_path)
    monkeypatch.setattr(update_prices, "ALLOWED", {})
    monkeypatch.setattr(update_prices, "genai_models", lambda: {"gpt-9": Model([row("1", None, None, "2")])})
    assert told(monkeypatch, "--litellm", str(tmp_path / "litellm-1.2.3-py3-none-any.whl")) == 0
    return tmp_path / "prices.json"


def told(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["update_prices.py", *arguments])
    return update_prices.main()


def test_a_check_reads_the_very_wheel_that_the_file_was_made_of(
    made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = made.read_text(encoding="utf-8")
    assert told(monkeypatch, "--check") == 0
    assert made.read_text(encoding="utf-8") == before


@pytest.mark.parametrize(("old", "new"), [('"1", null', '"1.5", null'), ('"sha256": "', '"sha256": "0')])
def test_a_check_fails_when_the_file_says_something_else_and_names_it(
    old: str, new: str, made: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    edited = made.read_text(encoding="utf-8").replace(old, new)
    made.write_text(edited, encoding="utf-8")
    assert told(monkeypatch, "--check") == 1
    assert new in capsys.readouterr().err
    assert made.read_text(encoding="utf-8") == edited


def test_a_check_fails_when_the_sources_do_not_agree(
    made: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(update_prices, "genai_models", lambda: {"gpt-9": Model([row("7", None, None, "2")])})
    assert told(monkeypatch, "--check") == 1
    assert "gpt-9" in capsys.readouterr().err


@pytest.mark.parametrize("is_reached", [True, False])
def test_only_the_version_that_was_used_is_fetched_and_only_once(
    is_reached: bool, made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheel = made.parent / "litellm-1.2.3-py3-none-any.whl"
    wheel.unlink()
    asked: list[list[str]] = []

    def pip(command: list[str], *, check: bool) -> None:
        asked.append(command)
        if is_reached:
            wheel.touch()

    monkeypatch.setattr(subprocess, "run", pip)
    assert [told(monkeypatch, "--fetch") for _ in range(2)] == ([0, 0] if is_reached else [1, 1])
    assert len(asked) == (1 if is_reached else 2)
    assert asked[0][-1] == "litellm==1.2.3"
    # Nothing of it is run, not even to be built.
    assert {"download", "--no-deps", "--only-binary"} < set(asked[0])
