"""Builds the events of one answer, in the shapes of recorded streams."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from codex_proxy.protocol import sse
from codex_proxy.protocol.wire import JsonObject, dumps
from codex_proxy.simulator.checks import seal
from codex_proxy.simulator.faults import MESSAGES
from codex_proxy.simulator.script import Script

_WORDS = re.compile(r"\s*\S+|\s+$")
_PADDING = "kT7mQx2ZpLw9VbRs4HdYc8NfGj3KuEa6"
_NO_USAGE_OF_TOOLS = {
    "image_gen": {
        "input_tokens": 0,
        "input_tokens_details": {"image_tokens": 0, "text_tokens": 0},
        "output_tokens": 0,
        "output_tokens_details": {"image_tokens": 0, "text_tokens": 0},
        "total_tokens": 0,
    },
    "web_search": {"num_requests": 0},
}
TERMINAL = frozenset({"response.completed", "response.failed", "response.incomplete", "error"})


class Frame(NamedTuple):
    """One event as it goes out."""

    kind: str
    data: bytes


@dataclass(slots=True)
class Turn:
    """What an answer is about: the request, the account, the ids."""

    body: JsonObject
    model: str
    served_model: str
    tag: str
    user_id: str
    now: float
    serial: int
    input_tokens: int
    cached_tokens: int
    full_output: bool = False
    output_tokens: int = field(default=0)
    _ids: int = field(default=0)

    def new_id(self, prefix: str) -> str:
        """Return an id that carries the account."""
        self._ids += 1
        return f"{prefix}_{self.tag}{self.serial:030x}{self._ids:08x}"

    @property
    def response_id(self) -> str:
        return f"resp_{self.tag}{self.serial:038x}"

    def declared(self) -> list[tuple[str | None, JsonObject]]:
        """Return the tools of the request with the namespace that each lives in."""
        groups: list[Any] = list(self.body.get("tools") or [])
        for item in self.body["input"]:
            if isinstance(item, dict) and item.get("type") == "additional_tools":
                groups += item.get("tools") or []
        found: list[tuple[str | None, JsonObject]] = []
        for tool in groups:
            if not isinstance(tool, dict):
                continue
            if tool.get("type") == "namespace":
                found += [
                    (tool.get("name"), inner) for inner in tool.get("tools") or [] if isinstance(inner, dict)
                ]
            else:
                found.append((None, tool))
        return found

    def namespace_of(self, name: str) -> str | None:
        """Return the namespace that a call of *name* must give; only lite requests have any."""
        for namespace, tool in self.declared():
            if tool.get("name") == name:
                return namespace
        lite = any(isinstance(i, dict) and i.get("type") == "additional_tools" for i in self.body["input"])
        return "functions" if lite else None

    def wants(self, included: str) -> bool:
        """Return whether the request asks to include *included*."""
        return included in (self.body.get("include") or [])


class Composer:
    """Play parts into frames; the order of calls is the order of events."""

    def __init__(self, turn: Turn) -> None:
        self.turn = turn
        self.frames: list[Frame] = []
        self._output: list[JsonObject] = []
        self._index = 0
        self._reasoning_tokens = 0
        options = turn.body.get("stream_options")
        self._padded = not (isinstance(options, dict) and options.get("include_obfuscation") is False)
        self._response = self._skeleton()

    @classmethod
    def play(cls, turn: Turn, script: Script) -> "Composer":
        """Return the composer with the whole answer that *script* describes."""
        composer = cls(turn)
        bare = bool(script.settings.get("bare"))
        if not bare:
            composer.start()
        for kind, fields in script.parts:
            getattr(composer, kind)(**fields)
        if not bare:
            full = turn.full_output if script.full_output is None else script.full_output
            reason = script.settings.get("incomplete")
            usage = not script.settings.get("no_usage")
            if reason is not None:
                composer.end("incomplete", full=full, incomplete_details={"reason": reason})
            else:
                composer.end("completed", full=full, usage=usage)
        return composer

    def start(self) -> None:
        """Open the answer."""
        self._event("response.created", response=self._response)
        self._event("response.in_progress", response=self._response)

    def end(self, status: str, *, full: bool = False, usage: bool = True, **fields: Any) -> None:
        """Close the answer with `response.<status>`."""
        turn = self.turn
        tier = turn.body.get("service_tier")
        response = {
            **self._response,
            "status": status,
            "completed_at": int(turn.now) + 1 if status == "completed" else None,
            "output": self._output if full else [],
            "service_tier": tier if tier in {"priority", "flex"} else "default",
            **fields,
        }
        turn.output_tokens = max(1, turn.output_tokens)
        if usage and status != "failed":
            response["usage"] = {
                "input_tokens": turn.input_tokens,
                "input_tokens_details": {"cached_tokens": turn.cached_tokens, "cache_write_tokens": 0},
                "output_tokens": turn.output_tokens,
                "output_tokens_details": {"reasoning_tokens": self._reasoning_tokens},
                "total_tokens": turn.input_tokens + turn.output_tokens,
            }
        self._event(f"response.{status}", response=response)

    def fail(self, code: str, message: str | None = None, *, how: str = "failed") -> None:
        """Close the answer with a failure: `response.failed`, or a bare `error` event."""
        text = message if message is not None else MESSAGES.get(code, f"The request failed: {code}.")
        if how == "error":
            kind = "service_unavailable_error" if code == "server_is_overloaded" else "server_error"
            self._event("error", error={"type": kind, "code": code, "message": text, "param": None})
        else:
            self.end("failed", error={"code": code, "message": text})

    def keep(self, count: int) -> None:
        """Forget all frames after the first *count*."""
        del self.frames[count:]

    def message(
        self,
        text: str = "",
        pieces: Sequence[str] | None = None,
        phase: str = "final_answer",
        citation: str | None = None,
        *,
        complete: bool = True,
    ) -> None:
        """Say *text*; *pieces* are its deltas when they are not simply its words."""
        deltas = list(pieces) if pieces is not None else _WORDS.findall(text)
        text = text or "".join(deltas)
        item_id = self.turn.new_id("msg")
        item: JsonObject = {"id": item_id, "type": "message", "status": "in_progress", "content": []}
        item |= {"phase": phase, "role": "assistant"}
        part: JsonObject = {"type": "output_text", "annotations": [], "logprobs": [], "text": ""}
        place = {"content_index": 0, "item_id": item_id, "output_index": self._index}
        self._event("response.output_item.added", item=item, output_index=self._index)
        self._event("response.content_part.added", **place, part=part)
        for delta in deltas:
            self._delta("response.output_text.delta", delta, content_index=0, item_id=item_id, logprobs=[])
        annotations: list[JsonObject] = []
        if citation is not None:
            note = {
                "type": "url_citation",
                "start_index": 0,
                "end_index": len(text),
                "title": "Simulated page",
                "url": citation,
            }
            annotations.append(note)
            self._event("response.output_text.annotation.added", **place, annotation=note, annotation_index=0)
        part = {"type": "output_text", "annotations": annotations, "logprobs": [], "text": text}
        self._event("response.output_text.done", **place, logprobs=[], text=text)
        self._event("response.content_part.done", **place, part=part)
        status = "completed" if complete else "incomplete"
        self._done({**item, "status": status, "content": [part]}, text)

    def refusal(self, text: str) -> None:
        """Refuse with *text*."""
        item_id = self.turn.new_id("msg")
        item: JsonObject = {"id": item_id, "type": "message", "status": "in_progress", "content": []}
        item |= {"phase": "final_answer", "role": "assistant"}
        place = {"content_index": 0, "item_id": item_id, "output_index": self._index}
        self._event("response.output_item.added", item=item, output_index=self._index)
        self._event("response.content_part.added", **place, part={"type": "refusal", "refusal": ""})
        for delta in _WORDS.findall(text):
            self._delta("response.refusal.delta", delta, content_index=0, item_id=item_id)
        part = {"type": "refusal", "refusal": text}
        self._event("response.refusal.done", **place, refusal=text)
        self._event("response.content_part.done", **place, part=part)
        self._done({**item, "status": "completed", "content": [part]}, text)

    def reasoning(self, summaries: Sequence[str]) -> None:
        """Think, with a summary part per text; sealed for the account when the request asks."""
        item_id = self.turn.new_id("rs")
        sealed = seal(self.turn.tag, k="reasoning", n=self.turn.serial, t=list(summaries))
        wanted = self.turn.wants("reasoning.encrypted_content")
        item: JsonObject = {"id": item_id, "type": "reasoning", "summary": []}
        if wanted:
            item["encrypted_content"] = sealed
        self._event("response.output_item.added", item=item, output_index=self._index)
        for i, text in enumerate(summaries):
            place = {"item_id": item_id, "output_index": self._index, "summary_index": i}
            self._event(
                "response.reasoning_summary_part.added", **place, part={"type": "summary_text", "text": ""}
            )
            for delta in _WORDS.findall(text):
                self._delta("response.reasoning_summary_text.delta", delta, item_id=item_id, summary_index=i)
            self._event("response.reasoning_summary_text.done", **place, text=text)
            self._event(
                "response.reasoning_summary_part.done", **place, part={"type": "summary_text", "text": text}
            )
        summary = [{"type": "summary_text", "text": text} for text in summaries]
        self._reasoning_tokens += 16 + sum(len(text) for text in summaries) // 4
        self.turn.output_tokens += 16
        self._done({**item, "summary": summary}, "".join(summaries))

    def tool(
        self, name: str | None = None, arguments: JsonObject | str | None = None, call_id: str | None = None
    ) -> None:
        """Call a tool; what is left out is chosen from the tools of the request."""
        tools = [tool for _, tool in self.turn.declared() if tool.get("type") in {"function", "custom"}]
        tool = next((tool for tool in tools if name in {None, tool.get("name")}), None)
        name = name or (str(tool["name"]) if tool is not None else "simulated_tool")
        if tool is not None and tool.get("type") == "custom":
            text = arguments if isinstance(arguments, str) else _custom_input(name)
            self.custom_tool(name, text)
            return
        if arguments is None:
            arguments = sample(tool.get("parameters")) if tool is not None else {}
        text = arguments if isinstance(arguments, str) else dumps(arguments).decode()
        item: JsonObject = {
            "id": self.turn.new_id("fc"),
            "type": "function_call",
            "status": "in_progress",
            "arguments": "",
            "call_id": call_id or self._call_id(),
            "name": name,
        }
        self._call(item, "arguments", text, "response.function_call_arguments")

    def custom_tool(self, name: str, input: str) -> None:  # noqa: A002 -- the wire's own word
        """Call the free-form tool *name*."""
        item: JsonObject = {
            "id": self.turn.new_id("ctc"),
            "type": "custom_tool_call",
            "status": "in_progress",
            "call_id": self._call_id(),
            "input": "",
            "name": name,
        }
        self._call(item, "input", input, "response.custom_tool_call_input")

    def web_search(self, query: str) -> None:
        """Search the web at the backend."""
        item_id = self.turn.new_id("ws")
        action = {"type": "search", "query": query}
        item: JsonObject = {
            "id": item_id,
            "type": "web_search_call",
            "status": "in_progress",
            "action": action,
        }
        self._event("response.output_item.added", item=item, output_index=self._index)
        for step in ("in_progress", "searching", "completed"):
            self._event(f"response.web_search_call.{step}", item_id=item_id, output_index=self._index)
        self._done({**item, "status": "completed"}, "")

    def compaction(self, summary: str) -> None:
        """Give the conversation back as one sealed item."""
        sealed = seal(self.turn.tag, k="compaction", n=self.turn.serial, t=summary)
        self._done(
            {"id": self.turn.new_id("cmp"), "type": "compaction", "encrypted_content": sealed}, summary
        )

    def unknown(self, item: bool = False) -> None:
        """Send what no client knows yet: an event, and with *item* an item too."""
        self._event("response.future_feature.delta", delta="?", future={"nested": [1, 2.5, None]})
        if item:
            identity = self.turn.new_id("ff")
            self._done({"id": identity, "type": "future_item", "payload": {"kept": True}}, "")

    def raw(self, events: Sequence[JsonObject | bytes]) -> None:
        """Send events as they are given; bytes are whole frames."""
        for event in events:
            if isinstance(event, bytes):
                self.frames.append(Frame("", event))
            else:
                kind = str(event.get("type", ""))
                self.frames.append(Frame(kind, sse.frame(kind, dumps(event))))

    def _call(self, item: JsonObject, key: str, text: str, event: str) -> None:
        namespace = self.turn.namespace_of(item["name"])
        if namespace is not None:
            item["namespace"] = namespace
        self._event("response.output_item.added", item=item, output_index=self._index)
        for start in range(0, len(text), 6):
            self._delta(f"{event}.delta", text[start : start + 6], item_id=item["id"])
        self._event(f"{event}.done", **{key: text}, item_id=item["id"], output_index=self._index)
        self._done({**item, "status": "completed", key: text}, text)

    def _done(self, item: JsonObject, text: str) -> None:
        self._event("response.output_item.done", item=item, output_index=self._index)
        self._output.append(item)
        self._index += 1
        self.turn.output_tokens += len(text) // 4 + 1

    def _delta(self, kind: str, delta: str, **fields: Any) -> None:
        if self._padded:
            fields["obfuscation"] = _PADDING[: 16 - len(delta) % 16]
        self._event(kind, delta=delta, **fields, output_index=self._index)

    def _event(self, kind: str, **fields: Any) -> None:
        event = {"type": kind, **fields, "sequence_number": len(self.frames)}
        self.frames.append(Frame(kind, sse.frame(kind, dumps(event))))

    def _call_id(self) -> str:
        return "call_" + self.turn.new_id("c")[-24:]

    def _skeleton(self) -> JsonObject:
        turn, body = self.turn, self.turn.body
        asked = body.get("reasoning") or {}
        return {
            "id": turn.response_id,
            "object": "response",
            "created_at": int(turn.now),
            "status": "in_progress",
            "background": False,
            "completed_at": None,
            "error": None,
            "frequency_penalty": 0.0,
            "incomplete_details": None,
            "instructions": body.get("instructions"),
            "max_output_tokens": None,
            "max_tool_calls": None,
            "model": turn.served_model,
            "moderation": None,
            "output": [],
            "parallel_tool_calls": body.get("parallel_tool_calls", True),
            "presence_penalty": 0.0,
            "previous_response_id": None,
            "prompt_cache_key": body.get("prompt_cache_key"),
            "prompt_cache_retention": "24h",
            "reasoning": {"effort": asked.get("effort", "medium"), "summary": asked.get("summary")},
            "safety_identifier": turn.user_id,
            "service_tier": body.get("service_tier") or "auto",
            "store": False,
            "temperature": 1.0,
            "text": {"format": {"type": "text"}, "verbosity": "medium", **(body.get("text") or {})},
            "tool_choice": body.get("tool_choice", "auto"),
            "tool_usage": _NO_USAGE_OF_TOOLS,
            "tools": body.get("tools") or [],
            "top_logprobs": 0,
            "top_p": 0.98,
            "truncation": "disabled",
            "usage": None,
            "user": None,
            "metadata": {},
        }


def sample(schema: Any, depth: int = 0) -> Any:
    """Return a small value that fits a JSON schema; a shell command is a harmless one."""
    if not isinstance(schema, dict) or depth > 12:
        return {}
    for key in ("const", "default"):
        if key in schema:
            return schema[key]
    if schema.get("enum"):
        return schema["enum"][0]
    for key in ("anyOf", "oneOf", "allOf"):
        if schema.get(key):
            return sample(schema[key][0], depth + 1)
    kind = schema.get("type")
    if isinstance(kind, list):
        kind = kind[0] if kind else None
    match kind:
        case "string":
            return "simulated"
        case "integer" | "number":
            return schema.get("minimum", 1)
        case "boolean":
            return True
        case "null":
            return None
        case "array":
            return [sample(schema.get("items"), depth + 1)] if schema.get("minItems") else []
        case _:
            fields = schema.get("properties") or {}
            needed = schema.get("required") or []
            return {
                name: _command(name, fields[name]) or sample(fields[name], depth + 1)
                for name in needed
                if name in fields
            }


def _command(name: str, schema: Any) -> Any:
    if name not in {"cmd", "command"} or not isinstance(schema, dict):
        return None
    return ["echo", "simulated"] if schema.get("type") == "array" else "echo simulated"


def _custom_input(name: str) -> str:
    if name == "exec":
        # The Codex CLI's tool of this name runs JavaScript around its other tools.
        return "const r = await tools.exec_command({cmd:'echo simulated'}); text(JSON.stringify(r));"
    return "print('simulated')"
