"""Several processes on one auth-dir: each refresh token is exchanged once, by one of them."""

import asyncio
import contextlib
from pathlib import Path

import pytest

from codex_proxy.accounts import store
from codex_proxy.simulator import Simulator
from tests.daemon.exchanger import exchanging
from tests.process import client, running, write_config

PROCESSES = 8
ACCOUNTS = 5
TURN = {"model": "gpt-5.5", "input": "hi"}


def expire_all(sim: Simulator, folder: Path) -> list[Path]:
    for account in sim.accounts:
        account.set("ok", refresh="slow", refresh_seconds=0.1)
        account.issue(expires_in=-10)
    return sim.write_auth_files(folder / "auths")


def once_each(sim: Simulator, paths: list[Path]) -> None:
    """See that every account was exchanged once, nothing was used twice, and the files have the answers."""
    assert sorted(str(exchange.account) for exchange in sim.exchanges) == sorted(
        account.name for account in sim.accounts
    )
    assert [exchange.status for exchange in sim.exchanges] == [200] * len(sim.accounts)
    for account, path in zip(sim.accounts, paths, strict=True):
        assert not account.tokens.login.revoked, "the issuer is strict: a token used twice ends the login"
        assert account.tokens.login.refreshes == 1
        assert store.load(path).refresh.reveal() == account.tokens.refresh
        assert store.load(path).access.reveal() == account.tokens.access


async def test_eight_processes_on_one_folder_make_one_exchange_per_account(tmp_path: Path) -> None:
    async with Simulator(accounts=ACCOUNTS) as sim, exchanging(tmp_path, sim.issuer) as exchanger:
        for _ in range(3):
            sim.clear()
            paths = expire_all(sim, tmp_path)
            await exchanger.start(PROCESSES)
            ends = await exchanger.ends()
            assert [end["code"] for end in ends] == [0] * PROCESSES
            once_each(sim, paths)
            # Losers have what the winner got.
            digests = {store.load(path).access.digest() for path in paths}
            assert all(set(end["told"].values()) == digests for end in ends)


@pytest.mark.long
async def test_eight_daemons_on_one_folder_make_one_exchange_per_account(tmp_path: Path) -> None:
    async with Simulator(accounts=ACCOUNTS) as sim:
        paths = expire_all(sim, tmp_path)
        async with contextlib.AsyncExitStack() as stack:
            configs: list[Path] = []
            for number in range(PROCESSES):
                own = tmp_path / f"own-{number}"
                own.mkdir()
                configs.append(write_config(own, sim, auth_dir=tmp_path / "auths"))
            daemons = await asyncio.gather(
                *(stack.enter_async_context(running(config)) for config in configs)
            )
            for daemon in daemons:
                async with client(daemon.url) as session:
                    for _ in range(ACCOUNTS):
                        async with session.post("/v1/responses", json=TURN) as answer:
                            assert answer.status == 200
            once_each(sim, paths)
            for daemon in daemons:
                assert await daemon.stop() == 0
        once_each(sim, paths)
