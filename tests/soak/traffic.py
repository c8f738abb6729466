"""Callers of every kind, and what each of them accepts as the end of an answer."""

import dataclasses
import random
from collections.abc import Callable
from typing import Any

import aiohttp
import orjson

from codex_proxy.protocol.sse import Batch, Parser
from tests.harness import CODEX_HEADERS, LITE, STANDARD


@dataclasses.dataclass(slots=True, frozen=True)
class Outcome:
    """How one request ended."""

    kind: str
    request_id: str
    status: int
    end: str
    """`good`, `cut` (the dialect's own error after the answer had begun), or what is wrong."""


@dataclasses.dataclass(slots=True, frozen=True)
class Kind:
    """One way of asking."""

    name: str
    path: str
    body: Callable[[str, str], dict[str, Any]]
    judge: Callable[[bytes], str]
    headers: dict[str, str] = dataclasses.field(default_factory=dict)
    whole: Callable[[Any], bool] | None = None
    """For a plain answer: whether it is whole."""


def _events(data: bytes) -> Batch:
    parser = Parser()
    return parser.feed(data) + parser.finish()


def _judge_responses(data: bytes) -> str:
    last = events[-1].type if (events := _events(data)) else "nothing"
    return {"response.completed": "good", "response.failed": "cut"}.get(last, f"ends with {last}")


def _judge_chat(data: bytes) -> str:
    lines = [line for line in data.split(b"\n") if line]
    if lines[-1:] != [b"data: [DONE]"]:
        return "cut" if lines and b'"error"' in lines[-1] else f"ends with {lines[-1:]!r}"
    if b'"error"' in lines[-2]:
        return "cut"
    return "good" if any(b'"finish_reason":"stop"' in line for line in lines) else "no finish_reason"


def _judge_messages(data: bytes) -> str:
    last = events[-1].type if (events := _events(data)) else "nothing"
    return {"message_stop": "good", "error": "cut"}.get(last, f"ends with {last}")


def _never(_: bytes) -> str:
    return "a stream, unasked"


def _input(text: str) -> list[dict[str, Any]]:
    return [{"type": "message", "role": "user", "content": [{"type": "input_text", "text": text}]}]


KINDS = (
    Kind(
        "codex",
        "/backend-api/codex/responses",
        lambda text, talk: {
            "model": STANDARD,
            "input": _input(text),
            "stream": True,
            "store": False,
            "prompt_cache_key": talk,
            "instructions": "",
        },
        _judge_responses,
        CODEX_HEADERS,
    ),
    Kind(
        "responses stream",
        "/v1/responses",
        lambda text, talk: {"model": LITE, "input": text, "stream": True, "prompt_cache_key": talk},
        _judge_responses,
    ),
    Kind(
        "responses plain",
        "/v1/responses",
        lambda text, talk: {"model": STANDARD, "input": text},
        _never,
        whole=lambda answer: answer["status"] == "completed" and "pong" in str(answer["output"]),
    ),
    Kind(
        "chat stream",
        "/v1/chat/completions",
        lambda text, talk: {
            "model": STANDARD,
            "messages": [{"role": "system", "content": talk}, {"role": "user", "content": text}],
            "stream": True,
        },
        _judge_chat,
    ),
    Kind(
        "chat plain",
        "/v1/chat/completions",
        lambda text, talk: {
            "model": LITE,
            "messages": [{"role": "user", "content": text}],
            "user": "constant",
        },
        _never,
        whole=lambda answer: "pong" in answer["choices"][0]["message"]["content"],
    ),
    Kind(
        "messages stream",
        "/v1/messages",
        lambda text, talk: {
            "model": STANDARD,
            "max_tokens": 4000,
            "messages": [{"role": "user", "content": text}],
            "metadata": {"user_id": f"user_x_session_{talk}"},
            "stream": True,
        },
        _judge_messages,
    ),
    Kind(
        "messages plain",
        "/v1/messages",
        lambda text, talk: {
            "model": STANDARD,
            "max_tokens": 4000,
            "messages": [{"role": "user", "content": text}],
        },
        _never,
        whole=lambda answer: "pong" in answer["content"][0]["text"],
    ),
    Kind(
        "compact",
        "/v1/responses/compact",
        lambda text, talk: {"model": STANDARD, "input": _input(text), "instructions": ""},
        _never,
        whole=lambda answer: any(item.get("encrypted_content") for item in answer["output"]),
    ),
)


async def ask(session: aiohttp.ClientSession, rng: random.Random, number: int) -> Outcome:
    """Send one request of a random kind in one of a few hundred conversations."""
    kind = rng.choice(KINDS)
    talk = f"00000000-0000-4000-8000-{rng.randrange(300):012d}"
    # So many different beginnings, that what is remembered of conversations is full after a while.
    body = kind.body(f"question {number % 1500}", talk)
    async with session.post(kind.path, json=body, headers=kind.headers) as response:
        data = await response.read()
        request_id = response.headers.get("x-request-id", "")
        return Outcome(kind.name, request_id, response.status, _judge(kind, response, data))


def _judge(kind: Kind, response: aiohttp.ClientResponse, data: bytes) -> str:
    if response.status != 200:
        return f"{response.status} {data[:200].decode(errors='replace')}"
    if response.content_type == "text/event-stream":
        return kind.judge(data)
    assert kind.whole is not None, f"{kind.name} asked for a stream"
    return "good" if kind.whole(orjson.loads(data)) else f"not whole: {data[:200]!r}"
