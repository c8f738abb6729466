"""Finished turns as OpenTelemetry traces: all that we know of their conventions is in this file.

A turn is a span, each of its attempts one below it. They are made of the finished `Trace`, so nothing of
OpenTelemetry is on the way of a request, and nothing of what was said is in them: names, numbers and times.
Making and sending is the work of a thread of its own. A collector that is slow or gone costs spans, never a turn.

The GenAI conventions are still marked as in development; what they call a thing today is written down here
and nowhere else. Needs the extra `otel`; imported only where `telemetry` is on.
"""

import asyncio
import hashlib
import logging
import re
import socket
import threading
import time
from collections import Counter, deque
from collections.abc import Mapping

import requests
from opentelemetry import trace as otel
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.id_generator import RandomIdGenerator
from opentelemetry.trace import SpanKind, Status, StatusCode

from codex_proxy import __version__
from codex_proxy.config import Settings, mask_url
from codex_proxy.errors import Redact
from codex_proxy.trace import Attempt, End, Trace, UsageSource

logger = logging.getLogger(__name__)

Value = str | bool | int | float

# What a collector that is gone may cost in memory, and what is sent at a time.
MAX_WAITING = 2_048
_BATCH = 512

_SECONDS = 1.0
"""How long a turn waits for others to be sent with."""

EXPORT_SECONDS = 5.0
"""How long one sending may take, tries included; an ending daemon waits as long at most."""

_PATH = "/v1/traces"

# What the conventions call what a route does; what they have no word for keeps ours.
_OPERATIONS: Mapping[str, str] = {
    "responses": "chat",
    "chat": "chat",
    "messages": "chat",
    "completions": "text_completion",
    "edits": "text_completion",
    "images/generations": "generate_content",
    "images/edits": "generate_content",
}

# An id of our own is 128 bits of chance: so the trace is found by the request's id.
_OUR_ID = re.compile(r"req_([0-9a-f]{32})")


class _Ids(RandomIdGenerator):
    """Gives a turn the trace id that its request id means."""

    def __init__(self) -> None:
        self.trace_id = 0

    def generate_trace_id(self) -> int:
        return self.trace_id or super().generate_trace_id()


class _Finished(SpanProcessor):
    """Keeps spans until they are taken."""

    def __init__(self) -> None:
        self.spans: list[ReadableSpan] = []

    def on_end(self, span: ReadableSpan) -> None:
        self.spans.append(span)

    def take(self) -> list[ReadableSpan]:
        spans, self.spans = self.spans, []
        return spans


class Telemetry:
    """Sends traces of finished turns to a collector."""

    def __init__(self, settings: Settings, *, exporter: SpanExporter | None = None) -> None:
        self._endpoint = settings.telemetry_endpoint
        if exporter is None:
            session = requests.Session()
            # Nothing is taken from HTTP_PROXY, here as elsewhere.
            session.trust_env = False
            url = self._endpoint if self._endpoint.endswith(_PATH) else self._endpoint + _PATH
            exporter = OTLPSpanExporter(endpoint=url, timeout=EXPORT_SECONDS, session=session)
        # It speaks of every batch that does not get through; we do, once.
        logging.getLogger("opentelemetry").setLevel(logging.CRITICAL)
        self._exporter = exporter
        self._ids, self._finished = _Ids(), _Finished()
        provider = TracerProvider(
            resource=Resource.create({
                "service.name": "codex-proxy",
                "service.version": __version__,
                "host.name": socket.gethostname(),
            }),
            id_generator=self._ids,
            shutdown_on_exit=False,
        )
        provider.add_span_processor(self._finished)
        self._tracer = provider.get_tracer("codex_proxy", __version__)
        self._waiting: deque[Trace] = deque()
        self._is_failing = False
        self._ending = threading.Event()
        self.results: Counter[str] = Counter()
        """How many turns were sent, were not, or were too many."""
        self._thread = threading.Thread(target=self._run, name="telemetry", daemon=True)
        self._thread.start()

    def note(self, trace: Trace) -> None:
        """Have a finished turn sent; it does not change any more."""
        if len(self._waiting) >= MAX_WAITING:
            self.results["dropped"] += 1
        else:
            self._waiting.append(trace)

    async def aclose(self) -> None:
        """Send what waits, as far as that goes within seconds."""
        self._ending.set()
        await asyncio.to_thread(self._thread.join, EXPORT_SECONDS)
        self._exporter.shutdown()

    # -- in the thread --------------------------------------------------------------------

    def _run(self) -> None:
        while not self._ending.wait(_SECONDS):
            self._send_waiting()
        self._send_waiting()

    def _send_waiting(self) -> None:
        until = time.monotonic() + EXPORT_SECONDS
        while self._waiting:
            count = min(_BATCH, len(self._waiting))
            try:
                for _ in range(count):
                    self._make(self._waiting.popleft())
                is_sent = self._exporter.export(self._finished.take()) is SpanExportResult.SUCCESS
            except Exception:
                # A mistake here must end neither the thread nor the daemon.
                logger.exception("telemetry failed")
                is_sent = False
            self._note_result(count, is_sent=is_sent)
            if self._ending.is_set() and time.monotonic() >= until:
                return

    def _note_result(self, count: int, *, is_sent: bool) -> None:
        self.results["sent" if is_sent else "failed"] += count
        if is_sent is self._is_failing:
            self._is_failing = not is_sent
            if is_sent:
                logger.info("telemetry delivered again to=%s", mask_url(self._endpoint))
            else:
                logger.warning(
                    "telemetry not delivered, and traces are lost until it is to=%s", mask_url(self._endpoint)
                )

    def _make(self, trace: Trace) -> None:
        """Make the spans of a turn."""
        offset = trace.started_wall - trace.started
        self._ids.trace_id = trace_id(trace.id)
        operation = _OPERATIONS.get(trace.route, trace.route)
        span = self._tracer.start_span(
            f"{operation} {_clean(trace.model)}".rstrip(),
            context=otel.set_span_in_context(otel.INVALID_SPAN),
            kind=SpanKind.SERVER,
            attributes=_of_turn(trace, operation),
            start_time=_nanoseconds(trace.started + offset),
        )
        for name, at in (("read", trace.read), ("queued", trace.queued), ("first event", trace.first_event),
                         ("first text", trace.first_text)):  # fmt: skip
            if at is not None:
                span.add_event(name, timestamp=_nanoseconds(at + offset))
        if trace.end is End.FAILED:
            span.set_status(Status(StatusCode.ERROR, trace.error))
        context = otel.set_span_in_context(span)
        for number, attempt in enumerate(trace.attempts, 1):
            child = self._tracer.start_span(
                f"{operation} attempt",
                context=context,
                kind=SpanKind.CLIENT,
                attributes=_of_attempt(trace, attempt, number),
                start_time=_nanoseconds(attempt.started + offset),
            )
            for name, at in (("connected", attempt.connected), ("headers", attempt.headers)):
                if at is not None:
                    child.add_event(name, timestamp=_nanoseconds(at + offset))
            if attempt.outcome not in ("", "ok"):
                child.set_status(Status(StatusCode.ERROR, attempt.outcome))
            child.end(_nanoseconds(attempt.started + attempt.seconds + offset))
        finished = trace.finished if trace.finished is not None else trace.started
        span.end(_nanoseconds(finished + offset))


def _of_turn(trace: Trace, operation: str) -> dict[str, Value]:
    usage = trace.usage
    said: dict[str, Value] = {
        "gen_ai.operation.name": operation,
        "gen_ai.provider.name": "openai",
        "gen_ai.request.model": _clean(trace.model),
        "gen_ai.request.stream": trace.stream,
        "error.type": trace.error if trace.end is End.FAILED else "",
        "http.response.status_code": trace.status,
        "codex_proxy.request_id": trace.id,
        "codex_proxy.route": trace.route,
        "codex_proxy.caller": Redact.text(trace.caller.name),
        "codex_proxy.client": trace.client,
        "codex_proxy.outcome": trace.end.value,
        "codex_proxy.account": trace.alias,
        "codex_proxy.upstream": trace.upstream,
        "codex_proxy.rule": trace.decision,
        "codex_proxy.binding": trace.binding,
        "codex_proxy.attempts": len(trace.attempts),
        "codex_proxy.queued_seconds": trace.queued_seconds,
    }
    if usage.source is not UsageSource.NONE:
        said |= {
            "gen_ai.usage.input_tokens": usage.input_tokens,
            "gen_ai.usage.output_tokens": usage.output_tokens,
            "gen_ai.usage.cache_read.input_tokens": usage.cached_tokens,
            "gen_ai.usage.cache_creation.input_tokens": usage.cache_write_tokens,
            "gen_ai.usage.reasoning.output_tokens": usage.reasoning_tokens,
            "codex_proxy.usage_source": usage.source.value,
        }
    return {name: value for name, value in said.items() if value != ""}


def _of_attempt(trace: Trace, attempt: Attempt, number: int) -> dict[str, Value]:
    said: dict[str, Value] = {
        "gen_ai.operation.name": _OPERATIONS.get(trace.route, trace.route),
        "gen_ai.provider.name": "openai",
        "gen_ai.request.model": _clean(trace.model),
        "codex_proxy.account": attempt.alias,
        "codex_proxy.attempt": number,
        "codex_proxy.outcome": attempt.outcome or "open",
        "error.type": attempt.outcome if attempt.outcome != "ok" else "",
    }
    if attempt.status is not None:
        said["http.response.status_code"] = attempt.status
    return {name: value for name, value in said.items() if value != ""}


def trace_id(request_id: str) -> int:
    """Return the trace id of a request; a caller's own id gives one too, the same each time."""
    ours = _OUR_ID.fullmatch(request_id)
    digits = ours[1] if ours is not None else hashlib.sha256(request_id.encode()).hexdigest()[:32]
    return int(digits, 16)


def _clean(model: str) -> str:
    # A caller may put anything there.
    return Redact.text(model[:128])


def _nanoseconds(at: float) -> int:
    return int(at * 1e9)
