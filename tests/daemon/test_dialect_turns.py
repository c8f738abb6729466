"""What a conversation in a translated dialect means for the accounts: where it lives, what it sends again."""

import json
import logging
import re
from pathlib import Path
from typing import Any

import pytest

from codex_proxy.protocol.wire import JsonObject
from codex_proxy.simulator import Script
from tests.harness import LITE, STANDARD, Stand, standing

CHAT = "/v1/chat/completions"
MESSAGES = "/v1/messages"


def sent(stand: Stand, turn: int = -1) -> JsonObject:
    body: JsonObject = json.loads(stand.sim.turns[turn].body)
    return body


async def say(stand: Stand, path: str, messages: list[Any], **extra: Any) -> Any:
    limit = {"max_tokens": 1000} if path == MESSAGES else {}
    answer = await stand.post(path, {"model": STANDARD, "messages": messages, **limit, **extra})
    assert answer.status == 200, answer.body
    return answer.json


@pytest.mark.parametrize("path", [CHAT, MESSAGES])
async def test_a_conversation_without_a_name_stays_on_its_account(path: str, tmp_path: Path) -> None:
    async with standing(tmp_path, accounts=6) as stand:
        messages: list[Any] = [{"role": "user", "content": "the first words"}]
        for turn in range(5):
            answer = await say(stand, path, messages)
            words = (
                answer["content"][0]["text"]
                if path == MESSAGES
                else answer["choices"][0]["message"]["content"]
            )
            messages += [
                {"role": "assistant", "content": words},
                {"role": "user", "content": f"and more {turn}"},
            ]
        assert len(set(stand.tried())) == 1
        keys = {sent(stand, turn)["prompt_cache_key"] for turn in range(5)}
        assert len(keys) == 1
        (key,) = keys
        assert stand.sim.turns[-1].headers["session-id"] == key
        # Another conversation has another name.
        await say(stand, path, [{"role": "user", "content": "something else"}])
        assert sent(stand)["prompt_cache_key"] != key


@pytest.mark.parametrize("path", [CHAT, MESSAGES])
async def test_equal_questions_do_not_crowd_on_one_account(path: str, tmp_path: Path) -> None:
    async with standing(tmp_path, accounts=3) as stand:
        question = {"role": "user", "content": "the same"}
        for account in stand.accounts:
            stand.in_order_of(account)
            await say(stand, path, [question])
        assert len(set(stand.tried())) == 3
        # Once it goes on, it stays where it was answered last.
        stand.in_order()
        await say(stand, path, [question, {"role": "assistant", "content": "pong"}, question])
        assert stand.tried()[-1] == stand.tried()[-2]


async def test_sessions_and_sub_agents_of_claude_code_are_told_apart(tmp_path: Path) -> None:
    async with standing(tmp_path, accounts=6) as stand:
        body = {"model": "claude-opus-4-8", "max_tokens": 9, "messages": [{"role": "user", "content": "hi"}]}
        keys = []
        for session, agent in (("s-1", None), ("s-1", None), ("s-1", "a-1"), ("s-2", None)):
            headers = {"x-claude-code-session-id": session}
            if agent is not None:
                headers["x-claude-code-agent-id"] = agent
            assert (await stand.post(MESSAGES, body, headers=headers)).status == 200
            keys.append(sent(stand)["prompt_cache_key"])
        assert keys[0] == keys[1]
        assert len(set(keys)) == 3
        assert not any("s-1" in key or "a-1" in key for key in keys)


@pytest.mark.parametrize("model", [STANDARD, LITE])
async def test_a_tool_loop_in_chat_keeps_its_reasoning(model: str, tmp_path: Path) -> None:
    tool = {"type": "function", "function": {"name": "files.look/up", "parameters": {"type": "object"}}}
    async with standing(tmp_path, accounts=4) as stand:
        thinking = Script.reasoning("about it", "")
        stand.sim.script(Script.of(thinking, Script.tool("files_look_up", {"a": 1}, call_id="call_x")))
        messages: list[Any] = [{"role": "user", "content": "look"}]
        answer = await say(stand, CHAT, messages, tools=[tool], model=model)
        message = answer["choices"][0]["message"]
        assert message["tool_calls"][0]["function"] == {"name": "files.look/up", "arguments": '{"a":1}'}
        assert answer["choices"][0]["finish_reason"] == "tool_calls"
        messages += [message, {"role": "tool", "tool_call_id": "call_x", "content": "seen"}]
        answer = await say(stand, CHAT, messages, tools=[tool], model=model)
        assert answer["choices"][0]["message"]["content"] == "The tool said: seen"
        kinds = [item["type"] for item in sent(stand)["input"] if item["type"] != "additional_tools"]
        assert kinds == ["message", "reasoning", "function_call", "function_call_output"]
        (account,) = set(stand.tried())
        assert account is not None


@pytest.mark.parametrize("model", [STANDARD, LITE, "claude-opus-4-8"])
async def test_a_tool_loop_in_messages_keeps_its_thinking(model: str, tmp_path: Path) -> None:
    tools = [{"name": "look", "input_schema": {"type": "object"}}]
    thinking = {"type": "adaptive"}
    async with standing(tmp_path, accounts=4) as stand:
        calls = Script.parallel_tools([("look", {"a": 1}), ("look", {"a": 2})])
        stand.sim.script(Script.of(Script.reasoning("about it", "I look twice."), calls))
        messages: list[Any] = [{"role": "user", "content": "look"}]
        extra = {"tools": tools, "thinking": thinking, "model": model}
        answer = await say(stand, MESSAGES, messages, **extra)
        kinds = [block["type"] for block in answer["content"]]
        assert kinds == ["thinking", "text", "tool_use", "tool_use"]
        assert answer["stop_reason"] == "tool_use"
        picture = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "aGk="}}
        results = [
            {"type": "tool_result", "tool_use_id": block["id"], "content": [picture], "is_error": i == 1}
            for i, block in enumerate(answer["content"][2:])
        ]
        messages += [
            {"role": "assistant", "content": answer["content"]},
            {"role": "user", "content": results},
        ]
        await say(stand, MESSAGES, messages, **extra)
        items = [item for item in sent(stand)["input"] if item["type"] != "additional_tools"]
        assert [item["type"] for item in items] == [
            "message", "reasoning", "message", "function_call", "function_call",
            "function_call_output", "function_call_output",
        ]  # fmt: skip
        assert items[1]["encrypted_content"] == answer["content"][0]["signature"]
        assert items[5]["output"] == [{"type": "input_image", "image_url": "data:image/png;base64,aGk="}]
        assert items[6]["output"][0]["text"].startswith("Error:")
        assert len(set(stand.tried())) == 1


@pytest.mark.parametrize("path", [CHAT, MESSAGES])
@pytest.mark.parametrize("stream", [False, True])
async def test_a_stop_sequence_ends_the_answer_and_the_backends_work(
    path: str, stream: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "codex_proxy")
    async with standing(tmp_path, accounts=1) as stand:
        stand.sim.script(Script.long_text(400, "one two STOP three ", delay=0.02))
        stop = {"stop": ["STOP"]} if path == CHAT else {"stop_sequences": ["STOP"]}
        limit = {"max_tokens": 1000}
        answer = await stand.post(
            path,
            {
                "model": STANDARD,
                "messages": [{"role": "user", "content": "hi"}],
                "stream": stream,
                **stop,
                **limit,
            },
        )
        assert answer.status == 200
        assert b"one two " in answer.body
        assert b"three" not in answer.body
        await stand.idle()
        (turn,) = stand.sim.turns
        await stand.until(turn.closed.is_set)
        assert turn.cancelled
        known = stand.known(stand.accounts[0])
        assert known.state.value == "ready"
    (line,) = [message for message in caplog.messages if message.startswith("turn ")]
    # The backend never got to say what it cost.
    assert "usage=estimate" in line
    assert re.search(r" in=[1-9]\d* .*out=[1-9]", line)
    assert "end=completed" in line


async def test_a_turn_of_a_claude_name_is_answered_under_that_name(tmp_path: Path) -> None:
    async with standing(tmp_path, accounts=1) as stand:
        answer = await say(
            stand, MESSAGES, [{"role": "user", "content": "hi"}], model="claude-haiku-4-5-20251001"
        )
        assert answer["model"] == "claude-haiku-4-5-20251001"
        assert sent(stand)["model"] == "gpt-6-luna"
        assert sent(stand)["reasoning"]["effort"] == "low"


async def test_counting_needs_no_account(tmp_path: Path) -> None:
    async with standing(tmp_path, accounts=0) as stand:
        body = {"model": "claude-opus-4-8", "messages": [{"role": "user", "content": "hello there"}]}
        answer = await stand.post(
            "/v1/messages/count_tokens", body, headers={"anthropic-version": "2023-06-01"}
        )
        assert answer.status == 200
        assert answer.json.keys() == {"input_tokens"}
        assert 2 <= answer.json["input_tokens"] <= 20
        assert not stand.sim.requests


async def test_a_name_that_stands_for_what_nobody_has_is_told_so(tmp_path: Path) -> None:
    async with standing(tmp_path, accounts=1, model_map="{my-model: gpt-9}") as stand:
        body = {"model": "my-model-high", "messages": [{"role": "user", "content": "hi"}]}
        answer = await stand.post(CHAT, body)
        assert answer.status == 400
        assert answer.json["error"]["message"].startswith(
            "'my-model-high' stands for 'gpt-9' here; the model 'gpt-9'"
        )
        answer = await stand.post(CHAT, {**body, "model": "gpt-9-high"})
        assert answer.json["error"]["message"].startswith("the model 'gpt-9'")
