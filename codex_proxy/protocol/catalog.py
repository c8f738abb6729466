"""What is known of the models, and what a caller's model name means.

A name is a slug with up to two suffixes: `-fast`, and an effort (`-high`) or a token budget
(`-8192`), in either order; the effort or budget may stand in parentheses at the end instead
(`gpt-5.5(high)`), as other proxies have it. A known slug always wins over reading its tail as a suffix
(`gpt-5.1-codex-max`). Facts come from the accounts' own model lists; the built-in table
stands in for what the lists do not say, and for all of it when there is no list.
"""

import copy
import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

from codex_proxy.patterns import fits
from codex_proxy.protocol.wire import JsonObject

Profile = Literal["standard", "lite"]
"""The wire shape that a model takes."""

EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max", "ultra")
"""All efforts, the least first."""

AUTO = "auto"
"""As an effort: let the model choose, which on the wire is no effort at all."""

PRIORITY = "priority"
"""What "fast" is called on the wire."""

_RANKS = {effort: rank for rank, effort in enumerate(EFFORTS)}
_WORDS = frozenset({*EFFORTS, AUTO})

# The Codex CLI shows `ultra` and sends `xhigh`.
_ON_THE_WIRE = {"ultra": "xhigh"}


def on_the_wire(effort: str) -> str:
    """Return how *effort* is called on the wire."""
    return _ON_THE_WIRE.get(effort, effort)


# The largest budget of each effort; anything above is `xhigh`.
BUDGETS = ((512, "minimal"), (1024, "low"), (8192, "medium"), (24576, "high"))

# A smaller number at the end of a name is a version.
MIN_BUDGET = 101

# How many names a catalogue remembers the meaning of, and of which length: callers can make up any number of them.
_MAX_NAMES = 1024
_MAX_NAME_LENGTH = 256


@dataclass(slots=True, frozen=True)
class ModelFacts:
    """What is known of one model."""

    slug: str
    display_name: str
    efforts: tuple[str, ...] = ()
    """What it takes, the least first; empty when unknown."""
    default: str = "medium"
    fast: bool = True
    """Whether it has the priority tier."""
    lite: bool = False
    context_window: int = 272_000
    max_context_window: int = 272_000
    hidden: bool = False
    """Served, but not listed."""
    lists_auto: bool = False
    """Whether `-auto` is in the listing; it is understood for every model."""

    @property
    def suffixes(self) -> tuple[str, ...]:
        """The suffixes that it has, in the order of the listing; the first is the plain name's."""
        efforts = (*self.efforts, AUTO) if self.lists_auto else self.efforts
        plain = ("", *(f"-{effort}" for effort in efforts))
        return (*plain, *(f"{suffix}-fast" for suffix in plain)) if self.fast else plain


_LOW_TO_HIGH = ("low", "medium", "high")
_LOW_TO_XHIGH = (*_LOW_TO_HIGH, "xhigh")
_LOW_TO_MAX = (*_LOW_TO_XHIGH, "max")
_LOW_TO_ULTRA = (*_LOW_TO_MAX, "ultra")


def _today(
    slug: str,
    name: str,
    efforts: tuple[str, ...],
    default: str,
    *,
    window: int = 272_000,
    largest: int = 872_000,
    fast: bool = True,
    lite: bool = True,
    hidden: bool = False,
) -> ModelFacts:
    return ModelFacts(slug, name, efforts, default, fast, lite, window, largest, hidden)


def _older(slug: str, name: str, *efforts: str, window: int = 272_000) -> ModelFacts:
    return ModelFacts(slug, name, efforts, context_window=window, max_context_window=window, lists_auto=True)


BUILT_IN: tuple[ModelFacts, ...] = (
    # The catalogue of the Codex CLI 0.169.0, in its order.
    _today("gpt-6.1-sol", "GPT-6.1-Sol", _LOW_TO_ULTRA, "low"),
    _today("gpt-6-astra", "GPT-6-Astra", _LOW_TO_ULTRA, "low"),
    _today("gpt-6-sol", "GPT-6-Sol", _LOW_TO_ULTRA, "medium"),
    _today("gpt-6-luna", "GPT-6-Luna", _LOW_TO_MAX, "medium"),
    _today("gpt-5.6-sol", "GPT-5.6-Sol", _LOW_TO_ULTRA, "low"),
    _today("gpt-6.1-terra", "GPT-6.1 Terra", _LOW_TO_ULTRA, "low", window=500_000),
    _today("gpt-5.6-terra", "GPT-5.6-Terra", _LOW_TO_ULTRA, "medium"),
    _today("gpt-5.6-luna", "GPT-5.6-Luna", _LOW_TO_MAX, "medium"),
    _today("gpt-daybreak-blue-latest", "Daybreak Blue", _LOW_TO_ULTRA, "low", fast=False, hidden=True),
    _today(
        "gpt-daybreak-red-latest",
        "Daybreak Red",
        _LOW_TO_ULTRA,
        "medium",
        window=372_000,
        largest=372_000,
        fast=False,
        hidden=True,
    ),
    _today("gpt-5.5", "GPT-5.5", _LOW_TO_XHIGH, "medium", largest=272_000, lite=False),
    _today("codex-auto-review", "Codex Auto Review", _LOW_TO_MAX, "medium", hidden=True),
    # Older ones, with the levels that users of the Go daemon know.
    _older("gpt-5.4", "GPT-5.4", "none", *_LOW_TO_XHIGH),
    _older("gpt-5.4-mini", "GPT-5.4-Mini", "none", *_LOW_TO_XHIGH),
    _older("gpt-5.3-codex", "GPT-5.3-Codex", "none", *_LOW_TO_XHIGH),
    _older("gpt-5.3-codex-spark", "GPT-5.3-Codex-Spark", *_LOW_TO_XHIGH, window=128_000),
    _older("gpt-5.2", "GPT-5.2", "none", *_LOW_TO_XHIGH),
    _older("gpt-5.2-codex", "GPT-5.2-Codex", *_LOW_TO_XHIGH),
    _older("gpt-5.1", "GPT-5.1", "none", *_LOW_TO_HIGH),
    _older("gpt-5.1-codex", "GPT-5.1-Codex", *_LOW_TO_HIGH, "max"),
    _older("gpt-5.1-codex-mini", "GPT-5.1-Codex-Mini", *_LOW_TO_HIGH),
    _older("gpt-5.1-codex-max", "GPT-5.1-Codex-Max", *_LOW_TO_XHIGH),
    _older("gpt-5", "GPT-5", *_LOW_TO_HIGH),
    _older("gpt-5-codex", "GPT-5-Codex", *_LOW_TO_HIGH),
    _older("gpt-5-codex-mini", "GPT-5-Codex-Mini", *_LOW_TO_HIGH),
    _older("codex-mini", "Codex Mini", *_LOW_TO_HIGH),
)

_TABLE = {facts.slug: facts for facts in BUILT_IN}


@dataclass(slots=True, frozen=True)
class Resolved:
    """What a model name means."""

    model: str
    effort: str | None = None
    """The effort that was typed, `auto` included; None when none was."""
    fast: bool = False
    mapped_effort: str | None = None
    """The effort that the model map gives; it counts when the caller named none."""


ModelMap = Mapping[str, Sequence[str]]
"""A caller's name, or a pattern with `*`, to the names that stand for it: the first that is served."""

CLAUDE: ModelMap = {
    "claude-*haiku*": ("gpt-6-luna-low", "gpt-5.6-luna-low", "gpt-5.4-mini-low", "gpt-5.5-low"),
    "claude-*": ("gpt-6.1-sol", "gpt-6-sol", "gpt-5.6-sol", "gpt-5.5"),
    "haiku": ("gpt-6-luna-low", "gpt-5.6-luna-low", "gpt-5.4-mini-low", "gpt-5.5-low"),
    "sonnet": ("gpt-6.1-sol", "gpt-6-sol", "gpt-5.6-sol", "gpt-5.5"),
    "opus": ("gpt-6.1-sol", "gpt-6-sol", "gpt-5.6-sol", "gpt-5.5"),
    "fable": ("gpt-6.1-sol", "gpt-6-sol", "gpt-5.6-sol", "gpt-5.5"),
}
"""What stands for Claude's names unless the configuration says otherwise: the small fast one for haiku,
for all others the strongest that the accounts have."""

ALIAS = "claude-"
"""Before a model's own name: so Claude Code, which lists only names of that kind, can choose it."""


class _NameMap:
    """A model map, ready for looking up; letters count the same in either case."""

    def __init__(self, entries: ModelMap) -> None:
        self.names = [name for name in entries if "*" not in name]
        self._exact = {name.lower(): entries[name] for name in self.names}
        # The longer pattern says more.
        patterns = sorted((name for name in entries if "*" in name), key=len, reverse=True)
        self._patterns = [(name, entries[name]) for name in patterns]

    def exactly(self, name: str) -> Sequence[str] | None:
        return self._exact.get(name.lower())

    def find(self, name: str) -> Sequence[str] | None:
        name = name.lower()
        if name in self._exact:
            return self._exact[name]
        return next((names for pattern, names in self._patterns if fits(pattern, name)), None)


class Catalog:
    """The models, as far as they are known.

    Immutable: a new list makes a new catalogue, so a request decodes against one state.
    """

    def __init__(
        self,
        overrides: Mapping[str, str] | None = None,
        lists: Iterable[list[Any]] = (),
        model_map: ModelMap | None = None,
        also: Sequence[str] = (),
        *,
        has_accounts: bool = True,
    ) -> None:
        """Lay the accounts' lists over the built-in table; the first list that names a model wins.

        Args:
            overrides: The wire profile that the configuration gives a model.
            lists: The backend's model objects, one list per account.
            model_map: Names that stand for models of ours.
            also: What upstreams serve beside the accounts, as they call it.
            has_accounts: Whether there are accounts, so that what stands in the table may be served.
        """
        self.also: tuple[str, ...] = tuple(also)
        """Served by upstreams; nothing more is known of these names."""
        self._standard: Catalog | None = None
        self._is_standard = False
        self._overrides = dict(overrides or {})
        live: dict[str, ModelFacts] = {}
        for entries in lists:
            for entry in entries:
                slug = entry.get("slug") if isinstance(entry, dict) else None
                if isinstance(slug, str) and slug and slug not in live:
                    live[slug] = _facts_of(slug, entry)
        self._facts = {**_TABLE, **live}
        self._folded = {slug.lower(): slug for slug in self._facts}
        self.models: tuple[ModelFacts, ...] = tuple(live.values()) or (
            BUILT_IN if has_accounts or not also else ()
        )
        """What there is to serve, hidden ones included."""
        self._served = {facts.slug for facts in self.models}
        # What the configuration says goes before all that is built in.
        self._maps = (_NameMap(model_map or {}), _NameMap(CLAUDE))
        self._resolved: dict[str, Resolved] = {}
        """What names turned out to mean: a daemon's callers use a handful of them all day."""

    def as_standard(self) -> "Catalog":
        """Return the same, but that every model takes the standard wire shape: that of the public API."""
        if self._is_standard:
            return self
        if self._standard is None:
            self._standard = copy.copy(self)
            self._standard._is_standard = True
        return self._standard

    @property
    def mapped_names(self) -> list[str]:
        """The names of the configured map that stand for something as they are."""
        return self._maps[0].names

    def facts(self, model: str) -> ModelFacts | None:
        """Return what is known of *model*, a slug; None when nothing is."""
        return self._facts.get(model)

    def known(self, model: str) -> bool:
        """Tell whether *model* is a slug of a list or of the table."""
        return model in self._facts

    def resolve(self, name: str) -> Resolved:
        """Take a caller's model name apart.

        First comes an entry of the model map for the name, with its suffixes or without them, then a
        model that is served, by its own name or as `claude-...`, then the map's patterns, then a model that
        only the table knows, and at last what is built in for Claude's names. A name that nobody knows is
        passed on, less a suffix that is a word: new models come before their facts. A number is a suffix of
        known models only, because dated names end in one.
        """
        known = self._resolved.get(name)
        if known is None:
            known = self._resolve(name)
            if len(name) <= _MAX_NAME_LENGTH:
                if len(self._resolved) >= _MAX_NAMES:
                    # Somebody makes names up; those that are in use are soon back.
                    self._resolved.clear()
                self._resolved[name] = known
        return known

    def _resolve(self, name: str) -> Resolved:
        own, built_in = self._maps
        if (names := own.exactly(name)) is not None:
            return self._stand_in(names, Resolved(name))
        plain = self._take_apart(name)
        if (names := own.exactly(plain.model)) is not None:
            return self._stand_in(names, plain)
        known = plain if plain.model in self._facts else self._aliased(plain)
        if known is not None and known.model in self._served:
            return known
        if (names := own.find(plain.model)) is not None:
            return self._stand_in(names, plain)
        if known is not None:
            # Whoever asks for it learns that nobody has it, instead of getting another model.
            return known
        names = built_in.find(plain.model)
        return self._stand_in(names, plain) if names is not None else plain

    def _aliased(self, plain: Resolved) -> Resolved | None:
        """Return the model that a name means as an alias; None when it is none."""
        if not plain.model.lower().startswith(ALIAS):
            return None
        own = self._take_apart(plain.model[len(ALIAS) :])
        if own.model not in self._facts and not own.model.lower().startswith("gpt-"):
            return None
        return dataclasses.replace(plain, model=own.model)

    def _stand_in(self, names: Sequence[str], asked: Resolved) -> Resolved:
        """Return the first of *names* that is served, with what the caller typed on top."""
        candidates = [self._take_apart(name) for name in names]
        chosen = next((one for one in candidates if one.model in self._served), candidates[0])
        return Resolved(chosen.model, asked.effort, asked.fast or chosen.fast, chosen.effort)

    def _take_apart(self, name: str) -> Resolved:
        base, effort = _in_parentheses(name)
        fast = False
        while (slug := self._folded.get(base.lower())) is None:
            head, dash, tail = base.rpartition("-")
            tail = tail.lower()
            if not dash or not head:
                break
            if tail == "fast" and not fast:
                fast = True
            elif effort is None and tail in _WORDS:
                effort = tail
            elif effort is None and (budget := _budget(tail)) is not None and self._is_known_head(head, fast):
                effort = budget
            else:
                break
            base = head
        return Resolved(slug or base, effort, fast)

    def nearest(self, model: str, effort: str) -> str:
        """Return the effort that goes on the wire: of those the model has, the one nearest to *effort*.

        The lesser one of two that are equally near: nobody pays for more than was asked. An
        effort that we do not know, and any effort of a model that we do not know, is the
        backend's to judge.
        """
        effort = on_the_wire(effort)
        facts = self._facts.get(model)
        if facts is None or effort not in _RANKS:
            return effort
        have = [on_the_wire(level) for level in facts.efforts]
        if not have or effort in have:
            return effort
        rank = _RANKS[effort]
        return min(have, key=lambda level: (abs(_RANKS[level] - rank), _RANKS[level]))

    def has_fast(self, model: str) -> bool:
        """Tell whether *model* has the priority tier; an unknown one may have it."""
        facts = self._facts.get(model)
        return facts is None or facts.fast

    def profile(self, model: str) -> Profile:
        """Return the wire shape for *model*: as configured, else as its list says, else as the table does."""
        if self._is_standard:
            return "standard"
        configured = self._overrides.get(model)
        if configured in ("standard", "lite"):
            return cast("Profile", configured)
        facts = self._facts.get(model)
        return "lite" if facts is not None and facts.lite else "standard"

    def _is_known_head(self, head: str, fast: bool) -> bool:
        head = head.lower()
        return head in self._folded or (not fast and head.removesuffix("-fast") in self._folded)


def _budget(tail: str, least: int = MIN_BUDGET) -> str | None:
    if not tail.isascii() or not tail.isdecimal() or len(tail) > 9 or int(tail) < least:
        return None
    tokens = int(tail)
    return next((effort for limit, effort in BUDGETS if tokens <= limit), "xhigh")


_PARENTHESES = re.compile(r"(.+)\(([\w-]+)\)")


def _in_parentheses(name: str) -> tuple[str, str | None]:
    """Take an effort or a budget in parentheses off a name; there a small number cannot be a version."""
    match = _PARENTHESES.fullmatch(name)
    if match is None:
        return name, None
    word = match[2].lower()
    effort = {"0": "none", "-1": AUTO}.get(word) or (word if word in _WORDS else _budget(word, 1))
    return (match[1], effort) if effort is not None else (name, None)


def _facts_of(slug: str, entry: JsonObject) -> ModelFacts:
    """Read one of the backend's model objects; what it does not say comes from the table."""
    known = _TABLE.get(slug) or ModelFacts(slug, slug)
    levels = {level for level in map(_effort_of, _list(entry.get("supported_reasoning_levels"))) if level}
    tiers = [
        tier.get("id") if isinstance(tier, dict) else tier
        for tier in (*_list(entry.get("service_tiers")), *_list(entry.get("additional_speed_tiers")))
    ]
    says_tiers = "service_tiers" in entry or "additional_speed_tiers" in entry
    lite = entry.get("use_responses_lite")
    window = _count(entry.get("context_window"), known.context_window)
    return ModelFacts(
        slug=slug,
        display_name=_word(entry.get("display_name"), known.display_name),
        efforts=tuple(sorted(levels, key=_RANKS.__getitem__)) or known.efforts,
        default=_word(entry.get("default_reasoning_level"), known.default),
        fast=(PRIORITY in tiers or "fast" in tiers) if says_tiers else known.fast,
        lite=lite if isinstance(lite, bool) else known.lite,
        context_window=window,
        max_context_window=max(_count(entry.get("max_context_window"), known.max_context_window), window),
        hidden=entry["visibility"] != "list" if "visibility" in entry else known.hidden,
        lists_auto=known.lists_auto,
    )


def _effort_of(level: Any) -> str | None:
    value = level.get("effort") if isinstance(level, dict) else level
    return value if isinstance(value, str) and value in _RANKS else None


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _word(value: Any, default: str) -> str:
    return value if isinstance(value, str) and value else default


def _count(value: Any, default: int) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else default
