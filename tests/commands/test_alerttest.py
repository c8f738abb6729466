"""`codex-proxy alert-test`, as a process of its own, to webhooks that take it and that do not."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from codex_proxy.cli import main
from tests.net.peers import serving, unused_port
from tests.process import run, write_config


async def test_each_webhook_is_tried_and_told_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
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
        assert await asyncio.to_thread(main, ["alert-test", "-config", str(file), "good"]) == 0
    assert [path for path, _ in got] == ["/yes/secret-1"]
    assert capsys.readouterr().out == f"good (generic, {url}): sent\n"


def test_without_webhooks_it_says_what_to_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["alert-test", "-config", str(write_config(tmp_path))]) == 1
    assert "set alert-webhooks in the configuration" in capsys.readouterr().err
    file = write_config(tmp_path, alert_webhooks="['https://hooks.example/x']")
    assert main(["alert-test", "-config", str(file), "other"]) == 1
    assert "no webhook is called 'other'; there is generic-1" in capsys.readouterr().err
