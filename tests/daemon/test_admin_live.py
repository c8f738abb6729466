"""What an owner sees and does: /health, /stats, /refresh, /check-quota, the control socket."""

import asyncio
import json
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from codex_proxy.accounts.memory import STATE_FILE
from codex_proxy.config import CONTROL_SOCKET
from codex_proxy.protocol.sse import Parser
from codex_proxy.simulator import Simulator
from tests.harness import Stand, standing
from tests.process import client, running, until, write_config


async def frames(stand: Stand, path: str) -> list[tuple[str, Any]]:
    """Ask for a round and return its frames as name and data."""
    async with stand.session.post(path) as answer:
        assert answer.status == 200
        assert answer.headers["content-type"] == "text/event-stream"
        assert answer.headers["x-accel-buffering"] == "no"
        return named(await answer.read())


def named(body: bytes) -> list[tuple[str, Any]]:
    found = []
    for block in body.decode().strip().split("\n\n"):
        lines = dict(line.split(": ", 1) for line in block.splitlines())
        found.append((lines["event"], json.loads(lines["data"])))
    return found


# --- /health and /stats


async def test_health_counts_accounts_and_names_none(tmp_path: Path) -> None:
    async with standing(tmp_path, accounts=3, api_keys="[some-client-key-1]") as stand:
        for path in ("/health", "/livez", "/readyz"):
            answer = await stand.get(path)
            assert answer.status == 200
            assert b"@" not in answer.body
            assert b"acct-" not in answer.body
        health = (await stand.get("/health")).json
        assert (health["status"], health["accounts"]) == ("ok", 3)


GO_FIELDS = {
    "email",
    "file_path",
    "status",
    "plan_type",
    "disable_reason",
    "total_requests",
    "total_errors",
    "consecutive_failures",
    "last_used_at",
    "last_refreshed_at",
    "cooldown_until",
    "quota_exhausted",
    "quota_resets_at",
    "token_expire",
    "usage",
    "quota",
}


async def test_stats_have_the_names_that_dashboards_know(tmp_path: Path) -> None:
    async with standing(tmp_path, accounts=2) as stand:
        stats = await stand.stats()
        assert {"total", "active", "cooldown", "disabled"} <= stats["summary"].keys()
        fresh = stats["accounts"][0]
        assert fresh.keys() >= GO_FIELDS
        # Nothing has happened: null, never the year 1, and zeros are there.
        for field in ("last_used_at", "cooldown_until", "quota_resets_at", "disable_reason"):
            assert fresh[field] is None, field
        assert (fresh["total_requests"], fresh["total_errors"], fresh["consecutive_failures"]) == (0, 0, 0)
        assert fresh["usage"] == {
            "total_completions": 0,
            "input_tokens": 0,
            "cached_tokens": 0,
            "output_tokens": 0,
            "reasoning_tokens": 0,
            "total_tokens": 0,
        }
        assert fresh["token_expire"].endswith("Z")
        assert "0001-01-01" not in json.dumps(stats)

        usage = (await stand.ask("hi", stream=False)).json["usage"]
        stats = await stand.stats()
        (used,) = [account for account in stats["accounts"] if account["total_requests"]]
        assert used["status"] == "active"
        assert used["last_used_at"].endswith("Z")
        assert used["plan_type"] == "plus"
        assert used["usage"]["total_completions"] == 1
        assert used["usage"]["input_tokens"] == usage["input_tokens"] > 0
        assert used["usage"]["total_tokens"] == usage["total_tokens"]
        assert stats["summary"]["total_tokens"] == usage["total_tokens"]
        windows = {
            window["window"]: window for window in used["quota"]["windows"] if window["limit"] == "codex"
        }
        assert windows["5h"]["minutes"] == 300
        assert windows["week"]["minutes"] == 10_080
        assert windows["5h"]["resets_at"].endswith("Z")
        assert windows["5h"]["source"] in ("headers", "event")


async def test_a_limit_shows_as_cooldown_with_its_end(tmp_path: Path) -> None:
    async with standing(tmp_path, accounts=2) as stand:
        stand.accounts[0].set("usage_limit", resets_in=3600)
        stand.accounts[1].set("usage_limit", resets_in=7200)
        assert (await stand.ask("hi")).status == 429
        stats = await stand.stats()
        assert (stats["summary"]["active"], stats["summary"]["cooldown"]) == (0, 2)
        assert stats["summary"]["quota_exhausted"] == 2
        for account in stats["accounts"]:
            assert account["quota_exhausted"] is True
            assert account["cooldown_until"] == account["quota_resets_at"]
            assert account["total_errors"] == 1
        assert (await stand.get("/health")).status == 200
        # Callers are told by their answers; a supervisor must not restart us for it.
        assert (await stand.get("/livez")).status == 200


# --- rounds


async def test_refresh_exchanges_every_token_once_and_tells_each(tmp_path: Path) -> None:
    async with standing(tmp_path, accounts=3) as stand:
        stand.accounts[2].set("ok", refresh="reused")
        told = await frames(stand, "/refresh")
        assert [name for name, _ in told] == ["item", "item", "item", "done"]
        items = [data for _, data in told[:-1]]
        assert [item["current"] for item in items] == [1, 2, 3]
        assert {item["total"] for item in items} == {3}
        assert sorted(item["success"] for item in items) == [False, True, True]
        (failed,) = [item for item in items if not item["success"]]
        assert "refresh_token_reused" in failed["reason"]
        for item in items:
            assert item["type"] == "item"
            assert "@" in item["email"]
            assert item["email"] not in {account.email for account in stand.accounts}
        done = told[-1][1]
        assert done["type"] == "done"
        assert (done["total"], done["success_count"], done["failed_count"]) == (3, 2, 1)
        assert done["remaining"] == 3, "a failure takes no account away"
        assert done["duration"].endswith("s")
        assert len(stand.sim.exchanges) == 3
        for account in stand.accounts[:2]:
            file = stand.auths / f"simulated-{account.name}.json"
            saved = json.loads(await asyncio.to_thread(file.read_text, encoding="utf-8"))
            assert saved["refresh_token"] == account.tokens.refresh
        # Its access token is still good, so it serves on.
        assert len(list(stand.auths.glob("*.json"))) == 3


async def test_a_round_goes_on_when_its_caller_leaves(tmp_path: Path) -> None:
    async with standing(tmp_path, accounts=4) as stand:
        for account in stand.accounts:
            account.set("ok", refresh="slow", refresh_seconds=0.05)
        response = await stand.session.post("/refresh")
        await stand.until(lambda: len(stand.sim.exchanges) >= 1)
        response.close()
        await stand.until(lambda: stand.sim.issuer_state.exchanges == 4)
        await stand.until(lambda: all(e.finished for e in stand.sim.exchanges))
        assert not any(exchange.cancelled for exchange in stand.sim.exchanges)


async def test_who_asks_during_a_round_joins_it(tmp_path: Path) -> None:
    async with standing(tmp_path, accounts=3) as stand:
        for account in stand.accounts:
            account.set("ok", refresh="slow", refresh_seconds=0.05)
        first, second = await asyncio.gather(frames(stand, "/refresh"), frames(stand, "/refresh"))
        assert [name for name, _ in second] == [name for name, _ in first] == ["item"] * 3 + ["done"]
        assert first == second
        assert len(stand.sim.exchanges) == 3


async def test_check_quota_asks_for_usage_and_not_for_tokens(tmp_path: Path) -> None:
    async with standing(tmp_path, accounts=3) as stand:
        stand.accounts[0].use(42, 7)
        stand.accounts[1].set("server_error", everywhere=True)
        told = await frames(stand, "/check-quota")
        assert [name for name, _ in told] == ["item", "item", "item", "done"]
        assert (told[-1][1]["success_count"], told[-1][1]["failed_count"]) == (2, 1)
        (failed,) = [data for _, data in told[:-1] if not data["success"]]
        assert "500" in failed["reason"]
        assert [r.path for r in stand.sim.requests] == ["/backend-api/wham/usage"] * 3
        stats = await stand.stats()
        assert (stats["summary"]["quota_checked"], stats["summary"]["quota_valid"]) == (3, 2)
        assert stats["summary"]["quota_invalid"] == 1
        shown = [
            window["used_percent"]
            for account in stats["accounts"]
            for window in account["quota"]["windows"]
            if window["window"] == "5h"
        ]
        assert 42 in shown
        # Whatever a check finds, the files stay.
        assert len(list(stand.auths.glob("*.json"))) == 3


async def test_rounds_over_no_accounts_end_at_once(tmp_path: Path) -> None:
    async with standing(tmp_path, accounts=0) as stand:
        for path in ("/refresh", "/check-quota"):
            ((name, done),) = await frames(stand, path)
            assert (name, done["total"], done["success_count"], done["failed_count"]) == ("done", 0, 0, 0)
            assert done["remaining"] == 0


# --- the control socket


@pytest.fixture
def short() -> Iterator[Path]:
    """A folder whose name leaves room for a socket's, which may have 107 bytes."""
    folder = Path(tempfile.mkdtemp(prefix="cp-"))
    yield folder
    shutil.rmtree(folder)


async def test_the_control_socket_serves_its_owner_without_a_key(short: Path) -> None:
    async with Simulator(1) as sim:
        sim.write_auth_files(short / "auths")
        config = write_config(short, sim, api_keys="[some-client-key-1]")
        async with running(config) as daemon:
            path = short / "data" / CONTROL_SOCKET
            mode = path.stat().st_mode
            assert stat.S_ISSOCK(mode)
            assert stat.S_IMODE(mode) == 0o600
            async with aiohttp.ClientSession(connector=aiohttp.UnixConnector(str(path))) as session:
                async with session.get("http://localhost/stats") as answer:
                    assert answer.status == 200
                    assert (await answer.json())["summary"]["total"] == 1
                async with session.post("http://localhost/check-quota") as answer:
                    events = Parser().feed(await answer.read())
                    assert len(events) == 2
                # Turns are for clients, who have keys.
                async with session.post("http://localhost/v1/responses", json={}) as answer:
                    assert answer.status == 404
            async with client(daemon.url) as session, session.get("/stats") as answer:
                assert answer.status == 401
            assert await daemon.stop() == 0
            assert not path.exists()


async def test_a_socket_left_by_a_kill_is_replaced_and_a_living_one_is_not(short: Path) -> None:
    async with Simulator(1) as sim:
        sim.write_auth_files(short / "auths")
        config = write_config(short, sim)
        path = short / "data" / CONTROL_SOCKET
        async with running(config) as killed:
            await killed.kill()
        assert path.exists()
        async with running(config):
            inode = path.stat().st_ino
            async with running(config) as second:
                await second.logged("another daemon uses this data-dir")
                assert await second.stop() == 0
            assert path.stat().st_ino == inode, "the second one took the first one's socket away"
            async with (
                aiohttp.ClientSession(connector=aiohttp.UnixConnector(str(path))) as session,
                session.get("http://localhost/health") as answer,
            ):
                assert answer.status == 200


async def test_a_daemon_beside_another_takes_over_when_it_is_alone(short: Path) -> None:
    async with Simulator(1) as sim:
        sim.write_auth_files(short / "auths")
        config = write_config(short, sim)
        path, state = short / "data" / CONTROL_SOCKET, short / "data" / STATE_FILE
        async with running(config) as first, running(config) as second:
            await second.logged("another daemon uses this data-dir")
            assert await first.stop() == 0
            state.unlink()
            await until(path.exists, 10.0)
            assert await second.stop() == 0
        assert state.exists(), "what it learned is written by the one that is left"


async def test_a_data_dir_too_deep_for_a_socket_costs_only_the_socket(tmp_path: Path) -> None:
    async with standing(tmp_path, accounts=1, data_dir=tmp_path / ("d" * 120)) as stand:
        assert (await stand.ask("hi")).status == 200
        assert not (tmp_path / ("d" * 120) / CONTROL_SOCKET).exists()
