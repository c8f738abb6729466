"""Where an answer meets the caller's connection: one sink per way of answering.

A sink writes nothing before `open`, so a failure until then is still an HTTP status: it is
kept, and raised where the handler asks for the `result`.
"""

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass

from aiohttp import web

from codex_proxy.errors import ProxyError, UpstreamError
from codex_proxy.protocol.collect import Collector
from codex_proxy.protocol.dialect import Decoded, Dialect, Surroundings
from codex_proxy.protocol.request import BackendRequest
from codex_proxy.protocol.responses import read_usage, visible_headers
from codex_proxy.protocol.sse import Batch
from codex_proxy.protocol.watchers import Watcher
from codex_proxy.protocol.wire import BadJson, JsonObject, loads_lenient
from codex_proxy.server.eventstream import EventStream
from codex_proxy.server.front import Incoming, new_id
from codex_proxy.trace import End, Trace, Usage, UsageSource
from codex_proxy.upstream.executor import Head
from codex_proxy.upstream.route import Lease

_TAIL_BYTES = 4096
_PARSE = json.JSONDecoder().raw_decode


@dataclass(slots=True)
class Terms:
    """What an answer needs to know of the proxy that gives it, and of the way it was asked for."""

    dialect: Dialect
    now: Callable[[], float]
    """The wall clock."""
    limits: Callable[[], JsonObject | None]
    """The pool's own view of its quota."""
    models_etag: str
    stall_seconds: float
    """How long a caller may read nothing."""


class Sink:
    """What all sinks share: the request, its story, and an error that nothing was said of yet."""

    def __init__(self, request: BackendRequest, trace: Trace, terms: Terms) -> None:
        self._request = request
        self._trace = trace
        self._terms = terms
        self._error: ProxyError | None = None
        self.failure: UpstreamError | None = None
        self._delivered = 0

    is_stream = False
    keeps_alive_early = False
    ended_early = False

    async def pass_on(self, data: bytes) -> None:
        """Take nothing: an answer that passes as it is has an encoded one's sink."""
        raise AssertionError("no answer passes here as it is")

    def mute(self) -> None:
        """Do nothing: what is not encoded comes from accounts, whose answers are not read on."""

    @property
    def wants_failure_events(self) -> bool:
        """Whether a refusal of the request may go out as an event: the Codex CLI reads its code there."""
        return self.is_stream and self._request.is_codex

    @property
    def delivered_bytes(self) -> int:
        """How many bytes of an answer went to the caller."""
        return self._delivered

    @property
    def text_bytes(self) -> int:
        """How much text there is; of an answer that we do not look into, all of it."""
        return self._delivered

    def _refuse(self, error: ProxyError) -> ProxyError:
        """Keep *error*, in the dialect's words, for whoever makes a status of it."""
        dialect = self._terms.dialect
        self._error = dialect.reword(error, self._request)
        self._error.headers = self._allowance()
        self._trace.status = dialect.render_error(self._error, request_id=self._trace.id)[0]
        return self._error

    def _headers(self, head: Head) -> dict[str, str]:
        """Return what of the backend's headers the caller may see."""
        headers = visible_headers(
            head.headers,
            self._request,
            wrap_turn_state=head.lease.wrap_turn_state,
            models_etag=self._terms.models_etag,
        )
        if self._request.is_codex:
            headers.update(limit_headers(self._terms.limits()))
        return {name: str(value) for name, value in headers.items()} | self._allowance()

    def _allowance(self) -> dict[str, str]:
        """Return what the caller may still ask, where it has limits."""
        allowance = self._trace.allowance
        if allowance is None:
            return {}
        return self._terms.dialect.allowance_headers(allowance, self._terms.now())


class EncodedSink(Sink):
    """What the sinks share whose answer is made of events: the encoder, and what it knows."""

    def __init__(self, decoded: Decoded, trace: Trace, terms: Terms) -> None:
        super().__init__(decoded.request, trace, terms)
        self._lease: Lease | None = None
        self._watcher: Watcher | None = None
        """What knows of an answer that passes as it is: then nothing is encoded."""
        self._answered = decoded.answered
        self._is_muted = False
        """The caller has left, and its answer is read on."""
        self._encoder = decoded.make_encoder(
            Surroundings(
                now=terms.now,
                unique=new_id(),
                pool_limits=terms.limits,
                wrap_turn_state=self._wrap_turn_state,
                models_etag=terms.models_etag,
            )
        )

    def _wrap_turn_state(self, value: str) -> str:
        return self._lease.wrap_turn_state(value) if self._lease is not None else value

    @property
    def ended_early(self) -> bool:  # type: ignore[override]  # derived here, constant elsewhere
        """Whether the caller's own limit ended the answer, so that the backend is still writing."""
        return self._watcher is None and self._encoder.ended_early

    @property
    def text_bytes(self) -> int:
        """How much text there is."""
        return self._encoder.delivered if self._watcher is None else self._watcher.delivered

    def mute(self) -> None:
        """Write nothing more; what comes is taken in all the same."""
        self._is_muted = True

    def _tell_end(self) -> None:
        """Have an answer remembered that passes as it is and has ended well, before the caller has its end."""
        watcher, answered = self._watcher, self._answered
        if watcher is not None and answered is not None and watcher.final:
            self._answered = None
            answered(watcher.final)

    def _cut(self, error: ProxyError) -> bytes:
        """Return what ends a stream with *error*."""
        error = self._terms.dialect.reword(error, self._request)
        return self._encoder.cut(error) if self._watcher is None else self._watcher.cut(error)

    async def body(self, data: bytes) -> None:
        """Take no body: the answer is made of events."""
        raise AssertionError("an answer made of events has no body")

    def usage(self, *, estimate: bool) -> Usage:
        """Return the backend's numbers, else an estimate when one is wanted."""
        if self._watcher is not None:
            told = self._watcher.estimate(self._request.input_bytes)
        else:
            told = self._encoder.estimate() if estimate else self._encoder.usage
        return _made_whole(told, self._request.input_bytes, self.text_bytes)

    def end_state(self) -> End:
        """Return how the answer ended."""
        if self._error is not None:
            return End.FAILED
        return (self._encoder.ended if self._watcher is None else self._watcher.ended) or End.FAILED


class StreamSink(EncodedSink):
    """A stream of server-sent events, written as it comes.

    In dialects that have a sign of life it may open the 200 before an account has answered: the head is
    out then, and a failure goes into the stream.
    """

    is_stream = True

    def __init__(self, http: Incoming, decoded: Decoded, trace: Trace, terms: Terms) -> None:
        super().__init__(decoded, trace, terms)
        self._http = http
        self._stream: EventStream | None = None
        self.keeps_alive_early = terms.dialect.keeps_alive_early
        self._is_over = False

    def result(self) -> web.StreamResponse:
        """Return the answer, or raise the error that is still to be a status."""
        return _result(self._stream, self._error)

    async def open(self, head: Head) -> None:
        """Begin the answer; its head goes out with the first events."""
        self._lease = head.lease
        self._watcher = head.watcher
        if self._stream is None and not self._is_muted:
            self._start(self._headers(head))

    def _start(self, headers: dict[str, str]) -> EventStream:
        self._trace.status = 200
        self._stream = EventStream(self._http, headers, self._terms.stall_seconds)
        return self._stream

    async def send(self, batch: Batch) -> bool:
        """Write the frames of one read, all of them at once, with the end of the body if it has come."""
        stream, encoder = self._stream, self._encoder
        data = encoder.encode(batch)
        self.failure = encoder.failure
        finished = encoder.finished
        if self._is_muted:
            batch.clear()
            return not finished
        assert stream is not None
        self._delivered += len(data)
        # A sign of life comes from outside the turn's own task.
        self._is_over = finished
        stream.put(data, is_last=finished)
        # What a slow reader waits for is in the transport; nothing of it needs to be kept here as well.
        batch.clear()
        del data
        await stream.caught_up()
        return not finished

    async def pass_on(self, data: bytes) -> None:
        """Write whole frames as they came."""
        assert self._watcher is not None
        is_last = self._watcher.ended is not None
        if is_last:
            self._tell_end()
        if self._is_muted:
            return
        assert self._stream is not None
        self._delivered += len(data)
        self._is_over = is_last
        self._stream.put(data, is_last=is_last)
        del data
        await self._stream.caught_up()

    async def keepalive(self) -> None:
        """Write a frame that says nothing but that we are here."""
        if not self._is_over and not self._is_muted:
            stream = self._stream if self._stream is not None else self._start(self._allowance())
            watcher = self._watcher
            await stream.write(self._encoder.keepalive() if watcher is None else watcher.keepalive())

    async def end(self) -> None:
        """Close the body."""
        self._is_over = True
        if self._watcher is not None:
            self._tell_end()
        if self._is_muted:
            return
        assert self._stream is not None
        await self._stream.write_eof()

    async def fail(self, error: ProxyError) -> None:
        """Refuse with a status, or end the stream with the dialect's terminal event."""
        self._is_over = True
        if self._is_muted:
            # What its caller was told stays what it was.
            self._error = error
            return
        if self._stream is None:
            self._refuse(error)
            return
        data = self._cut(error)
        self._delivered += len(data)
        await self._stream.write_eof(data)


class CollectSink(EncodedSink):
    """A whole answer, written when it is there."""

    def __init__(self, decoded: Decoded, trace: Trace, terms: Terms) -> None:
        super().__init__(decoded, trace, terms)
        self._response: web.Response | None = None
        self._collector = Collector(self._encoder)
        self._down: dict[str, str] = {}

    def result(self) -> web.StreamResponse:
        """Return the answer, or raise the error that is still to be a status."""
        return _result(self._response, self._error)

    async def open(self, head: Head) -> None:
        """Begin to collect."""
        self._lease = head.lease
        self._watcher = head.watcher
        self._down = self._headers(head)

    async def send(self, batch: Batch) -> bool:
        """Take the events of one read."""
        self._collector.feed(batch)
        self.failure = self._encoder.failure
        return not self._collector.finished

    async def pass_on(self, data: bytes) -> None:
        """Take the whole answer as it came."""
        self._trace.status = 200
        self._delivered = len(data)
        self._response = web.Response(body=data, content_type="application/json", headers=self._down)

    async def keepalive(self) -> None:
        """Say nothing: a JSON answer has no sign of life."""

    async def end(self) -> None:
        """Make the answer out of what was collected, if it is not there already."""
        if self._watcher is not None:
            self._tell_end()
            return
        if self._error is not None:
            # It was broken off, and has no end of its own.
            return
        try:
            data = self._collector.result()
        except ProxyError as exc:
            self._refuse(exc)
            return
        self._trace.status = 200
        self._delivered = len(data)
        self._response = web.Response(body=data, content_type="application/json", headers=self._down)

    async def fail(self, error: ProxyError) -> None:
        """Refuse with a status; nothing has been written, however far the answer had come."""
        self._refuse(error)


class UnarySink(Sink):
    """An answer that is passed on as it is: compaction, search, images."""

    def __init__(self, http: Incoming, request: BackendRequest, trace: Trace, terms: Terms) -> None:
        super().__init__(request, trace, terms)
        self._http = http
        self._stream: EventStream | None = None
        self._response: web.Response | None = None
        self._head: Head | None = None
        self._down: dict[str, str] = {}
        self._ended = False
        self._usage = Usage()
        self._tail = b""
        """The last of a stream; its last event says what a picture has cost, behind the picture."""

    def result(self) -> web.StreamResponse:
        """Return the answer, or raise the error that is still to be a status."""
        return _result(self._response if self._stream is None else self._stream, self._error)

    async def open(self, head: Head) -> None:
        """Begin the answer."""
        self._head = head
        self._down = self._headers(head)
        if "text/event-stream" in head.content_type:
            self._trace.status = 200
            self._stream = EventStream(self._http, self._down, self._terms.stall_seconds)

    async def send(self, batch: Batch) -> bool:
        """Take no events: the answer passes as bytes."""
        raise AssertionError("a unary answer has no events")

    async def body(self, data: bytes) -> None:
        """Pass a part of a stream, or the whole of anything else."""
        self._delivered += len(data)
        if self._stream is not None:
            self._tail = (self._tail + data[-_TAIL_BYTES:])[-_TAIL_BYTES:]
            await self._stream.write(data)
            return
        assert self._head is not None
        self._trace.status = self._head.status
        content_type = self._head.content_type or "application/json"
        if "json" in content_type:
            self._usage = _usage_in(data)
        self._response = web.Response(
            status=self._head.status, body=data, headers={"Content-Type": content_type, **self._down}
        )

    async def keepalive(self) -> None:
        """Say nothing: these answers are quick, or bytes that we do not look into."""

    async def end(self) -> None:
        """Close the body."""
        self._ended = True
        if self._stream is not None:
            await self._stream.write_eof()

    async def fail(self, error: ProxyError) -> None:
        """Refuse with a status, or break a stream off: bytes we do not look into have no ending of ours."""
        if self._stream is None:
            self._refuse(error)
        else:
            self._stream.abort()

    def usage(self, *, estimate: bool) -> Usage:
        """Return what the answer says of its tokens, else the input's estimate when one is wanted."""
        if self._usage.source is UsageSource.NONE and self._tail:
            self._usage = _usage_at_end(self._tail)
        if self._usage.source is not UsageSource.NONE or not estimate:
            return _made_whole(self._usage, self._request.input_bytes, 0)
        return _input_only(self._request)

    def end_state(self) -> End:
        """Return how the answer ended."""
        return End.COMPLETED if self._ended and self._error is None else End.FAILED


def _result(response: web.StreamResponse | None, error: ProxyError | None) -> web.StreamResponse:
    """Return the answer, whole or already sent.

    Raises:
        ProxyError: If nothing was said to the caller, so that it can still be a status.
    """
    if error is not None:
        raise error
    if response is None:
        raise ProxyError("the turn ended without an answer")
    return response


def _made_whole(usage: Usage, input_bytes: int, text_bytes: int) -> Usage:
    """Return *usage* with an estimate of what was told as nothing at all, and cannot be nothing."""
    if usage.source is not UsageSource.BACKEND:
        return usage
    is_read = usage.input_tokens > 0 or not input_bytes
    is_written = usage.output_tokens > 0 or not text_bytes
    if is_read and is_written:
        return usage
    return dataclasses.replace(
        usage,
        input_tokens=usage.input_tokens if is_read else -(-input_bytes // 4),
        output_tokens=usage.output_tokens if is_written else -(-text_bytes // 4),
        source=UsageSource.ESTIMATE,
    )


def _input_only(request: BackendRequest) -> Usage:
    return Usage(input_tokens=-(-request.input_bytes // 4), source=UsageSource.ESTIMATE)


def _usage_in(data: bytes) -> Usage:
    try:
        payload = loads_lenient(data)
    except BadJson:
        return Usage()
    usage = payload.get("usage") if isinstance(payload, dict) else None
    return read_usage(usage) if isinstance(usage, dict) else Usage()


def _usage_at_end(tail: bytes) -> Usage:
    """Return what the last event of a stream says of its tokens, whatever stands before that in it."""
    _, found, after = tail.rpartition(b'"usage"')
    _, _, value = after.partition(b":")
    if not found:
        return Usage()
    try:
        usage, _ = _PARSE(value.decode("utf-8", "replace").lstrip())
    except (ValueError, RecursionError):
        return Usage()
    return read_usage(usage) if isinstance(usage, dict) else Usage()


def limit_headers(event: JsonObject | None) -> dict[str, str]:
    """Return a pool view of quota as the headers that the Codex CLI reads."""
    if event is None:
        return {}
    headers = {"x-codex-active-limit": "codex"}
    for which in ("primary", "secondary"):
        window = event["rate_limits"].get(which)
        if window is None:
            continue
        for field, header in (
            ("used_percent", "used-percent"),
            ("window_minutes", "window-minutes"),
            ("reset_at", "reset-at"),
            ("reset_after_seconds", "reset-after-seconds"),
        ):
            if field in window:
                headers[f"x-codex-{which}-{header}"] = str(window[field])
    return headers
