"""The model listings: OpenAI's shape, Anthropic's shape, and the backend's own for Codex clients."""

import hashlib
from collections.abc import Callable, Iterable
from typing import Any

from codex_proxy.errors import RequestError
from codex_proxy.protocol.catalog import ALIAS, AUTO, Catalog, ModelFacts
from codex_proxy.protocol.wire import JsonObject, dumps

# The backend names no date, and an answer that changes with the clock cannot be cached.
CREATED = 1_735_689_600
CREATED_AT = "2025-01-01T00:00:00Z"

MAX_OUTPUT_TOKENS = 128_000
"""What the current models write at most in one answer."""

DEFAULT_LIMIT = 20
MAX_LIMIT = 1000

Shown = Callable[[str], bool]
"""Whether a name is told of."""


def everything(_: str) -> bool:
    """Tell of all."""
    return True


def _entries(catalog: Catalog) -> list[tuple[str, ModelFacts]]:
    """Return every listed name with its model.

    Each visible model, plain and with each suffix that it has, then the names of the configured map.
    """
    own = _own_entries(catalog)
    listed = {name for name, _ in own}
    mapped = [name for name in catalog.mapped_names if name not in listed and _is_found(catalog, name)]
    return [*own, *((name, _find(catalog, name)) for name in mapped)]


def _own_entries(catalog: Catalog) -> list[tuple[str, ModelFacts]]:
    return [
        (facts.slug + suffix, facts)
        for facts in catalog.models
        if not facts.hidden
        for suffix in facts.suffixes
    ]


def _entries_for_claude(catalog: Catalog) -> list[tuple[str, ModelFacts]]:
    """Return the listing with names that Claude Code shows too: it leaves out all without `claude` in them."""
    entries = _entries(catalog)
    listed = {name for name, _ in entries}
    aliases = [(ALIAS + name, facts) for name, facts in _own_entries(catalog)]
    own = [*entries, *(entry for entry in aliases if entry[0] not in listed)]
    return [*own, *((name, ModelFacts(name, name)) for name in _others(catalog, [name for name, _ in own]))]


def _is_found(catalog: Catalog, name: str) -> bool:
    model = catalog.resolve(name).model
    return any(facts.slug == model for facts in catalog.models)


def _find(catalog: Catalog, name: str) -> ModelFacts:
    """Return the model of *name*, a hidden one too.

    Raises:
        RequestError: If no such model is served, or it has no such suffix.
    """
    resolved = catalog.resolve(name)
    for facts in catalog.models:
        if facts.slug == resolved.model:
            has_effort = resolved.effort in (None, AUTO) or resolved.effort in facts.efforts
            if has_effort and (facts.fast or not resolved.fast):
                return facts
    raise _not_found(name)


def _refuse_hidden(name: str, shown: Shown) -> None:
    if not shown(name):
        raise _not_found(name)


def _not_found(name: str) -> RequestError:
    return RequestError(
        f"the model {name!r} does not exist", param="model", code="model_not_found", status=404
    )


def openai_list(catalog: Catalog, shown: Shown = everything) -> JsonObject:
    """Return the listing as OpenAI's clients read it."""
    return {"object": "list", "data": [_openai(name) for name in _names(catalog) if shown(name)]}


def _names(catalog: Catalog) -> list[str]:
    """Return every listed name, at last those that only upstreams serve."""
    names = [name for name, _ in _entries(catalog)]
    return [*names, *_others(catalog, names)]


def _others(catalog: Catalog, names: Iterable[str]) -> list[str]:
    if not catalog.also:
        return []
    listed = set(names)
    return [name for name in catalog.also if name not in listed]


def openai_one(catalog: Catalog, name: str, shown: Shown = everything) -> JsonObject:
    """Return one model as OpenAI's clients read it.

    Raises:
        RequestError: If there is no such model.
    """
    _refuse_hidden(name, shown)
    if name not in catalog.also:
        _find(catalog, name)
    return _openai(name)


def _openai(name: str) -> JsonObject:
    return {"id": name, "object": "model", "created": CREATED, "owned_by": "openai"}


def anthropic_list(
    catalog: Catalog,
    *,
    limit: str | None = None,
    after_id: str | None = None,
    before_id: str | None = None,
    shown: Shown = everything,
) -> JsonObject:
    """Return one page of the listing as Anthropic's clients read it; the arguments are the query's.

    Raises:
        RequestError: If the limit is no number from 1 to 1000, or a cursor names no entry.
    """
    size = DEFAULT_LIMIT
    if limit is not None:
        if not (limit.isascii() and limit.isdecimal() and len(limit) < 6 and 1 <= int(limit) <= MAX_LIMIT):
            raise RequestError(f"limit is {limit!r}; use a number from 1 to {MAX_LIMIT}", param="limit")
        size = int(limit)
    entries = [entry for entry in _entries_for_claude(catalog) if shown(entry[0])]
    if after_id is not None and before_id is not None:
        raise RequestError("after_id and before_id exclude each other", param="before_id")
    if before_id is not None:
        rest = entries[: _position(entries, before_id, "before_id")]
        page = rest[-size:]
    else:
        start = 0 if after_id is None else _position(entries, after_id, "after_id") + 1
        rest = entries[start:]
        page = rest[:size]
    return {
        "data": [_anthropic(name, facts) for name, facts in page],
        "has_more": len(rest) > len(page),
        "first_id": page[0][0] if page else None,
        "last_id": page[-1][0] if page else None,
    }


def anthropic_one(catalog: Catalog, name: str, shown: Shown = everything) -> JsonObject:
    """Return one model as Anthropic's clients read it.

    Raises:
        RequestError: If there is no such model.
    """
    _refuse_hidden(name, shown)
    facts = ModelFacts(name, name) if name in catalog.also else _find(catalog, name)
    return _anthropic(name, facts)


def _anthropic(name: str, facts: ModelFacts) -> JsonObject:
    own = name.removeprefix(ALIAS)
    suffix = own[len(facts.slug) :].replace("-", " ").strip() if own.startswith(facts.slug) else name
    return {
        "type": "model",
        "id": name,
        "display_name": f"{facts.display_name} ({suffix})" if suffix else facts.display_name,
        "created_at": CREATED_AT,
        "lifecycle": "active",
        "max_input_tokens": facts.max_context_window,
        "max_tokens": MAX_OUTPUT_TOKENS,
        "capabilities": None,
    }


def _position(entries: list[tuple[str, ModelFacts]], name: str, param: str) -> int:
    for position, (entry, _) in enumerate(entries):
        if entry == name:
            return position
    raise RequestError(f"{param} {name!r} names no model of this list", param=param)


def codex_list(lists: Iterable[list[Any]], shown: Shown = everything) -> tuple[bytes, str]:
    """Return the backend's own objects and their ETag: the union by slug, the first list's object wins.

    The objects are not touched: one field that the Codex CLI misses makes it drop the whole
    list, and the empty list makes it use the one it was built with. The same lists give the
    same ETag.
    """
    union: dict[str, JsonObject] = {}
    for entries in lists:
        for entry in entries:
            slug = entry.get("slug") if isinstance(entry, dict) else None
            if isinstance(slug, str) and slug and shown(slug):
                union.setdefault(slug, entry)
    body = dumps({"models": list(union.values())})
    return body, f'"{hashlib.sha256(body).hexdigest()[:32]}"'
