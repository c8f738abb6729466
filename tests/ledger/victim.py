"""Daemons to be killed: a process that has imported everything, and forks one for each line that it is told.

A line is a folder, a database's address or `-`, and a seed. The fork says `pid`, serves turns until it is killed, and
writes down what it has been promised: a line in `promises` is there only after the ledger has said that it is done. A turn
that has begun at once is not done by that, but with whatever was asked after it and is done.
"""

import asyncio
import os
import random
import sys
import time
from collections.abc import Awaitable
from pathlib import Path
from typing import Any

from codex_proxy.clock import SystemClock
from codex_proxy.errors import OutOfFunds
from codex_proxy.ledger.ledger import Ledger
from codex_proxy.ledger.model import Hold
from codex_proxy.storage.lock import StoreLock
from tests.ledger.making import Holder, settlement

PROMISES = "promises"
IN_FLIGHT = 16
GIFT = 300_000
"""So that keys are allotted something for a while, and then nothing."""


async def serve(folder: Path, url: str, seed: int) -> None:
    """Serve turns until the end."""
    dice = random.Random(seed)
    clock = SystemClock()
    ledger = Ledger(
        folder, mode="billing", clock=clock, lock=StoreLock(folder), database_url="" if url == "-" else url
    )
    await ledger.start()
    promises = os.open(folder / PROMISES, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    keys = ledger.directory.keys()
    people = [Holder(key.user_id, key.id) for key in keys]
    os.write(1, b"ready\n")
    begun: list[str] = []

    async def done(asked: Awaitable[Any]) -> None:
        """Wait for what is asked, and know what is done with it."""
        earlier = begun[:]
        begun.clear()
        try:
            await asked
        except OutOfFunds:
            begun.extend(earlier)
            raise
        os.write(promises, "".join(f"hold {one}\n" for one in earlier).encode())

    async def caller(number: int) -> None:
        turn = 0
        while True:
            turn += 1
            of = dice.choice(people)
            request_id = f"{os.getpid()}-{number}-{turn}"
            at = int(time.time() * 1_000)
            try:
                asked = ledger.begin(
                    Hold(request_id, of.user_id, of.key_id, 1_000, at, at + 60_000, "gpt-5.5")
                )
                begun.append(request_id)
                if asked is not None:
                    await done(ledger.ask(asked))
            except OutOfFunds:
                begun.remove(request_id)
                await done(
                    ledger.credit(of.user_id, GIFT, reason="more", idempotency_key=request_id, actor="victim")
                )
                os.write(promises, f"credit {of.user_id} {GIFT}\n".encode())
                continue
            if dice.random() < 0.3:
                await done(ledger.top_up(request_id, 500))
            cost = dice.randrange(500, 3_000)
            one = settlement(of, request_id, cost, at=at)
            if dice.random() < 0.5:
                # As the gate does it; the next turn begins meanwhile.
                ledger.settle(one)
                continue
            await done(ledger.settled(one))
            os.write(promises, f"settle {request_id} {cost}\n".encode())

    async with asyncio.TaskGroup() as group:
        for number in range(IN_FLIGHT):
            group.create_task(caller(number))


def main() -> None:
    """Fork for each line; a fork's end is of no interest."""
    for line in sys.stdin:
        folder, url, seed = line.split()
        pid = os.fork()
        if not pid:
            try:
                asyncio.run(serve(Path(folder), url, int(seed)))
            finally:
                os._exit(1)
        os.write(1, f"{pid}\n".encode())
        os.waitpid(pid, 0)
        os.write(1, b"gone\n")


if __name__ == "__main__":
    main()
