"""What an account answers next, written down beforehand.

A script is a list of parts (a message, a tool call, reasoning, ...) and the way they are sent.
`Script.of` joins several into one answer: reasoning, then a message, then a call.
"""

import inspect
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypedDict, Unpack

from codex_proxy.simulator.faults import check_state

Part = tuple[str, dict[str, Any]]
"""What to play (a method of the composer), and with what."""


class Pace(TypedDict, total=False):
    """How an answer is sent; every factory of `Script` takes these."""

    delay: float
    """Seconds between two events."""
    chunk: "int | Sequence[int] | None"
    """Bytes per write, or sizes that are used in turn; without it events leave as they are."""
    full_output: bool
    """Whether `response.completed` lists the items again; else as the simulator is set."""


@dataclass(slots=True, frozen=True)
class Script:
    """One answer: its parts and its pace."""

    parts: tuple[Part, ...] = ()
    delay: float = 0.0
    chunk: int | Sequence[int] | None = None
    full_output: bool | None = None
    fault: tuple[str, dict[str, Any]] | None = None
    """A state that this one turn meets instead of an answer."""
    settings: dict[str, Any] = field(default_factory=dict)
    """How the composer ends the answer: status, usage, unknown events."""

    @classmethod
    def text(cls, text: str = "pong", *, phase: str = "final_answer", **pace: Unpack[Pace]) -> "Script":
        """Say *text*, a word per delta."""
        return _make([("message", {"text": text, "phase": phase})], pace)

    @classmethod
    def long_text(cls, n_deltas: int = 200, text: str = "word ", **pace: Unpack[Pace]) -> "Script":
        """Say *text* again and again, *n_deltas* times, each a delta of its own."""
        return _make([("message", {"pieces": [text] * n_deltas})], pace)

    @classmethod
    def reasoning(
        cls,
        summary: str | Sequence[str] = "**Thinking**\n\nAbout it.",
        text: str = "pong",
        **pace: Unpack[Pace],
    ) -> "Script":
        """Think first, with *summary* (several: several parts), then say *text*; '' says nothing."""
        summaries = [summary] if isinstance(summary, str) else list(summary)
        parts: list[Part] = [("reasoning", {"summaries": summaries})]
        if text:
            parts.append(("message", {"text": text}))
        return _make(parts, pace)

    @classmethod
    def tool(
        cls,
        name: str | None = None,
        arguments: dict[str, Any] | str | None = None,
        *,
        call_id: str | None = None,
        **pace: Unpack[Pace],
    ) -> "Script":
        """Call the function *name*; left out, the first tool of the request with arguments that fit."""
        return _make([("tool", {"name": name, "arguments": arguments, "call_id": call_id})], pace)

    @classmethod
    def parallel_tools(
        cls, calls: Iterable[tuple[str, dict[str, Any] | str]], **pace: Unpack[Pace]
    ) -> "Script":
        """Call several functions in one answer."""
        return _make([("tool", {"name": name, "arguments": arguments}) for name, arguments in calls], pace)

    @classmethod
    def custom_tool(
        cls,
        name: str = "exec",
        input: str = "print(1)",  # noqa: A002 -- the wire's own word
        **pace: Unpack[Pace],
    ) -> "Script":
        """Call the free-form tool *name*."""
        return _make([("custom_tool", {"name": name, "input": input})], pace)

    @classmethod
    def refusal(cls, text: str = "I cannot help with that.", **pace: Unpack[Pace]) -> "Script":
        """Refuse."""
        return _make([("refusal", {"text": text})], pace)

    @classmethod
    def incomplete(
        cls, reason: str = "max_output_tokens", text: str = "unfinished", **pace: Unpack[Pace]
    ) -> "Script":
        """Say *text* and end with `response.incomplete`."""
        return _make([("message", {"text": text, "complete": False})], pace, incomplete=reason)

    @classmethod
    def empty_output(cls, text: str = "pong", **pace: Unpack[Pace]) -> "Script":
        """Say *text*, but list nothing in `response.completed`, however the simulator is set."""
        return _make([("message", {"text": text})], {**pace, "full_output": False})

    @classmethod
    def nothing(cls, **pace: Unpack[Pace]) -> "Script":
        """Complete without a single item."""
        return _make([], pace)

    @classmethod
    def unicode(
        cls,
        text: str = "naïve 日本語 👩‍👩‍👧 é العربية 🎉",
        sizes: int | Sequence[int] = 1,
        *,
        halves: bool = False,
        **pace: Unpack[Pace],
    ) -> "Script":
        """Say *text* a character per delta, the bytes cut into *sizes*, in the middle of characters too.

        With *halves*, a character beyond the basic plane comes as two deltas, each half a pair.
        """
        pieces: list[str] = []
        for char in text:
            if halves and ord(char) > 0xFFFF:
                pair = char.encode("utf-16-be", "surrogatepass")
                pieces += [chr(int.from_bytes(pair[:2], "big")), chr(int.from_bytes(pair[2:], "big"))]
            else:
                pieces.append(char)
        return _make([("message", {"text": text, "pieces": pieces})], {"chunk": sizes, **pace})

    @classmethod
    def unknown_events(cls, text: str = "pong", **pace: Unpack[Pace]) -> "Script":
        """Say *text* between events that no client knows yet."""
        return _make([("unknown", {}), ("message", {"text": text}), ("unknown", {"item": True})], pace)

    @classmethod
    def no_usage(cls, text: str = "pong", **pace: Unpack[Pace]) -> "Script":
        """Say *text* and end without usage."""
        return _make([("message", {"text": text})], pace, no_usage=True)

    @classmethod
    def web_search(cls, query: str = "weather", text: str = "It is sunny.", **pace: Unpack[Pace]) -> "Script":
        """Search the web, then say *text* with a citation."""
        url = "https://example.com/simulated"
        return _make([("web_search", {"query": query}), ("message", {"text": text, "citation": url})], pace)

    @classmethod
    def raw(cls, events: Iterable[dict[str, Any] | bytes], **pace: Unpack[Pace]) -> "Script":
        """Send exactly these events (dicts, or frames as bytes) and nothing else."""
        return _make([("raw", {"events": list(events)})], pace, bare=True)

    @classmethod
    def recorded(cls, stream: bytes, **pace: Unpack[Pace]) -> "Script":
        """Send the bytes of a recorded stream as they are."""
        return _make([("raw", {"events": [stream]})], pace, bare=True)

    @classmethod
    def state(cls, state: str, **options: Any) -> "Script":
        """Meet the account in *state*, for this one turn."""
        check_state(state, options)
        return cls(fault=(state, options))

    @classmethod
    def of(cls, *scripts: "Script", **pace: Unpack[Pace]) -> "Script":
        """Join several scripts into one answer."""
        parts = [part for script in scripts for part in script.parts]
        settings = {key: value for script in scripts for key, value in script.settings.items()}
        return replace(_make(parts, pace), settings=settings)

    @classmethod
    def from_json(cls, value: Any) -> "Script":
        """Build a script from its JSON: `{"kind": "tool", "name": ..., "arguments": ...}`.

        Raises:
            ValueError: If the kind or one of its fields is unknown.
        """
        if isinstance(value, str):
            return cls.text(value)
        if isinstance(value, list):
            return cls.of(*(cls.from_json(item) for item in value))
        if not isinstance(value, dict):
            raise ValueError("a script is an object with a 'kind', a list of such, or a text")
        fields = dict(value)
        kind = fields.pop("kind", "text")
        if kind not in KINDS:
            raise ValueError(f"unknown script kind {kind!r}; there are {', '.join(KINDS)}")
        if kind == "recorded" and isinstance(fields.get("stream"), str):
            fields["stream"] = fields["stream"].encode()
        try:
            script: Script = getattr(cls, kind)(**fields)
        except TypeError as exc:
            raise ValueError(f"script {kind!r}: {exc}") from exc
        return script


KINDS = tuple(
    name
    for name, member in inspect.getmembers(Script, inspect.ismethod)
    if not name.startswith("_") and name not in {"of", "from_json"}
)


def _make(parts: Sequence[Part], pace: Pace, **settings: Any) -> Script:
    unknown = set(pace) - {"delay", "chunk", "full_output"}
    if unknown:
        raise TypeError(f"unexpected {', '.join(sorted(unknown))}")
    return Script(tuple(parts), settings=settings, **pace)
