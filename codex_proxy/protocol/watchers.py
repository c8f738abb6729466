"""Watchers: what there is to know of an answer that passes unchanged.

An upstream that speaks its caller's dialect is not translated. A watcher reads along: has the answer begun, did it
fail, what did it use, has it ended? It changes nothing; of a stream it only says which frame nobody asked for, and how
an answer of this dialect is broken off. One for each dialect:

| dialect     | begun                           | ended                        | failure                   |
|-------------|---------------------------------|------------------------------|---------------------------|
| chat        | something in a delta, or an end | `[DONE]`                     | `error` in the place of it|
| completions | a text, or an end               | `[DONE]`                     | the same                  |
| responses   | anything but greetings          | `completed`, `incomplete`    | `failed`, `error`         |
| messages    | a content block, or an end      | `message_stop`               | `error`                   |

A stream that simply stops after its last reason to end (some servers leave `[DONE]` out) has ended too; one that stops
before has not. Usage that is told twice is used once: the last word counts. A failure is never passed on in the upstream's words, which may
speak of its own keys and purse.
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from codex_proxy.errors import ProxyError, UpstreamError, classify, fault_of
from codex_proxy.protocol.frames import DONE, Frame
from codex_proxy.protocol.messages import PING, error_event
from codex_proxy.protocol.responses import (
    failed_event,
    failure_of,
    is_handshake,
    read_reset,
    read_usage,
    stream_error,
)
from codex_proxy.protocol.sse import Event
from codex_proxy.protocol.wire import BadJson, JsonObject, loads_lenient
from codex_proxy.trace import End, Usage, UsageSource

_BYTES_PER_TOKEN = 4

_COMMENT = b": keep-alive\n\n"
_KEEPALIVE = b'data: {"type":"keepalive"}\n\n'


class _Glance:
    """Knows the next delta by the last one: most frames of a stream differ in their text alone, and need no parsing.

    Learned from a frame that was read; one with the very same bytes around its text says the same but for that.
    """

    __slots__ = ("_bare", "_before", "_tail")

    def __init__(self) -> None:
        self._before = b""
        self._tail = b""
        self._bare = b""

    def learn(self, raw: bytes, key: bytes) -> None:
        """Take in a frame that held nothing new but the text under *key*."""
        mark = b'"%b":"' % key
        start = raw.find(mark) + len(mark)
        end = raw.find(b'"', start)
        if start < len(mark) or end < 0 or raw.count(b'"%b"' % key) != 1 or raw.find(b"\\", start, end) >= 0:
            return
        self._before, self._tail = raw[:start], raw[end:]
        self._bare = _bare(self._tail)

    def text(self, raw: bytes) -> bytes | None:
        """Return the text of a frame like the last one; None when it is another, or has escapes in it."""
        before = self._before
        if not before or not raw.startswith(before):
            return None
        start = len(before)
        end = raw.find(b'"', start)
        tail = raw[end:]
        if raw.find(b"\\", start, end) >= 0 or (tail != self._tail and _bare(tail) != self._bare):
            return None
        return raw[start:end]


_PADDING = re.compile(rb'(?<="obfuscation":")[A-Za-z0-9]*(?=")')


def _bare(tail: bytes) -> bytes:
    """Return what follows a text without what only hides its length: letters at OpenAI's, spaces at Anthropic's."""
    if b'"obfuscation"' in tail:
        return _PADDING.sub(b"", tail)
    return tail.replace(b" ", b"") if tail.find(b'"', 1) < 0 else tail


class Watcher:
    """What all watchers share; made for one answer.

    Args:
        now: The wall clock, for the ends of limits.
        wants_usage: Whether the caller asked for a frame with the usage alone.
    """

    holds = "choices"
    """Where a plain answer has what was asked for."""

    def __init__(self, now: Callable[[], float], *, wants_usage: bool = True) -> None:
        self.now = now
        self.begun = False
        """Whether something of the answer itself has come."""
        self.failure: UpstreamError | None = None
        self.ended: End | None = None
        """How the answer ended; None while it runs."""
        self.usage = Usage()
        self.delivered = 0
        """How many bytes of text it has had so far, its reasoning and its calls' arguments among them."""
        self.words: list[str] | None = None
        """The texts themselves, where somebody wants to have them."""
        self.told: list[Event] = []
        """Events that say something of the upstream itself; whoever reads them takes them out."""
        self.final: JsonObject = {}
        """What the end of a Responses answer says: `id` and `output`."""
        self._wants_usage = wants_usage
        self._reason: End | None = None
        """How it is going to end."""
        self._glance = _Glance()

    def look(self, frame: Frame) -> bool:
        """Take in a frame; False when it is none for the caller: not asked for, or a failure in the upstream's words."""
        text = self._glance.text(frame.raw)
        if text is not None:
            self.begun = True
            self.delivered += len(text)
            if self.words is not None and text:
                self.words.append(text.decode("utf-8", "replace"))
            return True
        passes = True
        says_error = _SAYS_ERROR(frame.raw) is not None
        for data in frame.payloads():
            if data.strip() == DONE:
                self.ended = self.ended or self._reason or End.COMPLETED
                self.begun = True
                continue
            payload = _object(data)
            if payload is not None and self.failure is None:
                passes = self._read(payload, data) and passes
                key = self._text_key(payload)
                if key:
                    self._glance.learn(frame.raw, key)
            if says_error and self.failure is None:
                # Whatever it says, or in whatever shape, it is not the answer.
                self.failure = self._fail(payload or {})
        return passes and self.failure is None

    def whole(self, data: bytes) -> None:
        """Take in an answer that is no stream."""
        payload = _object(data)
        if payload is None:
            return
        self.failure = self._failure_in(payload)
        if self.failure is not None or not isinstance(payload.get(self.holds), list):
            # Some gateways say with status 200, and in words of their own, that it did not work.
            return
        self.begun = True
        self._read_whole(payload)
        self.ended = self.ended or self._reason or End.COMPLETED

    def finish(self) -> End | None:
        """Take in that nothing more comes; return how the answer has ended, None when it has not."""
        if self.ended is None and self.failure is None:
            self.ended = self._reason
        return self.ended

    def keepalive(self) -> bytes:
        """Return what says nothing but that we are here; fit between any two frames."""
        return _COMMENT

    def cut(self, error: ProxyError) -> bytes:
        """Return what ends a stream of this dialect with *error*; empty when it has ended."""
        if self.ended is not None:
            return b""
        self.ended = End.FAILED
        return self._cut(error)

    def estimate(self, input_bytes: int) -> Usage:
        """Return what was used: in the upstream's numbers, and by the length of the texts what it has not told."""
        if self.usage.source is not UsageSource.BACKEND or self.ended in (None, End.FAILED):
            told = self.usage
            seen = math.ceil(self.delivered / _BYTES_PER_TOKEN)
            self.usage = Usage(
                input_tokens=told.input_tokens or math.ceil(input_bytes / _BYTES_PER_TOKEN),
                cached_tokens=told.cached_tokens,
                cache_write_tokens=told.cache_write_tokens,
                output_tokens=max(told.output_tokens, seen),
                reasoning_tokens=told.reasoning_tokens,
                source=UsageSource.ESTIMATE,
            )
        return self.usage

    # -- a dialect's own -------------------------------------------------------------------

    def _read(self, payload: JsonObject, data: bytes) -> bool:
        """Take in what a frame says."""
        raise NotImplementedError

    def _read_whole(self, payload: JsonObject) -> None:
        """Take in a plain answer that is no error."""
        raise NotImplementedError

    def _text_key(self, payload: JsonObject) -> bytes:
        """Return where the text of a frame stands that holds nothing else; empty when it is none."""
        return b""

    def _cut(self, error: ProxyError) -> bytes:
        return b"data: " + stream_error(error) + b"\n\n"

    # -- for them --------------------------------------------------------------------------

    def _failure_in(self, payload: JsonObject) -> UpstreamError | None:
        """Read an error that stands in the place of an answer; None when there is none."""
        error = payload.get("error")
        if isinstance(error, dict | str) and error:
            return self._fail(payload)
        is_flat = "error" in (payload.get("object"), payload.get("type"))
        return self._fail(payload) if is_flat else None

    def _fail(self, payload: JsonObject) -> UpstreamError:
        """Return *payload* as the failure that it tells of."""
        error = payload.get("error")
        if payload.get("type") == "error":
            # The flat shape names itself: that word is not the error's type.
            payload = {key: value for key, value in payload.items() if key != "type"}
        status = payload.get("status")
        code = (error if isinstance(error, dict) else payload).get("code")
        if isinstance(code, int) and not isinstance(code, bool):
            # Some gateways have the status there.
            status = code
        status = status if isinstance(status, int) and 400 <= status <= 599 else None
        fault = fault_of(payload, "the upstream failed while it answered")
        resets_at, retry_after = read_reset(payload, now=self.now())
        return UpstreamError(
            classify(status, fault),
            fault,
            status=status,
            retry_after=retry_after,
            resets_at=resets_at,
            in_stream=True,
        )

    def _add(self, texts: Iterable[Any]) -> bool:
        """Count texts of the answer; tell whether there was something in them."""
        found = False
        for text in texts:
            if isinstance(text, str) and text:
                found = True
                self.delivered += len(text.encode("utf-8", "replace"))
                if self.words is not None:
                    self.words.append(text)
        return found

    def _take_usage(self, usage: Any) -> bool:
        """Take the usage of OpenAI's older dialects; False when there is none."""
        if not isinstance(usage, dict):
            return False
        into, out = usage.get("prompt_tokens_details"), usage.get("completion_tokens_details")
        into, out = into if isinstance(into, dict) else {}, out if isinstance(out, dict) else {}
        self.usage = Usage(
            input_tokens=number(usage.get("prompt_tokens", usage.get("input_tokens"))),
            cached_tokens=number(into.get("cached_tokens")),
            cache_write_tokens=number(into.get("cache_write_tokens")),
            output_tokens=number(usage.get("completion_tokens", usage.get("output_tokens"))),
            reasoning_tokens=number(out.get("reasoning_tokens")),
            source=UsageSource.BACKEND,
        )
        return True


class ChatWatcher(Watcher):
    """Reads `chat.completion.chunk` frames, or one `chat.completion`."""

    def _read(self, payload: JsonObject, data: bytes) -> bool:
        choices = payload.get("choices")
        # Also beside a choice, which then ends with the reason `error`.
        self.failure = self._failure_in(payload)
        is_usage = self._take_usage(payload.get("usage"))
        if is_usage and not choices:
            return self._wants_usage
        for choice in choices if isinstance(choices, list) else ():
            if isinstance(choice, dict):
                self._read_choice(choice, "delta")
        return True

    def _text_key(self, payload: JsonObject) -> bytes:
        match payload:
            case {"choices": [{"delta": {"content": str(text)} as delta} as choice]} if (
                text and len(delta) == 1
            ):
                return b"" if choice.get("finish_reason") or payload.get("usage") else b"content"
            case _:
                return b""

    def _read_whole(self, payload: JsonObject) -> None:
        self._take_usage(payload.get("usage"))
        for choice in _objects(payload.get("choices")):
            self._read_choice(choice, "message")

    def _read_choice(self, choice: JsonObject, key: str) -> None:
        said = choice.get(key)
        if isinstance(said, dict) and self._add(_chat_texts(said)):
            self.begun = True
        self._read_reason(choice)

    def _read_reason(self, choice: JsonObject) -> None:
        reason = choice.get("finish_reason")
        if reason == "error":
            self.failure = self.failure or self._fail({})
        elif isinstance(reason, str) and reason:
            self.begun = True
            self._reason = End.INCOMPLETE if reason in ("length", "content_filter") else End.COMPLETED


def _chat_texts(said: JsonObject) -> Iterable[Any]:
    content = said.get("content")
    if isinstance(content, list):
        yield from (part.get("text") for part in _objects(content))
    yield content
    for key in ("refusal", "reasoning_content", "reasoning"):
        yield said.get(key)
    calls = [*_objects(said.get("tool_calls")), {"function": said.get("function_call")}]
    for call in calls:
        for key in ("function", "custom"):
            inner = call.get(key)
            if isinstance(inner, dict):
                yield inner.get("name")
                yield inner.get("arguments") or inner.get("input")


class CompletionsWatcher(ChatWatcher):
    """Reads the older completions, and edits."""

    def _text_key(self, payload: JsonObject) -> bytes:
        match payload:
            case {"choices": [{"text": str(text)} as choice]} if text:
                return b"" if choice.get("finish_reason") or payload.get("usage") else b"text"
            case _:
                return b""

    def _read_choice(self, choice: JsonObject, key: str) -> None:
        if self._add([choice.get("text")]):
            self.begun = True
        self._read_reason(choice)


class EmbeddingsWatcher(Watcher):
    """Reads embeddings, which are no text and come whole."""

    holds = "data"

    def _read(self, payload: JsonObject, data: bytes) -> bool:
        return True

    def _read_whole(self, payload: JsonObject) -> None:
        self._take_usage(payload.get("usage"))


class ResponsesWatcher(Watcher):
    """Reads the events of Responses, or one response."""

    holds = "output"

    def __init__(self, now: Callable[[], float], *, wants_usage: bool = True) -> None:
        super().__init__(now, wants_usage=wants_usage)
        self._response: JsonObject = {}
        self._sequence = -1
        self._items: list[JsonObject] = []

    def look(self, frame: Frame) -> bool:
        """See `Watcher.look`; deltas are known by their form."""
        match = _DELTA(frame.raw)
        if match is None or match[2] is None or self.failure is not None:
            return super().look(frame)
        self.begun = True
        self.delivered += len(match[2])
        if match[1] is not None:
            self._sequence = max(self._sequence, int(match[1]))
        if self.words is not None and match[2]:
            self.words.append(match[2].decode("utf-8", "replace"))
        return True

    def keepalive(self) -> bytes:
        """Return an event: the Codex CLI counts nothing else. Before `created` an SDK's helper would raise on it."""
        return _KEEPALIVE if self._response else _COMMENT

    def _read(self, payload: JsonObject, data: bytes) -> bool:
        kind = payload.get("type")
        event = Event(kind if isinstance(kind, str) else "", data, payload)
        self._sequence = max(self._sequence, number(payload.get("sequence_number"), -1))
        self.failure = failure_of(event, now=self.now())
        if self.failure is not None:
            return False
        response = payload.get("response")
        if isinstance(response, dict) and not self._response:
            self._response = response
        if not is_handshake(event) and event.type.startswith("response."):
            self.begun = True
        if event.type.endswith(".delta"):
            self._add([payload.get("delta")])
        elif event.type == "response.output_item.done":
            item = payload.get("item")
            if isinstance(item, dict):
                self._items.append(item)
                if "encrypted_content" in item:
                    self.told.append(event)
        elif event.type in ("response.completed", "response.incomplete") and isinstance(response, dict):
            self._end(response, event.type.removeprefix("response."))
        return True

    def _read_whole(self, payload: JsonObject) -> None:
        output = payload.get("output")
        self._items = list(_objects(output))
        for item in self._items:
            self._add(_item_texts(item))
            if "encrypted_content" in item:
                self.told.append(Event.of({"type": "response.output_item.done", "item": item}))
        self._end(payload, str(payload.get("status", "completed")))

    def _end(self, response: JsonObject, status: str) -> None:
        usage = response.get("usage")
        if isinstance(usage, dict):
            self.usage = read_usage(usage)
        output = response.get("output")
        self.final = {"id": response.get("id"), "output": output if output else self._items}
        self.ended = End.INCOMPLETE if status == "incomplete" else End.COMPLETED

    def _failure_in(self, payload: JsonObject) -> UpstreamError | None:
        # Of a whole response: `error` is null in a good one.
        if payload.get("status") == "failed":
            return failure_of(Event("response.failed", b"", {"response": payload}), now=self.now())
        return super()._failure_in(payload)

    def _cut(self, error: ProxyError) -> bytes:
        return failed_event(error, self._response, self._sequence + 1).frame()


_DELTA = re.compile(
    rb'(?:event: response\.[a-z_]+\.delta\n)?data: \{"type":"response\.[a-z_]+\.delta"'
    rb'(?:,"(?:sequence_number":(\d{1,15})|item_id":"[\w.-]*+"|(?:output|content|summary)_index":\d{1,9}'
    rb'|logprobs":\[\]|obfuscation":"\w*+"|delta":"([^"\\]*+)"))*+\}\n\n'
).fullmatch
"""Matches a delta as OpenAI writes it, whose text has no escapes."""


def _item_texts(item: JsonObject) -> Iterable[Any]:
    yield item.get("arguments") or item.get("input")
    for key in ("content", "summary"):
        for part in _objects(item.get(key)):
            yield part.get("text") or part.get("refusal")


class MessagesWatcher(Watcher):
    """Reads the events of a Messages stream, or one message."""

    holds = "content"

    def __init__(self, now: Callable[[], float], *, wants_usage: bool = True) -> None:
        super().__init__(now, wants_usage=wants_usage)
        self._fields: dict[str, int] = {}

    def keepalive(self) -> bytes:
        """Return a ping."""
        return PING

    def _read(self, payload: JsonObject, data: bytes) -> bool:
        # Relays say it without the type too.
        self.failure = self._failure_in(payload)
        match payload.get("type"):
            case "message_start":
                message = payload.get("message")
                if isinstance(message, dict):
                    self._take(message.get("usage"), is_last=False)
            case "content_block_start":
                self.begun = True
                block = payload.get("content_block")
                if isinstance(block, dict):
                    self._add(_block_texts(block))
            case "content_block_delta":
                self.begun = True
                delta = payload.get("delta")
                if isinstance(delta, dict):
                    self._add([delta.get("text"), delta.get("thinking"), delta.get("partial_json")])
            case "message_delta":
                self.begun = True
                delta = payload.get("delta")
                self._read_reason(delta if isinstance(delta, dict) else {})
                self._take(payload.get("usage"), is_last=True)
            case "message_stop":
                self.begun = True
                self.ended = self._reason or End.COMPLETED
            case _:
                pass
        return True

    def _text_key(self, payload: JsonObject) -> bytes:
        match payload:
            case {
                "type": "content_block_delta",
                "delta": {"type": "text_delta", "text": str(text)} as delta,
            } if text and len(delta) == 2:
                return b"text"
            case _:
                return b""

    def _read_whole(self, payload: JsonObject) -> None:
        for block in _objects(payload.get("content")):
            self._add(_block_texts(block))
        self._read_reason(payload)
        self._take(payload.get("usage"), is_last=True)

    def _read_reason(self, said: JsonObject) -> None:
        reason = said.get("stop_reason")
        if isinstance(reason, str) and reason:
            self._reason = End.INCOMPLETE if reason == "max_tokens" else End.COMPLETED

    def _take(self, usage: Any, *, is_last: bool) -> None:
        """Take in the numbers, of which later ones replace earlier ones; cached tokens stand beside the others."""
        if not isinstance(usage, dict):
            return
        for name in (
            "input_tokens",
            "output_tokens",
            "cache_read_input_tokens",
            "cache_creation_input_tokens",
        ):
            # A zero at the end is what a server says that told it at the beginning.
            self._fields[name] = number(usage.get(name)) or self._fields.get(name, 0)
        cached, written = (
            self._fields["cache_read_input_tokens"],
            self._fields["cache_creation_input_tokens"],
        )
        self.usage = Usage(
            input_tokens=self._fields["input_tokens"] + cached + written,
            cached_tokens=cached,
            cache_write_tokens=written,
            output_tokens=self._fields["output_tokens"],
            source=UsageSource.BACKEND if is_last else UsageSource.NONE,
        )

    def _cut(self, error: ProxyError) -> bytes:
        return error_event(error)


def _block_texts(block: JsonObject) -> Sequence[Any]:
    return [block.get("text"), block.get("thinking"), block.get("name")]


_WATCHERS: Mapping[str, type[Watcher]] = {
    "chat": ChatWatcher,
    "completions": CompletionsWatcher,
    "engines": CompletionsWatcher,
    "edits": CompletionsWatcher,
    "embeddings": EmbeddingsWatcher,
    "responses": ResponsesWatcher,
    "messages": MessagesWatcher,
}


_SAYS_ERROR = re.compile(rb"(?m)^event: ?error[ \r]*$").search


def watcher_for(capability: str, now: Callable[[], float], *, wants_usage: bool = True) -> Watcher:
    """Return a watcher for an answer in the dialect of *capability*."""
    return _WATCHERS[capability](now, wants_usage=wants_usage)


def number(value: Any, default: int = 0) -> int:
    """Return a count; what is none, or absurd, is *default*."""
    if isinstance(value, float) and value.is_integer():
        # Some languages have no other numbers.
        value = int(value)
    is_count = isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**53
    return value if is_count else default


def _object(data: bytes) -> JsonObject | None:
    try:
        value = loads_lenient(data)
    except BadJson:
        return None
    return value if isinstance(value, dict) else None


def _objects(value: Any) -> Iterable[JsonObject]:
    return [one for one in value if isinstance(one, dict)] if isinstance(value, list) else ()
