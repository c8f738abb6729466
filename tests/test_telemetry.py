"""Traces of turns, received as a collector receives them, and collectors that do not."""

import contextlib
import gzip
import logging
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult

from codex_proxy import telemetry
from codex_proxy.config import Settings
from codex_proxy.errors import ConfigError
from codex_proxy.telemetry import MAX_WAITING, Telemetry, trace_id
from codex_proxy.trace import Attempt, Caller, End, Trace, Usage, UsageSource
from tests.accounts.making import NOW
from tests.harness import standing
from tests.net.peers import listening, say_nothing, serving, until

SECRET_WORDS = "the quick brown fox of the prompt"


@pytest.fixture(autouse=True)
def level_is_kept() -> Any:
    theirs = logging.getLogger("opentelemetry")
    before = theirs.level
    yield
    theirs.setLevel(before)


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(telemetry, "_SECONDS", 0.02)


class Collector:
    """Takes what is exported to it."""

    def __init__(self) -> None:
        self.spans: list[Any] = []
        self.raw = b""
        self.paths: set[str] = set()
        self.resource: dict[str, Any] = {}

    async def take(self, request: web.Request) -> web.StreamResponse:
        data = await request.read()
        if request.headers.get("content-encoding") == "gzip" and data[:2] == b"\x1f\x8b":
            data = gzip.decompress(data)
        self.raw += data
        self.paths.add(request.path)
        for resource in ExportTraceServiceRequest.FromString(data).resource_spans:
            self.resource = attributes(resource.resource)
            for scope in resource.scope_spans:
                self.spans += scope.spans
        return web.Response(content_type="application/x-protobuf")


def attributes(of: Any) -> dict[str, Any]:
    return {one.key: getattr(one.value, one.value.WhichOneof("value")) for one in of.attributes}


def turn(request_id: str = "req_" + "ab" * 16, **more: Any) -> Trace:
    trace = Trace(
        request_id,
        "messages",
        Caller("key-1", "jane@example.com"),
        100.0,
        NOW,
        model="gpt-5.5",
        status=200,
        **more,
    )
    trace.attempts += [Attempt("work", 100.1, "server", 500, 0.4), Attempt("home", 100.6, "ok", 200, 2.0)]
    trace.usage = Usage(100, 60, 0, 20, 5, UsageSource.BACKEND)
    trace.first_event, trace.alias = 101.0, "home"
    trace.finish(End.COMPLETED, 102.75)
    return trace


@contextlib.asynccontextmanager
async def sending(endpoint: str) -> AsyncIterator[Telemetry]:
    made = Telemetry(Settings(telemetry="otlp", telemetry_endpoint=endpoint))
    try:
        yield made
    finally:
        await made.aclose()


async def test_a_turn_and_its_attempts_are_spans_of_one_trace() -> None:
    collector = Collector()
    async with serving(collector.take) as url, sending(url) as sent:
        sent.note(turn())
        await until(lambda: len(collector.spans) == 3)
    assert collector.paths == {"/v1/traces"}
    assert collector.resource["service.name"] == "codex-proxy"
    whole = next(span for span in collector.spans if not span.parent_span_id)
    tries = sorted((s for s in collector.spans if s is not whole), key=lambda s: s.start_time_unix_nano)
    # The request's id is the trace's.
    assert {span.trace_id.hex() for span in collector.spans} == {"ab" * 16}
    assert {span.parent_span_id for span in tries} == {whole.span_id}
    assert whole.name == "chat gpt-5.5"
    assert whole.start_time_unix_nano == int(NOW * 1e9)
    assert whole.end_time_unix_nano == int((NOW + 2.75) * 1e9)
    assert [event.name for event in whole.events] == ["first event"]
    said = attributes(whole)
    assert said["gen_ai.operation.name"] == "chat"
    assert said["gen_ai.provider.name"] == "openai"
    assert said["gen_ai.request.model"] == "gpt-5.5"
    assert (said["gen_ai.usage.input_tokens"], said["gen_ai.usage.output_tokens"]) == (100, 20)
    assert said["gen_ai.usage.cache_read.input_tokens"] == 60
    assert said["codex_proxy.account"] == "home"
    assert said["codex_proxy.caller"] == "[email]"
    assert "error.type" not in said
    first, second = map(attributes, tries)
    assert (first["codex_proxy.account"], first["error.type"], first["http.response.status_code"]) == (
        "work",
        "server",
        500,
    )
    assert (second["codex_proxy.account"], second["codex_proxy.attempt"]) == ("home", 2)
    assert [span.status.code for span in (whole, *tries)] == [0, 2, 0]
    assert tries[1].end_time_unix_nano - tries[1].start_time_unix_nano == pytest.approx(2e9, rel=1e-6)


async def test_a_turn_that_failed_says_of_what() -> None:
    collector = Collector()
    failed = Trace(
        "mine", "alpha/search", Caller("l", "local"), 1.0, NOW, status=429, error="usage_limit_reached"
    )
    failed.finish(End.FAILED, 1.5)
    async with serving(collector.take) as url, sending(f"{url}/v1/traces") as sent:
        sent.note(failed)
        await until(lambda: len(collector.spans) == 1)
    assert collector.paths == {"/v1/traces"}
    (span,) = collector.spans
    assert span.name == "alpha/search"
    assert (span.status.code, span.status.message) == (2, "usage_limit_reached")
    assert attributes(span)["error.type"] == "usage_limit_reached"
    assert int(span.trace_id.hex(), 16) == trace_id("mine") == trace_id("mine") != trace_id("yours")


async def test_a_daemon_sends_its_turns_and_nothing_that_was_said(tmp_path: Path) -> None:
    collector = Collector()
    async with (
        serving(collector.take) as url,
        standing(tmp_path, telemetry="otlp", telemetry_endpoint=url) as stand,
    ):
        answer = await stand.ask(SECRET_WORDS)
        await stand.ask(SECRET_WORDS, stream=False)
        await stand.post(body={"model": "gpt-5.5", "input": 3})
        await until(lambda: sum(not span.parent_span_id for span in collector.spans) == 3)
    ids = {attributes(span)["codex_proxy.request_id"] for span in collector.spans if not span.parent_span_id}
    assert answer.headers["x-request-id"] in ids
    assert b"quick brown" not in collector.raw
    assert answer.text.encode() not in collector.raw
    for account in stand.accounts:
        assert account.email.encode() not in collector.raw
    assert b"eyJ" not in collector.raw


async def test_what_waits_at_the_end_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(telemetry, "_SECONDS", 60.0)
    collector = Collector()
    async with serving(collector.take) as url:
        async with sending(url) as sent:
            for _ in range(520):
                sent.note(turn())
        assert len(collector.spans) == 3 * 520
    assert sent.results == {"sent": 520}


async def test_a_collector_that_hangs_holds_up_no_turn_and_no_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(telemetry, "EXPORT_SECONDS", 0.3)
    async with listening(say_nothing) as port:
        begun = time.monotonic()
        async with standing(
            tmp_path, telemetry="otlp", telemetry_endpoint=f"http://127.0.0.1:{port}"
        ) as stand:
            for _ in range(5):
                asked = time.monotonic()
                assert (await stand.ask()).status == 200
                assert time.monotonic() - asked < 1.0
            sent = stand.daemon.telemetry
            assert sent is not None
            await until(lambda: sent.results["failed"] > 0)
        assert time.monotonic() - begun < 10.0


async def test_a_collector_that_is_gone_is_told_of_once(caplog: pytest.LogCaptureFixture) -> None:
    class Gone(SpanExporter):
        is_there = False

        def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
            if not self.is_there:
                raise ConnectionError("secret detail")
            return SpanExportResult.SUCCESS

    gone = Gone()
    sent = Telemetry(Settings(telemetry_endpoint="http://127.0.0.1:9/secret-path"), exporter=gone)
    with caplog.at_level(logging.INFO):
        for number in range(1, 4):
            sent.note(turn())
            await until(lambda number=number: sent.results["failed"] == number)  # type: ignore[misc]
        gone.is_there = True
        sent.note(turn())
        await until(lambda: sent.results["sent"] == 1)
    await sent.aclose()
    said = [record.getMessage() for record in caplog.records if "delivered" in record.getMessage()]
    assert said == [
        "telemetry not delivered, and traces are lost until it is to=http://127.0.0.1:9",
        "telemetry delivered again to=http://127.0.0.1:9",
    ]


async def test_of_too_many_the_last_ones_are_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(telemetry, "_SECONDS", 60.0)

    class Quick(SpanExporter):
        def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
            return SpanExportResult.SUCCESS

    sent = Telemetry(Settings(), exporter=Quick())
    one = turn()
    begun = time.process_time()
    for _ in range(MAX_WAITING + 100):
        sent.note(one)
    assert (time.process_time() - begun) / MAX_WAITING < 20e-6
    assert sent.results["dropped"] == 100
    await sent.aclose()


async def test_without_the_extra_it_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "codex_proxy.telemetry")
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    with pytest.raises(ConfigError, match=r"telemetry = 'otlp': .*pip install 'codex-proxy\[otel\]'"):
        async with standing(tmp_path, telemetry="otlp"):
            raise AssertionError("it started")


def test_off_imports_nothing_of_it() -> None:
    source = (
        "import sys; from codex_proxy import daemon, config; "
        "assert daemon._telemetry(config.Settings()) is None; "
        "assert not [name for name in sys.modules if name.startswith('opentelemetry')], 'it was imported'"
    )
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
