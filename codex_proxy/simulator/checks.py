"""What the live backend refuses about a request, with the words it uses.

`check_shape` needs nothing but the request; `check_bindings` asks whose the encrypted parts are.
Both return the refusal, or None.
"""

import base64
import re
from collections.abc import Iterable, Mapping
from typing import Any

from codex_proxy.protocol.wire import BadJson, dumps, loads
from codex_proxy.simulator.catalog import Model, model_of
from codex_proxy.simulator.faults import Reply, error_body

LITE_HEADER = "x-openai-internal-codex-responses-lite"

ACCEPTED = frozenset({
    "model", "stream", "service_tier", "input", "tools", "tool_choice", "parallel_tool_calls", "reasoning",
    "store", "include", "prompt_cache_key", "text", "client_metadata", "instructions", "stream_options",
    "access_programs", "prompt_cache_options",
})  # fmt: skip
"""All other parameters are unsupported."""

_EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")
_SUMMARIES = ("auto", "concise", "detailed")
_CONTEXTS = ("auto", "current_turn", "all_turns")
_TIERS = ("auto", "default", "flex", "priority")
_CALLS = {
    "function_call": "function call",
    "custom_tool_call": "custom tool call",
    "local_shell_call": "local shell call",
}
_OUTPUTS = {f"{kind}_output": name for kind, name in _CALLS.items()}
_ID_PREFIX = {"message": "msg", "reasoning": "rs", "function_call": "fc", "custom_tool_call": "ctc"}
_HOSTED = ("web_search", "image_generation", "file_search", "code_interpreter", "computer", "mcp")
_NAME = re.compile(r"[A-Za-z0-9_-]+")
_SEALED = {"reasoning", "compaction", "compaction_summary", "context_compaction"}


def check_shape(body: Any, headers: Mapping[str, str], wire: str) -> Reply | None:
    """Return why the backend refuses *body* whoever sends it."""
    if not isinstance(body, dict):
        return _invalid("Invalid request body: expected an object.", None)
    for key in body:
        if key not in ACCEPTED:
            return _detail(f"Unsupported parameter: {key}")
    model = body.get("model")
    if not isinstance(model, str) or not model:
        return _invalid("Missing required parameter: 'model'.", "model", "missing_required_parameter")
    if body.get("stream") is not True:
        return _detail("Stream must be set to true")
    if body.get("store") is not False:
        return _detail("Store must be set to false")
    if "instructions" in body and not isinstance(body["instructions"], str):
        return _detail("Instructions are not valid")
    if not isinstance(body.get("input"), list):
        return _detail("Input must be a list")
    for check in (_check_knobs, _check_tools, _check_items):
        refusal = check(body)
        if refusal is not None:
            return refusal
    return _check_wire(body, headers, model_of(model)) if wire == "strict" else None


def check_bindings(
    body: Mapping[str, Any], turn_state: str | None, tag: str, others: Iterable[str]
) -> Reply | None:
    """Return why the account with *tag* cannot serve *body*: parts of it belong to another account."""
    if turn_state is not None and (unseal(turn_state) or {}).get("a") != tag:
        return _invalid("The turn state is not valid for this account.", None, "invalid_turn_state")
    foreign = tuple(f"_{other}" for other in others if other != tag)
    for item in body["input"]:
        if not isinstance(item, dict) or item.get("type") not in _SEALED:
            continue
        sealed = item.get("encrypted_content")
        identity = item.get("id")
        owner = (unseal(sealed) or {}).get("a") if isinstance(sealed, str) else None
        if (isinstance(sealed, str) and owner != tag) or (
            isinstance(identity, str) and any(mark in identity for mark in foreign)
        ):
            text = (
                "The encrypted content could not be verified. "
                "Reason: Encrypted content could not be decrypted or parsed."
            )
            return _invalid(text, None, "invalid_encrypted_content")
        if item["type"] != "reasoning" and sealed is None:
            return _invalid(
                "Missing required parameter: 'encrypted_content'.", "input", "missing_required_parameter"
            )
    return None


def seal(tag: str, **content: Any) -> str:
    """Return an opaque text that only the account with *tag* can read."""
    return "gAAAAA" + base64.urlsafe_b64encode(dumps({"a": tag, **content})).decode("ascii")


def unseal(sealed: str) -> dict[str, Any] | None:
    """Return what was sealed, or None when it was not sealed here."""
    if not sealed.startswith("gAAAAA"):
        return None
    try:
        value = loads(base64.urlsafe_b64decode(sealed.removeprefix("gAAAAA")))
    except (BadJson, ValueError):
        return None
    return value if isinstance(value, dict) else None


_TYPES: tuple[tuple[str, tuple[type, ...], str], ...] = (
    ("client_metadata", (dict,), "an object"),
    ("parallel_tool_calls", (bool,), "a boolean"),
    ("prompt_cache_key", (str,), "a string"),
    ("stream_options", (dict,), "an object"),
    ("text", (dict,), "an object"),
    ("tool_choice", (str, dict), "a string or an object"),
)


def _check_knobs(body: Mapping[str, Any]) -> Reply | None:
    for key, types, expected in _TYPES:
        if body.get(key) is not None and not isinstance(body[key], types):
            return _wrong_type(key, expected)
    reasoning = body.get("reasoning")
    if isinstance(reasoning, dict):
        effort = reasoning.get("effort")
        supported: tuple[str, ...] = _EFFORTS
        if (
            isinstance(effort, str)
            and effort in _EFFORTS[3:]
            and effort not in model_of(body["model"]).efforts
        ):
            supported = ("none", "minimal", *(e for e in model_of(body["model"]).efforts if e in _EFFORTS))
        for key, allowed in (("effort", supported), ("summary", _SUMMARIES), ("context", _CONTEXTS)):
            value = reasoning.get(key)
            if value is not None and value not in allowed:
                return _unsupported_value(f"reasoning.{key}", value, allowed)
    elif reasoning is not None:
        return _wrong_type("reasoning", "an object")
    tier = body.get("service_tier")
    if tier is not None and tier not in _TIERS:
        return _detail(f"Unsupported service_tier: {tier}")
    text = body.get("text")
    if isinstance(text, dict) and text.get("verbosity") not in {None, "low", "medium", "high"}:
        return _unsupported_value("text.verbosity", text["verbosity"], ("low", "medium", "high"))
    include = body.get("include")
    if include is not None and not (isinstance(include, list) and all(isinstance(i, str) for i in include)):
        return _wrong_type("include", "an array of strings")
    return None


def _check_tools(body: Mapping[str, Any]) -> Reply | None:
    tools = body.get("tools")
    if tools is None:
        return None
    if not isinstance(tools, list):
        return _wrong_type("tools", "an array of objects")
    for i, tool in enumerate(tools):
        if not isinstance(tool, dict) or not isinstance(tool.get("type"), str):
            return _invalid(
                f"Missing required parameter: 'tools[{i}].type'.",
                f"tools[{i}].type",
                "missing_required_parameter",
            )
        if tool["type"] in {"function", "custom"}:
            refusal = _check_name(tool.get("name"), f"tools[{i}].name")
            if refusal is not None:
                return refusal
        elif tool["type"].startswith("web_search_preview"):
            return _invalid(f"Unsupported tool type: {tool['type']}", f"tools[{i}].type")
    return None


def _check_items(body: Mapping[str, Any]) -> Reply | None:
    items: list[Any] = body["input"]
    called: dict[str, str] = {}
    answered: set[str] = set()
    for i, item in enumerate(items):
        if not isinstance(item, dict):
            return _wrong_type(f"input[{i}]", "an object")
        kind = item.get("type", "message")
        if not isinstance(kind, str):
            return _wrong_type(f"input[{i}].type", "a string")
        if kind == "message":
            refusal = _check_message(item, i)
            if refusal is not None:
                return refusal
        identity = item.get("id")
        prefix = _ID_PREFIX.get(kind)
        if prefix is not None and isinstance(identity, str) and not identity.startswith(prefix):
            return _invalid(
                f"Invalid 'input[{i}].id': '{identity}'. Expected an ID that begins with '{prefix}'.",
                f"input[{i}].id",
                "invalid_value",
            )
        if isinstance(identity, str) and len(identity) > 64:
            return _too_long(f"input[{i}].id", len(identity))
        if kind == "item_reference":
            text = (
                f"Item with id '{identity}' not found. Items are not persisted when `store` is set to false. "
                "Try again with `store` set to true, or remove this item from your input."
            )
            return _invalid(text, "input")
        if kind == "compaction_trigger" and i != len(items) - 1:
            return _invalid(
                "'compaction_trigger' must be the last input item.", f"input[{i}]", "invalid_value"
            )
        if kind in _CALLS or kind in _OUTPUTS:
            call_id = item.get("call_id")
            if not isinstance(call_id, str) or not call_id:
                return _invalid(
                    f"Missing required parameter: 'input[{i}].call_id'.",
                    f"input[{i}].call_id",
                    "missing_required_parameter",
                )
            if len(call_id) > 64:
                return _too_long(f"input[{i}].call_id", len(call_id))
            if kind in _OUTPUTS:
                if call_id not in called:
                    return _invalid(
                        f"No tool call found for {_OUTPUTS[kind]} output with call_id {call_id}.", "input"
                    )
                answered.add(call_id)
                continue
            called[call_id] = _CALLS[kind]
            if kind != "local_shell_call":
                refusal = _check_name(item.get("name"), f"input[{i}].name")
                if refusal is not None:
                    return refusal
            if kind == "function_call" and not isinstance(item.get("arguments"), str):
                return _wrong_type(f"input[{i}].arguments", "a string")
    for call_id, name in called.items():
        if call_id not in answered:
            return _invalid(f"No tool output found for {name} {call_id}.", "input")
    return None


def _check_message(item: Mapping[str, Any], i: int) -> Reply | None:
    role = str(item.get("role"))
    if role == "system":
        return _detail("System messages are not allowed")
    if role not in {"user", "assistant", "developer"}:
        return _invalid(
            f"Invalid value: '{role}'. Supported values are: 'assistant', 'developer', and 'user'.",
            f"input[{i}].role",
            "invalid_value",
        )
    content = item.get("content")
    if isinstance(content, str):
        return None
    if not isinstance(content, list):
        return _wrong_type(f"input[{i}].content", "an array of content parts or a string")
    allowed = (
        ("output_text", "refusal")
        if role == "assistant"
        else ("input_text", "input_image", "input_file", "input_audio")
    )
    for j, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind not in allowed:
            listed = ", ".join(f"'{name}'" for name in allowed[:-1]) + f", and '{allowed[-1]}'"
            return _invalid(
                f"Invalid value: '{kind}'. Supported values are: {listed}.",
                f"input[{i}].content[{j}].type",
                "invalid_value",
            )
    return None


def _check_wire(body: Mapping[str, Any], headers: Mapping[str, str], model: Model) -> Reply | None:
    is_lite = headers.get(LITE_HEADER, "").lower() == "true"
    carried = any(isinstance(i, dict) and i.get("type") == "additional_tools" for i in body["input"])
    tools = body.get("tools") or []
    if not model.lite:
        if is_lite:
            return _shape(f"The model '{model.slug}' does not support the lite request shape.", LITE_HEADER)
        if carried:
            return _shape(f"The model '{model.slug}' takes tools in 'tools' only.", "input")
        return None
    if not is_lite:
        # Tools that run at the backend exist in the standard shape only.
        if any(str(tool["type"]).startswith(_HOSTED) for tool in tools):
            return None
        return _shape(f"The model '{model.slug}' requires the lite request shape.", LITE_HEADER)
    if tools:
        return _shape("Lite requests carry their tools in an 'additional_tools' item.", "tools")
    if (body.get("reasoning") or {}).get("context") != "all_turns":
        return _shape("Lite requests require 'reasoning.context' to be 'all_turns'.", "reasoning.context")
    if body.get("parallel_tool_calls") is not False:
        return _shape("Lite requests require 'parallel_tool_calls' to be false.", "parallel_tool_calls")
    return None


def _check_name(name: object, param: str) -> Reply | None:
    if not isinstance(name, str) or not name:
        return _invalid(f"Missing required parameter: '{param}'.", param, "missing_required_parameter")
    if len(name) > 64:
        return _too_long(param, len(name))
    if not _NAME.fullmatch(name):
        text = f"Invalid '{param}': string does not match pattern. Expected a string that matches the pattern '^[a-zA-Z0-9_-]+$'."
        return _invalid(text, param, "invalid_value")
    return None


def _invalid(text: str, param: str | None, code: str | None = None) -> Reply:
    return Reply.json(error_body(text, code=code, param=param), 400)


def _detail(text: str) -> Reply:
    return Reply.json({"detail": text}, 400)


def _shape(text: str, param: str) -> Reply:
    return _invalid(text, param, "invalid_request_shape")


def _wrong_type(param: str, expected: str) -> Reply:
    return _invalid(f"Invalid type for '{param}': expected {expected}.", param, "invalid_type")


def _too_long(param: str, length: int) -> Reply:
    text = (
        f"Invalid '{param}': string too long. Expected a string with maximum length 64, "
        f"but got a string with length {length} instead."
    )
    return _invalid(text, param, "string_above_max_length")


def _unsupported_value(param: str, value: Any, allowed: Iterable[str]) -> Reply:
    names = [f"'{name}'" for name in allowed]
    listed = ", ".join(names[:-1]) + f", and {names[-1]}"
    return _invalid(
        f"Unsupported value: '{value}' is not supported. Supported values are: {listed}.",
        param,
        "unsupported_value",
    )
