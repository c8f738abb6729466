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
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from codex_proxy.errors import RequestError
from codex_proxy.protocol.calls import repair_calls
from codex_proxy.protocol.catalog import BUDGETS, PRIORITY, Catalog
from codex_proxy.protocol.fields import check_stops, get_object, get_string, quoted, wrong
from codex_proxy.protocol.names import ToolNames, is_sealed
from codex_proxy.protocol.request import BackendRequest, model_of, parse_body
from codex_proxy.protocol.responses_request import prepare
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


@dataclass(slots=True, frozen=True)
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
    fields, names = _translate(body)
    thinking = _set_reasoning(fields, body)
    stop = _stops(body.get("stop_sequences"))
    fields |= {
        "model": body["model"],
        "stream": body.get("stream"),
        "max_output_tokens": limit,
        "service_tier": PRIORITY if get_string(body, "speed") == "fast" else get_string(body, "service_tier"),
    }
    # Only what the conversation is known by is read in it.
    get_string(get_object(body, "metadata") or {}, "user_id", "metadata.user_id")
    request = prepare(fields, headers, catalog=catalog, caller=caller, said=body)
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


def _translate(body: JsonObject) -> tuple[JsonObject, ToolNames]:
    """Translate all that the model reads."""
    tools = _Tools(body)
    conversation = _Conversation(tools.names)
    conversation.add_system(body.get("system"))
    conversation.add_all(body.get("messages"))
    fields: JsonObject = {"input": repair_calls(conversation.items, conversation.rounds)}
    if tools.declared:
        fields["tools"] = tools.declared
        if tools.searches:
            fields["include"] = [SOURCES]
    fields |= tools.choice()
    shape = _format(body)
    if shape is not None:
        fields["text"] = {"format": shape}
    return fields, tools.names


# What the caller wants around the conversation.


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


@dataclass(slots=True)
class _Conversation:
    """The items of the backend's input, in the order of the caller's blocks."""

    names: ToolNames
    items: list[JsonObject] = field(default_factory=list)
    rounds: list[int] = field(default_factory=list)
    """For each item the number of the message that it came from."""
    _number: int = -1

    def add_system(self, system: Any) -> None:
        if system is not None:
            self._message("developer", _system_parts(system, "system"))

    def add_all(self, messages: Any) -> None:
        if messages is None:
            raise _missing("messages")
        if not isinstance(messages, list):
            raise _wrong("messages", "a list", messages)
        before = len(self.items)
        last_user = max(
            (n for n, one in enumerate(messages) if isinstance(one, dict) and one.get("role") == "user"),
            default=-1,
        )
        for number, message in enumerate(messages):
            self._number = number
            path = f"messages.{number}"
            if not isinstance(message, dict):
                raise _wrong(path, "an object", message)
            content = message.get("content")
            match message.get("role"):
                case "user":
                    self._add_user(content, f"{path}.content")
                case "assistant":
                    self._add_assistant(content, f"{path}.content")
                case "system":
                    clear = get_string(message, "clear_at", f"{path}.clear_at")
                    parts = _system_parts([] if content is None else content, f"{path}.content")
                    # The caller's own word: from the next user message on it is not to be seen.
                    if clear != "next_user_message" or number > last_user:
                        self._message("developer", parts)
                case role:
                    if not isinstance(role, str):
                        raise _wrong(f"{path}.role", "a string", role)
                    raise _unknown(f"{path}.role", role)
        if len(self.items) == before:
            raise RequestError("at least one message with content is needed", param="messages")

    def _add(self, item: JsonObject) -> None:
        self.items.append(item)
        self.rounds.append(self._number)

    def _message(self, role: str, parts: list[JsonObject]) -> None:
        if parts:
            self._add({"type": "message", "role": role, "content": parts})

    def _add_user(self, content: Any, path: str) -> None:
        parts: list[JsonObject] = []
        for kind, block, where in _blocks(content, path):
            if kind == "tool_result":
                # Before everything else: an output may not be parted from its call.
                self._add(_output(block, where))
            else:
                parts += _input_parts(kind, block, where)
        self._message("user", parts)

    def _add_assistant(self, content: Any, path: str) -> None:
        parts: list[JsonObject] = []
        for kind, block, where in _blocks(content, path):
            match kind:
                case "thinking":
                    thought = _thought(block, where)
                    if thought is not None:
                        self._message("assistant", parts)
                        parts = []
                        self._add(thought)
                case "tool_use":
                    self._message("assistant", parts)
                    parts = []
                    self._add(self._call(block, where))
                case _:
                    text = _text(block, where) if kind == "text" else _words(kind, block, where)
                    if text:
                        parts.append({"type": "output_text", "text": text})
        self._message("assistant", parts)

    def _call(self, block: JsonObject, path: str) -> JsonObject:
        name = _needed(block, "name", path)
        return {
            "type": "function_call",
            "call_id": get_string(block, "id", f"{path}.id") or "",
            "name": self.names.sent(name),
            "arguments": _json(get_object(block, "input", f"{path}.input") or {}, f"{path}.input"),
        }


def _blocks(content: Any, path: str) -> Iterator[tuple[str, JsonObject, str]]:
    """Yield type, block and path of each block; a string is one block of text."""
    if isinstance(content, str):
        yield "text", {"text": content}, path
        return
    if content is None:
        raise _missing(path)
    if not isinstance(content, list):
        raise _wrong(path, "a string or a list", content)
    for index, block in enumerate(content):
        where = f"{path}.{index}"
        if not isinstance(block, dict):
            raise _wrong(where, "an object", block)
        kind = block.get("type")
        if kind is None:
            raise _missing(f"{where}.type")
        if not isinstance(kind, str):
            raise _wrong(f"{where}.type", "a string", kind)
        yield kind, block, where


def _system_parts(content: Any, path: str) -> list[JsonObject]:
    parts: list[JsonObject] = []
    for kind, block, where in _blocks(content, path):
        if kind == "text":
            parts += _said(_without_billing(_text(block, where)))
        else:
            parts += _input_parts(kind, block, where)
    return parts


def _without_billing(text: str) -> str:
    start = 0
    while text.startswith(BILLING, start):
        end = text.find("\n", start)
        if end < 0:
            return ""
        start = end + 1
    return text[start:]


def _thought(block: JsonObject, path: str) -> JsonObject | None:
    """Return the reasoning that a block brings back; None for one of another model's."""
    text = get_string(block, "thinking", f"{path}.thinking")
    seal = get_string(block, "signature", f"{path}.signature")
    if not seal or not is_sealed(seal):
        return None
    summary = [{"type": "summary_text", "text": text}] if text else []
    return {"type": "reasoning", "summary": summary, "encrypted_content": seal}


def _output(block: JsonObject, path: str) -> JsonObject:
    content = block.get("content")
    is_error = block.get("is_error")
    if is_error is not None and not isinstance(is_error, bool):
        raise _wrong(f"{path}.is_error", "a boolean", is_error)
    output: str | list[JsonObject]
    if content is None or isinstance(content, str):
        output = content or ""
        if is_error:
            output = _as_error(output)
    else:
        output = [
            part
            for kind, inner, where in _blocks(content, f"{path}.content")
            for part in _input_parts(kind, inner, where)
        ]
        if is_error:
            _mark_error(output)
        output = output or ""
    return {
        "type": "function_call_output",
        "call_id": get_string(block, "tool_use_id", f"{path}.tool_use_id") or "",
        "output": output,
    }


def _as_error(text: str) -> str:
    return text if text.startswith("Error:") else f"Error: {text}".rstrip(" ")


def _mark_error(parts: list[JsonObject]) -> None:
    for part in parts:
        if part["type"] == "input_text":
            part["text"] = _as_error(part["text"])
            return
    parts.insert(0, {"type": "input_text", "text": "Error:"})


# Blocks that the model is to see.


def _input_parts(kind: str, block: JsonObject, path: str) -> list[JsonObject]:
    """Return a block as parts of a message or of an output.

    Raises:
        RequestError: If there is no place for it.
    """
    read = _INPUT.get(kind)
    return read(block, path) if read is not None else _said(_words(kind, block, path))


def _said(text: str) -> list[JsonObject]:
    return [{"type": "input_text", "text": text}] if text else []


def _text(block: JsonObject, path: str) -> str:
    value = block.get("text")
    if not isinstance(value, str):
        raise _wrong(f"{path}.text", "a string", value)
    return value


def _text_parts(block: JsonObject, path: str) -> list[JsonObject]:
    return _said(_text(block, path))


def _image_parts(block: JsonObject, path: str) -> list[JsonObject]:
    source, kind, where = _source(block, path)
    if kind == "url":
        return [{"type": "input_image", "image_url": _needed(source, "url", where)}]
    if kind != "base64":
        raise _unknown(f"{where}.type", kind)
    data = get_string(source, "data", f"{where}.data") or get_string(source, "base64", f"{where}.base64")
    if not data:
        raise _missing(f"{where}.data")
    media = _media(source, where) or next(
        (name for start, name in _PICTURES if data.startswith(start)), "application/octet-stream"
    )
    return [{"type": "input_image", "image_url": f"data:{media};base64,{data}"}]


# How the base64 of each begins, for a picture that does not say what it is.
_PICTURES = (
    ("iVBORw0KGgo", "image/png"),
    ("/9j/", "image/jpeg"),
    ("R0lGOD", "image/gif"),
    ("UklGR", "image/webp"),
)


def _document_parts(block: JsonObject, path: str) -> list[JsonObject]:
    title = get_string(block, "title", f"{path}.title")
    context = get_string(block, "context", f"{path}.context")
    source, kind, where = _source(block, path)
    about = [f"[context of the document: {context}]"] if context else []
    match kind:
        case "base64":
            media = _media(source, where) or "application/pdf"
            part = {
                "type": "input_file",
                "file_data": f"data:{media};base64,{_needed(source, 'data', where)}",
                "filename": _filename(title, media),
            }
            return [*_said("\n".join(about)), part]
        case "url":
            # The backend names a file behind an address itself.
            named = [f"[document: {title}]", *about] if title else about
            return [
                *_said("\n".join(named)),
                {"type": "input_file", "file_url": _needed(source, "url", where)},
            ]
        case "text":
            data = source.get("data")
            if not isinstance(data, str):
                raise _wrong(f"{where}.data", "a string", data)
            return _said("\n".join([*([f"[document: {title}]"] if title else []), *about, data]))
        case "content":
            named = [f"[document: {title}]", *about] if title else about
            parts = _said("\n".join(named))
            for inner, one, there in _blocks(source.get("content"), f"{where}.content"):
                if inner not in {"text", "image"}:
                    raise _unknown(f"{there}.type", inner)
                parts += _input_parts(inner, one, there)
            return parts
        case _:
            raise _unknown(f"{where}.type", kind)


def _filename(title: str | None, media: str) -> str:
    if media == "application/pdf":
        # The backend goes by the ending.
        return "document.pdf" if not title else title if title.lower().endswith(".pdf") else f"{title}.pdf"
    return title or "document"


def _source(block: JsonObject, path: str) -> tuple[JsonObject, str, str]:
    where = f"{path}.source"
    source = get_object(block, "source", where)
    if source is None:
        raise _missing(where)
    kind = _needed(source, "type", where)
    if kind == "file":
        raise RequestError(
            "files are not stored here; send the content itself",
            param=f"{where}.type",
            code="unsupported_value",
        )
    return source, kind, where


def _media(source: JsonObject, where: str) -> str | None:
    return get_string(source, "media_type", f"{where}.media_type") or get_string(
        source, "mime_type", f"{where}.mime_type"
    )


def _search_parts(block: JsonObject, path: str) -> list[JsonObject]:
    title = get_string(block, "title", f"{path}.title")
    source = get_string(block, "source", f"{path}.source")
    lines = [f"[search result: {title}]" if title else "[search result]", *([source] if source else [])]
    for kind, inner, where in _blocks(block.get("content"), f"{path}.content"):
        if kind != "text":
            raise _unknown(f"{where}.type", kind)
        lines.append(_text(inner, where))
    return _said("\n".join(lines))


def _reference_parts(block: JsonObject, path: str) -> list[JsonObject]:
    return _said(f"[tool loaded: {_needed(block, 'tool_name', path)}]")


_INPUT: dict[str, Callable[[JsonObject, str], list[JsonObject]]] = {
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


def _words(kind: str, block: JsonObject, path: str) -> str:
    """Return what a block says; empty if nothing.

    Raises:
        RequestError: If it is none that can be said in words.
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
        return f"[{kind}]\n{_plain_text(content, path)}"
    match kind:
        case "server_tool_use":
            name = _needed(block, "name", path)
            given = get_object(block, "input", f"{path}.input") or {}
            query = given.get("query")
            if name == "web_search" and isinstance(query, str):
                return f"[web search: {query}]"
            return f"[{name}: {_json(given, f'{path}.input')}]"
        case "mcp_tool_use":
            name = _needed(block, "name", path)
            server = get_string(block, "server_name", f"{path}.server_name")
            given = get_object(block, "input", f"{path}.input") or {}
            return f"[{server or 'mcp'}/{name}: {_json(given, f'{path}.input')}]"
        case "web_search_tool_result":
            return _found(block.get("content"), f"{path}.content")
        case "compaction":
            text = get_string(block, "content", f"{path}.content")
            return f"[summary of the conversation so far]\n{text}" if text else ""
        case "tool_addition" | "tool_removal":
            tool = get_object(block, "tool", f"{path}.tool") or {}
            called = get_string(tool, "tool_name", f"{path}.tool.tool_name") or get_string(
                tool, "name", f"{path}.tool.name"
            )
            if not called or "definition" in tool:
                raise RequestError(
                    "tools are declared in tools only", param=f"{path}.tool", code="unsupported_value"
                )
            said = "may be called" if kind == "tool_addition" else "may not be called"
            return f"[from here on the tool {called} {said}]"
        case _:
            raise _unknown(f"{path}.type", kind)


def _found(content: Any, path: str) -> str:
    if isinstance(content, dict):
        code = get_string(content, "error_code", f"{path}.error_code")
        return f"[web search failed: {code or 'unknown'}]"
    lines = ["[web search results]"]
    for _, result, where in _blocks([] if content is None else content, path):
        title, url = get_string(result, "title", f"{where}.title"), get_string(result, "url", f"{where}.url")
        age = get_string(result, "page_age", f"{where}.page_age")
        named = f"{title}: {url}" if title and title != url else url or title or ""
        lines.append(f"- {named} ({age})" if age else f"- {named}")
    return "\n".join(lines)


_NO_WORDS = frozenset({"type", "id", "tool_use_id", "cache_control", "caller"})
_OF_TEXT = frozenset({"type", "text", "citations", "cache_control"})


def _plain_text(content: Any, path: str) -> str:
    if isinstance(content, str):
        return content
    if isinstance(content, list) and all(isinstance(one, dict) and one.keys() <= _OF_TEXT for one in content):
        return "\n".join(_text(one, f"{path}.content.{index}") for index, one in enumerate(content))
    return _json(_plain(content, path, 0), path)


def _plain(value: Any, path: str, depth: int) -> Any:
    """Return *value* without what is no text: seals, and files in base64."""
    if depth > MAX_DEPTH:
        raise _too_deep(path)
    if isinstance(value, list):
        return [_plain(one, path, depth + 1) for one in value]
    if not isinstance(value, dict):
        return value
    if value.get("type") == "base64" and isinstance(value.get("data"), str):
        return {**value, "data": f"[{len(value['data'])} characters]"}
    return {
        key: _plain(one, path, depth + 1) for key, one in value.items() if not key.startswith("encrypted_")
    }


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
        self._choice = get_object(body, "tool_choice")
        value = body.get("tools")
        if value is not None and not isinstance(value, list):
            raise _wrong("tools", "a list", value)
        self._known: set[str] = set()
        for index, tool in enumerate(value or ()):
            self._add(tool, f"tools.{index}")
        functions = [tool for tool in self.declared if tool["type"] == "function"]
        self.names = ToolNames(tool["name"] for tool in functions)
        for tool in functions:
            tool["name"] = self.names.sent(tool["name"])

    def _add(self, tool: Any, path: str) -> None:
        if not isinstance(tool, dict):
            raise _wrong(path, "an object", tool)
        kind = get_string(tool, "type", f"{path}.type") or "custom"
        if kind == "custom":
            name = _needed(tool, "name", path)
            if name != PLACEHOLDER:
                description = get_string(tool, "description", f"{path}.description")
                schema = get_object(tool, "input_schema", f"{path}.input_schema")
                self._declare(tool, path, name, description, schema)
        elif kind.startswith("web_search_"):
            self._add_search(tool, path)
        elif (match := _DEFINED.fullmatch(kind)) is not None:
            name, about, parameters = _defined(match[1], int(match[2]), tool)
            self._declare(tool, path, get_string(tool, "name", f"{path}.name") or name, about, parameters)
        elif not kind.startswith("tool_search_tool_"):
            # A search for tools is not needed: all of them are sent.
            raise RequestError(
                f"tools of the type {quoted(kind)} run at Anthropic's servers only",
                param=f"{path}.type",
                code="unsupported_value",
            )

    def _declare(
        self, tool: JsonObject, path: str, name: str, description: str | None, schema: JsonObject | None
    ) -> None:
        strict = tool.get("strict")
        if strict is not None and not isinstance(strict, bool):
            raise _wrong(f"{path}.strict", "a boolean", strict)
        where = f"{path}.input_schema"
        parameters = repair_parameters(schema, path=where, strict=bool(strict))
        if strict and not _is_strict(parameters):
            # The backend would refuse the schema, where Anthropic is less strict.
            strict = False
            parameters = repair_parameters(schema, path=where)
        examples = tool.get("input_examples")
        if isinstance(examples, list) and examples:
            shown = _json(examples, f"{path}.input_examples")
            description = f"{description or ''}\n\nExamples of its input: {shown}".lstrip()
        function: JsonObject = {"type": "function", "name": name}
        if description:
            function["description"] = description
        self.declared.append({**function, "parameters": parameters, "strict": bool(strict)})
        self._known.add(name)

    def _add_search(self, tool: JsonObject, path: str) -> None:
        search: JsonObject = {"type": "web_search"}
        domains = tool.get("allowed_domains")
        if domains is not None and not (
            isinstance(domains, list) and all(isinstance(one, str) for one in domains)
        ):
            raise _wrong(f"{path}.allowed_domains", "a list of strings", domains)
        if domains:
            search["filters"] = {"allowed_domains": domains}
        where = get_object(tool, "user_location", f"{path}.user_location")
        if where is not None:
            search["user_location"] = {"type": "approximate"} | {
                key: value
                for key in ("city", "region", "country", "timezone")
                if (value := get_string(where, key, f"{path}.user_location.{key}"))
            }
        self.declared.append(search)
        self.searches.add(get_string(tool, "name", f"{path}.name") or "web_search")

    def choice(self) -> JsonObject:
        """Return the fields that say how tools are to be called."""
        choice = self._choice
        if choice is None:
            return {}
        single = choice.get("disable_parallel_tool_use")
        path = "tool_choice.disable_parallel_tool_use"
        if single is not None and not isinstance(single, bool):
            raise _wrong(path, "a boolean", single)
        kind = _needed(choice, "type", "tool_choice")
        value: str | JsonObject
        match kind:
            case "auto" | "none":
                value = kind
            case "any":
                value = "required"
            case "tool":
                value = self._chosen(_needed(choice, "name", "tool_choice"))
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


def _needed(fields: JsonObject, key: str, path: str) -> str:
    value = get_string(fields, key, f"{path}.{key}")
    if not value:
        raise _missing(f"{path}.{key}")
    return value


def _json(value: Any, path: str) -> str:
    try:
        return dumps(value).decode("utf-8")
    except (RecursionError, ValueError) as exc:
        raise _too_deep(path) from exc


def _missing(path: str) -> RequestError:
    # In the API's own words: clients know them.
    return RequestError("Field required", param=path, code="missing_required_parameter")


def _unknown(path: str, value: str | None) -> RequestError:
    return RequestError(
        f"{path} is {quoted(value or '')}, for which there is no place here",
        param=path,
        code="unsupported_value",
    )


def _too_deep(path: str) -> RequestError:
    return RequestError(f"{path} is nested too deeply", param=path, code="invalid_value")


def _wrong(path: str, expected: str, value: Any) -> RequestError:
    if value is None:
        return _missing(path)
    return wrong(path, expected, value)
