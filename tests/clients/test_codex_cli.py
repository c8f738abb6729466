"""The real Codex CLI as a caller over HTTP, in both ways in which people put the proxy under it.

With a key: the CLI knows the proxy as a provider. With a login: the CLI has an account of its own,
asks its workspaces and models, and compresses what it sends. Nothing leaves this machine: all
that is not loopback would go through a proxy that only notes who asked.
"""

import asyncio
import base64
import json
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from codex_proxy.simulator import Script
from codex_proxy.trace import End
from tests.clients import codex_desk
from tests.clients.codex_desk import CALLS, KEY, PATIENCE, VERSION, WITH_KEY, WITH_LOGIN, Desk, sitting
from tests.clients.fence import kill
from tests.harness import LITE, STANDARD

pytestmark = pytest.mark.clients

codex = codex_desk.codex
"""The installed CLI; a fixture is found where its name stands."""

# The CLI prefers a WebSocket; test_codex_cli_websocket.py has the rest.
OVER_HTTP: dict[str, Any] = {"enable_websocket": False}


@pytest.fixture
async def desk(codex: Path, tmp_path: Path) -> AsyncIterator[Desk]:
    async with sitting(codex, tmp_path, WITH_KEY, api_keys=[KEY], **OVER_HTTP) as desk:
        yield desk


# Turns -------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", [LITE, STANDARD])
async def test_a_text_turn_is_printed_after_one_refused_upgrade(desk: Desk, model: str) -> None:
    desk.sim.script(Script.reasoning("**Greeting**", "Hello from afar."))
    ran = await desk.run("say hello", model=model)
    assert (ran.code, ran.out) == (0, "Hello from afar.\n")
    assert ran.complaints == []
    # One look at the WebSocket, and never again.
    assert [(head.method, head.path) for head in desk.tap.heads] == [
        ("GET", "/backend-api/codex/responses"),
        ("POST", "/backend-api/codex/responses"),
    ]
    (turn,) = desk.sim.turns
    assert KEY not in turn.headers["authorization"]
    assert turn.headers["originator"] == "codex_exec"
    assert turn.headers["user-agent"].startswith(f"codex_exec/{VERSION}")
    assert turn.headers["x-codex-routing-hint"] == f"model={model}"
    assert turn.headers.get("x-openai-internal-codex-responses-lite") == ("true" if model == LITE else None)
    assert turn.headers["chatgpt-account-id"] == desk.sim.account(str(turn.account)).account_id
    assert turn.json["prompt_cache_key"] == turn.headers["session-id"]
    assert [trace.end for trace in desk.traces] == [End.COMPLETED]


@pytest.mark.parametrize("model", [LITE, STANDARD])
async def test_a_tool_turn_runs_the_command_and_brings_its_output_back(desk: Desk, model: str) -> None:
    desk.sim.script(CALLS[model])
    ran = await desk.run("run it", model=model)
    assert ran.code == 0
    assert ran.complaints == []
    # The simulator speaks of what the tool said.
    assert ran.out.startswith("The tool said: ")
    assert "marker-42" in ran.out
    first, second = desk.sim.turns
    assert (first.status, second.status) == (200, 200)
    assert second.account == first.account
    *_, call, output = second.json["input"]
    assert output["type"] == f"{call['type']}_output"
    assert output["call_id"] == call["call_id"]
    assert "marker-42" in json.dumps(output)
    # The turn stays on its node: the state came down wrapped, and goes up as the backend gave it.
    assert "x-codex-turn-state" not in first.headers
    wrapped = [head.headers.get("x-codex-turn-state") for head in desk.tap.sent("POST", "/responses")]
    assert wrapped[0] is None
    assert wrapped[1] is not None
    assert wrapped[1].endswith(second.headers["x-codex-turn-state"])
    assert wrapped[1] != second.headers["x-codex-turn-state"]


async def test_a_conversation_is_resumed_on_its_account(desk: Desk) -> None:
    desk.sim.script(Script.reasoning("**One**", "First."))
    first = await desk.run("one")
    desk.sim.script(Script.reasoning("**Two**", "Second."))
    # Another account would be the better choice if nothing held the conversation.
    desk.sim.account(str(desk.sim.turns[0].account)).use(primary=80)
    await desk.stand.post("/check-quota", headers={"Authorization": f"Bearer {KEY}"})
    second = await desk.run("resume", "--last", "two")
    assert (first.out, second.out) == ("First.\n", "Second.\n")
    assert second.complaints == []
    one, two = desk.sim.turns
    assert one.account == two.account
    assert [item["type"] for item in two.json["input"]].count("reasoning") == 1


async def test_a_full_context_is_compacted_and_the_turn_goes_on(desk: Desk) -> None:
    desk.sim.script(CALLS[LITE])
    ran = await desk.run("-c", "model_auto_compact_token_limit=1000", "run it")
    assert ran.code == 0
    assert desk.sim.turns[-1].status == 200
    kinds = [[item["type"] for item in turn.json["input"]] for turn in desk.sim.turns]
    assert any(kind[-1] == "compaction_trigger" for kind in kinds)
    assert "compaction" in kinds[-1]
    assert {turn.status for turn in desk.sim.turns} == {200}


async def test_tier_effort_schema_and_picture_arrive_as_the_cli_means_them(desk: Desk) -> None:
    schema = {
        "type": "object",
        "properties": {"city": {"type": "string"}},
        "required": ["city"],
        "additionalProperties": False,
    }
    (desk.home / "schema.json").write_text(json.dumps(schema), encoding="utf-8")
    (desk.home / "pixel.png").write_bytes(base64.b64decode(PIXEL))
    ran = await desk.run(
        *("-c", 'service_tier="fast"', "-c", 'model_reasoning_effort="ultra"'),
        *("--output-schema", "schema.json"),
        *("-i", "pixel.png", "--", "where is this?"),
    )
    assert ran.code == 0
    assert ran.complaints == []
    assert json.loads(ran.out) == {"city": "simulated"}
    turn = desk.sim.turns[-1]
    assert turn.json["service_tier"] == "priority"
    assert turn.json["reasoning"]["effort"] == "xhigh"
    assert turn.json["text"]["format"]["schema"] == schema
    assert turn.headers["x-codex-routing-hint"] == f"model={LITE};tier=priority"
    pictures = [
        part["image_url"]
        for item in turn.json["input"]
        for part in item.get("content") or ()
        if part["type"] == "input_image"
    ]
    assert len(pictures) == 1
    assert pictures[0].startswith("data:image/png;base64,")


PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="


@pytest.mark.parametrize(
    ("name", "model", "effort", "tier"),
    [
        (f"{LITE}-high", LITE, "high", None),
        (f"{STANDARD}-xhigh-fast", STANDARD, "xhigh", "priority"),
        ("gpt-6-luna-fast", "gpt-6-luna", None, "priority"),
    ],
)
async def test_a_model_with_a_suffix_serves_without_a_word_about_misuse(
    desk: Desk, name: str, model: str, effort: str | None, tier: str | None
) -> None:
    # The backend names what it served, in its headers and in its events; here it even rerouted.
    desk.sim.served_model = "gpt-of-another-name"
    desk.sim.script("Served.")
    ran = await desk.run(model=name)
    assert (ran.code, ran.out) == (0, "Served.\n")
    assert ran.complaints == []
    (turn,) = desk.sim.turns
    assert turn.json["model"] == model
    if effort is not None:
        assert turn.json["reasoning"]["effort"] == effort
    assert turn.json.get("service_tier") == tier


# Failures ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("state", "options"),
    [
        ("usage_limit", {"resets_in": 3600}),
        ("rate_limit", {"retry_after": 30}),
        ("overloaded", {}),
        ("overloaded_in_stream", {}),
        ("failed", {"code": "server_error"}),
        ("server_error", {"status": 502}),
        ("unauthorized", {}),
        ("payment", {}),
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
    assert len(desk.tap.sent("POST", "/responses")) == 1
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
    assert len(desk.tap.sent("POST", "/responses")) == 1
    assert [trace.status for trace in desk.traces] == [429]


async def test_a_late_overload_is_retried_politely_and_succeeds(desk: Desk) -> None:
    desk.sim.script(Script.state("overloaded_in_stream", after=3), "After a moment.")
    ran = await desk.run()
    assert (ran.code, ran.out) == (0, "After a moment.\n")
    assert not any("capacity" in line for line in ran.complaints)
    assert len(desk.tap.sent("POST", "/responses")) == 2
    first, second = desk.traces
    # It waited as long as it was told to.
    assert second.started - (first.finished or 0.0) > 0.9


async def test_a_stream_that_breaks_off_is_taken_up_again(desk: Desk) -> None:
    desk.sim.script(Script.state("cut", after=6), "Whole again.")
    ran = await desk.run()
    assert (ran.code, ran.out) == (0, "Whole again.\n")
    assert len(desk.tap.sent("POST", "/responses")) == 2


async def test_a_passing_shortage_is_waited_for(codex: Path, tmp_path: Path) -> None:
    async with sitting(codex, tmp_path, WITH_KEY, api_keys=[KEY], max_retry=0, **OVER_HTTP) as desk:
        desk.sim.script(Script.state("overloaded"), "There was room.")
        ran = await desk.run()
        assert (ran.code, ran.out) == (0, "There was room.\n")
        assert [trace.status for trace in desk.traces] == [429, 200]


async def test_a_context_that_is_too_long_ends_the_turn_at_once(desk: Desk) -> None:
    desk.sim.script(Script.state("context_length"))
    ran = await desk.run()
    assert ran.code == 1
    assert "ran out of room" in ran.err
    assert len(desk.tap.sent("POST", "/responses")) == 1
    assert len(desk.sim.turns) == 1


async def test_a_wrong_key_is_said_to_be_one_and_not_shown(desk: Desk) -> None:
    desk.environment["POOL_KEY"] = "another-key"
    # Left alone, the CLI tries a 401 five times more.
    ran = await desk.run("-c", "model_providers.pool.stream_max_retries=0", "say hello")
    assert ran.code == 1
    assert "401 Unauthorized" in ran.err
    assert "api-keys" in ran.err
    assert "another-key" not in ran.err
    assert KEY not in ran.err
    assert desk.sim.turns == []


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


# With a login of one's own -----------------------------------------------------------------


@pytest.fixture
async def owner(codex: Path, tmp_path: Path) -> AsyncIterator[Desk]:
    async with sitting(codex, tmp_path, WITH_LOGIN, login="person", **OVER_HTTP) as desk:
        yield desk


@pytest.mark.parametrize("model", [LITE, STANDARD])
async def test_a_login_of_ones_own_uses_the_pool_all_the_same(owner: Desk, model: str) -> None:
    owner.sim.script(CALLS[model])
    ran = await owner.run("run it", model=model)
    assert ran.code == 0
    assert "marker-42" in ran.out
    assert ran.complaints == []
    person = owner.sim.account("person")
    for turn in owner.sim.turns:
        assert turn.account in {"a1", "a2", "a3"}
        assert turn.status == 200
        assert person.tokens.access not in turn.headers["authorization"]
        assert turn.headers["chatgpt-account-id"] != person.account_id
        assert turn.headers["version"] == VERSION
    sent = owner.tap.sent("POST", "/responses")
    assert [head.headers["content-encoding"] for head in sent] == ["zstd", "zstd"]
    assert [head.headers["authorization"] for head in sent] == [f"Bearer {person.tokens.access}"] * 2
    # What it asked of the backend itself went to the backend, as the person.
    others = {(r.path.removeprefix("/backend-api"), r.account) for r in owner.sim.requests} - {
        (turn.path.removeprefix("/backend-api"), turn.account) for turn in owner.sim.turns
    }
    assert ("/wham/accounts/check", "person") in others
    assert not any(account in {"a1", "a2", "a3"} for _, account in others)


async def test_the_list_of_models_is_taken_whole_and_asked_for_no_more_than_needed(owner: Desk) -> None:
    await owner.run()
    asked = len(owner.tap.sent("GET", "/models"))
    assert 1 <= asked <= 2
    kept = json.loads((owner.home / "codex" / "models_cache.json").read_text(encoding="utf-8"))
    listed = (await owner.stand.get(f"/backend-api/codex/models?client_version={VERSION}")).json["models"]
    assert [model["slug"] for model in kept["models"]] == [model["slug"] for model in listed]
    assert len(listed) > 5
    # An etag that moves would make it ask again and again.
    again = await owner.run()
    assert again.complaints == []
    assert len(owner.tap.sent("GET", "/models")) <= asked + 1
