"""A caller on a WebSocket, for tests of behaviour."""

import contextlib
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import orjson

from tests.harness import CODEX_HEADERS, LITE, STANDARD, Stand

Frame = dict[str, Any]

TERMINAL = {"response.completed", "response.failed", "response.incomplete", "error"}

UPGRADE = {
    **{name: value for name, value in CODEX_HEADERS.items() if name != "Accept"},
    "openai-beta": "responses_websockets=2026-02-06",
    "session-id": "session-1",
    "thread-id": "session-1",
    "x-client-request-id": "session-1",
    "x-codex-window-id": "session-1:0",
    "x-codex-beta-features": "remote_compaction_v2",
    "x-codex-turn-metadata": '{"turn_id":"","request_kind":"prewarm"}',
}
"""The head of an upgrade, as the Codex CLI sends it."""

LITE_FLAG = "ws_request_header_x_openai_internal_codex_responses_lite"


class Line:
    """One socket, seen from the caller."""

    def __init__(self, ws: aiohttp.ClientWebSocketResponse) -> None:
        self.ws = ws

    async def create(self, say: str | None = None, /, **fields: Any) -> None:
        """Send a `response.create`; *say* becomes a user's message."""
        if say is not None:
            fields["input"] = [message(say)]
        await self.ws.send_str(
            orjson.dumps({"type": "response.create", "model": STANDARD, **fields}).decode()
        )

    async def frame(self) -> Frame:
        """Return the next frame."""
        message = await self.ws.receive(10)
        assert message.type is aiohttp.WSMsgType.TEXT, message
        assert isinstance(message.data, str)
        value: Frame = orjson.loads(message.data)
        return value

    async def frames(self) -> list[Frame]:
        """Return the frames of one answer, its end included."""
        found = [await self.frame()]
        while found[-1]["type"] not in TERMINAL:
            found.append(await self.frame())
        return found

    async def ask(self, say: str | None = None, /, **fields: Any) -> list[Frame]:
        """Send a `response.create` and return the frames of its answer."""
        await self.create(say, **fields)
        return await self.frames()

    async def complete(self, say: str | None = None, /, **fields: Any) -> Frame:
        """Ask, and return the final response object of an answer that has to end well."""
        end = (await self.ask(say, **fields))[-1]
        assert end["type"] == "response.completed", end
        response: Frame = end["response"]
        return response

    async def refuse(self, say: str | None = None, /, **fields: Any) -> Frame:
        """Ask, and return the one error frame that has to come."""
        (frame,) = await self.ask(say, **fields)
        assert frame["type"] == "error"
        return frame

    async def closed(self) -> int | None:
        """Wait until the other side closes, with nothing more to say; return the code."""
        message = await self.ws.receive(10)
        assert message.type in (aiohttp.WSMsgType.CLOSE, aiohttp.WSMsgType.CLOSED), message
        return self.ws.close_code


@contextlib.asynccontextmanager
async def line(
    stand: Stand,
    path: str = "/v1/responses",
    *,
    codex: bool = False,
    headers: dict[str, str] | None = None,
    **options: Any,
) -> AsyncIterator[Line]:
    """Open a socket; `codex` opens it as the Codex CLI does."""
    async with stand.session.ws_connect(
        path, headers={**(UPGRADE if codex else {}), **(headers or {})}, **options
    ) as ws:
        yield Line(ws)


def message(text: str) -> Frame:
    """Return a user's message."""
    return {"type": "message", "role": "user", "content": [{"type": "input_text", "text": text}]}


def codex_fields(model: str = LITE, **metadata: str) -> Frame:
    """Return what the Codex CLI says in each frame beside the input."""
    lite = {LITE_FLAG: "true"} if model == LITE else {}
    return {
        "model": model,
        "stream": True,
        "tool_choice": "auto",
        "parallel_tool_calls": False,
        "reasoning": {"effort": "low", **({"context": "all_turns"} if model == LITE else {})},
        "store": False,
        "include": ["reasoning.encrypted_content"],
        "prompt_cache_key": "session-1",
        "text": {"verbosity": "low"},
        "client_metadata": {
            "x-codex-installation-id": "installation-1",
            "session_id": "session-1",
            "thread_id": "session-1",
            "x-codex-window-id": "session-1:0",
            "x-codex-turn-metadata": '{"turn_id":"turn-1","request_kind":"turn"}',
            "x-codex-ws-stream-request-start-ms": "1795220354496",
            **lite,
            **metadata,
        },
    }


def text_of(frames: list[Frame]) -> str:
    """Return the visible text of an answer."""
    return "".join(frame["delta"] for frame in frames if frame["type"] == "response.output_text.delta")


def types_of(frames: list[Frame]) -> list[str]:
    """Return the types of frames, in order."""
    return [frame["type"] for frame in frames]
