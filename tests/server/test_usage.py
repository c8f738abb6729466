"""The usage endpoint: the quota of the pool, in the backend's shape, of nobody's account."""

import asyncio
from pathlib import Path

import pytest

from codex_proxy import config
from codex_proxy.accounts import poolview
from tests.harness import Stand, standing

PATHS = ("/backend-api/wham/usage", "/wham/usage", "/api/codex/usage")


def use(stand: Stand, *used: int) -> None:
    """Say how full the hours of each account are, and the week half so much."""
    for account, percent in zip(stand.accounts, used, strict=True):
        stand.known(account).quota.read_usage(
            {
                "plan_type": "plus",
                "rate_limit": {
                    "primary_window": {
                        "used_percent": percent,
                        "limit_window_seconds": 18_000,
                        "reset_after_seconds": 3_600,
                    },
                    "secondary_window": {
                        "used_percent": percent // 2,
                        "limit_window_seconds": 604_800,
                        "reset_after_seconds": 360_000,
                    },
                },
            },
            stand.daemon.clock.now(),
        )


@pytest.mark.parametrize("path", PATHS)
async def test_it_answers_with_the_pools_numbers(tmp_path: Path, path: str) -> None:
    async with standing(tmp_path) as stand:
        use(stand, 90, 30, 0)
        answer = await stand.get(path)
        assert answer.status == 200
        assert answer.headers["content-type"].startswith("application/json")
        assert answer.headers["cache-control"] == "no-store"
        page = answer.json
        assert page["plan_type"] == "unknown"
        assert (page["rate_limit"]["allowed"], page["rate_limit"]["limit_reached"]) == (True, False)
        first, second = page["rate_limit"]["primary_window"], page["rate_limit"]["secondary_window"]
        assert (first["used_percent"], first["limit_window_seconds"]) == (40, 18_000)
        assert (second["used_percent"], second["limit_window_seconds"]) == (20, 604_800)
        assert 3_590 <= first["reset_after_seconds"] <= 3_600
        assert first["reset_at"] == pytest.approx(stand.daemon.clock.now() + 3_600, abs=10)
        # A tool that polls it costs no account a request.
        assert stand.sim.requests == []


async def test_of_many_accounts_it_is_made_once_a_second(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(poolview, "_FEW", 2)
    monkeypatch.setattr(poolview, "_KEEP_SECONDS", 3_600.0)
    async with standing(tmp_path) as stand:
        use(stand, 90, 30, 0)
        first = await stand.get(PATHS[0])
        use(stand, 99, 99, 99)
        # By whichever of its names it is asked for.
        assert [(await stand.get(path)).body for path in PATHS] == [first.body] * 3


async def test_nobody_is_named_in_it(tmp_path: Path) -> None:
    async with standing(tmp_path) as stand:
        use(stand, 10, 20, 30)
        answer = await stand.get(PATHS[0])
        for account in stand.accounts:
            for name in (account.email, account.user_id, account.account_id, stand.known(account).alias):
                assert name.encode() not in answer.body
        assert not {"email", "user_id", "account_id"} & set(answer.json)


async def test_a_pool_that_is_used_up_says_so(tmp_path: Path) -> None:
    async with standing(tmp_path, accounts=1) as stand:
        stand.sim.set_all("usage_limit", resets_in=600.0)
        assert (await stand.ask("hi")).status == 429
        page = (await stand.get(PATHS[0])).json
        limit = page["rate_limit"]
        assert (limit["allowed"], limit["limit_reached"]) == (False, True)
        assert limit["primary_window"]["used_percent"] == 100
        assert 580 <= limit["primary_window"]["reset_after_seconds"] <= 600
        assert page["rate_limit_reached_type"] == {"type": "rate_limit_reached"}


async def test_a_key_is_needed(tmp_path: Path) -> None:
    async with standing(tmp_path, api_keys="[the-key-of-a-client]") as stand:
        for path in PATHS:
            assert (await stand.get(path)).status == 401
            found = await stand.get(path, headers={"Authorization": "Bearer the-key-of-a-client"})
            assert found.status == 200


async def test_hidden_it_is_not_there(tmp_path: Path) -> None:
    async with standing(tmp_path, pool_limits="hide") as stand:
        use(stand, 10, 20, 30)
        for path in PATHS:
            answer = await stand.get(path)
            assert answer.status == 404
            assert answer.json["error"]["code"] == "not_found"
            assert answer.json["error"]["message"] == "this proxy does not show its quota"
        # In the words of the caller.
        answer = await stand.get(PATHS[0], headers={"anthropic-version": "2023-06-01"})
        assert answer.status == 404
        assert answer.json["type"] == "error"


async def test_it_can_be_hidden_while_running(tmp_path: Path) -> None:
    async with standing(tmp_path) as stand:
        assert (await stand.get(PATHS[0])).status == 200
        file = tmp_path / "config.yaml"
        text = await asyncio.to_thread(file.read_text, encoding="utf-8")
        await asyncio.to_thread(file.write_text, f"{text}pool-limits: hide\n", encoding="utf-8")
        loaded = await asyncio.to_thread(config.load, file, {})
        stand.daemon.live.replace(loaded.settings)
        assert (await stand.get(PATHS[0])).status == 404
