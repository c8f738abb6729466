"""The only loop over targets: try, wait for the first good event, answer; else the next one.

A turn has two moments that matter. Until the first good event nothing has been said to the
caller, so any failure may be tried again elsewhere; after it, none may. Greetings (`created`,
`in_progress`, quota and metadata frames) are held back until then, bounded in bytes and time.

An upstream that speaks its caller's dialect is not translated: its frames pass as they come, and a watcher reads along.

What each verdict means for the loop:

| verdict      | this target           | counts as a retry | then                                   |
|--------------|-----------------------|-------------------|----------------------------------------|
| CALLER       | blameless             | -                 | to the caller at once                  |
| ENCRYPTED    | blameless             | no                | once more without those items          |
| UNAUTHORIZED | one token exchange    | no                | once more, then the next target        |
| MODEL, EXHAUSTED, UNENTITLED | left for this turn | no | the next target                            |
| LIMITED      | rests                 | no                | the next target, or this one later     |
| OVERLOADED, SERVER, FORBIDDEN, PATH, SILENT, CUT | rests | yes        | the next target, or this one later |
"""

import asyncio
import contextlib
import logging
import random
from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from codex_proxy.clock import Clock
from codex_proxy.config import Live
from codex_proxy.errors import (
    BackendFault,
    OutOfFunds,
    PoolBusy,
    PoolError,
    PoolShortage,
    ProxyError,
    RequestError,
    UpstreamError,
    Verdict,
)
from codex_proxy.net import Answer, NetError, NetKind
from codex_proxy.protocol.frames import Frame, Frames
from codex_proxy.protocol.request import BackendRequest
from codex_proxy.protocol.responses import failure_of, has_text, is_handshake, words_of
from codex_proxy.protocol.sse import Batch, Event, EventTooLarge, Parser
from codex_proxy.protocol.watchers import Watcher, watcher_for
from codex_proxy.protocol.wire import BadJson, loads_lenient
from codex_proxy.tasks import Background, Job
from codex_proxy.trace import Attempt, Decision, End, Trace, TraceSink, Usage
from codex_proxy.upstream.backend import net_failure
from codex_proxy.upstream.budget import RetryBudget, Slot
from codex_proxy.upstream.gate import Gate, OpenGate
from codex_proxy.upstream.route import Lease, Route

logger = logging.getLogger(__name__)

# What is held back before the first good event: `created` repeats the caller's instructions
# and tools, so it may be large; past this we answer with what we have.
MAX_HELD_BYTES = 4 * 1024 * 1024

# A shortage that ends so soon is waited for instead of told.
LONGEST_PAUSE = 3.0
LONGEST_PAUSES = 6.0

# After the terminal event the backend ends its body at once; a connection whose end has been
# read serves the next request.
_TAIL_SECONDS = 1.0

# The events that tell something of the target itself.
_TELLING = frozenset({"codex.rate_limits", "response.output_item.done"})

# What a unary answer (compact, search, images) may hold.
MAX_UNARY_BYTES = 128 * 1024 * 1024

DRAIN_IDLE_SECONDS = 60.0
"""How long an answer whose caller has left may pause until it is given up..."""
DRAIN_SECONDS = 600.0
"""...and how long it may go on in all."""
MAX_DRAINS = 100
"""How many such answers are read at a time; past it they end with their callers."""
_DRAIN_LOOK_SECONDS = 5.0


@dataclass(slots=True, frozen=True)
class Head:
    """What a sink learns when an answer begins."""

    alias: str
    status: int
    headers: Mapping[str, str]
    """The backend's; lower-case names. Most of them are nobody's business downstream."""
    lease: Lease
    content_type: str
    watcher: Watcher | None = None
    """What reads along with an answer that passes as it is; None for one that is translated."""


class Sink(Protocol):
    """Where an answer goes: a dialect's encoder and the caller's connection."""

    failure: UpstreamError | None
    """A failure that came after the answer had begun."""

    async def open(self, head: Head) -> None:
        """Begin the answer; after this nothing is tried again."""
        ...

    async def send(self, batch: Batch) -> bool:
        """Take the events of one read, and the list itself; False when the caller has all it asked for."""
        ...

    async def body(self, data: bytes) -> None:
        """Take a part of an answer that is no event stream."""
        ...

    async def pass_on(self, data: bytes) -> None:
        """Take whole frames, or all, of an answer that passes as it is; its watcher has seen them."""
        ...

    def mute(self) -> None:
        """Write nothing more: the caller has left, and the answer is read to its end all the same."""
        ...

    async def keepalive(self) -> None:
        """Show a sign of life."""
        ...

    async def end(self) -> None:
        """End an answer whose last event has been sent."""
        ...

    async def fail(self, error: ProxyError) -> None:
        """End with *error*: as a status when nothing has been said yet, else in the stream."""
        ...

    def usage(self, *, estimate: bool) -> Usage:
        """Return the turn's tokens; an estimate when asked for one and the backend said nothing."""
        ...

    def end_state(self) -> End:
        """Return how the answer ended, seen from the caller."""
        ...

    @property
    def is_stream(self) -> bool:
        """Whether the caller sees the answer as it comes."""
        ...

    @property
    def keeps_alive_early(self) -> bool:
        """Whether a sign of life may be shown while no account has answered yet."""
        ...

    @property
    def ended_early(self) -> bool:
        """Whether the caller's own limit ended the answer, so that the backend is still writing."""
        ...

    @property
    def wants_failure_events(self) -> bool:
        """Whether a refusal of the caller's own request may go out as the event it came as."""
        ...

    @property
    def delivered_bytes(self) -> int:
        """How many bytes of an answer went to the caller."""
        ...

    @property
    def text_bytes(self) -> int:
        """About how many bytes of text there are so far, without what a dialect puts around each word."""
        ...


class Exchange:
    """One turn under way: a task of its own, so that it can outlive its caller's connection."""

    def __init__(self, executor: "Executor", request: BackendRequest, sink: Sink, trace: Trace) -> None:
        self._executor = executor
        self._request = request
        self._sink = sink
        self._trace = trace
        self._passage = executor.gate.enter(trace, request)
        self._caller_gone = False
        self._lease: Lease | None = None
        """The target that is being asked."""
        self._drains = False
        """The caller has left, and the answer is read on."""
        self._cut: ProxyError | None = None
        self._committed = False
        self._ended = False
        """The caller has the end of its answer; what follows is tidying up."""
        self._ended_by_us = False
        self._unseen_bytes = 0
        """About how much the model has thought that comes sealed, and is paid like what it says."""
        self._started = executor.clock.monotonic()
        self._written = self._heard = self._started
        self._over: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.task: asyncio.Task[None] | None = None

    # -- from outside ---------------------------------------------------------------------

    @property
    def is_stream(self) -> bool:
        """Whether the caller sees the answer as it comes."""
        return self._sink.is_stream

    async def wait(self) -> None:
        """Wait for the end; when the waiting is cancelled, the exchange goes on."""
        await self._over

    def start(self, background: Background) -> None:
        """Run it as a task of *background*."""
        self.task = background.spawn(self.run(), name=f"exchange:{self._trace.id}")
        self.task.add_done_callback(self._on_done)

    def _on_done(self, task: asyncio.Task[None]) -> None:
        if not self._over.done():
            if task.cancelled():
                self._over.cancel()
            else:
                self._over.set_result(None)

    def caller_gone(self) -> None:
        """Say that nobody listens any more: an account stops working for it at once, an upstream may go on."""
        if self.task is not None and not self.task.done() and not self._drain_on():
            self._caller_gone = True
            self.task.cancel()

    def _drain_on(self) -> bool:
        """Read the answer on without its caller, where its upstream wants that; tell whether that is so."""
        lease, executor = self._lease, self._executor
        if self._drains:
            return True
        if lease is None or not lease.drains or self._ended or not executor.begin_drain(self):
            return False
        self._drains = True
        self._trace.upstream = lease.upstream
        self._heard = executor.clock.monotonic()
        self._sink.mute()
        _ = executor.background.spawn(self._bound_drain(), name=f"drain:{self._trace.id}")
        return True

    async def _bound_drain(self) -> None:
        """End an answer that nobody waits for when it pauses for too long, or goes on for too long."""
        clock = self._executor.clock
        until = clock.monotonic() + DRAIN_SECONDS
        while self.task is not None and not self.task.done():
            now = clock.monotonic()
            if now >= until or now - self._heard >= DRAIN_IDLE_SECONDS:
                self._caller_gone = True
                self.task.cancel()
                return
            await clock.sleep(_DRAIN_LOOK_SECONDS)

    def cut(self, error: ProxyError) -> None:
        """End it from our side, with a proper ending for the caller."""
        if self._cut is None and self.task is not None and not self.task.done():
            self._cut = error
            self.task.cancel()

    def show_life(self, after: float) -> None:
        """Tell a caller who has heard nothing for *after* seconds that its turn is not forgotten.

        Only before an answer: meanwhile another account may still be tried. Once it has begun the reading
        of the answer sees to it.
        """
        now = self._executor.clock.monotonic()
        if self._committed or self._ended or not self._sink.keeps_alive_early or now - self._written < after:
            return
        self._written = now
        _ = self._executor.background.spawn(self._show_life(), name=f"alive:{self._trace.id}")

    async def _show_life(self) -> None:
        # Who has left meanwhile is noticed by the turn itself.
        with contextlib.suppress(ConnectionError):
            await self._sink.keepalive()

    # -- the turn -------------------------------------------------------------------------

    async def run(self) -> None:
        """Serve the turn to its end; every way out settles it exactly once."""
        trace, end = self._trace, End.FAILED
        try:
            await self._passage.admit()
            await self._serve()
            end = self._sink.end_state()
        except ProxyError as exc:
            await self._fail(exc)
        except asyncio.CancelledError:
            if self._cut is not None:
                await self._fail(self._cut)
            elif self._caller_gone:
                end = self._left()
            else:
                raise
        except ConnectionError:
            # Only writing to the caller raises this; the way to the backend has errors of its own.
            end = self._left()
        except Exception:
            logger.exception("turn broke id=%s", trace.id)
            await self._fail(ProxyError("internal error"))
        finally:
            self._finish(End.CALLER_GONE if self._drains else end)
            self._passage.settle()

    def _left(self) -> End:
        """Return how a turn ended whose caller has left; many leave at once after the last event."""
        return self._sink.end_state() if self._ended else End.CALLER_GONE

    def _finish(self, end: End) -> None:
        trace, now = self._trace, self._executor.clock.monotonic()
        # What was sent was read: a caller who leaves early has used something all the same.
        is_sent = any(attempt.outcome in ("", "ok") for attempt in trace.attempts)
        if is_sent and not trace.alias and trace.attempts[-1].is_upstream:
            trace.upstream = trace.attempts[-1].alias
        try:
            trace.usage = self._sink.usage(estimate=self._committed or (end is End.CALLER_GONE and is_sent))
            trace.answer_bytes = self._sink.delivered_bytes
        except Exception:
            # It ends all the same, and gives back its place and its money.
            logger.exception("usage is not known id=%s", trace.id)
        if trace.finish(end, now):
            self._executor.finished(self, trace)

    async def _fail(self, error: ProxyError) -> None:
        fault = error.fault if isinstance(error, UpstreamError) else error
        self._trace.error = fault.code or fault.type or "error"
        with contextlib.suppress(ConnectionError, asyncio.CancelledError):
            await self._sink.fail(error)

    async def _serve(self) -> None:
        """Try targets until one answers."""
        executor, settings = self._executor, self._executor.live.current
        clock = executor.clock
        # Left for good in this turn; left for now, because of passing trouble.
        left: set[str] = set()
        resting: set[str] = set()
        passing = 0
        failures: dict[str, int] = {}
        pauses: list[float] = []
        last: UpstreamError | None = None
        # What leaves an account for good costs no retry, but it may not take for ever either.
        free_seconds = settings.first_byte_timeout
        while True:
            begun = clock.monotonic()
            try:
                lease, error = await self._try(left | resting, last)
            except PoolBusy as exc:
                patience = exc.patience if exc.patience is not None else settings.queue_timeout
                now = clock.monotonic()
                left_over = self._started + patience - now
                if left_over <= 0:
                    raise
                if self._trace.queued is None:
                    self._trace.queued = now
                try:
                    await executor.route.wait_for_place(
                        self._request,
                        left,
                        seconds=min(left_over, exc.retry_after),
                        ticket=self._started,
                    )
                finally:
                    self._trace.queued_seconds += clock.monotonic() - now
                # Those that were in passing trouble may be well again.
                resting.clear()
                continue
            except PoolError as exc:
                pause = self._pause(exc, last, pauses, settings.max_retry)
                if pause is None:
                    raise self._last_word(exc, last) from last
                pauses.append(pause)
                await clock.sleep(pause)
                resting.clear()
                continue
            except NoPlace as exc:
                assert last is not None
                raise self._gave_up(last) from exc
            except RequestError as exc:
                raise self._last_word(exc, last) from last
            if error is None:
                return
            if self._drains:
                # Nobody is left to be served by another target.
                raise error
            last, key = error, lease.key
            match error.verdict:
                case Verdict.CALLER:
                    raise error
                case (
                    Verdict.ENCRYPTED
                    | Verdict.UNAUTHORIZED
                    | Verdict.MODEL
                    | Verdict.EXHAUSTED
                    | Verdict.UNENTITLED
                    | Verdict.LIMITED
                ):
                    (resting if error.verdict is Verdict.LIMITED else left).add(key)
                    free_seconds -= clock.monotonic() - begun
                    if free_seconds <= 0:
                        raise self._gave_up(error)
                case (
                    Verdict.OVERLOADED
                    | Verdict.SERVER
                    | Verdict.FORBIDDEN
                    | Verdict.PATH
                    | Verdict.SILENT
                    | Verdict.CUT
                ):
                    failures[key] = failures.get(key, 0) + 1
                    most = lease.max_retries
                    # An upstream that refuses a request refuses it again.
                    is_final = bool(lease.upstream) and error.verdict is Verdict.FORBIDDEN
                    (left if is_final or (most is not None and failures[key] > most) else resting).add(key)
                    passing += 1
                    if passing > settings.max_retry:
                        raise self._gave_up(error)
                    # The first change of account costs nothing; the next ones come slower.
                    await clock.sleep(executor.backoff(passing - 1))

    def _pause(
        self, error: PoolError, last: UpstreamError | None, pauses: list[float], max_retry: int
    ) -> float | None:
        """Return how long to wait for an account that will be back in a moment; None: tell the caller.

        A wait is no attempt, but there are no more of them than of retries: nobody is kept in a circle.
        """
        if not isinstance(error, PoolShortage) or len(pauses) >= max_retry:
            return None
        if last is not None and last.verdict is Verdict.ENCRYPTED and not error.is_for_history:
            return None
        pause = max(0.05, error.retry_after)
        return pause if pause <= LONGEST_PAUSE and sum(pauses) + pause <= LONGEST_PAUSES else None

    def _last_word(self, error: ProxyError, last: UpstreamError | None) -> ProxyError:
        """Choose between what the pool says and what the last account said."""
        if isinstance(error, PoolError) and error.is_for_history:
            # Who can read it will be back; a refusal would end the conversation for good.
            return error
        if last is not None and last.verdict is Verdict.ENCRYPTED:
            # Nobody could read it, so it is the conversation that cannot go on.
            return RequestError(
                last.fault.message, param="input", code=last.fault.code or "invalid_encrypted_content"
            )
        return error

    def _gave_up(self, error: UpstreamError) -> ProxyError:
        tries = len(self._trace.attempts)
        return PoolShortage(
            f"the backend failed {tries} time{'s' if tries != 1 else ''} ({error.verdict.value}); "
            "try again in a moment",
            retry_after=max(1.0, min(error.retry_after or 1.0, 30.0)),
        )

    async def _try(
        self, tried: Collection[str], last: UpstreamError | None
    ) -> tuple[Lease, UpstreamError | None]:
        """Try one target, mending it once if that is possible; return its lease, and no error if it answered.

        The target is chosen when its turn has come: one chosen before a wait may be resting after it.
        """
        if last is None or not last.verdict.is_passing:
            return await self._try_in(Slot(), tried)
        async with self._executor.retry_slot() as slot:
            return await self._try_in(slot, tried)

    async def _try_in(self, slot: Slot, tried: Collection[str]) -> tuple[Lease, UpstreamError | None]:
        lease = self._lease = self._pick(tried)
        try:
            error = await self._attempt(lease, slot)
            if (
                error is not None
                and error.verdict in (Verdict.UNAUTHORIZED, Verdict.ENCRYPTED)
                and await lease.recover(error, self._request)
            ):
                error = await self._attempt(lease, slot)
            if error is not None:
                lease.failed(error)
            return lease, error
        finally:
            self._lease = None
            lease.release()

    def _pick(self, tried: Collection[str]) -> Lease:
        try:
            lease = self._executor.route.pick(self._request, tried)
        except PoolError as exc:
            if isinstance(exc.decision, Decision):
                self._tell(exc.decision)
            raise
        self._tell(lease.decision)
        return lease

    def _tell(self, decision: Decision) -> None:
        """Add a choice to the turn's story; of the many looks of one wait, the last stands for all."""
        told = self._trace.decisions
        if told and not told[-1].alias and not decision.alias:
            told[-1] = decision
        else:
            told.append(decision)

    async def _attempt(self, lease: Lease, slot: Slot) -> UpstreamError | None:
        """Send the request once; return its failure when that came before the answer began."""
        trace, clock = self._trace, self._executor.clock
        attempt = Attempt(lease.alias, clock.monotonic(), is_upstream=bool(lease.upstream))
        trace.attempts.append(attempt)
        trace.is_as_named = lease.is_as_named
        answer: Answer | None = None
        try:
            answer = await lease.open(self._request)
            attempt.headers = now = clock.monotonic()
            if answer.head_seconds is not None:
                attempt.connected = now - answer.head_seconds
            attempt.status = answer.status
            if lease.is_native:
                await self._native(lease, answer, slot)
            elif self._request.endpoint == "responses":
                await self._stream(lease, answer, slot)
            else:
                await self._unary(lease, answer, slot)
        except (UpstreamError, NetError) as exc:
            error = exc if isinstance(exc, UpstreamError) else net_failure(exc)
            attempt.outcome = error.verdict.value
            if not error.in_stream:
                attempt.status = attempt.status or error.status
            if not self._committed:
                return error
            # The answer had begun: it ends here, and says so.
            if isinstance(exc, NetError):
                words = "the connection to the backend was lost while it answered"
                error = UpstreamError(error.verdict, BackendFault(words, code=error.fault.code))
            lease.failed(error)
            trace.error = error.fault.code or error.verdict.value
            await self._sink.fail(error)
            return None
        finally:
            attempt.seconds = clock.monotonic() - attempt.started
            if self._ended and not attempt.outcome:
                # Also when the caller leaves while the end of the body is still to be read.
                attempt.outcome = "ok"
            if answer is not None:
                answer.release()
        return None

    # -- event streams --------------------------------------------------------------------

    async def _stream(self, lease: Lease, answer: Answer, slot: Slot) -> None:
        parser = Parser(runs=True)
        held: Batch = []
        held_bytes = 0
        clock = self._executor.clock
        since = clock.monotonic()
        is_first = True
        while True:
            chunk = answer.read_nowait()
            if chunk is None:
                chunk = await self._read(answer, since, self._patience(lease, is_first=is_first), held)
                if chunk is None:
                    # The hold is over: what is held begins the answer.
                    await self._begin(lease, answer, slot)
                    batch, held = held, []
                    if not await self._send(lease, batch):
                        break
                    continue
            self._heard = since = clock.monotonic()
            is_first = False
            batch, size = _feed(parser, chunk), len(chunk)
            # While a slow reader is waited for, what it will get is held once, not here too.
            del chunk
            self._unseen_bytes += _observe(lease, batch)
            if not self._committed:
                held += batch
                held_bytes += size
                if not self._is_good(batch) and held_bytes <= MAX_HELD_BYTES:
                    batch = []
                else:
                    await self._begin(lease, answer, slot)
                    batch, held = held, []
            if batch and not await self._send(lease, batch):
                break
            if not size:
                raise UpstreamError(
                    Verdict.CUT, BackendFault("the backend's stream ended before its answer did")
                )
        self._ended = True
        await self._sink.end()
        await self._drain(answer)

    def _patience(self, lease: Lease, *, is_first: bool) -> float:
        """Return how long *lease*'s target may be silent."""
        settings = self._executor.live.current
        if not is_first:
            return settings.idle_timeout
        own = lease.first_byte_timeout
        return own if own is not None else settings.first_byte_timeout

    async def _begin(self, lease: Lease, answer: Answer, slot: Slot, watcher: Watcher | None = None) -> None:
        """Begin the answer: from here on no other target may try."""
        self._committed = True
        slot.free()
        lease.ok()
        trace = self._trace
        trace.alias, trace.upstream, trace.decision = lease.alias, lease.upstream, lease.decision.rule
        trace.first_event = self._executor.clock.monotonic()
        await self._sink.open(
            Head(
                lease.alias,
                answer.status,
                answer.headers,
                lease,
                answer.headers.get("content-type", ""),
                watcher,
            )
        )
        self._request.release()
        self._written = self._executor.clock.monotonic()

    def _is_good(self, batch: Batch) -> bool:
        """Tell whether the answer has begun with *batch*; raise a failure that comes before that."""
        for event in batch:
            failure = failure_of(event, now=self._executor.clock.now())
            if failure is None:
                if not is_handshake(event):
                    return True
            elif failure.verdict is Verdict.CALLER and self._sink.wants_failure_events:
                return True
            else:
                raise failure
        return False

    async def _send(self, lease: Lease, batch: Batch) -> bool:
        # Looked at before it is sent: the sink takes the list.
        is_first_text = self._trace.first_text is None and has_text(batch)
        if self._trace.said is not None:
            self._trace.said.add(words_of(batch))
        try:
            more = await self._sink.send(batch)
        except ConnectionError:
            if not self._drain_on():
                raise
            # What it was given is told of in the answer's story; now it says whether that was the end.
            more = await self._sink.send([])
        self._written = self._executor.clock.monotonic()
        if is_first_text:
            self._trace.first_text = self._written
        failure = self._sink.failure
        if failure is not None:
            self._trace.error = failure.fault.code or failure.verdict.value
            lease.failed(failure)
        if more and not await self._passage.top_up(self._sink.text_bytes + self._unseen_bytes):
            await self._out_of_funds()
            return False
        return more

    async def _out_of_funds(self) -> None:
        """End an answer that nobody can pay for."""
        self._ended_by_us = True
        error = OutOfFunds("the money for this turn is used up, so its answer ends here")
        self._trace.error = error.code
        await self._sink.fail(error)

    async def _read(
        self, answer: Answer, since: float, quiet: float, held: Sequence[Event | Frame]
    ) -> bytes | None:
        """Return the next bytes, showing signs of life meanwhile; None when the hold is over.

        Args:
            since: When something was heard last.
            quiet: How long the backend may be silent after that.
        """
        clock, settings = self._executor.clock, self._executor.live.current
        while True:
            now = clock.monotonic()
            wait = since + quiet - now
            if wait <= 0:
                raise UpstreamError(Verdict.SILENT, BackendFault(f"the backend was silent for {quiet:g} s"))
            if self._committed:
                wait = min(wait, self._written + settings.keep_alive_after - now)
            elif held and self._sink.is_stream and not self._sink.keeps_alive_early:
                wait = min(wait, self._started + settings.hold_created - now)
            if wait > 0:
                try:
                    return await answer.read(wait)
                except NetError as exc:
                    if exc.kind is not NetKind.TIMEOUT:
                        raise
                continue
            if not self._committed:
                # Frames are shown as they are, whatever they say.
                if any(not isinstance(one, Event) or one.type == "response.created" for one in held):
                    return None
                # Nothing to show yet; look again when something may have come.
                return await answer.read(since + quiet - now)
            try:
                await self._sink.keepalive()
            except ConnectionError:
                if not self._drain_on():
                    raise
            self._written = clock.monotonic()

    async def _drain(self, answer: Answer) -> None:
        """Read the end of the body, so that the connection can be used again."""
        if self._ended_by_us or self._sink.ended_early:
            # The backend is still writing.
            return
        try:
            while (chunk := answer.read_nowait()) is not None:
                if not chunk:
                    return
            async with asyncio.timeout(_TAIL_SECONDS):
                while await answer.read():
                    pass
        except (NetError, TimeoutError):
            return

    # -- answers that pass as they are ------------------------------------------------------

    async def _native(self, lease: Lease, answer: Answer, slot: Slot) -> None:
        """Pass on an answer in the caller's own dialect."""
        native = self._request.native
        assert native is not None
        watcher = watcher_for(native.capability, self._executor.clock.now, wants_usage=native.wants_usage)
        if self._trace.said is not None:
            watcher.words = []
        content_type = answer.headers.get("content-type", "")
        if "text/html" in content_type:
            # Somebody's page, such as one to log in.
            raise _odd_answer()
        if native.stream and "json" not in content_type:
            await self._native_stream(lease, answer, slot, watcher)
            return
        data = await self._read_whole(lease, answer)
        watcher.whole(data)
        if watcher.failure is not None:
            raise watcher.failure
        if native.stream or not watcher.begun:
            raise _odd_answer()
        self._unseen_bytes += _tell_of(lease, watcher)
        await self._begin(lease, answer, slot, watcher)
        if not await self._passage.top_up(self._sink.text_bytes + self._unseen_bytes):
            await self._out_of_funds()
            return
        await self._pass(data, watcher)
        await self._sink.end()
        self._ended = True

    async def _read_whole(self, lease: Lease, answer: Answer) -> bytes:
        """Read a plain answer; its caller waits for all of it, so nothing is shown meanwhile."""
        parts: list[bytes] = []
        size = 0
        clock = self._executor.clock
        while chunk := await answer.read(self._patience(lease, is_first=not parts)):
            self._heard = clock.monotonic()
            parts.append(chunk)
            size += len(chunk)
            if size > MAX_UNARY_BYTES:
                raise UpstreamError(Verdict.CUT, BackendFault("the upstream sent an answer without end"))
        return b"".join(parts)

    async def _native_stream(self, lease: Lease, answer: Answer, slot: Slot, watcher: Watcher) -> None:
        frames = Frames()
        held: list[Frame] = []
        held_bytes = 0
        clock = self._executor.clock
        since = clock.monotonic()
        is_first = True
        while True:
            chunk = answer.read_nowait()
            if chunk is None:
                chunk = await self._read(answer, since, self._patience(lease, is_first=is_first), held)
                if chunk is None:
                    await self._begin(lease, answer, slot, watcher)
                    whole, held = held, []
                    await self._pass(b"".join([frame.raw for frame in whole]), watcher)
                    continue
            self._heard = since = clock.monotonic()
            is_first = False
            whole = _looked_at(frames, chunk, watcher)
            self._unseen_bytes += _tell_of(lease, watcher)
            failure = watcher.failure
            if not self._committed:
                held += whole
                held_bytes += sum(len(frame.raw) for frame in whole)
                if failure is not None and not (
                    failure.verdict is Verdict.CALLER and self._sink.wants_failure_events
                ):
                    raise failure
                if watcher.begun or failure is not None or held_bytes > MAX_HELD_BYTES:
                    if not watcher.begun and failure is None and not any(frame.lines for frame in held):
                        raise _odd_answer()
                    await self._begin(lease, answer, slot, watcher)
                    whole, held = held, []
                else:
                    whole = []
            goes_on = await self._pass(b"".join([frame.raw for frame in whole]), watcher) if whole else True
            if failure is not None:
                self._trace.error = failure.fault.code or failure.verdict.value
                lease.failed(failure)
                self._ended_by_us = True
                await self._sink.fail(failure)
                return
            if not goes_on or watcher.ended is not None:
                break
            if not chunk:
                if watcher.finish() is None:
                    raise UpstreamError(
                        Verdict.CUT, BackendFault("the upstream's stream ended before its answer did")
                    )
                break
        self._ended = True
        await self._sink.end()
        await self._drain(answer)

    async def _pass(self, data: bytes, watcher: Watcher) -> bool:
        """Pass on what the watcher has seen; False when it is the last that is."""
        if watcher.words:
            if self._trace.said is not None:
                self._trace.said.add("".join(watcher.words).encode("utf-8", "replace"))
            watcher.words.clear()
        try:
            await self._sink.pass_on(data)
        except ConnectionError:
            if not self._drain_on():
                raise
        self._written = self._executor.clock.monotonic()
        if watcher.delivered and self._trace.first_text is None:
            self._trace.first_text = self._written
        size = self._sink.text_bytes + self._unseen_bytes
        if watcher.ended is None and not await self._passage.top_up(size):
            await self._out_of_funds()
            return False
        return True

    # -- other answers --------------------------------------------------------------------

    async def _unary(self, lease: Lease, answer: Answer, slot: Slot) -> None:
        """Pass an answer on as it is: whole when it is JSON, as it comes when it streams."""
        if "text/event-stream" not in answer.headers.get("content-type", ""):
            data = await answer.read_all(MAX_UNARY_BYTES)
            if b'"encrypted_content"' in data:
                self._observe_answer(lease, data)
            await self._begin(lease, answer, slot)
            if self._trace.said is not None:
                self._trace.said.add(data)
            await self._sink.body(data)
            await self._sink.end()
            self._ended = True
            return
        chunk = await answer.read()
        await self._begin(lease, answer, slot)
        while chunk:
            await self._sink.body(chunk)
            chunk = await answer.read()
        self._ended = True
        await self._sink.end()

    def _observe_answer(self, lease: Lease, data: bytes) -> None:
        try:
            payload = loads_lenient(data)
        except BadJson:
            return
        if isinstance(payload, dict):
            lease.observe(self._request.endpoint, payload)


def _observe(lease: Lease, batch: Batch) -> int:
    """Let the target take in what events tell of it; return about how many bytes of text they have sealed."""
    unseen = 0
    for event in batch:
        kind = event.type
        if kind in _TELLING and (kind == "codex.rate_limits" or b'"encrypted_content"' in event.data):
            lease.observe(kind, event.json)
            unseen += _sealed(event)
    return unseen


def _sealed(event: Event) -> int:
    """Return about how many bytes of text an item has that comes sealed."""
    item = event.json.get("item")
    content = item.get("encrypted_content") if isinstance(item, dict) else None
    # Base64.
    return len(content) * 3 // 4 if isinstance(content, str) else 0


def _odd_answer() -> UpstreamError:
    return UpstreamError(Verdict.SERVER, BackendFault("the upstream did not answer in the way it was asked"))


def _looked_at(frames: Frames, chunk: bytes, watcher: Watcher) -> list[Frame]:
    """Return the frames that *chunk* completes, as far as they are for the caller."""
    try:
        whole = frames.feed(chunk) if chunk else frames.finish()
    except EventTooLarge as exc:
        raise UpstreamError(Verdict.CUT, BackendFault("the upstream sent an event without end")) from exc
    return [frame for frame in whole if watcher.look(frame)]


def _tell_of(lease: Lease, watcher: Watcher) -> int:
    """Let the target take in what events tell of it; return about how many bytes of text they have sealed."""
    unseen = 0
    for event in watcher.told:
        lease.observe(event.type, event.json)
        unseen += _sealed(event)
    watcher.told.clear()
    return unseen


def _feed(parser: Parser, chunk: bytes) -> Batch:
    try:
        return parser.feed(chunk) if chunk else parser.finish()
    except EventTooLarge as exc:
        raise UpstreamError(Verdict.CUT, BackendFault("the backend sent an event without end")) from exc


class NoPlace(Exception):
    """The retry budget had no place."""


class Executor:
    """Runs exchanges over a route."""

    def __init__(
        self,
        route: Route,
        *,
        live: Live,
        clock: Clock,
        background: Background,
        gate: Gate | None = None,
        rng: random.Random | None = None,
    ) -> None:
        self.route = route
        self.live = live
        self.clock = clock
        self.gate: Gate = gate if gate is not None else OpenGate()
        self.background = background
        self._rng = rng if rng is not None else random.Random()
        self._budget = RetryBudget()
        self._exchanges: set[Exchange] = set()
        self._drains: set[Exchange] = set()
        self._listeners: list[TraceSink] = []
        self._idle = asyncio.Event()
        self._idle.set()

    def jobs(self) -> list[Job]:
        """Return what runs by itself: the signs of life for those who still wait for an account."""
        return [Job("keep-alive", self._look_seconds, self._show_life)]

    def _look_seconds(self) -> float:
        # One look at all turns every second costs less than a timer for each of them.
        return min(1.0, self.live.current.keep_alive_after / 4)

    async def _show_life(self) -> None:
        after = self.live.current.keep_alive_after
        for exchange in list(self._exchanges):
            exchange.show_life(after)

    def listen(self, sink: TraceSink) -> None:
        """Have *sink* called with every finished turn."""
        self._listeners.append(sink)

    def begin(self, request: BackendRequest, sink: Sink, trace: Trace) -> Exchange:
        """Start a turn as a task of its own."""
        exchange = Exchange(self, request, sink, trace)
        self._exchanges.add(exchange)
        self._budget.active = len(self._exchanges)
        self._idle.clear()
        exchange.start(self.background)
        return exchange

    def finished(self, exchange: Exchange, trace: Trace) -> None:
        """Forget a turn and tell who listens."""
        self._exchanges.discard(exchange)
        self._drains.discard(exchange)
        self._budget.active = len(self._exchanges)
        if not self._exchanges:
            self._idle.set()
        for listener in self._listeners:
            try:
                listener(trace)
            except Exception:
                logger.exception("listener failed id=%s", trace.id)

    def begin_drain(self, exchange: Exchange) -> bool:
        """Let *exchange* go on without its caller; False when too many do so already."""
        if len(self._drains) >= MAX_DRAINS:
            return False
        self._drains.add(exchange)
        return True

    @property
    def drains(self) -> int:
        """How many turns are read on whose callers have left."""
        return len(self._drains)

    @property
    def in_flight(self) -> int:
        """How many turns are under way."""
        return len(self._exchanges)

    @property
    def streams(self) -> int:
        """How many of them are answered as a stream."""
        return sum(exchange.is_stream for exchange in self._exchanges)

    @property
    def retrying(self) -> int:
        """How many hold a place in the retry budget."""
        return self._budget.retrying

    async def drain(self, seconds: float) -> bool:
        """Wait until no turn is under way; False when some still are after *seconds*."""
        try:
            async with asyncio.timeout(seconds):
                await self._idle.wait()
        except TimeoutError:
            return False
        return True

    def cut_all(self, error: ProxyError) -> None:
        """End every turn with *error*."""
        for exchange in list(self._exchanges):
            exchange.cut(error)

    def backoff(self, retries: int) -> float:
        """Return the pause before a further retry: none before the first, then doubling, jittered."""
        if retries <= 0:
            return 0.0
        return min(4.0, 0.2 * 2.0 ** (retries - 1)) * (0.5 + self._rng.random())

    @contextlib.asynccontextmanager
    async def retry_slot(self) -> AsyncIterator[Slot]:
        """Hold a place in the retry budget, for a retry after passing trouble.

        Waited for as long as for an answer: those that hold the places may be slow, and well.

        Raises:
            NoPlace: If there was none for too long.
        """
        async with contextlib.AsyncExitStack() as stack:
            try:
                async with asyncio.timeout(self.live.current.first_byte_timeout):
                    slot = await stack.enter_async_context(self._budget.slot())
            except TimeoutError as exc:
                raise NoPlace from exc
            yield slot
