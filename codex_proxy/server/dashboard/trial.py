"""The page's test request: a small turn that goes the whole way, told step by step while it goes."""

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

from aiohttp import web

from codex_proxy.clock import Clock
from codex_proxy.errors import RequestError
from codex_proxy.protocol.chat import CHAT
from codex_proxy.protocol.dialect import Decoded, Dialect
from codex_proxy.protocol.messages import MESSAGES
from codex_proxy.protocol.responses import RESPONSES
from codex_proxy.protocol.wire import JsonObject, dumps, loads
from codex_proxy.server.delivery import CollectSink, Terms
from codex_proxy.server.public import Public
from codex_proxy.trace import Caller, End, Trace

_LOOK_SECONDS = 0.05
_QUESTION = "Answer with one short sentence: what are you?"
_MAX_TOKENS = 200

DIALECTS: dict[str, Dialect] = {"chat": CHAT, "messages": MESSAGES, "responses": RESPONSES}


def body_of(dialect: str, model: str) -> bytes:
    """Return the request as a client of that dialect would send it."""
    if dialect == "responses":
        return dumps({"model": model, "input": _QUESTION})
    said = [{"role": "user", "content": _QUESTION}]
    return dumps({"model": model, "max_tokens": _MAX_TOKENS, "messages": said})


async def steps(
    public: Public, clock: Clock, *, dialect: str, model: str, caller: Caller
) -> AsyncGenerator[tuple[str, JsonObject], None]:
    """Ask, and yield what happens as the events of the page's stream: `step`, then `done`.

    Whoever stops listening has left, as any caller may.

    Raises:
        RequestError: If there is no such dialect or model.
    """
    spoken = DIALECTS.get(dialect)
    if spoken is None:
        raise RequestError(f"dialect must be one of {', '.join(sorted(DIALECTS))}", param="dialect")
    started = clock.monotonic()
    sinks: list[CollectSink] = []

    def make_sink(decoded: Decoded, trace: Trace, terms: Terms) -> CollectSink:
        sinks.append(CollectSink(decoded, trace, terms))
        return sinks[0]

    exchange, trace = public.ask(body_of(dialect, model), f"try:{dialect}", spoken, caller, make_sink)
    told = _Told(started)
    yield told.step("read", f"the request was read and put into the backend's words: {model}", trace.read)
    waiting = exchange.task
    assert waiting is not None
    try:
        while not waiting.done():
            for event in told.news(trace):
                yield event
            await asyncio.wait({waiting}, timeout=_LOOK_SECONDS)
        for event in told.news(trace):
            yield event
    finally:
        # Nobody waits for the answer any more, if it has not come.
        exchange.caller_gone()
    is_good = trace.end in (End.COMPLETED, End.INCOMPLETE)
    text = _text(sinks[0]) if is_good else trace.error or "there was no answer"
    usage = trace.usage
    if is_good:
        words = f"{usage.input_tokens} input tokens ({usage.cached_tokens} cached), {usage.output_tokens} output tokens"
        yield told.step("end", f"the answer is whole: {words}", trace.finished, ok=True)
    else:
        yield told.step("end", f"it came to nothing: {text}", trace.finished, ok=False)
    yield "done", {"ok": is_good, "text": text, "request_id": trace.id, "account": trace.alias or None}


class _Told:
    """What of a turn has been told already."""

    def __init__(self, started: float) -> None:
        self._started = started
        self._decisions = 0
        self._ended = 0
        self._has_begun = False

    def step(
        self, name: str, text: str, at: float | None, *, ok: bool | None = None
    ) -> tuple[str, JsonObject]:
        after = None if at is None else round(at - self._started, 3)
        return "step", {"step": name, "after_seconds": after, "text": text, "ok": ok}

    def news(self, trace: Trace) -> list[tuple[str, JsonObject]]:
        """Return what has happened since the last look."""
        found: list[tuple[str, JsonObject]] = []
        while self._decisions < len(trace.decisions):
            decision = trace.decisions[self._decisions]
            attempt = trace.attempts[self._decisions] if self._decisions < len(trace.attempts) else None
            at = None if attempt is None else attempt.started
            if decision.alias:
                found.append(self.step("picked", f"{decision.alias} was picked: {decision.rule}", at))
            else:
                found.append(self.step("picked", f"nobody could serve it: {decision.rule}", at, ok=False))
            self._decisions += 1
        while self._ended < len(trace.attempts) and trace.attempts[self._ended].outcome:
            attempt = trace.attempts[self._ended]
            self._ended += 1
            if attempt.outcome != "ok":
                status = f", status {attempt.status}" if attempt.status else ""
                at = attempt.started + attempt.seconds
                found.append(
                    self.step("attempt", f"{attempt.alias}: {attempt.outcome}{status}", at, ok=False)
                )
        if trace.first_event is not None and not self._has_begun:
            self._has_begun = True
            found.append(self.step("answer", f"{trace.alias} began to answer", trace.first_event, ok=True))
        return found


def _text(sink: CollectSink) -> str:
    """Return the words of a collected answer, in whichever dialect."""
    response = sink.result()
    assert isinstance(response, web.Response)
    assert isinstance(response.body, bytes)
    return " ".join(_words(loads(response.body)))[:2_000]


def _words(answer: Any) -> list[str]:
    if "choices" in answer:
        return [choice["message"]["content"] or "" for choice in answer["choices"]]
    parts = list(answer.get("content") or ())
    for item in answer.get("output") or ():
        # An item of reasoning may say that it has none.
        parts += item.get("content") or ()
    return [part["text"] for part in parts if isinstance(part.get("text"), str)]
