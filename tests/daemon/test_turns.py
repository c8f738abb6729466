"""A turn from socket to socket: what the caller sees, and what the backend received."""

from pathlib import Path

from codex_proxy.simulator import Script
from tests.harness import LITE, STANDARD, standing


async def test_a_streaming_turn_arrives_whole(tmp_path: Path) -> None:
    async with standing(tmp_path) as stand:
        stand.sim.script(Script.text("hello there"))
        answer = await stand.ask("hi")
        assert answer.status == 200
        assert answer.headers["content-type"].startswith("text/event-stream")
        assert answer.headers["x-accel-buffering"] == "no"
        assert answer.types[0] == "response.created"
        assert answer.types[-1] == "response.completed"
        assert answer.text == "hello there"
        assert answer.events[-1].json["response"]["output"][0]["content"][0]["text"] == "hello there"


async def test_a_plain_turn_is_the_same_answer_collected(tmp_path: Path) -> None:
    async with standing(tmp_path) as stand:
        stand.sim.script(Script.text("hello there"), Script.text("hello there"))
        # As conversations of their own: the second one would find the first in the backend's cache.
        plain = await stand.ask("hi", stream=False, prompt_cache_key="one")
        streamed = await stand.ask("hi", stream=True, prompt_cache_key="two")
        assert plain.status == 200
        assert plain.text == streamed.text == "hello there"
        assert plain.json["status"] == "completed"
        assert plain.json["usage"] == streamed.events[-1].json["response"]["usage"]


async def test_the_proxy_says_who_it_is_and_whose_account_it_uses(tmp_path: Path) -> None:
    async with standing(tmp_path) as stand:
        await stand.ask("hi", headers={"Authorization": "Bearer mine", "chatgpt-account-id": "mine"})
        received = stand.sim.turns[-1]
        assert received.headers["originator"] == "codex_proxy"
        assert received.headers["user-agent"].startswith("codex-proxy/")
        assert received.headers["chatgpt-account-id"] != "mine"
        assert received.headers["authorization"] != "Bearer mine"


async def test_a_lite_model_gets_its_own_wire_shape(tmp_path: Path) -> None:
    async with standing(tmp_path) as stand:
        stand.sim.script(Script.tool("lookup", {"q": 1}))
        tools = [{"type": "function", "name": "lookup", "parameters": {"type": "object", "properties": {}}}]
        answer = await stand.ask("hi", stream=False, model=LITE, tools=tools, instructions="Be brief.")
        assert answer.status == 200
        (call,) = [item for item in answer.json["output"] if item["type"] == "function_call"]
        assert call["name"] == "lookup"
        assert "namespace" not in call
        received = stand.sim.turns[-1]
        assert received.headers["x-openai-internal-codex-responses-lite"] == "true"
        assert received.json["input"][0]["type"] == "additional_tools"
        assert "tools" not in received.json


async def test_an_account_with_a_limit_is_left_before_the_caller_notices(tmp_path: Path) -> None:
    async with standing(tmp_path) as stand:
        stand.accounts[0].set("usage_limit", resets_in=3600)
        stand.accounts[1].set("usage_limit", resets_in=3600)
        for _ in range(3):
            answer = await stand.ask("hi")
            assert answer.status == 200
            assert answer.types[-1] == "response.completed"
        assert [t.account for t in stand.sim.turns].count(stand.accounts[2].name) == 3
        assert STANDARD


async def test_a_conversation_without_a_name_stays_by_its_encrypted_items(tmp_path: Path) -> None:
    async with standing(tmp_path, accounts=6) as stand:
        stand.sim.script(Script.reasoning("thinking", "first answer"))
        first = await stand.ask("hi", stream=False)
        home = stand.sim.turns[-1].account
        history = [{"role": "user", "content": "hi"}, *first.json["output"]]
        for number in range(3):
            history.append({"role": "user", "content": f"and {number}"})
            answer = await stand.post(body={"model": STANDARD, "input": history})
            assert answer.status == 200
            history += answer.json["output"]
        assert [turn.account for turn in stand.sim.turns] == [home] * 4


async def test_compacted_history_goes_to_the_account_that_wrote_it_at_once(tmp_path: Path) -> None:
    async with standing(tmp_path, accounts=6) as stand:
        compact = await stand.post(
            "/v1/responses/compact", {"model": STANDARD, "input": [{"role": "user", "content": "long"}]}
        )
        assert compact.status == 200
        home = stand.sim.requests[-1].account
        for _ in range(3):
            answer = await stand.post(
                body={
                    "model": STANDARD,
                    "input": [*compact.json["output"], {"role": "user", "content": "go on"}],
                }
            )
            assert answer.status == 200
        assert [turn.account for turn in stand.sim.turns] == [home] * 3
