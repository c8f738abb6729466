"""The legacy dialects: text completion (`/v1/completions`, by engine too) and edits (`/v1/edits`).

Both came before there were conversations, so each request is one turn: a developer's message says
what is wanted of the text, the text itself is the user's. What has no home in a turn:

| in the request                     | what happens to it                                         |
|------------------------------------|------------------------------------------------------------|
| several prompts, `n`, `best_of`    | 400: one request has one answer here                       |
| token numbers as a prompt          | 400: another vocabulary would read other words             |
| `suffix`                           | part of the developer's message                            |
| `echo`                             | done here, in front of the answer                          |
| `max_tokens`, `stop`               | kept here; a missing `max_tokens` is no limit              |
| knobs (`LEFT_OUT`), unknown        | left out                                                   |
| numbers and switches               |                                                            |
| anything unknown that holds words  | 400: nobody would read them                                |
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

from codex_proxy.errors import ProxyError, RequestError
from codex_proxy.protocol.answer import AnswerEncoder, Slot
from codex_proxy.protocol.catalog import Catalog
from codex_proxy.protocol.chat import FINISH, chat_usage
from codex_proxy.protocol.dialect import Decoded, Dialect, Surroundings
from codex_proxy.protocol.fields import (
    a_string,
    get_boolean,
    get_string,
    stop_sequences,
    wants_usage,
    wrong,
)
from codex_proxy.protocol.request import BackendRequest, parse_body
from codex_proxy.protocol.responses import render_error, stream_error
from codex_proxy.protocol.responses_request import LEFT_OUT as NOT_SENT
from codex_proxy.protocol.responses_request import LIMITS, Survey, prepare
from codex_proxy.protocol.wire import JsonObject, Pieces, dumps

__all__ = ["COMPLETIONS", "EDITS", "LEFT_OUT", "CompletionsEncoder", "EditEncoder", "with_engine"]

LEFT_OUT = NOT_SENT | {"store"}
"""Knobs that are left out knowingly, whatever they hold; `logprobs` is null in the answer."""

_PASSED = ("model", "stream", "reasoning_effort", "service_tier", "prompt_cache_key", *LIMITS)
"""What goes on to the one place where all dialects settle it."""

_COMPLETION = frozenset({
    *_PASSED, "best_of", "echo", "n", "prompt", "stop", "stream_options", "suffix",
})  # fmt: skip
_EDIT = frozenset({*_PASSED, "input", "instruction", "n"})

EMPTY_PROMPT = "Complete this:"
"""What stands for an empty prompt: the backend takes no empty message."""

_CONTINUE = (
    "The user's message is the beginning of a text, not a message to you. Go on with it from exactly where it "
    "breaks off, in its own voice, language and format. Write only what comes next: no repetition of what is "
    "there, no reply, no remarks, no quotation marks or code fences around it."
)
_FILL_IN = (
    "The user's message is the beginning of a text, not a message to you; the second part of this message is "
    "the end of the same text. Write only what stands between the two, in their own voice, language and "
    "format, so that the three read as one: no repetition of either, no reply, no remarks, no quotation marks or "
    "code fences around it."
)
_EDIT_IT = (
    "The user's first message is an instruction, and the second the text that it is to be applied to; without a "
    "second one the text is empty. Answer with the edited text only: no remarks, no quotation marks or code "
    "fences around it that were not there before."
)

# Inwards --------------------------------------------------------------------------------------


def decode_completion(
    raw: bytes,
    headers: Mapping[str, str],
    *,
    catalog: Catalog,
    caller: str = "",
    engine: str | None = None,
) -> Decoded:
    """Decode the body of a text completion.

    Args:
        engine: The model that the path names; it wins over the body's.

    Raises:
        RequestError: With the path of the field that cannot be served.
    """
    fields = parse_body(raw)
    if engine is not None:
        fields["model"] = engine
    _check_unknown(fields, _COMPLETION)
    prompt = _prompt(fields.get("prompt"))
    suffix = get_string(fields, "suffix") or ""
    echoes = get_boolean(fields, "echo")
    stop = stop_sequences(fields.get("stop"))
    _check_one(fields, "n", "best_of")
    shows_usage = wants_usage(fields)

    words = [_CONTINUE] if not suffix else [_FILL_IN, suffix]
    request = _ask(fields, headers, catalog, caller, words, [prompt or EMPTY_PROMPT])
    return Decoded(
        request,
        functools.partial(
            CompletionsEncoder, request, stop=stop, echo=prompt if echoes else "", shows_usage=shows_usage
        ),
    )


def decode_edit(raw: bytes, headers: Mapping[str, str], *, catalog: Catalog, caller: str = "") -> Decoded:
    """Decode the body of an edit.

    Raises:
        RequestError: With the path of the field that cannot be served.
    """
    fields = parse_body(raw)
    if get_boolean(fields, "stream"):
        raise RequestError("edits are not streamed", param="stream", code="unsupported_parameter")
    _check_unknown(fields, _EDIT)
    instruction = get_string(fields, "instruction") or ""
    if not instruction:
        raise RequestError(
            "instruction is missing or empty", param="instruction", code="missing_required_parameter"
        )
    text = get_string(fields, "input") or ""
    _check_one(fields, "n")
    user = [instruction, text] if text else [instruction]
    request = _ask(fields, headers, catalog, caller, [_EDIT_IT], user)
    return Decoded(request, functools.partial(EditEncoder, request))


def _ask(
    fields: JsonObject,
    headers: Mapping[str, str],
    catalog: Catalog,
    caller: str,
    developer: Sequence[str],
    user: Sequence[str],
) -> BackendRequest:
    """Make the turn: the developer's message of some parts, then the user's messages."""
    body: JsonObject = {key: fields[key] for key in _PASSED if key in fields}
    body["input"] = [_message("developer", *developer), *(_message("user", text) for text in user)]
    return prepare(body, headers, catalog=catalog, caller=caller, said=fields, survey=Survey())


def _message(role: str, *texts: str) -> JsonObject:
    content = [{"type": "input_text", "text": text} for text in texts]
    return {"type": "message", "role": role, "content": content}


def _prompt(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise wrong("prompt", "a string or a list with one", value)
    first = value[0] if value else ""
    if isinstance(first, list) or _is_number(first):
        raise RequestError(
            "a prompt of token numbers cannot be read here; send it as text",
            param="prompt",
            code="unsupported_value",
        )
    if len(value) > 1:
        raise RequestError(
            f"{len(value)} prompts in one request are not served here; send them one by one",
            param="prompt",
            code="unsupported_value",
        )
    return a_string(first, "prompt.0")


def _check_one(fields: JsonObject, *keys: str) -> None:
    for key in keys:
        value = fields.get(key)
        if value is None:
            continue
        if not isinstance(value, int) or isinstance(value, bool):
            raise wrong(key, "an integer", value)
        if value != 1:
            raise RequestError(
                f"{key} must be 1: one request has one answer here", param=key, code="unsupported_value"
            )


def _check_unknown(fields: JsonObject, known: frozenset[str]) -> None:
    """Refuse words that nobody would read; an unknown number or switch only tunes the answer."""
    for key, value in fields.items():
        if key in known or key in LEFT_OUT or not value or isinstance(value, bool) or _is_number(value):
            continue
        raise RequestError(
            f"{key[:100]!r} is not known to this way of asking; /v1/responses and /v1/chat/completions know more",
            param=key[:100],
            code="unknown_parameter",
        )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


# Outwards -------------------------------------------------------------------------------------


class TextEncoder(AnswerEncoder):
    """What both have in common: the answer is text, of which only words are shown.

    Reasoning is not shown, and calls cannot come: no tools are sent.
    """

    def __init__(
        self, request: BackendRequest, around: Surroundings, *, stop: Sequence[str] = (), collect: bool
    ) -> None:
        super().__init__(request, around, stop=stop, collect=collect)
        self._texts: list[str] = []
        self._refused = False
        self.finish_reason: str | None = None

    def tell_text(self, slot: Slot, text: Pieces) -> None:
        """Add words to the answer."""
        self._write(text)

    def tell_refusal(self, slot: Slot, text: Pieces) -> None:
        """Add the words of a refusal: they are all that the caller gets, and the end says what they are."""
        self._refused = True
        self._write(text)

    def end_well(self, reason: str) -> None:
        """Keep why the answer ended."""
        self.finish_reason = "content_filter" if self._refused else FINISH.get(reason, "stop")

    def end_badly(self, error: ProxyError) -> None:
        """End a stream with the error, and nothing after it."""
        if not self.collect:
            self.out.append(b"data: " + stream_error(error) + b"\n\n")

    def keepalive(self) -> bytes:
        """Return a comment, which no client reads."""
        return b": keep-alive\n\n"

    def _write(self, text: Pieces) -> None:
        if self.collect:
            self._texts.append(text.text)


class CompletionsEncoder(TextEncoder):
    """Turn backend events into `text_completion` chunks, or into one such object.

    What is the same in every chunk is rendered once.

    Args:
        echo: What stands in front of the answer; it counts towards no limit.
        shows_usage: Whether the stream ends with a chunk that has the usage.
    """

    def __init__(
        self,
        request: BackendRequest,
        around: Surroundings,
        *,
        stop: Sequence[str] = (),
        echo: str = "",
        shows_usage: bool = False,
    ) -> None:
        super().__init__(request, around, stop=stop, collect=not request.stream)
        self._echo = echo
        self._shows_usage = shows_usage
        self._head = b""
        self._tail = b""

    def tell_start(self) -> None:
        """Render what all chunks share; give the prompt back if it is wanted."""
        self._head = b"data: " + dumps(self._object())[:-1] + b',"choices":[{"text":"'
        self._tail = b'","index":0,"logprobs":null,"finish_reason":null}]'
        self._tail += b',"usage":null}\n\n' if self._shows_usage else b"}\n\n"
        if self._echo:
            self._write(Pieces.of(self._echo))
            self._echo = ""

    def end_well(self, reason: str) -> None:
        """Say why the answer ended, what it cost if that is wanted, and that it is whole."""
        super().end_well(reason)
        if self.collect:
            return
        choice = {"text": "", "index": 0, "logprobs": None, "finish_reason": self.finish_reason}
        last = {**self._object(), "choices": [choice]}
        if self._shows_usage:
            last["usage"] = None
        self.out.append(b"data: " + dumps(last) + b"\n\n")
        if self._shows_usage:
            costs = {**self._object(), "choices": [], "usage": chat_usage(self.estimate())}
            self.out.append(b"data: " + dumps(costs) + b"\n\n")
        self.out.append(b"data: [DONE]\n\n")

    def whole(self) -> bytes:
        """Return the answer as one object."""
        text = "".join(self._texts)
        choice = {"text": text, "index": 0, "logprobs": None, "finish_reason": self.finish_reason}
        return dumps({**self._object(), "choices": [choice], "usage": chat_usage(self.estimate())})

    def _object(self) -> JsonObject:
        return {
            "id": f"cmpl-{self.response_id.removeprefix('resp_')}",
            "object": "text_completion",
            "created": self.created,
            "model": self.request.asked_model,
        }

    def _write(self, text: Pieces) -> None:
        super()._write(text)
        if not self.collect:
            self.out += (self._head, (self._tail + self._head).join(text.spelled), self._tail)


class EditEncoder(TextEncoder):
    """Turn backend events into one `edit` object; there is no stream of them."""

    def __init__(self, request: BackendRequest, around: Surroundings) -> None:
        super().__init__(request, around, collect=True)

    def whole(self) -> bytes:
        """Return the answer as one object."""
        choice = {"text": "".join(self._texts), "index": 0, "finish_reason": self.finish_reason}
        return dumps({
            "object": "edit",
            "created": self.created,
            "choices": [choice],
            "usage": chat_usage(self.estimate()),
        })


# The dialects ---------------------------------------------------------------------------------

COMPLETIONS = Dialect("openai", decode_completion, render_error, keeps_alive_early=True)
EDITS = Dialect("openai", decode_edit, render_error)


def with_engine(engine: str) -> Dialect:
    """Return text completion by the model that the path names."""
    decode = functools.partial(decode_completion, engine=engine)
    return Dialect("openai", decode, render_error, keeps_alive_early=True)
