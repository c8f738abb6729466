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
from typing import Any, Final

from codex_proxy.errors import (
    ConfigError,
    KeyRefused,
    PoolEmpty,
    PoolError,
    PoolExhausted,
    PoolShortage,
    ProxyError,
    RequestError,
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
from codex_proxy.protocol.sse import Batch, Event
from codex_proxy.protocol.tokens import estimate
from codex_proxy.protocol.wire import JsonObject, dumps
from codex_proxy.trace import End, Usage, UsageSource

__all__ = [
    "RESPONSES",
    "Encoder",
    "decode",
    "failure_of",
    "is_handshake",
    "limit_family",
    "make_encoder",
    "read_reset",
    "read_usage",
    "render_error",
    "set_retry",
    "stream_error",
    "visible_headers",
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
        answered: Told of the final response object of an answer that ended well, before its event goes out.
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
        self._response: JsonObject | None = None
        self._final: JsonObject | None = None
        self._done: list[Event] = []
        self._last: Event | None = None
        self._written = 0
        self._handlers: dict[str, Callable[[Event, Batch], None]] = {
            "response.created": self._on_created,
            "response.queued": self._on_progress,
            "response.in_progress": self._on_progress,
            "response.output_item.added": self._on_item,
            "response.output_item.done": self._on_item,
            "response.completed": self._on_end,
            "response.incomplete": self._on_end,
            "response.failed": self._on_failure,
            "error": self._on_failure,
            "response.metadata": self._on_metadata,
            "codex.response.metadata": self._on_metadata,
            "codex.rate_limits": self._on_rate_limits,
        }

    @property
    def finished(self) -> bool:
        """Whether the caller has its terminal event; nothing more will come."""
        return self.ended is not None

    def encode(self, batch: Batch) -> bytes:
        """Return the frames for *batch*; empty when it holds nothing for this caller."""
        return b"".join([event.frame() for event in self.events(batch)])

    def events(self, batch: Batch) -> Batch:
        """Return the events that go out for *batch*."""
        out: Batch = []
        handlers = self._handlers
        for event in batch:
            if self.ended is not None:
                break
            kind = event.type
            handler = handlers.get(kind)
            if handler is not None:
                handler(event, out)
            elif kind.startswith("response."):
                self._pass(event, out)
            else:
                self._on_foreign(event, out)
        return out

    def whole(self) -> bytes:
        """Return the final response object as JSON: what the terminal event holds."""
        assert self._final is not None, "the answer has not ended well"
        return dumps(self._final)

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
        started = self._response = self._skeleton()
        final = {**started, "status": "completed", "usage": _whole_usage({})}
        out: Batch = []
        for kind, response in (("created", started), ("completed", final)):
            event = {"type": f"response.{kind}", "response": response, "sequence_number": len(out)}
            self._emit(Event.of(event), out)
        self._finish(final, End.COMPLETED)
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
            self._pass_limited(event, out)
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
        if event.type == "response.output_item.done" and self._limit is None:
            self._done.append(event)
        self._pass(event, out)

    # Response objects

    def _on_created(self, event: Event, out: Batch) -> None:
        changed = self._with_response(event)
        if self._response is None:
            response = changed.json.get("response")
            self._response = response if isinstance(response, dict) else {}
        self._emit(changed, out)

    def _on_progress(self, event: Event, out: Batch) -> None:
        if self._response is not None or self._is_codex:
            self._emit(self._with_response(event), out)

    def _on_end(self, event: Event, out: Batch) -> None:
        if not event.json:
            # Broken on its way: an end that nobody can read is none.
            return
        if self._response is None and not self._is_codex:
            self._create(event, out)
        response = event.json.get("response")
        response = response if isinstance(response, dict) else {}
        changed = self._response_object(response)
        self._complete(changed, event.type.removeprefix("response."))
        self._read_usage(changed)
        self._emit(_with(event, response, changed), out)
        self._finish(changed, End.COMPLETED if event.type == "response.completed" else End.INCOMPLETE)

    def _finish(self, final: JsonObject, end: End) -> None:
        self._final = final
        self.ended = end
        self._answered(final)

    def _create(self, event: Event, out: Batch) -> None:
        """Open the answer in the backend's place: an SDK helper takes nothing before `created`."""
        self._response = self._skeleton()
        self._emit(
            Event.of({
                "type": "response.created",
                "response": self._response,
                "sequence_number": max(_number(event.json.get("sequence_number")) - 1, 0),
            }),
            out,
        )

    def _with_response(self, event: Event) -> Event:
        response = event.json.get("response")
        if not isinstance(response, dict):
            return event
        return _with(event, response, self._response_object(response))

    def _response_object(self, response: JsonObject) -> JsonObject:
        """Return *response* as the caller may see it; a new dict, the old one is not ours."""
        changed = dict(response)
        if self._request.asked_model:
            changed["model"] = self._request.asked_model
        if self._request.previous_response_id is not None:
            changed["previous_response_id"] = self._request.previous_response_id
        for name in ("safety_identifier", "user"):
            # They name the account's owner.
            if changed.get(name) is not None:
                changed[name] = None
        headers = changed.get("headers")
        if isinstance(headers, dict):
            changed["headers"] = self._headers(headers)
            if not changed["headers"]:
                del changed["headers"]
        if self._request.was_lite_encoded:
            if isinstance(changed.get("output"), list):
                changed["output"] = [
                    _without_namespace(item) if _is_lite_call(item) else item for item in changed["output"]
                ]
            choice = changed.get("tool_choice")
            if isinstance(choice, dict):
                changed["tool_choice"] = _plain_choice(choice)
        return changed

    def _complete(self, response: JsonObject, status: str) -> None:
        """Fill in what the backend leaves out of a final response, in place."""
        if not self._is_codex and "object" not in response:
            for name, value in (self._response or self._skeleton()).items():
                response.setdefault(name, value)
            response["status"] = status
        output = response.get("output")
        if not isinstance(output, list) or not output:
            response["output"] = [item for _, item in self._done_items()]
        elif any(isinstance(item, dict) and not item.get("id") for item in output):
            done = self._done_items()
            # The indexes of the events may have gaps, a list has none: if none is missing, by order.
            items = dict(enumerate(item for _, item in done) if len(done) == len(output) else done)
            response["output"] = [_with_id(item, items.get(index)) for index, item in enumerate(output)]
        usage = response.get("usage")
        if isinstance(usage, dict):
            response["usage"] = _whole_usage(usage)
        elif usage is not None:
            response["usage"] = None

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
        response = self._response_object(response) if isinstance(response, dict) else {}
        self.failure = failure
        self._fail(failure, response, out, sequence=event.json.get("sequence_number"))

    def _fail(self, error: ProxyError, response: JsonObject, out: Batch, *, sequence: Any = None) -> None:
        if self._response is None:
            self._create(Event.of({"sequence_number": sequence}), out)
        code, message = _terminal_words(error)
        body = {
            **(self._response or self._skeleton()),
            **response,
            "status": "failed",
            "error": {"code": code, "message": message},
        }
        if isinstance(body.get("usage"), dict):
            body["usage"] = _whole_usage(body["usage"])
            self._read_usage(body)
        self._emit(self._terminal("response.failed", body, sequence), out)
        self.ended = End.FAILED

    def _end_early(self, out: Batch) -> None:
        usage = self.estimate()
        body = {
            **(self._response or self._skeleton()),
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
        self._finish(body, End.INCOMPLETE)
        self.ended_early = True

    def _terminal(self, kind: str, response: JsonObject, sequence: Any) -> Event:
        following = self._next_sequence()
        number = max(_number(sequence), following)
        return Event.of({"type": kind, "response": response, "sequence_number": number})

    def _next_sequence(self) -> int:
        """Return the number after the last event's; only an end of ours needs to look."""
        last = self._last.json.get("sequence_number") if self._last is not None else None
        return _number(last) + 1 if last is not None else self._written

    def _read_usage(self, response: JsonObject) -> None:
        usage = response.get("usage")
        if isinstance(usage, dict):
            self.usage = read_usage(usage)


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


def _with(event: Event, old: JsonObject, new: JsonObject) -> Event:
    """Return *event* with another response; itself, byte for byte, when they are equal."""
    return event if new == old else Event.of({**event.json, "response": new})


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
    if isinstance(error, RequestError):
        return error.code or "invalid_prompt", error.message
    return error.code or "server_error", error.message


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
    elif isinstance(error, PoolExhausted):
        wait = max(math.ceil(error.retry_after), 1)
        body |= {"resets_at": math.ceil(error.resets_at), "resets_in_seconds": wait}
        set_retry(headers, wait)
    elif isinstance(error, PoolShortage):
        set_retry(headers, error.retry_after)
    elif isinstance(error, PoolEmpty):
        headers["x-should-retry"] = "false"
    elif isinstance(error, UpstreamError):
        status = _render_upstream(error, headers, body)
    elif isinstance(error, ConfigError):
        # It quotes the configuration, which is its owner's business.
        body["message"] = "the proxy has a wrong setting; its log says which"
    return status, headers, dumps({"error": body})


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
