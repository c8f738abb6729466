"""Chooses what to say when no script says it: echoes, tool calls, and the magic words for people."""

import re
from collections.abc import Callable
from typing import Any

from codex_proxy.protocol.wire import BadJson, JsonObject, dumps, loads
from codex_proxy.simulator.compose import Turn, sample
from codex_proxy.simulator.script import Script

_MAGIC = re.compile(r"\bsim:([a-z_]+)((?:[ \t]+[^\n]*)?)")


def choose(turn: Turn) -> Script:
    """Return the answer to a request for which nothing is scripted.

    A tool's output is spoken about; a magic word in the last message of the user is obeyed; a
    tool that must be called is called; a schema that must be met is met; else it is an echo.
    """
    items = turn.body["input"]
    last = items[-1] if items else {}
    if isinstance(last, dict):
        if last.get("type") == "compaction_trigger":
            return Script(parts=(("compaction", {"summary": f"{len(items) - 1} items"}),))
        if str(last.get("type", "")).endswith("_output"):
            return Script.text(f"The tool said: {_flat(last.get('output'))[:400].strip()}")
    text = last_user_text(items)
    magic = obey(text)
    if magic is not None:
        return magic
    choice = turn.body.get("tool_choice")
    if choice == "required":
        return Script.tool()
    if isinstance(choice, dict) and choice.get("type") in {"function", "custom"}:
        return Script.tool(choice.get("name"))
    form = (turn.body.get("text") or {}).get("format") or {}
    if form.get("type") == "json_schema":
        return Script.text(dumps(sample(form.get("schema"))).decode())
    if form.get("type") == "json_object":
        return Script.text('{"answer":"pong"}')
    said = " ".join(text.split())
    return Script.text(f"pong: {said[:200]}" if said else "pong")


def obey(text: str) -> Script | None:
    """Return what the magic word in *text* asks for, or None when there is none."""
    found = _MAGIC.search(text)
    if found is None or found[1] not in WORDS:
        return None
    try:
        return WORDS[found[1]](found[2].split())
    except (ValueError, IndexError) as exc:
        return Script.text(f"sim:{found[1]} was not understood: {exc}")


def last_user_text(items: list[Any]) -> str:
    """Return the text of the user's last message."""
    for item in reversed(items):
        if isinstance(item, dict) and item.get("role") == "user":
            return _flat(item.get("content"))
    return ""


def _flat(content: Any) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        return ""
    return "\n".join(str(part["text"]) for part in content if isinstance(part, dict) and "text" in part)


def _number(words: list[str], default: float) -> float:
    return float(words[0]) if words else default


def _tool(words: list[str]) -> Script:
    arguments: JsonObject | str | None = None
    if len(words) > 1:
        rest = " ".join(words[1:])
        try:
            loads(rest)
        except BadJson as exc:
            raise ValueError(f"the arguments are no JSON: {exc}") from exc
        arguments = rest
    return Script.tool(words[0] if words else None, arguments)


def _parallel(words: list[str]) -> Script:
    names: list[str | None] = list(words) or [None, None]
    return Script.of(*(Script.tool(name) for name in names))


def _fail(words: list[str]) -> Script:
    code = words[0] if words else "server_error"
    return Script.state("failed", code=code, after=int(words[1]) if len(words) > 1 else 0)


def _cut(words: list[str]) -> Script:
    return Script.state("cut", after=int(_number(words, 5)))


def _slow(words: list[str]) -> Script:
    return Script.long_text(20, delay=_number(words, 0.2))


WORDS: dict[str, Callable[[list[str]], Script]] = {
    "tool": _tool,
    "tools": _parallel,
    "custom": lambda words: Script.custom_tool(words[0] if words else "exec"),
    "reasoning": lambda words: Script.reasoning(),
    "long": lambda words: Script.long_text(int(_number(words, 200))),
    "slow": _slow,
    "refusal": lambda words: Script.refusal(),
    "incomplete": lambda words: Script.incomplete(words[0] if words else "max_output_tokens"),
    "nothing": lambda words: Script.nothing(),
    "unicode": lambda words: Script.unicode(),
    "unknown": lambda words: Script.unknown_events(),
    "no_usage": lambda words: Script.no_usage(),
    "search": lambda words: Script.web_search(" ".join(words) or "weather"),
    "fail": _fail,
    "status": lambda words: Script.state("server_error", status=int(_number(words, 500))),
    "limit": lambda words: Script.state("usage_limit", resets_in=_number(words, 3600)),
    "rate_limit": lambda words: Script.state("rate_limit", retry_after=_number(words, 1)),
    "overloaded": lambda words: Script.state("overloaded"),
    "cut": _cut,
    "stall": lambda words: Script.state("stall", where="middle", seconds=_number(words, 30)),
    "refuse": lambda words: Script.state("refuse"),
}
"""The magic words, by what follows `sim:`."""
