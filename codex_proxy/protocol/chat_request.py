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

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from codex_proxy.errors import RequestError
from codex_proxy.protocol.calls import CALLS, repair_calls
from codex_proxy.protocol.catalog import AUTO, Catalog
from codex_proxy.protocol.fields import (
    FieldError,
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
from codex_proxy.protocol.responses_request import LIMITS, Survey, prepare
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

_OF_TEXT = frozenset({"text", "verbosity", "response_format"})
"""How the text of the answer shall be."""

_BESIDE = frozenset({"function_call", "refusal", "audio", "images", "reasoning_details"})
"""What an assistant's message may have beside words and calls."""

_PLAIN = ("function", "custom")
_TEXTS = ("text", "input_text", "output_text")
_PICTURES = ("image_url", "input_image")
_FILES = ("file", "input_file")


@dataclass(slots=True)
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
    survey = Survey()
    conversation = _Conversation(tools, survey)
    conversation.add_all(messages)

    fields = {key: body[key] for key in _PASSED if key in body}
    fields["input"] = repair_calls(conversation.items, conversation.ends)
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
        request=prepare(fields, headers, catalog=catalog, caller=caller, said=body, survey=survey),
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
    reasoning: JsonObject = {}
    if given is not None:
        an_object(given, "reasoning")
        for key in ("effort", "summary", "context", "mode"):
            if given.get(key) is not None:
                reasoning[key] = a_string(given[key], f"reasoning.{key}")
    effort = catalog.resolve(model_of(body)).effort or reasoning.get("effort") or body.get("reasoning_effort")
    asked = isinstance(effort, str) and effort.lower() not in ("", "none", AUTO)
    if asked and (given is None or "summary" not in given):
        reasoning["summary"] = "auto"
    return reasoning


def _text_options(body: JsonObject) -> JsonObject:
    """Return how the text shall be: Chat's names for it, else the Responses ones."""
    text: JsonObject = {}
    if _OF_TEXT.isdisjoint(body):
        return text
    given = body.get("text")
    given = an_object(given, "text") if given is not None else {}
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
    try:
        kind = a_string(given.get("type"), "type")
        if kind in ("text", "json_object"):
            return {"type": kind}
        if kind != "json_schema":
            raise FieldError("type", f"unknown format {quoted(kind)}", code="unsupported_value")
        source = _inside(given, kind)
        try:
            return _schema(kind, source)
        except FieldError as exc:
            if source is not given:
                exc.within(kind)
            raise
    except FieldError as exc:
        exc.within(path)
        raise


def _schema(kind: str, source: JsonObject) -> JsonObject:
    made: JsonObject = {"type": kind, "name": _name(source)}
    if source.get("description") is not None:
        made["description"] = a_string(source["description"], "description")
    if source.get("strict") is not None:
        made["strict"] = a_boolean(source["strict"], "strict")
    schema = source.get("schema")
    made["schema"] = an_object(schema, "schema") if schema is not None else {}
    return made


# Tools -----------------------------------------------------------------------------------------


_NONE: frozenset[str] = frozenset()


class _Tools:
    """The tools of one request, as they go upstream, and how the caller's names become the backend's."""

    def __init__(self, body: JsonObject) -> None:
        self.declared: list[JsonObject] = []
        self.customs = self._customs = self._functions = _NONE
        self.uses_functions = False
        given, legacy = body.get("tools"), body.get("functions")
        if given is None and legacy is None:
            self.names = ToolNames()
        else:
            self._declare(
                a_list(given, "tools") if given is not None else [],
                a_list(legacy, "functions") if legacy is not None else [],
            )
        if (search := _web_search(body)) is not None and not any(
            tool["type"].startswith("web_search") for tool in self.declared
        ):
            self.declared.append(search)

    def _declare(self, given: list[Any], legacy: list[Any]) -> None:
        self.uses_functions = bool(legacy) and not given
        tools = self.declared
        functions: set[str] = set()
        customs: set[str] = set()
        nested: set[str] = set()
        try:
            for one in given:
                tool = _tool(an_object(one, ""))
                tools.append(tool)
                if tool["type"] == "function":
                    functions.add(tool["name"])
                elif tool["type"] == "custom":
                    customs.add(tool["name"])
                    if one.get("custom") is not None:
                        nested.add(tool["name"])
            for one in legacy:
                tool = _function(an_object(one, ""))
                tools.append(tool)
                functions.add(tool["name"])
        except FieldError as exc:
            position = len(tools)
            is_older = position >= len(given)
            exc.within(f"functions.{position - len(given)}" if is_older else f"tools.{position}")
            raise
        if not functions.isdisjoint(customs):
            # A call could not say which of two it means: the function stands.
            tools[:] = [tool for tool in tools if tool["type"] != "custom" or tool["name"] not in functions]
            customs -= functions
        self._functions, self._customs = frozenset(functions), frozenset(customs)
        self.customs = frozenset(nested & customs)
        plain = [tool for tool in tools if tool["type"] in _PLAIN]
        self.names = ToolNames(tool["name"] for tool in plain)
        for tool in plain:
            tool["name"] = self.names.sent(tool["name"])

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
        try:
            return self._chosen(given) if given.get("type") != "allowed_tools" else self._allowed(given)
        except FieldError as exc:
            exc.within(path)
            raise

    def _allowed(self, given: JsonObject) -> JsonObject:
        source = _inside(given, "allowed_tools")
        tools: list[JsonObject] = []
        where = ""
        try:
            for index, tool in enumerate(a_list(source.get("tools"), "tools")):
                where = f"tools.{index}"
                tools.append(self._chosen(an_object(tool, "")))
            where = ""
            return {"type": "allowed_tools", "mode": a_string(source.get("mode"), "mode"), "tools": tools}
        except FieldError as exc:
            if where:
                exc.within(where)
            if source is not given:
                exc.within("allowed_tools")
            raise

    def _chosen(self, tool: JsonObject) -> JsonObject:
        kind = _kind(tool)
        if kind not in _PLAIN:
            return tool
        source = _inside(tool, kind)
        try:
            name = _name(source)
        except FieldError as exc:
            if source is not tool:
                exc.within(kind)
            raise
        return {"type": self.family(name, kind), "name": self.names.sent(name)}


def _tool(tool: JsonObject) -> JsonObject:
    kind = _kind(tool)
    if kind not in _PLAIN:
        return tool
    source = _inside(tool, kind)
    try:
        return _function(source) if kind == "function" else _custom(source)
    except FieldError as exc:
        if source is not tool:
            exc.within(kind)
        raise


def _function(source: JsonObject) -> JsonObject:
    tool: JsonObject = {"type": "function", "name": _name(source)}
    description = source.get("description")
    if description is not None:
        tool["description"] = a_string(description, "description")
    parameters = source.get("parameters")
    if parameters is not None:
        an_object(parameters, "parameters")
    # Absent means false in Chat, and true in Responses.
    strict = source.get("strict")
    strict = strict is not None and a_boolean(strict, "strict")
    tool["parameters"] = repair_parameters(parameters, strict=strict)
    tool["strict"] = strict
    return tool


def _custom(source: JsonObject) -> JsonObject:
    tool: JsonObject = {"type": "custom", "name": _name(source)}
    if source.get("description") is not None:
        tool["description"] = a_string(source["description"], "description")
    if source.get("format") is not None:
        given = an_object(source["format"], "format")
        grammar = given.get("grammar")
        if grammar is not None:
            inner = {key: value for key, value in given.items() if key != "grammar"}
            given = {**inner, **an_object(grammar, "format.grammar")}
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

    def __init__(self, tools: _Tools, survey: Survey) -> None:
        self.items: list[JsonObject] = []
        self.ends: list[int] = []
        """For each message, how many items there are up to its end."""
        self._tools = tools
        self._survey = survey

    def add_all(self, messages: list[Any]) -> None:
        """Translate the messages, each as what its role makes it."""
        for index, message in enumerate(messages):
            try:
                if not isinstance(message, dict):
                    raise wrong("", "an object", message)
                self._add(message)
                self.ends.append(len(self.items))
            except FieldError as exc:
                exc.within(f"messages.{index}")
                raise

    def _add(self, message: JsonObject) -> None:
        role, content = message.get("role"), message.get("content")
        if role == "assistant":
            self._add_assistant(message, content)
        elif role == "tool" or role == "function":
            item = _output(message)
            if isinstance(item["output"], list):
                self._weigh(item["output"])
            self.items.append(item)
        elif role == "user":
            if isinstance(content, str):
                parts = [{"type": "input_text", "text": content}]
            else:
                parts = _parts(content, _USER_PARTS)
                self._weigh(parts)
            self.items.append(_message(role, parts))
        elif role == "system" or role == "developer":
            if isinstance(content, str):
                parts = [{"type": "input_text", "text": content}] if content else []
            else:
                parts = [part for part in _parts(content, _DEVELOPER_PARTS) if part["text"]]
            if parts:
                self.items.append(_message("developer", parts))
        else:
            unknown = quoted(a_string(role, "role"))
            raise FieldError("role", f"unknown role {unknown}", code="invalid_value")

    def _weigh(self, parts: list[JsonObject]) -> None:
        for part in parts:
            if part["type"] != "input_text":
                self._survey.add_part(part)

    def _add_assistant(self, message: JsonObject, content: Any) -> None:
        if _BESIDE.isdisjoint(message) and (content is None or isinstance(content, str)):
            # Words and calls, as nearly always.
            parts = [{"type": "output_text", "text": content}] if content else []
            pictures: list[JsonObject] = []
            calls = self._calls(message)
        else:
            parts = _assistant_parts(message)
            calls = self._calls(message)
            pictures = _own_pictures(message)
            if parts or pictures or calls:
                # A thought is kept for what it led to.
                for thought in _thoughts(message):
                    self._survey.add(thought, "reasoning")
                    self.items.append(thought)
        if parts:
            self.items.append(_message("assistant", parts))
        if pictures:
            self._weigh(pictures)
            self.items.append(_message("user", pictures))
        self.items += calls

    def _calls(self, message: JsonObject) -> list[JsonObject]:
        """Return the calls of an assistant's message, the older form first."""
        calls: list[JsonObject] = []
        older, given = message.get("function_call"), message.get("tool_calls")
        if older is not None:
            try:
                calls.append(self._call({**an_object(older, ""), "type": "function", "id": None}))
            except FieldError as exc:
                exc.within("function_call")
                raise
        if given is None:
            return calls
        for index, call in enumerate(a_list(given, "tool_calls")):
            try:
                calls.append(self._call(call))
            except FieldError as exc:
                exc.within(f"tool_calls.{index}")
                raise
        return calls

    def _call(self, call: Any) -> JsonObject:
        kind = _kind(an_object(call, ""))
        if kind not in _PLAIN:
            raise FieldError("type", f"unknown type of call {quoted(kind)}", code="invalid_value")
        source = _inside(call, kind)
        key = "arguments" if kind == "function" else "input"
        name, text = source.get("name"), source.get(key)
        if not isinstance(name, str) or not name or not isinstance(text, str):
            try:
                name = _name(source)
                if isinstance(text, dict | list):
                    text = _json(text)
                text = a_string(text, key) if text is not None else ""
            except FieldError as exc:
                if source is not call:
                    exc.within(kind)
                raise
        item: JsonObject = {"type": "function_call", "name": self._tools.names.sent(name)}
        identity = call.get("id")
        if isinstance(identity, str):
            item["call_id"] = identity
        elif identity is not None:
            raise wrong("id", "a string", identity)
        if self._tools.family(name, kind) == "custom":
            # Also one that we showed as a function.
            item["type"] = "custom_tool_call"
            item["input"] = text
        else:
            item["arguments"] = text or "{}"
        return item


def _message(role: str, content: list[JsonObject]) -> JsonObject:
    return {"type": "message", "role": role, "content": content}


def _assistant_parts(message: JsonObject) -> list[JsonObject]:
    content = message.get("content")
    parts: list[JsonObject] = []
    if content is not None:
        parts = [
            part for part in _parts(content, _ASSISTANT_PARTS) if part.get("text") or part.get("refusal")
        ]
    refusal = message.get("refusal")
    if refusal is not None and a_string(refusal, "refusal"):
        parts.append({"type": "refusal", "refusal": refusal})
    audio = message.get("audio")
    transcript = audio.get("transcript") if isinstance(audio, dict) else None
    if not parts and isinstance(transcript, str) and transcript:
        parts.append({"type": "output_text", "text": transcript})
    return parts


def _own_pictures(message: JsonObject) -> list[JsonObject]:
    """Return what an earlier answer painted; pictures have a place in a user's message only."""
    given = message.get("images")
    pictures: list[JsonObject] = []
    if given is None:
        return pictures
    where = "images"
    try:
        for index, one in enumerate(a_list(given, "")):
            where = f"images.{index}"
            pictures.append(_picture(an_object(one, "")))
    except FieldError as exc:
        exc.within(where)
        raise
    return [{"type": "input_text", "text": "[generated by the assistant]"}, *pictures] if pictures else []


def _thoughts(message: JsonObject) -> list[JsonObject]:
    """Return the reasoning that the caller kept for us, as far as the backend can read it."""
    given = message.get("reasoning_details")
    thoughts: list[JsonObject] = []
    summary: list[JsonObject] = []
    for index, one in enumerate(a_list(given, "reasoning_details") if given is not None else ()):
        if not isinstance(one, dict):
            raise wrong(f"reasoning_details.{index}", "an object", one)
        kind, data, text = one.get("type"), one.get("data"), one.get("summary")
        if kind == "reasoning.encrypted" and isinstance(data, str) and is_sealed(data):
            thoughts.append({"type": "reasoning", "summary": summary, "encrypted_content": data})
            summary = []
        elif kind == "reasoning.summary" and isinstance(text, str) and text:
            summary.append({"type": "summary_text", "text": text})
    return thoughts


def _output(message: JsonObject) -> JsonObject:
    output: Any = message.get("content", "")
    if isinstance(output, str):
        if output[:1] == "[" or output[:1].isspace():
            output = _seen(output) or output
    elif isinstance(output, list):
        output = [_output_part(part) for part in output] or ""
    elif output is None or isinstance(output, dict):
        output = _json(output)
    else:
        raise wrong("content", "a string or a list", output)
    item: JsonObject = {"type": CALLS["function_call"], "output": output}
    identity = message.get("tool_call_id")
    if isinstance(identity, str):
        item["call_id"] = identity
    elif identity is not None:
        raise wrong("tool_call_id", "a string", identity)
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
                return reader(part)
    except FieldError:
        pass
    return {"type": "input_text", "text": _json(part)}


# Parts -----------------------------------------------------------------------------------------

_Reader = Callable[[JsonObject], JsonObject]


def _parts(content: Any, readers: Mapping[str, _Reader]) -> list[JsonObject]:
    """Return the content of a message, part by part."""
    if isinstance(content, str):
        return [readers["text"]({"text": content})]
    if not isinstance(content, list):
        raise wrong("content", "a string or a list", content)
    if not content and readers is not _ASSISTANT_PARTS:
        raise FieldError("content", "is empty", code="invalid_value", begins=True)
    made: list[JsonObject] = []
    try:
        for part in content:
            kind = a_string(an_object(part, "").get("type"), "type")
            reader = readers.get(kind)
            if reader is None:
                why = (
                    f"a part of type {quoted(kind)} may stand in a user's message only"
                    if kind in _USER_PARTS
                    else f"unknown type of content {quoted(kind)}"
                )
                raise FieldError("type", why, code="invalid_value")
            made.append(reader(part))
    except FieldError as exc:
        exc.within(f"content.{len(made)}")
        raise
    return made


def _input_text(part: JsonObject) -> JsonObject:
    return {"type": "input_text", "text": a_string(part.get("text"), "text")}


def _output_text(part: JsonObject) -> JsonObject:
    return {"type": "output_text", "text": a_string(part.get("text"), "text")}


def _refusal(part: JsonObject) -> JsonObject:
    return {"type": "refusal", "refusal": a_string(part.get("refusal"), "refusal")}


def _refusal_as_text(part: JsonObject) -> JsonObject:
    return {"type": "input_text", "text": a_string(part.get("refusal"), "refusal")}


def _picture(part: JsonObject) -> JsonObject:
    """Return a picture; Chat puts its address into an object, Responses and many callers do not."""
    source: JsonObject = part["image_url"] if isinstance(part.get("image_url"), dict) else part
    made: JsonObject = {"type": "input_image"}
    try:
        for key, name in (("url", "image_url"), ("image_url", "image_url"), ("file_id", "file_id")):
            if source.get(key) not in (None, ""):
                made[name] = a_string(source[key], key)
        if len(made) == 1:
            raise FieldError("", "the picture has no address", code="missing_required_parameter")
        detail = source.get("detail", part.get("detail"))
        if detail is not None:
            made["detail"] = a_string(detail, "detail")
    except FieldError as exc:
        if source is not part:
            exc.within("image_url")
        raise
    return made


def _file(part: JsonObject) -> JsonObject:
    source = an_object(part["file"], "file") if part.get("file") is not None else part
    made: JsonObject = {"type": "input_file"}
    try:
        for key in ("file_id", "file_data", "file_url"):
            if source.get(key) not in (None, ""):
                made[key] = a_string(source[key], key)
        if len(made) == 1:
            raise FieldError(
                "", "the file has neither data nor id nor url", code="missing_required_parameter"
            )
        if source.get("filename") is not None:
            made["filename"] = a_string(source["filename"], "filename")
    except FieldError as exc:
        if source is not part:
            exc.within("file")
        raise
    return made


def _audio(part: JsonObject) -> JsonObject:
    source = an_object(part.get("input_audio"), "input_audio")
    data = a_string(source.get("data"), "input_audio.data")
    return {
        "type": "input_audio",
        "input_audio": {"data": data, "format": a_string(source.get("format"), "input_audio.format")},
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


def _kind(value: JsonObject) -> str:
    """Return the type of a tool or a call; one that only holds a function says so by that."""
    kind = value.get("type")
    if isinstance(kind, str):
        return kind
    if kind is None and isinstance(value.get("function"), dict):
        return "function"
    raise wrong("type", "a string", kind)


def _inside(value: JsonObject, key: str) -> JsonObject:
    """Return what Chat nests under *key*; the flat shape of Responses stands for itself."""
    inner = value.get(key)
    if isinstance(inner, dict):
        return inner
    if inner is None:
        return value
    raise wrong(key, "an object", inner)


def _json(value: Any) -> str:
    return dumps(value).decode()


def _name(source: JsonObject) -> str:
    name = a_string(source.get("name"), "name")
    if not name:
        raise FieldError("name", "is empty", code="invalid_value", begins=True)
    return name
