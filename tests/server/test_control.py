"""What only the control socket answers, and that nobody else does."""

import asyncio
import json
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from codex_proxy.protocol.wire import JsonObject
from codex_proxy.server.access import Level
from codex_proxy.server.app import ACCOUNT_ROUTES, ROUTES, UI_ROUTES
from codex_proxy.server.control import LOCAL_ROUTES, local_handlers
from codex_proxy.tasks import Background
from tests.harness import standing


async def test_the_numbers_of_now_and_a_restart_are_for_the_socket_alone(tmp_path: Path) -> None:
    async with standing(tmp_path, accounts=1) as stand:
        for method, path in (("GET", "/now"), ("POST", "/restart")):
            async with stand.session.request(method, path) as answer:
                assert answer.status == 404
        connector = aiohttp.UnixConnector(str(tmp_path / "data" / "control.sock"))
        async with aiohttp.ClientSession("http://localhost", connector=connector) as session:
            assert (await stand.ask()).status == 200
            await stand.idle()
            async with session.get("/now") as answer:
                now: Any = await answer.json()
            assert answer.headers["cache-control"] == "no-store"
            assert now["alerts"] == []
            assert now["accounts"]["total"] == 1
            assert now["requests_per_second"] > 0
            async with session.get("/now", params={"since": str(now["at"] + 60)}) as answer:
                assert (await answer.json())["series"]["points"] == []
            for since in ("yesterday", "nan", "inf", "-inf"):
                async with session.get("/now", params={"since": since}) as answer:
                    assert answer.status == 400
                    assert (await answer.json())["error"]["param"] == "since"
            async with session.get("/restart") as answer:
                assert answer.status == 405


async def test_whoever_asked_for_a_restart_may_leave() -> None:
    background, release = Background(), asyncio.Event()

    async def work() -> JsonObject:
        await release.wait()
        return {"success": True}

    task = background.spawn(work(), name="restart")
    handler = local_handlers(lambda _: {}, lambda: task)["restart"]
    request: Any = None

    async def ask() -> Any:
        return await handler(request)

    asking = background.spawn(ask(), name="asking")
    await asyncio.sleep(0)
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking
    assert not task.done()
    release.set()
    answer = await ask()
    assert json.loads(answer.body) == {"success": True}
    await background.aclose()


def test_the_routes_are_declared_and_claim_no_path_of_others() -> None:
    others = {
        (route.method, path) for route in (*ROUTES, *ACCOUNT_ROUTES, *UI_ROUTES) for path in route.paths
    }
    assert not {(route.method, route.path) for route in LOCAL_ROUTES} & others
    assert {route.level for route in LOCAL_ROUTES} == {Level.OWNER}
