"""Where an answer meets the caller's connection: one sink per way of answering.

A sink writes nothing before `open`, so a failure until then is still an HTTP status: it is
kept, and raised where the handler asks for the `result`.
"""

import asyncio
import uuid
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass
from typing import Any

from aiohttp import web

from codex_proxy.errors import ProxyError, UpstreamError
from codex_proxy.protocol.collect import Collector
from codex_proxy.protocol.dialect import Decoded, Dialect, Surroundings
from codex_proxy.protocol.request import BackendRequest
from codex_proxy.protocol.responses import read_usage, visible_headers
from codex_proxy.protocol.sse import Batch
from codex_proxy.protocol.wire import BadJson, JsonObject, loads_lenient
from codex_proxy.trace import End, Trace, Usage, UsageSource
from codex_proxy.upstream.executor import Head
from codex_proxy.upstream.route import Lease

EVENT_STREAM = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-cache",
    # nginx would hold a stream back to fill its buffers.
    "X-Accel-Buffering": "no",
}


@dataclass(slots=True, frozen=True)
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

    @property
    def wants_failure_events(self) -> bool:
        """Whether a refusal of the request may go out as an event: the Codex CLI reads its code there."""
        return self.is_stream and self._request.is_codex

    @property
    def delivered_bytes(self) -> int:
        """How many bytes of an answer went to the caller."""
        return self._delivered

    def _refuse(self, error: ProxyError) -> ProxyError:
        """Keep *error*, in the dialect's words, for whoever makes a status of it."""
        dialect = self._terms.dialect
        self._error = dialect.reword(error, self._request)
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
        return {name: str(value) for name, value in headers.items()}


class EncodedSink(Sink):
    """What the sinks share whose answer is made of events: the encoder, and what it knows."""

    def __init__(self, decoded: Decoded, trace: Trace, terms: Terms) -> None:
        super().__init__(decoded.request, trace, terms)
        self._lease: Lease | None = None
        self._encoder = decoded.make_encoder(
            Surroundings(
                now=terms.now,
                unique=uuid.uuid4().hex,
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
        return self._encoder.ended_early

    async def body(self, data: bytes) -> None:
        """Take no body: the answer is made of events."""
        raise AssertionError("an answer made of events has no body")

    def usage(self, *, estimate: bool) -> Usage:
        """Return the backend's numbers, else an estimate when one is wanted."""
        return self._encoder.estimate() if estimate else self._encoder.usage

    def end_state(self) -> End:
        """Return how the answer ended."""
        if self._error is not None:
            return End.FAILED
        return self._encoder.ended or End.FAILED


class _Connection:
    """The caller's HTTP connection, and the response on it."""

    def __init__(self, http: web.Request, stall_seconds: float) -> None:
        self._http = http
        self._stall_seconds = stall_seconds
        self.response: web.StreamResponse | None = None

    def result(self, error: ProxyError | None) -> web.StreamResponse:
        """Return the answer, whole or already sent.

        Raises:
            ProxyError: If nothing was said to the caller, so that it can still be a status.
        """
        if error is not None:
            raise error
        if self.response is None:
            raise ProxyError("the turn ended without an answer")
        return self.response

    async def start(self, headers: Mapping[str, str]) -> None:
        response = web.StreamResponse(headers={**EVENT_STREAM, **headers})
        await response.prepare(self._http)
        self.response = response

    async def write(self, data: bytes) -> None:
        assert self.response is not None
        await self._soon(self.response.write(data))

    async def write_eof(self) -> None:
        assert self.response is not None
        await self._soon(self.response.write_eof())

    async def _soon(self, writing: Coroutine[Any, Any, None]) -> None:
        try:
            async with asyncio.timeout(self._stall_seconds):
                await writing
        except TimeoutError as exc:
            # Give up a caller who reads nothing for so long; an ending would not be read either.
            self.abort()
            raise ConnectionResetError("the caller stopped reading") from exc

    def abort(self) -> None:
        if self._http.transport is not None:
            self._http.transport.abort()


class StreamSink(EncodedSink):
    """A stream of server-sent events, written as it comes.

    In dialects that have a sign of life it may open the 200 before an account has answered: the head is
    out then, and a failure goes into the stream.
    """

    is_stream = True

    def __init__(self, http: web.Request, decoded: Decoded, trace: Trace, terms: Terms) -> None:
        super().__init__(decoded, trace, terms)
        self._connection = _Connection(http, terms.stall_seconds)
        self.keeps_alive_early = terms.dialect.keeps_alive_early
        # A sign of life comes from outside the turn's own task.
        self._writing = asyncio.Lock()
        self._is_over = False

    def result(self) -> web.StreamResponse:
        """Return the answer, or raise the error that is still to be a status."""
        return self._connection.result(self._error)

    async def open(self, head: Head) -> None:
        """Write the head of the answer."""
        self._lease = head.lease
        async with self._writing:
            if self._connection.response is None:
                await self._start(self._headers(head))

    async def _start(self, headers: Mapping[str, str]) -> None:
        self._trace.status = 200
        await self._connection.start(headers)

    async def send(self, batch: Batch) -> bool:
        """Write the frames of one read, all of them at once."""
        encoder = self._encoder
        data = encoder.encode(batch)
        self.failure = encoder.failure
        if data:
            await self._write(data)
        return not encoder.finished

    async def _write(self, data: bytes) -> None:
        self._delivered += len(data)
        async with self._writing:
            await self._connection.write(data)

    async def keepalive(self) -> None:
        """Write a frame that says nothing but that we are here."""
        async with self._writing:
            if self._is_over:
                return
            if self._connection.response is None:
                await self._start({})
            await self._connection.write(self._encoder.keepalive())

    async def end(self) -> None:
        """Close the body."""
        async with self._writing:
            self._is_over = True
            await self._connection.write_eof()

    async def fail(self, error: ProxyError) -> None:
        """Refuse with a status, or end the stream with the dialect's terminal event."""
        async with self._writing:
            self._is_over = True
            if self._connection.response is None:
                self._refuse(error)
                return
            data = self._encoder.cut(self._terms.dialect.reword(error, self._request))
            if data:
                self._delivered += len(data)
                await self._connection.write(data)
            await self._connection.write_eof()


class CollectSink(EncodedSink):
    """A whole answer, written when it is there."""

    def __init__(self, http: web.Request, decoded: Decoded, trace: Trace, terms: Terms) -> None:
        super().__init__(decoded, trace, terms)
        self._connection = _Connection(http, terms.stall_seconds)
        self._collector = Collector(self._encoder)
        self._down: dict[str, str] = {}

    def result(self) -> web.StreamResponse:
        """Return the answer, or raise the error that is still to be a status."""
        return self._connection.result(self._error)

    async def open(self, head: Head) -> None:
        """Begin to collect."""
        self._lease = head.lease
        self._down = self._headers(head)

    async def send(self, batch: Batch) -> bool:
        """Take the events of one read."""
        self._collector.feed(batch)
        self.failure = self._encoder.failure
        return not self._collector.finished

    async def keepalive(self) -> None:
        """Say nothing: a JSON answer has no sign of life."""

    async def end(self) -> None:
        """Make the answer out of what was collected."""
        try:
            data = self._collector.result()
        except ProxyError as exc:
            self._refuse(exc)
            return
        self._trace.status = 200
        self._delivered = len(data)
        self._connection.response = web.Response(
            body=data, content_type="application/json", headers=self._down
        )

    async def fail(self, error: ProxyError) -> None:
        """Refuse with a status; nothing has been written, however far the answer had come."""
        self._refuse(error)


class UnarySink(Sink):
    """An answer that is passed on as it is: compaction, search, images."""

    def __init__(self, http: web.Request, request: BackendRequest, trace: Trace, terms: Terms) -> None:
        super().__init__(request, trace, terms)
        self._connection = _Connection(http, terms.stall_seconds)
        self._head: Head | None = None
        self._down: dict[str, str] = {}
        self._ended = False
        self._usage = Usage()

    def result(self) -> web.StreamResponse:
        """Return the answer, or raise the error that is still to be a status."""
        return self._connection.result(self._error)

    async def open(self, head: Head) -> None:
        """Begin the answer; a stream's head is written at once."""
        self._head = head
        self._down = self._headers(head)
        if "text/event-stream" in head.content_type:
            self._trace.status = 200
            await self._connection.start(self._down)

    async def send(self, batch: Batch) -> bool:
        """Take no events: the answer passes as bytes."""
        raise AssertionError("a unary answer has no events")

    async def body(self, data: bytes) -> None:
        """Pass a part of a stream, or the whole of anything else."""
        self._delivered += len(data)
        if self._connection.response is not None:
            await self._connection.write(data)
            return
        assert self._head is not None
        self._trace.status = self._head.status
        content_type = self._head.content_type or "application/json"
        if "json" in content_type:
            self._usage = _usage_in(data)
        self._connection.response = web.Response(
            status=self._head.status, body=data, headers={"Content-Type": content_type, **self._down}
        )

    async def keepalive(self) -> None:
        """Say nothing: these answers are quick, or bytes that we do not look into."""

    async def end(self) -> None:
        """Close the body."""
        self._ended = True
        response = self._connection.response
        if response is not None and response.prepared:
            await self._connection.write_eof()

    async def fail(self, error: ProxyError) -> None:
        """Refuse with a status, or break a stream off: bytes we do not look into have no ending of ours."""
        if self._connection.response is None:
            self._refuse(error)
        else:
            self._connection.abort()

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
