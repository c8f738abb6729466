"""The Responses dialect: backend events to the caller's bytes, failures to the caller's errors.

The backend speaks this dialect already, so most events pass byte for byte and unparsed. What
is changed, and why, stands in one table, `Encoder`'s handlers:

| event                                   | what happens to it                                       |
|-----------------------------------------|----------------------------------------------------------|
| created, queued, in_progress            | model is what the caller asked for; the account's        |
|                                         | `safety_identifier` and `user` become null               |
| completed, incomplete                   | the same; output rebuilt when empty, usage made complete |
| failed, error, any frame with an error  | one `response.failed` in words the caller may have       |
| output_item.added, output_item.done     | lite namespaces taken off when we put them on            |
| response.metadata                       | Codex clients only, with filtered headers                |
| codex.rate_limits                       | Codex clients only, the pool's numbers                   |
| what is no `response.*` event           | Codex clients only: SDK helpers raise on it              |

Facts: backend contract, sections 3 and 4.
"""

import functools
import math
import re
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Final

import msgspec

from codex_proxy.errors import (
    BudgetUsedUp,
    ConfigError,
    KeyRefused,
    LedgerAway,
    NotAllowed,
    OutOfFunds,
    PoolEmpty,
    PoolError,
    PoolExhausted,
    PoolShortage,
    ProxyError,
    RateLimited,
    RequestError,
    TooManyGuesses,
    UpstreamError,
    Verdict,
    classify,
    fault_of,
)
from codex_proxy.protocol.catalog import Catalog
from codex_proxy.protocol.dialect import Decoded, Dialect, Surroundings
from codex_proxy.protocol.output_limit import OutputLimit
from codex_proxy.protocol.request import TURN_STATE, BackendRequest
from codex_proxy.protocol.responses_request import FUNCTIONS, decode
from codex_proxy.protocol.sse import Batch, Event, Run, is_utf8, singles
from codex_proxy.protocol.tokens import estimate
from codex_proxy.protocol.wire import Fields, JsonObject, dumps
from codex_proxy.trace import End, Usage, UsageSource

__all__ = [
    "RESPONSES",
    "Encoder",
    "decode",
    "failed_event",
    "failure_of",
    "has_text",
    "is_handshake",
    "limit_family",
    "make_encoder",
    "read_reset",
    "read_usage",
    "render_error",
    "set_exact_retry",
    "set_retry",
    "stream_error",
    "visible_headers",
    "words_of",
]

_KEEPALIVE = b'data: {"type":"keepalive"}\n\n'
# Before `response.created` an SDK helper raises on any event; a comment is none.
_COMMENT = b": keepalive\n\n"

# The same rule of thumb as `tokens.estimate`, for text that is not parsed.
_BYTES_PER_TOKEN = 4

_HANDSHAKE = frozenset({
    "response.created",
    "response.queued",
    "response.in_progress",
    "response.metadata",
})
_WORDS = frozenset({
    "response.output_text.delta",
    "response.refusal.delta",
    "response.function_call_arguments.delta",
    "response.custom_tool_call_input.delta",
})
_MODEL_HEADER = "openai-model"
_ETAG_HEADER = "x-models-etag"
_SAFE_HEADERS = frozenset({
    "cf-ray",
    "x-codex-safety-buffering-enabled",
    "x-codex-safety-buffering-faster-model",
    "x-oai-request-id",
    "x-reasoning-included",
    "x-request-id",
})
"""Headers of the backend that say nothing about the account that served."""


# Reading failures ------------------------------------------------------------------------


def is_handshake(event: Event) -> bool:
    """Tell whether *event* is only a greeting: after it another account may still try.

    A failure is no greeting; look with `failure_of` first.
    """
    kind = event.type
    if kind.startswith("response."):
        return kind in _HANDSHAKE
    return _error_payload(event) is None


def has_text(batch: Batch) -> bool:
    """Tell whether words of the answer are among the events, or of a call's arguments: not its reasoning."""
    for event in batch:
        kind = event.type
        if kind in _WORDS or (
            # All of an item may come without deltas; quotes in a text have a backslash before them.
            kind == "response.output_item.done" and b'"type":"reasoning"' not in event.data
        ):
            return True
    return False


def words_of(batch: Batch) -> bytes:
    """Return what the answer says in these events: its text, and with which arguments which tools are called."""
    said: list[str] = []
    for event in batch:
        if event.type in _WORDS:
            text = event.pieces.text if isinstance(event, Run) else event.json.get("delta")
            said.append(text if isinstance(text, str) else "")
        elif event.type == "response.output_item.added":
            item = event.json.get("item")
            if isinstance(item, dict) and item.get("type") != "reasoning":
                name = item.get("name")
                # A tool's name before its arguments; between two items, whatever they are, a line.
                said.append(f"\n[{name}] " if isinstance(name, str) else "\n")
    return "".join(said).encode("utf-8", "replace")


def failure_of(event: Event, *, now: float) -> UpstreamError | None:
    """Read *event* as a failure of the backend; None when it is none.

    Only the event's own error is read: an answer may well talk about usage limits.
    """
    payload = _error_payload(event)
    if payload is None:
        return None
    fault = fault_of(payload, "the backend failed while it answered")
    status = next((payload[key] for key in ("status", "status_code") if _is_status(payload.get(key))), None)
    resets_at, retry_after = read_reset(payload, now=now)
    headers = payload.get("headers")
    family = None
    if isinstance(headers, Mapping):
        lowered = {str(name).lower(): value for name, value in headers.items()}
        family = limit_family(lowered.get("x-codex-active-limit"))
        if retry_after is None:
            retry_after = _seconds(lowered.get("retry-after"))
    return UpstreamError(
        classify(status, fault),
        fault,
        status=status,
        retry_after=retry_after,
        resets_at=resets_at,
        limit_family=family,
        in_stream=True,
    )


def limit_family(value: Any) -> str | None:
    """Read the name of the limit that was reached; None when none is named."""
    return value.strip().lower().replace("-", "_") or None if isinstance(value, str) else None


def _error_payload(event: Event) -> JsonObject | None:
    kind = event.type
    if kind == "response.failed":
        response = event.json.get("response")
        return (
            response if isinstance(response, dict) and isinstance(response.get("error"), dict | str) else {}
        )
    if kind == "error":
        # The flat shape names itself: that word is not the error's type.
        return {key: value for key, value in event.json.items() if key != "type"}
    if kind == "keepalive" or kind.startswith(("response.", "codex.", "responsesapi.")):
        return None
    payload = event.json
    if isinstance(payload.get("error"), dict) or (
        not kind and (payload.get("error") or payload.get("detail"))
    ):
        return payload
    return None


def _is_status(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 400 <= value <= 599


_TRY_AGAIN = re.compile(
    r"(?i)try again in\s+(\d+(?:\.\d+)?)\s*(ms|milliseconds?|s|sec|seconds?|m|minutes?)\b"
)
_UNITS = {"ms": 0.001, "mi": 60.0, "s": 1.0, "se": 1.0, "m": 60.0}
# A time in milliseconds is past this, one in seconds is not for three thousand years.
_MILLISECONDS_FROM = 1e11


def read_reset(payload: Mapping[str, Any], *, now: float) -> tuple[float | None, float | None]:
    """Return when a limit ends (wall clock) and in how many seconds, as far as an error says.

    `resets_at`, then `resets_in_seconds`, then "try again in 1.5s" of the message; the
    fields stand in `error`, in `detail` or at the top.
    """
    source: Mapping[str, Any] = payload
    for key in ("error", "detail"):
        inner = payload.get(key)
        if isinstance(inner, Mapping):
            source = inner
            break
    resets_at = _seconds(source.get("resets_at"))
    if resets_at is not None and resets_at >= _MILLISECONDS_FROM:
        resets_at /= 1000.0
    if resets_at is not None and resets_at <= 0:
        resets_at = None
    wait = _seconds(source.get("resets_in_seconds"))
    if resets_at is not None:
        # What the backend counts itself needs no clock of ours.
        return resets_at, wait if wait is not None else max(resets_at - now, 0.0)
    if wait is not None:
        return now + wait, wait
    message = source.get("message")
    match = _TRY_AGAIN.search(message) if isinstance(message, str) else None
    if match is None:
        return None, _seconds(source.get("retry_after"))
    unit = match[2].lower()
    scale = 0.001 if unit == "ms" or unit.startswith("milli") else _UNITS[unit[:2]]
    return None, float(match[1]) * scale


def _seconds(value: Any) -> float | None:
    """Read a number of seconds that may have come as text; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) and number >= 0 else None


# Headers down ----------------------------------------------------------------------------


def visible_headers(
    headers: Mapping[str, Any],
    request: BackendRequest,
    *,
    wrap_turn_state: Callable[[str], str],
    models_etag: str | None = None,
) -> dict[str, Any]:
    """Return what of the backend's *headers* the caller may have.

    A Codex client gets what it reads: a model that differs from the one it asked for would
    make it warn of misuse, another etag would make it fetch its models again, and the
    turn-state is wrapped because it belongs to one account. Others need none of it.
    """
    if not request.is_codex:
        return {}
    visible: dict[str, Any] = {}
    for name, value in headers.items():
        lowered = name.lower()
        if lowered == _MODEL_HEADER:
            visible[name] = request.asked_model or value
        elif lowered == TURN_STATE:
            if isinstance(value, str) and value:
                visible[name] = wrap_turn_state(value)
        elif lowered == _ETAG_HEADER:
            if models_etag is not None:
                visible[name] = models_etag
        elif lowered in _SAFE_HEADERS:
            visible[name] = value
    return visible


# Encoding --------------------------------------------------------------------------------


def _no_limits() -> JsonObject | None:
    return None


def _unchanged(value: str) -> str:
    return value


def _epoch() -> float:
    return 0.0


def _untold(_: JsonObject) -> None:
    pass


class _Spelled(msgspec.Struct, forbid_unknown_fields=True, gc=False):
    """An event with a response object, of which nothing is read but the names."""

    type: str
    response: dict[str, msgspec.Raw]
    sequence_number: msgspec.Raw


_read_spelled = msgspec.json.Decoder(_Spelled).decode
_HEAD = re.compile(rb'\{"type":"response\.[a-z_]+","response":(?=\{)').match
_TAIL = re.compile(rb',"sequence_number":(?:0|[1-9]\d{0,15})\}').fullmatch

# From here on it is cheaper not to read all that an event repeats of the request.
_LARGE = 8192


def _place_of_response(data: bytes) -> tuple[int, int]:
    """Return where the response object stands in an event that is written as the backend does; zeros for any other."""
    head = _HEAD(data)
    end = data.rfind(b',"sequence_number":')
    return (head.end(), end) if head is not None and end > 0 and _TAIL(data, end) is not None else (0, 0)


def _read(data: bytes) -> _Spelled | None:
    try:
        return _read_spelled(data)
    except (ValueError, RecursionError):
        # Odd, such as half a character.
        return None


def _greeting(data: bytes, changed: bytes) -> tuple[bytes, bytes] | None:
    """Return the response object before and after a change; None when more than that has changed."""
    begin, end = _place_of_response(data)
    head, tail = data[:begin], data[end:]
    if not begin or not changed.startswith(head) or not changed.endswith(tail):
        return None
    return data[begin:end], changed[begin : -len(tail)]


class _Envelope:
    """An event around a response object, which repeats the request: of a large one only what changes is read and rendered."""

    __slots__ = ("_event", "_place", "fields")

    def __init__(self, event: Event, fields: Fields, place: tuple[int, int] | None = None) -> None:
        self._event = event
        self.fields = fields
        """The response object's."""
        self._place = place
        """Where it stands, if the rest of the event is to stay as it is."""

    @classmethod
    def open(cls, event: Event) -> "_Envelope | None":
        """Take *event* apart; None when there is no response object in it."""
        data = event.data
        if len(data) >= _LARGE:
            place = _place_of_response(data)
            spelled = _read(data) if place[0] and is_utf8(data) else None
            if spelled is not None and spelled.type == event.type:
                return cls(event, Fields(spelled.response, spelled=True), place)
        response = event.json.get("response")
        return cls(event, Fields(dict(response))) if isinstance(response, dict) else None

    def close(self) -> Event:
        """Return the event with the response object as it is now; the same event if that has not changed."""
        event = self._event
        if not self.fields.is_changed:
            return event
        if self._place is None:
            return Event.of({**event.json, "response": self.fields.whole()})
        begin, end = self._place
        return Event(event.type, event.data[:begin] + self.fields.render() + event.data[end:])


class Encoder:
    """Turn the backend's events into the caller's Responses stream.

    One encoder per turn. Events that nobody must change cost a look at their type. Nothing
    follows a terminal event, whoever it came from.

    Args:
        request: What was asked; says whose words are echoed and who is asking.
        pool_limits: The pool's view for `codex.rate_limits`; None leaves the event out.
        wrap_turn_state: Binds a turn-state to its account.
        models_etag: The etag of our own model list.
        count: Tokens of a text, for a local output limit.
        now: The wall clock, for the ends of limits and an answer that has no creation time.
        response_id: The id of an answer that the backend gave none.
        answered: Told `id` and `output` of an answer that ended well, as the caller sees them, before its event
            goes out.
    """

    def __init__(
        self,
        request: BackendRequest,
        *,
        pool_limits: Callable[[], JsonObject | None] = _no_limits,
        wrap_turn_state: Callable[[str], str] = _unchanged,
        models_etag: str | None = None,
        count: Callable[[str], int] = estimate,
        now: Callable[[], float] = _epoch,
        response_id: str = "resp_unknown",
        answered: Callable[[JsonObject], None] = _untold,
    ) -> None:
        self.usage = Usage()
        """From the terminal event; an estimate after `estimate`."""
        self.ended: End | None = None
        """How the answer ended; None while it runs."""
        self.failure: UpstreamError | None = None
        """The backend's failure after the answer had begun, for the account's record."""
        self.ended_early = False
        """Whether we ended it, at the caller's own limit: nothing is wrong with the account."""
        self.delivered = 0
        """About how many bytes of text went out; with a local limit, those that it does not count."""
        self._request = request
        self._is_codex = request.is_codex
        self._pool_limits = pool_limits
        self._wrap_turn_state = wrap_turn_state
        self._models_etag = models_etag
        self._now = now
        self._response_id = response_id
        self._answered = answered
        self._limit = (
            OutputLimit(request.max_output_tokens, count) if request.max_output_tokens is not None else None
        )
        self._response: Fields | None = None
        self._greeting: tuple[bytes, bytes] | None = None
        """The response object of `created`, as it came and as it went: `in_progress` repeats it."""
        self._final: Fields | None = None
        self._done: list[Event] = []
        self._last: Event | None = None
        self._written = 0

    @property
    def finished(self) -> bool:
        """Whether the caller has its terminal event; nothing more will come."""
        return self.ended is not None

    def encode(self, batch: Batch) -> bytes:
        """Return the frames for *batch*; empty when it holds nothing for this caller."""
        return b"".join([event.frame() for event in self._encoded(batch)])

    def events(self, batch: Batch) -> Batch:
        """Return the events that go out for *batch*, one by one."""
        return singles(self._encoded(batch))

    def _encoded(self, batch: Batch) -> Batch:
        out: Batch = []
        handlers = self._handlers
        for event in batch:
            if self.ended is not None:
                break
            kind = event.type
            handler = handlers.get(kind)
            if handler is not None:
                handler(self, event, out)
            elif kind.startswith("response."):
                self._pass(event, out)
            else:
                self._on_foreign(event, out)
        return out

    def whole(self) -> bytes:
        """Return the final response object as JSON: what the terminal event holds."""
        assert self._final is not None, "the answer has not ended well"
        return self._final.render()

    def keepalive(self) -> bytes:
        """Return a frame that keeps the connection and the client's idle timer alive.

        The Codex CLI counts only JSON events; a helper of an SDK takes one only after `created`.
        """
        return _KEEPALIVE if self._is_codex or self._response is not None else _COMMENT

    def cut(self, error: ProxyError) -> bytes:
        """Return our own terminal event for *error* as frames; empty when the answer has already ended."""
        return b"".join([event.frame() for event in self.last_events(error)])

    def last_events(self, error: ProxyError) -> Batch:
        """Return what ends the answer with *error*; empty when it has already ended.

        Always `response.failed`: the Codex CLI ignores an `error` event over HTTP.
        """
        out: Batch = []
        if self.ended is None:
            self._fail(error, {}, out)
        return out

    def nothing(self) -> Batch:
        """Return a whole answer without a word in it, for a request that is not to be generated."""
        started = self._skeleton()
        self._response = Fields(started)
        final = {**started, "status": "completed", "usage": _whole_usage({})}
        out: Batch = []
        for kind, response in (("created", started), ("completed", final)):
            event = {"type": f"response.{kind}", "response": response, "sequence_number": len(out)}
            self._emit(Event.of(event), out)
        self._finish(Fields(final), End.COMPLETED)
        return out

    def estimate(self) -> Usage:
        """Return the usage, estimated from what was sent and delivered unless the backend said it."""
        if self.usage.source is not UsageSource.BACKEND:
            visible, delivered = 0, self.delivered
            if self._limit is not None:
                visible = self._limit.used
            elif not delivered:
                delivered = sum(_item_size(item) for _, item in self._done_items())
            self.usage = Usage(
                input_tokens=math.ceil(self._request.input_bytes / _BYTES_PER_TOKEN),
                output_tokens=visible + math.ceil(delivered / _BYTES_PER_TOKEN),
                source=UsageSource.ESTIMATE,
            )
        return self.usage

    # What passes

    def _pass(self, event: Event, out: Batch) -> None:
        # Once per delta: no calls that can be spared, `_emit` is written out.
        if self._response is None and not self._is_codex:
            self._create(event, out)
        if self._limit is not None:
            for one in singles([event]):
                if self.ended is None:
                    self._pass_limited(one, out)
            return
        if isinstance(event, Run):
            texts = event.pieces.spelled
            self.delivered += sum(map(len, texts))
            self._last = event
            self._written += len(texts)
            out.append(event)
            return
        data = event.data
        start = data.find(b'"delta":"')
        if start > 0:
            end = data.find(b'"', start + 9)
            if end < 0 or data[end - 1] == 0x5C:
                end = _string_end(data, end)
            self.delivered += end - start - 9
        self._last = event
        self._written += 1
        out.append(event)

    def _pass_limited(self, event: Event, out: Batch) -> None:
        assert self._limit is not None
        before = self._limit.used
        for passed in self._limit.take(event):
            if passed.type == "response.output_item.done":
                self._done.append(passed)
            self._emit(passed, out)
        if event.type.endswith(".delta") and self._limit.used == before:
            self.delivered += _delta_size(event.data)
        if self._limit.is_reached:
            self._end_early(out)

    def _emit(self, event: Event, out: Batch) -> None:
        self._last = event
        self._written += 1
        out.append(event)

    def _on_foreign(self, event: Event, out: Batch) -> None:
        if _error_payload(event) is not None:
            self._on_failure(event, out)
        elif self._is_codex and event.type:
            # Not counted: these have no sequence number.
            out.append(event)

    def _on_rate_limits(self, event: Event, out: Batch) -> None:
        view = self._pool_limits() if self._is_codex else None
        if view is not None:
            out.append(Event.of({"type": event.type, **view}))

    def _on_metadata(self, event: Event, out: Batch) -> None:
        if not self._is_codex:
            return
        headers = event.json.get("headers")
        if isinstance(headers, dict):
            event = Event.of({**event.json, "headers": self._headers(headers)})
        out.append(event)

    def _on_item(self, event: Event, out: Batch) -> None:
        if self._request.was_lite_encoded:
            item = event.json.get("item")
            if isinstance(item, dict) and _is_lite_call(item):
                event = Event.of({**event.json, "item": _without_namespace(item)})
        self._greeting = None
        if event.type == "response.output_item.done" and self._limit is None:
            self._done.append(event)
        self._pass(event, out)

    # Response objects

    def _on_created(self, event: Event, out: Batch) -> None:
        envelope = _Envelope.open(event)
        changed = event
        if envelope is not None:
            self._change(envelope.fields)
            changed = envelope.close()
            self._greeting = _greeting(event.data, changed.data)
        if self._response is None:
            self._response = envelope.fields if envelope is not None else Fields({})
        self._emit(changed, out)

    def _on_progress(self, event: Event, out: Batch) -> None:
        if self._response is None and not self._is_codex:
            return
        begin, end = _place_of_response(event.data)
        if begin and self._greeting is not None and event.data[begin:end] == self._greeting[0]:
            event = Event(event.type, event.data[:begin] + self._greeting[1] + event.data[end:])
        else:
            envelope = _Envelope.open(event)
            if envelope is not None:
                self._change(envelope.fields)
                event = envelope.close()
        self._emit(event, out)

    def _on_end(self, event: Event, out: Batch) -> None:
        envelope = _Envelope.open(event)
        if envelope is None:
            if not event.json:
                # Broken on its way: an end that nobody can read is none.
                return
            envelope = _Envelope(event, Fields({}))
        if self._response is None and not self._is_codex:
            self._create(event, out)
        final = envelope.fields
        self._change(final)
        self._complete(final, event.type.removeprefix("response."))
        self._emit(envelope.close(), out)
        self._finish(final, End.COMPLETED if event.type == "response.completed" else End.INCOMPLETE)

    def _finish(self, final: Fields, end: End) -> None:
        self._final = final
        self.ended = end
        if self._answered is not _untold:
            self._answered({"id": final.get("id"), "output": final.get("output")})

    def _create(self, event: Event, out: Batch) -> None:
        """Open the answer in the backend's place: an SDK helper takes nothing before `created`."""
        response = self._skeleton()
        self._response = Fields(response)
        self._emit(
            Event.of({
                "type": "response.created",
                "response": response,
                "sequence_number": max(_number(event.json.get("sequence_number")) - 1, 0),
            }),
            out,
        )

    def _begun(self) -> JsonObject:
        """Return the response object as the answer began with it."""
        return (self._response.whole() if self._response is not None else {}) or self._skeleton()

    def _change(self, response: Fields) -> None:
        """Make *response* what the caller may see."""
        request = self._request
        if request.asked_model:
            response.put("model", request.asked_model)
        if request.previous_response_id is not None:
            response.put("previous_response_id", request.previous_response_id)
        for name in ("safety_identifier", "user"):
            # They name the account's owner.
            if name in response:
                response.put(name, None)
        headers = response.get("headers")
        if isinstance(headers, dict):
            visible = self._headers(headers)
            if visible:
                response.put("headers", visible)
            else:
                response.drop("headers")
        if request.was_lite_encoded:
            output, choice = response.get("output"), response.get("tool_choice")
            if isinstance(output, list):
                response.put(
                    "output", [_without_namespace(item) if _is_lite_call(item) else item for item in output]
                )
            if isinstance(choice, dict):
                response.put("tool_choice", _plain_choice(choice))

    def _complete(self, response: Fields, status: str) -> None:
        """Fill in what the backend leaves out of a final response, and read its usage."""
        if not self._is_codex and "object" not in response:
            for name, value in self._begun().items():
                if name not in response:
                    response.put(name, value)
            response.put("status", status)
        output = response.get("output")
        if not isinstance(output, list) or not output:
            response.put("output", [item for _, item in self._done_items()])
        elif any(isinstance(item, dict) and not item.get("id") for item in output):
            done = self._done_items()
            # The indexes of the events may have gaps, a list has none: if none is missing, by order.
            items = dict(enumerate(item for _, item in done) if len(done) == len(output) else done)
            response.put("output", [_with_id(item, items.get(index)) for index, item in enumerate(output)])
        usage = response.get("usage")
        if isinstance(usage, dict):
            usage = _whole_usage(usage)
            self.usage = read_usage(usage)
            response.put("usage", usage)
        elif usage is not None:
            response.put("usage", None)

    def _done_items(self) -> list[tuple[int, JsonObject]]:
        """Return the items that are done, by their place in the output."""
        items: dict[tuple[int, Any], JsonObject] = {}
        for arrival, event in enumerate(self._done):
            item = event.json.get("item")
            if isinstance(item, dict):
                index = event.json.get("output_index")
                # Two items may claim one place; the same one told twice is one.
                key = item.get("id") or item.get("call_id") or ""
                items[index if isinstance(index, int) else arrival, str(key)] = item
        return sorted(((index, item) for (index, _), item in items.items()), key=lambda pair: pair[0])

    def _headers(self, headers: JsonObject) -> JsonObject:
        return visible_headers(
            headers, self._request, wrap_turn_state=self._wrap_turn_state, models_etag=self._models_etag
        )

    def _skeleton(self) -> JsonObject:
        """Return a response object with every field that a strict reader asks for."""
        return {
            "id": self._response_id,
            "object": "response",
            "created_at": int(self._now()),
            "status": "in_progress",
            "error": None,
            "incomplete_details": None,
            "instructions": None,
            "max_output_tokens": None,
            "metadata": {},
            "model": self._request.asked_model,
            "output": [],
            "parallel_tool_calls": True,
            "previous_response_id": self._request.previous_response_id,
            "store": False,
            "temperature": None,
            "tool_choice": "auto",
            "tools": [],
            "top_p": None,
            "usage": None,
            "user": None,
        }

    # Ends that are ours

    def _on_failure(self, event: Event, out: Batch) -> None:
        failure = failure_of(event, now=self._now())
        assert failure is not None
        response = event.json.get("response")
        fields = Fields({})
        if isinstance(response, dict):
            fields = Fields(dict(response))
            self._change(fields)
        self.failure = failure
        self._fail(failure, fields.whole(), out, sequence=event.json.get("sequence_number"))

    def _fail(self, error: ProxyError, response: JsonObject, out: Batch, *, sequence: Any = None) -> None:
        if self._response is None:
            self._create(Event.of({"sequence_number": sequence}), out)
        code, message = _terminal_words(error)
        body = {
            **self._begun(),
            **response,
            "status": "failed",
            "error": {"code": code, "message": message},
        }
        if isinstance(body.get("usage"), dict):
            body["usage"] = _whole_usage(body["usage"])
            self.usage = read_usage(body["usage"])
        self._emit(self._terminal("response.failed", body, sequence), out)
        self.ended = End.FAILED

    def _end_early(self, out: Batch) -> None:
        usage = self.estimate()
        body = {
            **self._begun(),
            "status": "incomplete",
            "incomplete_details": {"reason": "max_output_tokens"},
            "output": [item for _, item in self._done_items()],
            "usage": _whole_usage({
                "input_tokens": usage.input_tokens,
                "output_tokens": usage.output_tokens,
                "total_tokens": usage.total_tokens,
            }),
        }
        self._emit(self._terminal("response.incomplete", body, None), out)
        self._finish(Fields(body), End.INCOMPLETE)
        self.ended_early = True

    def _terminal(self, kind: str, response: JsonObject, sequence: Any) -> Event:
        following = self._next_sequence()
        number = max(_number(sequence), following)
        return Event.of({"type": kind, "response": response, "sequence_number": number})

    def _next_sequence(self) -> int:
        """Return the number after the last event's; only an end of ours needs to look."""
        event = singles([self._last])[-1] if self._last is not None else None
        last = event.json.get("sequence_number") if event is not None else None
        return _number(last) + 1 if last is not None else self._written

    _handlers: ClassVar[Mapping[str, Callable[["Encoder", Event, Batch], None]]] = {
        "response.created": _on_created,
        "response.queued": _on_progress,
        "response.in_progress": _on_progress,
        "response.output_item.added": _on_item,
        "response.output_item.done": _on_item,
        "response.completed": _on_end,
        "response.incomplete": _on_end,
        "response.failed": _on_failure,
        "error": _on_failure,
        "response.metadata": _on_metadata,
        "codex.response.metadata": _on_metadata,
        "codex.rate_limits": _on_rate_limits,
    }


def read_usage(usage: Mapping[str, Any]) -> Usage:
    """Return the backend's `usage` object as numbers; what is missing or odd counts as 0."""
    into, out = usage.get("input_tokens_details"), usage.get("output_tokens_details")
    into, out = into if isinstance(into, dict) else {}, out if isinstance(out, dict) else {}
    return Usage(
        input_tokens=_number(usage.get("input_tokens")),
        cached_tokens=_number(into.get("cached_tokens")),
        cache_write_tokens=_number(into.get("cache_write_tokens")),
        output_tokens=_number(usage.get("output_tokens")),
        reasoning_tokens=_number(out.get("reasoning_tokens")),
        source=UsageSource.BACKEND,
    )


def _with_id(item: Any, done: JsonObject | None) -> Any:
    if not isinstance(item, dict) or item.get("id") or done is None or not done.get("id"):
        return item
    return {**item, "id": done["id"]}


def _is_lite_call(item: Any) -> bool:
    return (
        isinstance(item, dict)
        and item.get("namespace") == FUNCTIONS
        and item.get("type") in ("function_call", "custom_tool_call")
    )


def _plain_choice(choice: JsonObject) -> JsonObject:
    """Return the echo of a tool choice as the caller wrote it, before we named our namespace."""
    tools = choice.get("tools")
    if isinstance(tools, list):
        choice = {**choice, "tools": [_plain_choice(t) if isinstance(t, dict) else t for t in tools]}
    return _without_namespace(choice) if choice.get("namespace") == FUNCTIONS else choice


def _without_namespace(item: JsonObject) -> JsonObject:
    return {name: value for name, value in item.items() if name != "namespace"}


def _whole_usage(usage: JsonObject) -> JsonObject:
    """Return *usage* with the numbers that strict readers ask for and older backends leave out."""
    whole = dict(usage)
    for name, fields in (
        ("input_tokens_details", ("cached_tokens", "cache_write_tokens")),
        ("output_tokens_details", ("reasoning_tokens",)),
    ):
        details = whole.get(name)
        details = dict(details) if isinstance(details, dict) else {}
        for key in fields:
            if details.get(key) is None:
                details[key] = 0
        whole[name] = details
    for name in ("input_tokens", "output_tokens"):
        if not isinstance(whole.get(name), int):
            # The Codex CLI takes a usage without its numbers for a broken stream.
            whole[name] = 0
    if not isinstance(whole.get("total_tokens"), int):
        whole["total_tokens"] = _number(whole.get("input_tokens")) + _number(whole.get("output_tokens"))
    return whole


def _number(value: Any) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else 0


def _delta_size(data: bytes) -> int:
    """Return about how long the delta is, without parsing: escapes count as they stand."""
    start = data.find(b'"delta":"')
    return _string_end(data, data.find(b'"', start + 9)) - start - 9 if start > 0 else 0


def _string_end(data: bytes, end: int) -> int:
    """Return where the string really ends whose first quote mark stands at *end*."""
    while end > 0 and data[end - 1] == 0x5C:
        backslashes = end - len(data[:end].rstrip(b"\\"))
        if backslashes % 2 == 0:
            break
        end = data.find(b'"', end + 1)
    return end if end > 0 else len(data)


def _item_size(item: JsonObject) -> int:
    """Return the bytes of text in an item that came without deltas."""
    texts: list[Any] = [item.get("arguments"), item.get("input")]
    for name in ("content", "summary"):
        parts = item.get(name)
        if isinstance(parts, list):
            texts += [part.get("text") or part.get("refusal") for part in parts if isinstance(part, dict)]
    return sum(len(text.encode("utf-8", "replace")) for text in texts if isinstance(text, str))


# Failures in the caller's words ------------------------------------------------------------

# The Codex CLI reads the number, waits that long and tries again (contract, section 3.1).
_RETRY_SOON = "the backend has no room for this just now, please try again in 1s"

_OWN_WORDS: Final = frozenset({Verdict.CUT, Verdict.SILENT})
"""Verdicts of ours: their messages were written here and name no account."""


def _terminal_words(error: ProxyError) -> tuple[str, str]:
    """Return code and message of a `response.failed`.

    An account's trouble becomes `rate_limit_exceeded`: a usage limit in this place is not
    understood by the Codex CLI, and its next try gets another account, or the true status.
    """
    if isinstance(error, UpstreamError):
        fault, verdict = error.fault, error.verdict
        if verdict is Verdict.CALLER:
            # Without a code of its own the CLI would try it six times.
            code = fault.code or (fault.type if fault.type != "invalid_request_error" else None)
            return code or "invalid_prompt", fault.message
        if verdict in _OWN_WORDS:
            return "server_error", fault.message
        if verdict is Verdict.SERVER:
            return "server_error", error.servers_words
        return "rate_limit_exceeded", _RETRY_SOON
    if isinstance(error, PoolShortage) and error.retry_after > 1:
        wait = math.ceil(error.retry_after)
        return "rate_limit_exceeded", f"no account is free just now, please try again in {wait}s"
    if isinstance(error, PoolError):
        return "rate_limit_exceeded", _RETRY_SOON
    if isinstance(error, RateLimited):
        wait = max(math.ceil(error.retry_after), 1)
        return "rate_limit_exceeded", f"{error.message}; please try again in {wait}s"
    if isinstance(error, OutOfFunds):
        # Also a budget with an end: this is the code that the CLI knows and does not repeat.
        return "insufficient_quota", error.message
    if isinstance(error, RequestError):
        return error.code or "invalid_prompt", error.message
    return error.code or "server_error", error.message


def failed_event(error: ProxyError, response: JsonObject, sequence: int) -> Event:
    """Return the `response.failed` that ends an answer of which *response* is known."""
    code, message = _terminal_words(error)
    body = {**response, "status": "failed", "error": {"code": code, "message": message}}
    return Event.of({"type": "response.failed", "response": body, "sequence_number": sequence})


def stream_error(error: ProxyError) -> bytes:
    """Render *error* for a stream of OpenAI's older dialects: a failed attempt in the words of `response.failed`."""
    if not isinstance(error, UpstreamError):
        # The state of the pool, for one: only the Codex CLI has to be told another.
        return render_error(error, request_id="")[2]
    code, message = _terminal_words(error)
    kind = "invalid_request_error" if error.verdict is Verdict.CALLER else code
    return dumps({"error": {"message": message, "type": kind, "param": None, "code": code}})


# Past this wait an SDK that retries would sleep for hours; it is told not to.
_LONGEST_RETRY = 60.0


def render_error(error: ProxyError, *, request_id: str) -> tuple[int, dict[str, str], bytes]:
    """Render *error* as an HTTP answer in OpenAI's shape: status, headers, body."""
    headers = {"content-type": "application/json", "x-request-id": request_id}
    status = error.status
    body: JsonObject = {"message": error.message, "type": error.type, "param": None, "code": error.code}
    if isinstance(error, RequestError):
        body["param"] = error.param
        if error.allow is not None:
            headers["allow"] = error.allow
    elif isinstance(error, KeyRefused):
        headers["www-authenticate"] = "Bearer"
    elif isinstance(error, NotAllowed):
        body["param"] = error.param
    elif isinstance(error, PoolExhausted | BudgetUsedUp):
        wait = max(math.ceil(error.retry_after), 1)
        body |= {"resets_at": math.ceil(error.resets_at), "resets_in_seconds": wait}
        set_retry(headers, wait)
    elif isinstance(error, RateLimited):
        set_exact_retry(headers, error.retry_after)
    elif isinstance(error, PoolShortage | TooManyGuesses | LedgerAway):
        set_retry(headers, error.retry_after)
    elif isinstance(error, PoolEmpty | OutOfFunds):
        headers["x-should-retry"] = "false"
    elif isinstance(error, UpstreamError):
        status = _render_upstream(error, headers, body)
    elif isinstance(error, ConfigError):
        # It quotes the configuration, which is its owner's business.
        body["message"] = "the proxy has a wrong setting; its log says which"
    return status, {**headers, **error.headers}, dumps({"error": body})


def _render_upstream(error: UpstreamError, headers: dict[str, str], body: JsonObject) -> int:
    fault = error.fault
    if error.verdict is not Verdict.CALLER:
        # The trouble of one account, and no other was left.
        body |= {"message": _RETRY_SOON, "type": "rate_limit_exceeded", "code": "rate_limit_exceeded"}
        set_retry(headers, 1)
        return 429
    body |= {
        "message": fault.message,
        "type": fault.type or "invalid_request_error",
        "param": fault.param,
        "code": fault.code,
    }
    return error.callers_status


def set_retry(headers: dict[str, str], seconds: float) -> None:
    """Say in *headers* after which time another try is worth it, in whole seconds, at least one."""
    wait = max(math.ceil(seconds), 1)
    headers["retry-after"] = str(wait)
    if wait > _LONGEST_RETRY:
        headers["x-should-retry"] = "false"


def set_exact_retry(headers: dict[str, str], seconds: float) -> None:
    """Say it in milliseconds too, which the SDKs prefer where it is there."""
    set_retry(headers, seconds)
    headers["retry-after-ms"] = str(max(math.ceil(seconds * 1000), 1))


# The dialect ------------------------------------------------------------------------------


def _decode(raw: bytes, headers: Mapping[str, str], *, catalog: Catalog, caller: str = "") -> Decoded:
    request = decode(raw, headers, catalog=catalog, caller=caller)
    return Decoded(request, functools.partial(make_encoder, request))


def make_encoder(
    request: BackendRequest, around: Surroundings, answered: Callable[[JsonObject], None] = _untold
) -> Encoder:
    """Return the encoder of a turn's answer; see `Encoder`."""
    return Encoder(
        request,
        pool_limits=around.pool_limits,
        wrap_turn_state=around.wrap_turn_state,
        models_etag=around.models_etag,
        now=around.now,
        response_id=f"resp_{around.unique}",
        answered=answered,
    )


RESPONSES = Dialect("openai", _decode, render_error)
