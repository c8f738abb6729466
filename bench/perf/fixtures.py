"""What the mock backend plays and what callers ask for: written here, shaped as the real ones are.

Events have the keys, their order, the item ids and the padding (`obfuscation`) of recorded ones. A hole
(`HOLE`) stands for a number: the mock stamps answers with it, the load generator conversations.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from codex_proxy.protocol.wire import JsonObject, dumps

HOLE = "@" * 12
MODEL = "gpt-5.5"

_WORDS = (
    " the", " quick", " answer", " is", " a", " list", " of", " small", " words", ",", " which", " tell",
    " nothing", " new", ".", "\n", " \"So", " it", " goes\"", " on",
)  # fmt: skip

# Text of a delta and its padding are sixteen characters together, or the next sixteen.
_PADDED = 16
_LETTERS = "aZ3kQ9xLm2VbT7cR"

_RESPONSE_ID = f"resp_0b1d5e2f{HOLE}016a1e8c8f5564819991"
_MESSAGE_ID = "msg_0b1d5e2f80b016a1e8c903550819997d4dacef7797a32"


@dataclass(slots=True, frozen=True)
class Script:
    """One thing that the mock backend plays."""

    deltas: tuple[str, ...]
    pace: float = 0.0
    """Seconds between two deltas; 0: all is written at once."""
    ends: bool = True
    """Whether anybody waits for its end."""

    @property
    def text(self) -> str:
        return "".join(self.deltas)

    @property
    def events(self) -> int:
        return len(self.deltas) + 8

    def render(self) -> bytes:
        """Return its events as the backend frames them."""
        return b"".join(
            b"event: %s\ndata: %s\n\n" % (event["type"].encode(), dumps({**event, "sequence_number": number}))
            for number, event in enumerate(_events(self.deltas))
        )

    def plan(self, file: str) -> JsonObject:
        """Return what the mock is told about it."""
        if not self.pace:
            return {"file": file, "lead": self.events, "tail": 0, "pace": 0}
        # One delta comes at once, so that whoever holds greetings back has something to let go.
        return {"file": file, "lead": 5, "tail": 4, "pace": round(self.pace * 1_000_000)}


def words(count: int) -> tuple[str, ...]:
    """Return the deltas of a text of so many tokens."""
    return tuple(_WORDS[number % len(_WORDS)] for number in range(count))


def _response(status: str, output: list[JsonObject], usage: JsonObject | None) -> JsonObject:
    is_over = status == "completed"
    return {
        "id": _RESPONSE_ID, "object": "response", "created_at": 1779338383, "status": status,
        "background": False, "completed_at": 1779338384 if is_over else None, "error": None,
        "frequency_penalty": 0.0, "incomplete_details": None, "instructions": "You are brief.",
        "max_output_tokens": None, "max_tool_calls": None, "model": MODEL, "moderation": None,
        "output": output, "parallel_tool_calls": True, "presence_penalty": 0.0, "previous_response_id": None,
        "prompt_cache_key": "5b0ce3c5-1c52-4a0e-9d25-6f2f6d1f2a11", "prompt_cache_retention": "24h",
        "reasoning": {"effort": "medium", "summary": None},
        "safety_identifier": "user-000000000000000000000000", "service_tier": "default" if is_over else "auto",
        "store": False, "temperature": 1.0, "text": {"format": {"type": "text"}, "verbosity": "medium"},
        "tool_choice": "auto",
        "tool_usage": {
            "image_gen": {
                "input_tokens": 0, "input_tokens_details": {"image_tokens": 0, "text_tokens": 0},
                "output_tokens": 0, "output_tokens_details": {"image_tokens": 0, "text_tokens": 0},
                "total_tokens": 0,
            },
            "web_search": {"num_requests": 0},
        },
        "tools": [], "top_logprobs": 0, "top_p": 0.98, "truncation": "disabled", "usage": usage,
        "user": None, "metadata": {},
    }  # fmt: skip


def _events(deltas: tuple[str, ...]) -> Iterator[JsonObject]:
    text = "".join(deltas)
    part = {"type": "output_text", "annotations": [], "logprobs": [], "text": text}
    content = [{"type": "output_text", "annotations": [], "logprobs": [], "text": text}]

    def item(status: str, content: list[JsonObject]) -> JsonObject:
        return {
            "id": _MESSAGE_ID, "type": "message", "status": status, "content": content,
            "phase": "final_answer", "role": "assistant",
        }  # fmt: skip

    yield {"type": "response.created", "response": _response("in_progress", [], None)}
    yield {"type": "response.in_progress", "response": _response("in_progress", [], None)}
    yield {"type": "response.output_item.added", "item": item("in_progress", []), "output_index": 0}
    yield {
        "type": "response.content_part.added", "content_index": 0, "item_id": _MESSAGE_ID, "output_index": 0,
        "part": {**part, "text": ""},
    }  # fmt: skip
    for number, delta in enumerate(deltas):
        padding = -len(delta) % _PADDED
        yield {
            "type": "response.output_text.delta", "content_index": 0, "delta": delta, "item_id": _MESSAGE_ID,
            "logprobs": [], "obfuscation": (_LETTERS * 2)[number % 16 :][:padding], "output_index": 0,
        }  # fmt: skip
    yield {
        "type": "response.output_text.done", "content_index": 0, "item_id": _MESSAGE_ID, "logprobs": [],
        "output_index": 0, "text": text,
    }  # fmt: skip
    yield {
        "type": "response.content_part.done", "content_index": 0, "item_id": _MESSAGE_ID, "output_index": 0,
        "part": part,
    }  # fmt: skip
    yield {"type": "response.output_item.done", "item": item("completed", content), "output_index": 0}
    usage = {
        "input_tokens": 27, "input_tokens_details": {"cached_tokens": 0},
        "output_tokens": len(deltas), "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": len(deltas) + 27,
    }  # fmt: skip
    yield {
        "type": "response.completed",
        "response": _response("completed", [item("completed", content)], usage),
    }


# --- what callers ask

PATHS = {
    "responses": "/v1/responses",
    "chat": "/v1/chat/completions",
    "messages": "/v1/messages",
    "backend": "/backend-api/codex/responses",
}


def ask(dialect: str, script: str, *, size: int = 0) -> bytes:
    """Return the body of a request in *dialect* for *script*, filled up to about *size* bytes as an agent does."""
    said = f"bench:{script}. This is conversation {HOLE}."
    make = {
        "responses": _ask_responses,
        "backend": _ask_backend,
        "chat": _ask_chat,
        "messages": _ask_messages,
    }
    steps = 0
    if size:
        empty, one = (len(dumps(make[dialect](said, count))) for count in (0, 10))
        steps = max(1, round((size - empty) * 10 / (one - empty)))
    return dumps(make[dialect](said, steps))


_RULES = "You are brief."
_PARAMETERS: JsonObject = {
    "type": "object",
    "properties": {
        "path": {"type": "string", "description": "File to look at, relative to the workspace."},
        "first": {"type": "integer", "description": "Number of the first line."},
        "count": {"type": "integer", "description": "How many lines."},
    },
    "required": ["path"],
    "additionalProperties": False,
}
_TOOL = ("read_file", "Return some lines of a file of the workspace, each with its number.")


def _output(step: int) -> str:
    return "".join(
        f'{line}\tdef handler_{step}(request: "Request") -> str:  # \u2192 "line" {line}\n\t\treturn f"{{request.path}}\\\\n"\n'
        for line in range(1, 13)
    )


def _arguments(step: int) -> str:
    return json.dumps({"path": f"src/part_{step}/module.py", "first": 1, "count": 12})


def _ask_backend(said: str, steps: int) -> JsonObject:
    return {**_ask_responses(said, steps), "store": False}


def _ask_responses(said: str, steps: int) -> JsonObject:
    items: list[Any] = [
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": said}]}
    ]
    for step in range(steps):
        call = f"call_{step:024d}"
        items += [
            {"type": "function_call", "call_id": call, "name": _TOOL[0], "arguments": _arguments(step)},
            {"type": "function_call_output", "call_id": call, "output": _output(step)},
        ]
    tool = {
        "type": "function",
        "name": _TOOL[0],
        "description": _TOOL[1],
        "parameters": _PARAMETERS,
        "strict": False,
    }
    return {
        "model": MODEL, "instructions": _RULES, "input": items, "stream": True,
        **({"tools": [tool]} if steps else {}),
    }  # fmt: skip


def _ask_chat(said: str, steps: int) -> JsonObject:
    messages: list[Any] = [{"role": "system", "content": _RULES}, {"role": "user", "content": said}]
    for step in range(steps):
        call = f"call_{step:024d}"
        function = {"name": _TOOL[0], "arguments": _arguments(step)}
        messages += [
            {"role": "assistant", "content": None, "tool_calls": [{"id": call, "type": "function", "function": function}]},
            {"role": "tool", "tool_call_id": call, "content": _output(step)},
        ]  # fmt: skip
    tool = {
        "type": "function",
        "function": {"name": _TOOL[0], "description": _TOOL[1], "parameters": _PARAMETERS},
    }
    return {"model": MODEL, "messages": messages, "stream": True, **({"tools": [tool]} if steps else {})}


def _ask_messages(said: str, steps: int) -> JsonObject:
    messages: list[Any] = [{"role": "user", "content": said}]
    for step in range(steps):
        call = f"toolu_{step:024d}"
        messages += [
            {"role": "assistant", "content": [
                {"type": "tool_use", "id": call, "name": _TOOL[0], "input": json.loads(_arguments(step))}
            ]},
            {"role": "user", "content": [{"type": "tool_result", "tool_use_id": call, "content": _output(step)}]},
        ]  # fmt: skip
    tool = {"name": _TOOL[0], "description": _TOOL[1], "input_schema": _PARAMETERS}
    return {
        "model": MODEL, "system": _RULES, "messages": messages, "max_tokens": 100_000, "stream": True,
        **({"tools": [tool]} if steps else {}),
    }  # fmt: skip


def request(path: str, body: bytes, headers: dict[str, str]) -> bytes:
    """Return a whole HTTP request, as it goes over the wire."""
    lines = [
        f"POST {path} HTTP/1.1", "Host: 127.0.0.1", "Accept: text/event-stream",
        "Content-Type: application/json", "User-Agent: bench/1.0",
        *(f"{name}: {value}" for name, value in headers.items()), f"Content-Length: {len(body)}",
    ]  # fmt: skip
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


# --- what comes back


@dataclass(slots=True, frozen=True)
class Dialect:
    """How an answer in a dialect is recognised, cheaply."""

    marker: str
    ending: str


DIALECTS = {
    "responses": Dialect('"type":"response.output_text.delta"', "}\n\n"),
    "backend": Dialect('"type":"response.output_text.delta"', "}\n\n"),
    "chat": Dialect('"delta":{"content":', "data: [DONE]\n\n"),
    "messages": Dialect('"type":"text_delta"', '{"type":"message_stop"}\n\n'),
}


def read_answer(dialect: str, raw: bytes) -> str:
    """Return the text of a streamed answer.

    Raises:
        ValueError: If it is not a whole, good answer.
    """
    text, ended = "", ""
    for frame in raw.decode().split("\n\n")[:-1]:
        data = "\n".join(line[6:] for line in frame.split("\n") if line.startswith("data: "))
        if not data:
            raise ValueError(f"a frame without data: {frame[:80]!r}")
        if data == "[DONE]":
            ended += ".done"
            continue
        event = json.loads(data)
        if dialect == "chat":
            if "error" in event:
                raise ValueError(data)
            for choice in event["choices"]:
                text += choice["delta"].get("content") or ""
                ended += choice.get("finish_reason") or ""
        elif dialect == "messages":
            text += event["delta"]["text"] if event["type"] == "content_block_delta" else ""
            ended += event["delta"]["stop_reason"] if event["type"] == "message_delta" else ""
            ended += ".done" if event["type"] == "message_stop" else ""
        else:
            text += event["delta"] if event["type"] == "response.output_text.delta" else ""
            ended += "stop.done" if event["type"] == "response.completed" else ""
    if ended.replace("end_turn", "stop") != "stop.done":
        raise ValueError(f"an answer that ends with {ended!r}")
    return text


def expectation(dialect: str, raw: bytes) -> JsonObject:
    """Return what an answer like *raw* is recognised by."""
    known = DIALECTS[dialect]
    found = raw.count(known.marker.encode())
    if not found or not raw.endswith(known.ending.encode()):
        raise ValueError(f"an answer that nobody would recognise: {raw[-200:]!r}")
    return {
        "frames": raw.count(b"\n\n"), "marker": known.marker, "count": found, "ending": known.ending,
        "bytes": len(raw),
    }  # fmt: skip
