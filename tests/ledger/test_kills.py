"""A daemon that is killed at any moment: what it promised is there, nothing is there twice, nothing stays held."""

import asyncio
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
from sqlalchemy import Connection, text

from codex_proxy.ledger.ledger import Ledger
from tests.ledger.conftest import Database
from tests.ledger.making import DOLLAR, holder, running
from tests.ledger.victim import GIFT, PROMISES

USERS = 4
SHORT, LONG = 6, 500
MOST_PROMISES = 250
PROMISE_BYTES = 20
"""Of one line, about."""


@pytest.fixture(scope="module")
def forks() -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.ledger.victim"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        bufsize=0,
    )
    yield process
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.close()
    process.wait(20)
    process.stdout.close()


async def live_and_die(forks: subprocess.Popen[bytes], database: Database, seed: int, promises: int) -> None:
    """Let one serve until it has made so many promises, 0 for one that has hardly begun; then kill it."""
    assert forks.stdin is not None
    assert forks.stdout is not None
    dice = random.Random(seed)
    kept = database.folder / PROMISES
    before = kept.stat().st_size
    forks.stdin.write(f"{database.folder} {database.url or '-'} {seed}\n".encode())
    pid = int(await asyncio.to_thread(forks.stdout.readline))
    deadline = time.monotonic() + 20.0
    while promises and kept.stat().st_size < before + promises * PROMISE_BYTES:
        assert time.monotonic() < deadline, "it serves nothing"
        await asyncio.sleep(0.001)
    await asyncio.sleep(dice.uniform(0.0, 0.02))
    os.kill(pid, signal.SIGKILL)
    while b"gone" not in await asyncio.to_thread(forks.stdout.readline):
        pass


def _everything(connection: Connection) -> tuple[list[Any], list[Any], int, int]:
    turns = connection.execute(text('SELECT request_id, cost, "end" FROM usage')).all()
    gifts = connection.execute(text("SELECT user_id, nanos FROM entries WHERE kind = 'credit'")).all()
    held = connection.execute(text("SELECT CAST(sum(held) AS BIGINT) FROM users")).scalar_one()
    holds = connection.execute(text("SELECT count(*) FROM holds")).scalar_one()
    return list(turns), list(gifts), held, holds


async def look(database: Database, ledger: Ledger, seen: dict[str, int]) -> None:
    """Find what was promised, once, and nothing held."""
    assert await ledger.check() == []
    turns, gifts, held, holds = await ledger.read(_everything)
    assert (held, holds) == (0, 0)
    known = {request_id: (cost, end) for request_id, cost, end in turns}
    assert len(known) == len(turns)
    given = Counter(user_id for user_id, nanos in gifts if nanos == GIFT)
    promised: Counter[str] = Counter()
    for line in (database.folder / PROMISES).read_text(encoding="utf-8").splitlines():
        what, of, *rest = line.split()
        if what == "settle":
            assert known[of] == (int(rest[0]), "completed"), line
        elif what == "hold":
            # Either it was settled or, with its process, lost; it is not forgotten.
            assert of in known, line
        else:
            promised[of] += 1
    assert all(given[of] >= count for of, count in promised.items())
    seen["turns"] = len(turns)
    seen["lost"] = sum(end == "lost" for _, _, end in turns)


async def die_often(forks: subprocess.Popen[bytes], database: Database, times: int) -> None:
    dice = random.Random(times)
    async with running(database) as ledger:
        for number in range(USERS):
            await holder(ledger, DOLLAR // 10_000, name=f"user {number}")
    seen: dict[str, int] = {}
    (database.folder / PROMISES).touch()
    for seed in range(times):
        await live_and_die(forks, database, seed, dice.randrange(MOST_PROMISES) if dice.random() < 0.8 else 0)
        # Every tenth time in between: most of them have to put it in order themselves.
        if seed % 10 == 9 or seed == times - 1:
            async with running(database) as ledger:
                await look(database, ledger, seen)
    print(f"\n{times} kills: {seen['turns']} turns, {seen['lost']} of them lost with their process")  # noqa: T201 -- the count is asked for
    assert seen["lost"] > 0
    assert seen["turns"] > 5 * times


async def test_a_killed_daemon_leaves_money_that_adds_up(
    forks: subprocess.Popen[bytes], database: Database
) -> None:
    await die_often(forks, database, SHORT if database.is_file else SHORT // 2)


@pytest.mark.long
@pytest.mark.timeout(3600)
async def test_500_killed_daemons_leave_money_that_adds_up(
    forks: subprocess.Popen[bytes], database: Database
) -> None:
    await die_often(forks, database, LONG)
