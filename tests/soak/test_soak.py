"""Fifty accounts that fail in every way the simulator knows, and callers who must not notice.

No caller sees an error that another account could have absorbed: what came before the answer began. What
breaks after that is counted apart, and ends in the dialect's own error. No account stays blocked once what
blocked it is over. Memory stays where it was.
"""

import asyncio
import contextlib
import random
import re
import struct
import sys
from asyncio.subprocess import DEVNULL, PIPE
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import orjson
import pytest

from codex_proxy.simulator import SimAccount, Simulator
from tests.process import Running, write_config
from tests.soak.traffic import Outcome, ask

ACCOUNTS = 50
ALWAYS_WELL = 15
"""So many never fail: whoever could have absorbed a failure is there at every moment."""

FAULTS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("usage_limit", {"resets_in": 300.0}),
    ("usage_limit", {"resets_in": 7200.0}),
    ("usage_limit", {"resets_in": 60.0, "body_reset": False}),
    ("usage_limit", {"resets_in": 120.0, "headers": False}),
    ("rate_limit", {}),
    ("rate_limit", {"retry_after": 20}),
    ("overloaded", {}),
    ("overloaded_in_stream", {"how": "failed"}),
    ("overloaded_in_stream", {"how": "error"}),
    ("failed", {"code": "server_error"}),
    ("failed", {"code": "rate_limit_exceeded"}),
    ("failed", {"code": "usage_limit_reached"}),
    ("failed", {"code": "server_error", "after": 3}),
    ("cut", {"after": 0}),
    ("cut", {"after": 2}),
    ("cut", {"after": 6}),
    ("cut", {"after": 6, "clean": True}),
    ("cut", {"after": 1, "reset": True}),
    ("stall", {"where": "headers"}),
    ("stall", {"where": "created"}),
    ("slow", {"delay": 0.2, "per_event": 0.01}),
    ("unauthorized", {}),
    ("revoked", {}),
    ("payment", {}),
    ("not_included", {}),
    ("insufficient_quota", {}),
    ("cloudflare", {}),
    ("forbidden", {"detail": "no"}),
    ("server_error", {"status": 500}),
    ("server_error", {"status": 502, "body": "<html>bad gateway</html>"}),
    ("server_error", {"status": 529}),
    ("refuse", {}),
    ("bad_model", {}),
    ("not_found", {}),
)
REFRESHES = ("ok", "ok", "ok", "500", "429", "cut", "bad_json", "slow", "403")

# The longest that anything here may rest after its cause is over: a plan that would not do is tried
# again after six hours at the latest, jittered by a fifth.
LONGEST_REST = 6 * 3600 * 1.25 + 60

_TURN = re.compile(r"turn id=(\S+) .* first=(\S+) ")


class Time:
    """The clock of daemon and simulator, put forward together."""

    def __init__(self, file: Path, sim: Simulator) -> None:
        self._file = file
        self._sim = sim
        self._offset = 0.0
        file.write_bytes(struct.pack("<d", 0.0))

    def advance(self, seconds: float) -> None:
        self._offset += seconds
        self._sim.advance(seconds)
        with self._file.open("r+b") as opened:
            opened.write(struct.pack("<d", self._offset))


class Misfortune:
    """Lets accounts fail, lose their tokens, vanish and come back, one thing at a time."""

    def __init__(self, sim: Simulator, folder: Path, rng: random.Random) -> None:
        self._sim = sim
        self._folder = folder
        self._rng = rng
        self.met: Counter[str] = Counter()

    def _file(self, account: SimAccount) -> Path:
        return self._folder / f"simulated-{account.name}.json"

    def strike(self) -> None:
        account = self._rng.choice(self._sim.accounts[ALWAYS_WELL:])
        match self._rng.randrange(10):
            case 0:
                account.set("ok")
                account.tokens.expires_at = self._sim.now() - 1
                self.met["token expired"] += 1
            case 1:
                self._file(account).unlink(missing_ok=True)
                self.met["file removed"] += 1
            case 2 | 3:
                self.heal(account)
                self.met["healed"] += 1
            case _:
                state, options = self._rng.choice(FAULTS)
                times = self._rng.choice((None, 1, 3))
                refresh = self._rng.choice(REFRESHES)
                account.set(state, times=times, refresh=refresh, **options)
                self.met[state] += 1

    def heal(self, account: SimAccount) -> None:
        """Make it well again: its state, its login, its file."""
        account.set("ok")
        account.issue()
        path = self._file(account)
        fresh = path.with_suffix(".new")
        fresh.write_bytes(orjson.dumps(account.flat_file()))
        fresh.replace(path)


@contextlib.asynccontextmanager
async def daemon_of(config: Path, offset: Path) -> AsyncIterator[Running]:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "tests.soak.daemon", str(config), str(offset),
        stdin=DEVNULL, stdout=PIPE, stderr=PIPE, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    running = Running(process)
    try:
        running.url = (await running.logged(r"listening url=(http://\S+)"))[1]
        yield running
    finally:
        await running.kill()


def resident_mib(running: Running) -> float:
    text = Path(f"/proc/{running._process.pid}/status").read_text(encoding="ascii")
    found = re.search(r"VmRSS:\s+(\d+) kB", text)
    assert found is not None
    return int(found[1]) / 1024


async def soak(folder: Path, requests: int, *, seed: int, at_once: int = 24) -> dict[str, Any]:
    rng = random.Random(seed)
    async with Simulator(accounts=ACCOUNTS, lifetime=3600.0, keep=200) as sim:
        auths = folder / "auths"
        sim.write_auth_files(auths)
        time, misfortune = Time(folder / "offset", sim), Misfortune(sim, auths, rng)
        config = write_config(
            folder, sim, max_retry=10, first_byte_timeout=8, compact_timeout=8, idle_timeout=3, keep_alive_after=3000, hold_created=3000, queue_timeout=0,
            health_check_interval=300, drain_timeout=5,
        )  # fmt: skip
        async with (
            daemon_of(config, folder / "offset") as running,
            aiohttp.ClientSession(running.url, timeout=aiohttp.ClientTimeout(total=120)) as session,
        ):
            outcomes: list[Outcome] = []
            begun = 0
            resident: list[float] = []

            async def caller() -> None:
                nonlocal begun
                while begun < requests:
                    begun += 1
                    number = begun
                    if number % 5 == 0:
                        misfortune.strike()
                    if number % 10 == 0:
                        time.advance(5.0)
                    if number % (requests // 8) == 0:
                        resident.append(resident_mib(running))
                    outcomes.append(await ask(session, rng, number))

            await asyncio.gather(*(caller() for _ in range(at_once)))
            blocked = await _blocked_for_ever(sim, misfortune, time, session)
            committed = {m[1] for line in running.lines if (m := _TURN.search(line)) and m[2] != "-"}
            assert await running.stop() == 0
    ends = Counter(
        "good" if one.end == "good" else "cut" if _is_cut(one, committed) else f"{one.kind}: {one.end}"
        for one in outcomes
    )
    return {
        "requests": len(outcomes),
        "ends": ends,
        "faults": misfortune.met,
        "blocked": blocked,
        "resident": resident,
        "log": [
            line
            for line in running.lines
            if (" ERROR " in line and "file is gone" not in line) or "Traceback" in line
        ],
    }


def _is_cut(one: Outcome, committed: set[str]) -> bool:
    """Tell whether the answer had begun; of a plain one the caller then sees a status."""
    return (one.end == "cut" or one.status != 200) and one.request_id in committed


async def _blocked_for_ever(
    sim: Simulator, misfortune: Misfortune, time: Time, session: aiohttp.ClientSession
) -> list[dict[str, Any]]:
    """Heal all, let the longest rest pass, and return the accounts that still do not serve."""
    for account in sim.accounts:
        misfortune.heal(account)
    rest = LONGEST_REST
    while rest > 0:
        time.advance(min(600.0, rest))
        rest -= 600.0
        await asyncio.sleep(0.05)
    accounts: list[dict[str, Any]] = []
    blocked: list[dict[str, Any]] = []
    for _ in range(60):
        async with session.get("/stats") as answer:
            accounts = (await answer.json())["accounts"]
        blocked = [one for one in accounts if one["status"] != "active"]
        if len(accounts) == len(sim.accounts) and not blocked:
            break
        await asyncio.sleep(0.2)
    return blocked + [{"missing": len(sim.accounts) - len(accounts)}] * (len(accounts) != len(sim.accounts))


def check(found: dict[str, Any], requests: int) -> None:
    ends = found["ends"]
    assert found["requests"] == requests
    assert set(ends) <= {"good", "cut"}, ends
    assert ends["good"] > 0.8 * requests
    assert not found["blocked"], found["blocked"]
    assert not found["log"], found["log"][:5]


@pytest.mark.timeout(120)
async def test_callers_do_not_notice_what_another_account_can_absorb(tmp_path: Path) -> None:
    check(await soak(tmp_path, 500, seed=7), 500)


@pytest.mark.long
async def test_twenty_thousand_requests_over_fifty_failing_accounts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = await soak(tmp_path, 20_000, seed=11)
    with capsys.disabled():
        print(  # noqa: T201 -- the figures
            f"\nsoak: {found['requests']} requests, ends {dict(found['ends'])}, struck {dict(found['faults'])}, "
            f"resident MiB after each eighth {[round(one, 1) for one in found['resident']]}"
        )
    check(found, 20_000)
    # What is remembered has its bounds, and fills up in the first half.
    half, end = found["resident"][3], found["resident"][-1]
    assert end - half < 4.0
