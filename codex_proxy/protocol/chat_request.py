"""The Chat Completions dialect, inwards: a caller's messages and tools become a Responses body.

| in the request                          | what becomes of it                                            |
|-----------------------------------------|---------------------------------------------------------------|
| system, developer message               | a developer's message, where it stands                        |
| text, picture, file, audio of the user  | the part of the same meaning                                  |
| text, refusal of the assistant          | one message; none when there is nothing in it                 |
| `reasoning_details` of the assistant    | its sealed reasoning again, before what it led to             |
| `tool_calls`, `function_call`           | one call each, after the message                              |
| tool, function message                  | the output of its call; a string byte for byte                |
| `tools`, `functions`                    | the flat shape, with names and schemas that the backend takes |
| `stop`, the output limits               | kept here                                                     |
| knobs (`LEFT_OUT`), unknown fields      | left out                                                      |
| a part without a home                   | 400 with its path                                             |

A body without `messages` that has an `input` is a Responses body, and read as one.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from codex_proxy.errors import RequestError
from codex_proxy.protocol.calls import CALLS, repair_calls
from codex_proxy.protocol.catalog import AUTO, Catalog
from codex_proxy.protocol.fields import (
    a_boolean,
    a_list,
    a_string,
    an_object,
    quoted,
    stop_sequences,
    wants_usage,
    wrong,
)
from codex_proxy.protocol.names import ToolNames, is_sealed
from codex_proxy.protocol.request import BackendRequest, model_of, parse_body
from codex_proxy.protocol.responses_request import LEFT_OUT as NOT_SENT
from codex_proxy.protocol.responses_request import LIMITS, prepare
from codex_proxy.protocol.schema import repair_parameters
from codex_proxy.protocol.wire import BadJson, JsonObject, dumps, loads

LEFT_OUT = NOT_SENT | {"audio", "prediction", "store"}
"""Fields of Chat that only tune an answer, or are about storing it: they are left out, whatever they hold.

The same happens to fields that we do not know. Also left out: `name` of a message, and the assistant's
`reasoning_content` and `audio.id` in a history, which the backend has no place for.
"""

_PASSED = (
    "instructions",
    "model",
    "parallel_tool_calls",
    "prompt_cache_key",
    "reasoning_effort",
    "service_tier",
    "stream",
    *LIMITS,
)
"""What means the same in a Responses body; wrong types are refused there, under the same names."""

_READ = frozenset({
    "function_call", "functions", "messages", "modalities", "n", "response_format", "stop", "verbosity",
    "web_search_options",
})  # fmt: skip
"""What only Chat has and is translated; none of it may stand in a Responses body."""

_PLAIN = ("function", "custom")
_DEVELOPERS = ("developer", "system")
_TEXTS = ("text", "input_text", "output_text")
_PICTURES = ("image_url", "input_image")
_FILES = ("file", "input_file")


@dataclass(slots=True, frozen=True)
class Ask:
    """A caller's request, read: what goes upstream, and what its answer needs to know."""

    request: BackendRequest
    names: ToolNames
    customs: frozenset[str] = frozenset()
    """The tools that were declared as Chat declares custom ones: their calls are answered in that shape."""
    uses_functions: bool = False
    """Whether the caller knows `functions` only, and so gets a `function_call`."""
    shows_usage: bool = False
    """Whether a stream ends with the usage."""
    stop: tuple[str, ...] = ()


def read(raw: bytes, headers: Mapping[str, str], *, catalog: Catalog, caller: str = "") -> Ask:
    """Read the body of `POST /v1/chat/completions`; *headers* have lower-case names.

    Raises:
        RequestError: With the path of the field that cannot be served.
    """
    body = parse_body(raw)
    try:
        if body.get("messages") is None and (
            body.get("input") is not None or body.get("instructions") is not None
        ):
            return _read_responses(body, headers, catalog, caller)
        return _read_chat(body, headers, catalog, caller)
    except RecursionError as exc:
        raise RequestError("the body is nested too deeply") from exc


def _read_chat(body: JsonObject, headers: Mapping[str, str], catalog: Catalog, caller: str) -> Ask:
    messages = body.get("messages")
    if messages is None:
        raise RequestError("messages is missing", param="messages", code="missing_required_parameter")
    if not a_list(messages, "messages"):
        raise RequestError("messages is empty", param="messages", code="invalid_value")
    _check_choices(body)
    tools = _Tools(body)
    conversation = _Conversation(tools)
    for index, message in enumerate(messages):
        conversation.add(index, an_object(message, f"messages.{index}"))

    fields = {key: body[key] for key in _PASSED if key in body}
    fields["input"] = repair_calls(conversation.items, conversation.rounds)
    if tools.declared:
        fields["tools"] = tools.declared
    choice = tools.choice(body)
    if choice is not None:
        fields["tool_choice"] = choice
    if tools.uses_functions:
        # That shape holds one call.
        fields["parallel_tool_calls"] = False
    if reasoning := _reasoning(body, catalog):
        fields["reasoning"] = reasoning
    if text := _text_options(body):
        fields["text"] = text
    return Ask(
        request=prepare(fields, headers, catalog=catalog, caller=caller, said=body),
        names=tools.names,
        customs=tools.customs,
        uses_functions=tools.uses_functions,
        shows_usage=wants_usage(body),
        stop=stop_sequences(body.get("stop")),
    )


def _read_responses(body: JsonObject, headers: Mapping[str, str], catalog: Catalog, caller: str) -> Ask:
    """Read a Responses body; what of Chat stands in it beside counts too."""
    _check_choices(body)
    fields = {key: value for key, value in body.items() if key not in _READ and key not in LEFT_OUT}
    if text := _text_options(body):
        fields["text"] = {**(body.get("text") or {}), **text}
    return Ask(
        request=prepare(fields, headers, catalog=catalog, caller=caller, said=body),
        names=ToolNames(),
        shows_usage=wants_usage(body),
        stop=stop_sequences(body.get("stop")),
    )


# The options -----------------------------------------------------------------------------------


def _check_choices(body: JsonObject) -> None:
    """Refuse what asks for more than one answer of text."""
    number = body.get("n")
    if number is not None:
        if not isinstance(number, int) or isinstance(number, bool):
            raise wrong("n", "an integer", number)
        if number != 1:
            raise RequestError(
                "one request has one answer here; n must be 1", param="n", code="invalid_value"
            )
    modalities = body.get("modalities")
    if modalities is not None and "audio" in a_list(modalities, "modalities"):
        raise RequestError("no answer is spoken here", param="modalities", code="unsupported_value")


def _reasoning(body: JsonObject, catalog: Catalog) -> JsonObject:
    """Return the options of reasoning; whoever asks for an effort wants to see something of it."""
    given = body.get("reasoning")
    given = an_object(given, "reasoning") if given is not None else {}
    reasoning = {
        key: a_string(given[key], f"reasoning.{key}")
        for key in ("effort", "summary", "context", "mode")
        if given.get(key) is not None
    }
    effort = catalog.resolve(model_of(body)).effort or reasoning.get("effort") or body.get("reasoning_effort")
    asked = isinstance(effort, str) and effort.lower() not in ("", "none", AUTO)
    if asked and "summary" not in given:
        reasoning["summary"] = "auto"
    return reasoning


def _text_options(body: JsonObject) -> JsonObject:
    """Return how the text shall be: Chat's names for it, else the Responses ones."""
    given = body.get("text")
    given = an_object(given, "text") if given is not None else {}
    text: JsonObject = {}
    for value, path in ((given.get("verbosity"), "text.verbosity"), (body.get("verbosity"), "verbosity")):
        if value is not None:
            text["verbosity"] = a_string(value, path)
    for value, path in (
        (given.get("format"), "text.format"),
        (body.get("response_format"), "response_format"),
    ):
        if value is not None:
            text["format"] = _format(an_object(value, path), path)
    return text


def _format(given: JsonObject, path: str) -> JsonObject:
    kind = a_string(given.get("type"), f"{path}.type")
    if kind in ("text", "json_object"):
        return {"type": kind}
    if kind != "json_schema":
        raise RequestError(f"unknown format {quoted(kind)}", param=f"{path}.type", code="unsupported_value")
    source = given
    if given.get("json_schema") is not None:
        path = f"{path}.json_schema"
        source = an_object(given["json_schema"], path)
    schema = source.get("schema")
    made: JsonObject = {"type": kind, "name": _name(source.get("name"), f"{path}.name")}
    if source.get("description") is not None:
        made["description"] = a_string(source["description"], f"{path}.description")
    if source.get("strict") is not None:
        made["strict"] = a_boolean(source["strict"], f"{path}.strict")
    made["schema"] = an_object(schema, f"{path}.schema") if schema is not None else {}
    return made


# Tools -----------------------------------------------------------------------------------------


class _Tools:
    """The tools of one request, as they go upstream, and how the caller's names become the backend's."""

    def __init__(self, body: JsonObject) -> None:
        given = a_list(body["tools"], "tools") if body.get("tools") is not None else []
        legacy = a_list(body["functions"], "functions") if body.get("functions") is not None else []
        self.uses_functions = bool(legacy) and not given
        customs: set[str] = set()
        tools: list[JsonObject] = []
        for index, one in enumerate(given):
            path = f"tools.{index}"
            tool = an_object(one, path)
            kind = _kind(tool, path)
            if kind == "function":
                tools.append(_function(*_inside(tool, kind, path)))
            elif kind == "custom":
                made = _custom(*_inside(tool, kind, path))
                tools.append(made)
                if tool.get(kind) is not None:
                    customs.add(made["name"])
            else:
                tools.append(tool)
        for index, one in enumerate(legacy):
            path = f"functions.{index}"
            tools.append(_function(an_object(one, path), path))
        functions = {tool["name"] for tool in tools if tool["type"] == "function"}
        # A call could not say which of two it means: the function stands.
        tools = [tool for tool in tools if tool["type"] != "custom" or tool["name"] not in functions]
        self._customs = {tool["name"] for tool in tools if tool["type"] == "custom"}
        self._functions = functions
        self.customs = frozenset(customs & self._customs)
        self.names = ToolNames(tool["name"] for tool in tools if tool["type"] in _PLAIN)
        for tool in tools:
            if tool["type"] in _PLAIN:
                tool["name"] = self.names.sent(tool["name"])
        if (search := _web_search(body)) is not None and not any(
            tool["type"].startswith("web_search") for tool in tools
        ):
            tools.append(search)
        self.declared = tools

    def family(self, name: str, said: str) -> str:
        """Return what the tool *name* is: as it was declared, else as the caller says here."""
        if name in self._functions:
            return "function"
        return "custom" if name in self._customs else said

    def choice(self, body: JsonObject) -> Any:
        """Return the choice of tools as the backend takes it; None leaves it out."""
        given, path = body.get("tool_choice"), "tool_choice"
        if given is None and body.get("function_call") is not None:
            given, path = body["function_call"], "function_call"
            if isinstance(given, dict):
                given = {**given, "type": "function"}
        if given is None:
            return None
        if isinstance(given, str):
            # Without tools it says nothing.
            return given if self.declared or given not in ("auto", "none") else None
        if not isinstance(given, dict):
            raise wrong(path, "a string or an object", given)
        if given.get("type") != "allowed_tools":
            return self._chosen(given, path)
        source, path = _inside(given, "allowed_tools", path)
        tools = [
            self._chosen(an_object(tool, f"{path}.tools.{index}"), f"{path}.tools.{index}")
            for index, tool in enumerate(a_list(source.get("tools"), f"{path}.tools"))
        ]
        return {"type": "allowed_tools", "mode": a_string(source.get("mode"), f"{path}.mode"), "tools": tools}

    def _chosen(self, tool: JsonObject, path: str) -> JsonObject:
        kind = _kind(tool, path)
        if kind not in _PLAIN:
            return tool
        source, path = _inside(tool, kind, path)
        name = _name(source.get("name"), f"{path}.name")
        return {"type": self.family(name, kind), "name": self.names.sent(name)}


def _function(source: JsonObject, path: str) -> JsonObject:
    tool: JsonObject = {"type": "function", "name": _name(source.get("name"), f"{path}.name")}
    if source.get("description") is not None:
        tool["description"] = a_string(source["description"], f"{path}.description")
    parameters = source.get("parameters")
    if parameters is not None:
        an_object(parameters, f"{path}.parameters")
    # Absent means false in Chat, and true in Responses.
    strict = source.get("strict") is not None and a_boolean(source["strict"], f"{path}.strict")
    tool["parameters"] = repair_parameters(parameters, path=f"{path}.parameters", strict=strict)
    tool["strict"] = strict
    return tool


def _custom(source: JsonObject, path: str) -> JsonObject:
    tool: JsonObject = {"type": "custom", "name": _name(source.get("name"), f"{path}.name")}
    if source.get("description") is not None:
        tool["description"] = a_string(source["description"], f"{path}.description")
    if source.get("format") is not None:
        given = an_object(source["format"], f"{path}.format")
        grammar = given.get("grammar")
        if grammar is not None:
            inner = {key: value for key, value in given.items() if key != "grammar"}
            given = {**inner, **an_object(grammar, f"{path}.format.grammar")}
        tool["format"] = given
    return tool


def _web_search(body: JsonObject) -> JsonObject | None:
    given = body.get("web_search_options")
    if given is None:
        return None
    path = "web_search_options"
    options = an_object(given, path)
    tool: JsonObject = {"type": "web_search"}
    if options.get("search_context_size") is not None:
        tool["search_context_size"] = a_string(options["search_context_size"], f"{path}.search_context_size")
    if options.get("user_location") is not None:
        location = an_object(options["user_location"], f"{path}.user_location")
        inner = location.get("approximate")
        if inner is not None:
            location = an_object(inner, f"{path}.user_location.approximate")
        tool["user_location"] = {**location, "type": "approximate"}
    return tool


# Messages --------------------------------------------------------------------------------------


class _Conversation:
    """The messages so far, as items of a Responses input."""

    def __init__(self, tools: _Tools) -> None:
        self.items: list[JsonObject] = []
        self.rounds: list[int] = []
        """For each item, the number of the message that it came from."""
        self._tools = tools

    def add(self, index: int, message: JsonObject) -> None:
        """Translate one message."""
        path = f"messages.{index}"
        role = a_string(message.get("role"), f"{path}.role")
        if role in _DEVELOPERS:
            parts = [part for part in _parts(message, path, _DEVELOPER_PARTS) if part["text"]]
            items = _message("developer", parts) if parts else []
        elif role == "user":
            items = _message("user", _parts(message, path, _USER_PARTS))
        elif role == "assistant":
            items = self._assistant(message, path)
        elif role in ("tool", "function"):
            items = [_output(message, path)]
        else:
            raise RequestError(f"unknown role {quoted(role)}", param=f"{path}.role", code="invalid_value")
        self.items += items
        self.rounds += [index] * len(items)

    def _assistant(self, message: JsonObject, path: str) -> list[JsonObject]:
        content = list(_assistant_parts(message, path))
        calls = [self._call(call, where) for call, where in _calls(message, path)]
        items = _message("assistant", content) if content else []
        items += _message("user", pictures) if (pictures := _own_pictures(message, path)) else []
        items += calls
        # A thought is kept for what it led to.
        return [*_thoughts(message, path), *items] if items else []

    def _call(self, call: JsonObject, path: str) -> JsonObject:
        kind = _kind(call, path)
        if kind not in _PLAIN:
            raise RequestError(
                f"unknown type of call {quoted(kind)}", param=f"{path}.type", code="invalid_value"
            )
        source, inner = _inside(call, kind, path)
        name = _name(source.get("name"), f"{inner}.name")
        key = "arguments" if kind == "function" else "input"
        text = source.get(key)
        if isinstance(text, dict | list):
            text = _json(text)
        text = a_string(text, f"{inner}.{key}") if text is not None else ""
        item: JsonObject = {"type": "function_call", "name": self._tools.names.sent(name)}
        if call.get("id") is not None:
            item["call_id"] = a_string(call["id"], f"{path}.id")
        if self._tools.family(name, kind) == "custom":
            # Also one that we showed as a function.
            return {**item, "type": "custom_tool_call", "input": text}
        return {**item, "arguments": text or "{}"}


def _message(role: str, content: list[JsonObject]) -> list[JsonObject]:
    return [{"type": "message", "role": role, "content": content}]


def _calls(message: JsonObject, path: str) -> Iterator[tuple[JsonObject, str]]:
    """Yield the calls of an assistant's message with their paths, the older form first."""
    if message.get("function_call") is not None:
        where = f"{path}.function_call"
        yield {**an_object(message["function_call"], where), "type": "function", "id": None}, where
    if message.get("tool_calls") is not None:
        for index, call in enumerate(a_list(message["tool_calls"], f"{path}.tool_calls")):
            where = f"{path}.tool_calls.{index}"
            yield an_object(call, where), where


def _assistant_parts(message: JsonObject, path: str) -> Iterator[JsonObject]:
    said = False
    for part in _parts(message, path, _ASSISTANT_PARTS) if message.get("content") is not None else ():
        if part.get("text") or part.get("refusal"):
            said = True
            yield part
    refusal = message.get("refusal")
    if refusal is not None and a_string(refusal, f"{path}.refusal"):
        said = True
        yield {"type": "refusal", "refusal": refusal}
    audio = message.get("audio")
    transcript = audio.get("transcript") if isinstance(audio, dict) else None
    if not said and isinstance(transcript, str) and transcript:
        yield {"type": "output_text", "text": transcript}


def _own_pictures(message: JsonObject, path: str) -> list[JsonObject]:
    """Return what an earlier answer painted; pictures have a place in a user's message only."""
    given = message.get("images")
    pictures = [
        _picture(an_object(one, f"{path}.images.{index}"), f"{path}.images.{index}")
        for index, one in enumerate(a_list(given, f"{path}.images") if given is not None else ())
    ]
    return [{"type": "input_text", "text": "[generated by the assistant]"}, *pictures] if pictures else []


def _thoughts(message: JsonObject, path: str) -> list[JsonObject]:
    """Return the reasoning that the caller kept for us, as far as the backend can read it."""
    given = message.get("reasoning_details")
    thoughts: list[JsonObject] = []
    summary: list[JsonObject] = []
    for index, one in enumerate(a_list(given, f"{path}.reasoning_details") if given is not None else ()):
        detail = an_object(one, f"{path}.reasoning_details.{index}")
        kind, data, text = detail.get("type"), detail.get("data"), detail.get("summary")
        if kind == "reasoning.encrypted" and isinstance(data, str) and is_sealed(data):
            thoughts.append({"type": "reasoning", "summary": summary, "encrypted_content": data})
            summary = []
        elif kind == "reasoning.summary" and isinstance(text, str) and text:
            summary.append({"type": "summary_text", "text": text})
    return thoughts


def _output(message: JsonObject, path: str) -> JsonObject:
    output: Any = message.get("content", "")
    if isinstance(output, str):
        output = _seen(output) or output
    elif isinstance(output, list):
        output = [_output_part(part) for part in output] or ""
    elif output is None or isinstance(output, dict):
        output = _json(output)
    else:
        raise wrong(f"{path}.content", "a string or a list", output)
    item: JsonObject = {"type": CALLS["function_call"], "output": output}
    if message.get("tool_call_id") is not None:
        item["call_id"] = a_string(message["tool_call_id"], f"{path}.tool_call_id")
    return item


def _seen(text: str) -> list[JsonObject] | None:
    """Return the parts of an output that a tool wrote as JSON because it has a picture; else None."""
    if text.lstrip()[:1] != "[" or not any(f'"{kind}"' in text for kind in _PICTURES):
        return None
    try:
        parts = loads(text)
        if any(isinstance(part, dict) and _is_picture(part) for part in parts):
            return [_output_part(part) for part in parts]
    except (BadJson, RecursionError):
        pass
    return None


def _is_picture(part: JsonObject) -> bool:
    return part.get("type") in _PICTURES and _output_part(part)["type"] == "input_image"


def _output_part(part: Any) -> JsonObject:
    """Return a part of a tool's output; one that cannot be translated is shown to the model as it is."""
    try:
        if isinstance(part, dict) and isinstance(part.get("type"), str):
            reader = _OUTPUT_PARTS.get(part["type"])
            if reader is not None:
                return reader(part, "")
    except RequestError:
        pass
    return {"type": "input_text", "text": _json(part)}


# Parts -----------------------------------------------------------------------------------------

_Reader = Callable[[JsonObject, str], JsonObject]


def _parts(message: JsonObject, path: str, readers: Mapping[str, _Reader]) -> list[JsonObject]:
    """Return the content of a message, part by part."""
    content, path = message.get("content"), f"{path}.content"
    if isinstance(content, str):
        return [readers["text"]({"text": content}, path)]
    if not isinstance(content, list):
        raise wrong(path, "a string or a list", content)
    if not content and readers is not _ASSISTANT_PARTS:
        raise RequestError(f"{path} is empty", param=path, code="invalid_value")
    made: list[JsonObject] = []
    for index, one in enumerate(content):
        where = f"{path}.{index}"
        part = an_object(one, where)
        kind = a_string(part.get("type"), f"{where}.type")
        reader = readers.get(kind)
        if reader is None:
            why = (
                f"a part of type {quoted(kind)} may stand in a user's message only"
                if kind in _USER_PARTS
                else f"unknown type of content {quoted(kind)}"
            )
            raise RequestError(why, param=f"{where}.type", code="invalid_value")
        made.append(reader(part, where))
    return made


def _input_text(part: JsonObject, path: str) -> JsonObject:
    return {"type": "input_text", "text": a_string(part.get("text"), f"{path}.text")}


def _output_text(part: JsonObject, path: str) -> JsonObject:
    return {"type": "output_text", "text": a_string(part.get("text"), f"{path}.text")}


def _refusal(part: JsonObject, path: str) -> JsonObject:
    return {"type": "refusal", "refusal": a_string(part.get("refusal"), f"{path}.refusal")}


def _refusal_as_text(part: JsonObject, path: str) -> JsonObject:
    return {"type": "input_text", "text": a_string(part.get("refusal"), f"{path}.refusal")}


def _picture(part: JsonObject, path: str) -> JsonObject:
    """Return a picture; Chat puts its address into an object, Responses and many callers do not."""
    source, path = (
        (part["image_url"], f"{path}.image_url") if isinstance(part.get("image_url"), dict) else (part, path)
    )
    made: JsonObject = {"type": "input_image"}
    for key, name in (("url", "image_url"), ("image_url", "image_url"), ("file_id", "file_id")):
        if source.get(key) not in (None, ""):
            made[name] = a_string(source[key], f"{path}.{key}")
    if len(made) == 1:
        raise RequestError("the picture has no address", param=path, code="missing_required_parameter")
    detail = source.get("detail", part.get("detail"))
    if detail is not None:
        made["detail"] = a_string(detail, f"{path}.detail")
    return made


def _file(part: JsonObject, path: str) -> JsonObject:
    source = part
    if part.get("file") is not None:
        path = f"{path}.file"
        source = an_object(part["file"], path)
    made: JsonObject = {"type": "input_file"}
    for key in ("file_id", "file_data", "file_url"):
        if source.get(key) not in (None, ""):
            made[key] = a_string(source[key], f"{path}.{key}")
    if len(made) == 1:
        raise RequestError(
            "the file has neither data nor id nor url", param=path, code="missing_required_parameter"
        )
    if source.get("filename") is not None:
        made["filename"] = a_string(source["filename"], f"{path}.filename")
    return made


def _audio(part: JsonObject, path: str) -> JsonObject:
    path = f"{path}.input_audio"
    source = an_object(part.get("input_audio"), path)
    return {
        "type": "input_audio",
        "input_audio": {key: a_string(source.get(key), f"{path}.{key}") for key in ("data", "format")},
    }


_DEVELOPER_PARTS: dict[str, _Reader] = dict.fromkeys(_TEXTS, _input_text)
_ASSISTANT_PARTS: dict[str, _Reader] = {**dict.fromkeys(_TEXTS, _output_text), "refusal": _refusal}
_OUTPUT_PARTS: dict[str, _Reader] = {
    **dict.fromkeys(_TEXTS, _input_text),
    **dict.fromkeys(_PICTURES, _picture),
    **dict.fromkeys(_FILES, _file),
}
_USER_PARTS: dict[str, _Reader] = {**_OUTPUT_PARTS, "input_audio": _audio, "refusal": _refusal_as_text}


# Reading values that may be anything -------------------------------------------------------------


def _kind(value: JsonObject, path: str) -> str:
    """Return the type of a tool or a call; one that only holds a function says so by that."""
    if value.get("type") is None and isinstance(value.get("function"), dict):
        return "function"
    return a_string(value.get("type"), f"{path}.type")


def _inside(value: JsonObject, key: str, path: str) -> tuple[JsonObject, str]:
    """Return what Chat nests under *key*, and its path; the flat shape of Responses stands for itself."""
    inner = value.get(key)
    if inner is None:
        return value, path
    return an_object(inner, f"{path}.{key}"), f"{path}.{key}"


def _json(value: Any) -> str:
    return dumps(value).decode()


def _name(value: Any, path: str) -> str:
    if not a_string(value, path):
        raise RequestError(f"{path} is empty", param=path, code="invalid_value")
    return str(value)
