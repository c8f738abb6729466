"""The real Codex CLI through a forwarder: over a WebSocket, as it prefers, and over HTTP."""

from pathlib import Path

import pytest

from codex_proxy.simulator import Script
from tests.clients import codex_desk
from tests.clients.codex_desk import CALLS, KEY, WITH_KEY, sitting
from tests.forwarder.desk import forwarding, wanted
from tests.harness import LITE

pytestmark = pytest.mark.clients

codex = codex_desk.codex
"""The installed CLI; a fixture is found where its name stands."""


@pytest.mark.parametrize("has_sockets", [True, False])
async def test_a_turn_with_a_command_in_it(codex: Path, tmp_path: Path, has_sockets: bool) -> None:
    config = WITH_KEY.replace(
        "supports_websockets = true", f"supports_websockets = {str(has_sockets).lower()}"
    )
    async with (
        sitting(codex, tmp_path, config, api_keys=[KEY]) as desk,
        forwarding(wanted(desk.tap.url)) as forwarder,
    ):
        file = tmp_path / "home" / "codex" / "config.toml"
        text = file.read_text(encoding="utf-8")
        moved = text.replace(f"{desk.tap.url}/backend-api/codex", f"http://127.0.0.1:{forwarder.port}/u1/v1")
        assert moved != text
        file.write_text(moved, encoding="utf-8")
        desk.sim.script(CALLS[LITE])
        desk.sim.script(Script.reasoning("**Done**", "It said so."))
        ran = await desk.run("run it")
        assert (ran.code, ran.out) == (0, "It said so.\n")
        assert ran.complaints == []
        methods = {head.method for head in desk.tap.heads if head.path == "/v1/responses"}
        assert methods == ({"GET"} if has_sockets else {"POST"})
        assert "marker-42" in str(desk.sim.turns[-1].body)
