"""What tokens cost: unit prices by model, tier and time, and how the cost of a turn is made of them. Pure.

A unit price is a whole number of nanodollars for a million tokens, which is a decimal text of dollars with nine
places. A turn's cost is summed up exactly and divided by the million once, rounded up: the only rounding there is.

The package's prices are in `data/prices.json` (see `tools/update_prices.py`). An owner's own prices for a model take
the place of all that the package says of it, for as long as they count. A model is found by its name, by an alias
that the file declares, or without the date at its end; never by anything that only looks like it. What has no price
has none: it costs neither nothing nor something.
"""

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import resources
from typing import Any, TypeVar

from codex_proxy.ledger.money import NANOS, format_money, parse_money
from codex_proxy.protocol.wire import JsonObject, loads
from codex_proxy.trace import Usage

MILLION = 1_000_000

STANDARD = "standard"
TIERS = (STANDARD, "flex", "batch", "priority", "ultrafast")
"""The service tiers that can have a price."""

# What a request may say when it wants no tier in particular.
_PLAIN = frozenset({None, "", "auto", "default", STANDARD, "standard_only"})
# They are never dearer than the standard tier, so its price is the most they can cost.
_CHEAPER = frozenset({"flex", "batch"})

MOST_READ = 2_000_000
"""How many tokens a turn reads at most, of a model whose window is not known; what says more is clamped."""
MOST_WRITTEN = 512_000
MOST_TOKENS = 100_000_000
"""What an owner may say instead."""

LONG_ABOVE = 272_000
"""Where long contexts begin unless an owner says so."""

MOST_PRICE = 100_000 * NANOS
"""What a million tokens may cost at most."""

_ALWAYS = 1 << 62
_SNAPSHOT = re.compile(r"-\d{4}-\d{2}-\d{2}$")
# How many names a book remembers the meaning of: callers can make up any number of them.
_MAX_NAMES = 1024

CLAMPED = "clamped"
"""The flag of a turn whose numbers were beyond what its model can do."""


@dataclass(slots=True, frozen=True)
class Rates:
    """Unit prices: nanodollars for a million tokens."""

    input: int
    cached: int
    """Of input that was in the cache; the input's own where there is no discount."""
    cache_write: int
    """Of input that was put there; the input's own where nothing is charged for that."""
    output: int
    texts: Mapping[str, str] = field(init=False, compare=False, repr=False)
    """The same as decimal texts of dollars, as a usage row keeps them."""

    def __post_init__(self) -> None:
        texts = {name: format_money(getattr(self, name)) for name in COLUMNS}
        object.__setattr__(self, "texts", texts)


COLUMNS = ("input", "cached", "cache_write", "output")


@dataclass(slots=True, frozen=True)
class Price:
    """What one model costs in one tier from one moment on."""

    id: str
    """Tells where it comes from: "package/gpt-5/standard", "own/17"."""
    model: str
    tier: str
    since: int
    """Epoch milliseconds; 0 is ever since."""
    short: Rates
    long: Rates | None = None
    """For the whole of a turn that reads more than `long_above` tokens."""
    long_above: int = 0
    most_read: int = MOST_READ
    most_written: int = MOST_WRITTEN

    def rates(self, input_tokens: int) -> Rates:
        """Return the unit prices of a turn that reads so many tokens."""
        return self.long if self.long is not None and input_tokens > self.long_above else self.short


@dataclass(slots=True)
class Cost:
    """What a turn costs, and of what that was made."""

    nanos: int
    usage: Usage
    """The tokens as they were charged."""
    flags: tuple[str, ...]
    prices: Mapping[str, str]
    price_id: str


@dataclass(slots=True, frozen=True)
class OwnPrice:
    """A price that an owner has set, or has ended: then the package's counts again from that moment on."""

    id: int
    model: str
    tier: str
    since: int
    price: Price | None


def is_plain(tier: str | None) -> bool:
    """Tell whether a request wants no tier in particular."""
    return tier in _PLAIN


def clamped(usage: Usage, price: Price | None = None) -> tuple[Usage, tuple[str, ...]]:
    """Return *usage* within what a model can do, and the flag when it was not.

    An upstream has claimed a billion tokens before, and no balance survives that.
    """
    read, written = (MOST_READ, MOST_WRITTEN) if price is None else (price.most_read, price.most_written)
    into, cached, writes = usage.input_tokens, usage.cached_tokens, usage.cache_write_tokens
    out, reasoning = usage.output_tokens, usage.reasoning_tokens
    if 0 <= cached <= into <= read and 0 <= writes <= into - cached and 0 <= reasoning <= out <= written:
        return usage, ()
    into = min(max(into, 0), read)
    cached = min(max(cached, 0), into)
    writes = min(max(writes, 0), into - cached)
    out = min(max(out, 0), written)
    reasoning = min(max(reasoning, 0), out)
    return Usage(into, cached, writes, out, reasoning, usage.source), (CLAMPED,)


def cost(price: Price, usage: Usage) -> Cost:
    """Return what *usage* costs; reasoning is part of the output and never added to it."""
    usage, flags = clamped(usage, price)
    rates = price.rates(usage.input_tokens)
    cached, writes = usage.cached_tokens, usage.cache_write_tokens
    total = (
        (usage.input_tokens - cached - writes) * rates.input
        + cached * rates.cached
        + writes * rates.cache_write
        + usage.output_tokens * rates.output
    )
    return Cost(-(-total // MILLION), usage, flags, rates.texts, price.id)


def estimate(price: Price, input_tokens: int, output_tokens: int) -> int:
    """Return what a turn of that size costs at most: nothing is in the cache, all is put there."""
    into = min(input_tokens, price.most_read)
    rates = price.rates(into)
    dearest = max(rates.input, rates.cache_write)
    return -(-(into * dearest + min(output_tokens, price.most_written) * rates.output) // MILLION)


class PriceBook:
    """All prices there are; another one takes its place when an owner changes some."""

    def __init__(
        self, package: Iterable[Price], aliases: Mapping[str, str], own: Iterable[OwnPrice] = ()
    ) -> None:
        self._package = tuple(package)
        self._aliases = dict(aliases)
        self.own = tuple(own)
        self._by_model: dict[str, dict[str, list[Price]]] = {}
        for price in sorted(self._package, key=lambda one: one.since):
            self._by_model.setdefault(price.model, {}).setdefault(price.tier, []).append(price)
        self._own: dict[str, dict[str, list[OwnPrice]]] = {}
        # Of two for the same moment the later one corrects the other.
        for one in sorted(self.own, key=lambda one: (one.since, one.id)):
            self._own.setdefault(one.model, {}).setdefault(one.tier, []).append(one)
        self._names: dict[str, str | None] = {}
        self._found: dict[tuple[str, str | None], tuple[Price | None, int, int]] = {}
        """What was found before, and from when to when that is right."""

    @classmethod
    def load(cls) -> "PriceBook":
        """Return the package's own prices."""
        return cls.parse(loads(resources.files("codex_proxy").joinpath("data/prices.json").read_bytes()))

    @classmethod
    def parse(cls, table: JsonObject) -> "PriceBook":
        """Read a table of the form of `prices.json`."""
        package: list[Price] = []
        aliases: dict[str, str] = {}
        for name, model in table["models"].items():
            aliases.update(dict.fromkeys(model.get("aliases", ()), name))
            for row in model["prices"]:
                since = row.get("since")
                package.append(
                    Price(
                        id=f"package/{name}/{row['tier']}{f'/{since}' if since else ''}",
                        model=name,
                        tier=row["tier"],
                        since=_day(since) if since else 0,
                        short=_package_rates(row["short"]),
                        long=_package_rates(row["long"]) if "long" in row else None,
                        long_above=table["long_above"],
                        most_read=model.get("reads") or MOST_READ,
                        most_written=model.get("writes") or MOST_WRITTEN,
                    )
                )
        return cls(package, aliases)

    def with_own(self, own: Iterable[OwnPrice]) -> "PriceBook":
        """Return a book with an owner's prices, instead of those that this one has."""
        return PriceBook(self._package, self._aliases, own)

    def find(self, model: str, at: int, tier: str | None = None) -> Price | None:
        """Return the price of *model* at a moment (epoch milliseconds); None when it has none.

        A flex or batch turn without a price of its own costs what a standard one does. Any other tier without
        a price has none, for it is dearer.
        """
        if tier not in _PLAIN and tier not in TIERS:
            # Nothing has a price in it; and it may be as long as its caller likes, so it is not remembered.
            return None
        known = self._found.get((model, tier))
        if known is not None and known[1] <= at < known[2]:
            return known[0]
        price, since, until = self._find(model, at, tier)
        if len(self._found) >= _MAX_NAMES:
            self._found.clear()
        self._found[model, tier] = price, since, until
        return price

    def _find(self, model: str, at: int, tier: str | None) -> tuple[Price | None, int, int]:
        name = self.name_of(model)
        if name is None:
            return None, 0, _ALWAYS
        word = STANDARD if tier in _PLAIN else str(tier)
        prices = self._prices_at(name, at)
        price = prices.get(word) or (prices.get(STANDARD) if word in _CHEAPER else None)
        rows: list[Price | OwnPrice] = [
            row
            for tiers in (self._by_model.get(name, {}), self._own.get(name, {}))
            for some in tiers.values()
            for row in some
        ]
        return (
            price,
            max((row.since for row in rows if row.since <= at), default=0),
            min((row.since for row in rows if row.since > at), default=_ALWAYS),
        )

    def all_at(self, at: int) -> list[Price]:
        """Return every price that counts at a moment, by model and tier."""
        found: list[Price] = []
        for name in sorted({*self._by_model, *self._own}):
            prices = self._prices_at(name, at)
            found += [prices[tier] for tier in TIERS if tier in prices]
        return found

    def aliases_of(self, model: str) -> list[str]:
        """Return the other names under which a model's prices are found."""
        return sorted(alias for alias, name in self._aliases.items() if name == model)

    def name_of(self, model: str) -> str | None:
        """Return under which name the prices of *model* are kept; None when there are none."""
        try:
            return self._names[model]
        except KeyError:
            found = self._resolve(model)
            if found is None:
                found = self._resolve(_SNAPSHOT.sub("", model))
            if len(self._names) >= _MAX_NAMES:
                self._names.clear()
            self._names[model] = found
            return found

    def _resolve(self, name: str) -> str | None:
        return name if name in self._by_model or name in self._own else self._aliases.get(name)

    def _prices_at(self, name: str, at: int) -> dict[str, Price]:
        """Return a model's prices by tier: an own standard one ends all of the package's, any other that of its tier."""
        own = self._own_at(name, at)
        return own if STANDARD in own else {**self._package_at(name, at), **own}

    def _own_at(self, name: str, at: int) -> dict[str, Price]:
        tiers = self._own.get(name)
        if tiers is None:
            return {}
        current = {tier: _last(rows, at) for tier, rows in tiers.items()}
        return {tier: one.price for tier, one in current.items() if one is not None and one.price is not None}

    def _package_at(self, name: str, at: int) -> dict[str, Price]:
        current = {tier: _last(rows, at) for tier, rows in self._by_model.get(name, {}).items()}
        return {tier: one for tier, one in current.items() if one is not None}


_Dated = TypeVar("_Dated", Price, OwnPrice)


def _last(rows: Sequence[_Dated], at: int) -> _Dated | None:
    """Return the row that counts at a moment; *rows* are in the order of time."""
    for row in reversed(rows):
        if row.since <= at:
            return row
    return None


def _day(date: str) -> int:
    return int(datetime.fromisoformat(date).replace(tzinfo=UTC).timestamp()) * 1000


def _package_rates(texts: Sequence[str | None]) -> Rates:
    values = [None if text is None else parse_money(text) for text in texts]
    into, cached, writes, out = values
    return _rates(into, cached, writes, out)


def _rates(into: int | None, cached: int | None, writes: int | None, out: int | None) -> Rates:
    into = into or 0
    return Rates(into, into if cached is None else cached, into if writes is None else writes, out or 0)


# -- prices of an owner's own --------------------------------------------------------------

_RATES = frozenset(COLUMNS)
_FIELDS = _RATES | {"long", "long_above", "reads", "writes"}


def read_price(definition: object, *, id: str, model: str, tier: str, since: int) -> Price:  # noqa: A002
    """Return the price that an owner has written down.

    `{"input": "1.25", "output": "10"}`, in dollars for a million tokens; with `cached` and `cache_write` where
    they differ from the input, `long` (the same four) and `long_above` where long contexts are dearer, and `reads`
    and `writes`: how many tokens the model takes and gives at most.

    Raises:
        ValueError: If it is anything else; the message names the field.
    """
    if tier not in TIERS:
        raise ValueError(f"tier: {tier!r} is none of {', '.join(TIERS)}")
    if not isinstance(definition, dict):
        raise ValueError("prices: not an object")
    _refuse_unknown(definition, _FIELDS, "")
    long = definition.get("long")
    if "long_above" in definition and long is None:
        raise ValueError("long_above: there is no price for long contexts (`long`)")
    return Price(
        id=id,
        model=model,
        tier=tier,
        since=since,
        short=_own_rates(definition, ""),
        long=None if long is None else _own_rates(_object(long), "long."),
        long_above=0 if long is None else _tokens(definition, "long_above", LONG_ABOVE),
        most_read=_tokens(definition, "reads", MOST_READ),
        most_written=_tokens(definition, "writes", MOST_WRITTEN),
    )


def _object(value: object) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError("long: not an object")
    _refuse_unknown(value, _RATES, "long.")
    return value


def _refuse_unknown(found: Mapping[str, Any], known: Collection[str], path: str) -> None:
    for name in found:
        if name not in known:
            raise ValueError(f"{path}{name}: not a field of a price; there are {', '.join(sorted(known))}")


def _own_rates(definition: Mapping[str, Any], path: str) -> Rates:
    into, cached, writes, out = (_amount(definition.get(name), f"{path}{name}") for name in COLUMNS)
    for name, value in (("input", into), ("output", out)):
        if value is None:
            raise ValueError(f"{path}{name}: is missing")
    return _rates(into, cached, writes, out)


def _amount(value: object, path: str) -> int | None:
    if value is None:
        return None
    if not isinstance(value, str):
        raise ValueError(f"{path}: not a text such as '1.25' (dollars for a million tokens)")
    try:
        nanos = parse_money(value)
    except ValueError as exc:
        raise ValueError(f"{path}: {exc}") from exc
    if not 0 <= nanos <= MOST_PRICE:
        raise ValueError(f"{path}: not from 0 to {MOST_PRICE // NANOS}")
    return nanos


def _tokens(definition: Mapping[str, Any], name: str, default: int) -> int:
    value = definition.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MOST_TOKENS:
        raise ValueError(f"{name}: not a whole number from 1 to {MOST_TOKENS}")
    return value
