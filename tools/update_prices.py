"""Make codex_proxy/data/prices.json out of two public tables of prices that have to agree.

genai-prices knows prices by date and the tier of long contexts; litellm's table knows the service tiers and how
much a model reads and writes. What both know is compared: where they differ the build fails, unless `ALLOWED` says
which one is right, and why. What only one of them knows is left out, and named, unless `ALLOWED` lets it in.

    python tools/update_prices.py --litellm litellm-1.110.2-py3-none-any.whl
    python tools/update_prices.py --fetch
    python tools/update_prices.py --check

litellm's table is read out of its wheel, or out of an installed litellm; nothing of it is imported. What the file
was made of is pinned in it, by version and digest: `--fetch` and `--check` ask for nothing newer.
"""

import argparse
import datetime
import difflib
import hashlib
import importlib.metadata
import json
import re
import subprocess
import sys
import zipfile
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
TARGET = ROOT / "codex_proxy" / "data" / "prices.json"
WHEELS = ROOT / "build" / "prices"
"""Where litellm's wheel is kept; git does not track it."""
TABLE = "litellm/model_prices_and_context_window_backup.json"

COLUMNS = ("input", "cached", "cache_write", "output")
_GENAI = ("input_mtok", "cache_read_mtok", "cache_write_mtok", "output_mtok")
_LITELLM = (
    "input_cost_per_token",
    "cache_read_input_token_cost",
    "cache_creation_input_token_cost",
    "output_cost_per_token",
)
TIERS = {"flex": "_flex", "batch": "_batches", "priority": "_priority", "ultrafast": "_ultrafast"}
"""Our words for the service tiers, and how litellm marks them; without a mark it is the standard one."""
LONG = "_above_272k_tokens"
LONG_ABOVE = 272_000

ALLOWED: dict[str, tuple[str, str]] = {
    # model -> (which source counts, why)
    "gpt-5.6-cyber": (
        "litellm",
        "genai-prices has no long-context tier for it; litellm's is the dearer one",
    ),
    "codex-mini": (
        "genai-prices",
        "litellm dropped it when it was retired; upstreams of others serve it still",
    ),
    "gpt-daybreak-blue-latest": ("litellm", "a model of the Codex CLI's own list; genai-prices has none"),
    "gpt-daybreak-red-latest": ("litellm", "a model of the Codex CLI's own list; genai-prices has none"),
}
"""Where the sources differ, or only one of them knows a model."""

NAMES = re.compile(r"(gpt-[3-9]|gpt-daybreak|o[1-9]|codex|text-embedding)")
OTHER = re.compile(r"(audio|realtime|image|tts|transcribe|search|live|vision|instruct|ft[:-]|extended)")
_SNAPSHOT = re.compile(r"-\d{4}-?\d{2}-?\d{2}$")
# Ways of writing a name that nobody sends: gpt-5-1 for gpt-5.1.
_HYPHENS = re.compile(r"gpt-\d-\d")

Prices = tuple[Decimal | None, ...]


@dataclass(slots=True)
class Row:
    """The unit prices of one model in one tier from one day on, in dollars for a million tokens."""

    tier: str
    short: Prices
    long: Prices | None = None
    since: str | None = None


@dataclass(slots=True)
class Model:
    """What is known of one model."""

    rows: list[Row]
    reads: int = 0
    """How many tokens it reads at most; 0 when nobody says."""
    writes: int = 0
    aliases: list[str] = field(default_factory=list)


class Disagreement(Exception):
    """The sources do not agree."""


def genai_models() -> dict[str, Model]:
    """Return what genai-prices knows of OpenAI's models."""
    from genai_prices.data import providers

    openai = next(one for one in providers if one.id == "openai")
    found: dict[str, Model] = {}
    for info in openai.models:
        if not is_wanted(info.id):
            continue
        prices = info.prices if isinstance(info.prices, list) else [None, info.prices]
        rows = []
        for conditional in prices:
            if conditional is None:
                continue
            constraint = getattr(conditional, "constraint", None)
            since = getattr(constraint, "start_date", None)
            if constraint is not None and since is None:
                raise Disagreement(f"{info.id}: a condition that is no date: {constraint!r}")
            price = getattr(conditional, "prices", conditional)
            short, long = _of_genai(info.id, price)
            rows.append(Row("standard", short, long, None if since is None else since.isoformat()))
        names = sorted({name for name in _names(info.match) if name != info.id and is_wanted(name)})
        found[info.id] = Model(rows, info.context_window or 0, 0, names)
    return found


def _of_genai(model: str, price: Any) -> tuple[Prices, Prices | None]:
    short: list[Decimal | None] = []
    long: list[Decimal | None] = []
    for name in _GENAI:
        value = getattr(price, name, None)
        tiers = getattr(value, "tiers", None)
        if value is None or tiers is None:
            short.append(value)
            long.append(value)
            continue
        if len(tiers) != 1 or tiers[0].start != LONG_ABOVE:
            raise Disagreement(f"{model}: tiers that we do not know: {tiers!r}")
        short.append(value.base)
        long.append(tiers[0].price)
    return tuple(short), tuple(long) if long != short else None


def _names(clause: Any) -> Iterator[str]:
    for inner in getattr(clause, "or_", None) or [clause]:
        if (name := getattr(inner, "equals", None)) is not None:
            yield name


def litellm_models(table: Mapping[str, Any]) -> dict[str, Model]:
    """Return what litellm's table knows of OpenAI's models."""
    found = {}
    for name, entry in table.items():
        if not isinstance(entry, dict) or entry.get("litellm_provider") != "openai" or not is_wanted(name):
            continue
        if entry.get("mode") not in ("chat", "responses", "completion", "embedding"):
            continue
        rows = []
        for tier, mark in {"standard": "", **TIERS}.items():
            short = _of_litellm(entry, mark)
            if short[0] is None:
                continue
            long = _of_litellm(entry, LONG + mark)
            rows.append(Row(tier, short, None if long[0] is None else long))
        found[name] = Model(rows, entry.get("max_input_tokens") or 0, entry.get("max_output_tokens") or 0)
    return found


def _of_litellm(entry: Mapping[str, Any], mark: str) -> Prices:
    return tuple(
        # By its text: a float is not what was written.
        None if (value := entry.get(name + mark)) is None else Decimal(str(value)) * 1_000_000
        for name in _LITELLM
    )


def is_wanted(name: str) -> bool:
    """Tell whether a model is one that reads and writes text."""
    return (
        NAMES.match(name) is not None and OTHER.search(name) is None and _HYPHENS.fullmatch(name[:7]) is None
    )


def merged(genai: dict[str, Model], litellm: dict[str, Model]) -> tuple[dict[str, Model], list[str]]:
    """Return the models that both know, and the names of those left out.

    Raises:
        Disagreement: Where they differ and nothing allows it.
    """
    models: dict[str, Model] = {}
    wrong: list[str] = []
    used: set[str] = set()
    owners = {alias: name for name, model in genai.items() for alias in model.aliases}
    for name in sorted({*genai, *litellm, *owners}):
        own = genai.get(name) or (genai[owners[name]] if name in owners else None)
        other = litellm.get(name)
        allowed = ALLOWED.get(name)
        if own is None or other is None:
            if allowed is None:
                continue
            used.add(name)
            models[name] = own or other  # type: ignore[assignment]  # one of them is there
            continue
        standard = next((row for row in other.rows if row.tier == "standard"), None)
        current = own.rows[-1]
        if standard is None or not _agree(current, standard):
            if allowed is None:
                wrong.append(f"{name}: genai-prices {_told(current)}, litellm {_told(standard)}")
                continue
            used.add(name)
            if allowed[0] == "litellm" and standard is not None:
                own = Model([*own.rows[:-1], Row("standard", standard.short, standard.long, current.since)])
        tiers = [
            # Only today's are known: before the last change of price there are none.
            Row(row.tier, row.short, row.long, current.since)
            for row in other.rows
            if row.tier != "standard"
        ]
        reads = max(own.reads, other.reads + other.writes)
        models[name] = Model([*own.rows, *tiers], reads, other.writes)
    wrong += [f"{name}: ALLOWED, and there is nothing to allow" for name in sorted({*ALLOWED} - used)]
    if wrong:
        raise Disagreement("\n".join(wrong))
    left_out = sorted(
        name for name in {*genai, *litellm} if name not in models and _SNAPSHOT.sub("", name) not in models
    )
    return _without_doubles(models, genai), left_out


def _agree(one: Row, other: Row) -> bool:
    """Tell whether two rows say the same, leaving aside a price for output that a model has none of."""
    return _same(one.short, other.short) and (
        one.long is None and other.long is None
        if one.long is None or other.long is None
        else _same(one.long, other.long)
    )


def _same(one: Prices, other: Prices) -> bool:
    return all((a or 0) == (b or 0) for a, b in zip(one, other, strict=True))


def _told(row: Row | None) -> str:
    if row is None:
        return "nothing"
    return " ".join(
        str([None if price is None else f"{price:f}" for price in part])
        for part in (row.short, row.long or ())
    )


def _without_doubles(models: dict[str, Model], named: Collection[str]) -> dict[str, Model]:
    """Leave out snapshots that are found by their plain name, and make aliases of equals."""
    kept: dict[str, Model] = {}
    # What has a name of its own first, so that it is what the others stand for.
    for name in sorted(models, key=lambda one: (one not in named, len(one), one)):
        model = models[name]
        plain = _SNAPSHOT.sub("", name)
        if plain != name and plain in kept and _equal(kept[plain], model):
            continue
        twin = next(
            (other for other in kept if _family(other) == _family(name) and _equal(kept[other], model)), None
        )
        if twin is not None:
            kept[twin].aliases.append(name)
        else:
            kept[name] = model
    return dict(sorted(kept.items()))


def _family(name: str) -> str:
    return name.split("-")[1] if name.startswith("gpt-") else name


def _equal(one: Model, other: Model) -> bool:
    return (one.rows, one.reads, one.writes) == (other.rows, other.reads, other.writes)


def rendered(models: Mapping[str, Model], sources: Mapping[str, Mapping[str, str]], date: str) -> str:
    """Return the file: a line for each model and one for each of its prices."""
    lines = []
    for name, model in models.items():
        facts: dict[str, Any] = {}
        if model.aliases:
            facts["aliases"] = sorted(model.aliases)
        if model.reads:
            facts["reads"] = model.reads
        if model.writes:
            facts["writes"] = model.writes
        rows = []
        for row in model.rows:
            shown: dict[str, Any] = {"tier": row.tier}
            if row.since is not None:
                shown["since"] = row.since
            shown["short"] = _texts(row.short)
            if row.long is not None:
                shown["long"] = _texts(row.long)
            rows.append(f"      {json.dumps(shown)}")
        inner = json.dumps(facts)[1:-1]
        prices = ",\n".join(rows)
        lines.append(f'    {json.dumps(name)}: {{{inner}{", " if inner else ""}"prices": [\n{prices}]}}')
    head = {
        "unit": "dollars for a million tokens",
        "date": date,
        "sources": sources,
        "columns": list(COLUMNS),
        "long_above": LONG_ABOVE,
    }
    body = ",\n".join(lines)
    return json.dumps(head, indent=2)[:-2] + ',\n  "models": {\n' + body + "\n  }\n}\n"


def _texts(prices: Prices) -> list[str | None]:
    return [None if price is None else _text(price) for price in prices]


def _text(price: Decimal) -> str:
    text = f"{price:f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def kept_wheel() -> Path | None:
    """Return the wheel of litellm that the file was made of; None when nobody has fetched it."""
    return next(iter(WHEELS.glob(f"litellm-{_pinned()}-*.whl")), None)


def fetch() -> bool:
    """Get that wheel, if it is not here yet; tell whether it is here now."""
    if kept_wheel() is None:
        # A wheel and nothing else: of an archive of sources pip would run what is in it.
        subprocess.run(
            [
                *(sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"),
                *("--retries", "1", "--timeout", "30", "--dest", str(WHEELS), f"litellm=={_pinned()}"),
            ],
            check=False,
        )
    return kept_wheel() is not None


def _pinned() -> str:
    version: str = json.loads(TARGET.read_text(encoding="utf-8"))["sources"]["litellm"]["version"]
    return version


def find_table(given: Path | None) -> tuple[bytes, str]:
    """Return litellm's table and its version, from a wheel or from what is installed."""
    if given is not None:
        with zipfile.ZipFile(given) as wheel:
            return wheel.read(TABLE), given.name.split("-")[1]
    distribution = importlib.metadata.distribution("litellm")
    path = Path(str(distribution.locate_file(TABLE)))
    return path.read_bytes(), distribution.version


def build(litellm: Path | None, date: str) -> tuple[str, list[str]]:
    """Return the file's text, and the models that were left out."""
    raw, version = find_table(litellm)
    genai = importlib.metadata.distribution("genai-prices")
    data = Path(str(genai.locate_file("genai_prices/data.py"))).read_bytes()
    models, left_out = merged(genai_models(), litellm_models(json.loads(raw)))
    sources = {
        "genai-prices": {"version": genai.version, "sha256": hashlib.sha256(data).hexdigest()},
        "litellm": {"version": version, "sha256": hashlib.sha256(raw).hexdigest()},
    }
    return rendered(models, sources, date), left_out


def check(text: str) -> int:
    """Say where the file is not *text*; return how a program ends by that."""
    kept = TARGET.read_text(encoding="utf-8")
    if kept == text:
        print("prices.json is what its sources say")
        return 0
    differences = difflib.unified_diff(
        kept.splitlines(), text.splitlines(), "prices.json", "its sources", n=0, lineterm=""
    )
    print(
        "prices.json is not what its sources say: run `make prices`", *differences, sep="\n", file=sys.stderr
    )
    return 1


def main() -> int:
    """Write the file, or with --check tell whether it is what the sources say."""
    parser = argparse.ArgumentParser(description="make prices.json of two sources that agree")
    parser.add_argument("--litellm", type=Path, help="litellm's wheel; without it the installed one is read")
    parser.add_argument(
        "--fetch", action="store_true", help="only get the wheel that the file was made of into build/prices"
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="change nothing; fail when the file is another one than its sources, of which that wheel is one, make",
    )
    options = parser.parse_args()
    if options.fetch:
        return 0 if fetch() else 1
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    try:
        if options.check:
            date = json.loads(TARGET.read_text(encoding="utf-8"))["date"]
            return check(build(options.litellm or kept_wheel(), date)[0])
        text, left_out = build(options.litellm, today)
    except Disagreement as exc:
        print(f"the sources do not agree:\n{exc}", file=sys.stderr)
        return 1
    TARGET.write_text(text, encoding="utf-8")
    print(
        f"{len(json.loads(text)['models'])} models, {len(text)} bytes; known to one source only: {', '.join(left_out)}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
