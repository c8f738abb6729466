"""kill -9 while tokens are exchanged: by phase, and at random moments.

What may be lost, and what not:

- before the request leaves, and once the answer is on disk: nothing;
- in between the new token can be gone. Then the file is as it was, a record says so, the old
  token is tried once at the next start, and the access token serves to its end meanwhile.
"""

import asyncio
import json
import os
import random
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from codex_proxy.accounts import files, store
from codex_proxy.accounts.account import Login
from codex_proxy.accounts.state import State
from codex_proxy.simulator import SimAccount, Simulator
from tests.accounts.making import login_of, state_of
from tests.daemon.exchanger import PLACES, Exchanger, exchanging, keeping
from tests.process import client, running, until, write_config

TURN = {"model": "gpt-5.5", "input": "hi"}

OWN = {"note": "keep me", "nested": {"a": [1, None, 2**70]}, "priority": 3}
"""What only the file knows."""

FROM_OUTSIDE = {"sent": "hang", "issuer committed": "hang_committed"}
"""Phases in which the answer has not come: how the issuer behaves, which is how we know that it is one."""
INTACT = ("before send", "sent", "recorded", "written", "renamed")
"""Phases in which a kill loses nothing; in the others the answer is lost."""
PHASES = ("before send", "sent", "issuer committed", "answer read", "recorded", "written", "renamed")

assert set(PHASES) == PLACES.keys() | FROM_OUTSIDE.keys()


def content(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def make_due(account: SimAccount, path: Path) -> None:
    """Log an account in anew; its access token is good, but it is time for another."""
    account.set("ok")
    account.issue(250.0)
    account.tokens.issued_at -= 3_600
    path.write_text(json.dumps({**content(path), **account.flat_file(), **OWN}), encoding="utf-8")
    path.chmod(0o600)


def look(account: SimAccount, path: Path, before: dict[str, Any]) -> None:
    """See that the file is whole, and has all it had; only its tokens may be newer."""
    now = content(path)
    volatile = {"access_token", "refresh_token", "id_token", "expired", "last_refresh"}
    assert {k: v for k, v in now.items() if k not in volatile} == {
        k: v for k, v in before.items() if k not in volatile
    }
    assert now["refresh_token"] in {before["refresh_token"], account.tokens.refresh}
    assert (now["refresh_token"] == before["refresh_token"]) == (
        now["access_token"] == before["access_token"]
    )
    assert path.stat().st_mode & 0o077 == 0


class Phased:
    """Kill in one phase after the other, and start again after each."""

    def __init__(self, folder: Path, sim: Simulator, exchanger: Exchanger) -> None:
        self.folder = folder
        self.sim = sim
        self.exchanger = exchanger
        self.paths = sim.write_auth_files(folder / "auths")
        self.found: Counter[str] = Counter()

    async def once(self, number: int, phase: str) -> None:
        """Kill a process while it exchanges the token of account *number*, in *phase*."""
        account, path = self.sim.accounts[number], self.paths[number]
        make_due(account, path)
        before, refreshes = content(path), account.tokens.login.refreshes
        old_access = before["access_token"]
        if phase in FROM_OUTSIDE:
            account.set("ok", refresh=FROM_OUTSIDE[phase])
        asked = len(self.sim.exchanges)
        [pid] = await self.exchanger.start(phase=phase)
        if phase in FROM_OUTSIDE:
            await until(lambda: len(self.sim.exchanges) > asked, 20)
            if phase == "issuer committed":
                await until(lambda: account.tokens.login.refreshes > refreshes)
            os.kill(pid, signal.SIGKILL)
        [end] = await self.exchanger.ends()
        assert end["code"] == -signal.SIGKILL
        account.refresh_mode = "ok"
        was_sent = phase != "before send"
        assert len(self.sim.exchanges) == asked + was_sent
        was_spent = account.tokens.login.refreshes > refreshes
        assert was_spent == (was_sent and phase != "sent")
        look(account, path, before)
        await self._start_again(account, path, phase, old_access)

    async def _start_again(self, account: SimAccount, path: Path, phase: str, old_access: str) -> None:
        before = content(path)
        asked, login = len(self.sim.exchanges), account.tokens.login
        refreshes = login.refreshes
        is_uncertain = phase not in {"recorded", "written", "renamed"}
        async with keeping(self.folder, self.sim.issuer) as (keeper, pool, background):
            [known] = [a for a in pool if a.credential.identity.account_id == account.account_id]
            assert login_of(known) is (Login.UNCERTAIN if is_uncertain else Login.OK)
            if is_uncertain:
                assert known.credential.interrupted is not None
                assert known.credential.access.reveal() == old_access
            else:
                assert known.credential.refresh.reveal() == account.tokens.refresh
            # Whatever is found out about its login, it serves.
            token = await keeper.token(known)
            assert token is not None
            await keeper.refresh_due()
            await background.wait_critical()
            assert len(self.sim.exchanges) == asked + is_uncertain, "tried once, and only if need be"
            if phase in INTACT:
                assert login_of(known) is Login.OK
                assert login.refreshes == refreshes + is_uncertain
                assert not login.revoked, "no token was used twice"
                assert content(path)["refresh_token"] == account.tokens.refresh
                assert content(path)["access_token"] == account.tokens.access
                self.found[f"{phase}: intact"] += 1
            else:
                assert login_of(known) is Login.LOST
                assert known.login_lost == (
                    "refresh_token_reused (an exchange was interrupted before its answer was saved)"
                )
                assert state_of(known) is State.READY
                assert content(path) == before
                self.found[f"{phase}: answer lost"] += 1
            token = await keeper.token(known)
            assert token is not None
            assert (token.reveal() == old_access) == (phase not in INTACT)
            await keeper.load()
            assert known in list(pool)
        if phase not in INTACT:
            await self._start_once_more(account, old_access)
        assert [p.name for p in sorted(path.parent.glob("*.json"))] == [p.name for p in self.paths]

    async def _start_once_more(self, account: SimAccount, old_access: str) -> None:
        """See that the next start asks nobody, knows the reason, and serves what is left."""
        asked = len(self.sim.exchanges)
        async with keeping(self.folder, self.sim.issuer) as (keeper, pool, background):
            [known] = [a for a in pool if a.credential.identity.account_id == account.account_id]
            assert "interrupted" in known.login_lost
            await keeper.refresh_due()
            await background.wait_critical()
            assert len(self.sim.exchanges) == asked
            token = await keeper.token(known)
            assert token is not None
            assert token.reveal() == old_access


async def kill_by_phase(folder: Path, rounds: int) -> Counter[str]:
    async with Simulator(4) as sim, exchanging(folder, sim.issuer) as exchanger:
        phased = Phased(folder, sim, exchanger)
        for _ in range(rounds):
            for number in range(len(sim.accounts)):
                for phase in PHASES:
                    await phased.once(number, phase)
        left = [
            p.name for p in (folder / "auths").iterdir() if files.TEMPORARY_PREFIX in p.name and p.is_file()
        ]
        assert len(left) == 4 * rounds, "one per kill between writing and renaming"
    return phased.found


def show(capsys: pytest.CaptureFixture[str], title: str, found: Counter[str]) -> None:
    with capsys.disabled():
        print(f"\n{title}: {sum(found.values())} in all")  # noqa: T201 -- the figures
        for phase, count in found.items():
            print(f"  {phase}: {count}")  # noqa: T201


def expected(times: int) -> dict[str, int]:
    return {f"{phase}: {'intact' if phase in INTACT else 'answer lost'}": times for phase in PHASES}


async def test_a_kill_in_each_phase_of_an_exchange_loses_what_it_must_and_no_more(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = await kill_by_phase(tmp_path, rounds=1)
    show(capsys, "kill -9 by phase", found)
    assert found == expected(4)


@pytest.mark.long
async def test_a_hundred_kills_by_phase(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = await kill_by_phase(tmp_path, rounds=5)
    show(capsys, "kill -9 by phase", found)
    assert found == expected(20)


# -- at random moments --------------------------------------------------------------------


class Kills:
    """Kill the daemon at random moments while it exchanges tokens, and look at what is left."""

    def __init__(self, folder: Path, sim: Simulator, seed: int) -> None:
        self.folder = folder
        self.sim = sim
        self.random = random.Random(seed)
        self.found: Counter[str] = Counter()
        self.paths = sim.write_auth_files(folder / "auths")

    async def once(self) -> None:
        """Start, wait for an exchange, wait a random moment more, kill, look."""
        before: list[dict[str, Any]] = []
        for account, path in zip(self.sim.accounts, self.paths, strict=True):
            make_due(account, path)
            # What an exchange spends most of its time with differs from kill to kill.
            account.set("ok", refresh="slow", refresh_seconds=self.random.choice([0.0, 0.002, 0.02]))
            before.append(content(path))
        begun = len(self.sim.exchanges)
        async with running(write_config(self.folder, self.sim)) as daemon:
            await until(lambda: len(self.sim.exchanges) > begun, 20)
            await asyncio.sleep(self.random.random() * 0.08)
            await daemon.kill()
        for account, path, old in zip(self.sim.accounts, self.paths, before, strict=True):
            look(account, path, old)
            account.set("ok")
        # What the next start does first: take up what was left.
        scan = await asyncio.to_thread(store.scan, self.folder / "auths", self.folder / "data")
        assert not scan.problems
        for account, path, credential in zip(self.sim.accounts, self.paths, scan.credentials, strict=True):
            assert credential.path == path
            if credential.refresh.reveal() == account.tokens.refresh:
                self.found["login intact"] += 1
            else:
                # Spent at the issuer, and the answer was on its way: the next start must know.
                assert credential.interrupted is not None
                assert credential.access.reveal() == old_access(before, path, self.paths)
                self.found["answer lost"] += 1


def old_access(before: list[dict[str, Any]], path: Path, paths: list[Path]) -> str:
    return str(before[paths.index(path)]["access_token"])


async def kill_often(folder: Path, times: int) -> Counter[str]:
    async with Simulator(3) as sim:
        kills = Kills(folder, sim, seed=times)
        for _ in range(times):
            await kills.once()
        for account, path in zip(sim.accounts, kills.paths, strict=True):
            make_due(account, path)
        async with running(write_config(folder, sim)) as daemon, client(daemon.url) as session:
            await until(lambda: all(account.tokens.login.refreshes for account in sim.accounts), 20)
            for _ in range(6):
                async with session.post("/v1/responses", json=TURN) as answer:
                    assert answer.status == 200
            assert await daemon.stop() == 0
        assert sorted(p.name for p in (folder / "auths").glob("*.json")) == sorted(
            p.name for p in kills.paths
        )
    return kills.found


async def test_kill_9_at_random_moments_leaves_every_account_file_whole(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = await kill_often(tmp_path, 5)
    show(capsys, "kill -9 of the daemon, 5 times over 3 accounts", found)
    assert sum(found.values()) == 15
    assert found["login intact"]


@pytest.mark.long
async def test_kill_9_at_many_random_moments(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = await kill_often(tmp_path, 200)
    show(capsys, "kill -9 of the daemon, 200 times over 3 accounts", found)
    assert sum(found.values()) == 600
    assert found["login intact"]
