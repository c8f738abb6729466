"""The loop over targets by itself: targets, clock and caller are played, so that nothing waits."""

import asyncio
import contextlib
import math
import random
from collections.abc import AsyncIterator, Callable, Collection, Mapping
from typing import Any

import pytest

from codex_proxy.clock import ManualClock
from codex_proxy.config import Live, Settings
from codex_proxy.errors import (
    BackendFault,
    PoolBusy,
    PoolEmpty,
    PoolExhausted,
    PoolShortage,
    ProxyError,
    RequestError,
    UpstreamError,
    Verdict,
)
from codex_proxy.net import Answer, NetError, NetKind
from codex_proxy.protocol.request import BackendRequest
from codex_proxy.protocol.sse import Batch
from codex_proxy.protocol.wire import JsonObject, dumps
from codex_proxy.tasks import Background
from codex_proxy.trace import LOCAL, Decision, End, Trace, Usage, UsageSource
from codex_proxy.upstream.executor import DRAIN_IDLE_SECONDS, DRAIN_SECONDS, Executor, Head

CREATED = {"type": "response.created", "response": {"id": "r"}}
DELTA = {"type": "response.output_text.delta", "delta": "hi"}
DONE = {"type": "response.completed", "response": {"id": "r"}}


class Played(Answer):
    """An answer that consists of reads; an exception among them is raised, None waits for ever."""

    __slots__ = ("reads", "released")

    def __init__(
        self, *reads: JsonObject | NetError | None, headers: Mapping[str, str] | None = None
    ) -> None:
        self.reads = list(reads)
        self.released = 0
        self.head_seconds = None
        self.status = 200
        self.headers = dict(headers or {})

    async def read(self, within: float | None = None) -> bytes:
        if not self.reads:
            return b""
        read = self.reads.pop(0)
        if read is None:
            await asyncio.Event().wait()
        if isinstance(read, NetError):
            raise read
        return b"data: " + dumps(read) + b"\n\n"

    def close(self) -> None:
        raise AssertionError("the executor gives answers back")

    def release(self) -> None:
        self.released += 1


class Target:
    """One played target: what it does, time after time."""

    upstream = ""
    is_native = False
    is_as_named = False
    drains = False
    max_retries: int | None = None
    first_byte_timeout: float | None = None

    def __init__(self, key: str, *does: Played | UpstreamError) -> None:
        self.key = self.alias = key
        self.decision = Decision(self.key, "played", "none", 0.0)
        self.does = list(does)
        self.log: list[str] = []
        self.mends = False

    async def open(self, request: BackendRequest) -> Answer:
        self.log.append("open")
        what = self.does.pop(0) if len(self.does) > 1 else self.does[0]
        if isinstance(what, UpstreamError):
            raise what
        return what

    async def recover(self, error: UpstreamError, request: BackendRequest) -> bool:
        self.log.append("recover")
        return self.mends

    def wrap_turn_state(self, value: str) -> str:
        return value

    def observe(self, kind: str, payload: Mapping[str, object]) -> None:
        self.log.append(f"observe {kind}")

    def ok(self) -> None:
        self.log.append("ok")

    def failed(self, error: UpstreamError) -> None:
        self.log.append(f"failed {error.verdict.value}")

    def release(self) -> None:
        self.log.append("release")


class Targets:
    """A route over played targets; *nobody* is raised when none is left."""

    def __init__(self, *targets: Target, nobody: ProxyError | None = None) -> None:
        self.targets = targets
        self.nobody = nobody or PoolShortage("nobody", retry_after=1.0)
        self.picked: list[str] = []
        self.waits: list[tuple[float, float]] = []
        self.clock: ManualClock | None = None
        self.comes_back: Target | None = None
        """Who is there after a wait for a place."""

    def pick(self, request: BackendRequest, tried: Collection[str]) -> Target:
        for target in self.targets:
            if target.key not in tried:
                self.picked.append(target.key)
                return target
        raise self.nobody

    def limits(self) -> JsonObject | None:
        return None

    async def wait_for_place(
        self, request: BackendRequest, tried: Collection[str], *, seconds: float, ticket: float
    ) -> None:
        self.waits.append((seconds, ticket))
        if self.clock is not None:
            self.clock.advance(seconds)
        if self.comes_back is not None:
            self.targets = (*self.targets, self.comes_back)


class Caller:
    """A sink that remembers."""

    is_stream = True
    keeps_alive_early = False
    ended_early = False
    wants_failure_events = False
    delivered_bytes = 0
    text_bytes = 0

    def __init__(self) -> None:
        self.failure: UpstreamError | None = None
        self.log: list[str] = []
        self.error: ProxyError | None = None
        self.ended: End | None = None
        self.on_send: Callable[[], None] = lambda: None

    async def open(self, head: Head) -> None:
        self.log.append(f"open {head.alias}")

    async def send(self, batch: Batch) -> bool:
        self.on_send()
        self.log += [event.type for event in batch]
        if any(event.type == "response.completed" for event in batch):
            self.ended = End.COMPLETED
        return self.ended is None

    async def body(self, data: bytes) -> None:
        self.log.append(f"body {len(data)}")

    async def pass_on(self, data: bytes) -> None:
        self.log.append(f"passed {len(data)}")

    def mute(self) -> None:
        self.log.append("mute")

    async def keepalive(self) -> None:
        self.log.append("keepalive")

    async def end(self) -> None:
        self.log.append("end")

    async def fail(self, error: ProxyError) -> None:
        self.log.append("fail")
        self.error = error

    def usage(self, *, estimate: bool) -> Usage:
        return Usage(7, source=UsageSource.ESTIMATE) if estimate else Usage()

    def end_state(self) -> End:
        return self.ended or End.FAILED


class Purse:
    """A gate that remembers, and refuses when told to."""

    def __init__(self) -> None:
        self.settled: list[End] = []
        self.refusal: ProxyError | None = None
        self.top_ups = 0
        self.enough = True
        self._trace: Trace | None = None

    def enter(self, trace: Trace, request: BackendRequest) -> "Purse":
        self._trace = trace
        return self

    async def admit(self) -> None:
        if self.refusal is not None:
            raise self.refusal

    async def top_up(self, text_bytes: int) -> bool:
        self.top_ups += 1
        return self.enough

    def settle(self) -> None:
        assert self._trace is not None
        self.settled.append(self._trace.end)


class Stage:
    """An executor with its clock, its caller and all that it told."""

    def __init__(self, route: Targets, **settings: Any) -> None:
        self.route = route
        self.clock = ManualClock()
        self.background = Background()
        self.purse = Purse()
        self.executor = Executor(
            route,
            live=Live(Settings(**settings)),
            clock=self.clock,
            background=self.background,
            gate=self.purse,
            rng=random.Random(1),
        )
        self.traces: list[Trace] = []
        self.executor.listen(self.traces.append)
        self.caller = Caller()
        self.request = BackendRequest("responses", "m", "m", b"{}", stream=True)
        self.trace = Trace("t", "responses", LOCAL, self.clock.monotonic(), self.clock.now())

    async def run(self) -> Trace:
        """Serve one turn to its end."""
        await self.executor.begin(self.request, self.caller, self.trace).wait()
        assert self.traces == [self.trace]
        assert self.executor.in_flight == 0
        return self.trace


@contextlib.asynccontextmanager
async def stage(*targets: Target, nobody: ProxyError | None = None, **settings: Any) -> AsyncIterator[Stage]:
    played = Stage(Targets(*targets, nobody=nobody), **settings)
    try:
        yield played
    finally:
        await played.background.aclose()


def fault(verdict: Verdict, **fields: Any) -> UpstreamError:
    return UpstreamError(verdict, BackendFault("words"), **fields)


def good() -> Played:
    return Played(CREATED, DELTA, DONE)


async def test_a_turn_that_goes_well() -> None:
    target = Target("a", good())
    async with stage(target) as played:
        trace = await played.run()
        assert played.caller.log == ["open a", *(e["type"] for e in (CREATED, DELTA, DONE)), "end"]
        assert target.log == ["open", "ok", "release"]
        assert trace.end is End.COMPLETED
        assert trace.alias == "a"
        assert trace.decision == "played"
        assert [(a.alias, a.outcome, a.status) for a in trace.attempts] == [("a", "ok", 200)]
        assert trace.first_event is not None
        assert played.purse.settled == [End.COMPLETED]


@pytest.mark.parametrize("verdict", [v for v in Verdict if v is not Verdict.CALLER])
async def test_every_fault_of_a_target_goes_on_to_the_next(verdict: Verdict) -> None:
    first, second = Target("a", fault(verdict)), Target("b", good())
    async with stage(first, second, max_retry=1) as played:
        trace = await played.run()
        assert trace.end is End.COMPLETED
        mended = ["recover"] if verdict in (Verdict.UNAUTHORIZED, Verdict.ENCRYPTED) else []
        assert first.log == ["open", *mended, f"failed {verdict.value}", "release"]
        assert second.log == ["open", "ok", "release"]
        assert [a.outcome for a in trace.attempts] == [verdict.value, "ok"]
        assert played.caller.log[0] == "open b"


async def test_a_fault_of_the_caller_ends_the_turn() -> None:
    first, second = Target("a", fault(Verdict.CALLER, status=400)), Target("b", good())
    async with stage(first, second) as played:
        trace = await played.run()
        assert second.log == []
        assert isinstance(played.caller.error, UpstreamError)
        assert trace.end is End.FAILED
        assert trace.usage.source is UsageSource.NONE


@pytest.mark.parametrize("verdict", [Verdict.UNAUTHORIZED, Verdict.ENCRYPTED])
async def test_what_can_be_mended_is_tried_once_more_on_the_same_target(verdict: Verdict) -> None:
    target = Target("a", fault(verdict), good())
    target.mends = True
    async with stage(target) as played:
        trace = await played.run()
        assert trace.end is End.COMPLETED
        assert target.log == ["open", "recover", "open", "ok", "release"]


async def test_what_was_mended_in_vain_is_not_mended_again() -> None:
    target = Target("a", fault(Verdict.UNAUTHORIZED))
    target.mends = True
    async with stage(target, nobody=PoolEmpty("nobody")) as played:
        await played.run()
        assert target.log == ["open", "recover", "open", "failed unauthorized", "release"]
        assert isinstance(played.caller.error, PoolEmpty)


@pytest.mark.parametrize("max_retry", [0, 1, 2, 5, 10])
@pytest.mark.parametrize("targets", [1, 20])
async def test_passing_faults_are_tried_again_so_often_and_no_oftener(targets: int, max_retry: int) -> None:
    played_targets = [Target(f"t{n}", fault(Verdict.SERVER)) for n in range(targets)]
    async with stage(
        *played_targets, max_retry=max_retry, nobody=PoolShortage("", retry_after=0.1)
    ) as played:
        trace = await played.run()
        assert len(trace.attempts) == max_retry + 1
        assert isinstance(played.caller.error, PoolShortage)
        assert 1.0 <= played.caller.error.retry_after <= 30.0


async def test_the_pauses_between_tries_grow_and_have_an_end() -> None:
    async with stage() as played:
        backoff = played.executor.backoff
        assert backoff(0) == 0.0
        for retries, middle in ((1, 0.2), (2, 0.4), (3, 0.8), (4, 1.6), (5, 3.2), (6, 4.0), (50, 4.0)):
            pauses = [backoff(retries) for _ in range(200)]
            assert middle * 0.5 <= min(pauses)
            assert max(pauses) <= middle * 1.5
            # Callers who failed together do not come back together.
            assert len(set(pauses)) > 100


async def test_the_first_change_of_target_costs_no_time() -> None:
    first, second = Target("a", fault(Verdict.SERVER)), Target("b", good())
    async with stage(first, second) as played:
        before = played.clock.monotonic()
        await played.run()
        assert played.clock.monotonic() == before


@pytest.mark.parametrize(
    ("nobody", "waits"),
    [
        (PoolShortage("", retry_after=0.0), [0.05, 0.05]),
        (PoolShortage("", retry_after=1.0), [1.0, 1.0]),
        (PoolShortage("", retry_after=3.0), [3.0, 3.0]),
        (PoolShortage("", retry_after=3.1), []),
        (PoolExhausted("", resets_at=1.0, retry_after=1.0), []),
        (PoolEmpty(""), []),
        (RequestError("no such model", param="model"), []),
    ],
)
async def test_only_a_shortage_that_is_over_soon_is_waited_for(
    nobody: ProxyError, waits: list[float]
) -> None:
    async with stage(nobody=nobody, max_retry=2) as played:
        before = played.clock.monotonic()
        await played.run()
        assert played.clock.monotonic() - before == pytest.approx(sum(waits))
        assert played.caller.error is nobody


async def test_waiting_has_an_end_however_many_retries_there_are() -> None:
    async with stage(nobody=PoolShortage("", retry_after=2.5), max_retry=10) as played:
        before = played.clock.monotonic()
        await played.run()
        assert played.clock.monotonic() - before == 5.0


async def test_the_targets_that_rest_may_be_tried_again_after_a_wait_others_not() -> None:
    broken, limited = Target("broken", fault(Verdict.SERVER)), Target("limited", fault(Verdict.LIMITED))
    lacking, spent = Target("lacking", fault(Verdict.MODEL)), Target("spent", fault(Verdict.EXHAUSTED))
    route = (broken, limited, lacking, spent)
    async with stage(*route, max_retry=1, nobody=PoolShortage("", retry_after=0.5)) as played:
        await played.run()
        assert broken.log.count("open") == 2
        assert lacking.log.count("open") == spent.log.count("open") == 1
        assert {target.log.count("release") - target.log.count("open") for target in route} == {0}


async def test_history_that_nobody_reads_is_the_callers_trouble() -> None:
    targets = [Target(name, fault(Verdict.ENCRYPTED, status=400)) for name in "ab"]
    async with stage(*targets) as played:
        await played.run()
        assert isinstance(played.caller.error, RequestError)
        assert played.caller.error.code == "invalid_encrypted_content"
        assert played.caller.error.param == "input"


async def test_a_stream_lost_before_its_first_good_event_is_tried_again() -> None:
    first = Target("a", Played(CREATED, NetError(NetKind.CUT, "lost")))
    second = Target("b", good())
    async with stage(first, second) as played:
        trace = await played.run()
        assert first.log == ["open", "failed cut", "release"]
        assert played.caller.log.count("response.created") == 1
        assert [a.outcome for a in trace.attempts] == ["cut", "ok"]


async def test_a_stream_lost_after_it_is_not() -> None:
    answer = Played(CREATED, DELTA, NetError(NetKind.CUT, "lost"))
    first, second = Target("a", answer), Target("b", good())
    async with stage(first, second) as played:
        trace = await played.run()
        assert first.log == ["open", "ok", "failed cut", "release"]
        assert second.log == []
        assert played.caller.log[-1] == "fail"
        assert answer.released == 1
        assert trace.end is End.FAILED
        assert trace.usage.source is UsageSource.ESTIMATE


async def test_what_a_target_should_learn_is_shown_to_it() -> None:
    item = {"type": "response.output_item.done", "item": {"type": "reasoning", "encrypted_content": "x"}}
    plain = {"type": "response.output_item.done", "item": {"type": "message"}}
    target = Target("a", Played(CREATED, {"type": "codex.rate_limits"}, item, plain, DONE))
    async with stage(target) as played:
        await played.run()
        assert [entry for entry in target.log if entry.startswith("observe")] == [
            "observe codex.rate_limits",
            "observe response.output_item.done",
        ]


async def test_a_gate_that_refuses_lets_nothing_through() -> None:
    target = Target("a", good())
    async with stage(target) as played:
        played.purse.refusal = RequestError("no budget", status=402)
        trace = await played.run()
        assert target.log == []
        assert played.caller.error is played.purse.refusal
        assert played.purse.settled == [End.FAILED]
        assert trace.usage.total_tokens == 0


async def test_a_budget_that_runs_out_ends_the_stream() -> None:
    answer = Played(CREATED, DELTA, DELTA, None)
    target = Target("a", answer)
    async with stage(target) as played:
        played.purse.enough = False
        await played.run()
        assert played.caller.log[-3:] == ["response.output_text.delta", "fail", "end"]
        assert played.purse.top_ups == 1
        # The account did nothing wrong.
        assert target.log == ["open", "ok", "release"]
        assert answer.released == 1


async def test_a_backend_that_does_not_end_its_body_is_not_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("codex_proxy.upstream.executor._TAIL_SECONDS", 0.05)
    chatter = [{"type": "comment"}] * 3
    for tail in ([None], [*chatter, None]):
        answer = Played(CREATED, DELTA, DONE, *tail)
        async with stage(Target("a", answer)) as played:
            trace = await played.run()
            assert trace.end is End.COMPLETED
            assert answer.released == 1
            assert played.caller.log[-1] == "end"


async def test_a_caller_who_leaves_ends_the_exchange_at_once() -> None:
    answer = Played(CREATED, DELTA, None)
    target = Target("a", answer)
    async with stage(target) as played:
        sent = asyncio.Event()
        played.caller.on_send = sent.set
        exchange = played.executor.begin(played.request, played.caller, played.trace)
        await sent.wait()
        exchange.caller_gone()
        exchange.caller_gone()
        assert exchange.task is not None
        await asyncio.wait({exchange.task})
        assert played.trace.end is End.CALLER_GONE
        assert played.trace.usage.source is UsageSource.ESTIMATE
        assert target.log == ["open", "ok", "release"]
        assert answer.released == 1
        assert "fail" not in played.caller.log
        assert played.purse.settled == [End.CALLER_GONE]
        assert played.executor.in_flight == 0


async def test_a_caller_whose_connection_breaks_has_left() -> None:
    def broken() -> None:
        raise ConnectionResetError("gone")

    target = Target("a", Played(CREATED, DELTA, DONE))
    async with stage(target) as played:
        played.caller.on_send = broken
        trace = await played.run()
        assert trace.end is End.CALLER_GONE
        assert trace.usage.source is UsageSource.ESTIMATE
        assert target.log == ["open", "ok", "release"]


async def test_an_end_from_our_side_is_told_once() -> None:
    target = Target("a", Played(CREATED, DELTA, None))
    async with stage(target) as played:
        sent = asyncio.Event()
        played.caller.on_send = sent.set
        exchange = played.executor.begin(played.request, played.caller, played.trace)
        await sent.wait()
        error = PoolShortage("restarting")
        played.executor.cut_all(error)
        played.executor.cut_all(PoolShortage("again"))
        assert await played.executor.drain(1.0)
        assert played.caller.error is error
        assert played.caller.log.count("fail") == 1
        assert played.trace.end is End.FAILED
        assert exchange.task is not None
        assert exchange.task.done()


async def test_what_nobody_foresaw_is_an_internal_error(caplog: pytest.LogCaptureFixture) -> None:
    def broken() -> None:
        raise ZeroDivisionError

    target = Target("a", good())
    async with stage(target) as played:
        played.caller.on_send = broken
        trace = await played.run()
        assert trace.end is End.FAILED
        assert played.caller.error is not None
        assert played.caller.error.message == "internal error"
        assert target.log == ["open", "ok", "release"]
        assert "turn broke" in caplog.text


async def test_a_listener_that_fails_hurts_nobody(caplog: pytest.LogCaptureFixture) -> None:
    async with stage(Target("a", good())) as played:

        def broken(_: Trace) -> None:
            raise ZeroDivisionError

        heard: list[str] = []
        played.executor.listen(broken)
        played.executor.listen(lambda trace: heard.append(trace.id))
        await played.run()
        assert heard == ["t"]
        assert "listener failed" in caplog.text


async def test_draining_waits_for_the_last_turn() -> None:
    async with stage(Target("a", Played(CREATED, None))) as played:
        assert await played.executor.drain(0.01)
        exchange = played.executor.begin(played.request, played.caller, played.trace)
        assert not await played.executor.drain(0.01)
        exchange.caller_gone()
        assert await played.executor.drain(1.0)


async def test_a_unary_answer_passes_whole() -> None:
    answer = Played({"output": []}, headers={"content-type": "application/json"})
    async with stage(Target("a", answer)) as played:
        played.request.endpoint = "responses/compact"
        await played.run()
        assert [entry.split()[0] for entry in played.caller.log] == ["open", "body", "end"]


async def test_a_unary_answer_that_streams_passes_as_it_comes() -> None:
    answer = Played(CREATED, DELTA, DONE, headers={"content-type": "text/event-stream"})
    async with stage(Target("a", answer)) as played:
        played.request.endpoint = "responses/compact"
        await played.run()
        assert [entry.split()[0] for entry in played.caller.log] == ["open", "body", "body", "body", "end"]


# -- places --------------------------------------------------------------------------------


async def test_a_place_is_waited_for_and_is_no_retry() -> None:
    async with stage(nobody=PoolBusy("full", retry_after=0.5), max_retry=0) as played:
        played.route.comes_back = Target("a", good())
        trace = await played.run()
        assert trace.end is End.COMPLETED
        assert played.route.waits == [(0.5, played.trace.started)]


async def test_nobody_waits_for_a_place_longer_than_the_queue_may_take() -> None:
    async with stage(nobody=PoolBusy("full", retry_after=1.0), queue_timeout=2.5) as played:
        played.route.clock = played.clock
        await played.run()
        assert isinstance(played.caller.error, PoolBusy)
        assert [seconds for seconds, _ in played.route.waits] == [1.0, 1.0, 0.5]


async def test_without_a_queue_a_full_pool_says_so_at_once() -> None:
    async with stage(nobody=PoolBusy("full", retry_after=1.0), queue_timeout=0) as played:
        await played.run()
        assert isinstance(played.caller.error, PoolBusy)
        assert played.route.waits == []


async def test_the_story_of_a_turn_has_every_choice_and_of_a_wait_the_last_look() -> None:
    nobody = PoolBusy("full", retry_after=0.5)
    nobody.decision = Decision("", "nobody could serve", "none", 0.0)
    async with stage(Target("a", fault(Verdict.EXHAUSTED)), nobody=nobody, queue_timeout=2) as played:
        played.route.clock = played.clock
        trace = await played.run()
        assert [decision.alias for decision in trace.decisions] == ["a", ""]
        assert len(played.route.waits) == 4


async def test_what_was_in_passing_trouble_is_tried_again_after_a_wait_for_a_place() -> None:
    flaky = Target("a", fault(Verdict.SERVER), good())
    async with stage(flaky, nobody=PoolBusy("full", retry_after=0.5), max_retry=1) as played:
        played.route.clock = played.clock
        trace = await played.run()
        assert trace.end is End.COMPLETED
        assert len(played.route.waits) == 1


async def test_what_is_over_by_itself_is_waited_for_without_a_queue() -> None:
    busy = PoolBusy("on trial", retry_after=1.0, patience=2.5)
    async with stage(nobody=busy, queue_timeout=0) as played:
        played.route.clock = played.clock
        await played.run()
        assert played.caller.error is busy
        assert [seconds for seconds, _ in played.route.waits] == [1.0, 1.0, 0.5]


async def test_a_moment_for_its_own_account_is_waited_for_however_late_it_is() -> None:
    own = PoolBusy("on trial", retry_after=0.5, patience=math.inf)
    async with stage(nobody=own, queue_timeout=0) as played:
        played.clock.advance(100.0)
        played.route.comes_back = Target("a", good())
        assert (await played.run()).end is End.COMPLETED


# -- callers who leave an upstream -------------------------------------------------------


class Endless(Played):
    """An answer that goes on and on."""

    __slots__ = ("count",)

    def __init__(self) -> None:
        super().__init__(CREATED)
        self.count = 0

    async def read(self, within: float | None = None) -> bytes:
        if self.reads:
            return await super().read(within)
        await asyncio.sleep(0)
        self.count += 1
        return b"data: " + dumps(DELTA) + b"\n\n"


class Provider(Target):
    """An upstream whose answers are read on."""

    upstream = "up"
    drains = True
    on_open: Callable[[], None] = staticmethod(lambda: None)

    async def open(self, request: BackendRequest) -> Answer:
        self.on_open()
        return await super().open(request)


async def left(played: Stage) -> tuple[float, Trace]:
    """Have the caller leave in the middle; return how long the turn went on, and its story."""
    exchange = played.executor.begin(played.request, played.caller, played.trace)
    for _ in range(5):
        await asyncio.sleep(0)
    began = played.clock.monotonic()
    exchange.caller_gone()
    await exchange.wait()
    return played.clock.monotonic() - began, played.trace


async def test_what_an_upstream_still_says_is_read_to_its_end() -> None:
    provider = Provider("up", Played(CREATED, DELTA, DELTA, DONE))
    async with stage(provider) as played:
        # It leaves before a byte of an answer has come.
        exchange = played.executor.begin(played.request, played.caller, played.trace)
        provider.on_open = exchange.caller_gone
        await exchange.wait()
    assert played.caller.log[0] == "mute"
    assert played.caller.ended is End.COMPLETED
    assert (played.trace.end, played.trace.upstream) == (End.CALLER_GONE, "up")
    assert played.executor.drains == 0
    assert played.purse.settled == [End.CALLER_GONE]


async def test_a_caller_whose_connection_breaks_is_noticed_while_it_is_written_to() -> None:
    provider = Provider("up", Played(CREATED, DELTA, DELTA, DONE))
    async with stage(provider) as played:

        def breaks() -> None:
            played.caller.on_send = lambda: None
            raise ConnectionResetError("gone")

        played.caller.on_send = breaks
        trace = await played.run()
    assert trace.end is End.CALLER_GONE
    assert played.caller.ended is End.COMPLETED


async def test_a_pause_that_is_too_long_ends_it() -> None:
    async with stage(Provider("up", Played(CREATED, DELTA, None))) as played:
        seconds, trace = await left(played)
    assert DRAIN_IDLE_SECONDS <= seconds <= DRAIN_IDLE_SECONDS + 10
    assert trace.end is End.CALLER_GONE
    assert trace.usage.source is UsageSource.ESTIMATE


async def test_an_answer_without_end_has_one() -> None:
    async with stage(Provider("up", Endless())) as played:
        seconds, trace = await left(played)
    assert DRAIN_SECONDS <= seconds <= DRAIN_SECONDS + 10
    assert trace.end is End.CALLER_GONE


async def test_only_so_many_are_read_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("codex_proxy.upstream.executor.MAX_DRAINS", 0)
    async with stage(Provider("up", Endless())) as played:
        seconds, trace = await left(played)
    assert seconds == 0
    assert trace.end is End.CALLER_GONE
    assert "mute" not in played.caller.log


async def test_nobody_else_is_tried_for_a_caller_who_has_left() -> None:
    fails, other = Provider("up", Played(CREATED, NetError(NetKind.CUT, "lost"))), Target("b", good())
    async with stage(fails, other) as played:
        exchange = played.executor.begin(played.request, played.caller, played.trace)
        fails.on_open = exchange.caller_gone
        await exchange.wait()
    assert played.route.picked == ["up"]
    assert "mute" in played.caller.log
    assert played.trace.end is End.CALLER_GONE


async def test_an_end_from_our_side_ends_a_drain_too() -> None:
    async with stage(Provider("up", Played(CREATED, DELTA, None))) as played:
        exchange = played.executor.begin(played.request, played.caller, played.trace)
        for _ in range(5):
            await asyncio.sleep(0)
        played.executor.cut_all(PoolShortage("restarting"))
        await exchange.wait()
    assert played.trace.end is End.FAILED


@pytest.mark.parametrize(("most", "tries"), [(0, 1), (1, 2), (5, 4)])
async def test_a_target_may_be_tried_so_often_in_one_turn(most: int, tries: int) -> None:
    target = Provider("up", fault(Verdict.SERVER))
    target.max_retries = most
    async with stage(target, nobody=PoolShortage("nobody", retry_after=0.1), max_retry=3) as played:
        await played.run()
    assert played.route.picked == ["up"] * tries
