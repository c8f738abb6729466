"""Frames of a socket, read with the OpenAI SDK's own models; its connection needs a package we do not install."""

from pathlib import Path

import pytest
from openai.types.responses.responses_server_event import ResponsesServerEvent
from pydantic import TypeAdapter

from codex_proxy.simulator import Script
from tests.daemon.sockets import line
from tests.harness import standing

pytestmark = pytest.mark.clients

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
