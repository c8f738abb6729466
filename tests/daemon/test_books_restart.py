"""Money over the end of a process: a restart under load, and one that is killed."""

import asyncio
import contextlib
import signal
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import aiohttp

from codex_proxy.clock import SystemClock
from codex_proxy.ledger.ledger import Ledger
from codex_proxy.ledger.model import NO_LIMITS
from codex_proxy.ledger.money import NANOS
from codex_proxy.ledger.tables import usage
from codex_proxy.simulator import Script, Simulator
from codex_proxy.storage.lock import StoreLock
from tests.daemon.test_hand_over import TURN, Load, serving
from tests.process import client, running, until, write_config

MONEY = 1_000 * NANOS


@contextlib.asynccontextmanager
async def books(folder: Path) -> AsyncIterator[Ledger]:
    """Open the ledger of a daemon that is not running."""
    data = folder / "data"
    data.mkdir(mode=0o700, exist_ok=True)
    ledger = Ledger(data, mode="billing", clock=SystemClock(), lock=StoreLock(data))
    await ledger.start()
    try:
        yield ledger
    finally:
        await ledger.aclose()


async def customer(folder: Path) -> tuple[str, Mapping[str, str]]:
    """Make a user with money and a key; return its id and the header that shows the key."""
    async with books(folder) as ledger:
        user = await ledger.create_user("ada", is_billed=True, actor="test")
        await ledger.credit(
            user.id, MONEY, kind="credit", reason="test", idempotency_key="first", actor="test"
        )
        _, text = await ledger.create_key(user.id, "laptop", limits=NO_LIMITS, expires=None, actor="test")
    return user.id, {"Authorization": f"Bearer {text}"}


async def rows(ledger: Ledger) -> list[Mapping[str, Any]]:
    return await ledger.read(
        lambda connection: [dict(row) for row in connection.execute(usage.select()).mappings()]
    )


async def adds_up(folder: Path, user_id: str) -> list[Mapping[str, Any]]:
    """See that the money adds up and nothing is held; return the turns."""
    async with books(folder) as ledger:
        assert await ledger.check() == []
        user = ledger.directory.user(user_id)
        assert user is not None
        found = await rows(ledger)
        assert (user.balance, user.held) == (MONEY - sum(row["debit"] for row in found), 0)
        return found


async def test_a_restart_under_load_refuses_nobody_and_loses_no_turn(tmp_path: Path) -> None:
    user_id, headers = await customer(tmp_path)
    async with Simulator(3) as sim:
        async with serving(tmp_path, sim, drain_timeout=60, ledger="billing") as service:
            sim.script(Script.long_text(60, "word ", delay=0.05))
            async with (
                client(service.url) as session,
                session.post("/v1/responses", json={**TURN, "stream": True}, headers=headers) as long,
                Load(service.url, headers).running(4) as load,
            ):
                await until(lambda: load.answered > 8, 20)
                outcome = await service.restart()
                assert outcome["success"], outcome
                after = load.answered
                await until(lambda: load.answered > after + 8, 20)
                body = await long.read()
            assert load.wrong == []
            assert b"response.completed" in body
            # It ends when its stream has, and its log when the other process has ended too.
            service.end(signal.SIGTERM)
            assert await service.first.ended() == 0
            assert "Traceback" not in service.first.log
        found = await adds_up(tmp_path, user_id)
        served = [row for row in found if row["end"] == "completed"]
        # The one long stream, and every turn that a caller saw answered.
        assert len(served) >= load.answered + 1
        assert all(row["debit"] == row["cost"] > 0 for row in served)


async def test_what_a_killed_process_had_under_way_holds_nothing_afterwards(tmp_path: Path) -> None:
    user_id, headers = await customer(tmp_path)
    async with Simulator(3) as sim:
        sim.write_auth_files(tmp_path / "auths")
        file = write_config(tmp_path, sim, ledger="billing")
        async with running(file) as daemon, client(daemon.url) as session:
            async with session.post("/v1/responses", json=TURN, headers=headers) as answer:
                assert answer.status == 200
            sim.script(*[Script.long_text(2_000, delay=0.01)] * 3)
            async with asyncio.TaskGroup() as group:
                for _ in range(3):
                    group.create_task(_begun(session, headers))
            await daemon.kill()
        found = await adds_up(tmp_path, user_id)
        assert [row["end"] for row in found].count("lost") == 3
        assert [row["end"] for row in found].count("completed") == 1


async def _begun(session: aiohttp.ClientSession, headers: Mapping[str, str]) -> None:
    answer = await session.post("/v1/responses", json={**TURN, "stream": True}, headers=headers)
    assert answer.status == 200
    await answer.content.readany()
