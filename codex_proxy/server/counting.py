"""Counts tokens beside the event loop: exactly, in a process of its own that lives while it is needed.

What was measured, and why it is not simply a thread: tiktoken's constructor holds the interpreter
for 0.2 s, and every stream of this process would stand still as long. The process starts at the
first count (0.35 s), and ends when nothing was counted for a while, so that somebody who never
counts pays nothing and who does gets the memory back.

Where it cannot count (tiktoken or its ranks are missing or damaged, no process can be started),
the estimate of `protocol/tokens.py` takes its place, and one warning says so.
"""

import asyncio
import contextlib
import logging
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from codex_proxy.protocol import tokens
from codex_proxy.protocol.wire import JsonObject
from codex_proxy.server import encoding

logger = logging.getLogger(__name__)

# How long the process stays without work. A client that counts does so in bursts.
IDLE_SECONDS = 600.0

# How long one request may take, a start included. 8 MiB of the worst text take 4 s.
LIMIT_SECONDS = 30.0

# Texts beyond this are estimated: no model's window takes a fourth of it, so nobody is helped
# by the last digit, and others are waiting.
EXACT_BYTES = 8 * 1024 * 1024


def command(ranks: Path = encoding.RANKS) -> list[str]:
    """Return how to start the process that counts.

    By its file, and without the working folder as a place to import from: what it needs is
    tiktoken alone, and whoever can write where the proxy was started must not be its author.
    """
    return [sys.executable or "python3", "-P", encoding.__file__, str(ranks)]


class _EndedError(Exception):
    """The process that counts is no more; the message may say why."""


class _Process:
    """The process that counts; one thread at a time may ask it.

    Raises:
        OSError: If it cannot be started.
        _EndedError: If it cannot count.
    """

    def __init__(self, start: Sequence[str], seconds: float) -> None:
        # A session of its own, because Ctrl-C goes to the whole group and is none of its business:
        # it ends with its input. What it has to say comes in its answers.
        self._popen = subprocess.Popen(
            start,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            greeting = self._exchange([], seconds)
            if greeting != encoding.READY:
                raise _EndedError(greeting.decode("utf-8", "replace").strip())
        except BaseException:
            self.end()
            raise

    @property
    def pid(self) -> int:
        """Its number."""
        return self._popen.pid

    @property
    def is_alive(self) -> bool:
        """Whether it is still there."""
        return self._popen.poll() is None

    def count(self, texts: Sequence[bytes], seconds: float) -> int:
        """Return how many tokens *texts* have.

        Raises:
            _EndedError: If the process died meanwhile, or took longer than *seconds*.
        """
        sizes = b" ".join(b"%d" % len(text) for text in texts)
        return int(self._exchange([sizes, b"\n", *texts], seconds))

    def _exchange(self, request: Sequence[bytes], seconds: float) -> bytes:
        assert self._popen.stdin is not None
        assert self._popen.stdout is not None
        # Whatever hangs at either end of the pipes hangs no longer once it is dead.
        alarm = threading.Timer(seconds, self._popen.kill)
        alarm.daemon = True
        alarm.start()
        try:
            self._popen.stdin.writelines(request)
            self._popen.stdin.flush()
            answer = self._popen.stdout.readline()
        except OSError as exc:
            raise _EndedError("its process ended") from exc
        finally:
            alarm.cancel()
        if not answer.endswith(b"\n"):
            raise _EndedError("its process ended")
        return answer

    def kill(self) -> None:
        """End it from another thread than the one that asks."""
        self._popen.kill()

    def end(self) -> None:
        """End it and wait for that; nobody may be asking."""
        self._popen.kill()
        for pipe in (self._popen.stdin, self._popen.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()
        self._popen.wait()


class TokenCounter:
    """Count the tokens of requests and texts without holding up the event loop.

    What waits is counted in the order it came, by one thread that talks to one process.

    Args:
        start: How to start the process that counts.
        idle_seconds: How long it stays without work.
        limit_seconds: How long it may take for one request.
    """

    def __init__(
        self,
        start: Sequence[str] | None = None,
        *,
        idle_seconds: float = IDLE_SECONDS,
        limit_seconds: float = LIMIT_SECONDS,
    ) -> None:
        self._start = command() if start is None else list(start)
        self._idle_seconds = idle_seconds
        self._limit_seconds = limit_seconds
        # Not the loop's own threads: there, what waits to be counted would keep a token file from
        # being written.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="tokens")
        self._process: _Process | None = None
        self._release: Callable[[], object] | None = None
        self._is_estimating = False
        self._is_closed = False
        self._in_work = 0
        self._rest: asyncio.TimerHandle | None = None

    @property
    def pid(self) -> int | None:
        """The number of the process that counts, while there is one."""
        process = self._process
        return process.pid if process is not None else None

    async def count_request(self, body: JsonObject) -> int:
        """Count what the model reads of a Responses request; see `tokens.count_request`.

        *body* must not change before this returns.
        """
        return await self._run(lambda: self._count_body(body))

    async def count_text(self, text: str) -> int:
        """Count the tokens of one text."""
        return await self._run(lambda: self._count([text]))

    async def aclose(self) -> None:
        """End the process; what still waits is estimated, and so is all that comes later."""
        self._is_estimating = True
        if self._rest is not None:
            self._rest.cancel()
        if self._process is not None:
            self._process.kill()
        if not self._is_closed:
            self._is_closed = True
            await asyncio.get_running_loop().run_in_executor(self._thread, self._end)
            self._thread.shutdown(wait=False)

    async def _run(self, work: Callable[[], int]) -> int:
        if self._is_closed:
            return await asyncio.to_thread(work)
        loop = asyncio.get_running_loop()
        if self._rest is not None:
            self._rest.cancel()
        self._in_work += 1
        try:
            return await loop.run_in_executor(self._thread, work)
        finally:
            self._in_work -= 1
            if not self._in_work and self._process is not None and not self._is_estimating:
                self._rest = loop.call_later(self._idle_seconds, self._thread.submit, self._end)

    # -- in the thread --------------------------------------------------------------------

    def _count_body(self, body: JsonObject) -> int:
        texts: list[str] = []

        def keep(text: str) -> int:
            texts.append(text)
            return 0

        return tokens.count_request(body, keep) + self._count(texts)

    def _count(self, texts: Sequence[str]) -> int:
        total = 0
        left = EXACT_BYTES
        exact: list[bytes] = []
        for text in texts:
            raw = _utf8(text)
            if len(raw) <= left:
                left -= len(raw)
                exact.append(raw)
            else:
                total += tokens.estimate(text)
        if any(exact):
            counted = self._ask(exact)
            if counted is None:
                return sum(map(tokens.estimate, texts))
            total += counted
        return total

    def _ask(self, texts: Sequence[bytes]) -> int | None:
        """Return the exact count, or None if there is none to be had."""
        if self._is_estimating:
            return None
        try:
            process = self._running()
        except (OSError, _EndedError) as exc:
            self._is_estimating = True
            logger.warning("token counts are estimates from now on: no exact counter: %s", exc)
            return None
        try:
            return process.count(texts, self._limit_seconds)
        except _EndedError:
            self._end()
            if not self._is_estimating:
                logger.warning(
                    "a token count is an estimate: the process that counts was lost bytes=%d",
                    sum(map(len, texts)),
                )
            return None

    def _running(self) -> _Process:
        if self._process is not None and not self._process.is_alive:
            self._end()
        if self._process is None:
            self._process = _Process(self._start, self._limit_seconds)
            # Whoever forgets to close this leaves no process behind.
            self._release = weakref.finalize(self, self._process.end)
        return self._process

    def _end(self) -> None:
        self._process = None
        if self._release is not None:
            self._release()
            self._release = None


def _utf8(text: str) -> bytes:
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError:
        # As tiktoken does it: halves that belong together are joined, lone ones replaced.
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").encode("utf-8")
