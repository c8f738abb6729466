"""The real Codex CLI and Claude Code through a proxy that has another proxy for an upstream."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from codex_proxy.simulator import Script
from tests.clients import codex_desk, test_claude_code
from tests.clients.codex_desk import CALLS, KEY, WITH_KEY
from tests.harness import LITE, STANDARD, Stand, standing

pytestmark = pytest.mark.clients

codex = codex_desk.codex
claude = test_claude_code.claude

FAR_KEY = "sk-far-key-for-tests"


@contextlib.asynccontextmanager
async def far(folder: Path, *capabilities: str) -> AsyncIterator[tuple[Stand, dict[str, Any]]]:
    """Another proxy, with accounts of its own, and the settings with which it is asked first."""
    await asyncio.to_thread(folder.mkdir)
    async with standing(folder, api_keys=[FAR_KEY]) as stand:
        upstream = {
            "name": "far",
            "base-url": stand.url,
            "api-key": FAR_KEY,
            "priority": -1,
            "capabilities": list(capabilities),
        }
        yield stand, {"upstreams": json.dumps([upstream])}


@pytest.mark.parametrize("model", [LITE, STANDARD])
async def test_codex_runs_a_tool_through_an_upstream(codex: Path, tmp_path: Path, model: str) -> None:
    async with (
        far(tmp_path / "far", "responses") as (there, settings),
        codex_desk.sitting(
            codex, tmp_path, WITH_KEY, api_keys=[KEY], enable_websocket=False, **settings
        ) as desk,
    ):
        there.sim.script(CALLS[model])
        ran = await desk.run("run it", model=model)
        assert (ran.code, ran.complaints) == (0, [])
        assert ran.out.startswith("The tool said: ")
        assert "marker-42" in ran.out
        assert desk.sim.turns == []
        first, second = there.sim.turns
        assert second.account == first.account


@pytest.mark.parametrize("capability", ["messages", "responses"])
async def test_claude_code_is_answered_by_an_upstream(claude: Path, tmp_path: Path, capability: str) -> None:
    """As it speaks itself, and translated."""
    async with (
        far(tmp_path / "far", capability) as (there, settings),
        test_claude_code.sitting(claude, tmp_path, **settings) as desk,
    ):
        there.sim.script(Script.reasoning("**Greeting**", "Hello from afar."))
        ran = await desk.run("say hello")
        assert ran.is_well, ran.err
        assert ran.result == "Hello from afar."
        assert desk.sim.turns == []
        assert len(there.sim.turns) == 1
