"""Tasks are kept, seen and ended; jobs repeat; places are given out one by one."""

import asyncio
import gc
import logging
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from codex_proxy.clock import ManualClock
from codex_proxy.tasks import Background, Job, Slots


@pytest_asyncio.fixture
async def background() -> AsyncIterator[Background]:
    one = Background()
    yield one
    await one.aclose()


async def turns(number: int = 5) -> None:
    """Let everybody else run."""
    for _ in range(number):
        await asyncio.sleep(0)


async def reach(clock: ManualClock, seconds: float) -> None:
    """Let everybody else run until the clock has come so far."""
    for _ in range(100_000):
        if clock.now() >= seconds:
            return
        await asyncio.sleep(0)
    pytest.fail("nobody moves the clock")


class Rounds:
    """A job on a clock of its own, which counts its rounds and notes when they were."""

    def __init__(self, every: float, *, at_once: bool = False) -> None:
        self.every = every
        self.clock = ManualClock(0.0)
        self.times: list[float] = []
        self.errors: list[BaseException] = []
        self.job = Job("rounds", lambda: self.every, self.run, at_once)

    async def run(self) -> None:
        self.times.append(self.clock.now())
        if self.errors:
            raise self.errors.pop(0)

    async def until(self, seconds: float) -> list[float]:
        background = Background(self.clock.sleep)
        _ = background.start(self.job)
        await reach(self.clock, seconds)
        await background.aclose()
        return [time for time in self.times if time <= seconds]


# -- tasks -------------------------------------------------------------------------------


async def test_a_task_gives_its_result_and_is_forgotten(background: Background) -> None:
    async def work() -> int:
        return 7

    task = background.spawn(work(), name="work")
    assert background.statistics() == {"tasks": 1, "critical": 0}
    assert await task == 7
    await turns()
    assert background.statistics() == {"tasks": 0, "critical": 0}


async def test_a_task_that_nobody_else_holds_is_kept(background: Background) -> None:
    done = asyncio.Event()

    async def work() -> None:
        # The loop alone would hold this only weakly.
        await asyncio.get_running_loop().run_in_executor(None, gc.collect)
        done.set()

    _ = background.spawn(work(), name="work")
    gc.collect()
    await asyncio.wait_for(done.wait(), 5.0)


async def test_a_death_is_logged_once(background: Background, caplog: pytest.LogCaptureFixture) -> None:
    async def work() -> None:
        raise LookupError("gone")

    _ = background.spawn(work(), name="work")
    await turns()
    lines = [record.getMessage() for record in caplog.records]
    assert lines == ["task died name=work error=LookupError"]


async def test_a_cancelled_task_is_no_death(background: Background, caplog: pytest.LogCaptureFixture) -> None:
    task = background.spawn(asyncio.sleep(60), name="work")
    await turns()
    task.cancel()
    await turns()
    assert caplog.records == []
    assert background.statistics()["tasks"] == 0


async def test_closing_cancels_all_but_the_critical(caplog: pytest.LogCaptureFixture) -> None:
    background, go_on = Background(), asyncio.Event()
    ended: list[str] = []

    async def critical() -> None:
        await go_on.wait()
        ended.append("critical")

    async def ordinary() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            await asyncio.sleep(0)
            ended.append("ordinary")

    _ = background.spawn(critical(), name="critical", critical=True)
    _ = background.spawn(ordinary(), name="ordinary")
    await turns()
    closing = asyncio.get_running_loop().create_task(background.aclose())
    await turns(20)
    assert ended == ["ordinary"]
    assert not closing.done()
    go_on.set()
    await closing
    assert ended == ["ordinary", "critical"]
    assert background.statistics() == {"tasks": 0, "critical": 0}


async def test_what_is_started_while_closing_is_ended_too() -> None:
    background = Background()
    late: list[asyncio.Task[None]] = []

    async def critical() -> None:
        await turns()
        late.append(background.spawn(asyncio.sleep(60), name="late"))
        late.append(background.spawn(turns(), name="late and critical", critical=True))

    _ = background.spawn(critical(), name="critical", critical=True)
    await background.aclose()
    assert [task.cancelled() for task in late] == [True, False]
    assert background.statistics() == {"tasks": 0, "critical": 0}


async def test_waiting_for_the_critical_leaves_the_others_alone(background: Background) -> None:
    ordinary = background.spawn(asyncio.sleep(60), name="ordinary")
    critical = background.spawn(turns(), name="critical", critical=True)
    await background.wait_critical()
    assert critical.done()
    assert not ordinary.done()


# -- jobs --------------------------------------------------------------------------------


async def test_a_job_repeats_at_its_interval() -> None:
    assert await Rounds(10.0).until(35) == [10, 20, 30]


async def test_a_job_can_begin_at_once() -> None:
    assert await Rounds(10.0, at_once=True).until(25) == [0, 10, 20]


async def test_a_bad_round_is_logged_and_the_next_one_comes(caplog: pytest.LogCaptureFixture) -> None:
    rounds = Rounds(10.0)
    rounds.errors = [LookupError("gone"), OSError("full")]
    assert await rounds.until(31) == [10, 20, 30]
    lines = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
    assert lines == ["job failed name=rounds"] * 2


async def test_a_changed_interval_counts_within_two_seconds() -> None:
    rounds = Rounds(3_000.0)
    background = Background(rounds.clock.sleep)
    _ = background.start(rounds.job)
    await reach(rounds.clock, 100)
    rounds.every = 20.0
    await reach(rounds.clock, 125)
    await background.aclose()
    first, second = rounds.times[:2]
    assert first <= 102
    assert second == pytest.approx(first + 20)


@pytest.mark.parametrize("at_once", [False, True])
async def test_a_job_without_an_interval_rests_until_it_has_one(at_once: bool) -> None:
    rounds = Rounds(0.0, at_once=at_once)
    background = Background(rounds.clock.sleep)
    _ = background.start(rounds.job)
    await reach(rounds.clock, 200)
    before = len(rounds.times)
    rounds.every = 5.0
    await reach(rounds.clock, 207)
    await background.aclose()
    assert before == 0
    assert rounds.times[0] <= 206


# -- slots -------------------------------------------------------------------------------


class Gate:
    """Work that stays in its slot until it is let out."""

    def __init__(self, background: Background, limit: int) -> None:
        self.limit = limit
        self.slots = Slots(lambda: self.limit)
        self.inside: list[int] = []
        self.most = 0
        self._background = background
        self._out: dict[int, asyncio.Event] = {}

    def enter(self, number: int) -> asyncio.Task[None]:
        self._out[number] = asyncio.Event()
        return self._background.spawn(self._work(number), name=str(number))

    def let_out(self, number: int) -> None:
        self._out[number].set()

    async def _work(self, number: int) -> None:
        async with self.slots:
            self.inside.append(number)
            self.most = max(self.most, len(self.inside))
            try:
                await self._out[number].wait()
            finally:
                self.inside.remove(number)


async def test_only_so_many_are_inside_and_the_first_to_come_is_the_next(background: Background) -> None:
    gate = Gate(background, 2)
    for number in range(5):
        _ = gate.enter(number)
    await turns()
    assert gate.inside == [0, 1]
    gate.let_out(0)
    await turns()
    assert gate.inside == [1, 2]
    gate.let_out(2)
    gate.let_out(1)
    await turns()
    assert gate.inside == [3, 4]
    assert gate.most == 2


async def test_a_limit_may_change_while_they_run(background: Background) -> None:
    gate = Gate(background, 1)
    for number in range(6):
        _ = gate.enter(number)
    await turns()
    gate.limit = 3
    gate.let_out(0)
    await turns()
    assert gate.inside == [1, 2, 3]
    gate.limit = 1
    gate.let_out(1)
    gate.let_out(2)
    await turns()
    assert gate.inside == [3]
    gate.let_out(3)
    await turns()
    assert gate.inside == [4]


async def test_no_limit_below_one_stops_everything(background: Background) -> None:
    gate = Gate(background, 0)
    _ = gate.enter(0)
    await turns()
    assert gate.inside == [0]


async def test_one_who_leaves_the_queue_takes_no_place_with_him(background: Background) -> None:
    gate = Gate(background, 1)
    tasks = [gate.enter(number) for number in range(4)]
    await turns()
    tasks[1].cancel()
    await turns()
    # Called and gone in the same moment: the next one is called instead.
    gate.let_out(0)
    await asyncio.sleep(0)
    tasks[2].cancel()
    await turns(20)
    assert gate.inside == [3]


async def test_a_failure_inside_frees_the_place(background: Background) -> None:
    slots = Slots(lambda: 1)
    for _ in range(3):
        with pytest.raises(LookupError):
            async with slots:
                raise LookupError
