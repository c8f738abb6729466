"""`codex-proxy alert-test`, as a process of its own, to webhooks that take it and that do not."""

import json
from pathlib import Path
from typing import Any

from aiohttp import web

from tests.net.peers import serving, unused_port
from tests.process import run, write_config


async def test_each_webhook_is_tried_and_told_of(tmp_path: Path) -> None:
    got: list[tuple[str, Any]] = []

    async def take(request: web.Request) -> web.StreamResponse:
        got.append((request.path, await request.json()))
        return web.Response(status=403 if request.path.startswith("/no") else 200, text="{}")

    async with serving(take) as url:
        port = await unused_port()
        hooks = [
            {"url": f"{url}/yes/secret-1", "name": "good"},
            {"url": f"{url}/no/secret-2", "shape": "slack"},
            {"url": f"http://127.0.0.1:{port}/secret-3", "name": "gone"},
        ]
        file = write_config(tmp_path, alert_webhooks=json.dumps(hooks))
        code, out, err = await run("alert-test", "-config", str(file))
        assert code == 1
        assert out.splitlines() == [
            f"good (generic, {url}): sent",
            f"slack-2 (slack, {url}): not sent: status 403",
            f"gone (generic, http://127.0.0.1:{port}): not sent: connect failed for 127.0.0.1",
        ]
        assert "secret" not in out + err
        assert {path for path, _ in got} == {"/yes/secret-1", "/no/secret-2"}
        body = next(body for path, body in got if path.startswith("/yes"))
        assert body["status"] == "test"
        got.clear()
        code, out, _ = await run("alert-test", "-config", str(file), "good")
    assert (code, len(got)) == (0, 1)
    assert out == f"good (generic, {url}): sent\n"


async def test_without_webhooks_it_says_what_to_do(tmp_path: Path) -> None:
    code, _, err = await run("alert-test", "-config", str(write_config(tmp_path)))
    assert code == 1
    assert "set alert-webhooks in the configuration" in err
    file = write_config(tmp_path, alert_webhooks="['https://hooks.example/x']")
    code, _, err = await run("alert-test", "-config", str(file), "other")
    assert code == 1
    assert "no webhook is called 'other'; there is generic-1" in err
