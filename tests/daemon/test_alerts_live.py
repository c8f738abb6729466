"""Alerts of a whole daemon: what happens to its accounts and turns, to the messages that a webhook gets."""

import asyncio
import contextlib
import dataclasses
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from aiohttp import web

from tests.daemon.test_reload_live import way_out
from tests.harness import Stand, standing
from tests.net.peers import serving

AT_ONCE = "{account-needs-login: {for: 0}, error-share: {for: 0, requests: 5}, pool-nearly-dry: {for: 0}}"


class Hook:
    def __init__(self) -> None:
        self.got: list[Any] = []

    async def take(self, request: web.Request) -> web.StreamResponse:
        self.got.append(await request.json())
        return web.Response()

    @property
    def texts(self) -> list[str]:
        return [alert["text"] for body in self.got for alert in body["alerts"]]


@contextlib.asynccontextmanager
async def told(folder: Path, hook: Hook) -> AsyncIterator[Stand]:
    async with (
        serving(hook.take) as url,
        standing(folder, max_retry=0, alerts=AT_ONCE, alert_webhooks=f"[{url}/token]") as stand,
    ):
        yield stand


async def look(stand: Stand) -> None:
    await stand.daemon.alerts.look()
    await stand.until(lambda: not stand.daemon.alerts.outbox._sending)


async def test_a_login_that_the_issuer_ended_is_told_of_once_over_restarts(tmp_path: Path) -> None:
    hook, alias = Hook(), ""
    for _ in range(3):
        async with told(tmp_path, hook) as stand:
            account = stand.accounts[0]
            account.set("ok", refresh="invalid_grant")
            if not hook.got:
                await look(stand)
                assert hook.got == []
                await stand.post("/refresh")
            stand.known(account).login_lost = stand.known(account).login_lost or "invalid_grant"
            await look(stand)
            await look(stand)
            assert [one["name"] for one in stand.daemon.alerts.firing()] == ["account-needs-login"]
            alias = stand.known(account).alias
            metrics = (await stand.get("/metrics")).body.decode()
            assert 'codex_proxy_alerts_firing{alert="account-needs-login"} 1' in metrics
    assert len(hook.texts) == 1
    assert hook.texts[0].startswith(f"{alias} needs a login: ")


async def test_what_goes_on_is_shown_from_the_first_moment_after_a_restart(tmp_path: Path) -> None:
    """Or a scrape would see it end and begin again."""
    hook = Hook()
    async with told(tmp_path, hook) as stand:
        stand.known(stand.accounts[0]).login_lost = "invalid_grant"
        await look(stand)
    async with told(tmp_path, hook) as stand:
        assert [one["name"] for one in stand.daemon.alerts.firing()] == ["account-needs-login"]
    assert len(hook.got) == 1


async def test_failing_turns_and_an_empty_pool_are_told_of(tmp_path: Path) -> None:
    hook = Hook()
    async with told(tmp_path, hook) as stand:
        for _ in range(5):
            # A caller's own mistakes are none of it.
            assert (await stand.post(body={"model": "gpt-5.5", "input": 3})).status == 400
        await look(stand)
        assert hook.got == []
        stand.sim.set_all("usage_limit")
        for _ in range(6):
            assert (await stand.ask()).status == 429
        await look(stand)
    names = {alert["name"] for body in hook.got for alert in body["alerts"]}
    assert names == {"error-share", "pool-nearly-dry"}
    assert len(hook.got) == 1
    assert "6 of 11 turns failed" in json.dumps(hook.got)


async def test_messages_go_out_through_the_proxy(tmp_path: Path) -> None:
    hook = Hook()
    async with serving(hook.take) as url, way_out(int(url.rpartition(":")[2])) as (proxy, seen):
        async with standing(tmp_path, alerts=AT_ONCE, alert_webhooks=f"[{url}/token]") as stand:
            # Only now: it leads to the webhook, whatever is asked for.
            live = stand.daemon.live
            live.replace(dataclasses.replace(live.current, proxy_url=proxy))
            stand.known(stand.accounts[0]).login_lost = "invalid_grant"
            await look(stand)
            await stand.daemon.outbound.aclose()
        assert len(hook.got) == 1
    assert any(line.startswith(f"POST {url}/token".encode()) for line in seen)


async def test_no_webhook_no_page_nothing_is_needed(tmp_path: Path) -> None:
    """Out of the box alerts cost one look each ten seconds."""
    async with standing(tmp_path) as stand:
        await stand.daemon.alerts.look()
        assert stand.daemon.alerts.firing() == []
        assert not await asyncio.to_thread((stand.folder / "data" / "alerts.json").exists)
