"""Daemons to be killed: a process that has imported everything, and forks one for each line that it is told.

A line is a folder, a database's address or `-`, and a seed. The fork says `pid`, serves turns until it is killed, and
writes down what it has been promised: a line in `promises` is there only after the ledger has said that it is done.
"""

import asyncio
import os
import random
import sys
import time
from pathlib import Path

from codex_proxy.clock import SystemClock
from codex_proxy.errors import OutOfFunds
from codex_proxy.ledger.ledger import Ledger
from codex_proxy.ledger.model import Hold
from codex_proxy.storage.lock import StoreLock
from tests.ledger.making import Holder, settlement

PROMISES = "promises"
IN_FLIGHT = 16


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

    async def caller(number: int) -> None:
        turn = 0
        while True:
            turn += 1
            of = dice.choice(people)
            request_id = f"{os.getpid()}-{number}-{turn}"
            at = int(time.time() * 1_000)
            try:
                await ledger.authorize(
                    Hold(request_id, of.user_id, of.key_id, 1_000, at, at + 60_000, "gpt-5.5")
                )
            except OutOfFunds:
                await ledger.credit(
                    of.user_id, 100_000, reason="more", idempotency_key=request_id, actor="victim"
                )
                os.write(promises, f"credit {of.user_id} 100000\n".encode())
                continue
            os.write(promises, f"hold {request_id}\n".encode())
            if dice.random() < 0.3:
                await ledger.top_up(request_id, 500)
            cost = dice.randrange(500, 3_000)
            one = settlement(of, request_id, cost, at=at)
            if dice.random() < 0.5:
                # As the gate does it; the next turn begins meanwhile.
                ledger.settle(one)
                continue
            await ledger.settled(one)
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
