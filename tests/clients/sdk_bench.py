"""A standing proxy and SDK clients of it, for the tests that are callers with an SDK."""

import contextlib
from collections.abc import AsyncIterator, Iterator
from typing import Any, TypeVar

import anthropic
import httpx2
import openai
import orjson
from pydantic import BaseModel

from codex_proxy.simulator.checks import unseal
from codex_proxy.simulator.exchange import Received
from codex_proxy.trace import Trace
from tests.harness import Answer, Stand

T = TypeVar("T")

KEY = "the-key-of-the-caller"

LOOSE: dict[str, Any] = {"_strict_response_validation": False}
"""As clients are unless told otherwise: what they do not know, they take as it is."""

PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
PIXEL_URL = f"data:image/png;base64,{PIXEL}"
PDF = "JVBERi0xLjQKJSVFT0YK"


class Weather(BaseModel):
    """What a structured answer is held to."""

    city: str
    degrees: int
    is_raining: bool


WEATHER = '{"city":"Oslo","degrees":3,"is_raining":true}'


class SdkBench:
    """A standing proxy, and SDK clients of it that check whole answers against their types.

    A client that is not asynchronous blocks, so it belongs in a thread.
    """

    def __init__(self, stand: Stand, opened: contextlib.AsyncExitStack) -> None:
        self.stand = stand
        self.sim = stand.sim
        self._opened = opened
        self.sent: list[str] = []
        """What the SDKs sent, retries included: methods and paths."""
        self.traces: list[Trace] = []
        """The turns that came of it."""
        stand.daemon.executor.listen(self.traces.append)

    def sync_openai(self, base: str = "/v1", **options: Any) -> openai.OpenAI:
        http = openai.DefaultHttpxClient(event_hooks={"request": [self._note]})
        client = openai.OpenAI(**self._options(base, options), http_client=http)
        self._opened.callback(client.close)
        return client

    def aio_openai(self, base: str = "/v1", **options: Any) -> openai.AsyncOpenAI:
        http = openai.DefaultAsyncHttpxClient(event_hooks={"request": [self._note_soon]})
        client = openai.AsyncOpenAI(**self._options(base, options), http_client=http)
        self._opened.push_async_callback(client.close)
        return client

    def sync_anthropic(self, base: str = "", **options: Any) -> anthropic.Anthropic:
        http = anthropic.DefaultHttpxClient(event_hooks={"request": [self._note]})
        client = anthropic.Anthropic(**self._options(base, options), http_client=http)
        self._opened.callback(client.close)
        return client

    def aio_anthropic(self, base: str = "", **options: Any) -> anthropic.AsyncAnthropic:
        http = anthropic.DefaultAsyncHttpxClient(event_hooks={"request": [self._note_soon]})
        client = anthropic.AsyncAnthropic(**self._options(base, options), http_client=http)
        self._opened.push_async_callback(client.close)
        return client

    def _options(self, base: str, options: dict[str, Any]) -> dict[str, Any]:
        common = {"api_key": KEY, "max_retries": 0, "_strict_response_validation": True}
        return {"base_url": self.stand.url + base, **common, **options}

    def _note(self, request: httpx2.Request) -> None:
        self.sent.append(f"{request.method} {request.url.path}")

    async def _note_soon(self, request: httpx2.Request) -> None:
        self._note(request)

    async def post(self, path: str, body: dict[str, Any], **headers: str) -> Answer:
        """Ask without an SDK, to see the bytes."""
        return await self.stand.post(path, body, headers={"Authorization": f"Bearer {KEY}", **headers})

    @property
    def last(self) -> Any:
        """The body that the backend received last."""
        return self.sim.turns[-1].json


async def read(stream: AsyncIterator[T], seen: list[T]) -> None:
    """Read *stream* to its end, good or bad, and keep what came in *seen*."""
    async for one in stream:
        seen.append(one)  # noqa: PERF401 -- what came before an error counts


def datas(answer: Answer) -> list[bytes]:
    """Return the data of every frame of a stream, and see that each is one line."""
    frames = answer.body.decode().split("\n\n")
    assert frames.pop() == ""
    return [
        line.removeprefix("data: ").encode()
        for frame in frames
        for line in frame.split("\n")
        if line.startswith("data: ")
    ]


def unnamed(value: Any, path: str = "") -> Iterator[str]:
    """Yield the paths of the fields that the SDK's classes have no name for."""
    if isinstance(value, BaseModel):
        for name in value.model_extra or ():
            yield f"{path}{name}"
        for name in type(value).model_fields:
            yield from unnamed(getattr(value, name), f"{path}{name}.")
    elif isinstance(value, list):
        for one in value:
            yield from unnamed(one, path)


def sealed(turn: Received) -> list[str]:
    """Return the encrypted contents that a turn brought to the backend, each of which can be read there."""
    found = [item["encrypted_content"] for item in turn.json["input"] if item.get("type") == "reasoning"]
    assert all(unseal(one) is not None for one in found)
    return found


def told(turn: Received) -> list[Any]:
    """Return a turn's conversation in short, each item as a tuple of what matters of it."""
    return [_short(item) for item in turn.json["input"] if item.get("type") != "additional_tools"]


def _short(item: dict[str, Any]) -> tuple[Any, ...]:
    match item.get("type", "message"):
        case "message":
            return (item["role"], *map(_part, item["content"]))
        case "reasoning":
            said = unseal(item["encrypted_content"])
            return ("thought", *(said or {}).get("t", ()))
        case "function_call":
            return ("call", item["name"], orjson.loads(item["arguments"]))
        case "custom_tool_call":
            return ("custom", item["name"], item["input"])
        case "function_call_output" | "custom_tool_call_output":
            output = item["output"]
            return ("output", *([output] if isinstance(output, str) else map(_part, output)))
        case kind:
            return (kind, item)


def _part(part: dict[str, Any]) -> Any:
    match part["type"]:
        case "input_text" | "output_text":
            return part["text"]
        case "refusal":
            return part["refusal"]
        case "input_image":
            return part["image_url"]
        case _:
            return part
