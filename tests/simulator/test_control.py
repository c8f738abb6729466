"""The control endpoint and the command line."""

import argparse
import asyncio
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import aiohttp
import pytest

from codex_proxy.protocol.wire import loads
from codex_proxy.simulator import Script
from codex_proxy.simulator.cli import add_arguments, run
from codex_proxy.simulator.faults import STATES
from codex_proxy.simulator.reply import WORDS
from codex_proxy.simulator.script import KINDS

if TYPE_CHECKING:
    from tests.simulator.conftest import Caller

DOCS = Path(__file__).parents[2] / "docs" / "simulator.md"


async def test_a_state_is_set_and_shown(caller: "Caller") -> None:
    answer = await caller.control("/accounts/a1", {"state": "usage_limit", "resets_in": 60, "times": 1})
    assert (answer.json["state"], answer.json["times"]) == ("usage_limit", 1)
    assert (await caller.turn()).status == 429
    shown = (await caller.control("/accounts")).json["accounts"]
    assert [(a["name"], a["state"]) for a in shown] == [("a1", "ok"), ("a2", "ok")]


async def test_windows_models_and_actions_are_set(caller: "Caller") -> None:
    await caller.control("/accounts/a1", {"primary": 97, "models": ["gpt-6-sol"]})
    assert (await caller.turn()).status == 400
    shown = (await caller.control("/accounts/a1")).json
    assert (shown["used_percent"]["primary"], shown["models"]) == (97.0, ["gpt-6-sol"])
    await caller.control("/accounts/a2", {"action": "expire_access"})
    assert (await caller.turn(account="a2")).status == 401
    added = await caller.control("/accounts", {"name": "new", "plan": "free"})
    assert added.json["plan"] == "free"
    assert (await caller.turn(account="new")).status == 200


async def test_scripts_are_queued(caller: "Caller") -> None:
    await caller.control("/script", {"kind": "tool", "name": "f", "arguments": {"a": 1}, "account": "a2"})
    await caller.control("/script", ["said", {"kind": "tool", "name": "g"}])
    assert (await caller.turn(account="a2")).items[0]["name"] == "f"
    assert [item["type"] for item in (await caller.turn()).items] == ["message", "function_call"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_script_has_a_json_form(kind: str) -> None:
    needed: dict[str, dict[str, Any]] = {
        "parallel_tools": {"calls": [["f", {}]]},
        "raw": {"events": [{"type": "x"}]},
        "recorded": {"stream": "data: {}\n\n"},
        "state": {"state": "cut", "after": 1},
    }
    built = Script.from_json({"kind": kind, **needed.get(kind, {})})
    assert built.parts or built.fault or kind == "nothing"


async def test_what_was_received_is_shown_without_secrets(caller: "Caller") -> None:
    await caller.turn("first")
    await caller.turn("second", account="a2")
    await caller.refresh(caller.sim.account("a1").tokens.refresh)
    answer = await caller.control("/requests?account=a2&limit=1")
    shown = answer.json["requests"][0]
    assert (shown["path"], shown["account"], shown["status"]) == ("/backend-api/codex/responses", "a2", 200)
    assert shown["body"]["input"] == [{"role": "user", "content": "second"}]
    everything = (await caller.control("/requests")).body.decode()
    assert "Bearer" not in everything
    assert "rt_" not in everything


async def test_the_clock_moves_and_reset_forgets(caller: "Caller") -> None:
    before = caller.sim.now()
    assert (await caller.control("/advance", {"seconds": 3600})).json["now"] >= before + 3600
    caller.sim.account("a1").set("overloaded")
    await caller.turn()
    await caller.control("/reset", {})
    assert (caller.sim.requests, caller.sim.account("a1").state) == ([], "ok")


async def test_settings_are_changed(caller: "Caller") -> None:
    await caller.control("/settings", {"wire": "any", "full_output": True})
    assert (caller.sim.wire, caller.sim.full_output) == ("any", True)
    assert (await caller.control("/settings")).json["latency"] == 0


WRONG: list[tuple[str, Any, int, str]] = [
    ("/accounts/a1", {"state": "tired"}, 400, "unknown state"),
    ("/accounts/a1", {"state": "cut", "colour": 1}, 400, "no option colour"),
    ("/accounts/a1", {"status": "cut"}, 400, "unknown field status"),
    ("/accounts/a1", {"action": "sing"}, 400, "unknown action"),
    ("/accounts/zz", {"state": "ok"}, 404, "zz"),
    ("/script", {"kind": "song"}, 400, "unknown script kind"),
    ("/script", {"kind": "text", "txt": "x"}, 400, "txt"),
    ("/script", 5, 400, "a script is"),
    ("/settings", {"port": 1}, 400, "unknown setting"),
    ("/advance", {}, 404, "seconds"),
    ("/sing", {}, 404, "sing"),
]


@pytest.mark.parametrize(("path", "body", "status", "words"), WRONG)
async def test_what_is_asked_wrongly_is_explained(
    caller: "Caller", path: str, body: Any, status: int, words: str
) -> None:
    answer = await caller.control(path, body)
    assert answer.status == status
    assert words in answer.json["error"]


async def test_control_is_not_a_request_of_the_backend(caller: "Caller") -> None:
    assert (await caller.control("")).body.startswith(b"The Codex backend, simulated.")
    assert caller.sim.requests == []


def test_the_page_names_every_state_script_and_word() -> None:
    page = DOCS.read_text(encoding="utf-8")
    missing = [name for name in (*STATES, *KINDS) if f"`{name}`" not in page]
    missing += [word for word in WORDS if f"sim:{word}" not in page]
    assert missing == []


async def test_the_command_serves_and_ends_on_a_signal(tmp_path: Path) -> None:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "codex_proxy.simulator",
        "--port=0",
        "--accounts=2",
        f"--auth-dir={tmp_path}",
        stdout=asyncio.subprocess.PIPE,
        cwd=DOCS.parents[1],
        env={**os.environ, "PYTHONWARNINGS": "error", "PYTHONUNBUFFERED": "1"},
    )
    assert process.stdout is not None
    first = (await process.stdout.readline()).decode()
    url = next(word for word in first.split() if word.startswith("http://"))
    token = loads((tmp_path / "simulated-a2.json").read_bytes())
    headers = {"authorization": f"Bearer {token['access_token']}", "chatgpt-account-id": token["account_id"]}
    async with (
        aiohttp.ClientSession() as session,
        session.get(f"{url}/backend-api/wham/usage", headers=headers) as response,
    ):
        assert (await response.json())["email"] == "a2@example.com"
    process.send_signal(signal.SIGTERM)
    rest = (await process.stdout.read()).decode()
    assert await process.wait() == 0
    assert f"base-url: {url}/backend-api/codex" in rest
    assert f"oauth-issuer: {url}" in rest


async def test_a_port_in_use_is_said_in_one_line(
    caller: "Caller", capsys: pytest.CaptureFixture[str]
) -> None:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    args = parser.parse_args([f"--port={caller.sim.port}"])
    assert await asyncio.to_thread(run, args) == 1
    assert f"cannot listen on 127.0.0.1:{caller.sim.port}" in capsys.readouterr().err
