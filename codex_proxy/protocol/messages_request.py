"""The Messages dialect, inwards: a request in Anthropic's words becomes what the backend takes.

| in the request                          | what happens to it                                          |
|-----------------------------------------|-------------------------------------------------------------|
| `system`, and `role: system` messages   | developer messages, each at its place                       |
| Claude Code's billing line              | taken out: it changes per conversation, and the prompt      |
|                                         | cache would start anew                                      |
| text, images, documents, search results | parts of a message; a document's title and context are kept |
| `tool_use`, `tool_result`               | calls and their outputs, matched; `is_error` becomes a word |
| `thinking` that we sealed               | the backend's reasoning again; any other is dropped         |
| what servers of Anthropic's did         | words of the assistant, with a label                        |
| files by id, unknown blocks             | 400 with their path                                         |
| tools                                   | functions; tools that Anthropic defines and the caller runs |
|                                         | get their schema here, web search is the backend's          |
| `thinking`, `output_config.effort`      | the effort, and whether there are thinking blocks           |
| `max_tokens`, `stop_sequences`          | kept here                                                   |
| knobs (`LEFT_OUT`), unknown fields      | left out: a release of Claude Code may bring new ones       |

A last message of the assistant's is sent as it is; the answer goes on after it as a message of its own.
"""

import enum
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from codex_proxy.errors import RequestError
from codex_proxy.protocol.calls import repair_calls
from codex_proxy.protocol.catalog import BUDGETS, PRIORITY, Catalog
from codex_proxy.protocol.fields import FieldError, check_stops, get_object, get_string, quoted, wrong
from codex_proxy.protocol.names import ToolNames, is_sealed
from codex_proxy.protocol.request import BackendRequest, model_of, parse_body
from codex_proxy.protocol.responses_request import Survey, prepare
from codex_proxy.protocol.schema import repair_parameters
from codex_proxy.protocol.wire import JsonObject, dumps

LEFT_OUT = frozenset({
    "billing_policy",
    "cache_control",
    "container",
    "context_management",
    "diagnostics",
    "fallback_credit_token",
    "fallbacks",
    "temperature",
    "top_k",
    "top_p",
    "user_profile_id",
})
"""What the backend has no place for and an answer can do without. `context_management` only makes a
conversation shorter, which the backend's cache makes cheap; a container belongs to tools that are refused."""

BILLING = "x-anthropic-billing-header:"
"""How the line begins with which Claude Code says whom to bill."""

SOURCES = "web_search_call.action.sources"
"""What the backend includes on request: the pages that a search has found."""

NO_THREADS = "thread_unsupported_request"
"""The API's own code for a conversation that it does not keep: its SDK's tool loop then sends it whole."""

PLACEHOLDER = "DeferredToolPlaceholder"
"""A tool of Claude Code's that nobody can call: it stands for those that are loaded later."""

# Deeper than anything a tool was ever given.
MAX_DEPTH = 64


class Thinking(enum.Enum):
    """What the caller wants to have of the model's thinking."""

    OFF = "off"
    """Nothing: a client that did not ask may not know such blocks."""
    SIGNED = "signed"
    """Blocks without words, whose signatures bring the reasoning back in the next turn."""
    SHOWN = "shown"
    """Blocks with a summary."""


@dataclass(slots=True)
class Asked:
    """A request, and what its answer needs to know of it."""

    request: BackendRequest
    names: ToolNames
    thinking: Thinking
    stop: tuple[str, ...]


def decode(raw: bytes, headers: Mapping[str, str], *, catalog: Catalog, caller: str = "") -> Asked:
    """Decode the body of `POST /v1/messages`; *headers* have lower-case names.

    Raises:
        RequestError: With the path of the field that cannot be served.
    """
    body = parse_body(raw)
    if body.get("model") is None:
        raise _missing("model")
    limit = _limit(body)
    _refuse_foreign(body)
    fields, names, survey = _translate(body)
    thinking = _set_reasoning(fields, body)
    stop = _stops(body.get("stop_sequences"))
    fields |= {"model": body["model"], "stream": body.get("stream"), "max_output_tokens": limit}
    tier = PRIORITY if get_string(body, "speed") == "fast" else get_string(body, "service_tier")
    if tier is not None:
        fields["service_tier"] = tier
    metadata = get_object(body, "metadata")
    if metadata is not None:
        # Only what the conversation is known by is read in it.
        get_string(metadata, "user_id", "metadata.user_id")
    request = prepare(fields, headers, catalog=catalog, caller=caller, said=body, survey=survey)
    return Asked(request, names, thinking, stop)


def countable(raw: bytes, headers: Mapping[str, str], *, catalog: Catalog) -> JsonObject:
    """Return the Responses body of whose tokens `POST /v1/messages/count_tokens` asks.

    Raises:
        RequestError: With the path of the field that cannot be read.
    """
    body = parse_body(raw)
    if body.get("model") is not None:
        model_of(body)
    return _translate(body)[0]


def _translate(body: JsonObject) -> tuple[JsonObject, ToolNames, Survey]:
    """Translate all that the model reads; also return what it calls the tools, and what the input holds."""
    tools = _Tools(body)
    conversation = _Conversation(tools.names)
    conversation.add_system(body.get("system"))
    conversation.add_all(body.get("messages"))
    fields: JsonObject = {"input": repair_calls(conversation.items, conversation.ends)}
    if tools.declared:
        fields["tools"] = tools.declared
        if tools.searches:
            fields["include"] = [SOURCES]
    fields |= tools.choice()
    shape = _format(body)
    if shape is not None:
        fields["text"] = {"format": shape}
    return fields, tools.names, conversation.survey


# What the caller wants around the conversation.


_FOREIGN = frozenset({"mcp_servers", "compaction", "thread", "inference_geo"})
_OF_THINKING = frozenset({"thinking", "output_config"})
_OF_FORMAT = frozenset({"output_config", "output_format"})
"""Fields of one kind: a look tells whether a body has any of them."""


def _limit(body: JsonObject) -> int:
    value = body.get("max_tokens")
    if value is None:
        raise _missing("max_tokens")
    if not isinstance(value, int) or isinstance(value, bool):
        raise _wrong("max_tokens", "an integer", value)
    if value < 1:
        raise RequestError("max_tokens must be at least 1", param="max_tokens", code="invalid_value")
    return value


def _refuse_foreign(body: JsonObject) -> None:
    """Refuse what would change the answer and that only Anthropic's servers can do."""
    if _FOREIGN.isdisjoint(body):
        return
    for key, why in (
        ("mcp_servers", "servers are not called from here; connect to them in the client"),
        ("compaction", "conversations are not compacted here; ask for a summary in a message"),
        ("thread", "conversations are not stored here; send the whole conversation as messages"),
    ):
        if body.get(key):
            code = NO_THREADS if key == "thread" else "unsupported_parameter"
            raise RequestError(why, param=key, code=code)
    where = get_string(body, "inference_geo")
    if where not in {None, "", "global", "not_available"}:
        # A promise, perhaps of law, that nobody here can keep.
        raise RequestError(
            "where an answer is made cannot be chosen here", param="inference_geo", code="unsupported_value"
        )


def _set_reasoning(fields: JsonObject, body: JsonObject) -> Thinking:
    """Put the effort into *fields*, and whether a summary is wanted; return what the caller gets of it."""
    if _OF_THINKING.isdisjoint(body):
        return Thinking.OFF
    thinking = get_object(body, "thinking") or {}
    config = get_object(body, "output_config") or {}
    effort = get_string(config, "effort", "output_config.effort")
    display = get_string(thinking, "display", "thinking.display")
    if display not in {None, "summarized", "omitted", "updates"}:
        raise _unknown("thinking.display", display)
    wants = Thinking.SIGNED if display == "omitted" else Thinking.SHOWN
    kind = get_string(thinking, "type", "thinking.type")
    match kind:
        case "enabled":
            effort = _effort_of(thinking)
        case "adaptive" | "auto" | "between_tools":
            pass
        case "disabled":
            wants = Thinking.OFF
            effort = effort or "none"
        case None if body.get("thinking") is None:
            wants = Thinking.OFF
        case None:
            raise _missing("thinking.type")
        case _:
            raise _unknown("thinking.type", kind)
    reasoning: JsonObject = {}
    if effort:
        reasoning["effort"] = effort
    if wants is Thinking.SHOWN:
        reasoning["summary"] = "auto"
    if reasoning:
        fields["reasoning"] = reasoning
    return wants


def _effort_of(thinking: JsonObject) -> str:
    budget = thinking.get("budget_tokens")
    path = "thinking.budget_tokens"
    if budget is None:
        raise _missing(path)
    if not isinstance(budget, int) or isinstance(budget, bool):
        raise _wrong(path, "an integer", budget)
    if budget < 1:
        raise RequestError(f"{path} must be at least 1", param=path, code="invalid_value")
    return next((effort for limit, effort in BUDGETS if budget <= limit), "xhigh")


def _format(body: JsonObject) -> JsonObject | None:
    if _OF_FORMAT.isdisjoint(body):
        return None
    config = get_object(body, "output_config") or {}
    path = "output_config.format"
    shape = get_object(config, "format", path)
    if shape is None:
        # The older name.
        path = "output_format"
        shape = get_object(body, path)
    if shape is None:
        return None
    kind = get_string(shape, "type", f"{path}.type")
    if kind != "json_schema":
        raise _missing(f"{path}.type") if kind is None else _unknown(f"{path}.type", kind)
    schema = get_object(shape, "schema", f"{path}.schema")
    if schema is None:
        raise _missing(f"{path}.schema")
    return {"type": "json_schema", "name": "output", "strict": _is_strict(schema), "schema": schema}


def _stops(value: Any) -> tuple[str, ...]:
    if value is None:
        return ()
    path = "stop_sequences"
    if not isinstance(value, list):
        raise _wrong(path, "a list", value)
    for index, one in enumerate(value):
        if not isinstance(one, str):
            raise _wrong(f"{path}.{index}", "a string", one)
        if not one:
            raise RequestError(
                "a stop sequence cannot be empty", param=f"{path}.{index}", code="invalid_value"
            )
    return check_stops(tuple(dict.fromkeys(value)), path)


# The conversation.


class _Conversation:
    """The items of the backend's input, in the order of the caller's blocks."""

    def __init__(self, names: ToolNames) -> None:
        self.items: list[JsonObject] = []
        self.ends: list[int] = []
        """For each message how many items there are up to its end."""
        self.survey = Survey()
        self._names = names
        self._last_user: int | None = None
        """Where the last message of the user's is, once somebody has asked for it."""

    def add_system(self, system: Any) -> None:
        if system is not None:
            try:
                self._add_system(system)
            except FieldError as exc:
                exc.within("system")
                raise
        self.ends.append(len(self.items))

    def add_all(self, messages: Any) -> None:
        if messages is None:
            raise _missing("messages")
        if not isinstance(messages, list):
            raise _wrong("messages", "a list", messages)
        before = len(self.items)
        for number, message in enumerate(messages):
            try:
                self._add_message(number, message, messages)
            except FieldError as exc:
                exc.within(f"messages.{number}")
                raise
            self.ends.append(len(self.items))
        if len(self.items) == before:
            raise RequestError("at least one message with content is needed", param="messages")

    def _add_message(self, number: int, message: Any, messages: list[Any]) -> None:
        if not isinstance(message, dict):
            raise _wrong("", "an object", message)
        role, content = message.get("role"), message.get("content")
        is_seen = True
        if role != "user" and role != "assistant":
            if not isinstance(role, str):
                raise _wrong("role", "a string", role)
            if role != "system":
                raise _unknown("role", role)
            # The caller's own word: from the next user message on it is not to be seen.
            is_seen = get_string(message, "clear_at") != "next_user_message" or number > self._last_of_user(
                messages
            )
        try:
            if role == "user":
                self._add_user(content)
            elif role == "assistant":
                self._add_assistant(content)
            else:
                self._add_system([] if content is None else content, is_seen=is_seen)
        except FieldError as exc:
            exc.within("content")
            raise

    def _last_of_user(self, messages: list[Any]) -> int:
        """Return the number of the user's last message; -1 when there is none."""
        if self._last_user is None:
            self._last_user = max(
                (n for n, one in enumerate(messages) if isinstance(one, dict) and one.get("role") == "user"),
                default=-1,
            )
        return self._last_user

    def _message(self, role: str, parts: list[JsonObject]) -> None:
        if parts:
            self.items.append({"type": "message", "role": role, "content": parts})

    def _weigh(self, parts: list[JsonObject]) -> None:
        """Take in what parts hold beside text."""
        for part in parts:
            if part["type"] != "input_text":
                self.survey.add_part(part)

    def _add_system(self, content: Any, *, is_seen: bool = True) -> None:
        parts = _system_parts(content)
        if is_seen:
            self._weigh(parts)
            self._message("developer", parts)

    def _add_user(self, content: Any) -> None:
        if isinstance(content, str):
            self._message("user", _said(content))
            return
        parts: list[JsonObject] = []
        for place, block in enumerate(_blocks(content)):
            try:
                kind = _kind(block)
                if kind == "text":
                    parts += _said(_text(block))
                elif kind == "tool_result":
                    # Before everything else: an output may not be parted from its call.
                    item = _output(block)
                    if isinstance(item["output"], list):
                        self._weigh(item["output"])
                    self.items.append(item)
                else:
                    parts += _input_parts(kind, block)
            except FieldError as exc:
                exc.within(str(place))
                raise
        if parts:
            self._weigh(parts)
            self._message("user", parts)

    def _add_assistant(self, content: Any) -> None:
        parts: list[JsonObject] = []
        for place, block in enumerate(_blocks(content)):
            try:
                kind = _kind(block)
                if kind == "tool_use":
                    self._message("assistant", parts)
                    parts = []
                    self.items.append(self._call(block))
                elif kind == "thinking":
                    thought = _thought(block)
                    if thought is not None:
                        self._message("assistant", parts)
                        parts = []
                        self.survey.add(thought, "reasoning")
                        self.items.append(thought)
                else:
                    text = _text(block) if kind == "text" else _words(kind, block)
                    if text:
                        parts.append({"type": "output_text", "text": text})
            except FieldError as exc:
                exc.within(str(place))
                raise
        self._message("assistant", parts)

    def _call(self, block: JsonObject) -> JsonObject:
        name, identity, given = block.get("name"), block.get("id"), block.get("input")
        if not isinstance(name, str) or not name:
            name = _needed(block, "name")
        if not isinstance(identity, str):
            identity = get_string(block, "id") or ""
        if not isinstance(given, dict):
            given = get_object(block, "input") or {}
        return {
            "type": "function_call",
            "call_id": identity,
            "name": self._names.sent(name),
            "arguments": _json(given, "input"),
        }


def _blocks(content: Any) -> list[Any]:
    """Return the blocks of a content; a string is one block of text."""
    if isinstance(content, list):
        return content
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    raise _wrong("", "a string or a list", content)


def _kind(block: Any) -> str:
    """Return the type of a block, which may still be anything."""
    if not isinstance(block, dict):
        raise _wrong("", "an object", block)
    kind = block.get("type")
    if isinstance(kind, str):
        return kind
    raise _wrong("type", "a string", kind)


def _system_parts(content: Any) -> list[JsonObject]:
    if isinstance(content, str):
        return _said(_without_billing(content))
    parts: list[JsonObject] = []
    for place, block in enumerate(_blocks(content)):
        try:
            kind = _kind(block)
            if kind == "text":
                parts += _said(_without_billing(_text(block)))
            else:
                parts += _input_parts(kind, block)
        except FieldError as exc:
            exc.within(str(place))
            raise
    return parts


def _without_billing(text: str) -> str:
    start = 0
    while text.startswith(BILLING, start):
        end = text.find("\n", start)
        if end < 0:
            return ""
        start = end + 1
    return text[start:]


def _thought(block: JsonObject) -> JsonObject | None:
    """Return the reasoning that a block brings back; None for one of another model's."""
    text = get_string(block, "thinking")
    seal = get_string(block, "signature")
    if not seal or not is_sealed(seal):
        return None
    summary = [{"type": "summary_text", "text": text}] if text else []
    return {"type": "reasoning", "summary": summary, "encrypted_content": seal}


def _output(block: JsonObject) -> JsonObject:
    content = block.get("content")
    is_error = block.get("is_error")
    if is_error is not None and not isinstance(is_error, bool):
        raise _wrong("is_error", "a boolean", is_error)
    output: str | list[JsonObject]
    if content is None or isinstance(content, str):
        output = content or ""
        if is_error:
            output = _as_error(output)
    else:
        try:
            output = _shown(content)
        except FieldError as exc:
            exc.within("content")
            raise
        if is_error:
            _mark_error(output)
        output = output or ""
    identity = block.get("tool_use_id")
    if not isinstance(identity, str):
        identity = get_string(block, "tool_use_id") or ""
    return {"type": "function_call_output", "call_id": identity, "output": output}


def _as_error(text: str) -> str:
    return text if text.startswith("Error:") else f"Error: {text}".rstrip(" ")


def _mark_error(parts: list[JsonObject]) -> None:
    for part in parts:
        if part["type"] == "input_text":
            part["text"] = _as_error(part["text"])
            return
    parts.insert(0, {"type": "input_text", "text": "Error:"})


# Blocks that the model is to see.


def _shown(content: Any) -> list[JsonObject]:
    """Return the blocks of a content as parts."""
    parts: list[JsonObject] = []
    for place, block in enumerate(_blocks(content)):
        try:
            parts += _input_parts(_kind(block), block)
        except FieldError as exc:
            exc.within(str(place))
            raise
    return parts


def _input_parts(kind: str, block: JsonObject) -> list[JsonObject]:
    """Return a block as parts of a message or of an output.

    Raises:
        FieldError: If there is no place for it.
    """
    read = _INPUT.get(kind)
    return read(block) if read is not None else _said(_words(kind, block))


def _said(text: str) -> list[JsonObject]:
    return [{"type": "input_text", "text": text}] if text else []


def _text(block: JsonObject) -> str:
    value = block.get("text")
    if not isinstance(value, str):
        raise _wrong("text", "a string", value)
    return value


def _text_parts(block: JsonObject) -> list[JsonObject]:
    return _said(_text(block))


def _image_parts(block: JsonObject) -> list[JsonObject]:
    source = _source(block)
    try:
        return [{"type": "input_image", "image_url": _address(source)}]
    except FieldError as exc:
        exc.within("source")
        raise


def _address(source: JsonObject) -> str:
    """Return the address of a picture; one that came with it is in its own address."""
    kind = _source_kind(source)
    if kind == "url":
        return _needed(source, "url")
    if kind != "base64":
        raise _unknown("type", kind)
    data = get_string(source, "data") or get_string(source, "base64")
    if not data:
        raise _missing("data")
    media = _media(source) or next(
        (name for start, name in _PICTURES if data.startswith(start)), "application/octet-stream"
    )
    return f"data:{media};base64,{data}"


# How the base64 of each begins, for a picture that does not say what it is.
_PICTURES = (
    ("iVBORw0KGgo", "image/png"),
    ("/9j/", "image/jpeg"),
    ("R0lGOD", "image/gif"),
    ("UklGR", "image/webp"),
)


def _document_parts(block: JsonObject) -> list[JsonObject]:
    title = get_string(block, "title")
    context = get_string(block, "context")
    source = _source(block)
    about = [f"[context of the document: {context}]"] if context else []
    try:
        return _document(source, title, about)
    except FieldError as exc:
        exc.within("source")
        raise


def _document(source: JsonObject, title: str | None, about: list[str]) -> list[JsonObject]:
    """Return a document as parts.

    Args:
        about: What is said of it before it comes.
    """
    kind = _source_kind(source)
    # The backend names a file behind an address itself.
    named = [f"[document: {title}]", *about] if title else about
    match kind:
        case "base64":
            media = _media(source) or "application/pdf"
            part = {
                "type": "input_file",
                "file_data": f"data:{media};base64,{_needed(source, 'data')}",
                "filename": _filename(title, media),
            }
            return [*_said("\n".join(about)), part]
        case "url":
            return [*_said("\n".join(named)), {"type": "input_file", "file_url": _needed(source, "url")}]
        case "text":
            data = source.get("data")
            if not isinstance(data, str):
                raise _wrong("data", "a string", data)
            return _said("\n".join([*named, data]))
        case "content":
            try:
                return [*_said("\n".join(named)), *_inside(source.get("content"))]
            except FieldError as exc:
                exc.within("content")
                raise
        case _:
            raise _unknown("type", kind)


def _inside(content: Any) -> list[JsonObject]:
    """Return what stands in a document: texts and pictures."""
    parts: list[JsonObject] = []
    for place, block in enumerate(_blocks(content)):
        try:
            kind = _kind(block)
            if kind not in {"text", "image"}:
                raise _unknown("type", kind)
            parts += _input_parts(kind, block)
        except FieldError as exc:
            exc.within(str(place))
            raise
    return parts


def _filename(title: str | None, media: str) -> str:
    if media == "application/pdf":
        # The backend goes by the ending.
        return "document.pdf" if not title else title if title.lower().endswith(".pdf") else f"{title}.pdf"
    return title or "document"


def _source(block: JsonObject) -> JsonObject:
    source = get_object(block, "source")
    if source is None:
        raise _missing("source")
    return source


def _source_kind(source: JsonObject) -> str:
    kind = _needed(source, "type")
    if kind == "file":
        raise FieldError(
            "type", "files are not stored here; send the content itself", code="unsupported_value"
        )
    return kind


def _media(source: JsonObject) -> str | None:
    return get_string(source, "media_type") or get_string(source, "mime_type")


def _search_parts(block: JsonObject) -> list[JsonObject]:
    title = get_string(block, "title")
    source = get_string(block, "source")
    lines = [f"[search result: {title}]" if title else "[search result]", *([source] if source else [])]
    try:
        lines += _texts(block.get("content"))
    except FieldError as exc:
        exc.within("content")
        raise
    return _said("\n".join(lines))


def _texts(content: Any) -> list[str]:
    """Return the texts of a content that may have nothing else."""
    texts: list[str] = []
    for place, block in enumerate(_blocks(content)):
        try:
            kind = _kind(block)
            if kind != "text":
                raise _unknown("type", kind)
            texts.append(_text(block))
        except FieldError as exc:
            exc.within(str(place))
            raise
    return texts


def _reference_parts(block: JsonObject) -> list[JsonObject]:
    return _said(f"[tool loaded: {_needed(block, 'tool_name')}]")


_INPUT: dict[str, Callable[[JsonObject], list[JsonObject]]] = {
    "text": _text_parts,
    "image": _image_parts,
    "document": _document_parts,
    "search_result": _search_parts,
    "tool_reference": _reference_parts,
}


# Blocks that become words: what Anthropic's servers did in earlier turns.

_SILENT = frozenset({"fallback", "mcp_tool_listing", "redacted_thinking", "thinking"})
"""Blocks that no model reads: marks for Anthropic's servers, and what another model thought."""

_LABELLED = frozenset({
    "advisor_tool_result",
    "bash_code_execution_tool_result",
    "browser_state",
    "code_execution_tool_result",
    "mcp_tool_result",
    "text_editor_code_execution_tool_result",
    "tool_search_tool_result",
    "web_fetch_tool_result",
})
"""Blocks whose contents are given as they are, with their type as a label."""


def _words(kind: str, block: JsonObject) -> str:
    """Return what a block says; empty if nothing.

    Raises:
        FieldError: If it is none that can be said in words.
    """
    if kind in _SILENT:
        return ""
    if kind in _LABELLED:
        rest = {
            key: value
            for key, value in block.items()
            if key not in _NO_WORDS and value is not None and value is not False
        }
        content = rest.pop("content", None)
        if rest:
            content = {**rest, "content": content} if content is not None else rest
        return f"[{kind}]\n{_plain_text(content)}"
    match kind:
        case "server_tool_use":
            name = _needed(block, "name")
            given = get_object(block, "input") or {}
            query = given.get("query")
            if name == "web_search" and isinstance(query, str):
                return f"[web search: {query}]"
            return f"[{name}: {_json(given, 'input')}]"
        case "mcp_tool_use":
            name = _needed(block, "name")
            server = get_string(block, "server_name")
            given = get_object(block, "input") or {}
            return f"[{server or 'mcp'}/{name}: {_json(given, 'input')}]"
        case "web_search_tool_result":
            try:
                return _found(block.get("content"))
            except FieldError as exc:
                exc.within("content")
                raise
        case "compaction":
            text = get_string(block, "content")
            return f"[summary of the conversation so far]\n{text}" if text else ""
        case "tool_addition" | "tool_removal":
            tool = get_object(block, "tool") or {}
            called = get_string(tool, "tool_name", "tool.tool_name") or get_string(tool, "name", "tool.name")
            if not called or "definition" in tool:
                raise FieldError("tool", "tools are declared in tools only", code="unsupported_value")
            said = "may be called" if kind == "tool_addition" else "may not be called"
            return f"[from here on the tool {called} {said}]"
        case _:
            raise _unknown("type", kind)


def _found(content: Any) -> str:
    if isinstance(content, dict):
        code = get_string(content, "error_code")
        return f"[web search failed: {code or 'unknown'}]"
    lines = ["[web search results]"]
    for place, result in enumerate(_blocks([] if content is None else content)):
        try:
            _kind(result)
            title, url = get_string(result, "title"), get_string(result, "url")
            age = get_string(result, "page_age")
        except FieldError as exc:
            exc.within(str(place))
            raise
        named = f"{title}: {url}" if title and title != url else url or title or ""
        lines.append(f"- {named} ({age})" if age else f"- {named}")
    return "\n".join(lines)


_NO_WORDS = frozenset({"type", "id", "tool_use_id", "cache_control", "caller"})
_OF_TEXT = frozenset({"type", "text", "citations", "cache_control"})


def _plain_text(content: Any) -> str:
    if isinstance(content, str):
        return content
    if isinstance(content, list) and all(isinstance(one, dict) and one.keys() <= _OF_TEXT for one in content):
        texts: list[str] = []
        for place, one in enumerate(content):
            try:
                texts.append(_text(one))
            except FieldError as exc:
                exc.within(f"content.{place}")
                raise
        return "\n".join(texts)
    return _json(_plain(content, 0), "")


def _plain(value: Any, depth: int) -> Any:
    """Return *value* without what is no text: seals, and files in base64."""
    if depth > MAX_DEPTH:
        raise _too_deep("")
    if isinstance(value, list):
        return [_plain(one, depth + 1) for one in value]
    if not isinstance(value, dict):
        return value
    if value.get("type") == "base64" and isinstance(value.get("data"), str):
        return {**value, "data": f"[{len(value['data'])} characters]"}
    return {key: _plain(one, depth + 1) for key, one in value.items() if not key.startswith("encrypted_")}


# Tools.


def _parameters(*required: str, **properties: JsonObject) -> JsonObject:
    return {"type": "object", "properties": properties, "required": list(required)}


def _one_of(*words: str) -> JsonObject:
    return {"type": "string", "enum": list(words)}


_A_STRING: JsonObject = {"type": "string"}
_AN_INTEGER: JsonObject = {"type": "integer"}
_A_POINT: JsonObject = {"type": "array", "items": _AN_INTEGER, "description": "x and y in pixels"}
_LINES: JsonObject = {
    "type": "array",
    "items": _AN_INTEGER,
    "description": "the first line and the last; -1 is the end",
}

_DEFINED = re.compile(r"(bash|computer|memory|text_editor)_(\d{8})")
"""The tools that Anthropic defines and the caller runs."""


def _defined(kind: str, version: int, tool: JsonObject) -> tuple[str, str, JsonObject]:
    """Return name, description and parameters of a tool whose schema the API itself knows."""
    match kind:
        case "bash":
            return (
                "bash",
                "Run a command in a bash shell that keeps its state from one call to the next. Give the command, "
                "or restart alone to begin with a new shell.",
                _parameters(command=_A_STRING, restart={"type": "boolean"}),
            )
        case "memory":
            return (
                "memory",
                "Keep notes in files below /memories that outlive this conversation. Look there before you "
                "begin, and write down what a later conversation will need.",
                _parameters(
                    "command",
                    command=_one_of("view", "create", "str_replace", "insert", "delete", "rename"),
                    path=_A_STRING,
                    view_range=_LINES,
                    file_text=_A_STRING,
                    old_str=_A_STRING,
                    new_str=_A_STRING,
                    insert_line=_AN_INTEGER,
                    insert_text=_A_STRING,
                    old_path=_A_STRING,
                    new_path=_A_STRING,
                ),
            )
        case "text_editor":
            is_old = version < 20250429
            inserted = "new_str" if is_old else "insert_text"
            commands = ("view", "create", "str_replace", "insert", *(("undo_edit",) if is_old else ()))
            fields: dict[str, JsonObject] = {
                "command": _one_of(*commands),
                "path": {"type": "string", "description": "absolute path of the file or folder"},
                "view_range": _LINES,
                "file_text": {"type": "string", "description": "for create: all of the file"},
                "old_str": {
                    "type": "string",
                    "description": "for str_replace: what stands there exactly once",
                },
                "new_str": {"type": "string", "description": "for str_replace: what comes instead"},
                "insert_line": {
                    "type": "integer",
                    "description": "for insert: after which line; 0 is the start",
                },
            }
            if not is_old:
                fields["insert_text"] = _A_STRING
            return (
                "str_replace_editor" if is_old else "str_replace_based_edit_tool",
                f"View, create and edit text files. insert puts {inserted} after insert_line; str_replace changes "
                "the one place where old_str stands.",
                _parameters("command", "path", **fields),
            )
        case _:
            return "computer", _about_screen(tool), _computer(version, tool)


def _about_screen(tool: JsonObject) -> str:
    width, height = tool.get("display_width_px"), tool.get("display_height_px")
    size = f" of {width} x {height} pixels" if isinstance(width, int) and isinstance(height, int) else ""
    return (
        f"Use the mouse and keyboard of a computer, and see its screen{size}. Take a screenshot to see what "
        "an action has done, and click into the middle of things."
    )


def _computer(version: int, tool: JsonObject) -> JsonObject:
    actions = [
        "key", "type", "mouse_move", "left_click", "left_click_drag", "right_click", "middle_click",
        "double_click", "screenshot", "cursor_position",
    ]  # fmt: skip
    fields: dict[str, JsonObject] = {
        "text": {"type": "string", "description": "what is typed; for key the keys, as in ctrl+s"},
        "coordinate": _A_POINT,
    }
    if version >= 20250124:
        actions += ["left_mouse_down", "left_mouse_up", "triple_click", "scroll", "hold_key", "wait"]
        fields |= {
            "start_coordinate": _A_POINT,
            "scroll_direction": _one_of("up", "down", "left", "right"),
            "scroll_amount": _AN_INTEGER,
            "duration": {"type": "number", "description": "seconds, for hold_key and wait"},
        }
    if version >= 20251124 and tool.get("enable_zoom"):
        actions.append("zoom")
        fields["region"] = {
            "type": "array",
            "items": _AN_INTEGER,
            "description": "for zoom: the corners x1, y1, x2, y2",
        }
    return _parameters("action", action=_one_of(*actions), **fields)


class _Tools:
    """The caller's tools, and the choice among them."""

    def __init__(self, body: JsonObject) -> None:
        self.declared: list[JsonObject] = []
        self.searches: set[str] = set()
        """The names under which a web search at the backend is declared."""
        self._known: set[str] = set()
        self._choice = get_object(body, "tool_choice")
        value = body.get("tools")
        if value is None:
            self.names = ToolNames()
            return
        if not isinstance(value, list):
            raise _wrong("tools", "a list", value)
        for index, tool in enumerate(value):
            try:
                self._add(tool)
            except FieldError as exc:
                exc.within(f"tools.{index}")
                raise
        functions = [tool for tool in self.declared if tool["type"] == "function"]
        self.names = ToolNames(tool["name"] for tool in functions)
        for tool in functions:
            tool["name"] = self.names.sent(tool["name"])

    def _add(self, tool: Any) -> None:
        if not isinstance(tool, dict):
            raise _wrong("", "an object", tool)
        kind = get_string(tool, "type") or "custom"
        if kind == "custom":
            name = _needed(tool, "name")
            if name != PLACEHOLDER:
                description = get_string(tool, "description")
                self._declare(tool, name, description, get_object(tool, "input_schema"))
        elif kind.startswith("web_search_"):
            self._add_search(tool)
        elif (match := _DEFINED.fullmatch(kind)) is not None:
            name, about, parameters = _defined(match[1], int(match[2]), tool)
            self._declare(tool, get_string(tool, "name") or name, about, parameters)
        elif not kind.startswith("tool_search_tool_"):
            # A search for tools is not needed: all of them are sent.
            raise FieldError(
                "type",
                f"tools of the type {quoted(kind)} run at Anthropic's servers only",
                code="unsupported_value",
            )

    def _declare(
        self, tool: JsonObject, name: str, description: str | None, schema: JsonObject | None
    ) -> None:
        strict = tool.get("strict")
        if strict is not None and not isinstance(strict, bool):
            raise _wrong("strict", "a boolean", strict)
        parameters = repair_parameters(schema, path="input_schema", strict=bool(strict))
        if strict and not _is_strict(parameters):
            # The backend would refuse the schema, where Anthropic is less strict.
            strict = False
            parameters = repair_parameters(schema, path="input_schema")
        examples = tool.get("input_examples")
        if isinstance(examples, list) and examples:
            shown = _json(examples, "input_examples")
            description = f"{description or ''}\n\nExamples of its input: {shown}".lstrip()
        function: JsonObject = {"type": "function", "name": name}
        if description:
            function["description"] = description
        function["parameters"] = parameters
        function["strict"] = bool(strict)
        self.declared.append(function)
        self._known.add(name)

    def _add_search(self, tool: JsonObject) -> None:
        search: JsonObject = {"type": "web_search"}
        domains = tool.get("allowed_domains")
        if domains is not None and not (
            isinstance(domains, list) and all(isinstance(one, str) for one in domains)
        ):
            raise _wrong("allowed_domains", "a list of strings", domains)
        if domains:
            search["filters"] = {"allowed_domains": domains}
        where = get_object(tool, "user_location")
        if where is not None:
            search["user_location"] = {"type": "approximate"} | {
                key: value
                for key in ("city", "region", "country", "timezone")
                if (value := get_string(where, key, f"user_location.{key}"))
            }
        self.declared.append(search)
        self.searches.add(get_string(tool, "name") or "web_search")

    def choice(self) -> JsonObject:
        """Return the fields that say how tools are to be called."""
        choice = self._choice
        if choice is None:
            return {}
        single = choice.get("disable_parallel_tool_use")
        path = "tool_choice.disable_parallel_tool_use"
        if single is not None and not isinstance(single, bool):
            raise _wrong(path, "a boolean", single)
        try:
            kind = _needed(choice, "type")
            name = _needed(choice, "name") if kind == "tool" else ""
        except FieldError as exc:
            exc.within("tool_choice")
            raise
        value: str | JsonObject
        match kind:
            case "auto" | "none":
                value = kind
            case "any":
                value = "required"
            case "tool":
                value = self._chosen(name)
            case _:
                raise _unknown("tool_choice.type", kind)
        if not self.declared:
            if kind == "any":
                raise RequestError(
                    "there is no tool to be called", param="tool_choice.type", code="invalid_value"
                )
            return {}
        return {"tool_choice": value, "parallel_tool_calls": not single}

    def _chosen(self, name: str) -> JsonObject:
        if name in self._known:
            return {"type": "function", "name": self.names.sent(name)}
        if name in self.searches:
            return {"type": "web_search"}
        raise RequestError(
            f"tool_choice.name is {quoted(name)}, which is none of the tools",
            param="tool_choice.name",
            code="invalid_value",
        )


# What strict output asks of a schema.

_LOOSE = frozenset({
    "allOf", "contains", "dependentRequired", "dependentSchemas", "else", "if", "not", "oneOf",
    "patternProperties", "prefixItems", "propertyNames", "then", "unevaluatedItems", "unevaluatedProperties",
})  # fmt: skip
_SAYS_WHAT = frozenset({"type", "anyOf", "$ref", "enum", "const"})


def _is_strict(schema: JsonObject) -> bool:
    """Tell whether the backend can hold an output to *schema* exactly.

    It takes only objects that are closed and need all their properties, and not every keyword.
    """
    if schema.get("type") != "object":
        return False
    waiting: list[Any] = [schema]
    while waiting:
        node = waiting.pop()
        if not isinstance(node, dict) or not _LOOSE.isdisjoint(node) or _SAYS_WHAT.isdisjoint(node):
            return False
        properties = node.get("properties")
        kinds = node.get("type")
        if properties is not None or kinds == "object" or (isinstance(kinds, list) and "object" in kinds):
            properties = {} if properties is None else properties
            required = node.get("required", [])
            if (
                not isinstance(properties, dict)
                or node.get("additionalProperties") is not False
                or not isinstance(required, list)
                or any(not isinstance(name, str) for name in required)
                or set(required) != set(properties)
            ):
                return False
            waiting += properties.values()
        for key in ("$defs", "definitions"):
            inner = node.get(key, {})
            if not isinstance(inner, dict):
                return False
            waiting += inner.values()
        if "items" in node:
            waiting.append(node["items"])
        several = node.get("anyOf", [])
        if not isinstance(several, list):
            return False
        waiting += several
    return True


# Reading fields of a body that may hold anything.


def _needed(fields: JsonObject, key: str) -> str:
    value = get_string(fields, key)
    if not value:
        raise _missing(key)
    return value


def _json(value: Any, path: str) -> str:
    try:
        return dumps(value).decode("utf-8")
    except (RecursionError, ValueError) as exc:
        raise _too_deep(path) from exc


def _missing(path: str) -> FieldError:
    # In the API's own words: clients know them.
    return FieldError(path, "Field required", code="missing_required_parameter")


def _unknown(path: str, value: str | None) -> FieldError:
    return FieldError(
        path,
        f"is {quoted(value or '')}, for which there is no place here",
        code="unsupported_value",
        begins=True,
    )


def _too_deep(path: str) -> FieldError:
    return FieldError(path, "is nested too deeply", code="invalid_value", begins=True)


def _wrong(path: str, expected: str, value: Any) -> FieldError:
    if value is None:
        return _missing(path)
    return wrong(path, expected, value)
