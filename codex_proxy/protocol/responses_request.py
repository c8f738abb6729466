"""The Responses dialect, inwards: a caller's body becomes what the backend takes.

A Codex client's body is already what the backend takes: it is checked, store, stream and include are
forced, and when nothing differs the very bytes go on. Every other caller's body is
normalised: what has another form gets it, what the backend refuses and only tunes the answer
is left out (`LEFT_OUT`), and what would change the answer's meaning is refused by its path.
Fields and item types that we do not know pass; the backend is strict and says so itself.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from codex_proxy.errors import RequestError
from codex_proxy.protocol.binding import bind
from codex_proxy.protocol.catalog import AUTO, PRIORITY, Catalog, Resolved, on_the_wire
from codex_proxy.protocol.fields import get_boolean, get_list, get_object, get_string, wrong
from codex_proxy.protocol.names import ID_PREFIXES, MAX_ID_LENGTH, ItemIds, shorten
from codex_proxy.protocol.request import (
    LITE_HEADER,
    LITE_METADATA,
    TURN_STATE,
    BackendRequest,
    forwardable,
    is_codex_client,
    model_of,
    parse_body,
    render_body,
    set_routing_hint,
    set_session,
)
from codex_proxy.protocol.wire import JsonObject

LEFT_OUT = frozenset({
    "context_management",
    "frequency_penalty",
    "generate",
    "logit_bias",
    "logprobs",
    "max_tool_calls",
    "metadata",
    "moderation",
    "presence_penalty",
    "prompt_cache_options",
    "prompt_cache_retention",
    "safety_identifier",
    "seed",
    "temperature",
    "top_k",
    "top_logprobs",
    "top_p",
    "truncation",
    "user",
})
"""What the backend refuses and an answer can do without. `max_output_tokens` is not among them: we keep it."""

LIMITS = ("max_output_tokens", "max_completion_tokens", "max_tokens")
"""The names of the output limit, the first that is given wins."""

REASONING = "reasoning.encrypted_content"
KEPT_INCLUDES = frozenset({REASONING, "web_search_call.action.sources", "web_search_call.results"})
"""What the backend is known to include."""

FUNCTIONS = "functions"
"""The namespace that plain tools live in on the lite wire."""

_PLAIN_TOOLS = frozenset({"function", "custom"})
_BESIDE = frozenset({"namespace", "tool_search", "local_shell"})
"""Tools that the caller runs and that stand beside the namespace of the plain ones."""
_LITE_TOOLS = _PLAIN_TOOLS | _BESIDE
_LITE_CALLS = frozenset({"function_call", "custom_tool_call"})
COMPACTIONS = frozenset({"compaction", "compaction_summary", "context_compaction"})

_STRINGS: dict[str, tuple[str, ...]] = {
    "function_call": ("call_id", "name", "arguments"),
    "function_call_output": ("call_id",),
    "custom_tool_call": ("call_id", "name", "input"),
    "custom_tool_call_output": ("call_id",),
}
"""The fields that must be strings, by item type."""

_OUTPUTS = frozenset({"function_call_output", "custom_tool_call_output"})

# What most bodies have none of: one look tells that there is nothing to do.
_STORED = frozenset({"previous_response_id", "conversation", "prompt", "background"})
_LIMITS = frozenset(LIMITS)
_CHECKED = frozenset({"service_tier", "reasoning", "text", "tools", "include"})
_EFFORTS = frozenset({"reasoning", "reasoning_effort", "variant"})
_OF_TOOLS = frozenset({"tools", "parallel_tool_calls", "tool_choice"})
_DROPPED = LEFT_OUT | _STORED

_NOTHING: JsonObject = {}
_ROLES = ("user", "assistant", "developer")
_UPDATE, _LITE_ITEM = "configuration_update", "additional_tools"


class _Body:
    """A body that knows whether it was changed, so that an unchanged one need not be rendered."""

    __slots__ = ("changed", "fields")

    def __init__(self, fields: JsonObject, *, changed: bool = False) -> None:
        self.fields = fields
        self.changed = changed

    def set(self, key: str, value: Any) -> None:
        old = self.fields.get(key)
        # 0 and False are equal, and another thing on the wire.
        if old != value or type(old) is not type(value):
            self.fields[key] = value
            self.changed = True

    def drop(self, key: str) -> None:
        if key in self.fields:
            del self.fields[key]
            self.changed = True


def decode(raw: bytes, headers: Mapping[str, str], *, catalog: Catalog, caller: str = "") -> BackendRequest:
    """Decode the body of `POST /v1/responses`; *headers* have lower-case names.

    Raises:
        RequestError: If the body is not what the API says, or asks for what only the
            stored conversations of the public API can give. `param` is the field's path.
    """
    body = _Body(parse_body(raw))
    return _prepare(body, headers, catalog, caller, is_codex=is_codex_client(headers), raw=raw)


def decode_fields(
    fields: JsonObject, headers: Mapping[str, str], *, catalog: Catalog, caller: str = ""
) -> BackendRequest:
    """Decode a body that was parsed, and perhaps changed, already; *fields* is changed in place.

    Raises:
        RequestError: As for `decode`.
    """
    body = _Body(fields, changed=True)
    return _prepare(body, headers, catalog, caller, is_codex=is_codex_client(headers), raw=b"")


def prepare(
    fields: JsonObject,
    headers: Mapping[str, str],
    *,
    catalog: Catalog,
    caller: str = "",
    said: JsonObject | None = None,
    survey: "Survey | None" = None,
) -> BackendRequest:
    """Make a request out of *fields*, a Responses body into which another dialect's was translated.

    It is treated as the body of a caller who is no Codex client, so tier, effort, wire shape and what the
    backend refuses are settled in one place. *fields* is changed in place.

    Args:
        caller: Who asks; `Caller.id`.
        said: The body as the caller wrote it, where names of the conversation may stand.
        survey: What the input holds, from a translator that made each item such as the backend wants it: the
            items are not looked at again. None when they are the caller's own.

    Raises:
        RequestError: As for `decode`; a translator leaves no reason for most of them.
    """
    body = _Body(fields, changed=True)
    return _prepare(body, headers, catalog, caller, is_codex=False, raw=b"", said=said, survey=survey)


def _prepare(
    body: "_Body",
    headers: Mapping[str, str],
    catalog: Catalog,
    caller: str,
    *,
    is_codex: bool,
    raw: bytes,
    said: JsonObject | None = None,
    survey: "Survey | None" = None,
) -> BackendRequest:
    fields = body.fields
    asked = model_of(fields)
    resolved = catalog.resolve(asked)
    stream = get_boolean(fields, "stream")
    _check(fields)
    items = _items(body)
    seen = _Input(items, is_codex=is_codex) if survey is None else None
    metadata = get_object(fields, "client_metadata") or _NOTHING
    takes_lite = catalog.profile(resolved.model) == "lite"
    lite = _is_true(headers.get(LITE_HEADER)) or _is_true(metadata.get(LITE_METADATA))
    if not lite and not is_codex and takes_lite and seen is not None:
        # The shape without its flag: a relay may have lost the header.
        lite = _LITE_ITEM in seen.notable
    cache_key = get_string(fields, "prompt_cache_key")
    binding = bind(
        caller,
        headers,
        fields if said is None else said,
        model=resolved.model,
        instructions=fields.get("instructions"),
        items=items,
    )
    assert binding is not None

    limit = _take_limit(body) if not _LIMITS.isdisjoint(fields) else None
    if resolved.model != asked:
        body.set("model", resolved.model)
    asked_tier = fields.get("service_tier")
    if resolved.fast or "service_tier" in fields:
        _set_tier(body, resolved, catalog, is_codex)
    if resolved.effort or resolved.mapped_effort or not _EFFORTS.isdisjoint(fields):
        _set_effort(body, resolved, catalog, is_codex)
    if seen is not None and _UPDATE in seen.notable and _align_updates(body, items, resolved):
        seen = _Input(items, is_codex=is_codex)
    if not is_codex:
        _normalise(body, seen, stream, lite)
    keeps = not is_codex and fields.get("store") in (None, True)
    if fields.get("store") is not False:
        body.set("store", False)
    if not stream:
        body.set("stream", True)
    _set_include(body, is_codex)

    # A Codex client that was given a name with a suffix takes it for an unknown model, and
    # writes the standard shape.
    encoded = takes_lite and not lite and (not is_codex or resolved.model != asked) and _fits_lite(fields)
    if encoded:
        encode_lite(fields)
        body.changed = lite = True

    forwarded = forwardable(headers, is_codex)
    tier = fields.get("service_tier")
    if is_codex:
        set_routing_hint(forwarded, resolved.model, tier)
    else:
        set_session(forwarded, cache_key, binding)
    if lite:
        forwarded[LITE_HEADER] = "true"
    turn_state = metadata.get(TURN_STATE)
    if cache_key or is_codex:
        rendered = render_body(fields) if body.changed else raw
    elif body.changed or "prompt_cache_key" in fields:
        fields["prompt_cache_key"] = binding.key
        rendered = render_body(fields)
    else:
        rendered = _with_cache_key(raw, binding.key)
    if seen is not None:
        survey = seen.survey
    assert survey is not None
    return BackendRequest(
        endpoint="responses",
        asked_model=asked,
        model=resolved.model,
        body=rendered,
        stream=stream,
        is_codex=is_codex,
        lite=lite,
        was_lite_encoded=encoded,
        binding=binding,
        service_tier=tier,
        asked_tier=asked_tier,
        max_output_tokens=limit,
        headers=forwarded,
        turn_state=headers.get(TURN_STATE) or (turn_state if isinstance(turn_state, str) else None),
        encrypted=tuple(survey.encrypted),
        compacted=tuple(survey.compacted),
        input_bytes=max(len(rendered) - survey.opaque_bytes, 0),
        has_body_turn_state=TURN_STATE in metadata,
        keeps=keeps,
        context_window=facts.context_window if (facts := catalog.facts(resolved.model)) is not None else 0,
    )


def _with_cache_key(raw: bytes, key: str) -> bytes:
    """Return a body that needs no other change with a cache key; a long one is not rendered for that."""
    start = raw.index(b"{") + 1
    return b"".join((raw[:start], b'"prompt_cache_key":"', key.encode(), b'",', raw[start:]))


class Survey:
    """What a request's input holds that an account or an estimate must know of."""

    __slots__ = ("compacted", "encrypted", "opaque_bytes")

    def __init__(self) -> None:
        self.encrypted: list[str] = []
        self.compacted: list[str] = []
        self.opaque_bytes = 0
        """The size of pictures, files and encrypted contents: bytes that are no text."""

    @classmethod
    def of(cls, items: Any) -> "Survey":
        """Look through a whole input, which may be anything."""
        survey = cls()
        for item in items if isinstance(items, list) else ():
            if isinstance(item, dict):
                survey.add(item, _kind(item))
                for part in _parts(item):
                    survey.add_part(part)
        return survey

    def add(self, item: JsonObject, kind: str) -> None:
        """Take in an item of type *kind*, but for its parts."""
        value = item.get("encrypted_content")
        if isinstance(value, str):
            self.opaque_bytes += len(value)
            if kind == "reasoning":
                self.encrypted.append(value)
            elif kind in COMPACTIONS:
                self.compacted.append(value)
        if kind == "image_generation_call" and isinstance(item.get("result"), str):
            self.opaque_bytes += len(item["result"])

    def add_part(self, part: JsonObject) -> None:
        """Take in a part of an item's content or output."""
        for key in ("image_url", "file_data"):
            data = part.get(key)
            if isinstance(data, str):
                self.opaque_bytes += len(data)


class _Input:
    """The items of the input, looked at once: are they sound, what do they hold, which are to be normalised?

    Args:
        items: What `_items` returned.
        is_codex: Whether a Codex client wrote them, so that nothing is normalised.

    Raises:
        FieldError: If one is none that anybody could read.
    """

    __slots__ = ("_is_codex", "has_odd_ids", "items", "notable", "odd", "survey", "untyped")

    def __init__(self, items: list[Any], *, is_codex: bool = False) -> None:
        self.items: list[JsonObject] = items
        self.survey = Survey()
        self.notable: set[str] = set()
        """The types that are there beside messages, thoughts and calls."""
        self.odd: list[int] = []
        """Where the items are that are not already such as the backend wants them."""
        self.untyped: list[int] = []
        self.has_odd_ids = False
        self._is_codex = is_codex
        for index, item in enumerate(items):
            if not isinstance(item, dict):
                raise wrong(f"input.{index}", "an object", item)
            # A Codex client's items have more to them.
            if (is_codex or not _is_plain(item)) and self._look_at(item, index):
                self.odd.append(index)

    def _look_at(self, item: JsonObject, index: int) -> bool:
        """Check an item and take it in; tell whether something of it is to be normalised."""
        is_odd = False
        kind = item.get("type")
        if not isinstance(kind, str):
            if kind is not None:
                raise wrong(f"input.{index}.type", "a string", kind)
            kind = "item_reference" if "role" not in item and isinstance(item.get("id"), str) else ""
            self.untyped.append(index)
            is_odd = True
        if kind == "item_reference":
            raise RequestError(
                "items are not stored here, so none can be referred to; send the item itself",
                param=f"input.{index}",
                code="unsupported_value",
            )
        content, output = item.get("content"), item.get("output")
        if isinstance(content, list):
            is_odd |= self._look_into(content, index, "content")
        elif content is not None and not isinstance(content, str):
            raise wrong(f"input.{index}.content", "a string or a list", content)
        if isinstance(output, list):
            is_odd |= self._look_into(output, index, "output")
        if "encrypted_content" in item or kind == "image_generation_call":
            self.survey.add(item, kind)
        needed = _STRINGS.get(kind)
        if needed is None and kind != "message" and kind != "reasoning":
            self.notable.add(kind)
        if self._is_codex:
            return False
        if kind == "message":
            is_odd |= content is None or item.get("role") not in _ROLES
        elif kind == "reasoning":
            is_odd |= not _is_whole_thought(item)
        elif needed is not None:
            for key in needed:
                is_odd |= not isinstance(item.get(key), str)
            is_odd |= kind in _OUTPUTS and not isinstance(output, str | list)
        return self._is_named_oddly(item, kind) or is_odd

    def _is_named_oddly(self, item: JsonObject, kind: str) -> bool:
        """Tell whether an item's names are to be normalised."""
        is_odd = False
        if "id" in item:
            value = item["id"]
            if (
                not isinstance(value, str)
                or not 0 < len(value) <= MAX_ID_LENGTH
                or not value.startswith(ID_PREFIXES.get(kind or "message", ""))
            ):
                is_odd = self.has_odd_ids = True
        call_id = item.get("call_id")
        return is_odd or (isinstance(call_id, str) and len(call_id) > MAX_ID_LENGTH)

    def _look_into(self, parts: list[Any], index: int, key: str) -> bool:
        """Check parts and take them in; tell whether something of them is to be normalised."""
        is_odd = False
        for place, part in enumerate(parts):
            if not isinstance(part, dict):
                raise wrong(f"input.{index}.{key}.{place}", "an object", part)
            is_typed = isinstance(part.get("type"), str)
            if is_typed and len(part) == 2 and "text" in part:
                # So are nearly all.
                continue
            self.survey.add_part(part)
            is_odd |= not is_typed or "prompt_cache_breakpoint" in part
        return is_odd


def _is_plain(item: JsonObject) -> bool:
    """Tell at a glance that there is nothing to look for in an item; False says nothing.

    It looks at how many fields there are and at those that it knows, so none is left over. Most items of most
    conversations are words, calls and outputs of this form.
    """
    kind, size = item.get("type"), len(item)
    if kind == "message":
        content = item.get("content")
        if size != 3 or item.get("role") not in _ROLES:
            return False
        if isinstance(content, list) and len(content) == 1:
            part = content[0]
            return (
                isinstance(part, dict)
                and len(part) == 2
                and "text" in part
                and isinstance(part.get("type"), str)
            )
        return isinstance(content, str)
    call_id = item.get("call_id")
    if not isinstance(call_id, str) or len(call_id) > MAX_ID_LENGTH:
        return False
    if kind == "function_call":
        return size == 4 and isinstance(item.get("name"), str) and isinstance(item.get("arguments"), str)
    return kind == "function_call_output" and size == 3 and isinstance(item.get("output"), str)


def _is_whole_thought(item: JsonObject) -> bool:
    return isinstance(item.get("summary"), list) and _is_word(item.get("encrypted_content"))


def _is_word(value: Any) -> bool:
    """Tell whether an encrypted content is one word; splitting is the fast way to ask that of a long text."""
    return isinstance(value, str) and value.split() == [value]


# Checks that hold for every caller.


def _check(fields: JsonObject) -> None:
    if not _STORED.isdisjoint(fields):
        _refuse_stored(fields)
    get_string(fields, "instructions")
    if _CHECKED.isdisjoint(fields):
        return
    get_string(fields, "service_tier")
    get_object(fields, "reasoning")
    get_object(fields, "text")
    for index, tool in enumerate(get_list(fields, "tools")):
        if not isinstance(tool, dict):
            raise wrong(f"tools.{index}", "an object", tool)
    for index, value in enumerate(get_list(fields, "include")):
        if not isinstance(value, str):
            raise wrong(f"include.{index}", "a string", value)


def _refuse_stored(fields: JsonObject) -> None:
    if _given(fields, "previous_response_id"):
        raise RequestError(
            "previous responses are not stored here; send the whole conversation as input",
            param="previous_response_id",
            code="previous_response_not_found",
        )
    for key, why in (
        ("conversation", "conversations are not stored here; send the whole conversation as input"),
        ("prompt", "stored prompts cannot be reached from here; send instructions and input"),
    ):
        if _given(fields, key):
            raise RequestError(why, param=key, code="unsupported_parameter")
    if get_boolean(fields, "background"):
        raise RequestError(
            "answers are not stored here, so none can be fetched later; use stream",
            param="background",
            code="unsupported_parameter",
        )


def check_countable(fields: JsonObject) -> None:
    """Check a body of which only the tokens are asked, so that the model may be missing.

    Raises:
        RequestError: If it is not what the API says.
    """
    if fields.get("model") is not None:
        model_of(fields)
    _check(fields)
    if fields.get("input") is not None:
        _ = _Input(_items(_Body(fields)), is_codex=True)


def _given(fields: JsonObject, key: str) -> bool:
    return fields.get(key) is not None and fields[key] != ""


def _items(body: _Body) -> list[Any]:
    """Return the input as a list, which `_Input` looks into."""
    value = body.fields.get("input")
    if isinstance(value, str):
        value = [{"type": "message", "role": "user", "content": [{"type": "input_text", "text": value}]}]
        body.fields["input"] = value
        body.changed = True
    if value is None:
        raise RequestError("input is missing", param="input", code="missing_required_parameter")
    if not isinstance(value, list):
        raise wrong("input", "a string or a list", value)
    return value


def _take_limit(body: _Body) -> int | None:
    limit: int | None = None
    for key in LIMITS:
        if key not in body.fields:
            continue
        value = body.fields.pop(key)
        body.changed = True
        if value is None:
            continue
        if not isinstance(value, int) or isinstance(value, bool):
            raise wrong(key, "an integer", value)
        if value < 1:
            raise RequestError(f"{key} is {value}; it must be at least 1", param=key, code="invalid_value")
        if limit is None:
            limit = value
    return limit


# The model's name and what it says.


def _set_tier(body: _Body, resolved: Resolved, catalog: Catalog, is_codex: bool) -> None:
    if resolved.fast and catalog.has_fast(resolved.model):
        body.set("service_tier", PRIORITY)
    elif not is_codex:
        if body.fields.get("service_tier") in ("fast", PRIORITY):
            body.set("service_tier", PRIORITY)
        else:
            body.drop("service_tier")


def _set_effort(body: _Body, resolved: Resolved, catalog: Catalog, is_codex: bool) -> None:
    """Put the effort where the backend reads it: the typed suffix first, then what the body says.

    A Codex client knows its model's efforts, so only `ultra` and `auto` are changed there.
    """
    fields = body.fields
    reasoning = get_object(fields, "reasoning") or {}
    given = get_string(reasoning, "effort", "reasoning.effort")
    wanted = given
    if not is_codex:
        for key in ("reasoning_effort", "variant"):
            wanted = wanted or get_string(fields, key)
            body.drop(key)
        wanted = wanted.lower() if wanted else None
    if resolved.effort is not None:
        wanted = resolved.effort
    wanted = wanted or resolved.mapped_effort
    if not wanted or wanted == AUTO:
        effort = None
    elif is_codex and resolved.effort is None:
        effort = on_the_wire(wanted)
    else:
        effort = catalog.nearest(resolved.model, wanted)

    if effort is not None:
        if effort != given:
            fields["reasoning"] = {**reasoning, "effort": effort}
            body.changed = True
    elif given is not None:
        del reasoning["effort"]
        body.changed = True
        if not reasoning:
            body.drop("reasoning")


def _align_updates(body: _Body, items: list[JsonObject], resolved: Resolved) -> bool:
    """Let the efforts that stand in the input say the same as the request; tell whether items were taken out.

    An effort that the caller typed as a suffix outranks the input.
    """
    wins = resolved.effort is not None
    effort = (get_object(body.fields, "reasoning") or {}).get("effort")
    outdated = False
    for item in items:
        if item.get("type") != _UPDATE or not isinstance(item.get("reasoning"), dict):
            continue
        old = item["reasoning"].get("effort")
        if not isinstance(old, str):
            continue
        if wins and effort is None:
            outdated = True
            continue
        new = effort if wins else on_the_wire(old)
        if new != old:
            item["reasoning"]["effort"] = new
            body.changed = True
    if outdated:
        items[:] = [item for item in items if item.get("type") != _UPDATE]
        body.changed = True
    return outdated


def _set_include(body: _Body, is_codex: bool) -> None:
    if "include" not in body.fields:
        body.set("include", [REASONING])
        return
    given = get_list(body.fields, "include")
    wanted = given if is_codex else [value for value in given if value in KEPT_INCLUDES]
    body.set("include", wanted if REASONING in wanted else [*wanted, REASONING])


# The other callers.


def _normalise(body: _Body, seen: _Input | None, stream: bool, lite: bool) -> None:
    fields = body.fields
    if "stream_options" in fields:
        delivery = (get_object(fields, "stream_options") or {}).get("reasoning_summary_delivery")
        if delivery is not None and stream:
            body.set("stream_options", {"reasoning_summary_delivery": delivery})
        else:
            body.drop("stream_options")
    # null says the same as nothing in this API; the backend refuses some.
    for key in [key for key, value in fields.items() if value is None or key in _DROPPED]:
        body.drop(key)
    if "reasoning" in fields:
        _normalise_reasoning(body)
    if lite or not _OF_TOOLS.isdisjoint(fields):
        _normalise_tools(body, lite)
    if not lite and "instructions" not in fields:
        body.set("instructions", "")
    if seen is not None and seen.odd:
        _normalise_items(body, seen)


def _normalise_reasoning(body: _Body) -> None:
    reasoning = body.fields["reasoning"]
    for key in [key for key, value in reasoning.items() if value is None]:
        del reasoning[key]
        body.changed = True
    if "generate_summary" in reasoning:
        # The older name.
        summary = reasoning.pop("generate_summary")
        reasoning.setdefault("summary", summary)
        body.changed = True
    if not reasoning:
        body.drop("reasoning")


def _normalise_tools(body: _Body, lite: bool) -> None:
    fields = body.fields
    tools = get_list(fields, "tools")
    for index, tool in enumerate(tools):
        kind = tool.get("type")
        if not isinstance(kind, str):
            raise wrong(f"tools.{index}.type", "a string", kind)
        if kind in _PLAIN_TOOLS:
            if not isinstance(tool.get("name"), str):
                raise wrong(f"tools.{index}.name", "a string", tool.get("name"))
        elif kind == "namespace":
            if not isinstance(tool.get("tools"), list):
                raise wrong(f"tools.{index}.tools", "a list", tool.get("tools"))
        else:
            _rename_search(body, tool)
    parallel = get_boolean(fields, "parallel_tool_calls", default=True)
    if lite:
        body.set("parallel_tool_calls", False)
    elif tools:
        body.set("parallel_tool_calls", parallel)
    else:
        body.drop("tools")
        body.drop("parallel_tool_calls")
    choice = fields.get("tool_choice")
    if choice is None or isinstance(choice, str):
        return
    if not isinstance(choice, dict):
        raise wrong("tool_choice", "a string or an object", choice)
    _rename_search(body, choice)
    for index, tool in enumerate(get_list(choice, "tools", "tool_choice.tools")):
        if not isinstance(tool, dict):
            raise wrong(f"tool_choice.tools.{index}", "an object", tool)
        _rename_search(body, tool)


def _rename_search(body: _Body, tool: JsonObject) -> None:
    kind = tool.get("type")
    if isinstance(kind, str) and kind.startswith("web_search_preview"):
        tool["type"] = "web_search"
        body.changed = True


def _normalise_items(body: _Body, seen: _Input) -> None:
    items = seen.items
    for index in seen.untyped:
        item = items[index]
        if "role" not in item:
            raise RequestError(f"input.{index}.type is missing", param=f"input.{index}.type")
        item["type"] = "message"
        body.changed = True
    # All ids count, and those before which an odd one stands are not known yet.
    ids = ItemIds(items if seen.has_odd_ids else ())
    empty: set[int] = set()
    unsealed = False
    for index in seen.odd:
        item = items[index]
        was_sealed = "encrypted_content" in item
        if not _normalise_item(body, item, f"input.{index}", ids):
            empty.add(index)
        unsealed |= was_sealed and "encrypted_content" not in item
    if empty:
        items[:] = [item for index, item in enumerate(items) if index not in empty]
        body.changed = True
    if empty or unsealed:
        seen.survey = Survey.of(items)


def _normalise_item(body: _Body, item: JsonObject, path: str, ids: ItemIds) -> bool:
    """Make an item such as the backend wants it; False when nothing of it is left."""
    kind: str = item["type"]
    if kind == "message":
        _normalise_message(body, item, path)
    for key in _STRINGS.get(kind, ()):
        if not isinstance(item.get(key), str):
            raise wrong(f"{path}.{key}", "a string", item.get(key))
    call_id = item.get("call_id")
    if isinstance(call_id, str) and len(call_id) > MAX_ID_LENGTH:
        # The same text gives the same id, so a call and its output still meet.
        item["call_id"] = shorten(call_id, "call")
        body.changed = True
    if kind in _OUTPUTS and not isinstance(item.get("output"), str | list):
        raise wrong(f"{path}.output", "a string or a list", item.get("output"))
    for part in _parts(item):
        if "prompt_cache_breakpoint" in part:
            del part["prompt_cache_breakpoint"]
            body.changed = True
    if kind == "reasoning" and not _normalise_thought(body, item, path):
        return False
    _normalise_id(body, item, kind, path, ids)
    return True


def _normalise_message(body: _Body, item: JsonObject, path: str) -> None:
    role = item.get("role")
    if not isinstance(role, str) or not role:
        raise wrong(f"{path}.role", "a string", role)
    if item.get("content") is None:
        raise wrong(f"{path}.content", "a string or a list", None)
    if role == "system":
        item["role"] = "developer"
        body.changed = True
    for index, part in enumerate(_parts(item)):
        if not isinstance(part.get("type"), str):
            raise wrong(f"{path}.content.{index}.type", "a string", part.get("type"))


def _normalise_thought(body: _Body, item: JsonObject, path: str) -> bool:
    """Make a reasoning item fit; False when nothing of it is left.

    Without its encrypted content an id points to what the backend has not stored.
    """
    # One word, or it was made elsewhere.
    if not _is_word(item.get("encrypted_content")):
        for key in ("encrypted_content", "id"):
            if key in item:
                del item[key]
                body.changed = True
        if not item.get("summary") and not item.get("content"):
            return False
    summary = item.get("summary")
    if summary is None:
        item["summary"] = []
        body.changed = True
    elif not isinstance(summary, list):
        raise wrong(f"{path}.summary", "a list", summary)
    return True


def _normalise_id(body: _Body, item: JsonObject, kind: str, path: str, ids: ItemIds) -> None:
    if "id" not in item:
        return
    value = item["id"]
    if value is None or value == "":
        del item["id"]
        body.changed = True
        return
    if not isinstance(value, str):
        raise wrong(f"{path}.id", "a string", value)
    if len(value) > MAX_ID_LENGTH and "encrypted_content" in item:
        # The content knows its id, so another one would not fit; none does.
        del item["id"]
        body.changed = True
        return
    repaired = ids.repair(value, kind)
    if repaired != value:
        item["id"] = repaired
        body.changed = True


# The lite wire shape. All that is known of it is here.


def _fits_lite(fields: JsonObject) -> bool:
    """Tell whether the lite shape can carry the tools: hosted ones, it cannot."""
    tools = get_list(fields, "tools")
    # The caller's own namespace of that name could not be told apart in the answer.
    return all(
        _kind(tool) in _LITE_TOOLS and not (_kind(tool) == "namespace" and tool.get("name") == FUNCTIONS)
        for tool in tools
    )


def encode_lite(fields: JsonObject) -> None:
    """Write a standard body in the lite shape.

    Tools are the first item of the input, the plain ones in a namespace; the instructions
    are a developer's message after them; calls are made one by one; the reasoning of all
    turns counts. The answer's calls carry the namespace, and the encoder takes it out again.
    """
    tools = get_list(fields, "tools")
    fields.pop("tools", None)
    head: list[JsonObject] = []
    if tools:
        plain = [tool for tool in tools if tool["type"] in _PLAIN_TOOLS]
        carried = [tool for tool in tools if tool["type"] in _BESIDE]
        if plain:
            carried.insert(0, {"type": "namespace", "name": FUNCTIONS, "description": "", "tools": plain})
        head.append({"type": "additional_tools", "role": "developer", "tools": carried})
    instructions = fields.pop("instructions", None)
    if instructions:
        content = [{"type": "input_text", "text": instructions}]
        head.append({"type": "message", "role": "developer", "content": content})
    for item in fields["input"]:
        if item.get("type") in _LITE_CALLS and not item.get("namespace"):
            item["namespace"] = FUNCTIONS
    fields["input"] = [*head, *fields["input"]]
    fields["reasoning"] = {**(fields.get("reasoning") or {}), "context": "all_turns"}
    fields["parallel_tool_calls"] = False
    choice = fields.get("tool_choice")
    if isinstance(choice, dict):
        for tool in (choice, *get_list(choice, "tools")):
            if isinstance(tool, dict) and _kind(tool) in _PLAIN_TOOLS and not tool.get("namespace"):
                tool["namespace"] = FUNCTIONS


# Reading fields of a body that may hold anything.


def _is_true(value: Any) -> bool:
    return isinstance(value, str) and value.strip().lower() == "true"


def _kind(value: JsonObject) -> str:
    """Return the type that an object names; a type that is no string is no type."""
    kind = value.get("type")
    return kind if isinstance(kind, str) else ""


def _parts(item: JsonObject) -> Iterator[JsonObject]:
    for key in ("content", "output"):
        value = item.get(key)
        if isinstance(value, list):
            for part in value:
                if isinstance(part, dict):
                    yield part
