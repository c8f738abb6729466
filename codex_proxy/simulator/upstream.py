"""An OpenAI-compatible provider, played locally: what stands beside the accounts.

It speaks Chat, Responses, Messages, both old completions, edits and embeddings, each in a few plain shapes of its own,
and can misbehave:

| fault        | what a request meets                                                                         |
|--------------|----------------------------------------------------------------------------------------------|
| status       | that status, with a body in the dialect's shape; `code`, `headers` and `body` may be given   |
| refuse       | the connection closes without a byte                                                         |
| redirect     | 307 to another path                                                                          |
| stall        | silence: before the head, or after some events                                               |
| cut          | the connection is reset after some events, or `at` a byte                                    |
| end          | the stream ends in order, but before its answer does; the same                               |
| fail         | an error in the stream, after some events                                                    |
| no_usage     | an answer without usage                                                                      |
| no_done      | a chat that ends without `[DONE]`                                                            |
"""

import asyncio
import base64
import contextlib
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

from aiohttp import web

from codex_proxy.protocol.wire import BadJson, JsonObject, dumps, loads
from codex_proxy.simulator.faults import Reply, error_body

FAULTS: Mapping[str, frozenset[str]] = {
    "status": frozenset({"status", "code", "headers", "body", "message"}),
    "refuse": frozenset(),
    "redirect": frozenset({"to"}),
    "stall": frozenset({"after", "seconds"}),
    "cut": frozenset({"after", "at"}),
    "end": frozenset({"after", "at"}),
    "fail": frozenset({"after", "code", "message", "type"}),
    "no_usage": frozenset(),
    "no_done": frozenset(),
}
"""What can go wrong, and what may be said about how."""

_SEAL = "sealed-by-"


@dataclass(slots=True)
class Asked:
    """One request that came."""

    method: str
    path: str
    query: str
    headers: Mapping[str, str]
    body: bytes
    gone: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when its handler is over."""
    was_left: bool = False
    """The other side left before the end."""

    @property
    def json(self) -> Any:
        """What it says."""
        return loads(self.body)


@dataclass(slots=True)
class _Fault:
    name: str
    options: dict[str, Any]
    times: int | None
    paths: str


class SimUpstream:
    """A provider with one key.

    Args:
        name: Marks what it seals, and its ids.
        key: What a request has to bring; empty is none.
        models: What it lists and serves.
    """

    def __init__(
        self,
        name: str = "up",
        *,
        key: str = "sk-upstream-0123456789",
        models: tuple[str, ...] = ("gpt-5.5", "gpt-4o", "text-embedding-3-small"),
        host: str = "127.0.0.1",
        port: int = 0,
    ) -> None:
        self.name = name
        self.key = key
        self.models = models
        self.host = host
        self.port = port
        self.delay = 0.0
        """Seconds between two events."""
        self.says: str | None = None
        """What it answers; None echoes."""
        self.thinks = False
        """Whether its Responses answers have sealed reasoning."""
        self.asked: list[Asked] = []
        self._faults: list[_Fault] = []
        self._runner: web.AppRunner | None = None
        self._serial = 0
        self._stop = asyncio.Event()

    @property
    def base_url(self) -> str:
        """What the proxy's `base-url` is."""
        return f"http://{self.host}:{self.port}"

    @property
    def turns(self) -> list[Asked]:
        """What was asked, health checks aside."""
        return [one for one in self.asked if one.method == "POST"]

    def fault(self, name: str, *, times: int | None = None, paths: str = "/", **options: Any) -> None:
        """Have requests meet a fault, *times* of them or all; several faults come one after the other.

        Raises:
            ValueError: If there is no such fault, or it has no such option.
        """
        if name not in FAULTS or set(options) - FAULTS[name]:
            raise ValueError(f"no fault {name!r} with {', '.join(options)}")
        self._faults.append(_Fault(name, options, times, paths))

    def well(self) -> None:
        """Have no faults any more."""
        self._faults.clear()

    def clear(self) -> None:
        """Forget what was asked."""
        self.asked.clear()

    async def start(self) -> None:
        """Listen; `port` tells where."""
        app = web.Application(client_max_size=256 * 1024 * 1024)
        app.router.add_route("*", "/{path:.*}", self._handle)
        self._runner = web.AppRunner(app, access_log=None, handler_cancellation=True, shutdown_timeout=0.05)
        await self._runner.setup()
        site = web.TCPSite(self._runner, self.host, self.port)
        await site.start()
        self.port = self._runner.addresses[0][1]

    async def aclose(self) -> None:
        """Stop listening and cut what is open."""
        self._stop.set()
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    # -- one request -----------------------------------------------------------------------

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        body = await request.read()
        asked = Asked(request.method, request.path, request.query_string, request.headers, body)
        self.asked.append(asked)
        try:
            return await self._answer(request, asked)
        except (asyncio.CancelledError, ConnectionError):
            asked.was_left = not self._stop.is_set()
            raise
        finally:
            asked.gone.set()

    async def _answer(self, request: web.Request, asked: Asked) -> web.StreamResponse:
        is_messages = asked.path.endswith("/messages")
        fault = self._take(asked.path)
        if fault is not None:
            reply = await self._meet(fault, request, is_messages=is_messages)
            if reply is not None:
                return reply
        if self.key and not self._knows(request):
            return _error(401, "Incorrect API key provided.", "invalid_api_key", is_messages=is_messages)
        if (request.method, asked.path) == ("GET", "/v1/models"):
            data = [
                {"id": one, "object": "model", "created": 1, "owned_by": self.name} for one in self.models
            ]
            return web.json_response({"object": "list", "data": data})
        speak = self._dialects().get(_dialect(asked.path))
        if request.method != "POST" or speak is None:
            return _error(404, "Not Found", "not_found", is_messages=is_messages)
        try:
            fields = asked.json
        except BadJson:
            return _error(400, "The body is no JSON.", "invalid_json", is_messages=is_messages)
        if "/engines/" in asked.path:
            fields["model"] = asked.path.split("/")[3]
        if fields.get("model") not in self.models:
            text = f"The model `{fields.get('model')}` does not exist"
            return _error(404, text, "model_not_found", is_messages=is_messages)
        self._serial += 1
        spoken = speak(fields)
        if isinstance(spoken, Reply):
            return web.Response(body=spoken.body, status=spoken.status, content_type="application/json")
        if isinstance(spoken, dict):
            if fault is not None and fault.name == "no_usage":
                spoken.pop("usage", None)
            return web.Response(body=dumps(spoken), content_type="application/json")
        return await self._stream(request, spoken, fault, is_messages=is_messages)

    def _knows(self, request: web.Request) -> bool:
        given = {request.headers.get("x-api-key", "")}
        given.add(request.headers.get("authorization", "").removeprefix("Bearer "))
        return self.key in given

    def _take(self, path: str) -> _Fault | None:
        for fault in self._faults:
            if not path.startswith(fault.paths) or fault.times == 0:
                continue
            if fault.times is not None:
                fault.times -= 1
            return fault
        return None

    async def _meet(
        self, fault: _Fault, request: web.Request, *, is_messages: bool
    ) -> web.StreamResponse | None:
        """Return the answer of a fault that comes before any stream."""
        options = fault.options
        match fault.name:
            case "status":
                status = int(options.get("status", 500))
                if "body" in options:
                    return web.Response(
                        status=status, body=options["body"], headers=dict(options.get("headers", {}))
                    )
                return _error(
                    status,
                    str(options.get("message", "It went wrong as it was told to.")),
                    options.get("code"),
                    headers=options.get("headers"),
                    is_messages=is_messages,
                )
            case "refuse":
                if request.transport is not None:
                    request.transport.abort()
                return web.Response()
            case "redirect":
                return web.Response(status=307, headers={"Location": str(options.get("to", "/v1/elsewhere"))})
            case "stall" if "after" not in options:
                await self._silence(options.get("seconds"))
        return None

    async def _silence(self, seconds: float | None) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._stop.wait()

    async def _stream(
        self, request: web.Request, frames: list[bytes], fault: _Fault | None, *, is_messages: bool
    ) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        name = fault.name if fault is not None else ""
        options = fault.options if fault is not None else {}
        if name == "no_usage":
            frames = [frame for frame in frames if not frame.startswith(b'data: {"choices":[],')]
            frames = [_without_usage(frame) for frame in frames]
        if name == "no_done":
            frames = [frame for frame in frames if frame != _DONE]
        if "at" in options:
            frames = [b"".join(frames)[: int(options["at"])], b""]
            options = {"after": 1}
        after = int(options.get("after", len(frames)))
        for number, frame in enumerate(frames):
            if number == after and name in ("cut", "end", "fail", "stall"):
                if name == "cut" and request.transport is not None:
                    # What was written is to arrive first.
                    await asyncio.sleep(0.01)
                    request.transport.abort()
                    return response
                if name == "fail":
                    await response.write(_failure(request.path, options, is_messages=is_messages))
                if name in ("end", "fail"):
                    break
                await self._silence(options.get("seconds"))
            await response.write(frame)
            if self.delay:
                await asyncio.sleep(self.delay)
        await response.write_eof()
        return response

    # -- dialects --------------------------------------------------------------------------

    def _dialects(self) -> Mapping[str, Callable[[JsonObject], "Spoken"]]:
        return {
            "chat": self._chat,
            "responses": self._responses,
            "messages": self._messages,
            "completions": self._completions,
            "edits": self._edits,
            "embeddings": self._embeddings,
        }

    def _text(self, fields: JsonObject) -> str:
        if self.says is not None:
            return self.says
        items = fields.get("messages") or fields.get("input") or fields.get("prompt") or ""
        return f"{self.name} says: {_last_words(items)}"

    def _chat(self, fields: JsonObject) -> "Spoken":
        text, identity = self._text(fields), f"chatcmpl-{self.name}-{self._serial}"
        count = int(fields.get("n") or 1)
        usage = {
            "prompt_tokens": 11,
            "completion_tokens": len(text.split()),
            "total_tokens": 11 + len(text.split()),
            "prompt_tokens_details": {"cached_tokens": 3},
            "completion_tokens_details": {"reasoning_tokens": 1},
        }
        head = {"id": identity, "created": 1, "model": fields["model"]}
        if not fields.get("stream"):
            choices = [
                {
                    "index": index,
                    "message": {"role": "assistant", "content": text},
                    "logprobs": None,
                    "finish_reason": "stop",
                }
                for index in range(count)
            ]
            return {**head, "object": "chat.completion", "choices": choices, "usage": usage}
        head["object"] = "chat.completion.chunk"
        asks = (fields.get("stream_options") or {}).get("include_usage") is True
        extra: JsonObject = {"usage": None} if asks else {}

        def chunk(index: int, delta: JsonObject, reason: str | None = None) -> bytes:
            choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": reason}
            return _data({"choices": [choice], **head, **extra})

        frames = []
        for index in range(count):
            frames.append(chunk(index, {"role": "assistant", "content": ""}))
            frames += [chunk(index, {"content": word}) for word in _words(text)]
            frames.append(chunk(index, {}, "stop"))
        if asks:
            frames.append(_data({"choices": [], **head, "usage": usage}))
        return [*frames, _DONE]

    def _completions(self, fields: JsonObject) -> "Spoken":
        text = self._text(fields)
        usage = {"prompt_tokens": 5, "completion_tokens": 7, "total_tokens": 12}
        head = {
            "id": f"cmpl-{self.name}-{self._serial}",
            "object": "text_completion",
            "created": 1,
            "model": fields["model"],
        }
        if not fields.get("stream"):
            choice = {"index": 0, "text": text, "logprobs": None, "finish_reason": "stop"}
            return {**head, "choices": [choice], "usage": usage}
        frames = [
            _data({**head, "choices": [{"index": 0, "text": word, "finish_reason": None}]})
            for word in _words(text)
        ]
        end = {**head, "choices": [{"index": 0, "text": "", "finish_reason": "stop"}], "usage": usage}
        return [*frames, _data(end), _DONE]

    def _edits(self, fields: JsonObject) -> "Spoken":
        usage = {"prompt_tokens": 5, "completion_tokens": 7, "total_tokens": 12}
        choice = {"index": 0, "text": self._text(fields)}
        return {"object": "edit", "created": 1, "choices": [choice], "usage": usage}

    def _embeddings(self, fields: JsonObject) -> "Spoken":
        given = fields.get("input")
        texts = given if isinstance(given, list) else [given]
        data = []
        for index, text in enumerate(texts):
            numbers = [float(len(str(text))), 0.5, -1.0]
            packed = base64.b64encode(struct.pack("<3f", *numbers)).decode()
            data.append({
                "object": "embedding",
                "index": index,
                "embedding": packed if fields.get("encoding_format") == "base64" else numbers,
            })
        usage = {"prompt_tokens": 4 * len(texts), "total_tokens": 4 * len(texts)}
        return {"object": "list", "data": data, "model": fields["model"], "usage": usage}

    def _responses(self, fields: JsonObject) -> "Spoken":
        complaint = self._complain(fields)
        if complaint is not None:
            return complaint
        text = self._text(fields)
        identity = f"resp_{self.name}_{self._serial}"
        output: list[JsonObject] = []
        if self.thinks:
            output.append({
                "type": "reasoning",
                "id": f"rs_{self.name}_{self._serial}",
                "summary": [],
                "encrypted_content": f"{_SEAL}{self.name}-{self._serial}",
            })
        output.append({
            "type": "message",
            "id": f"msg_{self.name}_{self._serial}",
            "role": "assistant",
            "status": "completed",
            "content": [{"type": "output_text", "text": text, "annotations": []}],
        })
        usage = {
            "input_tokens": 21,
            "input_tokens_details": {"cached_tokens": 8},
            "output_tokens": len(text.split()),
            "output_tokens_details": {"reasoning_tokens": 2},
            "total_tokens": 21 + len(text.split()),
        }
        response = {
            "id": identity,
            "object": "response",
            "created_at": 1,
            "status": "in_progress",
            "model": fields["model"],
            "output": [],
            "error": None,
            "usage": None,
            "store": fields.get("store", True),
        }
        final = {**response, "status": "completed", "output": output, "usage": usage}
        if not fields.get("stream"):
            return final
        events: list[JsonObject] = [
            {"type": "response.created", "response": response},
            {"type": "response.in_progress", "response": response},
        ]
        for index, item in enumerate(output):
            events.append({"type": "response.output_item.added", "output_index": index, "item": item})
            if item["type"] == "message":
                place = {"item_id": item["id"], "output_index": index, "content_index": 0}
                events += [
                    {"type": "response.output_text.delta", **place, "delta": word} for word in _words(text)
                ]
                events.append({"type": "response.output_text.done", **place, "text": text})
            events.append({"type": "response.output_item.done", "output_index": index, "item": item})
        events.append({"type": "response.completed", "response": final})
        return [
            _event(event["type"], {**event, "sequence_number": number}) for number, event in enumerate(events)
        ]

    def _complain(self, fields: JsonObject) -> Reply | None:
        """Refuse what the public API refuses."""
        limit = fields.get("max_output_tokens")
        if limit is not None and (not isinstance(limit, int) or limit < 16):
            return _refused("Invalid 'max_output_tokens': expected a value >= 16.", "integer_below_min_value")
        items = fields.get("input")
        for item in items if isinstance(items, list) else ():
            if item.get("type") == "additional_tools":
                return _refused("Invalid value: 'additional_tools'.", "invalid_value")
            sealed = item.get("encrypted_content")
            if sealed is not None and not str(sealed).startswith(f"{_SEAL}{self.name}-"):
                return _refused("The encrypted content could not be verified.", "invalid_encrypted_content")
        previous = fields.get("previous_response_id")
        if previous is not None and not str(previous).startswith(f"resp_{self.name}_"):
            return _refused(f"Previous response '{previous}' not found.", "previous_response_not_found")
        return None

    def _messages(self, fields: JsonObject) -> "Spoken":
        text = self._text(fields)
        usage = {
            "input_tokens": 9,
            "cache_read_input_tokens": 4,
            "cache_creation_input_tokens": 2,
            "output_tokens": len(text.split()),
        }
        message = {
            "id": f"msg_{self.name}_{self._serial}",
            "type": "message",
            "role": "assistant",
            "model": fields["model"],
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "usage": {**usage, "output_tokens": 1},
        }
        if not fields.get("stream"):
            content = [{"type": "text", "text": text}]
            return {**message, "content": content, "stop_reason": "end_turn", "usage": usage}
        events: list[JsonObject] = [
            {"type": "message_start", "message": message},
            {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}},
            {"type": "ping"},
            *(
                {
                    "type": "content_block_delta",
                    "index": 0,
                    "delta": {"type": "text_delta", "text": word},
                }
                for word in _words(text)
            ),
            {"type": "content_block_stop", "index": 0},
            {
                "type": "message_delta",
                "delta": {"stop_reason": "end_turn", "stop_sequence": None},
                "usage": {"output_tokens": len(text.split())},
            },
            {"type": "message_stop"},
        ]
        return [_event(event["type"], event) for event in events]


Spoken = JsonObject | list[bytes] | Reply
"""A plain answer, the frames of a stream, or a refusal."""

_DONE = b"data: [DONE]\n\n"


def _dialect(path: str) -> str:
    parts = path.strip("/").split("/")
    match parts:
        case ["v1", "chat", "completions"]:
            return "chat"
        case ["v1", "engines", _, "completions"]:
            return "completions"
        case ["v1", one]:
            return one
        case _:
            return ""


def _data(value: JsonObject) -> bytes:
    return b"data: " + dumps(value) + b"\n\n"


def _event(kind: str, value: JsonObject) -> bytes:
    return b"event: " + kind.encode() + b"\n" + _data(value)


def _words(text: str) -> list[str]:
    words = text.split(" ")
    return [word if place == 0 else f" {word}" for place, word in enumerate(words)]


def _last_words(items: Any) -> str:
    if isinstance(items, str):
        return items
    for item in reversed(items if isinstance(items, list) else []):
        if isinstance(item, str):
            return item
        if isinstance(item, dict) and item.get("role") == "user":
            content = item.get("content")
            if isinstance(content, str):
                return content
            return " ".join(str(part.get("text", "")) for part in content or [] if isinstance(part, dict))
    return ""


def _without_usage(frame: bytes) -> bytes:
    head, _, data = frame.partition(b"data: ")
    if not data.startswith(b"{"):
        return frame
    value = loads(data)
    value.pop("usage", None)
    for key in ("response", "message"):
        if isinstance(value.get(key), dict):
            value[key].pop("usage", None)
    return head + _data(value)


def _refused(text: str, code: str) -> Reply:
    return Reply.json(error_body(text, code=code), 400)


def _error(
    status: int,
    text: str,
    code: str | None,
    *,
    headers: Mapping[str, str] | None = None,
    is_messages: bool = False,
) -> web.Response:
    kinds = {401: "authentication_error", 403: "permission_error", 404: "not_found_error"}
    kinds |= {429: "rate_limit_error", 529: "overloaded_error"}
    if is_messages:
        kind = kinds.get(status, "api_error" if status >= 500 else "invalid_request_error")
        body: JsonObject = {"type": "error", "error": {"type": kind, "message": text}}
    else:
        kind = "server_error" if status >= 500 else "invalid_request_error"
        body = error_body(text, code=code, kind=code if code == "insufficient_quota" else kind)
    return web.Response(
        body=dumps(body), status=status, content_type="application/json", headers=dict(headers or {})
    )


def _failure(path: str, options: Mapping[str, Any], *, is_messages: bool) -> bytes:
    """Return an error in the stream, as the dialect of *path* has it."""
    code = options.get("code", "server_error")
    text = str(options.get("message", "It went wrong in the middle."))
    kind = str(options.get("type", code))
    if is_messages:
        return _event("error", {"type": "error", "error": {"type": kind, "message": text}})
    if path.endswith("/responses"):
        response = {"id": "resp_x", "status": "failed", "error": {"code": code, "message": text}}
        return _event("response.failed", {"type": "response.failed", "response": response})
    return _data(error_body(text, code=code, kind=kind))
