"""The real Codex CLI as a caller over WebSocket, which it prefers: nothing here may fall back to HTTP."""

import asyncio
import json
import re
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from codex_proxy.server import websocket
from codex_proxy.simulator import Script
from codex_proxy.trace import End
from tests.clients import codex_desk
from tests.clients.codex_desk import (
    CALLS,
    KEY,
    PATIENCE,
    VERSION,
    WITH_KEY,
    WITH_LOGIN,
    Desk,
    Ran,
    sitting,
)
from tests.clients.fence import kill
from tests.harness import LITE, STANDARD

pytestmark = pytest.mark.clients

codex = codex_desk.codex
"""The installed CLI; a fixture is found where its name stands."""

# Long enough for a socket that is made impatient to be closed while the command runs.
SLOW = "sleep 3; echo marker-$((40+2))"
SLOW_CALLS: dict[str, Script] = {
    LITE: Script.custom_tool(
        "exec",
        f"const r = await tools.exec_command({{cmd: {SLOW!r}, yield_time_ms: 8000}}); text(JSON.stringify(r));",
    ),
    STANDARD: Script.tool("exec_command", {"cmd": SLOW, "yield_time_ms": 8000}),
}


@pytest.fixture
async def desk(codex: Path, tmp_path: Path) -> AsyncIterator[Desk]:
    async with sitting(codex, tmp_path, WITH_KEY, api_keys=[KEY]) as desk:
        yield desk


def upgrades(desk: Desk) -> int:
    """Return how many sockets the CLI opened, if it did nothing else."""
    assert {(head.method, head.path) for head in desk.tap.heads if head.path.endswith("/responses")} == {
        ("GET", "/backend-api/codex/responses")
    }
    return len(desk.tap.sent("GET", "/responses"))


@pytest.mark.parametrize("model", [LITE, STANDARD])
async def test_a_text_turn_goes_over_one_socket(desk: Desk, model: str) -> None:
    desk.sim.script(Script.reasoning("**Greeting**", "Hello from afar."))
    ran = await desk.run("say hello", model=model)
    assert (ran.code, ran.out) == (0, "Hello from afar.\n")
    assert ran.complaints == []
    assert upgrades(desk) == 1
    # The prewarm was answered here.
    (turn,) = desk.sim.turns
    assert turn.headers["originator"] == "codex_exec"
    assert turn.headers["x-codex-routing-hint"] == f"model={model}"
    assert turn.headers.get("x-openai-internal-codex-responses-lite") == ("true" if model == LITE else None)
    assert turn.json["prompt_cache_key"] == turn.headers["session-id"]
    assert json.loads(turn.headers["x-codex-turn-metadata"])["request_kind"] == "turn"
    assert not any(name.startswith(("ws_", "x-codex-ws-")) for name in turn.json["client_metadata"])
    assert [trace.end for trace in desk.traces] == [End.COMPLETED]
    assert [trace.client for trace in desk.traces] == ["codex"]
    # A socket's turns are numbered.
    assert re.fullmatch(r"req_[0-9a-f]{32}-\d", desk.traces[0].id)


@pytest.mark.parametrize("model", [LITE, STANDARD])
async def test_a_tool_turn_sends_only_what_is_new_and_the_backend_gets_all(desk: Desk, model: str) -> None:
    desk.sim.script(CALLS[model])
    ran = await desk.run("run it", model=model)
    assert ran.code == 0
    assert ran.complaints == []
    assert "marker-42" in ran.out
    assert upgrades(desk) == 1
    first, second = desk.sim.turns
    assert (first.status, second.status) == (200, 200)
    assert second.account == first.account
    sent = first.json["input"]
    assert second.json["input"][: len(sent)] == sent
    *_, call, output = second.json["input"]
    assert output["type"] == f"{call['type']}_output"
    assert "marker-42" in json.dumps(output)
    # The turn stays on its node: the state came down in a frame, and went up as a header.
    assert "x-codex-turn-state" not in first.headers
    assert second.headers["x-codex-turn-state"]
    one, two = desk.traces
    assert two.request_bytes < min(one.request_bytes, len(second.body) * 0.8)


async def test_a_conversation_is_resumed_on_its_account(desk: Desk) -> None:
    desk.sim.script(Script.reasoning("**One**", "First."))
    first = await desk.run("one")
    desk.sim.script(Script.reasoning("**Two**", "Second."))
    second = await desk.run("resume", "--last", "two")
    assert (first.out, second.out) == ("First.\n", "Second.\n")
    assert second.complaints == []
    assert upgrades(desk) == 2
    one, two = desk.sim.turns
    assert one.account == two.account
    assert [item["type"] for item in two.json["input"]].count("reasoning") == 1


async def test_a_full_context_is_compacted_and_the_turn_goes_on(desk: Desk) -> None:
    desk.sim.script(CALLS[LITE])
    ran = await desk.run("-c", "model_auto_compact_token_limit=1000", "run it")
    assert ran.code == 0
    kinds = [[item["type"] for item in turn.json["input"]] for turn in desk.sim.turns]
    assert any(kind[-1] == "compaction_trigger" for kind in kinds)
    assert "compaction" in kinds[-1]
    assert {turn.status for turn in desk.sim.turns} == {200}
    upgrades(desk)


async def test_a_model_with_a_suffix_serves_without_a_word_about_misuse(desk: Desk) -> None:
    # The backend names what it served, in its headers and in its events; here it even rerouted.
    desk.sim.served_model = "gpt-of-another-name"
    desk.sim.script("Served.")
    ran = await desk.run(model=f"{LITE}-high")
    assert (ran.code, ran.out) == (0, "Served.\n")
    assert ran.complaints == []
    upgrades(desk)


@pytest.mark.parametrize("model", [LITE, STANDARD])
async def test_a_login_of_ones_own_uses_the_pool_all_the_same(
    codex: Path, tmp_path: Path, model: str
) -> None:
    async with sitting(codex, tmp_path, WITH_LOGIN, login="person") as owner:
        owner.sim.script(CALLS[model])
        ran = await owner.run("run it", model=model)
        assert ran.code == 0
        assert "marker-42" in ran.out
        assert ran.complaints == []
        person = owner.sim.account("person")
        assert len(owner.sim.turns) == 2
        for turn in owner.sim.turns:
            assert turn.account in {"a1", "a2", "a3"}
            assert person.tokens.access not in turn.headers["authorization"]
            assert turn.headers["chatgpt-account-id"] != person.account_id
            assert turn.headers["version"] == VERSION
        upgrades(owner)


# The socket ends ---------------------------------------------------------------------------


@pytest.mark.parametrize("model", [LITE, STANDARD])
@pytest.mark.parametrize("limit", ["IDLE_SECONDS", "MAX_AGE_SECONDS"])
async def test_a_socket_that_was_closed_is_opened_again_and_everything_sent(
    desk: Desk, monkeypatch: pytest.MonkeyPatch, model: str, limit: str
) -> None:
    desk.sim.script(SLOW_CALLS[model])
    process = await desk.start("run it", model=model)
    # The command runs now; nobody asks anything.
    await desk.stand.until(lambda: len(desk.traces) == 1, PATIENCE)
    monkeypatch.setattr(websocket, "LOOK_SECONDS", 0.05)
    monkeypatch.setattr(websocket, limit, 0.2)
    await desk.stand.until(lambda: len(desk.tap.sent("GET", "/responses")) == 2, PATIENCE)
    monkeypatch.undo()
    out, err = await asyncio.wait_for(process.communicate(), PATIENCE)
    ran = Ran(process.returncode, out.decode(), err.decode())
    assert ran.code == 0
    assert ran.complaints == []
    assert "marker-42" in ran.out
    assert upgrades(desk) == 2
    first, second = desk.sim.turns
    assert second.json["input"][: len(first.json["input"])] == first.json["input"]


# Failures ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("state", "options"),
    [
        ("usage_limit", {"resets_in": 3600}),
        ("overloaded_in_stream", {}),
        ("unauthorized", {}),
        ("cloudflare", {}),
        ("refuse", {}),
    ],
)
async def test_an_accounts_failure_is_not_seen_by_the_cli(
    desk: Desk, state: str, options: dict[str, Any]
) -> None:
    desk.sim.script(Script.state(state, **options), "Nothing happened.")
    ran = await desk.run()
    assert (ran.code, ran.out) == (0, "Nothing happened.\n")
    assert ran.complaints == []
    assert upgrades(desk) == 1
    assert len(desk.sim.turns) == 2


async def test_an_account_that_hits_its_limit_within_a_turn_is_left_unnoticed(desk: Desk) -> None:
    desk.sim.script(CALLS[LITE], Script.state("usage_limit", resets_in=3600))
    ran = await desk.run("run it")
    assert ran.code == 0
    assert "marker-42" in ran.out
    assert ran.complaints == []
    assert [turn.status for turn in desk.sim.turns] == [200, 429, 200]
    assert desk.sim.turns[2].account != desk.sim.turns[1].account
    # The state of the turn was the other account's.
    assert "x-codex-turn-state" not in desk.sim.turns[2].headers
    assert upgrades(desk) == 1


async def test_an_exhausted_pool_is_told_once_with_its_reset(desk: Desk) -> None:
    for account, resets_in in zip(desk.sim.accounts, (7200, 3600, 5400), strict=True):
        account.set("usage_limit", resets_in=resets_in)
    ran = await desk.run()
    assert ran.code == 1
    assert ran.out == ""
    resets = [datetime.fromtimestamp(desk.sim.now() + 3600 + minute, UTC) for minute in (-60, 0, 60)]
    told = [f"Try again at {moment:%I:%M %p}".replace(" at 0", " at ") for moment in resets]
    assert "hit your usage limit" in ran.err
    assert any(words in ran.err for words in told), ran.err
    assert "econnect" not in ran.err
    assert upgrades(desk) == 1
    assert [trace.status for trace in desk.traces] == [429]


async def test_a_passing_shortage_is_waited_for(codex: Path, tmp_path: Path) -> None:
    async with sitting(codex, tmp_path, WITH_KEY, api_keys=[KEY], max_retry=0) as desk:
        desk.sim.script(Script.state("overloaded"), "There was room.")
        ran = await desk.run()
        assert (ran.code, ran.out) == (0, "There was room.\n")
        assert [trace.status for trace in desk.traces] == [429, 200]
        upgrades(desk)


async def test_a_stream_that_breaks_off_is_taken_up_again(desk: Desk) -> None:
    desk.sim.script(Script.state("cut", after=6), "Whole again.")
    ran = await desk.run()
    assert (ran.code, ran.out) == (0, "Whole again.\n")
    upgrades(desk)


async def test_a_context_that_is_too_long_ends_the_turn_at_once(desk: Desk) -> None:
    desk.sim.script(Script.state("context_length"))
    ran = await desk.run()
    assert ran.code == 1
    assert "ran out of room" in ran.err
    assert upgrades(desk) == 1
    assert len(desk.sim.turns) == 1


async def test_a_cli_that_is_killed_frees_its_account(desk: Desk) -> None:
    desk.sim.script(Script.long_text(2000, delay=0.01))
    process = await desk.start("talk")
    await desk.stand.until(lambda: any(turn.status == 200 for turn in desk.sim.turns), PATIENCE)
    await kill(process)
    (turn,) = desk.sim.turns
    await asyncio.wait_for(turn.closed.wait(), 5)
    assert turn.cancelled
    await desk.stand.until(lambda: bool(desk.traces))
    assert desk.traces[0].end is End.CALLER_GONE
