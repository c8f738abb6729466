"""Processes that exchange tokens as the daemon does, made in a moment, to be killed at a chosen point.

Run as a program it imports everything once and forks a process per task, so that hundreds of
kills take seconds. `Exchanger` starts it and speaks with it: a line of JSON each way.
"""

import asyncio
import contextlib
import json
import os
import signal
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, NoReturn

from codex_proxy.accounts import oauth, pending, store
from codex_proxy.accounts.pool import Pool
from codex_proxy.accounts.upkeep import Keeper
from codex_proxy.clock import SystemClock
from codex_proxy.config import Live, Settings
from codex_proxy.net import Outbound
from codex_proxy.tasks import Background


@contextlib.asynccontextmanager
async def keeping(
    folder: Path, issuer: str, data: str = "data"
) -> AsyncIterator[tuple[Keeper, Pool, Background]]:
    """Start what keeps the accounts of *folder*, as a process that has just begun."""
    live = Live(Settings(auth_dir=folder / "auths", data_dir=folder / data, oauth_issuer=issuer))
    clock, background, outbound = SystemClock(), Background(), Outbound(live)
    pool = Pool(clock)
    keeper = Keeper(pool, live=live, clock=clock, background=background, outbound=outbound)
    await keeper.load()
    try:
        yield keeper, pool, background
    finally:
        await background.aclose()
        await outbound.aclose()


# -- where a process is killed ------------------------------------------------------------


def die() -> NoReturn:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("alive")


def before_send() -> None:
    async def refresh(*_: object, **__: object) -> NoReturn:
        die()

    oauth.refresh = refresh


def answer_read() -> None:
    real = oauth.refresh

    async def refresh(*args: Any, **kwargs: Any) -> NoReturn:
        await real(*args, **kwargs)
        die()

    oauth.refresh = refresh


def recorded() -> None:
    real = pending.keep

    def keep(*args: Any) -> NoReturn:
        real(*args)
        die()

    pending.keep = keep  # type: ignore[assignment]


def written() -> None:
    real = os.replace

    def replace(one: Any, other: Any) -> None:
        if Path(other).parent.name == "auths":
            die()
        real(one, other)

    os.replace = replace  # type: ignore[assignment]


def renamed() -> None:
    real = os.replace

    def replace(one: Any, other: Any) -> None:
        real(one, other)
        if Path(other).parent.name == "auths":
            die()

    os.replace = replace  # type: ignore[assignment]


PLACES: dict[str, Callable[[], None]] = {
    "before send": before_send,
    "answer read": answer_read,
    "recorded": recorded,
    "written": written,
    "renamed": renamed,
}
"""By phase; a kill in any other comes from outside."""


# -- the program --------------------------------------------------------------------------


async def exchange(folder: Path, issuer: str, data: str, begin: Callable[[], object]) -> dict[str, str]:
    """Give every account a good token; returns a digest of each, by alias."""
    async with keeping(folder, issuer, data) as (keeper, pool, background):
        begin()
        await keeper.refresh_due()
        tokens = await asyncio.gather(*(keeper.token(account) for account in pool))
        await background.wait_critical()
        return {
            account.alias: token.digest() if token is not None else ""
            for account, token in zip(pool, tokens, strict=True)
        }


def fork(folder: Path, issuer: str, task: dict[str, Any]) -> None:
    """Do *task* in processes of its own, and tell of their ends."""
    count = task["count"]
    ready_read, ready_write = os.pipe()
    go_read, go_write = os.pipe()

    def begin() -> None:
        # All at the same moment: whoever was made first waits for the last.
        os.write(ready_write, b"r")
        os.read(go_read, 1)

    children: dict[int, int] = {}
    for number in range(count):
        told_read, told_write = os.pipe()
        pid = os.fork()
        if pid == 0:
            place = PLACES.get(task.get("phase", ""))
            if place is not None:
                place()
            data = "data" if count == 1 else f"data-{number}"
            digests = asyncio.run(exchange(folder, issuer, data, begin))
            os.write(told_write, json.dumps(digests).encode())
            os._exit(0)
        os.close(told_write)
        children[pid] = told_read
    answer(list(children))
    waiting = count
    while waiting:
        waiting -= len(os.read(ready_read, waiting))
    os.write(go_write, b"g" * count)
    ends: list[dict[str, Any]] = []
    for pid, told_read in children.items():
        _, status = os.waitpid(pid, 0)
        told = os.read(told_read, 100_000)
        os.close(told_read)
        ends.append({"code": os.waitstatus_to_exitcode(status), "told": json.loads(told or b"{}")})
    for descriptor in (ready_read, ready_write, go_read, go_write):
        os.close(descriptor)
    answer(ends)


def answer(value: object) -> None:
    sys.stdout.write(json.dumps(value) + "\n")
    sys.stdout.flush()


def main(folder: Path, issuer: str) -> None:
    for line in sys.stdin:
        fork(folder, issuer, json.loads(line))


# -- speaking with it ---------------------------------------------------------------------


class Exchanger:
    """The program, from outside."""

    def __init__(self, process: Process) -> None:
        self._process = process

    async def start(self, count: int = 1, phase: str = "") -> list[int]:
        """Make processes that exchange what is due; returns their ids."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"count": count, "phase": phase}).encode() + b"\n")
        pids = await self._line()
        assert isinstance(pids, list)
        return pids

    async def ends(self) -> list[dict[str, Any]]:
        """Wait for their ends: exit codes, negative for signals, and what they told."""
        ends = await self._line()
        assert isinstance(ends, list)
        return ends

    async def _line(self) -> Any:
        assert self._process.stdout is not None
        async with asyncio.timeout(30):
            line = await self._process.stdout.readline()
        assert line, "it ended by itself"
        return json.loads(line)


@contextlib.asynccontextmanager
async def exchanging(folder: Path, issuer: str) -> AsyncIterator[Exchanger]:
    """Start the program for the accounts in *folder*."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "tests.daemon.exchanger", str(folder), issuer,
        stdin=PIPE, stdout=PIPE, cwd=Path(store.__file__).parents[2],
    )  # fmt: skip
    try:
        yield Exchanger(process)
    finally:
        assert process.stdin is not None
        process.stdin.close()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(5):
                await process.wait()
        if process.returncode is None:
            process.kill()
            await process.wait()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
