"""The daemon as a process of its own, for tests of how it starts, ends and is ended."""

import asyncio
import contextlib
import os
import re
import signal
import sys
import time
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path

import aiohttp

from codex_proxy.simulator import Simulator

_URL = re.compile(r"listening url=(http://\S+)")

# A slow machine with many tests at a time; nothing here takes that long by itself.
PATIENCE_SECONDS = 20.0


def write_config(folder: Path, sim: Simulator | None = None, **settings: object) -> Path:
    """Write a configuration in *folder*; *settings* are keys with `_` for `-`; None leaves one out."""
    values: dict[str, object] = {
        "listen": "127.0.0.1:0",
        "auth_dir": folder / "auths",
        "data_dir": folder / "data",
        "health_check_interval": 0,
        # A database for each would take longer than most of the tests.
        "records": "off",
        **({"base_url": sim.base_url, "oauth_issuer": sim.issuer} if sim is not None else {}),
        **settings,
    }
    file = folder / "config.yaml"
    file.write_text(
        "".join(f"{k.replace('_', '-')}: {v}\n" for k, v in values.items() if v is not None), encoding="utf-8"
    )
    return file


async def run(*arguments: str, environ: Mapping[str, str] | None = None) -> tuple[int, str, str]:
    """Run `codex-proxy` with *arguments* to its end; return exit code, stdout and stderr."""
    process = await _start(arguments, environ)
    async with asyncio.timeout(PATIENCE_SECONDS * 2):
        out, err = await process.communicate()
    assert process.returncode is not None
    return process.returncode, out.decode(), err.decode()


async def _start(arguments: tuple[str, ...], environ: Mapping[str, str] | None) -> Process:
    base = {name: value for name, value in os.environ.items() if not name.startswith("CODEX_PROXY_")}
    return await asyncio.create_subprocess_exec(
        sys.executable, "-m", "codex_proxy", *arguments,
        stdin=DEVNULL, stdout=PIPE, stderr=PIPE, env={**base, **(environ or {})},
    )  # fmt: skip


class Running:
    """A daemon that is up."""

    def __init__(self, process: Process) -> None:
        self._process = process
        self.lines: list[str] = []
        """What it has logged."""
        self._news = asyncio.Event()
        self._reader = asyncio.get_running_loop().create_task(self._read())
        self.url = ""

    @property
    def log(self) -> str:
        return "\n".join(self.lines)

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    async def _read(self) -> None:
        assert self._process.stderr is not None
        async for line in self._process.stderr:
            self.lines.append(line.decode().rstrip("\n"))
            self._news.set()
        self._news.set()

    async def logged(self, pattern: str) -> re.Match[str]:
        """Wait for a line in the log that *pattern* is found in."""
        position = 0
        async with asyncio.timeout(PATIENCE_SECONDS):
            while True:
                self._news.clear()
                while position < len(self.lines):
                    match = re.search(pattern, self.lines[position])
                    if match is not None:
                        return match
                    position += 1
                assert not self._reader.done(), f"it ended without {pattern!r}:\n{self.log}"
                await self._news.wait()

    def send(self, number: signal.Signals) -> None:
        """Send it a signal."""
        self._process.send_signal(number)

    async def ended(self) -> int:
        """Wait for its end and return the exit code."""
        async with asyncio.timeout(PATIENCE_SECONDS):
            code = await self._process.wait()
            await self._reader
        return code

    async def stop(self) -> int:
        """End it in order and return the exit code."""
        self.send(signal.SIGTERM)
        return await self.ended()

    async def kill(self) -> None:
        """End it at once, without its knowledge; one that has ended is left alone."""
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
        await self.ended()


@contextlib.asynccontextmanager
async def running(config: Path, *, environ: Mapping[str, str] | None = None) -> AsyncIterator[Running]:
    """Start the daemon with the file *config*; it is gone afterwards."""
    daemon = Running(await _start(("-config", str(config)), environ))
    try:
        daemon.url = (await daemon.logged(_URL.pattern))[1].replace("0.0.0.0", "127.0.0.1")
        yield daemon
    finally:
        await daemon.kill()


async def until(condition: Callable[[], bool], seconds: float = 5.0) -> None:
    """Wait until *condition* holds; fail when it does not in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the awaited condition did not come true"
        await asyncio.sleep(0.002)


@contextlib.asynccontextmanager
async def client(url: str) -> AsyncIterator[aiohttp.ClientSession]:
    """Open a session whose requests start at *url*."""
    async with aiohttp.ClientSession(url) as session:
        yield session
