"""What the gate of turns costs a request: CPU of the whole process, with 64 turns in flight.

Run by `make bench-gate`. The same turns pass an open gate and the real one by turns, on a ledger in a file with full
durability: each enters, is admitted, asks once per read whether it may go on, and settles. The difference is what the
gate adds, the ledger's thread included.

These turns are over at once, so many of them are written together. With `--seconds 0.05` they last, and few are.
"""

import argparse
import asyncio
import cProfile
import gc
import pstats
import secrets
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

from codex_proxy.clock import SystemClock
from codex_proxy.config import Live, Settings
from codex_proxy.daemon import new_event_loop
from codex_proxy.ledger.gate import TurnGate
from codex_proxy.ledger.ledger import Ledger
from codex_proxy.ledger.model import NO_LIMITS, Budget, Limits, Mode, Window
from codex_proxy.ledger.pricing import Pricing
from codex_proxy.protocol.request import BackendRequest
from codex_proxy.server.front import new_id
from codex_proxy.storage.lock import StoreLock
from codex_proxy.trace import Attempt, Caller, End, Trace, Usage, UsageSource
from codex_proxy.upstream.gate import Gate, OpenGate

IN_FLIGHT = 64
READS = 20
"""Upstream reads of a turn."""
USERS = 20
MODEL = "gpt-5.5"
GOAL = 100.0
"""Microseconds of CPU."""

ALL_LIMITS = Limits(
    requests_per_minute=10**6, tokens_per_minute=10**12, concurrency=1000,
    budgets=(Budget(Window.MONTH, 10**15),), models=("gpt-*",), endpoints=("responses",),
)  # fmt: skip


async def turn(gate: Gate, caller: Caller, reads: int, seconds: float) -> None:
    """Have one turn pass, without a backend."""
    now = time.monotonic()
    trace = Trace(f"req_{new_id()}", "responses", caller, now, time.time(), model=MODEL, client="codex")
    request = BackendRequest("responses", MODEL, MODEL, b"", input_bytes=40_000, context_window=272_000)
    passage = gate.enter(trace, request)
    await passage.admit()
    for number in range(reads):
        await passage.top_up(number * 40)
    await asyncio.sleep(seconds)
    trace.alias, trace.status, trace.answer_bytes = "work", 200, 9000
    trace.attempts.append(Attempt("work", now, "ok", 200, 4.0))
    trace.usage = Usage(12_000, 11_000, 0, 300, 120, UsageSource.BACKEND)
    trace.finish(End.COMPLETED, time.monotonic())
    passage.settle()


async def drive(
    gate: Gate, callers: list[Caller], count: int, reads: int, seconds: float
) -> tuple[float, float]:
    """Have *count* turns pass, 64 at a time; return CPU and time of one, in microseconds."""
    left = iter(range(count))

    async def worker() -> None:
        for number in left:
            await turn(gate, callers[number % len(callers)], reads, seconds)

    started, cpu = time.perf_counter(), time.process_time()
    await asyncio.gather(*(worker() for _ in range(IN_FLIGHT)))
    if isinstance(gate, TurnGate):
        # What is still to be written belongs to it.
        await gate.ledger.write(lambda _: None)
    return (time.process_time() - cpu) / count * 1e6, (time.perf_counter() - started) / count * 1e6


async def people(ledger: Ledger, limits: Limits) -> list[Caller]:
    """Make users with money, and a key for each."""
    made = []
    for number in range(USERS):
        user = await ledger.create_user(
            f"user {number} {secrets.token_hex(4)}", is_billed=True, actor="bench"
        )
        await ledger.credit(
            user.id, 10**15, reason="bench", idempotency_key=secrets.token_hex(8), actor="bench"
        )
        key, _ = await ledger.create_key(user.id, "key", limits=limits, actor="bench")
        made.append(Caller(key.id, key.name))
    return made


async def measure(mode: Mode, limits: Limits, options: argparse.Namespace, folder: Path) -> float:
    """Return what the gate adds to a turn, in microseconds of CPU: the median of some pairs."""
    clock = SystemClock()
    ledger = Ledger(folder, mode=mode, clock=clock, lock=StoreLock(folder))
    await ledger.start()
    pricing = Pricing(ledger, clock.now)
    await pricing.load()
    gate = TurnGate(ledger, pricing, live=Live(Settings()), clock=clock)
    callers = await people(ledger, limits)
    open_gate = OpenGate()
    for one in (open_gate, gate):
        await drive(one, callers, options.turns // 4, READS, options.seconds)
    added, elapsed = [], []
    for _ in range(options.pairs):
        bare, _ = await drive(open_gate, callers, options.turns, READS, options.seconds)
        cost, wall = await drive(gate, callers, options.turns, READS, options.seconds)
        added.append(cost - bare)
        elapsed.append(wall)
    if options.profile:
        profile = cProfile.Profile()
        profile.enable()
        await drive(gate, callers, options.turns, READS, options.seconds)
        profile.disable()
        pstats.Stats(profile).sort_stats("tottime").print_stats(32)
    wrong = await ledger.check()
    await ledger.aclose()
    if wrong:
        raise SystemExit(f"it does not add up: {wrong}")
    sys.stdout.write(f"  {1e6 / statistics.median(elapsed):8,.0f} turns/s")
    return statistics.median(added)


def main() -> int:
    """Measure, and say whether what was to be reached is reached."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--turns", type=int, default=4000, help="turns of one measurement (4000)")
    parser.add_argument("--pairs", type=int, default=7, help="measurements of each gate, by turns (7)")
    parser.add_argument("--seconds", type=float, default=0.0, help="how long a turn lasts (0)")
    parser.add_argument("--profile", action="store_true", help="show where the loop's thread spends it")
    options = parser.parse_args()
    # As the daemon does.
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, *gc.get_threshold()[1:])
    is_reached = True
    modes: list[tuple[str, Mode, Limits]] = [
        ("personal, no limits", "personal", NO_LIMITS),
        ("billing, no limits", "billing", NO_LIMITS),
        ("billing, all limits", "billing", ALL_LIMITS),
    ]
    for name, mode, limits in modes:
        folder = Path(tempfile.mkdtemp(prefix="bench-gate-"))
        sys.stdout.write(f"{name:22s}")
        try:
            with asyncio.Runner(loop_factory=new_event_loop()) as runner:
                added = runner.run(measure(mode, limits, options, folder))
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        is_reached = is_reached and added < GOAL
        sys.stdout.write(f"  {added:6.1f} us of CPU a turn  (to reach: {GOAL:.0f})\n")
    return 0 if is_reached else 1


if __name__ == "__main__":
    sys.exit(main())
