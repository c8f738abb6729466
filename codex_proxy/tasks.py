"""Owns every task of the process: nothing runs that nobody keeps, and nothing dies unseen."""

import asyncio
import contextlib
import logging
import math
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from typing import Any, TypeVar

logger = logging.getLogger(__name__)

T = TypeVar("T")

# How soon a job whose interval was changed notices, a shorter one as well as one from zero.
_LOOK_SECONDS = 1.0


@dataclass(slots=True, frozen=True)
class Job:
    """Something a room wants done again and again.

    `every` is asked again each second of the pause, so a live setting takes effect within one;
    a value of zero or less rests the job until it is another one.
    """

    name: str
    every: Callable[[], float]
    run: Callable[[], Awaitable[None]]
    at_once: bool = False
    """Run the first round at start instead of one interval later."""


class Background:
    """Start, keep and stop tasks.

    A `critical` task (a token exchange, whose answer exists only once) is never cancelled:
    shutdown waits for it. All others are cancelled by `aclose`.
    """

    def __init__(self, sleep: Callable[[float], Awaitable[None]] = asyncio.sleep) -> None:
        self._sleep = sleep
        self._tasks: set[asyncio.Task[Any]] = set()
        self._critical: set[asyncio.Task[Any]] = set()

    def spawn(self, work: Coroutine[Any, Any, T], *, name: str, critical: bool = False) -> asyncio.Task[T]:
        """Run *work* as a task that is kept until it ends; its failure is logged."""
        task = asyncio.get_running_loop().create_task(work, name=name)
        (self._critical if critical else self._tasks).add(task)
        task.add_done_callback(self._on_done)
        return task

    def start(self, job: Job) -> asyncio.Task[None]:
        """Repeat *job* until the end; a round that fails is logged and the next one comes."""
        return self.spawn(self._repeat(job), name=f"job:{job.name}")

    def statistics(self) -> dict[str, int]:
        """Return how many tasks are alive."""
        return {"tasks": len(self._tasks), "critical": len(self._critical)}

    async def wait_critical(self) -> None:
        """Wait until no critical task is left, those started meanwhile included."""
        while self._critical:
            await asyncio.wait(set(self._critical))

    async def aclose(self) -> None:
        """Cancel everything that may be cancelled, then wait for the critical rest.

        Again and again, because what ends may start something.
        """
        while self._tasks or self._critical:
            running = set(self._tasks)
            for task in running:
                task.cancel()
            await asyncio.wait(running or set(self._critical))

    async def _repeat(self, job: Job) -> None:
        rested = math.inf if job.at_once else 0.0
        while True:
            while (seconds := job.every()) <= 0 or rested < seconds:
                pause = min(_LOOK_SECONDS, seconds - rested) if seconds > 0 else _LOOK_SECONDS
                await self._sleep(pause)
                rested += pause
            rested = 0.0
            try:
                await job.run()
            except Exception:
                logger.exception("job failed name=%s", job.name)

    def _on_done(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        self._critical.discard(task)
        if task.cancelled():
            return
        error = task.exception()
        if error is not None:
            logger.error("task died name=%s error=%s", task.get_name(), type(error).__name__, exc_info=error)


class Slots:
    """At most so many at a time, where the number may change while they run."""

    def __init__(self, limit: Callable[[], int]) -> None:
        self._limit = limit
        self.taken = 0
        self._waiting: deque[asyncio.Future[None]] = deque()

    async def acquire(self) -> None:
        """Take a slot, waiting for one in turn."""
        while self.taken >= max(1, self._limit()):
            waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiting.append(waiter)
            try:
                await waiter
            except asyncio.CancelledError:
                if waiter.done() and not waiter.cancelled():
                    self._wake()
                raise
            finally:
                with contextlib.suppress(ValueError):
                    self._waiting.remove(waiter)
        self.taken += 1

    def release(self) -> None:
        """Give a slot back."""
        self.taken -= 1
        self._wake()

    async def __aenter__(self) -> None:
        await self.acquire()

    async def __aexit__(self, *_: object) -> None:
        self.release()

    def _wake(self) -> None:
        # As many as there is room for: the limit may have grown since they began to wait.
        room = max(1, self._limit()) - self.taken
        for waiter in self._waiting:
            if room <= 0:
                return
            if not waiter.done():
                waiter.set_result(None)
                room -= 1
