"""`previous_response_id` over plain HTTP, and between HTTP and WebSocket."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from codex_proxy.simulator import Script
from tests.daemon.sockets import line
from tests.harness import LITE, STANDARD, Answer, Stand, standing

TOOLS = [
    {
        "type": "function",
        "name": "lookup",
        "parameters": {"type": "object", "properties": {"q": {"type": "string"}}},
    }
]


@pytest.fixture
async def stand(tmp_path: Path) -> AsyncIterator[Stand]:
    async with standing(tmp_path) as stand:
        yield stand


def final(answer: Answer) -> Any:
    """Return the response object, however it came."""
    assert answer.status == 200, answer.body
    if answer.headers["content-type"].startswith("text/event-stream"):
        event = answer.events[-1]
        assert event.type == "response.completed"
        return event.json["response"]
    return answer.json


def said(stand: Stand) -> list[str]:
    return [
        item["content"][0]["text"] if item["type"] == "message" else item["type"]
        for item in stand.sim.turns[-1].json["input"]
        if item["type"] != "additional_tools"
    ]


@pytest.mark.parametrize("stream", [True, False])
async def test_a_turn_goes_on_from_an_answer(stand: Stand, stream: bool) -> None:
    stand.sim.script("First.", "Second.", "Third.")
    one = final(await stand.ask("one", stream=stream))
    second = await stand.ask("two", stream=stream, previous_response_id=one["id"])
    two = final(second)
    assert two["previous_response_id"] == one["id"]
    if stream:
        created = second.events[0].json["response"]
        assert created["previous_response_id"] == one["id"]
    final(await stand.ask("three", stream=not stream, previous_response_id=two["id"]))
    assert said(stand) == ["one", "First.", "two", "Second.", "three"]
    assert all("previous_response_id" not in turn.json for turn in stand.sim.turns)


async def test_one_answer_may_be_gone_on_from_twice(stand: Stand) -> None:
    stand.sim.script("First.")
    one = final(await stand.ask("one"))
    for word in ("left", "right"):
        final(await stand.ask(word, previous_response_id=one["id"]))
        assert said(stand) == ["one", "First.", word]


async def test_a_tool_loop_sends_only_what_the_tool_said(stand: Stand) -> None:
    stand.sim.script(Script.of(Script.reasoning("**Look**", ""), Script.tool("lookup", {"q": "x"})), "Done.")
    body = {"model": LITE, "tools": TOOLS, "instructions": "Be brief."}
    one = final(await stand.post(body={**body, "input": "find x"}))
    (call,) = [item for item in one["output"] if item["type"] == "function_call"]
    output = {"type": "function_call_output", "call_id": call["call_id"], "output": "42"}
    final(await stand.post(body={**body, "input": [output], "previous_response_id": one["id"]}))
    assert said(stand) == ["Be brief.", "find x", "reasoning", "function_call", "function_call_output"]
    first, second = stand.sim.turns
    assert first.account == second.account


async def test_a_conversation_without_reasoning_stays_on_its_account(stand: Stand) -> None:
    stand.sim.script("First.")
    one = final(await stand.ask("one"))
    served = stand.sim.turns[0].account
    # Another account would be the better choice if nothing held the conversation.
    stand.sim.account(str(served)).use(primary=80)
    await stand.post("/check-quota")
    final(await stand.ask("two", previous_response_id=one["id"]))
    assert stand.tried() == [served, served]


async def test_the_end_of_an_answer_may_be_gone_on_from_at_once(stand: Stand) -> None:
    """Whoever has read the last event need not wait for the end of the body."""
    stand.sim.script("First.")
    async with stand.asking("one") as answer:
        body = b""
        while b"event: response.completed" not in body or not body.endswith(b"\n\n"):
            body += await answer.content.readany()
        one = Answer(200, {"content-type": "text/event-stream"}, body).events[-1].json["response"]
        final(await stand.ask("two", previous_response_id=one["id"]))
    assert said(stand) == ["one", "First.", "two"]


@pytest.mark.parametrize("stream", [True, False])
async def test_what_is_not_remembered_is_a_400_that_clients_know(stand: Stand, stream: bool) -> None:
    answer = await stand.ask("hi", stream=stream, previous_response_id="resp_unknown")
    assert answer.status == 400
    error = answer.json["error"]
    assert (error["code"], error["param"]) == ("previous_response_not_found", "previous_response_id")
    assert error["type"] == "invalid_request_error"
    assert not stand.sim.turns


async def test_an_answer_that_is_not_to_be_stored_is_gone(stand: Stand) -> None:
    one = final(await stand.ask("one", store=False))
    answer = await stand.ask("two", store=False, previous_response_id=one["id"])
    assert (answer.status, answer.json["error"]["code"]) == (400, "previous_response_not_found")


async def test_codex_clients_send_everything_themselves(stand: Stand) -> None:
    one = final(await stand.ask("one", codex=True))
    answer = await stand.ask("two", codex=True, previous_response_id=one["id"])
    assert (answer.status, answer.json["error"]["code"]) == (400, "previous_response_not_found")


@pytest.mark.parametrize("state", ["cut", "failed"])
async def test_an_answer_that_failed_is_not_remembered(stand: Stand, state: str) -> None:
    stand.sim.script(Script.state(state, after=6))
    answer = await stand.ask("one")
    end = answer.events[-1]
    assert end.type == "response.failed"
    again = await stand.ask("two", previous_response_id=end.json["response"]["id"])
    assert again.status == 400


async def test_a_failed_continuation_may_be_tried_again(stand: Stand) -> None:
    stand.sim.script("First.", Script.state("context_length"))
    one = final(await stand.ask("one"))
    assert (await stand.ask("two", stream=False, previous_response_id=one["id"])).status == 400
    final(await stand.ask("two", previous_response_id=one["id"]))
    assert said(stand) == ["one", "First.", "two"]


async def test_a_failover_takes_the_conversation_along(stand: Stand) -> None:
    stand.sim.script(Script.reasoning("**One**", "First."))
    one = final(await stand.ask("one"))
    served = stand.sim.turns[0].account
    stand.sim.account(str(served)).set("usage_limit", resets_in=3600)
    final(await stand.ask("two", previous_response_id=one["id"]))
    assert stand.sim.turns[-1].account != served
    assert said(stand) == ["one", "First.", "two"]


async def test_a_local_output_limit_ends_an_answer_that_can_be_gone_on_from(stand: Stand) -> None:
    stand.sim.script(Script.long_text(200))
    answer = await stand.ask("talk", max_output_tokens=5)
    end = answer.events[-1]
    assert end.type == "response.incomplete"
    final(await stand.ask("on", previous_response_id=end.json["response"]["id"]))
    assert said(stand)[0] == "talk"
    assert said(stand)[-1] == "on"


async def test_a_conversation_that_outgrows_the_limit_is_told_so(tmp_path: Path) -> None:
    async with standing(tmp_path, max_body_bytes="8KiB") as stand:
        one = final(await stand.ask("x" * 5000))
        answer = await stand.ask("y" * 5000, previous_response_id=one["id"])
        assert (answer.status, answer.json["error"]["code"]) == (413, "request_too_large")


async def test_the_path_of_a_wrong_field_is_the_callers_own(stand: Stand) -> None:
    one = final(await stand.ask("one"))
    answer = await stand.post(
        body={
            "model": STANDARD,
            "input": [{"type": "message", "content": 7}],
            "previous_response_id": one["id"],
        }
    )
    assert (answer.status, answer.json["error"]["param"]) == (400, "input.0.content")


async def test_a_caller_reads_no_other_callers_conversation(tmp_path: Path) -> None:
    keys = '[{anna: "the-key-of-anna"}, {bert: "the-key-of-bert"}]'
    async with standing(tmp_path, api_keys=keys) as stand:
        anna, bert = ({"x-api-key": f"the-key-of-{name}"} for name in ("anna", "bert"))
        one = final(await stand.ask("a secret", headers=anna))
        answer = await stand.ask("what?", headers=bert, previous_response_id=one["id"])
        assert (answer.status, answer.json["error"]["code"]) == (400, "previous_response_not_found")
        async with line(stand, headers=bert) as caller:
            frame = await caller.refuse("what?", previous_response_id=one["id"])
            assert frame["error"]["code"] == "previous_response_not_found"
            two = await caller.complete("my own")
            final(await stand.ask("on", headers=bert, previous_response_id=two["id"]))
            answer = await stand.ask("what?", headers=anna, previous_response_id=two["id"])
            assert answer.status == 400
        async with line(stand, headers=anna) as caller:
            frame = await caller.refuse("what?", previous_response_id=two["id"])
            assert frame["error"]["code"] == "previous_response_not_found"
            await caller.complete("on", previous_response_id=one["id"])


async def test_a_conversation_moves_from_a_socket_to_http_and_back(stand: Stand) -> None:
    stand.sim.script("First.", "Second.", "Third.")
    async with line(stand) as caller:
        one = await caller.complete("one")
        two = final(await stand.ask("two", stream=False, previous_response_id=one["id"]))
        assert said(stand) == ["one", "First.", "two"]
        await caller.complete("three", previous_response_id=two["id"])
    assert said(stand) == ["one", "First.", "two", "Second.", "three"]


async def test_an_unstored_answer_of_a_socket_stays_in_its_socket(stand: Stand) -> None:
    async with line(stand) as caller:
        one = await caller.complete("one", store=False)
        assert (await stand.ask("two", previous_response_id=one["id"])).status == 400
        async with line(stand) as other:
            frame = await other.refuse("two", previous_response_id=one["id"])
            assert frame["error"]["code"] == "previous_response_not_found"
        await caller.complete("two", store=False, previous_response_id=one["id"])


async def test_a_stored_prewarm_can_be_gone_on_from_over_http(stand: Stand) -> None:
    async with line(stand) as caller:
        warm = await caller.complete("Remember this.", generate=False)
    final(await stand.ask("hi", previous_response_id=warm["id"]))
    assert said(stand) == ["Remember this.", "hi"]


async def test_many_conversations_at_once_stay_apart(stand: Stand) -> None:
    async def talk(name: str) -> None:
        one = final(await stand.ask(f"I am {name}."))
        final(await stand.ask("Who?", stream=False, previous_response_id=one["id"]))

    names = [f"caller-{number}" for number in range(30)]
    await asyncio.gather(*map(talk, names))
    asked = [
        [item["content"][0]["text"] for item in turn.json["input"] if item.get("role") == "user"]
        for turn in stand.sim.turns
        if len(turn.json["input"]) > 1
    ]
    assert sorted(asked) == sorted([f"I am {name}.", "Who?"] for name in names)
