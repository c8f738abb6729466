"""Responses over WebSocket: each `response.create` is a turn like one over HTTP.

A socket adds what HTTP has not: turns that wait for each other, the conversation so far, so that a turn
brings only what is new, and an end of its own. Where public texts differ, the Open Responses specification
counts: one response at a time, and a failed continuation forgets what it went on from. Towards the
backend a turn is an ordinary one with the whole conversation in it, so every rule of failover holds.

Facts: backend contract, section 9.
"""

import asyncio
import contextlib
import logging
import re
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from aiohttp import HttpVersion11, WSCloseCode, WSMsgType, web

from codex_proxy.clock import Clock
from codex_proxy.config import Live
from codex_proxy.errors import KeyRefused, ProxyError, RequestError
from codex_proxy.protocol import responses
from codex_proxy.protocol.catalog import Catalog
from codex_proxy.protocol.dialect import Decoded
from codex_proxy.protocol.request import (
    LITE_HEADER,
    LITE_METADATA,
    TURN_STATE,
    BackendRequest,
    parse_body,
    render_body,
)
from codex_proxy.protocol.responses_request import decode_fields
from codex_proxy.protocol.sse import Batch, Event
from codex_proxy.protocol.transcript import (
    PREVIOUS,
    Transcript,
    decode_continued,
    go_on,
    not_found,
    take_previous,
)
from codex_proxy.protocol.wire import JsonObject, dumps, loads
from codex_proxy.server.continuations import Continuations, answering, begin_chain
from codex_proxy.server.delivery import EncodedSink, Terms
from codex_proxy.server.front import CALLER, REQUEST_ID, Incoming
from codex_proxy.tasks import Background, Job
from codex_proxy.trace import Caller, End, Trace
from codex_proxy.upstream.executor import Head

logger = logging.getLogger(__name__)

# It warns of subprotocols that nobody here speaks by writing them down, and some clients put their key there.
logging.getLogger("aiohttp.websocket").setLevel(logging.ERROR)

# What the public API gives a connection.
MAX_AGE_SECONDS = 3600.0

# The Codex CLI opens a new socket without a word when it finds the old one closed.
IDLE_SECONDS = 600.0

LOOK_SECONDS = 5.0
"""How often all sockets are looked at; a timer for each would cost more."""

# As many as there may be lanes: a client may send one request into each.
MAX_WAITING = 32
MAX_LANES = 32

# A peer that has gone does not answer a close frame, and a stopping daemon waits for it.
_CLOSE_SECONDS = 2.0

# One that is there and does not read takes no close frame at all.
_GIVE_UP_SECONDS = 10.0

_STREAM_ID = re.compile(r"[A-Za-z0-9_.-]{1,256}")

# Per turn, so the upgrade has no say in them.
_NOT_FROM_UPGRADE = frozenset({TURN_STATE, LITE_HEADER})

_ALSO_HEADERS = {
    "x-codex-turn-metadata": "x-codex-turn-metadata",
    "x-codex-window-id": "x-codex-window-id",
    "session_id": "session-id",
    "thread_id": "thread-id",
}
"""What a frame says of its turn in `client_metadata`, where over HTTP a header says it too."""

_ONLY_HEADERS = {
    TURN_STATE: TURN_STATE,
    LITE_METADATA: LITE_HEADER,
    "ws_request_header_traceparent": "traceparent",
    "ws_request_header_tracestate": "tracestate",
}
"""What over HTTP only a header says."""

# What servers take of one header at most; a frame can say more, and no account is to be asked in vain.
_MAX_HEADER_BYTES = 8_000

_SOCKET_ONLY = "ws_request_header_"
_STARTED = "x-codex-ws-stream-request-start-ms"


class Turns(Protocol):
    """What serves turns, here as over HTTP."""

    @property
    def catalog(self) -> Catalog:
        """What there is to serve."""
        ...

    def let_upstreams(
        self,
        request: BackendRequest,
        headers: Mapping[str, str],
        caller: Caller,
        again: Callable[[], BackendRequest],
    ) -> None:
        """Let a request go to upstreams too, where there are any; *again* decodes it in the standard shape."""
        ...

    def terms(self, caller: Caller) -> Terms:
        """Return what an answer needs to know of the proxy."""
        ...

    async def run(
        self, request: BackendRequest, sink: "SocketSink", trace: Trace, headers: Mapping[str, str]
    ) -> None:
        """Serve a turn to its end; when this is cancelled, the caller has gone."""
        ...

    def capture(self, trace: Trace, raw: bytes) -> None:
        """Keep what is said in a turn, where the owner wants that of its caller."""
        ...

    def refused(self, trace: Trace, error: ProxyError) -> None:
        """Tell of a turn that never began."""
        ...

    def served_here(self, trace: Trace, request: BackendRequest, headers: Mapping[str, str]) -> None:
        """Tell of a turn that needed no account."""
        ...


@dataclass(slots=True, frozen=True)
class _Goodbye:
    """Why a socket is closed from our side."""

    code: int
    reason: bytes
    error: ProxyError | None = None
    """What the caller is told first."""


_BROKEN = _Goodbye(WSCloseCode.INTERNAL_ERROR, b"the proxy failed; its log says why")
_IDLE = _Goodbye(WSCloseCode.OK, b"nothing was asked for a while")
_RESTART = _Goodbye(WSCloseCode.SERVICE_RESTART, b"the proxy is being restarted")
_KEY = _Goodbye(WSCloseCode.POLICY_VIOLATION, b"the client key is not known any more")
_OLD = _Goodbye(
    WSCloseCode.OK,
    b"the connection is old",
    RequestError(
        "this connection has reached its limit of 60 minutes; open a new one",
        code="websocket_connection_limit_reached",
    ),
)
_FLOOD = _Goodbye(
    WSCloseCode.POLICY_VIOLATION,
    b"too many requests are waiting",
    RequestError(
        f"more than {MAX_WAITING} requests, or more than max-body-bytes of them, wait on this connection; "
        "wait for answers before asking on",
        code="too_many_requests",
        status=429,
    ),
)
_BINARY = _Goodbye(
    WSCloseCode.UNSUPPORTED_DATA,
    b"text frames only",
    RequestError("binary frames are not taken; send JSON in text frames", code="unsupported_frame"),
)


class Sockets:
    """All sockets that are open.

    Args:
        turns: What serves the turns.
        resolve: Who is asking; asked again for each turn, because keys are taken back.
        continuations: What is remembered beyond a socket.
    """

    def __init__(
        self,
        turns: Turns,
        resolve: Callable[[web.Request], Caller],
        continuations: Continuations,
        *,
        live: Live,
        clock: Clock,
        background: Background,
    ) -> None:
        self.turns = turns
        self.resolve = resolve
        self.continuations = continuations
        self.live = live
        self.clock = clock
        self.background = background
        self._open: set[Socket] = set()

    def __len__(self) -> int:
        return len(self._open)

    def jobs(self) -> list[Job]:
        """Return what runs by itself: the looks at old and at idle sockets."""
        return [Job("sockets", lambda: LOOK_SECONDS, self._look)]

    async def _look(self) -> None:
        for socket in list(self._open):
            socket.look()

    async def serve(self, http: web.Request) -> web.StreamResponse:
        """Serve one socket to its end; the pool's state is not asked, trouble comes as frames.

        Raises:
            RequestError: 426 for what is no upgrade, 503 while everything ends.
        """
        settings = self.live.current
        if not settings.enable_websocket:
            raise RequestError(
                "the owner of this proxy has switched WebSocket off; send POST to this path",
                status=426,
                code="websocket_not_supported",
            )
        is_upgrade = http.headers.get("Upgrade", "").strip().lower() == "websocket"
        # HEAD is served where GET is, and HTTP/1.0 knows no upgrade.
        if not is_upgrade or http.method != "GET" or http.version < HttpVersion11:
            raise RequestError(
                "GET opens a WebSocket here; for an answer over HTTP send POST to this path",
                status=426,
                code="upgrade_required",
            )
        assert isinstance(http, Incoming)
        in_work = http.in_work
        if in_work.is_closing:
            raise RequestError("the proxy is being restarted", status=503, code="restarting")
        ws = web.WebSocketResponse(
            timeout=_CLOSE_SECONDS, max_msg_size=settings.max_body_bytes, decode_text=False
        )
        await ws.prepare(http)
        socket = Socket(self, http, ws)
        self._open.add(socket)
        in_work.on_closing(socket.end)
        logger.debug("socket opened id=%s", http[REQUEST_ID])
        try:
            await socket.serve()
        finally:
            in_work.forget(socket.end)
            self._open.discard(socket)
            logger.debug(
                "socket closed id=%s turns=%d code=%s", http[REQUEST_ID], socket.count, ws.close_code
            )
        return ws


class Wire:
    """The caller's connection, as something to write text frames to."""

    def __init__(self, http: web.Request, ws: web.WebSocketResponse) -> None:
        self._http = http
        self._ws = ws

    async def write(self, frames: list[bytes], stall_seconds: float) -> None:
        """Write *frames*; give up a caller who reads nothing for *stall_seconds*.

        Raises:
            ConnectionError: If the caller has left, or is given up.
        """
        try:
            async with asyncio.timeout(stall_seconds):
                for frame in frames:
                    await self._ws.send_frame(frame, WSMsgType.TEXT)
        except TimeoutError as exc:
            # A close frame would not be read either.
            self.abort()
            raise ConnectionResetError("the caller stopped reading") from exc

    async def close(self, code: int, reason: bytes) -> None:
        """Close in order; break off a caller who does not even read what comes before the close frame."""
        task = asyncio.current_task()
        assert task is not None
        try:
            async with asyncio.timeout(_GIVE_UP_SECONDS):
                await self._ws.close(code=code, message=reason)
        except TimeoutError:
            self.abort()
        except asyncio.CancelledError:
            # A pong that waited for the caller to read was cancelled, and all who wait with it are.
            if task.cancelling():
                raise
            self.abort()

    def abort(self) -> None:
        """Break the connection off, with all that is not written yet."""
        if self._http.transport is not None:
            self._http.transport.abort()


class Socket:
    """One connection: the requests that wait on it, and the conversations it knows."""

    def __init__(self, sockets: Sockets, http: web.Request, ws: web.WebSocketResponse) -> None:
        self._sockets = sockets
        self._http = http
        self._ws = ws
        self._wire = Wire(http, ws)
        self._headers = {
            name: value
            for name, value in ((name.lower(), value) for name, value in http.headers.items())
            if name not in _NOT_FROM_UPGRADE
        }
        self.count = 0
        """How many requests came."""
        self._waiting: deque[bytes] = deque()
        self._waiting_bytes = 0
        self._wake = asyncio.Event()
        self._is_busy = False
        self._goodbye: _Goodbye | None = None
        self._opened = self._heard = sockets.clock.monotonic()
        self._lanes: set[str] = set()
        self._latest: dict[str | None, tuple[str, Transcript]] = {}
        """The last answer of each lane and its conversation, the longest unused first."""

    # -- life -----------------------------------------------------------------------------

    async def serve(self) -> None:
        """Read and answer until one side wants no more."""
        spawn = self._sockets.background.spawn
        name = self._http[REQUEST_ID]
        reading = spawn(self._read(), name=f"socket:{name}:read")
        working = spawn(self._work(), name=f"socket:{name}:work")
        try:
            await asyncio.wait({reading, working}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            # The caller of a turn under way has gone, or is sent away.
            reading.cancel()
            working.cancel()
        await asyncio.wait({reading, working})
        if self._ws.closed:
            return
        goodbye = self._goodbye or _BROKEN
        if goodbye.error is not None:
            with contextlib.suppress(ConnectionError):
                await self._wire.write([error_frame(goodbye.error, self._http[REQUEST_ID])], _CLOSE_SECONDS)
        await self._wire.close(goodbye.code, goodbye.reason)

    def end(self) -> None:
        """Close as soon as no turn is under way: the daemon ends."""
        self._leave(_RESTART)

    def look(self) -> None:
        """Close when nothing is asked, or the connection is old; a turn under way may end."""
        now = self._sockets.clock.monotonic()
        if self._is_busy or self._waiting:
            return
        if now - self._opened >= MAX_AGE_SECONDS:
            self._leave(_OLD)
        elif now - self._heard >= IDLE_SECONDS:
            self._leave(_IDLE)

    def _leave(self, goodbye: _Goodbye) -> None:
        if self._goodbye is None:
            self._goodbye = goodbye
            self._wake.set()

    async def _read(self) -> None:
        """Take requests, also while a turn runs, until the caller leaves or must."""
        while self._goodbye is None or self._is_busy:
            try:
                message = await self._ws.receive()
            except ConnectionError:
                # It pinged and left before the pong.
                return
            if message.type is WSMsgType.TEXT:
                data: Any = message.data
                limit = self._sockets.live.current.max_body_bytes
                if len(self._waiting) >= MAX_WAITING or self._waiting_bytes + len(data) > limit:
                    self._leave(_FLOOD)
                    return
                self._waiting.append(data)
                self._waiting_bytes += len(data)
                self._wake.set()
            elif message.type is WSMsgType.BINARY:
                self._leave(_BINARY)
                return
            else:
                return

    async def _work(self) -> None:
        """Answer requests, one after the other."""
        clock = self._sockets.clock
        while True:
            while not self._waiting and self._goodbye is None:
                self._wake.clear()
                await self._wake.wait()
            if clock.monotonic() - self._opened >= MAX_AGE_SECONDS:
                self._leave(_OLD)
            if self._goodbye is not None:
                return
            raw = self._waiting.popleft()
            self._waiting_bytes -= len(raw)
            self._is_busy = True
            try:
                await self._turn(raw)
            finally:
                self._is_busy = False
                self._heard = clock.monotonic()

    # -- turns ----------------------------------------------------------------------------

    async def _turn(self, raw: bytes) -> None:
        self.count += 1
        sockets, clock = self._sockets, self._sockets.clock
        trace = Trace(
            f"{self._http[REQUEST_ID]}-{self.count}",
            "responses",
            self._http[CALLER],
            clock.monotonic(),
            clock.now(),
            stream=True,
            request_bytes=len(raw),
        )
        lane = previous = None
        try:
            trace.caller = sockets.resolve(self._http)
            if sockets.live.current.capture:
                sockets.turns.capture(trace, raw)
            fields = read_frame(raw)
            lane = self._take_lane(fields)
            previous = take_previous(fields)
            is_generated = _take_generate(fields)
            headers = turn_headers(self._headers, fields)
            decoded = self._decode(fields, headers, trace.caller, lane, previous, raw)
            trace.read = clock.monotonic()
            del fields, raw
            sink = SocketSink(self._wire, decoded, trace, sockets.turns.terms(trace.caller), lane)
            request = decoded.request
            del decoded
            if is_generated:
                await sockets.turns.run(request, sink, trace, headers)
            else:
                try:
                    await sink.answer_nothing()
                finally:
                    sockets.turns.served_here(trace, request, headers)
        except ProxyError as exc:
            sockets.turns.refused(trace, exc)
            if isinstance(exc, KeyRefused):
                self._leave(_KEY)
            with contextlib.suppress(ConnectionError):
                await self._wire.write([error_frame(exc, trace.id, lane)], sockets.live.current.idle_timeout)
        except ConnectionError:
            # It left while it was written to; whoever reads hears of it too.
            pass
        if previous is not None and trace.end is End.FAILED:
            # So says the specification: the caller is to send everything again.
            latest = self._latest.get(lane)
            if latest is not None and latest[0] == previous:
                del self._latest[lane]

    def _take_lane(self, fields: JsonObject) -> str | None:
        """Take the name of the lane out of *fields*; None is the lane without a name.

        Lanes here take turns: what is asked in one waits for what was asked before in any other.
        """
        value = fields.pop("stream_id", None)
        if value is None:
            return None
        if not isinstance(value, str) or not _STREAM_ID.fullmatch(value):
            raise RequestError(
                "stream_id must be 1 to 256 letters, digits and _ - .",
                param="stream_id",
                code="invalid_stream_id",
            )
        if value not in self._lanes and len(self._lanes) >= MAX_LANES:
            raise RequestError(
                f"this connection has {MAX_LANES} named lanes, which is its limit; use one of them again, or "
                "open another connection",
                param="stream_id",
                code="websocket_stream_limit_reached",
            )
        self._lanes.add(value)
        return value

    def _decode(
        self,
        fields: JsonObject,
        headers: Mapping[str, str],
        caller: Caller,
        lane: str | None,
        previous: str | None,
        raw: bytes,
    ) -> Decoded:
        sockets = self._sockets
        catalog = sockets.turns.catalog
        # Before the decoder puts it into the backend's shape.
        sent = render_body({"input": fields.get("input")})
        before: Transcript | None = None
        if previous is not None:
            before = self._find(caller, previous)
            if before is None:
                raise not_found(previous)

        def read(fields: JsonObject, catalog: Catalog) -> BackendRequest:
            fields["stream"] = True
            if before is None or previous is None:
                return decode_fields(fields, headers, catalog=catalog, caller=caller.id)
            return decode_continued(
                fields,
                headers,
                catalog=catalog,
                caller=caller.id,
                response_id=previous,
                before=before,
                new_bytes=len(raw),
                limit=sockets.live.current.max_body_bytes,
            )

        def again() -> BackendRequest:
            fields = read_frame(raw)
            for name in ("stream_id", "generate", PREVIOUS):
                fields.pop(name, None)
            turn_headers({}, fields)
            return read(fields, catalog.as_standard())

        request = read(fields, catalog)
        sockets.turns.let_upstreams(request, headers, caller, again)
        begin_chain(request)

        def remember(final: JsonObject) -> None:
            gone = go_on(request, sent, before, final)
            if gone is not None:
                self._remember(lane, gone)
            if request.keeps:
                sockets.continuations.remember(caller, gone)

        return answering(request, remember)

    def _find(self, caller: Caller, response_id: str) -> Transcript | None:
        """Return a conversation: one of this socket's, also of another lane, or a remembered one."""
        for known, transcript in self._latest.values():
            if known == response_id:
                return transcript
        return self._sockets.continuations.get(caller, response_id)

    def _remember(self, lane: str | None, gone: tuple[str, Transcript]) -> None:
        self._latest.pop(lane, None)
        self._latest[lane] = gone
        limit = self._sockets.live.current.max_body_bytes
        # The others go before the one that was used last.
        while len(self._latest) > 1 and sum(t.size() for _, t in self._latest.values()) > limit:
            del self._latest[next(iter(self._latest))]


class SocketSink(EncodedSink):
    """An answer as text frames, one for each event."""

    is_stream = True
    keeps_alive_early = True

    def __init__(self, wire: Wire, decoded: Decoded, trace: Trace, terms: Terms, lane: str | None) -> None:
        super().__init__(decoded, trace, terms)
        assert isinstance(self._encoder, responses.Encoder)
        self._events: responses.Encoder = self._encoder
        self._wire = wire
        self._lane = lane
        # A sign of life comes from outside the turn's own task.
        self._writing = asyncio.Lock()
        self._is_open = False
        self._is_over = False

    async def open(self, head: Head) -> None:
        """Begin the answer; a Codex client gets in frames what over HTTP stands in the head."""
        self._lease = head.lease
        self._is_open = True
        self._trace.status = 200
        if self._request.is_codex and not self._is_muted:
            await self._send(self._greeting(head))

    def _greeting(self, head: Head) -> Batch:
        terms = self._terms
        greeting: Batch = []
        headers = responses.visible_headers(
            head.headers,
            self._request,
            wrap_turn_state=head.lease.wrap_turn_state,
            models_etag=terms.models_etag,
        )
        if headers:
            greeting.append(Event.of({"type": "response.metadata", "headers": headers}))
        limits = terms.limits()
        if limits is not None:
            greeting.append(Event.of({"type": "codex.rate_limits", **limits}))
        return greeting

    async def answer_nothing(self) -> None:
        """Answer at once, and without an account, that nothing was generated."""
        self._trace.status = 200
        await self._send(self._events.nothing())

    async def send(self, batch: Batch) -> bool:
        """Write the events of one read."""
        events = self._events.events(batch)
        self.failure = self._events.failure
        if events and not self._is_muted:
            await self._send(events)
        return not self._events.finished

    async def keepalive(self) -> None:
        """Write a frame that says nothing but that we are here; pings do not reset a client's timer."""
        async with self._writing:
            if not self._is_over and not self._is_muted:
                await self._write([_frame(_KEEPALIVE, self._lane)])

    async def end(self) -> None:
        """Do nothing: the terminal event is the end, and the socket stays."""
        self._is_over = True

    async def fail(self, error: ProxyError) -> None:
        """Say *error* in a frame with its status, or end an answer that has begun with the terminal event."""
        async with self._writing:
            self._is_over = True
            if self._is_muted:
                self._refuse(error)
            elif self._is_open:
                last = self._events.last_events(self._terms.dialect.reword(error, self._request))
                frames = [_frame(event, self._lane) for event in last]
                self._delivered += sum(map(len, frames))
                await self._write(frames)
            else:
                await self._write([error_frame(self._refuse(error), self._trace.id, self._lane)])

    async def _send(self, events: Batch) -> None:
        frames = [_frame(event, self._lane) for event in events]
        self._delivered += sum(map(len, frames))
        async with self._writing:
            await self._write(frames)

    async def _write(self, frames: list[bytes]) -> None:
        await self._wire.write(frames, self._terms.stall_seconds)


_KEEPALIVE = Event.of({"type": "keepalive"})


def _frame(event: Event, lane: str | None) -> bytes:
    """Return an event as it goes into a text frame, which must be UTF-8."""
    data = event.data
    if not data.isascii():
        data = data.decode("utf-8", "replace").encode()
    if lane is None:
        return data
    # A name needs no escapes, and an event is an object that has at least its type.
    return data.rstrip()[:-1] + b',"stream_id":"' + lane.encode() + b'"}'


def error_frame(error: ProxyError, request_id: str, lane: str | None = None) -> bytes:
    """Return *error* as a frame: what over HTTP are status, headers and body."""
    status, headers, body = responses.render_error(error, request_id=request_id)
    frame = {
        "type": "error",
        "status": status,
        **loads(body),
        "headers": {name: value for name, value in headers.items() if name != "content-type"},
    }
    if lane is not None:
        frame["stream_id"] = lane
    return dumps(frame)


def read_frame(raw: bytes) -> JsonObject:
    """Return what a frame asks, without its type.

    Raises:
        RequestError: If it is no JSON, or no `response.create`.
    """
    fields = parse_body(raw)
    kind = fields.pop("type", None)
    if kind != "response.create":
        said = f"{kind[:100]!r}" if isinstance(kind, str) else "no type at all" if kind is None else "no text"
        raise RequestError(
            f"the type of a frame must be 'response.create', and is {said}",
            param="type",
            code="unknown_event_type",
        )
    return fields


def _take_generate(fields: JsonObject) -> bool:
    value = fields.pop("generate", None)
    if value is not None and not isinstance(value, bool):
        raise RequestError("generate must be a boolean", param="generate", code="invalid_type")
    return value is not False


def turn_headers(upgrade: Mapping[str, str], fields: JsonObject) -> dict[str, str]:
    """Return the headers that the turn would have over HTTP.

    What stands in the frame's `client_metadata` for want of headers is taken out of it.
    """
    headers = dict(upgrade)
    metadata = fields.get("client_metadata")
    if not isinstance(metadata, dict):
        return headers
    for name, header in (*_ALSO_HEADERS.items(), *_ONLY_HEADERS.items()):
        value = metadata.get(name)
        if not isinstance(value, str) or not value:
            continue
        if len(value.encode("utf-8", "replace")) <= _MAX_HEADER_BYTES:
            headers[header] = value
        else:
            # What the upgrade said holds no longer.
            headers.pop(header, None)
    kept = {
        name: value
        for name, value in metadata.items()
        if name not in _ONLY_HEADERS and name != _STARTED and not name.startswith(_SOCKET_ONLY)
    }
    if kept:
        fields["client_metadata"] = kept
    else:
        del fields["client_metadata"]
    return headers
