"""Where an answer meets the caller's connection: one sink per way of answering.

A sink writes nothing before `open`, so a failure until then is still an HTTP status: it is
kept, and raised where the handler asks for the `result`.
"""

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from aiohttp import web

from codex_proxy.errors import ProxyError, UpstreamError
from codex_proxy.protocol.collect import Collector
from codex_proxy.protocol.request import BackendRequest
from codex_proxy.protocol.responses import Encoder, read_usage, render_error, visible_headers
from codex_proxy.protocol.sse import Batch
from codex_proxy.protocol.wire import BadJson, JsonObject, loads_lenient
from codex_proxy.trace import End, Trace, Usage, UsageSource
from codex_proxy.upstream.executor import Head

EVENT_STREAM = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-cache",
    # nginx would hold a stream back to fill its buffers.
    "X-Accel-Buffering": "no",
}

MakeEncoder = Callable[[BackendRequest, Callable[[str], str]], Encoder]


@dataclass(slots=True, frozen=True)
class Terms:
    """What an answer needs to know of the proxy that gives it."""

    make_encoder: MakeEncoder
    limits: Callable[[], JsonObject | None]
    """The pool's own view of its quota."""
    models_etag: str
    stall_seconds: float
    """How long a caller may read nothing."""


class Sink:
    """What all sinks share: the request, its story, and an error that nothing was said of yet."""

    def __init__(self, http: web.Request, request: BackendRequest, trace: Trace, terms: Terms) -> None:
        self._http = http
        self._request = request
        self._trace = trace
        self._terms = terms
        self._error: ProxyError | None = None
        self._response: web.StreamResponse | None = None
        self.failure: UpstreamError | None = None
        self._delivered = 0

    is_stream = False

    @property
    def wants_failure_events(self) -> bool:
        """Whether a refusal of the request may go out as an event: the Codex CLI reads its code there."""
        return self.is_stream and self._request.is_codex

    @property
    def delivered_bytes(self) -> int:
        """How many bytes of an answer went to the caller."""
        return self._delivered

    def result(self) -> web.StreamResponse:
        """Return the answer, whole or already sent.

        Raises:
            ProxyError: If nothing was said to the caller, so that it can still be a status.
        """
        if self._error is not None:
            raise self._error
        if self._response is None:
            raise ProxyError("the turn ended without an answer")
        return self._response

    def _refuse(self, error: ProxyError) -> None:
        self._error = error
        self._trace.status = render_error(error, request_id=self._trace.id)[0]

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
        return {name: str(value) for name, value in headers.items()}

    async def _start(self, headers: Mapping[str, str]) -> web.StreamResponse:
        response = self._response = web.StreamResponse(headers={**EVENT_STREAM, **headers})
        self._trace.status = 200
        await response.prepare(self._http)
        return response

    async def _write(self, data: bytes) -> None:
        assert self._response is not None
        self._delivered += len(data)
        try:
            async with asyncio.timeout(self._terms.stall_seconds):
                await self._response.write(data)
        except TimeoutError as exc:
            raise self._stalled() from exc

    async def _write_eof(self) -> None:
        assert self._response is not None
        try:
            async with asyncio.timeout(self._terms.stall_seconds):
                await self._response.write_eof()
        except TimeoutError as exc:
            raise self._stalled() from exc

    def _stalled(self) -> ConnectionError:
        """Give up a caller who reads nothing for so long; an ending would not be read either."""
        if self._http.transport is not None:
            self._http.transport.abort()
        return ConnectionResetError("the caller stopped reading")


class StreamSink(Sink):
    """A Responses stream, written as it comes."""

    is_stream = True

    def __init__(self, http: web.Request, request: BackendRequest, trace: Trace, terms: Terms) -> None:
        super().__init__(http, request, trace, terms)
        self._encoder: Encoder | None = None

    async def open(self, head: Head) -> None:
        """Write the head of the answer."""
        self._encoder = self._terms.make_encoder(self._request, head.lease.wrap_turn_state)
        await self._start(self._headers(head))

    async def send(self, batch: Batch) -> bool:
        """Write the frames of one read, all of them at once."""
        encoder = self._encoder
        assert encoder is not None
        data = encoder.encode(batch)
        self.failure = encoder.failure
        if data:
            await self._write(data)
        return not encoder.finished

    async def body(self, data: bytes) -> None:
        """Take no body: an event stream has none."""
        raise AssertionError("an event stream has no body")

    async def keepalive(self) -> None:
        """Write a frame that says nothing but that we are here."""
        if self._encoder is not None:
            await self._write(self._encoder.keepalive())

    async def end(self) -> None:
        """Close the body."""
        await self._write_eof()

    async def fail(self, error: ProxyError) -> None:
        """Refuse with a status, or end the stream with the dialect's terminal event."""
        if self._encoder is None or self._response is None:
            self._refuse(error)
            return
        data = self._encoder.cut(error)
        if data:
            await self._write(data)
        await self._write_eof()

    def usage(self, *, estimate: bool) -> Usage:
        """Return the backend's numbers, else an estimate when one is wanted."""
        if self._encoder is None:
            return _input_only(self._request) if estimate else Usage()
        return self._encoder.estimate() if estimate else self._encoder.usage

    def end_state(self) -> End:
        """Return how the stream ended."""
        return (self._encoder.ended if self._encoder is not None else None) or End.FAILED


class CollectSink(Sink):
    """A whole Responses object, written when it is there."""

    def __init__(self, http: web.Request, request: BackendRequest, trace: Trace, terms: Terms) -> None:
        super().__init__(http, request, trace, terms)
        self._collector: Collector | None = None
        self._down: dict[str, str] = {}

    async def open(self, head: Head) -> None:
        """Begin to collect."""
        self._collector = Collector(self._terms.make_encoder(self._request, head.lease.wrap_turn_state))
        self._down = self._headers(head)

    async def send(self, batch: Batch) -> bool:
        """Take the events of one read."""
        collector = self._collector
        assert collector is not None
        collector.feed(batch)
        self.failure = collector.encoder.failure
        return not collector.finished

    async def body(self, data: bytes) -> None:
        """Take no body: the answer is made of events."""
        raise AssertionError("an event stream has no body")

    async def keepalive(self) -> None:
        """Say nothing: a JSON answer has no sign of life."""

    async def end(self) -> None:
        """Make the answer out of what was collected."""
        assert self._collector is not None
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

    def usage(self, *, estimate: bool) -> Usage:
        """Return the backend's numbers, else an estimate when one is wanted."""
        if self._collector is None:
            return _input_only(self._request) if estimate else Usage()
        encoder = self._collector.encoder
        return encoder.estimate() if estimate else encoder.usage

    def end_state(self) -> End:
        """Return how the answer ended."""
        if self._error is not None or self._collector is None:
            return End.FAILED
        return self._collector.encoder.ended or End.FAILED


class UnarySink(Sink):
    """An answer that is passed on as it is: compaction, search, images."""

    def __init__(self, http: web.Request, request: BackendRequest, trace: Trace, terms: Terms) -> None:
        super().__init__(http, request, trace, terms)
        self._head: Head | None = None
        self._down: dict[str, str] = {}
        self._ended = False
        self._usage = Usage()

    async def open(self, head: Head) -> None:
        """Begin the answer; a stream's head is written at once."""
        self._head = head
        self._down = self._headers(head)
        if "text/event-stream" in head.content_type:
            await self._start(self._down)

    async def send(self, batch: Batch) -> bool:
        """Take no events: the answer passes as bytes."""
        raise AssertionError("a unary answer has no events")

    async def body(self, data: bytes) -> None:
        """Pass a part of a stream, or the whole of anything else."""
        if self._response is not None:
            await self._write(data)
            return
        assert self._head is not None
        self._delivered = len(data)
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
        if self._response is not None and self._response.prepared:
            await self._write_eof()

    async def fail(self, error: ProxyError) -> None:
        """Refuse with a status, or break a stream off: bytes we do not look into have no ending of ours."""
        if self._response is None:
            self._refuse(error)
        elif self._http.transport is not None:
            self._http.transport.abort()

    def usage(self, *, estimate: bool) -> Usage:
        """Return what the answer says of its tokens, else the input's estimate when one is wanted."""
        if self._usage.source is not UsageSource.NONE or not estimate:
            return self._usage
        return _input_only(self._request)

    def end_state(self) -> End:
        """Return how the answer ended."""
        return End.COMPLETED if self._ended and self._error is None else End.FAILED


def _input_only(request: BackendRequest) -> Usage:
    return Usage(input_tokens=-(-request.input_bytes // 4), source=UsageSource.ESTIMATE)


def _usage_in(data: bytes) -> Usage:
    try:
        payload = loads_lenient(data)
    except BadJson:
        return Usage()
    usage = payload.get("usage") if isinstance(payload, dict) else None
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
