"""How many turns a ledger can authorize and settle, durably, with 64 callers at a time.

Run by `make bench-ledger`. Each caller waits until what its turn may cost is set aside on disk, settles it, and begins
the next; it is over when the last settlement is on disk, and everything has to add up then. With `--database-url` it
is a PostgreSQL database, which users and turns are added to.
"""

import argparse
import asyncio
import gc
import secrets
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

from codex_proxy.clock import SystemClock
from codex_proxy.daemon import new_event_loop
from codex_proxy.ledger.ledger import Ledger
from codex_proxy.ledger.model import AttemptRow, Budget, Hold, Key, Settlement, Window
from codex_proxy.server.front import new_id
from codex_proxy.storage.lock import StoreLock
from codex_proxy.trace import UsageSource

USERS = 20
IN_FLIGHT = 64
LOOKED_AT = 20
"""Of so many turns that have waited until they might begin, one waits until its settlement is on disk too."""
NANOS = 1_000_000

# What is to be reached: pairs a second, and milliseconds that 99 of 100 do not take.
GOALS = {"SQLite": (10_000, 20.0), "PostgreSQL": (3_000, 50.0)}


def settlement(request_id: str, key: Key, at: int, cost: int) -> Settlement:
    """Return what is settled of a usual turn."""
    return Settlement(
        request_id,
        key.user_id,
        key.id,
        at,
        route="responses",
        asked_model="gpt-5.5",
        model="gpt-5.5",
        tier="default",
        target="work",
        upstream="",
        client="codex",
        end="completed",
        status=200,
        error="",
        input_tokens=12_000,
        cached_tokens=11_000,
        cache_write_tokens=0,
        output_tokens=300,
        reasoning_tokens=120,
        source=UsageSource.BACKEND,
        flags=(),
        cost=cost,
        is_billed=True,
        prices={"input": "1.25", "cached_input": "0.125", "output": "10"},
        price_id="2026-11-01",
        milliseconds=4_000,
        attempts=(AttemptRow("work", "ok", 200, 4_000),),
    )


async def people(ledger: Ledger, budgets: bool) -> list[tuple[Key, tuple[tuple[str, Budget], ...]]]:
    """Make users with money, each with a key, and the budgets of both."""
    made: list[tuple[Key, tuple[tuple[str, Budget], ...]]] = []
    for number in range(USERS):
        user = await ledger.create_user(f"user {number} {secrets.token_hex(4)}", actor="bench")
        key, _ = await ledger.create_key(user.id, "key", actor="bench")
        await ledger.credit(
            user.id, 10**15, reason="bench", idempotency_key=secrets.token_hex(8), actor="bench"
        )
        limits = (
            (user.id, Budget(Window.MONTH, 10**15)),
            (key.id, Budget(Window.DAY, 10**15)),
            (key.id, Budget(Window.HOURS_5, 10**15)),
        )
        made.append((key, limits if budgets else ()))
    return made


@dataclass(slots=True)
class Measured:
    """What came of some turns."""

    pairs: int
    seconds: float
    """From the first authorize until the last settlement was on disk."""
    cpu: float
    begun: list[float] = field(default_factory=list)
    """How long turns waited until they might begin."""
    settled: list[float] = field(default_factory=list)
    """How long it took until settlements were on disk, of some of them."""


async def measure(ledger: Ledger, pairs: int, *, budgets: bool, allots: bool) -> Measured:
    """Have so many turns authorized and settled; each waits for the disk once.

    As the gate does it nobody waits for a settlement. Where turns begin at once they do so here, or there would be any
    number in flight.
    """
    everybody = await people(ledger, budgets)
    measured = Measured(pairs, 0.0, 0.0)
    left = iter(range(pairs))

    async def caller(number: int) -> None:
        for turn in left:
            key, limits = everybody[(number + turn) % USERS]
            request_id = f"req_{new_id()}"
            began = time.perf_counter()
            at = int(time.time() * 1_000)
            await ledger.authorize(
                Hold(request_id, key.user_id, key.id, NANOS, at, at + 600_000, "gpt-5.5", limits)
            )
            measured.begun.append(time.perf_counter() - began)
            # Half of what was set aside, up to half as much again.
            one = settlement(request_id, key, at, NANOS // 2 + turn % NANOS)
            if turn % LOOKED_AT and not allots:
                ledger.settle(one)
                continue
            began = time.perf_counter()
            await ledger.settled(one)
            measured.settled.append(time.perf_counter() - began)

    cpu, began = time.process_time(), time.perf_counter()
    async with asyncio.TaskGroup() as group:
        for number in range(IN_FLIGHT):
            group.create_task(caller(number))
    await ledger.write(lambda _: None)
    measured.seconds, measured.cpu = time.perf_counter() - began, time.process_time() - cpu
    return measured


def percentile(values: list[float], percent: int) -> float:
    """Return a percentile, in milliseconds."""
    return sorted(values)[len(values) * percent // 100] * 1_000


async def run(name: str, database_url: str, folder: Path, pairs: int) -> bool:
    """Print what one database does; whether it is as fast as it is to be.

    A file both as the daemon uses it, where keys are allotted something, and with each turn waiting until its own hold is
    on disk, as on a server.
    """
    reached = True
    ways = [
        (allots, budgets)
        for allots in ((False,) if database_url else (True, False))
        for budgets in (False, True)
    ]
    for allots, budgets in ways:
        home = folder / f"{name}-{allots}-{budgets}"
        home.mkdir()
        ledger = Ledger(
            home,
            mode="billing",
            clock=SystemClock(),
            lock=StoreLock(home),
            database_url=database_url,
            allots=allots,
        )
        await ledger.start()
        await measure(ledger, pairs // 10, budgets=budgets, allots=allots)
        found = await measure(ledger, pairs, budgets=budgets, allots=allots)
        wrong = await ledger.check()
        await ledger.aclose()
        rate = found.pairs / found.seconds
        slowest = max(percentile(found.begun, 99), percentile(found.settled, 99))
        goal, limit = GOALS[name]
        good = rate >= goal and slowest <= limit and not wrong
        reached &= good
        sys.stdout.write(
            f"{name:11}{'allotted' if allots else 'each waits':11}{'with budgets' if budgets else 'no budgets':13}"
            f"{rate:8,.0f} pairs/s"
            f"   may begin after {percentile(found.begun, 50):4.1f} ms, p99 {percentile(found.begun, 99):4.1f}"
            f"   on disk after {percentile(found.settled, 50):4.1f} ms, p99 {percentile(found.settled, 99):4.1f}"
            f"   {1e6 * found.cpu / found.pairs:4.0f} us CPU each"
            f"   to reach {goal:,} and {limit:.0f} ms: {'yes' if good else 'NO'} {'; '.join(wrong)}\n"
        )
        sys.stdout.flush()
    return reached


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a tenth of the turns")
    parser.add_argument("--database-url", default="", help="a PostgreSQL database of its own")
    parser.add_argument("--folder", type=Path, help="where ledger.db is put; on the disk that is meant")
    arguments = parser.parse_args()
    pairs = 6_000 if arguments.quick else 60_000
    folder = Path(tempfile.mkdtemp(prefix="bench-ledger-", dir=arguments.folder))
    # As the daemon does.
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, *gc.get_threshold()[1:])
    try:
        with asyncio.Runner(loop_factory=new_event_loop()) as runner:
            reached = runner.run(run("SQLite", "", folder, pairs))
            if arguments.database_url:
                reached &= runner.run(run("PostgreSQL", arguments.database_url, folder, pairs // 4))
    finally:
        shutil.rmtree(folder)
    return 0 if reached else 1


if __name__ == "__main__":
    sys.exit(main())
