"""What a restart does not lose: limits, numbers, conversations, and who wrote which history."""

import asyncio
import contextlib
import json
import re
import stat
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from codex_proxy.accounts.memory import OWNERS_FILE, SAVE_SECONDS, STATE_FILE
from codex_proxy.protocol.wire import dumps
from codex_proxy.simulator import Simulator
from tests.harness import CODEX_HEADERS
from tests.process import Running, client, running, until, write_config

MODEL = "gpt-5.5"
CONVERSATIONS = [f"talk-{number}" for number in range(6)]


@contextlib.asynccontextmanager
async def started(config: Path) -> AsyncIterator[tuple[Running, aiohttp.ClientSession]]:
    async with running(config) as daemon, client(daemon.url) as session:
        yield daemon, session


async def ask(session: aiohttp.ClientSession, **body: Any) -> int:
    body = {"model": MODEL, "input": "hi", "stream": False, **body}
    async with session.post("/v1/responses", json=body) as answer:
        await answer.read()
        return answer.status


async def compact(session: aiohttp.ClientSession, story: str) -> list[Any]:
    """Have a history compacted, and return what stands for it from then on."""
    body = {"model": MODEL, "input": [{"type": "message", "role": "user", "content": story}]}
    path = "/backend-api/codex/responses/compact"
    async with session.post(path, json=body, headers=CODEX_HEADERS) as answer:
        assert answer.status == 200
        output: list[Any] = (await answer.json())["output"]
        return output


def asked_since(sim: Simulator, mark: int) -> list[str | None]:
    """Return the accounts that were asked since there were *mark* turns."""
    return [turn.account for turn in sim.turns[mark:]]


def compactor(sim: Simulator) -> str | None:
    """Return the account that was asked to compact last."""
    return next(r.account for r in reversed(sim.requests) if r.path.endswith("/compact"))


async def stats(session: aiohttp.ClientSession) -> dict[str, Any]:
    async with session.get("/stats") as answer:
        found = (await answer.json())["accounts"]
        return {account["alias"]: account for account in found}


class Before:
    """What was so before the restart."""

    def __init__(self) -> None:
        self.homes: dict[str, str | None] = {}
        self.histories: list[tuple[str | None, list[Any]]] = []
        self.accounts: dict[str, Any] = {}
        self.limited = ""


async def live(sim: Simulator, session: aiohttp.ClientSession) -> Before:
    """Have conversations, compacted histories, and an account that runs into its limit."""
    before = Before()
    for account, used in zip(sim.accounts, (11, 22, 33, 44), strict=True):
        account.use(primary=used, secondary=used // 2)
    for talk in CONVERSATIONS:
        assert await ask(session, prompt_cache_key=talk, input=f"{talk}: hello") == 200
        before.homes[talk] = sim.turns[-1].account
    for number in range(4):
        output = await compact(session, f"story {number}")
        before.histories.append((compactor(sim), output))
    # One that nothing of the above needs, if there is one; else the last.
    used_by = {*before.homes.values(), *(owner for owner, _ in before.histories)}
    victim = next((a for a in sim.accounts if a.name not in used_by), sim.accounts[-1])
    before.limited = victim.name
    before.homes = {talk: home for talk, home in before.homes.items() if home != victim.name}
    before.histories = [(owner, output) for owner, output in before.histories if owner != victim.name]
    assert before.homes
    assert before.histories
    for account in sim.accounts:
        if account is not victim:
            account.set("overloaded")
    victim.set("usage_limit", resets_in=900.0)
    mark = len(sim.turns)
    while victim.name not in asked_since(sim, mark):
        await ask(session, input="who is there?")
    for account in sim.accounts:
        if account is not victim:
            account.set("ok")
    before.accounts = await stats(session)
    return before


def at_its_limit(accounts: dict[str, Any]) -> list[str]:
    return [alias for alias, account in accounts.items() if account["quota_exhausted"]]


async def check(sim: Simulator, session: aiohttp.ClientSession, before: Before) -> None:
    """See that all of it is as it was."""
    start = len(sim.turns)
    after = await stats(session)
    (alias,) = at_its_limit(after)
    assert [alias] == at_its_limit(before.accounts)
    assert after[alias]["cooldown_until"] == before.accounts[alias]["cooldown_until"]
    for name, account in after.items():
        then = before.accounts[name]
        assert account["total_requests"] == then["total_requests"]
        assert account["usage"] == then["usage"]
        if then["quota"] is not None:
            assert _used(account) == _used(then)
    assert any(_used(account) for account in after.values())

    for talk, home in before.homes.items():
        assert await ask(session, prompt_cache_key=talk, input=f"{talk}: and on") == 200
        assert sim.turns[-1].account == home
    for owner, history in before.histories:
        mark = len(sim.turns)
        message = {"type": "message", "role": "user", "content": "go on"}
        assert await ask(session, input=[*history, message]) == 200
        assert asked_since(sim, mark) == [owner]
    for number in range(12):
        assert await ask(session, input=f"something new {number}") == 200
    assert before.limited not in asked_since(sim, start)


def _used(account: dict[str, Any]) -> list[tuple[Any, Any]]:
    return [(window["window"], window["used_percent"]) for window in account["quota"]["windows"]]


async def rest_of_passing(daemon: Running, session: aiohttp.ClientSession) -> None:
    """Wait until what was overloaded for a moment serves again."""

    async def cooling() -> int:
        return sum(account["status"] == "cooldown" for account in (await stats(session)).values())

    # One that was asked several times rests for half a minute at most.
    for _ in range(400):
        if await cooling() <= 1:
            return
        await asyncio.sleep(0.1)
    raise AssertionError(daemon.log)


async def test_a_clean_restart_loses_nothing(tmp_path: Path) -> None:
    async with Simulator(4) as sim:
        sim.write_auth_files(tmp_path / "auths")
        config = write_config(tmp_path, sim)
        async with started(config) as (daemon, session):
            before = await live(sim, session)
            assert await daemon.stop() == 0
        for name in (STATE_FILE, OWNERS_FILE):
            assert stat.S_IMODE((tmp_path / "data" / name).stat().st_mode) == 0o600
        async with started(config) as (daemon, session):
            assert re.search(r"memory restored accounts=4 of=4", daemon.log)
            await rest_of_passing(daemon, session)
            await check(sim, session, before)


async def test_a_kill_loses_nothing_that_is_older_than_a_save(tmp_path: Path) -> None:
    async with Simulator(4) as sim:
        sim.write_auth_files(tmp_path / "auths")
        config = write_config(tmp_path, sim)
        async with started(config) as (daemon, session):
            before = await live(sim, session)
            total = sum(account["total_requests"] for account in before.accounts.values())

            def is_saved() -> bool:
                try:
                    document = json.loads((tmp_path / "data" / STATE_FILE).read_bytes())
                except FileNotFoundError:
                    return False
                return bool(sum(a["requests"] for a in document["accounts"].values()) == total)

            await until(is_saved, SAVE_SECONDS + 10.0)
            await daemon.kill()
        async with started(config) as (daemon, session):
            await rest_of_passing(daemon, session)
            await check(sim, session, before)


async def test_an_owner_outlives_a_kill_a_moment_later(tmp_path: Path) -> None:
    async with Simulator(3) as sim:
        (tmp_path / "auths").mkdir()
        config = write_config(tmp_path, sim)
        file = tmp_path / "data" / OWNERS_FILE
        histories: list[tuple[str | None, list[Any]]] = []
        for number, account in enumerate(sim.accounts, 1):
            # Alone, so that each of them has to write one.
            place = tmp_path / "auths" / "one.json"
            place.write_bytes(dumps(account.flat_file()))
            async with started(config) as (daemon, session):
                output = await compact(session, "a long story")
                histories.append((compactor(sim), output))
                await until(lambda: file.exists() and file.read_bytes().count(b" .\n") == number)  # noqa: B023
                await daemon.kill()
            place.unlink()
        assert not (tmp_path / "data" / STATE_FILE).exists()
        assert [owner for owner, _ in histories] == [account.name for account in sim.accounts]
        sim.write_auth_files(tmp_path / "auths")
        async with started(config) as (_, session):
            for owner, history in histories:
                mark = len(sim.turns)
                assert await ask(session, input=[*history, {"role": "user", "content": "go on"}]) == 200
                assert asked_since(sim, mark) == [owner]


@pytest.mark.parametrize("content", [b"", b'{"version":1,"accounts":{"x"', b'{"version":99}', b"\x00" * 4096])
async def test_a_broken_memory_is_survived(tmp_path: Path, content: bytes) -> None:
    async with Simulator(1) as sim:
        sim.write_auth_files(tmp_path / "auths")
        config = write_config(tmp_path, sim)
        (tmp_path / "data").mkdir(mode=0o700)
        for name in (STATE_FILE, OWNERS_FILE):
            (tmp_path / "data" / name).write_bytes(content)
        async with started(config) as (daemon, session):
            assert "memory starts empty: state.json is " in daemon.log
            assert await ask(session) == 200
            assert await daemon.stop() == 0
        assert (tmp_path / "data" / f"{STATE_FILE}.aside").read_bytes() == content
        assert json.loads((tmp_path / "data" / STATE_FILE).read_bytes())["version"] == 1
        async with started(config) as (daemon, session):
            assert "memory restored accounts=1" in daemon.log
            (account,) = (await stats(session)).values()
            assert account["total_requests"] == 1


async def test_a_login_that_was_lost_is_not_tried_again_until_its_file_changes(tmp_path: Path) -> None:
    async with Simulator(1) as sim:
        (account,) = sim.accounts
        account.issue(expires_in=-60)
        account.set("ok", refresh="reused")
        sim.write_auth_files(tmp_path / "auths")
        config = write_config(tmp_path, sim)
        async with started(config) as (daemon, session):
            await daemon.logged("account login lost")
            assert await ask(session) == 429
            assert await daemon.stop() == 0
        sim.clear()
        async with started(config) as (daemon, session):
            (seen,) = (await stats(session)).values()
            assert seen["status"] == "needs_login"
            assert "(refresh_token_reused)" in seen["reason"]
            assert await ask(session) == 429
            assert sim.requests == []
            # Its owner logs in again.
            account.set("ok", refresh="ok")
            account.issue()
            sim.write_auth_files(tmp_path / "auths")
            await daemon.logged("account tokens changed")
            assert await ask(session) == 200
