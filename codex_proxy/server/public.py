"""What callers ask for: turns, and the lists of models."""

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from aiohttp import web

from codex_proxy.accounts.pool import Pool
from codex_proxy.clock import Clock
from codex_proxy.config import Live
from codex_proxy.errors import ProxyError
from codex_proxy.logs import Later, Said, Words
from codex_proxy.patterns import fits
from codex_proxy.protocol import models
from codex_proxy.protocol.catalog import Catalog
from codex_proxy.protocol.chat import CHAT
from codex_proxy.protocol.compact import decode_count, decode_passthrough, render_count
from codex_proxy.protocol.completions import COMPLETIONS, EDITS, with_engine
from codex_proxy.protocol.dialect import Decoded, Dialect
from codex_proxy.protocol.messages import MESSAGES
from codex_proxy.protocol.messages_request import countable
from codex_proxy.protocol.models import Shown
from codex_proxy.protocol.request import BackendRequest
from codex_proxy.protocol.responses import RESPONSES
from codex_proxy.protocol.wire import dumps
from codex_proxy.server.app import IS_CODEX_PATH
from codex_proxy.server.body import read_body
from codex_proxy.server.continuations import Continuations
from codex_proxy.server.counting import TokenCounter
from codex_proxy.server.delivery import CollectSink, StreamSink, Terms, UnarySink
from codex_proxy.server.front import CALLER, REQUEST_ID, Handler, Incoming, new_id
from codex_proxy.server.natives import Decode, Natives, no_embeddings
from codex_proxy.server.websocket import Sockets, SocketSink
from codex_proxy.tasks import Job
from codex_proxy.trace import LOCAL, Caller, Capture, End, Trace, TraceSink
from codex_proxy.upstream.executor import Exchange, Executor, Sink
from codex_proxy.upstream.providers import Providers

logger = logging.getLogger(__name__)

Headers = Mapping[str, str]
MakeSink = Callable[[Decoded, Trace, Terms], Sink]
Patterns = tuple[tuple[str, ...], ...]
"""Patterns of models' names; a model fits when it fits one out of each."""

# How many lists for callers with models of their own are kept.
_MAX_LISTS = 64


class Models:
    """The catalogue and the Codex list, made anew when the lists of accounts and upstreams change."""

    def __init__(self, pool: Pool, live: Live, providers: Providers | None = None) -> None:
        self._pool = pool
        self._live = live
        self._providers = providers
        self._made_from: tuple[object, ...] = ()
        self._catalog = Catalog()
        # By the patterns of names that a caller may use; none for all.
        self._codex: dict[Patterns, tuple[bytes, str]] = {}

    def _refresh(self) -> None:
        settings, providers = self._live.current, self._providers
        made_from: tuple[object, ...] = (
            self._pool.lists_version,
            settings.model_profiles,
            settings.model_map,
            providers.version if providers is not None else 0,
            # Without one, what stands in the built-in table is served by nobody.
            providers is None or not providers.are_there or len(self._pool) > 0,
        )
        if self._made_from == made_from:
            return
        lists = self._pool.model_lists()
        self._catalog = Catalog(
            settings.model_profiles,
            lists,
            settings.model_map,
            providers.listed() if providers is not None else (),
            has_accounts=len(self._pool) > 0,
        )
        self._codex = {}
        self._made_from = made_from

    @property
    def catalog(self) -> Catalog:
        """What there is to serve."""
        self._refresh()
        return self._catalog

    def codex(self, patterns: Patterns = ()) -> tuple[bytes, str]:
        """Return the backend's own objects as JSON, and their etag."""
        self._refresh()
        made = self._codex.get(patterns)
        if made is None:
            if len(self._codex) >= _MAX_LISTS:
                self._codex.clear()
            made = self._codex[patterns] = models.codex_list(self._pool.model_lists(), self.shown(patterns))
        return made

    def shown(self, patterns: Patterns) -> Shown:
        """Return what tells which names a caller sees who may use what fits one out of each of *patterns*."""
        if not patterns:
            return models.everything
        catalog = self.catalog

        def is_shown(name: str) -> bool:
            names = (name, catalog.resolve(name).model)
            return all(any(fits(one, each) for one in some for each in names) for some in patterns)

        return is_shown


class Public:
    """The handlers of every route that a client uses."""

    def __init__(
        self,
        executor: Executor,
        pool: Pool,
        *,
        live: Live,
        clock: Clock,
        listed: Models | None = None,
        counter: TokenCounter | None = None,
        resolve: Callable[[web.Request], Caller] | None = None,
        listeners: Sequence[TraceSink] | None = None,
        providers: Providers | None = None,
        models_of: Callable[[str], Patterns] | None = None,
        count: Callable[[str], None] | None = None,
    ) -> None:
        """Make the handlers; *models_of* tells what the caller with an id may use, *count* refuses one that counts tokens too often; *listeners* hear of turns that the executor never had: refused, or served here."""
        self._executor = executor
        self._pool = pool
        self._live = live
        self._clock = clock
        self._models = listed if listed is not None else Models(pool, live)
        self._counter = counter if counter is not None else TokenCounter()
        self._listeners = listeners if listeners is not None else (log_turn,)
        self._continuations = Continuations(clock)
        self._models_of = models_of
        self._count = count
        self._providers = providers
        self._natives = (
            Natives(providers, is_priced=live.current.ledger != "off") if providers is not None else None
        )
        self._sockets = Sockets(
            _SocketTurns(self),
            resolve if resolve is not None else _as_resolved,
            self._continuations,
            live=live,
            clock=clock,
            background=executor.background,
        )

    @property
    def sockets_open(self) -> int:
        """How many WebSockets are open."""
        return len(self._sockets)

    def jobs(self) -> list[Job]:
        """Return what runs by itself: sockets end, conversations are forgotten."""
        return [*self._sockets.jobs(), *self._continuations.jobs()]

    def handlers(self) -> dict[str, Handler]:
        """Return the handlers by the names in `app.ROUTES`."""
        return {
            "responses": self.responses,
            "chat": self._answering("chat", CHAT),
            "completions": self._answering("completions", COMPLETIONS),
            "engine_completions": self.engine_completions,
            "edits": self._answering("edits", EDITS),
            "messages": self._answering("messages", MESSAGES),
            "count_tokens": self.count_tokens,
            "embeddings": self.embeddings,
            "hello": self.hello,
            "responses_socket": self._sockets.serve,
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
        """Serve one turn of the Responses dialect, which may go on from an answer that was given."""

        def begin(http: Incoming, raw: bytes, headers: Headers, trace: Trace) -> "Begun":
            def decode(catalog: Catalog) -> Decoded:
                return self._continuations.decode(
                    raw,
                    headers,
                    catalog=catalog,
                    caller=trace.caller,
                    limit=self._live.current.max_body_bytes,
                )

            if self._providers is None or not self._providers.are_there:
                decoded = decode(self._models.catalog)
            else:
                decoded = self._decode("responses", decode, http, raw, headers, trace)
            return self._begin(http, decoded, trace, RESPONSES)

        return await self._turn(request, "responses", RESPONSES, begin)

    def _decode(
        self,
        capability: str,
        decode: Decode,
        http: Incoming,
        raw: bytes,
        headers: Headers,
        trace: Trace,
        engine: str | None = None,
    ) -> Decoded:
        """Decode a request for upstreams too."""
        assert self._natives is not None
        return self._natives.read(
            capability,
            raw,
            headers,
            decode,
            catalog=self._models.catalog,
            caller=trace.caller,
            engine=engine,
            # Clients of Anthropic's say it here as well as in a header.
            query="?beta=true" if http.query.get("beta") == "true" else "",
        )

    def _answering(self, route: str, dialect: Dialect, engine: str | None = None) -> Handler:
        """Return the handler of a route whose turns are asked and answered in *dialect*."""
        capability = "engines" if engine is not None else route

        def begin(http: Incoming, raw: bytes, headers: Headers, trace: Trace) -> "Begun":
            if self._providers is None or not self._providers.are_there:
                decoded = dialect.decode(raw, headers, catalog=self._models.catalog, caller=trace.caller.id)
                return self._begin(http, decoded, trace, dialect)

            def decode(catalog: Catalog) -> Decoded:
                return dialect.decode(raw, headers, catalog=catalog, caller=trace.caller.id)

            decoded = self._decode(capability, decode, http, raw, headers, trace, engine)
            return self._begin(http, decoded, trace, dialect)

        async def handle(request: web.Request) -> web.StreamResponse:
            return await self._turn(request, route, dialect, begin)

        return handle

    async def engine_completions(self, request: web.Request) -> web.StreamResponse:
        """Serve the oldest form of a completion, whose model stands in the path."""
        engine = request.match_info["engine"]
        handle = self._answering("completions", with_engine(engine), engine)
        return await handle(request)

    async def embeddings(self, request: web.Request) -> web.StreamResponse:
        """Have an upstream embed texts; no account's backend has a model for that."""
        natives = self._natives
        if natives is None or not natives.takes("embeddings"):
            raise no_embeddings()

        def begin(http: Incoming, raw: bytes, headers: Headers, trace: Trace) -> "Begun":
            decoded = natives.embedding(raw, headers, catalog=self._models.catalog, caller=trace.caller)
            return self._begin(http, decoded, trace, RESPONSES)

        return await self._turn(request, "embeddings", RESPONSES, begin)

    def _passthrough(self, endpoint: str) -> Handler:
        def begin(http: Incoming, raw: bytes, headers: Headers, trace: Trace) -> "Begun":
            request = decode_passthrough(
                endpoint, raw, headers, catalog=self._models.catalog, caller=trace.caller.id
            )
            return Begun(request, UnarySink(http, request, trace, self._terms(RESPONSES, trace.caller)))

        async def handle(request: web.Request) -> web.StreamResponse:
            return await self._turn(request, endpoint, RESPONSES, begin)

        return handle

    def _begin(self, http: Incoming, decoded: Decoded, trace: Trace, dialect: Dialect) -> "Begun":
        terms = self._terms(dialect, trace.caller)
        sink = (
            StreamSink(http, decoded, trace, terms)
            if decoded.request.stream
            else CollectSink(decoded, trace, terms)
        )
        return Begun(decoded.request, sink)

    async def _turn(
        self,
        http: web.Request,
        route: str,
        dialect: Dialect,
        begin: Callable[[Incoming, bytes, Headers, Trace], "Begun"],
    ) -> web.StreamResponse:
        assert isinstance(http, Incoming)
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
            if self._live.current.capture:
                self._capture(trace, raw)
            headers = {name.lower(): value for name, value in http.headers.items()}
            begun = begin(http, raw, headers, trace)
            trace.read = self._clock.monotonic()
            del raw
        except ProxyError as exc:
            self._refused(trace, exc, dialect)
            raise
        request, sink = begun.request, begun.sink
        exchange = self._run(request, sink, trace, headers)
        # What is not needed for the answer would be kept as long as it lasts.
        del begun, request, headers
        await _end_of(exchange)
        return sink.result()

    def _refused(self, trace: Trace, error: ProxyError, dialect: Dialect) -> None:
        trace.status = dialect.render_error(error, request_id=trace.id)[0]
        trace.error = error.code or error.type
        trace.finish(End.FAILED, self._clock.monotonic())
        self._tell(trace)

    def _capture(self, trace: Trace, raw: bytes) -> None:
        """Keep what is said in a turn, where the owner wants that of its caller."""
        settings = self._live.current
        if trace.caller.name in settings.capture and settings.records == "on":
            trace.said = Capture(settings.capture_limit)
            trace.said.ask(raw)

    def _tell(self, trace: Trace) -> None:
        for listener in self._listeners:
            listener(trace)

    def ask(
        self, raw: bytes, route: str, dialect: Dialect, caller: Caller, make_sink: MakeSink
    ) -> tuple[Exchange, Trace]:
        """Begin a turn that no client asked for: the page's test request.

        Raises:
            RequestError: If the request cannot be served.
        """
        trace = Trace(f"req_{new_id()}", route, caller, self._clock.monotonic(), self._clock.now())
        trace.request_bytes = len(raw)
        decoded = dialect.decode(raw, {}, catalog=self._models.catalog, caller=caller.id)
        trace.read = self._clock.monotonic()
        sink = make_sink(decoded, trace, self._terms(dialect, caller))
        return self._run(decoded.request, sink, trace, {}), trace

    @property
    def catalog(self) -> Catalog:
        """What there is to serve."""
        return self._models.catalog

    def _run(self, request: BackendRequest, sink: Sink, trace: Trace, headers: Headers) -> Exchange:
        _describe(trace, request, headers)
        return self._executor.begin(request, sink, trace)

    def _terms(self, dialect: Dialect, caller: Caller) -> Terms:
        return Terms(
            dialect=dialect,
            now=self._clock.now,
            limits=self._executor.route.limits,
            models_etag=self._models.codex(self._patterns_of(caller))[1],
            stall_seconds=self._live.current.idle_timeout,
        )

    # -- what needs no account ------------------------------------------------------------

    async def input_tokens(self, request: web.Request) -> web.StreamResponse:
        """Count the tokens of a request, here."""
        self._count_once(request)
        raw = await read_body(request, limit=self._live.current.max_body_bytes)
        return _json(dumps(render_count(await self._counter.count_request(decode_count(raw)))))

    async def count_tokens(self, request: web.Request) -> web.StreamResponse:
        """Count the tokens of a Messages request, here and without an account."""
        self._count_once(request)
        raw = await read_body(request, limit=self._live.current.max_body_bytes)
        headers = {name.lower(): value for name, value in request.headers.items()}
        body = countable(raw, headers, catalog=self._models.catalog)
        return _json(dumps({"input_tokens": await self._counter.count_request(body)}))

    def _count_once(self, request: web.Request) -> None:
        # Before its body is read: whoever is refused costs nothing.
        if self._count is not None:
            self._count(request.get(CALLER, LOCAL).id)

    async def hello(self, request: web.Request) -> web.StreamResponse:
        """Say that somebody is here; a person with a browser is shown the page."""
        if "text/html" in request.headers.get("Accept", "") and self._live.current.ui == "on":
            return web.Response(status=302, headers={"Location": "/ui"})
        return web.Response(text="codex-proxy\n")

    async def models(self, request: web.Request) -> web.StreamResponse:
        """List the models, in the shape that the caller knows."""
        if request.get(IS_CODEX_PATH, False) or "client_version" in request.query:
            return self._codex_models(request)
        catalog, shown = self._models.catalog, self._shown_to(request)
        if "anthropic-version" in request.headers:
            query = request.query
            return _json(
                dumps(
                    models.anthropic_list(
                        catalog,
                        limit=query.get("limit"),
                        after_id=query.get("after_id"),
                        before_id=query.get("before_id"),
                        shown=shown,
                    )
                )
            )
        return _json(dumps(models.openai_list(catalog, shown)))

    def _patterns_of(self, caller: Caller) -> Patterns:
        return self._models_of(caller.id) if self._models_of is not None else ()

    def _shown_to(self, request: web.Request) -> Shown:
        return self._models.shown(self._patterns_of(request.get(CALLER, LOCAL)))

    def _codex_models(self, request: web.Request) -> web.StreamResponse:
        body, etag = self._models.codex(self._patterns_of(request.get(CALLER, LOCAL)))
        known = request.headers.get("if-none-match", "")
        # A relay that compresses makes an etag a weak one.
        if known.strip() == "*" or etag in {one.strip().removeprefix("W/") for one in known.split(",")}:
            return web.Response(status=304, headers={"ETag": etag})
        return _json(body, {"ETag": etag})

    async def model(self, request: web.Request) -> web.StreamResponse:
        """Describe one model."""
        name = request.match_info["model"]
        catalog, shown = self._models.catalog, self._shown_to(request)
        if "anthropic-version" in request.headers:
            return _json(dumps(models.anthropic_one(catalog, name, shown)))
        return _json(dumps(models.openai_one(catalog, name, shown)))


@dataclass(slots=True, frozen=True)
class Begun:
    """A turn that was read, and where its answer goes."""

    request: BackendRequest
    sink: "AnySink"


AnySink = StreamSink | CollectSink | UnarySink


class _SocketTurns:
    """The same machinery for turns on sockets."""

    def __init__(self, public: Public) -> None:
        self._public = public

    @property
    def catalog(self) -> Catalog:
        return self._public._models.catalog

    def let_upstreams(
        self, request: BackendRequest, headers: Headers, caller: Caller, again: Callable[[], BackendRequest]
    ) -> None:
        natives, providers = self._public._natives, self._public._providers
        if natives is not None and providers is not None and providers.are_there:
            natives.translate(request, headers, caller, again)

    def terms(self, caller: Caller) -> Terms:
        return self._public._terms(RESPONSES, caller)

    async def run(self, request: BackendRequest, sink: SocketSink, trace: Trace, headers: Headers) -> None:
        await _end_of(self._public._run(request, sink, trace, headers))

    def capture(self, trace: Trace, raw: bytes) -> None:
        self._public._capture(trace, raw)

    def refused(self, trace: Trace, error: ProxyError) -> None:
        self._public._refused(trace, error, RESPONSES)

    def served_here(self, trace: Trace, request: BackendRequest, headers: Headers) -> None:
        _describe(trace, request, headers)
        trace.finish(End.COMPLETED, self._public._clock.monotonic())
        self._public._tell(trace)


async def _end_of(exchange: Exchange) -> None:
    """Wait for the end of a turn; whoever stops waiting has lost its caller."""
    try:
        await exchange.wait()
    except asyncio.CancelledError:
        exchange.caller_gone()
        raise


def _describe(trace: Trace, request: BackendRequest, headers: Headers) -> None:
    trace.model = request.asked_model
    trace.stream = request.stream
    trace.binding = request.binding.source if request.binding is not None else ""
    trace.client = client_of(request, headers)


def _as_resolved(request: web.Request) -> Caller:
    return request[CALLER]


def client_of(request: BackendRequest, headers: Headers) -> str:
    """Return the kind of client, as far as one cares."""
    if request.is_codex:
        return "codex"
    return "claude-code" if headers.get("user-agent", "").startswith("claude-cli/") else "other"


def _json(body: bytes, headers: Mapping[str, str] | None = None) -> web.Response:
    return web.Response(body=body, content_type="application/json", headers=headers)


_TURN = (
    "turn id=%s route=%s caller=%s client=%s model=%s status=%d end=%s error=%s account=%s attempts=%s why=%s "
    "first=%s seconds=%.3f in=%d cached=%d out=%d usage=%s"
)
# One that never began to be answered has no first event.
_ANSWERED = _TURN.replace("first=%s", "first=%.3f")


def _say(trace: Trace) -> Said:
    """Tell a finished turn in one line."""
    usage, first = trace.usage, trace.first_event
    return _TURN if first is None else _ANSWERED, (
        trace.id,
        trace.route,
        trace.caller.name,
        trace.client or "-",
        trace.model or "-",
        trace.status,
        trace.end.value,
        trace.error or "-",
        trace.alias or "-",
        Words([f"{one.alias}:{one.outcome or 'open'}" for one in trace.attempts]),
        trace.decision or "-",
        "-" if first is None else first - trace.started,
        trace.seconds,
        usage.input_tokens,
        usage.cached_tokens,
        usage.output_tokens,
        usage.source.value,
    )


_lines = Later(logger, _say)
log_turn = _lines.add
"""Have the one line written that tells of a finished turn."""
