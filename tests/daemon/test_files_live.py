"""Account files that come, change and go under a running daemon; what a caller sees of it."""

import asyncio
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from codex_proxy.accounts.state import State
from codex_proxy.simulator import Script, SimAccount
from tests.accounts.making import state_of
from tests.harness import Stand, standing

# Far below a second; generous, because tests run beside each other.
SOON = 1.0


def path_of(stand: Stand, account: SimAccount) -> Path:
    return stand.auths / f"simulated-{account.name}.json"


def content(path: Path) -> dict[str, Any]:
    value: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return value


def put(path: Path, value: dict[str, Any]) -> None:
    """Write a file as an editor does: in place, not in one step."""
    path.write_text(json.dumps(value), encoding="utf-8")


async def watched(stand: Stand) -> None:
    """Wait until changes are told of, instead of being looked for."""
    await stand.until(lambda: stand.daemon.keeper.files.seconds_to_next_look() > 2.0)


async def soon(stand: Stand, condition: Callable[[], bool]) -> None:
    started = time.monotonic()
    await stand.until(condition)
    assert time.monotonic() - started < SOON


async def test_a_file_that_comes_serves_within_a_moment(tmp_path: Path) -> None:
    async with standing(tmp_path, accounts=1) as stand:
        await watched(stand)
        (first,) = stand.accounts
        first.set("usage_limit")
        assert (await stand.ask("hi")).status == 429
        second = stand.sim.add_account("late")
        put(path_of(stand, second), second.flat_file())
        await soon(stand, lambda: len(stand.daemon.pool) == 2)
        assert (await stand.ask("hi")).status == 200
        assert stand.tried()[-1] == second.name


async def test_a_file_that_goes_stops_new_requests_at_once_and_lets_running_ones_end(tmp_path: Path) -> None:
    async with standing(tmp_path, accounts=2) as stand:
        await watched(stand)
        stand.in_order()
        first, second = stand.accounts
        first.script(Script.long_text(60, "word ", delay=0.01))
        async with stand.asking("hi") as running:
            await running.content.readany()
            known = stand.known(first)
            path_of(stand, first).unlink()
            await soon(stand, lambda: len(stand.daemon.pool) == 1)
            assert known.in_flight == 1
            assert (await stand.ask("hi")).status == 200
            rest = await running.read()
        assert b"response.completed" in rest
        assert stand.tried() == [first.name, second.name]
        await stand.until(lambda: known.in_flight == 0)
        # Nothing brings it back, neither a save nor a refused token.
        assert await stand.daemon.keeper.token(known, refused=known.credential.access) is None
        await stand.daemon.keeper.save_unsaved()
        await stand.daemon.keeper.load()
        assert not path_of(stand, first).exists()
        assert stand.sim.exchanges == []
        assert [account["alias"] for account in (await stand.stats())["accounts"]] == [
            stand.known(second).alias
        ]


async def test_a_file_that_goes_during_its_exchange_does_not_come_back(tmp_path: Path) -> None:
    async with standing(tmp_path, accounts=2) as stand:
        await watched(stand)
        first, second = stand.accounts
        first.set("ok", refresh="slow", refresh_seconds=0.3)
        known = stand.known(first)
        refreshing = stand.daemon.background.spawn(stand.daemon.keeper.refresh_one(known), name="refresh")
        await stand.until(lambda: len(stand.sim.exchanges) == 1)
        path_of(stand, first).rename(tmp_path / "taken.json")
        assert (await refreshing).success
        await stand.until(lambda: len(stand.daemon.pool) == 1)
        assert not path_of(stand, first).exists()
        assert (await stand.ask("hi")).status == 200
        assert stand.tried() == [second.name]
        # Its owner changes their mind: it has its new tokens, and all else of the file.
        spent = content(tmp_path / "taken.json")["refresh_token"]
        (tmp_path / "taken.json").rename(path_of(stand, first))
        await stand.until(lambda: len(stand.daemon.pool) == 2)
        assert content(path_of(stand, first))["refresh_token"] == first.tokens.refresh != spent
        assert content(path_of(stand, first))["email"] == first.email


@pytest.mark.parametrize("how", ["in place", "renamed over", "with the old tokens, after the answer"])
async def test_an_edit_by_hand_during_an_exchange_loses_neither_side(tmp_path: Path, how: str) -> None:
    async with standing(tmp_path, accounts=1) as stand:
        await watched(stand)
        (account,) = stand.accounts
        path, known = path_of(stand, account), stand.known(account)
        account.set("ok", refresh="slow", refresh_seconds=0.3)
        opened = {**content(path), "alias": "edited", "note": {"mine": [1, 2]}, "priority": 4}
        refreshing = stand.daemon.background.spawn(stand.daemon.keeper.refresh_one(known), name="refresh")
        await stand.until(lambda: len(stand.sim.exchanges) == 1)
        if how == "in place":
            put(path, opened)
        elif how == "renamed over":
            put(tmp_path / "new.json", opened)
            os.replace(tmp_path / "new.json", path)
        assert (await refreshing).success
        if how == "with the old tokens, after the answer":
            put(path, opened)
        await soon(stand, lambda: known.alias == "edited" and known.credential.priority == 4)
        await stand.until(lambda: content(path)["refresh_token"] == account.tokens.refresh)
        after = content(path)
        assert after["access_token"] == account.tokens.access
        assert (after["alias"], after["note"], after["priority"]) == ("edited", {"mine": [1, 2]}, 4)
        assert known.credential.refresh.reveal() == account.tokens.refresh
        assert not account.tokens.login.revoked


async def test_switching_off_and_on_counts_within_a_moment(tmp_path: Path) -> None:
    async with standing(tmp_path, accounts=2) as stand:
        await watched(stand)
        stand.in_order()
        first, second = stand.accounts
        whole = content(path_of(stand, first))
        put(path_of(stand, first), {**whole, "disabled": True})
        known = stand.known(first)
        await soon(stand, lambda: state_of(known) is State.DISABLED)
        assert (await stand.ask("one")).status == 200
        put(path_of(stand, first), whole)
        await soon(stand, lambda: state_of(known) is State.READY)
        assert (await stand.ask("two")).status == 200
        assert stand.tried() == [second.name, first.name]


async def test_a_file_that_is_half_written_goes_on_serving(tmp_path: Path) -> None:
    async with standing(tmp_path, accounts=1) as stand:
        await watched(stand)
        (account,) = stand.accounts
        path = path_of(stand, account)
        whole = path.read_bytes()
        for part in (whole[: len(whole) // 2], b"", whole[:-1]):
            path.write_bytes(part)
            await stand.until(lambda: bool(stand.daemon.pool.problems))
            assert (await stand.ask("hi")).status == 200
        path.write_bytes(whole)
        await soon(stand, lambda: not stand.daemon.pool.problems)


async def test_a_folder_that_goes_away_and_comes_back_costs_no_turn(tmp_path: Path) -> None:
    async with standing(tmp_path, accounts=2) as stand:
        await watched(stand)
        stand.auths.rename(tmp_path / "away")
        await stand.until(lambda: bool(stand.daemon.pool.problems))
        assert (await stand.ask("hi")).status == 200
        late = stand.sim.add_account("late")
        put(tmp_path / "away" / "late.json", late.flat_file())
        (tmp_path / "away").rename(stand.auths)
        await stand.until(lambda: len(stand.daemon.pool) == 3)
        assert stand.daemon.pool.problems == []
        assert (await stand.ask("hi")).status == 200
        await watched(stand)
        (stand.auths / "late.json").unlink()
        await soon(stand, lambda: len(stand.daemon.pool) == 2)


async def test_a_file_replaced_by_a_symlink_is_the_same_account(tmp_path: Path) -> None:
    async with standing(tmp_path, accounts=1) as stand:
        await watched(stand)
        (account,) = stand.accounts
        path, known = path_of(stand, account), stand.known(account)
        # In one step: a file that is gone for a moment takes its account out.
        link = tmp_path / "link"
        put(tmp_path / "elsewhere.json", content(path))
        link.symlink_to(tmp_path / "elsewhere.json")
        link.replace(path)
        await stand.until(lambda: known.credential.target == tmp_path / "elsewhere.json")
        assert [*stand.daemon.pool] == [known]
        assert (await stand.daemon.keeper.refresh_one(known)).success
        assert path.is_symlink()
        assert content(tmp_path / "elsewhere.json")["refresh_token"] == account.tokens.refresh
        # No notice tells of a change behind a symlink; the look every few seconds does.
        put(tmp_path / "elsewhere.json", {**content(tmp_path / "elsewhere.json"), "priority": 8})
        await stand.until(lambda: known.credential.priority == 8, 10)


async def test_stopping_waits_for_no_watch(tmp_path: Path) -> None:
    async with standing(tmp_path, accounts=1) as stand:
        await watched(stand)
        started = time.monotonic()
        await stand.daemon.background.aclose()
        assert time.monotonic() - started < SOON
        await asyncio.sleep(0)
