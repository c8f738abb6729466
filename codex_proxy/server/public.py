"""What callers ask for: turns, and the lists of models."""

import asyncio
import logging
import uuid
from collections.abc import Callable, Mapping

from aiohttp import web

from codex_proxy.accounts.pool import Pool
from codex_proxy.clock import Clock
from codex_proxy.config import Live
from codex_proxy.errors import ProxyError, RequestError
from codex_proxy.protocol import models
from codex_proxy.protocol.catalog import Catalog
from codex_proxy.protocol.compact import decode_passthrough, input_tokens
from codex_proxy.protocol.request import BackendRequest
from codex_proxy.protocol.responses import Encoder, decode, render_error
from codex_proxy.protocol.wire import dumps
from codex_proxy.server.app import IS_CODEX_PATH
from codex_proxy.server.body import read_body
from codex_proxy.server.delivery import CollectSink, StreamSink, Terms, UnarySink
from codex_proxy.server.middleware import CALLER, REQUEST_ID, Handler
from codex_proxy.trace import LOCAL, End, Trace
from codex_proxy.upstream.executor import Executor

logger = logging.getLogger(__name__)

AnySink = StreamSink | CollectSink | UnarySink
Decode = Callable[[bytes, Mapping[str, str], Catalog], BackendRequest]


class Models:
    """The catalogue and the Codex list, made anew when the accounts' lists change."""

    def __init__(self, pool: Pool, live: Live) -> None:
        self._pool = pool
        self._live = live
        self._made_from: tuple[int, object] | None = None
        self._catalog = Catalog()
        self._codex: tuple[bytes, str] = (b"", "")

    def _refresh(self) -> None:
        made_from = (self._pool.lists_version, self._live.current.model_profiles)
        if self._made_from == made_from:
            return
        lists = self._pool.model_lists()
        self._catalog = Catalog(self._live.current.model_profiles, lists)
        self._codex = models.codex_list(lists)
        self._made_from = made_from

    @property
    def catalog(self) -> Catalog:
        """What there is to serve."""
        self._refresh()
        return self._catalog

    @property
    def codex(self) -> tuple[bytes, str]:
        """The backend's own objects as JSON, and their etag."""
        self._refresh()
        return self._codex


class Public:
    """The handlers of every route that a client uses."""

    def __init__(
        self, executor: Executor, pool: Pool, *, live: Live, clock: Clock, listed: Models | None = None
    ) -> None:
        self._executor = executor
        self._pool = pool
        self._live = live
        self._clock = clock
        self._models = listed if listed is not None else Models(pool, live)

    def handlers(self) -> dict[str, Handler]:
        """Return the handlers by the names in `app.ROUTES`."""
        return {
            "responses": self.responses,
            "responses_socket": self.responses_socket,
            "compact": self._passthrough("responses/compact"),
            "input_tokens": self.input_tokens,
            "alpha_search": self._passthrough("alpha/search"),
            "images_generations": self._passthrough("images/generations"),
            "images_edits": self._passthrough("images/edits"),
            "models": self.models,
            "model": self.model,
        }

    # -- turns ----------------------------------------------------------------------------

    async def responses(self, request: web.Request) -> web.StreamResponse:
        """Serve one turn of the Responses dialect."""
        return await self._turn(request, "responses", _decode_responses, self._responses_sink)

    def _passthrough(self, endpoint: str) -> Handler:
        def decode_it(raw: bytes, headers: Mapping[str, str], catalog: Catalog) -> BackendRequest:
            return decode_passthrough(endpoint, raw, headers, catalog=catalog)

        async def handle(request: web.Request) -> web.StreamResponse:
            return await self._turn(request, endpoint, decode_it, self._unary_sink)

        return handle

    async def _turn(
        self,
        http: web.Request,
        route: str,
        decode_it: Decode,
        make_sink: Callable[[web.Request, BackendRequest, Trace], AnySink],
    ) -> web.StreamResponse:
        trace = Trace(
            http[REQUEST_ID],
            route,
            http.get(CALLER, LOCAL),
            self._clock.monotonic(),
            self._clock.now(),
        )
        try:
            raw = await read_body(http, limit=self._live.current.max_body_bytes)
            trace.request_bytes = len(raw)
            headers = {name.lower(): value for name, value in http.headers.items()}
            request = decode_it(raw, headers, self._models.catalog)
            del raw
        except ProxyError as exc:
            trace.status = render_error(exc, request_id=trace.id)[0]
            trace.error = exc.code or exc.type
            trace.finish(End.FAILED, self._clock.monotonic())
            log_turn(trace)
            raise
        trace.model = request.asked_model
        trace.stream = request.stream
        trace.client = "codex" if request.is_codex else "other"
        sink = make_sink(http, request, trace)
        exchange = self._executor.begin(request, sink, trace)
        del request
        try:
            await exchange.wait()
        except asyncio.CancelledError:
            exchange.caller_gone()
            raise
        return sink.result()

    def _responses_sink(self, http: web.Request, request: BackendRequest, trace: Trace) -> AnySink:
        sink = StreamSink if request.stream else CollectSink
        return sink(http, request, trace, self._terms())

    def _unary_sink(self, http: web.Request, request: BackendRequest, trace: Trace) -> AnySink:
        return UnarySink(http, request, trace, self._terms())

    def _terms(self) -> Terms:
        return Terms(
            make_encoder=self._encoder,
            limits=self._executor.route.limits,
            models_etag=self._models.codex[1],
            stall_seconds=self._live.current.idle_timeout,
        )

    def _encoder(self, request: BackendRequest, wrap_turn_state: Callable[[str], str]) -> Encoder:
        return Encoder(
            request,
            pool_limits=self._executor.route.limits,
            wrap_turn_state=wrap_turn_state,
            models_etag=self._models.codex[1],
            now=self._clock.now,
            response_id=f"resp_{uuid.uuid4().hex}",
        )

    async def responses_socket(self, request: web.Request) -> web.StreamResponse:
        """Refuse the WebSocket: the Codex CLI then uses HTTP for the rest of its session."""
        raise RequestError(
            "responses over WebSocket are not served here; send POST to this path",
            status=426,
            code="websocket_not_supported",
        )

    # -- what needs no account ------------------------------------------------------------

    async def input_tokens(self, request: web.Request) -> web.StreamResponse:
        """Count the tokens of a request; an estimate, made here."""
        raw = await read_body(request, limit=self._live.current.max_body_bytes)
        return _json(dumps(input_tokens(raw)))

    async def models(self, request: web.Request) -> web.StreamResponse:
        """List the models, in the shape that the caller knows."""
        if request.get(IS_CODEX_PATH, False) or "client_version" in request.query:
            return self._codex_models(request)
        catalog = self._models.catalog
        if "anthropic-version" in request.headers:
            query = request.query
            return _json(
                dumps(
                    models.anthropic_list(
                        catalog,
                        limit=query.get("limit"),
                        after_id=query.get("after_id"),
                        before_id=query.get("before_id"),
                    )
                )
            )
        return _json(dumps(models.openai_list(catalog)))

    def _codex_models(self, request: web.Request) -> web.StreamResponse:
        body, etag = self._models.codex
        known = request.headers.get("if-none-match", "")
        # A relay that compresses makes an etag a weak one.
        if known.strip() == "*" or etag in {one.strip().removeprefix("W/") for one in known.split(",")}:
            return web.Response(status=304, headers={"ETag": etag})
        return _json(body, {"ETag": etag})

    async def model(self, request: web.Request) -> web.StreamResponse:
        """Describe one model."""
        name = request.match_info["model"]
        catalog = self._models.catalog
        if "anthropic-version" in request.headers:
            return _json(dumps(models.anthropic_one(catalog, name)))
        return _json(dumps(models.openai_one(catalog, name)))


def _decode_responses(raw: bytes, headers: Mapping[str, str], catalog: Catalog) -> BackendRequest:
    return decode(raw, headers, catalog=catalog)


def _json(body: bytes, headers: Mapping[str, str] | None = None) -> web.Response:
    return web.Response(body=body, content_type="application/json", headers=headers)


def log_turn(trace: Trace) -> None:
    """Write the one line that tells of a finished turn."""
    usage = trace.usage
    first = trace.first_event
    logger.info(
        "turn id=%s route=%s caller=%s client=%s model=%s status=%d end=%s error=%s account=%s attempts=%s "
        "why=%s first=%s seconds=%.3f in=%d cached=%d out=%d usage=%s",
        trace.id,
        trace.route,
        trace.caller.name,
        trace.client or "-",
        trace.model or "-",
        trace.status,
        trace.end.value,
        trace.error or "-",
        trace.alias or "-",
        ",".join(f"{a.alias}:{a.outcome or 'open'}" for a in trace.attempts) or "-",
        trace.decision or "-",
        f"{first - trace.started:.3f}" if first is not None else "-",
        trace.seconds,
        usage.input_tokens,
        usage.cached_tokens,
        usage.output_tokens,
        usage.source.value,
    )
