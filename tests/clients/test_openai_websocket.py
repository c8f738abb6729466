"""The OpenAI SDK's own connection to a socket, and every frame read with its models."""

from pathlib import Path
from typing import Any

import orjson
import pytest
from openai import AsyncOpenAI
from openai.types.responses.responses_server_event import ResponsesServerEvent
from pydantic import TypeAdapter

from codex_proxy.simulator import Script
from tests.daemon.sockets import line
from tests.harness import standing

EVENT: TypeAdapter[ResponsesServerEvent] = TypeAdapter(ResponsesServerEvent)
"""Strict where the SDK itself is lenient: a frame that fits no model fails."""

TOOLS = [
    {
        "type": "function",
        "name": "lookup",
        "strict": False,
        "parameters": {"type": "object", "properties": {}},
    }
]


@pytest.mark.parametrize("lane", [None, "main"])
async def test_every_frame_fits_the_sdks_models(tmp_path: Path, lane: str | None) -> None:
    named = {"stream_id": lane} if lane is not None else {}
    async with standing(tmp_path) as stand, line(stand) as caller:
        stand.sim.script(
            Script.of(Script.reasoning("**Look**", "Looking."), Script.tool("lookup", {})),
            Script.web_search(),
            Script.incomplete(),
            Script.state("cut", after=6),
        )
        frames = await caller.ask("hi", tools=TOOLS, **named)
        for words in ("search", "stop", "fail"):
            frames += await caller.ask(words, **named)
        frames += await caller.ask("hi", previous_response_id="resp_none", **named)
        frames += await caller.ask("hi", generate=False, **named)
    kinds = {frame["type"] for frame in frames}
    assert {f"response.{end}" for end in ("completed", "incomplete", "failed")} | {"error"} <= kinds
    for frame in frames:
        event = EVENT.validate_python(frame)
        assert (event.type, event.stream_id) == (frame["type"], lane)


async def test_the_sdks_connection_asks_goes_on_and_is_told_of_trouble(tmp_path: Path) -> None:
    async with standing(tmp_path) as stand:
        stand.sim.script(Script.tool("lookup", {}, call_id="call_1"), Script.text("seen and done"))
        client = AsyncOpenAI(base_url=f"{stand.url}/v1", api_key="any", max_retries=0)
        async with client, client.responses.connect(max_retries=0) as connection:
            ended: list[Any] = []

            async def answer() -> Any:
                event: Any
                async for event in connection:
                    assert event.type != "error", event
                    if event.type == "response.completed":
                        return event
                raise AssertionError("the connection ended without an answer")

            await connection.response.create(model="gpt-5.5", input="look", tools=TOOLS)  # type: ignore[arg-type] # a plain dict will do
            ended.append(await answer())
            (call,) = ended[0].response.output
            assert call.type == "function_call"
            await connection.response.create(
                model="gpt-5.5",
                previous_response_id=ended[0].response.id,
                input=[{"type": "function_call_output", "call_id": call.call_id, "output": "seen"}],
            )
            ended.append(await answer())
            assert ended[1].response.output_text == "seen and done"
            assert ended[1].response.previous_response_id == ended[0].response.id
            kinds = [item["type"] for item in orjson.loads(stand.sim.turns[-1].body)["input"]]
            assert kinds == ["message", "function_call", "function_call_output"]
            # What is not known is an event with a code, and the connection goes on.
            await connection.response.create(model="gpt-5.5", previous_response_id="resp_none", input="x")
            told: Any = await connection.recv()
            assert (told.type, told.error.code) == ("error", "previous_response_not_found")
            await connection.response.create(model="gpt-5.5", input="and on")
            assert (await answer()).response.output_text == "pong: and on"
