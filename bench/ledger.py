"""How many turns a ledger can authorize and settle, durably, with 64 of them in flight.

Run by `make bench-ledger`. Each turn waits until its hold is on disk, and then until its settlement is; what is
measured is both together, and the money is checked afterwards. With `--database-url` it is a PostgreSQL database,
which is emptied first.
"""

import argparse
import asyncio
import gc
import secrets
import shutil
import sys
import tempfile
import time
from pathlib import Path

from codex_proxy.clock import SystemClock
from codex_proxy.daemon import new_event_loop
from codex_proxy.ledger.ledger import Ledger
from codex_proxy.ledger.model import AttemptRow, Budget, Hold, Key, Settlement, Window
from codex_proxy.server.front import new_id
from codex_proxy.storage.lock import StoreLock
from codex_proxy.trace import UsageSource

USERS = 50
IN_FLIGHT = 64
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
    made = []
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


async def measure(ledger: Ledger, pairs: int, *, budgets: bool) -> tuple[float, list[float], float]:
    """Return pairs a second, what each took in seconds, and the CPU seconds of all."""
    everybody = await people(ledger, budgets)
    took: list[float] = []
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
            # Half of what was set aside, up to half as much again.
            cost = NANOS // 2 + turn % NANOS
            await ledger.settled(settlement(request_id, key, at, cost))
            took.append(time.perf_counter() - began)

    cpu, began = time.process_time(), time.perf_counter()
    async with asyncio.TaskGroup() as group:
        for number in range(IN_FLIGHT):
            group.create_task(caller(number))
    return pairs / (time.perf_counter() - began), sorted(took), time.process_time() - cpu


async def run(name: str, database_url: str, folder: Path, pairs: int) -> bool:
    """Print what one database does; whether it is as fast as it is to be."""
    reached = True
    for budgets in (False, True):
        home = folder / f"{name}-{budgets}"
        home.mkdir()
        ledger = Ledger(
            home, mode="billing", clock=SystemClock(), lock=StoreLock(home), database_url=database_url
        )
        await ledger.start()
        await measure(ledger, pairs // 10, budgets=budgets)
        rate, took, cpu = await measure(ledger, pairs, budgets=budgets)
        wrong = await ledger.check()
        await ledger.aclose()
        half, most = took[len(took) // 2] * 1_000, took[len(took) * 99 // 100] * 1_000
        goal, limit = GOALS[name]
        good = rate >= goal and most <= limit and not wrong
        reached &= good
        print(
            f"{name:11}{'with budgets' if budgets else 'no budgets':13}{rate:8,.0f} pairs/s  p50 {half:5.1f} ms  "
            f"p99 {most:5.1f} ms  {1e6 * cpu / pairs:5.0f} us CPU each   (to reach: {goal:,} and {limit:.0f} ms)"
            f"{'' if good else '  NOT REACHED'}{'  ' + '; '.join(wrong) if wrong else ''}",
            flush=True,
        )
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
